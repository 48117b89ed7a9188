"""Processes: how a script starts under three launchers, who is rank 0, and how one rank's failure reaches all.

Everything here works with one process and no launcher too: a world of one still has a process group, so that no
other module needs an "if distributed".
"""

import contextlib
import ctypes
import datetime
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import deepspeed
import deepspeed.comm as ds_dist
import psutil
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension


class UserError(Exception):
    """Something the user can mend: a flag, a file, a model. The message says what was found and what to do."""


class SharedError(UserError):
    """A UserError that every rank raises alike: rank 0 tells it for all."""


class EndOfRun(Exception):
    """The run ends here, and well; every rank raises it alike. The message says why."""


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_per_node() -> int:
    """As torchrun, or the deepspeed launcher, says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def load_operator(builder_name: str) -> None:
    """Let DeepSpeed build (the first time) and load one of its own operators, "ShareMemCommBuilder" say.

    Torch guards a build with a bare file. A run that is killed at the wrong moment leaves it behind, and every later
    run waits for it for ever, without a word. Ours is a lock of the kernel, which ends with the process that holds it:
    who has it knows that torch's file is stale, unless a program of another kind is building there.

    Raises:
        UserError: the lock of a build that cannot be seen from here, and is too old to be waited for.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{builder.NAME}.one-at-a-time", "w") as ours:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: torch's own must do
            builder.load()
            return
        for lock in root.glob(f"**/{builder.NAME}/lock"):
            _clear_lock(lock)
        builder.load()


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def limit_cpu_threads() -> None:
    """Give each rank of a node its share of the cores, unless the user has set OMP_NUM_THREADS.

    Torch takes all cores for each process; two ranks on one machine then fight for them and run several times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_per_node()))


HEAP_BLOCK = 32 * 1024 * 1024  # bytes; smaller blocks lie on glibc's heap, which hardly ever shrinks


@contextlib.contextmanager
def memory_given_back():
    """While open, freed tensors of any size return to the system at once; for loading and saving.

    glibc keeps freed blocks below a threshold that it raises to 32 MiB by itself. Layers that are gathered and released
    by turns then leave holes: two CPU ranks were seen to hold 2.5 times the weights they had loaded at ZeRO-3.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library has no such threshold
        yield
        return
    mmap_threshold, trim_threshold = -3, -1
    libc.mallopt(mmap_threshold, 128 * 1024)
    try:
        yield
    finally:
        libc.mallopt(mmap_threshold, HEAP_BLOCK)  # where glibc's own rule ends up in training
        libc.mallopt(trim_threshold, 64 * 1024 * 1024)
        libc.malloc_trim(0)


COMM_TIMEOUT = 1800  # seconds, the default of --comm_timeout


def follow_launcher(poll_seconds: float = 1.0) -> None:
    """Under ``deepspeed`` or ``torchrun``: end with them, so that no rank is left over and holds memory and ports.

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
    set_parent_death_signal = 1
    libc.prctl(set_parent_death_signal, int(signal.SIGKILL))
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


def check_restarts() -> None:
    """Refuse restarts by torchrun in which new ranks would read the addresses of the dead from the old store.

    torchrun shares the store of its rendezvous with the ranks, and keeps it when it starts them again.
    """
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise SharedError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, on every node; "
            "without it ranks that are started again look for each other where the ended ones were"
        )


def unname_shared_memory() -> None:
    """Take the name off the segment through which CPU ranks of one machine reduce, once all of them have mapped it.

    DeepSpeed leaves 69 MB per rank in /dev/shm, which is memory, when a run is killed or leaves by os._exit.
    """
    barrier()
    place = "_".join((str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(get_rank())))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{place}").unlink(missing_ok=True)


def init_distributed(args) -> torch.device:
    """Join the process group and return this rank's device.

    Works under ``deepspeed``, ``torchrun`` and plain ``python`` (a world of one on a free local port). Sets
    ``args.local_rank`` and ``args.global_rank``. ``args.comm_timeout`` (seconds) bounds every collective.
    """
    check_restarts()
    follow_launcher()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if args.local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(args.local_rank)
    limit_cpu_threads()
    # DeepSpeed still calls torch's collectives by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()  # bars of our own say more
    transformers.utils.logging.set_verbosity_error()  # what loading missed is checked and raised by the model code
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(get_local_rank())
    load_operator("ShareMemCommBuilder")
    timeout = datetime.timedelta(seconds=getattr(args, "comm_timeout", COMM_TIMEOUT))
    # DeepSpeed makes further groups of the same ranks for ZeRO, which get torch's default, not that of the first group.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    unname_shared_memory()
    args.local_rank, args.global_rank = get_local_rank(), get_rank()
    return torch.device(accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu")


def barrier() -> None:
    if get_world_size() > 1:
        ds_dist.barrier()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, as a new tensor of the same shape; the argument is left alone."""
    total = values.detach().clone()
    if get_world_size() > 1:
        ds_dist.all_reduce(total)
    return total


def all_gather_objects(value) -> list:
    """Small Python values (numbers, strings, dicts) of every rank, in rank order."""
    if get_world_size() == 1:
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def agree(check: Callable[[], None]) -> None:
    """Run a check on every rank; a UserError on any is raised on all, so that no rank waits for the others."""
    problem = None
    try:
        check()
    except UserError as error:
        problem = str(error)
    problems = [message for message in all_gather_objects(problem) if message]
    if problems:
        raise SharedError(problems[0])


def check_same_on_all_nodes(values: dict[str, object]) -> None:
    """Named values that must not differ between ranks: nodes are started, and get their files, one by one.

    Raises:
        UserError: on all ranks, with the name that differs, its two values, and the hosts.
    """
    here = {name: str(value) for name, value in values.items()}
    (first, first_host), *others = all_gather_objects((here, socket.gethostname()))
    for found, host in others:
        for name in first.keys() | found.keys():
            if first.get(name) != found.get(name):
                raise SharedError(
                    f"{name} must be the same on every node: it is {first.get(name)} on {first_host}, the first, and "
                    f"{found.get(name)} on {host}"
                )


OWN_ERROR_SECONDS = 5  # how long a rank other than 0 waits before it tells an error of its own
_run_id: str | None = None


def _get_run_id() -> str:
    """A name for this launch that all ranks share: markers left by an earlier, failed launch must not be believed."""
    global _run_id
    if _run_id is None:
        _run_id = next(name for name in all_gather_objects(uuid.uuid4().hex) if name)
    return _run_id


def once_per_node(result: Path, build: Callable[[], None], rebuild: bool = False, poll_seconds: float = 0.2) -> None:
    """Let the first rank of each node make ``result`` (a path that appears atomically when complete).

    The other ranks look for the file instead of sitting in a collective, whose timeout a long preparation would
    outlast. If the build fails, its message reaches every rank as UserError.

    Args:
        rebuild: do not trust a result that is there already.
    """
    run_id = _get_run_id()
    if rebuild:
        barrier()  # nobody may find the old result below
        if get_local_rank() == 0:
            result.unlink(missing_ok=True)
        barrier()
    failure = result.with_name(f"{result.name}.{run_id}.failed")
    if get_local_rank() == 0:
        try:
            if not result.exists():
                build()
        except Exception as error:
            message = trouble_with_files(error, result.parent) or str(error) or repr(error)
            with contextlib.suppress(OSError):  # a full disk: the launcher ends the others then
                failure.parent.mkdir(parents=True, exist_ok=True)
                scratch = failure.with_suffix(f".{uuid.uuid4().hex}")  # other nodes may fail at the same place
                scratch.write_text(message)
                os.replace(scratch, failure)
            if isinstance(error, ValueError | OSError | UserError):
                raise SharedError(message) from error
            raise
    else:
        while not result.exists():
            if failure.exists():
                raise SharedError(failure.read_text())
            time.sleep(poll_seconds)


# What gloo, NCCL and the store say when ranks do not come together, and what it means; the first that fits counts.
TROUBLE_BETWEEN_RANKS = {
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


def trouble_with_files(error: Exception, folder: Path | None = None) -> str | None:
    """What a file that cannot be written means to the user; None for any other error.

    Args:
        folder: where it was to be written, which such errors do not always tell.
    """
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)):
        return None
    place = error.filename or folder
    told = f"{place or 'a file'} could not be written: {os.strerror(error.errno)}"
    if folder is not None:
        told += f" ({shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there)"
    return told


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main(); turn what the user can mend into one readable line and exit code 1 on every rank.

    The process leaves by os._exit: the threads of process groups do not survive an ordinary end of the interpreter
    (the process would sometimes abort after all its work is done), and after an error the other ranks may be waiting
    for this one in a collective, so that the launcher must see it go.
    """
    exit_code = 0
    try:
        main()
        barrier()
    except EndOfRun as end:
        if get_rank() == 0:
            print(end, flush=True)
        barrier()
    except UserError as error:
        exit_code = 1
        if get_rank() > 0:
            # Rank 0 tells it if it fails alike, and the launcher ends this process meanwhile; else it is ours to tell.
            time.sleep(0 if isinstance(error, SharedError) else OWN_ERROR_SECONDS)
        if get_rank() == 0 or not isinstance(error, SharedError):
            print(f"\nerror: {'' if get_rank() == 0 else f'rank {get_rank()}: '}{error}", file=sys.stderr)
    except Exception as error:
        exit_code = 1
        if meaning := trouble_between_ranks(error):
            reason = str(error).partition("\n")[0]
            print(f"\nerror: rank {get_rank()}: {meaning} ({reason})", file=sys.stderr)
        elif told := trouble_with_files(error):
            print(f"\nerror: rank {get_rank()}: {told}", file=sys.stderr)
        else:
            print(f"rank {get_rank()} failed:", file=sys.stderr)
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if not dist.is_initialized():
        sys.exit(exit_code)
    os._exit(exit_code)


def now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
