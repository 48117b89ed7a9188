"""Which precision a machine computes in: the one decision for training, chat, evaluation and the dry run.

CPU with AMX or AVX512-BF16, ARM with bf16     bf16   (chat and evaluation: fp32, since single tokens gain little)
any other CPU                                  fp32   16 bits are emulated there, at a fraction of its speed
CUDA GPU of compute capability 8 and above     bf16
older CUDA GPU (V100, T4 ...)                  fp16   bf16 is emulated there, too
any other accelerator                          bf16 if it says that it has it, else fp16, else fp32
"""

import platform
import time
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from utils.ds_utils import TORCH_DTYPES

BF16_CAPABILITY = 8  # of CUDA GPUs that multiply in bf16
SLOW = 0.7  # of fp32's speed: below it a 16-bit precision is a loss on this machine
TRIAL = 128  # rows and columns of the matrices that are multiplied for a trial
TRIAL_SECONDS = 0.1


class Choice(NamedTuple):
    dtype: str  # of TORCH_DTYPES
    reason: str


def default_dtype(device_type: str | None = None) -> Choice:
    """The precision to train in on a kind of device, with the reason in words.

    Args:
        device_type: as torch names it; None for that of DeepSpeed's accelerator.
    """
    device_type = device_type or get_accelerator().device_name()
    if device_type == "cpu":
        if cpu_has_bf16():
            return Choice("bf16", "this processor multiplies in bf16")
        return Choice("fp32", "this processor only emulates bf16, at a fraction of its speed in fp32")
    if device_type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()}, compute capability {'.'.join(map(str, capability))}"
        if capability[0] >= BF16_CAPABILITY:
            return Choice("bf16", f"{name}, multiplies in bf16")
        return Choice("fp16", f"{name}, has fp16 and only emulates bf16")
    accelerator = get_accelerator()
    if accelerator.is_bf16_supported():
        return Choice("bf16", f"{device_type} has bf16")
    return Choice(
        *(("fp16", f"{device_type} has no bf16") if accelerator.is_fp16_supported() else ("fp32", "no 16 bits"))
    )


def cpu_has_bf16() -> bool:
    """Whether the processor itself multiplies in bf16; oneDNN also counts those on which it emulates it."""
    if not _onednn_has_bf16():
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _onednn_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def inference_dtype(device: torch.device) -> torch.dtype:
    """The precision to answer and to score in."""
    return torch.float32 if device.type == "cpu" else TORCH_DTYPES[default_dtype(device.type).dtype]


def speed_against_fp32(dtype: str) -> float:
    """How fast small products of matrices are on this CPU, as a multiple of fp32's speed; takes about a tenth of a
    second."""
    return _products_per_second(TORCH_DTYPES[dtype]) / _products_per_second(torch.float32)


def _products_per_second(dtype: torch.dtype) -> float:
    matrix = torch.ones(TRIAL, TRIAL, dtype=dtype)
    matrix @ matrix  # the first one also sets things up
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < TRIAL_SECONDS / 2:
        matrix @ matrix
        count += 1
    return max(count, 1) / seconds


def warning_of(dtype: str, device_type: str) -> str | None:
    """What to say to somebody who asks for a precision that the CPU is slow in; None where it is not."""
    if device_type != "cpu" or dtype == "fp32" or dtype == default_dtype("cpu").dtype:
        return None
    ratio = speed_against_fp32(dtype)
    if ratio >= SLOW:
        return None
    return f"--dtype {dtype}: this processor multiplies {1 / ratio:.0f} times faster in fp32 (measured just now)"
