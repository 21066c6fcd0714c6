"""The toy world's pictures and pairs, drawn from a seed: 2-4 coloured shapes ("red circle").

numpy and Pillow only, and no result that depends on how a machine rounds: a seed gives the same
pixels and the same rows everywhere. Two things are in them ON PURPOSE, so that there is something
to learn: objects co-occur unevenly (a language prior), and rejected responses hold near misses:
the right shape in another colour, or the right colour in another shape.
"""

import json
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZE = 84  # pixels a side
CELL = 28  # pixels a side: one visual token of the judge per cell of a 3x3 grid
N_CELLS = 9
COLOURS = {"red": (215, 45, 45), "green": (50, 185, 65), "blue": (60, 95, 235)}
COLOURS |= {"yellow": (230, 210, 55), "purple": (165, 60, 205)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
PROMPT = "List the objects in the image."


class Style(NamedTuple):
    noise: float  # standard deviation of a pixel's noise, of 255
    jitter: int  # a colour's channels vary by so much, of 255
    smallest: float  # half-width of a shape in pixels
    largest: float


# The judge was brought up on plain pictures. The user's are noisier, with smaller things, so that
# looking closely is a skill which training on them can still improve.
PLAIN = Style(noise=10, jitter=20, smallest=8.0, largest=11.5)
USER = Style(noise=22, jitter=38, smallest=6.3, largest=10.5)


# ---- Scenes -------------------------------------------------------------------------------------
def language_prior():
    """popularity (40,), companions (40, 40): how readily two kinds meet; the same everywhere."""
    rng = np.random.default_rng(0)
    popularity = rng.uniform(0.5, 2.0, len(KINDS))
    companions = np.ones((len(KINDS), len(KINDS)))
    for kind in range(len(KINDS)):
        companions[kind, rng.choice(len(KINDS), 6, replace=False)] = 5.0
    return popularity, (companions + companions.T) / 2


POPULARITY, COMPANIONS = language_prior()


def sample_kinds(rng, n):
    """n different kinds; each next one is drawn by how well it goes with those already there."""
    chosen = []
    for _ in range(n):
        weights = POPULARITY.copy()
        if chosen:
            weights *= COMPANIONS[chosen].mean(0)
        weights[chosen] = 0
        chosen.append(rng.choice(len(KINDS), p=weights / weights.sum()))
    return [KINDS[kind] for kind in chosen]


def draw_shape(draw, shape, x, y, r, fill):
    """One filled shape of half-width r pixels around (x, y)."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    elif shape == "star":
        corners = []
        for k in range(10):
            radius = r * 0.42 if k % 2 else r
            corners.append((x + radius * np.sin(k * np.pi / 5), y - radius * np.cos(k * np.pi / 5)))
        draw.polygon(corners, fill=fill)
    elif shape == "ring":
        width = max(3, int(0.32 * r))
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=width)
    elif shape == "cross":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)], fill=fill)
    elif shape == "heart":
        draw.ellipse((x - r, y - 0.9 * r, x + 0.1 * r, y + 0.2 * r), fill=fill)
        draw.ellipse((x - 0.1 * r, y - 0.9 * r, x + r, y + 0.2 * r), fill=fill)
        left, right = x - 0.95 * r, x + 0.95 * r
        draw.polygon([(left, y - 0.05 * r), (right, y - 0.05 * r), (x, y + r)], fill=fill)


class Scene(NamedTuple):
    picture: np.ndarray  # (84, 84, 3) uint8
    objects: list  # [{object, box: [x1, y1, x2, y2] in pixels}]
    cells: list  # 9 indices into KINDS, or -1 where nothing is


def draw_scene(rng, kinds, style=PLAIN):
    """At most nine kinds, each in a cell of its own."""
    canvas = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in rng.integers(15, 60, 3)))
    draw = ImageDraw.Draw(canvas)
    cells = [-1] * N_CELLS
    objects = []
    for kind, cell in zip(kinds, rng.permutation(N_CELLS)):
        colour, shape = kind.split()
        x = CELL * (cell % 3) + CELL / 2 + rng.uniform(-2, 2)
        y = CELL * (cell // 3) + CELL / 2 + rng.uniform(-2, 2)
        r = rng.uniform(style.smallest, style.largest)
        shade = np.add(COLOURS[colour], rng.integers(-style.jitter, style.jitter + 1, 3))
        draw_shape(draw, shape, x, y, r, tuple(int(v) for v in shade.clip(0, 255)))
        cells[cell] = KINDS.index(kind)
        box = [round(v, 1) for v in (x - r, y - r, x + r, y + r)]
        objects.append({"object": kind, "box": box})
    noisy = np.asarray(canvas, dtype=np.float32) + rng.normal(0, style.noise, (SIZE, SIZE, 3))
    return Scene(noisy.clip(0, 255).astype(np.uint8), objects, cells)


def draw_ordinary_scene(rng, style=USER):
    n = rng.choice([2, 3, 4], p=[0.3, 0.45, 0.25])
    return draw_scene(rng, sample_kinds(rng, n), style)


# ---- Pairs --------------------------------------------------------------------------------------
def pick_absent(rng, near, present, mix=(0.4, 0.4, 0.2)):
    """(absent kind, category): a kind not in `present`, by preference one that goes with it.

    mix: how often it has another colour than `near`, another shape, or both."""
    colour, shape = near.split()
    category = str(rng.choice(["colour", "shape", "other"], p=mix))
    candidates = []
    for i, kind in enumerate(KINDS):
        same_colour, same_shape = kind.split()[0] == colour, kind.split()[1] == shape
        fits = {"colour": same_shape, "shape": same_colour}
        fits["other"] = not same_colour and not same_shape
        if kind not in present and fits[category]:
            candidates.append(i)
    weights = COMPANIONS[[KINDS.index(kind) for kind in present]].mean(0)[candidates]
    return KINDS[rng.choice(candidates, p=weights / weights.sum())], category


class Pair(NamedTuple):
    chosen: list  # kinds that are there: all, or all but one
    rejected: list  # the same, with one replaced by an absent kind or, seldom, an absent kind added
    absent: str
    category: str


def make_pair(rng, present):
    chosen, rejected = true_objects(rng, present), true_objects(rng, present)
    place = rng.integers(len(rejected))
    absent, category = pick_absent(rng, rejected[place], present)
    if rng.random() < 0.2:
        rejected.insert(place, absent)
    else:
        rejected[place] = absent
    return Pair(chosen, rejected, absent, category)


def true_objects(rng, present):
    """What is there, in random order, now and then without one."""
    kinds = [str(kind) for kind in rng.permutation(present)]
    if len(kinds) > 2 and rng.random() < 0.3:
        return kinds[:-1]
    return kinds


def caption(kinds):
    return (", ".join(kinds) or "nothing") + "."


# ---- Writing ------------------------------------------------------------------------------------
def write_pictures(out, seed, n_images, n_heldout):
    """What a user of the five stages would bring, besides a judge and an expert:

    images/        pictures to train on
    heldout/       others, with 1.5 pairs each
    heldout.jsonl  these pairs, with the truth about every object they name; no length tells which
                   response is the better one
    prompts.txt    the question
    truth.jsonl    what is in each picture; written last: where it is, the rest is complete

    The images come first in the random stream, then each held-out picture with its pairs: how many
    pairs are wanted changes no earlier row."""
    rng, again = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 4])
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "heldout").mkdir(exist_ok=True)
    truth = [write_scene(out, rng, f"images/{i:05d}.png") for i in range(n_images)]
    pairs, i = [], 0
    while len(pairs) < n_heldout:
        truth.append(write_scene(out, rng, f"heldout/{i:05d}.png"))
        for k in range(1 + i % 2):
            is_shorter = len(pairs) % 2 == 0
            pairs.append(fair_row(rng, again, is_shorter, f"toy-{i:05d}-{k}", **truth[-1]))
        i += 1
    (out / "prompts.txt").write_text(PROMPT + "\n")
    for name, rows in (("heldout", pairs[:n_heldout]), ("truth", truth)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(lines)


def write_scene(out, rng, name):
    scene = draw_ordinary_scene(rng)
    Image.fromarray(scene.picture).save(out / name)
    return {"image": name, "objects": scene.objects}


def fair_row(rng, again, is_shorter, row_id, image, objects):
    """A held-out row whose length says nothing, if every other one wants is_shorter: the chosen
    response is then at most as long as the rejected one, else at least. And none names more objects
    than there are: only rejected ones could. What does not fit is drawn from `again`."""
    row = heldout_row(rng, row_id, image, objects)
    for _ in range(50):  # some pictures, of the two shortest kinds, have no pair that fits
        longer = len(row["chosen"]) - len(row["rejected"])  # characters
        is_wrong_way = longer > 0 if is_shorter else longer < 0
        if not is_wrong_way and row["rejected"].count(",") < len(objects):
            break
        row = heldout_row(again, row_id, image, objects)
    return row


def heldout_row(rng, row_id, image, objects):
    """A row as in stage 01's preferences.jsonl; its evidence is the truth, not an expert's."""
    boxes = {thing["object"]: thing["box"] for thing in objects}
    pair = make_pair(rng, list(boxes))
    evidence = []
    for kind in dict.fromkeys(pair.chosen + pair.rejected):
        claimed_by = "chosen" if kind in pair.chosen else "rejected"
        if kind in pair.chosen and kind in pair.rejected:
            claimed_by = "both"
        status = "present" if kind in boxes else "absent"
        found = {"object": kind, "claimed_by": claimed_by, "status": status}
        evidence.append({**found, "confidence": 1.0, "box": boxes.get(kind)})
    row = {"id": row_id, "image": image, "prompt": PROMPT, "chosen": caption(pair.chosen)}
    row |= {"rejected": caption(pair.rejected), "source": "toy", "category": pair.category}
    return {**row, "hallucinated": [pair.absent], "evidence": evidence}
