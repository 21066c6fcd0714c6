"""The whole method on the toy world, by the real command lines, in some eight minutes on two cores:

    python tests/demo.py                     # everything lies in runs/demo

It prints each command before running it. The same five scripts, with the flags that name the
model, the detector and the images, train a 7B judge.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from scenes import write_pictures

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "tests" / "world"  # model/, expert.pt, world.json; never written to
N_IMAGES = 2300
N_HELDOUT = 400  # pairs

# The toy's sizes: everything else is the scripts' own default. What 05 judges are N_HELDOUT pairs
# of other pictures, so 01 holds out none.
FLAGS = {
    "01": "--candidates 4 --max-new-tokens 32 --validation 100 --heldout 0 --train 400",
    "02": "--critiques 2 --max-new-tokens 96",
    "03": "--steps 150 --lr 3e-3 --micro-batch 32 --max-new-tokens 96",
    "04": "--iterations 2 --pool 600 --steps 60 --lr 1.5e-3 --micro-batch 32 --max-new-tokens 96",
    "05": "--max-new-tokens 96",
}
BATCH = "--batch-size 256"  # sequences decoded together: the model is small

# torchrun: the same rows, on both cores
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]


def commands(world, pictures, run, seed, controls=("random",), expert=None, style="critique"):
    """{name: command line} of each step, as a user would type them. world: a folder with model/ and
    expert.pt; pictures: a folder as scenes.write_pictures makes it."""
    flags = {stage: text.split() for stage, text in FLAGS.items()}
    shared = ["--run", str(run), "--seed", str(seed), *BATCH.split()]
    data = ["--images", f"{pictures}/images", "--image-root", str(pictures)]
    data += ["--prompts", f"{pictures}/prompts.txt"]
    judge = ["--model", f"{world}/model", "--expert", str(expert or f"{world}/expert.pt")]
    heldout = ["--pairs", f"{pictures}/heldout.jsonl"]
    steps = {
        "01": ["01_build_preferences.py", *shared, *data, *judge, *flags["01"]],
        "02": ["02_generate_critiques.py", *shared, "--style", style, *flags["02"]],
        "03": ["03_train_ift.py", *shared, *flags["03"]],
        "04": ["04_rejection_sampling.py", *shared, *flags["04"]],
    }
    for control in controls:
        steps[f"04 {control}"] = [*steps["04"], "--select", control]
    steps["05"] = ["05_evaluate.py", *shared, *heldout, *flags["05"]]
    return steps


def start(command, log=None):
    """The command as a process; its output goes to the terminal, or to a file.

    One thread each, unless OMP_NUM_THREADS says otherwise: matrices as small as these gain nothing
    from a second one, and two threads wait for each other."""
    arrow = f" > {log}" if log else ""
    print(f"\n$ python {shlex.join(command)}{arrow}", flush=True)
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w") if log else contextlib.nullcontext() as file:
        words = {"stdout": file, "stderr": file and subprocess.STDOUT}
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **words)


def run_all(steps):
    """Runs (name, command line) one after the other -> {name: seconds}."""
    seconds = {}
    for name, command in steps:
        clock = time.time()
        if start(command).wait() != 0:
            sys.exit(f"error: step {name} failed; mend the cause and run the same command again")
        seconds[name] = round(time.time() - clock, 1)
    return seconds


def last_screen(run):
    """The table, and where to look."""
    folder = run / "05_evaluation"
    table = json.loads((folder / "metrics.json").read_text())["table"]
    print(f"\n{'judge':34s} accuracy  95 % interval  both orders")
    for name, measures in table.items():
        low, high = measures["interval"]
        interval = f"{low:.3f}-{high:.3f}"
        print(f"{name:34s} {measures['accuracy']:8.3f}  {interval:>13s}  {measures['both']:11.3f}")
    print(f"\nlook at: {run}/01_preferences/contact_sheet.png {run}/04_rejection/iter1/margins.png")
    print(f"report:  {folder}/report.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="(default: runs/demo)")
    args = parser.parse_args()
    os.chdir(ROOT)
    clock = time.time()
    run, pictures = args.run, args.run / "world"
    seed = json.loads((WORLD / "world.json").read_text())["seed"]
    if not (pictures / "truth.jsonl").exists():
        print(f"drawing {N_IMAGES} pictures and {N_HELDOUT} held-out pairs into {pictures}")
        write_pictures(pictures, seed, N_IMAGES, N_HELDOUT)
    steps = commands(WORLD.relative_to(ROOT), pictures, run, seed)
    if not torch.cuda.is_available():  # a GPU is for one process
        for name in ("01", "02", "03", "05"):
            steps[name] = TWO_PROCESSES + steps[name]
    seconds = run_all((name, steps[name]) for name in ("01", "02", "03"))
    control = start(steps["04 random"], run / "04_random.log")  # beside 04 on the second core
    seconds |= run_all([("04", steps["04"])])
    if control.wait() != 0:
        sys.exit(f"error: the control failed, see {run}/04_random.log; mend and run again")
    seconds |= run_all([("05", steps["05"])])
    last_screen(run)
    by_step = ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
    print(f"seconds: {by_step}; all {time.time() - clock:.0f}")


if __name__ == "__main__":
    main()
