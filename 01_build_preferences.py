"""01  Preference pairs from a vision expert: the better response names nothing that the detector says is absent.

    status(o) = present  if max confidence of class o >= --present       chosen:   no absent mention, most present ones
                absent   if max confidence of class o <  --absent        rejected: at least one absent mention
                unsure   between, or a class that the expert does not know

Departures from the paper (arXiv 2506.13888), whose summary leaves these open:
  1) "not detected" is weak evidence, so there is a band between present and absent in which nothing is decided;
  2) where no candidate hallucinates, a rejected response is made by swapping one present object of the chosen text for a
     verified absent one that co-occurs with the scene's objects in this corpus (source: "swapped");
  3) --expert none is the paper's ablation made exact: the policy's own P(yes) to "is there a ...?" is the only check.

Reads  images (--images) or given pairs (--pairs, jsonl: image, prompt, chosen, rejected).
Writes 01_preferences/: candidates.jsonl, detections.jsonl, vocabulary.json, contact_sheet.png, preferences.jsonl {id, image,
       prompt, chosen, rejected, source, split, hallucinated, evidence: [{object, claimed_by, status, confidence, box}]}

    python 01_build_preferences.py --run runs/demo --images world/images --model world/model --expert world/expert.pt
    python 01_build_preferences.py --images coco/train2017       # one GPU: Qwen2-VL-7B writes, YOLO11x verifies
"""
import argparse
import importlib
import json
import random
import textwrap
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import common
from common import RowWriter, finish_stage, in_chunks, read_jsonl, row_seed, start_stage, stop

two = importlib.import_module("02_generate_critiques")  # what a text claims: mentions and swaps stand there, for both stages
COCO_VOCABULARY, SYNONYMS, build_vocabulary = two.COCO_VOCABULARY, two.SYNONYMS, two.build_vocabulary
find_mentions, swap_object = two.find_mentions, two.swap_object

PROMPTS = ["Describe this image in detail.", "What objects are in this image?", "Write a caption that names what you see.",
           "What is happening in this picture?", "Describe the scene and the objects in it."]
YES_NO_PROMPT = "Is there a {object} in the image? Answer yes or no."


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
    if not chosen and not rejected:
        return "names no object of the vocabulary"
    if any(status[name] == "absent" for name in chosen):
        return "chosen hallucinates by the expert"
    if not any(status[name] == "absent" for name in rejected):
        return "rejected does not hallucinate by the expert"
    return None


def propose_swaps(mentions, co_occurrence, classes, rng, n=8):
    """n unmentioned classes to ask the expert about, drawn without repeats with weight 1 + how often they are mentioned
    together with this scene's objects in the corpus: the plausible errors, which a language prior makes."""
    weight = {c: 1 + sum(co_occurrence[frozenset((c, m))] for m in mentions) for c in classes if c not in mentions}
    return sorted(weight, key=lambda c: rng.random() ** (1 / weight[c]), reverse=True)[:n]


# ---- Experts: examine(image paths, questions: a list of class names per image) -> a list of detections per image -----
class Detector:
    """Any ultralytics detection weights; finds its classes whatever is asked."""

    def __init__(self, weights, absent, device):
        from ultralytics import YOLO  # AGPL-3.0
        if not str(weights).endswith(".pt"):
            stop(f"--expert {weights}: expected ultralytics weights (*.pt) or none")
        self.model, self.floor, self.device = YOLO(weights), absent, device
        self.classes = list(self.model.names.values())

    def examine(self, images, questions):
        results = self.model.predict([str(path) for path in images], conf=self.floor, batch=len(images), device=self.device,
                                     verbose=False)  # below --absent no box can matter
        return [[{"object": r.names[int(c)], "confidence": round(float(p), 4), "box": [round(v, 1) for v in xyxy]}
                 for xyxy, p, c in zip(r.boxes.xyxy.tolist(), r.boxes.conf.tolist(), r.boxes.cls.tolist())] for r in results]


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
            asked = [YES_NO_PROMPT.format(object=name) for name in names]
            inputs = common.encode_prompts(self.processor, asked, [image] * len(asked)).to(self.model.device)
            log_p = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)  # (names, V)
            odds = log_p[:, self.yes].logsumexp(-1) - log_p[:, self.no].logsumexp(-1)  # (names,)
            found.append([{"object": name, "confidence": round(p, 4), "box": None}
                          for name, p in zip(names, odds.sigmoid().tolist())])
        return found


# ---- Data: what to verify, candidates, findings, pairs ---------------------------------------------------------------
def load_items(args):
    """(rows to verify {id, image, prompt[, chosen, rejected]}, counts): given pairs, or one row for each picture of a folder."""
    if args.pairs:
        rows = [{"id": f"{Path(row['image']).stem}-{k}", **row} for k, row in enumerate(
            read_jsonl(args.pairs, ("image", "prompt", "chosen", "rejected")))]
    else:
        prompts = [line.strip() for line in Path(args.prompts).read_text().split("\n") if line.strip()] if args.prompts else PROMPTS
        folder = Path(args.images).resolve()
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not prompts or not paths or not folder.is_relative_to(args.image_root):
            stop(f"{args.prompts} holds no prompt" if not prompts else f"no images under {folder}" if not paths else
                 f"--images {folder} does not lie under --image-root {args.image_root}")
        rows = [{"id": f"{path.relative_to(folder).with_suffix('').as_posix()}-0", "image": path.relative_to(args.image_root)
                 .as_posix(), "prompt": prompts[row_seed(args.seed, "prompt", path.name) % len(prompts)]} for path in paths]
    readable, counts = [], Counter({"rows read": len(rows[:args.limit]), "skipped: missing or broken image": 0})
    for row in rows[:args.limit]:
        try:
            Image.open(Path(args.image_root) / row["image"]).verify()
            readable.append(row)
        except OSError as error:
            counts["skipped: missing or broken image"] += 1
            print(f"skipped row {row['id']}, field image: {error}")
    return readable or stop("no row has a readable image; --image-root tells where relative paths start"), counts


def write_candidates(items, model, processor, folder, args):
    """{id: [text]}: K responses of the policy per image, complete ones only (kept in candidates.jsonl)."""
    writer = RowWriter(folder / "candidates.jsonl")
    done = {row["id"] for row in writer.rows}
    for chunk, bar in in_chunks(items, done, args.batch_size, "candidates"):
        requests = [{"id": row["id"], "image": Path(args.image_root) / row["image"], "text": row["prompt"]} for row in chunk]
        answers = common.sample(model, processor, requests, args.candidates, args.temperature, args.max_new_tokens,
                                args.seed, args.batch_size, bar)
        for row, texts in zip(chunk, answers):
            if row["id"] not in done:
                writer.write({**row, "candidates": [a["text"].strip() for a in texts if a["complete"]]})
    return {row["id"]: row["candidates"] for row in writer.rows}


def examine(questions, expert, folder, args):
    """{image: detections} for {image: classes asked about}: each image examined once (kept in detections.jsonl)."""
    writer = RowWriter(folder / "detections.jsonl")
    done = {row["id"] for row in writer.rows}
    for chunk, bar in in_chunks([{"id": image} for image in questions], done, 32, "examine"):
        names = [row["id"] for row in chunk]
        asked = [list(dict.fromkeys(questions[name])) for name in names]
        results = expert.examine([Path(args.image_root) / name for name in names], asked)
        for name, classes, detections in zip(names, asked, results):
            if name not in done:
                writer.write({"id": name, "asked": classes, "detections": detections})
        bar.update(len(chunk))
    return {row["id"]: row["detections"] for row in writer.rows}


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
    hallucinated = [name for name in claims["rejected"] if status[name] == "absent"]
    if not hallucinated:  # the swapped-in name merged with its neighbours into another mention
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


def draw_contact_sheet(rows, detections, image_root, path, n=12):
    """The first n pairs with the expert's boxes: what a person should look at before training on them."""
    figure = Figure((14, 4.6 * -(-n // 4)))
    for axis, row in zip(figure.subplots(-(-n // 4), 4, squeeze=False).flat, rows):
        axis.axis("off")
        axis.imshow(common.load_image(Path(image_root) / row["image"]))
        named = {found["object"] for found in row["evidence"]}
        for found in (found for found in detections[row["image"]] if found["box"] and found["object"] in named):
            x1, y1, x2, y2 = found["box"]
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="lime"))
            axis.text(x1, y1, f"{found['object']} {found['confidence']:.2f}", fontsize=7, color="lime", va="bottom")
        why = f"absent: {', '.join(row['hallucinated'])} ({row['source']})"
        for k, (text, colour) in enumerate((("+ " + row["chosen"], "green"), ("- " + row["rejected"], "firebrick"), (why, "black"))):
            axis.text(0, -0.03 - 0.11 * k, textwrap.fill(text, 52, max_lines=2), fontsize=8, color=colour, va="top",
                      transform=axis.transAxes)
    figure.subplots_adjust(0.01, 0.09, 0.99, 0.98, wspace=0.08, hspace=0.36)
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/default", help="run directory, shared by all stages")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder of images for which the policy writes responses")
    source.add_argument("--pairs", help="jsonl file of given pairs: image, prompt, chosen, rejected")
    add("--image-root", help="folder that relative image paths start from; default: --images, or the folder of --pairs")
    add("--prompts", help="text file, one prompt per line, instead of the built-in ones")
    add("--limit", type=int, help="read only the first so many rows or images")
    add("--model", default="Qwen/Qwen2-VL-7B-Instruct", help="policy that writes the candidates, and the judge to be trained")
    add("--max-image-tokens", type=int, help="bound on an image's tokens; default: the processor's own")
    add("--expert", default="yolo11x.pt", help="ultralytics detection weights, or none: the policy's own yes/no")
    add("--vocabulary", help="json {phrase: class}; default: the expert's class names with plurals and synonyms")
    add("--device", help="cuda, mps or cpu; default: the first of these that is there")
    add("--candidates", type=int, default=4, help="K, responses per image")
    add("--temperature", type=float, default=1.0, help="of the candidates")
    add("--max-new-tokens", type=int, default=256, help="longest candidate; an unfinished one is dropped")
    add("--present", type=float, default=0.5, help="confidence from which an object counts as present")
    add("--absent", type=float, default=0.05, help="confidence below which an object counts as absent")
    add("--validation", type=int, default=200, help="pairs set aside for validation in 03 and 04")
    add("--train", type=int, default=5000, help="pairs for critiques (02); all further ones are the pool of 04")
    add("--batch-size", type=int, default=64, help="sequences decoded together")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="delete this stage's folder first")
    args = parser.parse_args(argv)
    if not 0 <= args.absent <= args.present <= 1:
        parser.error(f"need 0 <= --absent {args.absent} <= --present {args.present} <= 1")
    args.image_root = str(Path(args.image_root or args.images or Path(args.pairs).parent).resolve())
    return args


def main(args):
    folder = start_stage(args, "01_preferences")
    if folder is None:
        return
    # 1. load -----------------------------------------------------------------------------------------------------
    items, counts = load_items(args)
    print(f"{len(items)} rows, {args.candidates if args.images else 2} responses each, expert {args.expert}")
    writes = args.images or args.expert == "none"
    model, processor = common.load_judge(args.model, None, args.device, args.max_image_tokens) if writes else (None, None)
    expert = OwnAnswers(model, processor) if args.expert == "none" else Detector(args.expert, args.absent, args.device)
    if not args.vocabulary and not expert.classes:
        stop("--expert none knows no class names: give --vocabulary, such as another run's 01_preferences/vocabulary.json")
    vocabulary = json.loads(Path(args.vocabulary).read_text()) if args.vocabulary else build_vocabulary(expert.classes, SYNONYMS)
    known = set(expert.classes or vocabulary.values())

    # 2. candidates, mentions, findings ---------------------------------------------------------------------------
    texts = write_candidates(items, model, processor, folder, args) if args.images else \
        {item["id"]: [item["chosen"], item["rejected"]] for item in items}
    mentions = {item["id"]: [find_mentions(text, vocabulary) for text in texts[item["id"]]] for item in items}
    co_occurrence = Counter(frozenset((a, b)) for per_text in mentions.values() for names in per_text
                            for a in names for b in names if a < b)
    swaps, questions, classes = {}, {}, sorted(set(vocabulary.values()))
    for item in items:
        named = list(dict.fromkeys(name for names in mentions[item["id"]] for name in names))
        rng = random.Random(row_seed(args.seed, "swap", item["id"]))
        swaps[item["id"]] = propose_swaps(named, co_occurrence, classes, rng) if args.images else []
        questions.setdefault(item["image"], []).extend(named + swaps[item["id"]])
    detections = examine(questions, expert, folder, args)

    # 3. pairs ----------------------------------------------------------------------------------------------------
    rows, reasons, statuses = [], Counter(), Counter()
    for item in items:
        key, found = item["id"], detections[item["image"]]
        status = verify({*swaps[key]}.union(*mentions[key]), found, args.present, args.absent, known)
        statuses.update(status[name] for name in set().union(*mentions[key]))
        row, reason = build_pair(item, texts[key], mentions[key], swaps[key], found, status, vocabulary, args.seed)
        reasons[f"dropped: {reason}" if reason else "pairs made"] += 1
        rows += [row] if row else []
    if not rows:
        stop(f"no pair could be made: {dict(reasons)}; mentions were {dict(statuses)}. Check --expert, --vocabulary, --absent")
    rows = assign_splits(rows, args.validation, args.train, args.seed)

    # 4. save and report ------------------------------------------------------------------------------------------
    common.write_jsonl(folder / "preferences.jsonl", rows)
    common.write_json(folder / "vocabulary.json", vocabulary)
    draw_contact_sheet(rows, detections, args.image_root, folder / "contact_sheet.png")
    counts |= dict(reasons) | {f"  {k} pairs": v for k, v in Counter(row["source"] for row in rows).items()}
    counts |= {f"  in split {k}": v for k, v in Counter(row["split"] for row in rows).items()}
    counts |= {f"mentions {k}": statuses[k] for k in ("present", "absent", "unsure")}
    finish_stage(folder, args, counts, [args.pairs] if args.pairs else [],
                 f"look at {folder}/contact_sheet.png, then python 02_generate_critiques.py --run {args.run}")


if __name__ == "__main__":
    main(parse_args())
