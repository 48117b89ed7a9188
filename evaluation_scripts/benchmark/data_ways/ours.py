"""Our way to prepare data, up to the first batch."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from measuring import peak_memory_mb, report, settings_of_way

from utils.data.batching import DataCollatorReward, DataCollatorSFT, StepBatchSampler, make_loader
from utils.data.encoding import SFT
from utils.data.preparation import create_prompt_dataset
from utils.model.tokenizer import load_hf_tokenizer


def main():
    settings = settings_of_way()
    tokenizer = load_hf_tokenizer(settings.tokenizer)
    before = peak_memory_mb()
    start = time.perf_counter()
    step, split = (1, "1,0") if settings.step == "sft" else (2, "0,1")
    data, folder = [str(Path(settings.file).parent)], Path(settings.work) / "cache"
    options = {"preprocessing_num_workers": settings.workers, "chat_template": settings.form == "messages"}
    train, _ = create_prompt_dataset(0, data, split, folder, step, 1234, tokenizer, settings.max_seq_len, **options)
    seconds = time.perf_counter() - start
    collator = (DataCollatorSFT if step == SFT else DataCollatorReward)(tokenizer.pad_token_id, settings.max_seq_len)
    loader = make_loader(train, StepBatchSampler(train.lengths, 16, group_by_length=True), collator)
    next(iter(loader))
    report(
        seconds=seconds,
        first_batch_seconds=time.perf_counter() - start,
        peak_mb=peak_memory_mb(),
        peak_above_imports_mb=peak_memory_mb() - before,
        file_mb=sum(file.stat().st_size for file in folder.rglob("*.arrow")) / 1e6,
        rows=len(train),
    )


if __name__ == "__main__":
    main()
