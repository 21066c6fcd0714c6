"""Is nothing lost? Each stage is stopped at many moments, started again by the same command, and
its files are compared with those of an undisturbed run.

    python tests/faults.py                      # 24 kills, 3 full disks, 3 SIGTERM for each stage
    python tests/faults.py --stages 03 --kills 3 --others 1

A kill (SIGKILL) comes after a drawn part of the stage's time, within the write of a drawn chunk of
kept rows, or right before or after a drawn file gets its final name. The stages run in forks of
this process, which has the slow imports already, on a small world, in chunks of a few rows.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import demo
import torch
import ultralytics
from scenes import write_pictures

sys.path.insert(0, str(demo.ROOT))
common = importlib.import_module("common")

assert ultralytics, "imported here, so that no fork has to"
SCRIPTS = [importlib.import_module(path.stem) for path in sorted(demo.ROOT.glob("0?_*.py"))]
FOLDERS = {
    "01": "01_preferences",
    "02": "02_critiques",
    "03": "03_ift",
    "04": "04_rejection",
    "05": "05_evaluation",
}
SMALL = {
    "01": "--validation 4 --train 30 --candidates 2",
    "02": "--critiques 3",
    "03": "--steps 12 --save-every 3 --train-batch 8 --micro-batch 8 --max-new-tokens 64",
    "04": "--pool 14 --samples 6 --steps 4 --save-every 1 --train-batch 8 --max-new-tokens 64 "
    "--retention 1",
    "05": "--max-new-tokens 64",
}
N_IMAGES, N_HELDOUT = 80, 6
VOLATILE = ("seconds", "peak_gpu_gib", "tokens_per_s")
n_chunks = multiprocessing.Value("i")  # chunks of kept rows and final names, counted in a fork
n_names = multiprocessing.Value("i")


# ---- Faults: what a fork does to itself before it starts the stage ------------------------------
def die():
    os.kill(os.getpid(), signal.SIGKILL)


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
        die()

    def give(original, self, target):
        n_names.value += 1
        if n_names.value == name and not after:
            die()
        result = original(self, target)
        if n_names.value == name:
            die()
        return result

    n_chunks.value = n_names.value = 0
    common.open = open_watched  # goes before the builtin one
    Path.replace = lambda self, target: give(replace, self, target)
    Path.rename = lambda self, target: give(rename, self, target)


def fill_disk(size):
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def draw_faults(rng, n_kills, n_others, seconds, sizes):
    """[(what is said of it, what the fork does, signal or None, seconds until then)]."""
    chunks, names = n_chunks.value, n_names.value
    faults = []
    for k in range(n_kills):
        if k % 3 == 0:
            chunk, cut = rng.randint(1, chunks), rng.random()
            said = f"chunk {chunk} of {chunks} at {cut:.2f}"
            faults.append((said, partial(watch, chunk=chunk, cut=cut), None, 0))
        elif k % 3 == 1:
            name, after = rng.randint(1, names), rng.random() < 0.5
            said = f"{'after' if after else 'before'} name {name} of {names}"
            faults.append((said, partial(watch, name=name, after=after), None, 0))
        else:
            at = rng.uniform(0.1, 0.95) * seconds
            faults.append((f"killed at {at:.1f} s", watch, signal.SIGKILL, at))
    for _ in range(n_others):
        size = int(rng.uniform(0.02, 0.98) * max(sizes))
        faults.append((f"disk full at {size} bytes", partial(fill_disk, size), None, 0))
        at = rng.uniform(0.1, 0.95) * seconds
        faults.append((f"SIGTERM at {at:.1f} s", watch, signal.SIGTERM, at))
    return faults


# ---- Running a stage in a fork -------------------------------------------------------------------
def run_in_fork(command, prepare, log, number=None, at=0.0):
    """Exit status of a stage's command line, negative where a signal killed it."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            prepare()
            status = run_stage(command)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if number is not None:
        time.sleep(at)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_stage(command):
    """Exit status of a stage, as the interpreter would give it."""
    (script,) = [script for script in SCRIPTS if f"{script.__name__}.py" == command[0]]
    try:
        common.run(script.main, script.parse_args(command[1:]))
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        print(end.code)
        return 1
    return 0


def contents(folder):
    """{file: its bytes, or its JSON values without what no two runs have in common}."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_dir() or path.name == ".lock":
            continue
        data = path.read_bytes().replace(bytes(folder.parent), b"RUN")  # report.md names it
        if path.suffix in (".json", ".jsonl"):
            lines = data.splitlines() if path.suffix == ".jsonl" else [data]
            data = [without(VOLATILE, json.loads(line)) for line in lines if line]
        found[path.relative_to(folder).as_posix()] = data
    return found


def without(keys, value):
    if isinstance(value, list):
        return [without(keys, item) for item in value]
    if isinstance(value, dict):
        return {key: without(keys, item) for key, item in value.items() if key not in keys}
    return value


def differences(a, b):
    """Names of the files that are not in both, or not the same."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


# ---- A stage's trials ----------------------------------------------------------------------------
def is_expected(said, status, log):
    """Did the first start end as such a fault should end it (or before it came)?"""
    if status == 0:
        return True
    if said.startswith("disk"):
        *_, last = log.read_text().splitlines()
        return status == 1 and last.startswith("error: ") and "Traceback" not in log.read_text()
    return status == -(signal.SIGTERM if said.startswith("SIGTERM") else signal.SIGKILL)


def try_stage(stage, command_of, run, folder, rng, n_kills, n_others):
    """(lines of what went wrong, trials, trials in which the fault came before the end)."""
    before, log = folder / "before", folder / "log.txt"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(run, before)
    clock = time.time()
    if run_in_fork(command_of(run), watch, log) != 0:
        sys.exit(f"error: the undisturbed stage {stage} fails:\n{log.read_text()}")
    seconds = time.time() - clock
    wanted = contents(run / FOLDERS[stage])
    sizes = [path.stat().st_size for path in (run / FOLDERS[stage]).rglob("*") if path.is_file()]
    faults = draw_faults(rng, n_kills, n_others, seconds, sizes)
    wrong, n_struck = [], 0
    for said, prepare, number, at in faults:
        trial = folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(before, trial)
        status = run_in_fork(command_of(trial), prepare, log, number, at)
        n_struck += status != 0
        if not is_expected(said, status, log):
            wrong.append(f"{stage}, {said}: ended with {status}\n{log.read_text()[-2000:]}")
            continue
        again = run_in_fork(command_of(trial), watch, log)
        if again != 0:
            wrong.append(f"{stage}, {said}: {again} when started again\n{log.read_text()[-2000:]}")
        elif found := differences(wanted, contents(trial / FOLDERS[stage])):
            wrong.append(f"{stage}, {said}: other files: {found}")
    return wrong, len(faults), n_struck


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", default=list(FOLDERS), choices=list(FOLDERS))
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
        write_pictures(pictures, 0, N_IMAGES, N_HELDOUT)
        run.mkdir()

        def command_of(stage, run):
            return [*demo.commands(demo.WORLD, pictures, run, 0)[stage], *SMALL[stage].split()]

        for stage in FOLDERS:
            of_stage = partial(command_of, stage)
            counts = (args.kills, args.others) if stage in args.stages else (0, 0)
            wrong, n, n_struck = try_stage(stage, of_stage, run, folder, rng, *counts)
            failed |= bool(wrong)
            print(f"stage {stage}: {n - len(wrong)} of {n} identical ({n_struck} cut)", flush=True)
            for line in wrong:
                print(line)
    sys.exit(failed)


if __name__ == "__main__":
    main()
