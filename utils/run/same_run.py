"""What a run must have in common with the checkpoint that it goes on from: flags, models, rows."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from utils.arguments import RLHFBatchSizes
from utils.arguments.run import MAY_CHANGE_AT_RESUME
from utils.data.sources import data_config_content
from utils.process.errors import UserError
from utils.process.world import get_world_size

BLOCKS_KIND = "blocks "  # begins a fingerprint of blocks from all over the files
CONFIG = "config.json"
# What checkpoints of earlier versions hold among the flags though it is none: it follows from those that are compared.
NO_FLAGS = {"checkpoint_dir_given", "end_of_conversation_token", "global_rank"}
# How weights and optimizer are dealt out over the ranks: a checkpoint serves any.
LAYOUT_FLAGS = {"zero_stage", "actor_zero_stage", "critic_zero_stage"}
# How the rows of a step are dealt out: with another layout they may differ, as long as the step has the same rows.
BATCH_FLAGS = {
    *("per_device_train_batch_size", "per_device_training_batch_size", "per_device_generation_batch_size"),
    *("generation_batches", "gradient_accumulation_steps"),
}


def as_in_json(value):
    """A flag's value as it comes back from a JSON file."""
    if isinstance(value, Enum):
        return value.value
    return [as_in_json(part) for part in value] if isinstance(value, list | tuple) else value


def flags_of(args) -> dict:
    """The flags that shape the training, and the content of the files that they name as configurations."""
    flags = {name: as_in_json(value) for name, value in vars(args).items() if name not in MAY_CHANGE_AT_RESUME}
    file = flags.pop("deepspeed_config_overrides", None)
    datasets = flags.pop("data_config", None)
    return flags | {
        "deepspeed_config_overrides": file and json.loads(Path(file).read_text()),
        "data_config": datasets and data_config_content(datasets),
    }


def model_fingerprint(folder: str | None, whole: bool = False) -> str | None:
    """Of a model's files: names, sizes, and blocks from all over each. None for a name on the hub.

    Args:
        whole: all that stands in them counts, and the model's configuration.
    """
    digest = _digest_of_files(folder, _everything, CONFIG) if whole else _digest_of_files(folder, _blocks)
    return digest and BLOCKS_KIND + digest


def same_model(folder: str | None, then: str | None) -> bool:
    """Whether a checkpoint noted this fingerprint of a model's files; older ones only knew how each begins and ends."""
    if then is not None and not then.startswith(BLOCKS_KIND):
        return _digest_of_files(folder, _ends) == then
    return model_fingerprint(folder) == then


def _digest_of_files(folder: str | None, parts: Callable[[int], Iterable[tuple[int, int]]], *more: str) -> str | None:
    """Of the weights' files and ``more``. ``parts``: size of a file -> (offset, length) of what counts of it."""
    if folder is None or not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    kinds = (".safetensors", ".bin", ".gguf")
    for file in sorted(file for file in Path(folder).iterdir() if file.suffix in kinds or file.name in more):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for offset, length in parts(size):
                content.seek(offset)
                digest.update(content.read(length))
    return digest.hexdigest()


def _blocks(size: int, count: int = 64, length: int = 2**16) -> Iterable[tuple[int, int]]:
    """Spread evenly: training changes weights everywhere, and an adapter at least the same ones of every layer."""
    return [(offset, length) for offset in np.linspace(0, max(0, size - length), count, dtype=np.int64).tolist()]


def _ends(size: int) -> Iterable[tuple[int, int]]:
    return (0, 2**20), (max(0, size - 2**20), 2**20)


def _everything(size: int, length: int = 2**24) -> Iterable[tuple[int, int]]:
    return ((offset, length) for offset in range(0, size, length))


def rows_fingerprint(dataset, sampled: int = 64) -> str:
    """Of training rows: how many, the length of each, and the content of some all over."""
    digest = hashlib.sha256(np.ascontiguousarray(dataset.lengths, dtype=np.int64).tobytes())
    for index in np.linspace(0, len(dataset) - 1, num=min(sampled, len(dataset)), dtype=int).tolist():
        digest.update(json.dumps(dataset[index], sort_keys=True).encode())
    return digest.hexdigest()


def other_layout(args, saved: dict) -> list[str]:
    """How the layout of this run differs from the checkpoint's, in words; [] where each rank can read its own files.

    Args:
        saved: the state of the checkpoint.
    """
    then, now = saved["world_size"], get_world_size()
    words = [f"{now} rank{'s' if now > 1 else ''} instead of {then}"] if now != then else []
    stages = [(name, saved["flags"].get(name), getattr(args, name, None)) for name in sorted(LAYOUT_FLAGS)]
    return words + [f"--{name} {stage} instead of {before}" for name, before, stage in stages if before != stage]


def same_global_batch(args, saved: dict) -> dict[str, int]:
    """The flags with which a step of this run has the rows that it had in another layout, in the same order.

    Raises:
        UserError: the sizes do not divide, with the arithmetic.
    """
    flags, then, now = saved["flags"], saved["world_size"], get_world_size()
    if "per_device_train_batch_size" in flags:
        size, accumulation = flags["per_device_train_batch_size"], flags["gradient_accumulation_steps"]
        passes = _divided(
            "per_device_train_batch_size", args.per_device_train_batch_size, size, accumulation, then, "row"
        )
        return {"gradient_accumulation_steps": passes}
    before = RLHFBatchSizes.of(SimpleNamespace(**flags))
    generation, micro = args.per_device_generation_batch_size, args.per_device_training_batch_size
    rounds = _divided(
        "per_device_generation_batch_size", generation, before.generation_batch, before.rounds, then, "answer"
    )
    passes = _divided("per_device_training_batch_size", micro, before.micro_batch, before.accumulation, then, "answer")
    if generation * rounds % (micro * passes):
        raise UserError(
            f"--resume: {generation} x {rounds} answers of each of {now} ranks are no whole number of steps of "
            f"{micro} x {passes}"
        )
    return {"generation_batches": rounds, "gradient_accumulation_steps": passes}


def _divided(flag: str, size: int, size_then: int, passes_then: int, ranks_then: int, unit: str) -> int:
    """How many passes of ``size`` on each rank of this run make as many rows as there were in all."""
    ranks = get_world_size()
    rows = size_then * passes_then * ranks_then
    if rows % (size * ranks):
        fitting = [number for number in range(1, rows // ranks + 1) if rows % (number * ranks) == 0]
        way = f"give --{flag} {' or '.join(map(str, fitting[-3:]))}" if fitting else "no size fits: take other ranks"
        raise UserError(
            f"--resume: a step had {size_then} x {passes_then} on {ranks_then} rank(s) = {rows} {unit}s, which "
            f"--{flag} {size} on {ranks} rank(s) does not divide, so that it would be other {unit}s from here on; {way}"
        )
    return rows // (size * ranks)


# What runs did before there was a flag for it, in checkpoints of earlier versions.
BEFORE = {"loss_mean": "token", "scale_group_rewards": True}


def differences(args, models: Sequence[str], saved: dict) -> list[str]:
    """What keeps a run with these flags from going on where the checkpoint was written, one reason a line.

    Args:
        models: the flags that name the models that this run starts from.
        saved: the state of the checkpoint.
    """
    may_differ = MAY_CHANGE_AT_RESUME | NO_FLAGS | LAYOUT_FLAGS | set(args.allow_changed)
    if other_layout(args, saved):  # their product is the same, by same_global_batch
        may_differ |= BATCH_FLAGS
    return changed_flags(args, saved, may_differ) or [
        f"--{name} {getattr(args, name)}: its weights are not those of the first start"
        for name in models
        if not same_model(getattr(args, name), saved["models"].get(name))
    ]


def changed_flags(args, saved: dict, may_differ: set[str]) -> list[str]:
    """The flags, but for these, that have another value than in the checkpoint, in words."""
    now, then = flags_of(args), saved["flags"]
    return [
        f"--{name} is {now.get(name)!r}, and was {then.get(name, BEFORE.get(name))!r}"
        for name in sorted((now.keys() | then.keys()) - may_differ)
        if not _means_the_same(name, now.get(name), then.get(name, BEFORE.get(name)), name in then)
    ]


def _means_the_same(name: str, now, then, noted: bool) -> bool:
    """``noted``: the checkpoint knows the flag; one that it does not know may be off, or as things were before it."""
    if not noted:
        return not now or now == then
    return now == then or (name == "missing_eos_penalty" and not now and not then)  # None in earlier versions
