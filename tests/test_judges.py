"""The same promises for Qwen2-VL, Qwen2.5-VL and Qwen3-VL: tiny random weights, the real image processor, saved to disk as
the hub has them (keys, config.json, preprocessor_config.json) and loaded by common.load_judge."""
import copy
import json
import shutil

import common
import pytest
import torch
import build_world
from conftest import correct_rows, judged_rows, run_here, stage, train
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

three = stage("03_train_ift")
ROWS = judged_rows() + correct_rows()
FAMILIES = {"qwen2_vl": ("Qwen2VL", 14), "qwen2_5_vl": ("Qwen2_5_VL", 14), "qwen3_vl": ("Qwen3VL", 16)}  # class names, patch size
# Qwen2-VL and Qwen2.5-VL put a system turn before the first message, Qwen3-VL does not.
SYSTEM = "<|im_start|>system\nthe objects in the image<|im_end|>\n"
EPSILON = 1e-4  # largest difference in nats between two ways to compute the same number in float32


def build_config(family, tokenizer):
    import transformers
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.15, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    rope, vision = {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}, dict(depth=2, num_heads=4, initializer_range=0.2)
    if family == "qwen2_vl":
        vision |= dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
    elif family == "qwen2_5_vl":  # windows of 2 x 2 image tokens in the first block, full attention in the second
        vision |= dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=56, fullatt_block_indexes=[1])
    else:
        text |= dict(head_dim=16)
        rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
        vision |= dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, patch_size=16, num_position_embeddings=64,
                       deepstack_visual_indexes=[0, 1])
    token = tokenizer.convert_tokens_to_ids
    return getattr(transformers, FAMILIES[family][0] + "Config")(
        text_config=text | {"rope_parameters": {"rope_type": "default", **rope}}, vision_config=vision,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"), tie_word_embeddings=False,
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))


def save_as_on_the_hub(model, processor, family, folder):
    """Qwen2-VL's and Qwen2.5-VL's published checkpoints are older than today's names: "model.layers", "visual.blocks", one
    flat config with rope_scaling, bounds of the picture as min_pixels and max_pixels. Qwen3-VL has today's."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    vision = processor.image_processor
    bounds = {"size": dict(vision.size)} if family == "qwen3_vl" else {
        "min_pixels": vision.size["shortest_edge"], "max_pixels": vision.size["longest_edge"]}
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({
        **bounds, "patch_size": vision.patch_size, "temporal_patch_size": 2, "merge_size": 2, "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std), "processor_class": type(processor).__name__,
        "image_processor_type": "Qwen2VLImageProcessor" + ("Fast" if family == "qwen3_vl" else "")}))
    keys = {name: name for name in model.state_dict()}
    if family != "qwen3_vl":
        keys = {name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for name in keys}
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        config |= {k: v for k, v in text.items() if k not in ("model_type", "dtype", "layer_types")} | {
            "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        config["vision_config"].pop("model_type")
        (folder / "config.json").write_text(json.dumps(config))
    save_file({keys[name]: w.contiguous() for name, w in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="session", params=FAMILIES)
def judge(request, tmp_path_factory):
    """(family, folder, model, processor): as a user loads it. Never change the model."""
    import transformers
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    name, patch = FAMILIES[family]
    tokenizer = build_world.build_processor().tokenizer
    factor = (2 * patch) ** 2
    size = {"shortest_edge": 4 * factor, "longest_edge": 64 * factor}
    videos = getattr(transformers, ("Qwen3" if family == "qwen3_vl" else "Qwen2") + "VLVideoProcessor")(size=size)
    processor = getattr(transformers, name + "Processor")(
        transformers.Qwen2VLImageProcessor(size=size, patch_size=patch), tokenizer, videos,
        chat_template=("" if family == "qwen3_vl" else SYSTEM) + build_world.CHAT_TEMPLATE)
    torch.manual_seed(1)
    model = getattr(transformers, name + "ForConditionalGeneration")(build_config(family, tokenizer))
    model.generation_config = transformers.GenerationConfig(eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
                                                            pad_token_id=tokenizer.pad_token_id)
    save_as_on_the_hub(model, processor, family, folder)
    loaded = common.load_judge(str(folder), device="cpu")
    assert type(loaded[0]) is type(model) and loaded[0].dtype == torch.float32
    assert loaded[0].config.get_text_config().rope_parameters["mrope_section"] == ([4, 2, 2] if family == "qwen3_vl" else [2, 3, 3])
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded[0].state_dict()[key], weight), key
    return family, folder, *loaded


def encode(processor, pictures, rows=ROWS):
    return three.encode_supervised(processor, [row["text"] for row in rows], [pictures / row["image"] for row in rows],
                                   [row["response"] for row in rows])


def requests(pictures):
    return [{"id": row["id"], "image": pictures / row["image"], "text": row["text"]} for row in ROWS]


# ---- Encoding and training -------------------------------------------------------------------------------------------
def test_label_mask_is_response_and_stop_token(judge, pictures):
    family, _, _, processor = judge
    inputs, labels = encode(processor, pictures)
    assert [processor.tokenizer.decode(row[row != -100]) for row in labels] == [row["response"] + "<|im_end|>" for row in ROWS]
    assert torch.equal(inputs["input_ids"][labels != -100], labels[labels != -100])
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], ROWS):  # the processor's own chat template
        text = processor.tokenizer.decode(ids[mask == 1])
        assert text.startswith(SYSTEM if family != "qwen3_vl" else "<|im_start|>user\n<|vision_start|>")
        assert text.endswith(f"{row['text']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<|im_end|>")


@torch.no_grad()
def test_padded_batch_gives_the_log_odds_of_single_rows(judge, pictures):
    _, _, model, processor = judge
    ids = common.verdict_token_ids(processor.tokenizer)

    def log_odds(rows):
        return three.log_odds_of_verdict(*three.forward(model, *encode(processor, pictures, rows)), processor.tokenizer, ids)
    batch, rows = log_odds(judged_rows()), judged_rows()
    inputs, labels = encode(processor, pictures, rows)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 4 and len(set(map(tuple, inputs["image_grid_thw"].tolist()))) == 3
    single = torch.cat([log_odds([row]) for row in rows])
    assert (batch - single).abs().max() <= EPSILON and batch.std() > 0.1
    other = [{**row, "image": rows[i - 1]["image"]} for i, row in enumerate(rows)]  # the picture matters to these weights
    assert (log_odds(other) - batch).abs().median() > 0.03
    # The head on supervised positions only equals the full computation.
    full, short = model(**inputs).logits, three.forward(model, inputs, labels)[0]
    assert short.shape[1] < full.shape[1] and torch.allclose(full[:, -short.shape[1]:], short, atol=1e-5)


def test_one_step_lowers_the_loss(judge, pictures, tmp_path):
    _, _, model, processor = judge
    before, after = train(three.add_lora(copy.deepcopy(model), 4), processor, pictures, tmp_path, steps=2, lr=3e-3)
    assert after["loss"] < before["loss"] - 0.01 and after["critique"] < before["critique"] and after["correct"] < before["correct"]


# ---- Adapters --------------------------------------------------------------------------------------------------------
def test_lora_touches_the_language_model_only(judge):
    family, _, base, _ = judge
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {f"model.language_model.layers.{i}.{part}_proj" for i in range(3) for part in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    vision = {name for name in linear if name.startswith("model.visual.")}
    assert linear == expected | vision | {"lm_head"}  # the list is complete: there is no other linear layer to adapt
    assert {"qwen2_vl": "model.visual.merger.mlp.0", "qwen2_5_vl": "model.visual.blocks.0.mlp.gate_proj",
            "qwen3_vl": "model.visual.deepstack_merger_list.0.linear_fc1"}[family] in vision
    model = three.add_lora(copy.deepcopy(base), 4)
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {f"base_model.model.{name}.lora_{x}.default.weight" for name in expected for x in "AB"}
    full = three.add_lora(copy.deepcopy(base), 0)
    assert {name for name, w in full.named_parameters() if w.requires_grad} == {
        name for name, _ in base.named_parameters() if not name.startswith("model.visual.")}


@pytest.fixture(scope="session")
def adapter(judge, pictures, tmp_path_factory):
    """(PEFT model after one step, folder with its adapter)."""
    _, _, base, processor = judge
    folder, model = tmp_path_factory.mktemp("adapter"), three.add_lora(copy.deepcopy(base), 4)
    train(model, processor, pictures, folder, lr=1e-2)
    three.save_checkpoint(model, processor, folder)
    return model, folder / "adapter"


@torch.no_grad()
def test_adapter_loads_into_plain_peft(judge, adapter, pictures):
    _, folder, base, processor = judge
    inputs, _ = encode(processor, pictures)
    expected = adapter[0](**inputs).logits
    assert not torch.allclose(base(**inputs).logits, expected, atol=1e-2)
    fresh = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(PeftModel.from_pretrained(fresh, str(adapter[1])).eval()(**inputs).logits, expected)
    assert torch.equal(common.load_judge(str(folder), adapter[1], "cpu")[0](**inputs).logits, expected)


def test_adapter_that_does_not_fit_is_refused(judge, adapter, tmp_path):
    _, folder, _, _ = judge
    shutil.copytree(adapter[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers.0.self_attn.q_proj", "blocks.0.query"): w for name, w in load_file(file).items()}, file)
    with pytest.raises(SystemExit) as error:
        common.load_judge(str(folder), tmp_path / "adapter", "cpu")
    only_adapter, only_model = str(error.value).split("only in the model")
    for x in "AB":
        assert f"layers.0.self_attn.q_proj.lora_{x}.weight" in only_model and f"blocks.0.query.lora_{x}.weight" in only_adapter


# ---- Sampling --------------------------------------------------------------------------------------------------------
@pytest.fixture
def raw(judge, monkeypatch):
    """common.sample that gives each sample's token ids and their log-odds instead of text and verdict. Every seventh token
    ends a text, so that samples of random weights end at different places."""
    _, _, model, processor = judge
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(0, len(processor.tokenizer), 7)))
    monkeypatch.setattr(common, "_finish", lambda tokenizer, tokens, log_odds, *_: (tokens, log_odds))
    return common.sample


@torch.no_grad()
def test_greedy_equals_generate_and_log_odds_a_separate_forward(judge, pictures, raw):
    _, _, model, processor = judge
    asked, stops, n = requests(pictures), model.generation_config.eos_token_id, 10
    inputs = common.encode_prompts(processor, [r["text"] for r in asked], [r["image"] for r in asked])
    expected = model.generate(**inputs, max_new_tokens=n, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    answers = [samples[0] for samples in raw(model, processor, asked, temperature=0, max_new_tokens=n)]
    assert len({tuple(tokens.tolist()) for tokens, _ in answers}) > 4
    id_a, id_b = (processor.tokenizer.convert_tokens_to_ids(f" {letter}") for letter in "AB")
    seen = []
    for request, wanted, (tokens, log_odds) in zip(asked, expected.tolist(), answers):
        length = next((k + 1 for k, token in enumerate(wanted) if token in stops), n)
        assert tokens[:length].tolist() == wanted[:length]
        alone = common.encode_prompts(processor, [request["text"]], [request["image"]])
        P, written = alone["input_ids"].shape[1], tokens[None, :length]
        alone["input_ids"] = torch.cat([alone["input_ids"], written], 1)
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        alone["mm_token_type_ids"] = torch.cat([alone["mm_token_type_ids"], torch.zeros_like(written)], 1)
        logits = model(**alone).logits[0, P - 1:-1]  # (length, V)
        assert (log_odds[:length, 0] - (logits[:, id_a] - logits[:, id_b])).abs().max() <= EPSILON
        seen += log_odds[:length, 0].tolist()
    assert torch.tensor(seen).std() > 0.1


def test_samples_do_not_depend_on_neighbours_or_batch_size(judge, pictures, raw):
    _, _, model, processor = judge
    asked = requests(pictures)

    def sample(some, batch_size):
        answers = raw(model, processor, some, 2, 1.0, 10, seed=5, batch_size=batch_size)
        return {request["id"]: samples for request, samples in zip(some, answers)}
    together = sample(asked, 64)
    assert any((tokens == -1).any() for samples in together.values() for tokens, _ in samples)  # some left the batch early
    for some, size in ((asked, 1), (asked, 6), (asked[::-1], 64), (asked[3:5], 64)):
        for key, samples in sample(some, size).items():
            for (tokens, log_odds), (expected, expected_log_odds) in zip(samples, together[key]):
                n = next((k + 1 for k, token in enumerate(expected.tolist()) if token in model.generation_config.eos_token_id), 10)
                assert tokens[:n].tolist() == expected[:n].tolist()
                assert (log_odds[:n] - expected_log_odds[:n]).abs().max() <= EPSILON


# ---- The picture's bound ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bound", [1, 3, 12, 40])
def test_max_image_tokens_bounds_every_picture(judge, bound):
    """Also strips, which are longer than the bound, and small pictures, which the processor enlarges."""
    _, folder, _, processor = judge
    bounded = common.load_judge(str(folder), device="cpu", max_image_tokens=bound)[1]
    pictures = [Image.new("RGB", size) for size in (
        (2000, 1500), (900, 2100), (640, 480), (3000, 100), (10, 2500), (4, 900), (60, 60), (28, 28), (10, 300), (9, 1), (1, 1))]
    count = [[int((ids == p.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum())
              for ids in common.encode_prompts(p, ["red?"] * len(pictures), pictures)["input_ids"]] for p in (bounded, processor)]
    assert max(count[0]) <= bound and min(count[0]) >= 1
    assert min(count[0][:3]) >= bound / 2  # it is a bound, not a way to see nothing
    assert max(count[1]) > 40 and min(count[1]) >= 4  # what the checkpoint itself asks for


def test_strip_gets_bars_and_is_not_distorted():
    strip = Image.new("RGB", (300, 10), (255, 0, 0))
    assert common.load_image(strip).size == (300, 10) and common.load_image(strip.rotate(90, expand=True), 12).size == (25, 300)
    padded = common.load_image(strip, aspect=12)
    assert padded.size == (300, 25)
    red = [padded.getpixel((150, y)) == (255, 0, 0) for y in range(25)]
    assert sum(red) == 10 and not red[0] and not red[-1]


# ---- Memory: activation checkpointing, dtypes, what is announced before loading --------------------------------------
@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_activations_give_the_same_gradients(judge, pictures, tmp_path, monkeypatch, rank):
    _, _, base, processor = judge
    recomputed, plain = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lambda *args, **kwargs: (
        recomputed.append(kwargs["use_reentrant"]), plain(*args, **kwargs))[1])
    gradients, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: (gradients.append(torch.cat([
        w.grad.flatten() for group in self.param_groups for w in group["params"] if w.grad is not None])), step(self, *args))[1])
    for on in (False, True):
        torch.manual_seed(0)
        model = three.add_lora(copy.deepcopy(base), rank)
        train(model, processor, pictures, tmp_path / f"{rank}{on}", bt_weight=0.5, micro_batch=3, checkpoint_activations=on)
        assert bool(recomputed) == on
    assert gradients[0].norm() > 0.1 and torch.allclose(*gradients, atol=1e-6)
    assert recomputed == [False] * 3 * 4  # three layers, two micro-batches of each kind; none in the vision tower
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not common.unwrap(model).get_input_embeddings()._forward_hooks  # sampling is as it was
    assert len(common.sample(model, processor, requests(pictures)[:2], max_new_tokens=3)) == 2 and len(recomputed) == 12


@pytest.mark.parametrize("on, words", [(False, "--checkpoint-activations saves more"),
                                       (True, "--checkpoint-activations is on already")])
def test_out_of_memory_in_training_is_one_line(judge, pictures, tmp_path, monkeypatch, on, words):
    _, _, base, processor = judge

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
    monkeypatch.setattr(three, "forward", no_room)
    with pytest.raises(SystemExit) as error:
        train(three.add_lora(copy.deepcopy(base), 4), processor, pictures, tmp_path, checkpoint_activations=on)
    assert all(flag in str(error.value) for flag in ("--micro-batch", "--max-image-tokens", words)) and "\n" not in str(error.value)


def bf16_copy(model):
    return copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_trained_is_float32_on_a_bf16_model(judge, pictures, tmp_path, monkeypatch, capsys, rank):
    """And the announced memory is what the weights, gradients and the optimizer's state really take."""
    _, folder, base, processor = judge
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 40, 2 ** 40))
    torch.manual_seed(0)
    model = three.add_lora(bf16_copy(base), rank)
    used, step = [], torch.optim.AdamW.step

    def measured_step(self, *args):
        step(self, *args)
        trained = [w for group in self.param_groups for w in group["params"]]
        assert {w.dtype for w in trained} == {w.grad.dtype for w in trained} == {torch.float32}
        moments = [x for state in self.state.values() for name, x in state.items() if name != "step"]
        assert len(moments) == 2 * len(trained) and {x.dtype for x in moments} == {torch.float32}
        used.append(sum(w.nbytes for w in model.parameters()) + sum(w.grad.nbytes for w in trained) + sum(x.nbytes for x in moments))
    monkeypatch.setattr(torch.optim.AdamW, "step", measured_step)
    lines = train(model, processor, pictures, tmp_path, steps=3, lr=3e-3)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    assert {w.dtype for name, w in model.named_parameters() if not w.requires_grad} == {torch.bfloat16}
    capsys.readouterr()
    monkeypatch.setattr(common, "stop", lambda message: pytest.fail(message))
    three.announce(str(folder), torch.device("cuda"), "task", "flags", lambda blank: three.add_lora(blank, rank))
    said = capsys.readouterr().out
    assert said == (f"task: {sum(w.numel() for w in model.parameters()) / 1e6:.2f} M weights in bfloat16, "
                    f"{sum(w.numel() for w in model.parameters() if w.requires_grad) / 1e6:.2f} M trained in float32; "
                    f"{used[0] / 2 ** 30:.2f} GiB on cuda, activations not counted\n")
    # to the byte: the GPU that has one byte less is too small
    for short, fits in ((0, True), (1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (used[0] - short, 2 ** 40))
        monkeypatch.setattr(common, "stop", lambda message: stopped.append(message))
        stopped = []
        three.announce(str(folder), torch.device("cuda"), "task", "flags", lambda blank: three.add_lora(blank, rank))
        assert bool(stopped) != fits
    # shared out among four processes, all of it takes a quarter in each
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (used[0] / 4, 2 ** 40))
    monkeypatch.setattr(common, "stop", lambda message: pytest.fail(message))
    three.announce(str(folder), torch.device("cuda"), "task", "flags", lambda blank: three.add_lora(blank, rank), 4)
    assert f"{used[0] / 4 / 2 ** 30:.2f} GiB on cuda, one of 4 shares; whole layers and activations not" in capsys.readouterr().out


def test_adapter_of_a_bf16_model_goes_on_in_float32(judge, adapter):
    model = common.load_adapter(bf16_copy(judge[2]), adapter[1], trainable=True)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    saved = load_file(adapter[1] / "adapter_model.safetensors")
    assert {w.dtype for w in trained.values()} == {w.dtype for w in saved.values()} == {torch.float32}
    assert all(torch.equal(trained[name.replace(".weight", ".default.weight")], w) for name, w in saved.items())


def test_gpu_that_is_too_small_is_refused_before_loading(judge, monkeypatch, capsys):
    _, folder, _, _ = judge
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 2 ** 40))
    monkeypatch.setattr(common.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    args = three.parse_args(["--model", str(folder), "--device", "cuda"])
    with pytest.raises(SystemExit, match="the GPU has 0.00 GiB free, 0.00 GiB are needed .*--model"):
        three.load_judge(args)
    assert "M weights in bfloat16; 0.00 GiB on cuda" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        three.announce_training(args, 4, "8 critiques")
    assert all(flag in str(error.value) for flag in ("--model", "--lora-rank", "--micro-batch", "--max-image-tokens"))


def test_seven_billion_parameters_are_counted_without_weights(tmp_path, monkeypatch, capsys):
    """Qwen2-VL-7B-Instruct's published config: 8,291,375,616 parameters; rank 16 on its seven linear layers x 28: 40,370,176."""
    from transformers import Qwen2VLConfig
    Qwen2VLConfig(text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                                   num_key_value_heads=4, vocab_size=152064), vision_config=dict(hidden_size=3584),
                  tie_word_embeddings=False).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2 ** 30, 24 * 2 ** 30))
    three.announce_training(three.parse_args(["--model", str(tmp_path), "--device", "cuda"]), 16, "8 critiques")
    said = capsys.readouterr().out
    assert "8 critiques; 300 steps of 32 critiques + as many correct answers, 8 at a time" in said
    assert "LoRA of rank 16" in said and "8331.75 M weights in bfloat16, 40.37 M trained in float32" in said
    assert f"{(8_291_375_616 * 2 + 40_370_176 * 16) / 2 ** 30:.2f} GiB on cuda" in said  # 16.05
    full = (7_615_616_512 * 16 + 675_759_104 * 2) / 2 ** 30  # the language model, the vision tower
    with pytest.raises(SystemExit, match=f"24.00 GiB free, {full:.2f} GiB are needed"):
        three.announce_training(three.parse_args(["--model", str(tmp_path), "--device", "cuda"]), 0, "8 critiques")


# ---- From a published file to a score --------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("judge", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_five_stages_on_a_povid_file(judge, world, tmp_path, capsys):
    """By the real arguments. Random weights write nothing that the filters keep, so the judge is first taught, by heart,
    the critiques of the very pairs: every filter, margin and verdict of what follows is the judge's own doing."""
    _, _, model, processor = judge
    (tmp_path / "coco").mkdir()
    pairs = [json.loads(line) for line in (world / "heldout.jsonl").read_text().splitlines()][:14]
    for i, pair in enumerate(pairs):
        Image.open(world / pair["image"]).save(tmp_path / "coco" / f"COCO_train2014_{i:012d}.jpg", quality=95)
    (tmp_path / "povid.json").write_text(json.dumps([{
        "id": f"COCO_train2014_{i:012d}", "image": f"./data/coco/COCO_train2014_{i:012d}.jpg", **{
            field: [{"from": "human", "value": f"<image>\n{pair['prompt']}"}, {"from": "gpt", "value": pair[side]}]
            for side, field in (("chosen", "conversations"), ("rejected", "rejected_conversations"))}}
        for i, pair in enumerate(pairs)]))
    here = ["--run", str(tmp_path / "run")]
    run_here(["01_build_preferences.py", *here, "--pairs", str(tmp_path / "povid.json"), "--image-root", str(tmp_path / "coco"),
                "--model", str(tmp_path / "judge"), "--expert", str(world / "expert.pt"), "--validation", "2", "--train", "4"])
    assert "read as POVID, 14 of 14 rows" in capsys.readouterr().out

    made = [json.loads(line) for line in (tmp_path / "run/01_preferences/preferences.jsonl").read_text().splitlines()]
    vocabulary = json.loads((tmp_path / "run/01_preferences/vocabulary.json").read_text())
    assert len(made) >= 11  # the detector may call a true object absent
    rows, two = [], stage("02_generate_critiques")
    for pair in made:
        status = {found["object"]: found["status"] for found in pair["evidence"]}
        for question in common.both_orders(pair):
            reference = two.render_reference(question, status, vocabulary)
            rows += [{"id": question["id"], "image": pair["image"], "label": question["label"],
                      "response": reference.replace(": unsure", ": yes"), "text": common.build_judge_prompt(
                          pair["prompt"], question["response_a"], question["response_b"], reference=asked)}
                     for asked in (None, reference)]
    learner = three.add_lora(copy.deepcopy(model), 0)
    (tmp_path / "by_heart").mkdir()
    three.train(learner, processor, rows, [], tmp_path / "by_heart", steps=140, lr=3e-3, lam=0.0, bt_weight=0.0, batch_size=32,
                micro_batch=32, seed=0, image_root=tmp_path / "coco", max_response_tokens=96)
    learner.save_pretrained(tmp_path / "judge")
    processor.save_pretrained(tmp_path / "judge")

    sizes = ["--max-new-tokens", "96"]
    training = [*sizes, "--steps", "3", "--train-batch", "8", "--lr", "1e-4"]
    run_here(["02_generate_critiques.py", *here, *sizes, "--critiques", "2"])
    run_here(["03_train_ift.py", *here, *training])
    run_here(["04_rejection_sampling.py", *here, *training, "--iterations", "1", "--pool", "5", "--samples", "4"])
    assert "iteration 1: kept" in capsys.readouterr().out
    run_here(["05_evaluate.py", *here, *sizes, "--pairs", str(tmp_path / "povid.json"), "--image-root", str(tmp_path / "coco")])
    table = json.loads((tmp_path / "run/05_evaluation/metrics.json").read_text())["table"]
    assert {"base", "after 03", "margin, iteration 1"} <= set(table)
    assert table["margin, iteration 1"]["accuracy"] >= 0.7 and table["margin, iteration 1"]["unparseable"] <= 0.2
