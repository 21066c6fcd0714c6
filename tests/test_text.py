"""The judge's prompt, its verdict and its checks; the examples in all docstrings."""

import doctest
import time

import pytest
from conftest import STAGES, stage

from common import (
    INSTRUCTIONS,
    both_orders,
    build_judge_prompt,
    find_verdict,
    parse_checks,
    parse_verdict,
)


@pytest.mark.parametrize(
    "text",
    [
        "Verdict: {}",
        "verdict: {}",
        "VERDICT: {}",
        "Verdict:{}",
        "  Verdict :  {}  ",
        "Verdict: {}\n",
        "Verdict: {}\r\n",
        "**Verdict: {}**",
        "**Verdict:** {}",
        "*Verdict*: {}",
        "Verdict: **{}**.",
        "`Verdict: {}`",
        "### Verdict: {} ###",
        "- Verdict: {}",
        "> Verdict: {}",
        "_Verdict: {}_",
        'Verdict: "{}"',
        "Verdict: '{}'",
        "“Verdict: {}”",
        "Verdict: ({})",
        "Verdict: [{}]",
        "Verdict: {}!",
        "Final verdict: {}",
        "Verdict: Response {}.",
        "A: dog: yes\nB: cat: no\nVerdict: {}",
        "Verdict: A\nOn second thought.\nVerdict: {}",
        "Verdict: B\nVerdict: {}",
        "Verdict: {}\nThe other one names a dog.",
        'You ask for "Verdict: A" or "Verdict: B".\nVerdict: {}',
    ],
)
@pytest.mark.parametrize("letter", "ABab")
def test_verdict_is_read(text, letter):
    verdict, index = find_verdict(text.format(letter))
    assert verdict == parse_verdict(text.format(letter)) == letter.upper()
    assert text.format(letter)[index] == letter and index == text.rindex("{}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Verdict",
        "Verdict:",
        "A",
        "Verdict A",
        "Verdict:\nA",
        "The verdict is A",
        "I say Verdict: A",
        "Verdict: C",
        "Verdict: both",
        "Verdict: AB",
        "Verdict: Apple",
        "Verdict: A or B",
        "Verdict: A and B",
        "Verdict: A/B",
        "Verdict: A, B",
        "Verdict: not A",
        "Verdict: B because A lies",
        "Verdict: A better",
        "Verdict: A Verdict: B",
        "A: dog: yes\nB: cat: no",
        "Verdict: A\nVerdict: unclear",
        "Verdict: А (Cyrillic)",
        '"Verdict: A" or "Verdict: B"',
        *(f"{instruction}" for instruction in INSTRUCTIONS.values()),
        build_judge_prompt("x", "y", "z"),
    ],
)
def test_no_verdict(text):
    assert find_verdict(text) == (None, -1) and parse_verdict(text) is None


@pytest.mark.parametrize(
    "text, checks",
    [
        ("A: red circle: yes", [("A", "red circle", True)]),
        ("- A: red circle: no", [("A", "red circle", False)]),
        ("* B: red circle: No.", [("B", "red circle", False)]),
        ("1. A: dog: yes\n2) B: cat: no", [("A", "dog", True), ("B", "cat", False)]),
        ("**A**: dog: **yes**", [("A", "dog", True)]),
        ("**A: dog: yes**", [("A", "dog", True)]),
        ("[A]: dog: yes", [("A", "dog", True)]),
        ('A: "a dog": yes\nB: `cat`: NO', [("A", "a dog", True), ("B", "cat", False)]),
        ("Response A: dog: yes", [("A", "dog", True)]),
        ("a: dog: yes", [("A", "dog", True)]),
        ("A:dog:yes", [("A", "dog", True)]),
        ("A: dog: yes; B: cat: no", [("A", "dog", True), ("B", "cat", False)]),
        ("A: dog: yes, cat: no", [("A", "dog", True), ("A", "cat", False)]),
        (
            "B: dog: yes. cat: no. A: bus: yes",
            [("B", "dog", True), ("B", "cat", False), ("A", "bus", True)],
        ),
        ("A: dog: yes - it sits; a cat: no", [("A", "dog", True), ("A", "a cat", False)]),
        ("A: dog: yes\ncat: no", [("A", "dog", True)]),  # the letter is not inherited across lines
        ("A: the clock shows 12:30: yes", [("A", "the clock shows 12:30", True)]),
        ("B: the sign says: stop: no", [("B", "the sign says: stop", False)]),
        ("A: a dog, a cat: yes", [("A", "a dog, a cat", True)]),
        ("A: dog: yesterday", []),
        ("A: dog: unsure", []),
        ("A: yes", []),
        ("dog: yes", []),
        ("a dog: yes", []),
        ("A is better than B", []),
        ("Verdict: A", []),
        ("**Verdict: B**", []),
        ("Verdict: yes", []),
        ("Verdict: no: yes", []),
        ("", []),
        (
            "A: dog: yes\nB: cat: no\nB names a cat.\nVerdict: A",
            [("A", "dog", True), ("B", "cat", False)],
        ),
    ],
)
def test_checks(text, checks):
    assert parse_checks(text) == checks


def test_checks_of_a_degenerate_sample_are_fast():
    start = time.process_time()
    assert parse_checks("-" * 500) == []
    assert time.process_time() - start < 1  # backtracking takes minutes


@pytest.mark.parametrize("style", INSTRUCTIONS)
def test_prompt(style):
    plain = build_judge_prompt("What is it?", "first text", "second text", style)
    question = "Question: What is it?\nResponse A: first text\nResponse B: second text\n"
    assert plain == question + INSTRUCTIONS[style]
    guided = build_judge_prompt(
        "What is it?", "first text", "second text", style, "A: dog: yes\nVerdict: A"
    )
    assert guided.endswith(INSTRUCTIONS[style]) and "A: dog: yes\nVerdict: A\n" in guided
    assert guided.startswith(plain.removesuffix(INSTRUCTIONS[style]))
    assert build_judge_prompt("q", "a", "b") == build_judge_prompt("q", "a", "b", "critique", None)


def test_both_orders():
    ab, ba = both_orders(
        {"id": "7", "image": "x.png", "prompt": "q", "chosen": "good", "rejected": "bad"}
    )
    both = {"pair_id": "7", "image": "x.png", "prompt": "q"}
    assert ab == {
        **both,
        "id": "7-ab",
        "order": "ab",
        "label": "A",
        "response_a": "good",
        "response_b": "bad",
    }
    assert ba == {
        **both,
        "id": "7-ba",
        "order": "ba",
        "label": "B",
        "response_a": "bad",
        "response_b": "good",
    }


@pytest.mark.parametrize("name", ("common", *STAGES))
def test_docstring_examples(name):
    result = doctest.testmod(stage(name))
    assert result.failed == 0


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    assert (
        sum(
            len(test.examples) > 0
            for name in ("common", *STAGES)
            for test in finder.find(stage(name))
        )
        >= 4
    )
