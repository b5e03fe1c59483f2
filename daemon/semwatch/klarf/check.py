"""What can be read and is still wrong, or looks so: each with its place. What cannot be read is refused before."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal, NamedTuple

from semwatch.klarf.document import Document
from semwatch.klarf.errors import KlarfError, Place
from semwatch.klarf.nested import Field, Record
from semwatch.klarf.views import Defect, Lot, Wafer, rows_by_id

MAX_PROBLEMS = 1000


class Problem(NamedTuple):
    """Something that is wrong.

    Attributes:
        level: an error would make a defect be lost or taken for another one; a warning may be the tool's habit.
        place: None for what is of the whole file.
        text: what was expected, and what was found.
    """

    level: Literal["error", "warning"]
    place: Place | None
    text: str


def check(document: Document) -> list[Problem]:
    """Look at everything that the views show; the first ``MAX_PROBLEMS`` problems."""
    return list(islice(_problems(document), MAX_PROBLEMS))


def _problems(document: Document) -> Iterator[Problem]:
    if not document.is_complete:
        place = document.source.place(len(document.source.data))
        yield Problem("error", place, "expected EndOfFile at the end: the file may not be whole")
    if document.root is not None:
        yield from _field_counts(document, document.root)
    if not document.wafers:
        yield Problem("warning", None, "expected a wafer, found none")
    for lot in document.lots:
        yield from _attempted(lambda lot=lot: (lot.id, lot.step_id, lot.device_id, lot.recipe_id, lot.inspected))
        for wafer in lot.wafers:
            yield from _of_wafer(document, lot, wafer)


def _of_wafer(document: Document, lot: Lot, wafer: Wafer) -> Iterator[Problem]:
    for geometry in (
        lambda: wafer.slot,
        lambda: wafer.die_pitch,
        lambda: wafer.center,
        lambda: wafer.die_origin,
        lambda: wafer.diameter_um,
        lambda: wafer.orientation,
    ):
        yield from _attempted(geometry)
    yield from _attempted(lambda: rows_by_id(wafer))
    unknown: dict[int, tuple[int, Place]] = {}
    for defect in wafer.defects:
        yield from _attempted(lambda defect=defect: (defect.on_wafer, defect.size, defect.diameter_um, defect.area_um2))
        yield from _of_images(document, defect)
        try:
            number = defect.class_number
        except KlarfError as error:
            yield Problem("error", error.place, error.reason)
            continue
        if number is not None and wafer.classes and number not in wafer.classes:
            n, place = unknown.get(number, (0, _place(document, defect, "CLASSNUMBER")))
            unknown[number] = n + 1, place
    for number, (n, place) in unknown.items():
        yield Problem(
            "warning", place, f"class {number} is not in the lookup table of lot {lot.id}; so for {n} defects"
        )


def _of_images(document: Document, defect: Defect) -> Iterator[Problem]:
    column = defect.table.columns.images
    if column is None:
        return
    place = _place(document, defect, defect.table.columns.all[column].name)
    try:
        images = defect.images
        stated = defect.integer("IMAGECOUNT")
    except KlarfError as error:
        yield Problem("error", error.place, error.reason)
        return
    if stated is not None and stated != len(images):
        yield Problem("error", place, f"expected {stated} images, as IMAGECOUNT says, found {len(images)}")
    if any(image.file is None for image in images):
        yield Problem("warning", place, "no TiffFileName or ImageFileName says which file the images are in")
    for image in images:
        try:
            _ = image.page, image.file is None or image.path
        except KlarfError as error:
            yield Problem("error", place, error.reason)


def _field_counts(document: Document, record: Record) -> Iterator[Problem]:
    for one in record.fields:
        n = _n_values(document, one)
        if n != one.n_declared:
            text = f"expected {one.n_declared} values of {one.name}, as it says, found {n}"
            yield Problem("error", document.source.place(one.start), text)
    for inner in record.records:
        yield from _field_counts(document, inner)


def _n_values(document: Document, one: Field) -> int:
    return sum(1 for _ in document.source.nested_words(one.body))


def _attempted(look: Callable[[], object]) -> Iterator[Problem]:
    try:
        look()
    except KlarfError as error:
        yield Problem("error", error.place, error.reason)


def _place(document: Document, defect: Defect, column: str) -> Place:
    span = defect.span(column)
    return document.source.place(defect.table.starts[defect.row] if span is None else span.start)
