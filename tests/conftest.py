"""Fixtures: the real model repository that `make models` builds, and a tiny one for tests of the plumbing."""

import os
from pathlib import Path

import pytest

from semwatch import embedded_redis
from semwatch.errors import ConfigError
from semwatch.triton.setup import set_up

# Before torch and numpy are imported: on arrays as small as ours, a second thread only spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What the machine says to its terminals and services is not for ours: a test's output is plain and 80 columns wide.
for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "GITHUB_ACTIONS", "PY_COLORS", "NOTIFY_SOCKET",
             "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "TZ"):  # fmt: skip
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[1]

if server := os.environ.get("SEMWATCH_REDIS_SERVER"):  # another Redis or Valkey than the one in the wheel
    embedded_redis.find_executable = lambda: Path(server)


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
        set_up(folder)
    except ConfigError as error:
        if "could not install" in str(error) or "needs Python" in str(error):
            pytest.skip(f"Triton cannot be installed here: {error}")
        raise
    return folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``tiny_models.exporting_once`` keeps the files of this session."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory, exports: Path) -> Path:
    """Random weights, real formats, a few milliseconds an image."""
    from tiny_models import exporting_once, publish_all

    with exporting_once(exports):
        return publish_all(tmp_path_factory.mktemp("models"))
