"""What can be seen without work is said at once, in one line: flags, models, GPUs, threads, divergence."""

import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import PROJECT, flags, read_metrics, surroundings
from huggingface_hub.errors import RepositoryNotFoundError

from utils import arguments
from utils.model import loading, model_utils
from utils.model.losses import perplexity_of, warn_diverged
from utils.process import hub, launch, operators
from utils.process.errors import SharedError, UserError

# ---------------------------------------------------------------- flags

BAD_FLAGS = {
    "--learnign_rate 3": "unknown flag --learnign_rate (did you mean --learning_rate?)",
    "--frobnicate=3": "unknown flag --frobnicate",
    "--data_pth x --dropuot 3": "unknown flag --data_pth (did you mean --data_path?); "
    "unknown flag --dropuot (did you mean --dropout?)",
    "--dtype bf61": "--dtype: 'bf61' is none of fp16, bf16, fp32 (did you mean bf16?)",
    "--lr_scheduler_type cosin": "--lr_scheduler_type: 'cosin' is none of linear, cosine, cosine_with_restarts, "
    "polynomial, constant, constant_with_warmup (did you mean cosine?)",
    "--seed 1 two": "two: belongs to no flag",
    "--num_warmup_steps 3 --warmup_ratio 0.1": "--warmup_ratio: not allowed with argument --num_warmup_steps",
}


@pytest.mark.parametrize("text", BAD_FLAGS)
def test_a_bad_flag_is_one_line_with_the_nearest_and_without_the_usage(text, capsys, monkeypatch):
    parser = arguments.build_parser(1)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--model_name_or_path", "x", *text.split()])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"\nerror: {BAD_FLAGS[text]}" in printed and printed.count("\n") == 2 and "usage" not in printed
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parser.parse_args(["--model_name_or_path", "x", *text.split()])
    assert torch.distributed.is_initialized() or capsys.readouterr().err == ""


# ---------------------------------------------------------------- models and the hub


@pytest.fixture
def hub_says(monkeypatch):
    """hub_says(error or None): what the hub answers; counts how often it is asked."""
    asked = []

    def set_answer(answer):
        monkeypatch.setattr(loading, "trouble_with_hub", lambda *name: asked.append(name) or answer)
        return asked

    return set_answer


def _not_found():
    return RepositoryNotFoundError.__new__(RepositoryNotFoundError)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "~/model", "a b/c"])
def test_a_path_is_no_question_to_the_hub(name, hub_says):
    asked = hub_says(None)
    with pytest.raises(UserError, match=r"no model could be loaded from .*there is no such folder"):
        loading.load_config(name)
    assert not asked


def test_a_file_is_no_model(tmp_path, hub_says):
    asked = hub_says(None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"give the folder that holds its config\.json"):
        loading.load_config(tmp_path / "model.gguf")
    assert not asked


def test_a_hub_without_the_model_and_a_hub_out_of_reach_are_told_apart(hub_says, monkeypatch):
    hub_says(_not_found())
    with pytest.raises(UserError, match=r"output/sft'.* there is no such folder .*, and the hub has none of this name"):
        loading.load_config("output/sft")
    hub_says(OSError("no route to host\nmore"))
    with pytest.raises(UserError) as refused:
        loading.load_config("some/model")
    assert "the hub does not answer: no route to host. Where there is a network: hf download some/model" in str(
        refused.value
    )


def test_an_earlier_download_is_used_and_said_where_the_hub_does_not_answer(hub_says, monkeypatch, capsys):
    hub_says(OSError("no route to host"))
    monkeypatch.setattr(loading.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *name: "/cache/config.json")
    loading.check_there("some/other-model")
    assert loading.huggingface_hub.constants.HF_HUB_OFFLINE is True
    assert "some/other-model: read from an earlier download, since the hub does not answer" in capsys.readouterr().err


def test_a_hub_that_never_answers_costs_seconds(tmp_path):
    """A server that takes connections and says nothing."""
    with launch.socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = "import utils.process.hub as hub; hub.HUB_SECONDS = 1; print(hub.trouble_with_hub('a/b', 'model'))"
        environment = surroundings(HF_ENDPOINT=address, HF_HUB_OFFLINE="0", PYTHONPATH=str(PROJECT))
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "timed out" in done.stdout.lower(), done
    assert time.monotonic() - begin < 20 and hub.HUB_SECONDS <= 10


# ---------------------------------------------------------------- data before weights

BAD_DATA = {  # flags -> message
    "--data_path {tmp}/nowhere": r"unknown dataset '.*nowhere'",
    "--prompt_column question": r"--prompt_column: .*question",
    "--data_path {tmp}/rows.jsonl": r"(?s)rows\.jsonl.*field 'prompt' is null",
}


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever asks for a model's weights, on the disk or on the hub, fails the test."""
    monkeypatch.setattr(model_utils, "find_checkpoint", lambda name: pytest.fail(f"{name}: weights are asked for"))


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("text", BAD_DATA)
def test_data_that_cannot_be_used_are_seen_before_weights(text, step, run_step, start, tmp_path, no_weights):
    rows = [{"prompt": None, "chosen": "a", "rejected": "b"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=BAD_DATA[text]):
        run_step(step, [*start(step), *text.format(tmp=tmp_path).split()])


def test_a_column_that_a_reward_function_wants_is_missed_before_weights(run_step, start, tmp_path, no_weights):
    (tmp_path / "reward.py").write_text("def reward(answers, solution):\n    return [0.0 for _ in answers]\n")
    with pytest.raises(UserError, match="solution"):
        run_step(3, [*start(3), "--reward_function", f"{tmp_path / 'reward.py'}:reward"])


# ---------------------------------------------------------------- machine


@pytest.fixture
def machine(monkeypatch):
    """machine(device, devices, ranks per node, local rank)."""

    def set_machine(name, count, ranks, local_rank=0):
        fake = SimpleNamespace(device_name=lambda: name, device_count=lambda: count)
        monkeypatch.setattr(launch, "get_accelerator", lambda: fake)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return set_machine


def test_more_ranks_than_gpus_are_refused_with_both_numbers_by_one_rank(machine):
    machine("cuda", 2, 4)
    with pytest.raises(UserError, match=r"4 ranks on \S+, and torch sees 2 GPU\(s\)") as refused:
        launch.check_devices()
    assert not isinstance(refused.value, SharedError)
    machine("cuda", 2, 4, local_rank=3)
    with pytest.raises(SharedError):
        launch.check_devices()
    machine("cuda", 4, 4)
    launch.check_devices()
    machine("cpu", 1, 64)
    launch.check_devices()


def test_a_gpu_that_torch_cannot_use_is_told_unless_it_is_hidden(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.unusable_gpu(tmp_path) is None
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = launch.unusable_gpu(tmp_path)
    assert "nvidia0 is a GPU that torch cannot use" in reason and "is a build without CUDA" in reason

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 1).\nPlease")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert "driver on your system is too old (found version 1).. CUDA_VISIBLE" in launch.unusable_gpu(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.unusable_gpu(tmp_path) is None


def test_cores_are_shared_out_unless_the_user_set_the_threads(monkeypatch):
    chosen = []
    monkeypatch.setattr(launch.torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: range(12))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.limit_cpu_threads()
    assert chosen == [] and os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's own 1, as its environment had none
    monkeypatch.setattr(launch.psutil, "Process", lambda pid: SimpleNamespace(environ=lambda: {}))
    launch.limit_cpu_threads()
    assert chosen == [4] and os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch.psutil, "Process", lambda pid: SimpleNamespace(environ=lambda: {"OMP_NUM_THREADS": "1"}))
    launch.limit_cpu_threads()
    assert chosen == [4]


def test_operators_are_kept_with_their_environment_unless_the_user_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(operators.sys, "prefix", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    operators.prepare_operators()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    operators.prepare_operators()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(operators.sys, "prefix", "/usr")
    operators.prepare_operators()
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


def test_offloading_without_a_compiler_is_refused_where_it_would_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(operators.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--offload compiles DeepSpeed's cpu_adam: install a C"):
        operators.check_compiler("--offload", "DeepSpeed's cpu_adam", "cpu_adam")
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    operators.check_compiler("--offload", "DeepSpeed's cpu_adam", "cpu_adam")


def test_compiling_generation_without_a_compiler_is_refused(run_step, start, monkeypatch):
    monkeypatch.setattr(operators.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile_generation compiles the step that makes one token: install a C"):
        run_step(3, [*start(3), "--enable_hybrid_engine", "--compile_generation"])


# ---------------------------------------------------------------- learning rates and divergence


def test_the_learning_rate_in_the_metrics_is_that_of_its_step(run_step, start, tmp_path):
    text = "--lr_scheduler_type linear --num_warmup_steps 4 --learning_rate 1e-3"
    run_step(1, [*start(1), *flags(text, output_dir=tmp_path)])
    rates = [row["train/lr"] for row in read_metrics(tmp_path)]
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])


def test_the_share_of_warmup_steps_is_of_the_whole_run(run_step, start, tmp_path):
    text = "--lr_scheduler_type linear --warmup_ratio 0.25 --learning_rate 1e-3"
    run_step(1, [*start(1), *flags(text, output_dir=tmp_path)])  # 16 steps
    assert [row["train/lr"] for row in read_metrics(tmp_path)][:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])


@pytest.mark.parametrize("step", [1, 3])
def test_a_warmup_beyond_the_end_is_told_with_both_numbers(step, run_step, start, capsys):
    run_step(step, [*start(step), *flags("--num_warmup_steps 100 --max_train_samples 8 --num_train_epochs 1")])
    printed = capsys.readouterr().out
    total = {1: 4, 3: 8}[step]
    said = f"--num_warmup_steps 100: the learning rate still rises when the run ends after {total} optimizer steps, at "
    assert printed.count(said) == 1, printed
    assert f"{said}{total - 1} % of its peak" in printed


def test_a_warmup_that_fits_is_not_spoken_of():
    for text in ("--num_warmup_steps 3", "--warmup_ratio 0.5", "--num_warmup_steps 0", "--lr_scheduler_type constant"):
        args = arguments.build_parser(1).parse_args(["--model_name_or_path", "x", *text.split()])
        assert arguments.warmup_note(args, 4) is None


def test_a_loss_that_explodes_is_said_and_not_written_out(capsys):
    assert perplexity_of(1.0) == math.e and perplexity_of(20.5) == math.inf == perplexity_of(1e9)
    warn_diverged(11.0)
    assert capsys.readouterr().out == ""
    warn_diverged(345.6)
    assert "WARNING: loss 345.6 per token: the model has diverged" in capsys.readouterr().out


def test_step_1_says_that_its_model_has_diverged(run_step, start, capsys):
    run_step(1, [*start(1), *flags("--learning_rate 10 --lr_scheduler_type constant")])
    assert "the model has diverged" in capsys.readouterr().out
