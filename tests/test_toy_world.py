"""The builder's short cuts give what the ordinary checkpoint gives, and its pairs are what they claim to be."""
import json

import numpy as np
import pytest
import torch
import toy_world as toy
from common import INSTRUCTIONS, build_judge_prompt, encode_prompts
from conftest import ROOT
from PIL import Image


@torch.no_grad()
def test_short_cut_gives_the_ordinary_logits():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    processor = toy.build_processor()
    scenes = [toy.draw_ordinary_scene(rng, style) for style in ("plain", "user", "user")]
    trainer = toy.Trainer(toy.build_model(processor.tokenizer).eval(), processor, scenes)
    rows = [toy.Row(i, prompt, "red circle.") for i, prompt in enumerate(("What?", toy.PROMPTS[0], "A: red circle: yes"))]
    ids, logits = trainer.shortcut_logits(rows)
    for i, row in enumerate(rows):
        inputs = encode_prompts(processor, [row.prompt], [Image.fromarray(scenes[row.image][0])])
        n = inputs["input_ids"].shape[1]
        assert inputs["input_ids"][0].tolist() == ids[i, :n].tolist()
        assert torch.allclose(trainer.model(**inputs).logits[0], logits[i, :n], atol=1e-4)


def test_tokenizer_is_lossless_and_tells_a_spaced_letter_from_a_bare_one():
    tokenizer = toy.build_processor().tokenizer
    for style in INSTRUCTIONS:
        text = build_judge_prompt(toy.PROMPTS[0], "red circle, blue star.", "green ring.", style, "A: red circle: yes\nVerdict: A")
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert tokenizer("A").input_ids != tokenizer(" A").input_ids


def test_the_question_is_the_one_that_stage_01_asks():
    assert toy.YES_NO_PROMPT.format(object="{name}") in (ROOT / "01_build_preferences.py").read_text()


def test_pairs_are_what_they_claim():
    rng = np.random.default_rng(1)
    for _ in range(300):
        present = toy.sample_kinds(rng, rng.integers(2, 5))
        chosen, rejected, absent, category = toy.make_pair(rng, present)
        assert set(chosen) <= set(present) and set(rejected) - set(present) == {absent}
        assert category in ("colour", "shape", "other")


def test_a_finished_world_is_reused_and_other_arguments_are_refused(tmp_path, monkeypatch, capsys):
    built = []

    def build(out, seed, n_heldout, n_images):
        built.append((seed, n_heldout, n_images))
        (out / "model").mkdir(parents=True)
        return {"base_model": {"judge_accuracy": 0.5}, "expert": {}, "seconds": {}}

    monkeypatch.setattr(toy, "build_world", build)
    world = tmp_path / "world"

    def run(*flags):
        toy.main(toy.parse_args(["--out", str(world), "--heldout", "5", "--images", "7", *flags]))

    run("--seed", "3")
    assert built == [(3, 5, 7)] and json.loads((world / "meta.json").read_text())["args"]["seed"] == 3
    run("--seed", "3")
    assert len(built) == 1 and "reused" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other arguments"):
        run("--seed", "4")
    run("--seed", "4", "--overwrite")
    assert built[1:] == [(4, 5, 7)]
    (world / "meta.json").unlink()  # never finished: made anew
    run("--seed", "4")
    assert len(built) == 3
    (world / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="thesis.txt"):
        run("--seed", "5", "--overwrite")
    assert (world / "thesis.txt").exists()
