"""A default stands once: what is called without settings does what the daemon does with its default ones."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from semwatch.intake import decoding
from semwatch.line import binarization, difference, pipeline, registration
from semwatch.models.inference import Embedded
from semwatch.settings import site
from semwatch.settings.recipe import Recipe
from semwatch.streams import unknowns
from semwatch.triton.client import Triton
from semwatch_training.evaluation.binarization_rules import mask_table

RECIPE, LIMITS = Recipe(), site.Limits()


def defaults(of: Callable[..., Any]) -> dict[str, Any]:
    return {
        name: value.default
        for name, value in inspect.signature(of).parameters.items()
        if value.default is not value.empty
    }


def test_stages_follow_the_default_recipe() -> None:
    rule, crop = RECIPE.binarization, RECIPE.crop
    found = defaults(binarization.binarize)
    own = {"min_area_fraction", "hot_score"}  # no setting of a recipe
    assert {key: found[key] for key in found.keys() - own} == {
        "method": rule.method,
        "grid_px": rule.grid_px,
        "percentiles": rule.percentiles,
        "n_thresholds": rule.n_thresholds,
        "epsilon": rule.epsilon,
        "min_length": rule.min_plateau,
        "max_mask_fraction": rule.max_mask_fraction,
        "max_defects": 2 * rule.max_defects,
    }
    assert defaults(binarization.plateau)["max_mask_fraction"] == rule.max_mask_fraction
    assert defaults(binarization.regions) == {"merge_fraction": rule.merge_fraction, "max_regions": rule.max_defects}
    assert defaults(binarization.crop_window) == {
        "context": crop.context,
        "min_side_fraction": crop.min_side_fraction,
    }


def test_comparison_follows_the_default_recipe() -> None:
    rule = RECIPE.reference
    assert defaults(registration.register) == {"max_shift": rule.max_shift, "min_correlation": rule.min_correlation}
    assert defaults(difference.compare) == {"threshold": rule.threshold}


def test_mask_figures_judge_the_rule_of_the_daemon(tiny_repository) -> None:
    """A defect of 40 % of the field lies between the two limits that once were defaults, .3 and .5."""
    truth = np.zeros((64, 64), np.bool_)
    truth[:, :26] = True
    score_map = np.where(truth, 1.0, 0.0).astype(np.float32)
    rows = mask_table({"one": ([score_map], [truth])}, title="").rows
    ours = next(row for row in rows if "middle of the plateau" in str(row[1]))
    with Embedded(tiny_repository, threads=1) as models:
        daemons = daemon_mask(score_map, models)
    assert daemons.any()
    assert not binarization.binarize(score_map, max_mask_fraction=0.3).mask.any()
    assert np.array_equal(binarization.binarize(score_map).mask, daemons)
    assert ours[3] == 1.0  # share of masks that point at their defect


def daemon_mask(score_map: np.ndarray, models: Embedded) -> np.ndarray:
    """What ``pipeline.search`` makes of a score map."""
    from semwatch.defects import Micrograph, ScoreMap

    with pytest.MonkeyPatch.context() as patch:
        scored = ScoreMap(score_map, 9e9), models.infer("head", {"features": np.zeros((1, 74), np.float32)}).id
        patch.setattr(pipeline.detection, "detect", lambda *_, **__: scored)
        page = Micrograph(np.zeros((128, 128), np.uint8), (0, 0, 128, 128), 0, None, None)
        return pipeline.search(page, RECIPE, models).mask


def test_limits_of_a_file_are_the_sites() -> None:
    for of in (decoding.decode, pipeline.review):
        found = defaults(of)
        assert (found["max_pixels"], found["max_pages"]) == (LIMITS.max_image_px, LIMITS.max_pages)
    assert LIMITS.max_image_px >= 8192 * 8192


def test_streams_and_triton_follow_the_site() -> None:
    redis = site.Redis(url="redis://127.0.0.1:6379/0")
    assert defaults(unknowns.Publisher)["prefix"] == defaults(unknowns.Consumer)["prefix"] == redis.prefix
    assert defaults(unknowns.connect)["timeout_s"] == redis.timeout_s
    found = defaults(Triton)
    assert {key: found[key] for key in ("url", "timeout_s", "attempts")} == {
        key: getattr(site.Triton(), key) for key in ("url", "timeout_s", "attempts")
    }
