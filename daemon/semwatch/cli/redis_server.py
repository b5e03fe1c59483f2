"""`semwatch redis`: a Redis server in the foreground, for a supervisor such as systemd."""

import os
import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from semwatch.errors import ConfigError
from semwatch.streams import embedded_redis

LOCK_TIMEOUT_S = 5.0
MIN_PASSWORD = 16


def redis_server(
    folder: Annotated[Path, typer.Option(help="Where its data lie.")],
    socket_path: Annotated[
        Path | None,
        typer.Option("--socket", help="Unix socket, which its user and group may open; redis.sock in the folder else."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Listen on this port of 127.0.0.1 instead; needs a password.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(help=f"File with the password of its clients, {MIN_PASSWORD} characters or more.")
    ] = None,
) -> None:
    """Become a Redis server that loses nothing: every write is on disk before its answer, nothing is evicted.

    It runs in the foreground, for this machine alone, and says what it has to say on standard output. Its clients may
    work on data and nothing else: no CONFIG, MODULE, DEBUG, REPLICAOF or SHUTDOWN.
    """
    if port is not None and socket_path is not None:
        raise ConfigError("give --port or --socket, not both")
    password = _password(password_file) if password_file is not None else None
    if port is not None and password is None:
        raise ConfigError(
            "--port lets every account of this machine in: give --password-file too (`openssl rand -hex 32` makes "
            "one), or a --socket"
        )
    executable, data = embedded_redis.find_executable(), folder.absolute()
    place = None if port is not None else (socket_path or data / "redis.sock").absolute()
    lock = embedded_redis.lock(data, socket_path=place, deadline=time.monotonic() + LOCK_TIMEOUT_S)
    _check_free(port)
    # Not in the command line, which every account may read; the server reads it from memory that has no name.
    rules = os.memfd_create("semwatch-redis", 0)
    os.write(rules, embedded_redis.service_user(password).encode())
    os.set_inheritable(lock, True)  # the server holds it from here on
    options = embedded_redis.options(data, port=port, socket_path=place, socket_mode="770")
    os.execv(executable, [str(executable), f"/proc/self/fd/{rules}", *options])


def _password(path: Path) -> str:
    try:
        password = path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--password-file {path} cannot be read: {error}") from error
    if len(password) < MIN_PASSWORD:
        raise ConfigError(f"{path} holds {len(password)} characters, under {MIN_PASSWORD}: `openssl rand -hex 32`")
    return password


def _check_free(port: int | None) -> None:
    """A taken port is a wrong setting: told as one, a supervisor does not try it for ever."""
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on 127.0.0.1 is taken ({error.strerror}): name a free one, or use the Redis that is "
                f"there and do not start this one"
            ) from error
