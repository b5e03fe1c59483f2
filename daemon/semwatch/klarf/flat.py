"""KLARF 1.1 and 1.2: statements ``Keyword value ... ;`` one after the other, levels by order alone."""

import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from semwatch.klarf.errors import KlarfError
from semwatch.klarf.source import FLAT_TOKEN, SPACE, STRING, Source, Span, as_integer
from semwatch.klarf.table import Column, Columns, Kind, Table, cell_pattern, row_pattern

VERSIONS = {"1 1": "1.1", "1 2": "1.2"}
"""By the words of FileVersion."""
FLAT_VERSION = "1.2"
MAX_COLUMNS = 1000
MAX_IMAGES = 10_000
"""Images of one defect."""

_KEYWORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_.\-]*+")
_UP_TO_SEMICOLON = re.compile(rb'(?>[^";]++|' + STRING + rb")*+(?=;)")
_AFTER_END = re.compile(rb"[\s\x00\x1a]*+")
_KINDS: Mapping[str, Kind] = {
    "DEFECTID": "integer",
    "IMAGELIST": "images",
    **dict.fromkeys(
        ("XREL", "YREL", "XINDEX", "YINDEX", "XSIZE", "YSIZE", "DEFECTAREA", "DSIZE", "CLASSNUMBER", "IMAGECOUNT"),
        "number",
    ),
}
_NEXT_STATEMENT = re.compile(
    rb"^[ \t]*+(?:FileTimestamp|InspectionStationID|SampleType|ResultTimestamp|LotID|SampleSize|DeviceID|SetupID|"
    rb"StepID|"
    rb"SampleOrientationMarkType|OrientationMarkLocation|DiePitch|DieOrigin|WaferID|Slot|SampleCenterLocation|"
    rb"ClassLookup|"
    rb"TiffFileName|TiffSpec|InspectionTest|SampleTestPlan|AreaPerTest|DefectRecordSpec|DefectList|SummarySpec|"
    rb"SummaryList|"
    rb"EndOfFile)(?![A-Za-z0-9_])",
    re.MULTILINE | re.IGNORECASE,
)
"""A keyword at the start of a line inside a statement: the semicolon before it is missing."""


@dataclass(frozen=True, slots=True)
class Statement:
    """``Keyword value ... ;``.

    Attributes:
        keyword: as written.
        start: its first byte.
        body: what stands between keyword and semicolon.
        table: rows of a ``DefectList``.
    """

    keyword: str
    start: int
    body: Span
    table: Table | None = None

    @property
    def end(self) -> int:
        """The byte behind its semicolon."""
        return self.body.end + 1


def parse_flat(source: Source, *, max_defects: int) -> tuple[Statement, ...]:
    """Read all statements, ``EndOfFile`` too.

    Raises:
        KlarfError: a statement that does not end, a row that does not fit its columns, more than ``max_defects`` rows.
    """
    statements: list[Statement] = []
    spec: Columns | None = None
    n_defects = 0
    at = _skip(source, source.begin)
    while at < len(source.data):
        statement = _statement(source, at)
        name = statement.keyword.upper()
        if name == "DEFECTRECORDSPEC":
            spec = _columns(source, statement)
        elif name == "DEFECTLIST":
            table = _defects(source, statement, spec, max_defects - n_defects)
            n_defects += len(table)
            statement = Statement(statement.keyword, statement.start, statement.body, table)
        elif found := _NEXT_STATEMENT.search(source.data, statement.body.start, statement.body.end):
            raise source.error(found.start(), f"a semicolon that ends {statement.keyword}")
        statements.append(statement)
        at = _skip(source, statement.end)
        if name == "ENDOFFILE":
            rest = _AFTER_END.match(source.data, at)
            if rest is not None and rest.end() < len(source.data):
                raise source.error(rest.end(), "nothing after EndOfFile")
            break
    return tuple(statements)


def _statement(source: Source, at: int) -> Statement:
    keyword = _KEYWORD.match(source.data, at)
    if keyword is None:
        raise source.error(at, "a keyword")
    body = _UP_TO_SEMICOLON.match(source.data, keyword.end())
    if body is None:
        raise _unended(source, keyword[0].decode("ascii"), keyword.end())
    return Statement(keyword[0].decode("ascii"), at, Span(*body.span()))


def _unended(source: Source, keyword: str, at: int) -> KlarfError:
    """What is wrong with a statement that has no semicolon."""
    for token in FLAT_TOKEN.finditer(source.data, at):
        if token[0] == b'"':
            return source.error(token.start(), "a closing quote on the same line", found=False)
    return source.error(len(source.data), f"a semicolon that ends {keyword}")


def _columns(source: Source, statement: Statement) -> Columns:
    words = list(source.flat_words(statement.body))
    n = as_integer(source.data[words[0].start : words[0].end]) if words else None
    if n is None or not 0 < n <= MAX_COLUMNS:
        raise source.error(statement.body.start, f"the number of columns, 1 to {MAX_COLUMNS}")
    if len(words) - 1 != n:
        raise source.error(words[0].start, f"{n} column names, found {len(words) - 1}", found=False)
    names = [source.text(span) for span in words[1:]]
    upper = [name.upper() for name in names]
    for i, name in enumerate(upper):
        if name in upper[:i]:
            raise source.error(words[i + 1].start, "each column once")
    columns = tuple(
        Column(name, "", _KINDS.get(name.upper(), "any"), span) for name, span in zip(names, words[1:], strict=True)
    )
    return Columns(columns, Span(statement.start, statement.end), words[0])


# --- rows ------------------------------------------------------------------------------------------------------------


def _defects(source: Source, statement: Statement, spec: Columns | None, max_defects: int) -> Table:
    empty = _skip(source, statement.body.start) == statement.body.end
    nowhere = Span(statement.start, statement.start)
    if spec is None and not empty:
        raise source.error(statement.start, "a DefectRecordSpec before DefectList", found=False)
    columns = Columns((), nowhere, nowhere) if spec is None else spec
    if empty:
        return Table(source, statement.keyword, statement.start, columns, array("q"), array("q"), is_flat=True)
    try:
        return _rows(source, statement, columns, max_defects, has_inner_count=True)
    except KlarfError as error:
        if columns.images is None or columns.by_name.get("IMAGECOUNT", columns.images) >= columns.images:
            raise
        try:  # some writers leave the second count away: IMAGECOUNT 2, IMAGELIST 1 0 2 0
            return _rows(source, statement, columns, max_defects, has_inner_count=False)
        except KlarfError:
            raise error from None


def _rows(source: Source, statement: Statement, columns: Columns, max_defects: int, *, has_inner_count: bool) -> Table:
    data, (at, end) = source.data, statement.body
    starts, ends = array("q"), array("q")
    images = columns.images
    n_behind = 0 if images is None else len(columns) - images - 1
    head = _head_pattern(columns, has_inner_count=has_inner_count)
    at = _skip(source, at)
    while at < end:
        found = head.match(data, at, end)
        if found is None:
            raise _misfit(source, columns, at, end)
        n_words = n_behind
        if images is not None:
            n_words += 2 * _n_images(source, found, has_inner_count=has_inner_count)
        rest = _rest_pattern(n_words).match(data, found.end(), end)
        if rest is None:
            raise _misfit_behind(source, columns, found.end(), end, n_words)
        if len(starts) == max_defects:
            raise source.error(at, f"at most {max_defects} more defects here; that is the limit", found=False)
        starts.append(at)
        ends.append(rest.start(1))
        at = rest.end()
    return Table(source, statement.keyword, statement.start, columns, starts, ends, True, has_inner_count)


def _head_pattern(columns: Columns, *, has_inner_count: bool) -> re.Pattern[bytes]:
    """Pattern of a row up to its images; groups are the IMAGECOUNT and the count that begins the list."""
    images = columns.images
    count = columns.by_name.get("IMAGECOUNT", len(columns))
    cells = [cell_pattern(kind, is_flat=True) for kind in columns.kinds[:images]]
    parts = [
        rb"\s*+" + (rb"(?P<stated>" + cell + rb")" if images and i == count else cell) for i, cell in enumerate(cells)
    ]
    if images is not None and has_inner_count:
        parts.append(rb"\s*+(?P<inner>" + cell_pattern("integer", is_flat=True) + rb")")
    if images is None or count >= images:
        parts.append(rb"(?P<stated>)")
    return re.compile(b"".join(parts))


def _n_images(source: Source, found: re.Match[bytes], *, has_inner_count: bool) -> int:
    stated, inner = found["stated"], found["inner"] if has_inner_count else None
    n = as_integer(stated if inner is None else inner)
    if n is None or not 0 <= n <= MAX_IMAGES:
        raise source.error(
            found.start("inner" if has_inner_count else "stated"), f"the number of images, 0 to {MAX_IMAGES}"
        )
    if inner is not None and stated and stated != inner and as_integer(stated) != n:
        raise source.error(found.start("inner"), f"{stated.decode('ascii')} images, as IMAGECOUNT says")
    return n


def _misfit(source: Source, columns: Columns, at: int, end: int) -> KlarfError:
    """The first cell of a row that is not what its column holds."""
    for n, column in enumerate(columns.all):
        what = {"integer": "a whole number", "number": "a number", "images": "the number of images"}.get(
            column.kind, "a value"
        )
        if at == end:
            return source.error(at, f"{len(columns)} values of a defect, found {n}", found=False)
        kind: Kind = "integer" if column.kind == "images" else column.kind
        found = row_pattern((kind,), is_flat=True, groups=False).match(source.data, at, end)
        if found is None:
            return source.error(at, f"{column.name}, {what}")
        at = _skip(source, found.end())
    return source.error(at, "a defect")


def _misfit_behind(source: Source, columns: Columns, at: int, end: int, n_words: int) -> KlarfError:
    """What is wrong behind the count of images: too few words, or more of them in the last line."""
    begin = _skip(source, at)
    for _ in range(n_words):
        found = row_pattern(("any",), is_flat=True, groups=False).match(source.data, at, end)
        if found is None:
            return source.error(begin, f"{n_words // 2} pairs of image number and type")
        at = found.end()
    return source.error(_skip(source, at), f"a new line or a semicolon after the {len(columns)} values of a defect")


@lru_cache(maxsize=1024)
def _rest_pattern(n_words: int) -> re.Pattern[bytes]:
    """Pattern of the words that end a row, and of the space up to the next one, which begins in another line."""
    words = rb"(?:\s*+" + cell_pattern("any", is_flat=True) + rb"){%d}+" % n_words if n_words else b""
    return re.compile(words + rb"()(?:[^\S\r\n]*+[\r\n]\s*+|\s*+\Z)")


def _skip(source: Source, at: int) -> int:
    found = SPACE.match(source.data, at)
    return at if found is None else found.end()
