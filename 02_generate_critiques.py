"""02  The model writes critiques of each pair, guided by the expert's findings and the label; the sound ones are kept."""

# Outline with a budget of 290 lines (at most 320 with the next issue's additions).


# ---- The method: the reference, and what makes a critique worth training on (120) ----------------
def render_reference(question, status, vocabulary):
    """The expert's findings and the label as the lines that a critique would hold."""


def verdict_of_checks(checks):
    """The response with fewer unsupported claims: "A", "B", or None where they are even."""


def contradicts_expert(checks, said, status, vocabulary):
    """None, or how the checks disagree with the findings."""


def reason_to_drop(critique, complete, question, evidence, vocabulary, style):
    """None for a critique worth training on, else the first reason against it (02 and 04 filter by this one function)."""


# ---- Writing and keeping (80) --------------------------------------------------------------------
def write_critiques(pairs, model, processor, vocabulary, path, *, n, guided, style, settings):
    """n critiques per pair and order, guided by the reference or not (04 samples by this too), kept in path."""


def keep_distinct(samples):
    """The kept critiques, each text once per question."""


# ---- Arguments and main (70) ---------------------------------------------------------------------
def parse_args(argv=None): ...


def main(args): ...
