"""A file that is read and not edited is written back byte for byte, and what was read is what was written."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klarf_files import Made, make
from paths import DATA
from semwatch import klarf
from semwatch.klarf.check import check

FOLDER = DATA / "KLARF"
FILES = sorted([*FOLDER.glob("*.klarf"), *FOLDER.glob("*.001"), *FOLDER.glob("generated/*.klarf")])
WELL_FORMED = [path for path in FILES if not path.name.startswith("bad")]
N_DEFECTS = {
    "CPS3TwithoutReview.001": [16],
    "LOT001_WAFER01_GATE.klarf": [5],
    "LOT002_WAFER03_VIA1.klarf": [20],
    "LOT005_WAFER01_STI.klarf": [3],
    "klarf12DefectListExample.klarf": [13],
    "klarf12Example.klarf": [2],
    "klarfWithImagelist.klarf": [6],
    "simple12.klarf": [1],
    "simple18.klarf": [3, 1],
    "wierdKlarfWithNAs.klarf": [3, 1],
}
needs_data = pytest.mark.skipif(not FILES, reason="needs the public KLARF files")
without_limits = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=150
)


def assert_read_as_made(made: Made) -> None:
    document = klarf.parse(made.data)
    assert bytes(document) == made.data
    assert (document.version, document.is_complete) == (made.version, made.is_complete)
    wafers = {(lot.id, wafer.id): wafer for lot in document.lots for wafer in lot.wafers}
    assert wafers.keys() == made.wafers.keys()
    for key, wafer in wafers.items():
        assert wafer.slot == made.slots[key]
        assert wafer.orientation.degrees == made.degrees
        assert {number: one.name for number, one in wafer.classes.items()} == made.classes
        assert wafer.defects.column("DEFECTID") == [defect.id for defect in made.wafers[key]]
        for defect, meant in zip(wafer.defects, made.wafers[key], strict=True):
            assert tuple((image.file, image.number, image.kind) for image in defect.images) == meant.images
            assert (defect.integer("XINDEX"), defect.integer("YINDEX")) == meant.index
            assert defect.class_number == meant.class_number
            assert defect.in_die == pytest.approx((meant.x_um, meant.y_um), abs=1e-6)
    assert [one.text for one in check(document) if one.level == "error" and made.is_complete] == []


@without_limits
@given(seed=st.integers(0, 2**48))
def test_generated_file_is_read_as_it_was_made_and_written_back_byte_for_byte(seed: int) -> None:
    assert_read_as_made(make(seed))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(without_limits, max_examples=2_000)
@given(seed=st.integers(0, 2**48))
def test_two_thousand_generated_files_are_read_as_they_were_made(seed: int) -> None:
    assert_read_as_made(make(seed))


def test_generated_files_have_the_quirks_of_real_ones() -> None:
    made = [make(seed) for seed in range(120)]
    assert {one.version for one in made} == {"1.1", "1.2", "1.8"}
    assert {klarf.parse(one.data).source.encoding for one in made} == {"utf-8", "latin-1"}
    for quirk in (b"\xef\xbb\xbf", b"\r\n", b"TiffFilename", b"DefectList;", b"NA", b"\n;", b".I01", b" N", b"e+00"):
        assert sum(quirk in one.data for one in made) > 2, quirk
    assert any(len(one.wafers) > 1 and one.version != "1.8" for one in made)
    assert any(not one.is_complete for one in made)


@needs_data
def test_every_public_file_has_its_count() -> None:
    assert {path.name for path in WELL_FORMED} == N_DEFECTS.keys()


@needs_data
@pytest.mark.parametrize("path", WELL_FORMED, ids=lambda path: path.name)
def test_public_file_is_read_and_written_back_byte_for_byte(path) -> None:
    document = klarf.read(path)
    assert bytes(document) == path.read_bytes()
    assert [len(wafer.defects) for wafer in document.wafers] == N_DEFECTS[path.name]
    assert [one for one in check(document) if one.level == "error"] == []


@needs_data
@pytest.mark.parametrize(
    ("name", "line", "text"),
    [("bad12.klarf", 36, "a DefectList of wafer anotherWafer"), ("bad12DefectList.klarf", 29, "17 values")],
)
def test_malformed_public_file_is_refused_with_its_place(name: str, line: int, text: str) -> None:
    with pytest.raises(klarf.KlarfError, match=text) as refused:
        klarf.read(FOLDER / name)
    assert refused.value.place is not None
    assert refused.value.place.line == line


@needs_data
def test_multi_page_images_and_a_file_per_defect_of_a_public_file() -> None:
    (wafer,) = klarf.read(FOLDER / "klarf12DefectListExample.klarf").wafers
    files = {defect.id: [(image.file, image.page) for image in defect.images] for defect in wafer.defects}
    assert files[1] == [("A_1.jpg", 0)]
    assert files[4] == [("A2.jpg", 0)]
    assert files[2] == []
    assert files[12] == [("multi-image.tif", page) for page in range(7, 14)]


@needs_data
def test_place_on_the_wafer_is_that_of_the_inspection_tool() -> None:
    # This file gives GDS coordinates, too: from defect to defect on one die both differ by the same length.
    (wafer,) = klarf.read(FOLDER / "klarfWithImagelist.klarf").wafers
    a, b = wafer.defects[4], wafer.defects[5]
    assert a.die == b.die
    assert a.on_wafer is not None
    assert b.on_wafer is not None
    gds = (b.number("GDSX") or 0) - (a.number("GDSX") or 0)
    assert b.on_wafer.x_um - a.on_wafer.x_um == pytest.approx(gds / 1000, abs=0.01)
