"""02  The model writes critiques of each pair, guided by the findings; the sound ones are kept.

    written with:  image, question, A, B, findings + label    (both orders, M samples at T = 1)
    trained on as: image, question, A, B  ->  critique + verdict  (03: no reference in the prompt)
    kept if:       the verdict is the label and follows from the critique's own checks, every object
                   of the responses that the expert is sure of is checked, none against its finding,
                   no check names what its response does not, and the reference is not cited

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) findings are laid out as the very lines that the critique will hold: a separate list is copied
     wrongly;
  2) "verdict = label" alone lets lucky verdicts with false facts pass, which make the judge worse:
     checks are held against each other and the expert, and must be complete, or 04 would prefer
     critiques that skip what is hard to see;
  3) pairs without findings (01 makes none, but a file from elsewhere may hold such) are kept on
     verdict, leak and their own checks.

Reads  01_preferences/preferences.jsonl (split "train"), vocabulary.json.
Writes 02_critiques/: answers.jsonl, samples.jsonl (all, with the reason to drop), critiques.jsonl:
    {"id": "00453-0-ab-0", "pair_id": "00453-0", "order": "ab", "image": "images/00453.png",
     "prompt": "List the objects in the image.", "response_a": "purple ring, purple cross.",
     "response_b": "yellow ring, purple ring.", "label": "A", "critique": "A: purple ring: yes\\nA:
     purple cross: yes\\nB: yellow ring: no\\nB: purple ring: yes\\nVerdict: A",
     "style": "critique", "verdict": "A"}

    python 02_generate_critiques.py --run runs/demo --critiques 2 --max-new-tokens 96
    python 02_generate_critiques.py                # one GPU: 5,000 pairs x 2 orders x 4 critiques
"""

import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import common
from common import both_orders, find_verdict, parse_checks, real, stop, verdict_of_checks, whole

one = import_module("01_build_preferences")
claimed_objects = one.claimed_objects
find_mentions = one.find_mentions

LEAK = re.compile(  # a critique that cites what only its writer was told
    r"""\b(?:reference | ground[- ]truth | detector | known\ to\ be\ true | the\ findings?
        | the\ expert | (?:the|given|correct)\ label\ (?:says|is|states|shows|gives))\b""",
    re.IGNORECASE | re.VERBOSE,
)


# ---- The method: the reference, and what makes a critique worth training on ----------------------
def render_reference(question, status, vocabulary):
    """The expert's findings and the label as the lines that a critique would hold.

    question: {"response_a", "response_b", "label"}; status: {object: "present" | "absent" |
    "unsure"}. The word "unsure" stands where the model must look for itself."""
    word = {"present": "yes", "absent": "no", "unsure": "unsure"}
    lines = []
    for side, response in (("A", question["response_a"]), ("B", question["response_b"])):
        for name in find_mentions(response, vocabulary):
            if name in status:
                lines.append(f"{side}: {name}: {word[status[name]]}")
    return "\n".join([*lines, f"Verdict: {question['label']}"])


def contradicts_expert(checks, mentions, status, vocabulary):
    """None, or the first fault of the checks, in the words of the report.

    mentions: {"A": objects that response A mentions, "B": ...}; status: {object: "present" | ...}.
    """
    checked = {"A": set(), "B": set()}
    for side, claim, supported in checks:
        mentioned = find_mentions(claim, vocabulary)
        if not set(mentioned) <= set(mentions[side]):
            return "checks what the response does not say"
        false = "absent" if supported else "present"
        for name in claimed_objects(claim, supported, vocabulary):
            if status.get(name) == false:
                return "contradicts the expert"
        checked[side].update(mentioned)
    for side in "AB":
        for name in mentions[side]:
            if status.get(name) in ("present", "absent") and name not in checked[side]:
                return "leaves out a verified object"
    return None


def reason_to_drop(critique, complete, question, status, vocabulary, style):
    """None for a critique worth training on, else the first reason against it (02 and 04).

    complete: it wrote its stop token; question: {"prompt", "response_a", "response_b", "label"};
    status: {object: "present" | "absent" | "unsure"}, empty for pairs without findings; vocabulary:
    {phrase: class}. Needs: find_verdict, parse_checks, verdict_of_checks, LEAK, find_mentions,
    contradicts_expert"""
    verdict, _ = find_verdict(critique)
    if not complete or verdict is None:
        return "malformed: unfinished, or no verdict line"
    checks = parse_checks(critique) if style == "critique" else []
    if style == "critique" and status and not checks:
        return "malformed: no checks"
    if verdict != question["label"]:
        return "wrong verdict"
    better = verdict_of_checks(checks)
    # Even checks (None) decide nothing: fine without findings; with them one side must lose.
    is_undecided = better is None and checks and status
    if is_undecided or better not in (None, verdict):
        return "verdict does not follow from its checks"
    responses = {"A": question["response_a"], "B": question["response_b"]}
    given = "\n".join([question["prompt"], *responses.values()])
    if LEAK.search(critique) and not LEAK.search(given):
        return "cites the reference"
    if checks and status:
        mentions = {side: find_mentions(text, vocabulary) for side, text in responses.items()}
        return contradicts_expert(checks, mentions, status, vocabulary)
    return None


# ---- Writing and keeping -------------------------------------------------------------------------
def status_of(pair):
    """{object: "present" | "absent" | "unsure"} of a pair's evidence."""
    return {found["object"]: found["status"] for found in pair["evidence"]}


def write_critiques(path, judge, pairs, vocabulary, *, style, is_guided, **asking):
    """n critiques per pair and order, with the reference in the prompt (guided) or without (04).

    path: where the answers are kept; asking: image_root, batch_size, n, temperature, max_new_tokens
    and seed of common.ask. -> rows: the question's fields, its id with -k, and {critique, style,
    verdict, log_odds: r in nats or None, dropped: the reason against it or None}."""
    questions, statuses, requests = [], [], []
    for pair in pairs:
        for question in both_orders(pair):
            questions.append(question)
            statuses.append(status_of(pair))
    for question, status in zip(questions, statuses):
        a, b = question["response_a"], question["response_b"]
        reference = render_reference(question, status, vocabulary) if is_guided else None
        text = common.build_judge_prompt(question["prompt"], a, b, style, reference)
        requests.append({"id": question["id"], "image": question["image"], "text": text})
    samples = []
    answers = common.ask(path, judge, requests, "critiques", **asking)
    for question, status, of_question in zip(questions, statuses, answers):
        for k, answer in enumerate(of_question):
            text, complete = answer["text"], answer["complete"]
            row = {**question, "id": f"{question['id']}-{k}", "critique": text, "style": style}
            row |= {"verdict": answer["verdict"], "log_odds": answer["log_odds"]}
            row["dropped"] = reason_to_drop(text, complete, question, status, vocabulary, style)
            samples.append(row)
    return samples


def distinct_critiques(samples):
    """Those that are not dropped, each text once per question."""
    critiques = {}
    for row in samples:
        key = (row["pair_id"], row["order"], row["critique"])
        if row["dropped"] is None and key not in critiques:
            critiques[key] = {k: v for k, v in row.items() if k not in ("dropped", "log_odds")}
    return list(critiques.values())


def count(samples, critiques):
    """What was written, dropped and kept: {line of the report: number}."""
    reasons = Counter(row["dropped"] for row in samples)
    n_passing = reasons.pop(None)
    counts = {"critiques written": len(samples)}
    for reason, number in reasons.most_common():
        counts[f"dropped: {reason}"] = number
    counts["repeated"] = n_passing - len(critiques)
    counts["kept"] = len(critiques)
    counts["  kept without checks"] = sum(not parse_checks(row["critique"]) for row in critiques)
    questions = {(row["pair_id"], row["order"]) for row in critiques}
    counts["  questions with a kept critique"] = len(questions)
    return counts


def warn_of_descriptions(samples):
    """A critique with a verdict and no check has described, or asserted."""
    decided = [row for row in samples if row["verdict"]]
    n = sum(not parse_checks(row["critique"]) for row in decided)
    if n > 0.2 * len(decided):
        print(f"warning: {n} of {len(decided)} critiques with a verdict check no claim")


# ---- Arguments and main --------------------------------------------------------------------------
def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument_group("critiques").add_argument
    add("--limit", type=whole(1), help="use only the first so many training pairs")
    add("--critiques", type=whole(1), default=4, help="M, per pair and order (%(default)s)")
    add(
        "--style",
        choices=tuple(common.INSTRUCTIONS),
        default="critique",
        help="checks of the claims, a description first, or the verdict alone (%(default)s)",
    )
    add("--temperature", type=real(0, 100), default=1.0, help="of sampling (%(default)s)")
    longest = "tokens of a critique; longer ones are dropped (%(default)s)"
    add("--max-new-tokens", type=whole(1), default=512, help=longest)
    return parser.parse_args(argv)


def main(args):
    first = common.stage_args(args.run, "01_preferences")
    folder = common.start_stage(args, "02_critiques")

    # 1. load --------------------------------------------------------------------------------------
    vocabulary = common.read_json(Path(args.run) / "01_preferences" / "vocabulary.json")
    pairs = common.read_preferences(args.run, "train")[: args.limit]
    if not pairs:
        stop(f"{args.run}/01_preferences has no pair in split 'train': see --train of stage 01")
    print(f"{len(pairs)} pairs x 2 orders x {args.critiques} critiques, style {args.style}")
    bound = first["max_image_tokens"]
    judge = common.Judge(first["model"], device=args.device, max_image_tokens=bound)

    # 2. write, filter -----------------------------------------------------------------------------
    samples = write_critiques(
        folder / "answers.jsonl",
        judge,
        pairs,
        vocabulary,
        style=args.style,
        is_guided=True,
        image_root=first["image_root"],
        n=args.critiques,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    (folder / "meta.json").unlink(missing_ok=True)
    common.write_jsonl(folder / "samples.jsonl", samples)
    critiques = distinct_critiques(samples)
    if args.style == "critique":
        warn_of_descriptions(samples)
    if not critiques:
        reasons = dict(Counter(row["dropped"] for row in samples))
        stop(f"no critique was kept: {reasons}; read {folder}/samples.jsonl")

    # 3. save and report ---------------------------------------------------------------------------
    common.write_jsonl(folder / "critiques.jsonl", critiques)
    print(f"\nthe first kept critique, {critiques[0]['id']}:\n{critiques[0]['critique']}\n")
    common.finish_stage(folder, args, count(samples, critiques), "python 03_train_ift.py")


if __name__ == "__main__":
    common.run(main, parse_args())
