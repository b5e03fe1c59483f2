"""Everything outside the networks, stage by stage, on 1024 x 1024 images; and the networks beside it, same run.

Budget: at most 40 ms an image outside the networks. ``make bench`` prints the table.
"""

import hashlib
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from semwatch.intake import decoding
from semwatch.line import notices, pipeline, scaling
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Arrays
from semwatch.service.delivery import deliver_audit
from semwatch.settings.recipe import Recipe
from semwatch.store import results
from semwatch.store.audit import AuditLog
from semwatch.store.ledger import Ledger, OutboxItem
from semwatch.streams.records import records
from semwatch.system.clock import utc_now
from semwatch.system.files import stamp_of
from semwatch_training.synthetic import lot_images

N = 24
BUDGET_MS = 40.0


class Stopwatch(Embedded):
    """The embedded runtime, with the networks' own time kept apart."""

    seconds = 0.0

    def infer(self, model: str, inputs: Arrays, *, backlog: bool = False):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        try:
            return super().infer(model, inputs, backlog=backlog)
        finally:
            self.seconds += time.perf_counter() - start


def test_line_outside_the_networks(repository: Path, tmp_path: Path) -> None:
    recipe = Recipe()
    open_gate = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    rows: dict[str, list[float]] = defaultdict(list)
    with (
        Stopwatch(repository) as models,
        Ledger(tmp_path / "l.sqlite") as ledger,
        AuditLog(tmp_path / "a.jsonl") as log,
    ):
        for image in lot_images(n=N, seed=11, size_hw=(1024, 1024)):
            path = tmp_path / image.name
            path.write_bytes(image.content)
            laps = _review_one(path, open_gate, models, ledger, log, tmp_path / "results")
            for stage, ms in laps.items():
                rows[stage].append(ms)
    table = Table("stage", "median ms", "p95 ms", title=f"one 1024 x 1024 image, gate open, {N} images")
    outside = np.sum([times for stage, times in rows.items() if "network" not in stage], axis=0)
    for stage, times in rows.items():
        table.add_row(stage, f"{np.median(times):.2f}", f"{np.percentile(times, 95):.2f}")
    table.add_section()
    table.add_row("outside the networks", f"{np.median(outside):.2f}", f"{np.percentile(outside, 95):.2f}")
    table.add_row("share of the 40 ms budget", f"{np.median(outside) / BUDGET_MS:.2f}", "")
    table.add_row("networks / outside", f"{np.median(rows['networks']) / np.median(outside):.1f} x", "")
    Console().print(table)


def _review_one(
    path: Path, recipe: Recipe, models: Stopwatch, ledger: Ledger, log: AuditLog, results_dir: Path
) -> dict[str, float]:
    laps: dict[str, float] = {}
    last = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        laps[stage] = (now - last) * 1000
        last = now

    data = decoding.read_file(path)
    lap("read")
    sha256 = hashlib.sha256(data).hexdigest()
    lap("hash")
    claim = ledger.claim("b", path.name, sha256=sha256, stamp=stamp_of(path.stat()), now_utc=utc_now())
    lap("ledger claim")
    models.seconds = 0.0
    review = pipeline.review(
        data, source="b", path=path.name, sha256=sha256, recipe=recipe, models=models, reviewed_utc=utc_now()
    )
    lap("review")
    networks = models.seconds * 1000
    page = review.pages[0].micrograph
    start = time.perf_counter()
    scaling.resize(page.field, (448, 448))
    resize_ms = (time.perf_counter() - start) * 1000
    timings = review.timings_ms
    laps["decode and info bar"] = timings["decode"]
    laps["resize"] = resize_ms
    laps["binarize"] = timings["binarize"]
    laps["crops and soft masks"] = timings["crop"]
    laps["rest of review"] = (
        laps.pop("review") - networks - timings["decode"] - resize_ms - timings["binarize"] - timings["crop"]
    )
    last = time.perf_counter()
    paths = results.write(review, results_dir=results_dir)
    lap("overlay and result")
    ledger.finish(
        claim,
        outbox=[OutboxItem(*message) for message in notices.messages(records(review), paths.record)],
        audit=notices.audit_entry(paths.record, paths.json.name),
        now_utc=review.reviewed_utc,
    )
    lap("ledger finish")
    deliver_audit(ledger, log)
    lap("audit")
    laps["networks"] = networks
    return laps
