"""What the tags of FEI, Zeiss and Olympus say of a TIFF page: vendor, pixel size, and where the information bar begins.

Each is None where the tags do not say it.
"""

import math
from collections.abc import Mapping
from typing import Any

import tifffile

_UNIT_NM = {"fm": 1e-6, "pm": 1e-3, "nm": 1.0, "µm": 1e3, "μm": 1e3, "um": 1e3, "mm": 1e6, "m": 1e9}


def vendor_of(page: tifffile.TiffPage) -> tuple[str | None, float | None, int | None]:
    """Return vendor, nm of a pixel, and rows above the information bar."""
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
