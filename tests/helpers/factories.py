"""Small, seeded builders of complete reviews for tests: the pixels and a truth mask make everything else."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import (
    DEFECT_FREE,
    Box,
    Defect,
    Domain,
    Micrograph,
    Neighbour,
    PageReview,
    Review,
    ScoreMap,
    Verdict,
    VerdictKind,
)
from semwatch.line import notices
from semwatch.store.review_record import to_record
from semwatch.streams.records import Fields, Message, Record, encode_result, records

CLASSES = ("particle", "bridge", "scratch", "residue", "open", DEFECT_FREE)
KINDS: tuple[VerdictKind, ...] = ("known", "unknown", "non-decidable", "defect-free")
GATE_THRESHOLD = 0.25
DOMAIN_P: dict[Domain, float | None] = {"known process": 0.5, "unknown process": 0.002, "not judged": None}
TOKENS = 32
"""Edge of the detector's token grid: 448 px by patches of 14."""
GRID = 256
"""Edge of the working grid of the mask."""
CROP_PX = 224
N_FEATURES = 384


def make_verdict(kind: VerdictKind = "known", label: str = "particle", other: str = "residue") -> Verdict:
    """Build a verdict of one kind whose nearest classes are ``label`` and ``other``."""
    if kind == "defect-free":
        label = DEFECT_FREE
    sure = {"known": 0.93, "unknown": 0.41, "non-decidable": 0.52, "defect-free": 0.88}[kind]
    nearest = (Neighbour(label, sure, 0.42), Neighbour(other, 1.0 - sure, 0.07))
    return Verdict(kind, label if kind in ("known", "defect-free") else None, sure, nearest)


def make_review(
    n_defects: int = 1,
    *,
    size_hw: tuple[int, int] = (256, 256),
    n_pages: int = 1,
    source: str = "tool-a",
    path: str = "lot7/wafer01/a.tif",
    sha256: str | None = None,
    verdicts: Sequence[Verdict] | None = None,
    pixel_nm: float | None = 2.5,
    vendor: str | None = "FEI",
    info_bar_px: int = 0,
    model_versions: dict[str, int] | None = None,
    site: str = "site-1",
    reviewed_utc: str = "2025-03-01T12:00:00Z",
    domain: Domain = "not judged",
    seed: int = 0,
) -> Review:
    """Build a whole review: ``n_defects`` discs on each of ``n_pages`` pages, defect i judged ``verdicts[i % len]``."""
    pages = []
    for page in range(n_pages):
        pixels, truth = draw_discs(n_defects, size_hw=size_hw, info_bar_px=info_bar_px, seed=seed + page)
        pages.append(
            make_page(
                pixels,
                truth,
                page=page,
                info_bar_px=info_bar_px,
                verdicts=verdicts,
                pixel_nm=pixel_nm,
                vendor=vendor,
                domain=domain,
                seed=seed + page,
            )
        )
    asked = {"detector": 1, "encoder": 1, "head": 3} if n_defects else {"detector": 1}
    return Review(
        source=source,
        path=path,
        sha256=sha256 or hashlib.sha256(b"".join(page.micrograph.pixels.tobytes() for page in pages)).hexdigest(),
        reviewed_utc=reviewed_utc,
        recipe_name="metal2-adi",
        recipe_id="5f2a9c0e7b1d4e68",
        model_versions=asked if model_versions is None else model_versions,
        pages=tuple(pages),
        site=site,
        timings_ms={"micrograph": 2.1, "detection": 11.4, "binarization": 3.2, "classification": 6.7},
    )


def make_page(
    pixels: NDArray[np.uint8],
    truth: NDArray[np.bool_],
    *,
    page: int = 0,
    info_bar_px: int = 0,
    verdicts: Sequence[Verdict] | None = None,
    pixel_nm: float | None = 2.5,
    vendor: str | None = "FEI",
    gate_threshold: float = GATE_THRESHOLD,
    domain: Domain = "not judged",
    seed: int = 0,
) -> PageReview:
    """Build a page review from (H, W) pixels and a (H, W) truth mask: one defect for each 8-connected component."""
    H, W = pixels.shape
    field = (0, 0, W, H - info_bar_px)
    micrograph = Micrograph(np.ascontiguousarray(pixels), field, page, pixel_nm, vendor)
    field_truth = truth[: H - info_bar_px].astype(np.uint8)
    score_map = replace(make_score_map(field_truth, seed=seed), domain_p=DOMAIN_P[domain])
    mask = cv2.resize(field_truth, (GRID, GRID), interpolation=cv2.INTER_AREA) > 0
    said = verdicts or [make_verdict("known", label) for label in CLASSES[:-1]]
    _, _, stats, _ = cv2.connectedComponentsWithStats(field_truth, connectivity=8)
    defects = tuple(
        _defect(micrograph, score_map, defect_id=i, stats=stats[i], verdict=said[(i - 1) % len(said)], seed=seed)
        for i in range(1, len(stats))
    )
    return PageReview(micrograph, score_map, gate_threshold, mask if defects else np.zeros_like(mask), defects, domain)


def make_score_map(truth: NDArray[np.uint8], *, seed: int = 0) -> ScoreMap:
    """Build a token-grid score map: about 0.1 where ``truth`` is 0, up to 0.6 where it is 1."""
    rng = np.random.default_rng(seed)
    hot = cv2.resize(truth.astype(np.float32), (TOKENS, TOKENS), interpolation=cv2.INTER_AREA)
    hot = cv2.GaussianBlur(np.minimum(1, hot * 3), (0, 0), 0.8)
    values = (0.1 + 0.02 * rng.standard_normal((TOKENS, TOKENS)) + 0.5 * hot).clip(0, 2).astype(np.float32)
    top = np.sort(values, axis=None)[-max(1, values.size // 100) :]
    score = float(top.mean())
    return ScoreMap(values, max(score, 1.2 * GATE_THRESHOLD) if truth.any() else score)


def draw_discs(
    n_discs: int, *, size_hw: tuple[int, int], info_bar_px: int = 0, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw ``n_discs`` bright discs, none touching another, on a noisy line pattern: pixels and truth mask."""
    rng = np.random.default_rng(seed)
    H, W = size_hw
    field_h = H - info_bar_px
    lines = 90 + 40 * (np.arange(W) // max(2, W // 16) % 2)
    pixels = (lines[None, :] + 6 * rng.standard_normal((H, W))).clip(0, 255).astype(np.uint8)
    pixels[field_h:] = 0
    truth = np.zeros((H, W), np.uint8)
    cells = max(1, int(np.ceil(np.sqrt(n_discs))))
    cell_h, cell_w = field_h / cells, W / cells
    for i in rng.permutation(cells * cells)[:n_discs]:
        centre = (int((i % cells + 0.5) * cell_w), int((i // cells + 0.5) * cell_h))
        radius = max(1, int(min(cell_h, cell_w) * rng.uniform(0.10, 0.20)))
        cv2.circle(truth, centre, radius, 1, cv2.FILLED)
    pixels[truth > 0] = (pixels[truth > 0].astype(np.int16) + 90).clip(0, 255).astype(np.uint8)
    return pixels, truth > 0


def _defect(
    micrograph: Micrograph,
    score_map: ScoreMap,
    *,
    defect_id: int,
    stats: NDArray[np.int32],
    verdict: Verdict,
    seed: int,
) -> Defect:
    x, y, w, h, area = (int(v) for v in stats)
    box = (x, y, x + w, y + h)
    crop_xyxy = _square_around(box)
    rng = np.random.default_rng((seed, defect_id))
    pixel_nm = micrograph.pixel_nm
    return Defect(
        defect_id=defect_id,
        box_xyxy=box,
        area_px=area,
        area_nm2=None if pixel_nm is None else area * pixel_nm**2,
        peak_score=_peak(score_map, box, micrograph.field.shape),
        crop_xyxy=crop_xyxy,
        crop=_crop(micrograph.field, crop_xyxy),
        soft_mask=rng.random((CROP_PX // 14, CROP_PX // 14), dtype=np.float32),
        features=rng.standard_normal(N_FEATURES).astype(np.float32),
        verdict=verdict,
    )


def _square_around(box: Box) -> Box:
    x0, y0, x1, y1 = box
    half = max(8, int(1.1 * max(x1 - x0, y1 - y0)))
    cx, cy = (x0 + x1) // 2, (y0 + y1) // 2
    return cx - half, cy - half, cx + half, cy + half


def _crop(field: NDArray[np.uint8], crop_xyxy: Box) -> NDArray[np.uint8]:
    x0, y0, x1, y1 = crop_xyxy
    H, W = field.shape
    rows = np.abs(np.arange(y0, y1)) % (2 * H)
    cols = np.abs(np.arange(x0, x1)) % (2 * W)
    window = field[np.ix_(np.minimum(rows, 2 * H - 1 - rows), np.minimum(cols, 2 * W - 1 - cols))]
    return np.asarray(cv2.resize(window, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA), np.uint8)


def _peak(score_map: ScoreMap, box: Box, field_hw: tuple[int, ...]) -> float:
    x0, y0, x1, y1 = box
    H, W = field_hw
    h, w = score_map.values.shape
    window = score_map.values[y0 * h // H : -(-y1 * h // H), x0 * w // W : -(-x1 * w // W)]
    return float(window.max())


def messages(review: Review) -> list[Message]:
    """What a review gives to Redis."""
    return notices.messages(records(review), to_record(review))


def result_summary(review: Review) -> Fields:
    """The summary of a review as stream fields."""
    return encode_result(notices.summary(to_record(review)))


_UNKNOWN = records(make_review(1, verdicts=[make_verdict("unknown")]))[0]


def make_record(i: int = 0, **changes: object) -> Record:
    """Build record number i of an unknown, with a small crop of its own."""
    small = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
    return replace(_UNKNOWN, **{"id": f"{i:032x}", "crop": small, "defect_id": i + 1, **changes})
