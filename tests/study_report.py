"""Tables and pictures of study.py's results, from assets/results.jsonl alone.

Every interval is 95 %, over worlds and images together: worlds are drawn with replacement, and of
each drawn world one of the resamples of its images that the line holds. A difference is taken
within each world and each resample, so it is paired. It counts (marked *) where its interval leaves
out zero and at least FEW worlds are in it: over two or three such an interval is far too narrow
(without any difference it leaves out zero in some 18-33 % of the cases over two worlds, in 8 % over
eight), and it knows nothing of training once more, which moves a judge by about .01.
"""

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
    """Of a setting's counts, one's mean over worlds."""
    return mean(line["counts"][count] for line in of_setting(lines, study, setting).values())


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


def table_row(name, of_worlds, seeds, sign=""):
    if not of_worlds:
        return f"| {name} | not measured |  |  |"
    low, high = interval(of_worlds)
    is_clear = sign and len(of_worlds) >= FEW and (low > 0 or high < 0)
    star = " *" if is_clear else ""
    values = [number(of_worlds[seed][0], sign) if seed in of_worlds else "-" for seed in seeds]
    worlds = " ".join(values)
    span = f"{number(low, sign)} to {number(high, sign)}"
    return f"| {name} | {number(average(of_worlds), sign)}{star} | {span} | {worlds} |"


def table(title, rows, sign=""):
    """rows: {name: cells}."""
    seeds = sorted({seed for of_worlds in rows.values() for seed in of_worlds})
    what = "difference" if sign else "accuracy"
    head = f"| {title} | {what} | 95 % interval | worlds {' '.join(map(str, seeds))} |"
    lines = [table_row(name, of_worlds, seeds, sign) for name, of_worlds in rows.items()]
    return ["", head, "|---|---|---|---|", *lines]


def counts_table(lines, title, places, names):
    """Means over worlds of counts; places: {row: (study, setting)}, names: {count: heading}."""
    out = [
        "",
        f"| {title} | {' | '.join(names.values())} | worlds |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row, (study, setting) in places.items():
        of_seeds = of_setting(lines, study, setting)
        values = []
        for name in names:
            found = [
                x["counts"][name] for x in of_seeds.values() if x["counts"].get(name) is not None
            ]
            values.append(f"{mean(found):.3g}" if found else "")
        out.append(f"| {row} | {' | '.join(values)} | {len(of_seeds)} |")
    return out


# ---- The tables ----------------------------------------------------------------------------------
FULL = ("headline", "pools of 600")
MARGIN, RANDOM, BEST, ON = "margin", "random", "best", "continue"


TOOK = 0.8  # accuracy after 03 from which stage 03 has taken; the others lie below .7


def where_03_took(lines, has_taken=True):
    """The worlds in which stage 03 has taught the verdict to follow the checks, or the others."""
    after_03 = cells(lines, *FULL, "after 03")
    return [seed for seed, (value, _) in after_03.items() if (value >= TOOK) == has_taken]


def only(of_worlds, seeds):
    return {seed: cell for seed, cell in of_worlds.items() if seed in seeds}


def by_iteration(lines, rule, seeds):
    """[cells after 03, iteration 1, 2, ...] of a rule in these worlds."""
    found = [only(cells(lines, *FULL, "after 03"), seeds)]
    while new := only(cells(lines, *FULL, f"{rule}, iteration {len(found)}"), seeds):
        found.append(new)
    return found


def worlds_table(lines):
    columns = ["world", "base", "after 03", "one iteration of margins", "labels wrong"]
    columns += ["after 03: checks right", "after 03: verdict follows", "note"]
    out = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    starts = {line["seed"]: line for line in lines if line["study"] == "start"}
    for seed, line in sorted(starts.items()):
        shares = line["accuracies"]
        if not shares:
            out.append(f"| {seed} |  |  |  |  |  |  | {line['failure']} |")
            continue
        names = ("base", "after 03", "margin, iteration 1")
        found = [number(shares[name]) for name in names]
        counts = ("expert: labels_wrong", "after 03: checks right", "after 03: verdict follows")
        found += [number(line["counts"][name]) for name in counts]
        out.append(f"| {seed} | {' | '.join(found)} |  |")
    return out


def headline_tables(lines):
    judges = ["shorter response", "base", "expert", "after 03"]
    for rule in (MARGIN, RANDOM, BEST, ON):
        judges += [f"{rule}, iteration {t}" for t in range(1, 5)]
    judges += ["margin, iteration 4, blank image", "margin, iteration 4, other image"]
    rows = {name: cells(lines, *FULL, name) for name in judges}
    rows = {name: found for name, found in rows.items() if found}
    for t in range(1, 5):
        rows[f"pools of 300: margin, iteration {t}"] = cells(
            lines, "headline", "pools of 300", f"margin, iteration {t}"
        )
    pairs = [("after 03", "base"), ("after 03", "expert"), ("margin, iteration 4", "expert")]
    pairs += [("margin, iteration 1", "after 03"), ("margin, iteration 2", "after 03")]
    pairs += [(f"margin, iteration {t + 1}", f"margin, iteration {t}") for t in (1, 2, 3)]
    for rule in (RANDOM, BEST, ON):
        pairs += [(f"margin, iteration {t}", f"{rule}, iteration {t}") for t in range(1, 5)]
    pairs += [("random, iteration 2", "after 03"), ("random, iteration 4", "after 03")]
    differences = {}
    for a, b in pairs:
        if found := minus(cells(lines, *FULL, a), cells(lines, *FULL, b)):
            differences[f"{a} - {b}"] = found
    took = where_03_took(lines)
    here = {name: only(found, took) for name, found in differences.items()}
    small = cells(lines, "headline", "pools of 300", "margin, iteration 4")
    last = "margin, iteration 4"
    differences[f"{last}: pools of 600 - of 300"] = minus(cells(lines, *FULL, last), small)
    kept = {f"kept of the pool, iteration {t}": f"kept {t}" for t in range(1, 5)}
    kept |= {f"margin 0, iteration {t}": f"margin 0, {t}" for t in range(1, 5)}
    return [
        *table("1. headline", rows),
        *table("1. differences", differences, "+"),
        *table("1. differences where 03 took", here, "+"),
        *counts_table(lines, "1. shares of the pool, by iteration", {"margins": FULL}, kept),
    ]


POOLS = ("findings", "findings, flipped", "no findings", "no findings, flipped")
RULE_NAMES = ("margin", "random", "best", "median")


def margins_tables(lines):
    rows, differences, places = {}, {}, {}
    for pool in (*POOLS, *(f"{pool}, weak start" for pool in POOLS)):
        of_rule = {}
        for rule in RULE_NAMES:
            found = cells(lines, "margins", f"{pool}, {rule}", f"{rule}, iteration 1")
            if found:
                of_rule[rule] = rows[f"{pool}: {rule}"] = found
                places[f"{pool}: {rule}"] = ("margins", f"{pool}, {rule}")
        for other in of_rule.keys() - {MARGIN} if MARGIN in of_rule else ():
            name = f"{pool}: margin - {other}"
            differences[name] = minus(of_rule[MARGIN], of_rule[other])
    kept = ("false facts, kept", "false facts, passing")
    kept += ("flipped, kept", "flipped, passing", "flipped, pool", "pairs kept")
    measured = {seed for of_worlds in rows.values() for seed in of_worlds}
    found = cells(lines, "start", "the demo's flags", "after 03")
    after_03 = {seed: cell for seed, cell in found.items() if seed in measured}
    return [
        *table("2. margins: one iteration", {"after 03": after_03, **rows}),
        *table("2. differences", dict(sorted(differences.items())), "+"),
        *counts_table(lines, "2. what is kept", places, {name: name for name in kept}),
    ]


def plain_tables(lines, number_, study, condition, reference, counts):
    """Every setting of a study by one condition, its difference to a reference, its counts."""
    settings = sorted({x["setting"] for x in lines if x["study"] == study}, key=str)
    rows, differences = {}, {}
    base = cells(lines, *reference)
    for setting in settings:
        found = {}
        for name in condition:
            found = found or cells(lines, study, setting, name)
        rows[setting] = found
        if setting != reference[1] and found:
            differences[f"{setting} - {reference[1]}"] = minus(found, base)
    places = {setting: (study, setting) for setting in settings}
    out = table(f"{number_}. {study}", rows)
    out += table(f"{number_}. differences", differences, "+")
    if counts:
        out += counts_table(lines, f"{number_}. counts", places, counts)
    return out


def bradley_terry_table(lines):
    """The whole method with the verdict's own loss, beside the method without it."""
    rows, differences = {}, {}
    for name in ("after 03", "margin, iteration 2", "random, iteration 2"):
        rows[name] = cells(lines, "training", "Bradley-Terry 1, and 04", name)
        without = cells(lines, *FULL, name)
        differences[f"{name}: with - without"] = minus(rows[name], without)
    second = rows["margin, iteration 2"]
    for other in ("after 03", "random, iteration 2"):
        differences[f"margin, iteration 2 - {other}"] = minus(second, rows[other])
    return [
        *table("5. --bt-weight 1 in 03 and 04", rows),
        *table("5. differences, --bt-weight 1", differences, "+"),
    ]


def transfer_tables(lines):
    line = next((x for x in lines if x["study"] == "transfer"), None)
    if line is None:
        return []
    names = [*line["accuracies"]]
    rows = {name: cells(lines, "transfer", "other pictures", name) for name in names}
    elsewhere = {}
    for other in ("after 03", "random, iteration 2"):
        for where in ("", ", elsewhere"):
            a, b = rows[f"margin, iteration 2{where}"], rows[other + where]
            elsewhere[f"margin, iteration 2 - {other}{where}"] = minus(a, b)
    out = table("7. transfer", rows) + table("7. differences", elsewhere, "+")
    names = [name for name in line["counts"] if name.startswith("after 03, elsewhere: ")]
    columns = [name.partition(": ")[2] for name in names]
    out += ["", f"| 7. elsewhere: shares | {' | '.join(columns)} |"]
    out.append("|---" * (len(columns) + 1) + "|")
    for judge in ("base", "after 03", "margin, iteration 2"):
        means = []
        for column in columns:
            count = f"{judge}, elsewhere: {column}"
            means.append(number(mean_count(lines, "transfer", "other pictures", count)))
        out.append(f"| {judge} | {' | '.join(means)} |")
    return out


def best_tables(lines):
    """Votes and Best-of-N."""
    line = next((x for x in lines if x["study"] == "best"), None)
    if line is None:
        return []
    votes = {name: cells(lines, "best", "N and votes", name) for name in line["accuracies"]}
    more = {f"{name} - votes 1": minus(votes[name], votes["votes 1"]) for name in [*votes][1:]}
    out = table("8. votes", votes) + table("8. differences", more, "+")
    pickers = ("random", "longest", "base", "after 03", "margin 1", "oracle")
    for what in ("names nothing absent", "share of objects named"):
        head = f"8. Best-of-N: {what}"
        out += ["", f"| {head} | {' | '.join(pickers)} |", "|---" * (len(pickers) + 1) + "|"]
        for n in (1, 2, 4, 8, 16):
            found = []
            for picker in pickers:
                count = f"best of {n}, {picker}: {what}"
                found.append(number(mean_count(lines, "best", "N and votes", count)))
            out.append(f"| N = {n} | {' | '.join(found)} |")
    judges = ("base", "after 03", "margin 1")
    out += ["", f"| 8. a true caption beats a false one | {' | '.join(judges)} |"]
    out.append("|---" * (len(judges) + 1) + "|")
    for round_ in (1, 2, 3, 4):
        found = []
        for judge in judges:
            count = f"best of 16, {judge}: a true caption wins, round {round_}"
            found.append(number(mean_count(lines, "best", "N and votes", count)))
        out.append(f"| round {round_} of the knockout | {' | '.join(found)} |")
    return out


def leak_table(lines):
    leaks = {}
    for name in ("base", "after 03"):
        leaks[f"shuffled labels: {name}"] = cells(lines, "leak", "shuffled labels", name)
    for how in ("blank", "other"):
        leaks[f"{how} image"] = cells(lines, *FULL, f"margin, iteration 4, {how} image")
    return table("leak checks", leaks)


def processors_table(lines):
    """The same start, judged after one iteration of margins, on different processors."""
    found = {}  # {(what, seed): {processor: accuracy}}
    places = {("start", "the demo's flags"): ("after 03", "margin, iteration 1")}
    places[("margins", "findings, margin")] = ("margin, iteration 1",)
    places[("expert", "YOLO")] = places[("training", "critique, lambda 1/3")] = ("after 03",)
    for line in lines:
        for condition in places.get((line["study"], line["setting"]), ()):
            if condition in line["accuracies"]:
                of_line = found.setdefault((condition, line["seed"]), {})
                accuracy = line["accuracies"][condition]
                of_line.setdefault(line["processor"], []).append(number(accuracy))
    out = ["", "| made anew on | judge | world | accuracy |", "|---|---|---|---|"]
    for (condition, seed), of_processor in sorted(found.items()):
        if len(of_processor) > 1:
            for processor, accuracies in of_processor.items():
                out.append(f"| {processor} | {condition} | {seed} | {' '.join(accuracies)} |")
    return out


def tables(lines):
    """All tables as markdown."""
    wrong = {
        "expert: labels_wrong": "labels wrong",
        "expert: findings_contradicted": "findings wrong",
    }
    wrong |= {"expert: n_pairs": "pairs"}
    kept = {"pairs kept": "pairs kept", "margin of the kept": "mean margin"}
    kept |= {"false facts, kept": "false facts, kept"}
    said = {"captions hallucinate, greedy": "captions hallucinate, greedy"}
    said |= {"captions hallucinate, sampled": "sampled", "ece": "ECE"}
    said |= {"bradley_terry_loss": "Bradley-Terry", "unparseable": "unparseable"}
    said |= {"critiques trained on": "critiques"}
    said |= {"words of critiques trained on": "words of critiques trained on"}
    one_step = ("margin, iteration 1", "sometimes, iteration 1", "random, iteration 1")
    after, critique = ("after 03",), ("training", "critique, lambda 1/3", "after 03")
    off = ("margin, iteration 1",)
    out = worlds_table(lines) + headline_tables(lines) + margins_tables(lines)
    usual = ("retention", "retention 0.4", "margin, iteration 1")
    out += plain_tables(lines, 3, "retention", one_step, usual, kept)
    out += plain_tables(lines, 4, "expert", after, ("expert", "YOLO", "after 03"), wrong)
    out += plain_tables(lines, 5, "training", after, critique, said)
    counts = wrong | kept | {"captions hallucinate, greedy": "captions hallucinate, greedy"}
    nothing = ("components", "without nothing", "margin, iteration 1")
    out += plain_tables(lines, 6, "components", off, nothing, counts)
    out += (
        bradley_terry_table(lines) + transfer_tables(lines) + best_tables(lines) + leak_table(lines)
    )
    return "\n".join(out + processors_table(lines))


# ---- The README's table of claims ----------------------------------------------------------------
def told(of_worlds, sign):
    """A mean and its interval."""
    low, high = interval(of_worlds)
    return f"{number(average(of_worlds), sign)} ({number(low, sign)}, {number(high, sign)})"


# Of an interval: does the claim hold?
def gains(low, high):
    return low > 0


def no_effect(low, high):
    return low <= 0 <= high


def is_chance(low, high):
    return low > 0.45 and high < 0.55


def above_chance(low, high):
    return low > 0.5


def full(condition):
    return (*FULL, condition)


def after_03(study, setting):
    return (study, setting, "after 03")


def iterated(study, setting):
    return (study, setting, "margin, iteration 1")


def claim_rows():
    """(claim, the paper's figure, place, the place it is compared with or None, what must be true
    of the interval) of each; a place is (study, setting, condition)."""
    second, last = full("margin, iteration 2"), full("margin, iteration 4")
    first = full("after 03")
    random_2, continued = full("random, iteration 2"), full("continue, iteration 2")
    critique = after_03("training", "critique, lambda 1/3")
    described = after_03("training", "descriptive")
    verdicts = after_03("training", "none")
    with_bt = ("training", "Bradley-Terry 1, and 04")
    bt, bt_second = (*with_bt, "after 03"), (*with_bt, "margin, iteration 2")
    yolo, labels = after_03("expert", "YOLO"), after_03("expert", "YOLO, labels alone")
    policy = after_03("expert", "the policy's yes or no")
    whole = iterated("components", "without nothing")
    unchecked = iterated("components", "without checks")
    some, everything = (iterated("retention", f"retention {share}") for share in ("0.4", "1.0"))
    tenth = iterated("retention", "retention 0.1")
    tenth_random = ("retention", "retention 0.1, random", "random, iteration 1")
    votes_3 = ("best", "N and votes", "votes 3")
    elsewhere = ("transfer", "other pictures", "margin, iteration 2, elsewhere")
    blank = full("margin, iteration 4, blank image")
    shuffled, untrained = after_03("leak", "shuffled labels"), ("leak", "shuffled labels", "base")
    lifts = "Training on checked critiques lifts the base judge"
    strange = "It is above chance on other pictures, of unseen kinds"
    return [
        (lifts, "+.12", first, full("base"), gains),
        ("04 lifts it further: two iterations of margins", "+.02-.03", second, first, gains),
        ("... more than stage 03 continued", "", second, continued, gains),
        ("... more than random pairs", "", second, random_2, gains),
        ("... where a tenth of the pool is kept", "", tenth, tenth_random, gains),
        ("A third and fourth iteration change nothing", "saturates", last, second, no_effect),
        ("40 % of a pool's pairs beat all that pass", "", some, everything, gains),
        ("The judge exceeds the detector that taught it", "", last, full("expert"), gains),
        ("Without the picture it falls to chance", "", blank, None, is_chance),
        (
            "Labels drawn by lot, without findings, teach it nothing",
            "",
            shuffled,
            untrained,
            no_effect,
        ),
        (strange, "", elsewhere, None, above_chance),
        ("Critiques beat descriptions", "over +.10", critique, described, gains),
        ("... and verdicts alone", "", critique, verdicts, gains),
        ("02's filters beat the verdict alone", "", whole, unchecked, gains),
        ("A loss on the verdict itself (`--bt-weight 1`) lifts 03", "", bt, first, gains),
        ("... and 04 lifts it further", "", bt_second, bt, gains),
        ("The expert's findings beat its labels alone", "+.15-.20", yolo, labels, gains),
        ("... and the policy's own yes or no", "", yolo, policy, gains),
        ("Three sampled votes beat one greedy critique", "", votes_3, first, gains),
    ]


def claims(lines):
    """The README's table, as lines of markdown."""
    out = ["| claim | paper | here | worlds | verdict | study |", "|---|---|---|---|---|---|"]
    for claim, paper, place, other, holds in claim_rows():
        found = cells(lines, *place)
        if other:
            found = minus(found, cells(lines, *other))
        ours, verdict = "not measured", ""
        if found:
            verdict = "holds" if holds(*interval(found)) else "does not"
            verdict += " so far" if len(found) < FEW else ""
            ours = told(found, "+" if other else "")
        cells_of_row = (claim, paper, ours, str(len(found)), verdict, f"`{place[0]}`")
        out.append(f"| {' | '.join(cells_of_row)} |")
    return out


# ---- Pictures ------------------------------------------------------------------------------------
COLOURS = {"margin": "#0072B2", "random": "#D55E00", "best": "#009E73", "continue": "#CC79A7"}
MARKERS = {"margin": "o", "random": "s", "best": "^", "continue": "D"}


def axes(path, size=(6.4, 3.8)):
    """A figure on white: readable on a light and on a dark page."""
    figure = Figure(size, layout="tight", facecolor="white")
    axis = figure.subplots()
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    return figure, axis


def draw_iterations(path, lines):
    """Accuracy by iteration with controls: means and intervals where 03 took, else each world."""
    figure = Figure((8.4, 3.8), layout="tight", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = {"margin": "margins", "random": "random pairs", "best": "best of random pairs"}
    names["continue"] = "stage 03 continued"
    took, others = where_03_took(lines), where_03_took(lines, has_taken=False)
    for shift, (rule, name) in enumerate(names.items()):
        style = {"color": COLOURS[rule], "marker": MARKERS[rule], "markersize": 5}
        found = by_iteration(lines, rule, took)
        spans = np.array([interval(of_worlds) for of_worlds in found])
        middle = np.array([average(of_worlds) for of_worlds in found])
        x = np.arange(len(found)) + (shift - 1.5) * 0.08
        bars = {"capsize": 2, "elinewidth": 0.9, "label": name}
        left.errorbar(x, middle, np.abs(spans.T - middle), **style, **bars)
        for seed in others:
            values = [of_worlds[seed][0] for of_worlds in by_iteration(lines, rule, [seed])]
            right.plot(range(len(values)), values, **style)
    expert = average(only(cells(lines, *FULL, "expert"), took))
    left.axhline(expert, color="0.3", linestyle=":", label="the detector as judge")
    left.set_title(f"where stage 03 took: {len(took)} worlds, bars 95 %", fontsize=9)
    right.set_title("where it did not: each world a line", fontsize=9)
    for axis in (left, right):
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.set_xticks(range(5), ["after 03", "1", "2", "3", "4"])
        axis.set_xlabel("iteration of stage 04")
    left.set_ylabel("accuracy, share of questions")
    handles, labels = left.get_legend_handles_labels()
    right.legend(handles, labels, fontsize=7, loc="upper left")
    figure.savefig(path, dpi=120)


def draw_expert(path, lines):
    """Judge accuracy against the share of labels that the expert gets wrong."""
    figure, axis = axes(path, (8.4, 3.8))
    shares = (0.9, 0.7, 0.5)
    groups = {
        "errors by lot: false findings": [f"precision {share}" for share in shares],
        "errors by lot: misses": [f"recall {share}" for share in shares],
        "always the same errors": [f"{k}% of the kinds always confused" for k in (10, 25, 50)],
        "the truth": ["truth"],
        "YOLO": ["YOLO"],
        "the policy's yes or no": ["the policy's yes or no"],
        "labels alone, YOLO's or the policy's": ["YOLO, labels alone", "the policy, labels alone"],
    }
    markers = ("o", "s", "^", "*", "D", "X", "v")
    colours = ("#0072B2", "#D55E00", "#CC79A7", "black", "#009E73", "#E69F00", "0.45")
    for (label, settings), marker, colour in zip(groups.items(), markers, colours):
        x, y = [], []
        for setting in settings:
            for line in of_setting(lines, "expert", setting).values():
                x.append(100 * line["counts"]["expert: labels_wrong"])
                y.append(line["accuracies"]["after 03"])
        axis.plot(x, y, marker, color=colour, label=label, markersize=9 if marker == "*" else 6)
    axis.axhline(0.5, color="0.5", linestyle=":", linewidth=1)
    axis.set(xlabel="pairs whose label the expert gets wrong, %")
    axis.set(ylabel="accuracy after stage 03", ylim=(0.45, 1))
    axis.set_title("each point one world and one expert, 1,000 held-out pairs", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=130)


def draw_flipped(path, lines):
    """Of the flipped pairs: their share among what each rule keeps."""
    figure, axis = axes(path, (6.4, 3.2))
    pools = ("findings, flipped", "no findings, flipped")
    names = {"margin": "margins", "random": "random pairs"}
    bars = {
        "flipped, pool": ("the pool", "0.75"),
        "flipped, passing": ("a passing critique", "0.5"),
    }
    for place, pool in enumerate(pools):
        columns = []  # (label, colour, values)
        of_pool = of_setting(lines, "margins", f"{pool}, margin").values()
        for count, (label, colour) in bars.items():
            columns.append((label, colour, [100 * x["counts"][count] for x in of_pool]))
        for rule, label in names.items():
            found = of_setting(lines, "margins", f"{pool}, {rule}").values()
            values = [100 * x["counts"]["flipped, kept"] for x in found]
            columns.append((f"kept by {label}", COLOURS[rule], values))
        for k, (label, colour, values) in enumerate(columns):
            x = place + (k - 1.5) * 0.2
            axis.bar(x, mean(values), width=0.18, color=colour, label=None if place else label)
            axis.plot([x] * len(values), values, "o", color="black", markersize=3)
    axis.set_xticks(range(2), ["with the expert's findings", "without findings"])
    axis.set(ylabel="pairs with a flipped label, %")
    axis.set_title("15 % of the labels of the pools were flipped; points: worlds", fontsize=9)
    axis.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=130)


def draw_best_of_n(path, lines):
    """Quality of the caption that each picker takes from N."""
    figure, axis = axes(path, (6.4, 3.2))
    pickers = {
        "oracle": ("the truth", "black", "*"),
        "margin 1": ("the judge after 04", "#0072B2", "o"),
        "after 03": ("the judge after 03", "#009E73", "^"),
        "base": ("the base judge", "#E69F00", "D"),
        "random": ("a random one", "#D55E00", "s"),
        "longest": ("the longest", "0.45", "v"),
    }
    found = of_setting(lines, "best", "N and votes").values()
    sizes = (1, 2, 4, 8, 16)
    for picker, (label, colour, marker) in pickers.items():
        names = [f"best of {n}, {picker}: names nothing absent" for n in sizes]
        shares = [mean(line["counts"][name] for line in found) for name in names]
        axis.plot(range(len(sizes)), shares, color=colour, marker=marker, label=label)
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set(xlabel="N, captions to pick from", ylabel="picks that name nothing absent")
    axis.set_title(f"means of {len(found)} worlds, 200 pictures each", fontsize=9)
    beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    axis.legend(fontsize=7, title="picked by", title_fontsize=7, **beside)
    figure.savefig(path, dpi=130)


def draw(lines, folder):
    draw_iterations(folder / "iterations.png", lines)
    draw_expert(folder / "expert_error.png", lines)
    draw_flipped(folder / "flipped.png", lines)
    draw_best_of_n(folder / "best_of_n.png", lines)
