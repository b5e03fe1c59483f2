"""`semwatch adapt`: what it says where learning is not installed, and that it passes on what learning says."""

import importlib.util
from pathlib import Path

import pytest

from commands import spawn
from daemon import make_site
from semwatch.cli import adapt


def test_it_says_how_to_install_the_learning_package_where_it_is_absent(
    semwatch, tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    real = importlib.util.find_spec
    monkeypatch.setattr(adapt.importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    said = semwatch("adapt", "--site", site.file, "--normals", tmp_path)
    assert said.code == 2
    assert "pip install 'semwatch[train]'" in said.words


@pytest.mark.slow
def test_what_the_learning_package_refuses_ends_it_with_the_same_code_and_words(
    tmp_path: Path, tiny_repository: Path
) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    (tmp_path / "normals").mkdir()
    said = spawn("adapt", "--site", site.file, "--normals", tmp_path / "normals", cwd=tmp_path)
    assert said.code == 2
    assert "holds no image" in said.words
