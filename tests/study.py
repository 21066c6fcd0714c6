"""The whole method with every control on several worlds, differences paired over all questions.

    python tests/study.py --out runs/study --seeds 0 1 2        # some 25 minutes of a core a world

Worlds are built by tests/build_world.py. A finished step is not repeated, so an interrupted study
goes on where it stopped; --report only prints the tables of what is there.
"""

import argparse
import importlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import demo
import numpy as np
from scenes import write_pictures

sys.path.insert(0, str(demo.ROOT))
evaluate = importlib.import_module("05_evaluate")
common = importlib.import_module("common")

N_HELDOUT = 1000  # pairs of each world
CONTROLS = ("random", "best", "continue")


def run_world(out, seed):
    """Every step of one world, as command lines."""
    world, run = out / f"world{seed}", out / f"seed{seed}"
    pictures = world / "pictures"
    if not (world / "world.json").exists():
        build = ["tests/build_world.py", "--out", str(world), "--seed", str(seed)]
        demo.run_all([("world", build)])
    if not (pictures / "truth.jsonl").exists():
        write_pictures(pictures, seed, demo.N_IMAGES, N_HELDOUT)
    for step, command in demo.commands(world, pictures, run, seed, CONTROLS).items():
        if step in ("04 random", "04 best"):
            share_first_samples(run, step.removeprefix("04 "))
        demo.run_all([(step, command)])


def share_first_samples(run, control):
    """A control's first iteration samples the same pool from the same judge with the same seed as
    margin selection does: it is handed those critiques, and resumes from them."""
    here = run / f"04_rejection_{control}" / "iter1"
    if not here.exists():
        here.mkdir(parents=True)
        shutil.copy(run / "04_rejection" / "iter1" / "samples.jsonl", here)


def read_right(out, seeds):
    """{condition: {(seed, pair id): share of its orders judged right}}, and {(seed, pair id): its
    image, told from those of other seeds}."""
    right, image_of = {}, {}
    for seed in seeds:
        rows = common.read_jsonl(out / f"seed{seed}" / "05_evaluation" / "judgements.jsonl")
        by_condition = {}
        for row in rows:
            by_condition.setdefault(row["condition"], []).append(row)
            image_of[seed, row["id"]] = f"{seed}/{row['image']}"
        for condition, of_condition in by_condition.items():
            for pair_id, share in evaluate.right_per_pair(of_condition).items():
                right.setdefault(condition, {})[seed, pair_id] = share
    return right, image_of


def print_line(name, values, seeds, image_of, sign=""):
    """A row of a table: the mean of {(seed, pair id): value}, its interval, the mean per seed."""
    low, high = evaluate.cluster_bootstrap(list(values.values()), [image_of[key] for key in values])
    per_seed = []
    for seed in seeds:
        of_seed = [value for key, value in values.items() if key[0] == seed]
        per_seed.append(f"{np.mean(of_seed):{sign}.3f}")
    interval = f"{low:{sign}.3f} to {high:{sign}.3f}"
    mean = np.mean(list(values.values()))
    print(f"| {name} | {mean:{sign}.3f} | {interval} | {' '.join(per_seed)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="worlds worked on at the same time")
    parser.add_argument("--report", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    out = args.out.resolve()
    if not args.report:
        with ThreadPoolExecutor(args.parallel) as pool:
            list(pool.map(lambda seed: run_world(out, seed), args.seeds))
    right, image_of = read_right(out, args.seeds)
    print("\n| judge | accuracy | 95 % interval over images | per seed |\n|---|---|---|---|")
    for condition, values in right.items():
        print_line(condition, values, args.seeds, image_of)
    last = demo.last_margin(right)
    print(f"\n| {last} minus | difference | 95 % interval, paired | per seed |\n|---|---|---|---|")
    for condition, values in right.items():
        if condition != last and "image" not in condition:
            gain = {key: right[last][key] - values[key] for key in values}
            print_line(condition, gain, args.seeds, image_of, sign="+")


if __name__ == "__main__":
    main()
