"""Stage 02: the reference, and one case for each reason to drop a critique."""

from importlib import import_module

import pytest

from common import parse_checks

two = import_module("02_generate_critiques")

VOCABULARY = {"dog": "dog", "dogs": "dog", "puppy": "dog", "cat": "cat", "bus": "bus", "hat": "hat"}
QUESTION = {"prompt": "What is there?", "label": "A"}
QUESTION |= {"response_a": "A puppy and a cat.", "response_b": "A dog, a bus and a hat."}
STATUS = {"dog": "present", "cat": "present", "bus": "absent", "hat": "unsure"}


# ---- The reference -------------------------------------------------------------------------------
def test_reference():
    """The findings on each response, in the order of its mentions; then the label."""
    of_a, of_b = "{0}: dog: yes\n{0}: cat: yes\n", "{0}: dog: yes\n{0}: bus: no\n{0}: hat: unsure\n"
    expected = of_a.format("A") + of_b.format("B") + "Verdict: A"
    assert two.render_reference(QUESTION, STATUS, VOCABULARY) == expected
    a, b = QUESTION["response_a"], QUESTION["response_b"]
    flipped = {"response_a": b, "response_b": a, "label": "B"}
    expected = of_b.format("A") + of_a.format("B") + "Verdict: B"
    assert two.render_reference(flipped, STATUS, VOCABULARY) == expected
    assert two.render_reference(QUESTION, {}, VOCABULARY) == "Verdict: A"  # without findings
    evidence = [{"object": name, "status": status} for name, status in STATUS.items()]
    assert two.status_of({"evidence": evidence}) == STATUS


# ---- What the checks say -------------------------------------------------------------------------
WHOLE = "A: dog: yes\nA: cat: yes\nB: dog: yes\nB: bus: no"  # what is unsure may go unchecked
CONTRADICTS = "contradicts the expert"
LEAVES_OUT = "leaves out a verified object"
NOT_SAID = "checks what the response does not say"


@pytest.mark.parametrize(
    "text, reason",
    [
        (WHOLE, None),
        (WHOLE + "\nB: hat: no", None),
        (WHOLE + "\nB: hat: yes", None),
        (WHOLE.replace("A: dog", "A: a puppy"), None),  # another word for the same
        # more than the bare object is denied: that may be right
        ("A: a dog with a cat: no\nB: dog: yes\nB: bus: no", None),
        (WHOLE.replace("A: dog: yes", "A: an old dog: no"), None),
        (WHOLE.replace("A: dog: yes", "A: dog: no"), CONTRADICTS),
        (WHOLE.replace("A: dog: yes", "A: There is a dog: no"), CONTRADICTS),
        (WHOLE.replace("A: dog: yes", "A: the puppy: no"), CONTRADICTS),
        ("B: bus: yes", CONTRADICTS),
        ("B: a dog in a bus: yes", CONTRADICTS),
        (WHOLE.replace("A: dog: yes", ""), LEAVES_OUT),
        (WHOLE.replace("A: cat: yes", ""), LEAVES_OUT),
        (WHOLE.replace("B: dog: yes", ""), LEAVES_OUT),  # checked for A is not checked for B
        (WHOLE.replace("B: bus: no", ""), LEAVES_OUT),
        ("B: hat: no", LEAVES_OUT),
        ("", LEAVES_OUT),
        ("A: bus: no\nB: bus: no", NOT_SAID),
        ("B: cat: yes\nB: bus: no", NOT_SAID),
    ],
)
def test_contradicts_expert(text, reason):
    mentions = {"A": ["dog", "cat"], "B": ["dog", "bus", "hat"]}
    assert two.contradicts_expert(parse_checks(text), mentions, STATUS, VOCABULARY) == reason


# ---- The whole filter ----------------------------------------------------------------------------
GOOD = "A: dog: yes\nA: cat: yes\nB: dog: yes\nB: bus: no\nB: hat: yes\nB names a bus.\nVerdict: A"
NO_VERDICT = "malformed: unfinished, or no verdict line"
INCONSISTENT = "verdict does not follow from its checks"
LEAK = "cites the reference"


@pytest.mark.parametrize(
    "critique, reason",
    [
        (GOOD, None),
        (GOOD.replace("Verdict: A", "**Verdict: A**"), None),
        (GOOD.replace("Verdict: A", "Verdict: A, the better response."), None),
        (GOOD.replace("Verdict: A", "A it is."), NO_VERDICT),
        (GOOD.replace("Verdict: A", "Verdict: A or B"), NO_VERDICT),
        ("", NO_VERDICT),
        ("B names a bus that is not there.\nVerdict: A", "malformed: no checks"),
        (GOOD.replace("Verdict: A", "Verdict: B"), "wrong verdict"),
        ("B: bus: no\nVerdict: A\nVerdict: B", "wrong verdict"),
        ("A: dog: yes\nB: bus: yes\nVerdict: A", INCONSISTENT),
        ("A: cat: no\nB: bus: no\nVerdict: A", INCONSISTENT),
        ("A: cat: no\nB: dog: yes\nVerdict: A", INCONSISTENT),
        (GOOD.replace("B names", "The detector says that B names"), LEAK),
        (GOOD.replace("B names", "By the REFERENCE, B names"), LEAK),
        (GOOD.replace("B names", "The label says that B names"), LEAK),
        (GOOD.replace("B names", "As the findings show, B names"), LEAK),
        (GOOD.replace("B names", "The labels of B's bottles name"), None),
        (GOOD.replace("B: dog: yes", "B: dog: no"), CONTRADICTS),
        ("B: hat: no\nVerdict: A", LEAVES_OUT),
        ("B: bus: no\nVerdict: A", LEAVES_OUT),
        (GOOD.replace("A: cat", "A: hat"), NOT_SAID),
    ],
)
def test_reason_to_drop(critique, reason):
    found = two.reason_to_drop(critique, True, QUESTION, STATUS, VOCABULARY, "critique")
    assert found == reason
    cut = two.reason_to_drop(critique, False, QUESTION, STATUS, VOCABULARY, "critique")
    assert cut == NO_VERDICT  # it did not write its stop token


@pytest.mark.parametrize("style", ["descriptive", "none"])
@pytest.mark.parametrize(
    "critique, reason",
    [
        ("A dog beside a cat.\nVerdict: A", None),
        ("Verdict: A", None),
        ("A: red circle: no\nVerdict: A", None),  # read as no check
        ("Verdict: B", "wrong verdict"),
        ("A dog.", NO_VERDICT),
        ("As the expert found, no bus.\nVerdict: A", LEAK),
    ],
)
def test_styles_without_checks(style, critique, reason):
    found = two.reason_to_drop(critique, True, QUESTION, STATUS, VOCABULARY, style)
    assert found == reason


@pytest.mark.parametrize(
    "critique, reason",
    [
        ("B miscounts the windows.\nVerdict: A", None),  # free text: verdict and leak alone
        # even checks leave the verdict open
        ("A: four windows: yes\nB: five windows: yes\nVerdict: A", None),
        ("B: five windows: no\nVerdict: A", None),
        ("A: four windows: no\nVerdict: A", INCONSISTENT),
        ("B is worse, as the reference shows.\nVerdict: A", LEAK),
        ("Verdict: B", "wrong verdict"),
    ],
)
def test_pairs_without_evidence(critique, reason):
    question = {"prompt": "How many?", "response_a": "Four windows.", "label": "A"}
    question["response_b"] = "Five windows."
    found = two.reason_to_drop(critique, True, question, {}, VOCABULARY, "critique")
    assert found == reason


@pytest.mark.parametrize("field", ["prompt", "response_b"])
def test_leak_phrase_of_the_question_may_be_quoted(field):
    question = {**QUESTION, "response_b": "A bus.", field: "A bus and a smoke detector."}
    critique = "A: a puppy: yes\nA: cat: yes\nB: bus: no\nB: a smoke detector: no\nVerdict: A"
    rest = (STATUS, VOCABULARY, "critique")
    assert two.reason_to_drop(critique, True, question, *rest) is None
    assert two.reason_to_drop(critique, True, QUESTION, *rest) == LEAK


# ---- What is kept of it --------------------------------------------------------------------------
def sample(number, order="ab", critique="x", dropped=None):
    row = {"id": number, "pair_id": "1", "order": order, "critique": critique, "log_odds": 1.0}
    return row | {"dropped": dropped}


SAMPLES = [
    sample(0),
    sample(1),  # repeats 0
    sample(2, order="ba"),
    sample(3, critique="B: bus: no"),
    sample(4, critique="z", dropped="wrong verdict"),
    sample(5, critique="x", dropped="wrong verdict"),
]


def test_distinct_critiques():
    kept = two.distinct_critiques(SAMPLES)
    assert [row["id"] for row in kept] == [0, 2, 3]
    assert set(kept[0]) == {"id", "pair_id", "order", "critique"}
    assert "dropped" in SAMPLES[0]


def test_counts_add_up():
    counts = two.count(SAMPLES, two.distinct_critiques(SAMPLES))
    assert counts == {
        "critiques written": 6,
        "dropped: wrong verdict": 2,
        "repeated": 1,
        "kept": 3,
        "  kept without checks": 2,
        "  questions with a kept critique": 2,
    }
