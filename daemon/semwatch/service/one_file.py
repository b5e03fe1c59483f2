"""The work on one file, in a worker thread: read, decode, judge, write, or put aside with a reason.

Straight code from a file's bytes to the ledger's commit; whose fault a failure is, ``faults`` says, and the loop lets
wait who has to.

Crash safety: the result is on disk, whole, before the ledger says DONE; outbox records and the audit line are in the
same transaction as DONE.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from semwatch.defects import Review
from semwatch.errors import FileUnavailable, ImageError, ServiceUnavailable
from semwatch.intake import decoding
from semwatch.intake.decoding import Decode
from semwatch.intake.drop_folder import Arrival, Incoming
from semwatch.intake.tiff import HEADS, only_pages
from semwatch.line import notices, pipeline
from semwatch.line.class_codes import class_codes
from semwatch.line.pipeline import ReferenceFile
from semwatch.service import drift, faults, gate_watch, learning_side, parts, rereview
from semwatch.service.drift import Alarm, DriftWatch
from semwatch.service.gate_watch import GateWatch
from semwatch.service.late_look import look_again_utc
from semwatch.service.lot_tables import row_of
from semwatch.service.manifests import ManifestFiles, check_size
from semwatch.service.metrics import Metrics
from semwatch.service.models_in_service import ModelsInService
from semwatch.service.references import References
from semwatch.settings.recipe import Recipe
from semwatch.settings.site import Site
from semwatch.store import results
from semwatch.store.ledger import Claim, Ledger, OutboxItem, Work
from semwatch.store.lot_rows import LotRow
from semwatch.store.manifests import NamedFile
from semwatch.store.review_record import ReviewRecord, printable, to_record
from semwatch.streams import records
from semwatch.streams.records import Outcome, Record
from semwatch.system.clock import utc_now
from semwatch.system.journal import about

log = logging.getLogger(__name__)


class FileWork:
    """What the work on a file needs; any worker thread may call.

    Args:
        site: validated settings.
        recipes: by source.
        ledger: that claims and finishes.
        metrics: that count.
        models: in service.
        decode: bytes to pages.
        incoming: says since when a file fails.
        references: of the images.
        manifests: KLARFs that name images.
        drift: watches scores.
        gates: watch scores too.
        publishes: whether messages leave for Redis.
    """

    def __init__(
        self,
        site: Site,
        recipes: Mapping[str, Recipe],
        ledger: Ledger,
        *,
        metrics: Metrics,
        models: ModelsInService,
        decode: Decode,
        incoming: Incoming,
        references: References,
        manifests: ManifestFiles,
        drift: DriftWatch,
        gates: GateWatch,
        publishes: bool,
        alarm: Callable[[str, str, str], None] = lambda _alarm, _source, _sentence: None,
    ) -> None:
        self._alarm = alarm
        self._site, self._recipes, self._ledger, self._metrics = site, recipes, ledger, metrics
        self._models, self._decode, self._incoming, self._references = models, decode, incoming, references
        self._manifests = manifests
        self._drift, self._gates, self._publishes = drift, gates, publishes
        self._places = {folder.source: folder.path for folder in site.folders}

    def process(self, arrival: Arrival) -> None:
        """Review one file, from its bytes to the ledger's commit; an error that is raised says that it waits."""
        start = time.perf_counter()
        if self._manifests.is_manifest(arrival.source, arrival.path):
            self._take_manifest(arrival)
            return
        named = self._manifests.naming(arrival)
        if self._manifests.waits(arrival, named) or (named is None and self._references.waits(arrival)):
            return  # it comes again
        data = self._read(arrival)
        if data is None:
            return
        partner = self._references.partner_of(arrival) if named is None else None
        if partner is not None:
            self._note_reference(arrival, data, f"a reference of {printable(partner)}, not reviewed by itself", partner)
            return
        if named is not None and not named.pages:
            self._note_reference(arrival, data, "named by its KLARF as no image to judge, not reviewed by itself")
            return
        claim = self._claim(arrival, hashlib.sha256(data).hexdigest(), look_again_utc=look_again_utc(arrival.stamp))
        if not claim.is_mine:
            self._note_not_mine(claim)
            return
        try:
            self._review_or_refuse(claim, arrival, data, start, named)
        except Exception as error:
            self._give_back(claim, arrival, error, len(data))
            raise

    def _read(self, arrival: Arrival) -> bytes | None:
        """Read a file; None where it comes again, is gone, or was refused."""
        try:
            data = decoding.read_file(arrival.file, below=self._places[arrival.source])
        except (ImageError, ServiceUnavailable) as error:
            is_there, is_locked = faults.is_there(arrival.file), isinstance(error.__cause__, PermissionError)
            if isinstance(error, ImageError) and not is_there:
                return None  # the tool took it away again; nothing was promised
            is_refused = isinstance(error, ImageError) and not is_locked
            if is_refused or (is_there and self._is_hopeless(arrival, error)):
                self._refuse_unread(arrival, str(error))
                return None
            if is_locked:  # rights may come a moment later than the file
                raise FileUnavailable(str(error)) from error
            raise
        # Still growing, or written meanwhile: it comes again.
        is_as_it_was = faults.stamp_now(arrival.file, like=arrival.stamp) == arrival.stamp
        return data if is_as_it_was and len(data) == arrival.size else None

    def scope_of(self, of: Arrival | Claim, error: BaseException) -> faults.Scope:
        """Whose fault an error is that ended the work on a file."""
        return faults.scope_of(error, folder=self._places[of.source], results_dir=self._site.results_dir)

    def _is_hopeless(self, arrival: Arrival, error: BaseException) -> bool:
        """Whether a file that can neither be read nor have its result written has been tried for long enough."""
        return self._incoming.failing_s(arrival) >= faults.PATIENCE_S and self.scope_of(arrival, error) == "file"

    def _review_or_refuse(
        self, claim: Claim, arrival: Arrival, data: bytes, start: float, named: NamedFile | None
    ) -> None:
        if self._is_given_up(claim, len(data)):
            return
        try:
            if named is None:
                self._review(claim, data, self._references.read(arrival), start)
            else:
                reference = self._manifests.read_reference(claim.source, named)
                if len(named.pages) > parts.PAGES and data[:4] in HEADS:
                    self._review_in_parts(claim, data, reference, start, named)
                else:
                    self._review(claim, data, reference, start, named.pages)
        except ImageError as error:
            self.quarantine(claim, str(error), len(data))

    def _is_given_up(self, claim: Claim, size: int) -> bool:
        """Put aside what was tried often enough."""
        if claim.attempts < self._site.limits.max_attempts:
            return False
        self.quarantine(claim, f"gave up after {claim.attempts} attempts that failed or ended the process", size)
        return True

    def _give_back(self, claim: Claim, arrival: Arrival, error: Exception, size: int) -> None:
        """After a failure: let the work wait, or put it aside where it failed by itself and often enough."""
        is_of_disk = faults.is_of_disk(error)
        is_attempt = not is_of_disk and self.scope_of(claim, error) == "file"
        if (is_of_disk and self._is_hopeless(arrival, error)) or (
            is_attempt and claim.attempts + 1 >= self._site.limits.max_attempts
        ):
            why = f"gave up after {claim.attempts + 1} attempts: {faults.in_words(error)}"
            self._set_aside(claim, why, size)
        else:
            self._ledger.give_back(claim, faults.in_words(error), is_attempt=is_attempt)

    def _claim(self, arrival: Arrival, sha256: str, *, look_again_utc: str | None = None) -> Claim:
        return self._ledger.claim(
            arrival.source,
            arrival.path,
            sha256=sha256,
            stamp=arrival.stamp,
            now_utc=utc_now(),
            look_again_utc=look_again_utc,
        )

    def _take_manifest(self, arrival: Arrival) -> None:
        """Take a KLARF as the manifest of its lot, or put it aside; its images then come at once."""
        try:
            check_size(arrival.size, self._recipes[arrival.source])
        except ImageError as error:
            self._refuse_unread(arrival, str(error))
            return
        data = self._read(arrival)
        if data is None or self._manifests.is_unfinished(arrival, data):
            return  # it comes again
        claim = self._claim(arrival, hashlib.sha256(data).hexdigest(), look_again_utc=look_again_utc(arrival.stamp))
        is_back = claim.outcome == "settled" and self._manifests.is_another(claim.source, claim.path, claim.sha256)
        if not (claim.is_mine or is_back):
            self._note_not_mine(claim)
            return
        try:
            self._read_manifest(claim, data)
        except Exception as error:
            if claim.is_mine:
                self._give_back(claim, arrival, error, len(data))
            raise

    def _read_manifest(self, claim: Claim, data: bytes) -> None:
        if claim.is_mine and self._is_given_up(claim, len(data)):
            return
        try:
            taken = self._manifests.read(claim.source, claim.path, claim.sha256, data)
        except ImageError as error:
            if claim.is_mine:
                self.quarantine(claim, str(error), len(data))
            return
        now_utc = utc_now()
        audit = {"event": "klarf", "utc": now_utc, "source": claim.source, "path": printable(claim.path),
                 "sha256": claim.sha256, "lot": taken.new.about["lot_id"], "defects": taken.new.n_defects,
                 "images": len(taken.new.files), "again": len(taken.new.again)}  # fmt: skip
        if claim.is_mine:
            cleared = results.remove_aside(self._site.results_dir, claim.source, claim.path)  # of one refused before
            lot = None if cleared is None else cleared.relative_to(self._site.results_dir).as_posix()
            row = None if lot is None else LotRow(lot, None)
            self._ledger.finish(
                claim, outbox=(), audit=audit, now_utc=now_utc, reason=taken.sentence, manifest=taken.new, row=row
            )
        else:  # content that was taken before, and lies there again after another
            self._ledger.note(audit=audit, manifest=taken.new, now_utc=now_utc)
        log.info("%s/%s: %s", claim.source, claim.path, taken.sentence, extra=self.about(claim, "klarf"))
        self._incoming.try_now(claim.source)
        if taken.asks_again:
            self._incoming.look_anew()

    def _note_reference(self, arrival: Arrival, data: bytes, reason: str, partner: str = "") -> None:
        """Settle a reference: it is read when its image is reviewed, and is no work of its own.

        Its identity is not that of its content alone: an image of the same content is still reviewed.
        """
        claim = self._claim(arrival, hashlib.sha256(b"reference\0" + data).hexdigest())
        if not claim.is_mine:
            return
        now_utc = utc_now()
        audit = {
            "event": "reference",
            "utc": now_utc,
            "source": claim.source,
            "path": printable(claim.path),
            "sha256": claim.sha256,
            "content_sha256": hashlib.sha256(data).hexdigest(),
            "of": printable(partner),
        }
        self._ledger.finish(claim, outbox=(), audit=audit, now_utc=now_utc, reason=reason)
        log.info("%s/%s: %s", claim.source, claim.path, reason, extra=self.about(claim, "reference"))

    def _review(
        self,
        claim: Claim,
        data: bytes,
        reference: ReferenceFile | None,
        start: float,
        pages: Mapping[int, int | None] | None = None,
    ) -> None:
        recipe, review = self._recipes[claim.source], self._judge(claim, data, reference, pages)
        named = self._models.codes_of_head(review.model_versions.get("head"))
        faults.check_results(self._site.results_dir)
        paths = results.write(review, results_dir=self._site.results_dir, **class_codes(recipe, named))
        found = records.records(review)
        self._ledger.finish(
            claim,
            outbox=self._outbox(review, paths.record, found),
            audit=notices.audit_entry(paths.record, paths.json.name),
            now_utc=review.reviewed_utc,
            unknowns=rereview.features_of(found) if self._site.learning.reread_days > 0 else (),
            row=row_of(paths.json, self._site.results_dir, is_new=paths.is_new),
        )
        self._metrics.observe(review)
        self._watch_drift(review)
        self._watch_gate(review, claim)
        took_ms = (time.perf_counter() - start) * 1000
        stages = " ".join(f"{stage}={ms:.0f}" for stage, ms in review.timings_ms.items())
        extra = notices.journal_fields(paths.record)
        extra["journal"] |= self._manifests.place_of(claim.source, claim.path)
        log.info(
            "%s/%s: %d defects%s, %.0f ms (%s), models %s",
            claim.source, claim.path, review.n_defects, _flags_in_words(review), took_ms, stages,
            dict(review.model_versions), extra=extra,
        )  # fmt: skip

    def _outbox(self, review: Review, record: ReviewRecord, found: Sequence[Record]) -> list[OutboxItem]:
        """What a review gives to Redis: unknowns, doubtful crops, then its summary; nothing where there is none."""
        if not self._publishes:
            return []
        doubtful = records.doubtful(review, self._recipes[review.source].unknown.doubtful_significance)
        return [OutboxItem(*message) for message in notices.messages(found, record, doubtful)]

    def _judge(
        self, claim: Claim, data: bytes, reference: ReferenceFile | None, pages: Mapping[int, int | None] | None
    ) -> Review:
        recipe, limits = self._recipes[claim.source], self._site.limits
        models = self._models.of(recipe)
        return pipeline.review(
            data,
            source=claim.source,
            path=claim.path,
            sha256=claim.sha256,
            recipe=recipe,
            models=models,
            reviewed_utc=utc_now(),
            site=self._site.name,
            stream_threshold=self._gates.threshold(recipe, models.hashes()["detector"]),
            max_pixels=limits.max_image_px,
            max_pages=limits.max_pages,
            reference_file=reference,
            named_pages=pages,
            decode=self._decode,
        )

    def _review_in_parts(
        self, claim: Claim, data: bytes, reference: ReferenceFile | None, start: float, named: NamedFile
    ) -> None:
        """Judge the pages that KLARFs name of a file of many, part by part; it comes again where that takes long."""
        recipe = self._recipes[claim.source]
        models = self._models.of(recipe)
        _, there = only_pages(data, named.pages)
        if not there:
            raise ImageError(f"its KLARF names the pages {min(named.pages)} to {max(named.pages)}; the file has none")
        planned = parts.split({page: named.pages[page] for page in there}, self._site.limits.max_pages)
        kept = parts.KeptParts(self._site.state_dir, claim.sha256, recipe.id, planned, reference)
        is_begun = False  # one part at least each time
        for _ in range(pipeline.MAX_SWAPS):
            for n, part in enumerate(planned):
                if parts.is_by(kept.read(n), models.hashes()):
                    continue
                if is_begun and time.perf_counter() - start > parts.SLICE_S:
                    self._ledger.give_back(claim, f"part {n + 1} of {len(planned)} comes next")
                    return
                self._review_part(claim, data, reference, part, kept, n, named)
                is_begun = True
            found = [one for n in range(len(planned)) if (one := kept.read(n)) and parts.is_by(one, models.hashes())]
            if len(found) == len(planned):
                break
        else:
            raise ServiceUnavailable("a model changed again and again within one file")
        self._finish_parts(claim, parts.joined(found))
        kept.forget()
        log.info("%s/%s: %d parts, %.0f s", claim.source, claim.path, len(planned), time.perf_counter() - start)

    def _review_part(
        self,
        claim: Claim,
        data: bytes,
        reference: ReferenceFile | None,
        part: parts.Pages,
        kept: parts.KeptParts,
        n: int,
        named: NamedFile,
    ) -> None:
        """Judge one part: its pictures, records and features are where they belong before it is kept."""
        recipe, is_own = self._recipes[claim.source], named.reference is None
        wanted = {*part, *(page for page in part.values() if page is not None and is_own)}
        some, numbers = only_pages(data, wanted)
        pages = parts.as_numbered(part, numbers, own_references=is_own)
        review = parts.renumbered(self._judge(claim, some, reference, pages), numbers, own_references=is_own)
        codes = class_codes(recipe, self._models.codes_of_head(review.model_versions.get("head")))
        faults.check_results(self._site.results_dir)
        record = to_record(review, **codes)
        results.write_overlays(review, results_dir=self._site.results_dir)
        found = records.records(review)
        self._ledger.progress(
            claim,
            outbox=self._outbox(review, record, found)[:-1],  # the summary is of the whole file
            unknowns=rereview.features_of(found) if self._site.learning.reread_days > 0 else (),
        )
        kept.keep(n, record)
        self._metrics.observe(review)
        self._watch_drift(review)
        self._watch_gate(review, claim)

    def _finish_parts(self, claim: Claim, joined: ReviewRecord) -> None:
        results_dir = self._site.results_dir
        is_new = not results.review_path(results_dir, claim.source, claim.path).exists()
        place, record = results.write_record(joined, results_dir=results_dir, source=claim.source, path=claim.path)
        self._ledger.finish(
            claim,
            outbox=[OutboxItem(*notices.summary_message(record))] if self._publishes else [],
            audit=notices.audit_entry(record, place.name),
            now_utc=record.reviewed_utc,
            row=row_of(place, results_dir, is_new=is_new),
        )

    def about(self, it: Arrival | Claim | Work | Alarm, event: str) -> dict[str, dict[str, str]]:
        """The journal's fields of a file, or of a drop folder."""
        recipe, image = self._recipes[it.source], None if isinstance(it, Alarm) else it.path
        sha256 = it.sha256 if isinstance(it, Claim | Work) else None
        return about(event, it.source, image, sha256, recipe=recipe.name, recipe_id=recipe.id)

    def _watch_drift(self, review: Review) -> None:
        for alarm in self._drift.observe(review):
            self._metrics.drift_alarms.labels(alarm.source, alarm.what).inc()
            log.warning("drift: %s", alarm.sentence, extra=self.about(alarm, "drift"))
            self._alarm(f"drift: {alarm.what}", alarm.source, alarm.sentence)
            if alarm.what in drift.OF_TOOL:
                continue
            learning_side.wish_for_cycle(self._site, self._ledger, alarm, utc_now())

    def _watch_gate(self, review: Review, claim: Claim) -> None:
        """Say once what a stream's own scores propose; a change of the gate in use goes to the audit log too."""
        recipe = self._recipes[claim.source]
        change = self._gates.observe(review, recipe)
        if change is None:
            return
        self._gates.save(self._site.state_dir / gate_watch.STATE)  # what opens the gate outlives a crash
        log.info("gate of recipe %s: %s", recipe.name, change.sentence, extra=self.about(claim, "gate"))
        if change.is_used:
            audit = {"event": "gate", "utc": utc_now(), "source": claim.source, "recipe_id": recipe.id}
            self._ledger.note(audit={**audit, "threshold": change.threshold, "before": change.before})

    def quarantine(self, work: Claim | Work, reason: str, size: int) -> None:
        """Put work aside with its reason. What is wrong with its place among the results cannot keep it from that.

        Raises:
            ServiceUnavailable: the results or the ledger are away; nothing was put aside.
        """
        now_utc, row = utc_now(), None
        try:
            faults.check_results(self._site.results_dir)
            path, is_new = results.write_reason(
                results_dir=self._site.results_dir,
                source=work.source,
                path=work.path,
                sha256=work.sha256,
                reason=reason,
                attempts=work.attempts + 1,
                size=size,
                quarantined_utc=now_utc,
            )
            row = row_of(path, self._site.results_dir, is_new=is_new)
        except Exception as error:
            folder, results_dir = self._places.get(work.source, self._site.results_dir), self._site.results_dir
            if faults.scope_of(error, folder=folder, results_dir=results_dir) == "service":
                raise
            reason = f"{reason} (the reason is not beside the results: {faults.in_words(error)})"
        audit = {
            "event": "quarantined",
            "utc": now_utc,
            "source": work.source,
            "path": work.path,
            "sha256": work.sha256,
            "reason": reason,
        }
        messages = self._messages_aside(work, "refused", reason, now_utc)
        self._ledger.quarantine(work, reason, audit=audit, now_utc=now_utc, row=row, outbox=messages)
        self._metrics.quarantined.labels(source=work.source).inc()
        extra = self.about(work, "quarantined")
        log.error("%s/%s quarantined: %s", work.source, work.path, reason, extra=extra)
        self._alarm("quarantined", work.source, f"{work.source}/{work.path} quarantined: {reason}")

    def _messages_aside(self, work: Claim | Work, outcome: Outcome, reason: str, now_utc: str) -> list[OutboxItem]:
        """What leaves for Redis with a file that has no result of its own."""
        recipe = self._recipes.get(work.source)
        if not self._publishes or recipe is None:
            return []
        message = notices.aside_message(
            site=self._site.name,
            source=work.source,
            path=work.path,
            sha256=work.sha256,
            recipe=recipe,
            outcome=outcome,
            reason=reason,
            utc=now_utc,
        )
        return [OutboxItem(*message)]

    def messages_of_duplicate(self, work: Work, now_utc: str) -> list[OutboxItem]:
        """What leaves for Redis with a duplicate."""
        return self._messages_aside(work, "duplicate", f"the content of {work.reason}", now_utc)

    def _refuse_unread(self, arrival: Arrival, reason: str) -> None:
        """Quarantine a file that is not even read: its identity is its name and stamp."""
        stand_in = hashlib.sha256(f"{arrival.path}\0{arrival.stamp}".encode(errors="surrogateescape"))
        claim = self._claim(arrival, stand_in.hexdigest())
        if claim.is_mine:
            self._set_aside(claim, reason, arrival.size)

    def _set_aside(self, claim: Claim, reason: str, size: int) -> None:
        """Quarantine claimed work; where a service is away, the work waits.

        Raises:
            ServiceUnavailable: one is.
        """
        try:
            self.quarantine(claim, reason, size)
        except ServiceUnavailable:
            self._ledger.give_back(claim, reason)
            raise

    def _note_not_mine(self, claim: Claim) -> None:
        if claim.outcome == "duplicate":
            self._metrics.duplicates.labels(source=claim.source).inc()
            extra = self.about(claim, "duplicate")
            text = "%s/%s has the content of %s: not reviewed again"
            log.info(text, claim.source, claim.path, claim.original, extra=extra)


def _flags_in_words(review: Review) -> str:
    found = [page.quality.in_words for page in review.pages if page.quality.flags]
    return f", quality: {'; '.join(found)}" if found else ""
