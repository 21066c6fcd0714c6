"""The toy world: its pictures are the same everywhere, its pairs are true, the shipped build is
whole and light, and the builder's short cuts give what the ordinary checkpoint gives."""

import hashlib
import re
from argparse import Namespace
from unittest.mock import Mock

import build_world
import numpy as np
import pytest
import scenes
import torch
from build_world import Row, Trainer
from conftest import ROOT, read_rows, stage
from demo import WORLD
from PIL import Image

from common import INSTRUCTIONS, build_judge_prompt, encode_prompts, parse_checks, verdict_of_checks


# ---- Pictures and pairs -------------------------------------------------------------------------
def test_pictures_and_rows_are_the_same_everywhere(tmp_path):
    scenes.write_pictures(tmp_path, 0, n_images=10, n_heldout=3)
    pixels = hashlib.sha256()
    for row in read_rows(tmp_path / "truth.jsonl"):  # decoded: a PNG's bytes are Pillow's choice
        pixels.update(np.asarray(Image.open(tmp_path / row["image"])).tobytes())
    text = (tmp_path / "truth.jsonl").read_text() + (tmp_path / "heldout.jsonl").read_text()
    rows = hashlib.sha256(text.encode())
    assert pixels.hexdigest()[:32] == "7ff9486db157bf57f9a0c770a71c25ff"
    assert rows.hexdigest()[:32] == "6f3130a96b0f10353ba1e781ed94f378"


def test_heldout_pairs_obey_the_truth(tmp_path):
    scenes.write_pictures(tmp_path, 2, n_images=0, n_heldout=60)
    truth = {}
    for row in read_rows(tmp_path / "truth.jsonl"):
        truth[row["image"]] = {thing["object"]: thing["box"] for thing in row["objects"]}
    named_by = {(1, 0): "chosen", (0, 1): "rejected", (1, 1): "both"}
    for row in read_rows(tmp_path / "heldout.jsonl"):
        present = truth[row["image"]]
        chosen, rejected = (row[side].rstrip(".").split(", ") for side in ("chosen", "rejected"))
        assert set(chosen) <= set(present)
        assert set(rejected) - set(present) == set(row["hallucinated"])
        assert {finding["object"] for finding in row["evidence"]} == set(chosen + rejected)
        for finding in row["evidence"]:
            name = finding["object"]
            assert finding["status"] == ("present" if name in present else "absent")
            assert finding["box"] == present.get(name)
            assert finding["claimed_by"] == named_by[name in chosen, name in rejected]


@pytest.mark.parametrize("seed", range(4))
def test_no_length_gives_the_better_response_away(tmp_path, seed):
    scenes.write_pictures(tmp_path / "many", seed, n_images=0, n_heldout=600)
    scenes.write_pictures(tmp_path / "few", seed, n_images=0, n_heldout=100)
    many, few = (read_rows(tmp_path / name / "heldout.jsonl") for name in ("many", "few"))
    assert few == many[:100]
    rows = stage("05_evaluate").heuristic_rows(many)
    assert np.mean([row["verdict"] == row["label"] for row in rows]) == pytest.approx(0.5, abs=0.02)
    fewer = [row["chosen"].count(",") - row["rejected"].count(",") for row in many]  # objects
    assert abs(np.sign(fewer).mean()) < 0.08  # .16 where a rejected one may name one more


# ---- The shipped build --------------------------------------------------------------------------
def test_the_shipped_world_is_whole_and_light():
    files = {path.name: path.stat().st_size for path in WORLD.rglob("*") if path.is_file()}
    assert {"expert.pt", "world.json", "model.safetensors"} <= files.keys()
    assert sum(files.values()) < 12e6


def test_the_shipped_tokenizer_knows_every_word_of_the_prompts(trained):
    """It was built from common.py's template: who changes that must build the world anew."""
    tokenizer = trained[1].tokenizer
    assert tokenizer.get_vocab() == build_world.build_processor().tokenizer.get_vocab()
    critique = "A: red circle: yes\nVerdict: A"
    for style in INSTRUCTIONS:
        text = build_judge_prompt(scenes.PROMPT, "red circle, blue star.", "ring.", style, critique)
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer("A").input_ids != tokenizer(" A").input_ids


@torch.no_grad()
def test_short_cut_gives_the_ordinary_logits(trained):
    (model, processor), rng = trained, np.random.default_rng(0)
    bank = [scenes.draw_ordinary_scene(rng) for _ in range(3)]
    prompts = ("What?", scenes.PROMPT, "A: red circle: yes")
    rows = [Row(i, prompt, "red circle.") for i, prompt in enumerate(prompts)]
    ids, logits = Trainer(model, processor, bank).shortcut_logits(rows)
    for i, row in enumerate(rows):
        inputs = encode_prompts(processor, [row.prompt], [Image.fromarray(bank[i].picture)])
        n = inputs["input_ids"].shape[1]
        assert inputs["input_ids"][0].tolist() == ids[i, :n].tolist()
        assert torch.allclose(model(**inputs).logits[0], logits[i, :n], atol=1e-3, rtol=1e-4)


# ---- The builder --------------------------------------------------------------------------------
def test_the_question_is_the_one_that_stage_01_asks():
    question = re.escape(build_world.YES_NO_PROMPT).replace(r"\{object\}", r"\{\w+\}")
    assert re.search(question, (ROOT / "01_build_preferences.py").read_text())


def test_the_builder_leaves_a_folder_alone_that_holds_something(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        build_world.main(Namespace(out=tmp_path, seed=0))


@pytest.mark.parametrize("log_odds, follows", [((2, 1), 1), ((-1, 1), 0), ((1, 1, 0), 0.5)])
def test_verdict_follows_compares_critiques_for_a_with_those_for_b(log_odds, follows):
    """50 critiques for A, then as many for B with each of the other log-odds; token 0 is the word
    "Verdict", at the colon behind it the log-odds of token 1, " A", against 2, " B", are read."""
    trainer = Mock(verdict=0, side_a=1, side_b=2)
    rows, outputs = [], []
    for k, value in enumerate(log_odds):
        rows += [Row(0, "", f"Verdict: {'B' if k else 'A'}")] * 50
        logits = torch.zeros(50, 3, 3)
        logits[:, 1, 1] = value
        outputs.append((torch.tensor([[0, 5, 1]] * 50), logits))
    trainer.shortcut_logits.side_effect = outputs
    assert Trainer.verdict_follows(trainer, rows) == follows


def test_only_the_verdict_is_learned_from_a_critique_with_answers_by_chance(trained):
    rng = np.random.default_rng(0)
    trainer = Trainer(*trained, [scenes.draw_ordinary_scene(rng) for _ in range(4)])
    rows = build_world.Rows(rng, trainer.present, np.arange(4))
    drawn = [rows.only_verdict() for _ in range(20)]
    for row, row_ids, row_weights in zip(drawn, *trainer.encode(drawn)):
        learned = trainer.tokenizer.convert_ids_to_tokens(row_ids[row_weights > 0])
        assert learned == [f" {row.response[-1]}", "<|im_end|>"]
        assert verdict_of_checks(parse_checks(row.response)) == row.response[-1]


def test_a_build_that_still_lacks_something_in_the_end_is_refused(monkeypatch):
    """A stand-in judge that measures too well however often it goes on."""
    steps, judged = [], {"accuracy": 0.8, "facts_true": 0.9, "well_formed": 0.97}
    trainer = Mock(present=[["red circle", "blue star"]] * 160, pictures=[None] * 160)
    trainer.check_accuracy.return_value = 0.95
    trainer.verdict_follows.return_value = 0.5
    monkeypatch.setattr(build_world, "measure_judge", lambda *args, **kwargs: judged)
    monkeypatch.setattr(build_world, "train_steps", lambda *args, **kwargs: steps.append(args[2]))
    rows = build_world.Rows(np.random.default_rng(0), trainer.present, np.arange(160))
    with pytest.raises(SystemExit, match="accuracy 0.800, wanted .*; verdict_follows 0.500"):
        build_world.steer(trainer, rows, None, np.arange(160), corrections=2)
    assert steps == [30, 30] and rows.wrong_absent == 0.8  # .6, .72, at most .8
