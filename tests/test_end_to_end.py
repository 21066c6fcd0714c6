"""The whole method at a reduced size on the shipped toy world, by the real command lines (slow)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import demo
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("01", "02", "03", "04", "04 random", "05")
SMALLER = {
    "04": ["--pool", "300", "--steps", "40"],
    "04 random": ["--pool", "300", "--steps", "40"],
}


def start(command):
    """(exit status, all that a command line printed); the last of two equal flags counts."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def run(command):
    status, output = start(command)
    assert status == 0, f"{command}\n{output[-4000:]}"
    return output


def commands(world, folder, **changed):
    """{step: command line} of the demo, at the reduced size."""
    steps = demo.commands(world, world, folder, 0, **changed)
    return {name: [*command, *SMALLER.get(name, [])] for name, command in steps.items()}


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """(run directory, {step: what it printed}) of all steps."""
    folder = tmp_path_factory.mktemp("run") / "r"
    said = {}
    for name, command in commands(world, folder).items():
        said[name] = run(command)
    assert tuple(said) == STAGES
    return folder, said


def metrics_of(folder):
    return json.loads((folder / "05_evaluation" / "metrics.json").read_text())


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- What comes out ------------------------------------------------------------------------------
def test_the_judge_learns(finished):
    """With room for other processors; nothing about which selection wins."""
    folder, _ = finished
    table = metrics_of(folder)["table"]
    base, after = table["base"], table["after 03"]
    assert 0.4 <= base["accuracy"] <= 0.7
    assert after["accuracy"] >= base["accuracy"] + 0.2
    assert after["unparseable"] <= 0.05
    assert after["checks"]["balanced"] >= base["checks"]["balanced"] + 0.1
    for rule in ("margin", "random"):
        for t in (1, 2):
            assert table[f"{rule}, iteration {t}"]["accuracy"] >= base["accuracy"] + 0.1


@pytest.mark.parametrize("how", ["blank", "other"])
def test_the_judge_needs_the_picture(finished, how):
    folder, _ = finished
    table = metrics_of(folder)["table"]
    seeing = table["margin, iteration 2"]["accuracy"]
    assert table[f"margin, iteration 2, {how} image"]["accuracy"] <= seeing - 0.1


def test_the_expert_is_held_against_the_truth(finished):
    folder, _ = finished
    assert 0 <= metrics_of(folder)["expert"]["findings_contradicted"] <= 0.15


def test_reports_name_what_was_done(finished):
    folder, said = finished
    report = (folder / "05_evaluation" / "report.md").read_text()
    for name in ("base", "after 03", "margin, iteration 2", "random, iteration 2"):
        assert name in report
    for first, script in (("01", "02_generate_critiques.py"), ("02", "03_train_ift.py")):
        assert f"python {script} --run" in said[first].rsplit("next: ")[-1]
    for t in (1, 2):
        share = re.search(rf"iteration {t}: kept \d+ of \d+ pairs = ([\d.]+)%", said["04"])
        assert 10 <= float(share[1]) <= 45


def test_controls_train_on_as_many_rows(finished):
    folder, _ = finished
    for t in (1, 2):
        sizes = []
        for stage in ("04_rejection", "04_rejection_random"):
            sizes.append(len(read_rows(folder / stage / f"iter{t}" / "kept.jsonl")))
        assert sizes[0] == sizes[1] > 0


def test_pictures_are_there(finished):
    folder, _ = finished
    for path in (
        "01_preferences/contact_sheet.png",
        "04_rejection/iter1/margins.png",
        "04_rejection/iter1/examples.png",
        "05_evaluation/accuracy.png",
        "05_evaluation/reliability.png",
        "05_evaluation/pictures/right-1.png",
    ):
        assert (folder / path).stat().st_size > 5000


def test_no_library_warns_on_the_screen(finished):
    _, said = finished
    for name, output in said.items():
        for line in output.splitlines():
            ours = line.startswith(("warning: retention", "warning: no gain"))
            assert ours or "warning" not in line.lower(), f"{name}: {line}"


# ---- Complete stages, other arguments (test_faults.py: interruptions) ----------------------------
def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_finished_stages_do_nothing(world, finished):
    folder, _ = finished
    before = files_of(folder)
    for command in commands(world, folder).values():
        assert "nothing to do" in run(command)
    assert files_of(folder) == before


def test_other_arguments_are_refused(world, finished):
    folder, _ = finished
    status, output = start([*commands(world, folder)["02"], "--critiques", "3"])
    assert status != 0
    assert "--critiques was 2, is 3" in output


# ---- Ablations and the README --------------------------------------------------------------------
@pytest.mark.parametrize("expert, style", [(None, "descriptive"), ("none", "critique")])
def test_ablations_run(world, finished, tmp_path, expert, style):
    folder, _ = finished
    vocabulary = folder / "01_preferences" / "vocabulary.json"
    few = "--limit 250 --present 0.5 --absent 0.5 --validation 20 --train 60"
    extra = {
        "01": [*few.split(), "--vocabulary", str(vocabulary)],
        "02": [],
        "03": ["--steps", "10"],
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
    for picture in re.findall(r"\]\((assets/[^)]+)\)", text):
        assert (ROOT / picture).exists(), picture
