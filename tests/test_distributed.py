"""Several processes: two give what one gives, a step's gradient is the same however it is shared out, and a failure ends all."""
import argparse
import json
import os
import shutil
import subprocess
import sys

import common
import pytest
import torch
from conftest import ROOT, run, run_here, stage
from demo import TWO_PROCESSES
from safetensors.torch import load_file


def test_batches_are_shared_out_in_turn_and_come_back_in_order(monkeypatch):
    batches, said = [[1, 2], [3], [4, 5], [6], [7, 8, 9]], {}
    monkeypatch.setattr(common, "WORLD", 2)

    def gather(of_rank, done):  # the first round collects what the two would have sent, the second gives it to them
        said.setdefault(common.RANK, done)
        of_rank[:] = said.get(0, []), said.get(1, [[]] * 3)
    monkeypatch.setattr(common.dist, "all_gather_object", gather)
    for rank in (0, 1, 0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        together = common.share_out(batches, lambda batch: [10 * x for x in batch])
    assert said == {0: [[10, 20], [40, 50], [70, 80, 90]], 1: [[30], [60]]}
    assert together == [10 * x for x in range(1, 10)]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_training(one, two):
    """The metrics.jsonl of two folders: the same losses and validation measures, but for what rounding makes of a gradient."""
    for line, line_by_two in zip(rows(one / "metrics.jsonl"), rows(two / "metrics.jsonl"), strict=True):
        line.pop("tokens_per_s", None)
        assert line_by_two.get("grad_norm", 1) == pytest.approx(line.pop("grad_norm", 1), rel=1e-3)
        assert {key: line_by_two[key] for key in line} == pytest.approx(line, abs=1e-4)


def same_weights(one, two):
    """Two safetensors files: the same keys, shapes and dtypes, and values that the same training in another order gives."""
    first, second = load_file(one), load_file(two)
    assert {key: (w.shape, w.dtype) for key, w in first.items()} == {key: (w.shape, w.dtype) for key, w in second.items()}
    assert all((second[key] - w).abs().max() < 1e-3 for key, w in first.items())


def kept(run):
    return [(row["id"], row["critique"]) for row in rows(run / "04_rejection/iter1/kept.jsonl")]


def copied(run, folder, *without):
    shutil.copytree(run, folder, ignore=lambda _, names: without)
    return folder


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """({number of the stage: command}, run folder): all five stages by one process."""
    folder, size = tmp_path_factory.mktemp("alone"), ["--batch-size", "16"]
    train = [*size, "--train-batch", "16", "--micro-batch", "4", "--max-new-tokens", "96"]
    stages = {
        "01": ["01_build_preferences.py", "--images", f"{world}/images", "--image-root", str(world), "--model", f"{world}/model",
               "--expert", f"{world}/expert.pt", "--prompts", f"{world}/prompts.txt", "--limit", "120", "--candidates", "2",
               "--max-new-tokens", "24", "--validation", "6", "--train", "30", *size],
        "02": ["02_generate_critiques.py", "--critiques", "2", "--max-new-tokens", "96", *size],
        "03": ["03_train_ift.py", "--steps", "12", "--lr", "3e-3", "--bt-weight", "0.1", *train],
        "04": ["04_rejection_sampling.py", "--iterations", "1", "--pool", "30", "--samples", "4", "--steps", "4", "--lr", "1e-3", *train],
        "05": ["05_evaluate.py", "--pairs", f"{folder}/heldout.jsonl", "--image-root", str(world), "--max-new-tokens", "96", *size]}
    (folder / "heldout.jsonl").write_text("\n".join((world / "heldout.jsonl").read_text().splitlines()[:40]))
    for command in stages.values():
        run_here([*command, "--run", str(folder / "run")])
    return stages, folder / "run"


@pytest.mark.slow
def test_two_processes_give_what_one_gives(alone, tmp_path):
    stages, one = alone
    by_two = tmp_path / "two"
    for name, command in stages.items():  # 05 by the same adapters: those of the two trainings may differ in the last bits
        two = copied(one, tmp_path / "copy", "05_evaluation") if name == "05" else by_two
        run([*TWO_PROCESSES, *command, "--run", str(two)])
    same_training(one / "03_ift", by_two / "03_ift")
    assert kept(one) == kept(by_two) and len(kept(one)) >= 4
    for name in ("01_preferences/candidates", "01_preferences/detections", "01_preferences/preferences", "02_critiques/samples",
                 "02_critiques/critiques", "05_evaluation/judgements"):
        folder = two if name.startswith("05") else by_two
        assert (folder / f"{name}.jsonl").read_bytes() == (one / f"{name}.jsonl").read_bytes() != b"", name


@pytest.mark.slow
def test_a_sharded_judge_gives_what_a_whole_one_gives(alone, tmp_path):
    """Each stage after what one process has left, with batches that two processes cannot share evenly."""
    stages, one = alone
    later = ["02_critiques", "03_ift", "04_rejection", "05_evaluation"]
    two = {name: copied(one, tmp_path / name, *later[int(name) - 2:]) for name in ("02", "03", "04")}
    for name, folder in two.items():
        activations = ["--checkpoint-activations"] if name == "03" else []
        assert "one of 2 shares" in run([*TWO_PROCESSES, *stages[name], "--run", str(folder), "--shard", *activations])
    assert (two["02"] / "02_critiques/samples.jsonl").read_bytes() == (one / "02_critiques/samples.jsonl").read_bytes() != b""
    for name, place in (("03", "03_ift"), ("04", "04_rejection/iter1")):
        same_training(one / place, two[name] / place)
        same_weights(one / place / "adapter/adapter_model.safetensors", two[name] / place / "adapter/adapter_model.safetensors")
        common.load_judge(f"{json.loads((one / '03_ift/args.json').read_text())['model']}", two[name] / place / "adapter", "cpu")
    assert kept(two["04"]) == kept(one)


STEPS_OF_BF16 = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import argparse, json, pathlib, common, torch
from conftest import judged_rows, stage
from torch.distributed.fsdp import FSDPModule
common.pick_dtype = lambda device: torch.bfloat16  # as on a GPU: frozen weights in bf16 beside trained ones in float32
three, here = stage("03_train_ift"), pathlib.Path({here!r})
args = argparse.Namespace(run=str(here / str(common.WORLD)), overwrite=False, model={model!r}, device="cpu", max_image_tokens=None,
                          seed=0, shard=common.WORLD > 1)
folder = three.start_stage(args, "x")
model, processor = three.load_judge(args, rank=4)
if args.shard:
    layers = common.unwrap(model).model.language_model.layers
    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    assert {{*layers, model}} <= {{*sharded}} and len(sharded) < 2 + len(layers) + len(common.unwrap(model).model.visual.blocks)
    ours, all_ = (sum(size(w) for w in model.parameters()) for size in (lambda w: w.to_local().numel(), torch.numel))
    assert 0.45 < ours / all_ < 0.55
three.train(model, processor, judged_rows(), [], folder, steps=2, lr=1e-3, lam=0.0, bt_weight=0.0, batch_size=4, micro_batch=1, seed=0,
            image_root={pictures!r}, max_response_tokens=64)
"""


@pytest.mark.slow
def test_a_sharded_judge_is_in_shares_and_may_be_bf16(tiny, pictures, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS_OF_BF16.format(root=str(ROOT), here=str(tmp_path), model=tiny[0].config._name_or_path, pictures=str(pictures)))
    for way in ([], TWO_PROCESSES):
        run([*way, str(script)])
    one, two = (rows(tmp_path / processes / "x" / "metrics.jsonl") for processes in "12")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=0.01) and one[0]["loss"] > 1


@pytest.mark.slow
def test_full_fine_tuning_of_a_sharded_judge(alone, tmp_path):
    """Here the outermost group, which holds embeddings and language head, is trained as well."""
    stages, one = alone
    folders = [copied(one, tmp_path / name, "03_ift", "04_rejection", "05_evaluation") for name in ("whole", "sharded")]
    command = [*stages["03"], "--lora-rank", "0", "--steps", "3", "--lr", "1e-3"]
    run_here([*command, "--run", str(folders[0])])
    run([*TWO_PROCESSES, *command, "--run", str(folders[1]), "--shard"])
    same_training(folders[0] / "03_ift", folders[1] / "03_ift")
    same_weights(*(folder / "03_ift/model/model.safetensors" for folder in folders))
    run([*TWO_PROCESSES, *stages["04"], "--select", "continue", "--run", str(folders[1]), "--shard"])  # goes on from model/
    trained = folders[1] / "04_rejection_continue/iter1/model"
    model, _ = common.load_judge(str(trained), device="cpu")
    assert type(model).__name__ == json.loads((trained / "config.json").read_text())["architectures"][0]
    assert not torch.equal(model.get_input_embeddings().weight, common.load_judge(
        str(folders[1] / "03_ift/model"), device="cpu")[0].get_input_embeddings().weight)


def test_a_shard_without_other_processes_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--shard .* torchrun"):
        stage("03_train_ift").start_stage(argparse.Namespace(run=str(tmp_path), overwrite=False, shard=True), "03_ift")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_down(tmp_path):
    (tmp_path / "dies.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import argparse, common
args = argparse.Namespace(run={str(tmp_path)!r}, overwrite=False)
common.start_stage(args, "x")
common.share_out([[0], [1], [2], [3]], lambda batch: batch if batch != [3] else common.stop("row 3 cannot be read"))
""")
    done = subprocess.run([sys.executable, *TWO_PROCESSES, str(tmp_path / "dies.py")], capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode != 0 and "error: row 3 cannot be read" in done.stderr
