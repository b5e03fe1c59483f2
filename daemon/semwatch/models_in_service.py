"""The models that the daemon's recipes ask for: loaded once for each set of pins; heads are swapped while they answer.

What serves and what was refused is logged, counted, and announced in ``serving.json`` (see ``serving``), where a
learning cycle and ``semwatch models`` look for it.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from semwatch import model_repository, serving
from semwatch.config import Pins, Recipe
from semwatch.inference import Embedded
from semwatch.metrics import Metrics

log = logging.getLogger(__name__)


class ModelsInService:
    """Every network that a running daemon holds.

    Args:
        repository: model repository.
        recipes: whose pins are loaded.
        threads: processor threads of one network; None for all the machine has.
        state_dir: takes ``serving.json``.
        metrics: counts refused versions.

    Raises: ModelMismatch, saying what to fix.
    """

    def __init__(
        self, repository: Path, recipes: Iterable[Recipe], *, threads: int | None, state_dir: Path, metrics: Metrics
    ) -> None:
        self._repository, self._state_dir, self._metrics = repository, state_dir, metrics
        self.by_pins = load_models(repository, recipes, threads=threads)
        self._codes: dict[int, Mapping[str, int]] = {}
        self._is_announced = True
        for version, why in self.refused_heads().items():
            self._say_refused("head", version, why)
        self._announce()

    def of(self, recipe: Recipe) -> Embedded:
        """The networks that answer for a recipe."""
        return self.by_pins[recipe.pins]

    def refresh(self) -> None:
        """Let newly published heads serve; answers under way are given by the old one."""
        swaps = [swap for models in self.by_pins.values() if (swap := models.refresh()) is not None]
        for swap in swaps:
            if swap.refused is None:
                log.info("%s %d serves from now on", swap.model, swap.version)
            else:
                self._say_refused(swap.model, swap.version, swap.refused)
        if swaps or not self._is_announced:
            self._announce()

    def versions(self) -> dict[str, int]:
        """Version in service, by model."""
        return versions_of(self.by_pins)

    def refused_heads(self) -> dict[int, str]:
        """Versions of the head that could not be used, and why."""
        return {version: why for models in self.by_pins.values() for version, why in models.refused().items()}

    def codes_of_head(self, version: int | None) -> Mapping[str, int]:
        """Fab codes of the classes that people named, as one version of the head knows them; none for None."""
        if version is None:
            return {}
        if version not in self._codes:
            self._codes[version] = model_repository.read_meta(self._repository, "head", version).codes
        return self._codes[version]

    def _say_refused(self, model: str, version: int, why: str) -> None:
        self._metrics.swap_refused.labels(model=model).inc()
        log.error("%s %d is refused, the one before it goes on: %s", model, version, why)

    def _announce(self) -> None:
        try:
            serving.announce(self._state_dir, self.versions(), self.refused_heads())
        except OSError as error:
            if self._is_announced:
                log.warning("cannot say what serves, tried again until it works: %s", error)
            self._is_announced = False
        else:
            self._is_announced = True


def versions_of(by_pins: Mapping[Pins, Embedded]) -> dict[str, int]:
    """Version by model; of a model that some recipes pin and others do not, the one without a pin."""
    versions: dict[str, int] = {}
    for _, models in sorted(by_pins.items(), key=lambda item: item[0].head is None):
        versions |= models.versions()
    return versions


def load_models(repository: Path, recipes: Iterable[Recipe], *, threads: int | None) -> dict[Pins, Embedded]:
    """One set of networks per distinct pins: recipes that pin nothing share one."""
    distinct = dict.fromkeys(recipe.pins for recipe in recipes)
    return {pins: Embedded(repository, pins=pins.model_dump(), threads=threads) for pins in distinct}
