"""Saved models: what the files hold, whatever ZeRO stage wrote them; broken and foreign checkpoints; old layouts."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import FAMILIES, flags, make_model, make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from utils.data.batching import pad_rows
from utils.model import saving
from utils.model.inputs import model_inputs
from utils.model.loading import find_checkpoint
from utils.model.model_utils import check_model, create_critic_model, create_hf_model
from utils.model.shards import SafetensorsWriter
from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError
from utils.run.results import save_hf_format
from utils.utils import save_zero_three_model

SMALL = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
KINDS = {
    **{name: dict(SMALL, model_type=name) for name in ("mistral", "qwen2", "phi", "gpt_neox")},
    "llama tied": dict(SMALL, model_type="llama", tie_word_embeddings=True),
    "qwen3 tied": dict(SMALL, model_type="qwen3", tie_word_embeddings=True, head_dim=8),
    "gemma tied": dict(SMALL, model_type="gemma", head_dim=8),
    "opt tied": dict(FAMILIES["opt"], vocab_size=320, max_position_embeddings=64),
    "gpt2 tied": dict(FAMILIES["gpt2"], vocab_size=320),
    "gpt2 with a head of its own": dict(FAMILIES["gpt2"], vocab_size=320, tie_word_embeddings=False),
    "bloom tied": dict(FAMILIES["bloom"], vocab_size=320),
    "gptj": dict(model_type="gptj", vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    # Its experts lie in one tensor here and in many in its files.
    "mixtral": dict(SMALL, model_type="mixtral", num_local_experts=4),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("model*"))}


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_bit_for_bit_those_of_save_pretrained(kind, size, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**KINDS[kind]))
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    saving.save_pretrained_model(model, tokenizer, tmp_path / "ours", size)
    if kind == "mixtral" and size != "5GB":  # transformers counts a whole layer's experts for each expert of a shard
        assert max(file.stat().st_size for file in (tmp_path / "ours").glob("*.safetensors")) < 20_000 * 2.5
    else:
        assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_streamed_file_is_the_librarys_own_for_every_dtype_and_shape(tmp_path):
    tensors = {
        f"t{number}": torch.randn(shape).to(dtype)
        for number, (shape, dtype) in enumerate(
            [((3, 5), torch.bfloat16), ((), torch.float32), ((7,), torch.float16), ((0, 4), torch.int64)]
        )
    }
    writer = SafetensorsWriter(tmp_path / "ours", {k: v.to("meta") for k, v in tensors.items()})
    assert sorted(writer.missing) == sorted(tensors)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    assert not writer.missing
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())
    writer = SafetensorsWriter(tmp_path / "other", {"a": torch.empty(2, device="meta")})
    with pytest.raises(ValueError, match="announced"):
        writer.write("a", torch.zeros(3))
    writer.close()


def test_a_failing_disk_is_told_and_leaves_the_old_model(model_folder, tmp_path, monkeypatch):
    tokenizer = load_hf_tokenizer(model_folder)
    model = create_hf_model(AutoModelForCausalLM, model_folder, tokenizer)
    args = SimpleNamespace(output_dir=tmp_path / "out")
    save_hf_format(model, tokenizer, args)
    before = contents(tmp_path / "out")

    def full(self, name, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    next(model.parameters()).data.zero_()
    with pytest.raises(UserError, match="No space left"):
        save_hf_format(model, tokenizer, args)
    assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob(".saving*"))


# What is read


def _as_bin(folder: Path, target: Path, shards: int = 0) -> Path:
    """The model of a folder in the old format."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = list(weights)
    if not shards:
        torch.save(weights, target / "pytorch_model.bin")
        return target
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: weights[name] for name in names[number::shards]}, target / file)
        weight_map |= dict.fromkeys(names[number::shards], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("shards", [0, 3])
def test_pytorch_model_bin_is_read(shards, model_folder, tmp_path):
    folder = _as_bin(model_folder, tmp_path / "bin", shards)
    tokenizer = load_hf_tokenizer(folder)
    model = create_hf_model(AutoModelForCausalLM, folder, tokenizer)
    for name, value in load_file(model_folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.fixture
def reward_model(tmp_path):
    """(an OPT reward model with a head, its tokenizer, the folder of its language model)"""
    folder = make_model(tmp_path / "opt", "opt")
    tokenizer = load_hf_tokenizer(folder)
    torch.manual_seed(3)
    return create_critic_model(folder, tokenizer).eval(), tokenizer, folder


def _published(model, folder: Path, source: Path, prefix: str, file: str) -> Path:
    """A reward model as the published scripts saved it: their names, the configuration of the language model."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    weights = {
        name.replace("rwtransformer", prefix): value.clone().contiguous() for name, value in model.state_dict().items()
    }
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "OPTModel"])
@pytest.mark.parametrize("prefix", ["rwtransformer", "rwtranrsformer"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_published_reward_models_give_their_scores_everywhere(reward_model, tmp_path, architecture, prefix, file):
    from evaluation_scripts import rw_eval

    model, tokenizer, source = reward_model
    folder = _published(model, tmp_path / "published", source, prefix, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    ids, mask = pad_rows([[10, 11, 12], [13, 14]], tokenizer.pad_token_id)
    critic = create_critic_model(folder, tokenizer, rlhf_training=True).eval()
    judge = rw_eval.load_judge(
        str(folder), rw_eval.parse_args(["--model_name_or_path", str(folder), "--device", "cpu"])
    )
    with torch.no_grad():
        wanted = model.forward_value(ids, mask)["chosen_end_scores"]
        assert torch.equal(critic.forward_value(ids, mask)["chosen_end_scores"], wanted)
    scores = rw_eval.score_rows(judge.model, [[10, 11, 12], [13, 14]], 2)
    assert scores == pytest.approx(wanted.tolist(), abs=1e-6)
    save_hf_format(critic, tokenizer, SimpleNamespace(output_dir=tmp_path / "saved"))
    names = set(load_file(tmp_path / "saved/model.safetensors"))
    assert "score.weight" in names
    assert not any("rwtran" in name or "v_head" in name for name in names)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _change(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _index(folder: Path, weight_map: dict) -> None:
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


LAYER = "model.layers.1.mlp.up_proj.weight"
BREAK = {
    "missing": (lambda f: _change(f, lambda w: w.pop(LAYER)), rf"missing: {re.escape(LAYER)}"),
    "mis-sized": (
        lambda f: _change(f, lambda w: w.update({LAYER: torch.zeros(3, 4)})),
        rf"of another shape: {re.escape(LAYER)} \(3, 4\) in place of \(48, 32\)",
    ),
    "a layer too many": (
        lambda f: _change(f, lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(48, 32)})),
        r"without a place: model\.layers\.7\.mlp\.up_proj\.weight",
    ),
    "a bias too many": (
        lambda f: _change(f, lambda w: w.update({"model.layers.1.mlp.up_proj.bias": torch.zeros(48)})),
        r"without a place: model\.layers\.1\.mlp\.up_proj\.bias",
    ),
    "LoRA left apart": (
        lambda f: _change(f, lambda w: w.update({"model.layers.1.mlp.up_proj.lora_right_weight": torch.zeros(2, 2)})),
        "merge_lora",
    ),
    "truncated safetensors": (lambda f: _cut(f / "model.safetensors"), r"model\.safetensors cannot be read"),
    "index not JSON": (
        lambda f: (_index(f, {}), (f / "model.safetensors.index.json").write_text("{")),
        r"model\.safetensors\.index\.json is not an index",
    ),
    "index without a table": (
        lambda f: (_index(f, {}), (f / "model.safetensors.index.json").write_text("[]")),
        r"model\.safetensors\.index\.json is not an index",
    ),
    "absent shard": (lambda f: _index(f, {LAYER: "model-00001-of-00002.safetensors"}), "which is not there"),
    "shard outside": (lambda f: _index(f, {LAYER: "../elsewhere.safetensors"}), "only files beside the index"),
    "shard by absolute path": (lambda f: _index(f, {LAYER: "/etc/passwd"}), "only files beside the index"),
    "link outside": (
        lambda f: (
            (f / "model.safetensors").rename(f.parent / "outside"),
            (f / "model.safetensors").symlink_to(f.parent / "outside"),
        ),
        "is a link out of its folder",
    ),
    "linked shard outside": (
        lambda f: (
            _index(f, {LAYER: "one.safetensors"}),
            (f / "elsewhere.safetensors").rename(f.parent / "outside"),
            (f / "one.safetensors").symlink_to(f.parent / "outside"),
        ),
        "is a link out of its folder",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "config of no kind": (lambda f: (f / "config.json").write_text("[1]"), "no model could be loaded"),
    "config with nonsense": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}'),
        "no model could be loaded",
    ),
}


@pytest.mark.parametrize("damage", BREAK)
def test_a_wrong_checkpoint_is_refused_with_file_and_keys(damage, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    break_it, message = BREAK[damage]
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        check_model(AutoModelForCausalLM, folder)
    assert "weights_only=False" not in str(caught.value)


def test_a_pickle_that_would_run_code_is_refused(model_folder, tmp_path):
    folder = _as_bin(model_folder, tmp_path / "bin")
    file = folder / "pytorch_model.bin"
    for value in (Bomb(tmp_path / "exploded"), {"model.norm.weight": Bomb(tmp_path / "exploded")}):
        torch.save(value, file)
        with pytest.raises(UserError, match=r"pytorch_model\.bin holds more than tensors"):
            check_model(AutoModelForCausalLM, folder)
        assert not (tmp_path / "exploded").exists()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, file)
    with pytest.raises(UserError, match="not a plain table"):
        check_model(AutoModelForCausalLM, folder)
    torch.save({f"w{i}": torch.zeros(100) for i in range(9)}, file)
    _cut(file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read"):
        check_model(AutoModelForCausalLM, folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        check_model(AutoModelForCausalLM, folder)


def test_weights_of_another_family_are_refused_with_what_is_there_instead(model_folder, tmp_path):
    other = make_model(tmp_path / "gpt2", "gpt2")
    shutil.copy(model_folder / "model.safetensors", other)
    with pytest.raises(UserError, match=r"missing: transformer\.h\.0.*there instead: .*model\.layers\.0"):
        check_model(AutoModelForCausalLM, other)
    with pytest.raises(UserError, match=r"missing: h\.0"):
        check_model(AutoModel, other)


def test_weights_in_other_parts_of_a_checkpoint_are_counted_and_told(model_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    extra = {f"vision_tower.layers.{i}.weight": torch.zeros(2) for i in range(9)}
    _change(folder, lambda weights: weights.update(extra))
    create_hf_model(AutoModelForCausalLM, folder, load_hf_tokenizer(folder))
    check_model(AutoModelForCausalLM, folder)
    told = capsys.readouterr().err
    assert told.count("9 weights have no place") == 1
    assert "vision_tower.layers.0.weight" in told
    assert "and 1 more" in told


def test_gpt_2s_old_masks_are_no_surplus(tmp_path, capsys):
    folder = make_model(tmp_path / "gpt2", "gpt2")
    _change(folder, lambda w: w.update({f"transformer.h.{i}.attn.masked_bias": torch.zeros(1) for i in (0, 1)}))
    check_model(AutoModelForCausalLM, folder)
    assert "no place" not in capsys.readouterr().err


# Reward models in plain transformers


@pytest.mark.parametrize("kind", [*KINDS, "gpt_neo", "falcon"])
def test_a_reward_model_scores_alike_in_plain_transformers_for_pads_on_either_side(kind, tmp_path):
    more = {
        "gpt_neo": dict(
            model_type="gpt_neo", vocab_size=320, hidden_size=32, num_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]],
        ),
        "falcon": dict(model_type="falcon", vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    }  # fmt: skip
    tokenizer = make_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(KINDS | more)[kind], eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = create_critic_model(tmp_path / "base", load_hf_tokenizer(tmp_path / "base")).eval()
    save_hf_format(model, tokenizer, SimpleNamespace(output_dir=tmp_path / "saved"))
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert plain.config.num_labels == 1
    rows = [[10, 11, 12, tokenizer.eos_token_id], [13, 14, tokenizer.eos_token_id], [15]]
    scores = []
    for side in ("right", "left"):
        ids, mask = pad_rows(rows, tokenizer.pad_token_id, side)
        with torch.no_grad():
            scores += [model.forward_value(ids, mask)["chosen_end_scores"]]
            scores += [plain.eval()(**model_inputs(plain, ids, mask)).logits.squeeze(1)]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-5, rtol=0)
    assert scores[0].std() > 1e-3


def test_a_family_without_a_classifier_is_refused_as_reward_model_at_once(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    config = AutoConfig.for_model(
        "codegen", vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_ctx=64, pad_token_id=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no sequence-classification model for CodeGenConfig"):
        create_critic_model(tmp_path, tokenizer)
    create_hf_model(AutoModelForCausalLM, tmp_path, tokenizer)


def test_a_reward_model_saves_and_reads_its_head_in_shards(reward_model, tmp_path):
    model, tokenizer, _ = reward_model
    save_hf_format(model, tokenizer, SimpleNamespace(output_dir=tmp_path / "saved", max_shard_size=20_000))
    assert len(find_checkpoint(tmp_path / "saved").files) > 2
    assert torch.equal(find_checkpoint(tmp_path / "saved").value_head(), model.v_head.weight)


def test_weights_alone_are_saved_in_the_same_names(reward_model, tmp_path):
    model, tokenizer, _ = reward_model
    save_hf_format(model, tokenizer, SimpleNamespace(output_dir=tmp_path / "saved"))
    save_zero_three_model(model, 0, tmp_path / "weights")
    assert [file.name for file in (tmp_path / "weights").iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "weights/model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(load_file(tmp_path / "saved/model.safetensors"))


def test_a_second_save_leaves_nothing_of_the_first_to_be_loaded(tmp_path, model_folder):
    tokenizer = load_hf_tokenizer(model_folder)
    model = create_critic_model(model_folder, tokenizer)
    for size, value in (("5GB", 1.0), ("10KB", 2.0), ("5GB", 3.0)):
        model.v_head.weight.data.fill_(value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "MAX_SHARD_SIZE", size)
            save_hf_format(model, tokenizer, SimpleNamespace(output_dir=str(tmp_path)))
        assert (find_checkpoint(tmp_path).value_head() == value).all()
        assert (AutoModelForSequenceClassification.from_pretrained(tmp_path).score.weight == value).all()
        assert (tmp_path / "config.json").stat().st_mode & 0o044 == next(
            tmp_path.glob("model*.safetensors")
        ).stat().st_mode & 0o044


def test_weights_that_the_last_pass_fetched_ahead_at_stage_3_are_saved(run_step, start, tmp_path):
    """Of weights that do not all stay gathered; DeepSpeed asserts that none is under way when they are gathered."""
    file = tmp_path / "fetch_ahead.json"
    ahead = dict(stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=2000)
    room = dict(stage3_max_live_parameters=50_000, stage3_max_reuse_distance=50_000, reduce_bucket_size=1_000_000)
    file.write_text(json.dumps({"zero_optimization": ahead | room}))
    arguments = flags("--num_train_epochs 1 --max_train_samples 8", deepspeed_config_overrides=file)
    for stage in (1, 3):
        run_step(1, [*start(1), *arguments, *flags(zero_stage=stage, output_dir=tmp_path / str(stage))])
    want, got = (load_file(tmp_path / stage / "model.safetensors") for stage in ("1", "3"))
    assert want.keys() == got.keys() and all(torch.allclose(want[name], got[name], atol=1e-5) for name in want)
