import dataclasses
import os
from dataclasses import replace
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest

from factories import KINDS, make_page, make_review, make_verdict
from paths import DATA
from semwatch.defects import Domain, PageReview, Quality, QualityFlag, Reference, ScoreMap
from semwatch.store import overlay

APPROVED = Path(__file__).with_name("approved_overlay.png")
SIZES = [(1, 1), (1, 900), (900, 1), (24, 700), (64, 64), (333, 511), (512, 512), (1024, 1024), (700, 2048), (2500, 90)]


def colourfulness(picture: np.ndarray) -> np.ndarray:
    return np.asarray(picture.max(axis=2).astype(int) - picture.min(axis=2))


def test_clean_page_stays_gray_above_the_legend() -> None:
    page = make_review(0, size_hw=(1024, 1024)).pages[0]
    picture = overlay.draw(page)
    assert (picture[: -overlay.STRIP_PX] == page.micrograph.pixels[..., None]).all()


def test_clean_page_has_no_colour_at_all_and_is_stored_as_gray() -> None:
    picture = overlay.draw(make_review(0, size_hw=(1024, 1024)).pages[0], caption="recipe")
    assert colourfulness(picture).max() == 0
    data = overlay.encode_png(picture)
    assert imagecodecs.png_decode(data).ndim == 2
    assert np.array_equal(np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)), picture)


def test_noise_of_a_clean_page_is_not_stretched_into_heat() -> None:
    rng = np.random.default_rng(0)
    for level in (1e-6, 0.1):
        values = (level * rng.random((32, 32))).astype(np.float32)
        page = dataclasses.replace(make_review(0).pages[0], score_map=ScoreMap(values, float(values.max())))
        assert colourfulness(overlay.draw(page)[: -overlay.STRIP_PX]).max() == 0


def test_heat_lies_where_the_score_is_hot_and_nowhere_else() -> None:
    values = np.full((32, 32), 0.1, np.float32)
    values[4, 24] = 0.6
    page = dataclasses.replace(make_review(0, size_hw=(1024, 1024)).pages[0], score_map=ScoreMap(values, 0.6))
    ys, xs = np.nonzero(colourfulness(overlay.draw(page)[: -overlay.STRIP_PX]) > 0)
    assert abs(ys.mean() - 4.5 * 32) < 4
    assert abs(xs.mean() - 24.5 * 32) < 4
    assert np.ptp(ys) < 4 * 32
    assert np.ptp(xs) < 4 * 32


@pytest.mark.parametrize(("n_defects", "hottest", "is_coloured"), [(0, 0.1, False), (0, 0.6, True), (1, 0.1, True)])
def test_gauge_has_colours_where_the_page_may_have(n_defects: int, hottest: float, is_coloured: bool) -> None:
    values = np.full((32, 32), hottest, np.float32)
    page = dataclasses.replace(make_review(n_defects).pages[0], score_map=ScoreMap(values, hottest))
    gauge = overlay.draw(page)[-overlay.STRIP_PX :][8:18, 8 : 8 + overlay.GAUGE_PX]
    assert (colourfulness(gauge).max() > 0) == is_coloured


def test_heat_stays_inside_the_field() -> None:
    page = make_review(0, size_hw=(1024, 1024), info_bar_px=100).pages[0]
    hot = dataclasses.replace(page, score_map=ScoreMap(np.full((32, 32), 0.6, np.float32), 0.6))
    colour = colourfulness(overlay.draw(hot)[: -overlay.STRIP_PX])
    assert (colour[:924] > 0).all()
    assert colour[924:].max() == 0


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize("n_defects", [0, 5])
def test_any_page_size_gives_a_picture_of_bounded_size(size_hw: tuple[int, int], n_defects: int) -> None:
    verdicts = [make_verdict(kind) for kind in KINDS]
    picture = overlay.draw(make_review(n_defects, size_hw=size_hw, verdicts=verdicts).pages[0], caption="recipe")
    H, W = picture.shape[:2]
    assert picture.dtype == np.uint8
    assert overlay.MIN_WIDTH_PX <= W <= overlay.MAX_SIDE_PX
    assert H - overlay.STRIP_PX <= overlay.MAX_SIDE_PX


def test_page_is_not_changed_by_drawing_on_it() -> None:
    page = make_review(3, size_hw=(1024, 1024)).pages[0]
    pixels, mask = page.micrograph.pixels.copy(), page.mask.copy()
    overlay.draw(page)
    assert (page.micrograph.pixels == pixels).all()
    assert (page.mask == mask).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_verdict_shows_its_colour_in_image_and_legend(kind: str) -> None:
    verdict = make_verdict(kind)  # type: ignore[arg-type]
    picture = overlay.draw(make_review(1, size_hw=(1024, 1024), verdicts=[verdict]).pages[0])
    colour = np.array(overlay.COLOURS[verdict.kind])
    assert (picture[: -overlay.STRIP_PX] == colour).all(axis=2).sum() > 500
    near = np.abs(picture[-overlay.STRIP_PX :].astype(int) - colour).max(axis=2) < 30
    assert near.sum() > 20


def test_legend_says_that_the_process_is_unknown() -> None:
    def yellow(domain: Domain) -> int:
        strip = overlay.draw(make_review(0, domain=domain).pages[0])[-overlay.STRIP_PX :].astype(int)
        return int((np.abs(strip - overlay.COLOURS["unknown"]).max(axis=2) < 30).sum())

    assert yellow("unknown process") > 100
    assert yellow("known process") == yellow("not judged") == 0


def test_labels_say_number_verdict_and_confidence() -> None:
    verdicts = [make_verdict("known", "particle"), make_verdict("unknown"), make_verdict("non-decidable", "a", "b")]
    page = make_review(4, verdicts=[*verdicts, make_verdict("defect-free")]).pages[0]
    said = [overlay.label_of(defect) for defect in page.defects]
    assert said == ["1 particle 0.93", "2 unknown", "3 non-decidable a | b", "4 defect-free 0.88"]


def test_plate_stays_inside_and_avoids_what_is_taken() -> None:
    plate = overlay._place((0, 0, 10, 10), 80, (200, 300), [])
    assert min(plate) >= 0
    assert overlay._overlap(plate, (0, 0, 10, 10)) == 0
    other = overlay._place((0, 0, 10, 10), 80, (200, 300), [plate])
    assert overlay._overlap(other, plate) == 0
    x0, y0, x1, y1 = overlay._place((290, 190, 300, 200), 80, (200, 300), [])
    assert (x0 >= 0, y0 >= 0, x1 <= 300, y1 <= 200) == (True,) * 4


def test_very_long_label_is_cut_to_the_image() -> None:
    page = make_review(1, verdicts=[make_verdict("known", "x" * 500)]).pages[0]
    picture = overlay.draw(page, caption="c" * 500)
    assert picture.shape[1] <= overlay.MAX_SIDE_PX
    assert overlay._text_width(overlay._shortened("x" * 500, 100)) <= 100


@pytest.mark.parametrize("pixel_nm", [None, float("nan"), float("inf"), 0.0, -1.0, 1e-2, 2.5, 1e5])
def test_scale_bar_takes_any_pixel_size(pixel_nm: float | None) -> None:
    strips = [overlay.draw(make_review(1, pixel_nm=nm).pages[0])[-overlay.STRIP_PX :] for nm in (None, pixel_nm)]
    has_bar = pixel_nm is not None and 0 < pixel_nm < float("inf")
    assert (strips[0] != strips[1]).any() == has_bar


@pytest.mark.parametrize(
    ("at_most", "length"), [(1, 1), (1.99, 1), (2, 2), (49, 20), (50, 50), (999, 500), (1000, 1000)]
)
def test_scale_bar_has_a_round_length(at_most: float, length: float) -> None:
    assert overlay._round_length(at_most) == pytest.approx(length)


def test_scale_bar_is_as_long_as_it_says() -> None:
    strip = overlay.draw(make_review(0, size_hw=(2048, 2048), pixel_nm=2.5).pages[0])[-overlay.STRIP_PX :]
    bar = (strip[33:37, -300:] == 255).all(axis=(0, 2))
    assert bar.sum() == 1000 / (2.5 * 2)  # 1 um at 5 nm to the pixel: a fifth of the width holds 1024 nm


@pytest.mark.parametrize("gate", [0.0, 1e-12, 1.99])
def test_gate_at_its_limits_draws(gate: float) -> None:
    assert overlay.draw(dataclasses.replace(make_review(1).pages[0], gate_threshold=gate)).any()


def test_score_map_finer_than_the_picture_draws() -> None:
    page = make_review(1, size_hw=(8, 8)).pages[0]
    fine = dataclasses.replace(page, score_map=ScoreMap(np.full((2000, 2000), 0.6, np.float32), 0.6))
    assert colourfulness(overlay.draw(fine)).max() > 50


def test_many_defects_are_numbered_only() -> None:
    n = overlay.MAX_NAMED + 6
    page = make_review(n, size_hw=(1024, 1024)).pages[0]
    assert len(page.defects) == n
    assert overlay.draw(page).shape[1] == 1024


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 7), (5, 1), (200, 333)])
def test_png_is_read_back_the_same_by_two_decoders(size_hw: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    data = overlay.encode_png(picture)
    assert np.array_equal(np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)), picture)
    assert (imagecodecs.png_decode(data)[..., ::-1] == picture).all()


def test_tiles_of_nothing_are_one_dark_tile() -> None:
    assert overlay.tile([], columns=4, tile_px=50).shape == (50, 50, 3)


def test_tiles_fill_rows_and_keep_proportions() -> None:
    wide = np.full((10, 40, 3), 255, np.uint8)
    sheet = overlay.tile([wide, None, wide], columns=2, tile_px=64)
    assert sheet.shape == (128, 128, 3)
    assert (sheet[:64, :64] == 255).all(axis=2).sum() == 60 * 15
    assert (sheet[:64, 64:] == overlay.STRIP).all()
    assert (sheet[64:, 64:] == overlay.STRIP).all()


@pytest.mark.skipif(not (DATA / "MTD").is_dir(), reason="no test data")
def test_real_picture_stays_itself_away_from_its_defect() -> None:
    image = next((DATA / "MTD" / "MT_Crack" / "Imgs").glob("*.jpg"))
    pixels = cv2.imread(str(image), cv2.IMREAD_GRAYSCALE)
    truth = cv2.imread(str(image.with_suffix(".png")), cv2.IMREAD_GRAYSCALE)
    assert pixels is not None
    assert truth is not None
    picture = overlay.draw(make_page(pixels.astype(np.uint8), truth > 127))[: -overlay.STRIP_PX]
    assert 0.001 < (colourfulness(picture) > 8).mean() < 0.5


def test_page_without_image_says_so_and_has_no_heat() -> None:
    page = make_review(0).pages[0]
    blank = replace(page, score_map=None, quality=Quality((QualityFlag("blank", 0.0, 2.0),), is_image=False))
    picture = overlay.draw(blank)
    red = (picture[..., 2].astype(int) - picture[..., 1] > 60) & (picture[..., 2].astype(int) - picture[..., 0] > 60)
    assert not red[: -overlay.STRIP_PX].any()
    assert red[-overlay.STRIP_PX :].any()


def test_flag_of_a_bad_image_stands_in_the_legend() -> None:
    page = make_review(1).pages[0]
    flagged = replace(page, quality=Quality((QualityFlag("defocus", 6.0, 4.0),)))
    plain, said = overlay.draw(page), overlay.draw(flagged)
    assert np.array_equal(plain[: -overlay.STRIP_PX], said[: -overlay.STRIP_PX])
    assert not np.array_equal(plain, said)


def test_page_with_a_reference_has_three_panels_of_one_size() -> None:
    page = make_review(1, size_hw=(512, 700), info_bar_px=40).pages[0]
    field = page.micrograph.field
    overlap = np.ones(field.shape, np.bool_)
    overlap[:, :70] = False
    met = Reference("a_ref.tif", "", (70.0, 0.0), 0.97, field.copy(), overlap)
    alone, compared = overlay.draw(page), overlay.draw(dataclasses.replace(page, reference=met))
    assert compared.shape == (alone.shape[0], 3 * 700 + 2 * overlay.GAP_PX, 3)
    left = 700 + overlay.GAP_PX
    assert (compared[100:400, left : left + 60] == overlay.STRIP[0]).all()  # no counterpart
    box = page.defects[0].box_xyxy
    spot = (slice(box[1] + 8, box[3] - 8), slice(left + box[0] + 8, left + box[2] - 8))
    assert np.array_equal(compared[spot][..., 0], field[box[1] + 8 : box[3] - 8, box[0] + 8 : box[2] - 8])


def test_page_judged_alone_says_why_in_the_strip() -> None:
    page = make_review(0, size_hw=(700, 700)).pages[0]
    alone, said = (
        overlay.draw(one) for one in (page, dataclasses.replace(page, reference=Reference("r.tif", "no texture")))
    )
    assert said.shape == alone.shape
    assert not np.array_equal(said[-overlay.STRIP_PX :], alone[-overlay.STRIP_PX :])


def with_everything() -> PageReview:
    """A page with every kind of verdict on a pattern, heat, and a reference that covers a part of the field."""
    page = make_review(5, size_hw=(260, 400), verdicts=[make_verdict(kind) for kind in KINDS], pixel_nm=2.5).pages[0]
    H, W = page.micrograph.field.shape
    y, x = np.mgrid[:H, :W]
    ground = np.where((x // 12 + y // 40) % 2, 90, 150).astype(np.uint8)
    aligned = np.roll(ground, 1, axis=1)
    aligned[60:90, 100:140] += 40
    page.micrograph.field[:] = ground
    overlap = np.broadcast_to(x > 20, (H, W))
    values = np.full((32, 48), 0.1, np.float32)
    values[5:8, 20:24] = (0.2, 0.3, 0.45, 0.6)
    reference = Reference("ref_07.tif", "", (1.0, 0.0), 0.97, aligned, overlap)
    return replace(page, reference=reference, score_map=ScoreMap(values, 0.6), gate_threshold=0.25)


def test_picture_of_a_page_with_everything_looks_as_it_was_approved() -> None:
    """Look at the picture after a change of the drawing, then write it anew: ``SEMWATCH_APPROVE=1``."""
    picture = overlay.draw(with_everything(), caption="recipe 1")
    if os.environ.get("SEMWATCH_APPROVE"):
        APPROVED.write_bytes(overlay.encode_png(picture))
    approved = np.asarray(cv2.imread(str(APPROVED), cv2.IMREAD_COLOR))
    assert picture.shape == approved.shape
    # Processors round a blend by one level; a line that is a pixel wider changes hundreds of pixels by tens.
    assert (cv2.absdiff(picture, approved).max(axis=2) > 3).sum() < 10
