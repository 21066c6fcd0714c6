"""Speed as ratios, each measured in one run against what a user would take instead:

    python tests/bench.py              # both parts
    python tests/bench.py train        # one of: train, sample

train:  stage 03's train against TRL's SFTTrainer (pip install trl): the same rows in each step,
        model, adapter, optimizer and learning rates, so the same losses.
sample: common.sample against transformers' generate(num_return_sequences=8) with a forward that
        scores the verdicts, and against the loop that one writes first (plain_loop).

Each part on the toy judge and on a larger shape with random weights.
"""

import argparse
import contextlib
import copy
import io
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from conftest import WORLD, common, stage
from PIL import Image
from scenes import write_pictures

ift = stage("03_train_ift")


# ---- Timing --------------------------------------------------------------------------------------
def timed(function, *args):
    """(seconds, what the call returned); a GPU has finished its work at both readings."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else torch.cpu.synchronize
    wait()
    started = time.perf_counter()
    result = function(*args)
    wait()
    return time.perf_counter() - started, result


def in_turn(sides, runs):
    """{name: seconds of each run} and {name: last result}, each side once a round: A B, A B, ...

    sides: {name: function() -> (seconds, result)}. A first round, the warm-up, is left out.
    """
    seconds, results = {name: [] for name in sides}, {}
    for run in range(runs + 1):
        for name, function in sides.items():
            spent, results[name] = function()
            if run > 0:
                seconds[name].append(spent)
    return seconds, results


def table_rows(what, seconds):
    """Lines of the table: the first side against each other; ratio = theirs / ours, by rounds."""
    (_, ours), *others = seconds.items()
    lines = []
    for against, theirs in others:
        ratios = [b / a for a, b in zip(ours, theirs)]
        found = [*map(statistics.median, (ours, theirs)), min(ratios)]
        found += [statistics.median(ratios), max(ratios)]
        lines.append(f"| {what} | {against} | {' | '.join(f'{x:.2f}' for x in found)} |")
    return lines


# ---- Judges --------------------------------------------------------------------------------------
def toy_judge():
    return common.load_judge(str(WORLD / "model"))


def larger_judge():
    """Random weights: hidden 768, 12 layers, 32,000 words; every picture becomes 256 tokens."""
    toy, processor = toy_judge()
    processor.image_processor.size = {"shortest_edge": 448 * 448, "longest_edge": 448 * 448}
    text_config = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    text_config |= {"num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text_config |= {"max_position_embeddings": 4096, "rope_parameters": rope}
    vision_config = {"depth": 4, "embed_dim": 384, "hidden_size": 768, "num_heads": 6}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(toy.config, name) for name in tokens}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text_config, vision_config=vision_config, **ids)
    model = transformers.Qwen2VLForConditionalGeneration(config).requires_grad_(False)
    model.generation_config = toy.generation_config
    return model.to(toy.device, toy.dtype).eval(), processor


# ---- Sampling: functions that give what common.sample gives --------------------------------------
def answers_of(tokenizer, tokens, log_odds, n):
    """Lists of n answers from the samples' token ids and log-odds (S, R)."""
    finish = partial(common.finish_sample, stop_ids=torch.tensor([tokenizer.eos_token_id]))
    answers = [finish(tokenizer, *of_sample) for of_sample in zip(tokens.cpu(), log_odds.cpu())]
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def inputs_of(model, processor, requests, n=1):
    """Encoded prompts, each n times."""
    rows = [row for row in requests for _ in range(n)]
    texts, images = [[row[name] for row in rows] for name in ("text", "image")]
    return common.encode_prompts(processor, texts, images).to(model.device)


@torch.no_grad()
def generate_and_score(model, processor, requests, n, temperature, max_new_tokens):
    """transformers' generate, then one forward over every sample to read its verdict's log-odds."""
    tokenizer, inputs = processor.tokenizer, inputs_of(model, processor, requests)
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": n}
    if temperature == 0:
        chosen = {"do_sample": False}  # here generate takes n = 1 alone
    # Random weights write image tokens, too, and the forward below would want their pictures.
    chosen["suppress_tokens"] = [model.config.image_token_id]
    written = model.generate(**inputs, **chosen, max_new_tokens=max_new_tokens)  # (S, P+R)

    inputs = inputs_of(model, processor, requests, n)  # S rows
    tokens = written[:, inputs["input_ids"].shape[1] :]  # (S, R)
    inputs["input_ids"] = written
    is_token = (tokens != tokenizer.pad_token_id).long()
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], is_token], 1)
    is_text = torch.zeros_like(tokens)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], is_text], 1)
    keep = tokens.shape[1] + 1
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[:, :-1]  # (S, R, V)
    id_a, id_b = common.verdict_token_ids(tokenizer)
    log_odds = logits[..., id_a].float() - logits[..., id_b].float()  # (S, R)
    return answers_of(tokenizer, tokens, log_odds, n)


@torch.no_grad()
def plain_loop(model, processor, requests, n, temperature, max_new_tokens):
    """The loop that one writes first, which reads the verdict's log-odds as it goes."""
    tokenizer, inputs = processor.tokenizer, inputs_of(model, processor, requests)
    verdict_ids = common.verdict_token_ids(tokenizer)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, logits = out.cache, out.logits[:, -1].repeat_interleave(n, 0)  # (S, V)
    cache.batch_repeat_interleave(n)
    mask = inputs["attention_mask"].repeat_interleave(n, 0)  # (S, P)
    position = inputs["attention_mask"].sum(1, keepdim=True) + model.model.rope_deltas  # (B, 1)
    position = position.repeat_interleave(n, 0)  # (S, 1)
    tokens, log_odds, going = [], [], mask[:, 0] >= 0  # (S,): all
    for _ in range(max_new_tokens):
        uniforms = torch.rand(len(logits), device=logits.device)  # (S,)
        new = common.pick_tokens(logits, uniforms, temperature)  # (S,)
        tokens.append(new)
        log_odds.append(common.verdict_log_odds(logits, *verdict_ids))  # (S,)
        going &= new != tokenizer.eos_token_id
        if not going.any():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        seen = {"cache": cache, "use_cache": True, "attention_mask": mask}
        seen["position_ids"] = position.expand(3, -1, -1)  # time, height, width: the same in text
        logits = model(input_ids=new[:, None], **seen).logits[:, -1]  # (S, V)
        position = position + 1
    return answers_of(tokenizer, torch.stack(tokens, 1), torch.stack(log_odds, 1), n)


def toy_questions(pictures, n_pairs):
    """Both orders of held-out pairs of the toy world."""
    pairs = common.read_rows(pictures / "heldout.jsonl", dict)[:n_pairs]
    rows = ift.training_rows(true_critiques(pairs))["critique"]
    return [{**row, "image": pictures / row["image"]} for row in rows]


def long_questions():
    """Two prompts of 256 image tokens and 300 others."""
    noise = np.random.default_rng(0).integers(0, 255, (448, 448, 3))
    picture = Image.fromarray(noise.astype(np.uint8))
    return [{"id": str(k), "image": picture, "text": "red circle, " * 100} for k in range(2)]


def bench_sample(pictures, runs):
    """Lines of the table; 8 samples of each prompt at temperature 1."""
    generates = f"generate + scoring, transformers {transformers.__version__}"
    functions = {"common.sample": common.sample, generates: generate_and_score}
    functions["loop over a repeated cache"] = plain_loop
    lines = []
    for what, judge, requests, max_new_tokens in (
        ("sample, toy, 32 x 8", toy_judge(), toy_questions(pictures, 16), 96),
        ("sample, larger, 2 x 8", larger_judge(), long_questions(), 64),
    ):
        how = (*judge, requests, 8, 1.0, max_new_tokens)
        sides = {name: partial(timed, function, *how) for name, function in functions.items()}
        seconds, _ = in_turn(sides, runs)
        lines += table_rows(what, seconds)
    return lines


# ---- Training ------------------------------------------------------------------------------------
def true_critiques(pairs, preamble=""):
    """Critique rows as stage 02 writes them, with the truth as critique, so of many lengths."""
    rows = []
    for pair in pairs:
        for q in common.both_orders(pair):
            critique = ""
            for found in pair["evidence"]:
                letter = "A" if found["object"] in q["response_a"] else "B"
                answer = "yes" if found["status"] == "present" else "no"
                critique += f"{letter}: {found['object']}: {answer}\n"
            q |= {"critique": f"{critique}Verdict: {q['label']}", "style": "critique"}
            rows.append({**q, "prompt": preamble + q["prompt"]})
    return rows


def with_adapter(model):
    """A copy of the model with a fresh adapter, the same each time."""
    torch.manual_seed(0)
    return ift.make_trainable(copy.deepcopy(model), 16)


class Training(NamedTuple):
    """What both sides train on."""

    rows: list  # of D_critique
    processor: object
    image_root: Path
    settings: dict  # of ift.train
    micro_batch: int

    def prepare(self, step):
        """The micro-batches of a step; 0 is the seed."""
        how = (self.processor, self.image_root, self.settings, 0, self.micro_batch)
        return ift.micro_batches({"critique": self.rows}, *how, step)


def train_ours(model, data):
    """(seconds, loss of each step) of stage 03's train."""
    model, tokenizer = with_adapter(model), copy.deepcopy(data.processor.tokenizer)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path, what = Path(folder), (model, tokenizer, data.prepare)
        seconds, _ = timed(ift.train, *what, path, data.settings, 1000)  # saved in the end alone
        log = common.read_rows(path / "metrics.jsonl", dict)
    return seconds, [line["loss"] for line in log]


def trl_dataset(data):
    """What SFTTrainer reads, in the order in which the steps take it. Strings, not messages: of
    messages it would also supervise what the chat template writes after the stop token."""
    import datasets

    processor, rows = data.processor, []
    for step in range(data.settings["steps"]):
        for row in ift.rows_of_step(data.rows, step, data.settings["train_batch"], 0):
            content = [{"type": "image"}, {"type": "text", "text": row["text"]}]
            chat = [{"role": "user", "content": content}]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
            completion = row["response"] + processor.tokenizer.eos_token
            image = str(data.image_root / row["image"])
            rows.append({"image": image, "prompt": prompt, "completion": completion})
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def train_theirs(model, data):
    """(seconds, loss of each step) of TRL's SFTTrainer; neither side checkpoints activations."""
    from trl import SFTConfig, SFTTrainer

    model, lr, steps = with_adapter(model), data.settings["lr"], data.settings["steps"]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)

    def part_of_peak(step):
        return ift.learning_rate(step, steps, lr) / lr

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, part_of_peak)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        batch = {"per_device_train_batch_size": data.micro_batch}
        batch["gradient_accumulation_steps"] = data.settings["train_batch"] // data.micro_batch
        same = {"completion_only_loss": True, "max_grad_norm": 1.0, "max_steps": steps}
        same |= {"train_sampling_strategy": "sequential", "max_length": None, "bf16": False}
        same |= {"gradient_checkpointing": False, "pad_to_multiple_of": None}
        same["use_cpu"] = common.unwrap(model).device.type == "cpu"
        quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": "none"}
        settings = SFTConfig(folder, **batch, **same, **quiet, disable_tqdm=True)
        how = {"processing_class": data.processor, "optimizers": (optimizer, schedule)}
        trainer = SFTTrainer(model, settings, train_dataset=trl_dataset(data), **how)
        seconds, _ = timed(trainer.train)
    return seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line]


# With lambda 0, since TRL knows one kind of row.
SETTINGS = {"lr": 1e-3, "lam": 0.0, "bt_weight": 0.0, "max_response_tokens": None}


def bench_train(pictures, runs):
    """Lines of the table; it prints how the losses fall."""
    import trl

    lines, pairs = [], common.read_rows(pictures / "heldout.jsonl", dict)
    for what, (model, processor), preamble, (steps, train_batch, micro_batch) in (
        ("train, toy, 10 steps of 32", toy_judge(), "", (10, 32, 8)),
        ("train, larger, 2 steps of 4", larger_judge(), "red circle, " * 60, (2, 4, 2)),
    ):
        rows = ift.training_rows(true_critiques(pairs, preamble))["critique"]
        settings = {**SETTINGS, "steps": steps, "train_batch": train_batch}
        data = Training(rows, processor, pictures, settings, micro_batch)
        theirs = f"TRL {trl.__version__}, SFTTrainer"
        sides = {"03": partial(train_ours, model, data), theirs: partial(train_theirs, model, data)}
        seconds, losses = in_turn(sides, runs)
        lines += table_rows(what, seconds)
        ours = losses["03"]
        apart = max(abs(a - b) for a, b in zip(ours, losses[theirs], strict=True))
        print(f"{what}: loss {ours[0]:.4f} -> {ours[-1]:.4f}, apart by at most {apart:.1e}")
    return lines


# ---- The table -----------------------------------------------------------------------------------
PARTS = {"train": bench_train, "sample": bench_sample}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help="train or sample; none: both")
    parser.add_argument("--runs", type=int, default=5, help="measured runs, after a warm-up")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), seed=0, n_images=0, n_heldout=200)
        for part in args.parts or PARTS:
            lines += PARTS[part](Path(folder), args.runs)
    print(f"\n{args.runs} runs in turn after a warm-up, {torch.get_num_threads()} thread(s)")
    print("| what | against | ours, s | theirs, s | ratio: min | median | max |")
    print("|---|---|---|---|---|---|---|")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
