"""Work is kept: interrupted trainings, changed arguments and inputs, two processes, moved runs."""

import copy
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_rows, stage, train
from PIL import Image
from safetensors.torch import load_file

import common
from common import start_stage

one, ift = stage("01_build_preferences"), stage("03_train_ift")


# ---- An interrupted training ---------------------------------------------------------------------
class Interrupted(Exception):
    pass


def trained_model(tiny):
    torch.manual_seed(0)
    return ift.make_trainable(copy.deepcopy(tiny[0]), 4)


@pytest.mark.parametrize("at, kept", [(2, 2), (4, 4), (5, 4), (6, 6)])
def test_training_goes_on_to_the_same_bits(tiny, pictures, tmp_path, monkeypatch, at, kept):
    """Cut after `at` of seven steps, with a checkpoint every second one."""
    settings = {"steps": 7, "lr": 1e-2, "train_batch": 2, "micro_batch": 1, "save_every": 2}
    whole = trained_model(tiny)
    wanted = train(whole, tiny[1], pictures, tmp_path / "whole", **settings)

    show, steps = ift.show, []

    def show_and_cut(bar, line, n_steps):
        show(bar, line, n_steps)
        steps.append(line["step"])
        if line["step"] == at + 1:  # the step after: it is logged, not saved
            raise Interrupted

    monkeypatch.setattr(ift, "show", show_and_cut)
    with pytest.raises(Interrupted):
        train(trained_model(tiny), tiny[1], pictures, tmp_path / "cut", **settings)
    saved = load_file(tmp_path / "cut" / "training.safetensors")
    assert int(saved["n_steps"]) == kept
    steps.clear()
    monkeypatch.setattr(ift, "show", lambda bar, line, n_steps: steps.append(line["step"]))
    again = trained_model(tiny)
    with torch.no_grad():
        for weight in again.parameters():
            if weight.requires_grad:
                weight.fill_(0.5)  # whatever it starts from, the file holds all that matters
    found = train(again, tiny[1], pictures, tmp_path / "cut", **settings)
    assert steps == list(range(kept + 1, 8))
    for row in [*wanted, *found]:
        del row["tokens_per_s"]
    assert found == wanted
    weights = dict(again.named_parameters())
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, weights[name]), name


def test_a_training_that_is_done_is_not_done_again(tiny, pictures, tmp_path, capsys):
    settings = {"steps": 2, "lr": 1e-2}
    first, again = trained_model(tiny), trained_model(tiny)
    rows = train(first, tiny[1], pictures, tmp_path, **settings)
    assert train(again, tiny[1], pictures, tmp_path, **settings) == rows
    assert "training goes on after step 2" in capsys.readouterr().out
    weights = dict(again.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in first.named_parameters())


@pytest.mark.parametrize("steps", [range(0), range(1), range(2), range(3, 9)])
def test_each_step_gets_its_own_micro_batches(steps):
    prepared = []

    class Data:
        def __getitem__(self, step):
            prepared.append(step)
            return 10 * step

    for step, micro_batches in ift.prepared_ahead(Data(), steps):
        assert micro_batches == 10 * step
        assert len(prepared) <= step - steps[0] + 3  # no more than two ahead
    assert prepared == list(steps)


def test_a_missing_picture_in_the_thread_ends_training_with_its_name(tiny, tmp_path):
    with pytest.raises(common.Stop, match="0.png|1.png|2.png|3.png"):
        train(trained_model(tiny), tiny[1], tmp_path, tmp_path)


# ---- What may change from one start to the next --------------------------------------------------
def arguments(run, **changed):
    args = {"run": str(run), "model": "m", "margin": 0.5, "pool": 9, "iterations": 2, "seed": 0}
    return Namespace(**{**args, "overwrite": False, "batch_size": 8, **changed})


CHOOSING = {"margin": ["iter1/samples.jsonl"], "iterations": ["iter*/*", "iter*/*/*"]}
FILES = ("meta.json", "iter1/samples.jsonl", "iter1/adapter/x", "iter2/samples.jsonl")


@pytest.fixture
def begun(tmp_path):
    """A complete stage of two iterations, by arguments(tmp_path), and an input of it."""
    source = tmp_path / "source.jsonl"
    source.write_text("rows")
    folder = start_stage(arguments(tmp_path), "04_rejection", [source], CHOOSING)
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder, source


def left(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "args.json"]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def test_nothing_changed(begun, capsys):
    folder, source = begun
    assert start_stage(arguments(folder.parent), folder.name, [source], CHOOSING) is None
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert left(folder) == sorted(FILES)
    (folder / "iter2" / "training.safetensors").write_text("left by a kill right after the end")
    assert start_stage(arguments(folder.parent), folder.name, [source], CHOOSING) is None
    assert left(folder) == sorted(FILES)


def test_what_only_chooses_may_change(begun, capsys):
    """The samples stay, what depends on the choice goes; later stages are named."""
    folder, source = begun
    for later in ("05_evaluation", "03_ift", "04_rejection_random"):
        (folder.parent / later).mkdir()
    args = arguments(folder.parent, margin=0.1)
    assert start_stage(args, folder.name, [source], CHOOSING) == folder
    assert left(folder) == ["iter1/samples.jsonl"]
    assert not (folder / "iter2").exists()
    said = capsys.readouterr().out
    assert "--margin was 0.5, is 0.1" in said
    assert "stale from now on, make anew with --overwrite: 05_evaluation\n" in said
    assert json.loads((folder / "args.json").read_text())["args"]["margin"] == 0.1


def test_more_iterations_keep_all(begun):
    folder, source = begun
    args = arguments(folder.parent, iterations=3)
    assert start_stage(args, folder.name, [source], CHOOSING) == folder
    assert left(folder) == sorted(FILES[1:])  # it is not complete any more
    args = arguments(folder.parent, iterations=3, margin=0.1)
    assert start_stage(args, folder.name, [source], CHOOSING) == folder
    assert left(folder) == ["iter1/samples.jsonl"]  # the stricter of the two


def test_what_the_samples_depend_on_may_not_change(begun, capsys):
    folder, source = begun
    with pytest.raises(common.Stop, match="begun with other arguments"):
        args = arguments(folder.parent, pool=8, margin=0.1)
        start_stage(args, folder.name, [source], CHOOSING)
    assert "--pool was 9, is 8" in capsys.readouterr().out
    assert left(folder) == sorted(FILES)
    args = arguments(folder.parent, pool=8, overwrite=True)
    assert start_stage(args, folder.name, [source], CHOOSING) == folder
    assert left(folder) == []


def test_a_typo_does_not_stick(tmp_path):
    """As long as nothing is made, nothing binds."""
    start_stage(arguments(tmp_path, pool=99), "04_rejection")
    (tmp_path / "04_rejection" / "samples.jsonl").write_text("")  # opened, not written
    assert start_stage(arguments(tmp_path), "04_rejection") is not None
    (tmp_path / "04_rejection" / "samples.jsonl").write_text("{}\n")
    with pytest.raises(common.Stop):
        start_stage(arguments(tmp_path, pool=99), "04_rejection")


def test_arguments_of_the_samples_may_not_change_in_04():
    four = stage("04_rejection_sampling")
    args = set(vars(four.parse_args([])))
    assert set(four.MAY_CHANGE) <= args
    rest = args - set(four.MAY_CHANGE) - common.FREE_ARGUMENTS
    assert rest == {"pool", "samples", "temperature", "max_new_tokens", "seed", "select"}


# ---- Results that do not belong together ---------------------------------------------------------
def test_changed_inputs_are_noticed(begun, capsys):
    folder, source = begun
    source.write_text("other rows")
    for overwrite in (False, True):
        args = arguments(folder.parent, overwrite=overwrite)
        if overwrite:
            assert start_stage(args, folder.name, [source], CHOOSING) == folder
        else:
            with pytest.raises(common.Stop, match="other arguments or inputs"):
                start_stage(args, folder.name, [source], CHOOSING)
            assert re.search(r"source.jsonl was \w{16}, is \w{16}", capsys.readouterr().out)
            assert left(folder) == sorted(FILES)


def test_further_inputs_are_another_evaluation_not_a_contradiction(begun):
    folder, source = begun
    more = folder.parent / "more.json"
    more.write_text("{}")
    with pytest.raises(common.Stop, match="other arguments"):
        start_stage(arguments(folder.parent), folder.name, [source, more], CHOOSING)
    choosing = {**CHOOSING, "inputs": ["iter2/*"]}
    assert start_stage(arguments(folder.parent), folder.name, [source, more], choosing) == folder
    assert left(folder) == ["iter2/samples.jsonl"]


def test_an_input_that_is_gone_is_a_change(begun):
    """Else judgements of a judge that is being made anew would count for the new one."""
    folder, source = begun
    with pytest.raises(common.Stop, match="other arguments or inputs"):
        start_stage(arguments(folder.parent), folder.name, [], {**CHOOSING, "inputs": ["*"]})


def test_a_stage_that_was_made_from_what_has_changed_is_no_input(tmp_path):
    """02 is made anew, 03 is not: 04 does not go on from that 03."""
    source = start_stage(arguments(tmp_path), "02_critiques") / "critiques.jsonl"
    source.write_text("rows")
    folder = start_stage(arguments(tmp_path), "03_ift", [source])
    common.finish_stage(folder, arguments(tmp_path), {}, (), "next")
    meta = folder / "meta.json"
    assert start_stage(arguments(tmp_path), "04_rejection", [meta]) is not None
    source.write_text("other rows")
    with pytest.raises(common.Stop, match="critiques.jsonl has changed since .*03_ift was made"):
        start_stage(arguments(tmp_path, overwrite=True), "04_rejection", [meta])


def test_an_input_in_the_stages_own_folder_is_refused(begun):
    folder, _ = begun
    inside = folder / "iter1" / "samples.jsonl"
    with pytest.raises(common.Stop, match="an input of this stage lies in"):
        start_stage(arguments(folder.parent, overwrite=True), folder.name, [inside])
    assert inside.exists()


def test_results_that_were_changed_after_their_stage_are_noticed(begun, tmp_path):
    folder, source = begun
    made = folder / "critiques.jsonl"
    made.write_text("six rows\n" * 6)
    common.finish_stage(folder, arguments(tmp_path), {}, [made], "next")
    meta = folder / "meta.json"
    assert start_stage(arguments(tmp_path), "05_evaluation", [meta]) is not None
    made.write_text("six rows\n" * 5)
    with pytest.raises(common.Stop) as error:
        start_stage(arguments(tmp_path, overwrite=True), "05_evaluation", [meta])
    assert f"{made} has changed since {folder} was made" in str(error.value)
    assert f"take {folder.name}/critiques.jsonl out of {meta}" in str(error.value)
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"outputs": {}}))  # as it advises
    assert start_stage(arguments(tmp_path, overwrite=True), "05_evaluation", [meta]) is not None


@pytest.mark.parametrize("at", range(12))
def test_an_overwriting_that_is_cut_leaves_no_old_rows_to_new_arguments(begun, monkeypatch, at):
    folder, source = begun
    (folder / "a.jsonl").write_text("a name before args.json")
    (folder / "iter1" / "done.json").write_text("{}")
    unlink, n = Path.unlink, []

    def cut(path, missing_ok=False):
        if len(n) == at:
            raise Interrupted
        n.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", cut)
    args = arguments(folder.parent, pool=8, overwrite=True)
    try:
        start_stage(args, folder.name, [source], CHOOSING)
    except Interrupted:
        monkeypatch.setattr(Path, "unlink", unlink)
        signs = [name for name in left(folder) if name.endswith(("meta.json", "done.json"))]
        assert len(signs) == max(0, 2 - at)  # what says that all is there goes first
        args = arguments(folder.parent, pool=8)
        if left(folder):
            with pytest.raises(common.Stop, match="begun with other arguments"):
                start_stage(args, folder.name, [source], CHOOSING)
    else:
        assert left(folder) == []


def test_a_folder_is_an_input_by_its_names_and_sizes(tmp_path):
    run, photos = tmp_path / "run", tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_text("one")
    (start_stage(arguments(run), "01_preferences", [photos]) / "rows.jsonl").write_text("{}")
    assert start_stage(arguments(run), "01_preferences", [photos]) is not None
    (photos / "a.png").write_text("another")
    with pytest.raises(common.Stop, match="other arguments or inputs"):
        start_stage(arguments(run), "01_preferences", [photos])


def test_another_file_by_another_argument_is_a_change_of_the_argument(tmp_path):
    """--vocabulary may be another one; the file it named before need not be read again."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path in (old, new):
        path.write_text(f'{{"{path.stem}": "x"}}')
    run, may_change = tmp_path / "run", {"vocabulary": ["candidates.jsonl"]}
    args = arguments(run, vocabulary=str(old))
    folder = start_stage(args, "01_preferences", [old], may_change)
    for name in ("candidates.jsonl", "detections.jsonl"):
        (folder / name).write_text("{}")
    args = arguments(run, vocabulary=str(new))
    assert start_stage(args, "01_preferences", [new], may_change) == folder
    assert left(folder) == ["candidates.jsonl"]
    (folder / "detections.jsonl").write_text("{}")
    new.write_text('{"the same name": "x"}')
    assert start_stage(args, "01_preferences", [new], may_change) == folder
    assert left(folder) == ["candidates.jsonl"]
    with pytest.raises(common.Stop, match="other arguments or inputs"):
        new.write_text("{}")
        start_stage(args, "01_preferences", [new])


def test_a_file_stays_if_each_change_lets_it_stay(tmp_path):
    """Also where the run directory's own name fits a pattern."""
    may_change = {"margin": ["a/*", "b/*", "b/*/*"], "seed": ["b/*", "c/*", "b/*/*"]}
    run = tmp_path / "b"
    folder = start_stage(arguments(run), "04_rejection", [], may_change)
    for name in "abc":
        (folder / name).mkdir()
        (folder / name / "x").write_text("{}")
    (folder / "meta.json").write_text("{}")
    assert start_stage(arguments(run, margin=0.1, seed=1), "04_rejection", [], may_change) == folder
    assert left(folder) == ["b/x"]


@pytest.mark.parametrize("spelling", ["absolute", "relative", "by a link"])
def test_an_input_in_the_stages_folder_is_refused_however_it_is_spelled(
    tmp_path, monkeypatch, spelling
):
    monkeypatch.chdir(tmp_path)
    folder = start_stage(arguments("run"), "01_preferences")
    (folder / "detections.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    path = {
        "absolute": folder.resolve(),
        "relative": folder,
        "by a link": Path("link") / folder.name,
    }
    args = arguments("run", overwrite=True)
    with pytest.raises(common.Stop, match="an input of this stage lies in"):
        start_stage(args, "01_preferences", [path[spelling] / "detections.jsonl"])
    assert (folder / "detections.jsonl").exists()


def test_an_expert_that_is_downloaded_on_the_way_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--images", ".", "--expert", "yolo11x.pt", "--run", str(tmp_path / "run")]
    before = one.inputs_of(one.parse_args(command)), common.remembered(one.parse_args(command))
    (tmp_path / "yolo11x.pt").write_text("weights")
    args = one.parse_args(command)
    assert (one.inputs_of(args), common.remembered(args)) == before
    command[3] = "./yolo11x.pt"
    assert "./yolo11x.pt" in one.inputs_of(one.parse_args(command))


# ---- Two processes, moved folders, odd names -----------------------------------------------------
HOLD = """
import argparse, sys
sys.path.insert(0, {root!r})
import common
common.start_stage(argparse.Namespace(run={run!r}, overwrite=False), {name!r}, {inputs!r})
print("held", flush=True)
sys.stdin.read()
"""


def second(run, name, inputs=()):
    """A process that starts a stage and holds it until its standard input ends."""
    code = HOLD.format(root=str(ROOT), run=str(run), name=name, inputs=[str(x) for x in inputs])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)


def test_a_second_process_is_refused_until_the_first_dies(tmp_path):
    source = start_stage(arguments(tmp_path), "02_critiques") / "critiques.jsonl"
    source.write_text("rows")
    common.LOCKS.pop().close()
    first = second(tmp_path, "03_ift", [source])
    assert first.stdout.readline() == "held\n"
    for name in ("03_ift", "02_critiques"):  # what it writes, and what it reads
        with pytest.raises(common.Stop, match=f"another process is at work in .*{name}"):
            start_stage(arguments(tmp_path), name)
    beside = start_stage(arguments(tmp_path), "04_rejection", [source])  # reads the same
    assert beside is not None
    first.kill()
    first.wait()
    assert start_stage(arguments(tmp_path), "03_ift") is not None


def test_paths_are_kept_so_that_the_run_can_be_moved(tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "world").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    args = arguments("run", model="Qwen/Qwen2-VL-7B-Instruct", image_root="run/world")
    args.pairs = "elsewhere"
    args.exclude = ["run/world", "hub/set"]
    folder = start_stage(args, "01_preferences")
    common.finish_stage(folder, args, {}, (), "next")
    kept = json.loads((folder / "meta.json").read_text())["args"]
    assert kept["image_root"] == "world" and kept["pairs"] == str(elsewhere)
    assert kept["exclude"] == ["world", "hub/set"]
    run.rename(tmp_path / "moved run")
    monkeypatch.chdir(elsewhere)
    found = common.args_of(tmp_path / "moved run", "01_preferences")
    assert found["image_root"] == str(tmp_path / "moved run" / "world")
    assert found["model"] == "Qwen/Qwen2-VL-7B-Instruct" and found["pairs"] == str(elsewhere)
    args = arguments(tmp_path / "moved run", model=args.model, pairs=str(elsewhere))
    args.image_root = str(tmp_path / "moved run" / "world")
    args.exclude = [args.image_root, "hub/set"]
    assert start_stage(args, "01_preferences") is None  # the same arguments, elsewhere


def test_unpacked_pictures_move_with_the_run(tmp_path, monkeypatch):
    """Stage 01 on embedded pictures, then the run directory gets another name."""
    picture = tmp_path / "0.png"
    Image.new("RGB", (40, 40)).save(picture)
    image = {"bytes": picture.read_bytes()}
    row = {"image": image, "prompt": "What is there?", "chosen": "A dog."}
    import datasets

    rows = [{**row, "rejected": f"A dog and a cat {k}."} for k in range(2)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    args = one.parse_args(
        ["--pairs", str(tmp_path / "pairs.parquet"), "--run", str(tmp_path / "r")]
    )
    items, _ = one.load_items(args, tmp_path / "r" / "01_preferences")
    assert [item["image"] for item in items] == [items[0]["image"]] * 2
    assert (Path(args.image_root) / items[0]["image"]).read_bytes() == picture.read_bytes()
    assert common.remembered(args)["image_root"] == "01_preferences"


def test_next_commands_are_quoted(tmp_path):
    """In every script: a folder with a space and an umlaut is one word of the printed command."""
    for path in sorted(ROOT.glob("0?_*.py")):
        source = path.read_text()
        for command in re.findall(r'f"[^"]*python 0\d_\w+\.py --run [^"]*"', source):
            assert "{shlex.quote(args.run)}" in command, f"{path.name}: {command}"


def test_a_started_folder_keeps_its_rows(tmp_path):
    """Rows that lie there before the first start, as a study shares them, are gone on with."""
    folder = tmp_path / "04_rejection" / "iter1"
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("{}\n")
    assert start_stage(arguments(tmp_path), "04_rejection") == folder.parent
    assert read_rows(folder / "samples.jsonl") == [{}]
    shutil.rmtree(folder)
