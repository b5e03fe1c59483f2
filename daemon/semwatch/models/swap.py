"""Which version serves: chosen at a start, exchanged while the daemon runs, refused once. One rule for both runtimes.

Heads change between two answers, detectors between two images, when nothing is in review. The encoder changes only at a
start: features of one encoder must not meet a head of another. Whatever is wrong with the files of a version, it is
refused with the reason, and what served before goes on; a repository that cannot be read for a while changes nothing.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from semwatch.errors import ConfigError, ModelMismatch, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.models.model_repository import Meta

log = logging.getLogger(__name__)

NO_VERSION = -1
"""Refused under this number: it is not known which version should serve."""

T = TypeVar("T")
Fits = Callable[[Meta], None]
"""Raises ModelMismatch where a version does not go with what else serves; such a version is not even loaded."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One change of version, done or refused."""

    model: str
    version: int
    refused: str | None = None
    """Why the version may not serve; None: it serves now."""


class ModelSwap:
    """The choice of versions, and what was refused.

    Args:
        repository: the model repository.
        pins: version by model; a model without a pin serves what ``choice`` says.
        before: version by model that served last; it serves again where nobody can tell which one should.
    """

    def __init__(
        self, repository: Path, pins: Mapping[str, int | None], *, before: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self._repository, self._pins, self._before = repository, pins, before
        self._refused: dict[str, dict[int, str]] = {}

    def wanted(self, model: str) -> int:
        """The version of a model that should serve.

        Raises:
            ModelMismatch: there is none, or the pinned one is absent.
        """
        pin = self._pins.get(model)
        return choice.choice(self._repository, model) if pin is None else pin

    def refused(self, model: str) -> dict[int, str]:
        """Versions of a model that could not be used, and why."""
        return dict(self._refused.get(model, {}))

    def waits(self, model: str, serving: int) -> bool:
        """Whether another version than the one that serves should, and was not refused."""
        with suppress(ModelMismatch, ServiceUnavailable):
            return self.wanted(model) not in (serving, *self._refused.get(model, {}))
        return NO_VERSION not in self._refused.get(model, {})

    def first(self, model: str, load: Callable[[int], T], fits: Fits) -> T:
        """The version that should serve; where it cannot and nobody pinned it, the newest before it that can.

        Args:
            model: of which.
            load: makes a version ready to answer, or raises ModelMismatch.
            fits: see ``Fits``.

        Raises:
            ModelMismatch: none can; why the wanted one cannot.
            ServiceUnavailable: the repository or the server is away.
        """
        wanted, *deputies = self._to_try(model)
        why: ModelMismatch | None = None
        for version in (wanted, *deputies):
            try:
                return self._fitting(model, version, load, fits)
            except ModelMismatch as error:
                if version == wanted:
                    self._refuse(model, version, str(error))
                if deputies:
                    log.error("%s %d cannot serve, the one before it is tried: %s", model, version, error)
                why = why or error
        assert why is not None
        raise why

    def _to_try(self, model: str) -> list[int]:
        """See ``choice.to_try``; where a pin names no version, the one that served before."""
        try:
            return choice.to_try(self._repository, model, self._pins.get(model))
        except ModelMismatch as error:
            before = self._before.get(model)
            if before is None or before not in model_repository.versions(self._repository, model):
                raise
            if choice.why_withdrawn(self._repository, model, before) is not None:
                raise
            self._refuse(model, NO_VERSION, str(error))
            return [before]

    def next(
        self, model: str, serving: int, load: Callable[[int], T | None], fits: Fits
    ) -> tuple[Swap | None, T | None]:
        """The version that takes the place of the one that serves, and what there is to say of it.

        A version that cannot be used is refused, which is said once, and the old one goes on.

        Args:
            model: of which.
            serving: the version that serves.
            load: makes a version ready to answer, raises ModelMismatch, or gives None where that must wait.
            fits: see ``Fits``.

        Returns:
            (swap, loaded) where it may take over, (swap, None) where it was just refused, else (None, None).
        """
        try:
            version = self.wanted(model)
        except (ModelMismatch, ServiceUnavailable) as error:
            return self._refuse(model, NO_VERSION, str(error)), None
        self._refused.get(model, {}).pop(NO_VERSION, None)  # should it happen again, it is said again
        if version == serving or version in self._refused.get(model, {}):
            return None, None
        try:
            loaded = self._fitting(model, version, load, fits)
        except ModelMismatch as error:
            return self._refuse(model, version, str(error)), None
        return (None, None) if loaded is None else (Swap(model, version), loaded)

    def _fitting(self, model: str, version: int, load: Callable[[int], T], fits: Fits) -> T:
        """Load a version; one that does not go with what else serves is not even loaded.

        Raises:
            ModelMismatch: it cannot serve, whatever was raised on its files.
        """
        try:
            fits(model_repository.read_meta(self._repository, model, version))
            return load(version)
        except (ModelMismatch, ServiceUnavailable, ConfigError):
            raise
        except Exception as error:  # damaged files make libraries raise anything
            raise ModelMismatch(
                f"{model} {version} cannot be used ({type(error).__name__}: {str(error)[:500]}); publish it again"
            ) from error

    def _refuse(self, model: str, version: int, why: str) -> Swap | None:
        refused = self._refused.setdefault(model, {})
        is_news = refused.get(version) != why
        refused[version] = why
        return Swap(model, version, why) if is_news else None
