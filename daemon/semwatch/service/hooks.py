"""Hooks: commands of the user's that are run when a lot is complete and when there is an alarm.

All of it happens in one thread of its own: a hook that hangs, and a disk that fails under its memory, hold up other
hooks at most, never the line. What has to be run is in ``store.hook_runs`` before it is run.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.service import host_event
from semwatch.service.metrics import Metrics
from semwatch.service.quiet_lots import QuietLots
from semwatch.settings.site import OF_LOTS, Site
from semwatch.settings.site import Hooks as HookSettings
from semwatch.store.hook_runs import HOOKS, HookRun, HookRuns
from semwatch.store.ledger import Ledger
from semwatch.store.result_index import ResultIndex
from semwatch.store.review_record import printable
from semwatch.system import commands
from semwatch.system.clock import utc_now

log = logging.getLogger(__name__)

MAX_WAIT_S = 300.0
"""Longest time between two attempts."""
MAX_NEWS = 1000
"""Alarms that wait for the thread; more are said in the log alone."""
_CLOSE_S = 10.0


class News(NamedTuple):
    """An alarm on its way to the thread of the hooks."""

    alarm: str
    source: str
    sentence: str


class Hooks:
    """What runs the hooks of a site; ``step`` belongs to the loop, ``alarm`` may be called from any thread.

    Args:
        ledger: that knows the lots that have a KLARF.
        index: of the results; None: there is none, and no lot without a KLARF is announced.
        unsettled: paths of a source's images that wait or are in flight.
    """

    def __init__(
        self,
        site: Site,
        *,
        ledger: Ledger,
        index: ResultIndex | None,
        unsettled: Callable[[str], list[str]],
        metrics: Metrics,
    ) -> None:
        self._site, self._settings, self._metrics = site, site.hooks, metrics
        self._stop = threading.Event()
        self._ways: dict[str, Callable[[Mapping[str, str]], commands.Ended]] = {}
        self._attempts = {"on_lot_done": site.hooks.attempts, "on_alarm": site.hooks.attempts}
        commands_given = {"on_lot_done": site.hooks.on_lot_done, "on_alarm": site.hooks.on_alarm}
        for name, argv in commands_given.items():
            if argv:
                self._ways[name] = _command(argv, site.hooks, self._stop, site.state_dir)
        if site.host_event is not None:
            self._ways["host_event"] = host_event.way(site.host_event, self._stop, site.state_dir)
            self._attempts["host_event"] = site.host_event.attempts
        self._of_lots = [name for name in self._ways if name != "on_alarm"]
        self._ledger, self._index, self._unsettled = ledger, index, unsettled
        self._news: queue.Queue[News] = queue.Queue(MAX_NEWS)
        self._last_alarm: dict[tuple[str, str], float] = {}
        self._held = ExitStack()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hooks")
        self._step: Future[None] | None = None
        self._runs: HookRuns | None = None
        self._lots: QuietLots | None = None
        self._not_before = 0.0

    def step(self) -> None:
        """Let the thread do what is to be done; return at once."""
        if not self._ways or self._stop.is_set():
            return
        if self._step is None or self._step.done():
            before, self._step = self._step, self._thread.submit(self._work)
            if before is not None:
                before.result()

    def alarm(self, alarm: str, source: str, sentence: str) -> None:
        """Run the hook of alarms, unless it was run for the same alarm of the same source a while ago."""
        if "on_alarm" not in self._ways:
            return
        key, now = (alarm, source), time.monotonic()
        last = self._last_alarm.get(key)
        if last is not None and now - last < self._settings.alarm_again_s:
            return
        self._last_alarm[key] = now
        try:
            self._news.put_nowait(News(alarm, source, sentence))
        except queue.Full:
            log.warning("the hook of an alarm is not run, too many wait: %s", sentence)

    def close(self) -> None:
        """End what runs; it is run again after the next start."""
        self._stop.set()
        if self._step is not None:
            try:
                self._step.result(_CLOSE_S)
            except (TimeoutError, ServiceUnavailable, ConfigError) as error:
                log.warning("hooks were left as they were: %s", error)
        self._thread.shutdown(wait=False)
        self._held.close()

    def _is_waiting(self, lot: str) -> bool:
        source, _, folder = lot.partition("/")
        return any(printable(path.rpartition("/")[0]) == folder for path in self._unsettled(source))

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if time.monotonic() < self._not_before:
            self._stop.wait(0.05)
            return
        try:
            runs = self._opened()
            self._take_news(runs)
            if self._of_lots:
                self._announce_revisions(runs)
            if self._lots is not None:
                self._announce(runs, self._lots)
            for run in runs.due(time.time()):
                if self._stop.is_set():
                    return
                self._take_news(runs)
                self._run(runs, run)
        except (ServiceUnavailable, ConfigError) as error:
            self._not_before = time.monotonic() + 60.0
            log.error("hooks wait a minute: %s", error)
        self._stop.wait(0.05)

    def _opened(self) -> HookRuns:
        if self._runs is None:
            path = self._site.state_dir / HOOKS
            self._runs = self._held.enter_context(HookRuns(path, now_utc=utc_now(), newest=self._newest_revision))
            if self._index is not None and self._of_lots:
                since, quiet_s = self._runs.since_utc(), self._settings.quiet_s
                self._lots = QuietLots(
                    self._index, self._runs.announced(), self._is_waiting, since_utc=since, quiet_s=quiet_s
                )
        return self._runs

    def _take_news(self, runs: HookRuns) -> None:
        while True:
            try:
                news = self._news.get_nowait()
            except queue.Empty:
                return
            utc = utc_now()
            variables = {"site": self._site.name, "utc": utc, **news._asdict()}
            runs.add("on_alarm", f"{news.alarm}\n{news.source}\n{utc}", variables, utc)

    def _newest_revision(self) -> int:
        newest = 0
        while found := self._ledger.manifests.done_after(newest):
            newest = found[-1].seq
        return newest

    def _announce_revisions(self, runs: HookRuns) -> None:
        """Lots with a KLARF: each revision, once it lies in its place."""
        for found in self._ledger.manifests.done_after(runs.revision()):
            folder = printable(found.path.rpartition("/")[0])
            lot = f"{found.source}/{folder}" if folder else found.source
            variables = {
                **self._of_lot(lot),
                "lot_id": str(found.about.get("lot_id") or ""),
                "klarf": found.files[-1].place if len(found.files) > 1 else "",
                "revision": str(found.revision),
                "defects": str(found.counts.get("defects", "")),
                "verdicts": str(found.counts.get("verdicts", "")),
            }
            key = f"{found.source}/{printable(found.path)}\n{found.seq}"
            runs.announce_revision(found.seq, key, self._of_lots, variables, variables["utc"])
            log.info("lot %s, revision %d: %s", lot, found.revision, found.why)

    def _announce(self, runs: HookRuns, lots: QuietLots) -> None:
        """Lots without one: each once it is quiet."""
        for lot in lots.look():
            if not self._has_klarf(lot.name):
                variables = {**self._of_lot(printable(lot.name)), "images": str(lot.n_images)}
                variables |= {"refused": str(lot.n_refused), "duplicates": str(lot.n_duplicates)}
                runs.announce(lot.name, lot.held, self._of_lots, variables, variables["utc"])
                log.info("lot %s is complete: %d images, %d refused", variables["lot"], lot.n_images, lot.n_refused)
            lots.mark(lot)

    def _of_lot(self, lot: str) -> dict[str, str]:
        path, utc = str(self._site.results_dir / lot), utc_now()
        return {**dict.fromkeys(OF_LOTS, ""), "site": self._site.name, "lot": lot, "path": path, "utc": utc}

    def _has_klarf(self, lot: str) -> bool:
        """Whether a KLARF says when a lot is done: one in its folder, or above it but not at the top."""
        source, _, folder = lot.partition("/")
        above = {printable(one.path.rpartition("/")[0]) for one in self._ledger.manifests.all_of(source)}
        return folder in above or any(one and folder.startswith(f"{one}/") for one in above)

    def _run(self, runs: HookRuns, run: HookRun) -> None:
        way = self._ways.get(run.hook)
        if way is None:
            runs.end(run, "given up", "the site has no such hook any more")
            return
        runs.begin(run)
        start = time.monotonic()
        ended = way(run.variables)
        if self._stop.is_set() and not ended.ok:
            runs.take_back(run)
            return
        attempts, took_s = run.attempts + 1, time.monotonic() - start
        about = f"hook {run.hook}, {run.variables.get('lot') or run.variables.get('alarm')}"
        output = f"; it said: {printable(ended.output)}" if ended.output else ""
        if ended.ok:
            runs.end(run, "done", ended.why)
            outcome = "done"
            log.info("%s: %s, %.1f s%s", about, ended.why, took_s, output)
        elif attempts >= self._attempts[run.hook]:
            runs.end(run, "given up", ended.why)
            outcome = "given up"
            log.error("%s is given up after %d attempts: %s%s", about, attempts, ended.why, output)
        else:
            wait_s = min(MAX_WAIT_S, self._settings.retry_s * 2.0 ** (attempts - 1))
            runs.end(run, "waits", ended.why, not_before_s=time.time() + wait_s)
            outcome = "failed"
            log.warning("%s failed, again in %.0f s: %s%s", about, wait_s, ended.why, output)
        self._metrics.hook_runs.labels(run.hook, outcome).inc()


def _command(
    argv: Sequence[str], settings: HookSettings, stop: threading.Event, cwd: Path
) -> Callable[[Mapping[str, str]], commands.Ended]:
    """A command with its placeholders: an argument that is one placeholder becomes its value, whatever that holds."""

    def run(variables: Mapping[str, str]) -> commands.Ended:
        filled = [variables[one[1:-1]] if one[:1] == "{" and one[1:-1] in variables else one for one in argv]
        environ = {f"SEMWATCH_HOOK_{name.upper()}": value for name, value in variables.items()}
        return commands.run(filled, environ, timeout_s=settings.timeout_s, stop=stop, cwd=str(cwd))

    return run
