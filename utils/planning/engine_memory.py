"""What an engine keeps in memory all the time, by DeepSpeed's rules for its ZeRO stage."""

import math
from dataclasses import dataclass, field

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from utils.ds_utils import offloads_optimizer
from utils.planning.meta_model import MetaModel, Sizes
from utils.process.host_memory import HEAP_BLOCK

GIB = 2**30


# Neither was measured here (no GPU): a CUDA context with cuBLAS and NCCL buffers, and a process with CUDA's libraries.
CUDA_BASELINE, CUDA_HOST_BASELINE = 1.0 * GIB, 4.0 * GIB


@dataclass(frozen=True)
class Bytes:
    """On the device of a rank, and on the host for it. Where the device is the CPU both are of one memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device + other.device, self.host + other.host)


@dataclass(frozen=True)
class Machine:
    """What a run is to fit into.

    Args:
        ranks, ranks_per_node: processes, one per device.
        on_cpu: the devices are CPUs, and all ranks of a node share its memory.
        device: bytes of one device (on_cpu: a rank's share of the host's).
        host: bytes of one node's host memory; None if it is not to be looked at.
        baseline: bytes of a process before any model is there.
    """

    ranks: int
    ranks_per_node: int
    on_cpu: bool
    device: int
    host: int | None
    baseline: Bytes


@dataclass
class EngineMemory:
    """One engine's share of a rank's memory, in bytes.

    Attributes:
        resident: what is there all the time, by name.
        arriving: beside activations in a backward pass, where gradients are collected.
        waiting: gradients of earlier micro-batches, during the passes of the others.
        reduced: at most, when the backward pass has ended and gradients go to the ranks they belong to.
        gradients: what is left of them until the optimizer step. step: at most in that step, with them.
        gather_training, gather_looking, gather_whole: ZeRO-3's whole weights, in a training pass, in one without
            gradients, and all of them at once.
        collects: whole gradients stay as the backward pass makes them (else they go into ``arriving``).
    """

    name: str
    model: MetaModel
    resident: dict[str, Bytes] = field(default_factory=dict)
    arriving: int = 0
    waiting: int = 0
    reduced: Bytes = Bytes()
    gradients: Bytes = Bytes()
    step: Bytes = Bytes()
    gather_training: int = 0
    gather_looking: int = 0
    gather_whole: int = 0
    collects: bool = False
    small_states: list[int] = field(default_factory=list)  # Adam's moments in blocks of their own below HEAP_BLOCK
    loading: Bytes = Bytes()

    @property
    def always(self) -> Bytes:
        return sum(self.resident.values(), Bytes())


def _gathers(sizes: Sizes, itemsize: int, zero: DeepSpeedZeroConfig, sharded: bool) -> dict[str, int]:
    """ZeRO-3's whole weights at a time. With one rank and nothing on the host a shard is the weight itself.

    A weight is released after use unless it is used again within stage3_max_reuse_distance (1e9) elements
    (PartitionedParameterCoordinator.__params_to_release). In a training pass the last layers are used again soonest:
    half of that distance lies before them, so that smaller models are kept whole from forward to backward pass.
    """
    if not sharded:
        return {}
    ahead = zero.prefetch_bucket_size + sizes.largest_layer
    return dict(
        gather_training=min(sizes.whole, zero.max_reuse_distance // 2 + ahead) * itemsize,
        gather_looking=min(sizes.whole, ahead) * itemsize,
        gather_whole=sizes.whole * itemsize,
    )


def trained_engine(name: str, model: MetaModel, ds_config: dict, machine: Machine, accumulation: int) -> EngineMemory:
    """An engine with AdamW, as DeepSpeed 0.19.8 builds it around a model in 16 or 32 bits.

    Stage 0 (fp32 only): gradients whole; their reduction copies them, up to 5e8 elements at a time
    (engine.buffered_allreduce_fallback).
    Stage 1 and 2 (stage_1_and_2.py): an fp32 copy of a rank's share also of fp32 weights; gradients are copied into
    buckets of reduce_bucket_size elements (two with overlap_comm), flattened again where there are several ranks
    (allreduce_bucket), copied out of them (copy_grads_in_partition), flattened and cast to fp32 for the step; gloo's
    all_gather has a whole copy of the weights, for a moment.
    Stage 3 (stage3.py): the same of shards; one bucket that stays; a flat buffer of the shards of gradients that stays;
    reduce_scatter_coalesced rearranges a bucket into a copy, gloo's reduce_scatter makes another.
    The norm of gradients is taken in fp64, tensor by tensor.
    On a CPU memory counts from its first use, so that a bucket takes what was written to it.
    """
    zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    sizes, item, ranks, on_cpu = model.sizes, model.itemsize, machine.ranks, machine.on_cpu
    trained, offload, stage = sizes.trained, offloads_optimizer(ds_config), int(zero.stage)
    offload_weights = stage == 3 and zero.offload_param is not None and zero.offload_param.device != "none"
    share = math.ceil(trained / ranks)
    bucket = min(trained, zero.reduce_bucket_size)
    norm, is_16_bit, many = 8 * sizes.largest_trained, item == 2, ranks > 1
    engine = EngineMemory(name, model)

    def place(size: int, on_host: bool) -> Bytes:
        return Bytes(host=size) if on_host else Bytes(device=size)

    if stage == 0:
        engine.resident = {
            "parameters": Bytes(sizes.whole * item + sizes.packed_bytes),
            "optimizer states": Bytes(8 * trained),
        }
        engine.gradients = Bytes(trained * item)
        engine.waiting = trained * item if accumulation > 1 else 0
        engine.reduced = Bytes(trained * item + min(trained, 500_000_000 + sizes.largest_trained) * item)
        engine.step = engine.gradients
        engine.collects = accumulation == 1
        moments = [4 * p.numel() for p in model.model.parameters() if p.requires_grad for _ in range(2)]
        engine.small_states = [size for size in moments if size < HEAP_BLOCK]
        return engine

    if stage < 3:
        states = place(4 * share, offload), place(8 * share, offload)
        engine.resident = {
            "parameters": Bytes(sizes.whole * item + sizes.packed_bytes),
            "fp32 weights": states[0],
            "optimizer states": states[1],
        }
        room = (2 if zero.overlap_comm else 1) * zero.reduce_bucket_size
        engine.arriving = (min(trained, room) if on_cpu else room) * item
        engine.collects = on_cpu and accumulation == 1
        at_end = engine.arriving + (bucket * item if many else 0)
        if offload:
            engine.resident["gradients"] = Bytes(host=4 * share)
            engine.resident["buffers"] = Bytes(
                sizes.largest_trained * item, share * item + sizes.largest_trained * item
            )
            accumulated = share * item if accumulation > 1 else 0
            engine.resident["gradients"] += Bytes(host=accumulated)
            engine.reduced = Bytes(at_end + norm)
            engine.step = Bytes(trained * item if on_cpu and many else 0)
            return engine
        if accumulation > 1:
            engine.waiting = (trained if stage == 1 else share) * item
        left = share * item
        if trained > zero.reduce_bucket_size:  # reduced, and shared out, while the backward pass goes on
            engine.arriving += left + (bucket * item if many else 0)
        engine.reduced = Bytes(at_end + left + (left if accumulation > 1 and stage == 2 else 0))
        engine.gradients = Bytes(left)
        cast = left + share * item + (4 * share if is_16_bit else 0)
        engine.step = Bytes(max(cast, left + norm, trained * item if on_cpu and many else 0))
        return engine

    engine.resident = {
        "parameters": place(math.ceil(sizes.whole / ranks) * item, offload_weights),
        "fp32 weights": place(4 * share, offload),
        "optimizer states": place(8 * share, offload),
        "gradients": place(share * item, offload),
        "buffers": Bytes((bucket if on_cpu else zero.reduce_bucket_size) * item),
    }
    if offload:
        engine.resident["gradients"] += Bytes(host=4 * share)
    for key, value in _gathers(sizes, item, zero, many or (offload_weights and not on_cpu)).items():
        setattr(engine, key, value)
    engine.reduced = Bytes(bucket * item * (2 if on_cpu else 1))
    if trained > zero.reduce_bucket_size:  # reduced while the backward pass goes on
        engine.arriving = engine.reduced.device
    engine.step = Bytes(0 if offload else max(share * item + (4 * share if is_16_bit else 0), norm // ranks))
    engine.loading = _loading(model, ranks)
    return engine


def _loading(model: MetaModel, ranks: int) -> Bytes:
    """ZeRO-3: transformers reads all weight files on rank 0 before it hands out the shards."""
    return Bytes(host=model.sizes.total * model.itemsize)


def frozen_engine(name: str, model: MetaModel, ds_config: dict, machine: Machine) -> EngineMemory:
    """An engine without an optimizer: weights alone, whole or (stage 3) sharded, perhaps on the host."""
    zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    size, item = model.sizes.whole, model.itemsize
    on_host = zero.offload_param is not None and zero.offload_param.device != "none"
    if int(zero.stage) < 3:
        return EngineMemory(name, model, {"parameters": Bytes(size * item)})
    shard = math.ceil(size / machine.ranks) * item
    gathers = _gathers(model.sizes, item, zero, machine.ranks > 1 or (on_host and not machine.on_cpu))
    resident = {"parameters": Bytes(host=shard) if on_host else Bytes(shard)}
    return EngineMemory(name, model, resident, loading=_loading(model, machine.ranks), **gathers)
