"""Repeaters and scratches on 200 planted wafers: recall and false calls, beside a plain DBSCAN in the same run.

    pytest tests/benchmarks/bench_wafer.py -s

DBSCAN looks for repeaters among the places in the die, and for scratches among the places on the wafer. Its distance
and its least number of neighbours are those that do best on these very wafers, by F1: more than a user could know. A
cluster counts as a scratch where it is at least four times as long as wide, else the spots would be false calls.
"""

import os
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN

from planted_wafers import PlantedWafer, Score, planted_wafer, planted_wafers, repeaters_of, scratches_of

N = int(os.environ.get("SEMWATCH_WAFERS", "200"))
DENSITIES = (100, 300, 1000, 3000)
DENSE = (20_000, 60_000)
"""For repeaters alone: as many defects as bring chance repeaters."""
N_DENSE = max(2, N // 10)
FIRST_SEED = 5000
"""Not those that the criterion was made on."""
Calls = list[NDArray[np.int64]]


@pytest.mark.timeout(3600)
def test_recall_and_false_calls_beside_dbscan() -> None:
    wafers = planted_wafers(N, DENSITIES, FIRST_SEED)
    print(f"\n{N} wafers of 300 mm, 600 dies, {', '.join(map(str, DENSITIES))} random defects")
    begin = time.process_time()
    ours: list[tuple[Calls, Calls]] = []
    for wafer in wafers:
        repeaters = repeaters_of(wafer)
        ours.append((repeaters, scratches_of(wafer, repeaters)))
    print(f"{(time.process_time() - begin) / N:.2f} s of a processor a wafer")
    show("repeater", "semwatch", wafers, [one[0] for one in ours])
    repeaters, how = best(wafers, "repeater", (1.0, 2.0, 4.0), (3, 4, 5), in_die_clusters)
    show("repeater", f"DBSCAN, {how}", wafers, repeaters)
    show("scratch", "semwatch", wafers, [one[1] for one in ours])
    scratches, how = best(wafers, "scratch", (1000.0, 2000.0, 3000.0, 5000.0, 8000.0), (3, 5, 8), long_clusters)
    show("scratch", f"DBSCAN, {how}", wafers, scratches)
    mine, theirs = (scored(wafers, "scratch", calls) for calls in ([one[1] for one in ours], scratches))
    assert mine.found > theirs.found
    assert mine.false < theirs.false


@pytest.mark.timeout(1800)
def test_repeaters_among_so_many_that_chance_brings_some() -> None:
    wafers = [
        planted_wafer(FIRST_SEED + i, n_random=DENSE[i % 2], n_repeaters=2, n_scratches=0) for i in range(N_DENSE)
    ]
    ours = [repeaters_of(wafer) for wafer in wafers]
    theirs, how = best(wafers, "repeater", (1.0, 2.0, 4.0), (3, 4, 5, 6), in_die_clusters)
    print()
    show("repeater", "semwatch", wafers, ours)
    show("repeater", f"DBSCAN, {how}", wafers, theirs)
    three = [in_die_clusters(wafer, 2.0, 3) for wafer in wafers]
    show("repeater", "DBSCAN, 2 um, 3 neighbours, the best above", wafers, three)
    assert scored(wafers, "repeater", ours).false < scored(wafers, "repeater", three).false


def best(
    wafers: list[PlantedWafer],
    kind: str,
    distances: tuple[float, ...],
    least: tuple[int, ...],
    calls: Callable[[PlantedWafer, float, int], Calls],
) -> tuple[list[Calls], str]:
    """DBSCAN's calls with the distance and number that give the best F1 on these wafers."""
    tried = []
    for distance in distances:
        for n in least:
            found = [calls(wafer, distance, n) for wafer in wafers]
            score = scored(wafers, kind, found)
            f1 = 2 * score.found / (score.planted + score.found + score.false)
            tried.append((f1, found, f"{distance:g} um, {n} neighbours"))
    _, found, how = max(tried, key=lambda one: one[0])
    return found, how


def clusters(place: NDArray[np.float64], distance: float, n: int) -> Calls:
    labels = DBSCAN(eps=distance, min_samples=n).fit_predict(place)
    return [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]


def in_die_clusters(wafer: PlantedWafer, distance: float, n: int) -> Calls:
    return clusters(wafer.in_die_um, distance, n)


def long_clusters(wafer: PlantedWafer, distance: float, n: int) -> Calls:
    found = []
    for rows in clusters(wafer.on_wafer_um, distance, n):
        if len(rows) < 3:
            continue
        wide, long = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(wafer.on_wafer_um[rows].T)), 0))
        if long > 4 * wide:
            found.append(rows)
    return found


def scored(wafers: list[PlantedWafer], kind: str, calls: list[Calls]) -> Score:
    score = Score()
    for wafer, found in zip(wafers, calls, strict=True):
        score.add(wafer, kind, found)
    return score


def show(kind: str, name: str, wafers: list[PlantedWafer], calls: list[Calls]) -> None:
    print(f"{'repeaters' if kind == 'repeater' else 'scratches'}, {name}:")
    for density in (*dict.fromkeys(wafer.n_random for wafer in wafers), None):
        rows = [i for i, wafer in enumerate(wafers) if density in (None, wafer.n_random)]
        score = scored([wafers[i] for i in rows], kind, [calls[i] for i in rows])
        what = "all" if density is None else f"{density} random"
        print(
            f"  {what:12} {score.found:4} of {score.planted:4} found, {score.false:4} false calls "
            f"on {score.wafers_with_false} of {len(rows)} wafers"
        )
