"""Tables of lots follow their results: rows of new results are appended, whatever the size of the lot at the same cost.

A table is written anew, from all results of its lot, where that cannot be helped: there is none yet, a result has
changed, or the process died with rows on their way. It is also written anew once a lot that has grown by a twentieth is
quiet, which brings it into the order of the names. At most one twentieth of the time goes into writing anew.

The index of the results follows in the same steps: what is brought into a table is taken into the index before.

After a start all lots are looked through, a slice at a time: a table that is not there, or older than a result beside
it, is written anew, and the index is brought up to date. A lot whose table cannot be written waits by itself; neither
the line nor another lot does.
"""

import logging
import math
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from semwatch.errors import ConfigError, ImageError, ServiceUnavailable
from semwatch.store import lot_table, results
from semwatch.store.lot_rows import LotRow, LotRows
from semwatch.store.result_index import ResultIndex, stamp_of
from semwatch.store.results import AnyRecord

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
QUIET_S = 10.0
SLICE_S = 0.1
"""Of a step, for tables that are written anew, but one at least."""
FRESH_NS = 120 * 10**9
"""A result this old is in the ledger: it is written first, and finished at once."""
ROWS_A_STEP = 1000
RETRY_S = 30.0
"""Until the next try at a table that could not be written."""
LOOK_S = 0.02
"""Of a step, for lots that are looked through after a start."""
_SHARE = 20
"""A twentieth, of time and of growth."""


def row_of(path: Path, results_dir: Path, *, is_new: bool) -> LotRow:
    """What the ledger keeps of a review.json, reason.json or duplicate.json until it is in its table."""
    return LotRow(path.parent.relative_to(results_dir).as_posix(), path.name if is_new else None)


class LotTables:
    """The tables that are behind; the ledger remembers which. One thread at a time.

    Args:
        rows: what waits, of the ledger.
        results_dir: folder of the results.
        index: that follows too; None: there is none.
    """

    def __init__(self, rows: LotRows, results_dir: Path, index: ResultIndex | None = None) -> None:
        self._rows, self._results_dir, self._index = rows, results_dir, index
        self._next, self._next_anew = 0.0, 0.0
        self._grown: dict[str, tuple[int, float]] = {}
        """By lot, bytes appended since the table was written anew, and when the last were; inf: they are few."""
        self._ahead: dict[str, dict[str, int]] = {}
        """By lot, results that a table written anew has and that the ledger may yet name as new, with their mtime."""
        self._half_done: set[str] = set()
        """Lots whose table may hold rows that the ledger does not know to be there."""
        self._not_before: dict[str, float] = {}
        """By lot whose table could not be written, when it is tried again."""
        self._looks: Iterator[None] | None = self._look_through()

    def step(self, *, is_last: bool = False) -> None:
        """Bring tables up to date; with ``is_last`` all of them, whatever time it takes.

        Raises:
            ServiceUnavailable: the disk under the ledger is full or broken; nothing is lost, call it again.
        """
        now = time.monotonic()
        if now < self._next and not is_last:
            return
        self._next = now + INTERVAL_S
        if not os.access(self._results_dir, os.X_OK):  # a share that is away: what waits, waits
            return
        waiting = [] if is_last else [lot for lot, until in self._not_before.items() if until > now]
        while rows := self._rows.new(ROWS_A_STEP, but=waiting):
            waiting += self._append(rows)
        self._look_on(LOOK_S)
        self._find_quiet(now)
        if now >= self._next_anew or is_last:
            self._write_changed(math.inf if is_last else SLICE_S)

    def _append(self, rows: Sequence[tuple[int, LotRow]]) -> list[str]:
        """Append rows, lot by lot; return the lots whose table refused."""
        by_lot: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for seq, row in rows:
            by_lot[row.lot].append((seq, row.result or ""))
        return [lot for lot, new in by_lot.items() if not self._safely(self._append_to, lot, new)]

    def _safely(self, work: Callable[..., None], lot: str, *more: object) -> bool:
        """Work on one table; where its disk or folder refuses, it waits, which is said once."""
        try:
            work(lot, *more)
        except (ServiceUnavailable, OSError) as error:
            if isinstance(error.__cause__, sqlite3.Error):
                raise
            if lot not in self._not_before:
                log.warning("the table of %s waits: %s", lot, error)
            self._not_before[lot] = time.monotonic() + RETRY_S
            return False
        self._not_before.pop(lot, None)
        return True

    def _append_to(self, lot: str, rows: Sequence[tuple[int, str]]) -> None:
        ahead, stamps = self._ahead.get(lot, {}), {name: stamp_of(self._results_dir / lot / name) for _, name in rows}
        new = [name for _, name in rows if ahead.get(name) != _mtime_ns(self._results_dir / lot / name)]
        if lot in self._half_done or (records := self._read(lot, new)) is None:
            self._rows.write_anew(lot)
            return
        self._take_in(
            lambda index: index.put(lot, [(n, stamps[n], record) for n, record in zip(new, records, strict=True)])
        )
        self._half_done.add(lot)
        n_bytes = lot_table.append(self._results_dir / lot, records) if new else 0
        if n_bytes is None:
            self._rows.write_anew(lot)
        else:
            self._rows.mark_listed([seq for seq, _ in rows])
            grown, _ = self._grown.get(lot, (0, 0.0))
            self._grown[lot] = grown + n_bytes, time.monotonic()
        self._half_done.discard(lot)

    def _read(self, lot: str, names: Sequence[str]) -> list[AnyRecord] | None:
        """Read results of a lot; None where one is gone or broken meanwhile."""
        try:
            return [results.read_any(self._results_dir / lot / name) for name in names]
        except ImageError as error:
            log.warning("the table of %s is written anew: %s", lot, error)
            return None

    def _look_on(self, slice_s: float) -> None:
        """Look through more lots, for a while."""
        end = time.monotonic() + slice_s
        try:
            while self._looks is not None and time.monotonic() < end:
                if next(self._looks, self) is self:
                    self._looks = None
        except (OSError, ServiceUnavailable) as error:
            log.info("the tables of lots are not looked through further: %s", error)
            self._looks = None

    def _look_through(self) -> Iterator[None]:
        """Go through all folders of the results, a little at a time, and have tables written anew that are behind."""
        pending = [self._results_dir]
        while pending:
            folder = pending.pop()
            newest = table = 0
            try:
                with os.scandir(folder) as listing:
                    for n, entry in enumerate(listing):
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(Path(entry.path))
                        elif entry.name == lot_table.LOT:
                            table = entry.stat(follow_symlinks=False).st_mtime_ns
                        elif entry.name.endswith(results.IN_TABLES):
                            newest = max(newest, entry.stat(follow_symlinks=False).st_mtime_ns)
                        if n % 100 == 0:
                            yield
            except OSError:
                continue
            lot = folder.relative_to(self._results_dir).as_posix()
            if newest > table:
                self._rows.write_anew(lot)
            if newest:
                self._refresh_index(lot)
            yield

    def _find_quiet(self, now: float) -> None:
        for lot, (grown, last) in self._grown.items():
            if now - last >= QUIET_S:
                self._grown[lot] = grown, math.inf
                if grown * _SHARE >= lot_table.size(self._results_dir / lot):
                    self._rows.write_anew(lot)

    def _write_changed(self, slice_s: float) -> None:
        start = time.monotonic()
        for lot, seq in self._rows.changed():
            if self._not_before.get(lot, start) > start:
                continue
            self._safely(self._write_anew, lot, seq)
            if time.monotonic() - start >= slice_s:
                break
        end = time.monotonic()
        self._next_anew = end + (_SHARE - 1) * (end - start)

    def _write_anew(self, lot: str, seq: int) -> None:
        folder = self._results_dir / lot
        self._refresh_index(lot)
        written = lot_table.write(folder) if folder.is_dir() else []  # a person may have moved the lot away
        oldest_ns = time.time_ns() - FRESH_NS
        self._ahead[lot] = {path.name: mtime for path in written if (mtime := _mtime_ns(path)) > oldest_ns}
        self._rows.mark_written(lot, seq)
        self._grown.pop(lot, None)
        self._half_done.discard(lot)

    def _refresh_index(self, lot: str) -> None:
        self._take_in(lambda index: index.refresh(self._results_dir, lot))

    def _take_in(self, work: Callable[[ResultIndex], object]) -> None:
        """Bring the index up to date; one that is broken is left alone, for it is a cache."""
        try:
            if self._index is not None:
                work(self._index)
        except ConfigError as error:
            log.error("the index of the results is made anew at the next start: %s", error)
            self._index = None


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
