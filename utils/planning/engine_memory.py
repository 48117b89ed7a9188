"""What an engine keeps in memory beside the passes over its model, by DeepSpeed's rules for its ZeRO stage.

Model states are those of ZeRO (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054, section 3: 16-bit Adam keeps
2 + 2 + 12 bytes per parameter); buffers and copies are what the code of DeepSpeed 0.19.8 allocates, named at each rule.
All sizes are bytes on one rank.
"""

import math
from dataclasses import dataclass, field

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from utils.planning.meta_model import MetaModel

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

    def __sub__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device - other.device, self.host - other.host)


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


@dataclass(frozen=True)
class Gathered:
    """ZeRO-3's whole weights beside the shards: in a training pass, in one without gradients, and all at once."""

    training: int = 0
    scoring: int = 0
    whole: int = 0


@dataclass
class EngineMemory:
    """One engine's share of a rank's memory, in bytes.

    Attributes:
        resident: what is there all the time, by name.
        keeps_gradients: whole gradients stay as the backward pass makes them; else they go into ``buckets``.
        buckets: beside activations in a backward pass, where gradients are collected.
        accumulated: gradients of earlier micro-batches, during the passes of the others.
        reduction: at most, when the backward pass has ended and gradients go to the ranks they belong to.
        gradients: what is left of them until the optimizer step. step: at most in that step, with them.
        loading: on the host, while the first rank of a node reads the files.
    """

    name: str
    model: MetaModel
    resident: dict[str, Bytes] = field(default_factory=dict)
    keeps_gradients: bool = False
    buckets: int = 0
    accumulated: int = 0
    reduction: Bytes = Bytes()
    gradients: Bytes = Bytes()
    step: Bytes = Bytes()
    gathered: Gathered = Gathered()
    loading: int = 0

    @property
    def states(self) -> Bytes:
        return sum(self.resident.values(), Bytes())


def _gathered(model: MetaModel, zero: DeepSpeedZeroConfig) -> Gathered:
    """A weight is released after use unless it is used again within stage3_max_reuse_distance (1e9) elements
    (PartitionedParameterCoordinator.__params_to_release). In a training pass the last layers are used again soonest:
    half of that distance lies before them, so that smaller models are kept whole from forward to backward pass.
    """
    whole, ahead = model.sizes.whole, zero.prefetch_bucket_size + model.sizes.largest_layer
    elements = min(whole, zero.max_reuse_distance // 2 + ahead), min(whole, ahead), whole
    return Gathered(*(count * model.itemsize for count in elements))


def _is_offloaded(part) -> bool:
    return part is not None and part.device != "none"


def _place(size: int, on_host: bool) -> Bytes:
    return Bytes(host=size) if on_host else Bytes(device=size)


@dataclass(frozen=True)
class _Training:
    """An engine to be built with AdamW around a model in 16 or 32 bits; sizes that the rules of all stages name.

    Attributes:
        share: trained elements of one rank. bucket: elements that are reduced at a time. norm: bytes of the norm of
            gradients, which is taken in fp64, tensor by tensor. sum_item: bytes of an element of their sums.
    """

    name: str
    model: MetaModel
    zero: DeepSpeedZeroConfig
    machine: Machine
    accumulates: bool
    sum_item: int

    @property
    def offload(self) -> bool:
        return _is_offloaded(self.zero.offload_optimizer)

    @property
    def many(self) -> bool:
        return self.machine.ranks > 1

    @property
    def item(self) -> int:
        return self.model.itemsize

    @property
    def trained(self) -> int:
        return self.model.sizes.trained

    @property
    def share(self) -> int:
        return math.ceil(self.trained / self.machine.ranks)

    @property
    def bucket(self) -> int:
        return min(self.trained, self.zero.reduce_bucket_size)

    @property
    def norm(self) -> int:
        return 8 * self.model.sizes.largest_trained

    @property
    def fp32_share(self) -> int:
        """Bytes of the fp32 copy of a 16-bit share of gradients that Adam is given."""
        return 4 * self.share if self.sum_item == 2 else 0

    @property
    def parameters(self) -> Bytes:
        """Whole weights."""
        return Bytes(self.model.sizes.whole * self.item + self.model.sizes.packed_bytes)

    def states(self) -> dict[str, Bytes]:
        """The fp32 copy of a rank's share, which is made of fp32 weights too, and Adam's two moments."""
        return {
            "fp32 weights": _place(4 * self.share, self.offload),
            "optimizer states": _place(8 * self.share, self.offload),
        }


def trained_engine(name: str, model: MetaModel, ds_config: dict, machine: Machine, accumulation: int) -> EngineMemory:
    """An engine with AdamW, as DeepSpeed builds it around a model in 16 or 32 bits.

    On a CPU memory counts from its first use, so that a bucket takes what was written to it.
    """
    zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    sums_in_fp32 = ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    training = _Training(name, model, zero, machine, accumulation > 1, 4 if sums_in_fp32 else model.itemsize)
    if zero.stage == 0:
        return _stage_0(training)
    if zero.stage == 3:
        return _stage_3(training)
    return _stage_1_or_2_offloaded(training) if training.offload else _stage_1_or_2(training)


def _stage_0(training: _Training) -> EngineMemory:
    """fp32 only. Gradients whole; their reduction over several ranks copies them, up to 5e8 elements at a time
    (engine.buffered_allreduce_fallback)."""
    whole = training.trained * training.item
    copied = min(training.trained, 500_000_000 + training.model.sizes.largest_trained) * training.item * training.many
    return EngineMemory(
        training.name,
        training.model,
        {"parameters": training.parameters, "optimizer states": Bytes(8 * training.trained)},
        keeps_gradients=not training.accumulates,
        accumulated=whole if training.accumulates else 0,
        reduction=Bytes(whole + copied),
        gradients=Bytes(whole),
        step=Bytes(whole),
    )


def _collecting(training: _Training) -> tuple[int, int, int]:
    """Stages 1 and 2 (stage_1_and_2.py): gradients are copied into buckets of reduce_bucket_size elements (two with
    overlap_comm), and flattened again where there are several ranks (allreduce_bucket).

    Returns:
        bytes of the buckets, of the flat copy, and of whole weights that gloo's all_gather has for a moment.
    """
    room = (2 if training.zero.overlap_comm else 1) * training.zero.reduce_bucket_size
    on_cpu, many = training.machine.on_cpu, training.many
    buckets = (min(training.trained, room) if on_cpu else room) * training.item
    return buckets, training.bucket * training.item * many, training.trained * training.item * (on_cpu and many)


def _stage_1_or_2(training: _Training) -> EngineMemory:
    """Reduced gradients are copied out of the buckets (copy_grads_in_partition), flattened and cast to fp32 for the
    step."""
    buckets, flat, gathered = _collecting(training)
    left = training.share * training.sum_item
    accumulated = training.trained * training.item if training.zero.stage == 1 else left
    during = buckets
    if training.trained > training.zero.reduce_bucket_size:  # reduced, and shared out, while the backward pass goes on
        during += left + flat
    added = left if training.accumulates and training.zero.stage == 2 else 0
    return EngineMemory(
        training.name,
        training.model,
        {"parameters": training.parameters, **training.states()},
        keeps_gradients=training.machine.on_cpu and not training.accumulates,
        buckets=during,
        accumulated=accumulated if training.accumulates else 0,
        reduction=Bytes(buckets + flat + left + added),
        gradients=Bytes(left),
        step=Bytes(max(2 * left + training.fp32_share, left + training.norm, gathered)),
    )


def _stage_1_or_2_offloaded(training: _Training) -> EngineMemory:
    """fp32 gradients of a share stay on the host; the largest weight has a buffer on both sides."""
    buckets, flat, gathered = _collecting(training)
    left, largest = training.share * training.sum_item, training.model.sizes.largest_trained * training.item
    return EngineMemory(
        training.name,
        training.model,
        {
            "parameters": training.parameters,
            **training.states(),
            "gradients": Bytes(host=4 * training.share + (left if training.accumulates else 0)),
            "buffers": Bytes(largest, left + largest),
        },
        keeps_gradients=training.machine.on_cpu and not training.accumulates,
        buckets=buckets,
        reduction=Bytes(buckets + flat + training.norm),
        step=Bytes(gathered),
    )


def _stage_3(training: _Training) -> EngineMemory:
    """As stage 2, of shards (stage3.py): one bucket and a flat buffer of the shards of gradients, which both stay;
    reduce_scatter_coalesced rearranges a bucket into a copy, gloo's reduce_scatter makes another.

    With one rank and nothing on the host a shard is the weight itself.
    """
    model, zero, machine, item = training.model, training.zero, training.machine, training.item
    offload_weights = _is_offloaded(zero.offload_param)
    shard = training.share * training.sum_item
    reduction = training.bucket * item * (2 if machine.on_cpu else 1)
    reduced_early = training.trained > zero.reduce_bucket_size  # while the backward pass goes on
    sharded = training.many or (offload_weights and not machine.on_cpu)
    return EngineMemory(
        training.name,
        model,
        {
            "parameters": _place(math.ceil(model.sizes.whole / machine.ranks) * item, offload_weights),
            **training.states(),
            "gradients": Bytes(host=shard + 4 * training.share) if training.offload else Bytes(shard),
            "buffers": Bytes((training.bucket if machine.on_cpu else zero.reduce_bucket_size) * item),
        },
        buckets=reduction if reduced_early else 0,
        reduction=Bytes(reduction),
        step=Bytes(0 if training.offload else max(shard + training.fp32_share, training.norm // machine.ranks)),
        gathered=_gathered(model, zero) if sharded else Gathered(),
        loading=model.saved_bytes,  # transformers reads all files before it hands out the shards
    )


def frozen_engine(name: str, model: MetaModel, ds_config: dict, machine: Machine) -> EngineMemory:
    """An engine without an optimizer: weights alone, whole or (stage 3) sharded, perhaps on the host."""
    zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    size, on_host = model.sizes.whole, _is_offloaded(zero.offload_param)
    if zero.stage < 3:
        return EngineMemory(name, model, {"parameters": Bytes(size * model.itemsize)})
    sharded = machine.ranks > 1 or (on_host and not machine.on_cpu)
    return EngineMemory(
        name,
        model,
        {"parameters": _place(math.ceil(size / machine.ranks) * model.itemsize, on_host)},
        gathered=_gathered(model, zero) if sharded else Gathered(),
        loading=model.saved_bytes,
    )
