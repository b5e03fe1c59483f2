"""Families of heads: whose logits stand beside the p-values that are the same for all.

A head's family is in its weights file and in the ``meta.json`` of its version, so that what is fitted after it is of
the same family unless somebody asks for another.
"""

from pathlib import Path
from types import MappingProxyType
from typing import get_args

from semwatch.errors import ConfigError
from semwatch.models.model_repository import Meta
from semwatch_training.discovery import head as heads
from semwatch_training.discovery.fit_head import FitClassifier
from semwatch_training.discovery.head import LINEAR, Head
from semwatch_training.families.recame import classifier as recame
from semwatch_training.families.recame.classifier import Recame
from semwatch_training.families.recame.export import regions_of
from semwatch_training.families.recame.fit_recame import Schedule
from semwatch_training.system.defaults import HeadFamily

RECAME = recame.FAMILY
FAMILY_KEY = "head_family"
"""In the provenance of a published head."""


def classify(family: str, encoder: Meta, *, seed: int) -> FitClassifier | None:
    """What fits the logits of a family on the features of an encoder; None: the regression of ``fit_head``.

    Raises:
        ConfigError: this release has no such family.
    """
    if family not in get_args(HeadFamily):
        raise ConfigError(f"there is no family of heads {family!r}; choose from {', '.join(get_args(HeadFamily))}")
    if family == LINEAR:
        return None
    return Recame(regions_of(encoder.provenance), schedule=Schedule(seed=seed))


def provenance_of(head: Head) -> dict[str, str | float | int]:
    """What ``family_of`` reads."""
    return {} if head.family == LINEAR else {FAMILY_KEY: head.family}


def family_of(head: Meta) -> str:
    """The family of a published head; those of earlier releases are linear."""
    return str(head.provenance.get(FAMILY_KEY, LINEAR))


def load_head(path: Path) -> tuple[Head, str, dict[str, str | float | int]]:
    """Read a head of any family, see ``discovery.head.load_head``."""
    return heads.load_head(path, MappingProxyType({recame.FAMILY: recame.read}))
