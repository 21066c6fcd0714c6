"""Every claim, measured on worlds where the truth is known.

    python tests/study.py headline --seeds 0 1     # some 25 minutes of a core a world
    python tests/study.py --table                  # all tables, from assets/results.jsonl alone

A study is a list of named settings, a setting a list of ordinary command lines on the world of one
seed. Settings share what they can: a world, its stages 01 to 03 and the samples of the first pool
are made once (the study "start"). What is finished is not repeated, so an interrupted study goes on
where it stopped. Each (study, setting, seed) becomes one line of assets/results.jsonl:

    {"study", "setting", "seed", "processor", "n": held-out pairs, "accuracies": {condition: share},
     "bootstrap": {condition: the same in 100 resamples of the images, in 1e-4}, "counts",
     "seconds", "commit"}

The resamples draw the same images for all conditions of a world, so that differences are paired.
The judgements themselves lie in --out.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import mean, median

import demo
import numpy as np
import scenes
import study_report

sys.path.insert(0, str(demo.ROOT))
import common  # noqa: E402
from common import read_json, read_jsonl, row_seed, write_json, write_jsonl  # noqa: E402

SCRIPTS = {
    "01": "01_build_preferences",
    "02": "02_generate_critiques",
    "03": "03_train_ift",
    "04": "04_rejection_sampling",
    "05": "05_evaluate",
}
FOLDERS = {"01": "01_preferences", "02": "02_critiques", "03": "03_ift", "04": "04_rejection"}
one, two, ift, four, five = (import_module(script) for script in SCRIPTS.values())

N_IMAGES = 3600  # enough pairs for four pools of 600
N_HELDOUT = 1000  # pairs
FLIPPED = 0.15  # share of a pool's labels that a study turns round
RESAMPLES = 100
FORKS = multiprocessing.get_context("forkserver")  # its children have the libraries at once
FORKS.set_forkserver_preload(["peft", *SCRIPTS.values()])


class Failed(Exception):
    """A command that ended with an error; its log says why."""


class Refused(Failed):
    """The builder's word that a seed gives no judge that stage 03 can train: a result, recorded."""


# ---- Rules that only a study needs ---------------------------------------------------------------
def margin_to_median(confidences, right):
    """As 04's margin, but c- is the median critique, not the worst of all. It is 0 or less where
    half of the critiques are as sure, so fewer pairs may be kept."""
    passing = [s for s, ok in zip(confidences, right, strict=True) if ok]
    return max(passing) - median(confidences) if passing else 0.0


def passes_sometimes(confidences, right):
    """1 where some critiques pass and others do not, else 0."""
    return float(0 < sum(right) < len(right))


def pairs_that_pass_sometimes(margins, eligible, threshold, retention, seed):
    """As many pairs as the margin would keep, at random among those with a pass rate in (0, 1)."""
    candidates = [key for key in eligible if margins[key] > 0]
    return four.select_random(candidates, round(retention * len(margins)), seed)


STUDY_RULES = {
    "median": (margin_to_median, four.pairs_by_margin, four.best_critique),
    "sometimes": (passes_sometimes, pairs_that_pass_sometimes, four.any_critique),
}


def by_verdict_alone(critique, complete, question, evidence, vocabulary, style):
    """In place of 02's reason_to_drop: the weak filter."""
    verdict = common.parse_verdict(critique)
    if not complete or verdict is None:
        return "malformed: unfinished, or no verdict line"
    return None if verdict == question["label"] else "wrong verdict"


# ---- Child processes: a command line, or a function that needs a model ---------------------------
def run_script(script, argv, log, filter_by):
    """One command line, in a process of its own; filter_by: "all" of 02's filters, or "verdict"."""
    redirect_output(log)
    four.RULES.update(STUDY_RULES)
    if filter_by == "verdict":
        two.reason_to_drop = by_verdict_alone
    stage = import_module(script)
    common.run(stage.main, stage.parse_args(argv))


def run_function(function, arguments, path, log):
    """Writes what the function returns to path."""
    redirect_output(log)
    write_json(path, {"returned": function(*arguments)})


def redirect_output(log):
    import torch

    torch.set_num_threads(1)  # matrices as small as these gain nothing from a second one
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


# ---- A world and its runs ------------------------------------------------------------------------
def beside(run, ending):
    return run.parent / f"{run.name}.{ending}"


def last_line(log):
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "no word"


class Lab:
    """The commands on the world of one seed."""

    def __init__(self, out, seed, device):
        self.seed, self.device = seed, device
        self.world = out / f"world{seed}"
        self.pictures = self.world / "pictures"
        self.folder = out / f"seed{seed}"
        self.base = self.folder / "base"
        self.locks = {name: threading.Lock() for name in ("world", "base", "weak", "wide")}

    def command(self, number, run, *flags, expert=None, filter_by="all"):
        """Stage `number` in the run; flags are added to the demo's."""
        control = ()
        if "--select" in flags:  # demo's line of a control names the same script
            control = ("random",)
        lines = demo.commands(self.world, self.pictures, run, self.seed, control, expert)
        line = [*lines[number], *flags]
        if "--detections" in flags:  # instead of an expert
            place = line.index("--expert")
            del line[place : place + 2]
        if self.device:
            line += ["--device", self.device]
        print(f"$ python {shlex.join(line)}", flush=True)
        script, log = SCRIPTS[number], beside(run, "log")
        self.finish(run_script, (script, line[1:], log, filter_by), log)

    def call(self, function, *arguments):
        """What the function returns, in a process of its own."""
        name = f"{function.__name__}-{threading.get_ident()}"
        path, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        self.finish(run_function, (function, arguments, path, log), log)
        return read_json(path)["returned"]

    def finish(self, target, arguments, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        process = FORKS.Process(target=target, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise Failed(f"{log}: {last_line(log)}")

    def build(self):
        """The world; its pictures come last, so where they are it is complete."""
        with self.locks["world"]:
            if (self.pictures / "truth.jsonl").exists():
                return
            shipped = read_json(demo.WORLD / "world.json")["seed"]
            if self.seed == shipped and not self.world.exists():  # the same build, to the bit
                half = self.world.with_name(f"{self.world.name}.half")
                shutil.rmtree(half, ignore_errors=True)
                shutil.copytree(demo.WORLD, half)
                half.rename(self.world)
            if not (self.world / "world.json").exists():
                line = ["tests/build_world.py", "--out", str(self.world), "--seed", str(self.seed)]
                log = self.world.with_suffix(".log")
                log.parent.mkdir(parents=True, exist_ok=True)
                if demo.start(line, log).wait():
                    last = last_line(log)
                    is_refused = last.startswith("error: no judge that stage 03 can train")
                    raise Refused(last) if is_refused else Failed(f"{log}: {last}")
            scenes.write_pictures(self.pictures, self.seed, N_IMAGES, N_HELDOUT)

    def make(self, name, *steps, source=None):
        """The run `name`, by (stage, *flags), of which 04 is the last, on copies of the source's
        earlier stages. The flags are added to the demo's."""
        run = self.folder / name
        with self.locks[name]:
            if not (run / "04_rejection" / "meta.json").exists():
                if source:
                    self.copy_stages(source, run, *("01", "02", "03")[: int(steps[0][0]) - 1])
                for number, *flags in steps:
                    self.command(number, run, *flags)
        return run

    def make_base(self):
        """Stages 01 to 03 and one iteration of 04 -> the run."""
        self.build()
        iteration = ("04", "--iterations", "1")
        return self.make("base", ("01",), ("02",), ("03",), iteration)

    def make_weak(self):
        """The same with a third of stage 03's steps -> the run."""
        iteration = ("04", "--iterations", "1")
        return self.make("weak", ("03", "--steps", "50"), iteration, source=self.make_base())

    def make_wide(self):
        """16 samples of each question of the first pool -> the run."""
        iteration = ("04", "--iterations", "1", "--samples", "16")
        return self.make("wide", iteration, source=self.make_base())

    def copy_stages(self, source, run, *numbers):
        """Copies of complete stages: a setting never changes those of another."""
        for number in numbers:
            name = FOLDERS[number]
            if not (run / name).exists():
                half = run / f"{name}.half"
                shutil.rmtree(half, ignore_errors=True)
                shutil.copytree(source / name, half)
                half.rename(run / name)

    def judge(self, run, source=None, conditions=(), flags=("--withhold",)):
        """{condition: judgement rows} of the run's judges, and 05's metrics. The rows of
        `conditions` are taken over from source, where the same judges have been judged."""
        folder = run / "05_evaluation"
        if source and not folder.exists():
            rows = read_jsonl(source / "05_evaluation" / "judgements.jsonl")
            folder.mkdir()
            shared = [row for row in rows if row["condition"] in conditions]
            write_jsonl(folder / "judgements.jsonl", shared)
        if not (folder / "meta.json").exists():
            self.command("05", run, *flags)
        judged = {}
        for row in read_jsonl(folder / "judgements.jsonl"):
            judged.setdefault(row["condition"], []).append(row)
        return judged, read_json(folder / "metrics.json")

    def judge_base(self):
        self.make_base()
        with self.locks["base"]:
            return self.judge(self.base)

    def truth(self):
        return five.read_truth(self.pictures / "truth.jsonl")


# ---- Runs that a study writes --------------------------------------------------------------------
def is_flipped(seed, pair_id):
    return random.Random(row_seed(seed, "flip", pair_id)).random() < FLIPPED


def swap_label(row):
    """The pair with the worse response called the better one."""
    other = {"chosen": "rejected", "rejected": "chosen", "both": "both"}
    evidence = [{**f, "claimed_by": other[f["claimed_by"]]} for f in row["evidence"]]
    texts = {"chosen": row["rejected"], "rejected": row["chosen"]}
    return {**row, **texts, "evidence": evidence}


def change_pairs(source, run, change, *stages):
    """Writes the source's pairs, by change(row) -> row or None to leave it out, into a run of
    copies; stages: those that then hold files which the study has changed, or read them."""
    name = Path("01_preferences") / "preferences.jsonl"
    rows = [change(row) for row in read_jsonl(source / name)]
    write_jsonl(run / name, [row for row in rows if row])
    stamp_anew(run, *stages)


def stamp_anew(run, *stages):
    """The meta.json of stages whose files the study has written: what lies there is meant."""
    for stage in stages:
        path = run / stage / "meta.json"
        meta = read_json(path)
        for kind in ("inputs", "outputs"):
            for name in meta[kind]:
                if (run / name).exists() and not Path(name).is_absolute():
                    meta[kind][name] = common.digest(run / name)
        write_json(path, meta)


def alter_pool(source, run, seed, findings, flipped):
    """In a run of copies: the pool without the expert's findings, or with flipped labels."""

    def change(row):
        if row["split"] != "pool":
            return row
        if flipped and is_flipped(seed, row["id"]):
            row = swap_label(row)
        return row if findings else {**row, "evidence": []}

    change_pairs(source, run, change, "01_preferences", "02_critiques", "03_ift")


def share_samples(source, run, rule, n=8, size=600):
    """Hands the first iteration the samples of the same pool by the same judge, as the run's own
    pairs, which a study may have altered, would have them: labels and filters are made anew."""
    here = run / ("04_rejection" if rule == "margin" else f"04_rejection_{rule}") / "iter1"
    if here.exists():
        return
    pool = {pair["id"]: pair for pair in common.read_preferences(run, "pool")[:size]}
    was = {pair["id"]: pair for pair in common.read_preferences(source, "pool")}
    vocabulary = one.read_vocabulary(run / "01_preferences" / "vocabulary.json")
    rows = []
    for row in read_jsonl(source / "04_rejection" / "iter1" / "samples.jsonl"):
        if row["pair_id"] in pool and int(row["id"].rsplit("-", 1)[1]) < n:
            rows.append(relabelled(row, pool[row["pair_id"]], was[row["pair_id"]], vocabulary))
    here.mkdir(parents=True)
    write_jsonl(here / "samples.jsonl", rows)


def relabelled(row, pair, was, vocabulary):
    """A sampled critique as one of the pair, which may have another label and other evidence."""
    if pair["chosen"] != was["chosen"]:
        order = "ba" if row["order"] == "ab" else "ab"  # the responses stay where they were
        name = row["id"].removeprefix(f"{row['pair_id']}-{row['order']}")
        row = {**row, "id": f"{row['pair_id']}-{order}{name}", "order": order}
        row["label"] = "B" if row["label"] == "A" else "A"
    complete = row["dropped"] != "malformed: unfinished, or no verdict line"
    reason = two.reason_to_drop(
        row["critique"], complete, row, pair["evidence"], vocabulary, row["style"]
    )
    return {**row, "dropped": reason}


# ---- What is measured besides the judges ---------------------------------------------------------
def false_facts(rows, truth):
    """Share of the rows' checks that the truth contradicts."""
    wrong = []
    for row in rows:
        for _, claim, supported in common.parse_checks(row["critique"]):
            if claim in scenes.KINDS:
                wrong.append(supported != (claim in truth[row["image"]]))
    return float(np.mean(wrong)) if wrong else None


def selection_counts(run, rule, truth, flipped_by=None):
    """What the first iteration kept: pairs, their margins, false facts and flipped labels."""
    name = "04_rejection" if rule == "margin" else f"04_rejection_{rule}"
    kept = read_jsonl(run / name / "iter1" / "kept.jsonl")
    samples = read_jsonl(run / name / "iter1" / "samples.jsonl")
    passing = [row for row in samples if row["dropped"] is None]
    counts = {"pairs kept": len({row["pair_id"] for row in kept})}
    counts["margin of the kept"] = mean(row["margin"] for row in kept)
    counts["false facts, kept"] = false_facts(kept, truth)
    counts["false facts, passing"] = false_facts(passing, truth)
    if flipped_by is not None:
        for kind, rows in (("kept", kept), ("passing", passing), ("pool", samples)):
            pairs = {row["pair_id"] for row in rows}
            flipped = [is_flipped(flipped_by, pair_id) for pair_id in pairs]
            counts[f"flipped, {kind}"] = float(np.mean(flipped))
    return counts


def captions(model_path, checkpoint, pictures, truth, device, n=300):
    """Shares of captions of n held-out pictures that name what is absent, greedy and sampled."""
    model, processor = common.load_judge(str(model_path), checkpoint, device)
    names = sorted(name for name in truth if name.startswith("heldout/"))[:n]
    requests = []
    for name in names:
        requests.append({"id": name, "image": pictures / name, "text": scenes.PROMPT})
    shares = {}
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        answers = common.sample(model, processor, requests, 1, temperature, 32)
        wrong = []
        for name, [answer] in zip(names, answers):
            said = set(answer["text"].strip().rstrip(".").split(", ")) & set(scenes.KINDS)
            wrong.append(bool(said - set(truth[name])))
        shares[f"captions hallucinate, {kind}"] = float(np.mean(wrong))
    return shares


def caption_counts(lab, run):
    checkpoint = common.find_checkpoint(run / "03_ift")
    truth = {name: sorted(objects) for name, objects in lab.truth().items()}
    arguments = (lab.world / "model", checkpoint, lab.pictures, truth, lab.device)
    return lab.call(captions, *arguments)


def expert_judgements(expert, pictures, heldout, folder):
    """The detector as judge: of each response its least sure object; the surer response wins, and
    equal ones count half. Rows as 05 writes them."""
    detector = one.load_expert(str(expert), one.FLOOR, common.pick_device("cpu"), None, None, None)
    vocabulary = one.build_vocabulary(detector.classes, one.SYNONYMS)
    questions = {pair["image"]: [] for pair in heldout}  # a detector is asked nothing
    path = folder / "expert_detections.jsonl"
    findings = one.find_objects(questions, detector, str(pictures), path)
    rows = []
    for pair in heldout:
        best = {}
        for found in findings[pair["image"]]["detections"]:
            best[found["object"]] = max(found["confidence"], best.get(found["object"], 0))
        sure = {}
        for side in ("chosen", "rejected"):
            named = one.find_mentions(pair[side], vocabulary)
            sure[side] = min((best.get(name, 0) for name in named), default=0)
        for order, label in (("ab", "A"), ("ba", "B")):
            first, second = ("chosen", "rejected") if label == "A" else ("rejected", "chosen")
            verdict = "A" if sure[first] >= sure[second] else "B"  # equal: right in one order
            row = {"id": pair["id"], "image": pair["image"], "order": order, "label": label}
            rows.append({**row, "verdict": verdict})
    return rows


def expert_counts(lab, run):
    """How often the expert is wrong, by the pairs whose findings the run holds."""
    rows = read_jsonl(run / "01_preferences" / "preferences.jsonl")
    measures = five.expert_against_truth([row for row in rows if row["evidence"]], lab.truth())
    return {f"expert: {name}": value for name, value in measures.items()}


# ---- The settings: each (lab, run) -> ({condition: judgement rows}, counts) ----------------------
STARTS = ("base", "after 03")  # judges that settings share


def start(lab, run):
    """The run that the others start from."""
    judged, metrics = lab.judge_base()
    counts = expert_counts(lab, lab.base)
    for judge in STARTS:
        counts[f"{judge}: checks right"] = metrics["table"][judge]["checks"]["balanced"]
        counts[f"{judge}: verdict follows"] = ift.share_following(judged[judge])[0]
    counts |= read_json(lab.base / "01_preferences" / "meta.json")["counts"]
    counts |= selection_counts(lab.base, "margin", lab.truth())
    return judged, counts


def headline(lab, run):
    """Margins against every control, four iterations."""
    lab.judge_base()
    lab.copy_stages(lab.base, run, "01", "02", "03", "04")
    lab.command("04", run, "--iterations", "4")
    for rule, iterations in (("random", 4), ("best", 2), ("continue", 4)):
        if rule != "continue":
            share_samples(lab.base, run, rule)
        lab.command("04", run, "--iterations", str(iterations), "--select", rule)
    judged, metrics = lab.judge(run, lab.base, (*STARTS, "margin, iteration 1"), ())
    heldout = read_jsonl(lab.pictures / "heldout.jsonl")
    detect = (lab.world / "expert.pt", lab.pictures, heldout, run)
    judged["expert"] = lab.call(expert_judgements, *detect)
    image_of = {pair["id"]: pair["image"] for pair in heldout}
    shorter = five.heuristic_rows(heldout)
    judged["shorter response"] = [{**row, "image": image_of[row["id"]]} for row in shorter]
    counts = {}
    for t in range(1, 5):
        done = read_json(run / "04_rejection" / f"iter{t}" / "done.json")["counts"]
        counts[f"kept of the pool, iteration {t}"] = done["pairs kept"] / done["pairs in the pool"]
        zero = done["pairs with margin 0"] / done["pairs in the pool"]
        counts[f"margin 0, iteration {t}"] = zero
    return judged, counts


def small_pools(lab, run):
    """Margins with pools of half the size."""
    lab.judge_base()
    lab.copy_stages(lab.base, run, "01", "02", "03")
    share_samples(lab.base, run, "margin", size=300)
    lab.command("04", run, "--iterations", "4", "--pool", "300")
    judged, _ = lab.judge(run, lab.base, STARTS)
    return judged, {}


def shuffled_labels(lab, run):
    """Trained on labels drawn by lot, without findings: must fall to chance."""
    lab.judge_base()
    lab.copy_stages(lab.base, run, "01")

    def change(row):
        if row["split"] != "train":
            return row
        if random.Random(row_seed(lab.seed, "shuffle", row["id"])).random() < 0.5:
            row = swap_label(row)
        return {**row, "evidence": []}

    change_pairs(lab.base, run, change, "01_preferences")
    lab.command("02", run)
    lab.command("03", run)
    judged, _ = lab.judge(run, lab.base, ("base",))
    return judged, {}


def select(lab, run, rule="margin", flags=(), findings=True, flipped=False, start="base", n=8):
    """One iteration of 04 by a rule."""
    source = {"base": lab.make_base, "weak": lab.make_weak, "wide": lab.make_wide}[start]()
    if start != "weak":
        lab.judge_base()
    lab.copy_stages(source, run, "01", "02", "03")
    if flipped or not findings:
        alter_pool(source, run, lab.seed, findings, flipped)
    share_samples(source, run, rule, n)
    lab.command("04", run, "--iterations", "1", "--select", rule, "--samples", str(n), *flags)
    if start == "weak":
        judged, _ = lab.judge(run, lab.base, ("base",))
    else:
        judged, _ = lab.judge(run, lab.base, STARTS)
    return judged, selection_counts(run, rule, lab.truth(), lab.seed if flipped else None)


def with_expert(lab, run, flags=(), expert=None, quality=None, findings=True):
    """Stages 01 to 03 with other findings; quality: of an expert made from the truth, as
    simulated_detections takes it; findings: does the judge learn from more than their labels?"""
    lab.judge_base()
    if quality:
        path = beside(run, "detections.jsonl")
        write_jsonl(path, simulated_detections(lab, *quality))
        flags = (*flags, "--detections", str(path))
    if expert or quality:  # neither says what there is to see
        flags = (*flags, "--vocabulary", str(lab.base / "01_preferences" / "vocabulary.json"))
    if not (run / "01_preferences").exists():
        (run / "01_preferences").mkdir(parents=True)
        names = (
            ["candidates.jsonl"] if expert or quality else ["candidates.jsonl", "detections.jsonl"]
        )
        for name in names:
            shutil.copy(lab.base / "01_preferences" / name, run / "01_preferences")
    lab.command("01", run, *flags, expert=expert)
    if not findings:
        change_pairs(run, run, without_findings, "01_preferences")
    lab.command("02", run)
    lab.command("03", run)
    judged, _ = lab.judge(run, lab.base, ("base",))
    return judged, expert_counts(lab, run)


def without_findings(row):
    """The row's label alone, if it is trained on."""
    return {**row, "evidence": []} if row["split"] == "train" else row


def simulated_detections(lab, precision, recall, confused=0):
    """Findings with errors. Drawn by lot: a present object is found with probability recall; absent
    ones, mostly near misses of what is there, are found so often that precision is as wanted. Or
    always the same: a share `confused` of the kinds is taken for the same shape in another colour.
    """
    n_confused = round(confused * len(scenes.KINDS))
    blind = random.Random(row_seed(lab.seed, "confused")).sample(scenes.KINDS, n_confused)
    rows = []
    for row in read_jsonl(lab.pictures / "truth.jsonl"):
        rng = np.random.default_rng([row_seed(lab.seed, "expert", row["image"])])
        present = [thing["object"] for thing in row["objects"]]
        found = []
        for thing in row["objects"]:
            kind = thing["object"]
            if rng.random() < recall:
                kind = other_colour(kind) if kind in blind else kind
                found.append({**thing, "object": kind, "confidence": 0.9})
        n_wrong = int(rng.poisson(len(present) * recall * (1 - precision) / precision))
        wrong = set()
        while len(wrong) < n_wrong:
            wrong.add(scenes.pick_absent(rng, rng.choice(present), present)[0])
        found += [{"object": kind, "confidence": 0.9, "box": None} for kind in sorted(wrong)]
        rows.append({"id": row["image"], "detections": found})
    return rows


def other_colour(kind):
    """The same shape in the next colour."""
    colours, (colour, shape) = [*scenes.COLOURS], kind.split()
    return f"{colours[(colours.index(colour) + 1) % len(colours)]} {shape}"


def untrained(lab, run):
    """The captions of the base model."""
    judged, _ = lab.judge_base()
    truth = {name: sorted(objects) for name, objects in lab.truth().items()}
    counts = lab.call(captions, lab.world / "model", None, lab.pictures, truth, lab.device)
    return {"base": judged["base"]}, counts


def trained(lab, run, style=None, flags=()):
    """Stage 03 with other flags, on the critiques of another style if one is named."""
    lab.judge_base()
    lab.copy_stages(lab.base, run, "01")
    if style:
        lab.command("02", run, "--style", style)
    else:
        lab.copy_stages(lab.base, run, "02")
    lab.command("03", run, *flags)
    if style:  # it also asks the base model for another kind of answer
        judged, metrics = lab.judge(run)
    else:
        judged, metrics = lab.judge(run, lab.base, ("base",))
    measures = metrics["table"]["after 03"]
    counts = {name: measures[name] for name in ("ece", "bradley_terry_loss", "unparseable")}
    counts |= caption_counts(lab, run)
    rows = read_jsonl(run / "02_critiques" / "critiques.jsonl")
    steps = read_json(run / "03_ift" / "meta.json")["args"]["steps"]
    words = [len(row["critique"].replace(":", " : ").split()) for row in rows]
    counts["critiques trained on"] = len(rows)
    counts["words of critiques trained on"] = round(32 * steps * mean(words))
    return judged, counts


def trained_with_bradley_terry(lab, run):
    """Stages 03 and 04 with --bt-weight 1: two iterations of margins, and of random pairs."""
    flags = ("--bt-weight", "1")
    lab.judge_base()
    lab.copy_stages(lab.base, run, "01", "02")
    lab.command("03", run, *flags)
    for rule in ("margin", "random"):
        if rule != "margin":
            share_samples(run, run, rule)
        lab.command("04", run, "--iterations", "2", "--select", rule, *flags)
    judged, _ = lab.judge(run, lab.base, ("base",))
    return judged, selection_counts(run, "margin", lab.truth())


def without(lab, run, component):
    """The method with one component off: 01 to 03 and one iteration of 04."""
    lab.judge_base()
    lam = ("--lam", "0") if component == "D_correct" else ()
    filter_by = "verdict" if component == "checks" else "all"
    if component == "expert":
        if not (run / "01_preferences").exists():
            (run / "01_preferences").mkdir(parents=True)
            shutil.copy(lab.base / "01_preferences" / "candidates.jsonl", run / "01_preferences")
        vocabulary = lab.base / "01_preferences" / "vocabulary.json"
        lab.command("01", run, "--vocabulary", str(vocabulary), expert="none")
    else:
        lab.copy_stages(lab.base, run, "01")
    if component == "D_correct":
        lab.copy_stages(lab.base, run, "02")
    lab.command("02", run, filter_by=filter_by)
    lab.command("03", run, *lam)
    lab.command("04", run, "--iterations", "1", *lam, filter_by=filter_by)
    judged, _ = lab.judge(run, lab.base, ("base",))
    counts = expert_counts(lab, run) | selection_counts(run, "margin", lab.truth())
    return judged, counts | caption_counts(lab, run)


# ---- A second distribution ----------------------------------------------------------------------
UNSEEN = ("red star", "green ring", "blue heart", "yellow cross", "purple circle", "red diamond")
UNSEEN = (*UNSEEN, "green triangle", "blue square")
STRANGE = scenes.Style(noise=30, jitter=45, smallest=5.5, largest=12.5)


def write_strange_pictures(folder, seed):
    """Held-out pairs with 4-6 objects of other sizes on lighter grounds, one of them at least of a
    kind that no training pair names."""
    rng = np.random.default_rng([seed, 7])
    (folder / "strange").mkdir(parents=True, exist_ok=True)
    pairs, truth, i = [], [], 0
    while len(pairs) < N_HELDOUT:
        kinds = scenes.sample_kinds(rng, int(rng.integers(3, 6)))
        new = str(rng.choice([kind for kind in UNSEEN if kind not in kinds]))
        scene = scenes.draw_scene(rng, [*kinds, new], STRANGE)
        light = np.clip(scene.picture.astype(int) + rng.integers(20, 50, 3), 0, 255)
        name = f"strange/{i:05d}.png"
        scenes.Image.fromarray(light.astype(np.uint8)).save(folder / name)
        truth.append({"image": name, "objects": scene.objects})
        for k in range(1 + i % 2):
            pairs.append(scenes.heldout_row(rng, f"strange-{i:05d}-{k}", **truth[-1]))
        i += 1
    write_jsonl(folder / "strange_truth.jsonl", truth)
    write_jsonl(folder / "strange.jsonl", pairs[:N_HELDOUT])


def transfer(lab, run):
    """Trained on pairs that name none of UNSEEN, judged on pictures of another kind."""
    lab.judge_base()
    if not (lab.pictures / "strange.jsonl").exists():
        write_strange_pictures(lab.pictures, lab.seed)
    lab.copy_stages(lab.base, run, "01")
    n_left = {"validation": 100, "train": 400, "pool": 10**6}

    def change(row):
        named = {found["object"] for found in row["evidence"]}
        if named & set(UNSEEN):
            return None
        split = next(name for name, n in n_left.items() if n > 0)
        n_left[split] -= 1
        return {**row, "split": split}

    change_pairs(lab.base, run, change, "01_preferences")
    size = len(common.read_preferences(run, "pool")) // 2
    lab.command("02", run)
    lab.command("03", run)
    lab.command("04", run, "--pool", str(min(size, 600)))
    lab.command("04", run, "--pool", str(min(size, 600)), "--select", "random")
    kept = run / "judged.json"
    if not kept.exists():
        ordinary, _ = lab.judge(run, lab.base, ("base",))
        write_json(kept, ordinary)
    ordinary, emptied = read_json(kept), run / "emptied"
    if not emptied.exists():
        shutil.rmtree(run / "05_evaluation")
        emptied.touch()
    strange = ("--pairs", str(lab.pictures / "strange.jsonl"))
    strange += ("--truth", str(lab.pictures / "truth.jsonl"), "--withhold", "blank")
    strange += ("--max-new-tokens", "256")  # up to 13 checks, which an ordinary critique has not
    judged, metrics = lab.judge(run, flags=strange)
    counts = {"pool": size}
    pairs = {pair["id"]: pair for pair in read_jsonl(lab.pictures / "strange.jsonl")}
    for name in ("base", "after 03", "margin, iteration 2"):
        measures = metrics["table"][name]
        counts[f"{name}, elsewhere: unparseable"] = measures["unparseable"]
        for rate in ("present_said_yes", "absent_said_no"):
            counts[f"{name}, elsewhere: {rate}"] = measures["checks"][rate]
        for part, share in strange_shares(judged[name], pairs).items():
            counts[f"{name}, elsewhere: right, {part}"] = share
    judged = {f"{name}, elsewhere": rows for name, rows in judged.items()}
    return {**ordinary, **judged}, counts


def strange_shares(rows, pairs):
    """What makes strange pairs hard: {part of them: share judged right}."""
    right = {}
    for row in rows:
        pair = pairs[row["id"]]
        n_claims = len(pair["chosen"].split(",")) + len(pair["rejected"].split(","))
        parts = ["up to 8 claims" if n_claims <= 8 else "more claims"]
        is_new = set(pair["hallucinated"]) & set(UNSEEN)
        parts.append("an unseen kind is absent" if is_new else "a seen kind is absent")
        for part in parts:
            right.setdefault(part, []).append(row["verdict"] == row["label"])
    return {part: mean(found) for part, found in right.items()}


# ---- Best-of-N and votes -------------------------------------------------------------------------
def best_of_n(model_path, checkpoints, pictures, truth, device, folder, n=16, n_images=200):
    """{picker: {N: share of the picks that name only what is there}}, N = 1, 2, ..., n."""
    names = sorted(name for name in truth if name.startswith("heldout/"))[:n_images]
    rows = [{"id": name, "image": name, "prompt": scenes.PROMPT} for name in names]
    load = partial(common.load_judge, str(model_path), device=device)
    sampling = {"max_new_tokens": 32, "batch_size": 256, "seed": 0}
    writer = common.RowWriter(folder / "candidates.jsonl")
    candidates = five.write_candidates(rows, load, writer, n, str(pictures), sampling)
    sizes = [2**k for k in range(n.bit_length())]
    judging = {"image_root": str(pictures), "style": "critique"}
    # two captions of 32 tokens hold up to 20 claims: their checks take more than the demo's 96
    judging |= {"max_new_tokens": 256, "batch_size": 256, "seed": 0}

    def quality(name, text):
        """(names nothing absent, share of what is there that it names)."""
        said = set(text.rstrip(".").split(", "))
        return not said - set(truth[name]), len(said & set(truth[name])) / len(truth[name])

    def shares(picks):
        return {str(size): [quality(name, picks[name][k]) for name in names] for k, size in sizes_k}

    sizes_k = list(enumerate(sizes))
    first = {name: [candidates[name][0]] * len(sizes) for name in names}
    longest = {name: [max(candidates[name][:s], key=len) for s in sizes] for name in names}
    oracle = {}
    for name in names:
        of_name = candidates[name]
        oracle[name] = [max(of_name[:s], key=lambda text: quality(name, text)) for s in sizes]
    picked = {"random": shares(first), "longest": shares(longest), "oracle": shares(oracle)}
    means = {}
    for picker, checkpoint in checkpoints.items():
        model, processor = load(checkpoint)
        path = folder / f"games_{picker.replace(' ', '_')}.jsonl"
        games = common.RowWriter(path, key=("condition", "question"))

        def judge(questions, model=model, processor=processor, writer=games, picker=picker):
            return ift.judge(model, processor, questions, writer, picker, **judging)

        picked[picker] = shares(five.best_of_n(rows, candidates, judge))
        undecided = [row["verdict"] is None for row in games.rows]
        means[f"best of {n}, {picker}: judgements without a verdict"] = mean(undecided)
        is_true = {}
        for name, texts in candidates.items():
            is_true[name] = [quality(name, text)[0] for text in texts]
        for round_, share in true_wins(games.rows, is_true).items():
            means[f"best of {n}, {picker}: a true caption wins, round {round_}"] = share
    for picker, by_size in picked.items():
        for size, values in by_size.items():
            true, recall = (float(np.mean(column)) for column in zip(*values))
            means[f"best of {size}, {picker}: names nothing absent"] = true
            means[f"best of {size}, {picker}: share of objects named"] = recall
    return means


def true_wins(judgements, is_true):
    """{round of the knockout: of its games between a true caption and one that names something
    absent, the share that the true one wins}. is_true: {picture: of each of its captions}."""
    for_first = Counter()  # P(the first wins), summed over both orders
    for row in judgements:
        p = row["probability_a"]
        for_first[row["id"]] += p if row["label"] == "A" else 1 - p
    wins = {}
    for game, p in for_first.items():  # "picture/3-5", as five.best_of_n names them
        name, _, places = game.rpartition("/")
        first, second = (int(place) for place in places.split("-"))
        if is_true[name][first] != is_true[name][second]:
            round_ = (first ^ second).bit_length()  # from the size of the subtree that holds both
            wins.setdefault(round_, []).append((p >= 1) == is_true[name][first])
    return {round_: mean(found) for round_, found in sorted(wins.items())}


def vote(model_path, checkpoint, pictures, heldout, device, sizes=(1, 3, 5, 9)):
    """{condition: judgement rows} of majorities of the first 1, 3, 5, 9 of nine critiques."""
    model, processor = common.load_judge(str(model_path), checkpoint, device)
    questions, requests = [], []
    for pair in heldout:
        questions += common.both_orders(pair)
    for q in questions:
        text = common.build_judge_prompt(q["prompt"], q["response_a"], q["response_b"])
        requests.append({"id": q["id"], "image": pictures / q["image"], "text": text})
    sampling = {"temperature": 1.0, "max_new_tokens": 96, "batch_size": 256}
    answers = common.sample(model, processor, requests, max(sizes), **sampling)
    judged = {}
    for size in sizes:
        rows = []
        for q, samples in zip(questions, answers):
            row = {name: q[name] for name in ("image", "order", "label")}
            row |= {"id": q["pair_id"], "verdict": ift.decide(samples[:size])[0]}
            rows.append(row)
        judged[f"votes {size}"] = rows
    return judged


def best(lab, run):
    """Best-of-N by the base judge, after 03 and after an iteration of margins; votes after 03."""
    lab.judge_base()
    run.mkdir(parents=True, exist_ok=True)
    trained_judge = common.find_checkpoint(lab.base / "03_ift")
    checkpoints = {"base": None, "after 03": trained_judge}
    checkpoints["margin 1"] = common.find_checkpoint(lab.base / "04_rejection" / "iter1")
    truth = {name: sorted(objects) for name, objects in lab.truth().items()}
    model = lab.world / "model"
    counts = lab.call(best_of_n, model, checkpoints, lab.pictures, truth, lab.device, run)
    heldout = read_jsonl(lab.pictures / "heldout.jsonl")
    return lab.call(vote, model, trained_judge, lab.pictures, heldout, lab.device), counts


# ---- The studies ---------------------------------------------------------------------------------
def selections():
    """{setting: function} of study 2."""
    settings = {}
    for start, rules, flips in (
        ("base", ("margin", "random", "best", "median"), (False, True)),
        ("weak", ("margin", "random"), (False,)),
    ):
        for findings in (True, False):
            for flipped in flips:
                for rule in rules:
                    names = ["findings" if findings else "no findings"]
                    names += ["flipped"] if flipped else []
                    names += ["weak start"] if start == "weak" else []
                    name = ", ".join([*names, rule])
                    known = {"findings": findings, "flipped": flipped, "start": start}
                    settings[name] = partial(select, rule=rule, **known)
    return settings


def retentions():
    settings = {}
    for share in ("0.1", "0.25", "0.4", "1.0"):
        settings[f"retention {share}"] = partial(select, flags=("--retention", share))
    for tau in ("0.1", "0.5", "0.9"):
        settings[f"tau {tau}"] = partial(select, flags=("--margin", tau))
    for n in (4, 8, 16):
        settings[f"N {n}"] = partial(select, start="wide", n=n)
    few = ("--retention", "0.1")
    settings["retention 0.1, random"] = partial(select, rule="random", flags=few)
    settings["pass rate in (0, 1)"] = partial(select, rule="sometimes")
    return settings


def experts():
    settings = {
        "YOLO": with_expert,
        "YOLO without a band": partial(with_expert, flags=("--present", ".25", "--absent", ".25")),
        "the policy's yes or no": partial(with_expert, expert="none"),
        "truth": partial(with_expert, quality=(1, 1)),
        "YOLO, labels alone": partial(with_expert, findings=False),
        "the policy, labels alone": partial(with_expert, expert="none", findings=False),
    }
    for share in (0.9, 0.7, 0.5):
        settings[f"precision {share}"] = partial(with_expert, quality=(share, 1))
        settings[f"recall {share}"] = partial(with_expert, quality=(1, share))
    for share in (0.1, 0.25, 0.5):
        name = f"{share:.0%} of the kinds always confused"
        settings[name] = partial(with_expert, quality=(1, 1, share))
    return settings


def trainings():
    settings = {"nothing trained": untrained, "critique, lambda 1/3": trained}
    for style in ("descriptive", "none"):
        settings[style] = partial(trained, style=style)
    for steps in ("30", "300"):
        settings[f"critique, {steps} steps"] = partial(trained, flags=("--steps", steps))
    settings["none, 300 steps"] = partial(trained, style="none", flags=("--steps", "300"))
    for lam in ("0", "0.1", "0.5", "1"):
        settings[f"lambda {lam}"] = partial(trained, flags=("--lam", lam))
    for weight in ("0.1", "1"):
        settings[f"Bradley-Terry {weight}"] = partial(trained, flags=("--bt-weight", weight))
    settings["Bradley-Terry 1, and 04"] = trained_with_bradley_terry
    return settings


STUDIES = {
    "start": {"the demo's flags": start},
    "headline": {"pools of 600": headline, "pools of 300": small_pools},
    "leak": {"shuffled labels": shuffled_labels},
    "margins": selections(),
    "retention": retentions(),
    "expert": experts(),
    "training": trainings(),
    "components": {
        f"without {name}": partial(without, component=name)
        for name in ("nothing", "expert", "checks", "D_correct")
    },
    "transfer": {"other pictures": transfer},
    "best": {"N and votes": best},
}


# ---- Running and recording -----------------------------------------------------------------------
def resampled(rows, seed):
    """(accuracy, [accuracy in RESAMPLES resamples of the images]) of judgement rows."""
    images = sorted({row["image"] for row in rows})
    place = {image: i for i, image in enumerate(images)}
    right, asked = np.zeros(len(images)), np.zeros(len(images))
    for row in rows:
        right[place[row["image"]]] += row["verdict"] == row["label"]
        asked[place[row["image"]]] += 1
    rng = np.random.default_rng(seed)  # the same images for all conditions of a world
    times = rng.multinomial(len(images), np.ones(len(images)) / len(images), size=RESAMPLES)
    accuracies = (times @ right) / (times @ asked)
    return right.sum() / asked.sum(), accuracies


def processor_name(device):
    """Of the GPU, or of the CPU with the vector instructions that torch uses."""
    import torch

    if common.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    model = "CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line for line in lines if "model name" in line), model).split(":")[-1].strip()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def run_setting(lab, study, setting, results, lock):
    """Runs a setting and appends its line, unless the line is there."""
    name = re.sub(r"[^\w.-]+", "_", f"{study}-{setting}")
    run, clock = lab.folder / name, time.time()
    failure = None
    try:
        judged, counts = STUDIES[study][setting](lab, run)
    except Refused as error:
        judged, counts, failure = {}, {}, str(error)
    except Failed as error:
        print(f"FAILED {study}, {setting}, seed {lab.seed}: {error}", flush=True)
        return False
    git = ["git", "-C", str(demo.ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    line = {"study": study, "setting": setting, "seed": lab.seed}
    line |= {"processor": processor_name(lab.device), "n": N_HELDOUT}
    accuracies, bootstrap = {}, {}
    for condition, rows in judged.items():
        accuracy, draws = resampled(rows, lab.seed)
        accuracies[condition] = round(float(accuracy), 4)
        bootstrap[condition] = [round(1e4 * value) for value in draws]
    line |= {"accuracies": accuracies, "bootstrap": bootstrap, "counts": rounded(counts)}
    if failure:
        line["failure"] = failure
    line |= {"seconds": round(time.time() - clock), "commit": commit}
    with lock, open(results, "a") as file:
        file.write(json.dumps(line) + "\n")
    shown = ", ".join(f"{name} {share:.3f}" for name, share in accuracies.items())
    print(f"{study}, {setting}, seed {lab.seed}, {line['seconds']} s: {shown}", flush=True)
    if judged:
        kept = lab.folder / "judgements"
        kept.mkdir(exist_ok=True)
        rows = []
        for condition, of_condition in judged.items():
            for row in of_condition:
                short = {key: value for key, value in row.items() if key != "critique"}
                rows.append({**short, "condition": condition})
        write_jsonl(kept / f"{name}.jsonl", rows)
        if study not in ("start", "headline"):
            shutil.rmtree(run, ignore_errors=True)
    return True


def rounded(counts):
    found = {}
    for name, value in counts.items():
        found[name] = round(value, 4) if isinstance(value, float) else value
    return found


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", help="only these of the study")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="worlds and runs")
    parser.add_argument("--parallel", type=int, default=2, help="settings worked on at a time")
    parser.add_argument("--device", help="of all commands; default: as the scripts choose")
    assets = demo.ROOT / "assets"
    parser.add_argument("--results", type=Path, default=assets / "results.jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing, print all tables")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="and draw the four pictures")
    args = parser.parse_args(argv)
    for study in args.studies:
        if study not in STUDIES:
            parser.error(f"no study {study!r}: one of {', '.join(STUDIES)}")
        for setting in args.settings or ():
            if setting not in STUDIES[study]:
                parser.error(f"no setting {setting!r} in {study}: {'; '.join(STUDIES[study])}")
    if not (args.studies or args.table or args.plot):
        parser.error("name a study, or --table")
    return args


def main(args):
    out = args.out.resolve()
    if args.studies:
        lines = study_report.read(args.results) if args.results.exists() else []
        here = processor_name(args.device)
        done = {(x["study"], x["setting"], x["seed"]) for x in lines if x["processor"] == here}
        labs = {seed: Lab(out, seed, args.device) for seed in args.seeds}
        jobs = []
        for study in args.studies:
            for seed in args.seeds:
                for setting in args.settings or STUDIES[study]:
                    if (study, setting, seed) not in done:
                        jobs.append((labs[seed], study, setting))
        lock = threading.Lock()
        with ThreadPoolExecutor(args.parallel) as pool:
            futures = [pool.submit(run_setting, *job, args.results, lock) for job in jobs]
            try:
                is_done = [future.result() for future in futures]
            except BaseException:  # Ctrl-C, a full disk: the settings at work end, no other begins
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if not all(is_done):
            sys.exit(f"error: {is_done.count(False)} of {len(is_done)} settings failed, see above")
    if args.table:
        print(study_report.tables(study_report.read(args.results)))
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        study_report.draw(study_report.read(args.results), args.plot)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(demo.ROOT)
    main(parse_args())
