"""Which version serves: chosen at a start, the head exchanged while others answer, a bad one refused once.

One rule for both runtimes. Whatever is wrong with the files of a version, it is refused with the reason, and what
served before goes on; a repository that cannot be read for a while changes nothing. Detector and encoder change only
at a start: features of one encoder must not meet a head of another.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from semwatch.errors import ConfigError, ModelMismatch, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.models.checks import check_fit
from semwatch.models.model_repository import Meta

log = logging.getLogger(__name__)

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

    def first(self, model: str, load: Callable[[int], T], encoder: Meta | None) -> T:
        """The version that should serve; where it cannot and nobody pinned it, the newest before it that can.

        Args:
            model: which.
            load: makes a version ready to answer, or raises ModelMismatch.
            encoder: whose features a head must read; None: nobody asks.

        Raises:
            ModelMismatch: none can; why the wanted one cannot.
            ServiceUnavailable: the repository or the server is away.
        """
        wanted, *deputies = choice.to_try(self._repository, model, self._pins.get(model))
        why: ModelMismatch | None = None
        for version in (wanted, *deputies):
            try:
                return self._fitting(model, version, load, encoder)
            except ModelMismatch as error:
                if (model, version) == ("head", wanted):
                    self._refuse(version, str(error))
                if deputies:
                    log.error("%s %d cannot serve, the one before it is tried: %s", model, version, error)
                why = why or error
        assert why is not None
        raise why

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
        except (ModelMismatch, ServiceUnavailable) as error:
            return self._refuse(NO_VERSION, str(error)), None
        self._refused.pop(NO_VERSION, None)  # should it happen again, it is said again
        if version == serving or version in self._refused:
            return None, None
        try:
            head = self._fitting("head", version, load, encoder)
        except ModelMismatch as error:
            return self._refuse(version, str(error)), None
        return (None, None) if head is None else (Swap("head", version), head)

    def _fitting(self, model: str, version: int, load: Callable[[int], T], encoder: Meta | None) -> T:
        """Load a version; a head that was fitted on another encoder's features is not even loaded.

        Raises:
            ModelMismatch: it cannot serve, whatever was raised on its files.
        """
        try:
            if encoder is not None:
                check_fit(encoder, model_repository.read_meta(self._repository, model, version))
            return load(version)
        except (ModelMismatch, ServiceUnavailable, ConfigError):
            raise
        except Exception as error:  # damaged files make libraries raise anything
            raise ModelMismatch(
                f"{model} {version} cannot be used ({type(error).__name__}: {str(error)[:500]}); publish it again"
            ) from error

    def _refuse(self, version: int, why: str) -> Swap | None:
        is_news = self._refused.get(version) != why
        self._refused[version] = why
        return Swap("head", version, why) if is_news else None
