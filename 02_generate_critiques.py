"""02  The model writes critiques of each pair, guided by the expert's findings and the label; the sound ones are kept.

    written with:  image, question, A, B, findings + label          (reference-guided, both orders, M samples at T = 1)
    trained on as: image, question, A, B  ->  critique + verdict    (stage 03: the prompt there has no reference)
    kept if:       verdict = label  and  verdict follows from the critique's own checks  and  no check contradicts a
                   present/absent finding or names what the response does not say  and  the reference is not cited

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) findings are laid out as the very lines that the critique will hold, since models copy a separate list wrongly;
  2) "verdict = label" alone is too weak a filter: lucky verdicts with false facts pass it and training on them makes the
     judge worse, so the checks are held against each other and against the expert;
  3) pairs without findings (reasoning, general questions) are kept on verdict and leak alone, and counted apart.

Reads  01_preferences/preferences.jsonl (split "train"), vocabulary.json.
Writes 02_critiques/samples.jsonl (all, with the reason why one was dropped) and
       critiques.jsonl {id, pair_id, image, prompt, response_a, response_b, label, critique, verdict, style}

    python 02_generate_critiques.py --run runs/demo
    python 02_generate_critiques.py                              # one GPU: 5,000 pairs x 2 orders x 4 critiques
"""
import argparse
import json
import re
from collections import Counter
from pathlib import Path
from statistics import median

import common
from common import RowWriter, both_orders, finish_stage, in_chunks, inherit, parse_checks, read_jsonl, start_stage

LEAK = re.compile(r"\b(?:reference|ground[- ]truth|detector|known to be true|the findings?|the expert|"
                  r"(?:the|given|correct) label (?:says|is|states|shows|gives))\b", re.IGNORECASE)


# ---- The method: the reference, and what makes a critique worth training on ------------------------------------------
def render_reference(question, status, vocabulary):
    """The expert's findings and the label as the lines that a critique would hold; "unsure" where the model must look.
    question: {"response_a", "response_b", "label"}; status: {object: "present" | "absent" | "unsure"}."""
    word = {"present": "yes", "absent": "no", "unsure": "unsure"}
    lines = [f"{side}: {name}: {word[status[name]]}" for side, text in
             (("A", question["response_a"]), ("B", question["response_b"]))
             for name in find_mentions(text, vocabulary) if name in status]
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
    if any(status.get(name) == "absent" and name not in checked[side] for side in "AB" for name in said[side]):
        return "leaves out an absent object"
    return None


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
# Stages 01 and 05 read texts by this too; it stands here since this stage is the language side of the method.
# (end of a singular, end of its plural), the first that fits; what is plural already stays as it is
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
CUES = (r"no(?! (?:doubt|more|less|fewer|longer|matter|wonder|problem|one|(?:signs?|traces?|evidence) of)\b)(?= \w)|"
        r"neither|never|nor(?: (?:is|are|was|were) there| do(?:es)? (?:it|the image) \w+)?|"
        r"(?:\w+n't|not|cannot)(?! (?:only|just|merely|simply|to mention|far|too|very|sure|clear|necessarily|all|every|"
        r"many|much|yet|fully|entirely|completely|quite|directly)\b)|"
        r"(?:without(?! \w+ing\b)|instead of|rather than|lack(?:s|ing)|"
        r"(?:absence|devoid|free|lack|no (?:signs?|traces?|evidence)) of)(?: (?:the|its|his|her|their))?")
ENDS = (r"but|with|while|although|though|however|except|besides|that|which|who|where|because|since|so|as|is|are|was|"
        r"were|has|can|there|the|this|these|those|his|her|their|its|it|he|she|they|you|we|just|only|instead(?! of)|on|"
        r"in|at|near|behind|under|beside|next|around|along|between|from|by|over|through|for|into|"
        r"and (?:an?|one|two|three|some|several)|to(?! (?:be|have|contain|include|show)\b)|"
        r"(?<!not )(?<!n't )(?<!be )\w+ing an?")  # "a man with no shirt eating a donut", but "not eating a donut"
NEGATED = re.compile(rf"\b(?:{CUES})\b(?:(?!\b(?:{ENDS})\b(?! any\b))"
                     r"(?:[^,.;:!?\n()—]|,(?=[^.;:]{0,60}\b(?:or|nor)\b)))*")
NOT_THERE = re.compile(
    r"(?:,? (?:and|or|nor) [\w ]{1,20}?)? (?:is|are|was|were)(?: absent| nowhere| missing(?! an?\b)|"
    r"(?: not|n't) (?:present|visible|seen|shown|depicted|there|in (?:the|this) (?:image|picture|photo|scene)))\b")
# A colour or a game more often than a thing: counted after an article or a fruit, unless a noun or a colour follows
RARELY_THINGS = {"orange", "baseball", "basketball", "football", "volleyball"}
AS_A_THING = re.compile(
    r"\b(?:an?|one|the|whole|half|peeled|sliced|fresh|(?:apple|banana|lemon)s?,?(?: and| or)?) (\w+)(?=$| (?:"
    r"and (?:an?|the|one|two|some)|or|is|in|on|at|near|next|beside|with|that|which|from|to|towards?|into|through|over|"
    r"under|behind|while|as|across|sits|lying|sitting)\b|(?! |, (?:black|white|red|yellow|brown)\b)\W)")


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
    known, longest = {*vocabulary.values()}, max(len(phrase.split()) for phrase in phrases)
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
    things = {match.start(1) for match in AS_A_THING.finditer(text)}
    mentions = []
    for (start, end, phrase), (next_start, _, next_phrase) in zip(found, [*found[1:], (-1, -1, "")]):
        modifier = (text[end:next_start] == " " and " " not in next_phrase  # "baby" of "baby elephant"
                    or re.match(r"-\w", text[end:]))  # "dog" of "dog-friendly"
        denied = any(a <= start < b for a, b in negated) or NOT_THERE.match(text, end)
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


# ---- Sampling --------------------------------------------------------------------------------------------------------
def write_critiques(pairs, model, processor, vocabulary, path, n, guided, args, seed):
    """n critiques per pair and order, guided by the reference or not (04 samples by this too), kept in path: rows
    {question, critique, verdict, style, log_odds: r in nats or None, dropped: the filters' reason or None}."""
    evidence = {pair["id"]: pair["evidence"] for pair in pairs}
    questions = [question for pair in pairs for question in both_orders(pair)]
    writer = RowWriter(path)
    written = {row["id"] for row in writer.rows}
    done = {question["id"] for question in questions if f"{question['id']}-{n - 1}" in written}
    for chunk, bar in in_chunks(questions, done, args.batch_size, "critiques"):
        requests = []
        for question in chunk:
            status = {found["object"]: found["status"] for found in evidence[question["pair_id"]]}
            text = common.build_judge_prompt(question["prompt"], question["response_a"], question["response_b"], args.style,
                                             render_reference(question, status, vocabulary) if guided else None)
            requests.append({"id": question["id"], "image": Path(args.image_root) / question["image"], "text": text})
        answers = common.sample(model, processor, requests, n, args.temperature, args.max_new_tokens, seed, args.batch_size, bar)
        for question, samples in zip(chunk, answers):
            for k, answer in enumerate(samples):
                if f"{question['id']}-{k}" not in written:
                    reason = reason_to_drop(answer["text"], answer["complete"], question, evidence[question["pair_id"]],
                                            vocabulary, args.style)
                    writer.write({**question, "id": f"{question['id']}-{k}", "critique": answer["text"], "style": args.style,
                                  "verdict": answer["verdict"], "log_odds": answer["log_odds"], "dropped": reason})
    return writer.rows


def keep_distinct(samples):
    """The kept critiques, each text once per question."""
    seen, kept = set(), []
    for row in samples:
        key = (row["pair_id"], row["order"], row["critique"])
        if row["dropped"] is None and key not in seen:
            seen.add(key)
            kept.append({name: value for name, value in row.items() if name not in ("dropped", "log_odds")})
    return kept


# ---------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/default", help="run directory, shared by all stages")
    add("--pairs", type=int, help="use only the first so many training pairs")
    add("--model", help="default: as in stage 01")
    add("--max-image-tokens", type=int, help="default: as in stage 01")
    add("--image-root", help="default: as in stage 01")
    add("--device", help="cuda, mps or cpu; default: the first of these that is there")
    add("--style", choices=tuple(common.INSTRUCTIONS), default="critique",
        help="critique: claim by claim; descriptive: the image first; none: the verdict alone")
    add("--critiques", type=int, default=4, help="M, critiques written per pair and order")
    add("--temperature", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=512, help="longest critique; an unfinished one is dropped")
    add("--batch-size", type=int, default=64, help="sequences decoded together")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="delete this stage's folder first")
    return parser.parse_args(argv)


def main(args):
    inherit(args, "01_preferences", ("model", "max_image_tokens", "image_root"))
    folder = start_stage(args, "02_critiques")
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    source = Path(args.run) / "01_preferences" / "preferences.jsonl"
    vocabulary = json.loads(source.with_name("vocabulary.json").read_text())
    pairs = read_jsonl(source, ("id", "image", "prompt", "chosen", "rejected", "split", "evidence"))
    pairs = [pair for pair in pairs if pair["split"] == "train"][:args.pairs]
    if not pairs:
        common.stop(f"{source} has no pair in split 'train': lower --validation in stage 01")
    model, processor = common.load_judge(args.model, None, args.device, args.max_image_tokens)
    print(f"{len(pairs)} pairs x 2 orders x {args.critiques} critiques, style {args.style}")

    # 2. write, filter --------------------------------------------------------------------------------------------
    samples = write_critiques(pairs, model, processor, vocabulary, folder / "samples.jsonl", args.critiques, True, args, args.seed)
    kept = keep_distinct(samples)
    if not kept:
        common.stop(f"no critique was kept: {dict(Counter(row['dropped'] for row in samples))}; read {folder}/samples.jsonl")

    # 3. save and report ------------------------------------------------------------------------------------------
    common.write_jsonl(folder / "critiques.jsonl", kept)
    counts = {"critiques written": len(samples)}
    counts |= {f"dropped: {reason}": n for reason, n in Counter(row["dropped"] for row in samples).most_common() if reason}
    counts |= {"repeated": sum(row["dropped"] is None for row in samples) - len(kept), "kept": len(kept)}
    counts |= {f"  kept in order {order}": n for order, n in sorted(Counter(row["order"] for row in kept).items())}
    counts |= {"  kept without checks": sum(not parse_checks(row["critique"]) for row in kept),
               "  questions with a kept critique": len({(row["pair_id"], row["order"]) for row in kept}),
               "  median length in words": round(median(len(row["critique"].split()) for row in kept))}
    print(f"\nthe first kept critique, {kept[0]['id']}:\n{kept[0]['critique']}\n")
    finish_stage(folder, args, counts, [source], f"python 03_train_ift.py --run {args.run}")


if __name__ == "__main__":
    main(parse_args())
