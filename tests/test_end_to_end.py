"""The whole method at a reduced size on the shipped toy world, by the real command lines (slow)."""

import json
import sys

import demo
import pytest
from conftest import run, run_here, stage

pytestmark = pytest.mark.slow

SHOWN = "import os, sys, runpy; os.dup2(1, 2)\n"  # both streams in one, as on a screen
SHOWN += "del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
N_HELDOUT = 100  # of the world's pairs
LESS = "--pool 80 --steps 20"
SMALLER = {"03": "--steps 120", "04": LESS, "04 random": f"{LESS} --iterations 1"}


def commands(world, folder, **changed):
    """{step: command line} of the demo, at the reduced size; the last of two equal flags counts."""
    steps = demo.commands(world, world, folder, 0, **changed)
    few = folder.parent / "heldout.jsonl"
    lines = (world / "heldout.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(lines[:N_HELDOUT]))
    steps["01"] += ["--limit", "1000", "--validation", "40"]
    steps["05"] += ["--pairs", str(few), "--image-root", str(world)]
    return {name: [*command, *SMALLER.get(name, "").split()] for name, command in steps.items()}


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """(run directory, {step: what it printed}) of all steps."""
    folder = tmp_path_factory.mktemp("run") / "r"
    steps = commands(world, folder)
    return folder, {name: run(["-c", SHOWN, *command]) for name, command in steps.items()}


def metrics_of(folder):
    return json.loads((folder / "05_evaluation" / "metrics.json").read_text())


# ---- What comes out ------------------------------------------------------------------------------
def test_the_judge_learns(finished):
    """To look, too. With room for other processors; nothing about which selection wins."""
    folder, _ = finished
    table = metrics_of(folder)["table"]
    base, after = table["base"], table["after 03"]
    assert 0.35 <= base["accuracy"] <= 0.75
    assert after["accuracy"] >= base["accuracy"] + 0.15
    assert after["unparseable"] <= 0.05
    assert after["balanced"] >= base["balanced"] + 0.1
    seeing = table["margin, iteration 2"]["accuracy"]
    for how in ("blank", "other"):
        assert table[f"margin, iteration 2, {how} image"]["accuracy"] <= seeing - 0.1
    for judge in ("margin, iteration 1", "margin, iteration 2", "random, iteration 1"):
        assert table[judge]["accuracy"] >= base["accuracy"] + 0.1


def test_reports_name_what_was_done(finished):
    folder, printed = finished
    report = (folder / "05_evaluation" / "report.md").read_text()
    for name in ("base", "after 03", "margin, iteration 2", "random, iteration 1"):
        assert f"| {name} |" in report
    scripts = [command[0] for command in demo.commands("w", "p", "r", 0).values()]
    for name, script in zip(("01", "02", "03"), scripts[1:4], strict=True):
        assert f"next: python {script} --run={folder}" in printed[name]
    assert f"read {folder}/05_evaluation/report.md" in printed["05"]


def test_no_library_warns_on_the_screen(finished):
    ours = ("retention", "no gain", "the verdict", "margins", "too few pairs in split heldout")
    for name, output in finished[1].items():
        for line in output.splitlines():
            is_ours = line.removeprefix("warning: ").startswith(ours)
            assert is_ours or "warning" not in line.lower(), f"{name}: {line}"


# ---- Finished stages -----------------------------------------------------------------------------
def test_finished_stages_do_nothing(world, finished, monkeypatch):
    """No model is loaded, no weight written anew; answers and what is derived stay the same."""
    folder, _ = finished
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "meta.json"]
    earlier = {path: path.read_bytes() for path in files}
    weights = {path: path.stat().st_mtime_ns for path in files if path.parent.name == "adapter"}
    assert len({path.parent for path in weights}) == 4  # of 03, two iterations and one
    for script, loader in (("common", "load_judge"), ("01_build_preferences", "Detector")):
        monkeypatch.setattr(stage(script), loader, lambda *_, **__: pytest.fail("it is loaded"))
    for command in commands(world, folder).values():
        monkeypatch.setattr(sys, "argv", command)
        run_here(command)
    for path in files:
        assert path.read_bytes() == earlier[path], path
    assert {path: path.stat().st_mtime_ns for path in weights} == weights


# ---- Ablations -----------------------------------------------------------------------------------
def test_ablations_run(world, finished, tmp_path):
    """The policy as its own expert, and critiques that describe."""
    folder, _ = finished
    vocabulary = folder / "01_preferences" / "vocabulary.json"
    few = "--limit 120 --present 0.5 --absent 0.5 --validation 10 --train 40"
    extra = {"01": [*few.split(), "--vocabulary", str(vocabulary)], "02": []}
    extra |= {"03": ["--steps", "5"], "05": ["--withhold"]}
    steps = commands(world, tmp_path / "r", expert="none", style="descriptive")
    for name, flags in extra.items():
        run_here([*steps[name], *flags])
    table = metrics_of(tmp_path / "r")["table"]
    assert set(table) == {"shorter response", "base", "after 03"}


# ---- Stages that are stopped a few times and started again ---------------------------------------
def test_what_was_stopped_goes_on_to_the_same():
    """python tests/faults.py tries more."""
    lines = run(["tests/faults.py", "--kills", "3", "--others", "1"]).splitlines()
    for number, line in zip(("01", "02", "03", "04", "05"), lines, strict=True):
        assert line.startswith(f"stage {number}: 5 of 5 identical")
