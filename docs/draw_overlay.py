"""Draw docs/images/overlay.jpg: one synthetic field with four defects, reviewed by the shipped models.

``python docs/draw_overlay.py`` needs the built model repository and the learning side. The picture shows what
``semwatch review`` wrote, scaled down; nothing is drawn by hand.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import tifffile

from semwatch_training.synthetic.info_bar import draw_info_bar
from semwatch_training.synthetic.rendering import render

TARGET = Path(__file__).parent / "images" / "overlay.jpg"
FEI_TAG = 34682
"""Where FEI's microscopes, and this picture, keep the size of a pixel."""
WIDTH_PX = 576
JPEG_QUALITY = 60


def main() -> None:
    """Render, review, scale down, write."""
    field = render("BEOL", seed=904, size_hw=(768, 768), defects=["bridge", "scratch", "particle", "void"])
    bar = draw_info_bar(768, field.pixel_nm, "01/05/2026 08:12", "TLD", dark=True)
    tag = f"[Scan]\r\nPixelWidth={field.pixel_nm * 1e-9}\r\n[Image]\r\nResolutionY=768\r\n"
    with tempfile.TemporaryDirectory() as folder:
        image, results = Path(folder, "field.tif"), Path(folder, "results")
        page = np.vstack([field.pixels, bar])
        tifffile.imwrite(image, page, photometric="minisblack", metadata=None, extratags=[(FEI_TAG, "s", 0, tag, True)])
        command = [sys.executable, "-m", "semwatch", "review", str(image), "--out", str(results)]
        subprocess.run(command, check=True, timeout=300)
        (overlay,) = results.rglob("*.overlay.png")
        picture = cv2.imread(str(overlay))
    height_px = round(picture.shape[0] * WIDTH_PX / picture.shape[1])
    picture = cv2.resize(picture, (WIDTH_PX, height_px), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(TARGET), picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1])


if __name__ == "__main__":
    main()
