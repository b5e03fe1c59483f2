"""The lock: what pyproject.toml asks for is in it, once for each Python, with hashes; pip takes nothing else."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11.2", "3.11.7", "3.12.1", "3.13.0")
FILES = sorted(LOCK.glob("*.txt"))
SETS = {
    "edge": ("edge",),
    "learning": ("edge", "learning", "torch-cuda"),
    "development": ("edge", "learning", "torch-cuda", "development"),
}
EXTRAS = {"edge": ("redis-server",), "learning": ("redis-server", "train"), "development": ("dev",)}


def blocks(file: Path) -> Iterator[tuple[Requirement, list[str]]]:
    """Every requirement of a file with its hashes."""
    text = file.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith(("#", "-r ")):
            continue
        requirement, *hashes = line.split("--hash=")
        yield Requirement(requirement.strip()), [one.strip() for one in hashes]


def locked(name: str, python: str) -> dict[str, list[str]]:
    """Versions by package, as pip on Linux with this Python reads them."""
    environment = {"python_full_version": python, "python_version": python.rpartition(".")[0], "sys_platform": "linux",
                   "platform_machine": "x86_64", "platform_python_implementation": "CPython"}  # fmt: skip
    found: dict[str, list[str]] = {}
    for part in SETS[name]:
        for requirement, _ in blocks(LOCK / f"{part}.txt"):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                (version,) = requirement.specifier
                found.setdefault(canonicalize_name(requirement.name), []).append(version.version)
    return found


def asked_for(extras: tuple[str, ...], python: str) -> Iterator[Requirement]:
    for line in (*PROJECT["dependencies"], *(line for one in extras for line in PROJECT["optional-dependencies"][one])):
        requirement = Requirement(line)
        if requirement.name == "semwatch":
            yield from asked_for(tuple(requirement.extras), python)
        elif requirement.marker is None or requirement.marker.evaluate({"python_version": python.rpartition(".")[0]}):
            yield requirement


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_package_is_pinned_with_hashes_and_no_address_is_written(file: Path) -> None:
    found = list(blocks(file))
    assert found
    for requirement, hashes in found:
        assert [one.operator for one in requirement.specifier] == ["=="]
        assert requirement.url is None
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes)
    assert "//" not in file.read_text()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", SETS)
def test_set_holds_what_the_project_asks_for_in_one_version_for_each_python(name: str, python: str) -> None:
    found = locked(name, python)
    assert [package for package, versions in found.items() if len(versions) != 1] == []
    for requirement in asked_for(EXTRAS[name], python):
        (version,) = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}: run `make lock`"


def test_edge_has_nothing_of_learning() -> None:
    assert not {"torch", "triton", "onnx", "scikit-learn", "matplotlib"} & set(locked("edge", "3.13.0"))


def test_both_builds_of_torch_are_of_one_version() -> None:
    (cpu, _), *rest = blocks(LOCK / "torch-cpu.txt")
    (cuda,) = (found for found, _ in blocks(LOCK / "torch-cuda.txt") if found.name == "torch")
    assert (rest, str(cpu)) == ([], f"{cuda}+cpu")


def test_project_names_the_pythons_that_are_locked() -> None:
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert named == {python.rpartition(".")[0] for python in PYTHONS}
    assert PROJECT["requires-python"] == ">=3.11"


# --- pip itself, offline ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with pip alone."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def install_torch(python: Path, wheels: Path) -> "subprocess.CompletedProcess[str]":
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environ |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PYTHONPATH": str(LOCK),
    }
    code = "import install; install.install_torch()"
    return subprocess.run(
        [str(python), "-c", code], env=environ, capture_output=True, text=True, timeout=120, check=False
    )


def wheel(folder: Path, name: str, version: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        info = f"{name}-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_cpu_build_that_was_not_locked_is_refused(empty: Path, tmp_path: Path) -> None:
    ((cpu, _),) = blocks(LOCK / "torch-cpu.txt")
    wheel(tmp_path, "torch", str(cpu).partition("==")[2])
    done = install_torch(empty, tmp_path)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "CUDA" not in done.stdout
    assert (
        "torch" not in subprocess.run([empty, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    )


def test_without_a_cpu_build_the_cuda_build_is_asked_for(empty: Path, tmp_path: Path) -> None:
    done = install_torch(empty, tmp_path)
    assert done.returncode != 0
    assert "the CUDA build comes" in done.stdout
    assert "No matching distribution found for cuda-bindings" in done.stderr
