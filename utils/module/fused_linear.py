"""Faster linear layers for a generation phase: layers that read one input as one product, weights packed for the CPU.

A token of a small model costs hundreds of small matrix products, each bound by its start and by how its weight lies
in memory. Two things help, and both leave the model's own code alone:

- linear layers of one parent that are given the very same tensor (query, key, value; gate, up) become one product.
  They are found by looking at a forward pass, not by name;
- on a CPU, oneDNN computes fastest with a weight in a blocked layout of its own. Here it gets that once per phase.

The copies cost the memory of the fused or packed weights while the phase lasts. What they gain depends on the
processor; ``fused_is_faster`` measures it.
"""

import time
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from utils.module.hooks import forward_replaced
from utils.module.lora import LinearLayer_LoRA


def _linear_modules(model) -> dict[str, nn.Module]:
    """Layers that compute F.linear(x, weight, bias) and nothing else. LoRA layers count while they are folded."""
    return {
        name: module
        for name, module in model.named_modules()
        if (
            type(module) is nn.Linear
            or (isinstance(module, LinearLayer_LoRA) and module.is_folded and not module.transposed)
        )
        and module.weight.is_floating_point()
    }


@torch.no_grad()
def find_shared_inputs(model) -> list[list[str]]:
    """Names of linear layers, grouped: those of one parent that were given one and the same tensor, in calling order.

    Runs the model on a single token. Layers without such a sibling are groups of one.
    """
    calls = []  # (name, input); holding the inputs keeps their identities apart

    def note(name):
        return lambda _module, arguments: calls.append((name, arguments[0]))

    layers = _linear_modules(model)
    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups = {}
    for name, given in calls:
        weight = layers[name].weight
        kind = (name.rpartition(".")[0], id(given), weight.dtype, layers[name].bias is None)
        groups.setdefault(kind, []).append(name)
    names = [name for name, _ in calls]
    return [group for group in groups.values() if all(names.count(name) == 1 for name in group)]


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout of its own for products with this weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return supported.get(weight.dtype, lambda: False)()


def make_product(weight: torch.Tensor, bias: torch.Tensor | None):
    """x [.., in] -> F.linear(x, weight, bias), the fastest way there is for few rows."""
    if not can_pack(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def fused_is_faster(module) -> bool:
    """Whether ``fused_linears`` gains on this machine, in the module's precision; measured once, in about 0.1 s.

    It is a property of the processor and its libraries, so that one product stands for all models: a measurement of
    small models would change from run to run. False where nothing can be packed: fused copies alone gain too little,
    and an accelerator rarely has the memory for them.
    """
    weight = next(module.parameters())
    return can_pack(weight) and _packing_gain(weight.dtype) > 1.1


@cache
@torch.no_grad()
def _packing_gain(dtype: torch.dtype, rows: int = 4, width: int = 1024, outputs: int = 4096) -> float:
    """Seconds of F.linear over those of the packed product, with as many rows as a small batch has.

    One thread and its own time, which other processes hardly change: the answer must not differ from run to run.
    """
    threads, seconds = torch.get_num_threads(), ([], [])
    torch.set_num_threads(1)
    try:
        weight, x = torch.ones(outputs, width, dtype=dtype), torch.ones(rows, width, dtype=dtype)
        packed = make_product(weight, None)
        for _ in range(12):
            for product, taken in zip((lambda x: F.linear(x, weight), packed), seconds, strict=True):
                start = time.thread_time()
                product(x)
                taken.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    plain, packed = (min(taken[2:]) for taken in seconds)
    return plain / packed


class _FusedGroup:
    """One product for several layers. The first to be called computes all; the others take their parts."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers
        biases = [layer.bias for layer in layers]
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.product = make_product(
            torch.cat([layer.weight.detach() for layer in layers]),
            None if biases[0] is None else torch.cat([bias.detach() for bias in biases]),
        )
        self.input, self.parts = None, {}

    def forward_of(self, index: int):
        def forward(x):
            if self.input is not x or index not in self.parts:
                self.input, self.parts = x, dict(enumerate(self.product(x).split(self.sizes, dim=-1)))
            part = self.parts.pop(index)
            if not self.parts:
                self.input = None
            return part

        return forward


@contextmanager
def fused_linears(model, groups: list[list[str]]):
    """While open, the groups of ``find_shared_inputs`` run fused, and packed where the CPU gains by it."""
    layers = _linear_modules(model)
    with ExitStack() as stack:
        for group in groups:
            members = [layers[name] for name in group]
            if len(members) == 1 and not can_pack(members[0].weight):
                continue
            fused = _FusedGroup(members)
            for index, member in enumerate(members):
                stack.enter_context(forward_replaced(member, fused.forward_of(index)))
        yield
