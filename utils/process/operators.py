"""DeepSpeed's own operators: built at first use, one process at a time."""

import fcntl
import os
import shutil
import sys
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
from torch.utils import cpp_extension

from utils.process.errors import UserError
from utils.process.world import get_world_size, ranks_per_node

UNUSED = "deepspeed_shm_comm"  # adds up answers of tensor-parallel ranks, of which there are none here


def prepare_operators() -> None:
    """Say where operators are kept and which are not wanted; before anything of DeepSpeed starts, on every rank.

    They are kept with the environment: one for another torch or Python would have to be built anew each time. DeepSpeed
    builds its reduction through shared memory whenever a process group on CPUs begins, though training never calls it.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ and _is_own_environment():
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    deepspeed.ops.__compatible_ops__[UNUSED] = False


def _is_own_environment() -> bool:
    """Whether this Python is one of several, which may write beside itself; not the system's."""
    return sys.prefix not in ("/usr", "/usr/local") and os.access(sys.prefix, os.W_OK)


def _root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def is_built(name: str) -> bool:
    """Whether an operator, "cpu_adam" say, has been compiled for this environment."""
    return any(_root().glob(f"**/{name}/{name}.so"))


def check_compiler(flag: str, what: str, operator: str | None = None) -> None:
    """UserError if what a flag needs would have to be compiled here, and there is no compiler.

    Args:
        operator: DeepSpeed's name of what is compiled, which need not be where that was done; None: compiled each time.
    """
    if operator is not None and is_built(operator):
        return
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError(f"{flag} compiles {what}: install a C++ compiler (apt-get install g++)")


def load_operator(builder_name: str, flag: str = "") -> None:
    """Let DeepSpeed build (the first time) and load one of its own operators, "CPUAdamBuilder" say.

    Torch guards a build with a bare file. A run that is killed at the wrong moment leaves it behind, and every later
    run waits for it for ever, without a word. Ours is a lock of the kernel, which ends with the process that holds it:
    who has it knows that torch's file is stale, unless a program of another kind is building there.

    Args:
        flag: what cannot be had without the operator; "": the run goes on without.

    Raises:
        UserError: the lock of a build that cannot be seen from here, and is too old to be waited for; an operator that
            a flag needs and this machine cannot have, or cannot build.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        if flag:
            reason = getattr(builder, "error_log", None) or "the lines above may say why"
            raise UserError(f"{flag} needs DeepSpeed's {builder_name}, which this machine cannot have: {reason}")
        return
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{builder.NAME}.one-at-a-time", "w") as ours:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: torch's own must do
            _build(builder)
            return
        for lock in root.glob(f"**/{builder.NAME}/lock"):
            _clear_lock(lock)
        if not is_built(builder.NAME):
            print(
                f"compiling DeepSpeed's {builder.NAME} into {root}, once for this environment: about a minute",
                flush=True,
            )
        _build(builder)


def _build(builder) -> None:
    """Build, where that is wanting, and load an operator; UserError, with what to do, where it fails."""
    try:
        builder.load()
    except (OSError, RuntimeError, ImportError, MissingCUDAException, CUDAMismatchException) as error:
        reason, name = str(error).strip().partition("\n")[0], builder.NAME
        raise UserError(f"DeepSpeed's {name} cannot be built or loaded here: {reason}; {_cure(error)}") from error


def _cure(error: Exception) -> str:
    """What helps against an operator that does not come to be."""
    if isinstance(error, ImportError):
        return f"if it was built for another torch or Python, delete {_root()}"
    if "cuda" in str(error).partition("\n")[0].lower():
        return (
            f"let CUDA_HOME name a CUDA toolkit with nvcc of version {torch.version.cuda}, which torch was made with; "
            "DS_SKIP_CUDA_CHECK=1 tries another"
        )
    return "the compiler's own words stand above"


def _clear_lock(lock: Path, max_minutes: float = 15) -> None:
    """Remove torch's lock if its build is dead; wait for it while it may live."""
    while lock.exists():
        age = time.time() - lock.stat().st_mtime
        shared = get_world_size() > ranks_per_node()  # a build on another node may hold it
        if not shared and age > 5 and not _is_working_in(lock.parent):
            print(f"note: removing {lock}, left by a build that was killed", flush=True)
            lock.unlink(missing_ok=True)
        elif age > 60 * max_minutes:
            raise UserError(
                f"{lock} is {age / 60:.0f} minutes old: a build of a DeepSpeed operator was killed there, and everyone "
                "would wait for it. If no build is running, delete that file"
            )
        else:
            time.sleep(0.5)


def _is_working_in(folder: Path) -> bool:
    """Whether a process of this machine has the folder as its working directory, as compilers have."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.resolve() == folder.resolve():
                return True
        except OSError:  # of another user, or gone
            continue
    return False
