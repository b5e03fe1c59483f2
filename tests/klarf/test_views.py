"""What a file means: wafers, dies, defects, classes, images, places with their units."""

from pathlib import PurePosixPath

import pytest

from klarf_files import FLAT, NESTED
from semwatch import klarf
from semwatch.klarf.source import as_value
from semwatch.klarf.views import Image, Orientation, Point


@pytest.mark.parametrize("text", [FLAT, NESTED], ids=["1.1", "1.8"])
def test_both_grammars_mean_the_same_in_um(text: str) -> None:
    (lot,) = klarf.parse(text.encode()).lots
    wafer = lot.wafers[0]
    assert (lot.id, lot.step_id, lot.recipe_id) == ("lot 7", "M1", "recipe")
    assert (wafer.id, wafer.slot, wafer.diameter_um) == ("w1", 3, 300_000)
    assert wafer.die_pitch == (10_000, 20_000)
    assert wafer.orientation == Orientation("NOTCH", 90, False)
    (inspection,) = wafer.inspections
    assert (inspection.number, inspection.area_um2) == (2, 2.5e10)
    assert [(die.x_index, die.y_index, die.origin) for die in wafer.dies] == [
        (0, 0, (-5_000, 500)),
        (-2, 1, (-25_000, 20_500)),
    ]
    defect = wafer.defects.by_id(7)
    assert defect.in_die == (100.5, 200)
    assert defect.on_wafer == (-24_899.5, 20_700)
    assert wafer.orientation.turned_down(defect.on_wafer) == (-20_700, -24_899.5)
    assert (defect.area_um2, defect.diameter_um, defect.class_number) == (2.25, 1.25, 39)
    assert lot.classes[39].name == "SEM_ANALYSIS"


@pytest.mark.parametrize(
    ("degrees", "at_the_mark"), [(0, (0, -1)), (90, (-1, 0)), (180, (0, 1)), (270, (1, 0))], ids=str
)
def test_mark_is_at_the_bottom_once_the_wafer_is_turned(degrees: int, at_the_mark: tuple[float, float]) -> None:
    assert Orientation("NOTCH", degrees, False).turned_down(Point(*at_the_mark)) == (0, -1)


def test_second_wafer_of_a_flat_file_takes_over_what_is_not_given_anew() -> None:
    first, second = klarf.parse(FLAT.encode()).wafers
    assert (first.id, second.id, second.slot) == ("w1", "w2", 4)
    assert first.die_origin == (0, 0)
    assert second.die_origin == (1, 2)  # given before its WaferID, as some tools do
    assert second.die_pitch == first.die_pitch
    assert second.defects.by_id(7)["FINEBINNUMBER"] == 1


def test_na_and_columns_that_are_not_there() -> None:
    (defect,) = klarf.parse(FLAT.encode()).wafers[0].defects
    assert defect["FINEBINNUMBER"] is None
    assert defect.integer("FINEBINNUMBER") is None
    assert defect.text("finebinnumber") == "NA"
    assert defect.integer("ROUGHBINNUMBER") is None
    with pytest.raises(KeyError):
        _ = defect["ROUGHBINNUMBER"]
    with pytest.raises(klarf.KlarfError, match="expected one of the columns DEFECTID, XREL"):
        klarf.parse(FLAT.encode()).wafers[0].defects.column("ROUGHBINNUMBER")


def test_half_an_entry_of_images_is_refused_with_its_place() -> None:
    """Found by damage at random: a brace within a word parts it in two."""
    text = """FileVersion 1 2;
LotID "l";
WaferID "w";
DefectRecordSpec 3 DEFECTID IMAGECOUNT IMAGELIST;
DefectList
 1 1 }0 30;
EndOfFile;
"""
    (defect,) = klarf.parse(text.encode()).wafers[0].defects
    with pytest.raises(klarf.KlarfError, match=r"line 6, column 6: .*a number and a kind of each image"):
        _ = defect.images


def test_images_of_a_multi_page_file_and_of_a_file_of_their_own() -> None:
    (wafer,) = klarf.parse(NESTED.encode()).wafers
    test, reference = wafer.defects[0].images
    assert [(image.file, image.page, image.kind) for image in (test, reference)] == [
        ("LOT_1.I01", 0, "30"),
        ("LOT_1.I01", 1, "31"),
    ]
    (image,) = wafer.defects[1].images
    assert (image.path, image.page, image.kind) == (PurePosixPath("deep/a.jpg"), 0, "Patch")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../a.tif",
        "a/../../b.tif",
        "..\\a.tif",
        "C:\\a.tif",
        "C:a.tif",
        "\\\\host\\share\\a.tif",
        "\\a.tif",
        "",
        "a\0.tif",
        "a.tif:stream",
    ],
)
def test_image_name_that_leads_out_of_the_folder_is_refused(name: str) -> None:
    with pytest.raises(klarf.KlarfError, match="below the folder"):
        _ = Image(name, 1, "0").path


def test_orientation_that_is_given_twice_is_refused_with_both_places() -> None:
    text = FLAT.replace("DieOrigin 0 0;", "OrientationMarkLocation UP;")
    (first, _) = klarf.parse(text.encode()).wafers
    with pytest.raises(klarf.KlarfError, match=r"line 9, column 1: .* once; it stands at line 7, column 1 too"):
        _ = first.orientation
    same = FLAT.replace("DieOrigin 0 0;", "OrientationMarkLocation LEFT;")
    assert klarf.parse(same.encode()).wafers[0].orientation.degrees == 90
    odd = FLAT.replace("LEFT", "SIDEWAYS")
    with pytest.raises(klarf.KlarfError, match="DOWN, LEFT, UP, RIGHT"):
        _ = klarf.parse(odd.encode()).wafers[0].orientation


def test_id_that_stands_twice_is_refused_with_both_places() -> None:
    text = FLAT.replace(" 7 0 0 0", " 7 0 0 0 0 1 1 1 0 1\n 7 0 0 0")
    wafer = klarf.parse(text.encode()).wafers[1]
    with pytest.raises(klarf.KlarfError, match=r"line 32, column 2: .* 7 stands at line 31, column 2 too"):
        wafer.defects.by_id(7)


def test_text_of_a_file_is_never_run() -> None:
    text = FLAT.replace('"M1"', "\"__import__('os').abort()\"")
    assert klarf.parse(text.encode()).lots[0].step_id == "__import__('os').abort()"


def test_words_that_are_no_finite_number() -> None:
    assert [as_value(word, "utf-8") for word in (b"NA", b"nan", b"-inf", b"1.#QNAN", b"1e999")] == [None] * 5
    assert as_value(b"9" * 101, "utf-8") == "9" * 101
    assert [as_value(word, "utf-8") for word in (b".5", b"5.", b"+1", b"1e", b"0x10")] == [0.5, 5.0, 1, "1e", "0x10"]
