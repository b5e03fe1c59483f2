"""What can be read and is still wrong, or looks so: each with its place. What cannot be read is refused before."""

from collections.abc import Iterator
from contextlib import suppress
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
    """Look at everything that the views show; the first ``MAX_PROBLEMS`` problems, each once."""
    return list(islice(_once(_problems(document)), MAX_PROBLEMS))


def _once(problems: Iterator[Problem]) -> Iterator[Problem]:
    """Each problem once: what is wrong with a wafer shows at every defect of it."""
    seen: set[Problem] = set()
    for problem in problems:
        if problem not in seen:
            seen.add(problem)
            yield problem


def _problems(document: Document) -> Iterator[Problem]:
    if not document.is_complete:
        place = document.source.place(len(document.source.data))
        yield Problem("error", place, "expected EndOfFile at the end: the file may not be whole")
    if document.root is not None:
        yield from _field_counts(document, document.root)
    if not document.wafers:
        yield Problem("warning", None, "expected a wafer, found none")
    for lot in document.lots:
        yield from _looked_at(lot, "step_id", "device_id", "recipe_id", "inspected")
        for wafer in lot.wafers:
            yield from _of_wafer(document, lot, wafer)


def _of_wafer(document: Document, lot: Lot, wafer: Wafer) -> Iterator[Problem]:
    yield from _looked_at(wafer, "slot", "die_pitch", "center", "die_origin", "diameter_um", "orientation")
    try:
        rows_by_id(wafer)
    except KlarfError as error:
        yield Problem("error", error.place, error.reason)
    unknown: dict[int, list[Defect]] = {}
    for defect in wafer.defects:
        yield from _looked_at(defect, "class_number", "on_wafer", "size", "diameter_um", "area_um2")
        yield from _of_images(document, defect)
        with suppress(KlarfError):
            number = defect.class_number
            if number is not None and wafer.classes and number not in wafer.classes:
                unknown.setdefault(number, []).append(defect)
    for number, defects in unknown.items():
        text = f"class {number} is not in the lookup table of lot {lot.id}; so for {len(defects)} defects"
        yield Problem("warning", _place(document, defects[0], "CLASSNUMBER"), text)


def _of_images(document: Document, defect: Defect) -> Iterator[Problem]:
    column = defect.table.columns.images
    if column is None:
        return
    name = defect.table.columns.all[column].name
    try:
        images = defect.images
        stated = defect.integer("IMAGECOUNT")
    except KlarfError as error:
        yield Problem("error", error.place, error.reason)
        return
    if stated is not None and stated != len(images):
        text = f"expected {stated} images, as IMAGECOUNT says, found {len(images)}"
        yield Problem("error", _place(document, defect, name), text)
    if any(image.file is None for image in images):
        text = "no TiffFileName or ImageFileName says which file the images are in"
        yield Problem("warning", _place(document, defect, name), text)
    for image in images:
        try:
            _ = image.page, image.file is None or image.path
        except KlarfError as error:
            yield Problem("error", _place(document, defect, name), error.reason)


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


def _looked_at(view: Lot | Wafer | Defect, *names: str) -> Iterator[Problem]:
    """What the attributes of a view raise."""
    for name in names:
        try:
            getattr(view, name)
        except KlarfError as error:
            yield Problem("error", error.place, error.reason)


def _place(document: Document, defect: Defect, column: str) -> Place:
    span = defect.span(column)
    return document.source.place(defect.table.starts[defect.row] if span is None else span.start)
