"""Which lots are complete: all that lies in the lot's folder is reviewed, refused or a duplicate, and no more comes.

Nothing says how many images a lot will have, so it counts as complete once nothing new has come for a while and nothing
of it waits. More images, or new content under an old name, make it complete once more, later. Results that are judged
again, or corrected, do not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from semwatch.store.result_index import ResultIndex

LOOK_EVERY_S = 5.0
_SHARE = 20
"""At most one twentieth of the time goes into looking."""


@dataclass(frozen=True, slots=True)
class DoneLot:
    """A lot that is complete."""

    name: str
    """Source and folder, as results are kept."""
    n_images: int
    n_refused: int
    n_duplicates: int
    held: str
    """Tells what it holds now from what it held before."""


class QuietLots:
    """Which lots are complete and have not been announced as they are now.

    Args:
        index: of the results.
        announced: what each lot held when it was announced.
        is_waiting: whether an image of a lot's folder waits.
        since_utc: lots with nothing newer are left alone.
        quiet_s: seconds without anything new.
    """

    def __init__(
        self,
        index: ResultIndex,
        announced: Mapping[str, str],
        is_waiting: Callable[[str], bool],
        *,
        since_utc: str,
        quiet_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index, self._is_waiting, self._clock = index, is_waiting, clock
        self._announced = dict(announced)
        self._since_utc, self._quiet_s = since_utc, quiet_s
        self._seen: dict[str, tuple[str, float]] = {}
        """What each lot that is not announced holds, and since when."""
        self._next = 0.0

    def look(self) -> list[DoneLot]:
        """The lots that are complete now; nothing where it is not time to look yet."""
        start = self._clock()
        if start < self._next:
            return []
        found = []
        for name, n_images, n_refused, n_duplicates, newest_utc in self._index.arrivals():
            lot = DoneLot(name, n_images, n_refused, n_duplicates, f"{n_images} {newest_utc}")
            if newest_utc < self._since_utc or self._announced.get(name) == lot.held:
                self._seen.pop(name, None)
                continue
            if self._is_waiting(name):
                self._seen.pop(name, None)
                continue
            held, since = self._seen.get(name, ("", 0.0))
            if held != lot.held:
                self._seen[name] = lot.held, start
            elif start - since >= self._quiet_s:
                found.append(lot)
        end = self._clock()
        self._next = end + max(min(LOOK_EVERY_S, self._quiet_s / 2), (_SHARE - 1) * (end - start))
        return found

    def mark(self, lot: DoneLot) -> None:
        """Remember that a lot was announced."""
        self._announced[lot.name] = lot.held
        self._seen.pop(lot.name, None)
