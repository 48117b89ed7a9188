"""Step 1 on two ranks, all runs in one launch: QLoRA and soft prompts as in one process, offloading as without it."""

import importlib.util
import json

import pytest
import torch
from helpers import flags, read_metrics, run_in_one_launch
from safetensors.torch import load_file

ADAPTED = "--data_split 1,0,0 --max_seq_len 64 --dtype fp32"
ADAPTERS = {  # name: (flags, what two ranks have beside them, the package that it takes)
    "qlora": (
        f"{ADAPTED} --quantize nf4 --lora_dim 4 --lora_scaling 8 --lora_learning_rate 1e-2",
        "--zero_stage 2",
        "bitsandbytes",
    ),
    "prompt_tuning": (f"{ADAPTED} --num_virtual_tokens 5 --soft_prompt prompt_tuning", "--zero_stage 3", "peft"),
    "p_tuning": (f"{ADAPTED} --num_virtual_tokens 5 --soft_prompt p_tuning", "--zero_stage 3", "peft"),
}
OFFLOADING = {
    "plain": "--zero_stage 2",
    "optimizer": "--zero_stage 2 --offload",
    "both": "--zero_stage 3 --offload",
    "parameters": "--zero_stage 3 --deepspeed_config_overrides FILE",
}


@pytest.fixture(scope="module")
def places(small_models, pairs_folder, cache_folder):
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, model_name_or_path=small_models / "actor")
    return places | dict(deepspeed_config_overrides=small_models / "buckets.json")


@pytest.fixture(scope="module")
def two_ranks(places, tmp_path_factory):
    """The folder of all runs, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("two_ranks")
    file = folder / "parameters.json"
    bucket = {"reduce_bucket_size": 1_000_000}  # as small_models/buckets.json has it
    file.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "cpu"}, **bucket}}))
    small = """
        --data_split 1,1,1 --max_train_samples 16 --max_eval_samples 8 --per_device_train_batch_size 2 --max_seq_len 48
        --dtype fp32 --learning_rate 1e-3
    """
    runs = {name: f"{small} {text.replace('FILE', str(file))}" for name, text in OFFLOADING.items()}
    for name, (text, stage, package) in ADAPTERS.items():
        if importlib.util.find_spec(package):
            runs[name] = f"{text} {stage} --per_device_train_batch_size 4"
    run_in_one_launch(
        [(1, [*flags(output_dir=folder / name, **places), *flags(text)]) for name, text in runs.items()], folder
    )
    return folder


def in_one_process(name, run_step, places, output):
    """The same run with the rows of both ranks."""
    text, _, package = ADAPTERS[name]
    pytest.importorskip(package)
    run_step(1, flags(f"{text} --per_device_train_batch_size 8", output_dir=output, **places))


def test_two_ranks_with_zero_2_train_qlora_as_one_process_does(tmp_path, two_ranks, places, run_step):
    in_one_process("qlora", run_step, places, tmp_path)
    one, two = ([row["train/loss"] for row in read_metrics(folder)] for folder in (tmp_path, two_ranks / "qlora"))
    assert one == pytest.approx(two, abs=2e-4)
    assert (two_ranks / "qlora/model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_zero_3_on_two_ranks_trains_and_saves_the_soft_prompt_that_one_process_does(
    tmp_path, two_ranks, places, run_step, kind
):
    in_one_process(kind, run_step, places, tmp_path)
    one, two = (
        load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (tmp_path, two_ranks / kind)
    )
    assert one.shape == (5, 32)
    torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3)


def test_offloaded_training_is_the_same_training(two_ranks):
    """Optimizer on the host at stage 2, parameters too at stage 3, parameters alone by a file."""
    losses = {name: [row["train/loss"] for row in read_metrics(two_ranks / name)] for name in OFFLOADING}
    weights = {name: load_file(two_ranks / name / "model.safetensors") for name in OFFLOADING}
    assert len(losses["plain"]) == 4
    assert losses["plain"][0] != losses["plain"][-1]
    for name in OFFLOADING:
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-4), name
        for key, value in weights["plain"].items():
            torch.testing.assert_close(
                weights[name][key], value, atol=5e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
