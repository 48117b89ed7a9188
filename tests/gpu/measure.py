"""What ``check.py`` measures itself, beside the runs of the steps: python tests/gpu/measure.py WHAT.

Each measurement ends with a line ``figures {...}``. With TINY=1 sizes are for a CPU. The environment variable WORK
names the folder where models and data are.
"""

import functools
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import utils.model.losses as losses
from utils.accelerators import peak_of
from utils.generation.sampling import CompiledStep, Decoding, generate_by_transformers, sample_answers
from utils.model.inputs import model_inputs
from utils.perf import matmul_parameters

TINY = os.environ.get("TINY") == "1"
WORK = Path(os.environ.get("WORK", "output/gpu_check/work"))
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
VOCABULARY = 512 if TINY else 49152
BOS, EOS, PAD = range(3)
SHAPES = {  # 1.4 and 0.4 billion parameters
    "actor": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32),
    "critic": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16),
}
if TINY:
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    SHAPES = {"actor": small, "critic": small}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = (
    *("torch", "transformers", "deepspeed", "accelerate", "datasets", "numpy", "safetensors", "triton"),
    *("bitsandbytes", "flash_attn", "peft", "vllm"),
)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def seconds_of(action, repeats: int = 5, warmup: int = 2) -> float:
    """The median of several calls, each with the device's queue drained before and after."""
    for _ in range(warmup):
        action()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(**figures) -> None:
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()}
    print("figures", json.dumps(rounded), flush=True)


def peak_gib() -> dict[str, float]:
    return {"GiB": torch.cuda.max_memory_allocated() / 2**30} if ON_GPU else {}


# ---------------------------------------------------------------- the machine


def versions() -> None:
    """Packages, driver and devices."""
    found: dict[str, str | int | float] = {"device": platform.processor() or platform.machine()}
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory GiB"] = properties.total_memory / 2**30
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["CUDA"] = str(torch.version.cuda or torch.version.hip)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else "RCCL"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            found["driver"] = done.stdout.split("\n")[0]
    found |= {"GPUs": torch.cuda.device_count(), "cores": len(os.sched_getaffinity(0))}
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    report(**found)


def copy_bytes_per_second() -> float:
    """Bytes that are read or written in a second by a large copy on the device."""
    source = torch.zeros(2**26 if TINY else 2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 10)


def ceilings() -> None:
    """What the memory and the products of matrices reach at best, and the share of the maker's figure."""
    figures = {"copy TB/s": copy_bytes_per_second() / 1e12}
    width = 256 if TINY else 8192
    for name, dtype in DTYPES.items():
        one = torch.randn(width, width, device=DEVICE).to(dtype)
        other = torch.randn_like(one)
        flops = 2 * width**3 / seconds_of(functools.partial(torch.matmul, one, other), 10)
        figures[f"{name} TFLOPs"] = flops / 1e12
        peak = peak_of(torch.cuda.get_device_name(), name) if ON_GPU else None
        if peak is not None:
            figures[f"{name} of its peak"] = flops / peak
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        figures["context GiB"] = (total - free - torch.cuda.memory_reserved()) / 2**30
    report(**figures)


# ---------------------------------------------------------------- models and data of the bench


def models() -> None:
    """Random weights from the device to the disk, a tokenizer of whole words, rows of exact lengths."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", bos_token="<s>")
    torch.manual_seed(0)
    figures = {}
    for name, model_class in (("actor", LlamaForCausalLM), ("critic", LlamaForSequenceClassification)):
        config = LlamaConfig(
            **SHAPES[name],
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
            num_labels=1,
            dtype="bfloat16",
        )
        with DEVICE:
            model = model_class(config).to(torch.bfloat16)
        model.save_pretrained(WORK / name)
        tokenizer.save_pretrained(WORK / name)
        figures[f"{name} parameters"] = model.num_parameters()
        del model
    devices = max(1, torch.cuda.device_count())
    length, half = (64, 16) if TINY else (2048, 256)
    write_rows("sft", rows=12 * 8 * devices, prompt=8, answer=length - 12)
    write_rows("ppo", rows=5 * 32 * devices, prompt=half - 4, answer=4)
    report(**figures)


def write_rows(folder: str, rows: int, prompt: int, answer: int) -> None:
    """Pairs of random words, so many in each prompt and answer."""
    generator = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(words))

    (WORK / folder).mkdir(exist_ok=True)
    for split, count in (("train", rows), ("eval", 8)):
        with open(WORK / folder / f"{split}.jsonl", "w") as out:
            for _ in range(count):
                row = {"prompt": text(prompt), "chosen": " " + text(answer), "rejected": " " + text(4)}
                out.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- decoding and scoring


def load_actor():
    return AutoModelForCausalLM.from_pretrained(WORK / "actor", dtype=torch.bfloat16).to(DEVICE)


def decode(way: str) -> None:
    """Milliseconds per token at batch 1, 8 and 64; the limit is reading the weights once for each token."""
    model = load_actor().eval()
    prompt, answer = (8, 8) if TINY else (256, 64)
    decoding = Decoding(answer, eos_token_ids=(), pad_token_id=PAD, vocabulary=VOCABULARY)
    compiled = CompiledStep(model, prompt + answer, "eager" if TINY else "inductor") if way == "compiled" else None
    limit = 2 * matmul_parameters(model) / copy_bytes_per_second()
    figures = {"limit ms": limit * 1e3}
    for batch in (1, 8, 64):
        ids = torch.randint(3, VOCABULARY, (batch, prompt), device=DEVICE)
        mask = torch.ones_like(ids)
        mask[1::2, : prompt // 8] = 0  # left pads
        ids[mask == 0] = PAD

        def generate(ids=ids, mask=mask):
            if way == "generate":
                return generate_by_transformers(model, ids, mask, decoding)
            return sample_answers(model, ids, mask, decoding, compiled=compiled)

        seconds = seconds_of(generate, repeats=3, warmup=2) / answer
        figures |= {f"batch {batch} ms/token": seconds * 1e3, f"batch {batch} of the limit": limit / seconds}
    report(**figures, **host_reads(generate, answer), **peak_gib())


def host_reads(generate, tokens: int) -> dict[str, float]:
    """How often a token makes the host wait for the device, and how many kernels it launches."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as recorded:
        generate()
        synchronize()
    counts = {event.key: event.count / tokens for event in recorded.key_averages()}
    launches = sum(counts.get(name, 0) for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel"))
    figures = {"values read by the host per token": counts.get("aten::_local_scalar_dense", 0.0)}
    return figures | ({"launches per token": launches} if ON_GPU else {})


def scoring() -> None:
    """Seconds of the loss, forward and backward, by the size of its chunks; against a whole softmax in fp32."""
    model = load_actor()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    rows, length = (2, 32) if TINY else (8, 2048)
    ids = torch.randint(3, VOCABULARY, (rows, length), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[::2, length * 3 // 4 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    scorer = losses.LabelLogProbs(model)
    inputs = model_inputs(model, ids, mask)

    def step():
        model.zero_grad()
        loss = losses.causal_lm_loss_sum(scorer, inputs, labels) / labels.numel()
        loss.backward()
        return loss

    def with_chunks(size: int) -> float:
        setattr(losses, setting, size)
        return seconds_of(step, repeats=3, warmup=1)

    setting = "GPU_CHUNK_BYTES" if ON_GPU else "CHUNK_BYTES"
    own, figures = getattr(losses, setting), {}
    for exponent in (14, 20) if TINY else (26, 27, 28, 29, 30, 31):
        figures[f"2^{exponent} s"] = with_chunks(2**exponent)
    setattr(losses, setting, own)
    figures |= {"as it is s": seconds_of(step, repeats=3, warmup=1), "loss": step().item()}
    with torch.no_grad():
        first = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        ours, _ = scorer(first, labels[:1])
        logits = model(**first).logits[0, :-1].float()
        whole = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[: len(ours), 0]
    difference = (ours - whole).abs().max().item()
    if difference > 1e-2:
        sys.exit(f"error: log-probs differ from those of a whole softmax by {difference}")
    report(**figures, **{"differs from a whole softmax by": difference}, **peak_gib())


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    measurements = (versions, ceilings, models, decode, scoring)
    {function.__name__: function for function in measurements}[what](*arguments)
