"""Stage 02: the reference, and one case for each reason to drop a critique."""
import pytest
from common import parse_checks, parse_verdict
from conftest import stage

one, two = stage("01_build_preferences"), stage("02_generate_critiques")
VOCABULARY = one.build_vocabulary(["dog", "cat", "bus", "hat"], {"dog": ["puppy"]})
QUESTION = {"response_a": "A puppy and a cat.", "response_b": "A dog, a bus and a hat.", "label": "A"}
STATUS = {"dog": "present", "cat": "present", "bus": "absent", "hat": "unsure"}
EVIDENCE = [{"object": name, "status": status} for name, status in STATUS.items()]


def test_reference():
    reference = two.render_reference(QUESTION, STATUS, VOCABULARY)
    assert reference == "A: dog: yes\nA: cat: yes\nB: dog: yes\nB: bus: no\nB: hat: unsure\nVerdict: A"
    assert parse_verdict(reference) == "A" and ("B", "bus", False) in parse_checks(reference)
    flipped = {"response_a": QUESTION["response_b"], "response_b": QUESTION["response_a"], "label": "B"}
    assert two.render_reference(flipped, STATUS, VOCABULARY) == (
        "A: dog: yes\nA: bus: no\nA: hat: unsure\nB: dog: yes\nB: cat: yes\nVerdict: B")
    assert two.render_reference(QUESTION, {}, VOCABULARY) == "Verdict: A"  # a pair without findings


@pytest.mark.parametrize("text, verdict", [
    ("B: bus: no", "A"), ("A: bus: no", "B"), ("A: bus: no\nB: bus: no\nB: hat: no", "A"),
    ("A: bus: no\nB: bus: no", None),
    ("A: dog: yes\nB: dog: yes", None), ("A: dog: yes\nA: cat: yes\nB: dog: yes", None), ("", None)])
def test_verdict_of_checks(text, verdict):
    assert two.verdict_of_checks(parse_checks(text)) == verdict


WHOLE = "A: dog: yes\nA: cat: yes\nB: dog: yes\nB: bus: no"  # what is unsure may go unchecked


@pytest.mark.parametrize("text, reason", [
    (WHOLE, None), (WHOLE + "\nB: hat: no", None), (WHOLE + "\nB: hat: yes", None),
    (WHOLE.replace("A: dog", "A: a puppy"), None),                     # another word for the same
    ("A: a dog with a cat: no\nB: dog: yes\nB: bus: no", None),        # more than the bare object: may be right
    (WHOLE.replace("A: dog: yes", "A: an old dog: no"), None),
    (WHOLE.replace("A: dog: yes", "A: dog: no"), "contradicts the expert"),
    (WHOLE.replace("A: dog: yes", "A: There is a dog: no"), "contradicts the expert"),
    (WHOLE.replace("A: dog: yes", "A: the puppy: no"), "contradicts the expert"),
    ("B: bus: yes", "contradicts the expert"),
    ("B: a dog in a bus: yes", "contradicts the expert"),
    *((WHOLE.replace(line, ""), "leaves out a verified object") for line in WHOLE.splitlines()),
    ("B: hat: no", "leaves out a verified object"), ("", "leaves out a verified object"),
    ("A: bus: no\nB: bus: no", "checks what the response does not say"),
    ("B: cat: yes\nB: bus: no", "checks what the response does not say")])
def test_contradicts_expert(text, reason):
    said = {"A": ["dog", "cat"], "B": ["dog", "bus", "hat"]}
    assert two.contradicts_expert(parse_checks(text), said, STATUS, VOCABULARY) == reason


GOOD = "A: dog: yes\nA: cat: yes\nB: dog: yes\nB: bus: no\nB: hat: yes\nB names a bus.\nVerdict: A"


@pytest.mark.parametrize("critique, reason", [
    (GOOD, None),
    (GOOD.replace("Verdict: A", "**Verdict: A**"), None),
    (GOOD.replace("Verdict: A", "A it is."), "malformed: no verdict line"),
    (GOOD.replace("Verdict: A", "Verdict: A or B"), "malformed: no verdict line"),
    ("", "malformed: no verdict line"),
    ("B names a bus that is not there.\nVerdict: A", "malformed: no checks"),
    (GOOD.replace("Verdict: A", "Verdict: B"), "wrong verdict"),
    ("B: bus: no\nVerdict: A\nVerdict: B", "wrong verdict"),
    ("A: dog: yes\nB: bus: yes\nVerdict: A", "verdict does not follow from its checks"),
    ("A: cat: no\nB: bus: no\nVerdict: A", "verdict does not follow from its checks"),
    ("A: cat: no\nB: dog: yes\nVerdict: A", "verdict does not follow from its checks"),
    (GOOD.replace("B names", "The detector says that B names"), "cites the reference"),
    (GOOD.replace("B names", "By the REFERENCE, B names"), "cites the reference"),
    (GOOD.replace("B names", "The label says that B names"), "cites the reference"),
    (GOOD.replace("B: dog: yes", "B: dog: no"), "contradicts the expert"),
    ("B: hat: no\nVerdict: A", "leaves out a verified object"), ("B: bus: no\nVerdict: A", "leaves out a verified object"),
    (GOOD.replace("A: cat", "A: hat"), "checks what the response does not say")])
def test_reason_to_drop(critique, reason):
    assert two.reason_to_drop(critique, True, QUESTION, EVIDENCE, VOCABULARY, "critique") == reason
    unfinished = two.reason_to_drop(critique, False, QUESTION, EVIDENCE, VOCABULARY, "critique")
    assert unfinished == "malformed: no verdict line"


@pytest.mark.parametrize("style", ["descriptive", "none"])
@pytest.mark.parametrize("critique, reason", [
    ("A dog beside a cat.\nVerdict: A", None), ("Verdict: A", None), ("Verdict: B", "wrong verdict"),
    ("A dog.", "malformed: no verdict line"), ("As the expert found, no bus.\nVerdict: A", "cites the reference")])
def test_styles_without_checks(style, critique, reason):
    assert two.reason_to_drop(critique, True, QUESTION, EVIDENCE, VOCABULARY, style) == reason


@pytest.mark.parametrize("critique, reason", [
    ("B miscounts the windows.\nVerdict: A", None),                    # free text: verdict and leak alone
    ("A: four windows: yes\nB: five windows: yes\nVerdict: A", None),  # even checks leave the verdict open
    ("B: five windows: no\nVerdict: A", None),
    ("A: four windows: no\nVerdict: A", "verdict does not follow from its checks"),
    ("B is worse, as the reference shows.\nVerdict: A", "cites the reference"), ("Verdict: B", "wrong verdict")])
def test_pairs_without_evidence(critique, reason):
    question = {"response_a": "Four windows.", "response_b": "Five windows.", "label": "A"}
    assert two.reason_to_drop(critique, True, question, [], VOCABULARY, "critique") == reason


def test_leak_phrase_of_a_response_may_be_quoted():
    question = {**QUESTION, "response_b": "A bus and a smoke detector."}
    critique = "A: a puppy: yes\nA: cat: yes\nB: bus: no\nB: a smoke detector: no\nVerdict: A"
    assert two.reason_to_drop(critique, True, question, EVIDENCE, VOCABULARY, "critique") is None
    assert two.reason_to_drop(critique, True, QUESTION, EVIDENCE, VOCABULARY, "critique") == "cites the reference"


def test_keep_distinct():
    row = {"pair_id": "1", "order": "ab", "critique": "x", "dropped": None}
    samples = [{**row, "id": 0}, {**row, "id": 1}, {**row, "id": 2, "order": "ba"}, {**row, "id": 3, "critique": "y"},
               {**row, "id": 4, "critique": "z", "dropped": "wrong verdict"}]
    kept = two.keep_distinct(samples)
    assert [r["id"] for r in kept] == [0, 2, 3] and "dropped" not in kept[0] and "dropped" in samples[0]
