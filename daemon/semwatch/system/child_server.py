"""What the servers of our own have in common: Redis and Triton as child processes that end with this one."""

import os
import socket
import sys
from pathlib import Path

_LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() == int(sys.argv[1]):  # else the parent died before prctl
    os.execv(sys.argv[2], sys.argv[2:])
"""


def dying_with_us(*argv: str) -> list[str]:
    """Command line of a process that gets SIGTERM when the thread that starts it ends.

    A small launcher sees to that and then becomes the program by ``exec``: unlike ``preexec_fn`` it runs no Python
    between fork and exec, so it is safe beside threads.

    Args:
        argv: the program's absolute path and its arguments.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *argv]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def text_from(path: Path, start: int, *, limit: int = 20_000) -> str:
    """Read a log from a byte on; of much, the last ``limit`` bytes."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read()[-limit:].decode("utf-8", "replace").strip()
