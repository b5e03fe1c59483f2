"""Intake and delivery under thousands of schedules of faults and deaths; planted mistakes are caught."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import line_simulation as simulation
from semwatch.errors import ServiceUnavailable
from semwatch.service import delivery, faults, loop
from semwatch.service.loop import Service
from semwatch.service.one_file import FileWork
from semwatch.store import ledger as ledger_module
from semwatch.store import results
from semwatch.store.ledger import Ledger

N_SCHEDULES = int(os.environ.get("SEMWATCH_SCHEDULES", "150"))
FIRST_SEED = int(os.environ.get("SEMWATCH_SEED", "1"))
N_TO_CATCH = 300
"""Schedules within which a planted mistake must be found."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=simulation.memory_folder()) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def template(folder: Path) -> Path:
    return simulation.make_template(folder)


@pytest.mark.timeout(36_000)
def test_nothing_is_lost_or_doubled_and_every_file_comes_to_an_end(folder: Path, template: Path) -> None:
    n_effects = n_starts = 0
    for seed in range(FIRST_SEED, FIRST_SEED + N_SCHEDULES):
        try:
            world = simulation.run(seed, folder, template)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        n_effects += world.n_effects
        n_starts += world.trace.count("start")
    print(f"\n{N_SCHEDULES} schedules, {n_effects} effects, {n_starts} deaths")
    assert n_starts > N_SCHEDULES / 10


def test_a_seed_gives_the_same_trace_twice(folder: Path, template: Path) -> None:
    for seed in (3, 5, 8):
        assert simulation.run(seed, folder, template).trace == simulation.run(seed, folder, template).trace


# --- planted mistakes ------------------------------------------------------------------------------------------------


def result_is_not_flushed() -> Any:
    real = simulation.World.write_result
    return mock.patch.object(
        simulation.World, "write_result", lambda self, path, sha256: real(self, path, sha256, is_flushed=False)
    )


def finished_before_its_result() -> Any:
    def review(self: simulation.Process, claim: Any, data: bytes, *_: Any) -> None:
        write = self.world.write_result
        later: list[Callable[[], None]] = []

        def written_later(path: str, sha256: str, **_: Any) -> None:
            later.append(lambda: write(path, sha256))

        self.world.write_result = written_later  # type: ignore[method-assign]
        try:
            real(self, claim, data)
        finally:
            self.world.write_result = write  # type: ignore[method-assign]
        for work in later:
            work()

    real = simulation.Process._review
    return mock.patch.object(simulation.Process, "_review", review)


def forgotten_before_it_is_published() -> Any:
    def publish(ledger: Ledger, publisher: Any) -> None:
        while batch := ledger.unpublished(delivery.BATCH):
            ledger.mark_published([seq for seq, _ in batch])
            publisher.publish([(item.stream, item.id, item.payload) for _, item in batch])

    return mock.patch.object(loop, "publish_outbox", publish)


def forgotten_before_it_is_in_the_audit_log() -> Any:
    def deliver(ledger: Ledger, audit: Any) -> None:
        while lines := ledger.audit_after(audit.last_seq, delivery.BATCH):
            ledger.forget_audit(lines[-1][0])
            audit.append([(seq, json.loads(text)) for seq, text in lines])

    return mock.patch.object(loop, "deliver_audit", deliver)


def every_fault_pauses_the_line() -> Any:
    return mock.patch.object(faults, "scope_of", return_value="service")


def attempts_are_not_counted() -> Any:
    real = Ledger.give_back
    return mock.patch.object(Ledger, "give_back", lambda self, claim, reason, **_: real(self, claim, reason))


def deaths_are_not_counted() -> Any:
    def recover(self: Ledger) -> None:
        with self._file.transaction() as db:
            db.execute("UPDATE work SET state = 'SEEN' WHERE state = 'CLAIMED'")

    return mock.patch.object(Ledger, "_recover", recover)


def work_in_flight_is_not_taken_up_again() -> Any:
    def recover(self: Ledger) -> None:
        with self._file.transaction() as db:
            db.execute("UPDATE work SET state = 'DONE', finished_utc = '2026' WHERE state = 'CLAIMED'")

    return mock.patch.object(Ledger, "_recover", recover)


def service_away_counts_an_attempt() -> Any:
    real = Ledger.give_back
    return mock.patch.object(
        Ledger, "give_back", lambda self, claim, reason, **_: real(self, claim, reason, is_attempt=True)
    )


def quarantine_fails_with_its_reason() -> Any:
    def quarantine(self: FileWork, work: Any, reason: str, size: int) -> None:
        said: Any = {"path": work.path, "sha256": work.sha256, "reason": reason}
        results.write_reason(**said)
        real(self, work, reason, size)

    real = FileWork.quarantine
    return mock.patch.object(FileWork, "quarantine", quarantine)


def any_error_is_quarantined_at_once() -> Any:
    def give_back(self: FileWork, claim: Any, arrival: Any, error: Exception, size: int) -> None:
        self.quarantine(claim, str(error), size)

    return mock.patch.object(FileWork, "_give_back", give_back)


def duplicate_of_what_waits_counts_as_done() -> Any:
    def outcome(state: str | None, *, is_same_path: bool) -> str:
        return "new" if state is None else "settled"

    return mock.patch.object(ledger_module, "_outcome", outcome)


def full_disk_ends_a_delivery_for_good() -> Any:
    def deliver(self: Service) -> None:
        try:
            real(self)
        except ServiceUnavailable:
            self._publisher = None

    real = Service._deliver
    return mock.patch.object(Service, "_deliver", deliver)


def backoff_never_ends() -> Any:
    return mock.patch.object(simulation, "backoff_s", return_value=1e9)


MISTAKES = [
    result_is_not_flushed, forgotten_before_it_is_published, forgotten_before_it_is_in_the_audit_log,
    attempts_are_not_counted, deaths_are_not_counted, work_in_flight_is_not_taken_up_again,
    service_away_counts_an_attempt, quarantine_fails_with_its_reason, any_error_is_quarantined_at_once,
    duplicate_of_what_waits_counts_as_done, full_disk_ends_a_delivery_for_good, backoff_never_ends,
    finished_before_its_result, every_fault_pauses_the_line,
]  # fmt: skip


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_caught(mistake: Callable[[], Any], folder: Path, template: Path) -> None:
    with mistake():
        for seed in range(1, N_TO_CATCH + 1):
            try:
                simulation.run(seed, folder, template)
            except (AssertionError, RuntimeError) as error:
                print(f"\n{mistake.__name__}: seed {seed}: {error}")
                break
        else:
            pytest.fail(f"{mistake.__name__} is not noticed in {N_TO_CATCH} schedules")
