"""Stage 01: verification, pairing, swaps, splits."""
import random
from collections import Counter

import pytest
from conftest import stage

one = stage("01_build_preferences")
VOCABULARY = one.build_vocabulary(["dog", "cat", "hot dog", "person", "apple", "bus", "umbrella", "sheep", "mouse"],
                                  {"person": ["man"], "dog": ["puppy"]})


def found(name, confidence):
    return {"object": name, "confidence": confidence, "box": [0, 0, 1, 1]}


@pytest.mark.parametrize("confidences, status", [
    ([0.5], "present"), ([0.51], "present"), ([0.4999], "unsure"), ([0.05], "unsure"), ([0.0499], "absent"),
    ([], "absent"),
    ([0.01, 0.9, 0.3], "present"), ([0.01, 0.2], "unsure"), ([0.01, 0.02], "absent")])
def test_verify(confidences, status):
    detections = [found("cat", 0.99), *(found("dog", c) for c in confidences)]
    assert one.verify(["dog"], detections, 0.5, 0.05, {"dog", "cat"}) == {"dog": status}
    assert one.verify(["dog"], detections, 0.5, 0.05, {"cat"}) == {"dog": "unsure"}  # a class the expert does not know


def test_verify_many():
    status = one.verify(["dog", "ufo", "cat"], [found("dog", 0.7)], 0.5, 0.05, {"dog", "cat"})
    assert status == {"dog": "present", "ufo": "unsure", "cat": "absent"}
    assert one.verify([], [found("dog", 0.7)], 0.5, 0.05, {"dog"}) == {}


STATUS = {"dog": "present", "cat": "present", "apple": "present", "bus": "absent", "umbrella": "absent",
          "person": "unsure"}


def candidates(*texts):
    return [(text, one.find_mentions(text, VOCABULARY)) for text in texts]


@pytest.mark.parametrize("texts, chosen, rejected", [
    (["A dog.", "A dog and a cat.", "A bus."], 1, 2),                                  # most present ones win
    (["A dog.", "A cat.", "A bus.", "A bus."], 0, 2),                                  # ties go to the earlier
    (["A bus.", "A dog.", "A bus, a dog and a cat."], 1, 2),                           # rejected: closest to the scene
    (["A dog, a man.", "A dog.", "A dog and a bus."], 0, 2),                           # unsure neither helps nor harms
    (["A bus and an umbrella.", "An apple."], 1, 0)])
def test_pair_sampled(texts, chosen, rejected):
    pair = one.pair_candidates(candidates(*texts), STATUS, ["umbrella"], VOCABULARY, random.Random(0))
    assert pair == (texts[chosen], texts[rejected], "sampled")


def test_pair_swapped():
    pairs = {one.pair_candidates(candidates("A dog and a cat, a man."), STATUS, ["umbrella", "bus"], VOCABULARY,
                                 random.Random(s))
             for s in range(20)}
    assert pairs == {("A dog and a cat, a man.", "An umbrella and a cat, a man.", "swapped"),
                     ("A dog and a cat, a man.", "A dog and an umbrella, a man.", "swapped")}  # either object


@pytest.mark.parametrize("texts, swaps, reason", [
    (["A bus.", "A dog and a bus."], ["umbrella"], "no candidate without hallucination"),
    (["A man."], ["umbrella"], "no candidate without hallucination"),  # names nothing that is surely there
    ([], ["umbrella"], "no candidate without hallucination"),
    (["A dog."], [], "no candidate hallucinates, no absent object to swap in")])
def test_pair_impossible(texts, swaps, reason):
    assert one.pair_candidates(candidates(*texts), STATUS, swaps, VOCABULARY, random.Random(0)) == (None, None, reason)


@pytest.mark.parametrize("chosen, rejected, reason", [
    (["dog"], ["dog", "bus"], None), ([], ["bus"], None), (["person"], ["bus"], None),
    ([], [], "names no object of the vocabulary"),
    (["dog", "bus"], ["bus"], "chosen hallucinates by the expert"),
    (["dog"], ["cat"], "rejected does not hallucinate by the expert"),
    (["dog"], ["person"], "rejected does not hallucinate by the expert")])
def test_given_pair(chosen, rejected, reason):
    assert one.check_given_pair(chosen, rejected, STATUS) == reason


@pytest.mark.parametrize("text, old, new, swapped", [
    ("A dog sits.", "dog", "cat", "A cat sits."),
    ("A dog sits.", "dog", "apple", "An apple sits."),
    ("I see an apple here.", "apple", "dog", "I see a dog here."),
    ("Two dogs and a puppy, one dog.", "dog", "bus", "Two buses and a bus, one bus."),
    ("Two puppies.", "dog", "mouse", "Two mice."),
    ("A big dog; the dog and no dog.", "dog", "apple", "A big apple; the apple and no dog."),  # negated: left alone
    ("A hot dog, a dog.", "dog", "cat", "A hot dog, a cat."),
    ("A hot dog, a dog.", "hot dog", "apple", "An apple, a dog."),
    ("A cat.", "dog", "bus", "A cat."), ("", "dog", "bus", "")])
def test_swap_object(text, old, new, swapped):
    assert one.swap_object(text, old, new, VOCABULARY) == swapped


@pytest.mark.parametrize("text, old, swapped", [
    ("two men", "person", "two apples"), ("Mice and a dog", "mouse", "Apples and a dog"),
    ("A sheep stands there.", "sheep", "An apple stands there.")])
def test_swap_object_irregular(text, old, swapped):
    assert one.swap_object(text, old, "apple", VOCABULARY) == swapped


def test_propose_swaps():
    classes = [f"c{i}" for i in range(12)]
    often, sometimes = frozenset(("c3", "c0")), frozenset(("c4", "c1"))
    counts = Counter({often: 8, sometimes: 2, frozenset(("c5", "c6")): 100})  # c5 and c6: not here

    def draw(seed, n=8):
        return one.propose_swaps(["c0", "c1"], counts, classes, random.Random(seed), n)

    assert draw(1) == draw(1) and draw(1) != draw(2)
    assert one.propose_swaps(["c1", "c0"], counts, classes, random.Random(1)) == draw(1)
    for seed in range(50):
        proposed = draw(seed)
        assert len(proposed) == len(set(proposed)) == 8 and not {"c0", "c1"} & set(proposed)
    assert sorted(draw(0, 100)) == sorted(set(classes) - {"c0", "c1"})
    # The first proposal falls on class c with probability weight / sum of weights: 9, 3, and 1 for each of 8 others.
    first = Counter(draw(seed)[0] for seed in range(2000))
    for name, share in (("c3", 9 / 20), ("c4", 3 / 20), ("c5", 1 / 20), ("c9", 1 / 20)):
        assert abs(first[name] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5, name


def test_assign_splits():
    rows = [{"id": f"{i}-{k}", "image": f"{i}.png"} for i in range(60) for k in range(1 + i % 3)]  # 120 pairs
    placed = one.assign_splits(rows, 20, 50, seed=3)
    assert sorted(row["id"] for row in placed) == sorted(row["id"] for row in rows)
    images = {split: {row["image"] for row in placed if row["split"] == split}
              for split in ("validation", "train", "pool")}
    assert sum(map(len, images.values())) == 60 and len(set.union(*images.values())) == 60  # no image in two splits
    sizes = Counter(row["split"] for row in placed)
    assert 20 <= sizes["validation"] < 23 and 70 <= sizes["validation"] + sizes["train"] < 73
    again = one.assign_splits(rows[::-1], 20, 50, seed=3)
    assert {row["id"]: row["split"] for row in placed} == {row["id"]: row["split"] for row in again}
    assert [row["image"] for row in placed] != [row["image"] for row in one.assign_splits(rows, 20, 50, seed=4)]
    assert Counter(row["split"] for row in one.assign_splits(rows[:10], 200, 50, 0)) == {"validation": 10}


def test_build_pair_carries_its_evidence():
    item = {"id": "7", "image": "7.png", "prompt": "What is there?"}
    texts = ["A dog and a man.", "A dog and a bus."]
    detections = [found("dog", 0.9), found("dog", 0.6), found("person", 0.3)]
    status = one.verify(["dog", "person", "bus"], detections, 0.5, 0.05, {"dog", "bus", "person"})
    row, reason = one.build_pair(item, texts, [one.find_mentions(t, VOCABULARY) for t in texts], [], detections, status,
                                 VOCABULARY, 0)
    assert reason is None and (row["chosen"], row["rejected"], row["hallucinated"]) == (*texts, ["bus"])
    assert [(e["object"], e["claimed_by"], e["status"], e["confidence"]) for e in row["evidence"]] == [
        ("dog", "both", "present", 0.9), ("person", "chosen", "unsure", 0.3), ("bus", "rejected", "absent", 0.0)]
