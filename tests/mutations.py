"""Do the tests notice? Each line of mutations.jsonl makes the code wrong; its test must fail.

    python tests/mutations.py                # all of them
    python tests/mutations.py margin 03_     # those whose file, text or test holds one of the words

Works on a copy of the repository. Not run by the gate.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 120  # a mutation may make a loop endless

# one {"file", "old": exactly once in the file, "new", "test"} a line
MUTATIONS = [
    json.loads(line)
    for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
]


def mutated(mutation):
    """The file's text with the mutation; says where it no longer fits the code."""
    source = (ROOT / mutation["file"]).read_text(encoding="utf-8")
    times = source.count(mutation["old"])
    if times != 1:
        sys.exit(f"error: {mutation['file']} holds {times} times, not once: {mutation['old']!r}")
    return source.replace(mutation["old"], mutation["new"])


def run_tests(folder, tests, log):
    """In a process of its own, which has the slow imports already: pytest's exit code."""
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
    sys.dont_write_bytecode = True  # a mutation may leave a file's size and second as they were
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    os._exit(code)


def outcome(folder, tests, limit_s=LIMIT_S):
    """("passed" | "failed" | "no result", pytest's output)."""
    log = folder / "pytest.log"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_tests, args=(folder, tests, log))
    process.start()
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        process.join()
        return "failed", "it did not end"
    name = {0: "passed", 1: "failed"}.get(process.exitcode, "no result")
    return name, log.read_text(encoding="utf-8", errors="replace")


def choose(words):
    """The mutations that hold one of the words; all without any."""
    chosen = []
    for mutation in MUTATIONS:
        text = " ".join(mutation.values())
        if not words or any(word in text for word in words):
            chosen.append(mutation)
    return chosen


def main(args):
    chosen = choose(args.words)
    texts = [mutated(mutation) for mutation in chosen]  # all must fit before the first is tried
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
    import matplotlib.figure  # noqa: F401  slow to import, so once for all
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skip = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache", ".venv")
        shutil.copytree(ROOT, copy, ignore=skip)
        tests = sorted({mutation["test"] for mutation in chosen})
        found, output = outcome(copy, tests, 10 * LIMIT_S)  # all together
        if found != "passed":
            sys.exit(f"{output}\nerror: the tests do not pass on the code as it is")
        for mutation, text in zip(chosen, texts):
            (copy / mutation["file"]).write_text(text, encoding="utf-8")
            found, output = outcome(copy, [mutation["test"]])
            shutil.copy(ROOT / mutation["file"], copy / mutation["file"])
            line = f"{mutation['file']}: {' '.join(mutation['new'].split())}"
            if found == "failed":
                print("killed  ", line, flush=True)
                continue
            survivors.append(mutation)
            print("SURVIVED", line, flush=True)
            if found == "no result":
                print(output[-2000:])
    print(f"killed {len(chosen) - len(survivors)} of {len(chosen)}")
    for mutation in survivors:
        print(f"survived {mutation['test']}: {mutation['old']!r} -> {mutation['new']!r}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutations that hold one of these")
    main(parser.parse_args())
