"""`semwatch triton serve` in the foreground, as systemd sees it: ready, alive, dead, hung, stopped."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from commands import spawn
from semwatch.system import child_server
from semwatch.triton.client import Triton


@pytest.fixture(scope="module")
def folder(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this file's own around the one installation of the checkout."""
    made = tmp_path_factory.mktemp("triton")
    (made / "venv").symlink_to(installed / "venv")
    return made


class Served:
    """The command as a process, and systemd's end of the notify socket."""

    def __init__(self, folder: Path, repository: Path, view: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"semwatch-serve-{os.getpid()}-{time.monotonic_ns()}"
        self._socket.bind(f"\0{address}")
        self.port = child_server.free_port()
        arguments = ["--folder", folder, "--repository", repository, "--view", view, "--threads", 1]
        ports = ["--grpc-port", self.port, "--http-port", child_server.free_port()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "semwatch", "triton", "serve", *map(str, [*arguments, *ports])],
            env={**os.environ, "NOTIFY_SOCKET": f"@{address}", "WATCHDOG_USEC": "1000000"},
            stderr=subprocess.PIPE,
        )

    def wait_for(self, notice: str, timeout_s: float = 40) -> None:
        deadline = time.monotonic() + timeout_s
        while notice not in self.notices():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"no {notice} within {timeout_s:g} s"

    def notices(self, timeout_s: float = 0.2) -> str:
        self._socket.settimeout(timeout_s)
        try:
            return self._socket.recv(4096).decode()
        except TimeoutError:
            return ""

    def forget(self) -> None:
        """Drop the notices that were sent so far."""
        while self.notices(0.01):
            pass

    @property
    def server(self) -> psutil.Process:
        (server,) = (p for p in psutil.Process(self.process.pid).children() if p.name() == "tritonserver")
        return server

    def said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def end(self) -> None:
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in family:
                child.kill()
        self.process.communicate(timeout=10)
        self._socket.close()


@pytest.fixture
def served(folder: Path, tiny_repository: Path, tmp_path: Path) -> Iterator[Served]:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    made = Served(folder, repository, tmp_path / "view")
    try:
        yield made
    finally:
        made.end()


def test_ready_means_that_it_answers_and_sigterm_ends_server_and_models(served: Served, tmp_path: Path) -> None:
    served.wait_for("READY=1")
    with Triton(tmp_path / "models", url=f"127.0.0.1:{served.port}", view=tmp_path / "view", timeout_s=5) as models:
        assert models.versions().keys() == {"detector", "encoder", "head"}
    served.wait_for("WATCHDOG=1")
    served.wait_for(f"STATUS=answers at 127.0.0.1:{served.port}")
    family = psutil.Process(served.process.pid).children(recursive=True)
    start = time.monotonic()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(20) == 0, served.said()
    assert time.monotonic() - start < 20
    psutil.wait_procs(family, timeout=5)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_server_that_dies_ends_the_command_so_that_systemd_starts_it_again(served: Served) -> None:
    served.wait_for("READY=1")
    served.server.kill()
    assert served.process.wait(20) == 4
    assert "Triton died" in served.said()


def test_server_that_hangs_feeds_the_watchdog_no_more(served: Served) -> None:
    served.wait_for("READY=1")
    served.wait_for("WATCHDOG=1")
    served.server.suspend()
    time.sleep(1.2)  # an answer may be under way
    served.forget()
    heard = [served.notices(0.3) for _ in range(10)]
    assert not any("WATCHDOG" in notice for notice in heard)
    assert any("does not answer" in notice for notice in heard)
    served.server.resume()
    served.wait_for("WATCHDOG=1")


def test_folder_without_an_installation_is_a_wrong_setting(tmp_path: Path, tiny_repository: Path) -> None:
    said = spawn("triton", "serve", "--folder", "nowhere", "--repository", tiny_repository, cwd=tmp_path)
    assert said.code == 2
    assert "semwatch triton setup" in said.words
