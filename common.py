"""What the five stages must agree on byte for byte, and plumbing; the method's ideas stand in the stages.

The judge's prompt and verdict, model loading, encoding, batched sampling with the verdict's log-odds, several
processes, resumable run directories.

Letters in all files: B sequences, T tokens, V vocabulary entries, P prompt tokens (image included), R response tokens;
in sampling also n samples of a prompt, S = B * n samples, H key-value heads, G query heads to each of them, D head size.
"""

# Outline with a budget of 540 lines; the next issue adds its tables, lock and wrapper (at most 650).


# ---- The judge's prompt, verdict and checks (130) ------------------------------------------------
INSTRUCTIONS = {}


def build_judge_prompt(prompt, response_a, response_b, style="critique", reference=None):
    """The one text that asks for a judgement; it follows the image."""


def both_orders(pair):
    """The pair's two questions: in order "ab" the chosen response is A (label "A"), in "ba" it is B."""


def find_verdict(text):
    """(verdict, index of its letter in text), or (None, -1). The last line "Verdict: ..." decides."""


def parse_verdict(text):
    """ "A", "B", or None where the last verdict line names neither or both."""


def parse_checks(text):
    """The critique's checks in order: list of ("A" | "B", claim, supported)."""


def verdict_log_odds(logits, id_a, id_b):
    """r = log P(A) - log P(B) in nats (B,), from logits (B, V) at the verdict position."""


# ---- Models (90) ---------------------------------------------------------------------------------
def stop(message):
    """End the script with one readable line: what is wrong, where, and what to do."""


def pick_device(name="auto"):
    """The torch.device that inputs go to."""


def unwrap(model):
    """The transformers model under a PEFT wrapper."""


def load_judge(model_path, checkpoint=None, device=None, max_image_tokens=None, trainable=False):
    """(model, processor) from a hub id or folder, with a checkpoint of stage 03 or 04 on it."""


def load_adapter(model, folder, trainable=False):
    """PeftModel; an adapter whose keys do not fit the model is refused."""


# ---- Encoding (40) -------------------------------------------------------------------------------
def load_image(image, aspect=200):
    """RGB picture from a path or a PIL image; one that is far too long gets black bars."""


def encode_prompts(processor, texts, images):
    """Left-padded model inputs for one user turn (image, then text) per row; input_ids (B, P)."""


# ---- Sampling (190) ------------------------------------------------------------------------------
def row_seed(seed, *keys):
    """A 63-bit seed from the run's seed and a row's identity."""


class SharedPrompt:
    """A layer's cache in which the n samples of a prompt share its keys and values."""


class ReorderedCache:
    """The fallback for caches with other layers: every sample has a copy, by cache.reorder_cache."""


def pick_tokens(logits, uniforms, temperature):
    """One token id per row (S,) by inverse transform sampling."""


def sample_batch(model, inputs, uniforms, temperature, stop_ids, verdict_ids):
    """Encode B prompts once, decode n samples of each."""


def sample(
    model,
    processor,
    requests,
    n=1,
    temperature=1.0,
    max_new_tokens=256,
    seed=0,
    batch_size=256,
    bar=None,
):
    """n samples per request {"id", "image", "text"}: the one function that generates text."""


# ---- Several processes (40) ----------------------------------------------------------------------
def share_out(batches, work):
    """The lists work(batch) of all batches, joined: process r of K does batches r, r + K, ..."""


def barrier():
    """No process goes on before all are here."""


# ---- Run directories (150) -----------------------------------------------------------------------
def read_jsonl(path, fields=()):
    """Rows of a jsonl file; file, line and field are named where one is missing or malformed."""


def write_json(path, value):
    """One JSON value, atomically."""


def write_jsonl(path, rows):
    """Rows, one per line, atomically."""


class RowWriter:
    """Appends rows to a jsonl file, flushed one by one; knows what was there before."""


def in_chunks(rows, is_done, n, describe):
    """(chunk, bar) for fixed chunks of rows that are not wholly done: a resumed run forms the same batches."""


def stage_parser(doc):
    """A script's parser with what all stages take: --run, --device, --batch-size, --seed, --overwrite."""


def start_stage(args, name):
    """The stage's folder, ready to be written or resumed; None where it is complete already."""


def args_of(run, stage):
    """The arguments that a complete earlier stage was made with, from its meta.json."""


def find_checkpoint(folder):
    """The folder's adapter/ or model/, as stages 03 and 04 write them."""


def finish_stage(folder, args, counts, inputs, next_command, **extra):
    """Print what was made and dropped, and write meta.json last."""


def run(main, args):
    """What every script ends with: the processes join, main(args)."""
