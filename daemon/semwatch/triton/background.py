"""A Triton server in the background of this machine, started again when it dies: ``semwatch triton up|down|status``.

<folder>/triton.json        who supervises it, where it listens, how often it was started again
<folder>/supervisor.log     what the supervisor says
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.models.model_repository import MODELS
from semwatch.system import child_server, files
from semwatch.system.clock import utc_now
from semwatch.triton.server import START_TIMEOUT_S, LocalTriton, ask
from semwatch.triton.setup import Installation
from semwatch.triton.view import Settings

logger = logging.getLogger(__name__)

GRPC_PORT, HTTP_PORT = 8001, 8000
MAX_RESTARTS, RESTART_WINDOW_S = 5, 600.0
"""A server that died more often in that time is not started again."""

_STATE, _LOG = "triton.json", "supervisor.log"
_POLL_S = 0.05
_LOOK_S = 5.0
_PAUSE_S = 5.0
"""Longest pause before a server is started again."""


def up(
    folder: Path,
    repository: Path,
    *,
    grpc_port: int = GRPC_PORT,
    http_port: int = HTTP_PORT,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    control_secret_file: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> dict[str, Any]:
    """Start a supervised server in the background and wait until it answers; return its ``status``.

    Raises:
        ConfigError: it runs already, is not set up, or cannot start, with what it said.
        ServiceUnavailable: not ready within ``timeout_s``.
    """
    if status(folder)["running"]:
        raise ConfigError(f"a Triton runs already from {folder}; `semwatch triton down` ends it")
    if not Installation(folder.absolute()).is_current(settings.target):
        raise ConfigError(
            f"no Triton in {folder}: `semwatch triton setup --folder {folder} --target {settings.target}` installs it"
        )
    options: dict[str, object] = {"grpc_port": grpc_port, "http_port": http_port, "timeout_s": timeout_s}
    options["settings"] = settings.model_dump_json()
    arguments = {"folder": str(folder.absolute()), "repository": str(repository.absolute()), **options}
    if control_secret_file is not None:
        arguments["control_secret_file"] = str(control_secret_file.absolute())
    (folder / _STATE).unlink(missing_ok=True)
    with (folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "semwatch.triton.background", json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s + 5
    while time.monotonic() < deadline and process.poll() is None:
        now = status(folder)
        if now["ready"]:
            process.returncode = 0  # it stays when we end: nobody here waits for it
            return now
        time.sleep(_POLL_S)
    is_hung = process.poll() is None
    if is_hung:
        _end(process.pid, timeout_s=5)
    output = child_server.text_from(folder / _LOG, 0, limit=2000)
    raise (ServiceUnavailable if is_hung else ConfigError)(output or f"Triton was not ready within {timeout_s:g} s")


def down(folder: Path, *, timeout_s: float = 30.0) -> bool:
    """End the server in the background; False where none ran.

    Raises:
        ServiceUnavailable: it did not end.
    """
    now = status(folder)
    if not now["running"]:
        return False
    if not _end(now["pid"], timeout_s=timeout_s):
        raise ServiceUnavailable(f"the Triton of {folder} (process {now['pid']}) does not end; kill it")
    return True


def status(folder: Path) -> dict[str, Any]:
    """How the server in the background stands; the keys are always the same, None where nothing is known."""
    empty = dict.fromkeys(("pid", "server_pid", "grpc_port", "http_port", "repository", "restarts", "last_end"))
    try:
        state = {**empty, **json.loads((folder / _STATE).read_bytes())}
        running = bool(_is_supervisor(int(state["pid"])))
    except (OSError, ValueError, TypeError):
        return {"running": False, "ready": False, **empty, "models": {}}
    if not running:
        return {"running": False, "ready": False, **state, "models": {}}
    models = {model: _versions(int(state["http_port"]), model) for model in MODELS}
    ready = ask(int(state["http_port"]), "/v2/health/live") is not None and state["server_pid"] is not None
    return {"running": True, "ready": ready, **state, "models": models}


def supervise(server: LocalTriton, folder: Path, repository: Path) -> None:
    """Keep a server running until SIGTERM: one that died is started again, later each time, not without end.

    Raises:
        ConfigError, ServiceUnavailable: it cannot start, cannot start again for ``RESTART_WINDOW_S``, or died more than
            ``MAX_RESTARTS`` times in that time.
    """
    is_asked_to_stop = False

    def stop(*_: object) -> None:
        nonlocal is_asked_to_stop
        is_asked_to_stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    deaths: list[float] = []
    state: dict[str, object] = {"pid": os.getpid(), "repository": str(repository), "restarts": 0, "last_end": None}
    try:
        server.start()
        while not is_asked_to_stop:
            state |= {"server_pid": server.pid, "grpc_port": _port(server.url), "http_port": server.http_port}
            files.write_whole(folder / _STATE, json.dumps(state).encode())
            _watch(server, lambda: is_asked_to_stop)
            if is_asked_to_stop:
                break
            now = time.monotonic()
            deaths = [at for at in deaths if now - at < RESTART_WINDOW_S] + [now]
            state |= {"restarts": len(deaths), "last_end": utc_now()}
            logger.error("Triton died; death %d of %d that are mended", len(deaths), MAX_RESTARTS)
            if len(deaths) > MAX_RESTARTS:
                raise ServiceUnavailable(f"Triton died {len(deaths)} times in a row; its log is {server.log}")
            server.stop(timeout_s=1)  # its models' processes and their memory
            time.sleep(min(0.2 * 2 ** (len(deaths) - 1), _PAUSE_S))
            _start_again(server, lambda: is_asked_to_stop)
    finally:
        server.stop()
        (folder / _STATE).unlink(missing_ok=True)


def _watch(server: LocalTriton, is_asked_to_stop: Callable[[], bool]) -> None:
    """Return once the server died, can never load a model again, or shall stop."""
    next_look = 0.0
    while server.pid is not None and not is_asked_to_stop():
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + _LOOK_S
            if model := server.stuck_model():
                logger.error("Triton can load %s no more: it is ended", model)
                return
        time.sleep(_POLL_S)


def _start_again(server: LocalTriton, is_asked_to_stop: Callable[[], bool]) -> None:
    """Start a server that ran before; what is in its way now, such as its port taken by another, may go away."""
    deadline = time.monotonic() + RESTART_WINDOW_S
    while not is_asked_to_stop():
        try:
            return server.start()
        except (ConfigError, ServiceUnavailable) as error:
            if time.monotonic() > deadline:
                raise
            logger.error("Triton cannot start again, next try in %g s: %s", _PAUSE_S, error)
        next_try = time.monotonic() + _PAUSE_S
        while time.monotonic() < next_try and not is_asked_to_stop():
            time.sleep(_POLL_S)
    return None


def main(arguments: str) -> None:
    """Supervise the server that ``up`` asked for."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    asked = json.loads(arguments)
    folder, repository = Path(asked.pop("folder")), Path(asked.pop("repository"))
    asked["settings"] = Settings.model_validate_json(asked["settings"])
    if secret_file := asked.pop("control_secret_file", None):
        asked["control_secret_file"] = Path(secret_file)
    try:
        supervise(LocalTriton(folder, repository, **asked), folder, repository)
    except (ConfigError, ServiceUnavailable) as error:
        sys.exit(str(error))


def _versions(http_port: int, model: str) -> list[int]:
    """Versions of a model that are ready."""
    answer = ask(http_port, f"/v2/models/{model}")
    return sorted(int(version) for version in answer.get("versions", ())) if answer else []


def _is_supervisor(pid: int) -> bool:
    """Whether this process is ours: ids are given again after a restart of the machine."""
    try:
        return b"semwatch.triton.background" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _end(pid: int, *, timeout_s: float) -> bool:
    """Ask a supervisor to end, and wait; False where it did not."""
    deadline = time.monotonic() + timeout_s
    try:
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            try:
                os.waitpid(pid, os.WNOHANG)  # where it is our own child
            except ChildProcessError:
                os.kill(pid, 0)
            if not _is_supervisor(pid):
                return True
            time.sleep(_POLL_S)
    except ProcessLookupError:
        return True
    return False


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


if __name__ == "__main__":
    main(sys.argv[1])
