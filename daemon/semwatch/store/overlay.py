"""The picture of a review: the micrograph with heat, contours, boxes and names, and a legend strip under it.

Heat is scaled around the gate threshold, never by the image's own range: a clean page looks clean. Colours are told
apart by colour-blind eyes too, and every box says its verdict in words. A page that was compared with a reference has
three panels: the micrograph, the reference laid over it, and their difference.
"""

import struct
import zlib
from collections.abc import Iterable, Sequence

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box, Defect, PageReview, ScoreMap, VerdictKind
from semwatch.store.review_record import DefectRecord

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

MAX_SIDE_PX, MIN_SIDE_PX = 1024, 640
"""Longest side of the micrograph in the picture: larger pages are averaged, smaller ones enlarged by whole pixels."""
MIN_WIDTH_PX, STRIP_PX = 640, 50
MAX_NAMED = 24
"""With more defects than this on a page, labels are bare numbers."""

HEAT_FROM, HEAT_TO = 0.8, 2.0
"""Heat begins at this multiple of the gate threshold and is full at that one."""
HEAT_ALPHA = 0.45

# Okabe and Ito's palette (BGR), the light ones: black text reads on all of them.
COLOURS: dict[VerdictKind, Colour] = {
    "known": (233, 180, 86),
    "novel": (115, 158, 240),
    "unknown": (66, 228, 240),
    "non-decidable": (190, 150, 240),
    "defect-free": (205, 205, 205),
}
BLACK, WHITE, GRAY, STRIP = (0, 0, 0), (255, 255, 255), (165, 165, 165), (24, 24, 24)
FLAGGED = (120, 120, 255)
"""Colour of what is wrong with the page itself."""
GAP_PX = 8
"""Between the panels of a page with a reference."""
DIFFERENCE_GAIN = 3.0
"""How much the difference is enlarged to be seen."""
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
TEXT_PX, PAD_PX, GAUGE_PX, LINE_PX = 10, 3, 100, 18


def draw(page: PageReview, *, caption: str = "") -> Image:
    """Draw one page's review.

    Args:
        page: any size, from one pixel up.
        caption: what stands in the legend beside the scores: recipe and model versions.

    Returns:
        (H + STRIP_PX, W, 3) BGR; W and H are at most ``MAX_SIDE_PX``, W at least ``MIN_WIDTH_PX``. With a reference
        there are three of W and two gaps between them.
    """
    gray, scale = _fit(page.micrograph.pixels)
    picture = np.asarray(cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR), np.uint8)
    field = _scaled(page.micrograph.field_xyxy, scale, picture)
    _blend_heat(picture[field[1] : field[3], field[0] : field[2]], page)
    _outline_mask(picture[field[1] : field[3], field[0] : field[2]], page.mask)
    panels = _compared_panels(page, field, gray.shape)
    H, W = gray.shape
    canvas, offset = _on_canvas(picture if panels is None else np.hstack([picture, *panels]))
    boxes = [_scaled(defect.box_xyxy, scale, picture) for defect in page.defects]
    area = canvas[:H] if panels is None else canvas[:H, : offset + W]
    _draw_defects(area, page.defects, [(x0 + offset, y0, x1 + offset, y1) for x0, y0, x1, y1 in boxes])
    if panels is not None:
        _label_panels(canvas[:H], page, offset, W, boxes)
    _draw_legend(canvas[-STRIP_PX:], page, caption, scale)
    return canvas


def encode_png(picture: Image) -> bytes:
    """Encode (H, W, 3) BGR as PNG, for speed: libdeflate's level 1 over differences between rows.

    cv2.imencode at its fastest setting of like size takes three times as long. A picture without colour, which most
    clean pages are, is stored as gray: a third of the bytes.
    """
    H, W = picture.shape[:2]
    blue, green, red = cv2.split(picture)
    is_gray = np.array_equal(blue, green) and np.array_equal(green, red)
    values = green if is_gray else cv2.merge([red, green, blue]).reshape(H, 3 * W)
    rows = np.empty((H, 1 + values.shape[1]), np.uint8)
    rows[:, 0] = 2  # filter type "up"
    rows[0, 1:] = values[0]
    np.subtract(values[1:], values[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", W, H, 8, 0 if is_gray else 2, 0, 0, 0)
    packed = bytes(imagecodecs.deflate_encode(rows.tobytes(), level=1))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def tile(
    pictures: Iterable[Image | None], *, columns: int, tile_px: int, captions: Sequence[Sequence[str]] = ()
) -> Image:
    """Lay pictures out in rows, each shrunk or enlarged into a square tile; None leaves its tile dark.

    With ``captions``, lines of words stand below each; what is wider than its tile is shortened.
    """
    empty = np.full((tile_px, tile_px, 3), STRIP, np.uint8)
    tiles = [empty if p is None else _as_tile(p, tile_px) for p in pictures]
    if captions:
        n_lines = max(map(len, captions))
        tiles = [
            np.vstack([one, _caption(lines, tile_px, n_lines)]) for one, lines in zip(tiles, captions, strict=True)
        ]
        empty = np.vstack([empty, _caption((), tile_px, n_lines)])
    columns = max(1, min(columns, len(tiles)))
    tiles += [empty] * (-len(tiles) % columns or (0 if tiles else 1))
    rows = [np.hstack(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return np.vstack(rows)


def _caption(lines: Sequence[str], width: int, n_lines: int) -> Image:
    strip = np.full((n_lines * LINE_PX + GAP_PX, width, 3), STRIP, np.uint8)
    for i, text in enumerate(lines):
        _write(strip, _shortened(text, width - 2 * PAD_PX), (PAD_PX, (i + 1) * LINE_PX - PAD_PX), GRAY if i else WHITE)
    return strip


def _as_tile(picture: Image, tile_px: int) -> Image:
    square = np.full((tile_px, tile_px, 3), STRIP, np.uint8)
    inner = tile_px - 4
    scale = inner / max(picture.shape[:2])
    w, h = (max(1, round(side * scale)) for side in picture.shape[1::-1])
    x, y = 2 + (inner - w) // 2, 2 + (inner - h) // 2
    square[y : y + h, x : x + w] = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA)
    return square


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


# --- the micrograph ------------------------------------------------------------------------------------------------


def _fit(pixels: Image) -> tuple[Image, float]:
    """Resize to the picture's size; the scale is the same for both axes."""
    H, W = pixels.shape
    scale = _scale_of(H, W)
    if scale == 1:
        return pixels, scale
    size_wh = max(1, round(W * scale)), max(1, round(H * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(pixels, size_wh, interpolation=interpolation), np.uint8), scale


def _scale_of(H: int, W: int) -> float:
    longest = max(H, W)
    enlarged = min(-(-MIN_SIDE_PX // longest), MAX_SIDE_PX // longest)
    return MAX_SIDE_PX / longest if longest > MAX_SIDE_PX else float(max(1, enlarged))


def _scaled(box_xyxy: Box, scale: float, picture: Image) -> Box:
    """Scale a box into the picture; it keeps at least one pixel."""
    H, W = picture.shape[:2]
    x0, y0 = (min(max(0, int(v * scale)), end - 1) for v, end in zip(box_xyxy[:2], (W, H), strict=True))
    x1, y1 = (min(int(np.ceil(v * scale)), end) for v, end in zip(box_xyxy[2:], (W, H), strict=True))
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _on_canvas(picture: Image) -> tuple[Image, int]:
    """Centre the picture on a canvas that is wide enough for the legend."""
    H, W = picture.shape[:2]
    canvas = np.empty((H + STRIP_PX, max(W, MIN_WIDTH_PX), 3), np.uint8)
    offset = (canvas.shape[1] - W) // 2
    canvas[:H, :offset] = canvas[:H, offset + W :] = STRIP
    canvas[:H, offset : offset + W] = picture
    canvas[H:] = STRIP
    return canvas, offset


# --- the reference -------------------------------------------------------------------------------------------------


def _compared_panels(page: PageReview, field: Box, size_hw: tuple[int, ...]) -> list[Image] | None:
    """Return the reference and the difference, each a panel of the micrograph's size after a gap; None without them.

    The reference has the gain and offset of the field, the difference is enlarged about gray; what has no counterpart
    stays dark.
    """
    reference = page.reference
    if reference is None or reference.aligned is None or reference.overlap is None:
        return None
    smooth = [
        cv2.GaussianBlur(one, (0, 0), 1.0).astype(np.float32) for one in (page.micrograph.field, reference.aligned)
    ]
    difference = np.clip(128 + DIFFERENCE_GAIN * (smooth[0] - smooth[1]), 0, 255).astype(np.uint8)
    x0, y0, x1, y1 = field
    panels = []
    for shown in (reference.aligned, difference):
        dark = np.where(reference.overlap, shown, np.uint8(STRIP[0]))
        panel = np.full((size_hw[0], GAP_PX + size_hw[1], 3), STRIP, np.uint8)
        small = cv2.resize(dark, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
        panel[y0:y1, GAP_PX + x0 : GAP_PX + x1] = small[..., None]
        panels.append(panel)
    return panels


def _label_panels(area: Image, page: PageReview, offset: int, width: int, boxes: Sequence[Box]) -> None:
    """Name the panels, and outline the defects in the two that have no names of defects."""
    assert page.reference is not None
    names = ("inspected", f"reference {page.reference.name}", "difference")
    for i, name in enumerate(names):
        left = offset + i * (width + GAP_PX)
        if i:
            for defect, (x0, y0, x1, y1) in zip(page.defects, boxes, strict=True):
                corners = (left + x0 - 3, y0 - 3), (left + x1 + 2, y1 + 2)
                cv2.rectangle(area, *corners, COLOURS[defect.verdict.kind], 1)
        text = _shortened(name, width - 2 * PAD_PX - 2)
        plate = left, len(area) - TEXT_PX - 2 * PAD_PX, left + _text_width(text) + 2 * PAD_PX, len(area)
        draw_plate(area, text, plate, GRAY)


def _reference_in_words(page: PageReview) -> str:
    reference = page.reference
    if reference is None:
        return ""
    if not reference.used or reference.shift_px is None or reference.correlation is None:
        return f"judged alone: {reference.reason}"
    dx, dy = reference.shift_px
    return f"against {reference.name}: shift {dx:.1f}, {dy:.1f} px, correlation {reference.correlation:.2f}"


def _blend_heat(picture: Image, page: PageReview) -> None:
    """Blend the heat into a field of gray where it is hot: gray * (1 - alpha) + colour * alpha."""
    if page.score_map is None:
        return
    level = _heat_level(page.score_map.values, page.gate_threshold, picture.shape[:2])
    x0, y0, w, h = cv2.boundingRect(level)
    if w == 0:
        return
    window, hot = picture[y0 : y0 + h, x0 : x0 + w], level[y0 : y0 + h, x0 : x0 + w]
    faded = cv2.multiply(window[..., 0], cv2.LUT(hot, _FADE), scale=1 / 255)
    cv2.add(cv2.merge([faded, faded, faded]), cv2.applyColorMap(hot, _GLOW), dst=window)


def _heat_level(values: NDArray[np.float32], gate: float, size_hw: tuple[int, ...]) -> Image:
    """Resize a score map to ``size_hw``, 0 at ``HEAT_FROM`` gate thresholds and 255 at ``HEAT_TO``."""
    low, high = HEAT_FROM * gate, HEAT_TO * gate
    heat = np.clip((values - low) * (255 / max(high - low, 1e-9)), 0, 255)
    (H, W), (h, w) = size_hw, heat.shape
    # Cubic on the coarse grid, linear from there: smooth blobs at the price of the linear step.
    heat = cv2.resize(heat, (min(4 * w, W), min(4 * h, H)), interpolation=cv2.INTER_CUBIC)
    level = np.clip(np.rint(heat), 0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(level, (W, H), interpolation=cv2.INTER_LINEAR), np.uint8)


def _outline_mask(field: Image, mask: NDArray[np.bool_]) -> None:
    """Outline the defect mask, smoothed to the picture's grid, white in black."""
    if not mask.any():
        return
    H, W = field.shape[:2]
    soft = cv2.resize(mask.astype(np.uint8) * 255, (W, H), interpolation=cv2.INTER_LINEAR)
    _, smooth = cv2.threshold(soft, 127, 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(smooth, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(field, contours, -1, BLACK, 3)
    cv2.drawContours(field, contours, -1, WHITE, 1)


# --- the defects ---------------------------------------------------------------------------------------------------


def label_of(defect: Defect | DefectRecord) -> str:
    """Name a defect in a few words: number, what it is, how sure."""
    verdict = defect.verdict
    if verdict.kind == "unknown":
        return f"{defect.defect_id} unknown"
    if verdict.kind == "non-decidable":
        return f"{defect.defect_id} non-decidable {' | '.join(near.label for near in verdict.nearest)}"
    return f"{defect.defect_id} {verdict.label} {verdict.confidence:.2f}"


def _draw_defects(area: Image, defects: Sequence[Defect], boxes: Sequence[Box]) -> None:
    around = [(x0 - 3, y0 - 3, x1 + 3, y1 + 3) for x0, y0, x1, y1 in boxes]
    for defect, (x0, y0, x1, y1) in zip(defects, around, strict=True):
        cv2.rectangle(area, (x0, y0), (x1 - 1, y1 - 1), BLACK, 4)
        cv2.rectangle(area, (x0, y0), (x1 - 1, y1 - 1), COLOURS[defect.verdict.kind], 2)
    for defect, plate in zip(defects, plates_of(defects, around, area), strict=True):
        draw_plate(area, _words_of(defect, len(defects)), plate, COLOURS[defect.verdict.kind])


def plates_of(defects: Sequence[Defect | DefectRecord], around: Sequence[Box], area: Image) -> list[Box]:
    """Where the names of defects stand, given the boxes around them in the picture."""
    taken: list[Box] = []
    for defect, box in zip(defects, around, strict=True):
        others = [*taken, *(other for other in around if other != box)]
        taken.append(place(box, _words_of(defect, len(defects)), area, others))
    return taken


def _words_of(defect: Defect | DefectRecord, n_defects: int) -> str:
    return label_of(defect) if n_defects <= MAX_NAMED else str(defect.defect_id)


def placed(picture: Image, size_hw: tuple[int, int]) -> tuple[Image, int, float] | None:
    """Where the page of a size lies in its overlay: the part that holds it, its left edge, its scale.

    None where the picture is no overlay of such a page.
    """
    scale = _scale_of(*size_hw)
    H, W = size_hw if scale == 1 else (max(1, round(side * scale)) for side in size_hw)
    offset_of = {max(width, MIN_WIDTH_PX): (max(width, MIN_WIDTH_PX) - width) // 2 for width in (3 * W + 2 * GAP_PX, W)}
    if len(picture) != H + STRIP_PX or picture.shape[1] not in offset_of:
        return None
    offset = offset_of[picture.shape[1]]
    area = picture[:H] if picture.shape[1] == max(W, MIN_WIDTH_PX) else picture[:H, : offset + W]
    return area, offset, scale


def scaled_box(box_xyxy: Box, scale: float, area: Image, offset: int) -> Box:
    """The frame around a box of the page, in the picture."""
    x0, y0, x1, y1 = _scaled(box_xyxy, scale, area[:, offset:])
    return x0 + offset - 3, y0 - 3, x1 + offset + 3, y1 + 3


def place(box: Box, text: str, area: Image, taken: Sequence[Box]) -> Box:
    """Find the spot for words by a box that covers least of what is taken."""
    text = _shortened(text, area.shape[1] - 2 * PAD_PX - 2)
    return _place(box, _text_width(text), area.shape[:2], taken)


def _place(box: Box, width: int, size_hw: tuple[int, ...], taken: Sequence[Box]) -> Box:
    """Find the spot by the box, inside the image, that covers least of what is taken."""
    (H, W), (x0, y0, x1, y1) = size_hw, box
    w, h = width + 2 * PAD_PX, TEXT_PX + 2 * PAD_PX
    spots = [(x0, y0 - h - 1), (x0, y1 + 1), (x1 - w, y0 - h - 1), (x1 - w, y1 + 1), (x1 + 1, y0), (x0 - w - 1, y0)]
    spots += [(x0, y0 - 2 * h - 3), (x0, y1 + h + 3), (x0, y0)]
    plates = []
    for x, y in spots:
        left, top = max(0, min(x, W - w)), max(0, min(y, H - h))
        plates.append((left, top, left + w, top + h))
    return min(plates, key=lambda plate: sum(_overlap(plate, other) for other in [*taken, box]))


def _overlap(a: Box, b: Box) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def draw_plate(area: Image, text: str, plate: Box, colour: Colour) -> None:
    """Write words on a plate; what is wider than the picture is shortened."""
    text = _shortened(text, area.shape[1] - 2 * PAD_PX - 2)
    x0, y0, x1, y1 = plate
    cv2.rectangle(area, (x0 - 1, y0 - 1), (x1, y1), BLACK, 1)
    cv2.rectangle(area, (x0, y0), (x1 - 1, y1 - 1), colour, cv2.FILLED)
    _write(area, text, (x0 + PAD_PX, y1 - PAD_PX), BLACK)


# --- the legend ----------------------------------------------------------------------------------------------------


def _draw_legend(strip: Image, page: PageReview, caption: str, scale: float) -> None:
    W = strip.shape[1]
    x = 8 if page.score_map is None else _draw_score(strip, page.score_map, page)
    if not page.quality.is_image:
        x += _write(strip, "no image", (x, 18), FLAGGED) + 10
    if page.quality.flags:
        _write(strip, _shortened(page.quality.in_words, W - 8 - x), (x, 18), FLAGGED)
    bar_px = _draw_scale_bar(strip, page.micrograph.pixel_nm, scale)
    _write(strip, _shortened(caption, W - 24 - bar_px), (8, 40), GRAY)


def _draw_score(strip: Image, score_map: ScoreMap, page: PageReview) -> int:
    """Draw gauge, score and verdicts; return where the line goes on."""
    score, gate = score_map.raw_score, page.gate_threshold
    _draw_gauge(strip, score, gate, is_hot=bool(page.defects) or score_map.values.max() > HEAT_FROM * gate)
    relation = ">" if score > gate else "<="
    x = 8 + GAUGE_PX + 10
    x += _write(strip, f"score {score:.3g} {relation} gate {gate:.3g}", (x, 18), WHITE) + 16
    if page.domain == "unknown process":
        x += _write(strip, page.domain, (x, 18), COLOURS["unknown"]) + 10
    for kind, count in _counts(page).items():
        x += _write(strip, f"{count} {kind}" if count else kind, (x, 18), COLOURS[kind]) + 10
    _write(strip, _shortened(_reference_in_words(page), max(0, strip.shape[1] - x - 8)), (x + 6, 18), GRAY)
    return x


def _counts(page: PageReview) -> dict[VerdictKind, int]:
    kinds = [defect.verdict.kind for defect in page.defects]
    found = {kind: kinds.count(kind) for kind in COLOURS if kind in kinds}
    return found or {"defect-free": 0}


def _draw_gauge(strip: Image, score: float, gate: float, *, is_hot: bool) -> None:
    """Draw the heat's colours (grays where the page has none), a tick at the gate, a mark at the image score."""
    x0, y0, y1 = 8, 8, 18
    level = np.linspace(0, 255, GAUGE_PX).astype(np.uint8)
    strip[y0:y1, x0 : x0 + GAUGE_PX] = _INFERNO[level] if is_hot else level[:, None]
    span = (GAUGE_PX - 1) / (HEAT_TO - HEAT_FROM)
    tick = x0 + round((1 - HEAT_FROM) * span)
    cv2.line(strip, (tick, y0 - 3), (tick, y1 + 2), WHITE, 1)
    ratio = min(max(score / gate if gate > 0 else HEAT_TO, HEAT_FROM), HEAT_TO)
    mark = x0 + round((ratio - HEAT_FROM) * span)
    cv2.drawMarker(strip, (mark, y1 + 3), WHITE, cv2.MARKER_TRIANGLE_UP, 7, 2)


def _draw_scale_bar(strip: Image, pixel_nm: float | None, scale: float) -> int:
    """Draw a bar of a round length at the strip's right end; return the width it takes."""
    if pixel_nm is None or not 1e-3 < pixel_nm < 1e9:
        return 0
    W = strip.shape[1]
    nm_per_px = pixel_nm / scale
    length_nm = _round_length(W / 5 * nm_per_px)
    bar = max(1, round(length_nm / nm_per_px))
    text = _length(length_nm)
    left = W - 10 - bar
    cv2.rectangle(strip, (left, 33), (W - 11, 36), WHITE, cv2.FILLED)
    _write(strip, text, (left - 8 - _text_width(text), 40), WHITE)
    return bar + _text_width(text) + 26


def _round_length(at_most: float) -> float:
    power = 10.0 ** np.floor(np.log10(at_most))
    return float(max(step * power for step in (1, 2, 5) if step * power <= at_most * (1 + 1e-9)))


def _length(nm: float) -> str:
    for unit, size in (("mm", 1e6), ("um", 1e3)):
        if nm >= size:
            return f"{nm / size:g} {unit}"
    return f"{nm:g} nm"


# --- text ----------------------------------------------------------------------------------------------------------


def _write(area: Image, text: str, baseline_xy: tuple[int, int], colour: Colour) -> int:
    """Write text and return its width."""
    cv2.putText(area, text, baseline_xy, FONT, FONT_SCALE, colour, 1, cv2.LINE_AA)
    return _text_width(text)


def _text_width(text: str) -> int:
    return int(cv2.getTextSize(text, FONT, FONT_SCALE, 1)[0][0])


def _shortened(text: str, width: int) -> str:
    """Cut text to a width in pixels, with two dots at the end where something is missing."""
    if _text_width(text) <= width:
        return text
    n = len(text)
    while n and _text_width(text[:n] + "..") > width:
        n -= 1
    return text[:n] + ".."


_INFERNO = np.asarray(cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_INFERNO), np.uint8).reshape(256, 3)
_ALPHA = HEAT_ALPHA * np.minimum(1, np.arange(256)[:, None] / 128)  # half way up it is as opaque as it gets
_FADE = np.rint(255 * (1 - _ALPHA)).astype(np.uint8)
_GLOW = np.rint(_INFERNO * _ALPHA).astype(np.uint8)[:, None]
