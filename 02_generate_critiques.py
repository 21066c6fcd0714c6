"""02  The model writes critiques of each pair, guided by the findings; the sound ones are kept.

    written with:  image, question, A, B, findings + label    (both orders, M samples at T = 1)
    trained on as: image, question, A, B  ->  critique + verdict  (03: no reference in the prompt)
    kept if:       the verdict is the label and follows from the critique's own checks, every object
                   of the responses that the expert is sure of is checked, none against its finding,
                   nothing else is checked, and the reference is not cited

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) findings are laid out as the very lines that the critique will hold, since models copy a
     separate list wrongly;
  2) "verdict = label" alone lets lucky verdicts with false facts pass, which make the judge worse:
     the checks are held against each other and the expert. They must be complete, or stage 04 would
     prefer critiques that skip what is hard to see;
  3) pairs without findings (reasoning, general questions; 01 makes none, but a preferences.jsonl
     from elsewhere may) are kept on verdict, leak and their own checks.

Reads  01_preferences/preferences.jsonl (split "train"), vocabulary.json.
Writes 02_critiques/samples.jsonl (all, with the reason why one was dropped), critiques.jsonl:
    {"id": "00453-0-ab-0", "pair_id": "00453-0", "order": "ab", "image": "images/00453.png",
     "prompt": "List the objects in the image.", "response_a": "purple ring, purple cross.",
     "response_b": "yellow ring, purple ring.", "label": "A", "critique": "A: purple ring: yes\\nA:
     purple cross: yes\\nB: yellow ring: no\\nB: purple ring: yes\\nVerdict: A",
     "style": "critique", "verdict": "A"}

    python 02_generate_critiques.py --run runs/demo --critiques 2 --max-new-tokens 96
    python 02_generate_critiques.py                # one GPU: 5,000 pairs x 2 orders x 4 critiques
"""

import importlib
import re
import shlex
from collections import Counter
from pathlib import Path
from statistics import median

import common
from common import RowWriter, both_orders, finish_stage, parse_checks, parse_verdict

one = importlib.import_module("01_build_preferences")
find_mentions = one.find_mentions
spaced = one.spaced

LEAK = re.compile(  # a critique that cites what only its writer was told
    r"""\b(?:reference | ground[- ]truth | detector | known\ to\ be\ true | the\ findings?
        | the\ expert | (?:the|given|correct)\ label\ (?:says|is|states|shows|gives))\b""",
    re.IGNORECASE | re.VERBOSE,
)


# ---- The method: the reference, and what makes a critique worth training on ----------------------
def render_reference(question, status, vocabulary):
    """The expert's findings and the label as the lines that a critique would hold.

    question: {"response_a", "response_b", "label"}; status: {object: "present" | "absent" |
    "unsure"}. The word "unsure" stands where the model must look for itself.
    """
    word = {"present": "yes", "absent": "no", "unsure": "unsure"}
    lines = []
    for side, response in (("A", question["response_a"]), ("B", question["response_b"])):
        for name in find_mentions(response, vocabulary):
            if name in status:
                lines.append(f"{side}: {name}: {word[status[name]]}")
    return "\n".join([*lines, f"Verdict: {question['label']}"])


def verdict_of_checks(checks):
    """The response with fewer unsupported claims: "A", "B", or None where they are even."""
    unsupported = Counter(side for side, _, supported in checks if not supported)
    if unsupported["A"] == unsupported["B"]:
        return None
    return "A" if unsupported["A"] < unsupported["B"] else "B"


def bare_phrase(claim):
    """'There is a dog' -> 'dog': the claim without what only says that something is there."""
    return re.sub(r"^(?:there (?:is|are) )?(?:(?:an?|the|some|one|two|three) )?", "", spaced(claim))


def contradicts_expert(checks, said, status, vocabulary):
    """None, or how the checks fall short of the findings: against one, leaving one out, or beside.

    said: {"A": objects that response A mentions, "B": ...}; status: {object: "present" | ...}.
    """
    checked = {"A": set(), "B": set()}
    for side, claim, supported in checks:
        named = find_mentions(claim, vocabulary)
        if not set(named) <= set(said[side]):
            return "checks what the response does not say"
        if supported:
            wrong = any(status.get(name) == "absent" for name in named)
        else:  # only the bare object: "a dog with a hat: no" may be right where a dog is present
            name = vocabulary.get(bare_phrase(claim))  # None, of no status, where it says more
            wrong = status.get(name) == "present"
        if wrong:
            return "contradicts the expert"
        checked[side].update(named)
    for side in "AB":
        for name in said[side]:
            if status.get(name) in ("present", "absent") and name not in checked[side]:
                return "leaves out a verified object"
    return None


def reason_to_drop(critique, complete, question, evidence, vocabulary, style):
    """None for a critique worth training on, else the first reason against it (02 and 04).

    complete: it wrote its stop token; question: {"prompt", "response_a", "response_b", "label"};
    evidence: the pair's list of {"object", "status", ...}, empty for pairs without findings;
    vocabulary: {phrase: class}. Needs: parse_verdict, parse_checks, find_mentions, LEAK,
    verdict_of_checks, contradicts_expert, bare_phrase, spaced.
    """
    verdict = parse_verdict(critique)
    if not complete or verdict is None:
        return "malformed: unfinished, or no verdict line"
    checks = parse_checks(critique) if style == "critique" else []
    status = {found["object"]: found["status"] for found in evidence}
    if style == "critique" and status and not checks:
        return "malformed: no checks"
    if verdict != question["label"]:
        return "wrong verdict"
    if checks:
        better = verdict_of_checks(checks)
        # Even checks (None) decide nothing: fine where no response is known to name what is absent.
        if better != verdict and (better is not None or status):
            return "verdict does not follow from its checks"
    responses = {"A": question["response_a"], "B": question["response_b"]}
    given = "\n".join([question["prompt"], *responses.values()])
    if LEAK.search(critique) and not LEAK.search(given):
        return "cites the reference"
    if checks and status:
        said = {side: find_mentions(text, vocabulary) for side, text in responses.items()}
        return contradicts_expert(checks, said, status, vocabulary)
    return None


# ---- Writing and keeping -------------------------------------------------------------------------
def write_critiques(
    pairs, model, processor, vocabulary, path, *, n, guided, style, image_root, **sampling
):
    """n critiques per pair and order, with the reference in the prompt (guided) or without (04).

    sampling: temperature, max_new_tokens, seed, batch_size of common.sample. Kept in path as they
    come -> all rows of the file: the question's fields, its id with -k, and {critique, style,
    verdict, log_odds: r in nats or None, dropped: the reason against it or None}.
    """
    status_of, evidence_of, questions = {}, {}, []
    for pair in pairs:
        evidence_of[pair["id"]] = pair["evidence"]
        status_of[pair["id"]] = {found["object"]: found["status"] for found in pair["evidence"]}
        questions += both_orders(pair)
    writer = RowWriter(path)

    def is_written(question):
        return all(writer.is_done({"id": f"{question['id']}-{k}"}) for k in range(n))

    chunks = common.in_chunks(questions, is_written, max(1, common.CHUNK // n), "critiques")
    for chunk, bar in chunks:
        requests = []
        for question in chunk:
            a, b = question["response_a"], question["response_b"]
            reference = None
            if guided:
                reference = render_reference(question, status_of[question["pair_id"]], vocabulary)
            text = common.build_judge_prompt(question["prompt"], a, b, style, reference)
            image = Path(image_root) / question["image"]
            requests.append({"id": question["id"], "image": image, "text": text})
        answers = common.sample(model, processor, requests, n, bar=bar, **sampling)
        for question, samples in zip(chunk, answers):
            for k, answer in enumerate(samples):
                text, complete = answer["text"], answer["complete"]
                evidence = evidence_of[question["pair_id"]]
                row = {**question, "id": f"{question['id']}-{k}", "critique": text, "style": style}
                row |= {"verdict": answer["verdict"], "log_odds": answer["log_odds"]}
                reason = reason_to_drop(text, complete, question, evidence, vocabulary, style)
                writer.write({**row, "dropped": reason})
    return writer.rows


def keep_distinct(samples):
    """The kept critiques, each text once per question."""
    kept = {}
    for row in samples:
        key = (row["pair_id"], row["order"], row["critique"])
        if row["dropped"] is None and key not in kept:
            kept[key] = {k: v for k, v in row.items() if k not in ("dropped", "log_odds")}
    return list(kept.values())


def share_describing(samples):
    """Of the critiques with a verdict, the share that checks no claim: they describe, or assert."""
    judged = [row for row in samples if row["verdict"]]
    return sum(not parse_checks(row["critique"]) for row in judged) / max(1, len(judged))


def count(samples, kept):
    """What was written, dropped and kept: {line of the report: number}."""
    reasons = Counter(row["dropped"] for row in samples)
    counts = {"critiques written": len(samples)}
    for reason, number in reasons.most_common():
        if reason:
            counts[f"dropped: {reason}"] = number
    counts |= {"repeated": reasons[None] - len(kept), "kept": len(kept)}
    for order, number in sorted(Counter(row["order"] for row in kept).items()):
        counts[f"  kept in order {order}"] = number
    free = [row for row in kept if not parse_checks(row["critique"])]
    lengths = [len(row["critique"].split()) for row in kept]
    questions = {(row["pair_id"], row["order"]) for row in kept}
    counts["  kept without checks"] = len(free)
    counts["  questions with a kept critique"] = len(questions)
    counts["  median length in words"] = round(median(lengths))
    return counts


# ---- Arguments and main --------------------------------------------------------------------------
def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument_group("critiques").add_argument
    add("--limit", type=int, help="use only the first so many training pairs")
    add("--critiques", type=int, default=4, help="M, critiques per pair and order")
    add(
        "--style",
        choices=tuple(common.INSTRUCTIONS),
        default="critique",
        help="checks of the claims, a description first, or the verdict alone",
    )
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--max-new-tokens", type=int, default=512, help="tokens of a critique; longer are dropped")
    return parser.parse_args(argv)


def main(args):
    first = common.args_of(args.run, "01_preferences", "model", "image_root")
    inputs = common.files_of(args.run, "01_preferences", "preferences.jsonl", "vocabulary.json")
    folder = common.start_stage(args, "02_critiques", inputs)
    if folder is None:
        return

    # 1. load --------------------------------------------------------------------------------------
    vocabulary = one.read_vocabulary(Path(args.run) / "01_preferences" / "vocabulary.json")
    pairs = common.read_preferences(args.run, "train")[: args.limit]
    if not pairs:
        common.stop(
            f"{args.run}/01_preferences has no pair in split 'train': there raise --train, lower "
            "--validation, or give it more"
        )
    print(f"{len(pairs)} pairs x 2 orders x {args.critiques} critiques, style {args.style}")
    model, processor = common.load_judge(
        first["model"], device=args.device, max_image_tokens=first.get("max_image_tokens")
    )

    # 2. write, filter -----------------------------------------------------------------------------
    samples = write_critiques(
        pairs,
        model,
        processor,
        vocabulary,
        folder / "samples.jsonl",
        n=args.critiques,
        guided=True,
        style=args.style,
        image_root=first["image_root"],
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    kept = keep_distinct(samples)
    share = share_describing(samples)
    if args.style == "critique" and share > 0.2:
        print(f"warning: {share:.0%} of the critiques with a verdict describe: they check no claim")
    if not kept:
        reasons = dict(Counter(row["dropped"] for row in samples))
        common.stop(f"no critique was kept: {reasons}; read {folder}/samples.jsonl")

    # 3. save and report ---------------------------------------------------------------------------
    common.write_jsonl(folder / "critiques.jsonl", kept)
    print(f"\nthe first kept critique, {kept[0]['id']}:\n{kept[0]['critique']}\n")
    next_command = f"python 03_train_ift.py --run {shlex.quote(args.run)}"
    outputs = [folder / "critiques.jsonl"]
    finish_stage(folder, args, count(samples, kept), outputs, next_command)


if __name__ == "__main__":
    common.run(main, parse_args())
