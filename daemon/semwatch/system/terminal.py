"""Words on a terminal: lines and tables that fit its width, and break between words only."""

import re
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from semwatch.system.text import escaped

GAP = "  "
INDENT = 4
"""Blanks before what goes on from a line above."""


def printable(text: str, style: str = "") -> Text:
    """Text as it stands: brackets are no markup, and what would move the cursor or is no UTF-8 stands as \\xNN."""
    return Text(escaped(text, keeps_lines=True), style)


def print_line(console: Console, text: str, mark: tuple[str, str] = ("", "")) -> None:
    """Print text after a coloured mark; on a terminal its lines are wrapped at blanks, elsewhere they stay whole."""
    whole = Text.assemble(mark, printable(text))
    if not console.is_terminal:
        console.print(whole, soft_wrap=True)
        return
    for line in whole.split(allow_blank=True):
        indent = len(line.plain) - len(line.plain.lstrip()) + INDENT
        for i, part in enumerate(_wrapped(line, console.width, hang=indent)):
            console.print(Text.assemble(" " * indent if i else "", part), soft_wrap=True)


def print_facts(console: Console, facts: Mapping[str, str | Text]) -> None:
    """Print names and values, one below the other; long values go on below themselves."""
    for line in _facts(console, [(name, _cell(value)) for name, value in facts.items()]):
        console.print(line, soft_wrap=True)


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    title: str = "",
    note: str = "",
    right: Sequence[int] = (),
) -> None:
    """Print a table; where its longest words are wider than the terminal, each row as a block of facts.

    Args:
        console: where.
        columns: headings.
        rows: a cell for each column.
        title: above the table.
        note: below the table.
        right: columns that end at their right edge, as numbers do.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    heads = [Text(name, "bold") for name in columns]
    widths = _widths([heads, *cells], console.width)
    if title:
        print_line(console, title)
    if widths is None:
        for row in cells:
            for line in _facts(console, [(n, c) for n, c in zip(columns, row, strict=True) if c.plain]):
                console.print(line, soft_wrap=True)
            console.print()
    else:
        rule = [Text("─" * width) for width in widths]
        for row in (heads, rule, *cells):
            for line in _laid_out(row, widths, right):
                console.print(line, soft_wrap=True)
    if note:
        print_line(console, note)


def _cell(value: str | Text) -> Text:
    return value if isinstance(value, Text) else printable(value)


def _widths(rows: Sequence[Sequence[Text]], room: int) -> list[int] | None:
    """Width of each column, never below its longest word; None where that is more than there is room for."""
    columns = list(zip(*rows, strict=True))
    least = [max(max(map(_width, cell.plain.split()), default=0) for cell in column) for column in columns]
    widths = [max(max(map(_width, cell.plain.splitlines()), default=0) for cell in column) for column in columns]
    room -= len(GAP) * (len(columns) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
        widths[widest] -= 1
    return widths


def _laid_out(row: Sequence[Text], widths: Sequence[int], right: Sequence[int]) -> Iterator[Text]:
    parts = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    for i in range(max(map(len, parts))):
        line = Text()
        for column, (lines, width) in enumerate(zip(parts, widths, strict=True)):
            part = lines[i] if i < len(lines) else Text()
            blank = " " * (width - _width(part.plain))
            line = Text.assemble(line, GAP if column else "", *((blank, part) if column in right else (part, blank)))
        line.rstrip()
        yield line


def _facts(console: Console, facts: Sequence[tuple[str, Text]]) -> Iterator[Text]:
    width = max((_width(name) for name, _ in facts), default=0)
    for name, value in facts:
        for i, part in enumerate(_wrapped(value, max(console.width - width - len(GAP), 20))):
            head = name if i == 0 else ""
            yield Text.assemble(head + " " * (width - _width(head)) + GAP, part)


def _wrapped(text: Text, width: int, *, hang: int = 0) -> list[Text]:
    """Lines of at most so many cells, broken at blanks only; one at least. Those after the first have ``hang`` less."""
    lines: list[Text] = []
    for line in text.split(allow_blank=True) or [text]:
        breaks, used, room = [], 0, width
        for word in re.finditer(r"\s*\S+", line.plain):
            cells = _width(word[0])
            if used and used + cells > room:
                breaks.append(word.start() + len(word[0]) - len(word[0].lstrip()))
                used, room = _width(word[0].lstrip()), width - hang
            else:
                used += cells
        lines += line.divide(breaks)
    for line in lines:
        line.rstrip()
    return lines


def _width(text: str) -> int:
    return Text(text).cell_len
