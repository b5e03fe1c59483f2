"""Renew the lock: the exact versions and hashes of all that `make` installs. Run by `make lock`, with uv installed.

One resolution for all supported Pythons at once; a package stands in one file, and the larger sets include the smaller:

- ``edge.txt``: the daemon, with a Redis server of its own
- ``learning.txt``: edge, and what trains and builds models
- ``development.txt``: learning, and what tests, checks and compiles for GPUs
- ``torch-cpu.txt``: torch's small build, for where pip finds one: on a disk or an index that the machine's pip knows
- ``torch-cuda.txt``: torch from the package index and the libraries of NVIDIA that it needs, for everywhere else
- ``build.txt``: what builds the packages that come as source, semwatch among them

Both builds of torch cannot stand in one file: of two files with right hashes, pip takes the one whose hash it knows
beforehand, which is never the one on a disk. No address of an index is written.

Usage: python requirements/lock.py [--keep]; --keep changes no version that still fits pyproject.toml.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent / "pyproject.toml"
PYTHONS = ("3.11", "3.12", "3.13")
BUILD = ("editables", "hatchling", "setuptools")
SETS = {"edge": ("redis-server",), "learning": ("redis-server", "train"), "development": ("dev",)}
"""By file: the extras of pyproject.toml; each set holds the one before."""
INCLUDES = {"learning": "edge", "development": "learning"}

Blocks = dict[str, str]
"""By package: its lines in a requirements file, more than one where Pythons get different versions."""


def main(argv: list[str]) -> None:
    """Write all files, or none where the packages do not fit each other."""
    keeps = "--keep" in argv
    old = blocks("\n".join(path.read_text() for path in sorted(HERE.glob("*.txt"))))
    with tempfile.TemporaryDirectory() as folder:
        everything, versions = Path(folder, "everything.txt"), Path(folder, "versions.txt")
        everything.write_text(pins(old) if keeps else "")
        compiled(PROJECT, "--extra=dev", "--generate-hashes", f"--output-file={everything}")
        locked = blocks(everything.read_text())
        versions.write_text(pins(locked))
        needs = {
            name: set(blocks(compiled(PROJECT, *(f"--extra={extra}" for extra in extras), f"--constraint={versions}")))
            for name, extras in SETS.items()
        }
        wanted = Path(folder, "build.in")
        wanted.write_text("\n".join(BUILD))
        for_build = set(blocks(compiled(wanted, f"--constraint={versions}")))
    cuda = {name for name in locked if name.startswith(("nvidia-", "cuda-"))} | {"torch", "triton"}
    for name, inner in {name: INCLUDES.get(name) for name in SETS}.items():
        own = needs[name] - cuda - (needs[inner] if inner else set())
        write(name, locked, own, includes=inner)
    write("torch-cuda", locked, cuda)
    write("torch-cpu", {"torch": cpu_wheels(locked["torch"], old.get("torch", ""))}, ["torch"])
    write("build", locked, for_build)


def compiled(source: Path, *options: str) -> str:
    """Let uv resolve for all Pythons from the oldest on; its output."""
    uv = (sys.executable, "-m", "uv", "--quiet", "pip", "compile", "--universal", f"--python-version={PYTHONS[0]}")
    done = subprocess.run(
        [*uv, "--no-annotate", "--no-header", *options, str(source)],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    return done.stdout


def blocks(text: str) -> Blocks:
    """Split a requirements file by package."""
    found: Blocks = {}
    for match in re.finditer(r"^([a-z0-9][a-z0-9._-]*)(\[[^]]*\])?==.*(\n +--hash=.*)*\n?", text, re.MULTILINE):
        found[match[1]] = found.get(match[1], "") + match[0].rstrip("\n") + "\n"
    return found


def pins(locked: Blocks) -> str:
    """Versions alone, without hashes."""
    lines = {line.rstrip(" \\") for block in locked.values() for line in block.splitlines() if "--hash=" not in line}
    return "\n".join(sorted(line for line in lines if "+cpu" not in line)) + "\n"


def cpu_wheels(block: str, old: str) -> str:
    """Lock the CPU wheels that pip finds here, one for each Python, and those of the same version in the old lock."""
    version = re.findall(r"==(\S+)", block)[0] + "+cpu"
    hashes = set()
    for match in re.finditer(r"^torch==(\S+).*(\n +--hash=.*)*", old, re.MULTILINE):
        hashes |= set(re.findall(r"sha256:\w+", match[0])) if match[1] == version else set()
    for python in PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            pip = (sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary=:all:")
            done = subprocess.run(
                [*pip, f"--python-version={python}", f"--dest={folder}", f"torch=={version}"],
                check=False, capture_output=True,
            )  # fmt: skip
            found = [*Path(folder).glob("torch-*.whl")] if done.returncode == 0 else []
            hashes |= {f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" for wheel in found}
            sys.stderr.write(f"torch {version} for Python {python}: {'locked' if found else 'not found here'}\n")
    return " \\\n    ".join([f"torch=={version}", *(f"--hash={one}" for one in sorted(hashes))]) + "\n"


def write(name: str, locked: Blocks, packages: Iterable[str], *, includes: str | None = None) -> None:
    """Write one file of the lock."""
    lines = ["# Written by `make lock` from pyproject.toml; edit that.\n"]
    lines += [f"-r {includes}.txt\n"] if includes else []
    lines += [locked[package] for package in sorted(packages)]
    (HERE / f"{name}.txt").write_text("".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
