"""One drop folder and its observer, which is made anew whenever it died or the folder is another one than it was."""

import logging
import math
import os
import queue
import threading
from contextlib import suppress

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from semwatch.intake.folder_rules import Folder

log = logging.getLogger(__name__)

_EVENTS: list[type[FileSystemEvent]] = [FileClosedEvent, FileMovedEvent, DirCreatedEvent, DirMovedEvent]


class Watch(FileSystemEventHandler):
    """One folder, watched: what its events name goes into a queue of hints.

    Args:
        folder: the folder.
        hints: takes this watch and the path that is new.
    """

    def __init__(self, folder: Folder, hints: "queue.Queue[tuple[Watch, str] | None]") -> None:
        self.folder = folder
        self.is_missing = False
        self.is_scan_wanted = True
        """A scan that takes nothing for known."""
        self.check_at = self.scan_at = self.full_scan_at = -math.inf
        self._hints = hints
        self._observer: InotifyObserver | None = None
        self._observe_at = -math.inf
        self._identity: tuple[int, int] | None = None
        self._root = ""
        self._warned: set[str] = set()
        self._is_without_events = False

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
            if self._observe():
                self.is_scan_wanted = True  # after the watch is set, so that nothing falls in between
            else:
                self._observe_at = now + retry_s
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
        except (OSError, RecursionError) as error:  # watchdog walks a tree of a thousand levels by recursion
            if not self._is_without_events:
                log.warning("drop folder %s sends no events (%s), it is scanned instead", self.folder.path, error)
            self._is_without_events = True
            self.stop()
            return False
        self._is_without_events = False
        return True
