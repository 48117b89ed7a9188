"""The peak of an accelerator: floating-point operations per second in dense products of matrices, by precision.

Figures are those of the makers' data sheets without sparsity, 16-bit products summed in fp32, as training has them
(GeForce cards do that at half of their advertised rate). Where torch may use TF32 for fp32 no peak is known here.
"""

import re

import torch
from deepspeed.accelerator import get_accelerator

# What the device's name says -> 1e12 operations per second in fp16, bf16, fp32 (0: emulated or unknown); the first that
# is found counts, so that the special case of a name stands before the plain one.
PEAKS: dict[str, tuple[float, float, float]] = {
    r"GB[23]00": (2500, 2500, 80),
    r"B[23]00": (2250, 2250, 75),
    r"B100": (1750, 1750, 60),
    r"H100 PCIe": (756, 756, 51),
    r"H[12]00 NVL": (835, 835, 60),
    r"(H100|H200|H800|GH200)": (989, 989, 67),
    r"H20": (148, 148, 44),
    r"A[18]00": (312, 312, 19.5),
    r"A30": (165, 165, 10.3),
    r"A40": (149.7, 149.7, 37.4),
    r"A10G": (70, 70, 35),
    r"A10": (125, 125, 31.2),
    r"L40S": (362, 362, 91.6),
    r"L40": (181, 181, 90.5),
    r"L4": (121, 121, 30.3),
    r"RTX 6000 Ada": (364, 364, 91.1),
    r"RTX A6000": (154.8, 154.8, 38.7),
    r"RTX A5000": (111.1, 111.1, 27.8),
    r"RTX 5090": (209.5, 209.5, 104.8),
    r"RTX 4090": (165.2, 165.2, 82.6),
    r"RTX 3090": (71, 71, 35.6),
    r"V100S": (130, 0, 16.4),
    r"V100.PCIE": (112, 0, 14),
    r"V100": (125, 0, 15.7),
    r"T4": (65, 0, 8.1),
    r"P100.PCIE": (18.7, 0, 9.3),
    r"P100": (21.2, 0, 10.6),
    r"MI355X": (2517, 2517, 157.3),
    r"(MI300X|MI325X)": (1307, 1307, 163.4),
    r"MI250X": (191.5, 191.5, 47.9),  # one of its two dies: each is a device
    r"MI2[15]0": (181, 181, 45.3),
    r"MI100": (184.6, 92.3, 46.1),
}
COLUMNS = ("fp16", "bf16", "fp32")


def peak_of(name: str, dtype: str) -> float | None:
    """Operations per second of a device with that name; None where they are not known.

    Args:
        name: as the driver gives it, "NVIDIA H100 80GB HBM3" say. dtype: fp16, bf16 or fp32.
    """
    if " MIG " in name:  # a slice of a GPU
        return None
    for pattern, peaks in PEAKS.items():
        if re.search(rf"\b{pattern}(?![A-Za-z0-9])(?! (?:D|Ti|SUPER|Laptop)\b)", name):
            return peaks[COLUMNS.index(dtype)] * 1e12 or None
    return None


def device_peak(dtype: str | None) -> float | None:
    """As ``peak_of``, of the accelerator that this process computes on; None on a CPU, and of no precision."""
    if get_accelerator().device_name() != "cuda" or dtype is None:  # ROCm's devices have that name too
        return None
    if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return None
    return peak_of(torch.cuda.get_device_name(), dtype)
