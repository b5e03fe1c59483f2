"""The threat model: each attack that the page names has its test."""

import re

from paths import ROOT

PAGE = (ROOT / "docs" / "threats.md").read_text()


def test_every_attack_of_the_page_has_a_test_that_is_there() -> None:
    section = PAGE.partition("## What is tried")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| attack")]
    assert len(rows) >= 20
    for row in rows:
        (named,) = re.findall(r"`(tests/[\w/.]+)::(\w+)`", row)
        path, name = named
        assert f"def {name}(" in (ROOT / path).read_text(), row
