"""03  Teach the judge to write a critique and a verdict, while it keeps writing correct answers.

    L_IFT = L_SFT(D_critique) + lambda * L_SFT(D_correct)
    L_SFT = sum of NLL over response tokens / their number, both over the whole optimizer step
    D_critique: image, judge prompt without reference -> critique + verdict
    D_correct:  image, prompt -> chosen response

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) lambda = 1/3 by default, as in generative verifiers;
  2) the Bradley-Terry loss on the verdict's log-odds, -log sigmoid(+-r), is measured at each
     validation, and trained on only if asked (--bt-weight): on single critiques, an upper bound
     (Jensen) of the loss on their mean, whose gradient arXiv 2510.15242 estimates;
  3) the vision tower stays frozen, with LoRA and with full fine-tuning (--lora-rank 0) alike;
  4) what is trained is float32, also where the rest is bf16, which would round most updates away.

Reads  02_critiques/critiques.jsonl; 01_preferences/preferences.jsonl (split "validation").
Writes 03_ift[_TAG]/: adapter/ (plain PEFT; model/ at --lora-rank 0) with made_with.json, README.md;
       answers.jsonl, validation.jsonl (judgements before and after); until it is done training.pt,
       from which an interrupted training goes on; metrics.jsonl, a line for each step, such as
    {"step": 1, "loss": 0.1839, "loss_critique": 0.1032, "loss_correct": 0.2422,
     "bradley_terry": null, "grad_norm": 0.3713, "lr": 0.0004286}

    python 03_train_ift.py --run runs/demo --steps 150 --lr 3e-3
    python 03_train_ift.py                                       # one GPU
"""

import argparse
import copy
import math
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
from common import RANK, WORLD, both_orders, build_judge_prompt, real, row_seed, stop, whole

# Every linear layer of the language model, and of nothing else: attention, linear attention, MLP.
LORA_TARGETS = r".*language_model\.layers\.\d+\..*_proj\w*"


# ---- The losses ----------------------------------------------------------------------------------
def nll_sum(logits, labels):
    """Summed negative log-likelihood () in nats of the supervised tokens, and their number () int.

    logits (B,T,V) any float; labels (B,T) int, -100 where a token is not supervised. Needs: F"""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]  # position t predicts token t+1
    logits = logits.transpose(1, 2)  # (B,V,T-1), as cross_entropy wants it beside labels (B,T-1)
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")  # ()
    return nll, (labels != -100).sum()


def ift_loss(nll_critique, n_critique, nll_correct, n_correct, lam):
    """L_IFT = nll_critique / n_critique + lam * nll_correct / n_correct, in nats per token.

    nll_*: NLL () summed over the response tokens of a whole optimizer step; n_*: their number.
    At lam = 0, n_correct may be 0."""
    loss = nll_critique / n_critique
    return loss + lam * nll_correct / n_correct if lam else loss


def bradley_terry_loss(log_odds, label_is_a):
    """-log P(label) = -log sigmoid(+-r) per example (B,) in nats.

    log_odds: r = log P(A) - log P(B) in nats (B,); label_is_a (B,) bool. Needs: F"""
    # softplus(-x) = -log sigmoid(x)
    return F.softplus(torch.where(label_is_a, -log_odds, log_odds))


# ---- What is trained on, and what of it is supervised --------------------------------------------
def training_rows(critiques):
    """{"critique": D_critique, "correct": D_correct}: rows {id, image, text, response, label}.

    Each pair's chosen response enters D_correct once, however many critiques the pair has."""
    critique_rows, correct = [], {}
    for row in critiques:
        a, b, label = row["response_a"], row["response_b"], row["label"]
        shared = {"image": row["image"], "label": label}
        text = build_judge_prompt(row["prompt"], a, b, row["style"])
        critique_rows.append({"id": row["id"], "text": text, "response": row["critique"], **shared})
        chosen = a if label == "A" else b
        key = row["pair_id"]
        correct[key] = {"id": key, "text": row["prompt"], "response": chosen, **shared}
    return {"critique": critique_rows, "correct": list(correct.values())}


def rows_of_step(rows, step, size, seed):
    """The rows of optimizer step `step` (from 0): shuffled epochs in a row, cut into steps."""
    epoch, start = divmod(step * size, len(rows))  # the step starts in this epoch, at this row
    epochs = []
    while len(epochs) < start + size:  # a step may end in a later one
        shuffled = list(rows)
        random.Random(row_seed(seed, "epoch", epoch)).shuffle(shuffled)
        epochs += shuffled
        epoch += 1
    return epochs[start : start + size]


def response_ids(response, tokenizer):
    """A response's token ids, without a stop token; nothing in it becomes a special token."""
    text = common.as_words(response, tokenizer)
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_supervised(processor, texts, images, responses, max_response_tokens=None):
    """(inputs, labels): left-padded prompts (B,P), then right-padded responses (B,R).

    labels (B,P+R) are -100 except on a response and its stop token. A response that is cut at
    max_response_tokens has no stop token: it does not end there."""
    inputs = common.encode_prompts(processor, texts, images)
    tokenizer = processor.tokenizer
    rows = []
    for response in responses:
        ids = [*response_ids(response, tokenizer), tokenizer.eos_token_id]
        rows.append(torch.tensor(ids[:max_response_tokens]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B,R)
    # (not by ids == padding token: where that is the stop token, too, it would be masked)
    targets = pad(rows, batch_first=True, padding_value=-100)  # (B,R)
    masked = torch.full_like(inputs["input_ids"], -100)  # (B,P): prompt and image tokens
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)  # (B,P+R), and so the next two
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], (targets != -100).long()], 1)
    inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, ids.shape[1]))  # 0 = text
    return inputs, torch.cat([masked, targets], 1)


def micro_batches(rows_of_kind, processor, image_root, settings, seed, micro_batch, step):
    """[(kind, rows, inputs, labels)] of optimizer step `step`, read and encoded.

    Each step stands for itself, so that another thread can prepare it and training can go on at any
    step. It holds train_batch critiques and, if there are any, as many correct responses; of
    several processes each takes its part of them."""
    encoded = []
    for kind, all_rows in rows_of_kind.items():
        rows = rows_of_step(all_rows, step, settings["train_batch"], seed)[RANK::WORLD]
        rows.sort(key=lambda row: len(row["text"]) + len(row["response"]))  # little padding
        for start in range(0, len(rows), micro_batch):
            part = rows[start : start + micro_batch]
            texts = [row["text"] for row in part]
            images = [Path(image_root) / row["image"] for row in part]
            responses = [row["response"] for row in part]
            longest = settings["max_response_tokens"]
            inputs, labels = encode_supervised(processor, texts, images, responses, longest)
            encoded.append((kind, part, inputs, labels))
    return encoded


# ---- The loop: rows, count, forward, loss, backward, step, log -----------------------------------
def forward(model, inputs, labels):
    """(logits (B,R+1,V), labels (B,R+1)) of the last R+1 positions: the R response tokens, and the
    prompt's last one, which predicts the first of them. The language head is spared the others."""
    R = int((labels != -100).sum(1).max())  # tokens of the longest response
    inputs = inputs.to(common.unwrap(model).device)
    logits = model(**inputs, logits_to_keep=R + 1, use_cache=False).logits
    return logits, labels[:, -R - 1 :].to(logits.device)


def bradley_terry_sum(logits, labels, rows, tokenizer):
    """Summed Bradley-Terry loss () of critiques, at each one's verdict, teacher-forced.

    logits (B,R+1,V) and labels (B,R+1) as forward gives them; rows: {"label", ...}, B of them."""
    at_verdict = []
    for row_logits, row_labels in zip(logits, labels):  # (R+1,V), (R+1,)
        ids = row_labels[row_labels != -100].tolist()  # of the response
        _, _, k = common.find_verdict_token(tokenizer, ids)  # ids[k] is the verdict's letter
        # Position 0, the prompt's last, predicts the first of ids: so position k predicts ids[k].
        at_verdict.append(row_logits[k])
    r = common.verdict_log_odds(torch.stack(at_verdict), *common.verdict_token_ids(tokenizer))
    label_is_a = torch.tensor([row["label"] == "A" for row in rows], device=r.device)  # (B,)
    return bradley_terry_loss(r, label_is_a).sum()


def make_trainable(model, rank):
    """PEFT model with fresh rank-r adapters on the language model's linear layers; rank 0: the same
    model, with all weights of its language model trainable. float32 in both cases."""
    if hasattr(model, "get_base_model"):  # it has an adapter, which 04 trains further
        return model
    if rank:
        from peft import LoraConfig, get_peft_model  # slow to import

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS)
        return get_peft_model(model, config)  # float32 adapters, also beside bf16 weights
    for name, weight in model.named_parameters():
        if "language_model" in name or name.startswith("lm_head"):
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    return model


def total(numbers):
    """{name: number}, each summed over all processes."""
    of_processes = common.gather(numbers)
    sums = {}
    for name in numbers:
        sums[name] = sum(of_process[name] for of_process in of_processes)
    return sums


def sum_gradients(weights):
    """Add up the processes' gradients, in place: each has its own rows' part of the loss."""
    if WORLD > 1:
        for weight in weights:
            dist.all_reduce(weight.grad)


def learning_rate(step, steps, lr):
    """Of a step from 0: linear warm-up in a twentieth of the steps, linear decay to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return lr * ((step + 1) / warmup)
    return lr * (1 - 0.9 * (step - warmup) / (steps - warmup))


def prepared_ahead(prepare, steps):
    """(step, prepare(step)) of a range; a second thread prepares the step after the present one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(prepare, steps.start)
        for step in steps:
            ready = ahead.result()
            ahead = thread.submit(prepare, step + 1)
            yield step, ready


def losses_of_step(sums, n_critique, n_correct, settings):
    """A step's losses for metrics.jsonl, in nats; "loss" is L_IFT, without Bradley-Terry.

    sums: {"critique", "correct", "bradley_terry"} of the step; n_*: its supervised tokens. None
    stands for what is not trained on."""
    bradley_terry = sums["bradley_terry"] / settings["train_batch"]
    return {
        "loss": ift_loss(sums["critique"], n_critique, sums["correct"], n_correct, settings["lam"]),
        "loss_critique": sums["critique"] / n_critique,  # nats per token
        "loss_correct": sums["correct"] / n_correct if n_correct else None,
        "bradley_terry": bradley_terry if settings["bt_weight"] else None,
    }


def train(model, tokenizer, prepare, folder, settings, save_every):
    """Minimise L_IFT + bt_weight * Bradley-Terry in place (03, 04), by what settings name.

    prepare(step): its micro-batches. folder gets metrics.jsonl, one line a step, and every
    save_every steps training.pt, from which an interrupted training goes on."""
    steps, lam, bt_weight = settings["steps"], settings["lam"], settings["bt_weight"]
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0)
    lines = resume_training(folder / "training.pt", weights, optimizer, settings)
    bar = common.progress_bar(total=steps, desc="train", unit="step", initial=len(lines))
    model.train()
    for step, batches in prepared_ahead(prepare, range(len(lines), steps)):
        # Every token of the step weighs the same, so they are counted before the first backward.
        n_tokens = {"critique": 0, "correct": 0}
        for kind, _, _, labels in batches:
            n_tokens[kind] += int((labels != -100).sum())
        n_critique, n_correct = total(n_tokens).values()
        sums = {"critique": 0.0, "correct": 0.0, "bradley_terry": 0.0}  # in nats, for the log
        for kind, rows, inputs, labels in batches:
            logits, labels = forward(model, inputs, labels)  # (B,R+1,V), (B,R+1)
            nll, _ = nll_sum(logits, labels)  # ()
            sums[kind] += nll.item()
            # Divided by the whole step's tokens: its micro-batches' losses add up to ift_loss.
            if kind == "correct":
                loss = lam * nll / n_correct
            else:
                loss = nll / n_critique
                if bt_weight:
                    bt = bradley_terry_sum(logits, labels, rows, tokenizer)  # ()
                    sums["bradley_terry"] += bt.item()
                    loss = loss + bt_weight * bt / settings["train_batch"]
            loss.backward()
        sum_gradients(weights.values())
        grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).item()
        done = step + 1
        if not math.isfinite(grad_norm):
            _, rows, _, _ = batches[0]
            stop(f"step {done}: gradient norm {grad_norm}, first row {rows[0]['id']}")
        lr = learning_rate(step, steps, settings["lr"])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses = losses_of_step(total(sums), n_critique, n_correct, settings)
        lines.append({"step": done, **losses, "grad_norm": grad_norm, "lr": lr})
        bar.update()
        if done % max(1, steps // 10) == 0:  # leaves some ten lines on the screen
            bar.write(f"step {done} of {steps} | loss {losses['loss']:.4g}")
        if done % save_every == 0 or done == steps:
            common.write_jsonl(folder / "metrics.jsonl", lines)
            save_training(folder / "training.pt", lines, weights, optimizer, settings)
    bar.close()
    model.eval()


# ---- What is trained is kept, with what it was made with -----------------------------------------
def save_training(path, lines, weights, optimizer, settings):
    """All that training changes, and its log's lines, one a step; whole or not at all."""
    state = {"lines": lines, "settings": settings, "optimizer": optimizer.state_dict()}
    state["weights"] = {name: weight.data for name, weight in weights.items()}
    if RANK == 0:
        try:
            torch.save(state, path.with_suffix(".partial"))
        except RuntimeError as error:  # torch's name for a full disk
            stop(f"{path}: {common.one_line(error)}")
        path.with_suffix(".partial").replace(path)


def read_training(path, settings):
    """What save_training has saved, by the same settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        stop(f"{path}: {common.one_line(error)}; delete it, and this training begins anew")
    check_settings(path, state["settings"], settings)
    return state


def resume_training(path, weights, optimizer, settings):
    """Set weights and optimizer, in place, to what save_training has saved; returns the log's lines
    of the steps that are done, none where there is no such file."""
    if not path.exists():
        return []
    state = read_training(path, settings)
    for name, weight in weights.items():
        weight.data.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    print(f"training goes on after step {len(state['lines'])}")
    return state["lines"]


def check_settings(path, saved, settings):
    """Stop where what lies there was made with something else: it is never overwritten."""
    changes = []
    for name, value in settings.items():
        if saved.get(name) != value:
            changes.append(f"{name} was {saved.get(name)}, is {value}")
    if changes:
        why = "; ".join(changes)
        stop(f"{path} was trained otherwise ({why}): give 03 and 04 another --tag, or delete it")


def find_checkpoint(folder, settings=None):
    """The folder's adapter/ or model/, None without either. Given the settings of a training, it
    stops where what lies there, or an interrupted training.pt, was made with other settings."""
    trained = [path for path in (folder / "adapter", folder / "model") if path.exists()]
    if settings and trained:
        check_settings(trained[0], common.read_json(trained[0] / "made_with.json"), settings)
    elif settings and (folder / "training.pt").exists():
        read_training(folder / "training.pt", settings)
    return trained[0] if trained else None


def save_checkpoint(model, processor, folder, made_with):
    """folder/adapter/ for PeftModel, or model/ of a full fine-tuning, whole or not at all; then
    training.pt goes. -> its path"""
    is_adapter = hasattr(model, "get_base_model")
    target = folder / ("adapter" if is_adapter else "model")
    if RANK == 0:
        unfinished = target.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(str(unfinished))
        (unfinished / "README.md").unlink(missing_ok=True)  # PEFT's form, which nobody has filled
        if not is_adapter:
            processor.save_pretrained(str(unfinished))
        common.write_json(unfinished / "made_with.json", made_with)
        unfinished.rename(target)
        (folder / "training.pt").unlink()
    common.gather(None)  # all wait for the first
    return target


def write_card(checkpoint, first, measures):
    """README.md of a trained judge, where it has none yet: what it is, for those who get it.

    first: stage 01's arguments; measures: of the validation."""
    card = checkpoint / "README.md"
    facts = {"data": first["images"] or first["pairs"]}
    facts |= {"expert": first["detections"] or first["expert"], **measures}
    facts |= common.read_json(checkpoint / "made_with.json")
    del facts["images"]
    text = f"---\nbase_model: {first['model']}\n---\n# A judge that writes (VL-GenRM)\n\n"
    for name, value in facts.items():
        text += f"- {name}: {value}\n"
    if not card.exists():
        common.write_text(card, text)


# ---- Judging and validation ----------------------------------------------------------------------
def judge_pairs(path, judge, questions, condition, *, style, temperature=0.0, **asking):
    """Judgement rows of questions (from both_orders), in their order: by one critique each, with
    probability_a = P(A) in [0,1] after it, .5 where it has no verdict.

    Their answers are kept in path. A question's "picture" (PIL, or a name from image_root), if
    there is one, is shown instead of its image. asking: image_root, batch_size, max_new_tokens and
    seed of common.ask."""
    requests = []
    for q in questions:
        text = build_judge_prompt(q["prompt"], q["response_a"], q["response_b"], style)
        requests.append({"id": q["id"], "image": q.get("picture", q["image"]), "text": text})
    asking |= {"n": 1, "temperature": temperature}
    rows = []
    answers = common.ask(path, judge, requests, f"judge, {condition}", **asking)
    for q, (answer,) in zip(questions, answers):
        row = {"id": q["pair_id"], "question": q["id"], "condition": condition}
        row |= {name: q.get(name) for name in ("order", "image", "category", "label")}
        row["verdict"], row["critique"] = answer["verdict"], answer["text"]
        row["probability_a"] = torch.tensor(answer["log_odds"] or 0.0).sigmoid().item()
        rows.append(row)
    return rows


def accuracy_by_order(rows):
    """{"accuracy": of all rows, "accuracy_<order>", "both": right in both orders, "agreement":
    the same response wins in both, "unparseable": no verdict, "n_pairs"}; shares in [0,1].

    rows: {"id" of the pair, "order", "label", "verdict": "A" | "B" | None}, one per pair and order.
    No verdict counts as wrong and as no agreement."""
    of_order, of_pair = {}, {}
    for row in rows:
        is_correct = row["verdict"] == row["label"]
        of_order.setdefault(row["order"], []).append(is_correct)
        of_pair.setdefault(row["id"], []).append(None if row["verdict"] is None else is_correct)
    measures = {"accuracy": sum(row["verdict"] == row["label"] for row in rows) / len(rows)}
    for order in sorted(of_order):
        measures[f"accuracy_{order}"] = sum(of_order[order]) / len(of_order[order])
    both = [all(outcomes) for outcomes in of_pair.values()]
    same = [set(outcomes) in ({True}, {False}) for outcomes in of_pair.values()]
    measures |= {"both": sum(both) / len(both), "agreement": sum(same) / len(same)}
    measures["unparseable"] = sum(row["verdict"] is None for row in rows) / len(rows)
    return {**measures, "n_pairs": len(of_pair)}


def mean_bradley_terry(rows):
    """Mean Bradley-Terry loss in nats of judgement rows {"probability_a", "label"}."""
    p = torch.tensor([row["probability_a"] for row in rows])  # (B,)
    label_is_a = torch.tensor([row["label"] == "A" for row in rows])  # (B,)
    r = p.logit(eps=1e-6)  # (B,); certain and wrong is a number, too
    return bradley_terry_loss(r, label_is_a).mean().item()


def validate(path, judge, pairs, condition, **asking):
    """(judgement rows, measures) of the validation pairs in both orders, printed with a critique;
    ([], {}) without pairs. path, asking: see judge_pairs."""
    if not pairs:
        print(f"validation, {condition}: none, since stage 01 has no pair in split validation")
        return [], {}
    questions = []
    for pair in pairs:
        questions += both_orders(pair)
    rows = judge_pairs(path, judge, questions, condition, **asking)
    measures = {**accuracy_by_order(rows), "bradley_terry_loss": mean_bradley_terry(rows)}
    names = ("accuracy", "both", "agreement", "bradley_terry_loss", "unparseable")
    numbers = [f"{name} {measures[name]:.3f}" for name in names]
    print(f"validation, {condition}: {' | '.join(numbers[:3])}")
    print(f"    {' | '.join(numbers[3:])} | {len(pairs)} pairs")
    first = rows[0]
    print(f"{first['image']}, label {first['label']}:\n{first['critique']}\n")
    return rows, measures


def paired_gain(earlier, later):
    """(mean, half-width of its 95 % interval) of the gain in accuracy between two judges.

    earlier, later: judgement rows {"question", "image", "label", "verdict"} of the same questions.
    Interval: 1.96 standard errors over images, whose questions succeed and fail together. Needs:
    fmean, stdev (of statistics)"""
    was_correct = {row["question"]: row["verdict"] == row["label"] for row in earlier}
    gains_of = {}  # {image: of each of its questions -1, 0 or 1}
    for row in later:
        gain = (row["verdict"] == row["label"]) - was_correct[row["question"]]
        gains_of.setdefault(row["image"], []).append(gain)
    gains = [fmean(of_image) for of_image in gains_of.values()]
    half = 0.0
    if len(gains) > 1:
        half = 1.96 * stdev(gains) / len(gains) ** 0.5
    return fmean(gains), half


def verdict_follows(rows):
    """Of the critiques whose checks decide between the responses: (part whose verdict is the one
    that these imply, their number); (None, 0) without any. rows: {"critique", "verdict"}."""
    follows = []
    for row in rows:
        better = common.verdict_of_checks(common.parse_checks(row["critique"]))
        if better is not None:
            follows.append(row["verdict"] == better)
    return (fmean(follows), len(follows)) if follows else (None, 0)


def report_gain(earlier, later, why_none):
    """Says what a training has gained on the validation pairs, and how often the verdict follows
    the checks: the loss may fall while it ignores them."""
    if not later:
        return
    gain, half = paired_gain(earlier, later)
    n = len(later) // 2
    print(f"gain in accuracy on {n} validation pairs: {gain:+.3f} (95 % +-{half:.3f})")
    if gain < -half:
        print("warning: the judge has become worse: lower --lr or --steps")
    elif gain <= half:
        print(f"warning: no gain beyond its interval: {why_none}")
    part, n = verdict_follows(later)
    if n:
        print(f"the verdict follows the checks in {part:.0%} of {n} critiques")
    if n and part < 0.85:
        print("warning: the verdict does not read the checks: try --bt-weight 0.1, with a --tag")


# ---- Arguments and main --------------------------------------------------------------------------
def read_critiques(run):
    """Stage 02's critiques (03, 04). Stops if one is of a picture in validation or heldout."""
    critiques = common.read_rows(Path(run) / "02_critiques" / "critiques.jsonl", common.Critique)
    unseen = set()
    for split in ("validation", "heldout"):
        unseen |= {pair["image"] for pair in common.read_preferences(run, split)}
    if seen := sorted({row["image"] for row in critiques} & unseen):
        stop(f"{seen[0]} is in a critique, and in split validation or heldout: run stage 02 again")
    return critiques


def add_training_arguments(parser, steps, lr):
    """The arguments that 03 and 04 have in common."""
    add = parser.add_argument_group("training").add_argument
    add("--tag", default="", help="name of a variant, which lies beside the others")
    add("--steps", type=whole(1), default=steps, help="optimizer steps (%(default)s)")
    add("--lr", type=real(1e-9, 1), default=lr, help="peak learning rate (%(default)s)")
    add("--lam", type=real(0, 100), default=1 / 3, help="lambda of the correct responses (1/3)")
    add("--bt-weight", type=real(0, 100), default=0.0, help="of the verdicts' Bradley-Terry loss")
    per_step = "critiques, and correct responses, per step (%(default)s)"
    add("--train-batch", type=whole(WORLD), default=32, help=per_step)
    add("--micro-batch", type=whole(1), default=8, help="rows at a time (%(default)s)")
    add("--save-every", type=whole(1), default=50, help="steps between two saves (%(default)s)")
    switch = {"action": argparse.BooleanOptionalAction, "default": torch.cuda.is_available()}
    add("--checkpoint-activations", **switch, help="less memory, a third slower; on with cuda")
    longest = "longer critiques are not trained on, correct responses are cut (%(default)s)"
    add("--max-response-tokens", type=whole(2), default=1024, help=longest)
    add("--max-new-tokens", type=whole(1), default=512, help="of a new critique (%(default)s)")


# The arguments that decide what is trained; what else decides it joins them in `settings`.
TRAINED_WITH = ("tag", "steps", "lr", "lam", "bt_weight", "train_batch", "max_response_tokens")


def fit(judge, critiques, folder, settings, image_root, seed, args):
    """Train the judge's model on critique rows by settings, and save it -> its path.

    A critique cut before its verdict teaches nothing: too long ones are dropped, and counted."""
    model, processor = judge.loaded
    torch.manual_seed(seed)  # of an adapter's first weights
    model = make_trainable(model, settings.get("lora_rank", 0))
    tokenizer = processor.tokenizer
    limit = args.max_response_tokens
    short = [row for row in critiques if len(response_ids(row["critique"], tokenizer)) < limit]
    if not short:
        stop(f"all critiques are longer than --max-response-tokens {limit}: raise it")
    rows_of_kind = training_rows(short)
    if not args.lam:
        del rows_of_kind["correct"]
    n = len(short)
    counts = {
        "dropped: critique of --max-response-tokens or more": len(critiques) - n,
        "trained on, critiques": n,
        "trained on, correct responses": len(rows_of_kind.get("correct", ())),
    }
    epochs = args.steps * args.train_batch / n
    print(f"{args.steps} steps of {args.train_batch}: {epochs:.1f} epochs of {n} critiques")
    if args.checkpoint_activations:
        language_model = common.unwrap(model).model.language_model
        language_model.activation_checkpointing_enable()
        language_model.disable_input_require_grads()  # the line above has set a hook, needlessly
    how = (processor, image_root, settings, seed, args.micro_batch)
    prepare = partial(micro_batches, rows_of_kind, *how)
    # (a copy: the other thread is using the tokenizer)
    train(model, copy.deepcopy(tokenizer), prepare, folder, settings, args.save_every)
    made_with = {**settings, "counts": counts, "images": sorted({row["image"] for row in short})}
    return save_checkpoint(model, processor, folder, made_with)


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument_group("the model").add_argument
    add("--lora-rank", type=whole(0, 1024), default=16, help="0: full fine-tuning (%(default)s)")
    add_training_arguments(parser, steps=300, lr=1e-4)
    return parser.parse_args(argv)


def main(args):
    first = common.stage_args(args.run, "01_preferences")
    style = common.stage_args(args.run, "02_critiques")["style"]
    tag = f"_{args.tag}" if args.tag else ""
    folder = common.start_stage(args, f"03_ift{tag}")

    # 1. read, and compare with what is trained already --------------------------------------------
    critiques = read_critiques(args.run)
    validation = common.read_preferences(args.run, "validation")
    load = {"device": args.device, "max_image_tokens": first["max_image_tokens"]}
    judge = common.Judge(first["model"], **load)
    settings = {name: getattr(args, name) for name in (*TRAINED_WITH, "seed", "lora_rank")}
    settings |= {"style": style, "start": judge.weights, "rows": common.digest(critiques)}
    trained = find_checkpoint(folder, settings)

    # 2. train -------------------------------------------------------------------------------------
    asking = {"image_root": first["image_root"], "style": style, "batch_size": args.batch_size}
    asking |= {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    answers = folder / "answers.jsonl"
    earlier, measures_before = validate(answers, judge, validation, "before", **asking)
    if trained is None:
        trained = fit(judge, critiques, folder, settings, first["image_root"], args.seed, args)
    judge = common.Judge(first["model"], trained, **load)
    later, measures_after = validate(answers, judge, validation, "after 03", **asking)
    write_card(trained, first, measures_after)

    # 3. report ------------------------------------------------------------------------------------
    (folder / "meta.json").unlink(missing_ok=True)
    common.write_jsonl(folder / "validation.jsonl", earlier + later)
    report_gain(earlier, later, "try more --steps, or --bt-weight 0.1, with a --tag")
    counts = {"critiques read": len(critiques), "validation pairs": len(validation)}
    counts |= common.read_json(trained / "made_with.json")["counts"]
    measures = {"before": measures_before, "after": measures_after}
    flag = f" --tag {args.tag}" if args.tag else ""
    next_script = f"python 04_rejection_sampling.py{flag}"
    common.finish_stage(folder, args, counts, next_script, validation=measures)


if __name__ == "__main__":
    common.run(main, parse_args())
