"""TIFF pages: directories, limits and samples.

tifffile sizes lists and arrays by what tags say, before any limit of ours: so what the tags of a page hold is looked at
in the bytes first.
"""

import io
import logging
import math
import struct
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from semwatch.errors import ImageError
from semwatch.intake.jpeg import jpeg_size
from semwatch.intake.page import COPY_AGAIN, SAVE_AS, Page, PageLimits, check_size, in_mpx, luma
from semwatch.intake.vendor_tags import vendor_of

_COMPRESSIONS = {1, 5, 7, 8, 32773, 32946}
"""None, LZW, JPEG, Deflate, PackBits, old Deflate."""
_PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 6: "YCbCr"}
_NUMBERS = {1, 3, 4, 16}
"""Types of a tag that hold whole numbers: BYTE, SHORT, LONG, LONG8."""
_PER_PAGE = (256, 257, 259, 262, 266, 277, 278, 284, 317, 322, 323, 32997, 32998)
"""Width, length, compression, photometric, fill order, samples, rows per strip, planar configuration, predictor, tile
width and length, depth of image and tile: one number each."""
_PER_SAMPLE = (258, 339)
"""Bits and format: a number for each sample."""
_PER_SEGMENT = (273, 279, 324, 325)
"""Offsets and byte counts of strips and tiles."""
MAX_SEGMENTS = 32768
"""Strips or tiles of a page; each costs about 0.1 ms, and 8192 rows of three planes are 24576 strips."""
MAX_TAGS = 4096
MAX_DIRECTORIES = 500_000
"""Pages of a file of which some are asked for."""
HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF."""


def decode_tiff(data: bytes, limits: PageLimits) -> Iterator[tuple[int, Page]]:
    """Decode the pages one by one, each with its number in the file; thumbnails are left out.

    Raises:
        ImageError, or what tifffile raises on hostile bytes.
    """
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it logs what is checked or refused here
    offsets = _directories(data, limits.max_pages)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        pages = []
        for index, offset in enumerate(offsets):
            tiff.filehandle.seek(offset)
            pages.append(tifffile.TiffPage(tiff, index=index))
        pages = [page for page in pages if not page.subfiletype & 0b101] or pages  # thumbnail or transparency mask
        for page in pages:
            _check_page(page, data, limits)
        if sum(page.imagelength * page.imagewidth for page in pages) > limits.max_total_pixels:
            raise ImageError(
                f"{len(pages)} pages of more than {in_mpx(limits.max_total_pixels)} million px together; "
                f"split the file or raise limits.max_image_mpx in site.yaml"
            )
        for page in pages:
            yield page.index, Page(_samples(page), *vendor_of(page))


def only_pages(data: bytes, pages: Collection[int]) -> tuple[bytes, list[int]]:
    """Make a TIFF of some pages of another, in their order.

    Args:
        data: the whole file.
        pages: that are wanted, from 0; those that are not there are left out.

    Returns:
        The file, and the number that each of its pages has in the whole one.

    Raises:
        ImageError: it breaks off, its pages run in a circle, or it is no TIFF.
    """
    if data[:4] not in HEADS:
        raise ImageError(f"not a TIFF, so it has one page; {COPY_AGAIN}")
    order, big = (">" if data[:1] == b"M" else "<"), data[2:4] in (b"+\0", b"\0+")
    count_format, offset_format, entry_bytes = ("Q", "Q", 20) if big else ("H", "I", 12)
    offsets = _directories(data, MAX_DIRECTORIES)
    found = [page for page in sorted(pages) if page < len(offsets)]
    chained = bytearray(data)
    at = 8 if big else 4
    for page in found:
        struct.pack_into(order + offset_format, chained, at, offsets[page])
        n_tags = struct.unpack_from(order + count_format, data, offsets[page])[0]
        at = offsets[page] + struct.calcsize(order + count_format) + n_tags * entry_bytes
    struct.pack_into(order + offset_format, chained, at, 0)
    return bytes(chained), found


def _directories(data: bytes, max_pages: int) -> list[int]:
    """Return the byte offset of each page's directory. tifffile would silently leave out pages that are cut off."""
    order, big = (">" if data[:1] == b"M" else "<"), data[2:4] in (b"+\0", b"\0+")
    count_format, offset_format, entry_bytes = ("Q", "Q", 20) if big else ("H", "I", 12)
    offsets: dict[int, None] = {}  # in order, and quick to search
    at = 8 if big else 4
    try:
        while offset := struct.unpack_from(order + offset_format, data, at)[0]:
            if offset in offsets:
                raise ImageError(f"the TIFF's pages run in a circle; {COPY_AGAIN}")
            if len(offsets) == max_pages:
                raise ImageError(f"more than {max_pages} pages; split the file or raise limits.max_pages in site.yaml")
            offsets[offset] = None
            n_tags = struct.unpack_from(order + count_format, data, offset)[0]
            first = offset + struct.calcsize(order + count_format)
            _check_tags(data, order, first, n_tags, entry_bytes, page=len(offsets) - 1)
            at = first + n_tags * entry_bytes
    except (struct.error, OverflowError) as error:
        raise ImageError(
            f"the TIFF breaks off in the directory of page {max(0, len(offsets) - 1)}; {COPY_AGAIN}"
        ) from error
    if not offsets:
        raise ImageError(f"a TIFF without pages; {COPY_AGAIN}")
    return list(offsets)


def _check_tags(data: bytes, order: str, first: int, n_tags: int, entry_bytes: int, *, page: int) -> None:
    """Refuse tags whose type or number of values no writer gives them."""
    if n_tags > MAX_TAGS:
        raise ImageError(f"page {page} has {n_tags} tags, over {MAX_TAGS}; {COPY_AGAIN}")
    entry = order + ("HHQ" if entry_bytes == 20 else "HHI")
    for index in range(n_tags):
        code, kind, n_values = struct.unpack_from(entry, data, first + index * entry_bytes)
        if code in _PER_SEGMENT and n_values > MAX_SEGMENTS:
            raise ImageError(f"page {page} is in {n_values} strips or tiles, over {MAX_SEGMENTS}; save it uncompressed")
        most = 1 if code in _PER_PAGE else 4 if code in _PER_SAMPLE else MAX_SEGMENTS if code in _PER_SEGMENT else None
        if most is not None and not (kind in _NUMBERS and 1 <= n_values <= most):
            raise ImageError(f"page {page}: tag {code} holds {n_values} values of type {kind}; {SAVE_AS}")


def _check_page(page: tifffile.TiffPage, data: bytes, limits: PageLimits) -> None:
    size_hw, bits = (page.imagelength, page.imagewidth), page.samplesperpixel * max(8, page.bitspersample)
    check_size(size_hw, limits, page.index, bits=bits)
    kind = (
        f"page {page.index}: compression {int(page.compression)}, photometric {int(page.photometric)}, "
        f"{page.samplesperpixel} x {page.bitspersample} bits"
    )
    if page.compression not in _COMPRESSIONS:
        raise ImageError(f"{kind}: this compression is not read; save it uncompressed, as LZW or Deflate")
    jpeg_only = page.photometric == 6 and page.compression != 7
    if page.photometric not in _PHOTOMETRICS or jpeg_only or page.dtype is None or page.dtype.kind not in "buif":
        raise ImageError(f"{kind}: this kind of pixel is not read; {SAVE_AS}")
    if page.imagedepth != 1 or page.tiledepth > 1 or not 1 <= page.samplesperpixel <= 4:
        raise ImageError(f"{kind}: neither gray nor RGB; {SAVE_AS}")
    if page.tilewidth * page.tilelength * bits > 8 * limits.max_page_bytes:
        raise ImageError(f"{kind}: tiles of {page.tilewidth} x {page.tilelength} px; {SAVE_AS}")
    _check_segments(page, data, limits)


def _check_segments(page: tifffile.TiffPage, data: bytes, limits: PageLimits) -> None:
    offsets, counts = page.dataoffsets, page.databytecounts
    whole = len(offsets) == len(counts) == math.prod(page.chunked)
    whole = whole and all(start > 0 and 0 < n <= len(data) - start for start, n in zip(offsets, counts, strict=True))
    if whole and page.compression == 1:
        whole = 8 * sum(counts) >= page.imagelength * page.imagewidth * page.samplesperpixel * page.bitspersample
    if not whole:
        raise ImageError(f"page {page.index}: pixels are missing; {COPY_AGAIN}")
    if page.compression == 7:
        for start, n in zip(offsets, counts, strict=True):
            H, W = jpeg_size(data[start : start + n])
            if limits.max_pixels < H * W:
                raise ImageError(f"page {page.index}: a JPEG tile of {W} x {H} px; {SAVE_AS}")


def _samples(page: tifffile.TiffPage) -> NDArray[Any]:
    samples = page.asarray(maxworkers=1)
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, -1)
    if page.photometric == 3:
        palette = (np.asarray(page.colormap) >> 8).astype(np.uint8).T
        return np.take(luma(palette[None])[0], samples)
    if page.photometric == 0:
        return ~samples if samples.dtype.kind in "bui" else -samples
    return samples
