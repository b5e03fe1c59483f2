"""The local Triton: set up from its wheel, started, ended, and loading models for those alone who know its secret."""

import http.client
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from semwatch.errors import ConfigError
from semwatch.models import model_repository
from semwatch.models.swap import Swap
from semwatch.triton import background as triton_background
from semwatch.triton import config as triton_config
from semwatch.triton import control
from semwatch.triton import setup as triton_setup
from semwatch.triton.client import Triton
from semwatch.triton.server import LocalTriton
from semwatch.triton.setup import set_up
from semwatch.triton.view import Settings
from triton_server import first_answer, first_swap, republish, rows, running, stranger

# --- set-up ----------------------------------------------------------------------------------------------------------


def test_folder_without_an_installation_says_how_to_make_one(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="semwatch triton setup"):
        LocalTriton(tmp_path, repository).start()
    with pytest.raises(ConfigError, match="semwatch triton setup"):
        triton_background.up(tmp_path, repository)
    assert triton_background.status(tmp_path)["running"] is False
    assert triton_background.down(tmp_path) is False


def test_set_up_that_was_done_is_not_done_again(installed: Path) -> None:
    start = time.monotonic()
    made = set_up(installed)
    assert time.monotonic() - start < 0.5
    assert made.is_current()
    assert not list((made.packages).glob("numpy-2*"))


STAND_IN = """#!/bin/sh
case "$2" in
venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
pip) echo "no index here" >&2; exit 1 ;;
esac
"""


def test_package_that_cannot_be_had_is_said_and_nothing_half_made_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Python that makes an environment in no time, and has no pip that works."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ConfigError, match=r"could not install nvidia-pytriton.*: no index here"):
        set_up(tmp_path / "new")
    assert (tmp_path / "new" / "venv" / "bin" / "python").is_file()
    assert not triton_setup.Installation(tmp_path / "new").is_current()


def test_python_without_wheels_of_the_server_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_setup, "_PYTHON", "3.13")
    with pytest.raises(ConfigError, match=r"needs Python 3\.11 or 3\.12, this is 3\.13: run it from one"):
        set_up(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(triton_setup._PYTHON not in triton_setup.PYTHONS, reason="no wheel of the server for this Python")
def test_index_out_of_reach_is_said_and_nothing_half_made_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="could not install nvidia-pytriton"):
        set_up(tmp_path / "new")
    assert not triton_setup.Installation(tmp_path / "new").is_current()


# --- who may load models ---------------------------------------------------------------------------------------------


def test_stranger_without_the_secret_may_ask_and_not_load(lent: tuple[LocalTriton, Path]) -> None:
    server, repository = lent
    with stranger(server.url) as other:
        assert other.is_model_ready("head", "1")
        for forbidden in (
            lambda: other.load_model("head"),
            lambda: other.unload_model("head"),
            lambda: other.load_model("head", headers={"triton-grpc-protocol-semwatch-control": "guessed"}),
            other.get_system_shared_memory_status,
            lambda: other.update_log_settings({"log_verbose_level": 1}),
            lambda: other.update_trace_settings(settings={"trace_level": "OFF"}),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                forbidden()
    for path in (
        "repository/index",
        "repository/models/head/unload",
        "systemsharedmemory/region/x/register",
        "logging",
    ):
        assert _posted(server.http_port, f"/v2/{path}") == 403
    with Triton(repository, url=server.url, timeout_s=5) as models:
        assert models.infer("head", rows()).version == 1


def test_secret_is_its_users_alone_new_at_each_start_and_not_in_the_command_line(
    server: LocalTriton, models: Triton, repository: Path
) -> None:
    path = control.beside(server.view)
    first = control.read(path)
    assert path.stat().st_mode & 0o777 == 0o600
    command_line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
    assert b"semwatch-control=xxxx" in command_line
    assert first.encode() not in command_line
    assert first not in server.log.read_text()
    server.stop(timeout_s=0.05)
    server.start()
    assert control.read(path) != first
    republish(repository)
    assert first_swap(models) == Swap("head", 2)  # the new secret is read, not the one of the start


def test_client_without_the_secret_is_told_so_and_serves_what_is_loaded(
    installed: Path, repository: Path, tmp_path: Path
) -> None:
    given = tmp_path / "secret"
    control.write_new(given)
    with running(installed, repository, control_secret_file=given) as server:
        assert not control.beside(server.view).exists()
        with Triton(repository, url=server.url) as models:
            republish(repository)
            assert models.refresh() is None
            assert models.infer("head", rows()).version == 1
        with pytest.raises(ConfigError, match=r"loads models only for those who know its secret.*control_secret_file"):
            Triton(repository, url=server.url)
        wrong = tmp_path / "wrong"
        control.write_new(wrong)
        with pytest.raises(ConfigError, match="holds another one"):
            Triton(repository, url=server.url, control_secret_file=wrong)
        with Triton(repository, url=server.url, control_secret_file=given) as models:
            assert models.versions()["head"] == 2


def test_secret_is_read_by_those_who_may_write_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    tmp_path.chmod(0o755)
    control.write_new(path)
    assert path.stat().st_mode & 0o777 == 0o600
    tmp_path.chmod(0o2770)
    os.chown(tmp_path, -1, os.getgid())
    control.write_new(path)
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_gid == tmp_path.stat().st_gid
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("text", ["", "short", "with space in the secret", "semi;colon=semi;colon=", "x" * 257])
def test_secret_that_no_option_can_carry_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ConfigError, match="16 to 256 letters"):
        control.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        control.read(tmp_path / "absent")


def _posted(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("POST", path, body=b"{}")
        return connection.getresponse().status
    finally:
        connection.close()


# --- start and end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["grpc_port", "http_port"])
def test_taken_port_is_named(installed: Path, repository: Path, which: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"),
            running(installed, repository, **{which: port}),
        ):
            pass


def test_second_server_of_one_folder_is_refused(lent: tuple[LocalTriton, Path]) -> None:
    server, repository = lent
    second = LocalTriton(server.log.parent, repository, timeout_s=0.3)
    with pytest.raises(ConfigError, match="another Triton runs"):
        second.start()
    assert server.pid is not None


def test_models_that_outlive_a_killed_server_do_not_keep_the_next_from_starting(
    server: LocalTriton, repository: Path
) -> None:
    assert server.pid is not None
    family = psutil.Process(server.pid)
    hanging = family.children()[0]
    hanging.suspend()  # as one that waits on the shared memory of the dead
    family.kill()
    family.wait(5)
    assert hanging.is_running()
    second = LocalTriton(server.log.parent, repository, settings=Settings(threads=1))
    try:
        second.start()
        assert second.pid is not None
    finally:
        second.stop(timeout_s=0.05)


def test_server_listens_on_this_machine_alone_and_leaves_nothing_behind(installed: Path, repository: Path) -> None:
    with running(installed, repository) as server:
        assert server.pid is not None
        process = psutil.Process(server.pid)
        listening = [
            c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN
        ]
        family = [process, *process.children(recursive=True)]
        assert set(listening) == {"127.0.0.1"}
        assert len(family) == 1 + len(model_repository.MODELS) * triton_config.INSTANCES
        server.stop()
        _, alive = psutil.wait_procs(family, timeout=3)
    assert alive == []


def test_background_server_is_mended_and_ends(installed: Path, repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "background"
    folder.mkdir()
    (folder / "venv").symlink_to(installed / "venv")
    now = triton_background.up(folder, repository, grpc_port=0, http_port=0, settings=Settings(threads=1))
    try:
        assert now["models"] == {"detector": [1], "encoder": [1], "head": [1]}
        with Triton(repository, url=f"127.0.0.1:{now['grpc_port']}") as models:
            with pytest.raises(ConfigError, match="runs already"):
                triton_background.up(folder, repository)
            os.kill(now["server_pid"], signal.SIGKILL)
            deadline = time.monotonic() + 15
            while triton_background.status(folder)["restarts"] != 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert first_answer(lambda: models.infer("head", rows())).version == 1
            assert triton_background.status(folder)["restarts"] == 1
    finally:
        assert triton_background.down(folder)
    assert triton_background.status(folder)["running"] is False


def test_supervisor_that_is_killed_takes_its_server_along(installed: Path, repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "background"
    folder.mkdir()
    (folder / "venv").symlink_to(installed / "venv")
    now = triton_background.up(folder, repository, grpc_port=0, http_port=0, settings=Settings(threads=1))
    family = [psutil.Process(now["server_pid"]), *psutil.Process(now["server_pid"]).children()]
    os.kill(now["pid"], signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    assert triton_background.status(folder)["running"] is False
