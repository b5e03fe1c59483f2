"""Pictures of a wafer: its map with defects by class, and its dies laid upon each other."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import pi

import numpy as np
from numpy.typing import NDArray

from semwatch.wafer.picture import Disc, Drawing, Path, Shape, Words
from semwatch.wafer.repeaters import Repeater
from semwatch.wafer.signatures import Signature
from semwatch.wafer.wafer_map import WaferMap

# Okabe and Ito's palette, dark enough on white; each class has a form of its own, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5C00")
FORMS = ("disc", "triangle", "square", "diamond", "cross", "down", "star")
OTHER = ("#8A8A8A", "disc")
INK, SOFT, FAINT, GRID = "#222222", "#666666", "#B5B5B5", "#DADDE1"
WAFER, DIE = "#F4F6F8", "#FFFFFF"
FOUND = "#111111"
"""What was found among the defects: rings around repeaters, outlines of scratches."""
WIDTH, HEIGHT = 1040, 780
_MIDDLE, _RADIUS = (390.0, 425.0), 320.0
_LEGEND_X = 760.0
_MAX_LISTED = 9

ToPage = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""(P, 2) um to (P, 2) units of the drawing."""


def draw_wafer(found: WaferMap, repeaters: Sequence[Repeater], signatures: Sequence[Signature]) -> Drawing:
    """The wafer as the file sees it: dies, edge exclusion, notch, defects by class, and what was found among them."""
    to_page = _frame(found)
    looks = class_looks([found])
    shapes: list[Shape] = [*_title(found, _counted(found)), *_substrate(found), *_dies(found, to_page)]
    shapes += _edge(found)
    shapes += [shape for one in signatures for shape in _outline(one, to_page, found)]
    size = 3.0 if len(found.ids) <= 1500 else 2.0 if len(found.ids) <= 6000 else 1.3
    shapes += _defects(to_page(found.on_wafer_um), found.classes, looks, size)
    for n, one in enumerate(repeaters, 1):
        for x, y in to_page(found.on_wafer_um[one.members]).tolist():
            shapes += [Disc(x, y, 6.5, FOUND, width=1.3), Words(x + 8, y - 5, f"R{n}", 9, FOUND, bold=True)]
    shapes += _names(signatures, to_page)
    shapes += _legend(found, looks, repeaters, signatures)
    return Drawing(WIDTH, HEIGHT, f"Wafer map of {_name(found)}", shapes)


def draw_stack(maps: Sequence[WaferMap], repeaters: Sequence[Repeater]) -> Drawing:
    """All dies of one or several wafers of the same product laid upon each other, each defect at its place in the die.

    Args:
        maps: of wafers with the same die pitch.
        repeaters: with members that count through the defects of all maps.
    """
    first = maps[0]
    pitch = first.pitch_um
    scale = min(640.0 / pitch[0], 600.0 / pitch[1])
    left, bottom = 390.0 - pitch[0] * scale / 2, 425.0 + pitch[1] * scale / 2

    def to_page(place: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([left + place[:, 0] * scale, bottom - place[:, 1] * scale], 1)

    looks = class_looks(maps)
    in_die = np.concatenate([one.in_die_um for one in maps])
    classes = np.concatenate([one.classes for one in maps])
    n_dies = sum(len(one.dies) for one in maps)
    what = f"{len(in_die)} defects of {n_dies} dies of {len(maps)} wafer{'s' if len(maps) > 1 else ''} upon each other"
    shapes: list[Shape] = [*_title(first, what, "Die stack", len(maps))]
    corners = to_page(np.array([[0, 0], [pitch[0], 0], pitch, [0, pitch[1]]]))
    shapes.append(Path(corners, SOFT, DIE, 1.4, closed=True))
    shapes += _die_axes(pitch, to_page)
    size = 3.0 if len(in_die) <= 1500 else 2.0 if len(in_die) <= 6000 else 1.3
    shapes += _defects(to_page(in_die), classes, looks, size)
    for n, one in enumerate(repeaters, 1):
        ((x, y),) = to_page(np.array([one.in_die_um])).tolist()
        shapes.append(Disc(x, y, 11, FOUND, width=1.6))
        shapes.append(Words(x + 14, y - 8, f"R{n}: {one.n_dies} dies", 11, FOUND, bold=True))
    y = _class_legend(shapes, classes, looks, _class_names(maps), 150.0)
    _repeater_legend(shapes, repeaters, y + 22)
    return Drawing(WIDTH, HEIGHT, f"Die stack of {_name(first)}", shapes)


def class_looks(maps: Sequence[WaferMap]) -> dict[int, tuple[str, str]]:
    """Colour and form of each class number: the most frequent have their own, all others share one."""
    counted = Counter(int(number) for one in maps for number in one.classes)
    order = sorted(counted, key=lambda number: (-counted[number], number))
    return {
        number: (COLOURS[i], FORMS[i]) if i < len(COLOURS) - (len(order) > len(COLOURS)) else OTHER
        for i, number in enumerate(order)
    }


# --- parts of the map ------------------------------------------------------------------------------------------------


def _frame(found: WaferMap) -> ToPage:
    scale = _RADIUS / found.radius_um

    def to_page(place: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([_MIDDLE[0] + place[:, 0] * scale, _MIDDLE[1] - place[:, 1] * scale], 1)

    return to_page


def _name(found: WaferMap) -> str:
    return f"lot {found.lot or '-'}, wafer {found.wafer or '-'}"


def _counted(found: WaferMap) -> str:
    hit = len({tuple(die) for die in found.defect_dies.tolist()})
    dies = f"{len(found.dies)} {'inspected' if found.knows_dies else 'whole'} dies"
    return f"{len(found.ids)} defects on {hit} of {dies}"


def _title(found: WaferMap, what: str, kind: str = "Wafer map", n_wafers: int = 1) -> Iterator[Shape]:
    wafer = f"wafer {found.wafer or '-'}" if n_wafers == 1 else f"{n_wafers} wafers"
    yield Words(30, 42, _short(f"Lot {found.lot or '-'}  /  {wafer}", 70), 22, INK, bold=True)
    parts = [f"step {found.step or '-'}", f"device {found.device or '-'}"]
    if n_wafers == 1 and found.slot is not None:
        parts.append(f"slot {found.slot}")
    yield Words(30, 66, _short("   ".join(parts), 100), 13, SOFT)
    yield Words(WIDTH - 30, 42, kind, 14, SOFT, anchor="end")
    yield Words(WIDTH - 30, 66, what, 13, SOFT, anchor="end")


def _substrate(found: WaferMap) -> Iterator[Shape]:
    """The wafer with its notch, a V cut into the edge, or its flat."""
    middle = -pi / 2 - np.radians(found.degrees)  # clockwise from the bottom
    half = 0.38 if found.mark == "FLAT" else 0.028
    angle = np.linspace(middle + half, middle - half + 2 * pi, 720)
    edge = [np.stack([np.cos(angle), np.sin(angle)], 1)]
    if found.mark == "NOTCH":
        edge.append(np.array([[np.cos(middle), np.sin(middle)]]) * 0.957)
    points = np.concatenate(edge) * _RADIUS * [1, -1] + np.array(_MIDDLE)
    yield Path(points, SOFT, WAFER, 1.8, closed=True)
    way = np.array([np.cos(middle), -np.sin(middle)])
    x, y = (np.array(_MIDDLE) + way * (_RADIUS * (np.cos(half) if found.mark == "FLAT" else 1) + 16)).tolist()
    if found.degrees in (90, 270):
        yield Words(x, y - 8, found.mark.lower(), 11, SOFT, anchor="middle")
    else:
        yield Words(x, y + 4, found.mark.lower(), 11, SOFT, anchor="middle")


def _dies(found: WaferMap, to_page: ToPage) -> Iterator[Shape]:
    w, h = found.pitch_um.tolist()
    line = 0.8 if len(found.dies) <= 1500 else 0.5
    for x, y in (found.dies * found.pitch_um - found.center_um).tolist():
        yield Path(to_page(np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])), GRID, DIE, line, closed=True)


def _edge(found: WaferMap) -> Iterator[Shape]:
    if found.edge_exclusion_um:
        radius = _RADIUS * (1 - found.edge_exclusion_um / found.radius_um)
        yield Disc(*_MIDDLE, radius, FAINT, width=1.0, dash=5)
    bar = next(one for one in (50, 20, 10, 5, 2, 1, 0.1) if one * 1000 <= found.radius_um / 2)
    length = bar * 1000 * _RADIUS / found.radius_um
    x, y = 40.0, HEIGHT - 34.0
    yield Path(np.array([[x, y - 4], [x, y], [x + length, y], [x + length, y - 4]]), INK, width=1.4)
    yield Words(x + length / 2, y - 7, f"{bar:g} mm", 11, INK, anchor="middle")


def _defects(
    place: NDArray[np.float64], classes: NDArray[np.int64], looks: dict[int, tuple[str, str]], size: float
) -> Iterator[Shape]:
    """Rare classes on top."""
    order = {number: i for i, number in enumerate(looks)}
    for row in np.argsort([order[number] for number in classes.tolist()], kind="stable").tolist():
        x, y = place[row].tolist()
        yield from _symbol(x, y, *looks[int(classes[row])], size)


def _symbol(x: float, y: float, colour: str, form: str, size: float) -> Iterator[Shape]:
    match form:
        case "disc":
            yield Disc(x, y, size, "#FFFFFF", colour, 0.5)
        case "cross":
            arm = size * 0.85
            for s in (arm, -arm):
                yield Path(np.array([[x - arm, y - s], [x + arm, y + s]]), colour, width=size * 0.5)
        case _:
            n, turn, inner = {
                "triangle": (3, 0.0, 1.0),
                "down": (3, pi, 1.0),
                "square": (4, pi / 4, 1.0),
                "diamond": (4, 0.0, 1.0),
                "star": (5, 0.0, 0.45),
            }[form]
            k = 2 * n if inner < 1 else n
            angle = turn + 2 * pi * np.arange(k) / k
            reach = size * 1.35 * np.where((np.arange(k) % 2 == 1) & (inner < 1), inner, 1.0)
            points = np.stack([x + reach * np.sin(angle), y - reach * np.cos(angle)], 1)
            yield Path(points, "#FFFFFF", colour, 0.5, closed=True)


def _outline(one: Signature, to_page: ToPage, found: WaferMap) -> Iterator[Shape]:
    """A soft band under a scratch or ring, a dashed box around a cluster."""
    path = to_page(one.path_um)
    if one.half_width_um:
        width = max(9.0, 2 * one.half_width_um * _RADIUS / found.radius_um + 6)
        yield Path(path, "#F5C945" if one.kind != "ring" else "#C9CED6", width=width, opacity=0.55)
    elif one.kind == "cluster":
        low, high = path.min(0) - 6, path.max(0) + 6
        box = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
        yield Path(box, SOFT, width=1.2, closed=True, dash=3)


def _names(signatures: Sequence[Signature], to_page: ToPage) -> Iterator[Shape]:
    for mark, one in labelled(signatures):
        path = to_page(one.path_um)
        if one.kind == "cluster":
            x, y = path[:, 0].max() + 9, path[:, 1].min() + 3
        else:
            x, y = path[len(path) // 2] if len(path) > 2 else path.mean(0)
            x, y = x + 9, y - 9
        yield Words(float(x), float(y), mark, 11, FOUND, bold=True)


def labelled(signatures: Sequence[Signature]) -> list[tuple[str, Signature]]:
    """Each with a mark: S1, S2 for scratches, C1 for clusters, E1 for rings."""
    counted: Counter[str] = Counter()
    found = []
    for one in signatures:
        letter = {"line": "S", "arc": "S", "ring": "E", "cluster": "C"}[one.kind]
        counted[letter] += 1
        found.append((f"{letter}{counted[letter]}", one))
    return found


# --- legend ----------------------------------------------------------------------------------------------------------


def _legend(
    found: WaferMap,
    looks: dict[int, tuple[str, str]],
    repeaters: Sequence[Repeater],
    signatures: Sequence[Signature],
) -> list[Shape]:
    shapes: list[Shape] = []
    y = _class_legend(shapes, found.classes, looks, _class_names([found]), 130.0)
    y = _repeater_legend(shapes, repeaters, y + 22)
    if signatures:
        shapes.append(Words(_LEGEND_X, y + 22, "Scratches, rings, clusters", 13, INK, bold=True))
        y += 42
        for mark, one in labelled(signatures)[:_MAX_LISTED]:
            what = f"{mark}  {one.kind}, {len(one.members)} defects, {one.length_um / 1000:.1f} mm"
            shapes.append(Words(_LEGEND_X, y, what, 12, INK))
            y += 18
        if len(signatures) > _MAX_LISTED:
            shapes.append(Words(_LEGEND_X, y, f"and {len(signatures) - _MAX_LISTED} more", 12, SOFT))
    lines = [] if found.knows_dies else ["No inspected dies named: all whole ones drawn"]
    if found.edge_exclusion_um:
        lines.append(f"Dashed ring: edge exclusion, {found.edge_exclusion_um / 1000:g} mm")
    for n, line in enumerate(reversed(lines)):
        shapes.append(Words(_LEGEND_X, HEIGHT - 34 - 17 * n, line, 11, SOFT))
    return shapes


def _class_names(maps: Sequence[WaferMap]) -> dict[int, str]:
    return {number: name for one in maps for number, name in one.class_names.items()}


def _class_legend(
    shapes: list[Shape],
    classes: NDArray[np.int64],
    looks: dict[int, tuple[str, str]],
    names: dict[int, str],
    y: float,
) -> float:
    counted = Counter(classes.tolist())
    shapes.append(Words(_LEGEND_X, y, "Defects by class", 13, INK, bold=True))
    y += 22
    own = [number for number in looks if looks[number] != OTHER]
    for number in own:
        shapes += _symbol(_LEGEND_X + 6, y - 4, *looks[number], 4.6)
        name = "no class" if number == -1 else f"{number} {names.get(number, '')}".strip()
        shapes.append(Words(_LEGEND_X + 20, y, _short(name, 24), 12, INK))
        shapes.append(Words(WIDTH - 30, y, str(counted[number]), 12, INK, anchor="end"))
        y += 19
    if n_others := len(looks) - len(own):
        rest = sum(counted[number] for number in looks if looks[number] == OTHER)
        shapes += _symbol(_LEGEND_X + 6, y - 4, *OTHER, 4.6)
        shapes.append(Words(_LEGEND_X + 20, y, f"{n_others} other classes", 12, INK))
        shapes.append(Words(WIDTH - 30, y, str(rest), 12, INK, anchor="end"))
        y += 19
    if not looks:
        shapes.append(Words(_LEGEND_X, y, "none", 12, SOFT))
        y += 19
    return y


def _repeater_legend(shapes: list[Shape], repeaters: Sequence[Repeater], y: float) -> float:
    if not repeaters:
        return y - 22
    shapes.append(Words(_LEGEND_X, y, "Repeaters (place in the die)", 13, INK, bold=True))
    y += 20
    for n, one in enumerate(repeaters[:_MAX_LISTED], 1):
        x_um, y_um = one.in_die_um
        text = f"R{n}  {one.n_dies} dies at {x_um:.1f}, {y_um:.1f} um"
        shapes.append(Words(_LEGEND_X, y, text, 12, INK))
        y += 18
    if len(repeaters) > _MAX_LISTED:
        shapes.append(Words(_LEGEND_X, y, f"and {len(repeaters) - _MAX_LISTED} more", 12, SOFT))
        y += 18
    return y


def _die_axes(pitch: NDArray[np.float64], to_page: ToPage) -> Iterator[Shape]:
    """Ticks in mm along the lower and the left side."""
    for axis in (0, 1):
        step = _round_step(float(pitch[axis]) / 5)
        for at in np.arange(0, pitch[axis] + 1, step).tolist():
            place = np.zeros((1, 2))
            place[0, axis] = at
            ((x, y),) = to_page(place).tolist()
            away = (0.0, 6.0) if axis == 0 else (-6.0, 0.0)
            yield Path(np.array([[x, y], [x + away[0], y + away[1]]]), SOFT, width=1.0)
            label = f"{at / 1000:g}"
            if axis == 0:
                yield Words(x, y + 20, label, 11, SOFT, anchor="middle")
            else:
                yield Words(x - 10, y + 4, label, 11, SOFT, anchor="end")
    ((x, y),) = to_page(np.array([[pitch[0] / 2, 0]])).tolist()
    yield Words(x, y + 38, "mm in the die", 11, SOFT, anchor="middle")


def _round_step(length: float) -> float:
    power = 10.0 ** np.floor(np.log10(length))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= length * 0.999))


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 3] + "..."
