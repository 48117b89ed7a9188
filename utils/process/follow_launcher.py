"""Importing this ends the process with its launcher, ``deepspeed`` or ``torchrun``: no rank is left over.

The steps import it before anything else: of a launcher that is killed while torch is still loading nobody would know,
and its ranks would wait for a store that is gone, or train on by themselves.
"""

import ctypes
import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil

SET_PARENT_DEATH_SIGNAL = 1  # of prctl


def follow_launcher(poll_seconds: float = 1.0) -> None:
    """Under ``deepspeed`` or ``torchrun``: end with them, so that no rank holds memory and ports.

    A launcher that is killed cannot end its ranks. Linux does it for the parent of a process. Above ``deepspeed``'s
    parent stands its runner, which dies of SIGTERM without telling anyone on a single node: a rank that sees it gone
    takes that for a SIGTERM of its own.
    """
    libc = ctypes.CDLL(None)
    if "RANK" not in os.environ or not hasattr(libc, "prctl"):  # nobody started it, or this is no Linux
        return
    launcher = psutil.Process(os.getppid())
    command = " ".join(launcher.cmdline())
    if not re.search(r"deepspeed\.launcher\.launch|torch\.distributed\.run|torchrun", command):
        return  # a shell, say, whose background processes may outlive it
    libc.prctl(SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if "deepspeed.launcher.launch" not in command:
        return
    runner = launcher.ppid()
    if not Path(f"/proc/{runner}/cmdline").read_text().replace("\0", " ").count("deepspeed"):
        return  # started by pdsh or by hand on this node

    def watch() -> None:
        while launcher.ppid() == runner:
            time.sleep(poll_seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="follow_launcher", daemon=True).start()


follow_launcher()
