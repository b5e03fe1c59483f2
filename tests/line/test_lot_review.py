"""The KLARF that is written back: only the target column differs, and the original is never touched."""

from dataclasses import replace
from typing import Any

import pytest

from klarf_files import FLAT, NESTED
from semwatch import klarf
from semwatch.line.lot_review import ReviewedWafer, written
from semwatch.settings.recipe import Recipe
from semwatch.store.lot_record import LotDefect


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate({"klarf": {"pattern": "*.001", **settings}})


def said(defect_id: int, code: int | None, label: str | None = "void") -> LotDefect:
    kind = None if label is None else "known"
    return LotDefect(
        id=defect_id, verdict=kind, label=label, code=code, by="model", confidence=1.0, image="a.tif", page=0,
        defect_id=1, reason="",
    )  # fmt: skip


def wafers(*codes: dict[int, int | None]) -> list[ReviewedWafer]:
    return [ReviewedWafer(f"w{n}", n, tuple(said(at, code) for at, code in of.items())) for n, of in enumerate(codes)]


def test_full_form_differs_from_the_original_in_the_target_column_alone() -> None:
    document = klarf.parse(FLAT.encode())
    (file,) = written(document, wafers({7: 55}, {7: 66}), recipe()).files
    assert file.data == FLAT.replace("1.25 39 NA;", "1.25 55 NA;").replace("1 1 1 0 1;", "1 1 1 66 1;").encode()


def test_defect_without_a_code_keeps_its_cell() -> None:
    document = klarf.parse(FLAT.encode())
    (file,) = written(document, wafers({7: None}, {7: 66}), recipe()).files
    assert b"1.25 39 NA;" in file.data


@pytest.mark.parametrize("text", [FLAT, NESTED], ids=["1.1", "1.8"])
def test_column_that_is_not_there_is_added(text: str) -> None:
    document = klarf.parse(text.encode())
    codes = [{defect.id: 50 + n for defect in wafer.defects} for n, wafer in enumerate(document.wafers)]
    (file,) = written(document, wafers(*codes), recipe(target_column="AUTOOFFSEMCLASS")).files
    found = [wafer.defects.column("AUTOOFFSEMCLASS") for wafer in klarf.parse(file.data).wafers]
    assert found == [list(of.values()) for of in codes]


def test_partial_form_of_each_wafer_holds_the_ids_and_one_column() -> None:
    document = klarf.parse(FLAT.encode())
    one, two = written(document, wafers({7: 55}, {7: 66}), recipe(form="partial", target_column="FINEBINNUMBER")).files
    assert (one.part, two.part) == (".w1", ".w2")
    (wafer,) = klarf.parse(two.data).wafers
    assert (wafer.id, wafer.defects.columns, wafer.defects[0]["FINEBINNUMBER"]) == (
        "w2",
        ("DEFECTID", "FINEBINNUMBER"),
        66,
    )


@pytest.mark.parametrize("text", [FLAT, NESTED], ids=["1.1", "1.8"])
def test_codes_that_the_lookup_lacks_are_named_and_added_where_asked(text: str) -> None:
    document = klarf.parse(text.encode())
    reviewed = wafers(*({defect.id: 55 for defect in wafer.defects} for wafer in document.wafers))
    left = written(document, reviewed, recipe())
    assert left.codes_without_class == (55,)
    assert 55 not in klarf.parse(left.files[0].data).lots[0].classes
    added = written(document, reviewed, recipe(extend_lookup=True))
    assert added.codes_without_class == ()
    assert klarf.parse(added.files[0].data).lots[0].classes[55].name == "void"


def test_column_of_texts_gets_a_text() -> None:
    text = NESTED.replace("int32 CLASSNUMBER, ImageList", "string CLASSNUMBER, ImageList")
    text = text.replace("1250 39 Image", '1250 "39" Image')
    document = klarf.parse(text.encode())
    (file,) = written(document, wafers({7: 55, 8: 56}), recipe()).files
    assert klarf.parse(file.data).wafers[0].defects.column("CLASSNUMBER") == ["55", "56"]


def test_column_that_cannot_be_written_is_a_fault_and_no_file() -> None:
    document = klarf.parse(NESTED.encode())
    found = written(document, wafers({7: 55, 8: 56}), recipe(target_column="Images"))
    assert found.files == ()
    assert "cannot be set" in found.fault


def test_nothing_is_written_where_the_recipe_says_so() -> None:
    found = written(klarf.parse(FLAT.encode()), wafers({7: 55}, {7: 66}), recipe(form="none"))
    assert (found.files, found.fault) == ((), "")


def test_wafer_without_a_verdict_stays_as_it_is() -> None:
    document = klarf.parse(FLAT.encode())
    reviewed = [replace(wafer, defects=()) for wafer in wafers({7: 1}, {7: 2})]
    (file,) = written(document, reviewed, recipe()).files
    assert file.data == FLAT.encode()
