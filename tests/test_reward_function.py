"""The judge as a library: README's block, run as it stands there."""

import itertools
import math
import re

import pytest
from conftest import ROOT, stage
from PIL import Image

import common

PROMPT = "List the objects in the image."
RESPONSES = ["red circle.", "blue star, red ring.", "green heart, red cross, blue ring."]


@pytest.fixture
def define_reward(monkeypatch):
    """define_reward(model, processor) -> reward() of the README's block, with this judge."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n((?:(?!```).)*def reward.*?)```", text, re.DOTALL)

    def define(*loaded):
        scope = {}
        monkeypatch.setattr(common, "load_judge", lambda *_: loaded)
        exec(block, scope)
        return scope["reward"]

    return define


def test_reward_is_the_mean_probability_of_winning(define_reward, monkeypatch):
    """By hand, from P(A) for every ordered pair of responses; one critique has no verdict."""
    p_a = {"xy": 0.9, "yx": 0.4, "xz": 0.5, "zx": 0.1, "yz": None, "zy": 0.2}
    p_of_text = {common.build_judge_prompt("which?", *pair): p for pair, p in p_a.items()}
    seen = []

    def fake_sample(model, processor, requests, **settings):
        assert settings["temperature"] == 0
        seen.extend(requests)
        for request in requests:
            p = p_of_text[request["text"]]
            yield [{"log_odds": p and math.log(p / (1 - p)), "verdict": p and "AB"[p < 0.5]}]

    monkeypatch.setattr(common, "sample", fake_sample)
    rewards = define_reward(None, None)("1.png", "which?", ["x", "y", "z"])
    wins = [0.9 + 0.6 + 0.5 + 0.9, 0.1 + 0.4 + 0.5 + 0.8, 0.5 + 0.1 + 0.5 + 0.2]
    assert rewards == pytest.approx([x / 4 for x in wins], abs=1e-6)
    assert [request["image"] for request in seen] == ["1.png"] * 6


def test_reward_is_what_stage_05_measures(trained, pictures, define_reward, tmp_path):
    """From the same pairs in both orders; also of a picture in memory, as a training loop has."""
    questions = []
    for a, b in itertools.combinations(range(3), 2):
        pair = {"id": f"{a}{b}", "chosen": RESPONSES[a], "rejected": RESPONSES[b]}
        questions += common.both_orders({**pair, "image": "1.png", "prompt": PROMPT})
    judge = common.Judge("model")
    judge.loaded = trained
    how = {"style": "critique", "max_new_tokens": 512, "seed": 0, "batch_size": 8, "condition": ""}
    how["image_root"] = pictures
    rows = stage("03_train_ift").judge_pairs(tmp_path / "answers.jsonl", judge, questions, **how)
    wins = [0.0] * 3
    for row in rows:
        p = row["probability_a"] if row["label"] == "A" else 1 - row["probability_a"]
        wins[int(row["id"][0])] += p / 4  # two games in both orders
        wins[int(row["id"][1])] += (1 - p) / 4
    assert sum(wins) == pytest.approx(1.5) and max(wins) - min(wins) > 0.01
    for picture in (pictures / "1.png", Image.open(pictures / "1.png")):
        assert define_reward(*trained)(picture, PROMPT, RESPONSES) == pytest.approx(wins, abs=1e-3)
