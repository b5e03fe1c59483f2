"""Who may load models into a server: whoever knows the secret it was started with.

Loading a model is running code, so a server of ours takes load and unload, shared memory, and its log and trace
settings (files that it would write) only with a secret in the request's headers. By default it is made anew at each
start and stands in the view, for those to read who may write there: they could have the server run anything anyway.

Triton takes the secret in options alone, and every account of a machine may read a command line. So the options there
are of x instead, and the true ones stand in the environment, which only the same account may read. ``Gate`` stops the
server in the dynamic loader, before a line of its own runs, and points its ``argv`` at the true ones.
"""

import errno
import os
import re
import secrets
import stat
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from semwatch.errors import ConfigError
from semwatch.system import files

SECRET = ".control-secret"
"""File in the view."""
KEY = "semwatch-control"
_GRPC_PREFIX = "triton-grpc-protocol-"
_NEVER_OURS = "model-repository,shared-memory,trace,logging"
"""What the server does for those who know the secret; inference, health and metadata it does for all."""
_FORM = re.compile(r"[A-Za-z0-9_-]{16,256}")
_N_BYTES = 32
_VARIABLE = "SEMWATCH_TRITON_OPTION_"
_GATE_S = 30.0
_WORD = struct.calcsize("N")


def beside(view: Path) -> Path:
    """Where the secret of the server of a view stands by default."""
    return view / SECRET


def write_new(path: Path) -> str:
    """Make a secret and write it down for those who may write into its folder: this user, or the group too.

    Raises:
        ConfigError: the disk refused.
    """
    secret = secrets.token_urlsafe(_N_BYTES)
    try:
        with files.writing(path, mode=0o600) as file:
            file.write(f"{secret}\n".encode())
            folder = path.parent.stat()
            if folder.st_mode & stat.S_IWGRP:
                if os.fstat(file.fileno()).st_gid != folder.st_gid:  # a folder with setgid has seen to it
                    os.fchown(file.fileno(), -1, folder.st_gid)
                os.fchmod(file.fileno(), 0o640)
    except OSError as error:
        raise ConfigError(f"Triton's secret {path} cannot be written: {error.strerror}") from error
    return secret


def read(path: Path) -> str:
    """Read the secret of a file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Triton's secret {path} cannot be read: {error}") from error
    if not _FORM.fullmatch(secret):
        raise ConfigError(f"{path} must hold 16 to 256 letters, digits, - or _; make one with `openssl rand -hex 32`")
    return secret


def options(secret: str) -> list[str]:
    """The server's options that restrict it, with x for the secret: what its command line shows."""
    return _options("x" * len(secret))


def variables(secret: str) -> dict[str, str]:
    """The environment that holds the true options."""
    return {f"{_VARIABLE}{i}": option for i, option in enumerate(_options(secret))}


def _options(secret: str) -> list[str]:
    return [
        f"--grpc-restricted-protocol={_NEVER_OURS}:{KEY}={secret}",
        f"--http-restricted-api={_NEVER_OURS}:{KEY}={secret}",
    ]


def grpc_headers(path: Path) -> Mapping[str, str]:
    """Headers of a request to a restricted server; none where the file cannot be read: not every server asks."""
    try:
        return {f"{_GRPC_PREFIX}{KEY}": read(path)}
    except ConfigError:
        return {}


def is_refusal(message: str) -> bool:
    """Whether a server says that it wants a secret."""
    return "protocol is restricted" in message


def why_unknown(path: Path) -> str:
    """Why a server that was told what the file says still refuses."""
    try:
        read(path)
    except ConfigError as error:
        return str(error)
    return f"{path} holds another one"


@contextmanager
def gate() -> Iterator["Gate"]:
    """A gate for one start of a server."""
    with TemporaryDirectory(prefix="semwatch-gate-") as folder:
        pipe = Path(folder, "gate")
        os.mkfifo(pipe, 0o600)
        yield Gate(pipe)


class Gate:
    """A named pipe in the place of a library to preload: the loader waits there until the other end is opened."""

    def __init__(self, pipe: Path) -> None:
        self._pipe = pipe

    def command(self, executable: str) -> list[str]:
        """What starts the program up to the gate; its arguments follow."""
        return ["/usr/bin/env", f"LD_PRELOAD={self._pipe}", executable]

    def open_to(self, process: "subprocess.Popen[bytes]", executable: str, secret: str) -> None:
        """Wait for the program at the gate, give it the true options, and let it run.

        Raises:
            ConfigError: the machine does not let us; the program must be ended, it would know no secret.
        """
        deadline = time.monotonic() + _GATE_S
        try:
            while not Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(os.fsencode(executable) + b"\0"):
                self._wait(process, deadline)
            _swap_options(process.pid, secret)
            while not self._opened():
                self._wait(process, deadline)
            _forget_preload(process.pid)
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise ConfigError(f"Triton's secret cannot be kept out of its command line here: {error}") from error

    def _opened(self) -> bool:
        try:
            os.close(os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody waits yet
                raise
            return False
        return True

    def _wait(self, process: "subprocess.Popen[bytes]", deadline: float) -> None:
        if process.poll() is not None:
            raise ValueError(f"it ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise ValueError(f"it did not start within {_GATE_S:g} s")
        time.sleep(0.002)


def _forget_preload(pid: int) -> None:
    """Rename the variable, now that the loader has read it: the programs that this one starts wait at no gate."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(start)
        at = memory.read(end - start).index(b"LD_PRELOAD=")
        memory.seek(start + at)
        memory.write(b"XX")


def _swap_options(pid: int, secret: str) -> None:
    """Point ``argv`` of a process that has not begun at the true options in its environment."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    stack, arg_start, arg_end, env_start, env_end = (int(fields[i]) for i in (25, 45, 46, 47, 48))  # proc(5), from 3
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:

        def read(start: int, end: int) -> bytes:
            memory.seek(start)
            return memory.read(end - start)

        arguments, environment = read(arg_start, arg_end), read(env_start, env_end)
        (argc,) = struct.unpack("N", read(stack, stack + _WORD))
        argv = struct.unpack(f"{argc}N", read(stack + _WORD, stack + (1 + argc) * _WORD))
        for name, shown in zip(variables(secret), options(secret), strict=True):
            at = argv.index(arg_start + arguments.index(os.fsencode(shown) + b"\0"))
            true = env_start + environment.index(f"{name}=".encode()) + len(name) + 1
            memory.seek(stack + (1 + at) * _WORD)
            memory.write(struct.pack("N", true))
