"""02  The model writes critiques of each pair, guided by the expert's findings and the label; the sound ones are kept.

    written with:  image, question, A, B, findings + label          (reference-guided, both orders, M samples at T = 1)
    trained on as: image, question, A, B  ->  critique + verdict    (stage 03: the prompt there has no reference)
    kept if:       verdict = label  and  verdict follows from the critique's own checks  and  every present/absent object of the
                   responses is checked, none against its finding, and nothing else  and  the reference is not cited

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) findings are laid out as the very lines that the critique will hold, since models copy a separate list wrongly;
  2) "verdict = label" alone lets lucky verdicts with false facts pass, which make the judge worse: the checks are held against
     each other and the expert, and must be complete, or stage 04 would prefer critiques that skip what is hard to see;
  3) pairs without findings (reasoning, general questions) are kept on verdict and leak alone, and counted apart.
Reads  01_preferences/preferences.jsonl (split "train"), vocabulary.json.
Writes 02_critiques/samples.jsonl (all, with the reason why one was dropped) and
       critiques.jsonl {id, pair_id, image, prompt, response_a, response_b, label, critique, verdict, style}

    python 02_generate_critiques.py --run runs/demo
    python 02_generate_critiques.py                              # one GPU: 5,000 pairs x 2 orders x 4 critiques
"""
import hashlib
import importlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from statistics import median

from PIL import Image
from tqdm import tqdm

import common
from common import RowWriter, both_orders, finish_stage, parse_checks, read_jsonl, start_stage

ift = importlib.import_module("03_train_ift")
LEAK = re.compile(r"\b(?:reference|ground[- ]truth|detector|known to be true|the findings?|the expert|"
                  r"(?:the|given|correct) label (?:says|is|states|shows|gives))\b", re.IGNORECASE)


# ---- The method: the reference, and what makes a critique worth training on ------------------------------------------
def render_reference(question, status, vocabulary):
    """The expert's findings and the label as the lines that a critique would hold; "unsure" where the model must look.
    question: {"response_a", "response_b", "label"}; status: {object: "present" | "absent" | "unsure"}."""
    word = {"present": "yes", "absent": "no", "unsure": "unsure"}
    lines = [f"{side}: {name}: {word[status[name]]}" for side in "AB"
             for name in find_mentions(question[f"response_{side.lower()}"], vocabulary) if name in status]
    return "\n".join([*lines, f"Verdict: {question['label']}"])


def verdict_of_checks(checks):
    """The response with fewer unsupported claims: "A", "B", or None where they are even."""
    unsupported = Counter(side for side, _, supported in checks if not supported)
    return None if unsupported["A"] == unsupported["B"] else min("AB", key=lambda side: unsupported[side])


def contradicts_expert(checks, said, status, vocabulary):
    """None, or how the checks disagree with the findings. said: {"A": mentions, "B": mentions} of the two responses.
    A "no" contradicts a present object only where the claim is the bare object: "a dog with a hat: no" may be right."""
    checked = {"A": set(), "B": set()}
    for side, claim, supported in checks:
        named = find_mentions(claim, vocabulary)
        if not set(named) <= set(said[side]):
            return "checks what the response does not say"
        bare = re.sub(r"^(?:there (?:is|are) )?(?:an?|the|some) ", "", claim.lower())
        if any(status.get(name) == "absent" for name in named) if supported else \
                bare in vocabulary and status.get(vocabulary[bare]) == "present":
            return "contradicts the expert"
        checked[side].update(named)
    missed = {name for side in "AB" for name in said[side] if name not in checked[side]}
    return "leaves out a verified object" if any(status.get(name, "unsure") != "unsure" for name in missed) else None


def reason_to_drop(critique, complete, question, evidence, vocabulary, style):
    """None for a critique worth training on, else the first reason against it (02 and 04 filter by this one function).
    question: {"response_a", "response_b", "label"}; evidence: the pair's list of {"object", "status", ...}, may be empty."""
    verdict = common.parse_verdict(critique)
    if not complete or verdict is None:
        return "malformed: no verdict line"
    checks = parse_checks(critique) if style == "critique" else []
    status = {found["object"]: found["status"] for found in evidence}
    if style == "critique" and status and not checks:
        return "malformed: no checks"
    if verdict != question["label"]:
        return "wrong verdict"
    if checks and verdict_of_checks(checks) != verdict and (status or verdict_of_checks(checks)):
        return "verdict does not follow from its checks"
    if LEAK.search(critique) and not LEAK.search(question["response_a"] + "\n" + question["response_b"]):
        return "cites the reference"
    said = {side: find_mentions(question[f"response_{side.lower()}"], vocabulary) for side in "AB"}
    return contradicts_expert(checks, said, status, vocabulary) if checks and status else None


# ---- Mentions: which of the vocabulary's objects a text says are there -----------------------------------------------
# Also for 01 and 05, as the next section. (end of a singular, end of its plural), the first that fits; plurals stay as they are
PLURALS = [(r"\b(aircraft|bison|cattle|oxen|passersby|people|sheep)$", r"\1"), ("person$", "people"),
           ("child$", "children"), ("(?<!hu)(?<!ger)man$", "men"), ("mouse$", "mice"), ("goose$", "geese"),
           (r"\box$", "oxen"), ("(?<=[^s]s)(?<!us)$", ""), ("(kni|li|wi)fe$", r"\1ves"), ("(ca|ea|shel)f$", r"\1ves"),
           ("(?<=[^aeiou])y$", "ies"), ("(?<=ch|sh|ss|us)$|(?<=x)$", "es"), ("$", "s")]


def plural(phrase):
    """'red circle' -> 'red circles', 'glass of wine' -> 'glasses of wine', 'knife' -> 'knives', 'skis' -> 'skis'."""
    noun, of, rest = phrase.partition(" of ")
    end, new = next((end, new) for end, new in PLURALS if re.search(end, noun))
    return re.sub(end, new, noun) + of + rest


def parse_table(text):
    """{key: entries} from "key: entry, entry; key; key: entry", where a line end is a space and # starts a comment line."""
    rows = (" ".join(row.split()).partition(":") for row in re.sub("#.*", "", text).split(";"))
    return {key.strip(): [entry.strip() for entry in entries.split(",") if entry] for key, _, entries in rows}


def build_vocabulary(class_names, synonyms=None):
    """{phrase: class}: each class's name and synonyms ({class: [phrases]}) with their plurals, in lower case.

    >>> build_vocabulary(["Fire_Truck"], {"Fire_Truck": ["pumper"]}).keys()
    dict_keys(['fire truck', 'fire trucks', 'pumper', 'pumpers'])
    """
    pairs = [(phrase, name) for name in class_names for phrase in [name, *(synonyms or {}).get(name, [])]]
    words = [(" ".join(re.findall(r"[^\W_]+", phrase.lower())), name) for phrase, name in pairs]
    return {form: name for phrase, name in words for form in (phrase, plural(phrase))}


SYNONYMS, NOT_OBJECTS = map(parse_table, (Path(__file__).parent / "assets/coco_phrases.txt").read_text().split("\n\n"))
COCO_VOCABULARY = build_vocabulary(SYNONYMS, SYNONYMS)  # {phrase: one of the 80 class names}
NONE = [f"{a} {b}".replace("-", " ") for first, (last,) in NOT_OBJECTS.items() for a in first.split() for b in last.split()]
COMPOUNDS = {**dict.fromkeys(NONE + [plural(phrase) for phrase in NONE]),  # phrase -> class, None for no object at all
             "child s bed": "bed", "elephant calf": "elephant", "giraffe calf": "giraffe", "sink bowl": "sink",
             **{f"{name} skis": "person" for name in ("man", "woman", "person", "skier", "boy", "girl")}}  # the verb

# A negation reaches from its cue to whatever opens another thought (ENDS); a comma ends it too unless "or" follows ("no
# cars, buses or trucks"). What is definite exists ("not looking at the dog"), except right after "without".
CUES, ENDS, NOT_THERE, AS_A_THING = ("".join(line for line in part.split("\n") if line[:1] != "#") for part in
                                     (Path(__file__).parent / "assets/negation.txt").read_text().split("\n\n"))
NEGATED = re.compile(rf"\b(?:{CUES})\b(?:(?!\b(?:{ENDS})\b(?! any\b))"
                     r"(?:[^,.;:!?\n()—]|,(?=[^.;:]{0,60}\b(?:or|nor)\b)))*")
RARELY_THINGS = {"orange", "baseball", "basketball", "football", "volleyball"}  # counted only if used AS_A_THING


def find_mentions(text, vocabulary):
    """Classes that the text says are there, by first mention, each once. vocabulary: {lower-case phrase: class}.

    >>> find_mentions("No cats, only a dog park, two men with a teddy bear and a baby elephant.", COCO_VOCABULARY)
    ['person', 'teddy bear', 'elephant']
    """
    return list(dict.fromkeys(name for _, _, name in mention_spans(text, vocabulary)))


def mention_spans(text, vocabulary):
    """[(start, end, class)] of each mention in the text, from left to right.

    Whole words, the longest phrase first ("hot dog" is no dog), COMPOUNDS beside the vocabulary's own phrases; negated
    mentions do not count. Of two nouns in a row the last is the thing: "baby elephant", "hot dog vendor", "orange car".
    """
    text, phrases = text.lower().replace("’", "'"), COMPOUNDS | vocabulary  # the vocabulary wins
    known, longest = {*vocabulary.values()}, 1 + max(phrase.count(" ") for phrase in phrases)
    words = list(re.finditer(r"[^\W_]+|[^\w\s'-]", text))  # a comma is a word of its own, so that no phrase crosses it
    found, i = [], 0  # (start, end, phrase), from left to right
    while i < len(words):
        spans = [words[i:i + n] for n in range(longest, 0, -1)]
        matches = ((len(span), " ".join(word.group() for word in span)) for span in spans)
        n, phrase = next((match for match in matches if match[1] in phrases), (1, None))
        if phrase:
            found.append((words[i].start(), words[i + n - 1].end(), phrase))
        i += n
    negated = [match.span() for match in NEGATED.finditer(text)]
    things = {match.start(1) for match in re.finditer(AS_A_THING, text)}
    mentions = []
    for (start, end, phrase), (next_start, _, next_phrase) in zip(found, [*found[1:], (-1, -1, "")]):
        modifier = (text[end:next_start] == " " and " " not in next_phrase  # "baby" of "baby elephant"
                    or re.match(r"-\w", text[end:]))  # "dog" of "dog-friendly"
        denied = any(a <= start < b for a, b in negated) or re.match(NOT_THERE, text[end:])
        if phrases[phrase] in known and not (modifier or denied or (phrase in RARELY_THINGS and start not in things)):
            mentions.append((start, end, phrases[phrase]))
    return mentions


def swap_object(text, old, new, vocabulary):
    """The text with every mention of class `old` replaced by `new`: in the plural where the mention is, with "a" or "an"
    and a capital as needed."""
    plurals = {plural(phrase) for phrase in vocabulary if plural(phrase) != phrase}
    for start, end, name in reversed(mention_spans(text, vocabulary)):
        if name == old:
            before, word = text[:start], plural(new) if text[start:end].lower() in plurals else new
            if word == new:
                before = re.sub(r"\b([Aa])n?( )$", lambda m: m[1] + ("n" if new[0] in "aeiou" else "") + m[2], before)
            text = before + (word[0].upper() + word[1:] if text[start].isupper() else word) + text[end:]
    return text


# ---- Preference pairs as others publish them: what a row says, whatever its columns ----------------------------------
class Skip(Exception):
    """Skip(reason, field): why a row cannot be used."""


def turns_of(messages, role):
    """[(role, text)] of a string, or of the messages of TRL (role, content: text or blocks) and LLaVA (from, value)."""
    turns = []
    for turn in [{"role": role, "content": messages}] if isinstance(messages, str) else messages or ():
        role, content = turn.get("role") or turn["from"], turn.get("content") or turn.get("value") or ""
        if not isinstance(content, str):  # Arrow gives the image blocks a "text" too: None
            content = "\n".join(block["text"] for block in content if block.get("text"))
        turns.append(({"human": "user", "gpt": "assistant"}.get(role, role), content))
    return turns


def from_messages(row, prompt="prompt", chosen="chosen", rejected="rejected"):
    """The last assistant turns are paired; the turns before them are the prompt, with their roles if there are several."""
    row = dict(zip(("question", "chosen", "rejected"), row)) if isinstance(row, list) else row  # RLHF-V has objects or lists
    context, good, bad = (turns_of(row.get(field), role) for field, role in (
        (prompt, "user"), (chosen, "assistant"), (rejected, "assistant")))
    for name, field, turns in (("chosen", chosen, good), ("rejected", rejected, bad)):
        while turns and turns[-1][0] != "assistant":
            turns.pop()
        if not turns:
            raise Skip(f"no {name}", field)
    if [turn for turn in good if turn[0] == "user"] != [turn for turn in bad if turn[0] == "user"]:
        raise Skip("chosen and rejected answer different questions", rejected)
    context = good[:-1] if good[:-1][:len(context)] == context else context + good[:-1]
    text = context[0][1] if len(context) == 1 else "\n".join(f"{role}: {text}" for role, text in context)
    return {"prompt": text, "chosen": good[-1][1], "rejected": bad[-1][1]}


def from_two(prompt, responses, best, **other):
    return {"prompt": prompt, "chosen": responses[best], "rejected": responses[1 - best], **other}


CRITIC_PROMPT = re.compile(  # responses may hold brackets: each ends where the next one starts, the last one at the last bracket
    r"(?s)Question: \[(.*?)\]\s*(?:The first response|Response [1A]): \[(.*?)\]\s*"
    r"(?:The second response|Response [2B]): \[(.*)\]")


def from_critic(row):
    asked, said = (turn["value"] for turn in row["conversations"][:2])
    parts, choices = CRITIC_PROMPT.search(asked), re.findall(r"(?i)better response\W*(?:(first|1|A)|second|2|B)\b", said)
    if not parts or not choices:
        raise Skip("tie" if parts and "equally" in said.lower() else "unparseable judgement", "conversations")
    return from_two(parts[1], parts.groups()[1:], 0 if choices[-1] else 1)


def from_vl_rewardbench(row):
    category = {"RLAIF": "hallucination", "RLHF": "hallucination", "hallucination": "hallucination", "mathverse": "reasoning",
                "mmmu": "reasoning"}.get(re.split("[_-]", row["id"])[0], "general")  # the published rule, by prefix of the id
    return from_two(row["query"], row["response"], [[0, 1], [1, 0]].index(list(row["human_ranking"])), category=category)


FORMATS = {  # name: (columns it is known by, in lower case; what a row says); the first that fits a file's first row
    "POVID": ("conversations rejected_conversations", lambda row: from_messages(row, "", "conversations", "rejected_conversations")),
    "LLaVA-Critic pairwise": ("conversations image", from_critic),
    "VL-RewardBench": ("id query response human_ranking image", from_vl_rewardbench),
    "Multimodal RewardBench": ("id text image output1 output2 better category", lambda row: from_two(
        row["text"], (row["output1"], row["output2"]), ("Output1", "Output2").index(row["better"]), category=row["category"])),
    "RLAIF-V": ("question chosen rejected image", lambda row: from_messages(row, "question")),
    "RLHF-V": ("text image", lambda row: from_messages(json.loads(row["text"]), "question")),
    "preferences.jsonl": ("image prompt chosen rejected evidence", lambda row: {**row, **from_messages(row)}),
    "TRL preferences": ("image chosen rejected", from_messages), "TRL preferences (images)": ("images chosen rejected", from_messages)}


def read_rows(source):
    """((file, number from 1), row) of a parquet, json or jsonl file, a folder of such, or a hub id[:config]; pictures as bytes."""
    from datasets import load_dataset  # slow to import; it streams a hub's files, but keeps six times a local row group in memory
    from pyarrow.parquet import ParquetFile
    files = sorted(p for p in Path(source).rglob("*.*") if p.suffix in (".parquet", ".json", ".jsonl"))  # [] where it is no folder
    for file in files or [Path(source)]:
        number = 0
        try:
            if file.suffix == ".parquet":
                table = ParquetFile(file, buffer_size=2 ** 20, pre_buffer=False)  # with readahead twice the memory
                rows = (row for batch in table.iter_batches(16) for row in batch.to_pylist())
            elif file.suffix in (".json", ".jsonl") or file.exists():
                is_array = file.open().read(1) == "["
                rows = json.load(file.open()) if is_array else map(json.loads, filter(str.strip, file.open()))
            else:
                splits = load_dataset(*str(source).split(":"), streaming=True)
                rows = splits["train" if "train" in splits else min(splits)].decode(False)
            for number, row in enumerate(rows, 1):
                assert isinstance(row, dict), f"row {number} is no JSON object"
                yield (file, number), row
        except Exception as error:  # of many kinds: not JSON, not parquet, no such data set, no connection, a choice of configs
            common.stop(f"{file} after row {number}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def place_image(image, image_root, folder):
    """Decodes a row's picture (path, COCO id, {"bytes", "path"}, or a list of one of these) -> its path, from image_root or absolute,
    so that Path(image_root) / path is the picture. Embedded bytes are written as they are to folder/images/<hash>.<format>."""
    if isinstance(image, (list, tuple)) and len(image) > 1:
        raise Skip("more than one image", "images")
    image = image[0] if isinstance(image, (list, tuple)) and image else image
    data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    root, name = Path(image_root).resolve(), str(name or "")
    if not data:  # the first that is there: the name, its base name, the COCO id's files of 2014 and 2017
        number, names = re.fullmatch(r"(?:.*/)?(?:COCO_\w+2014_)?(\d{12})\.jpg|(\d{1,12})", name), [name, Path(name).name]
        for split in ("train2014", "val2014", "train2017", "val2017") if number else ():
            file = (f"COCO_{split}_" if "2014" in split else "") + f"{int(number[1] or number[2]):012d}.jpg"
            names += [file, f"{split}/{file}"]
        file = next((root / name for name in names if (root / name).is_file()), None)
        if file is None:
            raise Skip("missing image", "image")
    try:
        with Image.open(io.BytesIO(data) if data else file) as picture:
            kind = picture.format.lower().replace("jpeg", "jpg")
            picture.draft("RGB", (64, 64))  # a JPEG is decoded at an eighth of its size: fast, and still to its last byte
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise Skip("picture that does not decode", "image") from None
    if data:
        file = Path(folder).resolve() / "images" / f"{hashlib.sha256(data).hexdigest()[:32]}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(f".{common.RANK}").write_bytes(data)
        file.with_suffix(f".{common.RANK}").replace(file)  # whole or not at all
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def read_pairs(source, image_root, folder, limit=None):
    """(format name, rows {id, image, prompt, chosen, rejected[, category]}, Counter of "rows read", "skipped: <reason>") of
    the first `limit` rows of a source (see read_rows). ids are the source's own where it has them, made unique; images: see
    place_image. Of each reason to skip the first row is named. Unknown columns or nothing left: stop."""
    name, rows, counts, ids, seen = None, [], Counter(), set(), set()
    for k, ((file, number), row) in enumerate(islice(read_rows(source), limit)):
        row = defaultdict(lambda: None, {column.lower(): value for column, value in row.items()})
        if number == 1:
            fits = next((n for n, (columns, _) in FORMATS.items() if {*columns.split()} <= {*row} and name in (None, n)), None)
            name = fits or common.stop(f"{file} row 1: the columns {', '.join(row)} are not those of {name or 'a known format: '}" + (
                "" if name else "; ".join(f"{n} ({columns})" for n, (columns, _) in FORMATS.items())))
        counts["rows read"] += 1
        try:
            row = {"id": row["id"], "image": row["image"] or row["images"], **FORMATS[name][1](row)}
            if missing := [side for side in ("chosen", "rejected") if not (row[side] or "").strip()]:
                raise Skip(f"no {missing[0]}", missing[0])
            if row["chosen"].strip() == row["rejected"].strip():
                raise Skip("identical responses", "rejected")
            row["prompt"] = re.sub(r"<image>\n?|\n<image>", "", row["prompt"] or "")
            row["image"] = place_image(row["image"], image_root, folder)
            if (content := tuple(row[field] for field in ("prompt", "image", "chosen", "rejected"))) in seen:
                raise Skip("duplicate row", "prompt")
        except (Skip, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason, field = error.args if isinstance(error, Skip) else (f"not a row of {name}", f"? ({error!r})")
            counts[f"skipped: {reason}"] += 1
            if counts[f"skipped: {reason}"] == 1:
                print(f"skipped {file} row {number}, field {field}: {reason} (later ones are only counted)")
            continue
        seen.add(content)
        row["id"] = str(row["id"] or f"{Path(row['image']).stem}-{k}")
        while row["id"] in ids:
            row["id"] += f"-{k}"
        ids.add(row["id"])
        rows.append(row)
    print(f"{source}: read as {name}, {len(rows)} of {counts['rows read']} rows")
    return name, rows or common.stop(f"{source} holds no usable row: {dict(counts)}; --image-root is {image_root}"), counts


# ---- Sampling --------------------------------------------------------------------------------------------------------
def in_chunks(rows, done, batch_size, n, describe):
    """Yields (chunk, bar) for fixed chunks of rows that are not wholly done: a resumed run forms the same batches, so it writes the
    same bytes. A chunk makes 8 batches of n sequences per row, which is what so many processes share, or an interruption costs."""
    size = 8 * max(1, batch_size // n)
    with tqdm(total=len(rows), desc=describe, unit="row", dynamic_ncols=True, disable=None, file=sys.stdout) as bar:
        for chunk in (rows[i:i + size] for i in range(0, len(rows), size)):
            if all(row["id"] in done for row in chunk):
                bar.update(len(chunk))
            else:
                yield chunk, bar


def write_critiques(pairs, model, processor, vocabulary, path, n, guided, args, seed):
    """n critiques per pair and order, guided by the reference or not (04 samples by this too), kept in path: rows
    {question, critique, verdict, style, log_odds: r in nats or None, dropped: the filters' reason or None}."""
    evidence = {pair["id"]: pair["evidence"] for pair in pairs}
    questions = [question for pair in pairs for question in both_orders(pair)]
    writer = RowWriter(path)
    done = {question["id"] for question in questions if f"{question['id']}-{n - 1}" in writer.done}
    for chunk, bar in in_chunks(questions, done, args.batch_size, n, "critiques"):
        requests = []
        for question in chunk:
            status = {found["object"]: found["status"] for found in evidence[question["pair_id"]]}
            text = common.build_judge_prompt(question["prompt"], question["response_a"], question["response_b"], args.style,
                                             render_reference(question, status, vocabulary) if guided else None)
            requests.append({"id": question["id"], "image": Path(args.image_root) / question["image"], "text": text})
        answers = common.sample(model, processor, requests, n, args.temperature, args.max_new_tokens, seed, args.batch_size, bar)
        for question, samples in zip(chunk, answers):
            for k, answer in enumerate(samples):
                if f"{question['id']}-{k}" not in writer.done:
                    reason = reason_to_drop(answer["text"], answer["complete"], question, evidence[question["pair_id"]],
                                            vocabulary, args.style)
                    writer.write({**question, "id": f"{question['id']}-{k}", "critique": answer["text"], "style": args.style,
                                  "verdict": answer["verdict"], "log_odds": answer["log_odds"], "dropped": reason})
    return writer.rows


def keep_distinct(samples):
    """The kept critiques, each text once per question."""
    kept = {}
    for row in (row for row in samples if row["dropped"] is None):
        kept.setdefault((row["pair_id"], row["order"], row["critique"]), {
            name: value for name, value in row.items() if name not in ("dropped", "log_odds")})
    return [*kept.values()]


# ---------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=int, help="use only the first so many training pairs")
    add("--image-root", help="default: as in stage 01")
    add("--endpoint", help="URL of an OpenAI-compatible server that samples instead, such as http://localhost:8000/v1")
    add("--style", choices=tuple(common.INSTRUCTIONS), default="critique", help="critique: claims; descriptive: image first; none: verdict")
    add("--critiques", type=int, default=4, help="M, critiques written per pair and order")
    add("--temperature", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=512, help="longest critique; an unfinished one is dropped")
    return parser.parse_args(argv)


def main(args):
    ift.inherit(args, "01_preferences", ("model", "max_image_tokens", "image_root"))
    folder = start_stage(args, "02_critiques")
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    source = Path(args.run) / "01_preferences" / "preferences.jsonl"
    vocabulary = json.loads(source.with_name("vocabulary.json").read_text())
    pairs = read_jsonl(source, ("id", "image", "prompt", "chosen", "rejected", "split", "evidence"))
    pairs = [pair for pair in pairs if pair["split"] == "train"][:args.pairs] or common.stop(
        f"{source} has no pair in split 'train': lower --validation in stage 01")
    print(f"{len(pairs)} pairs x 2 orders x {args.critiques} critiques, style {args.style}")
    model, processor = ift.load_judge(args)

    # 2. write, filter --------------------------------------------------------------------------------------------
    samples = write_critiques(pairs, model, processor, vocabulary, folder / "samples.jsonl", args.critiques, True, args, args.seed)
    kept = keep_distinct(samples) or common.stop(
        f"no critique was kept: {dict(Counter(row['dropped'] for row in samples))}; read {folder}/samples.jsonl")

    # 3. save and report ------------------------------------------------------------------------------------------
    common.write_json(folder / "critiques.jsonl", kept)
    counts = {"critiques written": len(samples)}
    counts |= {f"dropped: {reason}": n for reason, n in Counter(row["dropped"] for row in samples).most_common() if reason}
    counts |= {"repeated": sum(row["dropped"] is None for row in samples) - len(kept), "kept": len(kept)} | {
        f"  kept in order {order}": n for order, n in sorted(Counter(row["order"] for row in kept).items())}
    counts |= {"  kept without checks": sum(not parse_checks(row["critique"]) for row in kept),
               "  questions with a kept critique": len({(row["pair_id"], row["order"]) for row in kept}),
               "  median length in words": round(median(len(row["critique"].split()) for row in kept))}
    print(f"\nthe first kept critique, {kept[0]['id']}:\n{kept[0]['critique']}\n")
    finish_stage(folder, args, counts, [source], f"python 03_train_ift.py --run {args.run}")


if __name__ == "__main__":
    main(parse_args())
