"""Answers are kept: what is found, what is made. Rows, weights, folders; how a script ends."""

import json
import subprocess
import sys
from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, read_rows
from PIL import Image

import common
from common import Answers, kept, start_stage


# ---- kept ----------------------------------------------------------------------------------------
def run_kept(path, numbers, fails_at=None):
    chunks = []  # of three, in which rows of these numbers were made

    def work(inputs, bar):
        if fails_at in inputs:
            raise KeyboardInterrupt
        chunks.append(inputs)
        return [{"id": f"é\n{x}", "answers": []} for x in inputs]

    rows = kept(path, Answers, [({"x": x}, x) for x in numbers], work, 3, "numbers")
    assert [row["id"] for row in rows] == [f"é\n{x}" for x in numbers]
    return chunks


def test_what_is_there_is_used_and_the_rest_is_made_in_chunks(tmp_path):
    path = tmp_path / "answers.jsonl"
    assert run_kept(path, range(7)) == [[0, 1, 2], [3, 4, 5], [6]]
    rows = read_rows(path)
    assert len(rows) == 7 and run_kept(path, range(7)) == []
    assert run_kept(path, [5, 9, 0, 1, 8, 6]) == [[9, 8]]  # in the order of the tasks
    assert run_kept(path, [11, 3, 11, 12, 11]) == [[11, 12]]  # two alike are done once
    assert read_rows(path)[:7] == rows and len(read_rows(path)) == 11  # nothing is ever deleted


@pytest.mark.parametrize("k", range(3))
def test_an_interrupted_run_goes_on_to_the_same_chunks_and_bytes(tmp_path, k):
    path = tmp_path / "answers.jsonl"
    chunks, data = run_kept(path, range(7)), path.read_bytes()
    ends = [0, *(i + 2 for i in range(len(data)) if data[i : i + 2] == b"\n\n")]
    for length in (ends[k], ends[k] + 1, ends[k] + 20, ends[k + 1] - 1):  # chunk k is torn
        path.write_bytes(data[:length])
        assert run_kept(path, range(7)) == chunks[k:]
        assert path.read_bytes() == data
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run_kept(path, range(7), fails_at=3 * k)
    assert path.read_bytes() == data[: ends[k]]


# ---- ask -----------------------------------------------------------------------------------------
@pytest.fixture
def ask(tmp_path, monkeypatch):
    calls = []  # of a judge that only notes what it is asked

    def sample(model, processor, requests, batch_size, bar, **sampling):
        calls.append(requests)
        answer = {"complete": True, "verdict": None, "log_odds": None}
        return [[{"text": f"{row['text']} {sampling}", **answer}] * 2 for row in requests]

    def asked(requests, weights="w", image_root="root", batch_size=4, **changed):
        calls.clear()
        sampling = {"n": 2, "temperature": 0.7, "max_new_tokens": 9, "seed": 5, **changed}
        to = (tmp_path / "x", Namespace(weights=weights, loaded=("m", "p")), requests, "ask")
        answers = common.ask(*to, image_root=image_root, batch_size=batch_size, **sampling)
        texts = [[answer["text"] for answer in samples] for samples in answers]
        assert texts == [[f"{row['text']} {sampling}"] * 2 for row in requests]
        return list(calls)

    monkeypatch.setattr(common, "sample", sample)
    return asked


def five():
    rows = [{"id": f"q{i}", "image": f"{i}.png", "text": f"text {i}"} for i in range(4)]
    return [*rows, {"id": "q4", "image": Image.new("RGB", (3, 4), "red"), "text": "text 4"}]


def test_each_request_is_asked_as_it_is(ask, monkeypatch):
    [made] = ask(five())
    assert [str(row["image"]) for row in made[:4]] == [f"root/{i}.png" for i in range(4)]
    assert made[4]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert [(row["id"], row["text"]) for row in made] == [(f"q{i}", f"text {i}") for i in range(5)]
    assert ask(five(), image_root="moved", batch_size=1) == []  # neither decides an answer
    monkeypatch.setattr(common, "CHUNK", 4)  # sequences, so two requests of two samples
    assert [len(chunk) for chunk in ask(five(), seed=6)] == [2, 2, 1]


def test_a_changed_dependency_makes_exactly_what_depends_on_it(ask):
    ask(five())
    blue = Image.new("RGB", (3, 4), "blue")
    changes = [(0, "id", "x"), (1, "text", "x"), (2, "image", "0.png"), (4, "image", blue)]
    for k, name, value in changes:
        rows = five()
        rows[k][name] = value
        assert [[row["id"] for row in chunk] for chunk in ask(rows)] == [[rows[k]["id"]]]
        assert ask(rows) == ask(five()) == []  # both are there now
    others = {"temperature": 0.0, "max_new_tokens": 8, "seed": 4, "weights": ["w", None]}
    for name, value in others.items():
        assert [len(chunk) for chunk in ask(five(), **{name: value})] == [5]
        assert ask(five(), **{name: value}) == ask(five()) == []


def test_weights_are_known_by_name_bound_and_digest(tmp_path):
    for name, data in {"a": "one", "b": "two", "c": "one"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(data)

    def weights(name="a", model="hub/id", **settings):
        return common.Judge(model, tmp_path / name, **settings).weights

    first = weights(device="cpu")
    assert json.loads(json.dumps(first)) == first == weights("c") and first[0] == "hub/id"
    others = [weights("b"), weights(model="other"), weights(max_image_tokens=9)]
    assert len({json.dumps(x) for x in [*others, first, common.Judge("hub/id").weights]}) == 5


# ---- Rows and files ------------------------------------------------------------------------------
ROW = '{"key": "k", "id": "i", "answers": [{"text": "x", "complete": true, "verdict": "A", '
ROW += '"log_odds": 1}]}'
DAMAGES = [('"id": "i", ', "", "id"), ('"i"', "null", "id"), ('"i"', "7", "id")]
DAMAGES += [("true", '"true"', "answers.0.complete"), ('"A"', '"C"', "answers.0.verdict")]
DAMAGES += [("1}", "NaN}", "answers.0.log_odds"), (ROW, "[1]", "dictionary")]
DAMAGES += [(ROW, ROW[:-3], "JSONDecodeError"), ("x", "\udce9", "utf-8")]  # half a letter


@pytest.mark.parametrize("old, new, words", DAMAGES)
def test_a_damaged_row_is_named_by_file_line_and_field(tmp_path, old, new, words):
    path, bad = tmp_path / "answers.jsonl", ROW.replace(old, new)
    path.write_bytes(f"{ROW}\n\n{bad}\n\n{ROW}\n\n".encode(errors="surrogateescape"))
    with pytest.raises(SystemExit, match=rf"^error: {path} line 3: .*\b{words}\b.*\Z"):
        kept(path, Answers, [], None, 1, "x")


@pytest.mark.parametrize("text", ["é 图", 'a " and \\ and \n', "line\u2028separator\x85", "\udce9"])
def test_rows_come_back_as_written_or_not_at_all(tmp_path, text):
    path, row = tmp_path / "x.jsonl", {"id": text, "answers": []}
    for _ in range(2):
        assert kept(path, Answers, [(text, 0)], lambda *_: [row], 1, "x")[0]["id"] == text
    for write in (common.write_jsonl, common.write_json):
        write(path, [row])
        data = path.read_bytes()
        with pytest.raises(TypeError):
            write(path, [row, {"y": object()}])
        assert path.read_bytes() == data and json.loads(data.strip(b"[]\n ")) == row
    assert [found.name for found in tmp_path.iterdir()] == ["x.jsonl"]


# ---- Stages: folders, moved runs, one-line endings -----------------------------------------------
HOLD = "import argparse, common, sys; args = argparse.Namespace(run=sys.argv[1]);"
HOLD += "common.start_stage(args, '03_ift'); print('held', flush=True); sys.stdin.read()"


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], **pipes)
    assert first.stdout.readline() == "held\n"  # and importing printed nothing
    with pytest.raises(SystemExit, match="another process is at work in .*03_ift: wait"):
        start_stage(Namespace(run=tmp_path), "03_ift")
    first.communicate("")
    assert start_stage(Namespace(run=tmp_path), "03_ift") == tmp_path / "03_ift"


def test_a_complete_stage_and_a_moved_run(tmp_path, monkeypatch, capsys):
    """An image root inside the run is a path from it; 01 has written it so."""
    monkeypatch.chdir(tmp_path)
    args = Namespace(run="a run", model="hub/id", image_root="world", seed=3)
    folder = start_stage(args, "01_preferences")
    with pytest.raises(SystemExit, match="01_preferences is not complete: first run .*01_"):
        common.stage_args("a run", "01_preferences")
    common.finish_stage(folder, args, {"rows": 3}, "python 02_x.py")
    assert "next: python 02_x.py --run='a run'" in capsys.readouterr().out
    assert common.read_json(folder / "meta.json")["counts"] == {"rows": 3}
    (tmp_path / "a run").rename("moved")
    found = common.stage_args(tmp_path / "moved", "01_preferences")
    moved = str(tmp_path / "moved" / "world")
    assert (found["image_root"], found["model"], found["seed"]) == (moved, "hub/id", 3)
    vars(args).update(run="moved", image_root=str(tmp_path / "elsewhere"))
    common.finish_stage(tmp_path / "moved/01_preferences", args, {}, "x")
    assert common.stage_args("moved", "01_preferences")["image_root"] == args.image_root


def test_what_a_user_can_cause_ends_in_one_line(tmp_path):
    args = Namespace(run=str(tmp_path), device="cpu")
    cases = {"interrupted: the same command goes on": KeyboardInterrupt()}
    cases["out of memory: lower --batch-size"] = torch.OutOfMemoryError("much\nto do")
    cases["no.png"] = OSError(2, "x", "no.png")
    for words, error in cases.items():
        with pytest.raises(SystemExit, match=rf"^error: .*{words}.*\Z"):
            common.run(Mock(side_effect=error), args)
    (tmp_path / "x.json.partial").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match=rf"^error: .*No space left.*{tmp_path}.*\Z"):
        common.run(lambda args: common.write_json(tmp_path / "x.json", {}), args)
