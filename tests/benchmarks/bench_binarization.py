"""What the working grid costs and what it keeps: `pytest tests/benchmarks/bench_binarization.py -s`.

Maps: ground-truth masks of real defects at 32 x 32 tokens plus correlated noise where the data is there, synthetic
blobs and scratches, and pure noise. `SEMWATCH_MAPS=maps.npy` (N, 32, 32) puts a real detector's maps in their place.
The peer of every figure is the sweep at 448 x 448 in the same run.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from paths import DATA
from semwatch.line import binarization
from semwatch.line.inputs import CROP_PX, TOKENS
from semwatch.settings.recipe import Recipe

RULE = Recipe().binarization
GRIDS = (32, 56, 112, 224, 448)
PEER = 448
CHOSEN = 112
FIELD_HW = (1024, 1024)
STEPS = ("gate", "saliency", "sweep", "plateau", "mask", "regions", "crops", "soft masks")
METHODS: dict[str, dict[str, Any]] = {
    "plateau": {},
    "plateau, epsilon 1": {"epsilon": 1},
    "lowest": {"method": "lowest"},
    "literal": {"method": "literal"},
    "literal, epsilon 1": {"method": "literal", "epsilon": 1},
    "fixed": {"method": "fixed"},
    "otsu": {"method": "otsu"},
}


def _noise(rng: np.random.Generator, *, sigma_tokens: float, level: float) -> NDArray[np.float32]:
    """Return a (32, 32) normal region of a score map: a base level, correlated fluctuation, some white noise."""
    smooth = cv2.GaussianBlur(rng.standard_normal((32, 32)).astype(np.float32), (0, 0), sigma_tokens)
    white = rng.standard_normal((32, 32)).astype(np.float32)
    return np.asarray(0.1 + level * (smooth / smooth.std() + 0.3 * white), np.float32)


def _blobs(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return (32, 32) coverage of 1 to 4 random ellipses and lines, drawn at 448 and averaged over tokens."""
    canvas = np.zeros((448, 448), np.uint8)
    for _ in range(rng.integers(1, 5)):
        centre = tuple(int(v) for v in rng.integers(20, 428, 2))
        if rng.random() < 0.3:
            end = tuple(int(v) for v in np.add(centre, rng.integers(-150, 150, 2)))
            cv2.line(canvas, centre, end, 255, int(rng.integers(3, 12)))
        else:
            axes = tuple(int(v) for v in rng.integers(4, 50, 2))
            cv2.ellipse(canvas, centre, axes, float(rng.integers(0, 180)), 0, 360, 255, -1)
    return np.asarray(cv2.resize(canvas.astype(np.float32) / 255, (32, 32), interpolation=cv2.INTER_AREA))


def _real_masks(rng: np.random.Generator, n: int) -> list[NDArray[np.float32]]:
    """Return n coverages (32, 32) of ground-truth masks, [] where the data is not there."""
    paths = sorted(DATA.glob("MTD/MT_*/Imgs/*.png")) + sorted(DATA.glob("SD-saliency-900/*/Ground truth/*"))
    found: list[NDArray[np.float32]] = []
    for idx in rng.permutation(len(paths)):
        mask = cv2.imread(str(paths[idx]), cv2.IMREAD_GRAYSCALE)
        if mask is not None and (mask > 127).any() and len(found) < n:
            covered = cv2.resize((mask > 127).astype(np.float32), (448, 448), interpolation=cv2.INTER_NEAREST)
            found.append(np.asarray(cv2.resize(covered, (32, 32), interpolation=cv2.INTER_AREA)))
    return found


def maps_with_truth(seed: int = 0) -> dict[str, tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Return 100 maps of each kind (N, 32, 32) with the mask (N, 32, 32) of tokens that are at least half defect."""
    rng = np.random.default_rng(seed)
    coverages = {
        "real masks": _real_masks(rng, 100),
        "synthetic": [_blobs(rng) for _ in range(100)],
        "pure noise": [np.zeros((32, 32), np.float32)] * 100,
    }

    def noisy(coverage: NDArray[np.float32]) -> NDArray[np.float32]:
        spread = cv2.GaussianBlur(coverage, (0, 0), 0.7)  # a token's features see its neighbours
        noise = _noise(rng, sigma_tokens=rng.uniform(0.6, 2.0), level=rng.uniform(0.01, 0.06))
        return np.asarray(noise + rng.uniform(0.2, 0.6) * spread, np.float32)

    return {
        kind: (np.stack([noisy(c) for c in some]), np.stack([c >= min(0.5, c.max() or 1.0) for c in some]))
        for kind, some in coverages.items()
        if some
    }


def score_maps() -> dict[str, NDArray[np.float32]]:
    """Return the maps by kind: those of SEMWATCH_MAPS alone, or those made here."""
    if path := os.environ.get("SEMWATCH_MAPS"):
        return {"detector": np.load(path, allow_pickle=False).astype(np.float32)}
    return {kind: maps for kind, (maps, _) in maps_with_truth().items()}


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the IoU of two masks, enlarged to 448; 1 where both are empty."""
    a, b = (cv2.resize(m.view(np.uint8), (PEER, PEER), interpolation=cv2.INTER_NEAREST).view(np.bool_) for m in (a, b))
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


@contextmanager
def opencv_threads(n: int) -> Iterator[None]:
    """Let OpenCV use n threads for a while."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(n)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


@contextmanager
def _clock(spent_ms: dict[str, float], step: str) -> Iterator[None]:
    """Add the milliseconds of the block to those of its step."""
    start = time.perf_counter()
    yield
    spent_ms[step] += 1e3 * (time.perf_counter() - start)


def _whole_room(
    score_map: NDArray[np.float32], field: NDArray[np.uint8], grid_px: int, spent_ms: dict[str, float]
) -> NDArray[np.bool_]:
    """Take one map through the room step by step, as ``binarize`` does, at most 4 crops; return its mask."""
    min_area_px = math.ceil(2e-4 * grid_px**2)
    with _clock(spent_ms, "gate"):
        binarization.gate(float(score_map.max()), threshold=-1.0)
    with _clock(spent_ms, "saliency"):
        shown = binarization.saliency(score_map, grid_px=grid_px)
    with _clock(spent_ms, "sweep"):
        thresholds, fractions, counts = binarization.sweep(
            shown, min_area_px=min_area_px, max_mask_fraction=RULE.max_mask_fraction
        )
    with _clock(spent_ms, "plateau"):
        run = binarization.plateau(counts, fractions)
    with _clock(spent_ms, "mask"):
        raw = shown >= (math.inf if run is None else thresholds[sum(run) // 2])
        mask = binarization.clean_mask(raw, min_area_px=min_area_px, max_hole_px=int(0.3 * raw.size), max_defects=16)
    with _clock(spent_ms, "regions"):
        found = binarization.regions(mask, score_map, size_hw=FIELD_HW, max_regions=4)
    with _clock(spent_ms, "crops"):
        windows = [binarization.crop_window(region.box_xyxy, size_hw=FIELD_HW) for region in found]
        _ = [binarization.cut(field, window, side_px=CROP_PX) for window in windows]
    with _clock(spent_ms, "soft masks"):
        for region, window in zip(found, windows, strict=True):
            binarization.soft_mask(shown, region.mask, window, size_hw=FIELD_HW, tokens=TOKENS)
    return mask


def _micrograph() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, FIELD_HW).astype(np.uint8)


def _milliseconds(maps: NDArray[np.float32], grid_px: int) -> dict[str, float]:
    """Return the median milliseconds of each step and of the whole over the maps."""
    field, rows = _micrograph(), []
    for score_map in maps:
        spent_ms = dict.fromkeys(STEPS, 0.0)
        _whole_room(score_map, field, grid_px, spent_ms)
        rows.append([*spent_ms.values(), sum(spent_ms.values())])
    return dict(zip((*STEPS, "whole"), np.median(rows, axis=0).tolist(), strict=True))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_milliseconds_by_step_and_grid(n_threads: int) -> None:
    maps = np.concatenate([some[:20] for some in score_maps().values()])
    with opencv_threads(n_threads):
        table = {grid_px: _milliseconds(maps, grid_px) for grid_px in GRIDS}
        shown = binarization.saliency(maps[0], grid_px=PEER)
        start = time.perf_counter()
        binarization.sweep(shown, min_area_px=1)
        full_sweep_ms = 1e3 * (time.perf_counter() - start)
    print(
        f"\nmedian ms per image, {len(maps)} maps, up to 4 crops of a 1024 x 1024 field, {n_threads} OpenCV thread(s)"
    )
    print(f"{'grid':>5}" + "".join(f"{step:>11}" for step in (*STEPS, "whole")) + f"{'/ 448':>9}")
    for grid_px, ms in table.items():
        ratio = ms["whole"] / table[PEER]["whole"]
        print(f"{grid_px:>5}" + "".join(f"{value:>11.3f}" for value in ms.values()) + f"{ratio:>9.3f}")
    print(f"all 64 thresholds at 448, no cap on the mask: {full_sweep_ms:.1f} ms for the sweep alone")
    assert table[CHOSEN]["whole"] < 0.3 * table[PEER]["whole"]


def test_masks_by_grid_against_the_448_sweep() -> None:
    print(f"\n{'maps':<12}{'n':>5}{'grid':>6}{'mean IoU':>10}{'IoU > .8':>10}{'same n of regions':>19}{'empty':>7}")
    overall: dict[int, list[float]] = {grid_px: [] for grid_px in GRIDS}
    for kind, maps in score_maps().items():
        peers = [binarization.binarize(score_map, grid_px=PEER).mask for score_map in maps]
        n_peers = [_n_regions(mask, score_map) for mask, score_map in zip(peers, maps, strict=True)]
        for grid_px in GRIDS:
            masks = [binarization.binarize(score_map, grid_px=grid_px).mask for score_map in maps]
            ious = np.array([iou(mask, peer) for mask, peer in zip(masks, peers, strict=True)])
            same = np.mean([_n_regions(m, s) == n for m, s, n in zip(masks, maps, n_peers, strict=True)])
            empty = sum(not mask.any() for mask in masks)
            overall[grid_px] += ious.tolist()
            row = f"{ious.mean():>10.3f}{(ious > 0.8).mean():>10.2f}{same:>19.2f}{empty:>7}"
            print(f"{kind:<12}{len(maps):>5}{grid_px:>6}{row}")
    for grid_px, values in overall.items():
        print(
            f"{'all':<12}{len(values):>5}{grid_px:>6}{np.mean(values):>10.3f}{np.mean(np.array(values) > 0.8):>10.2f}"
        )
    assert np.mean(overall[CHOSEN]) >= np.mean(overall[56])


def _n_regions(mask: NDArray[np.bool_], score_map: NDArray[np.float32]) -> int:
    return len(binarization.regions(mask, score_map, size_hw=FIELD_HW))


@pytest.mark.skipif("SEMWATCH_MAPS" in os.environ, reason="a detector's maps come without their truth")
def test_methods_against_the_truth() -> None:
    """IoU with the coverage that the maps were made of, which no method sees."""
    print(f"\n{'maps':<12}{'method':<20}{'mean IoU':>9}{'empty':>7}{'over 30 %':>11}")
    for kind, (maps, truths) in maps_with_truth().items():
        for name, kwargs in METHODS.items():
            masks = [binarization.binarize(score_map, **kwargs).mask for score_map in maps]
            mean = np.mean([iou(m, t) for m, t in zip(masks, truths, strict=True)])
            empty, large = sum(not m.any() for m in masks), sum(m.mean() > 0.3 for m in masks)
            print(f"{kind:<12}{name:<20}{mean:>9.3f}{empty:>7}{large:>11}")
            assert len(masks) == len(truths)
