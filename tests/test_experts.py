"""Stage 01's experts: which picture and names each gets, where its boxes lie, what is kept."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORLD, read_rows, stage
from PIL import Image
from scenes import draw_scene
from transformers import BatchFeature

import common

one = stage("01_build_preferences")
SHOTS = [Image.new("RGB", (80, 40), (0, 50, 90)), Image.new("RGB", (40, 100), (100, 50, 90))]


def red_of(picture):
    return common.load_image(picture).getpixel((0, 0))[0]


def found(name, confidence, box=None):
    return {"object": name, "confidence": confidence, "box": box}


class Echo:
    """An expert whose detections tell the picture's red value and its questions."""

    def __init__(self, classes=None):
        self.classes, self.calls, self.loaded = classes, [], []

    def load(self, *settings):
        self.loaded.append(settings)
        return self

    def find(self, images, questions):
        self.calls.append(len(images))
        asked = [(red_of(x) / 100, names) for x, names in zip(images, questions, strict=True)]
        return [[found(name, red) for name in names] for red, names in asked]


def expert_of(tmp_path, monkeypatch, echo, name="echo.pt"):
    monkeypatch.setattr(one, "Detector", echo.load)
    flags = ["--images", "x", "--run", str(tmp_path / "run"), "--expert", name, "--device", "cpu"]
    return one.Expert(one.parse_args(flags), tmp_path, tmp_path, None)


@pytest.mark.parametrize("classes", [None, ["ox", "ape"]])
def test_each_picture_gets_its_own_detections(classes, tmp_path, monkeypatch):
    """By an open expert each one's own names; what was looked at needs no expert any more, nor do
    a detector's classes, which the file of findings does not repeat."""
    questions = {}
    for i in range(70):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / f"{i}.png")
        questions[f"{i}.png"] = [f"c{i}", f"d{i}"][: i % 3]
    echo = Echo(classes)
    findings = expert_of(tmp_path, monkeypatch, echo).find(questions)
    assert echo.calls == [32, 32, 6] and echo.loaded == [("echo.pt", "cpu")]
    for i in range(70):
        row, names = findings[f"{i}.png"], classes or questions[f"{i}.png"]
        expected = names, [found(name, i / 100) for name in names]
        assert (row["classes"], row["detections"]) == expected
    kept = read_rows(tmp_path / "detections.jsonl")
    assert [row["image"] for row in kept] == list(questions)
    assert set(kept[0]) == {"key", "image", "detections"}
    echo = Echo(["other"])
    again = expert_of(tmp_path, monkeypatch, echo)
    assert again.classes == classes and again.find(questions) == findings and not echo.loaded
    more = again.find({"5.png": ["new"]})["5.png"]["detections"]  # other names are other questions
    assert more == [found(name, 0.05) for name in classes or ["new"]]
    monkeypatch.chdir(tmp_path)
    other = expert_of(tmp_path, monkeypatch, echo, "./other.pt").find({"5.png": ["ox"]})
    assert other["5.png"]["detections"] == [found("other", 0.05)]
    known = {"echo.pt": classes, str(tmp_path / "other.pt"): ["other"]}
    assert common.read_json(tmp_path / "classes.json") == known


def test_the_shipped_expert():
    """It finds blue stars where they are, down to the floor; the import leaves Pillow as it was."""
    opener = Image.open
    expert = one.Detector(str(WORLD / "expert.pt"), "cpu")
    assert Image.open is opener and {"blue star", "red circle"} < set(expert.classes)
    scenes = [draw_scene(np.random.default_rng(s), ["red circle", "blue star"]) for s in (1, 2, 3)]
    pictures = [Image.fromarray(scene.picture) for scene in scenes]
    pictures[0] = pictures[0].crop((0, 0, 84, 70))
    detections = expert.find(pictures, [expert.classes] * 3)
    for scene, of_picture in zip(scenes, detections, strict=True):
        best = max(of_picture, key=lambda seen: seen["confidence"])
        (box,) = [truth["box"] for truth in scene.objects if truth["object"] == best["object"]]
        assert np.abs(np.subtract(best["box"], box)).max() < 4
    confidences = [seen["confidence"] for seen in sum(detections, [])]
    assert one.FLOOR <= min(confidences) < 0.1  # ultralytics' own floor is .25


ODDS = {"dog": [0.6, 0.2, 0.1, 0.1], "cat": [0.1, 0.1, 0.2, 0.6]}  # of yes, Yes, no, No


@pytest.fixture
def policy(monkeypatch):
    """[(question, picture's red value)] asked of a policy, whose next token has the name's odds."""
    asked, ids = [], {"yes": 0, "Yes": 1, "no": 2, "No": 3}

    def encode(processor, texts, images):
        asked.extend(zip(texts, map(red_of, images)))
        return BatchFeature({"texts": texts})

    def tokenize(words, add_special_tokens):
        return SimpleNamespace(input_ids=[[ids[word], 9] for word in words])

    class Policy:
        device = "cpu"

        def __call__(self, texts, **inputs):
            logits = torch.tensor([ODDS[text.split()[3]] for text in texts]).log()
            return SimpleNamespace(logits=torch.stack([-logits, logits], 1))  # (names, 2, V)

    loaded = Policy(), SimpleNamespace(tokenizer=tokenize)
    monkeypatch.setattr(common, "load_judge", lambda **settings: loaded)
    monkeypatch.setattr(common, "encode_prompts", encode)
    return asked


def test_own_answers(policy):
    expert = one.OwnAnswers(common.Judge("m"))
    dog, cat = found("dog", 0.8), found("cat", 0.2)
    assert expert.find(SHOTS, [["dog"], ["cat", "dog"]]) == [[dog], [cat, dog]]
    asked = [("dog", 0), ("cat", 100), ("dog", 100)]
    assert policy == [(f"Is there a {n} in the image? Answer yes or no.", red) for n, red in asked]
    assert expert.classes is None and expert.find(SHOTS, [[], []]) == [[], []]


def run(folder, chosen, rejected, *flags):
    pairs = [{"image": f"{k}.png", "chosen": chosen, "rejected": rejected} for k in range(3)]
    for pair in pairs:
        Image.new("RGB", (40, 40)).save(folder / pair["image"])
    common.write_jsonl(folder / "pairs.jsonl", [{**pair, "prompt": "Q?"} for pair in pairs])
    flags = ["--run", folder / "run", "--pairs", folder / "pairs.jsonl", *flags]
    one.main(one.parse_args([str(flag) for flag in flags]))
    return read_rows(folder / "run/01_preferences/preferences.jsonl")


def test_main_without_an_expert(policy, tmp_path, monkeypatch):
    """--expert none; where COCO's vocabulary has none of the objects, that is what is said."""
    monkeypatch.setattr(one, "draw_contact_sheet", lambda *drawn: None)  # which takes a second
    flags = ["--expert", "none", "--absent", 0.3]
    rows = run(tmp_path, "A dog.", "A dog and a cat.", *flags)
    assert [row["hallucinated"] for row in rows] == [["cat"]] * 3 and len(policy) == 6
    assert [seen["confidence"] for seen in rows[0]["evidence"]] == [0.8, 0.2]
    run(tmp_path, "A dog.", "A dog and a cat.", *flags, "--model", "another")
    assert len(policy) == 12  # another's answers
    with pytest.raises(SystemExit, match="names no object of the vocabulary': 3.*--vocabulary"):
        run(tmp_path, "A red circle.", "A blue star.", *flags)


def test_main_on_findings(tmp_path, monkeypatch):
    """By the picture's name; no model is loaded. A class that was not looked for is unsure."""
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    monkeypatch.setattr(one, "draw_contact_sheet", lambda *drawn: None)
    told = ["A dog.", "A dog and a cat.", "--detections", tmp_path / "found.jsonl"]
    findings = [{"image": "1.png", "classes": ["dog"], "detections": [found("dog", 0.9)]}]
    findings.append({"image": "0.png", "detections": [{"object": "dog", "confidence": 0.8}]})
    common.write_jsonl(tmp_path / "found.jsonl", findings)
    (row,) = run(tmp_path, *told)
    assert (row["image"], row["source"], row["hallucinated"]) == ("0.png", "given", ["cat"])
    assert [seen["confidence"] for seen in row["evidence"]] == [0.8, 0.0]
    counts = common.read_json(tmp_path / "run/01_preferences/meta.json")["counts"]
    assert counts["dropped: rejected does not hallucinate by the expert"] == 1
    assert counts["skipped: image without a row in --detections"] == 1
    findings = [{"image": f"{k}.png", "detections": [found("Hund", 0.9)]} for k in range(2)]
    common.write_jsonl(tmp_path / "found.jsonl", findings)
    with pytest.raises(SystemExit, match=r"no class \(\['Hund'\]\) is of --vocabulary"):
        run(tmp_path, *told)  # spelled otherwise, all objects would count as absent
    (tmp_path / "v.json").write_text('{"Dog": "Hund", "cat": "Katze"}')
    rows = run(tmp_path, *told, "--vocabulary", tmp_path / "v.json")
    assert [row["hallucinated"] for row in rows] == [["Katze"], ["Katze"]]
