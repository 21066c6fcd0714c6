"""Files, run directories, arguments: what is written survives, what is wrong is named."""
import ast
import json
from argparse import Namespace

import common
import pytest
from common import RowWriter, read_jsonl, start_stage, write_json
from conftest import ROOT, STAGES, stage


def test_row_writer_cuts_a_half_written_line_and_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = RowWriter(path)
    for i in range(3):
        whole.write({"id": i, "text": "é\nx"})
        assert read_jsonl(path)[-1]["id"] == i  # flushed row by row
    data = path.read_bytes()
    for cut in (1, 5, len(data.splitlines()[-1])):
        path.write_bytes(data[:-cut])
        again = RowWriter(path)
        assert [row["id"] for row in again.rows] == [0, 1]
        again.write({"id": 2, "text": "é\nx"})
        assert path.read_bytes() == data and [row["id"] for row in again.rows] == [0, 1, 2]
    path.write_bytes(data[:10])  # not even one whole row
    assert RowWriter(path).rows == [] and path.read_bytes() == b""


@pytest.mark.parametrize("content, words", [
    (None, ["does not exist", "run the stage that writes it"]), ("", ["empty"]),
    ('{"id": 1, "image": "x"}\n{"id": 2, "ima\n', ["line 2", "JSON object is expected"]),
    ('{"id": 1, "image": "x"}\n\n', ["line 2", "JSON object is expected"]),
    ('{"id": 1, "image": "x"}\n{"id": 2}\n', ["line 2", "field 'image'"]),
    ('{"id": 1, "image": null}\n', ["line 1", "field 'image'"]),
    ('{"id": 1, "image": "x"}\n{"id": 3, "image": "x"}\n{"id": 1, "image": "y"}\n', ["line 3", "id 1 occurs twice"]),
    ('{"id": 1, "image": "x"}\n[1, 2]\n', ["line 2", "JSON object"])])
def test_read_jsonl_names_file_line_and_field(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as error:
        read_jsonl(path, ("id", "image"))
    assert all(word in str(error.value) for word in [str(path), *words])


@pytest.mark.parametrize("text", ["plain", "é 图", 'quote " and \\ and \n line',
                                  "line\u2028separator\x85"])
def test_rows_come_back_as_written(tmp_path, text):
    rows = [{"id": "1", "text": text}, {"id": "2", "text": text, "empty": [], "zero": 0}]
    write_json(tmp_path / "a.jsonl", rows)
    writer = RowWriter(tmp_path / "b.jsonl")
    for row in rows:
        writer.write(row)
    for name in ("a.jsonl", "b.jsonl"):
        assert (tmp_path / name).read_text().count("\n") == 2
        assert read_jsonl(tmp_path / name, ("id", "text")) == RowWriter(tmp_path / name).rows == rows


@pytest.mark.parametrize("name, value", [("x.json", {"x": 1}), ("x.jsonl", [{"x": 1}])])
def test_writing_is_atomic(tmp_path, name, value):
    path = tmp_path / name
    write_json(path, value)
    old = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, [value, {"y": object()}] if isinstance(value, list) else {"y": object()})
    assert path.read_bytes() == old and json.loads(old) in (value, value[0] if isinstance(value, list) else None)
    write_json(path, value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_chunks_are_fixed():
    """Of 8 batches: 16 rows where two rows of four samples each make a batch of eight sequences."""
    rows = [{"id": i} for i in range(40)]

    def ids(done, batch_size=8, n=4):
        return [[row["id"] for row in chunk] for chunk, _ in stage("02_generate_critiques").in_chunks(rows, done, batch_size, n, "x")]
    first, second, third = [*range(16)], [*range(16, 32)], [*range(32, 40)]
    assert ids(set()) == [first, second, third]
    assert ids({*range(20)}) == [second, third]  # a chunk half done is done again as a whole
    assert ids({0, 1, 2, 39}) == [first, second, third] and ids({*range(40)}) == []
    assert [len(chunk) for chunk in ids(set(), 2, 4)] == [8] * 5  # one row at least is a batch


def arguments(tmp_path, **changed):
    return Namespace(**{"run": str(tmp_path), "lr": 0.1, "images": tmp_path / "x", "withhold": ["blank"],
                        "batch_size": 8,
                        "device": None, "overwrite": False, **changed})


def test_start_stage(tmp_path, capsys):
    folder = start_stage(arguments(tmp_path), "03_ift")
    (folder / "rows.jsonl").write_text("x")
    assert start_stage(arguments(tmp_path, batch_size=4, device="cpu"), "03_ift") == folder
    assert (folder / "rows.jsonl").exists()
    for changed in ({"lr": 0.2}, {"withhold": []}, {"images": tmp_path / "y"}):
        with pytest.raises(SystemExit) as error:
            start_stage(arguments(tmp_path, **changed), "03_ift")
        (name, value), = changed.items()
        words = (folder, f"--{name}", value, getattr(arguments(tmp_path), name))
        assert all(str(word) in str(error.value) for word in words)
    args = arguments(tmp_path)
    common.finish_stage(start_stage(args, "03_ift"), args, {"rows": 3}, [folder / "rows.jsonl"],
                        "python 04.py", best=0.5)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["counts"] == {"rows": 3} and meta["args"]["lr"] == 0.1 and meta["best"] == 0.5 and meta["seconds"] >= 0
    assert len(meta["inputs"][str(folder / "rows.jsonl")]) == 16 and "next: python 04.py" in capsys.readouterr().out
    assert start_stage(arguments(tmp_path), "03_ift") is None
    with pytest.raises(SystemExit, match="--lr was 0.1, is 0.2"):
        start_stage(arguments(tmp_path, lr=0.2), "03_ift")
    assert start_stage(arguments(tmp_path, lr=0.2, overwrite=True), "03_ift") == folder
    assert [p.name for p in folder.iterdir()] == ["args.json"]  # begun anew


def test_inherit(tmp_path):
    inherit = stage("03_train_ift").inherit
    args = Namespace(run=str(tmp_path), model=None, style=None)
    with pytest.raises(SystemExit, match="02_critiques is not complete"):
        inherit(args, "02_critiques", ("model",))
    (tmp_path / "02_critiques").mkdir()
    write_json(tmp_path / "02_critiques" / "meta.json", {"args": {"model": "tiny", "style": "none"}})
    inherit(args, "02_critiques", ("model", "style"))
    assert (args.model, args.style) == ("tiny", "none")
    inherit(args, "02_critiques", ("model", "style"))  # the same values may be given
    with pytest.raises(SystemExit, match="--style critique contradicts 02_critiques.*none"):
        inherit(Namespace(run=str(tmp_path), style="critique"), "02_critiques", ("style",))


def test_images(tmp_path, pictures):
    assert common.load_image(pictures / "0.png").mode == "RGB"
    assert common.load_image(common.Image.new("L", (3, 4))).size == (3, 4)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    for name in ("missing.png", "text.png", "half.png"):
        with pytest.raises(SystemExit, match=name):
            common.load_image(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def flags(source):
    """Names of the arguments that a script adds, as attributes of args."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    calls = [node for node in calls if getattr(node.func, "id", None) == "add" and
             isinstance(node.args[0], ast.Constant)]
    return {node.args[0].value[2:].replace("-", "_") for node in calls if node.args[0].value.startswith("--")}


def attributes_read(source):
    """Names x of every args.x that is read."""
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and
            getattr(node.value, "id", None) == "args" and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("name", STAGES)
def test_every_flag_is_read(name):
    sources = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    added, read = flags(sources[name]) | flags(sources["common"]), attributes_read(sources[name]) | attributes_read(sources["common"])
    read |= {"model", "device", "max_image_tokens", "endpoint", "shard"} if "load_judge(args" in sources[name] else set()
    if "add_training_arguments(" in sources[name]:
        added |= flags(sources["03_train_ift"]) - {"lora_rank"}
        read |= attributes_read(sources["03_train_ift"])
    if "write_critiques(" in sources[name]:
        read |= attributes_read(sources["02_generate_critiques"])
    assert len(added) > 8 and added <= read, f"never read: {sorted(added - read)}"


@pytest.mark.parametrize("name", STAGES)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        stage(name).parse_args(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "--run" in text and "--overwrite" in text
    assert stage(name).__doc__.startswith(name[:2]) and f"python {name}.py" in stage(name).__doc__


@pytest.mark.parametrize("name, given, word", [
    ("01_build_preferences", [], "--images --pairs is required"),
    ("01_build_preferences", ["--images", "x", "--pairs", "y"], "not allowed with argument --images"),
    ("01_build_preferences", ["--images", "x", "--absent", ".6"], "--absent 0.6 <= --present 0.5"),
    ("02_generate_critiques", ["--style", "poem"], "poem"),
    ("04_rejection_sampling", ["--retention", "0"], "--retention"),
    ("04_rejection_sampling", ["--replay", "1"], "--replay"), ("05_evaluate", [], "--pairs"),
    ("05_evaluate", ["--pairs", "x", "--best-of", "4"], "--truth"),
    ("05_evaluate", ["--pairs", "x", "--truth", "y", "--best-of", "3"], "power of 2")])
def test_contradictory_arguments_are_refused(name, given, word, capsys):
    with pytest.raises(SystemExit) as end:
        stage(name).parse_args(given)
    assert end.value.code == 2 and word in capsys.readouterr().err
