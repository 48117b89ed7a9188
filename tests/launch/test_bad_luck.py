"""Step 3 on two ranks when something goes wrong on one of them: no hang, a message, an update where one is possible."""

import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, STEPS, make_model, read_metrics, run_command
from transformers import AutoModelForCausalLM

from utils.arguments.run import OF_A_NODE
from utils.model.model_utils import create_critic_model
from utils.model.saving import atomic_folder
from utils.model.tokenizer import load_hf_tokenizer
from utils.process import operators, ranks
from utils.process.errors import UserError
from utils.process.files import name_if_new, scratch_beside
from utils.run.checkpoint_files import newest_checkpoint
from utils.run.results import save_hf_format

PATCHES = {
    # Rank 1 answers every prompt with EOS alone.
    "empty": """
        generate = Trainer._generate_sequence
        def patched(self, prompts, *others):
            sequences = generate(self, prompts, *others)
            if RANK == 1:
                sequences[:, prompts.shape[1] :] = self.tokenizer.pad_token_id
                sequences[:, prompts.shape[1]] = self.tokenizer.eos_token_id
            return sequences
        Trainer._generate_sequence = patched
    """,
    # Rank 1 dies in the update of its second step, which has two per step.
    "killed": """
        import signal
        train, calls = Trainer.train_rlhf, []
        def patched(self, window, *others):
            calls.append(window)
            if RANK == 1 and len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return train(self, window, *others)
        Trainer.train_rlhf = patched
    """,
    # The loss of rank 1 is none in its second step, which has two updates.
    "nan loss": """
        loss_fn, calls = Trainer.actor_loss_fn, []
        def patched(self, *tensors):
            loss = loss_fn(self, *tensors)
            calls.append(1)
            if RANK == 1 and len(calls) == 3:
                loss.loss = loss.loss * float("nan")
            return loss
        Trainer.actor_loss_fn = patched
    """,
    # The logits of rank 1 are no numbers.
    "nan": """
        train = Trainer.generate_experience
        def patched(self, prompts, mask, step=0, *others):
            if RANK == 1 and step == 1:
                with torch.no_grad():
                    self.actor_model.module.get_input_embeddings().weight.fill_(float("nan"))
            return train(self, prompts, mask, step, *others)
        Trainer.generate_experience = patched
    """,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    actor = make_model(base / "actor")
    tokenizer = load_hf_tokenizer(actor)
    torch.manual_seed(5)
    save_hf_format(create_critic_model(actor, tokenizer), tokenizer, SimpleNamespace(output_dir=str(base / "reward")))
    return actor, base / "reward"


def _run(models, patch, launcher, folder, pairs_folder, cache_folder, *flags):
    """Two ranks of step 3 with a change to the trainer: (exit code, console, seconds)."""
    script = folder / "patched.py"
    script.write_text(
        f"import os, runpy, sys, torch\nsys.path.insert(0, {str(PROJECT)!r})\nRANK = int(os.environ['RANK'])\n"
        "from training.step3_rlhf_finetuning.ppo_trainer import DeepSpeedPPOTrainer as Trainer\n"
        + textwrap.dedent(PATCHES[patch])
        + f"\nrunpy.run_path({str(STEPS[3])!r}, run_name='__main__')\n"
    )
    binaries = Path(sys.executable).parent
    starts = {
        "torchrun": [binaries / "torchrun", "--standalone", "--nproc_per_node=2"],
        "deepspeed": [binaries / "deepspeed", "--num_gpus", "2", "--master_port", str(20000 + hash(folder) % 20000)],
    }
    arguments = [
        *("--actor_model_name_or_path", models[0], "--critic_model_name_or_path", models[1], "--dtype", "fp32"),
        *("--data_path", pairs_folder, "--data_output_path", cache_folder, "--output_dir", folder / "out"),
        *("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 2, "--num_warmup_steps", 0),
        *("--max_prompt_seq_len", 24, "--max_answer_seq_len", 8, "--enable_test_mode", "--test_stop_step", 2),
    ]
    start = time.monotonic()
    code, console = run_command([*starts[launcher], script, *arguments, *flags], timeout=200)
    return code, console, time.monotonic() - start


@pytest.mark.parametrize(
    "flags",
    [[], ["--actor_zero_stage", 3, "--critic_zero_stage", 3, "--enable_hybrid_engine"]],
    ids=["zero 0", "zero 3"],
)
def test_a_rank_whose_answers_are_all_empty_updates_from_the_answers_of_the_other(
    models, pairs_folder, cache_folder, tmp_path, flags
):
    code, console, _ = _run(models, "empty", "torchrun", tmp_path, pairs_folder, cache_folder, *flags)
    assert code == 0, console
    rows = read_metrics(tmp_path / "out")
    assert [row["train/unused_answers"] >= 4 and row["train/used_answers"] > 0 for row in rows] == [True, True]
    for row in rows:
        assert all(math.isfinite(row[f"train/{name}"]) for name in ("actor_loss", "critic_loss", "kl", "score"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/actor")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_killed_in_mid_step_ends_the_run(models, pairs_folder, cache_folder, tmp_path, launcher):
    shared_before = set(Path("/dev/shm").glob("deepspeed_*"))
    code, console, seconds = _run(models, "killed", launcher, tmp_path, pairs_folder, cache_folder)
    assert code != 0
    assert seconds < 180, "the other rank waits for nobody"
    assert not (tmp_path / "out/actor").exists()
    assert "| Step: 0 |" in console and "| Step: 1 |" not in console
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= shared_before, "memory of ranks that are gone"


@pytest.mark.parametrize(
    "patch, what, saved",
    [
        ("nan", "the logits in generation of the engine 'actor' is nan in epoch 0, step 1 (training rows ", []),
        ("nan loss", "the actor_loss of the engine 'actor' is nan in epoch 0, step 1 (training rows ", [0, 1]),
    ],
)
def test_numbers_that_are_none_on_one_rank_end_all_ranks_alike(
    models, pairs_folder, cache_folder, tmp_path, patch, what, saved
):
    flags = ["--checkpoint_steps", 50]
    code, console, _ = _run(models, patch, "torchrun", tmp_path, pairs_folder, cache_folder, *flags)
    assert code != 0
    assert what in console and console.count("error: ") == 1, console
    assert not (tmp_path / "out/actor").exists()
    checkpoint = newest_checkpoint(tmp_path / "out/checkpoints")
    assert ([] if checkpoint is None else checkpoint.state["position"]) == saved
    if not saved:
        assert "the weights of the engine 'actor' are not finite" in console


def test_a_rank_that_stops_answering_ends_the_others_with_a_message(model_folder, pairs_folder, cache_folder, tmp_path):
    script = tmp_path / "stopping.py"
    script.write_text(
        f"import os, runpy, signal, sys\nsys.path.insert(0, {str(PROJECT)!r})\n"
        "from utils.engine import steps\n"
        "take_step, calls = steps.take_step, []\n"
        "def patched(engine):\n"
        "    calls.append(engine)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return take_step(engine)\n"
        "steps.take_step = patched\n"
        f"runpy.run_path({str(STEPS[1])!r}, run_name='__main__')\n"
    )
    arguments = [
        *("--model_name_or_path", model_folder, "--data_path", pairs_folder, "--data_output_path", cache_folder),
        *("--output_dir", tmp_path / "out", "--dtype", "fp32", "--per_device_train_batch_size", 2),
        *(
            "--zero_stage",
            2,
            "--comm_timeout",
            10,
            "--max_train_samples",
            8,
            "--max_eval_samples",
            2,
        ),  # ZeRO's groups are not the first one
    ]
    port = str(20000 + hash(tmp_path) % 20000)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, script, *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
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


# ---------------------------------------------------------------- nodes that differ


@pytest.fixture
def two_hosts(monkeypatch):
    """Whatever this rank says, another on host b says with a change: two_hosts["--flag"] = value there."""
    changes = {}

    def gather(mine):
        if not isinstance(mine, tuple) or not isinstance(mine[0], dict):
            return [mine]  # not what is compared here
        return [mine, (mine[0] | {name: changes[name] for name in mine[0].keys() & changes.keys()}, "b")]

    monkeypatch.setattr(ranks, "all_gather_objects", gather)
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "a")
    return changes


def test_a_flag_or_data_that_differs_between_nodes_is_named_with_both_hosts(
    two_hosts, run_step, model_folder, pairs_folder, tmp_path
):
    arguments = ["--model_name_or_path", model_folder, "--data_path", pairs_folder, "--dtype", "fp32"]
    arguments += ["--data_output_path", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    two_hosts["--learning_rate"] = "0.5"
    message = r"--learning_rate must be the same on every node: it is 0\.001 on a, the first, and 0\.5 on b"
    with pytest.raises(UserError, match=message):
        run_step(1, arguments)
    two_hosts.clear()
    two_hosts["the checksum of data and tokenizer"] = "0123"
    with pytest.raises(UserError, match=r"the checksum of data .* must be the same on every node: .* 0123 on b"):
        run_step(1, arguments)
    assert not (tmp_path / "out/metrics.jsonl").exists() and not list(tmp_path.glob("cache/*"))


def test_places_may_differ_between_nodes_and_what_shapes_the_training_may_not():
    for name in ("output_dir", "data_path", "data_output_path", "actor_model_name_or_path", "local_rank", "resume"):
        assert OF_A_NODE.search(name), name
    for name in ("learning_rate", "data_split", "dtype", "seed", "offload_reward_model", "actor_zero_stage", "top_p"):
        assert not OF_A_NODE.search(name), name


def test_a_file_that_others_may_have_mapped_is_not_replaced(tmp_path):
    path, inodes = tmp_path / "rows.arrow", []
    for content in ("first", "second"):
        with scratch_beside(path) as scratch:
            scratch.write_text(content)
            name_if_new(scratch, path)
        inodes.append(path.stat().st_ino)
    assert path.read_text() == "first" and inodes[0] == inodes[1]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.arrow"]


WRITER = """
import sys, time
from pathlib import Path
from utils.process.files import scratch_beside
from utils.model.saving import atomic_folder
with scratch_beside(Path(sys.argv[1]) / "rows.arrow") as scratch, atomic_folder(Path(sys.argv[1]) / "model") as folder:
    scratch.write_text("half")
    (folder / "model.safetensors").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_half_written_goes_and_what_a_living_one_writes_stays(tmp_path):
    def write_again():
        with scratch_beside(tmp_path / "rows.arrow") as scratch, atomic_folder(tmp_path / "model") as folder:
            scratch.write_text("whole")
            (folder / "model.safetensors").write_text("whole")
            scratch.replace(tmp_path / "rows.arrow")

    def hidden():
        return sorted(file.name[:8] for file in [*tmp_path.iterdir(), *tmp_path.glob("model/*")] if file.name[0] == ".")

    command = [sys.executable, "-c", WRITER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=PROJECT) as writer:
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
