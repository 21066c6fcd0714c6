"""What the five stages must agree on byte for byte, and plumbing: the judge's prompt and verdict, model loading,
encoding, batched sampling with the verdict's log-odds, and resumable run directories.

None of the method's ideas live here; they stand in the stage that introduces them. Letters used in all files:
B sequences, T tokens, V vocabulary entries, P prompt tokens (image included), R response tokens.
"""
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
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # a bar of its own per loaded checkpoint hides ours
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks by the name that transformers left

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
    """ "A", "B", or None where the last verdict line names neither or both. Case, markdown, punctuation are tolerated.

    >>> parse_verdict("A: red circle: yes\\n**Verdict: B.**"), parse_verdict("Verdict: A or B")
    ('B', None)
    """
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


# ---- The verdict's log-odds ------------------------------------------------------------------------------------------
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
    return torch.device(name or ("cuda" if torch.cuda.is_available() else
                                 "mps" if torch.backends.mps.is_available() else "cpu"))


def load_judge(model_path, checkpoint=None, device=None, max_image_tokens=None, trainable=False):
    """(model, processor) from a hub id or folder; checkpoint: a PEFT adapter folder, or a fully fine-tuned model's folder.
    bf16 on GPUs that have it, float32 elsewhere."""
    device = pick_device(device)
    is_adapter = checkpoint is not None and (Path(checkpoint) / "adapter_config.json").exists()
    if checkpoint is not None and not is_adapter and not (Path(checkpoint) / "config.json").exists():
        stop(f"{checkpoint} holds neither adapter_config.json nor config.json: run the stage that writes it first")
    weights = model_path if checkpoint is None or is_adapter else str(checkpoint)
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(model_path)
        model = AutoModelForImageTextToText.from_pretrained(weights, dtype=dtype, attn_implementation="sdpa")
    except OSError as error:
        stop(f"--model {weights}: {str(error).splitlines()[0]}")
    if max_image_tokens:  # an image token covers merge_size x merge_size patches
        vision = processor.image_processor
        pixels = max_image_tokens * (vision.patch_size * vision.merge_size) ** 2
        vision.size = {"shortest_edge": min(vision.size["shortest_edge"], pixels), "longest_edge": pixels}
    model = model.to(device).requires_grad_(False)
    if is_adapter:
        model = load_adapter(model, checkpoint, trainable)
    model.eval()
    print(f"model {weights}{f' + adapter {checkpoint}' if is_adapter else ''} on {device.type}, {str(dtype)[6:]}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return model, processor


def load_adapter(model, folder, trainable=False):
    """PeftModel; an adapter whose keys do not fit the model is refused (PEFT itself only warns and uses fresh weights)."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    expected = set(get_peft_model_state_dict(model))
    if found != expected:
        stop(f"the adapter {folder} does not fit the model:\n  only in the adapter: {sorted(found - expected)[:8]}\n"
             f"  only in the model:   {sorted(expected - found)[:8]}")
    return model


def find_checkpoint(folder):
    """The folder's adapter/ or model/, as stages 03 and 04 write them."""
    found = [path for path in (Path(folder) / "adapter", Path(folder) / "model") if path.exists()]
    return found[0] if found else stop(f"{folder} holds neither adapter/ nor model/: run the stage that writes it first")


def unwrap(model):
    """The transformers model under a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- Encoding --------------------------------------------------------------------------------------------------------
def load_image(image):
    """RGB picture from a path or a PIL image."""
    try:
        return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    except OSError as error:  # missing, or not a picture
        stop(f"image {image}: {error}")


def encode_prompts(processor, texts, images):
    """Left-padded model inputs for one user turn (image, then text) per row; input_ids (B, P)."""
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    chats = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return processor(text=chats, images=[[load_image(image)] for image in images], padding=True, padding_side="left",
                     return_tensors="pt", return_mm_token_type_ids=True)


# ---- Sampling --------------------------------------------------------------------------------------------------------
def row_seed(seed, *keys):
    """A 63-bit seed from the run's seed and a row's identity: resuming or splitting the work changes no row's randomness."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, (seed, *keys))).encode()).digest()[:8], "big") >> 1


class ReservedLayer(DynamicLayer):
    """A prompt's cache layer repeated for its samples, with room for the tokens to come: DynamicLayer copies everything it
    holds at every token, this one writes in place."""

    def __init__(self, layer, repeats, room):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.buffers = [F.pad(x.repeat_interleave(repeats, 0), (0, 0, 0, room)) for x in (layer.keys, layer.values)]
        self._show(layer.keys.shape[2])

    def _show(self, length):
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)  # (B*n, H, length, D), views

    def update(self, keys, values, *args, **kwargs):  # (B*n, H, 1, D) each
        start = self.keys.shape[2]
        self._show(start + keys.shape[2])
        self.keys[:, :, start:], self.values[:, :, start:] = keys, values
        return self.keys, self.values

    def batch_select_indices(self, indices):
        length = self.keys.shape[2]
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show(length)


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


@torch.inference_mode()
def _sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids):
    """Encode B prompts once, decode n samples of each. uniforms (B, n, R) in [0,1): the only randomness, one per token.
    -> token ids (B*n, R) padded with -1, log-odds (B*n, R, 2) at temperature 1 for both spellings of the verdict."""
    B, n, R = uniforms.shape
    base = unwrap(model)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)  # (B*n, V)
    cache.layers = [ReservedLayer(layer, n, R) for layer in cache.layers]
    mask = inputs["attention_mask"].repeat_interleave(n, 0)  # (B*n, P)
    deltas = getattr(base.model, "rope_deltas", None)  # image tokens take fewer positions than places: next = length + delta
    position = mask.sum(1, keepdim=True) + (0 if deltas is None else deltas.repeat_interleave(n, 0))  # (B*n, 1)
    uniforms = uniforms.reshape(B * n, R).to(logits.device)
    tokens = torch.full((B * n, R), -1)
    log_odds = torch.zeros(B * n, R, 2)
    rows = torch.arange(B * n)  # the samples in the batch
    going = torch.ones(B * n, dtype=torch.bool, device=logits.device)  # those of them that have not stopped
    for t in range(R):
        if temperature == 0:
            new = logits.argmax(-1)  # (rows,)
        else:  # inverse transform sampling: the first token whose cumulative probability exceeds the uniform number
            cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (rows, V)
            new = torch.searchsorted(cdf, uniforms[:, t:t + 1].double() * cdf[:, -1:], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
        tokens[rows, t] = new.cpu()
        log_odds[rows, t] = torch.stack([verdict_log_odds(logits, a, b) for a, b in zip(*verdict_ids)], -1).cpu()
        going &= ~torch.isin(new, stop_ids)  # (rows,)
        if t + 1 == R or not going.any():
            break
        mask = F.pad(mask, (0, 1), value=1)
        if going.float().mean() < 0.75:  # finished samples leave the batch
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, new, mask, position, uniforms, going = (x[keep.to(x.device)] for x in (
                rows, new, mask, position, uniforms, going))
        # A finished sample that has not left yet keeps writing; tokens after the stop are cut off by the caller.
        where = position if deltas is None else position.expand(3, -1, -1)  # (3, rows, 1): time, height, width
        logits = model(input_ids=new[:, None], attention_mask=mask, position_ids=where, past_key_values=cache,
                       use_cache=True).logits[:, -1]
        position = position + 1
    if deltas is not None:
        base.model.rope_deltas = None  # hidden state that the next forward must not see
    return tokens, log_odds


def sample(model, processor, requests, n=1, temperature=1.0, max_new_tokens=256, seed=0, batch_size=64, bar=None):
    """n samples per request {"id", "image": path or PIL, "text"}, in the asked order: lists of n dicts {"text", "complete":
    the stop token was written, "verdict": "A"/"B"/None, "log_odds": r at the verdict position in nats, None without verdict}.
    batch_size counts sequences; out of memory halves it. Row by row the randomness comes from (seed, id)."""
    tokenizer, device = processor.tokenizer, unwrap(model).device
    stop_ids = model.generation_config.eos_token_id or tokenizer.eos_token_id
    stop_ids = torch.tensor(stop_ids if isinstance(stop_ids, list) else [stop_ids], device=device)
    verdict_ids = verdict_token_ids(tokenizer)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]["text"]))  # batches of like length pad little
    step = max(1, batch_size // n)
    results = [None] * len(requests)
    while order:
        batch, rest = order[:step], order[step:]
        chosen = [requests[i] for i in batch]
        uniforms = torch.stack([torch.rand(n, max_new_tokens, generator=torch.Generator().manual_seed(
            row_seed(seed, request["id"]))) for request in chosen])  # (B, n, R)
        inputs = encode_prompts(processor, [r["text"] for r in chosen], [r["image"] for r in chosen]).to(device)
        try:
            tokens, log_odds = _sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids)
        except torch.OutOfMemoryError:
            if step == 1:
                raise
            step = (step + 1) // 2
            torch.cuda.empty_cache()
            print(f"out of memory: going on with {step} prompts at a time")
            continue
        for k, i in enumerate(batch):
            rows = slice(k * n, (k + 1) * n)
            results[i] = [_finish(tokenizer, *pair, stop_ids, verdict_ids) for pair in zip(tokens[rows], log_odds[rows])]
        order = rest
        if bar is not None:
            bar.update(len(batch))
    return results


def _finish(tokenizer, tokens, log_odds, stop_ids, verdict_ids):
    """One sample from its tokens (R,) and log-odds (R, 2): text, verdict, and r at the token that holds the verdict."""
    ends = torch.isin(tokens, stop_ids.cpu()).nonzero()
    length = int(ends[0]) if len(ends) else int((tokens >= 0).sum())
    text, verdict, place = find_verdict_token(tokenizer, tokens[:length].tolist())
    r = None if verdict is None else log_odds[place, int(tokens[place] in (verdict_ids[0][1], verdict_ids[1][1]))].item()
    return {"text": text, "complete": bool(len(ends)), "verdict": verdict, "log_odds": r}


# ---- Run directories: rows that survive an interruption, meta.json as the sign of completion -------------------------
def read_jsonl(path, fields=()):
    """Rows of a jsonl file; file, line and field are named where one is missing or malformed."""
    path, rows, ids = Path(path), [], set()
    if not path.exists():
        stop(f"{path} does not exist: run the stage that writes it first, or name another file")
    for number, line in enumerate(path.read_text().removesuffix("\n").split("\n") if path.stat().st_size else (), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            stop(f"{path} line {number}: not JSON ({error})")
        if not isinstance(row, dict):
            stop(f"{path} line {number}: a JSON object is expected, not {line[:40]}")
        for field in fields:
            if row.get(field) is None:
                stop(f"{path} line {number}: field {field!r} is missing")
        if "id" in fields:
            if row["id"] in ids:
                stop(f"{path} line {number}: id {row['id']!r} occurs twice")
            ids.add(row["id"])
        rows.append(row)
    if not rows and fields:
        stop(f"{path} is empty: nothing to work on")
    return rows


def write_jsonl(path, rows):
    """Atomic: a reader sees the old file or the new one, never half of it."""
    scratch = Path(f"{path}.partial")
    scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(scratch, path)


class RowWriter:
    """Appends rows to a jsonl file, flushed one by one. On opening, what is there is kept in .rows; a half-written last line
    (power cut) is cut off and will be redone."""

    def __init__(self, path):
        self.path, self.rows = Path(path), []
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data[:data.rfind(b"\n") + 1]
            if whole != data:
                self.path.write_bytes(whole)
            self.rows = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
        self.file = self.path.open("a")

    def write(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        self.rows.append(row)


def in_chunks(rows, done, size, describe):
    """Fixed chunks of rows with a progress bar, those already done left out as wholes: a resumed run forms the same batches
    as an uninterrupted one, so it writes the same bytes. Yields (chunk, bar)."""
    chunks = [rows[i:i + size] for i in range(0, len(rows), size)]
    with tqdm(total=len(rows), desc=describe, unit="row", dynamic_ncols=True, disable=None) as bar:
        for chunk in chunks:
            if all(row["id"] in done for row in chunk):
                bar.update(len(chunk))
            else:
                yield chunk, bar


def write_json(path, value):
    scratch = Path(f"{path}.partial")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(scratch, path)


NOT_COMPARED = {"run", "device", "overwrite", "batch_size"}  # arguments that leave a stage's result as it is


def start_stage(args, name):
    """The stage's folder, ready to be written or resumed; None when it is complete with the same arguments."""
    folder = Path(args.run) / name
    wanted = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in NOT_COMPARED}
    if args.overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "args.json").exists():
        old = json.loads((folder / "args.json").read_text())
        changed = [f"--{k.replace('_', '-')} was {old.get(k)}, is {v}" for k, v in wanted.items() if old.get(k) != v]
        if changed:
            stop(f"{folder} was begun with other arguments ({'; '.join(changed)}): use them, another --run, or --overwrite")
        if (folder / "meta.json").exists():
            print(f"{folder} is complete (meta.json is there): nothing to do; --overwrite makes it anew")
            return None
        print(f"resuming {folder}")
    write_json(folder / "args.json", wanted)
    args.started = time.time()
    return folder


def finish_stage(folder, args, counts, inputs=(), next_command="", **extra):
    """Print what was made and dropped, and write meta.json last: its presence means that the stage is complete."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    packages = ("torch", "transformers", "peft", "ultralytics", "numpy", "pillow")
    gpu = torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0.0
    meta = {"args": json.loads((folder / "args.json").read_text()), "counts": counts, **extra,
            "inputs": {str(p): hashlib.sha256(Path(p).read_bytes()).hexdigest()[:16] for p in inputs},
            "seconds": round(time.time() - args.started, 1), "peak_gpu_gib": round(gpu, 2),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2),
            "git_commit": git.stdout.strip() or None, "python": sys.version.split()[0],
            "versions": {p: importlib.metadata.version(p) for p in packages}}
    for reason, count in counts.items():
        print(f"  {reason:<44} {count:>8}")
    print(f"{folder}: done in {meta['seconds']:.0f} s, peak memory {meta['peak_memory_gib']} GiB")
    if next_command:
        print(f"next: {next_command}")
    write_json(folder / "meta.json", meta)


def inherit(args, stage, names):
    """Settings that must not change between stages come from the earlier stage's args.json; a contradiction is refused."""
    path = Path(args.run) / stage / "meta.json"
    if not path.exists():
        stop(f"{path} does not exist: {stage} is not complete; run its script first")
    earlier = json.loads(path.read_text())["args"]
    for name in names:
        given = getattr(args, name)
        if given is not None and str(given) != str(earlier[name]):
            stop(f"--{name.replace('_', '-')} {given} contradicts {stage}, which was made with {earlier[name]}")
        setattr(args, name, earlier[name])
