"""What a model's forward is given: only arguments that it has, with positions from the mask."""

import inspect

import torch


def unwrap(model):
    """The module inside a DeepSpeed engine; a plain module as it is."""
    return model.module if hasattr(model, "module") else model


def forward_accepts(model, name: str) -> bool:
    """Whether forward has a parameter of that name of its own (Bloom, say, takes no position_ids)."""
    return name in inspect.signature(model.forward).parameters


def cache_argument(model) -> str:
    """What the forward pass calls its KV cache: transformers 5.24 gave it another name in nearly all families."""
    return "cache" if forward_accepts(model, "cache") else "past_key_values"


def embedding_rows(model) -> int:
    """Rows of the input embedding, also where ZeRO-3 has sharded it."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def embedding_width(model) -> int:
    """Columns of the input embedding, which a projection may make narrower than the hidden size (OPT-350m)."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[1]


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, length] -> [batch, length]: 0 at a row's first real token, however many pads stand before it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def model_inputs(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
    """Keyword arguments for scoring or training on [batch, length] ids with pads on either side."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if forward_accepts(model, "position_ids"):
        inputs["position_ids"] = position_ids_from_mask(attention_mask)
    return inputs


def _allowed_within_rows(batch: dict) -> torch.Tensor:
    """[batch, length, length]: whether a position (last) may be seen from another: of the same row, and not later."""
    segments, length = batch["segment_ids"], batch["segment_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (segments.unsqueeze(2) == segments.unsqueeze(1)) & causal


def _additive(model, allowed: torch.Tensor) -> torch.Tensor:
    """[batch, 1, length, length] in the model's dtype, 0 or its lowest number: what SDPA and eager attention add."""
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(model.dtype).min).unsqueeze(1)


def _no_mask(_model, _batch: dict) -> None:
    """Families that make their masks with transformers' utilities find the rows in the positions."""


def _one_mask(model, batch: dict) -> torch.Tensor:
    return _additive(model, _allowed_within_rows(batch))


def _mask_of_each_type(model, batch: dict) -> dict[str, torch.Tensor]:
    """A mask for each type of layer, for families that take a table of them."""
    config, allowed = model.config.get_text_config(), _allowed_within_rows(batch)
    masks = {"full_attention": _additive(model, allowed)}
    if "sliding_attention" in config.layer_types:
        places = torch.arange(allowed.shape[1], device=allowed.device)
        near = places.unsqueeze(1) - places < config.sliding_window
        masks["sliding_attention"] = _additive(model, allowed & near)
    return masks


# How the rows of a block can be kept apart -> the attention mask for it. Which of them a family honours is found by
# trying (utils/model/packing.py): most find the rows in positions, for windowed layers too, whose windows one mask for
# all layers would undo.
PACKING_WAYS = {"positions": _no_mask, "masks by layer type": _mask_of_each_type, "one mask": _one_mask}


def packing_ways(model) -> list[str]:
    """Those of PACKING_WAYS that mean something to a model."""
    if _has_flash_attention(model):
        return ["positions"]
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    is_known = bool(types) and types <= {"full_attention", "sliding_attention"}
    return [way for way in PACKING_WAYS if is_known or way != "masks by layer type"]


def _has_flash_attention(model) -> bool:
    return "flash" in str(model.config._attn_implementation)


def packed_inputs(model, batch: dict, way: str = "one mask") -> dict:
    """Keyword arguments for a packed batch: each row of a block attends to itself alone, at positions of its own.

    Args:
        batch: {input_ids, segment_ids, position_ids}, [batch, length]; segment 0 is padding.
        way: one of PACKING_WAYS.

    FlashAttention is given no mask and one long row instead: it finds the rows' borders in the positions (its varlen
    form).
    """
    names = [name for name in ("input_ids", "position_ids") if forward_accepts(model, name)]
    if _has_flash_attention(model):
        return {**{name: batch[name].reshape(1, -1) for name in names}, "use_cache": False}
    mask = PACKING_WAYS[way](model, batch)
    inputs = {name: batch[name] for name in names} | {"use_cache": False}
    return inputs if mask is None else inputs | {"attention_mask": mask}


def sft_inputs(model, batch: dict, packing: str = "one mask") -> dict:
    """Keyword arguments for a batch of step 1, packed (in one of PACKING_WAYS) or not."""
    if "segment_ids" in batch:
        return packed_inputs(model, batch, packing)
    return model_inputs(model, batch["input_ids"], batch["attention_mask"])
