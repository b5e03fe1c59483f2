import json
import logging
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.store.audit import GENESIS, AuditLog, parts, verify


def event(seq: int) -> tuple[int, dict[str, object]]:
    return seq, {"event": "reviewed", "utc": "2025-03-01T12:00:00Z", "path": f"löt/{seq}.tif", "n": seq, "score": 0.1}


def written(path: Path, n: int = 5) -> Path:
    with AuditLog(path) as audit:
        audit.append([event(seq) for seq in range(1, n + 1)])
    return path


@contextmanager
def disk_that_ends_at(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_missing_log_and_empty_log_have_no_lines_and_no_problems(tmp_path: Path) -> None:
    assert verify(tmp_path / "none").ok
    with AuditLog(tmp_path / "audit.jsonl") as audit:
        audit.append([])
        assert audit.last_seq == 0
    report = verify(tmp_path / "audit.jsonl", expected_last_seq=0)
    assert (report.ok, report.n_lines, report.last_seq, report.last_hash) == (True, 0, 0, GENESIS)


def test_what_was_appended_verifies_and_reads_as_json(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["path"] for line in lines] == [f"löt/{seq}.tif" for seq in range(1, 6)]
    assert [line["prev"] for line in lines] == [GENESIS, *(line["hash"] for line in lines[:-1])]
    report = verify(path, expected_last_seq=5)
    assert report.ok
    assert report.last_hash == lines[-1]["hash"]


def test_chain_goes_on_after_reopening_and_batches_do_not_show(tmp_path: Path) -> None:
    at_once = written(tmp_path / "a", 6).read_bytes()
    for seq in range(1, 7):
        with AuditLog(tmp_path / "b") as audit:
            assert audit.last_seq == seq - 1
            audit.append([event(seq)])
    assert (tmp_path / "b").read_bytes() == at_once


def test_replay_after_a_crash_writes_nothing_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl", 3)
    with AuditLog(path) as audit:
        audit.append([event(seq) for seq in range(1, 6)])
        audit.append([event(seq) for seq in range(1, 6)])
        assert audit.last_seq == 5
    assert path.read_bytes() == written(tmp_path / "straight", 5).read_bytes()


def test_log_torn_anywhere_is_mended_by_the_replay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = written(tmp_path / "whole", 3).read_bytes()
    path = tmp_path / "audit.jsonl"
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING), AuditLog(path) as audit:
            assert audit.last_seq == whole[:size].count(b"\n")
            audit.append([event(seq) for seq in (1, 2, 3)])
        assert path.read_bytes() == whole
        assert ("torn" in caplog.text) == (size > 0 and not whole[:size].endswith(b"\n"))


def test_tail_of_zeros_after_a_power_cut_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl", 2)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(200_000))
    with AuditLog(path) as audit:
        assert audit.last_seq == 2
    assert path.read_bytes() == whole


def test_last_line_longer_than_one_read_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for seq in (1, 2):
        with AuditLog(path) as audit:
            audit.append([(seq, {"event": "x" * 200_000})])
    assert verify(path, expected_last_seq=2).ok


def test_flip_of_any_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl", 3)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for flip in (0x01, 0x20):
            edited = bytearray(whole)
            edited[position] ^= flip
            path.write_bytes(edited)
            assert not verify(path, expected_last_seq=3).ok, (position, flip)


def test_every_deleted_and_every_inserted_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl", 3)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + whole[position + 1 :])
        assert not verify(path, expected_last_seq=3).ok, position
        path.write_bytes(whole[:position] + b" " + whole[position:])
        assert not verify(path, expected_last_seq=3).ok, position


def test_edit_names_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"n":3', b'"n":4'))
    (problem,) = verify(path).problems
    assert problem.startswith("line 3: was edited")


def test_edit_with_a_new_hash_shows_in_the_next_line(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    with AuditLog(tmp_path / "forged") as audit:
        audit.append([event(1), event(2), (3, {"event": "forged"})])
    lines[2] = (tmp_path / "forged").read_bytes().splitlines(keepends=True)[2]
    path.write_bytes(b"".join(lines))
    (problem,) = verify(path).problems
    assert problem.startswith("line 4: does not follow")


def test_removed_inserted_and_reordered_lines_are_found(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    a, b, c, d, e = path.read_bytes().splitlines(keepends=True)
    for lines, line in (
        ([b, c, d, e], "line 1: seq 1 to 1 missing"),
        ([a, b, d, e], "line 3: seq 3 to 3 missing"),
        ([a, b, b, c, d, e], "line 3: seq 2 does not come after 2"),
        ([a, c, b, d, e], "line 3: seq 2 does not come after 3"),
        ([a, b, b"{}\n", c, d, e], "line 3: is no line of an audit log"),
        ([a, b, b"\n", c, d, e], "line 3: is no line of an audit log"),
    ):
        path.write_bytes(b"".join(lines))
        assert line in verify(path, expected_last_seq=5).problems


def test_truncation_shows_against_the_expected_number_only(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert verify(path).ok
    (problem,) = verify(path, expected_last_seq=5).problems
    assert problem == "line 3: ends with seq 3, not 5: lines are missing at the end"
    assert not verify(path, expected_last_seq=2).ok


def test_torn_end_is_a_problem_for_verify(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    assert verify(path).problems == ("line 5: is torn: the end of the line is missing",)


def test_full_disk_is_a_service_away_and_the_next_try_is_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl", 2)
    with AuditLog(path) as audit:
        with disk_that_ends_at(path.stat().st_size + 300), pytest.raises(ServiceUnavailable, match="cannot write"):
            audit.append([event(3), event(4)])
        assert audit.last_seq == 2
        audit.append([event(3)])
        audit.append([event(4)])
    assert path.read_bytes() == written(tmp_path / "straight", 4).read_bytes()


def test_file_of_someone_else_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text("hello\n")
    with pytest.raises(ConfigError, match="move the file away"):
        AuditLog(path)
    assert path.read_text() == "hello\n"


def test_missing_folder_is_a_service_away(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable, match="cannot open"):
        AuditLog(tmp_path / "none" / "audit.jsonl")


@pytest.mark.parametrize(
    "entries", [[event(2), event(1)], [event(1), event(1)], [(1, {"hash": "x"})], [(1, {"seq": 7})]]
)
def test_misuse_is_refused_and_leaves_no_trace(tmp_path: Path, entries: list[tuple[int, dict[str, object]]]) -> None:
    with AuditLog(tmp_path / "audit.jsonl") as audit:
        with pytest.raises(ValueError, match=r"seq|chain"):
            audit.append(entries)
        assert audit.last_seq == 0
    assert (tmp_path / "audit.jsonl").read_bytes() == b""


def test_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl") as audit, pytest.raises(ValueError, match="JSON"):
        audit.append([(1, {"event": "x", "score": float("nan")})])


def test_closing_twice_does_no_harm(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.close()
    audit.close()


# --- rights --------------------------------------------------------------------------------------------------------


def test_log_is_made_for_owner_and_group_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = written(tmp_path / "audit.jsonl")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(("wide", "narrow"), [(0o666, 0o640), (0o664, 0o640), (0o644, 0o640), (0o600, 0o600)])
def test_wider_rights_are_narrowed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wide: int, narrow: int
) -> None:
    path = written(tmp_path / "audit.jsonl")
    path.chmod(wide)
    with AuditLog(path) as audit:
        audit.append([event(6)])
    assert stat.S_IMODE(path.stat().st_mode) == narrow
    assert ("narrowed" in caplog.text) == (wide != narrow)
    assert verify(path, expected_last_seq=6).ok


def test_log_is_opened_to_append_and_works_where_the_file_system_allows_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+a", path], capture_output=True, check=False).returncode:
        pytest.skip("this user or file system has no chattr +a")
    try:
        with pytest.raises(PermissionError):
            path.open("r+b")
        for seq in (6, 7):
            with AuditLog(path) as audit:
                audit.append([event(seq)])
    finally:
        subprocess.run([chattr, "-a", path], check=True)
    assert verify(path, expected_last_seq=7).ok


# --- a log that has grown ---------------------------------------------------------------------------------------------


def parted(path: Path, n: int = 7) -> list[Path]:
    """A log that is set aside as soon as it holds anything, one line at a time, opened anew before every second."""
    for first in range(1, n + 1, 2):
        with AuditLog(path, max_bytes=1) as log:
            for seq in range(first, min(first + 2, n + 1)):
                log.append([event(seq)])
    return parts(path)


def test_log_that_has_grown_goes_on_in_a_new_file_with_the_chain_unbroken(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    files = parted(path)
    assert [file.name for file in files] == [*(f"audit-{seq:012d}.jsonl" for seq in range(1, 7)), "audit.jsonl"]
    report = verify(path, expected_last_seq=7)
    assert (report.ok, report.first_seq, report.n_lines, report.last_seq) == (True, 1, 7, 7)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_replay_after_a_part_was_set_aside_writes_nothing_twice(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl", 3)
    path.rename(tmp_path / "audit-000000000003.jsonl")  # a crash between setting aside and the new file's first line
    with AuditLog(path) as log:
        assert log.last_seq == 3
        log.append([event(2), event(3), event(4)])
    report = verify(path, expected_last_seq=4)
    assert (report.ok, report.n_lines) == (True, 4)


def test_edit_in_a_part_and_a_part_that_is_missing_show_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    files = parted(path)
    whole = files[2].read_bytes()
    files[2].write_bytes(whole.replace(b'"n":3', b'"n":4'))
    assert verify(path).problems == (f"{files[2].name}, line 1: was edited: its hash does not fit it",)
    files[2].unlink()
    assert any("seq 3 to 3 missing" in problem for problem in verify(path).problems)


def test_parts_kept_elsewhere_are_told_by_their_last_hash(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    files = parted(path)
    (tmp_path / "elsewhere").mkdir()
    for file in files[:3]:
        file.rename(tmp_path / "elsewhere" / file.name)
    last = json.loads((tmp_path / "elsewhere" / files[2].name).read_text())["hash"]
    assert not verify(path).ok
    report = verify(path, after=last)
    assert (report.ok, report.first_seq, report.n_lines) == (True, 4, 4)
    assert not verify(path, after="0" * 63 + "1").ok


def test_log_that_cannot_be_set_aside_grows_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "audit.jsonl", 2)
    with AuditLog(path, max_bytes=1) as log:
        (tmp_path / "audit-000000000002.jsonl").mkdir()  # a name that is taken by a folder refuses the rename
        with caplog.at_level(logging.WARNING):
            log.append([event(3)])
    assert "cannot be set aside" in caplog.text
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_log_that_could_not_be_set_aside_is_tried_again_once_it_is_twice_as_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "audit.jsonl", 2)
    limit = path.stat().st_size
    for seq in range(2, 10):
        (tmp_path / f"audit-{seq:012d}.jsonl").mkdir()
    with AuditLog(path, max_bytes=limit) as log, caplog.at_level(logging.WARNING):
        sizes = []
        for seq in range(3, 9):
            before, n_warned = path.stat().st_size, len(caplog.records)
            log.append([event(seq)])
            sizes += [before] if len(caplog.records) > n_warned else []
    assert len(sizes) == 2
    assert sizes[0] == limit
    assert 2 * limit <= sizes[1] < 2.6 * limit
