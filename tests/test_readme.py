"""What the README says is so: commands parse, paths, flags and lines exist, code stands in the
files, numbers of the claims are those of assets/results.jsonl."""

import copy
import importlib.util
import re
import shlex
from statistics import mean

import pytest
import study
import study_report
from conftest import ROOT, STAGES, stage
from study_report import FULL, START, number

from common import load_image, read_json, write_jsonl

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)  # [(language, code)]
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
EXPERTS = ("YOLO", "the policy's yes or no")
FILES = ("common", *STAGES)
RESULTS, FINAL = [study_report.read(ROOT / "assets/results.jsonl", x) for x in (False, True)]
NOW, FAILED = [study_report.where_03_took(RESULTS, has_taken) for has_taken in (True, False)]
NEW = [line for line in RESULTS if "code" in line]
OLD = [x for x in RESULTS if x not in NEW or x["study"] == "training"]  # with earlier pairs
DEMO = read_json(ROOT / "assets" / "demo.json")
LAST = "margin, iteration 2"


def commands():
    """Every command of the README, in blocks and in the text."""
    lines = re.findall(r"`([^`]+)`", PROSE)
    for language, code in BLOCKS:
        if not language:
            lines += code.replace("\\\n", " ").splitlines()  # a command may go on in a second line
    parts = [part for line in lines for part in line.split(" && ")]
    return [shlex.split(x, comments=True) for x in parts if re.match("(python|torchrun) ", x)]


def flags_of(file):
    return set(re.findall(r'"(--[a-z][\w-]*)"', (ROOT / file).read_text(encoding="utf-8")))


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command):
    if command[0] == "torchrun":  # torchrun FLAGS -- script flags
        command = command[command.index("--") :]
    script, *argv = command[1:]
    assert (ROOT / script).exists() and len(commands()) > 15
    name = script.removesuffix(".py").removeprefix("tests/")
    if name in STAGES:
        stage(name).parse_args(argv)
        return
    module = importlib.import_module(name)
    if hasattr(module, "parse_args"):
        module.parse_args(argv)
    assert {word for word in argv if word.startswith("--")} <= flags_of(script)


def test_flags_exist():
    known = {"--nproc-per-node", "--help", "--generation-config"}.union(
        *(flags_of(f"{name}.py") for name in FILES)
    )
    known = known.union(*(flags_of(path) for path in (ROOT / "tests").glob("*.py")))
    for flag in re.findall(r"`[^`]*?(--[a-z][\w-]*)[^`]*`", PROSE):
        assert flag.replace("--no-", "--") in known, flag


def test_code_and_links_are_of_the_files():
    files = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FILES]
    excerpts = [code for language, code in BLOCKS if language == "python" and code[0] == " "]
    assert len(excerpts) == 5
    for code in excerpts:
        assert len(code.splitlines()) <= 10 and any(code in text for text in files), code
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
    first, last = map(int, re.search(r"lines (\d+)-(\d+) of \[`common.py`", TEXT).groups())
    lines = (ROOT / "common.py").read_text(encoding="utf-8").splitlines()
    heads = [number for number, line in enumerate(lines, 1) if line.startswith("# ----")]
    assert first == heads[0] and heads[1] - 3 <= last < heads[1]


def test_it_is_read_in_twenty_minutes():
    """Few words, beside code and tables; the pictures are small, and all are shown."""
    lines = [line for line in PROSE.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 2500
    shown = set(re.findall(r"!\[[^]]*\]\((assets/[^)]+)\)", TEXT))
    assert shown == {f"assets/{path.name}" for path in (ROOT / "assets").glob("*.png")}
    for path in shown:
        assert (ROOT / path).stat().st_size < 150_000, path


def test_claims_and_ratios_are_the_results():
    claims = TEXT[TEXT.index("| claim | paper") :].split("\n\n")[0].splitlines()
    assert claims == study_report.claims(RESULTS, FINAL)
    assert len(claims) - 2 == sum(bool(claim) for claim, *_ in study_report.comparisons()) <= 16
    for row in claims[2:]:
        assert row.split("|")[-2].strip(" `") in study.STUDIES
    bench = (ROOT / "assets" / "bench.txt").read_text()
    printed = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", bench, re.MULTILINE)
    table = TEXT[TEXT.index("| what | against | toy") :].split("\n\n")[0]
    told = re.findall(r"\d+\.\d\d \d+\.\d\d \d+\.\d\d", table)
    assert sorted(told) == sorted(" ".join(row) for row in printed)


def test_the_demos_table_is_the_demos():
    names = ("base", "after 03", LAST, "random, iteration 2", f"{LAST}, blank image")
    rows = [row for row in TEXT.splitlines() if re.match(r"\| (base|after|control)", row)]
    for name, row in zip(names, rows, strict=True):
        of_judge = DEMO["table"][name]
        accuracy, low, high = map(number, (of_judge["accuracy"], *of_judge["interval"]))
        assert row.endswith(f"| {accuracy} | {low}-{high} |"), row
    for name in ("after 03", "random, iteration 2"):
        middle, low, high = (number(x, "+") for x in DEMO["differences"][f"{LAST} - {name}"])
        assert f"{middle} ({low} to {high})" in TEXT


# ---- The text's numbers: sentences, and what stands in their braces ------------------------------
SENTENCES = """
demo {passing} of {written} pass; in {wrong_order} the verdict does not follow
is {largest}, the pool's largest
finds a ring (confidence {sure[0]}) and a cross ({sure[1]}), both purple
ends with P(label) = {best}, the least sure, which checks a square that nobody named, with {worst}
is called better as A (P(A) = {asked[0]}) and as B ({asked[1]})
In {n} worlds 03 works: it ends at {ends[0]}, one iteration of 04 at {ends[1]}
; in {n_failed} it fails ({stayed})
gains {tenth[0]} by the largest margins, {tenth[1]} at random, {tenth[2]} by the smallest
gain {forty[0]}, {forty[1]} and {forty[2]}, all that pass {everything}
the verdict followed the checks in {deaf} of the critiques, in the others in {follows} or more
though {checks:.0f} % of the checks are right: the judge stayed at {stayed}
`--bt-weight .1` {mended}: with it 04 adds
iterations of 03 continued brought {continued}, of margins {iterated}
04 adds {adds[1]} instead of {adds[0]} and ends {higher} higher
the judge stays at {labels}
{picks[0]} at random, {picks[1]} if the judge after 03 picks from 4, {picks[2]} from 16
it denies {absent:.0f} % of what is absent, but also {missed:.0f} % of what is there
it judges {few} right, of those with more {many}
{styles[0]}, or {styles[1]} (in world 0 {styles[2]} by so many), instead of {styles[3]}
| {steps} in three worlds
{lams[0]} and {lams[1]}: the same
base {said[3]}, `--lam` 0, 1/3, 1: {said[0]}, {said[2]}, {said[1]}
gain {gains[0]} over 03 where it took, margins {gains[1]}
labels wrong {wrong[1]:.0f} instead of {wrong[0]:.0f} %
accuracy {experts[1]} for {experts[0]}
{usual} becomes {attacked}
but {lost:.0f} % are missing
"""


def two(value):
    return f"{value:.2f}".removeprefix("0")


def span(values):
    return f"{two(min(values))}-{two(max(values))}"


@pytest.fixture(scope="module")
def measured():
    """{name in SENTENCES: number or text} from assets/demo.json and assets/results.jsonl."""

    def worlds(*setting):
        return [value for value, _ in study_report.cells(OLD, *setting, "after 03").values()]

    def middle(*where):
        return two(mean(worlds(*where)))

    def count(*where):
        return study_report.mean_count(OLD, *where)

    def gain_of(name, setting, judge, kind=1):  # over 03, where it took
        places = [(name, setting, condition) for condition in (judge, "after 03")]
        return number(study_report.average(study_report.of_kinds(RESULTS, *places)[kind]), "+")

    counts, table, example = DEMO["counts of 02"], DEMO["table"], DEMO["example"]
    x = {"passing": counts["kept"] + counts["repeated"]}
    x["written"] = f"{counts['critiques written']:,}"
    x["wrong_order"] = counts["dropped: verdict does not follow from its checks"]
    x |= {name: number(example[name]) for name in ("largest", "best", "worst")}
    x["sure"], x["asked"] = map(two, example["found"]), map(number, example["probability_a"])
    x["sure"], x["asked"] = [*x["sure"]], [*x["asked"]]
    usual, attacked = table[LAST], table[f"{LAST}, attack"]
    x["usual"], x["attacked"] = number(usual["accuracy"]), number(attacked["accuracy"])
    balanced = [judge["balanced"] for judge in (usual, attacked)]
    assert balanced[0] == pytest.approx(balanced[1], abs=0.01)  # "nearly as right as before"
    x["lost"] = 100 * (1 - attacked["n_checks"] / usual["n_checks"])
    ends = [study_report.cells(RESULTS, *START, y) for y in ("after 03", "margin, iteration 1")]
    x["ends"] = [span([cells[seed][0] for seed in NOW]) for cells in ends]
    x["n"], x["n_failed"] = len(NOW), len(FAILED)
    starts = {y: run["counts"] for y, run in study_report.of_setting(RESULTS, *START).items()}
    follows = {seed: counts["after 03: verdict follows"] for seed, counts in starts.items()}
    x["deaf"] = " and ".join(two(follows[seed]) for seed in FAILED)
    x["follows"] = two(min(follows[seed] for seed in NOW))
    x["checks"] = 100 * min(counts["after 03: checks right"] for counts in starts.values())
    of_failed = {"stayed": ("verdict", "weight 0", "after 03"), "iterated": (*FULL, LAST)}
    of_failed["mended"] = ("verdict", "weight 0.1", "after 03")
    of_failed["continued"] = (*FULL, "continue, iteration 2")
    for name, place in of_failed.items():
        found = study_report.cells(NEW, *place)
        x[name] = " and ".join(two(found[seed][0]) for seed in FAILED)
    first = "margin, iteration 1"
    x["adds"] = [gain_of("verdict", f"weight {y}", first, 0) for y in ("0", "0.1")]
    ends = [("verdict", f"weight {y}", first) for y in ("0.1", "0")]
    x["higher"] = number(study_report.average(study_report.difference(RESULTS, *ends)), "+")
    x["labels"] = middle("expert", "YOLO, labels alone")
    best, picks = ("best", "N and votes"), ("4, random", "4, after 03", "16, after 03")
    x["picks"] = [two(count(*best, f"best of {n}: names nothing absent")) for n in picks]
    names = ("absent_said_no", "present_said_yes", "right, up to 8 claims", "right, more claims")
    places = [f"{LAST}, elsewhere: {name}" for name in names]
    absent, present, few, many = (count("transfer", "other pictures", y) for y in places)
    x |= {"absent": 100 * absent, "missed": 100 * (1 - present), "few": two(few), "many": two(many)}
    third, verdicts = "critique, lambda 1/3", ("none", "none, 1300 steps")
    x["styles"] = [middle("training", y) for y in ("descriptive", *verdicts, third)]
    x["steps"] = ", ".join(map(two, worlds("training", "critique, 30 steps")))
    settings = ("lambda 0", "lambda 1", third, "nothing trained")
    x["lams"] = [middle("training", y) for y in settings[:2]]
    x["said"] = [two(count("training", y, "captions hallucinate, greedy")) for y in settings]
    x["gains"] = [gain_of(*FULL, y) for y in ("continue, iteration 2", LAST)]
    x["wrong"] = [100 * count("expert", y, "expert: labels_wrong") for y in EXPERTS]
    x["experts"] = [middle("expert", y) for y in EXPERTS]
    for name, part in (("tenth", 0.1), ("forty", 0.4)):
        rules = ("margin", "random", "low")
        x[name] = [gain_of("worth", f"{y} {part}", f"{y}, iteration 1") for y in rules]
    x["everything"] = gain_of("worth", "all that pass", first)
    return x


@pytest.mark.parametrize("sentence", SENTENCES.strip().splitlines())
def test_numbers_are_what_was_measured(measured, sentence):
    assert sentence.format(**measured) in " ".join(TEXT.split())


# ---- Pairs for TRL -------------------------------------------------------------------------------
def test_pairs_become_a_preference_set(pictures, tiny, tmp_path, monkeypatch):
    """README's block on three rows of a run: its columns; where TRL is installed, what DPOTrainer's
    own data preparation makes of them."""
    roles, rows = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}, []
    for i, object_ in enumerate(("red circle", "blue star", "green heart")):
        row = {"id": f"p{i}", "image": f"{i}.png", "prompt": "List the objects in the image."}
        row |= {"chosen": f"{object_}.", "rejected": f"{object_}, red ring.", "source": "x"}
        rows.append({**row, "hallucinated": ["red ring"], "evidence": [], "split": "train"})
    (tmp_path / "runs/mine/01_preferences").mkdir(parents=True)
    write_jsonl(tmp_path / "runs/mine/01_preferences/preferences.jsonl", rows)
    (tmp_path / "PICTURES").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    scope = {}
    exec(*(code for _, code in BLOCKS if "def trl_row" in code), scope)
    pairs = scope["pairs"]
    assert set(pairs.column_names) == {"images", *roles}
    model, processor = tiny
    expected = []  # each response with its picture, of another size in each row
    for row, pair in zip(rows, pairs, strict=True):
        for name, role in roles.items():
            assert pair[name] == [{"role": role, "content": row[name]}]
        picture = load_image(pictures / row["image"])
        assert [x.tobytes() for x in pair["images"]] == [picture.tobytes()]
        grid = processor.image_processor([picture]).image_grid_thw[0].tolist()
        expected += [(row["chosen"], grid), (row["rejected"], grid)]

    if not importlib.util.find_spec("trl"):
        return
    import trl

    how = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": len(rows)}
    args = trl.DPOConfig(str(tmp_path), report_to="none", **how)
    trainer = trl.DPOTrainer(
        copy.deepcopy(model), None, args, None, pairs, processing_class=processor
    )
    (batch,) = trainer.get_train_dataloader()
    found, decode = [], processor.tokenizer.decode
    for i, ids in enumerate(batch["input_ids"]):
        is_response = batch["completion_mask"][i] == 1
        assert rows[0]["prompt"] in decode(ids[~is_response])
        text = decode(ids[is_response], skip_special_tokens=True).strip()
        found.append((text, batch["image_grid_thw"][i].tolist()))
    assert sorted(found) == sorted(expected)
