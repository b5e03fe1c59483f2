"""A decoded page as the formats give it, and the limits that its header is held against before it is decoded."""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ImageError

COPY_AGAIN = "the copy is incomplete or damaged; copy the file again from the tool"
SAVE_AS = "save it as 8- or 16-bit gray or RGB"
MAX_ASPECT = 100
"""Longer side by shorter one: beyond, it is no field, and the stages after decoding take memory by the longer side."""
MAX_BYTES_PER_PIXEL = 8
"""Decoded bytes, for each pixel of the largest page: 16-bit RGB with alpha, or 64-bit gray, at the largest size."""


class PageLimits(NamedTuple):
    """Limits of a file, as ``decoding.decode`` has them."""

    max_pixels: int
    max_total_pixels: int
    max_pages: int
    min_side_px: int

    @property
    def max_page_bytes(self) -> int:
        """Bytes of one page as it is decoded, before it becomes gray."""
        return MAX_BYTES_PER_PIXEL * self.max_pixels


class Page(NamedTuple):
    """A page before it is gray."""

    samples: NDArray[Any]
    """(H, W) or (H, W, 1..4): gray, gray + alpha, RGB, RGB + alpha."""
    vendor: str | None = None
    pixel_nm: float | None = None
    field_height: int | None = None
    """Rows above the vendor's info bar, where the tags say it."""


def in_mpx(n_pixels: int) -> str:
    """Say a number of pixels in the unit of ``limits.max_image_mpx``.

    >>> in_mpx(67_108_864)
    '67.109'
    """
    return f"{n_pixels / 1e6:.3f}".rstrip("0").rstrip(".")


def check_size(size_hw: tuple[int, int], limits: PageLimits, page: int = 0, *, bits: int = 8) -> None:
    """Hold the size in a header against the limits.

    Args:
        bits: of one pixel, all its samples together.

    Raises:
        ImageError: with the measure, and the setting that allows more where one does.
    """
    H, W = size_hw
    says = f"page {page} is {W} x {H} px"
    if min(H, W) < limits.min_side_px:
        raise ImageError(f"{says}, sides under {limits.min_side_px} px; save the full-size image")
    if limits.max_pixels < H * W:
        raise ImageError(
            f"{says}, {in_mpx(H * W)} million, over {in_mpx(limits.max_pixels)}; "
            f"tile it or raise limits.max_image_mpx in site.yaml"
        )
    if max(H, W) > MAX_ASPECT * min(H, W):
        raise ImageError(f"{says}, one side over {MAX_ASPECT} times the other; save the field without stitching")
    if H * W * bits > 8 * limits.max_page_bytes:
        raise ImageError(
            f"{says} of {bits} bits, {H * W * bits / 8e6:.0f} MB, over {limits.max_page_bytes / 1e6:.0f} MB; "
            f"{SAVE_AS}, or raise limits.max_image_mpx in site.yaml"
        )


def luma(samples: NDArray[Any]) -> NDArray[Any]:
    """Return (H, W) BT.601 luma of gray, RGB, or either with alpha; a gray RGB image comes out as it went in."""
    if samples.ndim == 2:
        return samples
    if samples.shape[2] < 3:
        return samples[..., 0]
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(samples[..., :3]), cv2.COLOR_RGB2GRAY))
