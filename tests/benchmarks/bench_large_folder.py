"""A drop folder of a million reviewed files and a lot of 20,000 results: what a scan and what one more result cost."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from factories import make_review
from semwatch.intake import folder_rules as drop_rules
from semwatch.intake.drop_folder import Incoming
from semwatch.service import lot_tables
from semwatch.service.lot_tables import LotTables, row_of
from semwatch.settings.site import Folder
from semwatch.store import lot_table, results
from semwatch.store.ledger import Ledger
from semwatch.system.files import Stamp, stamp_of

N = 20_000
N_FILES = int(os.environ.get("SEMWATCH_FILES", "1000000"))
UTC = "2026-01-01T00:00:00Z"


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def reviewed(ledger: Ledger, folder: drop_rules.Folder, n: int, n_lots: int) -> None:
    """Make files, and a ledger that has reviewed them."""
    for lot in range(n_lots):
        place = folder.path / f"lot{lot}" if n_lots > 1 else folder.path
        place.mkdir(parents=True, exist_ok=True)
        for i in range(lot, n, n_lots):
            os.close(os.open(place / f"image-{i:07d}.tif", os.O_CREAT | os.O_WRONLY, 0o644))
        rows = [
            (os.fsencode(os.path.relpath(entry.path, folder.path)), *stamp_of(entry.stat()))
            for entry in os.scandir(place)
        ]
        with ledger._file.transaction() as db:
            db.executemany(
                "INSERT INTO work (source, sha256, path, state, first_seen_utc, finished_utc)"
                " VALUES ('tool', hex(?1), ?1, 'DONE', '2026', '2026')",
                [row[:1] for row in rows],
            )
            db.executemany("INSERT INTO paths VALUES ('tool', ?1, ?2, ?3, hex(?1), '2026', ?4, ?5, NULL)", rows)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("n_lots", [40, 1])
def test_scans_of_a_folder_in_which_all_is_done(tmp_path: Path, n_lots: int) -> None:
    settings = Folder(path=tmp_path / "drop", source="tool", recipe=tmp_path, completeness="rename")
    folder = drop_rules.Folder(**settings.model_dump(exclude={"recipe"}))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        reviewed(ledger, folder, N_FILES, n_lots)
        incoming = Incoming([folder], ledger.settled, reconcile_s=3600, poll_s=3600)
        scan, costs = incoming._scans["tool"], {}
        for name in ("full", "again", "nothing new", "one new file"):
            if name == "one new file":
                (folder.path / f"lot{n_lots - 1}" if n_lots > 1 else folder.path).joinpath("new.tif").touch()
            time.sleep(3.5)
            costs[name] = seconds(scan.run)
        print(f"\n{N_FILES} settled files in {n_lots} folders, wall and processor time of a scan:")
        for name, (wall, cpu) in costs.items():
            print(f"  {name}: {wall:.2f} s, {cpu:.2f} s")
        assert incoming.waiting()[0] == 1
        incoming.look_anew()
        incoming.start()
        longest, end = 0.0, time.monotonic() + costs["full"][0]
        while time.monotonic() < end:
            longest = max(longest, seconds(lambda: incoming.arrivals(0.02, limit=2))[0] - 0.02)
        incoming.close()
        print(f"  the loop beside a full scan: held up for {longest * 1000:.0f} ms at most")
    shutil.rmtree(tmp_path / "drop")


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
