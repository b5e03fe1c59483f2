"""The report of an evaluation: tables and pictures, for people (``report.md``) and for programs (``report.json``).

Layout of ``report.json``, schema 1:

    schema      1
    title       words
    command     what makes this report again
    seeds       whole numbers
    dataset     words: which data, which split
    version     of semwatch
    tables      title, columns, rows, note, command; cells are words, numbers, null (undefined),
                {mean, std, n} over seeds, or {rate, low, high, n, confidence}
    figures     caption, file

Numbers are never rounded in JSON; Markdown and console show three decimals.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from semwatch.errors import ConfigError
from semwatch.system import terminal
from semwatch.system.files import write_whole
from semwatch_training.metrics.uncertainty import Rate, Spread

Cell = str | int | float | Spread | Rate | None

SCHEMA = 1
UNDEFINED = "–"
PICTURE_DPI = 150


@dataclass(frozen=True, slots=True)
class Table:
    """A table of figures. None and NaN are undefined figures, shown as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """Under the table: what a reader must know, such as the data, the split and the rule of comparison."""
    command: str = ""
    """What makes this table alone; empty if it is the report's command."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigError(f"table {self.title!r}: a row of {len(row)} cells for {len(self.columns)} columns")


Result = tuple[list[Table], dict[str, Figure]]
"""What a protocol gives: tables, and pictures by caption."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the figures come from."""

    command: str
    seeds: tuple[int, ...]
    dataset: str


def markdown(table: Table) -> str:
    """Set a table in Markdown, padded so that it reads as plain text too; figures are flush right."""
    cells = [tuple(_escaped(c) for c in table.columns), *(tuple(_escaped(_words(c)) for c in r) for r in table.rows)]
    right = [_is_numeric(table, column) for column in range(len(table.columns))]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(table.columns))]
    lines = [_line(row, widths, right) for row in cells]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines.insert(1, _line(rule, widths, right))
    parts = [f"## {table.title}", "\n".join(lines), table.note, f"`{table.command}`" if table.command else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_dict(table: Table) -> dict[str, Any]:
    """Lay a table out for JSON: numbers stay numbers, undefined ones become None."""
    return {
        "title": table.title,
        "columns": list(table.columns),
        "rows": [[_plain(cell) for cell in row] for row in table.rows],
        "note": table.note,
        "command": table.command,
    }


def show(table: Table, console: Console) -> None:
    """Print a table; words are shown as they are, never read as markup."""
    rows = [[_words(cell) for cell in row] for row in table.rows]
    numeric = [column for column in range(len(table.columns)) if _is_numeric(table, column)]
    terminal.print_table(console, table.columns, rows, title=table.title, note=table.note, right=numeric)
    console.print()


def write(
    folder: Path, title: str, tables: Sequence[Table], figures: Mapping[str, Figure], provenance: Provenance
) -> None:
    """Write pictures, ``report.md`` and last ``report.json``, each whole: where that one stands, all stand.

    Args:
        folder: made if absent; a report there is replaced.
        title: of the report.
        tables: in the order they are shown.
        figures: pictures by caption, one sentence; the file's name is made of it.
        provenance: where the figures come from; the package's version is added.

    Raises:
        ConfigError: two captions give the same file name, or one gives none.
    """
    files = {caption: _file_name(caption) for caption in figures}
    if len(set(files.values())) < len(files):
        raise ConfigError(f"captions of pictures must differ in their words: {sorted(files)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    for caption, figure in figures.items():
        write_whole(folder / files[caption], _png(figure))
    head = {**asdict(provenance), "seeds": list(provenance.seeds), "version": version("semwatch")}
    text = [f"# {title}\n", _head(head), *(markdown(t) for t in tables)]
    text += [f"![{_escaped(caption)}]({file})\n\n{caption}\n" for caption, file in files.items()]
    write_whole(folder / "report.md", "\n".join(text).encode())
    pictures = [{"caption": caption, "file": file} for caption, file in files.items()]
    content = {"schema": SCHEMA, "title": title, **head, "tables": [as_dict(t) for t in tables], "figures": pictures}
    write_whole(folder / "report.json", (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)).encode())


def _words(cell: Cell) -> str:
    cell = _python(cell)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return UNDEFINED
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Spread | Rate):
        return {name: _plain(value) for name, value in asdict(cell).items()}
    cell = _python(cell)
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _python(cell: Cell) -> Cell:
    """Take a number out of numpy's wrapping, which callers easily leave around it."""
    return cell.item() if isinstance(cell, np.generic) else cell


def _is_numeric(table: Table, column: int) -> bool:
    return bool(table.rows) and not any(isinstance(row[column], str) for row in table.rows)


def _escaped(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|")


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
    return f"| {' | '.join(padded)} |"


def _head(head: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, head["seeds"])) or "none"
    return (
        f"- Data: {head['dataset']}\n- Seeds: {seeds}\n- semwatch {head['version']}\n- Command: `{head['command']}`\n\n"
        f"Scores and shares run from 0 to 1 and higher is better, where a table's note says nothing else. Given are "
        f"mean ± standard deviation (how many) and rates [95 % interval] (how many cases); {UNDEFINED} is "
        f"undefined.\n"
    )


def _file_name(caption: str) -> str:
    words = re.findall(r"[a-z0-9]+", caption.lower())
    if not words:
        raise ConfigError(f"the caption {caption!r} gives no file name; use some words of a-z")
    return "-".join(words)[:60].rstrip("-") + ".png"


def _png(figure: Figure) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=PICTURE_DPI, metadata={"Software": None})
    return content.getvalue()
