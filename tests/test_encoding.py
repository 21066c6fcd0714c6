"""Encoding, label masks and one training step, on a tiny model with random weights."""
import copy
import shutil

import common
import pytest
import torch
import torch.nn.functional as F
from conftest import correct_rows, judged_rows, stage, train
from peft import PeftModel
from safetensors.torch import load_file, save_file

three, four = stage("03_train_ift"), stage("04_rejection_sampling")
ROWS = judged_rows() + correct_rows()


def encode(processor, pictures, rows=ROWS, limit=None):
    return three.encode_supervised(processor, [row["text"] for row in rows], [pictures / row["image"] for row in rows],
                                    [row["response"] for row in rows], limit)


def supervised(processor, labels):
    """The decoded text of each row's label mask."""
    return [processor.tokenizer.decode(row[row != -100]) for row in labels]


def test_label_mask_is_response_and_stop_token(tiny, pictures):
    _, processor = tiny
    stop = processor.tokenizer.eos_token
    inputs, labels = encode(processor, pictures)
    assert supervised(processor, labels) == [row["response"] + stop for row in ROWS]
    assert torch.equal(inputs["input_ids"][labels != -100], labels[labels != -100])
    assert inputs["attention_mask"][labels != -100].all() and len({len(x) for x in supervised(processor, labels)}) > 4
    # Supervised tokens follow each other, and nothing after them is seen.
    for row, mask in zip(labels, inputs["attention_mask"]):
        places = (row != -100).nonzero()[:, 0]
        assert places.tolist() == list(range(places[0], places[0] + len(places))) and not mask[places[-1] + 1:].any()


def test_padding_with_the_stop_token_does_not_mask_it(tiny, pictures):
    processor = copy.deepcopy(tiny[1])
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    inputs, labels = encode(processor, pictures)
    assert supervised(processor, labels) == [row["response"] + processor.tokenizer.eos_token for row in ROWS]
    expected, expected_labels = encode(tiny[1], pictures)
    assert torch.equal(labels, expected_labels) and torch.equal(inputs["attention_mask"], expected["attention_mask"])


@pytest.mark.parametrize("limit", [1, 4, 6])
def test_truncated_response_has_no_stop_token(tiny, pictures, limit):
    tokenizer = tiny[1].tokenizer
    for text, row in zip(supervised(tiny[1], encode(tiny[1], pictures, limit=limit)[1]), ROWS):
        ids = tokenizer(row["response"]).input_ids
        assert text == (tokenizer.decode(ids[:limit]) if len(ids) >= limit else row["response"] + tokenizer.eos_token)
        assert row["response"].startswith(text.removesuffix(tokenizer.eos_token))


def test_prompt_is_the_one_that_is_sampled_from(tiny, pictures):
    processor = tiny[1]
    prompts = common.encode_prompts(processor, [row["text"] for row in ROWS], [pictures / row["image"] for row in ROWS])
    inputs, labels = encode(processor, pictures)
    P = prompts["input_ids"].shape[1]
    assert set(inputs) == set(prompts) and (labels[:, :P] == -100).all() and (labels[:, P] != -100).all()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(inputs[name][:, :P], prompts[name]), name
    assert torch.equal(inputs["pixel_values"], prompts["pixel_values"])
    for row, ids, mask in zip(ROWS, prompts["input_ids"], prompts["attention_mask"]):
        text = processor.tokenizer.decode(ids[mask == 1])
        assert row["text"] in text and text.endswith("<|im_start|>assistant\n")


@torch.no_grad()
def test_batch_gives_the_log_probs_of_single_rows(tiny, pictures):
    model, processor = tiny
    inputs, labels = encode(processor, pictures)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 4  # rows of many lengths: the batch is padded
    logits = model(**inputs).logits.log_softmax(-1)
    short, short_labels = three.forward(model, inputs, labels)
    nll, short_nll = three.nll_sum(logits, labels)[0], three.nll_sum(short, short_labels)[0]
    assert short.shape[1] < logits.shape[1] and torch.allclose(nll, short_nll, rtol=1e-5)
    for i, row in enumerate(ROWS):
        alone, alone_labels = encode(processor, pictures, [row])
        at, alone_at = ((x != -100).nonzero()[:, 0] for x in (labels[i], alone_labels[0]))
        single = model(**alone).logits.log_softmax(-1)[0, alone_at - 1, alone_labels[0, alone_at]]
        assert torch.allclose(logits[i, at - 1, labels[i, at]], single, atol=1e-4)
        short_at = (short_labels[i] != -100).nonzero()[:, 0]
        assert torch.allclose(short.log_softmax(-1)[i, short_at - 1, short_labels[i, short_at]], single, atol=1e-4)


@torch.no_grad()
def test_log_odds_of_the_verdict(tiny, pictures):
    model, processor = tiny
    logits, labels = three.forward(model, *encode(processor, pictures, judged_rows()))
    r = three.log_odds_of_verdict(logits, labels, processor.tokenizer,
                                  common.verdict_token_ids(processor.tokenizer))
    id_a, id_b = (processor.tokenizer.convert_tokens_to_ids(f" {letter}") for letter in "AB")
    for i, row in enumerate(judged_rows()):  # the text up to its verdict, and what comes next
        inputs, _ = encode(processor, pictures, [{**row, "response": row["response"][:-2]}])
        inputs = {name: x[:, :-1] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else x
                  for name, x in inputs.items()}
        log_p = model(**inputs).logits[0, -1].log_softmax(-1)
        assert r[i].item() == pytest.approx((log_p[id_a] - log_p[id_b]).item(), abs=1e-4)


@torch.no_grad()
def test_log_odds_of_the_verdict_with_a_sentence_after_it(tiny, pictures):
    model, processor = tiny
    row = {**judged_rows()[0], "response": "A: red circle: yes\nVerdict: A"}
    ids = common.verdict_token_ids(processor.tokenizer)
    r = []
    for text in (row["response"], row["response"] + "\nB in the image"):
        inputs, labels = encode(processor, pictures, [{**row, "response": text}])
        r.append(three.log_odds_of_verdict(*three.forward(model, inputs, labels), processor.tokenizer, ids).item())
    assert common.parse_verdict(row["response"] + "\nB in the image") == "A" and r[0] == pytest.approx(r[1], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lam, bt_weight", [(0.5, 0.0), (0.0, 0.7)])
def test_step_has_the_same_gradient_for_all_micro_batches(tiny, pictures, tmp_path, monkeypatch, lam, bt_weight):
    # With plain gradient descent and without clipping, weights change by -lr * gradient.
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, weight_decay: torch.optim.SGD(weights, lr))
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, _: clip(weights, 1e9))
    model, processor = tiny

    def gradient(weights):
        return torch.cat([(a - b).flatten() for (_, a), b in zip(model.named_parameters(), weights)])
    steps, lines = [], []
    for micro_batch in (1, 3, 4):
        changed = three.add_lora(copy.deepcopy(model), 0)
        lines += train(changed, processor, pictures, tmp_path / str(micro_batch), lr=1.0, lam=lam, bt_weight=bt_weight,
                       micro_batch=micro_batch)
        steps.append(gradient(changed.parameters()))
    # the definition, row by row
    slow, loss = three.add_lora(copy.deepcopy(model), 0), {}
    for name, rows in (("critique", judged_rows()), ("correct", correct_rows())):
        total, n = 0.0, 0
        for row in rows:
            inputs, labels = encode(processor, pictures, [row])
            at = (labels[0] != -100).nonzero()[:, 0]
            total = total + F.cross_entropy(slow(**inputs).logits[0, at - 1], labels[0, at], reduction="sum")
            n += len(at)
        loss[name] = total / n
    bt = sum(three.bradley_terry_loss(three.log_odds_of_verdict(
        *three.forward(slow, *encode(processor, pictures, [row])), processor.tokenizer, common.verdict_token_ids(processor.tokenizer)),
        torch.tensor([row["label"] == "A"])).sum() for row in judged_rows()) / 4
    ift = loss["critique"] + lam * loss["correct"]
    (ift + bt_weight * bt).backward()
    expected = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten()
                          for w in slow.parameters()])
    for step, line in zip(steps, lines):
        assert torch.allclose(step, expected, atol=1e-4 * expected.abs().max())
        assert line["loss"] == pytest.approx(ift.item(), rel=1e-4)
        assert line["critique"] == pytest.approx(loss["critique"].item(), rel=1e-4)
        assert line["bradley_terry"] == (pytest.approx(bt.item(), rel=1e-4) if bt_weight else None)
        assert line["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)


def test_one_step_lowers_the_loss(tiny, pictures, tmp_path):
    before, after = train(three.add_lora(copy.deepcopy(tiny[0]), 4), tiny[1], pictures, tmp_path, steps=2)
    assert after["loss"] < before["loss"] - 0.01 and after["correct"] < before["correct"]  # each step sees all rows


def test_training_writes_what_it_is_shown(trained):
    _, _, lines = trained
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and [line["step"] for line in lines] == list(range(1, 31))


def test_lora_touches_the_language_model_only(tiny):
    base = tiny[0]
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {f"model.language_model.layers.{i}.{part}_proj" for i in range(3) for part in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    assert expected < linear and any("visual" in name for name in linear)
    model = three.add_lora(copy.deepcopy(base), 4)
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0]
               for name, w in model.named_parameters() if w.requires_grad}
    assert adapted == expected
    full = three.add_lora(copy.deepcopy(base), 0)
    assert {name for name, w in full.named_parameters() if w.requires_grad} == {
        name for name, _ in full.named_parameters() if "visual" not in name}


@pytest.fixture(scope="module")
def adapter(tiny, pictures, tmp_path_factory):
    """(PEFT model after one step, folder with its adapter/)."""
    folder = tmp_path_factory.mktemp("adapter")
    model = three.add_lora(copy.deepcopy(tiny[0]), 4)
    train(model, tiny[1], pictures, folder, lr=1e-2)
    three.save_checkpoint(model, tiny[1], folder)
    return model, folder / "adapter"


@torch.no_grad()
def test_saved_adapter_loads_with_plain_peft(tiny, pictures, adapter):
    inputs, _ = encode(tiny[1], pictures)
    expected = adapter[0](**inputs).logits
    assert not torch.allclose(tiny[0](**inputs).logits, expected, atol=1e-2)
    assert four.find_checkpoint(adapter[1].parent) == adapter[1]
    for load in (lambda base: PeftModel.from_pretrained(base, str(adapter[1])).eval(),
                 lambda base: common.load_adapter(base, adapter[1]),
                 lambda base: common.load_judge(base.config._name_or_path, adapter[1], "cpu")[0]):
        assert torch.equal(load(copy.deepcopy(tiny[0]))(**inputs).logits, expected)


def test_adapter_that_does_not_fit_is_refused(tiny, adapter, tmp_path):
    shutil.copytree(adapter[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers.0.self_attn.q_proj", "blocks.0.query"): w
               for name, w in load_file(file).items()}, file)
    with pytest.raises(SystemExit) as error:
        common.load_adapter(copy.deepcopy(tiny[0]), tmp_path / "adapter")
    message = str(error.value)
    assert str(tmp_path) in message and "only in the adapter" in message and "blocks.0.query.lora_A" in message
    assert "layers.0.self_attn.q_proj.lora_A" in message.split("only in the model")[1]


@torch.no_grad()
def test_full_fine_tuning_is_saved_as_an_ordinary_model(tiny, trained, pictures, tmp_path):
    three.save_checkpoint(trained[0], trained[1], tmp_path)
    model, _ = common.load_judge(tiny[0].config._name_or_path, four.find_checkpoint(tmp_path), "cpu")
    inputs, _ = encode(tiny[1], pictures)
    assert torch.equal(model(**inputs).logits, trained[0](**inputs).logits)


@pytest.mark.parametrize("checkpoint", ["", "adapter_of_nothing"])
def test_missing_checkpoint_is_named(tiny, tmp_path, checkpoint):
    with pytest.raises(SystemExit, match=str(tmp_path)):
        four.find_checkpoint(tmp_path / checkpoint)
    with pytest.raises(SystemExit, match=str(tmp_path)):
        common.load_judge(tiny[0].config._name_or_path, tmp_path / checkpoint, "cpu")
    with pytest.raises(SystemExit, match="--model .*no_such_model"):
        common.load_judge(str(tmp_path / "no_such_model"), None, "cpu")
