"""setup_env.sh with a Python whose pip only writes down what it is asked for: environments made and made anew."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import PROJECT

SCRIPT = PROJECT / "training_scripts/setup_env.sh"
# As the real one: makes the folder, and in it a python whose pip records, or waits where there is a file "slow".
FAKE_PYTHON = """#!/bin/bash
if [ "$1 $2" != "-m venv" ]; then exec {python} "$@"; fi
mkdir -p "$3/bin" && touch "$3/pyvenv.cfg"
cp {fake} "$3/bin/python" && chmod +x "$3/bin/python"
echo "export PATH='$3/bin':\\$PATH" >"$3/bin/activate"
"""
FAKE_PIP = """#!/bin/bash
if [ "$1" = -c ]; then exit 1; fi
echo "$@ version-check-off=$PIP_DISABLE_PIP_VERSION_CHECK" >>{log}
while [ -e {slow} ]; do sleep 0.1; done
"""


@pytest.fixture
def set_up(tmp_path):
    """set_up() -> (exit code, console); set_up.venv, set_up.slow; set_up.start() does not wait for its end."""
    fake, python, slow = tmp_path / "fake", tmp_path / "python", tmp_path / "slow"
    fake.write_text(FAKE_PIP.format(log=tmp_path / "log", slow=slow))
    python.write_text(FAKE_PYTHON.format(python=sys.executable, fake=fake))
    python.chmod(0o755)

    def start(**more):
        environment = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(python)} | more
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(["bash", str(SCRIPT)], env=environment, start_new_session=True, **pipes)

    def run(**more):
        run = start(**more)
        console = run.communicate(timeout=60)[0]
        return run.returncode, console

    run.start, run.venv, run.slow = start, tmp_path / "venv", slow
    return run


def started(set_up):
    """A set-up that is installing."""
    set_up.slow.touch()
    run = set_up.start()
    for line in run.stdout:
        if "installing" in line:
            return run
    raise AssertionError("it ended")


def test_a_second_run_finds_all_done(set_up):
    code, console = set_up()
    assert code == 0 and "creating" in console and "done" in console, console
    assert set_up() == (0, "")


def test_without_a_compiler_it_says_what_will_not_work_and_goes_on(set_up, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in Path("/usr/bin").iterdir():
        if not tool.name.endswith(("c++", "g++")):
            (tools / tool.name).symlink_to(tool)
    code, console = set_up(PATH=str(tools))
    assert code == 0 and "done" in console, console
    assert console.count("there is no C++ compiler, without which --offload and --compile_generation do not work") == 1
    assert "c++" not in console.lower().replace("no c++ compiler", "") and set_up(PATH=str(tools)) == (0, "")


def test_pip_does_not_speak_of_newer_versions_of_itself(set_up, tmp_path):
    set_up()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines and all(line.endswith("version-check-off=1") for line in lines)


def test_what_a_killed_set_up_left_is_made_anew(set_up):
    run = started(set_up)
    os.killpg(run.pid, 9)
    run.wait()
    (set_up.venv / "half of a package").touch()
    set_up.slow.unlink()
    code, console = set_up()
    assert code == 0 and "was left half-made by a set-up that was killed: making it anew" in console, console
    assert not (set_up.venv / "half of a package").exists()
    assert set_up() == (0, "")


def test_an_environment_without_its_last_file_is_made_anew(set_up):
    set_up.venv.mkdir()
    (set_up.venv / "pyvenv.cfg").touch()
    code, console = set_up()
    assert code == 0 and "making it anew" in console, console


def test_a_set_up_that_works_there_is_waited_for(set_up):
    run = started(set_up)
    other = set_up.start()
    assert "waiting for process" in other.stdout.readline()
    time.sleep(1.5)
    assert other.poll() is None
    set_up.slow.unlink()
    assert run.wait(30) == other.wait(30) == 0
    assert "anew" not in other.stdout.read()


def test_an_environment_of_the_user_s_own_is_never_removed(set_up):
    (set_up.venv / "bin").mkdir(parents=True)
    (set_up.venv / "bin/activate").touch()
    (set_up.venv / ".unfinished").touch()
    code, console = set_up()
    assert code == 1 and "not of this script's making: delete it, or set VENV" in console, console
    assert (set_up.venv / "bin/activate").exists()
