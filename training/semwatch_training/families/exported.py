"""What a family hands to publishing: a network under its contract; and how a family is found by its name."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn

from semwatch.errors import ConfigError
from semwatch.models.model_repository import Meta
from semwatch_training import families
from semwatch_training.system import weights_file
from semwatch_training.trunks.backbone import Backbones

Provenance = Mapping[str, str | float | int]


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A network ready to be exported and published."""

    graph: nn.Module
    """In evaluation mode; takes the inputs of ``meta`` in their order and returns its outputs in theirs."""
    meta: Meta
    """Role, inputs, outputs, a detector's normal scores, provenance."""
    form: str = ""
    """Of an encoder: everything that its features depend on; a head is tied to it."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Published beside it, by name: what making another of it takes, without a network."""


class Export(Protocol):
    """The module ``export`` of a family."""

    def read(self, path: Path | None, backbones: Backbones) -> Exported:
        """Build the network of a weights file; None: of the trunks alone, where the family can do without.

        Raises:
            ConfigError: the file is absent, is not one of this family, or belongs to other trunks.
        """


class EncoderExport(Export, Protocol):
    """The module ``export`` of a family of encoders."""

    def form_of(self, provenance: Provenance) -> str:
        """The form, as this release would build it, of an encoder that was published with this provenance."""


def export_of(name: str) -> Export:
    """The module ``export`` of a family.

    Raises:
        ConfigError: this release has no such family.
    """
    known = sorted(path.parent.name for folder in families.__path__ for path in Path(folder).glob("*/export.py"))
    if name not in known:
        raise ConfigError(f"there is no model family {name!r} in this release; it has {', '.join(known)}")
    return cast(Export, importlib.import_module(f"{families.__name__}.{name}.export"))


def family_of(path: Path, *, otherwise: str) -> str:
    """The family that a weights file names in its header; ``otherwise`` where it was written before there were names.

    Of a file that cannot be read too: the family's own reader says what is wrong with it.
    """
    return weights_file.read_header(path).get("family", otherwise)


def flat(form: Mapping[str, Any]) -> dict[str, str | float | int]:
    """A form's fields as plain provenance values."""
    return {key: value if isinstance(value, str | float | int) else str(value) for key, value in form.items()}
