"""The same promises for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, of tiny random weights with the
real image processor, saved to disk and loaded by common.load_judge; adapters; faults of models."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from build_world import CHAT_TEMPLATE, build_processor
from conftest import EPSILON, check_greedy, check_samples, encode, fit, stage
from conftest import correct_rows, judged_rows, requests_of  # fmt: skip
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

import common

three = stage("03_train_ift")
NEWER = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}  # vision towers
SIXTEEN = {"patch_size": 16, "num_position_embeddings": 64, **NEWER}
INTERLEAVED = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
OLD = {"mrope_section": [2, 3, 3]}
FAMILIES = {  # transformers' class, positions, vision tower
    "qwen2_vl": ("Qwen2VL", OLD, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": ("Qwen2_5_VL", OLD, {"window_size": 56, "fullatt_block_indexes": [1], **NEWER}),
    "qwen3_vl": ("Qwen3VL", INTERLEAVED, {"deepstack_visual_indexes": [0, 1], **SIXTEEN}),
    "qwen3_5": ("Qwen3_5", {**INTERLEAVED, "mrope_section": [2, 1, 1]}, SIXTEEN),
}
LINEAR = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")  # of linear attention


def build_config(family, tokenizer):
    name, rope, vision = FAMILIES[family]
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"initializer_range": 0.15, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 1e4, **rope}
    if family == "qwen3_5":  # two layers of linear attention, one of full
        text |= {"full_attention_interval": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        rope |= {"partial_rotary_factor": 0.5}
    tokens = {"image": "image_pad", "video": "video_pad"}
    tokens |= {"vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{key}_token_id": f"<|{token}|>" for key, token in tokens.items()}
    return getattr(transformers, f"{name}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 4, "initializer_range": 0.2, **vision},
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
        tie_word_embeddings=False,
    )


def build_family_processor(family):
    patch = FAMILIES[family][2].get("patch_size", 14)
    size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}
    images = transformers.Qwen2VLImageProcessor(size=size, patch_size=patch)
    name = "Qwen3VL" if family == "qwen3_5" else FAMILIES[family][0]
    videos = getattr(transformers, "Qwen2VL" if patch == 14 else "Qwen3VL") if False else None
    return name, images, videos
