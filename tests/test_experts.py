"""Stage 01's experts on tiny random-weight checkpoints saved to disk: which classes they know, and where their boxes lie."""
import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from conftest import stage
from PIL import Image

one = stage("01_build_preferences")
SIZES = ((80, 40), (40, 100))  # width, height
COCO = [*one.SYNONYMS]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "dog", "cat", "hot", "teddy", "bear"]


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shots")
    for i, size in enumerate(SIZES):
        Image.new("RGB", size, (100 * i, 50, 90)).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(SIZES))]


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """{kind: folder} of a tiny RT-DETR, DETR, GroundingDINO and OWLv2, each with its own processor."""
    folder, small = tmp_path_factory.mktemp("detectors"), {"encoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                                                           "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
    stages = {"depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"]}
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "layer_type": "basic", **stages}
    spoken = {"sofa": "couch", "motorbike": "motorcycle", "tvmonitor": "tv", "diningtable": "dining table"}
    names = [next((k for k, v in spoken.items() if v == name), name) for name in COCO]
    bert = hf.BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    swin = hf.SwinConfig(image_size=64, embed_dim=8, num_heads=[1, 1, 2, 2], window_size=4, **stages)
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz"]
    letters += [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    box = {"shortest_edge": 64, "longest_edge": 96}
    for kind, model, processor in (
            ("rt_detr", hf.RTDetrForObjectDetection(hf.RTDetrConfig(
                backbone_config=hf.RTDetrResNetConfig(**resnet), encoder_hidden_dim=16, encoder_in_channels=[8, 8, 16], d_model=16,
                decoder_in_channels=[16] * 3, decoder_layers=1, num_denoising=0, id2label=dict(enumerate(names)), **small)),
             hf.RTDetrImageProcessor(size={"height": 64, "width": 64})),
            ("detr", hf.DetrForObjectDetection(hf.DetrConfig(
                backbone_config=hf.ResNetConfig(**resnet), d_model=16, decoder_layers=1, id2label={0: "crow", 1: "dog"}, **small)),
             hf.DetrImageProcessor(size=box)),
            ("grounding_dino", hf.GroundingDinoForObjectDetection(hf.GroundingDinoConfig(
                backbone_config=swin, text_config=bert, d_model=32, decoder_layers=2, **small)),
             hf.GroundingDinoProcessor(hf.GroundingDinoImageProcessor(size=box), hf.BertTokenizer(
                 vocab={word: i for i, word in enumerate(WORDS)}))),
            ("owlv2", hf.Owlv2ForObjectDetection(hf.Owlv2Config(
                text_config={**clip, "vocab_size": len(letters), "max_position_embeddings": 40, "bos_token_id": 52,
                             "eos_token_id": 53, "pad_token_id": 53},
                vision_config={**clip, "image_size": 64, "patch_size": 16}, projection_dim=16)),
             hf.Owlv2Processor(hf.Owlv2ImageProcessor(size={"height": 64, "width": 64}), hf.CLIPTokenizer(
                 vocab={piece: i for i, piece in enumerate(letters)}, merges=[], model_max_length=40)))):
        model.save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
    return {path.name: str(path) for path in folder.iterdir()}


def returns(monkeypatch, expert, logits):
    """Let the model answer with known logits, and in both pictures with one box in the middle of the left upper quarter and one
    that covers the right half. Returns what the model is called with."""
    seen = {}

    def forward(**inputs):
        seen.update(inputs)
        boxes = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.75, 0.5, 0.5, 1.0]]).repeat(2, 1, 1)
        return SimpleNamespace(logits=torch.tensor(logits), pred_boxes=boxes)

    real = expert.model
    monkeypatch.setattr(expert, "model", lambda **inputs: forward(**inputs))
    expert.model.device, expert.model.config = real.device, real.config
    return seen


LEFT, RIGHT = ([10, 5, 30, 15], [40, 0, 80, 40]), ([5, 12.5, 15, 37.5], [20, 0, 40, 100])  # by hand, for the two pictures


def test_closed_transformers_detectors(detectors, shots, monkeypatch):
    expert = one.HubDetector(detectors["rt_detr"], 0.5, "cpu")
    assert sorted(expert.classes) == sorted(COCO)  # though its config says sofa, motorbike, tvmonitor, diningtable
    assert all(one.HubDetector(detectors["rt_detr"], -1.0, "cpu").examine(shots, [[], []]))  # the real forward pass
    logits = torch.full((2, 2, 80), -9.0)
    logits[:, 0, COCO.index("couch")], logits[1, 1, COCO.index("dog")] = 2.0, 1.0
    returns(monkeypatch, expert, logits.tolist())
    first, second = expert.examine(shots, [["dog"], []])
    assert first == [{"object": "couch", "confidence": 0.8808, "box": LEFT[0]}]  # sigmoid(2)
    assert second == [{"object": "couch", "confidence": 0.8808, "box": RIGHT[0]}, {"object": "dog", "confidence": 0.7311, "box": RIGHT[1]}]

    expert = one.HubDetector(detectors["detr"], 0.5, "cpu")
    assert expert.classes == ["crow", "dog"]  # not COCO's: kept as they are
    assert all(one.HubDetector(detectors["detr"], -1.0, "cpu").examine(shots, [[], []]))
    returns(monkeypatch, expert, [[[0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]] * 2)  # the last column says "nothing there"
    assert expert.examine(shots, [[], []]) == [[{"object": "dog", "confidence": 0.9094, "box": box}] for box in (LEFT[0], RIGHT[0])]


def test_coco_names():
    names = {i: name for i, name in enumerate(["N/A", *COCO, "street sign"])}
    assert one.coco_names(names) == {i: name for i, name in names.items() if 0 < i <= 80}
    assert one.coco_names({0: "sofa", 1: "N/A"}) == {0: "sofa", 1: "N/A"}


def test_owlv2(detectors, shots, monkeypatch):
    """Boxes are fractions of the square that the picture is padded to: its longer side."""
    expert = one.HubDetector(detectors["owlv2"], 0.5, "cpu")
    assert expert.classes is None and all(one.HubDetector(detectors["owlv2"], 0.0, "cpu").examine(shots, [["dog", "cat"], ["hot dog"]]))
    seen = returns(monkeypatch, expert, [[[1.0, 2.0], [-9.0, -9.0]], [[1.0, 5.0], [-9.0, 5.0]]])  # column 1 is padding in the second
    first, second = expert.examine(shots, [["dog", "cat"], ["hot dog"]])
    assert first == [{"object": "cat", "confidence": 0.8808, "box": [10, 10, 30, 30]}]
    assert second == [{"object": "hot dog", "confidence": 0.7311, "box": [12.5, 12.5, 37.5, 37.5]}]
    asked = [expert.processor.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") for ids in seen["input_ids"]]
    assert asked == ["aphotoofadog", "aphotoofacat", "aphotoofahotdog", ""]


def test_grounding_dino(detectors, shots, monkeypatch):
    """[CLS] hot dog . cat . [SEP] for the first picture, [CLS] dog . [SEP] [PAD] ... for the second."""
    expert = one.HubDetector(detectors["grounding_dino"], 0.3, "cpu")
    real = one.HubDetector(detectors["grounding_dino"], 0.0, "cpu").examine(shots, [["hot dog", "cat"], ["dog"]])
    assert expert.classes is None and {d["object"] for d in real[0]} <= {"hot dog", "cat"} and {d["object"] for d in real[1]} == {"dog"}
    low = [-9.0] * 7
    seen = returns(monkeypatch, expert, [
        [[9.0, -9.0, 2.0, 9.0, -9.0, 9.0, 9.0], [-9.0, -9.0, 2.0, -9.0, 1.0, -9.0, -9.0]],  # "dog" alone is half a hot dog
        [[9.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0], low]])
    first, second = expert.examine(shots, [["hot dog", "Cat"], ["dog"]])
    assert [[WORDS[i] for i in ids] for ids in seen["input_ids"]] == [
        ["[CLS]", "hot", "dog", ".", "cat", ".", "[SEP]"], ["[CLS]", "dog", ".", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]]
    assert first == [{"object": "hot dog", "confidence": 0.4405, "box": LEFT[0]},  # (sigmoid(-9) + sigmoid(2)) / 2
                     {"object": "Cat", "confidence": 0.7311, "box": LEFT[1]}]
    assert second == [{"object": "dog", "confidence": 0.8808, "box": RIGHT[0]}]


def test_batches_and_questions(detectors, shots, tmp_path):
    """17 pictures go in batches of 8; an open expert is not asked about a picture of which nothing is asked."""
    expert = one.HubDetector(detectors["owlv2"], 0.0, "cpu")
    assert len(expert.examine([shots[0]] * 17, [["dog"]] * 17)) == 17
    args = Namespace(image_root=str(shots[0].parent))
    rows = one.examine({"0.png": ["dog", "dog"], "1.png": []}, expert, tmp_path, args)
    assert rows["0.png"]["asked"] == ["dog"] and rows["0.png"]["detections"] and rows["1.png"]["detections"] == []
    expert.examine = None  # whatever has been examined is not examined again
    assert one.examine({"0.png": ["dog"], "1.png": []}, expert, tmp_path, args) == rows


def test_yolo_world(shots, tmp_path, monkeypatch):
    """The real architecture with random weights; only its text encoder, which would be downloaded, is replaced."""
    from ultralytics import YOLO
    from ultralytics.nn.tasks import WorldModel
    asked = []

    def get_text_pe(self, text, batch=80, cache_clip_model=False):
        asked.append(list(text))
        return torch.ones(1, len(text), 512)

    monkeypatch.setattr(WorldModel, "get_text_pe", get_text_pe)
    YOLO("yolov8n-world.yaml").save(tmp_path / "world.pt")
    args = Namespace(absent=0.0, device="cpu")
    expert = one.load_expert(str(tmp_path / "world.pt"), ["dog", "hot dog"], None, None, args)
    assert asked == [["dog", "hot dog"]] and expert.classes == ["dog", "hot dog"]
    assert Image.open.__module__ == "PIL.Image"  # ultralytics has put its own there
    found = expert.examine(shots, [["dog"], []])
    assert len(found) == 2 and {d["object"] for row in found for d in row} <= {"dog", "hot dog"}
    for (width, height), row in zip(SIZES, found):
        assert row and all(0 <= d["box"][0] <= d["box"][2] <= width and 0 <= d["box"][1] <= d["box"][3] <= height for d in row)


@pytest.mark.parametrize("name", ["none.pt", "weights.onnx", "folder/nothing", "text.pt"])
def test_no_expert(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a connection
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(SystemExit, match=f"--expert {name}: expected ultralytics weights"):
        one.load_expert(name, ["dog"], None, None, Namespace(absent=0.05, device="cpu"))


def detection(name="dog", confidence=0.9, box=(1, 2, 30, 40)):
    return {"object": name, "confidence": confidence, "box": box and list(box)}


def build(tmp_path, shots, found, *flags):
    """Stage 01 over two given pairs and findings made elsewhere; rows of preferences.jsonl."""
    (tmp_path / "found.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({
        "image": f"{i}.png", "prompt": "What is there?", "chosen": "A dog.", "rejected": "A dog and a cat."}) + "\n" for i in (0, 1)))
    one.main(one.parse_args(["--run", str(tmp_path / "run"), "--pairs", str(tmp_path / "pairs.jsonl"), "--image-root",
                             str(shots[0].parent), "--detections", str(tmp_path / "found.jsonl"), *flags]))
    return [json.loads(line) for line in (tmp_path / "run/01_preferences/preferences.jsonl").read_text().splitlines()]


def test_findings_made_elsewhere(tmp_path, shots):
    """No model is loaded at all. A class that was not asked about is unsure, so the second pair is dropped."""
    rows = build(tmp_path, shots, [{"id": "0.png", "detections": [detection()]},
                                   {"id": "1.png", "asked": ["dog"], "detections": [detection(box=None)]}])
    assert [(row["image"], row["hallucinated"]) for row in rows] == [("0.png", ["cat"])]
    assert rows[0]["evidence"][0] == {"object": "dog", "claimed_by": "both", "status": "present", "confidence": 0.9, "box": [1, 2, 30, 40]}
    meta = json.loads((tmp_path / "run/01_preferences/meta.json").read_text())
    assert meta["counts"]["dropped: rejected does not hallucinate by the expert"] == 1 and str(tmp_path / "found.jsonl") in meta["inputs"]


@pytest.mark.parametrize("changed, words", [
    ({"detections": [detection(confidence=1.5)]}, "found.jsonl row '1.png', field detections"),
    ({"detections": [detection(box=(1, 2))]}, "found.jsonl row '1.png', field detections"),
    ({"detections": [{"object": "dog", "box": None}]}, "found.jsonl row '1.png', field detections.*confidence"),
    ({"detections": {"dog": 1}}, "found.jsonl row '1.png', field detections"),
    ({"id": "2.png"}, "found.jsonl has no row for 1 of 2 images, such as id '1.png'"),
    ({"detections": None}, "line 2: field 'detections' is missing")])
def test_broken_findings(tmp_path, shots, changed, words):
    rows = [{"id": "0.png", "detections": [detection()]}, {"id": "1.png", "detections": [detection()], **changed}]
    with pytest.raises(SystemExit, match=words):
        build(tmp_path, shots, rows)


@pytest.mark.parametrize("vocabulary, words", [
    ('{"zebu": "zebu"}', "1 of 1 classes of .*found.jsonl are not among those of the vocabulary: dog"), ("{", "--vocabulary .*JSON|--vocabulary .*Expect"),
    ('["dog"]', "--vocabulary .*phrase: class"), ('{"dog": 1}', "--vocabulary .*phrase: class")])
def test_vocabulary_that_does_not_fit(tmp_path, shots, vocabulary, words):
    (tmp_path / "vocabulary.json").write_text(vocabulary)
    rows = [{"id": f"{i}.png", "detections": [detection()]} for i in (0, 1)]
    with pytest.raises(SystemExit, match=words):
        build(tmp_path, shots, rows, "--vocabulary", str(tmp_path / "vocabulary.json"))


def test_vocabulary_and_weights(capsys):
    one.check_fit({"dog", "zebu"}, {"dog", "cat"}, "--vocabulary", "--expert x.pt")
    assert capsys.readouterr().out == "1 of 2 classes of --vocabulary are not among those of --expert x.pt: zebu\n"
    with pytest.raises(SystemExit, match="1 of 1 classes of --vocabulary .* x.pt: zebu; it has cat, dog"):
        one.check_fit({"zebu"}, {"dog", "cat"}, "--vocabulary", "--expert x.pt")
    one.check_fit({"dog"}, {"dog", "cat"}, "--vocabulary", "--expert x.pt")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        one.parse_args(["--pairs", "x", "--expert", "x.pt", "--detections", "y"])
