"""The published way to prepare data: one row at a time, padded to the maximum, kept in a list, saved by torch."""

import json
import time
from pathlib import Path

import torch
from measuring import columns_of, peak_memory_mb, report, settings_of_way
from transformers import AutoTokenizer


def main():
    settings = settings_of_way()
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    before = peak_memory_mb()
    start = time.perf_counter()
    rows = [json.loads(line) for line in Path(settings.file).read_text(encoding="utf-8").split("\n")[:-1]]
    kept = []
    for row in rows:
        for name in columns_of(settings):
            text = row["prompt"] + row[name] + tokenizer.eos_token
            tokens = tokenizer(
                text, max_length=settings.max_seq_len, padding="max_length", truncation=True, return_tensors="pt"
            )
            kept.append({key: value.squeeze(0) for key, value in tokens.items()})
    file = Path(settings.work) / "published.pt"
    torch.save(kept, file)
    report(
        seconds=time.perf_counter() - start,
        peak_mb=peak_memory_mb(),
        peak_above_imports_mb=peak_memory_mb() - before,
        file_mb=file.stat().st_size / 1e6,
    )


if __name__ == "__main__":
    main()
