"""The judge as a library: README's snippet, run as it stands there."""
import copy
import math
import re
from itertools import permutations

import common
import pytest
from conftest import ROOT, stage
from PIL import Image

SNIPPET = '''from itertools import permutations
from torch import tensor
from common import build_judge_prompt, load_judge, sample
model, processor = load_judge("Qwen/Qwen2-VL-7B-Instruct", "runs/7b/04_rejection/iter3/adapter")

def reward(image, prompt, responses):
    """Two or more responses -> for each, in [0, 1], the mean of P(it wins) over the others and both orders."""
    games = list(permutations(range(len(responses)), 2))  # (index of response A, index of response B)
    asked = [{"id": f"{a}-{b}", "image": image, "text": build_judge_prompt(prompt, responses[a], responses[b])} for a, b in games]
    answers = sample(model, processor, asked, temperature=0, max_new_tokens=512)
    scores = [0.0] * len(responses)
    for (a, b), p in zip(games, tensor([answer["log_odds"] or 0.0 for [answer] in answers]).sigmoid().tolist()):
        scores[a] += p / (2 * len(responses) - 2)  # p = P(A wins); .5 where the critique has no verdict
        scores[b] += (1 - p) / (2 * len(responses) - 2)
    return scores
'''
RESPONSES = ["red circle.", "blue star, red ring.", "green heart, red cross, blue ring."]


@pytest.fixture(scope="module")
def snippet():
    """README's first python block with `def reward`, as it stands there; before it has one, the copy above."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if "def reward" in block]
    text = blocks[0] if blocks else SNIPPET
    assert len(text.strip().splitlines()) <= 15
    return text


def define_reward(snippet, model, processor, monkeypatch):
    """reward() of the snippet, whose checkpoint is replaced by (model, processor)."""
    monkeypatch.setattr(common, "load_judge", lambda *_: (model, processor))
    scope = {}
    exec(snippet, scope)
    return scope["reward"]


def test_reward_is_the_mean_probability_of_winning(snippet, monkeypatch):
    """By hand: log-odds of "the first is A" for every ordered pair of three responses; one critique has no verdict."""
    p_a = {("x", "y"): .9, ("y", "x"): .4, ("x", "z"): .5, ("z", "x"): .1, ("y", "z"): None, ("z", "y"): .2}
    asked = {common.build_judge_prompt("which?", a, b): p for (a, b), p in p_a.items()}
    seen = []

    def fake_sample(model, processor, requests, **settings):
        seen.extend(requests)
        return [[{"log_odds": None if (p := asked[r["text"]]) is None else math.log(p / (1 - p))}] for r in requests]
    monkeypatch.setattr(common, "sample", fake_sample)
    rewards = define_reward(snippet, None, None, monkeypatch)("1.png", "which?", ["x", "y", "z"])
    assert rewards == pytest.approx([(.9 + .6 + .5 + .9) / 4, (.1 + .4 + .5 + .8) / 4, (.5 + .1 + .5 + .2) / 4], abs=1e-6)
    assert len(seen) == 6 == len({r["id"] for r in seen}) and {r["image"] for r in seen} == {"1.png"}


def test_reward_of_a_trained_judge(trained, pictures, tmp_path, snippet, monkeypatch):
    """Of one that was taught to prefer the shorter response; equal to stage 03's judge on the same pairs in both orders."""
    ift, prompt = stage("03_train_ift"), "List the objects in the image."
    model, processor = copy.deepcopy(trained[0]), trained[1]
    verdicts = [{"id": a + b, "image": "1.png", "label": "AB"[len(a) > len(b)], "response": f"Verdict: {'AB'[len(a) > len(b)]}",
                 "text": common.build_judge_prompt(prompt, a, b)} for a, b in permutations(RESPONSES, 2)]
    ift.train(model, processor, verdicts, verdicts, tmp_path, steps=25, lr=1e-3, lam=0.0, bt_weight=1.0, batch_size=6, micro_batch=6,
              seed=0, image_root=pictures, max_response_tokens=64)
    reward = define_reward(snippet, model, processor, monkeypatch)
    rewards = reward(pictures / "1.png", prompt, RESPONSES)
    n = len(RESPONSES)
    assert all(type(r) is float and 0 <= r <= 1 for r in rewards) and sum(rewards) == pytest.approx(n / 2)
    pairs = [{"id": f"{i}{j}", "image": "1.png", "prompt": prompt, "chosen": RESPONSES[i], "rejected": RESPONSES[j]}
             for i in range(n) for j in range(i)]
    rows = ift.judge(model, processor, [q for pair in pairs for q in common.both_orders(pair)], pictures)
    wins = [[] for _ in RESPONSES]
    for row in rows:
        p = row["probability_a"] if row["label"] == "A" else 1 - row["probability_a"]  # P(chosen wins)
        wins[int(row["id"][0])].append(p)
        wins[int(row["id"][1])].append(1 - p)
    assert rewards == pytest.approx([sum(p) / (2 * (n - 1)) for p in wins], abs=1e-4)
    assert rewards[0] > 0.9 and 0.4 < rewards[1] < 0.6 and rewards[2] < 0.1
    # pictures in memory, as a training loop has them; the order of the responses does not matter
    again = reward(Image.open(pictures / "1.png"), prompt, RESPONSES[::-1])
    assert again[::-1] == pytest.approx(rewards, abs=1e-4)
