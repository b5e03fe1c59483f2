"""A second look at files that were young when they were reviewed: their content is compared once more.

A copy that keeps size and times while its content still comes, or a write that no time tells of, shows in nothing but
the content. So a file that was read within its first minutes is hashed again some minutes later, once. Where the
content is another one, the file is new work.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from semwatch.intake.drop_folder import Incoming
from semwatch.store.ledger import Ledger
from semwatch.store.review_record import printable
from semwatch.system.clock import utc_now, utc_of
from semwatch.system.files import Stamp, file_sha256
from semwatch.system.journal import about

log = logging.getLogger(__name__)

YOUNG_S = 300.0
"""A file that changed within so many seconds before it was read is young."""
LATER_S = 300.0
"""Seconds until the second look."""


def look_again_utc(stamp: Stamp, now: datetime | None = None) -> str | None:
    """When a file that is read now is to be compared; None for one that is no longer young."""
    now = now or datetime.now(UTC)
    changed_ns = max(stamp.mtime_ns, stamp.ctime_ns or 0)
    is_young = changed_ns > (now - timedelta(seconds=YOUNG_S)).timestamp() * 1e9
    return utc_of(now + timedelta(seconds=LATER_S)) if is_young else None


class LateLook:
    """Looks, one file at a time, in a thread of its own; ``step`` belongs to the loop.

    Args:
        ledger: says what is due.
        folders: drop folder by source.
        incoming: where files that hold something else are put again.
    """

    def __init__(self, ledger: Ledger, folders: Mapping[str, Path], incoming: Incoming) -> None:
        self._ledger, self._folders, self._incoming = ledger, folders, incoming
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="late-look")
        self._looking: tuple[Future[str | None], str, str] | None = None
        self._wanted_sha256 = ""

    def close(self) -> None:
        """Leave what is looked at; it is due again at the next start."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self) -> None:
        """Take the answer of the last look, and begin the next one.

        Raises:
            ServiceUnavailable: the disk under the ledger refused; call it again.
        """
        if self._looking is not None:
            future, source, path = self._looking
            if not future.done():
                return
            self._looking = None
            self._judge(future, source, path)
        for source, path, sha256 in self._ledger.to_look_at_again(utc_now(), 1):
            folder = self._folders.get(source)
            if folder is None:
                self._ledger.looked_at_again(source, path)
            else:
                self._wanted_sha256 = sha256
                self._looking = self._pool.submit(_content_of, folder / path, folder), source, path

    def _judge(self, future: Future[str | None], source: str, path: str) -> None:
        if future.exception() is not None:  # it cannot be read now
            later = utc_of(datetime.now(UTC) + timedelta(seconds=LATER_S))
            self._ledger.looked_at_again(source, path, next_utc=later)
            return
        found = future.result()
        if found is None or found == self._wanted_sha256:
            self._ledger.looked_at_again(source, path)
            return
        self._ledger.doubt(source, path)
        log.warning(
            "%s/%s holds other content than was reviewed, under the same name: it is reviewed again",
            source,
            printable(path),
            extra=about("content changed", source, path),
        )
        self._incoming.look_at(source, path)


def _content_of(file: Path, folder: Path) -> str | None:
    """Hash of a file in a drop folder; None where it is gone.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        return file_sha256(file, below=folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
