"""QLoRA: what is packed and how closely, that it trains, and that what is saved is the original plus the update."""

import importlib.util

import pytest
import torch
from helpers import flags, make_model, read_metrics
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from utils.ds_utils import allow_optimizer
from utils.engine.optimizer import make_optimizer
from utils.module.lora import (
    LinearLayer_LoRA,
    convert_linear_layer_to_lora,
    count_parameters,
    lora_layers,
    only_optimize_lora_parameters,
)
from utils.module.quantize import PackedWeight, Packing, describe_packing, packed_weights
from utils.process.errors import UserError

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


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_packed_matrix_is_that_of_its_tensors(kind, double):
    packed = PackedWeight(torch.randn(31, 601), packing(kind, double))
    tensors = [packed.codes, packed.scales] if kind == "int8" else [packed.codes, packed.scales.absmax]
    if kind == "nf4" and double:
        tensors.append(packed.scales.state2.absmax)
    assert packed.nbytes == sum(tensor.nbytes for tensor in tensors)


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


@pytest.fixture
def arguments(model_folder, pairs_folder, cache_folder):
    """arguments(output folder, flags) of a small run of step 1 or 2."""
    text = """
        --max_seq_len 64 --dtype fp32 --per_device_train_batch_size 8
        --lora_dim 4 --lora_scaling 8 --lora_learning_rate 1e-2
    """
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, model_name_or_path=model_folder)
    return lambda output, more: flags(f"{text} {more}", output_dir=output, **places)


def folded_by_hand(base, adapter, prefix="base_model.model."):
    """Every weight of the base plus 8 / 4 of the product of its factors, where it has some."""
    for name, weight in base.items():
        module = prefix + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in adapter:
            weight = weight + 2.0 * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        yield name, weight


@pytest.mark.parametrize("kind", KINDS)
def test_step_1_lowers_the_loss_and_saves_the_original_weights_plus_the_update(
    tmp_path, model_folder, arguments, run_step, kind, capsys
):
    run_step(1, arguments(tmp_path, f"--data_split 1,0,0 --quantize {kind}"))
    assert f"quantised to {kind}: 14 matrices" in capsys.readouterr().out
    [first, last] = [row["eval/loss"] for row in read_metrics(tmp_path, "eval")]
    assert last < first - 0.1
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(saved.config, "quantization_config", None) is None
    moved = 0
    for name, weight in folded_by_hand(base, adapter):
        torch.testing.assert_close(saved.state_dict()[name], weight, atol=1e-6, rtol=1e-6)
        moved += not torch.equal(saved.state_dict()[name], base[name])
    assert moved == 14


def test_step_2_saves_a_whole_reward_model_with_its_trained_head(tmp_path, model_folder, arguments, run_step):
    run_step(2, arguments(tmp_path, "--data_split 0,1,0 --quantize int8 --gradient_checkpointing"))
    assert read_metrics(tmp_path, "eval")[-1]["eval/accuracy"] == 1.0
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.config.num_labels == 1
    assert saved.config.reward_score_std == read_metrics(tmp_path, "eval")[-1]["eval/score_std"]
    weights = saved.state_dict()
    assert torch.equal(weights.pop("score.weight"), adapter["base_model.model.score.weight"])
    for name, weight in folded_by_hand(base, adapter):
        if name in weights:
            torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("--quantize int8", "give it a rank"),
        ("--quantize int8 --lora_dim 4 --zero_stage 3", "packed codes"),
        ("--quantize int8 --lora_dim 4 --lora_module_name q_proj", "leave the flag out"),
        ("--quantize_compute_dtype fp32", "does nothing without --quantize"),
        ("--quantize nf4 --lora_dim 4", "pip install bitsandbytes"),
        ("--paged_optimizer", "this machine has cpu only"),
        ("--quantize int8 --lora_dim 4 --trust_remote_code", "cannot be folded"),
    ],
)
@pytest.mark.parametrize("step", [1, 2, "dpo"])
def test_what_qlora_cannot_do_is_refused(tmp_path, model_folder, run_step, monkeypatch, step, more, reason):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(UserError, match=reason):
        run_step(step, flags(more, model_name_or_path=model_folder, data_path=tmp_path / "none"))


def test_step_3_says_where_quantisation_belongs(model_folder, run_step):
    models = dict(actor_model_name_or_path=model_folder, critic_model_name_or_path=model_folder)
    with pytest.raises(UserError, match="Give it to step 1 and 2"):
        run_step(3, flags("--quantize nf4", **models))


@needs_bitsandbytes
def test_zero_is_told_to_take_the_paged_optimizer_and_no_other():
    weight = nn.Parameter(torch.ones(3))
    paged = make_optimizer([weight], 1e-3, offload=False, paged=True)
    assert type(paged).__name__ == "PagedAdamW32bit"
    assert paged.is_paged
    assert paged.defaults["weight_decay"] == 0
    assert allow_optimizer({}, paged) == {"zero_allow_untested_optimizer": True}
    assert allow_optimizer({}, make_optimizer([weight], 1e-3, offload=False)) == {}
    assert allow_optimizer({}, None) == {}
