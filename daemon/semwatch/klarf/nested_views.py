"""Lots and wafers of KLARF 1.8, where records lie in each other."""

from collections.abc import Iterator, Mapping, Sequence

from semwatch.klarf.nested import Record
from semwatch.klarf.source import Source
from semwatch.klarf.table import Table
from semwatch.klarf.views import Entry, Lot, Plan, ReviewClass, Scope, Wafer

Level = Mapping[str, Sequence[Entry]]


def lots(source: Source, root: Record) -> tuple[Lot, ...]:
    """Build the lots of a file.

    Raises:
        KlarfError: a list of defects outside of every wafer.
    """
    above = _level(root)
    found = [_lot(source, record, above) for record in root.below("LotRecord")]
    if wafers := tuple(_wafer(source, record, (above,), {}) for record in root.below("WaferRecord")):
        found.append(Lot(None, Scope(source, above, (), is_flat=False), wafers, {}))
    seen = {table.start for lot in found for wafer in lot.wafers for table in wafer.tables}
    for table in _defect_lists(root):
        if table.start not in seen:
            raise source.error(table.start, "DefectList inside a WaferRecord", found=False)
    return tuple(found)


def _lot(source: Source, record: Record, above: Level) -> Lot:
    level = _level(record)
    classes = _classes(source, record)
    wafers = tuple(_wafer(source, one, (level, above), classes) for one in record.below("WaferRecord"))
    return Lot(record.id, Scope(source, level, (above,), is_flat=False), wafers, classes)


def _wafer(source: Source, record: Record, outer: tuple[Level, ...], classes: Mapping[int, ReviewClass]) -> Wafer:
    scope = Scope(source, _level(record), outer, is_flat=False)
    tables = tuple(_defect_lists(record))
    words = scope.words("ImageFileName", "TiffFileName")
    files = (words[0] if words else None,) * len(tables)
    plans = tuple(_plan(source, test) for test in record.below("TestRecord"))
    return Wafer(record.id, scope, tables, files, plans, _classes(source, record) or classes)


def _level(record: Record) -> Level:
    level: dict[str, list[Entry]] = {}
    for one in record.fields:
        level.setdefault(one.name.upper(), []).append(Entry(one.name, one.start, one.body))
    return level


def _defect_lists(record: Record) -> Iterator[Table]:
    """The lists of defects of a record and of those in it, which the parser bounds in depth."""
    yield from (rows.table for rows in record.rows("DefectList"))
    for inner in record.records:
        yield from _defect_lists(inner)


def _plan(source: Source, test: Record) -> Plan:
    scope = Scope(source, _level(test), (), is_flat=False)
    area = scope.numbers("AreaPerTest", n=1)
    dies: list[tuple[int, int]] = []
    for rows in test.rows("SampleTestPlanList"):
        if rows.table.index("XINDEX") is None or rows.table.index("YINDEX") is None:
            raise source.error(rows.table.start, "columns XINDEX and YINDEX", found=False)
        for x, y in zip(rows.table.column("XINDEX"), rows.table.column("YINDEX"), strict=True):
            if not isinstance(x, int) or not isinstance(y, int):
                raise source.error(rows.table.start, "whole numbers as the indices of every die", found=False)
            dies.append((x, y))
    number = (
        int(test.id) if test.id is not None and test.id.isascii() and test.id.isdigit() and len(test.id) < 10 else None
    )
    return Plan(number, tuple(dies), None if area is None else area[0] / 1e6)


def _classes(source: Source, record: Record) -> Mapping[int, ReviewClass]:
    found: dict[int, ReviewClass] = {}
    for rows in record.rows("ClassLookupList"):
        table = rows.table
        numbers, names, codes = (table.index(name) for name in ("CLASSNUMBER", "CLASSNAME", "CLASSCODE"))
        if numbers is None or names is None:
            raise source.error(table.start, "columns CLASSNUMBER and CLASSNAME", found=False)
        for row in range(len(table)):
            cells = table.cells(row)
            number = source.value(cells[numbers])
            if not isinstance(number, int):
                raise source.error(cells[numbers].start, "the number of a class")
            if number in found:
                raise source.error(cells[numbers].start, f"each class once; {number} stands in the table before")
            code = None if codes is None else source.text(cells[codes])
            found[number] = ReviewClass(number, source.text(cells[names]), code)
    return found
