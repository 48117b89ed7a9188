"""Accelerators: what each computes, keeps and moves in a second. The one table that MFU and the planner read.

Figures are those of the makers' data sheets without sparsity, 16-bit products summed in fp32, as training has them
(GeForce cards do that at half of their advertised rate). Where torch may use TF32 for fp32 no peak is known here.
Another accelerator is one line of the table.
"""

import re
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator

PCIE_3, PCIE_4, PCIE_5 = 15.8, 31.5, 63.0  # GB/s in each direction of 16 lanes


@dataclass(frozen=True)
class Accelerator:
    """One device of a kind.

    Attributes:
        name: as ``--gpu`` takes it. pattern: what the driver's name for it says.
        fp16, bf16, fp32: 1e12 operations per second; 0: emulated or unknown.
        memory: GiB, as the driver tells it. bandwidth: GB/s of that memory.
        link: GB/s in one direction to the other devices of a node (NVLink, Infinity Fabric, or PCIe where there is no
            other way). host: GB/s in one direction to the host's memory.
        network: GB/s in one direction, of one device to other nodes, as nodes of this kind are rented in clouds. The
            one figure that is no data sheet's: ``--network`` sets another.
    """

    name: str
    pattern: str
    fp16: float
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    host: float
    network: float

    def peak(self, dtype: str) -> float:
        """Operations per second in ``dtype``; 0: emulated or unknown."""
        return getattr(self, dtype) * 1e12


# The first whose pattern is found in a device's name counts, so that the special case stands before the plain one.
# Devices that the driver names alike stand side by side; how much memory they have tells them apart.
ACCELERATORS = [
    Accelerator("GB300", r"GB300", 2500, 2500, 80, 278, 8000, 900, 450, 50),
    Accelerator("GB200", r"GB200", 2500, 2500, 80, 185, 8000, 900, 450, 50),
    Accelerator("B300", r"B300", 2250, 2250, 75, 268, 8000, 900, PCIE_5, 100),
    Accelerator("B200", r"B200", 2250, 2250, 75, 179, 8000, 900, PCIE_5, 50),
    Accelerator("B100", r"B100", 1750, 1750, 60, 179, 8000, 900, PCIE_5, 50),
    Accelerator("H100-PCIe", r"H100 PCIe", 756, 756, 51, 79.6, 2039, PCIE_5, PCIE_5, 12.5),
    Accelerator("H100-NVL", r"H100 NVL", 835, 835, 60, 93.6, 3938, PCIE_5, PCIE_5, 12.5),
    Accelerator("H200-NVL", r"H200 NVL", 835, 835, 60, 140.4, 4800, 450, PCIE_5, 12.5),
    Accelerator("GH200", r"GH200", 989, 989, 67, 95.6, 4000, 450, 450, 50),
    Accelerator("H100", r"H100", 989, 989, 67, 79.6, 3350, 450, PCIE_5, 50),
    Accelerator("H200", r"H200", 989, 989, 67, 140.4, 4800, 450, PCIE_5, 50),
    Accelerator("H800", r"H800", 989, 989, 67, 79.6, 3350, 200, PCIE_5, 50),
    Accelerator("H20", r"H20", 148, 148, 44, 95.6, 4000, 450, PCIE_5, 50),
    Accelerator("A100-80GB", r"A100", 312, 312, 19.5, 80, 2039, 300, PCIE_4, 25),
    Accelerator("A100-40GB", r"A100", 312, 312, 19.5, 40, 1555, 300, PCIE_4, 25),
    Accelerator("A800", r"A800", 312, 312, 19.5, 80, 2039, 200, PCIE_4, 25),
    Accelerator("A30", r"A30", 165, 165, 10.3, 24, 933, PCIE_4, PCIE_4, 3.1),
    Accelerator("A40", r"A40", 149.7, 149.7, 37.4, 45, 696, PCIE_4, PCIE_4, 3.1),
    Accelerator("A10G", r"A10G", 70, 70, 35, 22.5, 600, PCIE_4, PCIE_4, 1.6),
    Accelerator("A10", r"A10", 125, 125, 31.2, 22.5, 600, PCIE_4, PCIE_4, 1.6),
    Accelerator("L40S", r"L40S", 362, 362, 91.6, 45, 864, PCIE_4, PCIE_4, 6.2),
    Accelerator("L40", r"L40", 181, 181, 90.5, 45, 864, PCIE_4, PCIE_4, 6.2),
    Accelerator("L4", r"L4", 121, 121, 30.3, 22.5, 300, PCIE_4 / 2, PCIE_4 / 2, 1.6),
    Accelerator("RTX-6000-Ada", r"RTX 6000 Ada", 364, 364, 91.1, 48, 960, PCIE_4, PCIE_4, 3.1),
    Accelerator("A6000", r"RTX A6000", 154.8, 154.8, 38.7, 48, 768, PCIE_4, PCIE_4, 3.1),
    Accelerator("A5000", r"RTX A5000", 111.1, 111.1, 27.8, 24, 768, PCIE_4, PCIE_4, 3.1),
    Accelerator("RTX-5090", r"RTX 5090", 209.5, 209.5, 104.8, 32, 1792, PCIE_5, PCIE_5, 1.2),
    Accelerator("RTX-4090", r"RTX 4090", 165.2, 165.2, 82.6, 24, 1008, PCIE_4, PCIE_4, 1.2),
    Accelerator("RTX-3090", r"RTX 3090", 71, 71, 35.6, 24, 936, PCIE_4, PCIE_4, 1.2),
    Accelerator("V100S", r"V100S", 130, 0, 16.4, 32, 1134, PCIE_3, PCIE_3, 1.6),
    Accelerator("V100-PCIe", r"V100.PCIE", 112, 0, 14, 32, 900, PCIE_3, PCIE_3, 1.6),
    Accelerator("V100-32GB", r"V100", 125, 0, 15.7, 32, 900, 150, PCIE_3, 1.6),
    Accelerator("V100-16GB", r"V100", 125, 0, 15.7, 16, 900, 150, PCIE_3, 1.6),
    Accelerator("T4", r"T4", 65, 0, 8.1, 15, 320, PCIE_3, PCIE_3, 1.6),
    Accelerator("P100-PCIe", r"P100.PCIE", 18.7, 0, 9.3, 16, 732, PCIE_3, PCIE_3, 1.6),
    Accelerator("P100", r"P100", 21.2, 0, 10.6, 16, 732, 80, PCIE_3, 1.6),
    Accelerator("MI355X", r"MI355X", 2517, 2517, 157.3, 288, 8000, 537, PCIE_5, 50),
    Accelerator("MI325X", r"MI325X", 1307, 1307, 163.4, 256, 6000, 448, PCIE_5, 50),
    Accelerator("MI300X", r"MI300X", 1307, 1307, 163.4, 192, 5300, 448, PCIE_5, 50),
    Accelerator("MI250X", r"MI250X", 191.5, 191.5, 47.9, 64, 1638, 100, PCIE_4, 12.5),  # one of its two dies: a device
    Accelerator("MI210", r"MI2[15]0", 181, 181, 45.3, 64, 1638, 100, PCIE_4, 12.5),
    Accelerator("MI100", r"MI100", 184.6, 92.3, 46.1, 32, 1229, 138, PCIE_4, 12.5),
]


def accelerator_of(name: str, memory: float | None = None) -> Accelerator | None:
    """The row of a device; None where there is none, and for a slice of a GPU.

    Args:
        name: as the driver gives it, "NVIDIA H100 80GB HBM3" say.
        memory: GiB of the device, to tell those of one name apart; None: the largest.
    """
    if " MIG " in name:
        return None

    def fits(pattern: str) -> bool:
        return re.search(rf"\b{pattern}(?![A-Za-z0-9])(?! (?:D|Ti|SUPER|Laptop)\b)", name) is not None

    first = next((row for row in ACCELERATORS if fits(row.pattern)), None)
    if first is None or memory is None:
        return first
    alike = [row for row in ACCELERATORS if row.pattern == first.pattern]
    return min(alike, key=lambda row: abs(row.memory - memory))


def peak_of(name: str, dtype: str) -> float | None:
    """Operations per second of a device with that name; None where they are not known.

    Args:
        name: as the driver gives it. dtype: fp16, bf16 or fp32.
    """
    found = accelerator_of(name)
    return None if found is None else found.peak(dtype) or None


def device_peak(dtype: str | None) -> float | None:
    """As ``peak_of``, of the accelerator that this process computes on; None on a CPU, and of no precision."""
    if get_accelerator().device_name() != "cuda" or dtype is None:  # ROCm's devices have that name too
        return None
    if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return None
    return peak_of(torch.cuda.get_device_name(), dtype)
