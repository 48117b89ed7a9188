"""What DeepSpeed wrote of an engine, by the names of its weights, whatever ranks and ZeRO stage wrote it.

Only the tables of the files are unpickled, by the safe reader of checkpoints and with tensors on the meta device; the
numbers stay on the disk until a weight, or some elements of one, are asked for. ZeRO 1 and 2 cut a group of weights,
laid end to end, into one part for each rank; ZeRO 3 cuts each weight for itself, the last part shorter; ZeRO 0 keeps
each weight whole.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from utils.engine.optimizer import get_optimizer_grouped_parameters
from utils.run.engine_state import SafeCheckpointEngine, refused_content

MASTER = "fp32"  # the weights as the optimizer has them, beside its own "exp_avg" and the like
MODEL_FILES, OPTIMIZER_FILES = "*mp_rank_00_model_states.pt", "*zero_pp_rank_*_mp_rank_00_optim_states.pt"
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


@dataclass(frozen=True)
class Stored:
    """Consecutive elements that lie in a file which torch.save wrote."""

    file: Path
    offset: int  # of the first, in bytes
    numel: int
    dtype: torch.dtype

    @classmethod
    def of(cls, file: Path, tensor: torch.Tensor, start: int = 0, numel: int | None = None) -> "Stored":
        """A meta tensor of the file, or some of its elements. Raises ValueError: the file does not hold so many."""
        numel = tensor.numel() if numel is None else numel
        if not tensor.is_contiguous() or start < 0 or numel < 0 or start + numel > tensor.numel():
            raise ValueError(f"elements {start} to {start + numel} of {list(tensor.shape)}")
        first = tensor.storage_offset() + start
        offset = tensor.untyped_storage()._checkpoint_offset + first * tensor.element_size() if numel else 0
        if offset + numel * tensor.element_size() > file.stat().st_size:
            raise ValueError(f"a tensor of {list(tensor.shape)} beyond the end of the file")
        return cls(file, offset, numel, tensor.dtype)

    def read(self, start: int, numel: int) -> torch.Tensor:
        """Some of the elements, in host memory."""
        values = torch.empty(numel, dtype=self.dtype)
        left = memoryview(values.view(torch.uint8).numpy())
        with self.file.open("rb", buffering=0) as content:
            content.seek(self.offset + start * values.element_size())
            while left:
                count = content.readinto(left)  # at most 2 GiB at a time
                if not count:
                    raise ValueError("it ends too early")
                left = left[count:]
        return values


@dataclass
class Group:
    """A parameter group of the optimizer."""

    settings: dict  # learning rate, weight decay and the like
    names: list[str] = field(default_factory=list)
    scalars: dict = field(default_factory=dict)  # what its weights share: the number of steps


class SavedEngine:
    """An engine in a checkpoint.

    Args:
        folder: of its files.

    Attributes:
        stage: the ZeRO stage that wrote it. ranks: how many wrote its optimizer.
        shapes: of the weights that train, by name. groups: of the optimizer.
        counters: optimizer steps and the like; schedule: the state of the learning rate's.
        loss_scale: of fp16, by the names in LOSS_SCALE; {} without one.

    Raises:
        UserError: files that hold something else, or more than tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._parts: dict[str, dict[str, list[Stored]]] = {MASTER: {}}  # of the optimizer: kind -> weight -> in order
        with refused_content(folder):
            [file, *_] = sorted(folder.glob(MODEL_FILES), key=_rank_of)
            content = _tables(file)
            self.stage = int(content["ds_config"]["zero_optimization"]["stage"])
            self.counters = {name: int(content[name]) for name in ("global_steps", "skipped_steps", "global_samples")}
            self.schedule = content["lr_scheduler"]
            self.buffers = set(content["buffer_names"])
            files = sorted(folder.glob(OPTIMIZER_FILES), key=_rank_of)
            self.ranks = len(files) or int(content["dp_world_size"])
            self._module = self._read_module(file, content["module"])
            if self.stage == 0:
                self._read_whole(file, content["module"], content["optimizer"])
            else:
                optimizers = [_tables(file)["optimizer_state_dict"] for file in files]
                read = self._read_stage_3 if self.stage == 3 else self._read_flat
                read(files, optimizers, content["param_shapes"])
                self.loss_scale = _loss_scale(optimizers[0])
            self._check()

    # ------------------------------------------------------------ the tables

    def _read_module(self, file: Path, module: dict) -> dict[str, tuple[Stored, torch.Size]]:
        """The weights that train and the buffers, as the module had them; under ZeRO 3 the buffers alone."""
        whole = {name: value for name, value in module.items() if self.stage < 3 or name in self.buffers}
        return {name: (Stored.of(file, value), value.shape) for name, value in whole.items()}

    def _read_whole(self, file: Path, module: dict, optimizer: dict) -> None:
        """ZeRO 0: torch's own optimizer, or DeepSpeed's around it, which numbers weights group by group."""
        distinct = {}  # a tied weight stands in the module under each of its names, and trains under the first
        for name, (stored, _) in self._module.items():
            if name not in self.buffers:
                distinct.setdefault(stored, name)
        weights = [(name, torch.nn.Parameter(module[name])) for name in distinct.values()]
        names = {id(weight): name for name, weight in weights}
        groups = get_optimizer_grouped_parameters(SimpleNamespace(named_parameters=lambda: weights), 0.0)
        inner, masters = optimizer.get("optimizer_state_dict", optimizer), optimizer.get("fp32_groups")
        self.groups = [Group(_settings(group)) for group in inner["param_groups"]]
        numbers = iter(range(len(weights)))
        for index, (group, saved) in enumerate(zip(groups, self.groups, strict=True)):
            for place, weight in enumerate(group["params"]):
                name, state = names[id(weight)], inner["state"].get(next(numbers), {})
                self.shapes[name] = weight.shape
                saved.names.append(name)
                self._add(name, MASTER, Stored.of(file, weight if masters is None else masters[index][place]))
                self._add_state(file, saved, state, [(name, 0, weight.numel())])
        self.loss_scale = {key: optimizer[key] for key in LOSS_SCALE if optimizer.get("dynamic_loss_scale")}

    def _read_flat(self, files: list[Path], optimizers: list[dict], shapes: list[dict]) -> None:
        """ZeRO 1 and 2: each rank has one part of each group, and says which weights lie where in it."""
        self.groups = [Group(_settings(group)) for group in optimizers[0]["base_optimizer_state"]["param_groups"]]
        for group, names in zip(self.groups, shapes, strict=True):
            self.shapes |= {name: torch.Size(shape) for name, shape in names.items()}
            group.names += names
        for file, optimizer in zip(files, optimizers, strict=True):
            inner, flat = optimizer["base_optimizer_state"], optimizer["single_partition_of_fp32_groups"]
            for number, group in enumerate(self.groups):
                places = [(name, at.start, at.numel) for name, at in optimizer["param_slice_mappings"][number].items()]
                for name, start, numel in places:
                    self._add(name, MASTER, Stored.of(file, flat[number], start, numel))
                [key] = inner["param_groups"][number]["params"]
                self._add_state(file, group, inner["state"].get(key, {}), places)

    def _read_stage_3(self, files: list[Path], optimizers: list[dict], shapes: list[dict]) -> None:
        """ZeRO 3: a group is cut into sub-groups, and each rank has as much of each weight of them."""
        groups = optimizers[0]["optimizer_state_dict"]["param_groups"]
        self.groups = [Group(_settings(group)) for group in groups]
        group_of = {key: number for number, group in enumerate(groups) for key in group["params"]}
        for key, names in enumerate(shapes):
            self.shapes |= {name: torch.Size(shape) for name, shape in names.items()}
            self.groups[group_of[key]].names += names
        for rank, (file, optimizer) in enumerate(zip(files, optimizers, strict=True)):
            for key, names in enumerate(shapes):
                places, start = [], 0
                for name, shape in names.items():
                    whole = math.prod(shape)
                    part = -(-whole // len(files))
                    places.append((name, start, max(0, min(part, whole - rank * part))))
                    start += part
                for name, start, numel in places:
                    self._add(name, MASTER, Stored.of(file, optimizer["fp32_flat_groups"][key], start, numel))
                state = optimizer["optimizer_state_dict"]["state"].get(key, {})
                self._add_state(file, self.groups[group_of[key]], state, places)

    def _add(self, name: str, kind: str, stored: Stored) -> None:
        self._parts.setdefault(kind, {}).setdefault(name, []).append(stored)

    def _add_state(self, file: Path, group: Group, state: dict, places: list[tuple[str, int, int]]) -> None:
        """What the optimizer has for each element, by weight, and what the group shares."""
        for kind, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                for name, start, numel in places:
                    self._add(name, kind, Stored.of(file, value, start, numel))
                continue
            number = float(Stored.of(file, value).read(0, 1)) if isinstance(value, torch.Tensor) else float(value)
            if group.scalars.setdefault(kind, number) != number:
                raise ValueError(f"{kind} is {number:g} and {group.scalars[kind]:g} in one group of weights")

    def _check(self) -> None:
        """ValueError unless each weight has all its elements, of every kind, and its shape in the module too."""
        for name, shape in self.shapes.items():
            if self.stage < 3 and (name not in self._module or self._module[name][1] != shape):
                raise ValueError(f"no weight {name} of {list(shape)}")
        for kind, parts in self._parts.items():
            for name in self.shapes:
                found = sum(part.numel for part in parts.get(name, ()))
                if found != self.shapes[name].numel() and (found or kind == MASTER):
                    raise ValueError(f"{found} elements of {kind} for {name} of {list(self.shapes[name])}")

    # ------------------------------------------------------------ the numbers

    @property
    def kinds(self) -> list[str]:
        """What there is for each element beside MASTER: "exp_avg" and the like; [] before the first step."""
        return [kind for kind in self._parts if kind != MASTER]

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements of a weight, flat, as the optimizer has them; zeros of what it has not yet (a weight unused so far).

        Raises:
            UserError: the file has changed meanwhile.
        """
        numel = self.shapes[name].numel() - start if numel is None else numel
        values, begin = [], 0
        for part in self._parts[kind].get(name, ()):
            first, last = max(start, begin), min(start + numel, begin + part.numel)
            if first < last:
                with refused_content(part.file):
                    values.append(part.read(first - begin, last - first))
            begin += part.numel
        if len(values) == 1:
            return values[0]
        return torch.cat(values) if values else torch.zeros(numel)

    def __contains__(self, name: str) -> bool:
        return name in self._module or name in self.shapes

    def names(self) -> set[str]:
        """Of all weights and buffers that it holds."""
        return self._module.keys() | self.shapes.keys()

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name] if name in self.shapes else self._module[name][1]

    def weight(self, name: str) -> torch.Tensor:
        """A weight or buffer in full as the module has it; under ZeRO 3 as the optimizer has it, in fp32."""
        if name in self._module:
            stored, shape = self._module[name]
            with refused_content(stored.file):
                return stored.read(0, stored.numel).view(shape)
        return self.read(MASTER, name).view(self.shapes[name])


def _rank_of(file: Path) -> int:
    """Of the rank that wrote a file."""
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0


def _tables(file: Path) -> dict:
    return SafeCheckpointEngine().load(str(file), map_location="meta")


def _settings(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params"}


def _loss_scale(optimizer: dict) -> dict:
    scaler = optimizer.get("loss_scaler")
    return {name: getattr(scaler, name) for name in LOSS_SCALE} if isinstance(scaler, DynamicLossScaler) else {}
