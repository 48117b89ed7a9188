#!/usr/bin/env python
"""Curves of one or several runs, from their metrics.jsonl, as a picture or a page.

python evaluation_scripts/plot_run.py output/quickstart/step3
python evaluation_scripts/plot_run.py output/a/step3 output/b/step3 --output compare.html --smooth 0.8
python evaluation_scripts/plot_run.py output/sft --metrics train/loss train/grad_norm

Training curves are smoothed where that is asked for; evaluations stand as they are, and the last one counts.
"""

import argparse
import html
import io
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.process.errors import UserError, run_script
from utils.process.files import check_writable
from utils.run.metrics_file import METRICS_FILE

# What a reader wants first, in this order, of whichever step the runs are of.
FIRST_LOOK = (
    *("train/loss", "eval/perplexity", "eval/accuracy", "train/accuracy"),
    *("train/score", "eval/score", "train/kl", "eval/kl", "train/answer_length", "train/eos_rate", "train/entropy"),
    *("train/actor_loss", "train/critic_loss", "train/explained_variance", "train/clip_fraction"),
    *("train/grad_norm", "train/actor_grad_norm", "train/lr", "train/actor_lr", "train/tokens_per_second"),
)
UNITS = {
    "train/kl": "nats per answer",
    "eval/kl": "nats per answer",
    "train/answer_length": "tokens",
    "train/eos_rate": "share of answers",
    "train/entropy": "nats",
    "eval/accuracy": "share of pairs",
    "train/accuracy": "share of pairs",
    "train/tokens_per_second": "tokens/s",
}
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#bab0ac")
MEAN_OF = 10  # last rows of a training curve, which jumps from step to step
Curve = list[tuple[float, float]]  # (step, value)


def is_training(metric: str) -> bool:
    """Whether its rows come with steps of training, and not with evaluations."""
    return metric.startswith("train/")


def read_curves(run: Path) -> dict[str, Curve]:
    """Name -> points, of every number in a run's metrics file.

    Args:
        run: the folder of a step, or its metrics.jsonl.

    Raises:
        UserError: no such file, or a line that is no row of metrics.
    """
    file = run if run.suffix == ".jsonl" else run / METRICS_FILE
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        hint = " (the folder of one step is wanted: output/step3, say)" if run.is_dir() else ""
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}{hint}") from error
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break  # a run that is being written, or was killed
            raise UserError(f"{file}, line {number}: no row of metrics") from error
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float):
                curves.setdefault(name, []).append((step, value))
    if not curves:
        raise UserError(f"{file} holds no metrics yet")
    return curves


def smooth(curve: Curve, weight: float) -> Curve:
    """The exponential moving average, freed of its bias towards zero at the start."""
    points, total, share = [], 0.0, 0.0
    for step, value in curve:
        total, share = weight * total + (1 - weight) * value, weight * share + (1 - weight)
        points.append((step, total / share))
    return points


def names_of_runs(runs: list[Path]) -> list[str]:
    """The paths without what they share."""
    parents = [str(run.resolve()) for run in runs]
    if len(runs) == 1:
        return ["/".join(Path(parents[0]).parts[-2:])]
    common = os.path.commonpath(parents)
    return [os.path.relpath(parent, common) for parent in parents]


def choose(runs: list[dict[str, Curve]], wanted: list[str] | None) -> list[str]:
    """The metrics to draw: those asked for, or a first look at what changes.

    Raises:
        UserError: a name that no run has.
    """
    known = sorted(set().union(*runs))
    if wanted is None:
        shown = [name for name in FIRST_LOOK if any(len(run.get(name, ())) > is_training(name) for run in runs)]
        return shown or known
    for name in wanted:
        if name not in known:
            raise UserError(f"--metrics {name}: no run has it; there are {', '.join(known)}")
    return wanted


def draw(runs: dict[str, dict[str, Curve]], metrics: list[str], weight: float):
    """One panel per metric, one colour per run; a smoothed training curve has the raw one pale behind it.

    Args:
        weight: of the past, in smoothing; 0 for none.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, math.ceil(math.sqrt(len(metrics))))
    rows = math.ceil(len(metrics) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for i, (name, curves) in enumerate(runs.items()):
            curve, color = curves.get(metric, []), COLORS[i % len(COLORS)]
            marker = "o" if len(curve) < 3 or not is_training(metric) else None
            if weight and is_training(metric):
                axis.plot([p[0] for p in curve], [p[1] for p in curve], color=color, alpha=0.25, linewidth=1)
                curve = smooth(curve, weight)
            steps, values = [p[0] for p in curve], [p[1] for p in curve]
            axis.plot(steps, values, color=color, label=name, marker=marker, markersize=3, linewidth=1.5)
        values = [value for curves in runs.values() for _, value in curves.get(metric, ())]
        if min(values) > 0 and max(values) > 100 * min(values):
            axis.set_yscale("log")
        axis.set_title(_title(metric, [curves.get(metric, []) for curves in runs.values()]), fontsize=10)
        axis.set_ylabel(UNITS.get(metric, ""), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(metrics) - columns) : len(metrics)]:
        axis.set_xlabel("step", fontsize=8)
    if len(runs) > 1:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)), frameon=False, fontsize=9)
    else:
        figure.suptitle(next(iter(runs)), fontsize=11)
    return figure


def _title(metric: str, curves: list[Curve]) -> str:
    """The name of a metric, and of a single run's evaluations the last."""
    if is_training(metric) or len(curves) > 1:
        return metric.removeprefix("train/")
    step, value = curves[0][-1]
    return f"{metric}: {value:.4g} at step {step}"


def last_values(runs: dict[str, dict[str, Curve]], metrics: list[str]) -> list[list[str]]:
    """Rows of (metric, the last value of each run and its step); of training curves with the mean of the last rows."""

    def cell(metric: str, curve: Curve) -> str:
        if not curve:
            return ""
        step, value = curve[-1]
        text = f"{value:.6g} at step {step}"
        values = [value for _, value in curve[-MEAN_OF:]]
        if is_training(metric) and len(values) > 1:
            text += f" (mean of the last {len(values)}: {sum(values) / len(values):.6g})"
        return text

    return [[metric, *(cell(metric, curves.get(metric, [])) for curves in runs.values())] for metric in metrics]


def print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_page(figure, runs, metrics, file: Path) -> None:
    """One HTML file that needs no other: the curves as SVG, and a table of where they ended."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    drawing = svg.getvalue()[svg.getvalue().index("<svg") :]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("last value", *runs))
    rows = last_values(runs, metrics)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    file.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(" against ".join(runs))}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse }}
th, td {{ text-align: right; padding: .2em .8em; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
</style>
{drawing}
<table><tr>{head}</tr>
{body}</table>
</html>
""",
        encoding="utf-8",
    )


def smoothing(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more and below 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s OUTPUT... [options]"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT", help="--output_dir of a step, one per run")
    parser.add_argument("--output", type=Path, default=None, help=".png or .html file; default: OUTPUT/curves.png")
    parser.add_argument("--metrics", nargs="+", default=None, help="names, as in train/loss; default: a first look")
    parser.add_argument(
        "--smooth",
        type=smoothing,
        default=0.0,
        help="weight of the past in a moving average of training curves; 0: off",
    )
    args = parser.parse_args()
    output = args.output or (args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent) / "curves.png"
    if output.suffix not in (".png", ".html"):
        raise UserError(f"--output {output}: a .png or .html file")
    check_writable(str(output))
    runs = dict(zip(names_of_runs(args.runs), map(read_curves, args.runs), strict=True))
    metrics = choose(list(runs.values()), args.metrics)
    figure = draw(runs, metrics, args.smooth)
    if output.suffix == ".html":
        write_page(figure, runs, metrics, output)
    else:
        figure.savefig(output, dpi=110)
    print_table([["last value", *runs], *last_values(runs, metrics)])
    print(f"{len(metrics)} curves of {len(runs)} {'runs' if len(runs) > 1 else 'run'}: {output}")


if __name__ == "__main__":
    run_script(main)
