"""What the user can mend, as exceptions and as readable lines. Imports neither torch nor deepspeed."""

import errno
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: a flag, a file, a model. The message says what was found and what to do."""


class SharedError(UserError):
    """A UserError that every rank raises alike: rank 0 tells it for all."""


class EndOfRun(Exception):
    """The run ends here, and well; every rank raises it alike. The message says why."""


# What gloo, NCCL and the store say when ranks do not come together, and what it means; the first that fits counts.
TROUBLE_BETWEEN_RANKS = {
    r"nccl.*/dev/shm": "NCCL's shared memory is full: a container wants more of it, as by docker run --shm-size=8g or "
    "--ipc=host",
    r"nccl.*duplicate gpu": "two ranks compute on one GPU, and NCCL wants one for each: look at "
    "CUDA_VISIBLE_DEVICES on every node",
    r"nccl.*(no socket interface|ncclSystemError|unhandled system error)": "NCCL cannot connect the ranks; name the "
    "network interface between the nodes, as in NCCL_SOCKET_IFNAME=eth0; NCCL_DEBUG=INFO says more",
    r"nccl.*unhandled cuda error": "NCCL could not use a GPU: it is full, taken by another program, or its driver is "
    "too old for this torch; NCCL_DEBUG=INFO says which call failed",
    r"ncclRemoteError": "the connection to another rank is lost: its process or its node has ended, and its own output "
    "says why",
    r"connectFullMesh": "the ranks cannot reach each other; name the network interface between the nodes, as in "
    "GLOO_SOCKET_IFNAME=eth0",
    r"gloo.*(connection (reset|closed)|broken pipe)": "the connection to another rank is lost: its process or its node "
    "has ended, and its own output says why",
    r"timed? ?out": "another rank did not take part within --comm_timeout seconds; it hangs, was stopped, is slower "
    "than that, or cannot be reached",
}


def trouble_between_ranks(error: Exception) -> str | None:
    """What a failed collective means to the user; None for any other error."""
    if isinstance(error, RuntimeError):
        for pattern, meaning in TROUBLE_BETWEEN_RANKS.items():
            if re.search(pattern, str(error), re.IGNORECASE | re.DOTALL):
                return meaning
    return None


# What CUDA says where torch and the machine do not fit, and what it means. What may be a fault of the code keeps its
# traceback.
TROUBLE_WITH_CUDA = {
    r"no kernel image is available": "this build of torch has no code for this GPU: install one that has "
    "(torch.cuda.get_arch_list() names what it was built for)",
    r"driver version is insufficient|driver.*too old": "the GPU's driver is older than this torch needs: install a "
    "newer driver, or a torch built for an older CUDA",
    r"uncorrectable ECC|device is lost|fallen off the bus": "the GPU itself failed: nvidia-smi -q and dmesg say more; "
    "take another one",
}


def trouble_with_cuda(error: Exception) -> str | None:
    """What an error of CUDA means to the user; None for any other error."""
    if isinstance(error, RuntimeError) and "cuda" in str(error).lower():
        for pattern, meaning in TROUBLE_WITH_CUDA.items():
            if re.search(pattern, str(error), re.IGNORECASE):
                return f"{meaning} ({str(error).partition(chr(10))[0]})"
    return None


def trouble_with_memory(error: Exception) -> str | None:
    """What a device without room means to the user; None for any other error."""
    if type(error).__name__ != "OutOfMemoryError":  # torch's
        return None
    reason = str(error).partition(". GPU")[0]
    return (
        f"{reason}. Fewer rows per device, gradient checkpointing, a higher ZeRO stage or --offload take less; "
        "--dry_run says how much, and which flags would fit"
    )


def trouble_with_files(error: Exception, folder: Path | None = None) -> str | None:
    """What a file that cannot be written means to the user; None for any other error.

    Args:
        folder: where it was to be written, which such errors do not always say.
    """
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)):
        return None
    meaning = f"{error.filename or folder or 'a file'} could not be written: {os.strerror(error.errno)}"
    if folder is not None:
        meaning += f" ({shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there)"
    return meaning


def meaning_of(error: Exception) -> str | None:
    """One line for what the user can mend; None for any other error, which is ours and wants its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if meaning := trouble_between_ranks(error):
        reason = str(error).partition("\n")[0]
        return f"{meaning} ({reason})"
    return trouble_with_memory(error) or trouble_with_cuda(error) or trouble_with_files(error)


def run_script(main: Callable[[], None]) -> None:
    """Call the main() of a script of one process; what the user can mend becomes one readable line and exit code 1.

    Any other error keeps its traceback. Scripts that join a process group call ``launch.run_main``, which ends alike.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # as shells have it
    except Exception as error:
        meaning = meaning_of(error)
        if meaning is None:
            raise
        sys.stdout.flush()  # what was printed before the error stands before it in a shared log
        sys.exit(f"\nerror: {meaning}")
