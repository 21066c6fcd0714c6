"""The judge as a library: README's snippet, run as it stands there."""

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
    """define_reward(model, processor) -> reward() of the README's block, with this checkpoint."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (snippet,) = [block for block in blocks if "def reward" in block]
    assert len(snippet.strip().splitlines()) <= 35

    def define(model, processor):
        monkeypatch.setattr(common, "load_judge", lambda *_: (model, processor))
        scope = {}
        exec(snippet, scope)
        return scope["reward"]

    return define


def test_reward_is_the_mean_probability_of_winning(define_reward, monkeypatch):
    """By hand: P(A wins) for every ordered pair of three responses; one critique has no verdict."""
    p_a = {("x", "y"): 0.9, ("y", "x"): 0.4, ("x", "z"): 0.5}
    p_a |= {("z", "x"): 0.1, ("y", "z"): None, ("z", "y"): 0.2}
    p_of_text = {common.build_judge_prompt("which?", a, b): p for (a, b), p in p_a.items()}
    seen = []

    def fake_sample(model, processor, requests, **settings):
        assert settings["temperature"] == 0
        seen.extend(requests)
        answers = []
        for request in requests:
            p = p_of_text[request["text"]]
            answers.append([{"log_odds": None if p is None else math.log(p / (1 - p))}])
        return answers

    monkeypatch.setattr(common, "sample", fake_sample)
    rewards = define_reward(None, None)("1.png", "which?", ["x", "y", "z"])
    x, y = (0.9 + 0.6 + 0.5 + 0.9) / 4, (0.1 + 0.4 + 0.5 + 0.8) / 4
    assert rewards == pytest.approx([x, y, (0.5 + 0.1 + 0.5 + 0.2) / 4], abs=1e-6)
    assert len(seen) == 6 == len({request["id"] for request in seen})
    assert {request["image"] for request in seen} == {"1.png"}


def test_reward_of_a_judge_is_what_stage_03_measures(trained, pictures, define_reward, tmp_path):
    """From the same pairs in both orders; also of pictures in memory, as a training loop has."""
    three = stage("03_train_ift")
    model, processor = trained
    reward = define_reward(model, processor)
    rewards = reward(pictures / "1.png", PROMPT, RESPONSES)
    n = len(RESPONSES)
    assert all(type(r) is float and 0 <= r <= 1 for r in rewards)
    assert sum(rewards) == pytest.approx(n / 2)

    questions = []
    for i in range(n):
        for j in range(i):
            pair = {"id": f"{i}{j}", "image": "1.png", "prompt": PROMPT}
            pair |= {"chosen": RESPONSES[i], "rejected": RESPONSES[j]}
            questions += common.both_orders(pair)
    writer = common.RowWriter(tmp_path / "rows.jsonl", key=("condition", "question"))
    rows = three.judge(
        model, processor, questions, writer, "x", image_root=pictures, style="critique"
    )
    wins = [[] for _ in RESPONSES]
    for row in rows:
        p = row["probability_a"] if row["label"] == "A" else 1 - row["probability_a"]
        wins[int(row["id"][0])].append(p)  # the chosen
        wins[int(row["id"][1])].append(1 - p)
    expected = [sum(p) / (2 * (n - 1)) for p in wins]
    assert rewards == pytest.approx(expected, abs=1e-3) and max(rewards) - min(rewards) > 0.01

    again = reward(Image.open(pictures / "1.png"), PROMPT, RESPONSES)
    assert again == pytest.approx(rewards, abs=1e-3)
