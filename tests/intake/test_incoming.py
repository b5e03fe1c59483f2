"""Drop folders on the real file system with the real watchdog."""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.intake.drop_folder import Arrival, Incoming
from semwatch.intake.folder_rules import Folder, is_temporary
from semwatch.settings import site
from semwatch.store.ledger import Ledger
from semwatch.system.files import Stamp, stamp_of

# watchdog 7.1 watches a new directory twice when its event and the walk of its parent meet, says so, and goes on.
pytestmark = pytest.mark.filterwarnings("ignore:Callback with id:RuntimeWarning")

SOON_S = 5.0
"""For what must come: far above what it takes, so that a busy machine does not fail a test."""
QUIET_S = 0.2
"""For what must not come."""


class Settled:
    """Stands where the ledger stands: what was settled, and a count of the questions."""

    def __init__(self) -> None:
        self.files: set[tuple[str, str, Stamp]] = set()
        self.n_asked = 0
        self.is_away = False

    def __call__(self, source: str, files: Sequence[tuple[str, Stamp]]) -> set[str]:
        self.n_asked += 1
        if self.is_away:
            raise ServiceUnavailable("the disk is full")
        return {path for path, stamp in files if (source, path, stamp) in self.files}

    def settle(self, arrival: Arrival) -> None:
        self.files.add((arrival.source, arrival.path, arrival.stamp))

    def settle_as_it_is(self, file: Path, *, has_inodes: bool = True) -> None:
        self.files.add(("tool", file.name, stamp_of(file.stat(), has_inodes=has_inodes)))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    (tmp_path / "drop").mkdir()
    return tmp_path / "drop"


@pytest.fixture
def settled() -> Settled:
    return Settled()


@pytest.fixture
def watch(settled: Settled) -> Iterator[Callable[..., Incoming]]:
    """Open Incoming on folders; events and no periodic scan unless the test says otherwise."""
    with ExitStack() as stack:

        def open_(*folders: Folder, **options: object) -> Incoming:
            values = {"reconcile_s": 1000.0, "poll_s": 0.05, "backoff_s": 0.05, "backoff_max_s": 0.2} | options
            return stack.enter_context(Incoming(folders, settled, **values))  # type: ignore[arg-type]

        yield open_


def put(file: Path, content: bytes = b"image") -> Path:
    """Write as a careful tool does: temporary name, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_bytes(content)
    return temporary.rename(file)


def watched(drop: Path, source: str = "tool", **options: object) -> Folder:
    """A folder with the defaults of the settings."""
    settings = site.Folder(path=drop, source=source, recipe=drop / "recipe.yaml", **options)  # type: ignore[arg-type]
    return Folder(**settings.model_dump(exclude={"recipe"}))


def renamed(drop: Path, **options: object) -> Folder:
    return watched(drop, completeness="rename", **options)


def paths(arrivals: list[Arrival]) -> list[str]:
    return [arrival.path for arrival in arrivals]


def collect(incoming: Incoming, n: int, timeout_s: float = SOON_S) -> list[Arrival]:
    """Take arrivals until there are n of them or time is up."""
    arrivals: list[Arrival] = []
    deadline = time.monotonic() + timeout_s
    while len(arrivals) < n and time.monotonic() < deadline:
        arrivals += incoming.arrivals(deadline - time.monotonic(), limit=n - len(arrivals))
    return arrivals


# --- empty and simple ----------------------------------------------------------------------------------------------


def test_no_folder_at_all_waits_out_its_timeout(watch: Callable[..., Incoming]) -> None:
    started = time.monotonic()
    assert watch().arrivals(0.1) == []
    assert 0.1 <= time.monotonic() - started < SOON_S


def test_empty_folder_has_no_arrivals(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    assert incoming.waiting() == (0, 0.0)


def test_file_that_lay_there_at_start_arrives(watch: Callable[..., Incoming], drop: Path) -> None:
    file = put(drop / "lot 7" / "wafer" / "a b.TIF", b"12345")
    [arrival] = watch(renamed(drop)).arrivals(SOON_S)
    assert arrival == Arrival("tool", "lot 7/wafer/a b.TIF", file, stamp_of(file.stat()))


def test_settled_file_does_not_arrive(watch: Callable[..., Incoming], drop: Path, settled: Settled) -> None:
    file = put(drop / "a.tif")
    settled.settle_as_it_is(file)
    assert watch(renamed(drop)).arrivals(QUIET_S) == []


@pytest.mark.parametrize("name", ["x.tif", "new/x.tif", "new/deep/er/x.tif"])
def test_new_file_arrives_by_its_event(watch: Callable[..., Incoming], drop: Path, name: str) -> None:
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    put(drop / name)
    assert paths(incoming.arrivals(SOON_S)) == [name]


def test_file_written_under_its_final_name_arrives_when_it_is_closed(
    watch: Callable[..., Incoming], drop: Path
) -> None:
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    with (drop / "x.tif").open("wb") as file:
        file.write(b"first half")
        file.flush()
        assert incoming.arrivals(QUIET_S) == []
        file.write(b"second half")
    [arrival] = incoming.arrivals(SOON_S)
    assert arrival.size == 21


def test_file_and_directory_moved_in_from_elsewhere_arrive(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    put(drop.parent / "a.tif").rename(drop / "a.tif")
    put(drop.parent / "lot" / "deep" / "b.tif")
    (drop.parent / "lot").rename(drop / "lot")
    assert sorted(paths(collect(incoming, 2))) == ["a.tif", "lot/deep/b.tif"]


def test_directory_renamed_from_a_temporary_name_arrives(watch: Callable[..., Incoming], drop: Path) -> None:
    put(drop / "lot.part" / "b.tif")
    incoming = watch(renamed(drop))
    assert incoming.arrivals(QUIET_S) == []
    (drop / "lot.part").rename(drop / "lot")
    assert paths(incoming.arrivals(SOON_S)) == ["lot/b.tif"]


def test_arrivals_wakes_up_early_for_an_event(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop), poll_s=60.0)
    assert incoming.arrivals(0.0) == []
    threading.Timer(0.1, put, [drop / "x.tif"]).start()
    started = time.monotonic()
    assert len(incoming.arrivals(30.0)) == 1
    assert time.monotonic() - started < SOON_S


# --- what is not an arrival ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("polling", [False, True])
def test_temporary_and_foreign_names_are_not_seen(watch: Callable[..., Incoming], drop: Path, polling: bool) -> None:
    incoming = watch(renamed(drop, polling=polling))
    assert incoming.arrivals(0.0) == []
    for ending in (".tmp", ".part", "~", ".filepart", ".crdownload", ".PARTIAL", ".txt", ".json"):
        (drop / f"a.tif{ending}").write_bytes(b"image")
    for name in (".a.tif", "~$a.tif", "tif", ".snapshot/a.tif", "lot.tmp/a.tif"):
        (drop / name).parent.mkdir(exist_ok=True)
        (drop / name).write_bytes(b"image")
    put(drop / "z.tif")
    assert paths(collect(incoming, 20, timeout_s=QUIET_S)) == ["z.tif"]


def test_temporary_names_are_told_without_regard_to_case() -> None:
    assert is_temporary("A.TIF.PART")
    assert not is_temporary("apartment.tif")


def test_links_fifos_and_directories_named_like_images_are_not_arrivals(
    watch: Callable[..., Incoming], drop: Path
) -> None:
    outside = put(drop.parent / "outside" / "a.tif")
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    (drop / "file.tif").symlink_to(outside)
    (drop / "folder").symlink_to(outside.parent)
    (drop / "loop").symlink_to(drop)
    os.mkfifo(drop / "pipe.tif")
    put(drop / "scan.tif" / "inside.tif")
    assert paths(collect(incoming, 2, timeout_s=QUIET_S)) == ["scan.tif/inside.tif"]
    incoming.close()
    assert paths(collect(watch(renamed(drop)), 2, timeout_s=QUIET_S)) == ["scan.tif/inside.tif"]


def test_drop_folder_may_itself_be_a_link(watch: Callable[..., Incoming], drop: Path) -> None:
    link = drop.parent / "link"
    link.symlink_to(drop)
    incoming = watch(renamed(link))
    assert incoming.arrivals(0.0) == []
    put(drop / "a.tif")
    [arrival] = incoming.arrivals(SOON_S)
    assert (arrival.path, arrival.file) == ("a.tif", link / "a.tif")


def test_flat_folder_does_not_look_below(watch: Callable[..., Incoming], drop: Path) -> None:
    put(drop / "below" / "a.tif")
    incoming = watch(renamed(drop, recursive=False))
    assert incoming.arrivals(QUIET_S) == []
    put(drop / "later" / "a.tif")
    put(drop / "b.tif")
    assert paths(collect(incoming, 2, timeout_s=QUIET_S)) == ["b.tif"]


@pytest.mark.parametrize("polling", [False, True])
def test_names_that_are_not_utf8_arrive(watch: Callable[..., Incoming], drop: Path, polling: bool) -> None:
    incoming = watch(renamed(drop, polling=polling))
    assert incoming.arrivals(0.0) == []
    name = os.fsdecode(b"lot \xff\n/\xe4.tif")
    put(drop / name)
    [arrival] = incoming.arrivals(SOON_S)
    assert arrival.path == name
    assert arrival.file.read_bytes() == b"image"


def test_directory_that_cannot_be_read_is_named_once_and_hides_nothing_else(
    watch: Callable[..., Incoming], drop: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep, n_levels = os.open(drop, os.O_RDONLY), 20  # longer than any path may be, so nobody can read the last level
    for _ in range(n_levels):
        os.mkdir("d" * 250, dir_fd=deep)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    put(drop / "d" / "z.tif")
    incoming = watch(renamed(drop, polling=True))
    assert paths(incoming.arrivals(SOON_S)) == ["d/z.tif"]
    assert incoming.arrivals(QUIET_S) == []
    assert sum("cannot be read" in record.message for record in caplog.records) == 1
    shutil.rmtree(drop)


def test_two_folders_of_one_source_are_refused(drop: Path, settled: Settled) -> None:
    with pytest.raises(ConfigError, match="same source"):
        Incoming([renamed(drop), renamed(drop / "b")], settled, reconcile_s=1.0, poll_s=1.0)


# --- completeness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("polling", [False, True])
def test_growing_file_is_not_handed_out_before_it_is_steady(
    watch: Callable[..., Incoming], drop: Path, polling: bool
) -> None:
    incoming = watch(watched(drop, steady_s=0.4, polling=polling))
    with (drop / "x.tif").open("wb") as file:
        for _ in range(8):
            file.write(b"part")
            file.flush()
            assert incoming.arrivals(0.1) == []
        ended = time.monotonic()
    [arrival] = incoming.arrivals(SOON_S)
    assert arrival.size == 32
    assert time.monotonic() - ended > 0.2


def test_steady_waits_on_its_own_clock_and_no_mtime_blocks_it(
    watch: Callable[..., Incoming], drop: Path, settled: Settled
) -> None:
    clock = Clock()
    future = put(drop / "future.tif")
    os.utime(future, (4e9, 4e9))
    os.utime(put(drop / "past.tif"), (0, 0))
    incoming = watch(watched(drop, steady_s=5.0), clock=clock)
    assert incoming.arrivals(0.0) == []
    clock.now += 4.9
    assert incoming.arrivals(0.0) == []
    clock.now += 0.1
    assert paths(incoming.arrivals(0.0, limit=5)) == ["past.tif", "future.tif"]


def test_same_size_with_another_mtime_is_not_steady(watch: Callable[..., Incoming], drop: Path) -> None:
    clock = Clock()
    file = put(drop / "x.tif")
    incoming = watch(watched(drop, steady_s=5.0), clock=clock)
    assert incoming.arrivals(0.0) == []
    os.utime(file, (1e9, 1e9))
    clock.now += 5.0
    assert incoming.arrivals(0.0) == []
    clock.now += 5.0
    assert paths(incoming.arrivals(0.0)) == ["x.tif"]


@pytest.mark.parametrize(("marker", "polling"), [("x.tif.done", False), ("x.trigger", False), ("x.done", True)])
def test_marked_file_waits_for_its_marker(
    watch: Callable[..., Incoming], drop: Path, marker: str, polling: bool
) -> None:
    incoming = watch(watched(drop, completeness="marker", polling=polling))
    put(drop / "lot" / "x.tif")
    put(drop / "lot" / "y.tif")
    assert incoming.arrivals(QUIET_S) == []
    assert incoming.waiting()[0] == 2
    (drop / "lot" / marker).touch()
    assert paths(collect(incoming, 2, timeout_s=QUIET_S)) == ["lot/x.tif"]


def test_marker_that_comes_first_counts_only_once_the_file_is_steady(
    watch: Callable[..., Incoming], drop: Path
) -> None:
    clock = Clock()
    (drop / "x.done").touch()
    os.utime(drop / "x.done", (1e9, 1e9))
    put(drop / "x.tif")
    incoming = watch(watched(drop, completeness="marker", steady_s=5.0), clock=clock)
    assert incoming.arrivals(0.0) == []
    clock.now += 5.0
    assert paths(incoming.arrivals(0.0)) == ["x.tif"]


def test_markers_and_images_of_upper_case_find_each_other(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(watched(drop, completeness="marker"))
    put(drop / "X.TIFF")
    assert incoming.arrivals(QUIET_S) == []
    (drop / "X.done").touch()
    assert paths(incoming.arrivals(SOON_S)) == ["X.TIFF"]


# --- in flight, released, replaced ---------------------------------------------------------------------------------


def test_file_in_flight_is_not_handed_out_twice(watch: Callable[..., Incoming], drop: Path) -> None:
    put(drop / "x.tif")
    incoming = watch(renamed(drop), reconcile_s=0.05)
    assert len(incoming.arrivals(SOON_S)) == 1
    (drop / "x.tif").open("ab").close()
    assert incoming.arrivals(QUIET_S) == []
    assert incoming.waiting()[0] == 0


def test_settled_file_does_not_come_again_after_its_release(
    watch: Callable[..., Incoming], drop: Path, settled: Settled
) -> None:
    put(drop / "x.tif")
    incoming = watch(renamed(drop), reconcile_s=0.05)
    [arrival] = incoming.arrivals(SOON_S)
    settled.settle(arrival)
    incoming.release(arrival)
    incoming.release(arrival)
    assert incoming.arrivals(QUIET_S) == []
    assert incoming.waiting() == (0, 0.0)


def test_file_given_back_comes_again_after_a_growing_wait(watch: Callable[..., Incoming], drop: Path) -> None:
    clock = Clock()
    put(drop / "x.tif")
    incoming = watch(renamed(drop), clock=clock, backoff_s=1.0, backoff_max_s=30.0)
    [arrival] = incoming.arrivals(0.0)
    for wait_s in (1, 2, 4, 8, 16, 30, 30):
        incoming.release(arrival)
        clock.now += wait_s - 0.01
        assert incoming.arrivals(0.0) == []
        clock.now += 0.01
        [arrival] = incoming.arrivals(0.0)
    incoming.release(arrival)
    count, age_s = incoming.waiting()
    assert (count, round(age_s)) == (1, 91)


def test_file_given_back_wakes_a_waiting_arrivals(watch: Callable[..., Incoming], drop: Path) -> None:
    put(drop / "x.tif")
    incoming = watch(renamed(drop), poll_s=60.0)
    [arrival] = incoming.arrivals(SOON_S)
    threading.Timer(0.1, incoming.release, [arrival]).start()
    assert incoming.arrivals(SOON_S) == [arrival]


def test_file_replaced_while_in_flight_comes_as_a_new_one(
    watch: Callable[..., Incoming], drop: Path, settled: Settled
) -> None:
    put(drop / "x.tif")
    incoming = watch(renamed(drop))
    [first] = incoming.arrivals(SOON_S)
    put(drop / "x.tif", b"second image")
    assert incoming.arrivals(QUIET_S) == []
    settled.settle(first)
    incoming.release(first)
    [second] = incoming.arrivals(SOON_S)
    assert (second.path, second.size) == ("x.tif", 12)


def test_file_replaced_while_waiting_is_handed_out_as_it_is_now(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop, polling=True), poll_s=60.0)
    for name, mtime in (("a.tif", 1), ("b.tif", 2)):
        os.utime(put(drop / name), (mtime, mtime))
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]
    put(drop / "b.tif", b"second image")
    [arrival] = incoming.arrivals(SOON_S)
    assert (arrival.path, arrival.size) == ("b.tif", 12)


def test_file_that_vanished_while_waiting_is_not_handed_out(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop, polling=True), poll_s=60.0)
    for name, mtime in (("a.tif", 1), ("b.tif", 2), ("c.tif", 3)):
        os.utime(put(drop / name), (mtime, mtime))
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]
    (drop / "b.tif").unlink()
    assert paths(incoming.arrivals(SOON_S)) == ["c.tif"]
    assert incoming.waiting()[0] == 0


def test_file_that_vanished_in_flight_is_forgotten(watch: Callable[..., Incoming], drop: Path) -> None:
    put(drop / "a.tif")
    incoming = watch(renamed(drop))
    [arrival] = incoming.arrivals(SOON_S)
    arrival.file.unlink()
    incoming.release(arrival)
    assert incoming.arrivals(QUIET_S) == []
    assert incoming.waiting()[0] == 0


def test_oldest_come_first_over_all_folders_up_to_the_limit(watch: Callable[..., Incoming], drop: Path) -> None:
    for i, name in enumerate(["a/3.tif", "b/1.tif", "a/2.tif", "b/0.tif"]):
        os.utime(put(drop / name), (100 - i, 100 - i))
    incoming = watch(renamed(drop / "a", source="a"), renamed(drop / "b", source="b"))
    assert paths(incoming.arrivals(SOON_S, limit=3)) == ["0.tif", "2.tif", "1.tif"]
    assert incoming.waiting()[0] == 1
    assert paths(incoming.arrivals(SOON_S, limit=3)) == ["3.tif"]


def test_ledger_that_is_away_loses_no_file(watch: Callable[..., Incoming], drop: Path, settled: Settled) -> None:
    put(drop / "a.tif")
    incoming = watch(renamed(drop))
    settled.is_away = True
    with pytest.raises(ServiceUnavailable):
        incoming.arrivals(SOON_S)
    settled.is_away = False
    [arrival] = incoming.arrivals(SOON_S)
    settled.is_away = True
    incoming.release(arrival)
    settled.is_away = False
    assert incoming.arrivals(SOON_S) == [arrival]


def test_ledger_that_is_away_when_an_event_comes_loses_no_file(
    watch: Callable[..., Incoming], drop: Path, settled: Settled
) -> None:
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    settled.is_away = True
    put(drop / "a.tif")
    with pytest.raises(ServiceUnavailable):
        incoming.arrivals(SOON_S)
    settled.is_away = False
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]


def test_ledger_that_goes_away_during_the_last_look_leaves_nothing_in_flight(
    watch: Callable[..., Incoming], drop: Path, settled: Settled
) -> None:
    for name, mtime in (("a.tif", 1), ("b.tif", 2), ("c.tif", 3)):
        os.utime(put(drop / name), (mtime, mtime))
    incoming = watch(renamed(drop, polling=True), poll_s=60.0)
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]
    os.utime(put(drop / "c.tif", b"second image"), (3, 3))
    settled.is_away = True
    with pytest.raises(ServiceUnavailable):
        incoming.arrivals(SOON_S, limit=5)
    settled.is_away = False
    assert paths(incoming.arrivals(SOON_S, limit=5)) == ["b.tif", "c.tif"]


# --- what goes wrong with folders, events and observers ------------------------------------------------------------


def test_dropped_hints_are_found_by_the_scan(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop), n_hints=3, poll_s=60.0)
    assert incoming.arrivals(0.0) == []
    for i in range(300):
        put(drop / f"{i}.tif")
    arrivals = collect(incoming, 300)
    assert len(set(paths(arrivals))) == 300


def test_event_that_never_came_is_found_by_the_periodic_scan(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop), reconcile_s=0.2)
    assert incoming.arrivals(0.0) == []
    (drop.parent / "a.tif").write_bytes(b"image")
    os.link(drop.parent / "a.tif", drop / "a.tif")  # a hard link is neither moved nor closed: no event we listen to
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]


@pytest.mark.parametrize("polling", [False, True])
def test_folder_that_does_not_exist_yet_is_missing_and_then_watched(
    watch: Callable[..., Incoming], drop: Path, polling: bool, caplog: pytest.LogCaptureFixture
) -> None:
    incoming = watch(renamed(drop / "later", polling=polling))
    assert incoming.arrivals(QUIET_S) == []
    assert sum("is missing" in record.message for record in caplog.records) == 1
    put(drop / "later" / "a.tif")
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]
    assert sum("is back" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("polling", [False, True])
def test_share_that_vanishes_and_returns_loses_nothing(
    watch: Callable[..., Incoming], drop: Path, settled: Settled, polling: bool, caplog: pytest.LogCaptureFixture
) -> None:
    away = drop.parent / "away"
    incoming = watch(renamed(drop, polling=polling))
    put(drop / "a.tif")
    [held] = incoming.arrivals(SOON_S)
    put(drop / "b.tif")
    drop.rename(away)
    assert incoming.arrivals(QUIET_S) == []
    assert incoming.waiting()[0] == 0
    put(away / "c.tif")
    away.rename(drop)
    assert sorted(paths(collect(incoming, 2))) == ["b.tif", "c.tif"]
    put(drop / "d.tif")
    assert paths(incoming.arrivals(SOON_S)) == ["d.tif"]
    settled.settle(held)
    incoming.release(held)
    assert incoming.arrivals(QUIET_S) == []
    assert sum("is missing" in record.message for record in caplog.records) == 1
    assert sum("is back" in record.message for record in caplog.records) == 1


def test_files_of_a_missing_folder_do_not_count_as_waiting(watch: Callable[..., Incoming], drop: Path) -> None:
    put(drop / "not marked.tif")
    incoming = watch(watched(drop, completeness="marker"))
    assert incoming.arrivals(0.0) == []
    assert incoming.waiting()[0] == 1
    drop.rename(drop.parent / "away")
    assert incoming.arrivals(QUIET_S) == []
    assert incoming.waiting() == (0, 0.0)


def test_folder_deleted_and_made_anew_between_two_looks_is_watched_again(
    watch: Callable[..., Incoming], drop: Path
) -> None:
    incoming = watch(renamed(drop), poll_s=0.2)
    assert incoming.arrivals(0.0) == []
    for i in range(3):
        shutil.rmtree(drop)
        drop.mkdir()
        put(drop / f"before {i}.tif")
        assert paths(incoming.arrivals(SOON_S)) == [f"before {i}.tif"]
        put(drop / f"after {i}.tif")
        assert paths(incoming.arrivals(SOON_S)) == [f"after {i}.tif"]


def test_other_folder_in_the_same_place_is_watched(watch: Callable[..., Incoming], drop: Path) -> None:
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    drop.rename(drop.parent / "old")  # as a mount over the folder does it: the path is there, the inode another
    drop.mkdir()
    assert incoming.arrivals(QUIET_S) == []
    put(drop / "a.tif")
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]


def threads_of(kind: str) -> list[Any]:
    return [thread for thread in threading.enumerate() if type(thread).__name__ == kind]


@pytest.mark.parametrize("kind", ["InotifyObserver", "InotifyFullEmitter", "InotifyFD"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_observer_is_started_anew(
    watch: Callable[..., Incoming],
    drop: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    incoming = watch(renamed(drop))
    assert incoming.arrivals(0.0) == []
    [thread] = threads_of(kind)
    if kind == "InotifyFD":
        monkeypatch.setattr(thread, "handle_event", None)  # the next event kills it
        put(drop / "killer.tif")
        assert paths(incoming.arrivals(SOON_S)) == ["killer.tif"]
    else:
        thread.stop()
    thread.join(SOON_S)
    put(drop / "while dead.tif")
    assert paths(incoming.arrivals(SOON_S)) == ["while dead.tif"]
    assert any("started anew" in record.message for record in caplog.records)
    put(drop / "after.tif")
    assert paths(incoming.arrivals(SOON_S)) == ["after.tif"]


def test_folder_without_events_is_scanned_instead(
    watch: Callable[..., Incoming], drop: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EMFILE, "inotify instance limit reached")

    monkeypatch.setattr("semwatch.intake.watch.InotifyObserver", refuse)
    incoming = watch(renamed(drop))
    assert incoming.arrivals(QUIET_S) == []
    put(drop / "a.tif")
    assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]
    assert sum("sends no events" in record.message for record in caplog.records) == 1


def test_close_wakes_arrivals_and_stops_every_thread(watch: Callable[..., Incoming], drop: Path) -> None:
    before = threading.active_count()
    incoming = watch(renamed(drop), poll_s=60.0)
    threading.Timer(0.2, incoming.close).start()
    started = time.monotonic()
    assert incoming.arrivals(60.0) == []
    assert time.monotonic() - started < SOON_S
    incoming.close()
    assert incoming.arrivals(60.0) == []
    deadline = time.monotonic() + SOON_S
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_nothing_in_the_drop_folder_is_touched(watch: Callable[..., Incoming], drop: Path) -> None:
    put(drop / "lot" / "a.tif")
    before = {path: path.stat().st_mtime_ns for path in [drop, *drop.rglob("*")]}
    incoming = watch(renamed(drop))
    [arrival] = incoming.arrivals(SOON_S)
    incoming.release(arrival)
    assert {path: path.stat().st_mtime_ns for path in [drop, *drop.rglob("*")]} == before


# --- many files, and the ledger itself -----------------------------------------------------------------------------


def test_five_thousand_files_arrive_once_each(watch: Callable[..., Incoming], drop: Path, settled: Settled) -> None:
    for i in range(5000):
        file = drop / f"lot{i % 7}" / f"{i}.tif"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    incoming = watch(renamed(drop), reconcile_s=0.5)
    seen: list[Arrival] = []
    while arrivals := incoming.arrivals(QUIET_S, limit=64):
        seen += arrivals
        for arrival in arrivals:
            settled.settle(arrival)
            incoming.release(arrival)
    assert len(seen) == len(set(seen)) == 5000


def test_steady_stream_into_workers_and_the_real_ledger_loses_and_doubles_nothing(tmp_path: Path, drop: Path) -> None:
    n, stop = 200, threading.Event()
    with Ledger(tmp_path / "ledger.sqlite") as ledger, ExitStack() as stack:
        folder = watched(drop, steady_s=0.1)
        incoming = stack.enter_context(
            Incoming([folder], ledger.settled, reconcile_s=0.2, poll_s=2.0, backoff_s=0.02, n_hints=20)
        )
        done: list[str] = []

        def work(arrival: Arrival) -> None:
            digest = hashlib.sha256(arrival.file.read_bytes()).hexdigest()
            now = "2025-03-01T08:00:00Z"
            held = ledger.claim("tool", arrival.path, sha256=digest, stamp=arrival.stamp, now_utc=now)
            if held.outcome == "new" and arrival.path.endswith("3.tif"):
                ledger.give_back(held, "away")
            elif held.is_mine:
                ledger.finish(held, outbox=[], audit={}, now_utc=now)
                done.append(arrival.path)
            incoming.release(arrival)

        def loop() -> None:
            while not stop.is_set():
                threads = [threading.Thread(target=work, args=[a]) for a in incoming.arrivals(0.1, limit=4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

        thread = threading.Thread(target=loop)
        thread.start()
        for i in range(n):
            put(drop / f"{i % 5}" / f"{i}.tif", f"content {i}".encode())
            time.sleep(0.002)
        deadline = time.monotonic() + 20
        while ledger.counts()["DONE"] < n and time.monotonic() < deadline:
            time.sleep(0.05)
        stop.set()
        thread.join()
    assert len(done) == len(set(done)) == n


def test_scan_asks_the_ledger_once_for_many_files(drop: Path, settled: Settled) -> None:
    for i in range(1200):
        file = drop / f"{i}.tif"
        file.touch()
        settled.settle_as_it_is(file, has_inodes=False)
    put(drop / "new.tif")
    with Incoming([renamed(drop, polling=True)], settled, reconcile_s=1000.0, poll_s=1000.0) as incoming:
        assert paths(incoming.arrivals(0.0, limit=5)) == ["new.tif"]
        n_scanned = settled.n_asked
        assert incoming.arrivals(0.0) == []
    assert n_scanned == 2  # one look at all, and the last look at what is handed out
    assert settled.n_asked == n_scanned


def test_settled_file_that_is_written_anew_in_place_is_not_lost_among_new_ones(drop: Path, settled: Settled) -> None:
    clock = Clock()
    file = put(drop / "live.tif")
    settled.settle_as_it_is(file, has_inodes=False)
    folder = watched(drop, polling=True, steady_s=5.0)
    with Incoming([folder], settled, reconcile_s=1000.0, poll_s=1.0, clock=clock) as incoming:
        assert incoming.arrivals(0.0) == []
        with file.open("r+b") as opened:
            opened.write(b"other")
        os.utime(file, (1e9, 1e9))
        incoming.look_at("tool", "live.tif")  # as an event does
        assert incoming.arrivals(0.0) == []
        put(drop / "new.tif")
        clock.now += 2.0
        assert incoming.arrivals(0.0) == []
        clock.now += 5.0
        assert paths(incoming.arrivals(0.0, limit=5)) == ["live.tif", "new.tif"]


def test_file_that_is_settled_no_more_arrives_with_the_next_scan(drop: Path, settled: Settled) -> None:
    """As one that a person takes out of quarantine."""
    file = put(drop / "a.tif")
    settled.settle_as_it_is(file, has_inodes=False)
    with Incoming([renamed(drop, polling=True)], settled, reconcile_s=0.05, poll_s=0.05) as incoming:
        assert incoming.arrivals(QUIET_S) == []
        settled.files.clear()
        assert paths(incoming.arrivals(SOON_S)) == ["a.tif"]
