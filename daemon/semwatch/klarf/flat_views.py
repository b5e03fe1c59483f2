"""Lots and wafers of KLARF 1.1 and 1.2, where order alone says what belongs to what.

``WaferID`` begins a wafer. What stands before the first one holds for all, and a value holds until it is given anew.
Some tools give the geometry of the next wafer before its ``WaferID``: what follows the last list of a wafer is of the
next.
"""

from collections.abc import Mapping, Sequence

from semwatch.klarf.errors import KlarfError
from semwatch.klarf.flat import Statement
from semwatch.klarf.source import Source, Span, as_integer
from semwatch.klarf.views import Entry, Lot, Plan, ReviewClass, Scope, Wafer

MAX_WAFERS = 1000

_OF_A_WAFER = {
    "DEFECTLIST", "SUMMARYLIST", "SUMMARYSPEC", "WAFERSTATUS", "LOTSTATUS", "SAMPLETESTPLAN", "AREAPERTEST",
    "PROCESSEQUIPMENTIDLIST", "REMOVEDDIELIST", "CUSTOMWAFERLIST", "ENDOFFILE", "WAFERID",
}  # fmt: skip
"""What never is of a wafer that is still to come."""

Level = Mapping[str, Sequence[Entry]]


def lots(source: Source, statements: Sequence[Statement]) -> tuple[Lot, ...]:
    """Build the lots of a file.

    Raises:
        KlarfError: a wafer among several that has no list of defects; a list before the first of several wafers.
    """
    sections = _sections(source, statements)
    file_names = _image_files(source, statements)
    before: tuple[Level, ...] = ()
    found: list[tuple[Entry | None, Wafer]] = []
    for wafer_id, section in sections:
        own = _level(section)
        scope = Scope(source, own, before, is_flat=True)
        tables = tuple(one.table for one in section if one.table is not None)
        if len(sections) > 1 and not tables:
            raise source.error(
                section[0].start, f"a DefectList of wafer {wafer_id}, for the file has several wafers", found=False
            )
        files = tuple(file_names[table.start] for table in tables)
        wafer = Wafer(wafer_id, scope, tables, files, tuple(_plans(source, section)), _classes(source, scope))
        found.append((scope.entry("LotID"), wafer))
        before = (own, *before)
    return _by_lot(source, statements, found)


def _by_lot(
    source: Source, statements: Sequence[Statement], found: list[tuple[Entry | None, Wafer]]
) -> tuple[Lot, ...]:
    if not found:
        scope = Scope(source, _level(statements), (), is_flat=True)
        return (Lot(scope.text("LotID"), scope, (), _classes(source, scope)),)
    grouped: dict[str | None, list[Wafer]] = {}
    for entry, wafer in found:
        grouped.setdefault(None if entry is None else wafer.scope.text("LotID"), []).append(wafer)
    return tuple(Lot(lot, wafers[0].scope, tuple(wafers), wafers[0].classes) for lot, wafers in grouped.items())


def _sections(source: Source, statements: Sequence[Statement]) -> list[tuple[str | None, Sequence[Statement]]]:
    """The statements of each wafer; what stands before the first one is part of it."""
    at = [i for i, one in enumerate(statements) if one.keyword.upper() == "WAFERID"]
    if len(at) > MAX_WAFERS:
        raise source.error(statements[at[MAX_WAFERS]].start, f"at most {MAX_WAFERS} wafers", found=False)
    if len(at) <= 1:
        has_defects = any(one.table is not None for one in statements)
        wafer_id = _text(source, statements[at[0]]) if at else None
        return [(wafer_id, statements)] if at or has_defects else []
    early = next((one for one in statements[: at[0]] if one.table is not None), None)
    if early is not None:
        raise source.error(early.start, "a WaferID before DefectList, for the file has several wafers", found=False)
    starts = [0]
    for here in at[1:]:
        start = here
        while statements[start - 1].keyword.upper() not in _OF_A_WAFER and start - 1 > starts[-1]:
            start -= 1
        starts.append(start)
    ends = [*starts[1:], len(statements)]
    return [(_text(source, statements[i]), statements[a:b]) for i, a, b in zip(at, starts, ends, strict=True)]


def _text(source: Source, statement: Statement) -> str:
    """All words of a statement, with a space between."""
    return " ".join(source.text(word) for word in source.flat_words(statement.body))


def _level(statements: Sequence[Statement]) -> Level:
    level: dict[str, list[Entry]] = {}
    for one in statements:
        if one.table is None:
            level.setdefault(one.keyword.upper(), []).append(Entry(one.keyword, one.start, one.body))
    return level


def _image_files(source: Source, statements: Sequence[Statement]) -> dict[int, str | None]:
    """For each list of defects, by its first byte, the TiffFileName before it."""
    files: dict[int, str | None] = {}
    current: str | None = None
    for one in statements:
        if one.keyword.upper() == "TIFFFILENAME":
            current = _text(source, one) or None
        elif one.table is not None:
            files[one.start] = current
    return files


def _plans(source: Source, section: Sequence[Statement]) -> list[Plan]:
    plans: list[Plan] = []
    for one in section:
        keyword = one.keyword.upper()
        if keyword == "INSPECTIONTEST":
            plans.append(Plan(_number(source, one), (), None))
        elif keyword in ("SAMPLETESTPLAN", "AREAPERTEST"):
            last = plans.pop() if plans else Plan(None, (), None)
            if keyword == "SAMPLETESTPLAN":
                plans.append(last._replace(dies=tuple(_pairs(source, one))))
            else:
                words = list(source.flat_words(one.body))
                area = source.value(words[0]) if words else None
                plans.append(last._replace(area_um2=float(area) if isinstance(area, int | float) else None))
    return plans


def _number(source: Source, statement: Statement) -> int | None:
    words = list(source.flat_words(statement.body))
    return as_integer(source.data[words[0].start : words[0].end]) if words else None


def _pairs(source: Source, statement: Statement) -> list[tuple[int, int]]:
    numbers: list[int] = []
    for word in source.flat_words(statement.body):
        number = as_integer(source.data[word.start : word.end])
        if number is None:
            raise source.error(word.start, f"a whole number in {statement.keyword}")
        numbers.append(number)
    if not numbers or len(numbers) != 2 * numbers[0] + 1:
        n = (len(numbers) - 1) / 2
        raise source.error(statement.body.start, f"{n:g} as the number of dies, for so many follow")
    return list(zip(numbers[1::2], numbers[2::2], strict=True))


def _classes(source: Source, scope: Scope) -> Mapping[int, ReviewClass]:
    entry = scope.entry("ClassLookup")
    if entry is None:
        return {}
    words = scope.spans(entry)
    n = as_integer(source.data[words[0].start : words[0].end]) if words else None
    if n is None or len(words) != 2 * n + 1:
        raise _wrong_lookup(source, entry, words)
    found: dict[int, ReviewClass] = {}
    for number_span, name_span in zip(words[1::2], words[2::2], strict=True):
        number = as_integer(source.data[number_span.start : number_span.end])
        if number is None:
            raise source.error(number_span.start, "the number of a class")
        if number in found:
            raise source.error(number_span.start, f"each class once; {number} stands in the table before")
        found[number] = ReviewClass(number, source.text(name_span))
    return found


def _wrong_lookup(source: Source, entry: Entry, words: tuple[Span, ...]) -> KlarfError:
    if not words:
        return source.error(entry.body.start, "the number of classes")
    n = (len(words) - 1) / 2
    return source.error(words[0].start, f"{n:g} as the number of classes, for so many pairs of number and name follow")
