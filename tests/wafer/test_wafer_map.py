"""The arrays of a wafer: places, dies and classes as the KLARF gives them."""

import numpy as np
import pytest

from klarf_files import FLAT, NESTED
from planted_wafers import klarf_of, planted_wafer, whole_dies
from semwatch import klarf
from semwatch.errors import ConfigError
from semwatch.klarf import KlarfError
from semwatch.wafer.wafer_map import WaferMap, die_ids, wafer_map


def first(text: str, **how: object) -> WaferMap:
    (lot, *_) = klarf.parse(text.encode()).lots
    return wafer_map(lot, lot.wafers[0], **how)


@pytest.mark.parametrize("text", [FLAT, NESTED], ids=["1.1", "1.8"])
def test_places_are_those_of_the_typed_views(text: str) -> None:
    (lot, *_) = klarf.parse(text.encode()).lots
    (wafer, *_) = lot.wafers
    if any(defect.in_die is None for defect in wafer.defects):
        with pytest.raises(KlarfError, match="expected numbers"):  # an NA: said, not guessed
            wafer_map(lot, wafer)
        return
    found = wafer_map(lot, wafer)
    assert found.ids.tolist() == [defect.id for defect in wafer.defects]
    for place, defect in zip(found.on_wafer_um, wafer.defects, strict=True):
        assert defect.on_wafer is not None
        assert place == pytest.approx(tuple(defect.on_wafer), abs=1e-6)


def test_planted_wafer_comes_back_as_it_was_written() -> None:
    planted = planted_wafer(1, n_random=40, n_repeaters=1, n_scratches=1)
    found = first(klarf_of(planted, mark="LEFT"))
    assert (found.lot, found.wafer, found.step, found.device, found.slot) == ("A1234.7", "25", "M2-CMP", "D8", 3)
    assert (found.degrees, found.mark, found.diameter_um) == (90, "NOTCH", 300_000)
    assert np.allclose(found.on_wafer_um, planted.on_wafer_um, atol=2e-3)
    assert found.knows_dies
    assert set(map(tuple, whole_dies().tolist())) <= set(map(tuple, found.dies.tolist()))
    assert (found.dies[die_ids(found)] == found.defect_dies).all()
    assert np.bincount(found.classes)[0] == 40


def test_without_named_dies_all_whole_ones_within_the_edge_exclusion_stand_in() -> None:
    text = klarf_of(planted_wafer(1, n_random=0, n_repeaters=1, n_scratches=0))
    start, end = text.index("InspectionTest"), text.index("DefectRecordSpec")
    found = first(text[:start] + text[end:], edge_exclusion_um=3000.0)
    assert not found.knows_dies
    assert found.dies.tolist() == sorted(whole_dies().tolist())


def test_empty_list_of_defects_is_a_wafer_without_any() -> None:
    text = klarf_of(planted_wafer(1, n_random=3, n_repeaters=0, n_scratches=0))
    empty = text[: text.index("DefectList")] + "DefectList;\nEndOfFile;\n"
    found = first(empty)
    assert (len(found.ids), found.on_wafer_um.shape, found.classes.shape) == (0, (0, 2), (0,))


@pytest.mark.parametrize(
    ("old", "new", "error", "reason"),
    [
        ("DiePitch", "Pitch", KlarfError, "DiePitch above 0 and SampleCenterLocation"),
        ("SampleCenterLocation", "Centre", KlarfError, "DiePitch above 0 and SampleCenterLocation"),
        ("DiePitch 9.0", "DiePitch 0.0", KlarfError, "DiePitch above 0"),
        ("DiePitch 9.000000e+03", "DiePitch 1.0e-3", KlarfError, "at most 100000 dies"),
        ("XREL", "XODD", KlarfError, "XREL"),
    ],
)
def test_file_without_places_is_refused_with_what_it_lacks(
    old: str, new: str, error: type[Exception], reason: str
) -> None:
    text = klarf_of(planted_wafer(1, n_random=3, n_repeaters=0, n_scratches=0))
    start, end = text.index("InspectionTest"), text.index("DefectRecordSpec")
    with pytest.raises(error, match=reason):
        first((text[:start] + text[end:]).replace(old, new))


def test_edge_exclusion_that_leaves_nothing_and_a_class_column_that_is_not_there_are_refused() -> None:
    text = klarf_of(planted_wafer(1, n_random=3, n_repeaters=0, n_scratches=0))
    with pytest.raises(ConfigError, match="leaves nothing"):
        first(text, edge_exclusion_um=150_000.0)
    with pytest.raises(KlarfError, match="FINEBINNUMBER"):
        first(text, class_column="FINEBINNUMBER")
