"""What the working grid costs and what it keeps: `pytest tests/benchmarks/bench_binarization.py -s`.

Maps: ground-truth masks of real defects at 32 x 32 tokens plus correlated noise where the data is there, synthetic blobs
and scratches, and pure noise. `SEMWATCH_MAPS=maps.npy` (N, 32, 32) puts the maps of a real detector in their place.
The peer of every figure is the sweep at 448 x 448 in the same run.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from semwatch import binarization

DATA = Path(os.environ.get("SEMWATCH_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
GRIDS = (32, 56, 112, 224, 448)
PEER = 448
FIELD_HW = (1024, 1024)
STEPS = ("gate", "saliency", "sweep", "plateau", "mask", "regions", "crops", "soft masks")
Maps = dict[str, NDArray[np.float32]]


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


def score_maps(seed: int = 0) -> Maps:
    """Return the maps by kind: those of SEMWATCH_MAPS alone, or 100 of each kind made here."""
    if path := os.environ.get("SEMWATCH_MAPS"):
        return {"detector": np.load(path, allow_pickle=False).astype(np.float32)}
    rng = np.random.default_rng(seed)

    def noisy(coverage: NDArray[np.float32]) -> NDArray[np.float32]:
        spread = cv2.GaussianBlur(coverage, (0, 0), 0.7)  # a token's features see its neighbours
        noise = _noise(rng, sigma_tokens=rng.uniform(0.6, 2.0), level=rng.uniform(0.01, 0.06))
        return np.asarray(noise + rng.uniform(0.2, 0.6) * spread, np.float32)

    maps = {
        "real masks": [noisy(coverage) for coverage in _real_masks(rng, 100)],
        "synthetic": [noisy(_blobs(rng)) for _ in range(100)],
        "pure noise": [_noise(rng, sigma_tokens=rng.uniform(0.6, 2.0), level=0.03) for _ in range(100)],
    }
    return {kind: np.stack(some) for kind, some in maps.items() if some}


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the IoU of two masks, enlarged to 448; 1 where both are empty."""
    a, b = (cv2.resize(m.view(np.uint8), (PEER, PEER), interpolation=cv2.INTER_NEAREST).view(np.bool_) for m in (a, b))
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep OpenCV to one thread for a while."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _timed(spent: dict[str, float], step: str, call: Callable[[], object]) -> object:
    start = time.perf_counter()
    answer = call()
    spent[step] += 1e3 * (time.perf_counter() - start)
    return answer


def _line_by_steps(
    score_map: NDArray[np.float32], field: NDArray[np.uint8], grid_px: int, spent: dict[str, float]
) -> binarization.Binarization:
    """Run the whole room on one map, its sweep capped as in ``binarize``, and add up the milliseconds by step."""
    b = binarization
    _timed(spent, "gate", lambda: b.gate(float(score_map.max()), threshold=-1.0))
    shown = _timed(spent, "saliency", lambda: b.saliency(score_map, grid_px=grid_px))
    thresholds, min_area_px = b.sweep_thresholds(), int(np.ceil(2e-4 * grid_px**2))
    assert isinstance(shown, np.ndarray)

    def sweep() -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        fractions = b.mask_fractions(shown, thresholds)
        fractions = fractions[fractions <= 0.3]
        return b.component_counts(shown, thresholds[: len(fractions)], min_area_px=min_area_px), fractions

    counts, fractions = _timed(spent, "sweep", sweep)  # type: ignore[misc]
    lowest = _timed(spent, "plateau", lambda: b.plateau(counts, fractions))
    threshold = np.inf if lowest is None else float(thresholds[lowest])  # type: ignore[call-overload]

    def clean() -> NDArray[np.bool_]:
        return b.clean_mask(
            shown >= threshold, min_area_px=min_area_px, max_hole_px=int(0.3 * shown.size), max_defects=16
        )

    mask = _timed(spent, "mask", clean)
    assert isinstance(mask, np.ndarray)
    found = _timed(spent, "regions", lambda: b.regions(mask, score_map, size_hw=FIELD_HW, max_regions=4))
    windows = [b.crop_window(region.box_xyxy, size_hw=FIELD_HW) for region in found]  # type: ignore[attr-defined]
    _timed(spent, "crops", lambda: [b.cut(field, window) for window in windows])
    pairs = list(zip(found, windows, strict=True))  # type: ignore[call-overload]
    _timed(spent, "soft masks", lambda: [b.soft_mask(shown, r.mask, w, size_hw=FIELD_HW) for r, w in pairs])
    return b.Binarization(mask=mask, saliency=shown, threshold=threshold, counts=counts)
