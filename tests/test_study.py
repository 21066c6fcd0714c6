"""The study's own rules, runs that it writes, intervals and tables."""

import json
import random

import numpy as np
import pytest
import scenes
import study
import study_report
from conftest import ROOT

import common


# ---- Rules ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "confidences, right, to_median, sometimes",
    [
        ([0.9, 0.8, 0.1], [True, True, False], 0.1, 1.0),
        ([0.9, 0.8, 0.1], [False, True, False], 0.0, 1.0),
        ([0.9, 0.8], [False, False], 0.0, 0.0),
        ([0.6, 0.8], [True, True], 0.1, 0.0),
    ],
)
def test_rules_of_a_question(confidences, right, to_median, sometimes):
    assert study.margin_to_median(confidences, right) == pytest.approx(to_median)
    assert study.passes_sometimes(confidences, right) == sometimes


def test_pairs_that_pass_sometimes():
    margins = {f"p{i}": float(i % 2) for i in range(20)}
    eligible = [f"p{i}" for i in range(2, 20)]
    kept = study.pairs_that_pass_sometimes(margins, eligible, None, 0.25, seed=3)
    assert len(set(kept)) == 5
    assert all(margins[key] == 1 and key in eligible for key in kept)
    assert kept != study.pairs_that_pass_sometimes(margins, eligible, None, 0.25, seed=4)


def test_the_verdict_alone_lets_false_checks_pass():
    question = {"label": "B", "response_a": "red star.", "response_b": "red ring.", "prompt": ""}
    critique = "A: red star: yes\nB: red ring: no\nVerdict: B"
    assert study.by_verdict_alone(critique, True, question, [], {}, "critique") is None
    assert study.by_verdict_alone(critique, False, question, [], {}, "critique")
    assert study.by_verdict_alone(critique[:-1] + "A", True, question, [], {}, "critique")


# ---- Runs that a study writes --------------------------------------------------------------------
PAIR = {
    "id": "p-0",
    "image": "0.png",
    "prompt": "What?",
    "chosen": "red star.",
    "rejected": "red ring.",
    "split": "pool",
    "evidence": [
        {"object": "red star", "claimed_by": "chosen", "status": "present"},
        {"object": "red ring", "claimed_by": "rejected", "status": "absent"},
    ],
}
VOCABULARY = {"red star": "red star", "red ring": "red ring"}


def samples_of(pair):
    """A right critique in both orders, as 04 keeps them."""
    rows = []
    for question in common.both_orders(pair):
        a = "yes" if question["label"] == "A" else "no"
        b = "no" if question["label"] == "A" else "yes"
        lines = [f"A: {question['response_a'][:-1]}: {a}", f"B: {question['response_b'][:-1]}: {b}"]
        critique = "\n".join([*lines, f"Verdict: {question['label']}"])
        row = {**question, "id": f"{question['id']}-3", "critique": critique, "style": "critique"}
        rows.append({**row, "verdict": question["label"], "log_odds": 1.0, "dropped": None})
    return rows


def test_samples_of_a_flipped_pair_are_those_of_its_other_order():
    flipped = study.swap_label(PAIR)
    assert (flipped["chosen"], flipped["rejected"]) == (PAIR["rejected"], PAIR["chosen"])
    assert study.swap_label(flipped) == PAIR
    questions = {q["id"]: q for q in common.both_orders(flipped)}
    for row in samples_of(PAIR):
        new = study.relabelled(row, {**flipped, "evidence": []}, PAIR, VOCABULARY)
        asked = questions[new["id"].removesuffix("-3")]
        for name in ("order", "response_a", "response_b", "label"):
            assert new[name] == asked[name]
        assert new["critique"] == row["critique"]
        assert new["dropped"] == "wrong verdict"  # by the flipped label
        back = study.relabelled(new, PAIR, flipped, VOCABULARY)
        assert back == row


def test_evidence_decides_anew_what_passes():
    [row, _] = samples_of(PAIR)
    false = {**row, "critique": row["critique"].replace("star: yes", "star: no")}
    evidence = [{**f, "status": "present"} for f in PAIR["evidence"]]
    changed = {**PAIR, "evidence": evidence}
    assert study.relabelled(false, PAIR, PAIR, VOCABULARY)["dropped"]
    assert study.relabelled(row, PAIR, PAIR, VOCABULARY)["dropped"] is None
    assert study.relabelled(row, changed, PAIR, VOCABULARY)["dropped"] == "contradicts the expert"


def test_a_rewritten_run_is_taken_for_what_it_says(tmp_path):
    """Later stages refuse pairs that were changed by hand, but for those of change_pairs."""
    folder = tmp_path / "run" / "01_preferences"
    folder.mkdir(parents=True)
    path = folder / "preferences.jsonl"
    common.write_jsonl(path, [PAIR, {**PAIR, "id": "q-0"}])
    name = "01_preferences/preferences.jsonl"
    outputs = {name: common.digest(path)}
    common.write_json(folder / "meta.json", {"args": {}, "inputs": {}, "outputs": outputs})
    common.write_jsonl(path, [PAIR])
    with pytest.raises(common.Stop, match="has changed"):
        common.digests([folder / "meta.json"], tmp_path / "run")

    def change(row):
        return None if row["id"] == "q-0" else {**row, "evidence": []}

    common.write_jsonl(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, "id": "q-0"}])
    (tmp_path / "source" / "01_preferences").mkdir(parents=True)
    (tmp_path / "pairs.jsonl").rename(tmp_path / "source" / name)
    for _ in range(2):  # as an interrupted study does
        study.change_pairs(tmp_path / "source", tmp_path / "run", change, "01_preferences")
    common.digests([folder / "meta.json"], tmp_path / "run")
    assert [row["evidence"] for row in common.read_jsonl(path)] == [[]]


def test_flips_are_by_lot_and_of_the_row():
    flips = [study.is_flipped(0, f"p{i}") for i in range(4000)]
    assert np.mean(flips) == pytest.approx(study.FLIPPED, abs=0.02)
    assert flips != [study.is_flipped(1, f"p{i}") for i in range(4000)]


# ---- Experts with errors -------------------------------------------------------------------------
def lab_with_truth(folder):
    """1,500 pictures of three objects each."""
    lab = study.Lab(folder, seed=0, device="cpu")
    lab.pictures.mkdir(parents=True)
    rng = np.random.default_rng(1)
    truth = []
    for i in range(1500):
        kinds = scenes.sample_kinds(rng, 3)
        objects = [{"object": kind, "box": [0, 0, 1, 1]} for kind in kinds]
        truth.append({"image": f"{i}.png", "objects": objects})
    common.write_jsonl(lab.pictures / "truth.jsonl", truth)
    return lab, truth


@pytest.mark.parametrize("precision, recall", [(1, 1), (0.5, 1), (1, 0.5)])
def test_experts_err_by_lot_as_often_as_is_said(tmp_path, precision, recall):
    lab, truth = lab_with_truth(tmp_path)
    right = found = present = 0
    for row, said in zip(truth, study.simulated_detections(lab, precision, recall)):
        names = {thing["object"] for thing in said["detections"]}
        there = {thing["object"] for thing in row["objects"]}
        right, found, present = right + len(names & there), found + len(names), present + len(there)
    assert right / found == pytest.approx(precision, abs=0.03)
    assert right / present == pytest.approx(recall, abs=0.03)


def test_an_expert_that_is_confused_errs_always_alike(tmp_path):
    lab, truth = lab_with_truth(tmp_path)
    taken_for = {}
    for row, said in zip(truth, study.simulated_detections(lab, 1, 1, 0.25)):
        for thing, found in zip(row["objects"], said["detections"], strict=True):
            taken_for.setdefault(thing["object"], set()).add(found["object"])
    assert all(len(names) == 1 for names in taken_for.values())
    wrong = {kind: name for kind, [name] in taken_for.items() if kind != name}
    assert len(wrong) == 10
    for kind, name in wrong.items():
        assert kind.split()[1] == name.split()[1]


# ---- Intervals and tables ------------------------------------------------------------------------
def judged(rights):
    """Judgement rows of images with 1 or 2 pairs; rights: {image: "10", ...}, one per row."""
    rows = []
    for image, marks in rights.items():
        rows += [{"image": image, "label": "A", "verdict": "A" if m == "1" else "B"} for m in marks]
    return rows


def test_resamples_draw_the_same_images_for_all_conditions():
    rng = random.Random(0)
    rights = {f"{i:03d}": rng.choice(["11", "10", "00", "1100"]) for i in range(200)}
    mean, draws = study.resampled(judged(rights), seed=5)
    marks = "".join(rights.values())
    assert mean == pytest.approx(marks.count("1") / len(marks))
    assert len(draws) == study.RESAMPLES
    mirrored = {image: m.translate(str.maketrans("01", "10")) for image, m in rights.items()}
    other, its_draws = study.resampled(judged(mirrored), seed=5)
    assert draws + its_draws == pytest.approx(np.ones(study.RESAMPLES))  # image by image
    clusters = [image for image, m in rights.items() for _ in m]
    values = [float(m == "1") for m in marks]
    low, high = study.five.cluster_bootstrap(values, clusters)
    assert np.percentile(draws, [2.5, 97.5]) == pytest.approx([low, high], abs=0.015)


def test_intervals_are_over_worlds_and_images():
    still = {seed: (value, np.full(100, value)) for seed, value in ((0, 0.4), (1, 0.6))}
    assert study_report.interval(still) == pytest.approx((0.4, 0.6))  # both draws of one world
    one = {0: (0.5, np.linspace(0.4, 0.6, 100))}
    assert study_report.interval(one) == pytest.approx((0.405, 0.595), abs=0.003)
    rng = np.random.default_rng(0)
    many = {
        seed: (v, v + rng.normal(0, 0.02, 100)) for seed, v in enumerate(rng.normal(0, 0.03, 50))
    }
    low, high = study_report.interval(many)
    error = np.hypot(0.03, 0.02) / 50**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.25)


def test_differences_are_taken_within_worlds():
    a = {0: (0.9, np.array([0.8, 1.0])), 1: (0.7, np.array([0.7, 0.7]))}
    b = {0: (0.8, np.array([0.7, 0.9])), 2: (0.1, np.array([0.1, 0.1]))}
    [(value, draws)] = study_report.minus(a, b).values()
    assert (value, draws.tolist()) == (pytest.approx(0.1), pytest.approx([0.1, 0.1]))


TITLES = {
    "start": "world",
    "headline": "1. headline",
    "margins": "2. margins",
    "retention": "3. retention",
    "expert": "4. expert",
    "training": "5. training",
    "components": "6. components",
    "transfer": "7. transfer",
    "best": "8. votes",
    "leak": "leak checks",
}


def test_every_study_has_its_table(capsys):
    """As anyone gets it, from the file alone."""
    assert TITLES.keys() == study.STUDIES.keys()
    study.main(study.parse_args(["--table"]))
    printed = capsys.readouterr().out
    measured = {line["study"] for line in study_report.read(ROOT / "assets/results.jsonl")}
    for name in measured:
        assert f"| {TITLES[name]}" in printed


def test_recorded_lines_are_whole():
    lines = [json.loads(x) for x in (ROOT / "assets/results.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["setting"] in study.STUDIES[line["study"]]
        assert line["accuracies"].keys() == line["bootstrap"].keys()
        assert line["accuracies"] or line["failure"]
        for name, accuracy in line["accuracies"].items():
            draws = line["bootstrap"][name]
            assert len(draws) == study.RESAMPLES
            assert np.mean(draws) / 1e4 == pytest.approx(accuracy, abs=0.01)


def test_pictures_are_drawn(tmp_path):
    study_report.draw(study_report.read(ROOT / "assets/results.jsonl"), tmp_path)
    for name in ("iterations.png", "expert_error.png", "flipped.png", "best_of_n.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < 150_000


def test_what_is_unseen_is_of_the_world():
    assert set(study.UNSEEN) < set(scenes.KINDS)


def test_strange_pairs_are_told_apart():
    pairs = {
        "few": {
            "chosen": "a, b, c, d",
            "rejected": "a, b, c, red star",
            "hallucinated": ["red star"],
        },
        "many": {"chosen": "a, b, c, d", "rejected": "a, b, c, d, e", "hallucinated": ["e"]},
    }
    rows = [{"id": "few", "verdict": "A", "label": "A"}, {"id": "few", "verdict": "A"}]
    rows += [{"id": "many", "verdict": "B", "label": "A"}]
    rows[1]["label"] = "B"
    shares = study.strange_shares(rows, pairs)
    few, many = ("up to 8 claims", "an unseen kind is absent"), ("more claims",)
    assert shares == dict.fromkeys(few, 0.5) | dict.fromkeys((*many, "a seen kind is absent"), 0)


def test_wins_are_counted_by_the_round_of_the_knockout():
    is_true = {"x/y.png": [True, False, False, True]}
    rows = []
    for game, p_first in (("0-1", 0.9), ("2-3", 0.7), ("0-2", 0.2)):
        rows.append({"id": f"x/y.png/{game}", "label": "A", "probability_a": p_first})
        rows.append({"id": f"x/y.png/{game}", "label": "B", "probability_a": 1 - p_first})
    assert study.true_wins(rows, is_true) == {1: 0.5, 2: 0}
