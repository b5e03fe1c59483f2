"""After a new head came into service: unknowns of the last days are judged again, from their stored features.

The daemon alone writes results, so it does this itself, a slice at a time between files. Features and their places
stand in the ledger since the review that found them. A verdict with a label takes the place of the one that stands; a
verdict without one does so only where the label that stands is no longer a class of the head.

Crash safety: the result is revised first, then the ledger takes audit line and summary in one transaction under an id
made from the revision. Both do nothing when repeated, and every revision that a pass meets is offered to the ledger
again, so a crash anywhere leaves one revision with one audit line once the pass has been repeated. ``reread.json`` says
what is finished; it only saves the repetition.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from semwatch.defects import Verdict
from semwatch.errors import ConfigError, ImageError, ModelMismatch, ServiceUnavailable
from semwatch.line import classification, notices
from semwatch.line.class_codes import class_codes
from semwatch.line.notices import Place
from semwatch.models.inference import ModelId, Models
from semwatch.models.model_repository import Meta
from semwatch.service.lot_tables import row_of
from semwatch.settings.recipe import Pins, Recipe
from semwatch.store import results
from semwatch.store.ledger import Ledger, OutboxItem
from semwatch.store.review_record import ReviewRecord, VerdictRecord, class_code, verdict_record
from semwatch.store.unknown_features import UnknownFeatures
from semwatch.streams.records import Record
from semwatch.system import files
from semwatch.system.clock import utc_now, utc_of
from semwatch.system.faults import first_fault
from semwatch.system.journal import about

log = logging.getLogger(__name__)

MARKER = "reread.json"
SLICE_S = 0.2
"""A slice ends with the image that exceeds it."""
RETRY_S = 60.0
_PAGE = 32


@dataclass(slots=True)
class Counts:
    """What one pass met."""

    records: int = 0
    revised: int = 0
    """Images with a new revision."""
    changed: int = 0
    """Defects with another verdict."""
    other_encoder: int = 0
    """Records left alone: their features mean nothing to this head."""
    other_recipe: int = 0
    """Records left alone: their source is judged by another recipe now, or is gone."""
    stale: int = 0
    """Records left alone: their result is gone, broken, of other content, has no such defect, or takes no revision."""


class Marker(BaseModel):
    """``reread.json``: what the last finished pass was for, and what it did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: Mapping[str, int] = {}
    """Version of the head by source."""
    utc: str = ""
    counts: Counts = Counts()


class Rereview:
    """Re-review in slices, for the one thread that also hands out files.

    Args:
        models: by pins; a head that changes makes a pass due.
        recipes: by source.
        ledger: has the unknowns, takes audit lines and summaries.
        results_dir: the results to revise.
        state_dir: keeps ``reread.json``.
        days: how far back; 0: never.
        publishes: whether summaries leave for Redis.
        is_busy: says of (source, path as in the record) whether a worker has the image; it is waited for.
        on_revised: called with each review.json that got a revision, and its new content.

    Raises: ConfigError when ``reread.json`` is broken.
    """

    def __init__(
        self,
        models: Mapping[Pins, Models],
        recipes: Mapping[str, Recipe],
        ledger: Ledger,
        *,
        results_dir: Path,
        state_dir: Path,
        days: float,
        publishes: bool,
        is_busy: Callable[[str, str], bool],
        on_revised: Callable[[Path, ReviewRecord], None],
    ) -> None:
        self._models, self._recipes, self._ledger = models, recipes, ledger
        self._results_dir, self._marker_path, self._days = results_dir, state_dir / MARKER, days
        self._publishes, self._is_busy, self._on_revised = publishes, is_busy, on_revised
        self._finished = read_marker(self._marker_path)
        self._wanted: Mapping[str, int] = {}
        self._pass: Generator[bool, None, None] | None = None
        self._not_before = 0.0
        self.counts = Counts()

    def step(self, budget_s: float = SLICE_S) -> bool:
        """Judge a slice of what is due; True while there is more. What is away or broken is tried again after a while.

        An exception that is not in the error tree is a bug, as anywhere in the daemon.
        """
        if not self._is_due():
            return False
        end = time.monotonic() + budget_s
        try:
            while self._go_on() and time.monotonic() < end:
                pass
        except (ServiceUnavailable, ConfigError, ModelMismatch) as error:
            log.warning("re-review waits %.0f s and begins again: %s", RETRY_S, error)
            self.close()
            self._not_before = time.monotonic() + RETRY_S
            return False
        return self._pass is not None

    def close(self) -> None:
        """Leave the pass; it begins again at the next step."""
        running, self._pass = self._pass, None
        if running is not None:
            running.close()

    # --- one pass --------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        wanted = {source: self._models[recipe.pins].versions()["head"] for source, recipe in self._recipes.items()}
        if self._days <= 0 or wanted == self._finished.heads or time.monotonic() < self._not_before:
            return False
        if wanted != self._wanted:
            self.close()
            self._wanted = wanted
        return True

    def _go_on(self) -> bool:
        """Handle one image; False where there is none left, or a worker has it."""
        if self._pass is None:
            self.counts = Counts()
            self._pass = self._images(utc_of(datetime.now(UTC) - timedelta(days=self._days)))
        went_on = next(self._pass, None)
        if went_on is None:
            self._finish()
        return went_on is True

    def _finish(self) -> None:
        self._pass = None
        marker = Marker(heads=self._wanted, utc=utc_now(), counts=self.counts)
        try:
            files.write_whole(self._marker_path, marker.model_dump_json(indent=1).encode() + b"\n")
        except OSError as error:
            raise ServiceUnavailable(f"cannot write {self._marker_path}: {error.strerror}") from error
        self._finished = marker
        log.info("re-review for heads %s: %s", dict(marker.heads), asdict(self.counts))

    def _images(self, since_utc: str) -> Generator[bool, None, None]:
        """Handle one image after the other; give True after each, False as often as a worker has the next one."""
        last: UnknownFeatures | None = None
        while page := self._ledger.unknowns_since(since_utc, after=last, limit=_PAGE):
            for (source, path, sha256), found in groupby(page, key=lambda r: (r.source, r.path, r.sha256)):
                while self._is_busy(source, path):
                    yield False
                self._image(source, path, sha256, list(found))
                yield True
            last = page[-1]
        self._ledger.forget_unknowns(since_utc)

    def _image(self, source: str, path: str, sha256: str, found: list[UnknownFeatures]) -> None:
        self.counts.records += len(found)
        fitting = self._fitting(source, found)
        if not fitting:
            return
        try:
            place = results.review_path(self._results_dir, source, path, is_printable=True)
            self._revise(place, sha256, fitting)
        except (ImageError, OSError, RuntimeError) as error:
            # Broken, out of the results folder, in a folder that may not be searched, or in the way of a kept revision.
            self.counts.stale += len(fitting)
            log.warning("not read again: %s", error, extra=about("not read again", source, path, sha256))

    def _revise(self, target: Path, sha256: str, found: list[UnknownFeatures]) -> None:
        recipe = self._recipes[found[0].source]
        result = results.read(target) if target.exists() else None
        if result is None or (result.sha256, result.recipe.id) != (sha256, recipe.id):
            self.counts.stale += len(found)
            return
        self._note(target, result)  # again, in case a crash came between the two
        verdicts, head = self._changes(result, found, recipe)
        revised = results.revise(
            target, verdicts, head_version=head.version, head_hash=head.content_hash, utc=utc_now()
        )
        if revised is not None:
            self.counts.revised += 1
            self.counts.changed += len(verdicts)
            self._note(target, revised)

    def _fitting(self, source: str, found: list[UnknownFeatures]) -> list[UnknownFeatures]:
        """Those that this source's recipe and models can judge."""
        recipe = self._recipes.get(source)
        ours = [record for record in found if recipe is not None and record.recipe_id == recipe.id]
        self.counts.other_recipe += len(found) - len(ours)
        if recipe is None or not ours:
            return []
        models = self._models[recipe.pins]
        ours_is = {str(models.versions()["encoder"]), models.hashes()["encoder"]}
        (width,) = models.meta("head").inputs["features"].shape
        fitting = [r for r in ours if r.encoder in ours_is and len(r.features) == width * 4]
        self.counts.other_encoder += len(ours) - len(fitting)
        return fitting

    def _changes(
        self, result: ReviewRecord, found: list[UnknownFeatures], recipe: Recipe
    ) -> tuple[dict[Place, VerdictRecord], ModelId]:
        """Ask the head; return the verdicts that take the place of others, and which head it was."""
        current = notices.defects_of(result)
        known = [r for r in found if (d := current.get((r.page, r.defect_id))) and d.box_xyxy == r.box_xyxy]
        self.counts.stale += len(found) - len(known)
        if not known:
            return {}, ModelId(0, "")
        features = np.stack([np.frombuffer(r.features, "<f4").astype(np.float32) for r in known])
        answer = self._models[recipe.pins].infer("head", {"features": features}, backlog=True)
        changes, codes = {}, class_codes(recipe, answer.meta.codes)
        domains = {page.page: page.domain for page in result.pages}
        for record, logits, p_values in zip(known, answer.outputs["logits"], answer.outputs["p_values"], strict=True):
            place = record.page, record.defect_id
            domain = domains[record.page]
            verdict = classification.decide(logits, p_values, answer.meta.labels, recipe.unknown, domain=domain)
            if replaces(verdict, current[place].verdict, answer.meta):
                changes[place] = verdict_record(verdict, class_code(verdict, **codes))
        return changes, answer.id

    def _note(self, target: Path, result: ReviewRecord) -> None:
        """Offer a revision to the ledger, which takes it once."""
        if result.revised_utc is None:
            return
        message = notices.summary_message(result)
        outbox = [OutboxItem(*message)] if self._publishes else []
        row = row_of(target, self._results_dir, is_new=False)
        audit = notices.audit_entry(result, target.name, before=_before(target, result))
        changed = result.source, result.sha256
        if self._ledger.note(audit=audit, outbox=outbox, once=message[1], once_utc=utc_now(), row=row, changed=changed):
            head, extra = result.model_versions.get("head"), notices.journal_fields(result)
            log.info("%s/%s: revision %d by head %s", result.source, result.path, result.revision, head, extra=extra)
            self._on_revised(target, result)


def _before(target: Path, result: ReviewRecord) -> ReviewRecord | None:
    """The revision before this one; None where it was taken away."""
    try:
        return results.read(results.revision_path(target, result.revision - 1))
    except ImageError:
        return None


def features_of(found: Iterable[Record]) -> list[UnknownFeatures]:
    """What the ledger keeps of records, so that a later head can judge them again."""
    return [
        UnknownFeatures(
            id=record.id,
            created_utc=record.created_utc,
            source=record.source,
            path=record.path,
            sha256=record.sha256,
            page=record.page,
            defect_id=record.defect_id,
            box_xyxy=record.box_xyxy,
            recipe_id=record.recipe_id,
            encoder=record.model_hashes.get("encoder") or str(record.model_versions.get("encoder", "")),
            features=record.features.astype("<f4").tobytes(),
        )
        for record in found
    ]


# --- records of a revision -----------------------------------------------------------------------------------------


def replaces(verdict: Verdict, current: VerdictRecord, head: Meta) -> bool:
    """Say whether a new verdict takes the place of the one that stands."""
    if verdict.label is None:
        return current.label is not None and current.label not in head.labels
    return (verdict.kind, verdict.label) != (current.kind, current.label)


def read_marker(path: Path) -> Marker:
    """Read ``reread.json``; an empty marker where there is none.

    Raises:
        ConfigError: it is broken.
    """
    try:
        return Marker.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Marker()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check its rights") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error)}; delete it, re-review then only looks once more") from error
