"""What all tests share: imports of the numbered scripts, a tiny model with random weights, and the
shipped toy world. Nothing is trained here: where a training from random weights ends differs from
processor to processor."""

import copy
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from demo import ROOT, WORLD
from PIL import Image

sys.path.insert(0, str(ROOT))
STAGES = tuple(sorted(path.stem for path in ROOT.glob("0?_*.py")))
stage = importlib.import_module  # a name that starts with a digit has no import statement
common = stage("common")
EPSILON = 1e-3  # largest difference in nats between two ways to compute a number in float32


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: runs stages on a toy world; -m "not slow" leaves out')
    # The models are tiny: a second thread waits for its turn where the other core is busy.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


# ---- Models and pictures -------------------------------------------------------------------------
@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder with 0.png .. 3.png of three sizes: image tokens and positions differ between rows."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((84, 84), (140, 56), (56, 112), (84, 84))):
        Image.new("RGB", size, (60 * i, 200 - 50 * i, 90)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(model, processor) as a user loads them, random weights. Never change the model: copy it."""
    from build_world import build_model, build_processor

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and weight.dim() == 2:
                weight.mul_(8)  # else the last token decides alone: one answer to every prompt
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return common.load_judge(str(folder), device="cpu")


@pytest.fixture(scope="session")
def trained():
    """(model, processor): the shipped judge, which writes critiques and verdicts and stops."""
    return common.load_judge(str(WORLD / "model"), device="cpu")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with pictures and held-out pairs, and copies of the shipped model/ and expert.pt."""
    from scenes import write_pictures

    folder = tmp_path_factory.mktemp("world") / "w"
    shutil.copytree(WORLD, folder)
    write_pictures(folder, 0, n_images=1700, n_heldout=300)
    return folder


# ---- Rows to train on, and training --------------------------------------------------------------
LONG = "B: blue star: no\nA: red ring: yes\nA: blue star: no\nVerdict: B"
CRITIQUES = ("A: red circle: yes\nVerdict: A", LONG, "Verdict: A", "B: red ring: yes\nVerdict: B")
RESPONSES = ("red circle.", "blue star, red ring, green heart.")
RESPONSES += ("green heart, red cross, blue ring.", "red ring.")


def critique_rows():
    """Four rows of critiques.jsonl; prompts, critiques and responses of different lengths."""
    rows = []
    for i, critique in enumerate(CRITIQUES):
        row = {"id": f"{i}-ab-0", "pair_id": f"pair-{i}", "order": "ab", "image": f"{i}.png"}
        row |= {"prompt": "List the objects in the image.", "style": "critique"}
        row |= {"response_a": RESPONSES[i], "response_b": RESPONSES[i - 1]}
        rows.append({**row, "label": critique[-1], "critique": critique, "verdict": critique[-1]})
    return rows


def judged_rows():  # D_critique of these
    return stage("03_train_ift").training_rows(critique_rows())["critique"]


def correct_rows():  # D_correct of these
    return stage("03_train_ift").training_rows(critique_rows())["correct"]


def judgements(key, ab, ba, p_ab=0.5, p_ba=0.5):
    """The two judgement rows of a pair, from the verdicts and P(A) in its orders."""
    ab = {"id": key, "order": "ab", "label": "A", "verdict": ab, "probability_a": p_ab}
    ba = {"id": key, "order": "ba", "label": "B", "verdict": ba, "probability_a": p_ba}
    return [{**row, "critique": ""} for row in (ab, ba)]


def requests_of(rows, pictures):
    """What common.sample takes."""
    return [{**row, "image": pictures / row["image"]} for row in rows]


def encode(processor, pictures, rows, limit=None):
    """(inputs, labels) of training rows."""
    texts, responses = [row["text"] for row in rows], [row["response"] for row in rows]
    images = [pictures / row["image"] for row in rows]
    return stage("03_train_ift").encode_supervised(processor, texts, images, responses, limit)


def settings_of(**changed):
    """What decides a training: `settings` of stage 03."""
    settings = {"steps": 1, "lr": 1e-3, "lam": 0.5, "bt_weight": 0.0, "train_batch": 4}
    return {**settings, "max_response_tokens": 64, **changed}


def steps_of(processor, pictures, seed=0, micro_batch=4, **changed):
    """Stage 03's function: step -> micro-batches of the four rows, which a step of four holds."""
    settings = settings_of(**changed)
    rows_of_kind = stage("03_train_ift").training_rows(critique_rows())
    if not settings["lam"]:
        del rows_of_kind["correct"]
    how = (rows_of_kind, processor, pictures, settings, seed, micro_batch)
    return partial(stage("03_train_ift").micro_batches, *how)


def train(model, processor, pictures, folder, seed=0, micro_batch=4, save_every=1000, **changed):
    """Stage 03's train on the four rows, in place -> rows of metrics.jsonl."""
    prepare = steps_of(processor, pictures, seed, micro_batch, **changed)
    folder.mkdir(exist_ok=True)
    tokenizer, settings = copy.deepcopy(processor.tokenizer), settings_of(**changed)
    stage("03_train_ift").train(model, tokenizer, prepare, folder, settings, save_every)
    return read_rows(folder / "metrics.jsonl")


def fit(model, processor, pictures, folder, flags=(), **changed):
    """Stage 03's fit on the four rows, which also saves -> adapter/ or model/. flags: of 03."""
    three, settings = stage("03_train_ift"), settings_of(**changed)
    args = three.parse_args(["--no-checkpoint-activations", *flags])
    vars(args).update(settings)
    folder.mkdir(exist_ok=True)
    judge = SimpleNamespace(loaded=(model, processor))
    return three.fit(judge, critique_rows(), folder, settings, pictures, 0, args)


# ---- Sampling, held against plain forward passes -------------------------------------------------
# Two ways to compute the same logits differ by rounding, which decides where two tokens are equally
# good. So tokens are compared where the choice is clear, and log-odds within EPSILON.
@pytest.fixture
def raw(monkeypatch):
    """common.sample whose answers are (token ids (R,), log-odds (R,)), not text and verdict."""
    monkeypatch.setattr(common, "finish_sample", lambda _, *written: written[:2])
    return common.sample


def length_of(tokens, stop_ids):
    """Tokens (R,) up to the first stop token, which counts."""
    ends = torch.isin(tokens, torch.tensor(stop_ids)).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(tokens)


@torch.no_grad()
def logits_alone(model, processor, request, tokens):
    """Logits (n, R, V) for n texts (n, R) after a request: one plain pass over whole texts."""
    n, R = tokens.shape
    inputs = common.encode_prompts(processor, [request["text"]] * n, [request["image"]] * n)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, R))
    return model(**inputs, logits_to_keep=R + 1, use_cache=False).logits[:, :-1]


def check_samples(model, processor, request, samples, stop_ids, temperature, seed):
    """What `raw` wrote is what the request alone, its uniform numbers and the softmax say: every
    token and every log-odds up to the stop token. -> their lengths."""
    tokens, log_odds = map(torch.stack, zip(*samples))  # (n, R) each
    lengths = [length_of(row, stop_ids) for row in tokens]
    written = tokens.clone()
    for row, length in zip(written, lengths):
        row[length - 1 :] = 0  # the last token and what follows it decide nothing
    logits = logits_alone(model, processor, request, written)  # (n, R, V)
    if temperature == 0:
        chosen = logits.gather(2, tokens.clamp(min=0)[:, :, None])[:, :, 0]
        may_be = chosen > logits.amax(2) - EPSILON
    else:
        generator = torch.Generator().manual_seed(common.row_seed(seed, request["id"]))
        uniforms = torch.rand(tokens.shape, generator=generator)[:, :, None].double()
        cdf = (logits.double() / temperature).softmax(2).cumsum(2)
        first = (cdf < uniforms - EPSILON).sum(2)  # the tokens that rounding may choose
        last = (cdf < uniforms + EPSILON).sum(2)
        may_be = (first <= tokens) & (tokens <= last)
    id_a, id_b = common.verdict_token_ids(processor.tokenizer)
    may_be &= (log_odds - (logits[:, :, id_a] - logits[:, :, id_b])).abs() < EPSILON
    for i, length in enumerate(lengths):
        assert may_be[i, :length].all(), (request["id"], i, may_be[i, :length])
    return lengths


@torch.no_grad()
def check_greedy(model, processor, requests, sample, max_new_tokens, stop_ids):
    """sample's tokens are those of transformers' generate -> lists of tokens up to the end."""
    texts, images = [row["text"] for row in requests], [row["image"] for row in requests]
    inputs = common.encode_prompts(processor, texts, images)
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": stop_ids}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    wanted = model.generate(**inputs, **how)
    texts = wanted.sequences[:, inputs["input_ids"].shape[1] :]
    best = torch.stack(wanted.logits, 1).topk(2).values  # (B, R, 2)
    is_clear = best[:, :, 0] - best[:, :, 1] > EPSILON
    answers = sample(model, processor, requests, 1, 0.0, max_new_tokens)
    written = []
    for i, [(tokens, _)] in enumerate(answers):
        length = length_of(texts[i], stop_ids)
        same = (tokens[:length] == texts[i][:length]).tolist()
        if not all(same):  # from a tie on, both are right
            assert not is_clear[i, same.index(False)], (tokens, texts[i])
        written.append(tokens[: length_of(tokens, stop_ids)].tolist())
    return written


# ---- Files and command lines ---------------------------------------------------------------------
def read_rows(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]  # a chunk of answers ends in an empty one


def run(command, **extra):
    """What a command line of the README printed; it must succeed."""
    # one thread each: two processes give what one gives, and the cores are shared
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (shlex.join(command), done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


def run_here(command):
    """The same in this process, which saves the seconds of importing torch."""
    script = stage(command[0].removesuffix(".py"))
    script.main(script.parse_args(command[1:]))
