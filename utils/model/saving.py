"""Saving: a folder that stands alone, written so that a kill leaves the old files or the new ones.

Weights go to disk layer by layer. Names, shapes and places in the files are settled first, from shapes alone; then each
layer is gathered (ZeRO-3), folded (LoRA) and written to its place. So no rank ever holds more than one layer beside
its own shards, whatever the size of the model and of the files.
"""

import copy
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import deepspeed
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from utils.model.shards import MAX_SHARD_SIZE, open_shards
from utils.model.tokenizer import keep_end_tokens
from utils.module.lora import LinearLayer_LoRA
from utils.process.errors import UserError
from utils.process.files import flush_to_disk, locked_file, remove_left_over
from utils.process.host_memory import memory_given_back
from utils.process.ranks import agree, barrier
from utils.process.world import get_rank, get_world_size

SCRATCH_LOCK = ".lock"
# What a loader would take for a part of the model that is saved now: other weights, or an adapter over another base.
EARLIER_MODEL = ("model*.safetensors", "model*.safetensors.index.json", "adapter_config.json", "adapter_model.*")
LORA_FACTORS = ("lora_right_weight", "lora_left_weight")


def _weights(module) -> dict[str, torch.Tensor]:
    """Every parameter and saved buffer by name, as it lies in the module; LoRA's factors belong to their layer."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    names = [name for name in module.state_dict() if name in tensors and not name.endswith(LORA_FACTORS)]
    return {name: tensors[name] for name in names}


def _layer_of(name: str) -> str:
    """The numbered block that a weight belongs to, or its own module outside the blocks."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def _folds(module, name: str) -> bool:
    """Whether the weight takes the update of a LoRA layer."""
    part, _, own_name = name.rpartition(".")
    return own_name == "weight" and isinstance(module.get_submodule(part), LinearLayer_LoRA)


def gathered_by_zero(weights):
    """Weights that ZeRO-3 has sharded are whole while this is open; every rank must open it."""
    sharded = [weight for weight in weights if hasattr(weight, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded))


@torch.no_grad()
def gathered_layers(module, names, on_all_ranks: bool = False, gather=None) -> Iterator[dict[str, torch.Tensor]]:
    """The named weights in full, LoRA folded in, one layer at a time; every rank must go through all of them.

    Rank 0 gets {name: tensor} on whatever device the weight is, valid until the next layer; the others get the same
    ``on_all_ranks``, else {}.

    Args:
        gather: a context manager of some weights, in which they are whole; None: as ZeRO-3 gathers them.
    """
    gather = gather or gathered_by_zero
    weights, layers = _weights(module), {}
    for name in names:
        layers.setdefault(_layer_of(name), []).append(name)
    for members in layers.values():
        parts = dict.fromkeys(module.get_submodule(n.rpartition(".")[0]) for n in members if _folds(module, n))
        involved = [weights[name] for name in members]
        involved += [factor for part in parts for factor in (part.lora_right_weight, part.lora_left_weight)]
        with gather(involved):
            layer = {}
            if on_all_ranks or get_rank() == 0:
                for name in members:
                    part = module.get_submodule(name.rpartition(".")[0])
                    layer[name] = part.folded_weight() if _folds(module, name) else weights[name].detach()
            yield layer


@dataclass
class SavingPlan:
    """What a model's files will hold, known before any weight is gathered."""

    target: torch.nn.Module  # the model whose class and configuration are saved
    renamed: dict[str, str]  # weight of the module -> its name in the target
    stored: dict[str, torch.Tensor]  # name in the files -> a meta tensor
    num_parameters: int
    other_names: dict[str, list[str]]  # weight of the module -> further names in the target that are tied to it

    def convert(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of the target, some layers of it, under the names and in the shapes that files have."""
        if not isinstance(self.target, PreTrainedModel):
            return weights
        # Without the names that an old checkpoint was loaded from: at every ZeRO stage files have the family's own.
        fresh = copy.copy(self.target)
        fresh.__dict__.pop("_weight_conversions", None)
        return revert_weight_conversion(fresh, weights)


def plan_saving(module) -> SavingPlan:
    """Decide names, shapes and dtypes as transformers' save_pretrained does: tied weights once, and no buffer twice."""
    target, rename = module.for_saving() if hasattr(module, "for_saving") else (module, lambda name: name)
    tied = set(getattr(module, "all_tied_weights_keys", None) or {})
    ignored = getattr(target, "_keys_to_ignore_on_save", None) or ()
    weights, holders = _weights(module), {}
    for name, weight in weights.items():
        holders.setdefault(id(weight), []).append(name)
    saved = {next((name for name in names if name not in tied), names[-1]) for names in holders.values()}
    renamed = {name: rename(name) for name in weights if name in saved and rename(name) not in ignored}
    other_names = {
        name: [rename(other) for other in holders[id(weights[name])] if other != name and rename(other) not in ignored]
        for name in renamed
    }
    shape_of = {name: getattr(weights[name], "ds_shape", weights[name].shape) for name in renamed}
    plan = SavingPlan(target, renamed, {}, 0, other_names)
    plan.stored = plan.convert(
        {new: torch.empty(shape_of[old], dtype=weights[old].dtype, device="meta") for old, new in renamed.items()}
    )
    parameters = [name for name in renamed if isinstance(weights[name], torch.nn.Parameter)]
    plan.num_parameters = sum(torch.Size(shape_of[name]).numel() for name in parameters)
    return plan


def published_weights(module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight in full as a saved model has it, LoRA folded in, one layer gathered at a time; on every rank.

    A tied weight comes under each of its names, though files hold it once: who copies weights elsewhere need not know
    what is tied. Each tensor is valid until the next one is asked for; every rank must go through all of them.
    """
    plan = plan_saving(module)
    for layer in gathered_layers(module, plan.renamed, on_all_ranks=True):
        yield from plan.convert({plan.renamed[name]: weight for name, weight in layer.items()}).items()
        for name, weight in layer.items():
            for other in plan.other_names[name]:
                yield from plan.convert({other: weight}).items()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(folder: Path, what: str = "model", replaces=EARLIER_MODEL):
    """A scratch folder whose files move into ``folder`` one by one when the block ends well, and vanish otherwise.

    Within one file system a move replaces a file in one step. The weights' index moves last; then files of an earlier
    save that match ``replaces`` and are not of this one go. So do scratch folders that killed processes left.

    Raises:
        UserError: what the disk refuses, in the block too; it says that ``what`` could not be saved.
    """
    scratch = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".saving-*"):
            remove_left_over(left / SCRATCH_LOCK, partial(shutil.rmtree, left, ignore_errors=True))
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        with locked_file(scratch / SCRATCH_LOCK):
            yield scratch
            _move_files(scratch, folder, replaces)
    except OSError as error:
        raise UserError(f"could not save the {what} to {folder}: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _move_files(scratch: Path, folder: Path, replaces) -> None:
    files = [file for file in scratch.rglob("*") if file.is_file() and file.name != SCRATCH_LOCK]
    for file in sorted(files, key=lambda file: file.name.endswith(".index.json")):
        file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        flush_to_disk(file)
        target = folder / file.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    moved = {file.name for file in files}
    for pattern in replaces:  # a loader would prefer a whole file to shards, or an old index to new ones
        for stale in folder.glob(pattern):
            if stale.name not in moved:
                stale.unlink()


def save_on_rank_0(folder: Path, what: str, write: Callable[[Path], None], replaces=EARLIER_MODEL) -> None:
    """Let rank 0 write files to an ``atomic_folder``; its UserError reaches all ranks. Every rank must call this."""

    def write_on_rank_0() -> None:
        if get_rank() == 0:
            with atomic_folder(folder, what, replaces) as scratch:
                write(scratch)

    agree(write_on_rank_0)
    barrier()


def is_sharded(module) -> bool:
    """Whether ZeRO-3 keeps parts of the weights on other ranks: all of them must then take part in saving."""
    return get_world_size() > 1 and any(hasattr(weight, "ds_id") for weight in module.parameters())


def _save(module, folder: Path, max_shard_size, write_rest=lambda *_: None, alone=False, gather=None) -> None:
    """Weights and, by ``write_rest`` on rank 0, the files that belong to them; every rank must call this.

    Args:
        alone: rank 0 waits for no other rank, and need not be called by any; not for sharded weights.
    """
    plan = plan_saving(module)
    layers = gathered_layers(module, plan.renamed, gather=gather)
    shards = plan.stored, max_shard_size or MAX_SHARD_SIZE

    def write() -> None:
        if get_rank() == 0:
            with atomic_folder(folder) as scratch:
                with open_shards(scratch, *shards, total_parameters=plan.num_parameters) as write_weight:
                    for layer in layers:
                        weights = plan.convert({plan.renamed[name]: value for name, value in layer.items()})
                        for name, value in weights.items():
                            write_weight(name, value)
                write_rest(plan.target, scratch)

    def write_and_gather() -> None:
        """Each layer is gathered by all ranks: by those that write nothing, and by rank 0 after a failure too."""
        try:
            write()
        except UserError:
            deque(layers, maxlen=0)
            raise
        deque(layers, maxlen=0)

    with memory_given_back():
        if alone:
            write()
            return
        agree(write_and_gather)
    barrier()


def write_readme(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / "README.md").write_text(text, encoding="utf-8")


def save_weights(module, folder: Path, max_shard_size: int | str | None = None, *, alone: bool = False) -> None:
    """The weights, without configuration and tokenizer; every rank must call this unless rank 0 saves ``alone``."""
    _save(module, folder, max_shard_size or MAX_SHARD_SIZE, alone=alone)


def _align_special_tokens(config, tokenizer) -> None:
    config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id


def save_pretrained_model(
    model,
    tokenizer,
    folder: Path,
    max_shard_size: int | str | None = None,
    readme: str | None = None,
    *,
    alone: bool = False,
    gather=None,
) -> None:
    """Write config, generation config, safetensors and the full tokenizer to ``folder``; every rank must call this.

    ``model`` is a Hugging Face model, or a RewardModel, which becomes a sequence-classification model with one label.

    Args:
        max_shard_size: bytes, or text as in "5GB"; a larger model is written in several files with an index.
        readme: the text of README.md, on rank 0; None for none.
        alone: rank 0 saves and no other rank need call this; of weights that ZeRO-3 has sharded all but these.
        gather: see ``gathered_layers``.
    """

    def write_rest(target, scratch: Path) -> None:
        _align_special_tokens(target.config, tokenizer)
        target.config.eos_token_id = tokenizer.eos_token_id
        if target.can_generate():
            keep_end_tokens(target, tokenizer)
            _align_special_tokens(target.generation_config, tokenizer)
        with tempfile.TemporaryDirectory(dir=scratch) as aside:  # the files that go with weights, without weights
            target.save_pretrained(aside, state_dict={})
            for file in Path(aside).iterdir():
                if not file.name.endswith(".safetensors"):
                    file.rename(scratch / file.name)
        tokenizer.save_pretrained(scratch)
        write_readme(scratch, readme)

    if alone and is_sharded(model):
        if get_rank() == 0:
            with atomic_folder(folder, replaces=()) as scratch:
                write_rest(plan_saving(model).target, scratch)
        return
    _save(model, folder, max_shard_size or MAX_SHARD_SIZE, write_rest, alone, gather)
