"""Is nothing lost? Each stage is stopped at many moments, started again by the same command, and
its files are compared with those of an undisturbed run.

    python tests/faults.py                     # 24 kills, 3 full disks, 3 SIGTERM of each stage
    python tests/faults.py --stages 03 --kills 3 --others 1

A kill (SIGKILL) comes after a drawn part of the stage's time, within the write of a drawn chunk of
kept rows, or right before or after a drawn file gets its final name. The stages run in forks of
this process, which has the slow imports already, on a small world, in chunks of a few rows.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import demo
import torch
import ultralytics  # noqa: F401  here, so that no fork has to
from conftest import STAGES, common, stage
from scenes import write_pictures

SCRIPTS = {name[:2]: stage(name) for name in STAGES}
SMALL = {
    "01": "--validation 4 --train 30 --candidates 2",
    "02": "--critiques 3",
    "03": "--steps 12 --save-every 3 --train-batch 8",
    "04": "--pool 14 --samples 6 --steps 4 --save-every 1 --train-batch 8 --retention 1",
    "05": "",
}
VOLATILE = ("seconds", "peak_gpu_gib")
n_chunks = multiprocessing.Value("i")  # chunks of kept rows and final names, counted in a fork
n_names = multiprocessing.Value("i")


# ---- Faults: what a fork does to itself before it starts the stage ------------------------------
def watch(chunk=None, cut=0.5, name=None, after=False):
    """Count chunks and final names; die when the part `cut` of a chunk is written, or before or
    after a name is given."""
    replace, rename = Path.replace, Path.rename

    def open_watched(path, mode="r", **settings):
        file = open(path, mode, **settings)  # noqa: SIM115  its caller closes it
        n_chunks.value += mode == "a"  # common.kept alone appends
        if mode == "a" and n_chunks.value == chunk:
            file.write = partial(write_part, file.write, file.flush)
        return file

    def write_part(write, flush, text):
        write(text[: int(cut * len(text))])
        flush()
        signal.raise_signal(signal.SIGKILL)

    def give(original, self, target):
        n_names.value += 1
        if n_names.value == name and not after:
            signal.raise_signal(signal.SIGKILL)
        result = original(self, target)
        if n_names.value == name:
            signal.raise_signal(signal.SIGKILL)
        return result

    n_chunks.value = n_names.value = 0
    common.open = open_watched  # goes before the builtin one
    Path.replace = lambda self, target: give(replace, self, target)
    Path.rename = lambda self, target: give(rename, self, target)


def end_later(number, seconds):
    """The signal of this number comes after so many seconds."""
    watch()
    threading.Timer(seconds, signal.raise_signal, (number,)).start()


def fill_disk(size):
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def draw_fault(rng, kind, seconds, largest):
    """(what is said of it, what the fork does, the status that it ends with)."""
    at = rng.uniform(0.1, 0.95)
    chunk, name = rng.randint(1, n_chunks.value), rng.randint(1, n_names.value)
    if kind == "chunk":
        return f"chunk {chunk} at {at:.2f}", partial(watch, chunk, at), -signal.SIGKILL
    if kind in ("earlier", "later"):
        dies = partial(watch, name=name, after=kind == "later")
        return f"{kind} than name {name}", dies, -signal.SIGKILL
    if kind == "disk":
        size = int(at * largest)
        return f"disk full at {size} bytes", partial(fill_disk, size), 1
    return f"{kind.name} at {at:.2f}", partial(end_later, kind, at * seconds), -kind


# ---- Running a stage in a fork -------------------------------------------------------------------
def run_in_fork(number, argv, prepare, log):
    """Exit status of a stage, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            prepare()
            common.run(SCRIPTS[number].main, SCRIPTS[number].parse_args(argv))
            status = 0
        except SystemExit as end:
            print(end.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder):
    """{file: its bytes, or its JSON values without what no two runs have in common}."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_dir() or path.name == ".lock":
            continue
        data = path.read_bytes().replace(bytes(folder.parent), b"RUN")  # report.md names it
        if path.suffix in (".json", ".jsonl"):
            lines = data.splitlines() if path.suffix == ".jsonl" else [data]
            data = [json.loads(line, object_hook=without_volatile) for line in lines if line]
        found[path.relative_to(folder).as_posix()] = data
    return found


def without_volatile(value):
    return {name: item for name, item in value.items() if name not in VOLATILE}


# ---- A stage's trials ----------------------------------------------------------------------------
KILLS = ("chunk", "earlier", signal.SIGKILL, "chunk", "later", signal.SIGKILL)
OTHERS = ("disk", signal.SIGTERM)


def try_stage(number, argv_of, run, folder, rng, n_kills, n_others):
    """(lines of what went wrong, trials, trials in which the fault came before the end)."""
    earlier, trial, log = folder / "earlier", folder / "trial", folder / "log.txt"
    shutil.rmtree(earlier, ignore_errors=True)
    shutil.copytree(run, earlier)
    clock = time.time()
    if run_in_fork(number, argv_of(run), watch, log) != 0:
        sys.exit(f"error: the undisturbed stage {number} fails:\n{log.read_text()}")
    seconds = time.time() - clock
    [made] = run.glob(f"{number}_*")
    wanted = contents(made)
    largest = max(path.stat().st_size for path in made.rglob("*"))
    kinds = [KILLS[k % len(KILLS)] for k in range(n_kills)] + [*OTHERS] * n_others
    faults = [draw_fault(rng, kind, seconds, largest) for kind in kinds]
    wrong, n_struck = [], 0
    for said, prepare, expected in faults:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(earlier, trial)
        status = run_in_fork(number, argv_of(trial), prepare, log)
        n_struck += status != 0
        if status not in (0, expected) or "Traceback" in log.read_text():
            wrong.append(f"{number}, {said}: ended with {status}\n{log.read_text()[-2000:]}")
            continue
        status = run_in_fork(number, argv_of(trial), watch, log)
        found = contents(trial / made.name)
        other = sorted(x for x in wanted.keys() | found.keys() if wanted.get(x) != found.get(x))
        if status != 0 or other:
            then = f"the second time {status}, other files {other}\n{log.read_text()[-2000:]}"
            wrong.append(f"{number}, {said}: {then}")
    return wrong, len(faults), n_struck


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", default=list(SMALL), choices=SMALL)
    parser.add_argument("--kills", type=int, default=24, help="of each stage (default 24)")
    parser.add_argument("--others", type=int, default=3, help="full disks, and SIGTERM (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    os.chdir(demo.ROOT)
    torch.set_num_threads(1)
    common.CHUNK = 16  # sequences between two saves
    rng = random.Random(args.seed)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pictures, run = folder / "pictures", folder / "run"
        write_pictures(pictures, 0, n_images=80, n_heldout=6)
        run.mkdir()

        def argv_of(number, run):
            line = demo.commands(demo.WORLD, pictures, run, 0)[number]
            return [*line[1:], "--max-new-tokens", "64", *SMALL[number].split()]

        for number in SMALL:
            counts = (args.kills, args.others) if number in args.stages else (0, 0)
            of_stage = partial(argv_of, number)
            wrong, n, n_struck = try_stage(number, of_stage, run, folder, rng, *counts)
            failed |= bool(wrong)
            print(f"stage {number}: {n - len(wrong)} of {n} identical ({n_struck} cut)", flush=True)
            print("".join(f"{line}\n" for line in wrong), end="")
    sys.exit(failed)


if __name__ == "__main__":
    main()
