"""Several processes: two give what one gives."""

import shutil

import pytest
import torch
from conftest import STAGES, read_rows, run, run_here, stage, steps_of
from demo import TWO_PROCESSES

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


def test_a_steps_rows_are_shared_out_and_its_numbers_summed(tiny, pictures, monkeypatch):
    """Each row of a step goes to one process, of either kind."""

    def ids():
        return [row["id"] for _, rows, _, _ in steps_of(tiny[1], pictures)(0) for row in rows]

    alone, of_process = ids(), []
    assert len(set(alone)) == 8 and three.total({"x": 1.5, "y": 2}) == {"x": 1.5, "y": 2}
    monkeypatch.setattr(three, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(three, "RANK", rank)
        of_process.append(ids())
    assert sorted(of_process[0] + of_process[1]) == sorted(alone)
    assert len(of_process[0]) == len(of_process[1])
    monkeypatch.setattr(common, "gather", lambda numbers: [numbers, {"x": 10.0, "y": 20}])
    assert three.total({"x": 1.5, "y": 2}) == {"x": 11.5, "y": 22}
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    monkeypatch.setattr(three.dist, "all_reduce", lambda gradient: gradient.mul_(3))
    three.sum_gradients([weight])
    assert weight.grad.tolist() == [3, 3]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RANK", 1)
    common.write_json(tmp_path / "x.json", 1)
    path, row = tmp_path / "x.jsonl", {"id": "1", "answers": []}
    rows = common.kept(path, common.Answers, [(1, 1)], lambda *_: [row], 1, "x")
    assert rows == [{"key": common.digest(1), **row}] and path.read_text() == ""
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [3, 4])
def test_a_step_has_a_row_for_each_process(monkeypatch, number):
    monkeypatch.setattr(three, "WORLD", 3)
    parse_args = stage(STAGES[number - 1]).parse_args
    assert parse_args(["--train-batch", "3"]).train_batch == 3
    with pytest.raises(SystemExit):
        parse_args(["--train-batch", "2"])


# ---- With torchrun -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """({stage: command}, run folder): all five stages by one process."""
    run_folder = tmp_path_factory.mktemp("alone") / "run"
    long = "--batch-size 16 --max-new-tokens 96"
    training = f"--lr 1e-3 {long} --train-batch 16 --micro-batch 4"
    images = f"--images {world}/images --image-root {world} --limit 150 --batch-size 16"
    judge = f"--model {world}/model --expert {world}/expert.pt --prompts {world}/prompts.txt"
    cut = "--candidates 2 --max-new-tokens 24 --validation 6 --heldout 20 --train 30"
    pool = "--pool 30 --samples 4 --steps 4"
    stages = {
        "01_preferences": f"01_build_preferences.py {images} {judge} {cut}",
        "02_critiques": f"02_generate_critiques.py --critiques 2 {long}",
        "03_ift": f"03_train_ift.py --steps 6 {training}",
        "04_rejection": f"04_rejection_sampling.py --iterations 1 {pool} {training}",
        "05_evaluation": f"05_evaluate.py {long}",
    }
    for name, command in stages.items():
        stages[name] = command.split()
        run_here([*stages[name], "--run", str(run_folder)])
    return stages, run_folder


@pytest.mark.slow
@pytest.mark.parametrize("k", range(5))
def test_two_processes_give_what_one_gives(alone, tmp_path, k):
    """Each stage from what one process has left: the rows are then the same computation, and the
    trainings' sums differ by their order alone."""
    stages, one = alone
    name, *_ = later = list(stages)[k:]
    two = shutil.copytree(one, tmp_path / "two", ignore=shutil.ignore_patterns(*later))
    said = run([*TWO_PROCESSES, *stages[name], "--run", str(two)])
    assert said.count("next: ") == 1  # the first process alone speaks
    paths = sorted(path for path in (one / name).rglob("*.jsonl") if path.stem != "answers")
    assert paths
    for path in paths:  # the same rows, but for what rounding makes of a number
        rows, others = read_rows(path), read_rows(two / path.relative_to(one))
        assert len(rows) == len(others) > 0
        for row, other in zip(rows, others):
            for key, value in row.items():
                is_number = isinstance(value, float)
                expected = pytest.approx(value, rel=1e-2, abs=1e-3) if is_number else value
                assert other[key] == expected, (path.name, key, row, other)
