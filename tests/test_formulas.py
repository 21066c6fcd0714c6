"""The pure functions of 03 and 04: numbers by hand, slow twins on random inputs, invariances."""

import math
import random

import pytest
import torch
from conftest import judgements, stage

from common import verdict_log_odds

three, four = stage("03_train_ift"), stage("04_rejection_sampling")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- 03: the losses ------------------------------------------------------------------------------
def slow_nll(logits, labels):
    """The token at t + 1 is predicted at t."""
    terms = []
    for row, targets in zip(logits.double().softmax(-1), labels.tolist()):
        terms += [-math.log(row[t][x]) for t, x in enumerate(targets[1:]) if x != -100]
    return sum(terms), len(terms)


def test_nll_by_hand():
    # P = (1/4, 3/4), (4/5, 1/5), unused; the first label has no predecessor
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [9.0, 0.0]]])
    for labels, n, p in (([-100, 1, 1], 2, 3 / 4 * 1 / 5), ([1, -100, 0], 1, 4 / 5)):
        nll, n_found = three.nll_sum(logits, torch.tensor([labels]))
        assert n_found == n and nll.item() == pytest.approx(-math.log(p))


def random_labels(seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 11, (3, 7), generator=rng)
    return labels.masked_fill(torch.rand(3, 7, generator=rng) < 0.4, -100)


@pytest.mark.parametrize("seed", range(4))
def test_nll_slow_twin(seed):
    logits, labels = randn(3, 7, 11, seed=seed), random_labels(seed)
    slow, slow_n = slow_nll(logits, labels)
    nll, n = three.nll_sum(logits, labels)
    assert nll.item() == pytest.approx(slow, rel=1e-5)
    assert n.item() == slow_n
    shifted = three.nll_sum(logits + randn(3, 7, 1), labels)[0]  # the softmax's freedom
    assert torch.allclose(shifted, nll, rtol=1e-5)
    assert three.nll_sum(logits.bfloat16(), labels)[0].dtype == torch.float32


def test_ift_loss():
    assert three.ift_loss(6.0, 3, 10.0, 4, 0.5) == 6 / 3 + 0.5 * 10 / 4
    assert three.ift_loss(6.0, 3, 0.0, 0, 0.0) == 2.0  # no correct responses at lam = 0
    critique, correct = randn(6, seed=1).abs(), randn(6, seed=2).abs()  # of six micro-batches
    parts = [three.ift_loss(a, 40, b, 25, 1 / 3) for a, b in zip(critique, correct)]
    assert torch.allclose(sum(parts), three.ift_loss(critique.sum(), 40, correct.sum(), 25, 1 / 3))


def test_bradley_terry():
    r, label_is_a = randn(50).requires_grad_(), randn(50, seed=1) > 0
    loss = three.bradley_terry_loss(r, label_is_a)
    signed = [x if is_a else -x for x, is_a in zip(r.tolist(), label_is_a)]
    assert loss.tolist() == pytest.approx([-math.log(sigmoid(x)) for x in signed], rel=1e-4)
    loss.sum().backward()
    assert ((r.grad < 0) == label_is_a).all()  # descent moves r towards the label
    extreme = three.bradley_terry_loss(torch.tensor([300.0]), torch.tensor([False]))
    assert extreme.tolist() == [300.0]  # no overflow


def test_learning_rate():
    # 40 steps: two of warm-up, then 38 of decay from 1 to a tenth
    rates = [three.learning_rate(step, 40, 2.0) for step in (0, 1, 2, 21, 39)]
    assert rates == pytest.approx([1, 2, 2, 2 - 1.8 * 19 / 38, 2 - 1.8 * 37 / 38])
    assert three.learning_rate(0, 1, 2.0) == 2.0  # a single step is taken at the full rate


# ---- The verdict's log-odds, confidence, margin --------------------------------------------------
def test_log_odds():
    logits = randn(5, 20) * 4
    log_p = logits.log_softmax(-1)
    r = verdict_log_odds(logits, 3, 7)
    assert torch.allclose(r, log_p[:, 3] - log_p[:, 7], atol=1e-5)
    assert torch.equal(verdict_log_odds(logits, 7, 3), -r)
    assert verdict_log_odds(logits.bfloat16(), 3, 7).dtype == torch.float32


def test_confidence_in_label():
    r = torch.tensor([0.0, math.log(4), math.log(4), -2.0])
    label_is_a = torch.tensor([True, True, False, False])
    s = four.confidence_in_label(r, label_is_a)
    assert s.tolist() == pytest.approx([0.5, 0.8, 0.2, sigmoid(2.0)])
    assert torch.allclose(-s.log(), three.bradley_terry_loss(r, label_is_a))


def test_margin():
    assert four.margin([0.9, 0.2, 0.97], [True, False, False]) == pytest.approx(0.7)
    assert four.margin([0.9, 0.6], [True, True]) == pytest.approx(0.3)  # the least sure one counts
    assert four.margin([], []) == four.margin([0.4], [True]) == 0.0
    with pytest.raises(ValueError):
        four.margin([0.5, 0.6], [True])
    rng = random.Random(0)
    for _ in range(200):
        confidences = [rng.random() for _ in range(rng.randint(1, 6))]
        passes = [rng.random() < 0.5 for _ in confidences]
        gaps = [a - b for a, ok in zip(confidences, passes) for b in confidences if ok]
        assert four.margin(confidences, passes) == max(gaps, default=0.0)


# ---- 03: the measures of judgement rows ----------------------------------------------------------
def test_accuracy_by_order():
    rows = judgements("1", "A", "B") + judgements("2", "A", "A") + judgements("3", "B", "A")
    rows += judgements("4", None, None) + judgements("5", None, "B") + judgements("6", "A", "B")
    expected = {"accuracy": 6 / 12, "accuracy_ab": 3 / 6, "accuracy_ba": 3 / 6}
    expected |= {"both": 2 / 6, "unparseable": 3 / 12, "n_pairs": 6}
    expected["agreement"] = 3 / 6  # pair 3 is wrong twice, so the same response wins
    assert three.accuracy_by_order(rows[::-1]) == pytest.approx(expected)
    # a judge that always says A; rows weigh alike, not orders
    result = three.accuracy_by_order(judgements("1", "A", "A") + judgements("2", "A", "A")[:1])
    assert (result["accuracy_ab"], result["accuracy_ba"], result["accuracy"]) == (1, 0, 2 / 3)
    assert result["agreement"] == 1 / 2  # of the second there is one order alone


def test_mean_bradley_terry():
    rows = [{"probability_a": p, "label": x} for p, x in ((0.8, "A"), (0.8, "B"), (0.5, "B"))]
    slow = -(math.log(0.8) + math.log(0.2) + math.log(0.5)) / 3
    assert three.mean_bradley_terry(rows) == pytest.approx(slow, rel=1e-5)
    # certain and wrong: large, but a number
    certain = three.mean_bradley_terry([{"probability_a": 0.0, "label": "A"}])
    assert certain == pytest.approx(-math.log(1e-6), rel=1e-3)


def test_paired_gain():
    """Mean over images, whose questions succeed and fail together; whatever the rows' order."""
    names = ["x1", "x2", "y1", "y2", "z1"]

    def rows(verdicts):
        pairs = zip(names, verdicts)
        return [{"question": q, "image": q[0], "label": "A", "verdict": v} for q, v in pairs]

    earlier, later = rows("ABABA"), rows("AAAAB")[::-1]  # gains 0 1 | 0 1 | -1: images .5, .5, -1
    gain, half = three.paired_gain(earlier, later)
    assert gain == pytest.approx(0.0)
    assert half == pytest.approx(1.96 * math.sqrt((0.25 + 0.25 + 1) / 2) / math.sqrt(3))
    assert three.paired_gain(later, earlier) == pytest.approx((-gain, half))
    assert three.paired_gain(earlier[:2], later[3:]) == (0.5, 0.0)


def test_verdict_follows():
    critiques = {"A: x: yes\nB: y: no": "A", "A: x: no\nB: y: yes": "A", "A: x: no": "B"}
    critiques |= {"A: x: yes": "A", "no check": "B", "B: y: no": None}
    rows = [{"critique": text, "verdict": verdict} for text, verdict in critiques.items()]
    assert three.verdict_follows(rows) == (2 / 4, 4)  # two do not decide, no verdict follows none
    assert three.verdict_follows(rows[3:5]) == (None, 0)


# ---- 04: selection -------------------------------------------------------------------------------
EXAMPLE = {"a": 0.1, "b": 0.8, "c": 0.8, "d": 0.0, "e": 0.3}
RETENTION = {0.4: "bc", 0.6: "bce", 1.0: "bcea", 0.0: ""}  # margin 0 is never kept
THRESHOLD = {0.3: "bce", 0.300001: "bc", 0.8: "bc", 0.9: "", 0.0: "bcead"}


@pytest.mark.parametrize("name, rule", [("retention", RETENTION), ("threshold", THRESHOLD)])
def test_select_by_margin(name, rule):
    backwards = dict(list(EXAMPLE.items())[::-1])  # ties go by id
    for value, ids in rule.items():
        assert four.select_by_margin(EXAMPLE, **{name: value}) == list(ids)
        assert four.select_by_margin(backwards, **{name: value}) == list(ids)
        assert four.select_by_margin({}, **{name: value}) == []
    with pytest.raises(ValueError, match="one of them"):
        four.select_by_margin(EXAMPLE, threshold=0.1, retention=0.4)


def test_select_random():
    ids = [f"p{i}" for i in range(10)]
    chosen = four.select_random(ids, 4, 7)
    assert chosen == four.select_random(ids[::-1], 4, 7) == four.select_random(set(ids), 4, 7)
    assert sorted(four.select_random(ids, 99, 0)) == ids
    drawn = [four.select_random(ids, 4, seed) for seed in range(1500)]
    assert {len(set(some)) for some in drawn} == {4}
    for key in ids:  # each has the same chance
        part = sum(key in some for some in drawn) / 1500
        assert abs(part - 0.4) < 4 * (0.24 / 1500) ** 0.5


def sampled(name, s, dropped=None):
    """A critique "<pair>-<order>-<k>" with confidence s in the label; s = None: no verdict."""
    pair, order, _ = name.split("-")
    label = "A" if order == "ab" else "B"
    r = None if s is None else math.log(s / (1 - s)) * (1 if label == "A" else -1)
    row = {"id": name, "pair_id": pair, "order": order, "label": label}
    return row | {"dropped": dropped, "verdict": None if s is None else label, "log_odds": r}


SAMPLES = [
    *(sampled("p-ab-0", 0.9), sampled("p-ab-1", 0.7), sampled("p-ab-2", 0.1, "wrong verdict")),
    sampled("p-ba-0", 0.8),
    sampled("p-ba-1", 0.95, "cites the reference"),  # the right verdict, but it did not pass
    *(sampled("q-ab-0", 0.9), sampled("q-ab-1", 0.1, "wrong verdict")),
    sampled("q-ba-0", 0.4, "wrong verdict"),  # an order that offers nothing
    *(sampled("r-ab-0", 0.6), sampled("r-ab-1", None, "malformed"), sampled("r-ba-0", 0.6)),
]


def test_margins_of_pairs():
    questions = four.critiques_by_question(SAMPLES)
    found = [row["confidence_in_label"] for row in questions["p", "ba"]]
    assert found == pytest.approx([0.8, 0.95], rel=1e-5)
    assert len(questions["r", "ab"]) == 1  # what has no verdict has no confidence
    margins, passing = four.margins_of_pairs(["p", "q", "r", "s"], questions)
    expected = {"p": (0.8 + 0.0) / 2, "q": 0.0, "r": 0.0, "s": 0.0}  # s: no answer at all
    assert margins == pytest.approx(expected)
    ids = {"".join(key): [row["id"] for row in rows] for key, rows in passing.items()}
    assert ids.pop("pab") == ["p-ab-0", "p-ab-1"]  # q and s lack an order: not eligible
    assert ids == {"pba": ["p-ba-0"], "rab": ["r-ab-0"], "rba": ["r-ba-0"]}


@pytest.mark.parametrize(
    "threshold, retention, ids",
    [
        (None, 1.0, ["p-ab-0", "p-ba-0"]),  # of q, r and s the margin is 0
        (0.0, 0.4, ["p-ab-0", "p-ba-0", "r-ab-0", "r-ba-0"]),
        (0.5, 0.4, []),
    ],
)
def test_choose(threshold, retention, ids):
    margins = four.margins_of_pairs(["p", "q", "r", "s"], four.critiques_by_question(SAMPLES))

    def choose(select, seed):
        return four.choose(*margins, select, threshold, retention, seed, iteration=7)

    chosen = choose("margin", 0)
    assert [row["id"] for row in chosen] == ids
    for row in chosen:
        assert row["margin"] == pytest.approx(0.4 if row["pair_id"] == "p" else 0.0)
        assert row["iteration"] == 7
    # controls: as many pairs, any with a passing critique in both orders, whatever its margin
    best = {"p-ab-0", "p-ba-0", "r-ab-0", "r-ba-0"}
    for select, possible in (("best", best), ("random", best | {"p-ab-1"})):
        picked = [choose(select, seed) for seed in range(30)]
        assert {len(rows) for rows in picked} == {len(ids)}
        assert {row["id"] for row in sum(picked, [])} == (possible if ids else set())


def passing_of(ids, n=5):
    """n passing critiques of each order of these pairs."""
    rows = {key: [{"id": f"{key}-{k}", "confidence_in_label": k} for k in range(n)] for key in ids}
    return {(key, order): rows[key] for key in ids for order in ("ab", "ba")}


def test_controls_draw_others_in_each_iteration():
    ids = [f"{i:02d}" for i in range(20)]
    how = (dict.fromkeys(ids, 1.0), passing_of(ids), "random", None, 0.5, 0)
    first, second = four.choose(*how, iteration=1), four.choose(*how, iteration=2)
    pairs_of_first = {row["id"][:2] for row in first}
    assert len(pairs_of_first) == 10 and pairs_of_first != {row["id"][:2] for row in second}
    everything = [four.choose(*how[:4], 1.0, 0, iteration=t) for t in (1, 2)]
    of_first, of_second = ({row["id"] for row in rows} for rows in everything)
    assert of_first != of_second  # other critiques of the same pairs
    # the two orders of a pair and the pairs draw their critiques independently
    assert len({row["id"][3:] for row in first}) > 2
    assert any(a["id"] != b["id"] for a, b in zip(first[::2], first[1::2]))


def test_retention_is_a_part_of_the_pool():
    """Not of the pairs that are eligible, here four of ten."""
    margins = {str(i): i / 10 if i > 5 else 0.0 for i in range(10)}
    passing = passing_of("6789")
    ids = {"margin": ["9-4", "9-4", "8-4", "8-4", "7-4", "7-4"]}
    ids["low"] = ["6-4", "6-4", "7-4", "7-4", "8-4", "8-4"]  # by the smallest margin
    for select in ("margin", "low", "random", "best"):
        chosen = four.choose(margins, passing, select, None, 0.3, 0, iteration=1)
        assert len(chosen) == 6 and {row["id"][0] for row in chosen} <= set("6789")
        assert [row["id"] for row in chosen] == ids.get(select, [row["id"] for row in chosen])


def test_mix_in_makes_up_the_part():
    new = [{"id": f"new-{i}"} for i in range(30)]
    old = [{"id": f"old-{i}"} for i in range(100)]
    for replay, n_old in ((0.25, 10), (0.5, 30), (0.0, 0), (0.9, 100)):  # .9 wants 270, has 100
        rows = four.mix_in(new, old, replay, seed=1)
        assert rows[:30] == new and len(rows) == 30 + n_old
        assert {row["id"] for row in rows[30:]} <= {row["id"] for row in old}
    assert four.mix_in(new, old, 0.25, 1) != four.mix_in(new, old, 0.25, 2)


def test_cut_pools():
    pairs = [{"id": i, "image": f"{i // 2}.png"} for i in range(20)]
    pools = four.cut_pools(pairs, 5, 3)
    # no image is cut in two, so a pool of 5 takes a sixth pair
    assert pools == [pairs[:6], pairs[6:12], pairs[12:18]]
    with pytest.raises(SystemExit, match="used up in iteration 5"):
        four.cut_pools(pairs, 5, 5)
