"""The gate's threshold from images that a person has sorted, held against the one that it has now."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semwatch.errors import ConfigError, ImageError
from semwatch.intake import decoding, quality
from semwatch.line import detection, gate_calibration, pipeline
from semwatch.line.binarization import conformal_threshold
from semwatch.line.gate_calibration import RATES, Alternative, Counted, Measured, alternatives, measure, reachable_rate
from semwatch.models.inference import Models
from semwatch.settings.recipe import QualityRule, Recipe

N_WORST = 8
"""Missed images that are named."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One page of an image file, and its raw score."""

    name: str
    score: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A proposed threshold beside the present one, on the same images."""

    asked_rate: float
    """The recipe's false alarm rate."""
    false_alarm_rate: float
    """The rate that the threshold promises: higher than asked where the normal images are too few."""
    proposed: Measured
    present: Measured | None
    """None where the recipe has no threshold and the detector's normals cannot promise its rate."""
    left_out: Counted
    """Normal images above the threshold that the others give."""
    alternatives: tuple[Alternative, ...]
    worst_missed: tuple[Scored, ...]
    """Defective images that the proposed threshold misses, those of the lowest score first."""

    @property
    def n_needed(self) -> int:
        """Normal images that the asked rate takes."""
        return n_needed(self.asked_rate)

    @property
    def is_worse(self) -> bool:
        """Whether the proposed threshold misses more of the given defective images than the present one."""
        now, then = None if self.present is None else self.present.misses, self.proposed.misses
        return now is not None and then is not None and then.count > now.count

    @property
    def comparison(self) -> str:
        """What the proposed threshold does to recall, in a sentence; empty without defective images."""
        then = self.proposed.misses
        if then is None:
            return ""
        found = f"the proposed threshold {self.proposed.threshold:.4g} finds {then.n - then.count} of {then.n}"
        if self.present is None or self.present.misses is None:
            return found
        now = self.present.misses
        beside = f"the present one {self.present.threshold:.4g} finds {now.n - now.count}"
        verdict = "this makes recall worse" if self.is_worse else "recall does not fall"
        return f"{verdict}: {found} images with defects, {beside}"


def calibrate(
    of_normals: Sequence[Scored],
    of_defects: Sequence[Scored] | None,
    recipe: Recipe,
    models: Models,
    *,
    normals: Path,
    defects: Path | None = None,
) -> Calibration:
    """Propose the threshold that keeps the recipe's false alarm rate on one's own normal images.

    Args:
        of_normals: pages of defect-free images.
        of_defects: pages of images with a defect each; None where there are none.
        recipe: has the rate, and perhaps a threshold of its own.
        models: whose detector gave the scores.
        normals: where the normal images lie, for messages.
        defects: where the others lie.

    Raises:
        ConfigError: a folder has no image.
    """
    for folder, found in ((normals, of_normals), (defects, of_defects)):
        if found is not None and not found:
            raise ConfigError(
                f"{folder}: there is no image in it; give at least a few, {n_needed(0.05)} and more are good"
            )
    asked = recipe.gate.false_alarm_rate
    scores = np.array([one.score for one in of_normals])
    defective = None if of_defects is None else np.array([one.score for one in of_defects])
    rate = reachable_rate(len(scores), asked)
    threshold = conformal_threshold(scores, false_alarm_rate=rate)
    missed = sorted((one for one in of_defects or () if one.score <= threshold), key=lambda one: one.score)
    return Calibration(
        asked_rate=asked,
        false_alarm_rate=rate,
        proposed=measure(threshold, scores, defective),
        present=_present(recipe, models, scores, defective),
        left_out=gate_calibration.left_out_alarms(scores, rate),
        alternatives=tuple(alternatives(scores, defective, rates=sorted({*RATES, asked}))),
        worst_missed=tuple(missed[:N_WORST]),
    )


def n_needed(false_alarm_rate: float) -> int:
    """Normal images that promise a false alarm rate."""
    return math.ceil(1 / false_alarm_rate - 1 - 1e-9)  # 1e-9 as in conformal_threshold: 1 / 0.05 - 1 is 19 and not 20


def raw_scores(file: Path, models: Models) -> list[float]:
    """Raw score of each page of an image file.

    Raises:
        ConfigError: the file cannot be scored.
    """
    try:
        rule = QualityRule(no_image="quarantine")
        fields = (page.field for page in decoding.read(file) if quality.admit(page, rule))
        return [detection.detect(field, models)[0].raw_score for field in fields]
    except ImageError as error:
        raise ConfigError(f"{error}; or take it out of the images given") from error


def _present(
    recipe: Recipe, models: Models, normals: gate_calibration.Array, defective: gate_calibration.Array | None
) -> Measured | None:
    try:
        return measure(pipeline.gate_threshold(recipe, models), normals, defective)
    except ConfigError:
        return None
