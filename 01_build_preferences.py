"""01  Preference pairs from a vision expert: the better response names nothing that the detector says is absent."""

# Outline with a budget of 840 lines; the next issue adds its checks (at most 900).
# Header, imports, prompts (65): what, the rule, numbered departures, reads / writes with one real row, two commands.


# ---- The method: verification and pairing (125) --------------------------------------------------
def verify(mentions, detections, present, absent, known):
    """{object: "present" | "absent" | "unsure"} for each mentioned object, from its class's best detection."""


def pair_candidates(candidates, status, swaps, vocabulary, rng):
    """(chosen, rejected, source), or (None, None, reason) where no pair can be made."""


def check_given_pair(chosen, rejected, status):
    """None where the expert agrees with a given pair, else the reason to drop it."""


def propose_swaps(mentions, co_occurrence, classes, rng, n=8):
    """n unmentioned classes to ask the expert about, the plausible ones more often."""


def build_pair(item, texts, mentions, swaps, detections, status, vocabulary, seed):
    """(preference row, None) or (None, reason for the drop)."""


def assign_splits(rows, n_validation, n_train, seed):
    """Rows with "split": validation, train, pool; all pairs of an image in one of them."""


# ---- Mentions: which of the vocabulary's objects a text says are there (160) ---------------------
# one-page: vocabulary, plurals, what is negated, find_mentions, mention_spans, swap_object


# ---- Readers: preference pairs as others publish them (160) --------------------------------------
# The seam for another data set: read_pairs' docstring states the contract in five lines.
# read_rows through `datasets`; POVID, RLAIF-V, VL-RewardBench, TRL preferences, our own; place_image;
# --exclude


# ---- Experts: find(image paths, questions) -> detections per image (140) -------------------------
# The seam for another detector: the class Detector's docstring states the contract in five lines.


# ---- Candidates and findings (60), contact sheet (40) --------------------------------------------


# ---- Arguments and main (130) --------------------------------------------------------------------
def parse_args(argv=None): ...


def main(args): ...
