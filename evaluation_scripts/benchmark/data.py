#!/usr/bin/env python
"""Data preparation, measured side by side: ours, the row-by-row way of the published scripts, and the bare tokenizer.

    python evaluation_scripts/benchmark/data.py --pairs DIR/train.jsonl --tokenizer FOLDER --rows 100000
    python evaluation_scripts/benchmark/data.py --pairs DIR/train.jsonl --tokenizer FOLDER --form messages
    python evaluation_scripts/benchmark/data.py --pairs DIR/train.jsonl --tokenizer FOLDER --train

Each way is a script in data_ways/, run in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.data.prompt_format import parse_turns


def repeat_rows(source: Path, rows: int, target: Path, form: str) -> None:
    """The pairs of a file over and over, each with its number in the prompt, so that no two rows are equal.

    Args:
        form: "text" as the file has them, "messages" as lists of turns.
    """
    pairs = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    with open(target, "w", encoding="utf-8") as file:
        for i in range(rows):
            pair = pairs[i % len(pairs)]
            row = {name: pair[name] for name in ("prompt", "chosen", "rejected")}
            row["prompt"] = f"\n\nHuman: {i}." + row["prompt"]
            if form == "messages":
                answers = {
                    name: [{"role": "assistant", "content": row[name].strip()}] for name in row if name != "prompt"
                }
                row = {"prompt": parse_turns(row["prompt"])} | answers
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def command_of(way: str, settings: dict) -> list[str]:
    script = Path(__file__).resolve().parent / "data_ways" / f"{way}.py"
    return [sys.executable, str(script), json.dumps(settings, default=str)]


def measured(way: str, settings: dict) -> dict:
    """What a way reports on its last line of output."""
    done = subprocess.run(command_of(way, settings), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", required=True, help="jsonl file with prompt, chosen and rejected")
    parser.add_argument("--tokenizer", required=True, help="folder or name of the tokenizer")
    parser.add_argument("--rows", type=int, default=100_000, help="rows to prepare: the file's, repeated")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens of a row")
    parser.add_argument("--workers", type=int, default=2, help="cores our way may use")
    parser.add_argument("--step", choices=("sft", "reward"), default="sft", help="rows of step 1 or pairs of step 2")
    parser.add_argument(
        "--form",
        choices=("text", "messages"),
        default="text",
        help="rows as texts, or as lists of messages that the tokenizer's chat template writes (ours alone reads them)",
    )
    parser.add_argument("--skip_published", action="store_true", help="for sizes the published way does not survive")
    parser.add_argument("--train", action="store_true", help="measure training on three kinds of batches instead")
    parser.add_argument("--steps", type=int, default=12, help="with --train: timed steps of each kind")
    parser.add_argument("--output", default=None, help="JSON file for the figures")
    return parser


def main():
    args = build_parser().parse_args()
    work = Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    try:
        folder = work / "pairs"
        settings = vars(args) | {"work": work, "file": folder / "train.jsonl"}
        if args.train:
            subprocess.run(command_of("training", settings), check=True)
            return
        folder.mkdir()
        repeat_rows(Path(args.pairs), args.rows, settings["file"], args.form)
        shutil.copy(args.pairs, folder / "eval.jsonl")
        results = (
            {} if args.skip_published or args.form == "messages" else {"published": measured("published", settings)}
        )
        results["ours"] = measured("ours", settings)
        results["ours, second run"] = measured("ours", settings)
        if args.form == "text":
            results["bare tokenizers"] = measured("bare", settings)
    finally:
        shutil.rmtree(work)
    print_table(args, results)
    if args.output:
        Path(args.output).write_text(json.dumps(vars(args) | {"results": results}, indent=1, default=str) + "\n")


def print_table(args, results: dict[str, dict]) -> None:
    print(f"{args.rows} rows as {args.form}, {args.step}, max_seq_len {args.max_seq_len}, {args.workers} workers\n")
    print(f"{'way':20}{'seconds':>10}{'peak MB':>10}{'above imports':>15}{'file MB':>10}")
    for name, row in results.items():
        cells = [row.get(key) for key in ("seconds", "peak_mb", "peak_above_imports_mb", "file_mb")]
        print(
            f"{name:20}"
            + "".join(
                f"{'':>{w}}" if c is None else f"{c:>{w}.1f}" for c, w in zip(cells, (10, 10, 15, 10), strict=True)
            )
        )
    ours = results["ours"]
    if "bare tokenizers" in results:
        print(f"\nours / bare tokenizers: {ours['seconds'] / results['bare tokenizers']['seconds']:.2f} x the time")
    print(f"second run, first batch after {results['ours, second run']['first_batch_seconds']:.2f} s")
    if "published" in results:
        published = results["published"]
        for key, label in (("seconds", "time"), ("peak_mb", "peak memory"), ("file_mb", "file")):
            print(f"published / ours, {label}: {published[key] / ours[key]:.1f}")


if __name__ == "__main__":
    main()
