"""Weights as safetensors files, written in any order: one file, or shards with an index."""

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.modeling_utils import str_to_torch_dtype

from utils.process.errors import UserError

MAX_SHARD_SIZE = "5GB"
INDEX_FILE = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


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
                "dtype": SAFETENSORS_DTYPES[tensor.dtype],
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
    def missing(self) -> list[str]:
        """Names announced and not written."""
        return list(self._start)


@contextmanager
def open_shards(folder: Path, stored: dict[str, torch.Tensor], max_shard_size: int | str, **metadata):
    """Yields write(name, value) for model.safetensors, or for shards and their index as transformers writes them.

    Args:
        stored: {name: meta tensor} of all weights, which may be written in any order.
        max_shard_size: bytes, or text as in "5GB", of the largest file.
        metadata: of the index, beside the total size.

    Raises:
        UserError: a ``max_shard_size`` that is no size.
    """
    try:
        split = split_torch_state_dict_into_shards(
            stored, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise UserError(f"--max_shard_size {max_shard_size}: {error}") from error
    with ExitStack() as stack:
        writers = {}
        for file, names in split.filename_to_tensors.items():
            writer = SafetensorsWriter(folder / file, {name: stored[name] for name in names})
            stack.callback(writer.close)
            writers |= dict.fromkeys(names, writer)
        yield lambda name, value: writers[name].write(name, value)
    missing = [name for writer in set(writers.values()) for name in writer.missing]
    if missing:
        raise RuntimeError(f"announced and never written: {', '.join(missing[:8])}")
    if split.is_sharded:
        index = {"metadata": metadata | split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
