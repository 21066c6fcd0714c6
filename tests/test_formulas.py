"""The pure functions of 03 and 04: numbers by hand, slow twins on random inputs, invariances."""

import importlib
import math
import random

import pytest
import torch

from common import verdict_log_odds

three = importlib.import_module("03_train_ift")
four = importlib.import_module("04_rejection_sampling")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- 03: the losses ------------------------------------------------------------------------------
def slow_nll(logits, labels):
    total, n = 0.0, 0
    for row, targets in zip(logits.double(), labels.tolist()):
        for t, target in enumerate(targets[1:]):  # the token at t + 1 is predicted at t
            if target != -100:
                total -= math.log(row[t].exp()[target] / row[t].exp().sum())
                n += 1
    return total, n


def test_nll_by_hand():
    # P = (1/4, 3/4), (4/5, 1/5), unused
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [9.0, 0.0]]])
    nll, n = three.nll_sum(logits, torch.tensor([[-100, 1, 1]]))
    assert n == 2
    assert nll.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5))
    # the first label has no predecessor
    nll, n = three.nll_sum(logits, torch.tensor([[1, -100, 0]]))
    assert n == 1
    assert nll.item() == pytest.approx(-math.log(4 / 5))


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


@pytest.mark.parametrize("left, right", [(2, 0), (0, 3), (1, 1)])
def test_nll_ignores_unsupervised_positions_around_a_row(left, right):
    logits, labels = randn(3, 7, 11), random_labels(0)
    labels[:, 0] = -100
    padded = torch.cat([randn(3, left, 11), logits, randn(3, right, 11, seed=9)], 1)
    around = torch.nn.functional.pad(labels, (left, right), value=-100)
    nll, n = three.nll_sum(logits, labels)
    padded_nll, padded_n = three.nll_sum(padded, around)
    assert torch.allclose(padded_nll, nll, rtol=1e-5)
    assert padded_n == n


def test_ift_loss_by_hand():
    assert three.ift_loss(6.0, 3, 10.0, 4, 0.5) == 6 / 3 + 0.5 * 10 / 4
    assert three.ift_loss(6.0, 3, 0.0, 0, 0.0) == 2.0  # no correct responses at lam = 0


@pytest.mark.parametrize("lam", [0.0, 1 / 3, 1.0])
def test_ift_loss_adds_up_over_micro_batches(lam):
    critique, correct = randn(6, seed=1).abs(), randn(6, seed=2).abs()  # summed NLL of six of them
    parts = [three.ift_loss(a, 40, b, 25, lam) for a, b in zip(critique, correct)]
    whole = three.ift_loss(critique.sum(), 40, correct.sum(), 25, lam)
    assert torch.allclose(sum(parts), whole)
    assert torch.allclose(whole, critique.sum() / 40 + lam * correct.sum() / 25)


def test_bradley_terry_by_hand():
    r = torch.tensor([0.0, math.log(3), math.log(3)])
    loss = three.bradley_terry_loss(r, torch.tensor([True, True, False]))
    assert loss.tolist() == pytest.approx([math.log(2), -math.log(3 / 4), -math.log(1 / 4)])
    extreme = three.bradley_terry_loss(torch.tensor([300.0]), torch.tensor([False]))
    assert extreme.tolist() == [300.0]  # no overflow


def test_bradley_terry_slow_twin():
    r = randn(50).requires_grad_()
    label_is_a = randn(50, seed=1) > 0
    loss = three.bradley_terry_loss(r, label_is_a)
    signed = [x if is_a else -x for x, is_a in zip(r.tolist(), label_is_a)]
    assert loss.tolist() == pytest.approx([-math.log(sigmoid(x)) for x in signed], rel=1e-4)
    swapped = three.bradley_terry_loss(-r, ~label_is_a)
    assert torch.allclose(swapped, loss)
    loss.sum().backward()
    assert ((r.grad < 0) == label_is_a).all()  # descent moves r towards the label


# ---- 03: the order of rows, the learning rate ----------------------------------------------------
def test_rows_of_step_are_shuffled_epochs_cut_into_steps():
    rows = list("abcdefg")
    steps = [three.rows_of_step(rows, step, 4, seed=3) for step in range(7)]
    assert {len(step) for step in steps} == {4}
    joined = sum(steps, [])  # 28 rows: four epochs
    epochs = [joined[start : start + 7] for start in range(0, 28, 7)]
    for epoch in epochs:
        assert sorted(epoch) == rows
        assert epoch != rows
    assert epochs[0] != epochs[1]
    assert rows == list("abcdefg")  # not shuffled in place
    other = [three.rows_of_step(rows, step, 4, seed=4) for step in range(7)]
    assert other != steps


def test_rows_of_step_repeats_few_rows_within_a_step():
    step = three.rows_of_step(["a", "b", "c"], 5, 6, seed=0)
    assert sorted(step[:3]) == sorted(step[3:]) == ["a", "b", "c"]
    assert step == three.rows_of_step(["a", "b", "c"], 5, 6, seed=0)


def test_learning_rate_by_hand():
    # 40 steps: two of warm-up, then 38 of decay from 1 to a tenth
    rates = [three.learning_rate(step, 40, 2.0) for step in range(40)]
    assert rates[:3] == pytest.approx([1.0, 2.0, 2.0])
    assert rates[21] == pytest.approx(2.0 * (1 - 0.9 * 19 / 38))
    assert rates[39] == pytest.approx(2.0 * (1 - 0.9 * 37 / 38))
    for i in range(2, 39):
        assert rates[i] > rates[i + 1] > 0.2
    assert three.learning_rate(0, 1, 2.0) == 2.0  # a single step is taken at the full rate


# ---- The verdict's log-odds, votes, confidence, margin -------------------------------------------
def test_log_odds():
    logits = randn(5, 20) * 4
    log_p = logits.log_softmax(-1)
    expected = log_p[:, 3] - log_p[:, 7]
    assert torch.allclose(verdict_log_odds(logits, 3, 7), expected, atol=1e-5)
    assert verdict_log_odds(logits.bfloat16(), 3, 7).dtype == torch.float32


def test_log_odds_with_other_tokens_in_each_row():
    logits = randn(5, 20) * 4
    log_p = logits.log_softmax(-1)
    ids_a, ids_b = torch.tensor([3, 1, 3, 4, 0]), torch.tensor([7, 2, 7, 5, 19])
    slow = [log_p[i, ids_a[i]] - log_p[i, ids_b[i]] for i in range(5)]
    r = verdict_log_odds(logits, ids_a, ids_b)
    assert torch.allclose(r, torch.stack(slow), atol=1e-5)
    assert torch.equal(verdict_log_odds(logits, ids_b, ids_a), -r)


@pytest.mark.parametrize(
    "votes, verdict",
    [
        ([("A", 2.0)], "A"),
        ([("B", -1.0)], "B"),
        ([("A", 0.1), ("A", 0.1), ("B", -9.0)], "A"),  # the majority, not the mean
        ([("B", -1.0), ("A", 3.0), ("B", -1.0)], "B"),
        ([("A", 3.0), ("B", -1.0)], "A"),  # a tie: by the mean probability
        ([("A", 1.0), ("B", -3.0)], "B"),
        ([("B", -2.0), (None, None), (None, None)], "B"),  # no verdict is no vote
        ([(None, None), (None, None)], None),
    ],
)
def test_decide(votes, verdict):
    samples = [{"verdict": letter, "log_odds": r} for letter, r in votes]
    found, probability = three.decide(samples)
    assert found == verdict
    shares = [0.5 if r is None else sigmoid(r) for _, r in votes]
    assert probability == pytest.approx(sum(shares) / len(shares))


def test_confidence_in_label():
    r = torch.tensor([0.0, math.log(4), math.log(4), -2.0])
    label_is_a = torch.tensor([True, True, False, False])
    s = four.confidence_in_label(r, label_is_a)
    assert s.tolist() == pytest.approx([0.5, 0.8, 0.2, sigmoid(2.0)])
    assert torch.allclose(-s.log(), three.bradley_terry_loss(r, label_is_a))


def test_margin_by_hand():
    assert four.margin([0.9, 0.2, 0.97], [True, False, False]) == pytest.approx(0.7)
    assert four.margin([0.9, 0.2], [False, False]) == 0.0
    assert four.margin([], []) == 0.0
    assert four.margin([0.4], [True]) == 0.0
    # all right: the least sure one counts, too
    assert four.margin([0.9, 0.6], [True, True]) == pytest.approx(0.3)
    with pytest.raises(ValueError):
        four.margin([0.5, 0.6], [True])


def test_margin_slow_twin():
    rng = random.Random(0)
    for _ in range(200):
        confidences = [rng.random() for _ in range(rng.randint(1, 6))]
        right = [rng.random() < 0.5 for _ in confidences]
        slow = 0.0
        for a, ok in zip(confidences, right):
            for b in confidences:
                if ok:
                    slow = max(slow, a - b)
        assert four.margin(confidences, right) == slow


# ---- 03: the measures of judgement rows ----------------------------------------------------------
def judged(key, ab, ba):
    """The two rows of a pair, by its verdicts in the orders ab and ba."""
    return [
        {"id": key, "order": "ab", "label": "A", "verdict": ab},
        {"id": key, "order": "ba", "label": "B", "verdict": ba},
    ]


def test_accuracy_by_order():
    rows = judged("1", "A", "B") + judged("2", "A", "A") + judged("3", "B", "A")
    rows += judged("4", None, None) + judged("5", None, "B") + judged("6", "A", "B")
    expected = {
        "accuracy": (3 / 6 + 3 / 6) / 2,
        "accuracy_ab": 3 / 6,
        "accuracy_ba": 3 / 6,
        "both": 2 / 6,
        "agreement": 3 / 6,  # pair 3 is wrong twice, so the same response wins
        "unparseable": 3 / 12,
        "n_pairs": 6,
    }
    assert three.accuracy_by_order(rows) == pytest.approx(expected)
    assert three.accuracy_by_order(rows[::-1]) == pytest.approx(expected)


def test_accuracy_of_a_judge_that_always_says_a():
    result = three.accuracy_by_order(judged("1", "A", "A") + judged("2", "A", "A"))
    assert (result["accuracy_ab"], result["accuracy_ba"], result["accuracy"]) == (1, 0, 0.5)
    assert (result["both"], result["agreement"], result["unparseable"]) == (0, 0, 0)


def test_accuracy_weighs_the_orders_alike():
    rows = judged("1", "A", "A") + judged("2", "A", "A")[:1] + judged("3", "A", "A")[:1]
    result = three.accuracy_by_order(rows)
    assert (result["accuracy_ab"], result["accuracy_ba"]) == (1, 0)
    assert result["accuracy"] == 0.5  # not 3 of 4


def test_mean_bradley_terry():
    rows = [
        {"probability_a": 0.8, "label": "A"},
        {"probability_a": 0.8, "label": "B"},
        {"probability_a": 0.5, "label": "B"},
    ]
    slow = -(math.log(0.8) + math.log(0.2) + math.log(0.5)) / 3
    assert three.mean_bradley_terry(rows) == pytest.approx(slow, rel=1e-5)
    # certain and wrong: large, but a number
    certain = three.mean_bradley_terry([{"probability_a": 0.0, "label": "A"}])
    assert certain == pytest.approx(-math.log(1e-6), rel=1e-3)


# ---- 04: selection -------------------------------------------------------------------------------
EXAMPLE = {"a": 0.1, "b": 0.8, "c": 0.8, "d": 0.0, "e": 0.3}


@pytest.mark.parametrize(
    "rule, ids",
    [
        ({"retention": 0.4}, "bc"),
        ({"retention": 0.6}, "bce"),
        ({"retention": 1.0}, "bcea"),  # margin 0 is never kept
        ({"retention": 0.0}, ""),
        ({"threshold": 0.3}, "bce"),
        ({"threshold": 0.300001}, "bc"),
        ({"threshold": 0.8}, "bc"),
        ({"threshold": 0.9}, ""),
        ({"threshold": 0.0}, "bcead"),
    ],
)
def test_select_by_margin(rule, ids):
    backwards = dict(list(EXAMPLE.items())[::-1])
    assert four.select_by_margin(EXAMPLE, **rule) == list(ids)
    assert four.select_by_margin(backwards, **rule) == list(ids)  # ties by id, not by place
    assert four.select_by_margin({}, **rule) == []


def test_select_by_margin_slow_twin():
    rng = random.Random(0)
    for _ in range(100):
        size = rng.randint(1, 20)
        margins = {f"p{i:02d}": rng.choice([0.0, 0.25, 0.5, rng.random()]) for i in range(size)}
        share = rng.random()
        left, slow = sorted(margins), []
        for _ in range(round(share * size)):
            best = max(left, key=margins.get)  # the first of the largest
            left.remove(best)
            if margins[best] > 0:
                slow.append(best)
        assert four.select_by_margin(margins, retention=share) == slow
        above = {key for key in margins if margins[key] >= share}
        assert set(four.select_by_margin(margins, threshold=share)) == above


@pytest.mark.parametrize("rules", [{}, {"threshold": 0.1, "retention": 0.4}])
def test_select_by_margin_wants_one_rule(rules):
    with pytest.raises(ValueError, match="one of them"):
        four.select_by_margin(EXAMPLE, **rules)


def test_select_random():
    ids = [f"p{i}" for i in range(10)]
    chosen = four.select_random(ids, 4, 7)
    assert chosen == four.select_random(ids[::-1], 4, 7) == four.select_random(set(ids), 4, 7)
    assert chosen != four.select_random(ids, 4, 8)
    assert sorted(four.select_random(ids, 99, 0)) == sorted(ids)
    assert four.select_random([], 3, 0) == []


def test_select_random_gives_each_the_same_chance():
    ids = [f"p{i}" for i in range(10)]
    drawn = [four.select_random(ids, 4, seed) for seed in range(1500)]
    for some in drawn:
        assert len(set(some)) == 4
    for key in ids:
        share = sum(key in some for some in drawn) / 1500
        assert abs(share - 0.4) < 4 * (0.24 / 1500) ** 0.5


def sampled(pair, order, k, s, dropped=None, verdict="A"):
    """A critique with confidence s in the label; s = None: no verdict."""
    label = "A" if order == "ab" else "B"
    r = None
    if s is not None:
        r = math.log(s / (1 - s))  # log-odds of the label
        if label == "B":
            r = -r
    row = {"id": f"{pair}-{order}-{k}", "pair_id": pair, "order": order, "label": label}
    return row | {"dropped": dropped, "verdict": verdict, "log_odds": r}


SAMPLES = [
    sampled("p", "ab", 0, 0.9),
    sampled("p", "ab", 1, 0.7),
    sampled("p", "ab", 2, 0.1, "wrong verdict", "B"),
    sampled("p", "ba", 0, 0.8),
    sampled("p", "ba", 1, 0.95, "cites the reference"),  # right, but it did not pass
    sampled("q", "ab", 0, 0.9),
    sampled("q", "ab", 1, 0.1, "wrong verdict"),
    sampled("q", "ba", 0, 0.4, "wrong verdict"),  # an order that offers nothing
    sampled("r", "ab", 0, 0.6),
    sampled("r", "ab", 1, None, "malformed: unfinished, or no verdict line", None),
    sampled("r", "ba", 0, 0.6),
]


def margins_and_passing():
    return four.margins_of_pairs(["p", "q", "r", "s"], four.confident_rows(SAMPLES))


def test_confident_rows():
    questions = four.confident_rows(SAMPLES)
    found = [row["confidence_in_label"] for row in questions["p", "ba"]]
    assert found == pytest.approx([0.8, 0.95], rel=1e-5)
    assert len(questions["r", "ab"]) == 1  # what has no verdict has no confidence
    assert "confidence_in_label" not in SAMPLES[0]


def test_margins_of_pairs():
    margins, passing = margins_and_passing()
    expected = {"p": (0.8 + 0.0) / 2, "q": 0.0, "r": 0.0, "s": 0.0}  # s: no answer at all
    assert margins == pytest.approx(expected)
    ids = []
    for rows in passing.values():
        ids += [row["id"] for row in rows]
    assert ids == ["p-ab-0", "p-ab-1", "p-ba-0", "q-ab-0", "r-ab-0", "r-ba-0"]
    for (pair_id, order), rows in passing.items():
        for row in rows:
            assert (row["pair_id"], row["order"]) == (pair_id, order)


def keep(select, threshold, retention, seed=0):
    margins, passing = margins_and_passing()
    return four.keep(margins, passing, select, threshold, retention, seed, iteration=1)


RULES = [
    (None, 1.0, ["p-ab-0", "p-ba-0"]),  # of q, r and s the margin is 0
    (0.0, 0.4, ["p-ab-0", "p-ba-0", "r-ab-0", "r-ba-0"]),
    (0.5, 0.4, []),
]


@pytest.mark.parametrize("threshold, retention, ids", RULES)
def test_keep_by_margin(threshold, retention, ids):
    kept = keep("margin", threshold, retention)
    assert [row["id"] for row in kept] == ids
    for row in kept:
        assert row["margin"] == pytest.approx(0.4 if row["pair_id"] == "p" else 0.0)
        assert row["iteration"] == 1


@pytest.mark.parametrize("threshold, retention, ids", RULES)
@pytest.mark.parametrize("select", ["random", "best"])
def test_controls_keep_as_many_pairs(select, threshold, retention, ids):
    picked = [keep(select, threshold, retention, seed) for seed in range(30)]
    assert {len(rows) for rows in picked} == {len(ids)}
    found = {row["id"] for row in sum(picked, [])}
    # any pair with a passing critique in both orders, whatever its margin
    possible = {"p-ab-0", "p-ba-0", "r-ab-0", "r-ba-0"}
    if select == "random":
        possible.add("p-ab-1")
    assert found == (possible if ids else set())


def test_controls_draw_others_in_each_iteration():
    margins = {str(i): 1.0 for i in range(20)}
    passing = {}
    for key in margins:
        for order in ("ab", "ba"):
            passing[key, order] = [{"id": f"{key}-{k}", "confidence_in_label": k} for k in range(5)]
    first = four.keep(margins, passing, "random", None, 0.5, 0, iteration=1)
    second = four.keep(margins, passing, "random", None, 0.5, 0, iteration=2)
    pairs_of_first = {row["id"].split("-")[0] for row in first}
    assert len(pairs_of_first) == 10
    assert pairs_of_first != {row["id"].split("-")[0] for row in second}
    # the two orders of a pair and the pairs draw their critiques independently
    places = {row["id"].split("-")[1] for row in first}
    assert len(places) > 2


def test_retention_is_a_share_of_the_pool():
    margins = {str(i): i / 10 for i in range(10)}
    passing = {}
    for key in margins:
        for order in ("ab", "ba"):
            passing[key, order] = []
            if key in "6789":  # only four of the ten are eligible
                passing[key, order] = [{"id": key, "confidence_in_label": 0.9}]
    eligible = list("6789")
    for rule in (four.pairs_by_margin, four.pairs_at_random):
        assert len(rule(margins, eligible, None, 0.4, 0)) == 4
    kept = four.keep(margins, passing, "margin", None, 0.3, 0, iteration=1)
    assert [row["id"] for row in kept] == ["9", "9", "8", "8", "7", "7"]


def test_mix_in_makes_up_the_share():
    kept = [{"id": f"new-{i}"} for i in range(30)]
    old = [{"id": f"old-{i}"} for i in range(100)]
    for replay, n_old in ((0.25, 10), (0.5, 30), (0.0, 0), (0.9, 100)):  # .9 wants 270, has 100
        rows = four.mix_in(kept, old, replay, seed=1)
        assert rows[:30] == kept
        assert len(rows) == 30 + n_old
        assert {row["id"] for row in rows[30:]} <= {row["id"] for row in old}
    assert four.mix_in(kept, old, 0.25, 1) != four.mix_in(kept, old, 0.25, 2)


def test_cut_pools():
    pairs = [{"id": i, "image": f"{i // 2}.png"} for i in range(20)]
    pools = four.cut_pools(pairs, 5, 3)
    # no image is cut in two, so a pool of 5 takes a sixth pair
    assert pools == [pairs[:6], pairs[6:12], pairs[12:18]]
    with pytest.raises(SystemExit, match="used up after iteration 4"):
        four.cut_pools(pairs, 5, 5)
