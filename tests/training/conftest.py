"""Torch as every test of the learning package has it."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On networks as small as ours, a second thread only spins."""
    torch.set_num_threads(1)
