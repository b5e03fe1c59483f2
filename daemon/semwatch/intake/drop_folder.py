"""Drop folders to arrivals: which file is complete and not yet done. Folders are read, never written.

Events of the file system are a hint; scans are the truth. One runs at start, on a period, after hints were dropped, and
after a folder came back, so whatever the kernel or the share loses is found later (``folder_scan`` says what a scan
passes over). No scan takes more than a tenth of the time. ``start`` moves all this into a thread of its own: files are
found and counted whatever the line does, and no folder, however large, holds it up.

Rules. Symbolic links are not followed. Temporary names are not seen. One path is in one worker's hands at a time.
Oldest mtime first over all folders: a new lot waits behind the backlog, and nothing waits for ever. A file that comes
back unsettled waits 1, 2, 4 ... 30 s, and no other file waits for it. What does not fit the limit waits in the folder,
which is the buffer.
"""

import logging
import math
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from os import stat_result
from pathlib import Path
from typing import Self

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.intake.folder_rules import Folder, complete_at, is_image, is_temporary, marked_by, status_of, walk
from semwatch.intake.folder_scan import FolderScan, Found
from semwatch.intake.waiting import Waiting, backoff_s, by_folder
from semwatch.intake.watch import Watch
from semwatch.system.files import Stamp

log = logging.getLogger(__name__)

_FILES_A_LOOK = 500
SCAN_SHARE = 10
"""Scans take no more than this part of the time, full ones no more than half of it."""
RETRY_S = 1.0
"""The thread's pause after the ledger could not be asked."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One file that is probably complete; give it to ``Incoming.release`` when it is settled or given back."""

    source: str
    path: str
    """POSIX, relative to the drop folder; bytes that are not UTF-8 stand as surrogates (``os.fsencode``)."""
    file: Path
    stamp: Stamp

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stamp.size


class Incoming:
    """The watched folders. ``arrivals`` belongs to one thread; the other methods may be called from any.

    ``settled(source, files)`` is the ledger's word: which paths, of files given with their stamps, are done. A folder
    need not exist yet. A dead network mount that blocks system calls blocks the thread that looks: mount shares
    ``soft``.

    Raises: ConfigError when two folders have one source.
    """

    def __init__(
        self,
        folders: Sequence[Folder],
        settled: Callable[[str, Sequence[tuple[str, Stamp]]], set[str]],
        *,
        reconcile_s: float,
        poll_s: float,
        backoff_s: float = 1.0,
        backoff_max_s: float = 30.0,
        n_hints: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len({folder.source for folder in folders}) != len(folders):
            raise ConfigError("two drop folders have the same source; give every folder a source of its own")
        self._settled = settled
        self._reconcile_s, self._poll_s = reconcile_s, poll_s
        self._backoff_s, self._backoff_max_s = backoff_s, backoff_max_s
        self._clock = clock
        self._hints: queue.Queue[tuple[Watch, str] | None] = queue.Queue(n_hints)
        self._watches = {folder.source: Watch(folder, self._hints) for folder in folders}
        self._scans = {folder.source: self._scan_of(folder) for folder in folders}
        self._waiting = Waiting()
        self._closed = threading.Event()
        self._news = threading.Event()
        """Set where a file may be ready; for ``arrivals`` beside the thread."""
        self._thread: threading.Thread | None = None

    def _scan_of(self, folder: Folder) -> FolderScan:
        return FolderScan(
            folder.path,
            is_image=lambda name: is_image(folder, name),
            is_temporary=is_temporary,
            recursive=folder.recursive,
            take=lambda found: self._look_unless_closed(folder, found),
            clock=self._clock,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Look at the folders in a thread from now on; without it, ``arrivals`` looks."""
        self._thread = threading.Thread(target=self._look_on, name="intake", daemon=True)
        self._thread.start()

    def arrivals(self, timeout_s: float, limit: int = 1) -> list[Arrival]:
        """Wait until files are complete, at most ``timeout_s``; return up to ``limit`` of them, oldest first.

        Raises: ServiceUnavailable when the ledger cannot be asked; nothing is lost, call again.
        """
        deadline = self._clock() + timeout_s
        wait_s = 0.0
        while not self._closed.is_set():
            if self._thread is None:
                self._look_around(wait_s)
            elif wait_s > 0:
                self._news.wait(wait_s)
            self._news.clear()
            arrivals = self._hand_out(limit)
            left_s = deadline - self._clock()
            if arrivals or left_s <= 0:
                return arrivals
            wait_s = min(left_s, self._idle_s())
        self._stop_observers()  # one may have been started while close went by
        return []

    def release(self, arrival: Arrival) -> None:
        """Take a file back: settled in the ledger it is forgotten, otherwise it comes again after its back-off."""
        try:
            settled = self._settled(arrival.source, [(arrival.path, arrival.stamp)])
        except ServiceUnavailable:
            settled = set()
        key, now = (arrival.source, arrival.path), self._clock()
        with self._waiting.lock:
            file = self._waiting.get(key)
            if file is None or not file.in_flight:
                return
            if arrival.path in settled:
                self._waiting.drop([key], in_flight=True)
            else:
                file.n_setbacks += 1
                file.failing_since = now if file.failing_since is None else file.failing_since
                wait_s = backoff_s(file.n_setbacks, self._backoff_s, self._backoff_max_s)
                self._waiting.reschedule(key, not_before=now + wait_s)
        self.look_at(*key)  # it may have been replaced meanwhile

    def failing_s(self, arrival: Arrival) -> float:
        """Seconds since a file that is as it was came back unsettled for the first time; 0 where it never did."""
        with self._waiting.lock:
            file = self._waiting.get((arrival.source, arrival.path))
            return 0.0 if file is None or file.failing_since is None else self._clock() - file.failing_since

    def hold(self, source: str, seconds: float) -> None:
        """Hand out nothing of one folder for a while: it is away. The others go on."""
        self._waiting.hold(source, self._clock() + seconds)

    def try_now(self, source: str) -> None:
        """Let the files of a source that came back unsettled come again at once: what they waited for is there."""
        with self._waiting.lock:
            for path in self._waiting.paths(source):
                file = self._waiting.get((source, path))
                if file is not None and not file.in_flight and file.n_setbacks:
                    self._waiting.reschedule((source, path), not_before=0.0)
        self._news.set()

    def look_at(self, source: str, path: str) -> None:
        """Ask for a look at one path."""
        self._watches[source].hint(path)

    def look_anew(self) -> None:
        """Ask for a scan of everything: what was settled may not be any more."""
        for watch in self._watches.values():
            watch.is_scan_wanted = True
        with suppress(queue.Full):
            self._hints.put_nowait(None)

    def waiting(self) -> tuple[int, float]:
        """Return how many unsettled files wait, and for how many seconds the oldest, in flight or not, is known."""
        return self._waiting.count(self._clock())

    def unsettled(self, source: str) -> list[str]:
        """Paths of a source's files that wait or are in flight."""
        return self._waiting.paths(source)

    def close(self) -> None:
        """Let ``arrivals`` return, then stop thread and observers. Files in flight may still be released."""
        self._closed.set()
        self._news.set()
        with suppress(queue.Full):  # a full queue keeps arrivals awake as well
            self._hints.put_nowait(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10.0)
        self._stop_observers()

    def _stop_observers(self) -> None:
        for watch in self._watches.values():
            watch.stop()

    # --- hints and scans -------------------------------------------------------------------------------------------

    def _look_on(self) -> None:
        """Look around until closed; no folder and no fault ends it."""
        is_away = False
        while not self._closed.is_set():
            try:
                self._look_around(self._until_check_s())
            except ServiceUnavailable as error:
                if not is_away and not self._closed.is_set():
                    log.warning("drop folders are looked at again once the ledger can be asked: %s", error)
                is_away = True
                self._closed.wait(RETRY_S)
            else:
                is_away = False

    def _look_around(self, wait_s: float) -> None:
        """Look at everything the hints name, waiting for the first of them, then at the folders that are due."""
        try:
            hint = self._hints.get(timeout=wait_s)
            for _ in range(self._hints.maxsize):
                if hint is not None:
                    self._safely(self._follow, *hint)
                hint = self._hints.get_nowait()
        except queue.Empty:
            pass
        for watch in self._watches.values():
            if not self._closed.is_set():
                self._safely(self._supervise, watch)

    def _safely(self, work: Callable[..., None], watch: Watch, *more: str) -> None:
        """Whatever lies in a folder, it holds up no other folder, and this one for no longer than a period."""
        try:
            work(watch, *more)
        except ServiceUnavailable:
            raise
        except Exception:
            log.exception("drop folder %s of %s: this is a bug", watch.folder.path, watch.folder.source)
            watch.check_at = self._clock() + self._reconcile_s

    def _follow(self, watch: Watch, path: str) -> None:
        folder = watch.folder
        if any(is_temporary(part) for part in path.split("/")):
            return
        for named in (path, *marked_by(folder, path)):
            status = status_of(folder, named)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode) and folder.recursive:
                self._look_at_all(folder, walk(folder, named))
            elif stat.S_ISREG(status.st_mode) and is_image(folder, named):
                self._look(folder, [(named, status)])

    def _supervise(self, watch: Watch) -> None:
        """Check a folder that is due: is it there, is its observer alive, is a scan due."""
        now = self._clock()
        if now < watch.check_at and not watch.is_scan_wanted:
            return
        watch.check_at = now + self._poll_s
        if watch.revive(now, self._reconcile_s) and (watch.is_scan_wanted or now >= watch.scan_at):
            self._scan(watch)
        if watch.is_missing:
            source = watch.folder.source
            self._scans[source].forget()
            self._waiting.drop((source, path) for path in self._waiting.paths(source))

    def _scan(self, watch: Watch) -> None:
        began, scans = self._clock(), self._scans[watch.folder.source]
        is_full = watch.is_scan_wanted or began >= watch.full_scan_at
        watch.is_scan_wanted = False  # before the scan: what is dropped while it runs asks for the next one
        if is_full:
            scans.forget()
        try:
            scan = scans.run()
        except OSError as error:
            watch.lose(error)
            return
        watch.warn_of(scan.unreadable)
        self._forget_vanished(watch.folder.source, scan.listed)
        now = self._clock()
        rest_s = (now - began) * SCAN_SHARE
        watch.scan_at = now + max(self._reconcile_s if watch.is_observed else self._poll_s, rest_s)
        if is_full:
            watch.full_scan_at = now + max(self._reconcile_s, 2 * rest_s)

    def _forget_vanished(self, source: str, listed: dict[str, set[str] | None]) -> None:
        """Forget files that a listing of their folder did not show, and those of folders that are gone."""
        rules = self._watches[source].folder
        for folder, paths in by_folder(self._waiting.paths(source)).items():
            if folder in listed:
                there = listed[folder] or set()
                # One that was settled once, and was written anew in place, is passed over by a listing.
                missing = [path for path in paths if path not in there and status_of(rules, path) is None]
                self._waiting.drop((source, path) for path in missing)

    def _look_at_all(self, folder: Folder, found: Iterator[tuple[str, stat_result]]) -> None:
        """Take note of what a walk finds, the ledger asked once for many."""
        while files := list(islice(found, _FILES_A_LOOK)):
            self._look(folder, files)

    def _look(self, folder: Folder, files: Found, *, is_last: bool = False) -> set[str]:
        """Take note of image files: new, changed, or as they were; return the paths of those that are settled.

        The ledger is not asked about a file that waits as it was, except at the last look before it is handed out.
        """
        now, source = self._clock(), folder.source
        stamps = {path: folder.stamp(status) for path, status in files}
        is_same = {path: self._is_as_it_was(folder, path, status, stamps[path], now) for path, status in files}
        asked = [path for path in stamps if is_last or not is_same[path]]
        if not asked:
            return set()
        try:
            settled = self._settled(source, [(path, stamps[path]) for path in asked])
        except ServiceUnavailable:
            self._watches[source].is_scan_wanted = True  # this hint, or the rest of this scan, is gone
            raise
        self._waiting.drop((source, path) for path in settled)
        for path, status in files:
            if path not in settled and not is_same[path]:
                due_at = complete_at(folder, path, status, now)
                self._waiting.put((source, path), stamps[path], due_at=due_at, now=now)
        self._news.set()
        return settled

    def _look_unless_closed(self, folder: Folder, found: Found) -> set[str]:
        """Look, as a scan does, which may take long: closing does not wait for its end."""
        if self._closed.is_set():
            raise ServiceUnavailable("the drop folders are closed")
        return self._look(folder, found)

    def _is_as_it_was(self, folder: Folder, path: str, status: stat_result, stamp: Stamp, now: float) -> bool:
        """Say whether a file waits already, as it is; one in flight is looked at again when it is released."""
        key = folder.source, path
        with self._waiting.lock:
            file = self._waiting.get(key)
            if file is None or file.in_flight:
                return file is not None
            if file.stamp != stamp:
                return False
        due_at = complete_at(folder, path, status, now)
        with self._waiting.lock:
            if self._waiting.get(key) is file and due_at < file.due_at:
                self._waiting.reschedule(key, due_at=due_at)
        return True

    # --- handing out -----------------------------------------------------------------------------------------------

    def _hand_out(self, limit: int) -> list[Arrival]:
        """Give out the oldest complete files, after one last look at each."""
        keys = self._waiting.next(self._clock(), limit)
        try:
            for source, path in keys:
                self._look_again(source, path)  # may raise, so nothing is in flight before all have been looked at
        except BaseException:
            for key in keys:
                with self._waiting.lock:
                    if self._waiting.get(key) is not None:
                        self._waiting.reschedule(key)
            raise
        now = self._clock()
        found = [(key, self._waiting.take(key, now)) for key in keys]
        return [
            Arrival(source, path, self._watches[source].folder.path / path, file.stamp)
            for (source, path), file in found
            if file is not None
        ]

    def _look_again(self, source: str, path: str) -> None:
        folder = self._watches[source].folder
        status = status_of(folder, path)
        if status is not None and stat.S_ISREG(status.st_mode):
            self._look(folder, [(path, status)], is_last=True)
        else:
            self._waiting.drop([(source, path)])

    def _idle_s(self) -> float:
        """Seconds until there is something to do without news."""
        now = self._clock()
        next_file = self._waiting.next_at(now) - now
        return max(0.0, next_file if self._thread is not None else min(next_file, self._until_check_s()))

    def _until_check_s(self) -> float:
        next_check = min((watch.check_at for watch in self._watches.values()), default=math.inf)
        is_wanted = any(watch.is_scan_wanted for watch in self._watches.values())
        return 0.0 if is_wanted else max(0.0, min(next_check - self._clock(), 3600.0))
