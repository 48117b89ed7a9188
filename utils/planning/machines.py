"""The machine that a plan is for: devices, how they are joined, and how much of their data sheets a run gets.

``utils/accelerators.py`` has the table of devices. Everything here is seconds, bytes and operations per second of one
rank; a collective is counted by the bytes that pass one rank's link and one node's network.
"""

import re
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F

from utils.accelerators import ACCELERATORS, Accelerator
from utils.arguments.kinds import nearest
from utils.ds_utils import TORCH_DTYPES
from utils.process.errors import UserError

CPU = "cpu"  # as --gpu takes it: this machine's processor, measured
HOP = 5e-6  # seconds from one rank of a ring to the next, at least; an estimate
HOST_BANDWIDTH = 200.0  # GB/s of a node's host memory, for the optimizer of --offload; an estimate


@dataclass(frozen=True)
class Efficiency:
    """What a run gets of the figures of a data sheet, as shares of 1, and what each layer costs at least.

    Attributes:
        compute: of the operations per second, in the products of training and scoring.
        bandwidth: of the memory's bytes per second, where weights and caches are read once.
        network: of a link's bytes per second, in collectives.
        launch: seconds that a layer of a forward pass takes at least, however little it computes: kernels are started
            one after the other.
    """

    compute: float
    bandwidth: float
    network: float
    launch: float


# compute and launch: fitted by evaluation_scripts/benchmark/published_times.py to 6 published times of DeepSpeed-Chat's
# step 3 in 2023. bandwidth and network: estimates, which those times hardly depend on.
GPU_EFFICIENCY = Efficiency(compute=0.114, bandwidth=0.6, network=0.7, launch=0.00145)
GRAPH_LAUNCH = 0.0001  # seconds of a layer whose kernels start together, as a CUDA graph (vLLM); an estimate
# Of what measure_cpu measures. compute: norms, activations and residuals stand between the products (measured here: a
# step of a Llama of 30M parameters, 4 rows of 256 tokens in fp32). launch: a pass of 8 tokens through 4 layers took
# 5 ms here. bandwidth: a copy reads and writes as Adam does. network: gloo adds or copies what a socket has received;
# an estimate.
CPU_EFFICIENCY = Efficiency(compute=0.85, bandwidth=1.0, network=0.5, launch=0.001)


@dataclass(frozen=True)
class Processor(Accelerator):
    """One rank's share of a CPU, measured.

    Attributes:
        attention: 1e12 operations per second in attention and its gradient.
        logits: 1e9 of them per second, from logits to the log-probs of labels and back to gradients.
    """

    attention: float
    logits: float


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind in nodes of one kind.

    Args:
        device: what each of them is. ranks, per_node: how many there are, and in one node.
        network: GB/s of one node to the others, in one direction.
        efficiency: what a run gets of it.
    """

    device: Accelerator
    ranks: int
    per_node: int
    network: float
    efficiency: Efficiency = GPU_EFFICIENCY

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    @property
    def on_cpu(self) -> bool:
        return self.device.name == CPU

    def computing(self, operations: float, dtype: str) -> float:
        """Seconds for so many operations in large products."""
        return operations / (self.device.peak(dtype) * self.efficiency.compute)

    def attending(self, operations: float, dtype: str) -> float:
        """Seconds for so many operations in attention: on a CPU at a speed of their own."""
        if isinstance(self.device, Processor):
            return operations / (self.device.attention * 1e12)
        return self.computing(operations, dtype)

    def scoring(self, logits: float) -> float:
        """Seconds from so many logits to log-probs, as a third of a forward and a backward pass. Elsewhere than on a
        CPU they count as part of the products that made them."""
        return logits / (3 * self.device.logits * 1e9) if isinstance(self.device, Processor) else 0.0

    def reading(self, size: float) -> float:
        """Seconds to read (or write) so many bytes of the device's memory."""
        return size / (self.device.bandwidth * 1e9 * self.efficiency.bandwidth)

    def host_link(self, size: float) -> float:
        """Seconds for so many bytes between a device and its host."""
        return size / (self.device.host * 1e9 * self.efficiency.network)

    def gathering(self, size: float, pieces: int = 1, ranks: int | None = None) -> float:
        """Seconds for an all-gather to ``size`` bytes on every rank, or for a reduce-scatter of as many.

        A ring passes size * (ranks - 1) / ranks bytes through the link of each rank, and size * (nodes - 1) / nodes
        through the network of each node (its devices' adapters side by side); the slower of them counts. An all-reduce
        is a reduce-scatter and an all-gather. (Thakur et al. 2005, Optimization of Collective Communication Operations
        in MPICH, section 4.)

        Args:
            pieces: collectives that it is done in; each has to go around the ring.
            ranks: that take part; None for all.
        """
        ranks = self.ranks if ranks is None else ranks
        if ranks <= 1:
            return 0.0
        nodes = -(-ranks // self.per_node)
        inside = size * (ranks - 1) / ranks / (self.device.link * 1e9)
        between = size * (nodes - 1) / nodes / (self.network * 1e9) if nodes > 1 else 0.0
        return max(inside, between) / self.efficiency.network + pieces * HOP * (ranks - 1)


def cluster_of(device: Accelerator, ranks: int, per_node: int, network: float | None = None) -> Cluster:
    """The usual nodes of a device. network: GB/s of a node; None: what such devices are rented with."""
    per_node = min(ranks, per_node)
    network = device.network * per_node if network is None else network
    efficiency = CPU_EFFICIENCY if device.name == CPU else GPU_EFFICIENCY
    return Cluster(device, ranks, per_node, network, efficiency)


def efficiency_of(given: list[str], fitted: Efficiency) -> Efficiency:
    """``fitted`` with the values of words such as compute=0.4.

    Raises:
        UserError: a word that is none, a name that is unknown, a share above 1.
    """
    names, values = [field.name for field in fields(Efficiency)], {}
    for word in given:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"--efficiency {word}: expected NAME=VALUE, as in compute=0.4") from None
        if name not in names:
            raise UserError(f"--efficiency {word}: {name} is none of {', '.join(names)}{nearest(name, names)}")
        if not 0 < value <= 1:
            raise UserError(f"--efficiency {word}: {text} is not above 0 and at most 1")
        values[name] = value
    return replace(fitted, **values)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def accelerator_named(name: str, dtype: str) -> Accelerator:
    """The row of the table that --gpu names, in any case and punctuation; "cpu" is measured.

    Raises:
        UserError: there is none, with the nearest; or it does not compute in ``dtype``.
    """
    if _plain(name) == CPU:
        return measure_cpu(dtype)
    known = {_plain(row.name): row for row in ACCELERATORS}
    wanted = _plain(name)
    found = known.get(wanted)
    if found is None:  # "A100" is the first of two
        found = next((row for row in ACCELERATORS if _plain(re.sub(r"-\d+GB$", "", row.name)) == wanted), None)
    if found is None:
        names = [row.name for row in ACCELERATORS] + [CPU]
        raise UserError(
            f"--gpu {name!r} is not in the table of utils/accelerators.py{nearest(name.upper(), names)}; there are "
            f"{', '.join(names)}"
        )
    if not found.peak(dtype):
        raise UserError(f"--gpu {found.name} only emulates {dtype}; give --dtype fp16 or fp32")
    return found


def measure_cpu(dtype: str, ranks: int = 1, seconds: float = 0.2, clock: Callable = time.perf_counter) -> Processor:
    """This machine's processor as a device, measured in about five times ``seconds``.

    Args:
        ranks: that share the cores and the memory's bandwidth: as many threads measure at once, each with its share of
            this process's threads.
        clock: time.thread_time, with one thread in each rank, leaves out what other programs take.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // ranks))
    try:
        with ThreadPoolExecutor(ranks) as pool:
            shares = list(pool.map(lambda _: _measure(TORCH_DTYPES[dtype], seconds, clock), range(ranks)))
    finally:
        torch.set_num_threads(before)
    products, attention, logits, bandwidth, link = (statistics.fmean(values) for values in zip(*shares, strict=True))
    peaks = {name: 0.0 for name in TORCH_DTYPES} | {dtype: products / 1e12}
    links = {"link": link / 1e9, "host": bandwidth / 1e9, "network": link / 1e9}
    own = {"attention": attention / 1e12, "logits": logits / 1e9}
    return Processor(CPU, CPU, **peaks, memory=0, bandwidth=bandwidth / 1e9, **links, **own)


def _measure(dtype: torch.dtype, seconds: float, clock: Callable) -> tuple[float, ...]:
    """Operations per second in products and in attention, logits, bytes of memory and bytes through a socket of this
    machine per second."""
    usual = partial(_usual_time, seconds=seconds, clock=clock)
    left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    products = 2 * 512 * 1024 * 1024 / usual(lambda: left @ right)

    heads, length, width = 4, 512, 64
    states = [torch.ones(1, heads, length, width, dtype=dtype, requires_grad=True) for _ in range(3)]
    # Forward and backward are 3 forward passes; a token looks at half of the row.
    operations = 3 * 4 * length * heads * width * length / 2
    attention = operations / usual(lambda: F.scaled_dot_product_attention(*states, is_causal=True).sum().backward())

    logits = torch.zeros(512, 2**15, dtype=dtype, requires_grad=True)  # as large as memory is asked for anew each time
    labels = torch.zeros(len(logits), dtype=torch.long)

    def score() -> None:
        logits.grad = None
        F.nll_loss(logits.float().log_softmax(-1), labels).backward()

    scored = logits.numel() / usual(score)
    source, target = logits.detach().float(), torch.empty(logits.shape)
    bandwidth = 2 * source.nbytes / usual(lambda: target.copy_(source))
    with closing(_Loopback()) as loop:
        link = loop.SIZE / usual(loop.pass_through)
    return products, attention, scored, bandwidth, link


class _Loopback:
    """Two ends of a connection inside this machine, as gloo has between ranks: each sends and receives."""

    SIZE, PIECE = 2**22, 2**16  # bytes of a call; a piece fits the buffers, so that one thread can hold both ends

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.sender = socket.create_connection(server.getsockname())
            self.receiver, _ = server.accept()
        self.piece = bytearray(self.PIECE)

    def pass_through(self) -> None:
        for _ in range(self.SIZE // self.PIECE):
            self.sender.sendall(self.piece)
            left = memoryview(self.piece)
            while left:
                left = left[self.receiver.recv_into(left) :]

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def _usual_time(action: Callable, seconds: float, clock: Callable) -> float:
    """The median time of a call, out of those that ``seconds`` have room for, two at least."""
    action()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        start = clock()
        action()
        times.append(clock() - start)
    return statistics.median(times)
