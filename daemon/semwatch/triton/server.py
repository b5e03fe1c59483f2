"""A Triton server of our own on loopback, for a workstation without one, for tests and demonstrations.

``LocalTriton`` runs what ``setup`` installed, with explicit model control, over a view of the model repository
(``view``). It is a child process that ends with this one: a small launcher sets ``PR_SET_PDEATHSIG`` and then
becomes the server by ``exec``, as in ``embedded_redis``.

    <state>/triton.log     what server and models say
    <state>/triton.lock    held by the server itself

Whoever may load models may run code: the server listens on this machine alone, loads for those alone who know its
secret (``control``), and its folder is its user's.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.models.model_repository import MODELS
from semwatch.system import child_server, files
from semwatch.triton import control
from semwatch.triton import view as triton_view
from semwatch.triton.setup import Installation
from semwatch.triton.view import Settings, View

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STUCK_S = 90.0
"""A model that loads for longer never will."""

_LOCK, _LOG = "triton.lock", "triton.log"
_TAKEN = re.compile(r"127\.0\.0\.1:(\d+)'? already in use")
_PORT_TRIES = 5
_POLL_S = 0.05
_MAX_LOG_BYTES = 20_000_000


class LocalTriton:
    """Holds a running Triton; ``with LocalTriton(folder, repository) as server: Triton(repository, url=server.url)``.

    The server reads a view of the model repository (``view``), holds the versions that ``serving.choice`` says,
    and those that clients add. It ends with this process; start it from a thread that lives as long as the server:
    Linux sends the death signal when that *thread* ends.

    Args:
        folder: where ``set_up`` installed it.
        repository: the model repository; it is not changed.
        grpc_port: port on loopback; 0 takes a free one and keeps it over restarts.
        http_port: the same for health questions over HTTP.
        settings: what runs the models.
        view: the folder to serve; None: the one beside the repository.
        environment: Python environment of the models; None: the one that ``set_up`` made.
        control_secret_file: holds the secret of those who may load models; None: a new one in the view at each start.
        state: where log and lock go; None: into the folder too.
        timeout_s: longest wait for the start.
    """

    def __init__(
        self,
        folder: Path,
        repository: Path,
        *,
        grpc_port: int = 0,
        http_port: int = 0,
        settings: Settings = Settings(),  # noqa: B008 - frozen
        view: Path | None = None,
        environment: Path | None = None,
        control_secret_file: Path | None = None,
        state: Path | None = None,
        timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._made = Installation(folder.absolute())
        self._state = (state or folder).absolute()
        self._repository = repository.absolute()
        self._ports = (grpc_port, http_port)
        self._settings = settings
        self.view = (view or triton_view.beside(repository)).absolute()
        self._environment = (environment or self._made.venv).absolute()
        self._given_secret = control_secret_file
        self._secret = ""
        self._loading_since: dict[str, float] = {}
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its gRPC address; with port 0 known only after the start."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def http_port(self) -> int:
        """Its HTTP port; with port 0 known only after the start."""
        return self._ports[1]

    @property
    def pid(self) -> int | None:
        """Process id while it runs, else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def log(self) -> Path:
        """What server and models say."""
        return self._state / _LOG

    def start(self) -> None:
        """Start the server and wait until it answers; does nothing while it runs.

        Call it again after the server died: it comes back at the same address with the same versions. A model that
        cannot be loaded does not keep the others from serving; the client that asks for it says why.

        Raises:
            ConfigError: it is not set up, the folder is in use, a port is taken, or it ended with what it says.
            ServiceUnavailable: not ready within ``timeout_s``.
        """
        if self.pid is not None:
            return
        target = self._settings.target
        if target == "tensorrt":
            raise ConfigError(
                "this server has no TensorRT backend: serve the view with NVIDIA's container, or let it run "
                "tensorrt-rtx plans"
            )
        if not self._made.is_current(target):
            raise ConfigError(
                f"no Triton in {self._made.folder}: `semwatch triton setup --folder ... --target {target}` installs it"
            )
        self._fill_view()
        deadline = time.monotonic() + self._timeout_s
        lock_fd = self._lock(deadline)
        try:
            given = self._given_secret
            self._secret = control.read(given) if given else control.write_new(control.beside(self.view))
            output = self._launch(lock_fd, deadline)
        finally:
            os.close(lock_fd)  # the server has inherited the lock
        if output is not None:
            raise ConfigError(self._what_to_do(output))
        logger.info("Triton ready at %s", self.url)

    def stuck_model(self) -> str | None:
        """Model that the server loads since ``STUCK_S``, as far as asked; None where there is none.

        Triton waits for ever for a model's process that was killed while it started, and never loads that model again:
        the server must be started anew. Whoever supervises it asks this every few seconds.
        """
        listed = ask(self.http_port, "/v2/repository/index", headers={control.KEY: self._secret}) or []
        loading = {row["name"] for row in listed if row.get("state") == "LOADING"}
        now = time.monotonic()
        self._loading_since = {model: self._loading_since.get(model, now) for model in loading}
        return next((model for model, since in self._loading_since.items() if now - since >= STUCK_S), None)

    def stop(self, timeout_s: float = 15.0) -> None:
        """Let answers under way finish, at most ``timeout_s``, then kill server and models."""
        process, self._process = self._process, None
        self._loading_since = {}
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("Triton did not stop within %g s: killed", timeout_s)
        _kill_group(process.pid)
        process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _fill_view(self) -> None:
        for model, why in View(self.view, self._repository).fill(self._settings).items():
            logger.warning("Triton starts without this %s: %s", model, why)

    def _lock(self, deadline: float) -> int:
        """Take the folder's lock and return its descriptor; a server that is about to end gets until ``deadline``."""
        fd = os.open(self._state / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                _end_orphans(fd)
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise ConfigError(
                        f"another Triton runs from {self._state}: use its address, or end it with `semwatch "
                        f"triton down --folder {self._made.folder}`"
                    ) from None
                time.sleep(_POLL_S)

    def _launch(self, lock_fd: int, deadline: float) -> str | None:
        """Start the server and wait for it; return its output where it ended instead."""
        asked = self._ports
        output = ""
        for _ in range(_PORT_TRIES if 0 in asked else 1):  # somebody may take a free port before the server
            self._ports = (asked[0] or child_server.free_port(), asked[1] or child_server.free_port())
            log_from = self._spawn(lock_fd)
            if self._wait_ready(deadline):
                return None
            hung = self.pid is not None
            self.stop(timeout_s=1.0)
            output = child_server.text_from(self.log, log_from)
            if hung:
                raise ServiceUnavailable(f"Triton was not ready within {self._timeout_s:g} s:\n{output[-2000:]}")
            if not (taken := _TAKEN.search(output)) or int(taken[1]) in asked:
                break
        self._ports = asked
        return output

    def _spawn(self, lock_fd: int) -> int:
        """Start the process; return where in the log its own lines begin."""
        self._sweep()
        executable = str(self._made.server / "bin" / "tritonserver")
        if self.log.exists() and self.log.stat().st_size > _MAX_LOG_BYTES:
            files.rename(self.log, self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log, control.gate() as gate:
            log_from = log.tell()
            self._process = subprocess.Popen(
                child_server.dying_with_us(*gate.command(executable), *self._options()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock_fd,),
                env={**self._variables(), **control.variables(self._secret)},
                start_new_session=True,  # the models' processes end with it; a Ctrl-C is for the daemon
            )
            os.ftruncate(lock_fd, 0)
            os.pwrite(lock_fd, str(self._process.pid).encode(), 0)
            try:
                gate.open_to(self._process, executable, self._secret)
            except ConfigError:
                self.stop(timeout_s=0.1)
                raise
        return log_from

    def _variables(self) -> dict[str, str]:
        """The server's environment: its models find their Python through ``PATH``."""
        path = f"{self._environment / 'bin'}:{os.environ.get('PATH', os.defpath)}"
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        kept.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # the networks run a tenth faster in huge pages
        return {**kept, "PATH": path, "LD_LIBRARY_PATH": self._made.library_path(), "PYTHONDONTWRITEBYTECODE": "1"}

    def _options(self) -> list[str]:
        view = View(self.view, self._repository)
        listen = {"grpc-address": "127.0.0.1", "grpc-port": self._ports[0]}
        listen |= {"http-address": "127.0.0.1", "http-port": self._ports[1], "allow-metrics": "false"}
        models = {
            "model-repository": self.view,
            "backend-directory": self._made.server / "backends",
            "model-control-mode": "explicit",
            "strict-readiness": "true",
            "exit-on-error": "false",
            # Else what is set per model (see config) does not hold; and without it, requests that are put together
            # while queues have timeouts starve a model bit by bit (triton-inference-server/server issue 8870).
            "rate-limit": "execution_count",
            "exit-timeout-secs": "10",
            "backend-config": f"python,shm-region-prefix-name={self._shm_prefix}",
        }
        loaded = [f"--load-model={model}" for model in MODELS if view.placed(model)]
        return [
            "--disable-auto-complete-config",
            *(f"--{name}={value}" for name, value in {**listen, **models}.items()),
            *control.options(self._secret),
            *loaded,
        ]

    def _wait_ready(self, deadline: float) -> bool:
        """Wait for our own child's answer; False where it ended or the deadline passed."""
        assert self._process is not None
        while self._process.poll() is None and time.monotonic() < deadline:
            # A stranger on our port answers too; then our child ends within a moment, and says why.
            if ask(self._ports[1], "/v2/health/live") is not None and self._listens():
                return True
            time.sleep(_POLL_S)
        return False

    def _listens(self) -> bool:
        """Whether both ports are our child's: Linux names the owner of a socket by its inode."""
        assert self._process is not None
        ours = _sockets_of(self._process.pid)
        return all(_listening_inodes(port) & ours for port in self._ports)

    @property
    def _shm_prefix(self) -> str:
        return f"semwatch-{hashlib.sha256(os.fsencode(self._state)).hexdigest()[:12]}-"

    def _sweep(self) -> None:
        """Delete shared memory that a killed server of this folder left behind; only while its lock is ours."""
        for left in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            left.unlink(missing_ok=True)

    def _what_to_do(self, output: str) -> str:
        if taken := _TAKEN.search(output):
            return f"port {taken[1]} on 127.0.0.1 is taken: name a free one, or 0 to have one picked"
        return f"Triton ended while it started; mend what it says (all of it is in {self.log}):\n{output[-2000:]}"


# --- small questions to the system -----------------------------------------------------------------------------------


def ask(port: int, path: str, *, headers: Mapping[str, str] | None = None) -> Any:
    """Answer of a server on loopback, from JSON, empty where it says nothing; None where it is not well.

    Args:
        port: HTTP port.
        path: of the question.
        headers: of a question that is posted; None: it is got.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        if headers is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, body=b"{}", headers=dict(headers))
        response = connection.getresponse()
        body = response.read()
        return (json.loads(body) if body else {}) if response.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        found |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rsplit(":", 1)[1], 16) == port}
    return found


def _sockets_of(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def _end_orphans(lock_fd: int) -> None:
    """Kill model processes that hold the lock of a server that was killed: they can hang on its shared memory."""
    try:
        pid = int(os.pread(lock_fd, 20, 0))
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ValueError:  # its server is not started yet
        return
    except OSError:
        state = "gone"
    if state in ("gone", "Z"):
        _kill_group(pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
