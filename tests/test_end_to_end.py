"""The whole path at a reduced size, by the real command lines: accuracies, resuming, ablations (slow)."""
import json
import re
import shutil
import subprocess
import sys

import demo
import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.slow
SMALLER = {"--pool": "300", "--steps": {"03": "150", "04": "40"}, "--best-of-images": "30"}


def smaller(name, command):
    """The demo's command with fewer pairs and steps."""
    command = list(command)
    for flag, value in SMALLER.items():
        if flag in command:
            command[command.index(flag) + 1] = value if isinstance(value, str) else value[name.split()[0]]
    return command


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """(run directory, {step: what it printed}) of the demo's steps at the reduced size."""
    folder = tmp_path_factory.mktemp("run") / "r"
    steps = {name: smaller(name, command) for name, command in demo.commands(world, world, folder, 0).items()}
    return folder, {name: run(command) for name, command in steps.items()}


def test_the_method_works(finished):
    folder, said = finished
    metrics = json.loads((folder / "05_evaluation" / "metrics.json").read_text())
    table = metrics["table"]
    assert 0.40 <= table["base"]["accuracy"] <= 0.68
    assert table["after 03"]["accuracy"] >= table["base"]["accuracy"] + 0.17
    assert table["after 03"]["hallucination"] >= 0.74 and table["after 03"]["unparseable"] <= 0.03
    assert table["margin, iteration 2"]["accuracy"] >= table["after 03"]["accuracy"] - 0.03
    assert table["after 03"]["checks"]["balanced"] >= table["base"]["checks"]["balanced"] + 0.15
    for how in ("blank", "other"):  # without its picture it must not do what it does with it
        assert table[f"margin, iteration 2, {how} image"]["accuracy"] <= 0.66
    assert metrics["expert"]["findings_contradicted"] <= 0.12
    report = (folder / "05_evaluation" / "report.md").read_text()
    assert "random, iteration 2" in report and "Best-of-N" in report
    for t in (1, 2):
        share = re.search(rf"iteration {t}: kept \d+ of \d+ pairs = ([\d.]+)%", said["04"])
        assert 30 <= float(share[1]) <= 50
    assert "then python 02_generate_critiques.py" in said["01"]


def test_best_of_n_picks_fewer_hallucinations(finished):
    folder, _ = finished
    table = json.loads((folder / "05_evaluation" / "metrics.json").read_text())["best_of_n"]
    judged, oracle, random = (table[name]["8"]["hallucinated"] for name in ("margin, iteration 2", "oracle pick", "random pick"))
    assert oracle <= judged + 0.05 and judged < random  # the oracle weighs recall as well


def test_finished_stages_do_nothing_and_other_arguments_are_refused(world, finished):
    folder, _ = finished
    steps = demo.commands(world, world, folder, 0)
    before = (folder / "02_critiques" / "critiques.jsonl").stat().st_mtime_ns
    assert "nothing to do" in run(steps["02"])
    assert (folder / "02_critiques" / "critiques.jsonl").stat().st_mtime_ns == before
    refused = subprocess.run([sys.executable, *steps["02"], "--style", "none"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode and "--style was critique, is none" in refused.stderr


def test_interrupted_stages_resume_to_identical_files(world, finished, tmp_path):
    folder, _ = finished
    steps = demo.commands(world, world, tmp_path / "again", 0)
    shutil.copytree(folder / "01_preferences", tmp_path / "again" / "01_preferences")
    shutil.copytree(folder / "02_critiques", tmp_path / "again" / "02_critiques")
    for stage, files in (("01_preferences", ("candidates.jsonl", "detections.jsonl")), ("02_critiques", ("samples.jsonl",))):
        here = tmp_path / "again" / stage
        (here / "meta.json").unlink()
        for name in files:  # cut in the middle of a row, as a power cut does
            data = (here / name).read_bytes()
            (here / name).write_bytes(data[:int(len(data) * 0.83)])
        for made in ("preferences.jsonl", "critiques.jsonl"):
            (here / made).unlink(missing_ok=True)
        assert "resuming" in run(steps[stage[:2]])
        for path in here.glob("*.jsonl"):
            assert path.read_bytes() == (folder / stage / path.name).read_bytes(), path.name


@pytest.mark.parametrize("expert, style", [(None, "descriptive"), ("none", "critique")])
def test_ablations_run(world, finished, tmp_path, expert, style):
    folder, _ = finished
    extra = {"01": ["--limit", "250", "--vocabulary", str(folder / "01_preferences" / "vocabulary.json"),
                    "--present", "0.5", "--absent", "0.5", "--validation", "20", "--train", "60"],
             "03": ["--steps", "10"], "05": ["--best-of", "0", "--withhold"]}
    for name, command in demo.commands(world, world, tmp_path / "r", 0, (), expert, style).items():
        if name in ("01", "02", "03", "05"):
            run([*command, *extra.get(name, [])])
    table = json.loads((tmp_path / "r" / "05_evaluation" / "metrics.json").read_text())["table"]
    assert set(table) == {"shorter response", "base", "after 03"}


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    assert "pip install -r requirements.txt && python tests/demo.py" in text
    assert "pip install -r requirements.txt && pytest" in text
    for script in set(re.findall(r"(?:python )((?:tests/)?\w+\.py)", text)):
        assert (ROOT / script).exists(), script
    for picture in re.findall(r"\]\((assets/[^)]+)\)", text):
        assert (ROOT / picture).exists(), picture
