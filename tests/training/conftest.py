"""Torch as every test of the learning package has it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiny_models import exporting_once


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On networks as small as ours, a second thread only spins."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def exporting(exports: Path) -> Iterator[None]:
    """Each network is exported once, in all runs on the same sources."""
    with exporting_once(exports):
        yield
