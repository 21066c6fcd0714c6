"""04  Margin-based rejection sampling: the judge learns from its own best critiques.

    S(c)   = P(label | c) = sigmoid(+-r(c))                 confidence in the label after critique c
    margin = S(c+) - S(c-)       c+: largest S among the critiques that pass stage 02's filters
                                 c-: smallest S of all that have a verdict
    pair:    mean of its two orders; kept if both orders have a passing critique and the margin is
             among the top --retention of the pool (or >= --margin). Then L_IFT on the kept c+, from
             the adapter of iteration t-1.

What a margin selects: pairs about which the judge disagrees with itself, so hard ones and
mislabelled ones alike. The expert's findings, in stage 02's filters, keep the wrong labels out.

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) S is read from the judge's own log-odds at the verdict, in the pass that sampled the critique;
  2) a share of each epoch is stage 02's critiques (--replay), since a few hundred rows alone make
     the judge forget its format;
  3) three controls of the same steps: --select random (as many pairs, drawn among those that have
     passing critiques, and one of these), best (such pairs, the critique with the largest S),
     continue (stage 02's critiques, as in stage 03).

Reads  01_preferences/preferences.jsonl (split "pool", cut into disjoint iterations), 03_ift/,
       02_critiques/critiques.jsonl.
Writes 04_rejection[_<control>]/iter<t>/: samples.jsonl (all critiques), margins.png, examples.png,
       adapter/, validation.jsonl, kept.jsonl:
    {"id": "00748-0-ab-0", "pair_id": "00748-0", "order": "ab", "image": "images/00748.png",
     "prompt": "List the objects in the image.", "response_a": "purple star, red cross, blue
     diamond.", "response_b": "purple star, red cross, red diamond.", "label": "A", "critique":
     "A: purple star: yes\\nA: red cross: yes\\nA: blue diamond: yes\\nB: purple star: yes\\nB: red
     cross: yes\\nB: red diamond: no\\nVerdict: A", "style": "critique", "verdict": "A", "log_odds":
     6.114695, "dropped": null, "confidence_in_label": 0.997795, "margin": 0.994867, "iteration": 1}

    python 04_rejection_sampling.py --run runs/demo --iterations 2 --pool 600 --steps 60
    python 04_rejection_sampling.py        # one GPU: 3 iterations x 5,000 pairs x 2 orders x 8
"""

import importlib
import random
import shlex
from collections import Counter
from pathlib import Path
from statistics import mean, median

import torch
from matplotlib.figure import Figure

import common
from common import row_seed

one = importlib.import_module("01_build_preferences")
two = importlib.import_module("02_generate_critiques")
ift = importlib.import_module("03_train_ift")


# ---- The method: confidence, margin, selection ---------------------------------------------------
def confidence_in_label(log_odds, label_is_a):
    """S = P(label) = sigmoid(+-r) in [0,1] (B,): log_odds r (B,) in nats, label_is_a (B,) bool."""
    return torch.where(label_is_a, log_odds, -log_odds).sigmoid()


def margin(confidences, right):
    """S(c+) - S(c-) of one question, in [0,1]: c+ has the largest S among the right (passing)
    critiques, c- the smallest S of all. 0 where none is right: there is nothing to learn from.

    >>> round(margin([0.9, 0.2, 0.97], [True, False, False]), 6), margin([0.9, 0.2], [False, False])
    (0.7, 0.0)
    """
    passing = [s for s, ok in zip(confidences, right, strict=True) if ok]
    return max(passing) - min(confidences) if passing else 0.0


def select_by_margin(margins, threshold=None, retention=None):
    """Ids in falling order of margin (ties: by id): those with margin >= threshold, or the top
    share `retention` of them, where margin 0 is never kept, even if fewer remain.

    margins: {id: margin in [0,1]}; give one of the two rules, else ValueError.

    >>> select_by_margin({"a": 0.1, "b": 0.8, "c": 0.8, "d": 0.0, "e": 0.3}, retention=0.4)
    ['b', 'c']
    """
    if (threshold is None) == (retention is None):
        raise ValueError("give threshold or retention, one of them")
    ranked = sorted(margins, key=lambda key: (-margins[key], key))
    if threshold is not None:
        return [key for key in ranked if margins[key] >= threshold]
    return [key for key in ranked[: round(retention * len(ranked))] if margins[key] > 0]


def select_random(ids, n, seed):
    """n of the ids, each equally likely, whatever their order: the control of the same size."""
    return random.Random(seed).sample(sorted(ids), min(n, len(ids)))


# ---- Pools, margins of pairs, the rules ----------------------------------------------------------
def cut_pools(pairs, size, iterations):
    """Disjoint pools of about `size` pairs, all pairs of an image in one of them."""
    pools, start = [], 0
    for t in range(iterations):
        end = min(start + size, len(pairs))
        while end < len(pairs) and pairs[end]["image"] == pairs[end - 1]["image"]:
            end += 1  # 01 keeps the pairs of an image together
        if end - start < 2:
            common.stop(
                f"the pool of {len(pairs)} pairs is used up after iteration {t}: lower "
                "--iterations; or begin anew with a lower --pool, or with a lower --train or more "
                "images or pairs in stage 01"
            )
        pools.append(pairs[start:end])
        start = end
    return pools


def confident_rows(samples):
    """{(pair id, order): its critiques with a verdict, each with its "confidence_in_label"}.

    A critique without a verdict has no S and does not enter.
    """
    questions = {}
    for row in samples:
        if row["log_odds"] is not None:
            r = torch.tensor([row["log_odds"]])  # (1,)
            s = confidence_in_label(r, torch.tensor([row["label"] == "A"])).item()
            row = {**row, "confidence_in_label": s}
            questions.setdefault((row["pair_id"], row["order"]), []).append(row)
    return questions


def margins_of_pairs(pair_ids, questions, margin=margin):
    """({pair id: mean margin of its two orders}, {(pair id, order): passing critiques}).

    The margin is 0 where an order offers no passing critique: such a pair is not kept. margin: of
    a question, from its critiques' confidences and which of them pass.
    """
    margins, passing = {}, {}
    for pair_id in pair_ids:
        margin_of_order = []
        for order in ("ab", "ba"):
            rows = questions.get((pair_id, order), [])
            passes = [row["dropped"] is None for row in rows]
            margin_of_order.append(margin([row["confidence_in_label"] for row in rows], passes))
            passing[pair_id, order] = [row for row, ok in zip(rows, passes) if ok]
        both = passing[pair_id, "ab"] and passing[pair_id, "ba"]
        margins[pair_id] = mean(margin_of_order) if both else 0.0
    return margins, passing


# Rules, each with one signature for its kind (see RULES), whether or not it uses every argument.
def pairs_by_margin(margins, eligible, threshold, retention, seed):
    """The pairs with the largest margins.

    A share counts the whole pool: pairs that are not eligible have margin 0 and are never kept.
    With --margin 0 they would pass, so a threshold sees only the eligible ones.
    """
    if threshold is None:
        return select_by_margin(margins, retention=retention)
    return select_by_margin({key: margins[key] for key in eligible}, threshold=threshold)


def pairs_at_random(margins, eligible, threshold, retention, seed):
    """As many eligible pairs as the margin would keep."""
    n = len(pairs_by_margin(margins, eligible, threshold, retention, seed))
    return select_random(eligible, n, seed)


def best_critique(rows, seed):
    """c+: the passing critique with the largest S."""
    return max(rows, key=lambda row: row["confidence_in_label"])


def any_critique(rows, seed):
    return random.Random(seed).choice(rows)


# --select: (a question's margin, which pairs, which of a question's passing critiques); a study may
# add its own rules
RULES = {
    "margin": (margin, pairs_by_margin, best_critique),
    "random": (margin, pairs_at_random, any_critique),
    "best": (margin, pairs_at_random, best_critique),
}


def keep(margins, passing, select, threshold, retention, seed, iteration):
    """The kept questions, two per pair, each with the one critique to train on."""
    _, choose_pairs, choose_critique = RULES[select]
    eligible = [key for key in margins if passing[key, "ab"] and passing[key, "ba"]]
    pairs_seed = row_seed(seed, "select", iteration)
    kept = []
    for pair_id in choose_pairs(margins, eligible, threshold, retention, pairs_seed):
        for order in ("ab", "ba"):
            critique_seed = row_seed(seed, "critique", iteration, pair_id, order)
            row = choose_critique(passing[pair_id, order], critique_seed)
            kept.append({**row, "margin": margins[pair_id], "iteration": iteration})
    return kept


def mix_in(kept, old, replay, seed):
    """The kept rows and as many old ones as make up the share `replay` of an epoch."""
    n = round(len(kept) * replay / (1 - replay))
    chosen = set(select_random([row["id"] for row in old], n, seed))
    return kept + [row for row in old if row["id"] in chosen]


def draw_margins(path, margins, kept_ids, title):
    """Histogram of the pool's margins, the kept ones in front, from the smallest kept one on."""
    figure = Figure((6, 3.2), layout="tight")
    axis = figure.subplots()
    bins = [i / 25 for i in range(26)]
    kept = [margins[key] for key in kept_ids]
    axis.hist(margins.values(), bins, color="lightgrey", label=f"pool, {len(margins)} pairs")
    axis.hist(kept, bins, color="seagreen", label=f"kept, {len(kept)}")
    smallest = min(kept)
    axis.axvline(smallest, color="black", linestyle=":", label=f"smallest kept, {smallest:.3f}")
    axis.set_xlabel("margin of a pair: mean over orders of S(c+) - S(c-)")
    axis.set(ylabel="pairs", title=title, yscale="log")
    axis.legend()
    figure.savefig(path, dpi=110)


def draw_examples(path, margins, questions, image_root):
    """A pair of low, of middle and of high margin, of those with passing critiques: of one order
    the critique c+ with the largest S among the passing, and c- with the smallest S of all.
    """
    ranked = [key for key in sorted(margins, key=margins.get) if margins[key] > 0]
    places = [0, len(ranked) // 2, len(ranked) - 1] if ranked else []
    cards = []
    for pair_id in dict.fromkeys(ranked[place] for place in places):
        rows = sorted(questions[pair_id, "ab"], key=lambda row: row["confidence_in_label"])
        best = [row for row in rows if row["dropped"] is None][-1]
        lines = [f"margin of the pair {margins[pair_id]:.3f}; better: {best['label']}"]
        lines += [f"A: {best['response_a']}", f"B: {best['response_b']}"]
        for name, row in (("c+", best), ("c-", rows[0])):
            of_row = row["critique"].splitlines()[:20]
            lines += ["", f"{name}, S = {row['confidence_in_label']:.3f}:", *of_row]
        cards.append({"image": Path(image_root) / best["image"], "lines": lines})
    common.draw_cards(path, cards, 3)


# ---- Iterations, arguments and main --------------------------------------------------------------
def select_critiques(t, pool, model, processor, vocabulary, folder, args, **judging):
    """(kept critique rows, counts) of iteration t: sample the pool, take margins, keep the best.

    judging: image_root, style, batch_size, max_new_tokens.
    """
    samples = two.write_critiques(
        pool,
        model,
        processor,
        vocabulary,
        folder / "samples.jsonl",
        n=args.samples,
        guided=False,
        temperature=args.temperature,
        seed=row_seed(args.seed, t),
        **judging,
    )
    pair_ids, questions = [pair["id"] for pair in pool], confident_rows(samples)
    margins, passing = margins_of_pairs(pair_ids, questions, RULES[args.select][0])
    kept = keep(margins, passing, args.select, args.margin, args.retention, args.seed, t)
    reasons = Counter(row["dropped"] for row in samples)
    if not kept:
        common.stop(
            f"iteration {t} keeps nothing of {dict(reasons)}: lower --margin or raise --retention; "
            f"where no sample passes (None), read {folder}/samples.jsonl"
        )
    common.write_jsonl(folder / "kept.jsonl", kept)
    kept_ids = list(dict.fromkeys(row["pair_id"] for row in kept))
    share, kept_margins = len(kept_ids) / len(pool), [margins[key] for key in kept_ids]
    title = f"iteration {t}, {args.select}: {share:.0%} kept"
    common.draw(draw_margins, folder / "margins.png", margins, kept_ids, title)
    image_root = judging["image_root"]
    common.draw(draw_examples, folder / "examples.png", margins, questions, image_root)
    print(f"iteration {t}: kept {len(kept_ids)} of {len(pool)} pairs = {share:.1%}")
    middle = median(kept_margins)
    print(f"margins of the kept: median {middle:.3f}, smallest {min(kept_margins):.3f}")
    if args.select == "margin" and middle < 0.05:
        print(
            "warning: margins are narrow, so the judge hardly disagrees with itself and the choice "
            "is near to chance: try more --samples or a higher --temperature"
        )
    if not 0.3 <= share <= 0.5:
        print(
            f"warning: retention is outside 30-50 %: the pool's median margin is "
            f"{median(margins.values()):.3f}; change --retention or --margin, or the pool"
        )
    counts = {"pairs in the pool": len(pool), "critiques sampled": len(samples)}
    counts |= {f"dropped: {why}": n for why, n in reasons.most_common() if why}
    counts["pairs with margin 0"] = sum(value == 0 for value in margins.values())
    return kept, {**counts, "pairs kept": len(kept_ids)}


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument_group("sampling and selection").add_argument
    add("--iterations", type=int, default=3, help="T, each with --steps steps of training")
    add("--pool", type=int, default=5000, help="fresh pairs per iteration")
    add("--samples", type=int, default=8, help="N, critiques per pair and order")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--retention", type=float, default=0.4, help="share of the pool to keep")
    add("--margin", type=float, help="tau: keep the pairs with at least this margin instead")
    rules = (*RULES, "continue")
    add("--select", choices=rules, default="margin", help="the rule, or a control")
    add("--replay", type=float, default=0.25, help="share of an epoch that is stage 02's")
    ift.add_training_arguments(parser, steps=125, lr=5e-5)
    return parser.parse_args(argv)


# What only chooses among the first iteration's samples and trains on them may change from one start
# to the next: these samples stay, the rest is made anew.
CHOICES = ("retention", "margin", "replay", "steps", "lr", "lam", "bt_weight", "train_batch")
MAY_CHANGE = dict.fromkeys((*CHOICES, "max_response_tokens"), ["iter1/samples.jsonl"])
MAY_CHANGE["iterations"] = ["iter*/*", "iter*/*/*"]  # more: all that is there stays


def main(args):
    ift.check_train_batch(args.train_batch)
    first = common.args_of(args.run, "01_preferences", "model", "image_root")
    style = common.args_of(args.run, "02_critiques", "style")["style"]
    common.args_of(args.run, "03_ift")  # stops where stage 03 is not complete
    control = "" if args.select == "margin" else f"_{args.select}"
    inputs = common.files_of(args.run, "01_preferences", "preferences.jsonl", "vocabulary.json")
    inputs += common.files_of(args.run, "02_critiques", "critiques.jsonl")
    inputs += common.files_of(args.run, "03_ift")
    inputs += (Path(args.run) / "03_ift").glob("adapter/*.safetensors")
    name = f"04_rejection{control}"
    n_made = len(list((Path(args.run) / name).glob("iter*/done.json")))
    if n_made > args.iterations and not args.overwrite:  # 05 would still judge by the others
        common.stop(f"{args.run}/{name} has {n_made} iterations: for fewer --overwrite, or --run")
    folder = common.start_stage(args, name, inputs, MAY_CHANGE)
    if folder is None:
        return

    # 1. load --------------------------------------------------------------------------------------
    run = Path(args.run)
    vocabulary = one.read_vocabulary(run / "01_preferences" / "vocabulary.json")
    validation = common.read_preferences(run, "validation")
    pool = common.read_preferences(run, "pool")
    pools = []
    if args.select != "continue":  # which needs none
        pools = cut_pools(pool, args.pool, args.iterations)
    old = ift.read_critiques(run)
    results, checkpoint = {}, common.find_checkpoint(run / "03_ift")
    for t in range(1, args.iterations + 1):
        done = folder / f"iter{t}" / "done.json"
        if not done.exists():
            break
        result = common.read_json(done)
        results[f"iteration {t}"] = {key: result[key] for key in ("counts", "validation")}
        checkpoint = common.find_checkpoint(done.parent)
        ift.forget_training(done.parent)  # a kill may have come between the two
    model, processor = common.load_judge(
        first["model"], checkpoint, args.device, first.get("max_image_tokens"), trainable=True
    )
    if checkpoint.name == "model":  # load_judge unfreezes adapters alone
        model = ift.make_trainable(model, 0)
    judging = {"image_root": first["image_root"], "style": style, "batch_size": args.batch_size}
    judging["max_new_tokens"] = args.max_new_tokens

    # 2. iterate -----------------------------------------------------------------------------------
    n_done, judged_before = len(results), ift.read_validation(checkpoint.parent)
    for t in range(n_done + 1, args.iterations + 1):
        here = folder / f"iter{t}"
        here.mkdir(exist_ok=True)
        critiques, counts = old, {}
        if args.select != "continue":
            kept, counts = select_critiques(
                t, pools[t - 1], model, processor, vocabulary, here, args, **judging
            )
            critiques = mix_in(kept, old, args.replay, row_seed(args.seed, "replay", t))
        seed = row_seed(args.seed, t)
        data, more = ift.training_steps(critiques, processor, first["image_root"], seed, args)
        ift.train(model, data, here, **ift.training_settings(args))
        ift.save_checkpoint(model, processor, here)
        result = ift.validate(model, processor, validation, here, f"iteration {t}", **judging)
        judged = ift.read_validation(here)
        ift.report_gain(judged_before, judged, "saturation, or too few pairs")
        ift.report_following(judged)
        judged_before = judged
        results[f"iteration {t}"] = {"counts": {**counts, **more}, "validation": result}
        made_with = common.read_json(folder / "args.json")  # by which 05 knows this judge
        common.write_json(here / "done.json", {**results[f"iteration {t}"], **made_with})
        ift.forget_training(here)

    # 3. report ------------------------------------------------------------------------------------
    counts = {}
    for name, result in results.items():
        counts |= {f"{name}, {line}": n for line, n in result["counts"].items()}
    next_command = f"python 05_evaluate.py --run {shlex.quote(args.run)} --pairs HELD_OUT.jsonl"
    common.finish_stage(folder, args, counts, (), next_command, iterations=results)


if __name__ == "__main__":
    common.run(main, parse_args())
