"""Adapters on disk, in PEFT's published format: adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from utils.model.loading import load_config
from utils.model.reward_model import SCORE_SCALE
from utils.model.saving import LORA_FACTORS, gathered_by_zero, save_on_rank_0, write_readme
from utils.module.lora import LinearLayer_LoRA, lora_layers
from utils.process.errors import UserError
from utils.process.world import get_rank

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."  # PEFT's, before the names of the model's own class
# What training set in the model's configuration, as JSON in the metadata of the weights: merge_lora sets it too.
CHANGED_CONFIG = "changed_config"


def adapter_config(path) -> dict | None:
    """The configuration of a folder that holds an adapter without its model; None for whole models and names.

    Raises:
        UserError: a configuration that is broken.
    """
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{file} names no peft_type")
    return config


def base_model_reference(model_name_or_path) -> str:
    """How an adapter names its base model: a folder by its absolute path, a model of the hub by its name."""
    folder = Path(model_name_or_path)
    return str(folder.resolve()) if folder.is_dir() else model_name_or_path


def save_lora_adapter(
    model,
    tokenizer,
    base_model_name_or_path: str,
    folder: Path,
    trust_remote_code=False,
    readme: str | None = None,
    gather=gathered_by_zero,
) -> None:
    """Write the LoRA factors, what trained beside them and the tokenizer to ``folder``; every rank must call this.

    ``peft`` loads it onto the base model, and inference/merge_lora.py folds it in. A reward model's adapter is that of
    a sequence-classification model, with the value head in it.

    Args:
        base_model_name_or_path: what the model was made from.
        readme: the text of README.md, on rank 0; None for none.
        gather: a context manager of some weights, in which they are whole.
    """
    target, rename = model.for_saving() if hasattr(model, "for_saving") else (model, lambda name: name)
    base_config = load_config(base_model_name_or_path, trust_remote_code)
    whole = _whole_weights(model, base_config.get_text_config().vocab_size)
    tensors = _copied_factors(model, gather) | _copied(whole, gather)
    tensors = {KEY_PREFIX + rename(name): tensor for name, tensor in tensors.items()}
    config = _peft_config(model, target, rename, whole, base_model_reference(base_model_name_or_path))
    changed = {key: getattr(target.config, key, None) for key in SCORE_SCALE}
    changed |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    changed = json.dumps({key: value for key, value in changed.items() if value is not None})

    def write(scratch: Path) -> None:
        save_file(tensors, scratch / ADAPTER_WEIGHTS, metadata={"format": "pt", CHANGED_CONFIG: changed})
        (scratch / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(scratch)
        write_readme(scratch, readme)

    save_on_rank_0(folder, "adapter", write, replaces=())


def _copied(weights: dict[str, torch.Tensor], gather) -> dict[str, torch.Tensor]:
    """Whole copies in host memory on rank 0, one gathered at a time; {} elsewhere. Every rank must call this."""
    copies = {}
    for name, weight in weights.items():
        with gather([weight]):
            if get_rank() == 0:
                copies[name] = weight.detach().to("cpu", copy=True)
    return copies


def _copied_factors(model, gather) -> dict[str, torch.Tensor]:
    """LoRA's factors by PEFT's names, A [r, in] and B [out, r], as ``_copied``."""
    right = {f"{name}.lora_A.weight": layer.lora_right_weight for name, layer in lora_layers(model)}
    left = {f"{name}.lora_B.weight": layer.lora_left_weight for name, layer in lora_layers(model)}
    return {name: factor.T.contiguous() for name, factor in _copied(right | left, gather).items()}


def _whole_weights(model, base_rows: int) -> dict[str, torch.nn.Parameter]:
    """What an adapter holds beside LoRA: trained weights (a value head), and embeddings that grew for new tokens.

    Args:
        base_rows: of the base model's embedding.
    """
    whole = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(LORA_FACTORS)}
    if model.config.get_text_config().vocab_size != base_rows:
        grown = [model.get_input_embeddings(), model.get_output_embeddings()]
        for name, module in model.named_modules():
            if module in grown:
                prefix = f"{name}.base_layer" if isinstance(module, LinearLayer_LoRA) else name
                own = module.named_parameters(recurse=False)
                whole |= {f"{prefix}.{part}": p for part, p in own if part not in LORA_FACTORS}
    return whole


def _peft_config(model, target, rename, whole: dict[str, torch.nn.Parameter], base_model: str) -> dict:
    """Settings of PEFT's LoraConfig for a model's layers.

    Args:
        target, rename: the model whose class is saved, and our names of weights to its own.
        whole: weights that the adapter holds beside LoRA.
    """
    layers = lora_layers(model)
    settings = {(layer.lora_dim, layer.lora_alpha, layer.lora_dropout.p) for _, layer in layers}
    if len(settings) != 1:
        raise UserError(f"an adapter has one rank, scaling and dropout; the model's layers have {sorted(settings)}")
    [(lora_dim, lora_alpha, lora_dropout)] = settings
    trained = {name.rpartition(".")[0] for name, weight in whole.items() if weight.requires_grad}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if target is model else "SEQ_CLS",
        "base_model_name_or_path": base_model,
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


def _shortest_targets(names: list[str], all_names: list[str]) -> list[str]:
    """Last parts of names where they say as much as the names (q_proj), else the whole names."""
    last_parts = {name.rpartition(".")[2] for name in names}
    covered = {name for name in all_names if name.rpartition(".")[2] in last_parts}
    return sorted(last_parts if covered == set(names) else names)
