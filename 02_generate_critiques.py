"""02  The model writes critiques of each pair, guided by the expert's findings and the label; the sound ones are kept.

    written with:  image, question, A, B, findings + label          (reference-guided, both orders, M samples at T = 1)
    trained on as: image, question, A, B  ->  critique + verdict    (stage 03: the prompt there has no reference)
    kept if:       verdict = label  and  verdict follows from the critique's own checks  and  no check contradicts a
                   present/absent finding or names what the response does not say  and  the reference is not cited

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) findings are laid out as the very lines that the critique will hold, since models copy a separate list wrongly;
  2) "verdict = label" alone is too weak a filter: lucky verdicts with false facts pass it and training on them makes the
     judge worse, so the checks are held against each other and against the expert;
  3) pairs without findings (reasoning, general questions) are kept on verdict and leak alone, and counted apart.

Reads  01_preferences/preferences.jsonl (split "train"), vocabulary.json.
Writes 02_critiques/samples.jsonl (all, with the reason why one was dropped) and
       critiques.jsonl {id, pair_id, image, prompt, response_a, response_b, label, critique, verdict, style}

    python 02_generate_critiques.py --run runs/demo
    python 02_generate_critiques.py                              # one GPU: 5,000 pairs x 2 orders x 4 critiques
"""
import argparse
import importlib
import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import common
from common import RowWriter, both_orders, finish_stage, in_chunks, inherit, parse_checks, read_jsonl, start_stage

find_mentions = importlib.import_module("01_build_preferences").find_mentions

LEAK = re.compile(r"\b(?:reference|ground[- ]truth|detector|known to be true|the findings?|the expert|"
                  r"(?:the|given|correct) label (?:says|is|states|shows|gives))\b", re.IGNORECASE)


# ---- The method: the reference, and what makes a critique worth training on ------------------------------------------
def render_reference(question, status, vocabulary):
    """The expert's findings and the label as the lines that a critique would hold; "unsure" where the model must look.
    question: {"response_a", "response_b", "label"}; status: {object: "present" | "absent" | "unsure"}."""
    word = {"present": "yes", "absent": "no", "unsure": "unsure"}
    lines = [f"{side}: {name}: {word[status[name]]}" for side, text in
             (("A", question["response_a"]), ("B", question["response_b"]))
             for name in find_mentions(text, vocabulary) if name in status]
    return "\n".join([*lines, f"Verdict: {question['label']}"])


def verdict_of_checks(checks):
    """The response with fewer unsupported claims: "A", "B", or None where they are even."""
    unsupported = Counter(side for side, _, supported in checks if not supported)
    return None if unsupported["A"] == unsupported["B"] else min("AB", key=lambda side: unsupported[side])


def contradicts_expert(checks, said, status, vocabulary):
    """None, or how the checks disagree with the findings. said: {"A": mentions, "B": mentions} of the two responses.
    A "no" contradicts a present object only where the claim is the bare object: "a dog with a hat: no" may be right."""
    checked = {"A": set(), "B": set()}
    for side, claim, supported in checks:
        named = find_mentions(claim, vocabulary)
        if not set(named) <= set(said[side]):
            return "checks what the response does not say"
        bare = re.sub(r"^(?:there (?:is|are) )?(?:an?|the|some) ", "", claim.lower())
        if any(status.get(name) == "absent" for name in named) if supported else \
                bare in vocabulary and status.get(vocabulary[bare]) == "present":
            return "contradicts the expert"
        checked[side].update(named)
    if any(status.get(name) == "absent" and name not in checked[side] for side in "AB" for name in said[side]):
        return "leaves out an absent object"
    return None


def reason_to_drop(critique, complete, question, evidence, vocabulary, style):
    """None for a critique worth training on, else the first reason against it (02 and 04 filter by this one function).
    question: {"response_a", "response_b", "label"}; evidence: the pair's list of {"object", "status", ...}, may be empty."""
    verdict = common.parse_verdict(critique)
    if not complete or verdict is None:
        return "malformed: no verdict line"
    checks = parse_checks(critique) if style == "critique" else []
    status = {found["object"]: found["status"] for found in evidence}
    if style == "critique" and status and not checks:
        return "malformed: no checks"
    if verdict != question["label"]:
        return "wrong verdict"
    if checks and verdict_of_checks(checks) != verdict and (status or verdict_of_checks(checks)):
        return "verdict does not follow from its checks"
    if LEAK.search(critique) and not LEAK.search(question["response_a"] + "\n" + question["response_b"]):
        return "cites the reference"
    said = {side: find_mentions(question[f"response_{side.lower()}"], vocabulary) for side in "AB"}
    return contradicts_expert(checks, said, status, vocabulary) if checks and status else None


# ---- Sampling --------------------------------------------------------------------------------------------------------
def write_critiques(pairs, model, processor, vocabulary, path, n, guided, args, seed):
    """n critiques per pair and order, guided by the reference or not (04 samples by this too), kept in path: rows
    {question, critique, verdict, style, log_odds: r in nats or None, dropped: the filters' reason or None}."""
    evidence = {pair["id"]: pair["evidence"] for pair in pairs}
    questions = [question for pair in pairs for question in both_orders(pair)]
    writer = RowWriter(path)
    written = {row["id"] for row in writer.rows}
    done = {question["id"] for question in questions if f"{question['id']}-{n - 1}" in written}
    for chunk, bar in in_chunks(questions, done, args.batch_size, "critiques"):
        requests = []
        for question in chunk:
            status = {found["object"]: found["status"] for found in evidence[question["pair_id"]]}
            text = common.build_judge_prompt(question["prompt"], question["response_a"], question["response_b"], args.style,
                                             render_reference(question, status, vocabulary) if guided else None)
            requests.append({"id": question["id"], "image": Path(args.image_root) / question["image"], "text": text})
        answers = common.sample(model, processor, requests, n, args.temperature, args.max_new_tokens, seed, args.batch_size, bar)
        for question, samples in zip(chunk, answers):
            for k, answer in enumerate(samples):
                if f"{question['id']}-{k}" not in written:
                    reason = reason_to_drop(answer["text"], answer["complete"], question, evidence[question["pair_id"]],
                                            vocabulary, args.style)
                    writer.write({**question, "id": f"{question['id']}-{k}", "critique": answer["text"], "style": args.style,
                                  "verdict": answer["verdict"], "log_odds": answer["log_odds"], "dropped": reason})
    return writer.rows


def keep_distinct(samples):
    """The kept critiques, each text once per question."""
    seen, kept = set(), []
    for row in samples:
        key = (row["pair_id"], row["order"], row["critique"])
        if row["dropped"] is None and key not in seen:
            seen.add(key)
            kept.append({name: value for name, value in row.items() if name not in ("dropped", "log_odds")})
    return kept


# ---------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/default", help="run directory, shared by all stages")
    add("--pairs", type=int, help="use only the first so many training pairs")
    add("--model", help="default: as in stage 01")
    add("--max-image-tokens", type=int, help="default: as in stage 01")
    add("--image-root", help="default: as in stage 01")
    add("--device", help="cuda, mps or cpu; default: the first of these that is there")
    add("--style", choices=tuple(common.INSTRUCTIONS), default="critique",
        help="critique: claim by claim; descriptive: the image first; none: the verdict alone")
    add("--critiques", type=int, default=4, help="M, critiques written per pair and order")
    add("--temperature", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=512, help="longest critique; an unfinished one is dropped")
    add("--batch-size", type=int, default=64, help="sequences decoded together")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="delete this stage's folder first")
    return parser.parse_args(argv)


def main(args):
    inherit(args, "01_preferences", ("model", "max_image_tokens", "image_root"))
    folder = start_stage(args, "02_critiques")
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    source = Path(args.run) / "01_preferences" / "preferences.jsonl"
    vocabulary = json.loads(source.with_name("vocabulary.json").read_text())
    pairs = read_jsonl(source, ("id", "image", "prompt", "chosen", "rejected", "split", "evidence"))
    pairs = [pair for pair in pairs if pair["split"] == "train"][:args.pairs]
    if not pairs:
        common.stop(f"{source} has no pair in split 'train': lower --validation in stage 01")
    model, processor = common.load_judge(args.model, None, args.device, args.max_image_tokens)
    print(f"{len(pairs)} pairs x 2 orders x {args.critiques} critiques, style {args.style}")

    # 2. write, filter --------------------------------------------------------------------------------------------
    samples = write_critiques(pairs, model, processor, vocabulary, folder / "samples.jsonl", args.critiques, True, args, args.seed)
    kept = keep_distinct(samples)
    if not kept:
        common.stop(f"no critique was kept: {dict(Counter(row['dropped'] for row in samples))}; read {folder}/samples.jsonl")

    # 3. save and report ------------------------------------------------------------------------------------------
    common.write_jsonl(folder / "critiques.jsonl", kept)
    counts = {"critiques written": len(samples)}
    counts |= {f"dropped: {reason}": n for reason, n in Counter(row["dropped"] for row in samples).most_common() if reason}
    counts |= {"repeated": sum(row["dropped"] is None for row in samples) - len(kept), "kept": len(kept)}
    counts |= {f"  kept in order {order}": n for order, n in sorted(Counter(row["order"] for row in kept).items())}
    counts |= {"  kept without checks": sum(not parse_checks(row["critique"]) for row in kept),
               "  questions with a kept critique": len({(row["pair_id"], row["order"]) for row in kept}),
               "  median length in words": round(median(len(row["critique"].split()) for row in kept))}
    print(f"\nthe first kept critique, {kept[0]['id']}:\n{kept[0]['critique']}\n")
    finish_stage(folder, args, counts, [source], f"python 03_train_ift.py --run {args.run}")


if __name__ == "__main__":
    main(parse_args())
