"""What the five stages must agree on byte for byte, and plumbing: the judge's prompt and verdict, model loading,
encoding and label masks, batched sampling with the verdict's log-odds, and resumable run directories.

None of the method's ideas live here; they stand in the stage that introduces them. Letters used in all files:
B sequences, T tokens, V vocabulary entries, P prompt tokens (image included), R response tokens.
"""
import re

# ---------------------------------------------------------------------------------------------------------------------
# The judge's prompt, verdict and checks
# ---------------------------------------------------------------------------------------------------------------------
INSTRUCTIONS = {
    "critique": 'Check each claim of A and B against the image, one per line: "A: claim: yes" or "A: claim: no". '
                'End with "Verdict: A" or "Verdict: B", the better response.',
    "descriptive": 'Describe the image. End with "Verdict: A" or "Verdict: B", the better response.',
    "none": 'Answer "Verdict: A" or "Verdict: B", the better response.',
}


def build_judge_prompt(prompt, response_a, response_b, style="critique", reference=None):
    """The one text that asks for a judgement; it follows the image. reference: findings and label as the lines that a
    critique would hold (stage 02 only; the prompt that is trained on and evaluated has none)."""
    guide = "" if reference is None else f"Known to be true, never to be mentioned:\n{reference}\n"
    return f"Question: {prompt}\nResponse A: {response_a}\nResponse B: {response_b}\n{guide}{INSTRUCTIONS[style]}"


_MARK = r"(?:[^\w\n]|_)*"  # markdown, quotes, brackets, punctuation: anything on this line that is no word
_VERDICT_LINE = re.compile(rf"^{_MARK}(?:final +)?verdict{_MARK}:(.*)$", re.IGNORECASE | re.MULTILINE)
_VERDICT = re.compile(rf"^{_MARK}(?:response +)?([ab]){_MARK}$", re.IGNORECASE)
_CHECK = re.compile(rf"^{_MARK}(?:\d+{_MARK})?(?:(?:response +)?([AB]){_MARK}: *)?(.+?){_MARK}:{_MARK}(yes|no)\b", re.IGNORECASE)


def find_verdict(text):
    """(verdict, index of its letter in text), or (None, -1). The last line that starts with "Verdict:" decides."""
    lines = list(_VERDICT_LINE.finditer(text))
    match = _VERDICT.match(lines[-1].group(1)) if lines else None
    return (match.group(1).upper(), lines[-1].start(1) + match.start(1)) if match else (None, -1)


def parse_verdict(text):
    """ "A", "B", or None where the last verdict line names neither or both. Case, markdown, punctuation are tolerated.

    >>> parse_verdict("A: red circle: yes\\n**Verdict: B.**"), parse_verdict("Verdict: A or B")
    ('B', None)
    """
    return find_verdict(text)[0]


def parse_checks(text):
    """The critique's checks in order, one per line or clause: list of ("A" | "B", claim, supported).

    >>> parse_checks("A: red circle: yes; A: blue star: no\\nB: a dog: yes, on the left\\nVerdict: B")
    [('A', 'red circle', True), ('A', 'blue star', False), ('B', 'a dog', True)]
    """
    checks = []
    for line in text.splitlines():
        side = None  # a clause without a letter speaks of the response that its line named last
        for clause in re.split(r";|(?:(?<=: yes)|(?<=: no))[.,]? +", line):
            match = _CHECK.match(clause)
            if match and (side := (match.group(1) or side or "").upper()):
                checks.append((side, match.group(2).strip(" *_\"'`"), match.group(3).lower() == "yes"))
    return checks
