"""The README's pictures and numbers of a run, from the demo's run directory:

    python tests/pictures.py --run runs/demo --out assets

after the demo and, for the judge under attack, its command of stage 05 once more with --attack.

pipeline.png        one example of what each stage makes
contact_sheet.png   01: the first four pairs with the detector's boxes
critiques.png       03: what the judge wrote before and after
margins.png         04: the margins of the first pool
examples.png        04: critiques of low, middle and high margin
demo.json           05: accuracies and paired differences with their intervals, rates of checks;
                    counts of 02, the largest margin of 04's first pool
"""

import argparse
import importlib
import json
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

one = importlib.import_module("01_build_preferences")
ift = importlib.import_module("03_train_ift")
four = importlib.import_module("04_rejection_sampling")
five = importlib.import_module("05_evaluate")

INK, GREY, GREEN, RED = "#222222", "#777777", "#1a7f37", "#c62828"


def panel(figure, column, title, columns=5):
    """An empty panel with a heading, in coordinates from 0 to 1."""
    axis = figure.add_axes((column / columns + 0.006, 0.02, 1 / columns - 0.012, 0.96))
    axis.axis("off")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.text(0, 0.98, title, fontsize=10, weight="bold", color=INK, va="top")
    return axis


def show_picture(figure, column, picture, row=None, columns=5):
    """The picture in the upper half of a panel, with the boxes of a row's evidence."""
    axis = figure.add_axes((column / columns + 0.006, 0.46, 1 / columns - 0.02, 0.44))
    axis.axis("off")
    axis.imshow(picture)
    if row:
        one.draw_boxes(axis, row, picture.size)


def write_lines(axis, lines, top=0.43, size=8):
    """lines: (text, colour)."""
    y = top
    for text, colour in lines:
        wrapped = textwrap.wrap(text, 32) or [""]
        for part in wrapped:
            axis.text(0, y, part, fontsize=size, color=colour, va="top", family="monospace")
            y -= 0.045


def checks(critique):
    """The critique's lines, a denied check in red."""
    lines = []
    for line in critique.splitlines():
        lines.append((line, RED if line.endswith(": no") else INK))
    return lines


def draw_pipeline(path, run, root):
    """A training pair through 01 and 02, a pool pair through 04, a held-out pair through 05."""
    pairs = {row["id"]: row for row in common.read_jsonl(run / "01_preferences/preferences.jsonl")}
    critique = common.read_jsonl(run / "02_critiques/critiques.jsonl")[0]
    pair = pairs[critique["pair_id"]]
    figure = Figure((11.5, 4.4), facecolor="white")

    axis = panel(figure, 0, "01  what is really there")
    show_picture(figure, 0, common.load_image(root / pair["image"]), pair)
    lines = [(f"+ {pair['chosen']}", GREEN), (f"- {pair['rejected']}", RED)]
    for found in pair["evidence"]:
        if found["status"] == "absent":
            lines.append((f"{found['object']}: absent ({found['confidence']:.2f})", RED))
    write_lines(axis, lines)

    axis = panel(figure, 1, "02  critiques, checked")
    heading = [(f"A: {critique['response_a']}", GREY), (f"B: {critique['response_b']}", GREY)]
    write_lines(axis, [*heading, ("", INK), *checks(critique["critique"])], top=0.88)
    samples = common.read_jsonl(run / "02_critiques/samples.jsonl")
    dropped = sum(row["dropped"] is not None for row in samples)
    note = (
        f"{dropped} of {len(samples)} critiques dropped: wrong verdict, false or missing check ..."
    )
    write_lines(axis, [(note, GREY)], top=0.14)

    axis = panel(figure, 2, "03  fine-tuned on these")
    meta = json.loads((run / "03_ift/meta.json").read_text())["validation"]
    lines = [("L = L_SFT(critiques)", INK), ("    + lambda L_SFT(correct)", INK), ("", INK)]
    for name in ("before", "after"):
        lines.append((f"{name}: accuracy {meta[name]['accuracy']:.3f}", INK))
    lines.append((f"on {meta['after']['n_pairs']} validation pairs", GREY))
    write_lines(axis, lines, top=0.88)
    log = [row for row in common.read_jsonl(run / "03_ift/metrics.jsonl") if "loss" in row]
    inset = figure.add_axes((2 / 5 + 0.03, 0.14, 1 / 5 - 0.06, 0.38))
    inset.plot([row["step"] for row in log], [row["loss_critique"] for row in log], color="#0072B2")
    inset.set(xlabel="step", yscale="log")
    inset.set_title("loss of the critiques' tokens", fontsize=8)
    inset.tick_params(labelsize=7)

    axis = panel(figure, 3, "04  margins of its own")
    questions = four.confident_rows(common.read_jsonl(run / "04_rejection/iter1/samples.jsonl"))
    kept = common.read_jsonl(run / "04_rejection/iter1/kept.jsonl")
    best = max((row for row in kept if row["order"] == "ab"), key=lambda row: row["margin"])
    rows = sorted(questions[best["pair_id"], "ab"], key=lambda row: row["confidence_in_label"])
    show_picture(figure, 3, common.load_image(root / best["image"]))
    lines = [(f"S(c+) = {best['confidence_in_label']:.3f}", GREEN)]
    lines += [line for line in checks(best["critique"]) if line[1] == RED or "Verdict" in line[0]]
    lines += [(f"S(c-) = {rows[0]['confidence_in_label']:.3f}", RED)]
    lines += [
        line for line in checks(rows[0]["critique"]) if line[1] == RED or "Verdict" in line[0]
    ]
    lines.append((f"margin of the pair: {best['margin']:.3f}", INK))
    write_lines(axis, lines)

    axis = panel(figure, 4, "05  judged in both orders")
    judged = common.read_jsonl(run / "05_evaluation/judgements.jsonl")
    heldout = {row["id"]: row for row in common.read_jsonl(root / "heldout.jsonl")}
    last = five.last_judge(five.find_conditions(run))
    rows = [row for row in judged if row["condition"] == last][:2]
    pair = heldout[rows[0]["id"]]
    show_picture(figure, 4, common.load_image(root / pair["image"]))
    lines = [(f"+ {pair['chosen']}", GREEN), (f"- {pair['rejected']}", RED), ("", INK)]
    for row in rows:
        p = row["probability_a"]
        is_right = row["verdict"] == row["label"]
        answer = f"order {row['order']}: {row['verdict']}, P(A) = {p:.3f}"
        lines.append((answer, GREEN if is_right else RED))
    write_lines(axis, lines)
    figure.savefig(path, dpi=110)


def write_numbers(path, run):
    metrics = common.read_json(run / "05_evaluation" / "metrics.json")
    table = {}
    for judge, measures in metrics["table"].items():
        table[judge] = {name: measures[name] for name in ("accuracy", "interval", "checks")}
    kept = common.read_jsonl(run / "04_rejection" / "iter1" / "kept.jsonl")
    numbers = {"table": table, "differences": metrics["differences"]}
    numbers["counts of 02"] = common.read_json(run / "02_critiques" / "meta.json")["counts"]
    numbers["largest margin"] = max(row["margin"] for row in kept)
    common.write_json(path, numbers)


def main(args):
    run, out = args.run, args.out
    write_numbers(out / "demo.json", run)
    root = run / "world"
    rows = common.read_jsonl(run / "01_preferences" / "preferences.jsonl")
    one.draw_contact_sheet(out / "contact_sheet.png", rows[:4], root)
    draw_pipeline(out / "pipeline.png", run, root)
    for name, folder in (
        ("critiques.png", run / "03_ift"),
        ("margins.png", run / "04_rejection/iter1"),
        ("examples.png", run / "04_rejection/iter1"),
        ("contact_sheet.png", out),
        ("pipeline.png", out),
    ):
        with Image.open(folder / name) as picture:  # few colours: small files
            small = picture.convert("RGB").quantize(64, Image.Quantize.FASTOCTREE, dither=0)
        small.save(out / name, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs/demo", help="the demo's run")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder")
    main(parser.parse_args())
