"""Bad input: by which line and exit code a script ends, and that what was made before stays.

Each row of a table is one input. Inputs that cost a row, not the run, are counted skips.
"""

import base64
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORLD, stage
from PIL import Image
from safetensors.torch import load_file, save_file

import common

one, two, ift = stage("01_build_preferences"), stage("02_generate_critiques"), stage("03_train_ift")
NAMES = {"01": "01_build_preferences", "02": "02_generate_critiques", "03": "03_train_ift"}
NAMES |= {"04": "04_rejection_sampling", "05": "05_evaluate"}
LONG = "word " * 30_000


# ---- A run directory, by hand: what stages 01 to 03 leave ----------------------------------------
def pair(name, split):
    evidence = [
        {"object": "dog", "claimed_by": "both", "status": "present", "confidence": 0.9},
        {"object": "cat", "claimed_by": "rejected", "status": "absent", "confidence": 0.0},
    ]
    row = {"id": name, "image": "0.png", "prompt": "What is there?", "source": "given"}
    row |= {"chosen": "A dog.", "rejected": "A dog and a cat.", "hallucinated": ["cat"]}
    return {**row, "evidence": evidence, "split": split}


def critique(k):
    (question, _) = common.both_orders(pair("t0", "train"))
    text = "A: dog: yes\nB: dog: yes\nB: cat: no\nVerdict: A"
    return {**question, "id": f"{question['id']}-{k}", "critique": text, "style": "critique"}


@pytest.fixture
def run(tmp_path):
    """The run directory, which holds its picture, held-out pairs and a truth as well."""
    run = tmp_path / "run"
    for folder in ("01_preferences", "02_critiques", "03_ift/adapter"):
        (run / folder).mkdir(parents=True)
    (run / "in").mkdir()
    for path in (run / "0.png", run / "in" / "0.png"):
        Image.new("RGB", (56, 56), "red").save(path)
    args = {"model": str(WORLD / "model"), "image_root": ".", "max_image_tokens": None}
    common.write_json(run / "01_preferences" / "meta.json", {"args": args})
    common.write_json(run / "02_critiques" / "meta.json", {"args": {"style": "critique"}})
    common.write_json(run / "03_ift" / "meta.json", {"args": {}})
    pairs = [pair("v0", "validation"), pair("t0", "train"), pair("p0", "pool"), pair("p1", "pool")]
    common.write_jsonl(run / "01_preferences" / "preferences.jsonl", pairs)
    common.write_json(run / "01_preferences" / "vocabulary.json", {"dog": "dog", "cat": "cat"})
    common.write_jsonl(run / "02_critiques" / "critiques.jsonl", [critique(0), critique(1)])
    common.write_jsonl(run / "pairs.jsonl", pairs)
    common.write_jsonl(run / "truth.jsonl", [{"image": "0.png", "objects": [{"object": "dog"}]}])
    return run


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def end_of(command, capsys):
    """(exit code, the last line said) of a script's command line, in this process."""
    number, *argv = command
    script = stage(NAMES[number])
    code = 0
    try:
        with warnings.catch_warnings():
            common.run(script.main, script.parse_args([str(word) for word in argv]))
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            code = 1
            print(end.code)
    said = capsys.readouterr()
    return code, (said.out + said.err).strip().splitlines()[-1]


def check(run, capsys, command, code, words):
    """The command ends so, and touches nothing that was there before."""
    for folder in run.glob(f"{command[0]}_*"):
        (folder / "meta.json").unlink(missing_ok=True)  # the stage is not complete
    before = files_of(run)
    ended, said = end_of([command[0], "--run", run, *command[1:]], capsys)
    assert (ended, words in said) == (code, True), f"{ended}: {said}"
    assert before == {path: data for path, data in files_of(run).items() if path in before}


# ---- Numbers out of range ------------------------------------------------------------------------
FLAGS = """
01 --limit -1 | 01 --limit 0 | 01 --validation -1 | 01 --train -5 | 01 --present 2
01 --absent -0.1 | 01 --present nan | 01 --max-image-tokens 0 | 01 --candidates 0
01 --temperature -1 | 01 --temperature nan | 01 --max-new-tokens 0 | 01 --batch-size 0
01 --seed -1 | 01 --seed 99999999999999999999 | 02 --limit -1 | 02 --limit 0 | 02 --critiques 0
02 --temperature -1 | 02 --temperature inf | 02 --max-new-tokens 1000000000 | 02 --batch-size -3
03 --lora-rank -1 | 03 --lora-rank 100000 | 03 --steps 0 | 03 --steps -5 | 03 --lr 0 | 03 --lr nan
03 --lr -1 | 03 --lam -1 | 03 --bt-weight -1 | 03 --train-batch 0 | 03 --micro-batch 0
03 --save-every 0 | 03 --max-response-tokens 1 | 03 --max-new-tokens -1 | 04 --iterations 0
04 --iterations -1 | 04 --pool 0 | 04 --pool 1 | 04 --samples 0 | 04 --temperature -2
04 --retention 0 | 04 --retention 1.5 | 04 --margin 2 | 04 --margin -0.1 | 04 --margin nan
04 --replay 1 | 04 --replay -1 | 04 --steps 0 | 05 --votes 0 | 05 --max-new-tokens 0
05 --max-image-tokens -4 | 05 --best-of 0
"""
FLAGS = [words.split() for line in FLAGS.strip().splitlines() for words in line.split("|")]


@pytest.mark.parametrize("words", FLAGS, ids=" ".join)
def test_numbers_out_of_range(words, run, capsys):
    needed = {"01": ["--images", run], "05": ["--pairs", run / "pairs.jsonl"]}
    number, flag, _ = words
    check(run, capsys, [*words, *needed.get(number, [])], 2, f"{flag} ")


def test_every_number_has_bounds():
    """No flag that is a number is forgotten."""
    for name in NAMES.values():
        args = [] if name[:2] not in ("01", "05") else ["--images", "x"]
        args = ["--pairs", "x"] if name[:2] == "05" else args
        for key, value in vars(stage(name).parse_args(args)).items():
            if type(value) in (int, float):
                assert key in common.BOUNDS, f"{name}: {key}"


EMPTY = ["01 --images", "01 --pairs", "01 --pairs x --exclude", "02 --device", "05 --pairs"]


@pytest.mark.parametrize("words", EMPTY)
def test_empty_words(words, run, capsys):
    """As of a variable of the shell that is not set."""
    check(run, capsys, [*words.split(), ""], 2, f"{words.split()[-1]} is empty")


@pytest.mark.parametrize("device", ["foo", "cuda:9", "meta", "cpu:x"])
def test_devices_that_are_not_there(device, run, capsys):
    if device == "cuda:9" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    check(run, capsys, ["02", "--device", device], 1, f"error: --device {device}: ")


# ---- Fields of files that a stage has left, or a hand has edited ---------------------------------
OF_01 = "01_preferences/preferences.jsonl"
OF_02 = "02_critiques/critiques.jsonl"
FIELDS = [  # (command, file, field, value, what is said); the second line of the file gets it
    (["02"], OF_01, "id", ["t0"], "line 2, field 'id': text"),
    (["02"], OF_01, "id", "v0", "line 2, field 'id': 'v0' occurs twice"),
    (["02"], OF_01, "image", 7, "line 2, field 'image': text"),
    (["02"], OF_01, "prompt", 12345, "line 2, field 'prompt': text"),
    (["02"], OF_01, "prompt", None, "line 2, field 'prompt': it is missing"),
    (["02"], OF_01, "chosen", 3, "line 2, field 'chosen': text"),
    (["02"], OF_01, "chosen", LONG, "'chosen': text of at most 10000 characters"),
    (["02"], OF_01, "rejected", "half \ud800 a letter", "line 2, field 'rejected': text"),
    (["02"], OF_01, "split", "test", "one of pool, train, validation is expected, not 'test'"),
    (["02"], OF_01, "evidence", "dog", "line 2, field 'evidence': a list of records"),
    (["02"], OF_01, "evidence", [{"object": "dog"}], "line 2, field 'evidence'"),
    (["02"], OF_01, "evidence", [{"object": "dog", "status": "there"}], "line 2, field 'evidence'"),
    (["02"], OF_01, "evidence", None, "line 2, field 'evidence': it is missing"),
    (["02"], OF_01, "hallucinated", {"cat": 1}, "line 2, field 'hallucinated': a list of text"),
    (["03"], OF_01, "rejected", None, "line 2, field 'rejected': it is missing"),
    (["03"], OF_02, "label", "a", "line 2, field 'label': one of A, B is expected, not 'a'"),
    (["03"], OF_02, "label", "C", "line 2, field 'label': one of A, B"),
    (["03"], OF_02, "label", "B", "its verdict, A, is not the label, B"),
    (["03"], OF_02, "critique", "A: dog: yes", "its verdict, None, is not the label, A"),
    (["03"], OF_02, "critique", None, "line 2, field 'critique': it is missing"),
    (["03"], OF_02, "critique", ["Verdict: A"], "line 2, field 'critique': text"),
    (["03"], OF_02, "style", "poem", "line 2, field 'style': one of critique, descriptive, none"),
    (["03"], OF_02, "response_a", 1.5, "line 2, field 'response_a': text"),
    (["03"], OF_02, "order", "aa", "line 2, field 'order': one of ab, ba"),
    (
        ["04", "--iterations", "1", "--pool", "2"],
        OF_02,
        "label",
        "a",
        "line 2, field 'label': one of A, B",
    ),
    (["04"], OF_01, "split", 4, "line 2, field 'split': one of"),
    (["04"], OF_01, "evidence", [3], "line 2, field 'evidence'"),
    (["05", "--pairs", "pairs.jsonl"], OF_01, "evidence", [{}], "line 2, field 'evidence'"),
]


def change(path, field, value, line=1):
    """Put another value into a field of a jsonl file's second line."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line][field] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "command, file, field, value, words", FIELDS, ids=[f"{x[0][0]}-{x[2]}-{x[4]}" for x in FIELDS]
)
def test_fields(command, file, field, value, words, run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    change(run / file, field, value)
    check(run, capsys, command, 1, words)


WHOLE_FILES = [  # (command, file, its content, what is said)
    (["02"], OF_01, b"", "is empty: nothing to work on"),
    (["02"], OF_01, b"\n\r\n", "is empty: nothing to work on"),
    (["02"], OF_01, b'{"id": "x"\n', "line 1: a JSON object is expected"),
    (["02"], OF_01, b"[1, 2]\n", "line 1: a JSON object is expected"),
    (["02"], OF_01, b"[" * 100_000, "line 1: a JSON object is expected"),
    (["02"], OF_01, "é".encode("latin-1"), "is not UTF-8"),
    (["02"], OF_01, None, "FileNotFoundError"),
    (["02"], OF_01, "folder", "IsADirectoryError"),
    (["02"], "01_preferences/vocabulary.json", b"[]", "vocabulary.json: a JSON object is expected"),
    (["02"], "01_preferences/meta.json", b"", "meta.json: a JSON object is expected"),
    (["02"], "01_preferences/meta.json", b"{}", "meta.json holds no 'args'"),
    (
        ["02"],
        "01_preferences/meta.json",
        b'{"args": {}}',
        "meta.json, field 'model': it is missing",
    ),
    (
        ["02"],
        "01_preferences/meta.json",
        b'{"args": {"model": "m", "image_root": "x", "max_image_tokens": "many"}}',
        "field 'max_image_tokens': a number from 1 to 100000",
    ),
    (["03"], "02_critiques/meta.json", b'{"args": {"style": "poem"}}', "field 'style': one of"),
    (["02"], "01_preferences/vocabulary.json", b"{}", "vocabulary.json holds no phrase"),
    (["02"], "01_preferences/vocabulary.json", b'{"dog": null}', "'dog': None is no phrase and"),
    (["04"], "01_preferences/vocabulary.json", b'{"dog": {}}', "'dog': {} is no phrase and"),
    (["05", "--pairs", "x.csv"], "x.csv", b"a,b", "x.csv is of no kind that is read: .parquet, "),
    (["05", "--pairs", "in"], "x", b"", "in holds no usable row: there is no row"),
    (["01", "--images", "."], "x", b"", "lies in ., which is read: put it elsewhere"),
    (
        ["05", "--pairs", "wild", "--benchmark", "llava-wild"],
        "wild/questions.jsonl",
        b'{"question_id": 1, "image": "x", "text": ""}\n' * 2,
        "images/x is missing",
    ),
    (["02"], "01_preferences/meta.json", None, "01_preferences is not complete"),
    (["03"], OF_02, b"\xff\xfe\x00", "is not UTF-8"),
    (["05", "--pairs", "none.jsonl"], "x", b"", "none.jsonl after row 0: FileNotFoundError"),
    (["05", "--pairs", "x.jsonl"], "x.jsonl", b"", "x.jsonl holds no usable row"),
    (["05", "--pairs", "x.json"], "x.json", b'[{"id": 1}', "x.json after row 0: JSONDecodeError"),
    (["05", "--pairs", "x.parquet"], "x.parquet", b"PAR1", "x.parquet after row 0: ArrowInvalid"),
    (["05", "--pairs", "pairs.jsonl", "--truth", "truth.jsonl"], "truth.jsonl", b"", "is empty"),
    (
        ["05", "--pairs", "pairs.jsonl", "--truth", "truth.jsonl"],
        "truth.jsonl",
        b'{"image": "0.png", "objects": ["dog"]}',
        "line 1, field 'objects': a list of records of object",
    ),
    (
        ["05", "--pairs", "pairs.jsonl", "--truth", "truth.jsonl"],
        "truth.jsonl",
        b'{"image": "far.png", "objects": []}',
        "holds no picture of the findings",
    ),
    (
        ["05", "--pairs", "pairs.jsonl", "--withhold", "other"],
        "x",
        b"",
        "--withhold other needs pairs of at least two pictures",
    ),
    (["05", "--pairs", "0.png", "--benchmark", "llava-wild"], "x", b"", "does not exist"),
    (["01", "--images", "nowhere"], "x", b"", "nowhere is no folder"),
    (["01", "--images", "0.png"], "x", b"", "0.png is no folder"),
    (["01", "--images", "in", "--prompts", "x"], "x", b"\n \n", "--prompts x holds no prompt"),
    (["01", "--images", "in", "--prompts", "y"], "x", b"", "y does not exist"),
    (["01", "--pairs", "pairs.jsonl", "--vocabulary", "x"], "x", b"{dog}", "x: a JSON object"),
    (["01", "--pairs", "pairs.jsonl", "--vocabulary", "x"], "x", b"{}", "x holds no phrase"),
    (["01", "--pairs", "pairs.jsonl", "--vocabulary", "x"], "x", b'{"dog": 1}', "'dog': 1 is no"),
    (["01", "--pairs", "pairs.jsonl", "--vocabulary", "x"], "x", b'{"!": "a"}', "'!': 'a' is no"),
    (
        ["01", "--pairs", "pairs.jsonl", "--detections", "x"],
        "x",
        b'{"id": "0.png", "detections": [{"object": "dog", "confidence": "high"}]}',
        "line 1, field 'detections': a list of records of object",
    ),
    (
        ["01", "--pairs", "pairs.jsonl", "--detections", "x"],
        "x",
        b'{"id": "0.png", "detections": [{"object": "dog", "confidence": NaN}]}',
        "confidence (a number from 0 to 1)",
    ),
    (["01", "--pairs", "pairs.jsonl", "--expert", "x.pt"], "x.pt", b"", "--expert x.pt: no *.pt"),
    (["01", "--images", "in", "--model", "x"], "x/config.json", b"{}", "--model x: "),
]


@pytest.mark.parametrize(
    "command, file, content, words", WHOLE_FILES, ids=[f"{x[0]}-{x[3]}" for x in WHOLE_FILES]
)
def test_files(command, file, content, words, run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    path = run / file
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    check(run, capsys, command, 1, words)


def test_a_cut_row_in_the_middle_of_what_is_resumed(run, capsys):
    folder = run / "02_critiques"
    (folder / "samples.jsonl").write_text('{"id": "t0-ab-0", "crit\n{"id": "t0-ab-1"}\n')
    check(run, capsys, ["02"], 1, "samples.jsonl line 1: a JSON object is expected")


def test_blank_lines_and_other_line_ends_are_no_trouble(run):
    path = run / OF_01
    rows = common.read_jsonl(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\r\n  \r\n")
    assert common.read_jsonl(path) == rows


# ---- Rows of given pairs: counted skips ----------------------------------------------------------
def noise(size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy()


def png(size=(56, 56)):
    out = io.BytesIO()
    Image.fromarray(noise(size)).save(out, "PNG")
    return out.getvalue()


TEXT = base64.b64encode(png()).decode()
SKIPS = [  # (field, value, reason; None: the row is read)
    ("prompt", 5, "not a row of"),
    ("prompt", LONG, "text of at most 10000 characters is expected"),
    ("chosen", 5, "not a row of"),
    ("chosen", "", "no response"),
    ("chosen", LONG, "text of at most 10000 characters is expected"),
    ("rejected", None, "no response"),
    ("rejected", "A dog.", "identical responses"),
    ("rejected", "half \ud83d", "text of at most"),
    ("category", ["general"], "text of at most"),
    ("id", "x" * 10_001, "text of at most"),
    ("evidence", [{"object": "dog", "status": "gone"}], "a list of records of object"),
    ("evidence", 1, "a list of records of object"),
    ("image", "gone.png", "missing image"),
    ("image", "", "missing image"),
    ("image", "x" * 5000 + ".png", "missing image"),
    ("image", "https://example.org/" + "x" * 5000, "image that is to be downloaded first"),
    ("image", "pairs.jsonl", "picture that does not decode"),
    ("image", "data:image/png;base64," + "AAAA" * 50, "picture that does not decode"),
    ("image", TEXT[: len(TEXT) // 2], "picture that does not decode"),
    ("image", ["0.png", "0.png"], "more than one image"),
    ("image", {"path": 3}, "missing image"),
    ("image", TEXT, None),
    ("image", "data:image/png;base64," + TEXT, None),
    ("image", {"bytes": TEXT, "path": None}, None),
    ("image", ["0.png"], None),
]


@pytest.mark.parametrize("field, value, reason", SKIPS)
def test_rows_of_given_pairs(field, value, reason, run, capsys):
    path = run / "pairs.jsonl"
    change(path, field, value)
    _, rows, counts = one.read_pairs(path, run, run / "05_evaluation")
    skipped = {name: n for name, n in counts.items() if name.startswith("skipped")}
    assert counts["rows read"] == 4 and len(rows) + sum(skipped.values()) == 4
    if reason is None:
        assert skipped.keys() <= {"skipped: duplicate row"}  # the other rows differ in ids alone
        assert Image.open(run / rows[-1]["image"]).size == (56, 56)
    else:
        (found,) = [name for name in skipped if name != "skipped: duplicate row"]
        assert found.startswith(f"skipped: {reason}")
        place = f"pairs.jsonl row 2, field {'?' if reason == 'not a row of' else field}"
        assert place in capsys.readouterr().out


@pytest.mark.parametrize("row", [None, 3, "text", ["a", 1]])
def test_rows_that_are_no_objects(row, run):
    path = run / "pairs.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n" + path.read_text())
    _, _, counts = one.read_pairs(path, run, run / "05_evaluation")
    assert counts["rows read"] == 5 and counts["skipped: not an object"] == 1
    path.with_suffix(".json").write_text(f"\n[{json.dumps(row)}]")
    with pytest.raises(common.Stop, match="'skipped: not an object': 1"):
        one.read_pairs(path.with_suffix(".json"), run, run / "05_evaluation")


def test_a_picture_with_spoilt_orientation_is_skipped(tmp_path):
    data = png()
    spoilt = b"\x00\x00\x00\x08eXIfnonsense\x00\x00\x00\x00"
    (tmp_path / "e.png").write_bytes(data[:33] + spoilt + data[33:])
    with pytest.raises(one.Skip, match="does not decode"):
        one.place_image("e.png", tmp_path, tmp_path)


def test_a_pixel_that_is_no_number(tmp_path):
    for value in (float("nan"), float("inf")):
        Image.fromarray(np.full((4, 4), value, dtype=np.float32)).save(tmp_path / "n.tiff")
        with pytest.raises(one.Skip, match="does not decode"):
            one.place_image("n.tiff", tmp_path, tmp_path)
        with pytest.raises(common.Stop, match="n.tiff: ValueError: a pixel is not finite"):
            common.load_image(tmp_path / "n.tiff")


def test_a_name_that_is_not_utf_8_is_skipped(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"a.png"):
        Image.new("RGB", (8, 8)).save(folder / os.fsdecode(name))
    rows, counts = one.read_images(folder, folder, ["What?"], None, 0, tmp_path)
    assert [row["id"] for row in rows] == ["a-0"]
    assert counts["skipped: a file's name that is not UTF-8"] == 1


def test_a_folder_whose_name_is_not_utf_8_is_said(run, capsys):
    folder = Path(os.fsdecode(os.fsencode(run) + b"/caf\xe9"))
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    check(run, capsys, ["01", "--images", folder], 1, "a file's name that is not UTF-8")


def test_raw_bytes_are_a_picture(tmp_path):
    assert one.place_image(png(), tmp_path, tmp_path).startswith("images/")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_cut_pictures_of_any_decoder(kind, tmp_path):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    out = io.BytesIO()
    Image.fromarray(noise((64, 64))).save(out, kind)
    data = out.getvalue()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 3])
    with pytest.raises(one.Skip):
        one.place_image("cut.png", tmp_path, tmp_path)
    with pytest.raises(common.Stop, match="cut.png"):
        common.load_image(tmp_path / "cut.png")


def test_files_that_are_no_pictures_are_counted(tmp_path):
    for name in ("a.png", "b.BMP", "c.txt", "d.tiff"):
        Image.new("RGB", (8, 8)).save(
            tmp_path / name, name.rpartition(".")[2].replace("txt", "png")
        )
    rows, counts = one.read_images(tmp_path, tmp_path, ["What?"], None, 0, tmp_path)
    assert [row["id"] for row in rows] == ["a-0", "b-0", "d-0"]
    assert counts["skipped: not a picture by its suffix"] == 1


# ---- Models --------------------------------------------------------------------------------------
@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(WORLD / "model", folder)
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def not_finite(path):
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, path, {"format": "pt"})


def text_template(path):
    path.write_text("{% for m in messages %}{{ m.content[1].text }}{% endfor %}")


def no_tokenizer(path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path.parent / name).unlink()


def no_stop_token(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token": None}))


MODELS = [
    ("tokenizer_config.json", no_stop_token, "its tokenizer has no stop token"),
    ("model.safetensors", cut, "SafetensorError"),
    ("model.safetensors", pointer, "SafetensorError"),
    ("model.safetensors", Path.unlink, "OSError"),
    ("model.safetensors", not_finite, "q_proj.weight is not finite"),
    ("config.json", Path.unlink, "--model"),
    ("config.json", lambda path: path.write_text("{"), "--model"),
    ("chat_template.jinja", Path.unlink, "chat template"),
    ("chat_template.jinja", text_template, "its chat template leaves out the image"),
    ("tokenizer.json", no_tokenizer, "--model"),
]


@pytest.mark.parametrize("file, spoil, words", MODELS, ids=[f"{x[0]}-{x[2]}" for x in MODELS])
def test_models(file, spoil, words, model_folder):
    spoil(model_folder / file)
    with pytest.raises(common.Stop, match=words) as error:
        common.load_judge(str(model_folder), device="cpu")
    assert "\n" not in str(error.value) and str(model_folder) in str(error.value)


@pytest.fixture
def adapter(tmp_path):
    """An adapter of the shipped model, as stage 03 saves it."""
    model, processor = common.load_judge(str(WORLD / "model"), device="cpu")
    ift.save_checkpoint(ift.make_trainable(model, 2), processor, tmp_path)
    return tmp_path / "adapter"


def of_another_base(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"}))


ADAPTERS = [
    ("adapter_model.safetensors", Path.unlink, "does not load"),
    ("adapter_model.safetensors", cut, "does not load"),
    ("adapter_config.json", Path.unlink, "adapter"),
    ("adapter_config.json", lambda path: path.write_text("{"), "does not load"),
    ("adapter_config.json", of_another_base, "was trained on Qwen/Qwen2-VL-7B-Instruct, not on"),
]


@pytest.mark.parametrize("file, spoil, words", ADAPTERS, ids=[f"{x[0]}-{x[2]}" for x in ADAPTERS])
def test_adapters(file, spoil, words, adapter):
    spoil(adapter / file)
    with pytest.raises(common.Stop, match=words) as error:
        common.load_judge(str(WORLD / "model"), adapter, device="cpu")
    assert "\n" not in str(error.value) and str(adapter) in str(error.value)


def test_an_empty_adapter_folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(common.Stop, match="adapter"):
        common.load_judge(str(WORLD / "model"), common.find_checkpoint(tmp_path), device="cpu")


def test_a_prompt_longer_than_the_context(run, monkeypatch):
    model, processor = common.load_judge(str(WORLD / "model"), device="cpu")
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 40)
    request = {"id": "x", "image": run / "0.png", "text": "What is there? " * 20}
    with pytest.raises(common.Stop, match="a prompt of .* tokens, more than the model's 40"):
        common.sample(model, processor, [request], max_new_tokens=4)


# ---- Experts and data sets -----------------------------------------------------------------------
@pytest.mark.parametrize("task", ["classify", "obb"])
def test_weights_that_are_no_detector(task, monkeypatch):
    import ultralytics

    class Yolo:
        names = {0: "dog"}

        def __init__(self, weights):
            self.task = task

    monkeypatch.setattr(ultralytics, "YOLO", Yolo)
    with pytest.raises(common.Stop, match=f"its weights are for the task '{task}'"):
        one.load_expert("x.pt", 0.01, "cpu", ["dog"], None, None)


def test_findings_need_no_detector(run, capsys, monkeypatch):
    """ultralytics may be missing where --detections says what is there."""
    monkeypatch.setitem(__import__("sys").modules, "ultralytics", None)
    rows = [{"id": "0.png", "detections": [{"object": "dog", "confidence": 0.9, "box": None}]}]
    common.write_jsonl(run / "found.jsonl", rows)
    command = ["01", "--run", run / "new", "--pairs", run / "pairs.jsonl"]
    code, _ = end_of([*command, "--detections", run / "found.jsonl"], capsys)
    assert code == 0
    assert len(common.read_jsonl(run / "new" / OF_01)) == 1  # all four rows say the same


def rows_of(n, text):
    """Pairs that differ in their chosen response."""
    pairs = []
    for k in range(n):
        row = {"image": {"bytes": png(), "path": None}, "prompt": "What?"}
        pairs.append({**row, "chosen": f"{text} {k}", "rejected": "no"})
    return pairs


def test_a_folder_saved_to_disk(tmp_path):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(rows_of(3, "dog")).save_to_disk(folder)
    name, rows, counts = one.read_pairs(folder, tmp_path, tmp_path / "05")
    assert (name, counts["rows read"]) == ("TRL preferences", 3)
    assert [row["chosen"] for row in rows] == ["dog 0", "dog 1", "dog 2"]


def test_a_folder_with_train_and_test_files(tmp_path, capsys):
    import datasets

    folder = tmp_path / "data"
    for split in ("train", "test"):
        path = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows_of(2, split)).to_parquet(path)
    _, rows, _ = one.read_pairs(folder, tmp_path, tmp_path / "05")
    assert [row["chosen"] for row in rows] == ["train 0", "train 1"]
    assert "of 2 files these of split train are read: 1" in capsys.readouterr().out


# ---- Drawing -------------------------------------------------------------------------------------
def test_a_picture_that_cannot_be_drawn_ends_nothing(tmp_path, capsys):
    def fails(path, rows):
        warnings.warn("a letter that the font lacks", stacklevel=1)
        raise ValueError("no\nway")

    with warnings.catch_warnings(action="error"):
        common.draw(fails, tmp_path / "x.png", [])
    assert capsys.readouterr().out == f"{tmp_path}/x.png is not drawn: ValueError: no way\n"


def test_a_full_disk_is_not_taken_for_a_picture_that_cannot_be_drawn(tmp_path):
    def fails(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        common.draw(fails, tmp_path / "x.png")
