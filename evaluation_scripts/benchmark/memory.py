#!/usr/bin/env python
"""Estimated and measured peak memory of short runs of each step, side by side, on a CPU or GPUs.

    python evaluation_scripts/benchmark/memory.py --work /tmp/memory --step 1

For each case: what ``--dry_run`` says, and the largest resident memory of a rank over a few optimizer steps of the same
command (evaluation before them included). On GPUs: what torch has allocated on one at most, against the estimate less
what is there before any model; cases of more ranks than GPUs are left out. Models are Llamas of three sizes with random
weights, made here; data is the quickstart's, padded to the maximum. Results are kept in WORK/results.json, so that
cases can be run in pieces.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.arguments import SCRIPTS
from utils.demo.tiny_model import train_demo_tokenizer
from utils.run.metrics_file import read_rows

ON_GPU = torch.cuda.is_available()
LENGTH = 256  # tokens of a row; step 3: half of it prompt
SIZES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "2M": (128, 344, 4, 4, 4, 8192),
    "8M": (256, 688, 6, 4, 4, 8192),
    "30M": (384, 1024, 8, 6, 6, 32768),
    "135M": (576, 1536, 30, 9, 3, 49152),  # as SmolLM2-135M
    "360M": (960, 2560, 32, 15, 5, 49152),  # as SmolLM2-360M
    "436M": (1024, 2816, 30, 16, 16, 49152),
}
CHECKPOINTING, LORA = ["--gradient_checkpointing"], ["--lora_dim", "16", "--only_optimize_lora"]
RL_CHECKPOINTING = ["--actor_gradient_checkpointing", "--critic_gradient_checkpointing"]
RL_LORA = ["--actor_lora_dim", "16", "--critic_lora_dim", "16", "--only_optimize_lora"]
CASES = {  # step -> (size, ranks, ZeRO stage, dtype, rows of a micro-batch, more flags)
    1: [
        ("30M", 1, 0, "fp32", 8, []),
        ("30M", 1, 2, "bf16", 8, []),
        ("30M", 2, 3, "bf16", 8, []),
        ("135M", 1, 0, "fp32", 4, CHECKPOINTING),
        ("135M", 1, 2, "fp32", 4, []),
        ("135M", 1, 2, "bf16", 8, []),
        ("135M", 1, 2, "bf16", 8, CHECKPOINTING),
        ("135M", 1, 2, "bf16", 4, ["--gradient_accumulation_steps", "2"]),
        ("135M", 2, 2, "bf16", 4, CHECKPOINTING),
        ("135M", 2, 3, "bf16", 4, CHECKPOINTING),
        ("135M", 1, 2, "bf16", 8, LORA),
        ("360M", 1, 0, "fp32", 2, CHECKPOINTING),
        ("360M", 1, 2, "bf16", 2, CHECKPOINTING),
        ("360M", 1, 2, "bf16", 8, [*LORA, *CHECKPOINTING]),
    ],
    2: [
        ("30M", 1, 2, "bf16", 2, []),
        ("30M", 1, 2, "bf16", 4, []),
        ("135M", 1, 0, "fp32", 2, CHECKPOINTING),
        ("135M", 1, 2, "bf16", 4, []),
        ("135M", 2, 3, "bf16", 2, CHECKPOINTING),
        ("360M", 1, 2, "bf16", 2, CHECKPOINTING),
    ],
    3: [
        ("30M", 1, 0, "fp32", 8, ["--enable_ema"]),
        ("30M", 2, 3, "bf16", 8, ["--enable_hybrid_engine"]),
        ("135M", 1, 2, "bf16", 8, ["--enable_hybrid_engine"]),
        ("135M", 2, 3, "bf16", 4, ["--enable_hybrid_engine", *RL_CHECKPOINTING]),
        ("360M", 1, 2, "bf16", 8, ["--enable_hybrid_engine", *RL_LORA, *RL_CHECKPOINTING]),
    ],
}


def make_models(folder: Path, size: str) -> tuple[Path, Path]:
    """A language model and a reward model with random weights and the quickstart's tokenizer; made once."""
    policy, reward = folder / f"{size}-policy", folder / f"{size}-reward"
    if (reward / "tokenizer.json").exists():
        return policy, reward
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    tokenizer = train_demo_tokenizer(1024, seed=1234)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    for where, model_class in ((policy, LlamaForCausalLM), (reward, LlamaForSequenceClassification)):
        model_class(config).to(torch.bfloat16).save_pretrained(where)
        tokenizer.save_pretrained(where)
    return policy, reward


def command_of(work: Path, step: int, case) -> list[str]:
    size, ranks, stage, dtype, rows, more = case
    policy, reward = make_models(work, size)
    words = [*launcher(ranks), SCRIPTS[step], "--data_path", "local/demo", "--data_output_path", work / "cache"]
    words += ["--pad_to_max_length", "--dtype", dtype, "--max_eval_samples", rows * ranks]
    if step < 3:
        accumulation = 2 if "--gradient_accumulation_steps" in more else 1
        words += ["--model_name_or_path", policy, "--zero_stage", stage, "--max_seq_len", LENGTH]
        words += ["--per_device_train_batch_size", rows, "--per_device_eval_batch_size", rows]
        words += ["--max_train_samples", 3 * rows * ranks * accumulation]
    else:
        words += ["--actor_model_name_or_path", policy, "--critic_model_name_or_path", reward]
        words += ["--actor_zero_stage", stage, "--critic_zero_stage", stage]
        words += ["--max_prompt_seq_len", LENGTH // 2, "--max_answer_seq_len", LENGTH // 2]
        words += ["--per_device_generation_batch_size", rows, "--per_device_training_batch_size", rows]
        words += ["--max_train_samples", 3 * rows * ranks, "--enable_test_mode", "--test_stop_step", 3]
    return [str(word) for word in (*words, *more)]


def launcher(ranks: int) -> list[str]:
    """What a command line begins with, before the script."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def run(command: list[str], log: Path) -> dict[str, float]:
    """A program to its end, one thread in each process: seconds, processor seconds, GiB of its largest process."""
    start, environment = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    spent = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - start, "processor": spent, "gib": usage.ru_maxrss / 2**20}


def estimated(log: str) -> dict:
    """GiB of a rank at most and the phase that takes them, out of what a dry run has printed."""
    found = re.search(r"([\d.]+) (?:GiB per rank at most|of [\d.]+ GiB on the device) \(([^)]*)\)", log)
    before = re.search(r"before any model +([\d.]+)", log)
    return {"estimated": float(found[1]) - ON_GPU * float(before[1]), "phase": found[2]}


def measured(command: list[str], log: Path) -> dict:
    """Run a command: GiB of its largest process, or of a GPU, and seconds."""
    output = log.with_suffix("")
    used = run([*command, "--output_dir", str(output)] if ON_GPU else command, log)
    if not ON_GPU:
        return {"measured": used["gib"], "seconds": used["seconds"]}
    highest = max(row["memory_gib"] for row in read_rows(output, "train"))
    shutil.rmtree(output)
    return {"measured": highest, "seconds": used["seconds"]}


def name_of(step: int, case) -> str:
    size, ranks, stage, dtype, rows, more = case
    return f"{step} {size} {ranks} ZeRO-{stage} {dtype} {rows} {' '.join(more)}".strip()


def table(results: dict, step: int) -> str:
    lines = ["| model | ranks | ZeRO | precision | rows | more | estimated GiB | measured GiB | difference |"]
    lines += ["|" + "---|" * 9]
    for case in CASES[step]:
        row = results.get(name_of(step, case), {})
        if {"estimated", "measured"} <= set(row):
            size, ranks, stage, dtype, rows, more = case
            difference = 100 * (row["estimated"] / row["measured"] - 1)
            flags = f"`{' '.join(more)}`" if more else ""
            numbers = f"{row['estimated']:.2f} | {row['measured']:.2f} | {difference:+.0f} %"
            lines.append(f"| {size} | {ranks} | {stage} | {dtype} | {rows} | {flags} | {numbers} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, cache, logs and results")
    parser.add_argument("--step", type=int, choices=CASES, required=True, help="the step to run")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of cases, from 0; default: all that are missing")
    parser.add_argument("--estimate", action="store_true", help="estimate anew, keep what was measured")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "results.json"
    for number, case in enumerate(CASES[args.step]):
        results = json.loads(file.read_text()) if file.exists() else {}
        name = name_of(args.step, case)
        row = results.get(name, {})
        if (args.cases is not None and number not in args.cases) or (ON_GPU and case[1] > torch.cuda.device_count()):
            continue
        command = command_of(args.work, args.step, case)
        log = args.work / f"{args.step}-{number}.log"
        if args.estimate or "estimated" not in row:
            run([*command, "--dry_run"], log.with_suffix(".dry.log"))
            row |= estimated(log.with_suffix(".dry.log").read_text())
        if "measured" not in row:
            row |= measured(command, log)
        results[name] = row
        file.write_text(json.dumps(results, indent=1))
        print(name, row, flush=True)
    print(table(json.loads(file.read_text()), args.step))


if __name__ == "__main__":
    main()
