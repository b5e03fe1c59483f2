"""Durable writing: whole or not at all, and in one place."""

import ast
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from paths import ROOT
from semwatch.system import files

SOURCES = sorted(path for package in ("daemon", "training") for path in ROOT.glob(f"{package}/semwatch*/**/*.py"))
HOME = ROOT / "daemon/semwatch/system/files.py"
IN_OS = frozenset({"rename", "renames", "replace", "fsync", "fdatasync", "sync"})
"""What only ``system.files`` may ask of ``os``."""


# --- one home --------------------------------------------------------------------------------------------------------


def calls_that_rename_or_sync(source: str) -> list[str]:
    """Calls that rename or flush files; a one-argument ``x.replace(y)`` is a path's, a string's has two."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            found += [f"{node.lineno}: {name.name}" for name in node.names if name.name in {*IN_OS, "move"}]
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        owner_name = owner.id if isinstance(owner, ast.Name) else ""
        is_of_os = owner_name == "os" and name in IN_OS
        is_of_path = name in ("rename", "replace") and len(node.args) == 1 and not node.keywords
        if is_of_os or (owner_name, name) == ("shutil", "move") or (is_of_path and owner_name != "files"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_system_files_renames_and_flushes(source: Path) -> None:
    found = calls_that_rename_or_sync(source.read_text())
    assert bool(found) == (source == HOME), f"{source}: {found}: write with semwatch.system.files"


@pytest.mark.parametrize(
    "line",
    [
        *("os.rename(a, b)", "os.replace(a, b)", "os.fsync(fd)", "os.fdatasync(fd)", "os.sync()"),
        *("path.rename(other)", "path.replace(other)", "(a / b).replace(c)", "shutil.move(a, b)"),
        *("from os import fsync", "from shutil import move"),
    ],
)
def test_every_way_to_rename_or_flush_is_seen(line: str) -> None:
    assert calls_that_rename_or_sync(line)


@pytest.mark.parametrize(
    "line", ["text.replace('a', 'b')", "moment.replace(tzinfo=UTC)", "dataclasses.replace(record, revision=2)"]
)
def test_what_replaces_no_file_is_allowed(line: str) -> None:
    assert not calls_that_rename_or_sync(line)


# --- whole files -----------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_is_written_with_its_rights_and_nothing_else_is_left(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_whole(tmp_path / "a", b"one")
        with files.writing(tmp_path / "secret", mode=0o600) as file:
            file.write(b"two")
    finally:
        os.umask(before)
    assert names(tmp_path) == ["a", "secret"]
    assert (tmp_path / "a").read_bytes() == b"one"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_empty_file_and_no_parts_are_files(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "a", b"")
    files.write_stream(tmp_path / "b", ())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b""


def test_error_in_the_middle_leaves_the_file_before_and_no_temporary(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"half"
        raise KeyError("the source of the parts ended")

    files.write_whole(tmp_path / "a", b"whole")
    with pytest.raises(KeyError, match="the source"):
        files.write_stream(tmp_path / "a", parts())
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_full_disk_leaves_the_file_before_and_no_temporary(tmp_path: Path) -> None:
    files.write_whole(tmp_path / "a", b"whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_whole(tmp_path / "a", b"x" * 11)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_what_a_crash_left_under_the_temporary_name_is_cleared(tmp_path: Path) -> None:
    files.temporary(tmp_path / "a").write_bytes(b"longer than what comes now")
    files.write_whole(tmp_path / "a", b"short")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"short"


@pytest.mark.parametrize("lay", ["symlink", "hardlink", "fifo"])
def test_what_lies_under_the_temporary_name_is_never_written_through(tmp_path: Path, lay: str) -> None:
    victim, target = tmp_path / "victim", tmp_path / "a"
    victim.write_bytes(b"of somebody else")
    partial = files.temporary(target)
    if lay == "symlink":
        partial.symlink_to(victim)
    elif lay == "hardlink":
        partial.hardlink_to(victim)
    else:
        os.mkfifo(partial)  # to open it for writing would wait for ever
    files.write_whole(target, b"mine")
    assert victim.read_bytes() == b"of somebody else"
    assert target.read_bytes() == b"mine"
    assert names(tmp_path) == ["a", "victim"]


def test_link_under_the_name_makes_way_and_what_it_named_stays(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "a"
    victim.write_bytes(b"of somebody else")
    target.symlink_to(victim)
    files.write_whole(target, b"mine")
    assert victim.read_bytes() == b"of somebody else"
    assert not target.is_symlink()


def test_folder_under_the_temporary_name_refuses(tmp_path: Path) -> None:
    files.temporary(tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_whole(tmp_path / "a", b"x")


def test_missing_folder_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_whole(tmp_path / "none" / "a", b"x")


def test_descriptor_is_not_inherited(tmp_path: Path) -> None:
    with files.writing(tmp_path / "a") as file:
        assert not os.get_inheritable(file.fileno())


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folders_are_made_down_to_the_last_and_again_without_harm(tmp_path: Path) -> None:
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_file_in_the_way_of_a_folder_refuses(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        files.make_folder(tmp_path / "a" / "b")


def test_folder_gets_its_name_whole_and_never_over_one_with_content(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"staging-{number}" / "below").mkdir(parents=True)
        (tmp_path / f"staging-{number}" / "below" / "file").write_text(str(number))
        (tmp_path / f"staging-{number}" / "link").symlink_to("nowhere")
    files.place_folder(tmp_path / "staging-1", tmp_path / "1")
    with pytest.raises(OSError, match="not empty"):
        files.place_folder(tmp_path / "staging-2", tmp_path / "1")
    assert (tmp_path / "1" / "below" / "file").read_text() == "1"
    assert names(tmp_path) == ["1", "staging-2"]


# --- files that grow line by line ------------------------------------------------------------------------------------


def test_append_cuts_what_a_failed_write_left_behind_the_end(tmp_path: Path) -> None:
    fd = files.open_to_append(tmp_path / "log")
    try:
        end = files.append(fd, 0, b"one\n")
        os.write(fd, b"tw")  # as a disk that fills in the middle leaves it
        assert files.append(fd, end, b"two\n") == 8
    finally:
        os.close(fd)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize(
    ("content", "whole"),
    [(b"", b""), (b"torn", b""), (b"one\n", b"one\n"), (b"one\ntw", b"one\n"), (b"one\n" + b"x" * 200_000, b"one\n")],
)
def test_torn_last_line_is_cut(tmp_path: Path, content: bytes, whole: bytes) -> None:
    (tmp_path / "log").write_bytes(content)
    fd = files.open_to_append(tmp_path / "log")
    try:
        assert files.cut_torn_line(fd) == (len(whole), len(content) - len(whole))
    finally:
        os.close(fd)
    assert (tmp_path / "log").read_bytes() == whole


def test_hash_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")


# --- reading what others may write ------------------------------------------------------------------------------------


def test_no_link_is_followed_below_a_folder(tmp_path: Path) -> None:
    drop, private = tmp_path / "drop", tmp_path / "private"
    for folder in (drop / "lot" / "deeper", private):
        folder.mkdir(parents=True)
    (drop / "lot/deeper/a.png").write_bytes(b"image")
    (private / "a.png").write_bytes(b"secret")
    (tmp_path / "also drop").symlink_to(drop)  # where the folder itself lies is its owner's business
    for root in (drop, tmp_path / "also drop"):
        with os.fdopen(files.open_to_read(root / "lot/deeper/a.png", below=root), "rb") as file:
            assert file.read() == b"image"
    (drop / "linked").symlink_to(private)
    (drop / "lot/linked").symlink_to(private)
    (drop / "lot/link.png").symlink_to(private / "a.png")
    for name in ("linked/a.png", "lot/linked/a.png", "lot/link.png"):
        with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
            files.open_to_read(drop / name, below=drop)
        with os.fdopen(files.open_to_read(drop / name), "rb") as file:
            assert file.read() == b"secret"
    with pytest.raises(FileNotFoundError):
        files.file_sha256(drop / "gone.png", below=drop)


def test_descriptors_are_given_back_where_a_link_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").symlink_to(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        with pytest.raises(NotADirectoryError):
            files.open_to_read(tmp_path / "a/b/c/d", below=tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
