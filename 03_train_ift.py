"""03  Teach the judge to write a critique and a verdict, while it keeps writing correct answers.

    L_IFT = L_SFT(D_critique) + lambda * L_SFT(D_correct)
    L_SFT = sum of NLL over response tokens / their number, both over the whole optimizer step
    D_critique: image, judge prompt without reference -> critique + verdict
    D_correct:  image, prompt -> chosen response

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) lambda = 1/3 by default, as in generative verifiers;
  2) the Bradley-Terry loss on the verdict's log-odds, -log sigmoid(+-r), is measured at each
     validation, and trained on only if asked (--bt-weight);
  3) the vision tower stays frozen, with LoRA and with full fine-tuning (--lora-rank 0) alike;
  4) what is trained is float32, also where the rest is bf16, which would round most updates away.

Reads  02_critiques/critiques.jsonl; 01_preferences/preferences.jsonl (split "validation").
Writes 03_ift/adapter/ (plain PEFT; model/ with --lora-rank 0), validation.jsonl and critiques.png
       (judgements before and after), until it is done training.safetensors (from which an
       interrupted training goes on), and metrics.jsonl, one line for each step, such as
    {"step": 1, "loss": 0.1839, "loss_critique": 0.1032, "loss_correct": 0.2422,
     "bradley_terry": null, "grad_norm": 0.3713, "lr": 0.0004286, "tokens_per_s": 1923.7}

    python 03_train_ift.py --run runs/demo --steps 150 --lr 3e-3
    python 03_train_ift.py                                       # one GPU
"""

import argparse
import copy
import importlib
import math
import random
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import common
from common import RANK, WORLD, RowWriter, both_orders, build_judge_prompt, read_jsonl, row_seed

two = importlib.import_module("02_generate_critiques")

# Every linear layer of the language model, and of nothing else: attention, linear attention, MLP.
LORA_TARGETS = r".*language_model\.layers\.\d+\..*_proj\w*"


# ---- The losses ----------------------------------------------------------------------------------
def nll_sum(logits, labels):
    """Summed negative log-likelihood () in nats of the supervised tokens, and their number () int.

    logits (B,T,V) any float; labels (B,T) int, -100 where a token is not supervised.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]  # position t predicts token t+1
    logits = logits.transpose(1, 2)  # (B,V,T-1), as cross_entropy wants it beside labels (B,T-1)
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")  # ()
    return nll, (labels != -100).sum()


def ift_loss(nll_critique, n_critique, nll_correct, n_correct, lam):
    """L_IFT = nll_critique / n_critique + lam * nll_correct / n_correct, in nats per token.

    nll_*: NLL () summed over the response tokens of a whole optimizer step; n_*: their number.
    At lam = 0, n_correct may be 0.
    """
    loss = nll_critique / n_critique
    return loss + lam * nll_correct / n_correct if lam else loss


def bradley_terry_loss(log_odds, label_is_a):
    """-log P(label) = -log sigmoid(+-r) per example (B,) in nats.

    log_odds: r = log P(A) - log P(B) in nats (B,); label_is_a (B,) bool.
    """
    # softplus(-x) = -log sigmoid(x)
    return F.softplus(torch.where(label_is_a, -log_odds, log_odds))


# ---- What is trained on, and what of it is supervised --------------------------------------------
def training_rows(critiques):
    """(D_critique, D_correct) as rows {id, image, text, response} from critique rows.

    Each pair's chosen response enters D_correct once, however many critiques the pair has.
    """
    judged, correct = [], {}
    for row in critiques:
        a, b = row["response_a"], row["response_b"]
        text = build_judge_prompt(row["prompt"], a, b, row["style"])
        judged.append({"id": row["id"], "image": row["image"], "text": text})
        judged[-1] |= {"response": row["critique"], "label": row["label"]}
        chosen = {"id": row["pair_id"], "image": row["image"], "text": row["prompt"]}
        correct[row["pair_id"]] = {**chosen, "response": a if row["label"] == "A" else b}
    return judged, list(correct.values())


def rows_of_step(rows, step, size, seed):
    """The rows of optimizer step `step` (from 0): shuffled epochs, one after another, cut."""
    chosen = []
    for place in range(step * size, (step + 1) * size):
        epoch, k = divmod(place, len(rows))
        if k == 0 or not chosen:  # an epoch begins, or the step begins within one
            shuffled = list(rows)
            random.Random(row_seed(seed, "epoch", epoch)).shuffle(shuffled)
        chosen.append(shuffled[k])
    return chosen


def encode_supervised(processor, texts, images, responses, max_response_tokens=None):
    """(inputs, labels): left-padded prompts (B,P), then right-padded responses (B,R).

    labels (B,P+R) are -100 except on a response and its stop token. A response that is cut at
    max_response_tokens has no stop token: it does not end there.
    """
    inputs, tokenizer = common.encode_prompts(processor, texts, images), processor.tokenizer
    rows = []
    for response in responses:
        response = common.as_words(response, tokenizer)
        ids = tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        rows.append(torch.tensor(ids[:max_response_tokens]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B,R)
    # By length, not by token: a stop token that is the padding token as well stays supervised.
    targets = pad(rows, batch_first=True, padding_value=-100)  # (B,R)
    masked = torch.full_like(inputs["input_ids"], -100)  # (B,P): prompt and image tokens
    added = {
        "input_ids": ids,
        "attention_mask": (targets != -100).long(),
        "mm_token_type_ids": torch.zeros_like(ids),  # 0 = text
    }
    for name, columns in added.items():
        inputs[name] = torch.cat([inputs[name], columns], 1)  # (B,P+R)
    return inputs, torch.cat([masked, targets], 1)


class TrainingSteps:
    """Step k -> its micro-batches [(kind, rows, inputs, labels)], read and encoded; kind is
    "critique" or "correct".

    Each step stands for itself, so that another thread can prepare it and training can go on at any
    step. A step holds train_batch critiques and, if lam > 0, as many correct responses; of
    several processes each takes its share of them.
    """

    def __init__(
        self,
        critiques,
        processor,
        image_root,
        *,
        lam,
        train_batch,
        micro_batch,
        max_response_tokens,
        seed,
    ):
        judged, correct = training_rows(critiques)
        self.rows_of_kind = {"critique": judged}
        if lam:
            self.rows_of_kind["correct"] = correct
        self.processor, self.image_root, self.seed = processor, Path(image_root), seed
        self.train_batch, self.micro_batch = train_batch, micro_batch
        self.max_response_tokens = max_response_tokens

    def __getitem__(self, step):
        encoded = []
        for kind, all_rows in self.rows_of_kind.items():
            rows = rows_of_step(all_rows, step, self.train_batch, self.seed)[RANK::WORLD]
            rows.sort(key=lambda row: len(row["text"]) + len(row["response"]))  # little padding
            for start in range(0, len(rows), self.micro_batch):
                part = rows[start : start + self.micro_batch]
                encoded.append((kind, part, *self.encode(part)))
        return encoded

    def encode(self, rows):
        """(inputs, labels) of one micro-batch."""
        texts, responses = [row["text"] for row in rows], [row["response"] for row in rows]
        images = [self.image_root / row["image"] for row in rows]
        limit = self.max_response_tokens
        inputs, labels = encode_supervised(self.processor, texts, images, responses, limit)
        return dict(inputs), labels


# ---- The loop: rows, count, forward, loss, backward, step, log -----------------------------------
def forward(model, inputs, labels):
    """(logits (B,R+1,V), labels (B,R+1)): the language head sees the last R+1 positions alone.

    Only they hold supervised tokens, or predict the first of them, as the last prompt token does.
    """
    first = int((labels != -100).any(0).nonzero()[0])  # place of the first response token
    keep = labels.shape[1] - first + 1  # R+1
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    return logits, labels[:, -keep:].to(logits.device)


def bradley_terry_sum(logits, labels, rows, tokenizer):
    """Summed Bradley-Terry loss () of critiques, at each one's verdict, teacher-forced.

    logits (B,R+1,V) and labels (B,R+1) as forward gives them; rows: {"label", ...}, B of them.
    """
    verdict_ids = common.verdict_token_ids(tokenizer)
    r = []
    for row_logits, row_labels in zip(logits, labels):  # (R+1,V), (R+1,)
        ids = row_labels[row_labels != -100].tolist()
        _, _, place, spelling = common.find_verdict_token(tokenizer, ids, verdict_ids)
        id_a, id_b = verdict_ids[0][spelling], verdict_ids[1][spelling]
        # logits[0] are at the last prompt token, so logits[k] predict ids[k]
        r.append(common.verdict_log_odds(row_logits[place][None], id_a, id_b))  # (1,)
    label_is_a = torch.tensor([row["label"] == "A" for row in rows], device=logits.device)  # (B,)
    return bradley_terry_loss(torch.cat(r), label_is_a).sum()


def make_trainable(model, rank):
    """PEFT model with fresh rank-r adapters on the language model's linear layers.

    Rank 0: the model itself with all of the language model's own weights trainable. float32 in
    both cases (PEFT's default for adapters).
    """
    if rank:
        from peft import LoraConfig, get_peft_model  # slow to import

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)
        return get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "language_model" in name or name.startswith("lm_head"):
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    return model


def total(numbers):
    """Each number's sum over all processes."""
    return [sum(column) for column in zip(*common.gather(list(numbers)))]


def learning_rate(step, steps, lr):
    """Of a step from 0: linear warm-up in a twentieth of the steps, linear decay to a tenth."""
    warmup = max(1, steps // 20)
    fallen = 0.9 * max(0, step - warmup) / max(1, steps - warmup)
    return lr * min((step + 1) / warmup, 1 - fallen)


def count_supervised(micro_batches):
    """(supervised tokens of critiques, of correct responses)."""
    n = {"critique": 0, "correct": 0}
    for kind, _, _, labels in micro_batches:
        n[kind] += int((labels != -100).sum())
    return n["critique"], n["correct"]


def check_finite(grad_norm, step, micro_batches):
    """Stop at a gradient that is nan or infinite, and name the step's rows."""
    if math.isfinite(grad_norm):
        return
    ids = []
    for _, rows, _, _ in micro_batches:
        ids += [row["id"] for row in rows]
    common.stop(f"step {step + 1}: gradient norm {grad_norm} on rows {ids}; lower --lr")


def prepared_ahead(data, steps):
    """(step, its micro-batches) of a range; a second thread reads and encodes, two steps ahead."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        futures = [thread.submit(data.__getitem__, step) for step in steps[:2]]
        for step in steps:
            if step + 2 in steps:
                futures.append(thread.submit(data.__getitem__, step + 2))
            yield step, futures.pop(0).result()


def save_training(path, n_steps, weights, optimizer):
    """All that training changes, after n_steps: {name: weight} and AdamW's state of each weight,
    which is its step and two moving averages. Whole or not at all.
    """
    if RANK != 0:
        return
    state = {"n_steps": torch.tensor(n_steps)}
    for name, weight in weights.items():
        state[name] = weight.data
        for part, value in optimizer.state[weight].items():
            state[f"{name}/{part}"] = value
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    partial.replace(path)


def resume_training(path, weights, optimizer):
    """Set weights and optimizer, in place, to what save_training has saved; returns n_steps, or 0
    where there is no such file.
    """
    if not path.exists():
        return 0
    state = load_file(path)
    n_steps = int(state.pop("n_steps"))
    for key, value in state.items():
        name, _, part = key.partition("/")
        if not part:
            weights[name].data.copy_(value)
        else:  # AdamW keeps its step on the CPU
            device = "cpu" if part == "step" else weights[name].device
            optimizer.state[weights[name]][part] = value.to(device)
    print(f"training goes on after step {n_steps}")
    return n_steps


def show(bar, line, steps):
    """Move the bar by a step; every tenth part of them leaves its line on the screen."""
    bar.update()
    if line["step"] % max(1, steps // 10) == 0:
        names = ("loss", "loss_critique", "loss_correct", "bradley_terry")
        numbers = [f"{name} {line[name]:.4g}" for name in names if line[name] is not None]
        bar.write(f"step {line['step']:>5}/{steps} | {' | '.join(numbers)}")


def recompute_activations(language_model):
    """In training each layer keeps its input alone, and computes the rest again when needed."""
    language_model.activation_checkpointing_enable()
    language_model.disable_input_require_grads()  # enabling also hooks the embeddings: no need here


def forget_training(folder):
    """Delete what save_training left: the trained model is safe, and all that depends on it."""
    if RANK == 0:
        (folder / "training.safetensors").unlink(missing_ok=True)


def train(model, data, folder, *, steps, lr, lam, bt_weight, checkpoint_activations, save_every):
    """Minimise L_IFT on data (a TrainingSteps) for `steps` optimizer steps, in place (03, 04).

    folder gets metrics.jsonl, one line a step, and, every save_every steps and at the end,
    training.safetensors, from which an interrupted training goes on.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, weight_decay=0.0)
    checkpoint = folder / "training.safetensors"
    done = resume_training(checkpoint, weights, optimizer)
    device = common.unwrap(model).device
    tokenizer = copy.deepcopy(data.processor.tokenizer)  # the other thread is using that one
    parallel = torch.nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    if checkpoint_activations:
        recompute_activations(common.unwrap(model).model.language_model)
    log = RowWriter(folder / "metrics.jsonl", key=("step", "validation"))
    bar = common.progress_bar(steps, "train", "step", done)
    started, n_total = time.time(), 0
    model.train()
    for step, micro_batches in prepared_ahead(data, range(done, steps)):
        # Every token of the step weighs the same, so they are counted before the first backward.
        n_critique, n_correct = total(count_supervised(micro_batches))
        sums = {"critique": 0.0, "correct": 0.0, "bradley_terry": 0.0}  # in nats, for the log
        for i, (kind, rows, inputs, labels) in enumerate(micro_batches):
            # Several processes exchange their gradients once, after the step's last micro-batch.
            # (Without DistributedDataParallel nobody reads this.)
            parallel.require_backward_grad_sync = i + 1 == len(micro_batches)
            inputs = {name: x.to(device) for name, x in inputs.items()}
            logits, labels = forward(parallel, inputs, labels)  # (B,R+1,V), (B,R+1)
            nll, _ = nll_sum(logits, labels)  # ()
            sums[kind] += nll.item()
            # This micro-batch's part of ift_loss: the parts of a step add up to it.
            if kind == "correct":
                loss = lam * nll / n_correct
            else:
                loss = nll / n_critique
                if bt_weight:
                    bt = bradley_terry_sum(logits, labels, rows, tokenizer)  # ()
                    sums["bradley_terry"] += bt.item()
                    loss = loss + bt_weight * bt / data.train_batch
            (loss * WORLD).backward()  # processes average gradients, but the loss is their sum
        grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).item()
        check_finite(grad_norm, step, micro_batches)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
        optimizer.step()
        optimizer.zero_grad()
        n_total += n_critique + n_correct
        nll_critique, nll_correct, bt_sum = total(sums.values())
        line = {
            "step": step + 1,
            # L_IFT, without the Bradley-Terry part, which has a column of its own
            "loss": ift_loss(nll_critique, n_critique, nll_correct, n_correct, lam),
            "loss_critique": nll_critique / n_critique,  # nats per token
            "loss_correct": nll_correct / n_correct if lam else None,
            "bradley_terry": bt_sum / data.train_batch if bt_weight else None,
            "grad_norm": grad_norm,
            "lr": learning_rate(step, steps, lr),
            "tokens_per_s": n_total / (time.time() - started),
        }
        log.write(line)
        show(bar, line, steps)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_training(checkpoint, step + 1, weights, optimizer)
    bar.close()
    model.eval()


def save_checkpoint(model, processor, folder):
    """folder/adapter/ for PeftModel, or model/ of a full fine-tuning; whole or not at all."""
    is_adapter = hasattr(model, "get_base_model")
    target = folder / ("adapter" if is_adapter else "model")
    partial = target.with_suffix(".partial")
    if RANK == 0:
        model.save_pretrained(str(partial))
        if not is_adapter:
            processor.save_pretrained(str(partial))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    common.barrier()


# ---- Judging and validation ----------------------------------------------------------------------
def decide(samples):
    """(verdict, probability_a in [0,1]) of K answers to a question: their majority, mean P(A).

    An answer without a verdict counts .5 in the mean and nothing in the majority. The verdict is
    None where no answer has one; where the votes are even, the mean decides.
    """
    log_odds = torch.tensor([answer["log_odds"] or 0.0 for answer in samples])  # (K,)
    probability_a = log_odds.sigmoid().mean().item()
    n_a = sum(answer["verdict"] == "A" for answer in samples)
    n_b = sum(answer["verdict"] == "B" for answer in samples)
    if n_a == n_b == 0:
        return None, probability_a
    if n_a == n_b:
        return "A" if probability_a > 0.5 else "B", probability_a
    return "A" if n_a > n_b else "B", probability_a


def judge(
    model, processor, questions, writer, condition, *, image_root, style, votes=1, **sampling
):
    """Judgement rows of questions (from both_orders), in their order, by `votes` critiques each.

    They are kept as they come by writer, a RowWriter with the key ("condition", "question"), and
    taken from there where an interrupted run left them. A question's "picture" (PIL or path), if
    there is one, is shown instead of its image. sampling: as for common.sample, but greedy unless
    it says otherwise.
    """
    sampling = {"temperature": 0.0, **sampling}

    def is_judged(question):
        return writer.is_done({"condition": condition, "question": question["id"]})

    size = max(1, common.CHUNK // votes)
    for chunk, bar in common.in_chunks(questions, is_judged, size, f"judge, {condition}"):
        requests = []
        for q in chunk:
            text = build_judge_prompt(q["prompt"], q["response_a"], q["response_b"], style)
            image = q.get("picture") or Path(image_root) / q["image"]
            requests.append({"id": q["id"], "image": image, "text": text})
        answers = common.sample(model, processor, requests, votes, bar=bar, **sampling)
        for q, samples in zip(chunk, answers):
            row = {"id": q["pair_id"], "question": q["id"], "condition": condition}
            row |= {name: q.get(name) for name in ("order", "image", "category", "label")}
            row["verdict"], row["probability_a"] = decide(samples)
            writer.write({**row, "critique": samples[0]["text"]})
    found = {row["question"]: row for row in writer.rows if row["condition"] == condition}
    return [found[question["id"]] for question in questions]


def accuracy_by_order(rows):
    """{"accuracy": mean over orders, "accuracy_<order>", "both": right in both orders, "agreement":
    the same response wins in both, "unparseable": no verdict, "n_pairs"}; shares in [0,1].

    rows: {"id" of the pair, "order", "label", "verdict": "A" | "B" | None}, one per pair and order.
    No verdict counts as wrong and as no agreement.
    """
    of_order, of_pair = {}, {}
    for row in rows:
        right = row["verdict"] == row["label"]
        of_order.setdefault(row["order"], []).append(right)
        of_pair.setdefault(row["id"], []).append(None if row["verdict"] is None else right)
    result = {"accuracy": 0.0}
    for order in sorted(of_order):
        result[f"accuracy_{order}"] = sum(of_order[order]) / len(of_order[order])
        result["accuracy"] += result[f"accuracy_{order}"] / len(of_order)
    both = [all(found) for found in of_pair.values()]
    same = [None not in found and len(set(found)) == 1 for found in of_pair.values()]
    missing = [row["verdict"] is None for row in rows]
    result["both"], result["agreement"] = sum(both) / len(both), sum(same) / len(same)
    return {**result, "unparseable": sum(missing) / len(missing), "n_pairs": len(of_pair)}


def mean_bradley_terry(rows):
    """Mean Bradley-Terry loss in nats of judgement rows {"probability_a", "label"}."""
    p = torch.tensor([row["probability_a"] for row in rows]).clamp(1e-6, 1 - 1e-6)  # (B,)
    label_is_a = torch.tensor([row["label"] == "A" for row in rows])  # (B,)
    return bradley_terry_loss(p.logit(), label_is_a).mean().item()


def validate(model, processor, pairs, folder, name, **judging):
    """Judge the validation pairs in both orders; print and keep how well, and show one critique.

    judging: image_root, style, max_new_tokens, batch_size of judge. -> the measures, {} without
    pairs.
    """
    if not pairs:
        print(f"validation, {name}: none, since stage 01 was told --validation 0")
        return {}
    writer = RowWriter(folder / "validation.jsonl", key=("condition", "question"))
    questions = []
    for pair in pairs:
        questions += both_orders(pair)
    rows = judge(model, processor, questions, writer, name, **judging)
    result = {**accuracy_by_order(rows), "bradley_terry_loss": mean_bradley_terry(rows)}
    names = ("accuracy", "both", "agreement", "bradley_terry_loss", "unparseable")
    numbers = [f"{measure} {result[measure]:.3f}" for measure in names]
    print(f"validation, {name}: {' | '.join(numbers[:3])}")
    print(f"    {' | '.join(numbers[3:])} | {len(pairs)} pairs")
    print(f"{rows[0]['image']}, label {rows[0]['label']}:\n{rows[0]['critique']}\n")
    log = RowWriter(folder / "metrics.jsonl", key=("step", "validation"))
    log.write({"validation": name, **result})
    return result


def paired_gain(before, after):
    """(mean, half-width of its 95 % interval) of the gain in accuracy between two judges.

    before, after: judgement rows {"question", "image", "label", "verdict"} of the same questions.
    Interval: 1.96 standard errors over images, whose questions succeed and fail together. Needs:
    mean, stdev (of statistics)

    >>> wrong = [{"question": k, "image": k, "label": "A", "verdict": None} for k in "pq"]
    >>> paired_gain(wrong, [{**row, "verdict": "A"} for row in wrong])
    (1.0, 0.0)
    """
    was_right = {row["question"]: row["verdict"] == row["label"] for row in before}
    gains_of = {}  # {image: of each of its questions -1, 0 or 1}
    for row in after:
        gain = (row["verdict"] == row["label"]) - was_right[row["question"]]
        gains_of.setdefault(row["image"], []).append(gain)
    gains = [mean(of_image) for of_image in gains_of.values()]
    half = 1.96 * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return float(mean(gains)), half


def report_gain(before, after, why_none):
    """Says what a training has gained on the validation pairs, or that it has gained nothing."""
    if not after or {row["question"] for row in before} != {row["question"] for row in after}:
        return
    gain, half = paired_gain(before, after)
    n = len(after) // 2
    print(f"gain in accuracy on {n} validation pairs: {gain:+.3f} (95 % +-{half:.3f})")
    if gain < -half:
        print("warning: the judge has become worse: lower --lr or --steps")
    elif gain <= half:
        print(f"warning: no gain beyond its interval: {why_none}")


def share_following(rows):
    """(share of the critiques whose verdict is that of their own checks, number of those whose
    checks decide between the responses); (None, 0) without any. rows: {"critique", "verdict"}.
    """
    follows = []
    for row in rows:
        better = two.verdict_of_checks(common.parse_checks(row["critique"]))
        if better is not None:
            follows.append(row["verdict"] == better)
    return (float(mean(follows)), len(follows)) if follows else (None, 0)


def report_following(rows):
    """Says how often the verdict follows the checks: the loss may fall while it ignores them."""
    share, n = share_following(rows)
    if n:
        print(f"the verdict follows the checks in {share:.0%} of {n} critiques")
    if n and share < 0.85:
        print("warning: the verdict does not read the checks: try --bt-weight 1")


def read_validation(folder, is_before=False):
    """Rows of the validation after the folder's training, or before stage 03's; [] without any."""
    path = folder / "validation.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    return [row for row in rows if (row["condition"] == "before") == is_before]


def draw_critiques(path, pairs, before, after, image_root):
    """Up to four questions that the judge before got wrong and the judge after right, with what
    both have written; before, after: judgement rows in the order of the pairs' questions.
    """
    questions, cards = {}, []
    for pair in pairs:
        questions |= {question["id"]: question for question in both_orders(pair)}
    for was, now in zip(before, after):
        if was["verdict"] != was["label"] and now["verdict"] == now["label"]:
            asked = questions[now["question"]]
            lines = [f"A: {asked['response_a']}", f"B: {asked['response_b']}"]
            for name, row in (("before", was), ("after", now)):
                lines += ["", f"{name}:", *row["critique"].splitlines()[:20]]
            cards.append({"image": Path(image_root) / now["image"], "lines": lines})
    if cards:
        common.draw_cards(path, cards[:4], 4)


# ---- Arguments and main --------------------------------------------------------------------------
def wrong_verdict(row):
    """None for a critique to train on; else (field, what is wrong with it) for read_jsonl."""
    verdict = common.parse_verdict(row["critique"])
    if verdict == row["label"]:
        return None
    return "critique", f"its verdict, {verdict}, is not the label, {row['label']}"


def read_critiques(run):
    """Stage 02's critiques (03, 04)."""
    source = Path(run) / "02_critiques" / "critiques.jsonl"
    fields = ("id", "pair_id", "image", "prompt", "response_a", "response_b", "label", "critique")
    return read_jsonl(source, (*fields, "style"), wrong_verdict)


def add_training_arguments(parser, steps, lr):
    """The arguments that 03 and 04 share."""
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=steps, help="optimizer steps")
    add("--lr", type=float, default=lr, help="peak learning rate")
    add("--lam", type=float, default=1 / 3, help="lambda, weight of the correct responses' loss")
    add("--bt-weight", type=float, default=0.0, help="of the verdicts' Bradley-Terry loss")
    add("--train-batch", type=int, default=32, help="critiques, and correct responses, per step")
    add("--micro-batch", type=int, default=8, help="rows per forward and backward pass")
    add("--save-every", type=int, default=50, help="steps: what an interruption costs at most")
    add(
        "--checkpoint-activations",
        action=argparse.BooleanOptionalAction,
        help="less memory, a third slower; on where it is cuda",
    )
    add(
        "--max-response-tokens",
        type=int,
        default=1024,
        help="longer critiques are dropped, answers cut",
    )
    add("--max-new-tokens", type=int, default=512, help="tokens of a critique that is written")


def check_train_batch(train_batch):
    """Stops, before any work, where the processes cannot share a step evenly."""
    if train_batch % WORLD:
        common.stop(
            f"--train-batch {train_batch} is no multiple of the {WORLD} processes: take another "
            "--nproc-per-node, or another --train-batch"
        )


def training_steps(critiques, processor, image_root, seed, args):
    """(TrainingSteps, counts) of critique rows, by the arguments above.

    A critique cut before its verdict teaches nothing: too long ones are dropped, and counted.
    """
    limit, tokenizer = args.max_response_tokens, processor.tokenizer

    def is_long(text):
        text = common.as_words(text, tokenizer)
        return len(tokenizer(text, add_special_tokens=False).input_ids) >= limit

    kept = [row for row in critiques if not is_long(row["critique"])]
    if not kept:
        common.stop(f"all critiques are longer than --max-response-tokens {limit}: raise it")
    names = ("lam", "train_batch", "micro_batch", "max_response_tokens")
    settings = {name: getattr(args, name) for name in names}
    data = TrainingSteps(kept, processor, image_root, seed=seed, **settings)
    correct = data.rows_of_kind.get("correct", [])
    epochs = args.steps * args.train_batch / len(kept)
    print(f"{args.steps} steps of {args.train_batch} critiques: {epochs:.1f} epochs of {len(kept)}")
    counts = {
        "dropped: critique of --max-response-tokens or more": len(critiques) - len(kept),
        "trained on, critiques": len(kept),
        "trained on, correct responses": len(correct),
        "  cut at --max-response-tokens": sum(is_long(row["response"]) for row in correct),
    }
    return data, counts


def training_settings(args):
    """What train takes of the arguments above."""
    on_gpu = common.pick_device(args.device).type == "cuda"
    chosen = args.checkpoint_activations
    names = ("steps", "lr", "lam", "bt_weight", "save_every")
    settings = {name: getattr(args, name) for name in names}
    return {**settings, "checkpoint_activations": on_gpu if chosen is None else chosen}


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument_group("the model").add_argument
    add("--lora-rank", type=int, default=16, help="of the adapter; 0: full fine-tuning")
    add_training_arguments(parser, steps=300, lr=1e-4)
    return parser.parse_args(argv)


def main(args):
    check_train_batch(args.train_batch)
    first = common.args_of(args.run, "01_preferences", "model", "image_root")
    style = common.args_of(args.run, "02_critiques", "style")["style"]
    inputs = common.files_of(args.run, "01_preferences", "preferences.jsonl")
    inputs += common.files_of(args.run, "02_critiques", "critiques.jsonl")
    folder = common.start_stage(args, "03_ift", inputs)
    if folder is None:
        return

    # 1. load --------------------------------------------------------------------------------------
    critiques = read_critiques(args.run)
    validation = common.read_preferences(args.run, "validation")
    model, processor = common.load_judge(
        first["model"], device=args.device, max_image_tokens=first.get("max_image_tokens")
    )
    torch.manual_seed(args.seed)  # of the adapter's first weights
    model = make_trainable(model, args.lora_rank)
    data, counts = training_steps(critiques, processor, first["image_root"], args.seed, args)

    # 2. train -------------------------------------------------------------------------------------
    judging = {"image_root": first["image_root"], "style": style, "batch_size": args.batch_size}
    judging["max_new_tokens"] = args.max_new_tokens
    before = validate(model, processor, validation, folder, "before", **judging)
    train(model, data, folder, **training_settings(args))
    save_checkpoint(model, processor, folder)
    after = validate(model, processor, validation, folder, "after 03", **judging)
    judged = [read_validation(folder, is_before) for is_before in (True, False)]
    picture = folder / "critiques.png"
    common.draw(draw_critiques, picture, validation, *judged, first["image_root"])
    report_gain(*judged, "try more --steps, or --bt-weight 1")
    report_following(judged[1])

    # 3. report ------------------------------------------------------------------------------------
    counts = {"critiques read": len(critiques), **counts, "validation pairs": len(validation)}
    next_command = f"python 04_rejection_sampling.py --run {shlex.quote(args.run)}"
    measures = {"validation": {"before": before, "after": after}}
    common.finish_stage(folder, args, counts, (), next_command, **measures)
    forget_training(folder)


if __name__ == "__main__":
    common.run(main, parse_args())
