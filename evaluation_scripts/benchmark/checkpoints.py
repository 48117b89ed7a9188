#!/usr/bin/env python
"""What checkpoints cost: the same run of step 1 without, with, and with --async_checkpoint, by turns; then how long
going on from one takes, and what the export of its model takes in time and memory.

    python evaluation_scripts/benchmark/checkpoints.py --work /tmp/checkpoints --size 30M --steps 200

The model is a Llama with random weights, made here; data is the quickstart's. Training time is taken from the metrics
file, from the row of the first step to that of the last, so that it holds what lies between: steps and checkpoints.
All runs evaluate once on a few rows, outside of it. The fastest of each kind counts: others may use the machine.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from evaluation_scripts.benchmark.memory import SIZES, launcher, make_models
from utils.arguments import SCRIPTS
from utils.precision import default_dtype
from utils.run.checkpoint_files import FINISHED_FILE, newest_checkpoint
from utils.run.metrics_file import read_rows


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="for model, outputs and checkpoints, on the disk to measure")
    add("--size", choices=SIZES, default="30M", help="of the model (default 30M)")
    add("--steps", type=int, default=200, help="optimizer steps of a run (default 200)")
    add("--every", type=int, default=50, help="steps between checkpoints (default 50)")
    add("--repeats", type=int, default=2, help="runs of each kind (default 2)")
    add("--ranks", type=int, default=2, help="processes (default 2)")
    add("--zero_stage", type=int, choices=range(4), default=2, help="(default 2)")
    add("--dtype", choices=["bf16", "fp32", "fp16"], default=default_dtype().dtype, help="(default: the machine's)")
    add("--rows", type=int, default=4, help="per device and step (default 4)")
    add("--length", type=int, default=128, help="tokens of a row (default 128)")
    return parser.parse_args()


def command_of(args, output: Path) -> list[str]:
    words = [*launcher(args.ranks), SCRIPTS[1], "--data_path", "local/demo"]
    words += ["--model_name_or_path", make_models(args.work, args.size)[0]]
    words += ["--data_split", "1,0,0", "--data_output_path", args.work / "cache", "--output_dir", output]
    # One step more: the row of the first is where the time begins.
    words += ["--max_train_samples", (args.steps + 1) * args.rows * args.ranks, "--max_eval_samples", args.ranks]
    words += ["--per_device_train_batch_size", args.rows, "--max_seq_len", args.length, "--pad_to_max_length"]
    words += ["--dtype", args.dtype, "--zero_stage", args.zero_stage, "--learning_rate", "1e-4"]
    return [str(word) for word in words]


def run(command: list[str]) -> tuple[str, float]:
    """(console, seconds until training begins)."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    start, begins, console = time.perf_counter(), None, []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout:
            console.append(line)
            if "***** Running training *****" in line:
                begins = time.perf_counter() - start
    if process.returncode:
        sys.exit("".join(console[-40:]))
    return "".join(console), begins


def training_seconds(output: Path) -> float:
    times = [row["time"] for row in read_rows(output, "train")]
    return times[-1] - times[0]


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, most MiB of host memory) of a process of its own.

    Asked while it runs: what wait4 tells at the end counts the memory of this process too, which it was forked from.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(found[1]) if found else 0)  # none of one that has just ended
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak / 1024


def measure_export(folder: Path, output: Path) -> str:
    """What the export of the newest checkpoint takes, in words; memory above that of its imports."""
    program = [sys.executable, str(PROJECT / "inference/export_checkpoint.py")]
    _, imports = measured([*program, "--help"])
    shutil.rmtree(output, ignore_errors=True)
    seconds, peak = measured([*program, str(folder), str(output)])
    return f"{seconds:8.1f} s   {peak - imports:.0f} MiB above the {imports:.0f} of its imports"


def main():
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    saving = ["--checkpoint_steps", str(args.every)]
    kinds = {"plain": [], "saving": saving, "beside": [*saving, "--async_checkpoint"]}
    seconds, waits = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    fresh, folder = [], args.work / "saving/checkpoints"
    run([*command_of(args, args.work / "plain"), "--max_train_samples", str(args.rows * args.ranks)])  # fills caches
    for _ in range(args.repeats):
        for kind, flags in kinds.items():
            output = args.work / kind
            shutil.rmtree(output, ignore_errors=True)
            console, begins = run([*command_of(args, output), *flags])
            seconds[kind].append(training_seconds(output))
            fresh.append(begins)
            for line in re.findall(r"^checkpoint .* \((.*)\)$", console, re.MULTILINE):
                times = re.findall(r"([\d.]+) s", line)
                waits[kind].append(sum(map(float, times[1:] or times)))  # beside training: what it waited, twice
    size = sum(newest_checkpoint(folder).state["files"].values())
    export = measure_export(folder, args.work / "exported")
    resumed = []
    for _ in range(args.repeats):
        (folder / FINISHED_FILE).unlink()
        console, begins = run([*command_of(args, args.work / "saving"), *saving, "--resume", "auto"])
        resumed.append((begins, float(re.search(r"read in ([\d.]+) s", console)[1])))
    without = min(seconds["plain"])
    print(f"{args.size}, {args.ranks} rank(s), ZeRO-{args.zero_stage}, {args.dtype}, {args.steps} steps:")
    names = {"plain": "without checkpoints", "saving": f"one every {args.every} steps", "beside": "the same, async"}
    for kind, name in names.items():
        runs = ", ".join(f"{number:.1f}" for number in seconds[kind])
        wait = f"; waited {sum(waits[kind]) / len(waits[kind]):.2f} s for each" if waits[kind] else ""
        print(f"  {name:<26} {min(seconds[kind]):8.1f} s   ratio {min(seconds[kind]) / without:.3f}   of {runs}{wait}")
    print(f"  a checkpoint holds         {size / 2**20:8.0f} MiB")
    print(f"  start to training, fresh   {min(fresh):8.1f} s")
    print(f"  start to training, resumed {min(resumed)[0]:8.1f} s   of which reading {min(resumed)[1]:.2f} s")
    print(f"  export                     {export}")


if __name__ == "__main__":
    main()
