"""People's verdicts on the overlay: beside the model's, changed, taken back, and left out of strange pictures."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from factories import make_review, make_verdict
from semwatch.defects import Review
from semwatch.store import corrections, overlay, people_overlay, results
from semwatch.store.corrections import Correction

T0 = "2026-01-01T00:00:00Z"
KINDS = [make_verdict("known", "particle"), make_verdict("unknown"), make_verdict("known", "bridge")]


def reviewed(folder: Path, review: Review | None = None) -> tuple[Path, Path]:
    """A result and its overlay."""
    written = results.write(review or make_review(3, verdicts=KINDS), results_dir=folder)
    return written.json, written.overlays[0]


def corrected(path: Path, *given: Correction) -> results.ReviewRecord:
    after = results.change(path, lambda before: corrections.corrected(before, given, by="ana", utc=T0))
    results.show_people(path)
    return after


def pixels(path: Path) -> np.ndarray:
    return cv2.imread(str(path))


def test_verdict_is_drawn_beside_the_models_and_covers_none_of_its_names(tmp_path: Path) -> None:
    path, picture = reviewed(tmp_path)
    before = pixels(picture)
    record = corrected(path, Correction(0, "void", 1), Correction(0, None, 3))
    after = pixels(picture)
    assert after.shape == before.shape
    assert np.array_equal(pixels(people_overlay.of_models(picture)), before)
    changed = (before != after).any(axis=2)
    assert 200 < changed.sum() < 0.2 * changed.size
    page = record.pages[0]
    area, offset, scale = overlay.placed(before, (page.height_px, page.width_px))
    boxes = [overlay.scaled_box(d.box_xyxy, scale, area, offset) for d in page.defects]
    for x0, y0, x1, y1 in overlay.plates_of(page.defects, boxes, area):
        assert not changed[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].any()


def test_verdict_that_changes_is_drawn_anew_and_one_taken_back_leaves_no_trace(tmp_path: Path) -> None:
    path, picture = reviewed(tmp_path)
    before = picture.read_bytes()
    corrected(path, Correction(0, "a very long name of a class of defects", 2))
    long = picture.read_bytes()
    corrected(path, Correction(0, "pit", 2))
    short = picture.read_bytes()
    assert len({before, long, short}) == 3
    corrected(path, Correction(0, "a very long name of a class of defects", 2))
    assert picture.read_bytes() == long
    results.change(path, corrections.without_people)
    results.show_people(path)
    assert np.array_equal(cv2.imdecode(np.frombuffer(before, np.uint8), 1), pixels(picture))
    assert not people_overlay.of_models(picture).exists()


def test_missed_defect_has_a_box_of_its_own(tmp_path: Path) -> None:
    path, picture = reviewed(tmp_path, make_review(0))
    before = pixels(picture)
    corrected(path, Correction(0, "pit", box_xyxy=(40, 60, 90, 100)))
    changed = np.argwhere((pixels(picture) != before).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    scale = 768 / 256  # 256 px are shown three times as large
    assert left <= 40 * scale <= 90 * scale <= right
    assert top <= 60 * scale <= 100 * scale <= bottom


def test_review_that_is_repeated_draws_over_its_own_new_picture(tmp_path: Path) -> None:
    path, picture = reviewed(tmp_path)
    corrected(path, Correction(0, "void", 1))
    first = pixels(picture)
    other = make_review(3, verdicts=[make_verdict("unknown")])
    reviewed(tmp_path, other)
    record = results.read(path)
    assert record.pages[0].defects[0].human is not None  # carried over
    assert not np.array_equal(pixels(picture), first)
    fresh = overlay.draw(other.pages[0], caption=results._caption(other))
    assert np.array_equal(pixels(people_overlay.of_models(picture)), fresh)


@pytest.mark.parametrize("strange", [b"", b"no picture", None])
def test_result_without_an_overlay_of_ours_is_corrected_all_the_same(tmp_path: Path, strange: bytes | None) -> None:
    path, picture = reviewed(tmp_path)
    if strange is None:
        picture.unlink()
    else:
        picture.write_bytes(strange)
    assert corrected(path, Correction(0, "void", 1)).pages[0].defects[0].human is not None
    assert (picture.read_bytes() if picture.exists() else None) == strange


def test_picture_of_another_size_is_left_alone(tmp_path: Path) -> None:
    path, picture = reviewed(tmp_path)
    foreign = cv2.imencode(".png", np.zeros((100, 900, 3), np.uint8))[1].tobytes()
    picture.write_bytes(foreign)
    corrected(path, Correction(0, "void", 1))
    assert picture.read_bytes() == foreign


@pytest.mark.parametrize("size_hw", [(1, 1), (37, 900), (2048, 1024), (512, 512)])
def test_any_size_of_page(tmp_path: Path, size_hw: tuple[int, int]) -> None:
    review = make_review(0, size_hw=size_hw)
    path, picture = reviewed(tmp_path, review)
    before = pixels(picture)
    corrected(path, Correction(0, "pit", box_xyxy=(0, 0, size_hw[1], size_hw[0])))
    assert not np.array_equal(pixels(picture), before)


def test_names_of_kept_pictures_go_with_their_image(tmp_path: Path) -> None:
    path, picture = reviewed(tmp_path)
    corrected(path, Correction(0, "void", 1))
    reviewed(tmp_path, make_review(3, verdicts=KINDS, seed=5))  # other content under the same name
    names = sorted(p.name for p in picture.parent.iterdir() if "overlay" in p.name)
    assert len(names) == 3
    assert sum(".model." in name for name in names) == 1
    assert all(name != people_overlay.of_models(picture).name for name in names)
