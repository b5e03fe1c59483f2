"""References in the drop folders: which file is one, how long an image waits for its own, and reading it.

An image whose reference is not there yet goes back to its folder and comes again, as one does that is still growing; no
worker waits. The wait counts from the first look, is forgotten with the process, and ends at the next return of the
file, so it may last about twice ``wait_s`` (files come back after 1, 2, 4 ... 30 s).
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from semwatch.errors import ImageError
from semwatch.intake import decoding, pairing
from semwatch.intake.drop_folder import Arrival
from semwatch.line.pipeline import ReferenceFile
from semwatch.settings.recipe import Recipe
from semwatch.settings.site import Folder

log = logging.getLogger(__name__)

MAX_WAITING = 100_000
"""First looks that are remembered; beyond, the oldest image waits anew."""


class References:
    """What the daemon knows of references. Every method may be called from any thread."""

    def __init__(
        self,
        folders: Mapping[str, Folder],
        recipes: Mapping[str, Recipe],
        *,
        decode: decoding.Decode = decoding.decode,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folders, self._recipes, self._decode, self._clock = folders, recipes, decode, clock
        self._lock = threading.Lock()
        self._first_seen: dict[tuple[str, str], float] = {}

    def partner_of(self, arrival: Arrival) -> str | None:
        """The image, without extension, that a file is the reference of; None where it is to be reviewed."""
        return pairing.partner_of(arrival.path, self._recipes[arrival.source].reference)

    def waits(self, arrival: Arrival) -> bool:
        """Say whether an image still waits for its reference."""
        places = self._places(arrival)
        if not places:
            return False
        is_here = _first_whole(places, self._decode) is not None
        key, now = (arrival.source, arrival.path), self._clock()
        with self._lock:
            first = self._first_seen.setdefault(key, now)
            if is_here or now - first >= self._recipes[arrival.source].reference.wait_s:
                del self._first_seen[key]
                return False
            if len(self._first_seen) > MAX_WAITING:
                del self._first_seen[next(iter(self._first_seen))]
        return True

    def read(self, arrival: Arrival) -> ReferenceFile | None:
        """Read the reference of an image, or say why there is none; None where the recipe names none for it.

        Raises:
            ServiceUnavailable: the disk or the share failed.
        """
        return read_reference(self._places(arrival), below=self._folders[arrival.source].path)

    def _places(self, arrival: Arrival) -> list[Path]:
        folder, rule = self._folders[arrival.source], self._recipes[arrival.source].reference
        return [folder.path / path for path in pairing.references_of(arrival.path, rule, folder.suffixes)]


def read_reference(places: Sequence[Path], *, below: Path | None = None) -> ReferenceFile | None:
    """Read the first of these files that is there; None where none is named.

    Args:
        places: in order.
        below: see ``decoding.read_file``.

    Raises:
        ServiceUnavailable: the disk or the share failed.
    """
    if not places:
        return None
    place = next((place for place in places if place.is_file() and not place.is_symlink()), None)
    if place is None:
        return ReferenceFile(places[0].name, None, "there is no reference file")
    try:
        return ReferenceFile(place.name, decoding.read_file(place, below=below))
    except ImageError as error:
        return ReferenceFile(place.name, None, f"the reference cannot be read: {error}")


def _first_whole(places: Sequence[Path], decode: decoding.Decode) -> Path | None:
    """Return the first of these files that is there and whole; one that is still being written cannot be decoded."""
    for place in places:
        if place.is_file() and not place.is_symlink():
            try:
                decoding.read(place, by=decode)
            except ImageError:
                continue
            return place
    return None
