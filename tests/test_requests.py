"""Which row's picture, text, id, seed and settings reach a request, and to which row its answers
come back: the mains of all stages, with a judge and a detector that note what they get."""

import io
import re
import shutil
from contextlib import redirect_stdout
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import STAGES, read_rows, run_here, stage
from PIL import Image
from test_stages import KNOWN, Judge, Model, answer, fakes, pair
from transformers import BatchFeature

import common
from common import row_seed, write_json, write_jsonl

one, _, three, _, five = map(stage, STAGES)
ORDERS = ("ab", "ba")


def save_picture(path, k):  # of its own colour and size
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40 + k, 90), (6 * k, 240 - 6 * k, 100)).save(path)


def seen(image):
    """The number of the row whose picture it is; ("blank", number) of a grey one of its size."""
    picture = common.load_image(image)
    k = picture.width - 40
    return {(6 * k, 240 - 6 * k, 100): k, (128,) * 3: ("blank", k)}[picture.getpixel((20, 20))]


def start(patch, write, *command):
    """Requests, as (id, picture, text, weights, n, temperature, seed); and what was printed."""
    judge, requests = Judge(write), []
    patch.setattr(common, "sample", judge.sample)
    patch.setattr(common, "CHUNK", 7)  # sequences between two saves: several in a stage
    flags = "--max-new-tokens", "9", "--seed", "5", "--batch-size", "4"
    with redirect_stdout(io.StringIO()) as said:
        run_here([*map(str, command), *flags])
    for call in judge.calls:
        assert (call["max_new_tokens"], call["batch_size"]) == (9, 4)
        how = [call[name] for name in ("weights", "n", "temperature", "seed")]
        requests += [(x["id"], seen(x["image"]), x["text"], *how) for x in call["requests"]]
    return requests, said.getvalue()


# ---- 01 ------------------------------------------------------------------------------------------
class Expert:
    """Stands in for Detector, and for the policy that is asked instead; looks: what each picture,
    by its number, is searched for. It is surer of a gnu or an emu the higher the number."""

    device, weights = "cpu", "policy"

    def __init__(self, classes=None):
        self.classes, self.looks, self.sizes = classes, [], []

    def confidences(self, k, names):
        self.looks.append((k, names))
        return [0.5 + k / 100 if name in ("gnu", "emu") else 0.01 for name in names]

    def find(self, images, questions):
        self.sizes.append(len(images))
        found = []
        for image, names in zip(images, questions, strict=True):
            rows = zip(names, self.confidences(seen(image), names))
            found.append([{"object": name, "confidence": p} for name, p in rows])
        return found

    def __call__(self, texts, images, logits_to_keep):
        """Logits of yes, Yes, no and No."""
        (k,) = {seen(image) for image in images}
        p = self.confidences(k, [text.split()[3] for text in texts])
        return SimpleNamespace(logits=torch.tensor([[[x, 0, 1 - x, 0]] for x in p]).log())


def start_01(patch, run, write, expert, words, *flags):
    """Requests to the judge, and preferences.jsonl."""
    ids = SimpleNamespace(input_ids=[[0], [1], [2], [3]])
    policy = expert, SimpleNamespace(tokenizer=lambda *_, **__: ids)
    patch.setattr(common, "load_judge", lambda **_: policy)
    patch.setattr(common, "encode_prompts", lambda _, *x: BatchFeature(dict(zip(KEYS, x))))
    patch.setattr(one, "draw_contact_sheet", lambda *_: None)
    patch.setattr(one, "Detector", lambda *_: expert)
    write_json(run / "v.json", dict(zip(words, words)))
    if words:
        flags = [*flags, "--vocabulary", run / "v.json"]
    requests, _ = start(patch, write, "01_build_preferences.py", "--run", run, *flags)
    return requests, read_rows(run / "01_preferences" / "preferences.jsonl")


KEYS = ("texts", "images")
YAKS = [f"yak{k:02d}" for k in range(34)]


def candidate(request, k):
    """Every third picture's second response makes up a yak of its own."""
    name = request["id"]
    yak = f" and a yak{name[:2]}" if int(name[:2]) % 3 == 1 and k == 1 else ""
    return answer(f"A gnu{yak}, an emu, {name} {k}.")


@pytest.mark.parametrize("expert, n_words", [("open", 36), ("own", 0), ("own", 3), ("none", 36)])
def test_01_images(tmp_path, monkeypatch, expert, n_words):
    names = ["gnu", "emu", *YAKS]
    asked = Expert(names if expert == "own" else None)
    for k in range(34):
        save_picture(tmp_path / "pictures" / f"{k:02d}.png", k)
    (tmp_path / "prompts.txt").write_text("\n".join(f"Prompt {i}?" for i in range(99)))
    flags = ["--images", tmp_path / "pictures", "--prompts", tmp_path / "prompts.txt", "--expert"]
    flags += [expert, "--candidates", 2, "--temperature", 0.7]
    requests, rows = start_01(monkeypatch, tmp_path, candidate, asked, names[:n_words], *flags)
    prompts = [f"Prompt {row_seed(5, 'prompt', f'{k:02d}.png') % 99}?" for k in range(34)]
    assert requests == [(f"{k:02d}-0", k, prompts[k], "policy", 2, 0.7, 5) for k in range(34)]
    looks, replaced = dict(asked.looks), set()
    assert asked.sizes == ([] if expert == "none" else [32, 2]) and len(looks) == 34
    assert asked.classes or len({tuple(names[2:]) for names in looks.values()}) == 34  # own swaps
    for k, row in enumerate(sorted(rows, key=lambda row: row["id"])):
        named = ["gnu", "emu", *YAKS[k : k + (k % 3 == 1)]]
        assert looks[k] == names if asked.classes else looks[k][: len(named)] == named
        texts = [candidate(row, i)["text"] for i in (0, 1)]
        assert (row["image"], row["prompt"], row["chosen"]) == (f"{k:02d}.png", prompts[k], texts[0])
        assert row["evidence"][0]["confidence"] == pytest.approx(0.5 + k / 100)  # of the gnu
        if k % 3 == 1 and n_words != 3:
            assert (row["rejected"], row["hallucinated"]) == (texts[1], [YAKS[k]])
        else:  # made by a swap
            replaced.add("gnu" in row["rejected"])
            assert row["rejected"].endswith(f", {row['id']} 0.") and row["source"] == "swapped"
    assert len(rows) == 34 and len(replaced) == 2


@pytest.mark.parametrize("expert", ["open", "none"])
def test_01_pairs(tmp_path, monkeypatch, expert):
    """Of five pairs two are of one picture."""
    pairs, asked = [], Expert()
    for k, yak in enumerate(YAKS[:5]):
        save_picture(tmp_path / f"{k % 4}.png", k % 4)
        row = {"id": f"p{k}", "image": f"{k % 4}.png", "prompt": f"Prompt {k}?"}
        pairs.append({**row, "chosen": f"{k}, a gnu.", "rejected": f"{k}, a gnu and a {yak}."})
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    flags = ["--pairs", tmp_path / "pairs.jsonl", "--expert", expert]
    requests, rows = start_01(monkeypatch, tmp_path, None, asked, ["gnu", *YAKS], *flags)
    looks = [(0, ["gnu", YAKS[0], YAKS[4]]), *((k, ["gnu", YAKS[k]]) for k in (1, 2, 3))]
    assert asked.looks == looks and requests == [] and len(rows) == 5
    for row in rows:
        k = int(row["id"][1])
        assert pairs[k].items() <= row.items() and row["hallucinated"] == [YAKS[k]]
        assert [found["confidence"] for found in row["evidence"]] == [0.5 + k % 4 / 100, 0.01]


# ---- 02 to 05, on one run ------------------------------------------------------------------------
SPLITS = dict(zip("vhtp", ("validation", "heldout", "train", "pool")))
NAMES = [f"{split}{i}" for i in range(10) for split in SPLITS if i < 5 or split == "p"]
V, H, T, P = ([name for name in NAMES if name[0] == split] for split in SPLITS)


def responses(name, order, more=""):
    """A and B to the question about a picture, of many lengths."""
    chosen = f"A dog{' indeed' * (NAMES.index(name) % 4)}, {name}."
    return (chosen, f"A dog and a yak{name}.{more}")[:: 1 if order == "ab" else -1]


def reference(name, order):
    """True checks of them, and the right verdict."""
    if order == "ab":
        return f"A: dog: yes\nB: dog: yes\nB: yak{name}: no\nVerdict: A"
    return f"A: dog: yes\nA: yak{name}: no\nB: dog: yes\nVerdict: B"


def critique(request, k):
    """The third one's verdict is wrong; and of those of validation and held-out pairs the more are
    right the more often the judge has been trained."""
    name, order = request["id"].split("-")[:2]
    text, n_right = reference(name, order), (1, 2, 3, 5)[request["weights"].count("+")]
    if (k == 2) == (name[0] in "tp" or int(name[1]) < n_right):
        text = text[:-1] + ("B" if text[-1] == "A" else "A")
    text = f"Of {request['id']}, {k}, by {request['weights']}.\n{text}"
    return answer(text, 0.6 + k / 10 + NAMES.index(name) / 500)


def about(names, weights, n=1, temperature=0.0, seed=5, is_guided=False, more="", shown=None):
    """What requests about these pairs must be, in order; shown: {name: another picture}."""
    requests = []
    for name, order in product(names, ORDERS):
        a, b = responses(name, order, more)
        text = f"Question: What is in picture {name}?\nResponse A: {a}\nResponse B: {b}\n"
        text += f"{KNOWN}{reference(name, order)}\n" * is_guided + common.INSTRUCTIONS["critique"]
        picture = shown[name] if shown else NAMES.index(name)
        requests.append((f"{name}-{order}", picture, text, weights, n, temperature, seed))
    return requests


def written(names, weights):
    """What samples.jsonl must hold: three answers to each question."""
    rows = []
    for name, order, k in product(names, ORDERS, range(3)):
        sample = critique({"id": f"{name}-{order}", "weights": weights}, k)
        rows.append((f"{name}-{order}-{k}", f"images/{name}.png", *responses(name, order), sample["text"], sample["log_odds"]))
    return rows


def judged(names, condition, weights, votes=1):
    """What judgement rows must be."""
    rows = []
    for name, order in product(names, ORDERS):
        answers = [critique({"id": f"{name}-{order}", "weights": weights}, k) for k in range(votes)]
        row = (f"{name}-{order}", condition, f"images/{name}.png", reference(name, order)[-1])
        rows.append((*row, answers[0]["text"], *three.decide(answers)))
    return rows


SAMPLE = "id image response_a response_b critique log_odds"
JUDGED = "question condition image label critique verdict probability_a"


def fields(path, names):
    return [tuple(row[name] for name in names.split()) for row in read_rows(path)]


TRAIN = "--train-batch 6 --micro-batch 4 --no-checkpoint-activations"
FOUR = "04_rejection_sampling.py --iterations 2 --pool 5 --samples 3 --temperature 0.7"
COMMANDS = {
    "02": "02_generate_critiques.py --critiques 3 --temperature 0.7",
    "03": f"03_train_ift.py {TRAIN}",
    "margin": f"{FOUR} --retention 0.6 {TRAIN}",
    "random": f"{FOUR} --retention 0.6 {TRAIN} --select random",
    "resumed": f"{FOUR} --retention 0.6 {TRAIN}",
    "05": "05_evaluate.py --votes 3 --attack",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(run directory, {command: (requests, what was printed, trainings)})."""
    run, rows, records = tmp_path_factory.mktemp("requests"), [], {}
    for k, name in enumerate(NAMES):
        save_picture(run / "images" / f"{name}.png", k)
        rows.append(pair(name, name, SPLITS[name[0]]))
        rows[-1]["chosen"], rows[-1]["rejected"] = responses(name, "ab")
        rows[-1]["evidence"][1]["object"] = f"yak{name}"
    first = {"model": "a/model", "image_root": str(run), "max_image_tokens": 77}
    folder = run / "01_preferences"
    folder.mkdir()
    write_json(folder / "meta.json", {"args": first})
    write_json(folder / "vocabulary.json", {"dog": "dog", **{f"yak{x}": f"yak{x}" for x in NAMES}})
    write_jsonl(folder / "preferences.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        _, trainings = fakes(patch)
        patch.setattr(three, "encode_supervised", lambda _, *columns: columns)
        patch.setattr(five, "draw_accuracy", lambda *_: None)
        for name, command in COMMANDS.items():
            if name == "resumed":
                shutil.rmtree(run / "04_rejection" / "iter2" / "adapter")
            n = len(trainings)
            records[name] = *start(patch, critique, *command.split(), "--run", run), trainings[n:]
    return run, records


def test_02(done):
    run, records = done
    assert records["02"][0] == about(T, "", 3, 0.7, is_guided=True)
    assert fields(run / "02_critiques" / "samples.jsonl", SAMPLE) == written(T, "")


def weights_of(run, *folders):
    return [Model(run / folder / "adapter").weights for folder in folders]


def check_batches(training):
    """Each row of two steps has its own picture, prompt and response."""
    texts = {request[0]: request[2] for request in about(NAMES, "")}
    ...
