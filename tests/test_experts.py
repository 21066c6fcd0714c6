"""Stage 01's experts, on fakes and tiny random weights: what they know, where their boxes lie."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import ROOT, stage
from PIL import Image

one = stage("01_build_preferences")
COCO = [*one.SYNONYMS]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "dog", "cat", "hot", "teddy", "bear"]
SHOTS = [Image.new("RGB", (80, 40), (0, 50, 90)), Image.new("RGB", (40, 100), (100, 50, 90))]
# The two boxes of every answer below, in pixels of the two pictures, by hand.
LEFT = [10, 5, 30, 15], [5, 12.5, 15, 37.5]
RIGHT = [40, 0, 80, 40], [20, 0, 40, 100]


def found(name, confidence, box=None):
    return {"object": name, "confidence": confidence, "box": box}


# ---- the findings of all images ------------------------------------------------------------------
class Echo:
    """An expert whose detections tell the picture's red value and its questions."""

    def __init__(self, classes=None):
        self.classes = classes
        self.calls = []

    def find(self, images, questions):
        self.calls.append(len(images))
        answers = []
        for image, asked in zip(images, questions):
            red = image.getpixel((0, 0))[0]
            answers.append([found(name, red / 100) for name in asked])
        return answers


def test_each_image_gets_its_own_detections(tmp_path):
    """Over several batches; and what was looked at is not looked at again."""
    questions = {}
    for i in range(70):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / f"{i}.png")
        questions[f"{i}.png"] = [f"c{i}", f"d{i}"][: i % 3]
    expert = Echo()
    rows = one.find_objects(questions, expert, tmp_path, tmp_path / "detections.jsonl")
    assert expert.calls == [32, 32, 6]
    for i in range(70):
        asked = questions[f"{i}.png"]
        expected = [found(name, i / 100) for name in asked]
        assert rows[f"{i}.png"] == {"id": f"{i}.png", "asked": asked, "detections": expected}
    assert one.find_objects(questions, expert, tmp_path, tmp_path / "detections.jsonl") == rows
    assert len(expert.calls) == 3


# ---- ultralytics ---------------------------------------------------------------------------------
class Yolo:
    """Stands in for ultralytics.YOLO: finds class 1 in each picture, and what has no name."""

    names = {0: "crow", 1: "dog"}
    task = "detect"

    def __init__(self, weights):
        self.seen = []

    def predict(self, arrays, **settings):
        self.seen += arrays
        boxes = SimpleNamespace(
            cls=torch.tensor([1.0, 7.0]),
            conf=torch.tensor([0.81236, 0.9]),
            xyxy=torch.tensor([[1.04, 2.0, 3.0, 4.0]] * 2),
        )
        return [SimpleNamespace(boxes=boxes)] * len(arrays)


def test_ultralytics_gets_the_judges_picture(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", SimpleNamespace(YOLO=Yolo))
    expert = one.load_expert("x.pt", 0.05, "cpu", ["dog"], None, None)
    assert expert.classes == ["crow", "dog"]
    assert expert.find(SHOTS, [[], []]) == [[found("dog", 0.8124, [1.0, 2.0, 3.0, 4.0])]] * 2
    for shot, array in zip(SHOTS, expert.model.seen):
        assert array.flags.c_contiguous
        assert (array[:, :, ::-1] == np.asarray(shot)).all()  # blue, green, red


def test_ultralytics_leaves_this_process_as_it_is(tmp_path, monkeypatch):
    """Real weights in a process of their own, at its first import on a machine."""
    monkeypatch.setattr(Image, "open", Image.open)  # undoes what the import below does to it
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
from PIL import Image
before = Image.open
one = importlib.import_module("01_build_preferences")
assert "ultralytics" not in sys.modules
expert = one.load_expert({str(tmp_path / "nano.pt")!r}, 0.0, "cpu", [], None, None)
assert Image.open is before
found = expert.find([Image.new("RGB", (80, 40)), Image.new("RGB", (40, 100))], [[], []])
assert len(found) == 2
assert len(expert.classes) == 80
for (width, height), detections in zip(((80, 40), (40, 100)), found):
    assert detections
    for x1, y1, x2, y2 in (detection["box"] for detection in detections):
        assert 0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height
"""
    from ultralytics import YOLO

    YOLO("yolo11n.yaml").save(tmp_path / "nano.pt")
    first = {"YOLO_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **first})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_open_ultralytics_weights_are_given_the_vocabulary(monkeypatch):
    class World(Yolo):
        def set_classes(self, classes):
            self.names = dict(enumerate(classes))

    monkeypatch.setitem(sys.modules, "ultralytics", SimpleNamespace(YOLO=World))
    assert one.load_expert("w.pt", 0.05, "cpu", ["ox", "ape"], None, None).classes == ["ox", "ape"]


@pytest.mark.parametrize("name", ["none.pt", "weights.onnx", "folder/nothing", "text.pt"])
def test_no_expert(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no wait for an answer
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(SystemExit, match=f"--expert {name}: no .*pt of ultralytics"):
        one.load_expert(name, 0.05, "cpu", ["dog"], None, None)


# ---- transformers --------------------------------------------------------------------------------
STAGES = {"depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"]}
SMALL = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
}


def rt_detr():
    resnet = hf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], layer_type="basic", **STAGES
    )
    spoken = {"couch": "sofa", "motorcycle": "motorbike", "tv": "tvmonitor"}
    spoken["dining table"] = "diningtable"
    config = hf.RTDetrConfig(
        backbone_config=resnet,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 8, 16],
        d_model=16,
        decoder_in_channels=[16] * 3,
        decoder_layers=1,
        num_denoising=0,
        id2label={i: spoken.get(name, name) for i, name in enumerate(COCO)},
        **SMALL,
    )
    processor = hf.RTDetrImageProcessor(size={"height": 64, "width": 64})
    return hf.RTDetrForObjectDetection(config), processor


def grounding_dino():
    bert = hf.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    swin = hf.SwinConfig(
        image_size=64, embed_dim=8, num_heads=[1, 1, 2, 2], window_size=4, **STAGES
    )
    config = hf.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, decoder_layers=2, **SMALL
    )
    pictures = hf.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    tokenizer = hf.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    return (
        hf.GroundingDinoForObjectDetection(config),
        hf.GroundingDinoProcessor(pictures, tokenizer),
    )


def owlv2():
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    letters += [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    clip = {"hidden_size": 16, "intermediate_size": 16}
    clip |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(letters), "max_position_embeddings": 40}
    text |= {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = hf.Owlv2Config(
        text_config={**clip, **text},
        vision_config={**clip, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    tokenizer = hf.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(letters)}, merges=[], model_max_length=40
    )
    pictures = hf.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    return hf.Owlv2ForObjectDetection(config), hf.Owlv2Processor(pictures, tokenizer)


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """{kind: folder} of a tiny RT-DETR, GroundingDINO and OWLv2, each with its own processor."""
    folders = {}
    torch.manual_seed(0)
    for build in (rt_detr, grounding_dino, owlv2):
        folders[build.__name__] = folder = str(tmp_path_factory.mktemp(build.__name__))
        for part in build():
            part.save_pretrained(folder)
    return folders


class Answers:
    """Stands in for a detector's model: set logits, one picture after the other, of the two boxes
    LEFT and RIGHT; keeps what it was called with.
    """

    device = "cpu"

    def __init__(self, *logits):
        self.logits = list(logits)
        self.seen = []

    def __call__(self, **inputs):
        self.seen.append(inputs)
        boxes = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.75, 0.5, 0.5, 1.0]]])
        return SimpleNamespace(logits=torch.tensor([self.logits.pop(0)]), pred_boxes=boxes)


def test_transformers_detector_with_its_own_classes(detectors):
    assert all(one.HubDetector(detectors["rt_detr"], -1.0, "cpu").find(SHOTS, [[], []]))  # as it is
    expert = one.HubDetector(detectors["rt_detr"], 0.5, "cpu")
    assert sorted(expert.classes) == sorted(COCO)  # though it says sofa, motorbike, tvmonitor
    logits = torch.full((2, 2, 80), -9.0)
    logits[:, 0, COCO.index("couch")] = 2.0
    logits[1, 1, COCO.index("dog")] = 1.0
    expert.model = Answers(*logits.tolist())
    first, second = expert.find(SHOTS, [["dog"], []])
    assert first == [found("couch", 0.8808, LEFT[0])]  # sigmoid(2)
    assert second == [found("couch", 0.8808, LEFT[1]), found("dog", 0.7311, RIGHT[1])]


def test_coco_names():
    names = dict(enumerate(["N/A", *COCO, "street sign"]))
    assert one.coco_names(names) == {i: name for i, name in names.items() if 0 < i <= 80}
    assert one.coco_names({0: "sofa", 1: "N/A"}) == {0: "sofa", 1: "N/A"}  # not COCO's: as they are


def test_owlv2(detectors):
    """Boxes are fractions of the square that the picture is padded to."""
    expert = one.HubDetector(detectors["owlv2"], 0.0, "cpu")
    assert all(expert.find(SHOTS, [["dog", "cat"], ["hot_dog"]]))
    expert = one.HubDetector(detectors["owlv2"], 0.5, "cpu")
    assert expert.classes is None
    expert.model = Answers([[1.0, 2.0], [-9.0, -9.0]], [[1.0], [-9.0]])
    first, second = expert.find(SHOTS, [["dog", "cat"], ["hot_dog"]])
    assert first == [found("cat", 0.8808, [10, 10, 30, 30])]
    assert second == [found("hot_dog", 0.7311, [12.5, 12.5, 37.5, 37.5])]
    asked = []
    for inputs in expert.model.seen:
        texts = expert.processor.tokenizer.batch_decode(
            inputs["input_ids"], skip_special_tokens=True
        )
        asked.append([text.replace(" ", "") for text in texts])
    assert asked == [["aphotoofadog", "aphotoofacat"], ["aphotoofahotdog"]]


def test_grounding_dino(detectors):
    """A name's probability is the mean of its tokens': a dog alone is half a hot dog."""
    expert = one.HubDetector(detectors["grounding_dino"], 0.0, "cpu")
    real = expert.find(SHOTS, [["hot dog", "cat"], ["dog"]])
    assert {detection["object"] for detection in real[0]} <= {"hot dog", "cat"}
    assert {detection["object"] for detection in real[1]} == {"dog"}
    expert = one.HubDetector(detectors["grounding_dino"], 0.3, "cpu")
    expert.model = Answers(  # of [CLS] hot dog . cat . [SEP] and [CLS] dog . [SEP]
        [[9.0, -9.0, 2.0, 9.0, -9.0, 9.0, 9.0], [-9.0, -9.0, 2.0, -9.0, 1.0, -9.0, -9.0]],
        [[9.0, 2.0, 9.0, 9.0], [-9.0, -9.0, -9.0, -9.0]],
    )
    first, second = expert.find(SHOTS, [["hot dog", "Cat"], ["dog"]])
    questions = [[WORDS[i] for i in inputs["input_ids"][0]] for inputs in expert.model.seen]
    assert questions[0] == ["[CLS]", "hot", "dog", ".", "cat", ".", "[SEP]"]
    assert questions[1] == ["[CLS]", "dog", ".", "[SEP]"]
    assert first == [
        found("hot dog", 0.4405, LEFT[0]),  # (sigmoid(-9) + sigmoid(2)) / 2
        found("Cat", 0.7311, RIGHT[0]),
    ]
    assert second == [found("dog", 0.8808, LEFT[1])]


def test_many_names_are_asked_in_parts(detectors):
    """None is lost, and none gets another part's answer; nothing is asked about nothing."""
    expert = one.HubDetector(detectors["owlv2"], 0.5, "cpu")
    sizes = []

    def look(image, names):
        sizes.append(len(names))
        return [found(name, 0.9) for name in names.values()]

    expert.look = look
    names = [f"c{i}" for i in range(120)]
    answers = expert.find(SHOTS, [names, []])
    assert [[detection["object"] for detection in of_image] for of_image in answers] == [names, []]
    assert sizes == [50, 50, 20]


# ---- the policy itself ---------------------------------------------------------------------------
class Policy:
    """Stands in for the policy: its next token is (yes, Yes, no, No) with the set odds."""

    device = "cpu"

    def __init__(self, logits):
        self.logits = torch.tensor(logits)

    def __call__(self, **inputs):
        return SimpleNamespace(logits=self.logits[:, None])  # (names, 1, V)


def test_own_answers(monkeypatch):
    """Confidence is the share of yes, in either spelling, at the last position."""
    asked = []

    def encode(processor, texts, images):
        asked.extend(zip(texts, images))
        return hf.BatchFeature({"input_ids": torch.zeros(len(texts), 1)})

    def tokenize(words, add_special_tokens):
        ids = {"yes": 0, "Yes": 1, "no": 2, "No": 3}
        return SimpleNamespace(input_ids=[[ids[word], 9] for word in words])

    monkeypatch.setattr(one.common, "encode_prompts", encode)
    log = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]]).log().tolist()
    policy, processor = Policy(log), SimpleNamespace(tokenizer=tokenize)
    expert = one.load_expert("none", 0.05, "cpu", [], policy, processor)
    assert expert.classes is None
    answers = expert.find(SHOTS, [["dog", "cat"], []])
    assert answers == [[found("dog", 0.8), found("cat", 0.2)], []]
    assert asked == [
        ("Is there a dog in the image? Answer yes or no.", SHOTS[0]),
        ("Is there a cat in the image? Answer yes or no.", SHOTS[0]),
    ]
