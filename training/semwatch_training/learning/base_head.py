"""The head in service, which a cycle starts from: its version, its bank and its golden set."""

from dataclasses import dataclass
from pathlib import Path

from semwatch.errors import ConfigError
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Meta


@dataclass(frozen=True, slots=True, eq=False)
class BaseHead:
    """The head in service with its bank and golden set."""

    version: int
    meta: Meta
    bank: Bank
    golden: Bank
    frozen_width: int
    """Leading features that p-values may read, from the encoder's ``meta.json``."""


def read_base_head(repository: Path, models: Embedded) -> BaseHead:
    """Read the head in service with its bank and golden set.

    Raises:
        ModelMismatch: it brings no bank or no golden set, or a damaged one.
        ConfigError: the encoder's ``meta.json`` names no width of its frozen features.
    """
    version, meta = models.versions()["head"], models.meta("head")
    folder = repository / "head" / str(version)
    frozen_width = models.meta("encoder").provenance.get("frozen_width")
    if not isinstance(frozen_width, int):
        raise ConfigError("the encoder's meta.json names no frozen_width; build the model repository again")
    bank, golden = (head_bank.read(folder / name) for name in (head_bank.BANK, head_bank.GOLDEN))
    return BaseHead(version, meta, bank, golden, frozen_width)
