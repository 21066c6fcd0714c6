"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: tiny, random, loaded from disk; faults of models."""

import copy
import shutil

import conftest
import pytest
import torch
import transformers
from build_world import CHAT_TEMPLATE, TOKENS, build_processor
from conftest import EPSILON, correct_rows, encode, fit, judged_rows, requests_of, stage
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file

import common

three = stage("03_train_ift")
NEWER = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}  # vision towers
SIXTEEN = {"patch_size": 16, "num_position_embeddings": 64, **NEWER}
INTERLEAVED = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
OLD, HALF = {"mrope_section": [2, 3, 3]}, {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
FAMILIES = {  # transformers' class, positions, vision tower
    "qwen2_vl": ("Qwen2VL", OLD, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2_5_vl": ("Qwen2_5_VL", OLD, {"window_size": 56, "fullatt_block_indexes": [1], **NEWER}),
    "qwen3_vl": ("Qwen3VL", INTERLEAVED, {"deepstack_visual_indexes": [0, 1], **SIXTEEN}),
    "qwen3_5": ("Qwen3_5", {**INTERLEAVED, **HALF}, SIXTEEN),
}


def build_config(family, tokenizer):
    name, rope, vision = FAMILIES[family]
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"initializer_range": 0.15, "eos_token_id": tokenizer.eos_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    rope = {"rope_type": "default", "rope_theta": 1e4, **rope}
    if family == "qwen3_5":  # two layers of linear attention, one of full
        text |= {"full_attention_interval": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    return getattr(transformers, f"{name}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 4, "initializer_range": 0.2, **vision},
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in TOKENS.items()},
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session", params=FAMILIES)
def judge(request, tmp_path_factory):
    """(family, folder, model, processor): as a user loads it. Never change the model."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    name, patch = FAMILIES[family][0], FAMILIES[family][2].get("patch_size", 14)
    size = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2}
    tokenizer = build_processor().tokenizer
    images = transformers.Qwen2VLImageProcessor(size=size, patch_size=patch)
    parts = (images, tokenizer, transformers.Qwen2VLVideoProcessor())
    kind = getattr(transformers, f"{'Qwen3VL' if family == 'qwen3_5' else name}Processor")
    processor = kind(*parts, chat_template=CHAT_TEMPLATE)
    torch.manual_seed(1)
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    model = model_class(build_config(family, tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded, loaded_processor = common.load_judge(str(folder), device="cpu")
    loaded_processor.tokenizer = tokenizer  # Qwen3.5's own would split by BPE
    assert type(loaded) is model_class and loaded.dtype == torch.float32 and not loaded.training
    for key, weight in loaded.named_parameters():
        assert torch.equal(model.state_dict()[key], weight) and not weight.requires_grad
    return family, folder, loaded, loaded_processor


# ---- The same numbers, however computed ----------------------------------------------------------
@pytest.mark.parametrize("temperature, n", [(0.0, 1), (1.0, 3)])
def test_samples_are_those_of_the_row_alone(judge, pictures, raw, monkeypatch, temperature, n):
    """Tokens and log-odds; greedy ones are generate's. Image tokens, which a plain forward would
    take for pictures, end a text, as many others do."""
    family, _, model, processor = judge
    ends = [*range(0, len(processor.tokenizer), 7), *processor.tokenizer.all_special_ids]
    ends += [model.config.image_token_id, model.config.video_token_id]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    some = requests_of(judged_rows() + correct_rows(), pictures)
    for rows, size in ((some, 64), (some[::-1], 3 * n), (some[3:5], 64)):
        answers = raw(model, processor, rows, n, temperature, 10, seed=5, batch_size=size)
        assert getattr(model.model, "rope_deltas", None) is None  # nothing is left of these prompts
        assert model.model.language_model.config._attn_implementation == "sdpa"
        how, lengths = (ends, temperature, 5), []
        for row, samples in zip(rows, answers):
            lengths += conftest.check_samples(model, processor, row, samples, *how)
        assert len(rows) < 5 or len(set(lengths)) > 1  # some leave the batch early
    if temperature == 0:
        written = conftest.check_greedy(model, processor, some, raw, 10, ends)
        assert len({tuple(tokens) for tokens in written}) > 3
    inputs = common.encode_prompts(processor, ["red?", "blue?"], [pictures / "0.png"] * 2)
    with torch.no_grad():  # a prompt is there once, where all layers attend
        layers = common.Decoding(model, inputs, 3, 4).cache.layers
    n_shared = sum(isinstance(x, common.SharedPrompt) and len(x.keys) == 2 for x in layers)
    assert n_shared == (0 if family == "qwen3_5" else 3)


@pytest.mark.parametrize("judge", ["qwen2_vl", "qwen3_vl"], indirect=True)  # patches of 14 and 16
def test_max_image_tokens_bounds_every_picture(judge):
    _, folder, model, _ = judge
    sizes = [(640, 480), (400, 300), (1500, 50), (10, 300), (60, 60), (28, 28), (9, 3), (1, 1)]
    for bound in (4, 12, 40, None):
        processor = common.load_judge(str(folder), device="cpu", max_image_tokens=bound)[1]
        images = [Image.new("RGB", x) for x in sizes if max(x) <= (bound or 40) * min(x)]
        ids = common.encode_prompts(processor, ["red?"] * len(images), images)["input_ids"]
        counts = (ids == model.config.image_token_id).sum(1).tolist()
        assert min(counts) >= (1 if bound else 4)  # None: what the checkpoint wants, 4 to 64
        assert max(counts) <= (bound or 64) and min(counts[:2]) >= (bound or 64) / 2


# ---- Adapters ------------------------------------------------------------------------------------
def test_lora_touches_the_language_model_only(judge):
    family, _, base, _ = judge
    linear = {name for name, module in base.named_modules() if type(module) is torch.nn.Linear}
    expected = {name for name in linear if name.startswith("model.language_model.layers.")}
    assert len(expected) == (2 * 8 + 7 if family == "qwen3_5" else 3 * 7)  # attention and MLP
    assert {x for x in linear - expected if "visual" not in x} == {"lm_head"}

    def trained(rank):
        model = three.make_trainable(copy.deepcopy(base), rank)
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    adapters = {f"base_model.model.{x}.lora_{s}.default.weight" for x in expected for s in "AB"}
    assert trained(4) == adapters
    assert trained(0) == {name for name, _ in base.named_parameters() if "visual" not in name}


def test_an_adapter_is_plain_peft_and_recomputes_the_same(judge, pictures, tmp_path, monkeypatch):
    _, folder, base, processor = judge
    steps, recomputed, plain = [], [], torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        recomputed.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    for flag in ("--no-checkpoint-activations", "--checkpoint-activations"):
        model, how = copy.deepcopy(base), {"lora_rank": 4, "lr": 1e-2, "bt_weight": 0.5}
        adapter = fit(model, processor, pictures, tmp_path / flag, [flag], **how)
        assert bool(recomputed) == (flag == "--checkpoint-activations")
        [step] = conftest.read_rows(tmp_path / flag / "metrics.jsonl")
        steps.append([step["loss"], step["bradley_terry"], step["grad_norm"]])
    assert steps[0] == pytest.approx(steps[1], rel=1e-3) and min(steps[0]) > 0.1
    inputs, _ = encode(processor, pictures, judged_rows())
    fresh = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.allclose(base(**inputs).logits, expected, atol=1e-2)
        ours, _ = common.load_judge(str(folder), adapter, "cpu")
        for other in (ours, PeftModel.from_pretrained(fresh, str(adapter)).eval()):
            assert torch.allclose(other(**inputs).logits, expected, atol=EPSILON)
    small = common.load_adapter(copy.deepcopy(base).to(torch.bfloat16), adapter, trainable=True)
    small = three.make_trainable(small, 0)  # as it is, as 04 takes it
    trained = {name: w for name, w in small.named_parameters() if w.requires_grad}
    assert {w.dtype for w in trained.values()} == {torch.float32}
    for name, weight in load_file(adapter / "adapter_model.safetensors").items():
        assert torch.equal(trained.pop(name.replace(".weight", ".default.weight")), weight)
    assert not trained


# ---- Faults --------------------------------------------------------------------------------------
def rename(weights):
    for name in [name for name in weights if "layers.0.mlp.up_proj" in name]:
        weights[name.replace("layers.0.mlp.up_proj", "blocks.0.fc1")] = weights.pop(name)


def spoil(weights):
    weights[min(weights)].view(-1)[0] = float("nan")


@pytest.fixture(scope="module")
def saved(tiny, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")  # with base/ and adapter/
    base = shutil.copytree(tiny[0].config._name_or_path, folder / "base")
    model, processor = common.load_judge(str(base), device="cpu")
    fit(model, processor, pictures, folder, lora_rank=4)
    return folder


DAMAGES = [("base/model", rename, "--model .*base lacks 1 of its weights.*up_proj")]
DAMAGES += [("adapter/adapter_model", rename, "adapter does not fit the model: .*fc1")]
for file in ("base/model", "adapter/adapter_model"):
    DAMAGES.append((file, spoil, rf"{file[:4]}\w*: the weight \S+ is not finite"))
    DAMAGES.append((file, None, rf"{file[:4]}\w*: .*SafetensorError"))


@pytest.mark.parametrize("file, change, words", DAMAGES)
def test_damaged_weights_end_in_one_line(saved, tmp_path, file, change, words):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / f"{file}.safetensors"
    if change:
        change(weights := load_file(path))
        save_file(weights, path, {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:-100])
    checkpoint = folder / "adapter" if "adapter" in file else None
    with pytest.raises(SystemExit, match=words) as error:
        common.Judge(str(folder / "base"), checkpoint, device="cpu").loaded  # noqa: B018
    assert "\n" not in str(error.value)


def test_a_foreign_adapter(saved, tmp_path):
    other = shutil.copytree(saved / "base", tmp_path / "other")
    with pytest.raises(SystemExit, match="was trained on .*base, not on .*other"):
        common.load_judge(str(other), saved / "adapter", "cpu")
