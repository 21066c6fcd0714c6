"""03  Teach the judge to write a critique and a verdict, while it keeps writing correct answers (L_IFT)."""

# Outline with a budget of 470 lines (at most 540 with the next issue's checkpoints).


# ---- The losses (40) -----------------------------------------------------------------------------
def nll_sum(logits, labels):
    """logits (B,T,V) any float, labels (B,T) int with -100 = not supervised -> (summed NLL () in nats, n_tokens () int)."""


def ift_loss(nll_critique, n_critique, nll_correct, n_correct, lam):
    """L_IFT = nll_critique / n_critique + lam * nll_correct / n_correct, in nats per token."""


def bradley_terry_loss(log_odds, label_is_a):
    """-log P(label) = -log sigmoid(+-r) per example: log_odds r (B,) in nats, label_is_a (B,) bool -> (B,) nats."""


# ---- What is trained on, and what of it is supervised (100) --------------------------------------
def training_rows(critiques):
    """(D_critique, D_correct) as rows {id, image, text, response} from critique rows."""


def rows_of_step(rows, step, size, seed):
    """The rows of optimizer step `step` (from 0): the shuffled epochs one after another, cut into steps of `size`."""


def encode_supervised(processor, texts, images, responses, max_response_tokens=None):
    """(inputs, labels): left-padded prompts (B, P), then the responses and their stop token, right-padded (B, R)."""


class TrainingSteps:
    """A map-style data set: step k -> its micro-batches, encoded. A later run can go on at any step."""


# ---- The loop: rows, count, forward, loss, backward, step, log (110) -----------------------------
def forward(model, inputs, labels):
    """(logits (B,R+1,V), labels (B,R+1)): only they pass the language head."""


def log_odds_of_verdict(logits, labels, tokenizer, verdict_ids):
    """r (B,) in nats at each response's verdict, teacher-forced."""


def add_lora(model, rank):
    """PEFT model with fresh rank-r adapters on the language model's linear layers; rank 0: full fine-tuning."""


def train(model, processor, judged, correct, folder, **settings):
    """Minimise L_IFT in place; one line a step to folder/metrics.jsonl. 04 trains with this same function."""


def save_checkpoint(model, processor, folder):
    """adapter/ as PeftModel loads it, or model/ as AutoModelForImageTextToText does."""


# ---- Judging and validation (100) ----------------------------------------------------------------
def judge(model, processor, questions, writer, *, image_root, style, votes, settings):
    """Judgement rows in the order of questions; kept in the writer's file as they come."""


def accuracy_by_order(rows):
    """accuracy, both, agreement, unparseable of judgement rows."""


def validate(model, processor, pairs, folder, name, **settings):
    """Judge the validation pairs in both orders, print the line and one critique, keep both in folder."""


# ---- Arguments and main (110) --------------------------------------------------------------------
def add_training_arguments(parser, steps, lr):
    """The arguments that 03 and 04 share."""


def parse_args(argv=None): ...


def main(args): ...
