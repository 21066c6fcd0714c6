"""Several processes: two give what one gives, and a failure ends all."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import (
    ROOT,
    TWO_PROCESSES,
    correct_rows,
    judged_rows,
    read_rows,
    run,
    run_here,
    stage,
    steps_of,
)

import common

three = stage("03_train_ift")


def test_batches_are_shared_out_in_turn_and_come_back_in_order(monkeypatch):
    batches, said = [[1, 2], [3], [4, 5], [6], [7, 8, 9]], {}
    monkeypatch.setattr(common, "WORLD", 2)

    def gather(of_process, own):
        """The first round collects what the two would have sent, the second gives it to them."""
        said.setdefault(common.RANK, own)
        of_process[:] = said.get(0, [[]] * 3), said.get(1, [[]] * 3)

    def work(batch):
        return [10 * x for x in batch]

    monkeypatch.setattr(common.dist, "all_gather_object", gather)
    for rank in (0, 1, 0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        together = common.share_out(batches, work)
    assert said == {0: [[10, 20], [40, 50], [70, 80, 90]], 1: [[30], [60]]}
    assert together == [10 * x for x in range(1, 10)]


def test_a_steps_rows_are_shared_out(tiny, pictures, monkeypatch):
    """Each row of a step goes to one process, of either kind."""
    alone = steps_of(tiny[1], pictures)[0]
    expected = sorted(row["id"] for _, rows, _, _ in alone for row in rows)
    assert expected == sorted(row["id"] for row in judged_rows() + correct_rows())
    monkeypatch.setattr(three, "WORLD", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(three, "RANK", rank)
        step = steps_of(tiny[1], pictures)[0]
        shares.append([row["id"] for _, rows, _, _ in step for row in rows])
    assert sorted(shares[0] + shares[1]) == expected and len(shares[0]) == len(shares[1]) == 4


def test_numbers_are_summed_over_the_processes(monkeypatch):
    assert three.total([1.5, 2]) == [1.5, 2]

    def gather(of_process, own):
        of_process[:] = own, [10.0, 20]

    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(three, "WORLD", 2)
    monkeypatch.setattr(common.dist, "all_gather_object", gather)
    assert three.total([1.5, 2]) == [11.5, 22]


def test_a_batch_that_cannot_be_shared_evenly_is_refused(monkeypatch):
    monkeypatch.setattr(three, "WORLD", 3)
    with pytest.raises(SystemExit, match="--train-batch 32 is no multiple of the 3 processes"):
        three.check_train_batch(32)
    three.check_train_batch(33)


def test_only_the_first_process_speaks_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RANK", 1)

    def main(args):
        print("heard by nobody")
        common.write_json(tmp_path / "x.json", 1)
        common.write_text(tmp_path / "x.txt", "1")
        writer = common.RowWriter(tmp_path / "x.jsonl")
        writer.write({"id": 1})
        assert writer.rows == [{"id": 1}]
        if args:
            raise ValueError("in the middle")

    common.run(main, None)
    print("heard")
    with pytest.raises(ValueError, match="in the middle"):
        common.run(main, "args")
    print("again")
    assert capsys.readouterr().out == "heard\nagain\n" and not list(tmp_path.iterdir())


# ---- With torchrun -------------------------------------------------------------------------------
def same_rows(one, two):
    """Two jsonl files: the same rows, but for what rounding makes of a number."""
    rows, others = read_rows(one), read_rows(two)
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others):
        row.pop("tokens_per_s", None)
        for key, value in row.items():
            is_number = isinstance(value, float)
            expected = pytest.approx(value, rel=1e-2, abs=1e-3) if is_number else value
            assert other[key] == expected, (key, row, other)


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """({stage: command}, run folder): all five stages by one process."""
    folder = tmp_path_factory.mktemp("alone")
    pairs = (world / "heldout.jsonl").read_text().splitlines()[:40]
    (folder / "heldout.jsonl").write_text("\n".join(pairs))
    size = ["--batch-size", "16"]
    long = [*size, "--max-new-tokens", "96"]
    training = [*long, "--train-batch", "16", "--micro-batch", "4"]
    images = ["--images", f"{world}/images", "--image-root", str(world), "--limit", "120"]
    judge = ["--model", f"{world}/model", "--expert", f"{world}/expert.pt"]
    pairs = ["--candidates", "2", "--max-new-tokens", "24", "--validation", "6", "--train", "30"]
    prompts = ["--prompts", f"{world}/prompts.txt"]
    iteration = ["--iterations", "1", "--pool", "30", "--samples", "4", "--steps", "4"]
    heldout = ["--pairs", f"{folder}/heldout.jsonl", "--image-root", str(world)]
    stages = {
        "01_preferences": ["01_build_preferences.py", *images, *judge, *prompts, *pairs, *size],
        "02_critiques": ["02_generate_critiques.py", "--critiques", "2", *long],
        "03_ift": ["03_train_ift.py", "--steps", "6", "--lr", "1e-3", *training],
        "04_rejection": ["04_rejection_sampling.py", *iteration, "--lr", "1e-3", *training],
        "05_evaluation": ["05_evaluate.py", *heldout, *long],
    }
    for command in stages.values():
        run_here([*command, "--run", str(folder / "run")])
    return stages, folder / "run"


WRITTEN = {
    "01_preferences": ("candidates", "detections", "preferences"),
    "02_critiques": ("samples", "critiques"),
    "03_ift": ("metrics", "validation"),
    "04_rejection": ("iter1/samples", "iter1/kept", "iter1/metrics"),
    "05_evaluation": ("judgements",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_two_processes_give_what_one_gives(alone, tmp_path, name):
    """Each stage from what one process has left: the rows are then the same computation, and the
    trainings' sums differ by their order alone."""
    stages, one = alone
    later = [folder for folder in WRITTEN if folder >= name]
    two = shutil.copytree(one, tmp_path / "two", ignore=shutil.ignore_patterns(*later))
    run([*TWO_PROCESSES, *stages[name], "--run", str(two)])
    for file in WRITTEN[name]:
        same_rows(one / name / f"{file}.jsonl", two / name / f"{file}.jsonl")


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down(tmp_path):
    (tmp_path / "dies.py").write_text(f"""
import argparse
import sys
sys.path.insert(0, {str(ROOT)!r})
import common

def work(batch):
    if batch == [3]:
        common.stop("row 3 cannot be read")
    return batch

def main(args):
    common.start_stage(args, "x")
    common.share_out([[0], [1], [2], [3]], work)

common.run(main, argparse.Namespace(run={str(tmp_path)!r}, overwrite=False, device="cpu"))
""")
    command = [sys.executable, *TWO_PROCESSES, str(tmp_path / "dies.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0 and "error: row 3 cannot be read" in done.stderr


def test_auto_and_too_many_processes_are_refused(monkeypatch):
    def main(args):
        pytest.fail("started")

    monkeypatch.setattr(common, "WORLD", 2)
    with pytest.raises(SystemExit, match="--device auto .* without torchrun"):
        common.run(main, Namespace(device="auto"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="1 GPU.* --nproc-per-node can be 1 at most"):
        common.run(main, Namespace(device=None))
