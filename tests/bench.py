"""Speed as ratios, each measured in one run against what a user would pick instead, in turn, A B A B ...

    python tests/bench.py --world runs/demo/world                # all parts
    python tests/bench.py train --world runs/demo/world          # one of: scale, train, sample, expert

scale:  each stage on 1,000, 4,000 and 16,000 rows (--sizes; half an hour): does time grow as they do, and memory not?
train:  stage 03's train against TRL's SFTTrainer (pip install trl) on the same rows, model, adapter, steps and learning rates.
sample: common.sample against transformers' generate(num_return_sequences=8) plus a forward that scores the verdicts.
expert: stage 01's Detector on files against ultralytics' own batched predict.
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import common  # noqa: E402
import demo  # noqa: E402
from build_world import build_processor  # noqa: E402
from demo import WORLD  # noqa: E402

one, two, ift = map(importlib.import_module, ("01_build_preferences", "02_generate_critiques", "03_train_ift"))
SAMPLES = 8
MIB = 2 ** (20 if sys.platform == "darwin" else 10)  # in units of ru_maxrss


def timed(watches, function, *args, **kwargs):
    """{name: seconds} of the call: for watches (owner, attribute, name) what is spent in that callable less that of watched
    callables within it, and "rest"; their sum is the call's time. name may be a function of the keyword arguments. Calls by
    other threads do not count: what they do costs time only where it is waited for."""
    seconds, inner, thread = Counter(), [0.0], threading.get_ident()

    def wrap(watched, name):
        @functools.wraps(watched)
        def call(*args, **kwargs):
            if threading.get_ident() != thread:
                return watched(*args, **kwargs)
            inner.append(0.0)
            started = time.perf_counter()
            try:
                return watched(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                seconds[name(kwargs) if callable(name) else name] += spent - inner.pop()
                inner[-1] += spent
        return call

    with contextlib.ExitStack() as stack:
        for owner, attribute, name in watches:
            stack.enter_context(mock.patch.object(owner, attribute, wrap(getattr(owner, attribute), name)))
        started = time.perf_counter()
        function(*args, **kwargs)
        return {**seconds, "rest": time.perf_counter() - started - inner[0]}


def paired(name, ours, theirs, runs, unit="s", amount=None):
    """Run the two in turn, one warm-up each; each returns timed's {part: seconds} -> (row of the table, where the time goes).
    The ratio is theirs / ours in seconds, pair by pair. amount: what both get done, shown per second instead of the seconds."""
    parts = {"ours": [], "theirs": []}
    for run in range(runs + 1):
        for who, function in (("ours", ours), ("theirs", theirs)):
            spent = function()
            parts[who] += [spent] if run else []
    seconds = {who: np.array([sum(run.values()) for run in ran]) for who, ran in parts.items()}
    shown = [f"{amount / s:.0f} {unit}" if amount else f"{s:.2f} {unit}" for s in map(np.median, seconds.values())]
    ratio = seconds["theirs"] / seconds["ours"]
    where = "; ".join(f"{who} " + ", ".join(f"{part} {np.median([run[part] for run in ran]):.2f}" for part in ran[0])
                      for who, ran in parts.items())
    return (f"| {name} | {' | '.join(shown)} | {ratio.min():.2f} | {np.median(ratio):.2f} | {ratio.max():.2f} |",
            f"{name}, median seconds: {where}")


# ---- Sampling --------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def generate_and_score(model, processor, requests, max_new_tokens):
    """The usual loop: generate 8 samples per prompt, then one teacher-forced forward of every sample to read its verdict."""
    tokenizer, spaced = processor.tokenizer, [ids[0] for ids in common.verdict_token_ids(processor.tokenizer)]
    inputs = common.encode_prompts(processor, [r["text"] for r in requests], [r["image"] for r in requests])
    out = model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=SAMPLES,
                         suppress_tokens=[model.config.image_token_id],  # random weights write it, and scoring would want its picture
                         max_new_tokens=max_new_tokens)
    n_prompt = inputs["input_ids"].shape[1]
    new = out[:, n_prompt:]
    again = common.encode_prompts(processor, [r["text"] for r in requests for _ in range(SAMPLES)],
                                  [r["image"] for r in requests for _ in range(SAMPLES)])
    again["input_ids"] = out
    again["attention_mask"] = torch.cat([again["attention_mask"], (new != tokenizer.pad_token_id).long()], 1)
    again["mm_token_type_ids"] = torch.cat([again["mm_token_type_ids"], torch.zeros_like(new)], 1)
    logits = model(**again, logits_to_keep=new.shape[1] + 1, use_cache=False).logits
    for row, ids in enumerate(new.tolist()):
        _, verdict, place = common.find_verdict_token(tokenizer, ids)
        if verdict:
            common.verdict_log_odds(logits[row, place][None], *spaced)


def large_model():
    """Random weights in larger proportions: hidden 768, 12 layers, a vocabulary of 32,000, pictures of 256 tokens."""
    from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        build_processor().save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 448 * 448, "longest_edge": 448 * 448}
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                         num_key_value_heads=12, vocab_size=32000, max_position_embeddings=4096, bos_token_id=None,
                         eos_token_id=31999, pad_token_id=token("<|endoftext|>"),
                         rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}),
        vision_config=dict(depth=4, embed_dim=384, hidden_size=768, num_heads=6, mlp_ratio=4, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 31999  # practically never drawn: both sides write all 64 tokens
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model, processor


def bench_sample(world, runs, sizes):
    def against(name, model, processor, asked, length):
        watches = (common, "encode_prompts", "encode"), (model, "forward", lambda call: "scoring" if not call["use_cache"] else
                                                         "decode" if call["input_ids"].shape[1] == 1 else "prefill")
        return paired(f"sample, {name}", lambda: timed(watches, common.sample, model, processor, asked, SAMPLES, 1.0, length,
                                                       batch_size=256),
                      lambda: timed(watches, generate_and_score, model, processor, asked, length), runs)

    model, processor = common.load_judge(str(WORLD / "model"), device="cpu")
    toy = [{"id": q["id"], "image": world / q["image"], "text": common.build_judge_prompt(
        q["prompt"], q["response_a"], q["response_b"])}
        for pair in common.read_jsonl(world / "heldout.jsonl")[:16] for q in common.both_orders(pair)]
    yield against("toy judge, 32 x 8", model, processor, toy, 96)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (448, 448, 3), dtype=np.uint8))
    large = [{"id": str(k), "image": picture, "text": "red circle, " * 100} for k in range(2)]
    yield against("hidden 768, 12 layers, 2 x 8", *large_model(), large, 64)


# ---- Training --------------------------------------------------------------------------------------------------------
SHAPES = {"toy judge": {"steps": 10, "batch_size": 32, "micro_batch": 8},
          "hidden 768, 12 layers": {"steps": 2, "batch_size": 4, "micro_batch": 2}}
# lam = 0, critiques alone: SFTTrainer knows one mean over one kind of row.
SETTINGS = {"lr": 1e-3, "lam": 0.0, "bt_weight": 0.0, "seed": 0, "max_response_tokens": 1024}


def training_set(world, shape):
    """(model, processor, rows of D_critique): held-out pairs with the truth as their critique, so of many lengths."""
    pairs = common.read_jsonl(world / "heldout.jsonl")[:200]
    vocabulary = two.build_vocabulary({found["object"] for pair in pairs for found in pair["evidence"]})
    status = {pair["id"]: {found["object"]: found["status"] for found in pair["evidence"]} for pair in pairs}
    rows, _ = ift.training_rows([{**q, "style": "critique", "critique": two.render_reference(q, status[q["pair_id"]], vocabulary)}
                                 for pair in pairs for q in common.both_orders(pair)])
    if shape == "toy judge":
        return *common.load_judge(str(WORLD / "model"), device="cpu"), rows
    torch.manual_seed(0)
    return *large_model(), [{**row, "text": "red circle, " * 60 + row["text"]} for row in rows]


def with_adapter(model):
    torch.manual_seed(0)
    return ift.add_lora(copy.deepcopy(model), 16)


def rows_of_steps(rows, shape):
    steps, size, _ = SHAPES[shape].values()
    return [row for batch in islice(ift.stream(rows, size, SETTINGS["seed"]), steps) for row in batch]


def watch_training(model, *encode):
    inner = common.unwrap(model)
    return encode, (inner.model.visual, "forward", "vision"), (inner, "forward", "forward"), (torch.Tensor, "backward", "backward")


def train_ours(model, processor, rows, shape, world):
    """(timed seconds, loss of each step, learning rate of each step)"""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        seconds = timed(watch_training(model, ift, "encode_supervised", "encode"), ift.train, model, processor, rows, rows,
                        Path(folder), image_root=world, **SHAPES[shape], **SETTINGS)
        log = common.read_jsonl(Path(folder) / "metrics.jsonl")
    # The log has the rate of the step to come; the first step's is the peak, as fewer than 40 steps have no warm-up.
    return seconds, [line["loss"] for line in log], [SETTINGS["lr"], *(line["lr"] for line in log)]


def train_theirs(model, processor, rows, shape, world, rates):
    """(timed seconds, loss of each step) on the same rows in each step. Prompts and completions are strings: of messages TRL
    would also supervise what the chat template writes after the stop token. Neither side checkpoints activations."""
    from datasets import Dataset
    from datasets import Image as Picture
    from torch.utils.data.dataloader import _BaseDataLoaderIter
    from trl import SFTConfig, SFTTrainer
    steps, size, micro = SHAPES[shape].values()
    data = Dataset.from_list([
        {"image": str(world / row["image"]), "completion": row["response"] + processor.tokenizer.eos_token,
         "prompt": processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {
             "type": "text", "text": row["text"]}]}], tokenize=False, add_generation_prompt=True)}
        for row in rows_of_steps(rows, shape)]).cast_column("image", Picture())
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=SETTINGS["lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: rates[t] / SETTINGS["lr"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = SFTConfig(folder, max_steps=steps, per_device_train_batch_size=micro, gradient_accumulation_steps=size // micro,
                         train_sampling_strategy="sequential", completion_only_loss=True, max_length=None,
                         pad_to_multiple_of=None, gradient_checkpointing=False, max_grad_norm=1.0, bf16=False, use_cpu=True,
                         logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=processor, optimizers=(optimizer, schedule))
        seconds = timed(watch_training(model, _BaseDataLoaderIter, "__next__", "encode"), trainer.train)
    return seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def train_once(who, shape, world, *rates):
    """Prints {"losses", "rates", "mib": what one training adds to this process's peak memory}."""
    model, processor, rows = training_set(Path(world), shape)
    model, before = with_adapter(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, losses, *rates = {"ours": train_ours, "theirs": train_theirs}[who](model, processor, rows, shape, Path(world), *rates)
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / MIB
    print(json.dumps({"losses": losses, "rates": rates, "mib": mib}))


def bench_train(world, runs, sizes):
    if importlib.util.find_spec("trl") is None:  # the other parts are worth having all the same
        yield "| train | | not measured | | | |", "train compares with TRL's SFTTrainer, which is not installed: pip install trl"
        return

    def own_process(*args):  # one side's memory must not count for the other
        code = f"import bench; bench.train_once(*{args!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    alone = {shape: own_process("ours", shape, str(world.resolve())) for shape in SHAPES}
    theirs = {shape: own_process("theirs", shape, str(world.resolve()), *alone[shape]["rates"]) for shape in SHAPES}
    for shape, ours in alone.items():
        model, *rest = *training_set(world, shape), shape, world
        n = sum(len(rest[0].tokenizer(row["response"]).input_ids) + 1 for row in rows_of_steps(rest[1], shape))  # + stop token
        row, where = paired(f"train, {shape}", lambda: train_ours(with_adapter(model), *rest)[0],
                            lambda: train_theirs(with_adapter(model), *rest, *ours["rates"])[0], runs, "supervised tokens/s", n)
        gap = max(abs(a - b) for a, b in zip(ours["losses"], theirs[shape]["losses"], strict=True))
        yield row, f"{where}\n  {SHAPES[shape]}: loss {ours['losses'][0]:.4f} -> {ours['losses'][-1]:.4f}, after equal steps " \
                   f"apart by at most {gap:.1e}; memory added: {ours['mib']:.0f} MiB, theirs {theirs[shape]['mib']:.0f} MiB"


# ---- Scale -----------------------------------------------------------------------------------------------------------
def make_rows(world, folder, n):
    """n pictures (links to 64 of the world's) with findings and truth, and n // 2 pairs; paths start from folder."""
    pairs = common.read_jsonl(world / "heldout.jsonl")[:64]
    (folder / "images").mkdir(parents=True)
    rows = [{**pairs[k % 64], "id": str(k), "image": f"images/{k:05d}.png"} for k in range(n)]
    found = {row["image"]: [found for found in row["evidence"] if found["status"] == "present"] for row in rows}
    for k, image in enumerate(found):
        (folder / image).symlink_to((world / pairs[k % 64]["image"]).resolve())
    common.write_json(folder / "detections.jsonl", [{"id": image, "detections": objects} for image, objects in found.items()])
    common.write_json(folder / "truth.jsonl", [{"image": image, "objects": objects} for image, objects in found.items()])
    common.write_json(folder / "pairs.jsonl", rows[:n // 2])
    classes = sorted({found["object"] for pair in pairs for found in pair["evidence"]})
    common.write_json(folder / "vocabulary.json", two.build_vocabulary(classes))


def stage_commands(world, here, n):
    """{stage: command}: all is done for every row, but it is short: one candidate, critiques that are verdicts, two steps of
    training. 05 comes before 03, so that it judges with one model, on n // 2 pairs in two orders and once more withheld."""
    run = ["--run", f"{here}/run"]
    train = [*run, "--steps", "2", "--train-batch", "8", "--lr", "1e-6", "--max-new-tokens", "8"]
    return {
        "01_preferences": ["01_build_preferences.py", *run, "--images", f"{here}/images", "--image-root", f"{here}",
                           "--model", f"{WORLD}/model", "--detections", f"{here}/detections.jsonl", "--vocabulary",
                           f"{here}/vocabulary.json", "--prompts", f"{world}/prompts.txt", "--candidates", "1",
                           "--max-new-tokens", "16", "--validation", "8", "--train", f"{n // 2}"],
        "02_critiques": ["02_generate_critiques.py", *run, "--style", "none", "--critiques", "1", "--max-new-tokens", "8"],
        "05_evaluation": ["05_evaluate.py", *run, "--pairs", f"{here}/pairs.jsonl", "--truth", f"{here}/truth.jsonl",
                          "--withhold", "other", "--max-new-tokens", "8"],
        "03_ift": ["03_train_ift.py", *train],
        "04_rejection": ["04_rejection_sampling.py", *train, "--iterations", "1", "--pool", f"{n}", "--samples", "1",
                         "--margin", "0"]}


def growth(stage, sizes, seconds, mib):
    """(two rows of the table: seconds per 1,000 rows, and peak memory; a line with all sizes, the last increase per row over the
    first, where what every run costs falls out, and what the memory grew by per row)"""
    cost, steps = 1000 * np.divide(seconds, sizes), np.diff(seconds) / np.diff(sizes)
    rows = f"| scale, {stage}, per 1,000 rows | {cost[0]:.2f} s | {cost[-1]:.2f} s | | {cost[-1] / cost[0]:.2f} | |\n" \
           f"| scale, {stage}, peak memory | {mib[0]:.0f} MiB | {mib[-1]:.0f} MiB | | {mib[-1] / mib[0]:.2f} | |"
    line = f"scale, {stage}, {sizes} rows: {[round(s, 1) for s in seconds]} s, last increase per row {steps[-1] / steps[0]:.2f} of " \
           f"the first; {[*map(round, mib)]} MiB, {(mib[-1] - mib[0]) * 1024 / (sizes[-1] - sizes[0]):.1f} KiB a row"
    return rows, line


def bench_scale(world, runs, sizes):
    """One run a size: seconds as meta.json has them (imports left out), memory as the kernel counts it for the process."""
    measured = {}
    with tempfile.TemporaryDirectory() as scratch:
        for n, folder in ((n, Path(scratch) / str(n)) for n in sizes):
            make_rows(world, folder, n)
            for stage, command in stage_commands(world.resolve(), folder, n).items():
                process = demo.start(command, folder / "log")
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    sys.exit(f"{stage} failed at {n} rows:\n{(folder / 'log').read_text()[-3000:]}")
                meta = json.loads((folder / "run" / stage / "meta.json").read_text())
                measured.setdefault(stage, []).append((meta["seconds"], usage.ru_maxrss / MIB))
    yield from (growth(stage, sizes, *zip(*values)) for stage, values in sorted(measured.items()))


# ---- The expert ------------------------------------------------------------------------------------------------------
def bench_expert(world, runs, sizes):
    from ultralytics import YOLO
    detector, yolo = one.Detector(str(WORLD / "expert.pt"), 0.05, "cpu", []), YOLO(WORLD / "expert.pt")
    paths = sorted((world / "images").glob("*.png"))[:320]
    batches = [[str(path) for path in paths[i:i + 32]] for i in range(0, len(paths), 32)]
    yield paired("expert", lambda: timed((), lambda: [detector.examine(batch, None) for batch in batches]), lambda: timed(
        (), lambda: [yolo.predict(batch, conf=0.05, batch=32, device="cpu", verbose=False) for batch in batches]),
        runs, "pictures/s", len(paths))


# Scale first: Linux counts what this process has held so far for those that it starts, and by then that is little.
PARTS = {"scale": bench_scale, "train": bench_train, "sample": bench_sample, "expert": bench_expert}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; none means all")
    parser.add_argument("--world", type=Path, default=Path("runs/demo/world"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000], help="of scale, in rows")
    args = parser.parse_args()
    if not (args.world / "truth.jsonl").exists():
        sys.exit(f"{args.world} holds no pictures of the toy world: tests/demo.py draws them")
    if set(args.parts) - set(PARTS) or len(args.sizes) < 3 or args.sizes[0] < 100:
        parser.error(f"parts are {', '.join(PARTS)}; --sizes are three or more from 100 (of fewer rows stage 04 may keep none)")
    rows, notes = zip(*(line for part in PARTS if part in (args.parts or PARTS)
                        for line in PARTS[part](args.world, args.runs, args.sizes)))
    print("", f"{torch.get_num_threads()} thread(s), {args.runs} paired runs after one warm-up (scale: one)", *notes, "", sep="\n")
    print("| what | ours (scale: first size) | theirs (last size) | ratio min | median | max |\n|---|---|---|---|---|---|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
