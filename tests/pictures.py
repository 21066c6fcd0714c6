"""The README's pictures and numbers, from the demo's run directory:

    python tests/pictures.py --run runs/demo --out assets

after the demo and, for the judge under attack, its command of stage 05 once more with --attack.

pipeline.png        one example of what each stage makes
contact_sheet.png   01: the first four pairs with the detector's boxes
critiques.png       03: what the judge wrote before and after
margins.png         04: the margins of the first pool
examples.png        04: critiques of low, middle and high margin
demo.json           numbers of the README: 05's tables, counts of 02, the tutorial's examples
"""

import argparse
import shutil
import textwrap
from pathlib import Path

from conftest import ROOT, STAGES, common, stage
from matplotlib.figure import Figure
from PIL import Image

one, _, _, four, five = map(stage, STAGES)
INK, GREY, GREEN, RED = "#222222", "#777777", "#1a7f37", "#c62828"
WIDTH, LINE = 2.6, 0.17  # inches: of a card, and of a line of text


# ---- Cards: a heading, a picture with boxes, lines of text ---------------------------------------
def wrapped(lines):
    """[(text, colour)], cut to a card's width."""
    return [(part, colour) for text, colour in lines for part in textwrap.wrap(text, 33) or [""]]


def draw_cards(cards):
    """Cards side by side -> the figure. Of a card {"title", "image": path, "evidence", "lines":
    [(text, colour)]} all may be left out but the lines."""
    n_lines = max(len(wrapped(card["lines"])) for card in cards if "image" in card)
    height = 0.4 + WIDTH + n_lines * LINE
    figure = Figure((WIDTH * len(cards), height), facecolor="white")
    for k, card in enumerate(cards):
        left, width = (k + 0.03) / len(cards), 0.94 / len(cards)
        figure.text(left, 1 - 0.1 / height, card.get("title", ""), weight="bold", va="top")
        y = height - 0.3  # inches from below
        if "image" in card:
            side = 0.94 * WIDTH  # of the picture, which is square
            axis = figure.add_axes((left, (y - side) / height, width, side / height))
            axis.imshow(common.load_image(card["image"]))
            axis.axis("off")
            draw_boxes(axis, card.get("evidence", ()))
            y -= WIDTH
        for text, colour in wrapped(card["lines"]):
            style = {"fontsize": 8, "family": "monospace", "parse_math": False}
            figure.text(left, y / height, text, color=colour, va="top", **style)
            y -= LINE
    return figure


def draw_boxes(axis, evidence):
    """The evidence's boxes in the colour of their status, with confidences."""
    for found in evidence:
        if found["box"] is not None:
            x1, y1, x2, y2 = found["box"]
            colour = one.STATUS_COLOURS[found["status"]]
            axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, lw=2)
            label = f"{found['object']} {found['confidence']:.2f}"
            is_left = x1 + x2 < axis.get_xlim()[1]
            at = {"x": x1 if is_left else x2, "ha": "left" if is_left else "right"}
            axis.text(y=y1, s=label, va="bottom", fontsize=7, backgroundcolor=colour, **at)


def checks(critique):
    """The critique's lines, a denied check in red."""
    return [(line, RED if line.endswith(": no") else INK) for line in critique.splitlines()]


def responses(row):
    """Lines of a pair's or a question's responses."""
    if "chosen" in row:
        return [(f"+ {row['chosen']}", GREEN), (f"- {row['rejected']}", RED)]
    return [(f"A: {row['response_a']}", GREY), (f"B: {row['response_b']}", GREY)]


# ---- The pictures --------------------------------------------------------------------------------
def pair_card(pair, root, **more):
    lines = responses(pair)
    for found in pair["evidence"]:
        colour = RED if found["status"] == "absent" else INK
        lines.append((f"{found['object']}: {found['status']} {found['confidence']:.2f}", colour))
    return {"image": root / pair["image"], "evidence": pair["evidence"], "lines": lines, **more}


def before_and_after(run, root):
    """Up to four questions that the judge got wrong before 03 and right after it."""
    questions, cards, earlier = {}, [], {}
    for pair in common.read_preferences(run, "validation"):
        questions |= {question["id"]: question for question in common.both_orders(pair)}
    for row in common.read_rows(run / "03_ift" / "validation.jsonl", dict):
        was = earlier.setdefault(row["question"], row)
        if was["verdict"] != was["label"] and row["verdict"] == row["label"]:
            lines = responses(questions[row["question"]])
            for name, of_row in (("before", was), ("after", row)):
                lines += [("", INK), (f"{name}:", GREY), *checks(of_row["critique"])]
            cards.append({"image": root / row["image"], "lines": lines})
    return draw_cards(cards[:4])


def example_cards(run, root):
    """Pairs of low, middle and high margin, of those with passing critiques: of order "ab" the
    critique c+ with the largest S among the passing, and c- with the smallest S of all."""
    samples = common.read_rows(run / "04_rejection" / "iter1" / "samples.jsonl", dict)
    questions = four.critiques_by_question(samples)
    pair_ids = dict.fromkeys(row["pair_id"] for row in samples)
    margins, passing = four.margins_of_pairs(pair_ids, questions)
    ranked = [key for key in sorted(margins, key=margins.get) if margins[key] > 0]
    cards = []
    for pair_id in (ranked[0], ranked[len(ranked) // 2], ranked[-1]):
        best = max(passing[pair_id, "ab"], key=lambda row: row["confidence_in_label"])
        worst = min(questions[pair_id, "ab"], key=lambda row: row["confidence_in_label"])
        lines = [(f"margin of the pair {margins[pair_id]:.3f}", INK), *responses(best)]
        for name, row, colour in (("c+", best, GREEN), ("c-", worst, RED)):
            said = f"{name}, S = {row['confidence_in_label']:.3f}:"
            lines += [("", INK), (said, colour), *checks(row["critique"])]
        cards.append({"image": root / best["image"], "lines": lines})
    return cards


def pipeline(run, root):
    """A training pair in 01 and 02, 03's loss, a pool pair in 04, a held-out one in 05."""
    pairs = {pair["id"]: pair for pair in common.read_preferences(run, "train")}
    critique = common.read_rows(run / "02_critiques" / "critiques.jsonl", dict)[0]
    lines = [*responses(critique), ("", INK), *checks(critique["critique"])]
    validation = common.read_json(run / "03_ift" / "meta.json")["validation"]
    loss = [("L = L_SFT(critiques)", INK), ("    + lambda L_SFT(correct)", INK)]
    loss += [(f"{name}: {x['accuracy']:.3f} of validation", INK) for name, x in validation.items()]
    judgements = common.read_rows(run / "05_evaluation" / "judgements.jsonl", dict)
    last = five.last_judge(five.find_judges(run), "")["name"]
    of_last = [row for row in judgements if row["condition"] == last][:2]
    heldout = {row["id"]: row for row in common.read_rows(root / "heldout.jsonl", dict)}
    pair = heldout[of_last[0]["id"]]
    judged = [*responses(pair), ("", INK)]
    for row in of_last:
        colour = GREEN if row["verdict"] == row["label"] else RED
        said = f"{row['order']}: {row['verdict']}, P(A) = {row['probability_a']:.3f}"
        judged.append((said, colour))
    cards = [
        pair_card(pairs[critique["pair_id"]], root, title="01  what is really there"),
        {"title": "02  critiques, checked", "lines": lines},
        {"title": "03  fine-tuned on these", "lines": loss},
        {"title": "04  margins of its own", **example_cards(run, root)[-1]},
        {"title": "05  judged in both orders", "image": root / pair["image"], "lines": judged},
    ]
    figure = draw_cards(cards)
    log = common.read_rows(run / "03_ift" / "metrics.jsonl", dict)
    inset = figure.add_axes((2 / 5 + 0.03, 0.3, 1 / 5 - 0.05, 0.4))
    inset.plot([row["step"] for row in log], [row["loss_critique"] for row in log])
    inset.set(xlabel="critiques' loss by step", yscale="log")
    return figure


def write_numbers(path, run):
    metrics = common.read_json(run / "05_evaluation" / "metrics.json")
    table = {}
    names = ("accuracy", "interval", "balanced", "n_checks")
    for judge, measures in metrics["table"].items():
        table[judge] = {name: measures[name] for name in names if name in measures}
    numbers = {"table": table, "differences": metrics["differences"], "example": example(run)}
    numbers["counts of 02"] = common.read_json(run / "02_critiques" / "meta.json")["counts"]
    common.write_json(path, numbers)


def example(run):
    """What the tutorial tells of one pair each: confidences of what is found (01), the largest
    margin with the surest and the least sure critique of order "ab" (04), P(A) in both orders (05).
    """
    [first, *_] = common.read_rows(run / "02_critiques" / "critiques.jsonl", dict)
    pairs = {pair["id"]: pair for pair in common.read_preferences(run, "train")}
    found = [x["confidence"] for x in pairs[first["pair_id"]]["evidence"] if x["box"]]
    kept = common.read_rows(run / "04_rejection" / "iter1" / "kept.jsonl", dict)
    largest = max(kept, key=lambda row: row["margin"])
    samples = common.read_rows(run / "04_rejection" / "iter1" / "samples.jsonl", dict)
    of_order = four.critiques_by_question(samples)[largest["pair_id"], "ab"]
    sure = [row["confidence_in_label"] for row in of_order]
    last = five.last_judge(five.find_judges(run), "")["name"]
    judged = common.read_rows(run / "05_evaluation" / "judgements.jsonl", dict)
    asked = [row["probability_a"] for row in judged if row["condition"] == last][:2]
    numbers = {"found": found, "largest": largest["margin"], "best": max(sure), "worst": min(sure)}
    return {**numbers, "probability_a": asked}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs/demo", help="the demo's run")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder")
    run, out = vars(parser.parse_args()).values()
    write_numbers(out / "demo.json", run)
    root, path = run / "world", run / "01_preferences" / "preferences.jsonl"
    cards = [pair_card(pair, root) for pair in common.read_rows(path, common.Pair)[:4]]
    draw_cards(cards).savefig(out / "contact_sheet.png", dpi=90)
    before_and_after(run, root).savefig(out / "critiques.png", dpi=90)
    draw_cards(example_cards(run, root)).savefig(out / "examples.png", dpi=90)
    pipeline(run, root).savefig(out / "pipeline.png", dpi=90)
    shutil.copy(run / "04_rejection" / "iter1" / "margins.png", out)
    for name in ("contact_sheet", "critiques", "examples", "pipeline", "margins"):
        path = out / f"{name}.png"
        small = Image.open(path).convert("RGB").quantize(64, Image.Quantize.FASTOCTREE, dither=0)
        small.save(path, optimize=True)  # few colours: small files


if __name__ == "__main__":
    main()
