"""Where exported networks are kept from one run of the tests to the next, and by all workers of a run.

Torch takes seconds to export a network however small it is. The folder is named by all that an export depends on
beside the network itself: a change to any of it begins a new folder, and exports anew.
"""

import fcntl
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from paths import ROOT

FOLDER = ROOT / ".cache" / "tests" / "exports"
N_KEPT = 4
"""Folders of that many states of the sources stay."""
_SOURCES = ("publishing", "families", "discovery", "data", "trunks", "metrics", "synthetic", "system")
"""What exports, and every room that it may import."""
_TOOLS = ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "numpy")


def key() -> str:
    """Hash of the sources that make, export and describe networks, and of the versions of the tools."""
    rooms = [ROOT / "training" / "semwatch_training" / room for room in _SOURCES]
    folders = [*rooms, ROOT / "daemon" / "semwatch" / "models"]
    made_by = hashlib.sha256(sys.version.encode())
    made_by.update(" ".join(f"{tool} {version(tool)}" for tool in _TOOLS).encode())
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    for path in sorted([*sources, ROOT / "tests" / "helpers" / "tiny_models.py"]):
        made_by.update(f"\n{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return made_by.hexdigest()[:16]


def opened() -> Path:
    """The folder for the sources as they are; the oldest others go when it is new."""
    folder = FOLDER / key()
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted((p for p in FOLDER.iterdir() if p != folder), key=lambda p: p.stat().st_mtime)
        for old in others[: 1 - N_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, made under another name and renamed if nobody did before; who comes meanwhile waits."""
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            partial = path.with_suffix(".part")
            make(partial)
            partial.rename(path)
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, of all that test this checkout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
