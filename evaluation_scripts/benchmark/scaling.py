#!/usr/bin/env python
"""How cost grows: tokens per second and memory of a rank against rows, sequence length, model size and ranks.

    python evaluation_scripts/benchmark/scaling.py --work /tmp/scaling --axis length --values 128 512 2048
    python evaluation_scripts/benchmark/scaling.py --work /tmp/scaling --axis step --values 0:1 2:1 2:2 3:2
    python evaluation_scripts/benchmark/scaling.py --work /tmp/scaling --picture scaling.png

Each value is a run of step 1 in a process of its own, on a CPU with one thread per rank: a few optimizer steps of 4
rows of 256 tokens through a Llama of 30M parameters in bf16, whatever the axis does not change. Along "rows" it is a
dry run over so many rows, first without and then with the cache of token ids: start-up, preparation and sampler, no
training. Along "step" (ZERO:RANKS) stands the planner's estimate beside the measured step, in fp32. Results are kept
in WORK/scaling.json, so that values can be run in pieces.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from utils.arguments import SCRIPTS, build_parser
from utils.demo.tiny_model import train_demo_tokenizer
from utils.planning.estimate import models_of_step
from utils.planning.estimate_time import time_of_step
from utils.planning.machines import accelerator_named, cluster_of
from utils.run.metrics_file import read_rows

SIZES = {  # hidden, intermediate, layers, heads, vocabulary
    "2M": (128, 344, 4, 4, 8192),
    "8M": (256, 688, 6, 4, 8192),
    "30M": (384, 1024, 8, 6, 32768),
    "135M": (576, 1536, 30, 9, 49152),
}
DEFAULTS = {"length": "256", "size": "30M", "ranks": "1"}
AXES = {
    "rows": ["1000", "10000", "100000", "1000000"],
    "length": ["128", "256", "512", "1024", "2048", "4096"],
    "size": list(SIZES),
    "ranks": ["1", "2"],
    "step": ["0:1", "2:1", "3:1", "0:2", "2:2", "3:2"],
}
ROWS, STEPS = 4, 6  # of a rank and optimizer step; steps of a run, of which the first is left out


def make_model(work: Path, size: str) -> Path:
    """A language model with random weights and a tokenizer; made once."""
    folder = work / f"model-{size}"
    if (folder / "tokenizer.json").exists():
        return folder
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    tokenizer = train_demo_tokenizer(1024, seed=1234)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(work: Path, rows: int, words: int) -> Path:
    """A file of rows whose prompt and answer have so many words in all, or somewhat more tokens; made once."""
    file = work / f"rows-{rows}-{words}" / "train.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w") as out:
            for row in range(rows):
                row = {"prompt": f" Human: What is row {row}? Assistant:", "chosen": " a number" * (words // 2)}
                out.write(json.dumps(row) + "\n")
        (file.parent / "eval.jsonl").write_text("".join(file.open().readlines(200)))
    return file.parent


def run(words: list, ranks: int, log: Path) -> dict:
    """A program to its end: seconds, processor seconds, and GiB of its largest process."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    began = time.perf_counter()
    with open(log, "w") as out:
        command = [str(word) for word in [*start, SCRIPTS[1], *words]]
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    spent = usage.ru_utime + usage.ru_stime
    return {"seconds": time.perf_counter() - began, "processor": spent, "gib": usage.ru_maxrss / 2**20}


def words_of(work: Path, data: Path, size: str, length: str) -> list:
    return [
        *("--model_name_or_path", make_model(work, size), "--data_path", data, "--data_split", "1,0,0"),
        *("--data_output_path", work / "cache", "--max_seq_len", length, "--max_eval_samples", 4),
        *("--per_device_train_batch_size", ROWS, "--per_device_eval_batch_size", ROWS, "--overwrite_output_dir"),
    ]


def measure_rows(work: Path, rows: int) -> dict:
    words = [*words_of(work, make_rows(work, rows, 24), "2M", "64"), "--dry_run", "--dtype", "fp32"]
    first = run([*words, "--rebuild_cache"], 1, work / "rows.log")
    again = run(words, 1, work / "rows.log")
    return first | {"again": again["processor"], "gib_again": again["gib"]}


def measure_steps(work: Path, *, length: str, size: str, ranks: str, stage: str = "2", dtype: str = "bf16") -> dict:
    """Seconds of the fastest optimizer step (other programs only add), tokens per second of all ranks, GiB of a rank,
    seconds of the whole run and processor seconds of all its processes."""
    count, output = int(ranks), work / "output"
    data = make_rows(work, ROWS * STEPS * count, 2 * int(length))
    words = [*words_of(work, data, size, length), "--output_dir", output, "--zero_stage", stage, "--dtype", dtype]
    whole = run(words, count, work / "steps.log")
    seconds = min(row["seconds"] for row in read_rows(output, "train")[1:])
    tokens = ROWS * count * int(length)
    return {"step": seconds, "tokens_per_second": tokens / seconds} | whole


def estimated(work: Path, stage: str, ranks: int) -> float:
    """The planner's seconds for such a step; ranks share the processor, and each has one thread."""
    torch.set_num_threads(1)
    words = [str(word) for word in words_of(work, work, DEFAULTS["size"], DEFAULTS["length"])]
    args = build_parser(1).parse_args([*words, "--dtype", "fp32", "--zero_stage", stage])
    config = LlamaConfig.from_pretrained(make_model(work, DEFAULTS["size"]))
    models = models_of_step(args, 1, {"model": config})
    return time_of_step(args, 1, models, cluster_of(accelerator_named("cpu", "fp32"), ranks, ranks)).seconds


def measure(work: Path, axis: str, value: str) -> dict:
    if axis == "rows":
        return measure_rows(work, int(value))
    if axis == "step":
        stage, ranks = value.split(":")
        measured = measure_steps(work, **DEFAULTS | {"ranks": ranks}, stage=stage, dtype="fp32")
        return measured | {"estimated": estimated(work, stage, int(ranks))}
    return measure_steps(work, **DEFAULTS | {axis: value})


def table(results: dict) -> str:
    lines = []
    for axis in AXES:
        rows = results.get(axis, {})
        names = list(next(iter(rows.values()), {}))
        if rows:
            lines += [f"| {axis} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
            for value, row in rows.items():
                lines.append(f"| {value} | {' | '.join(f'{row[name]:.4g}' for name in names)} |")
            lines.append("")
    return "\n".join(lines)


def draw(results: dict, file: Path) -> None:
    """Seconds and GiB against each axis, both logarithmic, with a line for linear growth through the first point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in ("rows", "length", "size", "ranks") if results.get(axis)]
    figure, panels = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 5.2), layout="constrained", squeeze=False)
    for column, axis in enumerate(axes):
        rows = results[axis]
        x = [float(value.rstrip("M")) for value in rows]
        time_name = "processor" if axis == "rows" else "step"
        for panel, name in zip(panels[:, column], (time_name, "gib"), strict=True):
            y = [row[name] for row in rows.values()]
            panel.plot(x, y, marker="o", color="C0", label="measured")
            if name != "gib":
                panel.plot(x, [y[0] * value / x[0] for value in x], "--", color="0.6", label="linear")
            if axis == "rows" and name == "processor":
                panel.plot(x, [row["again"] for row in rows.values()], marker="o", color="C1", label="with the cache")
            panel.set(xscale="log", yscale="log", xlabel=axis + (" (M parameters)" if axis == "size" else ""))
            panel.set_xticks(x, rows, fontsize=7, minor=False)
            panel.minorticks_off()
            labels = {"gib": "GiB of a rank", "step": "seconds per step", "processor": "processor seconds"}
            panel.set_ylabel(labels[name])
            panel.grid(alpha=0.3)
        panels[0, column].legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, data, cache and results")
    parser.add_argument("--axis", choices=AXES, help="what grows")
    parser.add_argument("--values", nargs="+", help="on that axis; default: all that are missing")
    parser.add_argument("--picture", type=Path, help="draw the results into this file (matplotlib)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "scaling.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for value in (args.values or AXES[args.axis]) if args.axis else ():
        kept = results.setdefault(args.axis, {})
        if args.values is None and value in kept:
            continue
        kept[value] = measure(args.work, args.axis, value)
        file.write_text(json.dumps(results, indent=1))
        print(args.axis, value, kept[value], flush=True)
    print(table(results))
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
