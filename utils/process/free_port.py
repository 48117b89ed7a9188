"""Prints the first port from the given one on that no program listens on: python free_port.py 29517"""

import socket
import sys


def free_port(first: int, tried: int = 100) -> int:
    """Raises OSError where all of them are taken."""
    for port in range(first, first + tried):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that a run has just left is free
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port from {first} to {first + tried - 1} is free")


if __name__ == "__main__":
    print(free_port(int(sys.argv[1])))
