"""The README's "Your first evening": its seven lines in order, on 60 pictures of the toy world,
with only what a test must add: a small judge and detector, and less of everything (slow)."""

import json
import re
import shlex

import pytest
from conftest import ROOT, WORLD, run_here
from scenes import write_pictures

pytestmark = pytest.mark.slow

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = TEXT[TEXT.index("## Your first evening") :].split("```")[1]
LINES = [shlex.split(line, comments=True)[1:] for line in BLOCK.strip().splitlines()]
SHORT = "--max-new-tokens 48 --micro-batch 32"
ADDED = {
    "01": f"--model {WORLD}/model --expert {WORLD}/expert.pt --candidates 4 --max-new-tokens 32",
    "02": "--max-new-tokens 48",
    "03": f"--steps 2 {SHORT}",
    "04": f"--steps 2 --samples 32 --iterations 2 {SHORT}",
    "05": "--max-new-tokens 48",
}


def test_the_seven_lines(tmp_path):
    """At the end both variants stand in one table, of pairs that 01 held out."""
    write_pictures(tmp_path, 3, n_images=60, n_heldout=1)
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
