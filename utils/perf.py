"""Throughput lines: what one optimizer step cost, in time, floating-point operations and rows.

The operations are those of the matrix products: 2 per multiply-add, weights counted from the model itself, so that
every family is counted right; attention adds 4 * layers * hidden * length per token (scores and their use). A backward
pass costs twice a forward pass; recomputing activations costs one forward more. TFLOPs are per device, Samples/sec
over all devices.

MFU is the share of the accelerator's peak (``peak_flops.py``) that went into the model: its operations counted once,
since recomputing is no work of the model, and without the gradients of frozen weights, which nobody computes.
"""

import resource
import sys
import time

import torch
from deepspeed.accelerator import get_accelerator

from utils.model.inputs import unwrap
from utils.module.lora import count_parameters
from utils.peak_flops import device_peak
from utils.process.console import print_rank_0
from utils.process.world import get_world_size


def get_hf_configs(hf_model):
    """(layers, hidden size, vocabulary size) of a Hugging Face model or a RewardModel."""
    config = unwrap(hf_model).config.get_text_config()
    return config.num_hidden_layers, config.hidden_size, config.vocab_size


def matmul_parameters(hf_model) -> int:
    """Weights that take part in a matrix product for every token: all but embeddings that are only looked up."""
    model = unwrap(hf_model)
    _, total = count_parameters(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            weight = module.weight
            if not any(weight is other.weight for other in model.modules() if isinstance(other, torch.nn.Linear)):
                total -= getattr(weight, "ds_numel", weight.numel())
    return total


def calculate_flops(
    parameters: int, layers: int, hidden_size: int, tokens: int, mean_length: float, passes: int
) -> float:
    """Operations for ``tokens`` tokens in rows of ``mean_length``.

    Args:
        parameters: see ``matmul_parameters``.
        passes: 1 forward, 3 forward and backward, 4 with activations recomputed.
    """
    return passes * tokens * (2.0 * parameters + 4.0 * layers * hidden_size * mean_length / 2)


def _model_flops(hf_model, tokens: float, rows: float, passes: float) -> float:
    layers, hidden_size, _ = get_hf_configs(hf_model)
    return calculate_flops(matmul_parameters(hf_model), layers, hidden_size, tokens, tokens / max(rows, 1), passes)


def _useful_passes(hf_model) -> float:
    """3 for forward and backward, less the share of weights that are frozen: there the gradient stops at the input."""
    trained, total = count_parameters(unwrap(hf_model))
    return 2 + trained / total


def _utilization(args, **flops_per_second: float) -> dict[str, float]:
    """The same names with shares of the device's peak, and a line that says them; {} where no peak is known."""
    peak = device_peak(getattr(args, "dtype", None))  # scripts of others may have no such flag
    if peak is None:
        return {}
    shares = {name: value / peak for name, value in flops_per_second.items()}
    said = ", ".join(f"{name.replace('mfu', 'MFU').replace('_', ' ')} {share:.1%}" for name, share in shares.items())
    print_rank_0(f"{said} of {peak / 1e12:,.0f} TFLOPs in {args.dtype} per device")
    return shares


def print_throughput(hf_model, args, seconds: float, tokens: int, rows: int) -> dict[str, float]:
    """Print and return the throughput of one optimizer step of step 1 or 2.

    Args:
        tokens, rows: real tokens (no pads) and sequences of all ranks in this step.
    """
    passes = 4 if args.gradient_checkpointing else 3
    tflops = _model_flops(hf_model, tokens, rows, passes) / seconds / get_world_size() / 1e12
    print_rank_0(
        f"Model Parameters: {count_parameters(unwrap(hf_model))[1] / 1e9:.3f} B, Latency: {seconds:.2f}s, "
        f"TFLOPs: {tflops:.2f}, Samples/sec: {rows / seconds:.2f}, Time/seq {seconds / max(rows, 1):.2f}s, "
        f"Batch Size: {rows}, Sequence Length: {tokens / max(rows, 1):.0f}"
    )
    useful = _model_flops(hf_model, tokens, rows, _useful_passes(hf_model)) / seconds / get_world_size()
    return {
        "seconds": seconds,
        "tflops": tflops,
        **_utilization(args, mfu=useful),
        "samples_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
        "memory_gib": peak_memory() / 2**30,
    }


def print_throughput_step3(
    actor_model,
    critic_model,
    args,
    e2e_time,
    gen_exp_time,
    train_time,
    rank=None,
    *,
    rows,
    prompt_tokens,
    answer_tokens,
    generate_time=None,
    generated_steps=None,
):
    """Print and return the throughput of one PPO step.

    Args:
        e2e_time, gen_exp_time, train_time: seconds of the whole step, of making experience, of the updates.
        rows, prompt_tokens, answer_tokens: real counts over all ranks.
        generate_time, generated_steps: seconds in the sampling loop alone, and how many token positions it took.
    """
    world = get_world_size()
    generate_time = generate_time or gen_exp_time
    tokens, length = prompt_tokens + answer_tokens, args.max_prompt_seq_len + args.max_answer_seq_len
    actor, critic = (
        count_parameters(unwrap(model))[1] if model is not None else 0 for model in (actor_model, critic_model)
    )
    generation = _model_flops(actor_model, tokens, rows, 1)
    passes = (4 if args.actor_gradient_checkpointing else 3) * args.ppo_epochs
    training = _model_flops(actor_model, tokens, rows, passes)
    useful = _model_flops(actor_model, tokens, rows, _useful_passes(actor_model) * args.ppo_epochs)
    if critic_model is not None:
        useful += _model_flops(critic_model, tokens, rows, _useful_passes(critic_model) * args.ppo_epochs)
        passes = (4 if args.critic_gradient_checkpointing else 3) * args.ppo_epochs
        training += _model_flops(critic_model, tokens, rows, passes)
    bytes_per_parameter = 4 if args.dtype == "fp32" else 2
    steps = generated_steps or args.max_answer_seq_len
    figures = {
        "samples_per_second": rows / e2e_time,
        "tokens_per_second": answer_tokens / e2e_time,
        "generation_tflops": generation / generate_time / world / 1e12,
        "training_tflops": training / train_time / world / 1e12,
        "tflops": (generation + training) / e2e_time / world / 1e12,
        "token_latency_ms": generate_time / steps * 1e3,
        "bandwidth_gb_per_second": actor * bytes_per_parameter * steps / generate_time / 1e9,
        "memory_gib": peak_memory() / 2**30,
    }
    print_rank_0(
        f"End-to-End => Latency: {e2e_time:.2f}s, TFLOPs: {figures['tflops']:.2f}, "
        f"Samples/sec: {figures['samples_per_second']:.2f}, Time/seq {e2e_time / rows:.2f}s, Batch Size: {rows}, "
        f"Total Seq. Length: {length}\n"
        f"Generation => Latency: {generate_time:.2f}s, Per-token Latency {figures['token_latency_ms']:.2f} ms, "
        f"TFLOPs: {figures['generation_tflops']:.2f}, BW: {figures['bandwidth_gb_per_second']:.2f} GB/sec, "
        f"Answer Seq. Length: {args.max_answer_seq_len}\n"
        f"Training   => Latency: {train_time:.2f}s, TFLOPs: {figures['training_tflops']:.2f}\n"
        f"Actor Model Parameters => {actor / 1e9:.3f} B, Critic Model Parameters => {critic / 1e9:.3f} B",
        rank,
    )
    return figures | _utilization(
        args, mfu=(generation + useful) / e2e_time / world, training_mfu=useful / train_time / world
    )


def peak_memory() -> int:
    """Bytes of this rank at their highest so far: on the accelerator, or of the process where there is none."""
    if get_accelerator().device_name() != "cpu":
        return get_accelerator().max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pace(tokens: float, seconds: float) -> str:
    """What a progress bar says of the last step."""
    return f"{tokens / seconds:,.0f} tokens/s, {peak_memory() / 2**30:.1f} GiB"


class Stopwatch:
    """Wall-clock seconds between laps, with the accelerator's queue drained first."""

    def __init__(self):
        self.lap()

    def lap(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self._last = now - getattr(self, "_last", now), now
        return seconds
