"""Real Triton servers with tiny networks."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from semwatch.triton.client import Triton
from semwatch.triton.server import LocalTriton
from triton_server import running


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """Tiny models of a test's own."""
    return shutil.copytree(tiny_repository, tmp_path / "models")


@pytest.fixture
def server(installed: Path, repository: Path) -> Iterator[LocalTriton]:
    """A Triton of a test's own."""
    with running(installed, repository) as server:
        yield server


@pytest.fixture
def models(server: LocalTriton, repository: Path) -> Iterator[Triton]:
    """Its client."""
    with Triton(repository, url=server.url, timeout_s=5) as models:
        yield models


@pytest.fixture(scope="module")
def shared_server(
    installed: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalTriton, Path]]:
    """One Triton for the tests of a file that publish nothing, and its model repository."""
    repository = shutil.copytree(tiny_repository, tmp_path_factory.mktemp("shared") / "models")
    with running(installed, repository) as server:
        yield server, repository


@pytest.fixture
def lent(shared_server: tuple[LocalTriton, Path]) -> tuple[LocalTriton, Path]:
    """The shared Triton for a test that disturbs it; up again if the one before ended it."""
    shared_server[0].start()
    return shared_server


@pytest.fixture
def shared(lent: tuple[LocalTriton, Path]) -> tuple[str, Path]:
    """The shared Triton for a test that only asks: its address, and its model repository."""
    return lent[0].url, lent[1]
