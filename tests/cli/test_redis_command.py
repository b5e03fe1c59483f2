"""`semwatch redis` in the foreground: it becomes the server, loses nothing, and says which setting is wrong."""

import hashlib
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
from factories import make_review, make_verdict, messages
from semwatch.errors import ConfigError
from semwatch.streams import queues, records, unknowns
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.unknowns import Consumer, Publisher
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
    port, secret = child_server.free_port(), "0123456789abcdef"
    (tmp_path / "password").write_text(f"{secret}\n")
    argv = ("--folder", tmp_path / "data", "--port", port, "--password-file", tmp_path / "password")
    url = f"redis://:{secret}@127.0.0.1:{port}/0"
    with running(url, *argv) as (process, client):
        assert client.info("server")["process_id"] == process.pid
        assert client.info("persistence")["aof_enabled"] == 1
        assert client.info("memory")["maxmemory_policy"] == "noeviction"
        line = " ".join(psutil.Process(process.pid).cmdline())
        assert secret not in line
        assert hashlib.sha256(secret.encode()).hexdigest() not in line
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert all(at.laddr.ip == "127.0.0.1" for at in psutil.Process(process.pid).net_connections() if at.laddr)
        assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700

        client.set("k", "v")
        process.kill()
        process.wait(10)
    with running(url, *argv) as (process, client):
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
        (tmp_path / "password").write_text("x" * 16)
        port = ("--port", taken.getsockname()[1], "--password-file", "password")
        said = spawn("redis", "--folder", tmp_path / "data", *port, cwd=tmp_path)
    assert said.code == 2
    assert "is taken" in said.words
    assert "name a free one" in said.words


def test_a_port_without_a_password_lets_anybody_in_and_is_refused(tmp_path: Path) -> None:
    said = spawn("redis", "--folder", "data", "--port", child_server.free_port(), cwd=tmp_path)
    assert said.code == 2
    assert "--password-file" in said.words
    (tmp_path / "short").write_text("guess\n")
    said = spawn("redis", "--folder", "data", "--password-file", "short", cwd=tmp_path)
    assert said.code == 2
    assert "5 characters" in said.words
    assert not (tmp_path / "data").exists()


def test_clients_of_the_service_work_on_data_and_on_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "data" / "redis.sock"  # where it listens by default
    with running(f"unix://{path}", "--folder", tmp_path / "data") as (_, client):
        for command in (
            "CONFIG SET dir /tmp", "MODULE LIST", "DEBUG SLEEP 0", "REPLICAOF 127.0.0.1 1", "SHUTDOWN NOSAVE", "SAVE",
            "SCRIPT FLUSH", "ACL LIST", "FLUSHALL", "KEYS *", "MONITOR", "CLIENT KILL 127.0.0.1:1",
            "MIGRATE 127.0.0.1 1 k 0 1",
        ):  # fmt: skip
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
    with running(f"unix://{path}", "--folder", tmp_path / "data"), unknowns.connect(f"unix://{path}") as mine:
        found = [
            one for one in messages(make_review(3, verdicts=[make_verdict("unknown")])) if one[0] == records.UNKNOWNS
        ]
        consumer = Consumer(mine, records.UNKNOWNS, records.decode, name="a")
        Publisher(mine).publish(found)
        Publisher(mine).depths()
        first, second, third = consumer.claim(3, min_idle_s=60)
        assert consumer.give_back([first]) == consumer.ack([second]) == 1
        assert consumer.dead_letter(third, "why")
        assert consumer.requeue_dead() == 1
        assert queues.stats(mine, records.UNKNOWNS).length == 2


def test_port_and_socket_together_are_refused(tmp_path: Path) -> None:
    said = spawn("redis", "--folder", "data", "--port", "7001", "--socket", "s", cwd=tmp_path)
    assert said.code == 2
    assert "not both" in said.words
    assert not (tmp_path / "data").exists()


def test_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = spawn("redis", "--folder", "file/data", cwd=tmp_path)
    assert said.code == 2
    assert "file/data" in said.words
