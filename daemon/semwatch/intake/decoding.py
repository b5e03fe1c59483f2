"""Image files, all pages, vendor tags -> ``Micrograph``: TIFF, PNG, JPEG and BMP, told apart by their first bytes.

A file is read once, so that its hash and its pixels are of the same content. Headers are held against the limits before
anything is decoded. imagecodecs decodes, not OpenCV: OpenCV's decoders write to stderr. libjpeg invents gray rows for
what a cut file lacks, so ends are checked here.

Gray levels: 8-bit content is never touched, also where it sits in 16 bits. Wider content is stretched: the 0.1 and
99.9 percentiles of the field go to 0 and 255.
"""

import errno
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box, Micrograph
from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.intake.info_bar import find_field
from semwatch.intake.jpeg import jpeg_size
from semwatch.intake.page import COPY_AGAIN, SAVE_AS, Page, PageLimits, check_size, luma
from semwatch.intake.tiff import HEADS, decode_tiff
from semwatch.settings.site import Limits
from semwatch.system import files

LIMITS = Limits()
"""What a machine takes on where nothing is said."""
_PNG_SAMPLES = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""Samples of a pixel by color type; a palette becomes RGB."""


class Decode(Protocol):
    """What ``decode`` does: in this process, or in one that may die of it (``decoders.Decoders``)."""

    def __call__(  # noqa: D102 - see ``decode``
        self,
        data: bytes,
        *,
        name: str,
        max_pixels: int = ...,
        max_total_pixels: int | None = ...,
        max_pages: int = ...,
        min_side_px: int = ...,
    ) -> tuple[Micrograph, ...]: ...


def read_file(path: Path, *, below: Path | None = None, max_bytes: int = 2**30) -> bytes:
    """Return the content of an image file, whole.

    Args:
        path: of the file.
        below: the drop folder above it, from where no link is followed; None follows links.
        max_bytes: of a file.

    Raises:
        ImageError: it is not a file, may not be read, is gone, larger, or behind a link.
        ServiceUnavailable: the disk or the share failed.
    """
    try:
        with os.fdopen(files.open_to_read(path, below=below), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > max_bytes:
                raise ImageError(f"{path}: {size} bytes, over {max_bytes}; split the file")
            return file.read(max_bytes)
    except PermissionError as error:
        raise ImageError(f"{path}: may not be read; give the service's user permission to read it") from error
    except FileNotFoundError as error:
        if path.parent.is_dir():
            raise ImageError(f"{path}: is gone; put it into the drop folder again") from error
        raise ServiceUnavailable(f"{path.parent}: is away ({error.strerror}); is the share mounted?") from error
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise ImageError(f"{path}: not a regular file; put image files into the drop folder") from error
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ImageError(f"{path}: is behind a link; put image files into the drop folder") from error
        raise ServiceUnavailable(f"{path}: cannot be read now ({error.strerror})") from error


def read(path: Path, *, max_bytes: int = 2**30, by: Decode | None = None, **limits: int) -> tuple[Micrograph, ...]:
    """Read and decode an image file; the limits and errors are those of ``read_file`` and ``decode``."""
    return (by or decode)(read_file(path, max_bytes=max_bytes), name=str(path), **limits)


def decode(
    data: bytes,
    *,
    name: str,
    max_pixels: int = LIMITS.max_image_px,
    max_total_pixels: int | None = None,
    max_pages: int = LIMITS.max_pages,
    min_side_px: int = 32,
) -> tuple[Micrograph, ...]:
    """Decode all pages of an image file, in file order; thumbnails of a TIFF are left out.

    ``max_pixels`` holds for one page, ``max_total_pixels`` for all (None: four such); ``name`` is for messages only.

    Raises: ImageError, and nothing else, for content that is not a whole image within the limits.
    """
    total = 4 * max_pixels if max_total_pixels is None else max_total_pixels
    limits = PageLimits(max_pixels, total, max_pages, min_side_px)
    try:
        pages = _decoder(data)(data, limits)
        return tuple(_micrograph(page, index) for index, page in pages)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error.__cause__
    except Exception as error:  # a decoder may raise anything on hostile bytes
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ImageError(f"{name}: cannot be decoded ({reason}); {COPY_AGAIN}") from error


def _decoder(data: bytes) -> Callable[[bytes, PageLimits], Iterator[tuple[int, Page]]]:
    if data[:4] in HEADS:
        return decode_tiff
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _decode_png
    if data[:3] == b"\xff\xd8\xff":
        return _decode_jpeg
    if data[:2] == b"BM":
        return _decode_bmp
    if not data:
        raise ImageError("the file is empty; copy it again from the tool")
    raise ImageError("neither TIFF, PNG, JPEG nor BMP; put only image files into the drop folder")


# ---- PNG, JPEG, BMP: one page each ----


def _decode_png(data: bytes, limits: PageLimits) -> Iterator[tuple[int, Page]]:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ImageError(f"a PNG without its header; {COPY_AGAIN}")
    W, H, bits, color = struct.unpack_from(">IIBB", data, 16)
    check_size((H, W), limits, bits=max(8, bits) * _PNG_SAMPLES.get(color, 4))
    yield 0, Page(imagecodecs.png_decode(_critical_chunks(data)))


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
    raise ImageError(f"the PNG breaks off or is damaged at byte {start} of {len(data)}; {COPY_AGAIN}")


def _decode_jpeg(data: bytes, limits: PageLimits) -> Iterator[tuple[int, Page]]:
    check_size(jpeg_size(data), limits)
    yield 0, Page(imagecodecs.jpeg8_decode(data))


def _decode_bmp(data: bytes, limits: PageLimits) -> Iterator[tuple[int, Page]]:
    if len(data) < 54:
        raise ImageError(f"the BMP breaks off in its header; {COPY_AGAIN}")
    offset, _, W, H, _, bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
    H = abs(H)  # negative: rows from top to bottom
    check_size((H, W), limits)
    if compression not in (0, 3, 6):
        raise ImageError("a compressed BMP; save it uncompressed or as PNG")
    if compression != 0 and not _are_masks(data, bits):
        raise ImageError(f"a BMP of {bits} bits with the color masks {data[54:66].hex(' ', 4)}; {SAVE_AS}")
    if offset + (W * bits + 31) // 32 * 4 * H > len(data):
        raise ImageError(f"the BMP breaks off at byte {len(data)}; {COPY_AGAIN}")
    yield 0, Page(imagecodecs.bmp_decode(data))


def _are_masks(data: bytes, bits: int) -> bool:
    """Say whether the color masks of a BMP are whole and apart; the codec divides by them, so zero ends the process."""
    masks = [mask for (mask,) in struct.iter_unpack("<I", data[54:66])]
    are_whole = [mask > 0 and ((mask // (mask & -mask)) & (mask // (mask & -mask) + 1)) == 0 for mask in masks]
    return (
        bits in (16, 32)
        and len(masks) == 3
        and all(are_whole)
        and sum(masks) == masks[0] | masks[1] | masks[2] < 1 << bits
    )


# ---- samples to 8-bit gray ----


def _micrograph(page: Page, index: int) -> Micrograph:
    gray = luma(_plain(page.samples))
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
        raise ImageError(f"NaN or infinite pixels; {SAVE_AS}")
    low, high = float(samples.min()), float(samples.max())
    if not math.isfinite(high - low):
        raise ImageError(f"pixel values from {low:g} to {high:g}; {SAVE_AS}")
    scaled = samples.astype(np.float64)
    scaled -= low  # in place: at the largest size a copy is half a gigabyte
    scaled /= high - low or 1.0
    return scaled.astype(np.float32)


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
