"""What a user keeps is never deleted: a walk through every flag that changes what a stage makes."""

from conftest import STAGES, stage
from PIL import Image
from test_stages import Judge, answer, fakes, right_if

import common

one = stage("01_build_preferences")
five = stage("05_evaluate")

BASE = {  # the flags of a finished run
    1: "--model a/model --validation 3 --heldout 3 --train 8 --candidates 2 --images pictures",
    2: "--critiques 2",
    3: "--no-checkpoint-activations --steps 4",
    4: "--no-checkpoint-activations --steps 3 --iterations 2 --pool 7 --samples 3",
    5: "",
}
TRAINING = "steps 2|lr 0.5|lam 0.5|bt-weight 1|train-batch 8|seed 1|max-response-tokens 99|"
CHOICE = "pool 5|samples 4|temperature 0.5|max-new-tokens 9|retention 0.3|margin 0.1|replay 0.5"
REFUSED = {"3": f"{TRAINING}lora-rank 8", "4": TRAINING + CHOICE}  # other weights than lie there
CHANGED = {  # what changes the rest; a key names the stages that get the flags
    "1": "validation 5|heldout 5|train 5|seed 1|present 0.7|absent 0.02|candidates 3|limit 20|"
    "max-new-tokens 9|temperature 0.5|max-image-tokens 9|expert none|model b/model",
    "2": "critiques 3|style none|style descriptive|limit 3|seed 1|max-new-tokens 9|temperature 0.5",
    "3": "max-new-tokens 9",  # of the validation alone
    "4": "iterations 1|iterations 3|select low|select random|select best|select continue",
    "34": "tag x --seed 1",
    "345": "tag y",
    "5": "seed 1|withhold|attack|max-new-tokens 9",
}


def write(request, k):  # of the candidates the first is true, of the critiques the second wrong
    if "Response A: " not in request["text"]:
        return answer("A dog and a cat." if k % 2 else "A dog.")
    return right_if(k != 1, request)


class Expert:
    """It is surer of a dog, and of a cat that is not there, the more red there is."""

    def __init__(self, name, *_):
        self.loaded.append(name)
        self.classes = None if isinstance(name, common.Judge) else ["dog", "cat", "bus"]

    def find(self, images, questions):
        red = [image.getpixel((0, 0))[0] / 255 for image in images]
        sure = [{"dog": 0.5 + part / 2, "cat": part / 20} for part in red]
        return [[{"object": name, "confidence": p[name], "box": None} for name in p] for p in sure]


class Run:  # a directory, and what has been loaded, asked and trained for it
    def __init__(self, folder, monkeypatch):
        self.folder, self.judge = folder / "run", Judge(write)
        self.loaded, self.trained = fakes(monkeypatch)
        Expert.loaded = self.loaded
        monkeypatch.setattr(common, "sample", self.judge.sample)
        monkeypatch.setattr(one, "Detector", Expert)
        monkeypatch.setattr(one, "OwnAnswers", Expert)
        monkeypatch.setattr(one, "draw_contact_sheet", lambda *_: None)  # these take seconds
        for name in ("draw_accuracy", "draw_reliability"):
            monkeypatch.setattr(five, name, lambda *_: None)
        monkeypatch.setattr(five, "macro_bootstrap", lambda *_: (0.0, 1.0))
        monkeypatch.chdir(folder)
        (folder / "pictures").mkdir()
        for i in range(30):
            Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(folder / "pictures" / f"{i}.png")

    def start(self, number, changed=""):  # -> what it has stopped with, None if it has not
        script = stage(STAGES[number - 1])
        flags = f"{BASE[number]} {changed} --run {self.folder}"
        try:
            script.main(script.parse_args(flags.split()))
        except SystemExit as error:
            return str(error)

    def state(self):
        """What has cost hours so far, and {path: bytes} of all files."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock"]
        done = len(self.loaded), len(self.judge.calls), len(self.trained)
        return done, {path: path.read_bytes() for path in paths}

    def check(self, files, is_made_again=False):
        """Of these files weights are the same and answers have grown; the rest is made again."""
        later = self.state()[1]
        for path, data in files.items():
            if path.name in ("answers.jsonl", "detections.jsonl"):
                assert later[path].startswith(data), path
            elif path.parent.name == "adapter" or is_made_again and path.suffix == ".jsonl":
                assert later[path] == data or path.name == "judgements.jsonl", path


def test_no_flag_costs_weights_or_answers(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    assert [run.start(number) for number in BASE] == [None] * 5
    whole = run.state()[1]
    assert [path.suffix for path in whole].count(".safetensors") == len(run.trained) == 3
    for number, flags in REFUSED.items():
        for flag in flags.split("|"):
            state, name = run.state(), flag.split()[0].replace("-", "_")
            error = run.start(int(number), f"--{flag}")
            assert f"{name} was " in error and "was trained otherwise" in error, (flag, error)
            assert run.state() == state, flag  # it stopped before any work
    for numbers, flags in CHANGED.items():
        all_of = (1, 2, 3, 4, 5)[: 4 if numbers in {*"1234"} else 5]  # 05 takes longer
        for flag in flags.split("|"):
            for number in all_of[int(numbers[0]) - 1 :]:
                files = run.state()[1]
                error = run.start(number, f"--{flag}" * (str(number) in numbers))
                assert error is None or error[:7] == "error: " and str(number) not in numbers, error
                run.check(files)
        done = run.state()[0]  # back to the old flags: all is made again, and without a model
        assert not any(run.start(number) for number in all_of)
        assert run.state()[0] == done
        run.check(whole, is_made_again=True)
    folders = [training.folder for training in run.trained]
    assert len(folders) == len(set(folders)) == 3 + 1 + 4 * 2 + 2 * 3  # + iter3, selects, tags
    state = run.state()  # issue 20: this once deleted both adapters and then stopped
    error = run.start(4, "--steps 3 --train-batch 8 --iterations 3 --pool 19 --retention 0.3")
    assert "is used up" in error and run.state() == state
