"""04  Margin-based rejection sampling: the judge learns from its own best critiques.

    S(c)   = P(label | c) = sigmoid(+-r(c))                 confidence in the label after critique c
    margin = S(c+) - S(c-)       c+: largest S among the critiques that pass stage 02's filters
                                 c-: smallest S of all that have a verdict
    pair:    mean of its two orders; kept if both orders have a passing critique and the margin is
             among the top --retention of the pool (or >= --margin). Then L_IFT on the kept c+, from
             the adapter of iteration t-1.

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) S is read from the judge's own log-odds at the verdict, in the pass that sampled the critique;
  2) a share of each epoch is stage 02's critiques (--replay), since a few hundred rows alone make
     the judge forget its format;
  3) four controls of the same steps, --select low (smallest margins), random (pairs and critiques
     by lot), best (pairs by lot, best critiques), continue (02's critiques, as in stage 03).

Reads  01's pairs of split "pool", cut into disjoint iterations; 02's critiques; what 03 trained.
Writes 04_rejection[_TAG][_<control>]/iter<t>/: answers.jsonl, samples.jsonl (all critiques),
       margins.png, adapter/, validation.jsonl, kept.jsonl:
    {"id": "00748-0-ab-0", "pair_id": "00748-0", "order": "ab", "image": "images/00748.png",
     "prompt": "List the objects in the image.", "response_a": "purple star, red cross.",
     "response_b": "purple star, red diamond.", "label": "A", "critique": "A: purple star: yes\\nA:
     red cross: yes\\nB: purple star: yes\\nB: red diamond: no\\nVerdict: A", "style": "critique",
     "verdict": "A", "log_odds": 6.114695, "dropped": null, "confidence_in_label": 0.997795,
     "margin": 0.994867, "iteration": 1}

    python 04_rejection_sampling.py --run runs/demo --iterations 2 --pool 600 --steps 60
    python 04_rejection_sampling.py        # one GPU: 3 iterations x 5,000 pairs x 2 orders x 8
"""

import random
from collections import Counter
from importlib import import_module
from pathlib import Path
from statistics import mean, median

import torch
from matplotlib.figure import Figure

import common
from common import real, row_seed, stop, whole

two = import_module("02_generate_critiques")
three = import_module("03_train_ift")


# ---- The method: confidence, margin, selection ---------------------------------------------------
def confidence_in_label(log_odds, label_is_a):
    """S = P(label) = sigmoid(+-r) in [0,1] (B,): log_odds r (B,) in nats, label_is_a (B,) bool."""
    return torch.where(label_is_a, log_odds, -log_odds).sigmoid()


def margin(confidences, passes):
    """S(c+) - S(c-) of one question, in [0,1]: c+ has the largest S among the critiques that pass
    02's filters, c- the smallest S of all. 0 where none passes: there is nothing to learn from.

    >>> round(margin([0.9, 0.2, 0.97], [True, False, False]), 6), margin([0.9, 0.2], [False, False])
    (0.7, 0.0)"""
    passing = [s for s, ok in zip(confidences, passes, strict=True) if ok]
    return max(passing) - min(confidences) if passing else 0.0


def select_by_margin(margins, threshold=None, retention=None):
    """Ids in falling order of margin (ties: by id): all with margin >= threshold (0 included), or
    the first part `retention` of all ids, of which those with margin 0 are left out.

    margins: {id: margin in [0,1]}; give one of the two rules, else ValueError.

    >>> select_by_margin({"a": 0.1, "b": 0.8, "c": 0.8, "d": 0.0, "e": 0.3}, retention=0.4)
    ['b', 'c']"""
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
    images = [pair["image"] for pair in pairs]
    pools = []
    start = 0
    for t in range(iterations):
        end = min(start + size, len(pairs))
        while end < len(pairs) and images[end] == images[end - 1]:
            end += 1  # 01 has left the pairs of an image together
        if end - start < 2:
            stop(f"the pool ({len(pairs)} pairs) is used up in iteration {t + 1} of {iterations}")
        pools.append(pairs[start:end])
        start = end
    return pools


def critiques_by_question(samples):
    """{(pair id, order): its critiques with a verdict, each with its "confidence_in_label"}.

    A critique without a verdict has no S and does not enter."""
    decided = [row for row in samples if row["log_odds"] is not None]
    log_odds = torch.tensor([row["log_odds"] for row in decided])  # (B,) in nats
    label_is_a = torch.tensor([row["label"] == "A" for row in decided], dtype=torch.bool)  # (B,)
    confidences = confidence_in_label(log_odds, label_is_a).tolist()
    questions = {}
    for row, confidence in zip(decided, confidences):
        key = (row["pair_id"], row["order"])
        questions.setdefault(key, []).append({**row, "confidence_in_label": confidence})
    return questions


def margins_of_pairs(pair_ids, questions):
    """({pair id: margin}, {(pair id, order): passing critiques of an eligible pair}).

    A pair is eligible if both orders have a passing critique. Its margin is the mean of its two
    orders; that of the others is 0."""
    margins, passing = {}, {}
    for pair_id in pair_ids:
        margin_of_order, passing_of_order = [], {}
        for order in ("ab", "ba"):
            rows = questions.get((pair_id, order), [])
            confidences = [row["confidence_in_label"] for row in rows]
            passes = [row["dropped"] is None for row in rows]
            margin_of_order.append(margin(confidences, passes))
            passing_of_order[pair_id, order] = [row for row in rows if row["dropped"] is None]
        margins[pair_id] = 0.0
        if all(passing_of_order.values()):
            margins[pair_id] = mean(margin_of_order)
            passing |= passing_of_order
    return margins, passing


def choose(margins, passing, select, threshold, retention, seed, iteration):
    """The kept questions, two per pair, each with the one critique to train on.

    select: "margin", the pairs with the largest margins and the critique with the largest S of each
    question. Controls take as many eligible pairs: "low" the smallest margins, "best" any by lot,
    both with the critique with the largest S; "random" pairs and critiques by lot."""
    eligible = {key: value for key, value in margins.items() if (key, "ab") in passing}
    if threshold is None:  # a share of the whole pool, of which margin 0 is never kept
        pair_ids = select_by_margin(margins, retention=retention)
    else:
        pair_ids = select_by_margin(eligible, threshold=threshold)
    n = len(pair_ids)
    if select == "low":
        pair_ids = sorted(eligible, key=lambda key: (eligible[key], key))[:n]
    elif select in ("best", "random"):
        pair_ids = select_random(eligible, n, row_seed(seed, "select", iteration))
    selected = []
    for pair_id in pair_ids:
        for order in ("ab", "ba"):
            rows = passing[pair_id, order]
            if select == "random":
                lot = random.Random(row_seed(seed, "critique", iteration, pair_id, order))
                row = lot.choice(rows)
            else:
                row = max(rows, key=lambda row: row["confidence_in_label"])
            selected.append({**row, "margin": margins[pair_id], "iteration": iteration})
    return selected


def mix_in(selected, old, replay, seed):
    """The selected rows and as many old ones as make up the part `replay` of an epoch."""
    n = round(len(selected) * replay / (1 - replay))  # old to selected as replay to 1 - replay
    old_ids = [row["id"] for row in old]
    replayed = set(select_random(old_ids, n, seed))
    return selected + [row for row in old if row["id"] in replayed]


def draw_margins(path, margins, kept_ids, title):
    """Histogram of the pool's margins, the kept ones in front; a line at the smallest kept."""
    figure = Figure((6, 3.2), layout="tight")
    axis = figure.subplots()
    bins = [i / 25 for i in range(26)]
    of_kept = [margins[key] for key in kept_ids]
    axis.hist(margins.values(), bins, color="lightgrey", label=f"pool, {len(margins)} pairs")
    axis.hist(of_kept, bins, color="seagreen", label=f"kept, {len(of_kept)}")
    smallest = min(of_kept)
    axis.axvline(smallest, color="black", linestyle=":", label=f"smallest kept, {smallest:.3f}")
    axis.set_yscale("symlog", linthresh=1)  # so that a single pair is seen beside thousands
    axis.set_xlabel("margin of a pair: mean over orders of S(c+) - S(c-)")
    axis.set(ylabel="pairs", title=title)
    axis.legend()
    figure.savefig(path, dpi=140)


# ---- Iterations, arguments and main --------------------------------------------------------------
def choose_from(samples, pool, folder, t, args):
    """(kept questions of iteration t, counts of how it went); writes and says it, too."""
    common.write_jsonl(folder / "samples.jsonl", samples)
    pair_ids = [pair["id"] for pair in pool]
    margins, passing = margins_of_pairs(pair_ids, critiques_by_question(samples))
    rule = (args.select, args.margin, args.retention)
    selected = choose(margins, passing, *rule, args.seed, t)
    if not selected:
        stop(f"iteration {t} keeps nothing (--retention, --margin): read {folder}/samples.jsonl")
    common.write_jsonl(folder / "kept.jsonl", selected)

    kept_ids = {row["pair_id"] for row in selected}
    n_kept = len(kept_ids)
    part = n_kept / len(pool)
    title = f"iteration {t}, {args.select}: {part:.0%} kept"
    draw_margins(folder / "margins.png", margins, kept_ids, title)
    print(f"iteration {t}: kept {n_kept} of {len(pool)} pairs = {part:.1%}")
    middle = median(margins[key] for key in kept_ids)
    of_pool = median(margins.values())
    print(f"margins of the kept: median {middle:.3f}, of the pool {of_pool:.3f}")
    if args.select == "margin" and middle < 0.05:
        print("warning: margins are narrow, the choice is near to chance: try more --samples")
    if not 0.3 <= part <= 0.5:
        print("warning: retention is outside 30-50 %: change --retention or --margin, or the pool")
    counts = {"pairs in the pool": len(pool), "critiques sampled": len(samples)}
    for reason, n in Counter(row["dropped"] for row in samples).most_common():
        if reason:
            counts[f"dropped: {reason}"] = n
    counts["pairs with margin 0"] = list(margins.values()).count(0)
    counts["pairs kept"] = n_kept
    return selected, counts


def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument_group("sampling and selection").add_argument
    add("--iterations", type=whole(1), default=3, help="T, each with --steps steps (%(default)s)")
    size = "fresh pairs per iteration; else a T-th of 01's pool, at most a third or 5,000"
    add("--pool", type=whole(2), help=size)
    add("--samples", type=whole(1), default=8, help="N, per pair and order (%(default)s)")
    add("--temperature", type=real(0, 100), default=1.0, help="of sampling (%(default)s)")
    add("--retention", type=real(0.001, 1), default=0.4, help="part of the pool (%(default)s)")
    add("--margin", type=real(0, 1), help="tau: keep the pairs with at least this margin instead")
    rules = ("margin", "low", "random", "best", "continue")
    add("--select", choices=rules, default="margin", help="the rule, or a control (see the header)")
    replay = "part of an epoch that is stage 02's (%(default)s)"
    add("--replay", type=real(0, 0.99), default=0.25, help=replay)
    three.add_training_arguments(parser, steps=125, lr=5e-5)
    return parser.parse_args(argv)


# The arguments that decide what is sampled, and what of it is trained on.
SAMPLED_BY = ("seed", "pool", "samples", "temperature", "max_new_tokens")
CHOSEN_BY = ("select", "retention", "margin", "replay")


def main(args):
    run = Path(args.run)
    first = common.stage_args(run, "01_preferences")
    style = common.stage_args(run, "02_critiques")["style"]
    tag = f"_{args.tag}" if args.tag else ""
    common.stage_args(run, f"03_ift{tag}")  # stops where it is not complete
    control = "" if args.select == "margin" else f"_{args.select}"
    folder = common.start_stage(args, f"04_rejection{tag}{control}")

    # 1. read --------------------------------------------------------------------------------------
    vocabulary = common.read_json(run / "01_preferences" / "vocabulary.json")
    validation = common.read_preferences(run, "validation")
    old = three.read_critiques(run)
    pools = [[]] * args.iterations
    if args.select != "continue":  # which needs none
        pairs = common.read_preferences(run, "pool")
        equal_part = len(pairs) // max(3, args.iterations)
        pools = cut_pools(pairs, args.pool or min(5000, equal_part), args.iterations)
    load = {"device": args.device, "max_image_tokens": first["max_image_tokens"], "trainable": True}
    after_03 = run / f"03_ift{tag}"
    of_now = {"style": style, "rows": common.digest(old)}  # 02 may have been made anew since
    trained = three.find_checkpoint(after_03, of_now)
    if trained is None:
        stop(f"{after_03} holds no adapter/ or model/: run stage 03 again")
    judge = common.Judge(first["model"], trained, **load)
    root = first["image_root"]
    names = (*three.TRAINED_WITH, *SAMPLED_BY, *CHOSEN_BY)
    settings = {"style": style, **{name: getattr(args, name) for name in names}}
    asking = {"style": style, "image_root": root, "batch_size": args.batch_size}
    asking["max_new_tokens"] = args.max_new_tokens
    sampling = {**asking, "is_guided": False, "n": args.samples, "temperature": args.temperature}
    validating = {**asking, "seed": args.seed}  # sampling has a seed of each iteration

    # 2. iterate -----------------------------------------------------------------------------------
    counts, results = {}, {}
    for t, pool in enumerate(pools, 1):
        here = folder / f"iter{t}"
        here.mkdir(exist_ok=True)
        answers = here / "answers.jsonl"
        seed = row_seed(args.seed, t)
        made_with = {**settings, "iteration": t, "start": judge.weights}
        made_with["rows"] = common.digest([pool, old])
        trained = three.find_checkpoint(here, made_with)  # stops here, before its work
        if t == 1:  # a later one starts from the judge that was validated last
            (folder / "meta.json").unlink(missing_ok=True)
            earlier, _ = three.validate(answers, judge, validation, "after 03", **validating)

        if args.select == "continue":
            critiques, of_choice = old, {}
        else:
            samples = two.write_critiques(answers, judge, pool, vocabulary, seed=seed, **sampling)
            selected, of_choice = choose_from(samples, pool, here, t, args)
            critiques = mix_in(selected, old, args.replay, row_seed(args.seed, "replay", t))
        if trained is None:
            trained = three.fit(judge, critiques, here, made_with, root, seed, args)
        judge = common.Judge(first["model"], trained, **load)

        later, measures = three.validate(answers, judge, validation, f"iteration {t}", **validating)
        three.write_card(trained, first, measures)
        common.write_jsonl(here / "validation.jsonl", later)
        three.report_gain(earlier, later, "saturation, or too few pairs")
        earlier = later
        results[f"iteration {t}"] = measures
        of_choice |= common.read_json(trained / "made_with.json")["counts"]
        for line, n in of_choice.items():
            counts[f"iteration {t}, {line}"] = n

    # 3. report ------------------------------------------------------------------------------------
    flag = f" --tag {args.tag}" if args.tag else ""
    next_script = f"python 05_evaluate.py{flag}"
    common.finish_stage(folder, args, counts, next_script, validation=results)


if __name__ == "__main__":
    common.run(main, parse_args())
