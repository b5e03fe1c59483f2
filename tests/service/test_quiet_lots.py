"""When a lot counts as complete: by the index and by what waits, once for what it holds."""

from pathlib import Path

import pytest

from factories import make_review
from semwatch.service.quiet_lots import QuietLots
from semwatch.store import results
from semwatch.store.result_index import INDEX, ResultIndex, open_index

SINCE = "2020-01-01T00:00:00Z"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An index with results, a clock, and what waits."""

    def __init__(self, folder: Path, index: ResultIndex) -> None:
        self.folder, self.index, self.clock = folder, index, Clock()
        self.waiting: set[str] = set()
        self.n = 0

    def put(self, lot: str, name: str, utc: str, sha256: str = "") -> None:
        from dataclasses import replace

        self.n += 1
        source, _, folder = lot.partition("/")
        path = f"{folder}/{name}" if folder else name
        review = replace(make_review(1), source=source, path=path, reviewed_utc=utc, sha256=sha256 or f"{self.n:064x}")
        results.write(review, results_dir=self.folder)
        self.index.refresh(self.folder, lot)

    def lots(self, since_utc: str = SINCE, quiet_s: float = 60.0, announced: dict[str, str] | None = None) -> QuietLots:
        return QuietLots(
            self.index,
            announced or {},
            self.waiting.__contains__,
            since_utc=since_utc,
            quiet_s=quiet_s,
            clock=self.clock,
        )

    def after(self, lots: QuietLots, seconds: float) -> list[str]:
        self.clock.now += seconds
        found = lots.look()
        for lot in found:
            lots.mark(lot)
        return [lot.name for lot in found]


@pytest.fixture
def bench(tmp_path: Path):
    with open_index(tmp_path / INDEX) as index:
        (tmp_path / "results").mkdir()
        yield Bench(tmp_path / "results", index)


def test_no_lot_is_nothing(bench: Bench) -> None:
    assert bench.after(bench.lots(), 1000) == []


def test_quiet_lot_is_complete_once(bench: Bench) -> None:
    bench.put("tool/lot1", "a.tif", "2025-01-01T00:00:00Z")
    lots = bench.lots()
    assert bench.after(lots, 0) == []
    assert bench.after(lots, 59) == []
    assert bench.after(lots, 30) == ["tool/lot1"]
    assert bench.after(lots, 1000) == []


def test_new_image_starts_the_quiet_time_anew_and_completes_it_again(bench: Bench) -> None:
    bench.put("tool/lot1", "a.tif", "2025-01-01T00:00:00Z")
    lots = bench.lots()
    bench.after(lots, 0)
    bench.put("tool/lot1", "b.tif", "2025-01-01T00:00:50Z")
    assert bench.after(lots, 50) == []
    assert bench.after(lots, 50) == []
    assert bench.after(lots, 50) == ["tool/lot1"]
    bench.put("tool/lot1", "c.tif", "2025-01-01T01:00:00Z")
    bench.after(lots, 50)
    assert bench.after(lots, 100) == ["tool/lot1"]


def test_lot_of_which_an_image_waits_is_not_complete(bench: Bench) -> None:
    bench.put("tool/lot1", "a.tif", "2025-01-01T00:00:00Z")
    bench.waiting.add("tool/lot1")
    lots = bench.lots()
    for _ in range(5):
        assert bench.after(lots, 100) == []
    bench.waiting.clear()
    assert bench.after(lots, 100) == []
    assert bench.after(lots, 100) == ["tool/lot1"]


def test_lots_from_before_the_hooks_are_left_alone_also_when_judged_again(bench: Bench) -> None:
    bench.put("tool/old", "a.tif", "2025-01-01T00:00:00Z", sha256="a" * 64)
    lots = bench.lots(since_utc="2025-06-01T00:00:00Z")
    bench.after(lots, 100)
    assert bench.after(lots, 100) == []


def test_content_that_is_new_under_an_old_name_is_news(bench: Bench) -> None:
    bench.put("tool/lot1", "a.tif", "2025-01-01T00:00:00Z")
    lots = bench.lots()
    bench.after(lots, 0)
    assert bench.after(lots, 100) == ["tool/lot1"]
    bench.put("tool/lot1", "a.tif", "2025-01-02T00:00:00Z")
    bench.after(lots, 100)
    assert bench.after(lots, 100) == ["tool/lot1"]


def test_announced_lot_is_not_announced_again_after_a_restart(bench: Bench) -> None:
    bench.put("tool/lot1", "a.tif", "2025-01-01T00:00:00Z")
    lots = bench.lots()
    bench.after(lots, 0)
    bench.clock.now += 100
    (lot,) = lots.look()
    again = bench.lots(announced={lot.name: lot.held})
    bench.after(again, 0)
    assert bench.after(again, 1000) == []
