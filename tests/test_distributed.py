"""Several processes: two give what one gives, a step's gradient is the same however it is shared out, and a failure ends all."""
import json
import os
import shutil
import subprocess
import sys

import common
import pytest
from conftest import ROOT, run, run_here

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]


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


@pytest.mark.slow
def test_two_processes_give_what_one_gives(world, tmp_path):
    size = ["--batch-size", "16"]
    train = [*size, "--train-batch", "16", "--micro-batch", "4", "--max-new-tokens", "96"]
    stages = {
        "01": ["01_build_preferences.py", "--images", f"{world}/images", "--image-root", str(world), "--model", f"{world}/model",
               "--expert", f"{world}/expert.pt", "--prompts", f"{world}/prompts.txt", "--limit", "120", "--candidates", "2",
               "--max-new-tokens", "24", "--validation", "6", "--train", "30", *size],
        "02": ["02_generate_critiques.py", "--critiques", "2", "--max-new-tokens", "96", *size],
        "03": ["03_train_ift.py", "--steps", "12", "--lr", "3e-3", "--bt-weight", "0.1", *train],
        "04": ["04_rejection_sampling.py", "--iterations", "1", "--pool", "30", "--samples", "4", "--steps", "4", "--lr", "1e-3", *train],
        "05": ["05_evaluate.py", "--pairs", f"{tmp_path}/heldout.jsonl", "--image-root", str(world), "--max-new-tokens", "96", *size]}
    (tmp_path / "heldout.jsonl").write_text("\n".join((world / "heldout.jsonl").read_text().splitlines()[:40]))
    one, two = tmp_path / "one", tmp_path / "two"
    for name, command in stages.items():
        run_here([*command, "--run", str(one)])
        if name == "05":  # by the same adapters: those of the two trainings may differ in the last bits
            by_two = two
            two = tmp_path / "copy"
            shutil.copytree(one, two, ignore=lambda folder, names: ["05_evaluation"])
        run([*TORCHRUN, *command, "--run", str(two)])
    for line, line_by_two in zip(*(rows(folder / "03_ift/metrics.jsonl") for folder in (one, by_two)), strict=True):
        line.pop("tokens_per_s", None)
        assert line_by_two.get("grad_norm", 1) == pytest.approx(line.pop("grad_norm", 1), rel=1e-3)
        assert {key: line_by_two[key] for key in line} == pytest.approx(line, abs=1e-4)
    kept, kept_by_two = ([(row["id"], row["critique"]) for row in rows(folder / "04_rejection/iter1/kept.jsonl")]
                         for folder in (one, by_two))
    assert kept == kept_by_two and len(kept) >= 4
    for name in ("01_preferences/candidates", "01_preferences/detections", "01_preferences/preferences", "02_critiques/samples",
                 "02_critiques/critiques", "05_evaluation/judgements"):
        folder = two if name.startswith("05") else by_two
        assert (folder / f"{name}.jsonl").read_bytes() == (one / f"{name}.jsonl").read_bytes() != b"", name


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_down(tmp_path):
    (tmp_path / "dies.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import argparse, common
args = argparse.Namespace(run={str(tmp_path)!r}, overwrite=False)
common.start_stage(args, "x")
common.share_out([[0], [1], [2], [3]], lambda batch: batch if batch != [3] else common.stop("row 3 cannot be read"))
""")
    done = subprocess.run([sys.executable, *TORCHRUN, str(tmp_path / "dies.py")], capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode != 0 and "error: row 3 cannot be read" in done.stderr
