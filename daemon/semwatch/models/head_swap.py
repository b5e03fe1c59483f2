"""Which head serves: chosen at a start, exchanged while others answer, refused once. One rule for both runtimes.

Detector and encoder change only at a start: features of one encoder must not meet a head of another.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from semwatch.errors import ModelMismatch
from semwatch.models import choice, model_repository
from semwatch.models.checks import check_fit
from semwatch.models.model_repository import Meta

NO_VERSION = -1
"""Refused under this number: it is not known which head should serve."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Swap:
    """One change of version, done or refused."""

    model: str
    version: int
    refused: str | None = None
    """Why the version may not serve; None: it serves now."""


class HeadSwap:
    """The choice of the head, and what was refused.

    Args:
        repository: the model repository.
        pins: version by model; a model without a pin serves what ``choice`` says.
    """

    def __init__(self, repository: Path, pins: Mapping[str, int | None]) -> None:
        self._repository, self._pins = repository, pins
        self._refused: dict[int, str] = {}

    def wanted(self, model: str) -> int:
        """The version of a model that should serve.

        Raises:
            ModelMismatch: there is none, or the pinned one is absent.
        """
        pin = self._pins.get(model)
        return choice.choice(self._repository, model) if pin is None else pin

    def refused(self) -> dict[int, str]:
        """Versions of the head that could not be used, and why."""
        return dict(self._refused)

    def first(self, load: Callable[[int], T], encoder: Meta | None) -> T:
        """The head that should serve; where it cannot and nobody pinned it, the newest before it that can.

        Args:
            load: makes a version ready to answer, or raises ModelMismatch.
            encoder: whose features it must read; None: nobody asks.

        Raises:
            ModelMismatch: none can; why the wanted one cannot.
        """
        wanted, *deputies = choice.to_try(self._repository, "head", self._pins.get("head"))
        try:
            return self._fitting(wanted, load, encoder)
        except ModelMismatch as error:
            self._refuse(wanted, str(error))
            for version in deputies:
                with suppress(ModelMismatch):
                    return self._fitting(version, load, encoder)
            raise

    def next(self, serving: int, load: Callable[[int], T | None], encoder: Meta | None) -> tuple[Swap | None, T | None]:
        """The head that takes the place of the one that serves, and what there is to say of it.

        A version that cannot be used is refused, which is said once, and the old one goes on.

        Args:
            serving: version of the head that serves.
            load: makes a version ready to answer, raises ModelMismatch, or gives None where that must wait.
            encoder: whose features it must read.

        Returns:
            (swap, head) where the head may take over, (swap, None) where it was just refused, else (None, None).
        """
        try:
            version = self.wanted("head")
        except ModelMismatch as error:
            return self._refuse(NO_VERSION, str(error)), None
        if version == serving or version in self._refused:
            return None, None
        try:
            head = self._fitting(version, load, encoder)
        except ModelMismatch as error:
            return self._refuse(version, str(error)), None
        return (None, None) if head is None else (Swap("head", version), head)

    def _fitting(self, version: int, load: Callable[[int], T], encoder: Meta | None) -> T:
        """Load a head that was fitted on this encoder's features; another is not even loaded."""
        if encoder is not None:
            check_fit(encoder, model_repository.read_meta(self._repository, "head", version))
        return load(version)

    def _refuse(self, version: int, why: str) -> Swap | None:
        is_news = self._refused.get(version) != why
        self._refused[version] = why
        return Swap("head", version, why) if is_news else None
