"""Files that are not settled: which of them is next. It costs the same however many wait.

Every file has its own back-off; those of a source that is held wait together. Times are of the monotonic clock, and
the caller says what time it is.
"""

import heapq
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from semwatch.system.files import Stamp

Key = tuple[str, str]
"""Source and path."""
MOST_AT_ONCE = 5000
"""Files that are moved or forgotten before others get a turn: a million at once would hold up the line. While more
than that become ready at one moment, the oldest of those that were moved goes first."""


@dataclass(slots=True)
class WaitingFile:
    """One file."""

    stamp: Stamp
    first_seen: float
    due_at: float
    """When it counts as complete; inf while its marker is missing."""
    n_setbacks: int = 0
    failing_since: float | None = None
    """When the first of its setbacks in a row was."""
    not_before: float = 0.0
    in_flight: bool = False
    turn: int = 0
    """Tells its newest place in the queues from those that it had before."""

    @property
    def ready_at(self) -> float:
        """When it can be handed out."""
        return math.inf if self.in_flight else max(self.due_at, self.not_before)


class Waiting:
    """All of them. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by who looks at a file and changes it in one go."""
        self._files: dict[Key, WaitingFile] = {}
        self._later: dict[str, list[tuple[float, str, int]]] = {}
        self._ready: dict[str, list[tuple[int, str, int]]] = {}
        self._oldest: list[tuple[float, Key]] = []
        self._held: dict[str, float] = {}
        self._n_in_flight = self._n_turns = 0

    def get(self, key: Key) -> WaitingFile | None:
        """The file, None where it does not wait."""
        with self.lock:
            return self._files.get(key)

    def paths(self, source: str) -> list[str]:
        """Paths of one source's files, in flight or not."""
        with self.lock:
            keys = list(self._files)
        return [path for its, path in keys if its == source]

    def put(self, key: Key, stamp: Stamp, *, due_at: float, now: float) -> None:
        """Take a file that is new or has changed; one in flight stays as it is."""
        with self.lock:
            before = self._files.get(key)
            if before is not None and before.in_flight:
                return
            file = WaitingFile(stamp, now if before is None else before.first_seen, due_at)
            self._files[key] = file
            if before is None:
                heapq.heappush(self._oldest, (now, key))
            self._queue(key, file)

    def drop(self, keys: Iterable[Key], *, in_flight: bool = False) -> None:
        """Forget files; those in flight only where it is said."""
        left = iter(keys)
        while some := list(islice(left, MOST_AT_ONCE)):
            with self.lock:
                for key in some:
                    file = self._files.get(key)
                    if file is not None and file.in_flight <= in_flight:
                        self._n_in_flight -= file.in_flight
                        del self._files[key]

    def reschedule(self, key: Key, *, due_at: float | None = None, not_before: float | None = None) -> None:
        """Let a file be due, or come again, at another time; back from flight where it was in flight."""
        with self.lock:
            file = self._files[key]
            self._n_in_flight -= file.in_flight
            file.in_flight = False
            file.due_at = file.due_at if due_at is None else due_at
            file.not_before = file.not_before if not_before is None else not_before
            self._queue(key, file)

    def hold(self, source: str, until: float) -> None:
        """Hand out nothing of a source before a moment."""
        with self.lock:
            self._held[source] = until

    def next(self, now: float, limit: int) -> list[Key]:
        """Return up to ``limit`` files that can be handed out, oldest first.

        Each must be given to ``take``, ``drop``, ``put`` or ``reschedule`` next: it stands in no queue any more.
        """
        found: list[Key] = []
        with self.lock:
            while len(found) < limit and (source := self._oldest_source(now)) is not None:
                found.append((source, heapq.heappop(self._ready[source])[1]))
        return found

    def take(self, key: Key, now: float) -> WaitingFile | None:
        """Mark a file as in flight; None where it cannot be handed out now."""
        with self.lock:
            file = self._files.get(key)
            if file is None or file.in_flight:
                return None
            if file.ready_at > now:
                self._queue(key, file)
                return None
            file.in_flight = True
            self._n_in_flight += 1
            return file

    def next_at(self, now: float) -> float:
        """Earliest moment at which a file can be handed out; inf where none can."""
        with self.lock:
            return min((self._source_at(source, now) for source in self._later), default=math.inf)

    def count(self, now: float) -> tuple[int, float]:
        """Return how many files wait, and for how long the one that waits longest has been known, in flight or not."""
        with self.lock:
            while self._oldest and self._is_gone(*self._oldest[0]):
                heapq.heappop(self._oldest)
            return len(self._files) - self._n_in_flight, now - self._oldest[0][0] if self._oldest else 0.0

    def _is_gone(self, first_seen: float, key: Key) -> bool:
        file = self._files.get(key)
        return file is None or file.first_seen != first_seen

    def _queue(self, key: Key, file: WaitingFile) -> None:
        self._n_turns += 1
        file.turn = self._n_turns
        source, path = key
        later = self._later.setdefault(source, [])
        self._ready.setdefault(source, [])
        if file.ready_at < math.inf:
            heapq.heappush(later, (file.ready_at, path, file.turn))

    def _source_at(self, source: str, now: float) -> float:
        self._clean(source)
        ready, later = self._ready[source], self._later[source]
        at = now if ready else later[0][0] if later else math.inf
        return max(at, self._held.get(source, -math.inf))

    def _oldest_source(self, now: float) -> str | None:
        """The source whose ready file is the oldest; None where none is ready."""
        best: tuple[int, str] | None = None
        for source, later in self._later.items():
            if self._held.get(source, -math.inf) > now:
                continue
            ready = self._ready[source]
            for _ in range(MOST_AT_ONCE):
                if not later or later[0][0] > now:
                    break
                _, path, turn = heapq.heappop(later)
                if self._is_turn(source, path, turn):
                    heapq.heappush(ready, (self._files[source, path].stamp.mtime_ns, path, turn))
            self._clean(source)
            if ready and (best is None or ready[0][0] < best[0]):
                best = ready[0][0], source
        return None if best is None else best[1]

    def _clean(self, source: str) -> None:
        """Throw away places that are not the newest of their file, from the front of the queues."""
        ready, later = self._ready[source], self._later[source]
        while ready and not self._is_turn(source, *ready[0][1:]):
            heapq.heappop(ready)
        while later and not self._is_turn(source, *later[0][1:]):
            heapq.heappop(later)

    def _is_turn(self, source: str, path: str, turn: int) -> bool:
        file = self._files.get((source, path))
        return file is not None and file.turn == turn and not file.in_flight


def backoff_s(n_setbacks: int, first_s: float, most_s: float) -> float:
    """Seconds until the next try: doubled with every setback in a row.

    >>> [backoff_s(n, 1.0, 30.0) for n in (1, 2, 3, 6)]
    [1.0, 2.0, 4.0, 30.0]
    """
    return min(most_s, first_s * 2.0 ** min(n_setbacks - 1, 30))


def by_folder(paths: Iterable[str]) -> Mapping[str, list[str]]:
    """Paths by the folder that they lie in.

    >>> by_folder(["a.tif", "lot/b.tif", "lot/c.tif"])
    {'': ['a.tif'], 'lot': ['lot/b.tif', 'lot/c.tif']}
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(path.rpartition("/")[0], []).append(path)
    return found
