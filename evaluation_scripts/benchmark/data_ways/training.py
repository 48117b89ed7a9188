"""Tokens per second of SFT steps on a small Llama, by three ways to make batches of the same rows."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from measuring import settings_of_way
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
from utils.model.packing import choose_packing
from utils.model.tokenizer import load_hf_tokenizer

BATCH = 8


def make_loaders(settings, tokenizer) -> dict:
    """Way -> an iterator of its batches."""
    length, pad = settings.max_seq_len, tokenizer.pad_token_id
    cache = Path(settings.work) / "cache"
    rows, _ = create_prompt_dataset(0, [settings.pairs], None, cache, 1, 1234, tokenizer, length)
    ways = {
        "padded to the maximum": (rows, DataCollatorSFT(pad, length, pad_to_max_length=True), False),
        "grouped by length": (rows, DataCollatorSFT(pad, length), True),
        "packed": (PackedDataset(rows, length, 1234), DataCollatorPacked(pad), False),
    }
    return {
        name: iter(make_loader(data, StepBatchSampler(data.lengths, BATCH, seed=1, group_by_length=grouped), collator))
        for name, (data, collator, grouped) in ways.items()
    }


def make_model(vocab_size: int, length: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8 * (-(-vocab_size // 8)),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def main():
    settings = settings_of_way()
    tokenizer = load_hf_tokenizer(settings.tokenizer)
    loaders = make_loaders(settings, tokenizer)
    model = make_model(len(tokenizer), settings.max_seq_len)
    label_log_probs = LabelLogProbs(model)
    packing = choose_packing(label_log_probs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    counts = {name: [0, 0.0] for name in loaders}  # way -> [real tokens, seconds]
    for step in range(settings.steps + 1):
        for name, loader in loaders.items():  # in turns, so that a change in the machine's load meets all of them
            data = next(loader)
            start = time.perf_counter()
            labels, tokens, _ = count_batch(data)
            (causal_lm_loss_sum(label_log_probs, sft_inputs(model, data, packing), data["labels"]) / labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step:  # the first one warms up
                counts[name][0] += tokens
                counts[name][1] += time.perf_counter() - start
    millions = model.num_parameters() / 1e6
    print(f"{millions:.0f} M Llama in bf16, {settings.steps} steps of {BATCH} rows or blocks each\n")
    slowest = None
    for name, (tokens, seconds) in counts.items():
        slowest = slowest or tokens / seconds
        print(f"{name:24}{tokens / seconds:8.0f} real tokens/s {tokens / seconds / slowest:6.2f} x")


if __name__ == "__main__":
    main()
