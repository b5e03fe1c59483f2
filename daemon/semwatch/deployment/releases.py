"""Where versions of the programs live, and which of them serves.

PREFIX/<version>/   a virtual environment, made by hand
PREFIX/current      a link to the version that serves; units start PREFIX/current/bin/semwatch
"""

import importlib.metadata
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import semwatch
from semwatch.deployment.installed_files import PREFIX
from semwatch.errors import ConfigError
from semwatch.system import files

CURRENT = "current"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an installation lives; with another root than / it is a folder for an image, and systemd is not asked."""

    prefix: Path = PREFIX
    root: Path = Path("/")
    is_live: bool = True

    def on_disk(self, path: Path) -> Path:
        """A path of the machine as this process reaches it."""
        return self.root / path.relative_to("/")

    @property
    def current(self) -> Path:
        """The link to the version that serves."""
        return self.on_disk(self.prefix / CURRENT)


@dataclass(frozen=True, slots=True)
class Release:
    """One version of the programs, and the folder of its package ``semwatch``."""

    version: str
    package: Path


def place(prefix: Path, root: Path | None) -> Place:
    """Where to install, after a look at what can work there.

    Raises:
        ConfigError: units could not name the prefix, or could not see it.
    """
    if not re.fullmatch(r"(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)+", str(prefix)):
        raise ConfigError(f"--prefix {prefix}: must be an absolute path of letters, digits and _ . + - (units name it)")
    if prefix.parts[1] in ("home", "root", "tmp", "run") or str(prefix).startswith("/var/tmp"):
        raise ConfigError(f"--prefix {prefix}: the services see nothing under there; take {PREFIX}")
    return Place(prefix, root.absolute(), is_live=False) if root else Place(prefix)


def own_release() -> Release:
    """The version that runs this process."""
    return Release(importlib.metadata.version("semwatch"), Path(semwatch.__file__).parent)


def check_own_environment(at: Place, version: str) -> None:
    """See that this process runs in PREFIX/<version>, which is what the units will start.

    Raises:
        ConfigError: it does not; with the commands that make it so.
    """
    here, wanted = Path(sys.prefix).resolve(), at.prefix / version
    if here != wanted.resolve():
        raise ConfigError(
            f"the services start {at.prefix / CURRENT}/bin/semwatch, but this semwatch {version} lives in {here}; "
            f"make it an environment there and install from that one:\n"
            f"  python3 -m venv {wanted}\n"
            f"  {wanted}/bin/pip install --no-index --find-links wheels 'semwatch[redis-server]=={version}'\n"
            f"  sudo {wanted}/bin/semwatch install --prefix {at.prefix}"
        )


def release_in_prefix(at: Place, version: str) -> Release:
    """Find a version by its number.

    Raises:
        ConfigError: it is not in the prefix.
    """
    prefix = at.on_disk(at.prefix)
    if re.fullmatch(r"[0-9][A-Za-z0-9.+!]*", version):
        found = sorted((prefix / version).glob("lib/python3*/site-packages/semwatch/__init__.py"))
        if found and os.access(prefix / version / "bin" / "semwatch", os.X_OK):
            return Release(version, found[0].parent)
    others = sorted(path.parents[1].name for path in prefix.glob("[0-9]*/bin/semwatch"))
    raise ConfigError(f"semwatch {version} is not in {at.prefix}; there: {', '.join(others) or 'none'}")


def switch(at: Place, version: str) -> None:
    """Let a version serve from the next start on, by one rename.

    Raises:
        ConfigError: there is something else than a link.
        OSError: the disk refused.
    """
    link = at.current
    if link.exists() and not link.is_symlink():
        raise ConfigError(f"{link} is not a link; move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(f".{CURRENT}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(version)
    files.rename(partial, link)


def serving_version(at: Place) -> str | None:
    """The version that ``current`` names, None without one."""
    try:
        return at.current.readlink().name
    except OSError:
        return None
