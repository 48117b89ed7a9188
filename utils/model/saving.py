"""Saving: a folder that stands alone, written so that a kill leaves the old files or the new ones.

Weights go to disk layer by layer. Names, shapes and places in the files are settled first, from shapes alone; then each
layer is gathered (ZeRO-3), folded (LoRA) and written to its place. So no rank ever holds more than one layer beside
its own shards, whatever the size of the model and of the files.
"""

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import str_to_torch_dtype

from utils.module.lora import LinearLayer_LoRA
from utils.process.errors import UserError
from utils.process.files import flush_to_disk, locked_file, remove_left_over
from utils.process.host_memory import memory_given_back
from utils.process.ranks import agree, barrier
from utils.process.world import get_rank

MAX_SHARD_SIZE = "5GB"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}
LORA_FACTORS = ("lora_right_weight", "lora_left_weight")


def _weights(module) -> dict[str, torch.Tensor]:
    """Every parameter and saved buffer by name, as it lies in the module; LoRA's factors belong to their layer."""
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return {name: held[name] for name in module.state_dict() if name in held and not name.endswith(LORA_FACTORS)}


def _layer_of(name: str) -> str:
    """The numbered block that a weight belongs to, or its own module outside the blocks."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def _folds(module, name: str) -> bool:
    """Whether the weight takes the update of a LoRA layer."""
    part, _, own_name = name.rpartition(".")
    return own_name == "weight" and isinstance(module.get_submodule(part), LinearLayer_LoRA)


@torch.no_grad()
def gathered_layers(module, names) -> Iterator[dict[str, torch.Tensor]]:
    """The named weights in full, LoRA folded in, one layer at a time; every rank must go through all of them.

    Rank 0 gets {name: tensor} on whatever device the weight is, valid until the next layer; the others get {}.
    """
    weights, layers = _weights(module), {}
    for name in names:
        layers.setdefault(_layer_of(name), []).append(name)
    for members in layers.values():
        parts = {module.get_submodule(name.rpartition(".")[0]) for name in members if _folds(module, name)}
        involved = [weights[name] for name in members]
        involved += [factor for part in parts for factor in (part.lora_right_weight, part.lora_left_weight)]
        sharded = [weight for weight in involved if hasattr(weight, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            layer = {}
            if get_rank() == 0:
                for name in members:
                    part = module.get_submodule(name.rpartition(".")[0])
                    layer[name] = part.folded_weight() if _folds(module, name) else weights[name].detach()
            yield layer


def gather_state_dict(module) -> dict[str, torch.Tensor]:
    """The whole state dict in host memory, on rank 0; every rank must call this, the others get an empty dict.

    LoRA layers come out as the plain weight with the update folded in.
    """
    collected = {}
    for layer in gathered_layers(module, _weights(module)):
        collected |= {name: value.to("cpu", copy=True).contiguous() for name, value in layer.items()}
    return collected


class SafetensorsWriter:
    """A safetensors file whose header is written first and whose tensors follow in any order.

    Args:
        tensors: {name: tensor on any device, meta too}: shapes and dtypes of all that the file will hold.
    """

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]):
        header, end, self._start = {"__metadata__": {"format": "pt"}}, 0, {}
        # The order of the safetensors library, which keeps every tensor aligned.
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self._start[name] = start, tensor.shape, tensor.dtype
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data = self._file.tell()
        self._file.truncate(self._data + end)

    def write(self, name: str, value: torch.Tensor) -> None:
        start, shape, dtype = self._start.pop(name)
        if (value.shape, value.dtype) != (shape, dtype):
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, announced as {dtype} {tuple(shape)}")
        self._file.seek(self._data + start)
        self._file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def close(self) -> None:
        self._file.close()

    @property
    def left(self) -> list[str]:
        """Names announced and not written."""
        return list(self._start)


@dataclass
class SavingPlan:
    """What a model's files will hold, known before any weight is gathered."""

    target: torch.nn.Module  # the model whose class and configuration are saved
    renamed: dict[str, str]  # weight of the module -> its name in the target
    stored: dict[str, torch.Tensor]  # name in the files -> a meta tensor
    num_parameters: int

    def convert(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of the target, some layers of it, under the names and in the shapes that files have."""
        if not isinstance(self.target, PreTrainedModel):
            return weights
        # What loading remembered of an old checkpoint's names is left out: all stages write the family's own names.
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
    kept = {next((name for name in names if name not in tied), names[-1]) for names in holders.values()}
    renamed = {name: rename(name) for name in weights if name in kept and rename(name) not in ignored}
    shape_of = {name: getattr(weights[name], "ds_shape", weights[name].shape) for name in renamed}
    plan = SavingPlan(target, renamed, {}, 0)
    plan.stored = plan.convert(
        {new: torch.empty(shape_of[old], dtype=weights[old].dtype, device="meta") for old, new in renamed.items()}
    )
    parameters = [name for name in renamed if isinstance(weights[name], torch.nn.Parameter)]
    plan.num_parameters = sum(torch.Size(shape_of[name]).numel() for name in parameters)
    return plan


def _write_shards(module, plan: SavingPlan, folder: Path, max_shard_size: int | str) -> None:
    """Weights into model.safetensors, or into shards and an index as transformers writes them; on every rank."""
    split = split_torch_state_dict_into_shards(
        plan.stored, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    failure = None
    with ExitStack() as stack:
        writers = {}
        if get_rank() == 0:
            try:
                for file, names in split.filename_to_tensors.items():
                    writer = SafetensorsWriter(folder / file, {name: plan.stored[name] for name in names})
                    stack.callback(writer.close)
                    writers |= dict.fromkeys(names, writer)
            except OSError as error:
                failure = error
        for layer in gathered_layers(module, plan.renamed):  # to the end also after a failure: the others gather on
            if failure is None and layer:
                try:
                    for name, value in plan.convert({plan.renamed[old]: full for old, full in layer.items()}).items():
                        writers[name].write(name, value)
                except OSError as error:
                    failure = error
    if failure is not None:
        raise failure
    left = [name for writer in set(writers.values()) for name in writer.left]
    if left:
        raise RuntimeError(f"announced and never written: {', '.join(left[:8])}")
    if get_rank() == 0 and split.is_sharded:
        index = {
            "metadata": {"total_parameters": plan.num_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


SCRATCH_LOCK = ".lock"
# What a loader would take for a part of the model that is saved now: other weights, or an adapter over another base.
EARLIER_MODEL = ("model*.safetensors", "model*.safetensors.index.json", "adapter_config.json", "adapter_model.*")


@contextmanager
def atomic_folder(folder: Path, replaces=EARLIER_MODEL):
    """A scratch folder whose files move into ``folder`` one by one when the block ends well, and vanish otherwise.

    Within one file system a move replaces a file in one step. The weights' index moves last; then files of an earlier
    save that match ``replaces`` and are not of this one go. So do scratch folders that killed processes left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".saving-*"):
        remove_left_over(left / SCRATCH_LOCK, partial(shutil.rmtree, left, ignore_errors=True))
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        with locked_file(scratch / SCRATCH_LOCK):
            yield scratch
            files = [file for file in scratch.rglob("*") if file.is_file() and file.name != SCRATCH_LOCK]
            for file in sorted(files, key=lambda file: file.name.endswith(".index.json")):
                file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
                flush_to_disk(file)
                target = folder / file.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
            kept = {file.name for file in files}
            for pattern in replaces:  # a loader would prefer a whole file to shards, or an old index to new ones
                for stale in folder.glob(pattern):
                    if stale.name not in kept:
                        stale.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save(module, folder: Path, max_shard_size, write_rest=lambda target, scratch: None) -> None:
    """Weights and, by ``write_rest`` on rank 0, the files that belong to them; every rank must call this."""
    plan, scratch = plan_saving(module), None

    def write() -> None:
        _write_shards(module, plan, scratch, max_shard_size)
        if get_rank() == 0:
            write_rest(plan.target, scratch)

    def together(work) -> None:
        """On all ranks; a failure of rank 0, the only one that writes, reaches them all before the next collective."""

        def telling() -> None:
            try:
                work()
            except OSError as error:
                raise UserError(f"could not save the model to {folder}: {error}") from error

        agree(telling)

    with memory_given_back(), ExitStack() as stack:

        def open_scratch() -> None:
            nonlocal scratch
            if get_rank() == 0:
                scratch = stack.enter_context(atomic_folder(folder))

        together(open_scratch)
        together(write)
        together(stack.close)
    barrier()


def save_weights(module, folder: Path, max_shard_size: int | str | None = None) -> None:
    """The weights alone, without configuration and tokenizer; every rank must call this."""
    _save(module, folder, max_shard_size or MAX_SHARD_SIZE)


def _align_special_tokens(config, tokenizer) -> None:
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id


def save_pretrained_model(model, tokenizer, folder: Path, max_shard_size: int | str | None = None) -> None:
    """Write config, generation config, safetensors and the full tokenizer to ``folder``; every rank must call this.

    ``model`` is a Hugging Face model, or a RewardModel, which becomes a sequence-classification model with one label.

    Args:
        max_shard_size: bytes, or text as in "5GB"; a larger model is written in several files with an index.
    """

    def write_rest(target, scratch: Path) -> None:
        _align_special_tokens(target.config, tokenizer)
        if target.can_generate():
            _align_special_tokens(target.generation_config, tokenizer)
        with tempfile.TemporaryDirectory(dir=scratch) as aside:  # all that goes with weights, around none
            target.save_pretrained(aside, state_dict={})
            for file in Path(aside).iterdir():
                if not file.name.endswith(".safetensors"):
                    file.rename(scratch / file.name)
        tokenizer.save_pretrained(scratch)

    _save(model, folder, max_shard_size or MAX_SHARD_SIZE, write_rest)
