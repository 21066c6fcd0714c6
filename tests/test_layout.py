"""Who may use whom, pieces to copy, headers, flags, requirements: read from the syntax trees."""

import ast
import builtins
import copy
import functools
import importlib
import json
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from conftest import STAGES as SCRIPTS

ONE, TWO, THREE, FOUR, FIVE = SCRIPTS
MAY_USE = {ONE: (), TWO: (ONE,), THREE: (), FOUR: (TWO, THREE), FIVE: (ONE, THREE)}
FILES = ("common", *SCRIPTS)
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FILES}
TREE = {name: ast.parse(source) for name, source in SOURCE.items()}


# ---- Reading a tree ------------------------------------------------------------------------------
def import_call(node):
    """The module of a call import_module("..."), as a string; None for other nodes."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return ast.literal_eval(node.args[0])
    return None


def aliases(tree):
    """{name: file} of what the file calls the other files, from its top-level statements."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in FILES:
                    found[alias.asname or alias.name] = alias.name
        if isinstance(node, ast.Assign) and import_call(node.value):
            found[node.targets[0].id] = import_call(node.value)
    return found


def bound_names(statement):
    """The names that a top-level statement defines; imports and re-exports define none."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if not isinstance(statement, ast.Assign) or import_call(statement.value):
        return []
    names = []
    for target in statement.targets:
        names += [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]
    return names


@functools.cache
def definitions(name):
    """{name: top-level statement} of what a file itself defines."""
    modules = aliases(TREE[name])
    found = {}
    for statement in TREE[name].body:
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Attribute) and ast.unparse(value.value) in modules:
            continue  # find_mentions = one.find_mentions: another file's
        for bound in bound_names(statement):
            found[bound] = statement
    return found


@functools.cache
def taken(name):
    """{(file, name)} that a file takes from the others."""
    modules = aliases(TREE[name])
    found = set()
    for node in ast.walk(TREE[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                found.add((modules[node.value.id], node.attr))
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def names_read(node):
    read = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
            read.add(inner.id)
    return read


def used_at_home(name):
    """The top-level names of a file that another statement of the same file reads."""
    found = set()
    for statement in TREE[name].body:
        found |= names_read(statement) - set(bound_names(statement))
    return found


# ---- How much there is to read -------------------------------------------------------------------
# Lines, and nodes of the syntax tree for each line that is neither empty nor a comment.
AT_MOST = {
    "common": (770, 10),
    ONE: (880, 10.6),
    TWO: (285, 10),
    THREE: (640, 10),
    FOUR: (340, 10),
    FIVE: (660, 10.7),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_no_longer_than_promised(name):
    """As the formatter leaves it, which the gate checks."""
    most_lines, most_nodes = AT_MOST[name]
    lines = SOURCE[name].splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= most_lines
    assert sum(1 for _ in ast.walk(TREE[name])) / len(code) <= most_nodes


def test_the_six_files_and_the_tests_are_no_longer_than_promised():
    assert sum(len(source.splitlines()) for source in SOURCE.values()) <= 3500
    of_tests = 0
    for path in (ROOT / "tests").glob("*.py"):
        of_tests += len(path.read_text(encoding="utf-8").splitlines())
    assert of_tests <= 9500


# ---- Who may use whom ----------------------------------------------------------------------------
def test_common_imports_no_script():
    assert set(aliases(TREE["common"]).values()) == set()
    assert "import_module" not in SOURCE["common"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_common_and_what_it_may(name):
    assert set(aliases(TREE[name]).values()) == {"common", *MAY_USE[name]}
    calls = [import_call(node) for node in ast.walk(TREE[name])]
    modules = [module for module in calls if module]
    at_the_top = [module for module in aliases(TREE[name]).values() if module != "common"]
    assert sorted(modules) == sorted(set(at_the_top))  # one line each, none inside a function


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_name_comes_from_the_file_that_defines_it(name):
    for file, used in taken(name):
        assert used in definitions(file), f"{file} only passes {used} on"


@pytest.mark.parametrize("name", SCRIPTS[:4])
def test_nothing_in_a_stage_serves_only_a_later_one(name):
    only_elsewhere = set(definitions(name)) - used_at_home(name)
    assert only_elsewhere <= {"claimed_objects"}  # it stands beside find_mentions, which it needs


def test_what_is_common_serves_two_files_or_common_itself():
    at_home = used_at_home("common") | {"Critique"}  # with the other shapes of rows
    for defined in definitions("common"):
        users = [name for name in SCRIPTS if ("common", defined) in taken(name)]
        assert defined in at_home or len(users) >= 2, f"{defined} serves {users}"


# ---- requirements.txt ----------------------------------------------------------------------------
PACKAGE = {"PIL": "pillow", "yaml": "pyyaml"}  # where the package is called otherwise
OPTIONAL = {"trl"}  # tests/bench.py compares with it


def imported(tree):
    """The first part of each module that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_requirements_list_what_is_imported_and_nothing_else():
    modules = set()
    local = set(FILES)
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        modules |= imported(ast.parse(path.read_text(encoding="utf-8")))
        local.add(path.stem)
    others = modules - local - sys.stdlib_module_names
    packages = {PACKAGE.get(module, module).replace("_", "-") for module in others}
    listed = set()
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            listed.add(re.match(r"[\w-]+", line).group().replace("_", "-"))
    assert listed == packages - OPTIONAL


# ---- Pieces to copy ------------------------------------------------------------------------------
# What who copies a piece writes anyway; all else must stand behind "Needs:" in its docstring.
USUAL_IMPORTS = (
    "import re\nimport numpy as np\nimport torch\nimport torch.nn.functional as F\n"
    "from collections import Counter\n"
)
USUAL = {"re", "np", "torch", "F", "Counter"}


def home_of(name, near):
    """The file that defines a name: the one where it is used, else the only other one."""
    if name in definitions(near):
        return near
    (home,) = [file for file in FILES if name in definitions(file)]
    return home


def globals_of(statement):
    """The names that a statement takes from outside: neither its own, nor built in."""
    own = set(bound_names(statement))
    for node in ast.walk(statement):
        if isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.FunctionDef):
            own.add(node.name)
    return names_read(statement) - own - set(dir(builtins))


def needs(function):
    """The names behind "Needs:" in a function's docstring."""
    doc = ast.get_docstring(function) or ""
    _, _, text = doc.partition("Needs:")
    text = re.sub(r"\(.*?\)", "", " ".join(text.split())).rstrip(". ")
    return [item.strip().split()[-1] for item in text.split(",") if item.strip()]


def imports_of(file):
    """{name: import statement} of a file's top level, but for what it takes from common."""
    found = {}
    for node in TREE[file].body:
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        if is_import and "common" not in ast.unparse(node):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = ast.unparse(node)
    return found


def closure(name, file, parts):
    """Add to parts {name: source} a name of a file and all that it is made of, in order."""
    if name in parts or name in USUAL or name == "__file__":
        return
    if name in imports_of(file):
        parts[name] = imports_of(file)[name]
        return
    home = home_of(name, file)
    statement = definitions(home)[name]
    for needed in sorted(globals_of(statement)):
        closure(needed, home, parts)
    parts[name] = ast.get_source_segment(SOURCE[home], statement)


def paste(name, file):
    """The piece as someone gets it who pastes its source and what it needs into an empty file."""
    function = definitions(file)[name]
    named = needs(function)
    parts = {}
    for needed in named:
        if needed not in USUAL:
            closure(needed, file, parts)
    unnamed = globals_of(function) - USUAL - set(named)
    assert unnamed == set(), f"{name} also needs {unnamed}"
    source = "\n\n".join([*parts.values(), ast.get_source_segment(SOURCE[file], function)])
    namespace = {"__file__": str(ROOT / f"{file}.py")}
    exec(USUAL_IMPORTS + source, namespace)
    return namespace[name]


VOCABULARY = {"dog": "dog", "cat": "cat", "bus": "bus"}
STATUS = {"dog": "present", "cat": "absent"}
KNOWN = {"dog": "present", "cat": "unsure"}
MEETINGS = Counter({frozenset(("dog", "cat")): 9})
QUESTION = {"prompt": "?", "response_a": "A dog.", "response_b": "A dog and a cat.", "label": "A"}
JUDGED = [
    {"id": "1", "order": "ab", "label": "A", "verdict": "A", "probability_a": 0.9},
    {"id": "1", "order": "ba", "label": "B", "verdict": "A", "probability_a": 0.6},
]
FOUND = [{"object": "dog", "confidence": 0.9}]
LABELS = torch.tensor([[-100, 2, 3, 1], [-100, -100, 0, 4]])
LOGITS = torch.linspace(-2, 2, 40).view(2, 4, 5)
R = torch.tensor([0.0, 1.5, -2.0])
IS_A = torch.tensor([True, False, True])
CRITIQUE = "A: dog: yes\nB: dog: yes\nB: cat: no\nVerdict: A"
CANDIDATES = [("A dog.", ["dog"]), ("A dog and a cat.", ["dog", "cat"])]

SIZES = {"validation": 1, "heldout": 0, "train": 0, "pool": 1}
FALSE = CRITIQUE.replace("A: dog: yes", "A: dog: no\nB: dog: no")
REST = (True, QUESTION, STATUS, VOCABULARY, "critique")

PIECES = [
    (ONE, "verify", (["dog", "cat", "bus"], FOUND, 0.5, 0.05, ["dog", "cat"])),
    (ONE, "pair_candidates", (CANDIDATES, STATUS)),
    (ONE, "check_given_pair", (["dog"], ["cat"], KNOWN)),
    (ONE, "gather_evidence", (["dog"], ["dog", "cat"], FOUND, STATUS)),
    (ONE, "propose_swaps", (["dog"], MEETINGS, ["dog", "cat", "bus"], random.Random(0))),
    (THREE, "nll_sum", (LOGITS, LABELS)),
    (THREE, "ift_loss", (6.0, 3, 10.0, 4, 0.5)),
    (THREE, "bradley_terry_loss", (R, IS_A)),
    (THREE, "accuracy_by_order", (JUDGED,)),
    (FOUR, "confidence_in_label", (R, IS_A)),
    (FOUR, "margin", ([0.9, 0.2, 0.97], [True, False, False])),
    (FOUR, "select_by_margin", ({"a": 0.1, "b": 0.8, "c": 0.3}, None, 0.7)),
    (FIVE, "macro_bootstrap", ([0.0, 1.0, 1.0, 0.0], list("xxyz"), list("aabb"), 50)),
    (FIVE, "verdict_probabilities", (JUDGED,)),
    (FIVE, "win_rates", (np.array([[0, 0.7], [0.3, 0]]), 2)),
    (FIVE, "expected_calibration_error", ([0.9, 0.7, 0.2], [True, False, False])),
    (ONE, "assign_splits", ([{"image": "a"}, {"image": "b"}], SIZES, 0)),
    (TWO, "reason_to_drop", (CRITIQUE, *REST)),
    (TWO, "reason_to_drop", (FALSE, *REST)),
    (FIVE, "cluster_bootstrap", ([0.0, 1.0, 1.0], ["x", "x", "y"], 50)),
    (FIVE, "games", ({"id": "0", "image": "a", "prompt": "?"}, ["x", "y"])),
    (FIVE, "preference_matrix", (2, [0.9, 0.2])),
]


@pytest.mark.parametrize("file, name, arguments", PIECES)
def test_a_pasted_piece_does_the_same(file, name, arguments):
    original = getattr(importlib.import_module(file), name)
    result = paste(name, file)(*copy.deepcopy(arguments))
    assert repr(result) == repr(original(*copy.deepcopy(arguments)))


# ---- Headers and flags ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_header_shows_a_row_of_what_is_written_and_how_to_start(name):
    doc = ast.get_docstring(TREE[name])
    assert doc.startswith(name[:2])
    assert doc.count(f"python {name}.py") >= 2
    assert "\nReads " in doc
    text = " ".join(doc.split("\nWrites ")[1].split())
    row, _ = json.JSONDecoder().raw_decode(text[text.index('{"') :])
    assert len(row) >= 6


def flags(tree):
    """The flags that a tree adds, as they are called in args."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("add", "parser.add_argument"):
            flag = ast.literal_eval(node.args[0])
            if flag.startswith("--"):
                found.add(flag[2:].replace("-", "_"))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    added, text = flags(TREE[name]) | flags(TREE["common"]), SOURCE[name] + SOURCE["common"]
    if name == FOUR:  # takes 03's training flags, and the function that reads them
        added |= flags(definitions(THREE)["add_training_arguments"])
        text += SOURCE[THREE]
    assert len(added) >= 9
    for flag in added:  # as an attribute, or by a name in a tuple
        assert re.search(rf'args\.{flag}\b|"{flag}"', text), flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_short_and_names_each_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).parse_args(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--run" in text
    assert "None" not in text
    assert len(text.splitlines()) <= 75
    assert len(flags(TREE[name])) <= 22


# ---- What must not stand in a file ---------------------------------------------------------------
TEXTS = {".py", ".md", ".txt", ".toml", ".json", ".jsonl", ".jinja", ""}
MACHINE = "|".join(["/" + folder + "/" for folder in ("root", "work", "home", "mnt", "Users")])


def test_no_file_names_a_folder_of_one_machine():
    paths = list(ROOT.glob("*"))
    for folder in ("tests", "assets", ".ci"):
        paths += (ROOT / folder).rglob("*")
    for path in paths:
        if path.is_file() and path.suffix in TEXTS and path.name != ".git":
            text = path.read_text(encoding="utf-8", errors="ignore")
            for number, line in enumerate(text.splitlines(), 1):
                found = re.search(rf"(?<![\w.])(?:{MACHINE})", line)
                assert found is None, f"{path.name} line {number}: {line.strip()}"
