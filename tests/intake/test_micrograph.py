import io
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from image_files import (
    ALPHA,
    COLOR,
    GRAY,
    GRAY_RGB,
    RAMP,
    VALID,
    Gray,
    encoded,
    patched,
    png,
    sem,
    tiff,
    with_tag,
)
from paths import DATA
from semwatch.defects import Box, Micrograph
from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.intake import decoding
from semwatch.intake.info_bar import find_field


def only(data: bytes, **limits: int) -> Micrograph:
    (page,) = decoding.decode(data, name="a.tif", **limits)
    return page


# ---- what is not an image ----


@pytest.mark.parametrize("data", [b"", b"\0", b"MM", b"FileVersion 1 2;\n", b"PK\x03\x04" + bytes(99), b"BM", b"II*\0"])
def test_what_is_no_image_is_refused_with_name_and_remedy(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^lot/a\.tif: .*(copy|put)"):
        decoding.decode(data, name="lot/a.tif")


@pytest.mark.parametrize("form", VALID)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(form: str, share: float) -> None:
    data = VALID[form]
    with pytest.raises(ImageError, match="copy"):
        decoding.decode(data[: int(share * len(data))], name="x")


def test_two_page_tiff_cut_in_its_second_page_does_not_pass_as_one_page() -> None:
    data = tiff(GRAY, GRAY)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        second = file.pages[1].offset
    for cut, reason in (
        (second, "breaks off in the directory of page 1"),
        (second + 40, "breaks off"),
        (-9, "pixels are missing"),
    ):
        with pytest.raises(ImageError, match=reason):
            decoding.decode(data[:cut], name="x")


def test_cut_jpeg_is_refused_though_its_exif_thumbnail_has_an_end_marker() -> None:
    thumbnail = encoded(".jpg", GRAY[:16, :16])
    whole = VALID["jpeg"][:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + VALID["jpeg"][2:]
    assert only(whole).pixels.shape == GRAY.shape
    with pytest.raises(ImageError, match="no end marker"):
        decoding.decode(whole[:-200], name="x")


def test_png_with_a_flipped_bit_is_refused() -> None:
    data = VALID["png"]
    with pytest.raises(ImageError, match="damaged"):
        decoding.decode(patched(data, len(data) // 2, bytes([data[len(data) // 2] ^ 4])), name="x")


def test_png_whose_rows_are_fewer_than_its_header_says_is_refused() -> None:
    with pytest.raises(ImageError, match="cannot be decoded"):
        decoding.decode(png(64, 64, 8, 0, bytes(65) * 30), name="x")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_float_page_with_nan_or_infinity_is_refused(value: float) -> None:
    pixels = GRAY.astype(np.float32)
    pixels[3, 3] = value
    with pytest.raises(ImageError, match="NaN"):
        decoding.decode(tiff(pixels), name="x")


# ---- limits, held before anything is decoded ----

BOMBS = {
    "png": patched(VALID["png"], 16, struct.pack(">II", 60000, 60000)),
    "jpeg": patched(VALID["jpeg"], VALID["jpeg"].index(b"\xff\xc0") + 5, struct.pack(">HH", 60000, 60000)),
    "bmp": patched(VALID["bmp"], 18, struct.pack("<ii", 60000, -60000)),
    "tiff": with_tag(with_tag(VALID["LZW"], 256, 60000), 257, 60000),
}


@pytest.mark.parametrize("form", BOMBS)
def test_header_that_promises_too_many_pixels_is_refused(form: str) -> None:
    with pytest.raises(
        ImageError,
        match=r"60000 x 60000 px, 3600 million, over 67\.2; tile it or raise limits\.max_image_mpx in site\.yaml",
    ):
        decoding.decode(BOMBS[form], name="x")


@pytest.mark.parametrize("form", ["png", "jpeg", "bmp", "tiff"])
def test_header_without_pixels_is_refused(form: str) -> None:
    empty = {
        "png": patched(VALID["png"], 16, bytes(8)),
        "jpeg": patched(VALID["jpeg"], VALID["jpeg"].index(b"\xff\xc0") + 5, bytes(4)),
        "bmp": patched(VALID["bmp"], 18, bytes(8)),
        "tiff": with_tag(VALID["LZW"], 256, 0),
    }
    with pytest.raises(ImageError, match="under 32 px"):
        decoding.decode(empty[form], name="x")


def test_tile_that_promises_more_pixels_than_its_page_may_have_is_refused() -> None:
    with pytest.raises(ImageError, match="tiles of"):
        decoding.decode(with_tag(VALID["tiled JPEG"], 322, 2**30), name="x")
    data = VALID["tiled JPEG"]
    frame = data.index(b"\xff\xc0")
    with pytest.raises(ImageError, match="a JPEG tile of"):
        decoding.decode(patched(data, frame + 5, struct.pack(">HH", 60000, 60000)), name="x")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(".png", np.zeros((32, 3201), np.uint8)), "3201 x 32 px, one side over 100 times the other"),
        (
            patched(VALID["progressive"], len(VALID["progressive"]) - 2, b"\xff\xda" * 64 + b"\xff\xd9"),
            "scans, over 64",
        ),
        (
            tiff(np.zeros((32769, 400), np.uint8), rowsperstrip=1, compression="zlib"),
            "32769 strips or tiles, over 32768",
        ),
    ],
    ids=["aspect", "scans", "strips"],
)
def test_header_that_promises_too_much_work_is_refused_with_the_measure(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decoding.decode(data, name="x")


def test_bytes_of_a_page_count_as_they_are_decoded_not_as_they_are_gray() -> None:
    wide = tiff(np.zeros((64, 64, 4), np.float64), extrasamples=["unassalpha"])
    with pytest.raises(ImageError, match=r"64 x 64 px of 256 bits, 0 MB, over 0 MB; .*limits\.max_image_mpx"):
        decoding.decode(wide, name="x", max_pixels=64 * 64)
    assert only(wide, max_pixels=4 * 64 * 64).pixels.shape == (64, 64)


def test_bmp_whose_color_masks_would_divide_by_zero_is_refused() -> None:
    def bmp(*masks: int) -> bytes:
        head = struct.pack("<IHHI", 66 + 2 * 64 * 64, 0, 0, 66)
        info = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 16, 3, 0, 0, 0, 0, 0)
        return b"BM" + head + info + struct.pack("<III", *masks) + bytes(2 * 64 * 64)

    assert only(bmp(0xF800, 0x07E0, 0x001F)).pixels.shape == (64, 64)
    for masks in (
        (0, 0, 0),
        (0xF800, 0x07E0, 0),
        (0xF800, 0xF800, 0x1F),
        (0xA800, 0x07E0, 0x1F),
        (1 << 31, 0x7E0, 0x1F),
    ):
        with pytest.raises(ImageError, match="color masks"):
            decoding.decode(bmp(*masks), name="x")


@pytest.mark.parametrize("code", [256, 258, 273, 278])
def test_tag_of_another_type_or_number_than_writers_give_is_refused(code: int) -> None:
    data = with_tag(VALID["tiff"], code, 64)
    start = data.index(struct.pack("<HHI", code, 4, 1))
    for kind, n_values in ((2, 3), (5, 1), (4, 0)):
        with pytest.raises(ImageError, match=f"tag {code} holds {n_values} values of type {kind}"):
            decoding.decode(patched(data, start, struct.pack("<HHI", code, kind, n_values)), name="x")


def test_shortest_side_decides_what_is_too_small() -> None:
    assert only(encoded(".png", sem(64, 200))).pixels.shape == (64, 200)
    with pytest.raises(ImageError, match="200 x 31 px"):
        decoding.decode(encoded(".png", sem(31, 200)), name="x")


def test_largest_page_of_8192_px_is_read() -> None:
    page = only(encoded(".png", np.zeros((8192, 8192), np.uint8)))
    assert page.pixels.shape == (8192, 8192)
    assert page.field_xyxy == (0, 0, 8192, 8192)


def test_pages_beyond_the_limit_are_refused_not_left_out() -> None:
    data = tiff(*[GRAY] * 5)
    assert len(decoding.decode(data, name="x", max_pages=5)) == 5
    with pytest.raises(ImageError, match=r"more than 4 pages; split the file or raise limits\.max_pages in site\.yaml"):
        decoding.decode(data, name="x", max_pages=4)


def test_pixels_of_all_pages_together_are_limited() -> None:
    with pytest.raises(ImageError, match="together"):
        decoding.decode(tiff(GRAY, GRAY), name="x", max_total_pixels=2 * GRAY.size - 1)


def test_tiff_whose_pages_run_in_a_circle_is_refused() -> None:
    data = VALID["tiff"]
    start = struct.unpack_from("<I", data, 4)[0]
    (n_tags,) = struct.unpack_from("<H", data, start)
    with pytest.raises(ImageError, match="circle"):
        decoding.decode(patched(data, start + 2 + 12 * n_tags, struct.pack("<I", start)), name="x")


# ---- formats ----


@pytest.mark.parametrize(
    "data",
    [
        encoded(".png", GRAY),
        encoded(".png", GRAY_RGB),
        encoded(".png", np.dstack([GRAY_RGB, ALPHA])),
        encoded(".png", GRAY.astype(np.uint16) * 257),
        encoded(".bmp", GRAY),
        encoded(".bmp", GRAY_RGB),
        tiff(GRAY),
        tiff(GRAY_RGB),
        tiff(np.dstack([GRAY_RGB, ALPHA]), extrasamples=["unassalpha"]),
        tiff(np.dstack([GRAY, ALPHA]), photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
        tiff(GRAY_RGB.transpose(2, 0, 1).copy(), planarconfig="separate"),
        tiff(255 - GRAY, photometric="miniswhite"),
        tiff(GRAY, photometric="palette", colormap=RAMP),
        tiff(GRAY, order=">", bigtiff=True),
        tiff(GRAY, tile=(32, 48)),
        tiff(GRAY, rowsperstrip=7, compression="lzw"),
        tiff(GRAY, compression="zlib", predictor=True),
        tiff(GRAY, compression="packbits"),
        tiff(GRAY.astype(np.uint16)),
        tiff(GRAY.astype(">u2") * 256, order=">"),
        tiff(65535 - GRAY.astype(np.uint16) * 257, photometric="miniswhite"),
        tiff((GRAY.astype(np.int16) - 128).astype(np.int8)),
    ],
)
def test_8_bit_content_comes_out_as_it_went_in(data: bytes) -> None:
    page = only(data)
    np.testing.assert_array_equal(page.pixels, GRAY)
    assert page.pixels.dtype == np.uint8
    assert page.pixels.flags.c_contiguous
    assert page.field_xyxy == (0, 0, 80, 96)
    assert (page.page, page.pixel_nm, page.vendor) == (0, None, None)


@pytest.mark.parametrize("form", ["jpeg", "tiled JPEG"])
def test_jpeg_comes_out_close(form: str) -> None:
    assert np.abs(only(VALID[form]).pixels.astype(int) - GRAY).mean() < 3


@pytest.mark.parametrize("data", [encoded(".png", COLOR[..., ::-1]), encoded(".bmp", COLOR[..., ::-1]), tiff(COLOR)])
def test_color_becomes_luma(data: bytes) -> None:
    luma = COLOR @ [0.299, 0.587, 0.114]
    assert np.abs(only(data).pixels - luma).max() <= 1


def test_palette_png_becomes_luma_of_its_colors() -> None:
    rows = (b"\0" + bytes(range(64))) * 64
    page = only(png(64, 64, 8, 3, rows, (b"PLTE", bytes(3 * i // 3 for i in range(192)))))
    assert page.pixels[0].tolist() == [3 * i + 1 for i in range(64)]


def test_one_bit_page_becomes_black_and_white() -> None:
    assert np.unique(only(tiff(GRAY > 120)).pixels).tolist() == [0, 255]


def test_unread_compression_is_named_with_the_remedy() -> None:
    with pytest.raises(ImageError, match=r"compression 2\b.*save it uncompressed"):
        decoding.decode(with_tag(VALID["LZW"], 259, 2), name="x")


def test_every_page_becomes_a_micrograph_in_order_and_thumbnails_are_left_out() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as out:
        out.write(GRAY, photometric="minisblack", metadata=None)
        out.write(GRAY[:20, :20], photometric="minisblack", subfiletype=1, metadata=None)
        out.write(np.dstack([sem(128, 200)] * 3), photometric="rgb", metadata=None)
    first, navcam = decoding.decode(file.getvalue(), name="x")
    assert (first.page, first.pixels.shape) == (0, (96, 80))
    assert (navcam.page, navcam.pixels.shape) == (2, (128, 200))


def test_file_whose_only_page_calls_itself_a_thumbnail_is_read() -> None:
    np.testing.assert_array_equal(only(tiff(GRAY, subfiletype=1)).pixels, GRAY)


# ---- more than 8 bits ----


def test_wide_levels_are_stretched_between_the_percentiles_of_the_field() -> None:
    pixels = np.random.default_rng(0).integers(1000, 5000, (200, 200)).astype(np.uint16)
    pixels[0, :8] = 65535  # 0.02 % hot pixels
    page = only(encoded(".png", pixels))
    low, high = np.percentile(pixels, [0.1, 99.9])
    expected = ((pixels.astype(float).clip(low, high) - low) * 255 / (high - low)).round()
    assert np.abs(page.pixels - expected).max() <= 1


@pytest.mark.parametrize("kind", [np.uint32, np.int32, np.int16, np.float32, np.float64])
def test_number_type_does_not_change_the_gray_levels(kind: type) -> None:
    wide = np.random.default_rng(0).integers(1000, 30000, (100, 100))
    expected = only(tiff(wide.astype(np.uint16))).pixels.astype(int)
    assert np.abs(only(tiff(wide.astype(kind))).pixels - expected).max() <= 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("level", [0, 7, 200])
def test_constant_page_is_legal(kind: type, level: int) -> None:
    assert np.ptp(only(tiff(np.full((64, 64), level, kind))).pixels) == 0


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_single_bright_pixel_on_a_flat_page_stays_visible(kind: type) -> None:
    pixels: NDArray[Any] = np.full((100, 100), 1000, kind)
    pixels[50, 50] = 1100
    page = only(tiff(pixels))
    assert page.pixels[50, 50] - int(page.pixels[0, 0]) == 255


@pytest.mark.parametrize("top", [1e-300, 1e300])
def test_extreme_floats_are_stretched_like_any(top: float) -> None:
    assert np.ptp(only(tiff(GRAY * (top / 255))).pixels) == 255


# ---- files ----


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    for name, form in (("a.tif", "png"), ("a.I01", "two pages"), ("a", "bmp"), ("a.png", "jpeg")):
        (tmp_path / name).write_bytes(VALID[form])
        assert decoding.read(tmp_path / name)[0].pixels.shape == GRAY.shape


def test_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "big.tif").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match="over 1073741824; split"):
        decoding.read(tmp_path / "big.tif")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tif")
    for path in (tmp_path, tmp_path / "pipe.tif"):
        with pytest.raises(ImageError, match="not a regular file"):
            decoding.read(path)


def test_missing_file_is_the_files_fault_and_a_missing_folder_the_disks(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is gone"):
        decoding.read(tmp_path / "a.tif")
    with pytest.raises(ServiceUnavailable, match="mounted"):
        decoding.read(tmp_path / "lot7" / "a.tif")
    with pytest.raises(ServiceUnavailable, match="cannot be read now"):
        decoding.read(tmp_path / ("a" * 300))


# ---- vendor tags ----

REAL: dict[str, list[tuple[tuple[int, int], Box, float | None, str | None]]] = {
    "FEI-Helios-Ebeam-8bits.tif": [((471, 512), (0, 0, 512, 442), 3372.4, "FEI")],
    "FEI-Helios-Ebeam-16bits.tif": [((471, 512), (0, 0, 512, 442), 3372.4, "FEI")],
    "FEI-Helios-navcam.tif": [((551, 768), (0, 0, 768, 512), None, "FEI")],
    "FEI-Helios-navcam-with-no-IRBeam.tif": [((551, 768), (0, 0, 768, 512), None, "FEI")],
    "FEI-Helios-navcam-with-no-IRBeam-bad-floats.tif": [((551, 768), (0, 0, 768, 512), None, "FEI")],
    "ZEISS_SEM_multipage.tif": [((1536, 2048), (0, 0, 2048, 1536), 12.33, "Zeiss")] * 2,
    "test_tiff_Zeiss_SEM_1k.tif": [((768, 1024), (0, 0, 1024, 691), 2615.0, "Zeiss")],
    "test_tiff_Zeiss_SEM_512pix.tif": [((384, 512), (0, 0, 512, 350), 11.650, "Zeiss")],
    "olympus_SIS.tif": [
        ((101, 112), (0, 0, 112, 101), None, None),
        ((101, 112), (0, 0, 112, 101), 0.0239279, "Olympus"),
    ],
}


def check_real(pages: tuple[Micrograph, ...], name: str) -> None:
    assert len(pages) == len(REAL[name])
    for page, (size_hw, field, pixel_nm, vendor) in zip(pages, REAL[name], strict=True):
        assert (page.pixels.shape, page.field_xyxy, page.vendor) == (size_hw, field, vendor)
        assert page.pixel_nm == (None if pixel_nm is None else pytest.approx(pixel_nm, rel=1e-4))


@pytest.mark.parametrize("name", REAL)
def test_real_vendor_file_gives_pixel_size_and_field(name: str) -> None:
    path = DATA / "SEM-TIFF-metadata" / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    check_real(decoding.read(path), name)


@pytest.mark.parametrize("archive", ["tiff_FEI_Helios.zip", "tiff_Zeiss_SEM.zip"])
def test_zipped_vendor_files_give_the_same(archive: str) -> None:
    path = DATA / "SEM-TIFF-metadata" / archive
    if not path.exists():
        pytest.skip(f"needs {path}")
    with zipfile.ZipFile(path) as files:
        for name in files.namelist():
            check_real(decoding.decode(files.read(name), name=name), name)


def fei(tag: bytes, **options: Any) -> Micrograph:
    return only(tiff(GRAY, extratags=[(34682, 2, len(tag), tag, True)], **options))


@pytest.mark.parametrize("value", ["", "notafloat", "0", "-1e-9", "nan", "inf", "1e308", "True"])
def test_broken_pixel_size_is_unknown_and_no_error(value: str) -> None:
    page = fei(f"[Scan]\nPixelWidth={value}\n[Image]\nResolutionX={value}\nResolutionY=\n".encode())
    assert (page.vendor, page.pixel_nm, page.field_xyxy) == ("FEI", None, (0, 0, 80, 96))


def test_data_bar_is_what_the_page_has_more_rows_than_the_scan() -> None:
    assert fei(b"[EScan]\nPixelWidth=2.5e-9\n[Image]\nResolutionX=80\nResolutionY=80\n").field_xyxy == (0, 0, 80, 80)
    assert fei(b"[EScan]\nPixelWidth=2.5e-9\n").pixel_nm == pytest.approx(2.5)
    for not_a_bar in (b"ResolutionX=160\nResolutionY=80", b"ResolutionX=80\nResolutionY=40", b"ResolutionX=80"):
        assert fei(b"[Image]\n" + not_a_bar).field_xyxy == (0, 0, 80, 96)


@given(tag=st.binary(min_size=5, max_size=300), code=st.sampled_from([34680, 34682, 34118, 33560]))
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_a_vendor_tag_leave_the_pixels_readable(tag: bytes, code: int) -> None:
    page = only(tiff(GRAY, extratags=[(code, 7, len(tag), tag, True)]))
    np.testing.assert_array_equal(page.pixels, GRAY)


# ---- info bars by the pixels ----


def draw_bar(style: str, h: int, W: int) -> Gray:
    """A bar as it stands at the bottom of a page."""
    dark = style != "zeiss"
    bar = np.full((h, W), 0 if dark else 255, np.uint8)
    ink = 255 if dark else 0
    if style == "fei":
        bar[[0, -1]] = 252
        bar[:, :: W // 7] = 252
        for i, text in enumerate(["5.0 kV", "2500 x", "1.7 mm", "4.0 mm", "30 deg", "ETD", "2 um"]):
            cv2.putText(bar, text, (i * W // 7 + 4, h * 7 // 10), 0, h / 55, ink)
    elif style == "zeiss":
        bar[[0, -2]] = 0
        bar[:, [1, -2]] = 0
        bar[-1] = sem(1, W)[0]
        text = "200 nm  EHT = 5.00 kV   Signal A = InLens   Mag = 50 K X"
        cv2.putText(bar, text, (10, h * 6 // 10), 0, W / 1100, ink, 1, cv2.LINE_AA)
    elif style == "hitachi":
        cv2.putText(bar, "SU8000 5.0kV 8.1mm x50.0k SE", (8, h * 6 // 10), 0, W / 800, ink, 1, cv2.LINE_AA)
        bar[h // 5 : h // 2, W - 60 :: 5] = ink
    else:
        for i, text in enumerate(["LOT A123 W07 DIE 3,-4 DEFECT 118", "FOV 2.0um 2.0kV 12/03/2024"][: h // 14]):
            cv2.putText(bar, text, (4, 12 + 16 * i), cv2.FONT_HERSHEY_PLAIN, 0.9, ink)
    return bar


BARS = [("fei", 0.06), ("zeiss", 0.1), ("hitachi", 0.08), ("one line", 0.03), ("two lines", 0.07)]


@pytest.mark.parametrize("quality", [None, 90, 75])
@pytest.mark.parametrize("at_top", [False, True])
@pytest.mark.parametrize("size_hw", [(480, 480), (512, 640), (1024, 1024)])
@pytest.mark.parametrize(("style", "share"), BARS)
def test_info_bar_is_cut(style: str, share: float, size_hw: tuple[int, int], at_top: bool, quality: int | None) -> None:
    H, W = size_hw
    h = max(16, int(share * H))
    pixels = sem(H, W)
    pixels[H - h :] = draw_bar(style, h, W)
    expected = [0, 0, W, H - h]
    if at_top:
        pixels[:h], pixels[H - h :] = pixels[H - h :].copy(), sem(h, W)
        pixels[:h] = pixels[:h][::-1] if style in ("fei", "zeiss") else pixels[:h]
        expected = [0, h, W, H]
    data = encoded(".jpg", pixels, cv2.IMWRITE_JPEG_QUALITY, quality) if quality else encoded(".png", pixels)
    off_by = np.abs(np.subtract(only(data).field_xyxy, expected)).max()
    assert off_by <= (1 if quality else 0)  # JPEG blurs the boundary


def test_bars_at_both_ends_are_cut() -> None:
    pixels = sem(512, 640)
    pixels[-40:] = draw_bar("hitachi", 40, 640)
    pixels[:16] = draw_bar("one line", 16, 640)
    assert find_field(pixels) == (0, 16, 640, 472)


def test_16_bit_page_is_stretched_by_its_field_and_not_by_its_bar() -> None:
    pixels = 1000 + 4 * sem(512, 640).astype(np.uint16)
    bar = draw_bar("hitachi", 40, 640).astype(np.uint16)
    page = only(encoded(".png", np.vstack([pixels, bar * 257])))
    assert page.field_xyxy == (0, 0, 640, 512)
    assert np.percentile(page.field, 99) > 200


def test_info_bar_under_a_black_field_is_cut_where_its_frame_shows_it() -> None:
    pixels = np.zeros((512, 640), np.uint8)
    pixels[-32:] = draw_bar("fei", 32, 640)
    assert find_field(pixels) == (0, 0, 640, 480)


def lookalike(kind: str, seed: int, H: int = 512, W: int = 640) -> Gray:
    """A page without a bar that shares something with one: black bottom, straight boundary, bright marks."""
    rng = np.random.default_rng(seed)
    page = np.full((H, W), -60.0)
    if kind == "horizontal metal lines":
        page = 20.0 + 180.0 * (np.arange(H) // 24 % 2)[:, None] + np.zeros((1, W))
    elif kind == "fading to black":
        page = np.linspace(140, -40, H)[:, None] + np.zeros((1, W))
    elif kind == "vias":
        for y in range(20, H, 40):
            for x in range(20, W, 40):
                cv2.circle(page, (x, y), 9, 255.0, cv2.FILLED)
    elif kind == "particles under an edge":
        page[: int(0.85 * H)] = 150
        for x, y, r in zip(rng.integers(W, size=30), rng.integers(450, H, 30), rng.integers(2, 9, 30), strict=True):
            cv2.circle(page, (int(x), int(y)), int(r), 255.0, cv2.FILLED)
    elif kind == "line ends under metal":
        page[: int(0.85 * H)] = 170
        for x in np.cumsum(rng.integers(14, 34, W // 24)):
            page[int(0.89 * H) : int(0.97 * H), x : x + int(rng.integers(4, 14))] = 255
    return (cv2.GaussianBlur(page, (0, 0), 1) + rng.normal(0, 8, (H, W))).clip(0, 255).astype(np.uint8)


LOOKALIKES = [
    "horizontal metal lines",
    "fading to black",
    "vias",
    "particles under an edge",
    "line ends under metal",
    "black",
]


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_only_looks_like_a_bar_is_not_cut(kind: str) -> None:
    cuts = [find_field(lookalike(kind, seed)) for seed in range(8)]
    assert cuts == [(0, 0, 640, 512)] * 8


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 8192), (100, 64)])
def test_smallest_pages_have_their_whole_field(size_hw: tuple[int, int]) -> None:
    H, W = size_hw
    for pixels in (sem(H, W), np.zeros((H, W), np.uint8), np.full((H, W), 255, np.uint8)):
        whole: Box = (0, 0, W, H)
        assert find_field(pixels) == whole


@pytest.mark.parametrize("pattern", ["MTD/*/Imgs/*.jpg", "SD-saliency-900/**/Source Images/*"])
def test_no_image_of_a_public_set_is_cut(pattern: str) -> None:
    paths = sorted(DATA.glob(pattern))
    if not paths:
        pytest.skip(f"needs {DATA / pattern}")
    for path in random.Random(0).sample(paths, 300):
        page = decoding.read(path)[0]
        assert page.field.shape == page.pixels.shape, path


# ---- hostile bytes ----


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_file_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    content = bytearray(VALID[data.draw(st.sampled_from(sorted(VALID)))])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.one_of(st.integers(0, 300), st.integers(0, len(content) - 1)))
        content[at % len(content)] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    read_or_refuse(bytes(content))


@pytest.mark.parametrize(("n_bytes", "words"), [(53, "in its header"), (54, "at byte 54")])
def test_bmp_that_ends_around_its_header_says_which(n_bytes: int, words: str) -> None:
    with pytest.raises(ImageError, match=f"breaks off {words}"):
        decoding.decode(encoded(".bmp", np.zeros((64, 64), np.uint8))[:n_bytes], name="x")


@pytest.mark.parametrize(("n_bytes", "words"), [(32, "without its header"), (33, "breaks off")])
def test_png_that_ends_around_its_header_says_which(n_bytes: int, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decoding.decode(png(64, 64, 8, 0, b"")[:n_bytes], name="x")


@given(head=st.sampled_from([b"", b"II*\0", b"MM\0+", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"]), tail=st.binary())
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused_and_nothing_else(head: bytes, tail: bytes) -> None:
    with pytest.raises(ImageError):
        decoding.decode(head + tail, name="x")


def read_or_refuse(content: bytes) -> None:
    try:
        pages = decoding.decode(content, name="x")
    except ImageError:
        return
    assert all(page.pixels.dtype == np.uint8 and min(page.pixels.shape) >= 32 for page in pages)


def test_decoders_do_not_write_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    for content in VALID.values():
        for _ in range(40):
            damaged = bytearray(content)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            read_or_refuse(bytes(damaged))
    read_or_refuse(png(64, 64, 8, 0, bytes(65) * 64, (b"iCCP", b"x\0\0" + zlib.compress(b"no profile"))))
    assert capfd.readouterr() == ("", "")
