"""What left its drop folder long ago leaves the ledger: a round a day, a few files at a time between two beats.

A file that still lies in its folder is never forgotten, or it would be reviewed again. So each round notes what it
finds there, and only what no round has found for ``keep_days`` goes. A folder that is missing or empty proves nothing,
for it may be a share that is not mounted; nor does a source that the settings do not name now.
"""

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from semwatch.errors import ServiceUnavailable
from semwatch.store.ledger import Ledger
from semwatch.store.manifests import kept_copy
from semwatch.system.clock import utc_of

log = logging.getLogger(__name__)

ROUND_S = 86_400.0
RETRY_S = 600.0
FILES_A_STEP = 100


class Forgetting:
    """The rounds; for the one thread of the loop.

    Args:
        ledger: that forgets.
        folders: drop folder by source.
        keep_days: since a file was last found in its folder.
        reread_days: how far back unknowns are judged again; what was noted of them is kept as long at least.
        now: the time, aware; for tests.
    """

    def __init__(
        self,
        ledger: Ledger,
        folders: Mapping[str, Path],
        *,
        keep_days: float,
        reread_days: float,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._ledger, self._folders, self._keep, self._now = ledger, folders, timedelta(days=keep_days), now
        self._keep_notes = timedelta(days=max(keep_days, reread_days))
        self._next = 0.0
        self._after = ("", "")
        self._n_forgotten = 0

    def step(self) -> None:
        """Look after the next few files of a round that is due; a disk that refuses is a warning, and tried later."""
        if time.monotonic() < self._next:
            return
        try:
            self._step(self._now())
        except ServiceUnavailable as error:
            log.warning("nothing is forgotten for %.0f s: %s", RETRY_S, error)
            self._next = time.monotonic() + RETRY_S

    def _step(self, now: datetime) -> None:
        forgotten_utc, now_utc = utc_of(now - self._keep), utc_of(now)
        # Half-way, so that one round in keep_days / 2 writes, and a file has been found at most that long ago.
        page = self._ledger.paths_seen_before(utc_of(now - self._keep / 2), after=self._after, limit=FILES_A_STEP)
        there = {(source, path) for source, path, _ in page if self._is_there(source, path)}
        telling = {source for source in {source for source, _, _ in page} if self._is_telling(source)}
        gone = [
            (source, path)
            for source, path, seen_utc in page
            if seen_utc < forgotten_utc and source in telling and (source, path) not in there
        ]
        if there:
            self._ledger.still_there(sorted(there), now_utc=now_utc)
        if gone:
            self._n_forgotten += self._ledger.forget_paths(gone, seen_before_utc=forgotten_utc)
        if page:
            self._after = page[-1][:2]
        else:
            self._end_round(now, forgotten_utc)

    def _end_round(self, now: datetime, forgotten_utc: str) -> None:
        n_work = self._ledger.forget_work(forgotten_utc)
        n_notes = self._ledger.forget_notes(utc_of(now - self._keep_notes))
        for sha256 in self._ledger.manifests.forget(forgotten_utc):
            kept_copy(self._ledger.path.parent, sha256).unlink(missing_ok=True)
        if self._n_forgotten or n_work or n_notes:
            log.info("forgotten: %d paths, %d images, %d notes", self._n_forgotten, n_work, n_notes)
        self._next = time.monotonic() + ROUND_S
        self._after, self._n_forgotten = ("", ""), 0

    def _is_there(self, source: str, path: str) -> bool:
        """False only where the file is gone for certain, short of its folder being away."""
        folder = self._folders.get(source)
        if folder is None:
            return False
        try:
            (folder / path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # cannot be looked at now
        return True

    def _is_telling(self, source: str) -> bool:
        """Whether a file that is absent from the folder of this source is gone."""
        folder = self._folders.get(source)
        try:
            return folder is not None and any(folder.iterdir())
        except OSError:
            return False
