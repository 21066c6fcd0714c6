"""The benchmark's own arithmetic against numbers counted by hand, and that its commands are ones that the stages take."""
import json
import threading
from types import SimpleNamespace

import bench
import pytest
from conftest import STAGES, judged_rows, stage
from PIL import Image


def test_timed_counts_each_second_once_and_other_threads_not(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    owner = SimpleNamespace(inner=lambda kind: spend(3))

    def outer():
        spend(2)
        owner.inner(kind="a")
        owner.inner(kind="b")

    owner.outer = outer

    def work():
        spend(1)
        owner.outer()
        other = threading.Thread(target=owner.inner, kwargs={"kind": "c"})
        other.start()
        other.join()  # waited for, so it is part of the rest

    watches = (owner, "outer", "outer"), (owner, "inner", lambda call: call["kind"])
    assert bench.timed(watches, work) == {"a": 3, "b": 3, "outer": 2, "rest": 4}
    assert owner.outer is outer


def test_paired_leaves_out_the_warm_up_and_divides_pair_by_pair():
    ours = iter([{"x": 9.0}, {"x": 1.0, "y": 1.0}, {"x": 1.0, "y": 0.0}, {"x": 3.0, "y": 1.0}])  # 2, 1, 4
    theirs = iter([{"x": 9.0}, {"x": 3.0}, {"x": 5.0}, {"x": 4.0}])  # ratios 1.5, 5, 1
    row, where = bench.paired("p", lambda: next(ours), lambda: next(theirs), 3, "rows/s", amount=8)
    assert row == "| p | 4 rows/s | 2 rows/s | 1.00 | 1.50 | 5.00 |"
    assert where == "p, median seconds: ours x 1.00, y 1.00; theirs x 4.00"


def test_growth_of_a_linear_and_a_quadratic_stage():
    sizes = [100, 200, 400]
    rows, line = bench.growth("s", sizes, [2 + n / 100 for n in sizes], [50, 51, 52])  # 2 s to start, 10 ms a row
    assert rows.splitlines() == ["| scale, s, per 1,000 rows | 30.00 s | 15.00 s | | 0.50 | |",
                                 "| scale, s, peak memory | 50 MiB | 52 MiB | | 1.04 | |"]
    assert "last increase per row 1.00 of the first" in line and "6.8 KiB a row" in line  # 2 * 1024 / 300
    # n^2: (160,000 - 40,000) / 200 = 600 a row against (40,000 - 10,000) / 100 = 300
    assert "last increase per row 2.00 of the first" in bench.growth("s", sizes, [n * n for n in sizes], [1, 1, 1])[1]


def test_scale_gives_every_row_a_picture_and_the_stages_arguments_that_they_know(tmp_path):
    world, here = tmp_path / "world", tmp_path / "100"
    world.mkdir()
    Image.new("RGB", (8, 8)).save(world / "a.png")
    evidence = [{"object": "red ring", "status": "present", "confidence": 1.0, "box": [1, 1, 2, 2]},
                {"object": "blue star", "status": "absent", "confidence": 1.0, "box": None}]
    pair = {"image": "a.png", "prompt": "List.", "chosen": "red ring.", "rejected": "blue star.", "evidence": evidence}
    (world / "heldout.jsonl").write_text("".join(json.dumps({**pair, "id": f"p{k}"}) + "\n" for k in range(64)))
    bench.make_rows(world, here, 100)
    one, two, commands = stage(STAGES[0]), stage(STAGES[1]), bench.stage_commands(world, here, 100)
    args = {command[0].removesuffix(".py"): stage(command[0].removesuffix(".py")).parse_args(command[1:])
            for command in commands.values()}
    assert set(args) == set(STAGES)
    args[STAGES[0]].prompts = None
    items, counts = one.load_items(args[STAGES[0]], here)
    assert len({item["image"] for item in items}) == counts["rows read"] == 100
    images, vocabulary = [item["image"] for item in items], one.read_vocabulary(here / "vocabulary.json")
    found = one.read_detections(here / "detections.jsonl", images, vocabulary)
    assert all([d["object"] for d in row["detections"]] == ["red ring"] for row in found.values())
    assert len(two.read_pairs(here / "pairs.jsonl", here, here)[1]) == 50  # none is a duplicate


def test_train_ours_reports_what_train_did(tiny, pictures, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "two steps", {"steps": 2, "batch_size": 4, "micro_batch": 2})
    seconds, losses, rates = bench.train_ours(bench.with_adapter(tiny[0]), tiny[1], judged_rows(), "two steps", pictures)
    assert {"vision", "forward", "backward", "rest"} <= set(seconds) and len(losses) == 2
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4])  # of steps 1 and 2, and of one to come: a tenth of the peak
    ids = [row["id"] for row in bench.rows_of_steps(judged_rows(), "two steps")]
    assert sorted(ids[:4]) == sorted(ids[4:]) == sorted(row["id"] for row in judged_rows())


def test_without_trl_train_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    [(row, note)] = bench.bench_train(tmp_path, 1, None)
    assert "not measured" in row and "pip install trl" in note
