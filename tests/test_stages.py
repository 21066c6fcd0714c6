"""What feeds the formulas: stages 02-04 with a judge in place of a model that returns set texts and
keeps what it was asked, and a training that keeps the rows it is given."""

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import read_rows, stage
from PIL import Image
from safetensors.torch import load_file, save_file

import common

two = stage("02_generate_critiques")
three = stage("03_train_ift")
four = stage("04_rejection_sampling")
KNOWN = "Known to be true, never to be mentioned:\n"  # in the prompt, before findings and label


# ---- A run directory after stage 01 --------------------------------------------------------------
def pair(name, image, split):
    """A preference row; what the rejected response makes up is a cat or a bus, in turn."""
    absent = ("cat", "bus")[int(name[1:]) % 2]
    evidence = []
    for found in (("dog", "both", "present"), (absent, "rejected", "absent")):
        row = dict(zip(("object", "claimed_by", "status"), found))
        evidence.append({**row, "confidence": 0.5, "box": None})
    row = {"id": name, "image": f"images/{image}.png", "prompt": f"What is in picture {name}?"}
    row |= {"chosen": "A dog.", "rejected": f"A dog and a {absent}.", "source": "sampled"}
    return {**row, "hallucinated": [absent], "evidence": evidence, "split": split}


PAIRS = [pair(f"v{i}", f"v{i}", "validation") for i in range(2)]
PAIRS += [pair(f"t{i}", f"t{i}", "train") for i in range(5)]
PAIRS += [pair(f"p{i:02d}", f"p{i // 2}", "pool") for i in range(20)]  # two pairs of each image
PAIRS += [pair("h0", "h0", "heldout")]


def write_preferences(run, pairs):
    common.write_jsonl(run / "01_preferences" / "preferences.jsonl", pairs)


@pytest.fixture
def run(tmp_path):  # the directory; stage 01 is complete, and has mixed the splits
    folder = tmp_path / "01_preferences"
    folder.mkdir()
    write_preferences(tmp_path, PAIRS[5:] + PAIRS[:5])
    common.write_json(folder / "vocabulary.json", {"dog": "dog", "cat": "cat", "bus": "bus"})
    args = {"model": "a/model", "image_root": "/pictures", "max_image_tokens": 77}
    args |= {"images": None, "pairs": "x.parquet", "detections": None, "expert": "x.pt"}
    common.write_json(folder / "meta.json", {"args": args})
    return tmp_path


# ---- The recorded judge, and training that only keeps its rows -----------------------------------
def right_critique(request):
    """The true checks of the two responses, and the right verdict; it names its own question."""
    lines, better = [f"Of {request['id']}."], None
    for side in "AB":
        response = request["text"].split(f"Response {side}: ")[1].split("\n")[0]
        for name in re.findall("dog|cat|bus", response):
            lines.append(f"{side}: {name}: {'yes' if name == 'dog' else 'no'}")
            if name != "dog":
                better = "B" if side == "A" else "A"
    return "\n".join([*lines, f"Verdict: {better}"])


def answer(text, confidence=0.9):
    """A complete answer whose judge is so sure (0..1) of the verdict that the text gives."""
    verdict, _ = common.find_verdict(text)
    r = math.log(confidence / (1 - confidence)) * (1 if verdict == "A" else -1)
    log_odds = None if verdict is None else r
    return {"text": text, "complete": True, "verdict": verdict, "log_odds": log_odds}


def right_if(is_right, request, confidence=0.9):  # else the same checks and the wrong verdict
    text = right_critique(request)
    is_a = text.endswith("A") == is_right
    return answer(text[:-1] + ("A" if is_a else "B"), confidence)


def always_right(request, k):
    return right_if(True, request)


class Judge:
    """Stands in for common.sample; write(request, k) gives the k-th answer to a request, which
    also holds the "weights" of the model that is asked."""

    def __init__(self, write=always_right):
        self.write, self.calls = write, []

    def sample(self, model, processor, requests, n, bar, **settings):
        self.calls.append({"requests": requests, "n": n, "weights": model.weights, **settings})
        requests = [{**request, "weights": model.weights} for request in requests]
        return [[self.write(request, k) for k in range(n)] for request in requests]

    def sampled(self):
        """The calls that drew samples; the others judged, greedily."""
        return [call for call in self.calls if call["temperature"] > 0]

    def requests(self):
        return sum((call["requests"] for call in self.calls), [])


class Model:
    """Stands in for a PEFT model: its weights are a text, "" and a "+..." for each training."""

    def __init__(self, checkpoint=None):
        self.weights = ""
        if checkpoint:
            saved = load_file(checkpoint / "adapter_model.safetensors")
            self.weights = bytes(saved["lora_A"].tolist()).decode()

    def get_base_model(self):
        return self

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True)
        weights = torch.tensor(list(self.weights.encode()), dtype=torch.uint8)
        save_file({"lora_A": weights}, Path(folder) / "adapter_model.safetensors")


def tokenizer(text, add_special_tokens=False):
    return SimpleNamespace(input_ids=text.split())


tokenizer.added_tokens_decoder, tokenizer.all_special_tokens = {}, []


def fakes(monkeypatch):
    """No model is loaded or trained from here on -> (what load_judge got, the trainings)."""
    loaded, trained = [], []

    def load_judge(**settings):
        loaded.append((settings["checkpoint"], settings["max_image_tokens"]))
        return Model(settings["checkpoint"]), SimpleNamespace(tokenizer=tokenizer)

    def train(model, tokenizer, prepare, folder, settings, save_every):
        names = ("rows", "processor", "image_root", "settings", "seed", "micro_batch")
        record = dict(zip(names, prepare.args), folder=folder, save_every=save_every)
        trained.append(SimpleNamespace(**record, start=model.weights))
        (folder / "training.pt").touch()
        common.write_jsonl(folder / "metrics.jsonl", [{"loss": 0.5}, {"loss": 0.25}])
        model.weights += "+" + common.digest([record["rows"], settings])

    monkeypatch.setattr(common, "load_judge", load_judge)
    monkeypatch.setattr(four, "draw_margins", lambda path, *_: path.touch())  # takes a second
    monkeypatch.setattr(three, "make_trainable", lambda model, rank: model)
    monkeypatch.setattr(three, "train", train)
    return loaded, trained


@pytest.fixture
def stages(monkeypatch, run):
    """start(number, judge, flags): run a stage by its command line -> its trainings; and in
    start.loaded the checkpoints that were loaded, each with --max-image-tokens."""
    loaded, trained = fakes(monkeypatch)

    def start(number, judge, flags=""):
        loaded.clear()
        trained.clear()
        monkeypatch.setattr(common, "sample", judge.sample)
        flags = f"--run {run} {flags} {'--no-checkpoint-activations' * (number > 2)}"
        script = {2: two, 3: three, 4: four}[number]
        script.main(script.parse_args(flags.split()))
        return list(trained)

    start.loaded = loaded
    return start


def names_in_header(script):  # of the fields of the row that it shows
    return set(re.findall(r'"(\w+)":', script.__doc__.split("Writes")[1]))


def meta(run, name):
    return common.read_json(run / name / "meta.json")


# ---- 02: critiques with the findings in view -----------------------------------------------------
def test_02_keeps_what_its_filter_passes(stages, run):
    """Of three critiques of a question one is sound, one repeats it, one has a false check."""
    false = "dog: no", "dog: no", "dog: yes"
    judge = Judge(lambda row, k: answer(right_critique(row).replace(false[k], "dog: no")))
    stages(2, judge, "--critiques 3")
    rows = read_rows(run / "02_critiques" / "critiques.jsonl")
    for row in rows:
        question = f"{row['pair_id']}-{row['order']}"
        assert row["id"] == f"{question}-0" and row["critique"].startswith(f"Of {question}.")
        assert row["prompt"] == f"What is in picture {row['pair_id']}?"
        assert row["image"] == f"images/{row['pair_id']}.png"
        chosen = row["response_a"] if row["label"] == "A" else row["response_b"]
        assert chosen == "A dog." and row["verdict"] == row["label"]
    samples = read_rows(run / "02_critiques" / "samples.jsonl")
    assert sum(row["dropped"] is not None for row in samples) == len(rows) == 10
    assert set(rows[0]) == names_in_header(two)
    counts = meta(run, "02_critiques")["counts"]
    assert (counts["critiques written"], counts["repeated"], counts["kept"]) == (30, 10, 10)
    few = Judge()
    stages(2, few, "--limit 2 --style none")
    texts = [row["text"] for row in few.requests()]  # the rest of them: test_requests.py
    assert len(texts) == 4 and all(text.endswith(common.INSTRUCTIONS["none"]) for text in texts)


# ---- 03: what is trained on, and how it is judged ------------------------------------------------
def two_critiques(request, k):
    """Two sound critiques that differ: the second has its checks in the other order."""
    first, *checks, last = right_critique(request).split("\n")
    return answer("\n".join([first, *(reversed(checks) if k else checks), last]))


@pytest.fixture
def critiqued(stages):  # with stage 02 complete: 20 critiques of the five training pairs
    stages(2, Judge(two_critiques), "--critiques 2")
    return stages


def test_03_trains_on_critiques_without_the_reference_and_on_chosen_responses(critiqued, run):
    flags = "--steps 7 --lr 0.5 --bt-weight 0.25 --train-batch 6 --seed 9 --max-response-tokens 99"
    flags = f"{flags} --tag x --lora-rank 5 --lam 0.2 --micro-batch 3 --save-every 4"
    (training,) = critiqued(3, Judge(), flags)
    critiques = read_rows(run / "02_critiques" / "critiques.jsonl")
    rows, correct = training.rows["critique"], training.rows["correct"]
    for row, critique in zip(rows, critiques, strict=True):
        responses = critique["response_a"], critique["response_b"]
        text = common.build_judge_prompt(critique["prompt"], *responses)
        assert (row["text"], row["response"]) == (text, critique["critique"])
        assert all(row[name] == critique[name] for name in ("id", "label", "image"))
    assert sorted(row["id"] for row in correct) == ["t0", "t1", "t2", "t3", "t4"]
    for row in correct:
        assert row["text"] == f"What is in picture {row['id']}?"
        assert (row["response"], row["image"]) == ("A dog.", f"images/{row['id']}.png")
    assert (training.micro_batch, training.seed, training.save_every) == (3, 9, 4)
    assert (str(training.image_root), training.folder) == ("/pictures", run / "03_ift_x")
    expected = {"steps": 7, "lr": 0.5, "lam": 0.2, "bt_weight": 0.25, "train_batch": 6, "seed": 9}
    expected |= {"max_response_tokens": 99, "tag": "x", "lora_rank": 5, "start": ["a/model", 77]}
    expected |= {"style": "critique", "rows": common.digest(critiques)}
    made_with = common.read_json(run / "03_ift_x" / "adapter" / "made_with.json")
    assert made_with["counts"]["trained on, critiques"] == 20
    assert made_with["images"] == [f"images/t{i}.png" for i in range(5)]
    assert training.settings == expected and expected.items() < made_with.items()
    assert list(critiqued(3, Judge(), "--lam 0")[0].rows) == ["critique"]


def test_03_judges_the_base_model_before_and_the_trained_one_after(critiqued, run, capsys):
    """Here it is wrong until the training has run."""
    judge = Judge(lambda row, k: right_if(row["weights"] != "", row))
    (training,) = critiqued(3, judge)
    adapter = run / "03_ift/adapter"  # what was saved is what is judged
    assert training.start == "" and critiqued.loaded == [(None, 77), (adapter, 77)]
    rows = read_rows(run / "03_ift" / "validation.jsonl")
    assert [row["condition"] for row in rows] == ["before"] * 4 + ["after 03"] * 4
    for when, accuracy, p in (("before", 0.0, 0.1), ("after", 1.0, 0.9)):
        measures = meta(run, "03_ift")["validation"][when]
        assert measures["accuracy"] == accuracy
        assert measures["bradley_terry_loss"] == pytest.approx(-math.log(p), rel=1e-4)
    said = capsys.readouterr().out
    assert "on 2 validation pairs: +1.000" in said and "warning" not in said
    assert f"next: python 04_rejection_sampling.py --run={run}" in said
    judge = Judge(lambda row, k: right_if(row["weights"] == "", row))
    critiqued(3, judge, "--tag x")
    said = capsys.readouterr().out
    assert f"04_rejection_sampling.py --tag x --run={run}" in said and "become worse" in said


def test_a_card_says_what_a_judge_is(critiqued, run):
    """What it was made of and with, and how it judges; as it was found when it was new."""
    critiqued(3, Judge(lambda row, k: right_if(row["weights"] != "", row)), "--steps 7")
    text = (card := run / "03_ift/adapter/README.md").read_text()
    assert text.startswith("---\nbase_model: a/model\n---\n# ") and "images" not in text
    for fact in ("data: x.parquet", "expert: x.pt", "steps: 7", "accuracy: 1.0", "lora_rank: 16"):
        assert f"\n- {fact}\n" in text
    critiqued(3, Judge(lambda row, k: right_if(False, row)), "--steps 7 --max-new-tokens 9")
    assert meta(run, "03_ift")["validation"]["after"]["accuracy"] == 0 and card.read_text() == text


def test_judge_pairs_shows_another_picture_where_there_is_one(monkeypatch, tmp_path):
    """One critique a question, at its temperature; one without a verdict is worth .5."""

    def write(request, k):
        is_mute = request["id"] == "v1-ab"
        return answer("Hm.") if is_mute else right_if(request["id"] != "v1-ba", request, 0.7)

    judge = Judge(write)
    blank = Image.new("RGB", (9, 9), (128, 128, 128))
    monkeypatch.setattr(common, "sample", judge.sample)
    questions = [*common.both_orders(PAIRS[0]), *common.both_orders(PAIRS[1])]
    for question, changed in zip(questions, ("images/h0.png", blank)):
        question["picture"] = changed
    how = {"image_root": "pictures", "style": "critique", "max_new_tokens": 9, "seed": 5}
    how |= {"temperature": 0.2, "batch_size": 3}
    asked = SimpleNamespace(weights=["w"], loaded=(Model(), None))
    rows = three.judge_pairs(tmp_path / "answers.jsonl", asked, questions, "base", **how)
    assert (judge.calls[0]["n"], judge.calls[0]["temperature"]) == (1, 0.2)
    images = [Path("pictures/images/h0.png"), blank, *[Path("pictures/images/v1.png")] * 2]
    assert [request["image"] for request in judge.requests()] == images
    verdicts = [(row["question"], row["label"], row["verdict"]) for row in rows]
    ids = [question["id"] for question in questions]
    assert verdicts == list(zip(ids, "ABAB", ["A", "B", None, "A"]))
    assert [row["probability_a"] for row in rows] == pytest.approx([0.7, 0.3, 0.5, 0.7])
    assert [row["image"] for row in rows] == [question["image"] for question in questions]
    assert [row["critique"] for row in rows] == [write(x, 0)["text"] for x in judge.requests()]


# ---- 04: fresh pairs, margins, selection ---------------------------------------------------------
UNSURE = 0.2  # confidence in the label of the critique with the wrong verdict


def confidence(pair_id):  # of a pool pair's sound critique: it rises with the pair's number
    return 0.6 + 0.015 * int(pair_id[1:])


def pool_judge(request, k):
    """Of each pool question a sound critique, one with a false fact, one with a wrong verdict; p00
    to p03 have no sound one. When it judges, it is right; but only after iteration 1 of 04 always.
    """
    pair_id, right = request["id"].split("-")[0], right_critique(request)
    if pair_id[0] != "p":
        return right_if(request["weights"].count("+") > 1 or request["id"] == "v0-ab", request)
    if k == 2:
        return right_if(False, request, 1 - UNSURE)
    if k == 1 or int(pair_id[1:]) < 4:
        return answer(right.replace("dog: yes", "dog: no", 1), 0.999)
    return answer(right, confidence(pair_id))


FLAGS_04 = "--iterations 2 --pool 10 --samples 3 --steps 5"


@pytest.fixture
def trained(critiqued):  # with 02 and 03 complete
    critiqued(3, Judge(pool_judge))
    return critiqued


def kept_rows(run, t, folder="04_rejection"):
    return read_rows(run / folder / f"iter{t}" / "kept.jsonl")


def test_04_asks_each_judge_about_its_own_pool_and_the_validation_pairs(trained, run):
    """A pool for each iteration, all of an image in one of them (who is asked, and about the
    validation pairs: test_requests.py)."""
    judge, other = Judge(pool_judge), Judge(pool_judge)
    trainings = trained(4, judge, FLAGS_04)
    adapters = ["03_ift/adapter", "04_rejection/iter1/adapter", "04_rejection/iter2/adapter"]
    assert trained.loaded == [(run / adapter, 77) for adapter in adapters]
    ids = [pair["id"] for pair in PAIRS if pair["split"] == "pool"]
    for k, call in enumerate(judge.sampled()):
        pair_ids = dict.fromkeys(row["id"].split("-")[0] for row in call["requests"])
        assert list(pair_ids) == ids[10 * k : 10 * k + 10]
    # each judge is that of the iteration before
    weights = [Model(run / adapter).weights for adapter in adapters]
    assert [weight.count("+") for weight in weights] == [1, 2, 3]
    assert [training.start for training in trainings] == weights[:2]
    cards = [(run / adapter / "README.md").read_text() for adapter in adapters]
    for card, fact in zip(cards, ("accuracy: 0.25", "accuracy: 1.0", "iteration: 2")):
        assert f"\n- {fact}\n" in card
    # another seed in each iteration, and by --seed
    trained(3, Judge(), "--tag x")
    trainings += trained(4, other, f"{FLAGS_04} --seed 1 --tag x")
    assert len({training.seed for training in trainings}) == 4
    assert len({call["seed"] for call in [*judge.sampled(), *other.sampled()]}) == 4


@pytest.mark.parametrize("is_threshold", [False, True])
def test_04_keeps_the_largest_margins_and_each_ones_soundest_critique(trained, run, is_threshold):
    """Not the surest right verdict. Only six pairs of iteration 1 are eligible; .4 of the whole
    pool of ten are four."""
    tau = confidence("p06") - UNSURE - 0.001
    trained(4, Judge(pool_judge), FLAGS_04 + f" --margin {tau}" * is_threshold)
    for t in (1, 2):
        rows, n = kept_rows(run, t), 10 if is_threshold and t == 2 else 4
        for k, row in enumerate(rows):
            pair_id = f"p{10 * t - 1 - k // 2:02d}"  # the last has the largest margin
            assert row["id"] == f"{pair_id}-{('ab', 'ba')[k % 2]}-0" and row["dropped"] is None
            assert row["confidence_in_label"] == pytest.approx(confidence(pair_id))
            assert row["margin"] == pytest.approx(confidence(pair_id) - UNSURE)
            assert row["iteration"] == t
        assert len(rows) == 2 * n
        assert meta(run, "04_rejection")["counts"][f"iteration {t}, pairs kept"] == n
    assert meta(run, "04_rejection")["counts"]["iteration 1, pairs with margin 0"] == 4
    assert set(kept_rows(run, 1)[0]) == names_in_header(four)


@pytest.mark.parametrize("replay, n", [(1 / 3, 6), (0, 4)])
def test_04_trains_on_what_is_kept_and_a_part_of_stage_02s_rows(trained, run, replay, n):
    """Four kept rows are two thirds of an epoch of six at --replay 1/3."""
    replayed = []
    flags = FLAGS_04.replace("--pool 10", "")  # by default a third of all: six pairs
    for training in trained(4, Judge(pool_judge), f"{flags} --replay {replay}"):
        ids = {row["id"] for row in training.rows["critique"]}
        chosen = {row["id"] for row in kept_rows(run, training.settings["iteration"])}
        assert len(ids) == len(training.rows["critique"]) == n and chosen <= ids
        replayed.append(ids - chosen)
        assert all(name.startswith("t") for name in ids - chosen)
        assert (training.settings["steps"], str(training.image_root)) == (5, "/pictures")
        assert not any(KNOWN in row["text"] for row in training.rows["critique"])
        assert {row["response"] for row in training.rows["correct"]} == {"A dog."}
    assert not replay or replayed[0] != replayed[1]  # others in each iteration


def test_04_controls_have_the_size_of_the_margins_choice(trained, run):
    of_margin = trained(4, Judge(pool_judge), FLAGS_04)
    for select in ("low", "random", "best"):
        trainings = trained(4, Judge(pool_judge), f"{FLAGS_04} --select {select}")
        for t, training in enumerate(trainings):
            rows = kept_rows(run, t + 1, f"04_rejection_{select}")
            assert len(rows) == 8 and all(row["dropped"] is None for row in rows)
            assert len(training.rows["critique"]) == len(of_margin[t].rows["critique"]) == 11
        assert {row["id"] for row in rows} != {row["id"] for row in kept_rows(run, 2)}
    judge = Judge(pool_judge)
    first, second = trained(4, judge, f"{FLAGS_04} --select continue")
    ids = [row["id"] for row in read_rows(run / "02_critiques" / "critiques.jsonl")]
    for training in (first, second):
        assert [row["id"] for row in training.rows["critique"]] == ids
    assert first.seed != second.seed and judge.sampled() == []


@pytest.mark.parametrize("lost", ["iter2", "iter2/adapter", "iter1", ""])
def test_04_goes_on_at_what_is_missing(trained, run, lost):
    """From the adapter before it, and without another sample of what is sampled."""
    flags = "--iterations 3 --pool 6 --samples 3 --steps 5"
    trained(4, Judge(pool_judge), flags)
    folder, judge = run / "04_rejection", Judge(pool_judge)
    paths = [*folder.rglob("*.safetensors"), *folder.rglob("*.jsonl")]
    of_whole = {path: path.read_bytes() for path in paths}
    (folder / "meta.json").unlink()
    if lost:
        shutil.rmtree(folder / lost)
    assert len(trained(4, judge, flags)) == bool(lost)
    # the judge before is loaded, and the new one where it has to judge
    loaded = {"iter1": [run / "03_ift", folder / "iter1"], "iter2/adapter": [folder / "iter1"]}
    loaded |= {"iter2": [folder / "iter1", folder / "iter2"], "": []}
    assert trained.loaded == [(path / "adapter", 77) for path in loaded[lost]]
    assert len(judge.sampled()) == (lost in ("iter1", "iter2"))
    assert {path: path.read_bytes() for path in paths} == of_whole
    assert len(meta(run, "04_rejection")["validation"]) == 3
    rows = read_rows(run / "02_critiques" / "critiques.jsonl")
    common.write_jsonl(run / "02_critiques" / "critiques.jsonl", rows[1:])
    with pytest.raises(SystemExit, match=r"03_ift/adapter was trained otherwise \(rows was"):
        trained(4, judge, f"{flags} --select low")  # of which nothing is there
    common.write_jsonl(run / "02_critiques" / "critiques.jsonl", rows)
    for path in (folder / "iter1" / "adapter").glob("*.safetensors"):
        shutil.copy(path, run / "03_ift" / "adapter")
    with pytest.raises(SystemExit, match="start was"):
        trained(4, judge, flags)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_gain_is_against_the_iteration_before(capsys, trained, is_resumed):
    said = capsys.readouterr().out  # of 03
    assert "no gain beyond its interval: try more --steps" in said
    assert "the verdict follows the checks in 25% of 4 critiques" in said
    assert "warning: the verdict does not read the checks: try --bt-weight 0.1" in said
    if is_resumed:
        trained(4, Judge(pool_judge), f"{FLAGS_04} --iterations 1")
        capsys.readouterr()
    assert len(trained(4, Judge(pool_judge), FLAGS_04)) == 2 - is_resumed
    first, second = capsys.readouterr().out.split("iteration 2: kept")
    assert "on 2 validation pairs: +0.750 (95 % +-0.490)" in first and "saturation" not in first
    assert "on 2 validation pairs: +0.000 (95 % +-0.000)" in second
    assert "no gain beyond its interval: saturation" in second


def test_without_validation_pairs_stages_go_on(stages, run):
    write_preferences(run, [row for row in PAIRS if row["split"] != "validation"])
    stages(2, Judge(two_critiques), "--critiques 2")
    assert len(stages(3, Judge(None))) == 1
    assert len(stages(4, Judge(pool_judge), FLAGS_04)) == 2
    assert meta(run, "03_ift")["validation"] == {"before": {}, "after": {}}


# ---- Where a stage stops, and what it warns of ---------------------------------------------------
def test_stages_stop_where_they_cannot_go_on(stages, run):
    def refused(number, words, flags="", is_right=False):
        judge = Judge(lambda row, k: right_if(is_right, row))
        with pytest.raises(SystemExit, match=words):
            stages(number, judge, flags)
        return judge.calls

    refused(2, "no critique was kept.*wrong verdict")
    refused(3, "02_critiques is not complete")
    stages(2, Judge(two_critiques), "--critiques 2")
    refused(4, "03_ift is not complete")
    stages(3, Judge())
    refused(4, "03_ift_x is not complete", "--tag x")
    refused(4, "iteration 1 keeps nothing", FLAGS_04)
    for split in ("validation", "heldout"):  # no picture is trained on and judged by
        write_preferences(run, [*PAIRS, pair("n0", "t3", split)])  # as 01 made anew may
        words = r"^error: images/t3\.png .*split validation or heldout"
        for number, flags in ((3, ""), (3, "--tag x"), (4, FLAGS_04)):
            assert refused(number, words, flags, is_right=True) == stages.loaded == []
    write_preferences(run, PAIRS[7:])
    refused(2, "no pair in split 'train': see --train")
    (run / "01_preferences" / "meta.json").unlink()
    for number in (2, 3, 4):
        refused(number, "01_preferences is not complete")


def test_02_says_that_critiques_describe(stages, capsys):
    def describes(request, k):
        """One of three critiques with a verdict checks nothing; a fourth has no verdict."""
        lines = right_critique(request).splitlines()
        return answer("\n".join({0: lines[-1:], 1: lines[:-1]}.get(k, lines)))

    for style, n in (("critique", 1), ("none", 0)):
        stages(2, Judge(describes), f"--critiques 4 --style {style}")
        said = capsys.readouterr().out
        assert said.count("warning: 10 of 30 critiques with a verdict check no claim") == n


def test_04_says_that_margins_do_not_choose(trained, capsys):
    # x decides; y contradicts itself about the pair p05 alone; z hardly wavers
    writes = {"x": pool_judge}
    writes["y"] = lambda row, k: right_if(k == 0 or row["id"][:3] != "p05", row)
    writes["z"] = lambda row, k: right_if(True, row, 0.9 if k else 0.88)
    said = {}
    for name, write in writes.items():
        trained(3, Judge(), f"--tag {name}")
        trained(4, Judge(write), f"{FLAGS_04} --iterations 1 --tag {name}")
        said[name] = capsys.readouterr().out
    assert "kept 1 of 10 pairs = 10.0%" in said["y"]
    assert "margins of the kept: median 0.020, of the pool 0.020" in said["z"]
    for words, where in (("retention is outside 30-50 %", "y"), ("margins are narrow", "z")):
        assert [name for name in said if words in said[name]] == [where]


def test_margins_are_drawn(tmp_path):
    four.draw_margins(tmp_path / "margins.png", {"a": 0.0, "b": 0.4, "c": 0.7}, ["b", "c"], "x")
    assert common.load_image(tmp_path / "margins.png").size == (840, 448)
