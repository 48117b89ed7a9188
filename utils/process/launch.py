"""How a script starts under three launchers (``deepspeed``, ``torchrun``, plain ``python``) and how it ends.

Everything works with one process and no launcher too: a world of one still has a process group, so that no other module
needs an "if distributed".
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import deepspeed
import psutil
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator

import utils.process.follow_launcher  # noqa: F401
from utils.process.errors import EndOfRun, SharedError, UserError, meaning_of
from utils.process.operators import prepare_operators
from utils.process.ranks import barrier
from utils.process.world import get_local_rank, get_rank, ranks_per_node

COMM_TIMEOUT = 1800  # seconds, the default of --comm_timeout
OWN_ERROR_SECONDS = 5  # how long a rank other than 0 waits before it prints an error of its own

_rescue: weakref.WeakMethod | None = None  # see before_failing


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def limit_cpu_threads() -> None:
    """Give each rank of a node its share of the cores, unless the user has set OMP_NUM_THREADS.

    Torch takes all cores for each process; two ranks on one machine then fight for them and run several times slower.
    """
    if "OMP_NUM_THREADS" in os.environ and not _torchrun_chose_threads():
        return
    threads = max(1, len(os.sched_getaffinity(0)) // ranks_per_node())
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # DeepSpeed's operators load an OpenMP of their own, later


def _torchrun_chose_threads() -> bool:
    """torchrun sets OMP_NUM_THREADS to 1 for several ranks where it was not set: its own environment tells."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return False


def unusable_gpu(devices: Path = Path("/dev")) -> str | None:
    """Why this machine's GPU would be left alone; None if it has none, torch can use it, or it is hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"
    gpus = sorted(devices.glob("nvidia[0-9]*"))
    if hidden or not gpus or torch.cuda.is_available():
        return None
    reason = f"torch {torch.__version__} is a build without CUDA; install one with it, in a fresh environment"
    if torch.version.cuda is not None:
        reason = f"torch {torch.__version__} finds none for CUDA {torch.version.cuda}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                reason = f"torch {torch.__version__}: {str(error).partition(chr(10))[0]}"
    return f'{gpus[0]} is a GPU that torch cannot use: {reason}. CUDA_VISIBLE_DEVICES="" computes on the CPU'


def check_devices() -> None:
    """Refuse a GPU that torch cannot use, and more ranks on this machine than it has devices.

    Raises:
        UserError: from the first rank of the node; its others raise it alike.
    """
    accelerator, ranks, problem = get_accelerator(), max(ranks_per_node(), get_local_rank() + 1), None
    if accelerator.device_name() == "cpu":
        problem = unusable_gpu()
    elif ranks > accelerator.device_count():
        problem = (
            f"{ranks} ranks on {socket.gethostname()}, and torch sees {accelerator.device_count()} GPU(s) there: each "
            "rank needs one of its own. Start as many (deepspeed --num_gpus, torchrun --nproc_per_node, RANKS of the "
            "scripts), or let CUDA_VISIBLE_DEVICES name more"
        )
    if problem is not None:
        raise (UserError if get_local_rank() == 0 else SharedError)(problem)


def _join_process_group(timeout: datetime.timedelta) -> None:
    """Raises UserError: the port where the ranks are to meet is taken."""
    # DeepSpeed makes further groups of the same ranks for ZeRO, which get torch's default, not that of the first group.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']}, where the ranks are to meet, is taken by another program: give a free "
            "one, by MASTER_PORT or the launcher's --master_port"
        ) from error


def _stop(*_signal) -> None:
    """Ctrl-C in a run that keeps no checkpoints; the launcher may leave no time for more than a line."""
    if get_rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopped by Ctrl-C; nothing of this run is kept (--checkpoint_steps keeps checkpoints)\n")
    raise KeyboardInterrupt


def init_distributed(args) -> torch.device:
    """Join the process group and return this rank's device.

    Works under ``deepspeed``, ``torchrun`` and plain ``python`` (a world of one on a free local port). From here on
    the environment says which rank this is, and ``utils.process.world`` reads it; ``args`` stays as it is.

    Args:
        args: ``local_rank``, as older launchers pass it (-1: the environment says it), and ``comm_timeout``, the
            seconds that bound every collective.
    """
    check_restarts()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    if args.local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(args.local_rank)
    signal.signal(signal.SIGINT, _stop)
    prepare_operators()
    check_devices()
    limit_cpu_threads()
    # DeepSpeed still calls torch's collectives by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()  # bars of our own say more
    transformers.utils.logging.set_verbosity_error()  # what loading missed is checked and raised by the model code
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(get_local_rank())
    _join_process_group(datetime.timedelta(seconds=args.comm_timeout))
    return torch.device(accelerator.current_device_name())


def before_failing(rescue: Callable[[Exception], None]) -> None:
    """Have a method called with the error that ends this process, before it is told; the newest one counts."""
    global _rescue
    _rescue = weakref.WeakMethod(rescue)  # a run that is over is not kept


def _try_to_rescue(error: Exception) -> None:
    """What goes wrong here must not hide the error that it is about."""
    rescue = _rescue and _rescue()
    if rescue is not None:
        try:
            rescue(error)
        except Exception as another:
            print(f"rank {get_rank()}: nothing could be saved after the error: {another}", file=sys.stderr)


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
    except KeyboardInterrupt:
        exit_code = 128 + signal.SIGINT  # as shells have it
    except Exception as error:
        exit_code = 1
        _try_to_rescue(error)
        _print_error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if not dist.is_initialized():
        sys.exit(exit_code)
    os._exit(exit_code)


def _print_error(error: Exception) -> None:
    """Once what all ranks have alike; else with the rank, which is not needed where it is rank 0's own UserError."""
    rank, meaning = get_rank(), meaning_of(error)
    if isinstance(error, UserError) and rank > 0:
        if isinstance(error, SharedError):
            return
        time.sleep(OWN_ERROR_SECONDS)  # if rank 0 fails alike it says so, and the launcher ends this process meanwhile
    sys.stdout.flush()
    if meaning is None:
        print(f"rank {rank} failed:", file=sys.stderr)
        traceback.print_exception(error)
    else:
        whose = "" if isinstance(error, UserError) and rank == 0 else f"rank {rank}: "
        print(f"\nerror: {whose}{meaning}", file=sys.stderr)
