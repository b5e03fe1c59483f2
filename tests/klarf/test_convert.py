"""From one grammar to the other and back: what both can hold comes back, and what one cannot is listed."""

import pytest

from klarf_files import FLAT, NESTED, make
from semwatch import klarf
from semwatch.klarf import Document
from semwatch.klarf.convert import convert
from semwatch.klarf.diff import diff


def meaning(document: Document) -> list[object]:
    """All that both grammars can hold, lengths to whole nm."""
    return [
        (
            lot.id,
            lot.step_id,
            lot.recipe_id,
            {number: one.name for number, one in wafer.classes.items()},
            (wafer.id, wafer.slot, wafer.die_pitch, wafer.center, wafer.diameter_um, wafer.orientation),
            [(one.number, one.dies, one.area_um2) for one in wafer.inspections if one.dies],
            [
                (
                    defect.id,
                    defect.class_number,
                    defect.die,
                    defect.in_die and [round(1000 * length) for length in defect.in_die],
                    [image.number for image in defect.images if image.file == defect.images[0].file],
                )
                for defect in wafer.defects
            ],
        )
        for lot in document.lots
        for wafer in lot.wafers
    ]


@pytest.mark.parametrize("seed", range(60))
def test_there_and_back_means_the_same(seed: int) -> None:
    document = klarf.parse(make(seed).data)
    version = "1.8" if document.root is None else "1.2"
    there, _ = convert(document, version)
    back, _ = convert(there, "1.2" if version == "1.8" else "1.8")
    assert there.version == version
    assert there.is_complete == document.is_complete
    assert meaning(there) == meaning(document)
    assert meaning(back) == meaning(document)
    assert there.source.newline == document.source.newline
    again, notes = convert(back, version)
    assert meaning(again) == meaning(document)
    assert [one for one in notes if one.kind == "rounded"] == []


def test_what_a_flat_file_cannot_carry_is_listed() -> None:
    text = FLAT.replace("100.5 200", "100.5004 200").replace("Slot 3;", "Slot 3;\nTiffSpec 6.0 G R;\nOdd 1 x;")
    made, notes = convert(klarf.parse(text.encode()), "1.8")
    assert [(one.kind, one.place and one.place.line, one.text) for one in notes] == [
        ("lost", 16, "TiffSpec: 1.8 names a format with each image"),
        ("own name", 17, "Odd becomes a field of that name"),
        ("rounded", 25, "1 values of XREL to whole nm, by 0.4 nm at most"),
    ]
    assert made.wafers[0].scope.words("Odd") == ("1", "x")
    assert b"Field SampleSize 2 {300000000, 0}" in bytes(made)
    assert b"\n        List DefectList\n" in bytes(made).replace(b"      List", b"        List")


def test_what_1_8_alone_can_hold_is_listed() -> None:
    text = NESTED.replace('"Patch" }', '"Patch", "b.jpg" "JPG" 1 "0" }').replace("Image 1", "Images 2")
    text = text.replace(
        " Field StepID", " Record Odd { Field A 1 {1} List B { Columns 1 {float C} Data 0 {} } }\n Field StepID"
    )
    made, notes = convert(klarf.parse(text.encode()), "1.2")
    assert [(one.kind, one.place and one.place.line, one.text) for one in notes] == [
        ("own name", 14, "1 cells are NA, which no public file of 1.2 has"),
        ("lost", None, "CLASSCODE of the classes of lot lot 7"),
        ("lost", 7, "field A of Odd"),
        ("lost", 7, "list B of Odd"),
        ("lost", None, "types of columns: 1.2 does not state them"),
        ("lost", 19, "1 images that lie in another file than the first of their defect"),
        ("lost", 19, "1 kinds of images that are no numbers: 0 now"),
    ]
    assert [image.file for defect in made.wafers[0].defects for image in defect.images] == [
        "LOT_1.I01",
        "LOT_1.I01",
        "deep\\a.jpg",
    ]


def test_conversion_to_the_same_grammar_and_of_a_number_beyond_all_wafers_is_refused() -> None:
    document = klarf.parse(FLAT.encode())
    with pytest.raises(klarf.KlarfError, match=r"is KLARF 1\.1 already"):
        convert(document, "1.2")
    with pytest.raises(klarf.KlarfError, match=r"expected 1\.2 or 1\.8"):
        convert(document, "2.0")
    far = klarf.parse(FLAT.replace("100.5", "1e999999").encode())
    with pytest.raises(klarf.KlarfError, match="line 23, column 4: expected a number within"):
        convert(far, "1.8")


def test_difference_is_of_meaning_and_not_of_spacing() -> None:
    old = klarf.parse(FLAT.encode())
    spaced = FLAT.replace("\n", "\r\n").replace("1.5 2.25", "1.50   2.25E0").replace("Slot 3", "Slot   3")
    assert list(diff(old, klarf.parse(spaced.encode()))) == []
    new = klarf.set_column(old, old.wafers[0], "CLASSNUMBER", {7: 0})
    new = klarf.add_classes(new, new.lots[0], {5: "x"})
    new = klarf.parse(bytes(new).replace(b'StepID "M1"', b'StepID "M2"').replace(b" 7 0 0 0", b" 9 0 0 0"))
    assert [tuple(one) for one in diff(old, new)] == [
        ("lot lot 7", "class 5", None, "x"),
        ("lot lot 7, wafer w1", "StepID", "M1", "M2"),
        ("lot lot 7, wafer w1, defect 7", "CLASSNUMBER", "39", "0"),
        ("lot lot 7, wafer w2, defect 7", "", "there", None),
        ("lot lot 7, wafer w2, defect 9", "", None, "there"),
    ]
    with pytest.raises(klarf.KlarfError, match=r"found 1\.1 and 1\.8: convert one first"):
        list(diff(old, klarf.parse(NESTED.encode())))


def test_difference_of_a_nested_file() -> None:
    old = klarf.parse(NESTED.encode())
    text = (
        NESTED.replace("{90}", "{180}").replace("NA 1250", "1 1250").replace('"31"', '"32"').replace("EndOfFile;", "")
    )
    assert [tuple(one) for one in diff(old, klarf.parse(text.encode()))] == [
        ("file", "EndOfFile", "yes", None),
        ("lot lot 7", "OrientationMarkLocation", "90", "180"),
        (
            "lot lot 7, wafer w1, defect 7",
            "Images",
            'Images 2 {1 "30",2 "31"}',
            'Images 2 {1 "30",2 "32"}',
        ),
        ("lot lot 7, wafer w1, defect 8", "DEFECTAREA", "NA", "1"),
    ]
