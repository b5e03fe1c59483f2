"""Checkpoints and curves of a training run: written whole; a run is resumed only with the same settings."""

import csv
import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from semwatch.errors import ConfigError
from semwatch.system import files


def write(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a run's state beside its settings, whole."""
    files.make_folder(path.parent)
    with files.writing(path) as file:
        torch.save({**state, "settings": settings}, file)


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what ``write`` wrote; None where there is nothing yet.

    Raises:
        ConfigError: it cannot be read, or belongs to a run with other settings.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{path} is no checkpoint that can be read; remove it") from error
    if state.get("settings") != settings:
        raise ConfigError(f"{path} was written by a run with other settings; remove it or give another --out")
    return state


def write_curve(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write a training curve as CSV, one row per entry."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]))
    writer.writeheader()
    writer.writerows(curve)
    files.write_whole(path, text.getvalue().encode())
