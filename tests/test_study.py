"""The study's own rules, runs that it writes, intervals and tables."""

import random

import numpy as np
import pytest
import scenes
import study
import study_report
from conftest import ROOT

import common


# ---- Rules ---------------------------------------------------------------------------------------
def test_rules_of_a_question():
    for confidences, passes, to_median, sometimes in (
        ([0.9, 0.8, 0.1], [1, 1, 0], 0.1, 1),
        ([0.9, 0.8, 0.1], [0, 1, 0], 0, 1),
        ([0.9, 0.8], [0, 0], 0, 0),
        ([0.6, 0.8], [1, 1], 0.1, 0),
    ):
        assert study.margin_to_median(confidences, passes) == pytest.approx(to_median)
        assert study.passes_sometimes(confidences, passes) == sometimes


def test_pairs_that_pass_sometimes():
    """As many as the margin would keep; of each question any critique that passes."""
    margins = {f"p{i}": float(i % 2) for i in range(20)}
    passing = {}
    for key in margins:
        passing |= {(key, order): [{"pair_id": key, "id": key}] for order in ("ab", "ba")}
    kept = study.choose_sometimes(margins, passing, "margin", None, 0.25, 3, 1)
    assert len(kept) == 10 and len({row["id"] for row in kept}) == 5
    assert all(margins[row["pair_id"]] == 1 for row in kept)
    assert kept != study.choose_sometimes(margins, passing, "margin", None, 0.25, 4, 1)


def test_the_verdict_alone_lets_false_checks_pass():
    question = {"label": "B", "response_a": "red star.", "response_b": "red ring.", "prompt": ""}
    critique = "A: red star: yes\nB: red ring: no\nVerdict: B"
    assert study.by_verdict_alone(critique, True, question, {}, {}, "critique") is None
    assert study.by_verdict_alone(critique, False, question, {}, {}, "critique")
    assert study.by_verdict_alone(critique[:-1] + "A", True, question, {}, {}, "critique")


# ---- Runs that a study writes --------------------------------------------------------------------
CLAIMS = ("chosen", "rejected", "both")
FOUND = (("red star", "present"), ("red ring", "absent"), ("blue star", "unsure"))
EVIDENCE = [{"object": x, "status": s, "claimed_by": c} for (x, s), c in zip(FOUND, CLAIMS)]
PAIR = {"id": "p-0", "image": "0.png", "prompt": "What?", "split": "pool", "evidence": EVIDENCE}
PAIR |= {"chosen": "red star.", "rejected": "red ring."}


def test_an_altered_pool_leaves_the_source_and_the_other_splits(tmp_path):
    name, source, run = "01_preferences/preferences.jsonl", tmp_path / "source", tmp_path / "run"
    (source / "01_preferences").mkdir(parents=True)
    rows = [{**PAIR, "id": f"p{i}", "split": ("pool", "train")[i % 2]} for i in range(2000)]
    common.write_jsonl(source / name, rows)
    study.give(source, run, "01_preferences")
    study.relabel(source, run, "pool", 0, "flip", findings=True)
    assert study.read_jsonl(source / name) == rows
    found = study.read_jsonl(run / name)
    turned = [row for row, old in zip(found, rows, strict=True) if row != old]
    assert len(turned) / 1000 == pytest.approx(study.TURNED["flip"], abs=0.04)
    for row in turned:
        assert (row["chosen"], row["rejected"]) == (PAIR["rejected"], PAIR["chosen"])
        assert [x["claimed_by"] for x in row["evidence"]] == ["rejected", "chosen", "both"]
        assert row["split"] == "pool" and study.is_turned(0, "flip", row["id"])
    study.relabel(source, run, "pool", 0)
    for row, old in zip(study.read_jsonl(run / name), rows, strict=True):
        assert row == (old if old["split"] == "train" else {**old, "evidence": []})


def test_the_expert_is_held_against_the_truth():
    truth = {"0.png": ["red star", "blue star"]}
    absent = {**EVIDENCE[0], "status": "absent"}  # wrong: it is there
    rows = [PAIR, {**PAIR, "evidence": [absent, *EVIDENCE[1:]]}]
    flipped = study.swap_label(PAIR)
    contradicted, wrong, n = study.expert_against_truth([*rows, flipped], truth).values()
    assert contradicted == pytest.approx(1 / 6)  # what is unsure says nothing
    assert wrong == pytest.approx(1 / 3) and n == 3


# ---- Experts with errors -------------------------------------------------------------------------
@pytest.fixture
def lab(tmp_path):
    """With the truth of 1,500 pictures of three objects each."""
    lab = study.Lab(tmp_path, seed=0)
    lab.pictures.mkdir(parents=True)
    rng, truth = np.random.default_rng(1), []
    for i in range(1500):
        objects = [{"object": kind, "box": [0, 0, 1, 1]} for kind in scenes.sample_kinds(rng, 3)]
        truth.append({"image": f"{i}.png", "objects": objects})
    common.write_jsonl(lab.pictures / "truth.jsonl", truth)
    return lab


@pytest.mark.parametrize("precision, recall", [(1, 1), (0.5, 1), (1, 0.5)])
def test_experts_err_by_lot_as_often_as_is_said(lab, precision, recall):
    right, found, truth = 0, 0, lab.truth()
    for said in study.simulated_detections(lab, precision, recall):
        names = {thing["object"] for thing in said["detections"]}
        right, found = right + len(names & set(truth[said["image"]])), found + len(names)
    assert right / found == pytest.approx(precision, abs=0.03)
    assert right / (3 * len(truth)) == pytest.approx(recall, abs=0.03)


def test_an_expert_that_is_confused_errs_always_alike(lab):
    pairs, truth = set(), study.read_jsonl(lab.pictures / "truth.jsonl")
    for row, said in zip(truth, study.simulated_detections(lab, 1, 1, 0.25)):
        for thing, found in zip(row["objects"], said["detections"], strict=True):
            pairs.add((thing["object"], found["object"]))
    wrong = [(kind.split(), name.split()) for kind, name in pairs if kind != name]
    assert len(pairs) == 40 and len(wrong) == 10
    assert all(kind[1] == name[1] for kind, name in wrong)


# ---- Intervals and tables ------------------------------------------------------------------------
def test_resamples_draw_the_same_images_for_all_conditions():
    rng, rows = random.Random(0), []
    for i in range(200):
        marks = rng.choice(["11", "10", "00", "1100"])  # right or wrong, pairs of one image
        rows += [{"image": f"{i:03d}", "label": "1", "verdict": mark} for mark in marks]
    mean, draws = study.resampled(rows, seed=5)
    values = [float(row["verdict"]) for row in rows]
    assert mean == pytest.approx(np.mean(values))
    other, its_draws = study.resampled([{**row, "label": "0"} for row in rows], seed=5)
    assert draws + its_draws == pytest.approx(np.ones(study.RESAMPLES))  # image by image
    low, high = study.five.cluster_bootstrap(values, [row["image"] for row in rows])
    assert np.percentile(draws, [2.5, 97.5]) == pytest.approx([low, high], abs=0.015)


def test_intervals_are_over_worlds_and_images():
    one = {0: (0.5, np.linspace(0.4, 0.6, 100))}
    assert study_report.interval(one) == pytest.approx((0.405, 0.595), abs=0.003)
    rng, many = np.random.default_rng(0), {}
    for seed, value in enumerate(rng.normal(0, 0.03, 50)):
        many[seed] = (value, value + rng.normal(0, 0.02, 100))
    low, high = study_report.interval(many)
    error = np.hypot(0.03, 0.02) / 50**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.25)


def test_differences_are_taken_within_worlds():
    a = {0: (0.9, np.array([0.8, 1.0])), 1: (0.7, np.array([0.7, 0.7]))}
    b = {0: (0.8, np.array([0.7, 0.9])), 2: (0.1, np.array([0.1, 0.1]))}
    [(value, draws)] = study_report.minus(a, b).values()
    assert (value, draws.tolist()) == (pytest.approx(0.1), pytest.approx([0.1, 0.1]))


def test_every_study_has_its_table(capsys):
    """As anyone gets it, from the file alone."""
    study.main(study.parse_args(["--table"]))
    printed = capsys.readouterr().out
    titles = {"start": "| world", "best": "| 8. votes", "leak": "| leak checks"}
    for name in study.STUDIES:
        assert titles.get(name, f". {name} ") in printed or f". {name}:" in printed


def test_recorded_lines_are_whole():
    for line in study_report.read(ROOT / "assets/results.jsonl"):
        assert line["setting"] in study.STUDIES[line["study"]]
        assert line["accuracies"].keys() == line["bootstrap"].keys()
        assert line["accuracies"] or line["failure"]
        for name, accuracy in line["accuracies"].items():
            draws = line["bootstrap"][name]
            assert len(draws) == study.RESAMPLES
            assert np.mean(draws) / 1e4 == pytest.approx(accuracy, abs=0.01)


def test_pictures_are_drawn(tmp_path):
    study_report.draw(study_report.read(ROOT / "assets/results.jsonl"), tmp_path)
    assert all(5_000 < path.stat().st_size < 150_000 for path in tmp_path.iterdir())


def test_the_quality_of_a_caption():
    assert study.quality("red star.", ["red star", "red ring"]) == (True, 0.5)
    assert study.quality("blue star, red ring.", ["red star", "red ring"]) == (False, 0.5)
