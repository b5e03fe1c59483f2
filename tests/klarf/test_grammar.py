"""What cannot be read without doubt is refused, with line, column and what was expected."""

import pytest

from semwatch import klarf

FLAT = b"""FileVersion 1 2;
LotID "a";
WaferID "w";
DefectRecordSpec 4 DEFECTID XREL IMAGECOUNT IMAGELIST ;
DefectList
 1 2.5 1 1 450 0
 2 5.5E3 2 2 1 0
2 1;
EndOfFile;
"""
NESTED = b"""Record FileRecord "1.8" {
 Record LotRecord "a" {
  Record WaferRecord "w" {
   List DefectList {
    Columns 3 { int32 DEFECTID, float PHI, ImageList IMAGEINFO }
    Data 2 {
     1 0.5 N;
     2 NA Images 2 { 1 "30", 2 "31" };
    }
   }
  }
 }
}
EndOfFile;
"""


def test_the_files_that_are_damaged_below_can_be_read() -> None:
    assert [len(defect.images) for defect in klarf.parse(FLAT).wafers[0].defects] == [1, 2]
    assert [len(defect.images) for defect in klarf.parse(NESTED).wafers[0].defects] == [0, 2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"FileVersion 1 2", b"FileVersion 1 7", "line 1, column 12: expected the version 1 1 or 1 2"),
        (b"FileVersion 1 2", b"Fileversions 12", "line 1, column 1: expected FileVersion 1 1, .* as the first words"),
        (b'"a";', b'"a"', "line 3, column 1: expected a semicolon that ends LotID, found 'WaferID'"),
        (b'"a";', b'"a;', "line 2, column 7: expected a closing quote on the same line"),
        (b"EndOfFile;", b"EndOfFile", "line 10, column 1: expected a semicolon that ends EndOfFile"),
        (b"EndOfFile;", b"EndOfFile;\nLotID;", "line 10, column 1: expected nothing after EndOfFile, found 'LotID'"),
        (b"EndOfFile", b"}", "line 9, column 1: expected a keyword, found '}'"),
        (b"DefectRecordSpec 4", b"DefectRecordSpec 5", "line 4, column 18: expected 5 column names, found 4"),
        (b"DefectRecordSpec 4", b"DefectRecordSpec x", "line 4, column 17: expected the number of columns"),
        (b"XREL", b"DEFECTID", "line 4, column 29: expected each column once"),
        (b"DefectRecordSpec", b"DefectRecordSpeck", "line 5, column 1: expected a DefectRecordSpec before DefectList"),
        (b" 2 5.5E3", b" 2.5 5.5E3", "line 7, column 2: expected DEFECTID, a whole number, found '2.5'"),
        (b"5.5E3", b"abc", "line 7, column 4: expected XREL, a number, found 'abc'"),
        (b"2 2 1 0", b"2 1 1 0", "line 7, column 12: expected 2 images, as IMAGECOUNT says, found '1'"),
        (b"450 0", b"450 0 7", "line 6, column 18: expected a new line or a semicolon after the 4 values"),
        (b"\n2 1;", b";", "line 7, column 14: expected 2 pairs of image number and type, found '1'"),
        (b"1 1 450 0\n", b"99999 99999 450 0\n", "line 6, column 14: expected the number of images, 0 to 10000"),
    ],
)
def test_damaged_flat_file_is_refused_with_its_place(old: bytes, new: bytes, message: str) -> None:
    assert FLAT.count(old) == 1
    with pytest.raises(klarf.KlarfError, match=message):
        klarf.parse(FLAT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"1.8"', b'"1.9"', 'line 1, column 18: expected the version "1.8", found \'"1.9"\''),
        (b"EndOfFile;", b"", None),
        (b"EndOfFile;", b"x", "line 14, column 1: expected EndOfFile, found 'x'"),
        (b" }\n}\n", b" }\n", "line 13, column 1: expected Record, Field, List or the closing brace of FileRecord"),
        (b"Record WaferRecord", b"Fiel WaferRecord", "line 3, column 3: expected Record, Field, List or the closing"),
        (b"Columns 3", b"Columns 2", "line 5, column 13: expected 3 as the number of columns, for so many follow"),
        (b"Data 2", b"Data 3", "line 6, column 10: expected 2 as the number of rows, for so many follow"),
        (b"Data 2", b"Data 10000000", "line 6, column 10: expected the number of rows, at most 2000000"),
        (b"0.5 N", b"x N", "line 7, column 8: expected PHI of type float in DefectList, found 'x'"),
        (b"0.5 N", b"0.5 N 3", "line 7, column 14: expected a semicolon after the 3 values of a row of DefectList"),
        (b"     1 0.5 N", b"     1", "line 7, column 7: expected 3 values in a row of DefectList, found 1"),
        (b'"31" }', b'"31"', "line 8, column 11: expected a semicolon after the 3 values"),
        (b"float PHI", b"float DEFECTID", "line 5, column 39: expected each column once"),
        (b"WaferRecord", b"WaterRecord", "line 4, column 4: expected DefectList inside a WaferRecord"),
    ],
)
def test_damaged_nested_file_is_refused_with_its_place(old: bytes, new: bytes, message: str | None) -> None:
    assert NESTED.count(old) == 1
    if message is None:
        assert not klarf.parse(NESTED.replace(old, new)).is_complete
        return
    with pytest.raises(klarf.KlarfError, match=message):
        klarf.parse(NESTED.replace(old, new))


def test_utf_16_and_an_empty_file_are_refused() -> None:
    with pytest.raises(klarf.KlarfError, match="found UTF-16"):
        klarf.parse(FLAT.decode().encode("utf-16"))
    with pytest.raises(klarf.KlarfError, match=r"line 1, column 1: .*found the end of the file"):
        klarf.parse(b"")


def test_more_defects_than_the_limit_are_refused_before_they_fill_the_memory(tmp_path) -> None:
    with pytest.raises(klarf.KlarfError, match="line 7, column 2: expected at most 1 more defects here"):
        klarf.parse(FLAT, max_defects=1)
    with pytest.raises(klarf.KlarfError, match="at most 1"):
        klarf.parse(NESTED, max_defects=1)
    path = tmp_path / "a.klarf"
    path.write_bytes(FLAT)
    with pytest.raises(klarf.KlarfError, match="larger than 100 bytes"):
        klarf.read(path, max_bytes=100)


def test_a_mark_of_byte_order_is_no_column() -> None:
    with pytest.raises(klarf.KlarfError, match="line 1, column 12: expected the version"):
        klarf.parse(b"\xef\xbb\xbf" + FLAT.replace(b"1 2;", b"1 7;", 1))


def test_records_in_each_other_are_bounded_in_depth() -> None:
    deep = b'Record FileRecord "1.8" {' + b"Record R {" * 5000 + b"}" * 5001
    with pytest.raises(klarf.KlarfError, match="at most 32 records in each other"):
        klarf.parse(deep)


@pytest.mark.parametrize(
    "text",
    [
        b'FileVersion 1 2;\nA "' + b'"' * 200_000,
        b"FileVersion 1 2;\nA" + b" \n" * 200_000,
        b"FileVersion 1 2;\n" + b"A;\n" * 50_000 + b"!",
        b"FileVersion 1 2;\nDefectRecordSpec 2 DEFECTID IMAGELIST;\nDefectList\n" + b"1 0\n" * 100_000 + b"1 x;",
        b"FileVersion 1 2;\nDefectRecordSpec 2 DEFECTID A;\nDefectList\n" + b"1 0\n" * 50_000,
        b'Record FileRecord "1.8" {' + b"Field A 1 {" + b"1," * 50_000,
        b'Record FileRecord "1.8" {List A {Columns 1 {ImageList B} Data 1 {' + b"Images 1 {" * 50_000,
        b"FileVersion 1 2;\n" + b'WaferID "a";DefectList;' * 20_000,
    ],
)
def test_no_text_takes_more_time_than_its_length_allows(text: bytes) -> None:
    """A parser that goes back takes the square of it: hours here, and every test has a timeout of minutes."""
    with pytest.raises(klarf.KlarfError):
        klarf.parse(text)
