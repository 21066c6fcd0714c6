"""Do the tests notice? Each mutation is one wrong line; the test that is named beside it must fail.

    python tests/mutations.py                # all of them
    python tests/mutations.py margin 03_     # those whose file, text or test holds one of the words

Works on a copy of the repository. Not run by the gate.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 120  # a mutation may make a loop endless

# file, old (exactly once in the file), new, test
MUTATIONS = [
    # ---- common: the verdict, the prompt, files --------------------------------------------------
    {
        "file": "common.py",
        "old": 'question += f"Known to be true, never to be mentioned:\\n{reference}\\n"',
        "new": "pass",
        "test": "tests/test_stages.py::test_02_shows_the_findings_and_the_label",
    },
    {
        "file": "common.py",
        "old": '("ba", "rejected", "chosen", "B"),',
        "new": '("ba", "rejected", "chosen", "A"),',
        "test": "tests/test_stages.py::test_judge_is_greedy_and_shows_no_label",
    },
    {
        "file": "common.py",
        "old": '("ba", "rejected", "chosen", "B"),',
        "new": '("ba", "chosen", "rejected", "B"),',
        "test": "tests/test_stages.py::test_judge_is_greedy_and_shows_no_label",
    },
    {
        "file": "common.py",
        "old": "return logits[rows, id_a] - logits[rows, id_b]",
        "new": "return logits[rows, id_b] - logits[rows, id_a]",
        "test": "tests/test_formulas.py::test_log_odds",
    },
    {
        "file": "common.py",
        "old": "logits = logits.float()  # (B, V); a difference",
        "new": "pass  # a difference",
        "test": "tests/test_formulas.py::test_log_odds",
    },
    {
        "file": "common.py",
        "old": "if all(is_done(row) for row in chunk):",
        "new": "if any(is_done(row) for row in chunk):",
        "test": "tests/test_stages.py::test_02_resumes_to_the_same_bytes",
    },
    {
        "file": "common.py",
        "old": "if all(is_done(row) for row in chunk):",
        "new": "if False:",
        "test": "tests/test_stages.py::test_02_resumes_to_the_same_bytes",
    },
    {
        "file": "common.py",
        "old": 'whole = data[: data.rfind(b"\\n") + 1]',
        "new": "whole = data",
        "test": "tests/test_stages.py::test_02_resumes_to_the_same_bytes",
    },
    {
        "file": "common.py",
        "old": "        if not self.is_done(row):\n",
        "new": "        if True:\n",
        "test": "tests/test_stages.py::test_judge_goes_on_where_it_was_interrupted",
    },
    # ---- 02: the reference and the filter --------------------------------------------------------
    {
        "file": "02_generate_critiques.py",
        "old": "guided=True",
        "new": "guided=False",
        "test": "tests/test_stages.py::test_02_shows_the_findings_and_the_label",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'if pair["split"] == "train"]',
        "new": 'if pair["split"] != "validation"]',
        "test": "tests/test_stages.py::test_02_writes_about_training_pairs_in_both_orders",
    },
    {
        "file": "02_generate_critiques.py",
        "old": '(("A", question["response_a"]), ("B", question["response_b"]))',
        "new": '(("B", question["response_a"]), ("A", question["response_b"]))',
        "test": "tests/test_critique_filter.py::test_reference",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'if row["dropped"] is None and key not in kept:',
        "new": "if key not in kept:",
        "test": "tests/test_critique_filter.py::test_keep_distinct",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'key = (row["pair_id"], row["order"], row["critique"])',
        "new": 'key = (row["pair_id"], row["critique"])',
        "test": "tests/test_critique_filter.py::test_keep_distinct",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'return "A" if unsupported["A"] < unsupported["B"] else "B"',
        "new": 'return "B" if unsupported["A"] < unsupported["B"] else "A"',
        "test": "tests/test_critique_filter.py::test_verdict_of_checks",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'wrong = any(status.get(name) == "absent" for name in named)',
        "new": 'wrong = all(status.get(name) == "absent" for name in named)',
        "test": "tests/test_critique_filter.py::test_contradicts_expert",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'wrong = status.get(vocabulary.get(bare_phrase(claim))) == "present"',
        "new": 'wrong = any(status.get(name) == "present" for name in named)',
        "test": "tests/test_critique_filter.py::test_contradicts_expert",
    },
    {
        "file": "02_generate_critiques.py",
        "old": "if not set(named) <= set(said[side]):",
        "new": 'if not set(named) <= {*said["A"], *said["B"]}:',
        "test": "tests/test_critique_filter.py::test_contradicts_expert",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'if status.get(name) in ("present", "absent") and name not in checked[side]:',
        "new": 'if status.get(name) == "absent" and name not in checked[side]:',
        "test": "tests/test_critique_filter.py::test_contradicts_expert",
    },
    {
        "file": "02_generate_critiques.py",
        "old": "undecided = by_checks is None and not status",
        "new": "undecided = by_checks is None",
        "test": "tests/test_critique_filter.py::test_reason_to_drop",
    },
    {
        "file": "02_generate_critiques.py",
        "old": "if not complete or verdict is None:",
        "new": "if verdict is None:",
        "test": "tests/test_critique_filter.py::test_reason_to_drop",
    },
    {
        "file": "02_generate_critiques.py",
        "old": ' and not LEAK.search("\\n".join(responses.values())):',
        "new": ":",
        "test": "tests/test_critique_filter.py::test_leak_phrase_of_a_response_may_be_quoted",
    },
    {
        "file": "02_generate_critiques.py",
        "old": 'return writer.is_done({"id": f"{question[\'id\']}-{n - 1}"})',
        "new": 'return writer.is_done({"id": f"{question[\'id\']}-0"})',
        "test": "tests/test_stages.py::test_02_resumes_to_the_same_bytes",
    },
    # ---- 03: losses, rows, judging ---------------------------------------------------------------
    {
        "file": "03_train_ift.py",
        "old": '"response": a if row["label"] == "A" else b}',
        "new": '"response": b if row["label"] == "A" else a}',
        "test": "tests/test_stages.py::test_03_d_correct_is_the_chosen_response_once_per_pair",
    },
    {
        "file": "03_train_ift.py",
        "old": '"response": a if row["label"] == "A" else b}',
        "new": '"response": a}',
        "test": "tests/test_stages.py::test_d_correct_is_the_chosen_response_in_either_order",
    },
    {
        "file": "03_train_ift.py",
        "old": 'text = build_judge_prompt(row["prompt"], a, b, row["style"])\n        judged',
        "new": 'text = build_judge_prompt(row["prompt"], a, b, row["style"], row["critique"])\n'
        "        judged",
        "test": "tests/test_stages.py::test_03_trains_on_the_critiques_without_the_reference",
    },
    {
        "file": "03_train_ift.py",
        "old": '"text": row["prompt"]}',
        "new": '"text": text}',
        "test": "tests/test_stages.py::test_03_d_correct_is_the_chosen_response_once_per_pair",
    },
    {
        "file": "03_train_ift.py",
        "old": "logits, labels = logits[:, :-1].float(), labels[:, 1:]",
        "new": "logits, labels = logits[:, 1:].float(), labels[:, 1:]",
        "test": "tests/test_formulas.py::test_nll_by_hand",
    },
    {
        "file": "03_train_ift.py",
        "old": "return loss + lam * nll_correct / n_correct if lam else loss",
        "new": "return loss + lam * nll_correct / n_critique if lam else loss",
        "test": "tests/test_formulas.py::test_ift_loss_by_hand",
    },
    {
        "file": "03_train_ift.py",
        "old": "torch.where(label_is_a, -log_odds, log_odds)",
        "new": "torch.where(label_is_a, log_odds, -log_odds)",
        "test": "tests/test_formulas.py::test_bradley_terry_by_hand",
    },
    {
        "file": "03_train_ift.py",
        "old": 'random.Random(row_seed(seed, "epoch", epoch)).shuffle(shuffled)',
        "new": 'random.Random(row_seed(seed, "epoch")).shuffle(shuffled)',
        "test": "tests/test_formulas.py::test_rows_of_step_are_shuffled_epochs_cut_into_steps",
    },
    {
        "file": "03_train_ift.py",
        "old": "if k == 0 or not chosen:",
        "new": "if not chosen:",
        "test": "tests/test_formulas.py::test_rows_of_step_are_shuffled_epochs_cut_into_steps",
    },
    {
        "file": "03_train_ift.py",
        "old": "return lr * min((step + 1) / warmup, 1 - fallen)",
        "new": "return lr * min((step + 2) / warmup, 1 - fallen)",
        "test": "tests/test_formulas.py::test_learning_rate_by_hand",
    },
    {
        "file": "03_train_ift.py",
        "old": 'sampling = {"temperature": 0.0, **sampling}',
        "new": 'sampling = {"temperature": 1.0, **sampling}',
        "test": "tests/test_stages.py::test_judge_is_greedy_and_shows_no_label",
    },
    {
        "file": "03_train_ift.py",
        "old": 'text = build_judge_prompt(q["prompt"], q["response_a"], q["response_b"], style)',
        "new": "text = build_judge_prompt("
        'q["prompt"], q["response_a"], q["response_b"], style, q["label"])',
        "test": "tests/test_stages.py::test_judge_is_greedy_and_shows_no_label",
    },
    {
        "file": "03_train_ift.py",
        "old": "answers = common.sample(model, processor, requests, votes, bar=bar, **sampling)",
        "new": "answers = common.sample(model, processor, requests, 1, bar=bar, **sampling)",
        "test": "tests/test_stages.py::test_judge_votes",
    },
    {
        "file": "03_train_ift.py",
        "old": 'return "A" if n_a > n_b else "B", probability_a',
        "new": 'return "A" if probability_a > 0.5 else "B", probability_a',
        "test": "tests/test_formulas.py::test_decide",
    },
    {
        "file": "03_train_ift.py",
        "old": 'None if row["verdict"] is None else right',
        "new": "right",
        "test": "tests/test_formulas.py::test_accuracy_by_order",
    },
    {
        "file": "03_train_ift.py",
        "old": 'if pair["split"] == "validation"]',
        "new": 'if pair["split"] == "pool"]',
        "test": "tests/test_stages.py::test_03_validates_on_the_validation_pairs_greedily",
    },
    {
        "file": "03_train_ift.py",
        "old": "return len(tokenizer(text, add_special_tokens=False).input_ids) >= limit",
        "new": "return len(tokenizer(text, add_special_tokens=False).input_ids) > limit",
        "test": "tests/test_stages.py"
        "::test_03_drops_critiques_that_would_be_cut_and_counts_what_it_cuts",
    },
    # ---- 04: margins, selection, iterations ------------------------------------------------------
    {
        "file": "04_rejection_sampling.py",
        "old": "guided=False",
        "new": "guided=True",
        "test": "tests/test_stages.py::test_04_shows_neither_findings_nor_label",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'passes = [row["dropped"] is None for row in rows]',
        "new": 'passes = [row["verdict"] == row["label"] for row in rows]',
        "test": "tests/test_stages.py"
        "::test_04_keeps_the_soundest_critique_and_not_the_surest_right_verdict",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "return select_by_margin(margins, retention=retention)",
        "new": "return select_by_margin({k: margins[k] for k in eligible}, retention=retention)",
        "test": "tests/test_stages.py"
        "::test_04_keeps_the_largest_margins_as_a_share_of_the_whole_pool",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "n = round(len(kept) * replay / (1 - replay))",
        "new": "n = round(len(kept) * replay)",
        "test": "tests/test_stages.py"
        "::test_04_trains_on_what_is_kept_and_a_share_of_stage_03s_rows",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "        seed=row_seed(args.seed, t),\n        **judging,",
        "new": "        seed=args.seed,\n        **judging,",
        "test": "tests/test_stages.py::test_04_draws_by_another_seed_in_every_iteration",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "seed = row_seed(args.seed, t)\n        data",
        "new": "seed = args.seed\n        data",
        "test": "tests/test_stages.py::test_04_draws_by_another_seed_in_every_iteration",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'if pair["split"] == "validation"]',
        "new": 'if pair["split"] == "pool"]',
        "test": "tests/test_stages.py::test_04_validates_on_the_validation_pairs_greedily",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'if pair["split"] == "pool"]',
        "new": 'if pair["split"] != "validation"]',
        "test": "tests/test_stages.py::test_04_samples_disjoint_pools_and_keeps_an_image_in_one",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "t, pools[t - 1], model",
        "new": "t, pools[0], model",
        "test": "tests/test_stages.py::test_04_samples_disjoint_pools_and_keeps_an_image_in_one",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'critiques = mix_in(kept, old, args.replay, row_seed(args.seed, "replay", t))',
        "new": 'critiques = mix_in(kept, old, args.replay, row_seed(args.seed, "replay"))',
        "test": "tests/test_stages.py::test_04_replays_other_rows_in_each_iteration",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "critiques, counts = old, {}",
        "new": "critiques, counts = old[:8], {}",
        "test": "tests/test_stages.py::test_04_continue_trains_on_stage_03s_own_rows",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "checkpoint = common.find_checkpoint(done.parent)",
        "new": "pass",
        "test": "tests/test_stages.py"
        "::test_04_resumes_with_the_adapter_of_the_last_complete_iteration",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'results, checkpoint = {}, common.find_checkpoint(run / "03_ift")',
        "new": 'results, checkpoint = {}, Path("adapter")',
        "test": "tests/test_stages.py::test_04_starts_from_the_adapter_of_stage_03",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "return torch.where(label_is_a, log_odds, -log_odds).sigmoid()",
        "new": "return torch.where(label_is_a, -log_odds, log_odds).sigmoid()",
        "test": "tests/test_formulas.py::test_confidence_in_label",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "return max(passing) - min(confidences) if passing else 0.0",
        "new": "return max(passing) - min(passing) if passing else 0.0",
        "test": "tests/test_formulas.py::test_margin_by_hand",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "return max(passing) - min(confidences) if passing else 0.0",
        "new": "return max(confidences) - min(confidences) if passing else 0.0",
        "test": "tests/test_formulas.py::test_margin_by_hand",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "ranked = sorted(margins, key=lambda key: (-margins[key], key))",
        "new": "ranked = sorted(margins, key=lambda key: (margins[key], key))",
        "test": "tests/test_formulas.py::test_select_by_margin",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "ranked[: round(retention * len(ranked))] if margins[key] > 0]",
        "new": "ranked[: round(retention * len(ranked))]]",
        "test": "tests/test_formulas.py::test_select_by_margin",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "margins[pair_id] = mean(margin_of_order) if both else 0.0",
        "new": "margins[pair_id] = mean(margin_of_order)",
        "test": "tests/test_formulas.py::test_margins_of_pairs",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "margins[pair_id] = mean(margin_of_order) if both else 0.0",
        "new": "margins[pair_id] = max(margin_of_order) if both else 0.0",
        "test": "tests/test_formulas.py::test_margins_of_pairs",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'if row["verdict"] is not None:\n            r = torch.tensor([row["log_odds"]])',
        "new": 'if True:\n            r = torch.tensor([row["log_odds"] or 0.0])',
        "test": "tests/test_formulas.py::test_confident_rows",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "    n = len(pairs_by_margin(margins, eligible, threshold, retention, seed))\n",
        "new": "    n = round(retention * len(eligible))\n",
        "test": "tests/test_formulas.py::test_controls_keep_as_many_pairs",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "return select_random(eligible, n, seed)",
        "new": "return select_by_margin(margins, retention=1.0)[:n]",
        "test": "tests/test_formulas.py::test_controls_keep_as_many_pairs",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": '"random": (pairs_at_random, any_critique),',
        "new": '"random": (pairs_at_random, best_critique),',
        "test": "tests/test_formulas.py::test_controls_keep_as_many_pairs",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'return max(rows, key=lambda row: row["confidence_in_label"])',
        "new": 'return min(rows, key=lambda row: row["confidence_in_label"])',
        "test": "tests/test_formulas.py::test_keep_by_margin",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'pair_seed = row_seed(seed, "select", iteration)',
        "new": 'pair_seed = row_seed(seed, "select")',
        "test": "tests/test_formulas.py::test_controls_draw_others_in_each_iteration",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'row_key = row_seed(seed, "critique", iteration, pair_id, order)',
        "new": 'row_key = row_seed(seed, "critique", iteration)',
        "test": "tests/test_formulas.py::test_controls_draw_others_in_each_iteration",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": 'while end < len(pairs) and pairs[end]["image"] == pairs[end - 1]["image"]:',
        "new": "while False:",
        "test": "tests/test_formulas.py::test_cut_pools",
    },
    # ---- the layout ------------------------------------------------------------------------------
    {
        "file": "02_generate_critiques.py",
        "old": 'one = importlib.import_module("01_build_preferences")',
        "new": 'one = importlib.import_module("01_build_preferences")\n'
        'four = importlib.import_module("04_rejection_sampling")',
        "test": "tests/test_layout.py::test_a_script_imports_common_and_lower_numbers_alone",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": '{}, common.find_checkpoint(run / "03_ift")',
        "new": '{}, ift.common.find_checkpoint(run / "03_ift")',
        "test": "tests/test_layout.py::test_every_name_comes_from_the_file_that_defines_it",
    },
    {
        "file": "03_train_ift.py",
        "old": "def total(numbers):",
        "new": "def only_for_later_stages():\n    pass\n\n\ndef total(numbers):",
        "test": "tests/test_layout.py"
        "::test_nothing_in_a_stage_serves_only_a_later_one[03_train_ift]",
    },
    {
        "file": "03_train_ift.py",
        "old": "nll = F.cross_entropy(logits, labels, ignore_index=-100,",
        "new": "nll = F.cross_entropy(logits, labels, ignore_index=RANK - 100,",
        "test": "tests/test_layout.py::test_pieces_that_need_nothing"
        "[03_train_ift-nll_sum-arguments1]",
    },
    {
        "file": "02_generate_critiques.py",
        "old": "    contradicts_expert, bare_phrase.\n",
        "new": "    bare_phrase.\n",
        "test": "tests/test_layout.py::test_reason_to_drop_with_what_it_needs",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": '"margin": 0.994867, "iteration": 1}',
        "new": '"margin": .994867, "iteration": 1}',
        "test": "tests/test_layout.py"
        "::test_the_header_shows_a_row_of_what_is_written_and_how_to_start[04_rejection_sampling]",
    },
    {
        "file": "04_rejection_sampling.py",
        "old": "pools = cut_pools(pool, args.pool, args.iterations)",
        "new": "pools = cut_pools(pool, 5000, args.iterations)",
        "test": "tests/test_layout.py::test_every_flag_is_read[04_rejection_sampling]",
    },
]


def mutated(mutation):
    """The file's text with the mutation; says where it no longer fits the code."""
    source = (ROOT / mutation["file"]).read_text(encoding="utf-8")
    times = source.count(mutation["old"])
    if times != 1:
        sys.exit(f"error: {mutation['file']} holds {times} times, not once: {mutation['old']!r}")
    return source.replace(mutation["old"], mutation["new"])


def run_tests(folder, tests, log):
    """In a process of its own, which has the slow imports already: pytest's exit code."""
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
    sys.dont_write_bytecode = True  # a mutation may leave a file's size and second as they were
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    os._exit(code)


def outcome(folder, tests):
    """("passed" | "failed" | "no result", pytest's output)."""
    log = folder / "pytest.log"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_tests, args=(folder, tests, log))
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return "failed", "it did not end"
    name = {0: "passed", 1: "failed"}.get(process.exitcode, "no result")
    return name, log.read_text(encoding="utf-8", errors="replace")


def choose(words):
    """The mutations that hold one of the words; all without any."""
    chosen = []
    for mutation in MUTATIONS:
        text = " ".join(mutation.values())
        if not words or any(word in text for word in words):
            chosen.append(mutation)
    return chosen


def main(args):
    chosen = choose(args.words)
    texts = [mutated(mutation) for mutation in chosen]  # all must fit before the first is tried
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
    import matplotlib.figure  # noqa: F401  slow to import, so once for all
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skip = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache", ".venv")
        shutil.copytree(ROOT, copy, ignore=skip)
        tests = sorted({mutation["test"] for mutation in chosen})
        found, output = outcome(copy, tests)
        if found != "passed":
            sys.exit(f"{output}\nerror: the tests do not pass on the code as it is")
        for mutation, text in zip(chosen, texts):
            (copy / mutation["file"]).write_text(text, encoding="utf-8")
            found, output = outcome(copy, [mutation["test"]])
            shutil.copy(ROOT / mutation["file"], copy / mutation["file"])
            line = f"{mutation['file']}: {' '.join(mutation['new'].split())}"
            if found == "failed":
                print("killed  ", line, flush=True)
                continue
            survivors.append(mutation)
            print("SURVIVED", line, flush=True)
            if found == "no result":
                print(output[-2000:])
    print(f"killed {len(chosen) - len(survivors)} of {len(chosen)}")
    for mutation in survivors:
        print(f"survived {mutation['test']}: {mutation['old']!r} -> {mutation['new']!r}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutations that hold one of these")
    main(parser.parse_args())
