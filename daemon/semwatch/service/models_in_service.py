"""The models that the daemon's recipes ask for: loaded once for each set of pins; heads and detectors are swapped.

What serves and what was refused is logged, counted, and announced in ``serving.json`` (see ``serving``), where a
learning cycle and ``semwatch models`` look for it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from semwatch.errors import ConfigError, ModelMismatch
from semwatch.line import pipeline
from semwatch.models.inference import Embedded, Models
from semwatch.models.model_repository import MODELS, Meta
from semwatch.models.swap import NO_VERSION, Swap
from semwatch.service.metrics import Metrics
from semwatch.settings.recipe import Pins, Recipe
from semwatch.settings.site import Models as ModelSettings
from semwatch.store import serving
from semwatch.system.journal import about

log = logging.getLogger(__name__)


class ModelsInService:
    """Every network that a running daemon holds.

    Args:
        settings: repository and runtime.
        recipes: whose pins are loaded.
        state_dir: takes ``serving.json``.
        metrics: counts refused versions.

    Raises: ModelMismatch, saying what to fix.
    """

    def __init__(
        self, settings: ModelSettings, recipes: Iterable[Recipe], *, state_dir: Path, metrics: Metrics
    ) -> None:
        self._repository, self._state_dir, self._metrics = settings.repository, state_dir, metrics
        self._recipes = tuple(recipes)
        before, _ = serving.announced(state_dir)
        self.by_pins = load_models(settings, self._recipes, before=before)
        self._codes: dict[int, Mapping[str, int]] = {}
        self._remember_codes()
        self._is_announced = True
        for model in ("detector", "head"):
            for version, why in self.refused(model).items():
                self._log_refused(model, version, why)
        self._announce()

    def of(self, recipe: Recipe) -> Models:
        """The networks that answer for a recipe."""
        return self.by_pins[recipe.pins]

    def refresh(self) -> bool:
        """Let newly published heads serve; answers under way are given by the old one. True where one serves now."""
        return self._note([swap for models in self.by_pins.values() if (swap := models.refresh()) is not None])

    def has_new_detector(self) -> bool:
        """Whether a newly published detector waits until nothing is in review."""
        return any(models.waits("detector") for models in self.by_pins.values())

    def refresh_detector(self) -> bool:
        """Let newly published detectors serve. Call it when nothing is in review; True where one serves now.

        One whose normal images cannot promise what a recipe asks is refused.
        """
        swaps = []
        for pins, models in self.by_pins.items():
            recipes = [recipe for recipe in self._recipes if recipe.pins == pins]
            swap = models.refresh("detector", fits=partial(_check_gates, recipes=recipes))
            swaps += [swap] if swap is not None else []
        return self._note(swaps)

    def _note(self, swaps: Sequence[Swap]) -> bool:
        """Log, count and announce swaps; True where one serves now."""
        for swap in swaps:
            if swap.refused is None:
                extra = about("swapped", models={swap.model: swap.version})
                log.info("%s %d serves from now on", swap.model, swap.version, extra=extra)
            else:
                self._log_refused(swap.model, swap.version, swap.refused)
        self._remember_codes()
        if swaps or not self._is_announced:
            self._announce()
        return any(swap.refused is None for swap in swaps)

    def close(self) -> None:
        """Let go of networks and connections."""
        for models in self.by_pins.values():
            models.close()

    def versions(self) -> dict[str, int]:
        """Version in service, by model."""
        return versions_of(self.by_pins)

    def hashes(self) -> dict[str, str]:
        """Content hash of the version in service, by model."""
        return hashes_of(self.by_pins)

    def refused(self, model: str = "head") -> dict[int, str]:
        """Versions of a model that could not be used, and why."""
        return {version: why for models in self.by_pins.values() for version, why in models.refused(model).items()}

    def codes_of_head(self, version: int | None) -> Mapping[str, int]:
        """Fab codes of the classes that people named, as one version of the head knows them; none for None."""
        if version is None:
            return {}
        return self._codes.get(version, {})

    def _remember_codes(self) -> None:
        """Of each head that serves or has served: a review may end after the swap, and the files may be gone."""
        for models in self.by_pins.values():
            self._codes[models.versions()["head"]] = models.meta("head").codes

    def _log_refused(self, model: str, version: int, why: str) -> None:
        self._metrics.swap_refused.labels(model=model).inc()
        if version == NO_VERSION:
            log.error("the %s goes on as it is, for which one should serve is not known: %s", model, why)
            return
        extra = about("refused", models={model: version})
        log.error("%s %d is refused, the one before it goes on: %s", model, version, why, extra=extra)

    def _announce(self) -> None:
        try:
            serving.announce(
                self._state_dir,
                self.versions(),
                self.refused(),
                refused_detectors=self.refused("detector"),
                hashes=self.hashes(),
            )
        except OSError as error:
            if self._is_announced:
                log.warning("cannot say what serves, tried again until it works: %s", error)
            self._is_announced = False
        else:
            self._is_announced = True


def _check_gates(detector: Meta, recipes: Iterable[Recipe]) -> None:
    """Refuse a detector whose gate has no threshold for one of the recipes."""
    for recipe in recipes:
        try:
            pipeline.threshold_of(recipe, detector)
        except ConfigError as error:
            raise ModelMismatch(str(error)) from error


def versions_of(by_pins: Mapping[Pins, Models]) -> dict[str, int]:
    """Version by model; of a model that some recipes pin and others do not, the one without a pin."""
    return {model: models.versions()[model] for model, models in _unpinned(by_pins).items()}


def hashes_of(by_pins: Mapping[Pins, Models]) -> dict[str, str]:
    """Content hash by model, of the versions in ``versions_of``."""
    return {model: models.hashes()[model] for model, models in _unpinned(by_pins).items()}


def _unpinned(by_pins: Mapping[Pins, Models]) -> dict[str, Models]:
    """Who speaks for each model: the last of those that do not pin it, else the last of all."""
    found: dict[str, Models] = {}
    for model in MODELS:
        for _, models in sorted(by_pins.items(), key=lambda item: getattr(item[0], model) is None):
            if model in models.versions():
                found[model] = models
    return found


def load_models(
    settings: ModelSettings, recipes: Iterable[Recipe], *, before: Mapping[str, int] = MappingProxyType({})
) -> dict[Pins, Models]:
    """One set of networks per distinct pins: recipes that pin nothing share one.

    Args:
        settings: repository and runtime.
        recipes: whose pins are loaded.
        before: version by model that served last, see ``ModelSwap``.

    Raises:
        ModelMismatch: a model is absent or not what it should be.
        ServiceUnavailable: the Triton server is away.
        ConfigError: its client is not installed.
    """
    loaded = {pins: _opened(settings, pins, before) for pins in dict.fromkeys(recipe.pins for recipe in recipes)}
    if settings.runtime == "triton":
        try:
            _refuse_two_signatures(list(loaded.values()))
        except ModelMismatch:
            for models in loaded.values():
                models.close()
            raise
    return loaded


def _refuse_two_signatures(loaded: Sequence[Models]) -> None:
    """Refuse recipes whose pins ask one server for models of one role with other inputs: each would push the other out.

    Raises:
        ModelMismatch: naming the versions.
    """
    for model in ("detector", "encoder", "head"):
        signatures = {models.versions()[model]: dict(models.meta(model).inputs) for models in loaded}
        first, *others = signatures.items()
        if odd := [version for version, inputs in others if inputs != first[1]]:
            raise ModelMismatch(
                f"recipes pin {model} {first[0]} and {model} {odd[0]}, whose inputs differ: a Triton server holds "
                f"versions of one signature; pin the same {model} in all recipes, or use runtime: embedded"
            )


def _opened(settings: ModelSettings, pins: Pins, before: Mapping[str, int]) -> Models:
    if settings.runtime == "embedded":
        return Embedded(settings.repository, pins=pins.model_dump(), before=before, threads=settings.threads)
    try:
        from semwatch.triton.client import Triton  # noqa: PLC0415 - an extra that an embedded site does not install
    except ImportError as error:
        raise ConfigError("runtime: triton needs its client: pip install 'semwatch[triton]'") from error
    return Triton(settings.repository, pins=pins.model_dump(), before=before, **settings.triton.model_dump())
