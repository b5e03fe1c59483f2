"""Duplicates get a note beside the results and a row in the table of their lot, once the original is finished.

The ledger remembers whose note is still to be written; the note is on disk before the ledger forgets it.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from semwatch.errors import SemwatchError
from semwatch.service import faults
from semwatch.service.lot_tables import row_of
from semwatch.store import results
from semwatch.store.ledger import Ledger, OutboxItem, Work
from semwatch.store.review_record import printable
from semwatch.system.clock import utc_now

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
RETRY_S = 30.0
"""Until the next try while the results are away."""
FILES_A_STEP = 5


class Duplicates:
    """The notes that are to be written; for the one thread of the loop.

    Args:
        ledger: that remembers them.
        results_dir: folder of the results.
        messages_of: what leaves for Redis with one, given when it was noted.
    """

    def __init__(self, ledger: Ledger, results_dir: Path, messages_of: Callable[[Work, str], list[OutboxItem]]) -> None:
        self._ledger, self._results_dir, self._messages_of = ledger, results_dir, messages_of
        self._next = 0.0

    def step(self) -> None:
        """Write the next few notes; results that are away are waited for.

        Raises:
            ServiceUnavailable: the disk under the ledger refused; call it again.
        """
        if time.monotonic() < self._next:
            return
        found = self._ledger.duplicates(FILES_A_STEP)
        if len(found) < FILES_A_STEP:
            self._next = time.monotonic() + INTERVAL_S
        for work in found:
            self._note(work)

    def _note(self, work: Work) -> None:
        now_utc, row = utc_now(), None
        try:
            faults.check_results(self._results_dir)
            path, is_new = results.write_duplicate(
                results_dir=self._results_dir,
                source=work.source,
                path=work.path,
                sha256=work.sha256,
                original=work.reason or "",
                is_refused=work.state == "QUARANTINED",
                noted_utc=now_utc,
            )
            row = row_of(path, self._results_dir, is_new=is_new)
        except (SemwatchError, OSError, RuntimeError) as error:
            if faults.scope_of(error, folder=self._results_dir, results_dir=self._results_dir) == "service":
                self._next = time.monotonic() + RETRY_S
                return
            # Its place is taken, or leads elsewhere.
            log.warning("%s/%s: its note is not beside the results: %s", work.source, printable(work.path), error)
        self._ledger.duplicate_noted(work.source, work.path, row=row, outbox=self._messages_of(work, now_utc))
