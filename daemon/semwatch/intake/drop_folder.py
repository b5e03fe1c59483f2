"""Drop folders to arrivals: which file is complete and not yet done. Folders are read, never written.

Events of the file system are a hint; the reconcile scan is the truth. It runs at start, on a period, after hints were
dropped, and after a folder came back, so whatever the kernel or the share loses is found one period later.

Rules. Symbolic links are not followed. Temporary names are not seen. One path is in one worker's hands at a time.
Oldest mtime first over all folders: a new lot waits behind the backlog, and nothing waits for ever. A file that comes
back unsettled waits 1, 2, 4 ... 30 s. What does not fit the limit waits in the folder, which is the buffer.
"""

import heapq
import logging
import math
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from semwatch.errors import ConfigError, ServiceUnavailable

log = logging.getLogger(__name__)

Completeness = Literal["rename", "marker", "steady"]

_FILES_A_LOOK = 500
TEMPORARY_SUFFIXES = (".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", "~")
_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent]


@dataclass(frozen=True, slots=True)
class Folder:
    """One drop folder and the convention of the tool that writes it; the settings say it."""

    path: Path
    source: str
    """Name of the tool, unique."""
    completeness: Completeness
    """``rename``: complete as soon as it has its final name. ``marker``: once a marker lies beside it, ``x.tif.done``
    or ``x.done``, not older than the file (an older one may belong to what lay there before: then steady as well).
    ``steady``: size and mtime are the same in two looks ``steady_s`` apart."""
    steady_s: float
    marker_suffixes: tuple[str, ...]
    recursive: bool
    polling: bool
    """Scan every ``poll_s`` and expect no events: for network shares, which send none."""
    suffixes: tuple[str, ...]
    """Lower case; names are compared without regard to case."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One file that is probably complete; give it to ``Incoming.release`` when it is settled or given back."""

    source: str
    path: str
    """POSIX, relative to the drop folder; bytes that are not UTF-8 stand as surrogates (``os.fsencode``)."""
    file: Path
    size: int
    mtime_ns: int


@dataclass(slots=True)
class _File:
    """A file that is not settled. Times are of the monotonic clock."""

    size: int
    mtime_ns: int
    first_seen: float
    due_at: float
    """When it counts as complete; inf while its marker is missing."""
    n_setbacks: int = 0
    not_before: float = 0.0
    in_flight: bool = False


class Incoming:
    """The watched folders. ``arrivals`` belongs to one thread; the other methods may be called from any.

    ``settled(source, files)`` is the ledger's word: which paths, of files given as (path, size, mtime_ns), are done. A
    folder need not exist yet. A dead network mount that blocks system calls blocks ``arrivals`` with it: mount shares
    ``soft``.

    Raises: ConfigError when two folders have one source.
    """

    def __init__(
        self,
        folders: Sequence[Folder],
        settled: Callable[[str, Sequence[tuple[str, int, int]]], set[str]],
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
        self._hints: queue.Queue[tuple[_Watch, str] | None] = queue.Queue(n_hints)
        self._watches = {folder.source: _Watch(folder, self._hints) for folder in folders}
        self._files: dict[tuple[str, str], _File] = {}
        self._lock = threading.Lock()
        """Over the entries of ``_files``; never held while the disk is asked."""
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arrivals(self, timeout_s: float, limit: int = 1) -> list[Arrival]:
        """Wait until files are complete, at most ``timeout_s``; return up to ``limit`` of them, oldest first.

        Raises: ServiceUnavailable when the ledger cannot be asked; nothing is lost, call again.
        """
        deadline = self._clock() + timeout_s
        wait_s = 0.0
        while not self._closed.is_set():
            self._follow_hints(wait_s)
            self._supervise()
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
            settled = self._settled(arrival.source, [(arrival.path, arrival.size, arrival.mtime_ns)])
        except ServiceUnavailable:
            settled = set()
        key = (arrival.source, arrival.path)
        with self._lock:
            file = self._files.get(key)
            if file is None or not file.in_flight:
                return
            if arrival.path in settled:
                del self._files[key]
            else:
                file.in_flight = False
                file.n_setbacks += 1
                file.not_before = self._clock() + self._setback_s(file.n_setbacks)
        self._watches[arrival.source].hint(arrival.path)  # it may have been replaced meanwhile

    def waiting(self) -> tuple[int, float]:
        """Return how many unsettled files wait, and for how many seconds the oldest has been known to."""
        with self._lock:
            seen = [file.first_seen for file in self._files.values() if not file.in_flight]
        return len(seen), self._clock() - min(seen) if seen else 0.0

    def close(self) -> None:
        """Let ``arrivals`` return, then stop the observers. Files in flight may still be released."""
        self._closed.set()
        with suppress(queue.Full):  # a full queue keeps arrivals awake as well
            self._hints.put_nowait(None)
        self._stop_observers()

    def _stop_observers(self) -> None:
        for watch in self._watches.values():
            watch.stop()

    # --- hints and scans -------------------------------------------------------------------------------------------

    def _follow_hints(self, wait_s: float) -> None:
        """Look at everything the hints name; wait for the first of them."""
        try:
            hint = self._hints.get(timeout=wait_s)
            for _ in range(self._hints.maxsize):
                if hint is not None:
                    self._follow(*hint)
                hint = self._hints.get_nowait()
        except queue.Empty:
            pass

    def _follow(self, watch: "_Watch", path: str) -> None:
        folder = watch.folder
        if any(is_temporary(part) for part in path.split("/")):
            return
        for named in (path, *_marked_by(folder, path)):
            status = _status(folder, named)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode) and folder.recursive:
                self._look_at_all(folder, walk(folder, named))
            elif stat.S_ISREG(status.st_mode) and _is_image(folder, named):
                self._look(folder, [(named, status)])

    def _supervise(self) -> None:
        """Check every folder that is due: is it there, is its observer alive, is a scan due."""
        for watch in self._watches.values():
            now = self._clock()
            if now < watch.check_at and not watch.is_scan_wanted:
                continue
            watch.check_at = now + self._poll_s
            if watch.revive(now, self._reconcile_s) and (watch.is_scan_wanted or now >= watch.scan_at):
                self._scan(watch)
                watch.scan_at = now + (self._reconcile_s if watch.is_observed else self._poll_s)
            if watch.is_missing:
                self._forget_vanished(watch.folder.source, set())

    def _scan(self, watch: "_Watch") -> None:
        watch.is_scan_wanted = False  # before the scan: what is dropped while it runs asks for the next one
        unreadable: set[str] = set()
        try:
            seen = self._look_at_all(watch.folder, walk(watch.folder, "", unreadable))
        except OSError as error:
            watch.lose(error)
            return
        watch.warn_of(unreadable)
        self._forget_vanished(watch.folder.source, seen)

    def _forget_vanished(self, source: str, seen: set[str]) -> None:
        with self._lock:
            for key in [key for key in self._files if key[0] == source and key[1] not in seen]:
                if not self._files[key].in_flight:
                    del self._files[key]

    def _look_at_all(self, folder: Folder, found: Iterator[tuple[str, os.stat_result]]) -> set[str]:
        """Take note of what a walk finds, the ledger asked once for many; return the paths."""
        seen: set[str] = set()
        while files := list(islice(found, _FILES_A_LOOK)):
            seen.update(path for path, _ in files)
            self._look(folder, files)
        return seen

    def _look(self, folder: Folder, files: Sequence[tuple[str, os.stat_result]]) -> None:
        """Take note of image files: new, changed, or as they were."""
        now = self._clock()
        others = [(path, status) for path, status in files if not self._is_as_it_was(folder, path, status, now)]
        if not others:
            return
        try:
            settled = self._settled(folder.source, [(path, s.st_size, s.st_mtime_ns) for path, s in others])
        except ServiceUnavailable:
            self._watches[folder.source].is_scan_wanted = True  # this hint, or the rest of this scan, is gone
            raise
        due = {path: _complete_at(folder, path, status, now) for path, status in others if path not in settled}
        with self._lock:
            for path, status in others:
                before = self._files.pop((folder.source, path), None)
                if path in due:
                    first_seen = now if before is None else before.first_seen
                    self._files[folder.source, path] = _File(status.st_size, status.st_mtime_ns, first_seen, due[path])

    def _is_as_it_was(self, folder: Folder, path: str, status: os.stat_result, now: float) -> bool:
        """Say whether the ledger need not be asked: a file in flight is looked at again when it is released."""
        with self._lock:
            file = self._files.get((folder.source, path))
        if file is None or file.in_flight:
            return file is not None
        if (file.size, file.mtime_ns) != (status.st_size, status.st_mtime_ns):
            return False
        file.due_at = min(file.due_at, _complete_at(folder, path, status, now))
        return True

    # --- handing out -----------------------------------------------------------------------------------------------

    def _hand_out(self, limit: int) -> list[Arrival]:
        """Give out the oldest complete files, after one last look at each."""
        now = self._clock()
        with self._lock:
            ready = [(file.mtime_ns, key) for key, file in self._files.items() if _ready_at(file) <= now]
        keys = [key for _, key in heapq.nsmallest(limit, ready)]
        for source, path in keys:
            self._look_again(source, path)  # may raise, so nothing is marked in flight before all have been looked at
        with self._lock:
            return [self._mark_in_flight(*key) for key in keys if self._is_ready(key)]

    def _look_again(self, source: str, path: str) -> None:
        folder = self._watches[source].folder
        status = _status(folder, path)
        if status is not None and stat.S_ISREG(status.st_mode):
            self._look(folder, [(path, status)])
        else:
            with self._lock:
                self._files.pop((source, path), None)

    def _is_ready(self, key: tuple[str, str]) -> bool:
        return key in self._files and _ready_at(self._files[key]) <= self._clock()

    def _mark_in_flight(self, source: str, path: str) -> Arrival:
        file = self._files[source, path]
        file.in_flight = True
        return Arrival(source, path, self._watches[source].folder.path / path, file.size, file.mtime_ns)

    def _idle_s(self) -> float:
        """Seconds until there is something to do without a hint."""
        with self._lock:
            next_file = min(map(_ready_at, self._files.values()), default=math.inf)
        next_check = min((watch.check_at for watch in self._watches.values()), default=math.inf)
        return max(0.0, min(next_file, next_check) - self._clock())

    def _setback_s(self, n_setbacks: int) -> float:
        return min(self._backoff_max_s, self._backoff_s * 2.0 ** min(n_setbacks - 1, 30))


class _Watch(FileSystemEventHandler):
    """One folder with its observer, which is made anew whenever it died or the folder is another one than it was."""

    def __init__(self, folder: Folder, hints: "queue.Queue[tuple[_Watch, str] | None]") -> None:
        self.folder = folder
        self.is_missing = False
        self.is_scan_wanted = True
        self.check_at = self.scan_at = -math.inf
        self._hints = hints
        self._observer: InotifyObserver | None = None
        self._observe_at = -math.inf
        self._identity: tuple[int, int] | None = None
        self._root = ""
        self._warned: set[str] = set()

    @property
    def is_observed(self) -> bool:
        """Events come in."""
        observer = self._observer
        if observer is None or not observer.emitters:
            return False
        threads: list[threading.Thread] = [observer, *observer.emitters]
        reader = getattr(observer, "_inotify_fd", None)  # since watchdog 7: one more thread that can die
        if isinstance(reader, threading.Thread):
            threads.append(reader)
        return all(thread.is_alive() for thread in threads)

    def hint(self, path: str) -> None:
        """Ask for a look at one path; where the queue is full, for a scan."""
        try:
            self._hints.put_nowait((self, path))
        except queue.Full:
            self.is_scan_wanted = True

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Turn the event into a hint on the path that is new; runs in the observer's thread."""
        path = os.fsdecode(event.dest_path or event.src_path)
        if path.startswith(f"{self._root}/"):
            self.hint(path[len(self._root) + 1 :])

    def revive(self, now: float, retry_s: float) -> bool:
        """Make sure of folder and observer; False where the folder is missing."""
        try:
            status = self.folder.path.stat()
            os.scandir(self.folder.path).close()
        except OSError as error:
            self.lose(error)
            return False
        identity = (status.st_dev, status.st_ino)
        if self.is_missing:
            log.warning("drop folder %s of %s is back", self.folder.path, self.folder.source)
        changed = self.is_missing or identity != self._identity
        self.is_missing, self._identity = False, identity
        if changed:
            self.stop()
            self._observe_at, self.is_scan_wanted = -math.inf, True
        if not self.folder.polling and not self.is_observed and now >= self._observe_at:
            if self._observer is not None:
                log.warning("the observer of drop folder %s died and is started anew", self.folder.path)
            self._observe_at = now if self._observe() else now + retry_s
            self.is_scan_wanted = True  # after the watch is set, so that nothing falls in between
        return True

    def lose(self, error: OSError) -> None:
        """Note that the folder is missing, once."""
        if not self.is_missing:
            log.warning("drop folder %s of %s is missing: %s", self.folder.path, self.folder.source, error)
        self.is_missing = True
        self.stop()

    def warn_of(self, unreadable: set[str]) -> None:
        """Name directories that could not be read, each once until it can be."""
        for path in sorted(unreadable - self._warned):
            log.warning("drop folder of %s: %r cannot be read, its files wait", self.folder.source, path)
        self._warned = unreadable

    def stop(self) -> None:
        """Stop the observer and wait for it."""
        observer, self._observer = self._observer, None
        if observer is not None:
            with suppress(OSError):  # its watches may have gone with the folder
                observer.stop()
            if observer.is_alive():
                observer.join(timeout=10.0)

    def _observe(self) -> bool:
        """Start an observer. Without one (inotify limits) the folder is scanned every ``poll_s`` until the next try."""
        self.stop()
        self._root = os.path.realpath(self.folder.path)  # inotify would watch a link, not what it names
        try:
            # Full events: a file moved in from elsewhere comes as "moved", not as "created", which says nothing.
            self._observer = InotifyObserver(generate_full_events=True)
            self._observer.schedule(self, self._root, recursive=self.folder.recursive, event_filter=_EVENTS)
            self._observer.start()
        except OSError as error:
            log.warning("drop folder %s sends no events (%s), it is scanned instead", self.folder.path, error)
            self.stop()
            return False
        return True


def is_temporary(name: str) -> bool:
    """Say whether a name, of a file or a directory, is one that writers use before the final one.

    >>> [is_temporary(name) for name in ("a.tif", "a.tif.part", ".a.tif", "a.tif~", "~$a.tif")]
    [False, True, True, True, True]
    """
    return name.startswith((".", "~$")) or name.lower().endswith(TEMPORARY_SUFFIXES)


def walk(folder: Folder, under: str, unreadable: set[str] | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of every image file below the directory ``under`` (relative; "" for the whole folder).

    Directories that cannot be read are added to ``unreadable``. Raises: OSError when the folder itself cannot be read.
    """
    pending = [under]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(folder.path / directory) as listing:
                entries = [entry for entry in listing if not is_temporary(entry.name)]
        except OSError:
            if directory == "":
                raise
            if unreadable is not None:
                unreadable.add(directory)
            continue
        for entry in entries:
            path = f"{directory}/{entry.name}" if directory else entry.name
            status = _status_of(entry) if _is_image(folder, entry.name) else None
            if status is not None and stat.S_ISREG(status.st_mode):
                yield path, status
            elif folder.recursive and _is_dir(entry):
                pending.append(path)


def _status_of(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:  # vanished, or cannot be reached now: the next scan looks again
        return None


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _status(folder: Folder, path: str) -> os.stat_result | None:
    try:
        return (folder.path / path).lstat()
    except OSError:
        return None


def _is_image(folder: Folder, path: str) -> bool:
    return path.lower().endswith(folder.suffixes)


def _ready_at(file: _File) -> float:
    return math.inf if file.in_flight else max(file.due_at, file.not_before)


def _complete_at(folder: Folder, path: str, status: os.stat_result, now: float) -> float:
    """Return the monotonic time at which the file counts as complete if it does not change until then."""
    if folder.completeness == "rename":
        return now
    if folder.completeness == "steady":
        return now + folder.steady_s
    stem = path.rpartition(".")[0]
    found = [_status(folder, f"{base}{suffix}") for base in (path, stem) for suffix in folder.marker_suffixes]
    markers_ns = [marker.st_mtime_ns for marker in found if marker is not None]
    if not markers_ns:
        return math.inf
    return now if max(markers_ns) >= status.st_mtime_ns else now + folder.steady_s


def _marked_by(folder: Folder, path: str) -> list[str]:
    """Return the image names that a marker of this name could speak of."""
    if folder.completeness != "marker":
        return []
    stems = [path.removesuffix(suffix) for suffix in folder.marker_suffixes if path.endswith(suffix)]
    suffixes = ("", *folder.suffixes, *(suffix.upper() for suffix in folder.suffixes))
    return [f"{stem}{suffix}" for stem in stems for suffix in suffixes]
