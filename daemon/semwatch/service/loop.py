"""The daemon's life: start, the loop, stop.

Start order: ledger (locks out a second daemon), models, metrics, folders; then READY. The loop, in one thread, hands
files to workers, delivers the outbox and the audit log, and tells systemd that it is alive. Folders are looked at in a
thread of their own, so what waits is counted during a pause too. A worker does the work on one file: ``one_file``.
Stop order: take no more files, let those in flight finish within the bound, deliver what the outbox holds, close
folders, models and ledger. A second signal leaves at once: the ledger brings the work back.

Crash safety: deliveries are repeated until confirmed and are idempotent at the other end (stream id, audit seq); what a
worker leaves behind, ``one_file`` says.
"""

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType

from semwatch.errors import ConfigError, SemwatchError, ServiceUnavailable
from semwatch.intake.decoders import Decoders
from semwatch.intake.drop_folder import Arrival, Incoming
from semwatch.intake.folder_rules import Folder
from semwatch.line import pipeline
from semwatch.service import drift, faults, gate_watch, learning_side, migration, rereview
from semwatch.service.delivery import Backoff, connect_handoff, connect_publisher, deliver_audit, publish_outbox
from semwatch.service.drift import DriftWatch
from semwatch.service.duplicates import Duplicates
from semwatch.service.forgetting import Forgetting
from semwatch.service.gate_watch import GateWatch
from semwatch.service.hooks import Hooks
from semwatch.service.late_look import LateLook
from semwatch.service.lot_tables import LotTables
from semwatch.service.lots_done import LotsDone
from semwatch.service.manifests import ManifestFiles
from semwatch.service.metrics import Metrics
from semwatch.service.models_in_service import ModelsInService
from semwatch.service.one_file import FileWork
from semwatch.service.recipe_edits import RecipeEdits
from semwatch.service.references import References
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import Site, check_outbox
from semwatch.store import pause
from semwatch.store.audit import AUDIT, AuditLog
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.pause import Pause
from semwatch.store.result_index import INDEX, ResultIndex, open_index
from semwatch.store.review_record import printable
from semwatch.system.files import make_folder
from semwatch.system.journal import about
from semwatch.system.notify import Notifier, watchdog_interval_s

log = logging.getLogger(__name__)

TICK_S = 0.5
LOG_AGAIN_S = 60.0
"""Seconds after which a fault that lasts is logged again."""
BESIDE_WORK_S = 0.02
"""Seconds of re-review between two looks at files under way."""


class Service:
    """Everything a running daemon holds open.

    Args:
        site: validated settings.
        stop: set from outside, for instance by a signal handler, to end the loop; may be set before it begins.
        environ: for systemd's NOTIFY_SOCKET and WATCHDOG_USEC.

    Raises:
        ConfigError, ModelMismatch: at construction, saying what to fix.
    """

    def __init__(
        self, site: Site, *, stop: threading.Event | None = None, environ: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.site = site
        self.recipes = {folder.source: load_recipe(folder.recipe) for folder in site.folders}
        for folder in site.folders:
            check_outbox(site.folders, self.recipes[folder.source].klarf.outbox, folder.recipe)
        self._notifier = Notifier(environ)
        self._beat_s = watchdog_interval_s(environ) or TICK_S
        self._stop = stop or threading.Event()
        self._open = ExitStack()
        try:
            self._start()
        except BaseException:
            self._open.close()
            raise

    def _start(self) -> None:
        site, keep = self.site, self._open
        _make(site.state_dir, waits=False)
        self.ledger = keep.enter_context(Ledger(site.state_dir / LEDGER))
        if not any(self.ledger.counts().values()):  # later, a folder that is not there is a share that is away
            _make(site.results_dir, waits=True)
        self._audit = keep.enter_context(AuditLog(site.state_dir / AUDIT))
        if self._audit.last_seq > self.ledger.last_audit_seq():
            raise ConfigError(
                f"{self._audit.path} ends at line {self._audit.last_seq}, further than the ledger has ever counted: it "
                f"belongs to an earlier ledger; move it aside, keep it, and start again"
            )
        limits = site.limits  # a decoder for each worker, started while the models load
        self._decoders = keep.enter_context(
            Decoders(limits.in_flight, cpu_s=limits.decode_cpu_s, max_pixels=limits.max_image_px)
        )
        self.metrics = Metrics(self.recipes)
        keep.callback(self.metrics.close)
        self._models = ModelsInService(
            site.models, self.recipes.values(), state_dir=site.state_dir, metrics=self.metrics
        )
        keep.callback(self._models.close)
        for recipe in self.recipes.values():
            pipeline.gate_threshold(recipe, self._models.of(recipe))  # refuses now rather than at the first file
        self._publisher = connect_publisher(site)
        self._handoff = connect_handoff(site)
        self._presence = learning_side.Presence(self._handoff, site.name) if self._handoff else None
        self._are_classes_read = self._handoff is None
        migration.take_over_unknowns(site, self.ledger)
        if self._handoff is not None:
            migration.take_over_wishes(site, self.ledger)
        self._note_heads()
        if site.metrics is not None:
            self.metrics.serve(site.metrics.host, site.metrics.port)
        self._watch_folders()
        self._prepare_file_work()
        self._start_beside_the_line()
        self._set_aside_what_kills()

    def _watch_folders(self) -> None:
        site, keep = self.site, self._open
        self._manifest_files = ManifestFiles(
            self.ledger, self.recipes, {folder.source: folder.path for folder in site.folders}, site.state_dir
        )
        folders = [
            Folder(
                **folder.model_dump(exclude={"recipe"}),
                is_manifest=partial(self._manifest_files.is_manifest, folder.source),
            )
            for folder in site.folders
        ]
        self._incoming = keep.enter_context(
            Incoming(folders, self.ledger.settled, reconcile_s=site.reconcile_s, poll_s=site.poll_s)
        )
        self._pool = ThreadPoolExecutor(site.limits.in_flight, thread_name_prefix="review")
        keep.callback(self._pool.shutdown, wait=False, cancel_futures=True)
        self._working: dict[Future[None], tuple[Arrival, float]] = {}
        self._places = {folder.source: folder.path for folder in site.folders}
        self._late_look = LateLook(self.ledger, self._places, self._incoming)
        keep.callback(self._late_look.close)
        self._next_beat = 0.0
        self._has_new_detector = self._has_new_recipe = False
        self._pause: Pause | None = None
        self._is_pause_stated = False
        self._log_again = 0.0
        self._away_because = ""
        self._folders_away = {source: Backoff() for source in self._places}
        self._away = Backoff()

    def _prepare_file_work(self) -> None:
        site, keep = self.site, self._open
        self._index = self._open_index()
        self._hooks = Hooks(
            site,
            ledger=self.ledger,
            index=self._index,
            unsettled=self._incoming.unsettled,
            metrics=self.metrics,
        )
        keep.callback(self._hooks.close)
        self._drift = DriftWatch.load(site.state_dir / drift.STATE)
        keep.callback(self._drift.save, site.state_dir / drift.STATE)
        self._gates = GateWatch.load(site.state_dir / gate_watch.STATE)
        keep.callback(self._gates.save, site.state_dir / gate_watch.STATE)
        self._next_drift = time.monotonic() + drift.SAVE_EVERY_S
        folders = {folder.source: folder for folder in site.folders}
        self._file_work = FileWork(
            site,
            self.recipes,
            self.ledger,
            metrics=self.metrics,
            models=self._models,
            decode=self._decoders.decode,
            incoming=self._incoming,
            manifests=self._manifest_files,
            references=References(folders, self.recipes, limits=site.limits, decode=self._decoders.decode),
            drift=self._drift,
            gates=self._gates,
            publishes=self._publisher is not None,
            alarm=self._hooks.alarm,
        )

    def _start_beside_the_line(self) -> None:
        """What follows reviews: tables, notes of duplicates, re-review, forgetting."""
        site, keep = self.site, self._open
        self._tables = LotTables(self.ledger.lot_rows, site.results_dir, self._index)
        self._lots_done = LotsDone(
            self.ledger,
            self.recipes,
            self._places,
            results_dir=site.results_dir,
            state_dir=site.state_dir,
            site=site.name,
            codes_of=self._codes_of,
        )
        self._tables_thread = ThreadPoolExecutor(1, thread_name_prefix="tables")
        keep.callback(self._tables_thread.shutdown)
        self._tables_step: Future[None] | None = None
        self._duplicates = Duplicates(self.ledger, site.results_dir, self._file_work.messages_of_duplicate)
        self._publishing = Backoff()
        self._rereview = rereview.Rereview(
            self._models.by_pins,
            self.recipes,
            self.ledger,
            results_dir=site.results_dir,
            state_dir=site.state_dir,
            days=site.learning.reread_days,
            publishes=self._publisher is not None,
            is_busy=self._is_in_review,
            on_revised=lambda _, result: self.metrics.observe_revision(result),
        )
        keep.callback(self._rereview.close)
        self._has_more_to_reread = False
        self._recipe_edits = RecipeEdits(site.folders, self.recipes, self._models, self.ledger, site.state_dir)
        self._forgetting = Forgetting(
            self.ledger, self._places, keep_days=site.ledger.keep_days, reread_days=site.learning.reread_days
        )

    def _open_index(self) -> ResultIndex | None:
        """The index of the results; the line goes on without it, for it is a cache."""
        try:
            return self._open.enter_context(open_index(self.site.state_dir / INDEX))
        except (ConfigError, ServiceUnavailable) as error:
            log.error("the results are not indexed: %s", error)
            return None

    def run(self) -> bool:
        """Work until ``stop``; return when everything is closed, False if a review outlasted the bound on stopping.

        Such a review's thread cannot be ended: the caller leaves the process without waiting for it, and the ledger
        brings the work back.

        An exception that is not in the error tree is a bug: in the work on a file it counts as a failed attempt at that
        file, elsewhere it ends the daemon.
        """
        self._incoming.start()
        self._notifier.ready()
        self.metrics.ready.set(1)
        versions = self._models.versions()
        log.info("ready: %d folders, models %s", len(self.recipes), versions, extra=about(models=versions))
        try:
            while not self._stop.is_set():
                try:
                    self._beat()
                    self._take_files()
                    self._reap()
                    self._reread()
                    self._deliver()
                    self._note_quiet()
                except ServiceUnavailable as error:  # the disk under ledger or audit log
                    self._note_away(error)
                    self._stop.wait(TICK_S)
        finally:
            all_finished = self._shut_down()
        return all_finished

    # --- the loop --------------------------------------------------------------------------------------------------

    def _take_files(self) -> None:
        # Work that killed the process is tried alone: it must not cost its neighbours an attempt. So is the first file
        # after a service was away.
        is_one_alone = self._away.is_down or self._has_suspects()
        free = (1 if is_one_alone else self.site.limits.in_flight) - len(self._working)
        if self._reason_to_wait() or free <= 0 or self._has_new_detector or self._has_new_recipe:
            wait(self._working, timeout=min(self._beat_s, TICK_S), return_when=FIRST_COMPLETED)
            if not self._working:
                self._stop.wait(min(self._beat_s, TICK_S))
            return
        is_idle = not self._working and not self._has_more_to_reread
        timeout_s = min(self._beat_s, TICK_S) if is_idle else 0.02
        for arrival in self._incoming.arrivals(timeout_s, limit=free):
            self._working[self._pool.submit(self._file_work.process, arrival)] = arrival, time.monotonic()

    def _reap(self) -> None:
        for future in [future for future in self._working if future.done()]:
            arrival, _ = self._working.pop(future)
            error = future.exception()
            if error is None:
                self._folders_away[arrival.source].worked()
                if self._away.worked():
                    log.info("what was away answers again: %s", self._away_because)
            else:
                self._note_fault(arrival, error)
            self._incoming.release(arrival)
        self._duplicates.step()
        self._step_tables()
        self._hooks.step()
        self._late_look.step()

    def _step_tables(self) -> None:
        """Tables, index and lots are brought up to date in a thread of their own: however long it takes."""
        if self._tables_step is None or self._tables_step.done():
            before, self._tables_step = self._tables_step, self._tables_thread.submit(self._follow)
            if before is not None:
                before.result()

    def _codes_of(self, head: int | None) -> Mapping[str, int]:
        """Codes that people gave to found classes: of the head that judged, then of the one that serves."""
        now = self._models.codes_of_head(self._models.versions().get("head"))
        return {**now, **self._models.codes_of_head(head)}

    def _follow(self) -> None:
        self._tables.step()
        self._lots_done.step()

    def _note_fault(self, arrival: Arrival, error: BaseException) -> None:
        """Say what failed, and let wait who has to: the file, its folder, or the line."""
        scope, why = self._file_work.scope_of(arrival, error), faults.in_words(error)
        self.metrics.errors.labels(service="line" if scope == "service" else scope).inc()
        extra = self._file_work.about(arrival, "waits")
        if scope == "service":
            self._note_away(error)
            log.warning("%s waits in its folder: %s", arrival.path, why, extra=extra)
        elif scope == "folder":
            backoff = self._folders_away[arrival.source]
            if backoff.failed():
                log.warning("the files of %s wait: %s", arrival.source, why, extra=extra)
            self._incoming.hold(arrival.source, backoff.left_s())
        else:
            is_bug = not isinstance(error, SemwatchError | OSError | MemoryError)
            log.warning(
                "%s waits in its folder, the others go on: %s",
                arrival.path,
                why,
                extra=extra,
                exc_info=is_bug and error,
            )

    def _note_away(self, error: BaseException) -> None:
        self._away_because = faults.in_words(error)
        if self._away.failed() or time.monotonic() >= self._log_again:
            self._log_again = time.monotonic() + LOG_AGAIN_S
            log.error("the line waits: %s", self._away_because)

    def _note_quiet(self) -> None:
        """With no file left to show that what was away answers, a whole turn of the loop shows it."""
        is_idle = not self._working and self._incoming.waiting()[0] == 0
        if is_idle and not self._away.is_waiting() and self._away.worked():
            log.info("what was away answers again: %s", self._away_because)

    def _reread(self) -> None:
        """Judge unknowns again after a swap, a slice at a time: a long one between files, a short one beside them."""
        self._has_more_to_reread = self._rereview.step(BESIDE_WORK_S if self._working else rereview.SLICE_S)

    def _is_in_review(self, source: str, path: str) -> bool:
        return any((a.source, printable(a.path)) == (source, path) for a, _ in self._working.values())

    def _reason_to_wait(self) -> Pause | None:
        """Why no file is taken now; files wait in the folder, which is the buffer."""
        free, why = self._free_bytes()
        if free is None:
            return Pause("results away", f"{self.site.results_dir} cannot be reached: {why}")
        if self._away.is_waiting():
            return self._why_away()
        if free < self.site.limits.min_free_mb * 1e6:
            return Pause("disk full", f"disk nearly full, {free / 1e6:.0f} MB free")
        redis = self.site.redis
        if redis is not None and (n := self.ledger.n_unpublished()) >= redis.max_unpublished:
            return Pause("Redis away", f"Redis away, {n} records wait for it")
        return None

    def _why_away(self) -> Pause:
        return Pause("service away", self._away_because)

    def _free_bytes(self) -> tuple[int | None, str]:
        """Room for results; None and why where their folder cannot be reached."""
        try:
            return shutil.disk_usage(self.site.results_dir).free, ""
        except OSError as error:
            return None, error.strerror or str(error)

    def _has_suspects(self) -> bool:
        """Whether work that the process died on lies in its folder, waiting for another try."""
        return any(
            work.source in self._places and faults.is_there(self._places[work.source] / work.path)
            for work in self.ledger.suspects()
        )

    def _set_aside_what_kills(self) -> None:
        """A crash loop names itself: what the process died on again and again is tried no more."""
        for work in self.ledger.suspects():
            if work.attempts >= self.site.limits.max_attempts and work.source in self.recipes:
                why = f"gave up after {work.attempts} attempts that failed or ended the process"
                try:
                    self._file_work.quarantine(work, why, 0)
                except ServiceUnavailable as error:
                    log.warning("%s is set aside when it comes up again: %s", work.path, error)

    def _deliver(self) -> None:
        """Hand the outbox to Redis and the audit lines to their file."""
        deliver_audit(self.ledger, self._audit)
        if self._publisher is None or self._publishing.is_waiting():
            return
        try:
            publish_outbox(self.ledger, self._publisher)
            self._meet_learning()
        except ServiceUnavailable as error:
            if self._publishing.failed():
                log.warning("records wait in the outbox: %s", error)
            self.metrics.errors.labels(service="redis").inc()
        else:
            if self._publishing.worked():
                log.info("Redis takes records again")

    def _meet_learning(self) -> None:
        """Say what serves; at the first meeting, put an older site's found classes where learning looks."""
        assert self._handoff is not None
        assert self._presence is not None
        self._presence.renew(self._models.versions(), self._models.refused(), self._models.hashes())
        if not self._are_classes_read:
            self._are_classes_read = True
            try:
                learning_side.register_of(self.site, self._handoff, f"daemon-{self.site.name}").read()
            except ConfigError as error:  # learning and `semwatch clusters` say the same; the line needs them not
                log.error("the found classes cannot be read: %s", error)

    def _note_heads(self) -> None:
        learning_side.note_published_heads(self.ledger, self.site.models.repository, self._models.versions()["head"])

    def _beat(self) -> None:
        """Tell systemd and Prometheus how it stands; a hang of this loop or of a review in a worker silences it."""
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + min(self._beat_s, TICK_S)
        if self._models.refresh():
            self._note_heads()
        # A detector changes between two images: nothing is taken until those in review are done.
        self._has_new_detector = self._models.has_new_detector()
        if self._has_new_detector and not self._working:
            self._models.refresh_detector()
            self._has_new_detector = False
        self._has_new_recipe = self._recipe_edits.look()  # so does a recipe
        if self._has_new_recipe and not self._working:
            self._recipe_edits.use()
            self._has_new_recipe = False
        for model in ("detector", "head"):
            for version, why in self._models.refused(model).items():
                self._hooks.alarm("model refused", f"{model} {version}", why)
        self._forgetting.step()
        if self.ledger.others_wrote():
            self._incoming.look_anew()  # someone took a file out of quarantine
        n_waiting, oldest_s = self._incoming.waiting()
        longest_s = max((now - start for _, start in self._working.values()), default=0.0)
        if longest_s < self.site.limits.review_timeout_s:
            self._notifier.watchdog()
            # Between two tries of a service that is away nothing has changed yet.
            reason = self._reason_to_wait() or (self._why_away() if self._away.is_down else None)
        else:
            reason = Pause("review hangs", f"a review hangs, since {longest_s:.0f} s")
        self._say_pause(reason)
        self._notifier.status(
            f"{n_waiting} waiting, {len(self._working)} in review" + (f"; paused: {reason.sentence}" if reason else "")
        )
        self.metrics.in_flight.set(len(self._working))
        self.metrics.waiting_files.set(n_waiting)
        self.metrics.oldest_waiting_seconds.set(oldest_s)
        self.metrics.unpublished_records.set(self.ledger.n_unpublished())
        self.metrics.disk_free_bytes.set(self._free_bytes()[0] or 0)
        for (source, what), value in self._drift.values().items():
            self.metrics.drift.labels(source, what).set(value)
        if now >= self._next_drift:
            self._next_drift = now + drift.SAVE_EVERY_S
            self._drift.save(self.site.state_dir / drift.STATE)
            self._gates.save(self.site.state_dir / gate_watch.STATE)

    def _say_pause(self, now: Pause | None) -> None:
        """Say that the line pauses and why, and that it goes on: in metrics, in a file, and once in the log."""
        for reason in pause.REASONS:
            self.metrics.paused.labels(reason).set(now is not None and now.reason == reason)
        before = self._pause and self._pause.reason
        if (now and now.reason) == before and self._is_pause_stated:
            return
        if now is None and before is not None:
            log.info("goes on after a pause: %s", before)
        elif now is not None and now.reason not in (before, "service away"):  # which has lines of its own
            # Redis and shares come back by themselves; a disk is freed, and a hang looked into, by a person.
            level = logging.WARNING if now.reason in ("Redis away", "results away") else logging.ERROR
            log.log(level, "paused: %s", now.sentence)
        if now is not None:
            self._hooks.alarm(f"paused: {now.reason}", self.site.name, now.sentence)
        self._pause = now
        try:
            pause.state(self.site.state_dir, now)
            self._is_pause_stated = True
        except OSError:
            self._is_pause_stated = False  # again at the next beat

    def _shut_down(self) -> bool:
        self._notifier.stopping()
        self.metrics.ready.set(0)
        unfinished = wait(self._working, timeout=self.site.limits.stop_timeout_s).not_done
        try:
            for future, (arrival, _) in self._working.items():
                if future.done() and (error := future.exception()):
                    extra = self._file_work.about(arrival, "waits")
                    log.error("a review failed while stopping: %s", error, extra=extra)
            self._say_pause(None)
            running = [self._tables_step] if self._tables_step else []
            if not wait(running, timeout=self.site.limits.stop_timeout_s).not_done:
                self._tables.step(is_last=True)
            self._deliver()
            if self._presence is not None:
                self._presence.end()
        except ServiceUnavailable as error:
            log.warning("left for the next start: %s", error)
        finally:
            self._open.close()
        log.info("stopped, %d reviews left unfinished", len(unfinished))
        return not unfinished


def _make(folder: Path, *, waits: bool) -> None:
    """Make a folder of the site.

    Args:
        folder: to be made.
        waits: the line waits for it where it cannot be made now.

    Raises:
        ConfigError: something else lies there.
        ServiceUnavailable: it cannot be made now.
    """
    try:
        make_folder(folder)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); make it, or name another") from error
    except OSError as error:
        if not waits:
            raise ServiceUnavailable(f"{folder} cannot be made now ({error.strerror}); mend its disk") from error
