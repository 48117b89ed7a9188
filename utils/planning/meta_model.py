import ctypes
import itertools
import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM

from utils.ds_utils import TORCH_DTYPES
from utils.generation.sampling import Decoding, choose, make_cache
from utils.model.inputs import embedding_rows, forward_accepts, model_inputs, packed_inputs
from utils.model.losses import score_in_chunks
from utils.model.model_utils import configure_dropout
from utils.model.reward_model import RewardModel
from utils.module.fused_linear import find_shared_inputs
from utils.module.hooks import forward_replaced
from utils.module.lora import (
    convert_linear_layer_to_lora,
    lora_layers,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.process.host_memory import HEAP_BLOCK, memory_given_back


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
            return score_in_chunks(*parts).unsqueeze(0)

        with forward_replaced(head, scoring_head):
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
