"""Throughput lines: what one optimizer step cost, in time, floating-point operations and rows.

The operations are those of the matrix products: 2 per multiply-add, weights counted from the model itself, so that
every family is counted right; attention adds 4 * layers * hidden * length per token (scores and their use). A backward
pass costs twice a forward pass; recomputing activations costs one forward more. TFLOPs are per device, Samples/sec
over all devices.
"""

import resource
import sys
import time

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, PreTrainedConfig

from utils.accelerators import device_peak
from utils.model.inputs import unwrap
from utils.module.lora import count_parameters
from utils.process.console import print_classic
from utils.process.world import get_world_size


def get_hf_configs(hf_config):
    """(layers, hidden size, vocabulary size) of a configuration, or of a model or engine that has one."""
    config = getattr(unwrap(hf_config), "config", hf_config).get_text_config()
    return config.num_hidden_layers, config.hidden_size, config.vocab_size


def matmul_parameters(hf_model) -> int:
    """Weights that take part in a matrix product for each token: all but embeddings that are only looked up, and the
    experts of a mixture that a token does not go to."""
    model = unwrap(hf_model)
    _, total = count_parameters(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            weight = module.weight
            if not any(weight is other.weight for other in model.modules() if isinstance(other, torch.nn.Linear)):
                total -= getattr(weight, "ds_numel", weight.numel())
    return total - _idle_experts(model)


def _idle_experts(model) -> int:
    """Weights of experts that a token does not go to."""
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(text, name, None))), 0)
    chosen = getattr(text, "num_experts_per_tok", None) or experts
    if not experts:
        return 0
    weights = sum(getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters() if ".experts." in name)
    return round(weights * (1 - chosen / experts))


def calculate_flops(checkpoint_activations_factor, batch_size, seq_length, hf_config) -> float:
    """Operations for ``batch_size`` rows of ``seq_length`` tokens.

    Args:
        checkpoint_activations_factor: passes: 1 forward, 3 forward and backward, 4 with activations recomputed.
        hf_config: a model or engine, or the configuration of a causal language model.
    """
    layers, hidden_size, _ = get_hf_configs(hf_config)
    model = hf_config
    if isinstance(hf_config, PreTrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
    per_token = 2.0 * matmul_parameters(model) + 4.0 * layers * hidden_size * seq_length / 2
    return checkpoint_activations_factor * batch_size * seq_length * per_token


def _model_flops(hf_model, tokens: float, rows: float, passes: float) -> float:
    return calculate_flops(passes, max(rows, 1), tokens / max(rows, 1), hf_model)


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
    print_classic(f"{said} of {peak / 1e12:,.0f} TFLOPs in {args.dtype} per device")
    return shares


def print_throughput(hf_model, args, e2e_time, rank=None, *, tokens=None, rows=None) -> dict[str, float]:
    """Print (--console classic) and return the throughput of one optimizer step of step 1 or 2.

    Args:
        e2e_time: seconds of the step.
        rank: of the caller, as it knows it; None: this process knows its rank.
        tokens, rows: real tokens (no pads) and sequences of all ranks in this step; None: a micro-batch of every rank,
            each row as long as it may be.
    """
    seconds = e2e_time
    rows = args.per_device_train_batch_size * get_world_size() if rows is None else rows
    tokens = rows * args.max_seq_len if tokens is None else tokens
    passes = 4 if args.gradient_checkpointing else 3
    tflops = _model_flops(hf_model, tokens, rows, passes) / seconds / get_world_size() / 1e12
    print_classic(
        f"Model Parameters: {count_parameters(unwrap(hf_model))[1] / 1e9:.3f} B, Latency: {seconds:.2f}s, "
        f"TFLOPs: {tflops:.2f}, Samples/sec: {rows / seconds:.2f}, Time/seq {seconds / max(rows, 1):.2f}s, "
        f"Batch Size: {rows}, Sequence Length: {tokens / max(rows, 1):.0f}",
        rank,
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
    rows=None,
    prompt_tokens=None,
    answer_tokens=None,
    generate_time=None,
    generated_steps=None,
):
    """Print (--console classic) and return the throughput of one PPO step.

    Args:
        e2e_time, gen_exp_time, train_time: seconds of the whole step, of making experience, of the updates.
        rank: as in ``print_throughput``.
        rows, prompt_tokens, answer_tokens: real counts over all ranks; None: as many as the arguments allow.
        generate_time, generated_steps: seconds in the sampling loop alone, and how many token positions it took.
    """
    world = get_world_size()
    generate_time = generate_time or gen_exp_time
    rows = args.per_device_generation_batch_size * args.generation_batches * world if rows is None else rows
    prompt_tokens = rows * args.max_prompt_seq_len if prompt_tokens is None else prompt_tokens
    answer_tokens = rows * args.max_answer_seq_len if answer_tokens is None else answer_tokens
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
    print_classic(
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
