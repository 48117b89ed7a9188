"""Step 3 on two ranks when something goes wrong on one of them: no hang, a message, an update where one is possible."""

import math
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PYTHONPATH, SCRIPTS, flags, launch, launch_command, read_metrics, surroundings, zero_stage
from transformers import AutoModelForCausalLM

from utils.model.saving import atomic_folder
from utils.process import operators
from utils.process.errors import UserError
from utils.process.files import scratch_beside
from utils.run.checkpoint_files import newest_checkpoint


@pytest.fixture
def step_3(small_models, pairs_folder, cache_folder, tmp_path):
    """more flags -> the arguments of a run of two steps, for two ranks."""
    text = """
        --dtype fp32 --per_device_generation_batch_size 4 --per_device_training_batch_size 2 --num_warmup_steps 0
        --max_prompt_seq_len 24 --max_answer_seq_len 8 --enable_test_mode --test_stop_step 2
    """
    models = dict(actor_model_name_or_path=small_models / "actor", critic_model_name_or_path=small_models / "reward")
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, output_dir=tmp_path / "out")

    return lambda more: [*flags(text, **models, **places), *flags(more)]


@pytest.fixture
def run(step_3):
    """Two ranks of step 3 with a change to the trainer: run(patch, launcher, flags) -> (exit code, console)."""

    def start(patch: str, launcher: str, more: str = "") -> tuple[int, str]:
        return launch(SCRIPTS / "patched_main.py", step_3(more), launcher, ranks=2, timeout=200, PATCH=patch)

    return start


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_whose_answers_are_all_empty_updates_from_the_answers_of_the_other(run, tmp_path, stage):
    engine = "--enable_hybrid_engine" if stage == 3 else ""
    code, console = run("empty_answers", "torchrun", f"{zero_stage(3, stage)} {engine}")
    assert code == 0, console
    rows = read_metrics(tmp_path / "out")
    assert [row["train/unused_answers"] >= 4 and row["train/used_answers"] > 0 for row in rows] == [True, True]
    for row in rows:
        assert all(math.isfinite(row[f"train/{name}"]) for name in ("actor_loss", "critic_loss", "kl", "score"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/actor")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_killed_in_mid_step_ends_the_run(run, tmp_path, launcher):
    shared_before, begin = set(Path("/dev/shm").glob("deepspeed_*")), time.monotonic()
    code, console = run("killed_in_an_update", launcher)
    assert code != 0
    assert time.monotonic() - begin < 180, "the other rank waits for nobody"
    assert not (tmp_path / "out/actor").exists()
    assert "| Step: 0 |" in console and "| Step: 1 |" not in console
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= shared_before, "memory of ranks that are gone"


@pytest.mark.parametrize(
    "patch, what, saved",
    [
        ("nan_weights", "the logits in generation of the engine 'actor' is nan in epoch 0, step 1 (training rows ", []),
        ("nan_loss", "the actor_loss of the engine 'actor' is nan in epoch 0, step 1 (training rows ", [0, 1]),
    ],
)
def test_non_finite_values_on_one_rank_end_all_ranks_alike(run, tmp_path, patch, what, saved):
    code, console = run(patch, "torchrun", "--checkpoint_steps 50")
    assert code != 0
    assert what in console and console.count("error: ") == 1, console
    assert not (tmp_path / "out/actor").exists()
    checkpoint = newest_checkpoint(tmp_path / "out/checkpoints")
    assert ([] if checkpoint is None else checkpoint.state["position"]) == saved
    if not saved:
        assert "the weights of the engine 'actor' are not finite" in console


JUDGE = """
import os
calls = []

def judge(answers):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise ConnectionError("nobody listens")
    return [1.0] * len(answers)
"""


def test_a_judge_that_fails_on_one_rank_ends_all_with_the_steps_before_saved(step_3, tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    more = "--checkpoint_steps 50 --actor_zero_stage 3 --enable_hybrid_engine"
    more += f" --reward_function {tmp_path}/judge.py:judge"
    code, console = launch(3, step_3(more), "torchrun", ranks=2)
    assert code != 0
    assert f"judge raised ConnectionError at {tmp_path}/judge.py:8: nobody listens" in console
    assert "step-00000001; the same command with --resume auto goes on from there" in console
    assert console.count("error: ") == 1
    assert newest_checkpoint(tmp_path / "out/checkpoints").state["position"] == [0, 1]


def test_a_rank_that_stops_answering_ends_the_others_with_a_message(model_folder, pairs_folder, cache_folder, tmp_path):
    # ZeRO's groups are not the first one.
    text = """
        --dtype fp32 --per_device_train_batch_size 2 --zero_stage 2 --comm_timeout 10
        --max_train_samples 8 --max_eval_samples 2
    """
    places = dict(data_path=pairs_folder, data_output_path=cache_folder, output_dir=tmp_path / "out")
    arguments = flags(text, model_name_or_path=model_folder, **places)
    port = str(20000 + hash(tmp_path) % 20000)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {"PATCH": "stopped_rank", "PYTHONPATH": PYTHONPATH}
    ranks = [
        subprocess.Popen(
            launch_command(SCRIPTS / "patched_main.py", arguments),
            env=surroundings(RANK=rank, LOCAL_RANK=rank, **world),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if rank == "0" else subprocess.DEVNULL,
            text=True,
        )
        for rank in "01"
    ]
    try:
        told = ranks[0].communicate(timeout=180)[1]
        state = Path(f"/proc/{ranks[1].pid}/stat").read_text().rpartition(")")[2].split()[0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 1 and state == "T", told
    assert "error: rank 0: another rank did not take part within --comm_timeout" in told
    assert "10000ms" in told and "Traceback" not in told
    assert not (tmp_path / "out/model.safetensors").exists()


def test_what_a_killed_process_left_half_written_goes_and_what_a_living_one_writes_stays(tmp_path):
    def write_again():
        with scratch_beside(tmp_path / "rows.arrow") as scratch, atomic_folder(tmp_path / "model") as folder:
            scratch.write_text("whole")
            (folder / "model.safetensors").write_text("whole")
            scratch.replace(tmp_path / "rows.arrow")

    def hidden():
        return sorted(file.name[:8] for file in [*tmp_path.iterdir(), *tmp_path.glob("model/*")] if file.name[0] == ".")

    command, environment = launch_command(SCRIPTS / "half_written.py", [tmp_path]), surroundings(PYTHONPATH=PYTHONPATH)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as writer:
        assert writer.stdout.readline() == b"ready\n"
        write_again()
        assert hidden() == [".rows.ar", ".saving-"]
        writer.kill()
    write_again()
    assert hidden() == []
    assert (tmp_path / "rows.arrow").read_text() == (tmp_path / "model/model.safetensors").read_text() == "whole"


# ---------------------------------------------------------------- the lock of an operator's build


@pytest.fixture
def operator(tmp_path, monkeypatch):
    """A stand-in for DeepSpeed's builder, whose load() records whether torch's lock was still there."""
    folder = tmp_path / "py311_cpu/deepspeed_shm_comm"
    folder.mkdir(parents=True)

    class Builder:
        NAME = "deepspeed_shm_comm"
        found = None

        def load(self):
            Builder.found = (folder / "lock").exists()

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setitem(operators.deepspeed.ops.__compatible_ops__, Builder.NAME, True)
    accelerator = SimpleNamespace(create_op_builder=lambda name: Builder() if name == "ShareMemCommBuilder" else None)
    monkeypatch.setattr(operators, "get_accelerator", lambda: accelerator)
    return Builder, folder / "lock"


def _lock(file, age):
    file.touch()
    os.utime(file, (time.time() - age,) * 2)


def test_a_build_is_said_and_one_that_is_there_is_not(operator, capsys):
    _, lock = operator
    operators.load_operator("ShareMemCommBuilder")
    assert "compiling DeepSpeed's deepspeed_shm_comm into" in capsys.readouterr().out
    lock.with_name("deepspeed_shm_comm.so").touch()
    operators.load_operator("ShareMemCommBuilder")
    assert capsys.readouterr().out == ""


def test_the_lock_of_a_killed_build_is_removed(operator, capsys):
    builder, lock = operator
    _lock(lock, age=20)
    operators.load_operator("ShareMemCommBuilder")
    assert builder.found is False and "left by a build that was killed" in capsys.readouterr().out


def test_a_build_that_is_going_on_is_waited_for(operator):
    builder, lock = operator
    _lock(lock, age=20)
    with subprocess.Popen(["sleep", "2"], cwd=lock.parent):
        start = time.monotonic()
        operators.load_operator("ShareMemCommBuilder")
        assert time.monotonic() - start > 1
    assert builder.found is False


def test_a_lock_that_another_node_may_hold_is_left_and_named_when_it_is_old(operator, monkeypatch):
    _, lock = operator
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(operators, "get_world_size", lambda: 4)
    _lock(lock, age=16 * 60)
    with pytest.raises(UserError, match="delete that file"):
        operators.load_operator("ShareMemCommBuilder")
    assert lock.exists()


def test_an_operator_that_this_machine_cannot_have_is_left_alone(operator):
    builder, _ = operator
    operators.load_operator("NoSuchBuilder")
    assert builder.found is None
