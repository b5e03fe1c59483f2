"""Edits: each replaces or inserts bytes, leaves every other byte alone, and reads the outcome again.

A document is never changed; each edit returns another one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set

from semwatch.klarf.document import Document, parse
from semwatch.klarf.errors import KlarfError
from semwatch.klarf.nested import Record
from semwatch.klarf.source import Source, Span, Value, as_integer, is_number
from semwatch.klarf.table import Column, Table
from semwatch.klarf.views import Lot, Wafer, rows_by_id

Edit = tuple[Span, bytes]
"""What comes in place of these bytes."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTEGER_TYPE = re.compile(r"u?int\d*", re.IGNORECASE)
TYPES = ("int32", "float", "double", "string")
_KEPT_STATEMENTS = (
    "FILEVERSION", "FILETIMESTAMP", "INSPECTIONSTATIONID", "RESULTTIMESTAMP", "LOTID", "DEVICEID", "SETUPID", "STEPID",
    "WAFERID", "SLOT",
)  # fmt: skip
_KEPT_FIELDS = ("INSPECTIONSTATIONID", "RESULTTIMESTAMP", "DEVICEID", "RECIPEID", "STEPID", "SLOTNUMBER", "WAFERSCRIBE")


def set_column(document: Document, wafer: Wafer, column: str, values: Mapping[int, Value]) -> Document:
    """Write one column of some defects.

    Args:
        document: to be edited; it stays as it is.
        wafer: one of its wafers.
        column: that its lists have; neither DEFECTID nor the list of images.
        values: by DEFECTID; None is written as NA.

    Raises:
        KlarfError: the column or a defect is not there, an id stands twice, a value is none for this column.
    """
    _check_wafer(document, wafer)
    rows = rows_by_id(wafer)  # an id that stands twice does not say which row is meant
    _check_all_found(wafer, values.keys() - rows.keys())
    edits: list[Edit] = []
    for defect_id, value in values.items():
        table, row = wafer.defects.locate(rows[defect_id])
        index = _editable(table, column)
        edits.append((table.cell(row, index), written(value, table.columns.all[index], document)))
    return _apply(document, edits)


def add_column(
    document: Document,
    wafer: Wafer,
    column: str,
    values: Mapping[int, Value],
    *,
    default: Value = 0,
    type_: str = "int32",
) -> Document:
    """Add a column: before the columns of images, else as the last one.

    In 1.1 and 1.2 one ``DefectRecordSpec`` may hold for several lists and wafers; they all get the column then.

    Args:
        document: to be edited; it stays as it is.
        wafer: one of its wafers.
        column: a name that its lists do not have.
        values: by DEFECTID.
        default: for defects that ``values`` leaves out.
        type_: int32, float, double or string; only 1.8 states it.

    Raises:
        KlarfError: the column is there already, a defect is not, an id stands twice, a value is none for this type.
    """
    _check_wafer(document, wafer)
    if not _NAME.fullmatch(column) or type_ not in TYPES:
        raise KlarfError(f"expected a name of letters, digits and _ and a type of {TYPES}, found {column!r}, {type_!r}")
    if not wafer.tables:
        raise KlarfError(f"wafer {wafer.id} has no DefectList to get a column")
    rows_by_id(wafer)
    new = Column(column, type_, "any" if type_ == "string" else "number", Span(0, 0))
    filling = written(default, new, document)
    own_lists = {table.start for table in wafer.tables}
    declarations = {table.columns: table for table in wafer.tables}
    edits: list[Edit] = []
    left = set(values)
    for table in document.tables:
        if table.columns not in declarations:
            continue
        if table.index(column) is not None:
            raise KlarfError(f"the lists have a column {column} already; set it")
        own = table.start in own_lists
        for row, defect_id in enumerate(_ids(table)):
            cell = filling
            if own and defect_id is not None and defect_id in values:
                left.discard(defect_id)
                cell = written(values[defect_id], new, document)
            edits.append(_new_cell(table, row, cell))
    _check_all_found(wafer, left)
    for columns, table in declarations.items():
        if not len(columns):
            raise document.source.error(table.start, "a DefectRecordSpec to get a column", found=False)
        edits += _new_declaration(table, f"{type_} {column}" if document.root is not None else column)
    return _apply(document, edits)


def add_classes(document: Document, lot: Lot, classes: Mapping[int, str]) -> Document:
    """Add classes to the lookup table of a lot, which is made where there is none. Those that it has are left out.

    Args:
        document: to be edited; it stays as it is.
        lot: one of its lots.
        classes: names by number.

    Raises:
        KlarfError: the table has one of these numbers under another name.
    """
    if not any(lot is one for one in document.lots):
        raise KlarfError("expected a lot of this document")
    for number, name in classes.items():
        known = lot.classes.get(number)
        if known is not None and known.name != name:
            raise KlarfError(f"class {number} is {known.name!r} in the table already, found {name!r}")
    new = {number: name for number, name in classes.items() if number not in lot.classes}
    if not new:
        return document
    if document.root is None:
        return _apply(document, _flat_classes(document, lot, new))
    record = next(one for one, of in zip(_lot_records(document.root), document.lots, strict=False) if of is lot)
    return _apply(document, _nested_classes(document, record, new))


def partial(
    document: Document, wafer: Wafer, column: str, values: Mapping[int, Value], *, type_: str = "int32"
) -> Document:
    """Make the short form that a yield system joins by DEFECTID: who and what was inspected, the ids and one column.

    Args:
        document: the whole file; statements and fields that name the lot are copied from it as they are.
        wafer: one of its wafers.
        column: name of the column.
        values: by DEFECTID, written in this order.
        type_: int32, float, double or string; only 1.8 states it.

    Raises:
        KlarfError: a defect is not there, an id stands twice, a value is none for this type.
    """
    _check_wafer(document, wafer)
    if not _NAME.fullmatch(column) or type_ not in TYPES:
        raise KlarfError(f"expected a name of letters, digits and _ and a type of {TYPES}, found {column!r}, {type_!r}")
    _check_all_found(wafer, set(values) - rows_by_id(wafer).keys())
    new = Column(column, type_, "any" if type_ == "string" else "number", Span(0, 0))
    rows = [b"%d %s" % (defect_id, written(value, new, document)) for defect_id, value in values.items()]
    lines = (
        _flat_partial(document, wafer, column, rows)
        if document.root is None
        else _nested_partial(document, document.root, wafer, f"{type_} {column}", rows)
    )
    begin = document.source.data[: document.source.begin]
    return parse(begin + document.source.newline.join([*lines, b""]))


# --- cells -----------------------------------------------------------------------------------------------------------


def written(value: Value, column: Column, document: Document) -> bytes:
    """A value as its column holds it.

    Raises:
        KlarfError: it is none for this column.
    """
    is_typed = document.root is not None
    match value:
        case None:
            return b"NA"
        case bool():
            pass
        case int():
            if column.kind == "number" or not is_typed:
                return b"%d" % value
        case float():
            text = repr(value).encode("ascii")
            is_whole_type = is_typed and _INTEGER_TYPE.fullmatch(column.type) is not None
            if is_number(text) and not is_whole_type and (column.kind == "number" or not is_typed):
                return text
        case str():
            if column.kind != "number":
                return quoted(value, document.source)
    of = f" of type {column.type}" if column.type else ""
    raise KlarfError(f"expected a value for column {column.name}{of}, found {value!r}")


def quoted(text: str, source: Source) -> bytes:
    """A string in quotes, in the encoding of the file.

    Raises:
        KlarfError: it holds what no string can hold, or what the encoding has not.
    """
    if any(c in text for c in '"\r\n\0'):
        raise KlarfError(f"expected a text without quotes and line ends, found {text!r}")
    try:
        return b'"%s"' % text.encode(source.encoding)
    except UnicodeEncodeError as error:
        raise KlarfError(f"expected a text that {source.encoding} can hold, found {text!r}") from error


def _ids(table: Table) -> Iterator[int | None]:
    index = table.index("DEFECTID")
    if index is None:
        yield from ((None,) * len(table))
        return
    yield from map(as_integer, table.column_words(index))


def _editable(table: Table, column: str) -> int:
    index = table.index(column)
    if index is None:
        raise _no_column(table, column)
    if index == table.columns.images or table.columns.all[index].kind == "integer":
        raise KlarfError(f"column {column} names the defects or their images, and cannot be set")
    return index


def _no_column(table: Table, column: str) -> KlarfError:
    names = ", ".join(one.name for one in table.columns.all)
    return table.source.error(table.start, f"a column {column} in {table.name}, which has {names}", found=False)


def _check_wafer(document: Document, wafer: Wafer) -> None:
    if not any(wafer is one for one in document.wafers):
        raise KlarfError("expected a wafer of this document, found one of another or of an earlier state")


def _check_all_found(wafer: Wafer, left: Set[int]) -> None:
    if left:
        some = ", ".join(map(str, sorted(left)[:10])) + (", ..." if len(left) > 10 else "")
        raise KlarfError(f"wafer {wafer.id} has no defect {some}")


def _new_cell(table: Table, row: int, cell: bytes) -> Edit:
    at = _place_of_new(table)
    if at == len(table.columns):
        end = table.ends[row]
        return Span(end, end), b" " + cell
    start = table.cells(row)[at].start
    return Span(start, start), cell + b" "


def _new_declaration(table: Table, declared: str) -> list[Edit]:
    columns = table.columns
    at = _place_of_new(table)
    comma = b"" if table.is_flat else b","
    word = declared.encode("ascii")
    if at == len(columns):
        end = columns.all[-1].span.end
        name: Edit = (Span(end, end), comma + b" " + word)
    else:
        start = columns.all[at].span.start
        name = (Span(start, start), word + comma + b" ")
    return [(columns.count, b"%d" % (len(columns) + 1)), name]


def _place_of_new(table: Table) -> int:
    images = [table.columns.images, table.index("IMAGECOUNT")]
    return min((index for index in images if index is not None), default=len(table.columns))


def _apply(document: Document, edits: Iterable[Edit]) -> Document:
    data = document.source.data
    pieces: list[bytes] = []
    at = 0
    for span, new in sorted(edits):
        pieces += (data[at : span.start], new)
        at = span.end
    pieces.append(data[at:])
    return parse(b"".join(pieces))


# --- classes ---------------------------------------------------------------------------------------------------------


def _flat_classes(document: Document, lot: Lot, new: Mapping[int, str]) -> list[Edit]:
    source = document.source
    rows = [b"%d %s" % (number, quoted(name, source)) for number, name in new.items()]
    entry = lot.scope.entry("ClassLookup")
    line = source.newline + b" "
    if entry is not None:
        count, *words = lot.scope.spans(entry)
        end = words[-1].end if words else count.end
        n = len(words) // 2 + len(rows)
        return [(count, b"%d" % n), (Span(end, end), line + line.join(rows))]
    before = next((one for one in document.statements if one.keyword.upper() == "DEFECTRECORDSPEC"), None)
    if before is None:
        raise KlarfError("expected a ClassLookup or a DefectRecordSpec, found neither")
    at = Span(before.start, before.start)
    return [(at, b"ClassLookup %d" % len(rows) + line + line.join(rows) + b";" + source.newline)]


def _nested_classes(document: Document, record: Record, new: Mapping[int, str]) -> list[Edit]:
    source = document.source
    rows = next(record.rows("ClassLookupList"), None)
    if rows is None:
        columns = "int32 CLASSNUMBER, string CLASSNAME, string CLASSCODE"
        cells = [b'%d %s "";' % (number, quoted(name, source)) for number, name in new.items()]
        lines = (
            b"List ClassLookupList {",
            b"Columns 3 { %s }" % columns.encode(),
            b"Data %d {" % len(cells),
            *cells,
            b"} }",
        )
        at = Span(record.end, record.end)
        return [(at, source.newline.join([*lines, b""]))]
    table = rows.table
    end = len(source.data[: rows.end].rstrip())
    cells = [
        b" ".join(_class_cell(column, number, name, source) for column in table.columns.all) + b";"
        for number, name in new.items()
    ]
    line = source.newline + b" "
    return [(rows.data_span, b"%d" % (len(table) + len(cells))), (Span(end, end), line + line.join(cells))]


def _class_cell(column: Column, number: int, name: str, source: Source) -> bytes:
    match column.name.upper():
        case "CLASSNUMBER":
            return b"%d" % number
        case "CLASSNAME":
            return quoted(name, source)
        case _:
            return b"0" if column.kind == "number" else b'""'


def _lot_records(root: Record) -> Iterator[Record]:
    yield from root.below("LotRecord")
    yield root  # of wafers outside of every lot


# --- the partial form ------------------------------------------------------------------------------------------------


def _flat_partial(document: Document, wafer: Wafer, column: str, rows: list[bytes]) -> list[bytes]:
    data = document.source.data
    first = {one.start for name in _KEPT_STATEMENTS if (one := wafer.scope.entry(name)) is not None}
    kept = [data[one.start : one.end] for one in document.statements if one.start in first]
    spec = b"DefectRecordSpec 2 DEFECTID %s ;" % column.encode("ascii")
    defects = [b" " + row for row in rows]
    if defects:
        defects[-1] += b";"
    return [*kept, spec, b"DefectList" if defects else b"DefectList;", *defects, b"EndOfFile;"]


def _nested_partial(document: Document, root: Record, wafer: Wafer, column: str, rows: list[bytes]) -> list[bytes]:
    source = document.source
    lot = next(one for one in document.lots if any(wafer is of for of in one.wafers))
    lot_fields: list[bytes] = []
    wafer_fields: list[bytes] = []
    for name in _KEPT_FIELDS:
        for scope, kept in ((lot.scope, lot_fields), (wafer.scope, wafer_fields)):
            if (entry := scope.entry(name, own=True)) is not None:
                kept.append(source.data[entry.start : entry.body.end + 1])
    stamps = [source.data[one.start : one.body.end + 1] for one in root.fields if one.name.upper() == "FILETIMESTAMP"]
    return [
        b'Record FileRecord "1.8" {',
        *stamps,
        b"Record LotRecord %s {" % quoted(lot.id or "", source),
        *lot_fields,
        b"Record WaferRecord %s {" % quoted(wafer.id or "", source),
        *wafer_fields,
        b"List DefectList {",
        b"Columns 2 { int32 DEFECTID, %s }" % column.encode("ascii"),
        b"Data %d {" % len(rows),
        *(row + b";" for row in rows),
        b"} } } } }",
        b"EndOfFile;",
    ]
