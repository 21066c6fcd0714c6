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
from study_report import mean_count, number

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
    said = [two(mean_count(lines, "training", x, count)) for x in (*lams, "nothing trained")]
    third = two(mean_count(lines, "training", "critique, lambda 1/3", count))
    assert f"{said[0]} and {said[1]} hallucinate ({third} at 1/3), {said[2]} of the" in table
    first, *seconds = (
        study_report.cells(lines, *study_report.FULL, judge)
        for judge in ("after 03", "continue, iteration 2", "margin, iteration 2")
    )
    gains = [study_report.average(study_report.minus(second, first)) for second in seconds]
    continued, margins = (number(gain, "+") for gain in gains)
    assert f"{continued} where margins gain {margins}" in table
    wrong = [mean_count(lines, "expert", x, "expert: labels_wrong") for x in EXPERTS]
    assert f"labels wrong {100 * wrong[1]:.0f} instead of {100 * wrong[0]:.0f} %" in table
    yolo, own = (two(mean(shares(lines, "expert", x))) for x in EXPERTS)
    assert f"accuracy {own} for {yolo}" in table
    demo = read_json(ROOT / "assets" / "demo.json")["table"]
    attacked, usual = demo["margin, iteration 2, attack"], demo["margin, iteration 2"]
    assert f"{number(usual['accuracy'])} becomes {number(attacked['accuracy'])}" in table
    missing = 1 - attacked["checks"]["n_checks"] / usual["checks"]["n_checks"]
    assert f"but {100 * missing:.0f} % are missing" in table
    assert attacked["checks"]["balanced"] == pytest.approx(usual["checks"]["balanced"], abs=0.005)


def test_the_demos_numbers_in_the_text():
    demo = read_json(ROOT / "assets" / "demo.json")
    counts = demo["counts of 02"]
    passing = counts["kept"] + counts["repeated"]
    wrong_order = counts["dropped: verdict does not follow from its checks"]
    written = f"{counts['critiques written']:,}"
    assert f"demo {passing} of {written} pass; {wrong_order} fall to the second rule" in TEXT
    largest = number(demo["largest margin"])
    assert f"is {largest}, the pool's largest" in " ".join(TEXT.split())


def test_what_worlds_say_in_the_text():
    """The numbers between the tables, in words that stand together in the README."""
    lines = study_report.read(ROOT / "assets" / "results.jsonl")
    text = " ".join(TEXT.split())
    took = study_report.where_03_took(lines)
    spans = []
    for judge in ("after 03", "margin, iteration 2"):
        found = study_report.cells(lines, *study_report.FULL, judge)
        values = [value for value, _ in study_report.only(found, took).values()]
        spans.append(f"{two(min(values))}-{two(max(values))}")
    assert f"03 ends at {spans[0]} and 04 at {spans[1]}" in text
    starts = study_report.of_setting(lines, "start", "the demo's flags")
    follows = {seed: x["counts"]["after 03: verdict follows"] for seed, x in starts.items()}
    deaf = [two(value) for seed, value in follows.items() if seed not in took]
    others = two(min(value for seed, value in follows.items() if seed in took))
    assert f"in {deaf[0]} and {deaf[1]} of the critiques, elsewhere in {others} or more" in text
    right = [x["counts"]["after 03: checks right"] for x in starts.values()]
    assert f"though {100 * min(right):.0f} % of the checks were right" in text
    weighted = shares(lines, "training", "Bradley-Terry 1, and 04")
    last = shares(lines, "training", "Bradley-Terry 1, and 04", "margin, iteration 2")
    spans = [f"{two(min(values))}-{two(max(values))}" for values in (weighted, last)]
    assert f"all worlds come to {spans[0]}, and 04 takes them to {spans[1]}" in text
    labels = mean(shares(lines, "expert", "YOLO, labels alone"))
    assert f"the judge stays at {two(labels)}" in text
    picks = []
    for picker, n in (("random", 4), ("after 03", 4), ("after 03", 16)):
        name = f"best of {n}, {picker}: names nothing absent"
        picks.append(two(mean_count(lines, "best", "N and votes", name)))
    assert f"{picks[0]} at random, {picks[1]} the best of 4" in text
    assert f"{picks[2]} of 16" in text
    wins = "best of 16, after 03: a true caption wins, round"
    first, last = (
        100 * mean_count(lines, "best", "N and votes", f"{wins} {round_}") for round_ in (1, 4)
    )
    assert f"in {first:.0f} % of a knockout's first games, in {last:.0f} % of its last" in text
    names = ("absent_said_no", "present_said_yes", "right, up to 8 claims", "right, more claims")
    places = [f"margin, iteration 2, elsewhere: {name}" for name in names]
    absent, present, few, many = (
        mean_count(lines, "transfer", "other pictures", place) for place in places
    )
    assert f"it denies {100 * absent:.0f} % of what is absent" in text
    assert f"but also {100 * (1 - present):.0f} % of what is there" in text
    assert f"it judges {two(few)} right, of those with more {two(many)}" in text
