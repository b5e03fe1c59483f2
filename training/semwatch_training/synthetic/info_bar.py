"""The strip a microscope writes under its image: voltage, magnification, detector, date and a scale bar."""

import cv2
import numpy as np
from numpy.typing import NDArray

HV_KV = 0.8
"""Landing energy of a review microscope; low, so that resist and oxide survive it."""
_SCREEN_WIDTH_NM = 2.5e8
"""Magnification is quoted for a picture 250 mm wide."""


def draw_info_bar(width: int, pixel_nm: float, recorded: str, detector: str, *, dark: bool) -> NDArray[np.uint8]:
    """Draw a bar of (h, width) uint8: two lines of text and a scale bar; white on black, or black on white."""
    paper, ink = (0, 255) if dark else (255, 0)
    height = max(width // 20, 28)
    bar = np.full((height, width), paper, np.uint8)
    bar[:2] = ink
    magnification = _SCREEN_WIDTH_NM / (width * pixel_nm) / 1000
    lines = (f"HV {HV_KV:.2f} kV   mag {magnification:.0f} kx", f"det {detector}   {recorded}")
    scale_px = _draw_scale(bar, pixel_nm, ink)
    font = cv2.FONT_HERSHEY_SIMPLEX
    room = width - scale_px - 4 * (height // 4)
    (wide, tall), _ = cv2.getTextSize(max(lines, key=len), font, 1.0, 1)
    size = min(room / wide, 0.36 * (height - 6) / tall)
    for i, line in enumerate(lines):
        cv2.putText(bar, line, (height // 4, 3 + round((i + 0.82) * (height - 6) / 2)), font, size, ink, 1, cv2.LINE_AA)
    return bar


def _draw_scale(bar: NDArray[np.uint8], pixel_nm: float, ink: int) -> int:
    """Draw a ruler of a round length at the right end, with its length over it; return its width in pixels."""
    height, width = bar.shape
    longest = 0.22 * width * pixel_nm
    decade = 10.0 ** np.floor(np.log10(longest))
    length_nm = float(max(step * decade for step in (1, 2, 5) if step * decade <= longest))
    text = f"{length_nm:.0f} nm" if length_nm < 1000 else f"{length_nm / 1000:.0f} um"
    length_px = round(length_nm / pixel_nm)
    right, y = width - height // 4, round(0.75 * height)
    cv2.line(bar, (right - length_px, y), (right, y), ink, max(height // 20, 1))
    for x in (right - length_px, right):
        cv2.line(bar, (x, y - height // 8), (x, y + height // 8), ink, max(height // 20, 1))
    size = min(height / 70, length_px / 110)
    cv2.putText(
        bar, text, (right - length_px, round(0.5 * height)), cv2.FONT_HERSHEY_SIMPLEX, size, ink, 1, cv2.LINE_AA
    )
    return length_px
