"""The README's table: the whole method with every control on three worlds, differences paired over all their questions.

    python tests/study.py --out runs/study                  # the table; about an hour on two cores
    python tests/study.py --out runs/study --ablations      # and a run without expert, and one with --style descriptive

A finished step is not repeated, so an interrupted study goes on where it stopped; --report only prints the table again.
"""
import argparse
import importlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import demo

sys.path.insert(0, str(demo.ROOT))
from scenes import write_pictures  # noqa: E402

evaluate = importlib.import_module("05_evaluate")
N_HELDOUT = 1000
CONTROLS = ("random", "best", "continue")


def seed_steps(out, seed, ablations):
    """All command lines of one world."""
    world = out / f"world{seed}"
    if not (world / "world.json").exists():
        yield "world", ["tests/build_world.py", "--out", str(world), "--seed", str(seed)]
    pictures = world / "pictures"
    if not (pictures / "truth.jsonl").exists():
        write_pictures(pictures, seed, demo.N_IMAGES, N_HELDOUT)
    for step, command in demo.commands(world, pictures, out / f"seed{seed}", seed, CONTROLS).items():
        if step.startswith("04 "):
            share_first_samples(out / f"seed{seed}")
        yield step, command
    if ablations:
        own_answers = ["--vocabulary", str(out / f"seed{seed}" / "01_preferences" / "vocabulary.json"), "--present", "0.5",
                       "--absent", "0.5"]  # P(yes) is no detector's confidence: yes or no, nothing between
        for name, expert, style in (("none", "none", "critique"), ("descriptive", None, "descriptive")):
            run = out / f"seed{seed}-{name}"
            for step, command in demo.commands(world, pictures, run, seed, (), expert, style).items():
                if step in ("01", "02", "03", "05"):
                    yield f"{step} {name}", command + (own_answers if step == "01" and expert == "none" else [])


def share_first_samples(run):
    """A control's first iteration samples the same pool from the same judge with the same seed as margin selection does:
    hand it those critiques instead of sampling them again (the stage resumes from them)."""
    for control in ("random", "best"):
        here = run / f"04_rejection_{control}" / "iter1"
        if not here.exists():
            here.mkdir(parents=True)
            shutil.copy(run / "04_rejection" / "iter1" / "samples.jsonl", here)


def pooled(out, seeds, suffix=""):
    """{condition: {"right": per pair, the share of its orders (N,), "clusters": image (N,), "seeds": accuracy of each, "unparseable"}}
    over the seeds' held-out pairs; the preference for the shorter response first."""
    result = {}
    for seed in seeds:
        rows = evaluate.read_jsonl(out / f"seed{seed}{suffix}" / "05_evaluation" / "judgements.jsonl")
        image = {row["id"]: f"{seed}/{row['image']}" for row in rows}  # 05 leaves out a pair that occurs twice
        pairs = [pair for pair in evaluate.read_jsonl(out / f"world{seed}" / "pictures" / "heldout.jsonl") if pair["id"] in image]
        rows = [{**row, "condition": "shorter response"} for row in evaluate.heuristic_rows(pairs)] + rows
        for condition in dict.fromkeys(row["condition"] for row in rows):
            here = [row for row in rows if row["condition"] == condition]
            right = evaluate.right_per_pair(here)
            entry = result.setdefault(condition, {"right": [], "clusters": [], "seeds": [], "unparseable": []})
            entry["right"] += right.values()
            entry["clusters"] += [image[key] for key in right]
            entry["seeds"].append(float(np.mean(list(right.values()))))
            entry["unparseable"] += [row["verdict"] is None for row in here]
    return result


def print_table(title, result):
    print(f"\n| {title} | accuracy | 95 % interval | per seed | both orders | unparseable | n |\n|---|---|---|---|---|---|---|")
    for name, entry in result.items():
        low, high = evaluate.cluster_bootstrap(entry["right"], entry["clusters"])
        seeds = " ".join(f"{value:.3f}" for value in entry["seeds"])
        print(f"| {name} | {np.mean(entry['right']):.3f} | {low:.3f}-{high:.3f} | {seeds} | {np.mean(np.array(entry['right']) == 1):.3f} | "
              f"{np.mean(entry['unparseable']):.3f} | {len(entry['right'])} |")


def print_differences(result):
    margins = [name for name in result if name.startswith("margin") and "image" not in name]
    last = margins[-1]
    print(f"\n| {last} minus | difference | 95 % interval, paired by question | per seed |\n|---|---|---|---|")
    for name in result:
        if name == last or "image" in name or name == "shorter response":
            continue
        gain = np.array(result[last]["right"]) - np.array(result[name]["right"])
        low, high = evaluate.cluster_bootstrap(gain, result[last]["clusters"])
        seeds = " ".join(f"{a - b:+.3f}" for a, b in zip(result[last]["seeds"], result[name]["seeds"]))
        print(f"| {name} | {gain.mean():+.3f} | {low:+.3f} to {high:+.3f} | {seeds} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true", help="also --expert none and --style descriptive")
    parser.add_argument("--parallel", type=int, default=2, help="worlds worked on at the same time")
    parser.add_argument("--report", action="store_true", help="run nothing, print the tables of what is there")
    args = parser.parse_args()
    if not args.report:
        with ThreadPoolExecutor(args.parallel) as pool:
            seconds = list(pool.map(lambda seed: demo.run_all(seed_steps(args.out, seed, args.ablations)), args.seeds))
        (args.out / "seconds.json").write_text(json.dumps(dict(zip(args.seeds, seconds)), indent=1))
    result = pooled(args.out, args.seeds)
    print_table("judge", result)
    print_differences(result)
    for name in ("none", "descriptive"):
        if all((args.out / f"seed{seed}-{name}" / "05_evaluation" / "metrics.json").exists() for seed in args.seeds):
            print_table(f"ablation: {'--expert' if name == 'none' else '--style'} {name}", pooled(args.out, args.seeds, f"-{name}"))


if __name__ == "__main__":
    main()
