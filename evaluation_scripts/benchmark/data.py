#!/usr/bin/env python
"""Data preparation, measured side by side: ours, the row-by-row way of the published scripts, and the bare tokenizer.

    python evaluation_scripts/benchmark/data.py --pairs DIR/train.jsonl --tokenizer FOLDER --rows 100000
    python evaluation_scripts/benchmark/data.py --pairs DIR/train.jsonl --tokenizer FOLDER --train

Each way runs in a process of its own, so that its peak memory is its own. The published way tokenises one row at a
time, pads it to the maximum, keeps every row in a list and writes the list with torch.save.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STEPS = {"sft": 1, "reward": 2}


def peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def repeat_rows(source: Path, rows: int, target: Path) -> None:
    """The pairs of a file over and over, each with its number in the prompt, so that no two rows are equal."""
    pairs = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    with open(target, "w", encoding="utf-8") as file:
        for i in range(rows):
            pair = pairs[i % len(pairs)]
            row = {name: pair[name] for name in ("prompt", "chosen", "rejected")}
            row["prompt"] = f"\n\nHuman: {i}." + row["prompt"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run_published(args) -> dict:
    """One row at a time, padded to the maximum, kept in a list, written with torch.save."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    before = peak_memory_mb()
    start = time.perf_counter()
    rows = [json.loads(line) for line in Path(args.file).read_text(encoding="utf-8").split("\n")[:-1]]
    kept = []
    names = ("chosen",) if args.step == "sft" else ("chosen", "rejected")
    for row in rows:
        for name in names:
            text = row["prompt"] + row[name] + tokenizer.eos_token
            tokens = tokenizer(
                text, max_length=args.max_seq_len, padding="max_length", truncation=True, return_tensors="pt"
            )
            kept.append({key: value.squeeze(0) for key, value in tokens.items()})
    file = Path(args.work) / "published.pt"
    torch.save(kept, file)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": peak_memory_mb(),
        "peak_above_imports_mb": peak_memory_mb() - before,
        "file_mb": file.stat().st_size / 1e6,
    }


def run_ours(args) -> dict:
    from utils.data.batching import DataCollatorReward, DataCollatorSFT, StepBatchSampler, make_loader
    from utils.data.preparation import create_prompt_dataset
    from utils.model.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(args.tokenizer)
    before = peak_memory_mb()
    start = time.perf_counter()
    step, folder = STEPS[args.step], Path(args.work) / "cache"
    split = "1,0" if step == 1 else "0,1"
    train, _ = create_prompt_dataset(
        0,
        [str(Path(args.file).parent)],
        split,
        folder,
        step,
        1234,
        tokenizer,
        args.max_seq_len,
        preprocessing_num_workers=args.workers,
    )
    seconds = time.perf_counter() - start
    collator = (DataCollatorSFT if step == 1 else DataCollatorReward)(tokenizer.pad_token_id, args.max_seq_len)
    loader = make_loader(train, StepBatchSampler(train.lengths, 16, group_by_length=True), collator)
    next(iter(loader))
    return {
        "seconds": seconds,
        "first_batch_seconds": time.perf_counter() - start,
        "peak_mb": peak_memory_mb(),
        "peak_above_imports_mb": peak_memory_mb() - before,
        "file_mb": sum(file.stat().st_size for file in folder.rglob("*.arrow")) / 1e6,
        "rows": len(train),
    }


def run_bare(args) -> dict:
    """The tokenizers library alone, encoding the same texts in batches and keeping nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer).backend_tokenizer
    names = ("chosen",) if args.step == "sft" else ("chosen", "rejected")
    texts = []
    for line in Path(args.file).read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        texts += [row["prompt"] + row[name] for name in names]
    start = time.perf_counter()
    for begin in range(0, len(texts), 2000):
        tokenizer.encode_batch_fast(texts[begin : begin + 2000])
    return {"seconds": time.perf_counter() - start}


def run_training(args) -> None:
    """Tokens per second of SFT steps on a small Llama, by three ways to make batches of the same rows.

    The ways take turns, so that a change in the machine's load meets all of them.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from utils.data.batching import (
        DataCollatorPacked,
        DataCollatorSFT,
        PackedDataset,
        StepBatchSampler,
        count_batch,
        make_loader,
    )
    from utils.data.preparation import create_prompt_dataset
    from utils.model.inputs import sft_inputs
    from utils.model.losses import LabelLogProbs, causal_lm_loss_sum
    from utils.model.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(args.tokenizer)
    rows, _ = create_prompt_dataset(
        0, [args.pairs], None, Path(args.work) / "cache", 1, 1234, tokenizer, args.max_seq_len
    )
    pad, batch = tokenizer.pad_token_id, 8
    packed = PackedDataset(rows, args.max_seq_len, 1234)
    ways = {
        "padded to the maximum": (rows, DataCollatorSFT(pad, args.max_seq_len, pad_to_max_length=True), False),
        "grouped by length": (rows, DataCollatorSFT(pad, args.max_seq_len), True),
        "packed": (packed, DataCollatorPacked(pad), False),
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8 * (-(-len(tokenizer) // 8)),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=args.max_seq_len,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    label_log_probs = LabelLogProbs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loaders, counts = {}, {name: [0, 0.0] for name in ways}
    for name, (dataset, collator, grouped) in ways.items():
        sampler = StepBatchSampler(dataset.lengths, batch, seed=1, group_by_length=grouped)
        loaders[name] = iter(make_loader(dataset, sampler, collator))
    for step in range(args.steps + 1):
        for name, loader in loaders.items():
            data = next(loader)
            start = time.perf_counter()
            labels, tokens, _ = count_batch(data)
            (causal_lm_loss_sum(label_log_probs, sft_inputs(model, data), data["labels"]) / labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step:  # the first one warms up
                counts[name][0] += tokens
                counts[name][1] += time.perf_counter() - start
    print(f"{model.num_parameters() / 1e6:.0f} M Llama in bf16, {args.steps} steps of {batch} rows or blocks each\n")
    slowest = None
    for name, (tokens, seconds) in counts.items():
        slowest = slowest or tokens / seconds
        print(f"{name:24}{tokens / seconds:8.0f} real tokens/s {tokens / seconds / slowest:6.2f} x")


WAYS = {"published": run_published, "ours": run_ours, "bare": run_bare}


def in_own_process(way: str, args, **changes) -> dict:
    """Run one way in a fresh process and return what it measured."""
    settings = vars(args) | changes | {"way": way}
    command = [sys.executable, __file__]
    for name in ("way", "step", "tokenizer", "max_seq_len", "workers", "file", "work", "pairs", "rows"):
        command += [f"--{name}", str(settings[name])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", required=True, help="jsonl file with prompt, chosen and rejected")
    parser.add_argument("--tokenizer", required=True, help="folder or name of the tokenizer")
    parser.add_argument("--rows", type=int, default=100_000, help="rows to prepare: the file's, repeated")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens of a row")
    parser.add_argument("--workers", type=int, default=2, help="cores our way may use")
    parser.add_argument("--step", choices=STEPS, default="sft", help="rows of step 1 or pairs of step 2")
    parser.add_argument("--skip_published", action="store_true", help="for sizes the published way does not survive")
    parser.add_argument("--train", action="store_true", help="measure training on three kinds of batches instead")
    parser.add_argument("--steps", type=int, default=12, help="with --train: timed steps of each kind")
    parser.add_argument("--output", default=None, help="JSON file for the figures")
    for name in ("way", "file", "work"):
        parser.add_argument(f"--{name}", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(WAYS[args.way](args)))
        return

    work = Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    try:
        if args.train:
            args.work = work
            run_training(args)
            return
        folder = work / "pairs"
        folder.mkdir()
        args.file, args.work = folder / "train.jsonl", work
        repeat_rows(Path(args.pairs), args.rows, args.file)
        shutil.copy(args.pairs, folder / "eval.jsonl")
        results = {} if args.skip_published else {"published": in_own_process("published", args)}
        results["ours"] = in_own_process("ours", args)
        results["ours, second run"] = in_own_process("ours", args)
        results["bare tokenizers"] = in_own_process("bare", args)
    finally:
        shutil.rmtree(work)

    print(f"{args.rows} rows, {args.step}, max_seq_len {args.max_seq_len}, {args.workers} workers\n")
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
    print(f"\nours / bare tokenizers: {ours['seconds'] / results['bare tokenizers']['seconds']:.2f} x the time")
    print(f"second run, first batch after {results['ours, second run']['first_batch_seconds']:.2f} s")
    if "published" in results:
        published = results["published"]
        for key, label in (("seconds", "time"), ("peak_mb", "peak memory"), ("file_mb", "file")):
            print(f"published / ours, {label}: {published[key] / ours[key]:.1f}")
    if args.output:
        Path(args.output).write_text(json.dumps(vars(args) | {"results": results}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
