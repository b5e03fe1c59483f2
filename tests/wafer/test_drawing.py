"""Pictures: every defect is drawn once, in its colour and form, inside the picture; both formats open."""

import re
from collections import Counter
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from planted_wafers import klarf_of, planted_wafer
from semwatch import klarf
from semwatch.wafer.drawing import COLOURS, OTHER, class_looks, draw_stack, draw_wafer
from semwatch.wafer.picture import SCALE, Disc, Drawing, Path, Words, png, svg
from semwatch.wafer.wafer_map import WaferMap, wafer_map


def made(mark: str = "DOWN", n_random: int = 60, **names: str) -> WaferMap:
    text = klarf_of(planted_wafer(1, n_random=n_random, n_repeaters=0, n_scratches=0), mark=mark, **names)
    (lot,) = klarf.parse(text.encode()).lots
    return wafer_map(lot, lot.wafers[0])


def decoded(drawing: Drawing) -> np.ndarray:
    found = cv2.imdecode(np.frombuffer(png(drawing), np.uint8), cv2.IMREAD_COLOR)
    assert found is not None
    return found


def test_every_defect_is_drawn_once_where_it_lies() -> None:
    wafer = made()
    drawing = draw_wafer(wafer, [], [])
    marks = [one for one in drawing.shapes if isinstance(one, Disc) and one.fill == COLOURS[0] and one.x < 740]
    assert len(marks) == 60
    scale = 320 / wafer.radius_um
    expected = {(round(390 + x * scale, 3), round(425 - y * scale, 3)) for x, y in wafer.on_wafer_um.tolist()}
    assert {(round(one.x, 3), round(one.y, 3)) for one in marks} == expected


@pytest.mark.parametrize(("mark", "way"), [("DOWN", (0, 1)), ("LEFT", (-1, 0)), ("UP", (0, -1)), ("RIGHT", (1, 0))])
def test_notch_is_where_the_file_says(mark: str, way: tuple[int, int]) -> None:
    edge = next(one for one in draw_wafer(made(mark), [], []).shapes if isinstance(one, Path))
    distance = np.hypot(*(edge.points - [390, 425]).T)
    notch = edge.points[distance.argmin()] - [390, 425]
    assert distance.min() < 320 * 0.96
    assert notch / np.hypot(*notch) == pytest.approx(way, abs=1e-6)


def test_svg_is_sound_and_names_lot_wafer_and_step_whatever_they_hold() -> None:
    text = svg(draw_wafer(made(lot="<&\x07>", name="w"), [], []))
    root = ElementTree.fromstring(text)
    words = " ".join(one.text or "" for one in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "<&\N{REPLACEMENT CHARACTER}>" in words
    assert "step M2-CMP" in words
    assert "slot 3" in words
    assert not re.search(r"nan|inf", text)


def test_png_has_the_colours_and_the_size_of_the_drawing() -> None:
    drawing = draw_wafer(made(), [], [])
    picture = decoded(drawing)
    assert picture.shape == (drawing.height * SCALE, drawing.width * SCALE, 3)
    blue = np.array([int(COLOURS[0][i : i + 2], 16) for i in (5, 3, 1)])
    assert np.count_nonzero((picture == blue).all(2)) > 60 * 20


def test_wafer_without_defects_is_drawn_and_so_is_its_stack() -> None:
    wafer = made(n_random=0)
    for drawing in (draw_wafer(wafer, [], []), draw_stack([wafer], [])):
        assert any(isinstance(one, Words) and one.text == "none" for one in drawing.shapes)
        assert decoded(drawing).min() < 128


def test_stack_lays_the_defects_of_all_wafers_into_one_die() -> None:
    wafer = made()
    drawing = draw_stack([wafer, wafer], [])
    (die,) = [one for one in drawing.shapes if isinstance(one, Path) and one.fill == "#FFFFFF" and one.closed]
    low, high = die.points.min(0), die.points.max(0)
    marks = [one for one in drawing.shapes if isinstance(one, Disc) and one.x < 740]
    assert len(marks) == 120
    assert all(low[0] <= one.x <= high[0] and low[1] <= one.y <= high[1] for one in marks)
    assert (high - low)[0] / (high - low)[1] == pytest.approx(wafer.pitch_um[0] / wafer.pitch_um[1])


def test_more_classes_than_colours_share_one_grey_and_the_most_frequent_have_their_own() -> None:
    wafer = made()
    rng = np.random.default_rng(0)
    many = WaferMap(**{**vars(wafer), "classes": np.minimum(rng.geometric(0.2, 60), 11)})
    looks = class_looks([many])
    counted = Counter(many.classes.tolist())
    own = [number for number in looks if looks[number] != OTHER]
    assert len({looks[number] for number in own}) == len(own) == len(COLOURS) - 1
    assert min(counted[number] for number in own) >= max(counted[number] for number in looks if number not in own)
