"""Tables of lots follow their results: rows of new results are appended, whatever the size of the lot at the same cost.

A table is written anew, from all results of its lot, where that cannot be helped: there is none yet, a result has
changed, or the process died with rows on their way. It is also written anew once a lot that has grown by a twentieth is
quiet, which brings it into the order of the names. At most one twentieth of the time goes into writing anew.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from semwatch.errors import ImageError
from semwatch.store import lot_table, results
from semwatch.store.lot_rows import LotRow, LotRows
from semwatch.store.review_record import ReviewRecord

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
QUIET_S = 10.0
SLICE_S = 0.1
"""Of a step, for tables that are written anew, but one at least."""
FRESH_NS = 120 * 10**9
"""A result this old is in the ledger: it is written first, and finished at once."""
ROWS_A_STEP = 1000
_SHARE = 20
"""A twentieth, of time and of growth."""


def row_of(path: Path, results_dir: Path, *, is_new: bool) -> LotRow:
    """What the ledger keeps of a review.json until it is in its table."""
    return LotRow(path.parent.relative_to(results_dir).as_posix(), path.name if is_new else None)


class LotTables:
    """The tables that are behind, for the one thread of the loop; the ledger remembers which.

    Args:
        rows: what waits, of the ledger.
        results_dir: folder of the results.
    """

    def __init__(self, rows: LotRows, results_dir: Path) -> None:
        self._rows, self._results_dir = rows, results_dir
        self._next, self._next_anew = 0.0, 0.0
        self._grown: dict[str, tuple[int, float]] = {}
        """By lot, bytes appended since the table was written anew, and when the last were; inf: they are few."""
        self._ahead: dict[str, dict[str, int]] = {}
        """By lot, results that a table written anew has and that the ledger may yet name as new, with their mtime."""
        self._half_done: set[str] = set()
        """Lots whose table may hold rows that the ledger does not know to be there."""

    def step(self, *, is_last: bool = False) -> None:
        """Bring tables up to date; with ``is_last`` all of them, whatever time it takes.

        Raises:
            ServiceUnavailable: the disk is full or broken; nothing is lost, call it again.
        """
        now = time.monotonic()
        if now < self._next and not is_last:
            return
        self._next = now + INTERVAL_S
        while rows := self._rows.new(ROWS_A_STEP):
            self._append(rows)
        self._find_quiet(now)
        if now >= self._next_anew or is_last:
            self._write_changed(math.inf if is_last else SLICE_S)

    def _append(self, rows: Sequence[tuple[int, LotRow]]) -> None:
        by_lot: dict[str, list[int]] = defaultdict(list)
        names: dict[str, list[str]] = defaultdict(list)
        for seq, row in rows:
            by_lot[row.lot].append(seq)
            names[row.lot].append(row.result or "")
        for lot, seqs in by_lot.items():
            ahead = self._ahead.get(lot, {})
            new = [name for name in names[lot] if ahead.get(name) != _mtime_ns(self._results_dir / lot / name)]
            if lot in self._half_done or (records := self._read(lot, new)) is None:
                self._rows.write_anew(lot)
                continue
            self._half_done.add(lot)
            n_bytes = lot_table.append(self._results_dir / lot, records) if new else 0
            if n_bytes is None:
                self._rows.write_anew(lot)
            else:
                self._rows.mark_listed(seqs)
                grown, _ = self._grown.get(lot, (0, 0.0))
                self._grown[lot] = grown + n_bytes, time.monotonic()
            self._half_done.discard(lot)

    def _read(self, lot: str, names: Sequence[str]) -> list[ReviewRecord] | None:
        """Read results of a lot; None where one is gone or broken meanwhile."""
        try:
            return [results.read(self._results_dir / lot / name) for name in names]
        except ImageError as error:
            log.warning("the table of %s is written anew: %s", lot, error)
            return None

    def _find_quiet(self, now: float) -> None:
        for lot, (grown, last) in self._grown.items():
            if now - last >= QUIET_S:
                self._grown[lot] = grown, math.inf
                if grown * _SHARE >= lot_table.size(self._results_dir / lot):
                    self._rows.write_anew(lot)

    def _write_changed(self, slice_s: float) -> None:
        start = time.monotonic()
        for lot, seq in self._rows.changed():
            self._write_anew(lot, seq)
            if time.monotonic() - start >= slice_s:
                break
        end = time.monotonic()
        self._next_anew = end + (_SHARE - 1) * (end - start)

    def _write_anew(self, lot: str, seq: int) -> None:
        folder = self._results_dir / lot
        written = lot_table.write(folder) if folder.is_dir() else []  # a person may have moved the lot away
        oldest_ns = time.time_ns() - FRESH_NS
        self._ahead[lot] = {path.name: mtime for path in written if (mtime := _mtime_ns(path)) > oldest_ns}
        self._rows.mark_written(lot, seq)
        self._grown.pop(lot, None)
        self._half_done.discard(lot)


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
