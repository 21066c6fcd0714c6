"""Speed as ratios, each measured in one run against what a user would pick instead, in turn, A B A B ...

    python tests/bench.py --world runs/demo/world                # all parts
    python tests/bench.py sample --world runs/demo/world         # one of: sample, expert

sample: common.sample against transformers' generate(num_return_sequences=8) plus a forward that scores the verdicts.
expert: stage 01's Detector on files against ultralytics' own batched predict.
"""
import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import common  # noqa: E402
import toy_world  # noqa: E402

SAMPLES = 8


def paired(name, ours, theirs, runs):
    """Run the two in turn, one warm-up each -> row of the table; the ratio is theirs / ours, pair by pair."""
    seconds = {"ours": [], "theirs": []}
    for run in range(runs + 1):
        for who, function in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            function()
            if run:
                seconds[who].append(time.perf_counter() - started)
    ratio = np.divide(seconds["theirs"], seconds["ours"])
    return f"| {name} | {np.median(seconds['ours']):.2f} s | {np.median(seconds['theirs']):.2f} s | " \
           f"{ratio.min():.2f} | {np.median(ratio):.2f} | {ratio.max():.2f} |"


# ---- Sampling --------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def generate_and_score(model, processor, requests, max_new_tokens):
    """The usual loop: generate 8 samples per prompt, then one teacher-forced forward of every sample to read its verdict."""
    tokenizer, spaced = processor.tokenizer, [ids[0] for ids in common.verdict_token_ids(processor.tokenizer)]
    inputs = common.encode_prompts(processor, [r["text"] for r in requests], [r["image"] for r in requests])
    out = model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=SAMPLES, max_new_tokens=max_new_tokens)
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


def large_model(folder):
    """Random weights in larger proportions: hidden 768, 12 layers, a vocabulary of 32,000, pictures of 256 tokens."""
    from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    toy_world.build_processor().save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 448 * 448, "longest_edge": 448 * 448}
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
                         vocab_size=32000, max_position_embeddings=4096, eos_token_id=31999, pad_token_id=token("<|endoftext|>"),
                         rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}),
        vision_config=dict(depth=4, embed_dim=384, hidden_size=768, num_heads=6, mlp_ratio=4, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 31999  # practically never drawn: both sides write all 64 tokens
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model, processor


def bench_sample(world, runs):
    model, processor = common.load_judge(str(world / "model"), device="cpu")
    pairs = common.read_jsonl(world / "heldout.jsonl")[:16]
    toy = [{"id": q["id"], "image": world / q["image"], "text": common.build_judge_prompt(q["prompt"], q["response_a"], q["response_b"])}
           for pair in pairs for q in common.both_orders(pair)]
    yield paired("sample, toy judge, 32 x 8", lambda: common.sample(model, processor, toy, SAMPLES, 1.0, 96, batch_size=256),
                 lambda: generate_and_score(model, processor, toy, 96), runs)
    with tempfile.TemporaryDirectory() as folder:
        model, processor = large_model(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (448, 448, 3), dtype=np.uint8))
    large = [{"id": str(k), "image": picture, "text": "red circle, " * 100} for k in range(2)]
    yield paired("sample, hidden 768, 12 layers, 2 x 8", lambda: common.sample(model, processor, large, SAMPLES, 1.0, 64),
                 lambda: generate_and_score(model, processor, large, 64), runs)


# ---- The expert ------------------------------------------------------------------------------------------------------
def bench_expert(world, runs):
    from ultralytics import YOLO
    detector = importlib.import_module("01_build_preferences").Detector(str(world / "expert.pt"), 0.05, "cpu")
    yolo, paths = YOLO(world / "expert.pt"), sorted((world / "images").glob("*.png"))[:320]
    batches = [[str(path) for path in paths[i:i + 32]] for i in range(0, len(paths), 32)]
    yield paired("expert, 320 pictures", lambda: [detector.examine(batch, None) for batch in batches],
                 lambda: [yolo.predict(batch, conf=0.05, batch=32, device="cpu", verbose=False) for batch in batches], runs)


PARTS = {"sample": bench_sample, "expert": bench_expert}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none means all")
    parser.add_argument("--world", type=Path, default=Path("runs/demo/world"))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if not (args.world / "meta.json").exists():
        sys.exit(f"{args.world} is no finished toy world: python tests/toy_world.py --out {args.world}")
    lines = [line for part in args.parts or PARTS for line in PARTS[part](args.world, args.runs)]
    print(f"\n{torch.get_num_threads()} thread(s), {args.runs} paired runs after one warm-up\n\n| what | ours | theirs | ratio min | median | max |\n|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
