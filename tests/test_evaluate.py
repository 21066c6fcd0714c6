"""Stage 05: hand-computed measures, slow twins of the formulas, and whole runs with a judge that
says set texts and records what it was asked."""

import itertools
import math
import random
import re
from collections import Counter
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from conftest import judgements, read_rows, stage
from test_published import bench_row
from test_stages import answer

import common
from common import read_json, write_json, write_jsonl

five = stage("05_evaluate")
CRITIQUES = {"A": "A: red circle: yes\nVerdict: A", "B": "B: red circle: yes\nVerdict: B"}


def measures_of(rows, pairs, accuracies=None):
    """Of pairs {id: what a test looks at}; accuracies: of the rows, if there are no others."""
    same = {"image": "0.png", "chosen": "x", "rejected": "x"}
    pairs = {key: {**same, **pair} for key, pair in pairs.items()}
    return five.measures_of(rows, accuracies or five.accuracy_per_pair(rows), pairs, {})


# ---- The measures --------------------------------------------------------------------------------
def test_calibration_error():
    """Bins are closed on the right; P is that of the verdict given, and rows without have none."""
    rng = random.Random(0)
    for bins in (1, 2, 7, 10, 15):
        probability = [rng.random() for _ in range(150)] + [k / bins for k in range(bins + 1)]
        correct = [rng.random() < p for p in probability]
        gaps = [0.0] * bins
        for p, is_correct in zip(probability, correct, strict=True):
            inside = [b for b in range(bins) if b / bins < p <= (b + 1) / bins]
            gaps[inside[0] if inside else 0] += p - is_correct
        error = five.expected_calibration_error(probability, correct, bins)
        assert error == pytest.approx(sum(map(abs, gaps)) / len(probability))
    rows = judgements("1", "A", "B", 0.9, 0.2) + judgements("2", "B", None, 0.4, 0.5)
    measures = measures_of(rows, {"1": {}, "2": {}})
    assert (measures["ece"], measures["unparseable"]) == (pytest.approx(0.9 / 3), 1 / 4)
    assert measures_of(judgements("1", None, None), {"1": {}})["accuracy"] == 0


def slow_bootstrap(values, clusters, groups=None, n=4000):
    """Draws clusters one by one; the mean over the drawn groups' means."""
    groups = groups or [""] * len(values)
    rows_of, rng = {}, random.Random(1)
    for value, cluster, group in zip(values, clusters, groups, strict=True):
        rows_of.setdefault(cluster, []).append((value, group))
    means = []
    for _ in range(n):
        drawn = {}
        for rows in rng.choices(list(rows_of.values()), k=len(rows_of)):
            for value, group in rows:
                drawn.setdefault(group, []).append(value)
        means.append(np.mean([np.mean(of_group) for of_group in drawn.values()]))
    return tuple(np.percentile(means, [2.5, 97.5]))


def test_intervals_against_a_slow_bootstrap():
    """Whole clusters are drawn; macro: the mean over the groups' means."""
    rng = random.Random(0)
    images = [f"{i}.png" for i in range(30) for _ in range(1 + i % 5)]  # of 1 to 5 rows
    groups = ["a"] * 60 + ["b"] * 24 + ["c"] * 6
    level = {image: rng.random() for image in images}
    values = [float(rng.random() < level[image]) for image in images]
    pooled = five.cluster_bootstrap(values, images)
    assert pooled == pytest.approx(slow_bootstrap(values, images), abs=0.012)
    assert np.subtract(five.cluster_bootstrap(values, range(90)), pooled)[0] > 0.01  # narrower
    macro = five.macro_bootstrap(values, images, groups)
    assert macro == pytest.approx(slow_bootstrap(values, images, groups), abs=0.015)
    assert abs(macro[1] - pooled[1]) > 0.03
    assert five.macro_bootstrap(values, images, ["x"] * 90) == pooled
    assert five.cluster_bootstrap(values, images, seed=1) != pooled
    pairs = {i: {"image": images[i], "category": groups[i]} for i in range(90)}
    measures = measures_of(judgements(0, "A", "B"), pairs, dict(enumerate(values)))
    assert (measures["interval"], measures["macro_interval"]) == (pooled, macro)
    measures = measures_of(judgements(0, "A", "B"), pairs, {0: 1.0, 1: 1.0, 2: 0.5, 60: 0.0})
    assert (measures["by_category"], measures["macro"]) == ({"a": 2.5 / 3, "b": 0}, 2.5 / 6)


def test_measures_by_hand():
    rows = judgements("1", "A", "B", 0.9, 0.2) + judgements("2", "A", "A", 0.6, 0.6)
    rows += judgements("3", "B", "A") + judgements("4", "B", None)
    pairs = {"1": {"rejected": ""}, "2": {"chosen": "", "hallucinated": ["red ring"]}}
    pairs |= {"3": {"chosen": "an ox", "rejected": "elephant"}, "4": {}}  # 4: of one length
    measures = measures_of(rows, pairs)
    expected = {"accuracy": 3 / 8, "both": 1 / 4, "hallucination": 1 / 2, "undecided": 0}
    expected |= {"shorter_is_better": 1 / 4, "longer_is_better": 1.0, "macro": 3 / 8}
    wanted = sum(-math.log(p) for p in (0.9, 0.8, 0.6, 0.4, *[0.5] * 4)) / 8
    assert {name: measures[name] for name in expected} == expected
    assert measures["bradley_terry_loss"] == pytest.approx(wanted, abs=1e-6)
    of_first = measures_of(rows[:2], pairs)
    assert of_first["hallucination"] is of_first["shorter_is_better"] is None


def test_reliability_by_hand(tmp_path, monkeypatch):
    """Mean P against accuracy of each bin with judgements; the area tells how many."""
    drawn = []
    scatter = "matplotlib.axes.Axes.scatter"
    monkeypatch.setattr(scatter, lambda axis, *given, **how: drawn.append(given))
    rows = judgements("1", "A", "B", 0.95, 0.15) + judgements("2", "A", None, 0.65)
    rows += judgements("3", "B", "A", 0.35, 0.68)
    five.draw_reliability(tmp_path / "x.png", {"x": rows, "mute": judgements("1", None, None)})
    x, y, areas = (of_bins.tolist() for of_bins in drawn[0])
    assert x == pytest.approx([0.66, 0.85, 0.95]) and y == pytest.approx([1 / 3, 1, 1])
    assert areas == pytest.approx([130, 50, 50]) and len(drawn) == 2


def test_paired_differences_are_clustered_by_image():
    """Five pairs an image that succeed together are one draw; paired by id, in any order, where
    both have a majority. What sees no picture is not compared."""
    pairs, base, after = {}, [], []
    for i in range(200):
        key = f"p{i}"
        pairs[key] = {"id": key, "image": f"{i // 5}.png"}
        base += judgements(key, "A", "A")
        after += judgements(key, *("AB" if i // 5 % 2 else "BA"))
    of_judge = {"base": {**five.accuracy_per_pair(base[::-1]), "x": 0.0}}
    of_judge |= {
        "after 03": {**five.accuracy_per_pair(after), "y": 1.0},
        "blank image": {},
        "mute": {},
    }
    ((name, found),) = five.paired_differences(of_judge, "after 03", pairs).items()
    assert name == "after 03 - base"
    gain = [0.5 if i // 5 % 2 else -0.5 for i in range(200)]
    images = [pair["image"] for pair in pairs.values()]
    assert found == pytest.approx((0, *slow_bootstrap(gain, images)), abs=0.02)


WORDS = ("red circle", "red ring", "blue star")
VOCABULARY = {name: name for name in WORDS}


def finding(name, status):
    found = {"object": name, "status": status, "claimed_by": "both"}
    return {**found, "confidence": 0.5, "box": None}


def test_check_rates_by_hand():
    evidence = [finding(*x) for x in zip(WORDS, ("present", "absent", "unsure"), strict=True)]
    pairs = {"1": {"evidence": evidence}, "2": {}}
    critiques = [
        "A: red circle: yes\nA: blue star: no\nB: red ring: yes",
        "A: red ring: no\nB: red circle: no\nB: red circle: yes",
        # what has more to it than the object may be wrong though the object is there
        "A: red ring: no\nA: red ring: no\nB: a red circle at night: no",
        "A: red ring: yes",
    ]
    rows = []
    for key, critique, verdict in zip("1112", critiques, "BAAB", strict=True):
        rows.append({"id": key, "critique": critique, "verdict": verdict})
    rates = five.check_rates(rows, pairs, VOCABULARY)
    expected = {"present_said_yes": 2 / 3, "absent_said_no": 3 / 4, "balanced": 17 / 24}
    # the first verdict alone is that of its checks; the second's and the fourth's are even
    assert rates == pytest.approx({**expected, "verdict_follows": 1 / 2, "n_checks": 7})
    assert five.check_rates(rows[3:], pairs, VOCABULARY) == {}


# ---- VL-RewardBench's protocol -------------------------------------------------------------------
CALLS = {"g1": "araar", "g2": "rara-", "h1": "---aa", "h2": "arrrr", "h3": "a-a-a", "r1": "ar-aa"}
# after so many calls: the pairs that agree with the label, and that reject it
MAJORITIES = {1: ("g1 h2 h3 r1", "g2"), 2: ("", ""), 3: ("g1 h3", "g2 h2"), 5: ("g1 h3 r1", "h2")}


@pytest.mark.parametrize("k", MAJORITIES)
def test_majorities_by_hand(k):
    """CALLS: a agrees with the label, r rejects it, - has no verdict; 2 of 5 decide nothing."""
    rows = []
    for key, letters in CALLS.items():
        for letter in letters[:k]:
            verdict = {"a": "A", "r": "B", "-": None}[letter]
            rows.append(judgements(key, verdict, None)[0])
    agree, reject = (words.split() for words in MAJORITIES[k])
    if k == 2:
        with pytest.raises(SystemExit, match="no pair has a majority of its calls"):
            five.majority_per_pair(rows)
        return
    decided = five.majority_per_pair(rows)
    assert decided == {**dict.fromkeys(agree, 1.0), **dict.fromkeys(reject, 0.0)}
    measures = measures_of(rows, dict.fromkeys(CALLS, {}), decided)
    assert measures["accuracy"] == len(agree) / len(decided)
    assert measures["undecided"] == 6 - len(decided)


# ---- Pictures and judges -------------------------------------------------------------------------
@pytest.mark.parametrize("n_images", [2, 3, 7, 60])
def test_another_picture_is_never_its_own(n_images):
    """One of the others for all questions of an image; not the same one for nearly all images."""
    names = [f"{i}.png" for i in range(n_images)]
    questions = [{"id": i, "image": name} for i, name in enumerate(names * 2)]
    drawn = {name: set() for name in names}  # what is shown instead, by all seeds
    for seed in range(60):
        changed = five.withheld(questions, "other", "root", seed)
        assert [{"id": q["id"], "image": q["image"]} for q in changed] == questions
        shown = [str(q["picture"]) for q in changed]
        assert shown[:n_images] == shown[n_images:]
        for name, other in zip(names, shown, strict=False):
            drawn[name].add(other)
        assert n_images < 60 or max(Counter(shown).values()) <= 20  # of two each, by lot: 8 or 10
    for name, others in drawn.items():
        assert others <= set(names) - {name}
        assert len(others) == n_images - 1 or n_images == 60
    with pytest.raises(SystemExit, match="at least two pictures"):
        five.withheld(questions[:1], "other", "root", 0)


def put_adapter(folder, weights=None, **made_with):
    """Stands for what 03 and 04 leave."""
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    usual = {"style": "none", "steps": 3, "train_batch": 8, "counts": {"trained on, critiques": 9}}
    write_json(folder / "adapter" / "made_with.json", {**usual, **made_with})
    write_jsonl(folder / "metrics.jsonl", [{"loss": 2.0}, {"loss": 0.25}])
    weights = weights or str(folder)
    (folder / "adapter" / "adapter_model.safetensors").write_text(weights)


def test_judges_stand_in_the_order_of_training(tmp_path):
    (base,) = five.find_judges(tmp_path)
    assert five.last_judge([base], "") is base and base["checkpoint"] is None
    assert base["style"] == "critique"
    for tag in ("", "bt"):
        put_adapter(tmp_path / f"03_ift_{tag}", tag=tag)
        rule = {"tag": tag, "select": "random", "iteration": 1}
        put_adapter(tmp_path / f"04_rejection_{tag}_random" / "iter1", **rule)
    for t in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1):
        put_adapter(tmp_path / "04_rejection" / f"iter{t}", select="margin", iteration=t)
    (tmp_path / "04_rejection" / "iter11").mkdir()  # begun, no weights yet
    judges = five.find_judges(tmp_path)
    names = ["base", "after 03", *(f"margin, iteration {t}" for t in range(1, 11))]
    names += ["random, iteration 1", "after 03, bt", "random, iteration 1, bt"]
    assert [x["name"] for x in judges] == names
    assert judges[10]["checkpoint"] == tmp_path / "04_rejection" / "iter9" / "adapter"
    assert five.last_judge(judges, "")["name"] == "margin, iteration 10"  # not the control
    assert five.last_judge(judges, "bt")["name"] == "random, iteration 1, bt"
    with pytest.raises(SystemExit, match="--tag new"):
        five.last_judge(judges, "new")


# ---- Best-of-N -----------------------------------------------------------------------------------
def test_picks_of_corners_against_brute_force():
    """The first n responses: who beats the others of them most, over both orders, one by one."""
    rng = random.Random(0)
    row = {"id": "x", "image": "0.png", "prompt": "?"}
    for size in (1, 2, 5, 9):
        responses = [f"r{i}" for i in range(size)]
        p_a = {pair: rng.random() for pair in itertools.permutations(responses, 2)}
        questions = five.games(row, responses)
        compared = [(q["response_a"], q["response_b"]) for q in questions]
        assert sorted(compared) == sorted(p_a)  # each two in both orders, once
        assert len({q["id"] for q in questions}) == len(questions)
        assert all((q["image"], q["prompt"]) == ("0.png", "?") for q in questions)
        matrix = five.preference_matrix(size, [p_a[pair] for pair in compared])
        for n in range(1, size + 1):
            wins = []
            for a in responses[:n]:
                of_a = [(p_a[a, b] + 1 - p_a[b, a]) / 2 for b in responses[:n] if b != a]
                wins.append(sum(of_a) / len(of_a) if of_a else 0.0)
            assert five.win_rates(matrix, n).tolist() == pytest.approx(wins)


# ---- Whole runs ----------------------------------------------------------------------------------
class Fake:
    """Stands for common.load_judge and common.sample: it answers by answer(folder of the
    checkpoint, request, k), and records what it was asked."""

    def __init__(self, answer):
        self.answer, self.requests, self.settings, self.loaded = answer, [], [], []

    def load(self, model_path, checkpoint, max_image_tokens, **_):
        assert (model_path, max_image_tokens) == ("hub/base", 7)  # stage 01's
        self.loaded.append(checkpoint and str(checkpoint.parent).split("/run/")[1])
        return self.loaded[-1], None

    def sample(self, model, processor, requests, n, temperature, max_new_tokens, seed, **_):
        self.requests += requests
        self.settings += [(n, temperature, max_new_tokens, seed)] * len(requests)
        return [[self.answer(model, request, k) for k in range(n)] for request in requests]


def prefers_circles(model, request, k):
    """The base model says A; a trained one prefers the response that names a red circle."""
    response_a = request["text"].split("Response A: ")[1].split("\n")[0]
    return answer(CRITIQUES["A" if model is None or "circle" in response_a else "B"])


@pytest.fixture
def judge(monkeypatch):
    made = Fake(prefers_circles)
    monkeypatch.setattr(common, "load_judge", made.load)
    monkeypatch.setattr(common, "sample", made.sample)
    return made


def write_pairs(folder, n=6):
    """heldout.jsonl, as 01 writes pairs; no two have the same prompt or texts."""
    pairs = []
    for i in range(n):
        evidence = [finding("red circle", "present"), finding("red ring", "absent")]
        pair = {"id": f"p{i}", "image": f"{i % 4}.png", "prompt": f"List the objects of {i}."}
        pair |= {"chosen": f"{i} red circle.", "rejected": f"{i} red ring.", "evidence": evidence}
        pair |= {"hallucinated": ["red ring"] * (i < 3), "source": "x", "split": "heldout"}
        pairs.append({**pair, "category": ("macro", "a|b")[i % 2]})
    write_jsonl(folder / "heldout.jsonl", pairs)
    return pairs


NAMES = ["base", "after 03", "margin, iteration 1", "random, iteration 1"]
MARGIN, RANDOM = "04_rejection/iter1", "04_rejection_random/iter1"


def complete_01(run, pictures):
    """Stands for what 01 leaves, but for its pairs."""
    args = {"model": "hub/base", "image_root": str(pictures), "max_image_tokens": 7}
    args |= {"images": "photos", "pairs": None, "detections": None, "expert": "x.pt"}
    args |= {"present": 0.5, "absent": 0.05}
    counts = {"rows read": 9, "pairs made": 7, "  in split train": 1, "  in split heldout": 6}
    (run / "01_preferences").mkdir(parents=True)
    write_json(run / "01_preferences" / "meta.json", {"args": args, "counts": counts})
    write_json(run / "01_preferences" / "vocabulary.json", VOCABULARY)


@pytest.fixture
def made_run(tmp_path, pictures):
    """A run whose stages 01-04 are complete: six held-out pairs, four judges."""
    run = tmp_path / "run"
    complete_01(run, pictures)
    rows = write_pairs(tmp_path)
    others = [{**rows[0], "id": "t", "split": "train"}]
    write_jsonl(run / "01_preferences" / "preferences.jsonl", others + rows)
    put_adapter(run / "03_ift", images=["trained_on.png"])
    put_adapter(run / MARGIN, select="margin", iteration=1)
    put_adapter(run / RANDOM, select="random", iteration=1)
    return run


HOW = """- base: hub/base
- data: 9 rows of photos
- expert: x.pt, present from 0.5, absent below 0.05
- pairs that it made or confirmed: 7, train 1, pool 0, validation 0, heldout 6"""
for name in NAMES[1:]:
    HOW += f"\n- {name}: 3 steps of 8 critiques, drawn from 9; training loss at the end 0.250"


def evaluate(run, *given):
    """Run 05 -> (report, folder)."""
    five.main(five.parse_args(["--run", str(run), *map(str, given)]))
    folder = max(run.glob("05_evaluation*"), key=lambda path: len(path.name))
    return (folder / "report.md").read_text(), folder


def cells(report, start):
    """The cells of the first line of a table that starts so."""
    line = next(line for line in report.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_run_with_all_its_judges(made_run, judge):
    """Without --pairs 01's held-out pairs are judged. The last judge also sees other pictures, and
    responses that praise themselves (what each request holds: test_requests.py)."""
    report, folder = evaluate(made_run, "--seed", 7, "--max-new-tokens", 33, "--attack")
    rows = read_rows(folder / "judgements.jsonl")
    closer = [f"{NAMES[2]}, {how}" for how in ("blank image", "other image", "attack")]
    assert [row["condition"] for row in rows[::12]] == [*NAMES[:3], *closer, NAMES[3]]
    assert judge.loaded == [None, "03_ift", MARGIN, RANDOM]
    assert set(judge.settings) == {(1, 0.0, 33, 7)}
    of_base = [request["text"] for request in judge.requests[:12]]  # in the judges' style
    assert all(text.endswith(common.INSTRUCTIONS["none"]) for text in of_base)
    table = read_json(folder / "metrics.json")["table"]
    assert [table[name]["accuracy"] for name in NAMES] == [0.5, 1, 1, 1]
    assert table["base"]["both"] == 0
    assert [row["category"] for row in rows[:4]] == ["macro", "macro", "a|b", "a|b"]
    assert report.split("\n\n")[4] == HOW and "warning" not in report
    assert cells(report, "shorter response")[1] == "0.000"  # "red ring." is
    assert cells(report, "chance")[1:4] == ["0.500", "", "0.250"]
    assert cells(report, "after 03")[1:3] == ["1.000", "1.000-1.000"]
    for name in ("base", closer[2]):  # it denies whatever lacks a circle, and believes no praise
        gain = table[NAMES[2]]["accuracy"] - table[name]["accuracy"]
        assert cells(report, f"{NAMES[2]} - {name}")[1] == f"{gain:+.3f}"
    by_category = report[report.index("| accuracy by category |") :]
    assert by_category.startswith("| accuracy by category | a\\|b | macro |\n")
    assert cells(by_category, "base") == ["base", "0.500", "0.500"]
    pictures = [f"pictures/right-{k}.png" for k in range(1, 6)]
    for name in ("accuracy.png", "reliability.png", *pictures):
        assert report.count(f"]({name})") == 1
        common.load_image(folder / name)
    assert not (folder / "pictures" / "right-6.png").exists()
    assert "\n    Response A: 0 red circle.\n    Response B: 0 red ring.\n" in report  # a block


def test_what_fits_is_found_and_the_rest_is_made(made_run, judge):
    """Other flags, another judge, other weights, a file that was cut: never a refusal; the old
    answers are found again, and the same report is made without a model."""
    folder = made_run / "05_evaluation"

    def made_by(*given):
        """(questions of another start, judges that it loads)."""
        judge.requests.clear()
        judge.loaded.clear()
        evaluate(made_run, "--withhold", *given)
        return len(judge.requests), judge.loaded

    assert made_by() == (4 * 12, [None, "03_ift", MARGIN, RANDOM])
    first = {name: (folder / name).read_bytes() for name in ("report.md", "metrics.json")}
    assert made_by("blank", "--attack") == (2 * 12, [MARGIN])
    put_adapter(made_run / "04_rejection_best/iter1", select="best", iteration=1)
    assert made_by() == (12, ["04_rejection_best/iter1"])
    (made_run / "04_rejection_best").rename(made_run / "moved")
    put_adapter(made_run / "03_ift", "others")
    assert made_by() == (12, ["03_ift"])
    put_adapter(made_run / "03_ift")
    answers = (folder / "answers.jsonl").read_bytes()
    assert made_by() == (0, [])
    assert (folder / "answers.jsonl").read_bytes() == answers  # nothing is ever deleted
    assert {name: (folder / name).read_bytes() for name in first} == first
    (folder / "answers.jsonl").write_bytes(answers[: answers.index(b"\n\n") + 99])  # a chunk, cut
    assert made_by() == (3 * 12, ["03_ift", MARGIN, RANDOM])


def test_a_variant_stands_beside_the_others(made_run, judge, monkeypatch):
    """--tag: all are in the table, each asked in its own style; the variant's last is looked at
    closely. Refused: one that was trained on held-out pictures."""
    put_adapter(made_run / "03_ift_bt", tag="bt", style="critique")
    judge.answer = lambda model, request, k: answer(CRITIQUES["A"], 0.8)
    shown, warnings_of = {}, Mock(wraps=five.warnings_of)
    monkeypatch.setattr(five, "warnings_of", warnings_of)
    monkeypatch.setattr(five, "draw_reliability", lambda path, rows_of: shown.update(rows_of))
    report, _ = evaluate(made_run, "--tag", "bt", "--withhold", "blank")
    assert "warning: the interval of the best judge holds chance" in report
    assert [*warnings_of.call_args.args[1]] == [*NAMES, "after 03, bt"]  # no rule, no condition
    assert {name: rows[0]["condition"] for name, rows in shown.items()} == {
        name: name for name in ("base", "after 03, bt")
    }
    names = (*NAMES, "after 03, bt", "after 03, bt, blank image")
    assert {cells(report, name)[1] for name in names} == {"0.500"}
    assert "Judgements of after 03, bt" in report and "iteration 1, blank" not in report
    is_critique = [common.INSTRUCTIONS["critique"] in row["text"] for row in judge.requests]
    # the base model is asked as the judge is with which it is compared
    assert is_critique == [True] * 12 + [False] * 36 + [True] * 24
    put_adapter(made_run / "03_ift_copy", tag="copy", images=["2.png"])
    with pytest.raises(SystemExit, match="03_ift_copy/adapter was trained on pictures"):
        evaluate(made_run)


def test_missing_verdicts_are_said_and_counted(made_run, pictures, judge):
    """More than one in twenty: a warning in the report, which names the judge and the flag."""
    write_pairs(made_run.parent, 20)
    mute = {None: ("p0-ab", "p0-ba"), "03_ift": ("p0-ab", "p0-ba", "p1-ab")}

    def reply(model, request, k):
        is_mute = request["id"] in mute.get(model, ())
        return answer("I cannot tell.") if is_mute else prefers_circles(model, request, k)

    judge.answer = reply
    given = ("--pairs", made_run.parent / "heldout.jsonl", "--image-root", pictures)
    report, folder = evaluate(made_run, *given, "--withhold")  # 2 of 40 of base, 3 of after 03
    warnings = re.findall("warning: .*", report)
    assert len(warnings) == 1 and "8% of after 03's judgements have no verdict" in warnings[0]
    assert "--max-new-tokens" in warnings[0]
    assert read_json(folder / "meta.json")["counts"]["without a verdict"] == 5
    assert cells(report, "after 03")[1] == f"{37 / 40:.3f}"


def test_chance_within_the_best_judges_interval_is_said():
    other = {"accuracy": 0.4, "interval": (0.3, 0.6)}
    for low, high, n in ((0.5, 0.6, 1), (0.51, 0.6, 0), (0.44, 0.5, 1), (0.44, 0.49, 1)):
        best = {"accuracy": 0.45, "interval": (low, high)}
        assert len(five.warnings_of({}, {"base": other, "x": best})) == 2 * n


def test_vl_rewardbench(tmp_path, pictures, judge):
    complete_01(tmp_path, pictures)  # without a training
    names = [f"{('RLAIF-V-', 'mathverse_')[i % 2]}{i}" for i in range(6)]
    rows = [bench_row(name, [i % 2, 1 - i % 2], seed=i) for i, name in enumerate(names)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    judge.answer = lambda model, request, k: answer(CRITIQUES["A"], 0.9)
    given = ["--benchmark", "vl-rewardbench", "--protocol", "official", "--withhold"]
    given += ["--pairs", tmp_path / "test.parquet"]
    report, folder = evaluate(tmp_path, *given)
    base = read_json(folder / "metrics.json")["table"]["base"]
    assert set(base["by_category"]) <= {"general", "hallucination", "reasoning"}
    assert {request["image"].parent for request in judge.requests} == {folder / "images"}
    assert folder.name == "05_evaluation_vl-rewardbench_official"
    assert [x[:2] for x in judge.settings] == [(1, 0.2)] * 54 and "both" not in base
    calls = read_rows(folder / "judgements.jsonl")
    n_correct = Counter(row["id"] for row in calls if row["verdict"] == row["label"])
    assert base["accuracy"] == sum(n >= 5 for n in n_correct.values()) / 6  # of 9 calls
    assert {row["order"] for row in calls} == {"ab", "ba"} and len(set(n_correct.values())) > 1


def captions(model, request, k):
    """As policy: four responses; as judge: likes A, and more so the larger its number is."""
    if "Response A: " not in request["text"]:
        texts = ("red ring 0.", "red circle 1.", "red circle, red ring 3.", "red circle 2.")
        text = texts[(k + int(request["id"]) // 2) % 4]
        return {**answer(text), "complete": k != 2}
    a, b = re.findall(r"Response .: .*(\d)", request["text"])
    return answer(CRITIQUES["A"], 0.6 + (int(a) - int(b)) / 10)


def test_llava_bench_in_the_wild(tmp_path, pictures, judge):
    questions = []
    (tmp_path / "images").mkdir()
    for i in (3, 0, 2, 1):
        picture = {"image": f"{i}.png", "text": f"What is in picture {i}?"}
        questions.append({"question_id": i, **picture})
        (tmp_path / "images" / f"{i}.png").symlink_to(pictures / f"{i}.png")
    write_jsonl(tmp_path / "questions.jsonl", questions)
    judge.answer = captions
    complete_01(tmp_path / "run", pictures)
    put_adapter(tmp_path / "run" / "03_ift")
    given = ["--benchmark", "llava-wild", "--pairs", tmp_path]
    report, folder = evaluate(tmp_path / "run", *given, "--best-of", 4)
    assert folder.name == "05_evaluation_llava-wild" and "No score here" in report
    assert read_json(folder / "meta.json")["counts"]["responses cut at --max-new-tokens"] == 4
    assert judge.loaded == [None, "03_ift"]  # the base model responds, the last judge picks
    # each two of four responses, in both orders
    assert [x[:2] for x in judge.settings] == [(4, 1.0)] * 4 + [(1, 0.0)] * 4 * 6 * 2
    for k, request in enumerate(judge.requests):  # of one question after the other
        q = questions[k if k < 4 else (k - 4) // 12]
        assert q["text"] in request["text"]
        assert request["image"] == tmp_path / "images" / q["image"]
    example = "Question 3, and each response's win rate\n\n    What is in picture 3?\n"
    for line in ("0.300 red ring 0.", "0.433 red circle 1.", "0.700 red circle, red ring 3."):
        example += f"\n    {line}\n"
    assert f"{example}\n    0.567 red circle 2.\n" in report and report.count("win rate") == 3
    assert "after 03 has picked the first, second, ... of 4 so often: [0, 2, 2, 0]" in report
    for name, numbers in (("first", "0011"), ("judge", "3333")):
        answers = read_rows(folder / f"answers_{name}.jsonl")
        for q, row, number in zip(questions, answers, numbers, strict=True):
            assert (row["question_id"], row["prompt"]) == (q["question_id"], q["text"])
            assert row["text"][-2] == number and row["answer_id"] and row["model_id"]


def test_what_cannot_be_judged_stops_before_any_work(made_run, pictures, judge):
    none, pairs = made_run / "none", made_run.parent / "heldout.jsonl"
    complete_01(none, pictures)
    write_jsonl(none / "01_preferences" / "preferences.jsonl", [])
    for run, given, words in (
        (made_run / "new", [], "01_preferences is not complete"),
        (none, [], "no held-out pairs: give 01 a larger --heldout"),
        (made_run, ["--benchmark", "llava-wild", "--pairs", pictures], "questions.jsonl and"),
        (made_run, ["--pairs", pairs], f"missing image': 6.*--image-root is {pairs.parent}"),
    ):
        with pytest.raises(SystemExit, match=words):
            evaluate(run, *given)
    assert judge.loaded == judge.requests == []
