"""Two nodes on one machine, for tests that need several: what lies between nodes lies between these.

Each has its network (a namespace; the two are joined by a veth pair and reach nothing else), its host name, its
processes (so the same process ids turn up on both), its /dev/shm, and its local disk, under one path for both. All
other files are shared, as if they lay on a network drive. It takes root with the right to make namespaces.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil


def why_not() -> str | None:
    """The reason why two nodes cannot be made here, or None."""
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} here"
    probe = f"probe{os.getpid()}"
    made = [
        ["ip", "netns", "add", probe],
        ["ip", "netns", "exec", probe, "unshare", "-muipf", "--mount-proc", "mount", "-t", "tmpfs", "x", "/dev/shm"],
        ["ip", "-n", probe, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"],
    ]
    try:
        for command in made:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            if done.returncode != 0:
                return f"no right to {' '.join(command[:3])}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=20, check=False)
    return None


@dataclass
class Node:
    """A node and what runs on it. ``disk`` is its local disk as seen from outside."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen | None = None

    @property
    def disk(self) -> Path:
        return self.folder / f"disk-{self.name}"

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.name}"

    @property
    def left_running(self) -> str:
        return (self.folder / f"left-{self.name}").read_text()

    @property
    def namespace(self) -> str:
        return f"{self.name}-{os.getpid()}"

    def ip(self, *arguments) -> None:
        subprocess.run(["ip", "-n", self.namespace, *arguments], check=True, timeout=20, capture_output=True)

    def start(self, command, **environment) -> None:
        """Run a command there; its output goes to ``log``."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self.namespace),
                    *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *(sys.executable, __file__, self.name, str(self.folder), *map(str, command)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
            )

    def kill(self) -> None:
        """All its processes end at once, without a word."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(20)


@dataclass
class TwoNodes:
    """Use it with ``with``; ``folder`` (an absolute path) takes disks, logs and what else belongs to the nodes."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)

    def __enter__(self) -> "TwoNodes":
        self.nodes = [Node(f"node{i}", f"10.231.7.{i + 1}", self.folder) for i in range(2)]
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{n.address} {n.name}\n" for n in self.nodes)
        )
        (self.folder / "local").mkdir()
        try:
            for node in self.nodes:
                node.disk.mkdir()
                subprocess.run(["ip", "netns", "add", node.namespace], check=True, timeout=20, capture_output=True)
                node.ip("link", "set", "lo", "up")
            first, second = self.nodes
            first.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second.namespace)
            for node in self.nodes:
                node.ip("address", "add", f"{node.address}/24", "dev", "eth0")
                node.ip("link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for node in self.nodes:
            node.kill()
            subprocess.run(["ip", "netns", "del", node.namespace], check=False, timeout=20, capture_output=True)

    def __iter__(self):
        return iter(self.nodes)

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    @property
    def local(self) -> Path:
        """The local disk, as a process of either node names it."""
        return self.folder / "local"

    def start_recipe(self, recipe: Path, arguments, **environment) -> None:
        """The recipe on each node, as someone without ssh between the nodes starts it."""
        hostfile = self.folder / "hostfile"
        hostfile.write_text("".join(f"{node.name} slots=1\n" for node in self.nodes))
        for rank, node in enumerate(self.nodes):
            given = {
                "HOSTFILE": str(hostfile),
                "LAUNCHER_ARGS": f"--no_ssh --node_rank {rank} --master_addr {self.nodes[0].name}",
            }
            node.start(["bash", recipe, *arguments], **surroundings(), **given, **environment)

    def wait(self, timeout: float) -> list[int]:
        """The exit code of each node's command, once all have ended."""
        return [node.process.wait(timeout) for node in self.nodes]


def surroundings() -> dict[str, str]:
    """The environment of a node's processes: the tests' interpreter first, and nothing of a launch around them."""
    binaries = Path(sys.executable).parent
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_inside(name: str, folder: Path, command: list[str]) -> int:
    """The first process of a node: give it what is its own, run the command, write down what that leaves running."""
    socket.sethostname(name)
    mounts = [
        ("--types", "tmpfs", "tmpfs", "/dev/shm"),
        ("--bind", folder / "hosts", "/etc/hosts"),
        ("--bind", folder / f"disk-{name}", folder / "local"),
    ]
    for mount in mounts:
        subprocess.run(["mount", *map(str, mount)], check=True)
    code = subprocess.run(command, check=False).returncode
    for _ in range(10):  # what has been told to end has a moment to do it
        left = [p for p in psutil.process_iter() if p.pid != os.getpid() and p.status() != psutil.STATUS_ZOMBIE]
        if not left:
            break
        time.sleep(0.3)
    (folder / f"left-{name}").write_text("\n".join(" ".join(process.cmdline()) for process in left))
    return code


if __name__ == "__main__":
    sys.exit(run_inside(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
