"""01  Preference pairs from a vision expert: the better response names nothing that the detector says is absent.

    status(o) = present  if max confidence of class o >= --present       chosen:   no absent mention, most present ones
                absent   if max confidence of class o <  --absent        rejected: at least one absent mention
                unsure   between, or a class that the expert does not know

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) "not detected" is weak evidence, so there is a band between present and absent in which nothing is decided;
  2) where no candidate hallucinates, a rejected response is made by swapping one present object of the chosen text for a
     verified absent one that co-occurs with the scene's objects in this corpus (source: "swapped");
  3) --expert none is the paper's ablation made exact: the policy's own P(yes) to "is there a ...?" is the only check.

Reads  pictures (--images), or pairs (--pairs FILE, folder or hub id: any of FORMATS in 02, POVID to TRL and our own).
Writes 01_preferences/: candidates.jsonl, detections.jsonl, vocabulary.json, contact_sheet.png, preferences.jsonl {id, image,
       prompt, chosen, rejected, source, split, hallucinated, evidence: [{object, claimed_by, status, confidence, box}]}

    python 01_build_preferences.py --run runs/demo --images world/images --model world/model --expert world/expert.pt
    python 01_build_preferences.py --images coco/train2017       # one GPU: Qwen2-VL-7B writes, YOLO11x verifies
    python 01_build_preferences.py --pairs openbmb/RLAIF-V-Dataset --exclude MMInstruction/VL-RewardBench
"""
import importlib
import json
import random
import re
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import common
from common import RowWriter, finish_stage, read_jsonl, row_seed, share_out, start_stage, stop

two, three = map(importlib.import_module, ("02_generate_critiques", "03_train_ift"))  # 02: what texts and published files say
COCO_VOCABULARY, SYNONYMS, Skip, swap_object = two.COCO_VOCABULARY, two.SYNONYMS, two.Skip, two.swap_object
build_vocabulary, find_mentions, place_image, read_pairs = two.build_vocabulary, two.find_mentions, two.place_image, two.read_pairs

PROMPTS = ["Describe this image in detail.", "What objects are in this image?", "Write a caption that names what you see.",
           "What is happening in this picture?", "Describe the scene and the objects in it."]


# ---- The method: verification and pairing (mentions: stage 02) -----------------------------------------------------
def verify(mentions, detections, present, absent, known):
    """{object: "present" | "absent" | "unsure"} for each mentioned object, from the best detection of its class.
    detections: list of {"object", "confidence" in [0,1], "box"}; known: the classes that the expert can find."""
    status = {}
    for name in mentions:
        confidence = max((found["confidence"] for found in detections if found["object"] == name), default=0.0)
        status[name] = "unsure" if name not in known or absent <= confidence < present else \
            "present" if confidence >= present else "absent"
    return status


def pair_candidates(candidates, status, swaps, vocabulary, rng):
    """(chosen, rejected, source), or (None, None, reason) where no pair can be made.
    candidates: list of (text, mentions); status: {object: "present" | "absent" | "unsure"} for all of them;
    swaps: absent objects to put in where no candidate hallucinates, the preferred first; rng: random.Random of this row.
    chosen names nothing absent and the most present objects; rejected names an absent object and, so that the pair differs
    in that alone as far as possible, the most present ones. Ties go to the earlier candidate.
    """
    def n_with(mentions, wanted):
        return sum(status[name] == wanted for name in mentions)

    clean = [c for c in candidates if n_with(c[1], "absent") == 0 and n_with(c[1], "present") > 0]
    faulty = [c for c in candidates if n_with(c[1], "absent") > 0]
    if not clean:
        return None, None, "no candidate without hallucination"
    chosen, mentions = max(clean, key=lambda c: n_with(c[1], "present"))
    if faulty:
        return chosen, max(faulty, key=lambda c: n_with(c[1], "present"))[0], "sampled"
    if not swaps:
        return None, None, "no candidate hallucinates, no absent object to swap in"
    old = rng.choice([name for name in mentions if status[name] == "present"])
    return chosen, swap_object(chosen, old, swaps[0], vocabulary), "swapped"


def check_given_pair(chosen, rejected, status):
    """None where the expert agrees with a given pair, else the reason to drop it. chosen, rejected: lists of mentions."""
    return "names no object of the vocabulary" if not chosen and not rejected else \
        "chosen hallucinates by the expert" if any(status[name] == "absent" for name in chosen) else \
        None if any(status[name] == "absent" for name in rejected) else "rejected does not hallucinate by the expert"


def propose_swaps(mentions, co_occurrence, classes, rng, n=8):
    """n unmentioned classes to ask the expert about, drawn without repeats with weight 1 + how often they are mentioned
    together with this scene's objects in the corpus: the plausible errors, which a language prior makes."""
    weight = {c: 1 + sum(co_occurrence[frozenset((c, m))] for m in mentions) for c in classes if c not in mentions}
    return sorted(weight, key=lambda c: rng.random() ** (1 / weight[c]), reverse=True)[:n]


# ---- Experts: examine(image paths, questions: a list of class names per image) -> a list of detections per image -----
def coco_names(names):
    """{label: class}: where all of COCO's classes are there ("sofa", "tvmonitor"), by its names, without "N/A" and the like."""
    phrases = {form: name for phrase, name in COCO_VOCABULARY.items() for form in (phrase, phrase.replace(" ", ""))}
    coco = {label: phrases[name.lower()] for label, name in names.items() if name.lower() in phrases}
    return coco if len(names) <= 91 and len({*coco.values()}) == len(SYNONYMS) else names


def as_detections(names, labels, scores, boxes):
    return [{"object": names[int(label)], "confidence": round(score, 4), "box": [round(v, 1) for v in box]}
            for label, score, box in zip(labels.tolist(), scores.tolist(), boxes.tolist()) if int(label) in names]


class Detector:
    """Ultralytics detection weights: they find their classes whatever is asked; open ones (YOLO-World) are given `classes`."""

    def __init__(self, weights, floor, device, classes):
        from ultralytics import YOLO, utils  # AGPL-3.0
        Image.open = getattr(utils.patches, "_image_open", Image.open)  # Pillow's own: theirs installs packages for broken files
        self.model, self.floor, self.device = YOLO(weights), floor, device  # below --absent no box can matter
        if hasattr(self.model, "set_classes"):
            self.model.set_classes(classes)
        self.names = coco_names(dict(self.model.names))
        self.classes = [*self.names.values()]

    def examine(self, images, questions):
        results = self.model.predict([*map(str, images)], conf=self.floor, batch=len(images), device=self.device, verbose=False)
        return [as_detections(self.names, r.boxes.cls, r.boxes.conf, r.boxes.xyxy) for r in results]


class HubDetector:
    """Transformers detectors: closed (DETR, RT-DETR), or open (GroundingDINO, OWLv2: asked about each image's classes alone)."""

    def __init__(self, name, floor, device):
        import transformers as hf
        kind = hf.AutoConfig.from_pretrained(name).model_type
        self.tokens, self.open = kind.endswith("grounding-dino"), kind.endswith(("grounding-dino", "owlv2", "owlvit"))
        loader = hf.AutoModelForZeroShotObjectDetection if self.open else hf.AutoModelForObjectDetection
        self.model, self.floor = loader.from_pretrained(name).to(common.pick_device(device)).eval(), floor
        self.processor = (hf.AutoProcessor if self.open else hf.AutoImageProcessor).from_pretrained(name)
        self.names = {} if self.open else coco_names(self.model.config.id2label)
        self.classes = [*self.names.values()] or None

    @torch.inference_mode()
    def examine(self, images, questions):
        if len(images) > 8:  # pictures of about a megapixel each
            return self.examine(images[:8], questions[:8]) + self.examine(images[8:], questions[8:])
        pictures, labels = [*map(common.load_image, images)], [self.names or dict(enumerate(asked)) for asked in questions]
        texts = [["a photo of a " * (not self.tokens) + re.sub(r"[\W_]+", " ", name) for name in asked] for asked in questions]
        asks = {"text": texts, "padding": True if self.tokens else "max_length", "truncation": True} if self.open else {}
        inputs = self.processor(images=pictures, return_tensors="pt", **asks)
        outputs = self.model(**inputs.to(self.model.device))
        if self.tokens:
            outputs.logits = class_logits(outputs.logits, inputs["input_ids"], self.processor.tokenizer)
        for k, asked in enumerate(questions if self.open else ()):
            outputs.logits[k, :, len(asked):] = -torch.inf  # where others of the batch have more classes, empty ones fill up
        results = getattr(self.processor, "image_processor", self.processor).post_process_object_detection(
            outputs, threshold=self.floor, target_sizes=[(picture.height, picture.width) for picture in pictures])
        return [as_detections(names, r["labels"], r["scores"], r["boxes"]) for names, r in zip(labels, results)]


def class_logits(logits, input_ids, tokenizer):
    """GroundingDINO's token logits (B, Q, L) for "cat. teddy bear." -> class logits (B, Q, C): the mean probability of the tokens
    of a name. (The best token alone would let every dog be a hot dog.)"""
    dot = tokenizer.convert_tokens_to_ids(".")
    place = (input_ids == dot).cumsum(1)  # (B, T): how many names have ended; the special tokens fall out
    word = ~torch.isin(input_ids, torch.tensor([dot, *tokenizer.all_special_ids], device=input_ids.device))
    member = (place[:, :, None] == torch.arange(int(place.max()), device=place.device)) & word[:, :, None]  # (B, T, C)
    weight = member / member.sum(1, keepdim=True).clamp(min=1)
    return (logits[:, :, :weight.shape[1]].sigmoid() @ weight.to(logits.dtype)).logit()


class OwnAnswers:
    """--expert none: the policy checks itself; confidence = P(yes) / (P(yes) + P(no)) at the first token of its answer."""

    def __init__(self, model, processor):
        self.model, self.processor, self.classes = model, processor, None
        ids = [processor.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no", "Yes", "No")]
        self.yes, self.no = ids[0::2], ids[1::2]

    @torch.inference_mode()
    def examine(self, images, questions):
        found = []
        for image, names in zip(images, questions):
            asked = [f"Is there a {name} in the image? Answer yes or no." for name in names]
            inputs = common.encode_prompts(self.processor, asked, [image] * len(asked)).to(self.model.device)
            log_p = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)  # (names, V)
            odds = log_p[:, self.yes].logsumexp(-1) - log_p[:, self.no].logsumexp(-1)  # (names,)
            found.append([{"object": n, "confidence": round(p, 4), "box": None} for n, p in zip(names, odds.sigmoid().tolist())])
        return found


def load_expert(name, classes, model, processor, args):
    try:
        return OwnAnswers(model, processor) if name == "none" else Detector(name, args.absent, args.device, classes) if \
            name.endswith(".pt") else HubDetector(name, args.absent, args.device)
    except Exception as error:  # of many kinds: no such file or model, not a detector, no connection, a package that is missing
        stop(f"--expert {name}: expected ultralytics weights (*.pt), a transformers detector (owner/name, or a folder) or none; "
             f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


# ---- Data: what to verify, candidates, findings, pairs ---------------------------------------------------------------
def load_items(args, folder):
    """(rows to verify {id, image, prompt[, chosen, rejected]}, counts): given pairs, or one row for each picture of a folder."""
    readable, counts = read_pairs(args.pairs, args.image_root, folder, args.limit)[1:] if args.pairs else ([], Counter())
    if args.images:
        images, lines = Path(args.images).resolve(), Path(args.prompts).read_text().split("\n") if args.prompts else PROMPTS
        prompts = [line.strip() for line in lines if line.strip()] or stop(f"{args.prompts} holds no prompt")
        paths = sorted(p for p in images.rglob("*") if re.search(r"(?i)\.(png|jpe?g|webp)$", p.name)) or stop(f"no images in {images}")
        for path in paths[:args.limit]:
            counts["rows read"] += 1
            try:
                readable.append({"id": f"{path.relative_to(images).with_suffix('').as_posix()}-0",
                                 "image": place_image(path, args.image_root, folder),
                                 "prompt": prompts[row_seed(args.seed, "prompt", path.name) % len(prompts)]})
            except Skip as skip:
                counts[f"skipped: {skip.args[0]}"] += 1
                print(f"skipped {path}: {skip.args[0]}")
    for source in args.exclude:
        readable = without_overlap(readable, source, args.image_root, counts)
    return readable or stop(f"no row is left: {dict(counts)}; --image-root tells where relative paths start"), counts


def difference_hash(path):
    """64 bits, one for each cell of an 8 x 8 grid: is it darker than its right neighbour? Survives scaling and re-encoding."""
    grey = common.load_image(path).convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()  # 8 rows of 9 cells
    return sum((grey[9 * y + x] < grey[9 * y + x + 1]) << 8 * y + x for y in range(8) for x in range(8))


def without_overlap(items, source, image_root, counts):
    """The items without an image within 2 of 64 bits of one in the evaluation set `source`, or a response equal to one there but
    for case, punctuation and spacing (not compared below 20 characters: "Yes, there is." recurs by chance)."""
    def texts(row):
        plain = (" ".join(re.findall(r"\w+", row.get(side, "").lower())) for side in ("chosen", "rejected"))
        return {text for text in plain if len(text) >= 20}

    root = Path(source) if Path(source).is_dir() else Path(source).parent
    with tempfile.TemporaryDirectory() as scratch:
        rows = read_pairs(source, root, scratch)[1]
        known, hashes = set().union(*map(texts, rows)), {difference_hash(root / row["image"]) for row in rows}
    codes = {image: difference_hash(Path(image_root) / image) for image in {item["image"] for item in items}}
    seen = {image for image, code in codes.items() if any((code ^ other).bit_count() <= 2 for other in hashes)}
    fresh = [item for item in items if item["image"] not in seen]
    kept = [item for item in fresh if not texts(item) & known]
    counts.update({f"excluded: image in {source}": len(items) - len(fresh), f"excluded: text in {source}": len(fresh) - len(kept)})
    return kept


def write_candidates(items, model, processor, folder, args):
    """{id: [text]}: K responses of the policy per image, complete ones only (kept in candidates.jsonl)."""
    writer = RowWriter(folder / "candidates.jsonl")
    for chunk, bar in two.in_chunks(items, writer.done, args.batch_size, args.candidates, "candidates"):
        requests = [{"id": row["id"], "image": Path(args.image_root) / row["image"], "text": row["prompt"]} for row in chunk]
        answers = common.sample(model, processor, requests, args.candidates, args.temperature, args.max_new_tokens,
                                args.seed, args.batch_size, bar)
        for row, texts in zip(chunk, answers):
            if row["id"] not in writer.done:
                writer.write({**row, "candidates": [a["text"].strip() for a in texts if a["complete"]]})
    return {row["id"]: row["candidates"] for row in writer.rows}


def examine(questions, expert, folder, args):
    """{image: row of detections.jsonl} for {image: classes asked about}: each image examined once (kept in that file)."""
    writer = RowWriter(folder / "detections.jsonl")
    for chunk, bar in two.in_chunks([{"id": image} for image in questions], writer.done, 32, 1, "examine"):
        asked = {row["id"]: list(dict.fromkeys(questions[row["id"]])) for row in chunk}
        names = [name for name in asked if asked[name] or expert.classes]  # an open expert needs something to look for
        found = dict(zip(names, share_out([names[i:i + 32] for i in range(0, len(names), 32)], lambda batch: expert.examine(
            [Path(args.image_root) / name for name in batch], [asked[name] for name in batch]))))
        for name in (name for name in asked if name not in writer.done):
            writer.write({"id": name, "asked": asked[name], "detections": found.get(name, [])})
        bar.update(len(chunk))
    return {row["id"]: row for row in writer.rows}


def read_detections(path, images, vocabulary):
    """{image: row {id, detections[, asked]}} of findings made elsewhere (--detections), one row for each of the images."""
    found = {row["id"]: row for row in read_jsonl(path, ("id", "detections"))}
    for row in found.values():
        try:
            wrong = [d for d in row["detections"] if not 0 <= d["confidence"] <= 1 or len(d["box"] or "none") != 4 or not d["object"]]
        except (KeyError, TypeError) as error:
            wrong = [repr(error)]
        if wrong:
            stop(f"{path} row {row['id']!r}, field detections: not {{object, confidence: 0 to 1, box: 4 numbers or null}}: {wrong[0]}")
    check_fit({d["object"] for row in found.values() for d in row["detections"]}, {*vocabulary.values()}, path, "the vocabulary")
    missing = [image for image in images if image not in found]
    return stop(f"{path} has no row for {len(missing)} of {len(images)} images, such as id {missing[0]!r}") if missing else found


def read_vocabulary(path):
    try:
        return {phrase.lower(): name + "" for phrase, name in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        stop(f"--vocabulary {path}: expected json {{phrase: class}}; {error}")


def check_fit(names, known, what, where):
    """Stop where no class name is known; else say which are not (they stay unsure)."""
    if unknown := sorted(names - known):
        message = f"{len(unknown)} of {len(names)} classes of {what} are not among those of {where}: {', '.join(unknown[:5])}"
        print(message) if names & known else stop(f"{message}; it has {', '.join(sorted(known)[:5])}")


def build_pair(item, texts, mentions, swaps, detections, status, vocabulary, seed):
    """(preference row, None) or (None, reason for the drop)."""
    rng = random.Random(row_seed(seed, "pair", item["id"]))
    if "chosen" in item:
        chosen, rejected, source = item["chosen"], item["rejected"], "given"
        if reason := check_given_pair(mentions[0], mentions[1], status):
            return None, reason
    else:
        absent = [name for name in swaps if status[name] == "absent"]
        chosen, rejected, source = pair_candidates(list(zip(texts, mentions)), status, absent, vocabulary, rng)
        if chosen is None:
            return None, source
    claims = {"chosen": find_mentions(chosen, vocabulary), "rejected": find_mentions(rejected, vocabulary)}
    evidence = []
    for name in dict.fromkeys(claims["chosen"] + claims["rejected"]):
        best = max((d for d in detections if d["object"] == name), key=lambda d: d["confidence"], default={})
        sides = [side for side in ("chosen", "rejected") if name in claims[side]]
        evidence.append({"object": name, "claimed_by": sides[0] if len(sides) == 1 else "both", "status": status[name],
                         "confidence": best.get("confidence", 0.0), "box": best.get("box")})
    if not (hallucinated := [name for name in claims["rejected"] if status[name] == "absent"]):  # merged with its neighbours
        return None, "the swap names nothing absent"
    return {"id": item["id"], "image": item["image"], "prompt": item["prompt"], "chosen": chosen, "rejected": rejected,
            "source": source, "hallucinated": hallucinated, "evidence": evidence}, None


def assign_splits(rows, n_validation, n_train, seed):
    """Rows with "split": the first n_validation pairs (for 03 and 04 to watch), n_train pairs for critiques (02), the rest
    the pool of 04. Images are shuffled, and all pairs of an image fall into one split."""
    by_image, placed = {}, []
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    for image in sorted(by_image, key=lambda name: row_seed(seed, "split", name)):
        split = "validation" if len(placed) < n_validation else "train" if len(placed) < n_validation + n_train else "pool"
        placed += [{**row, "split": split} for row in by_image[image]]
    return placed


def draw_contact_sheet(rows, findings, image_root, path, n=12):
    """The first n pairs with the expert's boxes: what a person should look at before training on them."""
    figure = Figure((14, 4.6 * -(-n // 4)))
    for axis, row in zip(figure.subplots(-(-n // 4), 4, squeeze=False).flat, rows):
        axis.axis("off")
        axis.imshow(common.load_image(Path(image_root) / row["image"]))
        named = {found["object"] for found in row["evidence"]}
        for found in (found for found in findings[row["image"]]["detections"] if found["box"] and found["object"] in named):
            x1, y1, x2, y2 = found["box"]
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="lime"))
            axis.text(x1, y1, f"{found['object']} {found['confidence']:.2f}", fontsize=7, color="lime", va="bottom")
        for k, (text, colour) in enumerate((("+ " + row["chosen"], "green"), ("- " + row["rejected"], "firebrick"), (
                f"absent: {', '.join(row['hallucinated'])} ({row['source']})", "black"))):
            axis.text(0, -0.03 - 0.11 * k, textwrap.fill(text, 52, max_lines=2), fontsize=8, color=colour, va="top",
                      transform=axis.transAxes)
    figure.subplots_adjust(0.01, 0.09, 0.99, 0.98, wspace=0.08, hspace=0.36)
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = common.stage_parser(__doc__)
    parser.set_defaults(model="Qwen/Qwen2-VL-7B-Instruct")  # the policy, too, which writes the candidates
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder of images for which the policy writes responses")
    source.add_argument("--pairs", help="published pairs instead: file or folder of parquet, json, jsonl, or hub id[:config]")
    add("--image-root", help="folder that image paths and COCO ids start from; default: --images, or the folder of --pairs")
    add("--exclude", nargs="+", default=[], help="evaluation sets, read like --pairs, whose images and responses are dropped")
    add("--prompts", help="text file, one prompt per line, instead of the built-in ones")
    add("--limit", type=int, help="read only the first so many rows or images")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--expert", default="yolo11x.pt", help="*.pt: ultralytics; owner/name: transformers; none: the policy")
    source.add_argument("--detections", help="findings made elsewhere, as in detections.jsonl, instead of an expert")
    add("--vocabulary", help="json {phrase: class}; default: the expert's classes, or COCO's, with plurals and synonyms")
    add("--endpoint", help="URL of an OpenAI-compatible server that samples instead, such as http://localhost:8000/v1")
    add("--candidates", type=int, default=4, help="K, responses per image")
    add("--temperature", type=float, default=1.0, help="of the candidates")
    add("--max-new-tokens", type=int, default=256, help="longest candidate; an unfinished one is dropped")
    add("--present", type=float, default=0.5, help="confidence from which an object counts as present")
    add("--absent", type=float, default=0.05, help="confidence below which an object counts as absent")
    add("--validation", type=int, default=200, help="pairs set aside for validation in 03 and 04")
    add("--train", type=int, default=5000, help="pairs for critiques (02); all further ones are the pool of 04")
    args = parser.parse_args(argv)
    if not 0 <= args.absent <= args.present <= 1 or (args.endpoint or args.shard) and args.expert == "none":
        parser.error(f"need 0 <= --absent {args.absent} <= --present {args.present} <= 1; no --endpoint or --shard for --expert none")
    near = args.images or (args.pairs if Path(args.pairs).is_dir() else Path(args.pairs).parent)
    args.image_root = str(Path(args.image_root or near).resolve())
    return args


def main(args):
    folder = start_stage(args, "01_preferences")
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    items, counts = load_items(args, folder)
    print(f"{len(items)} rows, {args.candidates if args.images else 2} responses each, expert {args.detections or args.expert}")
    vocabulary = read_vocabulary(args.vocabulary) if args.vocabulary else COCO_VOCABULARY
    model, processor = three.load_judge(args) if args.images or args.expert == "none" else (None, None)
    expert = None if args.detections else load_expert(args.expert, sorted({*vocabulary.values()}), model, processor, args)
    classes = expert.classes if expert else None  # None: what it finds is what it is asked about
    vocabulary = build_vocabulary(classes, SYNONYMS) if classes and not args.vocabulary else vocabulary
    everything = sorted({*vocabulary.values()})
    check_fit({*everything}, {*(classes or everything)}, "--vocabulary", f"--expert {args.expert}")

    # 2. candidates, mentions, findings ---------------------------------------------------------------------------
    texts = write_candidates(items, model, processor, folder, args) if args.images else \
        {item["id"]: [item["chosen"], item["rejected"]] for item in items}
    mentions = {item["id"]: [find_mentions(text, vocabulary) for text in texts[item["id"]]] for item in items}
    co_occurrence = Counter(frozenset((a, b)) for row in mentions.values() for text in row for a in text for b in text if a < b)
    swaps, questions = {}, {}
    for item in items:
        named = list(dict.fromkeys(name for names in mentions[item["id"]] for name in names))
        rng = random.Random(row_seed(args.seed, "swap", item["id"]))
        swaps[item["id"]] = propose_swaps(named, co_occurrence, everything, rng) if args.images else []
        questions.setdefault(item["image"], []).extend(named + swaps[item["id"]])
    findings = examine(questions, expert, folder, args) if expert else read_detections(args.detections, questions, vocabulary)

    # 3. pairs ----------------------------------------------------------------------------------------------------
    rows, reasons, statuses = [], Counter(), Counter()
    for item in items:
        key, finding = item["id"], findings[item["image"]]
        found, known = finding["detections"], classes or finding.get("asked") or everything
        status = verify({*swaps[key]}.union(*mentions[key]), found, args.present, args.absent, known)
        statuses.update(status[name] for name in set().union(*mentions[key]))
        row, reason = build_pair(item, texts[key], mentions[key], swaps[key], found, status, vocabulary, args.seed)
        reasons[f"dropped: {reason}" if reason else "pairs made"] += 1
        rows += [row] if row else []
    rows = assign_splits(rows, args.validation, args.train, args.seed) or stop(
        f"no pair could be made: {dict(reasons)}; mentions were {dict(statuses)}. Check --expert, --vocabulary, --absent")

    # 4. save and report ------------------------------------------------------------------------------------------
    common.write_json(folder / "preferences.jsonl", rows)
    common.write_json(folder / "vocabulary.json", vocabulary)
    if common.RANK == 0:
        draw_contact_sheet(rows, findings, args.image_root, folder / "contact_sheet.png")
    counts = {**counts, **reasons, **{f"  {k} pairs": v for k, v in Counter(row["source"] for row in rows).items()}}
    counts |= {f"  in split {k}": v for k, v in Counter(row["split"] for row in rows).items()}
    counts |= {f"mentions {k}": statuses[k] for k in ("present", "absent", "unsure")}
    finish_stage(folder, args, counts, [path for path in (args.pairs, args.detections) if path and Path(path).is_file()],
                 f"look at {folder}/contact_sheet.png, then python 02_generate_critiques.py --run {args.run}")


if __name__ == "__main__":
    main(parse_args())
