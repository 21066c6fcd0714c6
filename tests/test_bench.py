"""The benchmark's arithmetic, and that both sides of a comparison do the same work."""

from functools import partial

import bench
import bench_gpu
import pytest
from scenes import write_pictures

import common


@pytest.fixture
def data(trained, tmp_path):
    """Three steps of two critiques out of eight, of four held-out pairs of the toy world."""
    write_pictures(tmp_path, seed=0, n_images=0, n_heldout=4)
    critiques = bench.true_critiques(common.read_rows(tmp_path / "heldout.jsonl", dict))
    rows = bench.ift.training_rows(critiques)["critique"]
    settings = {**bench.SETTINGS, "steps": 3, "train_batch": 2}
    return bench.Training(rows, trained[1], tmp_path, settings, micro_batch=1)


# ---- Timing --------------------------------------------------------------------------------------
def test_sides_run_in_turn_and_the_warm_up_is_left_out():
    spent = iter([(9, "a"), (9, "b"), (1, "c"), (3, "d"), (2, "e"), (8, "f")])
    seconds, results = bench.in_turn(dict.fromkeys(("ours", "theirs"), partial(next, spent)), 2)
    assert seconds == {"ours": [1, 2], "theirs": [3, 8]}
    assert results == {"ours": "e", "theirs": "f"}


def test_ratios_are_taken_round_by_round():
    seconds = {"ours": [1, 2, 4], "x": [3, 8, 4], "y": [1, 1, 1]}
    assert bench.table_rows("what", seconds) == [
        "| what | x | 2.00 | 4.00 | 1.00 | 3.00 | 4.00 |",
        "| what | y | 2.00 | 1.00 | 0.25 | 0.50 | 1.00 |",
    ]


# ---- The same work -------------------------------------------------------------------------------
@pytest.mark.parametrize("other", [bench.generate_and_score, bench.plain_loop])
def test_sampling_sides_write_the_same_and_score_it_alike(trained, data, other):
    requests = bench.toy_questions(data.image_root, 3)  # of different lengths: with padding
    ours = common.sample(*trained, requests, 1, 0.0, 96)
    theirs = other(*trained, requests, 1, 0.0, 96)
    assert any(row["verdict"] for [row] in ours)
    for [a], [b] in zip(ours, theirs, strict=True):
        assert (a["text"], a["complete"], a["verdict"]) == (b["text"], b["complete"], b["verdict"])
        assert a["log_odds"] == pytest.approx(b["log_odds"], abs=1e-3)


def test_training_sides_have_the_same_losses(trained, data):
    pytest.importorskip("trl", reason="pip install trl")
    _, ours = bench.train_ours(trained[0], data)
    _, theirs = bench.train_theirs(trained[0], data)
    assert ours == pytest.approx(theirs, abs=2e-3)  # TRL rounds what it logs
    assert ours[0] != pytest.approx(ours[2], abs=2e-3)


# ---- Memory at real sizes: the same lines at a tiny one, on the CPU ------------------------------
def test_the_memory_bench_runs():
    family, text, vision = bench_gpu.SHAPES["2b"]
    rope = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    text = {**text, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    text |= {"rope_parameters": rope, "head_dim": 16}
    vision = {**vision, "depth": 2, "num_heads": 2, "embed_dim": 32, "intermediate_size": 48}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    vision |= {"hidden_size": 32, "out_hidden_size": 64}
    flags = ["--max-image-tokens", "8", "--steps", "1", "--questions", "2", "--micro-batch", "16"]
    args = bench_gpu.parse_args(["2b", *flags, "--max-new-tokens", "4"])
    lines = bench_gpu.measure((family, text, vision), args, "cpu")
    assert [line.split()[0] for line in lines] == ["weights", "sampling:", "training:"]
