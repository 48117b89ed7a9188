#!/usr/bin/env python
"""How cost grows: tokens per second and memory of a rank against rows, sequence length, model size and ranks.

    python evaluation_scripts/benchmark/scaling.py --work /tmp/scaling --axis length --values 128 512 2048
    python evaluation_scripts/benchmark/scaling.py --work /tmp/scaling --axis rows length size ranks
    python evaluation_scripts/benchmark/scaling.py --work /tmp/scaling --picture scaling.png
    python evaluation_scripts/benchmark/scaling.py --work /tmp/steps --axis step

Each value is a run of step 1 in a process of its own, on a CPU with one thread per rank: a few optimizer steps of 4
rows of 256 tokens through a Llama of 30M parameters in bf16, whatever the axis does not change. Along "rows" it is a
dry run over so many rows, first without and then with the cache of token ids: start-up, preparation and sampler, no
training. Along "step" (ZERO:RANKS, in fp32) stands the planner's estimate beside the measured step. Results are kept
in WORK/scaling.json, so that values can be run in pieces. Where other programs run, processor seconds tell more than
the clock's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
from transformers import AutoConfig

from evaluation_scripts.benchmark.memory import launcher, make_models, run
from utils.arguments import SCRIPTS, build_parser
from utils.planning.estimate import models_of_step
from utils.planning.estimate_time import time_of_step
from utils.planning.machines import cluster_of, measure_cpu
from utils.process.files import METRICS_FILE
from utils.run.metrics_file import read_rows

DEFAULTS = {"length": "256", "size": "30M", "ranks": "1"}
AXES = {
    "rows": ["1000", "10000", "100000", "1000000"],
    "length": ["128", "256", "512", "1024", "2048", "4096"],
    "size": ["2M", "8M", "30M", "135M"],
    "ranks": ["1", "2", "4"],
    "step": ["0:1", "2:1", "3:1", "0:2", "2:2", "3:2"],
}
ROWS, STEPS = 4, 4  # of a rank and optimizer step; steps of a run, of which the first is left out


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


def watch(command: list[str], metrics: Path, log: Path) -> list[float]:
    """Run a training to its end. Returns the processor seconds of all its processes between a step and the next."""
    with open(log, "w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        marks: dict[int, float] = {}  # steps written -> processor seconds by then
        while process.poll() is None:
            steps = len(read_rows(metrics, "train")) if (metrics / METRICS_FILE).exists() else 0
            if steps not in marks:
                marks[steps] = _spent(process)
            time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return [marks[step] - marks[step - 1] for step in marks if step > 1 and step - 1 in marks]


def _spent(process: psutil.Process) -> float:
    seconds = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            used = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += used.user + used.system
    return seconds


def words_of(work: Path, data: Path, size: str, length: str) -> list:
    return [
        *("--model_name_or_path", make_models(work, size)[0], "--data_path", data, "--data_split", "1,0,0"),
        *("--data_output_path", work / "cache", "--max_seq_len", length, "--max_eval_samples", 4),
        *("--per_device_train_batch_size", ROWS, "--per_device_eval_batch_size", ROWS, "--overwrite_output_dir"),
    ]


def measure_rows(work: Path, rows: int) -> dict:
    words = [SCRIPTS[1], *words_of(work, make_rows(work, rows, 24), "2M", "64"), "--dry_run", "--dtype", "fp32"]
    command = [sys.executable, *map(str, words)]
    first = run([*command, "--rebuild_cache"], work / "rows.log")
    again = run(command, work / "rows.log")
    return first | {"again": again["processor"], "gib_again": again["gib"]}


def measure_steps(work: Path, *, length: str, size: str, ranks: str, stage: str = "2", dtype: str = "bf16") -> dict:
    """Medians over a run's optimizer steps: processor seconds of all ranks together, the clock's seconds; tokens per
    processor second; GiB of a rank."""
    count, output = int(ranks), work / "output"
    rows = ROWS * count
    shutil.rmtree(output, ignore_errors=True)
    words = words_of(work, make_rows(work, rows * STEPS, 2 * int(length)), size, length)
    words += ["--output_dir", output, "--zero_stage", stage, "--dtype", dtype]
    spent = watch([*launcher(count), *map(str, [SCRIPTS[1], *words])], output, work / "steps.log")
    trained = read_rows(output, "train")
    seconds = statistics.median(row["seconds"] for row in trained[1:])
    step = statistics.median(spent)
    per_second = rows * int(length) / step
    return {"step": step, "seconds": seconds, "tokens_per_second": per_second, "gib": trained[-1]["memory_gib"]}


def estimated(work: Path, stage: str, ranks: int) -> float:
    """The planner's seconds for such a step on this CPU, measured now, with one thread in each rank."""
    torch.set_num_threads(1)
    words = [str(word) for word in words_of(work, work, DEFAULTS["size"], DEFAULTS["length"])]
    args = build_parser(1).parse_args([*words, "--dtype", "fp32", "--zero_stage", stage])
    config = AutoConfig.from_pretrained(make_models(work, DEFAULTS["size"])[0])
    models = models_of_step(args, 1, {"model": config})
    device = measure_cpu("fp32", ranks, clock=time.thread_time)
    return time_of_step(args, 1, models, cluster_of(device, ranks, ranks)).seconds


def compare(work: Path, stage: str, ranks: str) -> dict:
    """The estimate (the mean of one before the run and one after it) over what the run took: by the clock, and in
    processor seconds of a rank, which other programs disturb less, and which leave out waiting for other ranks."""
    before = estimated(work, stage, int(ranks))
    took = measure_steps(work, **DEFAULTS | {"ranks": ranks}, stage=stage, dtype="fp32")
    predicted = (before + estimated(work, stage, int(ranks))) / 2
    seconds, processor = took["seconds"], took["step"] / int(ranks)
    return {
        "predicted": predicted,
        "seconds": seconds,
        "ratio": predicted / seconds,
        "processor": processor,
        "ratio_processor": predicted / processor,
        "load": os.getloadavg()[0],
    }


def measure(work: Path, axis: str, value: str) -> dict:
    if axis == "rows":
        return measure_rows(work, int(value))
    if axis == "step":
        return compare(work, *value.split(":"))
    return measure_steps(work, **DEFAULTS | {axis: value})


def number_of(value: str) -> float:
    """To sort and draw values by: 135M is 135, 3:2 is 3.2."""
    return float(value.rstrip("M").replace(":", "."))


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
    """Seconds (logarithmic) and GiB against each axis, with a line for linear growth through the first point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    axes = [axis for axis in ("rows", "length", "size", "ranks") if results.get(axis)]
    figure, panels = plt.subplots(2, len(axes), figsize=(3.4 * len(axes), 5.2), layout="constrained", squeeze=False)
    for column, axis in enumerate(axes):
        rows = results[axis]
        x = [number_of(value) for value in rows]
        time_name = "processor" if axis == "rows" else "step"
        for panel, name in zip(panels[:, column], (time_name, "gib"), strict=True):
            y = [row[name] for row in rows.values()]
            panel.plot(x, y, marker="o", color="C0", label="measured")
            if name != "gib":
                panel.plot(x, [y[0] * value / x[0] for value in x], "--", color="0.6", label="linear")
            if axis == "rows" and name == "processor":
                panel.plot(x, [row["again"] for row in rows.values()], marker="o", color="C1", label="with the cache")
            panel.set(
                xscale="log",
                yscale="linear" if name == "gib" else "log",
                xlabel=axis + (" (M parameters)" if axis == "size" else ""),
            )
            if name != "gib":
                panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            panel.set_xticks(x, rows, fontsize=7, minor=False)
            panel.minorticks_off()
            labels = {"gib": "GiB of a rank", "step": "processor seconds per step", "processor": "processor seconds"}
            panel.set_ylabel(labels[name])
            panel.grid(alpha=0.3)
            if name == "gib":
                panel.set_ylim(0, 1.1 * max(y))
        panels[0, column].legend(fontsize=7, frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, data, cache and results")
    parser.add_argument("--axis", choices=AXES, nargs="+", default=[], help="what grows")
    parser.add_argument("--values", nargs="+", help="on a single axis; default: all that are missing")
    parser.add_argument("--picture", type=Path, help="draw the results into this file (matplotlib)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "scaling.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if args.values and len(args.axis) != 1:
        parser.error("--values are those of a single --axis")
    for axis in args.axis:
        kept = results.setdefault(axis, {})
        for value in args.values or [value for value in AXES[axis] if value not in kept]:
            kept[value] = measure(args.work, axis, value)
            results[axis] = kept = dict(sorted(kept.items(), key=lambda item: number_of(item[0])))
            file.write_text(json.dumps(results, indent=1))
            print(axis, value, kept[value], flush=True)
    print(table(results))
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
