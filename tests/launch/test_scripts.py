"""Every bash script: its syntax, its usage, and that the commands it would run are ones the steps understand."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PROJECT, STEPS

from utils import arguments

SCRIPTS = sorted((PROJECT / "training_scripts").rglob("*.sh")) + sorted((PROJECT / "evaluation_scripts").glob("*.sh"))
RECIPES = sorted((PROJECT / "training_scripts").glob("step*/**/run_*.sh"))


def dry_run(script, *given, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, given)],
        env=os.environ | {"DRY_RUN": "1", "MASTER_PORT": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def step_of(folder: Path) -> int | str:
    """The step of a folder of training or of recipes."""
    return next(step for step, script in STEPS.items() if script.parent.name == folder.name)


def parsed(line: str):
    """The launcher's own arguments, and the namespace of the step that a printed command would start."""
    words = shlex.split(line)
    main = next(i for i, word in enumerate(words) if word.endswith("/main.py"))
    step = step_of(Path(words[main]).parent)
    assert Path(words[main]).resolve() == STEPS[step]
    args = arguments.build_parser(step).parse_args(words[main + 1 :])
    args.dtype = args.dtype or "bf16"  # as an accelerator that supports it settles it
    arguments.check_step(args, step)
    return words[:main], args


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: "/".join(path.parts[-4:]))
def test_a_recipe_s_command_is_one_its_step_understands(script, monkeypatch):
    # The recipe of ZeRO++ is for CUDA alone, which the check rightly asks for.
    monkeypatch.setattr(
        "utils.arguments.rlhf_checks.get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda")
    )
    step = step_of(next(folder for folder in script.parents if folder.parent == PROJECT / "training_scripts"))
    models = ["actor dir", "critic"] if step == 3 else []
    plain = dry_run(script, *models)
    assert plain.returncode == 0, plain.stderr
    launcher, args = parsed(plain.stdout)
    assert args.output_dir == f"./output/{arguments.NAMES[step]}"
    if step == 3:
        assert (args.actor_model_name_or_path, args.critic_model_name_or_path) == ("actor dir", "critic")
        given = [*models, "3", "2", "out dir", "--num_train_epochs", "7"]
    else:
        given = ["out dir", "3", "--num_train_epochs", "7"]
    _, args = parsed(dry_run(script, *given).stdout)
    assert args.output_dir == "out dir" and args.num_train_epochs == 7
    assert (args.actor_zero_stage, args.critic_zero_stage) == (3, 2) if step == 3 else args.zero_stage == 3
    if "single_gpu" in script.parts:
        assert launcher[launcher.index("--num_gpus") + 1] == "1"
    if "multi_node" in script.parts:
        assert launcher[launcher.index("--hostfile") + 1] == "/job/hostfile"


def test_environment_overrides_reach_the_launcher():
    recipe = PROJECT / "training_scripts/step1_supervised_finetuning/opt/multi_node/run_66b.sh"
    environment = {"HOSTFILE": "/my hosts", "MASTER_PORT": "1234", "LAUNCHER_ARGS": "--no_ssh --node_rank 1"}
    words, _ = parsed(dry_run(recipe, VIRTUAL_ENV="", **environment).stdout)
    own = "--hostfile|/my hosts|--master_port|1234|--log_level|error"
    assert words == ["deepspeed", *own.split("|"), "--no_ssh", "--node_rank", "1"]
    words, _ = parsed(dry_run(recipe, VIRTUAL_ENV="/my env", **environment).stdout)
    assert words[3:5] == ["--venv_script", "/my env/bin/activate"]
    node = PROJECT / "training_scripts/step1_supervised_finetuning/opt/single_node/run_1.3b.sh"
    words, _ = parsed(dry_run(node, RANKS="5").stdout)
    assert words[:3] == ["deepspeed", "--num_gpus", "5"]


GPUS = {  # CUDA_VISIBLE_DEVICES, RANKS -> what the launcher gets, or an error
    ("", "2"): "--num_gpus 2",
    ("3", ""): "--include localhost:3",
    ("2,5,7", ""): "--include localhost:2,5,7",
    ("2,5,7", "2"): "--include localhost:2,5",
    ("2,5", "3"): "error: 3 ranks, and CUDA_VISIBLE_DEVICES=2,5 names 2 GPU(s)",
    ("GPU-8932f937", ""): "error: CUDA_VISIBLE_DEVICES=GPU-8932f937: the deepspeed launcher takes GPUs by number",
}


@pytest.mark.parametrize("chosen, ranks", GPUS)
def test_the_gpus_that_the_user_chose_are_taken(chosen, ranks):
    node = PROJECT / "training_scripts/step1_supervised_finetuning/opt/single_node/run_1.3b.sh"
    done, wanted = dry_run(node, CUDA_VISIBLE_DEVICES=chosen, RANKS=ranks), GPUS[chosen, ranks]
    if wanted.startswith("error"):
        assert done.returncode == 1 and wanted in done.stderr and not done.stdout
        return
    words, _ = parsed(done.stdout)
    prefix = "" if chosen == "" else "env -u CUDA_VISIBLE_DEVICES "
    assert " ".join(words) == f"{prefix}deepspeed {wanted} --master_port 29517 --log_level error"


def test_a_port_that_is_taken_is_passed_over():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, PROJECT / "utils/process/free_port.py", str(port)]
        found = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert port < found < port + 100
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == port


FAKE_DEEPSPEED = """#!{python}
import pathlib, signal, sys, time
def stop(*_signal):
    print("told", flush=True); time.sleep(1); print("saved", flush=True); sys.exit(1)
print(*sys.argv, flush=True)
if pathlib.Path("{folder}/waits").exists():
    signal.signal(signal.SIGINT, stop)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def launched(tmp_path):
    """launched(commands of bash) -> a process of a script that sources launch.sh; deepspeed only shows its words."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/deepspeed").write_text(FAKE_DEEPSPEED.format(folder=tmp_path, python=sys.executable))
    (tmp_path / "bin/deepspeed").chmod(0o755)

    def run(commands):
        # as scripts of several steps begin
        text = f"set -euo pipefail; . {PROJECT}/training_scripts/launch.sh; RANKS=2; {commands}"
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MASTER_PORT": ""}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        return subprocess.Popen(["bash", "-c", text], env=environment, **pipes)

    return run


def test_a_launch_whose_usual_port_is_taken_says_where_the_ranks_meet(launched, tmp_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody has it already
            other.bind(("", 29517))
            other.listen()
        printed, _ = launched(f"launch 1 {tmp_path}/out").communicate(timeout=60)
    assert "port 29517 is taken: the ranks meet at 295" in printed and "--master_port 295" in printed
    assert "--master_port 29517" not in printed
    chosen, _ = launched(f"MASTER_PORT=1234; launch 1 {tmp_path}/out").communicate(timeout=60)
    assert "--master_port 1234" in chosen and "taken" not in chosen


def test_ctrl_c_reaches_the_ranks_whose_last_words_are_shown_and_ends_the_script(launched, tmp_path):
    (tmp_path / "waits").touch()
    run = launched(f"launch 1 {tmp_path}/out; echo went on")
    for line in run.stdout:
        if line == "ready\n":
            break
    os.killpg(run.pid, signal.SIGINT)
    printed, _ = run.communicate(timeout=60)
    # On a busy machine bash may miss its own trap; then the failure of the ranks ends the script, by set -e.
    assert printed == "told\nsaved\n" and run.returncode in (130, 1)
    assert (tmp_path / "out/training.log").read_text().endswith("told\nsaved\n")


def test_a_hostfile_that_is_not_there_is_named_before_anything_starts(tmp_path):
    recipe = PROJECT / "training_scripts/step1_supervised_finetuning/opt/multi_node/run_66b.sh"
    done = dry_run(recipe, HOSTFILE=str(tmp_path / "none"), DRY_RUN="")
    assert done.returncode == 1 and "set HOSTFILE" in done.stderr
    done = dry_run(PROJECT / "training_scripts/e2e.sh", tmp_path, HOSTFILE=str(tmp_path / "none"), DRY_RUN="")
    assert done.returncode == 1 and "set HOSTFILE" in done.stderr


@pytest.mark.parametrize("given", [[], ["one"], ["a", "b", "0", "0", "out", "more"], ["a", "b", "--help"], ["-h"]])
def test_wrong_arguments_of_a_step_3_recipe_show_its_usage(given):
    done = dry_run(PROJECT / "training_scripts/step3_rlhf_finetuning/opt/single_node/run_1.3b.sh", *given)
    assert done.returncode == 2 and "ACTOR CRITIC [ACTOR_ZERO_STAGE" in done.stderr and not done.stdout


def test_e2e_chains_the_steps_and_skips_what_is_done(tmp_path):
    script = PROJECT / "training_scripts/e2e.sh"
    done = dry_run(script, tmp_path, "--data_path", "my pairs", STAGE="3", PPO_FLAGS="--kl_ctl 0.2\n--enable_ema")
    first, second, third = (parsed(line)[1] for line in done.stdout.splitlines())
    assert first.output_dir == third.actor_model_name_or_path and second.output_dir == third.critic_model_name_or_path
    assert first.data_path == second.data_path == third.data_path == ["my pairs"]
    assert (third.actor_zero_stage, third.kl_ctl, third.enable_ema) == (3, 0.2, True)
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor/done").touch()
    done = dry_run(script, tmp_path)
    assert len(done.stdout.splitlines()) == 2 and "not run again" in done.stderr
    assert dry_run(script).returncode == 2


def test_what_ranks_say_is_shown_whatever_it_looks_like(tmp_path):
    """A launcher in place of deepspeed's: of its lines the one goes that DeepSpeed prints before it knows a level."""
    said = ["[WARNING] of a rank", "[INFO] too", "sample: [WARNING] text"]
    spoken = [*said, "[x] [WARNING] Setting accelerator to CPU. If you have GPU or other accelerator, we were unable"]
    (tmp_path / "deepspeed").write_text("#!/bin/bash\n" + "".join(f"echo '{line}'\n" for line in spoken))
    (tmp_path / "deepspeed").chmod(0o755)
    command = f". {PROJECT / 'training_scripts/launch.sh'}; launch 1 {tmp_path / 'out'} --flag"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RANKS": "1", "MASTER_PORT": "29600"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == said == (tmp_path / "out/training.log").read_text().splitlines()


def test_e2e_replaces_an_unfinished_step_but_not_its_checkpoints(tmp_path):
    (tmp_path / "reward/checkpoints").mkdir(parents=True)
    (tmp_path / "reward/checkpoints/latest").touch()
    done = dry_run(PROJECT / "training_scripts/e2e.sh", tmp_path)
    assert [parsed(line)[1].overwrite_output_dir for line in done.stdout.splitlines()] == [True, False, True]


@pytest.mark.parametrize("step, combinations", [(1, 14), (2, 14), ("dpo", 14), (3, 28)])
def test_a_sweep_walks_every_combination(step, combinations, tmp_path):
    models = ["actor", "critic"] if step == 3 else ["model"]
    done = dry_run(PROJECT / "training_scripts/sweep.sh", step, *models, tmp_path, "--data_path", "pairs")
    commands = [parsed(line)[1] for line in done.stdout.splitlines()]
    assert len(commands) == combinations == len({args.output_dir for args in commands})
    assert {args.offload for args in commands} == {True, False}


def test_a_sweep_s_table_tells_figures_and_failures(tmp_path):
    from evaluation_scripts.sweep_report import row_of, table

    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.log").write_text("fine\nerror: --offload needs more\nlast line\n")
    rows = [{"train/loss": 3 - i, "train/seconds": 9 - i, "train/tokens_per_second": 100 + i} for i in range(3)]
    (tmp_path / "good/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "good/done").touch()
    good, bad = row_of(tmp_path / "good"), row_of(tmp_path / "bad")
    assert good == {"name": "good", "steps": 3, "seconds": 7.5, "tokens_per_second": 101.5, "loss": 1}
    assert bad == {"name": "bad", "failed": "error: --offload needs more"}
    assert "7.500" in table([good, bad]) and "failed: error: --offload" in table([good, bad])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_bash_can_read_them(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_shellcheck_finds_nothing():
    found = subprocess.run(["shellcheck", "-x", "-P", PROJECT, *SCRIPTS], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
