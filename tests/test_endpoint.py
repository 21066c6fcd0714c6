"""--endpoint: sampling through a server gives what local sampling gives. The stand-in below answers in vLLM's exact shape,
by the tiny model itself; a real `transformers serve` on loopback gives neither several samples nor log-probabilities."""
import base64
import copy
import io
import json
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import common
import pytest
import torch
from conftest import judged_rows, stage
from PIL import Image

three, four = stage("03_train_ift"), stage("04_rejection_sampling")


def connect(url, model, checkpoint=None, device=None, max_image_tokens=None):
    """(Endpoint, None), as 01, 02, 04 and 05 get it."""
    return three.load_judge(SimpleNamespace(endpoint=url, model=model, device=device, max_image_tokens=max_image_tokens, shard=False,
                                            seed=0), checkpoint)


# ---- The stand-in server ---------------------------------------------------------------------------------------------
class Refused(Exception):
    """Refused(HTTP status, message)"""


class StandIn(ThreadingHTTPServer):
    """Answers from .models {name: (model, root, parent)}; .bodies: the requests that it got; .faults: what to do with the next
    ones, an HTTP status, "few" (one choice) or "slow"; .runtime_loading: as VLLM_ALLOW_RUNTIME_LORA_UPDATING; .plain: as
    `transformers serve`, no unknown fields, one choice, no log-probabilities."""
    daemon_threads = True

    def __init__(self, model, processor, name):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.processor, self.lock = {name: (model, name, None)}, processor, threading.Lock()
        self.bodies, self.faults, self.loaded, self.runtime_loading, self.plain = [], [], [], True, False
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def list_models(self):
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": root,
                                            "parent": parent, "max_model_len": 2048, "permission": []}
                                           for name, (_, root, parent) in self.models.items()]}

    def load_adapter(self, body):
        if not self.runtime_loading:
            raise Refused(404, "Not Found")
        base = next(name for name, (_, _, parent) in self.models.items() if parent is None)
        self.loaded.append(body["lora_path"])
        model = common.load_judge(self.models[base][0].config._name_or_path, body["lora_path"], "cpu")[0]
        self.models[body["lora_name"]] = model, body["lora_path"], base

    def complete(self, body):
        known = {"model", "messages", "temperature", "top_p", "max_tokens", "n", "seed", "logprobs", "top_logprobs"}
        more = {"generation_config"} if self.plain else {"top_k", "repetition_penalty"}
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
            self.bodies.append(body)
        if isinstance(fault, int):
            raise Refused(fault, "on request")
        if fault == "slow":
            time.sleep(0.3)
        if set(body) - known - more:
            raise Refused(422, f"Unexpected fields in the request: {set(body) - known - more}")
        if body["model"] not in self.models:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if body["temperature"] == 0 and body["n"] > 1 and not self.plain:
            raise Refused(400, "n must be 1 when using greedy sampling")
        if body.get("top_logprobs", 0) > 20 or body.get("top_logprobs") and not body.get("logprobs"):
            raise Refused(400, "top_logprobs")
        (turn,) = body["messages"]
        image, text = turn["content"]  # the image first, as in our own prompt
        assert (turn["role"], image["type"], text["type"]) == ("user", "image_url", "text")
        head, data = image["image_url"]["url"].split(",", 1)
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert head == f"data:{picture.get_format_mimetype()};base64"
        with self.lock, torch.no_grad():
            choices = self.choose(body, picture, text["text"], 1 if self.plain or fault == "few" else body["n"])
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": choices,
                "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}, "prompt_logprobs": None}

    def choose(self, body, picture, text, n):
        model, tokenizer = self.models[body["model"]][0], self.processor.tokenizer
        inputs = common.encode_prompts(self.processor, [text], [picture])
        uniforms = torch.rand(n, body["max_tokens"], generator=torch.Generator().manual_seed(body["seed"]))
        stop = torch.tensor([tokenizer.eos_token_id])
        tokens, _ = common._sample_batch(model, inputs, uniforms[None], body["temperature"], stop,
                                         common.verdict_token_ids(tokenizer))
        choices = []
        for index, ids in enumerate(row[row >= 0].tolist() for row in tokens):
            complete = tokenizer.eos_token_id in ids
            ids = ids[:ids.index(tokenizer.eos_token_id) + 1] if complete else ids
            choices.append({"index": index, "finish_reason": "stop" if complete else "length", "stop_reason": None, "message": {
                "role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True), "reasoning_content": None,
                "tool_calls": []}, "logprobs": None if self.plain or not body.get("logprobs") else {
                    "content": self.logprobs(model, text, picture, ids, body["top_logprobs"])}})
        return choices

    def logprobs(self, model, text, picture, ids, top):
        """Teacher-forced, at temperature 1 (raw_logprobs); the sampled token leads the list, also where it is not at the top."""
        inputs, new = common.encode_prompts(self.processor, [text], [picture]), torch.tensor([ids])
        before, inner = model(**inputs, use_cache=True), common.unwrap(model).model
        place = inputs["input_ids"].shape[1] + inner.rope_deltas + torch.arange(len(ids))  # (1, R)
        inner.rope_deltas = None
        after = model(input_ids=new, past_key_values=before.past_key_values, position_ids=place.expand(3, -1, -1),
                      attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + len(ids), dtype=torch.long))
        log_p = torch.cat([before.logits[0, -1:], after.logits[0, :-1]]).log_softmax(-1)  # (R, V)

        def entry(token, t):
            written = self.processor.tokenizer.decode([token])
            return {"token": written, "logprob": log_p[t, token].item(), "bytes": list(written.encode())}
        return [{**entry(token, t), "top_logprobs": [entry(i, t) for i in dict.fromkeys(
            [token, *log_p[t].topk(top).indices.tolist()])][:top]} for t, token in enumerate(ids)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, value):
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, self.server.list_models()) if self.path == "/v1/models" else self.reply(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            if self.path == "/v1/load_lora_adapter":
                self.server.load_adapter(body)
                self.reply(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")
            else:
                assert self.path == "/v1/chat/completions"
                self.reply(200, self.server.complete(body))
        except Refused as refused:
            status, message = refused.args
            self.reply(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})


@pytest.fixture
def server(trained, tiny):
    stand_in = StandIn(trained[0], tiny[1], tiny[0].config._name_or_path)
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()
    stand_in.models, stand_in.processor = {}, None  # a thread with an open connection, freeing tensors as Python ends, would abort


@pytest.fixture
def path(tiny):
    """Where the tiny base model lies, --model of these tests."""
    return tiny[0].config._name_or_path


@pytest.fixture
def no_local_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("loads a local model")
    monkeypatch.setattr(common.AutoModelForImageTextToText, "from_pretrained", refuse)


def judgements(pictures):
    return [{"id": row["id"], "image": pictures / row["image"], "text": row["text"]} for row in judged_rows()]


def sampled_locally(model, processor, asked, n, temperature, length, seed):
    """What the stand-in must have answered: its uniform numbers come from the seed that the request names."""
    stop, ids = torch.tensor([processor.tokenizer.eos_token_id]), common.verdict_token_ids(processor.tokenizer)
    for request in asked:
        seen = common.row_seed(seed, request["id"], 0) % 2 ** 31
        uniforms = torch.rand(n, length, generator=torch.Generator().manual_seed(seen))
        inputs = common.encode_prompts(processor, [request["text"]], [request["image"]])
        samples = common._sample_batch(model, inputs, uniforms[None], temperature, stop, ids)
        yield [common._finish(processor.tokenizer, *one, stop, ids) for one in zip(*samples)]


def alike(got, expected):
    """Equal answers; log-odds within 1e-3 nats."""
    assert len(got) == len(expected)
    for some, others in zip(got, expected):
        assert some == [{**other, "log_odds": other["log_odds"] and pytest.approx(other["log_odds"], abs=1e-3)} for other in others]


# ---- Answers ---------------------------------------------------------------------------------------------------------
def test_equals_local_sampling(trained, server, path, pictures, no_local_model):
    model, processor = trained[:2]
    asked = judgements(pictures)
    asked[2]["image"] = Image.open(asked[2]["image"])  # a picture that is no file
    judge = connect(server.url, path)
    server.faults = ["slow"]  # the first answer comes last
    bar = SimpleNamespace(n=0, total=4, update=lambda k: setattr(bar, "n", bar.n + k))
    got = common.sample(*judge, asked, 8, 0.8, 14, seed=4, bar=bar)
    expected = list(sampled_locally(model, processor, asked, 8, 0.8, 14, seed=4))
    alike(got, expected)
    given = [answer["log_odds"] for samples in got for answer in samples]
    assert bar.n == 4 and sum(r is not None for r in given) > 8 and len({r and round(r, 1) for r in given}) > 2
    assert {True, False} == {answer["complete"] for samples in got for answer in samples}
    assert all((b["top_p"], b["top_k"], b["repetition_penalty"], b["n"], b["max_tokens"]) == (1, -1, 1, 8, 14)
               for b in server.bodies) and len({b["seed"] for b in server.bodies}) == 4 == len(server.bodies)


def test_of_two_processes_each_asks_for_its_part(monkeypatch):
    four, given = stage("04_rejection_sampling"), {}
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(common.dist, "all_gather_object", lambda of_rank, mine: (
        given.setdefault(common.RANK, mine), of_rank.__setitem__(slice(None), [given.get(0, [[]]), given.get(1, [[]])])))
    judge = object.__new__(four.Endpoint)
    judge.ask = lambda request, n, *_: [{"text": request["id"], "verdict": None, "log_odds": None}] * n
    asked = [{"id": i, "image": None, "text": "not a judgement"} for i in range(5)]
    for rank in (0, 1, 0):  # the first two rounds collect what the processes send
        monkeypatch.setattr(common, "RANK", rank)
        got = judge.sample(asked, 2, 1.0, 8, 0, 64)
    assert {rank: [samples[0]["text"] for samples in part[0]] for rank, part in given.items()} == {0: [0, 1, 2], 1: [3, 4]}
    assert [[answer["text"] for answer in samples] for samples in got] == [[i, i] for i in range(5)]


def test_one_process_loads_an_adapter_for_all(tiny, server, path, tmp_path, monkeypatch):
    server.models = {path: (tiny[0], path, None)}
    three.add_lora(copy.deepcopy(tiny[0]), 2).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(common, "RANK", 1)
    connect(server.url, path, tmp_path / "adapter")
    assert server.loaded == []
    monkeypatch.setattr(common, "RANK", 0)
    for _ in range(2):
        connect(server.url, path, tmp_path / "adapter")
    assert server.loaded == [str(tmp_path / "adapter")]


def test_greedy_is_asked_for_once(trained, server, path, pictures, no_local_model):
    asked = judgements(pictures)
    got = common.sample(*connect(server.url, path), asked, 2, 0, 40)
    alike(got, common.sample(*trained[:2], asked, 2, 0, 40))
    assert [body["n"] for body in server.bodies] == [1] * 4
    assert got[0][0] is not got[0][1]


@pytest.mark.slow
def test_a_server_without_n_and_log_probabilities(trained, server, path, pictures, tmp_path, monkeypatch):
    """Asked once a sample; the verdicts are scored by the local model of --model and checkpoint, loaded once, when needed."""
    model, processor = trained[:2]
    model.save_pretrained(tmp_path / "model")
    server.plain, server.models = True, {str(tmp_path / "model"): (model, None, None)}
    loads, load = [], common.load_judge
    monkeypatch.setattr(common, "load_judge", lambda *args: (loads.append(args), load(*args))[1])
    judge = connect(server.url, path, tmp_path / "model", "cpu")
    caption = {"id": "c", "image": pictures / "0.png", "text": "List the objects in the image."}
    (said,) = common.sample(*judge, [caption], 2, 1.0, 8)
    assert not loads and len(said) == 2 and "logprobs" not in server.bodies[-1]
    assert json.loads(server.bodies[-1]["generation_config"]) == {"do_sample": True, "top_k": 0, "repetition_penalty": 1.0}

    asked = judgements(pictures)
    got = common.sample(*judge, asked, 2, 0, 40)
    alike(got, common.sample(model, processor, asked, 2, 0, 40))
    assert any(samples[0]["log_odds"] for samples in got)
    bodies = len(server.bodies)
    got = common.sample(*judge, asked, 3, 1.0, 40, seed=2)
    assert len(server.bodies) - bodies == 12 and [len(samples) for samples in got] == [3] * 4
    assert all((a["log_odds"] is None) == (a["verdict"] is None) for samples in got for a in samples)
    assert [load[:4] for load in loads] == [(path, tmp_path / "model", "cpu", None)]
    alike([samples[:1] for samples in got], [samples[:1] for samples in sampled_locally(model, processor, asked, 1, 1.0, 40, 2)])


def token(text, logprob, *others):
    top = [SimpleNamespace(token=word, logprob=p) for word, p in others]
    return SimpleNamespace(token=text, logprob=logprob, top_logprobs=[SimpleNamespace(token=text, logprob=logprob), *top])


STOP = token("<|im_end|>", -0.1)


@pytest.mark.parametrize("text, tokens, log_odds", [
    ("Verdict: A", [token("Verdict", -1), token(":", 0), token(" A", -0.3, (" B", -1.4), ("A", -4)), STOP], 1.1),
    ("Verdict: B", [token("Verdict", -1), token(":", 0), token(" B", -0.3, (" A", -1.4), ("A", -0.2)), STOP], -1.1),
    ("Verdict: B", [token("Verdict", -1), token(":", 0), token(" B", -0.3, (" A", -1.4))], -1.1),  # cut right after it
    ("**Verdict: **B**\n", [token("**Verdict", 0), token(": **", 0), token("B", -1.0, ("A", -3.0), (" A", -0.1)),
                            token("**\n", 0), STOP], -2.0),
    ("Verdict: A", [token("Verdict:", -1), token(" A", -0.1, (" a", -5), (" C", -7), (" D", -6)), STOP], 6.9),  # B: floor
    ("Verdict: A\nVerdict: B", [token("Verdict:", 0), token(" A", -0.5, (" B", -9)), token("\nVerdict:", 0),
                                token(" B", -0.2, (" A", -2.2)), STOP], -2.0),  # the last line decides
    ("A: caf\u00e9: yes\nVerdict: A", [token("A: caf", 0), token("\ufffd", 0), token("\ufffd", 0), token(": yes\nVerdict:", 0),
                                       token(" A", -0.3, (" B", -1.4)), STOP], 1.1),  # tokens that are parts of a letter
    ("A: no\nVerdict: B", [token("A:", 0), token("<|image_pad|>", -3), token(" no\nVerdict:", 0), token(" B", -1, (" A", -3)),
                           STOP], -2.0),  # special tokens are not in the text
    ("Verdict: A", [token("token_id:3", -1), token("token_id:4", -1)], None),
    ("Verdict: A", [SimpleNamespace(token="Verdict: A", logprob=-1, top_logprobs=[])], None),
    ("Verdict: A", None, None), ("A cat.", [token("A cat.", -1, (" B", -2)), STOP], None)])
def test_log_odds_of_a_choice(text, tokens, log_odds):
    logprobs = None if tokens is None else SimpleNamespace(content=tokens)
    choice = SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="stop", logprobs=logprobs)
    answer = four.read_choice(choice)
    assert answer["log_odds"] == (None if log_odds is None else pytest.approx(log_odds))
    assert (answer["text"], answer["verdict"], answer["complete"]) == (text, common.parse_verdict(text), True)
    choice.finish_reason = "length"
    assert not four.read_choice(choice)["complete"]


# ---- A server that misbehaves ----------------------------------------------------------------------------------------
def test_errors_that_pass_are_tried_again(server, path, pictures):
    judge = connect(server.url, path)
    server.faults = [500, 429, 503]
    got = common.sample(*judge, judgements(pictures)[:2], 2, 1.0, 8)
    assert [len(samples) for samples in got] == [2, 2] and len(server.bodies) == 5


def test_too_few_choices_are_asked_for_again(server, path, pictures):
    server.faults = ["few", "few"]
    (got,) = common.sample(*connect(server.url, path), judgements(pictures)[:1], 4, 1.0, 40)
    assert [body["n"] for body in server.bodies] == [4, 3, 2] and len({body["seed"] for body in server.bodies}) == 3
    assert len(got) == 4 and len({answer["text"] for answer in got}) > 1


@pytest.mark.parametrize("fault, said", [(400, "400.*on request"), (401, "401.*on request")])
def test_a_refusal_stops(server, path, pictures, fault, said):
    judge = connect(server.url, path)
    server.faults = [fault] * 2
    with pytest.raises(SystemExit, match=f"^error: --endpoint {server.url}, model {path}: .*{said}"):
        common.sample(*judge, judgements(pictures)[:1], 1, 1.0, 8)
    assert len(server.bodies) == (2 if fault == 400 else 1)  # a 400 may be about the fields of vLLM's own


def test_one_failure_drops_what_waits(server, path, pictures):
    judge = connect(server.url, path)
    server.faults = [401]
    with pytest.raises(SystemExit):
        common.sample(*judge, [{**judgements(pictures)[0], "id": str(i)} for i in range(40)], 1, 1.0, 8, batch_size=1)
    assert len(server.bodies) < 5


def test_no_server(server, path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as gone:
        url = f"http://127.0.0.1:{gone.server_address[1]}"
    with pytest.raises(SystemExit, match=f"--endpoint {url}/v1, model .*Connection error.*refused"):
        connect(url, path)
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.reply(200, "a page"))
    with pytest.raises(SystemExit, match=f"--endpoint {server.url}, model .*no attribute"):
        connect(server.url, path)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit, match="pip install openai"):
        connect(url, path)


# ---- What is served --------------------------------------------------------------------------------------------------
def test_names(server, path, capsys):
    def asks_for(*cards):
        server.models = {name: (None, root, parent) for name, root, parent in cards}
        return connect(server.url, path)[0].name
    assert asks_for(("other", "/other", None), (path, path, None)) == path
    assert asks_for(("other", "/other", None), ("judge", path, None)) == "judge"  # --served-model-name
    assert asks_for(("judge", "/a/copy", None), ("lora", path + "/x", "judge")) == "judge"  # the only model
    assert "model judge" in capsys.readouterr().out
    assert asks_for(("one", "/one", None), ("two", "/two", None)) == asks_for() == path


@pytest.mark.slow
def test_adapters(tiny, server, path, pictures, tmp_path):
    """Loaded when first asked for, under a name of its own weights; the base model stays what it is."""
    learner, asked = three.add_lora(copy.deepcopy(tiny[0]), 2), judgements(pictures)[:2]
    server.models = {path: (tiny[0], path, None)}
    names, answers = set(), []
    for k in range(2):
        for weight in (w for name, w in learner.named_parameters() if "lora_B" in name):
            weight.data.normal_(std=0.3)
        learner.save_pretrained(tmp_path / "adapter")
        for _ in range(2):
            judge = connect(server.url, path, tmp_path / "adapter")
            got = common.sample(*judge, asked, 1, 0, 12)
        alike(got, common.sample(learner.eval(), tiny[1], asked, 1, 0, 12))
        names.add(judge[0].name)
        answers.append([samples[0]["text"] for samples in got])
    assert server.loaded == [str(tmp_path / "adapter")] * 2 and len(names) == 2 and answers[0] != answers[1]
    assert connect(server.url, path)[0].name == path

    server.runtime_loading, server.models = False, {path: (tiny[0], path, None)}
    how = rf"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True .*--lora-modules {judge[0].name}={tmp_path}/adapter; .*404"
    with pytest.raises(SystemExit, match=how):
        connect(server.url, path, tmp_path / "adapter")
    server.models[judge[0].name] = learner, "adapter", path  # as that line says
    assert connect(server.url, path, tmp_path / "adapter")[0].name == judge[0].name


# ---- Pictures --------------------------------------------------------------------------------------------------------
def test_pictures_are_what_a_local_model_sees(server, path, tmp_path):
    judge = connect(server.url, path)[0]
    picture = Image.effect_noise((60, 40), 90).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    same = {"a.png": {}, "a.jpg": {}, "a.webp": {}}
    other = {"a.bmp": {}, "turned.jpg": {"exif": turned}}
    for name, settings in {**same, **other}.items():
        picture.save(tmp_path / name, **settings)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", (900, 2)).save(tmp_path / "strip.png")
    for name in (*same, *other, "clear.png", "strip.png"):
        head, data = judge.data_uri(tmp_path / name).split(",")
        data = base64.b64decode(data)
        assert (data == (tmp_path / name).read_bytes()) == (name in same)
        assert head == f"data:image/{name[2:].replace('jpg', 'jpeg') if name in same else 'png'};base64"
        assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == common.load_image(tmp_path / name).tobytes()


@pytest.mark.parametrize("bound", [6, 12, 40])
def test_max_image_tokens_bounds_what_is_sent(tiny, server, bound, tmp_path):
    """The server's own processor makes as many tokens of the sent picture as the local, bounded one of the original."""
    processor = copy.deepcopy(tiny[1])
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    tiny[0].save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    bounded = common.load_judge(str(tmp_path), device="cpu", max_image_tokens=bound)[1]
    judge = connect(server.url, str(tmp_path), max_image_tokens=bound)[0]
    pictures = [Image.new("RGB", size) for size in ((500, 400), (90, 410), (640, 480), (3000, 100), (84, 84), (57, 55), (3000, 10), (9, 700))]
    sent = [Image.open(io.BytesIO(base64.b64decode(judge.data_uri(picture).split(",")[1]))) for picture in pictures]
    grids = [common.encode_prompts(p, ["red?"] * len(pictures), some)["image_grid_thw"].tolist()
             for p, some in ((bounded, pictures), (processor, sent))]
    assert grids[0] == grids[1] and max(t * h * w for t, h, w in grids[1]) <= 4 * bound


# ---- A real server ---------------------------------------------------------------------------------------------------
@pytest.fixture
def transformers_serve(trained, tiny, tmp_path, monkeypatch):
    """(URL, folder of the model) of what `transformers serve FOLDER --device cpu` starts."""
    from transformers.cli import serve
    three.save_checkpoint(trained[0], tiny[1], tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = serve.Serve(str(tmp_path / "model"), host="127.0.0.1", port=port, device="cpu", log_level="error", non_blocking=True)
    until = time.time() + 20
    while not running.server.started and time.time() < until:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}", str(tmp_path / "model")
    running.kill_server()


@pytest.mark.slow
def test_transformers_serve(trained, transformers_serve, pictures):
    """It takes neither n nor logprobs: one request a sample, and the verdicts are scored here."""
    (url, folder), (model, processor, _) = transformers_serve, trained
    asked, judge = judgements(pictures), connect(url, folder, device="cpu")
    alike(common.sample(*judge, asked, 2, 0, 20), common.sample(model, processor, asked, 2, 0, 20))
    assert judge[0].local is not None
    answers = common.sample(*judge, asked, 4, 1.0, 20, seed=1)
    assert [len(samples) for samples in answers] == [4] * 4
    assert len({answer["text"] for samples in answers for answer in samples}) > 5  # it samples, at temperature 1
    assert all((a["log_odds"] is None) == (a["verdict"] is None) for samples in answers for a in samples)
    with pytest.raises(SystemExit, match="400.*pinned"):
        common.sample(*connect(url, "another/model"), asked[:1], 1, 0, 8)


# ---- The stages ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_stages_sample_through_the_server(trained, tiny, server, pictures, tmp_path, monkeypatch, capsys):
    """01, 02 and 05 load no model; 04 asks each iteration for the newest adapter and 05 for each condition's."""
    one, two, three, five = map(stage, ("01_build_preferences", "02_generate_critiques", "03_train_ift", "05_evaluate"))
    run, here = tmp_path / "run", ["--run", str(tmp_path / "run"), "--device", "cpu"]
    through = ["--endpoint", server.url, "--max-new-tokens", "16"]
    three.save_checkpoint(trained[0], tiny[1], tmp_path)
    path = str(tmp_path / "model")
    server.models = {path: (common.load_judge(path, device="cpu")[0], path, None)}
    loads, load = [], common.AutoModelForImageTextToText.from_pretrained
    monkeypatch.setattr(common.AutoModelForImageTextToText, "from_pretrained", lambda *args, **kwargs: (
        loads.append(threading.current_thread() is threading.main_thread()), load(*args, **kwargs))[1])

    findings = [{"id": f"{i}.png", "detections": []} for i in range(4)]
    common.write_json(tmp_path / "found.jsonl", findings)
    with pytest.raises(SystemExit, match="no pair could be made"):  # random weights name nothing
        one.main(one.parse_args([*here, *through, "--images", str(pictures), "--model", path,
                                 "--detections", str(tmp_path / "found.jsonl"), "--candidates", "3"]))
    written = common.read_jsonl(run / "01_preferences/candidates.jsonl")
    assert len(written) == len(server.bodies) == 4 and any(row["candidates"] for row in written)
    with pytest.raises(SystemExit):
        one.parse_args([*through, "--images", "x", "--expert", "none"])
    assert "no --endpoint or --shard for --expert none" in capsys.readouterr().err

    made = [{"id": f"p{i}", "image": f"{i % 4}.png", "prompt": "List the objects in the image.", "chosen": "red circle.",
             "rejected": "blue star.", "evidence": [], "split": split}
            for i, split in enumerate(("train", "validation", "pool", "pool", "pool", "pool"))]
    common.write_json(run / "01_preferences/preferences.jsonl", made)
    common.write_json(run / "01_preferences/vocabulary.json", {"red circle": "red circle"})
    common.write_json(run / "01_preferences/meta.json", {"args": {
        "model": path, "max_image_tokens": None, "image_root": str(pictures)}})
    with pytest.raises(SystemExit, match="no critique was kept"):
        two.main(two.parse_args([*here, *through, "--critiques", "2"]))
    assert len(common.read_jsonl(run / "02_critiques/samples.jsonl")) == 4 and loads == []

    settings = {"model": path, "max_image_tokens": None, "image_root": str(pictures), "style": "critique"}
    common.write_json(run / "02_critiques/meta.json", {"args": settings})
    (run / "03_ift").mkdir()
    common.write_json(run / "03_ift/meta.json", {"args": settings})
    critiques = [{**q, "pair_id": q["pair_id"], "critique": f"Verdict: {q['label']}", "style": "critique"}
                 for q in common.both_orders(made[0])]
    common.write_json(run / "02_critiques/critiques.jsonl", critiques)
    three.save_checkpoint(three.add_lora(copy.deepcopy(trained[0]), 2), tiny[1], run / "03_ift")
    four.main(four.parse_args([*here, *through, "--iterations", "2", "--pool", "2", "--samples", "4", "--steps", "1",
                               "--train-batch", "2", "--margin", "0", "--lr", "1e-3", "--temperature", "0.5"]))
    adapters = [str(run / name / "adapter") for name in ("03_ift", "04_rejection/iter1", "04_rejection/iter2")]
    assert server.loaded == adapters[:2] and loads.count(True) == 1  # the one that is trained
    asked = Counter(body["model"] for body in server.bodies[-8:])
    assert len(asked) == 2 and set(asked.values()) == {4}

    common.write_json(tmp_path / "truth.jsonl", [{"image": f"{i}.png", "objects": [{"object": "red circle"}]} for i in range(4)])
    common.write_json(tmp_path / "pairs.jsonl", made[:1])
    server.bodies.clear()
    five.main(five.parse_args([*here, *through, "--pairs", str(tmp_path / "pairs.jsonl"), "--image-root", str(pictures),
                               "--truth", str(tmp_path / "truth.jsonl"), "--best-of", "2", "--best-of-images", "1", "--withhold", "blank"]))
    assert server.loaded == adapters and loads.count(True) == 1
    judged = [common.parse_verdict(row["critique"]) for row in common.read_jsonl(run / "05_evaluation/judgements.jsonl")]
    assert len(judged) == 5 * 2 and judged.count(None) < len(judged)
    assert set(json.loads((run / "05_evaluation/metrics.json").read_text())["table"]) >= {"base", "after 03", "margin, iteration 2"}
    asked = Counter(body["model"] for body in server.bodies)
    assert len(asked) == 4 and asked[path] > asked.most_common()[-1][1] == 2  # the base model writes Best-of-N's responses too
