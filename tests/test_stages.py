"""What feeds the formulas: stages 02-04 with a recorded judge in place of a model.

The judge returns set texts and log-odds and keeps what it was asked; training keeps the rows that
it is given. So a test can say what a stage shows to whom, and what it trains on.
"""

import ast
import importlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import common

two = importlib.import_module("02_generate_critiques")
ift = importlib.import_module("03_train_ift")
four = importlib.import_module("04_rejection_sampling")

ROOT = Path(__file__).resolve().parents[1]
KNOWN = "Known to be true"  # how the prompt introduces the findings and the label


# ---- A run directory after stage 01 --------------------------------------------------------------
def pair(name, image, split):
    evidence = [
        {"object": "dog", "claimed_by": "both", "status": "present"},
        {"object": "cat", "claimed_by": "rejected", "status": "absent"},
    ]
    return {
        "id": name,
        "image": f"images/{image}.png",
        "prompt": f"What is in picture {name}?",
        "chosen": "A dog.",
        "rejected": "A dog and a cat.",
        "source": "sampled",
        "hallucinated": ["cat"],
        "evidence": evidence,
        "split": split,
    }


PAIRS = [pair(f"v{i}", f"v{i}", "validation") for i in range(2)]
PAIRS += [pair(f"t{i}", f"t{i}", "train") for i in range(4)]
PAIRS += [pair(f"p{i:02d}", f"p{i // 2}", "pool") for i in range(20)]  # two pairs of each image


@pytest.fixture
def run(tmp_path):
    """The run directory: stage 01 is complete, and has mixed the splits."""
    folder = tmp_path / "run" / "01_preferences"
    folder.mkdir(parents=True)
    common.write_jsonl(folder / "preferences.jsonl", PAIRS[5:] + PAIRS[:5])
    vocabulary = {"dog": "dog", "dogs": "dog", "cat": "cat", "cats": "cat"}
    common.write_json(folder / "vocabulary.json", vocabulary)
    args = {"model": "a/model", "image_root": "pictures", "max_image_tokens": 77}
    common.write_json(folder / "meta.json", {"args": args})
    return tmp_path / "run"


# ---- The recorded judge, and training that only keeps its rows -----------------------------------
def right_critique(request):
    """The true checks of the two responses, and the right verdict."""
    lines, wrong = [], None
    for side in "AB":
        response = request["text"].split(f"Response {side}: ")[1].split("\n")[0]
        lines.append(f"{side}: dog: yes")
        if "cat" in response:
            lines.append(f"{side}: cat: no")
            wrong = side
    right = "B" if wrong == "A" else "A"
    return "\n".join([*lines, f"Verdict: {right}"])


def mirrored(critique):
    """The same critique with the other verdict."""
    return critique[:-1] + ("B" if critique[-1] == "A" else "A")


def answer(text, confidence):
    """A complete answer whose judge is so sure (0..1) of the verdict that the text gives."""
    verdict = common.parse_verdict(text)
    r = None
    if verdict:
        r = math.log(confidence / (1 - confidence))
        if verdict == "B":
            r = -r
    return {"text": text, "complete": True, "verdict": verdict, "log_odds": r}


class Judge:
    """Stands in for common.sample; write(request, k) gives the k-th answer to a request."""

    def __init__(self, write):
        self.write = write
        self.calls = []

    def sample(self, model, processor, requests, n=1, **settings):
        self.calls.append({"requests": requests, "n": n, **settings})
        answers = []
        for request in requests:
            answers.append([self.write(request, k) for k in range(n)])
        return answers

    def sampled(self):
        """The calls that drew samples; the others judged, greedily."""
        return [call for call in self.calls if call.get("temperature", 1.0) > 0]

    def judged(self):
        return [call for call in self.calls if call.get("temperature", 1.0) == 0]


def always_right(request, k):
    return answer(right_critique(request), 0.9)


def tokens(text, add_special_tokens=False):
    return SimpleNamespace(input_ids=text.split())


tokens.added_tokens_decoder, tokens.all_special_tokens = {}, []


def requests_of(calls):
    """All requests of the calls, one after another."""
    requests = []
    for call in calls:
        requests += call["requests"]
    return requests


def asked(calls):
    """The ids of the pairs that the calls' requests are about."""
    return {request["id"].split("-")[0] for request in requests_of(calls)}


def texts(calls):
    return [request["text"] for request in requests_of(calls)]


@pytest.fixture
def stages(monkeypatch, run):
    """start(number, judge, *flags): run a stage by its command line -> what it trained on.

    What is returned: a list of (TrainingSteps, settings), one for each training; and in
    start.loaded the checkpoints that were asked for.
    """
    trained = []
    processor = SimpleNamespace(tokenizer=tokens)
    scripts = {2: two, 3: ift, 4: four}

    def load_judge(model_path, checkpoint=None, device=None, max_image_tokens=None, **_):
        assert (model_path, max_image_tokens) == ("a/model", 77)
        start.loaded.append(checkpoint)
        return "model", processor

    def train(model, data, folder, **settings):
        trained.append((data, settings))

    def save_checkpoint(model, processor, folder):
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "weights").write_text("")

    def start(number, judge, *flags):
        trained.clear()
        start.loaded.clear()
        monkeypatch.setattr(common, "sample", judge.sample)
        script = scripts[number]
        script.main(script.parse_args(["--run", str(run), *flags]))
        return list(trained)

    def draw_margins(path, margins, kept_ids, title):  # the real one takes a second
        path.write_text(title)

    start.loaded = []
    monkeypatch.setattr(common, "load_judge", load_judge)
    monkeypatch.setattr(common.importlib.metadata, "distributions", list)  # slow
    monkeypatch.setattr(four, "draw_margins", draw_margins)
    monkeypatch.setattr(ift, "make_trainable", lambda model, rank: model)
    monkeypatch.setattr(ift, "train", train)
    monkeypatch.setattr(ift, "save_checkpoint", save_checkpoint)
    return start


def header_row(name):
    """The row that a script's header shows."""
    doc = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    text = " ".join(doc.split("Writes")[1].split())
    return json.JSONDecoder().raw_decode(text[text.index('{"') :])[0]


# ---- 02: critiques with the findings in view -----------------------------------------------------
def test_02_shows_the_findings_and_the_label(stages, run):
    judge = Judge(always_right)
    stages(2, judge, "--critiques", "3")
    for call in judge.calls:
        assert (call["n"], call["temperature"]) == (3, 1.0)
        for request in call["requests"]:
            reference = request["text"].split(KNOWN)[1]
            label = "A" if request["id"].endswith("-ab") else "B"
            assert f"Verdict: {label}\n" in reference
            assert "dog: yes" in reference
            assert "cat: no" in reference
            assert str(request["image"]).startswith("pictures/images/t")


def test_02_writes_about_training_pairs_in_both_orders(stages, run):
    judge = Judge(always_right)
    stages(2, judge, "--critiques", "1")
    ids = [request["id"] for request in requests_of(judge.calls)]
    expected = [f"t{i}-ab" for i in range(4)] + [f"t{i}-ba" for i in range(4)]
    assert sorted(ids) == sorted(expected)
    few = Judge(always_right)
    stages(2, few, "--critiques", "1", "--limit", "2", "--overwrite")
    assert len(asked(few.calls)) == 2


def test_02_keeps_what_its_filter_passes(stages, run):
    """Of three critiques of a question one is sound, one repeats it, one has a false check."""

    def write(request, k):
        text = right_critique(request)
        if k == 2:
            text = text.replace("cat: no", "cat: yes").replace("dog: yes", "dog: no", 1)
        return answer(text, 0.9)

    stages(2, Judge(write), "--critiques", "3")
    samples = common.read_jsonl(run / "02_critiques" / "samples.jsonl")
    kept = common.read_jsonl(run / "02_critiques" / "critiques.jsonl")
    assert (len(samples), len(kept)) == (24, 8)
    for row in kept:
        assert row["id"].endswith("-0")
        chosen = row["response_a"] if row["label"] == "A" else row["response_b"]
        assert chosen == "A dog."
    assert sum(row["dropped"] is not None for row in samples) == 8
    assert set(kept[0]) == set(header_row("02_generate_critiques.py"))
    counts = json.loads((run / "02_critiques" / "meta.json").read_text())["counts"]
    assert (counts["critiques written"], counts["repeated"], counts["kept"]) == (24, 8, 8)


def test_02_stops_where_nothing_is_kept(stages, run):
    def write(request, k):
        return answer(mirrored(right_critique(request)), 0.9)

    with pytest.raises(SystemExit, match="no critique was kept.*wrong verdict"):
        stages(2, Judge(write))
    assert not (run / "02_critiques" / "meta.json").exists()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.47, 0.55, 1.0])
def test_02_resumes_to_the_same_bytes(stages, run, monkeypatch, share):
    monkeypatch.setattr(common, "CHUNK", 4)  # two questions of two critiques between two saves
    folder = run / "02_critiques"

    def write(request, k):
        return answer(right_critique(request) + " " * k, 0.9)

    whole = Judge(write)
    stages(2, whole, "--critiques", "2")
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    (folder / "meta.json").unlink()
    (folder / "critiques.jsonl").unlink()
    data = before["samples.jsonl"]
    (folder / "samples.jsonl").write_bytes(data[: int(len(data) * share)])
    again = Judge(write)
    stages(2, again, "--critiques", "2")
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == before
    # only the chunks that lack a row are asked again
    left = whole.calls[int(len(whole.calls) * share) :]
    assert [call["requests"] for call in again.calls] == [call["requests"] for call in left]


def test_finished_stages_ask_nothing(stages, run):
    stages(2, Judge(always_right), "--critiques", "1")
    judge = Judge(always_right)
    stages(2, judge, "--critiques", "1")
    assert judge.calls == []
    assert stages.loaded == []


# ---- 03: what is trained on, and how it is judged ------------------------------------------------
def two_critiques(request, k):
    """Two sound critiques that differ: the second has its checks in the other order."""
    lines = right_critique(request).split("\n")
    if k == 1:
        lines[:-1] = reversed(lines[:-1])
    return answer("\n".join(lines), 0.9)


@pytest.fixture
def critiqued(stages):
    """stages, with stage 02 complete: 16 critiques of the four training pairs."""
    stages(2, Judge(two_critiques), "--critiques", "2")
    return stages


def test_03_trains_on_the_critiques_without_the_reference(critiqued):
    ((data, _),) = critiqued(3, Judge(always_right))
    rows = data.rows_of_kind["critique"]
    assert len(rows) == 16
    for row in rows:
        assert KNOWN not in row["text"]
        assert "Verdict: A\n" not in row["text"]
        assert "Response A: A dog" in row["text"]
        assert common.INSTRUCTIONS["critique"] in row["text"]
        assert row["response"].endswith(f"Verdict: {row['label']}")
        assert row["image"].startswith("images/t")


def test_03_d_correct_is_the_chosen_response_once_per_pair(critiqued):
    ((data, _),) = critiqued(3, Judge(always_right))
    rows = data.rows_of_kind["correct"]
    assert sorted(row["id"] for row in rows) == ["t0", "t1", "t2", "t3"]
    for row in rows:
        assert row["response"] == "A dog."
        assert row["text"] == f"What is in picture {row['id']}?"
        assert row["image"] == f"images/{row['id']}.png"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_d_correct_is_the_chosen_response_in_either_order(order):
    questions = {question["order"]: question for question in common.both_orders(PAIRS[0])}
    critique = questions[order] | {"critique": "x", "style": "none"}
    _, correct = ift.training_rows([critique])
    assert [row["response"] for row in correct] == ["A dog."]


def test_03_without_lambda_has_no_correct_responses(critiqued):
    ((data, settings),) = critiqued(3, Judge(always_right), "--lam", "0")
    assert list(data.rows_of_kind) == ["critique"]
    assert settings["lam"] == 0


def test_03_hands_its_flags_to_the_training(critiqued, run):
    flags = "--steps 7 --lr 0.5 --bt-weight 0.25 --train-batch 6 --micro-batch 3 --seed 9"
    ((data, settings),) = critiqued(3, Judge(always_right), *flags.split())
    assert settings == {
        "steps": 7,
        "lr": 0.5,
        "lam": pytest.approx(1 / 3),
        "bt_weight": 0.25,
        "checkpoint_activations": False,
        "save_every": 50,
    }
    assert (data.train_batch, data.micro_batch, data.seed) == (6, 3, 9)
    assert str(data.image_root) == "pictures"


def test_03_drops_critiques_that_would_be_cut_and_counts_what_it_cuts():
    """Of three critiques of 2, 4 and 5 tokens the limit 5 leaves two, since the stop token has to
    fit in, too; of their pairs' responses of 2 and 7 tokens one is cut."""
    critiques = []
    for i, critique in enumerate(("Verdict: A", "x x Verdict: A", "x x x Verdict: A")):
        row = {"id": f"{i}-ab-0", "pair_id": str(i), "image": "x.png", "prompt": "q", "label": "A"}
        row |= {"critique": critique, "response_a": "A dog.", "response_b": "A cat."}
        critiques.append(row | {"style": "none"})
    critiques[1]["response_a"] = "A dog and nothing else, not even cats."
    processor = SimpleNamespace(tokenizer=tokens)
    args = ift.parse_args(["--max-response-tokens", "5"])
    data, counts = ift.training_steps(critiques, processor, "pictures", 0, args)
    assert [row["id"] for row in data.rows_of_kind["critique"]] == ["0-ab-0", "1-ab-0"]
    assert counts == {
        "dropped: critique of --max-response-tokens or more": 1,
        "trained on, critiques": 2,
        "trained on, correct responses": 2,
        "  cut at --max-response-tokens": 1,
    }
    with pytest.raises(SystemExit, match="longer than --max-response-tokens 2"):
        args = ift.parse_args(["--max-response-tokens", "2"])
        ift.training_steps(critiques, processor, "pictures", 0, args)


def test_03_validates_on_the_validation_pairs_greedily(critiqued, run):
    judge = Judge(always_right)
    critiqued(3, judge)
    assert asked(judge.calls) == {"v0", "v1"}
    assert judge.sampled() == []
    assert {call["n"] for call in judge.calls} == {1}
    for text in texts(judge.calls):
        assert KNOWN not in text
    rows = common.read_jsonl(run / "03_ift" / "validation.jsonl")
    assert [row["condition"] for row in rows] == ["before"] * 4 + ["after 03"] * 4
    log = common.read_jsonl(run / "03_ift" / "metrics.jsonl")
    assert [row["validation"] for row in log] == ["before", "after 03"]
    measures = json.loads((run / "03_ift" / "meta.json").read_text())["validation"]
    assert measures["before"]["accuracy"] == measures["after"]["accuracy"] == 1.0
    assert measures["after"]["bradley_terry_loss"] == pytest.approx(-math.log(0.9), rel=1e-4)


def test_03_judges_the_base_model_before_and_the_trained_one_after(critiqued, run, monkeypatch):
    """The judge is wrong until the training has run."""
    state = {"trained": False}

    def write(request, k):
        text = right_critique(request)
        return answer(text if state["trained"] else mirrored(text), 0.9)

    def train(model, data, folder, **settings):
        state["trained"] = True

    monkeypatch.setattr(ift, "train", train)
    critiqued(3, Judge(write))
    measures = json.loads((run / "03_ift" / "meta.json").read_text())["validation"]
    assert (measures["before"]["accuracy"], measures["after"]["accuracy"]) == (0.0, 1.0)


def test_03_starts_from_the_base_model(critiqued):
    critiqued(3, Judge(always_right))
    assert critiqued.loaded == [None]


# ---- judge: questions, votes, kept rows ----------------------------------------------------------
def judge_pairs(judge, monkeypatch, path, pairs=PAIRS[:2], **settings):
    monkeypatch.setattr(common, "sample", judge.sample)
    writer = common.RowWriter(path, key=("condition", "question"))
    questions = []
    for pair in pairs:
        questions += common.both_orders(pair)
    settings = {"image_root": "pictures", "style": "critique", **settings}
    return ift.judge(None, None, questions, writer, "base", **settings)


def test_judge_is_greedy_and_shows_no_label(monkeypatch, tmp_path):
    judge = Judge(always_right)
    rows = judge_pairs(judge, monkeypatch, tmp_path / "rows.jsonl")
    (call,) = judge.calls
    assert (call["temperature"], call["n"]) == (0.0, 1)
    for text in texts([call]):
        assert KNOWN not in text
    assert [row["question"] for row in rows] == ["v0-ab", "v0-ba", "v1-ab", "v1-ba"]
    assert [row["label"] for row in rows] == ["A", "B", "A", "B"]
    assert [row["verdict"] for row in rows] == ["A", "B", "A", "B"]
    assert [row["probability_a"] for row in rows] == pytest.approx([0.9, 0.1, 0.9, 0.1])


def test_judge_that_looks_at_the_texts_alone_agrees_with_itself_in_both_orders(
    monkeypatch, tmp_path
):
    """Swapping the responses flips the sign of the log-odds, and nothing else."""
    quality = {f"text {i}": 0.1 + 0.1 * i for i in range(8)}
    pairs = []
    for i, j in ((0, 3), (5, 2), (7, 6), (1, 4)):
        responses = {"chosen": f"text {i}", "rejected": f"text {j}"}
        pairs.append({"id": f"x{i}", "image": "x.png", "prompt": "q", **responses})

    def write(request, k):
        lines = dict(line.split(": ", 1) for line in request["text"].split("\n")[:3])
        r = quality[lines["Response A"]] - quality[lines["Response B"]]
        return {"text": "x", "complete": True, "verdict": "A" if r > 0 else "B", "log_odds": r}

    rows = judge_pairs(Judge(write), monkeypatch, tmp_path / "rows.jsonl", pairs)
    for ab, ba in zip(rows[::2], rows[1::2]):
        assert ab["probability_a"] == pytest.approx(1 - ba["probability_a"], abs=1e-6)
    result = ift.accuracy_by_order(rows)
    assert result["agreement"] == 1.0
    assert result["accuracy_ab"] == result["accuracy_ba"] == result["both"] == 0.5


def test_judge_votes(monkeypatch, tmp_path):
    """Two of three votes decide, though the third is surer."""

    def write(request, k):
        text = right_critique(request)
        return answer(mirrored(text), 0.999) if k == 0 else answer(text, 0.6)

    judge = Judge(write)
    settings = {"votes": 3, "temperature": 1.0}
    rows = judge_pairs(judge, monkeypatch, tmp_path / "rows.jsonl", **settings)
    assert (judge.calls[0]["n"], judge.calls[0]["temperature"]) == (3, 1.0)
    assert [row["verdict"] for row in rows] == ["A", "B", "A", "B"]
    assert rows[0]["probability_a"] == pytest.approx((0.001 + 0.6 + 0.6) / 3)


def test_judge_goes_on_where_it_was_interrupted(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CHUNK", 2)
    path = tmp_path / "rows.jsonl"
    rows = judge_pairs(Judge(always_right), monkeypatch, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.8)])  # three rows, and a part of the fourth
    again = Judge(always_right)
    assert judge_pairs(again, monkeypatch, path) == rows
    assert path.read_bytes() == data
    assert asked(again.calls) == {"v1"}


def test_judge_shows_another_picture_where_there_is_one(monkeypatch, tmp_path):
    judge = Judge(always_right)
    monkeypatch.setattr(common, "sample", judge.sample)
    writer = common.RowWriter(tmp_path / "rows.jsonl", key=("condition", "question"))
    shown, plain = common.both_orders(PAIRS[0])
    questions = [shown | {"picture": "a blank one"}, plain]
    ift.judge(None, None, questions, writer, "blank", image_root="pictures", style="none")
    images = [str(request["image"]) for request in judge.calls[0]["requests"]]
    assert images == ["a blank one", "pictures/images/v0.png"]


# ---- 04: fresh pairs, margins, selection ---------------------------------------------------------
SURE_OF_FALSE_FACTS = 0.999  # confidence of the critique with the right verdict and a false check
UNSURE = 0.2  # in the label, of the critique with the wrong verdict


def confidence(pair_id):
    """That of a pool pair's sound critique: it rises with the number of the pair."""
    return 0.6 + 0.015 * int(pair_id[1:])


def pool_judge(request, k):
    """Of each pool question a sound critique, one with a false fact, one with a wrong verdict.

    p00 to p03 have no sound critique. When it judges, it is right.
    """
    pair_id = request["id"].split("-")[0]
    right = right_critique(request)
    if pair_id[0] != "p":
        return answer(right, 0.9)
    if k == 2:
        return answer(mirrored(right), 1 - UNSURE)
    if k == 1 or int(pair_id[1:]) < 4:
        return answer(right.replace("dog: yes", "dog: no", 1), SURE_OF_FALSE_FACTS)
    return answer(right, confidence(pair_id))


FLAGS_04 = ["--iterations", "2", "--pool", "10", "--samples", "3", "--steps", "5"]


@pytest.fixture
def trained(critiqued):
    """stages, with 02 and 03 complete."""
    critiqued(3, Judge(always_right))
    return critiqued


def kept_rows(run, t, select="margin"):
    name = "04_rejection" if select == "margin" else f"04_rejection_{select}"
    return common.read_jsonl(run / name / f"iter{t}" / "kept.jsonl")


def test_04_shows_neither_findings_nor_label(trained):
    judge = Judge(pool_judge)
    trained(4, judge, *FLAGS_04)
    for text in texts(judge.calls):
        assert KNOWN not in text
        assert "Verdict: A\n" not in text
    for call in judge.sampled():
        assert (call["n"], call["temperature"]) == (3, 1.0)


def test_04_samples_disjoint_pools_and_keeps_an_image_in_one(trained):
    judge = Judge(pool_judge)
    trained(4, judge, *FLAGS_04)
    first, second = judge.sampled()
    assert len(asked([first])) == len(asked([second])) == 10
    assert asked([first, second]) == {pair["id"] for pair in PAIRS if pair["split"] == "pool"}
    images = []
    for call in (first, second):
        images.append({request["image"] for request in call["requests"]})
    assert not images[0] & images[1]


def test_04_draws_by_another_seed_in_every_iteration(trained):
    judge = Judge(pool_judge)
    trainings = trained(4, judge, *FLAGS_04)
    sampling = {call["seed"] for call in judge.sampled()}
    training = {data.seed for data, _ in trainings}
    assert len(sampling) == len(training) == 2
    other = Judge(pool_judge)
    trained(4, other, *FLAGS_04, "--seed", "1", "--overwrite")
    assert not sampling & {call["seed"] for call in other.sampled()}


def test_04_keeps_the_soundest_critique_and_not_the_surest_right_verdict(trained, run):
    trained(4, Judge(pool_judge), *FLAGS_04)
    for t in (1, 2):
        for row in kept_rows(run, t):
            assert row["dropped"] is None
            assert row["id"].endswith("-0")
            assert row["confidence_in_label"] == pytest.approx(confidence(row["pair_id"]))
            assert row["margin"] == pytest.approx(confidence(row["pair_id"]) - UNSURE)
            assert row["iteration"] == t
    assert set(kept_rows(run, 1)[0]) == set(header_row("04_rejection_sampling.py"))


def test_04_keeps_the_largest_margins_as_a_share_of_the_whole_pool(trained, run):
    """Only six pairs of iteration 1 are eligible; .4 of the pool of ten are four."""
    trained(4, Judge(pool_judge), *FLAGS_04)
    first, second = kept_rows(run, 1), kept_rows(run, 2)
    assert [row["pair_id"] for row in first[::2]] == ["p09", "p08", "p07", "p06"]
    assert [row["pair_id"] for row in second[::2]] == ["p19", "p18", "p17", "p16"]
    for rows in (first, second):
        assert [row["pair_id"] for row in rows[::2]] == [row["pair_id"] for row in rows[1::2]]
        assert [row["order"] for row in rows] == ["ab", "ba"] * 4
    done = json.loads((run / "04_rejection" / "iter1" / "done.json").read_text())
    assert done["counts"]["pairs in the pool"] == 10
    assert done["counts"]["pairs kept"] == 4
    assert done["counts"]["pairs with margin 0"] == 4
    assert done["args"]["steps"] == 5  # by which 05 tells this judge from another
    assert "03_ift/meta.json" in done["inputs"]


def test_04_keeps_by_threshold(trained, run):
    tau = confidence("p07") - UNSURE - 0.001
    trained(4, Judge(pool_judge), *FLAGS_04, "--margin", str(tau), "--iterations", "1")
    assert {row["pair_id"] for row in kept_rows(run, 1)} == {"p07", "p08", "p09"}


def test_04_trains_on_what_is_kept_and_a_share_of_stage_03s_rows(trained, run):
    """Eight kept rows are two thirds of an epoch of twelve at --replay 1/3."""
    trainings = trained(4, Judge(pool_judge), *FLAGS_04, "--replay", str(1 / 3))
    assert len(trainings) == 2
    for t, (data, settings) in enumerate(trainings, 1):
        ids = [row["id"] for row in data.rows_of_kind["critique"]]
        kept = {row["id"] for row in kept_rows(run, t)}
        assert len(ids) == len(set(ids)) == 12
        assert kept < set(ids)
        for name in set(ids) - kept:
            assert name.startswith("t")
        assert settings["steps"] == 5
        for row in data.rows_of_kind["critique"]:
            assert KNOWN not in row["text"]
        for row in data.rows_of_kind["correct"]:
            assert row["response"] == "A dog."


def test_04_replays_other_rows_in_each_iteration(trained):
    trainings = trained(4, Judge(pool_judge), *FLAGS_04)
    replayed = []
    for data, _ in trainings:
        ids = [row["id"] for row in data.rows_of_kind["critique"]]
        replayed.append({name for name in ids if name.startswith("t")})
    assert replayed[0] != replayed[1]
    (data, _) = trained(4, Judge(pool_judge), *FLAGS_04, "--replay", "0", "--overwrite")[0]
    assert len(data.rows_of_kind["critique"]) == 8


def test_04_validates_on_the_validation_pairs_greedily(trained, run):
    judge = Judge(pool_judge)
    trained(4, judge, *FLAGS_04)
    assert len(judge.judged()) == 2
    assert asked(judge.judged()) == {"v0", "v1"}
    assert not asked(judge.sampled()) & {"v0", "v1"}
    for t in (1, 2):
        rows = common.read_jsonl(run / "04_rejection" / f"iter{t}" / "validation.jsonl")
        assert [row["condition"] for row in rows] == [f"iteration {t}"] * 4


def test_04_starts_from_the_adapter_of_stage_03(trained, run):
    trained(4, Judge(pool_judge), *FLAGS_04)
    assert trained.loaded == [run / "03_ift" / "adapter"]


def test_04_resumes_with_the_adapter_of_the_last_complete_iteration(trained, run):
    trained(4, Judge(pool_judge), *FLAGS_04)
    folder = run / "04_rejection"
    before = {path: path.read_bytes() for path in folder.glob("iter*/*.jsonl")}
    (folder / "meta.json").unlink()
    (folder / "iter2" / "done.json").unlink()
    (folder / "iter2" / "kept.jsonl").unlink()
    shutil.rmtree(folder / "iter2" / "adapter")
    judge = Judge(pool_judge)
    trainings = trained(4, judge, *FLAGS_04)
    assert trained.loaded == [folder / "iter1" / "adapter"]
    assert judge.sampled() == []  # its samples are all there
    assert len(trainings) == 1
    assert {path: path.read_bytes() for path in folder.glob("iter*/*.jsonl")} == before
    meta = json.loads((folder / "meta.json").read_text())
    assert list(meta["iterations"]) == ["iteration 1", "iteration 2"]


def test_04_takes_another_choice_from_the_same_samples(trained, run):
    """The first pool is not sampled again; the second is, by the judge that the choice made."""
    trained(4, Judge(pool_judge), *FLAGS_04)
    folder = run / "04_rejection"
    samples = (folder / "iter1" / "samples.jsonl").read_bytes()
    judge = Judge(pool_judge)
    trainings = trained(4, judge, *FLAGS_04, "--margin", str(confidence("p09") - UNSURE - 0.001))
    assert {row["pair_id"] for row in kept_rows(run, 1)} == {"p09"}
    assert len(trainings) == 2 and len(judge.sampled()) == 1
    assert (folder / "iter1" / "samples.jsonl").read_bytes() == samples


def test_04_adds_iterations_to_those_that_are_done(trained, run):
    one_iteration = ["--iterations", "1", *FLAGS_04[2:]]
    trained(4, Judge(pool_judge), *one_iteration)
    judge = Judge(pool_judge)
    assert len(trained(4, judge, *FLAGS_04)) == 1
    assert trained.loaded == [run / "04_rejection" / "iter1" / "adapter"]
    meta = json.loads((run / "04_rejection" / "meta.json").read_text())
    assert list(meta["iterations"]) == ["iteration 1", "iteration 2"]


def test_04_goes_on_at_the_first_iteration_that_is_missing(trained, run):
    """Not at the third, from its own adapter, where someone has deleted the second."""
    three = ["--iterations", "3", "--pool", "6", *FLAGS_04[4:]]
    trained(4, Judge(pool_judge), *three)
    folder = run / "04_rejection"
    (folder / "meta.json").unlink()
    shutil.rmtree(folder / "iter2")
    trained(4, Judge(pool_judge), *three)
    assert trained.loaded == [folder / "iter1" / "adapter"]
    assert (folder / "iter2" / "done.json").exists()


def test_04_with_fewer_iterations_is_refused(trained, run):
    trained(4, Judge(pool_judge), *FLAGS_04)
    with pytest.raises(SystemExit, match="has 2 iterations: for fewer"):
        trained(4, Judge(pool_judge), *FLAGS_04[2:], "--iterations", "1")
    assert (
        len(trained(4, Judge(pool_judge), *FLAGS_04[2:], "--iterations", "1", "--overwrite")) == 1
    )


def test_04_does_not_train_again_what_is_saved(trained, run):
    """Cut in its validation, an iteration goes on with the training that is done."""
    trained(4, Judge(pool_judge), *FLAGS_04)
    folder = run / "04_rejection"
    assert not list(folder.rglob("training.safetensors"))
    (folder / "meta.json").unlink()
    assert len(trained(4, Judge(pool_judge), *FLAGS_04)) == 0


def test_03_makes_the_report_alone_where_all_is_judged(critiqued, run):
    critiqued(3, Judge(always_right))
    (run / "03_ift" / "meta.json").unlink()
    judge = Judge(always_right)
    critiqued(3, judge)
    assert judge.calls == []  # train goes on after its last step, which a test of its own shows
    assert (run / "03_ift" / "meta.json").exists()


def test_without_validation_pairs_stages_go_on(stages, run):
    rows = [row for row in PAIRS if row["split"] != "validation"]
    common.write_jsonl(run / "01_preferences" / "preferences.jsonl", rows)
    stages(2, Judge(two_critiques), "--critiques", "2")
    judge = Judge(always_right)
    assert len(stages(3, judge)) == 1 and judge.calls == []
    assert len(stages(4, Judge(pool_judge), *FLAGS_04)) == 2
    meta = json.loads((run / "03_ift" / "meta.json").read_text())
    assert meta["validation"] == {"before": {}, "after": {}}


@pytest.mark.parametrize("select", ["random", "best"])
def test_04_controls_have_the_size_of_the_margins_choice(trained, run, select):
    for rule in ("margin", select):
        trainings = trained(4, Judge(pool_judge), *FLAGS_04, "--select", rule)
        sizes = [len(data.rows_of_kind["critique"]) for data, _ in trainings]
        assert sizes == [8 + 3] * 2  # 8 kept, and 3 of 11 replayed
    for t in (1, 2):
        by_margin, control = kept_rows(run, t), kept_rows(run, t, select)
        assert len(control) == len(by_margin) == 8
        for row in control:
            assert row["dropped"] is None
    assert {row["id"] for row in kept_rows(run, 1)} != {
        row["id"] for row in kept_rows(run, 1, select)
    }


def test_04_continue_trains_on_stage_03s_own_rows(trained, run):
    stage_03 = common.read_jsonl(run / "02_critiques" / "critiques.jsonl")
    judge = Judge(pool_judge)
    trainings = trained(4, judge, *FLAGS_04, "--select", "continue")
    assert judge.sampled() == []
    assert len(trainings) == 2
    for data, settings in trainings:
        ids = [row["id"] for row in data.rows_of_kind["critique"]]
        assert ids == [row["id"] for row in stage_03]
        assert settings["steps"] == 5
    assert trainings[0][0].seed != trainings[1][0].seed


def test_04_takes_a_study_s_own_rule(trained, run, monkeypatch):
    """With its own margin: here the smallest is the largest."""

    def turned(confidences, right):
        return 1 - four.margin(confidences, right)

    rule = (turned, four.pairs_by_margin, four.best_critique)
    monkeypatch.setitem(four.RULES, "turned", rule)
    trained(4, Judge(pool_judge), *FLAGS_04, "--select", "turned", "--iterations", "1")
    kept = [row["pair_id"] for row in kept_rows(run, 1, "turned")][::2]
    assert kept == ["p04", "p05", "p06", "p07"]


# ---- Failure signatures: each is said by the stage in which it appears ---------------------------
def describes(request, k):
    """Two of five critiques with a verdict check nothing; a sixth has none."""
    right = right_critique(request)
    if k == 5:
        return answer("A dog, and nothing else.", 0.9)
    return answer(right.splitlines()[-1] if k in (1, 3) else right, 0.9)


def test_02_says_that_critiques_describe(stages, run, capsys):
    stages(2, Judge(always_right), "--critiques", "6")
    assert "describe" not in capsys.readouterr().out
    stages(2, Judge(describes), "--critiques", "6", "--overwrite")
    assert "40% of the critiques with a verdict describe" in capsys.readouterr().out
    stages(2, Judge(describes), "--critiques", "6", "--overwrite", "--style", "none")
    assert "describe" not in capsys.readouterr().out  # as asked


def nearly_agrees(request, k):
    """The judge contradicts itself about the pair p05 alone."""
    if request["id"].startswith("p05") and k == 2:
        return answer(mirrored(right_critique(request)), 0.9)
    return answer(right_critique(request), 0.9)


def test_04_says_that_margins_are_narrow(trained, capsys):
    trained(4, Judge(pool_judge), *FLAGS_04)
    assert "retention is outside" not in capsys.readouterr().out
    trained(4, Judge(nearly_agrees), *FLAGS_04, "--iterations", "1", "--overwrite")
    printed = capsys.readouterr().out
    assert "kept 1 of 10 pairs = 10.0%" in printed
    assert "retention is outside 30-50 %: the pool's median margin is 0.000" in printed


def test_04_says_that_margins_do_not_choose(trained, capsys):
    def hardly_wavers(request, k):
        return answer(right_critique(request), 0.9 if k else 0.88)

    words = "margins are narrow, so the judge hardly disagrees with itself"
    trained(4, Judge(pool_judge), *FLAGS_04)
    assert words not in capsys.readouterr().out
    trained(4, Judge(hardly_wavers), *FLAGS_04, "--iterations", "1", "--overwrite")
    printed = capsys.readouterr().out
    assert "margins of the kept: median 0.020, smallest 0.020" in printed and words in printed


def test_04_says_that_an_iteration_gains_nothing(critiqued, run, capsys):
    """Iteration 1 judges the two validation pairs right, of which 03 had one order in four; then
    there is nothing left to gain."""

    def mostly_wrong(request, k):
        right = right_critique(request)
        return answer(right if request["id"] == "v0-ab" else mirrored(right), 0.9)

    critiqued(3, Judge(mostly_wrong))
    assert "no gain beyond its interval: try more --steps" in capsys.readouterr().out
    critiqued(4, Judge(pool_judge), *FLAGS_04)
    first, second = capsys.readouterr().out.split("iteration 2: kept")
    assert "on 2 validation pairs: +0.750 (95 % +-0.490)" in first
    assert "saturation" not in first
    assert "on 2 validation pairs: +0.000 (95 % +-0.000)" in second
    assert "no gain beyond its interval: saturation" in second


def test_04_gains_are_paired_by_pair():
    """Gains of .5, 0, 0, -.5, 1 of five images; rows in another order are matched by question."""
    before, after = [], []
    rights = {"p": ("10", "11"), "q": ("11", "11"), "r": ("00", "00"), "s": ("01", "00")}
    rights["t"] = ("00", "11")
    for name, (was, now) in rights.items():
        for order, a, b in zip(("ab", "ba"), was, now):
            row = {"question": f"{name}-{order}", "image": name, "label": "A"}
            before.append({**row, "verdict": "A" if a == "1" else "B"})
            after.append({**row, "verdict": "A" if b == "1" else None})
    gain, half = ift.paired_gain(before[::-1], after)
    assert gain == pytest.approx(0.2)
    deviations = [0.3, 0.2, 0.2, 0.7, 0.8]  # from the mean
    error = math.sqrt(sum(d * d for d in deviations) / 4 / 5)
    assert half == pytest.approx(1.96 * error)


def test_margins_are_drawn(tmp_path):
    four.draw_margins(tmp_path / "margins.png", {"a": 0.0, "b": 0.4, "c": 0.7}, ["b", "c"], "x")
    assert common.load_image(tmp_path / "margins.png").size == (660, 352)


def test_04_wants_the_stages_before_it(stages, run):
    with pytest.raises(SystemExit, match="02_critiques is not complete"):
        stages(4, Judge(pool_judge), *FLAGS_04)
    stages(2, Judge(two_critiques), "--critiques", "2")
    with pytest.raises(SystemExit, match="03_ift is not complete"):
        stages(4, Judge(pool_judge), *FLAGS_04)


def test_04_stops_where_nothing_is_kept(trained, run):
    def write(request, k):
        return answer(mirrored(right_critique(request)), 0.9)

    with pytest.raises(SystemExit, match="iteration 1 keeps nothing.*wrong verdict"):
        trained(4, Judge(write), *FLAGS_04)


def test_03_says_that_the_verdict_does_not_read_the_checks(critiqued, capsys):
    asked = []

    def deaf(request, k):
        """Right checks; after training, always the same verdict."""
        asked.append(request)
        text = right_critique(request)
        if len(asked) > 4:  # two validation pairs in both orders, before
            text = text.replace("Verdict: B", "Verdict: A")
        return answer(text, 0.9)

    critiqued(3, Judge(deaf))
    said = capsys.readouterr().out
    assert "the verdict follows the checks in 50% of 4 critiques" in said
    assert "warning: the verdict does not read the checks: try --bt-weight 1" in said


def test_the_verdict_follows_the_checks_that_decide():
    texts = {
        "A: a cat: yes\nB: a dog: no\nVerdict: A": "A",
        "A: a cat: yes\nB: a dog: no\nVerdict: B": "B",
        "A: a cat: no\nB: a dog: yes": None,  # without a verdict it does not follow
        "A: a cat: yes\nB: a dog: yes\nVerdict: B": "B",  # even checks decide nothing
        "Verdict: A": "A",
    }
    rows = [{"critique": text, "verdict": verdict} for text, verdict in texts.items()]
    assert ift.share_following(rows) == (pytest.approx(1 / 3), 3)
    assert ift.share_following(rows[3:]) == (None, 0)
