"""04  Margin-based rejection sampling: the judge learns from its best critiques where it can tell good ones from bad ones."""

# Outline with a budget of 340 lines (at most 400 with the next issue's additions).


# ---- The method: confidence, margin, selection (70) ----------------------------------------------
def confidence_in_label(log_odds, label_is_a):
    """S = P(label) = sigmoid(+-r): log_odds r (B,) in nats, label_is_a (B,) bool -> (B,) in [0,1]."""


def margin(confidences, right):
    """S(c+) - S(c-) of one question, in [0,1]."""


def select_by_margin(margins, threshold=None, retention=None):
    """Ids in falling order of margin: those with margin >= threshold, or the top share `retention` of them."""


def select_random(ids, n, seed):
    """n of the ids, each equally likely: the control of the same size."""


# ---- Pools, margins of pairs, the rules (90) -----------------------------------------------------
def cut_pools(pairs, size, iterations):
    """Disjoint pools of about `size` pairs, all pairs of an image in one of them."""


def margins_of_pairs(samples):
    """({pair id: mean margin of its two orders}, {(pair id, order): passing critiques})."""


RULES = {}  # --select: (which pairs, which critique of a question); a study adds its own


def keep(margins, passing, select, threshold, retention, seed, iteration):
    """The kept questions, two per pair, each with the one critique to train on."""


def mix_in(kept, replayed, replay, seed):
    """Critique rows to train on: the kept ones and, as a share `replay` of an epoch, stage 03's."""


def draw_margins(margins, kept, path, title):
    """Histogram of the pool's margins, the kept ones in front."""


# ---- Iterations, arguments and main (150) --------------------------------------------------------
def run_iteration(t, pool, model, processor, folder, args):
    """Sample, select, train, save iteration t in folder -> counts."""


def parse_args(argv=None): ...


def main(args): ...
