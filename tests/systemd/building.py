"""What goes into the test machines: a Debian, the wheels that the product needs, and the product's own wheels.

Debian and wheelhouse are made once and kept, each needs the network for it; everything later is offline.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from semwatch.triton import setup as triton_setup

SOURCE = Path(__file__).resolve().parents[2]
CACHE = SOURCE / ".cache"
MACHINES = CACHE / "machine"
WHEELS = CACHE / "wheels"

RELEASE = "bookworm"
PYTHON = (3, 11)
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "libpython3.11", "libgomp1")
"""Of Debian, beyond its smallest system. libgomp1 is for scikit-learn, libpython for Triton's python backend."""
FOR_OLDER_PYTHON = ("async-timeout>=4.0.3",)
"""What redis needs before Python 3.11.3, which Debian's is: pip downloads for the Python that runs it."""
DEBIAN_S = 900.0
DOWNLOAD_S = 900.0
BUILD_S = 180.0
_TREE = ("pyproject.toml", "README.md", "daemon", "training", "systemd", "docs")
_NO_TIMERS = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "dpkg-db-backup.timer")


def debian() -> Path:
    """The folder of a bare Debian with systemd and Python, fetched where it is not there."""
    base = MACHINES / "base"
    if not base.is_dir():
        part = MACHINES / "base.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        mirror = os.environ.get("SEMWATCH_DEBIAN_MIRROR")
        _run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, str(part),
             *([mirror] if mirror else []), timeout_s=DEBIAN_S)  # fmt: skip
        shutil.rmtree(part / "var" / "cache" / "apt", ignore_errors=True)
        part.rename(base)
    _tidy(base)
    return base


def _tidy(base: Path) -> None:
    """Keep the journal over reboots, and keep Debian's own timers out of the measurements."""
    (base / "var" / "log" / "journal").mkdir(parents=True, exist_ok=True)
    units = base / "etc" / "systemd" / "system"
    for name in _NO_TIMERS:
        if not (units / name).is_symlink():
            (units / name).symlink_to("/dev/null")


def wheelhouse(*extras: str) -> Path:
    """A folder with wheels of everything that semwatch with these extras needs, and of what a local Triton needs."""
    if sys.version_info[:2] != PYTHON:
        raise RuntimeError(f"Debian {RELEASE} has Python {PYTHON[0]}.{PYTHON[1]}: run the tests with the same")
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    wanted = [*FOR_OLDER_PYTHON, *project["dependencies"]]
    wanted += [line for extra in extras for line in project["optional-dependencies"][extra]]
    _download(sorted(wanted))
    if "triton" in extras:  # its environment is another, of other versions
        _download(list(triton_setup.PACKAGES))
        _download(["--no-deps", triton_setup.SERVER])
    return WHEELS


def _download(wanted: list[str]) -> None:
    noted = WHEELS / "downloaded.txt"
    line = " | ".join(wanted)
    if noted.exists() and line in noted.read_text().splitlines():
        return
    WHEELS.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:")
    _run(*pip, f"--dest={WHEELS}", f"--find-links={WHEELS}", *wanted, timeout_s=DOWNLOAD_S)
    with noted.open("a") as notes:
        notes.write(line + "\n")


def product(out: Path) -> str:
    """Build the wheel of the working tree into ``out``; return its version."""
    _wheel(SOURCE, out)
    return str(tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["version"])


def copy_of_tree(folder: Path, version: str) -> Path:
    """Copy what the wheel is made of, under another version; the caller may change it further."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in _TREE:
        source = SOURCE / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    text = (folder / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(replaced(text, r'(?m)^version = ".*"$', f'version = "{version}"'))
    return folder


def replaced(text: str, pattern: str, by: str) -> str:
    """``text`` with its one match of ``pattern`` replaced; an error where it matches never or twice."""
    changed, n = re.subn(pattern, lambda _: by, text)
    if n != 1:
        raise RuntimeError(f"{pattern!r} matches {n} times: the tests must follow the source")
    return changed


def wheel_of(tree: Path, out: Path) -> None:
    """Build the wheel of a copied tree into ``out``."""
    _wheel(tree, out)


def _wheel(tree: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--no-build-isolation", f"--wheel-dir={out}", str(tree), timeout_s=BUILD_S)  # fmt: skip


def _run(*argv: str, timeout_s: float) -> None:
    done = subprocess.run(
        argv, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
