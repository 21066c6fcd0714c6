"""Stage 01's readers: the published schemas, what each row becomes, what is skipped or refused."""

import importlib
import io
import json
import random
import types
from collections import Counter

import datasets
import pytest
from PIL import Image

one = importlib.import_module("01_build_preferences")

FINDING = {"object": "cat", "status": "absent", "claimed_by": "rejected"}


# ---- Files as they are published -----------------------------------------------------------------
def picture(seed, size=(96, 72), kind="PNG"):
    """Bytes of a picture of 6 x 6 random patches."""
    rng = random.Random(seed)
    image = Image.new("RGB", (6, 6))
    for x in range(6):
        for y in range(6):
            image.putpixel((x, y), tuple(rng.randrange(256) for _ in range(3)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def struct(seed, **changed):
    """A picture as a hub's parquet holds it."""
    return {"bytes": picture(seed, **changed), "path": None}


@pytest.fixture
def photos(tmp_path):
    """Folder with 0.png and 1.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder


def write(path, rows, image_column=None):
    """Rows as parquet (with an Image column, as the hub's), JSON array or JSON lines, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = datasets.Dataset.from_list(rows)
        if image_column == "image":
            table = table.cast_column("image", datasets.Image())
        if image_column == "images":
            table = table.cast_column("images", datasets.List(datasets.Image()))
        table.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def llava_turns(question, *texts):
    """A conversation in which texts answer the question, ask again, answer again."""
    turns = [{"from": "human", "value": "<image>\n" + question}]
    for k, text in enumerate(texts):
        turns.append({"from": ("gpt", "human")[k % 2], "value": text})
    return turns


def povid_row(i, **changed):
    name = f"COCO_train2014_{i:012d}"
    row = {
        "id": name,
        "image": f"./data/coco/{name}.jpg",
        "conversations": llava_turns("Describe this image.", f"A dog {i}."),
        "rejected_conversations": llava_turns("Describe this image.", f"A dog {i} and a frisbee."),
    }
    return {**row, **changed}


def rlaif_v_row(i):
    return {
        "ds_name": "RLAIF-V",
        "image": struct(i, kind="JPEG"),
        "question": "Describe the picture.",
        "chosen": f"good {i}",
        "rejected": f"bad {i}",
        "origin_dataset": "LCS-558K",
        "origin_split": "{}",
        "idx": str(i),
        "image_path": f"{i}.jpg",
    }


def bench_row(name, ranking, seed=0):
    return {
        "id": name,
        "query": "<image>\nWhat is it?",
        "response": [f"Two mugs {seed}.", f"A cat {seed}."],
        "image": struct(seed),
        "human_ranking": ranking,
        "models": ["a", "b"],
        "judge": "",
        "rationale": "",
        "query_source": "COCO",
        "ground_truth": "",
    }


def own_row(i, **changed):
    row = {
        "id": f"r{i}",
        "image": "0.png",
        "prompt": "Q?",
        "chosen": f"good {i}",
        "rejected": "bad",
        "evidence": [{**FINDING, "box": None}],
        "source": "sampled",
    }
    return {**row, **changed}


def message(role, text, image=False):
    """One message; in a file of such, Arrow gives the picture's block a "text" too."""
    blocks = [{"type": "text", "text": text}]
    if image:
        blocks.insert(0, {"type": "image", "text": None})
    return [{"role": role, "content": blocks}]


def texts(pairs):
    return [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]


# ---- What each format's rows become --------------------------------------------------------------
def check_pictures(pairs, root, rows):
    """Each pair's picture is a file under the root with the bytes that the row had."""
    for pair, row in zip(pairs, rows, strict=True):
        struct = row["image"] if "image" in row else row["images"][0]
        assert pair["image"].startswith("run/images/")
        assert (root / pair["image"]).read_bytes() == struct["bytes"]


def test_rlaif_v(tmp_path, capsys):
    """Two shards in a folder; ids and pictures are the same again when it is read once more."""
    rows = [rlaif_v_row(i) for i in range(4)]
    write(tmp_path / "data/RLAIF-V-Dataset_000.parquet", rows[:2], "image")
    write(tmp_path / "data/RLAIF-V-Dataset_001.parquet", rows[2:], "image")
    name, pairs, counts = one.read_pairs(tmp_path / "data", tmp_path, tmp_path / "run")
    assert name == "RLAIF-V" and counts == Counter({"rows read": 4})
    assert "read as RLAIF-V, 4 of 4 rows" in capsys.readouterr().out
    assert texts(pairs) == [("Describe the picture.", f"good {i}", f"bad {i}") for i in range(4)]
    check_pictures(pairs, tmp_path, rows)
    assert all(pair["image"].endswith(".jpg") for pair in pairs)
    assert len({pair["id"] for pair in pairs}) == 4
    assert one.read_pairs(tmp_path / "data", tmp_path, tmp_path / "run")[1] == pairs
    limited = one.read_pairs(tmp_path / "data", tmp_path, tmp_path / "run", limit=3)
    assert limited[1] == pairs[:3] and limited[2]["rows read"] == 3


def test_pictures_outside_the_root(tmp_path):
    source = write(tmp_path / "x.parquet", [rlaif_v_row(1)], "image")
    pair = one.read_pairs(source, tmp_path / "elsewhere", tmp_path / "run")[1][0]
    assert pair["image"] == str(next((tmp_path / "run/images").iterdir()))


def test_vl_rewardbench(tmp_path):
    names = {
        "RLAIF-V-99": "hallucination",
        "hallucination_pair-7": "hallucination",
        "RLHF-V-5": "hallucination",
        "mathverse_12": "reasoning",
        "mmmu_pro_3": "reasoning",
        "wildvision-battle-4": "general",
        "LRVInstruction-1": "general",
    }
    rows = [bench_row(name, [0, 1], seed=k) for k, name in enumerate(names)]
    rows.append(bench_row("RLAIF-V-99", [1, 0], seed=7))
    rows.append(bench_row("RLAIF-V-98", [0, 0], seed=8))  # without a better one
    source = write(tmp_path / "test-00000-of-00001.parquet", rows, "image")
    name, pairs, counts = one.read_pairs(source, tmp_path, tmp_path / "run")
    assert name == "VL-RewardBench"
    assert counts == Counter({"rows read": 9, "skipped: not a row of VL-RewardBench": 1})
    assert [pair["category"] for pair in pairs] == [*names.values(), "hallucination"]
    assert [pair["id"] for pair in pairs] == [*names, "RLAIF-V-99-7"]  # ids are made unique
    assert texts(pairs)[0] == ("What is it?", "Two mugs 0.", "A cat 0.")
    assert texts(pairs)[7] == ("What is it?", "A cat 7.", "Two mugs 7.")
    check_pictures(pairs, tmp_path, rows[:8])


def test_povid(tmp_path, capsys):
    twice = ("A dog.", "And the colour?")
    rows = [
        povid_row(1),
        povid_row(2),
        povid_row(3),
        povid_row(3, image="3"),  # the COCO id alone; else the same row
        povid_row(3, image="3.jpg"),  # a name that no COCO file has
        povid_row(4),
        povid_row(6),
        povid_row(
            5,
            conversations=llava_turns("Describe.", *twice, "It is brown."),
            rejected_conversations=llava_turns("Describe.", *twice, "It is red."),
        ),
        povid_row(5, rejected_conversations=llava_turns("Something else?", "No.")),
        povid_row(5, rejected_conversations=[]),
        povid_row(5, image=None),
    ]
    del rows[-1]["image"]
    source = write(tmp_path / "POVID_preference_data_for_VLLMs_version_1.json", rows)
    images = [
        "COCO_train2014_000000000001.jpg",
        "train2014/COCO_train2014_000000000002.jpg",
        "train2017/000000000003.jpg",
        "000000000004.jpg",
        "data/coco/COCO_train2014_000000000005.jpg",
    ]
    for image in images:
        (tmp_path / "coco" / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / image).write_bytes(picture(1, kind="JPEG"))
    name, pairs, counts = one.read_pairs(source, tmp_path / "coco", tmp_path / "run")
    assert name == "POVID" and not (tmp_path / "run").exists()
    assert [pair["image"] for pair in pairs] == images
    assert pairs[0] == {
        "id": "COCO_train2014_000000000001",
        "image": "COCO_train2014_000000000001.jpg",
        "prompt": "Describe this image.",
        "chosen": "A dog 1.",
        "rejected": "A dog 1 and a frisbee.",
    }
    dialogue = "user: Describe.\nassistant: A dog.\nuser: And the colour?"
    assert texts(pairs)[4] == (dialogue, "It is brown.", "It is red.")
    assert counts == Counter(
        {
            "rows read": 11,
            "skipped: duplicate row": 1,
            "skipped: missing image": 3,
            "skipped: no response": 1,
            "skipped: chosen and rejected answer different questions": 1,
        }
    )
    said = capsys.readouterr().out
    assert f"skipped {source} row 5, field image: missing image" in said
    assert said.count("missing image") == 1  # the first of each reason
    assert f"{source} row 10, field rejected_conversations: no response" in said


def test_trl_images(tmp_path):
    row = {"images": [struct(1)], "prompt": "<image>\nQ?", "chosen": "good", "rejected": "bad"}
    rows = [row, {**row, "images": [struct(1), struct(2)]}, {**row, "images": []}]
    source = write(tmp_path / "trl/train-0.parquet", rows, "images")
    name, pairs, counts = one.read_pairs(source, tmp_path, tmp_path / "run")
    assert name == "TRL preferences" and texts(pairs) == [("Q?", "good", "bad")]
    check_pictures(pairs, tmp_path, rows[:1])
    assert counts["skipped: more than one image"] == counts["skipped: missing image"] == 1


GOOD, BAD = message("assistant", "good"), message("assistant", "bad")
ASKED = message("user", "Q?")


@pytest.mark.parametrize(
    "prompt, chosen, rejected, text",
    [
        ("Q?", "good", "bad", "Q?"),
        (message("user", "Q?", image=True), GOOD, BAD, "Q?"),
        (None, ASKED + GOOD, ASKED + BAD, "Q?"),
        ("Q?", ASKED + GOOD, ASKED + BAD, "Q?"),
        (ASKED, [{"role": "assistant", "content": "good"}], BAD, "Q?"),
        (message("system", "Be brief.") + ASKED, GOOD, BAD, "system: Be brief.\nuser: Q?"),
        ("Q?", GOOD + message("user", "Thanks."), BAD, "Q?"),  # what follows is left out
        (message("user", "One.\nTwo."), "good", "bad", "One.\nTwo."),
    ],
)
def test_trl_messages(prompt, chosen, rejected, text):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert texts([one.from_messages(row)]) == [(text, "good", "bad")]


@pytest.mark.parametrize("file", ["x.parquet", "x.json", "x.jsonl"])
def test_trl_files(file, tmp_path, photos):
    """Messages in each kind of file; a row without an id gets one from its picture's name."""
    prompt = message("user", "Q?", image=True)
    row = {"id": None, "image": "0.png", "prompt": prompt, "chosen": GOOD, "rejected": BAD}
    rows = [row, {**row, "chosen": message("assistant", "better"), "id": "x"}]
    source = write(tmp_path / file, rows)
    name, pairs, _ = one.read_pairs(source, photos, tmp_path / "run")
    assert name == "TRL preferences"
    assert texts(pairs) == [("Q?", "good", "bad"), ("Q?", "better", "bad")]
    assert [pair["id"] for pair in pairs] == ["0-0", "x"]


def test_own_preferences_come_back(tmp_path, photos):
    """With their evidence; a column that is null in the first rows is no trouble."""
    rows = [own_row(0), own_row(1, image="1.png", evidence=[{**FINDING, "box": [1, 2.5, 3, 4]}])]
    source = write(tmp_path / "preferences.jsonl", rows)
    assert one.read_pairs(source, photos, tmp_path)[:2] == ("preferences.jsonl", rows)


def test_json_lines_of_other_programs(tmp_path, photos):
    """A byte order mark, empty lines, a date for a response, a folder that is not there."""
    rows = [own_row(0, chosen="2014-05-01", image="elsewhere/0.png"), own_row(1, chosen="Grüße")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    source = tmp_path / "x.jsonl"
    source.write_text("\n\n".join(lines) + "\n\n", encoding="utf-8-sig")
    pairs = one.read_pairs(source, photos, tmp_path)[1]
    assert [pair["chosen"] for pair in pairs] == ["2014-05-01", "Grüße"]
    assert pairs[0]["image"] == "0.png"


# ---- What is skipped and refused -----------------------------------------------------------------
def test_what_is_skipped(tmp_path, photos, capsys):
    whole = picture(3, (400, 300), kind="JPEG")
    (photos / "whole.jpg").write_bytes(whole)
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.png").write_bytes(b"no picture")
    rows = [
        own_row(0, image="whole.jpg"),
        own_row(1, image="half.jpg"),
        own_row(2, image="text.png"),
        own_row(3, image="gone.png"),
        own_row(4, image=None),
        own_row(5, chosen=None),
        own_row(6, rejected="  "),
        own_row(7, chosen="bad "),
        own_row(0, image="whole.jpg", id="again"),
        own_row(8, id="r0"),
        own_row(9, chosen=[{}]),
    ]
    source = write(tmp_path / "x.jsonl", rows)
    _, pairs, counts = one.read_pairs(source, photos, tmp_path)
    assert [pair["id"] for pair in pairs] == ["r0", "r0-9"]
    assert counts == Counter(
        {
            "rows read": 11,
            "skipped: picture that does not decode": 2,
            "skipped: missing image": 2,
            "skipped: no response": 2,
            "skipped: identical responses": 1,
            "skipped: duplicate row": 1,
            "skipped: not a row of preferences.jsonl": 1,
        }
    )
    said = capsys.readouterr().out
    for words in (
        "row 2, field image: picture that does not decode",
        "row 6, field chosen: no response",
        "row 8, field rejected: identical responses",
        "row 9, field prompt: duplicate row",
    ):
        assert f"skipped {source} {words}" in said
    with pytest.raises(SystemExit, match="no usable row.*missing image': 1"):
        one.read_pairs(write(tmp_path / "y.jsonl", rows[3:4]), photos, tmp_path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "x.jsonl",
            '{"id": 1, "text": "a"}\n',
            ["x.jsonl holds no usable row", "no known format (POVID, VL-RewardBench"],
        ),
        ("x.jsonl", '{"image": "0.png", "chosen": "a", "rejected": "b"}\n{"ima\n', ["after row 1"]),
        ("x.json", "[1, 2]", ["x.json holds no usable row", "'skipped: not an object': 2"]),
        ("x.json", "[]", ["no usable row"]),
        ("x.jsonl", "", ["no usable row"]),
        ("x.parquet", "PAR1", ["x.parquet after row 0"]),
        ("x.txt", "a", ["x.txt is of no kind that is read: .parquet, .json, .jsonl, .arrow"]),
        ("x.json", None, ["x.json", "FileNotFound"]),
    ],
)
def test_what_is_refused(name, content, words, tmp_path, photos):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as error:
        one.read_pairs(tmp_path / name, photos, tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_files_of_a_folder_may_be_of_several_formats(tmp_path, photos):
    write(tmp_path / "data/a.jsonl", [own_row(0)])
    write(tmp_path / "data/b.jsonl", [povid_row(1, image="1.png"), {"image": "0.png"}])
    _, pairs, counts = one.read_pairs(tmp_path / "data", photos, tmp_path / "run")
    assert [pair["image"] for pair in pairs] == ["0.png", "1.png"]
    assert sum(counts.values()) == 3 + 1


# ---- The hub, memory, overlap --------------------------------------------------------------------
def test_hub(monkeypatch, tmp_path):
    """owner/name[:config] is looked up by `datasets`; the split is train, or the first there is,
    and of its files only as many are downloaded as are read."""
    asked, downloaded = [], []
    for k in range(2):
        write(tmp_path / f"{k}.parquet", [rlaif_v_row(2 * k), rlaif_v_row(2 * k + 1)], "image")

    def load_dataset_builder(*names):
        asked.append(names)
        urls = [f"hf://datasets/owner/name@abc/data/{k}.parquet" for k in range(2)]
        config = types.SimpleNamespace(data_files={"test": urls, "validation": ["no"]})
        return types.SimpleNamespace(config=config)

    def download(self, url):
        path = url.removeprefix("hf://datasets/owner/name@abc/")
        downloaded.append(path)
        return str(tmp_path / path.removeprefix("data/"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets.DownloadManager, "download", download)
    name, pairs, _ = one.read_pairs("owner/name:pairwise", tmp_path, tmp_path / "run", limit=2)
    assert asked == [("owner/name", "pairwise")] and name == "RLAIF-V" and len(pairs) == 2
    assert downloaded == ["data/0.parquet"]
    pairs = one.read_pairs("owner/name", tmp_path, tmp_path / "run")[1]
    assert [pair["chosen"] for pair in pairs] == [f"good {i}" for i in range(4)]


def test_rows_stream(tmp_path, monkeypatch):
    """Sixteen pictures are in memory at a time, however many the file has."""
    seen = []

    class Counted(one.ParquetFile):
        def iter_batches(self, *arguments):
            for batch in super().iter_batches(*arguments):
                seen.append(batch.num_rows)
                yield batch

    monkeypatch.setattr(one, "ParquetFile", Counted)
    source = write(tmp_path / "x.parquet", [rlaif_v_row(i) for i in range(40)], "image")
    rows = one.read_rows(source)
    for _ in range(17):
        next(rows)
    assert seen == [16, 16]


def test_exclude(tmp_path, photos):
    """A response with other case and punctuation is one; a short one recurs by chance."""
    bench = bench_row("RLAIF-V-1", [0, 1])
    bench["response"] = ["There is a dog, on the left.", "Yes."]
    source = write(tmp_path / "bench.parquet", [bench], "image")
    items = [
        own_row(1),
        own_row(2, rejected="there is a dog on the LEFT"),
        own_row(3, chosen="Yes!"),
        {"id": "x", "image": "0.png", "prompt": "Q?"},  # a picture without responses
    ]
    counts = Counter()
    kept = one.without_overlap(items, source, counts)
    assert [item["id"] for item in kept] == ["r1", "r3", "x"]
    assert counts == Counter({f"excluded: text in {source}": 1})
