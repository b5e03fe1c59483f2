"""Purity, accuracy and escapes against truth counted by hand, and intervals against many simulated lots."""

from pathlib import Path

import numpy as np
import pytest

from factories import make_review, make_verdict
from semwatch.defects import VerdictKind
from semwatch.operations import quality
from semwatch.store import corrections, results
from semwatch.store.corrections import Correction
from semwatch.store.result_index import open_index, rebuild

CLASSES = ("particle", "pit", "void")


def test_nobody_said_anything() -> None:
    found = quality.quality([], {})
    assert (found.n_judged, found.classes, found.escapes.value) == (0, (), None)
    assert (found.escapes.low, found.escapes.high) == (0.0, 1.0)


def test_figures_of_a_lot_are_those_counted_by_hand(tmp_path: Path) -> None:
    """200 defects of 50 images; by image: a right particle, a pit that is a void, an unknown pit, a dismissed void."""
    kinds: tuple[tuple[VerdictKind, str], ...] = (
        ("known", "particle"),
        ("known", "pit"),
        ("unknown", "pit"),
        ("defect-free", "void"),
    )
    verdicts = [make_verdict(kind, label) for kind, label in kinds]
    for i in range(50):
        review = make_review(4, path=f"lot/{i:02}.tif", sha256=f"{i:064x}", verdicts=verdicts)
        path = results.write(review, results_dir=tmp_path / "results").json
        said = [
            Correction(0, "particle" if i % 5 else None, 1),  # 10 of 50 are none
            Correction(0, "void", 2),
            Correction(0, "pit", 3),
            Correction(0, "void" if i < 20 else None, 4),  # 20 escapes
        ]
        if i < 5:
            said.append(Correction(0, "particle", box_xyxy=(0, 0, 9, 9)))
        results.change(path, lambda record, said=said: corrections.corrected(record, said, by="ada", utc="now"))  # type: ignore[misc]
    with open_index(tmp_path / "index.sqlite") as index:
        list(rebuild(index, tmp_path / "results"))
        found = quality.measure(index)
        assert quality.measure(index, ["tool-a/other"]).n_judged == 0
    assert (found.n_judged, found.n_missed) == (200, 5)
    counted = {
        one.label: tuple((s.count, s.n) for s in (one.purity, one.accuracy, one.escapes)) for one in found.classes
    }
    assert counted == {
        "particle": ((40, 50), (40, 45), (5, 45)),
        "pit": ((0, 50), (0, 50), (0, 50)),
        "void": ((0, 0), (0, 70), (20, 70)),
    }
    assert (found.false_alarms.count, found.false_alarms.n) == (10, 150)
    assert (found.escapes.count, found.escapes.n) == (25, 165)
    particle = found.classes[0].purity
    assert (particle.low, particle.high) == pytest.approx((0.6628, 0.8997), abs=2e-4)  # Clopper and Pearson, 40 of 50


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    """200 lots of 200 judged defects each, whose purities are known."""
    rng = np.random.default_rng(0)
    true = {"particle": 0.95, "pit": 0.7, "void": 0.99}
    held = []
    for _ in range(200):
        judged = []
        for label, purity in true.items():
            n = int(rng.integers(30, 100))
            right = int(rng.binomial(n, purity))
            judged += [("known", label, label, right), ("known", label, None, n - right)]
        held += [one.purity.low <= true[one.label] <= one.purity.high for one in quality.quality(judged, {}).classes]
    assert len(held) == 600
    assert np.mean(held) >= 0.95
