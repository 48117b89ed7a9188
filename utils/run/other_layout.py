"""An engine goes on from what other ranks, or another ZeRO stage, wrote: its numbers are dealt out anew.

What DeepSpeed offers for this, universal checkpoints, unpickles whatever its files hold (``weights_only=False``), gives
every group of weights the settings of the first at ZeRO 3 (one weight decay and learning rate for all), and knows no
ZeRO 0. So each rank reads the elements of its share from the old files, and DeepSpeed's own loaders take them in as
what this rank had written itself. Nothing is converted on the disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from utils.engine.optimizer import LORA_NAMES
from utils.engine.steps import moving_average
from utils.process.errors import UserError
from utils.process.world import get_rank, get_world_size
from utils.run.engine_state import averaged_parts, refused_content
from utils.run.saved_average import SavedAverage
from utils.run.saved_engine import MASTER, SavedEngine

FLAT_GROUPS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")  # ZeRO 1 and 2; BF16_Optimizer


@dataclass
class Part:
    """Elements of some weights of one group that lie together in an optimizer of this rank.

    Attributes:
        master: [elements] fp32, the optimizer's own.
        places: (weight, where its elements begin here, where in the weight, how many).
    """

    group: int
    master: torch.Tensor
    places: list[tuple[str, int, int, int]]

    def filled(self, saved: SavedEngine, kind: str) -> torch.Tensor:
        """Like ``master``, from the checkpoint; 0 where nothing of a weight lies."""
        values = torch.zeros(self.master.shape, dtype=torch.float32)
        flat = values.view(-1)
        for name, at, start, numel in self.places:
            flat[at : at + numel].copy_(saved.read(kind, name, start, numel))
        return values


def parts_of(engine) -> list[Part]:
    """What this rank's optimizer holds, in the order of its own files."""
    optimizer, names = engine.optimizer, engine.param_names
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_parts_at_stage_3(optimizer, names))
    flat = next((getattr(optimizer, name) for name in FLAT_GROUPS if hasattr(optimizer, name)), None)
    if flat is not None:
        weights = {name: weight for weight, name in names.items()}
        return [
            Part(number, master, [(name, at.start, *_place(weights[name])) for name, at in places.items()])
            for number, (master, places) in enumerate(zip(flat, optimizer._param_slice_mappings, strict=True))
        ]
    masters = getattr(optimizer, "fp32_groups", None)
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [
        Part(number, masters[number][i] if masters else weight, [(names[weight], 0, 0, weight.numel())])
        for number, group in enumerate(groups)
        for i, weight in enumerate(group)
    ]


def _place(weight) -> tuple[int, int]:
    address = weight._hp_mapping.lp_fragment_address
    return address.start, address.numel


def _parts_at_stage_3(optimizer, names) -> Iterator[Part]:
    rank, ranks = get_rank(), get_world_size()
    for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        places, at = [], 0
        for weight in optimizer.fp16_groups[number]:
            share = -(-weight.ds_numel // ranks)
            places.append((names[weight], at, rank * share, max(0, min(share, weight.ds_numel - rank * share))))
            at += weight.partition_numel()
        yield Part(optimizer.sub_group_to_group_id[number], master, places)


# ---------------------------------------------------------------- all of an engine


def load_from_other_layout(engine, saved: SavedEngine) -> None:
    """Weights, optimizer, schedule and counters of a saved engine, whatever ranks and stage it had; on every rank.

    Raises:
        UserError: the engine trains other weights, or in other groups.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(
            "--resume: optimizer states on NVMe are files of the ranks that wrote them: start as many ranks at the "
            "same ZeRO stage, or take --resume_weights_only"
        )
    with refused_content(saved.folder):
        parts = parts_of(engine)
        _check_same_weights(engine, saved)
        if hasattr(optimizer, "checkpoint_event_prologue"):
            optimizer.checkpoint_event_prologue()
        if engine.zero_optimization_stage() < 3:
            _copy_weights(engine, saved)
        _copy_buffers(engine, saved)
        _load_optimizer(engine, saved, parts)
        engine.lr_scheduler.load_state_dict(saved.schedule)
        for name, value in saved.counters.items():
            setattr(engine, name, value)
        if hasattr(optimizer, "checkpoint_event_epilogue"):
            optimizer.checkpoint_event_epilogue()


def _check_same_weights(engine, saved: SavedEngine) -> None:
    shapes = {
        name: getattr(weight, "ds_shape", weight.shape)
        for name, weight in engine.module.named_parameters()
        if weight.requires_grad
    }
    if shapes != saved.shapes:
        name = next(name for name in sorted(shapes.keys() | saved.shapes) if shapes.get(name) != saved.shapes.get(name))
        here, there = (list(known[name]) if name in known else "absent" for known in (shapes, saved.shapes))
        raise ValueError(f"{name} is {there} there, and {here} in this run")


def _copy_weights(engine, saved: SavedEngine) -> None:
    for name, weight in engine.module.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(saved.weight(name))


def _copy_buffers(engine, saved: SavedEngine) -> None:
    buffers = dict(engine.module.named_buffers())
    for name in saved.buffers & buffers.keys():
        buffers[name].copy_(saved.weight(name))


def _load_optimizer(engine, saved: SavedEngine, parts: list[Part]) -> None:
    """Let DeepSpeed's optimizer load what it would have written itself."""
    optimizer = engine.optimizer
    inner = _optimizer_state(engine, saved, parts)
    own, masters = optimizer.state_dict(), [part.filled(saved, MASTER) for part in parts]
    if engine.zero_optimization():
        scaler = optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else None
        if isinstance(scaler, DynamicLossScaler):
            vars(scaler).update(saved.loss_scale)
        if engine.zero_optimization_stage() == 3:
            own |= {"optimizer_state_dict": inner, "fp32_flat_groups": masters}
        else:
            own |= {"base_optimizer_state": inner, "single_partition_of_fp32_groups": masters}
        optimizer.load_state_dict(
            state_dict_list=[own] * get_world_size(), load_optimizer_states=True, load_from_fp32_weights=True
        )
    elif "fp32_groups" in own:
        of_group = [[m for m, part in zip(masters, parts, strict=True) if part.group == i] for i in _groups(parts)]
        scale = saved.loss_scale if own.get("dynamic_loss_scale") else {}
        optimizer.load_state_dict(own | scale | {"optimizer_state_dict": inner, "fp32_groups": of_group})
    else:
        optimizer.load_state_dict(inner)


def _groups(parts: list[Part]) -> list[int]:
    return sorted({part.group for part in parts})


def _optimizer_state(engine, saved: SavedEngine, parts: list[Part]) -> dict:
    """The state of torch's optimizer below DeepSpeed's: its groups have one number for each part."""
    basic = engine.basic_optimizer
    counts_in_tensors = isinstance(basic, torch.optim.AdamW)  # DeepSpeedCPUAdam counts its steps in plain numbers
    numbers, state, groups = count(), {}, []
    for index, (now, then) in enumerate(zip(basic.param_groups, saved.groups, strict=True)):
        mine = [part for part in parts if part.group == index]
        # Each rank has some of the weights alone, but none of another group.
        if strangers := {name for part in mine for name, *_ in part.places} - set(then.names):
            raise ValueError(f"{min(strangers)} was in another group of the optimizer")
        settings = {name: then.settings.get(name, value) for name, value in now.items() if name != "params"}
        groups.append(settings | {"params": [next(numbers) for _ in mine]})
        for number, part in zip(groups[-1]["params"], mine, strict=True):
            if then.scalars:
                elements = {kind: part.filled(saved, kind) for kind in saved.kinds}
                scalars = {
                    name: torch.tensor(value, dtype=torch.float32) if counts_in_tensors else int(value)
                    for name, value in then.scalars.items()
                }
                state[number] = elements | scalars
    return {"state": state, "param_groups": groups}


# ---------------------------------------------------------------- weights alone


def load_weights(engine, saved: SavedEngine, same_start: bool) -> None:
    """The weights of a saved engine in a fresh one, whose optimizer and schedule stay as they are; on every rank.

    Args:
        same_start: the run starts from the model that the saved one started from, so that what that one did not train
            is there.

    Raises:
        UserError: weights without a place in this model, or the other way round.
    """
    weights = dict(engine.module.named_parameters())
    buffers = dict(engine.module.named_buffers())
    if unknown := sorted(saved.names() - buffers.keys() - _all_names(engine.module)):
        raise UserError(
            f"--resume_weights_only: {saved.folder} holds {unknown[0]}, for which this run's model has no place; "
            "inference/export_checkpoint.py makes a model of it, with LoRA folded in, to start from"
        )
    missing = [name for name in weights if name not in saved and not name.endswith(LORA_NAMES)]
    if missing and not same_start:
        raise UserError(
            f"--resume_weights_only: {saved.folder} does not hold {missing[0]} (nor {len(missing) - 1} other weights), "
            "which its run did not train: start from the model that it started from, or from what "
            "inference/export_checkpoint.py makes of it"
        )
    for name, weight in weights.items():
        shape = getattr(weight, "ds_shape", weight.shape)
        if name in saved and saved.shape(name) != shape:
            raise UserError(
                f"--resume_weights_only: {name} is {list(saved.shape(name))} in {saved.folder}, and {list(shape)} here"
            )
    for name, weight in weights.items():
        if name in saved:
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=hasattr(weight, "ds_id")):
                if get_rank() == 0 or not hasattr(weight, "ds_id"):
                    weight.data.copy_(saved.weight(name))
    _copy_buffers(engine, saved)
    for part in parts_of(engine):
        for name, at, start, numel in part.places:
            if name in saved.shapes:  # in fp32, as the optimizer had it
                part.master.data.view(-1)[at : at + numel].copy_(saved.read(MASTER, name, start, numel))


def _all_names(module) -> set[str]:
    """All names of weights, those that have one already too."""
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


# ---------------------------------------------------------------- moving averages


@torch.no_grad()
def load_average_from(average, followed, saved: SavedAverage) -> None:
    """This rank's part of a moving average, whatever ranks and stage wrote it; on every rank."""
    weights = dict(average.module.named_parameters())
    for name, target in averaged_parts(average, followed):
        if name not in saved:
            raise UserError(f"--resume: the average in {saved.folder} does not hold {name}")
        flat = target.view(-1)
        start, left = 0, saved.shapes[name].numel()
        if hasattr(weights[name], "ds_id"):
            start = get_rank() * flat.numel()
        numel = max(0, min(flat.numel(), left - start))
        flat[:numel].copy_(saved.read(name, start, numel))


def start_average(average, followed) -> None:
    """Let a moving average be what it follows."""
    moving_average(followed, average, beta=0.0)
