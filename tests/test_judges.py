"""The same promises for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: tiny random weights, the real
image processor, saved to disk as the hub has them and loaded by common.load_judge."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from build_world import CHAT_TEMPLATE, build_processor
from conftest import (
    EPSILON,
    check_greedy,
    check_samples,
    correct_rows,
    encode,
    judged_rows,
    requests_of,
    stage,
    train,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import common

three = stage("03_train_ift")
CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_5": "Qwen3_5",
}
OLD = ("qwen2_vl", "qwen2_5_vl")  # patches of 14 pixels, a system turn, checkpoints of older names
SYSTEM = "<|im_start|>system\nthe objects in the image<|im_end|>\n"
LINEAR = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")  # of linear attention


# ---- Tiny checkpoints ----------------------------------------------------------------------------
def build_config(family, tokenizer):
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "num_heads": 4, "initializer_range": 0.2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    if family == "qwen2_5_vl":  # windows of 2 x 2 image tokens in block 0, full attention in 1
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    if family not in OLD:
        text |= {"head_dim": 16}
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        vision |= {"patch_size": 16, "num_position_embeddings": 64}
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 1]}
    if family == "qwen3_5":  # two layers of linear attention, one of full
        text |= {"full_attention_interval": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        rope |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    token = tokenizer.convert_tokens_to_ids
    config_class = getattr(transformers, CLASSES[family] + "Config")
    return config_class(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def build_family_processor(family):
    patch = 14 if family in OLD else 16
    area = (2 * patch) ** 2  # of an image token, in pixels
    size = {"shortest_edge": 4 * area, "longest_edge": 64 * area}
    images = transformers.Qwen2VLImageProcessor(size=size, patch_size=patch)
    tokenizer = build_processor().tokenizer
    if family in OLD:
        videos = transformers.Qwen2VLVideoProcessor(size=size)
        template = SYSTEM + CHAT_TEMPLATE
    else:
        videos = transformers.Qwen3VLVideoProcessor(size=size)
        template = CHAT_TEMPLATE
    name = "Qwen3VL" if family == "qwen3_5" else CLASSES[family]
    processor_class = getattr(transformers, name + "Processor")
    return processor_class(images, tokenizer, videos, chat_template=template)


def save_as_on_the_hub(model, processor, family, folder):
    """Qwen2-VL's and Qwen2.5-VL's published checkpoints are older than today's names:
    "model.layers", "visual.blocks", one flat config with rope_scaling, bounds of the picture as
    min_pixels and max_pixels."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "processor_config.json").unlink()
    vision = processor.image_processor
    settings = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "processor_class": type(processor).__name__,
        "image_processor_type": "Qwen2VLImageProcessor" + ("" if family in OLD else "Fast"),
    }
    if family in OLD:
        settings["min_pixels"] = vision.size["shortest_edge"]
        settings["max_pixels"] = vision.size["longest_edge"]
    else:
        settings["size"] = dict(vision.size)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if family not in OLD:
        return
    weights = {}
    for name, weight in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        weights[name.replace("model.visual.", "visual.")] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "dtype", "layer_types"):
        text.pop(name, None)
    config |= text
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["vision_config"].pop("model_type")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session", params=CLASSES)
def judge(request, tmp_path_factory):
    """(family, folder, model, processor): as a user loads it. Never change the model."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    processor = build_family_processor(family)
    tokenizer = processor.tokenizer
    torch.manual_seed(1)
    model_class = getattr(transformers, CLASSES[family] + "ForConditionalGeneration")
    model = model_class(build_config(family, tokenizer))
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    save_as_on_the_hub(model, processor, family, folder)
    loaded, loaded_processor = common.load_judge(str(folder), device="cpu")
    if family == "qwen3_5":  # transformers has a tokenizer of its own for it, which splits by BPE
        loaded_processor.tokenizer = tokenizer
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    assert not any(weight.requires_grad for weight in loaded.parameters())
    rope = loaded.config.get_text_config().rope_parameters
    wanted = model.config.get_text_config().rope_parameters
    assert rope["mrope_section"] == wanted["mrope_section"]
    found = loaded.state_dict()
    for key, weight in model.state_dict().items():
        assert torch.equal(found[key], weight), key
    return family, folder, loaded, loaded_processor


@pytest.fixture(scope="module")
def rows():
    return judged_rows() + correct_rows()


# ---- Encoding and training -----------------------------------------------------------------------
def test_label_mask_is_response_and_stop_token(judge, pictures, rows):
    family, _, _, processor = judge
    inputs, labels = encode(processor, pictures, rows)
    decode = processor.tokenizer.decode
    for ids, mask, target, row in zip(
        inputs["input_ids"], inputs["attention_mask"], labels, rows
    ):  # the processor's own chat template
        assert decode(target[target != -100]) == row["response"] + "<|im_end|>"
        text = decode(ids[mask == 1])
        start = SYSTEM if family in OLD else "<|im_start|>user\n<|vision_start|>"
        answer = f"<|im_start|>assistant\n{row['response']}<|im_end|>"
        assert text.startswith(start) and text.endswith(f"{row['text']}<|im_end|>\n{answer}")


@torch.no_grad()
def test_padded_batch_gives_what_single_rows_give(judge, pictures):
    _, _, model, processor = judge
    rows = judged_rows()

    def of_rows(rows):
        """The responses' NLL in nats, row by row (B,)."""
        logits, labels = three.forward(model, *encode(processor, pictures, rows))
        nll = [three.nll_sum(logits[i : i + 1], labels[i : i + 1])[0] for i in range(len(rows))]
        return torch.stack(nll)

    batch = of_rows(rows)
    inputs, labels = encode(processor, pictures, rows)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 4
    assert len({tuple(grid) for grid in inputs["image_grid_thw"].tolist()}) == 3
    single = torch.cat([of_rows([row]) for row in rows])
    assert torch.allclose(batch, single, atol=5 * EPSILON) and batch.std() > 0.1
    other = [{**row, "image": rows[i - 1]["image"]} for i, row in enumerate(rows)]
    assert (of_rows(other) - batch).abs().median() > 0.03  # the picture matters to these weights
    # The head on supervised positions only equals the full computation.
    full, short = model(**inputs).logits, three.forward(model, inputs, labels)[0]
    assert short.shape[1] < full.shape[1]
    assert torch.allclose(full[:, -short.shape[1] :], short, atol=EPSILON)


def test_small_steps_lower_the_loss(judge, pictures, tmp_path):
    _, _, model, processor = judge
    learner = three.make_trainable(copy.deepcopy(model), 4)
    lines = train(learner, processor, pictures, tmp_path, steps=3, lr=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]


# ---- Adapters ------------------------------------------------------------------------------------
def layers_to_adapt(family):
    """The names of all linear layers of the language model but its head."""
    names = []
    for i in range(3):
        parts = [f"self_attn.{x}_proj" for x in "qkvo"]
        if family == "qwen3_5" and i < 2:
            parts = [f"linear_attn.{x}" for x in LINEAR]
        parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        names += [f"model.language_model.layers.{i}.{part}" for part in parts]
    return set(names)


def test_lora_touches_the_language_model_only(judge):
    family, _, base, _ = judge
    expected = layers_to_adapt(family)
    linear = set()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear.add(name)
    vision = {name for name in linear if name.startswith("model.visual.")}
    assert linear == expected | vision | {"lm_head"}  # the list is whole: there is no other
    assert any("proj" in name for name in vision)  # which the pattern must not take for its own
    model = three.make_trainable(copy.deepcopy(base), 4)
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    adapters = set()
    for name in expected:
        for side in "AB":
            adapters.add(f"base_model.model.{name}.lora_{side}.default.weight")
    assert trained == adapters
    full = three.make_trainable(copy.deepcopy(base), 0)
    trained = {name for name, w in full.named_parameters() if w.requires_grad}
    of_language = {name for name, _ in base.named_parameters() if "visual" not in name}
    assert trained == of_language


@pytest.fixture(scope="session")
def adapter(judge, pictures, tmp_path_factory):
    """(PEFT model after one step, folder with its adapter)."""
    _, _, base, processor = judge
    folder, model = tmp_path_factory.mktemp("adapter"), three.make_trainable(copy.deepcopy(base), 4)
    train(model, processor, pictures, folder, lr=1e-2)
    three.save_checkpoint(model, processor, folder)
    return model, folder / "adapter"


@torch.no_grad()
def test_adapter_loads_into_plain_peft(judge, adapter, pictures, rows):
    _, folder, base, processor = judge
    inputs, _ = encode(processor, pictures, rows)
    expected = adapter[0](**inputs).logits
    assert not torch.allclose(base(**inputs).logits, expected, atol=1e-2)
    fresh = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(fresh, str(adapter[1])).eval()
    ours = common.load_judge(str(folder), adapter[1], "cpu")[0]
    for model in (plain, ours):
        assert torch.allclose(model(**inputs).logits, expected, atol=EPSILON)
    assert not any(weight.requires_grad for weight in ours.parameters())


def test_adapter_of_other_layers_is_refused(judge, adapter, tmp_path):
    _, folder, _, _ = judge
    shutil.copytree(adapter[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {}
    for name, weight in load_file(file).items():
        renamed[name.replace("layers.0.mlp.up_proj", "blocks.0.fc1")] = weight
    save_file(renamed, file)
    with pytest.raises(SystemExit) as error:
        common.load_judge(str(folder), tmp_path / "adapter", "cpu")
    there, here = str(error.value).split(", not ")
    for side in "AB":
        assert f"layers.0.mlp.up_proj.lora_{side}.weight" in here
        assert f"blocks.0.fc1.lora_{side}.weight" in there


# ---- Memory: activation checkpointing, dtypes ----------------------------------------------------
@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_activations_give_the_same_gradients(
    judge, pictures, tmp_path, monkeypatch, rank
):
    _, _, base, processor = judge
    recomputed, plain = [], torch.utils.checkpoint.checkpoint
    gradients, step = [], torch.optim.AdamW.step

    def counted(*args, **kwargs):
        recomputed.append(kwargs["use_reentrant"])
        return plain(*args, **kwargs)

    def recorded_step(self, *args):
        weights = [w for group in self.param_groups for w in group["params"]]
        gradients.append(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]))
        return step(self, *args)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    for is_on in (False, True):
        torch.manual_seed(0)
        model = three.make_trainable(copy.deepcopy(base), rank)
        settings = {"bt_weight": 0.5, "micro_batch": 3, "checkpoint_activations": is_on}
        train(model, processor, pictures, tmp_path / f"{is_on}", **settings)
        assert bool(recomputed) == is_on
    difference = gradients[0] - gradients[1]
    assert difference.norm() < 1e-3 * gradients[0].norm() and gradients[0].norm() > 0.1
    # three layers, two micro-batches of each kind; none in the vision tower
    assert recomputed == [False] * 3 * 4
    # what follows is as it was: sampling recomputes nothing
    assert not common.unwrap(model).get_input_embeddings()._forward_hooks
    asked = requests_of(judged_rows()[:2], pictures)
    assert len(common.sample(model, processor, asked, max_new_tokens=3)) == 2
    assert len(recomputed) == 12


def bf16_copy(model):
    return copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_is_float32_on_a_bf16_model(judge, pictures, tmp_path, monkeypatch, rank):
    _, _, base, processor = judge
    torch.manual_seed(0)
    model = three.make_trainable(bf16_copy(base), rank)
    dtypes, step = set(), torch.optim.AdamW.step

    def recorded_step(self, *args):
        step(self, *args)
        for group in self.param_groups:
            dtypes.update(weight.dtype for weight in group["params"])
        for state in self.state.values():
            dtypes.update(x.dtype for x in state.values())

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    train(model, processor, pictures, tmp_path)
    assert dtypes == {torch.float32}
    frozen = {w.dtype for w in model.parameters() if not w.requires_grad}
    assert frozen == {torch.bfloat16}


def test_adapter_of_a_bf16_model_goes_on_in_float32(judge, adapter):
    model = common.load_adapter(bf16_copy(judge[2]), adapter[1], trainable=True)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    saved = load_file(adapter[1] / "adapter_model.safetensors")
    assert len(saved) == len(trained) > 0
    for name, weight in saved.items():
        ours = trained[name.replace(".weight", ".default.weight")]
        assert ours.dtype == torch.float32 and torch.equal(ours, weight)


# ---- Sampling ------------------------------------------------------------------------------------
@pytest.fixture
def stop_ids(judge, monkeypatch):
    """Every seventh token ends a text: samples of random weights end at different places. So do
    image tokens, which no trained model writes and a plain forward would take for pictures."""
    _, _, model, processor = judge
    ends = list(range(0, len(processor.tokenizer), 7))
    ends += [model.config.image_token_id, model.config.video_token_id]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    return [*ends, processor.tokenizer.eos_token_id]


def test_greedy_equals_generate(judge, pictures, rows, raw, stop_ids):
    _, _, model, processor = judge
    asked = requests_of(rows, pictures)
    written = check_greedy(model, processor, asked, raw, 10, stop_ids)
    assert len({tuple(tokens) for tokens in written}) > 3


@pytest.mark.parametrize("temperature, n", [(0.0, 1), (1.0, 3)])
def test_samples_are_those_of_the_row_alone(judge, pictures, rows, raw, stop_ids, temperature, n):
    """Tokens and log-odds, whatever the neighbours: by the uniform numbers and a plain forward."""
    family, _, model, processor = judge
    asked = requests_of(rows, pictures)
    for some, size in ((asked, 64), (asked[::-1], 3 * n), (asked[3:5], 64)):
        answers = raw(model, processor, some, n, temperature, 10, seed=5, batch_size=size)
        assert model.model.rope_deltas is None  # nothing is left of these prompts
        lengths = []
        for row, samples in zip(some, answers):
            lengths += check_samples(model, processor, row, samples, stop_ids, temperature, seed=5)
        assert len(some) < 5 or min(lengths) < max(lengths)  # some leave the batch early
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_which_caches_are_shared(judge, pictures):
    family, _, model, processor = judge
    inputs = common.encode_prompts(processor, ["red?", "blue?"], [pictures / "0.png"] * 2)
    with torch.no_grad():
        decoding = common.Decoding(model, inputs, n=3, room=4)
    assert decoding.is_shared == (family != "qwen3_5") and len(decoding.logits) == 6
    if decoding.is_shared:  # the prompt is kept once
        assert all(len(layer.prompt_keys) == 2 for layer in decoding.cache.layers)


# ---- The picture's bound -------------------------------------------------------------------------
@pytest.mark.parametrize("judge", ["qwen2_vl", "qwen3_vl"], indirect=True)  # patches of 14 and 16
def test_max_image_tokens_bounds_every_picture(judge):
    """Also strips, which are longer than the bound, and small pictures, which are enlarged."""
    _, folder, _, processor = judge
    large = [(400, 300), (180, 420), (640, 480)]
    odd = [(1500, 50), (5, 1250), (4, 900), (60, 60), (28, 28), (10, 300), (9, 1), (1, 1)]
    pictures = [Image.new("RGB", size) for size in large + odd]
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def count(processor):
        inputs = common.encode_prompts(processor, ["red?"] * len(pictures), pictures)
        return (inputs["input_ids"] == image_token).sum(1).tolist()

    for bound in (1, 3, 12, 40):
        counts = count(common.load_judge(str(folder), device="cpu", max_image_tokens=bound)[1])
        assert max(counts) <= bound and min(counts) >= 1
        assert min(counts[:3]) >= bound / 2  # it is a bound, not a way to see nothing
    assert max(count(processor)) > 40 and min(count(processor)) >= 4  # what the checkpoint asks for


def test_strip_gets_bars_and_is_not_distorted():
    strip = Image.new("RGB", (300, 10), (255, 0, 0))
    assert common.load_image(strip).size == (300, 10)
    assert common.load_image(strip.rotate(90, expand=True), 12).size == (25, 300)
    padded = common.load_image(strip, aspect=12)
    assert padded.size == (300, 25)
    is_red = [padded.getpixel((150, y)) == (255, 0, 0) for y in range(25)]
    assert sum(is_red) == 10 and not is_red[0] and not is_red[-1]
