#!/usr/bin/env python
"""What the quickstart ends with: one table, one picture, summary.json.

    python evaluation_scripts/demo_report.py --output_dir output/quickstart

Reads the models and metrics of the three steps in that folder, lets every model answer the demo's held-out prompts,
and has the demo's exact judge look at the answers.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from evaluation_scripts.intervals import bootstrap_interval
from training.step3_rlhf_finetuning.ppo_math import answer_mask, gather_log_probs, is_end_token
from utils.data.batching import pad_rows
from utils.demo.judge import judge, judge_rates
from utils.demo.world import held_out_prompts
from utils.generation.sampling import Decoding
from utils.generation.saved_model import INSTEAD, VLLM, add_backend_argument
from utils.generation.vllm_backend import VllmEngine, VllmSettings, check_vllm
from utils.model.inputs import embedding_rows, model_inputs
from utils.model.saving import published_weights
from utils.model.tokenizer import end_token_ids, load_hf_tokenizer
from utils.process.console import progress
from utils.process.errors import run_script
from utils.process.seeds import set_random_seed
from utils.run.metrics_file import read_rows

matplotlib.use("Agg")  # no display is needed
RATES = ("manner", "right", "ended")


@torch.no_grad()
def sample_answers(
    model, tokenizer, prompts, max_new_tokens, batch_size, end_ids: list[int], engine: VllmEngine | None = None
):
    """One sampled answer per prompt: [(prompt ids, mask, full sequences)] per batch.

    Args:
        engine: has taken the weights of the model and answers in its place.
    """
    pad = tokenizer.pad_token_id
    decoding = Decoding(max_new_tokens, tuple(end_ids), pad_token_id=pad, vocabulary=embedding_rows(model))
    batches = []
    for start in range(0, len(prompts), batch_size):
        rows = tokenizer(prompts[start : start + batch_size])["input_ids"]
        ids, mask = pad_rows(rows, pad, side="left")
        if engine is not None:
            batches.append((ids, mask, engine.generate(ids, mask, decoding).sequences))
            continue
        sequences = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=end_ids,
        )
        batches.append((ids, mask, sequences))
    return batches


@torch.no_grad()
def kl_per_answer(model, reference, batches, end_ids: list[int]) -> float:
    """Mean over answers of the sum of log p - log q over their tokens, at answers sampled from ``model``: nats."""
    total, rows = 0.0, 0
    for ids, mask, sequences in batches:
        answers = sequences[:, ids.shape[1] :]
        real = answer_mask(answers, end_ids)
        full_mask = torch.cat([mask, real], dim=1)
        log_probs = []
        for network in (model, reference):
            logits = network(**model_inputs(network, sequences, full_mask)).logits[:, -answers.shape[1] - 1 : -1]
            log_probs.append(gather_log_probs(logits, answers))
        total += ((log_probs[0] - log_probs[1]) * real).sum().item()
        rows += len(answers)
    return total / rows


def judge_answers(tokenizer, prompts, batches, end_ids: list[int]) -> tuple[dict[str, float], np.ndarray]:
    """Rates over all answers, and which answers are right: [answers] 0 or 1."""
    answers, ended = [], []
    for ids, _, sequences in batches:
        generated = sequences[:, ids.shape[1] :]
        answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
        ended += is_end_token(generated, end_ids).any(dim=1).tolist()
    right = [judge(*case).right for case in zip(prompts, answers, ended, strict=True)]
    return judge_rates(prompts, answers, ended), np.array(right, dtype=float)


def draw(curve: list[dict], models: dict[str, dict], file: Path) -> None:
    """One picture: the rates of every model, and the curves of step 3.

    Args:
        curve: rows of step 3's metrics. models: name -> rates, each 0 to 1.
    """
    figure, (rates, reward, kl) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colors = {"manner": "#4c78a8", "right": "#f58518", "ended": "#54a24b"}
    for i, rate in enumerate(RATES):
        positions = [x + 0.26 * (i - 1) for x in range(len(models))]
        bars = rates.bar(positions, [100 * m[rate] for m in models.values()], 0.24, label=rate, color=colors[rate])
        rates.bar_label(bars, fmt="%.0f", fontsize=8)
    rates.set_xticks(range(len(models)), models)
    rates.set(title="Judged answers to held-out prompts", ylabel="%", ylim=(0, 118))
    rates.legend(ncols=3, loc="upper center", frameon=False)
    steps = [row["step"] for row in curve]
    for axis, name, title, unit in (
        (reward, "score", "Score of the reward model", "score"),
        (kl, "kl", "KL to the reference", "nats per answer"),
    ):
        axis.plot(steps, [row[name] for row in curve], color="#4c78a8")
        axis.set(title=title, xlabel="PPO step", ylabel=unit)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output_dir", required=True, help="the quickstart's folder, with base, step1, step2 and step3 in it"
    )
    parser.add_argument("--prompts", type=int, default=200, help="how many held-out prompts each model answers")
    parser.add_argument("--answers_per_prompt", type=int, default=4, help="sampled answers to each prompt")
    parser.add_argument(
        "--max_new_tokens", type=int, default=40, help="tokens of an answer; one without an end by then has not ended"
    )
    parser.add_argument("--batch_size", type=int, default=100, help="prompts answered at a time")
    add_backend_argument(parser)
    parser.add_argument("--seed", type=int, default=1234, help="of the sampled answers")
    parser.add_argument("--seconds", type=float, default=None, help="what the run took, for the summary")
    return parser.parse_args()


def judge_models(output: Path, args) -> dict[str, dict]:
    """Name -> rates of the judge, KL to the SFT model, interval of the change in right answers from SFT."""
    folders = {
        "base": output / "base",
        "SFT": output / "step1",
        "RLHF": output / "step3" / "actor",
        "EMA": output / "step3" / "actor_ema",
    }
    tokenizer = load_hf_tokenizer(folders["SFT"])
    prompts = held_out_prompts(args.prompts) * args.answers_per_prompt
    reference = AutoModelForCausalLM.from_pretrained(folders["SFT"], dtype=torch.float32).eval()
    longest = max(map(len, tokenizer(prompts)["input_ids"])) + args.max_new_tokens
    settings = VllmSettings(longest, args.batch_size, sleeps=False, asked_by=VLLM, otherwise=INSTEAD)
    engine, models, right = None, {}, {}
    for name, folder in progress(folders.items(), "judging", len(folders)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        set_random_seed(args.seed)
        end_ids = end_token_ids(model, tokenizer)
        if args.backend == "vllm":  # one engine for all models, which are of one kind
            engine = engine or VllmEngine(model, settings)
            engine.take_weights(published_weights(model))
        batches = sample_answers(model, tokenizer, prompts, args.max_new_tokens, args.batch_size, end_ids, engine)
        models[name], right[name] = judge_answers(tokenizer, prompts, batches, end_ids)
        models[name]["kl"] = kl_per_answer(model, reference, batches, end_ids)
    for name in models:  # each prompt counts once, whatever the number of answers to it
        change = (right[name] - right["SFT"]).reshape(args.answers_per_prompt, args.prompts).mean(axis=0)
        models[name]["right_change"] = bootstrap_interval(change.tolist())
    return models


def print_summary(summary: dict) -> None:
    before, after = summary["perplexity_before_sft"], summary["perplexity_after_sft"]
    answers = f"{summary['answers_per_prompt']} sampled answers to each"
    print(f"\nperplexity on held-out answers   {before:8.1f} before SFT, {after:.2f} after")
    print(f"reward model, held-out pairs     {100 * summary['reward_accuracy']:8.1f} % right\n")
    print(f"{summary['held_out_prompts']} held-out prompts, {answers}, judged exactly:\n")
    print(f"{'model':8}" + "".join(f"{rate:>10}" for rate in RATES) + f"{'KL to SFT, nats per answer':>30}")
    for name, row in summary["models"].items():
        print(f"{name:8}" + "".join(f"{100 * row[rate]:8.1f} %" for rate in RATES) + f"{row['kl']:>30.2f}")
    low, high = summary["models"]["RLHF"]["right_change"]
    print(f"\nright, RLHF less SFT: {100 * low:+.1f} to {100 * high:+.1f} points (95 % interval over prompts)")


def main() -> None:
    args = parse_args()
    if args.backend == "vllm":
        check_vllm(VLLM)
    torch.set_num_threads(1)  # products this small are slower on several threads
    transformers.utils.logging.disable_progress_bar()
    output = Path(args.output_dir)
    models = judge_models(output, args)
    perplexities = [row["perplexity"] or math.inf for row in read_rows(output / "step1", "eval")]
    curve = read_rows(output / "step3", "train")
    picture = output / "quickstart.png"
    draw(curve, models, picture)
    summary = {
        "perplexity_before_sft": perplexities[0],
        "perplexity_after_sft": perplexities[-1],
        "reward_accuracy": read_rows(output / "step2", "eval")[-1]["accuracy"],
        "models": models,
        "ppo": {name: [row[name] for row in curve] for name in ("step", "score", "kl")},
        "held_out_prompts": args.prompts,
        "answers_per_prompt": args.answers_per_prompt,
        "seconds": args.seconds,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(summary)
    print(f"\npicture: {picture}\nfigures: {output / 'summary.json'}")


if __name__ == "__main__":
    run_script(main)
