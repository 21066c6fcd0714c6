"""Which row's picture, text, id, seed and settings reach a request, and to which row its answers
come back: the mains of all stages, with a judge whose answers tell what it was asked."""

import io
import re
import shutil
from contextlib import redirect_stdout
from itertools import product

import pytest
import torch
from conftest import STAGES, read_rows, run_here, stage
from PIL import Image
from test_stages import KNOWN, Judge, Model, answer, fakes

import common
from common import row_seed, write_json, write_jsonl

one, _, _, _, five = map(stage, STAGES)
CLASSES = ["gnu", "emu", "ape", *(f"yak{k:02d}" for k in range(34))]  # the first three are there
LABEL = {"ab": "A", "ba": "B"}
WILD = [{"image": f"0{9 - k}.png", "text": f"Wild {k}?", "question_id": k + 70} for k in range(5)]
IMAGES = "--images {0}/images --candidates 2 --temperature 0.7 --expert {1}"
TRAIN = "--train-batch 6 --no-checkpoint-activations"
FOUR = f"04_rejection_sampling.py --iterations 2 --pool 5 --samples 3 --temperature 0.7 {TRAIN}"
COMMANDS = {"02": "02_generate_critiques.py --critiques 3 --temperature 0.7"}
COMMANDS |= {"03": f"03_train_ift.py {TRAIN}", "margin": FOUR, "random": f"{FOUR} --select random"}
COMMANDS |= {"resumed": FOUR, "05": "05_evaluate.py --attack"}
COMMANDS["wild"] = "05_evaluate.py --benchmark llava-wild --best-of 3 --pairs RUN"


def seen(image):
    """The number of a picture, by its colour and size; -1 - number of a grey one of its size."""
    picture = common.load_image(image)
    k = picture.width - 40
    return {(6 * k, 240 - 6 * k, 100): k, (128, 128, 128): -1 - k}[picture.getpixel((20, 20))]


class Expert:
    """Stands in for Detector, and for OwnAnswers' look at a picture; looks: {number of a picture:
    what it is searched for}. It is surer of a gnu the higher the number."""

    def __init__(self, classes=None):
        self.classes, self.looks, self.sizes = classes, {}, []

    def find(self, images, questions):
        self.sizes.append(len(images))
        return [self.look(image, names) for image, names in zip(images, questions, strict=True)]

    def look(self, image, names):
        self.looks[seen(image)] = names
        p = {"gnu": 0.5 + seen(image) / 100, "emu": 1.0, "ape": 1.0}
        return [{"object": name, "confidence": p.get(name, 0.0)} for name in names]


def write(request, k):
    """A candidate, every third picture's second one makes up a yak; or a critique, whose verdict is
    right if it is the second, or the first in order ab or after two trainings, but for game 1."""
    name, weights, text = request["id"], request["weights"], request["text"]
    label, lines = LABEL.get(name[-2:]), []
    for side, response in re.findall("^Response (.): (.*)", text, re.M):
        for found in re.findall(r"gnu|emu|ape|yak\d\d", response):
            lines.append(f"{side}: {found}: {'no' if found[0] == 'y' else 'yes'}\n")
    text = text.replace(f"{KNOWN}{''.join(lines)}Verdict: {label}\n", "Known\n").replace("\n", "/")
    line = f"{name}|{k}|{seen(request['image'])}|{weights}|{text}"
    if not lines:
        yak = f" and a yak{name[:2]}" if int(name[:2]) % 3 == k == 1 else ""
        return answer(f"A gnu{yak}, an {CLASSES[1 + int(name[:2]) % 2]}, {line}")
    is_right = k == 1 or k == 0 and (label == "A" or weights.count("+") > 1) and name[:2] != "1/"
    verdict = "AB"[is_right == (label == "B")]
    return answer(f"Of {line}\n{''.join(lines)}Verdict: {verdict}", 0.6 + k / 10)


def prompt(row, order, is_told=False, more=""):
    a, b = (row["chosen"], row["rejected"] + more)[:: 1 if order == "ab" else -1]
    text = f"Question: {row['prompt']}/Response A: {a}/Response B: {b}/{'Known/' * is_told}"
    return text + common.INSTRUCTIONS["critique"]


def lines_of(rows, weights, n=1, shown=int, **how):
    """First lines of n critiques of these pairs in both orders; shown: number -> the picture's."""
    return [
        f"Of {row['id']}-{order}|{k}|{shown(row['id'][:2])}|{weights}|{prompt(row, order, **how)}"
        for row, order, k in product(rows, LABEL, range(n))
    ]


def lines_in(path):
    lines = []
    for row in read_rows(path):
        lines.append(row["critique"].split("\n")[0])
        name, k, *_ = lines[-1][3:].split("|")
        assert row.get("question", row["id"]) in (name, f"{name}-{k}")
        assert (row["label"], row["verdict"]) == (LABEL[name[-2:]], row["critique"][-1])
    return lines


def start(patch, command):
    """How a judge is asked, [(weights, n, temperature, seed)]; and what is printed."""
    judge, names = Judge(write), ("weights", "n", "temperature", "seed")
    patch.setattr(common, "sample", judge.sample)
    patch.setattr(common, "CHUNK", 7)  # sequences between two saves: several in a stage
    with redirect_stdout(io.StringIO()) as said:
        run_here(f"{command} --max-new-tokens 9 --seed 5 --batch-size 4".split())
    calls = {tuple(call[name] for name in names): True for call in judge.calls}
    assert {(call["max_new_tokens"], call["batch_size"]) for call in judge.calls} <= {(9, 4)}
    return list(calls), said.getvalue()


def start_01(patch, run, expert, words, flags):
    """Rows of preferences.jsonl by their ids, and how the judge is asked, about 34 pictures."""
    (run / "images").mkdir(parents=True)
    for k in range(34):
        Image.new("RGB", (40 + k, 90), (6 * k, 240 - 6 * k, 100)).save(run / f"images/{k:02d}.png")
    write_json(run / "words.json", dict(zip(words, words)))
    fakes(patch)
    patch.setattr(one, "draw_contact_sheet", lambda *_: None)
    patch.setattr(one, "Detector", lambda *_: expert)
    patch.setattr(one.OwnAnswers, "look", lambda _, *asked: expert.look(*asked))
    flags += f" --vocabulary {run}/words.json" * bool(words) + " --validation 5 --heldout 5"
    calls, _ = start(patch, f"01_build_preferences.py --run {run} {flags}")
    rows = read_rows(run / "01_preferences/preferences.jsonl")
    return sorted(rows, key=lambda row: row["id"]), calls


@pytest.mark.parametrize("name, n_words", [("open", 37), ("own", 0), ("own", 4), ("none", 37)])
def test_01_images(tmp_path, monkeypatch, name, n_words):
    expert, flags = Expert(CLASSES if name == "own" else None), IMAGES.format(tmp_path, name)
    rows, calls = start_01(monkeypatch, tmp_path, expert, CLASSES[:n_words], flags)
    assert calls == [("", 2, 0.7, 5)] and expert.sizes == ([] if name == "none" else [32, 2])
    swaps = {tuple(names[2:]) for names in expert.looks.values()}
    assert len(swaps) == 34 or expert.classes  # each row draws its own
    replaced = set()
    for k, row in zip(range(34), rows, strict=True):
        named = ["gnu", CLASSES[1 + k % 2], *CLASSES[k + 3 : k + 3 + (k % 3 == 1)]]
        assert expert.looks[k] == CLASSES or expert.looks[k][: len(named)] == named
        text = one.WORDS["prompts"][row_seed(5, "prompt", f"{k:02d}.png") % 5]
        first, second = [f", an {named[1]}, {k:02d}-0|{i}|{k}||{text}" for i in (0, 1)]
        assert (row["image"], row["prompt"]) == (f"{k:02d}.png", text)
        assert (row["chosen"], row["evidence"][0]["confidence"]) == (f"A gnu{first}", 0.5 + k / 100)
        if k % 3 == 1 and n_words != 4:
            assert row["rejected"] == f"A gnu and a {named[2]}{second}"
        else:  # made by a swap
            replaced.add("gnu" in row["rejected"])
            assert row["rejected"].endswith(first[9:]) and row["source"] == "swapped"
    assert len(replaced) == 2
    made_with = common.read_json(tmp_path / "01_preferences/meta.json")["args"]
    assert made_with["image_root"] == "images"  # inside the run, which may be moved


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(run directory, {split: pairs}, {command: what start returns}, weights of its judges)."""
    run, records, pairs = tmp_path_factory.mktemp("run"), {}, {}
    write_jsonl(run / "questions.jsonl", WILD)
    with pytest.MonkeyPatch.context() as patch:
        start_01(patch, run, Expert(), CLASSES, IMAGES.format(run, "open"))
        for name in ("draw_accuracy", "draw_reliability"):
            patch.setattr(five, name, lambda *_: None)
        for name, command in COMMANDS.items():
            if name == "resumed":
                shutil.rmtree(run / "04_rejection/iter2/adapter")
            records[name] = start(patch, f"{command} --run {run}".replace("RUN", str(run)))
    assert torch.initial_seed() == row_seed(5, 2)  # of what is random in the last training
    for row in read_rows(run / "01_preferences/preferences.jsonl"):
        pairs.setdefault(row["split"], []).append(row)
    return run, pairs, records, ["", *(Model(x).weights for x in sorted(run.glob("0*/**/adapter")))]


@pytest.mark.parametrize("name", ["open", "none"])
def test_01_pairs(done, monkeypatch, name):
    run, pairs, expert = done[0], sum(done[1].values(), []), Expert()
    flags = f"--pairs {run}/01_preferences/preferences.jsonl --image-root {run}/images --expert"
    rows, calls = start_01(monkeypatch, run / name, expert, CLASSES, f"{flags} {name}")
    for row, pair in zip(rows, sorted(pairs, key=lambda row: row["id"]), strict=True):
        assert all(row[x] == pair[x] for x in ("id", "image", "prompt", "chosen", "rejected"))
        k, texts = int(row["id"][:2]), row["chosen"] + row["rejected"]
        assert expert.looks[k] == list(dict.fromkeys(re.findall(r"gnu|emu|ape|yak\d\d", texts)))
        assert row["evidence"][0]["confidence"] == 0.5 + k / 100
    assert calls == []


@pytest.mark.parametrize("select, numbers", [("margin", {"1"}), ("random", {"0", "1"})])
def test_02_to_04(done, select, numbers):
    run, pairs, records, [base, after, *weights] = done
    first, second = weights[:2] if select == "margin" else weights[2:]
    samples = lines_in(run / "02_critiques/samples.jsonl")
    assert samples == lines_of(pairs["train"], base, 3, is_told=True)
    validation = [lines_of(pairs["validation"], name) for name in (base, after, first, second)]
    assert lines_in(run / "03_ift/validation.jsonl") == validation[0] + validation[1]
    places = []  # of the pairs that are kept, in the sorted pools
    for t, asked in ((1, after), (2, first)):
        folder = run / f"04_rejection{'_random' * (select == 'random')}/iter{t}"
        samples, kept = lines_in(folder / "samples.jsonl"), lines_in(folder / "kept.jsonl")
        assert samples == lines_of(pairs["pool"][5 * t - 5 : 5 * t], asked, 3)
        places.append({sorted(samples).index(line) // 6 for line in kept})
        assert len(set(kept)) == 4 and {line.split("|")[1] for line in kept} == numbers
        assert lines_in(folder / "validation.jsonl") == validation[t + 1]
    assert select == "margin" or places[0] != places[1]
    assert records["02"][0] == [(base, 3, 0.7, 5)]
    assert records["03"][0] == [(base, 1, 0, 5), (after, 1, 0, 5)]
    greedy = [(name, 1, 0, 5) for name in (after, first, second)]
    sampled = [(after, 3, 0.7, row_seed(5, 1)), (first, 3, 0.7, row_seed(5, 2))]
    assert records[select][0] == [greedy[0], sampled[0], greedy[1], sampled[1], greedy[2]]
    for name in (select, "resumed"):  # the gain is against the iteration before
        assert re.findall(r"pairs: ([+-]\S+)", records[name][1]) == ["+0.500", "+0.000"]


def test_05(done):
    run, pairs, records, weights = done
    lines = lines_in(run / "05_evaluation/judgements.jsonl")
    others = {line[3:5]: int(line.split("|")[2]) for line in lines[50:60]}
    expected = [lines_of(pairs["heldout"], name) for name in weights]
    changes = {"shown": lambda k: -1 - int(k)}, {"shown": others.get}, {"more": f" {five.ATTACK}"}
    expected[4:4] = [lines_of(pairs["heldout"], weights[3], **change) for change in changes]
    assert lines == sum(expected, [])
    assert len(set(others.values())) > 2 and all(int(k) != other for k, other in others.items())
    assert records["05"][0] == [(name, 1, 0, 5) for name in weights]
    report = (run / "05_evaluation/report.md").read_text()
    shown = re.findall(r"Judged \w+: `(..).*\n\n!\[\]\((.*)\)", report)
    assert [seen(run / "05_evaluation" / file) - int(name) for name, file in shown] == [0] * 5
    lines, picks = [], []
    for k, row in enumerate(WILD):
        request = {**row, "id": str(k), "image": run / "images" / row["image"], "weights": ""}
        texts = [write(request, i)["text"] for i in range(3)]
        picks.append((row["question_id"], texts[2 * (k == 1)]))
        for (a, b), order in product(((0, 1), (0, 2), (1, 2)), LABEL):
            pair = {"prompt": row["text"], "chosen": texts[a], "rejected": texts[b]}
            lines.append(f"Of {k}/{a}-{b}-{order}|0|{9 - k}|{weights[3]}|{prompt(pair, order)}")
    assert lines_in(run / "05_evaluation_llava-wild/judgements.jsonl") == lines
    answers = read_rows(run / "05_evaluation_llava-wild/answers_judge.jsonl")
    assert [(row["question_id"], row["text"]) for row in answers] == picks
    assert records["wild"][0] == [("", 3, 1, 5), (weights[3], 1, 0, 5)]
