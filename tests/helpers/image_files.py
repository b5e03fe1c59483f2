"""Small image files of every form that is read, and what damages them."""

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

Gray = NDArray[np.uint8]


def sem(H: int = 96, W: int = 80, seed: int = 0) -> Gray:
    """Noisy vertical lines."""
    lines = 90 + 80 * (np.arange(W) // 20 % 2)
    return (lines + 8 * np.random.default_rng(seed).standard_normal((H, W))).clip(0, 255).astype(np.uint8)


def tiff(*pages: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=options.pop("bigtiff", False), byteorder=options.pop("order", "<")) as out:
        for page in pages:
            out.write(page, metadata=None, **{"photometric": "rgb" if page.ndim == 3 else "minisblack", **options})
    return file.getvalue()


def encoded(extension: str, pixels: NDArray[Any], *options: int) -> bytes:
    return cv2.imencode(extension, pixels, options)[1].tobytes()


def png(W: int, H: int, bits: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", W, H, bits, color, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    signed = ((struct.pack(">I", len(c)), kind + c, struct.pack(">I", zlib.crc32(kind + c))) for kind, c in body)
    return b"\x89PNG\r\n\x1a\n" + b"".join(b"".join(parts) for parts in signed)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_tag(data: bytes, code: int, value: int) -> bytes:
    """A little-endian classic TIFF whose first page says ``value`` (LONG) in a tag it already has."""
    start = struct.unpack_from("<I", data, 4)[0]
    (n_tags,) = struct.unpack_from("<H", data, start)
    entries = [start + 2 + 12 * i for i in range(n_tags)]
    (entry,) = (e for e in entries if struct.unpack_from("<H", data, e)[0] == code)
    return patched(data, entry, struct.pack("<HHII", code, 4, 1, value))


GRAY = sem()
COLOR = np.dstack([GRAY, GRAY[::-1], GRAY[:, ::-1]])
GRAY_RGB = np.dstack([GRAY] * 3)
ALPHA = np.arange(GRAY.size, dtype=np.uint8).reshape(GRAY.shape)
RAMP = np.stack([np.arange(256) * 257] * 3).astype(np.uint16)
VALID = {
    "png": encoded(".png", GRAY),
    "jpeg": encoded(".jpg", GRAY),
    "progressive": encoded(".jpg", COLOR, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "bmp": encoded(".bmp", GRAY),
    "tiff": tiff(GRAY),
    "two pages": tiff(GRAY, GRAY[::-1]),
    "LZW": tiff(GRAY, compression="lzw", predictor=True),
    "tiled JPEG": tiff(GRAY, compression="jpeg", tile=(32, 32)),
    "16-bit float": tiff(GRAY.astype(np.float16)),
}
