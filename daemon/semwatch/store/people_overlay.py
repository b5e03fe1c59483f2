"""People's verdicts on the overlay, beside the model's: a plate at each defect they judged, a box at each they missed.

The picture as the models have it is kept beside, so that a verdict can change and be drawn again.
"""

from pathlib import Path

import cv2
import numpy as np

from semwatch.defects import Box
from semwatch.store import overlay
from semwatch.store.overlay import Colour, Image
from semwatch.store.review_record import PageRecord
from semwatch.system import files

PERSON: Colour = (255, 255, 255)
DASH_PX = 6
OF_MODELS = ".model"
"""In the name of the picture without people's verdicts, before the suffix of overlays."""


def update(path: Path, page: PageRecord) -> None:
    """Draw what people said of a page on its overlay, or take it off; nothing where there is no overlay of ours.

    Raises:
        OSError: the disk refused.
    """
    kept = of_models(path)
    people = bool(page.missed) or any(defect.human is not None for defect in page.defects)
    source = kept if kept.exists() else path
    if not source.exists() or (not people and source is path):
        return
    data = source.read_bytes()
    if not people:
        files.write_whole(path, data)
        kept.unlink(missing_ok=True)
        return
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if picture is None or not draw(drawn := np.array(picture, np.uint8), page):
        return
    if source is path:
        files.write_whole(kept, data)
    files.write_whole(path, overlay.encode_png(drawn))


def of_models(path: Path) -> Path:
    """Where the picture of an overlay lies without people's verdicts, once there are some."""
    stem = path.name.removesuffix(".overlay.png")
    return path.with_name(f"{stem}{OF_MODELS}.overlay.png")


def draw(picture: Image, page: PageRecord) -> bool:
    """Draw into an overlay of the page; False, and nothing is drawn, where the picture is of another size."""
    placed = overlay.placed(picture, (page.height_px, page.width_px))
    if placed is None:
        return False
    area, offset, scale = placed
    boxes = [overlay.scaled_box(defect.box_xyxy, scale, area, offset) for defect in page.defects]
    taken = [*boxes, *overlay.plates_of(page.defects, boxes, area)]
    for defect, box in zip(page.defects, boxes, strict=True):
        if defect.human is None:
            continue
        if defect.human.label is None:
            cv2.line(area, box[:2], (box[2] - 1, box[3] - 1), overlay.BLACK, 3)
            cv2.line(area, box[:2], (box[2] - 1, box[3] - 1), PERSON, 1)
        taken.append(_plate(area, f"{defect.defect_id} person: {defect.human.label or 'no defect'}", box, taken))
    for missed in page.missed:
        box = overlay.scaled_box(missed.box_xyxy, scale, area, offset)
        _dashed(area, box)
        taken += [box, _plate(area, f"person: {missed.label}, missed", box, taken)]
    return True


def _plate(area: Image, text: str, box: Box, taken: list[Box]) -> Box:
    plate = overlay.place(box, text, area, taken)
    overlay.draw_plate(area, text, plate, PERSON)
    return plate


def _dashed(area: Image, box: Box) -> None:
    x0, y0, x1, y1 = box[0], box[1], box[2] - 1, box[3] - 1
    for (ax, ay), (bx, by) in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
        n = max(1, int(np.hypot(bx - ax, by - ay)) // DASH_PX)
        for i in range(0, n, 2):
            start, end = ((ax + (bx - ax) * t // n, ay + (by - ay) * t // n) for t in (i, min(i + 1, n)))
            cv2.line(area, start, end, overlay.BLACK, 4)
            cv2.line(area, start, end, PERSON, 2)
