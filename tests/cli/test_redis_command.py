"""`semwatch redis` in the foreground: it becomes the server, loses nothing, and says which setting is wrong."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from commands import spawn
from semwatch.errors import ConfigError
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.system import child_server


@contextmanager
def running(url: str, *argv: object) -> Iterator[tuple["subprocess.Popen[bytes]", redis.Redis]]:
    """The command as a process of its own, once its server answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "semwatch", "redis", *map(str, argv)],
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        with redis.Redis.from_url(url, protocol=2, socket_timeout=5, decode_responses=True) as client:
            deadline = time.monotonic() + 30
            while not answers(client):
                assert process.poll() is None, (process.stdout.read() if process.stdout else b"").decode()
                assert time.monotonic() < deadline, "no answer within 30 s"
                time.sleep(0.05)
            yield process, client
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def test_the_process_itself_becomes_a_server_that_loses_nothing(tmp_path: Path) -> None:
    port = child_server.free_port()
    with running(f"redis://127.0.0.1:{port}/0", "--folder", tmp_path / "data", "--port", port) as (process, client):
        assert client.info("server")["process_id"] == process.pid
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "bind": "127.0.0.1"}
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert all(at.laddr.ip == "127.0.0.1" for at in psutil.Process(process.pid).net_connections() if at.laddr)
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700

        client.set("k", "v")
        process.kill()
        process.wait(10)
    with running(f"redis://127.0.0.1:{port}/0", "--folder", tmp_path / "data", "--port", port) as (process, client):
        assert client.get("k") == "v"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_socket_is_open_to_its_group_and_nothing_else_listens(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with running(f"unix://{path}", "--folder", tmp_path / "data", "--socket", path) as (process, _):
        assert stat.S_IMODE(path.stat().st_mode) == 0o770
        assert not [at for at in psutil.Process(process.pid).net_connections("inet") if at.status == "LISTEN"]
        with pytest.raises(ConfigError, match="another redis-server uses"):  # it still holds the folder's lock
            EmbeddedRedis(tmp_path / "data", timeout_s=0.2).start()


def test_taken_port_ends_as_a_wrong_setting_so_that_systemd_does_not_try_for_ever(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = spawn("redis", "--folder", tmp_path / "data", "--port", taken.getsockname()[1], cwd=tmp_path)
    assert said.code == 2
    assert "is taken" in said.words
    assert "name a free one" in said.words


def test_port_and_socket_together_are_refused(tmp_path: Path) -> None:
    said = spawn("redis", "--folder", "data", "--port", "7001", "--socket", "s", cwd=tmp_path)
    assert said.code == 2
    assert "not both" in said.words
    assert not (tmp_path / "data").exists()


def test_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = spawn("redis", "--folder", "file/data", "--port", child_server.free_port(), cwd=tmp_path)
    assert said.code == 2
    assert "file/data" in said.words
