"""Speed as ratios, each measured in one run against what a user would take instead:

    python tests/bench.py              # both parts
    python tests/bench.py train        # one of: train, sample

train:  stage 03's train against TRL's SFTTrainer (pip install trl): the same rows in each step,
        model, adapter, optimizer and learning rates, so the same losses. Both as they come: 03
        encodes ahead in a thread and sorts a step's rows by length, TRL by default does neither.
sample: common.sample against transformers' generate(num_return_sequences=8) with a forward that
        scores the verdicts, and against the loop that one writes first: prompts encoded once, their
        cache repeated for the samples, ordinary attention, and no sample leaves before the last.

Each part on the toy judge and on a larger shape with random weights, in one process.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from scenes import write_pictures  # noqa: E402

import common  # noqa: E402

ift = importlib.import_module("03_train_ift")


# ---- Timing --------------------------------------------------------------------------------------
def timed(function, *args, **kwargs):
    """(seconds, what the call returned); a GPU has finished its work at both readings."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else torch.cpu.synchronize
    wait()
    started = time.perf_counter()
    result = function(*args, **kwargs)
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
        spent = f"{statistics.median(ours):.2f} | {statistics.median(theirs):.2f}"
        spread = f"{min(ratios):.2f} | {statistics.median(ratios):.2f} | {max(ratios):.2f}"
        lines.append(f"| {what} | {against} | {spent} | {spread} |")
    return lines


# ---- Judges --------------------------------------------------------------------------------------
def toy_judge(world, device=None):
    return common.load_judge(str(world / "model"), device=device)


def larger_judge(world):
    """Random weights: hidden 768, 12 layers, 32,000 words; every picture becomes 256 tokens."""
    toy, processor = toy_judge(world)
    processor.image_processor.size = {"shortest_edge": 448 * 448, "longest_edge": 448 * 448}
    text_config = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [8, 12, 12],
        },
    }
    vision_config = {"depth": 4, "embed_dim": 384, "hidden_size": 768, "num_heads": 6}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(toy.config, name) for name in tokens}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text_config, vision_config=vision_config, **ids)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = toy.generation_config
    model.requires_grad_(False)
    return model.to(toy.device, toy.dtype).eval(), processor


# ---- Sampling: functions that give what common.sample gives --------------------------------------
def answers_of(tokenizer, tokens, log_odds, n):
    """Lists of n answers from the samples' token ids (S, R) and log-odds (S, R, 2)."""
    stop_ids = torch.tensor([tokenizer.eos_token_id])
    verdict_ids = common.verdict_token_ids(tokenizer)
    answers = []
    for sample in zip(tokens.cpu(), log_odds.cpu()):
        answers.append(common.finish_sample(tokenizer, *sample, stop_ids, verdict_ids))
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def log_odds_of(logits, ids_a, ids_b):
    """log P(A) - log P(B) (..., 2) for both spellings of the verdict, from logits (..., V)."""
    return logits[..., ids_a].float() - logits[..., ids_b].float()


@torch.no_grad()
def generate_and_score(model, processor, requests, n, temperature, max_new_tokens):
    """transformers' generate, then one forward over every sample to read its verdict's log-odds."""
    tokenizer = processor.tokenizer
    texts, images = [row["text"] for row in requests], [row["image"] for row in requests]
    inputs = common.encode_prompts(processor, texts, images).to(model.device)
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": n}
    if temperature == 0:
        chosen = {"do_sample": False}  # here generate takes n = 1 alone
    # Random weights write image tokens, too, and the forward below would want their pictures.
    chosen["suppress_tokens"] = [model.config.image_token_id]
    written = model.generate(**inputs, **chosen, max_new_tokens=max_new_tokens)  # (S, P+R)

    texts, images = [x for x in texts for _ in range(n)], [x for x in images for _ in range(n)]
    inputs = common.encode_prompts(processor, texts, images).to(model.device)  # S rows
    tokens = written[:, inputs["input_ids"].shape[1] :]  # (S, R)
    inputs["input_ids"] = written
    is_token = (tokens != tokenizer.pad_token_id).long()
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], is_token], 1)
    is_text = torch.zeros_like(tokens)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], is_text], 1)
    keep = tokens.shape[1] + 1
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[:, :-1]  # (S, R, V)
    log_odds = log_odds_of(logits, *common.verdict_token_ids(tokenizer))  # (S, R, 2)
    return answers_of(tokenizer, tokens, log_odds, n)


@torch.no_grad()
def plain_loop(model, processor, requests, n, temperature, max_new_tokens):
    """The loop that one writes first, which reads the verdict's log-odds as it goes."""
    tokenizer = processor.tokenizer
    verdict_ids = common.verdict_token_ids(tokenizer)
    texts, images = [row["text"] for row in requests], [row["image"] for row in requests]
    inputs = common.encode_prompts(processor, texts, images).to(model.device)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, logits = out.cache, out.logits[:, -1].repeat_interleave(n, 0)  # (S, V)
    cache.batch_repeat_interleave(n)
    mask = inputs["attention_mask"].repeat_interleave(n, 0)  # (S, P)
    position = inputs["attention_mask"].sum(1, keepdim=True) + model.model.rope_deltas  # (B, 1)
    position = position.repeat_interleave(n, 0)  # (S, 1)
    tokens, log_odds = [], []
    going = torch.ones(len(mask), dtype=torch.bool, device=mask.device)  # (S,)
    for _ in range(max_new_tokens):
        if temperature == 0:
            new = logits.argmax(-1)  # (S,)
        else:
            new = torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]  # (S,)
        tokens.append(new)
        log_odds.append(log_odds_of(logits, *verdict_ids))  # (S, 2)
        going &= new != tokenizer.eos_token_id
        if not going.any():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = model(
            input_ids=new[:, None],
            attention_mask=mask,
            position_ids=position.expand(3, -1, -1),  # time, height, width: the same in text
            cache=cache,
            use_cache=True,
        ).logits[:, -1]  # (S, V)
        position = position + 1
    return answers_of(tokenizer, torch.stack(tokens, 1), torch.stack(log_odds, 1), n)


def toy_questions(pictures, n_pairs):
    """Both orders of held-out pairs of the toy world."""
    requests = []
    for pair in common.read_jsonl(pictures / "heldout.jsonl")[:n_pairs]:
        for q in common.both_orders(pair):
            text = common.build_judge_prompt(q["prompt"], q["response_a"], q["response_b"])
            requests.append({"id": q["id"], "image": pictures / q["image"], "text": text})
    return requests


def long_questions():
    """Two prompts of 256 image tokens and 300 others."""
    noise = np.random.default_rng(0).integers(0, 255, (448, 448, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    return [{"id": str(k), "image": picture, "text": "red circle, " * 100} for k in range(2)]


def bench_sample(world, pictures, runs):
    """Lines of the table, and no notes; 8 samples of each prompt at temperature 1."""
    parts = (
        ("sample, toy, 32 x 8", toy_judge(world), toy_questions(pictures, 16), 96),
        ("sample, larger, 2 x 8", larger_judge(world), long_questions(), 64),
    )
    lines = []
    for what, judge, requests, max_new_tokens in parts:
        sides = {}
        for against, function in (
            ("common.sample", common.sample),
            (f"generate + scoring, transformers {transformers.__version__}", generate_and_score),
            ("loop over a repeated cache", plain_loop),
        ):
            arguments = (*judge, requests, 8, 1.0, max_new_tokens)
            sides[against] = functools.partial(timed, function, *arguments)
        seconds, _ = in_turn(sides, runs)
        lines += table_rows(what, seconds)
    return lines, []


# ---- Training ------------------------------------------------------------------------------------
def true_critiques(pairs, preamble=""):
    """Critique rows as stage 02 writes them, with the truth as critique, so of many lengths."""
    rows = []
    for pair in pairs:
        for q in common.both_orders(pair):
            lines = []
            for found in pair["evidence"]:
                letter = "A" if found["object"] in q["response_a"] else "B"
                answer = "yes" if found["status"] == "present" else "no"
                lines.append(f"{letter}: {found['object']}: {answer}")
            critique = "\n".join([*lines, f"Verdict: {q['label']}"])
            prompt = preamble + q["prompt"]
            rows.append({**q, "prompt": prompt, "style": "critique", "critique": critique})
    return rows


def with_adapter(model):
    """A copy of the model with a fresh adapter, the same each time."""
    torch.manual_seed(0)
    return ift.make_trainable(copy.deepcopy(model), 16)


def train_ours(model, data, steps, lr):
    """(seconds, loss of each step) of stage 03's train with lambda 0: TRL knows one kind of row."""
    model = with_adapter(model)
    settings = {"steps": steps, "lr": lr, "lam": 0.0, "bt_weight": 0.0, "save_every": steps}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder)
        seconds, _ = timed(ift.train, model, data, path, checkpoint_activations=False, **settings)
        log = common.read_jsonl(path / "metrics.jsonl")
    return seconds, [line["loss"] for line in log]


def rows_in_order(data, steps):
    """The rows of D_critique (text, image, response) in the order in which the steps take them."""
    rows = []
    for step in range(steps):
        critiques = data.rows_of_kind["critique"]
        rows += ift.rows_of_step(critiques, step, data.train_batch, data.seed)
    return rows


def trl_dataset(data, steps):
    """What SFTTrainer reads. Strings, not messages: of messages it would also supervise what the
    chat template writes after the stop token."""
    import datasets

    processor, rows = data.processor, []
    for row in rows_in_order(data, steps):
        content = [{"type": "image"}, {"type": "text", "text": row["text"]}]
        turn = {"role": "user", "content": content}
        prompt = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        completion = row["response"] + processor.tokenizer.eos_token
        image = str(data.image_root / row["image"])
        rows.append({"image": image, "prompt": prompt, "completion": completion})
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def train_theirs(model, data, steps, lr):
    """(seconds, loss of each step) of TRL's SFTTrainer; neither side checkpoints activations."""
    from trl import SFTConfig, SFTTrainer

    model = with_adapter(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)

    def share_of_peak(step):
        return ift.learning_rate(step, steps, lr) / lr

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=data.micro_batch,
            gradient_accumulation_steps=data.train_batch // data.micro_batch,
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            max_length=None,
            pad_to_multiple_of=None,
            gradient_checkpointing=False,
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=common.unwrap(model).device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            settings,
            train_dataset=trl_dataset(data, steps),
            processing_class=data.processor,
            optimizers=(optimizer, schedule),
        )
        seconds, _ = timed(trainer.train)
    return seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def training_parts(world, pictures):
    """(what, model, TrainingSteps, steps) of both shapes."""
    pairs = common.read_jsonl(pictures / "heldout.jsonl")
    settings = {"lam": 0.0, "max_response_tokens": None, "seed": 0}

    model, processor = toy_judge(world)
    critiques = true_critiques(pairs)
    sizes = {"train_batch": 32, "micro_batch": 8}
    data = ift.TrainingSteps(critiques, processor, pictures, **sizes, **settings)
    yield "train, toy, 10 steps of 32", model, data, 10

    model, processor = larger_judge(world)
    critiques = true_critiques(pairs, preamble="red circle, " * 60)
    sizes = {"train_batch": 4, "micro_batch": 2}
    data = ift.TrainingSteps(critiques, processor, pictures, **sizes, **settings)
    yield "train, larger, 2 steps of 4", model, data, 2


def bench_train(world, pictures, runs):
    """Lines of the table, and notes on losses and tokens."""
    if importlib.util.find_spec("trl") is None:
        return [], ["train is left out, as TRL is not installed: pip install trl"]
    theirs = f"TRL {importlib.metadata.version('trl')}, SFTTrainer"
    lines, notes = [], []
    for what, model, data, steps in training_parts(world, pictures):
        sides = {
            "03": functools.partial(train_ours, model, data, steps, lr=1e-3),
            theirs: functools.partial(train_theirs, model, data, steps, lr=1e-3),
        }
        seconds, losses = in_turn(sides, runs)
        lines += table_rows(what, seconds)
        n_tokens = sum(ift.count_supervised(data[step])[0] for step in range(steps))
        rates = [n_tokens / statistics.median(spent) for spent in seconds.values()]
        apart = max(abs(a - b) for a, b in zip(losses["03"], losses[theirs], strict=True))
        notes.append(
            f"{what}: supervised tokens/s {rates[0]:.0f}, theirs {rates[1]:.0f}; loss "
            f"{losses['03'][0]:.4f} -> {losses['03'][-1]:.4f}, of any step apart by {apart:.1e}"
        )
    return lines, notes


# ---- The table -----------------------------------------------------------------------------------
PARTS = {"train": bench_train, "sample": bench_sample}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help="train or sample; none: both")
    world = ROOT / "tests" / "world"
    parser.add_argument("--world", type=Path, default=world, help="a folder with the toy model/")
    parser.add_argument("--runs", type=int, default=5, help="measured runs, after a warm-up")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part} is not one of {', '.join(PARTS)}")
    return args


def main(args):
    lines, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder)
        write_pictures(pictures, seed=0, n_images=0, n_heldout=200)
        for part in args.parts or PARTS:
            new_lines, new_notes = PARTS[part](args.world, pictures, args.runs)
            lines += new_lines
            notes += new_notes
    print(f"\n{args.runs} runs in turn after a warm-up, {torch.get_num_threads()} thread(s)")
    print("| what | against | ours, s | theirs, s | ratio: min | median | max |")
    print("|---|---|---|---|---|---|---|")
    print(*lines, *notes, sep="\n")


if __name__ == "__main__":
    common.run(main, parse_args())
