"""What a pass over a model keeps alive, counted on the meta device: tensors there have shapes, but no numbers.

A forward and backward pass runs as in training, operation by operation; ``LiveBytes`` adds up the bytes of each result
while it lives. So activations, logits and KV caches of any family are counted without a weight being read.
"""

import copy
import functools
import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM

from utils.ds_utils import TORCH_DTYPES
from utils.generation.sampling import Decoding, choose, make_cache
from utils.model.inputs import (
    cache_argument,
    embedding_rows,
    forward_accepts,
    model_inputs,
    packed_inputs,
    packing_ways,
)
from utils.model.losses import score_in_chunks
from utils.model.model_utils import configure_dropout
from utils.model.packing import REFUSALS
from utils.model.reward_model import RewardModel
from utils.module.fused_linear import find_shared_inputs
from utils.module.hooks import forward_replaced
from utils.module.lora import (
    convert_linear_layer_to_lora,
    describe_left_out,
    lora_layers,
    make_model_gradient_checkpointing_compatible,
    only_optimize_lora_parameters,
)
from utils.module.quantize import Packing, packed_size
from utils.process.errors import UserError


class LiveBytes(TorchDispatchMode):
    """While open, counts the bytes of all storages that operations make, until they are freed.

    Args:
        known: tensors that are counted elsewhere (weights); their views cost nothing.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no other storage gets their ids
        self._known_ids = {id(storage) for storage in self._known}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0  # there are no numbers on the meta device; "are all tokens real?" is answered by no
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._storages or key in self._known_ids:
            return

        def freed(_):
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


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
    """Bytes beside weights: ``kept`` from a forward pass for its backward pass, ``peak`` of both."""

    kept: int
    peak: int


@dataclass(frozen=True)
class LoRASpec:
    """LoRA as ``convert_linear_layer_to_lora`` takes it; ``freezes_rest``: but for a value head, only it trains."""

    module_name: str
    dim: int
    scaling: float
    dropout: float
    freezes_rest: bool


@dataclass(frozen=True)
class ModelSpec:
    """A model of a step, as the flags of the step describe it.

    Args:
        config: of transformers; it is not changed.
        kind: "causal" or "reward".
        dtype: "fp16", "bf16" or "fp32".
        packing: of the frozen weights under LoRA (QLoRA); None: they are not packed.
        dropout: every dropout probability of the model; None for its own.
        tokenizer_size: entries; the embedding grows to hold them.
        trains: else all of it is frozen.
        wrap: makes the model that trains of the bare one (a soft prompt).
    """

    config: object
    kind: str
    dtype: str
    lora: LoRASpec | None = None
    packing: Packing | None = None
    dropout: float | None = None
    attn_implementation: str | None = None
    tokenizer_size: int = 0
    trains: bool = True
    trust_remote_code: bool = False
    wrap: Callable[[nn.Module], nn.Module] | None = None


def build_on_meta(spec: ModelSpec) -> tuple[nn.Module, str | None]:
    """The model as it trains, without numbers; and what LoRA leaves out of it, where that is to be said.

    Raises:
        UserError: a LoRA scope that matches nothing.
    """
    config = copy.deepcopy(spec.config)
    text = config.get_text_config()
    if spec.tokenizer_size > text.vocab_size:
        text.vocab_size = 8 * math.ceil(spec.tokenizer_size / 8)
    configure_dropout(config, spec.dropout)
    options = {"dtype": TORCH_DTYPES[spec.dtype], "trust_remote_code": spec.trust_remote_code}
    if spec.attn_implementation is not None:
        # What FlashAttention keeps is what SDPA keeps, but it needs a GPU to be chosen.
        is_flash = spec.attn_implementation == "flash_attention_2"
        options["attn_implementation"] = "sdpa" if is_flash else spec.attn_implementation
    left_out = None
    auto_class = AutoModelForCausalLM if spec.kind == "causal" else AutoModel
    with torch.device("meta"):
        model = auto_class.from_config(config, **options)
        if spec.kind == "reward":
            model = RewardModel(model, SimpleNamespace(pad_token_id=0))
        if spec.wrap is not None:
            model = spec.wrap(model)
        if spec.lora is not None:
            lora = spec.lora
            left_out = describe_left_out(model, lora.module_name)
            convert_linear_layer_to_lora(model, lora.module_name, lora.dim, lora.scaling, lora.dropout)
            if lora.freezes_rest:
                only_optimize_lora_parameters(model, ("v_head.weight",) if spec.kind == "reward" else ())
    return (model if spec.trains else model.requires_grad_(False)), left_out


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's weights."""

    trained: int
    frozen: int  # without those that are packed
    packed: int  # weights of QLoRA
    packed_bytes: int
    largest_trained: int  # one tensor
    largest_layer: int  # the weights of one module, which ZeRO-3 gathers at once

    @property
    def whole(self) -> int:
        return self.trained + self.frozen

    @property
    def total(self) -> int:
        return self.whole + self.packed


def _once(run_pass):
    """A pass of the same shape is counted once per model: a plan asks for it over and over."""

    @functools.wraps(run_pass)
    def remembered(self, *shape, **options):
        key = (run_pass.__name__, shape, tuple(sorted(options.items())))
        if key not in self._passes:
            self._passes[key] = run_pass(self, *shape, **options)
        return self._passes[key]

    return remembered


class MetaModel:
    """A model of a step on the meta device, its sizes, and what its passes take.

    Attributes:
        model, left_out: see ``build_on_meta``. adapted: its LoRA layers. sizes: of its weights.
    """

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.model, self.left_out = build_on_meta(spec)
        self.adapted = [layer for _, layer in lora_layers(self.model)]
        self.sizes = self._sizes()
        self._passes: dict[tuple, PassMemory] = {}

    @property
    def itemsize(self) -> int:
        return TORCH_DTYPES[self.spec.dtype].itemsize

    @property
    def saved_bytes(self) -> int:
        """Of all weights in the model's dtype, as its files hold them."""
        return self.sizes.total * self.itemsize

    def _sizes(self) -> Sizes:
        packed = {id(layer.weight): layer for layer in self.adapted if self.spec.packing}
        shapes = [(layer.weight.T if layer.transposed else layer.weight).shape for layer in packed.values()]
        parameters = [p for p in self.model.parameters() if id(p) not in packed]
        trained = [p.numel() for p in parameters if p.requires_grad]
        layers = [sum(p.numel() for p in module.parameters(recurse=False)) for module in self.model.modules()]
        return Sizes(
            trained=sum(trained),
            frozen=sum(p.numel() for p in parameters) - sum(trained),
            packed=sum(rows * columns for rows, columns in shapes),
            packed_bytes=sum(packed_size(self.spec.packing, rows, columns) for rows, columns in shapes),
            largest_trained=max(trained, default=0),
            largest_layer=max(layers),
        )

    @property
    def unpacked_bytes(self) -> int:
        """Of the one matrix that a product with packed weights unpacks (int8: by way of an fp32 one)."""
        packing = self.spec.packing
        if packing is None:
            return 0
        item = packing.compute_dtype.itemsize + (4 if packing.kind == "int8" else 0)
        return max(layer.weight.numel() for layer in self.adapted) * item

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Numbers that a token's queries, and its keys, have in a layer; 0 without attention."""
        text = self.spec.config.get_text_config()
        heads = getattr(text, "num_attention_heads", None) or 0
        if not heads:
            return 0, 0
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return heads * head_dim, (getattr(text, "num_key_value_heads", None) or heads) * head_dim

    @property
    def folded_bytes(self) -> int:
        """Copies of the matrices that LoRA is folded into."""
        return sum(layer.weight.numel() for layer in self.adapted) * self.itemsize

    def fused_bytes(self) -> int:
        """Copies that fused_linear.py makes on a CPU that gains by them: of all linear layers."""
        with LiveBytes(), _fused_attention():
            for layer in self.adapted:
                layer.fuse_lora_weight()
            try:
                groups = find_shared_inputs(self.model)
            finally:
                for layer in self.adapted:
                    layer.unfuse_lora_weight()
        modules = dict(self.model.named_modules())
        return sum(modules[name].weight.numel() for group in groups for name in group) * self.itemsize

    @_once
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
            packed: rows hold several segments. Which way of keeping them apart is right is found at the start of a run,
                with numbers; here the dearest counts of those that the model takes.
        """
        if not packed:
            return self._training(lambda: self._inputs(rows, length), checkpointing, keep_gradients, labels)
        passes, refusals = [], []
        for way in packing_ways(self.model):
            inputs = functools.partial(self._packed_inputs, rows, length, way)
            try:
                passes.append(self._training(inputs, checkpointing, keep_gradients, labels))
            except REFUSALS as error:
                refusals.append(f"by {way}, {error}")
        if not passes:
            raise UserError(f"--packing: {type(self.model).__name__} takes no packed rows ({'; '.join(refusals)})")
        return PassMemory(max(one.kept for one in passes), max(one.peak for one in passes))

    def _training(
        self, inputs: Callable[[], dict], checkpointing: bool, keep_gradients: bool, labels: int | None
    ) -> PassMemory:
        model = self.model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        handles = []
        if not keep_gradients:
            handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
        try:
            with self._checkpointing() if checkpointing else nullcontext(), self._counting() as counted:
                result = self._forward(inputs(), labels)
                kept = counted.live
                result.sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            for p in trained:
                p.grad = None
        return PassMemory(kept, counted.peak + self.unpacked_bytes)

    @_once
    @torch.no_grad()
    def scoring(self, rows: int, length: int, labels: int | None = None) -> PassMemory:
        """A forward pass without gradients over [rows, length] tokens: log-probs of labels, or values."""
        self.model.eval()
        with self._counting() as counted:
            self._forward(self._inputs(rows, length), labels)
        return PassMemory(0, counted.peak + self.unpacked_bytes)

    @_once
    @torch.no_grad()
    def generating(self, rows: int, prompt: int, answer: int) -> PassMemory:
        """Reading [rows, prompt] tokens into a KV cache for ``answer`` more; ``kept`` is the cache."""
        model = self.model.eval()
        rows_of_embedding = embedding_rows(model)
        with self._counting() as counted:
            cache = make_cache(model, prompt + answer)
            inputs = self._inputs(rows, prompt) | {cache_argument(model): cache, "use_cache": True}
            inputs |= {"logits_to_keep": 1} if forward_accepts(model, "logits_to_keep") else {}
            logits = model(**inputs).logits[:, -1]
            decoding = Decoding(answer, (0,), 0, rows_of_embedding)
            choose(logits, decoding, torch.zeros(rows, dtype=torch.float64, device="meta"))
            del logits, inputs
            kept = counted.live
        return PassMemory(kept, counted.peak)

    @contextmanager
    def _counting(self):
        with _fused_attention(), LiveBytes([*self.model.parameters(), *self.model.buffers()]) as counted:
            yield counted

    @contextmanager
    def _checkpointing(self):
        model = self.model.rwtransformer if self.spec.kind == "reward" else self.model.base_model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename these methods
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.adapted:
                make_model_gradient_checkpointing_compatible(model)
            try:
                yield
            finally:
                model.gradient_checkpointing_disable()
                if self.adapted:
                    model.disable_input_require_grads()

    def _inputs(self, rows: int, length: int) -> dict:
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        bare = self.model.rwtransformer if self.spec.kind == "reward" else self.model
        return model_inputs(bare, ids, torch.ones_like(ids))

    def _packed_inputs(self, rows: int, length: int, way: str) -> dict:
        ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        return packed_inputs(self.model, dict.fromkeys(("input_ids", "segment_ids", "position_ids"), ids), way)

    def _forward(self, inputs: dict, labels: int | None) -> torch.Tensor:
        if self.spec.kind == "reward":
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
