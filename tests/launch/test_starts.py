"""How ranks begin under each launcher: the port, the threads, nothing compiled."""

import os
import socket

import pytest
from helpers import PYTHONPATH, SCRIPTS, launch, launch_command, run_command, surroundings


def start(launcher, *words, **environment):
    command = launch_command(SCRIPTS / "starts.py", [], launcher, ranks=2)
    for name, value in zip(words[::2], words[1::2], strict=True):
        command[command.index(name) + 1] = value
    return run_command(command, PYTHONPATH=PYTHONPATH, **environment)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_share_the_cores_and_compile_nothing(launcher, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = surroundings(PYTHONPATH=PYTHONPATH, TORCH_EXTENSIONS_DIR=str(tmp_path / "operators"))
    del environment["OMP_NUM_THREADS"]
    monkeypatch.setattr("helpers.surroundings", lambda **changes: environment)
    code, console = launch(SCRIPTS / "starts.py", [], launcher, ranks=2)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert code == 0 and console.count(f"threads {share} {share}, compiled []") == 2, console
    assert "built successfully" not in console


def test_threads_that_the_user_set_stay_under_torchrun():
    code, console = launch(
        SCRIPTS / "starts.py", [], "torchrun", ranks=2, OMP_NUM_THREADS="3", TORCH_EXTENSIONS_DIR="/x"
    )
    assert code == 0 and console.count(" 3, compiled") == 2, console


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_a_port_that_is_taken_is_named_in_one_line(launcher):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        world = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        code, console = start(launcher, **world) if launcher == "python" else start(launcher, "--master_port", port)
    assert code != 0 and "Traceback" not in console, console
    said = (
        f"error: port {port}, where the ranks are to meet, is taken by another program: give a free one, by MASTER_PORT"
    )
    assert console.count(said) == 1, console
