"""`semwatch redis`: a Redis server in the foreground, for a supervisor such as systemd."""

import os
import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from semwatch.errors import ConfigError
from semwatch.streams import embedded_redis

PORT = 6379
LOCK_TIMEOUT_S = 5.0


def redis_server(
    folder: Annotated[Path, typer.Option(help="Where its data lie.")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"Port on 127.0.0.1; {PORT} without it and --socket.")
    ] = None,
    socket_path: Annotated[
        Path | None, typer.Option("--socket", help="Listen on this unix socket alone; its group may use it too.")
    ] = None,
) -> None:
    """Become a Redis server that loses nothing: every write is on disk before its answer, nothing is evicted.

    It runs in the foreground, for this machine alone, and says what it has to say on standard output.
    """
    if port is not None and socket_path is not None:
        raise ConfigError("give --port or --socket, not both")
    executable, data = embedded_redis.find_executable(), folder.absolute()
    listens_on = (port or PORT) if socket_path is None else None
    place = socket_path.absolute() if socket_path is not None else None
    lock = embedded_redis.lock(data, socket_path=place, deadline=time.monotonic() + LOCK_TIMEOUT_S)
    _check_free(listens_on)
    os.set_inheritable(lock, True)  # the server holds it from here on
    options = embedded_redis.options(data, port=listens_on, socket_path=place, socket_mode="770")
    os.execv(executable, [str(executable), *options])


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
