"""A wafer as plain arrays: where its dies and its defects lie, and how it lay."""

from dataclasses import dataclass
from itertools import product
from math import ceil, hypot

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.klarf.errors import KlarfError
from semwatch.klarf.views import Lot, Point, Wafer

DIAMETER_UM = 300_000.0
"""Of a wafer whose file does not say."""
MAX_DIES = 100_000


@dataclass(frozen=True, eq=False)
class WaferMap:
    """Dies and defects of one wafer; N defects, D dies. The wafer frame: origin at the centre, x right, y up, um.

    Attributes:
        lot, wafer, step, device: as the file names them; None where it does not.
        degrees: where notch or flat is, clockwise from the bottom: 0, 90 (left), 180 or 270.
        mark: NOTCH or FLAT.
        pitch_um: (2,) from die to die.
        center_um: (2,) centre of the wafer seen from the origin of die (0, 0).
        dies: (D, 2) indices of the dies that were inspected; where the file does not say which, of all that lie whole
            on the wafer within the edge exclusion.
        knows_dies: whether the file says which.
        ids: (N,) DEFECTID.
        defect_dies: (N, 2) index of the die of each defect.
        in_die_um: (N, 2) place of each defect, from the origin of its die.
        on_wafer_um: (N, 2) place of each defect in the wafer frame.
        classes: (N,) number of its class; -1 where it has none.
        class_names: by number, as the lookup table gives them.
    """

    lot: str | None
    wafer: str | None
    step: str | None
    device: str | None
    slot: int | None
    diameter_um: float
    edge_exclusion_um: float
    mark: str
    degrees: int
    pitch_um: NDArray[np.float64]
    center_um: NDArray[np.float64]
    dies: NDArray[np.int64]
    knows_dies: bool
    ids: NDArray[np.int64]
    defect_dies: NDArray[np.int64]
    in_die_um: NDArray[np.float64]
    on_wafer_um: NDArray[np.float64]
    classes: NDArray[np.int64]
    class_names: dict[int, str]

    @property
    def radius_um(self) -> float:
        """Of the wafer."""
        return self.diameter_um / 2


def wafer_map(
    lot: Lot, wafer: Wafer, *, edge_exclusion_um: float = 3000.0, class_column: str = "CLASSNUMBER"
) -> WaferMap:
    """The arrays of one wafer of a KLARF.

    Args:
        edge_exclusion_um: width of the ring at the edge on which nothing is inspected.
        class_column: which column holds the classes, CLASSNUMBER or a review's own.

    Raises:
        ConfigError: an edge exclusion that leaves no wafer.
        KlarfError: die pitch or centre are not in the file, a defect has no place, or there is no such column.
    """
    pitch, center = wafer.die_pitch, wafer.center
    name = f"wafer {wafer.id or '-'} of lot {lot.id or '-'}"
    if pitch is None or center is None or min(pitch) <= 0:
        raise KlarfError(f"{name}: expected a DiePitch above 0 and SampleCenterLocation, for places on the wafer")
    diameter_um = wafer.diameter_um or DIAMETER_UM
    if not 0 <= edge_exclusion_um < diameter_um / 2:
        raise ConfigError(f"an edge exclusion of {edge_exclusion_um:g} um leaves nothing of a wafer of {diameter_um:g}")
    pitch_um, center_um = np.array(pitch), np.array(center)
    ids, dies, in_die = _places(wafer, name)
    named = [(die.x_index, die.y_index) for die in wafer.dies]
    inspected = named or _whole_dies(pitch, center, diameter_um / 2 - edge_exclusion_um)
    orientation = wafer.orientation
    return WaferMap(
        lot=lot.id,
        wafer=wafer.id,
        step=lot.step_id,
        device=lot.device_id,
        slot=wafer.slot,
        diameter_um=diameter_um,
        edge_exclusion_um=edge_exclusion_um,
        mark="FLAT" if (orientation.mark or "").upper() == "FLAT" else "NOTCH",
        degrees=orientation.degrees,
        pitch_um=pitch_um,
        center_um=center_um,
        dies=np.array(sorted({*inspected, *map(tuple, dies.tolist())}), np.int64).reshape(-1, 2),
        knows_dies=bool(named),
        ids=ids,
        defect_dies=dies,
        in_die_um=in_die,
        on_wafer_um=dies * pitch_um + in_die - center_um,
        classes=_classes(wafer, class_column),
        class_names={number: one.name for number, one in wafer.classes.items()},
    )


def die_ids(found: WaferMap) -> NDArray[np.int64]:
    """(N,) for each defect the row of its die in ``dies``."""
    rows = {(x, y): row for row, (x, y) in enumerate(found.dies.tolist())}
    return np.array([rows[x, y] for x, y in found.defect_dies.tolist()], np.int64)


def _places(wafer: Wafer, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    n = len(wafer.defects)
    if not n:
        return np.zeros(0, np.int64), np.zeros((0, 2), np.int64), np.zeros((0, 2))
    columns = [wafer.defects.column(one) for one in ("DEFECTID", "XINDEX", "YINDEX", "XREL", "YREL")]
    for row, values in enumerate(zip(*columns, strict=True)):
        if not all(isinstance(value, int | float) and abs(value) < 1e12 for value in values):
            raise KlarfError(
                f"{name}: expected numbers as DEFECTID, XINDEX, YINDEX, XREL and YREL of every defect, found {values} "
                f"at the {row + 1}. of its list"
            )
    ids, x, y, x_rel, y_rel = (np.array(one, np.float64) for one in columns)
    dies = np.stack([x, y], 1).astype(np.int64)
    return ids.astype(np.int64), dies, np.stack([x_rel, y_rel], 1) / wafer.scope.per_um


def _classes(wafer: Wafer, column: str) -> NDArray[np.int64]:
    if not len(wafer.defects) or (column == "CLASSNUMBER" and column not in map(str.upper, wafer.defects.columns)):
        return np.full(len(wafer.defects), -1, np.int64)
    values = wafer.defects.column(column)
    return np.array([int(value) if isinstance(value, int | float) else -1 for value in values], np.int64)


def _whole_dies(pitch: Point, center: Point, radius_um: float) -> list[tuple[int, int]]:
    """Dies whose four corners lie within a radius of the centre."""
    ranges = []
    for step, middle in zip(pitch, center, strict=True):
        if 2 * radius_um / step > MAX_DIES**0.5:
            raise KlarfError(f"expected at most {MAX_DIES} dies on a wafer; a pitch of {step:g} um makes more")
        first, last = ceil((middle - radius_um) / step), ceil((middle + radius_um) / step)
        ranges.append(range(first, last))
    return [
        (x, y)
        for x, y in product(*ranges)
        if all(
            hypot((x + i) * pitch.x_um - center.x_um, (y + j) * pitch.y_um - center.y_um) <= radius_um
            for i, j in product((0, 1), (0, 1))
        )
    ]
