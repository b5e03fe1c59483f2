"""Wafers with planted repeaters and scratches among random defects, and rings and spots that are neither."""

from dataclasses import dataclass
from math import pi

import numpy as np
from numpy.typing import NDArray

from semwatch.wafer.repeaters import find_repeaters
from semwatch.wafer.signatures import find_signatures

RADIUS_UM, EXCLUSION_UM = 150_000.0, 3000.0
PITCH_UM = np.array([9000.0, 12000.0])


@dataclass(frozen=True, eq=False)
class PlantedWafer:
    """N defects of a wafer of 300 mm; ``truth`` gives what was planted and the rows of it."""

    on_wafer_um: NDArray[np.float64]
    dies: NDArray[np.int64]
    """(N, 2)"""
    in_die_um: NDArray[np.float64]
    truth: list[tuple[str, NDArray[np.int64]]]
    n_random: int


def planted_wafer(
    seed: int,
    *,
    n_random: int,
    n_repeaters: int,
    n_scratches: int,
    has_ring: bool = False,
    has_spot: bool = False,
) -> PlantedWafer:
    rng = np.random.default_rng(seed)
    parts = [_in_disc(rng, n_random)]
    truth: list[tuple[str, int]] = [("random", n_random)]
    whole = whole_dies()
    for _ in range(n_repeaters):
        on = rng.choice(len(whole), rng.integers(3, 21), replace=False)
        place = rng.uniform(100, PITCH_UM - 100)
        parts.append(whole[on] * PITCH_UM + place + rng.normal(0, 0.4, (len(on), 2)))
        truth.append(("repeater", len(on)))
    for _ in range(n_scratches):
        parts.append(_scratch(rng))
        truth.append(("scratch", len(parts[-1])))
    if has_ring:
        n, middle, width = rng.integers(80, 300), rng.uniform(138_000, 144_000), rng.uniform(700, 1500)
        angle, distance = rng.uniform(0, 2 * pi, n), np.minimum(rng.normal(middle, width, n), RADIUS_UM - 1)
        parts.append(np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1))
        truth.append(("ring", n))
    if has_spot:
        n = rng.integers(15, 60)
        parts.append(_in_disc(rng, 1, 100_000.0) + rng.normal(0, rng.uniform(600, 2500), (n, 2)))
        truth.append(("spot", n))
    place = np.concatenate(parts)
    order = rng.permutation(len(place))
    at = np.argsort(order)
    ends = np.cumsum([0, *(n for _, n in truth)])
    planted = [(kind, np.sort(at[a:b])) for (kind, _), a, b in zip(truth[1:], ends[1:], ends[2:], strict=False)]
    place = place[order]
    dies = np.floor(place / PITCH_UM).astype(np.int64)
    return PlantedWafer(place, dies, place - dies * PITCH_UM, planted, n_random)


def planted_wafers(n: int, densities: tuple[int, ...], first_seed: int = 0) -> list[PlantedWafer]:
    """``n`` wafers: a fifth with nothing planted; half have a ring, a quarter a spot, as distractors."""
    made = []
    for i in range(n):
        rng = np.random.default_rng(10_000 + first_seed + i)
        is_clean = i % 5 == 0
        made.append(
            planted_wafer(
                first_seed + i,
                n_random=densities[i % len(densities)],
                n_repeaters=0 if is_clean else int(rng.integers(0, 3)),
                n_scratches=0 if is_clean else int(rng.integers(1, 3)),
                has_ring=bool(rng.random() < 0.5),
                has_spot=bool(rng.random() < 0.25),
            )
        )
    return made


def whole_dies() -> NDArray[np.int64]:
    n = int(RADIUS_UM // PITCH_UM.min()) + 1
    every = np.stack(np.meshgrid(np.arange(-n, n), np.arange(-n, n)), -1).reshape(-1, 2)
    corners = [(every + corner) * PITCH_UM for corner in ((0, 0), (0, 1), (1, 0), (1, 1))]
    inside = np.all([np.hypot(*corner.T) < RADIUS_UM - EXCLUSION_UM for corner in corners], 0)
    return np.asarray(every[inside])


def _in_disc(rng: np.random.Generator, n: int, radius_um: float = RADIUS_UM - EXCLUSION_UM) -> NDArray[np.float64]:
    angle, distance = rng.uniform(0, 2 * pi, n), radius_um * np.sqrt(rng.random(n))
    return np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)


def _scratch(rng: np.random.Generator) -> NDArray[np.float64]:
    """A line or an arc of 40 to 150 mm, of 15 to 80 defects, all on the wafer."""
    while True:
        length, n = rng.uniform(40_000, 150_000), rng.integers(15, 81)
        at = np.sort(rng.uniform(0, length, n)) - length / 2
        if rng.random() < 0.5:
            place = np.stack([at, np.zeros(n)], 1)
        else:
            radius = rng.uniform(50_000, 300_000)
            place = radius * np.stack([np.sin(at / radius), 1 - np.cos(at / radius)], 1)
        place = place + rng.normal(0, rng.uniform(20, 150), (n, 2))
        turn = rng.uniform(0, 2 * pi)
        place = place @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        place = place - place.mean(0) + _in_disc(rng, 1)
        if np.all(np.hypot(*place.T) < RADIUS_UM - EXCLUSION_UM):
            return np.asarray(place)


# --- what was found of it --------------------------------------------------------------------------------------------


@dataclass
class Score:
    """What was planted of one kind, how much of it was found, and what was called that is none."""

    planted: int = 0
    found: int = 0
    false: int = 0
    wafers_with_false: int = 0

    def add(self, wafer: PlantedWafer, kind: str, calls: list[NDArray[np.int64]]) -> None:
        """Count the calls of one wafer, each as rows of its defects.

        A call finds what was planted if each has more than half of the other.
        """
        hit: set[int] = set()
        n_false = 0
        for call in calls:
            of = [i for i, (what, rows) in enumerate(wafer.truth) if what == kind and _is_same(call, rows)]
            hit.update(of)
            n_false += not of
        self.planted += sum(what == kind for what, _ in wafer.truth)
        self.found += len(hit)
        self.false += n_false
        self.wafers_with_false += n_false > 0


def repeaters_of(wafer: PlantedWafer) -> list[NDArray[np.int64]]:
    """Rows of each repeater that the library calls."""
    die = np.unique(wafer.dies, axis=0, return_inverse=True)[1]
    area = float(np.prod(PITCH_UM))
    return [one.members for one in find_repeaters(wafer.in_die_um, die, die_area_um2=area)]


def scratches_of(wafer: PlantedWafer, repeaters: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Rows of each scratch that it calls among the other defects."""
    left = np.setdiff1d(np.arange(len(wafer.dies)), np.concatenate([np.zeros(0, np.int64), *repeaters]))
    found = find_signatures(wafer.on_wafer_um[left], radius_um=RADIUS_UM)
    return [left[one.members] for one in found if one.kind in ("line", "arc")]


def _is_same(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    n_both = len(np.intersect1d(a, b))
    return 2 * n_both > len(a) and 2 * n_both > len(b)


def klarf_of(wafer: PlantedWafer, *, mark: str = "DOWN", lot: str = "A1234.7", name: str = "25") -> str:
    """A KLARF 1.2 of it, with what was planted as its classes."""
    kinds = ["random", "repeater", "scratch", "ring", "spot"]
    classes = np.zeros(len(wafer.dies), np.int64)
    for kind, rows in wafer.truth:
        classes[rows] = kinds.index(kind)
    lookup = "\n".join(f' {n} "{kind}"' for n, kind in enumerate(kinds))
    dies = "\n".join(f" {x} {y}" for x, y in whole_dies().tolist())
    rows = "\n".join(
        f" {n} {x:.3f} {y:.3f} {i} {j} {number}"
        for n, ((x, y), (i, j), number) in enumerate(
            zip(wafer.in_die_um.tolist(), wafer.dies.tolist(), classes.tolist(), strict=True), 1
        )
    )
    return (
        f'FileVersion 1 2;\nLotID "{lot}";\nStepID "M2-CMP";\nDeviceID "D8";\nSampleSize 1 300;\n'
        f"SampleOrientationMarkType NOTCH;\nOrientationMarkLocation {mark};\n"
        f"DiePitch {PITCH_UM[0]:e} {PITCH_UM[1]:e};\nSampleCenterLocation 0 0;\n"
        f'WaferID "{name}";\nSlot 3;\nClassLookup {len(kinds)}\n{lookup};\n'
        f"InspectionTest 1;\nSampleTestPlan {len(whole_dies())}\n{dies};\n"
        f"DefectRecordSpec 6 DEFECTID XREL YREL XINDEX YINDEX CLASSNUMBER ;\nDefectList\n{rows};\nEndOfFile;\n"
    )
