"""The README's "Your own pictures": its seven lines in order, on 60 pictures of the toy world with
untidy names and on what else lies in a folder, with only what a test must add: a small judge and
detector, and less of everything (slow)."""

import json
import re
import shlex

import pytest
from conftest import ROOT, WORLD, run_here
from PIL import Image
from scenes import write_pictures

pytestmark = pytest.mark.slow

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = TEXT[TEXT.index("## Your own pictures") :].split("```")[1]
LINES = [shlex.split(line, comments=True)[1:] for line in BLOCK.strip().splitlines()]
SHORT = "--max-new-tokens 48 --micro-batch 32"
ADDED = {
    "01": f"--model {WORLD}/model --expert {WORLD}/expert.pt --candidates 4 --max-new-tokens 32",
    "02": "--max-new-tokens 48",
    "03": f"--steps 2 {SHORT}",
    "04": f"--steps 2 --samples 32 --iterations 2 {SHORT}",
    "05": "--max-new-tokens 48",
}


def make_untidy(folder):
    """Renames the first pictures of the folder, turns one by its EXIF tag, adds what is none."""
    paths = sorted(folder.iterdir())
    (folder / "Ferien 2019").mkdir()
    paths[0].rename(folder / "Ferien 2019" / "Größe & 图 (1).png")
    for path, name in zip(paths[1:3], ("DSC 1.JPG", "Ferien 2019/DSC 1.jpeg")):
        Image.open(path).save(folder / name, quality=95)
        path.unlink()
    picture, exif = Image.open(paths[3]), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    paths[3].unlink()
    (folder / "half.png").write_bytes(paths[4].read_bytes()[:500])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    for name in ("notes.txt", "IMG_1.HEIC", ".hidden.png"):
        (folder / name).write_text("no picture")


def test_the_seven_lines(tmp_path):
    """At the end both variants stand in one table, of pairs that 01 held out."""
    write_pictures(tmp_path, 3, n_images=60, n_heldout=1)
    make_untidy(tmp_path / "images")
    run = tmp_path / "run"
    here = {"runs/mine": str(run), "PICTURES": f"{tmp_path}/images"}
    for line in LINES:
        words = [*line, *ADDED[line[0][:2]].split()]
        run_here([here.get(word, word) for word in words])
    assert [line[0][:2] for line in LINES] == ["01", "02", "03", "04", "05", "03", "05"]
    report = (run / "05_evaluation" / "report.md").read_text()
    table = report.split("| judge |")[1].split("\n\n")[0]
    found = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    judges = ["base", "after 03", "margin, iteration 1", "margin, iteration 2", "after 03, bt"]
    assert [name for name in found if name in judges] == judges
    counts = json.loads((run / "05_evaluation" / "meta.json").read_text())["counts"]
    splits = json.loads((run / "01_preferences" / "meta.json").read_text())["counts"]
    assert counts["pairs"] == splits["  in split heldout"] > 0
    assert splits["rows read"] == 60 + 2  # the half one and the dot
    assert splits["skipped: picture that does not decode"] == 1 == splits["skipped: hidden file"]
    assert all(splits[f"skipped: no decoder for {kind}"] == 1 for kind in (".txt", ".heic"))
