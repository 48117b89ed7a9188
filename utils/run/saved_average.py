"""What a checkpoint holds of a moving average, by the names of its weights, whatever ranks and ZeRO stage wrote it."""

from pathlib import Path

import torch
from safetensors import safe_open

from utils.run.engine_state import refused_content


class SavedAverage:
    """A moving average in a checkpoint: one file, or one of each rank, which then has its part of each weight.

    Args:
        folder: of the checkpoint. name: of the average.
        shapes: of the weights that are averaged: those of the engine it follows that train.

    Raises:
        UserError: files that hold something else.
    """

    def __init__(self, folder: Path, name: str, shapes: dict[str, torch.Size]):
        self.folder, self.shapes = folder, shapes
        self._files = sorted(folder.glob(f"{name}-rank*.safetensors"))
        with refused_content(folder / f"{name}-rank00000.safetensors"):
            if not self._files:
                raise ValueError("there is none")
            for weight in shapes:
                found = sum(self._sizes(weight))
                # The parts of ranks are of one size, so that they may hold some elements more than there are.
                if not 0 <= found - shapes[weight].numel() < max(len(self._files), 1):
                    raise ValueError(f"{found} elements for {weight} of {list(shapes[weight])}")

    def _sizes(self, name: str) -> list[int]:
        sizes = []
        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                sizes.append(torch.Size(tensors.get_slice(name).get_shape()).numel())
        return sizes

    def read(self, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements of a weight, flat."""
        numel = self.shapes[name].numel() - start if numel is None else numel
        values, begin = [], 0
        for file, size in zip(self._files, self._sizes(name), strict=True):
            first, last = max(start, begin), min(start + numel, begin + size)
            if first < last:
                with refused_content(file), safe_open(file, framework="pt") as tensors:
                    values.append(tensors.get_tensor(name).reshape(-1)[first - begin : last - begin])
            begin += size
        return torch.cat(values) if values else torch.zeros(0)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def names(self) -> set[str]:
        return set(self.shapes)

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def weight(self, name: str) -> torch.Tensor:
        """A weight in full."""
        return self.read(name).view(self.shapes[name])
