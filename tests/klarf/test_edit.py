"""An edit changes what it names and not one byte more; what cannot be told apart is not edited."""

import random

import pytest

from klarf_files import FLAT, NESTED, make
from semwatch import klarf
from semwatch.klarf.views import Wafer


def cells(wafer: Wafer, without: str = "") -> list[list[str | None]]:
    names = [name for name in wafer.defects.columns if name != without]
    return [[defect.text(name) for name in names] for defect in wafer.defects]


@pytest.mark.parametrize("seed", range(40))
def test_edit_of_one_column_touches_nothing_else(seed: int) -> None:
    document = klarf.parse(make(seed).data)
    rng = random.Random(seed)
    for i, wafer in enumerate(document.wafers):
        ids = wafer.defects.column("DEFECTID")
        values = {one: rng.randrange(-5, 10**6) for one in ids if rng.random() < 0.5}
        edited = klarf.set_column(document, wafer, "ClassNumber", values)
        # Outside of the cells that were named, the bytes are those of the file.
        before, after = document.source.data, edited.source.data
        at = shift = 0
        for defect in wafer.defects:
            span = defect.span("CLASSNUMBER")
            assert span is not None
            assert before[at : span.start] == after[at + shift : span.start + shift]
            new = str(values[defect.id]).encode() if defect.id in values else before[span.start : span.end]
            assert after[span.start + shift :].startswith(new)
            shift += len(new) - (span.end - span.start)
            at = span.end
        assert before[at:] == after[at + shift :]
        read = {defect.id: defect.class_number for defect in edited.wafers[i].defects}
        assert read == {defect.id: values.get(defect.id, defect.class_number) for defect in wafer.defects}


@pytest.mark.parametrize("seed", range(40))
def test_column_is_added_and_everything_else_is_read_as_before(seed: int) -> None:
    document = klarf.parse(make(seed).data)
    for i, wafer in enumerate(document.wafers):
        if not wafer.tables:
            continue
        ids = wafer.defects.column("DEFECTID")
        values = {one: n for n, one in enumerate(ids[1:]) if isinstance(one, int)}
        edited = klarf.add_column(document, wafer, "NEWCLASS", values, default=-1)
        for old, new in zip(document.wafers, edited.wafers, strict=True):
            assert cells(new, without="NEWCLASS") == cells(old)
            assert [defect.images for defect in new.defects] == [defect.images for defect in old.defects]
        new = edited.wafers[i]
        assert new.defects.column("NEWCLASS") == [values.get(one, -1) for one in ids]
        assert edited.is_complete == document.is_complete


@pytest.mark.parametrize("seed", range(20))
def test_classes_are_added_behind_those_that_are_there(seed: int) -> None:
    made = make(seed)
    document = klarf.parse(made.data)
    known = document.lots[0].classes
    new = {500: "novel; 1", 501: "scratch"}
    edited = klarf.add_classes(document, document.lots[0], {**{n: one.name for n, one in known.items()}, **new})
    names = {number: one.name for number, one in edited.lots[0].classes.items()}
    assert names == {**made.classes, **new}
    assert [cells(wafer) for wafer in edited.wafers] == [cells(wafer) for wafer in document.wafers]
    assert bytes(klarf.add_classes(edited, edited.lots[0], new)) == bytes(edited)


@pytest.mark.parametrize("text", [FLAT, NESTED], ids=["1.1", "1.8"])
def test_lookup_table_is_made_where_there_is_none(text: str) -> None:
    lines = text.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "ClassLookup" in line)
    n = 3 if text is FLAT else 4
    document = klarf.parse("".join(lines[:at] + lines[at + n :]).encode())
    assert not document.lots[0].classes
    edited = klarf.add_classes(document, document.lots[0], {7: "x"})
    assert [(one.number, one.name) for one in edited.lots[0].classes.values()] == [(7, "x")]


@pytest.mark.parametrize("text", [FLAT, NESTED], ids=["1.1", "1.8"])
def test_partial_form_names_lot_and_wafer_and_holds_one_column(text: str) -> None:
    document = klarf.parse(text.encode())
    made = klarf.partial(document, document.wafers[0], "AUTOOFFSEMCLASS", {7: 39})
    (lot,) = made.lots
    (wafer,) = lot.wafers
    assert (lot.id, lot.step_id, wafer.id, wafer.slot) == ("lot 7", "M1", "w1", 3)
    assert wafer.defects.columns == ("DEFECTID", "AUTOOFFSEMCLASS")
    assert [(defect.id, defect["AUTOOFFSEMCLASS"]) for defect in wafer.defects] == [(7, 39)]
    assert made.version == document.version
    assert made.is_complete
    empty = klarf.partial(document, document.wafers[0], "AUTOOFFSEMCLASS", {})
    assert len(empty.wafers[0].defects) == 0


def test_second_wafer_has_a_partial_form_of_its_own() -> None:
    document = klarf.parse(FLAT.encode())
    made = klarf.partial(document, document.wafers[1], "BIN", {7: 1})
    assert [(wafer.id, wafer.slot) for wafer in made.wafers] == [("w2", 4)]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("NOSUCH", {7: 1}, "line 22, column 1: expected a column NOSUCH in DefectList, which has DEFECTID, XREL"),
        ("CLASSNUMBER", {8: 1}, "wafer w1 has no defect 8"),
        ("DEFECTID", {7: 1}, "cannot be set"),
        ("CLASSNUMBER", {7: "x"}, "expected a value for column CLASSNUMBER, found 'x'"),
        ("CLASSNUMBER", {7: True}, "found True"),
        ("CLASSNUMBER", {7: float("nan")}, "found nan"),
        ("FINEBINNUMBER", {7: 'a"b'}, "without quotes and line ends"),
        ("FINEBINNUMBER", {7: "a\nb"}, "without quotes and line ends"),
    ],
)
def test_edit_that_cannot_be_made_is_refused(column: str, values: dict[int, object], message: str) -> None:
    document = klarf.parse(FLAT.encode())
    with pytest.raises(klarf.KlarfError, match=message):
        klarf.set_column(document, document.wafers[0], column, values)  # type: ignore[arg-type]


def test_edit_is_of_a_wafer_of_this_document() -> None:
    one, other = klarf.parse(FLAT.encode()), klarf.parse(FLAT.encode())
    with pytest.raises(klarf.KlarfError, match="a wafer of this document"):
        klarf.set_column(one, other.wafers[0], "CLASSNUMBER", {7: 1})


def test_integer_column_of_1_8_takes_no_fraction_and_a_text_keeps_the_encoding() -> None:
    document = klarf.parse(NESTED.encode())
    with pytest.raises(klarf.KlarfError, match=r"for column CLASSNUMBER of type int32, found 1\.5"):
        klarf.set_column(document, document.wafers[0], "CLASSNUMBER", {7: 1.5})
    edited = klarf.set_column(document, document.wafers[0], "DEFECTAREA", {7: 1.5, 8: None})
    assert edited.wafers[0].defects.column("DEFECTAREA") == [1.5, None]
    latin = klarf.parse(FLAT.replace("SEM_ANALYSIS", "Größe").encode("latin-1"))
    edited = klarf.add_classes(latin, latin.lots[0], {5: "Übel"})
    assert '"Größe"'.encode("latin-1") in bytes(edited)
    assert '"Übel"'.encode("latin-1") in bytes(edited)
    with pytest.raises(klarf.KlarfError, match="a text that latin-1 can hold"):
        klarf.add_classes(latin, latin.lots[0], {5: "日"})


def test_class_that_has_another_name_already_is_not_renamed() -> None:
    document = klarf.parse(FLAT.encode())
    with pytest.raises(klarf.KlarfError, match="class 39 is 'SEM_ANALYSIS' in the table already"):
        klarf.add_classes(document, document.lots[0], {39: "x"})


def test_id_that_stands_twice_is_not_edited() -> None:
    text = FLAT.replace(" 7 0 0 0", " 7 0 0 0 0 1 1 1 0 1\n 7 0 0 0")
    document = klarf.parse(text.encode())
    with pytest.raises(klarf.KlarfError, match="7 stands at line 31"):
        klarf.set_column(document, document.wafers[1], "CLASSNUMBER", {7: 1})
