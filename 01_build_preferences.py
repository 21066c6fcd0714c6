"""01  Preference pairs from a vision expert: the better response names nothing that is absent.

    status(o) = present  if the best detection of class o has confidence >= --present
                absent   if it has confidence < --absent (0 where nothing was detected)
                unsure   between the two, or where the expert does not know the class
    chosen:   names nothing absent, and of such the most that is present
    rejected: names something absent, and of such the most that is present

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) "not detected" is weak evidence, so nothing is decided in the band between present and absent;
  2) where no candidate hallucinates, a rejected response is made by swapping one present object of
     the chosen text for a verified absent one that co-occurs with the scene's in this corpus;
  3) --expert none is the paper's ablation made exact: the policy's own P(yes) to "Is there a ... in
     the image?" is the only check.

Reads  pictures (--images), for which the policy writes responses, or published pairs (--pairs).
Writes 01_preferences/: answers.jsonl and detections.jsonl, which only grow; classes.json,
       vocabulary.json, contact_sheet.png, preferences.jsonl:
    {"id": "01011-0", "image": "images/01011.png", "prompt": "List the objects in the image.",
     "chosen": "yellow circle.", "rejected": "yellow circle, red cross.", "source": "sampled",
     "hallucinated": ["red cross"], "split": "validation", "evidence": [{"object": "red cross",
     "claimed_by": "rejected", "status": "absent", "confidence": 0.0, "box": null}]}

    python 01_build_preferences.py --images coco/train2017   # Qwen2-VL-7B writes, YOLO11x verifies
    python 01_build_preferences.py --pairs openbmb/RLAIF-V-Dataset \\
        --exclude MMInstruction/VL-RewardBench               # given pairs are checked instead
"""

import hashlib
import io
import json
import os
import random
import re
import textwrap
import tomllib
from collections import Counter
from contextlib import suppress
from functools import cache, partial
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Annotated

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pyarrow.parquet import ParquetFile
from pydantic import Field, FiniteFloat, TypeAdapter
from typing_extensions import NotRequired, TypedDict

import common
from common import row_seed, stop

WORDS = tomllib.loads((Path(__file__).parent / "assets" / "words.toml").read_text("utf-8"))


# ---- The method: verification and pairing --------------------------------------------------------
# "Needs:" in a docstring, here and in later scripts, names what to copy along with a function.
def verify(mentions, detections, present, absent, classes):
    """{object: "present" | "absent" | "unsure"} of the mentions, from each one's best detection.
    detections: list of {"object", "confidence" in [0, 1]}; present, absent: the two thresholds,
    absent <= present; classes: those that the expert could have found."""
    status = {}
    for name in mentions:
        confidences = [found["confidence"] for found in detections if found["object"] == name]
        best = max(confidences, default=0.0)
        status[name] = "unsure"
        if name in classes and best >= present:
            status[name] = "present"
        elif name in classes and best < absent:
            status[name] = "absent"
    return status


def pair_candidates(candidates, status):
    """(chosen, rejected): two of the texts; either is None if no candidate will do.
    candidates: list of (text, mentions); status: {object: "present" | ...} of all mentions. Ties
    go to the earlier candidate."""
    clean, faulty = {}, {}  # {text: number of objects that are there}
    for text, mentions in candidates:
        n_present = sum(status[name] == "present" for name in mentions)
        if any(status[name] == "absent" for name in mentions):
            faulty.setdefault(text, n_present)
        elif n_present:
            clean.setdefault(text, n_present)
    # both with as much right as possible, so that the pair differs in what is wrong
    return max(clean, key=clean.get, default=None), max(faulty, key=faulty.get, default=None)


def check_given_pair(chosen, rejected, status):
    """None where the expert agrees with a given pair, else the reason to drop it.
    chosen, rejected: the objects that each response mentions; status: of all of them."""
    if any(status[name] == "absent" for name in chosen):
        return "chosen hallucinates by the expert"
    if not any(status[name] == "absent" for name in rejected):
        return "rejected does not hallucinate by the expert"
    return None


def propose_swaps(mentions, co_occurrence, classes, rng, n=8):
    """n unmentioned classes to ask the expert about, for a scene that mentions others.
    They are drawn without repeats, with weight 1 + how often they are mentioned together with the
    scene's objects in this corpus: the plausible errors, which a language prior makes.
    co_occurrence: Counter {frozenset of two classes: texts}; rng: random.Random of this row."""
    # Each class throws a number in [0, 1), which a weight pulls towards 1: u ** (1 / weight). The n
    # largest are distributed as n weighted draws without repeats (Efraimidis and Spirakis, 2006).
    throws = {}
    for name in classes:
        if name not in mentions:
            n_together = sum(co_occurrence[frozenset((name, other))] for other in mentions)
            throws[name] = rng.random() ** (1 / (1 + n_together))
    return sorted(throws, key=throws.get, reverse=True)[:n]


def gather_evidence(chosen, rejected, detections, status):
    """[{object, claimed_by, status, confidence, box}] for the mentions of both responses."""
    evidence = []
    for name in dict.fromkeys(chosen + rejected):
        claimed_by = "chosen" if name in chosen else "rejected"
        if name in chosen and name in rejected:
            claimed_by = "both"
        row = {"object": name, "claimed_by": claimed_by, "status": status.get(name, "unsure")}
        of_name = [found for found in detections if found["object"] == name]
        best = max(of_name, key=lambda found: found["confidence"], default={"confidence": 0.0})
        evidence.append({**row, "confidence": best["confidence"], "box": best.get("box")})
    return evidence


class Skip(Exception):
    """Skip(reason[, field]): why a row cannot be used."""


def build_pair(item, candidates, swaps, finding, status, vocabulary, seed):
    """The preference row; raises Skip.
    item: {id, image, prompt}, of a given pair also chosen and rejected; candidates: list of (text,
    mentions), of a given pair these two; swaps: classes that may be swapped in; finding: what the
    expert says of the image, {classes, detections}; status: of all that it was asked about."""
    if not candidates:
        raise Skip("no candidate is finished")
    mentions = [named for _, named in candidates]
    if set(chain(*mentions)).isdisjoint(finding["classes"]):
        raise Skip("names no object of the vocabulary")
    if "chosen" in item:
        source = "given"
        chosen, rejected = item["chosen"], item["rejected"]
        reason = check_given_pair(*mentions, status)
        if reason:
            raise Skip(reason)
    else:
        source = "sampled"
        chosen, rejected = pair_candidates(candidates, status)
        if chosen is None:
            raise Skip("no candidate without hallucination")
        if rejected is None:
            source = "swapped"
            rng = random.Random(row_seed(seed, "pair", item["id"]))
            rejected = make_swap(chosen, swaps, status, vocabulary, rng)
    named = find_mentions(chosen, vocabulary), find_mentions(rejected, vocabulary)
    evidence = gather_evidence(*named, finding["detections"], status)
    hallucinated = [found["object"] for found in evidence if found["status"] == "absent"]
    if not hallucinated:  # the swap made another thing: "a hot cat" with a dog is a hot dog
        raise Skip("the swap names nothing absent")
    row = {"id": item["id"], "image": item["image"], "prompt": item["prompt"]}
    row |= {"chosen": chosen, "rejected": rejected, "source": source}
    return {**row, "hallucinated": hallucinated, "evidence": evidence}


def make_swap(text, swaps, status, vocabulary, rng):
    """The text with one of its present objects replaced by the first absent swap; raises Skip."""
    absent = [name for name in swaps if status[name] == "absent"]
    if not absent:
        raise Skip("no candidate hallucinates, no absent object to swap in")
    present = [name for name in find_mentions(text, vocabulary) if status[name] == "present"]
    return swap_object(text, rng.choice(present), spaced(absent[0]), vocabulary)


def split_sizes(n, validation, heldout, train):
    """{split: pairs} of n pairs; an argument is a number, a share below 1, or None: the default."""

    def number(size, default):
        if size is None:
            return default
        return round(size * n if size < 1 else size)

    sizes = {"validation": number(validation, min(200, n // 10))}
    sizes["heldout"] = number(heldout, min(500, n // 10))
    sizes["train"] = number(train, min(5000, max(0, n - sum(sizes.values())) // 2))
    sizes["pool"] = max(0, n - sum(sizes.values()))
    return sizes


def assign_splits(rows, sizes, seed):
    """Rows with "split": whole images in a random order fill validation (for 03 and 04 to watch),
    heldout (for 05) and train (for 02's critiques); the rest is the pool of 04.
    sizes: {split: pairs}, in order; a split ends after the image that fills it. Needs: row_seed"""
    of_image = {}
    for row in rows:
        of_image.setdefault(row["image"], []).append(row)
    images = sorted(of_image, key=lambda image: row_seed(seed, "split", image))
    placed = []
    for split, size in sizes.items():
        start = len(placed)
        while images and len(placed) < start + size:
            image = images.pop(0)
            placed += [{**row, "split": split} for row in of_image[image]]
    return placed


# ---- Mentions: which of the vocabulary's objects a text says are there ---------------------------
def spaced(phrase):
    """'Fire_Truck' -> 'fire truck': how a phrase stands in a vocabulary."""
    return re.sub(r"[\W_]+", " ", phrase.lower()).strip()


def plural(phrase):
    """'red circle' -> 'red circles', 'glass of wine' -> 'glasses of wine', 'skis' -> 'skis'."""
    noun, of, rest = phrase.partition(" of ")
    for ending, new in WORDS["plurals"]:  # the first that fits; the last, "$", always does
        if re.search(ending, noun):
            return re.sub(ending, new, noun) + of + rest


def build_vocabulary(class_names, synonyms=None):
    """{phrase: class}: names and synonyms ({spaced class: [phrases]}) with their plurals, spaced.
    A name means its own class: with classes "man" and "person", "man" is no person."""
    phrases = [(name, name) for name in class_names]
    for name in class_names:
        phrases += [(phrase, name) for phrase in (synonyms or {}).get(spaced(name), [])]
    vocabulary = {}
    for phrase, name in phrases:
        vocabulary.setdefault(spaced(phrase), name)
        vocabulary.setdefault(plural(spaced(phrase)), name)
    return vocabulary


def read_vocabulary(path):
    """{phrase: class} of a JSON file, the phrases spaced."""
    try:
        vocabulary = TypeAdapter(dict[str, str]).validate_json(Path(path).read_bytes())
    except ValueError as error:
        stop(f"{path}: JSON {{phrase: class}} is expected ({common.one_line(error)})")
    return {spaced(phrase): name for phrase, name in vocabulary.items() if spaced(phrase)}


SYNONYMS = WORDS["coco"]  # {class: [phrases]}
COCO_VOCABULARY = build_vocabulary(SYNONYMS, SYNONYMS)  # {phrase: one of the 80 class names}
NOT_OBJECTS = build_vocabulary(WORDS["nothing"])  # "dog park", which names no dog
# A cue, and then words and spaces up to a comma, a full stop or the like, or a word that ends the
# denial; but "not in any car" goes on, in spite of "in".
CUE = rf"\b(?:{'|'.join(WORDS['denials'])})\b"
DENIAL_ENDS = rf"\b(?:{'|'.join(WORDS['denial_ends'])})\b(?! any\b)"
DENIED = re.compile(rf"{CUE}(?:(?!{DENIAL_ENDS})(?:\w+|[^\w,.;:!?\n()—]))*")


def find_mentions(text, vocabulary):
    """Classes that an English text says are there, by first mention; vocabulary: {phrase: class}.
    >>> find_mentions("No cats, only a dog park, two men with a teddy bear.", COCO_VOCABULARY)
    ['person', 'teddy bear']"""
    return list(dict.fromkeys(name for _, _, name in mention_spans(text, vocabulary)))


def mention_spans(text, vocabulary):
    """[(start, end, class)] of each mention in the text, from left to right; see find_mentions."""
    # as long as the text, or the spans would be off: "İ" alone has a longer lower case
    text = text.replace("’", "'").replace("İ", "i").lower()
    # what is denied is blotted out, so that no phrase is found there
    text = DENIED.sub(lambda denied: "." * len(denied.group()), text)
    longest_first = sorted(NOT_OBJECTS | vocabulary, key=len, reverse=True)
    pattern = rf"\b(?:{'|'.join(longest_first)})\b"  # of spaced phrases, so without signs
    matches = list(re.finditer(pattern, re.sub(r"[\s_'-]", " ", text)))
    one_word = {match.start() for match in matches if " " not in match.group()}
    mentions = []
    for match in matches:
        start, end = match.span()
        # Of two nouns in a row the second is the thing: "baby elephant", "hot dog vendor". But a
        # second noun of two words begins a new thing: "a cup dining table" is a list.
        qualifies = text.startswith(" ", end) and end + 1 in one_word
        is_hyphened = re.match(r"-\w", text[end:])  # "dog-friendly"
        is_object = match.group() in vocabulary  # which wins over NOT_OBJECTS
        if is_object and not qualifies and not is_hyphened:
            mentions.append((start, end, vocabulary[match.group()]))
    return mentions


def claimed_objects(claim, supported, vocabulary):
    """Classes that a check affirms, all in its claim, or denies, one that is the whole claim."""
    if supported:
        return find_mentions(claim, vocabulary)
    opening = r"^(?:there (?:is|are) )?(?:(?:an?|the|some|one|two|three) )?"
    bare = re.sub(opening, "", spaced(claim))
    return [vocabulary[bare]] if bare in vocabulary else []


def swap_object(text, old, new, vocabulary):
    """The text with every mention of class `old` replaced by `new`: in the plural where the
    mention is, with "a" or "an" and a capital as needed."""
    # surely plural: "skis" is both, and counts as singular
    plurals = {plural(phrase) for phrase in vocabulary if plural(phrase) != phrase}
    article = r"\1n " if new[0] in "aeiou" else r"\1 "
    for start, end, name in reversed(mention_spans(text, vocabulary)):
        if name == old:
            word = plural(new) if spaced(text[start:end]) in plurals else new
            if text[start].isupper():
                word = word[0].upper() + word[1:]
            opening = re.sub(r"\b(a)n? $", article, text[:start], flags=re.IGNORECASE)
            text = opening + word + text[end:]
    return text


# ---- Readers: preference pairs as others publish them --------------------------------------------
SUFFIXES = (".parquet", ".json", ".jsonl")
LONGEST = 10_000  # characters of a text: some 2,500 tokens of English
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's words: TRL's


def turns_of(messages, role):
    """[(role, text)] of the messages of TRL (role, content: text or blocks) or LLaVA (from, value);
    a string is one turn of `role`."""
    if isinstance(messages, str):
        return [(role, messages)]
    turns = []
    for message in messages or ():
        speaker = message.get("role") or message["from"]
        content = message.get("content") or message.get("value") or ""
        if not isinstance(content, str):  # in parquet the picture's block has a "text" too: None
            content = "\n".join(block["text"] for block in content if block.get("text"))
        turns.append((ROLES.get(speaker, speaker), content))
    return turns


def from_messages(row, prompt="prompt", chosen="chosen", rejected="rejected"):
    """Pairs the last assistant turns; the prompt is what comes before, with roles if it is more
    than one turn."""
    contexts, pair = [], {}
    for side, field in (("chosen", chosen), ("rejected", rejected)):
        turns = turns_of(row[field], "assistant")
        while turns and turns[-1][0] != "assistant":  # nobody has answered these
            turns.pop()
        if not turns or not turns[-1][1].strip():
            raise Skip("no response", field)
        if turns[0][0] == "assistant":  # else it is the whole conversation
            turns = turns_of(row.get(prompt), "user") + turns
        contexts.append(turns[:-1])
        pair[side] = turns[-1][1]
    if contexts[0] != contexts[1]:
        raise Skip("chosen and rejected answer different questions", rejected)
    lines = [f"{role}: {text}" for role, text in contexts[0]]
    if len(lines) == 1:
        lines = [contexts[0][0][1]]
    return {"prompt": "\n".join(lines), **pair}


def from_own(row):
    TypeAdapter(list[common.Evidence]).validate_python(row["evidence"], strict=True)
    return {**row, **from_messages(row)}


def from_vl_rewardbench(row):
    # [0, 1]: response 0 is better, [1, 0]: response 1; else a ValueError, which skips the row
    best = [[0, 1], [1, 0]].index(row["human_ranking"])
    groups = {"RLAIF": "hallucination", "RLHF": "hallucination", "hallucination": "hallucination"}
    groups |= {"mathverse": "reasoning", "mmmu": "reasoning"}
    prefix = re.split("[_-]", row["id"])[0]  # by which the publishers tell the categories
    pair = {"prompt": row["query"], "category": groups.get(prefix, "general")}
    return {**pair, "chosen": row["response"][best], "rejected": row["response"][1 - best]}


from_povid = partial(from_messages, chosen="conversations", rejected="rejected_conversations")
from_rlaif_v = partial(from_messages, prompt="question")
FORMATS = {  # name: (the columns it is known by, its mapping); the first that fits
    "POVID": ({"conversations", "rejected_conversations"}, from_povid),
    "VL-RewardBench": ({"id", "query", "response", "human_ranking", "image"}, from_vl_rewardbench),
    "RLAIF-V": ({"question", "chosen", "rejected", "image"}, from_rlaif_v),
    "preferences.jsonl": ({"image", "prompt", "chosen", "rejected", "evidence"}, from_own),
    "TRL preferences": ({"chosen", "rejected"}, from_messages),
}


def pair_of(row):
    """(format name, {id or None, image as it stands there, prompt, chosen, rejected, ...})."""
    columns = set(row) if isinstance(row, dict) else set()
    name = next((name for name in FORMATS if FORMATS[name][0] <= columns), None)
    if name is None:
        raise Skip(f"columns of no known format ({', '.join(FORMATS)})", "?")
    try:
        pair = FORMATS[name][1](row)
        pair["prompt"] = re.sub(r"<image>\n?|\n<image>", "", pair["prompt"])
        if pair["chosen"].strip() == pair["rejected"].strip():
            raise Skip("identical responses", "rejected")
        for field in ("prompt", "chosen", "rejected"):
            pair[field].encode()  # half a character is a ValueError
            if len(pair[field]) > LONGEST:
                raise Skip(f"more than {LONGEST:,} characters", field)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # of other kinds of data
        raise Skip(f"not a row of {name}", f"? ({common.one_line(error)})") from None
    image = row.get("image") or row.get("images")
    return name, {"id": row.get("id"), "image": image, **pair}


def rows_of(file):
    """The rows of a parquet or JSON file (None: an empty line), or of a hub id's train split."""
    if file.suffix == ".parquet":  # 16 rows at a time and without readahead: pictures are large
        batches = ParquetFile(file, buffer_size=2**20, pre_buffer=False).iter_batches(16)
    elif file.suffix in SUFFIXES:
        text = file.read_text("utf-8-sig")
        if file.suffix == ".json" and text.lstrip().startswith("["):
            return json.loads(text)
        return (json.loads(line) if line.strip() else None for line in text.split("\n"))
    else:
        import datasets  # slow to import

        splits = datasets.load_dataset(*file.as_posix().split(":"))
        split = "train" if "train" in splits else next(iter(splits))  # or else its first
        batches = splits[split].with_format("arrow").iter(16)  # so pictures stay bytes
    return chain.from_iterable(batch.to_pylist() for batch in batches)


def read_rows(source):
    """((file, number from 1), row) of a file, of a folder's files, or of a hub id: see rows_of.
    Stops at what cannot be read."""
    path = Path(source)
    in_folder = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    for file in in_folder or [path]:
        number = 0
        try:
            for number, row in enumerate(rows_of(file), 1):
                if row is not None:
                    yield (file, number), row
        except Exception as error:  # not JSON, not parquet, no such data set, no connection
            stop(f"{file} row {number + 1}: {common.one_line(error)}")


def place_image(image, image_root, folder):
    """The path, from image_root or absolute, of a row's picture: a path, {"bytes", "path"}, or a
    list of one. Bytes are written as they are to folder/images/<hash>.<format>."""
    if isinstance(image, list):
        if len(image) > 1:
            raise Skip("more than one image", "images")
        image = next(iter(image), None)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    root = Path(image_root).resolve()
    file = None
    if isinstance(image, bytes):
        file = io.BytesIO(image)
    elif isinstance(image, (str, Path)):  # where the row says, or else right under the root
        places = root / image, root / Path(image).name
        file = next(filter(os.path.isfile, places), None)
    if file is None:
        raise Skip("missing image", "image")
    try:
        with Image.open(file) as picture:
            suffix = picture.format.lower().replace("jpeg", "jpg")
            picture.draft("RGB", (64, 64))  # JPEG is decoded at an eighth: fast, to its last byte
            common.as_seen(picture)
    except Exception:  # each decoder has its own kind
        raise Skip("picture that does not decode", "image") from None
    if isinstance(image, bytes):
        name = hashlib.sha256(image).hexdigest()[:32]
        file = Path(folder).resolve() / "images" / f"{name}.{suffix}"
        common.write_bytes(file, image)
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def read_pairs(source, image_root, folder, limit=None):
    """(format name, rows {id, image, prompt, chosen, rejected[, category, evidence]}, counts) of
    the first `limit` rows of a source; images: see place_image. For another data set add to FORMATS
    the columns it is known by and a mapping: row -> {prompt, chosen, rejected}, and id and image if
    its columns of these names do not hold them. Skip(reason, field) drops a row."""
    rows, counts = {}, Counter()  # rows by id
    for k, (origin, row) in enumerate(islice(read_rows(source), limit)):
        counts["rows read"] += 1
        try:
            name, pair = pair_of(row)
            pair["image"] = place_image(pair["image"], image_root, folder)
            pair["id"] = str(pair["id"] or f"{Path(pair['image']).stem}-{k}")
            while pair["id"] in rows:
                pair["id"] += f"-{k}"
            rows[pair["id"]] = pair
        except Skip as skip:
            count_skip(counts, skip, origin)
    common.gather(None)  # the first process has written all pictures
    if not rows:
        why = dict(counts) or "there is no row"
        stop(f"{source} holds no usable row: {why}; --image-root is {image_root}")
    print(f"{source}: read as {name}, {len(rows)} of {counts['rows read']} rows")
    return name, list(rows.values()), counts


def count_skip(counts, skip, origin):
    """Count a skipped row under its reason, in place, and name the first of each."""
    reason, field = skip.args
    counts[f"skipped: {reason}"] += 1
    if counts[f"skipped: {reason}"] == 1:
        print(f"skipped {origin[0]} row {origin[1]}, field {field}: {reason}")


def without_overlap(items, source, counts):
    """The items none of whose responses occurs in the evaluation set `source`, whatever their case
    and signs. Below 20 characters ("Yes, there is.") they recur by chance and do not count."""
    texts = set()
    for _, row in read_rows(source):
        with suppress(Skip):  # what is no pair has no responses
            _, pair = pair_of(row)
            texts |= {spaced(pair["chosen"]), spaced(pair["rejected"])}
    texts = {text for text in texts if len(text) >= 20}
    others = []
    for item in items:
        if texts.isdisjoint([spaced(item["chosen"]), spaced(item["rejected"])]):
            others.append(item)
    counts[f"excluded: text in {source}"] += len(items) - len(others)
    return others


# ---- Experts: find(images, questions) -> detections of each image --------------------------------
FLOOR = 0.01  # lowest confidence that an expert is asked for, and so the lowest --absent


class Detector:
    """Ultralytics weights; and the seam for another detector, which needs these two names:

    classes: all that it can find; None: it finds whatever it is asked about.
    find(images, questions): images are RGB pictures, as the judge sees them; questions has for each
    the classes to look for: with classes of its own always all of them. Returns for each a list
    of {"object": class, "confidence": in [0, 1], "box": [x1, y1, x2, y2] in pixels or None}."""

    def __init__(self, weights, device):
        os.environ.setdefault("YOLO_VERBOSE", "false")  # else the import tells of its settings
        pillow_open = Image.open
        from ultralytics import YOLO  # AGPL-3.0: imported only where it is used

        Image.open = pillow_open  # the import has put its own there, for the whole process
        if device in (None, "auto"):
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.device = torch.device(device)
        try:
            self.model = YOLO(weights)
        except Exception as error:  # of many kinds: no file, no detector, no connection
            stop(f"--expert {weights}: no weights of ultralytics; {common.one_line(error)}")
        self.classes = list(self.model.names.values())

    def find(self, images, questions):
        settings = {"conf": FLOOR, "device": self.device, "verbose": False}
        found = []
        for result in self.model.predict(images, batch=len(images), **settings):
            detections = []
            for *box, confidence, label in result.boxes.data.tolist():  # (boxes, 6)
                detection = {"object": result.names[int(label)], "confidence": round(confidence, 4)}
                detections.append({**detection, "box": [round(x, 1) for x in box]})
            found.append(detections)
        return found


class OwnAnswers:
    """--expert none: the policy checks itself, with confidence P(yes) / (P(yes) + P(no)) at the
    first token of its answer. The contract is Detector's."""

    def __init__(self, judge):
        self.classes = None
        self.judge = judge

    def find(self, images, questions):
        return [self.look(image, names) for image, names in zip(images, questions)]

    @torch.inference_mode()
    def look(self, image, names):
        if not names:
            return []
        model, processor = self.judge.loaded
        texts = [f"Is there a {name} in the image? Answer yes or no." for name in names]
        inputs = common.encode_prompts(processor, texts, [image] * len(texts)).to(model.device)
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]  # (names, V)
        words = processor.tokenizer(["yes", "Yes", "no", "No"], add_special_tokens=False).input_ids
        first = [ids[0] for ids in words]
        p = logits[:, first].float().softmax(-1)  # (names, 4), of these answers alone
        confidences = [round(p_yes, 4) for p_yes in p[:, :2].sum(-1).tolist()]
        return [{"object": n, "confidence": c, "box": None} for n, c in zip(names, confidences)]


class Detection(TypedDict):
    object: str
    confidence: Annotated[float, Field(ge=0, le=1)]
    box: NotRequired[list[FiniteFloat] | None]


class Finding(TypedDict):  # what an expert found: rows of detections.jsonl and of --detections
    key: NotRequired[str]
    image: str
    classes: NotRequired[list[str]]  # that it could have found; if missing, all of the vocabulary
    detections: list[Detection]


class Expert:
    """What --expert names, and what it has found in earlier starts; loaded when more is asked."""

    def __init__(self, args, folder, image_root, judge):
        self.path = folder / "detections.jsonl"
        self.image_root = Path(image_root)
        self.classes = None
        if args.expert == "none":
            self.load = cache(partial(OwnAnswers, judge))  # cache: once
            self.identity = {"expert": "none", "weights": judge.weights, "floor": FLOOR}
            return
        self.load = cache(partial(Detector, args.expert, args.device))
        # without "/" it is a name, and ultralytics puts the weights into the working directory
        name = str(Path(args.expert).resolve()) if "/" in args.expert else args.expert
        self.identity = {"expert": name, "floor": FLOOR}
        path = folder / "classes.json"  # or it would be loaded each time, just to say its classes
        classes_of = common.read_json(path) if path.exists() else {}
        if name not in classes_of:
            classes_of[name] = self.load().classes
            common.write_json(path, classes_of)
        self.classes = classes_of[name]

    def find(self, questions):
        """{image: finding {classes, detections}} for {image: classes to ask about}."""
        if self.classes:  # it looks for all of them, whatever it is asked
            questions = dict.fromkeys(questions, self.classes)
        tasks = []
        for image, names in questions.items():
            tasks.append(({**self.identity, "image": image, "names": names}, (image, names)))
        rows = common.kept(self.path, Finding, tasks, self.find_chunk, 256, "detections")
        return {row["image"]: {**row, "classes": questions[row["image"]]} for row in rows}

    def find_chunk(self, chunk, bar):
        batches = [chunk[start : start + 32] for start in range(0, len(chunk), 32)]
        found = common.share_out(batches, self.find_batch)
        bar.update(len(chunk))
        return [{"image": image, "detections": seen} for (image, _), seen in zip(chunk, found)]

    def find_batch(self, batch):
        images, questions = zip(*batch)
        pictures = [common.load_image(self.image_root / image) for image in images]
        return self.load().find(pictures, questions)


def read_detections(path, vocabulary):
    """{image: finding {classes, detections}} of a file of findings made elsewhere."""
    classes = sorted(set(vocabulary.values()))
    findings, names = {}, set()
    for row in common.read_rows(path, Finding):
        findings[row["image"]] = {"classes": classes, **row}
        names.update(found["object"] for found in row["detections"])
    if names and names.isdisjoint(classes):  # spelled otherwise, everything would count as absent
        stop(f"{path}: no class ({sorted(names)[:5]}) is of --vocabulary ({classes[:5]})")
    return findings


# ---- What to verify, candidates, questions -------------------------------------------------------
def read_images(images, image_root, prompts, limit, seed, folder):
    """(rows {id, image, prompt}, Counter) of the first `limit` pictures under the folder `images`;
    a picture's name decides which of the prompts it gets."""
    images = Path(images).resolve()
    if not images.is_dir():
        stop(f"--images {images} is no folder")
    paths, counts = [], Counter()
    for path in sorted(path for path in images.rglob("*") if not path.is_dir()):
        suffix = path.suffix.lower()
        if any(part.startswith(".") for part in path.relative_to(images).parts):
            counts["skipped: hidden file"] += 1
        elif suffix in Image.registered_extensions():
            paths.append(path)
        else:
            counts[f"skipped: no decoder for {suffix or 'files without a suffix'}"] += 1
    rows, of_stem = [], Counter()
    for number, path in enumerate(paths[:limit], 1):
        counts["rows read"] += 1
        try:
            if not path.is_file():  # a broken link: place_image might take a file of its name
                raise Skip("missing image", "image")
            image = place_image(path, image_root, folder)
            prompt = prompts[row_seed(seed, "prompt", path.name) % len(prompts)]
            stem = path.relative_to(images).with_suffix("").as_posix()
            rows.append({"id": f"{stem}-{of_stem[stem]}", "image": image, "prompt": prompt})
            of_stem[stem] += 1  # a.jpg and a.png have one stem
        except Skip as skip:
            count_skip(counts, skip, (path, number))
    return rows, counts


def default_image_root(source, run):
    """Where image paths start if --image-root does not say: the folder of pictures or JSON files;
    for parquet and hub ids the run directory, in which their pictures are unpacked."""
    path = Path(source)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        return path
    return path.parent if path.suffix in (".json", ".jsonl") else run


def load_items(args, folder):
    """(image root, rows {id, image, prompt[, chosen, rejected]}, Counter of what was read)."""
    root = args.image_root or default_image_root(args.images or args.pairs, args.run)
    root = Path(root).resolve()
    if args.pairs:
        _, items, counts = read_pairs(args.pairs, root, folder, args.limit)
    else:
        prompts = WORDS["prompts"]
        if args.prompts:
            lines = Path(args.prompts).read_text("utf-8-sig").split("\n")
            prompts = [line.strip() for line in lines if line.strip()] or prompts
        items, counts = read_images(args.images, root, prompts, args.limit, args.seed, folder)
    for source in args.exclude:
        items = without_overlap(items, source, counts)
    return root, items, counts


def write_candidates(args, items, judge, image_root, path, counts):
    """{item id: the policy's finished texts}; counts all; path: where they are kept."""
    requests = [{**item, "text": item["prompt"]} for item in items]
    sampling = {"n": args.candidates, "temperature": args.temperature, "seed": args.seed}
    sampling |= {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    answers = common.ask(path, judge, requests, "candidates", image_root=image_root, **sampling)
    texts = {}
    for item, samples in zip(items, answers):
        finished = [answer["text"].strip() for answer in samples if answer["complete"]]
        texts[item["id"]] = finished
        counts["candidates written"] += len(samples)
        counts["  dropped: unfinished"] += len(samples) - len(finished)
    return texts


def plan_questions(items, mentions, may_swap, seed):
    """({id: classes that may be swapped in}, {image: classes to ask the expert about}).
    mentions: {id: list of mentions for each text}; may_swap: the classes to propose."""
    co_occurrence = Counter()  # {frozenset of two classes: texts that mention both}
    for of_text in chain(*mentions.values()):
        co_occurrence.update(map(frozenset, combinations(of_text, 2)))
    swaps, questions = {}, {}
    for item in items:
        key, image = item["id"], item["image"]
        named = list(dict.fromkeys(chain(*mentions[key])))
        rng = random.Random(row_seed(seed, "swap", key))
        swaps[key] = propose_swaps(named, co_occurrence, may_swap, rng)
        questions[image] = list(dict.fromkeys(questions.get(image, []) + named + swaps[key]))
    return swaps, questions


# ---- The contact sheet: what a person should look at before training on the pairs ----------------
STATUS_COLOURS = {"present": "limegreen", "absent": "red", "unsure": "darkorange"}


def draw_contact_sheet(path, rows, image_root):
    """The first 12 pairs: boxes in the colours of their status, both responses, each object."""
    figure = Figure((14, 16), layout="constrained")
    nothing = {"frame_on": False, "xticks": (), "yticks": (), "anchor": "N"}
    style = {"va": "top", "fontsize": 8, "parse_math": False}
    for axis, row in zip(figure.subplots(3, 4, subplot_kw=nothing).flat, rows):
        picture = common.load_image(Path(image_root) / row["image"])
        axis.imshow(picture)
        lines = [row["image"][-40:], f"+ {row['chosen']}", f"- {row['rejected']}"]
        for found in row["evidence"]:
            colour = STATUS_COLOURS[found["status"]]
            label = f"{found['object']} {found['confidence']:.2f}"
            lines.append(f"{found['status']}: {label}")
            if found["box"] is not None and found["status"] != "absent":
                x1, y1, x2, y2 = found["box"]
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2))
                x = min(max((x1 + x2) / 2, 0.2 * picture.width), 0.8 * picture.width)
                axis.text(x, y1, label, ha="center", backgroundcolor=colour, **style)
        text = "\n".join(textwrap.fill(line, 48, max_lines=6) for line in lines)
        text = text.encode(errors="backslashreplace").decode()  # a file's name may be no UTF-8
        axis.text(0, -0.03, text, transform=axis.transAxes, **style)
    figure.savefig(path, dpi=80)


# ---- Arguments and main --------------------------------------------------------------------------
def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    data = parser.add_argument_group("the data")
    add = data.add_mutually_exclusive_group(required=True).add_argument
    add("--images", help="folder of images for which the policy writes responses")
    add("--pairs", help="published pairs instead: file, folder, or hub id[:config]")
    add = data.add_argument
    add("--image-root", help="where image paths start; else --images, or the folder of --pairs")
    add("--exclude", nargs="+", default=[], help="evaluation sets whose responses are left out")
    add("--prompts", help="text file, one prompt per line, instead of those of assets/words.toml")
    add("--limit", type=common.whole(1), help="read only the first so many images or rows")
    splits = parser.add_argument_group("splits: a number of pairs, or a share of them below 1")
    add = partial(splits.add_argument, type=common.real(0, 10**9))
    add("--validation", help="to watch training in 03 and 04 (a tenth, 200 at most)")
    add("--heldout", help="to be judged by 05 (a tenth, 500 at most)")
    add("--train", help="for 02's critiques (half of what is left, 5000 at most); the rest: 04's")
    add = parser.add_argument_group("the expert, which says what is in the image").add_argument
    add("--expert", default="yolo11x.pt", help="ultralytics' weights, or none: the policy itself")
    add("--detections", help="findings made elsewhere instead, as in detections.jsonl")
    add("--vocabulary", help="json {phrase: class}; else the expert's or COCO's, with synonyms")
    add("--present", type=common.real(FLOOR, 1), default=0.5, help="it is there from here on (0.5)")
    add("--absent", type=common.real(FLOOR, 1), default=0.05, help="it is not, below (0.05)")
    add = parser.add_argument_group("the policy, which writes the candidates").add_argument
    add("--model", default="Qwen/Qwen2-VL-7B-Instruct", help="hub id or folder; later the judge")
    add("--max-image-tokens", type=common.whole(1, 100_000), help="of an image, for all stages")
    add("--candidates", type=common.whole(1, 1000), default=4, help="K, responses per image (4)")
    add("--temperature", type=common.real(0, 100), default=1.0, help="of the candidates (1.0)")
    add("--max-new-tokens", type=common.whole(1, 100_000), default=256, help="of each (256)")
    args = parser.parse_args(argv)
    if args.exclude and args.images:
        parser.error("--exclude compares given responses: it goes with --pairs")
    if args.absent > args.present:
        parser.error(f"need --absent {args.absent} <= --present {args.present}")
    return args


def warn_of_small_splits(sizes, args, when):
    for split, size in sizes.items():
        if size < 2 and getattr(args, split, None) != 0:
            flag = "lower the others" if split == "pool" else f"raise --{split}"
            print(f"warning: {when} too few pairs in split {split} for a later stage: {flag}")


def main(args):
    folder = common.start_stage(args, "01_preferences")

    # 1. What to verify, who writes, who verifies --------------------------------------------------
    image_root, items, counts = load_items(args, folder)
    sizes = split_sizes(len(items), args.validation, args.heldout, args.train)
    warn_of_small_splits(sizes, args, f"of {len(items)} rows:")
    if Path(args.model).exists():  # else it is a hub id
        args.model = str(Path(args.model).resolve())
    judge = common.Judge(args.model, device=args.device, max_image_tokens=args.max_image_tokens)
    vocabulary = read_vocabulary(args.vocabulary) if args.vocabulary else COCO_VOCABULARY
    if args.detections:
        findings = read_detections(args.detections, vocabulary)
        unseen = [item for item in items if item["image"] not in findings]
        counts["skipped: image without a row in --detections"] = len(unseen)
        items = [item for item in items if item["image"] in findings]
    else:
        expert = Expert(args, folder, image_root, judge)
        if expert.classes and not args.vocabulary:
            vocabulary = build_vocabulary(expert.classes, SYNONYMS)

    # 2. Candidates, mentions, findings ------------------------------------------------------------
    if args.images:
        texts = write_candidates(args, items, judge, image_root, folder / "answers.jsonl", counts)
    else:
        texts = {item["id"]: [item["chosen"], item["rejected"]] for item in items}
    may_swap = sorted(set(vocabulary.values())) if args.images else []  # given pairs stay as given
    mentions = {}  # {id: list of mentions for each text}
    for key, of_item in texts.items():
        mentions[key] = [find_mentions(text, vocabulary) for text in of_item]
    swaps, questions = plan_questions(items, mentions, may_swap, args.seed)
    if not args.detections:
        findings = expert.find(questions)

    # 3. Pairs -------------------------------------------------------------------------------------
    rows = []
    for item in items:
        key, image = item["id"], item["image"]
        finding = findings[image]
        detections, classes = finding["detections"], finding["classes"]
        status = verify(questions[image], detections, args.present, args.absent, classes)
        counts.update(f"mentions {status[name]}" for name in dict.fromkeys(chain(*mentions[key])))
        candidates = list(zip(texts[key], mentions[key]))
        try:
            pair = build_pair(item, candidates, swaps[key], finding, status, vocabulary, args.seed)
            rows.append(pair)
        except Skip as skip:
            counts[f"dropped: {skip}"] += 1
    counts["pairs made"] = len(rows)
    if not rows:
        stop(f"no pair could be made: {dict(counts)}; try another --vocabulary or --expert")
    sizes = split_sizes(len(rows), args.validation, args.heldout, args.train)
    rows = assign_splits(rows, sizes, args.seed)

    # 4. Save and report ---------------------------------------------------------------------------
    (folder / "meta.json").unlink(missing_ok=True)  # not complete, until finish_stage
    common.write_jsonl(folder / "preferences.jsonl", rows)
    common.write_json(folder / "vocabulary.json", vocabulary)
    draw_contact_sheet(folder / "contact_sheet.png", rows, image_root)
    counts.update(f"  {row['source']} pairs" for row in rows)
    counts.update(f"  in split {row['split']}" for row in rows)
    warn_of_small_splits(sizes, args, "there are")
    run = Path(args.run).resolve()
    is_inside = image_root.is_relative_to(run)  # then the run can be moved
    args.image_root = str(image_root.relative_to(run) if is_inside else image_root)
    common.finish_stage(folder, args, counts, "python 02_generate_critiques.py")


if __name__ == "__main__":
    common.run(main, parse_args())
