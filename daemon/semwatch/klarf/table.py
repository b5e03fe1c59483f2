"""A list of rows under named columns: where each row stands, and its cells on demand."""

import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from semwatch.klarf.source import (
    FLAT_TOKEN,
    FLAT_WORD,
    INTEGER,
    NESTED_WORD,
    NOT_A_NUMBER,
    NUMBER,
    STRING,
    Source,
    Span,
    Value,
    as_value,
)

Kind = Literal["integer", "number", "any", "images", "images at end"]
"""What a cell may hold. A number may be NA, an integer may not: it names the row."""

_END = rb"(?![^\s;])"
NAMED_IMAGES = rb'Images?+\s*+[0-9]++\s*+\{(?>[^"{};]++|' + STRING + rb")*+\}"
_CELLS = {
    "integer": INTEGER + _END,
    "number": rb"(?>" + NUMBER + rb"|" + NOT_A_NUMBER + rb")" + _END,
    "images": rb"(?>" + NAMED_IMAGES + rb"|N" + _END + rb"|)",
    "images at end": rb"(?>" + NAMED_IMAGES + rb"|N" + _END + rb"|" + INTEGER + rb"(?>\s++" + INTEGER + rb")*+|)",
}
_FLAT_ANY = rb"(?:" + FLAT_WORD + rb"|" + STRING + rb")"
_NESTED_ANY = rb"(?:" + NESTED_WORD + rb"|" + STRING + rb")"


@dataclass(frozen=True, slots=True)
class Column:
    """A column as it is declared.

    Attributes:
        name: as written.
        type: ``int32``, ``float``, ``string``, ``ImageList``; empty in the flat versions, which declare none.
        kind: what its cells may hold.
        span: of the declaration.
    """

    name: str
    type: str
    kind: Kind
    span: Span


@dataclass(frozen=True, eq=False)
class Columns:
    """What a list declares; several lists of the flat versions share one declaration.

    Attributes:
        all: the columns in their order.
        declared: bytes of the declaration: the statement ``DefectRecordSpec``, or ``Columns n { ... }``.
        count: where the number of columns stands.
    """

    all: tuple[Column, ...]
    declared: Span
    count: Span

    def __len__(self) -> int:
        return len(self.all)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What each column's cells may hold."""
        return tuple(column.kind for column in self.all)

    @cached_property
    def by_name(self) -> Mapping[str, int]:
        """Number of each column by its name in capitals."""
        return {column.name.upper(): i for i, column in enumerate(self.all)}

    @cached_property
    def images(self) -> int | None:
        """Number of the column that lists images."""
        return next((i for i, column in enumerate(self.all) if column.kind.startswith("images")), None)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A list of rows; of each row only its place is kept, 16 bytes.

    Attributes:
        name: of the list, as written.
        start: first byte of the list's own name.
        columns: as declared.
        starts, ends: first byte of each row, and the one behind its last cell.
        is_flat: of version 1.1 or 1.2.
        has_inner_count: flat with images: each image list begins with its own length.
    """

    source: Source
    name: str
    start: int
    columns: Columns
    starts: "array[int]"
    ends: "array[int]"
    is_flat: bool
    has_inner_count: bool = True

    def __len__(self) -> int:
        return len(self.starts)

    def index(self, name: str) -> int | None:
        """Number of a column, however its name is capitalised; None where there is none."""
        return self.columns.by_name.get(name.upper())

    def cells(self, row: int) -> list[Span]:
        """Where the cells of a row stand; an image list is one cell, without images an empty one."""
        start, end = self.starts[row], self.ends[row]
        data = self.source.data
        if not self.is_flat:
            found = row_pattern(self.columns.kinds, is_flat=False, groups=True).match(data, start)
            assert found is not None  # the row was read with the same pattern
            return [Span(*found.span(i + 1)) for i in range(len(self.columns))]
        words = [Span(*token.span()) for token in FLAT_TOKEN.finditer(data, start, end)]
        at = self.columns.images
        if at is None:
            return words
        width = len(words) - (len(self.columns) - 1)
        before = words[at - 1].end if at else start
        images = Span(words[at].start, words[at + width - 1].end) if width else Span(before, before)
        return [*words[:at], images, *words[at + width :]]

    def cell(self, row: int, index: int) -> Span:
        """Where one cell stands."""
        at = self.columns.images
        if self.is_flat and at is not None and index >= at:
            return self.cells(row)[index]
        found = self._up_to(index).match(self.source.data, self.starts[row])
        assert found is not None  # the row was read with a pattern that is narrower
        return Span(*found.span(1))

    def column_words(self, index: int) -> Iterator[bytes]:
        """What stands in one column, row by row."""
        data = self.source.data
        at = self.columns.images
        if self.is_flat and at is not None and index >= at:
            for row in range(len(self)):
                span = self.cells(row)[index]
                yield data[span.start : span.end]
            return
        match = self._up_to(index).match
        for start in self.starts:
            found = match(data, start)
            assert found is not None
            yield found[1]

    def column(self, name: str) -> list[Value]:
        """The values of one column; empty where there is no such column."""
        index = self.index(name)
        return [] if index is None else [as_value(word, self.source.encoding) for word in self.column_words(index)]

    def _up_to(self, index: int) -> re.Pattern[bytes]:
        """Pattern of the cells up to one, a group: that they are what they should be was seen when they were read."""
        kinds = self.columns.kinds[: index + 1]
        passed: tuple[Kind, ...] = tuple(kind if kind.startswith("images") else "any" for kind in kinds)
        return row_pattern(passed, is_flat=self.is_flat, groups=False)


@lru_cache(maxsize=256)
def row_pattern(kinds: tuple[Kind, ...], *, is_flat: bool, groups: bool) -> re.Pattern[bytes]:
    """Pattern of the cells of a row, one after the other.

    Args:
        kinds: of the cells.
        is_flat: the grammar of 1.1 and 1.2.
        groups: each cell is a group; else the last one alone is.
    """
    cells = [cell_pattern(kind, is_flat=is_flat) for kind in kinds]
    last = len(cells) - 1
    grouped = (rb"\s*+(" + cell + rb")" if groups or i == last else rb"\s*+" + cell for i, cell in enumerate(cells))
    return re.compile(b"".join(grouped))


def cell_pattern(kind: Kind, *, is_flat: bool) -> bytes:
    """Pattern of one cell."""
    return _CELLS.get(kind, _FLAT_ANY if is_flat else _NESTED_ANY)
