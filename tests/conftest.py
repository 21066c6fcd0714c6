"""What all tests share: imports of the numbered scripts, and a tiny model with random weights (tests/build_world.py)."""
import copy
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
STAGES = ("01_build_preferences", "02_generate_critiques", "03_train_ift", "04_rejection_sampling", "05_evaluate")
stage = importlib.import_module  # stage("03_train_ift"): a name that starts with a digit has no import statement


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: runs stages on a toy world; leave out with -m "not slow"')
    torch.set_num_threads(1)  # the model is tiny; a second thread waits for its turn where the other core is busy


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder with 0.png .. 3.png of three different sizes, so that image tokens and positions differ between rows."""
    from PIL import Image
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((84, 84), (140, 56), (56, 112), (84, 84))):
        Image.new("RGB", size, (60 * i, 200 - 50 * i, 90)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(model, processor) as a user loads them. Never change the model: train `copy.deepcopy(model)`."""
    import common
    from build_world import build_model, build_processor
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and weight.dim() == 2:
                weight.mul_(8)  # else the last token decides alone and every prompt gets the same answer
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return common.load_judge(str(folder), device="cpu")


@pytest.fixture(scope="session")
def trained(tiny, pictures, tmp_path_factory):
    """(model, processor, rows of metrics.jsonl): `tiny` after some steps of stage 03's train on critiques of different
    lengths, enough to write verdicts often but not always the same."""
    ift, folder = stage("03_train_ift"), tmp_path_factory.mktemp("trained")
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    torch.manual_seed(0)
    metrics = train(ift.add_lora(model, 0), processor, pictures, folder, steps=30, lr=2e-3, lam=1 / 3)
    return model, processor, metrics


def judged_rows():
    """Four training rows of D_critique; prompts and critiques of different lengths."""
    from common import build_judge_prompt
    critiques = ("A: red circle: yes\nVerdict: A", "B: blue star: no\nA: red ring: yes\nA: blue star: no\nVerdict: B",
                 "Verdict: A", "B: red ring: yes\nVerdict: B")
    responses = ("red circle.", "blue star, red ring.", "green heart, red cross, blue ring.", "red ring.")
    return [{"id": f"critique-{i}", "image": f"{i}.png", "label": critique[-1], "response": critique,
             "text": build_judge_prompt("List the objects in the image.", responses[i], responses[i - 1])}
            for i, critique in enumerate(critiques)]


def correct_rows():
    """Four training rows of D_correct."""
    responses = ("red circle.", "blue star, red ring, green heart.", "nothing.", "red cross.")
    return [{"id": f"correct-{i}", "image": f"{i}.png", "text": "List the objects in the image.", "response": response}
            for i, response in enumerate(responses)]


def train(model, processor, pictures, folder, **changed):
    """Stage 03's train on all rows above, in place; one batch holds them all -> rows of metrics.jsonl."""
    settings = dict(steps=1, lr=1e-3, lam=0.5, bt_weight=0.0, batch_size=4, micro_batch=4, seed=0, image_root=pictures,
                    max_response_tokens=64)
    folder.mkdir(exist_ok=True)
    stage("03_train_ift").train(model, processor, judged_rows(), correct_rows(), folder, **{**settings, **changed})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(command, **extra):
    """What a command line of the README printed; it must succeed."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **extra))  # two processes, too
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def run_here(command):
    """The same in this process, which saves the seconds of importing torch."""
    script = stage(command[0].removesuffix(".py"))
    script.main(script.parse_args(command[1:]))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with pictures and held-out pairs, and copies of the shipped model/ and expert.pt."""
    from demo import WORLD
    from scenes import write_pictures
    folder = tmp_path_factory.mktemp("world") / "w"
    shutil.copytree(WORLD, folder)
    write_pictures(folder, 0, n_images=1700, n_heldout=300)
    return folder
