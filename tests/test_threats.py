"""The threat model, and the reports of others: each situation that a page names has its test."""

import re

from paths import ROOT

PAGE = (ROOT / "docs" / "threats.md").read_text()
FAULTS = (ROOT / "docs" / "faults.md").read_text()


def test_every_attack_of_the_page_has_a_test_that_is_there() -> None:
    section = PAGE.partition("## What is tried")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| attack")]
    assert len(rows) >= 20
    for row in rows:
        (named,) = re.findall(r"`(tests/[\w/.]+)::(\w+)`", row)
        path, name = named
        assert f"def {name}(" in (ROOT / path).read_text(), row


def test_every_report_of_others_has_a_test_that_is_there() -> None:
    section = FAULTS.partition("## Reports of others")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| report")]
    assert len(rows) == 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", row)
        assert named or row.endswith("| the same |"), row
        assert all(f"def {name}(" in (ROOT / path).read_text() for path, name in named), row
