"""Stage 01's reading of published pairs: files in the published schemas, what each row becomes, what is skipped or refused."""
import io
import json
import random
from argparse import Namespace
from collections import Counter

import datasets
import pytest
from conftest import stage
from PIL import Image

one = stage("01_build_preferences")


def picture(seed, size=(96, 72), kind="PNG"):
    """Bytes of a picture of 6 x 6 random patches: as different from another seed's as two photographs."""
    rng = random.Random(seed)
    image = Image.new("RGB", (6, 6))
    image.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(36)])
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def struct(seed, **changed):
    return {"bytes": picture(seed, **changed), "path": None}


def write(path, rows, image_column=None):
    """Rows as parquet (with an Image column as the hub stores it), json array or jsonl, by the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = datasets.Dataset.from_list(rows)
        if image_column:
            table = table.cast_column(image_column, datasets.Image() if image_column == "image" else
                                      datasets.Sequence(datasets.Image()))
        table.to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(*texts, image=True):
    return [{"from": ("human", "gpt")[k % 2], "value": ("<image>\n" if image and k == 0 else "") + text} for k, text in enumerate(texts)]


def povid_row(i, **changed):
    name = f"COCO_train2014_{i:012d}"
    return {"id": name, "image": f"./data/coco/{name}.jpg", "conversations": turns("Describe this image.", f"A dog {i}."),
            "rejected_conversations": turns("Describe this image.", f"A dog {i} and a frisbee."), **changed}


def critic_row(i, said, **changed):
    asked = ("<image>\nPlease serve as a fair judge. Question: [What is there?]\nThe first response: [A [red] cup.]\n"
             "The second response: [Two [blue] cups.]\nASSISTANT:\n")
    return {"id": f"vlfeedback_{i}", "source": "vlfeedback", "image": struct(i), **changed,
            "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}


def message(role, text, image=False):
    return [{"role": role, "content": [{"type": "image", "text": None}] * image + [{"type": "text", "text": text}]}]


FILES = {  # format: (file name, image column, rows, what the rows become)
    "RLAIF-V": ("RLAIF-V-Dataset_000.parquet", "image", [
        {"ds_name": "RLAIF-V", "image": struct(i), "question": "Describe the picture.", "chosen": f"good {i}", "rejected": f"bad {i}",
         "origin_dataset": "LCS-558K", "origin_split": "{}", "idx": str(i), "image_path": f"{i}.jpg"} for i in range(2)],
        [("Describe the picture.", f"good {i}", f"bad {i}") for i in range(2)]),
    "RLHF-V": ("RLHF-V-Dataset.parquet", "image", [
        {"image": struct(1, kind="JPEG"), "text": json.dumps({"question": "What?", "chosen": "A bus.", "rejected": "A train."})},
        {"image": struct(2), "text": json.dumps(["<image>\nWho?", "A man.", "A woman."])}],
        [("What?", "A bus.", "A train."), ("Who?", "A man.", "A woman.")]),
    "LLaVA-Critic pairwise": ("pairwise/train-00000-of-00005.parquet", "image", [
        critic_row(1, "It is close. The better response: [second]."), critic_row(2, "**The better response: [1].**"),
        critic_row(3, "Both are equally good."), critic_row(4, "I cannot say."),
        critic_row(5, "At first the better response: [A], but no. The better response: [B]")],
        [("What is there?", "Two [blue] cups.", "A [red] cup."), ("What is there?", "A [red] cup.", "Two [blue] cups."),
         ("What is there?", "Two [blue] cups.", "A [red] cup.")]),
    "VL-RewardBench": ("test-00000-of-00001.parquet", "image", [
        {"id": name, "query": f"<image>\nWhat {k}?", "response": ["Two mugs.", "A cat."], "image": struct(k), "human_ranking": rank,
         "models": ["a", "b"], "judge": "", "rationale": "", "query_source": "COCO", "ground_truth": ""}
        for k, (name, rank) in enumerate([("RLAIF-V-99", [0, 1]), ("RLAIF-V-99", [1, 0]), ("hallucination_pair-7", [0, 1]),
                                          ("mathverse_12", [1, 0]), ("mmmu_pro_3", [0, 1]), ("wildvision-battle-4", [0, 1]),
                                          ("LRVInstruction-1", [0, 1]), ("RLHF-V-5", [0, 1])])],
        [(f"What {k}?", *(("Two mugs.", "A cat."), ("A cat.", "Two mugs."))[k in (1, 3)]) for k in range(8)]),
    "TRL preferences": ("trl.parquet", "image", [
        {"image": struct(1), "prompt": message("user", "Q?", image=True), "chosen": message("assistant", "good"),
         "rejected": message("assistant", "bad"), "origin_split": "x"}], [("Q?", "good", "bad")]),
    "TRL preferences (images)": ("trl/train-0.parquet", "images", [
        {"images": [struct(1)], "prompt": "<image>\nQ?", "chosen": "good", "rejected": "bad"},
        {"images": [struct(1), struct(2)], "prompt": "Q?", "chosen": "good", "rejected": "bad"},
        {"images": [], "prompt": "Q?", "chosen": "good", "rejected": "bad"}], [("Q?", "good", "bad")]),
}
SKIPPED = {"LLaVA-Critic pairwise": {"skipped: tie": 1, "skipped: unparseable judgement": 1},
           "TRL preferences (images)": {"skipped: more than one image": 1, "skipped: missing image": 1}}


@pytest.mark.parametrize("name", FILES)
def test_published_parquet(name, tmp_path, capsys):
    file, column, rows, expected = FILES[name]
    source = write(tmp_path / "data" / file, rows, column)
    format_name, pairs, counts = one.read_pairs(source, tmp_path, tmp_path / "run")
    assert format_name == name and f"read as {name}, {len(pairs)} of {len(rows)} rows" in capsys.readouterr().out
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == expected
    assert counts == Counter({"rows read": len(rows), **SKIPPED.get(name, {})})
    ids = [pair["id"] for pair in pairs]
    assert len(set(ids)) == len(ids) and ids == [pair["id"] for pair in one.read_pairs(source, tmp_path, tmp_path / "run")[1]]
    assert one.read_pairs(source, tmp_path, tmp_path / "run", limit=1)[2]["rows read"] == 1
    blobs = {struct["bytes"] for row in rows for struct in ([row["image"]] if "image" in row else row["images"])}
    for pair in pairs:
        assert (tmp_path / pair["image"]).read_bytes() in blobs and pair["image"].startswith("run/images/")
        assert pair["image"].endswith(".jpg" if name == "RLHF-V" and pair is pairs[0] else ".png")
    folder = one.read_pairs((tmp_path / "data"), tmp_path / "elsewhere", tmp_path / "run")  # a folder; images not under the root
    assert folder[0] == name and all((tmp_path / "elsewhere" / p["image"]).is_file() and p["image"][0] == "/" for p in folder[1])


def test_categories_of_vl_rewardbench(tmp_path):
    source = write(tmp_path / "x.parquet", FILES["VL-RewardBench"][2], "image")
    rows = one.read_pairs(source, tmp_path, tmp_path)[1]
    assert [row["category"] for row in rows] == ["hallucination"] * 3 + ["reasoning"] * 2 + ["general"] * 2 + ["hallucination"]
    assert [row["id"] for row in rows][:3] == ["RLAIF-V-99", "RLAIF-V-99-1", "hallucination_pair-7"]


def test_povid(tmp_path, capsys):
    later = ("And the colour?", "It is brown.")
    rows = [povid_row(1), povid_row(2), povid_row(3), povid_row(3, image="3"), povid_row(4), povid_row(6),
            povid_row(5, conversations=turns("Describe.", "A dog.", *later),
                      rejected_conversations=turns("Describe.", "A cat.", later[0], "It is red.")),
            povid_row(5, rejected_conversations=turns("Something else?", "No.")),
            povid_row(5, rejected_conversations=[]), {k: v for k, v in povid_row(5).items() if k != "image"}]
    source = write(tmp_path / "POVID_preference_data_for_VLLMs_version_1.json", rows)
    for name in ("COCO_train2014_000000000001.jpg", "train2014/COCO_train2014_000000000002.jpg", "train2017/000000000003.jpg",
                 "000000000004.jpg", "data/coco/COCO_train2014_000000000005.jpg"):
        (tmp_path / "coco" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / name).write_bytes(picture(1, kind="JPEG"))
    name, pairs, counts = one.read_pairs(source, tmp_path / "coco", tmp_path / "run")
    assert name == "POVID" and not (tmp_path / "run").exists()
    assert [pair["image"] for pair in pairs] == ["COCO_train2014_000000000001.jpg", "train2014/COCO_train2014_000000000002.jpg",
                                                 "train2017/000000000003.jpg", "000000000004.jpg",
                                                 "data/coco/COCO_train2014_000000000005.jpg"]
    assert pairs[0] == {"id": "COCO_train2014_000000000001", "image": "COCO_train2014_000000000001.jpg",
                        "prompt": "Describe this image.", "chosen": "A dog 1.", "rejected": "A dog 1 and a frisbee."}
    assert pairs[4]["prompt"] == "user: Describe.\nassistant: A dog.\nuser: And the colour?"
    assert (pairs[4]["chosen"], pairs[4]["rejected"]) == ("It is brown.", "It is red.")
    assert counts == Counter({"rows read": 10, "skipped: duplicate row": 1, "skipped: missing image": 2, "skipped: no rejected": 1,
                              "skipped: chosen and rejected answer different questions": 1})
    said = capsys.readouterr().out
    assert f"skipped {source} row 6, field image: missing image" in said and said.count("missing image") == 1
    assert f"{source} row 9, field rejected_conversations: no rejected" in said


def test_multimodal_rewardbench(tmp_path):
    (tmp_path / "images/nocaps").mkdir(parents=True)
    (tmp_path / "images/nocaps/1.jpg").write_bytes(picture(1, kind="JPEG"))
    rows = [{"ID": f"nocaps_{i}", "Text": "Describe.", "Image": "images/nocaps/1.jpg", "Output1": f"one {i}", "Output2": "two",
             "Better": better, "Category": "open_generation/correctness_task"} for i, better in enumerate(("Output2", "Output1", "?"))]
    name, pairs, counts = one.read_pairs(write(tmp_path / "all_data.json", rows), tmp_path, tmp_path / "run")
    assert name == "Multimodal RewardBench" and counts["skipped: not a row of Multimodal RewardBench"] == 1
    assert [(p["id"], p["chosen"], p["rejected"]) for p in pairs] == [("nocaps_0", "two", "one 0"), ("nocaps_1", "one 1", "two")]
    assert {p["category"] for p in pairs} == {"open_generation/correctness_task"} and pairs[0]["image"] == "images/nocaps/1.jpg"


@pytest.mark.parametrize("prompt, chosen, rejected, text", [
    ("Q?", "good", "bad", "Q?"),
    (message("user", "Q?", image=True), message("assistant", "good"), message("assistant", "bad"), "Q?"),
    (None, message("user", "Q?") + message("assistant", "good"), message("user", "Q?") + message("assistant", "bad"), "Q?"),
    ("Q?", message("user", "Q?") + message("assistant", "good"), message("user", "Q?") + message("assistant", "bad"), "Q?"),
    ([{"role": "user", "content": "Q?"}], [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}], "Q?"),
    (message("system", "Be brief.") + message("user", "Q?"), message("assistant", "good"), message("assistant", "bad"),
     "system: Be brief.\nuser: Q?"),
    ([{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "image"}, {"type": "text", "text": "Two."}]}],
     "good", "bad", "One.\nTwo.")])
def test_trl_messages(prompt, chosen, rejected, text):
    assert one.two.from_messages({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == {
        "prompt": text, "chosen": "good", "rejected": "bad"}


def own(i, **changed):
    return {"id": f"r{i}", "image": "0.png", "prompt": "Q?", "chosen": f"good {i}", "rejected": "bad", "evidence": [{"box": None}],
            "source": "sampled", **changed}


def test_own_preferences_come_back(tmp_path, pictures):
    rows = [own(0), own(1, image="1.png", evidence=[{"box": [1, 2, 3, 4]}])]
    name, pairs, _ = one.read_pairs(write(tmp_path / "preferences.jsonl", rows), pictures, tmp_path)
    assert name == "preferences.jsonl" and pairs == rows  # with their evidence, which stage 05 measures by
    plain = [{k: v for k, v in own(i).items() if k not in ("id", "evidence")} for i in range(2)]
    assert [p["id"] for p in one.read_pairs(write(tmp_path / "plain.json", plain), pictures, tmp_path)[1]] == ["0-0", "0-1"]


def test_what_is_skipped(tmp_path, pictures, capsys):
    (tmp_path / "images").mkdir()
    whole = picture(3, (400, 300), kind="JPEG")
    for name, data in (("half.jpg", whole[:len(whole) // 2]), ("text.png", b"no picture"), ("whole.jpg", whole)):
        (tmp_path / "images" / name).write_bytes(data)
    rows = [own(0, image="whole.jpg"), own(1, image="half.jpg"), own(2, image="text.png"), own(3, image="gone.png"), own(4, image=None),
            own(5, chosen=None, image="whole.jpg"), own(6, rejected="  ", image="whole.jpg"), own(7, chosen="bad ", image="whole.jpg"),
            own(0, image="whole.jpg", id="again"), own(8, image="whole.jpg", id="r0"), own(9, image="whole.jpg", chosen=[{}])]
    _, pairs, counts = one.read_pairs(write(tmp_path / "x.jsonl", rows), tmp_path / "images", tmp_path)
    assert [pair["id"] for pair in pairs] == ["r0", "r0-9"]
    assert counts == Counter({"rows read": 11, "skipped: picture that does not decode": 2, "skipped: missing image": 2,
                              "skipped: no chosen": 1, "skipped: no rejected": 1, "skipped: identical responses": 1,
                              "skipped: duplicate row": 1, "skipped: not a row of preferences.jsonl": 1})
    said = capsys.readouterr().out
    for words in ("row 2, field image: picture that does not decode", "row 6, field chosen: no chosen", "row 9, field prompt: duplicate row",
                  "row 8, field rejected: identical responses"):
        assert f"skipped {tmp_path}/x.jsonl {words}" in said
    with pytest.raises(SystemExit, match="no usable row.*missing image': 1"):
        one.read_pairs(write(tmp_path / "y.jsonl", rows[3:4]), tmp_path, tmp_path)


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl", '{"id": 1, "instruction": "a", "output": "b"}\n', ["x.jsonl row 1", "id, instruction, output", "known format", "RLAIF-V"]),
    ("x.jsonl", '{"image": "0.png", "prompt": "", "chosen": "a", "rejected": "b"}\n{"ima\n', ["x.jsonl after row 1", "JSONDecodeError"]),
    ("x.json", "[1, 2]", ["x.json", "row 1 is no JSON object"]), ("x.json", "[]", ["no usable row"]), ("x.jsonl", "", ["no usable row"]),
    ("x.parquet", "PAR1", ["x.parquet after row 0"]), ("x.txt", "a", ["x.txt after row 0"]), ("x.json", None, ["x.json", "FileNotFound"])])
def test_what_is_refused(tmp_path, pictures, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        one.read_pairs(tmp_path / name, pictures, tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_hub(monkeypatch, tmp_path, pictures):
    """owner/name[:config] goes to load_dataset; the split is train, or the only one there is; images are not decoded."""
    asked = []

    def load_dataset(*names, streaming):
        asked.append(names)
        rows = datasets.Dataset.from_list([{"question": "Q?", "chosen": "a", "rejected": "b", "image": struct(1)}])
        return datasets.IterableDatasetDict({"test": rows.cast_column("image", datasets.Image()).to_iterable_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name, pairs, _ = one.read_pairs("owner/name:pairwise", tmp_path, tmp_path / "run")
    assert asked == [("owner/name", "pairwise")] and name == "RLAIF-V"
    assert (tmp_path / pairs[0]["image"]).read_bytes() == picture(1)
    (tmp_path / "a.jsonl").write_text(json.dumps(own(0)) + "\n")
    write(tmp_path / "b.jsonl", [povid_row(1)])
    with pytest.raises(SystemExit, match="b.jsonl row 1.*not those of preferences.jsonl"):
        one.read_pairs(tmp_path, pictures, tmp_path / "run")


def test_difference_hash(tmp_path):
    """Worked by hand: a row of 9 grey levels, each its own pixel; the bit is set where the right neighbour is brighter."""
    levels = [10, 20, 15, 15, 90, 80, 70, 200, 0]
    image = Image.new("L", (9, 8))
    image.putdata(levels * 8)
    image.save(tmp_path / "x.png")
    row = 0b01001001  # 10<20, 15<90 and 70<200: bits 0, 3 and 6
    assert one.difference_hash(tmp_path / "x.png") == sum(row << 8 * y for y in range(8))
    for seed in range(6):
        codes = []
        for k, (size, kind) in enumerate((((300, 200), "PNG"), ((300, 200), "JPEG"), ((150, 100), "JPEG"))):
            (tmp_path / f"{k}").write_bytes(picture(seed, size, kind))
            codes.append(one.difference_hash(tmp_path / f"{k}"))
        assert all((code ^ codes[0]).bit_count() <= 2 for code in codes)
        (tmp_path / "other").write_bytes(picture(seed + 100))
        assert (one.difference_hash(tmp_path / "other") ^ codes[0]).bit_count() > 10


def test_exclude(tmp_path, capsys):
    """Dropped: the same picture as JPEG of another size, and a response with other case and punctuation; short ones are not."""
    bench = [{**FILES["VL-RewardBench"][2][0], "response": ["There is a dog, on the left.", "Yes."], "image": struct(1)}]
    write(tmp_path / "bench.parquet", bench, "image")
    (tmp_path / "images").mkdir()
    for i in (1, 2, 3, 4):
        (tmp_path / f"images/{i}.jpg").write_bytes(picture(i, (200, 150), "JPEG"))
    rows = [own(1, image="1.jpg"), own(2, image="2.jpg", rejected="there is a dog on the LEFT"), own(3, image="3.jpg", chosen="Yes!"),
            own(4, image="4.jpg")]
    write(tmp_path / "train.jsonl", rows)
    args = dict(run="x", image_root=str(tmp_path / "images"), limit=None, exclude=[str(tmp_path / "bench.parquet")], prompts=None, seed=0)
    items, counts = one.load_items(Namespace(pairs=str(tmp_path / "train.jsonl"), images=None, **args), tmp_path / "run")
    assert [item["id"] for item in items] == ["r3", "r4"]
    assert counts[f"excluded: image in {tmp_path}/bench.parquet"] == counts[f"excluded: text in {tmp_path}/bench.parquet"] == 1
    items, counts = one.load_items(Namespace(pairs=None, images=str(tmp_path / "images"), **args), tmp_path / "run")
    assert [item["image"] for item in items] == ["2.jpg", "3.jpg", "4.jpg"] and [*items[0]] == ["id", "image", "prompt"]
    assert counts[f"excluded: text in {tmp_path}/bench.parquet"] == 0 and "rows read" in counts
    with pytest.raises(SystemExit, match="no row is left"):
        write(tmp_path / "train.jsonl", rows[:1])
        one.load_items(Namespace(pairs=str(tmp_path / "train.jsonl"), images=None, **args), tmp_path / "run")
