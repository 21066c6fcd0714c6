"""The whole method on a toy world, by the real command lines, on two CPU cores:

    python tests/demo.py                     # everything lies in runs/demo

It prints each command before running it, and ends on the table of stage 05. The same five scripts, with the flags that name
the model, the detector and the images, train a 7B judge.
"""
import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import pick_device  # noqa: E402

# The toy's sizes: everything else is the scripts' own default.
STAGE_01 = ["--candidates", "4", "--max-new-tokens", "32", "--validation", "100", "--train", "400"]
STAGE_02 = ["--critiques", "2", "--max-new-tokens", "96"]
STAGE_03 = ["--steps", "150", "--lr", "3e-3", "--micro-batch", "32", "--max-new-tokens", "96"]
STAGE_04 = ["--iterations", "2", "--pool", "600", "--steps", "60", "--lr", "1.5e-3", "--micro-batch", "32", "--max-new-tokens", "96"]
STAGE_05 = ["--max-new-tokens", "96", "--best-of", "8", "--best-of-images", "100"]
BATCH = ["--batch-size", "256"]  # sequences decoded together: the model is small
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]  # the same rows, on both cores


def commands(world, run, seed, controls=("random",), world_args=(), expert=None, style="critique"):
    """(name, command line) of each step, as a user would type them."""
    world, run = str(world), ["--run", str(run), "--seed", str(seed)]
    yield "world", ["tests/toy_world.py", "--out", world, "--seed", str(seed), *world_args]
    yield "01", ["01_build_preferences.py", *run, "--images", f"{world}/images", "--image-root", world, "--model", f"{world}/model", "--expert",
                 expert or f"{world}/expert.pt", "--prompts", f"{world}/prompts.txt", *STAGE_01, *BATCH]
    yield "02", ["02_generate_critiques.py", *run, *STAGE_02, "--style", style, *BATCH]
    yield "03", ["03_train_ift.py", *run, *STAGE_03, *BATCH]
    yield "04", ["04_rejection_sampling.py", *run, *STAGE_04, *BATCH]
    for control in controls:
        yield f"04 {control}", ["04_rejection_sampling.py", *run, "--select", control, *STAGE_04, *BATCH]
    yield "05", ["05_evaluate.py", *run, "--pairs", f"{world}/heldout.jsonl", "--truth", f"{world}/truth.jsonl", *STAGE_05, *BATCH]


def start(command, log=None):
    """The command as a process; its output goes to the terminal, or to a file. One thread each, unless OMP_NUM_THREADS says
    otherwise: matrices as small as these gain nothing from a second one, and two threads wait for each other."""
    print(f"\n$ python {shlex.join(command)}" + (f" > {log}" if log else ""), flush=True)
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ},
                            stdout=log and log.open("w"), stderr=log and subprocess.STDOUT)


def run_all(steps):
    """Print and run the commands one after the other; stop at the first that fails -> {name: seconds}."""
    seconds = {}
    for name, command in steps:
        started = time.time()
        if start(command).wait():
            raise SystemExit(f"error: step {name} failed; mend the cause and run the same command again, it resumes")
        seconds[name] = round(time.time() - started, 1)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run, clock = ROOT / args.run, time.time()
    steps = dict(commands(Path(args.run) / "world", args.run, args.seed))
    both_cores = TWO_PROCESSES if pick_device().type == "cpu" else []  # a GPU is for one process
    seconds = run_all([("world", steps["world"])])  # trains the detector beside the model
    seconds |= run_all((name, both_cores + steps[name]) for name in ("01", "02", "03"))
    control = start(steps["04 random"], run / "04_random.log")  # beside 04 on the second core
    seconds |= run_all([("04", steps["04"])])
    if control.wait():
        raise SystemExit(f"error: the control failed, see {run}/04_random.log; the same command again resumes")
    seconds |= run_all([("05", both_cores + steps["05"])])
    print("\n" + (run / "05_evaluation" / "report.md").read_text())
    print("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()) + f"; all {time.time() - clock:.0f}")
    print(f"pictures: {args.run}/01_preferences/contact_sheet.png, {args.run}/04_rejection/iter*/margins.png, "
          f"{args.run}/05_evaluation/reliability.png; the report: {args.run}/05_evaluation/report.md")


if __name__ == "__main__":
    main()
