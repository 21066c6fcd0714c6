"""The toy world: its pictures are the same everywhere, its pairs are true, the shipped build is
whole and light, and the builder's short cuts give what the ordinary checkpoint gives."""

import hashlib
import json
import pickletools
import re
import zipfile
from unittest.mock import Mock

import build_world
import demo
import numpy as np
import pytest
import scenes
import torch
from build_world import Row, Trainer
from conftest import ROOT
from demo import WORLD
from PIL import Image

from common import INSTRUCTIONS, build_judge_prompt, encode_prompts, load_judge, parse_checks


@pytest.fixture(scope="module")
def shipped():
    """(model, processor)"""
    return load_judge(str(WORLD / "model"), device="cpu")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Pictures and pairs -------------------------------------------------------------------------
def test_pictures_and_rows_are_the_same_everywhere(tmp_path):
    scenes.write_pictures(tmp_path, 0, n_images=10, n_heldout=3)
    pixels = hashlib.sha256()
    for row in read_rows(tmp_path / "truth.jsonl"):  # decoded: a PNG's bytes are Pillow's choice
        pixels.update(np.asarray(Image.open(tmp_path / row["image"])).tobytes())
    text = (tmp_path / "truth.jsonl").read_text() + (tmp_path / "heldout.jsonl").read_text()
    rows = hashlib.sha256(text.encode())
    assert pixels.hexdigest()[:32] == "7ff9486db157bf57f9a0c770a71c25ff"
    assert rows.hexdigest()[:32] == "f1ded41529a999c262ca800e944e681c"


def test_more_heldout_pairs_change_no_earlier_row(tmp_path):
    scenes.write_pictures(tmp_path / "few", 1, n_images=2, n_heldout=3)
    scenes.write_pictures(tmp_path / "more", 1, n_images=2, n_heldout=8)
    for name in ("truth.jsonl", "heldout.jsonl"):
        few, more = read_rows(tmp_path / "few" / name), read_rows(tmp_path / "more" / name)
        assert more[: len(few)] == few
    assert len(few) == 3 and len(more) == 8


def test_heldout_pairs_obey_the_truth(tmp_path):
    scenes.write_pictures(tmp_path, 2, n_images=0, n_heldout=60)
    truth = {}
    for row in read_rows(tmp_path / "truth.jsonl"):
        truth[row["image"]] = {thing["object"]: thing["box"] for thing in row["objects"]}
    for row in read_rows(tmp_path / "heldout.jsonl"):
        present = truth[row["image"]]
        chosen = row["chosen"].rstrip(".").split(", ")
        rejected = row["rejected"].rstrip(".").split(", ")
        assert set(chosen) <= set(present)
        assert set(rejected) - set(present) == set(row["hallucinated"])
        assert {finding["object"] for finding in row["evidence"]} == set(chosen + rejected)
        for finding in row["evidence"]:
            name = finding["object"]
            assert finding["status"] == ("present" if name in present else "absent")
            assert finding["box"] == present.get(name)
            named_by = {"chosen": (True, False), "rejected": (False, True), "both": (True, True)}
            assert named_by[finding["claimed_by"]] == (name in chosen, name in rejected)


@pytest.mark.parametrize("category", ["colour", "shape", "other"])
def test_an_absent_object_is_the_near_miss_that_it_is_called(category):
    rng = np.random.default_rng(1)
    mix = [float(category == name) for name in ("colour", "shape", "other")]
    for _ in range(30):
        present = scenes.sample_kinds(rng, 4)
        absent, called = scenes.pick_absent(rng, present[0], present, mix)
        same = [a == b for a, b in zip(absent.split(), present[0].split())]  # colour, shape
        assert called == category and absent not in present
        assert same == {"colour": [0, 1], "shape": [1, 0], "other": [0, 0]}[category]


# ---- The shipped build --------------------------------------------------------------------------
def test_the_shipped_world_is_whole_and_light():
    files = {str(path.relative_to(WORLD)) for path in WORLD.rglob("*") if path.is_file()}
    assert {"expert.pt", "world.json", "model/model.safetensors", "model/config.json"} <= files
    assert {"model/tokenizer.json", "model/processor_config.json"} <= files
    assert sum((WORLD / name).stat().st_size for name in files) < 12e6
    world = json.loads((WORLD / "world.json").read_text())
    assert {"seed", "base_model", "expert", "seconds"} <= set(world)


def strings_in(value):
    """All strings of a JSON value, its keys among them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list):
        return []
    found = []
    for part in value:
        found += strings_in(part)
    return found


def test_the_shipped_world_tells_nothing_of_the_machine_it_was_built_on():
    strings = []
    for path in WORLD.rglob("*.json"):
        strings += strings_in(json.loads(path.read_text()))
    with zipfile.ZipFile(WORLD / "expert.pt") as archive:
        operations = pickletools.genops(archive.read("expert/data.pkl"))
    strings += [value for _, value, _ in operations if isinstance(value, str)]
    assert len(strings) > 1000
    for text in strings:
        assert not re.match(r"/\w|~|[A-Z]:\\", text), text  # an absolute path
        assert not re.search(r"20\d\d-\d\d-\d\d", text), text  # a date


def test_the_shipped_tokenizer_knows_every_word_of_the_prompts(shipped):
    """It was built from common.py's template: who changes that must build the world anew."""
    tokenizer = shipped[1].tokenizer
    assert tokenizer.get_vocab() == build_world.build_processor().tokenizer.get_vocab()
    critique = "A: red circle: yes\nVerdict: A"
    for style in INSTRUCTIONS:
        text = build_judge_prompt(scenes.PROMPT, "red circle, blue star.", "ring.", style, critique)
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer("A").input_ids != tokenizer(" A").input_ids


@torch.no_grad()
def test_short_cut_gives_the_ordinary_logits(shipped):
    model, processor = shipped
    rng = np.random.default_rng(0)
    styles = (scenes.PLAIN, scenes.USER, scenes.USER)
    bank = [scenes.draw_ordinary_scene(rng, style) for style in styles]
    trainer = Trainer(model, processor, bank)
    prompts = ("What?", scenes.PROMPT, "A: red circle: yes")
    rows = [Row(i, prompt, "red circle.") for i, prompt in enumerate(prompts)]
    ids, logits = trainer.shortcut_logits(rows)
    for i, row in enumerate(rows):
        picture = Image.fromarray(bank[row.image].picture)
        inputs = encode_prompts(processor, [row.prompt], [picture])
        n = inputs["input_ids"].shape[1]
        assert inputs["input_ids"][0].tolist() == ids[i, :n].tolist()
        assert torch.allclose(model(**inputs).logits[0], logits[i, :n], atol=1e-3, rtol=1e-4)


def test_the_shipped_expert_detects(monkeypatch, tmp_path):
    for name in ("YOLO_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    from ultralytics import YOLO

    expert = YOLO(WORLD / "expert.pt", verbose=False)
    assert list(expert.names.values()) == scenes.KINDS
    rng = np.random.default_rng(0)
    n_there, n_found = 0, 0
    for _ in range(10):
        scene = scenes.draw_ordinary_scene(rng)
        picture = Image.fromarray(scene.picture)
        [result] = expert.predict(picture, imgsz=96, conf=0.25, verbose=False, device="cpu")
        found = {scenes.KINDS[int(kind)] for kind in result.boxes.cls}
        n_there += len(scene.objects)
        n_found += sum(thing["object"] in found for thing in scene.objects)
    assert n_found / n_there > 0.6  # .91 over many pictures


# ---- The builder --------------------------------------------------------------------------------
def test_the_question_is_the_one_that_stage_01_asks():
    question = re.escape(build_world.YES_NO_PROMPT).replace(r"\{object\}", r"\{\w+\}")
    assert re.search(question, (ROOT / "01_build_preferences.py").read_text())


def test_the_builder_leaves_a_folder_alone_that_holds_something(tmp_path, monkeypatch):
    monkeypatch.setattr(build_world, "build_judge", None)  # would fail if it came so far
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        build_world.main(build_world.parse_args(["--out", str(tmp_path), "--seed", "4"]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_judge_lacks_is_named():
    good = {"accuracy": 0.53, "well_formed": 0.97, "guided_accuracy": 1.0}
    good |= {"check_accuracy": 0.95, "verdict_follows": 0.63}
    assert build_world.lacking(good) == []
    deaf = {**good, "verdict_follows": 0.5}
    assert build_world.lacking(deaf) == ["verdict_follows 0.500, wanted 0.60-1.00"]


class FakeTrainer(Trainer):
    """Has no model: the log-odds of A are what the test says."""

    def __init__(self, processor, log_odds):
        self.tokenizer = processor.tokenizer
        ids = self.tokenizer.convert_tokens_to_ids(["Verdict", " A", " B"])
        self.verdict, self.side_a, self.side_b = ids
        self.log_odds = log_odds

    def shortcut_logits(self, rows):
        ids = torch.tensor([self.tokenizer(row.response).input_ids for row in rows])
        logits = torch.zeros(*ids.shape, len(self.tokenizer))
        for i, row in enumerate(rows):
            logits[i, -2, self.side_a] = self.log_odds[row.prompt]  # at the colon
        return ids, logits


@pytest.mark.parametrize("log_odds, follows", [((2, 1), 1), ((-1, 1), 0), ((1, 1, 0), 0.5)])
def test_verdict_follows_compares_critiques_for_a_with_those_for_b(shipped, log_odds, follows):
    """50 critiques for A, then as many for B with each of the other log-odds."""
    for_a, *for_b = log_odds
    rows = [Row(0, "for A", "Verdict: A")] * 50
    for i in range(len(for_b)):
        rows += [Row(0, f"for B {i}", "Verdict: B")] * 50
    values = {"for A": for_a} | {f"for B {i}": value for i, value in enumerate(for_b)}
    assert FakeTrainer(shipped[1], values).verdict_follows(rows) == follows


def test_only_the_verdict_is_learned_from_a_critique_with_answers_by_chance(shipped):
    rng = np.random.default_rng(0)
    bank = [scenes.draw_ordinary_scene(rng) for _ in range(4)]
    trainer = Trainer(*shipped, bank)
    rows = build_world.Rows(rng, trainer.present, np.arange(4))
    drawn = [rows.only_verdict() for _ in range(20)]
    ids, weights = trainer.encode(drawn)
    for row, row_ids, row_weights in zip(drawn, ids, weights):
        learned = trainer.tokenizer.convert_ids_to_tokens(row_ids[row_weights > 0])
        assert learned == [f" {row.response[-1]}", "<|im_end|>"]
        n_no = {side: 0 for side in "AB"}
        for side, _, supported in parse_checks(row.response):
            n_no[side] += not supported
        assert row.response.endswith("A") == (n_no["A"] < n_no["B"]) and n_no["A"] != n_no["B"]


def test_a_build_that_still_lacks_something_in_the_end_is_refused(monkeypatch):
    """A stand-in judge that measures too well however often it goes on."""
    n_scenes = 160
    steps = []
    judged = {"accuracy": 0.8, "facts_true": 0.9, "well_formed": 0.97}
    trainer = Mock(present=[["red circle", "blue star"]] * n_scenes, pictures=[None] * n_scenes)
    trainer.check_accuracy.return_value = 0.95
    trainer.verdict_follows.return_value = 0.5
    monkeypatch.setattr(build_world, "measure_judge", lambda *args, **kwargs: judged)
    monkeypatch.setattr(build_world, "train_steps", lambda *args, **kwargs: steps.append(args[2]))
    rows = build_world.Rows(np.random.default_rng(0), trainer.present, np.arange(n_scenes))
    with pytest.raises(SystemExit, match="accuracy 0.800.*; verdict_follows 0.500") as refusal:
        build_world.steer(trainer, rows, None, np.arange(n_scenes), corrections=2)
    assert "\n" not in str(refusal.value)
    assert steps == [30, 30] and rows.wrong_absent == 0.8  # .6, .72, at most .8


# ---- The demo -----------------------------------------------------------------------------------
def test_the_demo_gives_later_stages_no_flag_that_an_earlier_one_fixed():
    steps = demo.commands("world", "pictures of mine", "run", 3, controls=("random", "best"))
    assert list(steps) == ["01", "02", "03", "04", "04 random", "04 best", "05"]
    for name, command in steps.items():
        fixed = {"--model", "--image-root", "--max-image-tokens"} if name != "01" else set()
        if name != "02":
            fixed.add("--style")
        assert not fixed & set(command)
    assert "pictures of mine/images" in steps["01"]  # a folder's spaces split nothing
    assert steps["04 best"][-2:] == ["--select", "best"]
