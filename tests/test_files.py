"""Files, run directories, arguments, what importing and running leave alone."""

import argparse
import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, STAGES, WORLD, read_rows, stage
from PIL import Image

import common
from common import RowWriter, read_jsonl, start_stage


# ---- Rows ----------------------------------------------------------------------------------------
def test_row_writer_cuts_a_half_written_line_and_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": str(i), "text": "é\nx"} for i in range(3)]
    writer = RowWriter(path)
    for row in rows:
        writer.write(row)
        assert read_jsonl(path)[-1] == row  # flushed row by row
    data = path.read_bytes()
    for cut in (1, 5, len(data.splitlines()[-1])):
        path.write_bytes(data[:-cut])
        again = RowWriter(path)
        assert again.rows == rows[:2]
        again.write(rows[2])
        assert path.read_bytes() == data and again.rows == rows
    path.write_bytes(data[:10])  # not even one whole row
    assert RowWriter(path).rows == [] and path.read_bytes() == b""


def test_row_writer_writes_again_only_what_was_not_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"condition": c, "question": q} for c in "xy" for q in "12"]
    writer = RowWriter(path, key=("condition", "question"))
    for row in rows[:2]:
        writer.write(row)
        assert not writer.is_done(row)  # it was not there before this run
    again = RowWriter(path, key=("condition", "question"))
    assert [again.is_done(row) for row in rows] == [True, True, False, False]
    for row in rows:
        again.write({**row, "new": True})
    expected = rows[:2] + [{**row, "new": True} for row in rows[2:]]
    assert again.rows == read_rows(path) == expected


def test_rows_without_the_key_are_told_apart_by_another(tmp_path):
    """As metrics.jsonl, which holds lines of steps and of validations."""
    path = tmp_path / "metrics.jsonl"
    for line in ({"validation": "before"}, {"step": 1}, {"step": 2}, {"validation": "after"}):
        RowWriter(path, key=("step", "validation")).write(line)
    assert len(read_rows(path)) == 4


LINE_SEPARATORS = "line\u2028separator\x85"  # no ends of lines in JSON


@pytest.mark.parametrize("text", ["plain", "é 图", 'a " and \\ and \n line', LINE_SEPARATORS])
def test_rows_come_back_as_written(tmp_path, text):
    rows = [{"id": "1", "text": text}, {"id": "2", "text": text, "empty": [], "zero": 0}]
    common.write_jsonl(tmp_path / "a.jsonl", rows)
    writer = RowWriter(tmp_path / "b.jsonl")
    for row in rows:
        writer.write(row)
    for name in ("a.jsonl", "b.jsonl"):
        assert (tmp_path / name).read_text().count("\n") == 2
        assert read_jsonl(tmp_path / name, ("id", "text")) == rows
        assert RowWriter(tmp_path / name).rows == rows


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["does not exist", "run the stage that writes it"]),
        ("", ["empty"]),
        ('{"id": "1", "image": "x"}\n{"id": "2", "ima\n', ["line 2", "JSON object is expected"]),
        ('{"id": "1", "image": "x"}\n"text"\n', ["line 2", "JSON object is expected"]),
        ('{"id": "1", "image": "x"}\n\n{"id": "2"}\n', ["line 3, field 'image': it is missing"]),
        ('{"id": "1", "image": null}\n', ["line 1, field 'image': it is missing"]),
        (
            '{"id": "1", "image": "y"}\n{"id": "1", "image": "z"}\n',
            ["line 2, field 'id': '1' occurs twice"],
        ),
        ('{"id": "1", "image": "x"}\n[1, 2]\n', ["line 2", "JSON object"]),
    ],
)
def test_read_jsonl_names_file_line_and_field(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as error:
        read_jsonl(path, ("id", "image"))
    assert all(word in str(error.value) for word in [str(path), *words])
    assert "\n" not in str(error.value)


def test_read_jsonl_takes_empty_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "1", "zero": 0}\n\n{"id": "2", "zero": ""}\n')
    assert [row["id"] for row in read_jsonl(path, ("id", "zero"))] == ["1", "2"]
    path.write_text("")
    assert read_jsonl(path) == []  # nothing is asked for


def test_writing_is_atomic(tmp_path):
    for path, write in (
        (tmp_path / "x.json", common.write_json),
        (tmp_path / "x.jsonl", common.write_jsonl),
    ):
        write(path, [{"x": 1}])
        old = path.read_bytes()
        with pytest.raises(TypeError):
            write(path, [{"x": 2}, {"y": object()}])
        assert path.read_bytes() == old
        write(path, [{"x": 2}])
        assert b"2" in path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.jsonl"]


def test_chunks_are_fixed():
    rows = [{"id": i} for i in range(40)]

    def ids(done):
        chunks = common.in_chunks(rows, lambda row: row["id"] in done, 16, "x")
        return [[row["id"] for row in chunk] for chunk, _ in chunks]

    first, second, third = [*range(16)], [*range(16, 32)], [*range(32, 40)]
    assert ids(set()) == [first, second, third]
    assert ids({*range(20)}) == [second, third]  # one that is half done is done again as a whole
    assert ids({0, 1, 2, 39}) == [first, second, third] and ids({*range(40)}) == []


# ---- A stage's folder ----------------------------------------------------------------------------
def arguments(tmp_path, **changed):
    args = {"run": str(tmp_path), "lr": 0.1, "images": "x", "withhold": ["blank"]}
    args |= {"batch_size": 8, "device": None, "overwrite": False}
    return Namespace(**{**args, **changed})


def test_start_stage_resumes_by_the_same_arguments_only(tmp_path, capsys):
    folder = start_stage(arguments(tmp_path), "03_ift")
    (folder / "rows.jsonl").write_text("x")
    assert start_stage(arguments(tmp_path, batch_size=4, device="cpu"), "03_ift") == folder
    assert "resuming" in capsys.readouterr().out and (folder / "rows.jsonl").exists()
    for name, value in (("lr", 0.2), ("withhold", []), ("images", "y")):
        with pytest.raises(SystemExit, match="begun with other arguments"):
            start_stage(arguments(tmp_path, **{name: value}), "03_ift")
        said = capsys.readouterr().out
        assert f"--{name} was {getattr(arguments(tmp_path), name)}, is {value}" in said
    assert start_stage(arguments(tmp_path, lr=0.2, overwrite=True), "03_ift") == folder
    assert [path.name for path in folder.iterdir()] == ["args.json"]  # begun anew


def test_finish_stage_makes_it_complete(tmp_path, capsys):
    args = arguments(tmp_path)
    source = tmp_path / "rows.jsonl"
    source.write_text("x")
    folder = start_stage(args, "03_ift", [source])
    with pytest.raises(SystemExit, match="03_ift is not complete; run its script first"):
        common.args_of(tmp_path, "03_ift")
    made = folder / "made.jsonl"
    made.write_text("x")
    common.finish_stage(folder, args, {"rows": 3}, [made], "python 04.py", best=0.5)
    said = capsys.readouterr().out
    assert "next: python 04.py" in said and re.search(r"rows +3\n", said)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["counts"] == {"rows": 3} and meta["best"] == 0.5 and meta["seconds"] >= 0
    assert meta["inputs"] == {"rows.jsonl": "2d711642b726b044"}  # of sha256("x")
    assert meta["outputs"] == {"03_ift/made.jsonl": "2d711642b726b044"}
    assert {"torch", "transformers", "python"} <= set(meta["versions"])
    assert common.args_of(tmp_path, "03_ift") == meta["args"] and meta["args"]["lr"] == 0.1
    assert "batch_size" not in meta["args"]  # what may change leaves the rows as they are
    assert start_stage(arguments(tmp_path), "03_ift", [source]) is None
    assert "is complete: nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        start_stage(arguments(tmp_path, lr=0.2), "03_ift")


def test_find_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="neither adapter/ nor model/"):
        common.find_checkpoint(tmp_path)
    (tmp_path / "model").mkdir()
    assert common.find_checkpoint(tmp_path) == tmp_path / "model"
    (tmp_path / "adapter").mkdir()
    assert common.find_checkpoint(tmp_path) == tmp_path / "adapter"


def test_images(tmp_path, pictures):
    assert common.load_image(pictures / "0.png").mode == "RGB"
    assert common.load_image(Image.new("L", (3, 4))).size == (3, 4)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    for name in ("missing.png", "text.png", "half.png"):
        with pytest.raises(SystemExit, match=name):
            common.load_image(tmp_path / name)


# ---- Importing and running -----------------------------------------------------------------------
def python(code, **environment):
    """What a fresh process gives that runs this code in the repository."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


IMPORT = """
import importlib, sys
from PIL import Image
before = sys.stdout, sys.stderr, Image.open, Image.Image.convert
for name in {names}:
    importlib.import_module(name)
assert before == (sys.stdout, sys.stderr, Image.open, Image.Image.convert)
"""


def test_importing_replaces_nothing_and_prints_nothing():
    """Not even in a process that is to be silent."""
    done = python(IMPORT.format(names=STAGES), RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


USE = """
import argparse, pathlib, sys
sys.path.append("tests")
import common
from conftest import requests_of, judged_rows, stage, train

def main(args):
    pictures, folder = pathlib.Path({pictures!r}), pathlib.Path({folder!r})
    model, processor = common.load_judge({model!r}, device="cpu")
    model = stage("03_train_ift").make_trainable(model, 4)
    train(model, processor, pictures, folder, checkpoint_activations=True)
    stage("03_train_ift").save_checkpoint(model, processor, folder)
    model, processor = common.load_judge({model!r}, folder / "adapter", device="cpu")
    common.sample(model, processor, requests_of(judged_rows(), pictures), 2, 1.0, 8)

common.run(main, argparse.Namespace(device=None))
"""


def test_no_library_warns(pictures, tmp_path):
    """Loading, training, saving and sampling leave nothing on stderr, and a line each on stdout."""
    model = str(WORLD / "model")
    code = USE.format(pictures=str(pictures), folder=str(tmp_path), model=model)
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")
    loaded, step, again = done.stdout.splitlines()
    assert re.fullmatch(r"\S+tests/world/model: 0.00 GiB of float32 weights on cpu", loaded)
    assert step.startswith("step     1/1 | loss ")
    assert re.fullmatch(r"\S+/adapter: 0.00 GiB of float32 weights on cpu", again)


def test_out_of_memory_is_one_line_that_names_the_flags():
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    with pytest.raises(SystemExit) as error:
        common.run(main, None)
    flags = ("--micro-batch", "--batch-size", "--max-image-tokens", "--checkpoint-activations")
    assert all(flag in str(error.value) for flag in flags) and "\n" not in str(error.value)


# ---- Arguments -----------------------------------------------------------------------------------
def source_of(name):
    """Text of a script, wherever it is imported from."""
    return open(importlib.util.find_spec(name).origin, encoding="utf-8").read()


def names_read(source):
    """x of every args.x and every getattr that is read, and words in tuples of names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "args":
            names.add(node.attr)
        if isinstance(node, ast.Tuple):  # getattr(args, name) for name in a tuple
            names |= {part.value for part in node.elts if isinstance(part, ast.Constant)}
    return names


def parser_of(name, monkeypatch):
    """The ArgumentParser that a script builds."""
    kept = []

    def keep(self, argv=None):
        kept.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(SystemExit):
        stage(name).parse_args([])
    return kept[0]


def flags_of(parser):
    """[(heading, argparse action)], -h aside."""
    found = []
    for group in parser._action_groups:
        found += [(group.title, action) for action in group._group_actions]
    return [(title, action) for title, action in found if action.dest != "help"]


@pytest.mark.parametrize("name", STAGES)
def test_every_flag_is_read_and_stands_under_a_heading(name, monkeypatch):
    parser = parser_of(name, monkeypatch)
    flags = flags_of(parser)
    alternatives = [len(group._group_actions) for group in parser._mutually_exclusive_groups]
    n_flags = len(flags) - sum(alternatives) + len(alternatives)  # of alternatives one is given
    assert 8 < n_flags <= 23
    read = names_read(source_of(name)) | names_read(source_of("common"))
    if name.startswith("04"):
        read |= names_read(source_of("03_train_ift"))  # by 03's functions of arguments
    for title, action in flags:
        assert action.dest in read, f"{action.dest} is never read"
        assert title not in ("options", "positional arguments"), action.dest
        assert action.help, action.dest


@pytest.mark.parametrize("name", STAGES)
def test_help_is_short(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        stage(name).parse_args(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and len(text.splitlines()) <= 72
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "None" not in text and "(False)" not in text
    assert "--seed SEED" in text and "of every random choice (0)" in text
    doc = stage(name).__doc__
    assert doc.startswith(name[:2]) and f"python {name}.py" in doc


@pytest.mark.parametrize(
    "name, given, word",
    [
        ("02_generate_critiques", ["--style", "poem"], "poem"),
        ("04_rejection_sampling", ["--retention", "0"], "--retention"),
        ("04_rejection_sampling", ["--replay", "1"], "--replay"),
        ("05_evaluate", [], "--pairs"),
    ],
)
def test_contradictory_arguments_are_refused(name, given, word, capsys):
    with pytest.raises(SystemExit) as end:
        stage(name).parse_args(given)
    assert end.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize("name", STAGES[1:4])
def test_later_stages_have_no_flags_for_what_the_first_fixed(name, monkeypatch):
    flags = {action.dest for _, action in flags_of(parser_of(name, monkeypatch))}
    fixed = {"model", "image_root", "max_image_tokens"}
    if name != "02_generate_critiques":
        fixed |= {"style"}
    assert not flags & fixed
