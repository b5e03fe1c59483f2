"""The memory of the hooks: nothing is forgotten by a restart, nothing is added twice."""

from pathlib import Path

import pytest

from semwatch.errors import ConfigError
from semwatch.store.hook_runs import HOOKS, MAX_ENDED, HookRuns

UTC = "2026-01-01T00:00:00Z"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / HOOKS


def test_run_outlives_a_restart_with_its_attempts_and_its_time(path: Path) -> None:
    with HookRuns(path, now_utc=UTC) as runs:
        runs.announce("tool/lot", "5 x", ["on_lot_done"], {"lot": "tool/lot"}, UTC)
        (run,) = runs.due(0.0)
        runs.begin(run)
        runs.end(run, "waits", "exit code 1", not_before_s=50.0)
    with HookRuns(path, now_utc="later") as runs:
        assert runs.since_utc() == UTC
        assert runs.announced() == {"tool/lot": "5 x"}
        assert runs.due(49.0) == []
        (run,) = runs.due(50.0)
        assert (run.attempts, run.variables, run.why) == (1, {"lot": "tool/lot"}, "exit code 1")


def test_process_that_died_in_a_run_leaves_it_to_be_run(path: Path) -> None:
    with HookRuns(path, now_utc=UTC) as runs:
        runs.add("on_alarm", "a", {}, UTC)
        runs.begin(runs.due(0.0)[0])
    with HookRuns(path, now_utc=UTC) as runs:
        assert [(run.key, run.attempts) for run in runs.due(0.0)] == [("a", 1)]


def test_same_key_is_taken_once_and_each_hook_of_a_lot_for_itself(path: Path) -> None:
    with HookRuns(path, now_utc=UTC) as runs:
        for _ in range(2):
            runs.announce("lot", "1", ["on_lot_done", "host_event"], {}, UTC)
        assert [run.hook for run in runs.due(0.0)] == ["on_lot_done", "host_event"]
        for run in runs.due(0.0):
            runs.end(run, "done", "")
        runs.announce("lot", "1", ["on_lot_done"], {}, UTC)
        assert runs.due(0.0) == []
        runs.announce("lot", "2", ["on_lot_done"], {}, UTC)
        assert runs.waiting() == 1


def test_of_what_has_ended_the_newest_are_kept_and_what_waits_is_never_forgotten(path: Path) -> None:
    with HookRuns(path, now_utc=UTC) as runs:
        runs.add("on_alarm", "waits", {}, UTC)
        (first,) = runs.due(0.0)
        runs.end(first, "waits", "", not_before_s=9e9)
        for n in range(MAX_ENDED + 5):
            runs.add("on_alarm", str(n), {}, UTC)
            (run,) = runs.due(0.0)
            runs.end(run, "given up", "why")
        assert runs.waiting() == 1
        assert runs.given_up(1)[0].key == str(MAX_ENDED + 4)
        assert len(runs.given_up(10 * MAX_ENDED)) <= MAX_ENDED + 1


def test_foreign_file_in_its_place_is_refused(path: Path) -> None:
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="memory of the hooks"):
        HookRuns(path, now_utc=UTC)
