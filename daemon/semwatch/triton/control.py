"""Who may load models into a server: whoever knows the secret it was started with.

Loading a model is running code, so a server of ours takes load and unload, shared memory, and its log and trace
settings (files that it would write) only with a secret in the request's headers. By default it is made anew at each
start and stands in the view, for those to read who may write there: they could have the server run anything anyway.

Triton knows the secret from its command line, which every user of a machine may read; ``hide`` wipes it there.
"""

import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

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


def beside(view: Path) -> Path:
    """Where the secret of the server of a view stands unless told otherwise."""
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
    """The server's options that restrict it."""
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


def hide(pid: int, secret: str) -> bool:
    """Wipe a secret from the command line of our own child; False where the system does not let us.

    The child has copied its options by then; only what others read in ``/proc`` changes.
    """
    hidden, sought = b"x" * len(secret), secret.encode()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            line = memory.read(end - start)
            memory.seek(start)
            memory.write(line.replace(sought, hidden))
    except (OSError, ValueError, IndexError):
        return False
    return sought not in Path(f"/proc/{pid}/cmdline").read_bytes()
