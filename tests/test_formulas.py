"""Every formula: hand-computed numbers, an independent slow twin on random inputs, and its invariances."""
import inspect
import math
import random
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import both_orders, verdict_log_odds
from conftest import stage

three, four, five = stage("03_train_ift"), stage("04_rejection_sampling"), stage("05_evaluate")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# 03: the losses
# ---------------------------------------------------------------------------------------------------------------------
def slow_nll(logits, labels):
    total, n = 0.0, 0
    for row, targets in zip(logits.double(), labels.tolist()):
        for t, target in enumerate(targets[1:]):  # the token at t + 1 is predicted at t
            if target != -100:
                total, n = total - math.log(row[t].exp()[target] / row[t].exp().sum()), n + 1
    return total, n


def test_nll_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [9.0, 0.0]]])
    # P = (1/4, 3/4), (4/5, 1/5), unused
    nll, n = three.nll_sum(logits, torch.tensor([[-100, 1, 1]]))
    assert n == 2 and nll.item() == pytest.approx(-math.log(3 / 4) - math.log(1 / 5))
    nll, n = three.nll_sum(logits, torch.tensor([[1, -100, 0]]))  # the first label has no predecessor
    assert n == 1 and nll.item() == pytest.approx(-math.log(4 / 5))


@pytest.mark.parametrize("seed", range(4))
def test_nll_slow_twin_and_padding(seed):
    logits, rng = randn(3, 7, 11, seed=seed), torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 11, (3, 7), generator=rng).masked_fill(torch.rand(3, 7, generator=rng) < 0.4, -100)
    nll, n = three.nll_sum(logits, labels)
    assert (nll.item(), n.item()) == (pytest.approx(slow_nll(logits, labels)[0], rel=1e-5), slow_nll(logits, labels)[1])
    for left, right in ((2, 0), (0, 3), (1, 1)):  # unsupervised positions around the row change nothing
        padded = torch.cat([randn(3, left, 11), logits, randn(3, right, 11, seed=9)], 1)
        around = torch.nn.functional.pad(labels.index_fill(1, torch.tensor(0), -100), (left, right), value=-100)
        assert torch.allclose(three.nll_sum(padded, around)[0], nll, rtol=1e-5)
    assert torch.allclose(three.nll_sum(logits + randn(3, 7, 1), labels)[0], nll, rtol=1e-5)  # the softmax's freedom
    assert three.nll_sum(logits.bfloat16(), labels)[0].dtype == torch.float32


def test_ift_loss_by_hand():
    assert three.ift_loss(6.0, 3, 10.0, 4, 0.5) == 6 / 3 + 0.5 * 10 / 4
    assert three.ift_loss(6.0, 3, 0.0, 0, 0.0) == 2.0  # no correct responses at lam = 0


@pytest.mark.parametrize("lam", [0.0, 1 / 3, 1.0])
def test_ift_loss_adds_up_over_micro_batches(lam):
    critique, correct = randn(6, seed=1).abs(), randn(6, seed=2).abs()  # summed NLL of six micro-batches
    parts = [three.ift_loss(a, 40, b, 25, lam) for a, b in zip(critique, correct)]
    whole = three.ift_loss(critique.sum(), 40, correct.sum(), 25, lam)
    assert torch.allclose(sum(parts), whole) and torch.allclose(whole, critique.sum() / 40 + lam * correct.sum() / 25)


def test_bradley_terry():
    loss = three.bradley_terry_loss(torch.tensor([0.0, math.log(3), math.log(3)]), torch.tensor([True, True, False]))
    assert loss.tolist() == pytest.approx([math.log(2), -math.log(3 / 4), -math.log(1 / 4)])
    r, label_is_a = randn(50).requires_grad_(), randn(50, seed=1) > 0
    slow = [-math.log(1 / (1 + math.exp(-x))) if a else -math.log(1 / (1 + math.exp(x)))
            for x, a in zip(r.tolist(), label_is_a)]
    assert three.bradley_terry_loss(r, label_is_a).tolist() == pytest.approx(slow, rel=1e-4)
    assert torch.equal(three.bradley_terry_loss(-r, ~label_is_a), three.bradley_terry_loss(r, label_is_a))
    three.bradley_terry_loss(r, label_is_a).sum().backward()
    assert ((r.grad < 0) == label_is_a).all()  # descent moves r towards the label
    assert three.bradley_terry_loss(torch.tensor([300.0]), torch.tensor([False])).tolist() == [300.0]  # no overflow


# ---------------------------------------------------------------------------------------------------------------------
# The verdict's log-odds, confidence, margin
# ---------------------------------------------------------------------------------------------------------------------
def test_log_odds():
    logits = randn(5, 20) * 4
    log_p = logits.log_softmax(-1)
    assert torch.allclose(verdict_log_odds(logits, 3, 7), log_p[:, 3] - log_p[:, 7], atol=1e-5)
    ids_a, ids_b = torch.tensor([3, 1, 3, 4, 0]), torch.tensor([7, 2, 7, 5, 19])
    slow = [log_p[i, ids_a[i]] - log_p[i, ids_b[i]] for i in range(5)]
    assert torch.allclose(verdict_log_odds(logits, ids_a, ids_b), torch.stack(slow), atol=1e-5)
    assert torch.equal(verdict_log_odds(logits, ids_b, ids_a), -verdict_log_odds(logits, ids_a, ids_b))
    assert verdict_log_odds(logits.bfloat16(), 3, 7).dtype == torch.float32


def fake_sample(quality, verdicts=None):
    """Stands in for common.sample: the log-odds of a judgement is the difference of the two texts' quality."""
    def sample(model, processor, requests, n=1, *_, **__):
        answers = []
        for request in requests:
            a, b = (next(line.split(": ", 1)[1] for line in request["text"].splitlines()
                    if line.startswith(f"Response {side}"))
                    for side in "AB")
            logits = torch.full((1, 5), 2.5)
            logits[0, 0], logits[0, 1] = quality[a], quality[b]
            r = verdict_log_odds(logits, 0, 1).item()
            answers.append([{"text": "x", "complete": True, "verdict": "A" if r > 0 else "B", "log_odds": r}] * n
                           if verdicts is None else verdicts)
        return answers
    return sample


def test_order_swap_flips_the_sign(monkeypatch):
    """A judge that looks at the texts alone gives the same response the same probability in both orders."""
    quality = {f"text {i}": x for i, x in enumerate(randn(8).tolist())}
    monkeypatch.setattr(three.common, "sample", fake_sample(quality))
    pairs = [{"id": str(i), "image": "x.png", "prompt": "q", "chosen": f"text {i}", "rejected": f"text {i + 1}"}
             for i in range(7)]
    rows = three.judge(None, None, [q for pair in pairs for q in both_orders(pair)], ".")
    for ab, ba, pair in zip(rows[::2], rows[1::2], pairs):
        gap = quality[pair["chosen"]] - quality[pair["rejected"]]
        assert ab["probability_a"] == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-6)
        assert ab["probability_a"] == pytest.approx(1 - ba["probability_a"], abs=1e-6)
        assert (ab["verdict"], ba["verdict"]) == (("A", "B") if gap > 0 else ("B", "A"))
        r = torch.tensor([gap, -gap])
        s = four.confidence_in_label(r, torch.tensor([True, False]))
        assert s[0] == s[1] and torch.allclose(-s.log(), three.bradley_terry_loss(r, torch.tensor([True, False])))
    result = three.measure(rows)
    assert result["agreement"] == 1 and result["accuracy_ab"] == result["accuracy_ba"] == result["both"]


@pytest.mark.parametrize("samples, verdict, probability", [
    ([("A", 1.0), ("A", 1.0), ("B", -9.0)], "A", None), ([("B", -1.0), ("A", 3.0), ("B", -1.0)], "B", None),
    ([("A", 3.0), ("B", -1.0)], "A", None), ([("A", 1.0), ("B", -3.0)], "B", None),  # a tie: by the mean probability
    ([("B", -2.0), (None, None), (None, None)], "B", None), ([(None, None), (None, None)], None, 0.5)])
def test_votes(monkeypatch, samples, verdict, probability):
    votes = [{"text": "x", "complete": True, "verdict": v, "log_odds": r} for v, r in samples]
    monkeypatch.setattr(three.common, "sample", fake_sample({"good": 0, "bad": 0}, votes))
    pair = {"id": "1", "image": "x.png", "prompt": "q", "chosen": "good", "rejected": "bad"}
    row = three.judge(None, None, list(both_orders(pair)), ".", votes=len(votes))[0]
    assert row["verdict"] == verdict
    slow = sum(0.5 if r is None else 1 / (1 + math.exp(-r)) for _, r in samples) / len(samples)
    assert row["probability_a"] == pytest.approx(slow if probability is None else probability)


def test_confidence_in_label():
    r = torch.tensor([0.0, math.log(4), math.log(4), -2.0])
    s = four.confidence_in_label(r, torch.tensor([True, True, False, False]))
    assert s.tolist() == pytest.approx([0.5, 0.8, 0.2, 1 / (1 + math.exp(-2.0))])


def test_margin():
    assert four.margin([0.9, 0.2, 0.97], [True, False, False]) == pytest.approx(0.7)
    assert four.margin([0.9, 0.2], [False, False]) == four.margin([], []) == 0.0
    assert four.margin([0.4], [True]) == 0.0
    assert four.margin([0.9, 0.6], [True, True]) == pytest.approx(0.3)  # all right: the least sure one counts too
    with pytest.raises(ValueError):
        four.margin([0.5, 0.6], [True])
    rng = random.Random(0)
    for _ in range(200):
        confidences = [rng.random() for _ in range(rng.randint(1, 6))]
        right = [rng.random() < 0.5 for _ in confidences]
        slow = max((a - b for a, ok in zip(confidences, right) if ok for b in confidences), default=0.0)
        assert four.margin(confidences, right) == slow >= 0


# ---------------------------------------------------------------------------------------------------------------------
# 04: selection
# ---------------------------------------------------------------------------------------------------------------------
EXAMPLE = {"a": 0.1, "b": 0.8, "c": 0.8, "d": 0.0, "e": 0.3}


@pytest.mark.parametrize("rule, ids", [
    ({"retention": 0.4}, "bc"), ({"retention": 0.6}, "bce"), ({"retention": 1.0}, "bcea"), ({"retention": 0.0}, ""),
    ({"threshold": 0.3}, "bce"), ({"threshold": 0.300001}, "bc"), ({"threshold": 0.8}, "bc"), ({"threshold": 0.9}, ""),
    ({"threshold": 0.0}, "bcead")])
def test_select_by_margin(rule, ids):
    for items in (list(EXAMPLE.items()), list(EXAMPLE.items())[::-1]):  # ties by id, not by place
        assert four.select_by_margin(dict(items), **rule) == list(ids)
    assert four.select_by_margin({}, **rule) == []


def test_select_by_margin_slow_twin():
    rng = random.Random(0)
    for _ in range(100):
        margins = {f"p{i:02d}": rng.choice([0.0, 0.25, 0.5, rng.random()]) for i in range(rng.randint(1, 20))}
        share = rng.random()
        left, slow = sorted(margins), []
        for _ in range(round(share * len(margins))):
            best = max(left, key=lambda key: margins[key])  # the first of the largest
            left.remove(best)
            slow += [best] if margins[best] else []
        assert four.select_by_margin(margins, retention=share) == slow
        assert set(four.select_by_margin(margins, threshold=share)) == {key for key in margins if margins[key] >= share}


def test_select_by_margin_wants_one_rule():
    for rule in ({}, {"threshold": 0.1, "retention": 0.4}):
        with pytest.raises(ValueError, match="one of them"):
            four.select_by_margin(EXAMPLE, **rule)


def test_select_random():
    ids = [f"p{i}" for i in range(10)]
    assert four.select_random(ids, 4, 7) == four.select_random(ids[::-1], 4, 7) == four.select_random(set(ids), 4, 7)
    assert four.select_random(ids, 4, 7) != four.select_random(ids, 4, 8)
    assert sorted(four.select_random(ids, 99, 0)) == sorted(ids) and four.select_random([], 3, 0) == []
    drawn = [four.select_random(ids, 4, seed) for seed in range(1500)]
    assert all(len(set(some)) == 4 and set(some) <= set(ids) for some in drawn)
    for key in ids:  # each with probability .4
        assert abs(sum(key in some for some in drawn) / 1500 - 0.4) < 4 * (0.24 / 1500) ** 0.5


def sampled(pair, order, k, s, dropped=None, verdict="A"):
    """A critique with confidence s in the label; s = None: no verdict."""
    r = None if s is None else math.log(s / (1 - s)) * (1 if order == "ab" else -1)
    return {"id": f"{pair}-{order}-{k}", "pair_id": pair, "order": order, "label": "A" if order == "ab" else "B",
            "dropped": dropped, "verdict": verdict, "log_odds": r}


SAMPLES = [
    sampled("p", "ab", 0, 0.9), sampled("p", "ab", 1, 0.7), sampled("p", "ab", 2, 0.1, "wrong verdict", "B"),
    sampled("p", "ba", 0, 0.8), sampled("p", "ba", 1, 0.95, "cites the reference"),
    sampled("q", "ab", 0, 0.9), sampled("q", "ab", 1, 0.1, "wrong verdict"),
    sampled("q", "ba", 0, 0.4, "wrong verdict"),
    sampled("r", "ab", 0, 0.6), sampled("r", "ab", 1, None, "malformed: no verdict line", None),
    sampled("r", "ba", 0, 0.6)]


def test_margins_of_pairs():
    margins, passing = four.margins_of_pairs(SAMPLES)
    assert margins == {"p": pytest.approx((0.8 + 0.0) / 2), "q": 0.0, "r": 0.0}
    assert {key: [row["id"][-1] for row in rows] for key, rows in passing.items()} == {
        ("p", "ab"): ["0", "1"], ("p", "ba"): ["0"], ("q", "ab"): ["0"], ("r", "ab"): ["0"], ("r", "ba"): ["0"]}


@pytest.mark.parametrize("rule, kept", [
    ({"margin": None, "retention": 1.0}, ["p0", "p0"]), ({"margin": 0.0, "retention": 0.4}, ["p0", "p0", "r0", "r0"]),
    ({"margin": 0.5, "retention": 0.4}, [])])
def test_keep(rule, kept):
    def keep(select, seed=0):
        return four.keep(*four.margins_of_pairs(SAMPLES), SimpleNamespace(select=select, seed=seed, **rule), 1)
    assert [row["pair_id"] + row["id"][-1] for row in keep("margin")] == kept
    assert [row["order"] for row in keep("margin")] == ["ab", "ba"] * (len(kept) // 2)
    for select in ("random", "best"):  # as many pairs, any with a passing critique in both orders
        picked = [keep(select, seed) for seed in range(30)]
        assert {len(rows) for rows in picked} == {len(kept)}
        some = {"p-ab-0", "p-ba-0", "r-ab-0", "r-ba-0", *(["p-ab-1"] if select == "random" else [])}
        assert {row["id"] for rows in picked for row in rows} == (some if kept else set())


def test_cut_pools():
    pairs = [{"id": i, "image": f"{i // 2}.png"} for i in range(20)]
    pools = four.cut_pools(pairs, 5, 3)
    assert [[pair["id"] for pair in pool] for pool in pools] == [
        list(range(6)), list(range(6, 12)), list(range(12, 18))]
    with pytest.raises(SystemExit, match="used up after iteration 4"):
        four.cut_pools(pairs, 6, 5)


# ---------------------------------------------------------------------------------------------------------------------
# 05: the measures
# ---------------------------------------------------------------------------------------------------------------------
def judged(key, ab, ba):
    return [{"id": key, "order": "ab", "label": "A", "verdict": ab},
            {"id": key, "order": "ba", "label": "B", "verdict": ba}]


def test_accuracy_by_order():
    rows = judged("1", "A", "B") + judged("2", "A", "A") + judged("3", "B", "A")
    rows += judged("4", None, None) + judged("5", None, "B")
    assert five.accuracy_by_order(rows) == pytest.approx({
        "accuracy_ab": 2 / 5, "accuracy_ba": 2 / 5, "accuracy": 2 / 5, "both": 1 / 5, "agreement": 2 / 5,
        "unparseable": 3 / 10,
        "n_pairs": 5})
    assert five.accuracy_by_order(rows[::-1]) == five.accuracy_by_order(rows)
    always_a = [row for key in "123" for row in judged(key, "A", "A")]
    assert {k: v for k, v in five.accuracy_by_order(always_a).items() if k != "n_pairs"} == {
        "accuracy_ab": 1, "accuracy_ba": 0, "accuracy": 0.5, "both": 0, "agreement": 0, "unparseable": 0}


def slow_ece(probability, correct, bins):
    error = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(probability) if b / bins < p <= (b + 1) / bins or (b == 0 and p == 0)]
        if inside:
            error += abs(sum(probability[i] - correct[i] for i in inside)) / len(probability)
    return error


def test_calibration_error():
    #           (.6, .7]: mean .65, half right      (.9, 1]: mean .95, all right
    error = five.expected_calibration_error([0.62, 0.68, 0.92, 0.98], [True, False, True, True])
    assert error == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)
    assert five.expected_calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0.0
    rng = random.Random(0)
    for bins in (1, 2, 7, 10, 15):
        probability = [rng.random() for _ in range(150)] + [k / bins for k in range(bins + 1)]
        correct = [rng.random() < p for p in probability]
        error = five.expected_calibration_error(probability, correct, bins)
        assert error == pytest.approx(slow_ece(probability, correct, bins))


@pytest.mark.parametrize("edge", range(1, 10))
def test_calibration_bins_are_closed_on_the_right(edge):
    p = edge / 10  # shares its bin with p - .05
    error = five.expected_calibration_error([p, p - 0.05, p + 0.05], [True, False, True])
    assert error == pytest.approx((abs(p - 1 + p - 0.05) + abs(p + 0.05 - 1)) / 3)


def test_calibration_bins_of_a_twentieth():
    probability, correct = [0.52, 0.55, 0.58], [False, True, True]
    error = five.expected_calibration_error(probability, correct, 20)
    assert error == pytest.approx(slow_ece(probability, correct, 20))


def slow_bootstrap(values, clusters, n, seed):
    rng, groups = random.Random(seed), {}
    for value, cluster in zip(values, clusters):
        groups.setdefault(cluster, []).append(value)
    means = []
    for _ in range(n):
        drawn = [value for group in rng.choices(list(groups.values()), k=len(groups)) for value in group]
        means.append(sum(drawn) / len(drawn))
    return tuple(np.percentile(means, [2.5, 97.5]))


def test_bootstrap_is_close_to_the_normal_interval():
    values = randn(400).tolist()
    low, high = five.cluster_bootstrap(values, range(400))
    half = 1.96 * np.std(values) / 20
    assert (low, high) == (pytest.approx(np.mean(values) - half, abs=0.1 * half),
                           pytest.approx(np.mean(values) + half, abs=0.1 * half))
    assert five.cluster_bootstrap(values, range(400)) == (low, high)
    assert five.cluster_bootstrap(values, range(400), seed=1) != (low, high)


def test_bootstrap_of_clusters():
    rng = random.Random(0)
    clusters = [f"{i}.png" for i in range(30) for _ in range(1 + i % 5)]  # unequal sizes
    level = {cluster: rng.random() for cluster in clusters}
    values = [float(rng.random() < level[cluster]) for cluster in clusters]
    fast, slow = five.cluster_bootstrap(values, clusters), slow_bootstrap(values, clusters, 4000, 1)
    assert fast == pytest.approx(slow, abs=0.012)
    width = lambda interval: interval[1] - interval[0]
    copied, groups = [v for v in (0.0, 1.0) * 20 for _ in range(5)], [i for i in range(40) for _ in range(5)]
    clustered, independent = five.cluster_bootstrap(copied, groups), five.cluster_bootstrap(copied, range(200))
    assert width(clustered) > 2 * width(independent)  # sqrt(5)
    assert five.cluster_bootstrap([0.25] * 9, [0, 0, 1, 1, 1, 2, 3, 4, 4]) == (0.25, 0.25)
    assert all(isinstance(x, float) for x in fast)


def test_knockout():
    rng, asked = random.Random(0), []
    candidates = {key: [f"{rng.random():.6f}" for _ in range(8)] for key in "xyz"}

    def prefer(games):  # the larger number wins: a transitive preference
        asked.extend(games)
        return [a > b for _, a, b in games]
    winners = four.knockout(candidates, prefer)
    assert winners == {key: [max(texts[:n]) for n in (1, 2, 4, 8)] for key, texts in candidates.items()}
    assert len(asked) == len(set(asked)) == 3 * 7  # one tournament serves all sizes
    small = four.knockout({key: texts[:4] for key, texts in candidates.items()}, prefer)
    assert all(winners[key][:3] == small[key] for key in winners)  # N = 4 is the first half of N = 8
    assert four.knockout({"x": ["only"]}, prefer) == {"x": ["only"]}


# ---------------------------------------------------------------------------------------------------------------------
# The formulas can be copied
# ---------------------------------------------------------------------------------------------------------------------
LABELS = torch.tensor([[-100, 2, 3, 1], [-100, -100, 0, 4]])
A_OR_B = torch.tensor([True, False, True])


@pytest.mark.parametrize("module, name, arguments", [
    (three, "nll_sum", (randn(2, 4, 5), LABELS)), (three, "ift_loss", (6.0, 3, 10.0, 4, 0.5)),
    (three, "bradley_terry_loss", (randn(3), A_OR_B)), (four, "confidence_in_label", (randn(3), A_OR_B)),
    (four, "margin", ([0.9, 0.2, 0.97], [True, False, False])), (four, "select_by_margin", (EXAMPLE, None, 0.4)),
    (four, "select_random", (list("abcdef"), 3, 0)), (stage("common"), "verdict_log_odds", (randn(2, 9), 3, 5))])
def test_formulas_run_when_pasted_into_an_empty_file(module, name, arguments):
    imports = "import random\n" if name == "select_random" else "import torch\nimport torch.nn.functional as F\n"
    namespace = {}
    exec(imports + textwrap.dedent(inspect.getsource(getattr(module, name))), namespace)
    pasted, original = namespace[name](*arguments), getattr(module, name)(*arguments)
    assert str(pasted) == str(original)
