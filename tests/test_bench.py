"""The benchmark's arithmetic, and that both sides of a comparison do the same work."""

import copy

import bench
import bench_gpu
import pytest
import torch
from conftest import ROOT
from scenes import write_pictures

import common


@pytest.fixture(scope="module")
def judge():
    """(model, processor) of the shipped world, which writes verdicts; on the CPU, so in float32."""
    return bench.toy_judge(ROOT / "tests" / "world", device="cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with four held-out pairs and their pictures."""
    folder = tmp_path_factory.mktemp("drawn")
    write_pictures(folder, seed=0, n_images=0, n_heldout=4)
    return folder


@pytest.fixture
def data(judge, drawn):
    """Steps of two critiques out of eight."""
    critiques = bench.true_critiques(common.read_jsonl(drawn / "heldout.jsonl"))
    sizes = {"train_batch": 2, "micro_batch": 1, "max_response_tokens": None}
    return bench.ift.TrainingSteps(critiques, judge[1], drawn, lam=0.0, seed=0, **sizes)


# ---- Timing --------------------------------------------------------------------------------------
def test_sides_run_in_turn_and_the_warm_up_is_left_out():
    calls = []

    def side(name, seconds):
        def run():
            calls.append(name)
            return seconds.pop(0), len(calls)

        return run

    sides = {"ours": side("ours", [9, 1, 2]), "theirs": side("theirs", [9, 3, 8])}
    seconds, results = bench.in_turn(sides, runs=2)
    assert calls == ["ours", "theirs"] * 3
    assert seconds == {"ours": [1, 2], "theirs": [3, 8]}
    assert results == {"ours": 5, "theirs": 6}


def test_ratios_are_taken_round_by_round():
    seconds = {"ours": [1, 2, 4], "x": [3, 8, 4], "y": [1, 1, 1]}
    assert bench.table_rows("what", seconds) == [
        "| what | x | 2.00 | 4.00 | 1.00 | 3.00 | 4.00 |",
        "| what | y | 2.00 | 1.00 | 0.25 | 0.50 | 1.00 |",
    ]


def test_timed_reads_the_clock_around_the_call(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.timed(divmod, 7, 2) == (2.5, (3, 1))


# ---- The same work -------------------------------------------------------------------------------
@pytest.mark.parametrize("other", [bench.generate_and_score, bench.plain_loop])
def test_sampling_sides_write_the_same_and_score_it_alike(judge, drawn, other):
    requests = bench.toy_questions(drawn, 3)  # prompts of different lengths, so with padding
    ours = common.sample(*judge, requests, 1, 0.0, 96)
    theirs = other(*judge, requests, 1, 0.0, 96)
    assert any(row["verdict"] for [row] in ours)
    for [a], [b] in zip(ours, theirs, strict=True):
        assert (a["text"], a["complete"], a["verdict"]) == (b["text"], b["complete"], b["verdict"])
        assert a["log_odds"] == pytest.approx(b["log_odds"], abs=1e-3)


@pytest.mark.parametrize("other", [bench.generate_and_score, bench.plain_loop])
def test_each_request_gets_n_samples_that_differ(judge, drawn, other):
    torch.manual_seed(0)
    answers = other(*judge, bench.toy_questions(drawn, 1), 4, 1.0, 32)
    assert [len(samples) for samples in answers] == [4, 4]
    assert len({row["text"] for samples in answers for row in samples}) > 2


def test_the_other_side_trains_on_the_rows_of_each_step(data):
    rows = bench.rows_in_order(data, steps=5)
    for step in range(5):
        ids = [row["id"] for _, part, _, _ in data[step] for row in part]
        assert sorted(ids) == sorted(row["id"] for row in rows[2 * step : 2 * step + 2])


def test_training_leaves_the_model_and_starts_the_same_each_time(judge, data):
    before = copy.deepcopy(judge[0].state_dict())
    _, first = bench.train_ours(judge[0], data, 2, lr=1e-3)
    _, second = bench.train_ours(judge[0], data, 2, lr=1e-3)
    assert first == pytest.approx(second, abs=1e-5)
    assert all(torch.equal(before[name], x) for name, x in judge[0].state_dict().items())


def test_training_sides_have_the_same_losses(judge, data):
    pytest.importorskip("trl", reason="pip install trl")
    _, ours = bench.train_ours(judge[0], data, 3, lr=1e-3)
    _, theirs = bench.train_theirs(judge[0], data, 3, lr=1e-3)
    assert ours == pytest.approx(theirs, abs=2e-3)  # TRL rounds what it logs
    assert ours[0] != pytest.approx(ours[2], abs=2e-3)


def test_without_trl_train_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    lines, [note] = bench.bench_train(tmp_path, tmp_path, 1)
    assert lines == []
    assert "pip install trl" in note


# ---- Memory at real sizes: the same lines at a tiny one, on the CPU ------------------------------
@pytest.mark.parametrize("name", ["7b", "2b"])
def test_the_memory_bench_runs(name, monkeypatch, capsys):
    family, text, vision = bench_gpu.SHAPES[name]
    rope = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    text = {**text, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    text |= {"rope_parameters": rope}
    vision = {**vision, "depth": 2, "num_heads": 2}
    if family == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 64}
    else:
        text["head_dim"] = 16
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    flags = ["--max-image-tokens", "8", "--steps", "1", "--questions", "2", "--micro-batch", "16"]
    args = bench_gpu.parse_args([name, *flags, "--max-new-tokens", "4"])
    lines = bench_gpu.measure((family, text, vision), args, "cpu")
    assert [line.split()[0] for line in lines] == ["weights", "sampling:", "training:"]
