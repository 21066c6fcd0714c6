"""The study's own rules, runs that it writes, intervals and tables."""

import math
import random

import numpy as np
import pytest
import scenes
import study
import study_report
import torch
from conftest import ROOT, encode, judged_rows

import common


# ---- Rules ---------------------------------------------------------------------------------------
def test_the_verdict_alone_lets_false_checks_pass():
    question = {"label": "B", "response_a": "red star.", "response_b": "red ring.", "prompt": ""}
    critique = "A: red star: yes\nB: red ring: no\nVerdict: B"
    assert study.by_verdict_alone(critique, True, question, {}, {}, "critique") is None
    assert study.by_verdict_alone(critique, False, question, {}, {}, "critique")
    assert study.by_verdict_alone(critique[:-1] + "A", True, question, {}, {}, "critique")


def sample(pair_id, order, k, log_odds):
    row = {"pair_id": pair_id, "order": order, "label": "A", "dropped": None}
    return {**row, "id": f"{pair_id}-{order}-{k}", "log_odds": log_odds}


def test_margins_of_halves():
    """Every other critique says the same margins of three pairs, or the opposite ones."""
    for second, wanted in (((3, 2, 1), 1), ((1, 2, 3), -1)):
        samples = []
        for i, (size, its_other) in enumerate(zip((3, 2, 1), second)):
            for order in ("ab", "ba"):
                odds = (0, 0, size, its_other)  # two of each half
                samples += [sample(f"p{i}", order, k, r) for k, r in enumerate(odds)]
        assert study.margin_reliability(samples) == pytest.approx(wanted, abs=0.1)
    assert study.margin_reliability(samples[:8]) is None


def test_training_goes_by_the_rows_that_are_kept(tmp_path, monkeypatch):
    """Of 240 pairs 200 are eligible, 10 of them with margin 0; a fourth of the rows is replay."""
    lab, samples = study.Lab(tmp_path, 0), []
    for i in range(240):
        for order in ("ab", "ba"):
            rows = [sample(f"p{i:03d}", order, k, r) for k, r in enumerate((3, 2 + (i < 50)))]
            samples += [{**row, "dropped": "wrong verdict" if i < 40 else None} for row in rows]
    folder = lab.base / "04_rejection" / "iter1"
    folder.mkdir(parents=True)
    common.write_jsonl(folder / "samples.jsonl", samples)
    old = [{"id": f"old{i}"} for i in range(500)]
    monkeypatch.setattr(study.three, "read_critiques", lambda run: old)
    for retention, steps in ((None, 50), ("0.4", 24), ("0.05", 15)):
        assert study.proportionate(lab, retention) == {"steps": steps, "pairs eligible": 200}


def test_a_refused_world_is_a_line_and_the_study_goes_on(tmp_path, monkeypatch):
    def refuse(lab):
        raise study.Refused("error: Try another --seed")

    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(study.Lab, "make_base", refuse)
    for seed in (3, 3, 1003):  # it is not built again
        study.run_world(study.Lab(tmp_path, seed), ["start"], None, results)
    [line], [final] = [study_report.read(results, is_final) for is_final in (False, True)]
    assert final["seed"] == 1003
    assert (line["seed"], line["failure"]) == (3, "error: Try another --seed")
    assert line["accuracies"] == {} and line["code"] == study.CODE and line["commit"]


def test_contrast_is_of_whole_critiques(trained, pictures):
    losses = study.dpo_loss(torch.tensor([1.0, 11.0]), torch.tensor([1.0, 1.0]))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1))])
    worst = [row["response"] for row in judged_rows()[::-1]]
    rows = [{**row, "worst": text} for row, text in zip(judged_rows(), worst)]
    found = study.gaps(*trained, rows, pictures)
    for row, gap in zip(rows, found.tolist(), strict=True):
        nll = []
        for response in (row["response"], row["worst"]):
            inputs, labels = encode(trained[1], pictures, [{**row, "response": response}])
            nll.append(study.three.nll_sum(trained[0](**inputs).logits, labels)[0].item())
        assert gap == pytest.approx(nll[1] - nll[0], abs=1e-3)


# ---- Runs that a study writes --------------------------------------------------------------------
CLAIMS = ("chosen", "rejected", "both")
FOUND = (("red star", "present"), ("red ring", "absent"), ("blue star", "unsure"))
EVIDENCE = [{"object": x, "status": s, "claimed_by": c} for (x, s), c in zip(FOUND, CLAIMS)]
PAIR = {"id": "p-0", "image": "0.png", "prompt": "What?", "split": "pool", "evidence": EVIDENCE}
PAIR |= {"chosen": "red star.", "rejected": "red ring."}


def test_forgotten_findings_are_those_of_the_pairs_to_train_on(tmp_path):
    path = tmp_path / "01_preferences" / "preferences.jsonl"
    rows = [{**PAIR, "id": f"p{i}", "split": split} for i, split in enumerate(("pool", "train"))]
    common.write_jsonl(path, rows)
    study.forget_findings(tmp_path)
    assert study.read_jsonl(path) == [rows[0], {**rows[1], "evidence": []}]


@pytest.mark.parametrize("most", [4, 6])
def test_pictures_of_known_kinds(most):
    rng = np.random.default_rng(most)
    objects = [study.scene_of_known(rng, most).objects for _ in range(60)]
    assert {len(found) for found in objects} == set(range(2, most + 1))
    assert not {thing["object"] for found in objects for thing in found} & set(study.UNSEEN)


def test_the_expert_is_held_against_the_truth():
    truth = {"0.png": ["red star", "blue star"]}
    absent = {**EVIDENCE[0], "status": "absent"}  # wrong: it is there
    rows = [PAIR, {**PAIR, "evidence": [absent, *EVIDENCE[1:]]}]
    others = [{**found, "claimed_by": claim} for found, claim in zip(EVIDENCE, CLAIMS[1::-1])]
    flipped = {**PAIR, "evidence": [*others, EVIDENCE[2]]}
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


def test_an_interval_is_students_over_worlds_or_one_worlds_images():
    one = {0: (0.5, np.linspace(0.4, 0.6, 100))}
    assert study_report.interval(one) == pytest.approx((0.405, 0.595), abs=0.003)
    values = [0.1, 0.2, 0.3, 0.4, 0.5]  # scipy's t.interval(0.95, 4, 0.3, sem(values))
    many = cells_of(values)
    assert study_report.interval(many) == pytest.approx((0.10368, 0.49632), abs=1e-4)
    assert study_report.p_value(many) == pytest.approx(0.013236, abs=1e-4)  # ttest_1samp
    for n, quantile in enumerate(study_report.T, 2):  # a mean that is so many errors from zero
        shape = np.arange(n) - (n - 1) / 2
        error = shape.std(ddof=1) / n**0.5
        p = study_report.p_value(cells_of(shape + quantile * error))
        assert p == pytest.approx(0.05, abs=1e-4)


def cells_of(values):
    return {seed: (value, np.full(100, value)) for seed, value in enumerate(values)}


@pytest.mark.parametrize(
    "middle, spread, n, gains, no_effect",
    [
        (0.03, 0.01, 8, "holds", "does not"),
        (-0.03, 0.01, 8, "does not", "does not"),
        (0.004, 0.001, 8, "holds", "holds"),
        (0.0, 0.004, 8, "does not", "holds"),
        (0.0, 0.03, 8, "undecided", "undecided"),
        (0.03, 0.001, 4, "points up", "points up"),
        (-0.03, 0.001, 4, "points down", "points down"),
        (0.012, 0.004, 8, "holds", "undecided"),
        (0.003, 0.001, 4, "points up", "points to none"),
    ],
)
def test_verdicts_by_the_rules(middle, spread, n, gains, no_effect):
    found = cells_of(middle + spread * np.linspace(-1, 1, n))
    for kind, verdict in (("gains", gains), ("no effect", no_effect)):
        said, p = study_report.verdict_on(kind, found)
        assert said == verdict
        assert (p < 0.05) == (said in ("holds", "does not")) and p <= 1
    if no_effect in ("holds", "does not"):  # by the bound that is nearer
        assert p == pytest.approx(study_report.p_value(found, math.copysign(0.01, middle)))


def test_holm_leaves_what_is_sure_for_the_number_of_claims():
    for p_values, left in (([0.04, 0.001, 0.03], [0, 1, 0]), ([0.001, 0.03, 0.011], [1, 1, 1])):
        assert study_report.survive_holm(p_values) == left


def lines_of(code, processor, values, **line):
    """Lines of results with one condition "x" in settings "a" and "b" of a world each."""
    for setting, value in values.items():
        found = {"study": "s", "setting": setting, "seed": 0, "processor": processor, "counts": {}}
        found |= {"accuracies": {"x": value}, "bootstrap": {"x": [round(1e4 * value)] * 100}}
        yield {**found, "code": code, **line}


def test_a_difference_mixes_neither_processors_nor_codes():
    a, b = ("s", "a", "x"), ("s", "b", "x")
    lines = [*lines_of(1, "p", {"a": 0.9, "b": 0.8})]
    lines += [*lines_of(2, "p", {"a": 0.7}), *lines_of(2, "q", {"b": 0.1})]
    assert study_report.difference(lines, a, b) == {}
    del lines[0]["code"]  # as the first lines are
    lines += [*lines_of(2, "q", {"a": 0.4}), *lines_of(2, "q", {"a": 0.5}, seed=1)]
    [(value, draws)] = study_report.difference(lines, a, b).values()
    assert value == pytest.approx(0.3) and draws == pytest.approx(np.full(100, 0.3))
    [(value, _), _] = study_report.difference(lines, a, 0.5).values()
    assert value == pytest.approx(0.2)
    assert study_report.difference(lines[:2], a, b)[0][0] == pytest.approx(0.1)
    lines += lines_of(1, "p", {"a": 0.9, "b": 0.8}, seed=1)  # so few worlds of either: the more
    assert {study_report.code_of(line) for line in study_report.newest(lines, a, b)} == {1}
    for seed in range(2, 7):  # five worlds of the newer, without what is compared
        lines += lines_of(2, "p", {"a": 0.5}, seed=seed)
    assert len(study_report.difference(lines, a, 0.5)) == 7
    lines[0]["accuracies"]["y"], lines[0]["bootstrap"]["y"] = 0.9, [9000] * 100
    assert [*study_report.difference(lines, (*a[:2], "y"), 0.5)] == [0]


def test_both_kinds_of_worlds_stand_in_the_table():
    """Three in which stage 03 took, two in which it did not; one of the final check."""
    place, other = study_report.comparisons()[1][3:]
    lines = []
    for seed, follows in enumerate([0.9, 0.86, 0.95, 0.5, 0.84, 0.9]):
        seed = seed if seed < 5 else 1001
        values = {place[2]: 0.6 + 0.01 * (seed % 500), other[2]: 0.5}
        [line] = lines_of(2, "p", {"a": 0.0}, seed=seed)
        for name, value in values.items():
            line["accuracies"][name] = value
            line["bootstrap"][name] = [round(1e4 * value)] * 100
        lines.append({**line, "study": place[0], "setting": place[1]})
        counts = {"after 03: verdict follows": follows}
        start = {"study": "start", "setting": study_report.START[1], "counts": counts}
        lines.append({**line, **start})
    *_, row = study_report.claims(lines[:10], lines[10:])
    columns = [column.strip() for column in row.split("|")]
    assert columns[3].startswith("+.120 (") and columns[4] == "5"
    assert columns[5:9] == ["+.110 of 3", "+.135 of 2", "+.110", "holds \\*"]


def test_every_study_has_its_table(capsys):
    """As anyone gets it, from the file alone, refused worlds with it."""
    study.main(study.parse_args(["--table"]))
    printed = capsys.readouterr().out
    measured = {line["study"] for line in study_report.read(ROOT / "assets/results.jsonl")}
    for name in measured:
        assert f"| {name} |" in printed and f"| {name}: counts |" in printed
    assert "World 3 was refused: error: no judge" in printed


def test_recorded_lines_are_whole():
    for line in study_report.read(ROOT / "assets/results.jsonl"):
        if study_report.code_of(line) == study.CODE:
            assert line["setting"] in study.STUDIES[line["study"]]
        assert line["accuracies"].keys() == line["bootstrap"].keys()
        assert line["commit"] and (line["accuracies"] or line["failure"])
        for name, accuracy in line["accuracies"].items():
            draws = line["bootstrap"][name]
            assert len(draws) == 100 and np.mean(draws) / 1e4 == pytest.approx(accuracy, abs=0.01)


def test_pictures_are_drawn(tmp_path):
    study_report.draw(study_report.read(ROOT / "assets/results.jsonl"), tmp_path)
    assert all(5_000 < path.stat().st_size < 150_000 for path in tmp_path.iterdir())


def test_the_quality_of_a_caption():
    assert study.quality("red star.", ["red star", "red ring"]) == (True, 0.5)
    assert study.quality("blue star, red ring.", ["red star", "red ring"]) == (False, 0.5)
