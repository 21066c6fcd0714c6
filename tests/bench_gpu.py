"""Does it fit? Peak memory and speed of sampling and training at real sizes, with random weights.

    python tests/bench_gpu.py 7b
    python tests/bench_gpu.py 4b --max-image-tokens 512 --micro-batch 2 --gib 23
    python tests/bench_gpu.py 2b --max-image-tokens 256 --micro-batch 1 --gib 7.5

Shapes of Qwen2-VL-7B, Qwen3-VL-4B or Qwen3-VL-2B, the toy's tokenizer, noise of 640 x 480 pixels.
--gib: torch may reserve no more than so much of the GPU's memory; some .5 GiB come on top.
Sampling: 8 critiques of 256 tokens a question; training: steps of 32 critiques and 32 responses.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from build_world import CHAT_TEMPLATE, TOKENS, build_processor
from conftest import common, stage
from PIL import Image

ift = stage("03_train_ift")
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
QWEN3_TEXT = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
QWEN3_TEXT["rope_parameters"] = {**QWEN3_ROPE, "mrope_interleaved": True}
QWEN3_VISION = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
QWEN3_VISION |= {"patch_size": 16, "num_position_embeddings": 2304}
QWEN3_VISION["deepstack_visual_indexes"] = [5, 11, 17]
QWEN2_TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN2_TEXT |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
QWEN2_TEXT["rope_parameters"] = {**QWEN3_ROPE, "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16}
QWEN2_VISION |= {"mlp_ratio": 4, "patch_size": 14}


def qwen3(hidden_size, intermediate_size, layers, heads):
    text = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, **QWEN3_TEXT}
    text |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    return "Qwen3VL", text, {**QWEN3_VISION, "out_hidden_size": hidden_size}


# {name: (class, text_config, vision_config)}, as published
SHAPES = {
    "7b": ("Qwen2VL", QWEN2_TEXT, QWEN2_VISION),
    "4b": qwen3(2560, 9728, layers=36, heads=32),
    "2b": qwen3(2048, 6144, layers=28, heads=16),
}


def build(shape, max_image_tokens, device):
    """(model, processor) with random weights: bfloat16 on a GPU, as load_judge has them."""
    family, text, vision = shape
    patch = vision["patch_size"]
    tokenizer = build_processor().tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    text = {**text, "max_position_embeddings": 32768, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config_class = getattr(transformers, f"{family}Config")
    parts = {"text_config": text, "vision_config": vision}
    config = config_class(**parts, **ids, tie_word_embeddings=family == "Qwen3VL")
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model_class = getattr(transformers, f"{family}ForConditionalGeneration")
        model = model_class._from_config(config, attn_implementation="sdpa")
    model.requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    area = (2 * patch) ** 2  # of an image token, in pixels
    size = {"shortest_edge": 4 * area, "longest_edge": max_image_tokens * area}
    images = transformers.Qwen2VLImageProcessor(size=size, patch_size=patch)
    parts = images, tokenizer, getattr(transformers, f"{family}VideoProcessor")(size=size)
    processor_class = getattr(transformers, f"{family}Processor")
    return model.eval(), processor_class(*parts, chat_template=CHAT_TEMPLATE)


def write_questions(folder, n_pairs):
    """Critique rows of 80-word responses to pictures of noise, which it writes to the folder."""
    rows = []
    for i in range(n_pairs):
        noise = np.random.default_rng(i).integers(0, 255, (480, 640, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
        pair = {"id": str(i), "image": f"{i}.png", "prompt": "List the objects in the image."}
        pair |= {"chosen": "red circle, " * 40, "rejected": "blue star, " * 40}
        for question in common.both_orders(pair):
            critique = "A: red circle: yes\n" * 40 + f"Verdict: {question['label']}"
            rows.append({**question, "style": "critique", "critique": critique})
    return rows


def peak_gib(device):
    """Most memory that torch has reserved on the GPU since the last call; 0 on a CPU."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_reserved() / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def measure(shape, args, device):
    """Lines of what was measured."""
    if args.gib:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(args.gib / total)
    model, processor = build(shape, args.max_image_tokens, device)
    lines = [f"weights {sum(weight.nbytes for weight in model.parameters()) / 2**30:.1f} GiB"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_questions(folder, n_pairs=32)
        questions = ift.training_rows(rows)["critique"][: args.questions]
        requests = [{**row, "image": folder / row["image"]} for row in questions]
        clock = time.time()
        common.sample(model, processor, requests, 8, 1.0, args.max_new_tokens)
        rate = 8 * len(requests) / (time.time() - clock)
        lines.append(f"sampling: {rate:.1f} critiques/s, peak {peak_gib(device):.1f} GiB")
        training = ift.parse_args([f"--steps={args.steps}", f"--micro-batch={args.micro_batch}"])
        judge = argparse.Namespace(loaded=(model, processor))
        clock = time.time()
        ift.fit(judge, rows, folder, vars(training), folder, 0, training)
        seconds = (time.time() - clock) / args.steps
        lines.append(f"training: {seconds:.1f} s a step, peak {peak_gib(device):.1f} GiB")
    return lines


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--max-image-tokens", type=int, default=16384, help="of a picture")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows per forward and backward")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of a critique")
    parser.add_argument("--questions", type=int, default=32, help="that are sampled for")
    parser.add_argument("--steps", type=int, default=2, help="of training")
    parser.add_argument("--gib", type=float, help="memory that the process may take")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse_args()
    print(f"{arguments.shape} on {torch.cuda.get_device_name()}")
    print(*measure(SHAPES[arguments.shape], arguments, "cuda"), sep="\n")
