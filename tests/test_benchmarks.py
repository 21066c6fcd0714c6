"""Published benchmarks in stage 05: readers, scoring by hand-computed values, and whole runs on files in their formats."""
import json
import random
from collections import Counter

import common
import numpy as np
import pytest
from common import both_orders, read_jsonl
from conftest import stage

two, four, five = stage("02_generate_critiques"), stage("04_rejection_sampling"), stage("05_evaluate")


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def embedded(pictures, i):
    return {"bytes": (pictures / f"{i}.png").read_bytes(), "path": None}


def vl_rewardbench(path, pictures, n=6):
    """A parquet file in VL-RewardBench's columns. Even rows: the first response is the better and the shorter one; odd rows:
    the second is the better and the longer one."""
    ids = ("RLAIF-V-{}", "hallucination_pair-{}", "mathverse_{}", "wildvision-battle-{}", "LRVInstruction-{}", "RLHF-V-{}")
    return parquet(path, [{"id": ids[i % 6].format(i), "query": f"<image>\nList the objects in image {i}.", "response": [
        "red circle.", "blue star, red ring."], "image": embedded(pictures, i % 4), "human_ranking": [i % 2, 1 - i % 2],
        "models": ["", ""], "judge": "", "rationale": "", "query_source": "", "ground_truth": ""} for i in range(n)])


@pytest.fixture
def judge(trained, monkeypatch):
    """Stage 05's judge is the trained one, whatever is to be loaded; the names asked for are listed."""
    asked = []
    monkeypatch.setattr(common, "load_judge", lambda *args, **kwargs: (asked.append(args[:2]), trained[:2])[1])
    monkeypatch.setattr(five.ift, "announce", lambda *args, **kwargs: None)
    return asked


def evaluate(tmp_path, *given):
    """Run 05 without any earlier stage -> (report, folder)."""
    args = five.parse_args(["--run", str(tmp_path / "run"), "--model", "hub/judge", "--max-new-tokens", "24", *map(str, given)])
    five.main(args)
    folder, = (tmp_path / "run").glob("05_evaluation*/meta.json")
    return (folder.parent / "report.md").read_text(), folder.parent


def cells(report, start):
    """The cells of the first line of a table that starts so."""
    line = next(line for line in report.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---------------------------------------------------------------------------------------------------------------------
# VL-RewardBench's protocol
# ---------------------------------------------------------------------------------------------------------------------
def calls(said):
    """Judgement rows of {pair: word of a (agrees with the label), r (rejects it), - (no verdict) per call}."""
    verdict = {"aA": "A", "aB": "B", "rA": "B", "rB": "A", "-A": None, "-B": None}
    return [{"id": key, "label": "AB"[k % 2], "verdict": verdict[letter + "AB"[k % 2]]}
            for key, letters in said.items() for k, letter in enumerate(letters)]


SAID = {"g1": "araar", "g2": "rara-", "h1": "---aa", "h2": "arrrr", "h3": "a-a-a", "r1": "ar-aa"}
NAMES = {"g": "general", "h": "hallucination", "r": "reasoning"}
PAIRS = {key: {"image": f"{key}.png", "category": NAMES[key[0]]} for key in SAID}


@pytest.mark.parametrize("k, accuracy, groups, macro, tally", [
    (1, 4 / 5, (1 / 2, 1, 1), 5 / 6, (4, 1, 1, 0)),  # g1 h2 h3 r1 agree, g2 rejects, h1 is unmatched
    (2, None, (None, None, None), None, (0, 0, 1, 5)),  # 1 of 2 is no majority
    (3, 1 / 2, (1 / 2, 1 / 2, None), None, (2, 2, 1, 1)),  # r1 "ar-": other, so no reasoning pair is left and no macro
    (5, 3 / 4, (1, 1 / 2, 1), 5 / 6, (3, 1, 1, 1)),  # g2 "rara-": 2 of 5 are no majority
    (9, 3 / 4, (1, 1 / 2, 1), 5 / 6, (3, 1, 1, 1))])  # there are only five calls
def test_official_scores_by_hand(k, accuracy, groups, macro, tally):
    scores = five.official_scores(calls(SAID), PAIRS, k)
    assert tuple(scores[name] for name in ("agree", "reject", "unmatched", "other")) == tally
    assert scores["accuracy"] == (None if accuracy is None else pytest.approx(accuracy))
    assert tuple(scores["by_category"].get(NAMES[letter]) for letter in "ghr") == groups
    assert scores["macro"] == (macro if macro is None else pytest.approx(macro))


def test_official_intervals_and_unparseable():
    scores = five.official_scores(calls(SAID), PAIRS, 3)
    assert scores["unparseable"] == pytest.approx(5 / 18)  # h1: 3, h3: 1, r1: 1
    right, images = [1, 0, 0, 1], ["g1.png", "g2.png", "h2.png", "h3.png"]
    assert scores["interval"] == five.cluster_bootstrap(right, images) and scores["macro_interval"] is None


def test_official_calls_have_random_orders():
    pairs = [{"id": f"p{i}", "image": "0.png", "prompt": "?", "chosen": "good", "rejected": "bad"} for i in range(200)]
    asked = [list(five.official_questions(pair, 0)) for pair in pairs]
    for pair, questions in zip(pairs, asked):
        assert len({q["id"] for q in questions}) == 10 and {q["pair_id"] for q in questions} == {pair["id"]}
        for q in questions:
            assert q[f"response_{q['label'].lower()}"] == "good" and q["order"] == ("ab" if q["label"] == "A" else "ba")
    swapped = Counter(sum(q["order"] == "ba" for q in questions) for questions in asked)
    mean = sum(n * count for n, count in swapped.items()) / 2000
    assert abs(mean - 0.5) < 3.5 * 0.5 / 2000 ** 0.5 and len(swapped) > 5  # per call, not per pair
    assert [list(five.official_questions(pair, 0)) for pair in pairs] == asked
    assert [list(five.official_questions(pair, 1)) for pair in pairs] != asked


def test_macro_interval_against_a_slow_bootstrap():
    rng = random.Random(0)
    images = [f"{i // 2}.png" for i in range(90)]  # two rows an image
    groups = ["a" if i < 60 else "b" if i < 84 else "c" for i in range(90)]
    values = [float(rng.random() < {"a": 0.9, "b": 0.5, "c": 0.3}[group]) for group in groups]
    by_image, means = {}, []
    for row in zip(images, groups, values):
        by_image.setdefault(row[0], []).append(row)
    for _ in range(4000):
        drawn, seen = [row for rows in rng.choices(list(by_image.values()), k=len(by_image)) for row in rows], {}
        for _, group, value in drawn:
            seen.setdefault(group, []).append(value)
        means.append(np.mean([np.mean(of_group) for of_group in seen.values()]))
    macro = five.cluster_bootstrap(values, images, groups=groups)
    assert macro == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.015)
    assert abs(macro[1] - five.cluster_bootstrap(values, images)[1]) > 0.03
    assert five.cluster_bootstrap(values, images, groups=["x"] * 90) == five.cluster_bootstrap(values, images)


def test_pooled_and_macro():
    pairs = {str(i): {"image": f"{i // 2}.png", "category": "a" if i < 6 else "b"} for i in range(8)}
    scores = five.by_category({str(i): float(i in (0, 1, 2, 7)) for i in range(8)}, pairs)
    assert scores["accuracy"] == 4 / 8 and scores["by_category"] == {"a": 3 / 6, "b": 1 / 2} and scores["macro"] == 1 / 2
    scores = five.by_category({"0": 1.0, "1": 1.0, "2": 0.5, "6": 0.0}, pairs)
    assert (scores["accuracy"], scores["macro"]) == (2.5 / 4, (2.5 / 3 + 0) / 2)


def test_check_rates_by_hand():
    vocabulary = {name: name for name in ("red circle", "red ring", "blue star")}
    pairs = {"1": {"evidence": [{"object": "red circle", "status": "present"}, {"object": "red ring", "status": "absent"},
                                {"object": "blue star", "status": "unsure"}]}, "2": {}}
    rows = [{"id": "1", "critique": "A: red circle: yes\nA: blue star: no\nB: red ring: yes"},
            {"id": "1", "critique": "A: red ring: no\nB: red circle: no\nB: red circle: yes"}, {"id": "2", "critique": "A: red ring: yes"}]
    assert five.check_rates(rows, pairs, vocabulary) == pytest.approx({
        "present_said_yes": 2 / 3, "absent_said_no": 1 / 2, "balanced": 7 / 12, "n_checks": 5})
    assert five.check_rates(rows[2:], pairs, vocabulary) == {}


# ---------------------------------------------------------------------------------------------------------------------
# POPE
# ---------------------------------------------------------------------------------------------------------------------
def test_pope_scores_by_hand():
    pairs = {f"random/{i}": {"category": "random", "answer": answer} for i, answer in enumerate(("yes", "yes", "no", "no"))}
    pairs["popular/0"] = {"category": "popular", "answer": "no"}
    verdicts = {"random/0": "AB", "random/1": "A-", "random/2": "AA", "random/3": "AB", "popular/0": "--"}
    rows = [{"id": key, "order": order, "label": label, "verdict": verdict if verdict != "-" else None}
            for key, two_verdicts in verdicts.items() for order, label, verdict in zip(("ab", "ba"), "AB", two_verdicts)]
    scores = five.pope_scores(rows, pairs)
    assert list(scores) == ["popular", "random", "all"]
    # random/0: yes yes (true: yes), random/1: yes, none = no (yes), random/2: no yes (no), random/3: no no (no)
    assert scores["random"] == {"accuracy": 6 / 8, "precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "yes_ratio": 4 / 8}
    # no verdict on a question whose answer is no: said yes, twice
    assert scores["popular"] == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 1}
    assert scores["all"] == pytest.approx({"accuracy": 6 / 10, "precision": 3 / 6, "recall": 3 / 4, "f1": 6 / 10, "yes_ratio": 6 / 10})


def test_pope_scores_without_a_yes():
    pairs = {str(i): {"category": "random", "answer": answer} for i, answer in enumerate(("yes", "no"))}
    rows = [{"id": "0", "label": "A", "verdict": "B"}, {"id": "1", "label": "A", "verdict": "A"}]  # says no to both
    assert five.pope_scores(rows, pairs)["all"] == {"accuracy": 1 / 2, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert five.pope_scores(rows[1:], pairs)["all"] == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def pope_file(folder, split, rows):
    path = folder / f"coco_pope_{split}.json"  # JSON lines, whatever the name says
    path.write_text("".join(json.dumps({"question_id": i, "image": image, "text": text, "label": label}) + "\n"
                            for i, (image, text, label) in enumerate(rows, 1)))
    return path


def test_pope_pairs(tmp_path, pictures):
    data = tmp_path / "pope"
    data.mkdir()
    pope_file(data, "random", [("0.png", "Is there a dog in the image?", "no"), ("1.png", "Is there an apple in the imange?", "yes")])
    pope_file(data, "popular", [("2.png", "Is there a dining table in the image?", "yes"), ("9.png", "Is there a cat in the image?", "no")])
    (data / "coco_ground_truth_objects.json").write_text('{"image": "0.png", "objects": ["dog"]}\n')  # lies beside them
    args = five.parse_args(["--benchmark", "pope", "--pairs", str(data), "--image-root", str(pictures)])
    pairs, counts = five.read_benchmark(tmp_path, args)
    assert {pair["id"]: (pair["category"], pair["image"], pair["chosen"], pair["rejected"]) for pair in pairs} == {
        "random/1": ("random", "0.png", "No, there is no dog in the image.", "Yes, there is a dog in the image."),
        "random/2": ("random", "1.png", "Yes, there is an apple in the image.", "No, there is no apple in the image."),
        "popular/1": ("popular", "2.png", "Yes, there is a dining table in the image.", "No, there is no dining table in the image.")}
    assert counts["rows read"] == 5 and sum(n for reason, n in counts.items() if reason.startswith("skipped")) == 2
    bad = pope_file(tmp_path, "bad", [("0.png", "Is there a dog in the image?", "maybe")])
    args = five.parse_args(["--benchmark", "pope", "--pairs", str(bad), "--image-root", str(pictures)])
    with pytest.raises(SystemExit, match="bad/1.*'maybe'"):
        five.read_benchmark(tmp_path, args)


def test_pope_run_on_the_hubs_columns(tmp_path, pictures, judge):
    source = parquet(tmp_path / "test.parquet", [{"id": str(i), "question_id": str(1 + i // 2), "category": ("popular", "random")[i % 2],
        "question": "Is there a red circle in the image?", "answer": ("yes", "no")[i // 2 % 2], "image_source": f"COCO_{i % 4}",
        "image": embedded(pictures, i % 4)} for i in range(8)])
    report, folder = evaluate(tmp_path, "--benchmark", "pope", "--pairs", source, "--withhold")
    assert folder.name == "05_evaluation_pope"
    rows = read_jsonl(folder / "judgements.jsonl")
    assert len(rows) == 16 and len({row["image"] for row in rows}) == 4  # questions of one picture are one cluster
    scores = json.loads((folder / "metrics.json").read_text())["table"]["base"]
    assert set(scores["pope"]) == {"all", "popular", "random"} and scores["pope"]["all"]["accuracy"] == scores["accuracy"]
    assert cells(report, "base | all")[2:] == [f"{x:.3f}" for x in scores["pope"]["all"].values()]
    assert "no verdict is the wrong answer" in report


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------
def test_vl_rewardbench_run(tmp_path, pictures, judge):
    source = vl_rewardbench(tmp_path / "test.parquet", pictures)
    report, folder = evaluate(tmp_path, "--benchmark", "vl-rewardbench", "--pairs", source, "--votes", "3")
    assert folder.name == "05_evaluation_vl-rewardbench" and judge == [("hub/judge", None)]
    rows = read_jsonl(folder / "judgements.jsonl")
    assert Counter(row["condition"] for row in rows) == {"base": 12, "base, blank image": 12, "base, other image": 12}
    assert Counter(row["category"] for row in rows) == {"hallucination": 18, "reasoning": 6, "general": 12}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["counts"]["rows read"] == meta["counts"]["pairs"] == 6
    assert "Warning: 6 rows" in report and "'general': 183" in report
    assert cells(report, "Qwen2-VL-7B (published, arXiv 2411.17451)")[1] == "0.283"
    assert cells(report, "GPT-4o")[1] == "0.658" and cells(report, "VL-GenRM (published, arXiv 2506.13888)")[1] == "0.723"
    assert cells(report, "shorter response")[1:4] == ["0.500", "0.000-1.000", "0.500"]
    table = json.loads((folder / "metrics.json").read_text())["table"]["base"]
    assert table["accuracy"] == np.mean([row["verdict"] == row["label"] for row in rows if row["condition"] == "base"])
    assert table["macro"] == np.mean(list(table["by_category"].values())) and len(table["by_category"]) == 3
    assert table["macro_interval"][0] <= table["macro"] <= table["macro_interval"][1]


def test_the_published_group_sizes_need_no_warning(tmp_path, pictures, judge, monkeypatch):
    source = vl_rewardbench(tmp_path / "test.parquet", pictures)
    monkeypatch.setattr(five, "GROUPS", {"general": 2, "hallucination": 3, "reasoning": 1})
    report, _ = evaluate(tmp_path, "--benchmark", "vl-rewardbench", "--pairs", source, "--withhold")
    assert "Warning" not in report


def test_official_run(tmp_path, pictures, judge, monkeypatch):
    source, asked, sample = vl_rewardbench(tmp_path / "test.parquet", pictures), [], common.sample
    monkeypatch.setattr(common, "sample", lambda *args: (asked.append(args[3:5]), sample(*args))[1])
    report, folder = evaluate(tmp_path, "--benchmark", "vl-rewardbench", "--pairs", source, "--protocol", "official", "--withhold")
    rows = read_jsonl(folder / "judgements.jsonl")
    assert folder.name == "05_evaluation_vl-rewardbench_official" and len(rows) == 60 and asked == [(1, 0.2)]
    table = json.loads((folder / "metrics.json").read_text())["table"]
    said = {}
    for row in rows:  # by another way: +1 agrees, -1 rejects, 0 without verdict
        said.setdefault(row["id"], []).append(0 if row["verdict"] is None else 1 if row["verdict"] == row["label"] else -1)
    for k in (1, 3, 5, 7, 9):
        agree, reject = (sum(votes[:k].count(sign) > k / 2 for votes in said.values()) for sign in (1, -1))
        name, = (name for name in table if name.startswith(f"base, K = {k},"))
        assert (table[name]["agree"], table[name]["reject"]) == (agree, reject)
        assert table[name]["accuracy"] == (agree / (agree + reject) if agree + reject else None)
        assert name.endswith(f" {6 - agree - reject} undecided")
    assert any(m["agree"] + m["reject"] for m in table.values()) and "top_p" in report and "Our prompt" in report
    assert cells(report, "GPT-4o")[1] == "0.658" and cells(report, "shorter response, 0 undecided")[1] == "0.500"


def test_a_judge_from_disk_and_its_picture_root(tiny, tmp_path, pictures):
    rows = [{"ID": f"nocaps_{i}", "Text": "Describe.", "Image": f"images/{i}.png", "Output1": "A red circle.", "Output2": "A star.",
             "Better": f"Output{1 + i % 2}", "Category": ("knowledge", "safety")[i % 2]} for i in range(4)]
    (tmp_path / "all_data.json").write_text(json.dumps(rows))
    (tmp_path / "images").symlink_to(pictures)
    report, folder = evaluate(tmp_path, "--benchmark", "multimodal-rewardbench", "--pairs", tmp_path / "all_data.json", "--model",
                              tiny[0].name_or_path, "--device", "cpu", "--withhold", "blank")
    assert len(read_jsonl(folder / "judgements.jsonl")) == 16 and "coin flip" in report
    assert cells(report, "judge | knowledge") == ["judge", "knowledge", "safety", "macro", "95 % interval"]


def llava_wild(folder, pictures):
    folder.mkdir()
    (folder / "images").symlink_to(pictures)
    questions = [{"question_id": i, "image": f"{i % 4}.png", "text": f"What is in picture {i}?", "category": ("conv", "detail")[i % 2]}
                 for i in (3, 0, 2, 1, 4)]
    for name, rows in (("questions", questions), ("answers_gpt4", [{"question_id": 3, "text": "A reference."}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions


def test_llava_wild_answers_files(tmp_path, pictures, judge):
    questions = llava_wild(tmp_path / "wild", pictures)
    report, folder = evaluate(tmp_path, "--benchmark", "llava-wild", "--pairs", tmp_path / "wild", "--best-of", "4")
    assert folder.name == "05_evaluation_llava-wild" and "no score here" in report
    sampled = {row["id"]: row for row in read_jsonl(folder / "best_of_n.jsonl")}
    files = {name: read_jsonl(folder / f"answers_{name}.jsonl") for name in ("first", "random", "judge")}
    for name, answers in files.items():
        assert len({answer["answer_id"] for answer in answers}) == len(questions)
        for question, answer in zip(questions, answers, strict=True):  # the official review pairs them line by line
            assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
            assert (answer["question_id"], answer["prompt"]) == (question["question_id"], question["text"])
            row = sampled[f"{question['category']}/{question['question_id']}"]
            assert len(row["candidates"]) == 4 and answer["text"] in row["candidates"]
            assert name != "first" or answer["text"] == row["candidates"][0]
            assert name != "judge" or answer["text"] == row["base"][-1]
    assert len({tuple(a["text"] for a in answers) for answers in files.values()}) > 1
    assert len({answers[0]["model_id"] for answers in files.values()}) == 3


def test_llava_wild_with_one_sample_needs_no_judge(tmp_path, pictures, judge):
    llava_wild(tmp_path / "wild", pictures)
    _, folder = evaluate(tmp_path, "--benchmark", "llava-wild", "--pairs", tmp_path / "wild")
    assert [path.name for path in folder.glob("answers*")] == ["answers_first.jsonl"] and len(judge) == 1  # the policy
    (tmp_path / "wild" / "questions.jsonl").open("a").write('{"question_id": 9, "image": "9.png", "text": "?", "category": "conv"}\n')
    with pytest.raises(SystemExit, match="missing image.*needs all answers"):
        evaluate(tmp_path, "--benchmark", "llava-wild", "--pairs", tmp_path / "wild", "--overwrite")


def test_picks_are_random_and_reproducible(tmp_path, monkeypatch):
    texts = {f"conv/{i}": [f"{i}-{k}" for k in range(8)] for i in range(60)}
    rows = [{"id": key, "question_id": i, "image": "0.png", "prompt": "?", "category": "conv", "answer": None}
            for i, key in enumerate(texts)]
    monkeypatch.setattr(five, "read_questions", lambda *_: (rows, Counter({"rows read": 60})))
    monkeypatch.setattr(four, "sample_and_pick", lambda *_: (texts, {"base": {key: [t[0], t[1], t[3], t[5]] for key, t in texts.items()}}))
    args = five.parse_args(["--benchmark", "llava-wild", "--best-of", "8", "--model", "m"])
    five.answer_in_the_wild("base", None, tmp_path, args)
    picked = {name: [row["text"].split("-")[1] for row in read_jsonl(tmp_path / f"answers_{name}.jsonl")] for name in (
        "first", "random", "judge")}
    assert set(picked["first"]) == {"0"} and set(picked["judge"]) == {"5"} and set(picked["random"]) == set("01234567")
    five.answer_in_the_wild("base", None, tmp_path, args)
    assert [row["text"].split("-")[1] for row in read_jsonl(tmp_path / "answers_random.jsonl")] == picked["random"]


def test_our_own_pairs_keep_their_fields(tmp_path, pictures, judge):
    """Categories, hallucinations and evidence of preferences.jsonl reach the report."""
    rows = [{"id": f"p{i}", "image": f"{i}.png", "prompt": "List the objects in the image.", "chosen": "red circle.",
             "rejected": "red ring.", "category": ("shape", "other")[i % 2], "hallucinated": ["red ring"] * (i < 3), "evidence": [
                 {"object": "red circle", "claimed_by": "chosen", "status": "present", "confidence": 1.0, "box": None},
                 {"object": "red ring", "claimed_by": "rejected", "status": "absent", "confidence": 0.0, "box": None}]} for i in range(4)]
    common.write_json(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "run" / "01_preferences").mkdir(parents=True)
    common.write_json(tmp_path / "run" / "01_preferences" / "vocabulary.json", {"red circle": "red circle", "red ring": "red ring"})
    report, folder = evaluate(tmp_path, "--pairs", tmp_path / "pairs.jsonl", "--image-root", pictures, "--withhold")
    assert folder.name == "05_evaluation" and "(3 with a hallucinated object)" in report
    table = json.loads((folder / "metrics.json").read_text())["table"]["base"]
    assert set(table["by_category"]) == {"shape", "other"} and table["n_hallucination"] == 3
    args = five.parse_args(["--pairs", str(tmp_path / "pairs.jsonl"), "--image-root", str(pictures)])
    assert [pair["evidence"] for pair in five.read_benchmark(folder, args)[0]] == [row["evidence"] for row in rows]
    (tmp_path / "truth.jsonl").write_text('{"image": "elsewhere.png", "objects": [{"object": "red circle"}]}\n')
    with pytest.raises(SystemExit, match="holds no image of --pairs"):
        evaluate(tmp_path, "--pairs", tmp_path / "pairs.jsonl", "--image-root", pictures, "--withhold", "--overwrite", "--best-of", "2",
                 "--truth", tmp_path / "truth.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given, words", [
    (["--protocol", "official", "--pairs", "x"], "vl-rewardbench"),
    (["--benchmark", "vl-rewardbench", "--protocol", "official", "--votes", "3"], "no --votes"),
    (["--benchmark", "llava-wild", "--best-of", "6"], "power of 2"), (["--benchmark", "mmlu"], "pope")])
def test_arguments(given, words, capsys):
    with pytest.raises(SystemExit):
        five.parse_args(given)
    assert words in capsys.readouterr().err


def test_defaults_and_a_missing_model(tmp_path):
    assert five.parse_args(["--benchmark", "pope"]).pairs == "lmms-lab/POPE"
    assert five.parse_args(["--benchmark", "llava-wild"]).best_of == 1
    with pytest.raises(SystemExit, match="--model is needed"):
        five.main(five.parse_args(["--run", str(tmp_path), "--benchmark", "vl-rewardbench"]))


def test_blank_pictures_are_shared(tmp_path, pictures):
    questions = [q for i in range(4) for q in both_orders({"id": str(i), "image": f"{i}.png", "prompt": "?", "chosen": "a", "rejected": "b"})]
    blank = five.withheld(questions, "blank", pictures, 0)
    assert [q["picture"].size for q in blank[::2]] == [(84, 84), (140, 56), (56, 112), (84, 84)]
    assert len({id(q["picture"]) for q in blank}) == 3 and blank[0]["picture"].getpixel((5, 5)) == (128, 128, 128)
