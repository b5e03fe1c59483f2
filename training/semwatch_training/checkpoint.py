"""Checkpoints of a training run: written whole, and resumed only by a run with the same settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from semwatch.errors import ConfigError
from semwatch_training import weights_file


def write(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a run's state beside its settings, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({**state, "settings": settings}, partial)
    weights_file.place(partial, path)


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what ``write`` wrote; None where there is nothing yet.

    Raises:
        ConfigError: it belongs to a run with other settings.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("settings") != settings:
        raise ConfigError(f"{path} was written by a run with other settings; remove it or give another --out")
    return state
