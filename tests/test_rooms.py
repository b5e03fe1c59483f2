"""The house: every room says what it owns, what it may import and where to start; the two sides share no files."""

import ast
import re

import pytest

from paths import ROOT

PACKAGES = sorted(path.parent for package in ("daemon/semwatch", "training/semwatch_training")
                  for path in (ROOT / package).rglob("__init__.py"))  # fmt: skip
ROOMS = [folder for folder in PACKAGES if folder.name not in ("semwatch", "semwatch_training", "backend", "synthetic")]
READS_ACROSS = {
    "settings/site.py",  # where the setting stands
    "service/migration.py",  # what an older release left, once
    "service/learning_side.py",  # the same, for the found classes
    "deployment/backups.py",  # copies both sides' files for the operator
}
"""Files of the daemon that may name the learning folder."""


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_room_says_what_it_owns_what_it_may_import_and_where_to_start(room) -> None:
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    owns, _, rest = text.partition("\n\n")
    assert owns.strip()
    assert re.search(r"^May import: \S", rest, re.MULTILINE), text
    start = re.search(r"^Start reading: (.*)", rest, re.MULTILINE)
    assert start, text
    named = re.findall(r"`([\w./]+\.py)`", start[1])
    assert named
    assert all((room / name).is_file() for name in named), named


def test_no_module_lies_beside_the_rooms_but_the_nouns_the_errors_and_the_entry() -> None:
    beside = {path.name for path in (ROOT / "daemon/semwatch").glob("*.py")}
    assert beside == {"__init__.py", "__main__.py", "defects.py", "errors.py"}
    beside = {path.name for path in (ROOT / "training/semwatch_training").glob("*.py")}
    assert beside == {"__init__.py", "__main__.py"}


def test_daemon_reads_no_file_of_learning() -> None:
    package = ROOT / "daemon/semwatch"
    named = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "learning_dir" in path.read_text("utf-8")
    }
    assert named <= READS_ACROSS


def test_learning_reads_no_file_of_the_daemon() -> None:
    package = ROOT / "training/semwatch_training"
    own = re.compile(r"\b(state_dir|results_dir)\b")
    assert [str(p.relative_to(package)) for p in package.rglob("*.py") if own.search(p.read_text("utf-8"))] == []
