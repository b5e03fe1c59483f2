"""KLARF 1.8: ``Record`` in ``Record``, with a ``Field`` or a ``List`` of typed columns as leaves."""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from semwatch.klarf.errors import KlarfError
from semwatch.klarf.source import NESTED_TOKEN, SPACE, Source, Span, as_integer
from semwatch.klarf.table import Column, Columns, Kind, Table, row_pattern

VERSION = "1.8"
MAX_DEPTH = 32
MAX_COLUMNS = 1000
_NUMBER_TYPE = re.compile(r"u?int\d*|float|double|real", re.IGNORECASE)
_SEMICOLON = re.compile(rb"\s*+;")
_AFTER_END = re.compile(rb"[\s\x00\x1a]*+")


@dataclass(frozen=True, slots=True)
class Field:
    """``Field NAME n {value, ...}``.

    Attributes:
        n_declared: how many values it says it has; there may be another number of them.
        body: what stands between its braces.
    """

    name: str
    start: int
    n_declared: int
    body: Span


@dataclass(frozen=True, slots=True)
class Rows:
    """``List NAME { Columns n {...} Data m {...} }``.

    Attributes:
        data_span: where the number of rows stands.
        end: where the next row would begin: the closing brace of ``Data``.
    """

    table: Table
    data_span: Span
    end: int


@dataclass(slots=True)
class Record:
    """``Record NAME "id" {...}``.

    Attributes:
        name_span: of its name.
        id: without quotes; None where it has none.
        end: its closing brace.
    """

    name: str
    start: int
    name_span: Span
    id_span: Span | None
    id: str | None
    fields: list[Field] = field(default_factory=list)
    lists: list[Rows] = field(default_factory=list)
    records: list["Record"] = field(default_factory=list)
    end: int = -1

    def below(self, name: str) -> Iterator["Record"]:
        """Records of a name that lie directly in this one."""
        return (record for record in self.records if record.name.upper() == name.upper())

    def rows(self, name: str) -> Iterator[Rows]:
        """Lists of a name that lie directly in this record."""
        return (rows for rows in self.lists if rows.table.name.upper() == name.upper())


@dataclass(slots=True)
class _Cursor:
    """Reads word by word."""

    source: Source
    at: int

    def word(self, expected: str) -> Span:
        """The next word or punctuation mark."""
        found = SPACE.match(self.source.data, self.at)
        start = self.at if found is None else found.end()
        token = NESTED_TOKEN.match(self.source.data, start)
        if token is None:
            raise self.source.error(start, expected)
        if token[0] == b'"':
            raise self.source.error(start, "a closing quote on the same line", found=False)
        self.at = token.end()
        return Span(start, self.at)

    def content(self, span: Span) -> bytes:
        return self.source.data[span.start : span.end]

    def take(self, mark: bytes, expected: str) -> Span:
        """The mark that must come next."""
        span = self.word(expected)
        if self.content(span) != mark:
            raise self.source.error(span.start, expected)
        return span

    def peek(self) -> bytes:
        """The next word, left where it is; empty at the end of the file."""
        found = SPACE.match(self.source.data, self.at)
        token = NESTED_TOKEN.match(self.source.data, self.at if found is None else found.end())
        return b"" if token is None else token[0]

    def name(self, expected: str) -> Span:
        span = self.word(expected)
        if self.content(span) in (b"{", b"}", b",", b";"):
            raise self.source.error(span.start, expected)
        return span

    def count(self, expected: str, most: int) -> tuple[int, Span]:
        span = self.word(expected)
        n = as_integer(self.content(span))
        if n is None or n < 0:
            raise self.source.error(span.start, expected)
        if n > most:
            raise self.source.error(span.start, f"{expected}, at most {most}")
        return n, span


def parse_nested(source: Source, *, max_defects: int) -> tuple[Record, bool]:
    """Read the outermost record, and whether ``EndOfFile`` follows.

    Raises:
        KlarfError: braces that do not match, a row that does not fit its columns, more than ``max_defects`` rows.
    """
    cursor = _Cursor(source, source.begin)
    cursor.take(b"Record", "Record")
    root = _open_record(cursor, len(b"Record"))
    stack = [root]
    n_left = max_defects
    while stack:
        here = stack[-1]
        span = cursor.word(f"the closing brace of {here.name}")
        match cursor.content(span):
            case b"}":
                here.end = span.start
                stack.pop()
            case b"Record":
                if len(stack) == MAX_DEPTH:
                    raise source.error(span.start, f"at most {MAX_DEPTH} records in each other", found=False)
                inner = _open_record(cursor, len(b"Record"))
                here.records.append(inner)
                stack.append(inner)
            case b"Field":
                here.fields.append(_field(cursor, span.start))
            case b"List":
                rows = _list(cursor, span.start, n_left)
                n_left -= len(rows.table)
                here.lists.append(rows)
            case _:
                raise source.error(span.start, f"Record, Field, List or the closing brace of {here.name}")
    return root, _ends(cursor)


def _ends(cursor: _Cursor) -> bool:
    source = cursor.source
    ended = False
    if cursor.peek().upper() == b"ENDOFFILE":
        cursor.word("EndOfFile")
        cursor.take(b";", "a semicolon that ends EndOfFile")
        ended = True
    rest = _AFTER_END.match(source.data, cursor.at)
    if rest is not None and rest.end() < len(source.data):
        raise source.error(rest.end(), "nothing after EndOfFile" if ended else "EndOfFile")
    return ended


def _open_record(cursor: _Cursor, back: int) -> Record:
    start = cursor.at - back
    name = cursor.name("the name of a record")
    identity = None
    if cursor.peek() != b"{":
        identity = cursor.name("the id of a record, or {")
    cursor.take(b"{", "{")
    source = cursor.source
    return Record(source.text(name), start, name, identity, None if identity is None else source.text(identity))


def _field(cursor: _Cursor, start: int) -> Field:
    name = cursor.name("the name of a field")
    n, _ = cursor.count("the number of values", 1 << 31)
    begin = cursor.take(b"{", "{").end
    while True:
        span = cursor.word("a value or }")
        match cursor.content(span):
            case b"}":
                return Field(cursor.source.text(name), start, n, Span(begin, span.start))
            case b"{" | b";":
                raise cursor.source.error(span.start, "a value or }")


def _list(cursor: _Cursor, start: int, max_rows: int) -> Rows:
    source = cursor.source
    name = cursor.name("the name of a list")
    cursor.take(b"{", "{")
    declared_from = cursor.take(b"Columns", "Columns").start
    n, n_span = cursor.count("the number of columns", MAX_COLUMNS)
    cursor.take(b"{", "{")
    columns = Columns(_columns(cursor, n, n_span), Span(declared_from, cursor.at), n_span)
    cursor.take(b"Data", "Data")
    n_rows, data_span = cursor.count("the number of rows", max_rows)
    cursor.take(b"{", "{")
    starts, ends = array("q"), array("q")
    table = Table(source, source.text(name), start, columns, starts, ends, is_flat=False)
    _rows(cursor, table)
    end = cursor.take(b"}", "the closing brace of Data").start
    if len(table) != n_rows:
        raise source.error(data_span.start, f"{len(table)} as the number of rows, for so many follow")
    cursor.take(b"}", f"the closing brace of {table.name}")
    return Rows(table, data_span, end)


def _columns(cursor: _Cursor, n: int, n_span: Span) -> tuple[Column, ...]:
    source = cursor.source
    columns: list[Column] = []
    names: set[str] = set()
    while cursor.peek() != b"}":
        if columns:
            cursor.take(b",", "a comma or } after a column")
        type_span = cursor.name("the type of a column")
        name_span = cursor.name("the name of a column")
        name, type_ = source.text(name_span), source.text(type_span)
        if name.upper() in names:
            raise source.error(name_span.start, "each column once")
        names.add(name.upper())
        columns.append(
            Column(name, type_, _kind(name, type_, is_last=len(columns) == n - 1), Span(type_span.start, name_span.end))
        )
    cursor.take(b"}", "}")
    if len(columns) != n:
        raise source.error(n_span.start, f"{len(columns)} as the number of columns, for so many follow")
    return tuple(columns)


def _kind(name: str, type_: str, *, is_last: bool) -> Kind:
    if type_.upper() == "IMAGELIST":
        return "images at end" if is_last else "images"
    if name.upper() == "DEFECTID":
        return "integer"
    return "number" if _NUMBER_TYPE.fullmatch(type_) else "any"


def _rows(cursor: _Cursor, table: Table) -> None:
    """Find the rows up to the brace that ends them."""
    data, starts, ends = table.source.data, table.starts, table.ends
    pattern = row_pattern(table.columns.kinds, is_flat=False, groups=False)
    at = _skip(data, cursor.at)
    while data[at : at + 1] != b"}":
        found = pattern.match(data, at) if len(table.columns) else None
        closed = None if found is None else _SEMICOLON.match(data, found.end())
        if found is None or closed is None:
            raise _misfit(table, at)
        starts.append(at)
        ends.append(found.end())
        at = _skip(data, closed.end())
    cursor.at = at


def _misfit(table: Table, at: int) -> KlarfError:
    """The first cell of a row that is not what its column holds."""
    source = table.source
    for n, column in enumerate(table.columns.all):
        found = row_pattern((column.kind,), is_flat=False, groups=False).match(source.data, at)
        if found is None:
            if source.data[at : at + 1] == b";":
                return source.error(at, f"{len(table.columns)} values in a row of {table.name}, found {n}", found=False)
            return source.error(at, f"{column.name} of type {column.type} in {table.name}")
        at = _skip(source.data, found.end())
    return source.error(at, f"a semicolon after the {len(table.columns)} values of a row of {table.name}")


def _skip(data: bytes, at: int) -> int:
    found = SPACE.match(data, at)
    return at if found is None else found.end()
