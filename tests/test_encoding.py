"""Encoding, label masks, the loop's steps and what it saves, on a tiny model of random weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import critique_rows, encode, fit, settings_of, stage, steps_of, train
from peft import PeftModel

import common

three = stage("03_train_ift")
KINDS = three.training_rows(critique_rows())
ROWS = KINDS["critique"] + KINDS["correct"]


def fresh(tiny, rank=4):  # a copy of the tiny model that can be trained, always the same
    torch.manual_seed(0)
    return three.make_trainable(copy.deepcopy(tiny[0]), rank)


# ---- What is trained on --------------------------------------------------------------------------
def test_what_the_two_kinds_of_rows_are():
    critiques = critique_rows()
    kinds = three.training_rows(critiques + critiques[:1])
    assert len(kinds["critique"]) == 5  # a chosen response once, whatever its critiques
    first = critiques[0]
    text = common.build_judge_prompt(first["prompt"], first["response_a"], first["response_b"])
    expected = {"id": "0-ab-0", "image": "0.png", "text": text, "label": "A"}
    assert kinds["critique"][0] == {**expected, "response": first["critique"]}
    for row, critique, side in zip(kinds["correct"], critiques, "abab", strict=True):
        expected = {"id": critique["pair_id"], "text": first["prompt"], "label": side.upper()}
        expected |= {"image": critique["image"], "response": critique[f"response_{side}"]}
        assert row == expected


@pytest.mark.parametrize("pads_with_stop_token", [False, True])
def test_label_mask_is_response_and_stop_token(tiny, pictures, pads_with_stop_token):
    processor = copy.deepcopy(tiny[1])
    tokenizer = processor.tokenizer
    if pads_with_stop_token:
        tokenizer.pad_token = tokenizer.eos_token
    inputs, labels = encode(processor, pictures, ROWS)
    texts = [tokenizer.decode(row[row != -100]) for row in labels]
    assert texts == [row["response"] + tokenizer.eos_token for row in ROWS]
    assert torch.equal(inputs["input_ids"][labels != -100], labels[labels != -100])
    # Supervised tokens follow each other, and nothing after them is seen.
    for row, mask in zip(labels, inputs["attention_mask"]):
        index = (row != -100).nonzero()[:, 0]
        assert index.tolist() == list(range(index[0], index[0] + len(index)))
        assert mask[index].all() and not mask[index[-1] + 1 :].any()
    for limit in (1, 4, 6):  # a cut response has no stop token
        for labels, row in zip(encode(processor, pictures, ROWS, limit)[1], ROWS):
            ids = [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
            assert labels[labels != -100].tolist() == ids[:limit]


def test_prompt_is_the_one_that_is_sampled_from(tiny, pictures):
    processor = tiny[1]
    texts, images = [row["text"] for row in ROWS], [pictures / row["image"] for row in ROWS]
    prompts = common.encode_prompts(processor, texts, images)
    inputs, labels = encode(processor, pictures, ROWS)
    P = prompts["input_ids"].shape[1]
    assert (labels[:, :P] == -100).all() and (labels[:, P] != -100).all()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(inputs[name][:, :P], prompts[name]), name
    assert torch.equal(inputs["pixel_values"], prompts["pixel_values"])
    for row, ids, mask in zip(ROWS, prompts["input_ids"], prompts["attention_mask"]):
        text = processor.tokenizer.decode(ids[mask == 1])
        assert row["text"] in text and text.endswith("<|im_start|>assistant\n")


@torch.no_grad()
def test_batch_gives_the_log_probs_of_single_rows(tiny, pictures):
    model, processor = tiny
    inputs, labels = encode(processor, pictures, ROWS)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 4  # rows of many lengths: padded
    short, short_labels = three.forward(model, inputs, labels)
    assert short.shape[1] == short_labels.shape[1] < labels.shape[1]
    assert short_labels[:, 0].eq(-100).all()  # the last prompt token, which predicts the first
    nll = three.nll_sum(model(**inputs).logits, labels)[0]
    assert three.nll_sum(short, short_labels)[0].item() == pytest.approx(nll.item(), rel=1e-4)
    for i, row in enumerate(ROWS):
        single = three.nll_sum(*three.forward(model, *encode(processor, pictures, [row])))[0]
        in_batch = three.nll_sum(short[i : i + 1], short_labels[i : i + 1])[0]
        assert in_batch.item() == pytest.approx(single.item(), rel=1e-3)


# ---- The steps: which rows, in which order -------------------------------------------------------
def ids_of(step):
    return [row["id"] for _, rows, _, _ in step for row in rows]


def test_a_step_is_the_same_whatever_came_before(tiny, pictures):
    prepare = steps_of(tiny[1], pictures, train_batch=3, micro_batch=2)
    in_order = [prepare(k) for k in range(4)]
    for k in (3, 1):  # as a training that goes on at step 3 would
        again = prepare(k)
        assert ids_of(again) == ids_of(in_order[k])
        for (_, _, inputs, labels), (_, _, same_inputs, same_labels) in zip(again, in_order[k]):
            assert torch.equal(labels, same_labels)
            assert torch.equal(inputs["input_ids"], same_inputs["input_ids"])
    assert [step[0] for step in in_order[0]] == ["critique", "critique", "correct", "correct"]
    assert [len(step[1]) for step in in_order[0]] == [2, 1, 2, 1]
    for seed in (0, 1):
        step = steps_of(tiny[1], pictures, seed=seed, train_batch=3, lam=0.0)(2)
        assert [kind for kind, _, _, _ in step] == ["critique"]  # lam = 0: nothing else
        expected = [row["id"] for row in three.rows_of_step(KINDS["critique"], 2, 3, seed)]
        assert sorted(ids_of(step)) == sorted(expected)


@pytest.mark.parametrize("size", [3, 12])
def test_epochs_are_shuffled_without_repeats(size):
    """A step may be longer than an epoch."""
    of_seed = []
    for seed in (0, 1):
        steps = [three.rows_of_step(list(range(5)), k, size, seed) for k in range(60 // size)]
        ids = sum(steps, [])
        epochs = [tuple(ids[i : i + 5]) for i in range(0, 60, 5)]
        assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and len(set(epochs)) > 1
        of_seed.append(epochs)
    assert of_seed[0] != of_seed[1]


def test_steps_run_at_the_rate_that_is_logged(tiny, pictures, tmp_path, monkeypatch):
    used, step = [], torch.optim.AdamW.step
    watched = lambda x, *rest: used.append(x.param_groups[0]["lr"]) or step(x, *rest)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    lines = train(fresh(tiny), tiny[1], pictures, tmp_path, steps=4, lr=1e-4)
    assert [line["lr"] for line in lines] == used
    assert used == pytest.approx([three.learning_rate(k, 4, 1e-4) for k in range(4)])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


# ---- The step's loss and gradient ----------------------------------------------------------------
@pytest.mark.parametrize("lam, bt_weight", [(0.5, 0.0), (0.0, 0.7)])
def test_gradient_for_all_micro_batches(tiny, pictures, tmp_path, monkeypatch, lam, bt_weight):
    # With plain gradient descent and without clipping, weights change by -lr * gradient.
    clip, bounds = torch.nn.utils.clip_grad_norm_, {1.0: 1e9}
    measure = lambda weights, bound: clip(weights, bounds[bound])  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", measure)
    descend = lambda weights, weight_decay: torch.optim.SGD(weights, 1.0)  # noqa: E731
    monkeypatch.setattr(torch.optim, "AdamW", descend)
    model, processor = tiny
    # the definition, row by row
    slow = fresh(tiny, 0)
    mean_nll, bt = {}, 0.0
    for kind, of_kind in KINDS.items():
        nll, n = 0.0, 0
        for row in of_kind:
            inputs, labels = encode(processor, pictures, [row])
            logits = slow(**inputs).logits
            at = (labels[0] != -100).nonzero()[:, 0]
            nll = nll + F.cross_entropy(logits[0, at - 1], labels[0, at], reduction="sum")
            n += len(at)
            if kind == "critique":
                logits, labels = logits[:, at[0] - 1 :], labels[:, at[0] - 1 :]
                bt = bt + three.bradley_terry_sum(logits, labels, [row], processor.tokenizer) / 4
        mean_nll[kind] = nll / n
    ift = mean_nll["critique"] + lam * mean_nll["correct"]
    (ift + bt_weight * bt).backward()
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in slow.parameters()]
    expected = torch.nn.utils.parameters_to_vector(grads)
    for micro_batch in (1, 3, 4):
        changed = fresh(tiny, 0)
        settings = {"lr": 1.0, "lam": lam, "bt_weight": bt_weight, "micro_batch": micro_batch}
        (line,) = train(changed, processor, pictures, tmp_path / str(micro_batch), **settings)
        old, new = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (model, changed))
        assert (old - new - expected).norm() < 1e-3 * expected.norm()
        wanted = {"loss": ift, "loss_critique": mean_nll["critique"], "grad_norm": expected.norm()}
        wanted["loss_correct"] = mean_nll["correct"] if lam else None
        wanted["bradley_terry"] = bt if bt_weight else None
        for name, value in wanted.items():
            assert line[name] == (value and pytest.approx(value.item(), rel=1e-3)), name
        assert not changed.training  # ready to be sampled from


def test_what_stops_a_training(tiny, pictures, tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"\d\.png"):
        train(fresh(tiny), tiny[1], tmp_path, tmp_path / "log", steps=2)
    overflow = lambda logits, labels: ((logits * torch.inf).sum(), None)  # noqa: E731
    monkeypatch.setattr(three, "nll_sum", overflow)
    with pytest.raises(SystemExit, match="step 1: gradient norm nan, first row .-ab-0"):
        train(fresh(tiny), tiny[1], pictures, tmp_path)


# ---- An interrupted training ---------------------------------------------------------------------
STEPS = {"steps": 5, "lr": 1e-2, "train_batch": 2, "micro_batch": 1, "save_every": 2}


@pytest.mark.parametrize("at, done", [(2, 2), (3, 2), (4, 4)])
def test_goes_on_to_the_same_bits(tiny, pictures, tmp_path, monkeypatch, capsys, at, done):
    def interrupt(step, steps, lr):  # in the step after `at`, before it is saved
        if step == at:
            raise KeyboardInterrupt
        return rate(step, steps, lr)

    rate = three.learning_rate
    whole, again = fresh(tiny), fresh(tiny)
    wanted = train(whole, tiny[1], pictures, tmp_path / "whole", **STEPS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(three, "learning_rate", interrupt)
        train(fresh(tiny), tiny[1], pictures, tmp_path / "cut", **STEPS)
    for weight in filter(lambda weight: weight.requires_grad, again.parameters()):
        weight.data.fill_(0.5)  # whatever it starts from, the file holds all that matters
    found = train(again, tiny[1], pictures, tmp_path / "cut", **STEPS)
    assert f"training goes on after step {done}" in capsys.readouterr().out
    assert found == wanted and len(found) == 5
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


def test_training_pt_that_is_cut_or_of_other_settings_stops(tiny, pictures, tmp_path):
    train(fresh(tiny), tiny[1], pictures, tmp_path, **STEPS)
    data = (path := tmp_path / "training.pt").read_bytes()
    words = "training.pt was trained otherwise .lr was 0.01, is 0.1.*another --tag, or delete it"
    with pytest.raises(SystemExit, match=words):
        train(fresh(tiny), tiny[1], pictures, tmp_path, **{**STEPS, "lr": 0.1})
    with pytest.raises(SystemExit, match=words):  # as a stage does before it loads anything
        three.find_checkpoint(tmp_path, {"lr": 0.1})
    for length in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(SystemExit) as error:
            train(fresh(tiny), tiny[1], pictures, tmp_path, **STEPS)
        assert f"{path}: " in str(error.value) and "\n" not in str(error.value)
        assert "delete it, and this training begins anew" in str(error.value)


# ---- What is trained, and what is saved ----------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 0])
def test_what_is_saved_is_what_was_trained(tiny, pictures, tmp_path, rank):
    """An adapter for plain PEFT, or an ordinary model; with what it was made with."""
    model, base = copy.deepcopy(tiny[0]), tiny[0].config._name_or_path
    with torch.enable_grad():
        path = fit(model, tiny[1], pictures, tmp_path, lr=1e-2, lora_rank=rank)
    assert not (path / "README.md").exists()  # PEFT's form, which nobody has filled
    assert path == three.find_checkpoint(tmp_path) == tmp_path / ("adapter" if rank else "model")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "metrics.jsonl"}
    inputs, _ = encode(tiny[1], pictures, ROWS)
    expected = model(**inputs).logits
    assert not torch.allclose(tiny[0](**inputs).logits, expected, atol=1e-2)
    loaded, processor = common.load_judge(base, path, "cpu")
    if rank:
        plain = PeftModel.from_pretrained(copy.deepcopy(tiny[0]), str(path)).eval()
    else:
        plain, processor = common.load_judge(str(path), None, "cpu")
    for model in (loaded, plain):
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)
    assert processor.tokenizer.get_vocab() == tiny[1].tokenizer.get_vocab()
    made_with = common.read_json(path / "made_with.json")
    assert made_with["counts"]["trained on, critiques"] == 4
    assert made_with["images"] == ["0.png", "1.png", "2.png", "3.png"]
    assert settings_of(lr=1e-2).items() < made_with.items()
    assert three.find_checkpoint(tmp_path, settings_of(lr=1e-2)) == path
    with pytest.raises(SystemExit, match=f"{path.name} was trained otherwise .lr was 0.01, is 1"):
        three.find_checkpoint(tmp_path, settings_of(lr=1))


def test_too_long_critiques_are_dropped(tiny, pictures, tmp_path, capsys):
    path = fit(fresh(tiny), tiny[1], pictures, tmp_path, max_response_tokens=10)
    lengths = [len(tiny[1].tokenizer(row["critique"]).input_ids) for row in critique_rows()]
    n_short = sum(length < 10 for length in lengths)
    counts = common.read_json(path / "made_with.json")["counts"]
    assert 0 < n_short < 4 and list(counts.values()) == [4 - n_short, n_short, n_short]
    assert f": {4 / n_short:.1f} epochs of {n_short}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--max-response-tokens 2: raise it"):
        fit(fresh(tiny), tiny[1], pictures, tmp_path / "none", max_response_tokens=2)
