from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from progress import quiet
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data.datasets import Sample
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.evaluation import searched_crops
from semwatch_training.evaluation.searched_crops import (
    NOT_A_DEFECT,
    MarkedField,
    SearchedCrops,
    behind_gate,
    marked_samples,
    marked_synthetic,
    search_marked,
)
from semwatch_training.metrics.uncertainty import Rate
from semwatch_training.synthetic import DEFECT_TYPES

SIDE = 96


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def field(*defects: tuple[str, np.ndarray]) -> MarkedField:
    image = np.random.default_rng(0).integers(80, 120, (SIDE, SIDE)).astype(np.uint8)
    masks = np.array([mask for _, mask in defects], bool).reshape(-1, SIDE, SIDE)
    return MarkedField(image, tuple(label for label, _ in defects), masks, None)


# ---- searching ----


def test_no_field_is_refused(tiny_repository) -> None:
    models = Embedded(tiny_repository, models=("detector", "encoder"), threads=1)
    with models, pytest.raises(ConfigError, match="there is no image to search"):
        search_marked(models, Recipe(), [], 0, progress=quiet)


def test_each_defect_is_found_or_cut_out_and_the_rest_is_defect_free(tiny_repository, monkeypatch) -> None:
    whole = np.ones((SIDE, SIDE), bool)
    fields = [
        field(("found", whole)),  # whatever is found shows it
        field(("missed", box(3, 3, 5, 5)), ("empty", np.zeros((SIDE, SIDE), bool))),
        field(),
    ]
    real = searched_crops.shown_defect
    monkeypatch.setattr(
        searched_crops, "shown_defect", lambda c, masks: real(c, masks) if masks.all() else NOT_A_DEFECT
    )
    told: list[tuple[int, int]] = []
    with Embedded(tiny_repository, models=("detector", "encoder"), threads=1) as models:
        found = search_marked(models, Recipe(), fields, 3, progress=lambda _, *n: told.append(n))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found.defects == ("found", "missed", "empty")
    assert found.defect_image.tolist() == [0, 1, 1]
    assert len(found.raw_scores) == 3
    labels = np.array(found.crops.labels)
    assert set(labels[found.crops.image_idx == 0]) == {"found"}
    assert set(labels[found.crops.image_idx == 2]) == {DEFECT_FREE}
    assert found.by_search[labels == "found"].all()
    cut = ~found.by_search  # an empty mask cannot be cut along
    assert (labels[cut].tolist(), found.defect_idx[cut].tolist()) == (["missed"], [1])
    assert ((found.defect_idx == NOT_A_DEFECT) == (labels == DEFECT_FREE)).all()


def test_a_search_is_kept_on_disk_as_it_was(tmp_path) -> None:
    for kept in (made(), replace(made(), defects=(), defect_image=np.zeros(0, np.intp))):
        searched_crops.save(kept, tmp_path / "s.npz")
        again = searched_crops.load(tmp_path / "s.npz")
        assert (again.crops.labels, again.defects) == (kept.crops.labels, kept.defects)
        for name in ("defect_idx", "by_search", "defect_image", "raw_scores"):
            assert np.array_equal(getattr(again, name), getattr(kept, name))
        for name in ("features", "image_idx", "area_px"):
            assert np.array_equal(getattr(again.crops, name), getattr(kept.crops, name))


# ---- which defect a region shows ----


class Shown:
    """A candidate of a region on the grid of 96 cells."""

    def __init__(self, mask: np.ndarray) -> None:
        self.region = type("Region", (), {"mask": mask})


def test_a_region_shows_the_defect_it_shares_most_with_and_one_that_shares_little_none() -> None:
    one, two = box(0, 0, 20, 20), box(40, 40, 60, 60)
    masks = np.stack([one, two])
    shown = searched_crops.shown_defect
    assert shown(Shown(one), masks[:0]) == NOT_A_DEFECT
    assert [shown(Shown(mask), masks) for mask in (one, two, one | box(40, 40, 45, 45))] == [0, 1, 0]
    assert shown(Shown(box(70, 70, 90, 90)), masks) == NOT_A_DEFECT
    assert shown(Shown(box(16, 0, 36, 20)), masks) == NOT_A_DEFECT  # a fifth of either
    assert shown(Shown(box(15, 0, 35, 20)), masks) == 0  # a quarter
    assert shown(Shown(box(0, 0, 96, 96)), masks[1:]) == 0  # a defect within it
    assert shown(Shown(np.zeros((96, 96), bool)), masks) == NOT_A_DEFECT


# ---- the gate ----


def made() -> SearchedCrops:
    """Image 0 shows defect 0 twice and a false region; 1 is missed and cut; 2 and 3 are normal, 3 with a region."""
    labels = ("a", "a", DEFECT_FREE, "b", DEFECT_FREE, DEFECT_FREE)
    crops = Crops(
        np.arange(12, dtype=np.float32).reshape(6, 2), labels, np.array([0, 0, 0, 1, 1, 3]),
        np.array([10, 50, 99, 5, 7, 8]), {}, {},
    )  # fmt: skip
    return SearchedCrops(
        crops,
        np.array([0, 0, NOT_A_DEFECT, 1, NOT_A_DEFECT, NOT_A_DEFECT]),
        np.array([True, True, True, False, True, True]),
        ("a", "b"),
        np.array([0, 1]),
        np.array([0.9, 0.5, 0.1, 0.3], np.float32),
    )


def test_behind_the_gate_each_defect_is_judged_once_or_missed() -> None:
    outcome = behind_gate(made(), 0.2)
    assert np.flatnonzero(outcome.judged).tolist() == [1, 2, 4, 5]  # the larger crop of defect 0; false regions
    assert outcome.missed == ("b",)
    assert outcome.normals_opened == Rate.of(1, 2)


def test_a_shut_gate_misses_all_and_is_shut_at_the_threshold_itself() -> None:
    outcome = behind_gate(made(), float(np.float32(0.9)))
    assert not outcome.judged.any()
    assert outcome.missed == ("a", "b")
    assert outcome.normals_opened == Rate.of(0, 2)


def test_without_normal_images_no_rate_is_stated() -> None:
    found = made()
    no_normals = replace(found, raw_scores=found.raw_scores[:2], defect_image=np.array([0, 1]))
    kept = np.array([0, 1, 2, 3, 4])
    crops = replace(found.crops, image_idx=found.crops.image_idx[kept], area_px=found.crops.area_px[kept])
    no_normals = replace(no_normals, crops=crops, defect_idx=found.defect_idx[kept], by_search=found.by_search[kept])
    assert behind_gate(no_normals, 0.2).normals_opened is None


# ---- fields ----


def written(path: Path, pixels: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), pixels.astype(np.uint8))
    return path


def test_all_defects_of_an_image_are_one_field_and_those_with_an_empty_mask_are_left_out(tmp_path) -> None:
    assert list(marked_samples([])) == []
    image, other, normal = (written(tmp_path / f"{n}.png", field().image) for n in "aon")
    one, two = written(tmp_path / "1.png", 255 * box(0, 0, 9, 9)), written(tmp_path / "2.png", 255 * box(20, 0, 30, 9))
    empty = written(tmp_path / "e.png", 0 * box(0, 0, 1, 1))
    samples = [
        Sample(image, "spot", one, (two,)),
        Sample(image, "line", two, (one,)),
        Sample(other, "spot", one, (empty,)),
        Sample(other, "line", empty, (one,)),
        Sample(normal, DEFECT_FREE),
    ]
    found = list(marked_samples(samples))
    assert [(f.labels, f.masks.sum(axis=(1, 2)).tolist()) for f in found] == [(("spot", "line"), [81, 90]), ((), [])]
    small = written(tmp_path / "s.png", np.full((8, 8), 255))
    with pytest.raises(ConfigError, match="the mask is 8 x 8 px"):
        list(marked_samples([Sample(image, "spot", small)]))


def test_synthetic_fields_are_as_many_of_each_type_as_normal_ones_of_each_stage(monkeypatch) -> None:
    monkeypatch.setattr(searched_crops, "STAGES", ("DEP",))
    found = list(marked_synthetic(1, first_seed=1, side_px=256))
    assert [f.labels for f in found] == [(), *((name,) for name in DEFECT_TYPES["DEP"])]
    assert [len(f.masks) for f in found] == [0, *[1] * len(DEFECT_TYPES["DEP"])]
    assert all(f.masks.any() for f in found[1:])
