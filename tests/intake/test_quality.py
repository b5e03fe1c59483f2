"""Is there an image, and a good one: synthetic degradations are found, and ordinary images are left in peace."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from semwatch.defects import Micrograph, Quality
from semwatch.errors import ImageError
from semwatch.intake import decoding, quality
from semwatch.intake.info_bar import is_only_bar
from semwatch.settings.recipe import QualityRule
from semwatch_training.synthetic import STAGES, lot_images, render
from semwatch_training.synthetic.info_bar import draw_info_bar

RULE = QualityRule()
Gray = NDArray[np.uint8]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def gray(values: NDArray[np.floating]) -> Gray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def judge(field: Gray) -> Quality:
    return quality.judge(field, RULE)


def names(field: Gray) -> list[str]:
    return [flag.name for flag in judge(field).flags]


def lines(size_hw: tuple[int, int] = (384, 384), pitch: int = 96, noise: float = 6.0) -> Gray:
    """Vertical lines with beam-soft edges and noise."""
    H, W = size_hw
    signal = np.repeat(80 + 90 * (np.arange(W) // (pitch // 2) % 2)[None].astype(np.float32), H, axis=0)
    return gray(cv2.GaussianBlur(signal, (0, 0), 1.0) + rng().normal(0, noise, (H, W)))


def bare(size_hw: tuple[int, int] = (384, 384), level: float = 110, noise: float = 5.0) -> Gray:
    """A bare wafer: slow shading and noise, nothing else."""
    H, W = size_hw
    shading = np.linspace(-15, 15, W)[None] + np.linspace(-8, 8, H)[:, None]
    return gray(level + shading + rng().normal(0, noise, (H, W)))


def text_page(height: int = 96) -> Gray:
    bar = draw_info_bar(1024, 2.5, "2026-01-05", "TLD", dark=True)
    return np.vstack([bar] * (height // len(bar) + 1))[:height]


# --- no image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
@pytest.mark.parametrize("size_hw", [(1, 1), (2, 70), (64, 64), (300, 500)])
def test_field_of_one_level_is_no_image(level: int, size_hw: tuple[int, int]) -> None:
    found = judge(np.full(size_hw, level, np.uint8))
    assert not found.is_image
    assert [flag.name for flag in found.flags] == ["blank"]
    assert found.flags[0].measure == 0


@pytest.mark.parametrize("level", [0, 255])
def test_dark_or_white_noise_with_hot_pixels_is_no_image(level: int) -> None:
    field = gray(level + rng().normal(0, 1.5, (512, 512)))
    field[rng(1).integers(0, 512, 40), rng(2).integers(0, 512, 40)] = 255 - level
    assert not judge(field).is_image


def test_gray_frame_whose_noise_does_not_show_is_no_image() -> None:
    assert not judge(gray(rng().normal(128, 0.2, (512, 512)))).is_image


@pytest.mark.parametrize("noise", [1.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("level", [30, 110, 220])
def test_bare_wafer_with_noise_is_an_image(level: int, noise: float) -> None:
    flat = gray(rng().normal(level, noise, (512, 512)))
    assert judge(flat).is_image
    assert judge(bare(level=level, noise=noise)) == Quality()


@pytest.mark.parametrize("side", [3, 6, 20])
def test_particle_on_black_is_an_image(side: int) -> None:
    field = np.zeros((512, 512), np.uint8)
    field[200 : 200 + side, 300 : 300 + side] = 200
    assert judge(field).is_image


def test_page_that_is_an_info_bar_alone_is_no_image() -> None:
    for page in (text_page(), text_page(200), 255 - text_page()):
        found = judge(page)
        assert not found.is_image
        assert [flag.name for flag in found.flags] == ["info-bar"]


def test_bar_below_a_black_field_is_no_image() -> None:
    bar = text_page(40)
    assert not judge(np.vstack([np.zeros((600, bar.shape[1]), np.uint8), bar])).is_image


def test_particle_above_a_bar_is_an_image() -> None:
    bar = text_page(40)
    page = np.vstack([np.zeros((600, bar.shape[1]), np.uint8), bar])
    page[300:320, 400:420] = 220
    assert not is_only_bar(page)
    assert judge(page).is_image


def test_contacts_and_fibres_on_black_are_an_image() -> None:
    contacts = np.zeros((400, 400), np.uint8)
    for y in range(20, 400, 40):
        for x in range(20, 400, 20):
            cv2.circle(contacts, (x, y), 6, 230, cv2.FILLED)
    fibres = np.zeros((400, 400), np.uint8)
    for x0, y0, x1, y1 in rng().integers(0, 400, (60, 4)).tolist():
        cv2.line(fibres, (x0, y0), (x1, y1), 220, 2)
    assert judge(contacts).is_image
    assert judge(fibres).is_image


# --- bad images ----------------------------------------------------------------------------------------------------


def jittered(field: Gray, sigma_px: float) -> Gray:
    H, W = field.shape
    shift = rng(3).normal(0, sigma_px, (H, 1))
    across = (np.arange(W)[None] + shift).astype(np.float32)
    down = np.repeat(np.arange(H, dtype=np.float32)[:, None], W, axis=1)
    return np.asarray(cv2.remap(field, across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.uint8)


DEGRADED: dict[str, Callable[[Gray], Gray]] = {
    "defocus": lambda f: gray(cv2.GaussianBlur(f.astype(np.float32), (0, 0), 6) + rng(4).normal(0, 3, f.shape)),
    "streaks": lambda f: gray(f + rng(5).normal(0, 18, (len(f), 1))),
    "drift": lambda f: jittered(f, 1.5),
    "saturated": lambda f: gray((f.astype(float) - 100) * 20),
    "faint": lambda f: gray(100 + (f.astype(float) - 100) * 0.03),
}


@pytest.mark.parametrize("name", DEGRADED)
def test_degradation_is_flagged_as_what_it_is_and_stays_an_image(name: str) -> None:
    found = judge(DEGRADED[name](lines()))
    assert found.is_image
    assert name in [flag.name for flag in found.flags]
    for flag in found.flags:
        assert flag.measure < flag.limit if flag.name == "faint" else flag.measure > flag.limit
        assert flag.name in found.in_words


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0, 8.0])
def test_blur_is_told_in_pixels(sigma: float) -> None:
    step = np.zeros((384, 384), np.float32)
    step[:, 100:] = 150
    step[:, 300:] = 60
    soft = gray(40 + cv2.GaussianBlur(step, (0, 0), sigma) + rng().normal(0, 2, step.shape))
    tiles = quality._tiles(soft)
    assert quality._blur_px(tiles, quality._noise(tiles)) == pytest.approx(sigma, abs=0.2)


def test_partial_streaks_beside_bright_features_are_flagged() -> None:
    field = lines().astype(np.float32)
    random = rng(6)
    for y in np.flatnonzero(random.random(len(field)) < 0.4):
        field[y, random.integers(0, 192) :] += random.choice([-1, 1]) * 50
    assert "streaks" in names(gray(field))


@pytest.mark.parametrize("pitch", [4, 6, 12, 24, 80])
def test_lines_along_either_axis_are_no_streaks(pitch: int) -> None:
    field = lines(pitch=pitch)
    assert names(field) == []
    assert names(np.ascontiguousarray(field.T)) == []


def test_soft_spot_on_a_bare_wafer_is_not_out_of_focus() -> None:
    spot = np.zeros((384, 384), np.float32)
    cv2.circle(spot, (190, 200), 30, 60, cv2.FILLED)
    assert names(gray(bare() + cv2.GaussianBlur(spot, (0, 0), 8))) == []


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
def test_noise_is_told_in_gray_levels(noise: float) -> None:
    tiles = quality._tiles(lines(noise=noise))
    rounding = 1 / 12
    assert quality._noise(tiles) == pytest.approx(np.sqrt(noise**2 + rounding), rel=0.12)


def test_limits_are_the_recipes() -> None:
    field = DEGRADED["defocus"](lines())
    assert quality.judge(field, QualityRule(max_blur_px=50.0)) == Quality()
    assert not quality.judge(lines(), QualityRule(blank_range=255.0)).is_image


@pytest.mark.parametrize("size_hw", [(1, 300), (300, 1), (20, 20), (40, 600), (97, 97), (64, 3000)])
def test_any_size_is_judged(size_hw: tuple[int, int]) -> None:
    assert judge(gray(rng().uniform(0, 255, size_hw))).is_image


# --- what the recipe does ------------------------------------------------------------------------------------------


def page(field: Gray) -> Micrograph:
    return Micrograph(field, (0, 0, field.shape[1], field.shape[0]), 2, None, None)


def test_quarantine_of_pages_without_image_is_a_reason_in_words() -> None:
    rule = QualityRule(no_image="quarantine")
    with pytest.raises(ImageError, match=r"page 2 holds no image: blank 0 \(limit 8\); see quality\.no_image"):
        quality.admit(page(np.zeros((100, 100), np.uint8)), rule)
    assert quality.admit(page(DEGRADED["defocus"](lines())), rule).flags


def test_quarantine_of_bad_images_is_a_reason_in_words() -> None:
    rule = QualityRule(bad_quality="quarantine")
    with pytest.raises(ImageError, match=r"page 2 is a bad image: .*defocus .*; see quality\.bad_quality"):
        quality.admit(page(DEGRADED["defocus"](lines())), rule)
    assert not quality.admit(page(np.zeros((100, 100), np.uint8)), rule).is_image
    assert quality.admit(page(lines()), rule) == Quality()


# --- nothing that is ordinary is flagged ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_synthetic_fields_of_every_stage_are_good_images(stage: str) -> None:
    for seed in range(3):
        assert judge(render(stage, seed=seed, size_hw=(512, 512)).pixels) == Quality()


def test_demonstration_lot_has_no_flag() -> None:
    for image in lot_images(n=12, seed=7, size_hw=(512, 512)):
        for micrograph in decoding.decode(image.content, name=image.name):
            assert judge(micrograph.field) == Quality(), image.name


def real_fields(data: Path, *folders: str) -> Iterator[tuple[str, Gray]]:
    for folder in folders:
        for file in sorted((data / "REAL-SEM" / folder).rglob("*")):
            if file.suffix in (".png", ".jpg", ".tif", ".bmp") and "ground_truth" not in file.parts:
                pixels = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
                assert pixels is not None
                yield file.name, np.asarray(pixels, np.uint8)


def test_real_images_are_images(data: Path) -> None:
    """Bare wafers at their own size and four times enlarged, wafers, patterned silicon, line-space."""
    n = 0
    for name, field in real_fields(data, "bare-wafer-52px", "wafer-review-480px", "normal-patterned-silicon"):
        enlarged = np.asarray(cv2.resize(field, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC), np.uint8)
        assert judge(field) == judge(enlarged) == Quality(), name
        n += 1
    for name, field in real_fields(data, "line-space-and-more/CLEAN_LAYER", "line-space-and-more/CLEAN_CRACK"):
        assert judge(field) == Quality(), name
        n += 1
    assert n > 150
