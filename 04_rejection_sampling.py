"""04  Margin-based rejection sampling: the judge learns from its best critiques where it can tell good ones from bad ones.

    S(c)   = P(label | c) = sigmoid(+-r(c))                   confidence in the label after critique c
    margin = S(c+) - S(c-)    c+: largest S among the critiques that pass stage 02's filters, c-: smallest S of all
    pair:    mean of its two orders; kept if both orders have a passing critique and the margin is among the top
             --retention of the pool (or >= --margin). Then L_IFT on the kept c+, from the adapter of iteration t-1.

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) S is read from the judge's own log-odds at the verdict, in the same pass that sampled the critique;
  2) a share of each batch is stage 03's rows (--replay), since a few hundred rows alone make the judge forget its format;
  3) three controls of the same size and steps: --select random (random pairs, a random passing critique), best (random
     pairs, the critique with the largest S), continue (stage 03's own rows, trained on for as many steps).

Reads  01_preferences/preferences.jsonl (split "pool", cut into disjoint iterations), 03_ift/, 02_critiques/critiques.jsonl.
Writes 04_rejection[_<control>]/iter<t>/: samples.jsonl (all critiques), kept.jsonl, margins.png, adapter/, validation.jsonl

    python 04_rejection_sampling.py --run runs/demo --iterations 2 --pool 600 --steps 60 --lr 1.5e-3
    python 04_rejection_sampling.py                              # one GPU: 3 iterations x 5,000 pairs x 2 orders x 8
"""
import argparse
import base64
import hashlib
import importlib
import io
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import ExifTags, Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import common
from common import both_orders, finish_stage, read_jsonl, row_seed, start_stage

critiques_stage, ift = map(importlib.import_module, ("02_generate_critiques", "03_train_ift"))


# ---- The method: confidence, margin, selection -----------------------------------------------------------------------
def confidence_in_label(log_odds, label_is_a):
    """S = P(label) = sigmoid(+-r): log_odds r (B,) in nats, label_is_a (B,) bool -> (B,) in [0,1]."""
    return torch.where(label_is_a, log_odds, -log_odds).sigmoid()  # (B,)


def margin(confidences, right):
    """S(c+) - S(c-) of one question, in [0,1]: c+ has the largest S among the right (passing) critiques, c- the smallest S
    of all. 0 where none is right: there is nothing to learn from.

    >>> round(margin([0.9, 0.2, 0.97], [True, False, False]), 6), margin([0.9, 0.2], [False, False])
    (0.7, 0.0)
    """
    passing = [s for s, ok in zip(confidences, right, strict=True) if ok]
    return max(passing) - min(confidences) if passing else 0.0


def select_by_margin(margins, threshold=None, retention=None):
    """Ids in falling order of margin (ties: by id): those with margin >= threshold, or the top share `retention` of them,
    where margin 0 is never kept, even if fewer remain. margins: {id: margin in [0,1]}; give one of the two rules.

    >>> select_by_margin({"a": 0.1, "b": 0.8, "c": 0.8, "d": 0.0, "e": 0.3}, retention=0.4)
    ['b', 'c']
    """
    if (threshold is None) == (retention is None):
        raise ValueError("give threshold or retention, one of them")
    ranked = sorted(margins, key=lambda key: (-margins[key], key))
    if threshold is not None:
        return [key for key in ranked if margins[key] >= threshold]
    return [key for key in ranked[:round(retention * len(ranked))] if margins[key] > 0]


def select_random(ids, n, seed):
    """n of the ids, each equally likely: the control of the same size. The order of ids does not matter."""
    return random.Random(seed).sample(sorted(ids), min(n, len(ids)))


# ---- Sampling and selection of one iteration -------------------------------------------------------------------------
def cut_pools(pairs, size, iterations):
    """Disjoint pools of about `size` pairs, all pairs of an image in one of them (01 keeps them together)."""
    pools, start = [], 0
    for t in range(iterations):
        end = min(start + size, len(pairs))
        while end < len(pairs) and pairs[end]["image"] == pairs[end - 1]["image"]:
            end += 1
        if end - start < 2:
            common.stop(f"the pool of {len(pairs)} pairs is used up after iteration {t}: lower --pool or --iterations, or "
                        "give stage 01 more images")
        pools.append(pairs[start:end])
        start = end
    return pools


def margins_of_pairs(samples):
    """({pair id: mean margin of its two orders, 0 where an order has no passing critique}, {(pair id, order): passing
    critiques}); samples get their "confidence_in_label". A critique without a verdict has no S and does not enter."""
    questions, passing = {}, {}
    for row in (row for row in samples if row["verdict"]):
        row["confidence_in_label"] = confidence_in_label(torch.tensor([row["log_odds"]]), torch.tensor([row["label"] == "A"])).item()
        questions.setdefault((row["pair_id"], row["order"]), []).append(row)
        if row["dropped"] is None:
            passing.setdefault((row["pair_id"], row["order"]), []).append(row)
    margins = {}
    for pair_id in dict.fromkeys(row["pair_id"] for row in samples):
        keys = [(pair_id, "ab"), (pair_id, "ba")]
        margins[pair_id] = sum(margin([row["confidence_in_label"] for row in questions[key]],
                                      [row["dropped"] is None for row in questions[key]])
                               for key in keys) / 2 if all(key in passing for key in keys) else 0.0
    return margins, passing


def keep(margins, passing, args, iteration):
    """The kept questions, two per pair, each with the one critique to train on, by --select."""
    eligible = {key: m for key, m in margins.items() if (key, "ab") in passing and (key, "ba") in passing}
    # The share counts from the whole pool; a threshold of 0 must not let in pairs that have no passing critique.
    chosen = select_by_margin(margins, retention=args.retention) if args.margin is None else \
        select_by_margin(eligible, threshold=args.margin)
    if args.select != "margin":
        chosen = select_random(eligible, len(chosen), row_seed(args.seed, "select", iteration))
    rows = []
    for key in ((pair_id, order) for pair_id in chosen for order in ("ab", "ba")):
        rng = random.Random(row_seed(args.seed, "critique", iteration, *key))
        best = rng.choice(passing[key]) if args.select == "random" else max(passing[key], key=lambda row: row["confidence_in_label"])
        rows.append({**best, "margin": margins[key[0]], "iteration": iteration})
    return rows


def draw_margins(margins, kept, path, title):
    """Histogram of the pool's margins, the kept ones in front."""
    figure = Figure((6, 3.2), layout="tight")
    axis = figure.subplots()
    axis.hist(list(margins.values()), bins := [i / 25 for i in range(26)], color="lightgrey", label=f"pool, {len(margins)} pairs")
    axis.hist([margins[key] for key in kept], bins, color="seagreen", label=f"kept, {len(kept)}")
    axis.set(xlabel="margin of a pair: mean over orders of S(c+) - S(c-)", ylabel="pairs", title=title, yscale="log")
    axis.legend()
    figure.savefig(path, dpi=110)


# ---- Sampling through a server (--endpoint of 01, 02, 04 and 05; here for want of room there) ------------------------
def read_choice(choice):
    """A server's choice as common.sample's answer. log_odds: None where no log-probabilities are given; they must be those before
    temperature (vLLM's default), and a letter that is not listed counts as the least likely token that is."""
    verdict, index = common.find_verdict(text := choice.message.content or "")
    answer = {"text": text, "complete": choice.finish_reason == "stop", "verdict": verdict, "log_odds": None}
    place, at = 0, None  # the tokens stand in the text one after another, except special ones and those that are half a letter
    for token in (choice.logprobs and choice.logprobs.content) or ():
        if (start := text.find(token.token, place)) >= 0:
            place = start + len(token.token)
            at = token if start <= index < place else at
    if at is None or not at.top_logprobs:
        return answer
    listed = {at.token: at.logprob} | {other.token: other.logprob for other in reversed(at.top_logprobs)}
    spelled = ("A", "B") if at.token in ("A", "B") else (" A", " B")  # as in common.verdict_token_ids
    log_p_a, log_p_b = (listed.get(letter, min(listed.values())) for letter in spelled)
    return {**answer, "log_odds": log_p_a - log_p_b}


class Endpoint:
    """A judge behind an OpenAI-compatible server, to be given to common.sample. args: a stage's; checkpoint: as in load_judge;
    local: (model, processor) with the same weights, where they are loaded anyway."""
    # No truncation, which else follows generation_config.json (Qwen2-VL's: top_k 1), for vLLM and SGLang, or `transformers serve`
    untruncated = {"top_k": -1, "repetition_penalty": 1}, {"generation_config": '{"do_sample": true, "top_k": 0, "repetition_penalty": 1}'}
    judging = tuple(common.INSTRUCTIONS.values())  # the end of a prompt that asks for a verdict; no others need log-odds

    def __init__(self, args, checkpoint=None, local=None):
        self.args, self.model, self.bound, self.local = args, args.model, args.max_image_tokens, local
        try:
            import openai
            vision = self.bound and common.AutoProcessor.from_pretrained(self.model).image_processor
        except (ImportError, OSError) as error:
            common.stop(f"--endpoint needs the openai client (pip install openai), --max-image-tokens the model's files: {error}")
        self.side, self.least = (vision.patch_size * vision.merge_size, vision.size["shortest_edge"]) if vision else (None, None)
        self.openai, self.url = openai, args.endpoint.rstrip("/").removesuffix("/v1") + "/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=8)
        self.serve(checkpoint)

    def fail(self, error, advice=""):
        said = f"{error.status_code} {error.response.text}" if hasattr(error, "response") else f"{error} {error.__cause__ or ''}"
        common.stop(f"--endpoint {self.url}, model {self.name}: {advice}{' '.join(said.split())[:400]}")

    def serve(self, checkpoint):
        """Ask for this checkpoint from now on. An adapter is called after its weights, so that none is taken for another, and
        loaded into the server if need be; a model has its path or hub id, or what the server calls that, or its only model."""
        self.checkpoint, self.name, place = checkpoint, str(checkpoint or self.model), Path(checkpoint or self.model).resolve()
        try:
            cards = self.client.with_options(max_retries=1).models.list().data
        except (self.openai.APIError, AttributeError) as error:  # status 500: `transformers serve` where the hub's cache is empty
            cards = [] if hasattr(error, "status_code") else self.fail(error)
        if (weights := place / "adapter_model.safetensors").exists():
            self.name = f"judge-{hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}"
            try:
                if common.RANK == 0 and self.name not in [card.id for card in cards]:  # once, whatever the number of processes
                    self.client.post("/load_lora_adapter", cast_to=object, body={"lora_name": self.name, "lora_path": str(place)})
            except self.openai.APIError as error:
                self.fail(error, "start vLLM with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment "
                          f"or --lora-modules {self.name}={place}; then run this again, it goes on from here. It said: ")
            common.share_out([], None)
        else:
            bases = [card.id for card in cards if not getattr(card, "parent", None)]
            named = [card.id for card in cards if place in {Path(x).resolve() for x in (card.id, getattr(card, "root", 0)) if x}]
            self.name = (named or (bases if len(bases) == 1 and not checkpoint else [self.name]))[0]
        print(f"sampling from {self.url}, model {self.name}: {checkpoint or self.model}")

    def data_uri(self, image):
        """The picture as a local model gets it: a file's own bytes where they are that already, else a PNG."""
        seen = common.load_image(image, min(200, self.bound or 200))
        if self.side:
            h, w = smart_resize(seen.height, seen.width, self.side, min(self.least, (most := self.bound * self.side ** 2) // 4), most)
            seen = seen.resize((w, h), Image.Resampling.BICUBIC) if w * h < seen.width * seen.height else seen
        if not isinstance(image, Image.Image):
            with Image.open(image) as file:  # servers may turn a picture by its EXIF tag, and blend transparency with white
                if file.format in ("PNG", "JPEG", "WEBP") and file.size == seen.size and file.mode in ("RGB", "L") and \
                        file.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                    return f"data:image/{file.format.lower()};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
        seen.save(png := io.BytesIO(), "PNG")
        return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"

    def ask(self, request, n, temperature, max_new_tokens, seed):
        """n answers to one request; a server that gives fewer is asked again for the rest."""
        image, answers = {"type": "image_url", "image_url": {"url": self.data_uri(request["image"])}}, []
        turn = {"role": "user", "content": [image, {"type": "text", "text": request["text"]}]}
        body = dict(model=self.name, messages=[turn], temperature=temperature, top_p=1.0, max_tokens=max_new_tokens)
        body |= {"logprobs": True, "top_logprobs": 20} if request["text"].endswith(self.judging) else {}
        while len(answers) < n:
            body |= {"n": n - len(answers), "seed": row_seed(seed, request["id"], len(answers)) % 2 ** 31}
            for extra in self.untruncated:
                try:
                    choices = self.client.chat.completions.create(**body, extra_body=extra).choices
                    self.untruncated = (extra,)  # what this server takes
                    break
                except self.openai.APIError as error:  # after the client's own retries with back-off
                    if extra is self.untruncated[-1] or getattr(error, "status_code", None) not in (400, 422):
                        self.fail(error)
            answers += map(read_choice, choices or self.fail(self.openai.OpenAIError("an answer without choices")))
        return answers[:n]

    def sample(self, requests, n, temperature, max_new_tokens, seed, batch_size, bar=None):
        """As common.sample; batch_size: sequences that each process asks the server for at a time."""
        asked = n if temperature else 1  # greedy samples are all the same, and vLLM refuses to write them twice

        def ask_all(part):
            with ThreadPoolExecutor(max(1, batch_size // n)) as pool:  # map drops the requests that wait where one has failed
                for samples in pool.map(lambda request: self.ask(request, asked, temperature, max_new_tokens, seed), part):
                    yield samples
                    if bar is not None:
                        bar.update(min(common.WORLD, bar.total - bar.n))

        size = -(-len(requests) // common.WORLD) or 1
        answers = common.share_out([requests[i:i + size] for i in range(0, len(requests), size)], lambda part: [*ask_all(part)])
        rows = [{**request, "response": answer["text"], "answer": answer} for request, samples in zip(requests, answers)
                for answer in samples if request["text"].endswith(self.judging)]
        self.score([row for row in rows if row["answer"]["verdict"] and row["answer"]["log_odds"] is None])
        return [[dict(samples[k % asked]) for k in range(n)] for samples in answers]

    @torch.no_grad()
    def score(self, rows):
        """Gives each row's "answer" the log-odds that the server did not: a teacher-forced forward of the local model."""
        for part in ift.micro_batches(rows, 8):
            here = argparse.Namespace(**{**vars(self.args), "endpoint": None})
            model, processor = self.local = self.local or ift.load_judge(here, self.checkpoint)
            columns = ([row[name] for row in part] for name in ("text", "image", "response"))
            inputs, labels = (x.to(common.unwrap(model).device) for x in ift.encode_supervised(processor, *columns))
            logits, labels = ift.forward(model, inputs, labels)
            r = ift.log_odds_of_verdict(logits, labels, processor.tokenizer, common.verdict_token_ids(processor.tokenizer))
            for row, value in zip(part, r.tolist()):
                row["answer"]["log_odds"] = value


# ---- Best-of-N: the judge picks among responses, as it does among critiques (measured in 05) -------------------------
def knockout(candidates, prefer):
    """Winners among the first 1, 2, 4, ... candidates of each row, in one knockout: the tree over 2N candidates contains the
    tree over the first N. candidates: {row: list of 2^k texts}; prefer(list of (row, a, b)) -> list of bool, a wins."""
    alive = {key: list(texts) for key, texts in candidates.items()}
    winners = {key: [texts[0]] for key, texts in candidates.items()}
    while any(len(texts) > 1 for texts in alive.values()):
        games = [(key, texts[i], texts[i + 1]) for key, texts in alive.items() for i in range(0, len(texts), 2)]
        results = iter(zip(games, prefer(games)))
        for key, texts in alive.items():
            alive[key] = [a if a_wins else b for (_, a, b), a_wins in (next(results) for _ in range(len(texts) // 2))]
            winners[key].append(alive[key][0])
    return winners


def best_of_n(rows, candidates, model, processor, name, args):
    """{row id: winners among the first 1, 2, 4, ... candidates} by the judge's mean P over both orders."""
    pair_of = {row["id"]: row for row in rows}

    def prefer(games):
        played = [game for game in dict.fromkeys(games) if game[1] != game[2]]
        questions = [q for number, (key, a, b) in enumerate(played) for q in both_orders(
            {"id": str(number), "image": pair_of[key]["image"], "prompt": pair_of[key]["prompt"], "chosen": a, "rejected": b})]
        judged = ift.judge(model, processor, questions, args.image_root, args.style, max_new_tokens=args.max_new_tokens,
                           batch_size=args.batch_size, describe=f"best of N, {name}")
        for_a = Counter()
        for row in judged:
            for_a[played[int(row["id"])]] += row["probability_a"] if row["label"] == "A" else 1 - row["probability_a"]
        return [game[1] == game[2] or for_a[game] >= 1 for game in games]  # equal texts: either; mean of two >= .5

    return knockout(candidates, prefer)


def sample_and_pick(rows, judges, folder, args):
    """({row id: the policy's responses}, {judge: best_of_n's winners}); both are kept in best_of_n.jsonl."""
    model, processor = ift.load_judge(args)
    requests = [{"id": row["id"], "image": Path(args.image_root) / row["image"], "text": row["prompt"]} for row in rows]
    answers = common.sample(model, processor, requests, args.best_of, 1.0, args.max_new_tokens, args.seed, args.batch_size)
    candidates, picks = {row["id"]: [a["text"].strip() for a in texts] for row, texts in zip(rows, answers)}, {}
    for name, checkpoint in judges.items():
        model = None  # two models at a time would be one too many for the GPU
        model, processor = ift.load_judge(args, checkpoint)
        picks[name] = best_of_n(rows, candidates, model, processor, name, args)
    common.write_json(folder / "best_of_n.jsonl", [{"id": row["id"], "image": row["image"], "candidates": candidates[row["id"]],
                                                     **{name: picks[name][row["id"]] for name in picks}} for row in rows])
    return candidates, picks


def best_of_n_table(rows, candidates, picks, truth, vocabulary):
    """{name of the picker: {N: {"hallucinated": share of picks, "recall": mean}}}, with random and oracle picks alongside."""
    sizes, table = [2 ** k for k in range(len(next(iter(picks.values()))[rows[0]["id"]]))], {}

    def quality(text, objects):  # (names no absent object, share of the objects named); the oracle maximises their sum
        named = set(critiques_stage.find_mentions(text, vocabulary))
        return float(named <= objects), len(named & objects) / len(objects)

    for k, n in enumerate(sizes):
        for name in ("random pick", "oracle pick", *picks):
            scores = []
            for row in rows:
                offered = [picks[name][row["id"]][k]] if name in picks else candidates[row["id"]][:n]
                found = [quality(text, truth[row["image"]]) for text in offered]
                scores.append(max(found, key=sum) if name == "oracle pick" else np.mean(found, 0))
            clean, recall = np.mean(scores, 0)
            table.setdefault(name, {})[n] = {"hallucinated": float(1 - clean), "recall": float(recall)}
    return table


def find_checkpoint(folder):
    """The folder's adapter/ or model/, as stages 03 and 04 write them."""
    found = [path for path in (Path(folder) / "adapter", Path(folder) / "model") if path.exists()]
    return found[0] if found else common.stop(f"{folder} holds neither adapter/ nor model/: run the stage that writes it first")


# ---------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument
    add("--iterations", type=int, default=3, help="T")
    add("--pool", type=int, default=5000, help="fresh pairs per iteration")
    add("--samples", type=int, default=8, help="N, critiques per pair and order")
    add("--temperature", type=float, default=1.0)
    add("--retention", type=float, default=0.4, help="share of the pool to keep, those with the largest margins")
    add("--margin", type=float, help="tau: keep the pairs with at least this margin instead of a share")
    add("--select", choices=("margin", "random", "best", "continue"), default="margin", help="the rule, or a control")
    add("--replay", type=float, default=0.25, help="share of each batch drawn from stage 03's rows")
    add("--endpoint", help="URL of an OpenAI-compatible server that samples, with each iteration's newest adapter")
    ift.add_training_arguments(add, steps=125, lr=5e-5)
    args = parser.parse_args(argv)
    if not 0 < args.retention <= 1 or not 0 <= args.replay < 1:
        parser.error("need 0 < --retention <= 1 and 0 <= --replay < 1")
    return args


def run_iteration(t, pool, model, processor, vocabulary, replayed, folder, args):
    """Sample, select, train, save iteration t in folder -> counts."""
    counts = {}
    if args.select == "continue":
        judged, correct = ift.training_rows(replayed)
    else:
        last = folder.with_name(f"iter{t - 1}") if t > 1 else Path(args.run) / "03_ift"
        sampler = Endpoint(args, find_checkpoint(last), (model, processor)) if args.endpoint else model
        samples = critiques_stage.write_critiques(pool, sampler, processor, vocabulary, folder / "samples.jsonl", args.samples,
                                                  False, args, row_seed(args.seed, t))
        margins, passing = margins_of_pairs(samples)
        if not (kept := keep(margins, passing, args, t)):
            common.stop(f"iteration {t} keeps nothing: {dict(Counter(row['dropped'] for row in samples))}; lower --margin, or "
                        f"read {folder}/samples.jsonl")
        common.write_json(folder / "kept.jsonl", kept)
        pairs_kept = list(dict.fromkeys(row["pair_id"] for row in kept))
        share = len(pairs_kept) / len(pool)
        if common.RANK == 0:
            draw_margins(margins, pairs_kept, folder / "margins.png", f"iteration {t}, {args.select}: {share:.0%} kept")
        counts = {"pairs in the pool": len(pool), "critiques sampled": len(samples)}
        counts |= {f"dropped: {why}": n for why, n in Counter(row["dropped"] for row in samples).most_common() if why}
        counts |= {"pairs with margin 0": sum(m == 0 for m in margins.values()), "pairs kept": len(pairs_kept)}
        print(f"iteration {t}: kept {len(pairs_kept)} of {len(pool)} pairs = {share:.1%}, smallest kept margin "
              f"{min(margins[key] for key in pairs_kept):.3f}")
        if not 0.3 <= share <= 0.5:
            print(f"warning: retention {share:.1%} is outside 30-50 %: change --retention or --margin, or give harder or more pairs")
        judged, correct = ift.training_rows(kept)
        n_old = round(len(judged) * args.replay / (1 - args.replay))  # so many make up their share of each epoch
        old = set(select_random([row["id"] for row in replayed], n_old, row_seed(args.seed, "replay", t)))
        more = ift.training_rows([row for row in replayed if row["id"] in old])
        judged, correct = judged + more[0], correct + more[1]
    ift.train(model, processor, judged, correct, folder, **{**ift.training_settings(args), "seed": row_seed(args.seed, t)})
    ift.save_checkpoint(model, processor, folder)
    return counts


def main(args):
    ift.inherit(args, "03_ift", ("model", "max_image_tokens", "image_root", "style"))
    folder = start_stage(args, "04_rejection" + ("" if args.select == "margin" else f"_{args.select}"))
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    run = Path(args.run)
    pairs = read_jsonl(run / "01_preferences" / "preferences.jsonl", ("id", "image", "chosen", "rejected", "split", "evidence"))
    vocabulary = json.loads((run / "01_preferences" / "vocabulary.json").read_text())
    replayed = read_jsonl(run / "02_critiques" / "critiques.jsonl", ("id", "pair_id", "critique"))
    validation = [pair for pair in pairs if pair["split"] == "validation"]
    pools = cut_pools([pair for pair in pairs if pair["split"] == "pool"], args.pool, args.iterations)
    finished = [t for t in range(1, args.iterations + 1) if (folder / f"iter{t}" / "done.json").exists()]
    last = folder / f"iter{finished[-1]}" if finished else run / "03_ift"
    checkpoint = find_checkpoint(last)
    rank = json.loads((checkpoint / "adapter_config.json").read_text())["r"] if checkpoint.name == "adapter" else 0
    rows = f"the best of {sum(map(len, pools))} pairs in {len(pools)} iterations x 2 orders x {args.samples} critiques"
    ift.announce_training(args, rank, f"{len(replayed)} critiques of stage 02" if args.select == "continue" else rows)
    model, processor = ift.load_judge(args, checkpoint, rank)
    replayed = ift.drop_long(replayed, processor, args.max_response_tokens)

    # 2. iterate --------------------------------------------------------------------------------------------------
    results = {f"iteration {t}": json.loads((folder / f"iter{t}" / "done.json").read_text()) for t in finished}
    for t in range(1, args.iterations + 1):
        here = folder / f"iter{t}"
        if t not in finished:
            here.mkdir(exist_ok=True)
            (here / "metrics.jsonl").unlink(missing_ok=True)
            counts = run_iteration(t, pools[t - 1], model, processor, vocabulary, replayed, here, args)
            result = ift.validate(model, processor, validation, here, f"iteration {t}", args)
            results[f"iteration {t}"] = {"counts": counts, "validation": result}
            common.write_json(here / "done.json", results[f"iteration {t}"])

    # 3. report ---------------------------------------------------------------------------------------------------
    counts = {f"{step}, {name}": n for step, result in results.items() for name, n in result["counts"].items()}
    finish_stage(folder, args, counts, [run / "01_preferences" / "preferences.jsonl"],
                 f"python 05_evaluate.py --run {args.run} --pairs HELD_OUT.jsonl", iterations=results)


if __name__ == "__main__":
    main(parse_args())
