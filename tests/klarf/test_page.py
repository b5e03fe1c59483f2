"""The examples of the page hold, on the file that the page shows."""

import doctest
import re
from pathlib import Path

import pytest

from paths import ROOT

PAGE = ROOT / "docs" / "klarf.md"


def test_examples_of_the_page_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "lot7.001").write_text(shown)
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0
