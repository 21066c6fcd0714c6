"""01  Preference pairs from a vision expert: the better response names nothing that the detector says is absent."""

import hashlib
import io
import json
import re
import tempfile
from collections import Counter, defaultdict
from itertools import islice, pairwise
from pathlib import Path

import huggingface_hub
from PIL import Image
from pyarrow.parquet import ParquetFile

from common import RANK, stop

# Outline with a budget of 840 lines; the next issue adds its checks (at most 900).
# Header, imports, prompts (65): what, the rule, numbered departures, reads / writes with one real row, two commands.


# ---- The method: verification and pairing (125) --------------------------------------------------
def verify(mentions, detections, present, absent, known):
    """{object: "present" | "absent" | "unsure"} for each mentioned object, from its class's best detection."""


def pair_candidates(candidates, status, swaps, vocabulary, rng):
    """(chosen, rejected, source), or (None, None, reason) where no pair can be made."""


def check_given_pair(chosen, rejected, status):
    """None where the expert agrees with a given pair, else the reason to drop it."""


def propose_swaps(mentions, co_occurrence, classes, rng, n=8):
    """n unmentioned classes to ask the expert about, the plausible ones more often."""


def build_pair(item, texts, mentions, swaps, detections, status, vocabulary, seed):
    """(preference row, None) or (None, reason for the drop)."""


def assign_splits(rows, n_validation, n_train, seed):
    """Rows with "split": validation, train, pool; all pairs of an image in one of them."""


# ---- Mentions: which of the vocabulary's objects a text says are there ---------------------------
# What a singular ends in, and its plural; the first that fits.
PLURALS = [
    (r"\b(aircraft|bison|cattle|oxen|passersby|people|sheep)$", r"\1"),
    (r"person$", "people"),
    (r"child$", "children"),
    (r"(?<!hu)(?<!ger)man$", "men"),
    (r"mouse$", "mice"),
    (r"goose$", "geese"),
    (r"\box$", "oxen"),
    (r"(?<=[^s]s)(?<!us)$", ""),  # a plural already: scissors
    (r"(kni|li|wi)fe$", r"\1ves"),
    (r"(ca|ea|shel)f$", r"\1ves"),
    (r"(?<=[^aeiou])y$", "ies"),
    (r"(?<=ch|sh|ss|us)$|(?<=x)$", "es"),
    (r"$", "s"),
]


def plural(phrase):
    """'red circle' -> 'red circles', 'glass of wine' -> 'glasses of wine', 'skis' -> 'skis'."""
    noun, of, rest = phrase.partition(" of ")
    ending, new = next(rule for rule in PLURALS if re.search(rule[0], noun))
    return re.sub(ending, new, noun) + of + rest


def build_vocabulary(class_names, synonyms=None):
    """{phrase: class}: names and synonyms ({class: [phrases]}) with their plurals, in lower case.

    >>> build_vocabulary(["Fire_Truck"], {"Fire_Truck": ["pumper"]}).keys()
    dict_keys(['fire truck', 'fire trucks', 'pumper', 'pumpers'])
    """
    vocabulary = {}
    for name in class_names:
        for phrase in [name, *(synonyms or {}).get(name, [])]:
            phrase = " ".join(re.findall(r"[^\W_]+", phrase.lower()))
            vocabulary[phrase] = name
            vocabulary[plural(phrase)] = name
    return vocabulary


def read_phrases(path):
    """{class: [phrases]} from lines "class: phrase, phrase"; # starts a comment."""
    table = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, phrases = line.partition(":")
            table.setdefault(name, [])
            table[name] += [phrase.strip() for phrase in phrases.split(",") if phrase]
    return table


SYNONYMS = read_phrases(Path(__file__).parent / "assets" / "coco_phrases.txt")
# {phrase: None}: "dog park", which names no dog
NOT_OBJECTS = dict.fromkeys(build_vocabulary(SYNONYMS.pop("nothing")))
COCO_VOCABULARY = build_vocabulary(SYNONYMS, SYNONYMS)  # {phrase: one of the 80 class names}

# A denial reaches from a cue to whatever opens another thought: "a man with no shirt eating a
# donut" has a donut, "not eating a donut" has none.
DENIED = re.compile(
    r"""
    \b(?:
        # cues that also deny what is definite: "without the dog"
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
    )\b
    (?: (?! \b(?:  # word by word, up to one of these:
            # another clause
            but|with|while|although|though|however|except|besides|that|which|who|where|because
          | since|so|as|is|are|was|were|has|can|there|it|he|she|they|you|we|just|only
          | instead (?!\ of)
            # what is definite exists: "not looking at the dog"
          | the|this|these|those|his|her|their|its
            # a place: "no dog on a bench"
          | on|in|at|near|behind|under|beside|next|around|along|between|from|by|over|through|for
          | into | to (?!\ (?:be|have|contain|include|show)\b)
            # another thing: "no dog and a cat"
          | and\ (?:an?|one|two|three|some|several)
            # what someone does all the same: "no shirt eating a donut"
          | (?<!not\ )(?<!n't\ )(?<!be\ )(?<!without\ ) \w+ing\ an?
        )\b (?!\ any\b) )  # "not in any car" goes on
      (?: \w+ | [^\w,.;:!?\n()—]
        | , (?!\ nor\b) (?= [^.;:]{0,60} \bor\b )  # "no cars, buses or trucks"
      )
    )*
    """,
    re.VERBOSE,
)
# The same after the mention: "a cat and a dog are not visible"
NOT_THERE = re.compile(
    r"""
    (?: ,?\ (?:and|or|nor)\ [\w\ ]{1,20}? )?  # another thing that is not there either
    \ (?: (?:cannot|can't|can\ not)\ be\ (?:seen|found)
        | (?:is|are|was|were)
          (?: \ (?:absent|nowhere)
            | \ missing (?!\ an?\b)  # but "is missing a wheel"
            | (?:\ not|n't)\ (?:present|visible|seen|shown|depicted|there)
            | (?:\ not|n't)\ in\ (?:the|this)\ (?:image|picture|photo|scene)
          )
    )\b
    """,
    re.VERBOSE,
)
# A colour or a game is a thing after an article or a fruit, if neither noun nor colour follows.
RARELY_THINGS = ("orange", "baseball", "basketball", "football", "volleyball")
AS_A_THING = re.compile(
    rf"""
    \b(?: an? | one | the | whole | half | peeled | sliced | fresh
        | (?:apple|banana|lemon)s? ,? (?:\ and|\ or)?  # "an apple, orange and kiwi"
      )\ ({"|".join(RARELY_THINGS)})
    (?= $
      | \ (?: and\ (?:an?|the|one|two|some)  # "an orange and a cup", but "an orange and white cat"
            | or|is|in|on|at|near|next|beside|with|that|which|from|to|towards?|into|through|over
            | under|behind|while|as|across|sits|lying|sitting)\b
      | (?! \ | ,\ (?:black|white|red|yellow|brown)\b ) \W  # but "an orange, black and white cat"
    )
    """,
    re.VERBOSE,
)


def find_mentions(text, vocabulary):
    """Classes that the text says are there, by first mention; vocabulary: {phrase: class}.

    >>> find_mentions("No cats, only a dog park, two men with a teddy bear.", COCO_VOCABULARY)
    ['person', 'teddy bear']
    """
    return list(dict.fromkeys(name for _, _, name in mention_spans(text, vocabulary)))


def find_phrases(text, phrases):
    """[(start, end, phrase)] from left to right: whole words, at each word the longest phrase."""
    longest = 1 + max(phrase.count(" ") for phrase in phrases)
    # a comma is a word of its own, so that no phrase crosses it
    words = [(m.group(), m.start(), m.end()) for m in re.finditer(r"[^\W_]+|[^\w\s'-]", text)]
    found = []
    i = 0
    while i < len(words):
        for n in range(longest, 0, -1):
            span = words[i : i + n]
            phrase = " ".join(word for word, _, _ in span)
            if phrase in phrases:
                found.append((span[0][1], span[-1][2], phrase))
                i += len(span) - 1  # "hot dog" is no dog
                break
        i += 1
    return found


def mention_spans(text, vocabulary):
    """[(start, end, class)] of each mention in the text, from left to right; see find_mentions."""
    # as long as the text, or the spans would be off: "İ" alone has a longer lower case
    text = text.replace("’", "'").replace("İ", "i").lower()
    phrases = NOT_OBJECTS | vocabulary  # the vocabulary wins
    # what is denied is blotted out, so that no phrase is found there
    said = DENIED.sub(lambda denied: "." * len(denied.group()), text)
    things = {match.start(1) for match in AS_A_THING.finditer(text)}
    found = find_phrases(said, phrases)
    mentions = []
    for (start, end, phrase), following in pairwise([*found, (0, 0, "")]):
        # of two nouns in a row the last is the thing: "baby elephant", "hot dog vendor"
        qualifies = said[end : following[0]] == " " and " " not in following[2]
        if qualifies or re.match(r"-\w", said[end : end + 2]):  # or "dog-friendly"
            continue
        if phrase in RARELY_THINGS and start not in things:
            continue
        if phrases[phrase] is not None and not NOT_THERE.match(text, end):
            mentions.append((start, end, phrases[phrase]))
    return mentions


def swap_object(text, old, new, vocabulary):
    """The text with every mention of class `old` replaced by `new`: in the plural where the
    mention is, with "a" or "an" and a capital as needed."""
    plurals = {plural(phrase) for phrase in vocabulary if plural(phrase) != phrase}
    for start, end, name in reversed(mention_spans(text, vocabulary)):
        if name != old:
            continue
        before = text[:start]
        word = new
        if text[start:end].lower() in plurals:
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
    """[(role, text)] of a string, which is one turn of `role`, or of the messages of TRL (role,
    content: text or blocks) or LLaVA (from, value)."""
    if isinstance(messages, str):
        return [(role, messages)]
    turns = []
    for message in messages or ():
        speaker = message.get("role") or message["from"]
        speaker = {"human": "user", "gpt": "assistant"}.get(speaker, speaker)
        content = message.get("content") or message.get("value") or ""
        if not isinstance(content, str):
            # in parquet the picture's block has a "text" too: None
            content = "\n".join(block["text"] for block in content if block.get("text"))
        turns.append((speaker, content))
    return turns


def response_of(row, field):
    """(turns before it, response) from the turns of a row's field; what follows is left out."""
    turns = turns_of(row[field], "assistant")
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise Skip("no response", field)
    return turns[:-1], turns[-1][1]


def from_messages(row, prompt="prompt", chosen="chosen", rejected="rejected"):
    """Pairs the last assistant turns; the prompt is what comes before, with roles if it is long."""
    before, better = response_of(row, chosen)
    before_rejected, worse = response_of(row, rejected)
    asked = [text for role, text in before if role == "user"]
    if asked != [text for role, text in before_rejected if role == "user"]:
        raise Skip("chosen and rejected answer different questions", rejected)
    context = turns_of(row[prompt], "user")
    if before[: len(context)] == context:  # the prompt is repeated there
        context = []
    context += before
    text = "\n".join(f"{role}: {text}" for role, text in context)
    if len(context) == 1:
        text = context[0][1]
    return {"prompt": text, "chosen": better, "rejected": worse}


def from_povid(row):
    return from_messages(row, "prompt", "conversations", "rejected_conversations")


def from_rlaif_v(row):
    return from_messages(row, "question")


def from_own(row):
    return {**row, **from_messages(row)}  # with the evidence, which stage 05 measures by


def from_vl_rewardbench(row):
    best = [[0, 1], [1, 0]].index(row["human_ranking"])  # rank 0 is the better one
    group_of = {
        "RLAIF": "hallucination",
        "RLHF": "hallucination",
        "hallucination": "hallucination",
        "mathverse": "reasoning",
        "mmmu": "reasoning",
    }
    return {
        "prompt": row["query"],
        "chosen": row["response"][best],
        "rejected": row["response"][1 - best],
        # the published rule: by the id up to its first "_" or "-"
        "category": group_of.get(re.split("[_-]", row["id"])[0], "general"),
    }


FORMATS = {  # name: (the columns it is known by, its mapping); the first that fits
    "POVID": ({"conversations", "rejected_conversations"}, from_povid),
    "VL-RewardBench": ({"id", "query", "response", "human_ranking", "image"}, from_vl_rewardbench),
    "RLAIF-V": ({"question", "chosen", "rejected", "image"}, from_rlaif_v),
    "preferences.jsonl": ({"image", "prompt", "chosen", "rejected", "evidence"}, from_own),
    "TRL preferences": ({"image", "chosen", "rejected"}, from_messages),
}


def hub_files(source):
    """The files of a hub data set id[:config], of its split "train" or else of its first; each is
    downloaded when it is asked for. (Streaming them with `datasets` hangs when it is left early.)
    """
    import datasets  # slow to import

    splits = datasets.load_dataset_builder(*source.split(":")).config.data_files
    hub = huggingface_hub.HfFileSystem()
    for url in splits["train" if "train" in splits else next(iter(splits))]:
        place = hub.resolve_path(url)
        yield huggingface_hub.hf_hub_download(
            place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision
        )


def rows_of_file(file):
    """The rows of a parquet file, of a JSON array, or of JSON lines. (`datasets` streams such files
    too, but keeps six row groups, and takes JSON's types from the first rows, whatever follows.)
    """
    if file.suffix == ".parquet":
        # 16 rows at a time and without readahead: pictures are large
        for batch in ParquetFile(file, buffer_size=2**20, pre_buffer=False).iter_batches(16):
            yield from batch.to_pylist()
        return
    with open(file, encoding="utf-8-sig") as lines:
        is_array = lines.read(1) == "["
        lines.seek(0)
        if is_array:
            yield from json.load(lines)
        else:
            yield from (json.loads(line) for line in lines if line.strip())


def read_rows(source):
    """((file, number from 1), row) of a parquet, json or jsonl file, of a folder of such, or of a
    hub id[:config]; embedded pictures as {"bytes", "path"}. Stops at what cannot be read."""
    suffixes = (".parquet", ".json", ".jsonl")
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes)
    elif path.suffix not in suffixes and not path.exists():
        files = hub_files(str(source))
    file = path
    number = 0
    try:
        for file in map(Path, files):
            number = 0
            for number, row in enumerate(rows_of_file(file), 1):
                if not isinstance(row, dict):
                    raise TypeError(f"row {number} is no JSON object")
                yield (file, number), row
    except Exception as error:  # not JSON, not parquet, no such data set, no connection
        why = " ".join(str(error).split())[:300]
        stop(f"{file} after row {number}: {type(error).__name__}: {why}")


def find_picture(name, root):
    """The file of a picture's name: as it is, its base name, or COCO's of 2014 and 2017."""
    names = [name, Path(name).name]
    coco = (
        r"(?:.*/)?(?:COCO_\w+2014_)?(\d{12})\.jpg|(\d{1,12})"  # a file of COCO's, or the id alone
    )
    if number := re.fullmatch(coco, name):
        for split in ("train2014", "val2014", "train2017", "val2017"):
            prefix = f"COCO_{split}_" if "2014" in split else ""
            file = f"{prefix}{int(number[1] or number[2]):012d}.jpg"
            names += [file, f"{split}/{file}"]
    for candidate in names:
        if (root / candidate).is_file():
            return root / candidate
    raise Skip("missing image", "image")


def place_image(image, image_root, folder):
    """The path, from image_root or absolute, of a row's picture: a path, a COCO id, {"bytes",
    "path"}, or a list of one. Bytes are written as they are to folder/images/<hash>.<format>."""
    if isinstance(image, (list, tuple)):
        if len(image) > 1:
            raise Skip("more than one image", "images")
        image = image[0] if image else None
    if not isinstance(image, dict):
        image = {"path": image}
    root = Path(image_root).resolve()
    data = image.get("bytes")
    file = io.BytesIO(data) if data else find_picture(str(image.get("path") or ""), root)
    try:
        with Image.open(file) as picture:
            kind = picture.format.lower().replace("jpeg", "jpg")
            picture.draft("RGB", (64, 64))  # JPEG is decoded at an eighth: fast, to its last byte
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise Skip("picture that does not decode", "image") from None
    if data:
        name = hashlib.sha256(data).hexdigest()[:32]
        file = Path(folder).resolve() / "images" / f"{name}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{RANK}")
        partial.write_bytes(data)
        partial.replace(file)  # whole or not at all
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def format_of(row, known, place):
    """The name of the format that a file's first row has; `known`: that of the files before."""
    for name, (columns, _) in FORMATS.items():
        if columns <= set(row) and known in (None, name):
            return name
    formats = [f"{name} ({', '.join(sorted(FORMATS[name][0]))})" for name in FORMATS]
    wanted = known or "a known format: " + "; ".join(formats)
    stop(f"{place[0]} row {place[1]}: the columns {', '.join(row)} are not those of {wanted}")


def pair_of(row, name, image_root, folder):
    """{id, image, prompt, chosen, rejected, ...} of one row, or Skip."""
    try:
        pair = {"id": row["id"], "image": row["image"], **FORMATS[name][1](row)}
        for side in ("chosen", "rejected"):
            if not pair[side].strip():
                raise Skip("no response", side)
        if pair["chosen"].strip() == pair["rejected"].strip():
            raise Skip("identical responses", "rejected")
        pair["prompt"] = re.sub(r"<image>\n?|\n<image>", "", pair["prompt"] or "")
        pair["image"] = place_image(pair["image"], image_root, folder)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Skip(f"not a row of {name}", f"? ({error!r})") from None
    return pair


def read_pairs(source, image_root, folder, limit=None):
    """(format name, rows {id, image, prompt, chosen, rejected[, category, evidence]}, counts) of
    the first `limit` rows of a source (see read_rows). Images are paths from image_root or
    absolute; embedded ones are written to folder/images. For another data set add to FORMATS the
    columns it is known by and a mapping: row (None for a missing column) -> {prompt, chosen,
    rejected}, and id and image if its columns of these names do not hold them. image: a path,
    bytes as {"bytes": ...}, or a list of one. Skip(reason, field) drops the row.
    """
    name = None
    rows = []
    counts = Counter()
    seen = set()
    ids = set()
    for k, (place, row) in enumerate(islice(read_rows(source), limit)):
        row = defaultdict(lambda: None, row)
        if "images" in row:  # TRL has both names
            row.setdefault("image", row["images"])
        if place[1] == 1:
            name = format_of(row, name, place)
        counts["rows read"] += 1
        try:
            pair = pair_of(row, name, image_root, folder)
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
    print(f"{source}: read as {name}, {len(rows)} of {counts['rows read']} rows")
    if not rows:
        stop(f"{source} holds no usable row: {dict(counts)}; --image-root is {image_root}")
    return name, rows, counts


def count_skip(counts, skip, place):
    """Count a skipped row under its reason, in place, and name the first of each."""
    reason, field = skip.args
    counts[f"skipped: {reason}"] += 1
    if counts[f"skipped: {reason}"] == 1:
        file, number = place
        print(f"skipped {file} row {number}, field {field}: {reason} (more are only counted)")


def without_overlap(items, source, image_root, counts):
    """The items without a response that the evaluation set `source` has too, but for case,
    punctuation and spacing; those left out are added to `counts`. Below 20 characters responses
    recur by chance ("Yes, there is."). image_root: where source's pictures are, if not in it.
    """

    def texts(row):
        responses = [row.get("chosen", ""), row.get("rejected", "")]
        plain = [" ".join(re.findall(r"\w+", response.lower())) for response in responses]
        return {text for text in plain if len(text) >= 20}

    known = set()
    with tempfile.TemporaryDirectory() as scratch:
        for row in read_pairs(source, image_root, scratch)[1]:
            known |= texts(row)
    kept = [item for item in items if not texts(item) & known]
    counts[f"excluded: text in {source}"] += len(items) - len(kept)
    return kept


# ---- Experts: find(image paths, questions) -> detections per image (140) -------------------------
# The seam for another detector: the class Detector's docstring states the contract in five lines.


# ---- Candidates and findings (60), contact sheet (40) --------------------------------------------


# ---- Arguments and main (130) --------------------------------------------------------------------
def parse_args(argv=None): ...


def main(args): ...
