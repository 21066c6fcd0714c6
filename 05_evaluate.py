"""05  How well does it judge? Every pair in both orders, all checkpoints side by side, with intervals and controls.

    accuracy = mean over both orders (no verdict = wrong)     both = right in both orders     agreement = same response wins
    hallucination = accuracy on pairs whose rejected response names an absent object
    interval = 95 % bootstrap over images (pairs of one image are drawn together); differences are paired by question

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) both orders always, since benchmarks put the better response first (VL-RewardBench: 1,245 of 1,250 rows);
  2) the last judge also sees a blank picture and another row's picture: what it still gets right is language prior;
  3) Best-of-N picks by knockout on mean P over both orders; its quality needs the truth (--truth) and is not guessed.

Reads  held-out pairs (--pairs, preferences.jsonl's format), base model, 03_ift/, 04_rejection*/iter*/.
Writes 05_evaluation/: report.md, metrics.json, judgements.jsonl {id, condition, category, order, label, verdict,
       probability_a, critique}, reliability.png, best_of_n.jsonl

    python 05_evaluate.py --run runs/demo --pairs world/heldout.jsonl --truth world/truth.jsonl
"""
import argparse
import importlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import common
from common import RowWriter, both_orders, finish_stage, inherit, parse_checks, read_jsonl, row_seed, start_stage

find_mentions = importlib.import_module("01_build_preferences").find_mentions
ift = importlib.import_module("03_train_ift")
accuracy_by_order, expected_calibration_error = ift.accuracy_by_order, ift.expected_calibration_error  # 03 validates by them


# ---- The measures ----------------------------------------------------------------------------------------------------
def cluster_bootstrap(values, clusters, n=10000, seed=0):
    """95 % percentile interval (low, high) of the mean of values, resampling whole clusters (images) with replacement:
    pairs of one image succeed and fail together, so they are no independent draws."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)  # (N,) in 0..C-1
    sums = np.bincount(index, weights=np.asarray(values, dtype=float))  # (C,)
    sizes = np.bincount(index)  # (C,)
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, n, 500):  # 500 resamples at a time bound the memory
        drawn = rng.integers(len(sums), size=(min(500, n - len(means)), len(sums)))  # (500, C) cluster numbers
        means.extend(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return tuple(float(x) for x in np.percentile(means, [2.5, 97.5]))


def right_per_pair(rows):
    """{pair id: share of its orders judged right, in {0, .5, 1}}."""
    right = {}
    for row in rows:
        right.setdefault(row["id"], []).append(row["verdict"] == row["label"])
    return {key: sum(values) / len(values) for key, values in right.items()}


def check_rates(rows, pairs, vocabulary):
    """How the judge's checks stand to the truth in the pairs' evidence: share of present objects said to be supported, of
    absent ones said not to be, their mean (balanced), and n. A judge that trusts the text has (1, 0)."""
    said = {"present": [], "absent": []}
    for row in rows:
        status = {e["object"]: e["status"] for e in pairs[row["id"]].get("evidence") or []}
        for _, claim, supported in parse_checks(row["critique"]):
            for name in find_mentions(claim, vocabulary):
                if status.get(name) in said:
                    said[status[name]].append(supported)
    if not said["present"] or not said["absent"]:
        return {}
    yes, no = np.mean(said["present"]), 1 - np.mean(said["absent"])
    return {"present_said_yes": float(yes), "absent_said_no": float(no), "balanced": float((yes + no) / 2),
            "n_checks": len(said["present"]) + len(said["absent"])}


def measure(rows, pairs, vocabulary):
    """All measures of one condition; rows: judgements, pairs: {id: pair}."""
    right = right_per_pair(rows)
    images = [pairs[key]["image"] for key in right]
    hallucinated = [key for key in right if pairs[key].get("hallucinated")]
    categories = {}
    for key, value in right.items():
        categories.setdefault(pairs[key].get("category") or "all", []).append(value)
    by_category = {name: float(np.mean(values)) for name, values in sorted(categories.items())}
    return {**ift.measure(rows), "interval": cluster_bootstrap(list(right.values()), images),
            "hallucination": float(np.mean([right[key] for key in hallucinated])) if hallucinated else None,
            "n_hallucination": len(hallucinated), "by_category": by_category, "macro": float(np.mean(list(by_category.values()))),
            "checks": check_rates(rows, pairs, vocabulary)}


def heuristic_rows(pairs):
    """The judge that prefers the shorter response (characters); equal lengths count half: A in one order, A in the other."""
    return [{"id": q["pair_id"], "order": q["order"], "label": q["label"], "probability_a": 0.5, "critique": "",
             "verdict": "A" if len(q["response_a"]) <= len(q["response_b"]) else "B"}
            for pair in pairs for q in both_orders(pair)]


def expert_against_truth(rows, truth):
    """Share of stage 01's findings (present / absent) and of its pairs that the truth contradicts; {} without truth."""
    known = [row for row in rows if row["image"] in truth]
    findings = [(e["status"] == "present") == (e["object"] in truth[row["image"]])
                for row in known for e in row["evidence"] if e["status"] != "unsure"]
    pairs = [all((e["status"] == "present") == (e["object"] in truth[row["image"]]) for e in row["evidence"]
                 if e["status"] != "unsure") for row in known]
    labels = [not any(e["object"] not in truth[row["image"]] for e in row["evidence"] if e["claimed_by"] != "rejected") and
              any(e["object"] not in truth[row["image"]] for e in row["evidence"] if e["claimed_by"] != "chosen") for row in known]
    return {"findings_contradicted": 1 - float(np.mean(findings)), "pairs_contradicted": 1 - float(np.mean(pairs)),
            "labels_wrong": 1 - float(np.mean(labels)), "n_findings": len(findings), "n_pairs": len(pairs)} if findings else {}


# ---- Conditions ------------------------------------------------------------------------------------------------------
def find_conditions(run):
    """{name: checkpoint folder or None for the base model}: everything the run has trained, in order."""
    found = {"base": None}
    if (run / "03_ift" / "meta.json").exists():
        found["after 03"] = common.find_checkpoint(run / "03_ift")
    for stage in sorted(run.glob("04_rejection*")):
        rule = stage.name.removeprefix("04_rejection").removeprefix("_") or "margin"
        for done in sorted(stage.glob("iter*/done.json"), key=lambda p: int(p.parent.name[4:])):
            found[f"{rule}, iteration {done.parent.name[4:]}"] = common.find_checkpoint(done.parent)
    return found


def withheld(questions, how, image_root, seed):
    """The same questions with a blank picture (uniform grey, same size), or with the picture of another row."""
    names = sorted({q["image"] for q in questions})
    if how == "other" and len(names) < 2:
        common.stop("--withhold other needs pairs of at least two images")
    changed = []
    for q in questions:
        if how == "blank":
            picture = Image.new("RGB", Image.open(Path(image_root) / q["image"]).size, (128, 128, 128))
        else:
            others = [name for name in names if name != q["image"]]
            picture = Path(image_root) / others[row_seed(seed, "other", q["image"]) % len(others)]
        changed.append({**q, "picture": picture})
    return changed


def judge_condition(name, questions, model, processor, writer, args):
    """Judgement rows of one condition, taken from an interrupted run where they are there."""
    rows = [row for row in writer.rows if row["condition"] == name]
    if len(rows) == len(questions):
        return rows
    if rows:
        common.stop(f"{writer.path} holds a part of condition {name!r}: start again with --overwrite")
    rows = ift.judge(model, processor, questions, args.image_root, args.style, args.votes, 0.0 if args.votes == 1 else 1.0,
                     args.max_new_tokens, args.batch_size, args.seed, f"judge, {name}")
    for row, question in zip(rows, questions):
        if args.mean_probability and row["verdict"]:
            row["verdict"] = "A" if row["probability_a"] > 0.5 else "B"
        writer.write({**row, "condition": name, "category": question.get("category")})
    return rows


# ---- Best-of-N -------------------------------------------------------------------------------------------------------
def knockout(candidates, prefer):
    """Winners among the first 1, 2, 4, ... candidates of each row, in one knockout: the tree over 2N candidates contains the
    tree over the first N. candidates: {row: list of 2^k texts}; prefer(list of (row, a, b)) -> list of bool, a wins."""
    alive = {key: list(texts) for key, texts in candidates.items()}
    winners = {key: [texts[0]] for key, texts in candidates.items()}
    while any(len(texts) > 1 for texts in alive.values()):
        games = [(key, texts[i], texts[i + 1]) for key, texts in alive.items() for i in range(0, len(texts), 2)]
        results = iter(zip(games, prefer(games)))
        for key, texts in alive.items():
            alive[key] = [a if a_wins else b for (_, a, b), a_wins in (next(results) for _ in range(len(texts) // 2))]
            winners[key].append(alive[key][0])
    return winners


def best_of_n(rows, candidates, model, processor, name, args):
    """{row id: winners among the first 1, 2, 4, ... candidates} by the judge's mean P over both orders."""
    pair_of = {row["id"]: row for row in rows}

    def prefer(games):
        played = [game for game in dict.fromkeys(games) if game[1] != game[2]]
        questions = [q for number, (key, a, b) in enumerate(played) for q in both_orders(
            {"id": str(number), "image": pair_of[key]["image"], "prompt": pair_of[key]["prompt"], "chosen": a, "rejected": b})]
        judged = ift.judge(model, processor, questions, args.image_root, args.style, max_new_tokens=args.max_new_tokens,
                           batch_size=args.batch_size, describe=f"best of N, {name}")
        for_a = Counter()
        for row in judged:
            for_a[played[int(row["id"])]] += row["probability_a"] if row["label"] == "A" else 1 - row["probability_a"]
        return [game[1] == game[2] or for_a[game] >= 1 for game in games]  # equal texts: either; mean of two >= .5

    return knockout(candidates, prefer)


def response_quality(text, objects, vocabulary):
    """(names no absent object, share of the objects named) of one response; quality for picks is their sum."""
    named = set(find_mentions(text, vocabulary))
    return float(named <= objects), len(named & objects) / len(objects)


def best_of_n_table(rows, candidates, picks, truth, vocabulary):
    """{name of the picker: {N: {"hallucinated": share of picks, "recall": mean}}}, with random and oracle picks alongside."""
    sizes = [2 ** k for k in range(len(next(iter(picks.values()))[rows[0]["id"]]))]
    table = {}
    for n in sizes:
        for name in ("random pick", "oracle pick", *picks):
            scores = []
            for row in rows:
                quality = [response_quality(text, truth[row["image"]], vocabulary) for text in candidates[row["id"]][:n]]
                scores.append(np.mean(quality, 0) if name == "random pick" else max(quality, key=sum) if name == "oracle pick"
                              else response_quality(picks[name][row["id"]][sizes.index(n)], truth[row["image"]], vocabulary))
            clean, recall = np.mean(scores, 0)
            table.setdefault(name, {})[n] = {"hallucinated": float(1 - clean), "recall": float(recall)}
    return table


# ---- Report ----------------------------------------------------------------------------------------------------------
def draw_reliability(judged, path):
    """Reliability plot: share right against P(verdict given), ten bins, one line per condition."""
    figure = Figure((4.6, 4.4))
    axis = figure.subplots()
    axis.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="perfectly calibrated")
    for name, rows in judged.items():
        given = np.array([max(row["probability_a"], 1 - row["probability_a"]) for row in rows if row["verdict"]])
        right = np.array([row["verdict"] == row["label"] for row in rows if row["verdict"]])
        index = np.minimum((given * 20).astype(int), 19)  # P(verdict) lies in [.5, 1]: bins of .05
        bins = [b for b in range(20) if (index == b).sum() >= 10]
        ece = expected_calibration_error(given, right)
        axis.plot([given[index == b].mean() for b in bins], [right[index == b].mean() for b in bins], "o-", markersize=3,
                  label=f"{name}, ECE {ece:.3f}")
    axis.set(xlabel="P(verdict)", ylabel="share right", xlim=(0.48, 1.02), ylim=(0, 1.02))
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table_lines(table, best_of, differences, expert, votes):
    """report.md's tables as lines of markdown."""
    cell = lambda x: "" if x is None else f"{x:.3f}"
    lines = ["| judge | accuracy | 95 % interval | both orders | hallucination | agreement | unparseable | ECE | Bradley-Terry |",
             "|---|---|---|---|---|---|---|---|---|", "| chance | 0.500 | | 0.250 | 0.500 | 0.500 | | | 0.693 |"]
    for name, m in table.items():
        low, high = m["interval"]
        lines.append(f"| {name} | {cell(m['accuracy'])} | {cell(low)}-{cell(high)} | {cell(m['both'])} | {cell(m['hallucination'])} | "
                     f"{cell(m['agreement'])} | {cell(m['unparseable'])} | {cell(m.get('ece'))} | {cell(m.get('bradley_terry_loss'))} |")
    some = next(iter(table.values()))
    lines += ["", f"n = {some['n_pairs']} pairs in both orders ({some['n_hallucination']} with a hallucinated object), {votes} "
              "vote(s) each; accuracy is the mean over orders, chance .5 (both orders: .25)."]
    if differences:
        lines += ["", "| difference in accuracy | mean | 95 % interval, paired |", "|---|---|---|"]
        lines += [f"| {name} | {mean:+.3f} | {low:+.3f} to {high:+.3f} |" for name, (mean, low, high) in differences.items()]
    categories = list(some["by_category"])
    if len(categories) > 1:
        lines += ["", "| judge | " + " | ".join(categories) + " | macro |", "|---" * (len(categories) + 2) + "|"]
        lines += [f"| {name} | " + " | ".join(cell(m["by_category"][c]) for c in categories) + f" | {cell(m['macro'])} |"
                  for name, m in table.items()]
    if any(m["checks"] for m in table.values()):
        lines += ["", "| checks of | present said yes | absent said no | balanced |", "|---|---|---|---|"]
        lines += [f"| {name} | " + " | ".join(cell(m["checks"][k]) for k in ("present_said_yes", "absent_said_no", "balanced")) + " |"
                  for name, m in table.items() if m["checks"]]
    if expert:
        lines += ["", f"The expert contradicts the truth in {expert['findings_contradicted']:.1%} of {expert['n_findings']} findings; "
                  f"{expert['pairs_contradicted']:.1%} of {expert['n_pairs']} pairs hold such a finding, {expert['labels_wrong']:.1%} "
                  "have a wrong label."]
    for measure_name in ("hallucinated", "recall") if best_of else ():
        sizes = list(next(iter(best_of.values())))
        lines += ["", f"| Best-of-N, {measure_name} | " + " | ".join(f"N = {n}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(cell(by_n[n][measure_name]) for n in sizes) + " |" for name, by_n in best_of.items()]
    return lines


def before_and_after(judged, names):
    """One question that the first named judge gets wrong and the second right, with both critiques, as markdown lines."""
    first, second = (judged[name] for name in names)
    for a, b in zip(first, second):
        if a["verdict"] != a["label"] and b["verdict"] == b["label"]:
            quoted = [f"\n{name}:\n```\n{row['critique']}\n```" for name, row in zip(names, (a, b))]
            return [f"\n{a['image']}, order {a['order']}, the better response is {a['label']}", *quoted]
    return []


# ---------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/default", help="run directory, shared by all stages")
    add("--pairs", required=True, help="held-out pairs, jsonl in preferences.jsonl's format")
    add("--image-root", help="folder that their image paths start from; default: the folder of --pairs")
    add("--truth", help="jsonl {image, objects: [{object}]}: judges the expert and scores Best-of-N")
    add("--model", help="default: as in stage 01")
    add("--max-image-tokens", type=int, help="default: as in stage 01")
    add("--style", choices=tuple(common.INSTRUCTIONS), help="default: as in stage 02")
    add("--device", help="cuda, mps or cpu; default: the first of these that is there")
    add("--votes", type=int, default=1, help="K: 1 judges greedily, more take the majority of sampled critiques")
    add("--mean-probability", action="store_true", help="decide by mean P(A) over the votes instead of the majority")
    add("--withhold", nargs="*", choices=("blank", "other"), default=["blank", "other"],
        help="the last judge once more with a blank picture or with another row's")
    add("--best-of", type=int, default=0, help="N, a power of 2: Best-of-N on the policy's responses; needs --truth")
    add("--best-of-images", type=int, default=100)
    add("--max-new-tokens", type=int, default=512, help="longest critique")
    add("--batch-size", type=int, default=64, help="sequences decoded together")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="delete this stage's folder first")
    args = parser.parse_args(argv)
    if args.best_of and (not args.truth or args.best_of & (args.best_of - 1)):
        parser.error("--best-of needs a power of 2 and --truth")
    args.image_root = str(Path(args.image_root or Path(args.pairs).parent).resolve())
    return args


def run_best_of_n(pairs, judges, truth, vocabulary, folder, args):
    """Sample the policy's responses, let each judge pick, score by the truth -> best_of_n_table."""
    rows = list({pair["image"]: pair for pair in pairs if truth.get(pair["image"])}.values())[:args.best_of_images]
    model, processor = common.load_judge(args.model, None, args.device, args.max_image_tokens)
    requests = [{"id": row["id"], "image": Path(args.image_root) / row["image"], "text": row["prompt"]} for row in rows]
    answers = common.sample(model, processor, requests, args.best_of, 1.0, args.max_new_tokens, args.seed, args.batch_size)
    candidates = {row["id"]: [a["text"].strip() for a in texts] for row, texts in zip(rows, answers)}
    picks = {}
    for name, checkpoint in judges.items():
        model, processor = common.load_judge(args.model, checkpoint, args.device, args.max_image_tokens)
        picks[name] = best_of_n(rows, candidates, model, processor, name, args)
    common.write_jsonl(folder / "best_of_n.jsonl", [{"id": row["id"], "image": row["image"], "candidates": candidates[row["id"]],
                                                     **{name: picks[name][row["id"]] for name in picks}} for row in rows])
    return best_of_n_table(rows, candidates, picks, truth, vocabulary)


def main(args):
    inherit(args, "01_preferences", ("model", "max_image_tokens"))
    run = Path(args.run)
    if (run / "02_critiques" / "meta.json").exists():
        inherit(args, "02_critiques", ("style",))
    args.style = args.style or "critique"
    conditions = find_conditions(run)
    args.conditions = list(conditions)  # a newly trained judge is a reason to evaluate anew
    folder = start_stage(args, "05_evaluation")
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    pairs = read_jsonl(args.pairs, ("id", "image", "prompt", "chosen", "rejected"))
    by_id = {pair["id"]: pair for pair in pairs}
    questions = [{**q, "category": pair.get("category")} for pair in pairs for q in both_orders(pair)]
    vocabulary = json.loads((run / "01_preferences" / "vocabulary.json").read_text())
    truth = {row["image"]: {e["object"] for e in row["objects"]} for row in read_jsonl(args.truth, ("image", "objects"))} \
        if args.truth else {}
    margins = [name for name in conditions if name.startswith("margin")]
    last = margins[-1] if margins else list(conditions)[-1]
    print(f"{len(pairs)} pairs x 2 orders; judges: {', '.join(conditions)}; image withheld for {last}")

    # 2. judge ----------------------------------------------------------------------------------------------------
    writer, judged = RowWriter(folder / "judgements.jsonl"), {}
    for name, checkpoint in conditions.items():
        model, processor = common.load_judge(args.model, checkpoint, args.device, args.max_image_tokens)
        judged[name] = judge_condition(name, questions, model, processor, writer, args)
        for how in args.withhold if name == last else ():
            label = f"{name}, {how} image"
            judged[label] = judge_condition(label, withheld(questions, how, args.image_root, args.seed), model, processor, writer, args)

    # 3. measure --------------------------------------------------------------------------------------------------
    table = {"shorter response": measure(heuristic_rows(pairs), by_id, vocabulary)}
    table |= {name: measure(rows, by_id, vocabulary) for name, rows in judged.items()}
    differences, images = {}, [by_id[key]["image"] for key in by_id]
    for name in (n for n in conditions if n != last):
        gain = [a - b for a, b in zip(right_per_pair(judged[last]).values(), right_per_pair(judged[name]).values())]
        differences[f"{last} - {name}"] = (float(np.mean(gain)), *cluster_bootstrap(gain, images))
    expert = expert_against_truth(read_jsonl(run / "01_preferences" / "preferences.jsonl"), truth)
    best_of = run_best_of_n(pairs, {name: conditions[name] for name in ("base", last)}, truth, vocabulary, folder, args) \
        if args.best_of else {}

    # 4. report ---------------------------------------------------------------------------------------------------
    lines = table_lines(table, best_of, differences, expert, args.votes)
    lines += before_and_after(judged, ("base", last)) if last != "base" else []
    (folder / "report.md").write_text("\n".join(["# Evaluation", "", f"`{args.pairs}`, {len(pairs)} pairs", "", *lines, "",
                                                 "![reliability](reliability.png)", ""]))
    draw_reliability({name: judged[name] for name in ("base", "after 03", last) if name in judged}, folder / "reliability.png")
    common.write_json(folder / "metrics.json", {"table": table, "differences": differences, "expert": expert, "best_of_n": best_of})
    print("\n".join(lines))
    finish_stage(folder, args, {"pairs": len(pairs), "judgements": len(writer.rows)}, [args.pairs], f"read {folder}/report.md")


if __name__ == "__main__":
    main(parse_args())
