"""Bad input at the border of all stages ends in one line that names it, or is a counted skip."""

import argparse
import json
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import STAGES, WORLD, read_rows, stage
from PIL import Image

import common

one = stage("01_build_preferences")
NAMES = {name[:2]: name for name in STAGES}
OF_01, OF_02 = Path("01_preferences/preferences.jsonl"), Path("02_critiques/critiques.jsonl")
WORDS = """ images pairs image-root exclude prompts expert detections vocabulary model tag run
device style select benchmark protocol withhold """
# stage, flag: the least and the largest that is taken | what is not
BOUNDS = """01 --present 0.01 1 | 0.0099 1.01;01 --validation 0 0.5 9 | -0.1;01 --candidates 1 1000 | 0
01 --temperature 0 100 | 101;01 --limit 1 | 0 1.5;01 --seed 0 9223372036854775807 | -1;02 --critiques 1 | 0
03 --lora-rank 0 1024 | 1025;03 --lr 1e-9 1 | 0 2;03 --lam 0 100 | 101;03 --max-response-tokens 2 | 1
04 --pool 2 | 1;04 --retention 0.001 1 | 0 1.5;04 --margin 0 1 | 1.01;04 --replay 0 0.99 | 1
05 --best-of 1 128 | 129;04 --samples 1 | 0"""  # noqa: E501


@pytest.mark.parametrize("number", NAMES)
def test_every_number_has_bounds(number):
    """A flag without a type takes words; the others refuse what no flag can mean."""
    refused, caught = [], {"autospec": True, "side_effect": StopIteration}
    with mock.patch("argparse.ArgumentParser.parse_args", **caught) as parse:
        pytest.raises(StopIteration, stage(NAMES[number]).parse_args)
    flags = {action.option_strings[-1]: action for action in parse.call_args.args[0]._actions}
    for flag, action in flags.items():
        if action.type is None:
            assert action.nargs == 0 or f" {flag.removeprefix('--')} " in WORDS.replace("\n", " ")
        else:
            refused += [(flag, text) for text in ("nan", "inf", "-1", str(10**20), "many")]
    cases = [case.split() for case in BOUNDS.replace("\n", ";").split(";")]
    for _, flag, *numbers in [case for case in cases if case[0] == number]:
        bar = numbers.index("|")
        for text in numbers[:bar]:
            assert flags[flag].type(text) == json.loads(text)
        refused += [(flag, text) for text in numbers[bar + 1 :]]
    for flag, text in refused:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            flags[flag].type(text)


WRONG = """01|01 --images x --pairs y|01 --images x --exclude y|01 --images x --present 0.01
02 --style poem|02 --limit 0|04 --select best-of|05 --withhold nothing
05 --benchmark llava-wild|05 --protocol official"""


@pytest.mark.parametrize("words", WRONG.replace("\n", "|").split("|"))
def test_refused_at_once(words, capsys):
    number, *flags = words.split()
    with pytest.raises(SystemExit, match="^2$"):
        stage(NAMES[number]).parse_args(flags)
    assert "--" in capsys.readouterr().err.splitlines()[-1]


# ---- Files ---------------------------------------------------------------------------------------
def pair(split):
    evidence = {"object": "dog", "claimed_by": "both", "status": "present", "confidence": 0.9}
    row = {"id": split, "image": "0.png", "prompt": "What is there?", "source": "given"}
    row |= {"chosen": "A dog.", "rejected": "A dog and a cat.", "hallucinated": ["cat"]}
    return {**row, "evidence": [{**evidence, "box": None}], "split": split}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The working directory, a run with stages 01 to 03, which holds its picture and pairs."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56), "red").save("0.png")
    args = {"model": str(WORLD / "model"), "image_root": ".", "max_image_tokens": None}
    pairs = [pair(split) for split in ("validation", "heldout", "train", "pool")]
    answer = {"critique": "A: dog: yes", "style": "critique", "verdict": "A"}
    for path in (OF_01, OF_02, Path("03_ift/x")):
        path.parent.mkdir()
        common.write_json(path.with_name("meta.json"), {"args": {**args, "style": "critique"}})
    common.write_json(OF_01.with_name("vocabulary.json"), {"dog": "dog"})
    common.write_jsonl(OF_02, [{**row, **answer} for row in common.both_orders(pairs[2])])
    for path in (OF_01, "pairs.jsonl"):
        common.write_jsonl(path, pairs)
    return tmp_path


def ends(run, command, *words):
    """The command ends in one line with these words, and touches nothing that was there."""
    files = {path: path.read_bytes() for path in run.rglob("*.jsonl")}
    script, flags = stage(NAMES[command[:2]]), command.split()[1:]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        common.run(script.main, script.parse_args(["--run", str(run), *flags]))
    text = str(end.value.code)
    assert text.startswith("error: ") and "\n" not in text and all(x in text for x in words), text
    assert all(path.read_bytes() == data for path, data in files.items())


ROWS = """02 id 7|02 image null|02 split "test"|02 evidence [{}]|02 evidence "dog"|02 chosen 3
02 hallucinated {"cat": 1}|02 rejected null|02 prompt GONE|05 evidence GONE|04 split GONE
03 label "a"|03 critique GONE|03 response_a 1.5|03 order "aa"|03 style "poem"|03 verdict null
03 pair_id null|04 critique null|04 image GONE"""


@pytest.mark.parametrize("words", ROWS.replace("\n", "|").split("|"))
def test_damaged_rows(words, run):
    """A field gone, null or of another kind: file, line and field are named."""
    command, field, value = words.split(" ", 2)
    file = OF_02 if command in ("03", "04") and field != "split" else OF_01
    rows = read_rows(file)
    rows[1].pop(field)
    rows[1] |= {} if value == "GONE" else {field: json.loads(value)}
    common.write_jsonl(file, rows)
    ends(run, command, f"{file} line 2: ", f" {field}")


# command | file | its content (GONE: it is not there) | what is said
FILES = r"""02|01_preferences/preferences.jsonl|{"id": "x"|preferences.jsonl line 1: JSON
02|01_preferences/preferences.jsonl|\xff|preferences.jsonl line 1: UnicodeDecodeError
02|01_preferences/preferences.jsonl||no pair in split 'train'
02|01_preferences/meta.json|GONE|01_preferences is not complete: first run 01_
05 --pairs pairs.jsonl|01_preferences/meta.json|GONE|01_preferences is not complete: first run 01_
03|02_critiques/meta.json|GONE|02_critiques is not complete: first run 02_
05 --pairs none.jsonl|x||none.jsonl row 1: FileNotFoundError
05 --pairs x.jsonl|x.jsonl||x.jsonl holds no usable row: there is no row
05 --pairs x.parquet|x.parquet|PAR1|x.parquet row 1: ArrowInvalid
05 --pairs 03_ift --benchmark llava-wild|x||a folder with questions.jsonl
01 --images nowhere|x||nowhere is no folder
01 --images . --prompts y|x||No such file or directory: 'y'
01 --pairs pairs.jsonl --vocabulary x|x|{dog}|x: JSON {phrase: class} is expected
01 --pairs pairs.jsonl --vocabulary x|x|{"a": 1}|x: JSON {phrase: class} is expected
01 --pairs pairs.jsonl --detections x|x|{"image": 1}|x line 1: ValidationError
01 --pairs pairs.jsonl --expert x.pt|x.pt||--expert x.pt: no weights"""
FOUND = '01 --pairs pairs.jsonl --detections x|x|{"image": "0.png", "detections": [{"object": "a", '
for number in ('"high"', "NaN", "1.5", "-0.1", "null"):
    FILES += f'\n{FOUND}"confidence": {number}}}]}}|detections.0.confidence'


@pytest.mark.parametrize("row", FILES.split("\n"))
def test_files(row, run):
    command, file, content, words = row.split("|")
    Path(file).unlink(missing_ok=True)
    if content != "GONE":
        Path(file).write_bytes(content.encode().replace(rb"\xff", b"\xff"))
    ends(run, command, words)


# why it is skipped: field and value of the second of four rows
SKIPS = r"""not a row of preferences.jsonl: prompt 5|chosen [{}]|rejected "\ud83d"|evidence [{}]
no response: chosen ""|rejected null
identical responses: rejected "A dog. "
missing image: image "gone.png"|image ""|image {"path": 3}|image 3
picture that does not decode: image "pairs.jsonl"
more than one image: image ["0.png", "0.png"]
columns of no known format: row 3|row [1]|row {}
more than 10,000 characters: prompt LONG"""


@pytest.mark.parametrize("case", SKIPS.split("\n"))
def test_rows_of_given_pairs(case, run, capsys):
    reason, told = case.replace("LONG", '"' + "word " * 3000 + '"').split(": ", 1)
    for field, value in (cell.split(" ", 1) for cell in told.split("|")):
        rows = read_rows(Path("pairs.jsonl"))
        rows[1] = json.loads(value) if field == "row" else {**rows[1], field: json.loads(value)}
        Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _, pairs, counts = one.read_pairs("x.jsonl", run, run)
        assert counts.pop("rows read") == 4 and len(pairs) == 3
        assert [(k[: 9 + len(reason)], n) for k, n in counts.items()] == [(f"skipped: {reason}", 1)]
        assert "skipped x.jsonl row 2, field " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_pictures_that_do_not_decode(kind, tmp_path):
    """Cut ones, by any decoder; strips, and 16 bits and more, are none that a person sees."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def saved(pixels, kind):
        Image.fromarray(pixels).save(tmp_path / "x", kind)
        return (tmp_path / "x").read_bytes()

    data, deep = saved(noise, kind), (np.uint16, np.int32, np.float32)
    assert one.place_image(data, tmp_path, tmp_path).startswith("images/")
    bad = [saved(noise[:, :, 0].astype(dtype), "TIFF") for dtype in deep]
    bad.append(saved(np.zeros((2, 500, 3), np.uint8), "PNG"))
    for image in [data[: len(data) // 3], data[: int(len(data) * 0.9)], *bad]:
        with pytest.raises(one.Skip, match="does not decode"):
            one.place_image(image, tmp_path, tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_pictures_are_upright_and_on_white(mode, tmp_path):
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    clear.convert(mode).save(tmp_path / "x.png", exif=exif)
    seen = common.load_image(tmp_path / "x.png")
    assert seen.size == (1, 2) and seen.mode == "RGB"
    assert [seen.getpixel((0, y)) for y in (0, 1)] == [(255, 255, 255), (0, 0, 0)]
