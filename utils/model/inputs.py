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


def packed_inputs(model, batch: dict) -> dict:
    """Keyword arguments for a packed batch: each row of a block attends to itself alone, at positions of its own.

    Args:
        batch: {input_ids, segment_ids, position_ids}, [batch, length]; segment 0 is padding.

    The mask is additive, [batch, 1, length, length] in the model's dtype: what SDPA and eager attention take
    alike. FlashAttention is given no mask and one long row instead: it finds the rows' borders in the positions (its
    varlen form).
    """
    segments, length = batch["segment_ids"], batch["segment_ids"].shape[1]
    if model.config._attn_implementation == "flash_attention_2":
        flat = {name: batch[name].reshape(1, -1) for name in ("input_ids", "position_ids")}
        return {**flat, "use_cache": False}
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = (segments.unsqueeze(2) == segments.unsqueeze(1)) & causal
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=segments.device)
    mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": mask.unsqueeze(1),
        "use_cache": False,
    }


def sft_inputs(model, batch: dict) -> dict:
    """Keyword arguments for a batch of step 1, packed or not."""
    if "segment_ids" in batch:
        return packed_inputs(model, batch)
    return model_inputs(model, batch["input_ids"], batch["attention_mask"])
