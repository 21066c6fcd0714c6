"""Batched sampling against transformers' generate, plain forward passes and the softmax."""

from types import SimpleNamespace

import pytest
import torch
from conftest import (
    check_greedy,
    check_samples,
    encode,
    judged_rows,
    requests_of,
    stage,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from common import build_judge_prompt

PROMPTS = [
    "List the objects in the image.",
    "red?",
    build_judge_prompt("List the objects in the image.", "red circle.", "red ring."),
    "Is there a red circle in the image? Answer yes or no.",
    build_judge_prompt("red?", "blue star, red ring, red cross.", "blue."),
]


def requests(pictures):
    """Nine requests of many lengths: prompts above, and judgements."""
    rows = []
    for i, text in enumerate(PROMPTS):
        rows.append({"id": f"r{i}", "image": pictures / f"{i % 4}.png", "text": text})
    return rows + requests_of(judged_rows(), pictures)


def stops(model, processor):
    return [model.generation_config.eos_token_id, processor.tokenizer.eos_token_id]


# ---- Against other ways to compute the same ------------------------------------------------------
@pytest.mark.parametrize("which", ["tiny", "trained"])
def test_greedy_equals_generate(which, pictures, raw, request):
    model, processor = request.getfixturevalue(which)
    asked = requests(pictures)
    texts, images = [r["text"] for r in asked], [r["image"] for r in asked]
    lengths = common.encode_prompts(processor, texts, images)["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 4  # so most rows are padded
    written = check_greedy(model, processor, asked, raw, 40, stops(model, processor))
    assert len({tuple(tokens) for tokens in written}) > 3
    assert which == "tiny" or len({len(tokens) for tokens in written}) > 2  # some stop early


@pytest.mark.parametrize("temperature, n", [(0.0, 1), (1.0, 3), (0.6, 2)])
def test_samples_are_those_of_the_row_alone(trained, pictures, raw, temperature, n):
    """Alone, with other neighbours, in another order: what the uniform numbers and a plain forward
    pass of the row by itself say, log-odds included."""
    model, processor = trained
    asked = requests(pictures)
    for some, size in ((asked, 64), (asked[::-1], 3 * n), (asked[4:6], 1)):
        answers = raw(model, processor, some, n, temperature, 40, seed=5, batch_size=size)
        lengths = []
        for row, samples in zip(some, answers):
            stop_ids = stops(model, processor)
            lengths += check_samples(model, processor, row, samples, stop_ids, temperature, 5)
        assert len(set(lengths)) > 1  # some go on where others have stopped


def test_answers_hold_the_log_odds_of_their_verdict(trained, pictures, monkeypatch):
    """03 computes the same from the text alone: what sampling reports is what training sees."""
    three, finish = stage("03_train_ift"), common.finish_sample
    model, processor = trained
    tokenizer = processor.tokenizer

    def finish_with_tokens(tokenizer, tokens, *rest):
        return {**finish(tokenizer, tokens, *rest), "tokens": tokens.tolist()}

    monkeypatch.setattr(common, "finish_sample", finish_with_tokens)
    asked = requests_of(judged_rows(), pictures)
    seen = set()
    for row, samples in zip(judged_rows(), common.sample(model, processor, asked, 8, 1.0, 60, 3)):
        for answer in samples:
            assert answer["verdict"] == common.parse_verdict(answer["text"])
            assert (answer["verdict"] is None) == (answer["log_odds"] is None)
            ids = [*tokenizer(answer["text"]).input_ids, tokenizer.eos_token_id]
            if answer["verdict"] is None or answer["tokens"][: len(ids)] != ids:
                continue  # now and then a text can be spelled by other tokens, too
            seen.add(answer["verdict"])
            row = {**row, "response": answer["text"], "label": "A"}
            with torch.no_grad():
                logits, labels = three.forward(model, *encode(processor, pictures, [row]))
                loss = three.bradley_terry_sum(logits, labels, [row], tokenizer)
            r = torch.tensor([answer["log_odds"]])
            expected = three.bradley_terry_loss(r, torch.tensor([True])).item()
            assert loss.item() == pytest.approx(expected, abs=1e-3)
    assert seen == {"A", "B"}


def test_the_model_is_left_as_it_was(trained, pictures, monkeypatch):
    """Also where sampling fails: no positions of old prompts, no other attention function."""
    model, processor = trained
    config = model.model.language_model.config
    assert config._attn_implementation == "sdpa"
    common.sample(model, processor, requests(pictures)[:2], 2, 1.0, 4)
    assert model.model.rope_deltas is None and config._attn_implementation == "sdpa"

    def fail(self, query, scaling):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(common.SharedPrompt, "attend", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        common.sample(model, processor, requests(pictures)[:2], 2, 1.0, 4)
    assert model.model.rope_deltas is None and config._attn_implementation == "sdpa"


# ---- The choice of a token -----------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_softmax(temperature):
    """By uniform numbers that lie evenly, each token is drawn as often as its probability says."""
    logits = torch.tensor([0.3, -2.0, 1.5, 0.0, -30.0, 2.2])
    n = 10_000
    uniforms = (torch.arange(n) + 0.5).double() / n
    drawn = common.pick_tokens(logits.repeat(n, 1), uniforms, temperature).bincount(minlength=6)
    expected = n * (logits.double() / temperature).softmax(0)
    assert (drawn - expected).abs().max() <= 1


def test_greedy_takes_the_most_likely_token_and_no_number_leaves_the_vocabulary():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert common.pick_tokens(logits, torch.tensor([0.99, 0.99]), 0).tolist() == [1, 0]
    for uniform in (0.0, 1 - 2**-24, 1.0):
        picked = common.pick_tokens(logits, torch.tensor([uniform] * 2).double(), 1.0)
        assert picked.tolist() == ([0, 0] if uniform == 0 else [2, 2])


# ---- The loop, on a scripted model: sample s writes token 10 + s until its own length ------------
LENGTHS = [3, 1, 9, 2, 6, 6, 4, 12]  # stop token included; the last never stops within 10 tokens
STOP = 5


class Scripted:
    """Stands in for common.Decoding: logits that leave no choice, and say whose they are."""

    def __init__(self, model, inputs, n, room):
        self.here = torch.arange(len(LENGTHS))  # samples in the batch
        self.time = 0
        self.sizes = model  # a list, for the test
        self.make_logits()

    def make_logits(self):
        self.sizes.append(len(self.here))
        self.logits = torch.full((len(self.here), 20), -50.0)
        for row, s in enumerate(self.here.tolist()):
            stops_here = self.time + 1 == LENGTHS[s]
            self.logits[row, STOP if stops_here else 10 + s] = 50.0
            self.logits[row, 0] = s / 8  # log-odds of the letters 0 and 1
            self.logits[row, 1] = -self.time

    def keep(self, index):
        self.here, self.logits = self.here[index], self.logits[index]

    def step(self, tokens):
        expected = self.logits.argmax(1)
        going = tokens != STOP  # what follows a stop token means nothing
        assert torch.equal(tokens[going], expected[going])
        self.time += 1
        self.make_logits()


def test_finished_samples_leave_the_batch(monkeypatch):
    monkeypatch.setattr(common, "Decoding", Scripted)
    sizes, uniforms = [], torch.full((4, 2, 10), 0.5)
    stop_ids = torch.tensor([STOP, 6])
    tokens, log_odds = common.sample_batch(sizes, {}, uniforms, 1.0, stop_ids, [[0, 2], [1, 3]])
    for s, length in enumerate(LENGTHS):
        expected = [10 + s] * 10
        if length <= 10:
            expected[length - 1] = STOP
        assert tokens[s].tolist()[:length] == expected[:length]
        written = min(length, 10)
        times = torch.arange(float(written))
        assert torch.equal(log_odds[s, :written, 0], s / 8 + times)
    assert len(sizes) == 10 and sizes[0] == 8
    for t, size in enumerate(sizes[1:], 1):  # a quarter of the batch may wait, not more
        going = sum(length > t for length in LENGTHS)
        assert going <= size <= going / 0.75
    assert sizes[-1] == 1


def test_decoding_ends_with_the_last_sample(monkeypatch):
    monkeypatch.setattr(common, "Decoding", Scripted)
    monkeypatch.setitem(globals(), "LENGTHS", [2, 1, 3, 1])
    sizes, uniforms = [], torch.full((2, 2, 50), 0.5)
    stop_ids = torch.tensor([STOP])
    tokens, _ = common.sample_batch(sizes, {}, uniforms, 1.0, stop_ids, [[0, 2], [1, 3]])
    assert len(sizes) == 3 and (tokens[:, 3:] == -1).all()


# ---- Requests, randomness, batches, memory -------------------------------------------------------
@pytest.fixture
def batches(monkeypatch):
    """The calls of sample_batch, which writes what each row's uniform numbers say, without a model:
    token int(20 u), log-odds u."""
    calls = []

    def write(model, inputs, uniforms, temperature, stop_ids, verdict_ids):
        calls.append(SimpleNamespace(inputs=inputs, uniforms=uniforms, stop_ids=stop_ids))
        u = uniforms.flatten(0, 1)  # (S, R)
        return (20 * u).long() + 10, u[:, :, None].repeat(1, 1, 2)

    monkeypatch.setattr(common, "sample_batch", write)
    return calls


def texts_of(answers):
    return [[answer["text"] for answer in samples] for samples in answers]


def test_seed_and_id_decide(tiny, pictures, batches):
    asked = requests(pictures)

    def numbers(some, n=2, seed=0, batch_size=256):
        """{id: uniforms (n, R)}: the row is found by its text's number of tokens."""
        start = len(batches)
        common.sample(*tiny, some, n, 1.0, 8, seed, batch_size)
        return torch.cat([call.uniforms for call in batches[start:]])

    one = numbers(asked[:1])
    assert one.shape == (1, 2, 8) and one.min() >= 0 and one.max() < 1
    assert torch.equal(numbers(asked[:1]), one) and not torch.equal(one[0, 0], one[0, 1])
    assert not torch.equal(numbers(asked[:1], seed=1), one)
    assert not torch.equal(numbers([{**asked[0], "id": "other"}]), one)
    moved = [{**asked[0], "text": "red?", "image": asked[1]["image"]}]
    assert torch.equal(numbers(moved), one)  # the same whatever is asked
    assert torch.equal(numbers(asked[:1], n=4)[:, :2], one)  # the first of four are those of two
    together, apart = numbers(asked), numbers(asked, batch_size=2)
    assert torch.equal(together, apart) and (together == one[0]).all((1, 2)).sum() == 1


def test_answers_come_in_the_order_of_the_requests(tiny, pictures, batches):
    asked = requests(pictures)
    expected = [texts_of(common.sample(*tiny, [row], 2, 1.0, 8))[0] for row in asked]
    assert len({text for samples in expected for text in samples}) > 9
    for size in (256, 6, 1):
        assert texts_of(common.sample(*tiny, asked, 2, 1.0, 8, batch_size=size)) == expected
    assert texts_of(common.sample(*tiny, asked[::-1], 2, 1.0, 8)) == expected[::-1]


def test_both_stop_tokens_end_a_sample(tiny, pictures, batches, monkeypatch):
    model, processor = tiny
    for ends, expected in ((7, [7]), ([7, 8], [7, 8]), (None, [])):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        common.sample(model, processor, requests(pictures)[:1], 1, 1.0, 4)
        assert batches[-1].stop_ids.tolist() == [*expected, processor.tokenizer.eos_token_id]
    ends, verdict_ids = torch.tensor([7, 3]), common.verdict_token_ids(processor.tokenizer)
    for end in (7, 3):
        tokens = torch.tensor([20, 21, end, 22])
        answer = common.finish_sample(
            processor.tokenizer, tokens, torch.zeros(4, 2), ends, verdict_ids
        )
        assert answer["text"] == processor.tokenizer.decode([20, 21]) and answer["complete"]


def test_out_of_memory_halves_the_batch(tiny, pictures, batches, monkeypatch, capsys):
    asked = requests(pictures)[:5]
    expected = texts_of(common.sample(*tiny, asked, 2, 1.0, 6))
    sizes, write = [], common.sample_batch

    def short_of_memory(model, inputs, *rest):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("no room")
        return write(model, inputs, *rest)

    monkeypatch.setattr(common, "sample_batch", short_of_memory)
    limit = 2
    assert texts_of(common.sample(*tiny, asked, 2, 1.0, 6, batch_size=8)) == expected
    assert sizes == [4, 2, 2, 1]
    assert "out of memory: going on with 2 prompts at a time" in capsys.readouterr().out
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):  # common.run names the flags to lower
        common.sample(*tiny, asked[:1], 2, 1.0, 6)


@pytest.mark.parametrize(
    "text, letter, is_bare",
    [
        ("Verdict: A", 2, 0),
        ("A: red circle: yes\nVerdict: B", 9, 0),
        ("Verdict:**A**", 4, 1),
        ("Verdict: A\nB is the red", 2, 0),
        ("B is the red\nVerdict:B", 7, 1),
        ("A\nA A", None, None),
    ],
)
def test_log_odds_are_read_at_the_verdicts_letter(tiny, text, letter, is_bare):
    tokenizer = tiny[1].tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    verdict_ids = common.verdict_token_ids(tokenizer)
    tokens = torch.tensor([*ids, tokenizer.eos_token_id, 5, -1])
    log_odds = torch.arange(2.0 * len(tokens)).view(-1, 2)
    rest = (log_odds, torch.tensor([tokenizer.eos_token_id]), verdict_ids)
    answer = common.finish_sample(tokenizer, tokens, *rest)
    assert answer["text"].replace("<unk>", "**") == text or "**" in text
    expected = None if letter is None else log_odds[letter, is_bare]
    assert answer["complete"] and answer["log_odds"] == expected
    cut = common.finish_sample(tokenizer, tokens[:-3], *rest)
    assert cut == {**answer, "complete": False}


# ---- The shared prompt ---------------------------------------------------------------------------
@torch.no_grad()
def test_attention_over_a_shared_prompt_is_attention_over_its_copies():
    """Against PyTorch's own attention over each sample's whole row; grouped heads, padding, samples
    and a prompt that leave."""
    torch.manual_seed(0)
    B, n, H, G, P, D = 3, 4, 2, 3, 7, 8
    mask = torch.ones(B, P, dtype=torch.long)
    mask[0, :3] = 0
    mask[2, :1] = 0
    prompt = SimpleNamespace(keys=3 * torch.randn(B, H, P, D), values=torch.randn(B, H, P, D))
    layer = common.SharedPrompt(prompt, mask, n, room=5)
    seen = mask.bool().repeat_interleave(n, 0)  # (S, tokens)
    keys = prompt.keys.repeat_interleave(n, 0)  # (S, H, tokens, D)
    values = prompt.values.repeat_interleave(n, 0)
    for keep in (list(range(12)), [0, 2, 3, 8, 9, 11], [1, 2, 4, 5], [3]):
        layer.reorder_cache(torch.tensor(keep))
        S = len(keep)
        query = torch.randn(S, H * G, 1, D)
        key, value = torch.randn(2, S, H, 1, D)
        seen = torch.cat([seen[keep], torch.ones(S, 1, dtype=torch.bool)], 1)
        keys, values = torch.cat([keys[keep], key], 2), torch.cat([values[keep], value], 2)
        got = layer.update(key, value)[0].attend(query, scaling=D**-0.5)  # (S, 1, H*G, D)
        whole = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, seen[:, None, None], enable_gqa=True
        )
        assert torch.allclose(got, whole.transpose(1, 2), atol=1e-4)
    assert len(layer.prompt_keys) == 1 and layer.slots.tolist() == [3]


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, and an index from elsewhere, as CUDA does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves([args, kwargs]) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.dim()}
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert copies or len(devices) <= 1, f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_gpus():
    """Tensors that have a shape and a device, and no data: on a CPU all devices are one."""
    with FakeTensorMode(shape_env=ShapeEnv()), OneDevice():
        yield torch.device("cuda:0"), torch.device("cuda:1")


def test_a_layer_on_another_gpu(two_gpus):
    """--device auto: the mask, the choice of samples and the tokens are on the first GPU."""
    first, other = two_gpus
    with pytest.raises(AssertionError, match="on {"):  # the test can tell
        torch.ones(2, device=first) + torch.ones(2, device=other)
    keys, values = torch.empty(2, 2, 2, 5, 8, device=other)
    mask = torch.ones(2, 5, dtype=torch.long, device=first)
    layer = common.SharedPrompt(SimpleNamespace(keys=keys, values=values), mask, n=3, room=4)
    for S in (6, 4):
        if S < 6:
            layer.reorder_cache(torch.arange(S, device=first))
        query, key = torch.empty(S, 4, 1, 8, device=other), torch.empty(S, 2, 1, 8, device=other)
        got = layer.update(key, key)[0].attend(query, 0.3)
        assert got.device == other and got.shape == (S, 1, 4, 8)


@pytest.mark.parametrize("is_shared", [True, False])
def test_samples_leave_on_all_gpus(two_gpus, is_shared):
    """The index comes from the logits' GPU, positions and mask are on that of the inputs."""
    first, other = two_gpus
    decoding = common.Decoding.__new__(common.Decoding)
    decoding.cache = SimpleNamespace(reorder_cache=lambda index: None)
    decoding.is_shared = is_shared
    decoding.position = torch.zeros(6, 1, dtype=torch.long, device=first)
    decoding.mask = torch.ones(6, 5, dtype=torch.long, device=first)
    decoding.keep(torch.arange(4, device=other))
    assert decoding.position.shape == (4, 1) and decoding.position.device == first
    assert decoding.mask.shape == ((6, 5) if is_shared else (4, 5))
    assert decoding.mask.device == first
