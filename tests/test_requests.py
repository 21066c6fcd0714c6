"""Which row's picture, text, id, seed and settings reach a request, and to which row its answers
come back: the mains of all stages, with a judge and a detector that note what they get."""

import io
import math
import re
import shutil
from contextlib import redirect_stdout
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import STAGES, read_rows, run_here, stage
from PIL import Image
from test_stages import KNOWN, Judge, Model, answer, fakes, tokenizer
from transformers import BatchFeature

import common
from common import row_seed

one, two, three, four, five = map(stage, STAGES)
SETTINGS = {"max_new_tokens": 9, "seed": 5, "batch_size": 4}
FLAGS = "--max-new-tokens 9 --seed 5 --batch-size 4"


# ---- Pictures, of a colour and a size each, and who tells them by these --------------------------
def save_picture(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40 + k, 90 - k), (6 * k, 240 - 6 * k, 100)).save(path)


def number(image):
    """Of which row a picture is, by its colour; None: of none."""
    red, green, blue = common.load_image(image).getpixel((20, 20))
    return red // 6 if (red + green, blue) == (240, 100) else None


def encode(processor, texts, images):
    return BatchFeature({"texts": texts, "numbers": [number(image) for image in images]})


class Expert:
    """Stands in for Detector, and for the policy that is asked instead; looks: what each picture,
    by its number, is searched for. It is surer of a gnu and of an emu the higher the number."""

    device, weights = "cpu", "policy"
    generation_config = SimpleNamespace(eos_token_id=[97])

    def __init__(self, classes=None):
        self.classes, self.looks, self.sizes = classes, [], []

    def confidences(self, k, names):
        self.looks.append((k, names))
        return [0.5 + k / 100 if name in ("gnu", "emu") else 0.01 for name in names]

    def find(self, images, questions):
        self.sizes.append(len(images))
        found = []
        for image, names in zip(images, questions, strict=True):
            rows = zip(names, self.confidences(number(image), names))
            found.append([{"object": name, "confidence": p} for name, p in rows])
        return found

    def __call__(self, texts, numbers, logits_to_keep):
        """Logits of yes, Yes, no and No."""
        assert numbers == [numbers[0]] * len(texts)
        p = self.confidences(numbers[0], [text.split()[3] for text in texts])
        return SimpleNamespace(logits=torch.tensor([[[x, 0, 1 - x, 0]] for x in p]).log())


def words(texts, add_special_tokens):
    return SimpleNamespace(input_ids=[[k] for k in range(len(texts))])


words.eos_token_id = 97


# ---- common.sample, and 01 -----------------------------------------------------------------------
def test_sample_sorts_by_length_and_back(monkeypatch, tmp_path):
    texts, sizes = [f"{k}{' long' * (3 * k % 5)}" for k in range(5)], []

    def sample_batch(model, inputs, uniforms, temperature, *ids):
        tokens = []
        for text, k, of_prompt in zip(*inputs.values(), uniforms, strict=True):
            generator = torch.Generator().manual_seed(row_seed(5, f"q{k}"))
            assert torch.equal(of_prompt, torch.rand(2, 6, generator=generator))
            assert (text, temperature) == (texts[k], 0.7)
            tokens += [[k, 0], [k, 1]]
        sizes.append(len(uniforms))
        return torch.tensor(tokens), torch.tensor(tokens) + 9

    monkeypatch.setattr(common, "encode_prompts", encode)
    monkeypatch.setattr(common, "sample_batch", sample_batch)
    monkeypatch.setattr(common, "finish_sample", lambda _, x, y, __: (x + y).tolist())
    requests = []
    for k in (3, 0, 4, 1, 2):
        save_picture(tmp_path / f"{k}.png", k)
        requests.append({"id": f"q{k}", "image": tmp_path / f"{k}.png", "text": texts[k]})
    how = {"n": 2, "temperature": 0.7, "max_new_tokens": 6, "seed": 5, "batch_size": 4}
    answers = common.sample(Expert(), SimpleNamespace(tokenizer=words), requests, **how)
    assert answers == [[[2 * k + 9, 2 * i + 9] for i in (0, 1)] for k in (3, 0, 4, 1, 2)]
    assert sizes == [2, 2, 1]


YAKS = [f"yak{k:02d}" for k in range(34)]


def candidate(request, k):
    """Every third picture's second response makes up a yak of its own."""
    name = request["id"]
    yak = f" and a yak{name[:2]}" if int(name[:2]) % 3 == 1 and k == 1 else ""
    return answer(f"A gnu{yak}, an emu, {name} {k}.")


def start_01(tmp_path, monkeypatch, expert, words_of_vocabulary, *flags):
    """What the judge was asked, and stage 01's rows."""
    judge = Judge(candidate)
    processor = SimpleNamespace(tokenizer=words)
    monkeypatch.setattr(common, "load_judge", lambda **_: (expert, processor))
    monkeypatch.setattr(common, "sample", judge.sample)
    monkeypatch.setattr(common, "encode_prompts", encode)
    monkeypatch.setattr(one, "draw_contact_sheet", lambda *_: None)
    monkeypatch.setattr(one, "Detector", lambda *_: expert)
    if words_of_vocabulary:
        common.write_json(tmp_path / "v.json", {word: word for word in words_of_vocabulary})
        flags = (*flags, "--vocabulary", tmp_path / "v.json")
    command = ["01_build_preferences.py", *FLAGS.split(), "--run", tmp_path / "run", *flags]
    run_here([str(word) for word in command])
    return judge, read_rows(tmp_path / "run/01_preferences/preferences.jsonl")


def confidences(row):
    return {found["object"]: found["confidence"] for found in row["evidence"]}


@pytest.mark.parametrize("expert, n_words", [("open", 36), ("own", 0), ("own", 3), ("none", 36)])
def test_01_images(tmp_path, monkeypatch, expert, n_words):
    names = ["gnu", "emu", *YAKS]
    asked = Expert(names if expert == "own" else None)
    for k in range(34):
        save_picture(tmp_path / "pictures" / f"{k:02d}.png", k)
    (tmp_path / "prompts.txt").write_text("\n".join(f"Prompt {i}?" for i in range(99)))
    flags = ["--images", tmp_path / "pictures", "--prompts", tmp_path / "prompts.txt", "--expert"]
    flags += [expert, "--candidates", 2, "--temperature", 0.7]
    monkeypatch.setattr(common, "CHUNK", 10)  # sequences between two saves
    judge, rows = start_01(tmp_path, monkeypatch, asked, names[:n_words], *flags)
    prompts = [f"Prompt {row_seed(5, 'prompt', f'{k:02d}.png') % 99}?" for k in range(34)]
    expected = [(f"{k:02d}-0", k, prompts[k]) for k in range(34)]
    assert [(x["id"], number(x["image"]), x["text"]) for x in judge.requests()] == expected
    for call in judge.calls:
        assert {**SETTINGS, "n": 2, "temperature": 0.7}.items() <= call.items()
    looks = dict(asked.looks)
    assert asked.sizes == ([] if expert == "none" else [32, 2]) and len(looks) == 34
    for k in range(34):
        named = ["gnu", "emu", *YAKS[k : k + (k % 3 == 1)]]
        assert looks[k] == names if asked.classes else looks[k][: len(named)] == named
    assert asked.classes or len({tuple(names[2:]) for names in looks.values()}) == 34  # own swaps
    replaced = set()
    for row in rows:
        k = int(row["id"][:2])
        texts = [candidate(row, i)["text"] for i in (0, 1)]
        assert (row["image"], row["prompt"], row["chosen"]) == (f"{k:02d}.png", prompts[k], texts[0])
        assert confidences(row)["gnu"] == pytest.approx(0.5 + k / 100)
        if k % 3 == 1 and n_words != 3:
            assert (row["rejected"], row["hallucinated"]) == (texts[1], [YAKS[k]])
        else:  # made by a swap
            replaced.add("gnu" in row["rejected"])
            assert row["rejected"].endswith(f", {row['id']} 0.") and row["source"] == "swapped"
    assert len(rows) == 34 and len(replaced) == 2
