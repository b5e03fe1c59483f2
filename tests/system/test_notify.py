"""Messages to a real datagram socket, as systemd opens one."""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from semwatch.system.notify import SEND_TIMEOUT_S, Notifier, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A bound socket, and what NOTIFY_SOCKET says of it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@semwatch-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0", 1) if request.param == "abstract" else address)
        receiver.settimeout(5)
        yield receiver, address


def test_without_systemd_no_socket_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "socket")
    for environ in ({}, {"NOTIFY_SOCKET": ""}):
        notifier = Notifier(environ)
        notifier.ready()
        notifier.status("idle")
        notifier.watchdog()
        notifier.stopping()


def test_every_message_is_one_datagram_in_systemds_words(systemd: tuple[socket.socket, str]) -> None:
    receiver, address = systemd
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready()
    notifier.status("3 in flight, 17 waiting")
    notifier.watchdog()
    notifier.stopping()
    got = [receiver.recv(4096) for _ in range(4)]
    assert got == [b"READY=1", b"STATUS=3 in flight, 17 waiting", b"WATCHDOG=1", b"STOPPING=1"]


def test_status_is_one_line_and_cannot_smuggle_a_message(systemd: tuple[socket.socket, str]) -> None:
    receiver, address = systemd
    Notifier({"NOTIFY_SOCKET": address}).status("lot µ7\nSTOPPING=1\r\n\tend")
    assert receiver.recv(4096) == "STATUS=lot µ7 STOPPING=1 end".encode()


def test_status_with_an_undecodable_file_name_is_sent_all_the_same(systemd: tuple[socket.socket, str]) -> None:
    receiver, address = systemd
    Notifier({"NOTIFY_SOCKET": address}).status("bad\udcff.tif")
    assert receiver.recv(4096) == b"STATUS=bad?.tif"


def test_environment_is_read_once(systemd: tuple[socket.socket, str]) -> None:
    receiver, address = systemd
    environ = {"NOTIFY_SOCKET": address}
    notifier = Notifier(environ)
    environ.clear()
    notifier.ready()
    assert receiver.recv(4096) == b"READY=1"


@pytest.mark.parametrize(
    "address", ["/nowhere/notify", "@nobody-listens-here", "relative", "vsock:2:1234", "/" + "x" * 200]
)
def test_socket_that_is_not_there_never_raises(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address}).watchdog()


def test_socket_that_vanishes_never_raises_and_comes_back(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    notifier = Notifier({"NOTIFY_SOCKET": address})
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(address)
            receiver.settimeout(5)
            notifier.watchdog()
            assert receiver.recv(4096) == b"WATCHDOG=1"
        notifier.watchdog()  # closed, its name still there
        Path(address).unlink()
        notifier.watchdog()  # gone


def test_manager_that_does_not_read_holds_the_daemon_up_for_a_moment_only(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, suppress(BlockingIOError):
            filler.setblocking(False)
            for _ in range(100_000):  # until the queue is full
                filler.sendto(b"x", address)
        notifier = Notifier({"NOTIFY_SOCKET": address})
        start = time.monotonic()
        for _ in range(100):
            notifier.watchdog()
            notifier.status("busy")
        assert time.monotonic() - start < SEND_TIMEOUT_S
        start = time.monotonic()
        notifier.ready()  # said once, so it waits a moment
        assert SEND_TIMEOUT_S * 0.5 < time.monotonic() - start < SEND_TIMEOUT_S + 3


def test_watchdog_is_off_without_its_variable() -> None:
    assert watchdog_interval_s({}) is None


@pytest.mark.parametrize("usec", ["", "0", "-1", "x", "1.5", "²"])
def test_watchdog_time_that_is_none_switches_it_off(usec: str) -> None:
    assert watchdog_interval_s({"WATCHDOG_USEC": usec}) is None


def test_watchdog_interval_is_half_of_systemds_time() -> None:
    assert watchdog_interval_s({"WATCHDOG_USEC": "30000000"}) == 15.0


def test_watchdog_is_for_the_named_process_only() -> None:
    environ = {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}
    assert watchdog_interval_s(environ) == 1.0
    assert watchdog_interval_s(environ, pid=os.getpid() + 1) is None
    assert watchdog_interval_s(environ | {"WATCHDOG_PID": "77"}, pid=77) == 1.0
    assert watchdog_interval_s(environ | {"WATCHDOG_PID": ""}) is None
