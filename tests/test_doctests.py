"""The examples in docstrings hold."""

import doctest
from importlib import import_module

import pytest

from paths import ROOT


def _modules() -> list[str]:
    """Every module whose source shows an example."""
    return [
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        for package in (ROOT / "daemon", ROOT / "training")
        for path in sorted(package.rglob("*.py"))
        if ">>> " in path.read_text()
    ]


@pytest.mark.parametrize("name", _modules())
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
