"""Token losses, always in fp32 whatever the model's dtype."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
TOKENS_PER_CHUNK = 2048  # rows of logits upcast at a time


def _chunk_loss(logits, labels):
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def causal_lm_loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of -log p(label) over all labels that are not -100, each predicted from the position before.

    Args:
        logits: [batch, length, vocabulary] in any dtype; labels: [batch, length].

    The logits are upcast in chunks that are recomputed in the backward pass, so no whole fp32 copy ever exists.
    """
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = logits.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(logits.split(TOKENS_PER_CHUNK), labels.split(TOKENS_PER_CHUNK), strict=True):
        if part.requires_grad:
            total = total + checkpoint(_chunk_loss, part, wanted, use_reentrant=False)
        else:
            total = total + _chunk_loss(part, wanted)
    return total


def label_count(labels: torch.Tensor) -> int:
    """How many terms ``causal_lm_loss_sum`` has."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
