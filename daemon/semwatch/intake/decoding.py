"""Image files, all pages, vendor tags -> ``Micrograph``: TIFF, PNG, JPEG and BMP, told apart by their first bytes.

A file is read once, so that its hash and its pixels are of the same content. Headers are held against the limits before
anything is decoded. imagecodecs decodes, not OpenCV: OpenCV's decoders write to stderr. libjpeg invents gray rows for
what a cut file lacks, so ends are checked here.

Gray levels: 8-bit content is never touched, also where it sits in 16 bits. Wider content is stretched: the 0.1 and
99.9 percentiles of the field go to 0 and 255.
"""

import io
import logging
import math
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from semwatch.defects import Box, Micrograph
from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.intake.info_bar import find_field
from semwatch.settings.site import Limits

LIMITS = Limits()
"""What a machine takes on where nothing is said."""

_COPY_AGAIN = "the copy is incomplete or damaged; copy the file again from the tool"
_SAVE_AS = "save it as 8- or 16-bit gray or RGB"
_TIFF_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946}
"""None, LZW, JPEG, Deflate, PackBits, old Deflate."""
_TIFF_PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 6: "YCbCr"}
_UNIT_NM = {"fm": 1e-6, "pm": 1e-3, "nm": 1.0, "µm": 1e3, "μm": 1e3, "um": 1e3, "mm": 1e6, "m": 1e9}


class _Limits(NamedTuple):
    max_pixels: int
    max_total_pixels: int
    max_pages: int
    min_side_px: int


class _Page(NamedTuple):
    samples: NDArray[Any]
    """(H, W) or (H, W, 1..4): gray, gray + alpha, RGB, RGB + alpha."""
    vendor: str | None = None
    pixel_nm: float | None = None
    field_height: int | None = None
    """Rows above the vendor's info bar, where the tags say it."""


def read_file(path: Path, *, max_bytes: int = 2**30) -> bytes:
    """Return the content of an image file, whole.

    Raises: ImageError if it is not a file, may not be read, is gone or larger than ``max_bytes``; ServiceUnavailable
    if the disk or the share failed.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: not a regular file; put image files into the drop folder")
        if status.st_size > max_bytes:
            raise ImageError(f"{path}: {status.st_size} bytes, over {max_bytes}; split the file or raise max_bytes")
        with path.open("rb") as file:
            return file.read(max_bytes)
    except PermissionError as error:
        raise ImageError(f"{path}: may not be read; give the service's user permission to read it") from error
    except FileNotFoundError as error:
        if path.parent.is_dir():
            raise ImageError(f"{path}: is gone; put it into the drop folder again") from error
        raise ServiceUnavailable(f"{path.parent}: is away ({error.strerror}); is the share mounted?") from error
    except OSError as error:
        raise ServiceUnavailable(f"{path}: cannot be read now ({error.strerror})") from error


def read(path: Path, *, max_bytes: int = 2**30, **limits: int) -> tuple[Micrograph, ...]:
    """Read and decode an image file; the limits and errors are those of ``read_file`` and ``decode``."""
    return decode(read_file(path, max_bytes=max_bytes), name=str(path), **limits)


def decode(
    data: bytes,
    *,
    name: str,
    max_pixels: int = LIMITS.max_image_px,
    max_total_pixels: int = 4 * LIMITS.max_image_px,
    max_pages: int = LIMITS.max_pages,
    min_side_px: int = 32,
) -> tuple[Micrograph, ...]:
    """Decode all pages of an image file, in file order; thumbnails of a TIFF are left out.

    ``max_pixels`` holds for one page, ``max_total_pixels`` for all; ``name`` is for messages only.

    Raises: ImageError, and nothing else, for content that is not a whole image within the limits.
    """
    limits = _Limits(max_pixels, max_total_pixels, max_pages, min_side_px)
    try:
        pages = _decoder(data)(data, limits)
        return tuple(_micrograph(page, index) for index, page in pages)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error.__cause__
    except Exception as error:  # a decoder may raise anything on hostile bytes
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ImageError(f"{name}: cannot be decoded ({reason}); {_COPY_AGAIN}") from error


def _decoder(data: bytes) -> Callable[[bytes, _Limits], Iterator[tuple[int, _Page]]]:
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _decode_tiff
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _decode_png
    if data[:3] == b"\xff\xd8\xff":
        return _decode_jpeg
    if data[:2] == b"BM":
        return _decode_bmp
    if not data:
        raise ImageError("the file is empty; copy it again from the tool")
    raise ImageError("neither TIFF, PNG, JPEG nor BMP; put only image files into the drop folder")


def _check_size(size_hw: tuple[int, int], limits: _Limits, page: int = 0) -> None:
    H, W = size_hw
    if min(H, W) < limits.min_side_px:
        raise ImageError(f"page {page} is {W} x {H} px, sides under {limits.min_side_px} px; save the full-size image")
    if limits.max_pixels < H * W:
        raise ImageError(f"page {page} is {W} x {H} px, over {limits.max_pixels} px; tile it or raise max_pixels")


# ---- PNG, JPEG, BMP: one page each ----


def _decode_png(data: bytes, limits: _Limits) -> Iterator[tuple[int, _Page]]:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageError(f"a PNG without its header; {_COPY_AGAIN}")
    W, H = struct.unpack_from(">II", data, 16)
    _check_size((H, W), limits)
    yield 0, _Page(imagecodecs.png_decode(_critical_chunks(data)))


def _critical_chunks(data: bytes) -> bytes:
    """Check every chunk of a PNG and keep those that hold pixels: libpng prints its opinion of the others."""
    view, start, kept = memoryview(data), 8, [data[:8]]
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data) or zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            break
        if kind[:1].isupper():
            kept.append(data[start:end])
        if kind == b"IEND":
            return b"".join(kept)
        start = end
    raise ImageError(f"the PNG breaks off or is damaged at byte {start} of {len(data)}; {_COPY_AGAIN}")


def _decode_jpeg(data: bytes, limits: _Limits) -> Iterator[tuple[int, _Page]]:
    _check_size(_jpeg_size(data), limits)
    yield 0, _Page(imagecodecs.jpeg8_decode(data))


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (H, W) of a JPEG from its frame header, having seen that the end marker is there."""
    start = 2
    while start + 10 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # fill byte
            start += 1
            continue
        if marker in (0xD9, 0xDA):  # end of image, start of scan
            break
        length, bits, H, W, channels = struct.unpack_from(">HBHHB", data, start + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker > 0xC2 or bits != 8 or channels not in (1, 3):
                raise ImageError("a JPEG that is neither baseline nor progressive, 8-bit, gray or RGB; save it as PNG")
            if data.rfind(b"\xff\xd9", start) < 0:
                raise ImageError(f"the JPEG has no end marker; {_COPY_AGAIN}")
            return H, W
        start += 2 + length
    raise ImageError(f"the JPEG has no frame header; {_COPY_AGAIN}")


def _decode_bmp(data: bytes, limits: _Limits) -> Iterator[tuple[int, _Page]]:
    if len(data) < 54:
        raise ImageError(f"the BMP breaks off in its header; {_COPY_AGAIN}")
    offset, _, W, H, _, bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
    H = abs(H)  # negative: rows from top to bottom
    _check_size((H, W), limits)
    if compression not in (0, 3, 6):
        raise ImageError("a compressed BMP; save it uncompressed or as PNG")
    if offset + (W * bits + 31) // 32 * 4 * H > len(data):
        raise ImageError(f"the BMP breaks off at byte {len(data)}; {_COPY_AGAIN}")
    yield 0, _Page(imagecodecs.bmp_decode(data))


# ---- TIFF ----


def _decode_tiff(data: bytes, limits: _Limits) -> Iterator[tuple[int, _Page]]:
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it logs what is checked or refused here
    offsets = _tiff_directories(data, limits.max_pages)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages = []
        for index, offset in enumerate(offsets):
            tiff.filehandle.seek(offset)
            pages.append(tifffile.TiffPage(tiff, index=index))
        pages = [page for page in pages if not page.subfiletype & 0b101] or pages  # thumbnail or transparency mask
        for page in pages:
            _check_tiff_page(page, data, limits)
        if sum(page.imagelength * page.imagewidth for page in pages) > limits.max_total_pixels:
            raise ImageError(f"{len(pages)} pages of more than {limits.max_total_pixels} px together; split the file")
        for page in pages:
            yield page.index, _Page(_tiff_samples(page), *_vendor(page))


def _tiff_directories(data: bytes, max_pages: int) -> list[int]:
    """Return the byte offset of each page's directory. tifffile would silently leave out pages that are cut off."""
    order, big = (">" if data[:1] == b"M" else "<"), data[2:4] in (b"+\0", b"\0+")
    count_format, offset_format, entry_bytes = ("Q", "Q", 20) if big else ("H", "I", 12)
    offsets: dict[int, None] = {}  # in order, and quick to search
    at = 8 if big else 4
    try:
        while offset := struct.unpack_from(order + offset_format, data, at)[0]:
            if offset in offsets:
                raise ImageError(f"the TIFF's pages run in a circle; {_COPY_AGAIN}")
            if len(offsets) == max_pages:
                raise ImageError(f"more than {max_pages} pages; split the file or raise max_pages")
            offsets[offset] = None
            n_tags = struct.unpack_from(order + count_format, data, offset)[0]
            at = offset + struct.calcsize(order + count_format) + n_tags * entry_bytes
    except (struct.error, OverflowError) as error:
        raise ImageError(
            f"the TIFF breaks off in the directory of page {max(0, len(offsets) - 1)}; {_COPY_AGAIN}"
        ) from error
    if not offsets:
        raise ImageError(f"a TIFF without pages; {_COPY_AGAIN}")
    return list(offsets)


def _check_tiff_page(page: tifffile.TiffPage, data: bytes, limits: _Limits) -> None:
    _check_size((page.imagelength, page.imagewidth), limits, page.index)
    kind = (
        f"page {page.index}: compression {int(page.compression)}, photometric {int(page.photometric)}, "
        f"{page.samplesperpixel} x {page.bitspersample} bits"
    )
    if page.compression not in _TIFF_COMPRESSIONS:
        raise ImageError(f"{kind}: this compression is not read; save it uncompressed, as LZW or Deflate")
    jpeg_only = page.photometric == 6 and page.compression != 7
    if page.photometric not in _TIFF_PHOTOMETRICS or jpeg_only or page.dtype is None or page.dtype.kind not in "buif":
        raise ImageError(f"{kind}: this kind of pixel is not read; {_SAVE_AS}")
    if page.imagedepth != 1 or page.tiledepth > 1 or not 1 <= page.samplesperpixel <= 4:
        raise ImageError(f"{kind}: neither gray nor RGB; {_SAVE_AS}")
    if page.tilewidth * page.tilelength > limits.max_pixels:
        raise ImageError(f"{kind}: tiles over {limits.max_pixels} px; {_SAVE_AS}")
    _check_segments(page, data, limits)


def _check_segments(page: tifffile.TiffPage, data: bytes, limits: _Limits) -> None:
    offsets, counts = page.dataoffsets, page.databytecounts
    whole = len(offsets) == len(counts) == math.prod(page.chunked)
    whole = whole and all(start > 0 and 0 < n <= len(data) - start for start, n in zip(offsets, counts, strict=True))
    if whole and page.compression == 1:
        whole = 8 * sum(counts) >= page.imagelength * page.imagewidth * page.samplesperpixel * page.bitspersample
    if not whole:
        raise ImageError(f"page {page.index}: pixels are missing; {_COPY_AGAIN}")
    if page.compression == 7:
        for start, n in zip(offsets, counts, strict=True):
            H, W = _jpeg_size(data[start : start + n])
            if limits.max_pixels < H * W:
                raise ImageError(f"page {page.index}: a JPEG tile over {limits.max_pixels} px; {_SAVE_AS}")


def _tiff_samples(page: tifffile.TiffPage) -> NDArray[Any]:
    samples = page.asarray(maxworkers=1)
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, -1)
    if page.photometric == 3:
        palette = (np.asarray(page.colormap) >> 8).astype(np.uint8).T
        return np.take(_luma(palette[None])[0], samples)
    if page.photometric == 0:
        return ~samples if samples.dtype.kind in "bui" else -samples
    return samples


# ---- vendor tags: (vendor, pixel_nm, field_height), each None where the tags do not say it ----


def _vendor(page: tifffile.TiffPage) -> tuple[str | None, float | None, int | None]:
    tags = {code: page.tags.valueof(code) for code in (34682, 34680, 34118, 33560) if code in page.tags}
    for code, known in tags.items():
        if not isinstance(known, Mapping):
            continue
        if code == 34118:
            return "Zeiss", _zeiss_pixel_nm(known, page.imagewidth), None
        if code == 33560:
            return "Olympus", _positive(known.get("pixelsizex"), 1e9), None
        return "FEI", _fei_pixel_nm(known), _fei_field_height(known, (page.imagelength, page.imagewidth))
    return None, None, None


def _positive(value: object, scale: float = 1.0) -> float | None:
    """Return ``value * scale`` where that is a positive, finite number: tags are typed by hand and by bugs."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    scaled = float(value) * scale
    return scaled if math.isfinite(scaled) and scaled > 0 else None


def _fei_number(tags: Mapping[str, Any], section: str, key: str) -> float | None:
    entries = tags.get(section)
    return _positive(entries.get(key)) if isinstance(entries, Mapping) else None


def _fei_pixel_nm(tags: Mapping[str, Any]) -> float | None:
    metres = (_fei_number(tags, section, "PixelWidth") for section in ("Scan", "EScan", "IScan"))
    return next((_positive(m, 1e9) for m in metres if m is not None), None)


def _fei_field_height(tags: Mapping[str, Any], size_hw: tuple[int, int]) -> int | None:
    """Return ResolutionY if the page is as wide as the scan and has at most a third more rows: its data bar."""
    H, W = size_hw
    scan_w, scan_h = (_fei_number(tags, "Image", key) for key in ("ResolutionX", "ResolutionY"))
    return int(scan_h) if scan_w == W and scan_h is not None and scan_h <= H <= 4 / 3 * scan_h else None


def _zeiss_pixel_nm(tags: Mapping[str, Any], width_px: int) -> float | None:
    """Return AP_IMAGE_PIXEL_SIZE, else AP_WIDTH by the page; AP_PIXEL_SIZE is that of the 1024 px display."""
    pixel_nm = _zeiss_nm(tags, "ap_image_pixel_size")
    width_nm = _zeiss_nm(tags, "ap_width")
    return pixel_nm if pixel_nm is not None or width_nm is None else width_nm / width_px


def _zeiss_nm(tags: Mapping[str, Any], key: str) -> float | None:
    entry = tags.get(key)
    if not isinstance(entry, tuple) or len(entry) != 3 or entry[2] not in _UNIT_NM:
        return None
    return _positive(entry[1], _UNIT_NM[entry[2]])


# ---- samples to 8-bit gray ----


def _micrograph(page: _Page, index: int) -> Micrograph:
    gray = _luma(_plain(page.samples))
    H, W = gray.shape
    if page.field_height is not None:
        field = (0, 0, W, page.field_height)
    else:
        field = find_field(_to_8_bits(gray, (0, H // 5, W, H - H // 5)))  # where no bar can spoil the stretch
    pixels = np.ascontiguousarray(_to_8_bits(gray, field))
    return Micrograph(pixels, field, index, page.pixel_nm, page.vendor)


def _plain(samples: NDArray[Any]) -> NDArray[Any]:
    """Bring samples of any number type to uint8, uint16 or float32, order and ratios of levels kept."""
    kind, itemsize = samples.dtype.kind, samples.dtype.itemsize
    if kind == "b":
        return samples.astype(np.uint8) * np.uint8(255)
    if kind in "ui" and itemsize <= 2:
        shift = np.iinfo(samples.dtype).min
        return samples if shift == 0 else (samples.astype(np.int32) - shift).astype(f"u{itemsize}")
    if not np.isfinite(samples).all():
        raise ImageError(f"NaN or infinite pixels; {_SAVE_AS}")
    low, high = float(samples.min()), float(samples.max())
    if not math.isfinite(high - low):
        raise ImageError(f"pixel values from {low:g} to {high:g}; {_SAVE_AS}")
    return ((samples.astype(np.float64) - low) / (high - low or 1.0)).astype(np.float32)


def _luma(samples: NDArray[Any]) -> NDArray[Any]:
    """Return (H, W) BT.601 luma of gray, RGB, or either with alpha; a gray RGB image comes out as it went in."""
    if samples.ndim == 2:
        return samples
    if samples.shape[2] < 3:
        return samples[..., 0]
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(samples[..., :3]), cv2.COLOR_RGB2GRAY))


def _to_8_bits(gray: NDArray[Any], field_xyxy: Box) -> NDArray[np.uint8]:
    if gray.dtype == np.uint8:
        return gray
    x0, y0, x1, y1 = field_xyxy
    field = gray[y0:y1, x0:x1]
    if gray.dtype == np.uint16:
        return np.take(_levels(gray, field), gray)
    low, high = _stretch(np.percentile(field, [0.1, 99.9]), field)
    return np.rint((gray.clip(low, high) - low) * (255 / (high - low or 1.0))).astype(np.uint8)


def _levels(gray: NDArray[np.uint16], field: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return the (65536,) table from 16 to 8 bits: exact where all levels are 8-bit ones, else stretched."""
    every = np.arange(2**16)
    counts = np.bincount(gray.ravel(), minlength=2**16)
    used = np.flatnonzero(counts)
    if used[-1] < 256:
        return every.astype(np.uint8)
    if not (used & 255).any() or not (used % 257).any():
        return (every >> 8).astype(np.uint8)
    if field.size < gray.size:
        counts = np.bincount(field.ravel(), minlength=2**16)
    low, high = _stretch(np.searchsorted(np.cumsum(counts), np.array([0.001, 0.999]) * field.size), field)
    return np.rint((every.clip(low, high) - low) * (255 / (high - low or 1.0))).astype(np.uint8)


def _stretch(low_high: NDArray[Any], field: NDArray[Any]) -> tuple[float, float]:
    """Fall back to the extremes where 99.8 % of the field are of one level: the rest may be the defect."""
    low, high = low_high.tolist()
    return (low, high) if low < high else (float(field.min()), float(field.max()))
