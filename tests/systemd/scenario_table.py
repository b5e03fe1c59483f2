"""The table of all scenarios: what each measured, and how it ended."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from building import CACHE
from installed import Books

COLUMNS = ("files", "results", "lost", "doubled")
FILE = CACHE / "systemd-scenarios.json"


class Note:
    """Columns of one scenario's row."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def books(self, books: Books) -> None:
        """Files and results, and the promise about them: nothing lost, nothing doubled."""
        for name in COLUMNS:
            self._record(name, getattr(books, name))
        assert (books.lost, books.doubled) == (0, 0), books

    def measured(self, text: str) -> None:
        """A number with its unit and what it is."""
        self._record("measured", text)


def show(stats: Mapping[str, Sequence[Any]]) -> None:
    """Print every scenario's row, and write them as JSON.

    Args:
        stats: pytest's reports by outcome.
    """
    rows = [
        _row(report, outcome)
        for outcome in ("passed", "failed", "error", "skipped")
        for report in stats.get(outcome, ())
        if "/machine_" in report.nodeid
    ]
    if not rows:
        return
    rows.sort(key=lambda row: row["scenario"])
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(rows, indent=1))
    shown = Table("scenario", "outcome", *COLUMNS, "measured", title="semwatch on a real systemd")
    for row in rows:
        shown.add_row(row["scenario"], row["outcome"], *(row.get(c, "") for c in COLUMNS), row["measured"])
    Console(width=180, markup=False).print(shown)


def _row(report: Any, outcome: str) -> dict[str, str]:
    properties = list(report.user_properties)
    measured = "; ".join(value for name, value in properties if name == "measured")
    if outcome == "skipped" and isinstance(report.longrepr, tuple):
        measured = report.longrepr[2].removeprefix("Skipped: ")
    name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    columns = {name: str(value) for name, value in properties if name in COLUMNS}
    return {"scenario": name, "outcome": outcome, **columns, "measured": measured}
