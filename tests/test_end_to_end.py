"""The whole method at a reduced size on the shipped toy world, by the real command lines (slow)."""

import json
import re

import demo
import pytest
from conftest import ROOT, read_rows, run
from PIL import Image

pytestmark = pytest.mark.slow

N_HELDOUT = 100  # of the world's pairs
SMALLER = {
    "03": "--steps 120",
    "04": "--pool 150 --steps 20",
    "04 random": "--pool 150 --steps 20",
}


def commands(world, folder, **changed):
    """{step: command line} of the demo, at the reduced size; the last of two equal flags counts."""
    steps = demo.commands(world, world, folder, 0, **changed)
    few = folder.parent / "heldout.jsonl"
    lines = (world / "heldout.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(lines[:N_HELDOUT]))
    steps["01"] += ["--limit", "1000"]
    steps["05"] += ["--pairs", str(few), "--image-root", str(world)]
    return {name: [*command, *SMALLER.get(name, "").split()] for name, command in steps.items()}


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """(run directory, {step: what it printed}) of all steps."""
    folder = tmp_path_factory.mktemp("run") / "r"
    return folder, {name: run(command) for name, command in commands(world, folder).items()}


def metrics_of(folder):
    return json.loads((folder / "05_evaluation" / "metrics.json").read_text())


# ---- What comes out ------------------------------------------------------------------------------
def test_the_judge_learns(finished):
    """With room for other processors; nothing about which selection wins."""
    folder, _ = finished
    table = metrics_of(folder)["table"]
    base, after = table["base"], table["after 03"]
    assert 0.35 <= base["accuracy"] <= 0.75
    assert after["accuracy"] >= base["accuracy"] + 0.15
    assert after["unparseable"] <= 0.05
    assert after["checks"]["balanced"] >= base["checks"]["balanced"] + 0.1
    for rule in ("margin", "random"):
        for t in (1, 2):
            assert table[f"{rule}, iteration {t}"]["accuracy"] >= base["accuracy"] + 0.1


@pytest.mark.parametrize("how", ["blank", "other"])
def test_the_judge_needs_the_picture(finished, how):
    table = metrics_of(finished[0])["table"]
    seeing = table["margin, iteration 2"]["accuracy"]
    assert table[f"margin, iteration 2, {how} image"]["accuracy"] <= seeing - 0.1


def test_reports_name_what_was_done(finished):
    folder, printed = finished
    report = (folder / "05_evaluation" / "report.md").read_text()
    for name in ("base", "after 03", "margin, iteration 2", "random, iteration 2"):
        assert f"| {name} |" in report
    scripts = [command[0] for command in demo.commands("w", "p", "r", 0).values()]
    for name, script in zip(("01", "02", "03"), scripts[1:4], strict=True):
        assert f"next: python {script} --run={folder}" in printed[name]
    assert f"read {folder}/05_evaluation/report.md" in printed["05"]
    for t in (1, 2):
        part = re.search(rf"iteration {t}: kept \d+ of 150 pairs = ([\d.]+)%", printed["04"])
        assert 10 <= float(part[1]) <= 45


def test_controls_train_on_as_many_rows(finished):
    folder, _ = finished
    for t in (1, 2):
        rows = [read_rows(folder / f"04_rejection{x}/iter{t}/kept.jsonl") for x in ("", "_random")]
        assert len(rows[0]) == len(rows[1]) > 0


def test_pictures_are_there(finished):
    folder, _ = finished
    names = ["01_preferences/contact_sheet.png", "04_rejection/iter1/margins.png"]
    names += [f"05_evaluation/{x}.png" for x in ("accuracy", "reliability", "pictures/right-1")]
    for name in names:
        with Image.open(folder / name) as picture:
            picture.load()
            assert len(picture.convert("RGB").getcolors(2**24)) > 10, name


def test_no_library_warns_on_the_screen(finished):
    ours = ("warning: retention", "warning: no gain", "warning: the verdict", "warning: margins")
    for name, output in finished[1].items():
        for line in output.splitlines():
            assert line.startswith(ours) or "warning" not in line.lower(), f"{name}: {line}"


# ---- Finished stages -----------------------------------------------------------------------------
def test_finished_stages_do_nothing(world, finished):
    """No model is loaded, no weight written anew; answers and what is derived stay the same."""
    folder, _ = finished
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "meta.json"]
    earlier = {path: path.read_bytes() for path in files}
    weights = {path: path.stat().st_mtime_ns for path in files if path.parent.name == "adapter"}
    assert len({path.parent for path in weights}) == 5  # of 03, and two iterations each
    for command in commands(world, folder).values():
        assert "loaded " not in run(command)
    for path in files:
        assert path.read_bytes() == earlier[path], path
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


# ---- Ablations and the README --------------------------------------------------------------------
@pytest.mark.parametrize("expert, style", [(None, "descriptive"), ("none", "critique")])
def test_ablations_run(world, finished, tmp_path, expert, style):
    folder, _ = finished
    vocabulary = folder / "01_preferences" / "vocabulary.json"
    few = "--limit 120 --present 0.5 --absent 0.5 --validation 10 --train 40"
    extra = {
        "01": [*few.split(), "--vocabulary", str(vocabulary)],
        "02": [],
        "03": ["--steps", "5"],
        "05": ["--withhold"],
    }
    steps = commands(world, tmp_path / "r", expert=expert, style=style)
    for name, flags in extra.items():
        run([*steps[name], *flags])
    table = metrics_of(tmp_path / "r")["table"]
    assert set(table) == {"shorter response", "base", "after 03"}


def test_what_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && python tests/demo.py" in text
    assert "pip install -r requirements.txt && pytest" in text
    for script in re.findall(r"python ((?:tests/)?\w+\.py)", text):
        assert (ROOT / script).exists(), script
