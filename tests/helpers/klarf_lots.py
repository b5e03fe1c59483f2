"""A lot as a review tool drops it: one KLARF, and for each defect a TIFF with the image and its reference."""

from collections.abc import Sequence

import cv2
import numpy as np

from image_files import tiff

RECIPE = {
    "name": "test",
    "gate": {"threshold": 0.0},
    "classes": {"particle": {"code": 10}, "defect-free": {"code": 2, "doi": False}},
    "unknown_code": 999,
    "non_decidable_code": 998,
}
"""Every page is searched, and every verdict has a code but those of the head's own classes."""
KLARF = {"pattern": "*.klarf|*.001", "deadline_s": 3600.0, "quiet_s": 0.5}


def image(seed: int, *, side: int = 96) -> bytes:
    """Two pages: a field with a spot, and the same field without."""
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.integers(0, 256, (side, side), dtype=np.uint8), (0, 0), 3)
    shown = field.copy()
    at = (int(rng.integers(20, side - 20)), int(rng.integers(20, side - 20)))
    cv2.circle(shown, at, 5, 255, -1)
    return tiff(shown, field)


def name(defect: int) -> str:
    return f"D{defect:04}.tif"


def klarf(
    defects: Sequence[int],
    *,
    lot: str = "lot 7",
    step: str = "M1",
    end: str = "EndOfFile;\n",
    names: dict[int, str] | None = None,
    extra: str = "",
) -> bytes:
    """KLARF 1.2 with one ``TiffFileName`` for each list, CRLF, and two images a defect."""
    lines = [
        "FileVersion 1 2;",
        f'LotID "{lot}";',
        f'StepID "{step}";',
        'SetupID "tool recipe" 01-02-24 10:00:00;',
        "OrientationMarkLocation DOWN;",
        "DiePitch 10000 10000;",
        "SampleCenterLocation 5000 5000;",
        'ClassLookup 2\r\n 0 "Unclassified"\r\n 10 "Particle";',
        'WaferID "w1";',
        "Slot 3;",
        "DefectRecordSpec 8 DEFECTID XREL YREL XINDEX YINDEX CLASSNUMBER IMAGECOUNT IMAGELIST;",
    ]
    lines += [one for one in [extra] if one]
    for defect in defects:
        file = (names or {}).get(defect, name(defect))
        lines += [f"TiffFileName {file};", f"DefectList\r\n {defect} {defect}.5 200 {defect % 7} 1 0 2 2 1 30 2 31;"]
    return ("\r\n".join(lines) + "\r\n" + end).encode()
