"""Encoding, label masks, the loop's steps and what it saves, on a tiny model of random weights."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    RESPONSES,
    correct_rows,
    critique_rows,
    encode,
    judged_rows,
    read_rows,
    stage,
    steps_of,
    train,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file

import common

three = stage("03_train_ift")


@pytest.fixture(scope="module")
def rows():
    return judged_rows() + correct_rows()


def supervised(processor, labels):
    """The decoded text of each row's label mask."""
    return [processor.tokenizer.decode(row[row != -100]) for row in labels]


# ---- What is trained on --------------------------------------------------------------------------
def test_what_the_two_kinds_of_rows_are():
    judged, correct = three.training_rows(critique_rows() + critique_rows()[:1])
    assert len(judged) == 5 and len(correct) == 4  # a chosen response once, whatever its critiques
    first = critique_rows()[0]
    text = common.build_judge_prompt(first["prompt"], first["response_a"], first["response_b"])
    expected = {"id": "0-ab-0", "image": "0.png", "text": text, "label": "A"}
    assert judged[0] == {**expected, "response": first["critique"]}
    chosen = [RESPONSES[0], RESPONSES[0], RESPONSES[2], RESPONSES[2]]  # labels A, B, A, B
    assert [row["response"] for row in correct] == chosen
    assert {row["text"] for row in correct} == {first["prompt"]}


def test_label_mask_is_response_and_stop_token(tiny, pictures, rows):
    processor = tiny[1]
    inputs, labels = encode(processor, pictures, rows)
    expected = [row["response"] + processor.tokenizer.eos_token for row in rows]
    assert supervised(processor, labels) == expected and len({len(x) for x in expected}) > 4
    assert torch.equal(inputs["input_ids"][labels != -100], labels[labels != -100])
    assert inputs["attention_mask"][labels != -100].all()
    # Supervised tokens follow each other, and nothing after them is seen.
    for row, mask in zip(labels, inputs["attention_mask"]):
        places = (row != -100).nonzero()[:, 0]
        assert places.tolist() == list(range(places[0], places[0] + len(places)))
        assert not mask[places[-1] + 1 :].any()


def test_padding_with_the_stop_token_does_not_mask_it(tiny, pictures, rows):
    processor = copy.deepcopy(tiny[1])
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    inputs, labels = encode(processor, pictures, rows)
    expected = [row["response"] + processor.tokenizer.eos_token for row in rows]
    assert supervised(processor, labels) == expected
    usual_inputs, usual_labels = encode(tiny[1], pictures, rows)
    assert torch.equal(labels, usual_labels)
    assert torch.equal(inputs["attention_mask"], usual_inputs["attention_mask"])


@pytest.mark.parametrize("limit", [1, 4, 6])
def test_cut_response_has_no_stop_token(tiny, pictures, rows, limit):
    tokenizer = tiny[1].tokenizer
    labels = encode(tiny[1], pictures, rows, limit)[1]
    for text, row in zip(supervised(tiny[1], labels), rows):
        ids = tokenizer(row["response"]).input_ids
        whole = row["response"] + tokenizer.eos_token
        assert text == (tokenizer.decode(ids[:limit]) if len(ids) >= limit else whole)


def test_prompt_is_the_one_that_is_sampled_from(tiny, pictures, rows):
    processor = tiny[1]
    texts, images = [row["text"] for row in rows], [pictures / row["image"] for row in rows]
    prompts = common.encode_prompts(processor, texts, images)
    inputs, labels = encode(processor, pictures, rows)
    P = prompts["input_ids"].shape[1]
    assert set(inputs) == set(prompts)
    assert (labels[:, :P] == -100).all() and (labels[:, P] != -100).all()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(inputs[name][:, :P], prompts[name]), name
    assert torch.equal(inputs["pixel_values"], prompts["pixel_values"])
    for row, ids, mask in zip(rows, prompts["input_ids"], prompts["attention_mask"]):
        text = processor.tokenizer.decode(ids[mask == 1])
        assert row["text"] in text and text.endswith("<|im_start|>assistant\n")


@torch.no_grad()
def test_batch_gives_the_log_probs_of_single_rows(tiny, pictures, rows):
    model, processor = tiny
    inputs, labels = encode(processor, pictures, rows)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 4  # rows of many lengths: padded
    short, short_labels = three.forward(model, inputs, labels)
    assert short.shape[1] == short_labels.shape[1] < labels.shape[1]
    assert short_labels[:, 0].eq(-100).all()  # the last prompt token, which predicts the first
    nll = three.nll_sum(model(**inputs).logits, labels)[0]
    assert three.nll_sum(short, short_labels)[0].item() == pytest.approx(nll.item(), rel=1e-4)
    for i, row in enumerate(rows):
        single = three.nll_sum(*three.forward(model, *encode(processor, pictures, [row])))[0]
        in_batch = three.nll_sum(short[i : i + 1], short_labels[i : i + 1])[0]
        assert in_batch.item() == pytest.approx(single.item(), rel=1e-3)


@torch.no_grad()
def test_bradley_terry_is_read_at_the_verdicts_letter(tiny, pictures):
    """Also where a sentence follows it: against the text up to the letter, and what comes next."""
    model, processor = tiny
    tokenizer = processor.tokenizer
    id_a, id_b = tokenizer.convert_tokens_to_ids([" A", " B"])
    for row in judged_rows():
        for label in "AB":
            before = row["response"].removesuffix(row["label"]).rstrip()  # "... Verdict:"
            inputs, _ = encode(processor, pictures, [{**row, "response": before}])
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                inputs[name] = inputs[name][:, :-1]  # no stop token
            log_p = model(**inputs).logits[0, -1].log_softmax(-1)
            expected = (log_p[id_a] - log_p[id_b]) * (1 if label == "A" else -1)
            for rest in ("", "\nB in the image"):
                judged = {**row, "response": row["response"] + rest, "label": label}
                logits, labels = three.forward(model, *encode(processor, pictures, [judged]))
                loss = three.bradley_terry_sum(logits, labels, [judged], tokenizer)
                assert loss.item() == pytest.approx(-F.logsigmoid(expected).item(), abs=1e-3)


# ---- The steps: which rows, in which order -------------------------------------------------------
def ids_of(step, kind="critique"):
    return [row["id"] for of_kind, rows, _, _ in step for row in rows if of_kind == kind]


def test_a_step_is_the_same_whatever_was_asked_before(tiny, pictures):
    processor = tiny[1]
    one = steps_of(processor, pictures, train_batch=3, micro_batch=2)
    in_order = [one[k] for k in range(4)]
    other = steps_of(processor, pictures, train_batch=3, micro_batch=2)
    for k in (3, 1):  # as a training that goes on at step 3 would
        assert ids_of(other[k]) == ids_of(in_order[k])
        for (_, _, inputs, labels), (_, _, same_inputs, same_labels) in zip(other[k], in_order[k]):
            assert torch.equal(labels, same_labels)
            assert torch.equal(inputs["input_ids"], same_inputs["input_ids"])
    kinds = [kind for kind, _, _, _ in in_order[0]]
    assert kinds == ["critique", "critique", "correct", "correct"]
    assert [len(rows) for _, rows, _, _ in in_order[0]] == [2, 1, 2, 1]


def test_epochs_are_shuffled_without_repeats(tiny, pictures):
    data = steps_of(tiny[1], pictures, train_batch=3, lam=0.0)
    ids = [row["id"] for row in judged_rows()]
    place = [[], []]
    for seed in (0, 1):
        for k in range(8):
            rows = three.rows_of_step(judged_rows(), k, 3, seed)
            place[seed] += [row["id"] for row in rows]
    for seed in (0, 1):
        epochs = [place[seed][i : i + 4] for i in range(0, 24, 4)]
        assert all(sorted(epoch) == ids for epoch in epochs)  # each row once
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert place[0] != place[1]
    assert sorted(ids_of(data[0])) == sorted(place[0][:3]) and data[0][0][0] == "critique"
    assert all(kind == "critique" for kind, _, _, _ in data[0])  # lam = 0: nothing else


def test_steps_without_end_use_all_rows_of_both_kinds():
    rows = [{"id": i} for i in range(5)]
    seen = [row["id"] for k in range(3) for row in three.rows_of_step(rows, k, 12, 0)]
    assert len(seen) == 36  # a step may be longer than an epoch
    assert all(sorted(seen[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 35, 5))


def test_learning_rate_rises_and_falls():
    rates = [three.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.4) and rates[4] == rates[5] == max(rates) == 2.0
    assert all(a > b for a, b in zip(rates[5:], rates[6:]))
    assert rates[-1] == pytest.approx(0.2, rel=0.1) and three.learning_rate(0, 1, 2.0) == 2.0


def test_logged_learning_rate_is_the_one_of_that_step(tiny, pictures, tmp_path, monkeypatch):
    used, step = [], torch.optim.AdamW.step

    def recorded_step(self, *args):
        used.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    model = three.make_trainable(copy.deepcopy(tiny[0]), 2)
    lines = train(model, tiny[1], pictures, tmp_path, steps=4, lr=1e-4)
    assert [line["lr"] for line in lines] == used and len(set(used)) == 3
    assert used == pytest.approx([three.learning_rate(k, 4, 1e-4) for k in range(4)])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_missing_image_ends_training_with_one_line(tiny, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "some")
    (tmp_path / "some" / "2.png").unlink()
    model = three.make_trainable(copy.deepcopy(tiny[0]), 2)
    with pytest.raises(SystemExit, match=r"^error: image \S+2\.png: "):
        train(model, tiny[1], tmp_path / "some", tmp_path / "log", steps=2)


# ---- The step's loss and gradient ----------------------------------------------------------------
def changes(model, other):
    """All weights' differences, in one vector."""
    pairs = zip(model.parameters(), other.parameters())
    return torch.cat([(a - b).flatten() for a, b in pairs]).detach()


@pytest.mark.parametrize("lam, bt_weight", [(0.5, 0.0), (0.0, 0.7)])
def test_gradient_is_the_same_for_all_micro_batches(
    tiny, pictures, tmp_path, monkeypatch, lam, bt_weight
):
    # With plain gradient descent and without clipping, weights change by -lr * gradient.
    clip = torch.nn.utils.clip_grad_norm_

    def descend(weights, lr, weight_decay):
        return torch.optim.SGD(weights, lr)

    def only_measure(weights, max_norm):
        assert max_norm == 1.0
        return clip(weights, 1e9)

    monkeypatch.setattr(torch.optim, "AdamW", descend)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", only_measure)
    model, processor = tiny

    # the definition, row by row
    slow = three.make_trainable(copy.deepcopy(model), 0)
    mean_nll, bt = {}, 0.0
    for kind, kind_rows in (("critique", judged_rows()), ("correct", correct_rows())):
        nll, n = 0.0, 0
        for row in kind_rows:
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
    expected = torch.cat([grad.flatten() for grad in grads])

    for micro_batch in (1, 3, 4):
        changed = three.make_trainable(copy.deepcopy(model), 0)
        settings = {"lr": 1.0, "lam": lam, "bt_weight": bt_weight, "micro_batch": micro_batch}
        folder = tmp_path / str(micro_batch)
        (line,) = train(changed, processor, pictures, folder, **settings)
        difference = changes(model, changed) - expected
        assert difference.norm() < 1e-3 * expected.norm()
        assert line["loss"] == pytest.approx(ift.item(), rel=1e-3)
        assert line["loss_critique"] == pytest.approx(mean_nll["critique"].item(), rel=1e-3)
        correct = pytest.approx(mean_nll["correct"].item(), rel=1e-3)
        assert line["loss_correct"] == (correct if lam else None)
        assert line["bradley_terry"] == (pytest.approx(bt.item(), rel=1e-3) if bt_weight else None)
        assert line["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
        assert not changed.training  # ready to be sampled from


def test_a_small_step_lowers_the_loss(tiny, pictures, tmp_path):
    model = three.make_trainable(copy.deepcopy(tiny[0]), 0)
    before, after = train(model, tiny[1], pictures, tmp_path, steps=2, lr=1e-4)
    assert after["loss"] < before["loss"] and after["loss_critique"] < before["loss_critique"]


def test_gradient_that_is_no_number_stops_with_the_rows(tiny, pictures, tmp_path, monkeypatch):
    def overflow(logits, labels):
        return (logits * torch.inf).sum(), None

    monkeypatch.setattr(three, "nll_sum", overflow)
    model = three.make_trainable(copy.deepcopy(tiny[0]), 2)
    with pytest.raises(SystemExit, match="step 1: gradient norm nan on rows .*2-ab-0.*lower --lr"):
        train(model, tiny[1], pictures, tmp_path)


# ---- What is trained, and what is saved ----------------------------------------------------------
@pytest.fixture(scope="module")
def adapter(tiny, pictures, tmp_path_factory):
    """(PEFT model after one step, folder with its adapter/)."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = three.make_trainable(copy.deepcopy(tiny[0]), 4)
    train(model, tiny[1], pictures, folder, lr=1e-2)
    three.save_checkpoint(model, tiny[1], folder)
    return model, folder / "adapter"


@torch.no_grad()
def test_saved_adapter_loads_with_plain_peft(tiny, pictures, rows, adapter):
    inputs, _ = encode(tiny[1], pictures, rows)
    trained, folder = adapter
    expected = trained(**inputs).logits
    assert not torch.allclose(tiny[0](**inputs).logits, expected, atol=1e-2)
    assert common.find_checkpoint(folder.parent) == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "adapter",
        "metrics.jsonl",
        "training.safetensors",
    ]
    fresh, again = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[0])
    plain = PeftModel.from_pretrained(fresh, str(folder)).eval()
    loaded = common.load_judge(tiny[0].config._name_or_path, folder, "cpu")[0]
    for model in (plain, common.load_adapter(again, folder), loaded):
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)


def test_adapter_that_does_not_fit_is_refused(tiny, adapter, tmp_path):
    shutil.copytree(adapter[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {}
    for name, weight in load_file(file).items():
        renamed[name.replace("layers.0.self_attn.q_proj", "blocks.0.query")] = weight
    save_file(renamed, file)
    with pytest.raises(SystemExit) as error:
        common.load_adapter(copy.deepcopy(tiny[0]), tmp_path / "adapter")
    there, here = str(error.value).split(", not ")
    assert str(tmp_path) in there and "blocks.0.query.lora_A" in there
    assert "layers.0.self_attn.q_proj.lora_A" in here and "\n" not in str(error.value)


@torch.no_grad()
def test_full_fine_tuning_is_saved_as_an_ordinary_model(tiny, pictures, rows, tmp_path):
    model = three.make_trainable(copy.deepcopy(tiny[0]), 0)
    with torch.enable_grad():
        train(model, tiny[1], pictures, tmp_path, lr=1e-3)
    three.save_checkpoint(model, tiny[1], tmp_path)
    assert common.find_checkpoint(tmp_path) == tmp_path / "model"
    inputs, _ = encode(tiny[1], pictures, rows)
    assert not torch.allclose(tiny[0](**inputs).logits, model(**inputs).logits, atol=1e-3)
    base = tiny[0].config._name_or_path
    for path, checkpoint in ((base, tmp_path / "model"), (str(tmp_path / "model"), None)):
        loaded, processor = common.load_judge(path, checkpoint, "cpu")
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-4)
        assert processor.tokenizer.get_vocab() == tiny[1].tokenizer.get_vocab()


def test_saving_replaces_what_was_there(tiny, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = three.make_trainable(copy.deepcopy(tiny[0]), 2)
        three.save_checkpoint(model, tiny[1], tmp_path)
        (tmp_path / "adapter" / f"left by {seed}").touch()
    assert not (tmp_path / "adapter" / "left by 0").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    for name, weight in saved.items():
        assert torch.equal(weights[name.replace(".weight", ".default.weight")], weight)


@pytest.mark.parametrize("checkpoint", ["", "adapter_of_nothing"])
def test_missing_checkpoint_is_named(tiny, tmp_path, checkpoint):
    with pytest.raises(SystemExit, match=str(tmp_path)):
        common.find_checkpoint(tmp_path / checkpoint)
    with pytest.raises(SystemExit, match=str(tmp_path)):
        common.load_judge(tiny[0].config._name_or_path, tmp_path / checkpoint, "cpu")
    with pytest.raises(SystemExit, match="--model .*no_such_model"):
        common.load_judge(str(tmp_path / "no_such_model"), None, "cpu")


# ---- Too long responses --------------------------------------------------------------------------
def test_too_long_critiques_are_dropped_and_counted_and_answers_cut(tiny, capsys):
    limit = 10  # tokens: two of the four critiques have fewer, two correct responses have not
    args = three.parse_args(["--max-response-tokens", str(limit), "--steps", "2"])
    data, counts = three.training_steps(critique_rows(), tiny[1], "images", 0, args)
    lengths = [len(tiny[1].tokenizer(row["critique"]).input_ids) for row in critique_rows()]
    n_kept = sum(length < limit for length in lengths)
    assert 0 < n_kept < 4 and len(data.rows_of_kind["critique"]) == n_kept
    responses = [row["response"] for row in data.rows_of_kind["correct"]]
    n_cut = sum(len(tiny[1].tokenizer(text).input_ids) >= limit for text in responses)
    assert list(counts.values()) == [4 - n_kept, n_kept, n_kept, n_cut]
    assert (
        f"2 steps of 32 critiques: {64 / n_kept:.1f} epochs of {n_kept}" in capsys.readouterr().out
    )
    args = three.parse_args(["--max-response-tokens", "2"])
    with pytest.raises(SystemExit, match="--max-response-tokens 2: raise it"):
        three.training_steps(critique_rows(), tiny[1], "images", 0, args)


def test_console_names_only_what_was_computed(tiny, pictures, tmp_path, capsys, monkeypatch):
    written = []

    class Bar:
        def update(self, n=1):
            written.append(n)

        def write(self, text):
            written.append(text)

        def close(self):
            written.append("closed")

    monkeypatch.setattr(common, "progress_bar", lambda *args: Bar())
    model = three.make_trainable(copy.deepcopy(tiny[0]), 2)
    train(model, tiny[1], pictures, tmp_path, lam=0.0)
    step, said, closed = written
    assert (step, closed) == (1, "closed") and "critique " in said
    assert "correct" not in said and "bradley_terry" not in said
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss_correct"] is None
