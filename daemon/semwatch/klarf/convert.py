"""From 1.1 or 1.2 to 1.8 and back, with a list of what the other version cannot hold.

Lengths are converted exactly: um are decimal text, nm whole numbers. Which statement becomes which field is what public
files of both versions show; the format itself is not published.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import PureWindowsPath
from typing import Literal, NamedTuple

from semwatch.klarf.document import Document, parse
from semwatch.klarf.edit import quoted
from semwatch.klarf.errors import KlarfError, Place
from semwatch.klarf.flat import FLAT_VERSION
from semwatch.klarf.nested import VERSION, Record, Rows
from semwatch.klarf.source import Source, Span, as_integer, is_number
from semwatch.klarf.table import Columns, Table
from semwatch.klarf.views import DIRECTIONS, Defect, Entry, Image, Lot, Scope, Wafer

Unit = Literal["text", "word", "recipe", "number", "length", "size", "direction"]
"""What a field holds. A word stands without quotes in the flat versions; a recipe is a text and words."""

LENGTHS = ("XREL", "YREL", "XSIZE", "YSIZE", "DSIZE")
AREAS = ("DEFECTAREA", "AREAPERTEST")
WITHOUT_UNIT = ("CONTRAST", "KILLPROB", "PHI", "DBCRITICALITYINDEX", "PCI", "LINECOMPLEXITY", "DCIRANGE")
"""Columns of floats that are no lengths in either version, or whose unit both share."""
_INT32 = 1 << 31
_MAX_EXPONENT = 18
"""No length on a wafer is of 10**18 nm; such a number would be a million digits long when written out."""
_NAMED_FORMATS = {"TIF": "TIF", "TIFF": "TIF", "I01": "TIF", "JPEG": "JPG", "": "TIF"}


class Rule(NamedTuple):
    """A statement of the flat versions and its field of 1.8."""

    flat: str
    nested: str
    level: Literal["file", "lot", "wafer"]
    unit: Unit


RULES = (
    Rule("FileTimestamp", "FileTimestamp", "file", "word"),
    Rule("InspectionStationID", "InspectionStationID", "lot", "text"),
    Rule("SampleType", "SampleType", "lot", "word"),
    Rule("ResultTimestamp", "ResultTimestamp", "lot", "word"),
    Rule("SampleSize", "SampleSize", "lot", "size"),
    Rule("DeviceID", "DeviceID", "lot", "text"),
    Rule("SetupID", "RecipeID", "lot", "recipe"),
    Rule("StepID", "StepID", "lot", "text"),
    Rule("ResultsID", "ResultsID", "lot", "text"),
    Rule("SampleOrientationMarkType", "SampleOrientationMarkType", "lot", "word"),
    Rule("OrientationMarkLocation", "OrientationMarkLocation", "lot", "direction"),
    Rule("DiePitch", "DiePitch", "lot", "length"),
    Rule("LotStatus", "LotStatus", "lot", "number"),
    Rule("DieOrigin", "DieOrigin", "wafer", "length"),
    Rule("Slot", "SlotNumber", "wafer", "number"),
    Rule("SampleCenterLocation", "SampleCenterLocation", "wafer", "length"),
    Rule("WaferScribe", "WaferScribe", "wafer", "text"),
    Rule("WaferStatus", "WaferStatus", "wafer", "text"),
    Rule("OrientationInstructions", "OrientationInstructions", "wafer", "text"),
    Rule("CoordinatesMirrored", "CoordinatesMirrored", "wafer", "word"),
    Rule("OperatorId", "OperatorId", "wafer", "text"),
    Rule("ClassificationSource", "ClassificationSource", "wafer", "text"),
    Rule("Product", "ProductId", "wafer", "text"),
)
_OF_ONE_WAFER = ("Slot", "WaferScribe", "WaferStatus")
_MEANT = {
    "FILEVERSION", "LOTID", "WAFERID", "CLASSLOOKUP", "INSPECTIONTEST", "SAMPLETESTPLAN", "AREAPERTEST",
    "DEFECTRECORDSPEC", "DEFECTLIST", "SUMMARYSPEC", "SUMMARYLIST", "TIFFFILENAME", "IMAGEFILENAME", "ENDOFFILE",
    "REMOVEDDIELIST", "CUSTOMWAFERLIST",
}  # fmt: skip
"""Statements that become records and lists."""


class Note(NamedTuple):
    """Something that the other version holds in another way, or not at all.

    Attributes:
        kind: ``lost``: not in the new file. ``rounded``: to whole nm. ``own name``: carried as it stands, and no public
            file shows that the other version has it.
        place: in the old file; None for what is of all of it.
        text: in a plain sentence.
    """

    kind: Literal["lost", "rounded", "own name"]
    place: Place | None
    text: str


def convert(document: Document, version: str) -> tuple[Document, list[Note]]:
    """Convert to 1.8 or to 1.2.

    Raises:
        KlarfError: the document is of that version or grammar already; a value cannot be converted.
    """
    if version not in (VERSION, FLAT_VERSION):
        raise KlarfError(f"expected {FLAT_VERSION} or {VERSION} as the version to convert to, found {version}")
    if (version == VERSION) == (document.root is not None):
        raise KlarfError(f"this file is KLARF {document.version} already; only 1.1 or 1.2 and 1.8 are converted")
    writer = _ToNested(document) if document.root is None else _ToFlat(document, document.root)
    lines = _indented(writer.lines()) if document.root is None else writer.lines()
    begin = document.source.data[: document.source.begin]
    return parse(begin + document.source.newline.join([*lines, b""])), writer.all_notes()


def _indented(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of 1.8, two spaces in for each brace that stands open."""
    depth = 0
    for line in lines:
        depth -= line == b"}"
        yield b"  " * depth + line
        depth += line == b"{"


@dataclass
class _Writer:
    """What both directions share: the notes, and numbers in the other unit."""

    document: Document
    notes: list[Note] = field(default_factory=list)
    rounded: dict[str, tuple[int, Decimal, int]] = field(default_factory=dict)
    """By column: how many values, by how many nm at most, and where the first one stands."""
    counted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What is lost of many defects: how many images, and where the row of the first one begins."""

    @property
    def source(self) -> Source:
        return self.document.source

    def note(self, kind: Literal["lost", "own name"], start: int | None, text: str) -> None:
        self.notes.append(Note(kind, None if start is None else self.source.place(start), text))

    def all_notes(self) -> list[Note]:
        rounded = [
            Note("rounded", self.source.place(at), f"{n} values of {name} to whole nm, by {float(most):.3g} nm at most")
            for name, (n, most, at) in self.rounded.items()
        ]
        counted = [Note("lost", self.source.place(at), f"{n} {what}") for what, (n, at) in self.counted.items()]
        return [*self.notes, *counted, *rounded]

    def count(self, what: str, n: int, defect: Defect) -> None:
        """Note that something of a defect is lost."""
        before, at = self.counted.get(what, (0, defect.table.starts[defect.row]))
        self.counted[what] = before + n, at

    def name(self, name: str) -> bytes:
        """A name as it stood in the old file."""
        return name.encode(self.source.encoding)

    def content(self, span: Span) -> bytes:
        return self.source.data[span.start : span.end]

    def decimal(self, span: Span) -> Decimal | None:
        """A number exactly; None for NA and its like."""
        word = self.content(span)
        if not is_number(word):
            if self.source.value(span) is not None:
                raise self.source.error(span.start, "a number or NA")
            return None
        number = Decimal(word.decode("ascii"))
        if number and abs(number.adjusted()) > _MAX_EXPONENT:
            raise self.source.error(span.start, f"a number within 1e-{_MAX_EXPONENT} and 1e{_MAX_EXPONENT}")
        return number

    def nm(self, span: Span, name: str, factor: int = 1000) -> bytes:
        """um, or mm with a factor of 10**6, as whole nm."""
        number = self.decimal(span)
        if number is None:
            return b"NA"
        exact = number * factor
        whole = exact.to_integral_value()
        if whole != exact:
            n, most, at = self.rounded.get(name, (0, Decimal(0), span.start))
            self.rounded[name] = n + 1, max(most, abs(exact - whole)), at
        return b"%d" % int(whole)

    def scaled(self, span: Span, power_of_ten: int) -> bytes:
        """A number with its decimal point moved."""
        number = self.decimal(span)
        if number is None:
            return b"NA"
        moved = number.scaleb(power_of_ten).normalize()
        return format(moved, "f").encode("ascii")


# --- to 1.8 ----------------------------------------------------------------------------------------------------------


class _ToNested(_Writer):
    def lines(self) -> Iterator[bytes]:
        lots = self.document.lots
        yield b'Record FileRecord "1.8"'
        yield b"{"
        yield from self._fields("file", lots[0].scope, lots[0].scope)
        for lot in lots:
            yield b"Record LotRecord " + quoted(lot.id or "", self.source)
            yield b"{"
            yield from self._fields("lot", lot.scope, lot.scope)
            for i, wafer in enumerate(lot.wafers):
                yield from self._wafer(lot, wafer, is_first=i == 0)
            if not lot.wafers:
                yield from self._others(lot.scope)
            if lot.classes:
                cells = [(b"%d" % one.number, quoted(one.name, self.source), b'""') for one in lot.classes.values()]
                columns = (b"int32 CLASSNUMBER", b"string CLASSNAME", b"string CLASSCODE")
                yield from _list("ClassLookupList", columns, cells)
            yield b"}"
        yield b"}"
        if self.document.is_complete:
            yield b"EndOfFile;"

    def _fields(self, level: str, scope: Scope, lot: Scope) -> Iterator[bytes]:
        """Fields of a level; of a wafer also those of its lot that are others for it."""
        for rule in RULES:
            entry = scope.entry(rule.flat, own=rule.flat in _OF_ONE_WAFER)
            if entry is None:
                continue
            of_lot = lot.entry(rule.flat)
            differs = of_lot is None or scope.texts(of_lot) != scope.texts(entry)
            if rule.level == level or (level == "wafer" and rule.level == "lot" and differs):
                yield _field(rule.nested, [*self._values(rule, scope.spans(entry))])

    def _values(self, rule: Rule, words: Sequence[Span]) -> Iterator[bytes]:
        match rule.unit:
            case "length":
                yield from (self.nm(word, rule.flat) for word in words)
            case "size":
                if len(words) == 2 and self.content(words[0]) == b"1":
                    yield from (self.nm(words[1], rule.flat, 1_000_000), b"0")
                else:
                    self.note("own name", words[0].start if words else None, "SampleSize is no diameter; as it stands")
                    yield from map(self._as_is, words)
            case "direction":
                text = self.source.text(words[0]).upper() if words else ""
                yield b"%d" % DIRECTIONS[text] if text in DIRECTIONS else quoted(text, self.source)
            case "number":
                yield from map(self._as_is, words)
            case _:
                yield from (quoted(self.source.text(word), self.source) for word in words)

    def _as_is(self, word: Span) -> bytes:
        text = self.content(word)
        return text if is_number(text) or text.startswith(b'"') else quoted(self.source.text(word), self.source)

    def _wafer(self, lot: Lot, wafer: Wafer, *, is_first: bool) -> Iterator[bytes]:
        yield b"Record WaferRecord " + quoted(wafer.id or "", self.source)
        yield b"{"
        yield from self._fields("wafer", wafer.scope, lot.scope)
        yield from self._others(wafer.scope)
        yield from self._pairs(wafer.scope, "CustomWaferList", (b"string NAME", b"string VALUE"))
        yield from self._pairs(wafer.scope, "RemovedDieList", (b"int32 XINDEX", b"int32 YINDEX"))
        by_columns: dict[Columns, list[Table]] = {}
        for table in wafer.tables:
            by_columns.setdefault(table.columns, []).append(table)
        for columns, tables in by_columns.items():
            yield from self._defects(wafer, columns, tables)
        for plan in wafer.plans:
            yield b'Record TestRecord "%d"' % (1 if plan.number is None else plan.number)
            yield b"{"
            if plan.area_um2 is not None:
                yield _field("AreaPerTest", [repr(plan.area_um2 * 1e6).encode("ascii")])
            dies = [(b"%d" % x, b"%d" % y) for x, y in plan.dies]
            if dies:
                yield from _list("SampleTestPlanList", (b"int32 XINDEX", b"int32 YINDEX"), dies)
            yield b"}"
        yield from self._summary(wafer.scope)
        if not is_first and wafer.classes != lot.classes:
            self.note("lost", None, f"wafer {wafer.id} has a lookup table of its own; that of its lot is kept")
        yield b"}"

    def _others(self, scope: Scope) -> Iterator[bytes]:
        """Statements that no public file of 1.8 has: under their own name, but for TiffSpec."""
        known = {rule.flat.upper() for rule in RULES} | _MEANT
        for name, entries in scope.own.items():
            for entry in entries if name not in known else ():
                if name == "TIFFSPEC":
                    self.note("lost", entry.start, "TiffSpec: 1.8 names a format with each image")
                    continue
                self.note("own name", entry.start, f"{entry.name} becomes a field of that name")
                yield _field(entry.name, [*map(self._as_is, scope.spans(entry))])

    def _pairs(self, scope: Scope, name: str, columns: tuple[bytes, bytes]) -> Iterator[bytes]:
        for entry in scope.own.get(name.upper(), ()):
            words = scope.spans(entry)[1:]
            if len(words) % 2:
                raise self.source.error(entry.start, f"pairs in {entry.name}", found=False)
            is_text = columns[0].startswith(b"string")
            cells = [quoted(self.source.text(word), self.source) if is_text else self.content(word) for word in words]
            yield from _list(name, columns, zip(cells[::2], cells[1::2], strict=True))

    def _summary(self, scope: Scope) -> Iterator[bytes]:
        spec, rows = scope.entry("SummarySpec", own=True), scope.entry("SummaryList", own=True)
        if spec is None or rows is None:
            return
        names = [self.source.text(word) for word in scope.spans(spec)[1:]]
        words = scope.spans(rows)
        if not names or len(words) % len(names):
            raise self.source.error(rows.start, f"rows of {len(names)} values, as SummarySpec says", found=False)
        cells = [
            [
                self.scaled(word, 6) if name.upper() in AREAS else self._as_is(word)
                for name, word in zip(names, row, strict=True)
            ]
            for row in _chunks(words, len(names))
        ]
        types = [_type(row[i] for row in cells).encode("ascii") for i in range(len(names))]
        columns = [type_ + b" " + self.name(name) for type_, name in zip(types, names, strict=True)]
        yield b"Record SummaryRecord"
        yield b"{"
        yield from _list("TestSummaryList", columns, cells)
        yield b"}"

    def _defects(self, wafer: Wafer, columns: Columns, tables: Sequence[Table]) -> Iterator[bytes]:
        rows = [self._row(Defect(wafer, table, row)) for table in tables for row in range(len(table))]
        if not columns.all:
            return
        declared = []
        for i, column in enumerate(columns.all):
            if column.kind == "images":
                declared.append(b"ImageList IMAGEINFO")
                continue
            type_ = "int32" if column.name.upper() in (*LENGTHS, "DEFECTID") else _type(row[i] for row in rows)
            type_ = "float" if column.name.upper() in AREAS else type_
            if type_ == "float" and column.name.upper() not in (*AREAS, *WITHOUT_UNIT):
                self.note(
                    "own name", column.span.start, f"{column.name} is carried as it stands: its unit is not known"
                )
            declared.append(type_.encode("ascii") + b" " + self.name(column.name))
        yield from _list("DefectList", declared, rows)

    def _row(self, defect: Defect) -> list[bytes]:
        cells = []
        for column, span in zip(defect.table.columns.all, defect.table.cells(defect.row), strict=True):
            name = column.name.upper()
            if column.kind == "images":
                cells.append(self._images(defect.images))
            elif name in LENGTHS:
                cells.append(self.nm(span, column.name))
            elif name in AREAS:
                cells.append(self.scaled(span, 6))
            else:
                is_missing = self.source.value(span) is None
                cells.append(b"NA" if is_missing else self._as_is(span))
        return cells

    def _images(self, images: Sequence[Image]) -> bytes:
        if not images:
            return b"N"
        entries = []
        for image in images:
            number_and_kind = b"%d %s" % (image.number, quoted(image.kind, self.source))
            if image.file is None:
                entries.append(number_and_kind)
            else:
                names = quoted(image.file, self.source) + b" " + quoted(_format(image.file), self.source)
                entries.append(names + b" " + number_and_kind)
        return b"Images %d { %s }" % (len(images), b", ".join(entries))


def _format(file: str | None) -> str:
    """The format that the ending of a file's name says; a name without one is a TIFF of several pages."""
    ending = PureWindowsPath(file or "").suffix.lstrip(".").upper()
    return _NAMED_FORMATS.get(ending, ending)


def _field(name: str, values: Sequence[bytes]) -> bytes:
    return b"Field %s %d {%s}" % (name.encode("ascii"), len(values), b", ".join(values))


def _list(name: str, columns: Sequence[bytes], rows: Iterable[Sequence[bytes]]) -> Iterator[bytes]:
    cells = [b" ".join(row) + b";" for row in rows]
    yield b"List %s" % name.encode("ascii")
    yield b"{"
    yield b"Columns %d { %s }" % (len(columns), b", ".join(columns))
    yield b"Data %d" % len(cells)
    yield b"{"
    yield from cells
    yield b"}"
    yield b"}"


def _type(cells: Iterable[bytes]) -> str:
    """The narrowest type that holds every cell of a column."""
    type_ = "int32"
    for cell in cells:
        if cell.startswith(b'"'):
            return "string"
        number = as_integer(cell)
        if cell != b"NA" and (number is None or not -_INT32 <= number < _INT32):
            type_ = "float"
    return type_


def _chunks(words: Sequence[Span], n: int) -> Iterator[Sequence[Span]]:
    return (words[i : i + n] for i in range(0, len(words), n))


# --- to 1.2 ----------------------------------------------------------------------------------------------------------


class _ToFlat(_Writer):
    def __init__(self, document: Document, root: Record) -> None:
        super().__init__(document)
        self.root = root
        self.used: set[int] = set()
        """Where the fields and lists begin that are carried."""
        self.records = _wafer_records(root)
        """In the order of the wafers."""
        self.file: str | None = None

    def lines(self) -> Iterator[bytes]:
        yield b"FileVersion 1 2;"
        top = Scope(self.source, _level(self.root), (), is_flat=False)
        yield from self._statements("file", top)
        lots = [lot for lot in self.document.lots if lot.wafers] or self.document.lots[:1]
        for lot in self.document.lots:
            if lot not in lots:
                self.note("lost", None, f"lot {lot.id}, which has no wafers")
        if len(lots) > 1:
            self.note("own name", None, f"{len(lots)} lots in one file: most readers of 1.2 expect one")
        for lot in lots:
            yield b"LotID %s;" % quoted(lot.id or "", self.source)
            yield from self._statements("lot", lot.scope)
            yield from self._other_fields(lot.scope)
            if lot.classes:
                yield b"ClassLookup %d" % len(lot.classes)
                yield from _ended(b" %d %s" % (k.number, quoted(k.name, self.source)) for k in lot.classes.values())
            for wafer in lot.wafers:
                yield from self._wafer(wafer)
            if any(one.code for one in lot.classes.values()):
                self.note("lost", None, f"CLASSCODE of the classes of lot {lot.id}")
        self._lost(self.root)
        if any(column.type for table in self.document.tables for column in table.columns.all):
            self.note("lost", None, "types of columns: 1.2 does not state them")
        if self.document.is_complete:
            yield b"EndOfFile;"

    def _statements(self, level: str, scope: Scope) -> Iterator[bytes]:
        for rule in RULES:
            entry = scope.entry(rule.nested, own=True)
            if entry is not None and (level != "file" or rule.level == "file"):
                self.used.add(entry.start)
                words = [*self._words(rule, entry, scope)]
                yield b"%s %s;" % (rule.flat.encode("ascii"), b" ".join(words))

    def _words(self, rule: Rule, entry: Entry, scope: Scope) -> Iterator[bytes]:
        words = scope.spans(entry)
        match rule.unit:
            case "length":
                yield from (self.scaled(word, -3) for word in words)
            case "size":
                yield from (b"1", self.scaled(words[0], -6)) if words else ()
            case "direction":
                degrees = {b"%d" % angle: name.encode("ascii") for name, angle in DIRECTIONS.items()}
                yield from (degrees.get(self.content(word), self._word(word)) for word in words)
            case "word":
                yield from map(self._word, words)
            case "recipe":
                for i, word in enumerate(words):
                    yield self._word(word) if i else quoted(self.source.text(word), self.source)
            case _:
                yield from map(self.content, words)

    def _word(self, word: Span) -> bytes:
        """Without quotes where a word can stand without them."""
        inner = self.content(word)
        bare = inner.strip(b'"')
        return bare if bare and not any(c in b' \t;{},"' for c in bare) else inner

    def _other_fields(self, scope: Scope) -> Iterator[bytes]:
        known = {rule.nested.upper() for rule in RULES} | {"TIFFFILENAME", "IMAGEFILENAME"}
        for name, entries in scope.own.items():
            for entry in entries if name not in known else ():
                self.used.add(entry.start)
                self.note("own name", entry.start, f"{entry.name} becomes a statement of that name")
                yield b" ".join([self.name(entry.name), *map(self.content, scope.spans(entry))]) + b";"

    def _wafer(self, wafer: Wafer) -> Iterator[bytes]:
        yield b"WaferID %s;" % quoted(wafer.id or "", self.source)
        yield from self._statements("wafer", wafer.scope)
        yield from self._other_fields(wafer.scope)
        record = next(self.records)
        for name in ("CustomWaferList", "RemovedDieList"):
            for rows in record.rows(name):
                yield from self._plain_list(rows)
        for plan in wafer.plans:
            yield b"InspectionTest %d;" % (1 if plan.number is None else plan.number)
            if plan.dies:
                yield b"SampleTestPlan %d" % len(plan.dies)
                yield from _ended(b"  %d %d" % die for die in plan.dies)
            if plan.area_um2 is not None:
                yield b"AreaPerTest %s;" % repr(plan.area_um2).encode("ascii")
        for test in record.below("TestRecord"):
            self.used.update(one.start for one in test.fields if one.name.upper() in ("AREAPERTEST", "INSPECTIONTEST"))
        for table in wafer.tables:
            yield from self._defects(wafer, table)
        if not wafer.tables:
            yield b"DefectList;"
        for summary in record.below("SummaryRecord"):
            for rows in summary.rows("TestSummaryList"):
                yield from self._summary(rows)

    def _plain_list(self, rows: Rows) -> Iterator[bytes]:
        table = rows.table
        self.used.add(table.start)
        yield b"%s %d" % (self.name(table.name), len(table))
        yield from _ended(b"  " + b" ".join(map(self.content, table.cells(row))) for row in range(len(table)))

    def _summary(self, rows: Rows) -> Iterator[bytes]:
        table = rows.table
        self.used.add(table.start)
        names = [column.name for column in table.columns.all]
        yield b"SummarySpec %d %s ;" % (len(names), b" ".join(map(self.name, names)))
        yield b"SummaryList"
        yield from _ended(
            b" "
            + b" ".join(
                self.scaled(span, -6) if name.upper() in AREAS else self.content(span)
                for name, span in zip(names, table.cells(row), strict=True)
            )
            for row in range(len(table))
        )

    def _defects(self, wafer: Wafer, table: Table) -> Iterator[bytes]:
        columns = table.columns
        kept = [
            i for i, column in enumerate(columns.all) if i != columns.images and column.name.upper() != "IMAGECOUNT"
        ]
        names = [columns.all[i].name for i in kept]
        if columns.images is not None:
            names += ["IMAGECOUNT", "IMAGELIST"]
        elif "IMAGECOUNT" in columns.by_name:
            kept.append(columns.by_name["IMAGECOUNT"])
            names.append("IMAGECOUNT")
        yield b"DefectRecordSpec %d %s ;" % (len(names), b" ".join(map(self.name, names)))
        block: list[bytes] = []
        n_missing = 0
        for row in range(len(table)):
            defect = Defect(wafer, table, row)
            images = self._one_file(defect)
            file = images[0].file if images else self.file
            if file != self.file:
                if block:
                    yield b"DefectList"
                    yield from _ended(block)
                    block = []
                self.file = file
                if file is not None:
                    yield b"TiffFileName %s;" % self._file_name(file)
            cells = table.cells(row)
            words = [self._cell(columns.all[i].name, cells[i]) for i in kept]
            n_missing += words.count(b"NA")
            if columns.images is not None:
                words += [b"%d" % len(images)] * 2
                words += [b"%d %s" % (image.number, self._kind(defect, image)) for image in images]
            block.append(b" " + b" ".join(words))
        if n_missing:
            self.note("own name", table.start, f"{n_missing} cells are NA, which no public file of 1.2 has")
        yield b"DefectList" if block else b"DefectList;"
        yield from _ended(block) if block else ()

    def _cell(self, name: str, span: Span) -> bytes:
        if name.upper() in LENGTHS:
            return self.scaled(span, -3)
        return self.scaled(span, -6) if name.upper() in AREAS else self.content(span)

    def _one_file(self, defect: Defect) -> Sequence[Image]:
        """The images of a defect that 1.2 can list: those that lie in one file."""
        images = defect.images
        kept = [image for image in images if image.file == images[0].file]
        if len(kept) < len(images):
            self.count(
                "images that lie in another file than the first of their defect", len(images) - len(kept), defect
            )
        for image in kept:
            if image.format is not None and _format(image.file) != image.format.upper():
                self.count("formats of images: the name of the file says another one", 1, defect)
        return kept

    def _kind(self, defect: Defect, image: Image) -> bytes:
        kind = image.kind.encode("utf-8")
        if as_integer(kind) is not None:
            return kind
        self.count("kinds of images that are no numbers: 0 now", 1, defect)
        return b"0"

    def _file_name(self, file: str) -> bytes:
        name = quoted(file, self.source)
        bare = name[1:-1]
        return bare if bare and not any(c in b" \t;" for c in bare) else name

    def _lost(self, record: Record) -> None:
        """Note what no statement was made of."""
        meant = {"DEFECTLIST", "CLASSLOOKUPLIST", "SAMPLETESTPLANLIST"}
        for one in record.fields:
            if one.start not in self.used and one.name.upper() not in ("TIFFFILENAME", "IMAGEFILENAME"):
                self.note("lost", one.start, f"field {one.name} of {record.name}")
        for rows in record.lists:
            if rows.table.start not in self.used and rows.table.name.upper() not in meant:
                self.note("lost", rows.table.start, f"list {rows.table.name} of {record.name}")
        for inner in record.records:
            self._lost(inner)


def _ended(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of which the last one ends its statement; a statement without rows ends at once."""
    held: bytes | None = None
    for line in lines:
        if held is not None:
            yield held
        held = line
    yield b" ;" if held is None else held + b";"


def _level(record: Record) -> dict[str, list[Entry]]:
    level: dict[str, list[Entry]] = {}
    for one in record.fields:
        level.setdefault(one.name.upper(), []).append(Entry(one.name, one.start, one.body))
    return level


def _wafer_records(root: Record) -> Iterator[Record]:
    for lot in root.below("LotRecord"):
        yield from lot.below("WaferRecord")
    yield from root.below("WaferRecord")
