"""What a model's forward is given: positions from the mask, and only arguments it knows."""

import inspect

import torch


def forward_accepts(model, name: str) -> bool:
    """Whether forward has a parameter of that name of its own (Bloom, say, takes no position_ids)."""
    return name in inspect.signature(model.forward).parameters


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, length] -> [batch, length]: 0 at a row's first real token, however many pads stand before it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def model_inputs(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
    """Keyword arguments for scoring or training on [batch, length] ids with pads on either side."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if forward_accepts(model, "position_ids"):
        inputs["position_ids"] = position_ids_from_mask(attention_mask)
    return inputs
