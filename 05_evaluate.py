"""05  How well does it judge? Every pair in both orders, all checkpoints side by side, with intervals and controls."""

# Outline with a budget of 590 lines (at most 650 with the next issue's additions).


# ---- The measures (190) --------------------------------------------------------------------------
def cluster_bootstrap(values, clusters, n=10000, seed=0, groups=None):
    """95 % percentile interval (low, high) of the mean of values, resampling whole clusters (images)."""


def expected_calibration_error(probability, correct, bins=10):
    """sum over bins of (share of rows in it) * |mean probability - share correct|."""


def right_per_pair(rows):
    """{pair id: share of its orders judged right, in {0, .5, 1}}."""


def check_rates(rows, pairs, vocabulary):
    """How the judge's checks stand to the truth in the pairs' evidence."""


def by_category(right, pairs):
    """{"accuracy", "by_category", "macro"} and the intervals of both means."""


def measure(rows, pairs, vocabulary):
    """All measures of one condition; the only place where accuracy and calibration are reported from."""


def official_scores(rows, pairs):
    """VL-RewardBench's own scoring: majority of K calls per pair, undecided pairs leave the accuracy."""


def heuristic_rows(pairs):
    """The judge that prefers the shorter response."""


def expert_against_truth(rows, truth):
    """Share of stage 01's findings and of its pairs that the truth contradicts."""


# ---- Conditions: checkpoints, pictures withheld (90) ---------------------------------------------
def withheld(questions, how, image_root, seed):
    """The same questions with a blank picture, or with the picture of another row."""


def find_conditions(run):
    """{name: checkpoint folder or None for the base model}: all that 03 and 04 have trained, in order."""


# ---- Best-of-N and LLaVA-Bench (120) -------------------------------------------------------------
def knockout(candidates, prefer):
    """Winners among the first 1, 2, 4, ... candidates of each row, in one knockout."""


# ---- Report (110) --------------------------------------------------------------------------------
# ---- Arguments and main (140) --------------------------------------------------------------------
def parse_args(argv=None): ...


def main(args): ...
