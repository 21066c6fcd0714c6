"""Stage 01 but for its experts: verification, pairing, swaps, splits, what is asked, and main."""

import json
import os
import random
from collections import Counter

import numpy as np
import pytest
from conftest import read_rows, stage
from PIL import Image

import common

one = stage("01_build_preferences")
draw_contact_sheet = one.draw_contact_sheet  # which takes seconds: main's tests leave it out
STATUS = {"dog": "present", "cat": "present", "apple": "present", "bus": "absent"}
STATUS |= {"umbrella": "absent", "person": "unsure"}
CLASSES = ["hot dog", *STATUS]
VOCABULARY = one.build_vocabulary(CLASSES, {"person": ["man"]})


def found(name, confidence, box=(0, 0, 1, 1)):
    return {"object": name, "confidence": confidence, "box": list(box)}


# ---- verify, pair --------------------------------------------------------------------------------
CONFIDENCES = [([0.5], "present"), ([0.4999], "unsure"), ([0.05], "unsure"), ([0.0499], "absent")]
CONFIDENCES += [([], "absent"), ([0.01, 0.9, 0.3], "present"), ([0.01, 0.2], "unsure")]


@pytest.mark.parametrize("confidences, status", CONFIDENCES)
def test_verify(confidences, status):
    detections = [found("cat", 0.99), *(found("dog", c) for c in confidences), found("ufo", 0.9)]
    result = one.verify(["dog", "ufo"], detections, 0.5, 0.05, ["dog", "cat"])
    assert result == {"dog": status, "ufo": "unsure"}  # of ufos the expert knows nothing


@pytest.mark.parametrize(
    "texts, chosen, rejected",
    [
        (["A dog.", "A dog and a cat.", "A bus."], 1, 2),  # most present ones win
        (["A dog.", "A cat.", "A bus.", "An umbrella."], 0, 2),  # ties go to the earlier
        (["A bus.", "A dog.", "A bus, a dog and a cat."], 1, 2),  # rejected: closest to the scene
        (["A dog, a man.", "A dog.", "A dog and a bus."], 0, 2),  # unsure neither helps nor harms
        (["A bus and an umbrella.", "An apple."], 1, 0),
        (["A man.", "Nice.", "A bus."], None, 2),  # nothing surely there
        (["A dog."], 0, None),
        ([], None, None),
    ],
)
def test_pair_candidates(texts, chosen, rejected):
    candidates = [(text, one.find_mentions(text, VOCABULARY)) for text in texts]
    expected = [None if k is None else texts[k] for k in (chosen, rejected)]
    assert one.pair_candidates(candidates, STATUS) == tuple(expected)


def build(texts, swaps=(), detections=(), status=STATUS, classes=tuple(CLASSES), seed=0, **item):
    """The row that build_pair makes of these candidates, or the reason why it makes none."""
    item = {"id": "7-0", "image": "7.png", "prompt": "What is there?", **item}
    candidates = [(text, one.find_mentions(text, VOCABULARY)) for text in texts]
    finding = {"classes": classes, "detections": detections}
    try:
        return one.build_pair(item, candidates, swaps, finding, status, VOCABULARY, seed)
    except one.Skip as skip:
        return str(skip)


def test_evidence():
    """Each object of both responses, who names it, and the best of its own detections."""
    best = found("dog", 0.9, (1, 2, 3, 4))
    detections = [found("dog", 0.6), best, found("dog", 0.7), found("person", 0.3, (5, 6, 7, 8))]
    row = build(["A dog and a man.", "A dog and a bus."], detections=detections)
    evidence = [{**best, "claimed_by": "both", "status": "present"}]
    evidence += [{**detections[3], "claimed_by": "chosen", "status": "unsure"}]
    evidence.append({"object": "bus", "claimed_by": "rejected", "status": "absent"})
    evidence[2] |= {"confidence": 0.0, "box": None}
    expected = {"id": "7-0", "image": "7.png", "prompt": "What is there?", "source": "sampled"}
    expected |= {"chosen": "A dog and a man.", "rejected": "A dog and a bus."}
    assert row == {**expected, "hallucinated": ["bus"], "evidence": evidence}


def test_swap():
    """The first verified absent object replaces one of the present ones, drawn by the row."""
    text, swaps = "A dog and a cat, a man.", ["person", "apple", "umbrella", "bus"]
    rows = [build([text], swaps, seed=seed) for seed in range(20)]
    assert {row["chosen"] for row in rows} == {text} and rows[3] == build([text], swaps, seed=3)
    either = {"An umbrella and a cat, a man.", "A dog and an umbrella, a man."}
    assert {row["rejected"] for row in rows} == either
    assert len({build([text], swaps, id=f"{k}")["rejected"] for k in range(20)}) == 2
    assert {(row["source"], *row["hallucinated"]) for row in rows} == {("swapped", "umbrella")}


ABSENT = {"swaps": ["dog"], "status": {"cat": "present", "dog": "absent"}}
NO_SWAP = "no candidate hallucinates, no absent object to swap in"


@pytest.mark.parametrize(
    "texts, given, reason",
    [
        ([], {}, "no candidate is finished"),
        (["A tree.", "Nice."], {}, "names no object of the vocabulary"),
        (["A dog."], {"classes": ["bus"]}, "names no object of the vocabulary"),  # of the expert's
        (["A bus.", "A dog and a bus."], {}, "no candidate without hallucination"),
        (["A man."], {"swaps": ["bus"]}, "no candidate without hallucination"),
        (["A dog."], {"swaps": ["person"]}, NO_SWAP),
        # "hot cat" becomes "hot dog", of which nobody knows
        (["A hot cat."], ABSENT, "the swap names nothing absent"),
    ],
)
def test_why_there_is_no_pair(texts, given, reason):
    assert build(texts, **given) == reason


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        ("A dog.", "A dog and a bus.", None),
        ("Nothing, a man.", "A bus.", None),
        ("Nothing.", "Nobody.", "names no object of the vocabulary"),
        ("A dog and a bus.", "A bus.", "chosen hallucinates by the expert"),
        ("A dog.", "A cat.", "rejected does not hallucinate by the expert"),
        ("A dog.", "A man.", "rejected does not hallucinate by the expert"),
    ],
)
def test_given_pair(chosen, rejected, reason):
    row = build([chosen, rejected], swaps=["umbrella"], chosen=chosen, rejected=rejected)
    if reason is None:  # it stays as it is
        row = (row["chosen"], row["rejected"], row["source"])
    assert row == (reason or (chosen, rejected, "given"))


# ---- swaps and questions -------------------------------------------------------------------------
def test_propose_swaps():
    classes = [f"c{i}" for i in range(12)]  # below, the pair c5 and c6 is not in the scene
    counts = Counter({frozenset(("c3", "c0")): 8, frozenset(("c4", "c1")): 2})
    counts[frozenset(("c5", "c6"))] = 100

    def draw(seed, n=8):
        return one.propose_swaps(["c0", "c1"], counts, classes, random.Random(seed), n)

    assert draw(1) == draw(1) != draw(2)
    for seed in range(50):
        assert len(set(draw(seed)) - {"c0", "c1"}) == len(draw(seed)) == 8
    assert sorted(draw(0, 100)) == sorted(set(classes) - {"c0", "c1"})
    # The first falls on a class with probability weight / sum of weights; these are 9, 3, 8 x 1.
    first = Counter(draw(seed)[0] for seed in range(2000))
    for name, p in (("c3", 9 / 20), ("c4", 3 / 20), ("c5", 1 / 20), ("c9", 1 / 20)):
        assert abs(first[name] / 2000 - p) < 4 * (p * (1 - p) / 2000) ** 0.5, name


def test_questions(monkeypatch):
    """An image is asked about the mentions and swaps of all its rows; objects co-occur in texts;
    each row draws its own swaps."""
    items = [{"id": "a-0", "image": "a"}, {"id": "a-1", "image": "a"}, {"id": "b-0", "image": "b"}]
    mentions = {"a-0": [["dog", "cat"], ["dog"]], "a-1": [["bus"]], "b-0": [["cat", "dog"], []]}
    many = [f"c{i}" for i in range(100)]
    swaps, questions = one.plan_questions(items, mentions, many, seed=0)
    assert len({tuple(names) for names in swaps.values() if len(names) == 8}) == 3
    expected = ["dog", "cat", *swaps["a-0"], "bus", *swaps["a-1"]]
    assert questions["a"] == list(dict.fromkeys(expected)) and len(questions) == 2
    assert questions["b"] == ["cat", "dog", *swaps["b-0"]]
    assert one.plan_questions(items[::-1], mentions, many, seed=0)[0] == swaps
    assert one.plan_questions(items, mentions, many, seed=1)[0] != swaps
    seen = []
    monkeypatch.setattr(one, "propose_swaps", lambda *given: seen.append(given) or [])
    one.plan_questions(items, mentions, many, seed=0)
    assert [named for named, *_ in seen] == [["dog", "cat"], ["bus"], ["cat", "dog"]]
    assert seen[0][1] == {frozenset(("dog", "cat")): 2}


# ---- splits --------------------------------------------------------------------------------------
# pairs; --validation, --heldout, --train (x: not given) -> how many each, and 04's
SIZES = """50 x x x -> 5 5 20 20|20000 x x x -> 200 500 5000 14300|6000 x x x -> 200 500 2650 2650
100 .25 .1 .5 -> 25 10 50 15|100 7 0 x -> 7 0 46 47|100 x 1 .3 -> 10 1 30 59|10 x 50 x -> 1 50 0 0
1 x x x -> 0 0 0 1"""


@pytest.mark.parametrize("case", SIZES.replace("\n", "|").split("|"))
def test_split_sizes(case):
    given, expected = case.split(" -> ")
    n, *flags = (None if word == "x" else float(word) for word in given.split())
    assert [*one.split_sizes(int(n), *flags).values()] == [int(x) for x in expected.split()]


def test_assign_splits():
    """Whole images in an order of the seed's fill one split after the other, and each of them."""
    rows = []
    for i in range(60):
        rows += [{"id": f"{i}-{k}", "image": f"{i}.png"} for k in range(1 + i % 3)]  # 120 in all
    sizes = {"validation": 20, "heldout": 10, "train": 50, "pool": 40}
    placed = one.assign_splits(rows, sizes, seed=3)
    assert len({row["id"] for row in placed}) == len(placed) == 120
    assert len({(row["image"], row["split"]) for row in placed}) == 60  # no image in two splits
    names = [row["split"] for row in placed]
    assert list(dict.fromkeys(names)) == ["validation", "heldout", "train", "pool"]
    for split, size in [*sizes.items()][:3]:
        images = [row["image"] for row in placed if row["split"] == split]
        assert len(images) - images.count(images[-1]) < size <= len(images)  # its last fills it
    split_of = {row["id"]: row["split"] for row in placed}
    assert {r["id"]: r["split"] for r in one.assign_splits(rows[::-1], sizes, seed=3)} == split_of
    assert one.assign_splits(rows, sizes, seed=4) != placed
    assert {row["split"] for row in one.assign_splits(rows, {"pool": 120}, 3)} == {"pool"}


# ---- pictures ------------------------------------------------------------------------------------
def test_read_images(tmp_path):
    photos = tmp_path / "photos"
    for name in ("b.png", "a.png", "a.JPG", "in/c.png", *(f"x{i}.png" for i in range(9))):
        (photos / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8)).save(photos / name)
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "in/.cache").mkdir()
    for name in ("notes.txt", "in/MORE.TXT", "README", ".x.png", "in/.cache/thumb.png"):
        (photos / name).write_text("no picture either")
    os.mkfifo(photos / "fifo.png")
    (photos / "in/b.png").symlink_to("nowhere.png")  # photos/b.png is another picture
    prompts = ["What?", "Where?"]
    rows, counts = one.read_images(photos, photos, prompts, None, 0, tmp_path)
    assert [row["id"] for row in rows[:4]] == ["a-0", "a-1", "b-0", "in/c-0"]
    assert [row["image"] for row in rows[:4]] == ["a.JPG", "a.png", "b.png", "in/c.png"]
    assert {row["prompt"] for row in rows} == set(prompts)
    skips = {"missing image": 2, "hidden file": 2, "picture that does not decode": 1}
    skips |= {"no decoder for .txt": 2, "no decoder for files without a suffix": 1}
    assert counts == {"rows read": 16, **{f"skipped: {why}": n for why, n in skips.items()}}
    few, counts = one.read_images(photos, tmp_path, prompts, 2, 0, tmp_path)
    assert few == [{**row, "image": f"photos/{row['image']}"} for row in rows[:2]]  # same prompts
    assert counts["rows read"] == 2
    other, _ = one.read_images(photos, photos, prompts, None, 1, tmp_path)
    assert [row["prompt"] for row in other] != [row["prompt"] for row in rows]


# ---- main: who is asked what ---------------------------------------------------------------------
TEXTS = {
    "a": ["A dog.", "A bus.", "A dog, a"],
    "b": ["A cat.", "A bus and a", "A cat."],  # unsure: nothing surely there
    "c": ["A dog and a cat.", "A dog.", "A dog."],  # swapped; what is unsure stays
    "d": ["A tree.", "A house.", "Nice."],
    "e": ["A dog and", "A dog", "A dog, a cat"],
}


class Fakes:
    """A policy and an expert that know pictures by their red value and record what they get."""

    def __init__(self, monkeypatch, classes):
        self.classes = classes
        self.loaded, self.asked, self.looked = [], [], []
        monkeypatch.setattr(common, "load_judge", self.load_judge)
        monkeypatch.setattr(common, "sample", self.sample)
        monkeypatch.setattr(one, "Detector", lambda *settings: self)
        monkeypatch.setattr(one, "draw_contact_sheet", lambda *drawn: None)

    def load_judge(self, **settings):
        self.loaded.append(settings)
        return "model", "processor"

    def sample(self, model, processor, requests, bar, **settings):
        answers = []
        for request in requests:
            red = common.load_image(request["image"]).getpixel((0, 0))[0]
            self.asked.append((request["id"], red, request["text"], settings))
            same, texts = {"verdict": None, "log_odds": None}, TEXTS[request["id"][0]]
            answers.append([{"text": f" {t}", "complete": t[-1] == ".", **same} for t in texts])
        return answers

    def find(self, images, questions):
        """A dog in each, less sure in c; a cat perhaps; each at a place that tells the picture."""
        detections = []
        for image, names in zip(images, questions, strict=True):
            red = image.getpixel((0, 0))[0]
            self.looked.append((red, names))
            dog, box = 0.7 if red == 2 else 0.9, (red, 0, 30, 30)
            detections.append([found("dog", dog, box), found("cat", 0.2, box)])
        return detections


def run(folder, *flags):
    """Stage 01's rows {id: row} and counts."""
    one.main(one.parse_args(["--run", str(folder / "run"), *map(str, flags)]))
    folder = folder / "run/01_preferences"
    rows = read_rows(folder / "preferences.jsonl")
    return {row["id"]: row for row in rows}, common.read_json(folder / "meta.json")["counts"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for red, name in enumerate(TEXTS):
        Image.new("RGB", (40, 40), (red, 0, 0)).save(folder / f"{name}.png")
    (tmp_path / "prompts.txt").write_text("\ufeffWhat?\n\n Where? \n", encoding="utf-8")
    words = {"Dog": "dog", "cat": "cat", "bus": "bus", "a_Tree": "hot dog"}
    (tmp_path / "v.json").write_text(json.dumps(words))
    return ["--images", folder, "--prompts", tmp_path / "prompts.txt", "--candidates", 3]


def test_main_on_images(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    fakes = Fakes(monkeypatch, ["dog", "cat", "bus"])
    rows, counts = run(tmp_path, *photos, "--model", "m", "--max-image-tokens", 64)
    assert {prompt for _, _, prompt, _ in fakes.asked} == {"What?", "Where?"}
    assert fakes.looked == [(red, ["dog", "cat", "bus"]) for red in range(5)]
    model = str(tmp_path / "m")  # a folder is known by its absolute path
    assert [(x["model_path"], x["max_image_tokens"]) for x in fakes.loaded] == [(model, 64)]
    texts = {name: (row["chosen"], row["rejected"], row["source"]) for name, row in rows.items()}
    swapped = ("A dog and a cat.", "A bus and a cat.", "swapped")
    assert texts == {"a-0": ("A dog.", "A bus.", "sampled"), "c-0": swapped}
    assert [rows[k]["evidence"][0]["box"][0] for k in ("a-0", "c-0")] == [0, 2]
    numbers = {"rows read": 5, "candidates written": 15, "pairs made": 2}
    numbers |= {"  dropped: unfinished": 5, "dropped: no candidate is finished": 1}
    numbers |= {"dropped: names no object of the vocabulary": 1}
    numbers |= {"dropped: no candidate without hallucination": 1, "  sampled pairs": 1}
    numbers |= {"  swapped pairs": 1, "  in split pool": 1, "  in split train": 1}
    numbers |= {"mentions present": 2, "mentions absent": 1, "mentions unsure": 2}
    assert {k: n for k, n in counts.items() if n} == numbers
    assert "split heldout for a later stage: raise --heldout" in capsys.readouterr().out
    made_with = common.stage_args(tmp_path / "run", "01_preferences")
    assert (made_with["model"], made_with["image_root"]) == (model, str(photos[1]))


def test_what_has_been_asked_is_not_asked_again(tmp_path, photos, monkeypatch):
    """Flags that choose ask nobody; others ask whom they are about (what is there stays there:
    test_nothing_is_lost.py)."""
    fakes = Fakes(monkeypatch, ["dog", "cat", "bus"])
    folder = tmp_path / "run/01_preferences"
    run(tmp_path, *photos)
    assert len(fakes.asked) == len(fakes.looked) == 5
    fakes.loaded.clear()
    assert run(tmp_path, *photos, "--present", 0.8)[0].keys() == {"a-0"}
    rows, _ = run(tmp_path, *photos, "--absent", 0.3, "--vocabulary", tmp_path / "v.json")
    assert (rows["c-0"]["chosen"], rows["c-0"]["hallucinated"]) == ("A dog.", ["cat"])
    assert common.read_json(folder / "vocabulary.json")["a tree"] == "hot dog"
    rows, _ = run(tmp_path, *photos, "--validation", 1, "--heldout", 1, "--train", 0)
    assert {row["split"] for row in rows.values()} == {"validation", "heldout"}
    assert len(fakes.asked) == len(fakes.looked) == 5 and not fakes.loaded
    run(tmp_path, *photos, "--temperature", 0.5)  # other candidates, the same pictures
    assert len(fakes.asked) == 10 and len(fakes.looked) == 5 and len(fakes.loaded) == 1


@pytest.mark.filterwarnings("ignore:Glyph")
def test_contact_sheet(tmp_path):
    """Odd texts and sizes; boxes in the colour of their status, at their place."""
    rows, texts = [], ["costs $5 or $6_{", "日本語の文 🐕", "x" * 500, "A dog.\n\nA cat."]
    for text, size in zip(texts, ((600, 400), (20, 900), (900, 20), (1, 1))):
        Image.new("RGB", size).save(tmp_path / f"{len(rows)}.png")
        evidence = [{**found("$a$", 0.9, (0, 0, *size)), "status": "unsure"}]
        evidence += [{**found("bus", 0.03), "status": "absent"}]
        evidence += [{"object": "cat", "status": "absent", "confidence": 0.0, "box": None}]
        row = {"image": f"{len(rows)}.png", "chosen": text, "rejected": text}
        rows.append({**row, "evidence": evidence})
    draw_contact_sheet(tmp_path / "sheet.png", rows, tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert pixels.shape == (1280, 1120, 3)
    orange = (pixels == (255, 140, 0)).all(2)
    assert orange[:427].any() and not orange[430:].any()  # four in the first of three rows
    assert not (pixels == (255, 0, 0)).all(2).any()  # what is absent has no box
