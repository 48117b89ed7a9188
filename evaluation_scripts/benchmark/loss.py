#!/usr/bin/env python
"""Peak memory and time of one SFT micro-batch (forward and backward), by the way its loss is computed.

    python evaluation_scripts/benchmark/loss.py --batch 8 --length 512

The model is a Llama of SmolLM2-135M's shape with random weights in bf16 and gradient checkpointing. Each way runs in
a process of its own, because peak memory is that of a process. "labels" is what the steps do; "whole" has the model's
whole logits and upcasts them at once; "chunks" has the whole logits in bf16 and upcasts them in chunks.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from utils.model.losses import LabelLogProbs, causal_lm_loss_sum, gather_log_probs

WAYS = ("decoder", "whole", "chunks", "labels")


def build(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def loss_of(way, model, ids):
    inputs = {"input_ids": ids, "use_cache": False}
    if way == "decoder":  # all but head and loss, to compare with
        return model.base_model(**inputs).last_hidden_state.float().mean()
    if way == "labels":
        return causal_lm_loss_sum(LabelLogProbs(model), inputs, ids)
    logits = model(**inputs).logits
    if way == "whole":
        return F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return -gather_log_probs(logits[:, :-1], ids[:, 1:]).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model")
    parser.add_argument("--way", choices=WAYS, help="run one way only; default: each in turn")
    args = parser.parse_args()
    if args.way is None:
        print(f"{args.batch} x {args.length} tokens        peak memory   seconds", flush=True)
        for way in WAYS:
            sizes = [f"--{name}={getattr(args, name)}" for name in ("batch", "length", "layers")]
            subprocess.run([sys.executable, __file__, "--way", way, *sizes], check=True)
        return
    model = build(args.layers)
    ids = torch.randint(0, 49152, (args.batch, args.length))
    loss_of(args.way, model, ids[:1, :16]).backward()  # warms up, and makes the gradients
    start = time.perf_counter()
    loss_of(args.way, model, ids).backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.way:24}{peak:8.2f} GiB{seconds:10.1f}", flush=True)


if __name__ == "__main__":
    main()
