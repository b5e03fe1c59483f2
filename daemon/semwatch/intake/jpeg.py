"""The header of a JPEG, read without decoding: its size, and whether decoding it ends in time."""

import struct

from semwatch.errors import ImageError
from semwatch.intake.page import COPY_AGAIN

MAX_SCANS = 64
"""A progressive JPEG has about 10; each costs a pass over all pixels, and a small file can hold thousands."""


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return (H, W) of a JPEG from its frame header, having seen that the end marker is there and the scans are few.

    Raises:
        ImageError: for another kind of JPEG, one that breaks off, or one of too many scans.
    """
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
                raise ImageError(f"the JPEG has no end marker; {COPY_AGAIN}")
            n_scans = data.count(b"\xff\xda", start)  # in coded data 0 follows every 255
            if n_scans > MAX_SCANS:
                raise ImageError(f"a JPEG of {n_scans} scans, over {MAX_SCANS}; save it as PNG")
            return H, W
        start += 2 + length
    raise ImageError(f"the JPEG has no frame header; {COPY_AGAIN}")
