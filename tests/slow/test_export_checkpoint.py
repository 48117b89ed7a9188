"""inference/export_checkpoint.py: the model of a checkpoint is, file by file, what its run saves at that step."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import PROJECT, flags, killed_after, zero_stage
from safetensors.torch import load_file
from test_checkpoint import LORA, own_flags

from utils.model.tokenizer import load_hf_tokenizer
from utils.process.errors import UserError
from utils.run.checkpoint_files import newest_checkpoint

CASES = {
    **{f"step {step}, ZeRO-{stage}": (step, zero_stage(step, stage)) for step in (1, 2, "dpo") for stage in range(4)},
    **{f"step 3, ZeRO-{stage}, EMA": (3, f"{zero_stage(3, stage)} --enable_ema") for stage in range(4)},
    **{f"sft, bf16, ZeRO-{stage}": (1, f"--zero_stage {stage} --dtype bf16") for stage in range(4)},
    "sft, fp32 sums": (1, "--zero_stage 1 --dtype bf16 --grad_accum_dtype fp32"),
    "sft, LoRA alone": (1, LORA),
    "sft, LoRA alone at stage 3": (1, f"--zero_stage 3 {LORA}"),
    "sft, LoRA and all else": (1, "--lora_dim 2 --zero_stage 2"),
    "reward, LoRA alone": (2, LORA),
    "dpo, LoRA alone, bf16": ("dpo", f"{LORA} --dtype bf16"),
    "sft, QLoRA": (1, f"{LORA} --quantize int8 --only_optimize_lora"),
    "sft, QLoRA, nf4": (1, f"--zero_stage 1 {LORA} --quantize nf4 --quantize_double"),
    "reward, QLoRA": (2, f"{LORA} --quantize int8 --zero_stage 2"),
    "sft, prompt tuning": (1, "--soft_prompt prompt_tuning --num_virtual_tokens 3 --zero_stage 3"),
    "sft, p-tuning": (1, "--soft_prompt p_tuning --num_virtual_tokens 3 --dtype bf16 --zero_stage 2"),
    "rlhf, LoRA and adapters": (3, "--actor_lora_dim 2 --only_optimize_lora --save_lora_adapters --enable_ema"),
    "rlhf, LoRA alone, EMA": (3, "--actor_lora_dim 2 --critic_lora_dim 2 --enable_ema --only_optimize_lora"),
}


@pytest.fixture
def export(monkeypatch, tmp_path):
    """export(checkpoint, flags...) -> the folder of the model."""

    def run(checkpoint: Path, *more, output: str = "exported") -> Path:
        monkeypatch.syspath_prepend(str(PROJECT / "inference"))
        import export_checkpoint

        monkeypatch.setattr(sys, "argv", ["export_checkpoint.py", *map(str, (checkpoint, tmp_path / output, *more))])
        export_checkpoint.main()
        return tmp_path / output

    return run


def assert_same_files(saved: Path, exported: Path) -> None:
    names = {file.name for file in saved.iterdir() if file.is_file()} - {"README.md", "metrics.jsonl", "samples.jsonl"}
    names -= {"run_config.yaml", "best.json"}
    assert names == {file.name for file in exported.iterdir() if file.is_file()}
    for name in names:
        if name.endswith(".safetensors"):
            want, got = load_file(saved / name), load_file(exported / name)
            assert want.keys() == got.keys()
            assert all(torch.equal(want[key], got[key]) and want[key].dtype == got[key].dtype for key in want), name
        elif name.endswith(".json"):
            assert json.loads((saved / name).read_text()) == json.loads((exported / name).read_text()), name
        else:
            assert (saved / name).read_bytes() == (exported / name).read_bytes(), name
    assert (saved / "adapter").is_dir() == (exported / "adapter").is_dir()
    if (saved / "adapter").is_dir():
        assert_same_files(saved / "adapter", exported / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_a_last_checkpoint_becomes_the_model_of_the_run(run_step, start, small_models, tmp_path, export, case):
    step, text = CASES[case]
    arguments = [*start(step), *own_flags(text, small_models), *flags("--num_train_epochs 1 --checkpoint_steps 1")]
    arguments += flags("--eval_interval 1") if step == 2 else []  # which measures the scale of a reward model's scores
    run_step(step, [*arguments, "--output_dir", tmp_path / "run"])
    checkpoints = tmp_path / "run/checkpoints"
    if step != 3:
        assert_same_files(tmp_path / "run", export(checkpoints))
        return
    for engine in ("actor", "critic", "actor_ema"):
        more = ["--save_lora_adapters"] if "adapters" in text and engine != "critic" else []
        exported = export(newest_checkpoint(checkpoints).folder, "--engine", engine, *more, output=engine)
        assert_same_files(tmp_path / "run" / engine, exported)


@pytest.fixture
def saved(run_step, start, tmp_path):
    """The folder of checkpoints of a run of step 1 at ZeRO-2, killed after step 2."""
    with killed_after(2):
        run_step(1, [*start(1), *flags("--zero_stage 2 --checkpoint_steps 2", output_dir=tmp_path / "run")])
    return tmp_path / "run/checkpoints"


def test_what_cannot_be_exported_is_refused(saved, small_models, export, tmp_path):
    checkpoint = newest_checkpoint(saved).folder
    for more, message in (
        (["--engine", "critic"], "holds no critic; it holds model: leave --engine out"),
        (["--model", small_models / "reward"], "does not hold the weights that the run .* started from"),
        (["--save_lora_adapters"], "--save_lora_adapters: the run did not train LoRA layers alone"),
    ):
        with pytest.raises(UserError, match=message):
            export(checkpoint, *more)
    with pytest.raises(UserError, match="is the checkpoint itself"):
        export(checkpoint, output=checkpoint / "model")
    with pytest.raises(UserError, match="is no checkpoint"):
        export(tmp_path)
    assert not list((tmp_path / "exported").iterdir())


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("RAN"),)


def _cut_short(content: dict) -> None:
    content["param_shapes"] = content["param_shapes"][:1]


MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
HARM = {
    "a pickle bomb": (MODEL, lambda content: content.update(more=Bomb()), "could not be read"),
    "groups without shapes": (MODEL, _cut_short, "does not hold"),
    "a stage in words": (MODEL, lambda c: c["ds_config"].update(zero_optimization="all"), "does not hold"),
    "places in no group": (
        OPTIMIZER,
        lambda content: content["optimizer_state_dict"].update(param_slice_mappings=[{}, {}]),
        "does not hold",
    ),
    "places beyond the end": (
        OPTIMIZER,
        lambda content: content["optimizer_state_dict"].update(single_partition_of_fp32_groups=[torch.zeros(3)] * 2),
        "does not hold",
    ),
    "steps in words": (
        OPTIMIZER,
        lambda content: content["optimizer_state_dict"]["base_optimizer_state"]["state"][0].update(step="many"),
        "does not hold",
    ),
}


@pytest.mark.parametrize("case", HARM)
def test_files_that_do_harm_are_refused(saved, run_step, start, export, tmp_path, monkeypatch, case):
    """By the export, and by a run that reads them for another ZeRO stage."""
    name, damage, message = HARM[case]
    checkpoint = newest_checkpoint(saved).folder
    content = torch.load(checkpoint / "model" / name, weights_only=False)
    damage(content)
    torch.save(content, checkpoint / "model" / name)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][f"model/{name}"] = (checkpoint / "model" / name).stat().st_size
    (checkpoint / "state.json").write_text(json.dumps(state))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        export(checkpoint)
    with pytest.raises(UserError, match=message):
        run_step(1, [*start(1), *flags("--zero_stage 3", resume=checkpoint, output_dir=tmp_path / "other")])
    assert not list(tmp_path.rglob("RAN")) and not list((tmp_path / "exported").iterdir())


def test_a_model_that_moved_and_a_checkpoint_of_an_earlier_version(saved, small_models, export, tmp_path, capsys):
    checkpoint = newest_checkpoint(saved).folder
    before = export(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    state["flags"]["model_name_or_path"] = "/nowhere"
    del state["prompt_format"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="/nowhere"):
        export(checkpoint, output="again")
    moved = shutil.copytree(small_models / "actor", tmp_path / "moved")
    export(checkpoint, "--model", moved, output="again")
    assert "does not tell the prompt format" in capsys.readouterr().out
    after = export(checkpoint, "--model", moved, "--prompt_format", "human_assistant", output="named")
    assert_same_files(before, after)


def test_a_checkpoint_given_as_a_model_is_refused_with_the_command(saved):
    for folder in (saved, newest_checkpoint(saved).folder):
        with pytest.raises(UserError, match=f"export_checkpoint.py {folder} exported"):
            load_hf_tokenizer(folder)
