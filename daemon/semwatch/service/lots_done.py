"""Lots whose KLARF named their work: when one is done, what is written back, and later revisions of it.

A lot is done when every defect of its KLARF has a verdict or a stated reason: each image that is named was judged, was
refused, or had not come by the deadline. What arrived in time and still waits for its review is waited for, until
nothing of the lot has changed for as long again. A lot that is done is looked at again when a result of it changes:
another image, a re-review, a person's word. Where it then says something else, and nothing of it waits, that is the
next revision.

Crash safety: what a revision holds is kept in the state folder first; then the ledger takes it, in one transaction with
its audit line; then it is put into its place, again after a crash, with the same bytes under the same name; then the
ledger notes that it lies there. So there is one KLARF for each revision, whole, and never two that differ.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from semwatch import klarf
from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.klarf import Document
from semwatch.line import lot_review
from semwatch.line.class_codes import ClassCodes, class_codes
from semwatch.line.lot_review import Written
from semwatch.service import faults
from semwatch.settings.recipe import Recipe
from semwatch.store import results
from semwatch.store.ledger import Ledger
from semwatch.store.lot_record import LOT_JSON, LotRecord
from semwatch.store.manifests import KEPT, Delivery, FileState, LotRevision, Manifest, kept_copy, match_key
from semwatch.store.review_record import ReviewRecord, printable
from semwatch.system import files
from semwatch.system.clock import utc_now
from semwatch.system.journal import about

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
_SHARE = 20
"""A twentieth of the time, at most, goes into looking at a lot that is not done."""
AGAIN_S = 5.0
"""Until the next look at a lot that waits for files which lie in their folder."""
RETRY_S = 30.0
"""Until the next try at what a disk or a share refused."""
BUG_S = 600.0
OLD_PARTS_S = 7 * 86_400.0
"""Parts of files (``parts``) that nobody went on with for so long are removed."""
_COPY = re.compile(r"\d+\.r\d+\.\d+")
"""Names of what is on its way, in the folder ``KEPT``."""


class LotsDone:
    """The lots; one thread at a time.

    Args:
        ledger: that holds the manifests.
        recipes: by source.
        folders: drop folder by source.
        results_dir: of the site.
        state_dir: of the site.
        site: its name.
        codes_of: fab codes of the classes that people named, for the version of a head.
    """

    def __init__(
        self,
        ledger: Ledger,
        recipes: Mapping[str, Recipe],
        folders: Mapping[str, Path],
        *,
        results_dir: Path,
        state_dir: Path,
        site: str,
        codes_of: Callable[[int | None], Mapping[str, int]],
    ) -> None:
        self._ledger, self._recipes, self._folders = ledger, recipes, folders
        self._results_dir, self._state_dir, self._site, self._codes_of = results_dir, state_dir, site, codes_of
        self._next = 0.0
        self._is_tidy = False
        self._not_before: dict[str, float] = {}
        self._quiet_since: dict[int, tuple[int, float]] = {}
        """By manifest, its count of changes, and since when it stands."""

    def step(self) -> None:
        """Write what is done, and put what was written into its place.

        Raises:
            ServiceUnavailable: the disk under the ledger refused; call it again.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + INTERVAL_S
        if not os.access(self._results_dir, os.X_OK):  # a share that is away
            return
        if not self._is_tidy:
            self._tidy()
        for manifest in self._ledger.manifests.to_look_at(utc_now()):
            self._safely(f"lot {manifest.id}", partial(self._look_at, manifest))
        for revision in self._ledger.manifests.to_deliver():
            self._safely(f"revision {revision.seq}", partial(self._deliver, revision))

    def _safely(self, what: str, work: Callable[[], None]) -> None:
        """Whatever is wrong with one lot, the others go on, and the line."""
        if self._not_before.get(what, 0.0) > time.monotonic():
            return
        self._not_before.pop(what, None)
        try:
            work()
        except (ServiceUnavailable, OSError) as error:
            if faults.is_of_ledger(error):
                raise
            log.warning("%s waits: %s", what, error)
            self._not_before[what] = time.monotonic() + RETRY_S
        except Exception:
            log.exception("%s: this is a bug", what)
            self._not_before[what] = time.monotonic() + BUG_S

    def _tidy(self) -> None:
        """Once after a start: remove copies of what was delivered, or never decided, when the process died."""
        wanted = {one.kept for revision in self._ledger.manifests.to_deliver() for one in revision.files}
        for place in (self._state_dir / KEPT).glob("*.r*.*"):
            if _COPY.fullmatch(place.name) and place.name not in wanted:
                place.unlink(missing_ok=True)
        for folder in (self._state_dir / KEPT / "parts").glob("*"):
            if time.time() - folder.stat().st_mtime > OLD_PARTS_S:
                shutil.rmtree(folder, ignore_errors=True)
        self._is_tidy = True

    def _wait(self, manifest: Manifest, seconds: float) -> None:
        self._not_before[f"lot {manifest.id}"] = time.monotonic() + seconds

    # --- when --------------------------------------------------------------------------------------------------------

    def _look_at(self, manifest: Manifest) -> None:
        recipe = self._recipes.get(manifest.source)
        if recipe is None or recipe.klarf.pattern is None:
            self._wait(manifest, RETRY_S)
            return
        begin, now_utc = time.monotonic(), utc_now()
        states = self._ledger.manifests.files(manifest)
        is_due = manifest.due_utc <= now_utc
        waiting, missing = self._outstanding(manifest, states, is_due=is_due)
        is_late = is_due or manifest.done_utc is not None
        is_stuck = bool(waiting) and is_late and self._is_quiet(manifest, recipe.klarf.deadline_s)
        if not is_stuck and (waiting or (missing and not is_late)):
            if is_late:
                self._wait(manifest, AGAIN_S)
            else:
                self._ledger.manifests.seen(manifest)
                self._wait(manifest, _SHARE * (time.monotonic() - begin))
            return
        if manifest.done_utc is not None and not is_stuck and not self._is_quiet(manifest, recipe.klarf.quiet_s):
            return
        self._write(manifest, recipe, states, now_utc)

    def _is_quiet(self, manifest: Manifest, quiet_s: float) -> bool:
        now = time.monotonic()
        n_changes, since = self._quiet_since.get(manifest.id, (-1, now))
        if n_changes != manifest.n_changes:
            since = now
            self._quiet_since[manifest.id] = manifest.n_changes, since
        if now - since < quiet_s:
            return False
        del self._quiet_since[manifest.id]
        return True

    def _outstanding(
        self, manifest: Manifest, states: Sequence[FileState], *, is_due: bool
    ) -> tuple[list[FileState], list[FileState]]:
        """Files to be judged that lie there and wait for it, and those that have not come."""
        folder = self._folders[manifest.source]
        waiting: list[FileState] = []
        missing: list[FileState] = []
        absent = [one for one in states if one.file.pages and one.path is None]
        for one in states:
            if one.file.pages and one.path is not None and one.state in ("SEEN", "CLAIMED"):
                is_here = one.state == "CLAIMED" or faults.is_there(folder / one.path)
                (waiting if is_here else missing).append(one)
        here = _keys_below(folder, {_folder_of(one.file.name) for one in absent}) if is_due and absent else set()
        for one in absent:
            (waiting if one.file.key in here else missing).append(one)
        return waiting, missing

    # --- what --------------------------------------------------------------------------------------------------------

    def _write(self, manifest: Manifest, recipe: Recipe, states: Sequence[FileState], now_utc: str) -> None:
        """Say what became of every defect, and keep it as the next revision where it is new."""
        document = self._document(manifest)
        if document is None:
            self._wait(manifest, BUG_S)
            return
        outcomes = {one.file.key: self._outcome(manifest.source, one) for one in states}
        reviewed = lot_review.judged(
            document, _folder_of(printable(manifest.path)), outcomes, recipe, partial(self._codes, recipe)
        )
        digest = _digest(manifest, recipe, reviewed)
        if digest == manifest.digest:
            self._ledger.manifests.seen(manifest)
            return
        written = lot_review.written(document, reviewed, recipe)
        before = self._before(manifest)
        missing = sorted(one.file.name for one in states if one.file.pages and one.path is None)
        late = sorted(
            one.file.name for one in states if one.file.pages and (one.first_seen_utc or "") >= manifest.due_utc
        )
        revision, places = self._places(manifest, recipe, written)
        why = lot_review.why(manifest, before, reviewed, is_due=bool(missing) and manifest.done_utc is None)
        record = lot_review.record(
            manifest, recipe, reviewed, written, site=self._site, revision=revision, why=why, now_utc=now_utc,
            names=[place.name for place in places[1:]], missing=missing, late=late,
        )  # fmt: skip
        counts = lot_review.counts(record)
        deliveries = self._keep(
            manifest, revision, recipe, places, [_json(record), *(one.data for one in written.files)]
        )
        audit = {
            "event": "lot", "utc": now_utc, "source": manifest.source, "path": printable(manifest.path),
            "sha256": manifest.sha256, "lot": manifest.about.get("lot_id"), "revision": revision, "why": why,
            "counts": counts, "files": [one.place for one in deliveries],
        }  # fmt: skip
        if self._ledger.revise_lot(
            manifest, revision, digest, counts, why=why, files=deliveries, audit=audit, now_utc=now_utc
        ):
            log.info(
                "%s/%s: revision %d of lot %s: %s; %d of %d defects with a verdict",
                manifest.source, printable(manifest.path), revision, manifest.about.get("lot_id"), why,
                counts["verdicts"], counts["defects"],
                extra=about("lot", manifest.source, manifest.path, manifest.sha256),
            )  # fmt: skip
        if written.fault:
            log.error("%s/%s: no KLARF is written: %s", manifest.source, printable(manifest.path), written.fault)

    def _document(self, manifest: Manifest) -> Document | None:
        """The KLARF as it was taken; None where its copy is lost, which is said."""
        for place in (
            kept_copy(self._state_dir, manifest.sha256),
            self._folders[manifest.source] / manifest.path,
        ):
            try:
                data = place.read_bytes()
            except OSError:
                continue
            if hashlib.sha256(data).hexdigest() == manifest.sha256:
                return klarf.parse(data)
        log.error(
            "%s/%s: the copy of this KLARF in %s is lost, so nothing is written back; drop it again",
            manifest.source, printable(manifest.path), self._state_dir / KEPT,
        )  # fmt: skip
        return None

    def _outcome(self, source: str, one: FileState) -> ReviewRecord | str:
        """The result of an image, or why there is none."""
        if one.path is None or one.sha256 is None:
            return f"the image {one.file.name} has not come, or not whole"
        if one.state == "QUARANTINED":
            return f"the image {one.file.name} was refused: {one.reason}"
        if one.state != "DONE":
            return f"the image {one.file.name} was taken away, or waits to be judged"
        if one.reason is not None:
            return f"the image {one.file.name} was not judged: {one.reason}"
        path = results.review_path(self._results_dir, source, one.original or one.path)
        try:
            record = results.read(path)
        except ImageError:
            return f"the result of {one.file.name} is gone or cannot be read"
        return record if record.sha256 == one.sha256 else f"the result of {one.file.name} is of other content"

    def _codes(self, recipe: Recipe, head: int | None) -> ClassCodes:
        return class_codes(recipe, self._codes_of(head))

    def _before(self, manifest: Manifest) -> LotRecord | None:
        try:
            return LotRecord.model_validate_json(self._json_place(manifest).read_bytes())
        except (OSError, ValidationError):
            return None

    # --- where -------------------------------------------------------------------------------------------------------

    def _json_place(self, manifest: Manifest) -> Path:
        place = results.review_path(self._results_dir, manifest.source, manifest.path)
        return place.with_name(place.name.removesuffix(results.REVIEW) + LOT_JSON)

    def _places(self, manifest: Manifest, recipe: Recipe, written: Written) -> tuple[int, list[Path]]:
        """The number of the revision, and where its JSON and KLARFs belong: nothing that lies there is overwritten."""
        at_results = self._json_place(manifest)
        root = recipe.klarf.outbox
        folder = at_results.parent if root is None else root / at_results.parent.relative_to(self._results_dir)
        name = PurePosixPath(at_results.name.removesuffix(LOT_JSON))
        revision = manifest.revision + 1
        while True:
            places = [folder / f"{name.stem}{one.part}.r{revision}{name.suffix}" for one in written.files]
            if not any(faults.is_there(place) for place in places):
                return revision, [at_results, *places]
            revision += 1

    def _keep(
        self, manifest: Manifest, revision: int, recipe: Recipe, places: Sequence[Path], contents: Sequence[bytes]
    ) -> list[Delivery]:
        """Keep the content of a revision in the state folder, on its way to its places."""
        folder = self._state_dir / KEPT
        files.make_folder(folder)
        found = []
        for n, (place, content) in enumerate(zip(places, contents, strict=True)):
            kept = f"{manifest.id}.r{revision}.{n}"
            files.write_whole(folder / kept, content)
            root = self._results_dir if n == 0 or recipe.klarf.outbox is None else recipe.klarf.outbox
            found.append(Delivery(kept, str(place), str(root)))
        return found

    def _deliver(self, revision: LotRevision) -> None:
        """Put a revision into its place; whoever waits for the lot hears of it then."""
        kept = [self._state_dir / KEPT / one.kept for one in revision.files]
        for copy, one in zip(kept, revision.files, strict=True):
            faults.check_results(Path(one.root))
            try:
                content = copy.read_bytes()
            except FileNotFoundError:
                log.error("%s cannot be written: its copy %s is lost", one.place, copy)
                continue
            files.make_folder(Path(one.place).parent)
            files.write_whole(Path(one.place), content)
        self._ledger.manifests.delivered(revision.seq, utc_now())
        for copy in kept:
            copy.unlink(missing_ok=True)


def _digest(manifest: Manifest, recipe: Recipe, reviewed: Sequence[lot_review.ReviewedWafer]) -> str:
    """Hash of all that a revision says and that makes another one where it changes."""
    verdicts = [
        [one.id, one.verdict, one.label, one.code, one.by, one.reason] for wafer in reviewed for one in wafer.defects
    ]
    klarf_ = recipe.klarf
    content = [manifest.sha256, klarf_.form, klarf_.target_column, klarf_.extend_lookup, verdicts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _json(record: LotRecord) -> bytes:
    return record.model_dump_json(indent=1).encode() + b"\n"


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _keys_below(root: Path, folders: set[str]) -> set[str]:
    """What lies in folders of a drop folder, by key.

    Raises:
        ServiceUnavailable: one is there and cannot be listed, so nothing is known to be missing.
    """
    found = set()
    for folder in folders:
        try:
            with os.scandir(root / folder) as listing:
                found |= {match_key(f"{folder}/{entry.name}" if folder else entry.name) for entry in listing}
        except (FileNotFoundError, NotADirectoryError) as error:
            if not faults.can_list(root):
                raise ServiceUnavailable(f"{root} cannot be reached: {error.strerror}") from error
        except OSError as error:
            raise ServiceUnavailable(f"{root / folder} cannot be reached: {error.strerror}") from error
    return found
