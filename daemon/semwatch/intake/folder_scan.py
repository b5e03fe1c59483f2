"""What lies in a drop folder, looked at again and again at little cost.

A folder whose own time has not changed has no new, renamed or removed entries: it is not listed. Of one that is listed,
entries that were found settled, or are no images, are known by name and inode, and are not looked at again. What is
written in place under an old name shows in neither; events tell of it, and a full scan, which takes nothing for known.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ENTRIES_A_CHUNK = 4096
SETTLES_S = 3.0
"""A folder's time says something once it has stood this long: file systems count in steps of up to two seconds."""

Found = list[tuple[str, os.stat_result]]
"""Paths, relative to the drop folder, and their status."""


@dataclass(slots=True)
class _Seen:
    """One folder as it was when it was listed last."""

    state: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Device, inode and times of the folder."""
    since: float = 0.0
    """When this state was first seen."""
    listed_at: float = float("-inf")
    known: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Sorted hashes of the entries that need no look."""
    below: list[str] = field(default_factory=list)
    """Paths of its folders."""


@dataclass(slots=True)
class Scan:
    """What one scan found out beside the files that it handed over."""

    unreadable: set[str] = field(default_factory=set)
    """Folders that could not be read."""
    listed: dict[str, set[str] | None] = field(default_factory=dict)
    """By folder that was listed, the paths of images in it that are not known to be settled; None: it is gone."""
    n_looked_at: int = 0


class FolderScan:
    """The memory of one drop folder, for one thread.

    Args:
        root: the drop folder.
        is_image: says of a name whether it may be an image.
        is_temporary: says of a name whether it is not to be seen at all.
        recursive: look below too.
        take: is given images, a few hundred at a time; returns the paths of those that are settled.
        clock: monotonic.
    """

    def __init__(
        self,
        root: Path,
        *,
        is_image: Callable[[str], bool],
        is_temporary: Callable[[str], bool],
        recursive: bool,
        take: Callable[[Found], set[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._recursive, self._take, self._clock = root, recursive, take, clock
        self._is_image, self._is_temporary = is_image, is_temporary
        self._seen: dict[str, _Seen] = {}

    def forget(self) -> None:
        """Take nothing for known any more: another folder lies there, or all is to be looked at."""
        self._seen.clear()

    def run(self) -> Scan:
        """Look at everything that may be new.

        Raises:
            OSError: the drop folder itself cannot be read.
        """
        scan, pending, reached = Scan(), [""], set[str]()
        while pending:
            folder = pending.pop()
            try:
                pending += self._look(folder, scan)
                reached.add(folder)
            except OSError as error:
                if folder == "":
                    raise
                if not isinstance(error, FileNotFoundError | NotADirectoryError):
                    scan.unreadable.add(folder)
        for gone in self._seen.keys() - reached:
            del self._seen[gone]
            if gone not in scan.unreadable:
                scan.listed[gone] = None
        return scan

    def _look(self, folder: str, scan: Scan) -> Sequence[str]:
        """List a folder where that may show something new; return the folders in it."""
        now, seen = self._clock(), self._seen.get(folder)
        status = (self._root / folder).stat() if folder == "" else (self._root / folder).lstat()
        state = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(folder)
        if seen is None:
            seen = _Seen()
        if state != seen.state:
            seen.state, seen.since = state, now
        elif seen.listed_at - seen.since >= SETTLES_S:
            return seen.below
        self._list(folder, seen, scan)
        seen.listed_at = now
        self._seen[folder] = seen
        return seen.below

    def _list(self, folder: str, seen: _Seen, scan: Scan) -> None:
        before = {path.rpartition("/")[2]: path for path in seen.below}
        known: list[NDArray[np.int64]] = []
        below: list[str] = []
        images: set[str] = set()
        with os.scandir(self._root / folder) as listing:
            for entries, hashes in _chunks(listing):
                is_known = _are_in(hashes, seen.known)
                if before:
                    below += [before[entry.name] for entry in entries if entry.name in before]
                new = [entries[i] for i in np.flatnonzero(~is_known)]
                scan.n_looked_at += len(new)
                open_, folders = self._sort(folder, new)
                images |= open_
                below += [path for path in folders if path.rpartition("/")[2] not in before]
                names = {path.rpartition("/")[2] for path in open_}
                known.append(hashes[[entry.name not in names for entry in entries]] if names else hashes)
        seen.known = np.unique(np.concatenate(known)) if known else np.zeros(0, np.int64)
        seen.below = below
        scan.listed[folder] = images

    def _sort(self, folder: str, entries: "Sequence[os.DirEntry[str]]") -> tuple[set[str], list[str]]:
        """Hand over images among entries; return those that are not settled, and the folders."""
        found: Found = []
        folders: list[str] = []
        unseen: set[str] = set()
        for entry in entries:
            if self._is_temporary(entry.name):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            if self._is_image(entry.name):
                status = _status_of(entry)
                if status is None:  # vanished, or cannot be reached now: it stays unknown
                    unseen.add(path)
                elif stat.S_ISREG(status.st_mode):
                    found.append((path, status))
                elif stat.S_ISDIR(status.st_mode) and self._recursive:
                    folders.append(path)
            elif self._recursive and _is_folder(entry):
                folders.append(path)
        settled = self._take(found) if found else set()
        return unseen | {path for path, _ in found if path not in settled}, folders


def _chunks(listing: "Iterator[os.DirEntry[str]]") -> "Iterator[tuple[list[os.DirEntry[str]], NDArray[np.int64]]]":
    while entries := list(islice(listing, ENTRIES_A_CHUNK)):
        yield entries, np.array([hash((entry.name, entry.inode())) for entry in entries], np.int64)


def _are_in(hashes: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each hash whether it is in a sorted array."""
    if not len(known):
        return np.zeros(len(hashes), np.bool_)
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return np.asarray(known[at] == hashes, np.bool_)


def _status_of(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:
        return None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False
