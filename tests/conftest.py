"""Fixtures of every room: model repositories, real and tiny; a Redis server; the command line in this process."""

import os

# Before numpy and torch are imported, here or below: on arrays as small as ours, a second thread only spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import io
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import redis

import export_cache
from commands import Command, in_process
from paths import ROOT
from semwatch.errors import ConfigError
from semwatch.streams import embedded_redis
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.unknowns import Publisher, connect
from semwatch.triton.setup import set_up

# What the machine says to its terminals and services is not for ours: a test's output is plain and 80 columns wide.
for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "GITHUB_ACTIONS", "PY_COLORS", "NOTIFY_SOCKET",
             "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "TZ"):  # fmt: skip
    os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Spell out names that are no UTF-8 in what a test has logged: workers send their reports as text."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


if redis_server := os.environ.get("SEMWATCH_REDIS_SERVER"):  # another Redis or Valkey than the one in the wheel
    embedded_redis.find_executable = lambda: Path(redis_server)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The model repository with the real backbone."""
    folder = Path(os.environ.get("SEMWATCH_REPOSITORY", ROOT / "model_repository"))
    if not (folder / "head").is_dir() or not any((folder / "head").glob("[0-9]*")):
        pytest.fail(f"no models in {folder}: run `make models` first")
    return folder


@pytest.fixture(scope="session")
def data() -> Path:
    """Public images beside the checkout; tests that need them skip where they are absent."""
    folder = Path(os.environ.get("SEMWATCH_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no public images in {folder}")
    return folder


@pytest.fixture(scope="session")
def installed() -> Path:
    """Triton's server, installed once for this checkout."""
    folder = ROOT / ".cache" / "triton"
    try:
        with export_cache.locked(folder.with_suffix(".lock")):
            set_up(folder)
    except ConfigError as error:
        if "could not install" in str(error) or "needs Python" in str(error):
            pytest.skip(f"Triton cannot be installed here: {error}")
        raise
    return folder


@pytest.fixture(scope="session")
def exports() -> Path:
    """Where ``tiny_models.exporting_once`` keeps its files, from one run to the next."""
    return export_cache.opened()


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory, exports: Path) -> Path:
    """Random weights, real formats, a few milliseconds an image."""
    from tiny_models import exporting_once, publish_all

    with exporting_once(exports):
        return publish_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """A Redis server of this file's own, on a socket in its folder."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """The server, empty, and up again if the test before killed it."""
    server.start()
    with connect(server.url, timeout_s=2) as made:
        made.flushall()
        yield made


@pytest.fixture
def publisher(client: redis.Redis) -> Publisher:
    """Of the empty server."""
    return Publisher(client)


@pytest.fixture
def semwatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """``semwatch ARGV...`` in this process, with nobody there to be asked."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return in_process(capsys, monkeypatch)
