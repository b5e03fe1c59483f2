"""Install a Triton server without a container: NVIDIA's wheel in a Python environment of its own.

The ``nvidia-pytriton`` wheel holds ``tritonserver`` and its python backend, and no other backend. The environment needs
numpy below 2 for it, so it is not the daemon's; ONNX Runtime is the daemon's version, so both give the same numbers.

    <folder>/venv/                  the environment
    <folder>/venv/installed.json    what is in it, written last
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from semwatch.errors import ConfigError
from semwatch.system import files, rights
from semwatch.triton.config import Target

SERVER = "nvidia-pytriton==0.7.0"
"""Holds tritonserver 2.51.0 and its python backend."""
PACKAGES = ("numpy==1.26.4", f"onnxruntime=={version('onnxruntime')}")
"""What the python backend needs; with numpy 2 it would answer with empty tensors and no error."""
TENSORRT_RTX = "tensorrt-rtx-cu13==1.7.1.116"
"""What runs TensorRT-for-RTX plans, of the version that the extra `tensorrt` compiles them with."""
PYTHONS = ("3.11", "3.12")
"""Python versions for which server and packages both have wheels."""
INSTALL_TIMEOUT_S = 600.0

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STAMP = "installed.json"


@dataclass(frozen=True, slots=True)
class Installation:
    """Where a set-up server lies."""

    folder: Path

    @property
    def venv(self) -> Path:
        """The server's own Python environment."""
        return self.folder / "venv"

    @property
    def packages(self) -> Path:
        """Its installed packages."""
        return self.venv / "lib" / f"python{_PYTHON}" / "site-packages"

    @property
    def server(self) -> Path:
        """The server's files in the wheel."""
        return self.packages / "pytriton" / "tritonserver"

    @property
    def stub(self) -> Path:
        """The program that runs a Python model; it must stand beside the python backend's library."""
        return self.server / "backends" / "python" / "triton_python_backend_stub"

    def library_path(self) -> str:
        """Where the wheel's own libraries and this Python's library lie."""
        return f"{self.packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"

    def is_current(self, target: Target = "onnx-python") -> bool:
        """Whether everything that this release asks for was installed; an installation may have more."""
        try:
            found = json.loads((self.venv / _STAMP).read_bytes())
            is_ours = found | {"packages": None} == _stamp(()) | {"packages": None}
            is_whole = {*packages(target)} <= {*found["packages"]}
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return is_ours and is_whole and os.access(self.stub, os.X_OK)


def packages(target: Target) -> tuple[str, ...]:
    """What the python backend needs in its environment."""
    return (*PACKAGES, TENSORRT_RTX) if target == "tensorrt-rtx" else PACKAGES


def set_up(folder: Path, target: Target = "onnx-python") -> Installation:
    """Install the server into ``folder``; does nothing where that was done already.

    Raises:
        ConfigError: the package index is out of reach, the disk refuses, or a system library is missing.
    """
    made = Installation(folder.absolute())
    if made.is_current(target):
        return made
    if _PYTHON not in PYTHONS:
        raise ConfigError(f"the local Triton needs Python {' or '.join(PYTHONS)}, this is {_PYTHON}: run it from one")
    if os.geteuid() == 0 and not rights.is_roots_alone(made.folder):
        raise ConfigError(
            f"{made.folder} is not root's alone: root would run what its owner puts there. Take a folder such as "
            f"/opt/semwatch/triton, which the server reads, or do it as the owner (`sudo -u USER`)"
        )
    try:
        shutil.rmtree(made.venv, ignore_errors=True)  # half of an earlier try, or another release's
        made.folder.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        _command([sys.executable, "-m", "venv", str(made.venv)], "make a Python environment (Debian: python3-venv)")
        pip = [str(made.venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # Its own requirements are those of a Python binding that nobody uses here.
        _command([*pip, "--no-deps", SERVER], f"install {SERVER}")
        _command([*pip, *packages(target)], f"install {', '.join(packages(target))}")
        shutil.copy2(made.server / "python_backend_stubs" / _PYTHON / made.stub.name, made.stub)
        _check_libraries(made)
        files.write_whole(made.venv / _STAMP, json.dumps(_stamp(packages(target))).encode())
    except OSError as error:
        raise ConfigError(f"Triton cannot be set up in {folder}: {error}") from error
    return made


def _stamp(packages: Sequence[str]) -> dict[str, object]:
    return {"server": SERVER, "packages": list(packages), "python": _PYTHON}


def _command(command: list[str], purpose: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"could not {purpose} within {INSTALL_TIMEOUT_S:g} s; try again") from error
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).decode("utf-8", "replace").strip()[-1500:]
        raise ConfigError(f"could not {purpose}: {output}") from error


def _check_libraries(made: Installation) -> None:
    """The stub needs libpython of this Python as a shared library; without it every model fails in riddles."""
    environment = {**os.environ, "LD_LIBRARY_PATH": made.library_path()}
    output = subprocess.run([str(made.stub)], env=environment, capture_output=True, timeout=30, check=False).stderr
    if b"error while loading shared libraries" in output:
        raise ConfigError(
            f"Triton's python backend does not start: {output.decode('utf-8', 'replace').strip()}; install this "
            f"Python's shared library (Debian: apt install libpython{_PYTHON})"
        )
