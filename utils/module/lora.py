"""LoRA: a frozen matrix plus a trained one of low rank (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

            x [.., in]
            |        \\
            |         dropout
            |         R [in, r]     lora_right_weight, random
     W [out, in]      |
       frozen         L [r, out]    lora_left_weight, zero at the start
            |         * scaling / r
            +--------/
            |
            y [.., out]

Folded, the layer is the plain matrix W + scaling/r * (R L)^T: one product instead of three while generating and saving.
"""

import math
import re
from collections.abc import Sequence
from contextlib import contextmanager

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils.module.quantize import PackedWeight, Packing, packed_weights
from utils.process.errors import UserError
from utils.process.world import get_rank


def fold(weight, right, left, scaling: float, transposed: bool = False) -> torch.Tensor:
    """weight + scaling * (right left)^T, in weight's dtype: the sum is taken in fp32, so that bf16 rounds once.

    Args:
        weight: [out, in], or [in, out] with ``transposed``.
        right, left: [in, r] and [r, out].
    """
    update = right.float() @ left.float()
    return (weight.float() + scaling * (update if transposed else update.T)).to(weight.dtype)


class LinearLayer_LoRA(nn.Module):
    """A linear layer whose weight W is frozen and moves only through two thin matrices.

    Args:
        weight: W, [out, in], or [in, out] with ``transposed`` (GPT-2's Conv1D). It is kept, not copied.
        lora_dim: r, the rank; 1 or more.
        lora_scaling: the update counts lora_scaling / lora_dim; PEFT calls it lora_alpha. 0 leaves W alone.
        lora_droppout: dropout on the input of the thin branch while training.
        bias: [out] or None; kept, not copied.
    """

    def __init__(self, weight, lora_dim=0, lora_scaling=1, lora_droppout=0, bias=None, transposed=False):
        super().__init__()
        if lora_dim <= 0:
            raise ValueError(f"lora_dim must be 1 or more, not {lora_dim}")
        self.weight = weight
        self.bias = bias
        self.transposed = transposed
        rows, columns = getattr(weight, "ds_shape", weight.shape)  # a ZeRO-3 shard does not show its shape
        in_features, out_features = (rows, columns) if transposed else (columns, rows)
        self.lora_right_weight = nn.Parameter(
            torch.empty(in_features, lora_dim, dtype=weight.dtype, device=weight.device)
        )
        self.lora_left_weight = nn.Parameter(
            torch.zeros(lora_dim, out_features, dtype=weight.dtype, device=weight.device)
        )
        self.lora_dim, self.lora_alpha = lora_dim, lora_scaling
        self.lora_scaling = lora_scaling / lora_dim
        self.lora_dropout = nn.Dropout(lora_droppout)
        self._base_weight = None  # W while it is folded
        self.is_disabled = False  # W alone, see lora_disabled
        self.reset_parameters()
        self.weight.requires_grad = False

    def reset_parameters(self):
        """R as nn.Linear does it, L zero: the layer starts out equal to W alone."""
        nn.init.kaiming_uniform_(self.lora_right_weight.T, a=math.sqrt(5))
        nn.init.zeros_(self.lora_left_weight)

    @property
    def is_folded(self) -> bool:
        return self._base_weight is not None

    def folded_weight(self) -> torch.Tensor:
        """W + scaling * (R L)^T in W's layout and dtype. Under ZeRO-3 the layer must be gathered."""
        if self.is_folded:
            return self.weight.detach()
        right, left = self.lora_right_weight.detach(), self.lora_left_weight.detach()
        return fold(self.weight.detach(), right, left, self.lora_scaling, self.transposed)

    def fuse_lora_weight(self) -> None:
        """Fold the update into W. W itself is set aside, so that unfolding restores it bit for bit; twice is once."""
        if not self.is_folded:
            folded = self.folded_weight()
            self._base_weight, self.weight.data = self.weight.data, folded

    def unfuse_lora_weight(self) -> None:
        if self.is_folded:
            self.weight.data, self._base_weight = self._base_weight, None

    def base_product(self, x):
        """x [.., in] -> [.., out] through W and the bias alone (W with the update in it while folded)."""
        return F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)

    def update_product(self, x):
        """x [.., in] -> [.., out] through the two thin matrices."""
        return (self.lora_dropout(x) @ self.lora_right_weight @ self.lora_left_weight) * self.lora_scaling

    def forward(self, x):
        y = self.base_product(x)
        return y if self.is_folded or self.is_disabled else y + self.update_product(x)

    def extra_repr(self) -> str:
        in_features, lora_dim = self.lora_right_weight.shape
        return f"in={in_features}, out={self.lora_left_weight.shape[1]}, r={lora_dim}, folded={self.is_folded}"


class QuantizedLinear_LoRA(LinearLayer_LoRA):
    """QLoRA: the frozen W is packed in 4 or 8 bits, the thin matrices and the bias are as ever.

    The update is folded into the original weights, from their files, never into the packed ones (which would round
    it away): by inference/merge_lora.py, as the steps do it when they save.
    """

    def __init__(self, weight, lora_dim, lora_scaling, lora_droppout, bias, transposed, packing: Packing):
        super().__init__(weight, lora_dim, lora_scaling, lora_droppout, bias, transposed)
        del self.weight
        device = torch.device(get_accelerator().current_device_name())
        self.packed = PackedWeight((weight.T if transposed else weight).to(device), packing)

    def base_product(self, x):
        return self.packed(x, self.bias)

    def folded_weight(self):
        raise TypeError("a quantised layer holds no weight to fold into; inference/merge_lora.py takes the original")


@contextmanager
def lora_disabled(model):
    """While open, the LoRA layers of a model are their frozen matrices alone: the model it was before LoRA."""
    layers = [layer for _, layer in lora_layers(model)]
    try:
        for layer in layers:
            layer.is_disabled = True
        yield model
    finally:
        for layer in layers:
            layer.is_disabled = False


@contextmanager
def lora_folded(model):
    """While open, the updates of a model's LoRA layers are in their matrices: a plain product for each."""
    layers = [layer for _, layer in lora_layers(model)]
    try:
        for layer in layers:
            layer.fuse_lora_weight()
        yield model
    finally:
        for layer in layers:
            layer.unfuse_lora_weight()


def lora_layers(model) -> list[tuple[str, LinearLayer_LoRA]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LinearLayer_LoRA)]


def _linear_layers(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


LINEAR = (nn.Linear, Conv1D, LinearLayer_LoRA)
NO_PRODUCT = (nn.Embedding, nn.modules.conv._ConvNd, PackedWeight)
MOST = 0.5  # of the weights of products: a quantised model must hold at least so many packed


def _size(parameter) -> int:
    """Elements, whole ones also where ZeRO-3 shows only a shard."""
    return getattr(parameter, "ds_numel", parameter.numel())


def matrices_outside_linear_layers(model) -> dict[str, nn.Parameter]:
    """Weights that a model multiplies with and that are in no linear layer, by name.

    Above all the experts of a mixture, which transformers keeps in one parameter [experts, .., ..] for all of a layer;
    routers and matrices of a state space, too.
    """
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, (*LINEAR, *NO_PRODUCT))
        for own, parameter in module.named_parameters(recurse=False)
        if len(shape := getattr(parameter, "ds_shape", parameter.shape)) > 1 and min(shape) > 1
    }


def _kinds(names) -> str:
    """Names with a star for the number of the block, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def describe_left_out(model, part_module_name: str) -> str | None:
    """What a scope that reads as "all" leaves without LoRA, with its share; None: nothing, or the scope is narrower."""
    outside = matrices_outside_linear_layers(model)
    if part_module_name not in ("auto", "all-linear") or not outside:
        return None
    left, total = sum(map(_size, outside.values())), count_parameters(model)[1]
    return (
        f"LoRA covers linear layers; {left:,} of {total:,} parameters ({100 * left / total:.1f} %) are weights of "
        f"another kind, as experts of a mixture are, and stay frozen or train whole: {_kinds(outside)}"
    )


def check_packing_share(model) -> None:
    """UserError for a model that --quantize would leave in full precision for the most part."""
    outside = matrices_outside_linear_layers(model)
    left = sum(map(_size, outside.values()))
    head = model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, LINEAR) and part is not head]
    all_weights = left + sum(_size(part.weight) for part in linear)
    if left > MOST * all_weights:
        raise UserError(
            f"--quantize packs linear layers alone, and {100 * left / all_weights:.1f} % of the weights of this "
            f"{type(model).__name__} are in none ({_kinds(outside)}): hardly any memory would be saved. Leave "
            "--quantize out; --zero_stage 3 and --offload save memory for such a model"
        )


def match_lora_scope(model, part_module_name: str) -> list[str]:
    """The names of the linear layers a scope covers.

    ``auto`` takes every linear layer of the numbered blocks, whatever the family calls them; ``all-linear`` every one
    but the output head (a reward model's value head); anything else is a substring of the layer's name, as in
    ``decoder.layers.``.

    Raises:
        UserError: when nothing matches, with names of linear layers that exist; when a matched layer's weight is also
            the embedding: one of the two would move and the other not; when layers share a weight with each other.
    """
    layers = _linear_layers(model)
    names, head = list(layers), model.get_output_embeddings()
    if part_module_name == "auto":
        matched = [name for name in names if re.search(r"\.\d+\.", name)]
    elif part_module_name == "all-linear":
        matched = [name for name in names if layers[name] is not head]
    else:
        matched = [name for name in names if part_module_name in name]
    if not matched:
        shown = "\n  ".join(names[:12])
        raise UserError(
            f"the LoRA scope {part_module_name!r} matches no linear layer of {type(model).__name__}; "
            f"its linear layers are\n"
            f"  {shown}{' …' if len(names) > 12 else ''}\n"
            "use a part of these names, auto for all layers of the blocks, or all-linear for all but the head"
        )
    embedding = model.get_input_embeddings()
    tied = [name for name in matched if layers[name].weight is embedding.weight]
    if tied:
        raise UserError(
            f"the LoRA scope {part_module_name!r} covers {tied[0]}, whose weight is the embedding's too (tied); "
            "all-linear leaves it out"
        )
    _refuse_shared(model, matched)
    return matched


def _refuse_shared(model, matched: Sequence[str]) -> None:
    """Raises: UserError for layers that share a weight with each other (Zamba's blocks): each would have an update of
    its own, and folding them in would add all of them to the one weight."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            places.setdefault(id(weight), []).append(name)
    shared = next((names for names in places.values() if len(names) > 1 and not set(names).isdisjoint(matched)), None)
    if shared is not None:
        raise UserError(
            f"LoRA cannot adapt {' and '.join(shared[:3])}{' …' if len(shared) > 3 else ''}: they share one weight, "
            "and each would have an update of its own; name a scope without them"
        )


def convert_linear_layer_to_lora(
    model, part_module_name, lora_dim=0, lora_scaling=1, lora_droppout=0, packing: Packing | None = None
):
    """Replace the linear layers of a scope by LinearLayer_LoRA; lora_dim 0 leaves the model as it is.

    Args:
        packing: pack the frozen weights too (QLoRA), layer by layer; None: leave them as they are.
    """
    if lora_dim <= 0:
        return model
    for name in match_lora_scope(model, part_module_name):
        layer = model.get_submodule(name)
        parent_name, _, child_name = name.rpartition(".")
        parts = (layer.weight, lora_dim, lora_scaling, lora_droppout, layer.bias, isinstance(layer, Conv1D))
        adapted = LinearLayer_LoRA(*parts) if packing is None else QuantizedLinear_LoRA(*parts, packing)
        setattr(model.get_submodule(parent_name), child_name, adapted)
    return model


def _z3_params_to_fetch(param_list) -> list:
    """The parameters of a list that ZeRO-3 keeps in shards at the moment."""
    return [p for p in param_list if hasattr(p, "ds_id") and p.ds_status == ZeroParamStatus.NOT_AVAILABLE]


@torch.no_grad()
def _move_update_into_weight(layer: LinearLayer_LoRA) -> None:
    """Of a layer that ZeRO-3 has partitioned; every rank must call this. Its update is zero afterwards."""
    with deepspeed.zero.GatheredParameters(
        [layer.weight, layer.lora_right_weight, layer.lora_left_weight], modifier_rank=0
    ):
        if get_rank() == 0:
            layer.weight.copy_(layer.folded_weight())
            layer.lora_left_weight.zero_()


def convert_lora_to_linear_layer(model):
    """Turn every LoRA layer back into a plain linear layer with the update folded in, for good.

    Layers that ZeRO-3 has partitioned keep their class, with an update of zero: DeepSpeed gathers weights by the
    layer that it knows. There every rank must call this.
    """
    for name, layer in lora_layers(model):
        layer.unfuse_lora_weight()
        if hasattr(layer.lora_left_weight, "ds_id"):
            _move_update_into_weight(layer)
            continue
        parent_name, _, child_name = name.rpartition(".")
        weight = nn.Parameter(layer.folded_weight(), requires_grad=layer.weight.requires_grad)
        if layer.transposed:
            plain = Conv1D(weight.shape[1], 1)
        else:
            plain = nn.Linear(1, 1, bias=False, device="meta")
            plain.in_features, plain.out_features = weight.shape[1], weight.shape[0]
        plain.weight, plain.bias = weight, layer.bias
        setattr(model.get_submodule(parent_name), child_name, plain)
    return model


def only_optimize_lora_parameters(model, force_optimize_params=()):
    """Freeze all but the LoRA factors and the named parameters (a reward model's value head, say)."""
    for name, param in model.named_parameters():
        param.requires_grad = (
            "lora_right_weight" in name
            or "lora_left_weight" in name
            or any(part in name for part in force_optimize_params)
        )
    return model


def make_model_gradient_checkpointing_compatible(model):
    """Let the embedding's output require gradients: checkpointed blocks over a frozen one would else have none."""
    model.enable_input_require_grads()
    return model


def count_parameters(model) -> tuple[int, int]:
    """(trainable, all) parameters, whole ones also where ZeRO-3 shows only shards, and packed ones."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in model.parameters()]
    sizes += [(False, packed.numel) for packed in packed_weights(model)]
    return sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)
