"""Tables and pictures of study.py's results, from assets/results.jsonl alone.

Every interval is 95 %, over worlds and images together: worlds are drawn with replacement, and of
each one of its recorded resamples. A difference is taken within each world and resample, so it is
paired. It counts (marked *) where its interval leaves out zero and at least FEW worlds are in it:
without any difference it leaves out zero in some 18-33 % of the cases over two worlds, in 8 % over
eight; and it knows nothing of training once more, which moves a judge by about .01.
"""

import itertools
import json
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

FEW = 5  # worlds


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Cells: of each world a mean and its resamples -----------------------------------------------
def of_setting(lines, study, setting):
    """{seed: the line recorded first}, without worlds that were refused."""
    found = {}
    for line in lines:
        if (line["study"], line["setting"]) == (study, setting) and line["accuracies"]:
            found.setdefault(line["seed"], line)
    return dict(sorted(found.items()))


def cells(lines, study, setting, condition):
    """{seed: (accuracy, its resamples (100,))}."""
    found = {}
    for seed, line in of_setting(lines, study, setting).items():
        if condition in line["accuracies"]:
            draws = np.array(line["bootstrap"][condition]) / 1e4
            found[seed] = (line["accuracies"][condition], draws)
    return found


def mean_count(lines, study, setting, count):
    """Of a setting's counts, one's mean over the worlds that have it; None without any."""
    found = [line["counts"].get(count) for line in of_setting(lines, study, setting).values()]
    found = [value for value in found if value is not None]
    return mean(found) if found else None


def minus(a, b):
    """Paired difference, over the worlds that have both."""
    return {seed: (a[seed][0] - b[seed][0], a[seed][1] - b[seed][1]) for seed in a if seed in b}


def interval(of_worlds, n=20000, seed=0):
    """95 % (low, high) of the mean over worlds: worlds drawn, then a resample of each."""
    draws = np.array([draws for _, draws in of_worlds.values()])  # (W, 100)
    rng = np.random.default_rng(seed)
    worlds = rng.integers(len(draws), size=(n, len(draws)))  # (n, W)
    resample = rng.integers(draws.shape[1], size=(n, len(draws)))  # (n, W)
    low, high = np.percentile(draws[worlds, resample].mean(1), [2.5, 97.5])
    return float(low), float(high)


def average(of_worlds):
    return mean(value for value, _ in of_worlds.values())


# ---- Lines of tables -----------------------------------------------------------------------------
def number(value, sign=""):
    return f"{round(value, 3) + 0:{sign}.3f}".replace("0.", ".", 1)  # + 0: no -.000


def table(title, rows, sign=""):
    """rows: {name: cells}; sign: "+" of differences."""
    seeds = sorted(set().union(*rows.values()))
    what = "difference" if sign else "accuracy"
    out = heading([title, what, "95 % interval", f"worlds {' '.join(map(str, seeds))}"])
    for name, of_worlds in rows.items():
        if not of_worlds:
            out.append(f"| {name} | not measured |  |  |")
            continue
        worlds = " ".join(number(of_worlds[x][0], sign) if x in of_worlds else "-" for x in seeds)
        low, high = interval(of_worlds)
        is_clear = sign and len(of_worlds) >= FEW and (low > 0 or high < 0)
        middle = number(average(of_worlds), sign) + " *" * bool(is_clear)
        span = f"{number(low, sign)} to {number(high, sign)}"
        out.append(f"| {name} | {middle} | {span} | {worlds} |")
    return out


def heading(columns):
    """A table's first two lines."""
    return ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def counts_table(lines, title, places, names):
    """Means over worlds of counts; places: {row: (study, setting)}, names: {count: heading}."""
    out = heading([title, *names.values(), "worlds"])
    for row, place in places.items():
        values = [mean_count(lines, *place, name) for name in names]
        shown = ["" if value is None else f"{value:.3g}" for value in values]
        out.append(f"| {row} | {' | '.join(shown)} | {len(of_setting(lines, *place))} |")
    return out


# ---- The tables ----------------------------------------------------------------------------------
FULL = ("headline", "pools of 600")
RULES = ("margin", "random", "best", "continue")
TOOK = 0.8  # accuracy after 03 from which stage 03 has taken; the others lie below .7


def where_03_took(lines, has_taken=True):
    """The worlds in which stage 03 has taught the verdict to follow the checks, or the others."""
    after_03 = cells(lines, *FULL, "after 03")
    return [seed for seed, (value, _) in after_03.items() if (value >= TOOK) == has_taken]


def only(of_worlds, seeds):
    return {seed: cell for seed, cell in of_worlds.items() if seed in seeds}


def by_iteration(lines, rule, seeds):
    """[cells after 03, iteration 1, 2, ...] of a rule in these worlds."""
    names = ("after 03", *iterations(rule))
    found = [only(cells(lines, *FULL, name), seeds) for name in names]
    return [of_worlds for of_worlds in found if of_worlds]


def worlds_table(lines):
    judges = ("base", "after 03", "margin, iteration 1")
    counts = ("after 03: checks right", "after 03: verdict follows")
    columns = ("world", *judges[:2], "one iteration of margins", "labels wrong", *counts, "note")
    out, starts = heading(columns), {x["seed"]: x for x in lines if x["study"] == "start"}
    for seed, line in sorted(starts.items()):
        values = [line["accuracies"].get(name) for name in judges]
        values += [line["counts"].get(name) for name in ("expert: labels_wrong", *counts)]
        found = ["" if value is None else number(value) for value in values]
        out.append(f"| {seed} | {' | '.join(found)} | {line.get('failure', '')} |")
    return out


def iterations(rule):
    return [f"{rule}, iteration {t}" for t in range(1, 5)]


def differences_of(rows, pairs):
    """{"a - b": paired difference} of conditions {name: cells}, where both are measured."""
    return {f"{a} - {b}": minus(rows[a], rows[b]) for a, b in pairs if a in rows and b in rows}


def headline_tables(lines):
    margins, last = iterations("margin"), "margin, iteration 4"
    judges = ["shorter response", "base", "expert", "after 03", *sum(map(iterations, RULES), [])]
    judges += [f"{last}, blank image", f"{last}, other image"]
    rows = {name: found for name in judges if (found := cells(lines, *FULL, name))}
    pairs = [("after 03", "base"), ("after 03", "expert"), (last, "expert")]
    pairs += [(name, "after 03") for name in margins[:2]] + list(zip(margins[1:], margins))
    for rule in RULES[1:]:
        pairs += zip(margins, iterations(rule))
    pairs += [(f"random, iteration {t}", "after 03") for t in (2, 4)]
    differences, took = differences_of(rows, pairs), where_03_took(lines)
    here = {name: only(found, took) for name, found in differences.items()}
    small = {name: cells(lines, "headline", "pools of 300", name) for name in margins}
    rows |= {f"pools of 300: {name}": found for name, found in small.items()}
    differences[f"{last}: pools of 600 - of 300"] = minus(rows[last], small[last])
    kept = {f"kept of the pool, iteration {t}": f"kept {t}" for t in range(1, 5)}
    kept |= {f"margin 0, iteration {t}": f"margin 0, {t}" for t in range(1, 5)}
    out = table("1. headline", rows) + table("1. differences", differences, "+")
    out += table("1. differences where 03 took", here, "+")
    title = "1. shares of the pool, by iteration"
    return out + counts_table(lines, title, {"margins": FULL}, kept)


POOLS = ("findings", "findings, flipped", "no findings", "no findings, flipped")


def margins_tables(lines):
    rows, differences, places = {}, {}, {}
    pools = (*POOLS, *(f"{pool}, weak start" for pool in POOLS))
    for pool, rule in itertools.product(pools, ("margin", "random", "best", "median")):
        name, place = f"{pool}: {rule}", ("margins", f"{pool}, {rule}")
        if found := cells(lines, *place, f"{rule}, iteration 1"):
            rows[name], places[name] = found, place
            if rule != "margin":
                differences[f"{pool}: margin - {rule}"] = minus(rows[f"{pool}: margin"], found)
    kept = ("false facts, kept", "false facts, passing")
    kept += ("flipped, kept", "flipped, passing", "flipped, pool", "pairs kept")
    after_03 = cells(lines, "start", "the demo's flags", "after 03")
    after_03 = only(after_03, set().union(*rows.values()))
    out = table("2. margins: one iteration", {"after 03": after_03, **rows})
    out += table("2. differences", dict(sorted(differences.items())), "+")
    return out + counts_table(lines, "2. what is kept", places, dict(zip(kept, kept)))


def plain_tables(lines, title, conditions, reference, counts):
    """Every setting of a study by the first of the conditions that it has, its difference to one
    of them, its counts."""
    study = reference[0]
    rows, differences = {}, {}
    for setting in sorted({line["setting"] for line in lines if line["study"] == study}):
        found = [cells(lines, study, setting, name) for name in conditions]
        rows[setting] = next(filter(None, found), {})
        if setting != reference[1] and rows[setting]:
            gain = minus(rows[setting], cells(lines, *reference))
            differences[f"{setting} - {reference[1]}"] = gain
    places = {setting: (study, setting) for setting in rows}
    out = table(f"{title}. {study}", rows) + table(f"{title}. differences", differences, "+")
    return out + counts_table(lines, f"{title}. counts", places, counts)


def bradley_terry_table(lines):
    """The whole method with the verdict's own loss, beside the method without it."""
    names = ("after 03", "margin, iteration 2", "random, iteration 2")
    rows, differences = {}, {}
    for name in names:
        rows[name] = cells(lines, "training", "Bradley-Terry 1, and 04", name)
        differences[f"{name}: with - without"] = minus(rows[name], cells(lines, *FULL, name))
    differences |= differences_of(rows, [(names[1], names[0]), (names[1], names[2])])
    out = table("5. --bt-weight 1 in 03 and 04", rows)
    return out + table("5. differences, --bt-weight 1", differences, "+")


def means_table(lines, place, title, template, rows, columns):
    """Means of counts that the template names by row and column; rows: {name: heading}."""
    out = heading([title, *columns])
    for row, said in rows.items():
        names = [template.format(row=row, column=column) for column in columns]
        found = [number(mean_count(lines, *place, name)) for name in names]
        out.append(f"| {said} | {' | '.join(found)} |")
    return out


def conditions(lines, place):
    """{condition: cells} of all that a setting's first line has judged."""
    line = next(line for line in lines if (line["study"], line["setting"]) == place)
    return {name: cells(lines, *place, name) for name in line["accuracies"]}, line["counts"]


def transfer_tables(lines):
    place = ("transfer", "other pictures")
    rows, counts = conditions(lines, place)
    differences, second = {}, "margin, iteration 2"
    for other, where in itertools.product(("after 03", "random, iteration 2"), ("", ", elsewhere")):
        gain = minus(rows[second + where], rows[other + where])
        differences[f"{second} - {other}{where}"] = gain
    names = [name for name in counts if name.startswith("after 03, elsewhere: ")]
    columns = [name.partition(": ")[2] for name in names]
    judges, template = {x: x for x in ("base", "after 03", second)}, "{row}, elsewhere: {column}"
    shares = means_table(lines, place, "7. elsewhere: shares", template, judges, columns)
    return table("7. transfer", rows) + table("7. differences", differences, "+") + shares


def best_tables(lines):
    """Votes and Best-of-N."""
    place = ("best", "N and votes")
    votes, _ = conditions(lines, place)
    more = differences_of(votes, [(name, "votes 1") for name in [*votes][1:]])
    out = table("8. votes", votes) + table("8. differences", more, "+")
    pickers = ("random", "longest", "base", "after 03", "margin 1", "oracle")
    sizes = {n: f"N = {n}" for n in (1, 2, 4, 8, 16)}
    for what in ("names nothing absent", "share of objects named"):
        template = "best of {row}, {column}: " + what
        out += means_table(lines, place, f"8. Best-of-N: {what}", template, sizes, pickers)
    # of a knockout, by which Best-of-N was measured until 05 compared each with each
    rounds = {k: f"round {k} of the knockout" for k in (1, 2, 3, 4)}
    template = "best of 16, {column}: a true caption wins, round {row}"
    title = "8. a true caption beats a false one"
    return out + means_table(lines, place, title, template, rounds, pickers[2:5])


def leak_table(lines):
    rows = {}
    for name in ("base", "after 03"):
        rows[f"shuffled labels: {name}"] = cells(lines, "leak", "shuffled labels", name)
    for name in ("blank image", "other image"):
        rows[name] = cells(lines, *FULL, f"margin, iteration 4, {name}")
    return table("leak checks", rows)


def processors_table(lines):
    """The same start, judged after one iteration of margins, on different processors."""
    found = {}  # {(condition, seed): {processor: accuracies}}
    after_03, first = "after 03", "margin, iteration 1"
    places = {"the demo's flags": (after_03, first), "findings, margin": (first,)}
    places |= {"YOLO": (after_03,), "critique, lambda 1/3": (after_03,)}
    for line in lines:
        for condition in places.get(line["setting"], ()):
            if condition in line["accuracies"]:
                of_line = found.setdefault((condition, line["seed"]), {})
                accuracy = number(line["accuracies"][condition])
                of_line.setdefault(line["processor"], []).append(accuracy)
    out = heading(["made anew on", "judge", "world", "accuracy"])
    for (condition, seed), of_processor in sorted(found.items()):
        for processor, accuracies in of_processor.items() if len(of_processor) > 1 else ():
            out.append(f"| {processor} | {condition} | {seed} | {' '.join(accuracies)} |")
    return out


# {count: its heading}
SAID, FALSE, WORDS = "captions hallucinate, greedy", "false facts, kept", "critiques trained on"
WRONG = {"expert: labels_wrong": "labels wrong", "expert: findings_contradicted": "findings wrong"}
WRONG["expert: n_pairs"] = "pairs"
KEPT = {"pairs kept": "pairs kept", "margin of the kept": "mean margin", FALSE: FALSE}
TRAINED = {SAID: SAID, "captions hallucinate, sampled": "sampled", "ece": "ECE"}
TRAINED |= {"bradley_terry_loss": "Bradley-Terry", "unparseable": "unparseable"}
TRAINED |= {WORDS: "critiques", f"words of {WORDS}": f"words of {WORDS}"}


def tables(lines):
    """All tables as markdown."""
    first, after = "margin, iteration 1", "after 03"
    one_step = (first, "sometimes, iteration 1", "random, iteration 1")
    usual, nothing = ("retention", "retention 0.4", first), ("components", "without nothing", first)
    critique = ("training", "critique, lambda 1/3", after)
    out = worlds_table(lines) + headline_tables(lines) + margins_tables(lines)
    out += plain_tables(lines, "3", one_step, usual, KEPT)
    out += plain_tables(lines, "4", [after], ("expert", "YOLO", after), WRONG)
    out += plain_tables(lines, "5", [after], critique, TRAINED)
    out += plain_tables(lines, "6", [first], nothing, {**WRONG, **KEPT, SAID: SAID})
    out += bradley_terry_table(lines) + transfer_tables(lines) + best_tables(lines)
    return "\n".join(out + leak_table(lines) + processors_table(lines))


# ---- The README's table of claims ----------------------------------------------------------------
def holds(kind, low, high):
    """Of an interval: is the claim of this kind true?"""
    bounds = {"gains": (0, 1), "chance": (0.45, 0.55), "above chance": (0.5, 1)}
    if kind == "no effect":
        return low <= 0 <= high
    return bounds[kind][0] < low and high < bounds[kind][1]


def places(study, condition, *settings):
    return [(study, setting, condition) for setting in settings]


def claim_rows():
    """(claim, the paper's figure, place, the place it is compared with or None, what must be true
    of the interval) of each; a place is (study, setting, condition)."""
    last, after = "margin, iteration 4", "after 03"
    names = ("base", "expert", after, "margin, iteration 2", last, f"{last}, blank image")
    base, expert, first, second, last, blank = [(*FULL, name) for name in names]
    random_2, continued = [(*FULL, f"{rule}, iteration 2") for rule in ("random", "continue")]
    names = ("critique, lambda 1/3", "descriptive", "none", "Bradley-Terry 1, and 04")
    critique, described, verdicts, bt = places("training", after, *names)
    bt_second = (*bt[:2], "margin, iteration 2")
    names = ("YOLO", "YOLO, labels alone", "the policy's yes or no")
    yolo, labels, policy = places("expert", after, *names)
    names = ("without nothing", "without checks")
    whole, unchecked = places("components", "margin, iteration 1", *names)
    names = ("retention 0.4", "retention 1.0", "retention 0.1")
    some, everything, tenth = places("retention", "margin, iteration 1", *names)
    tenth_random = ("retention", "retention 0.1, random", "random, iteration 1")
    votes_3 = ("best", "N and votes", "votes 3")
    elsewhere = ("transfer", "other pictures", "margin, iteration 2, elsewhere")
    shuffled, untrained = [("leak", "shuffled labels", name) for name in (after, "base")]
    by_lot = "Labels drawn by lot, without findings, teach it nothing"
    strange = "It is above chance on other pictures, of unseen kinds"
    return [
        ("Training on checked critiques lifts the base judge", "+.12", first, base, "gains"),
        ("04 lifts it further: two iterations of margins", "+.02-.03", second, first, "gains"),
        ("... more than stage 03 continued", "", second, continued, "gains"),
        ("... more than random pairs", "", second, random_2, "gains"),
        ("... where a tenth of the pool is kept", "", tenth, tenth_random, "gains"),
        ("A third and fourth iteration change nothing", "saturates", last, second, "no effect"),
        ("40 % of a pool's pairs beat all that pass", "", some, everything, "gains"),
        ("The judge exceeds the detector that taught it", "", last, expert, "gains"),
        ("Without the picture it falls to chance", "", blank, None, "chance"),
        (by_lot, "", shuffled, untrained, "no effect"),
        (strange, "", elsewhere, None, "above chance"),
        ("Critiques beat descriptions", "over +.10", critique, described, "gains"),
        ("... and verdicts alone", "", critique, verdicts, "gains"),
        ("02's filters beat the verdict alone", "", whole, unchecked, "gains"),
        ("A loss on the verdict itself (`--bt-weight 1`) lifts 03", "", bt, first, "gains"),
        ("... and 04 lifts it further", "", bt_second, bt, "gains"),
        ("The expert's findings beat its labels alone", "+.15-.20", yolo, labels, "gains"),
        ("... and the policy's own yes or no", "", yolo, policy, "gains"),
        ("Three sampled votes beat one greedy critique", "", votes_3, first, "gains"),
    ]


def claims(lines):
    """The README's table, as lines of markdown."""
    out = heading(["claim", "paper", "here", "worlds", "verdict", "study"])[1:]
    for claim, paper, place, other, kind in claim_rows():
        found = cells(lines, *place)
        if other:
            found = minus(found, cells(lines, *other))
        verdict = "holds" if holds(kind, *interval(found)) else "does not"
        verdict += " so far" if len(found) < FEW else ""
        numbers = [average(found), *interval(found)]
        ours = "{} ({}, {})".format(*(number(x, "+" if other else "") for x in numbers))
        cells_of_row = (claim, paper, ours, str(len(found)), verdict, f"`{place[0]}`")
        out.append(f"| {' | '.join(cells_of_row)} |")
    return out


# ---- Pictures ------------------------------------------------------------------------------------
COLOURS = dict(zip(RULES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7")))
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "fontsize": 7}
MARKERS = dict(zip(RULES, "os^D"))


def axes(size, n=1, **ratios):
    """n axes on white: readable on a light and on a dark page."""
    figure = Figure(size, layout="tight", facecolor="white")
    found = figure.subplots(1, n, squeeze=False, **ratios)[0]
    for axis in found:
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
    return found


def save(axis, path, title, ylabel):
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(ylabel)
    axis.figure.savefig(path, dpi=130)


def draw_iterations(path, lines):
    """Accuracy by iteration with controls: means and intervals where 03 took, else each world."""
    left, right = axes((8.4, 3.8), 2, width_ratios=(3, 2))
    names = ("margins", "random pairs", "best of random pairs", "stage 03 continued")
    took, others = where_03_took(lines), where_03_took(lines, has_taken=False)
    for k, (rule, name) in enumerate(zip(RULES, names)):
        style = {"color": COLOURS[rule], "marker": MARKERS[rule], "markersize": 5}
        found = by_iteration(lines, rule, took)
        spans = np.array([interval(of_worlds) for of_worlds in found])
        middle = np.array([average(of_worlds) for of_worlds in found])
        x = np.arange(len(found)) + (k - 1.5) * 0.08
        bars = {"capsize": 2, "elinewidth": 0.9, "label": name}
        left.errorbar(x, middle, np.abs(spans.T - middle), **style, **bars)
        for seed in others:
            values = [of_worlds[seed][0] for of_worlds in by_iteration(lines, rule, [seed])]
            right.plot(range(len(values)), values, **style, label=name)
    expert = average(only(cells(lines, *FULL, "expert"), took))
    left.axhline(expert, color="0.3", linestyle=":", label="the detector as judge")
    left.set_title(f"where stage 03 took: {len(took)} worlds, bars 95 %", fontsize=9)
    right.set_title("where it did not: each world a line", fontsize=9)
    for axis in (left, right):
        axis.set_xticks(range(5), ["after 03", "1", "2", "3", "4"])
        axis.set_xlabel("iteration of stage 04")
    left.set_ylabel("accuracy, share of questions")
    right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="upper left")
    left.figure.savefig(path, dpi=120)


def draw_expert(path, lines):
    """Judge accuracy against the share of labels that the expert gets wrong."""
    [axis] = axes((8.4, 3.8))
    labels = "labels alone, YOLO's or the policy's"
    parts = (0.9, 0.7, 0.5)
    confused = [f"{k}% of the kinds always confused" for k in (10, 25, 50)]
    for label, settings, marker, colour in (
        ("errors by lot: false findings", [f"precision {x}" for x in parts], "o", "#0072B2"),
        ("errors by lot: misses", [f"recall {x}" for x in parts], "s", "#D55E00"),
        ("always the same errors", confused, "^", "#CC79A7"),
        ("the truth", ["truth"], "*", "black"),
        ("YOLO", ["YOLO"], "D", "#009E73"),
        ("the policy's yes or no", ["the policy's yes or no"], "X", "#E69F00"),
        (labels, ["YOLO, labels alone", "the policy, labels alone"], "v", "0.45"),
    ):
        x, y = [], []
        for setting in settings:
            for line in of_setting(lines, "expert", setting).values():
                x.append(100 * line["counts"]["expert: labels_wrong"])
                y.append(line["accuracies"]["after 03"])
        axis.plot(x, y, marker, color=colour, label=label, markersize=9 if marker == "*" else 6)
    axis.axhline(0.5, color="0.5", linestyle=":", linewidth=1)
    axis.set(xlabel="pairs whose label the expert gets wrong, %", ylim=(0.45, 1))
    axis.legend(**BESIDE)
    title = "each point one world and one expert, 1,000 held-out pairs"
    save(axis, path, title, "accuracy after stage 03")


def draw_flipped(path, lines):
    """Of the flipped pairs: their share among what each rule keeps."""
    [axis] = axes((6.4, 3.2))
    columns = (  # (what is counted, of which rule's lines, label, colour)
        ("flipped, pool", "margin", "the pool", "0.75"),
        ("flipped, passing", "margin", "a passing critique", "0.5"),
        ("flipped, kept", "margin", "kept by margins", COLOURS["margin"]),
        ("flipped, kept", "random", "kept by random pairs", COLOURS["random"]),
    )
    for group, pool in enumerate(("findings, flipped", "no findings, flipped")):
        for k, (count, rule, label, colour) in enumerate(columns):
            found = of_setting(lines, "margins", f"{pool}, {rule}").values()
            values = [100 * line["counts"][count] for line in found]
            x = group + (k - 1.5) * 0.2
            axis.bar(x, mean(values), width=0.18, color=colour, label=None if group else label)
            axis.plot([x] * len(values), values, "o", color="black", markersize=3)
    axis.set_xticks(range(2), ["with the expert's findings", "without findings"])
    axis.legend(fontsize=8, loc="upper right")
    title = "15 % of the labels of the pools were flipped; points: worlds"
    save(axis, path, title, "pairs with a flipped label, %")


def draw_best_of_n(path, lines):
    """Quality of the caption that each picker takes from N."""
    [axis], place = axes((6.4, 3.2)), ("best", "N and votes")
    sizes = (1, 2, 4, 8, 16)
    for picker, label, colour, marker in (
        ("oracle", "the truth", "black", "*"),
        ("margin 1", "the judge after 04", "#0072B2", "o"),
        ("after 03", "the judge after 03", "#009E73", "^"),
        ("base", "the base judge", "#E69F00", "D"),
        ("random", "a random one", "#D55E00", "s"),
        ("longest", "the longest", "0.45", "v"),
    ):
        names = [f"best of {n}, {picker}: names nothing absent" for n in sizes]
        parts = [mean_count(lines, *place, name) for name in names]
        axis.plot(range(len(sizes)), parts, color=colour, marker=marker, label=label)
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set(xlabel="N, captions to pick from")
    axis.legend(title="picked by", title_fontsize=7, **BESIDE)
    title = f"means of {len(of_setting(lines, *place))} worlds, 200 pictures each"
    save(axis, path, title, "picks that name nothing absent")


def draw(lines, folder):
    draw_iterations(folder / "iterations.png", lines)
    draw_expert(folder / "expert_error.png", lines)
    draw_flipped(folder / "flipped.png", lines)
    draw_best_of_n(folder / "best_of_n.png", lines)
