"""KLARFs in the drop folders: taken as manifests, and what they say of the images that they name.

A KLARF that ends in ``EndOfFile;`` is taken at once, another one when it has not changed for ``settle_s``. An image of
a recipe that reads KLARFs waits until one names it, for ``wait_s`` at most, as it waits for its reference: it goes back
to its folder and comes again, and no worker waits.

Crash safety: the content of a KLARF is kept in the state folder before the ledger takes it, in one transaction with the
work on the file. Names of images, and contents, meet in the ledger, whichever came first.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.intake import manifest
from semwatch.intake.drop_folder import Arrival
from semwatch.line.pipeline import ReferenceFile
from semwatch.service.references import MAX_WAITING, read_reference
from semwatch.settings.recipe import Recipe
from semwatch.store.ledger import Ledger
from semwatch.store.manifests import NamedFile, NewManifest, kept_copy
from semwatch.store.review_record import printable
from semwatch.system import files
from semwatch.system.clock import utc_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """A KLARF that was read and kept."""

    new: NewManifest
    sentence: str
    asks_again: bool
    """Files that were settled may be no more."""


class ManifestFiles:
    """What the daemon knows of KLARFs. Every method may be called from any thread.

    Args:
        ledger: that holds them.
        recipes: by source.
        folders: drop folder by source.
        state_dir: where their content is kept.
    """

    def __init__(
        self,
        ledger: Ledger,
        recipes: Mapping[str, Recipe],
        folders: Mapping[str, Path],
        state_dir: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger, self._recipes, self._folders, self._state_dir = ledger, recipes, folders, state_dir
        self._clock = clock
        self._lock = threading.Lock()
        self._first_seen: dict[tuple[object, ...], float] = {}

    def is_manifest(self, source: str, path: str) -> bool:
        """Say whether a file is taken for a KLARF."""
        recipe = self._recipes.get(source)
        return recipe is not None and manifest.is_manifest(path, recipe.klarf)

    # --- images ------------------------------------------------------------------------------------------------------

    def naming(self, arrival: Arrival) -> NamedFile | None:
        """What the KLARFs say of an image; None where none names it, or none is read."""
        if self._recipes[arrival.source].klarf.pattern is None:
            return None
        return manifest.merged(self._ledger.manifests.naming(arrival.source, arrival.path))

    def place_of(self, source: str, path: str) -> dict[str, str]:
        """The journal's fields of an image that a KLARF names: lot, step, and the wafer where there is one alone."""
        if self._recipes[source].klarf.pattern is None:
            return {}
        about = self._ledger.manifests.about_naming(source, path)
        wafers = about.get("wafers", ())
        (wafer,) = wafers if len(wafers) == 1 else ({},)
        place = {"LOT_ID": about.get("lot_id"), "STEP": about.get("step_id"), "WAFER": wafer.get("id")}
        place["SLOT"] = wafer.get("slot")
        return {name: str(value) for name, value in place.items() if value is not None}

    def waits(self, arrival: Arrival, named: NamedFile | None) -> bool:
        """Say whether an image still waits for a KLARF that names it, or for the file of its references."""
        recipe = self._recipes[arrival.source]
        if recipe.klarf.pattern is None:
            return False
        if named is None:
            return self._is_early(("klarf", arrival.source, arrival.path), recipe.klarf.wait_s)
        self._forget("klarf", arrival.source, arrival.path)
        if named.reference is None or not named.pages:
            return False
        if self._ledger.manifests.arrived(arrival.source, named.reference) is not None:
            self._forget("reference", arrival.source, arrival.path)
            return False
        return self._is_early(("reference", arrival.source, arrival.path), recipe.reference.wait_s)

    def read_reference(self, source: str, named: NamedFile) -> ReferenceFile | None:
        """Read the file of the references of an image, or say why there is none; None where they are pages of its own.

        Raises:
            ServiceUnavailable: the disk or the share failed.
        """
        if named.reference is None or not named.pages:
            return None
        path = self._ledger.manifests.arrived(source, named.reference)
        if path is None:
            return ReferenceFile(named.reference.rpartition("/")[2], None, "there is no reference file")
        return read_reference([self._folders[source] / path], below=self._folders[source])

    # --- KLARFs ------------------------------------------------------------------------------------------------------

    def is_unfinished(self, arrival: Arrival, data: bytes) -> bool:
        """Say whether the writer of a KLARF may still be at work."""
        key = ("end", arrival.source, arrival.path, arrival.stamp)
        if manifest.has_end(data):
            self._forget(*key)
            return False
        return self._is_early(key, self._recipes[arrival.source].klarf.settle_s)

    def is_another(self, source: str, path: str, sha256: str) -> bool:
        """Say whether the manifest of that name is of other content now."""
        known = self._ledger.manifests.of(source, path)
        return known is not None and known.sha256 != sha256

    def read(self, source: str, path: str, sha256: str, data: bytes) -> Taken:
        """Read a KLARF and keep its content.

        Raises:
            ImageError: it is refused, with place and reason.
            ServiceUnavailable: the disk is full or broken.
        """
        settings = self._recipes[source].klarf
        document = manifest.read(data, settings)
        folder = printable(path).rpartition("/")[0]
        named = manifest.named_files(document, folder, settings)
        n_defects = sum(len(wafer.defects) for wafer in document.wafers)
        self._keep(sha256, data)
        about = manifest.about(document)
        due_utc = utc_of(datetime.now(UTC) + timedelta(seconds=settings.deadline_s))
        again = self._to_judge_again(source, named)
        new = NewManifest(source, path, sha256, about, n_defects, named, due_utc, again)
        of = about["lot_id"] or "without a LotID"
        sentence = f"the KLARF of lot {of}: {n_defects} defects, {len(named)} image files; not reviewed itself"
        return Taken(new, sentence, bool(again) or self._ledger.manifests.of(source, path) is not None)

    def _keep(self, sha256: str, data: bytes) -> None:
        kept = kept_copy(self._state_dir, sha256)
        try:
            files.make_folder(kept.parent)
            files.write_whole(kept, data)
        except OSError as error:
            raise ServiceUnavailable(
                f"cannot write {kept}: {error.strerror or error}; free or mend the disk"
            ) from error

    def _to_judge_again(self, source: str, named: list[NamedFile]) -> list[str]:
        """Contents of images that were judged otherwise than this KLARF wants, and that lie there still."""
        known = self._ledger.manifests
        found = [
            one
            for file in named
            for one in known.reviewed(source, file.name)
            if _judges_otherwise(manifest.merged(known.naming(source, file.name)), file)
        ]
        return sorted({sha256 for path, sha256 in found if (self._folders[source] / path).is_file()})

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _is_early(self, key: tuple[object, ...], wait_s: float) -> bool:
        """Say whether something that was first asked for a while ago is still to be waited for."""
        now = self._clock()
        with self._lock:
            first = self._first_seen.setdefault(key, now)
            if now - first >= wait_s:
                del self._first_seen[key]
                return False
            if len(self._first_seen) > MAX_WAITING:
                del self._first_seen[next(iter(self._first_seen))]
        return True

    def _forget(self, *key: object) -> None:
        with self._lock:
            self._first_seen.pop(key, None)


def _judges_otherwise(before: NamedFile | None, now: NamedFile) -> bool:
    """Whether an image that was judged by what ``before`` says is to be judged again; None: it was judged alone."""
    if before is None:
        return any(reference is not None for reference in now.pages.values())
    is_other_file = before.reference_key != now.reference_key
    return any(
        page not in before.pages or before.pages[page] != reference or (reference is not None and is_other_file)
        for page, reference in now.pages.items()
    )


def check_size(size: int, recipe: Recipe) -> None:
    """Hold the size of a KLARF against the recipe's limit before it is read.

    Raises:
        ImageError: it is larger.
    """
    if size > recipe.klarf.max_mb * 1e6:
        raise ImageError(
            f"this KLARF has {size / 1e6:.1f} MB, over {recipe.klarf.max_mb:g}; raise klarf.max_mb in the recipe"
        )
