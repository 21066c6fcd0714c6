"""What the README says is so: commands parse, paths, flags and lines exist, code stands in the
files, numbers of the claims are those of assets/results.jsonl."""

import ast
import importlib
import re
import shlex
import sys
from statistics import mean

import pytest
import study
import study_report
from conftest import ROOT, STAGES, stage
from PIL import Image
from study_report import number

from common import read_json

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)  # [(language, code)]
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
EXPERTS = ("YOLO", "the policy's yes or no")
SCRIPTS = ("bench", "bench_gpu", "build_world", "demo", "faults", "pictures", "study")


def commands():
    """Every command of the README, in blocks and in the text, without comments."""
    lines = re.findall(r"`((?:python|pytest|torchrun|pip) [^`]+)`", PROSE)
    for language, code in BLOCKS:
        if not language:
            lines += code.replace("\\\n", " ").splitlines()  # a command may go on in a second line
    found = []
    for line in lines:
        for part in line.split(" && "):
            if part.split(" ")[0] in ("python", "pytest", "torchrun", "pip"):
                found.append(shlex.split(part, comments=True))
    return found


def flags_of(source):
    return set(re.findall(r'"(--[a-z][\w-]*)"', source))


def test_there_are_commands():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command, monkeypatch):
    if command[0] == "torchrun":  # torchrun FLAGS -- script flags
        command = ["python", *command[command.index("--") + 1 :]]
    if command[0] != "python":
        return
    script, *argv = command[1:]
    assert (ROOT / script).exists()
    name = script.removesuffix(".py").removeprefix("tests/")
    if name in STAGES:
        stage(name).parse_args(argv)
        return
    module = importlib.import_module(name)
    if hasattr(module, "parse_args"):
        module.parse_args(argv)
    known = flags_of((ROOT / script).read_text(encoding="utf-8"))
    assert {word for word in argv if word.startswith("--")} <= known


def test_flags_exist():
    known = {"--nproc-per-node", "--help"}
    for name in (*STAGES, "common"):
        known |= flags_of((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    for name in SCRIPTS:
        known |= flags_of((ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8"))
    negative = {f"--no-{flag[2:]}" for flag in known}
    for flag in re.findall(r"`[^`]*?(--[a-z][\w-]*)[^`]*`", PROSE):
        assert flag in known | negative, flag


def test_excerpts_stand_in_the_files():
    files = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in (*STAGES, "common")]
    excerpts = [code for language, code in BLOCKS if language == "python" and code[0] == " "]
    assert len(excerpts) == 5
    for code in excerpts:
        assert len(code.splitlines()) <= 10
        assert any(code in text for text in files), code


def test_links_lead_to_what_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+)#L(\d+)\)", TEXT)
    assert len(links) > 10
    for name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), (name, file, line)
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for anchor in re.findall(r"\]\(#([\w-]+)\)", TEXT):
        assert anchor in anchors, anchor
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", TEXT):
        assert (ROOT / path).exists(), path


def test_pictures_are_small_and_all_shown():
    shown = set(re.findall(r"!\[[^]]*\]\((assets/[^)]+)\)", TEXT))
    there = {f"assets/{path.name}" for path in (ROOT / "assets").glob("*.png")}
    assert shown == there
    for path in shown:
        assert (ROOT / path).stat().st_size < 150_000, path
        with Image.open(ROOT / path) as picture:
            assert picture.width >= 600


def test_it_is_read_in_twenty_minutes():
    words = [word for word in PROSE.split() if re.search(r"\w", word)]  # no bars of tables
    assert len(words) <= 2500


def test_claims_are_the_results():
    lines = study_report.read(ROOT / "assets" / "results.jsonl")
    for line in study_report.claims(lines):
        assert line in TEXT
    rows = [row for row in TEXT.splitlines() if row.startswith("|")]
    studies = set(study.STUDIES)
    for row in study_report.claims(lines)[2:]:
        assert row in rows
        assert re.search(r"`([\w-]+)`", row.split("|")[-2])[1] in studies


def test_python_blocks_are_python():
    assert sys.version_info >= (3, 11)
    for language, code in BLOCKS:
        if language == "python" and code[0] != " ":
            ast.parse(code)


def test_the_demos_table_is_the_demos():
    demo = read_json(ROOT / "assets" / "demo.json")
    names = ("base", "after 03", "margin, iteration 2", "random, iteration 2")
    names = (*names, "margin, iteration 2, blank image")
    rows = [row for row in TEXT.splitlines() if re.match(r"\| (base|after|control)", row)]
    assert len(rows) == len(names)
    for name, row in zip(names, rows):
        measured = demo["table"][name]
        accuracy, low, high = (number(x) for x in (measured["accuracy"], *measured["interval"]))
        assert row.endswith(f"| {accuracy} | {low}-{high} |"), row
    for name in ("after 03", "random, iteration 2"):
        gap = demo["differences"][f"margin, iteration 2 - {name}"]
        middle, low, high = (number(x, "+") for x in gap)
        assert f"{middle} ({low} to {high})" in TEXT


def test_ratios_are_the_benchs():
    bench = (ROOT / "assets" / "bench.txt").read_text()
    printed = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", bench, re.MULTILINE)
    ratios = [" ".join(row) for row in printed]
    table = TEXT[TEXT.index("| what | against | toy") :].split("\n\n")[0]
    told = re.findall(r"\d+\.\d\d \d+\.\d\d \d+\.\d\d", table)
    assert sorted(told) == sorted(ratios)


def two(value):
    return f"{value:.2f}".removeprefix("0")


def shares(lines, study_name, setting, condition="after 03"):
    """Accuracies of all worlds."""
    found = study_report.cells(lines, study_name, setting, condition)
    return [value for value, _ in found.values()]


def counted(lines, study_name, setting, count):
    found = study_report.of_setting(lines, study_name, setting).values()
    return mean(line["counts"][count] for line in found)


def test_experiments_expect_what_was_measured():
    lines = study_report.read(ROOT / "assets" / "results.jsonl")
    table = TEXT[TEXT.index("| change | expect") :].split("\n\n")[0]
    styles = ("descriptive", "none", "critique, lambda 1/3")
    described, verdicts, critiques = (two(mean(shares(lines, "training", x))) for x in styles)
    assert f"after 03 {described}, or {verdicts}, instead of {critiques}" in table
    few = [two(value) for value in shares(lines, "training", "critique, 30 steps")]
    assert ", ".join(few) in table
    lams = [f"lambda {lam}" for lam in (0, 1)]
    without, equal = (two(mean(shares(lines, "training", lam))) for lam in lams)
    assert f"{without} and {equal}" in table
    count = "captions hallucinate, greedy"
    said = [two(counted(lines, "training", x, count)) for x in (*lams, "nothing trained")]
    assert f"{said[0]} and {said[1]} hallucinate, {said[2]} of the base" in table
    wrong = [counted(lines, "expert", x, "expert: labels_wrong") for x in EXPERTS]
    assert f"labels wrong {100 * wrong[1]:.0f} instead of {100 * wrong[0]:.0f} %" in table
    yolo, own = (two(mean(shares(lines, "expert", x))) for x in EXPERTS)
    assert f"accuracy {own} for {yolo}" in table
    attacked = read_json(ROOT / "assets" / "demo.json")["table"]["margin, iteration 2, attack"]
    assert f"becomes {number(attacked['accuracy'])}" in table
