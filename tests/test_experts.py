"""Stage 01's experts: which picture, names and model each gets, where its boxes lie, what is kept."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, WORLD, read_rows, stage
from PIL import Image
from transformers import BatchFeature

import common

one = stage("01_build_preferences")
SHOTS = [Image.new("RGB", (80, 40), (0, 50, 90)), Image.new("RGB", (40, 100), (100, 50, 90))]


def found(name, confidence, box=None):
    return {"object": name, "confidence": confidence, "box": box}


def run(folder, *flags):
    """Stage 01's rows."""
    one.main(one.parse_args(["--run", str(folder / "run"), *map(str, flags)]))
    return read_rows(folder / "run/01_preferences/preferences.jsonl")


@pytest.fixture(autouse=True)
def no_sheet(monkeypatch):
    monkeypatch.setattr(one, "draw_contact_sheet", lambda *drawn: None)  # which takes seconds


# ---- The findings of all images ------------------------------------------------------------------
class Echo:
    """An expert whose detections tell the picture's red value and its questions."""

    def __init__(self, classes=None):
        self.classes, self.calls, self.loaded = classes, [], []

    def load(self, *settings):
        self.loaded.append(settings)
        return self

    def find(self, images, questions):
        self.calls.append(len(images))
        return [
            [found(name, image.getpixel((0, 0))[0] / 100) for name in names]
            for image, names in zip(images, questions, strict=True)
        ]


def expert_of(tmp_path, monkeypatch, echo, name="echo.pt"):
    monkeypatch.setattr(one, "Detector", echo.load)
    args = one.parse_args(["--images", "x", "--run", str(tmp_path / "run"), "--expert", name])
    args.device = "cpu"
    judge = SimpleNamespace(weights=["m", None])
    return one.Expert(args, tmp_path / "detections.jsonl", tmp_path, judge)


@pytest.mark.parametrize("classes", [None, ["ox", "ape"]])
def test_each_picture_gets_its_own_detections(classes, tmp_path, monkeypatch):
    """Over several batches; of an open expert by each picture's own names. What was looked at is
    not looked at again, and then the expert is not even loaded."""
    questions = {}
    for i in range(70):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / f"{i}.png")
        questions[f"{i}.png"] = [f"c{i}", f"d{i}"][: i % 3]
    echo = Echo(classes)
    findings = expert_of(tmp_path, monkeypatch, echo).find(questions)
    assert echo.calls == [32, 32, 6] and echo.loaded == [("echo.pt", "cpu")]
    for i in range(70):
        names = classes or questions[f"{i}.png"]
        row = findings[f"{i}.png"]
        assert row["classes"] == names
        assert row["detections"] == [found(name, i / 100) for name in names]
    assert len(one.read_detections(tmp_path / "detections.jsonl", {"ox": "ox", "c1": "c1"})) == 71
    echo = Echo(["other"])
    again = expert_of(tmp_path, monkeypatch, echo)
    assert again.classes == classes and again.find(questions) == findings and not echo.loaded
    other = expert_of(tmp_path, monkeypatch, echo, "other.pt").find({"5.png": ["ox"]})
    assert other["5.png"]["detections"] == [found("other", 0.05)] and echo.calls == [1]


# ---- Ultralytics ---------------------------------------------------------------------------------
class Yolo:
    """Stands in for ultralytics.YOLO: finds class 1 in each picture, and class 0 of the others."""

    names = {0: "crow", 1: "dog"}

    def __init__(self, weights):
        self.seen, self.settings = [], []

    def predict(self, arrays, **settings):
        self.seen += arrays
        self.settings.append(settings)
        results = []
        for array in arrays:
            boxes = SimpleNamespace(cls=torch.tensor([1.0]), conf=torch.tensor([0.81236]))
            boxes.xyxy = torch.tensor([[1.04, 2.0, float(array.shape[1]), 4.0]])
            results.append(SimpleNamespace(boxes=boxes, names=self.names))
        return results


def test_ultralytics_gets_the_judges_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", SimpleNamespace(YOLO=Yolo))
    expert = one.Detector("x.pt", "cpu")
    assert expert.classes == ["crow", "dog"]
    boxes = [1.0, 2.0, 80.0, 4.0], [1.0, 2.0, 40.0, 4.0]
    assert expert.find(SHOTS, [[], []]) == [[found("dog", 0.8124, box)] for box in boxes]
    for shot, array in zip(SHOTS, expert.model.seen, strict=True):
        assert array.flags.c_contiguous
        assert (array[:, :, ::-1] == np.asarray(shot)).all()  # blue, green, red
    (settings,) = expert.model.settings
    assert (settings["conf"], settings["batch"]) == (0.01, 2)


def test_the_shipped_expert_leaves_its_process_as_it_is(tmp_path):
    """Real weights in a process of their own, at ultralytics' first import on a machine."""
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
from PIL import Image
before = Image.open
one = importlib.import_module("01_build_preferences")
assert "ultralytics" not in sys.modules
expert = one.Detector({str(WORLD / "expert.pt")!r}, None)
assert Image.open is before and "red circle" in expert.classes
picture = Image.new("RGB", (80, 80), "white")
picture.paste("red", (20, 30, 50, 60))
for detection in sum(expert.find([picture, picture.crop((0, 0, 80, 70))], [[], []]), []):
    x1, y1, x2, y2 = detection["box"]
    assert 0 <= x1 <= x2 <= 80 and 0 <= y1 <= y2 <= 80 and detection["confidence"] >= .01
"""
    first = {"YOLO_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **first})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# ---- The policy itself ---------------------------------------------------------------------------
ODDS = {"dog": [0.6, 0.2, 0.1, 0.1], "cat": [0.1, 0.1, 0.2, 0.6]}  # of yes, Yes, no, No


class Policy:
    """Stands in for the policy, whose next token after a question has its name's odds."""

    device = "cpu"

    def __call__(self, texts, **inputs):
        logits = torch.tensor([ODDS[text.split()[3]] for text in texts]).log()
        return SimpleNamespace(logits=torch.stack([-logits, logits], 1))  # (names, 2, V)


@pytest.fixture
def policy(monkeypatch):
    """[(question, picture's red value)] that a policy was asked."""
    asked = []

    def encode(processor, texts, images):
        asked.extend(
            (text, common.load_image(x).getpixel((0, 0))[0]) for text, x in zip(texts, images)
        )
        return BatchFeature({"texts": texts})

    def tokenize(words, add_special_tokens):
        ids = {"yes": 0, "Yes": 1, "no": 2, "No": 3}
        return SimpleNamespace(input_ids=[[ids[word], 9] for word in words])

    loaded = Policy(), SimpleNamespace(tokenizer=tokenize)
    monkeypatch.setattr(common, "load_judge", lambda **settings: loaded)
    monkeypatch.setattr(common, "encode_prompts", encode)
    return asked


def test_own_answers(policy):
    """Confidence is the part of yes, in either spelling, at the last position."""
    expert = one.OwnAnswers(common.Judge("run", "m"))
    answers = expert.find(SHOTS, [["dog"], ["cat", "dog"]])
    assert answers == [[found("dog", 0.8)], [found("cat", 0.2), found("dog", 0.8)]]
    asked = [("dog", 0), ("cat", 100), ("dog", 100)]
    assert policy == [(f"Is there a {n} in the image? Answer yes or no.", red) for n, red in asked]
    assert expert.classes is None and expert.find(SHOTS, [[], []]) == [[], []]


def given_pairs(folder, n, chosen, rejected):
    """--pairs of n black pictures."""
    rows = []
    for k in range(n):
        Image.new("RGB", (40, 40)).save(folder / f"{k}.png")
        rows.append({"image": f"{k}.png", "prompt": "Q?", "chosen": chosen, "rejected": rejected})
    common.write_jsonl(folder / "pairs.jsonl", rows)
    return ["--pairs", folder / "pairs.jsonl"]


def test_main_without_an_expert(policy, tmp_path):
    """--expert none; where COCO's vocabulary has none of the objects, that is what is said."""
    flags = given_pairs(tmp_path, 2, "A dog.", "A dog and a cat.")
    rows = run(tmp_path, *flags, "--expert", "none", "--absent", 0.3)
    assert [row["hallucinated"] for row in rows] == [["cat"], ["cat"]] and len(policy) == 4
    assert [seen["confidence"] for seen in rows[0]["evidence"]] == [0.8, 0.2]
    flags = given_pairs(tmp_path, 2, "A red circle.", "A blue star.")
    with pytest.raises(SystemExit, match="names no object of the vocabulary': 2.*--vocabulary"):
        run(tmp_path, *flags, "--expert", "none")


# ---- Findings made elsewhere ---------------------------------------------------------------------
def test_main_on_findings(tmp_path, monkeypatch):
    """By the picture's name; no model is loaded, ultralytics may be missing. A class that was not
    looked for is unsure; a picture without findings is a counted skip."""
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    flags = given_pairs(tmp_path, 3, "A dog.", "A dog and a cat.")
    flags += ["--detections", tmp_path / "found.jsonl"]
    findings = [{"image": "1.png", "classes": ["dog"], "detections": [found("dog", 0.9)]}]
    findings.append({"image": "0.png", "detections": [{"object": "dog", "confidence": 0.8}]})
    common.write_jsonl(tmp_path / "found.jsonl", findings)
    (row,) = run(tmp_path, *flags)
    assert (row["image"], row["source"], row["hallucinated"]) == ("0.png", "given", ["cat"])
    assert [seen["confidence"] for seen in row["evidence"]] == [0.8, 0.0]
    counts = common.read_json(tmp_path / "run/01_preferences/meta.json")["counts"]
    assert counts["dropped: rejected does not hallucinate by the expert"] == 1
    assert counts["skipped: image without a row in --detections"] == 1
    findings = [{"image": f"{k}.png", "detections": [found("Hund", 0.9)]} for k in range(2)]
    common.write_jsonl(tmp_path / "found.jsonl", findings)
    with pytest.raises(SystemExit, match=r"no class \(\['Hund'\]\) is of --vocabulary"):
        run(tmp_path, *flags)  # spelled otherwise, all objects would count as absent
    (tmp_path / "v.json").write_text('{"Dog": "Hund", "cat": "Katze"}')
    rows = run(tmp_path, *flags, "--vocabulary", tmp_path / "v.json")
    assert [row["hallucinated"] for row in rows] == [["Katze"], ["Katze"]]
