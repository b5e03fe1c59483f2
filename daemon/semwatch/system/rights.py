"""Root works with the rights of whoever could lay a trap: what lies in another account's folder is theirs to swap.

A service may replace a file or a folder of its own by a link at any moment, so looking first helps nothing. Root
therefore reads and writes there as that service: a link then reaches what the service reaches anyway, and what is
written belongs to it from the start.
"""

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAX_LINKS = 40


def owner_on_the_way(path: Path) -> tuple[int, int]:
    """Return user and group of the first part of a path, from the root down, that is not root's; else root's.

    Whoever owns it decides what lies behind it. Root's own links are followed; what is not there is left out.

    Raises:
        OSError: more than 40 links.
    """
    done, left = Path("/"), list(Path.cwd().joinpath(path).parts[1:])
    n_links = 0
    while left:
        part = done / left.pop(0)
        try:
            status = part.lstat()
        except OSError:
            break
        if status.st_uid != 0:
            return status.st_uid, status.st_gid
        if stat.S_ISLNK(status.st_mode):
            n_links += 1
            if n_links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = part.readlink()
            left = [*target.parts[target.is_absolute() :], *left]
            done = Path("/") if target.is_absolute() else done
        else:
            done = done.parent if part.name == ".." else part
    return 0, 0


def is_roots_alone(path: Path) -> bool:
    """Say whether nobody but root can change what lies at a path: for what root is about to run."""
    if owner_on_the_way(path) != (0, 0):
        return False
    real = Path(os.path.realpath(path))
    modes = [part.stat().st_mode for part in (*real.parents, real) if part.exists()]
    return all(mode & stat.S_ISVTX or not mode & (stat.S_IWGRP | stat.S_IWOTH) for mode in modes)


@contextmanager
def of_owner(path: Path) -> Iterator[None]:
    """Do what root does within the block with no more rights than the owner of a path has; without root, nothing.

    Root stays the real user, so the owner can neither end nor trace the process. For processes without threads that
    work meanwhile: rights are those of the whole process.
    """
    uid, gid = owner_on_the_way(path) if os.geteuid() == 0 else (0, 0)
    if uid == 0:
        yield
        return
    groups_before, gid_before = os.getgroups(), os.getegid()
    try:
        entry = pwd.getpwuid(uid)
        gid, groups = entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
    except KeyError:  # a number without a name
        groups = [gid]
    try:
        os.setgroups(groups)
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid_before)
        os.setgroups(groups_before)


def read_no_link(path: Path) -> bytes:
    """Read a regular file with its owner's rights, and no link in its place.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    with of_owner(path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            return file.read()  # a folder says so; a pipe gives what it has
