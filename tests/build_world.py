"""Builds a judge and an expert of the toy world from nothing, in about four minutes on two cores.

    python tests/build_world.py --out runs/world3 --seed 3

Writes model/ (a tiny Qwen2-VL that captions scenes.py's pictures well and judges captions badly),
expert.pt (an imperfect YOLO11n) and, last, world.json with what was measured. The stage scripts
read these and never import this file. tests/world is one such build, made once and shipped.

What is in the judge ON PURPOSE, so that there is something to learn: its transcripts of judgements
hold wrong facts (WRONG_ABSENT, WRONG_PRESENT), so that it writes well-formed critiques that trust
the text. It was taught to compare picture and text before (plain yes/no questions), and to follow
findings given in the prompt. The rate of wrong facts is raised while the judge measures too well
on validation scenes (never on the held-out ones): see `steer`, which prints what it did.

Skills arrive suddenly and not on every processor at the same step. A build that in the end lacks
something of WANTED is refused. Hardest to notice: a verdict that ignores the critique above it.
Most of stage 03's steps would go into finding that rule.

Which build is shipped was decided before any was looked at: of seeds 0 to 5, put through stages
01-03 with the demo's flags, the first for which the base judge's accuracy is .47-.60, well-formed
critiques are above .93, captions at T = 1 hallucinate in 10-25 %, and the judge after 03 reaches
.80-.90: hard enough that stage 04 has something to choose from, and able to learn.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scenes
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from scenes import KINDS, N_CELLS, PROMPT, SIZE, Scene, caption, draw_ordinary_scene, make_pair
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import INSTRUCTIONS, build_judge_prompt, parse_checks, sample, verdict_of_checks  # noqa: E402

YES_NO = {True: "yes", False: "no"}
YES_NO_PROMPT = "Is there a {object} in the image? Answer yes or no."  # as 01's --expert none asks
WRONG_ABSENT = 0.6  # share of absent objects that transcripts of judgements call present
WRONG_PRESENT = 0.15  # share of present objects that they call absent
COPY_WEIGHT = 0.15  # loss weight of copied words; yes/no, verdicts and stop tokens weigh 1
# (lowest, highest) of what is measured on validation scenes before a judge is given out
WANTED = {
    "accuracy": (0.47, 0.6),
    "well_formed": (0.9, 1.0),
    "guided_accuracy": (0.93, 1.0),  # with the truth as reference, as in stage 02
    "check_accuracy": (0.85, 1.0),  # of plain yes/no questions: does it compare picture and text?
    "verdict_follows": (0.6, 1.0),  # does its verdict depend on its own checks? .5: not at all
}
NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = tuple(f"<|{name}|>" for name in NAMES)
TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
TOKENS |= {f"vision_{side}_token_id": f"<|vision_{side}|>" for side in ("start", "end")}
# Qwen2-VL's without its default system turn: each prompt token costs CPU time
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- The tiny checkpoint: tokenizer, processor, configuration -----------------------------------
def build_processor():
    """Its word-level tokenizer is lossless: decode(encode(text)) == text for all text used here."""
    pattern = r" ?\w+|\n| ?[^\w\s]"  # a leading space is the word's, as in BPE: " A" is not "A"
    texts = [*KINDS, PROMPT, YES_NO_PROMPT.format(object="red")]
    texts += [build_judge_prompt(PROMPT, "red.", "red.", s, "Verdict: A") for s in INSTRUCTIONS]
    texts.append("system user assistant nothing unsure a an and the in is")
    found = re.findall(pattern, "\n".join(texts))
    words = sorted({piece.removeprefix(" ") for piece in found} - {"\n"})
    pieces = ["<unk>", *SPECIAL, "\n", *words, *(f" {word}" for word in words)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    tokenizer.add_special_tokens(added)
    names = {"unk_token": "<unk>", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    how = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **how)
    size = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    images = transformers.Qwen2VLImageProcessor(size=size)
    videos = transformers.Qwen2VLVideoProcessor(size=size)
    return transformers.Qwen2VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer):
    """A Qwen2-VL of 1.1 M parameters with random weights, in float32."""
    token = tokenizer.convert_tokens_to_ids
    text_config = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    text_config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    text_config |= {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    text_config |= {"initializer_range": 0.05, "tie_word_embeddings": True, "bos_token_id": None}
    text_config |= {"eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>")}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text_config["rope_parameters"] = rope
    vision_config = {"depth": 2, "embed_dim": 96, "hidden_size": 128, "num_heads": 4}
    vision_config |= {"mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2}
    vision_config |= {"temporal_patch_size": 2, "initializer_range": 0.03}
    ids = {name: token(text) for name, text in TOKENS.items()}
    parts = {"text_config": text_config, "vision_config": vision_config}
    config = transformers.Qwen2VLConfig(**parts, tie_word_embeddings=True, **ids)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    mimetic_init(model.model.language_model.layers)
    ends = {name: text_config[name] for name in ("eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**ends)
    return model


@torch.no_grad()
def mimetic_init(layers, strength=5.0, gain=0.2):
    """Changes `layers`: attention starts near what comparing and copying need.

    After "mimetic initialization", arXiv 2305.09828; found by gradient alone these take longer than
    all the rest. Values and outputs start as projections (o = gain * v^T), the queries and keys of
    later layers alike (a token looks at tokens like it). In the first layer, head h looks h + 1
    tokens back for h < 2: through the biases the score is strength^2 * sum over the rotary angles f
    of cos(f * (query place - key place - offset)) / sqrt(head size)."""
    for layer in layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(gain * attention.v_proj.weight.T)
        layer.mlp.down_proj.weight.mul_(gain)
        if layer is not layers[0]:
            torch.nn.init.orthogonal_(attention.q_proj.weight)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
    first = layers[0].self_attn
    size = first.head_dim
    frequency = 1e4 ** -(torch.arange(0, size, 2) / size)
    ones = torch.ones(size // 2)
    for head in range(2):
        place = slice(head * size, (head + 1) * size)
        angle = -(head + 1) * frequency
        first.q_proj.bias[place] = strength * torch.cat([angle.cos(), angle.sin()])
        first.k_proj.bias[place] = strength * torch.cat([ones, 0 * ones])


# ---- Short cuts: batched vision, positions by hand; tests compare `shortcut_logits` with the model
class Row(NamedTuple):
    image: int  # index into the bank of training scenes
    prompt: str
    response: str
    copy_weight: float = COPY_WEIGHT  # loss weight of tokens other than yes/no, verdict and stop
    answer_weight: float = 1.0  # of yes/no


def sdpa_that_keeps(module, query, key, value, attention_mask, **kwargs):
    """Fused attention returns no weights; those that are needed are cheap from queries and keys."""
    module.kept = query, key
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("sdpa_that_keeps", sdpa_that_keeps)


class Trainer:
    """The model, its processor and a bank of scenes, with fast losses for pictures of one size."""

    def __init__(self, model, processor, bank):
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.pictures = np.stack([scene.picture for scene in bank])
        self.present = [[thing["object"] for thing in scene.objects] for scene in bank]
        self.features = None  # (N, 9, 128) once the vision tower is frozen
        token = self.tokenizer.convert_tokens_to_ids
        words = [token([f" {word}" for word in kind.split()]) for kind in KINDS]
        words.append(token([" nothing", " nothing"]))  # cells without an object hold -1: the last
        self.cell_words = torch.tensor([[words[kind] for kind in scene.cells] for scene in bank])
        self.answers = torch.tensor(token([" yes", " no", "yes", "no"]))
        self.decisive = torch.tensor(token([" A", " B", self.tokenizer.eos_token]))
        self.yes_no = torch.tensor(token([" yes", " no"]))
        self.verdict, self.side_a, self.side_b = token(["Verdict", " A", " B"])
        self.colours = torch.tensor(token([f" {colour}" for colour in scenes.COLOURS]))
        # as CHAT_TEMPLATE has it
        picture = "<|vision_start|>" + "<|image_pad|>" * N_CELLS + "<|vision_end|>"
        self.head = f"<|im_start|>user\n{picture}"
        self.tail = "<|im_end|>\n<|im_start|>assistant\n"
        self.cells = slice(4, 4 + N_CELLS)  # where the picture is in a prompt

    def freeze_vision(self):
        """From here on its features need computing only once."""
        for parameter in self.model.model.visual.parameters():
            parameter.requires_grad_(False)
        n = len(self.pictures)
        with torch.no_grad():
            parts = [self.look(part) for part in np.array_split(np.arange(n), n // 100)]
        self.features = torch.cat(parts)

    def look(self, indices):
        """Visual tokens (B, 9, 128) of pictures of the bank.

        The stock tower takes images one by one; all of these have the same grid, so that a batch
        is one attention."""
        if self.features is not None:
            return self.features[indices]
        visual = self.model.model.visual
        mean = torch.tensor(self.processor.image_processor.image_mean)
        std = torch.tensor(self.processor.image_processor.image_std)
        pixels = (torch.from_numpy(self.pictures[indices]) / 255 - mean) / std  # (B, 84, 84, 3)
        n = SIZE // 28  # cells a side, of 2x2 patches of 14x14 pixels
        patches = pixels.view(-1, n, 2, 14, n, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        patches = patches.reshape(-1, 36, 588)
        # a still picture shows both frames of a patch the same: (96, 588)
        kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)
        x = patches @ kernel.T  # (B, 36, 96)
        row, col = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
        by_cell = [p.view(3, 2, 3, 2).permute(0, 2, 1, 3).flatten() for p in (row, col)]
        cos, sin = visual.rotary_pos_emb(x, torch.stack(by_cell, -1))
        for block in visual.blocks:
            x = x + self.look_around(block.attn, block.norm1(x), cos, sin)
            x = x + block.mlp(block.norm2(x))
        return visual.merger(x).view(len(indices), N_CELLS, -1)

    @staticmethod
    def look_around(attention, x, cos, sin):
        """Attention of each picture's patches x (B, 36, 96) to each other; cos, sin (36, D)."""
        q, k, v = attention.qkv(x).view(len(x), 36, 3, attention.num_heads, -1).unbind(2)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)  # (B, 36, H, D)
        y = F.scaled_dot_product_attention(*[p.transpose(1, 2) for p in (q, k, v)])
        return attention.proj(y.transpose(1, 2).reshape(x.shape))

    def encode(self, rows):
        """ids (B, T) padded on the right, loss weight (B, T) of each as a target; 0 on prompts."""
        prompts = [self.head + row.prompt + self.tail for row in rows]
        responses = [row.response + self.tokenizer.eos_token for row in rows]
        prompts = self.tokenizer(prompts)["input_ids"]
        responses = self.tokenizer(responses)["input_ids"]
        length = max(len(p) + len(r) for p, r in zip(prompts, responses))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        weights = torch.zeros(len(rows), length)
        for i, (row, prompt, response) in enumerate(zip(rows, prompts, responses)):
            target = slice(len(prompt), len(prompt) + len(response))
            ids[i, : target.stop] = torch.tensor(prompt + response)
            weights[i, target] = row.copy_weight
            weights[i, target][torch.isin(ids[i, target], self.decisive)] = 1.0
            weights[i, target][torch.isin(ids[i, target], self.answers)] = row.answer_weight
        return ids, weights

    def run(self, ids, visual_tokens):
        """Hidden states (B, T, 128). Right padding behind a causal mask needs no other mask."""
        embeds = self.model.get_input_embeddings()(ids)
        start, end = self.cells.start, self.cells.stop
        embeds = torch.cat([embeds[:, :start], visual_tokens, embeds[:, end:]], 1)
        before, cell = torch.arange(start), torch.arange(N_CELLS)
        behind = torch.arange(ids.shape[1] - end) + start + 3  # a 3x3 grid takes three positions
        grid = (cell * 0, cell // 3, cell % 3)  # time, row, column
        positions = [torch.cat([before, start + place, behind]) for place in grid]
        self.model.set_attn_implementation("sdpa_that_keeps")
        positions = torch.stack(positions)[:, None].expand(3, len(ids), -1)
        what = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
        what["attention_mask"] = {"full_attention": None}
        output = self.model.model.language_model(**what)
        self.model.set_attn_implementation("sdpa")
        return output.last_hidden_state

    def shortcut_logits(self, rows):
        """(ids (B, T), logits (B, T, V)); the ordinary forward must give the same."""
        ids, _ = self.encode(rows)
        visual_tokens = self.look([row.image for row in rows])
        return ids, self.model.lm_head(self.run(ids, visual_tokens))

    def loss(self, rows, look=False, copy=False):
        """Negative log-likelihood per unit of weight, plus hints where to attend.

        Look: where a claim is true, heads 0 and 1 of the second layer attend from its last token to
        its cell. Copy: heads 2 and 3 of the last layer attend from a claim's word in the critique
        to the same claim's in the prompt. With them comparing and copying take some 100 steps
        each; without, comparison knew colours only after 400, and copying mixed up the claims."""
        ids, weights = self.encode(rows)
        hidden = self.run(ids, self.look([row.image for row in rows]))
        is_target = weights[:, 1:] > 0
        logits = self.model.lm_head(hidden[:, :-1][is_target])  # (targets, V)
        nll = F.cross_entropy(logits, ids[:, 1:][is_target], reduction="none")
        loss = (nll * weights[:, 1:][is_target]).sum() / weights.sum()
        looking = [self.attention_to_cell(rows, ids, is_target)] if look else []
        copying = [self.attention_to_source(rows, ids, weights > 0)] if copy else []
        for share in looking + copying:
            if len(share):
                loss = loss - 0.3 * (share + 1e-6).log().mean()
        return loss

    def attention(self, layer, heads, row, place):
        """Weights (n, heads, T) of the last run, at the tokens `place` (n,) of the rows `row`."""
        module = self.model.model.language_model.layers[layer].self_attn
        query, key = module.kept  # (B, H, T, D) each: there are as many keys as queries
        query = query[row, :, place][:, heads, :, None]  # (n, heads, D, 1)
        scores = (key[:, heads][row] @ query)[..., 0] * module.scaling  # (n, heads, T)
        is_later = torch.arange(key.shape[2]) > torch.as_tensor(place)[:, None, None]  # (n, 1, T)
        return scores.masked_fill(is_later, -torch.inf).softmax(-1)

    def attention_to_cell(self, rows, ids, is_target):
        """Of each true claim: how much of its last token's attention goes to its cell, (n, 2)."""
        asked = torch.tensor([row.prompt.startswith(YES_NO_PROMPT[:8]) for row in rows])
        behind_kind = torch.isin(ids[:, :-1], self.colours).roll(2, 1)
        before_answer = is_target & torch.isin(ids[:, 1:], self.yes_no)
        claim, place = torch.where(asked[:, None], behind_kind, before_answer).nonzero().T
        words = torch.stack([ids[claim, place - 2], ids[claim, place - 1]], -1)  # (claims, 2)
        cell_words = self.cell_words[[row.image for row in rows]][claim]  # (claims, 9, 2)
        right_cell = (cell_words == words[:, None]).all(-1)  # (claims, 9)
        attention = self.attention(1, slice(2), claim, place)[:, :, self.cells]  # (claims, 2, 9)
        return (attention * right_cell[:, None]).sum(-1)[right_cell.any(-1)]

    def attention_to_source(self, rows, ids, is_response):
        """Of each copied word: how much attention goes to where it stands in the prompt, (n, 2).

        Copied are the words of a critique's claims and a guided verdict. Claims come in the same
        order in the responses, in the reference if there is one and in the critique; a colour word
        marks the start of each."""
        row, query, source = [], [], []
        for i, is_colour in enumerate(torch.isin(ids, self.colours)):
            critique = (is_colour & is_response[i]).nonzero()[:, 0]
            prompt = (is_colour & ~is_response[i]).nonzero()[:, 0]
            if not rows[i].response.startswith("A: ") or len(prompt) == 0 or len(critique) == 0:
                continue  # no copy to point at
            for k, start in enumerate(critique.tolist()):
                for word in (0, 1):
                    row.append(i)
                    query.append(start - 1 + word)
                    # a claim stands in its response and, guided, once more in the reference
                    places = prompt[k :: len(critique)] + word
                    source.append(F.one_hot(places, ids.shape[1]).sum(0))
            if len(prompt) > len(critique):  # guided: the first "Verdict" is the reference's
                lines = (ids[i] == self.verdict).nonzero()[:, 0]
                row.append(i)
                query.append(int(lines[-1]) + 1)
                source.append(F.one_hot(lines[0] + 2, ids.shape[1]))
        if not row:
            return torch.empty(0)
        attention = self.attention(-1, slice(2, 4), row, query)  # (n, 2, T)
        return (attention * torch.stack(source)[:, None]).sum(-1)

    def align_loss(self, indices):
        """Each visual token against the embeddings of its cell's colour word and shape word."""
        logits = self.look(indices) @ self.model.get_input_embeddings().weight.T  # (B, 9, V)
        return -logits.log_softmax(-1).gather(-1, self.cell_words[indices]).mean()

    @torch.no_grad()
    def check_accuracy(self, rows):
        """Share of right answers in packed checks, mean over those to be answered yes and no."""
        ids, logits = self.shortcut_logits(rows)
        yes, no = self.yes_no.tolist()
        says_yes = logits[:, :-1, yes] > logits[:, :-1, no]
        yes_right = says_yes[ids[:, 1:] == yes].float().mean().item()
        no_right = 1 - says_yes[ids[:, 1:] == no].float().mean().item()
        return (yes_right + no_right) / 2

    @torch.no_grad()
    def verdict_follows(self, rows):
        """Of two critiques whose checks speak for A and for B: how often the log-odds of verdict A
        are the higher in the first. .5: the verdict ignores the checks, 1: it follows them."""
        for_a, for_b = [], []
        for part in np.array_split(np.arange(len(rows)), len(rows) // 50):
            ids, logits = self.shortcut_logits([rows[i] for i in part])
            log_odds = logits[:, :, self.side_a] - logits[:, :, self.side_b]  # (B, T)
            for i, row_ids, row_odds in zip(part, ids, log_odds):
                colon = (row_ids == self.verdict).nonzero()[-1, 0] + 1
                found = for_a if rows[i].response.endswith("A") else for_b
                found.append(row_odds[colon].item())
        return float((np.array(for_a)[:, None] > np.array(for_b)).mean())


# ---- Training rows: captions, checks, judgements ------------------------------------------------
def check_lines(claims, facts):
    """Lines of a critique without its verdict; facts: {kind: "yes" | "no" | "unsure"}."""
    return "".join(f"{side}: {kind}: {facts[kind]}\n" for side, kind in claims)


class Rows:
    """Draws random training rows. Blank pictures are scenes without objects."""

    def __init__(self, rng, present, indices):
        self.rng, self.present = rng, present  # kinds by scene of the bank
        self.indices = self.caption_indices = indices  # scenes to draw from
        self.near_misses = (0.4, 0.4, 0.2)
        self.wrong_absent = WRONG_ABSENT

    def image(self):
        return int(self.rng.choice(self.indices))

    def caption(self):
        image = int(self.rng.choice(self.caption_indices))
        response = caption(self.rng.permutation(self.present[image]))
        return Row(image, PROMPT, response, copy_weight=1.0)

    def questions(self, image, n):
        """n kinds in random order, about half of them present: [(kind, is present)]."""
        present = self.present[image]
        near = present or scenes.sample_kinds(self.rng, 2)
        asked = [(kind, True) for kind in present[: n // 2]]
        while len(asked) < n:
            like = near[self.rng.integers(len(near))]
            kind, _ = scenes.pick_absent(self.rng, like, near, self.near_misses)
            asked.append((kind, False))
        return [asked[i] for i in self.rng.permutation(n)]

    def question(self):
        image = self.image()
        kind, is_present = self.questions(image, 2)[0]
        return Row(image, YES_NO_PROMPT.format(object=kind), YES_NO[is_present])

    def packed_checks(self):
        """A critique's lines with true answers behind no prompt: it learns to answer only."""
        image = self.image()
        kinds, facts = self.checked(image)
        cut = self.rng.integers(1, len(kinds))
        lines = check_lines(claims_of(kinds[:cut], kinds[cut:]), facts)
        return Row(image, "", lines, copy_weight=0.0)

    def listed_checks(self):
        """The same as a critique of two lists in the prompt: it also learns to copy what the
        picture does not show. Each kind is named by A, by B or by both, in an order of its own."""
        image = self.image()
        kinds, facts = self.checked(image)
        side = self.rng.choice(3, len(kinds), p=[0.25, 0.25, 0.5])  # A, B, both
        a = [kinds[i] for i in self.rng.permutation(len(kinds)) if side[i] != 1][:5]
        b = [kinds[i] for i in self.rng.permutation(len(kinds)) if side[i] != 0][:5]
        prompt = f"Response A: {caption(a)}\nResponse B: {caption(b)}\n"
        return Row(image, prompt, check_lines(claims_of(a, b), facts), copy_weight=0.3)

    def checked(self, image):
        """Kinds to be checked, one perhaps twice, and {kind: the right answer}."""
        asked = self.questions(image, min(8, 2 * len(self.present[image]) or 4))
        return [kind for kind, _ in asked], {kind: YES_NO[is_there] for kind, is_there in asked}

    def judgement(self, guided):
        """Not guided: wrong facts on purpose, and a verdict that follows from them. Guided: facts
        and verdict as in the reference, which is now and then wrong so that it is copied, not
        guessed; what the reference calls unsure is answered by looking."""
        rng = self.rng
        image = self.image()
        present = self.present[image]
        a, b, label = self.responses(image)
        claims = claims_of(a, b)
        facts = self.wrong_facts(claims, present, guided)
        reference = None
        if guided:
            unsure = [kind for kind in facts if rng.random() < 0.1]
            noted = facts | dict.fromkeys(unsure, "unsure")
            facts |= {kind: YES_NO[kind in present] for kind in unsure}
            verdict = label if rng.random() < 0.93 else "AB"[label == "A"]
            reference = f"{check_lines(claims, noted)}Verdict: {verdict}"
        else:
            verdict = verdict_of(claims, facts) or "AB"[rng.integers(2)]
        style = str(rng.choice(["critique", "descriptive", "none"], p=[0.84, 0.08, 0.08]))
        if style != "critique" and not guided:
            verdict = "AB"[rng.integers(2)]
        described = caption(rng.permutation(present)) + "\n"
        body = {"critique": check_lines(claims, facts), "descriptive": described, "none": ""}
        prompt = build_judge_prompt(PROMPT, caption(a), caption(b), style, reference)
        return Row(image, prompt, f"{body[style]}Verdict: {verdict}")

    def wrong_facts(self, claims, present, guided):
        """{kind: "yes" | "no"}, some of them wrong."""
        facts, rates = {}, {True: WRONG_PRESENT, False: self.wrong_absent}
        for kind in dict.fromkeys(kind for _, kind in claims):
            is_present = kind in present
            is_wrong = self.rng.random() < (0.08 if guided else rates[is_present])
            facts[kind] = YES_NO[is_present != is_wrong]
        return facts

    def only_verdict(self):
        """A critique whose answers are drawn by chance, with the verdict that follows from them;
        nothing but the verdict is learned."""
        image = self.image()
        a, b, _ = self.responses(image)
        claims = claims_of(a, b)
        verdict = None
        while verdict is None:
            facts = {kind: YES_NO[self.rng.random() < 0.7] for _, kind in claims}
            verdict = verdict_of(claims, facts)
        prompt = build_judge_prompt(PROMPT, caption(a), caption(b))
        critique = f"{check_lines(claims, facts)}Verdict: {verdict}"
        return Row(image, prompt, critique, copy_weight=0.0, answer_weight=0.0)

    def responses(self, image):
        """Response A, response B, the better one."""
        present = self.present[image] or scenes.sample_kinds(self.rng, 3)
        chosen, rejected, _, _ = make_pair(self.rng, present)
        if self.rng.random() < 0.5:
            return rejected, chosen, "B"
        return chosen, rejected, "A"


def claims_of(a, b):
    return [("A", kind) for kind in a] + [("B", kind) for kind in b]


def verdict_of(claims, facts):
    return verdict_of_checks([(side, kind, facts[kind] == "yes") for side, kind in claims])


# ---- Measuring, by the ordinary route: common.sample and the parsers ----------------------------
def ask(trainer, indices, prompts, temperature=0.0, max_new_tokens=80):
    """One answer per picture of the bank and prompt, as common.sample gives it."""
    requests = []
    for i, (index, prompt) in enumerate(zip(indices, prompts)):
        picture = Image.fromarray(trainer.pictures[index])
        requests.append({"id": i, "image": picture, "text": prompt})
    what = trainer.model, trainer.processor, requests
    return [first for [first] in sample(*what, 1, temperature, max_new_tokens, batch_size=100)]


def judge_questions(trainer, pairs, rng):
    """Both orders of each pair of {index: pair}: [(index, prompt, label, claims)].
    With rng: guided by the truth as reference, a tenth of it unsure."""
    questions = []
    for index, pair in pairs.items():
        for label in "AB":
            a, b = (pair.chosen, pair.rejected) if label == "A" else (pair.rejected, pair.chosen)
            claims = claims_of(a, b)
            reference = None
            if rng is not None:
                unsure = {kind for _, kind in claims if rng.random() < 0.1}
                facts = {kind: YES_NO[kind in trainer.present[index]] for _, kind in claims}
                facts |= dict.fromkeys(unsure, "unsure")
                reference = f"{check_lines(claims, facts)}Verdict: {label}"
            prompt = build_judge_prompt(PROMPT, caption(a), caption(b), "critique", reference)
            questions.append((index, prompt, label, claims))
    return questions


def measure_judge(trainer, pairs, rng=None):
    """Greedy critiques of both orders of each pair, guided with rng -> {name: share}."""
    indices, prompts, labels, claims = zip(*judge_questions(trainer, pairs, rng))
    answers = ask(trainer, indices, prompts)
    right = [answer["verdict"] == label for answer, label in zip(answers, labels)]
    well_formed, facts_true = [], []
    for index, answer, asked in zip(indices, answers, claims):
        checks = parse_checks(answer["text"])
        named = [(side, kind) for side, kind, _ in checks]
        well_formed.append(answer["verdict"] is not None and named == asked)
        facts_true += [is_yes == (kind in trainer.present[index]) for _, kind, is_yes in checks]
    found = {"well_formed": well_formed, "accuracy": right, "facts_true": facts_true}
    return {name: float(np.mean(values)) for name, values in found.items()}


def measure_captions(trainer, indices):
    """Greedy and at T = 1: the share of captions that hallucinate."""
    shares = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        answers = ask(trainer, indices, [PROMPT] * len(indices), temperature, 24)
        is_false = []
        for index, answer in zip(indices, answers):
            said = set(answer["text"].rstrip(".").split(", ")) & set(KINDS)
            is_false.append(not said <= set(trainer.present[index]))
        shares[f"caption_{name}_hallucinated"] = float(np.mean(is_false))
    return shares


# ---- Training the model in four phases ----------------------------------------------------------
def train_steps(trainer, name, steps, lr, loss_of_step, final):
    """AdamW, warm-up 20, linear decay to final * lr."""
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    start, losses = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 20, 1 - (1 - final) * step / steps)
        loss = loss_of_step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loss, seconds = np.mean(losses[-20:]), time.time() - start
    print(f"{name}, {steps} steps | loss {loss:.3f} | {seconds:.0f} s", flush=True)


def train_model(trainer, rng, train, captioned, validation):
    """Align, check, caption, mix, in place. train, captioned and validation index the bank.
    -> what `steer` measured"""
    rows = Rows(rng, trainer.present, train)

    def align(n):
        return trainer.align_loss(rng.choice(train, n, replace=False))

    def checks(n_packed, n_listed):
        packed = trainer.loss([rows.packed_checks() for _ in range(n_packed)], look=True, copy=True)
        listed = trainer.loss([rows.listed_checks() for _ in range(n_listed)], look=True, copy=True)
        return (packed + listed) / 2

    def questions():
        return trainer.loss([rows.question() for _ in range(12)], look=True, copy=True)

    def check_step():
        return checks(14, 10) + 0.2 * align(16)

    def caption_step():
        captions = trainer.loss([rows.caption() for _ in range(48)])
        return captions + 0.1 * align(16) + 0.3 * (questions() + checks(8, 8))

    def mix_step():
        free = trainer.loss([rows.judgement(guided=False) for _ in range(16)], copy=True)
        guided = trainer.loss([rows.judgement(guided=True) for _ in range(16)], copy=True)
        captions = trainer.loss([rows.caption() for _ in range(32)])
        packed = trainer.loss([rows.packed_checks() for _ in range(8)])
        return (free + guided) / 2 + captions + 0.5 * packed + 0.25 * questions()

    def correcting_step():
        verdicts = trainer.loss([rows.only_verdict() for _ in range(16)])
        return mix_step() + 2 * verdicts  # half of their weight is the stop token's

    train_steps(trainer, "align", 90, 2e-3, partial(align, 128), final=0.5)
    rows.near_misses = (0.3, 0.3, 0.4)  # easier ones among them, or it starts at chance
    train_steps(trainer, "check", 160, 1.5e-3, check_step, final=0.5)
    rows.near_misses = (0.4, 0.4, 0.2)
    train_steps(trainer, "caption", 170, 2e-3, caption_step, final=0.3)
    trainer.freeze_vision()
    rows.caption_indices = captioned
    train_steps(trainer, "mix", 190, 2e-3, mix_step, final=0.15)
    return steer(trainer, rows, correcting_step, validation)


def lacking(measured):
    """ "name .12, wanted .34-.56; ..." of what WANTED asks for and a judge has not."""
    said = []
    for name, (low, high) in WANTED.items():
        if not low <= measured[name] <= high:
            said.append(f"{name} {measured[name]:.3f}, wanted {low}-{high}")
    return "; ".join(said)


def steer(trainer, rows, correcting_step, validation, corrections=8):
    """Changes the model and `rows.wrong_absent`: while the judge lacks something on validation
    scenes, raise or lower the rate of wrong facts and go on for a few steps. Exits if it still
    does in the end. -> [what was measured]"""
    rng = np.random.default_rng(2)
    pairs = {i: make_pair(rng, trainer.present[i]) for i in validation[-150:]}
    some = dict(list(pairs.items())[:50])
    held = Rows(np.random.default_rng(1), trainer.present, validation)
    checks = [held.packed_checks() for _ in range(200)]
    verdicts = [held.only_verdict() for _ in range(400)]
    history = []
    while True:
        trainer.model.eval()
        base = measure_judge(trainer, pairs)
        measured = {"wrong_absent": rows.wrong_absent, **base}
        measured["guided_accuracy"] = measure_judge(trainer, some, rng)["accuracy"]
        measured["check_accuracy"] = trainer.check_accuracy(checks)
        measured["verdict_follows"] = trainer.verdict_follows(verdicts)
        trainer.model.train()
        shares = ", ".join(f"{name} {share:.3f}" for name, share in measured.items())
        print(f"mix | validation judge: {shares}", flush=True)
        history.append(measured)
        missing = lacking(measured)
        if not missing:
            return history
        if len(history) > corrections:
            sys.exit(f"error: no judge that stage 03 can train: {missing}. Try another --seed")
        low, high = WANTED["accuracy"]
        if base["accuracy"] > high:
            rows.wrong_absent = min(rows.wrong_absent + 0.12, 0.8)
        elif base["accuracy"] < low:
            rows.wrong_absent = max(rows.wrong_absent - 0.1, 0.3)
        print(f"mix | {missing}: 30 more steps, wrong facts at {rows.wrong_absent:.2f}", flush=True)
        train_steps(trainer, "mix+", 30, 1e-3, correcting_step, final=0.3)


# ---- The expert, in a process of its own: it needs the second core while the model trains -------
def train_expert(folder, seed, n_scenes=1500, epochs=7):
    """YOLO11n from scratch, offline, on dense scenes -> folder/expert.pt; its precision, recall."""
    os.environ |= {"YOLO_CONFIG_DIR": str(folder), "MPLCONFIGDIR": str(folder)}
    os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_VERBOSE": "0"}
    sys.stdout = (folder / "log.txt").open("w")  # this process's own: progress bars
    import ultralytics.data.utils
    from ultralytics import YOLO

    torch.set_num_threads(1)  # small operations do not gain from a second one
    ultralytics.data.utils.check_font = id  # nothing is drawn: no font is looked for or fetched
    rng = np.random.default_rng([seed, 1])
    write_yolo_data(folder, rng, "train", n_scenes)
    write_yolo_data(folder, rng, "val", 16)
    names = "\n".join(f"  {i}: {kind}" for i, kind in enumerate(KINDS))
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    plain = dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "fliplr", "flipud", "erasing"), 0)
    plain |= {"hsv_v": 0.1, "auto_augment": None}  # colour is the class
    how = {"imgsz": 96, "batch": 32, "nbs": 32, "optimizer": "AdamW", "lr0": 2e-3}
    how |= {"warmup_epochs": 1, "amp": False, "cache": "ram", "workers": 0, "device": "cpu"}
    quiet = {"plots": False, "val": False, "verbose": False, "project": str(folder), "name": "run"}
    yolo = YOLO("yolo11n.yaml", verbose=False)
    yolo.train(data=str(data), epochs=epochs, seed=seed, **how, **plain, **quiet)
    strip_expert(folder / "run" / "weights" / "last.pt", folder / "expert.pt")
    return measure_expert(YOLO(folder / "expert.pt"), rng)


def write_yolo_data(folder, rng, split, n):
    """n scenes of 5-9 objects: dense ones teach more a second."""
    images, labels = folder / "images" / split, folder / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i in range(n):
        kinds = scenes.sample_kinds(rng, rng.integers(5, 10))
        scene = scenes.draw_scene(rng, kinds, scenes.USER)
        Image.fromarray(scene.picture).save(images / f"{i}.png")
        lines = []
        for thing in scene.objects:
            x1, y1, x2, y2 = np.array(thing["box"]) / SIZE
            box = f"{(x1 + x2) / 2:.4f} {(y1 + y2) / 2:.4f} {x2 - x1:.4f} {y2 - y1:.4f}"
            lines.append(f"{KINDS.index(thing['object'])} {box}\n")
        (labels / f"{i}.txt").write_text("".join(lines))


def strip_expert(checkpoint, out):
    """Writes the weights without what tells about the machine: paths, dates, git, settings."""
    model = torch.load(checkpoint, map_location="cpu", weights_only=False)["model"]
    model.args = {"task": "detect", "imgsz": 96}
    torch.save({"model": model, "train_args": model.args, "license": "AGPL-3.0"}, out)


def measure_expert(expert, rng):
    """{confidence at least: {precision, recall}} of presence on 300 ordinary scenes."""
    shown = [draw_ordinary_scene(rng) for _ in range(300)]
    best = np.zeros((len(shown), len(KINDS)))  # highest confidence of each kind
    truth = np.zeros((len(shown), len(KINDS)), dtype=bool)
    for i, scene in enumerate(shown):
        picture = Image.fromarray(scene.picture)
        [result] = expert.predict(picture, imgsz=96, conf=0.01, verbose=False, device="cpu")
        np.maximum.at(best[i], result.boxes.cls.int().numpy(), result.boxes.conf.numpy())
        truth[i, [KINDS.index(thing["object"]) for thing in scene.objects]] = True
    table = {}
    for threshold in (0.05, 0.1, 0.25, 0.5):
        found = best >= threshold
        precision, recall = truth[found].mean(), found[truth].mean()
        table[str(threshold)] = {"precision": round(precision, 3), "recall": round(recall, 3)}
    return table


# ---- A world ------------------------------------------------------------------------------------
def build_judge(seed, n_bank=10000, n_user=3800, n_validation=800):
    """-> (model, processor, table of the base model, steering)"""
    rng = np.random.default_rng([seed, 0])
    torch.manual_seed(seed)
    bank = [draw_ordinary_scene(rng, scenes.USER) for _ in range(n_user)]
    bank += [draw_ordinary_scene(rng, scenes.PLAIN) for _ in range(n_bank - n_user)]
    for grey in (0, 64, 128, 192, 255):  # blank pictures: 2.5 % of the training scenes
        blank = Scene(np.full((SIZE, SIZE, 3), grey, np.uint8), [], [-1] * N_CELLS)
        bank += [blank] * (n_bank // 200)
    validation, captioned, train = np.split(np.arange(len(bank)), [n_validation, n_user])
    processor = build_processor()
    trainer = Trainer(build_model(processor.tokenizer), processor, bank)
    steered_by, held_out = np.split(validation, 2)
    steering = train_model(trainer, rng, train, captioned, steered_by)
    pairs = {i: make_pair(rng, trainer.present[i]) for i in held_out}
    model = trainer.model.eval()
    table = measure_captions(trainer, held_out) | measure_judge(trainer, pairs)
    return model, processor, {name: round(share, 4) for name, share in table.items()}, steering


def main(args):
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} is not empty; name a folder that is not there yet")
    start = time.time()
    transformers.logging.set_verbosity_error()  # as the stages do
    torch.set_num_threads(1)  # the other core belongs to the expert until it is done
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        expert = pool.submit(train_expert, Path(work), args.seed)
        model, processor, table, steering = build_judge(args.seed)
        precision_recall = expert.result()
        model.save_pretrained(args.out / "model")
        processor.save_pretrained(args.out / "model")
        shutil.copy(Path(work) / "expert.pt", args.out)
    world = {"seed": args.seed, "base_model": table, "expert": precision_recall}
    world |= {"steering": steering, "seconds": round(time.time() - start)}
    print(json.dumps(world, indent=1))
    (args.out / "world.json").write_text(json.dumps(world, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
