"""QLoRA: what is packed and how closely, that it trains, and that what is saved is the original plus the update."""

import importlib.util

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from utils.module.lora import (
    LinearLayer_LoRA,
    convert_linear_layer_to_lora,
    count_parameters,
    lora_layers,
    only_optimize_lora_parameters,
)
from utils.module.quantize import PackedWeight, Packing, describe_packing, packed_weights

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="nf4 needs the package bitsandbytes"
)
KINDS = [pytest.param("nf4", marks=needs_bitsandbytes), "int8"]
NF4_CODES = [  # Dettmers et al., 2023, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def packing(kind="nf4", double=False, compute_dtype=torch.float32):
    return Packing(kind, double, compute_dtype)


@needs_bitsandbytes
def test_nf4_takes_the_nearest_published_code_of_each_block_of_64():
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    blocks, codes = weight.view(-1, 64), torch.tensor(NF4_CODES)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks.unsqueeze(-1) / scale.unsqueeze(-1) - codes).abs().argmin(-1)
    want = (codes[nearest] * scale).view_as(weight)
    torch.testing.assert_close(PackedWeight(weight, packing()).unpacked(), want, atol=1e-6, rtol=1e-6)
    nested = PackedWeight(weight, packing(double=True)).unpacked()
    assert 0 < (nested - want).abs().max() < 0.02


def test_int8_rounds_each_row_to_127_steps():
    weight = torch.tensor([[0.5, -1.0, 0.254], [0.0, 0.0, 0.0], [1e6, -1.0, 3e5]])
    want = torch.tensor([[64 / 127, -1.0, 32 / 127], [0.0, 0.0, 0.0], [1e6, 0.0, 38 * 1e6 / 127]])
    torch.testing.assert_close(PackedWeight(weight, packing("int8")).unpacked(), want)


@needs_bitsandbytes
def test_int8_is_that_of_bitsandbytes():
    from bitsandbytes.functional import int8_vectorwise_quant

    torch.manual_seed(0)
    weight = torch.randn(40, 24).half().float()
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    packed = PackedWeight(weight, packing("int8"))
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.scales.squeeze(1), scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_packed_layer_and_its_gradients_are_those_of_a_plain_one_with_the_unpacked_weight(kind, transposed):
    torch.manual_seed(0)
    plain = Conv1D(6, 10) if transposed else nn.Linear(10, 6)
    nn.init.normal_(plain.bias)
    model = nn.ModuleDict({"layer": plain})
    model.get_output_embeddings = model.get_input_embeddings = lambda: nn.Linear(1, 1)
    convert_linear_layer_to_lora(model, "layer", 3, 2.0, packing=packing(kind))
    packed = model["layer"]
    nn.init.normal_(packed.lora_left_weight)
    weight = packed.packed.unpacked()
    reference = LinearLayer_LoRA(nn.Parameter(weight), 3, 2.0, 0.0, plain.bias)
    reference.lora_left_weight, reference.lora_right_weight = packed.lora_left_weight, packed.lora_right_weight
    inputs = [torch.randn(4, 5, 10, requires_grad=True) for _ in range(2)]
    inputs[1].data = inputs[0].data
    factors = [packed.lora_left_weight, packed.lora_right_weight]
    outputs = [layer(x) for layer, x in zip((packed, reference), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *factors]) for x, y in zip(inputs, outputs, strict=True)]
    torch.testing.assert_close(*gradients)


@needs_bitsandbytes
def test_casting_and_moving_a_model_leaves_codes_and_scales_alone():
    packed = PackedWeight(torch.randn(8, 64), packing(double=True))
    before = packed.unpacked()
    packed.bfloat16()
    packed.to("cpu", torch.float16)
    assert torch.equal(packed.unpacked(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_all_linear_layers_but_the_head_are_packed_and_act_as_the_rounded_weights(tmp_path, family, kind):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, family)).eval()
    ids = torch.arange(12).view(2, 6)
    before, total = model(ids).logits, count_parameters(model)[1]
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    convert_linear_layer_to_lora(model, "all-linear", 4, packing=packing(kind))
    only_optimize_lora_parameters(model)
    assert len(packed_weights(model)) == len(lora_layers(model)) == len(linear)
    trainable, counted = count_parameters(model)
    assert counted == total + trainable
    bits = {"nf4": (4.4, 5.1), "int8": (8, 10)}[kind]  # small matrices: many scales
    size = sum(packed.nbytes for packed in packed_weights(model))
    assert bits[0] < 8 * size / sum(packed.numel for packed in packed_weights(model)) < bits[1]
    assert f"{len(linear)} matrices" in describe_packing(model)
    after = model(ids).logits
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, layer in lora_layers(model):
        weight = layer.packed.unpacked()
        rounded.get_submodule(name).weight.data = weight.T if layer.transposed else weight
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, rounded(ids).logits, atol=1e-6, rtol=1e-5)


@needs_bitsandbytes
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the package peft")
@pytest.mark.parametrize("double", [False, True])
def test_the_forward_is_that_of_pefts_qlora_on_the_same_weights(model_folder, double):
    import peft
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, lora).train()
    ours = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    convert_linear_layer_to_lora(ours, "all-linear", 4, 2, packing=packing(double=double))
    only_optimize_lora_parameters(ours)
    for name, layer in lora_layers(ours):
        their_layer = theirs.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_left_weight, std=0.1)
        their_layer.lora_A["default"].weight.data = layer.lora_right_weight.detach().T.contiguous()
        their_layer.lora_B["default"].weight.data = layer.lora_left_weight.detach().T.contiguous()
    assert len(lora_layers(ours)) == sum(isinstance(m, peft.tuners.lora.bnb.Linear4bit) for m in theirs.modules())
    ids = torch.arange(24).view(2, 12)
    losses = [model(ids, labels=ids) for model in (ours, theirs)]
    torch.testing.assert_close(losses[0].logits, losses[1].logits, atol=1e-6, rtol=1e-5)
    for loss in losses:
        loss.loss.backward()
    for name, layer in lora_layers(ours):
        gradient = theirs.base_model.model.get_submodule(name).lora_A["default"].weight.grad
        torch.testing.assert_close(layer.lora_right_weight.grad.T, gradient, atol=1e-6, rtol=1e-4)
