#!/usr/bin/env python
"""What real_language.sh ends with: report.md, report.json, report_answers.jsonl and a picture.

    python evaluation_scripts/language_report.py --output_dir output/real_language --prompts_file PROMPTS/test.jsonl \\
        --judge_function evaluation_scripts/real_language/sentiment.py:sentiment

Every model samples answers to the same held-out prompts. The judge's score of them is the truth, the reward model's is
what PPO saw of it. Folders that are not there are left out.
"""

import argparse
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import matplotlib.pyplot as plt
import torch

from evaluation_scripts.judging import REWARD_MODEL, compare, free_memory, judge_by_function, judge_by_reward_model
from evaluation_scripts.plot_run import smooth
from evaluation_scripts.prompt_eval import write_prompts
from evaluation_scripts.prompts import Example, read_prompts, readable
from evaluation_scripts.sampling import Sample, sample
from training.step3_rlhf_finetuning.ppo_math import gather_log_probs
from utils.data.batching import pad_rows
from utils.data.special_tokens import unmarked
from utils.generation.saved_model import (
    LanguageModel,
    VllmUse,
    add_backend_argument,
    add_loading_arguments,
    check_backend,
    check_model_folder,
    load_language_model,
)
from utils.model.inputs import model_inputs
from utils.model.reward_functions import RewardFunction, check_columns, load_reward_functions
from utils.process.errors import UserError, run_script
from utils.process.files import write_jsonl, write_text
from utils.process.seeds import set_random_seed
from utils.run.metrics_file import read_rows

matplotlib.use("Agg")  # no display is needed
START = "start"
FOLDERS = {START: "base", "PPO": "ppo/actor", "DPO": "dpo", "GRPO": "grpo/actor"}
PLAIN_TEXT = Path(__file__).resolve().parent / "real_language" / "plain_text.txt"
ANSWERS_SHOWN = 5


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder with base, reward, ppo, dpo, grpo in it")
    parser.add_argument("--prompts_file", required=True, help="held-out prompts")
    parser.add_argument("--judge_function", required=True, metavar="FILE.py:NAME", help="the judge that is the truth")
    parser.add_argument(
        "--plain_text",
        type=Path,
        default=PLAIN_TEXT,
        help=f"text whose perplexity shows what is forgotten ({PLAIN_TEXT})",
    )
    parser.add_argument("--num_generations_per_prompt", type=int, default=4, help="answers to each prompt (4)")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="longest answer in tokens (48)")
    parser.add_argument("--batch_size", type=int, default=100, help="answers at a time (100)")
    parser.add_argument("--seed", type=int, default=1234, help="of the sampled answers, the same for each model (1234)")
    parser.add_argument("--seconds", type=float, help="what the training took, for the report (default: not said)")
    add_loading_arguments(parser)
    add_backend_argument(parser)
    args = parser.parse_args(argv)
    args.load_in_4bit, args.base_model, args.temperature = False, None, 1.0  # what loading also knows
    args.add_eot_token = False
    return args


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def log_prob_sums(lm: LanguageModel, prompts: list[list[int]], answers: list[list[int]], rows: int = 16) -> list[float]:
    """For each answer the sum of its ids' log-probs, given its prompt. ``rows``: of a forward pass."""
    sums = []
    for start in range(0, len(prompts), rows):
        batch = list(zip(prompts[start : start + rows], answers[start : start + rows], strict=True))
        ids, mask = pad_rows([prompt + answer for prompt, answer in batch], lm.pad_id, side="left")
        ids, mask = ids.to(lm.model.device), mask.to(lm.model.device)
        width = max(len(answer) for _, answer in batch)
        logits = lm.model(**model_inputs(lm.model, ids, mask)).logits[:, -width - 1 : -1]
        log_probs = gather_log_probs(logits.float(), ids[:, -width:])
        sums += [row[width - len(answer) :].sum().item() for row, (_, answer) in zip(log_probs, batch, strict=True)]
    return sums


def perplexity(lm: LanguageModel, text: str) -> float:
    """Of the paragraphs of a text, each on its own behind nothing but BOS: exp of the mean over all their tokens."""
    rows = [lm.tokenizer(paragraph)["input_ids"] for paragraph in text.split("\n\n") if paragraph.strip()]
    total = sum(log_prob_sums(lm, [row[:1] for row in rows], [row[1:] for row in rows]))
    return math.exp(-total / sum(len(row) - 1 for row in rows))


def distinct_2(texts: list[str]) -> float:
    """Different pairs of neighbouring words as a share of all (Li et al., 2016, https://arxiv.org/abs/1510.03055)."""
    pairs = [pair for text in texts for words in [text.lower().split()] for pair in pairwise(words)]
    return len(set(pairs)) / max(1, len(pairs))


def asked(folder: Path, prompts: list[Example], args) -> tuple[list[list[int]], list[str], list[list[Sample]], float]:
    """Of one model, which is loaded here and let go again: the prompts as ids and texts, its answers, and its
    perplexity of the plain text."""
    vllm = VllmUse(args.batch_size) if args.backend == "vllm" else None
    plain_text = args.plain_text.read_text(encoding="utf-8")
    lm = load_language_model(str(folder), args)
    forgotten = perplexity(lm, plain_text)
    if vllm is not None:
        lm = load_language_model(str(folder), args, vllm=vllm)
    written = write_prompts(lm, prompts, args.max_new_tokens)
    ids = [prompt.ids for prompt in written]
    set_random_seed(args.seed)
    samples = sample(lm, ids, args.num_generations_per_prompt, args.batch_size, args.max_new_tokens)
    lm.close()
    del lm
    free_memory()
    return ids, [unmarked(prompt.text) for prompt in written], samples, forgotten


def records_of(name: str, prompts: list[Example], texts: list[str], samples: list[list[Sample]]) -> list[dict]:
    """The answers as judges take them."""
    return [
        {
            "prompt_number": number,
            "prompt": readable(prompt.prompt[-1:] if isinstance(prompt.prompt, list) else prompt.prompt),
            "formatted_prompt": text,
            "title": name,
            "mode": "Sampling",
            "answers": [answer.text.strip() for answer in answers],
            "num_tokens": [len(answer.ids) for answer in answers],
            "ended": [answer.ended for answer in answers],
        }
        for number, (prompt, text, answers) in enumerate(zip(prompts, texts, samples, strict=True))
    ]


def figures(records: list[dict], gold: str, baseline: list[float] | None) -> dict:
    """Means over all answers, and the win rate over prompts against the baseline's gold score of each."""
    answers = [answer for record in records for answer in record["answers"]]
    of_prompts = [fmean(record["scores"][gold]) for record in records]
    found = compare(gold, "Sampling", records[0]["title"], of_prompts, baseline)
    flat = {
        "eos_rate": fmean(float(end) for record in records for end in record["ended"]),
        "tokens": fmean(tokens for record in records for tokens in record["num_tokens"]),
        "words": fmean(len(answer.split()) for answer in answers),
        "distinct_2": distinct_2(answers),
    }
    proxy = [score for record in records for score in record["scores"].get(REWARD_MODEL, [])]
    return {
        "gold": found.mean,
        "win_rate": found.win_rate,
        "win_rate_interval": found.win_rate_interval,
        "proxy": fmean(proxy) if proxy else None,
        **flat,
    }


def measure(prompts: list[Example], rows: list[dict], gold: RewardFunction, args) -> tuple[dict, dict]:
    """Name -> figures, name -> records, of the models that are there."""
    folders = {name: args.output_dir / folder for name, folder in FOLDERS.items()}
    folders = {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}
    models, records, answers_of = {}, {}, {}
    for name, folder in folders.items():
        print(f"{name}: {folder}", file=sys.stderr, flush=True)
        ids, texts, samples, forgotten = asked(folder, prompts, args)
        records[name], answers_of[name] = records_of(name, prompts, texts, samples), (ids, samples)
        models[name] = {"plain_text_perplexity": forgotten}
    reference = load_language_model(str(folders[START]), args)
    for name, (ids, samples) in answers_of.items():
        rows_of_answers = [(prompt, answer) for prompt, of in zip(ids, samples, strict=True) for answer in of]
        theirs = log_prob_sums(
            reference, [prompt for prompt, _ in rows_of_answers], [a.ids for _, a in rows_of_answers]
        )
        models[name]["kl"] = fmean(a.log_prob - q for (_, a), q in zip(rows_of_answers, theirs, strict=True))
    del reference
    free_memory()
    everything = [record for of_model in records.values() for record in of_model]
    judge_by_function(everything, gold, rows)
    if (args.output_dir / "reward" / "config.json").is_file():
        judge_by_reward_model(everything, prompts, str(args.output_dir / "reward"), args)
    baseline = [fmean(record["scores"][gold.name]) for record in records[START]]
    for name, of_model in records.items():
        models[name] |= figures(of_model, gold.name, None if name == START else baseline)
    return models, records


# ---------------------------------------------------------------- the report

COLUMNS = (
    ("gold", "gold score", "{:.3f}"),
    ("win_rate", "gold win rate against the start", "{}"),
    ("proxy", "reward model", "{:.2f}"),
    ("eos_rate", "ended", "{:.1%}"),
    ("words", "words", "{:.1f}"),
    ("tokens", "tokens", "{:.1f}"),
    ("kl", "KL, nats per answer", "{:.2f}"),
    ("distinct_2", "distinct-2", "{:.3f}"),
    ("plain_text_perplexity", "perplexity of plain text", "{:.2f}"),
)


def cell(model: dict, name: str, how: str) -> str:
    value = model[name]
    if value is None:
        return ""
    if name == "win_rate":
        low, high = model["win_rate_interval"]
        return f"{value:.1%} ({low:.1%} to {high:.1%})"
    return how.format(value)


def markdown(summary: dict, records: dict[str, list[dict]], gold: str) -> str:
    """Table of the models, then the first answers of each to the first prompts."""
    head = "| model | " + " | ".join(title for _, title, _ in COLUMNS) + " |"
    lines = ["# Real language: what the judge says", "", head, "|" + " --- |" * (len(COLUMNS) + 1)]
    for name, model in summary["models"].items():
        lines.append(f"| {name} | " + " | ".join(cell(model, key, how) for key, _, how in COLUMNS) + " |")
    lines += [
        "",
        f"{summary['held_out_prompts']} held-out prompts, {summary['answers_per_prompt']} sampled answers each.",
    ]
    lines += ["Gold: the judge, which no reward model saw. Win rate over prompts, 95 % interval by Wilson."]
    if summary["reward_model"] is not None:
        reward = summary["reward_model"]
        lines += [f"Reward model on {reward['pairs']:.0f} held-out pairs: {reward['accuracy']:.1%} right."]
    if summary["seconds"] is not None:
        lines += [f"The training took {summary['seconds']:.0f} s."]
    for number in range(min(ANSWERS_SHOWN, summary["held_out_prompts"])):
        lines += ["", f"**{next(iter(records.values()))[number]['prompt']}**", ""]
        for name, of_model in records.items():
            answer, score = of_model[number]["answers"][0], of_model[number]["scores"][gold][0]
            lines.append(f"- {name} ({score:+.2f}): {' '.join(answer.split())}")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], gold: str, file: Path) -> None:
    """Gold and proxy score of PPO's answers against their KL to the start, update by update: where the two part, the
    reward model is over-optimised (Gao et al., 2022, https://arxiv.org/abs/2210.10760).

    Args:
        rows: training rows of step 3's metrics.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    kl = [value for _, value in smooth([(row["step"], row["kl"]) for row in rows], 0.7)]
    shown = ((f"score/{gold}", f"gold: {gold}", "#54a24b"), (f"score/{REWARD_MODEL}", "proxy: reward model", "#4c78a8"))
    for axis, (name, title, color) in zip(axes, shown, strict=True):
        points = [(row["step"], row[name]) for row in rows]
        axis.scatter([row["kl"] for row in rows], [value for _, value in points], s=10, alpha=0.35, color=color)
        axis.plot(kl, [value for _, value in smooth(points, 0.7)], color=color)
        axis.set(title=title, xlabel="KL to the start, nats per answer", ylabel="mean score of an update")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def reward_figures(folder: Path) -> dict | None:
    """The last evaluation of step 2; None without one."""
    rows = read_rows(folder, "eval") if (folder / "metrics.jsonl").is_file() else []
    return {name: rows[-1][name] for name in ("accuracy", "pairs")} if rows else None


def main(argv=None) -> None:
    args = parse_args(argv)
    functions = load_reward_functions([args.judge_function], "--judge_function")
    prompts, rows = read_prompts(args.prompts_file)
    check_columns(functions, [name for name in rows[0] if all(name in row for row in rows)])
    check_model_folder(str(args.output_dir / FOLDERS[START]))
    check_backend(args, [])
    if not args.plain_text.is_file():
        raise UserError(f"--plain_text {args.plain_text}: no such file")
    models, records = measure(prompts, rows, functions[0], args)
    summary = {
        "models": models,
        "reward_model": reward_figures(args.output_dir / "reward"),
        "held_out_prompts": len(prompts),
        "answers_per_prompt": args.num_generations_per_prompt,
        "seconds": args.seconds,
        "seed": args.seed,
    }
    text = markdown(summary, records, functions[0].name)
    write_text(args.output_dir / "report.md", text)
    write_text(args.output_dir / "report.json", json.dumps(summary, indent=2) + "\n")
    write_jsonl(args.output_dir / "report_answers.jsonl", [one for of_model in records.values() for one in of_model])
    print(text)
    if (args.output_dir / "ppo" / "metrics.jsonl").is_file():
        training = read_rows(args.output_dir / "ppo", "train")
        if training and f"score/{functions[0].name}" in training[0]:
            draw(training, functions[0].name, args.output_dir / "over_optimisation.png")
    print(f"report.md, report.json and the picture are in {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
