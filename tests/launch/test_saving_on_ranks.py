"""Saved models: the same files from two ranks at any ZeRO stage, names on the hub, broken files refused by all."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import SCRIPTS, flags, launch, make_model, make_reward_model
from safetensors.torch import load_file, save_file

from utils.model.loading import find_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("model*"))}


@pytest.fixture(scope="module")
def saved_at(tmp_path_factory):
    """{stage: folder} of an actor and a reward model with LoRA, saved by two ranks at ZeRO 0 and 3."""
    base = tmp_path_factory.mktemp("saved_at")
    model = make_model(base / "model")
    code, console = launch(SCRIPTS / "save_on_ranks.py", [model, base], "torchrun", ranks=2)
    assert code == 0, console
    return base


def test_zero_0_and_zero_3_write_the_same_bytes(saved_at):
    for kind in ("actor", "reward"):
        for part in ("", "weights"):
            zero, three = (contents(saved_at / stage / kind / part) for stage in ("0", "3"))
            assert zero
            assert zero == three
        for file in (saved_at / "0" / kind).glob("*.json"):
            assert file.read_bytes() == (saved_at / "3" / kind / file.name).read_bytes(), file.name
    assert (saved_at / "3/reward/model.safetensors.index.json").is_file()
    plain = load_file(saved_at / "model/model.safetensors")
    folded = load_file(saved_at / "3/actor/model.safetensors")
    assert plain.keys() == folded.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain[name], folded[name])
    assert torch.equal(plain["model.embed_tokens.weight"], folded["model.embed_tokens.weight"])


def test_zero_3_never_gathers_more_than_a_layer(saved_at):
    for rank in (0, 1):
        assert 0 < float((saved_at / f"3.gathered{rank}").read_text()) < 0.5


def test_a_reward_model_by_its_hub_name(tmp_path):
    repo = tmp_path / "hub/models--someone--judge"
    saved = make_reward_model(tmp_path / "saved", make_model(tmp_path / "opt", "opt"))
    head = find_checkpoint(saved).value_head().double().sum().item()
    snapshot, blobs = repo / "snapshots/0123", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    for number, file in enumerate(sorted(saved.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    script, environment = SCRIPTS / "load_by_hub_name.py", {"HF_HUB_CACHE": str(repo.parent), "HF_HUB_OFFLINE": "1"}
    code, console = launch(script, ["someone/judge"], **environment)
    assert code == 0, console
    assert f"head {head}" in console
    code, console = launch(script, ["nobody/judge"], **environment)
    assert code != 0
    assert "nobody/judge" in console


def test_a_wrong_checkpoint_is_refused_at_zero_3_on_both_ranks_before_data_is_prepared(
    model_folder, pairs_folder, tmp_path
):
    layer, folder = "model.layers.1.mlp.up_proj.weight", tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors") | {layer: torch.zeros(3, 4)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    data = dict(data_path=pairs_folder, data_output_path=tmp_path / "cache")
    arguments = flags("--zero_stage 3 --dtype fp32", model_name_or_path=folder, **data)
    code, console = launch(1, arguments, "torchrun", ranks=2)
    assert code != 0
    assert f"of another shape: {layer}" in console
    assert "Traceback" not in console.split("error: ")[0]
    assert not any((tmp_path / "cache").iterdir())
