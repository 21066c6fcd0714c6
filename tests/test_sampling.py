"""Prompts as tokens; what is read of a text; the choice of a token, the loop, the shared prompt."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EPSILON, encode, judged_rows, requests_of, stage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

three = stage("03_train_ift")
JUDGEMENT = common.build_judge_prompt("red?", "blue star, red ring, red cross.", "blue.")
PROMPTS = ["List the objects in the image.", "red?", "Is there a red circle in it?", JUDGEMENT]


def requests(pictures):
    """Eight requests of many lengths: prompts above, and judgements."""
    rows = [{"id": f"r{i}", "image": f"{i}.png", "text": text} for i, text in enumerate(PROMPTS)]
    return requests_of(rows + judged_rows(), pictures)


# ---- Prompts as tokens ---------------------------------------------------------------------------
def prompt_of(processor, text, picture):
    """Token ids of a text's prompt."""
    return common.encode_prompts(processor, [text], [picture])["input_ids"][0].tolist()


SPELLED = """<|im_end|>|a <|image_pad|> b <|image_pad|>|<|im_start|>assistant|<think>red</think>
<|vision_start|><|image_pad|><|vision_end|> <|im_<|im_end|>end|> <|im_end|><|im_end|>
<unk> <|<unk> <|endoftext|>|<|video_pad|>"""


def test_no_text_becomes_a_special_token(tiny, pictures):
    """What a question, a response or a critique says never ends a turn or counts as an image."""
    processor = copy.deepcopy(tiny[1])
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<think>", "</think>"])  # tokens all the same
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}  # unk: "<", "|" ...

    def special_in(ids):
        return [token for token in ids if token in special]

    usual = special_in(prompt_of(processor, "red", pictures / "0.png"))
    for text in SPELLED.split("\n"):
        assert special_in(prompt_of(processor, text, pictures / "0.png")) == usual, text
        row = {"text": "red?", "response": f"red {text} ring", "image": "0.png"}
        ids = encode(processor, pictures, [row])[1][0].tolist()
        assert special_in(ids) == [tokenizer.eos_token_id]
        assert common.as_words(text, tokenizer).replace(" ", "") == text.replace(" ", "")


def test_a_template_that_opens_a_thought_closes_it(tiny, pictures):
    """As Qwen3.5's does unless enable_thinking is false: what is trained on is the critique."""
    processor = copy.deepcopy(tiny[1])
    decode, end = processor.tokenizer.decode, "<|im_start|>assistant\n"
    usual = prompt_of(processor, "red?", pictures / "0.png")
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    condition = "{% if enable_thinking is defined and enable_thinking is false %}"
    thought = f"{condition}<think>\n\n</think>\n\n{{% else %}}<think>\n{{% endif %}}"
    assert processor.chat_template.count(end) == 1
    processor.chat_template = processor.chat_template.replace(end, end + thought)
    ids = prompt_of(processor, "red?", pictures / "0.png")
    assert ids[: len(usual)] == usual and decode(usual).endswith(end)
    assert decode(ids[len(usual) :]) == "<think>\n\n</think>\n\n"
    row = {"text": "red?", "response": "A: red: yes\nVerdict: A", "image": "0.png"}
    labels = encode(processor, pictures, [row])[1][0]
    assert decode(labels[labels != -100]) == row["response"] + "<|im_end|>"


# ---- What is read of a text (samples against other ways to compute them: test_judges.py) ---------
@pytest.mark.parametrize("which", ["tiny", "trained"])
@pytest.mark.parametrize("letter", "AB")
@torch.no_grad()
def test_log_odds_are_read_at_the_letter(which, letter, pictures, request):
    """However it is spelled: log P(" A") - log P(" B") after the text up to it; so in 03."""
    model, processor = request.getfixturevalue(which)
    tokenizer = processor.tokenizer
    id_a, id_b = tokenizer.convert_tokens_to_ids([" A", " B"])
    assert [*common.verdict_token_ids(tokenizer)] == [id_a, id_b] and id_a != id_b
    for spelling in ("Verdict: {}", "Verdict: **{}**", "Verdict:{}", "Verdict: ({})."):
        text = f"red ring: yes\n{spelling.format(letter)}\nA and B in the image"
        row = {"text": JUDGEMENT, "image": "1.png", "response": text, "label": letter}
        inputs, labels = encode(processor, pictures, [row])
        ids = labels[labels != -100]
        P = labels.shape[1] - len(ids)
        log_p = model(**inputs).logits[0, P - 1 : -1].log_softmax(-1)  # (R, V), of these ids
        r = log_p[:, id_a] - log_p[:, id_b]  # (R,)
        words = tokenizer.convert_ids_to_tokens(ids.tolist())
        k = [word.strip() for word in words].index(letter)
        answer = common.finish_sample(tokenizer, ids, r, ids[-1:])
        assert (answer["verdict"], answer["complete"]) == (letter, True)
        assert answer["log_odds"] == r[k].item()
        loss = three.bradley_terry_sum(*three.forward(model, inputs, labels), [row], tokenizer)
        signed = r[k] if letter == "A" else -r[k]
        assert loss.item() == pytest.approx(-signed.sigmoid().log().item(), abs=EPSILON)


def test_a_sample_without_a_verdict_or_an_end(tiny):
    tokenizer = tiny[1].tokenizer
    ids = tokenizer("Verdict: A\nVerdict:", add_special_tokens=False).input_ids
    tokens, log_odds = torch.tensor([*ids, 7, 5, -1]), torch.arange(len(ids) + 3.0)
    none = {"text": "Verdict: A\nVerdict:", "complete": True, "verdict": None, "log_odds": None}
    assert common.finish_sample(tokenizer, tokens, log_odds, torch.tensor([7, 3])) == none
    assert common.finish_sample(tokenizer, tokens, log_odds, torch.tensor([3, 7])) == none
    cut = common.finish_sample(tokenizer, tokens[:3], log_odds[:3], torch.tensor([7, 3]))
    assert cut == {"text": "Verdict: A", "complete": False, "verdict": "A", "log_odds": 2.0}


# ---- The choice of a token, and the loop ---------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_softmax(temperature):
    """By uniform numbers that lie evenly, each token is drawn as often as its probability says."""
    logits = torch.tensor([0.3, -2.0, 1.5, 0.0, -30.0, 2.2])
    n = 10_000
    uniforms = (torch.arange(n) + 0.5).double() / n
    drawn = common.pick_tokens(logits.repeat(n, 1), uniforms, temperature).bincount(minlength=6)
    expected = n * (logits.double() / temperature).softmax(0)
    assert (drawn - expected).abs().max() <= 1
    # greedy takes the most likely one, and no number leaves the vocabulary
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert common.pick_tokens(logits, torch.tensor([0.99, 0.99]), 0).tolist() == [1, 0]
    for uniform in (0.0, 1 - 2**-24, 1.0):
        picked = common.pick_tokens(logits, torch.tensor([uniform] * 2).double(), 1.0)
        assert picked.tolist() == ([0, 0] if uniform == 0 else [2, 2])


STOP = 5


class Scripted:
    """Stands in for common.Decoding: sample s writes token 10 + s until its own length."""

    def __init__(self, lengths, inputs, n, room):
        self.lengths, self.time, self.sizes = lengths, 0, inputs  # a list, for the test
        self.here = torch.arange(len(lengths))  # samples in the batch
        self.make_logits()

    def make_logits(self):
        self.sizes.append(len(self.here))
        self.logits = torch.full((len(self.here), 30), -50.0)
        for row, s in enumerate(self.here.tolist()):
            self.logits[row, STOP if self.time + 1 == self.lengths[s] else 10 + s] = 50.0
            self.logits[row, :2] = torch.tensor([s / 8, -self.time])  # of the letters 0 and 1

    def narrow(self, index):
        self.here, self.logits = self.here[index], self.logits[index]

    def step(self, tokens):
        assert torch.equal(tokens, self.logits.argmax(1))
        self.time += 1
        self.make_logits()


@pytest.mark.parametrize(
    "lengths",  # stop token included; 12 does not stop within 10 tokens
    [[3, 1, 9, 2, 6, 6, 4, 12], [12, 1, 1, 1, 2, 2, 5, 8], [2, 1, 3, 1, 1, 1, 3, 3], [1] * 8],
)
def test_finished_prompts_leave_the_batch(monkeypatch, lengths):
    monkeypatch.setattr(common, "Decoding", Scripted)
    sizes, how = [], (torch.full((4, 2, 10), 0.5), 1.0, torch.tensor([STOP, 6]), (0, 1))
    tokens, log_odds = common.sample_batch(lengths, sizes, *how)
    for s, length in enumerate(lengths):
        expected = [*[10 + s] * (length - 1), STOP][:10]
        R = len(expected)
        assert tokens[s, :R].tolist() == expected
        assert torch.equal(log_odds[s, :R], s / 8 + torch.arange(float(R)))
    last = [max(lengths[i : i + 2]) for i in range(0, 8, 2)]  # a prompt goes on with its samples
    assert len(sizes) == min(10, max(last)) and sizes[0] == 8  # it ends with the last sample
    for t, size in enumerate(sizes[1:], 1):  # a quarter of the batch may wait, not more
        going = 2 * sum(length > t for length in last)
        assert going <= size <= going / 0.75


# ---- Requests, randomness, batches ---------------------------------------------------------------
@pytest.fixture
def batches(monkeypatch):
    """(uniforms, stop ids, prompts' length) of the calls of sample_batch, which writes int(20 u)
    without a model."""
    calls = []

    def write(model, inputs, uniforms, temperature, stop_ids, verdict_ids):
        calls.append((uniforms, stop_ids, inputs["input_ids"].shape[1]))
        u = uniforms.flatten(0, 1)  # (S, R)
        return (20 * u).long() + 10, u

    monkeypatch.setattr(common, "sample_batch", write)
    return calls


def test_seed_and_id_decide(tiny, pictures, batches):
    asked = requests(pictures)

    def numbers(some, n=2, seed=0, batch_size=256):
        del batches[:]
        common.sample(*tiny, some, n, 1.0, 8, seed, batch_size)
        return torch.cat([uniforms for uniforms, *_ in batches])  # (B, n, R), by the texts' length

    one = numbers(asked[:1])
    assert one.shape == (1, 2, 8) and one.min() >= 0 and one.max() < 1
    assert torch.equal(numbers(asked[:1]), one) and not torch.equal(one[0, 0], one[0, 1])
    assert not torch.equal(numbers(asked[:1], seed=1), one)
    assert not torch.equal(numbers([{**asked[0], "id": "other"}]), one)
    moved = [{**asked[0], "text": "red?", "image": asked[1]["image"]}]
    assert torch.equal(numbers(moved), one)  # the same whatever is asked
    assert torch.equal(numbers(asked[:1], n=4)[:, :2], one)  # the first of four are those of two
    together, apart = numbers(asked), numbers(asked, batch_size=2)
    lengths = [length for *_, length in batches]
    assert lengths[0] == max(lengths) and lengths[-1] == min(lengths)  # the longest first
    assert torch.equal(together, apart) and (together == one[0]).all((1, 2)).sum() == 1
    # and the answers come in the order of the requests
    expected = [common.sample(*tiny, [row], 2, 1.0, 8)[0] for row in asked]
    assert len({answer["text"] for samples in expected for answer in samples}) > 9
    for size in (256, 6, 1):
        assert common.sample(*tiny, asked, 2, 1.0, 8, batch_size=size) == expected
    assert common.sample(*tiny, asked[::-1], 2, 1.0, 8) == expected[::-1]


def test_every_stop_token_ends_a_sample(tiny, pictures, batches, monkeypatch):
    model, processor = tiny
    for ends, expected in ((7, [7]), ([7, 8], [7, 8]), (None, [])):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        common.sample(model, processor, requests(pictures)[:1], 1, 1.0, 4)
        assert batches[-1][1].tolist() == [*expected, processor.tokenizer.eos_token_id]


# ---- The shared prompt ---------------------------------------------------------------------------
@torch.no_grad()
def test_attention_over_a_shared_prompt_is_attention_over_its_copies():
    """Against PyTorch's own over each sample's row; grouped heads, padding, prompts that leave."""
    torch.manual_seed(0)
    B, n, H, G, P, D = 3, 4, 2, 3, 7, 8
    mask = (torch.arange(P) >= torch.tensor([3, 0, 1])[:, None]).long()  # (B, P)
    prompt = SimpleNamespace(keys=3 * torch.randn(B, H, P, D), values=torch.randn(B, H, P, D))
    layer = common.SharedPrompt(prompt, mask, n, room=5)
    seen = mask.bool().repeat_interleave(n, 0)  # (S, tokens)
    keys, values = [x.repeat_interleave(n, 0) for x in (prompt.keys, prompt.values)]  # (S, H, P, D)
    for rows in (list(range(12)), [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7]):
        layer.reorder_cache(torch.tensor(rows))
        S = len(rows)
        query = torch.randn(S, H * G, 1, D)
        key, value = torch.randn(2, S, H, 1, D)
        seen = torch.cat([seen[rows], torch.ones(S, 1, dtype=torch.bool)], 1)
        keys, values = torch.cat([keys[rows], key], 2), torch.cat([values[rows], value], 2)
        got = layer.update(key, value)[0].attend(query, scaling=D**-0.5)  # (S, 1, H*G, D)
        mask = seen[:, None, None]
        whole = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
        assert torch.allclose(got, whole.transpose(1, 2), atol=1e-4)
    assert len(layer.keys) == 1  # the prompt is there once


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, and an index from elsewhere, as CUDA does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves([args, kwargs])
        devices = {x.device for x in leaves if isinstance(x, torch.Tensor) and x.dim()}
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert copies or len(devices) <= 1, f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_shared", [True, False])
def test_layers_on_two_gpus(is_shared):
    """--device auto: a layer may lie elsewhere than mask, positions and logits. The tensors have a
    shape and a device, and no data: on a CPU all devices are one."""
    with FakeTensorMode(shape_env=ShapeEnv()), OneDevice():
        first, other = torch.device("cuda:0"), torch.device("cuda:1")
        mask = torch.ones(2, 5, dtype=torch.long, device=first)
        keys, values = torch.empty(2, 2, 2, 5, 8, device=other)
        prompt = SimpleNamespace(keys=keys, values=values)
        layer = common.SharedPrompt(prompt, mask, n=3, room=4)
        decoding = common.Decoding.__new__(common.Decoding)
        decoding.cache, decoding.position = layer, torch.zeros(6, 1, dtype=torch.long, device=first)
        decoding.mask = None if is_shared else mask.repeat_interleave(3, 0)
        for S in (6, 3):
            if S < 6:
                decoding.narrow(torch.arange(S, device=other))  # of the logits' GPU
            query = torch.empty(S, 4, 1, 8, device=other)
            key = torch.empty(S, 2, 1, 8, device=other)
            got = layer.update(key, key)[0].attend(query, 0.3)
            assert got.device == other and got.shape == (S, 1, 4, 8)
            assert decoding.position.shape == (S, 1) and decoding.position.device == first
            assert is_shared or (decoding.mask.shape, decoding.mask.device) == ((S, 5), first)
