"""Frozen weights packed in 4 or 8 bits, for QLoRA (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314).

    W [out, in] ── pack ──> codes and a scale per block of 64 (nf4) or per row (int8)
    x W^T  =  x (unpack codes)^T, unpacked for one product at a time, forward and backward

Packing to nf4 is that of the package ``bitsandbytes``. The product is a plain one with the unpacked matrix, so that
training, evaluation and every device compute alike (its own int8 product also rounds the activations in evaluation).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

INT8_MAX = 127


def _functional():
    import bitsandbytes.functional

    return bitsandbytes.functional


@dataclass(frozen=True)
class Packing:
    """How weights are packed.

    Args:
        kind: "nf4" (codes at the quantiles of a normal distribution, blocks of 64) or "int8" (127 steps, rows).
        double: nf4 only: pack the scales too, in 8 bits, blocks of 256.
        compute_dtype: of the products.
    """

    kind: str
    double: bool
    compute_dtype: torch.dtype


def packed_size(packing: Packing, rows: int, columns: int) -> int:
    """Bytes of a packed matrix [rows, columns], codes and scales.

    nf4: half a byte each and an fp32 scale per 64, or with ``double`` a byte per 64 and an fp32 scale per 256 of those
    (QLoRA, https://arxiv.org/abs/2305.14314, section 3). int8: a byte each and an fp32 scale per row.
    """
    weights = rows * columns
    if packing.kind == "int8":
        return weights + 4 * rows
    blocks = math.ceil(weights / 64)
    return math.ceil(weights / 2) + (blocks + 4 * math.ceil(blocks / 256) if packing.double else 4 * blocks)


class PackedWeight(nn.Module):
    """A matrix [out, in] in packed form.

    The scales are no buffers: casting a model to bf16 must not touch them.
    """

    def __init__(self, weight: torch.Tensor, packing: Packing):
        super().__init__()
        self.packing = packing
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().contiguous()
        if packing.kind == "nf4":
            codes, self.scales = _functional().quantize_4bit(
                weight, quant_type="nf4", compress_statistics=packing.double
            )
            self.scales.dtype = packing.compute_dtype  # what unpacking gives
        elif packing.kind == "int8":
            # Not its own function, which rounds to fp16 first: a bf16 weight may overflow there.
            self.scales = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            codes = (weight.float() * (INT8_MAX / self.scales)).round().to(torch.int8)
        else:
            raise ValueError(f"the kind of packing must be nf4 or int8, not {packing.kind!r}")
        self.register_buffer("codes", codes, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        moved = self.scales.to(self.codes.device)  # a QuantState moves in place and returns nothing
        self.scales = self.scales if moved is None else moved
        return self

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return packed_size(self.packing, self.out_features, self.in_features)

    def unpacked(self) -> torch.Tensor:
        """[out, in] in the compute dtype."""
        if self.packing.kind == "nf4":
            return _functional().dequantize_4bit(self.codes, self.scales)
        return (self.codes * (self.scales / INT8_MAX)).to(self.packing.compute_dtype)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [.., in] -> [.., out] in x's dtype, computed in the compute dtype. The bias [out] is frozen too."""
        dtype = self.packing.compute_dtype
        return _Product.apply(x.to(dtype), self, None if bias is None else bias.to(dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T + b that keeps neither x (W is frozen) nor the unpacked W for the backward pass."""

    @staticmethod
    def forward(ctx, x, packed: PackedWeight, bias):
        ctx.packed = packed
        return F.linear(x, packed.unpacked(), bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.packed.unpacked(), None, None


def packed_weights(model) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def describe_packing(model) -> str:
    """How much memory the packed weights of a model take."""
    packed = packed_weights(model)
    weights, size = sum(part.numel for part in packed), sum(part.nbytes for part in packed)
    kind = packed[0].packing.kind
    return (
        f"quantised to {kind}: {len(packed)} matrices, {weights:,} weights in {size / 1e6:.1f} MB "
        f"({8 * size / weights:.2f} bits each; {2 * weights / 1e6:.1f} MB in 16 bits)"
    )
