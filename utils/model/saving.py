"""Saving: a folder that stands alone, written so that a kill leaves the old files or the new ones."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file

from utils.distributed import UserError, agree, barrier, get_rank
from utils.module.lora import LinearLayer_LoRA

MAX_SHARD_SIZE = "5GB"


@torch.no_grad()
def gather_state_dict(module) -> dict[str, torch.Tensor]:
    """The whole state dict in host memory, on rank 0; every rank must call this, the others get an empty dict.

    ZeRO-3 parameters are gathered one submodule at a time. LoRA layers come out as the plain weight with the update
    folded in. Tied weights appear under each of their names with one storage.
    """
    collected: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}  # id of a parameter -> its copy, so that tied names share one
    wanted = module.state_dict().keys()
    for prefix, part in module.named_modules(remove_duplicate=False):
        own = dict(part.named_parameters(recurse=False))
        sharded = [param for param in own.values() if hasattr(param, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            if get_rank() != 0:
                continue
            for name, param in own.items():
                if name in ("lora_right_weight", "lora_left_weight"):
                    continue
                if id(param) not in copies:
                    folds = isinstance(part, LinearLayer_LoRA) and name == "weight"
                    value = part.folded_weight() if folds else param.detach()
                    copies[id(param)] = value.to("cpu", copy=True).contiguous()
                collected[f"{prefix}.{name}" if prefix else name] = copies[id(param)]
        for name, buffer in part.named_buffers(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            if full_name in wanted and get_rank() == 0:
                collected[full_name] = buffer.detach().to("cpu", copy=True)
    return collected


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(folder: Path, replaces=("model*.safetensors", "model*.safetensors.index.json")):
    """A scratch folder whose files move into ``folder`` one by one when the block ends well, and vanish otherwise.

    Within one file system a move replaces a file in one step. The weights' index moves last; then files of an earlier
    save that match ``replaces`` and are not of this one go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        files = sorted(scratch.rglob("*"), key=lambda path: path.name.endswith(".index.json"))
        for path in files:
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
                target = folder / path.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        kept = {path.name for path in files}
        for pattern in replaces:  # a loader would prefer a whole file to shards, or an old index to new ones
            for stale in folder.glob(pattern):
                if stale.name not in kept:
                    stale.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_weights(state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """One safetensors file; tied names are stored once, under the first of them."""
    unique = {id(value): (name, value) for name, value in reversed(state_dict.items())}
    with atomic_folder(folder) as scratch:
        save_file(dict(unique.values()), scratch / "model.safetensors", metadata={"format": "pt"})


def _align_special_tokens(config, tokenizer) -> None:
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id


def save_pretrained_model(model, tokenizer, folder: Path) -> None:
    """Write config, generation config, safetensors and the full tokenizer to ``folder``; every rank must call this.

    ``model`` is a Hugging Face model, or a RewardModel, which becomes a sequence-classification model with one label.
    """
    state_dict = gather_state_dict(model)

    def write() -> None:
        if get_rank() != 0:
            return
        try:
            with atomic_folder(folder) as scratch:
                target, weights = model.for_saving(state_dict) if hasattr(model, "for_saving") else (model, state_dict)
                _align_special_tokens(target.config, tokenizer)
                if target.can_generate():
                    _align_special_tokens(target.generation_config, tokenizer)
                target.save_pretrained(scratch, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
                tokenizer.save_pretrained(scratch)
        except OSError as error:
            raise UserError(f"could not save the model to {folder}: {error}") from error

    agree(write)
    barrier()
