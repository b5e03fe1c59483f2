"""A deterministic simulation of intake and delivery: the daemon's own code for one file and for deliveries, in a world
that a seed decides.

Real: ``FileWork.process``, ``Service._reap``, ``_deliver`` and all that they call for claims, faults, attempts,
quarantine and back-off; the ledger on SQLite; ``Waiting``. Simulated: the clock, files and their readability, results
on a disk that loses in a power cut what was not flushed, Redis, the audit log's file. Not simulated: threads (a review
runs to its end before the next begins), SQLite's own pages, scans, decoding and models.

The process dies at any effect: before or after a commit, a result, a message, a line. At the end all faults cease, and
``check`` holds what is left against the promises.
"""

import hashlib
import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.intake import decoding
from semwatch.intake.drop_folder import Arrival
from semwatch.intake.waiting import Waiting, backoff_s
from semwatch.service import delivery, faults, loop, one_file
from semwatch.service.delivery import Backoff
from semwatch.service.loop import Service
from semwatch.service.manifests import ManifestFiles
from semwatch.service.metrics import Metrics
from semwatch.service.one_file import FileWork
from semwatch.settings.recipe import Recipe
from semwatch.store import results
from semwatch.store.ledger import Ledger, OutboxItem
from semwatch.system import files
from semwatch.system.files import Stamp

SOURCE, UTC = "tool", "2026-01-01T00:00:00Z"
MAX_ATTEMPTS = 3
DROP, RESULTS = Path("/simulated/drop"), Path("/simulated/results")


class Death(BaseException):
    """The process dies here."""


@dataclass
class World:
    """All that outlives the process, and the faults of the moment."""

    rng: random.Random
    ledger_file: Path
    now: float = 1000.0
    files: dict[str, tuple[str, Stamp]] = field(default_factory=dict)
    """By path: content and stamp."""
    on_disk: set[tuple[str, str]] = field(default_factory=set)
    """Results that outlive a power cut, path and sha256: one of other content is kept under another name."""
    in_cache: set[tuple[str, str]] = field(default_factory=set)
    """These, and those that do not yet."""
    reasons: dict[str, str] = field(default_factory=dict)
    stream: list[str] = field(default_factory=list)
    audit: list[tuple[int, str]] = field(default_factory=list)
    busy: set[str] = field(default_factory=set)
    """Paths that cannot be read now."""
    is_results_away: bool = False
    is_redis_away: bool = False
    is_disk_of_ledger_full: bool = False
    died_on: Counter[str] = field(default_factory=Counter)
    """By content, how often the process died while it was at it."""
    dies_in: int | None = None
    """Effects until the process dies; None: it does not."""
    trace: list[str] = field(default_factory=list)
    n_effects: int = 0

    def effect(self, what: str) -> None:
        """Something that outlives the process is about to happen, or has just happened."""
        self.n_effects += 1
        self.trace.append(what)
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in <= 0:
                self.dies_in = None
                raise Death(what)

    def write_result(self, path: str, sha256: str, *, is_flushed: bool = True) -> None:
        if self.is_results_away:
            raise _away("results")
        self.effect(f"result {path}")
        self.in_cache.add((path, sha256))
        if is_flushed:
            self.on_disk.add((path, sha256))
        self.effect(f"result flushed {path}")

    def lose_power(self) -> None:
        self.in_cache = set(self.on_disk)


def _away(what: str) -> ServiceUnavailable:
    error = ServiceUnavailable(f"{what} away")
    error.__cause__ = OSError(5, what)
    return error


class SimulatedIncoming:
    """``Incoming`` without threads and folders: the rules of waiting are the real ones."""

    def __init__(self, world: World, ledger: Ledger) -> None:
        self.world, self.ledger, self.waiting = world, ledger, Waiting()

    def scan(self) -> None:
        done = self.ledger.settled(SOURCE, [(path, stamp) for path, (_, stamp) in self.world.files.items()])
        for path, (_, stamp) in self.world.files.items():
            known = self.waiting.get((SOURCE, path))
            if path in done:
                self.waiting.drop([(SOURCE, path)])
            elif known is None or known.stamp != stamp:
                self.waiting.put((SOURCE, path), stamp, due_at=self.world.now, now=self.world.now)

    def arrivals(self, limit: int) -> list[Arrival]:
        found = []
        for key in self.waiting.next(self.world.now, limit):
            file = self.waiting.take(key, self.world.now)
            if file is not None:
                found.append(Arrival(SOURCE, key[1], DROP / key[1], file.stamp))
        return found

    def release(self, arrival: Arrival) -> None:
        key = SOURCE, arrival.path
        try:
            done = self.ledger.settled(SOURCE, [(arrival.path, arrival.stamp)])
        except ServiceUnavailable:
            done = set()
        file = self.waiting.get(key)
        if file is None or not file.in_flight:
            return
        if done:
            self.waiting.drop([key], in_flight=True)
            return
        file.n_setbacks += 1
        file.failing_since = self.world.now if file.failing_since is None else file.failing_since
        self.waiting.reschedule(key, not_before=self.world.now + backoff_s(file.n_setbacks, 1.0, 30.0))

    def failing_s(self, arrival: Arrival) -> float:
        file = self.waiting.get((SOURCE, arrival.path))
        return 0.0 if file is None or file.failing_since is None else self.world.now - file.failing_since

    def hold(self, source: str, seconds: float) -> None:
        self.waiting.hold(source, self.world.now + seconds)


class SimulatedPublisher:
    def __init__(self, world: World) -> None:
        self.world = world

    def publish(self, items: Sequence[tuple[str, str, bytes]]) -> None:
        if self.world.is_redis_away:
            raise ServiceUnavailable("Redis is away")
        for _, id_, _ in items:
            self.world.effect(f"publish {id_}")
            self.world.stream.append(id_)
        self.world.effect("published")


class SimulatedAudit:
    """Takes a line once, by its number, as ``AuditLog`` does."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def last_seq(self) -> int:
        return self.world.audit[-1][0] if self.world.audit else 0

    def append(self, entries: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        for seq, event in entries:
            if seq > self.last_seq:
                self.world.effect(f"audit {seq}")
                self.world.audit.append((seq, f"{event['event']} {event['sha256']}"))
        self.world.effect("audit flushed")


class Process:
    """One life of the daemon."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ledger = Ledger(world.ledger_file)
        service = self.service = Service.__new__(Service)
        limits = SimpleNamespace(max_attempts=MAX_ATTEMPTS, in_flight=2, min_free_mb=0)
        service.site = SimpleNamespace(
            limits=limits,
            results_dir=RESULTS,
            name="site",
            redis=None,
            folders=[SimpleNamespace(source=SOURCE, path=DROP)],
        )  # type: ignore[assignment]
        service.recipes, service.ledger = {SOURCE: Recipe()}, self.ledger
        service.metrics = Metrics([SOURCE])
        self.incoming = service._incoming = SimulatedIncoming(world, self.ledger)  # type: ignore[assignment]
        idle = SimpleNamespace(step=lambda: None, alarm=lambda *_: None)
        service._duplicates = service._late_look = service._hooks = idle  # type: ignore[assignment]
        service._step_tables = idle.step  # type: ignore[method-assign]
        service._places, service._working = {SOURCE: DROP}, {}
        service._away, service._publishing, service._folders_away = Backoff(), Backoff(), {SOURCE: Backoff()}
        service._away_because, service._log_again = "", 0.0
        service._publisher, service._audit = SimulatedPublisher(world), SimulatedAudit(world)  # type: ignore[assignment]
        none: Any = None  # models and what watches scores: what ``_review`` stands for
        work = service._file_work = FileWork(
            service.site,
            service.recipes,
            self.ledger,
            metrics=service.metrics,
            models=none,
            decode=none,
            incoming=service._incoming,
            manifests=ManifestFiles(self.ledger, service.recipes, service._places, world.ledger_file.parent),
            references=SimpleNamespace(waits=lambda _: False, partner_of=lambda _: None, read=lambda _: None),  # type: ignore[arg-type]
            drift=none,
            gates=none,
            publishes=True,
        )
        work._review = self._review  # type: ignore[method-assign,assignment]
        work._messages_aside = lambda *_: []  # type: ignore[method-assign]
        service._meet_learning = lambda: None  # type: ignore[method-assign]
        try:
            service._set_aside_what_kills()
        except BaseException:
            self.ledger.close()
            raise

    def _review(self, claim: Any, data: bytes, *_: Any) -> None:
        """What stands for models and results: content says what becomes of it."""
        content = data.decode()
        if content.startswith("poison"):
            raise Death("poison")
        if content.startswith("bug"):
            raise RecursionError("a bug")
        if content.startswith("bad"):
            raise ImageError("no image")
        self.world.write_result(claim.path, claim.sha256)
        item = OutboxItem("results", f"{claim.sha256}", b"")
        audit = {"event": "reviewed", "sha256": claim.sha256}
        self.ledger.finish(claim, outbox=[item], audit=audit, now_utc=UTC)

    def step(self) -> None:
        """One turn of the loop."""
        service, world = self.service, self.world
        try:
            self.incoming.scan()
            if not service._away.is_waiting():
                is_alone = service._away.is_down or service._has_suspects()
                for arrival in self.incoming.arrivals(1 if is_alone else 2):
                    future: Future[None] = Future()
                    try:
                        service._file_work.process(arrival)
                    except Death:
                        world.died_on[world.files[arrival.path][0]] += 1
                        raise
                    except Exception as error:  # noqa: BLE001 - as the pool does
                        future.set_exception(error)
                    else:
                        future.set_result(None)
                    service._working[future] = arrival, 0.0
            service._reap()
            service._deliver()
        except ServiceUnavailable as error:
            service._note_away(error)

    def end(self) -> None:
        self.ledger.close()


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """Let the code under test see the world instead of the machine."""

    def read_file(path: Path, *, below: Path) -> bytes:
        assert below == DROP
        name = path.relative_to(DROP).as_posix()
        if name in world.busy:
            raise _away(name)
        content, _ = world.files[name]
        return content.encode()

    def write_reason(*, path: str, sha256: str, reason: str, **_: Any) -> tuple[Path, bool]:
        if world.is_results_away:
            raise _away("results")
        if path.startswith("link/"):
            raise ImageError("leads elsewhere")
        world.effect(f"reason {path}")
        world.reasons[path] = reason
        return RESULTS / SOURCE / f"{path}.reason.json", True

    real = Ledger.__dict__
    ledgers = {}
    for name in ("claim", "finish", "quarantine", "give_back", "mark_published", "forget_audit"):
        ledgers[name] = _with_effects(world, name, real[name])
    stamp_now = lambda file, like: world.files[file.relative_to(DROP).as_posix()][1]  # noqa: E731
    clock = SimpleNamespace(monotonic=lambda: world.now, perf_counter=lambda: world.now)
    with ExitStack() as stack:
        for owner, name, value in (
            (decoding, "read_file", read_file),
            (results, "write_reason", write_reason),
            (files, "can_write", lambda _: not world.is_results_away),
            (faults, "can_list", lambda _: True),
            (faults, "check_results", lambda _: None),
            (faults, "is_there", lambda file: file.relative_to(DROP).as_posix() in world.files),
            (faults, "stamp_now", stamp_now),
            (delivery, "time", clock),
            (loop, "time", clock),
            (one_file, "time", clock),
            *((Ledger, name, value) for name, value in ledgers.items()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _with_effects(world: World, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if world.is_disk_of_ledger_full:
            raise ServiceUnavailable("ledger: disk full")
        world.effect(f"before {name}")
        answer = real(*args, **kwargs)
        world.effect(f"after {name}")
        return answer

    return call


def drop(world: World, number: int) -> None:
    """A tool drops a file: new, of a content that is there already, or over another file."""
    kind = world.rng.choices(["good", "bad", "bug", "poison", "link", "same"], [70, 6, 6, 3, 5, 10])[0]
    path = f"{'link/' if kind == 'link' else ''}{number}.tif"
    content = f"{'good' if kind in ('same', 'link') else kind} {number}"
    if kind == "link":
        content = f"bad {number}"
    if kind == "same" and world.files:
        content = world.rng.choice(sorted(world.files.values()))[0]
    if world.rng.random() < 0.1 and world.files:
        path = world.rng.choice(sorted(world.files))
    world.files[path] = content, Stamp(len(content), number, number, number)


def shake(world: World) -> None:
    """Something goes wrong, or is mended."""
    what = world.rng.randrange(9)
    if what == 0:
        world.is_results_away = not world.is_results_away
    elif what == 1:
        world.is_redis_away = not world.is_redis_away
    elif what == 2:
        world.is_disk_of_ledger_full = not world.is_disk_of_ledger_full
    elif what == 3 and world.files:
        world.busy ^= {world.rng.choice(sorted(world.files))}
    elif what in (4, 5):
        world.dies_in = world.rng.randrange(1, 25)


def run(seed: int, folder: Path, template: Path, *, n_turns: int = 25) -> World:
    """One schedule: files come, faults come and go, the process dies and is started again; then all is well."""
    file = folder / f"{seed}.sqlite"
    shutil.copyfile(template, file)
    world = World(random.Random(seed), file)
    numbers = itertools.count()
    with simulated(world):
        process = _start(world)
        try:
            for turn in range(n_turns + 400):
                if turn < n_turns:
                    if world.rng.random() < 0.5:
                        drop(world, next(numbers))
                    if world.rng.random() < 0.5:
                        shake(world)
                elif turn == n_turns:
                    world.busy, world.dies_in = set(), None
                    world.is_results_away = world.is_redis_away = world.is_disk_of_ledger_full = False
                world.now += world.rng.choice([0.1, 1.0, 5.0])
                try:
                    process.step()
                except Death:
                    process = _start_again(world, process)
                if turn > n_turns and is_quiet(world, process):
                    break
            check(world, process)
        finally:
            # A schedule that fails must not leave its ledger locked for the next one.
            process.end()
            for left in folder.glob(f"{seed}.sqlite*"):
                left.unlink()
    return world


def _start(world: World) -> Process:
    while True:
        try:
            return Process(world)
        except Death:
            continue
        except ServiceUnavailable:
            world.is_disk_of_ledger_full = False


def _start_again(world: World, process: Process) -> Process:
    process.end()
    if world.rng.random() < 0.3:
        world.lose_power()
    world.trace.append("start")
    return _start(world)


def is_quiet(world: World, process: Process) -> bool:
    process.incoming.scan()
    has_audit = bool(process.ledger.audit_after(process.service._audit.last_seq, 1))
    return process.incoming.waiting.count(world.now)[0] == 0 and not process.ledger.n_unpublished() and not has_audit


def check(world: World, process: Process) -> None:
    """Nothing lost, nothing doubled, the order of durability, an end for every file, and nobody blamed for another."""
    ledger = process.ledger
    assert is_quiet(world, process), "a file has neither a verdict nor a reason long after all faults have ended"
    done = {work.sha256: work for work in ledger.listing("DONE", limit=10_000)}
    aside = {work.sha256: work for work in ledger.listing("QUARANTINED", limit=10_000)}
    for path, (content, _) in world.files.items():
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        assert sha256 in done or sha256 in aside, f"{path} is lost"
        if world.died_on[content] >= MAX_ATTEMPTS:
            continue  # what the process died on so often is set aside, for nobody can tell whether it was to blame
        is_to_blame = content.startswith(("bad", "bug", "poison"))
        assert (sha256 in aside) == is_to_blame, f"{path} {content!r}: {aside.get(sha256)}"
    world.lose_power()
    for sha256, work in done.items():
        assert (work.path, sha256) in world.on_disk, f"{work.path}: no result on disk"
    assert sorted(set(world.stream)) == sorted(done), "a summary is lost"
    lines = Counter(line for _, line in world.audit if line.startswith("reviewed"))
    assert lines == Counter(f"reviewed {sha256}" for sha256 in done), "an audit line is lost or doubled"
    assert len({seq for seq, _ in world.audit}) == len(world.audit)


def make_template(folder: Path) -> Path:
    """An empty ledger, to be copied."""
    template = folder / "template.sqlite"
    Ledger(template).close()
    return template


def memory_folder() -> Path | None:
    """A folder whose flushes cost nothing, where there is one."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else None
