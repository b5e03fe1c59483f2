"""A drop folder of 20,000 reviewed files and a lot of 20,000 results: what a scan and what one more result cost."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from factories import make_review
from semwatch.intake import folder_rules
from semwatch.intake.drop_folder import Incoming
from semwatch.service import lot_tables
from semwatch.service.lot_tables import LotTables, row_of
from semwatch.settings.site import Folder
from semwatch.store import lot_table, results
from semwatch.store.ledger import Ledger
from semwatch.system.files import Stamp, stamp_of

N = 20_000
UTC = "2026-01-01T00:00:00Z"


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def finish(ledger: Ledger, path: str, stamp: Stamp) -> None:
    sha256 = hashlib.sha256(path.encode()).hexdigest()
    claim = ledger.claim("tool", path, sha256=sha256, stamp=stamp, now_utc=UTC)
    ledger.finish(claim, outbox=[], audit={}, now_utc=UTC)


@pytest.mark.timeout(1800)
def test_scan_of_a_folder_in_which_all_is_done(tmp_path: Path) -> None:
    settings = Folder(path=tmp_path / "drop", source="tool", recipe=tmp_path, completeness="rename", polling=True)
    folder = folder_rules.Folder(**settings.model_dump(exclude={"recipe"}))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for i in range(N):
            file = folder.path / f"lot{i % 40}" / f"image-{i:06d}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            finish(ledger, str(file.relative_to(folder.path)), stamp_of(file.stat()))
        clock = [0.0]
        with Incoming([folder], ledger.settled, reconcile_s=1, poll_s=1, clock=lambda: clock[0]) as incoming:
            costs = []
            for _ in range(6):
                clock[0] += 10
                costs.append(seconds(lambda: incoming.arrivals(0.0)))
    wall, cpu = min(costs[1:])
    print(f"\na scan of {N} settled files: {wall:.2f} s, {cpu:.2f} s of processor time")


@pytest.mark.timeout(1800)
def test_one_more_result_in_a_large_lot_and_in_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lot_tables, "INTERVAL_S", 0.0)
    for n in (1, N):
        folder = tmp_path / str(n)
        first = results.write(make_review(2, size_hw=(64, 64), path="lot/0.tif"), results_dir=folder).json
        text = first.read_text()
        for i in range(1, n):
            first.with_name(f"{i}.tif.review.json").write_text(text.replace("lot/0.tif", f"lot/{i}.tif"))
        anew, anew_cpu = seconds(lambda lot=first.parent: lot_table.write(lot))
        walls, cpus = [], []
        with Ledger(folder / "ledger.sqlite") as ledger:
            tables = LotTables(ledger.lot_rows, folder)
            for i in range(100):
                sha256 = hashlib.sha256(b"%d" % i).hexdigest()
                review = replace(make_review(2, size_hw=(64, 64), path=f"lot/new-{i}.tif"), sha256=sha256)
                paths = results.write(review, results_dir=folder)
                claim = ledger.claim("tool-a", review.path, sha256=sha256, stamp=Stamp(1, 1), now_utc=UTC)
                row = row_of(paths.json, folder, is_new=paths.is_new)
                ledger.finish(claim, outbox=[], audit={}, now_utc=UTC, row=row)
                wall, cpu = seconds(tables.step)
                walls.append(wall)
                cpus.append(cpu)
        each, each_cpu = sorted(walls)[50], sorted(cpus)[50]
        print(
            f"\nlot of {n}: one more result {each * 1000:.1f} ms, {each_cpu * 1000:.1f} ms of processor time (median)"
        )
        print(f"its table written anew: {anew:.2f} s, {anew_cpu:.2f} s of processor time")
        assert each_cpu < 0.05
