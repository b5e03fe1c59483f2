"""What differs between two KLARF files of one grammar: by meaning, not by spacing."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from semwatch.klarf.document import Document
from semwatch.klarf.errors import KlarfError
from semwatch.klarf.source import Value
from semwatch.klarf.views import Defect, Lot, Scope, Wafer, rows_by_id

T = TypeVar("T", Lot, Wafer)


class Difference(NamedTuple):
    """One thing that differs.

    Attributes:
        where: the lot, the wafer, the defect.
        what: the field, column or class; empty for a lot, wafer or defect as a whole.
        old, new: as text; None where the file has it not.
    """

    where: str
    what: str
    old: str | None
    new: str | None


def diff(old: Document, new: Document) -> Iterator[Difference]:
    """Go through lots, wafers, fields, classes and defects. Numbers are compared by value: 1.0 and 1.00 are one.

    Raises:
        KlarfError: one is of 1.8 and the other is not: convert it first; or a DEFECTID stands twice.
    """
    if (old.root is None) != (new.root is None):
        raise KlarfError(f"expected two files of one grammar, found {old.version} and {new.version}: convert one first")
    if old.version != new.version:
        yield Difference("file", "version", old.version, new.version)
    if old.is_complete != new.is_complete:
        yield Difference("file", "EndOfFile", *("yes" if one.is_complete else None for one in (old, new)))
    old_lots, new_lots = _by_id(old.lots), _by_id(new.lots)
    for key in dict.fromkeys([*old_lots, *new_lots]):
        yield from _lots(f"lot {_named(key)}", old_lots.get(key), new_lots.get(key))


def _lots(where: str, old: Lot | None, new: Lot | None) -> Iterator[Difference]:
    if old is None or new is None:
        yield _whole(where, old, new)
        return
    if (
        not old.wafers or old.scope.own is not old.wafers[0].scope.own
    ):  # the flat versions give a lot no fields of its own
        yield from _scopes(where, old.scope, new.scope)
    for number in dict.fromkeys([*old.classes, *new.classes]):
        a, b = old.classes.get(number), new.classes.get(number)
        if a != b:
            yield Difference(where, f"class {number}", *(None if one is None else one.name for one in (a, b)))
    old_wafers, new_wafers = _by_id(old.wafers), _by_id(new.wafers)
    for key in dict.fromkeys([*old_wafers, *new_wafers]):
        yield from _wafers(f"{where}, wafer {_named(key)}", old_wafers.get(key), new_wafers.get(key))


def _wafers(where: str, old: Wafer | None, new: Wafer | None) -> Iterator[Difference]:
    if old is None or new is None:
        yield _whole(where, old, new)
        return
    yield from _scopes(where, old.scope, new.scope)
    columns, new_columns = old.defects.columns, new.defects.columns
    for name in dict.fromkeys([*columns, *new_columns]):
        if (name in columns) != (name in new_columns):
            yield Difference(
                where, f"column {name}", *("there" if name in of else None for of in (columns, new_columns))
            )
    both = [name for name in columns if name in new_columns]
    old_rows, new_rows = rows_by_id(old), rows_by_id(new)
    for key in dict.fromkeys([*old_rows, *new_rows]):
        here = f"{where}, defect {key}"
        if key not in old_rows or key not in new_rows:
            yield _whole(here, old_rows.get(key), new_rows.get(key))
            continue
        yield from _defects(here, old.defects[old_rows[key]], new.defects[new_rows[key]], both)


def _defects(where: str, old: Defect, new: Defect, columns: Sequence[str]) -> Iterator[Difference]:
    for name in columns:
        if _value(old, name) != _value(new, name):
            yield Difference(where, name, old.text(name), new.text(name))
    if [image.file for image in old.images] != [image.file for image in new.images]:
        yield Difference(where, "image files", *(" ".join(str(i.file) for i in one.images) for one in (old, new)))


def _value(defect: Defect, name: str) -> Value:
    index = defect.table.index(name)
    span = defect.span(name)
    if index is not None and index == defect.table.columns.images and span is not None:
        words = defect.table.source.nested_words(span)
        return " ".join(defect.table.source.text(word) for word in words)
    return None if span is None else defect.table.source.value(span)


def _scopes(where: str, old: Scope, new: Scope) -> Iterator[Difference]:
    for name in dict.fromkeys([*old.own, *new.own]):
        if name in ("CLASSLOOKUP", "DEFECTRECORDSPEC", "LOTID", "WAFERID", "FILEVERSION", "TIFFFILENAME", "ENDOFFILE"):
            continue  # compared as what they mean
        shown, values = [], []
        for scope in (old, new):
            entries = scope.own.get(name, ())
            words = [word for entry in entries for word in scope.spans(entry)]
            values.append([scope.source.value(word) for word in words])
            shown.append(" ".join(scope.source.text(word) for word in words) if entries else None)
        if values[0] != values[1] or (shown[0] is None) != (shown[1] is None):
            label = (old.own.get(name) or new.own[name])[0].name
            yield Difference(where, label, *shown)


def _whole(where: str, old: object, new: object) -> Difference:
    return Difference(where, "", *(None if one is None else "there" for one in (old, new)))


def _by_id(items: Sequence[T]) -> dict[tuple[str | None, int], T]:
    """Items by id; a second one of the same id is the second of that id."""
    found: dict[tuple[str | None, int], T] = {}
    n_of_id: Counter[str | None] = Counter()
    for item in items:
        n_of_id[item.id] += 1
        found[item.id, n_of_id[item.id]] = item
    return found


def _named(key: tuple[str | None, int]) -> str:
    name, n = key
    return (name or "without id") + (f" ({n})" if n > 1 else "")
