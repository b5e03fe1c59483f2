"""Whose fault it is when work on a file fails: that file's, that of its folder or share, or of a service all need.

One rule, here alone. Only a service pauses the line. A folder or share that is away holds up its own files. All else is
one file's: it has its own back-off and attempts, and no other file waits for it.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from semwatch.errors import ConfigError, FileUnavailable, ModelMismatch, ServiceUnavailable
from semwatch.system import files
from semwatch.system.files import Stamp, stamp_of

Scope = Literal["file", "folder", "service"]

PATIENCE_S = 3600.0
"""A file that cannot be read, or whose result cannot be written, is tried this long before it is set aside."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What one file is never to blame for."""


def scope_of(error: BaseException, *, folder: Path, results_dir: Path) -> Scope:
    """Say whose fault an error is that ended the work on one file.

    Args:
        error: that was raised.
        folder: the drop folder of the file.
        results_dir: where its result goes.
    """
    if isinstance(error, FileUnavailable):
        return "file"
    causes = [cause for cause in _chain(error) if isinstance(cause, OSError)]
    if isinstance(error, ServiceUnavailable | ConfigError) and not causes:
        return "service"  # models, ledger
    if any(cause.errno in _FULL for cause in causes) or (causes and not files.can_write(results_dir)):
        return "service"
    if causes and not can_list(folder):
        return "folder"
    return "file"


def check_results(results_dir: Path) -> None:
    """Make sure that the folder of the results is there: below a share that is away, nothing is to be written.

    Raises:
        ServiceUnavailable: it is not.
    """
    try:
        os.scandir(results_dir).close()
    except OSError as error:
        raise ServiceUnavailable(f"{results_dir} cannot be reached: {error.strerror}") from error


def is_of_ledger(error: BaseException) -> bool:
    """Whether the disk under one of our own SQLite files refused, rather than that of other files."""
    return any(isinstance(cause, sqlite3.Error) for cause in _chain(error))


def can_list(folder: Path) -> bool:
    """Whether a folder can be looked into."""
    try:
        os.scandir(folder).close()
    except OSError:
        return False
    return True


def is_there(file: Path) -> bool:
    """Whether a file lies there, as far as can be seen; what cannot be looked at does not."""
    try:
        file.lstat()
    except OSError:
        return False
    return True


def is_of_disk(error: BaseException) -> bool:
    """Whether a disk or a share refused: another try may go well, however often it did not."""
    return any(isinstance(cause, OSError) for cause in _chain(error))


def stamp_now(file: Path, *, like: Stamp) -> Stamp | None:
    """A file as it is now, compared by what is known of it; None where it cannot be looked at."""
    try:
        return stamp_of(file.lstat(), has_inodes=like.inode is not None)
    except OSError:
        return None


def in_words(error: BaseException) -> str:
    """An error as a reason: ours as it is, any other with its name."""
    if isinstance(error, ServiceUnavailable | ConfigError | ModelMismatch):
        return str(error)
    return f"{type(error).__name__}: {error}"[:500]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it came from, and so on."""
    now: BaseException | None = error
    for _ in range(10):
        if now is None:
            return
        yield now
        now = now.__cause__
