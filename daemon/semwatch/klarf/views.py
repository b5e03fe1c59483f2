"""What a KLARF means, in both grammars: lots, wafers, dies, defects, classes, images, and where they lie.

Lengths are micrometres and areas square micrometres, whatever the file counts in. The *die frame* has its origin at
the origin of the die, the *wafer frame* at the centre of the wafer; x goes to the right and y upwards as the file sees
the wafer.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple, overload

from semwatch.klarf.errors import KlarfError
from semwatch.klarf.source import NESTED_TOKEN, Source, Span, Value, as_integer
from semwatch.klarf.table import Table

DIRECTIONS: Mapping[str, int] = {"DOWN": 0, "LEFT": 90, "UP": 180, "RIGHT": 270}
"""Degrees of the mark, clockwise from the bottom, by the word that KLARF 1.1 and 1.2 use."""
_SIGN_OF_TURN = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}
_SINGLE_PICTURES = {"JPG", "JPEG", "PNG", "BMP", "GIF", "JP2"}


class Plan(NamedTuple):
    """An inspection as the file gives it: its number, indices of its dies, its area in um2."""

    number: int | None
    dies: tuple[tuple[int, int], ...]
    area_um2: float | None


class Point(NamedTuple):
    """A place or a size, micrometres."""

    x_um: float
    y_um: float


@dataclass(frozen=True, slots=True)
class Entry:
    """A field or a statement: its name, where it begins, and where its words stand."""

    name: str
    start: int
    body: Span


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """Where a lot or a wafer finds its fields: at the nearest level that has one.

    Attributes:
        own: entries of this lot or wafer alone, by name in capitals.
        outer: those that it takes over, from near to far.
        is_flat: of version 1.1 or 1.2.
    """

    source: Source
    own: Mapping[str, Sequence[Entry]]
    outer: tuple[Mapping[str, Sequence[Entry]], ...]
    is_flat: bool

    @property
    def per_um(self) -> int:
        """Units of the file in a micrometre."""
        return 1 if self.is_flat else 1000

    def entry(self, *names: str, own: bool = False) -> Entry | None:
        """The entry of the first of these names that there is.

        Raises:
            KlarfError: it stands there twice, and differently.
        """
        for level in (self.own,) if own else (self.own, *self.outer):
            for name in names:
                if entries := level.get(name.upper()):
                    first, *more = entries
                    for other in more:
                        if self.texts(other) != self.texts(first):
                            where = self.source.place(first.start)
                            raise self.source.error(other.start, f"{name} once; it stands at {where} too", found=False)
                    return entries[-1]
        return None

    def spans(self, entry: Entry) -> tuple[Span, ...]:
        """Where its words stand."""
        words = self.source.flat_words if self.is_flat else self.source.nested_words
        return tuple(words(entry.body))

    def texts(self, entry: Entry) -> tuple[str, ...]:
        """Its words as text."""
        return tuple(self.source.text(word) for word in self.spans(entry))

    def words(self, *names: str, own: bool = False) -> tuple[str, ...]:
        """The words of the entry; none where there is no entry."""
        entry = self.entry(*names, own=own)
        return () if entry is None else self.texts(entry)

    def text(self, *names: str, own: bool = False) -> str | None:
        """All its words, with a space between."""
        words = self.words(*names, own=own)
        return " ".join(words) if words else None

    def numbers(self, *names: str, n: int, own: bool = False) -> tuple[float, ...] | None:
        """Its first ``n`` words as numbers; None where there is no entry."""
        entry = self.entry(*names, own=own)
        if entry is None:
            return None
        values = [self.source.value(word) for word in self.spans(entry)[:n]]
        numbers = tuple(value for value in values if isinstance(value, int | float))
        if len(numbers) < n:
            raise self.source.error(entry.start, f"{n} numbers in {entry.name}", found=False)
        return numbers

    def point(self, *names: str) -> Point | None:
        """Its first two words as lengths."""
        found = self.numbers(*names, n=2)
        return None if found is None else Point(found[0] / self.per_um, found[1] / self.per_um)


# --- what lies on a wafer --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Orientation:
    """How the wafer lay when its coordinates were written.

    Attributes:
        mark: NOTCH or FLAT as the file says; None where it does not.
        degrees: where the mark is, clockwise from the bottom: 0, 90 (left), 180 (top) or 270 (right).
        is_mirrored: whether the file says that its coordinates are mirrored; nothing is undone for it here.
    """

    mark: str | None
    degrees: int
    is_mirrored: bool

    def turned_down(self, point: Point) -> Point:
        """A point of the wafer frame once the wafer is turned so that its mark is at the bottom.

        >>> Orientation("NOTCH", 90, False).turned_down(Point(-100.0, 0.0))  # at the notch on the left
        Point(x_um=0.0, y_um=-100.0)
        """
        cos, sin = _SIGN_OF_TURN[self.degrees]
        return Point(cos * point.x_um - sin * point.y_um + 0.0, sin * point.x_um + cos * point.y_um + 0.0)


@dataclass(frozen=True, slots=True)
class Die:
    """A die by its indices, with its origin in the wafer frame; None where the file does not give the pitch."""

    x_index: int
    y_index: int
    origin: Point | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """One inspection of a wafer: its number, the dies that were inspected, and the area of it all in um2."""

    number: int | None
    dies: tuple[Die, ...]
    area_um2: float | None


@dataclass(frozen=True, slots=True)
class ReviewClass:
    """A class of the lookup table."""

    number: int
    name: str
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a defect, as the file names it.

    Attributes:
        file: as written; None where no file is named for it.
        number: of the image; in a file of several pages it is page ``number - 1``.
        kind: what it shows, as the tool calls it: 0, 30, Patch, ...
        format: TIF, JPG, ...; None where the file does not say.
    """

    file: str | None
    number: int
    kind: str
    format: str | None = None

    @property
    def page(self) -> int:
        """Page of the file, from 0: an image that has a file of its own is its page 0.

        Raises:
            KlarfError: the file has pages and the number is below 1.
        """
        if not self.has_pages:
            return 0
        if self.number < 1:
            raise KlarfError(f"expected the number of an image in {self.file} to be 1 or more, found {self.number}")
        return self.number - 1

    @property
    def has_pages(self) -> bool:
        """Whether its file may hold several: a TIFF, an ``.I01``, or whatever is no known single picture."""
        ending = PureWindowsPath(self.file or "").suffix.lstrip(".")
        return not {ending.upper(), (self.format or "").upper()} & _SINGLE_PICTURES

    @property
    def path(self) -> PurePosixPath:
        r"""The path of its file relative to the folder of the KLARF, backslashes as slashes.

        >>> Image(r"images\a.jpg", 1, "0").path
        PurePosixPath('images/a.jpg')

        Raises:
            KlarfError: there is none, or it would lead out of that folder: absolute, with a drive, or with ``..``.
        """
        return relative_path(self.file)


def relative_path(name: str | None) -> PurePosixPath:
    """A file that a KLARF names, relative to its folder.

    Raises:
        KlarfError: there is no name, or it would lead out of that folder.
    """
    windows = PureWindowsPath(name or "")
    parts = windows.parts
    if not parts or windows.drive or windows.root or ".." in parts or any(c in (name or "") for c in "\0:"):
        raise KlarfError(f"expected the name of a file below the folder of the KLARF, found {(name or '')[:200]!r}")
    return PurePosixPath(*parts)


# --- defects ---------------------------------------------------------------------------------------------------------


class Defect:
    """One row of a list of defects; cells are read when they are asked for."""

    __slots__ = ("_cells", "row", "table", "wafer")

    def __init__(self, wafer: "Wafer", table: Table, row: int) -> None:
        self.wafer = wafer
        self.table = table
        self.row = row
        self._cells: list[Span] | None = None

    def span(self, column: str) -> Span | None:
        """Where a cell stands; None where there is no such column."""
        index = self.table.index(column)
        if index is None:
            return None
        if self._cells is None:
            self._cells = self.table.cells(self.row)
        return self._cells[index]

    def __getitem__(self, column: str) -> Value:
        span = self.span(column)
        if span is None:
            raise KeyError(column)
        return self.table.source.value(span)

    def text(self, column: str) -> str | None:
        """A cell as it is written; None where there is no such column."""
        span = self.span(column)
        return None if span is None else self.table.source.text(span)

    def integer(self, column: str) -> int | None:
        """A cell as a whole number; None for NA, and where there is no such column.

        Raises:
            KlarfError: it is something else.
        """
        value = self.number(column)
        if value is not None and value != int(value):
            raise self._error(column, f"a whole number as {column}")
        return None if value is None else int(value)

    def number(self, column: str) -> float | None:
        """A cell as a number; None for NA, and where there is no such column.

        Raises:
            KlarfError: it is something else.
        """
        span = self.span(column)
        value = None if span is None else self.table.source.value(span)
        if isinstance(value, str):
            raise self._error(column, f"a number as {column}")
        return value

    def _error(self, column: str, expected: str) -> KlarfError:
        span = self.span(column)
        return self.table.source.error(self.table.starts[self.row] if span is None else span.start, expected)

    def _length(self, column: str, power: int = 1) -> float | None:
        value = self.number(column)
        return None if value is None else value / self.wafer.scope.per_um**power

    @property
    def id(self) -> int:
        """Its DEFECTID."""
        found = self.integer("DEFECTID")
        if found is None:
            raise self.table.source.error(self.table.starts[self.row], "a column DEFECTID", found=False)
        return found

    @property
    def class_number(self) -> int | None:
        """Its CLASSNUMBER."""
        return self.integer("CLASSNUMBER")

    @property
    def die(self) -> Die | None:
        """The die it lies on."""
        x, y = self.integer("XINDEX"), self.integer("YINDEX")
        return None if x is None or y is None else self.wafer.die(x, y)

    @property
    def in_die(self) -> Point | None:
        """Its place in the die frame: XREL and YREL."""
        x, y = self._length("XREL"), self._length("YREL")
        return None if x is None or y is None else Point(x, y)

    @property
    def on_wafer(self) -> Point | None:
        """Its place in the wafer frame: die index x die pitch + XREL - SampleCenterLocation."""
        die, place = self.die, self.in_die
        if die is None or die.origin is None or place is None:
            return None
        return Point(die.origin.x_um + place.x_um, die.origin.y_um + place.y_um)

    @property
    def size(self) -> Point | None:
        """Its XSIZE and YSIZE."""
        x, y = self._length("XSIZE"), self._length("YSIZE")
        return None if x is None or y is None else Point(x, y)

    @property
    def diameter_um(self) -> float | None:
        """Its DSIZE."""
        return self._length("DSIZE")

    @property
    def area_um2(self) -> float | None:
        """Its DEFECTAREA."""
        return self._length("DEFECTAREA", 2)

    @property
    def images(self) -> tuple[Image, ...]:
        """Its images, in the order of the file.

        Raises:
            KlarfError: the list is not as long as it says, or holds no numbers where numbers belong.
        """
        index = self.table.columns.images
        span = None if index is None else self.span(self.table.columns.all[index].name)
        return () if span is None else _images(self, span)


def _images(defect: Defect, span: Span) -> tuple[Image, ...]:
    source = defect.table.source
    data = source.data
    tokens = [Span(*token.span()) for token in NESTED_TOKEN.finditer(data, span.start, span.end)]
    first = data[tokens[0].start : tokens[0].end] if tokens else b"N"
    shared = defect.wafer.image_file(defect.table)
    if first == b"N":
        return ()
    if first.startswith(b"Image"):
        return _named_images(source, tokens, shared)
    words = tokens
    if (defect.table.is_flat and defect.table.has_inner_count) or (not defect.table.is_flat and len(tokens) % 2):
        n = as_integer(first)
        words = tokens[1:]
        if n is None or 2 * n != len(words):
            raise source.error(span.start, f"{len(words) // 2} as the number of images")
    if len(words) % 2:
        raise source.error(span.start, "a number and a kind of each image")
    return tuple(
        Image(shared, _image_number(source, number), source.text(kind))
        for number, kind in zip(words[::2], words[1::2], strict=True)
    )


def _named_images(source: Source, tokens: list[Span], shared: str | None) -> tuple[Image, ...]:
    """``Images 2 { "a.jpg" "JPG" 1 "Patch", ... }`` or ``Images 2 {1 "30", 2 "31"}``."""
    n = as_integer(source.data[tokens[1].start : tokens[1].end])
    entries: list[list[Span]] = [[]]
    for token in tokens[3:-1]:
        if source.data[token.start : token.end] == b",":
            entries.append([])
        else:
            entries[-1].append(token)
    found = []
    for words in entries if tokens[3:-1] else []:
        if len(words) == 4:
            file, format_, number, kind = words
            image = Image(source.text(file), _image_number(source, number), source.text(kind), source.text(format_))
        elif len(words) == 2:
            number, kind = words
            image = Image(shared, _image_number(source, number), source.text(kind))
        else:
            start = words[0].start if words else tokens[-1].start
            raise source.error(start, "an image as number and kind, or as file, format, number and kind")
        found.append(image)
    if n != len(found):
        raise source.error(tokens[1].start, f"{len(found)} as the number of images, for so many follow")
    return tuple(found)


def _image_number(source: Source, span: Span) -> int:
    number = as_integer(source.data[span.start : span.end])
    if number is None:
        raise source.error(span.start, "the number of an image")
    return number


class Defects(Sequence[Defect]):
    """The defects of a wafer, over all its lists, in the order of the file."""

    def __init__(self, wafer: "Wafer") -> None:
        self._wafer = wafer
        self._begins = [0, *accumulate(map(len, wafer.tables))]
        self._n = self._begins[-1]

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Defect: ...
    @overload
    def __getitem__(self, index: slice) -> list[Defect]: ...
    def __getitem__(self, index: int | slice) -> Defect | list[Defect]:
        """The defect at a place of the list, not by its id."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n))]
        at = index + self._n if index < 0 else index
        if not 0 <= at < self._n:
            raise IndexError(index)
        table, row = self.locate(at)
        return Defect(self._wafer, table, row)

    def locate(self, at: int) -> tuple[Table, int]:
        """The list and the row of the defect at a place."""
        n = bisect_right(self._begins, at) - 1
        return self._wafer.tables[n], at - self._begins[n]

    def __iter__(self) -> Iterator[Defect]:
        return (Defect(self._wafer, table, row) for table in self._wafer.tables for row in range(len(table)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, as written, in the order of their first mention."""
        return tuple(dict.fromkeys(column.name for table in self._wafer.tables for column in table.columns.all))

    def column(self, name: str) -> list[Value]:
        """The values of one column, a list without it giving None for each of its rows.

        Raises:
            KlarfError: no list has such a column.
        """
        if self._wafer.tables and all(table.index(name) is None for table in self._wafer.tables):
            raise KlarfError(f"expected one of the columns {', '.join(self.columns)}; found {name}")
        values: list[Value] = []
        for table in self._wafer.tables:
            values += [None] * len(table) if table.index(name) is None else table.column(name)
        return values

    def by_id(self, defect_id: int) -> Defect:
        """The defect of an id.

        Raises:
            KlarfError: there is none, or several.
        """
        if defect_id not in self._rows_by_id:
            raise KlarfError(f"wafer {self._wafer.id} has no defect {defect_id}")
        return self[self._rows_by_id[defect_id]]

    @cached_property
    def _rows_by_id(self) -> dict[int, int]:
        return rows_by_id(self._wafer)


def rows_by_id(wafer: "Wafer") -> dict[int, int]:
    """Place in the list of every DEFECTID of a wafer.

    Raises:
        KlarfError: an id stands twice; the message names both places.
    """
    found: dict[int, int] = {}
    n = 0
    for table in wafer.tables:
        index = table.index("DEFECTID")
        if index is None:
            if len(table):
                raise table.source.error(table.start, "a column DEFECTID", found=False)
            continue
        for row, word in enumerate(table.column_words(index)):
            defect_id = as_integer(word)
            if defect_id is None or defect_id in found:
                start = table.cell(row, index).start
                if defect_id is None:
                    raise table.source.error(start, "a DEFECTID of at most 100 digits")
                first = wafer.defects[found[defect_id]].span("DEFECTID")
                where = "" if first is None else f"; {defect_id} stands at {table.source.place(first.start)} too"
                raise table.source.error(start, f"every DEFECTID once{where}", found=False)
            found[defect_id] = n
            n += 1
    return found


# --- lots and wafers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Wafer:
    """A wafer of a lot.

    Attributes:
        id: as the file calls it; None where it does not.
        tables: its lists of defects.
        image_files: for each of them the file that its images are in, where images are named by number alone.
        plans: number, die indices and area (um2) of each inspection.
        classes: the lookup table of classes that holds for it, by number.
    """

    id: str | None
    scope: Scope
    tables: tuple[Table, ...]
    image_files: tuple[str | None, ...]
    plans: tuple[Plan, ...]
    classes: Mapping[int, ReviewClass]

    @cached_property
    def defects(self) -> Defects:
        """Its defects."""
        return Defects(self)

    @property
    def slot(self) -> int | None:
        """Its place in the carrier."""
        found = self.scope.numbers("SlotNumber", "Slot", n=1, own=True)
        return None if found is None else int(found[0])

    @property
    def scribe(self) -> str | None:
        """What is scribed on it."""
        return self.scope.text("WaferScribe", "ScribeID", own=True)

    @cached_property
    def die_pitch(self) -> Point | None:
        """From die to die."""
        return self.scope.point("DiePitch")

    @cached_property
    def center(self) -> Point | None:
        """SampleCenterLocation: the centre of the wafer seen from the origin of die (0, 0)."""
        return self.scope.point("SampleCenterLocation")

    @property
    def die_origin(self) -> Point | None:
        """DieOrigin: the origin of a die seen from its lower left corner."""
        return self.scope.point("DieOrigin")

    @property
    def diameter_um(self) -> float | None:
        """The diameter that SampleSize gives: in mm in 1.1 and 1.2, in nm in 1.8."""
        if self.scope.is_flat:
            found = self.scope.numbers("SampleSize", n=2)
            return None if found is None else found[1] * 1e3
        found = self.scope.numbers("SampleSize", n=1)
        return None if found is None else found[0] / 1e3

    @property
    def orientation(self) -> Orientation:
        """How it lay.

        Raises:
            KlarfError: a direction that is none, or two different ones.
        """
        entry = self.scope.entry("OrientationMarkLocation")
        degrees: int | None = 0
        if entry is not None:
            (word, *_) = (*self.scope.texts(entry), "")
            degrees = DIRECTIONS.get(word.upper(), as_integer(word.encode("utf-8")))
            if degrees not in _SIGN_OF_TURN:
                expected = "DOWN, LEFT, UP, RIGHT, 0, 90, 180 or 270"
                raise self.scope.source.error(entry.start, f"{expected} as {entry.name}, found {word!r}", found=False)
        mirrored = (self.scope.text("CoordinatesMirrored") or "NO").upper()
        return Orientation(self.scope.text("SampleOrientationMarkType"), degrees or 0, mirrored in ("YES", "Y", "TRUE"))

    def die(self, x_index: int, y_index: int) -> Die:
        """A die by its indices, whether it was inspected or not."""
        pitch, center = self.die_pitch, self.center
        if pitch is None or center is None:
            return Die(x_index, y_index, None)
        origin = Point(x_index * pitch.x_um - center.x_um, y_index * pitch.y_um - center.y_um)
        return Die(x_index, y_index, origin)

    @cached_property
    def inspections(self) -> tuple[Inspection, ...]:
        """The inspections of it."""
        return tuple(
            Inspection(number, tuple(self.die(x, y) for x, y in dies), area) for number, dies, area in self.plans
        )

    @property
    def dies(self) -> tuple[Die, ...]:
        """Every die that an inspection took in, once."""
        return tuple(dict.fromkeys(die for one in self.inspections for die in one.dies))

    def image_file(self, table: Table) -> str | None:
        """The file that images of a list are in, where they are named by number alone."""
        return self._file_by_start.get(table.start)

    @cached_property
    def _file_by_start(self) -> Mapping[int, str | None]:
        return {table.start: file for table, file in zip(self.tables, self.image_files, strict=True)}


@dataclass(frozen=True, eq=False)
class Lot:
    """A lot with its wafers.

    Attributes:
        classes: its lookup table of classes, by number.
    """

    id: str | None
    scope: Scope
    wafers: tuple[Wafer, ...]
    classes: Mapping[int, ReviewClass]

    @property
    def step_id(self) -> str | None:
        """The step of the process."""
        return self.scope.text("StepID")

    @property
    def device_id(self) -> str | None:
        """The product."""
        return self.scope.text("DeviceID")

    @property
    def recipe_id(self) -> str | None:
        """The recipe of the tool: RecipeID of 1.8, SetupID of 1.1 and 1.2."""
        words = self.scope.words("RecipeID", "SetupID")
        return words[0] if words else None

    @property
    def station(self) -> tuple[str, ...]:
        """The tool: its maker, model and number."""
        return self.scope.words("InspectionStationID")

    @property
    def inspected(self) -> str | None:
        """When it was inspected, as written: the order of day and month is the tool's."""
        return self.scope.text("ResultTimestamp")
