"""What the five stages must agree on byte for byte, and plumbing (the method's ideas stand in the stages): the judge's prompt and
verdict, model loading, encoding, batched sampling with the verdict's log-odds, several processes, resumable run directories.

Letters in all files: B sequences, T tokens, V vocabulary entries, P prompt tokens (image included), R response tokens.
"""
import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor, logging as transformers_logging

transformers_logging.disable_progress_bar()  # a bar of its own per loaded checkpoint hides ours

# ---- The judge's prompt, verdict and checks --------------------------------------------------------------------------
INSTRUCTIONS = {
    "critique": 'Check each claim of A and B against the image, one per line: "A: claim: yes" or "A: claim: no". '
                'End with "Verdict: A" or "Verdict: B", the better response.',
    "descriptive": 'Describe the image. End with "Verdict: A" or "Verdict: B", the better response.',
    "none": 'Answer "Verdict: A" or "Verdict: B", the better response.',
}


def build_judge_prompt(prompt, response_a, response_b, style="critique", reference=None):
    """The one text that asks for a judgement; it follows the image. reference: findings and label as the lines that a
    critique would hold (stage 02 only; the prompt that is trained on and evaluated has none)."""
    guide = "" if reference is None else f"Known to be true, never to be mentioned:\n{reference}\n"
    return f"Question: {prompt}\nResponse A: {response_a}\nResponse B: {response_b}\n{guide}{INSTRUCTIONS[style]}"


def both_orders(pair):
    """The pair's two questions: in order "ab" the chosen response is A (label "A"), in "ba" it is B."""
    for order, a, b, label in (("ab", "chosen", "rejected", "A"), ("ba", "rejected", "chosen", "B")):
        yield {"id": f"{pair['id']}-{order}", "pair_id": pair["id"], "order": order, "image": pair["image"],
               "prompt": pair["prompt"], "response_a": pair[a], "response_b": pair[b], "label": label}


_MARK = r"(?:[^\w\n]|_)*"  # markdown, quotes, brackets, punctuation: anything on this line that is no word
_VERDICT_LINE = re.compile(rf"^{_MARK}(?:\d+{_MARK})?(?:final +)?verdict{_MARK}:(.*)$", re.IGNORECASE | re.MULTILINE)
_VERDICT = re.compile(rf"^{_MARK}(?:response +)?([ab]){_MARK}$", re.IGNORECASE)
_ANSWER = re.compile(r":(?:[^\w\n:]|_)*(yes|no)\b", re.IGNORECASE)  # ends a check; before it stand "A:" and the claim
_CLAIM = re.compile(r"^[\W_]*(?:\d+[\W_]+)?(?:(?:response +)?([AB])\b[^\w:]*:)?(.+)$", re.IGNORECASE)


def find_verdict(text):
    """(verdict, index of its letter in text), or (None, -1). The last line that starts with "Verdict:" decides."""
    lines = list(_VERDICT_LINE.finditer(text))
    match = _VERDICT.match(lines[-1].group(1)) if lines else None
    return (match.group(1).upper(), lines[-1].start(1) + match.start(1)) if match else (None, -1)


def parse_verdict(text):
    """ "A", "B", or None where the last verdict line names neither or both. Case, markdown, punctuation are tolerated."""
    return find_verdict(text)[0]


def parse_checks(text):
    """The critique's checks in order, one per line or clause: list of ("A" | "B", claim, supported).

    >>> parse_checks("A: red circle: yes; A: blue star: no\\nB: a dog: yes, on the left\\nVerdict: B")
    [('A', 'red circle', True), ('A', 'blue star', False), ('B', 'a dog', True)]
    """
    checks = []
    for line in text.splitlines():
        side = None  # a clause without a letter speaks of the response that its line named last
        for clause in re.split(r";|(?:(?<=: yes)|(?<=: no))[.,]? +", line):
            answer = _ANSWER.search(clause)
            claim = answer and _CLAIM.match(clause[:answer.start()])
            if claim and (side := (claim.group(1) or side or "").upper()):
                checks.append((side, claim.group(2).strip(" *_\"'`"), answer.group(1).lower() == "yes"))
    return checks


def verdict_log_odds(logits, id_a, id_b):
    """r = log P(A) - log P(B) in nats (B,), from logits (B,V) at the verdict position; the softmax's normaliser cancels.
    id_a, id_b: token ids of the two letters, ints or (B,) tensors."""
    logits = logits.float()  # (B, V); float32, since a difference of bf16 logits has steps of 1/16 nat
    rows = torch.arange(len(logits), device=logits.device)  # (B,)
    return logits[rows, id_a] - logits[rows, id_b]  # (B,)


# ---- Models: loading, adapters ---------------------------------------------------------------------------------------
LORA_TARGETS = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def stop(message):
    """End the script with one readable line: what is wrong, where, and what to do."""
    raise SystemExit(f"error: {message}")


def pick_device(name=None):
    cuda = torch.cuda.is_available() and f"cuda:{torch.cuda.current_device()}"  # of several processes each has its own
    return torch.device(name or cuda or ("mps" if torch.backends.mps.is_available() else "cpu"))


def pick_dtype(device):  # bf16 on GPUs that have it
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def unwrap(model):  # the transformers model under a PEFT wrapper
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_judge(model_path, checkpoint=None, device=None, max_image_tokens=None, trainable=False, prepare=lambda model: model):
    """(model, processor) from a hub id or folder; checkpoint: a PEFT adapter folder, or a fully fine-tuned model's folder.
    max_image_tokens: no picture takes more of the prompt's tokens. prepare(model): what is done before it goes to the device."""
    device = pick_device(device)
    is_adapter = checkpoint is not None and (Path(checkpoint) / "adapter_config.json").exists()
    weights = model_path if checkpoint is None or is_adapter else str(checkpoint)
    try:
        processor = AutoProcessor.from_pretrained(model_path)
        model = AutoModelForImageTextToText.from_pretrained(weights, dtype=pick_dtype(device), attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        stop(f"--model {weights}: {str(error).splitlines()[0]}")
    if max_image_tokens:  # an image token covers merge_size x merge_size patches
        vision = processor.image_processor
        pixels = max_image_tokens * (vision.patch_size * vision.merge_size) ** 2  # // 4: enlarging may double both sides
        vision.size = {"shortest_edge": min(vision.size["shortest_edge"], pixels // 4), "longest_edge": pixels}
    model = model.requires_grad_(False)
    return prepare(load_adapter(model, checkpoint, trainable) if is_adapter else model).to(device).eval(), processor


def load_adapter(model, folder, trainable=False):
    """PeftModel; an adapter whose keys do not fit the model is refused (PEFT itself only warns and uses fresh weights)."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    found, expected = set(load_file(Path(folder) / "adapter_model.safetensors")), set(get_peft_model_state_dict(model))
    if found != expected:
        stop(f"the adapter {folder} does not fit the model:\n  only in the adapter: {sorted(found - expected)[:8]}\n"
             f"  only in the model:   {sorted(expected - found)[:8]}")
    return model


# ---- Encoding --------------------------------------------------------------------------------------------------------
def load_image(image, aspect=200):
    """RGB picture from a path or a PIL image. One whose long side is more than aspect times the short one gets black bars."""
    try:
        picture = (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    except OSError as error:  # missing, or not a picture
        stop(f"image {image}: {error}")
    size = tuple(max(side, int(-(-max(picture.size) // aspect))) for side in picture.size)
    return picture if size == picture.size else ImageOps.pad(picture, size)


def encode_prompts(processor, texts, images):
    """Left-padded model inputs for one user turn (image, then text) per row; input_ids (B, P)."""
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    chats = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    vision = processor.image_processor  # a strip one image token high takes as many as it is long, whatever the bound
    aspect = min(200, vision.size["longest_edge"] / (vision.patch_size * vision.merge_size) ** 2)
    return processor(text=chats, images=[[load_image(image, aspect)] for image in images], padding=True, padding_side="left",
                     return_tensors="pt", return_mm_token_type_ids=True)


# ---- Sampling --------------------------------------------------------------------------------------------------------
def row_seed(seed, *keys):
    """A 63-bit seed from the run's seed and a row's identity: resuming or splitting the work changes no row's randomness."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, (seed, *keys))).encode()).digest()[:8], "big") >> 1


def attention(q, k, v, bias=0.0):
    """(softmax(q k^T + bias) v (..., D), log of the softmax's normaliser (..., 1)) in float32; the last key is never hidden."""
    scores = q @ k.float().mT + bias  # (..., queries, keys)
    log_p = scores.log_softmax(-1)
    return log_p.exp() @ v.float(), (scores - log_p)[..., -1:]


class SharedPrompt:
    """A layer's cache: the prompts' keys and values (B, H, P, D) are kept and read once for all n samples of a prompt; what each
    sample writes goes in place into (S, H, R, D), S = B*n at first. slots (S,): the samples still here, as b*n + k."""

    def __init__(self, layer, mask, n, room):
        self.prompt, self.n, self.length = (layer.keys, layer.values), n, 0
        self.bias = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]  # (B, 1, 1, P): hides the padding
        self.own = [x.new_empty(len(x) * n, x.shape[1], room, x.shape[3]) for x in self.prompt]
        self.slots = torch.arange(len(mask) * n, device=mask.device)

    def update(self, keys, values, *args, **kwargs):  # (S, H, 1, D) each
        for own, new in zip(self.own, (keys, values)):
            own[:, :, self.length] = new[:, :, 0]
        self.length += 1
        return self, None  # what transformers hands to the attention function "shared_prompt" as keys and values

    def attend(self, query, scale):
        """query (S, H*G, 1, D), G heads to each of H -> (S, 1, H*G, D). The two parts' attention, weighted by normaliser z: with
        w = z_prompt / (z_prompt + z_own) it is w out_prompt + (1 - w) out_own, as if there were one cache."""
        B, H, P, D = self.prompt[0].shape
        q = query.reshape(len(query), H, -1, D).float() * scale  # (S, H, G, D)
        all_q = q.new_zeros(B * self.n, *q.shape[1:]).index_copy_(0, self.slots, q)  # zeros for samples that have left
        all_q = all_q.view(B, self.n, H, -1, D).transpose(1, 2).flatten(2, 3)  # (B, H, n*G, D)
        prompt, log_z_prompt = (x.unflatten(2, (self.n, -1)).transpose(1, 2).flatten(0, 1)[self.slots] for x in attention(
            all_q, *self.prompt, self.bias))  # (S, H, G, D), (S, H, G, 1)
        own, log_z_own = attention(q, *(x[:, :, :self.length] for x in self.own))  # (S, H, G, D), (S, H, G, 1)
        return own.lerp(prompt, (log_z_prompt - log_z_own).sigmoid()).to(query.dtype).reshape(len(query), 1, -1, D)

    def batch_select_indices(self, indices):
        self.own, slots = [x[indices] for x in self.own], self.slots[indices]
        here, place = (slots // self.n).unique(return_inverse=True)  # prompts without samples leave, too
        self.prompt, self.bias, self.slots = [x[here] for x in self.prompt], self.bias[here], place * self.n + slots % self.n


AttentionInterface.register("shared_prompt", lambda module, query, cache, *_, scaling, **__: (cache.attend(query, scaling), None))


def verdict_token_ids(tokenizer):
    """((2,) ids of A, (2,) ids of B): as written after "Verdict:" with a space, and bare as in "**A**"."""
    ids = [[tokenizer(text, add_special_tokens=False).input_ids[-1] for text in (f"Verdict: {x}", x)] for x in "AB"]
    if set(ids[0]) & set(ids[1]):
        stop("the tokenizer gives A and B the same token: verdict log-odds cannot be read from this model")
    return ids


def find_verdict_token(tokenizer, ids):
    """(text, verdict, place): the decoded response, "A", "B" or None, and the index in ids of the token that holds it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    verdict, index = find_verdict(text)
    place = len(ids) - 1 if verdict else None
    while verdict and len(tokenizer.decode(ids[:place], skip_special_tokens=True)) > index:  # the token that covers text[index]
        place -= 1
    return text, verdict, place


@torch.no_grad()  # not inference_mode: weights that a sharded model has gathered in it cannot be trained on later
def _sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids):
    """Encode B prompts once, decode n samples of each. uniforms (B, n, R) in [0,1): the only randomness, one per token.
    -> token ids (B*n, R) padded with -1, log-odds (B*n, R, 2) at temperature 1 for both spellings of the verdict."""
    B, n, R = uniforms.shape
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)  # (B*n, V)
    if others := {type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"}:
        stop(f"this model's cache has layers of kind {', '.join(others)}: only full attention can be sampled from here")
    cache.layers = [SharedPrompt(layer, inputs["attention_mask"], n, R) for layer in cache.layers]
    inner, config = unwrap(model).model, unwrap(model).model.language_model.config
    deltas = getattr(inner, "rope_deltas", None)  # image tokens take fewer positions than places: next = length + delta
    inner.rope_deltas = None  # hidden state that no later forward must see
    position = (inputs["attention_mask"].sum(1, keepdim=True) + (0 if deltas is None else deltas)).repeat_interleave(n, 0)  # (B*n, 1)
    uniforms = uniforms.reshape(B * n, R).to(logits.device, torch.float32 if logits.device.type == "mps" else torch.float64)
    tokens, log_odds = torch.full((B * n, R), -1, device=logits.device), logits.new_zeros(B * n, R, 2, dtype=torch.float)
    rows, going = torch.arange(B * n, device=logits.device), torch.ones_like(tokens[:, 0]).bool()  # samples here; not stopped
    for t in range(R):
        if temperature == 0:
            new = logits.argmax(-1)  # (rows,)
        else:  # inverse transform sampling: the first token whose cumulative probability exceeds the uniform number
            cdf = (logits.to(uniforms.dtype) / temperature).softmax(-1).cumsum(-1)  # (rows, V)
            new = torch.searchsorted(cdf, uniforms[:, t:t + 1] * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
        tokens[rows, t] = new
        log_odds[rows, t] = torch.stack([verdict_log_odds(logits, a, b) for a, b in zip(*verdict_ids)], -1)
        going &= ~torch.isin(new, stop_ids)  # (rows,)
        more = share_out(range(WORLD), lambda _: [going.any().item()]) if isinstance(model, FSDPModule) else [going.any()]
        if t + 1 == R or not any(more):  # a sharded model's forward is one of all processes: they go on while any has a sample
            break
        if 0 < going.float().mean() < 0.75:  # finished samples leave the batch
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, new, position, uniforms, going = (x[keep] for x in (rows, new, position, uniforms, going))
        # A finished sample that has not left yet keeps writing; tokens after the stop are cut off by the caller.
        with contextlib.ExitStack() as afterwards:
            afterwards.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = "shared_prompt"  # needs no mask: SharedPrompt's bias hides the padding
            logits = model(input_ids=new[:, None], past_key_values=cache, use_cache=True, position_ids=(
                position if deltas is None else position.expand(3, -1, -1))).logits[:, -1]  # (3, rows, 1): time, height, width
        position = position + 1
    return tokens.cpu(), log_odds.cpu()


def sample(model, processor, requests, n=1, temperature=1.0, max_new_tokens=256, seed=0, batch_size=64, bar=None):
    """n samples per request {"id", "image": path or PIL, "text"}, in the asked order: lists of n dicts {"text", "complete":
    the stop token was written, "verdict": "A"/"B"/None, "log_odds": r at the verdict position in nats, None without verdict}.
    batch_size counts sequences; out of memory halves it (sharded: stops). Row by row the randomness comes from (seed, id)."""
    if hasattr(model, "sample"):  # 04's Endpoint
        return model.sample(requests, n, temperature, max_new_tokens, seed, batch_size, bar)
    tokenizer, device = processor.tokenizer, unwrap(model).device
    stop_ids = torch.tensor(model.generation_config.eos_token_id or tokenizer.eos_token_id, device=device).reshape(-1)
    verdict_ids, size = verdict_token_ids(tokenizer), max(1, batch_size // n)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]["text"]))  # batches of like length pad little
    batches = [order[i:i + size] for i in range(0, len(order), size)]

    def answer(batch):
        nonlocal size
        answers = []
        while len(answers) < len(batch):
            chosen = [requests[i] for i in batch[len(answers):][:size]]
            uniforms = torch.stack([torch.rand(n, max_new_tokens, generator=torch.Generator().manual_seed(
                row_seed(seed, request["id"]))) for request in chosen])  # (B, n, R)
            inputs = encode_prompts(processor, [r["text"] for r in chosen], [r["image"] for r in chosen]).to(device)
            try:
                tokens, log_odds = _sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids)
            except torch.OutOfMemoryError:
                if size == 1 or isinstance(model, FSDPModule):
                    stop(f"out of memory with {len(chosen)} x {n} sequences: lower --batch-size, --max-image-tokens, --max-new-tokens")
                size = (len(chosen) + 1) // 2
                torch.cuda.empty_cache()
                print(f"out of memory: going on with {size} prompts at a time")
                continue
            answers += [[_finish(tokenizer, *one, stop_ids, verdict_ids) for one in zip(*samples)]
                        for samples in zip(tokens.split(n), log_odds.split(n))]
        if bar is not None:  # as if all processes were as far as this one
            bar.update(min(len(batch) * WORLD, bar.total - bar.n))
        return answers

    answers = share_out(batches + batches[:1] * (-len(batches) % WORLD), answer)  # as many for each; zip drops the repeats
    return [samples for _, samples in sorted(zip(order, answers), key=lambda pair: pair[0])]


def _finish(tokenizer, tokens, log_odds, stop_ids, verdict_ids):
    """One sample from its tokens (R,) and log-odds (R, 2): text, verdict, and r at the token that holds the verdict."""
    ends = torch.isin(tokens, stop_ids.cpu()).nonzero()
    text, verdict, place = find_verdict_token(tokenizer, tokens[:ends[0] if len(ends) else (tokens >= 0).sum()].tolist())
    r = None if verdict is None else log_odds[place, int(tokens[place] in (verdict_ids[0][1], verdict_ids[1][1]))].item()
    return {"text": text, "complete": bool(len(ends)), "verdict": verdict, "log_odds": r}


# ---- Several processes: torchrun --nproc-per-node K -- script.py ... -------------------------------------------------
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
if RANK:  # process 0 alone speaks and writes files; bars go to stdout, too, and are off where that is no terminal
    sys.stdout = open(os.devnull, "w")


def share_out(batches, work):
    """The lists work(batch) of all batches, joined: process r of K does batches r, r + K, ... and gets the others' results. So
    the batches, and with them every number, are those of a single process."""
    of_rank = [[work(batch) for batch in batches[RANK::WORLD]]] * WORLD
    if WORLD > 1:
        dist.all_gather_object(of_rank, of_rank[RANK])
    return [result for i in range(len(batches)) for result in of_rank[i % WORLD][i // WORLD]]


# ---- Run directories: rows that survive an interruption, meta.json as the sign of completion -------------------------
def read_jsonl(path, fields=()):
    """Rows of a jsonl file; file, line and field are named where one is missing or malformed."""
    if not Path(path).exists():
        stop(f"{path} does not exist: run the stage that writes it first, or name another file")
    rows, ids = [], set()
    for number, line in enumerate(Path(path).open(), 1):
        try:
            rows.append(dict(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            stop(f"{path} line {number}: a JSON object is expected, not {line[:40]!r} ({error})")
        if missing := [field for field in fields if rows[-1].get(field) is None]:
            stop(f"{path} line {number}: field {missing[0]!r} is missing")
        if "id" in fields and rows[-1]["id"] in ids:
            stop(f"{path} line {number}: id {rows[-1]['id']!r} occurs twice")
        ids.add(rows[-1].get("id"))
    return rows if rows or not fields else stop(f"{path} is empty: nothing to work on")


def write_text(path, text):  # atomic: a reader sees the old file or the new one, never half of it
    if RANK == 0:
        Path(f"{path}.partial").write_text(text)
        os.replace(f"{path}.partial", path)


def write_json(path, value):  # a JSON value or, where the file's name ends in .jsonl, a list of rows, one per line
    rows, indent = (value, None) if Path(path).suffix == ".jsonl" else ([value], 1)
    write_text(path, "".join(json.dumps(row, indent=indent, ensure_ascii=False) + "\n" for row in rows))


class RowWriter:
    """Appends rows to a jsonl file, flushed one by one. rows: also those that were there, but for a half-written last one."""

    def __init__(self, path):
        self.path = Path(path)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[:data.rfind(b"\n") + 1]
        share_out([], None)  # all have read before one writes
        if whole != data and RANK == 0:
            self.path.write_bytes(whole)
        self.rows = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
        self.done = {row.get("id") for row in self.rows}  # before this run
        self.file = open(os.devnull if RANK else self.path, "a", buffering=1)  # by line

    def write(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(row)


def stage_parser(doc):
    """A script's parser with what all stages take."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/default", help="run directory, shared by all stages")
    add("--model", help="hub id or folder of the judge, set in stage 01 for all stages")
    add("--max-image-tokens", type=int, help="bound on an image's tokens, set in stage 01 for all stages")
    add("--device", help="cuda, mps or cpu; default: the first of these that is there")
    add("--shard", action="store_true", help="a judge larger than one GPU: each of torchrun's processes keeps a share of every layer")
    add("--batch-size", type=int, default=64, help="sequences decoded together")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="delete this stage's folder first")
    return parser


def start_stage(args, name):
    """The stage's folder, ready to be written or resumed; None when it is complete with the same arguments."""
    folder = Path(args.run) / name
    # What leaves the result as it is, up to rounding, may change: a run that went out of memory goes on with smaller batches.
    free = "run device endpoint overwrite batch_size micro_batch checkpoint_activations shard".split()
    wanted = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in free}
    if WORLD > 1:
        if gpus := torch.cuda.device_count():
            k = int(os.environ["LOCAL_RANK"])
            torch.cuda.set_device(k) if k < gpus else stop(f"{gpus} GPU(s) are here, so --nproc-per-node can be {gpus} at most")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    elif vars(args).get("shard"):
        stop("--shard shares the judge out among processes: start the script with torchrun --nproc-per-node K -- instead of python")
    if args.overwrite and folder.exists() and RANK == 0:
        shutil.rmtree(folder)
    share_out([], None)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "args.json").exists():
        old = json.loads((folder / "args.json").read_text())
        if changed := [f"--{k.replace('_', '-')} was {old.get(k)}, is {v}" for k, v in wanted.items() if old.get(k) != v]:
            stop(f"{folder} was begun with other arguments ({'; '.join(changed)}): use them, another --run, or --overwrite")
        if (folder / "meta.json").exists():
            print(f"{folder} is complete (meta.json is there): nothing to do; --overwrite makes it anew")
            return None
        print(f"resuming {folder}")
    share_out([], None)
    write_json(folder / "args.json", wanted)
    args.started = time.time()
    return folder


def finish_stage(folder, args, counts, inputs=(), next_command="", **extra):
    """Print what was made and dropped, and write meta.json last: its presence means that the stage is complete."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    meta = {"args": json.loads((folder / "args.json").read_text()), "counts": counts, **extra,
            "inputs": {str(p): hashlib.file_digest(open(p, "rb"), "sha256").hexdigest()[:16] for p in inputs},
            "seconds": round(time.time() - args.started, 1), "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2 ** 30, 2),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2),
            "git_commit": git.stdout.strip() or None, "python": sys.version.split()[0],
            "versions": {p: importlib.metadata.version(p) for p in "torch transformers peft datasets ultralytics numpy pillow".split()}}
    print(*(f"  {reason:<44} {count:>8}" for reason, count in counts.items()), sep="\n")
    print(f"{folder}: done in {meta['seconds']:.0f} s, peak memory {meta['peak_memory_gib']} GiB, of the GPU {meta['peak_gpu_gib']}\n"
          f"next: {next_command}")
    write_json(folder / "meta.json", meta)
