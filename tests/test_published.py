"""Stage 01's readers: the published schemas, what each row becomes, what is skipped or refused."""

import io
import json
import random
from collections import Counter

import datasets
import pytest
from conftest import stage
from PIL import Image

one = stage("01_build_preferences")
FINDING = {"object": "cat", "status": "absent", "claimed_by": "rejected", "confidence": 0.0}


def picture(seed, size=(96, 72), kind="PNG"):
    """Bytes of a picture of 6 x 6 random patches."""
    out = io.BytesIO()
    image = Image.frombytes("RGB", (6, 6), random.Random(seed).randbytes(108))
    image.resize(size, Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def struct(seed, **changed):
    """A picture as a hub's parquet holds it."""
    return {"bytes": picture(seed, **changed), "path": None}


@pytest.fixture
def photos(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def write(path, rows):
    """Rows as parquet, JSON array or JSON lines, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        lines = "\n".join(json.dumps(row) for row in rows)
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


def llava_turns(*texts):
    """A conversation in which a person and the model take turns."""
    speakers = ("human", "gpt") * 2
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts)]
    return [{"from": "human", "value": f"<image>\n{texts[0]}"}, *turns[1:]]


def povid_row(i, **changed):
    name = f"COCO_train2014_{i:012d}"
    row = {"id": name, "image": f"./data/coco/{name}.jpg"}
    for k, column in (("", "conversations"), (" and a frisbee", "rejected_conversations")):
        row[column] = llava_turns("Describe this image.", f"A dog {i}{k}.")
    return {**row, **changed}


def rlaif_v_row(i):
    row = {"ds_name": "RLAIF-V", "image": struct(i, kind="JPEG"), "question": "Describe it."}
    row |= {"chosen": f"good {i}", "rejected": f"bad {i}", "origin_dataset": "LCS-558K"}
    return {**row, "origin_split": "{}", "idx": str(i), "image_path": f"{i}.jpg"}


def bench_row(name, ranking, seed=0):
    row = {"id": name, "query": "<image>\nWhat is it?", "image": struct(seed)}
    row |= {"response": [f"Two mugs {seed}.", f"A cat {seed}."], "human_ranking": ranking}
    same = {"judge": "", "rationale": "", "query_source": "COCO", "ground_truth": ""}
    return {**row, "models": ["a", "b"], **same}


def own_row(i, **changed):
    row = {"id": f"r{i}", "image": "0.png", "prompt": "Q?", "chosen": f"good {i}"}
    row |= {"rejected": "bad", "evidence": [{**FINDING, "box": None}], "source": "sampled"}
    return {**row, **changed}


def message(role, text, image=False):
    """One message; of a file of such, Arrow gives the picture's block a "text" too."""
    blocks = [{"type": "image", "text": None}] if image else []
    return [{"role": role, "content": [*blocks, {"type": "text", "text": text}]}]


def texts(pairs):
    return [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]


def check_pictures(pairs, root, rows):
    """Each pair's picture is a file under the root with the bytes that the row had."""
    for pair, row in zip(pairs, rows, strict=True):
        held = row.get("image") or row["images"][0]
        assert pair["image"].startswith("run/images/")
        assert (root / pair["image"]).read_bytes() == held["bytes"]


# ---- What each format's rows become --------------------------------------------------------------
def test_rlaif_v(tmp_path):
    """Two shards in a folder; ids and pictures are the same again when it is read once more."""
    rows = [rlaif_v_row(i) for i in range(4)]
    for k in (0, 1):
        write(tmp_path / f"data/RLAIF-V-Dataset_00{k}.parquet", rows[2 * k : 2 * k + 2])
    name, pairs, counts = one.read_pairs(tmp_path / "data", tmp_path, tmp_path / "run")
    assert name == "RLAIF-V" and counts == Counter({"rows read": 4})
    assert texts(pairs) == [("Describe it.", f"good {i}", f"bad {i}") for i in range(4)]
    check_pictures(pairs, tmp_path, rows)
    assert len({pair["id"] for pair in pairs if pair["image"].endswith(".jpg")}) == 4
    assert one.read_pairs(tmp_path / "data", tmp_path, tmp_path / "run")[1] == pairs
    assert one.read_pairs(tmp_path / "data", tmp_path, tmp_path / "run", limit=3)[1] == pairs[:3]
    outside = one.read_pairs(tmp_path / "data", tmp_path / "elsewhere", tmp_path / "run")[1][0]
    assert outside["image"] == str(tmp_path / pairs[0]["image"])  # absolute: not under the root


def test_vl_rewardbench(tmp_path):
    names = {"RLAIF-V-99": "hallucination", "hallucination_pair-7": "hallucination"}
    names |= {"RLHF-V-5": "hallucination", "mathverse_12": "reasoning", "mmmu_pro_3": "reasoning"}
    names |= {"wildvision-battle-4": "general", "LRVInstruction-1": "general"}
    rows = [bench_row(name, [0, 1], seed=k) for k, name in enumerate(names)]
    rows.append(bench_row("RLAIF-V-99", [1, 0], seed=7))
    rows.append(bench_row("RLAIF-V-98", [0, 0], seed=8))  # without a better one
    source = write(tmp_path / "test-00000-of-00001.parquet", rows)
    name, pairs, counts = one.read_pairs(source, tmp_path, tmp_path / "run")
    assert name == "VL-RewardBench" and sum(counts.values()) == 10
    assert counts["skipped: not a row of VL-RewardBench"] == 1
    assert [pair["category"] for pair in pairs] == [*names.values(), "hallucination"]
    assert [pair["id"] for pair in pairs] == [*names, "RLAIF-V-99-7"]  # ids are made unique
    first, last = ("What is it?", "Two mugs 0.", "A cat 0."), texts(pairs)[7]
    assert texts(pairs)[0] == first and last == ("What is it?", "A cat 7.", "Two mugs 7.")
    check_pictures(pairs, tmp_path, rows[:8])


def test_povid(tmp_path, capsys):
    """Pictures lie as the rows say, or by their names alone under --image-root."""
    twice = ("A dog.", "And the colour?")
    brown, red = (llava_turns("Describe.", *twice, f"It is {c}.") for c in ("brown", "red"))
    dialogues = {"conversations": brown, "rejected_conversations": red}
    rows = [povid_row(1), povid_row(2, **dialogues), povid_row(3), povid_row(2, image=None)]
    rows.append(povid_row(2, rejected_conversations=llava_turns("Something else?", "No.")))
    rows.append(povid_row(2, rejected_conversations=[]))
    source = write(tmp_path / "POVID_preference_data_for_VLLMs_version_1.json", rows)
    files = ["COCO_train2014_000000000001.jpg", "data/coco/COCO_train2014_000000000002.jpg"]
    for file in files:
        (tmp_path / "coco" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / file).write_bytes(picture(1, kind="JPEG"))
    name, pairs, counts = one.read_pairs(source, tmp_path / "coco", tmp_path / "run")
    assert name == "POVID" and [pair["image"] for pair in pairs] == files
    assert pairs[0]["id"] == "COCO_train2014_000000000001" and not (tmp_path / "run").exists()
    assert texts(pairs)[0] == ("Describe this image.", "A dog 1.", "A dog 1 and a frisbee.")
    dialogue = "user: Describe.\nassistant: A dog.\nuser: And the colour?"
    assert texts(pairs)[1] == (dialogue, "It is brown.", "It is red.")
    assert counts["skipped: chosen and rejected answer different questions"] == 1
    assert counts["skipped: missing image"] == 2 and sum(counts.values()) == 6 + 4
    said = capsys.readouterr().out
    assert f"skipped {source} row 3, field image: missing image" in said
    assert said.count("missing image") == 1  # the first of each reason
    assert f"{source} row 6, field rejected_conversations: no response" in said


def test_trl_images(tmp_path):
    row = {"images": [struct(1)], "prompt": "<image>\nQ?", "chosen": "good", "rejected": "bad"}
    rows = [row, {**row, "images": [struct(1), struct(2)]}, {**row, "images": []}]
    source = write(tmp_path / "trl/train-0.parquet", rows)
    name, pairs, counts = one.read_pairs(source, tmp_path, tmp_path / "run")
    assert name == "TRL preferences" and texts(pairs) == [("Q?", "good", "bad")]
    check_pictures(pairs, tmp_path, rows[:1])
    assert counts["skipped: more than one image"] == counts["skipped: missing image"] == 1


GOOD, BAD = message("assistant", "good"), message("assistant", "bad")
ASKED, SEEN = message("user", "Q?"), message("user", "Q?", image=True)
BRIEF, PLAIN = message("system", "Be brief."), [{"role": "assistant", "content": "good"}]


@pytest.mark.parametrize(
    "prompt, chosen, rejected, text",
    [
        ("Q?", "good", "bad", "Q?"),
        ("Q?\n<image>", "good", "bad", "Q?"),
        (SEEN, GOOD, BAD, "Q?"),
        (None, ASKED + GOOD, ASKED + BAD, "Q?"),
        (ASKED, PLAIN, BAD, "Q?"),
        (BRIEF + ASKED, GOOD, BAD, "system: Be brief.\nuser: Q?"),
        ("Q?", GOOD + message("user", "Thanks."), BAD, "Q?"),  # what follows is left out
        (message("user", "One.\nTwo."), "good", "bad", "One.\nTwo."),
        # whole conversations beside a prompt: it is not put in front a second time
        ("Q?", ASKED + GOOD, ASKED + BAD, "Q?"),
        ("<image>\nQ?", SEEN + GOOD, SEEN + BAD, "Q?"),
        ("Q? ", ASKED + GOOD, ASKED + BAD, "Q?"),
        ("Q?", BRIEF + ASKED + GOOD, BRIEF + ASKED + BAD, "system: Be brief.\nuser: Q?"),
    ],
)
def test_trl_messages(prompt, chosen, rejected, text):
    _, pair = one.pair_of({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert texts([pair]) == [(text, "good", "bad")]


@pytest.mark.parametrize("file", ["x.parquet", "x.json", "x.jsonl"])
def test_trl_files(file, tmp_path, photos):
    """Messages in each kind of file; a row without an id gets one from its picture's name."""
    row = {"id": None, "image": "0.png", "prompt": SEEN, "chosen": GOOD, "rejected": BAD}
    rows = [row, {**row, "chosen": message("assistant", "better"), "id": "x"}]
    _, pairs, _ = one.read_pairs(write(tmp_path / file, rows), photos, tmp_path / "run")
    assert texts(pairs) == [("Q?", "good", "bad"), ("Q?", "better", "bad")]
    assert [pair["id"] for pair in pairs] == ["0-0", "x"]


def test_json_lines(tmp_path, photos):
    """Our own come back whole; marks, empty lines, letters, ends; a bad line by its own number."""
    rows = [own_row(0), own_row(1, image="1.png", chosen="Grüße"), own_row(2, chosen="2014-05-01")]
    rows[1]["evidence"] = [{**FINDING, "box": [1, 2.5, 3, 4]}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    source = tmp_path / "x.jsonl"
    source.write_text("\n" + "\r\n\n \n".join(lines), encoding="utf-8-sig")
    assert one.read_pairs(source, photos, tmp_path)[:2] == ("preferences.jsonl", rows)
    source.write_text("\n".join(["", lines[0], "", '{"ima', lines[1]]))
    with pytest.raises(SystemExit, match="x.jsonl row 4: JSONDecodeError"):
        one.read_pairs(source, photos, tmp_path)


# ---- Folders of several formats, the hub, overlap ------------------------------------------------
def test_a_folder_of_several_formats(photos, capsys):
    write(photos / "data/a.jsonl", [own_row(0)])
    write(photos / "data/in/b.json", [povid_row(1, image="1.png"), {"image": "0.png"}])
    _, pairs, counts = one.read_pairs(photos / "data", photos, photos / "run")
    assert [pair["image"] for pair in pairs] == ["0.png", "1.png"] and counts["rows read"] == 3
    assert "b.json row 2, field ?: columns of no known format (POVID" in capsys.readouterr().out


def test_hub(monkeypatch, tmp_path):
    """owner/name[:config] by `datasets`: split train, or the first there is; bytes as stored."""
    asked, rows = [], [rlaif_v_row(i) for i in range(3)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    splits = {"test": table.select([0]), "train": table}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    name, pairs, _ = one.read_pairs("owner/name:pairwise", tmp_path, tmp_path / "run", limit=2)
    assert asked == [("owner/name", "pairwise")] and name == "RLAIF-V" and len(pairs) == 2
    check_pictures(pairs, tmp_path, rows[:2])
    del splits["train"]
    assert len(one.read_pairs("owner/name", tmp_path, tmp_path / "run")[1]) == 1


def test_exclude(tmp_path):
    """A response with other case and punctuation is one; a short one recurs by chance."""
    bench = {**bench_row("x", [0, 1]), "response": ["There is a dog, on the left.", "Yes."]}
    source = write(tmp_path / "bench.parquet", [bench])
    items = [own_row(1), own_row(2, rejected="a dog"), own_row(3, chosen="Yes!")]
    items[1]["chosen"] = "there is a dog on the LEFT"
    counts = Counter()
    assert one.without_overlap(items, source, counts) == [items[0], items[2]]
    assert counts == Counter({f"excluded: text in {source}": 1})
