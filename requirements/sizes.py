"""Print how much disk each set takes where `development` is installed, modules as compiled at installation included."""

import importlib.metadata
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETS = {
    "edge": ("edge",),
    "learning": ("edge", "learning", "torch-cuda"),
    "development": ("edge", "learning", "torch-cuda", "development", "build"),
}
BLOCK = 4096


def main() -> None:
    """Write one line for each set, to the standard output."""
    for name, files in SETS.items():
        text = "".join((HERE / f"{file}.txt").read_text() for file in files)
        wanted = {found.lower() for found in re.findall(r"^([a-z0-9._-]+)==", text, re.MULTILINE)}
        held = [package for package in importlib.metadata.distributions() if normal(package.name) in wanted]
        size = sum(size_of(package) for package in held)
        sys.stdout.write(f"{name:12} {size / 2**20:6.0f} MB in {len(held):3} packages\n")


def normal(name: str) -> str:
    """Return the name of a package as the lock spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def size_of(package: importlib.metadata.Distribution) -> int:
    """Whole blocks of its files."""
    files = [Path(str(package.locate_file(file))) for file in package.files or ()]
    return sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in files if file.is_file())


if __name__ == "__main__":
    main()
