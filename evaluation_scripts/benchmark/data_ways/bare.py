"""The tokenizers library alone: the same texts in batches, nothing kept. No way can be faster."""

import json
import time
from pathlib import Path

from measuring import columns_of, report, settings_of_way
from transformers import AutoTokenizer


def main():
    settings = settings_of_way()
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer).backend_tokenizer
    texts = []
    for line in Path(settings.file).read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        texts += [row["prompt"] + row[name] for name in columns_of(settings)]
    start = time.perf_counter()
    for begin in range(0, len(texts), 2000):
        tokenizer.encode_batch_fast(texts[begin : begin + 2000])
    report(seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
