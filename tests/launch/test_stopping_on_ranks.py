"""Runs that are stopped or lose a rank, and their next start."""

import multiprocessing
import os
import re
import signal
import subprocess
import time

import psutil
import pytest
from helpers import (
    PYTHONPATH,
    SCRIPTS,
    assert_same_run,
    flags,
    launch_command,
    read_metrics,
    run_command,
    run_in_one_launch,
    step_arguments,
    surroundings,
)

from utils.run.checkpoint import Checkpoints
from utils.run.checkpoint_files import newest_checkpoint


def test_sigterm_ends_a_forked_worker_of_a_rank(run_step, start, tmp_path, monkeypatch):
    end_step, ends = Checkpoints.end_step, []

    def forking(self, *position):
        if self.steps == 0:
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
            worker.start()
            time.sleep(0.2)
            worker.terminate()
            worker.join()
            ends.append(worker.exitcode)
        end_step(self, *position)

    monkeypatch.setattr(Checkpoints, "end_step", forking)
    run_step(1, [*start(1), "--output_dir", tmp_path, "--checkpoint_dir", tmp_path / "checkpoints"])
    assert ends == [-signal.SIGTERM]


SLOW_PACKAGE = """
import os, pathlib, time
pathlib.Path(os.environ["LOADING"], os.environ["RANK"]).touch()
time.sleep(100)
"""


def test_ranks_whose_launcher_is_killed_while_they_load_packages_end_with_it(tmp_path):
    (tmp_path / "transformers.py").write_text(SLOW_PACKAGE)  # torchrun itself does not load it
    (tmp_path / "loading").mkdir()
    environment = surroundings(LOADING=str(tmp_path / "loading"), PYTHONPATH=str(tmp_path))
    command, end = launch_command(1, ["--help"], "torchrun", 2), time.monotonic() + 90
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        while len(list((tmp_path / "loading").iterdir())) < 2:
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        ranks = psutil.Process(run.pid).children()
    finally:
        run.kill()
        run.wait()
    left = psutil.wait_procs(ranks, timeout=20)[1]
    for rank in left:
        rank.kill()
    assert len(ranks) == 2 and not left


CASES = [(launcher, number) for launcher in ("torchrun", "deepspeed") for number in (signal.SIGTERM, signal.SIGINT)]


SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def stop(number, launcher, arguments, output, ranks=2) -> str:
    """Start ranks, stop them in the middle; what they said.

    SIGTERM goes to the launcher; SIGINT to all of its processes, as a terminal sends it.
    """
    command = launch_command(SCRIPTS / "patched_main.py", [*arguments, "--output_dir", output], launcher, ranks)
    environment = surroundings(PATCH="slow_steps", PYTHONPATH=PYTHONPATH)
    metrics, log = output / "metrics.jsonl", output.with_suffix(".log")
    said = f"stopped by {SIGNALS[number]}"
    with log.open("w") as console:
        run = subprocess.Popen(command, stdout=console, stderr=console, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:  # the first evaluation is one of them
            assert run.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
        run.wait(60)
        while said not in log.read_text():  # deepspeed goes before its ranks
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
    finally:
        run.kill()
    console = log.read_text()
    # What torchrun and deepspeed say of the signal to themselves is theirs.
    assert launcher != "python" or "Traceback" not in console, console
    assert not re.search(r"Traceback(?!.*(SignalException|runner\.py))", console, re.DOTALL), console
    assert console.count(said) == 1, console
    return console


@pytest.fixture(scope="module")
def stopped(small_models, pairs_folder, cache_folder, tmp_path_factory):
    """(folder, {launcher: steps done when it was stopped}, console of the next starts and of an undisturbed run)."""
    folder = tmp_path_factory.mktemp("stopped")
    arguments = step_arguments(1, small_models, pairs_folder, cache_folder)
    arguments += flags("--zero_stage 2 --checkpoint_steps 100 --resume auto")
    steps = {}
    for launcher, number in CASES:
        output = folder / f"{launcher}-{number}"
        assert f"{SIGNALS[number]}: finishing the step" in stop(number, launcher, arguments, output)
        steps[output.name] = newest_checkpoint(output / "checkpoints").state["steps"]
    runs = [(1, [*arguments, "--output_dir", folder / name]) for name in ("plain", *steps)]
    return folder, steps, run_in_one_launch(runs, folder)


@pytest.mark.parametrize("launcher, number", CASES)
def test_a_signal_stops_and_saves_two_ranks_and_the_rest_is_done_by_the_next_start(stopped, launcher, number):
    (folder, steps, console), name = stopped, f"{launcher}-{number}"
    assert 2 <= steps[name] < 8
    assert f"step-{steps[name]:08d}: {steps[name]} steps are done" in console, console
    assert_same_run(folder / "plain", folder / name)


def test_ctrl_c_under_plain_python_saves_and_ends_well_or_says_that_nothing_is_kept(start, tmp_path):
    console = stop(signal.SIGINT, "python", [*start(1), *flags("--checkpoint_steps 100")], tmp_path / "kept")
    assert "stopped by Ctrl-C after" in console and newest_checkpoint(tmp_path / "kept/checkpoints") is not None
    console = stop(signal.SIGINT, "python", start(1), tmp_path / "lost")
    assert "stopped by Ctrl-C; nothing of this run is kept (--checkpoint_steps" in console


def test_torchrun_starts_the_ranks_again_when_one_is_killed_and_they_go_on(start, tmp_path):
    """Elastic restart: the launcher stays, its processes begin anew with --resume auto."""
    arguments = [*start(1), *flags("--zero_stage 2 --checkpoint_steps 2 --resume auto", output_dir=tmp_path / "out")]
    torchrun, *command = launch_command(SCRIPTS / "patched_main.py", arguments, "torchrun", ranks=2)
    command, environment = [torchrun, "--max-restarts=1", *command], dict(PATCH="killed_once", PYTHONPATH=PYTHONPATH)
    code, console = run_command(command, **environment)
    assert code != 0 and console.count("error: torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 2
    code, console = run_command(command, **environment, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert code == 0, console
    assert "so this is a fresh start" in console and "step-00000002: 2 steps are done" in console
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == list(range(1, 9))
