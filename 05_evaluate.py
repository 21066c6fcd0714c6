"""05  How well does it judge? Every pair in both orders, all checkpoints side by side, with intervals and controls.

    accuracy = mean over both orders (no verdict = wrong)     both = right in both orders     agreement = same response wins
    macro = mean over categories      hallucination = accuracy on pairs whose rejected response names an absent object
    interval = 95 % bootstrap over images (pairs of one image are drawn together); differences are paired by question

--benchmark vl-rewardbench (--protocol official: scored as its authors do), multimodal-rewardbench: published pairs;
pope: a question is the pair of its two answers; llava-wild: the policy answers N times, the judge picks, and the answers
files are for the benchmark's own review.

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) both orders always, since benchmarks put the better response first (VL-RewardBench: 1,245 of 1,250 rows);
  2) the last judge also sees a blank picture and another row's picture: what it still gets right is language prior;
  3) Best-of-N picks by knockout on mean P over both orders; its quality needs the truth (--truth) and is not guessed.

Reads  the benchmark (--pairs: file, folder or hub id), base model; 03_ift/, 04_rejection*/iter*/ as far as they are there.
Writes 05_evaluation[_BENCHMARK[_official]]/: report.md, metrics.json, judgements.jsonl {id, condition, category, order, label,
       verdict, probability_a, critique}, reliability.png, best_of_n.jsonl; llava-wild: answers_{first,random,judge}.jsonl

    python 05_evaluate.py --run runs/demo --pairs world/heldout.jsonl --truth world/truth.jsonl
    python 05_evaluate.py --run runs/eval --benchmark vl-rewardbench --model Qwen/Qwen2-VL-7B-Instruct   # no stage before it
"""
import importlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import common
from common import RowWriter, both_orders, finish_stage, parse_checks, read_jsonl, row_seed, start_stage, stop

one, two, ift, four = map(importlib.import_module, ("01_build_preferences", "02_generate_critiques", "03_train_ift",
                                                    "04_rejection_sampling"))
find_mentions, accuracy_by_order, expected_calibration_error = two.find_mentions, ift.accuracy_by_order, ift.expected_calibration_error

HUB = {"pairs": None, "vl-rewardbench": "MMInstruction/VL-RewardBench", "pope": "lmms-lab/POPE",
       "multimodal-rewardbench": "syhuggingface/multimodal_rewardbench", "llava-wild": "lmms-lab/llava-bench-in-the-wild"}
NOTES = {"vl-rewardbench": "Our prompt, not the official one. Published figures: overall accuracy, official prompt and protocol; "
                           "`--protocol official` is that protocol but for prompt and top_p (1, officially .2).",
         "multimodal-rewardbench": "Accuracy is the benchmark's overall accuracy but for the prompt (ours), the order (both, "
                                   "officially as stored) and missing verdicts (wrong, officially a coin flip).",
         "pope": "The judge chooses between the sentences of yes and no; published figures are of answers that a model writes "
                 "itself. Yes is the positive class, no verdict is the wrong answer; both orders count.",
         "llava-wild": "There is no score here: it takes the official GPT review (eval_gpt_review_bench.py) of an answers file. "
                       "Answers are sampled at temperature 1, officially they are greedy."}
GROUPS = {"general": 183, "hallucination": 749, "reasoning": 318}  # VL-RewardBench's rows, as published
PUBLISHED = {"Qwen2-VL-7B (published, arXiv 2411.17451)": 0.283, "GPT-4o (published, arXiv 2411.17451)": 0.658,
             "VL-GenRM (published, arXiv 2506.13888)": 0.723}


# ---- The measures ----------------------------------------------------------------------------------------------------
def cluster_bootstrap(values, clusters, n=10000, seed=0, groups=None):
    """95 % percentile interval (low, high) of the mean of values, resampling whole clusters (images) with replacement:
    pairs of one image succeed and fail together, so they are no independent draws. groups: mean of the groups' means instead."""
    clusters, index = np.unique(np.asarray(clusters), return_inverse=True)  # (N,) in 0..C-1
    names, group = np.unique([""] * len(index) if groups is None else groups, return_inverse=True)  # (N,) in 0..G-1
    sums, sizes = np.zeros((2, len(clusters), len(names)))  # (C, G) each
    np.add.at(sums, (index, group), np.asarray(values, dtype=float))
    np.add.at(sizes, (index, group), 1)
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, n, 100):  # 100 resamples at a time bound the memory
        drawn = rng.integers(len(sums), size=(min(100, n - len(means)), len(sums)))  # (100, C) cluster numbers
        with np.errstate(invalid="ignore"):  # 0 / 0: a group that was not drawn has no mean
            means.extend(np.nanmean(sums[drawn].sum(1) / sizes[drawn].sum(1), 1))  # (100, G) -> (100,)
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
    status_of = {key: {e["object"]: e["status"] for e in pair.get("evidence") or ()} for key, pair in pairs.items()}
    said = [(status_of[row["id"]].get(name), supported) for row in rows if status_of[row["id"]]
            for _, claim, supported in parse_checks(row["critique"]) for name in find_mentions(claim, vocabulary)]
    present, absent = ([supported for status, supported in said if status == wanted] for wanted in ("present", "absent"))
    if not present or not absent:
        return {}
    yes, no = float(np.mean(present)), 1 - float(np.mean(absent))
    return {"present_said_yes": yes, "absent_said_no": no, "balanced": (yes + no) / 2, "n_checks": len(present) + len(absent)}


def by_category(right, pairs):
    """{"accuracy", "by_category", "macro"} and the intervals of both means, from {pair id: share judged right}."""
    images, names = ([pairs[key].get(field) or "all" for key in right] for field in ("image", "category"))
    values, groups = list(right.values()), {name: [] for name in sorted(set(names))}
    for name, value in zip(names, values):
        groups[name].append(value)
    means = {name: float(np.mean(of_group)) for name, of_group in groups.items()}
    return {"accuracy": float(np.mean(values)), "interval": cluster_bootstrap(values, images), "by_category": means,
            "macro": float(np.mean(list(means.values()))), "macro_interval": cluster_bootstrap(values, images, groups=names)}


def measure(rows, pairs, vocabulary):
    """All measures of one condition; rows: judgements, pairs: {id: pair}."""
    right = right_per_pair(rows)
    hallucinated = [right[key] for key in right if pairs[key].get("hallucinated")]
    return {**ift.measure(rows), **by_category(right, pairs), "checks": check_rates(rows, pairs, vocabulary),
            "n_hallucination": len(hallucinated), "hallucination": float(np.mean(hallucinated)) if hallucinated else None,
            "pope": pope_scores(rows, pairs) if all("answer" in pair for pair in pairs.values()) else {}}


def official_scores(rows, pairs, k):
    """VL-RewardBench's own scoring: of a pair's first k calls more than half must agree with the label, or reject it; without
    such a majority ("unmatched", "other") the pair leaves the accuracy = agree / (agree + reject)."""
    calls, outcome = {}, {}
    for row in rows:
        calls.setdefault(row["id"], []).append(
            "unmatched" if row["verdict"] is None else "agree" if row["verdict"] == row["label"] else "reject")
    for key, said in calls.items():
        most, count = Counter(said[:k]).most_common(1)[0]
        outcome[key] = most if 2 * count > len(said[:k]) else "other"
    right = {key: float(most == "agree") for key, most in outcome.items() if most in ("agree", "reject")}
    scores = by_category(right, pairs) if right else {"accuracy": None, "by_category": {}}
    if len(scores["by_category"]) < len({pairs[key].get("category") for key in calls}):  # a group without a decided pair
        scores |= {"macro": None, "macro_interval": None}
    unparseable = float(np.mean([word == "unmatched" for said in calls.values() for word in said[:k]]))
    return {**scores, "unparseable": unparseable, **{name: list(outcome.values()).count(name) for name in (
        "agree", "reject", "unmatched", "other")}}


def pope_scores(rows, pairs):
    """POPE's measures over both orders, {category or "all": {...}}: yes is positive, and a judgement that is wrong, or none,
    said the other answer. Shares in [0,1]; 0 where the denominator is."""
    groups, scores = {}, {}
    for row in rows:
        is_yes = pairs[row["id"]]["answer"] == "yes"
        for name in (pairs[row["id"]]["category"], "all"):
            groups.setdefault(name, []).append((is_yes == (row["verdict"] == row["label"]), is_yes))
    for name in sorted(groups, key=lambda name: (name == "all", name)):
        said, true = np.array(groups[name]).T  # (n,) bool each
        hits, n_said, n_true = int((said & true).sum()), int(said.sum()), int(true.sum())
        scores[name] = {"accuracy": float((said == true).mean()), "precision": hits / max(n_said, 1),
                        "recall": hits / max(n_true, 1), "f1": 2 * hits / max(n_said + n_true, 1), "yes_ratio": n_said / len(true)}
    return scores


def heuristic_rows(pairs):
    """The judge that prefers the shorter response (characters); equal lengths count half: A in one order, A in the other."""
    return [{"id": q["pair_id"], "order": q["order"], "label": q["label"], "probability_a": 0.5, "critique": "",
             "verdict": "A" if len(q["response_a"]) <= len(q["response_b"]) else "B"}
            for pair in pairs for q in both_orders(pair)]


def expert_against_truth(rows, truth):
    """Share of stage 01's findings (present / absent) and of its pairs that the truth contradicts; {} without truth."""
    known = [(row["evidence"], truth[row["image"]]) for row in rows if row["image"] in truth]
    agrees = [[(e["status"] == "present") == (e["object"] in objects) for e in evidence if e["status"] != "unsure"]
              for evidence, objects in known]
    labels = [{e["claimed_by"] for e in evidence if e["object"] not in objects} == {"rejected"} for evidence, objects in known]
    findings = [agree for row in agrees for agree in row]
    return {"findings_contradicted": 1 - float(np.mean(findings)), "pairs_contradicted": 1 - float(np.mean([*map(all, agrees)])),
            "labels_wrong": 1 - float(np.mean(labels)), "n_findings": len(findings), "n_pairs": len(known)} if findings else {}


# ---- Benchmarks ------------------------------------------------------------------------------------------------------
def read_questions(source, image_root, folder):
    """(rows {id, question_id, image, prompt, category, answer}, counts) of POPE or LLaVA-Bench: JSON lines as released or the
    hub's columns. POPE's question_id starts anew in each split, so id is category/question_id."""
    listed, rows, counts = Path(source) / "questions.jsonl", {}, Counter()  # LLaVA-Bench keeps answers beside its questions
    for (file, number), row in two.read_rows(listed if listed.exists() else source):
        counts["rows read"] += 1
        image, category = row.get("image"), row.get("category") or file.stem.rsplit("_", 1)[-1]  # coco_pope_random.json
        new = {"id": f"{category}/{row.get('question_id')}", "question_id": row.get("question_id"), "category": category,
               "prompt": row.get("text") or row.get("question"), "answer": row.get("label") or row.get("answer")}
        try:
            if not new["prompt"] or new["id"] in rows:
                raise two.Skip("no question, or with the question_id of another", "question_id")
            inside = isinstance(image, str) and (Path(image_root) / "images" / image).is_file()
            rows[new["id"]] = {**new, "image": two.place_image(f"images/{image}" if inside else image, image_root, folder)}
        except two.Skip as skip:
            counts[f"skipped: {skip.args[0]}"] += 1
            if counts[f"skipped: {skip.args[0]}"] == 1:
                print(f"skipped {file} row {number}: {skip.args[0]} (later ones are only counted)")
    return list(rows.values()) or stop(f"{source}: no question is left, {dict(counts)}; --image-root {image_root}"), counts


def read_benchmark(folder, args):
    """(pairs, counts): what read_pairs finds, or POPE's questions, each as the pair of the sentences of yes and no."""
    if args.benchmark != "pope":
        return one.read_pairs(args.pairs, args.image_root, folder)[1:]
    pairs, (rows, counts) = [], read_questions(args.pairs, args.image_root, folder)
    for row in rows:
        asked = re.match(r"is there (an? )?(.+?) in the im", row["prompt"], re.IGNORECASE)  # "imange" in an early release
        answer = str(row["answer"]).strip().lower()
        if not asked or answer not in ("yes", "no"):
            stop(f"{args.pairs}, {row['id']}: {row['prompt']!r} with answer {row['answer']!r} is no question of POPE's")
        said = [f"Yes, there is {asked[1] or ''}{asked[2]} in the image.", f"No, there is no {asked[2]} in the image."]
        pairs.append({**row, "answer": answer, "chosen": said[answer == "no"], "rejected": said[answer == "yes"]})
    return pairs, counts


def answer_in_the_wild(judge, checkpoint, folder, args):
    """LLaVA-Bench: sample, pick, write answers files of every question in order, as its review wants -> (report's lines, counts)."""
    rows, counts = read_questions(args.pairs, args.image_root, folder)
    if len(rows) < counts["rows read"]:
        stop(f"{args.pairs}: {dict(counts)}, but the review needs all answers; check --image-root {args.image_root}")
    candidates, picks = four.sample_and_pick(rows, {judge: checkpoint} if args.best_of > 1 else {}, folder, args)
    chosen = {"first": {key: texts[0] for key, texts in candidates.items()}}
    if picks:
        chosen["random"] = {key: texts[row_seed(args.seed, "pick", key) % len(texts)] for key, texts in candidates.items()}
        chosen["judge"] = {key: winners[-1] for key, winners in picks[judge].items()}
    for name, texts in chosen.items():
        model_id = f"{Path(args.model).name}, {name} of {args.best_of}"
        common.write_json(folder / f"answers_{name}.jsonl", [
            {"question_id": row["question_id"], "prompt": row["prompt"], "text": texts[row["id"]],
             "answer_id": f"{model_id}, {row['id']}", "model_id": model_id, "metadata": {}} for row in rows])
    return markdown(("answers", "characters, mean"), [
        (f"answers_{name}.jsonl", float(np.mean([*map(len, texts.values())]))) for name, texts in chosen.items()]), counts


def official_questions(pair, seed, calls=10):
    """VL-RewardBench's calls for one pair, each in an order drawn for that call."""
    for call in range(calls):
        question = [*both_orders(pair)][row_seed(seed, "order", pair["id"], call) % 2]
        yield {**question, "id": f"{question['id']}-{call}"}


# ---- Conditions ------------------------------------------------------------------------------------------------------
def withheld(questions, how, image_root, seed):
    """The same questions with a blank picture (uniform grey, same size), or with the picture of another row."""
    names, blanks, changed = sorted({q["image"] for q in questions}), {}, []
    place = {name: k for k, name in enumerate(names)}
    if how == "other" and len(names) < 2:
        stop("--withhold other needs pairs of at least two images")
    for q in questions:
        if how == "blank":
            size = Image.open(Path(image_root) / q["image"]).size
            picture = blanks.setdefault(size, Image.new("RGB", size, (128, 128, 128)))  # one per size: there may be thousands
        else:
            k = row_seed(seed, "other", q["image"]) % (len(names) - 1)  # among the others: the names without this one
            picture = Path(image_root) / names[k + (k >= place[q["image"]])]
        changed.append({**q, "picture": picture})
    return changed


def find_conditions(run):
    """{name: checkpoint folder or None for the base model}: all that 03 and 04 have trained, in order."""
    found = {"base": None}
    if (run / "03_ift" / "meta.json").exists():
        found["after 03"] = four.find_checkpoint(run / "03_ift")
    for stage in sorted(run.glob("04_rejection*")):
        rule = stage.name.removeprefix("04_rejection").removeprefix("_") or "margin"
        for done in sorted(stage.glob("iter*/done.json"), key=lambda p: int(p.parent.name[4:])):
            found[f"{rule}, iteration {done.parent.name[4:]}"] = four.find_checkpoint(done.parent)
    return found


def judge_condition(name, questions, model, processor, writer, args):
    """Judgement rows of one condition, taken from an interrupted run where they are there."""
    rows = [row for row in writer.rows if row["condition"] == name]
    if len(rows) == len(questions):
        return rows
    if rows:
        stop(f"{writer.path} holds a part of condition {name!r}: start again with --overwrite")
    temperature = 0.2 if args.protocol == "official" else 0.0 if args.votes == 1 else 1.0
    rows = ift.judge(model, processor, questions, args.image_root, args.style, args.votes, temperature, args.max_new_tokens,
                     args.batch_size, args.seed, f"judge, {name}")
    for row, question in zip(rows, questions):
        if args.mean_probability and row["verdict"]:
            row["verdict"] = "A" if row["probability_a"] > 0.5 else "B"
        writer.write({**row, "condition": name, "category": question.get("category")})
    return rows


# ---- Report ----------------------------------------------------------------------------------------------------------
def draw_reliability(judged, path):
    """Reliability plot: share right against P(verdict given), ten bins, one line per condition."""
    figure = Figure((4.6, 4.4), layout="tight")
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
    figure.savefig(path, dpi=110)


def markdown(header, rows):
    """Lines of a table: floats with three decimals, a tuple as an interval, None as an empty cell."""
    one_of = {float: "{:.3f}".format, tuple: lambda x: f"{x[0]:.3f}-{x[1]:.3f}", type(None): lambda x: ""}
    cells = [[one_of.get(type(x), str)(x) for x in row] for row in (header, ["---"] * len(header), *rows)]
    return ["", *(f"| {' | '.join(row)} |" for row in cells)]


def table_lines(table, best_of, differences, expert, how, published):
    """report.md's tables as lines of markdown; how: a sentence on what was asked; published: {judge: accuracy} beside ours."""
    columns = ("accuracy", "interval", "both", "hallucination", "agreement", "unparseable", "ece", "bradley_terry_loss")
    chance = {"accuracy": 0.5, "both": 0.25, "hallucination": 0.5, "agreement": 0.5, "bradley_terry_loss": float(np.log(2))}
    lines = markdown(("judge", "accuracy", "95 % interval", "both orders", "hallucination", "agreement", "unparseable", "ECE",
                      "Bradley-Terry"), [(name, *map(m.get, columns)) for name, m in {
                          **{name: {"accuracy": value} for name, value in published.items()}, "chance": chance, **table}.items()])
    lines += ["", how]
    if differences:
        lines += markdown(("difference in accuracy", "mean", "95 % interval, paired"), [
            (name, f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}") for name, (mean, low, high) in differences.items()])
    if len(groups := sorted({name for m in table.values() for name in m["by_category"]})) > 1:
        lines += markdown(("judge", *groups, "macro", "95 % interval"), [
            (name, *map(m["by_category"].get, groups), m["macro"], m["macro_interval"]) for name, m in table.items()])
    if any(m.get("checks") for m in table.values()):
        lines += markdown(("checks of", "present said yes", "absent said no", "balanced"), [
            (name, *list(m["checks"].values())[:3]) for name, m in table.items() if m["checks"]])
    if any(m.get("pope") for m in table.values()):
        lines += markdown(("judge", "questions", "accuracy", "precision", "recall", "F1", "yes ratio"), [
            (name, group, *scores.values()) for name, m in table.items() for group, scores in m["pope"].items()])
    if expert:
        lines += ["", f"The expert contradicts the truth in {expert['findings_contradicted']:.1%} of {expert['n_findings']} "
                  f"findings; {expert['pairs_contradicted']:.1%} of {expert['n_pairs']} pairs hold such a finding, "
                  f"{expert['labels_wrong']:.1%} have a wrong label."]
    for measure_name in ("hallucinated", "recall") if best_of else ():
        lines += markdown((f"Best-of-N, {measure_name}", *(f"N = {n}" for n in next(iter(best_of.values())))), [
            (name, *(scores[measure_name] for scores in by_n.values())) for name, by_n in best_of.items()])
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
    parser = common.stage_parser(__doc__)
    add = parser.add_argument
    add("--benchmark", choices=tuple(HUB), default="pairs")
    add("--pairs", help="where its data lie: file, folder or hub id; default: the published hub id; required for pairs")
    add("--protocol", choices=("both-orders", "official"), default="both-orders", help="official: vl-rewardbench's own scoring")
    add("--image-root", help="folder that their image paths start from; default: the folder of --pairs")
    add("--truth", help="jsonl {image, objects: [{object}]}: judges the expert and scores Best-of-N")
    add("--style", choices=tuple(common.INSTRUCTIONS), help="default: as in stage 02, critique without it")
    add("--endpoint", help="URL of an OpenAI-compatible server that samples instead, such as http://localhost:8000/v1")
    add("--votes", type=int, default=1, help="K: 1 judges greedily, more take the majority of sampled critiques")
    add("--mean-probability", action="store_true", help="decide by mean P(A) over the votes instead of the majority")
    add("--withhold", nargs="*", choices=("blank", "other"), default=["blank", "other"],
        help="the last judge once more with a blank picture or with another row's")
    add("--best-of", type=int, default=0, help="N, a power of 2: Best-of-N on the policy's responses (--truth or llava-wild)")
    add("--best-of-images", type=int, default=100)
    add("--max-new-tokens", type=int, default=512, help="longest critique")
    args = parser.parse_args(argv)
    args.pairs = args.pairs or HUB[args.benchmark] or parser.error("--benchmark pairs needs --pairs")
    wild = args.benchmark == "llava-wild"
    if args.best_of & (args.best_of - 1) or args.best_of and not (args.truth or wild):
        parser.error("--best-of needs a power of 2 and --truth")
    if args.protocol == "official" and (args.benchmark != "vl-rewardbench" or args.votes > 1 or args.mean_probability):
        parser.error("--protocol official is for vl-rewardbench and takes votes of its own: no --votes, no --mean-probability")
    args.best_of = args.best_of or int(wild)
    args.image_root = str(Path(args.image_root or (args.pairs if Path(args.pairs).is_dir() else Path(args.pairs).parent)).resolve())
    return args


def main(args):
    run, official = Path(args.run), args.protocol == "official"
    for stage, names in (("01_preferences", ("model", "max_image_tokens")), ("02_critiques", ("style",))):
        if (run / stage / "meta.json").exists():  # a judge from the hub has no earlier stages
            ift.inherit(args, stage, names)
    if not args.model:
        stop(f"--model is needed: {run} holds no complete stage 01 to take it from")
    args.style = args.style or "critique"
    conditions = find_conditions(run)
    args.conditions = list(conditions)  # a newly trained judge is a reason to evaluate anew
    folder = start_stage(args, "05_evaluation" + f"_{args.benchmark}" * (args.benchmark != "pairs") + "_official" * official)
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    last = ([name for name in conditions if name.startswith("margin")] or list(conditions))[-1]
    inputs = [args.pairs] if Path(args.pairs).is_file() else []
    head = ["# Evaluation", "", f"`{args.pairs}`", "", NOTES.get(args.benchmark, "")]
    if args.benchmark == "llava-wild":
        lines, counts = answer_in_the_wild(last, conditions[last], folder, args)
        common.write_text(folder / "report.md", "\n".join([*head, *lines, ""]))
        return finish_stage(folder, args, counts, inputs, f"read {folder}/report.md")
    pairs, counts = read_benchmark(folder, args)
    by_id, sizes = {pair["id"]: pair for pair in pairs}, Counter(pair.get("category") for pair in pairs)
    if args.benchmark == "vl-rewardbench" and sizes != GROUPS:
        head += ["", f"Warning: {len(pairs)} rows, {dict(sizes)}; published are {sum(GROUPS.values())}, {GROUPS}."]
        print(head[-1])
    questions = [{**q, "category": pair.get("category")} for pair in pairs
                 for q in (official_questions(pair, args.seed) if official else both_orders(pair))]
    vocabulary = run / "01_preferences" / "vocabulary.json"
    vocabulary = json.loads(vocabulary.read_text()) if vocabulary.exists() else one.COCO_VOCABULARY
    truth = {row["image"]: {e["object"] for e in row["objects"]} for row in read_jsonl(args.truth, ("image", "objects"))} \
        if args.truth else {}
    print(f"{len(pairs)} pairs, {len(questions)} questions; judges: {', '.join(conditions)}; image withheld for {last}")

    # 2. judge ----------------------------------------------------------------------------------------------------
    writer, judged = RowWriter(folder / "judgements.jsonl"), {}
    for name, checkpoint in conditions.items():
        judge = *ift.load_judge(args, checkpoint), writer, args
        judged[name] = judge_condition(name, questions, *judge)
        for label, how in ((f"{name}, {how} image", how) for how in (args.withhold if name == last else ())):
            judged[label] = judge_condition(label, withheld(questions, how, args.image_root, args.seed), *judge)
        del judge  # two at a time would be one too many for the GPU

    # 3. measure --------------------------------------------------------------------------------------------------
    differences, expert, best_of, shorter = {}, {}, {}, {"shorter response": heuristic_rows(pairs)}
    if official:
        how = f"n = {len(pairs)} pairs, K calls each, each in a random order; undecided pairs (no majority) leave the accuracy."
        table = {name: official_scores(rows, by_id, 2) for name, rows in shorter.items()}  # of equal length: undecided
        table |= {f"{name}, K = {k}": official_scores(rows, by_id, k) for name, rows in judged.items() for k in (1, 3, 5, 7, 9)}
        table = {f"{name}, {m['unmatched'] + m['other']} undecided": m for name, m in table.items()}
    else:
        table = {name: measure(rows, by_id, vocabulary) for name, rows in {**shorter, **judged}.items()}
        n = f"{len(pairs)} pairs in both orders ({table[last]['n_hallucination']} with a hallucinated object)"
        how = f"n = {n}, {args.votes} vote(s) each; accuracy is the mean over orders, chance .5 (both orders: .25)."
        for name in (n for n in conditions if n != last):
            gain = [a - b for a, b in zip(right_per_pair(judged[last]).values(), right_per_pair(judged[name]).values())]
            differences[f"{last} - {name}"] = (float(np.mean(gain)), *cluster_bootstrap(gain, [pair["image"] for pair in pairs]))
    if truth and (made := run / "01_preferences" / "preferences.jsonl").exists():
        expert = expert_against_truth(read_jsonl(made), truth)
    if args.best_of:
        rows = list({pair["image"]: pair for pair in pairs if truth.get(pair["image"])}.values())[:args.best_of_images]
        rows = rows or stop(f"--truth {args.truth} holds no image of --pairs {args.pairs}: Best-of-N cannot be scored")
        picked = four.sample_and_pick(rows, {name: conditions[name] for name in ("base", last)}, folder, args)
        best_of = four.best_of_n_table(rows, *picked, truth, vocabulary)

    # 4. report ---------------------------------------------------------------------------------------------------
    lines = table_lines(table, best_of, differences, expert, how, PUBLISHED if args.benchmark == "vl-rewardbench" else {})
    lines += before_and_after(judged, ("base", last)) if last != "base" else []
    common.write_json(folder / "metrics.json", dict(table=table, differences=differences, expert=expert, best_of_n=best_of))
    common.write_text(folder / "report.md", "\n".join([*head, *lines, "", "![reliability](reliability.png)", ""]))
    print("\n".join(lines))
    if common.RANK == 0:
        draw_reliability({name: judged[name] for name in ("base", "after 03", last) if name in judged}, folder / "reliability.png")
    finish_stage(folder, args, counts | {"pairs": len(pairs), "judgements": len(writer.rows)}, inputs, f"read {folder}/report.md")


if __name__ == "__main__":
    main(parse_args())
