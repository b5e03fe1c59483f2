"""Checkpoints: absent, read back, refused."""

from pathlib import Path

import pytest
import torch

from semwatch.errors import ConfigError
from semwatch_training.system import checkpoint

SETTINGS = {"epochs": 2, "form": {"layers": (0, 1)}}


def test_no_checkpoint_is_no_state(tmp_path: Path) -> None:
    assert checkpoint.read(tmp_path / "none" / "checkpoint.pt", SETTINGS) is None


def test_a_run_with_equal_settings_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write(path, SETTINGS, {"epoch": 1, "weight": torch.arange(3)})
    checkpoint.write(path, SETTINGS, {"epoch": 2, "weight": torch.arange(4)})
    state = checkpoint.read(path, {"form": {"layers": (0, 1)}, "epochs": 2})
    assert state is not None
    assert state["epoch"] == 2
    assert state["weight"].tolist() == [0, 1, 2, 3]
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("other", [{}, {**SETTINGS, "epochs": 3}, {**SETTINGS, "form": {"layers": (0, 2)}}])
def test_a_run_with_other_settings_is_refused(tmp_path: Path, other: dict[str, object]) -> None:
    checkpoint.write(tmp_path / "checkpoint.pt", SETTINGS, {"epoch": 1})
    with pytest.raises(ConfigError, match="other settings; remove it"):
        checkpoint.read(tmp_path / "checkpoint.pt", other)
