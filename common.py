"""What the five stages must agree on byte for byte, and plumbing: the judge's prompt and verdict,
model loading, encoding, batched sampling with the verdict's log-odds, several processes, resumable
run directories. The method's ideas stand in the stages.

Letters in all files: B sequences, T tokens, V vocabulary entries, P prompt tokens (image included),
R response tokens. In sampling: n samples of a prompt, S samples that are still being written (at
first B * n), H key-value heads, G query heads to each of them, D head size.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import DynamicLayer

# ---- The judge's prompt, verdict and checks ------------------------------------------------------
INSTRUCTIONS = {
    "critique": 'Check each claim of A and B against the image, one per line: "A: claim: yes" or '
    '"A: claim: no". End with "Verdict: A" or "Verdict: B", the better response.',
    "descriptive": 'Describe the image. End with "Verdict: A" or "Verdict: B", '
    "the better response.",
    "none": 'Answer "Verdict: A" or "Verdict: B", the better response.',
}


def build_judge_prompt(prompt, response_a, response_b, style="critique", reference=None):
    """The one text that asks for a judgement; it follows the image.

    Lines after the first of what is asked and answered are indented, so that no response can fake
    a line of the prompt's own ("Response B: ..."). reference: the expert's findings and the label,
    as the lines that a critique would hold. Only stage 02 gives it, to get good critiques; what is
    trained on and evaluated has none.
    """
    question = ""
    parts = {"Question": prompt, "Response A": response_a, "Response B": response_b}
    for name, text in parts.items():
        question += "\n  ".join(f"{name}: {text}".splitlines()) + "\n"
    if reference is not None:
        question += f"Known to be true, never to be mentioned:\n{reference}\n"
    return question + INSTRUCTIONS[style]


def both_orders(pair):
    """The pair's two questions: in order "ab" the chosen response is A (label "A"), in "ba" B."""
    for order, a, b, label in (
        ("ab", "chosen", "rejected", "A"),
        ("ba", "rejected", "chosen", "B"),
    ):
        yield {
            "id": f"{pair['id']}-{order}",
            "pair_id": pair["id"],
            "order": order,
            "image": pair["image"],
            "prompt": pair["prompt"],
            "response_a": pair[a],
            "response_b": pair[b],
            "label": label,
        }


_MARK = r"(?:[^\w\n]|_)*"  # anything on a line that is no word: markdown, quotes, punctuation
_VERDICT_LINE = re.compile(  # "Verdict: ...", "**Final verdict**: ...", "3. Verdict: ..."
    rf"^{_MARK}(?:\d+{_MARK})?(?:final +)?verdict{_MARK}:(.*)$", re.IGNORECASE | re.MULTILINE
)
_VERDICT = re.compile(rf"^{_MARK}(?:response +)?([ab]){_MARK}$", re.IGNORECASE)  # what follows it
# A check is "[A:] claim: yes|no"; a line may hold several. It is cut after each ": yes" or ": no",
# unless the side's letter stands right before it: the "no" of "A: no people: yes" is the claim's.
_CLAUSE_END = re.compile(
    r";|(?:(?<=: yes)(?<!\b[AB]: yes)|(?<=: no)(?<!\b[AB]: no))[.,]? +", re.IGNORECASE
)
_CLAIM_START = re.compile(  # "A:", "2. Response B:", "-", or nothing
    r"[\W_]*(?:\d+[\W_]+)?(?:(?:response +)?([AB])\b[^\w:]*:)?", re.IGNORECASE
)
_ANSWER = re.compile(r":(?:[^\w\n:]|_)*(yes|no)\b", re.IGNORECASE)


def find_verdict(text):
    """(verdict, index of its letter in text) of the last line "Verdict: ...", or (None, -1)."""
    lines = list(_VERDICT_LINE.finditer(text.replace("：", ":")))
    if not lines:
        return None, -1
    match = _VERDICT.match(lines[-1].group(1))
    if match is None:  # neither letter, or both
        return None, -1
    return match.group(1).upper(), lines[-1].start(1) + match.start(1)


def parse_verdict(text):
    """ "A", "B", or None where the last verdict line names neither or both.

    Case, markdown, trailing punctuation and the full-width colon ("Verdict：A") are tolerated.
    """
    return find_verdict(text)[0]


def parse_checks(text):
    """The critique's checks, one per line or clause: list of ("A" | "B", claim, supported).

    >>> parse_checks("A: red circle: yes; A: a star: no\\nB: a dog: yes, on the left\\nVerdict: B")
    [('A', 'red circle', True), ('A', 'a star', False), ('B', 'a dog', True)]
    """
    checks = []
    for line in text.replace("：", ":").splitlines():
        side = ""  # a clause without a letter speaks of the response that its line named last
        for clause in _CLAUSE_END.split(line):
            start = _CLAIM_START.match(clause)
            side = (start.group(1) or side).upper()
            clause = clause[start.end() :]
            answer = _ANSWER.search(clause)
            claim = clause[: answer.start()].strip(" *_\"'`") if answer else ""
            if side and claim:
                checks.append((side, claim, answer.group(1).lower() == "yes"))
    return checks


def verdict_log_odds(logits, id_a, id_b):
    """r = log P(A) - log P(B) in nats (B,), from logits (B, V) at the verdict position.

    id_a, id_b: token ids of the letters, ints or (B,) tensors. The softmax's normaliser cancels.
    """
    logits = logits.float()  # (B, V); so that a bf16 difference is not rounded once more
    rows = torch.arange(len(logits), device=logits.device)  # (B,)
    return logits[rows, id_a] - logits[rows, id_b]  # (B,)


# ---- Models --------------------------------------------------------------------------------------
class Stop(SystemExit):
    """The end by one readable line; not the exit by SIGTERM, which nothing catches."""


def stop(message):
    """End the script with one readable line: what is wrong, where, and what to do."""
    raise Stop(f"error: {message}")


def one_line(error):
    """An exception as a short line: its kind and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def pick_device(name=None):
    """The torch.device that inputs go to: the one named, else this process's GPU, Apple's, the CPU.

    "auto" spreads the model over all GPUs; inputs go to the first.
    """
    if name and name != "auto":
        try:
            torch.zeros(1, device=name).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # by kind of device
            stop(f"--device {name}: {one_line(error)}")
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def unwrap(model):
    """The transformers model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_judge(model_path, checkpoint=None, device=None, max_image_tokens=None, trainable=False):
    """(model, processor) from a hub id or folder, in evaluation mode, all weights frozen.

    checkpoint: a PEFT adapter's folder (trainable: its weights are not frozen), or the folder of a
    fully fine-tuned model. max_image_tokens: no picture takes more of the prompt's tokens.
    """
    is_adapter = checkpoint is not None and (Path(checkpoint) / "adapter_config.json").exists()
    weights = model_path if checkpoint is None or is_adapter else str(checkpoint)
    target = pick_device(device)
    # bf16 on the GPUs that have it; a fully fine-tuned model that 04 trains further stays float32
    has_bf16 = target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    is_full = trainable and checkpoint is not None and not is_adapter
    dtype = torch.bfloat16 if has_bf16 and not is_full else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(model_path)
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            weights,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation="sdpa",
            device_map="auto" if device == "auto" else target,
        )
        check_processor(processor)
    except Exception as error:  # no such model, cut weights, no tokenizer: each its own kind
        stop(f"--model {weights}: {one_line(error)}")
    absent = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
    if absent:  # transformers fills them with random numbers
        stop(f"--model {weights} lacks {len(absent)} of its weights, such as {absent[0]}")
    if max_image_tokens:
        vision = processor.image_processor  # a token covers merge_size x merge_size patches
        pixels = max_image_tokens * (vision.patch_size * vision.merge_size) ** 2
        # Both "edges" are areas, in pixels. Smaller pictures are enlarged to the first. Rounding up
        # may then double each side: so the first is a quarter of the bound at most.
        smallest = min(vision.size["shortest_edge"], pixels // 4)
        vision.size = {"shortest_edge": smallest, "longest_edge": pixels}
    gib = sum(weight.nbytes for weight in model.parameters()) / 2**30
    where = "all GPUs" if device == "auto" else target
    kind = str(model.dtype).removeprefix("torch.")
    print(f"{checkpoint or weights}: {gib:.2f} GiB of {kind} weights on {where}")
    model.requires_grad_(False)
    if is_adapter:
        model = load_adapter(model, checkpoint, trainable)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            stop(f"{checkpoint or weights}: the weight {name} is not finite (nan or infinity)")
    return model.eval(), processor


def check_processor(processor):
    """Raises ValueError, which load_judge reports, if it cannot put a picture into a chat."""
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise ValueError(f"it has no {part}: is it a vision-language model?")
    if not processor.tokenizer("A").input_ids:  # transformers made an empty one
        raise ValueError("it has no tokenizer")
    if processor.tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no stop token")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]
    if processor.image_token not in processor.apply_chat_template(chat, tokenize=False):
        raise ValueError("its chat template leaves out the image")


def load_adapter(model, folder, trainable=False):
    """PeftModel; refuses an adapter whose keys do not fit, where PEFT itself only warns, and one
    that was trained on a model of another name.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights  # slow to import

    base = model.config._name_or_path
    with warnings.catch_warnings(action="ignore"):  # of keys that do not fit: see below
        try:
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        except Exception as error:  # of another width, cut, without weights: each its own kind
            stop(f"the adapter {folder} does not load: {one_line(error)}")
    trained_on = model.peft_config["default"].base_model_name_or_path or base
    if Path(trained_on).name != Path(base).name:  # the folder may have moved
        stop(f"the adapter {folder} was trained on {trained_on}, not on {base}")
    found = set(load_peft_weights(str(folder), device="cpu"))
    expected = set(get_peft_model_state_dict(model))
    if found != expected:
        only_there, only_here = sorted(found - expected)[:8], sorted(expected - found)[:8]
        stop(f"the adapter {folder} does not fit the model: it has {only_there}, not {only_here}")
    return model


# ---- Encoding ------------------------------------------------------------------------------------
def as_seen(picture):
    """RGB as a person sees it: upright by its EXIF tag, deep greys in 8 bits, alpha on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":  # 16 or 32 bits or floats: convert would clip them
        grey = np.asarray(picture, dtype=float)
        if not np.isfinite(grey).all():
            raise ValueError("a pixel is not finite")
        whites = [65535] if picture.mode.startswith("I;16") else [1, 255, 65535, grey.max()]
        white = next(white for white in whites if grey.max() <= white)
        picture = Image.fromarray((grey.clip(0) * (255 / white)).round().astype("uint8"))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def load_image(image, aspect=200):
    """RGB picture from a path or a PIL image.

    Where the long side is more than `aspect` times the short one, black bars fill it up:
    transformers' processors refuse more than 200.
    """
    try:
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        picture = as_seen(picture)
    except Exception as error:  # missing, no picture, cut: each decoder has its own kind
        stop(f"image {image}: {type(error).__name__}: {error}")
    shortest = math.ceil(max(picture.size) / aspect)
    size = tuple(max(side, shortest) for side in picture.size)
    return picture if size == picture.size else ImageOps.pad(picture, size)


def as_words(text, tokenizer):
    """The text with special tokens spelled apart, "<|im_end|>" as "< |im_end|>": what a prompt, a
    response or a critique says never ends a turn and never counts as an image.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for token in sorted(added.union(tokenizer.all_special_tokens), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def encode_prompts(processor, texts, images):
    """Left-padded model inputs for one user turn (image, then text) per row; input_ids (B, P)."""
    chats = []
    for text in texts:
        text = as_words(text, processor.tokenizer)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        chat = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        chats.append(chat)
    # A picture x times as long as high takes at least x tokens: with N tokens, x is N at most.
    vision = processor.image_processor
    most_tokens = vision.size["longest_edge"] / (vision.patch_size * vision.merge_size) ** 2
    inputs = processor(
        text=chats,
        images=[[load_image(image, min(200, most_tokens))] for image in images],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_mm_token_type_ids=True,
    )
    length, bound = inputs["input_ids"].shape[1], processor.tokenizer.model_max_length
    if length > bound:
        longest = max(texts, key=len)
        stop(f"a prompt of {length} tokens, more than the model's {bound}: {longest[:60]!r} ...")
    return inputs


# ---- Sampling ------------------------------------------------------------------------------------
# A transformer keeps the keys and values of all earlier tokens (its cache), so that a new token
# costs one row of computation. The n samples of a prompt agree on the prompt's part, which is most
# of it (the picture!): it is computed and stored once, and each sample's own tokens beside it:
#
#     shared, B rows                              own, B * n rows
#     prompt 0: [image | question | A | B]  <-+-  sample 0: [A: | red  | circle | ...
#                                             +-  sample 1: [A: | blue | ...
#     prompt 1: [image | question | A | B]  <-+-  sample 2: [B: | ...
#
# A new token attends to both parts. The softmax over all keys is the two parts' own softmaxes,
# weighted by their normalisers (sums of exponentials): z_prompt and z_own over z_prompt + z_own.
def softmax_part(query, keys, values, bias=0.0):
    """softmax(query keys^T + bias) values (..., D) and its log normaliser (..., 1), in float32."""
    scores = query @ keys.float().mT + bias  # (..., queries, keys)
    log_p = scores.log_softmax(-1)  # (..., queries, keys)
    log_z = (scores - log_p)[..., -1:]  # the same at every key; the last one is never padding
    return log_p.exp() @ values.float(), log_z


class SharedPrompt:
    """One layer's cache: the n samples of a prompt share its keys and values (sketch above).

    layer: holds the prompts' keys and values (B, H, P, D); prompt_mask (B, P) is 0 at padding;
    room: the most tokens that a sample writes.
    """

    def __init__(self, layer, prompt_mask, n, room):
        device = layer.keys.device  # with --device auto, layers lie on several
        B, H, _, D = layer.keys.shape
        self.n = n
        self.prompt_keys, self.prompt_values = layer.keys, layer.values
        hidden = prompt_mask.to(device)[:, None, None] == 0  # (B, 1, 1, P)
        self.bias = torch.where(hidden, -torch.inf, 0.0)
        self.own_keys = layer.keys.new_empty(B * n, H, room, D)
        self.own_values = layer.values.new_empty(B * n, H, room, D)
        self.length = 0  # own tokens so far
        # (S,): row s of the batch is sample slots[s] % n of prompt slots[s] // n
        self.slots = torch.arange(B * n, device=device)

    def update(self, keys, values, *args, **kwargs):
        """Write the new tokens' keys and values (S, H, 1, D) in place.

        transformers passes what a cache returns here on to its attention function, as keys and
        values. Returning itself is how this cache reaches the function that is registered below.
        """
        self.own_keys[:, :, self.length] = keys[:, :, 0]
        self.own_values[:, :, self.length] = values[:, :, 0]
        self.length += 1
        return self, None

    def attend(self, query, scaling):
        """Attention (S, 1, H*G, D) of the new tokens' queries (S, H*G, 1, D) to both parts."""
        B, H, _, D = self.prompt_keys.shape
        q = query.reshape(len(query), H, -1, D).float() * scaling  # (S, H, G, D)
        # All samples of a prompt ask its keys in one product; those that have left ask with zeros.
        asked = q.new_zeros(B * self.n, *q.shape[1:]).index_copy_(0, self.slots, q)
        asked = asked.view(B, self.n, H, -1, D).transpose(1, 2).flatten(2, 3)  # (B, H, n*G, D)
        out, log_z = softmax_part(asked, self.prompt_keys, self.prompt_values, self.bias)
        prompt, log_z_prompt = self.by_sample(out), self.by_sample(log_z)  # (S, H, G, D or 1)
        own_keys = self.own_keys[:, :, : self.length]  # (S, H, own tokens, D)
        own, log_z_own = softmax_part(q, own_keys, self.own_values[:, :, : self.length])
        weight = (log_z_prompt - log_z_own).sigmoid()  # z_prompt / (z_prompt + z_own)
        return own.lerp(prompt, weight).to(query.dtype).reshape(len(query), 1, -1, D)

    def by_sample(self, x):
        """(B, H, n*G, ...) -> (S, H, G, ...): the rows of the samples that are still here."""
        return x.unflatten(2, (self.n, -1)).transpose(1, 2).flatten(0, 1)[self.slots]

    def reorder_cache(self, keep):
        """Only the samples `keep` (a rising index into S) go on; prompts without any leave, too.

        The name is transformers': its cache hands the call on to each layer.
        """
        keep = keep.to(self.slots.device)
        self.own_keys, self.own_values = self.own_keys[keep], self.own_values[keep]
        slots = self.slots[keep]
        here, place = (slots // self.n).unique(return_inverse=True)  # prompts that stay, new places
        self.prompt_keys, self.prompt_values = self.prompt_keys[here], self.prompt_values[here]
        self.bias = self.bias[here]
        self.slots = place * self.n + slots % self.n


def shared_prompt_attention(module, query, shared, values, *args, scaling, **kwargs):
    """An attention function for transformers; `shared` is the SharedPrompt that update returned."""
    return shared.attend(query, scaling), None


AttentionInterface.register("shared_prompt", shared_prompt_attention)


class Decoding:
    """B prompts, encoded once, and n samples of each; logits (S, V) are for their next tokens."""

    def __init__(self, model, inputs, n, room):
        self.model, self.inner = model, unwrap(model).model
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        self.cache = out.cache
        self.logits = out.logits[:, -1].repeat_interleave(n, 0)  # (S, V)
        mask = inputs["attention_mask"]  # (B, P)
        self.position = mask.sum(1, keepdim=True)  # (B, 1), of the next token
        # The tokens of an image share position numbers, so the next position is the number of
        # tokens + delta (<= 0). The model keeps its deltas and would add them in its next call,
        # which has other prompts: they are taken and cleared.
        self.has_deltas = getattr(self.inner, "rope_deltas", None) is not None
        if self.has_deltas:
            self.position = self.position + self.inner.rope_deltas
            self.inner.rope_deltas = None
        self.position = self.position.repeat_interleave(n, 0)  # (S, 1)
        self.is_shared = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        if self.is_shared:
            self.mask = None  # SharedPrompt hides the padding itself
            self.cache.layers = [SharedPrompt(x, mask, n, room) for x in self.cache.layers]
        else:  # other layers, such as linear attention: each sample gets a copy of its prompt's
            index = torch.arange(len(mask), device=mask.device).repeat_interleave(n)  # (S,)
            self.cache.reorder_cache(index)  # repeats each row n times
            self.mask = mask[index]  # (S, P)

    def keep(self, index):
        """Only the samples of this index go on."""
        index = index.to(self.position.device)  # with --device auto, logits may lie elsewhere
        self.cache.reorder_cache(index)
        self.position = self.position[index]
        if not self.is_shared:
            self.mask = self.mask[index]

    def step(self, tokens):
        """Append one token (S,) to each sample.

        Positions and mask are given, so that transformers asks the cache for nothing but update.
        """
        position = self.position  # (S, 1), or (3, S, 1) for time, height and width
        if self.has_deltas:
            position = position.expand(3, -1, -1)
        if not self.is_shared:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        config = self.inner.language_model.config
        usual = config._attn_implementation  # by which all other calls of the model attend
        try:
            config._attn_implementation = "shared_prompt" if self.is_shared else usual
            self.logits = self.model(
                input_ids=tokens[:, None].to(position.device),
                attention_mask=self.mask,
                position_ids=position,
                cache=self.cache,
                use_cache=True,
            ).logits[:, -1]  # (S, V)
        finally:
            config._attn_implementation = usual
        self.position = self.position + 1


def pick_tokens(logits, uniforms, temperature):
    """One token id per row (S,): the most likely at temperature 0, else by inverse transform
    sampling the first whose cumulative probability exceeds the row's uniform number.
    logits (S, V); uniforms (S,) in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.to(uniforms.dtype) / temperature).softmax(-1).cumsum(-1)  # (S, V)
    threshold = uniforms[:, None] * cdf[:, -1:]  # (S, 1); the last sum is 1 but for rounding
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=cdf.shape[1] - 1)


@torch.no_grad()
def sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids):
    """Encode B prompts once, decode n samples of each -> token ids (B*n, R), log-odds (B*n, R, 2)
    in nats at temperature 1 for both spellings of the verdict.

    uniforms (B, n, R) in [0, 1): the only randomness, one per token; verdict_ids: (ids of A, ids of
    B) from verdict_token_ids. What follows a sample's stop token means nothing: it goes on writing
    until it leaves the batch.
    """
    B, n, R = uniforms.shape
    decoding = Decoding(model, inputs, n, R)
    device = decoding.logits.device
    precise = torch.float32 if device.type == "mps" else torch.float64  # Apple's have no float64
    uniforms = uniforms.reshape(B * n, R).to(device, precise)
    tokens = torch.full((B * n, R), -1, device=device)
    log_odds = torch.zeros(B * n, R, 2, device=device)
    rows = torch.arange(B * n, device=device)  # (S,): the samples that are in the batch
    going = torch.ones_like(rows, dtype=torch.bool)  # (S,): those of them that have not stopped
    for t in range(R):
        new = pick_tokens(decoding.logits, uniforms[rows, t], temperature)  # (S,)
        tokens[rows, t] = new
        for spelling, (id_a, id_b) in enumerate(zip(*verdict_ids)):
            log_odds[rows, t, spelling] = verdict_log_odds(decoding.logits, id_a, id_b)
        going &= ~torch.isin(new, stop_ids.to(device))
        if t + 1 == R or not going.any():
            break
        if going.float().mean() < 0.75:  # finished samples leave the batch, many at a time
            index = going.nonzero()[:, 0]
            decoding.keep(index)
            rows, new, going = rows[index], new[index], going[index]
        decoding.step(new)
    return tokens.cpu(), log_odds.cpu()


def verdict_token_ids(tokenizer):
    """[[" A", "A"], [" B", "B"]] as token ids: a letter after a space, and bare as in "**A**"."""
    ids = []
    for letter in "AB":
        spellings = (f"Verdict: {letter}", letter)
        ids.append([tokenizer(x, add_special_tokens=False).input_ids[-1] for x in spellings])
    if set(ids[0]) & set(ids[1]):
        stop("the tokenizer gives A and B the same token: this model's verdict has no log-odds")
    return ids


def find_verdict_token(tokenizer, ids, verdict_ids):
    """(text, verdict, place, spelling) of a response's token ids; the last three may be None.

    ids[place] is the token that holds the verdict's letter; spelling: 1 where it is the bare
    letter, else 0, the letter after a space, which also stands in for rarer ones such as ":A".
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    verdict, index = find_verdict(text)
    if verdict is None:
        return text, None, None, None
    place = len(ids) - 1  # backwards, to the last token before which the letter is not written yet
    while len(tokenizer.decode(ids[:place], skip_special_tokens=True)) > index:
        place -= 1
    return text, verdict, place, int(ids[place] in (verdict_ids[0][1], verdict_ids[1][1]))


def finish_sample(tokenizer, tokens, log_odds, stop_ids, verdict_ids):
    """The answer of common.sample from one sample's tokens (R,) and log-odds (R, 2)."""
    stops = torch.isin(tokens, stop_ids.cpu()).nonzero()  # places of stop tokens
    length = int(stops[0]) if len(stops) else len(tokens)  # without a stop token all are written
    ids = tokens[:length].tolist()
    text, verdict, place, spelling = find_verdict_token(tokenizer, ids, verdict_ids)
    r = None if verdict is None else log_odds[place, spelling].item()
    return {"text": text, "complete": len(stops) > 0, "verdict": verdict, "log_odds": r}


def row_seed(seed, *keys):
    """A 63-bit seed from the run's seed and a row's identity, whatever is resumed or split."""
    text = "/".join(str(key) for key in (seed, *keys))
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def row_uniforms(seed, row_id, n, length):
    """(n, length) numbers in [0, 1) that depend on the seed and the row alone."""
    generator = torch.Generator().manual_seed(row_seed(seed, row_id))
    return torch.rand(n, length, generator=generator)


def stop_token_ids(model, tokenizer):
    """Those of the model's generation_config, and the one that stage 03 teaches: a tensor (n,)."""
    listed = model.generation_config.eos_token_id or []
    listed = [listed] if isinstance(listed, int) else listed
    return torch.tensor([*listed, tokenizer.eos_token_id], device=unwrap(model).device)


def sample(
    model,
    processor,
    requests,
    n=1,
    temperature=1.0,
    max_new_tokens=256,
    seed=0,
    batch_size=256,
    bar=None,
):
    """n samples per request: the one function that generates text; write it anew to use a server.

    requests: [{"id", "image": path or PIL, "text"}] -> in their order, lists of n answers {"text",
    "complete": it wrote the stop token, "verdict": "A" | "B" | None, "log_odds": r at the verdict
    in nats, None only without one (a server's log-probabilities of the tokens A and B give it; it
    would also have to load the adapter of each iteration of 04)}. A row's randomness comes from
    (seed, id) alone. batch_size: sequences decoded together; out of memory halves it.
    """
    tokenizer, device = processor.tokenizer, unwrap(model).device
    stop_ids = stop_token_ids(model, tokenizer)
    verdict_ids = verdict_token_ids(tokenizer)
    size = max(1, batch_size // n)  # prompts encoded together
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]["text"]))  # pads little
    batches = [order[i : i + size] for i in range(0, len(order), size)]

    def answer(batch):
        """Lists of n answers to the requests of a batch, `size` prompts at a time: where they do
        not fit into memory, size is halved, for the later batches as well.
        """
        nonlocal size
        answers = []
        while len(answers) < len(batch):
            waiting = batch[len(answers) :]
            rows = [requests[i] for i in waiting[:size]]
            numbers = [row_uniforms(seed, row["id"], n, max_new_tokens) for row in rows]
            uniforms = torch.stack(numbers)  # (B, n, R)
            texts, images = [row["text"] for row in rows], [row["image"] for row in rows]
            inputs = encode_prompts(processor, texts, images).to(device)
            try:
                written = sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                written = None
            if written is None:  # out of the except, whose traceback holds the tensors
                size = (len(rows) + 1) // 2
                torch.cuda.empty_cache()
                print(f"out of memory: going on with {size} prompts at a time")
                continue
            finished = []
            for tokens, log_odds in zip(*written):  # (R,), (R, 2)
                finished.append(finish_sample(tokenizer, tokens, log_odds, stop_ids, verdict_ids))
            answers += [finished[i : i + n] for i in range(0, len(finished), n)]
        if bar is not None:  # of process 0: the others do a batch at the same time
            bar.update(min(len(batch) * WORLD, bar.total - bar.n))
        return answers

    answers = share_out(batches, answer)
    return [samples for _, samples in sorted(zip(order, answers), key=lambda pair: pair[0])]


# ---- Several processes: torchrun --nproc-per-node K -- script.py ... -----------------------------
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(value):
    """[the value of process 0, of process 1, ...], in every process."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def share_out(batches, work):
    """The lists work(batch) of all batches, joined. Process r of K does batches r, r + K, ... and
    gets the others' results; so the batches, and every number, are those of a single process.
    """
    of_process = gather([work(batch) for batch in batches[RANK::WORLD]])
    results = []
    for i in range(len(batches)):
        results += of_process[i % WORLD][i // WORLD]
    return results


def barrier():
    """No process goes on before all are here."""
    if WORLD > 1:
        dist.barrier()


def run(main, args):
    """main(args), as every script ends with: libraries are quiet, torchrun's processes join."""
    transformers.logging.set_verbosity_error()  # what matters about a model, load_judge checks
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show every letter
    if WORLD > 1:
        if args.device == "auto":
            stop("--device auto spreads one process's model over all GPUs: start without torchrun")
        gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if 0 < gpus <= local:
            stop(f"{gpus} GPU(s) are here, so --nproc-per-node can be {gpus} at most")
        if gpus:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    with open(os.devnull, "w") as silence:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # 128 + 15; files are closed
        try:
            with contextlib.redirect_stdout(silence if RANK else sys.stdout):  # process 0 speaks
                main(args)
        except KeyboardInterrupt:
            print("interrupted: without --overwrite the same command goes on with the rows kept")
            sys.exit(130)
        # a missing file, a full disk, a folder that may not be read
        except (OSError, SafetensorError) as error:
            stop(one_line(error))
        except (RuntimeError, MemoryError) as error:
            if WORLD > 1 and "Connection" in str(error):  # another process has ended, and said why
                sys.exit(1)
            is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not is_memory and "can't allocate memory" not in str(error):  # so says the CPU
                raise
            stop(
                "out of memory: lower --micro-batch or --batch-size (which change no result), "
                "--max-new-tokens or, in stage 01, --max-image-tokens; in training, "
                "--checkpoint-activations saves most"
            )


# ---- Files: what a field holds, rows that survive an interruption --------------------------------
SHORT = 10_000  # most characters of a prompt or a response: some 2,500 tokens of English
LONG = 1_000_000  # of what a model writes, which its number of tokens bounds
# What a field holds, wherever it stands: text of at most so many characters, one word of a set, a
# number within (low, high), a [list of these] or a {record that has these}.
FIELDS = {
    **dict.fromkeys(("id", "pair_id", "image", "prompt", "chosen", "rejected"), SHORT),
    **dict.fromkeys(("response_a", "response_b", "category", "text"), SHORT),
    **dict.fromkeys(("model", "image_root"), SHORT),
    "max_image_tokens": (1, 100_000),
    "critique": LONG,
    "order": {"ab", "ba"},
    "label": {"A", "B"},
    "verdict": {"A", "B"},
    "style": set(INSTRUCTIONS),
    "split": {"validation", "train", "pool"},
    "log_odds": (-1e4, 1e4),
    "hallucinated": [SHORT],
    "asked": [SHORT],
    "objects": [{"object": SHORT}],
    "detections": [{"object": SHORT, "confidence": (0, 1)}],
    "evidence": [
        {
            "object": SHORT,
            "status": {"present", "absent", "unsure"},
            "claimed_by": {"chosen", "rejected", "both"},
        }
    ],
}
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold


def fits(value, kind):
    """Is the value of this kind (see FIELDS)?"""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        is_record = isinstance(value, dict)
        return is_record and all(fits(value.get(name), kind[name]) for name in kind)
    if isinstance(kind, set):
        return isinstance(value, str) and value in kind
    if isinstance(kind, tuple):
        return type(value) in (int, float) and kind[0] <= value <= kind[1]
    return isinstance(value, str) and len(value) <= kind and not SURROGATE.search(value)


def in_words(kind):
    """What a value of this kind (see FIELDS) has to be."""
    if isinstance(kind, list):
        return f"a list of {in_words(kind[0])}"
    if isinstance(kind, dict):
        return "records of " + ", ".join(f"{name} ({in_words(kind[name])})" for name in kind)
    if isinstance(kind, set):
        return f"one of {', '.join(sorted(kind))}"
    if isinstance(kind, tuple):
        return f"a number from {kind[0]} to {kind[1]}"
    return f"text of at most {kind} characters"


def misfit(row, needed=()):
    """None, or (field, what is wrong with it): needed and not there, or not as FIELDS says."""
    for name in needed:
        if row.get(name) is None:
            return name, "it is missing"
    for name, value in row.items():
        if value is not None and name in FIELDS and not fits(value, FIELDS[name]):
            return name, f"{in_words(FIELDS[name])} is expected, not {str(value)[:40]!a}"
    return None


def read_text(path):
    """The text of a file, without a byte order mark."""
    if not Path(path).exists():
        stop(f"{path} does not exist: run the stage that writes it first, or name another file")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        stop(f"{path} is not UTF-8: {error}")


def parse_json(text, place):
    """The JSON object in a text; place: where it stands, for the line that says what is wrong."""
    try:
        return dict(**json.loads(text))  # TypeError where it is no object
    except (ValueError, TypeError, RecursionError) as error:
        stop(f"{place}: a JSON object is expected, not {text[:40]!r} ({one_line(error)})")


def read_json(path):
    """The object in a JSON file."""
    return parse_json(read_text(path), path)


def read_jsonl(path, fields=(), check=None):
    """Rows of a jsonl file. Each field is as FIELDS says, else it stops, naming line and field.

    fields: those that every row must have; then there must be rows, and no id twice. check(row):
    None, or (field, what is wrong with it).
    """
    rows = parse_jsonl(read_text(path), path, fields, check)
    if fields and not rows:
        stop(f"{path} is empty: nothing to work on")
    return rows


def parse_jsonl(text, path, fields=(), check=None):
    """The same of the file's text."""
    rows, ids = [], set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path} line {number}")
        wrong = misfit(row, fields) or (check and check(row))
        if "id" in fields and not wrong and row["id"] in ids:
            wrong = "id", f"{row['id']!r} occurs twice"
        if wrong:
            stop(f"{path} line {number}, field {wrong[0]!r}: {wrong[1]}")
        ids.add(row.get("id"))
        rows.append(row)
    return rows


def draw(function, path, *content):
    """function(path, *content), in the first process. Where that fails, the stage goes on."""
    if RANK == 0:
        try:
            with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
                function(path, *content)
        except OSError:  # the disk is full
            raise
        except Exception as error:
            print(f"{path} is not drawn: {one_line(error)}")


def draw_cards(path, cards, columns, draw_on=None):
    """Pictures in a grid, each with lines of text below; one that cannot be read is named instead.

    cards: {"image": path, "lines": [str]}; draw_on(axis, card, (width, height)) draws on a picture,
    in its own pixels.
    """
    shown = []
    for card in cards:
        try:
            picture = load_image(card["image"])
        except Stop as error:
            print(f"not in {path}: {error}")
            continue
        size = picture.size
        picture.thumbnail((640, 640))
        text = "\n".join(textwrap.fill(line, 42, max_lines=6) for line in card["lines"])
        shown.append((card, picture, size, text))
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    heights = []  # inches: a picture, and its text
    for row in rows:
        heights.append(3.3 + 0.18 * max(text.count("\n") + 1 for *_, text in row))
    figure = Figure((3.5 * columns, max(1, sum(heights))))
    bottom = sum(heights)
    for row, of_row in zip(rows, heights):
        for column, (card, picture, (width, height), text) in enumerate(row):
            place = (column + 0.04) / columns, (bottom - 3.2) / sum(heights)
            axis = figure.add_axes((*place, 0.92 / columns, 3.1 / sum(heights)))
            axis.axis("off")
            if draw_on:
                try:
                    draw_on(axis, card, (width, height))
                except Exception as error:  # such as a box of two numbers
                    print(f"not wholly in {path}: {card['image']}: {one_line(error)}")
            axis.imshow(picture, extent=(0, width, height, 0))
            axis.set(adjustable="datalim")  # all axes of one size, whatever the picture's
            style = {"fontsize": 9.5, "parse_math": False}  # "$5 and $6" is no formula
            axis.text(0, -0.03, text, transform=axis.transAxes, va="top", **style)
        bottom -= of_row
    figure.savefig(path, dpi=80)


def write_text(path, text):
    """Atomic: a reader sees the old file or the new one. Of several processes the first writes."""
    if RANK == 0:
        partial = Path(f"{path}.partial")
        # half a character, of a file's name, becomes JSON's escape for it
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class RowWriter:
    """Appends rows to a jsonl file, each flushed. rows: also those of an earlier, interrupted run,
    but for a half-written last line. key: the fields that tell a row from all others.
    """

    def __init__(self, path, key=("id",)):
        self.key = key
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        barrier()  # all have read before one writes
        if whole != data and RANK == 0:
            os.truncate(path, len(whole))
        self.rows = parse_jsonl(whole.decode(errors="backslashreplace"), path)
        self.done_before = {self.key_of(row) for row in self.rows}
        encoding = {"encoding": "utf-8", "errors": "backslashreplace"}  # as in write_text
        self.file = open(os.devnull if RANK else path, "a", **encoding)  # noqa: SIM115

    def key_of(self, row):
        return tuple(row.get(name) for name in self.key)

    def is_done(self, row):
        """Was a row with this key there before this run?"""
        return self.key_of(row) in self.done_before

    def write(self, row):
        """Append the row, unless it was there before this run."""
        if not self.is_done(row):
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
            self.rows.append(row)


CHUNK = 2048  # sequences between two saves, whatever --batch-size: what an interruption costs


def in_chunks(rows, is_done, size, describe):
    """(chunk, bar) for fixed chunks of `size` rows, but for those that are wholly done: a resumed
    run forms the same chunks, so the same batches, and writes the same bytes. The caller moves the
    bar.
    """
    with progress_bar(len(rows), describe) as bar:
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            if all(is_done(row) for row in chunk):
                bar.update(len(chunk))
            else:
                yield chunk, bar


def progress_bar(total, describe, unit="row", done=0):
    """A bar on stdout, with rate and time left; none where stdout is no terminal."""
    settings = {"dynamic_ncols": True, "disable": None, "file": sys.stdout, "initial": done}
    return tqdm(total=total, desc=describe, unit=unit, **settings)


# ---- Arguments -----------------------------------------------------------------------------------
# Smallest and largest value of every flag that is a number.
BOUNDS = {
    **dict.fromkeys(("batch_size", "train_batch", "micro_batch"), (1, 100_000)),
    **dict.fromkeys(("candidates", "critiques", "samples", "votes", "best_of"), (1, 1000)),
    **dict.fromkeys(("max_new_tokens", "max_image_tokens", "iterations"), (1, 100_000)),
    **dict.fromkeys(("limit", "steps", "save_every"), (1, 10**9)),
    **dict.fromkeys(("validation", "train"), (0, 10**9)),
    **dict.fromkeys(("present", "margin"), (0, 1)),
    **dict.fromkeys(("temperature", "lam", "bt_weight"), (0, 100)),
    "absent": (0.01, 1),
    "seed": (0, 2**63 - 1),
    "pool": (2, 10**9),
    "max_response_tokens": (2, 100_000),
    "lora_rank": (0, 1024),
    "lr": (1e-9, 1),
    "retention": (0.001, 1),
    "replay": (0, 0.99),
}


class StageParser(argparse.ArgumentParser):
    """Refuses numbers out of BOUNDS, and empty words, such as an unset variable of the shell."""

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if value in ("", [""]):
                self.error(f"--{name.replace('_', '-')} is empty")
        for name, (low, high) in BOUNDS.items():
            value = getattr(args, name, None)
            if value is not None and not low <= value <= high:  # nan fails, too
                flag = f"--{name.replace('_', '-')}"
                self.error(f"{flag} {value}: a number from {low} to {high} is expected")
        return args


class HelpFormatter(argparse.HelpFormatter):
    """Names the default where there is one."""

    def _get_help_string(self, action):
        default = action.default  # one of 0 is shown, one of False is not
        silent = default is None or default is False or default == argparse.SUPPRESS
        return action.help if silent else f"{action.help} (%(default)s)"


def stage_parser(doc):
    """A script's parser, with what all stages take."""
    parser = StageParser(description=doc.split("\n")[0], formatter_class=HelpFormatter)
    add = parser.add_argument_group("the run").add_argument
    add("--run", default="runs/default", help="run directory, shared by all stages")
    add("--device", help="cuda, mps, cpu, or auto: one model over all GPUs; else the best one here")
    add("--batch-size", type=int, default=256, help="sequences decoded together")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--overwrite", action="store_true", help="delete this stage's folder first")
    return parser


# These leave the rows as they are, up to rounding, and may change when a stage is resumed.
FREE_ARGUMENTS = {
    "run",
    "device",
    "overwrite",
    "batch_size",
    "micro_batch",
    "checkpoint_activations",
    "save_every",
}


# ---- A stage's folder: what it is made with, meta.json as the sign of completion -----------------
# The arguments that are paths. (--expert is one if it has a "/"; else it is a name, of which
# ultralytics may leave a file here.)
PATHS = ("model", "image_root", "images", "pairs", "exclude", "prompts", "detections")
PATHS = (*PATHS, "vocabulary", "truth")
LOCKS = []  # files whose locks this process holds to its end
STARTED = time.time()


def lock(folder, inputs):
    """Hold the stage's folder, to write in it alone, and those of its inputs, to read what does not
    change. (By lockf: unlike flock's, its locks are not inherited, so none outlives the process.)
    """
    folders = [folder]
    for stage in folder.parent.glob("0*_*"):
        if any(Path(path).resolve().is_relative_to(stage.resolve()) for path in inputs):
            if stage == folder:
                stop(f"an input of this stage lies in {folder}, where it writes: move it elsewhere")
            folders.append(stage)
    for path in folders:
        file = open(path.with_name(f".{path.name}.lock"), "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_NB | (fcntl.LOCK_EX if path == folder else fcntl.LOCK_SH))
        except (BlockingIOError, PermissionError):
            stop(f"another process is at work in {path}: wait until it has ended")
        LOCKS.append(file)


def portable(value, run):
    """How a run directory, which may be moved, remembers a path (or a list of them): from itself if
    it lies inside, else absolute; a hub id, which does not exist here, as it is.
    """
    if isinstance(value, list):
        return [portable(item, run) for item in value]
    if value is None or not Path(value).exists():
        return value
    path, run = Path(value).resolve(), Path(run).resolve()
    return str(path.relative_to(run) if path.is_relative_to(run) else path)


def remembered(args):
    """The arguments on which a stage's files depend, as args.json and meta.json keep them."""
    kept = {key: value for key, value in vars(args).items() if key not in FREE_ARGUMENTS}
    for key in kept:
        if key in PATHS or (key == "expert" and "/" in kept[key]):
            kept[key] = portable(kept[key], args.run)
    return kept


def digest(path):
    """Of a file's bytes; of a folder's files their names and sizes."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = [f"{file.relative_to(path)} {file.stat().st_size}" for file in files]
        listed = "\n".join(listed).encode(errors="backslashreplace")
        return hashlib.sha256(listed).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digests(inputs, run):
    """{path: digest} of a stage's inputs. Stops if one of them is the record of an earlier stage
    (meta.json, done.json), and a file of the run that this one has read or left has changed since.
    """
    found = {}
    for path in map(Path, inputs):
        if Path(run).resolve().is_relative_to(path.resolve()):
            stop(f"the run directory {run} lies in {path}, which is read: put it elsewhere")
        name = portable(path, run)
        found[name] = digest(path)
        is_record = path.name in ("meta.json", "done.json") and not Path(name).is_absolute()
        record = read_json(path) if is_record else {}
        for name, then in {**record.get("inputs", {}), **record.get("outputs", {})}.items():
            file = Path(run) / name
            is_of_run = not Path(name).is_absolute() and file.exists()
            if is_of_run and digest(file) != then:
                stop(
                    f"{file} has changed since {path.parent} was made: make that anew with "
                    f"--overwrite or, where the change is meant, take {name} out of {path}"
                )
    return found


def clear(folder, patterns):
    """Delete the folder's files, but for args.json and those that fit one of the patterns."""
    paths = sorted(folder.rglob("*"), reverse=True)  # what is in a folder, then the folder
    signs = [path for path in paths if path.name in ("meta.json", "done.json")]
    for path in signs + paths:  # first those that say that all is there (so these come twice)
        name = path.relative_to(folder)
        if path.is_dir():
            with contextlib.suppress(OSError):  # it holds what stays
                path.rmdir()
        elif path != folder / "args.json" and not any(name.match(pattern) for pattern in patterns):
            path.unlink(missing_ok=True)


def begin_anew(folder, of_changes):
    """Delete what is to be made anew: all, or what fits no pattern of one of the changes."""
    for patterns in of_changes or [[]]:
        print(f"{folder} is made anew, but for: {', '.join(patterns) or 'nothing'}")
        if RANK == 0:
            clear(folder, patterns)
    number = folder.name[:2]
    later = [path.name for path in folder.parent.glob("0*_*") if path.name[:2] > number]
    if later:
        print(f"stale from now on, make anew with --overwrite: {', '.join(sorted(later))}")


def start_stage(args, name, inputs=(), may_change=None):
    """The stage's folder, ready to be written or resumed; None where it is complete already.

    inputs: the files it reads. may_change: {argument that only chooses among what is sampled: the
    patterns of the files that stay when it, or the file that it names, changes}; a file stays if
    each change lets it stay. Other changes are refused; "inputs" allows inputs that nobody names.
    """
    folder, may_change = Path(args.run) / name, may_change or {}
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        lock(folder, inputs)
    now = {"args": remembered(args), "inputs": digests(inputs, args.run)}
    record, meta = folder / "args.json", folder / "meta.json"
    files = [path for path in folder.rglob("*") if path.is_file() and path != record]
    is_begun = any(path.stat().st_size for path in files)  # before the first row nothing binds
    changed = set()
    if is_begun and record.exists() and not args.overwrite:
        changed = differences(read_json(record), now)
    if not changed <= may_change.keys():
        stop(
            f"{folder} was begun with other arguments or inputs: use them, another --run, or "
            "--overwrite"
        )
    is_complete = meta.exists() and not args.overwrite and not changed
    barrier()  # all have read before one writes
    if is_complete:
        print(f"{folder} is complete: nothing to do; --overwrite makes it anew")
        for left in folder.rglob("training.safetensors"):  # by a kill right after the end
            left.unlink(missing_ok=True)
        return None
    if args.overwrite or changed:
        begin_anew(folder, [may_change[key] for key in sorted(changed)])
    elif is_begun:
        print(f"resuming {folder}")
    write_json(record, now)
    barrier()
    return folder


def differences(was, now):
    """The arguments that differ, each said. An input that differs counts as the argument that names
    it; one that none names as itself if it was read before, else as "inputs".
    """
    old = {**was.get("args", {}), **was.get("inputs", {})}
    new = {**now["args"], **now["inputs"]}
    named_by = {}
    for args in (was.get("args", {}), now["args"]):
        named_by |= {value: key for key, value in args.items() if isinstance(value, str)}
    changed = set()
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            is_argument = key in now["args"]
            name = f"--{key.replace('_', '-')}" if is_argument else key
            print(f"{name} was {old.get(key)}, is {new.get(key)}")
            itself = key if is_argument or key in old else "inputs"
            changed.add(itself if is_argument else named_by.get(key, itself))
    return changed


# What a later stage reads of an earlier one's arguments, where it is there.
READ_LATER = ("model", "image_root", "max_image_tokens", "style")


def args_of(run, stage, *needed):
    """The arguments that a complete earlier stage was made with, from its meta.json, these among
    them.
    """
    path = Path(run) / stage / "meta.json"
    if not path.exists():
        stop(f"{path} does not exist: {stage} is not complete; run its script first")
    args = read_json(path).get("args")
    if not isinstance(args, dict):
        stop(f"{path} holds no 'args': run its script with --overwrite")
    read = {name: args.get(name) for name in (*needed, *READ_LATER)}
    if wrong := misfit(read, needed):
        stop(f"{path}, field {wrong[0]!r}: {wrong[1]}")
    for key in ("model", "image_root"):  # as portable has left them
        if args.get(key) and (Path(run) / args[key]).exists():
            args[key] = str(Path(run) / args[key])
    return args


def read_preferences(run, split):
    """Stage 01's pairs of a split (02, 03, 04)."""
    fields = ("id", "image", "prompt", "chosen", "rejected", "split", "evidence")
    rows = read_jsonl(Path(run) / "01_preferences" / "preferences.jsonl", fields)
    return [row for row in rows if row["split"] == split]


def files_of(run, stage, *names):
    """Paths of a stage's meta.json and of these of its files: what a later stage reads."""
    return [Path(run) / stage / name for name in ("meta.json", *names)]


def find_checkpoint(folder):
    """The folder's adapter/ or model/, as stages 03 and 04 write them."""
    for path in (Path(folder) / "adapter", Path(folder) / "model"):
        if path.exists():
            return path
    stop(f"{folder} holds neither adapter/ nor model/: run the stage that writes it first")


def finish_stage(folder, args, counts, outputs, next_step, **extra):
    """Say what was made and dropped; write meta.json last: its presence means "complete".

    outputs: the files that later stages read, by which they see whether these have changed.
    """
    if RANK != 0:
        return
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    used = ("torch", "transformers", "peft", "datasets", "ultralytics", "numpy", "pillow")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in used}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on a Mac
    meta = {
        "args": remembered(args),
        "counts": counts,
        **extra,
        "inputs": read_json(folder / "args.json")["inputs"],
        "outputs": digests(outputs, args.run),
        "seconds": round(time.time() - STARTED, 1),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2),
        "git_commit": commit,
        "versions": {"python": sys.version.split()[0], **versions},
    }
    for reason, count in counts.items():
        print(f"  {reason:<44} {count:>8}")
    memory = f"{meta['peak_memory_gib']} GiB, of the GPU {meta['peak_gpu_gib']}"
    print(f"{folder}: done in {meta['seconds']:.0f} s, peak memory {memory}\nnext: {next_step}")
    write_json(folder / "meta.json", meta)
