"""Which heads a start may try: the wanted one, and its deputies where nobody has pinned anything."""

import shutil
from pathlib import Path

import pytest

from semwatch.errors import ModelMismatch
from semwatch.models import choice


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """Heads 1 to 4."""
    made = shutil.copytree(tiny_repository, tmp_path / "models")
    for number in (2, 3, 4):
        shutil.copytree(made / "head" / "1", made / "head" / str(number))
    return made


def test_repository_without_a_head_has_none_to_try(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch):
        choice.to_try(tmp_path, "head")


def test_newest_comes_first_and_earlier_ones_stand_in(repository: Path) -> None:
    assert choice.to_try(repository, "head") == [4, 3, 2, 1]


def test_withdrawn_heads_neither_serve_nor_stand_in(repository: Path) -> None:
    choice.withdraw(repository, "head", 2, "worse")
    choice.withdraw(repository, "head", 4, "worse")
    assert choice.to_try(repository, "head") == [3, 1]


def test_pinned_head_has_no_deputies(repository: Path) -> None:
    assert choice.to_try(repository, "head", 2) == [2]
    choice.pin(repository, "head", 3)
    assert choice.to_try(repository, "head") == [3]
    assert choice.to_try(repository, "head", 1) == [1]
