from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from progress import quiet
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.models import crop_store, head_bank
from semwatch.models.crop_store import KeptCrop
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch.system.files import file_sha256
from semwatch_training.data.datasets import Sample
from semwatch_training.discovery import head_run, labelled_crops
from semwatch_training.discovery.labelled_crops import Crops, of_samples, of_synthetic, searched
from semwatch_training.learning.refit import encoded_again
from semwatch_training.publishing import build_repository
from semwatch_training.synthetic import DEFECT_TYPES, STAGES, SyntheticMicrograph

SIDE = 96
OPEN = Recipe.model_validate({"gate": {"threshold": 0.0}})
SHUT = Recipe.model_validate({"gate": {"threshold": 9.0}})


@pytest.fixture(scope="module")
def models(tiny_repository) -> Iterator[Embedded]:
    with Embedded(tiny_repository, models=("detector", "encoder"), threads=1) as served:
        yield served


def written(path: Path, pixels: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), pixels)
    return path


def noise(path: Path, seed: int = 0) -> Path:
    return written(path, np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8))


def mask(path: Path, *box: int, size: int = SIDE) -> Path:
    drawn = np.zeros((size, size), np.uint8)
    if box:
        x0, y0, x1, y1 = box
        drawn[y0:y1, x0:x1] = 255
    return written(path, drawn)


# ---- along true masks ----


def test_no_sample_and_samples_without_a_marked_pixel_leave_nothing_to_cut(tmp_path, models) -> None:
    bare = Sample(noise(tmp_path / "a.png"), "spot", mask(tmp_path / "a_mask.png"))
    for samples in ([], [bare]):
        with pytest.raises(ConfigError, match="nothing to cut out"):
            of_samples(models, OPEN, samples, progress=quiet)


def test_a_normal_sample_has_no_mask_to_cut_along(tmp_path, models) -> None:
    with pytest.raises(ConfigError, match=r"a.png is defect-free: there is no mask .*leave it out"):
        of_samples(models, OPEN, [Sample(noise(tmp_path / "a.png"), DEFECT_FREE)], progress=quiet)


def test_a_missing_mask_and_one_of_another_size_are_refused(tmp_path, models) -> None:
    image = noise(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no mask shows its 'spot'"):
        of_samples(models, OPEN, [Sample(image, "spot")], progress=quiet)
    small = mask(tmp_path / "m.png", 4, 4, 9, 9, size=40)
    with pytest.raises(ConfigError, match="the mask is 40 x 40 px"):
        of_samples(models, OPEN, [Sample(image, "spot", small)], progress=quiet)


def test_crops_bear_the_area_of_their_mask_and_defects_of_one_image_its_number(tmp_path, models) -> None:
    one, two = noise(tmp_path / "1.png", 1), noise(tmp_path / "2.png", 2)
    first, second = mask(tmp_path / "a.png", 10, 10, 34, 22), mask(tmp_path / "b.png", 60, 60, 72, 72)
    samples = [
        Sample(one, "spot", first, (second,)),
        Sample(two, "line", mask(tmp_path / "none.png")),  # marks nothing
        Sample(one, "line", second, (first,)),
        Sample(two, "line", second),
    ]
    told: list[tuple[int, int]] = []
    crops = of_samples(models, OPEN, samples, progress=lambda _, done, total: told.append((done, total)))
    assert crops.labels == ("spot", "line", "line")
    assert crops.image_idx.tolist() == [0, 0, 1]
    assert crops.area_px.tolist() == pytest.approx([24 * 12, 144, 144], rel=0.15)  # at the working grid's cells
    assert crops.features.shape == (3, models.meta("encoder").outputs["features"].shape[0])
    assert np.isfinite(crops.features).all()
    assert not np.allclose(crops.features[0], crops.features[1])  # each is cut along its own mask
    assert crops.n_planted == {"line": 2, "spot": 1}
    assert told == [(done, 4) for done in range(1, 5)]


def test_a_gate_that_is_shut_does_not_matter_where_the_mask_is_given(tmp_path, models) -> None:
    samples = [Sample(noise(tmp_path / "a.png"), "spot", mask(tmp_path / "m.png", 10, 10, 30, 30))]
    features = [of_samples(models, recipe, samples, progress=quiet).features for recipe in (OPEN, SHUT)]
    assert np.array_equal(*features)


def test_synthetic_crops_are_of_every_type_and_no_two_share_an_image(models, monkeypatch) -> None:
    asked: list[tuple[str, int, int, int]] = []

    def made(stage: str, *, n_normal: int, n_per_type: int, first_seed: int, side_px: int):
        asked.append((stage, n_normal, n_per_type, first_seed))
        for label in DEFECT_TYPES[stage]:
            for i in range(n_per_type):
                truth = np.zeros((1, SIDE, SIDE), bool)
                truth[0, 20 : 30 + i, 20:40] = True
                pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
                yield SyntheticMicrograph(pixels, truth, (label,), stage, i, 1.0, np.zeros((SIDE, SIDE)))

    monkeypatch.setattr(labelled_crops, "synthetic_set", made)
    crops = of_synthetic(models, OPEN, n_per_type=2, first_seed=7, progress=quiet)
    assert asked == [(stage, 0, 2, 7) for stage in STAGES]
    assert crops.labels == tuple(label for stage in STAGES for label in DEFECT_TYPES[stage] for _ in range(2))
    assert crops.image_idx.tolist() == list(range(len(crops.labels)))
    assert set(crops.n_planted.values()) == {2}


# ---- what the search finds ----


def test_search_of_no_image_and_one_whose_gate_never_opens_are_refused(tmp_path, models) -> None:
    with pytest.raises(ConfigError, match="the gate opened on none of 0 images"):
        searched(models, OPEN, [], progress=quiet)
    with pytest.raises(ConfigError, match=r"opened on none of 1 images at 9.0000; lower it"):
        searched(models, SHUT, [Sample(noise(tmp_path / "a.png"), "spot")], progress=quiet)


def test_a_rate_that_the_detectors_normals_cannot_promise_is_refused(tmp_path, models) -> None:
    """The tiny detector knows 60 normal scores: one in a thousand is beyond them."""
    recipe = Recipe.model_validate({"gate": {"false_alarm_rate": 0.001}})
    with pytest.raises(ConfigError, match="60 normal images cannot promise"):
        searched(models, recipe, [Sample(noise(tmp_path / "a.png"), "spot")], progress=quiet)


def test_crops_bear_the_label_of_their_image_and_an_image_behind_a_shut_gate_has_none(tmp_path, models) -> None:
    """No mask is needed: labels are only read to judge."""
    labels = ("spot", DEFECT_FREE, "line", "line")
    samples = [Sample(noise(tmp_path / f"{i}.png", i), label) for i, label in enumerate(labels)]
    all_open = searched(models, OPEN, samples, progress=quiet)
    assert all_open.labels == labels
    assert set(all_open.crops.image_idx.tolist()) == {0, 1, 2, 3}
    middle = float(np.sort(all_open.raw_scores)[1])
    half = searched(models, Recipe.model_validate({"gate": {"threshold": middle}}), samples, progress=quiet)
    opened = np.flatnonzero(all_open.raw_scores > np.float32(middle))
    assert half.labels == labels
    assert half.gate_threshold == middle
    assert np.array_equal(half.raw_scores, all_open.raw_scores)
    assert set(half.crops.image_idx.tolist()) == set(opened.tolist())
    assert len(opened) == 2
    assert half.crops.labels == tuple(labels[i] for i in half.crops.image_idx)


def test_an_image_of_two_defects_of_one_class_is_searched_once_and_of_two_classes_refused(tmp_path, models) -> None:
    image = noise(tmp_path / "a.png")
    one, two = mask(tmp_path / "1.png", 0, 0, 4, 4), mask(tmp_path / "2.png", 50, 50, 54, 54)
    found = searched(models, OPEN, [Sample(image, "spot", one), Sample(image, "spot", two)], progress=quiet)
    assert found.labels == ("spot",)
    with pytest.raises(ConfigError, match=r"1 images show defects of several classes, the first is .*a.png"):
        searched(models, OPEN, [Sample(image, "spot", one), Sample(image, "line", two)], progress=quiet)


# ---- on disk ----


def test_crops_come_back_from_disk_as_they_were(tmp_path) -> None:
    crops = Crops(np.eye(3, dtype=np.float32), ("a", "b", "b"), np.array([0, 0, 4]), np.array([9, 8, 7]), {"a": 1}, {})
    labelled_crops.save(crops, tmp_path / "crops.npz")
    back = labelled_crops.load(tmp_path / "crops.npz")
    assert (back.labels, back.n_planted, back.n_found) == (crops.labels, crops.n_planted, crops.n_found)
    for name in ("features", "image_idx", "area_px"):
        assert np.array_equal(getattr(back, name), getattr(crops, name))
        assert getattr(back, name).dtype == getattr(crops, name).dtype
    assert back.views == ()


def test_kept_crops_come_back_from_disk_too_and_older_files_have_none(tmp_path, models) -> None:
    crops = labelled_crops.collect(models, Recipe(), n_images=4, first_seed=0, progress=quiet)
    assert len(crops.views) == len(crops.labels) > 0
    path = tmp_path / "crops.npz"
    labelled_crops.save(crops, path)
    back = labelled_crops.load(path)
    for kept, given in zip(back.views, crops.views, strict=True):
        assert np.array_equal(kept.crop, given.crop)
        assert np.array_equal(kept.size, given.size)
    with np.load(path) as file:
        older = {name: file[name] for name in file.files if name != "shard"}
    np.savez(path, **older)
    assert labelled_crops.load(path).views == ()


# ---- a head of them ----


def test_fitted_head_brings_its_crops_into_the_repository_that_is_built_of_it(
    tiny_repository, tmp_path, monkeypatch
) -> None:
    collect = labelled_crops.collect

    def of_two_classes(*args: Any, **kwargs: Any) -> Crops:
        crops = collect(*args, **kwargs)
        return replace(crops, labels=tuple("ab"[i % 2] for i in range(len(crops.labels))))

    monkeypatch.setattr(labelled_crops, "collect", of_two_classes)
    out = tmp_path / "weights" / "head.safetensors"
    head_run.fit_default(tiny_repository, out, encoder_form="tiny", n_images=24, seed=0, progress=quiet)
    bank, golden = (head_bank.read(out.with_suffix(f".{name}")) for name in (head_bank.BANK, head_bank.GOLDEN))
    (shard,) = {ref.shard for ref in (*bank.crops, *golden.crops) if ref is not None}
    assert None not in (*bank.crops, *golden.crops)
    assert file_sha256(out.with_suffix(head_run.CROPS_SUFFIX)) == shard
    repository = tmp_path / "repository"
    build_repository._place_crops(repository, out.with_suffix(head_run.CROPS_SUFFIX), bank, golden)
    with Embedded(tiny_repository, models=("encoder",), threads=1) as models:
        for kept in (bank, golden):  # features and soft masks are kept in half precision
            again = encoded_again(kept, repository, models).features
            assert np.abs(again - kept.features).max() < 2e-3 * np.abs(kept.features).max()


def test_crops_beside_another_head_are_refused(tmp_path) -> None:
    shard, bank = tmp_path / "head.crops.npz", head_bank.empty(3)
    build_repository._place_crops(tmp_path / "repository", shard, bank)  # none beside this head
    view = KeptCrop(np.zeros((8, 8), np.uint8), np.zeros((2, 2), np.float32), np.zeros(2, np.float32))
    shard.write_bytes(crop_store.encode([view]))
    with pytest.raises(ConfigError, match="holds other crops than this head was fitted on"):
        build_repository._place_crops(tmp_path / "repository", shard, bank)
    assert not (tmp_path / "repository").exists()
