"""Batched sampling against transformers' generate, a separate forward pass and the softmax."""
from collections import Counter

import common
import pytest
import torch
from common import build_judge_prompt
from conftest import judged_rows, stage

PROMPTS = ["List the objects in the image.", "red?",
           build_judge_prompt("List the objects in the image.", "red circle.", "red ring."),
           "Is there a red circle in the image? Answer yes or no.",
           build_judge_prompt("red?", "blue star, red ring, red cross.", "blue.")]


def requests(pictures, texts=PROMPTS):
    return [{"id": f"r{i}", "image": pictures / f"{i % 4}.png", "text": text} for i, text in enumerate(texts)]


def judgements(pictures):
    return [{"id": row["id"], "image": pictures / row["image"], "text": row["text"]} for row in judged_rows()]


@pytest.fixture
def raw(monkeypatch):
    """common.sample that gives each sample's token ids and their log-odds instead of text and verdict."""
    monkeypatch.setattr(common, "_finish", lambda tokenizer, tokens, log_odds, *_: (tokens, log_odds))
    return common.sample


@pytest.mark.parametrize("which", ["tiny", "trained"])
def test_greedy_equals_generate(which, pictures, raw, request):
    model, processor = request.getfixturevalue(which)[:2]
    asked, stop = requests(pictures) + judgements(pictures), processor.tokenizer.eos_token_id
    inputs = common.encode_prompts(processor, [r["text"] for r in asked], [r["image"] for r in asked])
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 4
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1]:].tolist()
    expected = [row[:row.index(stop) + 1] if stop in row else row for row in expected]
    got = [samples[0][0].tolist() for samples in raw(model, processor, asked, temperature=0, max_new_tokens=12)]
    got = [row[:row.index(stop) + 1] if stop in row else row for row in got]
    assert got == expected and len({tuple(row) for row in got}) > 3
    assert which == "tiny" or any(len(row) < 12 for row in got)  # rows of one batch that stop early


def test_samples_do_not_depend_on_the_batch(trained, pictures):
    model, processor, _ = trained
    asked = judgements(pictures) + requests(pictures)

    def sample(some, batch_size, n=3):
        answers = common.sample(model, processor, some, n, 1.0, 16, seed=5, batch_size=batch_size)
        return {request["id"]: [(a["text"], a["complete"], a["verdict"]) for a in samples]
                for request, samples in zip(some, answers)}, \
            {request["id"]: [a["log_odds"] for a in samples] for request, samples in zip(some, answers)}
    texts, log_odds = sample(asked, 64)
    lengths = Counter(len(text.split()) for samples in texts.values() for text, *_ in samples)
    assert len(lengths) > 3 and {True, False} <= {complete for samples in texts.values() for _, complete, _ in samples}
    for some, size in ((asked, 3), (asked, 1), (asked, 10), (asked[::-1], 64), (asked[4:], 64), (asked[2:3], 64)):
        texts_again, log_odds_again = sample(some, size)  # alone, with other neighbours, as a resumed run would
        for request in some:
            assert texts_again[request["id"]] == texts[request["id"]]
            assert log_odds_again[request["id"]] == [r if r is None else pytest.approx(r, abs=1e-3)
                                                             for r in log_odds[request["id"]]]
    assert sample(asked, 64)[0] != {} and sample(asked[:1], 64, n=2)[0]["critique-0"] == texts["critique-0"][:2]


def test_seed_and_id_decide(tiny, pictures):
    model, processor = tiny
    (one,) = requests(pictures, PROMPTS[:1])

    def text(seed=0, **changed):
        return [a["text"] for a in common.sample(model, processor, [{**one, **changed}], 2, 1.0, 8, seed)[0]]
    assert text() == text() and text()[0] != text()[1] and text() != text(seed=1) and text() != text(id="other")


def test_finished_samples_leave_the_batch(trained, pictures, raw, monkeypatch):
    model, processor, _ = trained
    sizes, forward, stop = [], type(model).forward, processor.tokenizer.eos_token_id
    monkeypatch.setattr(type(model), "forward", lambda self, *args, **kwargs: (
        sizes.append(len(kwargs["input_ids"])), forward(self, *args, **kwargs))[1])
    answers = raw(model, processor, judgements(pictures), 8, 1.0, 100, seed=1)
    lengths = [(tokens == stop).nonzero()[0, 0].item() + 1 for samples in answers for tokens, _ in samples]
    assert len(sizes) == max(lengths) < 100 and sizes[0] == 4  # the prompt, then one pass for each token but the last
    for written, size in enumerate(sizes[1:], 1):
        going = sum(length > written for length in lengths)
        assert going <= size <= going / 0.75


@pytest.mark.parametrize("temperature, n", [(0.0, 1), (1.0, 24)])
@torch.no_grad()
def test_log_odds_equal_a_separate_forward(trained, pictures, monkeypatch, temperature, n):
    """Teacher-forced: the prompt with the tokens before the verdict's letter, and the distribution of the next."""
    finish = common._finish
    monkeypatch.setattr(common, "_finish", lambda tokenizer, tokens, *rest: {
        **finish(tokenizer, tokens, *rest), "tokens": tokens[tokens >= 0].tolist()})
    model, processor, _ = trained
    asked, seen = judgements(pictures), set()
    spelled = list(zip(*common.verdict_token_ids(processor.tokenizer)))  # (" A", " B"), ("A", "B")
    for request, samples in zip(asked, common.sample(model, processor, asked, n, temperature, 32, seed=3)):
        for answer in samples:
            assert answer["verdict"] == common.parse_verdict(answer["text"])
            assert (answer["verdict"] is None) == (answer["log_odds"] is None)
            if answer["verdict"] is None:
                continue
            ids = answer["tokens"]
            texts = [processor.tokenizer.decode(ids[:k + 1], skip_special_tokens=True) for k in range(len(ids))]
            at = next(k for k, text in enumerate(texts) if len(text) > common.find_verdict(answer["text"])[1])
            (id_a, id_b), = (pair for pair in spelled if ids[at] in pair)
            inputs = common.encode_prompts(processor, [request["text"]], [request["image"]])
            before = torch.tensor([ids[:at]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], before], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(before)], 1)
            log_p = model(**inputs).logits[0, -1].log_softmax(-1)
            assert answer["log_odds"] == pytest.approx((log_p[id_a] - log_p[id_b]).item(), abs=1e-4)
            seen.add(answer["verdict"])
    assert seen == {"A", "B"} if n > 1 else seen


@pytest.mark.parametrize("text, letter, bare", [
    ("Verdict: A", 2, 0), ("A: red circle: yes\nVerdict: B", 9, 0), ("Verdict:**A**", 4, 1),
    ("Verdict: A\nB is the red", 2, 0),
    ("B is the red\nVerdict:B", 7, 1), ("A\nA A", None, None)])
def test_log_odds_are_read_at_the_verdicts_letter(tiny, text, letter, bare):
    tokenizer = tiny[1].tokenizer
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id, 5, -1])
    log_odds = torch.arange(2.0 * len(ids)).view(-1, 2)
    rest = (log_odds, torch.tensor([tokenizer.eos_token_id]), common.verdict_token_ids(tokenizer))
    answer = common._finish(tokenizer, ids, *rest)
    assert answer["text"].replace("<unk>", "**") == text or "**" in text
    assert answer["complete"] and answer["log_odds"] == (None if letter is None else log_odds[letter, bare])
    assert common._finish(tokenizer, ids[:-3], *rest) == {**answer, "complete": False}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_first_tokens_follow_the_softmax(tiny, pictures, raw, temperature):
    model, processor = tiny
    n, (asked,) = 2000, requests(pictures, PROMPTS[3:4])
    drawn = Counter(int(tokens[0]) for tokens, _ in raw(model, processor, [asked], n, temperature, 1, seed=11)[0])
    inputs = common.encode_prompts(processor, [asked["text"]], [asked["image"]])
    expected = n * (model(**inputs).logits[0, -1].double() / temperature).softmax(-1)
    common_ones = (expected >= 5).nonzero()[:, 0].tolist()
    assert len(common_ones) > 3
    cells = [(drawn[i], expected[i].item()) for i in common_ones]
    rest = n - sum(e for _, e in cells)
    cells += [(n - sum(o for o, _ in cells), rest)] if rest > 1 else []
    chi_square, freedom = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and standard deviation of chi-square


def test_out_of_memory_halves_the_batch(tiny, pictures, monkeypatch, capsys):
    model, processor = tiny
    asked, sizes, whole = requests(pictures), [], common._sample_batch
    expected = common.sample(model, processor, asked, 2, 1.0, 6)

    def short_of_memory(model, inputs, *rest):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("no room")
        return whole(model, inputs, *rest)
    monkeypatch.setattr(common, "_sample_batch", short_of_memory)
    limit = 2
    answers = common.sample(model, processor, asked, 2, 1.0, 6, batch_size=8)
    assert [[a["text"] for a in samples] for samples in answers] == [
        [a["text"] for a in samples] for samples in expected]
    assert sizes == [4, 2, 2, 1] and "out of memory: going on with 2" in capsys.readouterr().out
    limit = 0
    with pytest.raises(SystemExit, match="out of memory with 1 x 2 sequences: lower --batch-size, --max-image"):
        common.sample(model, processor, asked[:1], 2, 1.0, 6)


def test_training_sees_what_sampling_did(trained, pictures):
    """The log-odds of 03's loss and those of sampling are the same number for the same critique."""
    three, (model, processor, _) = stage("03_train_ift"), trained
    asked = judgements(pictures)
    answers = [samples[0] for samples in common.sample(model, processor, asked, 1, 0.0, 32)]
    rows = [(request, answer) for request, answer in zip(asked, answers) if answer["verdict"]]
    assert rows
    with torch.no_grad():
        texts, images = [request["text"] for request, _ in rows], [request["image"] for request, _ in rows]
        inputs, labels = three.encode_supervised(processor, texts, images, [answer["text"] for _, answer in rows])
        ids = common.verdict_token_ids(processor.tokenizer)
        r = three.log_odds_of_verdict(*three.forward(model, inputs, labels), processor.tokenizer, ids)
    assert r.tolist() == pytest.approx([answer["log_odds"] for _, answer in rows], abs=1e-4)


@torch.no_grad()
def test_attention_over_a_shared_prompt_is_attention_over_its_copies():
    """Against PyTorch's own attention over each sample's whole row; grouped heads, padding, samples and a prompt that leave."""
    torch.manual_seed(0)
    B, n, H, G, P, D = 3, 4, 2, 3, 7, 8
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    prompt = type("Layer", (), {"keys": 3 * torch.randn(B, H, P, D), "values": torch.randn(B, H, P, D)})
    layer = common.SharedPrompt(prompt, mask, n, room=5)
    rows = [x.repeat_interleave(n, 0) for x in (mask.bool(), prompt.keys, prompt.values)]  # (S, ...) each
    for keep in (range(12), [0, 2, 3, 8, 9, 11], [1, 2, 4, 5], [3]):
        layer.batch_select_indices(torch.tensor(keep))
        rows = [x[list(keep)] for x in rows]
        query, key, value = (torch.randn(len(keep), heads, 1, D) for heads in (H * G, H, H))
        rows = [torch.cat([x, new], -1 if x is rows[0] else 2) for x, new in zip(rows, (
            torch.ones(len(keep), 1, dtype=torch.bool), key, value))]
        got = layer.update(key, value)[0].attend(query, scale=D ** -0.5)  # (S, 1, H*G, D)
        whole = torch.nn.functional.scaled_dot_product_attention(query, *rows[1:], rows[0][:, None, None], enable_gqa=True)
        assert torch.allclose(got, whole.transpose(1, 2), atol=1e-5)
    assert len(layer.prompt[0]) == 1 and layer.slots.tolist() == [3]  # of the sequence kept in the end


def test_caches_that_cannot_be_shared_are_refused(tiny, pictures, monkeypatch):
    text = tiny[0].model.language_model
    monkeypatch.setattr(text, "has_sliding_layers", True)
    monkeypatch.setattr(text.config, "layer_types", ["full_attention", "full_attention", "sliding_attention"])
    monkeypatch.setattr(text.config, "sliding_window", 8)
    with pytest.raises(SystemExit, match="cache has layers of kind DynamicSlidingWindowLayer: only full attention"):
        common.sample(*tiny, requests(pictures)[:1], 1, 0, 4)
