"""The conventions of drop folders: which names are seen, and when a file counts as complete. Folders are only read."""

import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from semwatch.system.files import Stamp, stamp_of

Completeness = Literal["rename", "marker", "steady"]

TEMPORARY_SUFFIXES = (".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", "~")


def _is_none(_: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Folder:
    """One drop folder and the convention of the tool that writes it; the settings say it."""

    path: Path
    source: str
    """Name of the tool, unique."""
    completeness: Completeness
    """``rename``: complete as soon as it has its final name. ``marker``: once a marker lies beside it, ``x.tif.done``
    or ``x.done``, not older than the file (an older one may belong to what lay there before: then steady as well).
    ``steady``: size and mtime are the same in two looks ``steady_s`` apart."""
    steady_s: float
    marker_suffixes: tuple[str, ...]
    recursive: bool
    polling: bool
    """Scan every ``poll_s`` and expect no events: for network shares, which send none."""
    suffixes: tuple[str, ...]
    """Lower case; names are compared without regard to case."""
    is_manifest: Callable[[str], bool] = _is_none
    """Says of a name whether it is one of a KLARF, which is taken like an image."""

    def stamp(self, status: os.stat_result) -> Stamp:
        """What tells a state of a file in it from another. Shares may make inode numbers up anew."""
        return stamp_of(status, has_inodes=not self.polling)


def is_temporary(name: str) -> bool:
    """Say whether a name, of a file or a directory, is one that writers use before the final one.

    >>> [is_temporary(name) for name in ("a.tif", "a.tif.part", ".a.tif", "a.tif~", "~$a.tif")]
    [False, True, True, True, True]
    """
    return name.startswith((".", "~$")) or name.lower().endswith(TEMPORARY_SUFFIXES)


def walk(folder: Folder, under: str, unreadable: set[str] | None = None) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of every image or KLARF below the directory ``under`` (relative; "" for the whole folder).

    Directories that cannot be read are added to ``unreadable``. Raises: OSError when the folder itself cannot be read.
    """
    pending = [under]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(folder.path / directory) as listing:
                entries = [entry for entry in listing if not is_temporary(entry.name)]
        except OSError:
            if directory == "":
                raise
            if unreadable is not None:
                unreadable.add(directory)
            continue
        for entry in entries:
            path = f"{directory}/{entry.name}" if directory else entry.name
            status = _status_in(entry) if is_image(folder, entry.name) else None
            if status is not None and stat.S_ISREG(status.st_mode):
                yield path, status
            elif folder.recursive and _is_dir(entry):
                pending.append(path)


def _status_in(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:  # vanished, or cannot be reached now: the next scan looks again
        return None


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def status_of(folder: Folder, path: str) -> os.stat_result | None:
    """Look at a path itself, not at what a link names; None where that cannot be done now."""
    try:
        return (folder.path / path).lstat()
    except OSError:
        return None


def is_image(folder: Folder, path: str) -> bool:
    """Say whether a name is one of an image, or of a KLARF where the recipe of the folder reads them."""
    return path.lower().endswith(folder.suffixes) or folder.is_manifest(path)


def complete_at(folder: Folder, path: str, status: os.stat_result, now: float) -> float:
    """Return the monotonic time at which the file counts as complete if it does not change until then."""
    if folder.completeness == "rename":
        return now
    if folder.completeness == "steady":
        return now + folder.steady_s
    stem = path.rpartition(".")[0]
    found = [status_of(folder, f"{base}{suffix}") for base in (path, stem) for suffix in folder.marker_suffixes]
    markers_ns = [marker.st_mtime_ns for marker in found if marker is not None]
    if not markers_ns:
        return math.inf
    return now if max(markers_ns) >= status.st_mtime_ns else now + folder.steady_s


def marked_by(folder: Folder, path: str) -> list[str]:
    """Return the image names that a marker of this name could speak of."""
    if folder.completeness != "marker":
        return []
    stems = [path.removesuffix(suffix) for suffix in folder.marker_suffixes if path.endswith(suffix)]
    suffixes = ("", *folder.suffixes, *(suffix.upper() for suffix in folder.suffixes))
    return [f"{stem}{suffix}" for stem in stems for suffix in suffixes]
