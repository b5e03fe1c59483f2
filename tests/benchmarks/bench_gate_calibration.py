"""How near a threshold that a stream's own scores propose comes to what it promises.

Streams are drawn with replacement from scores of images whose truth is known: synthetic ones, and real ones where they
are at hand, each at several shares of normal images and several lengths. A row tells, over the seeds: how often there
is a proposal; the expected and the true false alarm rate, and how often the stated interval holds the true one; the
same for misses; and the misses among visible defects alone, those that score above 99 % of the normal images. Shares 0
and 1 have one kind of image only: every proposal is wrong there.

The scores are kept in ``.cache/gate_scores``, by detector. ``SEMWATCH_SEEDS`` sets the number of seeds.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from paths import DATA, ROOT
from semwatch.intake import decoding
from semwatch.line import detection, pipeline
from semwatch.line.gate_calibration import NoProposal, Proposal, Rate, propose
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.synthetic import lot_images

SEEDS = int(os.environ.get("SEMWATCH_SEEDS", "20"))
SHARES = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0)
LENGTHS = (100, 300, 1000)
STAGES = {"BEOL": 600, "DEP": 300}
"""Images of each synthetic process, half of them defect-free."""
REAL = {
    "bare wafer": ("bare-wafer-52px", ("defect-free",), ("dark-spot", "particle", "pit", "scratch")),
    "line-space": ("line-space-and-more", ("CLEAN_LAYER",), ("BRIDGE", "OPEN", "PARTICLE", "CMP")),
}
"""Folder, classes that are normal, classes that are not."""
JITTER = 0.05
"""Deviation that is added to the logarithm of a drawn score, so that few scores are not drawn as many equal ones."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Raw scores whose truth is known."""

    normal: Scores
    defective: Scores


@dataclass(frozen=True)
class Drawn:
    """One proposal, and what it does to its pool."""

    proposal: Proposal
    false_alarms: float
    misses: float
    visible_misses: float


def raw_score(field: NDArray[np.uint8], models: Embedded) -> float:
    return detection.detect(field, models)[0].raw_score


def synthetic(stage: str, n: int, models: Embedded) -> Pool:
    scores: dict[bool, list[float]] = {True: [], False: []}
    drawn = {"seed": 77, "size_hw": (448, 448), "defect_free_share": 0.5, "info_bar_share": 0, "png_share": 1}
    for image in lot_images(n=n, stages=(stage,), **drawn):
        (page,) = decoding.decode(image.content, name=image.name)
        scores[len(image.micrograph.masks) > 0].append(raw_score(page.field, models))
    return Pool(np.array(scores[False]), np.array(scores[True]))


def real(folder: Path, classes: tuple[str, ...], models: Embedded) -> Scores:
    scores = []
    for file in (file for name in classes for file in sorted((folder / name).iterdir())):
        field = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        if min(field.shape) < 64:  # too small to be reviewed as it is
            field = cv2.resize(field, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
        scores.append(raw_score(np.asarray(field, np.uint8), models))
    return np.array(scores)


def pools(models: Embedded) -> Iterator[tuple[str, Pool]]:
    kept = ROOT / ".cache" / "gate_scores" / f"{models.hashes()['detector']}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    for name in (*STAGES, *REAL):
        if name not in known:
            if name in STAGES:
                pool = synthetic(name, STAGES[name], models)
            elif (DATA / "REAL-SEM").is_dir():
                folder, normal, defective = REAL[name]
                of = DATA / "REAL-SEM" / folder
                pool = Pool(real(of, normal, models), real(of, defective, models))
            else:
                continue
            known[name] = {"normal": pool.normal.tolist(), "defective": pool.defective.tolist()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(known))
        yield name, Pool(np.array(known[name]["normal"]), np.array(known[name]["defective"]))


def draw(pool: Pool, n: int, share: float, seed: int) -> Drawn | NoProposal:
    rng = np.random.default_rng(seed)
    k = round(n * share)
    scores = np.concatenate([rng.choice(pool.normal, k), rng.choice(pool.defective, n - k)])
    found = propose(scores * np.exp(rng.normal(0, JITTER, n)), false_alarm_rate=Recipe().gate.false_alarm_rate)
    if isinstance(found, NoProposal):
        return found
    visible = pool.defective[pool.defective > np.percentile(pool.normal, 99)]
    misses, visible_misses = (float((scores <= found.threshold).mean()) for scores in (pool.defective, visible))
    return Drawn(found, float((pool.normal > found.threshold).mean()), misses, visible_misses)


def row(pool: Pool, n: int, share: float) -> list[str]:
    all_found = [draw(pool, n, share, seed) for seed in range(SEEDS)]
    found = [one for one in all_found if isinstance(one, Drawn)]
    head = [f"{share:g}", str(n), f"{len(found)} of {SEEDS}"]
    if not found:
        why = Counter(one.reason for one in all_found if isinstance(one, NoProposal)).most_common(1)
        return [*head, "", "", "", why[0][0][:44]]
    alarms = [(one.proposal.expected.false_alarms, one.false_alarms) for one in found]
    misses = [(one.proposal.expected.misses, one.misses) for one in found]
    visible = [one.visible_misses for one in found]
    return [*head, told(alarms), told(misses), f"{np.median(visible):.3f}", ""]


def told(pairs: list[tuple[Rate, float]]) -> str:
    """Median of what is expected, median and range of the truth, and how often the interval holds it."""
    truth = [true for _, true in pairs]
    held = sum(rate.low <= true <= rate.high for rate, true in pairs)
    expected = np.median([rate.value for rate, _ in pairs])
    return f"{expected:.3f}: {np.median(truth):.3f} ({min(truth):.3f}-{max(truth):.3f}), {held}/{len(pairs)}"


@pytest.mark.timeout(7200)
def test_proposed_thresholds_against_the_truth(repository: Path) -> None:
    console = Console(width=170)
    columns = ("normal share", "n", "proposed", "false alarms expected: true (range), held", "misses likewise",
               "of visible", "else, mostly")  # fmt: skip
    with Embedded(repository, models=("detector",)) as models:
        present = pipeline.gate_threshold(Recipe(), models)
        for name, pool in pools(models):
            alarms, misses = (pool.normal > present).mean(), (pool.defective <= present).mean()
            title = f"{name}, {len(pool.normal)} normal and {len(pool.defective)} defective images"
            title += f"; now {present:.3g}: {alarms:.3f} false alarms, {misses:.3f} missed"
            table = Table(*columns, title=title)
            for share in SHARES:
                for n in LENGTHS:
                    table.add_row(*row(pool, n, share))
            console.print(table)
