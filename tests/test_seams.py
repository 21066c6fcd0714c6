"""The judge in other people's hands: the README's blocks, run as they stand there."""

import copy
import importlib.util
import itertools
import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from conftest import ROOT, WORLD, stage
from PIL import Image

import common

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n((?:(?!```).)*)```", TEXT, re.DOTALL)
PROMPT = "List the objects in the image."
RESPONSES = ["red circle.", "blue star, red ring.", "green heart, red cross, blue ring."]


def run_block(word, **replaced):
    """What the one block with this word defines, after texts in it are replaced."""
    (block,) = [block for block in BLOCKS if word in block]
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, str(new))
    scope = {"__name__": "block"}
    exec(block, scope)
    return scope


# ---- A reward, for Best-of-N and TRL's GRPO ------------------------------------------------------
@pytest.fixture
def define(monkeypatch):
    """define(model, processor) -> what the block defines, with this judge."""

    def define(*loaded):
        monkeypatch.setattr(common, "load_judge", lambda *_: loaded)
        return run_block("def reward")

    return define


P_A = {"xy": 0.9, "yx": 0.4, "xz": 0.5, "zx": 0.1, "yz": None, "zy": 0.2}  # yz: no verdict


@pytest.fixture
def answered(monkeypatch):
    """[requests] of a judge with P(A) as in P_A."""
    p_of_text = {common.build_judge_prompt("which?", *pair): p for pair, p in P_A.items()}
    seen = []

    def fake_sample(model, processor, requests, **settings):
        assert settings["temperature"] == 0
        seen.extend(requests)
        for request in requests:
            p = p_of_text[request["text"]]
            yield [{"log_odds": p and math.log(p / (1 - p)), "verdict": p and "AB"[p < 0.5]}]

    monkeypatch.setattr(common, "sample", fake_sample)
    return seen


def test_a_reward_is_the_mean_probability_of_winning(define, answered):
    """By hand, from P(A) for every ordered pair of responses."""
    block = define(None, None)
    rewards = block["compare"]("1.png", "which?", ["x", "y", "z"])
    wins = [0.9 + 0.6 + 0.5 + 0.9, 0.1 + 0.4 + 0.5 + 0.8, 0.5 + 0.1 + 0.5 + 0.2]
    assert rewards == pytest.approx([x / 4 for x in wins], abs=1e-6)
    assert [request["image"] for request in answered] == ["1.png"] * 6
    with pytest.raises(ValueError, match="two or more completions"):
        block["compare"]("1.png", "which?", ["x"])


def turn(role, text):
    return [{"role": role, "content": text}]


def test_completions_of_a_prompt_are_compared_with_each_other(define, answered):
    """TRL's signature: two prompts of one text about two pictures, two completions each, the
    second's in blocks, as TRL hands on what has a picture."""
    red, blue = Image.new("RGB", (3, 3), "red"), Image.new("RGB", (3, 3), "blue")
    blocks = [{"type": "image", "image": blue}, {"type": "text", "text": "which?"}]
    prompts = [turn("user", "which?")] * 2 + [turn("user", blocks)] * 2
    completions = [turn("assistant", text) for text in "xyyz"]
    images = [[red.copy()], [red], [blue], [blue.copy()]]
    rewards = define(None, None)["reward"](prompts, completions, images, trainer_state=None)
    x, y = (0.9 + 0.6) / 2, (0.5 + 0.8) / 2
    assert rewards == pytest.approx([x, 1 - x, y, 1 - y], abs=1e-6)
    assert [request["image"] for request in answered] == [red] * 2 + [blue] * 2


def test_a_reward_is_what_stage_05_measures(trained, pictures, define, tmp_path):
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
    compare = define(*trained)["compare"]
    for picture in (pictures / "1.png", Image.open(pictures / "1.png")):
        assert compare(picture, PROMPT, RESPONSES) == pytest.approx(wins, abs=1e-3)


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="TRL is not installed")
def test_grpo_takes_the_reward(tiny, pictures, define, tmp_path, monkeypatch):
    import trl
    from datasets import Dataset

    reward, seen = define(*tiny)["reward"], []

    def recorded(prompts, completions, images, **columns):
        seen.append([[x.size for x in of_row] for of_row in images])
        rewards = reward(prompts, completions, images, **columns)
        assert len(rewards) == len(prompts) and sum(rewards) == pytest.approx(len(rewards) / 2)
        return rewards

    rows = [
        {"prompt": turn("user", PROMPT), "images": [Image.open(pictures / f"{i}.png")]}
        for i in (1, 2)
    ]
    how = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "num_generations": 2,
        "report_to": "none",
    }
    how |= {"per_device_train_batch_size": 4, "max_completion_length": 4, "save_strategy": "no"}
    args = trl.GRPOConfig(str(tmp_path), **how)
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    how = {"train_dataset": Dataset.from_list(rows), "processing_class": processor}
    trl.GRPOTrainer(model, recorded, args, **how).train()
    assert sorted(sum(sum(seen, []), [])) == [(56, 112)] * 2 + [(140, 56)] * 2


# ---- Merged, and asked by transformers alone -----------------------------------------------------
def test_the_judge_is_merged_and_asked_without_this_repository(tmp_path, monkeypatch, capsys):
    """The merged judge writes what the judge with its adapter writes."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    shutil.copytree(WORLD / "model", tmp_path / "base")
    model, processor = common.load_judge("base", device="cpu")
    targets = stage("03_train_ift").LORA_TARGETS
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, config)
    model.save_pretrained("adapter")
    replaced = {"Qwen/Qwen2-VL-7B-Instruct": "base", "bfloat16": "float32"}
    run_block("merge_and_unload", **replaced, **{"runs/7b/04_rejection/iter3/adapter": "adapter"})
    Image.new("RGB", (84, 84), "red").save("table.jpg")
    run_block("do_sample=False", **{"max_new_tokens=512": "max_new_tokens=8"})
    written = capsys.readouterr().out
    text = common.build_judge_prompt("What is on the table?", "A cup.", "A cup and a spoon.")
    request = {"id": "0", "image": "table.jpg", "text": text}
    for adapter in ("adapter", None):
        loaded = common.load_judge("base", adapter, device="cpu")
        [[answer]] = common.sample(*loaded, [request], temperature=0, max_new_tokens=8)
        assert answer["text"].strip(), repr(answer)
        assert written.endswith(f"\n{answer['text']}\n") == (adapter == "adapter")


# ---- Findings made elsewhere ---------------------------------------------------------------------
def test_coco_results_become_findings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {"images": [{"id": 7, "file_name": "a b.jpg"}, {"id": 8, "file_name": "c.jpg"}]}
    known["categories"] = [{"id": 1, "name": "dog"}, {"id": 18, "name": "cat"}]
    found = [{"image_id": 7, "category_id": 18, "bbox": [1, 2, 10, 20], "score": 0.5}]
    (tmp_path / "annotations.json").write_text(json.dumps(known))
    (tmp_path / "coco_instances_results.json").write_text(json.dumps(found))
    run_block("coco_instances_results")
    one = stage("01_build_preferences")
    findings = one.read_detections("detections.jsonl", one.COCO_VOCABULARY)
    cat = {"object": "cat", "confidence": 0.5, "box": [1, 2, 11, 22]}
    assert findings["a b.jpg"]["detections"] == [cat] and findings["c.jpg"]["detections"] == []


# ---- A server that writes ------------------------------------------------------------------------
def recorded(words, odds, reason="stop"):
    """A choice as vLLM answers; odds: {token: probability} at the token "B" or " B"."""
    tokens = []
    for word in words:
        at = odds if word.strip() == "B" else {word: 0.9}
        top = [{"token": token, "logprob": math.log(p)} for token, p in at.items()]
        tokens.append({"token": word, "logprob": top[0]["logprob"], "top_logprobs": top})
    message = {"role": "assistant", "content": "".join(words)}
    return {"message": message, "logprobs": {"content": tokens}, "finish_reason": reason}


CRITIQUE = ["A", ":", " a", " B", " dog", ":", " no", "\n", "Verdict", ":", " B"]
ODDS = {" B": 0.6, " A": 0.3, "B": 0.05, "A": 0.01}


def test_a_server_writes(tmp_path):
    """The block against a server with a recorded answer: requests as vLLM takes them, Answers of
    three kinds; a verdict after which only one letter is listed."""
    asked = []
    choices = [recorded(CRITIQUE, ODDS), recorded(CRITIQUE[:3], {}, "length")]
    choices.append(recorded(["Verdict", ":", " B", "<end>"], {" B": 0.9, " C": 0.02}))

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": choices}).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("localhost", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    block = run_block("def answer_of", **{":8000": f":{server.server_port}"})
    Image.new("RGB", (3, 3), "red").save(tmp_path / "red.png")
    request = {"id": "x", "image": tmp_path / "red.png", "text": "which?"}
    with common.progress_bar(total=1) as bar:
        how = {"n": 3, "temperature": 0.5, "max_new_tokens": 9, "seed": 4, "bar": bar}
        [answers] = block["sample"](block["URL"], block["MODEL"], [request], batch_size=8, **how)
    server.shutdown()
    assert answers[0].pop("log_odds") == pytest.approx(math.log(0.3 / 0.6))
    assert answers[2].pop("log_odds") == pytest.approx(math.log(0.02 / 0.9))
    whole = {"text": "".join(CRITIQUE), "complete": True, "verdict": "B"}
    cut = {"text": "A: a", "complete": False, "verdict": None, "log_odds": None}
    assert answers == [whole, cut, {**whole, "text": "Verdict: B<end>"}]
    [body] = asked
    [picture, text] = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "which?"} and body["model"] == block["MODEL"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert (body["n"], body["temperature"], body["max_tokens"]) == (3, 0.5, 9)
    assert body["seed"] == common.row_seed(4, "x") % 2**31 and body["logprobs"] is True
