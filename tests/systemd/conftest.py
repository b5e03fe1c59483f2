"""The machines of a test run, and the table at its end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import building
import installed
from installed import EXTRAS, Layer, ready
from machine import Machine
from scenario_table import Note, show


@pytest.fixture(scope="session")
def debian() -> Path:
    """A bare Debian."""
    return building.debian()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What an offline machine is given: the wheelhouse and the product's wheel."""
    product = tmp_path_factory.mktemp("product")
    building.product(product)
    return {"/wheels": building.wheelhouse(*EXTRAS), "/product": product}


@pytest.fixture(scope="session")
def version(wheels: dict[str, Path]) -> str:
    """Of the wheel under test."""
    (wheel,) = wheels["/product"].glob("semwatch-*.whl")
    return wheel.name.split("-")[1]


@pytest.fixture(scope="session")
def layer(debian: Path, wheels: dict[str, Path], version: str, tiny_repository: Path) -> Layer:
    """The product installed with tiny models, its settings adapted, switched off."""
    binds = {**wheels, "/models": tiny_repository}
    with Machine(building.MACHINES / "installed", [debian], binds=binds) as machine:
        machine.boot()
        installed.put_version(machine, version)
        installed.semwatch(machine, "install", "--models", "/models", version=version)
        installed.adapt(machine)
    return Layer((machine.disk, debian), binds, version)


@pytest.fixture
def machine(layer: Layer) -> Iterator[Machine]:
    """The product on a machine of this test alone, booted, the daemon ready."""
    with layer.machine("scenario") as machine:
        machine.boot()
        ready(machine)
        yield machine


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Put what a scenario measured into the table."""
    return Note(record_property)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the table after the last test."""
    show(terminalreporter.stats)
