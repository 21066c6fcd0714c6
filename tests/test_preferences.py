"""Stage 01 but for its experts: verification, pairing, swaps, splits, what is asked, and main."""

import json
import random
import warnings
from collections import Counter

import pytest
from conftest import stage
from PIL import Image

import common

one = stage("01_build_preferences")
CLASSES = ["dog", "cat", "hot dog", "person", "apple", "bus", "umbrella"]
VOCABULARY = one.build_vocabulary(CLASSES, {"person": ["man"]})
STATUS = {
    "dog": "present",
    "cat": "present",
    "apple": "present",
    "bus": "absent",
    "umbrella": "absent",
    "person": "unsure",
}


def found(name, confidence, box=(0, 0, 1, 1)):
    return {"object": name, "confidence": confidence, "box": list(box)}


def mentions_of(texts):
    return [one.find_mentions(text, VOCABULARY) for text in texts]


# ---- verify --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "confidences, status",
    [
        ([0.5], "present"),
        ([0.4999], "unsure"),
        ([0.05], "unsure"),
        ([0.0499], "absent"),
        ([], "absent"),
        ([0.01, 0.9, 0.3], "present"),
        ([0.01, 0.2], "unsure"),
    ],
)
def test_verify(confidences, status):
    detections = [found("cat", 0.99), *(found("dog", c) for c in confidences)]
    assert one.verify(["dog"], detections, 0.5, 0.05, {"dog", "cat"}) == {"dog": status}


def test_verify_a_class_that_the_expert_does_not_know():
    status = one.verify(["dog", "ufo", "cat"], [found("dog", 0.7)], 0.5, 0.05, {"dog", "cat"})
    assert status == {"dog": "present", "ufo": "unsure", "cat": "absent"}


# ---- pairs ---------------------------------------------------------------------------------------
def pair(texts, swaps=("umbrella",), seed=0):
    candidates = list(zip(texts, mentions_of(texts)))
    return one.pair_candidates(candidates, STATUS, swaps, VOCABULARY, random.Random(seed))


@pytest.mark.parametrize(
    "texts, chosen, rejected",
    [
        (["A dog.", "A dog and a cat.", "A bus."], 1, 2),  # most present ones win
        (["A dog.", "A cat.", "A bus.", "A bus."], 0, 2),  # ties go to the earlier
        (["A bus.", "A dog.", "A bus, a dog and a cat."], 1, 2),  # rejected: closest to the scene
        (["A dog, a man.", "A dog.", "A dog and a bus."], 0, 2),  # unsure neither helps nor harms
        (["A bus and an umbrella.", "An apple."], 1, 0),
    ],
)
def test_pair_sampled(texts, chosen, rejected):
    assert pair(texts) == (texts[chosen], texts[rejected], "sampled")


def test_pair_swapped():
    text = "A dog and a cat, a man."
    pairs = {pair([text], ["umbrella", "bus"], seed) for seed in range(20)}
    swapped = "An umbrella and a cat, a man.", "A dog and an umbrella, a man."  # either object
    assert pairs == {(text, rejected, "swapped") for rejected in swapped}


@pytest.mark.parametrize(
    "texts, swaps, reason",
    [
        (["A bus.", "A dog and a bus."], ["umbrella"], "no candidate without hallucination"),
        (["A man."], ["umbrella"], "no candidate without hallucination"),  # nothing surely there
        ([], ["umbrella"], "no candidate without hallucination"),
        (["A dog."], [], "no candidate hallucinates, no absent object to swap in"),
    ],
)
def test_pair_impossible(texts, swaps, reason):
    assert pair(texts, swaps) == (None, None, reason)


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        (["dog"], ["dog", "bus"], None),
        ([], ["bus"], None),
        (["person"], ["bus"], None),
        ([], [], "names no object of the vocabulary"),
        (["dog", "bus"], ["bus"], "chosen hallucinates by the expert"),
        (["dog"], ["cat"], "rejected does not hallucinate by the expert"),
        (["dog"], ["person"], "rejected does not hallucinate by the expert"),
    ],
)
def test_given_pair(chosen, rejected, reason):
    assert one.check_given_pair(chosen, rejected, STATUS) == reason


def build(texts, swaps=(), detections=(), status=STATUS, vocabulary=VOCABULARY, **item):
    item = {"id": "7-0", "image": "7.png", "prompt": "What is there?", **item}
    mentions = [one.find_mentions(text, vocabulary) for text in texts]
    return one.build_pair(item, texts, mentions, swaps, detections, status, vocabulary, 0)


def test_evidence():
    """Each object of both responses, who names it, and the best of its own detections."""
    best = found("dog", 0.9, (1, 2, 3, 4))
    detections = [found("dog", 0.6), best, found("dog", 0.7), found("person", 0.3, (5, 6, 7, 8))]
    row, reason = build(["A dog and a man.", "A dog and a bus."], detections=detections)
    assert reason is None
    assert row["evidence"] == [
        {**best, "claimed_by": "both", "status": "present"},
        {**detections[3], "claimed_by": "chosen", "status": "unsure"},
        {**found("bus", 0.0), "box": None, "claimed_by": "rejected", "status": "absent"},
    ]
    assert row["hallucinated"] == ["bus"]
    assert list(row)[:6] == ["id", "image", "prompt", "chosen", "rejected", "source"]
    assert (row["chosen"], row["source"]) == ("A dog and a man.", "sampled")


def test_only_a_verified_absent_object_is_swapped_in():
    row, _ = build(["A dog."], swaps=["person", "cat", "umbrella", "bus"])
    assert (row["rejected"], row["hallucinated"]) == ("An umbrella.", ["umbrella"])
    assert build(["A dog."], swaps=["person", "cat"])[1].endswith("no absent object to swap in")


def test_a_swap_that_forms_another_name():
    """ "hot cat" becomes "hot dog", which nobody asked about."""
    status = {"cat": "present", "dog": "absent"}
    row, reason = build(["A hot cat."], swaps=["dog"], status=status)
    assert (row, reason) == (None, "the swap names nothing absent")


def test_given_pair_is_kept_as_it_is():
    texts = ["A dog.", "A bus."]
    row, _ = build(texts, chosen=texts[0], rejected=texts[1])
    assert (row["chosen"], row["rejected"], row["source"]) == (*texts, "given")
    assert build(texts[::-1], chosen=texts[1], rejected=texts[0])[0] is None


# ---- swaps and questions -------------------------------------------------------------------------
def test_propose_swaps():
    classes = [f"c{i}" for i in range(12)]
    counts = Counter(
        {
            frozenset(("c3", "c0")): 8,
            frozenset(("c4", "c1")): 2,
            frozenset(("c5", "c6")): 100,  # neither is in the scene
        }
    )

    def draw(seed, n=8):
        return one.propose_swaps(["c0", "c1"], counts, classes, random.Random(seed), n)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    for seed in range(50):
        assert len(set(draw(seed)) - {"c0", "c1"}) == len(draw(seed)) == 8
    assert sorted(draw(0, 100)) == sorted(set(classes) - {"c0", "c1"})
    # The first falls on a class with probability weight / sum of weights; these are 9, 3, 8 x 1.
    first = Counter(draw(seed)[0] for seed in range(2000))
    for name, share in (("c3", 9 / 20), ("c4", 3 / 20), ("c5", 1 / 20), ("c9", 1 / 20)):
        assert abs(first[name] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5, name


def test_questions(monkeypatch):
    """An image is asked about the mentions and swaps of all its rows; objects co-occur in texts."""
    seen = {}

    def propose(named, co_occurrence, classes, rng):
        seen.update(co_occurrence)
        return [name for name in classes if name not in named][:1]

    monkeypatch.setattr(one, "propose_swaps", propose)
    items = [{"id": "a-0", "image": "a"}, {"id": "a-1", "image": "a"}, {"id": "b-0", "image": "b"}]
    mentions = {"a-0": [["dog", "cat"], ["dog"]], "a-1": [["bus"]], "b-0": [["cat", "dog"], []]}
    swaps, questions = one.plan_questions(items, mentions, ["dog", "apple"], seed=0)
    assert seen == {frozenset(("dog", "cat")): 2}
    assert swaps == {"a-0": ["apple"], "a-1": ["dog"], "b-0": ["apple"]}
    assert questions == {"a": ["dog", "cat", "apple", "bus"], "b": ["cat", "dog", "apple"]}


# ---- splits --------------------------------------------------------------------------------------
def test_assign_splits():
    rows = []
    for i in range(60):
        rows += [{"id": f"{i}-{k}", "image": f"{i}.png"} for k in range(1 + i % 3)]  # 120 in all
    placed = one.assign_splits(rows, 20, 50, seed=3)
    assert sorted(row["id"] for row in placed) == sorted(row["id"] for row in rows)
    assert len({(row["image"], row["split"]) for row in placed}) == 60  # no image in two splits
    sizes = Counter(row["split"] for row in placed)
    assert 20 <= sizes["validation"] < 23
    assert 70 <= sizes["validation"] + sizes["train"] < 73
    assert sizes["pool"] >= 48
    again = one.assign_splits(rows[::-1], 20, 50, seed=3)
    assert {row["id"]: row["split"] for row in placed} == {row["id"]: row["split"] for row in again}
    other = one.assign_splits(rows, 20, 50, seed=4)
    assert [row["image"] for row in placed] != [row["image"] for row in other]


# ---- pictures and candidates ---------------------------------------------------------------------
def test_read_images(tmp_path):
    for name in ("b.png", "a.png", "a.jpg", "in/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    prompts = ["What?", "Where?"]
    rows, counts = one.read_images(tmp_path, tmp_path, prompts, None, 0, tmp_path)
    assert [row["id"] for row in rows] == ["a-0", "a-1", "b-0", "in/a-0"]
    assert [row["image"] for row in rows] == ["a.jpg", "a.png", "b.png", "in/a.png"]
    assert {row["prompt"] for row in rows} <= set(prompts)
    assert counts == {
        "rows read": 5,
        "skipped: not a picture by its suffix": 1,
        "skipped: picture that does not decode": 1,
    }
    rows, counts = one.read_images(tmp_path, tmp_path, prompts, 2, 0, tmp_path)
    assert (len(rows), counts["rows read"]) == (2, 2)


def answers(texts):
    """What common.sample says of one request; a text that doesn't end with a stop is unfinished."""
    return [{"text": f" {text}", "complete": text.endswith(".")} for text in texts]


def test_candidates(tmp_path, monkeypatch):
    """Unfinished ones are left out and counted; what is written is not sampled again."""
    asked = []

    def sample(model, processor, requests, bar, **settings):
        asked.append((requests, settings))
        return [answers(["A dog.", "A cat and a", "A bus."])] * len(requests)

    monkeypatch.setattr(common, "sample", sample)
    items = [{"id": "a-0", "image": "a.png", "prompt": "What?"}]
    path, sampling = tmp_path / "candidates.jsonl", {"n": 3, "temperature": 0.7}
    rows = one.write_candidates(items, None, None, tmp_path, path, sampling)
    assert rows == [{**items[0], "candidates": ["A dog.", "A bus."], "unfinished": 1}]
    requests = [{"id": "a-0", "image": tmp_path / "a.png", "text": "What?"}]
    assert asked == [(requests, sampling)]
    assert one.write_candidates(items, None, None, tmp_path, path, sampling) == rows
    assert len(asked) == 1


# ---- main ----------------------------------------------------------------------------------------
class Expert:
    """Finds a dog everywhere, a cat a little, and nothing else of its classes."""

    classes = ["dog", "cat", "bus"]

    def find(self, images, questions):
        return [[found("dog", 0.8), found("cat", 0.2)] for _ in images]


def run(folder, *flags):
    """Stage 01's rows and counts."""
    one.main(one.parse_args(["--run", str(folder / "run"), *map(str, flags)]))
    folder = folder / "run/01_preferences"
    assert (folder / "contact_sheet.png").exists()
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "meta.json").read_text())["counts"]


def test_main_on_images(tmp_path, monkeypatch, capsys):
    texts = {"a": ["A dog.", "A bus.", "A dog, a"], "b": ["A cat.", "A bus and a", "A cat."]}
    texts["c"] = ["A dog and a cat.", "A dog.", "A dog."]
    for name in texts:
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    monkeypatch.setattr(common, "load_judge", lambda *args, **settings: (None, None))
    monkeypatch.setattr(one, "load_expert", lambda *args: Expert())
    monkeypatch.setattr(
        common,
        "sample",
        lambda model, processor, requests, **settings: [
            answers(texts[request["id"][0]]) for request in requests
        ],
    )
    rows, counts = run(
        tmp_path, "--images", tmp_path / "photos", "--candidates", 3, "--validation", 1
    )
    rows = {row["id"]: (row["chosen"], row["rejected"], row["split"]) for row in rows}
    assert rows.keys() == {"a-0", "c-0"}
    assert rows["a-0"][:2] == ("A dog.", "A bus.")
    assert rows["c-0"][:2] == ("A dog and a cat.", "A bus and a cat.")  # what is unsure stays
    assert {split for _, _, split in rows.values()} == {"validation", "train"}
    assert counts == {
        "rows read": 3,
        "candidates written": 9,
        "  dropped: unfinished or too long": 2,
        "pairs made": 2,
        "dropped: no candidate without hallucination": 1,
        "  sampled pairs": 1,
        "  swapped pairs": 1,
        "  in split validation": 1,
        "  in split train": 1,
        "mentions present": 2,
        "mentions absent": 1,
        "mentions unsure": 2,
        "skipped: not a picture by its suffix": 1,
    }
    assert "next: look at" in capsys.readouterr().out


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_on_findings(folder, findings, *flags):
    """Stage 01 over two given pairs and findings made elsewhere: no model is loaded at all."""
    texts = {"prompt": "What is there?", "chosen": "A dog.", "rejected": "A dog and a cat."}
    for name in ("0.png", "1.png"):
        Image.new("RGB", (40, 40)).save(folder / name)
    pairs = [{"image": "0.png", **texts}, {"image": "1.png", **texts}]
    pairs = write_rows(folder / "pairs.jsonl", pairs)
    findings = write_rows(folder / "found.jsonl", findings)
    return run(folder, "--pairs", pairs, "--image-root", folder, "--detections", findings, *flags)


def test_main_on_findings(tmp_path):
    """Where it is said what was asked about, a class that was not is unsure: no pair."""
    findings = [{"id": "0.png", "detections": [found("dog", 0.9)]}]
    findings += [{"id": "1.png", "asked": ["dog"], "detections": [found("dog", 0.9)]}]
    rows, counts = run_on_findings(tmp_path, findings)
    assert [(row["image"], row["source"], row["hallucinated"]) for row in rows] == [
        ("0.png", "given", ["cat"])
    ]
    assert counts["dropped: rejected does not hallucinate by the expert"] == 1
    args = common.args_of(tmp_path / "run", "01_preferences", "image_root")  # as 02 reads them
    assert args["detections"].endswith("found.jsonl")


def test_01_says_that_the_expert_calls_next_to_nothing_absent(tmp_path, capsys):
    """It finds cats in 11 of 12 pictures: what is hallucinated there, it has missed."""
    pairs, findings = [], []
    for i in range(12):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
        texts = {"prompt": "What is there?", "chosen": "A dog.", "rejected": "A dog and a cat."}
        pairs.append({"image": f"{i}.png", **texts})
        detections = [found("dog", 0.9), found("cat", 0.9 if i < 11 else 0.2)]  # unsure in the last
        findings.append({"id": f"{i}.png", "detections": detections if i else detections[:1]})
    pairs = write_rows(tmp_path / "pairs.jsonl", pairs)
    flags = ["--pairs", pairs, "--image-root", tmp_path, "--detections"]
    run(tmp_path, *flags, write_rows(tmp_path / "found.jsonl", findings))
    assert "in 8.3% of the rows the expert calls" in capsys.readouterr().out
    del findings[1]["detections"][1]
    run(tmp_path, *flags, write_rows(tmp_path / "found.jsonl", findings))
    assert "it may miss" not in capsys.readouterr().out  # 2 of 12


def test_thresholds_may_change_without_a_new_detection(tmp_path, monkeypatch, capsys):
    """Stage 01 advises it; the detector is asked once, for all that it finds at all."""
    for name in ("0.png", "1.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    texts = {"prompt": "What is there?", "chosen": "A dog.", "rejected": "A dog and a cat."}
    pairs = write_rows(tmp_path / "p.jsonl", [{"image": f"{i}.png", **texts} for i in range(2)])
    asked = []

    class Expert:
        classes = None

        def find(self, images, questions):
            asked.append(len(images))
            return [[found("dog", 0.9), found("cat", c)] for c in (0.03, 0.2)]

    def load_expert(name, floor, *rest):
        assert floor == one.FLOOR == common.BOUNDS["absent"][0]
        return Expert()

    monkeypatch.setattr(one, "load_expert", load_expert)
    given = ("--pairs", pairs, "--validation", 1, "--train", 1)
    rows, counts = run(tmp_path, *given)
    assert [row["image"] for row in rows] == ["0.png"]
    assert rows[0]["evidence"][1]["confidence"] == 0.03
    assert "warning: no pairs are left for the pool of 04" in capsys.readouterr().out
    rows, counts = run(tmp_path, *given, "--absent", 0.3)
    assert sorted(row["image"] for row in rows) == ["0.png", "1.png"] and asked == [2]
    said = capsys.readouterr().out
    assert "--absent was 0.05, is 0.3" in said
    rows, counts = run(tmp_path, *given[:2], "--validation", 0, "--train", 0)
    assert [row["split"] for row in rows] == ["pool"] and asked == [2]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"detections": [found("dog", 1.5)]}, "found.jsonl line 2, field 'detections': a list of"),
        ({"detections": [{"object": "dog", "box": None}]}, "line 2.* confidence .a number from 0"),
        ({"id": "2.png"}, "found.jsonl has no row for image '1.png'"),
        ({"detections": None}, "line 2, field 'detections': it is missing"),
    ],
)
def test_broken_findings(tmp_path, changed, words):
    findings = [{"id": name, "detections": [found("dog", 0.9)]} for name in ("0.png", "1.png")]
    findings[1] |= changed
    with pytest.raises(SystemExit, match=words):
        run_on_findings(tmp_path, findings)


def test_findings_of_other_classes(tmp_path):
    """Spelled otherwise, all objects would count as absent."""
    findings = [{"id": name, "detections": [found("Hund", 0.9)]} for name in ("0.png", "1.png")]
    with pytest.raises(SystemExit, match=r"no class \(\['Hund'\]\) is of the vocabulary"):
        run_on_findings(tmp_path, findings)
    vocabulary = tmp_path / "vocabulary.json"
    vocabulary.write_text('{"Dog": "Hund", "cat": "Katze"}')
    (tmp_path / "run/01_preferences/args.json").unlink()
    rows, _ = run_on_findings(tmp_path, findings, "--vocabulary", vocabulary)
    assert [row["hallucinated"] for row in rows] == [["Katze"], ["Katze"]]


@pytest.mark.parametrize(
    "flags",
    [
        ["--pairs", "x", "--expert", "x.pt", "--detections", "y"],
        ["--pairs", "x", "--images", "y"],
        ["--pairs", "x", "--present", "0.1", "--absent", "0.2"],
        [],
    ],
)
def test_flags_that_contradict(flags):
    with pytest.raises(SystemExit):
        one.parse_args(flags)


# ---- the contact sheet ---------------------------------------------------------------------------
def test_contact_sheet_of_odd_pictures_and_texts(tmp_path, capsys):
    rows, texts = [], ["costs $5 or $6_{", "日本語の文 🐕", "x" * 500, "A dog.\n\nA cat."]
    for text, size in zip(texts, ((3000, 2000), (20, 900), (900, 20), (1, 1))):
        Image.new("RGB", size).save(tmp_path / f"{len(rows)}.png")
        evidence = [{**found("$a$", 0.9, (0, 0, *size)), "status": "present"}]
        evidence += [{"object": "bus", "status": "absent", "confidence": 0.0, "box": None}]
        row = {"image": f"{len(rows)}.png", "chosen": text, "rejected": text, "evidence": evidence}
        rows.append(row)
    rows.append({**rows[0], "image": "gone.png"})
    with warnings.catch_warnings(action="error"):
        common.draw(one.draw_contact_sheet, tmp_path / "sheet.png", rows, tmp_path)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1120  # four of them in a row
    assert "gone.png" in capsys.readouterr().out
