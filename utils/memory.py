"""How much memory a run will take, from configurations alone: no weight is read and no large tensor is made.

    config ──> the model on the meta device (shapes without numbers), LoRA and checkpointing as in the run
           ──> a forward and backward pass over it, counting the bytes that are alive   (activations, logits, KV cache)
           ──> what DeepSpeed 0.19.8 keeps of its weights at each ZeRO stage           (states, buffers, copies)
           ──> phases of a step, each with everything that is alive in it; the peak is the largest

All sizes are bytes on one rank. Model states are those of ZeRO (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054, section 3: 16-bit Adam keeps 2 + 2 + 12 bytes per parameter); buffers and copies are
what DeepSpeed's code allocates, named in ``trained_engine``.
"""

import ctypes
import itertools
import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM

from utils.distributed import HEAP_BLOCK, memory_given_back
from utils.ds_utils import TORCH_DTYPES, get_eval_ds_config, get_train_ds_config, merge_config_file, offloads_optimizer
from utils.model.inputs import embedding_rows, forward_accepts, model_inputs, packed_inputs
from utils.model.losses import _forward_replaced, _score_in_chunks
from utils.model.model_utils import configure_dropout
from utils.model.reward_model import RewardModel
from utils.module.fused_linear import find_shared_inputs
from utils.module.lora import (
    convert_linear_layer_to_lora,
    lora_layers,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.sampling import Decoding, choose, make_cache

GIB = 2**30
# Neither was measured here (no GPU): a CUDA context with cuBLAS and NCCL buffers, and a process with CUDA's libraries.
CUDA_BASELINE, CUDA_HOST_BASELINE = 1.0 * GIB, 4.0 * GIB


# ---------------------------------------------------------------- what is alive in a pass


class LiveBytes(TorchDispatchMode):
    """While open, counts the bytes of all storages that operations make, until they are freed.

    Args:
        known: tensors that are counted elsewhere (weights); their views cost nothing.

    Attributes:
        live, peak: bytes. heap_peak, mapped_peak: of storages below HEAP_BLOCK and of the others, each for itself.
        events: (number, bytes) of each storage below HEAP_BLOCK when it is made, (number, None) when it is freed.
    """

    def __init__(self, known=()):
        super().__init__()
        self._live = {True: 0, False: 0}  # is on the heap -> bytes
        self.peak = self.heap_peak = self.mapped_peak = 0
        self.events: list[tuple[int, int | None]] = []
        self._numbers = itertools.count()
        self._storages: dict[int, weakref.ref] = {}
        self._known = [tensor.untyped_storage() for tensor in known]
        self._known_ids = {id(storage) for storage in self._known}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0  # there are no numbers on the meta device; "are all tokens real?" is answered by no
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage) -> None:
        key = id(storage)
        if key in self._storages or key in self._known_ids:
            return
        size = storage.nbytes()

        on_heap, number = size < HEAP_BLOCK, next(self._numbers)

        def note(change: int | None) -> None:
            if on_heap:
                self.events.append((number, change))

        def freed(_):
            del self._storages[key]
            self._live[on_heap] -= size
            note(None)

        self._storages[key] = weakref.ref(storage, freed)
        self._live[on_heap] += size
        note(size)
        self.peak = max(self.peak, self.live)
        self.heap_peak = max(self.heap_peak, self._live[True])
        self.mapped_peak = max(self.mapped_peak, self._live[False])

    @property
    def live(self) -> int:
        return sum(self._live.values())

    def memory(self, kept: int, unpacked: int = 0) -> "PassMemory":
        """``unpacked``: bytes of a matrix that comes and goes unseen."""
        on_heap = unpacked if unpacked < HEAP_BLOCK else 0
        mapped = self.mapped_peak + unpacked - on_heap
        return PassMemory(kept, self.peak + unpacked, self.heap_peak + on_heap, mapped, self.events)


class _Attention(torch.autograd.Function):
    """What a fused attention kernel takes and keeps, whatever the device: no [length, length] table of scores."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, _gradient):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def _fused_attention():
    """On the meta device torch would take its attention apart into matrix products; while open, it does not."""

    def attention(query, key, value, attn_mask=None, **_options):
        # Kernels take an additive mask in the dtype of the query: made anew in each layer, kept for the backward pass.
        return _Attention.apply(query, key, value, None if attn_mask is None else attn_mask.to(query.dtype))

    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@dataclass(frozen=True)
class PassMemory:
    """Bytes beside weights: ``kept`` from a forward pass for its backward pass, ``peak`` of both.

    ``heap`` and ``mapped`` are the peaks of small and of large blocks, which need not come at the same time: on a CPU
    the C library keeps what was freed of the first and gives the second back. ``events``: see ``LiveBytes``.
    """

    kept: int
    peak: int
    heap: int
    mapped: int
    events: list = field(default_factory=list, compare=False, repr=False)


def heap_footprint(passes: list[list], states: list[int], repeats: int = 3) -> int | None:
    """How far glibc's heap grows when it serves the small blocks of a step, over and over; None without glibc.

    Blocks of one size do not fill the holes that blocks of another have left, so that a heap is larger than what lives
    in it. How much larger is asked of the C library itself: it is given the very requests, in their order, aligned as
    torch asks for them. Nothing is written into the blocks, so that they cost no memory here.

    Args:
        passes: ``events`` of the passes of a step, in their order.
        states: bytes of blocks that appear after the first step and stay (Adam's moments of single tensors).

    Returns:
        bytes, ``states`` not counted.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.sbrk.restype = ctypes.c_size_t  # where the heap ends
    libc.free.argtypes = [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]

    def take(size: int) -> ctypes.c_void_p:
        block = ctypes.c_void_p()
        if libc.posix_memalign(ctypes.byref(block), 64, size):
            raise MemoryError(size)
        return block

    with memory_given_back():
        pass  # leaves glibc as it is in training, its free memory given back
    start = peak = libc.sbrk(0)
    stay = []
    for repeat in range(repeats):
        for events in passes:
            alive = {}
            for number, size in events:
                if size is None:
                    block = alive.pop(number, None)
                    if block is not None:
                        libc.free(block)
                elif size:
                    alive[number] = take(size)
                    peak = max(peak, libc.sbrk(0))
            for block in alive.values():
                libc.free(block)
        if repeat == 0:
            stay = [take(size) for size in states]
    for block in stay:
        libc.free(block)
    libc.malloc_trim(0)
    return max(0, peak - start - sum(states))


# ---------------------------------------------------------------- a model without numbers


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's weights."""

    trained: int
    frozen: int  # without those that are packed
    packed: int  # weights of QLoRA
    packed_bytes: int
    largest_trained: int  # one tensor
    largest_layer: int  # the weights of one module of ZeRO-3's gathering

    @property
    def whole(self) -> int:
        return self.trained + self.frozen

    @property
    def total(self) -> int:
        return self.whole + self.packed


class MetaModel:
    """A model of a step as it will train, on the meta device.

    Args:
        config: of transformers; it is not changed.
        kind: "causal" or "reward".
        dtype: "fp16", "bf16" or "fp32".
        lora: {module_name, dim, scaling, dropout}, or None; only_lora: freeze the rest.
        keep_trainable: as in ``only_optimize_lora_parameters``.
        quantize: None, "nf4" or "int8"; double: nf4's scales packed too.
        tokenizer_size: entries; the embedding grows to hold them.
        wrap: makes the model that trains of the bare one (a soft prompt).

    Raises:
        UserError: a LoRA scope that matches nothing.
    """

    def __init__(
        self,
        config,
        kind: str,
        dtype: str,
        *,
        lora: dict | None = None,
        only_lora: bool = False,
        keep_trainable=(),
        quantize: str | None = None,
        double: bool = True,
        dropout: float | None = None,
        attn_implementation: str | None = None,
        tokenizer_size: int = 0,
        trains: bool = True,
        trust_remote_code: bool = False,
        wrap: Callable | None = None,
    ):
        self.kind, self.dtype, self.trains = kind, TORCH_DTYPES[dtype], trains
        config = type(config).from_dict(config.to_dict()) if not trust_remote_code else config
        text = config.get_text_config()
        if tokenizer_size > text.vocab_size:
            text.vocab_size = 8 * math.ceil(tokenizer_size / 8)
        configure_dropout(config, dropout)
        # What FlashAttention keeps is what SDPA keeps, but it needs a GPU to be chosen.
        attention = "sdpa" if attn_implementation == "flash_attention_2" else attn_implementation
        options = {"dtype": self.dtype, "trust_remote_code": trust_remote_code}
        options |= {} if attention is None else {"attn_implementation": attention}
        auto_class = AutoModelForCausalLM if kind == "causal" else AutoModel
        with torch.device("meta"):
            model = auto_class.from_config(config, **options)
            if kind == "reward":
                model = RewardModel(model, SimpleNamespace(pad_token_id=0))
            if wrap is not None:
                model = wrap(model)
            if lora is not None:
                convert_linear_layer_to_lora(model, lora["module_name"], lora["dim"], lora["scaling"], lora["dropout"])
                if only_lora:
                    only_optimize_lora_parameters(model, keep_trainable)
        if not trains:
            model.requires_grad_(False)
        self.model, self.adapts = model, lora is not None
        self.adapted = [layer for _, layer in lora_layers(model)]
        self.quantize, self.double = quantize, double
        self.sizes = self._sizes()
        self._passes: dict[tuple, PassMemory] = {}

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def _sizes(self) -> Sizes:
        packed, packed_bytes = 0, 0
        packed_ids = set()
        for layer in self.adapted if self.quantize else ():
            size = layer.weight.numel()
            rows = layer.weight.shape[1 if layer.transposed else 0]
            packed, packed_bytes = packed + size, packed_bytes + packed_size(self.quantize, self.double, size, rows)
            packed_ids.add(id(layer.weight))
        parameters = [p for p in self.model.parameters() if id(p) not in packed_ids]
        trained = [p.numel() for p in parameters if p.requires_grad]
        layers = [sum(p.numel() for p in module.parameters(recurse=False)) for module in self.model.modules()]
        return Sizes(
            trained=sum(trained),
            frozen=sum(p.numel() for p in parameters) - sum(trained),
            packed=packed,
            packed_bytes=packed_bytes,
            largest_trained=max(trained, default=0),
            largest_layer=max(layers),
        )

    @property
    def unpacked_bytes(self) -> int:
        """Of the one matrix that a product with packed weights unpacks (int8: by way of an fp32 one)."""
        largest = max((layer.weight.numel() for layer in self.adapted), default=0) if self.quantize else 0
        return largest * (self.itemsize + (4 if self.quantize == "int8" else 0))

    @property
    def folded_bytes(self) -> int:
        """Copies of the matrices that LoRA is folded into."""
        return sum(layer.weight.numel() for layer in self.adapted) * self.itemsize

    def fused_bytes(self) -> int:
        """Copies that fused_linear.py makes on a CPU: of layers that share an input, in 16 bits of all layers."""
        with LiveBytes(), _fused_attention():
            for layer in self.adapted:
                layer._base_weight = layer.weight.data  # marks it as folded
            try:
                groups = find_shared_inputs(self.model)
            finally:
                for layer in self.adapted:
                    layer._base_weight = None
        modules = dict(self.model.named_modules())
        names = [name for group in groups if len(group) > 1 or self.itemsize == 2 for name in group]
        return sum(modules[name].weight.numel() for name in names) * self.itemsize

    # ------------------------------------------------------------ passes

    def training(
        self,
        rows: int,
        length: int,
        checkpointing: bool,
        keep_gradients: bool = False,
        labels: int | None = None,
        packed: bool = False,
    ) -> PassMemory:
        """A forward and backward pass over [rows, length] tokens.

        Args:
            keep_gradients: the gradients of weights stay (and count); otherwise they are taken away as they come.
            labels: tokens of a row that are scored, with their entropy; None for all, without.
            packed: rows hold several segments.
        """
        key = ("train", rows, length, checkpointing, keep_gradients, labels, packed)
        return self._cached(key, lambda: self._train(rows, length, checkpointing, keep_gradients, labels, packed))

    def looking(self, rows: int, length: int, labels: int | None = None, packed: bool = False) -> PassMemory:
        """A forward pass without gradients, over [rows, length] tokens; arguments as in ``training``."""
        return self._cached(("look", rows, length, labels, packed), lambda: self._look(rows, length, labels, packed))

    def generating(self, rows: int, prompt: int, answer: int) -> PassMemory:
        """Reading [rows, prompt] tokens into a KV cache for ``answer`` more; ``kept`` is the cache."""
        return self._cached(("generate", rows, prompt, answer), lambda: self._generate(rows, prompt, answer))

    def _cached(self, key: tuple, run: Callable) -> PassMemory:
        if key not in self._passes:
            self._passes[key] = run()
        return self._passes[key]

    def _inputs(self, rows: int, length: int, packed: bool) -> dict:
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        if packed:
            return packed_inputs(self.model, {"input_ids": ids, "segment_ids": ids, "position_ids": ids})
        bare = self.model.rwtransformer if self.kind == "reward" else self.model
        return model_inputs(bare, ids, torch.ones_like(ids))

    def _forward(self, inputs: dict, labels: int | None) -> torch.Tensor:
        if self.kind == "reward":
            return self.model.v_head(self.model.rwtransformer(**inputs).last_hidden_state)
        head, rows = self.model.get_output_embeddings(), embedding_rows(self.model)
        own = head.forward

        def scoring_head(states):  # as LabelLogProbs, which would ask where the labels are
            states = states[:, -(labels or states.shape[1]) :].flatten(0, 1).clone()
            targets = torch.zeros(len(states), dtype=torch.long, device="meta")
            parts = states, targets, lambda part: own(part).float(), rows, 1.0, labels is not None
            return _score_in_chunks(*parts).unsqueeze(0)

        with _forward_replaced(head, scoring_head):
            return self.model(**inputs).logits

    def _weights(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @contextmanager
    def _checkpointing(self):
        model = self.model.rwtransformer if self.kind == "reward" else getattr(self.model, "base_model", self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename these methods
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.adapts:
            make_model_gradient_checkpointing_compatible(model)
        try:
            yield
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_disable()
            if self.adapts:
                model.disable_input_require_grads()

    def _train(self, rows, length, checkpointing, keep_gradients, labels, packed) -> PassMemory:
        model = self.model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        handles = []
        if not keep_gradients:
            handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
        try:
            with (
                self._checkpointing() if checkpointing else nullcontext(),
                _fused_attention(),
                LiveBytes(self._weights()) as bytes_,
            ):
                result = self._forward(self._inputs(rows, length, packed), labels)
                kept = bytes_.live
                result.sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            for p in trained:
                p.grad = None
        return bytes_.memory(kept, self.unpacked_bytes)

    @torch.no_grad()
    def _look(self, rows, length, labels, packed) -> PassMemory:
        self.model.eval()
        with _fused_attention(), LiveBytes(self._weights()) as bytes_:
            self._forward(self._inputs(rows, length, packed), labels)
        return bytes_.memory(0, self.unpacked_bytes)

    @torch.no_grad()
    def _generate(self, rows, prompt, answer) -> PassMemory:
        model = self.model.eval()
        rows_of_embedding = embedding_rows(model)
        with _fused_attention(), LiveBytes(self._weights()) as bytes_:
            cache = make_cache(model, prompt + answer)
            inputs = self._inputs(rows, prompt, packed=False) | {"past_key_values": cache, "use_cache": True}
            inputs |= {"logits_to_keep": 1} if forward_accepts(model, "logits_to_keep") else {}
            logits = model(**inputs).logits[:, -1]
            decoding = Decoding(answer, 0, 0, rows_of_embedding)
            choose(logits, decoding, torch.zeros(rows, dtype=torch.float64, device="meta"))
            del logits, inputs
            kept = bytes_.live
        return bytes_.memory(kept)


def packed_size(kind: str, double: bool, weights: int, rows: int) -> int:
    """Bytes of a packed matrix, as module/quantize.py keeps it.

    nf4: half a byte each and an fp32 scale per 64, or with ``double`` a byte per 64 and an fp32 scale per 256 of those
    (QLoRA, https://arxiv.org/abs/2305.14314, section 3). int8: a byte each and an fp32 scale per row.
    """
    if kind == "int8":
        return weights + 4 * rows
    blocks = math.ceil(weights / 64)
    return math.ceil(weights / 2) + (blocks + 4 * math.ceil(blocks / 256) if double else 4 * blocks)


# ---------------------------------------------------------------- what DeepSpeed keeps


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


# ---------------------------------------------------------------- phases of a step


@dataclass(frozen=True)
class Phase:
    """A moment of a run.

    Args:
        extra: bytes of one rank beside what is always there. once: bytes of one rank of a node alone.
        passing: of a pass in it, counted in ``extra``.
    """

    name: str
    extra: Bytes
    once: int = 0
    passing: PassMemory = PassMemory(0, 0, 0, 0)

    @property
    def mapped(self) -> int:
        """Bytes of ``extra`` in large blocks."""
        return self.extra.device + self.extra.host - self.passing.peak + self.passing.mapped


@dataclass
class Estimate:
    """What a step will take on one rank of a machine.

    Attributes:
        activations: engine -> (kept without checkpointing, kept with it, whether the run checkpoints); 0: unknown.
        details: engine -> {name: bytes}, parts of phases that a reader wants to see: KV cache, copies, logits.
    """

    machine: Machine
    engines: list[EngineMemory]
    phases: list[Phase]
    activations: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    details: dict[str, dict[str, int]] = field(default_factory=dict)

    def at(self, phase: Phase) -> Bytes:
        """All bytes of a rank in a phase."""
        return sum((engine.always for engine in self.engines), self.machine.baseline) + phase.extra

    def needs(self, phase: Phase) -> tuple[int, int]:
        """(bytes of a device, bytes of a node's host memory); on a CPU the first is a rank's share of the second."""
        total = self.at(phase)
        if self.machine.on_cpu:
            rank = total.device + total.host
            return rank, rank * self.machine.ranks_per_node + phase.once
        return total.device, total.host * self.machine.ranks_per_node + phase.once

    @cached_property
    def kept_by_heap(self) -> int:
        """On a CPU: bytes of small blocks that were freed, and of holes between them, while the large ones are at their
        peak: the heap, from which glibc serves blocks below HEAP_BLOCK, hardly ever shrinks."""
        if not self.machine.on_cpu:
            return 0
        states = [size for engine in self.engines for size in engine.small_states]
        heap = heap_footprint([phase.passing.events for phase in self.phases], states)
        if heap is None:
            heap = max(phase.passing.heap for phase in self.phases)
        mapped = max(phase.mapped for phase in self.phases)
        live = max(phase.extra.device + phase.extra.host for phase in self.phases)
        return max(0, heap + mapped - live)

    @property
    def device_peak(self) -> tuple[int, str]:
        """(bytes, name of the phase)."""
        size, name = max((self.needs(phase)[0], phase.name) for phase in self.phases)
        return size + self.kept_by_heap, name

    @property
    def host_peak(self) -> tuple[int, str]:
        size, name = max((self.needs(phase)[1], phase.name) for phase in self.phases)
        return size + self.kept_by_heap * self.machine.ranks_per_node, name

    @property
    def fits(self) -> bool:
        host = self.machine.host is None or self.host_peak[0] <= self.machine.host
        return host and (self.machine.on_cpu or self.device_peak[0] <= self.machine.device)


def _pass_phases(engine: EngineMemory, name: str, passing: PassMemory, more: Bytes = Bytes()) -> list[Phase]:
    """The phases of a training pass: its own, and the reduction of gradients after it. ``more``: there meanwhile."""
    arriving = 0 if engine.collects else engine.arriving
    during = passing.peak + engine.waiting + engine.gather_training + arriving
    return [
        Phase(f"{name}: forward and backward", Bytes(during) + more, passing=passing),
        Phase(f"{name}: gradients reduced", engine.reduced + more),
    ]


def _loading_phase(engines: list[EngineMemory]) -> list[Phase]:
    """Only weights are there yet; the phase takes everything else that is always there off again."""
    files = max((engine.loading.host for engine in engines), default=0)
    if not files:
        return []
    later = sum((size for engine in engines for part, size in engine.resident.items() if part != "parameters"), Bytes())
    return [Phase("loading (the first rank)", Bytes(-later.device, -later.host), files)]


def _config_of_engine(args, stage: int, overrides=True, **options) -> dict:
    offload = args.offload and stage > 0
    config = get_train_ds_config(offload, args.dtype, stage, **options)
    return merge_config_file(config, args.deepspeed_config_overrides) if overrides else config


def _lora_options(args, prefix: str = "") -> dict:
    dim = getattr(args, f"{prefix}lora_dim")
    if dim == 0:
        return {}
    names = {"module_name": "lora_module_name", "scaling": "lora_scaling", "dropout": "lora_dropout"}
    lora = {key: getattr(args, prefix + name) for key, name in names.items()} | {"dim": dim}
    return {"lora": lora, "only_lora": args.only_optimize_lora}


def models_of_step(args, step: int, configs: dict, tokenizer=None) -> dict[str, MetaModel]:
    """The models of a step, by engine.

    Args:
        args: the step's arguments, checked.
        configs: configurations of transformers, by "model", or "actor" and "critic".
        tokenizer: the embedding grows to hold it, if it is given.

    Raises:
        UserError: a LoRA scope that matches nothing.
    """
    common = dict(
        attn_implementation=args.attn_implementation,
        tokenizer_size=0 if tokenizer is None else len(tokenizer),
        trust_remote_code=args.trust_remote_code,
    )
    if step < 3:
        common |= {"dropout": args.dropout, "quantize": args.quantize, "double": args.quantize_double}
        kind, keep = ("causal", ()) if step == 1 else ("reward", ("v_head.weight",))
        if getattr(args, "soft_prompt", None) is not None:
            from utils.model.soft_prompt import make_soft_prompt_model

            common["wrap"] = lambda model: make_soft_prompt_model(model, tokenizer, args)
        return {
            "model": MetaModel(configs["model"], kind, args.dtype, keep_trainable=keep, **_lora_options(args), **common)
        }
    common["dropout"] = 0.0
    models = {
        "actor": MetaModel(
            configs["actor"], "causal", args.dtype, **_lora_options(args, "actor_"), **common | _dropout(args, "actor")
        )
    }
    if args.separate_ref:
        models["reference"] = MetaModel(configs["actor"], "causal", args.dtype, trains=False, **common)
    if args.enable_ema:
        lora = _lora_options(args, "actor_")
        models["EMA"] = MetaModel(configs["actor"], "causal", "fp32", trains=False, **lora, **common)
    if args.advantage_estimator == "gae":
        lora = _lora_options(args, "critic_")
        options = common | _dropout(args, "critic")
        models["critic"] = MetaModel(
            configs["critic"], "reward", args.dtype, keep_trainable=("v_head.weight",), **lora, **options
        )
    if args.reward_model_weight:
        models["reward"] = MetaModel(configs["critic"], "reward", args.dtype, trains=False, **common)
    return models


def _dropout(args, name: str) -> dict:
    return {"dropout": getattr(args, f"{name}_dropout") or 0.0}


def engines_of_step(args, step: int, models: dict[str, MetaModel], machine: Machine) -> dict[str, EngineMemory]:
    """The engines of a step by name, with what they keep all the time; arguments as for ``estimate``."""
    accumulation = args.gradient_accumulation_steps
    if step < 3:
        config = _config_of_engine(args, args.zero_stage)
        return {"model": trained_engine("model", models["model"], config, machine, accumulation)}
    if args.unsupervised_dataset_name:
        accumulation = max(2, accumulation)  # the ptx pass adds to the gradients of the policy's
    stage = {"actor": args.actor_zero_stage, "critic": args.critic_zero_stage}
    frozen = {
        "reference": (stage["actor"], args.offload_reference_model, args.dtype),
        "EMA": (stage["actor"], False, "fp32"),
        "reward": (stage["critic"], args.offload_reward_model, args.dtype),
    }
    engines = {}
    for name, model in models.items():
        if name in stage:
            config = _config_of_engine(args, stage[name])
            engines[name] = trained_engine(name, model, config, machine, accumulation)
        else:
            of_trained, offload, dtype = frozen[name]
            config = get_eval_ds_config(offload, dtype, 3 if of_trained == 3 or offload else 0)
            engines[name] = frozen_engine(name, model, config, machine)
    return engines


def states_alone(engines: dict[str, EngineMemory], machine: Machine) -> Estimate:
    """What the engines keep all the time: quickly known, and less than a run takes."""
    return Estimate(machine, list(engines.values()), [Phase("weights and states alone", Bytes())])


def estimate(args, step: int, models: dict[str, MetaModel], machine: Machine, both_ways: bool = False) -> Estimate:
    """The memory of a step.

    Args:
        args: the step's arguments, checked. models: of ``models_of_step``.
        both_ways: fill in what passes would keep with checkpointing turned the other way, too.
    """
    engines = engines_of_step(args, step, models, machine)
    result = Estimate(machine, list(engines.values()), _loading_phase(list(engines.values())))
    (_add_supervised if step < 3 else _add_rlhf)(result, engines, args, step, both_ways)
    return result


def _training_pass(result: Estimate, engine: EngineMemory, checkpointing: bool, both_ways: bool, **shape) -> PassMemory:
    """A pass of an engine's model, noted in ``result``."""
    model = engine.model
    passing = model.training(**shape, checkpointing=checkpointing, keep_gradients=engine.collects)
    kept = {checkpointing: passing.kept}
    if both_ways:
        kept[not checkpointing] = model.training(**shape, checkpointing=not checkpointing).kept
    result.activations[engine.name] = (kept.get(False, 0), kept.get(True, 0), checkpointing)
    result.details.setdefault(engine.name, {})["activations, at most"] = passing.peak
    result.details[engine.name]["whole weights (ZeRO-3)"] = engine.gather_training
    return passing


def _add_supervised(result: Estimate, engines: dict[str, EngineMemory], args, step: int, both_ways: bool) -> None:
    engine, length, packed = engines["model"], args.max_seq_len, getattr(args, "packing", False)
    per_row = 1 if step == 1 else 2  # a pair is two rows
    shape = dict(rows=per_row * args.per_device_train_batch_size, length=length, packed=packed)
    passing = _training_pass(result, engine, args.gradient_checkpointing, both_ways, **shape)
    looking = engine.model.looking(per_row * args.per_device_eval_batch_size, length)
    result.phases += [
        Phase("evaluation", Bytes(looking.peak + engine.gather_looking), passing=looking),
        *_pass_phases(engine, "training", passing),
        Phase("optimizer step", engine.step),
    ]


def _add_rlhf(result: Estimate, engines: dict[str, EngineMemory], args, step: int, both_ways: bool) -> None:
    prompt, answer, generated = args.max_prompt_seq_len, args.max_answer_seq_len, args.per_device_generation_batch_size
    length, trained_rows, phases = prompt + answer, args.per_device_training_batch_size, result.phases
    actor = engines["actor"]
    copies = _generation_copies(args, actor, result.machine)
    cache = actor.model.generating(generated, prompt, answer)
    phases.append(Phase("generation", Bytes(cache.peak + sum(copies.values())), passing=cache))
    result.details["actor"] = {"KV cache": cache.kept} | {f"generation: {name}": n for name, n in copies.items()}
    for name, engine in engines.items():
        if name != "EMA":
            looking = engine.model.looking(generated, length, answer if engine.model.kind == "causal" else None)
            seen = Bytes(looking.peak + engine.gather_looking)
            phases.append(Phase(f"{name}: looks at the answers", seen, passing=looking))

    trained = [engines[name] for name in ("actor", "critic") if name in engines]
    left = Bytes()  # gradients of engines whose backward pass has ended
    for engine in trained:
        checkpointing = getattr(args, f"{engine.name}_gradient_checkpointing")
        labels = answer if engine is actor else None
        shape = dict(rows=trained_rows, length=length, labels=labels)
        passing = _training_pass(result, engine, checkpointing, both_ways, **shape)
        if engine is actor and args.unsupervised_dataset_name:
            text = actor.model.training(trained_rows, length, checkpointing)
            passing = max(passing, text, key=lambda memory: memory.peak)
        phases += _pass_phases(engine, engine.name, passing, left)
        left += engine.gradients
    for engine in trained:
        left = Bytes(left.device - engine.gradients.device, left.host - engine.gradients.host)
        phases.append(Phase(f"{engine.name}: optimizer step", engine.step + left))


def _generation_copies(args, actor: EngineMemory, machine: Machine) -> dict[str, int]:
    """Weights that a generation phase has beside the engine's own, by name: bytes."""
    sharded = args.actor_zero_stage == 3
    own_engine = args.enable_hybrid_engine and args.hybrid_engine_backend != "deepspeed"
    whole = own_engine and not args.unpin_actor_parameters
    copies = {"whole weights (ZeRO-3)": actor.gather_whole if whole else actor.gather_looking}
    if own_engine and (whole or not sharded):
        copies["folded LoRA"] = actor.model.folded_bytes
        if machine.on_cpu and args.hybrid_engine_backend in ("auto", "own"):
            copies["fused weights"] = actor.model.fused_bytes()
    return copies
