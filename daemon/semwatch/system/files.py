"""Durable files: the one module that renames and fsyncs.

What must outlive a crash or a power cut is written here, always in this order: the content under a temporary name,
fsync of the file, rename, fsync of its folder. A reader sees the whole file before or the whole file after.

The temporary name of ``<name>`` is ``.<name>.tmp`` beside it: hidden, never read, and always the same, so that the next
writer clears what a crash left. So a file has one writer at a time. The temporary file is made anew (``O_EXCL``,
``O_NOFOLLOW``): a link, a pipe or another user's file that lies there is removed or refused, never written through.

Errors stay ``OSError``; the caller says what they mean.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

MODE = 0o644
_TAIL_BYTES = 1 << 16
WRITE_PROBE = ".semwatch-probe"
"""Written and removed, to see whether a folder can be written to."""


# --- what tells one state of a file from another ---------------------------------------------------------------------


class Stamp(NamedTuple):
    """A file as its folder shows it, without reading it.

    The time of change (``ctime``) and the inode also tell content that was put under an old name with its old size and
    time of writing. None: not known, or not to be relied on; then it is not compared.
    """

    size: int
    mtime_ns: int
    ctime_ns: int | None = None
    inode: int | None = None


_INT64 = 1 << 63


def stamp_of(status: os.stat_result, *, has_inodes: bool = True) -> Stamp:
    """What ``status`` says. Times beyond what a database holds, such as the year 2300, stand at the end of its range.

    Args:
        status: of the file.
        has_inodes: False where the file system makes inode numbers up anew, as network shares may.
    """
    return Stamp(
        status.st_size, _as_int64(status.st_mtime_ns), _as_int64(status.st_ctime_ns),
        status.st_ino % _INT64 if has_inodes else None,
    )  # fmt: skip


def _as_int64(nanoseconds: int) -> int:
    return max(-_INT64, min(_INT64 - 1, nanoseconds))


# --- whole files -----------------------------------------------------------------------------------------------------


def temporary(path: Path) -> Path:
    """Where a file is written before it gets its name.

    >>> temporary(Path("lot/lot.csv"))
    PosixPath('lot/.lot.csv.tmp')
    """
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def writing(path: Path, *, mode: int = MODE) -> Iterator[BinaryIO]:
    """Open a file to be written whole: it gets its name once the block has ended without an error.

    Args:
        mode: rights of the file, less the umask; owner and rights may be changed by ``fileno()`` before it is seen.
    """
    partial = temporary(path)
    try:
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)  # noqa: PTH105 - beside the other calls whose order matters
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole; its folder must be there."""
    write_stream(path, (content,))


def write_stream(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file whole, part by part, without holding all of it in memory."""
    with writing(path) as file:
        file.writelines(parts)


def place(partial: Path, path: Path) -> None:
    """Give a file that something else has written, at ``temporary(path)``, its name."""
    _sync(partial)
    rename(partial, path)


# --- folders ---------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they outlive a power cut; one that is there stays as it is."""
    missing = []
    for place in (folder, *folder.parents):  # no recursion: a drop folder may be a thousand levels deep
        if place.is_dir():
            break
        missing.append(place)
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        sync_folder(place.parent)


def place_folder(staging: Path, folder: Path) -> None:
    """Give a folder that has been written beside it its name, whole: everything below is flushed first."""
    for below in (*staging.rglob("*"), staging):
        if not below.is_symlink():
            _sync(below)
    rename(staging, folder)


def sync_folder(folder: Path) -> None:
    """Make names in a folder outlive a power cut."""
    _sync(folder, os.O_DIRECTORY)


def rename(old: Path, new: Path) -> None:
    """Give a file, link or folder another name; a file that has the name makes way."""
    os.replace(old, new)  # noqa: PTH105
    sync_folder(new.parent)
    if old.parent != new.parent:
        sync_folder(old.parent)


# --- files that grow line by line ------------------------------------------------------------------------------------


def open_to_append(path: Path, *, mode: int = MODE) -> int:
    """Open a file to read and to append, made where it is not there; return its descriptor."""
    is_new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
    if is_new:
        try:
            sync_folder(path.parent)
        except BaseException:
            os.close(fd)
            raise
    return fd


def append(fd: int, end: int, data: bytes) -> int:
    """Write behind byte ``end`` and flush; return the new end. What a write that failed has left there is cut first."""
    if os.fstat(fd).st_size != end:
        os.ftruncate(fd, end)
    written = 0
    while written < len(data):
        written += os.write(fd, data[written:])
    os.fsync(fd)
    return end + len(data)


def cut_torn_line(fd: int) -> tuple[int, int]:
    """Cut what follows the last newline, as a crash leaves it; return the size, and how many bytes were cut."""
    size = os.fstat(fd).st_size
    end = after_last_newline(fd, size)
    if end < size:
        os.ftruncate(fd, end)
        os.fsync(fd)
    return end, size - end


def after_last_newline(fd: int, end: int) -> int:
    """Return where the line begins that byte ``end`` would belong to."""
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


# --- content ---------------------------------------------------------------------------------------------------------


def open_to_read(path: Path, *, below: Path | None = None) -> int:
    """Open a regular file; the descriptor is the caller's. A pipe that nobody writes to does not block.

    Args:
        path: of the file.
        below: a folder above it that others may write to: no link on the way from there is followed, nor is the file
            one, so that a folder swapped for a link leads nowhere. None follows links.

    Raises:
        OSError: ENOTDIR or ELOOP where a link is in the way, ENXIO where it is no regular file.
    """
    fd = _open(path, below)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENXIO, "not a regular file", str(path))
    return fd


def _open(path: Path, below: Path | None) -> int:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if below is None:
        return os.open(path, flags)
    *folders, name = path.relative_to(below).parts
    at = os.open(below, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            above = at
            at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            os.close(above)
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=at)
    finally:
        os.close(at)


def file_sha256(path: Path, *, below: Path | None = None) -> str:
    """Content hash of a file, hexadecimal; ``below`` as of ``open_to_read``."""
    with os.fdopen(open_to_read(path, below=below), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path, flags: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def can_write(folder: Path) -> bool:
    """Whether a file can be written, flushed and removed in a folder."""
    probe = folder / f"{WRITE_PROBE}-{os.getpid()}"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"probe")
            os.fsync(fd)
        finally:
            os.close(fd)
            with suppress(OSError):
                probe.unlink()
    except OSError:
        return False
    return True
