"""01  Preference pairs from a vision expert: the better response names nothing that is absent.

    status(o) = present  if the best detection of class o has confidence >= --present
                absent   if it has confidence < --absent (0 where nothing was detected)
                unsure   between the two, or where the expert does not know the class
    chosen:   no absent mention, and the most present ones
    rejected: at least one absent mention, and the most present ones

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) "not detected" is weak evidence, so nothing is decided in the band between present and absent
     (what the detector misses altogether is absent all the same: --truth in 05 counts such errors);
  2) where no candidate hallucinates, a rejected response is made by swapping one present object of
     the chosen text for a verified absent one (source: "swapped"), preferably one that co-occurs
     with the scene's objects in this corpus;
  3) --expert none is the paper's ablation made exact: the policy's own P(yes) to "Is there a ... in
     the image?" is the only check.

Reads  pictures (--images), for which the policy writes responses, or published pairs (--pairs).
Writes 01_preferences/: candidates.jsonl, detections.jsonl, vocabulary.json, contact_sheet.png and
       preferences.jsonl, whose rows load as a TRL vision preference set:
    {"id": "01011-0", "image": "images/01011.png", "prompt": "List the objects in the image.",
     "chosen": "yellow circle, green triangle.", "rejected": "yellow circle, red cross.",
     "source": "swapped", "hallucinated": ["red cross"], "evidence": [
      {"object": "yellow circle", "claimed_by": "both", "status": "present",
       "confidence": 0.6447, "box": [29.9, 4.8, 49.9, 24.4]},
      {"object": "green triangle", "claimed_by": "chosen", "status": "present",
       "confidence": 0.878, "box": [60.6, 33.2, 78.7, 51.0]},
      {"object": "red cross", "claimed_by": "rejected", "status": "absent",
       "confidence": 0.0, "box": null}], "split": "validation"}

    python 01_build_preferences.py --images coco/train2017   # Qwen2-VL-7B writes, YOLO11x verifies
    python 01_build_preferences.py --pairs openbmb/RLAIF-V-Dataset \\
        --exclude MMInstruction/VL-RewardBench               # given pairs are checked instead
"""

import binascii
import hashlib
import io
import json
import os
import random
import re
import shlex
import tomllib
from collections import Counter, defaultdict
from contextlib import suppress
from functools import partial
from itertools import combinations, groupby, islice, pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.patches import Rectangle
from PIL import Image
from pyarrow import ipc
from pyarrow.parquet import ParquetFile

import common
from common import RANK, RowWriter, row_seed, stop

PROMPTS = [
    "Describe this image in detail.",
    "What objects are in this image?",
    "Write a caption that names what you see.",
    "What is happening in this picture?",
    "Describe the scene and the objects in it.",
]


# ---- The method: verification and pairing --------------------------------------------------------
# "Needs:" in a docstring, here and in later scripts, names what to copy along with a function.
def known_classes(classes, finding, all_names):
    """What the expert could have found in a picture, of which `finding` is what it has found.

    classes: its own, None for an open expert and for findings that are given.
    """
    if classes is not None:
        return classes
    if "asked" in finding:  # an open expert finds what it is asked about
        return finding["asked"]
    return all_names


def verify(mentions, detections, present, absent, known):
    """{object: "present" | "absent" | "unsure"} of the mentions, from each one's best detection.

    detections: list of {"object", "confidence" in [0, 1]}; present, absent: the two thresholds,
    absent <= present; known: the classes that the expert can find.
    """
    status = {}
    for name in mentions:
        confidences = [found["confidence"] for found in detections if found["object"] == name]
        best = max(confidences, default=0.0)
        status[name] = "unsure"
        if name in known and best >= present:
            status[name] = "present"
        elif name in known and best < absent:
            status[name] = "absent"
    return status


def pair_candidates(candidates, status, swaps, vocabulary, rng):
    """(chosen, rejected, source), or (None, None, reason) where no pair can be made.

    candidates: list of (text, mentions); status: of all mentions, as from verify; swaps: absent
    objects to put in where no candidate hallucinates, the preferred first; vocabulary: {phrase:
    class}; rng: random.Random of this row. Ties go to the earlier candidate. Needs: swap_object
    """
    clean, faulty = [], []  # of (text, objects that are there)
    for text, mentions in candidates:
        there = [name for name in mentions if status[name] == "present"]
        if any(status[name] == "absent" for name in mentions):
            faulty.append((text, there))
        elif there:
            clean.append((text, there))

    def n_there(candidate):
        return len(candidate[1])

    if not clean:
        return None, None, "no candidate without hallucination"
    chosen, there = max(clean, key=n_there)
    if faulty:  # as much right as possible, so that the pair differs in what is wrong
        return chosen, max(faulty, key=n_there)[0], "sampled"
    if not swaps:
        return None, None, "no candidate hallucinates, no absent object to swap in"
    return chosen, swap_object(chosen, rng.choice(there), swaps[0], vocabulary), "swapped"


def check_given_pair(chosen, rejected, status):
    """None where the expert agrees with a given pair, else the reason to drop it.

    chosen, rejected: the objects that each response mentions; status: of all of them.
    """
    if not chosen and not rejected:
        return "names no object of the vocabulary"
    if any(status[name] == "absent" for name in chosen):
        return "chosen hallucinates by the expert"
    if not any(status[name] == "absent" for name in rejected):
        return "rejected does not hallucinate by the expert"
    return None


def propose_swaps(mentions, co_occurrence, classes, rng, n=8):
    """n unmentioned classes to ask the expert about, for a scene that mentions others.

    They are drawn without repeats, with weight 1 + how often they are mentioned together with the
    scene's objects in this corpus: the plausible errors, which a language prior makes.
    """
    draws = {}
    for name in classes:
        if name not in mentions:
            weight = 1 + sum(co_occurrence[frozenset((name, other))] for other in mentions)
            # The n largest u ** (1 / weight), u uniform in [0, 1), are n weighted draws without
            # replacement (Efraimidis and Spirakis, 2006).
            draws[name] = rng.random() ** (1 / weight)
    return sorted(draws, key=draws.get, reverse=True)[:n]


def gather_evidence(chosen, rejected, detections, status):
    """[{object, claimed_by, status, confidence, box}] for the mentions of both responses."""
    evidence = []
    for name in dict.fromkeys(chosen + rejected):
        claimed_by = "chosen" if name in chosen else "rejected"
        if name in chosen and name in rejected:
            claimed_by = "both"
        found = [detection for detection in detections if detection["object"] == name]
        nothing = {"confidence": 0.0, "box": None}
        best = max(found, key=lambda detection: detection["confidence"], default=nothing)
        # A swap may form a name that nobody asked about: "hot cat" -> "hot dog".
        row = {"object": name, "claimed_by": claimed_by, "status": status.get(name, "unsure")}
        evidence.append({**row, "confidence": best["confidence"], "box": best.get("box")})
    return evidence


def build_pair(item, texts, mentions, swaps, detections, status, vocabulary, seed):
    """(preference row, None) or (None, reason for the drop).

    item: {id, image, prompt}, of a given pair also chosen and rejected; texts and their mentions:
    the candidates, or the given two; swaps: proposed classes; status: of all mentions and swaps.
    """
    if "chosen" in item:
        reason = check_given_pair(mentions[0], mentions[1], status)
        chosen, rejected, source = item["chosen"], item["rejected"], "given"
    else:
        candidates = list(zip(texts, mentions))
        absent = [name for name in swaps if status[name] == "absent"]
        rng = random.Random(row_seed(seed, "pair", item["id"]))
        chosen, rejected, source = pair_candidates(candidates, status, absent, vocabulary, rng)
        reason = source if chosen is None else None  # then the third value says why
    if reason:
        return None, reason
    named = find_mentions(chosen, vocabulary), find_mentions(rejected, vocabulary)
    evidence = gather_evidence(*named, detections, status)
    hallucinated = [found["object"] for found in evidence if found["status"] == "absent"]
    # The swapped text was read anew: "dog" swapped in behind "hot" is a hot dog, never verified.
    if not hallucinated:
        return None, "the swap names nothing absent"
    row = {"id": item["id"], "image": item["image"], "prompt": item["prompt"]}
    row |= {"chosen": chosen, "rejected": rejected, "source": source}
    return {**row, "hallucinated": hallucinated, "evidence": evidence}, None


def assign_splits(rows, n_validation, n_train, seed):
    """Rows with "split": the first n_validation pairs (for 03 and 04 to watch), n_train pairs for
    02's critiques, the rest the pool of 04. Images are shuffled, and none falls into two splits.
    """

    def place(row):
        return row_seed(seed, "split", row["image"])

    placed = []
    for _, of_image in groupby(sorted(rows, key=place), key=place):
        split = "pool"
        if len(placed) < n_validation:
            split = "validation"
        elif len(placed) < n_validation + n_train:
            split = "train"
        placed += [{**row, "split": split} for row in of_image]
    return placed


# ---- Mentions: which of the vocabulary's objects a text says are there ---------------------------
WORDS = tomllib.loads((Path(__file__).parent / "assets" / "words.toml").read_text("utf-8"))


def spaced(phrase):
    """'Fire_Truck' -> 'fire truck': how a phrase stands in a vocabulary."""
    return re.sub(r"[\W_]+", " ", phrase.lower()).strip()


def plural(phrase):
    """'red circle' -> 'red circles', 'glass of wine' -> 'glasses of wine', 'skis' -> 'skis'."""
    noun, of, rest = phrase.partition(" of ")
    rules = WORDS["plurals"]  # pairs of what a singular ends in and its plural; the first that fits
    ending, new = next(rule for rule in rules if re.search(rule[0], noun))
    return re.sub(ending, new, noun) + of + rest


def build_vocabulary(class_names, synonyms=None):
    """{phrase: class}: names and synonyms ({class: [phrases]}) with their plurals, spaced."""
    vocabulary = {}
    for name in class_names:
        for phrase in [name, *(synonyms or {}).get(name, [])]:
            vocabulary[spaced(phrase)] = name
            vocabulary[plural(spaced(phrase))] = name
    return vocabulary


def read_vocabulary(path):
    """{phrase: class} of a JSON file, the phrases spaced."""
    vocabulary = {}
    for phrase, name in common.read_json(path).items():
        if not common.fits(name, common.SHORT) or not spaced(phrase):
            stop(f"{path}: {phrase!a}: {name!a} is no phrase and its class")
        vocabulary[spaced(phrase)] = name
    if not vocabulary:
        stop(f"{path} holds no phrase")
    return vocabulary


SYNONYMS = WORDS["coco"]  # {class: [phrases]}
# {phrase: None}: "dog park", which names no dog
NOT_OBJECTS = dict.fromkeys(build_vocabulary(WORDS["nothing"]))
COCO_VOCABULARY = build_vocabulary(SYNONYMS, SYNONYMS)  # {phrase: one of the 80 class names}

# A denial is a cue and the words after it, up to one that opens another thought: "a man with no
# shirt eating a donut" has a donut, "not eating a donut" has none.
CUE = r"""
    # these deny what is definite, too: "without the dog"
    (?: without | instead\ of | rather\ than | lack(?:s|ing)
      | (?:absence|devoid|free|lack|no\ (?:signs?|traces?|evidence))\ of
    )(?:\ (?:the|its|his|her|their))?
    # "no dog", but not "No, a dog" or "no fewer than two dogs"
  | no (?!\ (?:doubt|more|less|fewer|longer|matter|wonder|problem|one)\b) (?=\ \w)
  | neither | never | nor (?:\ (?:is|are|was|were)\ there)?
    # "is not a dog", but not "not only a dog" or "not far from a dog"
  | (?:\w+n't|not|cannot)
    (?!\ (?:only|just|merely|simply|to\ mention|far|too|very|sure|clear|necessarily|all|every
         |many|much|yet|fully|entirely|completely|quite|directly)\b)
"""
OTHER_THOUGHT = r"""
    # another clause
    but|with|while|although|though|however|except|besides|that|which|who|where|because
  | since|so|as|is|are|was|were|has|can|there|it|he|she|they|you|we|just|only
  | instead (?!\ of)
    # what is definite exists: "not looking at the dog"
  | the|this|these|those|his|her|their|its
    # a place: "no dog on a bench"
  | on|in|at|near|behind|under|beside|next|around|along|between|from|by|over|through|for|into
  | to (?!\ (?:be|have|contain|include|show)\b)
    # another thing: "no dog and a cat"
  | and\ (?:an?|one|two|three|some|several)
    # what is done: "no shirt eating a donut", but not "not eating", "can't be eating"
  | (?<!not\ )(?<!n't\ )(?<!be\ )(?<!without\ ) \w+ing\ an?
"""
# A word, or what stands between words; a comma only in a list with "or": "no cars, buses or vans".
STILL_DENIED = r"\w+ | [^\w,.;:!?\n()—] | , (?!\ nor\b) (?= [^.;:]{0,60} \bor\b)"
DENIED = re.compile(  # "not in any car" goes on, in spite of "in"
    rf"\b(?:{CUE})\b (?: (?! \b(?:{OTHER_THOUGHT})\b (?!\ any\b) ) (?:{STILL_DENIED}) )*",
    re.VERBOSE,
)
# The same after the mention: "a cat and a dog are not visible", but "a bus is missing a wheel"
NOT_THERE = re.compile(
    r"""
    (?: ,?\ (?:and|or|nor)\ [\w\ ]{1,20}? )?  # another thing that is not there either
    \ (?: (?:cannot|can't|can\ not)\ be\ (?:seen|found)
      | (?:is|are|was|were)
        (?: \ (?: absent | nowhere | missing (?!\ an?\b) )
          | (?:\ not|n't)\ (?:present|visible|seen|shown|depicted|there
              |in\ (?:the|this)\ (?:image|picture|photo|scene))
        )
    )\b
    """,
    re.VERBOSE,
)
# "orange" or "football" is an object only after an article or a fruit, and before the end, a
# punctuation mark or one of the words below: "an orange", "an apple or orange", no "orange cat".
RARELY_THINGS = ("orange", "baseball", "basketball", "football", "volleyball")
AS_A_THING = re.compile(
    rf"""
    \b(?: an?|one|the|whole|half|peeled|sliced|fresh
        | (?:apple|banana|lemon)s?,?(?:\ and|\ or)?  # "an apple, orange and kiwi"
      )\ ({"|".join(RARELY_THINGS)})
    (?= $ | [^\w\s,-] | ,?\ (?: (?:and\ )?(?:an?|the|one|two|some)  # but "an orange and white cat"
      | or|is|in|on|at|near|next|beside|with|that|which|from|to|towards?|into|through|over|under
      | behind|while|as|across|sits|lying|sitting)\b )
    """,
    re.VERBOSE,
)


def find_mentions(text, vocabulary):
    """Classes that the text says are there, by first mention; vocabulary: {phrase: class}.

    The denials are English. Phrases are whole words: in a script that sets no spaces between words
    one is found only where it stands alone.

    >>> find_mentions("No cats, only a dog park, two men with a teddy bear.", COCO_VOCABULARY)
    ['person', 'teddy bear']
    """
    return list(dict.fromkeys(name for _, _, name in mention_spans(text, vocabulary)))


def find_phrases(text, phrases):
    """[(start, end, phrase)] from left to right: whole words, at each word the longest phrase.

    phrases: spaced, so they mean nothing but themselves in a regular expression.
    """
    plain = re.sub(r"[\s_'-]", " ", text)
    longest_first = sorted(phrases, key=len, reverse=True)
    matches = re.finditer(rf"\b(?:{'|'.join(longest_first)})\b", plain)
    return [(match.start(), match.end(), match.group()) for match in matches]


def mention_spans(text, vocabulary):
    """[(start, end, class)] of each mention in the text, from left to right; see find_mentions."""
    # as long as the text, or the spans would be off: "İ" alone has a longer lower case
    text = text.replace("’", "'").replace("İ", "i").lower()
    phrases = NOT_OBJECTS | vocabulary  # the vocabulary wins
    # what is denied is blotted out, so that no phrase is found there
    said = DENIED.sub(lambda denied: "." * len(denied.group()), text)
    things = {match.start(1) for match in AS_A_THING.finditer(text)}
    found = [*find_phrases(said, phrases), (len(text), len(text), "")]  # the last has no follower
    mentions = []
    for (start, end, phrase), (next_start, _, follower) in pairwise(found):
        # Of two nouns in a row the last is the thing: "baby elephant", "hot dog vendor". A follower
        # of two words begins anew: "a cup dining table" is a list without its comma.
        qualifies = follower and said[end:next_start] == " " and " " not in follower
        if qualifies or re.match(r"-\w", said[end : end + 2]):  # or "dog-friendly"
            continue
        if phrase in RARELY_THINGS and start not in things:
            continue
        # (matched in `text`: in `said`, "not visible" may be blotted out already)
        if phrases[phrase] is not None and not NOT_THERE.match(text, end):
            mentions.append((start, end, phrases[phrase]))
    return mentions


def swap_object(text, old, new, vocabulary):
    """The text with every mention of class `old` replaced by `new`: in the plural where the
    mention is, with "a" or "an" and a capital as needed."""
    # surely plural: "skis" is both, and counts as singular
    plurals = {plural(phrase) for phrase in vocabulary if plural(phrase) != phrase}
    for start, end, name in reversed(mention_spans(text, vocabulary)):
        if name != old:
            continue
        before = text[:start]
        word = new
        if spaced(text[start:end]) in plurals:
            word = plural(new)
        elif article := re.search(r"\b(an?) $", before, re.IGNORECASE):
            n = "n" if new[0] in "aeiou" else ""
            before = before[: article.start()] + article[1][0] + n + " "
        if text[start].isupper():
            word = word[0].upper() + word[1:]
        text = before + word + text[end:]
    return text


# ---- Readers: preference pairs as others publish them --------------------------------------------
class Skip(Exception):
    """Skip(reason, field): why a row cannot be used."""


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
        turns.append(({"human": "user", "gpt": "assistant"}.get(speaker, speaker), content))
    return turns


def from_messages(row, prompt="prompt", chosen="chosen", rejected="rejected"):
    """Pairs the last assistant turns; the prompt is what comes before, with roles if there are
    several turns. (A missing column is None: see pair_of.)
    """
    asked = turns_of(row[prompt], "user")
    contexts, responses = [], []
    for field in (chosen, rejected):
        turns = turns_of(row[field], "assistant")
        if turns[: len(asked)] != asked:  # the prompt is not repeated there
            turns = asked + turns
        while turns and turns[-1][0] != "assistant":
            turns.pop()
        if not turns:
            raise Skip("no response", field)
        contexts.append(turns[:-1])
        responses.append(turns[-1][1])
    questions = []
    for turns in contexts:
        questions.append([text for role, text in turns if role == "user"])
    if questions[0] != questions[1]:
        raise Skip("chosen and rejected answer different questions", rejected)
    text = "\n".join(f"{role}: {text}" for role, text in contexts[0])
    if len(contexts[0]) == 1:
        text = contexts[0][0][1]
    return {"prompt": text, "chosen": responses[0], "rejected": responses[1]}


def from_own(row):
    return {**row, **from_messages(row)}  # with the evidence, which stage 05 measures by


def from_vl_rewardbench(row):
    # Rank 0 is the better one; anything but these two is a ValueError, which skips the row.
    best = [[0, 1], [1, 0]].index(row["human_ranking"])
    prefix = re.split("[_-]", row["id"])[0]  # by which the publishers tell the categories
    category = "general"
    if prefix in ("RLAIF", "RLHF", "hallucination"):
        category = "hallucination"
    elif prefix in ("mathverse", "mmmu"):
        category = "reasoning"
    better, worse = row["response"][best], row["response"][1 - best]
    return {"prompt": row["query"], "chosen": better, "rejected": worse, "category": category}


from_povid = partial(from_messages, chosen="conversations", rejected="rejected_conversations")
from_rlaif_v = partial(from_messages, prompt="question")
FORMATS = {  # name: (the columns it is known by, its mapping); the first that fits
    "POVID": ({"conversations", "rejected_conversations"}, from_povid),
    "VL-RewardBench": ({"id", "query", "response", "human_ranking", "image"}, from_vl_rewardbench),
    "RLAIF-V": ({"question", "chosen", "rejected", "image"}, from_rlaif_v),
    "preferences.jsonl": ({"image", "prompt", "chosen", "rejected", "evidence"}, from_own),
    "TRL preferences": ({"chosen", "rejected"}, from_messages),
}


def hub_files(source):
    """The files of a hub data set id[:config], of its split "train" or else of its first; each is
    downloaded when it is asked for. (Streaming them with `datasets` hangs when it is left early.)
    """
    import datasets  # slow to import

    splits = datasets.load_dataset_builder(*source.split(":")).config.data_files
    for url in splits.get("train") or next(iter(splits.values())):
        yield datasets.DownloadManager(record_checksums=False).download(url)


def rows_of_file(file):
    """The rows of a parquet file, of a JSON array, or of JSON lines. (`datasets` streams such files
    too, but keeps six row groups, and takes JSON's types from the first rows, whatever follows.)
    """
    if file.suffix == ".arrow":  # as datasets' save_to_disk leaves them
        for batch in ipc.open_stream(file):
            yield from batch.to_pylist()
    elif file.suffix == ".parquet":
        # 16 rows at a time and without readahead: pictures are large
        for batch in ParquetFile(file, buffer_size=2**20, pre_buffer=False).iter_batches(16):
            yield from batch.to_pylist()
    else:
        text = file.read_text("utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        is_array = file.suffix == ".json" and text.lstrip().startswith("[")
        yield from json.loads(text) if is_array else map(json.loads, lines)


def read_rows(source):
    """((file, number from 1), row) of a parquet, json, jsonl or arrow file, of a folder of such (of
    those with "train" in their names, if there are any), or of a hub id[:config]; embedded pictures
    as {"bytes", "path"}. Stops at what cannot be read."""
    suffixes = (".parquet", ".json", ".jsonl", ".arrow")
    file = Path(source)
    files = [file]
    if file.is_dir():
        files = sorted(inner for inner in file.rglob("*") if inner.suffix in suffixes)
        files = [inner for inner in files if inner.suffix == ".arrow"] or files  # no dataset_info
        of_train = [inner for inner in files if is_of_train(inner.relative_to(file))]
        if of_train and of_train != files:
            print(f"{source}: of {len(files)} files these of split train are read: {len(of_train)}")
            files = of_train
    elif file.suffix not in suffixes:
        if file.exists():
            stop(
                f"{source} is of no kind that is read: {', '.join(suffixes)}, or a folder of these"
            )
        files = hub_files(str(source))
    number = 0
    try:
        for file in map(Path, files):
            number = 0
            for number, row in enumerate(rows_of_file(file), 1):
                yield (file, number), row
    except Exception as error:  # not JSON, not parquet, no such data set, no connection
        stop(f"{file} after row {number}: {common.one_line(error)}")


def is_of_train(path):
    """ "train-00000-of-00002.parquet", "train/x.json": as hub data sets name the split."""
    return re.search(r"(^|[\W_])train([\W_]|$)", path.as_posix()) is not None


def find_picture(name, root):
    """The file of a picture's name: as it is, its base name, or COCO's of 2014 and 2017."""
    names = [name, Path(name).name]
    if coco := re.search(r"^\d{1,12}$|(?<!\d)\d{12}(?=\.jpg$)", name):
        file = f"{int(coco[0]):012d}.jpg"
        names += [file, f"train2017/{file}", f"val2017/{file}"]
        for split in ("train2014", "val2014"):
            names += [f"COCO_{split}_{file}", f"{split}/COCO_{split}_{file}"]
    if common.SURROGATE.search(name):
        raise Skip("a file's name that is not UTF-8", "image")
    if re.match("https?://", name):
        raise Skip("image that is to be downloaded first", "image")
    with suppress(OSError, ValueError):  # a name that no file can have
        for candidate in names:
            if (root / candidate).is_file():
                return root / candidate
    raise Skip("missing image", "image")


def embedded(image):
    """The bytes of a picture that is not given by its name: as they are, or base64, alone or in a
    data URI; else None.
    """
    if not isinstance(image, str):
        return image if isinstance(image, bytes) else None
    # no file's name is so long and without a dot
    found = re.fullmatch(r"(?:data:[^,]*,)?([\w+/\s]{99,}=*)", image, re.ASCII)
    try:
        return binascii.a2b_base64(found[1]) if found else None
    except binascii.Error:
        raise Skip("picture that does not decode", "image") from None


def place_image(image, image_root, folder):
    """The path, from image_root or absolute, of a row's picture: a path, a COCO id, bytes, base64,
    {"bytes", "path"} of these, or a list of one. Bytes are written as they are to
    folder/images/<hash>.<format>."""
    if isinstance(image, list):
        if len(image) > 1:
            raise Skip("more than one image", "images")
        image = image[0] if image else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    data = embedded(image)
    root = Path(image_root).resolve()
    file = io.BytesIO(data) if data else find_picture(str(image or ""), root)
    try:
        with Image.open(file) as picture:
            kind = picture.format.lower().replace("jpeg", "jpg")
            picture.draft("RGB", (64, 64))  # JPEG is decoded at an eighth: fast, to its last byte
            common.as_seen(picture)
    except Exception:  # each decoder has its own kind
        raise Skip("picture that does not decode", "image") from None
    if data:
        name = hashlib.sha256(data).hexdigest()[:32]
        file = Path(folder).resolve() / "images" / f"{name}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{RANK}")
        unfinished.write_bytes(data)
        unfinished.replace(file)  # whole or not at all
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def pair_of(row):
    """(format name, {id, image as it stands there, prompt, chosen, rejected, ...}) of one row."""
    if not isinstance(row, dict):
        raise Skip("not an object", "?")
    fitting = [name for name, (columns, _) in FORMATS.items() if columns <= set(row)]
    if not fitting:
        raise Skip(f"columns of no known format ({', '.join(FORMATS)})", ", ".join(row))
    name = fitting[0]
    row = defaultdict(lambda: None, row)  # a missing column is None, for the mappings above
    try:
        image = row["image"] or row["images"]  # TRL has both names
        pair = {"id": row["id"], "image": image, **FORMATS[name][1](row)}
        for side in ("chosen", "rejected"):
            if not pair[side].strip():
                raise Skip("no response", side)
        if pair["chosen"].strip() == pair["rejected"].strip():
            raise Skip("identical responses", "rejected")
        pair["prompt"] = re.sub(r"<image>\n?|\n<image>", "", pair["prompt"] or "")
        names = ("prompt", "chosen", "rejected", "category", "evidence", "hallucinated")
        checked = {name: pair.get(name) for name in names}
        if wrong := common.misfit({**checked, "id": str(pair["id"] or "")}):
            raise Skip(wrong[1].partition(", not")[0], wrong[0])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Skip(f"not a row of {name}", f"? ({error!r})") from None
    return name, pair


def read_pairs(source, image_root, folder, limit=None):
    """(format name, rows {id, image, prompt, chosen, rejected[, category, evidence]}, counts) of
    the first `limit` rows of a source (see read_rows). Images are paths from image_root or
    absolute; embedded ones are written to folder/images. For another data set add to FORMATS the
    columns it is known by and a mapping: row (None for a missing column) -> {prompt, chosen,
    rejected}, and id and image if its columns of these names do not hold them. image: a path,
    bytes as {"bytes": ...}, or a list of one. Skip(reason, field) drops the row.
    """
    rows, counts = [], Counter()
    seen, ids = set(), set()  # texts with their picture, ids
    for k, (place, row) in enumerate(islice(read_rows(source), limit)):
        counts["rows read"] += 1
        try:
            name, pair = pair_of(row)
            pair["image"] = place_image(pair["image"], image_root, folder)
            content = tuple(pair[field] for field in ("prompt", "image", "chosen", "rejected"))
            if content in seen:
                raise Skip("duplicate row", "prompt")
        except Skip as skip:
            count_skip(counts, skip, place)
            continue
        seen.add(content)
        pair["id"] = str(pair["id"] or f"{Path(pair['image']).stem}-{k}")
        while pair["id"] in ids:
            pair["id"] += f"-{k}"
        ids.add(pair["id"])
        rows.append(pair)
    if not rows:
        why = dict(counts) or "there is no row"
        stop(f"{source} holds no usable row: {why}; --image-root is {image_root}")
    print(f"{source}: read as {name}, {len(rows)} of {counts['rows read']} rows")
    return name, rows, counts


def count_skip(counts, skip, place):
    """Count a skipped row under its reason, in place, and name the first of each."""
    reason, field = skip.args
    counts[f"skipped: {reason}"] += 1
    if counts[f"skipped: {reason}"] == 1:
        file, number = place
        print(f"skipped {file} row {number}, field {field}: {reason} (more are only counted)")


def without_overlap(items, source, counts):
    """Drops, and counts, the items one of whose responses occurs in the evaluation set `source`,
    compared without case, punctuation and spacing. Responses below 20 characters ("Yes, there is.")
    recur by chance and do not count.
    """

    def texts(row):
        responses = (row.get("chosen", ""), row.get("rejected", ""))
        return {" ".join(re.findall(r"\w+", response.lower())) for response in responses}

    known = set()
    for _, row in read_rows(source):
        with suppress(Skip):  # what is no pair has no responses
            known |= {text for text in texts(pair_of(row)[1]) if len(text) >= 20}
    kept = [item for item in items if not texts(item) & known]
    counts[f"excluded: text in {source}"] += len(items) - len(kept)
    return kept


# ---- Experts: find(images, questions) -> detections of each image --------------------------------
class Detector:
    """Ultralytics weights; and the seam for another detector, which needs these two names:

    find(images, questions): images are RGB pictures, as the judge sees them; questions has for each
    a list of class names, which a detector with classes of its own may ignore. Returns for each a
    list of {"object": class, "confidence": in [0, 1], "box": [x1, y1, x2, y2] in pixels or None}.
    classes: all that it can find; None: it finds whatever it is asked about, and nothing else.
    """

    def __init__(self, weights, floor, device, classes):
        """floor: lowest confidence that matters; classes: for open ones (YOLO-World)."""
        os.environ.setdefault("YOLO_VERBOSE", "false")  # else the import tells of its settings
        pillow_open = Image.open
        from ultralytics import YOLO  # AGPL-3.0: imported only where it is used

        Image.open = pillow_open  # the import has put its own there, for the whole process
        self.model, self.floor, self.device = YOLO(weights), floor, device
        if self.model.task not in ("detect", "segment", "pose"):
            raise ValueError(f"its weights are for the task {self.model.task!r}")
        if hasattr(self.model, "set_classes"):
            self.model.set_classes(classes)
        self.names = coco_names(self.model.names)
        self.classes = list(self.names.values())

    def find(self, images, questions):
        # Arrays, as OpenCV has them (BGR): PIL images would be turned by their EXIF tag.
        arrays = [np.asarray(image)[:, :, ::-1].copy() for image in images]
        settings = {"conf": self.floor, "device": self.device, "verbose": False}
        found = []
        for result in self.model.predict(arrays, batch=len(arrays), **settings):
            boxes = result.boxes
            found.append(as_detections(self.names, boxes.cls, boxes.conf, boxes.xyxy))
        return found


def as_detections(names, labels, scores, boxes):
    """Tensors (N,), (N,), (N, 4) -> list of detections; labels without a name are left out."""
    detections = []
    for label, score, box in zip(labels.tolist(), scores.tolist(), boxes.tolist()):
        if int(label) in names:
            box = [round(x, 1) for x in box]
            detections.append({"object": names[label], "confidence": round(score, 4), "box": box})
    return detections


def coco_names(names):
    """{label: class}. Labels that cover all of COCO's 80 classes get its spelling ("sofa" is couch)
    and lose the fillers between them ("N/A"); all others stay as they are.
    """
    spelled = {phrase.replace(" ", ""): name for phrase, name in COCO_VOCABULARY.items()}
    coco = {label: spelled.get(name.lower().replace(" ", "")) for label, name in names.items()}
    is_coco = len(names) <= 91 and set(coco.values()) >= set(SYNONYMS)  # with fillers they are 91
    return {label: name for label, name in coco.items() if name} if is_coco else dict(names)


class HubDetector:
    """Transformers detectors: with classes of their own (DETR, RT-DETR), or open ones, which are
    asked about names (GroundingDINO, OWLv2). The contract is Detector's.
    """

    def __init__(self, name, floor, device):
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        self.by_token = kind.endswith("grounding-dino")
        self.is_open = self.by_token or kind in ("owlv2", "owlvit")
        if self.is_open:
            loader = transformers.AutoModelForZeroShotObjectDetection
        else:
            loader = transformers.AutoModelForObjectDetection
        self.model = loader.from_pretrained(name).to(device).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(name)
        self.floor = floor
        self.names = {} if self.is_open else coco_names(self.model.config.id2label)
        self.classes = list(self.names.values()) or None

    def find(self, images, questions):
        found = []
        for image, asked in zip(images, questions):
            parts = [self.names]
            if self.is_open:  # GroundingDINO reads 256 tokens: 50 names of up to 4, and their dots
                parts = [dict(enumerate(asked[i : i + 50])) for i in range(0, len(asked), 50)]
            found.append(sum((self.look(image, names) for names in parts), []))
        return found

    @torch.inference_mode()
    def look(self, image, names):
        """One picture's detections; names: {label: class}, what open ones are asked about."""
        words = [spaced(name) for name in names.values()]
        question = {}
        if self.by_token:
            question = {"text": [words]}  # the processor makes "cat. teddy bear." of it
        elif self.is_open:
            texts = [f"a photo of a {word}" for word in words]
            question = {"text": [texts], "padding": "max_length", "truncation": True}
        inputs = self.processor(images=image, return_tensors="pt", **question)
        outputs = self.model(**inputs.to(self.model.device))
        if self.by_token:
            tokenizer = self.processor.tokenizer
            outputs.logits = name_logits(outputs.logits, inputs["input_ids"], tokenizer)
        image_processor = getattr(self.processor, "image_processor", self.processor)
        (result,) = image_processor.post_process_object_detection(
            outputs, threshold=self.floor, target_sizes=[(image.height, image.width)]
        )
        return as_detections(names, result["labels"], result["scores"], result["boxes"])


def name_logits(logits, input_ids, tokenizer):
    """GroundingDINO's logits of a question's tokens (1, Q boxes, L) -> of its names (1, Q, names).

    input_ids (1, T): [CLS] cat . teddy bear . [SEP]. A name's probability is the mean of its
    tokens'; transformers' own pipeline takes the best token's, so that every dog is a hot dog.
    """
    probability = logits.sigmoid()  # (1, Q, L)
    dot = tokenizer.convert_tokens_to_ids(".")
    start, of_name = 1, []  # after [CLS]
    for end in (input_ids[0] == dot).nonzero()[:, 0].tolist():
        of_name.append(probability[:, :, start:end].mean(-1))  # (1, Q)
        start = end + 1
    return torch.stack(of_name, -1).logit()  # (1, Q, names)


class OwnAnswers:
    """--expert none: the policy checks itself, with confidence P(yes) / (P(yes) + P(no)) at the
    first token of its answer. The contract is Detector's.
    """

    classes = None

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        words = ["yes", "Yes", "no", "No"]
        first = [ids[0] for ids in processor.tokenizer(words, add_special_tokens=False).input_ids]
        self.yes, self.no = first[:2], first[2:]

    @torch.inference_mode()
    def find(self, images, questions):
        found = [[] for _ in images]
        for image, names, detections in zip(images, questions, found):
            if not names:
                continue
            texts = [f"Is there a {name} in the image? Answer yes or no." for name in names]
            inputs = common.encode_prompts(self.processor, texts, [image] * len(texts))
            outputs = self.model(**inputs.to(self.model.device), logits_to_keep=1)
            logits = outputs.logits[:, -1].float()  # (names, V)
            odds = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)  # in nats
            for name, p in zip(names, odds.sigmoid().tolist()):
                detections.append({"object": name, "confidence": round(p, 4), "box": None})
        return found


def load_expert(name, floor, device, classes, model, processor):
    """The expert that --expert names; model and processor are the policy's."""
    try:
        if name == "none":
            return OwnAnswers(model, processor)
        if name.endswith(".pt"):
            return Detector(name, floor, device, classes)
        return HubDetector(name, floor, device)
    except Exception as error:  # of many kinds: no file, no detector, no connection, no package
        why = common.one_line(error)
        stop(f"--expert {name}: no *.pt of ultralytics, transformers detector or none; {why}")


# ---- What to verify, candidates, findings --------------------------------------------------------
def read_images(images, image_root, prompts, limit, seed, folder):
    """(rows {id, image, prompt}, Counter) of the first `limit` pictures under the folder `images`;
    a picture's name decides which of the prompts it gets.
    """
    if not images.is_dir():
        stop(f"--images {images} is no folder")
    kinds = {kind for kind, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = sorted(path for path in images.rglob("*") if path.is_file())
    paths = [path for path in files if path.suffix.lower() in kinds]
    rows, counts, of_stem = [], Counter(), Counter()
    counts["skipped: not a picture by its suffix"] = len(files) - len(paths)
    for path in paths[:limit]:
        counts["rows read"] += 1
        try:
            image = place_image(path, image_root, folder)
        except Skip as skip:
            count_skip(counts, skip, (path, 1))
            continue
        stem = path.relative_to(images).with_suffix("").as_posix()
        prompt = prompts[row_seed(seed, "prompt", path.name) % len(prompts)]
        rows.append({"id": f"{stem}-{of_stem[stem]}", "image": image, "prompt": prompt})
        of_stem[stem] += 1  # a.jpg and a.png have one stem
    return rows, counts


def default_image_root(source, run):
    """Where image paths start if --image-root does not say: the folder, or that of the file; of a
    hub id, which is neither, the run directory, into which its pictures are unpacked.
    """
    source = Path(source)
    if not source.exists():
        return run
    return source if source.is_dir() else source.parent


def root_of_unpacked(rows, image_root, folder):
    """Where the rows' image paths start: image_root; or folder, if all pictures were unpacked into
    it: the paths are then shortened, in place, so that the run directory can be moved.
    """
    unpacked = (folder / "images").resolve()
    if not all((Path(image_root) / row["image"]).is_relative_to(unpacked) for row in rows):
        return image_root
    for row in rows:
        row["image"] = f"images/{Path(row['image']).name}"
    return str(folder.resolve())


def load_items(args, folder):
    """(rows to verify {id, image, prompt[, chosen, rejected]}, Counter of what was read). Where all
    pictures were unpacked, args.image_root becomes the folder.
    """
    if args.pairs:
        _, items, counts = read_pairs(args.pairs, args.image_root, folder, args.limit)
        # (args.json, by which a later start is compared, was written with what was given)
        args.image_root = root_of_unpacked(items, args.image_root, folder)
    else:
        lines = common.read_text(args.prompts).split("\n") if args.prompts else PROMPTS
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            stop(f"--prompts {args.prompts} holds no prompt")
        images = Path(args.images).resolve()
        items, counts = read_images(images, args.image_root, prompts, args.limit, args.seed, folder)
    for source in args.exclude or ():
        items = without_overlap(items, source, counts)
    if not items:
        stop(f"no row is left: {dict(counts)}; relative paths start at --image-root")
    return items, counts


def write_candidates(items, model, processor, image_root, path, sampling):
    """Rows {**item, candidates: texts of the policy that end in a stop token, unfinished: number of
    those that do not, or are too long, and are left out}, kept in path; sampling: arguments of
    common.sample.
    """
    writer = RowWriter(path)
    size = max(1, common.CHUNK // sampling["n"])
    for chunk, bar in common.in_chunks(items, writer.is_done, size, "candidates"):
        requests = []
        for item in chunk:
            image = Path(image_root) / item["image"]
            requests.append({"id": item["id"], "image": image, "text": item["prompt"]})
        answers = common.sample(model, processor, requests, bar=bar, **sampling)
        for item, samples in zip(chunk, answers):
            texts = [answer["text"].strip() for answer in samples if answer["complete"]]
            texts = [text for text in texts if len(text) <= common.SHORT]
            unfinished = len(samples) - len(texts)
            writer.write({**item, "candidates": texts, "unfinished": unfinished})
    return writer.rows


def plan_questions(items, mentions, classes, seed):
    """({id: classes that may be swapped in}, {image: classes to ask the expert about}).

    mentions: {id: list of mentions for each text}; classes: those that may be swapped in.
    """
    co_occurrence = Counter()  # {frozenset of two classes: texts that mention both}
    for item in items:
        for named in mentions[item["id"]]:
            co_occurrence.update(frozenset(pair) for pair in combinations(named, 2))
    swaps, questions = {}, {}
    for item in items:
        key = item["id"]
        named = list(dict.fromkeys(sum(mentions[key], [])))
        rng = random.Random(row_seed(seed, "swap", key))
        swaps[key] = propose_swaps(named, co_occurrence, classes, rng)
        asked = questions.get(item["image"], []) + named + swaps[key]
        questions[item["image"]] = list(dict.fromkeys(asked))
    return swaps, questions


def find_objects(questions, expert, image_root, path):
    """{image: row {id, asked, detections}} for {image: classes asked about}, kept in path."""
    writer = RowWriter(path)
    rows = [{"id": image, "asked": asked} for image, asked in questions.items()]

    def find_batch(batch):
        pictures = [common.load_image(Path(image_root) / row["id"]) for row in batch]
        return expert.find(pictures, [row["asked"] for row in batch])

    for chunk, bar in common.in_chunks(rows, writer.is_done, 256, "detections"):
        batches = [chunk[start : start + 32] for start in range(0, len(chunk), 32)]
        for row, detections in zip(chunk, common.share_out(batches, find_batch)):
            writer.write({**row, "detections": detections})
        bar.update(len(chunk))
    return {row["id"]: row for row in writer.rows}


def read_detections(path, images, vocabulary):
    """{image: row {id, detections[, asked]}} of findings made elsewhere, for each of the images."""
    of_image = {row["id"]: row for row in common.read_jsonl(path, ("id", "detections"))}
    names, known = set(), set(vocabulary.values())
    for image in images:
        if image not in of_image:
            stop(f"{path} has no row for image {image!r}")
        names |= {found["object"] for found in of_image[image]["detections"]}
    if names and not names & known:  # spelled otherwise, everything would count as absent
        stop(f"{path}: no class ({sorted(names)[:5]}) is of the vocabulary ({sorted(known)[:5]})")
    if names - known:
        print(f"{path}: these classes are not of the vocabulary: {sorted(names - known)[:5]}")
    return of_image


# ---- The contact sheet: what a person should look at before training on the pairs ----------------
STATUS_COLOURS = {"present": "limegreen", "absent": "red", "unsure": "darkorange"}


def draw_boxes(axis, card, size):
    """The evidence's boxes in the colour of their status, with names and confidences."""
    for found in card["evidence"]:
        if found["box"] is None:
            continue
        x1, y1, x2, y2 = found["box"]
        colour = STATUS_COLOURS[found["status"]]
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, lw=2))
        label = f"{found['object']} {found['confidence']:.2f}"
        at = {"x": x1, "ha": "left"} if x1 + x2 < size[0] else {"x": x2, "ha": "right"}
        style = {"fontsize": 8.5, "parse_math": False, "backgroundcolor": colour}
        axis.text(y=y1, s=label, va="bottom", **at, **style)


def draw_contact_sheet(path, rows, image_root):
    """The first 12 pairs: boxes, both responses, each object's status."""
    cards = []
    for row in rows[:12]:
        lines = [f"+ {row['chosen']}", f"- {row['rejected']}"]
        for status in STATUS_COLOURS:
            names = [found["object"] for found in row["evidence"] if found["status"] == status]
            if names:
                lines.append(f"{status}: {', '.join(names)}")
        evidence = row["evidence"]
        cards.append(
            {"image": Path(image_root) / row["image"], "lines": lines, "evidence": evidence}
        )
    common.draw_cards(path, cards, 4, draw_boxes)


# ---- Arguments and main --------------------------------------------------------------------------
def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    data = parser.add_argument_group("the data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder of images for which the policy writes responses")
    source.add_argument("--pairs", help="published pairs instead: file, folder, or hub id[:config]")
    add = data.add_argument
    add("--image-root", help="where image paths and COCO ids start; else --images, or by --pairs")
    add("--exclude", nargs="+", help="evaluation sets whose responses must not be here")
    add("--prompts", help="text file, one prompt per line, instead of the built-in ones")
    add("--limit", type=int, help="read only the first so many images or rows")
    add("--validation", type=int, default=200, help="pairs set aside to watch training in 03, 04")
    add("--train", type=int, default=5000, help="pairs for critiques (02); the rest: 04's pool")
    group = parser.add_argument_group("the expert, which says what is in the image")
    source = group.add_mutually_exclusive_group()
    expert = "ultralytics' *.pt, a transformers detector, or none: the policy's own yes or no"
    source.add_argument("--expert", default="yolo11x.pt", help=expert)
    source.add_argument("--detections", help="findings made elsewhere, as in detections.jsonl")
    add = group.add_argument
    add("--vocabulary", help="json {phrase: class}; else the expert's or COCO's, with synonyms")
    add("--present", type=float, default=0.5, help="confidence from which an object is present")
    add("--absent", type=float, default=0.05, help="confidence below which it is absent")
    add = parser.add_argument_group("the policy, which writes the candidates").add_argument
    add("--model", default="Qwen/Qwen2-VL-7B-Instruct", help="hub id or folder; later the judge")
    add("--max-image-tokens", type=int, help="bound on the tokens of an image, for all stages")
    add("--candidates", type=int, default=4, help="K, responses per image")
    add("--temperature", type=float, default=1.0, help="of the candidates")
    add("--max-new-tokens", type=int, default=256, help="of a candidate; unfinished it is dropped")
    args = parser.parse_args(argv)
    if args.exclude and args.images:
        parser.error("--exclude compares given responses: it goes with --pairs")
    if args.absent > args.present:
        parser.error(f"need --absent {args.absent} <= --present {args.present}")
    root = args.image_root or default_image_root(args.images or args.pairs, args.run)
    args.image_root = str(Path(root).resolve())
    return args


# Lowest confidence that an expert is asked for, so that --absent can be changed without asking it.
FLOOR = 0.01


def set_up_expert(args, model, processor):
    """(expert, or None where findings are given; vocabulary {phrase: class})."""
    vocabulary = COCO_VOCABULARY
    if args.vocabulary:
        vocabulary = read_vocabulary(args.vocabulary)
    if args.detections:
        return None, vocabulary
    device, wanted = common.pick_device(args.device), sorted(set(vocabulary.values()))
    expert = load_expert(args.expert, FLOOR, device, wanted, model, processor)
    if expert.classes and not args.vocabulary:
        vocabulary = build_vocabulary(expert.classes, SYNONYMS)
    return expert, vocabulary


# Arguments that may change from one start to the next, and the files that stay when they do.
SAMPLED = ["candidates.jsonl", "images/*"]
MAY_CHANGE = dict.fromkeys(("expert", "detections", "vocabulary"), SAMPLED)
CHOICES = ("present", "absent", "validation", "train")
MAY_CHANGE |= dict.fromkeys(CHOICES, [*SAMPLED, "detections.jsonl"])


def inputs_of(args):
    """The files and folders that this stage reads. An expert without "/" is a name, not a file:
    ultralytics leaves one here when it has downloaded it.
    """
    paths = [args.images, args.pairs, args.detections, args.vocabulary, args.prompts]
    paths += args.exclude or []
    if "/" in args.expert:
        paths.append(args.expert)
    return [path for path in paths if path and Path(path).exists()]


def warn_of_blind_expert(share):
    """share: of the rows in which the expert calls something absent that a response names."""
    if share < 0.1:
        print(
            f"warning: in {share:.1%} of the rows the expert calls something mentioned absent: "
            "it may miss what is hallucinated; try another --expert or a higher --absent"
        )


def main(args):
    folder = common.start_stage(args, "01_preferences", inputs_of(args), MAY_CHANGE)
    if folder is None:
        return

    # 1. What to verify, who writes, who verifies --------------------------------------------------
    items, counts = load_items(args, folder)
    print(f"{len(items)} rows, expert {args.detections or args.expert}")
    model, processor = None, None
    if args.images or args.expert == "none":
        model, processor = common.load_judge(
            args.model, device=args.device, max_image_tokens=args.max_image_tokens
        )
    expert, vocabulary = set_up_expert(args, model, processor)
    classes = expert.classes if expert else None  # None: whatever it was asked about
    all_names = sorted(set(vocabulary.values()))

    # 2. Candidates, mentions, findings ------------------------------------------------------------
    if args.images:
        shared = ("temperature", "max_new_tokens", "seed", "batch_size")
        sampling = {"n": args.candidates, **{name: getattr(args, name) for name in shared}}
        path = folder / "candidates.jsonl"
        written = write_candidates(items, model, processor, args.image_root, path, sampling)
        texts = {row["id"]: row["candidates"] for row in written}
        counts["candidates written"] = len(items) * args.candidates
        counts["  dropped: unfinished or too long"] = sum(row["unfinished"] for row in written)
    else:
        texts = {item["id"]: [item["chosen"], item["rejected"]] for item in items}
    mentions = {}
    for key, texts_of_item in texts.items():
        mentions[key] = [find_mentions(text, vocabulary) for text in texts_of_item]
    may_swap = all_names if args.images else []  # given pairs stay as they are
    swaps, questions = plan_questions(items, mentions, may_swap, args.seed)
    if expert:
        findings = find_objects(questions, expert, args.image_root, folder / "detections.jsonl")
    else:
        findings = read_detections(args.detections, questions, vocabulary)

    # 3. Pairs -------------------------------------------------------------------------------------
    rows = []
    statuses = Counter(dict.fromkeys(("mentions present", "mentions absent", "mentions unsure"), 0))
    n_caught = 0  # rows in which the expert calls something absent that a response names
    for item in items:
        key, finding = item["id"], findings[item["image"]]
        found, named = finding["detections"], set().union(*mentions[key])
        known = known_classes(classes, finding, all_names)
        status = verify(named.union(swaps[key]), found, args.present, args.absent, known)
        statuses.update(f"mentions {status[name]}" for name in named)
        n_caught += any(status[name] == "absent" for name in named)
        row, reason = build_pair(
            item, texts[key], mentions[key], swaps[key], found, status, vocabulary, args.seed
        )
        counts["pairs made" if row else f"dropped: {reason}"] += 1
        if row:
            rows.append(row)
    if not rows:
        stop(f"no pair could be made: {dict(counts + statuses)}; check --expert and --vocabulary")
    rows = assign_splits(rows, args.validation, args.train, args.seed)

    # 4. Save and report ---------------------------------------------------------------------------
    common.write_jsonl(folder / "preferences.jsonl", rows)
    common.write_json(folder / "vocabulary.json", vocabulary)
    sheet = folder / "contact_sheet.png"
    common.draw(draw_contact_sheet, sheet, rows, args.image_root)
    counts.update(f"  {row['source']} pairs" for row in rows)
    counts.update(f"  in split {row['split']}" for row in rows)
    counts.update(statuses)
    warn_of_blind_expert(n_caught / len(items))
    if counts["  in split pool"] < 2:
        print("warning: no pairs are left for the pool of 04: lower --train or give more")
    command = f"python 02_generate_critiques.py --run {shlex.quote(args.run)}"
    outputs = [folder / "preferences.jsonl", folder / "vocabulary.json"]
    common.finish_stage(folder, args, counts, outputs, f"look at {sheet}, then {command}")


if __name__ == "__main__":
    common.run(main, parse_args())
