"""LoRA adapters on disk, in PEFT's published format: adapter_config.json and adapter_model.safetensors."""

import json
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file

from utils.model.loading import load_config
from utils.model.saving import LORA_FACTORS, atomic_folder
from utils.module.lora import LinearLayer_LoRA, lora_layers
from utils.process.errors import UserError
from utils.process.ranks import agree, barrier
from utils.process.world import get_rank

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."  # PEFT's, before the names of the model's own class
SCORE_SCALE = ("reward_score_mean", "reward_score_std")
# What training set in the model's configuration, as JSON in the metadata of the weights: merge_lora sets it too.
CHANGED_CONFIG = "changed_config"


def _copied(*weights) -> list[torch.Tensor]:
    """Whole copies in host memory on rank 0; [] elsewhere. Every rank must call this."""
    sharded = [weight for weight in weights if hasattr(weight, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        return [weight.detach().to("cpu", copy=True) for weight in weights] if get_rank() == 0 else []


def _held_whole(model, base_rows: int) -> dict[str, torch.nn.Parameter]:
    """What an adapter holds beside LoRA: trained weights (a value head), and embeddings that grew for new tokens."""
    whole = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(LORA_FACTORS)}
    if model.config.get_text_config().vocab_size != base_rows:
        grown = [model.get_input_embeddings(), model.get_output_embeddings()]
        for name, module in model.named_modules():
            if module in grown:
                prefix = f"{name}.base_layer" if isinstance(module, LinearLayer_LoRA) else name
                own = module.named_parameters(recurse=False)
                whole |= {f"{prefix}.{part}": p for part, p in own if part not in LORA_FACTORS}
    return whole


def _shortest_targets(names: list[str], all_names: list[str]) -> list[str]:
    """Last parts of names where they say as much as the names (q_proj), else the whole names."""
    last_parts = {name.rpartition(".")[2] for name in names}
    covered = {name for name in all_names if name.rpartition(".")[2] in last_parts}
    return sorted(last_parts if covered == set(names) else names)


def save_lora_adapter(model, tokenizer, base_model_name_or_path: str, folder: Path, trust_remote_code=False) -> None:
    """Write the LoRA factors, what trained beside them and the tokenizer to ``folder``; every rank must call this.

    ``peft`` loads it onto the base model, and inference/merge_lora.py folds it in. A reward model's adapter is that of
    a sequence-classification model, with the value head in it.

    Args:
        base_model_name_or_path: what the model was made from.
    """
    target, rename = model.for_saving() if hasattr(model, "for_saving") else (model, lambda name: name)
    layers, tensors = lora_layers(model), {}
    for name, layer in layers:
        for factor in _copied(layer.lora_right_weight):
            tensors[rename(f"{name}.lora_A.weight")] = factor.T.contiguous()
        for factor in _copied(layer.lora_left_weight):
            tensors[rename(f"{name}.lora_B.weight")] = factor.T.contiguous()
    base_config = load_config(base_model_name_or_path, trust_remote_code)
    whole = _held_whole(model, base_config.get_text_config().vocab_size)
    for name, weight in whole.items():
        for copied in _copied(weight):
            tensors[rename(name)] = copied
    settings = {(layer.lora_dim, layer.lora_alpha, layer.lora_dropout.p) for _, layer in layers}
    if len(settings) != 1:
        raise UserError(f"an adapter has one rank, scaling and dropout; the model's layers have {sorted(settings)}")
    [(lora_dim, lora_alpha, lora_dropout)] = settings
    is_reward = target is not model
    trained = {name.rpartition(".")[0] for name, weight in whole.items() if weight.requires_grad}
    base = Path(base_model_name_or_path)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()) if base.is_dir() else base_model_name_or_path,
        "r": lora_dim,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": _shortest_targets(
            [rename(name) for name, _ in layers], [name for name, _ in target.named_modules()]
        ),
        "modules_to_save": sorted(rename(f"{name}.weight").split(".")[-2] for name in trained) or None,
        "fan_in_fan_out": any(layer.transposed for _, layer in layers),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    changed = {key: getattr(target.config, key, None) for key in SCORE_SCALE}
    changed |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    changed = json.dumps({key: value for key, value in changed.items() if value is not None})
    metadata = {"format": "pt", CHANGED_CONFIG: changed}

    def write() -> None:
        if get_rank() != 0:
            return
        try:
            with atomic_folder(folder, replaces=()) as scratch:
                save_file({KEY_PREFIX + n: t for n, t in tensors.items()}, scratch / WEIGHTS_FILE, metadata=metadata)
                (scratch / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
                tokenizer.save_pretrained(scratch)
        except OSError as error:
            raise UserError(f"could not save the adapter to {folder}: {error}") from error

    agree(write)
    barrier()
