"""Trained weights on disk: a safetensors file, tensors and a text header, written whole; nothing in it executes."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from semwatch.errors import ConfigError
from semwatch.system import files


def write(path: Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and header, whole."""
    files.make_folder(path.parent)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    files.write_whole(path, safetensors_torch.save(tensors, metadata=dict(header)))


def read(path: Path, *, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors (fp32) and header; ``what`` ("detector", "head") is the command that makes such a file.

    Raises:
        ConfigError: the file is absent or no safetensors file.
    """
    if not path.is_file():
        raise ConfigError(f"no {what} weights at {path}; make some with `semwatch-train {what}`, or name others")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise not_ours(path, what, error) from error


def read_header(path: Path) -> dict[str, str]:
    """Read the header alone; empty where there is no file, or it is no safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def not_ours(path: Path, what: str, error: Exception) -> ConfigError:
    """The refusal of a file that is not what it should be."""
    return ConfigError(f"{path} holds no {what} of this release ({error}); give what `semwatch-train {what}` wrote")
