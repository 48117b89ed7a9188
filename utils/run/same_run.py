"""What a run must have in common with the checkpoint that it goes on from: flags, models, rows."""

import hashlib
import json
from enum import Enum
from pathlib import Path

import numpy as np

from utils.arguments.run import MAY_CHANGE_AT_RESUME
from utils.data.sources import data_config_content
from utils.process.world import get_world_size

# What checkpoints of earlier versions hold among the flags though it is none: it follows from those that are compared.
NO_FLAGS = {"checkpoint_dir_given", "end_of_conversation_token", "global_rank"}


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


def model_fingerprint(folder: str | None) -> str | None:
    """Of a model's files: names, sizes, and what stands at the head and the end of each. None for a name on the hub."""
    if folder is None or not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(folder).iterdir() if file.suffix in (".safetensors", ".bin", ".gguf")):
        size = file.stat().st_size
        with file.open("rb") as content:
            head = content.read(2**20)
            content.seek(max(0, size - 2**20))
            digest.update(f"{file.name} {size} ".encode() + head + content.read(2**20))
    return digest.hexdigest()


def rows_fingerprint(dataset, sampled: int = 64) -> str:
    """Of training rows: how many, the length of each, and the content of some all over."""
    digest = hashlib.sha256(np.ascontiguousarray(dataset.lengths, dtype=np.int64).tobytes())
    for index in np.linspace(0, len(dataset) - 1, num=min(sampled, len(dataset)), dtype=int).tolist():
        digest.update(json.dumps(dataset[index], sort_keys=True).encode())
    return digest.hexdigest()


def differences(args, fingerprints: dict[str, str | None], saved: dict) -> list[str]:
    """What keeps a run with these flags from going on where the checkpoint was written, one reason a line.

    Args:
        fingerprints: of the models that this run starts from, by the flags that name them.
        saved: the state of the checkpoint.
    """
    if saved["world_size"] != get_world_size():
        return [
            f"it was written by {saved['world_size']} ranks and this run has {get_world_size()}: DeepSpeed's shards "
            "and the batches of a step are cut for that number; start as many"
        ]
    now, then = flags_of(args), saved["flags"]
    other_flags = [
        f"--{name} is {now.get(name)!r}, and was {then.get(name)!r}"
        for name in sorted((now.keys() | then.keys()) - MAY_CHANGE_AT_RESUME - NO_FLAGS)
        if now.get(name) != then.get(name)
    ]
    return other_flags or [
        f"--{name} {getattr(args, name)}: its weights are not those of the first start"
        for name, fingerprint in fingerprints.items()
        if saved["models"].get(name) != fingerprint
    ]
