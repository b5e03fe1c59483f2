"""`semwatch klarf`: show, check, diff, convert."""

from pathlib import Path

import pytest

from commands import Command
from klarf_files import FLAT, NESTED


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    path = tmp_path / "a.001"
    path.write_text(FLAT)
    return path


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    path = tmp_path / "b.klarf"
    path.write_text(NESTED)
    return path


def test_show_names_lot_wafers_and_defects(semwatch: Command, flat: Path, nested: Path) -> None:
    words = semwatch("klarf", "show", flat).words
    assert "KLARF 1.1 lot lot 7: step M1, recipe recipe, 2 classes wafer w1: slot 3, NOTCH at 90 degrees" in words
    assert "7 39 SEM_ANALYSIS -2 1 -24899.500 20700.000" in words
    shown = semwatch("klarf", "show", nested, "-n", 1, "--json").json
    (wafer,) = shown["lots"][0]["wafers"]
    assert (shown["version"], shown["is_complete"], wafer["n_defects"]) == ("1.8", True, 2)
    (defect,) = wafer["defects"]
    assert defect["on_wafer_um"] == [-24899.5, 20700.0]
    assert [(image["file"], image["page"], image["kind"]) for image in defect["images"]] == [
        ("LOT_1.I01", 0, "30"),
        ("LOT_1.I01", 1, "31"),
    ]


def test_check_names_what_cannot_be_read_and_what_is_wrong(semwatch: Command, tmp_path: Path, flat: Path) -> None:
    assert semwatch("klarf", "check", flat).words.strip() == "ok 1 file"
    bad = tmp_path / "bad.001"
    bad.write_text(FLAT.replace("100.5 200", "abc 200"))
    odd = tmp_path / "odd.klarf"
    odd.write_text(NESTED.replace("deep\\a.jpg", "..\\a.jpg").replace("1250 39", "1250 40").replace("EndOfFile;", ""))
    said = semwatch("klarf", "check", bad, odd, flat, "--json")
    assert said.code == 1
    assert not said.json["ok"]
    assert [(Path(row["file"]).name, row["level"], row["line"], row["text"]) for row in said.json["problems"]] == [
        ("bad.001", "error", 23, "expected XREL, a number, found 'abc'"),
        ("odd.klarf", "error", 33, "expected EndOfFile at the end: the file may not be whole"),
        ("odd.klarf", "error", 18, "expected the name of a file below the folder of the KLARF, found '..\\\\a.jpg'"),
        ("odd.klarf", "warning", 17, "class 40 is not in the lookup table of lot lot 7; so for 2 defects"),
    ]
    assert "bad.001:23:4: expected XREL" in semwatch("klarf", "check", bad).out


def test_diff_ends_with_1_where_something_differs(semwatch: Command, tmp_path: Path, flat: Path) -> None:
    assert "byte for byte" in semwatch("klarf", "diff", flat, flat).out
    new = tmp_path / "new.001"
    new.write_text(FLAT.replace(" 39 NA", " 0 NA"))
    said = semwatch("klarf", "diff", flat, new, "--json")
    assert said.code == 1
    assert said.json == [{"where": "lot lot 7, wafer w1, defect 7", "what": "CLASSNUMBER", "old": "39", "new": "0"}]
    new.write_text(FLAT.replace("Slot 3", "Slot  3"))
    said = semwatch("klarf", "diff", flat, new)
    assert said.code == 0
    assert "but for spacing" in said.out


def test_convert_writes_a_new_file_and_never_over_one(semwatch: Command, tmp_path: Path, flat: Path) -> None:
    target = tmp_path / "new.klarf"
    said = semwatch("klarf", "convert", flat, "--to", "1.8", "--out", target, "--json")
    assert said.code == 0
    assert said.json["version"] == "1.8"
    assert semwatch("klarf", "show", target, "--json").json["version"] == "1.8"
    assert flat.read_text() == FLAT
    before = target.read_bytes()
    said = semwatch("klarf", "convert", flat, "--to", "1.8", "--out", target)
    assert said.code == 2
    assert "there already" in said.err
    assert target.read_bytes() == before
    said = semwatch("klarf", "convert", flat, "--to", "1.2", "--out", tmp_path / "c")
    assert said.code == 1
    assert "is KLARF 1.1 already" in said.words
    assert not (tmp_path / "c").exists()


def test_name_in_a_file_moves_no_cursor(semwatch: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.001"
    path.write_text(FLAT.replace('"lot 7"', '"\x1b[31mlot"'))
    said = semwatch("klarf", "show", path)
    assert "\x1b[31m" not in said.out
    assert "\\x1b[31mlot" in said.out
