"""Every claim, measured on worlds where the truth is known.

    python tests/study.py worth --seeds 0 1        # some 30 minutes of a core a world
    python tests/study.py --table                  # all tables, from assets/results.jsonl alone

A study is a list of named settings, a setting a list of ordinary command lines on the world of one
seed. What settings share is made once (the study "start"), what is finished is not repeated. Each
(study, setting, seed) becomes one line of assets/results.jsonl:

    {"study", "setting", "seed", "code", "commit", "processor", "n": held-out pairs,
     "accuracies": {condition: share}, "counts",
     "bootstrap": {condition: the same in 100 resamples of the images, in 1e-4}}

Rules of the tables (claims.tsv holds what is claimed), fixed beforehand, but for e)'s second half:
a) An interval is Student's t over worlds, 95 %; images are resampled for a single world alone.
b) A gain holds where its interval is above zero, "no effect" where it lies within +-.01; what
   neither holds nor is refuted is undecided. Below five worlds nothing holds: it points somewhere.
c) Worlds are of two kinds: 03 took where the verdict follows its checks in at least .85 after it,
   else it failed. Both are given.
d) Nothing is corrected for the number of claims; stars mark what survives Holm's correction.
e) No difference mixes processors, or codes that give other numbers; a code counts from five worlds.

The worlds are 0 1 2 4 5 6 7 8 and the first four of 9, 10, ... that the builder accepts; a refused
one is a line with a "failure" (to 12, 1001 to 1003: after four corrections, not eight). Those above
1000 are for the final check alone. The default of --bt-weight is the smallest of study "verdict" at
which every world's verdict follows its checks in at least .85, and neither ECE nor the gain of 04
is worse than at 0 by more than .01 in the mean; 0 where there is none.
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
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import mean

import demo
import numpy as np
import scenes
import study_report
import torch

sys.path.insert(0, str(demo.ROOT))
import common  # noqa: E402
from common import read_json, row_seed, write_json, write_jsonl  # noqa: E402

SCRIPTS = {path.name[:2]: path.stem for path in sorted(demo.ROOT.glob("0?_*.py"))}
FOLDERS = {"01": "01_preferences", "02": "02_critiques", "03": "03_ift", "04": "04_rejection"}
one, two, three, four, five = (import_module(script) for script in SCRIPTS.values())

N_IMAGES = 4000  # enough pairs for four pools of 600
N_HELDOUT = 1000  # pairs
FOUR = (0, 1, 7, 8, 10, 11)  # the first accepted on one processor: four iterations, not two
SAMPLES = "iter1/answers.jsonl"  # of 04's first iteration: the same, whatever is chosen from them
WEIGHTS = ("0", "0.1", "1", "0.03", "0.3")  # of the Bradley-Terry loss
CODE = 2  # 1 higher with each change of the code or the pictures that changes numbers
RESAMPLES = 100
FORKS = multiprocessing.get_context("forkserver")  # its children have the libraries at once
FORKS.set_forkserver_preload(["peft", *SCRIPTS.values()])


def read_jsonl(path):
    return common.read_rows(path, dict)


# ---- Rules that only a study needs ---------------------------------------------------------------
def by_verdict_alone(critique, complete, question, status, vocabulary, style):
    """In place of 02's reason_to_drop: the weak filter."""
    verdict, _ = common.find_verdict(critique)
    if not complete or verdict is None:
        return "malformed: unfinished, or no verdict line"
    return None if verdict == question["label"] else "wrong verdict"


# ---- Child processes: what a stage patches or loads ends with it ---------------------------------
def run_stage(script, argv, is_weak):
    """One command line; is_weak: with by_verdict_alone as 02's and 04's filter."""
    if is_weak:
        two.reason_to_drop = by_verdict_alone
    stage = import_module(script)
    common.run(stage.main, stage.parse_args(argv))


def in_child(function, arguments, path, log):
    torch.set_num_threads(1)  # matrices as small as these gain nothing from a second one
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    write_json(path, {"returned": function(*arguments)})


def call(run, function, *arguments):
    """What the function returns, in a process of its own; its words go to a log beside the run."""
    path, log = run.with_name(f"{run.name}.json"), run.with_name(f"{run.name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    process = FORKS.Process(target=in_child, args=(function, arguments, path, log))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"error: the end of {log} says what went wrong")
    return read_json(path)["returned"]


# ---- A world and its runs ------------------------------------------------------------------------
class Refused(Exception):
    """The builder finds no judge for this seed that stage 03 can train."""


class Lab:
    """The commands on the world of one seed."""

    def __init__(self, out, seed):
        self.seed, self.world, self.folder = seed, out / f"world{seed}", out / f"seed{seed}"
        self.pictures, self.base = self.world / "pictures", self.folder / "base"

    def command(self, number, run, *flags, expert=None, is_weak=False):
        """Stage `number` in the run; flags are added to the demo's."""
        lines = demo.commands(self.world, self.pictures, run, self.seed, (), expert)
        line = [*lines[number], *flags]
        print(f"$ python {shlex.join(line)}", flush=True)
        call(run, run_stage, SCRIPTS[number], line[1:], is_weak)

    def build(self):
        """The world; its pictures come last, so where they are it is complete."""
        if (self.pictures / "truth.jsonl").exists():
            return
        if self.seed == read_json(demo.WORLD / "world.json")["seed"]:  # the same build, to the bit
            give(demo.WORLD, self.world, "model", "expert.pt", "world.json")
        elif not (self.world / "world.json").exists():
            line = ["tests/build_world.py", "--out", str(self.world), "--seed", str(self.seed)]
            log = self.world.with_suffix(".log")
            log.parent.mkdir(parents=True, exist_ok=True)
            if demo.start(line, log).wait():
                reason = log.read_text().splitlines()[-1]
                if "Try another --seed" in reason:
                    raise Refused(reason)
                sys.exit(f"error: no world, the end of {log} says why")
        scenes.write_pictures(self.pictures, self.seed, N_IMAGES, N_HELDOUT)

    def make_base(self):
        """Stages 01 to 03, one iteration of 04, and 05: what the settings start from."""
        self.build()
        if not (self.base / "05_evaluation" / "meta.json").exists():
            for number in ("01", "02", "03"):
                self.command(number, self.base)
            self.command("04", self.base, "--iterations", "1")
            self.command("05", self.base, "--withhold")

    def judge(self, run, *flags):
        """{condition: judgement rows} of the run's judges, and 05's metrics; what the base run has
        answered is handed on."""
        if run != self.base:
            give(self.base, run, "05_evaluation/answers.jsonl")
        self.command("05", run, *(flags or ["--withhold"]))
        judged = {}
        for row in read_jsonl(run / "05_evaluation" / "judgements.jsonl"):
            judged.setdefault(row["condition"], []).append(row)
        return judged, read_json(run / "05_evaluation" / "metrics.json")

    def truth(self):
        """{image: sorted names of its objects}."""
        rows = read_jsonl(self.pictures / "truth.jsonl")
        return {row["image"]: sorted({thing["object"] for thing in row["objects"]}) for row in rows}


# ---- Runs that a study writes: a setting never changes those of another --------------------------
def give(source, run, *names):
    """Copies of the source's files or folders, where the run has none."""
    for name in names:
        if not (run / name).exists():
            half = run / f"{name}.half"
            half.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(half, ignore_errors=True)
            copy = shutil.copytree if (source / name).is_dir() else shutil.copy
            copy(source / name, half)
            half.rename(run / name)


def copy_stages(source, run, *numbers):
    give(source, run, *(FOLDERS[number] for number in numbers))


def folder_of(run, rule):
    return run / ("04_rejection" if rule == "margin" else f"04_rejection_{rule}")


def forget_findings(run):
    """Leaves of the run's pairs to train on the expert's label alone."""
    path = run / "01_preferences" / "preferences.jsonl"
    rows = read_jsonl(path)
    for row in rows:
        if row["split"] == "train":
            row["evidence"] = []
    write_jsonl(path, rows)


# ---- What is measured besides the judges ---------------------------------------------------------
def false_facts(rows, truth):
    """Share of the rows' checks that the truth contradicts."""
    wrong = []
    for row in rows:
        for _, claim, supported in common.parse_checks(row["critique"]):
            if claim in scenes.KINDS:
                wrong.append(supported != (claim in truth[row["image"]]))
    return float(np.mean(wrong)) if wrong else None


def selection_counts(run, rule, truth):
    """What the first iteration kept: pairs, their margins, false facts."""
    folder = folder_of(run, rule) / "iter1"
    kept, samples = read_jsonl(folder / "kept.jsonl"), read_jsonl(folder / "samples.jsonl")
    passing = [row for row in samples if row["dropped"] is None]
    counts = {"pairs kept": len({row["pair_id"] for row in kept})}
    counts["margin of the kept"] = mean(row["margin"] for row in kept)
    for kind, rows in (("kept", kept), ("passing", passing), ("pool", samples)):
        counts[f"false facts, {kind}"] = false_facts(rows, truth)
    return counts


def expert_against_truth(rows, truth):
    """Counts: shares of stage 01's findings and of its labels that the truth contradicts, pairs.

    rows: preferences with evidence, truth: {image: names of its objects}."""
    findings, labels = [], []
    for row in rows:
        objects = truth[row["image"]]
        sure = [finding for finding in row["evidence"] if finding["status"] != "unsure"]
        findings += [(f["status"] == "present") != (f["object"] in objects) for f in sure]
        # A label is right where the rejected response alone names what is not there.
        inventors = {f["claimed_by"] for f in row["evidence"] if f["object"] not in objects}
        labels.append(inventors != {"rejected"})
    counts = {"expert: findings_contradicted": float(np.mean(findings))}
    return counts | {"expert: labels_wrong": float(np.mean(labels)), "expert: n_pairs": len(rows)}


def expert_counts(lab, run):
    """How often the expert is wrong, by the pairs whose findings the run holds."""
    rows = read_jsonl(run / "01_preferences" / "preferences.jsonl")
    return expert_against_truth([row for row in rows if row["evidence"]], lab.truth())


# ---- The settings: each (lab, run) -> ({condition: judgement rows}, counts) ----------------------
def start(lab, run):
    """The run that the others start from."""
    judged, metrics = lab.judge(lab.base)
    counts = expert_counts(lab, lab.base)
    for judge in ("base", "after 03"):
        counts[f"{judge}: checks right"] = metrics["table"][judge]["balanced"]
        counts[f"{judge}: verdict follows"] = three.verdict_follows(judged[judge])[0]
    return judged, counts


def headline(lab, run):
    """Margins against every control: four iterations on some worlds, two on the others."""
    n = 4 if lab.seed in FOUR else 2
    copy_stages(lab.base, run, "01", "02", "03", "04")
    for rule in ("margin", "random", "best", "continue"):
        give(folder_of(lab.base, "margin"), folder_of(run, rule), SAMPLES)
        lab.command("04", run, "--iterations", str(n), "--select", rule)
    return lab.judge(run, "--withhold", "blank", "other")[0], {}


def select(lab, run, rule="margin", retention=None):
    """One iteration of 04 by a rule, from the base run's judge and samples, for three epochs of
    what it keeps: of all that pass, without a retention."""
    copy_stages(lab.base, run, "01", "02", "03")
    counts = proportionate(lab, retention)
    steps = str(counts["steps"])
    if (rule, retention, steps) == ("margin", "0.4", "60"):  # as the base run was trained
        copy_stages(lab.base, run, "04")
    give(folder_of(lab.base, "margin"), folder_of(run, rule), SAMPLES)
    how = ("--retention", retention) if retention else ("--margin", "0")
    lab.command("04", run, "--iterations", "1", "--select", rule, "--steps", steps, *how)
    counts |= selection_counts(run, rule, lab.truth())
    return lab.judge(run)[0], counts


def proportionate(lab, retention):
    """Counts: steps of three epochs, at least 15, on what margins keep of the base run's first
    pool; its pairs with a passing critique in both orders, all of which are kept without a
    retention."""
    samples = read_jsonl(folder_of(lab.base, "margin") / "iter1" / "samples.jsonl")
    of_pool, defaults = margins_of(samples), four.parse_args([])
    kept = everything = four.choose(*of_pool, "margin", 0, None, 0, 1)
    if retention:
        kept = four.choose(*of_pool, "margin", None, float(retention), 0, 1)
    rows = four.mix_in(kept, three.read_critiques(lab.base), defaults.replay, 0)
    steps = max(15, round(3 * len(rows) / defaults.train_batch))
    return {"steps": steps, "pairs eligible": len(everything) // 2}


def margins_of(samples):
    """What 04's margins_of_pairs says of these samples."""
    pair_ids = sorted({row["pair_id"] for row in samples})
    return four.margins_of_pairs(pair_ids, four.critiques_by_question(samples))


def margin_reliability(samples):
    """Correlation of pairs' margins by every other critique with those by the rest, over the pairs
    that have both; None where there are fewer than three."""
    halves = [margins_of(samples[start::2])[0] for start in (0, 1)]
    pairs = [key for key in halves[0] if halves[0][key] > 0 and halves[1].get(key, 0) > 0]
    if len(pairs) < 3:
        return None
    columns = [[half[key] for key in pairs] for half in halves]
    return float(np.corrcoef(columns)[0, 1])


def dpo_loss(gap, reference, beta=0.1):
    """-log sigmoid(beta (gap - reference)) of each question (B,), in nats; gaps: log-likelihood of
    c+ minus that of c- (B,), in nats, by the judge and by the one it started from."""
    return -torch.nn.functional.logsigmoid(beta * (gap - reference))


def gaps(model, processor, rows, image_root):
    """Log-likelihood of each row's "response" minus that of its "worst", (B,) in nats."""
    sums = []
    for name in ("response", "worst"):
        texts, critiques = [row["text"] for row in rows], [row[name] for row in rows]
        images = [image_root / row["image"] for row in rows]
        encoded = three.encode_supervised(processor, texts, images, critiques)
        logits, labels = three.forward(model, *encoded)  # (B,R+1,V), (B,R+1)
        chances, wanted = logits[:, :-1].log_softmax(2), labels[:, 1:, None]
        of_token = chances.gather(2, wanted.clamp(min=0))[:, :, 0]  # (B,R)
        sums.append((of_token * (wanted[:, :, 0] != -100)).sum(1))
    return sums[0] - sums[1]


def train_by_contrast(lab, run, rule, steps=60, lr=3e-5, size=32):
    """DPO from the judge after 03 on c+ and c- of the questions that SFT gets at 40 %, where they
    are two texts -> their number. lr is the best of 1e-5, 3e-5, 1e-4, 3e-4 and 1e-3 for world 0's
    held-out pairs: a choice that SFT was not given."""
    samples = read_jsonl(folder_of(lab.base, "margin") / "iter1" / "samples.jsonl")
    kept = four.choose(*margins_of(samples), rule, None, 0.4, lab.seed, 1)
    questions, rows = four.critiques_by_question(samples), three.training_rows(kept)["critique"]
    for row, old in zip(rows, kept, strict=True):
        critiques = questions[old["pair_id"], old["order"]]
        row["worst"] = min(critiques, key=lambda x: x["confidence_in_label"])["critique"]
    rows = [row for row in rows if row["worst"] != row["response"]]
    checkpoint = three.find_checkpoint(lab.base / "03_ift")
    judge = common.load_judge(f"{lab.world}/model", checkpoint, trainable=True)
    with torch.no_grad():
        for row in rows:
            row["reference"] = gaps(*judge, [row], lab.pictures).item()
    weights = [weight for weight in judge[0].parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    lines = []
    for step in range(steps):
        batch = three.rows_of_step(rows, step, size, lab.seed)
        reference = torch.tensor([row["reference"] for row in batch])
        loss = dpo_loss(gaps(*judge, batch, lab.pictures), reference).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = three.learning_rate(step, steps, lr)
        optimizer.step()
        optimizer.zero_grad()
        lines.append({"step": step + 1, "loss": loss.item()})
    folder = run / f"03_ift_{rule}"
    judge[0].save_pretrained(folder / "adapter")
    write_jsonl(folder / "metrics.jsonl", lines)
    made_with = {"tag": rule, "style": "critique", "steps": steps, "train_batch": size}
    made_with["counts"] = {"trained on, critiques": len(rows)}
    write_json(folder / "adapter" / "made_with.json", made_with)
    return len(rows)


def contrast(lab, run):
    """DPO instead of SFT, on c+ of what margins and of random pairs."""
    copy_stages(lab.base, run, "01", "02", "03")
    counts = {}
    for rule in ("margin", "best"):
        counts[f"{rule}: questions"] = call(run, train_by_contrast, lab, run, rule)
    return lab.judge(run)[0], counts


def weighted(lab, run, weight):
    """Stage 03 and one iteration of 04 with a loss on the verdict itself."""
    copy_stages(lab.base, run, "01", "02")
    if float(weight) == 0:
        copy_stages(lab.base, run, "03", "04")
    else:
        lab.command("03", run, "--bt-weight", weight)
        lab.command("04", run, "--bt-weight", weight, "--iterations", "1")
    judged, metrics = lab.judge(run, "--withhold", "blank")
    counts = {}
    for judge in ("after 03", "margin, iteration 1"):
        measures = metrics["table"][judge]
        counts[f"{judge}: verdict follows"] = three.verdict_follows(judged[judge])[0]
        for name in ("ece", "bradley_terry_loss", "unparseable"):
            counts[f"{judge}: {name}"] = measures[name]
    samples = read_jsonl(folder_of(run, "margin") / "iter1" / "samples.jsonl")
    counts["reliability of margins"] = margin_reliability(samples)
    return judged, counts | selection_counts(run, "margin", lab.truth())


def with_expert(lab, run, expert=None, quality=None, findings=True):
    """Stages 01 to 03 with other findings; quality: of an expert made from the truth, as
    simulated_detections takes it; findings: does the judge learn from more than their labels?"""
    flags = ()
    if quality:
        path = run.with_name(f"{run.name}.detections.jsonl")
        write_jsonl(path, simulated_detections(lab, *quality))
        flags = ("--detections", str(path))
    if expert or quality:  # neither says what there is to see
        flags = (*flags, "--vocabulary", str(lab.base / "01_preferences" / "vocabulary.json"))
    copy_stages(lab.base, run, "01")
    lab.command("01", run, *flags, expert=expert)
    if not findings:
        forget_findings(run)
    for number in ("02", "03"):
        lab.command(number, run)
    return lab.judge(run)[0], expert_counts(lab, run)


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
            kind = other_colour(kind) if kind in blind else kind
            if rng.random() < recall:
                found.append({**thing, "object": kind, "confidence": 0.9})
        n_wrong = int(rng.poisson(len(present) * recall * (1 - precision) / precision))
        wrong = set()
        while len(wrong) < n_wrong:
            wrong.add(scenes.pick_absent(rng, rng.choice(present), present)[0])
        found += [{"object": kind, "confidence": 0.9, "box": None} for kind in sorted(wrong)]
        rows.append({"image": row["image"], "detections": found})
    return rows


def other_colour(kind):
    colours, (colour, shape) = [*scenes.COLOURS], kind.split()
    return f"{colours[(colours.index(colour) + 1) % len(colours)]} {shape}"


def trained(lab, run, style="critique", flags=()):
    """Stage 03 with other flags, on critiques of this style."""
    copy_stages(lab.base, run, "01", "02")
    lab.command("02", run, "--style", style)
    lab.command("03", run, *flags)
    return lab.judge(run)[0], {}


def without_checks(lab, run):
    """Stages 02 to 04, one iteration, with the verdict alone as filter."""
    copy_stages(lab.base, run, "01", "02")
    lab.command("02", run, is_weak=True)
    lab.command("03", run)
    lab.command("04", run, "--iterations", "1", is_weak=True)
    return lab.judge(run)[0], selection_counts(run, "margin", lab.truth())


# ---- A second distribution ----------------------------------------------------------------------
UNSEEN = ("red star", "green ring", "blue heart", "yellow cross", "purple circle", "red diamond")
UNSEEN += ("green triangle", "blue square")
STRANGE = scenes.Style(noise=30, jitter=45, smallest=5.5, largest=12.5)


def strange_scene(rng):
    """4-6 objects of other sizes on a lighter ground, one of them at least of a kind that no
    training pair names."""
    kinds = scenes.sample_kinds(rng, int(rng.integers(3, 6)))
    new = str(rng.choice([kind for kind in UNSEEN if kind not in kinds]))
    scene = scenes.draw_scene(rng, [*kinds, new], STRANGE)
    light = np.clip(scene.picture.astype(int) + rng.integers(20, 50, 3), 0, 255)
    return scene._replace(picture=light.astype(np.uint8))


def scene_of_known(rng, most):
    """2 to `most` objects, of no kind in UNSEEN."""
    n, kinds = int(rng.integers(2, most + 1)), UNSEEN
    while set(kinds) & set(UNSEEN):
        kinds = scenes.sample_kinds(rng, n)
    return scenes.draw_scene(rng, kinds, scenes.USER)


def true_pairs(folder, name, seed, draw):
    """N_HELDOUT pairs, 1.5 a picture, of the scenes that draw(rng) makes; made once."""
    path, rng = folder / f"{name}.jsonl", np.random.default_rng(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    pairs, i = [], 0
    while not path.exists():  # it is written last
        scene, image = draw(rng), f"{name}/{i:05d}.png"
        scenes.Image.fromarray(scene.picture).save(folder / image)
        for k in range(1 + i % 2):
            how = {"is_shorter": len(pairs) % 2 == 0, "image": image, "objects": scene.objects}
            pairs.append(scenes.fair_row(rng, rng, row_id=f"{name}-{i:05d}-{k}", **how))
        i += 1
        if len(pairs) >= N_HELDOUT:
            write_jsonl(path, pairs[:N_HELDOUT])
    return path


def transfer(lab, run, most=None):
    """Trained on pairs that name none of UNSEEN, judged on pictures of another kind. most: trained
    without 04 on true pairs of pictures with 2 to so many objects."""
    strange = true_pairs(lab.pictures, "strange", [lab.seed, 7], strange_scene)
    copy_stages(lab.base, run, "01")
    name = Path("01_preferences") / "preferences.jsonl"
    source = lab.base / name
    if most:
        draw = partial(scene_of_known, most=most)
        source = true_pairs(lab.pictures, f"known{most}", [lab.seed, most], draw)
    rows = read_jsonl(source)
    rows = [row for row in rows if not any(x["object"] in UNSEEN for x in row["evidence"])]
    sizes = {"validation": 100, "train": 400, "pool": len(rows)}
    write_jsonl(run / name, one.assign_splits(rows, sizes, lab.seed))
    longest = ("--max-new-tokens", "256")  # up to 13 checks, which an ordinary critique has not
    lab.command("02", run, *(longest if most else ()))
    lab.command("03", run)
    if not most:
        size = str(min(len(common.read_preferences(run, "pool")) // 2, 600))
        lab.command("04", run, "--pool", size)
        lab.command("04", run, "--pool", size, "--select", "random")
    ordinary, _ = lab.judge(run)
    judged, metrics = lab.judge(run, "--pairs", str(strange), "--withhold", "blank", *longest)
    counts = {"critiques trained on": len(three.read_critiques(run))}
    for name in [x for x in ("base", "after 03", "margin, iteration 2") if x in judged]:
        for rate in ("unparseable", "present_said_yes", "absent_said_no"):
            counts[f"{name}, elsewhere: {rate}"] = metrics["table"][name][rate]
    claims = {row["id"]: row["chosen"] + row["rejected"] for row in read_jsonl(strange)}
    for name, rows in list(judged.items()):
        for size, of_size in (("up to 8 claims", range(9)), ("more claims", range(9, 99))):
            fits = [row for row in rows if claims[row["id"]].count(",") + 2 in of_size]
            judged[f"{name}, {size}"] = fits
    judged = {f"{name}, elsewhere": rows for name, rows in judged.items()}
    return {**ordinary, **judged}, counts


# ---- Best-of-N -----------------------------------------------------------------------------------
def quality(text, objects):
    """(names nothing absent, share of the objects that it names)."""
    said = set(text.rstrip(".").split(", "))
    return not said - set(objects), len(said & set(objects)) / len(objects)


def best_of_n(lab, checkpoints, folder, n=8, n_images=200):
    """Counts of the picks among the first 1, 2, 4, ..., n captions of each picture by the judges
    {name: checkpoint}, and by others: shares that name nothing absent, of objects named."""
    truth, path = lab.truth(), folder / "answers.jsonl"
    names = sorted(name for name in truth if name.startswith("heldout/"))[:n_images]
    load = partial(common.Judge, f"{lab.world}/model")
    asking = {"image_root": str(lab.pictures), "batch_size": 256, "seed": 0}
    rows = [{"id": x, "image": x, "prompt": scenes.PROMPT, "text": scenes.PROMPT} for x in names]
    how = {"n": n, "temperature": 1.0, "max_new_tokens": 32}
    questions, qualities = [], []
    for row, answers in zip(rows, common.ask(path, load(), rows, "captions", **how, **asking)):
        texts = [answer["text"].strip() for answer in answers]
        questions += five.games(row, texts)
        qualities.append([quality(text, truth[row["id"]]) for text in texts])
    qualities = np.array(qualities)  # (pictures, n, 2)
    by_truth = qualities @ [2, 1]  # a caption with something absent is worse than all without
    sizes, picks = [2**k for k in range(n.bit_length())], {}
    for size in sizes:
        picks["random", size] = np.zeros(len(names), int)
        picks["oracle", size] = by_truth[:, :size].argmax(1)
    for judge, checkpoint in checkpoints.items():
        # two captions of 32 tokens hold up to 20 claims: their checks take more than the demo's 96
        how = {"style": "critique", "max_new_tokens": 256}
        judged = three.judge_pairs(path, load(checkpoint), questions, judge, **how, **asking)
        probability_a = np.reshape([row["probability_a"] for row in judged], (len(names), -1))
        matrices = [five.preference_matrix(n, of_picture) for of_picture in probability_a]
        for size in sizes:
            rates = [five.win_rates(matrix, size) for matrix in matrices]
            picks[judge, size] = np.argmax(rates, 1)
    counts = {}
    for (picker, size), pick in picks.items():
        true, recall = qualities[range(len(names)), pick].mean(0).tolist()
        counts[f"best of {size}, {picker}: names nothing absent"] = true
        counts[f"best of {size}, {picker}: share of objects named"] = recall
    return counts


def best(lab, run):
    """Best-of-N by the base judge, after 03 and after an iteration of margins."""
    run.mkdir(parents=True, exist_ok=True)
    checkpoints = {"base": None, "after 03": three.find_checkpoint(lab.base / "03_ift")}
    checkpoints["margin 1"] = three.find_checkpoint(lab.base / "04_rejection" / "iter1")
    return lab.judge(lab.base)[0], call(run, best_of_n, lab, checkpoints, run)


# ---- The studies ---------------------------------------------------------------------------------
def worths():
    settings = {}
    for part in ("0.4", "0.1", "0.2", "0.05"):
        for rule in ("margin", "low", "random", "best"):
            settings[f"{rule} {part}"] = partial(select, rule=rule, retention=part)
    return {**settings, "all that pass": select}


def experts():
    settings = {
        "YOLO": with_expert,
        "the policy's yes or no": partial(with_expert, expert="none"),
        "truth": partial(with_expert, quality=(1, 1)),
        "YOLO, labels alone": partial(with_expert, findings=False),
        "the policy, labels alone": partial(with_expert, expert="none", findings=False),
    }
    for part in (0.9, 0.7, 0.5):
        settings[f"precision {part}"] = partial(with_expert, quality=(part, 1))
        settings[f"recall {part}"] = partial(with_expert, quality=(1, part))
    for part in (0.1, 0.25, 0.5):
        name = f"{part:.0%} of the kinds always confused"
        settings[name] = partial(with_expert, quality=(1, 1, part))
    return settings


def trainings():
    settings = {"critique, lambda 1/3": trained}
    settings |= {style: partial(trained, style=style) for style in ("descriptive", "none")}
    settings["none, 1300 steps"] = partial(trained, style="none", flags=("--steps", "1300"))
    for name, flag, values in (
        ("critique, {} steps", "--steps", ("30", "300")),
        ("lambda {}", "--lam", ("0", "0.1", "0.5", "1")),
    ):
        settings |= {name.format(x): partial(trained, flags=(flag, x)) for x in values}
    return settings


STUDIES = {
    "start": {"the demo's flags": start},
    "headline": {"pools of 600": headline},
    "worth": worths(),
    "contrast": {"DPO": contrast},
    "verdict": {f"weight {x}": partial(weighted, weight=x) for x in WEIGHTS},
    "expert": experts(),
    "training": trainings(),
    "components": {"without checks": without_checks},
    "transfer": {
        "other pictures": transfer,
        "trained on 2 to 4 objects": partial(transfer, most=4),
        "trained on 2 to 6 objects": partial(transfer, most=6),
    },
    "best": {"Best-of-N": best},
}


# ---- Running and recording -----------------------------------------------------------------------
def resampled(rows, seed):
    """(accuracy, [accuracy in RESAMPLES resamples of the images]) of judgement rows."""
    images = sorted({row["image"] for row in rows})
    of_row = np.searchsorted(images, [row["image"] for row in rows])
    asked = np.bincount(of_row)
    right = np.bincount(of_row, [row["verdict"] == row["label"] for row in rows])
    rng = np.random.default_rng(seed)  # the same images for all conditions of a world
    times = rng.multinomial(len(images), np.ones(len(images)) / len(images), size=RESAMPLES)
    accuracies = (times @ right) / (times @ asked)
    return right.sum() / asked.sum(), accuracies


def processor_name():
    """Of the GPU, or of the CPU with the vector instructions that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"


def commit_of(folder):
    """The short name of a working copy's commit."""
    line = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def record(results, judged, counts, **line):
    """Appends a line to the results. judged: {condition: judgement rows}."""
    line |= {"code": CODE, "commit": commit_of(demo.ROOT), "processor": processor_name()}
    line |= {"n": N_HELDOUT, "accuracies": {}, "bootstrap": {}, "counts": {}}
    for condition, rows in judged.items():
        accuracy, draws = resampled(rows, line["seed"])
        line["accuracies"][condition] = round(float(accuracy), 4)
        line["bootstrap"][condition] = [round(1e4 * value) for value in draws]
    for count, value in counts.items():
        line["counts"][count] = round(value, 4) if isinstance(value, float) else value
    with open(results, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(line["study"], line["setting"], line["seed"], line["accuracies"], flush=True)


def run_setting(lab, study, setting, results):
    """Runs a setting and appends its line."""
    name = re.sub(r"[^\w.-]+", "_", f"{study}-{setting}")
    judged, counts = STUDIES[study][setting](lab, lab.folder / name)
    record(results, judged, counts, study=study, setting=setting, seed=lab.seed)


def run_world(lab, studies, wanted, results):
    """The studies' settings on one world, those of `wanted` if any are named, but for what the
    results have. A world that the builder refuses is a line with a "failure", and no more."""
    lines = map(json.loads, results.open()) if results.exists() else []
    here = (lab.seed, CODE, processor_name())
    names = ("seed", "code", "processor")
    lines = [line for line in lines if tuple(line.get(name) for name in names) == here]
    done = {(line["study"], line["setting"]) for line in lines}
    if any("failure" in line for line in lines):
        return
    try:
        lab.make_base()
    except Refused as refused:
        study, setting = study_report.START
        about = {"study": study, "setting": setting, "seed": lab.seed}
        record(results, {}, {}, **about, failure=str(refused))
        return
    for study in studies:
        for setting in wanted or STUDIES[study]:
            if setting in STUDIES[study] and (study, setting) not in done:
                run_setting(lab, study, setting, results)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", help="of these studies (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="worlds and runs")
    parser.add_argument("--results", type=Path, default=demo.ROOT / "assets" / "results.jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing, print all tables")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="and draw the four pictures")
    return parser.parse_args(argv)


def main(args):
    for seed in args.seeds if args.studies else ():
        lab = Lab(args.out.resolve(), seed)
        run_world(lab, args.studies, args.settings, args.results)
    if args.table:
        final = study_report.read(args.results, is_final=True)
        print(study_report.tables(study_report.read(args.results), final))
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        study_report.draw(study_report.read(args.results), args.plot)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.chdir(demo.ROOT)
    main(parse_args())
