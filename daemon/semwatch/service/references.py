"""References in the drop folders: which file is one, how long an image waits for its own, and reading it.

An image whose reference is not there yet goes back to its folder and comes again, as one does that is still growing; no
worker waits. The wait counts from the first look, is forgotten with the process, and ends at the next return of the
file, so it may last about twice ``wait_s`` (files come back after 1, 2, 4 ... 30 s).
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from semwatch.errors import ImageError
from semwatch.intake import decoding, pairing
from semwatch.intake.drop_folder import Arrival
from semwatch.line.pipeline import ReferenceFile
from semwatch.settings.recipe import Recipe
from semwatch.settings.site import Folder, Limits

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
        limits: Limits = decoding.LIMITS,
        decode: decoding.Decode = decoding.decode,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folders, self._recipes, self._clock = folders, recipes, clock
        self._decode = partial(decode, max_pixels=limits.max_image_px, max_pages=limits.max_pages)
        self._lock = threading.Lock()
        self._found = _Found()
        self._first_seen: dict[tuple[str, str], float] = {}

    def partner_of(self, arrival: Arrival) -> str | None:
        """The image, without extension, that a file is the reference of; None where it is to be reviewed."""
        return pairing.partner_of(arrival.path, self._recipes[arrival.source].reference)

    def waits(self, arrival: Arrival) -> bool:
        """Say whether an image still waits for its reference."""
        self._found.of = None
        places = self._places(arrival)
        if not places:
            return False
        key, now = (arrival.source, arrival.path), self._clock()
        found = _first_whole(places, self._decode, below=self._folders[arrival.source].path)
        self._found.of = None if found is None else (key, found)
        with self._lock:
            first = self._first_seen.setdefault(key, now)
            if found is not None or now - first >= self._recipes[arrival.source].reference.wait_s:
                del self._first_seen[key]
                return False
            if len(self._first_seen) > MAX_WAITING:
                del self._first_seen[next(iter(self._first_seen))]
        return True

    def read(self, arrival: Arrival) -> ReferenceFile | None:
        """Read the reference of an image, or say why there is none; None where the recipe names none for it.

        What ``waits`` found just before, in the same thread, is not read and decoded again.

        Raises:
            ServiceUnavailable: the disk or the share failed.
        """
        found, self._found.of = self._found.of, None
        if found is not None and found[0] == (arrival.source, arrival.path):
            return found[1]
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


class _Found(threading.local):
    """The whole reference that a thread has found last, with the image it belongs to: one at most for each worker."""

    of: tuple[tuple[str, str], ReferenceFile] | None = None


def _first_whole(places: Sequence[Path], decode: decoding.Decode, *, below: Path) -> ReferenceFile | None:
    """Return the first of these files that is there and whole; one that is still being written cannot be decoded."""
    for place in places:
        if place.is_file() and not place.is_symlink():
            try:
                data = decoding.read_file(place, below=below)
                return ReferenceFile(place.name, data, pages=decode(data, name=place.name))
            except ImageError:
                continue
    return None
