"""Adapters on disk: what training saves, PEFT loads; what PEFT trains, merge_lora folds, bit for bit where it can."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from utils.model.adapters import save_lora_adapter
from utils.model.model_utils import create_critic_model, create_hf_model
from utils.model.saving import save_pretrained_model
from utils.model.shards import SafetensorsWriter
from utils.model.tokenizer import load_hf_tokenizer
from utils.module.lora import convert_linear_layer_to_lora, lora_layers, only_optimize_lora_parameters
from utils.process.errors import UserError

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r tests/requirements.txt")

IDS = torch.arange(3, 27).view(2, 12)


def _loaded(folder, auto=AutoModelForCausalLM):
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def _trained(model, steps=3):
    """A few steps of training as a user would take them; returns the model in evaluation mode."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        outputs = model(IDS)
        loss = (
            outputs.logits.float().log_softmax(-1)[..., 5].mean() if outputs.logits.dim() == 3 else outputs.logits.sum()
        )
        (-loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _peft_trained(folder, adapter, auto=AutoModelForCausalLM, prepare=lambda model: model, **settings):
    """Train with PEFT and save the adapter: (logits, trained model)."""
    torch.manual_seed(0)
    options = {} if auto is AutoModelForCausalLM else {"num_labels": 1}
    task = "CAUSAL_LM" if auto is AutoModelForCausalLM else "SEQ_CLS"
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(
        prepare(auto.from_pretrained(folder, **options)), peft.LoraConfig(task_type=task, **settings)
    )
    before = model.eval()(IDS).logits.detach()
    _trained(model.train())
    model.save_pretrained(adapter)
    logits = model(IDS).logits.detach()
    assert (logits - before).abs().max() > 0.01
    return logits


def _ours_trained(folder, scope="auto", dtype=torch.float32, scaling=6.0, pad=None):
    tokenizer = load_hf_tokenizer(folder)
    torch.manual_seed(0)
    model = create_hf_model(AutoModelForCausalLM, folder, tokenizer, dtype=dtype)
    convert_linear_layer_to_lora(model, scope, 4, scaling)
    only_optimize_lora_parameters(model)
    return _trained(model.train()), tokenizer


# --- what training saves


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_peft_loads_our_adapter_and_gives_the_same_logits(tmp_path, family):
    folder = make_model(tmp_path / "base", family)
    model, tokenizer = _ours_trained(folder)
    save_lora_adapter(model, tokenizer, str(folder), tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)
    assert all(".lora_" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    layers = [module for module in loaded.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == len(lora_layers(model))
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # transformers finds the base by itself
    torch.testing.assert_close(automatic(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "scope"), [("llama", "all-linear"), ("gpt2", "auto"), ("opt", "self_attn")])
def test_merging_our_adapter_gives_the_weights_that_training_saved(tmp_path, merge_lora, family, scope, dtype):
    folder = make_model(tmp_path / "base", family)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    model, tokenizer = _ours_trained(folder, scope, dtype)
    save_pretrained_model(model, tokenizer, tmp_path / "saved")
    save_lora_adapter(model, tokenizer, str(folder), tmp_path / "saved/adapter")
    merged = merge_lora(tmp_path / "saved/adapter")
    want, got = load_file(tmp_path / "saved/model.safetensors"), load_file(merged / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((merged / file).read_text()) == json.loads((tmp_path / "saved" / file).read_text()), file
    _loaded(merged)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_added_in_training_are_in_the_adapter_and_in_the_merged_model(tmp_path, merge_lora, family):
    """Without a pad token in the tokenizer one is added, and the embedding grows, tied to the head or not."""
    folder = make_model(tmp_path / "base", family, pad=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    model, tokenizer = _ours_trained(folder)
    rows = model.get_input_embeddings().num_embeddings
    assert rows > AutoConfig.from_pretrained(folder).vocab_size
    save_pretrained_model(model, tokenizer, tmp_path / "saved")
    save_lora_adapter(model, tokenizer, str(folder), tmp_path / "adapter")
    merged = merge_lora(tmp_path / "adapter")
    want, got = load_file(tmp_path / "saved/model.safetensors"), load_file(merged / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert AutoConfig.from_pretrained(merged).to_dict() == AutoConfig.from_pretrained(tmp_path / "saved").to_dict() | {
        "_name_or_path": str(merged)
    }
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(rows)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("from_reward_model", [False, True])
def test_a_reward_models_adapter_holds_the_head_and_merges_onto_either_base(tmp_path, merge_lora, from_reward_model):
    """Step 2 starts from a language model, step 3's critic from a reward model."""
    folder = make_model(tmp_path / "base")
    tokenizer = load_hf_tokenizer(folder)
    torch.manual_seed(0)
    model = create_critic_model(folder, tokenizer)
    if from_reward_model:
        save_pretrained_model(model, tokenizer, tmp_path / "reward")
        folder = tmp_path / "reward"
        model = create_critic_model(folder, tokenizer, rlhf_training=True)
    convert_linear_layer_to_lora(model, "all-linear", 4, 8)
    only_optimize_lora_parameters(model, ["v_head.weight"])
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_left_weight, std=0.1)
    nn.init.normal_(model.v_head.weight)
    model.config.reward_score_mean = 0.5
    save_lora_adapter(model, tokenizer, str(folder), tmp_path / "adapter")
    save_pretrained_model(model, tokenizer, tmp_path / "saved")

    beside = {key for key in load_file(tmp_path / "adapter/adapter_model.safetensors") if ".lora_" not in key}
    assert beside == {"base_model.model.score.weight"}
    want = model.eval().forward_value(IDS, torch.ones_like(IDS))["chosen_end_scores"]
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits.squeeze(-1), want, atol=2e-6, rtol=1e-5)

    merged = merge_lora(tmp_path / "adapter")
    assert AutoConfig.from_pretrained(merged).reward_score_mean == 0.5
    stored, expected = load_file(merged / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    scores = _loaded(merged, AutoModelForSequenceClassification)(IDS).logits.squeeze(-1)
    torch.testing.assert_close(scores, want, atol=2e-6, rtol=1e-5)
    again = create_critic_model(merged, tokenizer, rlhf_training=True)
    assert torch.equal(again.v_head.weight, model.v_head.weight)


# --- our layer against PEFT's


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # Linear, Conv1D
def test_our_layers_give_the_logits_and_gradients_of_pefts_on_the_same_weights(tmp_path, family):
    folder = make_model(tmp_path, family)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    convert_linear_layer_to_lora(ours, "auto", 4, 6)
    only_optimize_lora_parameters(ours)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=[name for name, _ in lora_layers(ours)]),
    )
    pairs = [(layer, theirs.base_model.model.get_submodule(name)) for name, layer in lora_layers(ours)]
    for layer, other in pairs:
        nn.init.normal_(layer.lora_left_weight, std=0.1)
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(layer.lora_right_weight.T)
            other.lora_B["default"].weight.copy_(layer.lora_left_weight.T)
    mine, other_logits = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    torch.testing.assert_close(mine.logits, other_logits.logits, atol=1e-6, rtol=1e-5)
    mine.loss.backward()
    other_logits.loss.backward()
    for layer, other in pairs:
        for got, want in (
            (layer.lora_right_weight.grad.T, other.lora_A["default"].weight.grad),
            (layer.lora_left_weight.grad.T, other.lora_B["default"].weight.grad),
        ):
            assert want.abs().max() > 0
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    assert ours.num_parameters(only_trainable=True) == theirs.get_nb_trainable_parameters()[0]


# --- what PEFT trains

SETTINGS = {
    "all linear layers": ("llama", {}),
    "Conv1D": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"])),
    "tied, all linear": ("gpt2", {}),
    "projections outside the blocks": ("opt", {}),
    "rsLoRA": ("llama", dict(use_rslora=True)),
    "patterns": (
        "llama",
        dict(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*k_proj": 20, "o_proj": 1}, use_rslora=True),
    ),
    "all biases": ("gpt2", dict(target_modules=["c_attn"], bias="all")),
    "biases of the layers": ("opt", dict(target_modules=["q_proj", "fc1"], bias="lora_only")),
    "a whole head": ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "a whole embedding": ("llama", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "a whole head, tied": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["lm_head"])),
    "a whole embedding, tied": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["wte"])),
    "both whole, tied": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])),
    "tied for ever": (
        "tied llama",
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "LoRA on the head": ("llama", dict(target_modules=["q_proj", "lm_head"])),
    "LoRA on the head, tied": ("gpt2", dict(target_modules=["c_proj", "lm_head"])),
    "LoRA on the embedding": ("llama", dict(target_modules=["q_proj", "embed_tokens"])),
    "LoRA on the embedding, tied": ("gpt2", dict(target_modules=["c_attn", "wte"])),
    "norms trained whole": ("llama", dict(target_modules=["q_proj"], modules_to_save=["input_layernorm"])),
    "some layers": ("llama", dict(target_modules=["v_proj"], layers_to_transform=[1])),
    "gaussian": ("llama", dict(init_lora_weights="gaussian")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_merged_adapter_of_peft_gives_the_logits_of_pefts_model(tmp_path, merge_lora, case):
    family, settings = SETTINGS[case]
    folder = make_model(tmp_path / "base", family.removeprefix("tied "))
    if family.startswith("tied "):
        config = AutoConfig.from_pretrained(folder, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    want = _peft_trained(folder, tmp_path / "adapter", **settings)
    merged = _loaded(merge_lora(tmp_path / "adapter"))
    torch.testing.assert_close(merged(IDS).logits, want, atol=5e-6, rtol=1e-4)


def test_a_merged_reward_adapter_of_peft_gives_its_scores(tmp_path, merge_lora):
    folder = make_model(tmp_path / "base")

    def with_pad(model):
        model.config.pad_token_id = 0
        return model

    want = _peft_trained(folder, tmp_path / "adapter", AutoModelForSequenceClassification, with_pad)
    merged = _loaded(merge_lora(tmp_path / "adapter"), AutoModelForSequenceClassification)
    assert merged.config.num_labels == 1
    merged.config.pad_token_id = 0
    torch.testing.assert_close(merged(IDS).logits, want, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bin", "bin shards", "safetensors shards", "no prefix", "adapter bin"])
def test_every_kind_of_file_is_read_and_shards_are_written(tmp_path, merge_lora, kind):
    folder = make_model(tmp_path / "base")
    want = _peft_trained(folder, tmp_path / "adapter")
    state = load_file(folder / "model.safetensors")
    if kind == "adapter bin":
        file = tmp_path / "adapter/adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    elif kind == "safetensors shards":
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        (folder / "model.safetensors").unlink(missing_ok=True)
    else:
        (folder / "model.safetensors").unlink()
        if kind == "no prefix":
            torch.save({name.removeprefix("model."): t for name, t in state.items()}, folder / "pytorch_model.bin")
        elif kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            names = sorted(state)
            half = {n: f"pytorch_model-0000{1 + (i > 9)}-of-00002.bin" for i, n in enumerate(names)}
            for file in set(half.values()):
                torch.save({n: state[n] for n in names if half[n] == file}, folder / file)
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": half}))
    merged = merge_lora(tmp_path / "adapter", "--max_shard_size", "20KB")
    assert len(list(merged.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(_loaded(merged)(IDS).logits, want, atol=5e-6, rtol=1e-4)


# --- what is refused


@pytest.fixture
def adapter(tmp_path):
    """(base, adapter) of PEFT, fresh."""
    folder = make_model(tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    return folder, tmp_path / "adapter"


def _edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _edit_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "DoRA": (lambda f: _edit_config(f, use_dora=True), r"DoRA"),
    "another kind": (lambda f: _edit_config(f, peft_type="IA3"), r"only LoRA.*IA3"),
    "PiSSA": (lambda f: _edit_config(f, init_lora_weights="pissa"), r"init_lora_weights 'pissa'"),
    "trainable tokens": (lambda f: _edit_config(f, trainable_token_indices=[1]), r"trainable_token_indices"),
    "tied LoRA on the embedding": (
        lambda f: (
            _edit_config(f, ensure_weight_tying=True),
            _edit_weights(
                f, lambda t: t.update({FIRST.replace("lora_A.weight", "lora_embedding_A"): torch.ones(8, 32)})
            ),
        ),
        r"ensure_weight_tying with LoRA on the embedding",
    ),
    "a setting of tomorrow": (lambda f: _edit_config(f, use_tomorrow=True), r"use_tomorrow"),
    "a broken configuration": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json"),
    "a truncated file": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:200]),
        r"adapter_model\.safetensors cannot be read",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"has neither adapter_model\.safetensors nor"),
    "half a pair": (lambda f: _edit_weights(f, lambda t: t.pop(FIRST)), r"lacks.*layers\.0\.self_attn\.q_proj"),
    "a layer the base has not": (
        lambda f: _edit_weights(
            f, lambda t: t.update({k.replace("s.0", "s.7"): v.clone() for k, v in list(t.items())})
        ),
        r"1 parts that .* has not: model\.layers\.7\.self_attn\.q_proj",
    ),
    "a part without a weight": (
        lambda f: _edit_weights(
            f, lambda t: t.update({k.replace("self_attn.q_proj", "mlp"): v.clone() for k, v in list(t.items())})
        ),
        r"2 parts that .* has not: model\.layers\.0\.mlp, model\.layers\.1\.mlp",
    ),
    "a layer of another width": (
        lambda f: _edit_weights(f, lambda t: t.update({FIRST: torch.zeros(8, 31)})),
        r"layers\.0\.self_attn\.q_proj.*do not fit.*32",
    ),
    "an infinite factor": (
        lambda f: _edit_weights(f, lambda t: t[FIRST].fill_(float("inf"))),
        r"layers\.0\.self_attn\.q_proj\.weight is not finite",
    ),
    "a head of another size": (
        lambda f: _edit_weights(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(7, 32)})),
        r"lm_head\.weight \(7, 32\) in place of",
    ),
    "a weight that is no LoRA": (
        lambda f: _edit_weights(f, lambda t: t.update({FIRST.replace("A.weight", "magnitude_vector"): torch.ones(32)})),
        r"lora_magnitude_vector is not a weight of a plain LoRA",
    ),
    "a pickle": (
        lambda f: ((f / "adapter_model.safetensors").unlink(), torch.save({"a": Path("x")}, f / "adapter_model.bin")),
        r"adapter_model\.bin holds more than tensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_refused_by_name_and_nothing_is_written(adapter, merge_lora, tmp_path, case):
    spoil, message = REFUSED[case]
    spoil(adapter[1])
    with pytest.raises(UserError, match=message):
        merge_lora(adapter[1])
    assert not list((tmp_path / "merged").rglob("*.safetensors"))


def test_a_quantised_base_and_a_folder_of_the_input_are_refused(adapter, merge_lora):
    base, folder = adapter
    with pytest.raises(UserError, match=r"--output_dir .*--base_model folder"):
        merge_lora(folder, output="base")
    with pytest.raises(UserError, match=r"--output_dir .*--adapter folder"):
        merge_lora(folder, output="adapter")
    with pytest.raises(UserError, match=r"--max_shard_size many"):
        merge_lora(folder, "--max_shard_size", "many")
    with pytest.raises(UserError, match=r"holds no weights|no model could be loaded|nowhere"):
        merge_lora(folder, "--base_model", base / "nowhere")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UserError, match=r"is quantised"):
        merge_lora(folder)


def _own_memory() -> int:
    """Bytes of this process that are no mapped file."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))


def test_the_memory_needed_is_not_that_of_the_model(tmp_path, merge_lora, monkeypatch):
    """A base of 200 MB in one file, no weight of it above 4 MB."""
    make_tokenizer(tmp_path / "base")
    sizes = dict(hidden_size=1024, intermediate_size=1024, num_hidden_layers=7, num_attention_heads=8, vocab_size=400)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    model.save_pretrained(tmp_path / "base")
    only_optimize_lora_parameters(convert_linear_layer_to_lora(model, "q_proj", 4))
    save_lora_adapter(model, load_hf_tokenizer(tmp_path / "base"), str(tmp_path / "base"), tmp_path / "adapter")
    del model
    assert (tmp_path / "base/model.safetensors").stat().st_size > 200e6
    seen, before, write = [], _own_memory(), SafetensorsWriter.write

    def watched(self, name, value):
        seen.append(_own_memory() - before)
        write(self, name, value)

    monkeypatch.setattr(SafetensorsWriter, "write", watched)
    merge_lora(tmp_path / "adapter")
    assert len(seen) == 7 * 9 + 3
    assert max(seen) < 60e6
