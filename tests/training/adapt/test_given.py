"""What a user gives is read and checked before anything slow begins."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.adapt import given


def save(path: Path, seed: int, hw: tuple[int, int] = (64, 96)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, hw, np.uint8))
    return path


def read(top: Path, *, reference: str | None = None) -> given.Given:
    labels = top / "labels"
    return given.read(top / "normals", labels if labels.exists() else None, reference, progress=lambda *_: None)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for seed in range(20):
        save(tmp_path / "normals" / f"{seed}.png", seed)
    return tmp_path


def test_enough_normals_of_one_size_need_no_note(top) -> None:
    found = read(top)
    assert (len(found.normals), len(found.fields), found.labelled, found.notes) == (20, 20, (), ())


def test_no_normal_image_is_refused(tmp_path) -> None:
    (tmp_path / "normals").mkdir()
    with pytest.raises(ConfigError, match="holds no image"):
        read(tmp_path)


@pytest.mark.parametrize(("n", "promise", "is_too_few"), [(1, "50%", True), (5, "17%", False)])
def test_few_normals_are_taken_with_what_they_can_promise(tmp_path, n, promise, is_too_few) -> None:
    for seed in range(n):
        save(tmp_path / "normals" / f"{seed}.png", seed)
    (note,) = read(tmp_path).notes
    assert f"cannot promise a false alarm rate under {promise}" in note
    assert "give 19 or more" in note
    assert ("no statistics of places" in note) is is_too_few


def test_two_sizes_are_noted(top) -> None:
    save(top / "normals" / "large.png", 99, (128, 192))
    (note,) = read(top).notes
    assert "several sizes, 96 x 64 (20), 192 x 128 (1)" in note


def test_labels_of_one_class_and_a_class_of_one_image_are_noted(top) -> None:
    for seed in range(3):
        save(top / "labels" / "void" / f"{seed}.png", 100 + seed)
    save(top / "labels" / "open" / "a.png", 200)
    found = read(top)
    assert [sample.label for sample in found.labelled] == ["void"] * 3
    assert any("open: a single labelled image, left out" in note for note in found.notes)
    assert any("all labels say 'void'" in note for note in found.notes)


def test_label_that_means_defect_free_is_no_class_of_its_own(top) -> None:
    save(top / "labels" / "CLEAN_LAYER" / "a.png", 100)
    for seed in range(2):
        save(top / "labels" / "void" / f"{seed}.png", 200 + seed)
    assert {sample.label for sample in read(top).labelled} == {DEFECT_FREE, "void"}


def test_one_picture_under_two_labels_is_refused_with_both(top) -> None:
    for label in ("void", "open"):
        save(top / "labels" / label / "a.png", 100)
        save(top / "labels" / label / "b.png", 200 + len(label))
    with pytest.raises(ConfigError, match=r"a\.png \(open\) and .*a\.png \(void\) show the same pixels under two lab"):
        read(top)


def test_references_beside_labelled_images_count_as_normals(top) -> None:
    for seed in range(2):
        save(top / "labels" / "void" / f"{seed}.png", 100 + seed)
        save(top / "labels" / "void" / f"{seed}_ref.png", 200 + seed)
    found = read(top, reference="*_ref")
    assert [sample.image.name for sample in found.labelled] == ["0.png", "1.png"]
    assert len(found.normals) == 22
