"""LoRA: what folding must keep, what training may move, and scopes that match nothing."""

import pytest
import torch
from helpers import FAMILIES, WITH_EXPERTS, WITH_STATE, make_model, random_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from utils.arguments.kinds import new_parser
from utils.arguments.model import add_lora_arguments
from utils.engine.optimizer import get_optimizer_grouped_parameters, make_optimizer
from utils.model.model_utils import adapt_model, create_critic_model
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.lora import (
    LinearLayer_LoRA,
    check_packing_share,
    convert_linear_layer_to_lora,
    convert_lora_to_linear_layer,
    count_parameters,
    describe_left_out,
    lora_layers,
    make_model_gradient_checkpointing_compatible,
    match_lora_scope,
    only_optimize_lora_parameters,
)
from utils.process.errors import UserError


def _layer(dtype=torch.float32, transposed=False, trained=True):
    torch.manual_seed(0)
    plain = Conv1D(6, 10) if transposed else nn.Linear(10, 6)
    nn.init.normal_(plain.bias)
    plain = plain.to(dtype)
    layer = LinearLayer_LoRA(plain.weight, 3, 2.0, 0.0, plain.bias, transposed=transposed).to(dtype)
    if trained:
        nn.init.normal_(layer.lora_left_weight)
    return plain, layer


@pytest.mark.parametrize("transposed", [False, True])
def test_a_fresh_layer_equals_the_plain_one(transposed):
    plain, layer = _layer(transposed=transposed, trained=False)
    x = torch.randn(4, 5, 10)
    torch.testing.assert_close(layer(x), plain(x))


def test_the_update_is_scaling_over_rank_times_the_factors():
    _, layer = _layer()
    assert layer.lora_right_weight.shape == (10, 3)
    assert layer.lora_left_weight.shape == (3, 6)
    want = layer.weight + (2.0 / 3) * (layer.lora_right_weight @ layer.lora_left_weight).T
    torch.testing.assert_close(layer.folded_weight(), want)


@pytest.mark.parametrize("transposed", [False, True])
def test_folded_and_unfolded_give_the_same_output(transposed):
    _, layer = _layer(transposed=transposed)
    x = torch.randn(4, 10)
    unfolded = layer(x)
    layer.fuse_lora_weight()
    torch.testing.assert_close(layer(x), unfolded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_twice_is_folding_once_and_unfolding_restores_every_bit(dtype):
    _, layer = _layer(dtype)
    before = layer.weight.detach().clone()
    layer.fuse_lora_weight()
    once = layer.weight.detach().clone()
    assert not torch.equal(once, before)
    layer.fuse_lora_weight()
    assert torch.equal(layer.weight, once)
    layer.unfuse_lora_weight()
    assert torch.equal(layer.weight, before)
    layer.unfuse_lora_weight()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_auto_adapts_the_blocks_of_each_family_and_never_the_head(tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, family))
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    convert_linear_layer_to_lora(model, "auto", 4)
    names = [name for name, _ in lora_layers(model)]
    assert names
    assert not any("head" in name for name in names)
    torch.testing.assert_close(model(ids).logits, before)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_left_weight, std=0.1)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, before)
    convert_lora_to_linear_layer(model)
    assert not lora_layers(model)
    torch.testing.assert_close(model(ids).logits, adapted, atol=1e-5, rtol=1e-4)


def test_all_linear_is_every_linear_layer_but_the_head(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, "opt"))  # linear layers outside the blocks too
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(match_lora_scope(model, "all-linear")) == linear - {"lm_head"}
    assert "model.decoder.project_in" in set(match_lora_scope(model, "all-linear")) - set(
        match_lora_scope(model, "auto")
    )


def test_all_linear_leaves_the_value_head_of_a_reward_model_alone(model_folder):
    tokenizer = load_hf_tokenizer(model_folder)
    model = create_critic_model(model_folder, tokenizer)
    names = match_lora_scope(model, "all-linear")
    assert len(names) == 2 * 7
    assert "v_head" not in names


def test_a_head_tied_to_the_embedding_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, "gpt2"))
    with pytest.raises(UserError, match=r"lm_head.*tied"):
        convert_linear_layer_to_lora(model, "", 4)


def test_layers_that_share_a_weight_are_refused(model_folder):
    """As those of Zamba's blocks do: a weight of its own module each, or one module in two places."""
    for share in ("weight", "module"):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        first, second = (layer.mlp for layer in model.model.layers)
        if share == "weight":
            second.up_proj.weight = first.up_proj.weight
        else:
            second.up_proj = first.up_proj
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj: they share"):
            convert_linear_layer_to_lora(model, "auto", 4)
        convert_linear_layer_to_lora(model, "q_proj", 4)


@pytest.mark.parametrize("scaling", [0.0, 1.0])
def test_lora_of_rank_0_of_scaling_0_and_fresh_lora_are_no_lora(model_folder, scaling):
    ids = torch.arange(12).view(2, 6)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    before = plain(ids).logits
    assert not lora_layers(convert_linear_layer_to_lora(plain, "auto", 0))
    convert_linear_layer_to_lora(plain, "auto", 4, scaling)
    if scaling == 0:
        for _, layer in lora_layers(plain):
            nn.init.normal_(layer.lora_left_weight)
    assert torch.equal(plain(ids).logits, before)
    for _, layer in lora_layers(plain):
        layer.fuse_lora_weight()
    assert torch.equal(plain(ids).logits, before)


def test_dropout_acts_on_the_update_alone_and_only_while_training():
    _, layer = _layer()
    layer.lora_dropout.p = 0.5
    x = torch.randn(64, 10)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout.p = 1.0
    assert torch.equal(layer(x), layer.base_product(x))


def test_the_flags_reach_the_layers_of_the_model_they_name(model_folder):
    parser = new_parser("")
    add_lora_arguments(parser, "actor_")
    add_lora_arguments(parser, "critic_")
    flags = "--actor_lora_dim 4 --actor_lora_scaling 8 --actor_lora_dropout 0.25 --actor_lora_module_name q_proj"
    args = parser.parse_args([*flags.split(), "--critic_lora_dim", "2"])
    actor = adapt_model(AutoModelForCausalLM.from_pretrained(model_folder), args, "actor_")
    [(name, layer), _] = lora_layers(actor)
    assert name.endswith("q_proj")
    assert (layer.lora_scaling, layer.lora_dropout.p) == (2.0, 0.25)
    critic = adapt_model(create_critic_model(model_folder, load_hf_tokenizer(model_folder)), args, "critic_")
    assert {(layer.lora_scaling, layer.lora_dropout.p) for _, layer in lora_layers(critic)} == {(0.5, 0.0)}


def test_a_scaling_of_nothing_is_refused(capsys):
    parser = new_parser("")
    add_lora_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--lora_scaling", "0"])
    assert "--lora_scaling: 0 is not above 0" in capsys.readouterr().err


def test_a_scope_that_matches_nothing_names_layers_that_exist(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(UserError, match=r"decoder\.layers\.(.|\n)*self_attn\.q_proj"):
        convert_linear_layer_to_lora(model, "decoder.layers.", 4)
    assert len(match_lora_scope(model, "q_proj")) == 2


def test_only_lora_and_named_parameters_train_and_base_weights_never_move(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    convert_linear_layer_to_lora(model, "auto", 2)
    only_optimize_lora_parameters(model, force_optimize_params=["lm_head"])
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    make_model_gradient_checkpointing_compatible(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).loss.backward()
    factors = [p for n, p in model.named_parameters() if "lora_left" in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)
    optimizer.step()
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
    trainable, total = count_parameters(model)
    assert 0 < trainable < total


@pytest.mark.parametrize("family", ["llama", "gpt2", "reward"])
def test_checkpointing_under_frozen_weights_changes_no_gradient(tmp_path, family):
    folder = make_model(tmp_path, "llama" if family == "reward" else family)
    ids = torch.arange(24).view(4, 6)

    def gradients(checkpointing: bool):
        torch.manual_seed(0)
        if family == "reward":
            model = create_critic_model(folder, load_hf_tokenizer(folder))
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        parser = new_parser("")
        add_lora_arguments(parser)
        args = parser.parse_args(["--lora_dim", "2", "--only_optimize_lora"])
        adapt_model(model, args, "", checkpointing, keep_trainable=["v_head.weight"])
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_left_weight, std=0.1)
        model.train()
        inputs = {"attention_mask": torch.ones_like(ids)} if family == "reward" else {"labels": ids}
        loss = model(ids, **inputs)["loss"]
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    with_it, without = gradients(True), gradients(False)
    assert with_it.keys() == without.keys()
    assert any("lora_right" in name for name in with_it)
    assert ("v_head.weight" in with_it) == (family == "reward")
    for name, gradient in with_it.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, without[name])


def test_without_only_optimize_lora_all_but_the_adapted_matrices_train(model_folder, capsys):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parser = new_parser("")
    add_lora_arguments(parser)
    adapt_model(model, parser.parse_args(["--lora_dim", "2", "--lora_module_name", "q_proj"]))
    trainable, total = count_parameters(model)
    frozen = sum(value.numel() for name, value in before.items() if "q_proj" in name)
    assert total - trainable == frozen
    assert f"{trainable:,} of {total:,} parameters train" in capsys.readouterr().out
    groups = get_optimizer_grouped_parameters(model, 0.0, lora_lr=0.02)
    optimizer = make_optimizer(groups, 0.001, offload=False)
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]) == ("q_proj" in name), name
            # Adam's first step is as long as the learning rate.
            assert (p - before[name]).abs().max() <= 0.00101
    for _, layer in lora_layers(model):
        assert 0.0199 < layer.lora_left_weight.abs().max() <= 0.0201


# ---------------------------------------------------------------- weights that are in no linear layer


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_that_a_scope_leaves_out_are_named_with_their_share(family):
    model = random_model(WITH_EXPERTS[family])
    experts = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj")))
    described = describe_left_out(model, "auto")
    left, total = (int(number.replace(",", "")) for number in described.split(";")[1].split()[:3:2])
    assert total == sum(p.numel() for p in model.parameters())
    assert experts < left < 1.1 * experts  # and the routers
    assert "model.layers.*.mlp.experts.gate_up_proj" in described
    assert described.count("gate_up_proj,") == 1
    assert describe_left_out(model, "q_proj") is None


def test_what_is_left_out_is_printed_where_lora_is_added(capsys):
    parser = new_parser("test")
    add_lora_arguments(parser)
    args = parser.parse_args(["--lora_dim", "2", "--lora_module_name", "all-linear"])
    adapt_model(random_model(WITH_EXPERTS["mixtral"]), args)
    assert "are weights of another kind" in capsys.readouterr().out
    adapt_model(random_model(FAMILIES["llama"]), args)
    assert "are weights of another kind" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gpt_neox", "falcon_h1"])
def test_nothing_is_left_out_of_dense_models_but_matrices_of_a_state(family):
    outside = describe_left_out(random_model((FAMILIES | WITH_STATE)[family]), "all-linear")
    assert outside is None


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_quantize_is_refused_where_it_would_pack_little(family):
    with pytest.raises(UserError, match=r"--quantize packs linear layers alone, and [6-9]\d\.\d % of the weights"):
        check_packing_share(random_model(WITH_EXPERTS[family]))
    check_packing_share(random_model(FAMILIES["llama"]))
