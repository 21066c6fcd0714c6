"""03  Teach the judge to write a critique and a verdict, while it keeps writing correct answers (L_IFT).

    L_IFT = L_SFT(D_critique) + lambda * L_SFT(D_correct)      L_SFT = sum of NLL over response tokens / number of them
    D_critique: image, judge prompt without reference -> critique + verdict          both over the whole optimizer step
    D_correct:  image, prompt -> chosen response

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) lambda = 1/3 by default, as in generative verifiers;
  2) the Bradley-Terry loss on the verdict's log-odds, -log sigmoid(+-r), is measured, and trained on only if asked (--bt-weight);
  3) the vision tower stays frozen, with LoRA and with full fine-tuning (--lora-rank 0) alike;
  4) what is trained is float32, also where the rest is bf16: bf16 would round most updates of this size away.

Reads  02_critiques/critiques.jsonl; 01_preferences/preferences.jsonl (split "validation").
Writes 03_ift/adapter/ (plain PEFT; model/ with --lora-rank 0), metrics.jsonl, validation.jsonl (the judge's critiques).

    python 03_train_ift.py --run runs/demo --steps 150 --lr 3e-3
    python 03_train_ift.py                                       # one GPU
"""
import argparse
import contextlib
import copy
import gc
import importlib
import itertools
import json
import math
import random
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

import common
from common import RANK, WORLD, both_orders, finish_stage, read_jsonl, row_seed, share_out, start_stage, verdict_log_odds

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # how PEFT asks transformers
KINDS = ("critique", "correct")  # of rows, and of the two terms of L_IFT


# ---- The losses ------------------------------------------------------------------------------------------------------
def nll_sum(logits, labels):
    """logits (B,T,V) any float, labels (B,T) int with -100 = not supervised -> (summed NLL () in nats, n_tokens () int)."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]  # (B,T-1,V), (B,T-1): position t predicts token t+1
    nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")  # (B,V,T-1) vs (B,T-1) -> ()
    return nll, (labels != -100).sum()  # (), ()


def ift_loss(nll_critique, n_critique, nll_correct, n_correct, lam):
    """L_IFT = nll_critique / n_critique + lam * nll_correct / n_correct, in nats per token.
    nll_*: summed NLL () of the response tokens; n_*: their number. A micro-batch passes its own sums with the counts of the
    whole optimizer step, so that the losses of the micro-batches add up to the step's; n_correct is unused at lam = 0."""
    loss = nll_critique / n_critique
    return loss + lam * nll_correct / n_correct if lam else loss


def bradley_terry_loss(log_odds, label_is_a):
    """-log P(label) = -log sigmoid(+-r) per example: log_odds r (B,) in nats, label_is_a (B,) bool -> (B,) nats."""
    return F.softplus(torch.where(label_is_a, -log_odds, log_odds))  # (B,); softplus(-x) = -log sigmoid(x)


# ---- The measures of validation (here and in 04) and evaluation (05) -------------------------------------------------
def accuracy_by_order(rows):
    """rows: {"id" of the pair, "order", "label", "verdict": "A" | "B" | None}, one per pair and order -> {"accuracy": mean
    over orders, "accuracy_<order>", "both": right in both, "agreement": the same response wins in both, "unparseable",
    "n_pairs"}. Shares in [0,1]; no verdict counts as wrong and as no agreement."""
    right, orders = {}, sorted({row["order"] for row in rows})
    for row in rows:  # None: no verdict
        right.setdefault(row["id"], []).append(row["verdict"] and row["verdict"] == row["label"])
    here = {order: [row["verdict"] == row["label"] for row in rows if row["order"] == order] for order in orders}
    result, n = {f"accuracy_{order}": sum(hits) / len(hits) for order, hits in here.items()}, len(right)
    return {"accuracy": sum(result.values()) / len(orders), **result,
            "both": sum(map(all, right.values())) / n,
            "agreement": sum(None not in hits and len(set(hits)) == 1 for hits in right.values()) / n,
            "unparseable": sum(row["verdict"] is None for row in rows) / len(rows), "n_pairs": n}


def expected_calibration_error(probability, correct, bins=10):
    """sum over bins of (share of rows in it) * |mean probability - share correct|; bins of equal width on [0,1], closed on
    the right, the first on both sides. probability: P(the verdict given) per row; correct: bool per row."""
    probability, correct = (torch.as_tensor(x, dtype=torch.float64) for x in (probability, correct))  # (B,) each
    index = torch.bucketize(probability, torch.arange(1, bins, dtype=torch.float64) / bins)  # (B,) in 0..bins-1, by inner edges
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, index, probability - correct)  # (bins,): rows in it * that difference
    return float(gaps.abs().sum() / max(1, len(index)))


def judge(model, processor, questions, image_root, style="critique", votes=1, temperature=0.0, max_new_tokens=512,
          batch_size=64, seed=0, describe="judge"):
    """Judgement rows in the order of questions (from both_orders): {id: the pair's, order, label, verdict, probability_a,
    critique, image}. votes > 1: majority over sampled critiques, mean P(A); a critique without verdict counts .5 there."""
    requests = [{"id": q["id"], "image": q.get("picture") or Path(image_root) / q["image"], "text": common.build_judge_prompt(
        q["prompt"], q["response_a"], q["response_b"], style)} for q in questions]
    with tqdm(total=len(requests), desc=describe, unit="row", dynamic_ncols=True, disable=None, file=sys.stdout) as bar:
        answers = common.sample(model, processor, requests, votes, temperature, max_new_tokens, seed, batch_size, bar)
    rows = []
    for question, samples in zip(questions, answers):
        log_odds = torch.tensor([s["log_odds"] or 0.0 for s in samples])  # (K,)
        n_a, n_b = (sum(s["verdict"] == side for s in samples) for side in "AB")
        probability_a = log_odds.sigmoid().mean().item()
        verdict = "A" if n_a > n_b else "B" if n_b > n_a else None if n_a == 0 else "A" if probability_a > 0.5 else "B"
        rows.append({"id": question["pair_id"], "order": question["order"], "image": question["image"], "label": question["label"],
                     "verdict": verdict, "probability_a": probability_a, "critique": samples[0]["text"]})
    return rows


def measure(rows):
    """accuracy_by_order plus Bradley-Terry loss (nats) and expected calibration error of judgement rows."""
    p = torch.tensor([row["probability_a"] for row in rows]).clamp(1e-6, 1 - 1e-6)  # (B,)
    label_is_a = torch.tensor([row["label"] == "A" for row in rows])  # (B,)
    given = [p if row["verdict"] == "A" else 1 - p if row["verdict"] == "B" else 0.5 for row, p in zip(rows, p.tolist())]
    return {**accuracy_by_order(rows), "bradley_terry_loss": bradley_terry_loss(p.logit(), label_is_a).mean().item(),
            "ece": expected_calibration_error(given, [row["verdict"] == row["label"] for row in rows])}


def validate(model, processor, pairs, folder, name, args):
    """Judge the validation pairs in both orders, print the line and one critique, keep both in folder -> measures."""
    rows = judge(model, processor, [q for pair in pairs for q in both_orders(pair)], args.image_root, args.style,
                 max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, describe=f"validation, {name}")
    result = measure(rows)
    print(f"validation, {name}: " + " | ".join(f"{k} {result[k]:.3f}" for k in (
        "accuracy", "both", "agreement", "bradley_terry_loss", "ece", "unparseable")) + f" | {result['n_pairs']} pairs")
    print(f"{rows[0]['image']}, label {rows[0]['label']}:\n{rows[0]['critique']}\n")
    common.write_json(folder / "validation.jsonl", rows)
    common.RowWriter(folder / "metrics.jsonl").write({"validation": name, **result})
    return result


# ---- Loading: what it will take is said before ----------------------------------------------------------------------
def inherit(args, stage, names):
    """Settings that must not change between stages come from the earlier stage's args.json; a contradiction is refused."""
    path = Path(args.run) / stage / "meta.json"
    if not path.exists():
        common.stop(f"{path} does not exist: {stage} is not complete; run its script first")
    earlier = json.loads(path.read_text())["args"]
    for name in names:
        if getattr(args, name) is not None and str(getattr(args, name)) != str(earlier[name]):
            common.stop(f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {stage}, which was made with {earlier[name]}")
        setattr(args, name, earlier[name])


def announce(model_path, device, task, flags, prepare=lambda blank: blank, processes=1):
    """Print what a model will take in each of the processes that share it; stop where the GPU has less free, naming flags to change.
    prepare(model without weights) adds or marks what is trained: four times its bytes, with gradient and AdamW's two moments."""
    try:
        with torch.device("meta"):
            blank = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model_path), dtype=common.pick_dtype(device))
    except (OSError, ValueError) as error:  # no such model, or not one that reads pictures and writes text
        common.stop(f"--model {model_path}: {str(error).splitlines()[0]}")
    weights = prepare(blank.requires_grad_(False)).parameters()
    gib = sum(w.nbytes * (4 if w.requires_grad else 1) for w in weights) / 2 ** 30 / processes
    n, trained = (blank.num_parameters(only_trainable=only) / 1e6 for only in (False, True))
    print(f"{task}: {n:.2f} M weights in {str(blank.dtype)[6:]}{f', {trained:.2f} M trained in float32' if trained else ''}; "
          f"{gib:.2f} GiB on {device.type}, {f'one of {processes} shares; whole layers and ' * (processes > 1)}activations not counted")
    if device.type == "cuda":  # what torch keeps of models that are gone is free as well
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if gib > free / 2 ** 30:
            common.stop(f"the GPU has {free / 2 ** 30:.2f} GiB free, {gib:.2f} GiB are needed before any activations: {flags}")


def load_judge(args, checkpoint=None, rank=None):
    """common.load_judge by a stage's arguments: announced, or with --endpoint (Endpoint, None), for common.sample alone; with a
    rank (see add_lora; 03 and 04) to be trained, which announce_training has announced."""
    if getattr(args, "endpoint", None) and rank is None:  # 04 imports this stage, hence not at the top
        return importlib.import_module("04_rejection_sampling").Endpoint(args, checkpoint), None
    device = common.pick_device(args.device)
    gc.collect()  # a sharded model that is gone holds itself
    if rank is None:
        announce(args.model, device, f"loading {args.model}{f' + {checkpoint}' if checkpoint else ''}",
                 "take a smaller --model, or end what else runs on it", processes=WORLD if args.shard else 1)
    mesh = torch.distributed.init_device_mesh(device.type, (WORLD,)) if args.shard else None

    def prepare(model):
        torch.manual_seed(args.seed)  # the adapter's first weights
        model = model if rank is None or hasattr(model, "get_base_model") else add_lora(model, rank)
        if args.shard:  # a layer is whole while it is used; of the model, what is in no layer
            layers = [part for part in model.modules() if type(part).__name__ in common.unwrap(model)._no_split_modules]
            for part in [*layers, model]:
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        return model

    for turn in range(WORLD if args.shard else 1):  # the host needs to hold one copy at a time
        if turn == RANK or not args.shard:
            loaded = common.load_judge(args.model, checkpoint, args.device, args.max_image_tokens, rank is not None, prepare)
        share_out([], None)
    return loaded


def announce_training(args, rank, rows):
    """Before loading: what will be trained on, and the memory for it; stops where the GPU has less. rows: in words."""
    if args.train_batch % WORLD:
        common.stop(f"--train-batch {args.train_batch} must be a multiple of the {WORLD} processes")
    print(f"training on {rows}; {args.steps} steps of {args.train_batch} critiques + as many correct answers, {args.micro_batch} at a time")
    announce(args.model, common.pick_device(args.device), f"training, {f'LoRA of rank {rank}' if rank else 'full'}, with gradients "
             "and AdamW state", "take a smaller --model or (in stage 03) --lora-rank; activations: --micro-batch, --max-image-tokens",
             lambda blank: add_lora(blank, rank), WORLD if args.shard else 1)


# ---- Training --------------------------------------------------------------------------------------------------------
def add_lora(model, rank):
    """PEFT model with fresh rank-r adapters on the language model's linear layers; rank 0: all of the language model's own
    weights. float32 in both cases (PEFT's default for adapters)."""
    from peft import LoraConfig, get_peft_model
    if rank:
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=common.LORA_TARGETS))
    for name, weight in model.named_parameters():
        if "language_model" in name or name.startswith("lm_head"):
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    return model


def training_rows(critiques):
    """(D_critique, D_correct) as rows {id, image, text, response} from critique rows; each pair's chosen response once."""
    judged = [{"id": row["id"], "image": row["image"], "label": row["label"], "response": row["critique"], "text":
               common.build_judge_prompt(row["prompt"], row["response_a"], row["response_b"], row["style"])} for row in critiques]
    correct = {row["pair_id"]: {"id": row["pair_id"], "image": row["image"], "text": row["prompt"],
                                "response": row["response_a" if row["label"] == "A" else "response_b"]} for row in critiques}
    return judged, list(correct.values())


def stream(rows, size, seed):
    """Batches of `size` rows forever, one shuffled epoch after another."""
    waiting = []
    for epoch in itertools.count():
        random.Random(row_seed(seed, "epoch", epoch)).shuffle(order := list(rows))
        waiting += order
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]


def micro_batches(rows, size):
    """The step's rows in micro-batches of like length, so that little is padding."""
    rows = sorted(rows, key=lambda row: len(row["text"]) + len(row["response"]))
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def encode_supervised(processor, texts, images, responses, max_response_tokens=None):
    """(inputs, labels): left-padded prompts (B, P), then the responses and their stop token, right-padded (B, R).
    labels (B, P+R) are -100 except on response and stop token: the language head can skip all but the last R+1 positions.
    A response cut at max_response_tokens has no stop token: it does not end there."""
    inputs, tokenizer = common.encode_prompts(processor, texts, images), processor.tokenizer
    rows = [tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for response in responses]
    rows = [torch.tensor(row[:max_response_tokens]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B, R)
    targets = pad(rows, batch_first=True, padding_value=-100)  # (B, R); by length, so pad = eos cannot mask the stop token
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), targets], 1)  # (B, P+R)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], (targets != -100).long()], 1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)  # 0 = text
    return inputs, labels


def forward(model, inputs, labels):
    """(logits (B,R+1,V), labels (B,R+1)): only the last R+1 positions hold supervised tokens (see encode_supervised), so
    only they pass the language head. The last prompt token is among them: it predicts the first response token."""
    keep = labels.shape[1] - int((labels != -100).any(0).nonzero()[0]) + 1
    return model(**inputs, logits_to_keep=keep, use_cache=False).logits, labels[:, -keep:]


def log_odds_of_verdict(logits, labels, tokenizer, verdict_ids):
    """r (B,) in nats at each response's verdict, teacher-forced. logits (B,R+1,V), labels (B,R+1)."""
    responses = [row[row != -100].tolist() for row in labels]
    at = torch.tensor([1 + common.find_verdict_token(tokenizer, ids)[2] for ids in responses])  # (B,): labels[:, 0] is prompt
    rows = torch.arange(len(labels))
    bare = torch.isin(labels[rows, at].cpu(), torch.tensor([ids[1] for ids in verdict_ids])).long()  # (B,): "A", not " A"
    ids_a, ids_b = (torch.tensor(ids)[bare].to(logits.device) for ids in verdict_ids)  # (B,) each
    return verdict_log_odds(logits[rows, at - 1], ids_a, ids_b)


def total(*numbers):
    """Each number's sum over all processes."""
    return [sum(column) for column in zip(*share_out(range(WORLD), lambda _: [numbers]))]


def backward(model, processor, parts, n, n_rows, lam, bt_weight):
    """Gradient of the step's loss from this process's parts = micro-batches (kind, inputs, labels, rows); n = {kind: tokens},
    n_rows: critiques, of the whole step -> ({kind: summed NLL}, summed Bradley-Terry loss) of the parts, for the log."""
    nll, bt_sum = dict.fromkeys(KINDS, 0.0), 0.0
    for kind, inputs, labels, rows in parts:
        model.require_backward_grad_sync = rows is parts[-1][-1]  # DistributedDataParallel exchanges gradients in the last alone
        logits, labels = forward(model, inputs, labels)
        sums = {**dict.fromkeys(KINDS, 0.0), kind: nll_sum(logits, labels)[0]}
        loss = ift_loss(sums["critique"], n["critique"], sums["correct"], n["correct"], lam)
        if kind == "critique" and bt_weight:
            label_is_a = torch.tensor([row["label"] == "A" for row in rows], device=logits.device)  # (B,)
            log_odds = log_odds_of_verdict(logits, labels, processor.tokenizer, common.verdict_token_ids(processor.tokenizer))
            bt = bradley_terry_loss(log_odds, label_is_a).sum()  # ()
            loss = loss + bt_weight * bt / n_rows
            bt_sum += bt.item()
        (loss * WORLD).backward()  # sharded or not, gradients are the processes' mean, but the step's loss is their sum
        nll[kind] += sums[kind].item()
    return nll, bt_sum


@contextlib.contextmanager
def activation_checkpointing(model, on):
    """Keep only each language model layer's input, compute the rest again in the backward pass: the same gradients, less memory."""
    layers = common.unwrap(model).model.language_model
    on = layers.device.type == "cuda" if on is None else on
    if on:
        layers.activation_checkpointing_enable()
    try:
        yield
    except torch.OutOfMemoryError:
        common.stop("out of memory in training: lower --micro-batch (the result stays the same) or, from stage 01 on, "
                    f"--max-image-tokens; --checkpoint-activations {'is on already' if on else 'saves more'}")
    if on:
        layers.activation_checkpointing_disable()
        layers.disable_input_require_grads()  # a hook on the embeddings that enabling has left there


def train(model, processor, judged, correct, folder, *, steps, lr, lam, bt_weight, batch_size, micro_batch, seed, image_root,
          max_response_tokens, checkpoint_activations=False):
    """Minimise L_IFT for `steps` optimizer steps of batch_size critiques and as many correct responses; in place.
    Writes one line a step to folder/metrics.jsonl. 04 trains with this same function."""
    device, own = common.unwrap(model).device, copy.deepcopy(processor)  # a tokenizer serves one thread at a time
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # linear up, then linear down to a tenth
        optimizer, lambda t: min((t + 1) / warmup, 1 - 0.9 * max(0, t - warmup) / max(1, steps - warmup)))
    print(f"{len(judged)} critiques, {len(correct)} correct responses: {steps * batch_size / len(judged):.1f} epochs of critiques")

    def encode(kind, rows):
        texts, images, responses = zip(*((row["text"], Path(image_root) / row["image"], row["response"]) for row in rows))
        inputs, labels = encode_supervised(own, texts, images, responses, max_response_tokens)
        return kind, inputs.to(device), labels.to(device), rows

    streams = [*zip(KINDS, [stream(rows, batch_size, seed) for rows in (judged, correct)[:2 if lam else 1]])]
    prepared = ([encode(kind, part) for kind, rows in streams for part in micro_batches(next(rows)[RANK::WORLD], micro_batch)]
                for _ in range(steps))  # of each step's rows every process takes its share
    model.train()
    parallel = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 and not isinstance(model, FSDPModule) else model
    started, n_total, log = time.time(), 0, common.RowWriter(folder / "metrics.jsonl")
    bar = tqdm(range(1, steps + 1), desc="train", unit="step", dynamic_ncols=True, disable=None, file=sys.stdout)
    with activation_checkpointing(model, checkpoint_activations), ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, prepared)
        for step in bar:
            parts, coming = coming.result(), pool.submit(next, prepared, None)  # a step ahead
            # Every token of the step weighs the same, so the counts must be known before the first backward.
            n = dict(zip(KINDS, total(*(sum(int((part[2] != -100).sum()) for part in parts if part[0] == kind) for kind in KINDS))))
            nll, bt_sum = backward(parallel, processor, parts, n, batch_size, lam, bt_weight)
            *nll, bt_sum = total(*(nll[kind] for kind in KINDS), bt_sum)
            grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            grad_norm = (grad_norm.full_tensor() if isinstance(model, FSDPModule) else grad_norm).item()
            if not math.isfinite(grad_norm):
                common.stop(f"step {step}: gradient norm {grad_norm}; rows {[r['id'] for *_, rows in parts for r in rows]}. Lower --lr")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            n_total += sum(n.values())
            critique, correct_nll = nll[0] / n["critique"], nll[1] / max(1, n["correct"])  # nats per token
            line = {"step": step, "loss": ift_loss(nll[0], n["critique"], nll[1], n["correct"], lam), "critique": critique,
                    "correct": correct_nll if lam else None, "bradley_terry": bt_sum / batch_size if bt_weight else None,
                    "grad_norm": grad_norm, "lr": schedule.get_last_lr()[0], "tokens_per_s": n_total / (time.time() - started)}
            log.write(line)
            if step % max(1, steps // 10) == 0:
                bar.write(f"step {step:>5}/{steps} | loss {line['loss']:.3f} | critique {critique:.3f} | correct {correct_nll:.3f} | "
                          f"bt {bt_sum / batch_size:.3f} | grad {grad_norm:.2f} | {line['tokens_per_s']:.0f} tok/s")
    model.eval()


# ---------------------------------------------------------------------------------------------------------------------
def add_training_arguments(add, steps, lr):
    """The arguments that 03 and 04 share."""
    add("--image-root", help="default: as in stage 01")
    add("--style", choices=tuple(common.INSTRUCTIONS), help="default: as in stage 02")
    add("--steps", type=int, default=steps, help="optimizer steps")
    add("--lr", type=float, default=lr, help="peak learning rate")
    add("--lam", type=float, default=1 / 3, help="lambda, weight of L_SFT on the correct responses")
    add("--bt-weight", type=float, default=0.0, help="weight of the Bradley-Terry loss on the verdict's log-odds")
    add("--train-batch", type=int, default=32, help="critiques, and as many correct responses, per optimizer step")
    add("--micro-batch", type=int, default=8, help="rows per forward and backward pass")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, help="less memory, a third slower; default: on cuda")
    add("--max-response-tokens", type=int, default=1024, help="longer correct responses are cut, longer critiques dropped")
    add("--max-new-tokens", type=int, default=512, help="longest critique written in validation")


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    parser.add_argument("--lora-rank", type=int, default=16, help="0: full fine-tuning of the language model")
    add_training_arguments(parser.add_argument, steps=300, lr=1e-4)
    return parser.parse_args(argv)


def main(args):
    inherit(args, "02_critiques", ("model", "max_image_tokens", "image_root", "style"))
    folder = start_stage(args, "03_ift")
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    run = Path(args.run)
    critiques = read_jsonl(run / "02_critiques" / "critiques.jsonl",
                           ("id", "pair_id", "image", "prompt", "response_a", "response_b", "label", "critique", "style"))
    validation = [pair for pair in read_jsonl(run / "01_preferences" / "preferences.jsonl", ("id", "chosen", "rejected", "split"))
                  if pair["split"] == "validation"]
    announce_training(args, args.lora_rank, f"{len(critiques)} critiques")
    model, processor = load_judge(args, rank=args.lora_rank)
    kept = drop_long(critiques, processor, args.max_response_tokens)
    judged, correct = training_rows(kept)
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # an interrupted training starts anew

    # 2. train ----------------------------------------------------------------------------------------------------
    before = validate(model, processor, validation, folder, "before", args)  # a fresh adapter changes nothing
    train(model, processor, judged, correct, folder, **training_settings(args))
    after = validate(model, processor, validation, folder, "after 03", args)

    # 3. save and report ------------------------------------------------------------------------------------------
    save_checkpoint(model, processor, folder)
    counts = {"critiques read": len(critiques), "dropped: longer than --max-response-tokens": len(critiques) - len(kept),
              "trained on": len(kept), "correct responses": len(correct), "validation pairs": len(validation)}
    finish_stage(folder, args, counts, [run / "02_critiques" / "critiques.jsonl"],
                 f"python 04_rejection_sampling.py --run {args.run}", validation={"before": before, "after": after})


def training_settings(args):
    return {"steps": args.steps, "lr": args.lr, "lam": args.lam, "bt_weight": args.bt_weight, "batch_size": args.train_batch,
            "micro_batch": args.micro_batch, "seed": args.seed, "image_root": args.image_root,
            "max_response_tokens": args.max_response_tokens, "checkpoint_activations": args.checkpoint_activations}


def drop_long(critiques, processor, max_response_tokens):
    """A critique cut before its verdict teaches nothing, so the too long ones are left out."""
    return [row for row in critiques if len(processor.tokenizer(row["critique"]).input_ids) < max_response_tokens] or common.stop(
        f"all {len(critiques)} critiques are longer than --max-response-tokens {max_response_tokens}: raise it")


def save_checkpoint(model, processor, folder):
    """adapter/ that PeftModel.from_pretrained loads, or model/ that AutoModelForImageTextToText.from_pretrained loads."""
    name, weights = "adapter" if hasattr(model, "get_base_model") else "model", None
    if isinstance(model, FSDPModule):  # all processes give their shares of one weight after another
        whole = ((key, w.full_tensor()) for key, w in model.named_parameters() if name == "model" or w.requires_grad)
        weights = {key: w.cpu() for key, w in whole if RANK == 0}
    if RANK == 0:
        model.save_pretrained(str(folder / name), state_dict=weights)
        if name == "model":
            processor.save_pretrained(str(folder / name))


if __name__ == "__main__":
    main(parse_args())
