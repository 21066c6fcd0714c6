"""The same promises for Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, of tiny random weights with the
real image processor, saved to disk and loaded by common.load_judge; adapters; faults of models."""

import copy
import shutil

import conftest
import pytest
import torch
import transformers
from build_world import CHAT_TEMPLATE, build_processor
from conftest import EPSILON, correct_rows, encode, fit, judged_rows, requests_of, stage
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
LINEAR = [f"linear_attn.{x}" for x in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")]
LINEAR += ["linear_attn.out_proj"]


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
    ids = {f"{kind}_token_id": f"<|{kind}_pad|>" for kind in ("image", "video")}
    ids |= {f"vision_{side}_token_id": f"<|vision_{side}|>" for side in ("start", "end")}
    return getattr(transformers, f"{name}Config")(
        text_config={**text, "rope_parameters": rope},
        vision_config={"depth": 2, "num_heads": 4, "initializer_range": 0.2, **vision},
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session", params=FAMILIES)
def judge(request, tmp_path_factory):
    """(family, folder, model, processor): as a user loads it. Never change the model."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    name, _, vision = FAMILIES[family]
    patch = vision.get("patch_size", 14)
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
    if family == "qwen3_5":  # transformers has a tokenizer of its own for it, which splits by BPE
        loaded_processor.tokenizer = tokenizer
    assert type(loaded) is model_class and loaded.dtype == torch.float32 and not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
    return family, folder, loaded, loaded_processor


# ---- The same numbers, however computed ----------------------------------------------------------
@pytest.mark.parametrize("temperature, n", [(0.0, 1), (1.0, 3)])
def test_samples_are_those_of_the_row_alone(judge, pictures, raw, monkeypatch, temperature, n):
    """Tokens and log-odds, whatever the neighbours; greedy ones are those of generate. Every
    seventh token ends a text: samples of random weights end at different places. So do image
    tokens, which no trained model writes and a plain forward would take for pictures."""
    family, _, model, processor = judge
    pads = [model.config.image_token_id, model.config.video_token_id]
    ends = [*range(0, len(processor.tokenizer), 7), *pads]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    ends = [*ends, processor.tokenizer.eos_token_id]
    some = requests_of(judged_rows() + correct_rows(), pictures)
    for rows, size in ((some, 64), (some[::-1], 3 * n), (some[3:5], 64)):
        answers = raw(model, processor, rows, n, temperature, 10, seed=5, batch_size=size)
        assert getattr(model.model, "rope_deltas", None) is None  # nothing is left of these prompts
        how, lengths = (ends, temperature, 5), []
        for row, samples in zip(rows, answers):
            lengths += conftest.check_samples(model, processor, row, samples, *how)
        assert len(rows) < 5 or min(lengths) < max(lengths)  # some leave the batch early
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
    """Large ones, strips that are no longer than the bound, small ones, which are enlarged."""
    _, folder, model, _ = judge
    sizes = [(640, 480), (400, 300), (1500, 50), (10, 300), (60, 60), (28, 28), (9, 3), (1, 1)]
    for bound in (4, 12, 40, None):
        processor = common.load_judge(str(folder), device="cpu", max_image_tokens=bound)[1]
        some = [size for size in sizes if max(size) <= (bound or 40) * min(size)]
        images = [Image.new("RGB", size) for size in some]
        ids = common.encode_prompts(processor, ["red?"] * len(images), images)["input_ids"]
        counts = (ids == model.config.image_token_id).sum(1).tolist()
        assert min(counts) >= (1 if bound else 4)  # None: what the checkpoint wants, 4 to 64
        assert max(counts) <= (bound or 64) and min(counts[:2]) >= (bound or 64) / 2


# ---- Adapters ------------------------------------------------------------------------------------
def test_lora_touches_the_language_model_only(judge):
    family, _, base, _ = judge
    expected, mlp = set(), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    for i in range(3):
        is_linear = family == "qwen3_5" and i < 2
        attention = LINEAR if is_linear else [f"self_attn.{x}_proj" for x in "qkvo"]
        expected |= {f"model.language_model.layers.{i}.{x}" for x in [*attention, *mlp]}
    linear = {name for name, module in base.named_modules() if type(module) is torch.nn.Linear}
    assert {x for x in linear if "visual" not in x} == expected | {"lm_head"}  # there is no other

    def trained(rank):
        model = three.make_trainable(copy.deepcopy(base), rank)
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    adapters = {f"base_model.model.{x}.lora_{s}.default.weight" for x in expected for s in "AB"}
    assert trained(4) == adapters
    assert trained(0) == {name for name, _ in base.named_parameters() if "visual" not in name}


def test_an_adapter_is_plain_peft_and_recomputes_the_same(judge, pictures, tmp_path, monkeypatch):
    """One step with and without --checkpoint-activations gives the same numbers; the adapter
    loads into plain PEFT, by load_judge and, on a bf16 model, as float32 that is trained on."""
    _, folder, base, processor = judge
    steps, recomputed, plain = [], [], torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        recomputed.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    for flag in ("--no-checkpoint-activations", "--checkpoint-activations"):
        torch.manual_seed(0)
        model = three.make_trainable(copy.deepcopy(base), 4)
        adapter = fit(model, processor, pictures, tmp_path / flag, [flag], lr=1e-2, bt_weight=0.5)
        assert bool(recomputed) == (flag == "--checkpoint-activations")
        step = conftest.read_rows(tmp_path / flag / "metrics.jsonl")[0]
        steps.append([step["loss"], step["bradley_terry"], step["grad_norm"]])
    assert steps[0] == pytest.approx(steps[1], rel=1e-3) and min(steps[0]) > 0.1
    inputs, _ = encode(processor, pictures, judged_rows())
    fresh = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.allclose(base(**inputs).logits, expected, atol=1e-2)
        plain_peft = PeftModel.from_pretrained(fresh, str(adapter)).eval()
        for other in (plain_peft, common.load_judge(str(folder), adapter, "cpu")[0]):
            assert torch.allclose(other(**inputs).logits, expected, atol=EPSILON)
    small = common.load_adapter(copy.deepcopy(base).to(torch.bfloat16), adapter, trainable=True)
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
    """A folder with base/ and adapter/."""
    folder = tmp_path_factory.mktemp("saved")
    shutil.copytree(tiny[0].config._name_or_path, folder / "base")
    model, processor = common.load_judge(str(folder / "base"), device="cpu")
    fit(three.make_trainable(model, 4), processor, pictures, folder)
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
    if change is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})
    checkpoint = folder / "adapter" if "adapter" in file else None
    with pytest.raises(SystemExit, match=words) as error:
        common.Judge(tmp_path, str(folder / "base"), checkpoint, device="cpu").loaded  # noqa: B018
    assert "\n" not in str(error.value)


def test_a_foreign_adapter_and_a_missing_model(saved, tmp_path):
    other = shutil.copytree(saved / "base", tmp_path / "other")
    with pytest.raises(SystemExit, match="was trained on .*base, not on .*other"):
        common.load_judge(str(other), saved / "adapter", "cpu")
    moved = shutil.copytree(saved / "base", tmp_path / "moved" / "base")  # the same, elsewhere
    assert common.load_judge(str(moved), saved / "adapter", "cpu")
    with pytest.raises(OSError, match="no_such_model"):  # common.run makes a line of it
        common.load_judge(str(tmp_path / "no_such_model"))
