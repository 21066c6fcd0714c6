"""Tables and pictures of study.py's results, from assets/results.jsonl alone, by the rules of
study.py's header."""

import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

START = ("start", "the demo's flags")
FEW = 5  # worlds: below, nothing holds
NOTHING = 0.01  # an effect whose whole interval is smaller is none
FOLLOWS = 0.85  # share of verdicts that follow their checks from which stage 03 has taken
# The .975 quantiles of Student's t with 1, 2, ... 11 degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


def read(path, is_final=False):
    """The lines of the worlds fixed beforehand, or of those kept for the final check."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if (line["seed"] > 1000) == is_final]


# ---- Cells: of each world a number and its resamples ---------------------------------------------
def of_setting(lines, study, setting):
    """{seed: the line recorded first}, without worlds that were refused; of the newest code."""
    found = {}
    for line in newest(lines, (study, setting)):
        if place_of(line) == (study, setting):
            found.setdefault(line["seed"], line)
    return dict(sorted(found.items()))


def newest(lines, *places):
    """The lines of the newest code that has measured all places, each (study, setting, ...), in
    FEW worlds or more; of the one with the most worlds where there is none."""
    best, found = (0, 0), []
    for code in {code_of(line) for line in lines}:
        of_code = [line for line in lines if code_of(line) == code and line["accuracies"]]
        worlds = [{x["seed"] for x in of_code if has(x, *place)} for place in places]
        n = min(FEW, len(set.intersection(*worlds)))
        if n and (n, code) > best:
            best, found = (n, code), of_code
    return found


def has(line, study, setting, *conditions):
    return place_of(line) == (study, setting) and line["accuracies"].keys() >= set(conditions)


def place_of(line):
    return line["study"], line["setting"]


def code_of(line):
    """Which code, of those that give other numbers, has made a line: study.py's CODE."""
    return line.get("code", 1)


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


def difference(lines, place, other):
    """Cells of one place (study, setting, condition) minus another, or minus a number. Both of a
    world are of the same code and processor."""
    if isinstance(other, float):
        found = cells(newest(lines, place), *place)
        return {seed: (value - other, draws - other) for seed, (value, draws) in found.items()}
    found, lines = {}, newest(lines, place, other)
    for processor in processors(lines):
        part = [line for line in lines if line["processor"] == processor]
        found = minus(cells(part, *place), cells(part, *other)) | found
    return dict(sorted(found.items()))


def processors(lines):
    return sorted({line["processor"] for line in lines})


def only(of_worlds, seeds):
    return {seed: cell for seed, cell in of_worlds.items() if seed in seeds}


def where_03_took(lines, has_taken=True):
    """The worlds in which stage 03 has taught the verdict to follow the checks, or those in which
    it has not; one where processors differ in this is neither."""
    kinds = {}
    for line in newest(lines, START):
        if place_of(line) == START:
            share = line["counts"]["after 03: verdict follows"]
            kinds.setdefault(line["seed"], set()).add(share >= FOLLOWS)
    return [seed for seed, kind in kinds.items() if kind == {has_taken}]


# ---- Intervals and verdicts ----------------------------------------------------------------------
def average(of_worlds):
    return mean(value for value, _ in of_worlds.values())


def standard_error(of_worlds):
    """Of the mean of two worlds or more, by their spread."""
    return stdev(value for value, _ in of_worlds.values()) / len(of_worlds) ** 0.5


def interval(of_worlds):
    """95 % (low, high): Student's t over worlds; of a single one, of its resampled images."""
    if len(of_worlds) == 1:
        [(_, draws)] = of_worlds.values()
        low, high = np.percentile(draws, [2.5, 97.5])
        return float(low), float(high)
    half = T[len(of_worlds) - 2] * standard_error(of_worlds)
    return average(of_worlds) - half, average(of_worlds) + half


def p_value(of_worlds, null=0.0):
    """Two-sided, of Student's t test that the mean over worlds is `null`."""
    degrees = len(of_worlds) - 1
    t = abs(average(of_worlds) - null) / max(standard_error(of_worlds), 1e-9)
    # With t = sqrt(degrees) tan(x), Student's density is that of cos(x) ** (degrees - 1).
    x = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(x) ** (degrees - 1)
    return float(density[x > np.arctan(t / degrees**0.5)].sum() / density.sum())


def verdict_on(kind, of_worlds):
    """(verdict, p value by which it was reached, 1 without a decision) on a claim that the mean
    over worlds is above zero ("gains") or nothing ("no effect")."""
    if len(of_worlds) < FEW:
        if kind == "no effect" and abs(average(of_worlds)) < NOTHING:
            return "points to none", 1.0
        return "points up" if average(of_worlds) > 0 else "points down", 1.0
    low, high = interval(of_worlds)
    p_low, p_zero, p_high = (p_value(of_worlds, null) for null in (-NOTHING, 0, NOTHING))
    is_nothing = low > -NOTHING and high < NOTHING
    p_nothing = max(p_low, p_high)  # by the bound that is nearer
    if kind == "gains":
        if low > 0 or high < 0:
            return ("holds" if low > 0 else "does not"), p_zero
        return ("does not", p_nothing) if is_nothing else ("undecided", 1.0)
    if is_nothing or low > NOTHING or high < -NOTHING:
        return ("holds" if is_nothing else "does not"), p_nothing
    return "undecided", 1.0


def survive_holm(p_values, level=0.05):
    """[is it among those that Holm's correction for their number leaves?]"""
    order, survivors = np.argsort(p_values), []
    for rank, i in enumerate(order):
        if p_values[i] > level / (len(p_values) - rank):
            break
        survivors.append(i)
    return [i in survivors for i in range(len(p_values))]


# ---- Lines of tables -----------------------------------------------------------------------------
def number(value, sign=""):
    return f"{round(value, 9) + 0:{sign}.3f}".replace("0.", ".", 1)  # -.000: just below zero


def shown(of_worlds, sign="+", fewest=1):
    """Mean (interval, of the fewest worlds or more)."""
    if len(of_worlds) < fewest:
        return number(average(of_worlds), sign) if of_worlds else ""
    low, high = interval(of_worlds)
    return f"{number(average(of_worlds), sign)} ({number(low, sign)}, {number(high, sign)})"


def heading(columns):
    """A table's first two lines."""
    return ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def table(title, rows):
    """rows: {name: cells of accuracies}."""
    seeds = sorted(set().union(*rows.values()))
    out = heading([title, "mean, 95 % interval", "worlds", *map(str, seeds)])
    for name, of_worlds in rows.items():
        worlds = [number(of_worlds[x][0]) if x in of_worlds else "" for x in seeds]
        columns = [name, shown(of_worlds, ""), str(len(of_worlds)), *worlds]
        out.append(f"| {' | '.join(columns)} |")
    return out


# ---- The tables ----------------------------------------------------------------------------------
def study_tables(lines, study):
    """All that a study has measured: accuracies, then means of its counts. lines: of one code and
    processor."""
    lines = [line for line in lines if line["study"] == study]
    accuracies, out = {}, []
    counts = heading([f"{study}: counts", "mean", "worlds"])
    for setting in dict.fromkeys(line["setting"] for line in lines):
        found = of_setting(lines, study, setting).values()
        for condition in dict.fromkeys(name for line in found for name in line["accuracies"]):
            accuracies[f"{setting}: {condition}"] = cells(lines, study, setting, condition)
        for name in dict.fromkeys(name for line in found for name in line["counts"]):
            values = [line["counts"].get(name) for line in found]
            if values := [value for value in values if value is not None]:
                counts.append(f"| {setting}: {name} | {mean(values):.3g} | {len(values)} |")
    if accuracies:
        out = table(study, accuracies) + counts
    return out


def tables(lines, final=()):
    """Everything as markdown: the claims, then each code's and processor's studies."""
    out = ["# Claims", *claims(lines, final), "", "# All differences", *differences_table(lines)]
    for code in sorted({code_of(line) for line in lines}, reverse=True):
        of_code = [line for line in lines if code_of(line) == code]
        for processor in processors(of_code):
            part = [line for line in of_code if line["processor"] == processor]
            out += ["", f"# Measured by code {code} on {processor}"]
            out += [
                f"World {x['seed']} was refused: {x['failure']}" for x in part if "failure" in x
            ]
            for study in dict.fromkeys(line["study"] for line in part):
                out += study_tables(part, study)
    return "\n".join(out)


# ---- The README's table of claims ----------------------------------------------------------------
FULL = ("headline", "pools of 600")


def comparisons():
    """[(claim, the paper's figure, verdict_on's kind, place, what it is compared with)] of
    claims.tsv: a place is (study, setting, condition), it is compared with another or a number."""
    found = []
    for line in (Path(__file__).parent / "claims.tsv").read_text().splitlines()[1:]:
        claim, paper, kind, place, other = line.split("\t")
        other = tuple(other.split("; ")) if ";" in other else float(other)
        found.append((claim, paper, kind, tuple(place.split("; ")), other))
    return found


def of_kinds(lines, place, other):
    """A difference's cells: of all worlds, of those where 03 took, of those where it failed."""
    found = difference(lines, place, other)
    of_code = newest(lines, *[x for x in (place, other) if isinstance(x, tuple)])
    return found, *[only(found, where_03_took(of_code, has_taken)) for has_taken in (True, False)]


def claims(lines, final=()):
    """The README's table, as lines of markdown; final: the lines of the final check's worlds.

    Stars mark the verdicts that survive Holm's correction."""
    columns = ("claim", "paper", "here", "worlds", "where 03 took", "where it failed")
    out = heading([*columns, "final check", "verdict", "study"])[1:]
    decided, rows = [], []
    for claim, paper, kind, place, other in comparisons():
        found, took, failed = of_kinds(lines, place, other)
        if claim and found:
            decided.append(verdict_on(kind, found))
            checked = difference(final, place, other).values()
            values = " ".join(number(value, "+") for value, _ in checked)
            kinds = [f"{shown(x, fewest=FEW)} of {len(x)}" if x else "" for x in (took, failed)]
            rows.append(([claim, paper, shown(found), str(len(found)), *kinds, values], place[0]))
    stars = survive_holm([p for _, p in decided])
    for (row, study), (verdict, _), star in zip(rows, decided, stars):
        verdict += r" \*" * star
        out.append(f"| {' | '.join([*row, verdict])} | `{study}` |")
    return out


def differences_table(lines):
    out = heading(["difference", "of worlds", "mean, 95 % interval", "03 took", "it failed", "on"])
    for *_, place, other in comparisons():
        found, took, failed = of_kinds(lines, place, other)
        if found:
            name = f"{': '.join(place)} - {other if isinstance(other, float) else ': '.join(other)}"
            on = processors([x for x in newest(lines, place) if x["study"] == place[0]])
            columns = [name, " ".join(map(str, found)), *map(shown, (found, took, failed))]
            out.append(f"| {' | '.join([*columns, '; '.join(on)])} |")
    return out


# ---- Pictures ------------------------------------------------------------------------------------
COLOURS = ("#0072B2", "#D55E00", "0.45")
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5), "fontsize": 7}


def axes(size):
    """On white: readable on a light and on a dark page."""
    axis = Figure(size, layout="tight", facecolor="white").subplots()
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    return axis


def save(axis, path, title, ylabel):
    axis.set_title(title, fontsize=9)
    axis.set_ylabel(ylabel)
    axis.figure.savefig(path, dpi=130)


def draw_gains(axis, x, gains, k, name):
    """A line with intervals, the k-th of three; gains: cells of differences, or {}, one for each
    of x."""
    x, gains = zip(*[(place, gain) for place, gain in zip(x, gains) if gain])
    middle = np.array([average(gain) for gain in gains])
    spans = np.array([interval(gain) for gain in gains]).T  # (2, points)
    style = {"color": COLOURS[k], "marker": "os^"[k], "markersize": 5, "label": name}
    axis.errorbar(x, middle, np.abs(spans - middle), **style, capsize=2, elinewidth=0.9)
    axis.axhline(0, color="0.3", linestyle=":")
    axis.legend(fontsize=7)


def draw_iterations(path, lines):
    """What each iteration has gained over stage 03, with controls, where 03 took."""
    last = (*FULL, "margin, iteration 4")
    lines, axis = newest(lines, last), axes((6.4, 3.6))
    took = only(cells(lines, *last), where_03_took(lines))  # the same worlds at each iteration
    for k, rule in enumerate(("margin", "random", "continue")):
        places = [(*FULL, f"{rule}, iteration {t}") for t in range(1, 5)]
        gains = [difference(lines, place, (*FULL, "after 03")) for place in places]
        x = [t + 0.06 * (k - 1) for t in range(1, 5)]
        name = ("margins", "random pairs", "stage 03 continued")[k]
        draw_gains(axis, x, [only(gain, took) for gain in gains], k, name)
    axis.set(xticks=range(1, 5), xlabel="iteration of stage 04")
    save(axis, path, f"{len(took)} worlds in which 03 took, bars 95 %", "accuracy gained over 03")


def draw_worth(path, lines):
    """What a rule's choice teaches, against the number of pairs that it was given."""
    axis, took = axes((6.4, 3.6)), where_03_took(newest(lines, ("worth", "all that pass")))
    names = ("the largest margins", "random pairs", "the smallest margins")
    for k, rule in enumerate(("margin", "random", "low")):
        settings = {f"{rule} {part}": rule for part in (0.05, 0.1, 0.2, 0.4)}
        x, gains = [], []
        for setting, judge in {**settings, "all that pass": "margin"}.items():
            place = ("worth", setting, f"{judge}, iteration 1")
            x.append((mean_count(lines, *place[:2], "pairs kept") or 0) + 5 * (k - 1))
            gains.append(only(difference(lines, place, (*place[:2], "after 03")), took))
        draw_gains(axis, x, gains, k, names[k])
    axis.set(xlabel="pairs of 600 trained on, 3 epochs or more (right: all that pass)", xlim=0)
    title = f"{len(took)} worlds in which 03 took, bars 95 %"
    save(axis, path, title, "accuracy gained over 03")


def draw_expert(path, lines):
    """Judge accuracy against the share of labels that the expert gets wrong."""
    axis = axes((8.4, 3.8))
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


def draw_best_of_n(path, lines):
    """Quality of the caption that each picker takes from N."""
    axis = axes((6.4, 3.2))
    place = ("best", [line["setting"] for line in lines if line["study"] == "best"][-1])
    sizes = (1, 2, 4, 8, 16)
    for picker, label, colour, marker in (
        ("oracle", "the truth", "black", "*"),
        ("margin 1", "the judge after 04", "#0072B2", "o"),
        ("after 03", "the judge after 03", "#009E73", "^"),
        ("base", "the base judge", "#E69F00", "D"),
        ("random", "a random one", "#D55E00", "s"),
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
    draw_worth(folder / "worth.png", lines)
    draw_expert(folder / "expert_error.png", lines)
    draw_best_of_n(folder / "best_of_n.png", lines)
