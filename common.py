"""What the five stages must agree on byte for byte, and what they share to read, generate, keep.

Letters in all files: B sequences, T tokens, V vocabulary entries, P prompt tokens (image included),
R response tokens. In sampling: n samples of a prompt, S samples that are still being written (at
first B * n), H key-value heads, G query heads to each of them, D head size.
"""

import argparse
import atexit
import hashlib
import json
import os
import re
import shlex
import sys
import time
import warnings
from collections import Counter
from functools import cached_property, partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from pydantic import FiniteFloat, TypeAdapter
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import DynamicLayer
from typing_extensions import TypedDict  # typing's own is too old for pydantic before Python 3.12

# ---- The judge's prompt, checks and verdict ------------------------------------------------------
INSTRUCTIONS = {
    "critique": 'Check each claim of A and B against the image, one per line: "A: claim: yes" or '
    '"A: claim: no". End with "Verdict: A" or "Verdict: B", the better response.',
    "descriptive": 'Describe the image. End with "Verdict: A" or "Verdict: B", '
    "the better response.",
    "none": 'Answer "Verdict: A" or "Verdict: B", the better response.',
}


def build_judge_prompt(prompt, response_a, response_b, style="critique", reference=None):
    """The one text that asks for a judgement; it follows the image.

    All lines but the first of a question or response are indented, so that none can fake a line of
    the prompt's own. reference: findings and label as a critique's lines, for 02 alone."""
    question = ""
    parts = {"Question": prompt, "Response A": response_a, "Response B": response_b}
    for name, text in parts.items():
        question += "\n  ".join(f"{name}: {text}".splitlines()) + "\n"
    if reference is not None:
        question += f"Known to be true, never to be mentioned:\n{reference}\n"
    return question + INSTRUCTIONS[style]


def both_orders(pair):
    """The pair's two questions: in order "ab" the chosen response is A (label "A"), in "ba" B."""
    chosen, rejected = pair["chosen"], pair["rejected"]
    for order, label, a, b in (("ab", "A", chosen, rejected), ("ba", "B", rejected, chosen)):
        question = {"id": f"{pair['id']}-{order}", "pair_id": pair["id"], "order": order}
        question |= {"image": pair["image"], "prompt": pair["prompt"], "label": label}
        yield {**question, "response_a": a, "response_b": b}


_MARK = r"(?:[^\w\n]|_)*"  # what is no word: markdown, quotes, punctuation, spaces
# side, claim, answer of a line such as "A: red circle: yes" or "2. **Response B**: a dog: no"
_CHECK = re.compile(
    rf"^{_MARK}(?:\d+{_MARK})?(?:response +)?([AB])\b[^\w:\n]*:{_MARK}(\w.*?):{_MARK}(yes|no)\b",
    re.I | re.M,
)
# "Verdict: ...", "**Final verdict**: ...", "3. Verdict: ...", and what follows the colon
_VERDICT = re.compile(rf"^{_MARK}(?:\d+{_MARK})?(?:final +)?verdict{_MARK}[:：](.*)$", re.I | re.M)
_LETTER = re.compile(
    rf"{_MARK}(?:response +)?"
    r"(A(?!.*\bB\b)|B(?!.*\b(?-i:A)\b))"  # one letter alone; a small "a" after B is an article
    r"(?![^\W_]| +(?!is\b|because\b|since\b|as\b)\w)",  # "A because", "A, which", but no "A tie"
    re.I,
)


def parse_checks(text):
    """The critique's checks, one a line: list of ("A" | "B", claim, supported).

    >>> parse_checks("A: red circle: yes\\nA: a star: no\\nB: a dog: yes, left\\nVerdict: B")
    [('A', 'red circle', True), ('A', 'a star', False), ('B', 'a dog', True)]"""
    checks = []
    for side, claim, answer in _CHECK.findall(text):
        checks.append((side.upper(), claim.rstrip(" *_\"'`"), answer.lower() == "yes"))
    return checks


def verdict_of_checks(checks):
    """The response with fewer unsupported claims: "A", "B", or None where they are even."""
    unsupported = Counter(side for side, _, supported in checks if not supported)
    if unsupported["A"] == unsupported["B"]:
        return None
    return "A" if unsupported["A"] < unsupported["B"] else "B"


def find_verdict(text):
    """("A" | "B", its index) of the last line "Verdict: ..."; (None, -1) if that names no one."""
    match = None
    for line in _VERDICT.finditer(text):
        match = _LETTER.match(text, *line.span(1))  # what follows the colon
    if match is None:
        return None, -1
    return match[1].upper(), match.start(1)


def verdict_log_odds(logits, id_a, id_b):
    """r = log P(A) - log P(B) in nats (B,) of logits (B, V): the softmax's normaliser cancels."""
    logits = logits.float()  # (B, V); so that a bf16 difference is not rounded once more
    return logits[:, id_a] - logits[:, id_b]  # (B,)


# ---- Rows: their shapes, and reading them --------------------------------------------------------
Letter = Literal["A", "B"]


class Evidence(TypedDict):  # what the expert says of one object that the responses name
    object: str
    claimed_by: Literal["chosen", "rejected", "both"]
    status: Literal["present", "absent", "unsure"]
    confidence: FiniteFloat  # of its best detection, in [0, 1]
    box: list[FiniteFloat] | None  # [x1, y1, x2, y2] in pixels


class Pair(TypedDict):  # a row of 01's preferences.jsonl
    id: str
    image: str  # a path from the image root that meta.json names, or absolute
    prompt: str
    chosen: str
    rejected: str
    source: str
    hallucinated: list[str]  # objects that are absent
    evidence: list[Evidence]
    split: Literal["validation", "heldout", "train", "pool"]


class Critique(TypedDict):  # a row of 02's critiques.jsonl: a question, and what answers it
    id: str
    pair_id: str
    order: Literal["ab", "ba"]
    image: str
    prompt: str
    response_a: str
    response_b: str
    label: Letter
    critique: str
    style: Literal["critique", "descriptive", "none"]
    verdict: Letter


class Answer(TypedDict):  # one sample of `sample`
    text: str
    complete: bool  # it wrote its stop token
    verdict: Letter | None
    log_odds: FiniteFloat | None  # r at the verdict in nats, None without one


# A row of an answers.jsonl: the samples of one request.
Answers = TypedDict("Answers", {"key": str, "id": str, "answers": list[Answer]})


def stop(message):
    """End the script with one readable line: what is wrong, where, and what to do."""
    raise SystemExit(f"error: {message}")


def one_line(error):
    """An exception as a short line: its kind and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_rows(path, shape):
    """Rows of a jsonl file, each of this shape (a TypedDict); else it stops: line, field, why."""
    adapter = TypeAdapter(shape)
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
                adapter.validate_python(rows[-1], strict=True)
            except ValueError as error:  # pydantic's, too, which names the field
                stop(f"{path} line {number}: {one_line(error)}")
    return rows


def read_json(path):
    return json.loads(Path(path).read_text("utf-8"))


# ---- Models --------------------------------------------------------------------------------------
def unwrap(model):
    """The transformers model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_judge(model_path, checkpoint=None, device=None, max_image_tokens=None, trainable=False):
    """(model, processor) from a hub id or folder, in evaluation mode, all weights frozen.

    checkpoint: a PEFT adapter's folder (trainable: it is not frozen), or that of a whole model that
    03 has trained. device: a name, None (the best one here), or "auto" (spread over all GPUs).
    max_image_tokens: no picture takes more of the prompt's tokens."""
    is_adapter = checkpoint is not None and (Path(checkpoint) / "adapter_config.json").exists()
    weights = model_path if checkpoint is None or is_adapter else str(checkpoint)
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    # bf16 on the GPUs that have it; a whole model that 04 trains further stays float32
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    is_exact = not has_bf16 or str(device) == "cpu" or (trainable and not is_adapter)
    dtype = torch.float32 if is_exact else torch.bfloat16
    processor = AutoProcessor.from_pretrained(model_path)
    how = {"attn_implementation": "sdpa", "device_map": device, "output_loading_info": True}
    model, loaded = AutoModelForImageTextToText.from_pretrained(weights, dtype=dtype, **how)
    absent = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
    if absent:  # transformers fills them with random numbers
        stop(f"--model {weights} lacks {len(absent)} of its weights, such as {absent[0]}")
    vision = processor.image_processor
    if max_image_tokens:  # a token covers merge_size x merge_size patches
        pixels = max_image_tokens * (vision.patch_size * vision.merge_size) ** 2
        # Both "edges" are areas, in pixels. Pictures below the shortest are enlarged to it, then
        # rounded up, which may double each side: so it is a quarter of the longest at most.
        smallest = min(vision.size["shortest_edge"], pixels // 4)
        vision.size = {"shortest_edge": smallest, "longest_edge": pixels}
    model.requires_grad_(False)
    if is_adapter:
        model = load_adapter(model, checkpoint, trainable)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            stop(f"{checkpoint or weights}: the weight {name} is not finite (nan or infinity)")
    print(f"loaded {checkpoint or weights} on {device} in {unwrap(model).dtype}")
    return model.eval(), processor


def load_adapter(model, folder, trainable=False):
    """PeftModel; stops where the adapter does not fit the model, where PEFT itself only warns."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights  # slow to import

    base = model.config._name_or_path
    with warnings.catch_warnings(action="ignore"):  # of keys that do not fit: see below
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    trained_on = model.peft_config["default"].base_model_name_or_path or base
    if Path(trained_on).name != Path(base).name:  # the folder may have moved
        stop(f"the adapter {folder} was trained on {trained_on}, not on {base}")
    found = set(load_peft_weights(str(folder), device="cpu"))
    if strange := found ^ set(get_peft_model_state_dict(model)):
        stop(f"the adapter {folder} does not fit the model: {sorted(strange)[:4]}")
    return model


class Judge:
    """A model that is loaded when it is first needed: never, where all its answers are kept.

    settings: more arguments of load_judge; weights: what its kept answers depend on, as JSON."""

    def __init__(self, model_path, checkpoint=None, **settings):
        self.arguments = {"model_path": model_path, "checkpoint": checkpoint, **settings}
        self.weights = [model_path, settings.get("max_image_tokens")]
        for path in sorted(Path(checkpoint).glob("*.safetensors")) if checkpoint else ():
            with open(path, "rb") as file:
                self.weights.append(hashlib.file_digest(file, "sha256").hexdigest())

    @cached_property
    def loaded(self):
        """(model, processor)."""
        try:
            return load_judge(**self.arguments)
        except SafetensorError as error:
            path = self.arguments["checkpoint"] or self.arguments["model_path"]
            stop(f"{path}: a file of its weights is damaged ({one_line(error)})")


# ---- Encoding ------------------------------------------------------------------------------------
def as_seen(picture):
    """RGB as a person sees it: upright by its EXIF tag, alpha on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF" or max(picture.size) > 200 * min(picture.size):
        raise OSError("a strip, or pixels of 16 or 32 bits or floats, which `convert` would clip")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def load_image(image):
    """RGB picture from a path or a PIL image."""
    return as_seen(image if isinstance(image, Image.Image) else Image.open(image))


def as_words(text, tokenizer):
    """The text with special tokens spelled apart, "< |im_end|>", so that no text ends a turn."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for token in sorted(added.union(tokenizer.all_special_tokens), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def encode_prompts(processor, texts, images):
    """Left-padded model inputs for one user turn (image, then text) per row; input_ids (B, P)."""
    chats = []
    for text in texts:
        words = {"type": "text", "text": as_words(text, processor.tokenizer)}
        chats.append([{"role": "user", "content": [{"type": "image"}, words]}])
    # Templates that open a thought (Qwen3.5) close it at once; the others do not read the variable.
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    prompts = processor.apply_chat_template(chats, **how)
    pictures = [[load_image(image)] for image in images]
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    return processor(text=prompts, images=pictures, return_mm_token_type_ids=True, **how)


# ---- Sampling ------------------------------------------------------------------------------------
# A transformer keeps the keys and values of all earlier tokens (its cache), so that a new token
# costs one row of computation. The n samples of a prompt agree on the prompt's part, which is most
# of it (the picture!): it is computed and stored once, and each sample's own tokens beside it:
#
#     shared, B rows                                  own, B * n rows
#     prompt 0: [image | question | A | B]  <-+-  sample 0: [A: | red  | circle | ...
#                                             +-  sample 1: [A: | blue | ...
#     prompt 1: [image | question | A | B]  <-+-  sample 2: [B: | ...
#
# A new token attends to both parts: one softmax over the scores of all keys. Layers of transformers
# call cache.update(keys, values) and pass what it returns to the attention function that the config
# names. Our `update` returns the cache itself; our function "shared_prompt" asks it to `attend`.
class SharedPrompt:
    """One layer's cache: the n samples of a prompt share its keys and values (sketch above).

    layer: holds the prompts' keys and values (B, H, P, D); prompt_mask (B, P) is 0 at padding;
    room: the most tokens that a sample writes."""

    def __init__(self, layer, prompt_mask, n, room):
        self.n = n
        self.keys, self.values = layer.keys, layer.values
        is_padding = prompt_mask.to(layer.keys.device)[:, None, None] == 0  # (B, 1, 1, P)
        self.bias = torch.where(is_padding, -torch.inf, 0.0)
        B, H, _, D = layer.keys.shape
        self.own = layer.keys.new_empty(2, B * n, H, room, D)  # keys and values of own tokens
        self.length = 0  # number of own tokens so far

    def update(self, keys, values, *args, **kwargs):
        """Append the new tokens' keys and values (B*n, H, 1, D) in place."""
        self.own[:, :, :, self.length] = torch.stack([keys, values])[..., 0, :]  # (2, B*n, H, D)
        self.length += 1
        return self, None

    def attend(self, query, scaling):
        """Attention (B*n, 1, H*G, D) of the new tokens' queries (B*n, H*G, 1, D) to both parts."""
        rows, H, P, D = len(query), *self.keys.shape[1:]
        own_keys, own_values = self.own[..., : self.length, :]  # (B*n, H, own tokens, D) each
        q = query.reshape(rows, H, -1, D).float() * scaling  # (B*n, H, G, D)
        to_prompt = self.by_prompt(q) @ self.keys.float().mT + self.bias  # (B, H, n*G, P)
        to_own = q @ own_keys.float().mT  # (B*n, H, G, own tokens)
        p = torch.cat([self.by_sample(to_prompt), to_own], -1).softmax(-1)  # (B*n, H, G, P + own)
        of_prompt = self.by_prompt(p[..., :P]) @ self.values.float()  # (B, H, n*G, D)
        out = self.by_sample(of_prompt) + p[..., P:] @ own_values.float()  # (B*n, H, G, D)
        return out.to(query.dtype).reshape(rows, 1, -1, D)

    def by_prompt(self, x):
        """(B*n, H, G, ...) -> (B, H, n*G, ...): a prompt's samples ask it in one product."""
        return x.unflatten(0, (-1, self.n)).transpose(1, 2).flatten(2, 3)

    def by_sample(self, x):
        """(B, H, n*G, ...) -> (B*n, H, G, ...)."""
        return x.unflatten(2, (self.n, -1)).transpose(1, 2).flatten(0, 1)

    def reorder_cache(self, rows):
        """Only these rows of the B*n go on: all n of some prompts. The name is transformers'."""
        rows = rows.to(self.keys.device)  # with --device auto, layers lie on several
        prompts = rows[:: self.n] // self.n
        self.keys, self.values = self.keys[prompts], self.values[prompts]
        self.bias = self.bias[prompts]
        self.own = self.own[:, rows]


def shared_prompt_attention(module, query, cache, values, *args, scaling, **kwargs):
    return cache.attend(query, scaling), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


class Decoding:
    """B prompts, encoded once, and n samples of each; logits (B*n, V) are for their next tokens.

    Where all layers are plain attention, they share the prompts: SharedPrompt. Where some are not
    (linear attention, say), each sample has a copy of its prompt's cache, and a mask (B*n, P+t)."""

    def __init__(self, model, inputs, n, room):
        self.model = model
        inner = unwrap(model).model
        self.config = inner.language_model.config
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        self.cache = out.cache
        self.logits = out.logits[:, -1].repeat_interleave(n, 0)  # (B*n, V)
        mask = inputs["attention_mask"]  # (B, P)
        position = mask.sum(1, keepdim=True)  # (B, 1), of the next token
        if getattr(inner, "rope_deltas", None) is not None:
            # Positions are in time, height and width, and an image's tokens share them: the next
            # is the number of tokens + delta <= 0, which the model would add to other prompts, too.
            position = (position + inner.rope_deltas).expand(3, -1, -1)  # (3, B, 1)
            inner.rope_deltas = None
        self.position = position.repeat_interleave(n, -2)  # ([3,] B*n, 1)
        if all(type(layer) is DynamicLayer for layer in self.cache.layers):
            self.cache.layers = [SharedPrompt(x, mask, n, room) for x in self.cache.layers]
            self.mask = None  # SharedPrompt leaves the padding out itself
        else:
            self.mask = mask.repeat_interleave(n, 0)  # (B*n, P)
            index = torch.arange(len(mask), device=mask.device)  # (B,)
            self.cache.reorder_cache(index.repeat_interleave(n))  # repeats each row n times

    def narrow(self, rows):
        """Only these rows of the B*n go on: see SharedPrompt.reorder_cache."""
        rows = rows.to(self.position.device)  # with --device auto, logits may lie elsewhere
        self.cache.reorder_cache(rows)
        self.position = self.position[..., rows, :]
        self.mask = None if self.mask is None else self.mask[rows]

    def step(self, tokens):
        """Append one token (B*n,) to each sample."""
        usual = self.config._attn_implementation
        if self.mask is None:
            self.config._attn_implementation = "shared_prompt"  # for this call alone
        else:
            self.mask = F.pad(self.mask, (0, 1), value=1)  # (B*n, P+t)
        tokens = tokens[:, None].to(self.position.device)  # (B*n, 1)
        inputs = {"attention_mask": self.mask, "position_ids": self.position, "use_cache": True}
        self.logits = self.model(tokens, cache=self.cache, **inputs).logits[:, -1]  # (B*n, V)
        self.config._attn_implementation = usual
        self.position = self.position + 1


def pick_tokens(logits, uniforms, temperature):
    """One token id per row (S,) of logits (S, V): the most likely at temperature 0, else the first
    whose cumulative probability exceeds the row's uniform number (S,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.to(uniforms.dtype) / temperature).softmax(-1).cumsum(-1)  # (S, V)
    threshold = uniforms[:, None] * cdf[:, -1:]  # (S, 1); the last sum is 1 but for rounding
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=cdf.shape[1] - 1)


@torch.no_grad()
def sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids):
    """Encode B prompts once, decode n samples of each -> token ids (B*n, R), and at each of them
    the log-odds (B*n, R) of the verdict's letters in nats at temperature 1.

    uniforms (B, n, R) in [0, 1): all the randomness. What follows a stop token means nothing."""
    B, n, R = uniforms.shape
    decoding = Decoding(model, inputs, n, R)
    device = decoding.logits.device
    precise = torch.float32 if device.type == "mps" else torch.float64  # Apple's have no float64
    uniforms = uniforms.reshape(B * n, R).to(device, precise)
    tokens = torch.full((B * n, R), -1, device=device)
    log_odds = torch.zeros(B * n, R, device=device)
    rows = torch.arange(B * n, device=device)  # the samples that are in the batch
    going = torch.ones_like(rows, dtype=torch.bool)  # those of them that have not stopped
    for t in range(R):
        new = pick_tokens(decoding.logits, uniforms[rows, t], temperature)
        tokens[rows, t] = new
        log_odds[rows, t] = verdict_log_odds(decoding.logits, *verdict_ids)
        going &= ~torch.isin(new, stop_ids.to(device))
        if t + 1 == R or not going.any():
            break
        of_prompt = going.view(-1, n).any(1)  # has it samples that have not stopped?
        if of_prompt.float().mean() < 0.75:  # finished prompts leave the batch, many at a time
            index = of_prompt.repeat_interleave(n).nonzero()[:, 0]
            decoding.narrow(index)
            rows, new, going = rows[index], new[index], going[index]
        decoding.step(new)
    return tokens.cpu(), log_odds.cpu()


def verdict_token_ids(tokenizer):
    """[id of " A", id of " B"], as in "Verdict: A"; r is of these also where "**A**" is written."""
    return [tokenizer(f"Verdict: {x}", add_special_tokens=False).input_ids[-1] for x in "AB"]


def find_verdict_token(tokenizer, ids):
    """(text, verdict, k) of a response's token ids; ids[k] holds the verdict's letter, or None."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    verdict, index = find_verdict(text)
    if verdict is None:
        return text, None, None
    # back from the end, until the tokens before k do not hold the letter any more
    k = len(ids) - 1
    while len(tokenizer.decode(ids[:k], skip_special_tokens=True)) > index:
        k -= 1
    return text, verdict, k


def finish_sample(tokenizer, tokens, log_odds, stop_ids):
    """The Answer that one sample's tokens (R,) and log-odds (R,) are."""
    stops = torch.isin(tokens, stop_ids.cpu()).nonzero()  # indices of stop tokens
    length = int(stops[0]) if len(stops) else len(tokens)  # without a stop token all are written
    text, verdict, k = find_verdict_token(tokenizer, tokens[:length].tolist())
    r = None if verdict is None else log_odds[k].item()
    return {"text": text, "complete": len(stops) > 0, "verdict": verdict, "log_odds": r}


def row_seed(seed, *names):
    """A 63-bit seed from the run's seed and a row's identity, whatever is resumed or split."""
    text = "/".join(str(name) for name in (seed, *names))
    sha = hashlib.sha256(text.encode(errors="backslashreplace")).digest()
    return int.from_bytes(sha[:8], "big") >> 1


def sample(
    model, processor, rows, n=1, temperature=1, max_new_tokens=256, seed=0, batch_size=256, bar=None
):
    """n samples per row: the one function that generates text; write it anew to use a server.

    rows: [{"id", "image": path or PIL, "text"}] -> in their order, lists of n Answers (a server's
    log-probabilities of the tokens A and B give log_odds). A row's randomness comes from (seed, id)
    alone. batch_size: sequences decoded together."""
    tokenizer, device = processor.tokenizer, unwrap(model).device
    listed = model.generation_config.eos_token_id or []
    listed = [listed] if isinstance(listed, int) else listed
    stop_ids = torch.tensor([*listed, tokenizer.eos_token_id])  # the last is what 03 teaches
    how = temperature, stop_ids, verdict_token_ids(tokenizer)

    def answer(batch):
        """Lists of n Answers to some of the rows."""
        uniforms = []
        for row in batch:
            generator = torch.Generator().manual_seed(row_seed(seed, row["id"]))
            uniforms.append(torch.rand(n, max_new_tokens, generator=generator))
        texts, images = [row["text"] for row in batch], [row["image"] for row in batch]
        inputs = encode_prompts(processor, texts, images).to(device)
        finished = []
        for tokens, log_odds in zip(*sample_batch(model, inputs, torch.stack(uniforms), *how)):
            finished.append(finish_sample(tokenizer, tokens, log_odds, stop_ids))  # of (R,), (R,)
        if bar:  # of process 0: the others do a batch at the same time
            bar.update(min(len(batch) * WORLD, bar.total - bar.n))
        return [finished[i : i + n] for i in range(0, len(finished), n)]

    size = max(1, batch_size // n)  # prompts encoded together
    # by length, which pads little; the longest first shows at once what memory and time it takes
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["text"]))
    in_order = [rows[i] for i in order]
    batches = [in_order[i : i + size] for i in range(0, len(rows), size)]
    answers = dict(zip(order, share_out(batches, answer)))
    return [answers[i] for i in range(len(rows))]


# ---- Several processes: torchrun --nproc-per-node K -- script.py ... -----------------------------
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """[the value of process 0, of process 1, ...], in every process."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def share_out(batches, work):
    """The lists work(batch) of all batches, joined. Process r of K does batches r, r + K, ...: so
    the batches, and every number, are those of a single process."""
    of_process = gather([work(batch) for batch in batches[RANK::WORLD]])
    results = []
    for i in range(len(batches)):
        results += of_process[i % WORLD][i // WORLD]
    return results


def join_processes():
    """torchrun's processes find each other, and each its GPU; the first one speaks."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open to the end


# ---- Files: written whole or not at all; answers, which are kept ---------------------------------
def write_bytes(path, data):
    """Atomic: a reader sees the old file or the new one. Of several processes the first writes."""
    if RANK == 0:
        unfinished = Path(f"{path}.partial")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(data)
        unfinished.replace(path)


def write_text(path, text):
    write_bytes(path, text.encode(errors="backslashreplace"))  # for half characters


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def digest(value):
    """16 hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# With rate and time left; none where stdout is no terminal, and in other processes than the first.
progress_bar = partial(tqdm, dynamic_ncols=True, disable=True if RANK else None, file=sys.stdout)
CHUNK = 2048  # sequences between two saves, whatever --batch-size: what an interruption costs


def kept(path, shape, tasks, work, size, describe):
    """One row for each task, in their order. What the file at `path` lacks is made and appended.

    tasks: [(depends, input)]. depends: a JSON value of all that the row depends on. Its digest is
    the row's "key", by which the row is found: if anything changes, it is another row.
    work(inputs, bar): the rows of some inputs, without keys. It gets `size` inputs at a time.
    Such a chunk ends with an empty line in the file. What stands after the last empty line is of an
    interrupted chunk: it is cut off, and the next start forms the same chunks."""
    path.touch()
    if RANK == 0:
        chunks, end, _ = path.read_bytes().rpartition(b"\n\n")
        os.truncate(path, len(chunks + end))
    gather(None)  # all wait for the first
    rows = {row["key"]: row for row in read_rows(path, shape)}
    keys = [digest(depends) for depends, _ in tasks]
    missing = {}  # a task that occurs twice is done once
    for key, (_, task) in zip(keys, tasks):
        if key not in rows:
            missing[key] = task
    print(f"{describe}: {len(keys)}, of which {len(missing)} are not there yet")
    with progress_bar(total=len(missing), desc=describe, unit="row") as bar:
        for start in range(0, len(missing), size):
            chunk = list(missing)[start : start + size]
            made = work([missing[key] for key in chunk], bar)
            lines = []
            for key, row in zip(chunk, made, strict=True):
                rows[key] = {"key": key, **row}
                lines.append(json.dumps(rows[key], ensure_ascii=False))
            if RANK == 0:
                with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write("\n".join([*lines, "", ""]))
    return [rows[key] for key in keys]


def ask(path, judge, requests, describe, *, image_root, batch_size, **sampling):
    """For each request the list of its n Answers by a Judge, kept in path.

    requests: [{"id", "image", "text"}]; an image is a name from image_root, or a PIL picture.
    sampling: n, temperature, max_new_tokens and seed of sample."""
    tasks = []
    for request in requests:
        name = image = request["image"]
        if isinstance(image, Image.Image):
            name = hashlib.sha256(image.tobytes()).hexdigest()
        else:
            image = Path(image_root) / image
        depends = {"id": request["id"], "text": request["text"], "image": name, **sampling}
        tasks.append(({**depends, "weights": judge.weights}, {**request, "image": image}))

    def answer(chunk, bar):
        answers = sample(*judge.loaded, chunk, batch_size=batch_size, bar=bar, **sampling)
        return [{"id": row["id"], "answers": of_row} for row, of_row in zip(chunk, answers)]

    n, longest = sampling["n"], sampling["max_new_tokens"]
    print(f"{describe}: {len(requests)} x {n} texts of at most {longest} tokens")
    size = max(1, CHUNK // n)
    return [row["answers"] for row in kept(path, Answers, tasks, answer, size, describe)]


# ---- Stages: arguments, folders, the end ---------------------------------------------------------
STARTED = time.time()


def real(low, high, kind=float):
    """A type for argparse: a number from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:  # nan fails, too
            raise argparse.ArgumentTypeError(f"{text}: a number from {low} to {high} is expected")
        return kind(text)

    return parse


def whole(low, high=10**9):
    """The same for whole numbers."""
    return real(low, high, int)


def stage_parser(doc):
    """A script's parser, with what all stages take."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    add = parser.add_argument_group("the run").add_argument
    add("--run", default="runs/default", help="its directory, for all stages (%(default)s)")
    add("--device", help="cuda, mps, cpu, or auto: one model over all GPUs; else the best one here")
    add("--batch-size", type=whole(1), default=256, help="sequences at a time (%(default)s)")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of every random choice (0)")
    return parser


def start_stage(args, name):
    """The stage's folder, in which no other start writes until this one has ended."""
    folder = Path(args.run) / name
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        lock = filelock.FileLock(folder / ".lock", is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            stop(f"another process is at work in {folder}: wait until it has ended")
        atexit.register(lock.release)
    return folder


def stage_args(run, stage):
    """The arguments that a complete stage was made with, from its meta.json."""
    path = Path(run) / stage / "meta.json"
    if not path.exists():
        stop(f"{path.parent} is not complete: first run {stage[:2]}_*.py --run={run} (03: its tag)")
    args = read_json(path)["args"]
    if "image_root" in args:  # from the run directory, which may have been moved
        args["image_root"] = str(Path(run) / args["image_root"])
    return args


def read_preferences(run, split):
    """Stage 01's pairs of a split."""
    rows = read_rows(Path(run) / "01_preferences" / "preferences.jsonl", Pair)
    return [row for row in rows if row["split"] == split]


def finish_stage(folder, args, counts, next_step, **extra):
    """Say what was made and dropped; write meta.json last: its presence means "complete"."""
    gather(None)  # all have deleted the old meta.json
    if next_step.startswith("python "):
        next_step += f" --run={shlex.quote(args.run)}"
    used = ("torch", "transformers", "peft", "datasets", "ultralytics", "numpy", "pillow")
    meta = {
        "args": vars(args),
        "counts": counts,
        **extra,
        "seconds": round(time.time() - STARTED, 1),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "versions": {d.name: d.version for d in distributions() if d.name in used},
    }
    for reason, count in counts.items():
        print(f"  {reason:<44} {count:>8}")
    print(f"{folder}: done in {meta['seconds']:.0f} s\nnext: {next_step}")
    write_json(folder / "meta.json", meta)


def run(main, args):
    """main(args), as every script ends with; what a user can cause ends in one line."""
    transformers.logging.set_verbosity_error()  # what matters about a model, load_judge checks
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show every letter
    if WORLD > 1:
        join_processes()
    try:
        main(args)
    except KeyboardInterrupt:
        stop("interrupted: the same command goes on with what is kept")
    except OSError as error:  # no such file or model, a full disk
        stop(f"{one_line(error)} (at work in {args.run})")
    except torch.OutOfMemoryError:
        stop("out of memory: lower --batch-size or --micro-batch, which change no result")
