"""The judge as a library: README's block, run as it stands there."""

import itertools
import math
import re

import pytest
from conftest import ROOT, stage
from PIL import Image

import common

RESPONSES = ["red circle.", "blue star, red ring.", "green heart, red cross, blue ring."]
PROMPT = "List the objects in the image."


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
    """By hand: P(A) for every ordered pair of three responses; one critique has no verdict."""
    p_a = {("x", "y"): 0.9, ("y", "x"): 0.4, ("x", "z"): 0.5}
    p_a |= {("z", "x"): 0.1, ("y", "z"): None, ("z", "y"): 0.2}
    p_of_text = {common.build_judge_prompt("which?", a, b): p for (a, b), p in p_a.items()}
    seen = []

    def fake_sample(model, processor, requests, **settings):
        assert settings["temperature"] == 0
        seen.extend(requests)
        for p in (p_of_text[request["text"]] for request in requests):
            log_odds = None if p is None else math.log(p / (1 - p))
            yield [{"log_odds": log_odds, "verdict": log_odds and "AB"[log_odds < 0]}]

    monkeypatch.setattr(common, "sample", fake_sample)
    rewards = define_reward(None, None)("1.png", "which?", ["x", "y", "z"])
    x, y = (0.9 + 0.6 + 0.5 + 0.9) / 4, (0.1 + 0.4 + 0.5 + 0.8) / 4
    assert rewards == pytest.approx([x, y, (0.5 + 0.1 + 0.5 + 0.2) / 4], abs=1e-6)
    assert len(seen) == 6 and {request["image"] for request in seen} == {"1.png"}


def test_reward_is_what_stage_05_measures(trained, pictures, define_reward, tmp_path):
    """From the same pairs in both orders; also of a picture in memory, as a training loop has."""
    questions = []
    for a, b in itertools.combinations(range(3), 2):
        pair = {"id": f"{a}{b}", "image": "1.png", "prompt": PROMPT}
        pair |= {"chosen": RESPONSES[a], "rejected": RESPONSES[b]}
        questions += common.both_orders(pair)
    judge = common.Judge(tmp_path, "model")
    judge.loaded = trained
    how = {"style": "critique", "max_new_tokens": 512, "seed": 0, "batch_size": 8}
    path = tmp_path / "answers.jsonl"
    rows = stage("03_train_ift").judge_pairs(path, judge, questions, "", image_root=pictures, **how)
    wins = [0.0, 0.0, 0.0]
    for row in rows:
        p = row["probability_a"] if row["label"] == "A" else 1 - row["probability_a"]
        a, b = map(int, row["id"])
        wins[a] += p / 4  # two games in both orders
        wins[b] += (1 - p) / 4
    reward = define_reward(*trained)
    assert sum(wins) == pytest.approx(1.5) and max(wins) - min(wins) > 0.01
    for picture in (pictures / "1.png", Image.open(pictures / "1.png")):
        assert reward(picture, PROMPT, RESPONSES) == pytest.approx(wins, abs=1e-3)
