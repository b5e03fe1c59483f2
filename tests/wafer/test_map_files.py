"""G85 and E142.1: read back, every die has the bin that its defects give it."""

from xml.etree import ElementTree

import numpy as np
import pytest

from planted_wafers import klarf_of, planted_wafer
from semwatch import klarf
from semwatch.wafer import map_files
from semwatch.wafer.map_files import CLEAN, DEFECTIVE, E142_NAMESPACE, G85_NAMESPACE, NO_DIE, die_bins
from semwatch.wafer.wafer_map import WaferMap, wafer_map


def made(mark: str = "DOWN", lot: str = "A1234.7", name: str = "25", seed: int = 1) -> WaferMap:
    text = klarf_of(planted_wafer(seed, n_random=40, n_repeaters=1, n_scratches=1), mark=mark, lot=lot, name=name)
    (found,) = klarf.parse(text.encode()).lots
    return wafer_map(found, found.wafers[0])


def read_g85(data: bytes) -> list[tuple[dict[str, str], np.ndarray, tuple[int, int], dict[int, int]]]:
    """Attributes, bins, column and row of die (0, 0), and counts by bin, of each map."""
    space = {"g": G85_NAMESPACE}
    found = []
    for one in ElementTree.fromstring(data).findall("g:Map", space):
        (device,) = one.findall("g:Device", space)
        bins = np.array([row.text.split() for row in device.findall("g:Data/g:Row", space)], int)  # type: ignore[union-attr]
        reference = device.find("g:ReferenceDevice", space).attrib  # type: ignore[union-attr]
        counts = {int(each.attrib["BinCode"]): int(each.attrib["BinCount"]) for each in device.findall("g:Bin", space)}
        zero = int(reference["ReferenceDeviceX"]), int(reference["ReferenceDeviceY"])
        found.append(({**one.attrib, **device.attrib}, bins, zero, counts))
    return found


def read_e142(data: bytes) -> list[tuple[dict[str, str], np.ndarray, tuple[int, int], dict[int, int]]]:
    space = {"e": E142_NAMESPACE}
    root = ElementTree.fromstring(data)
    layouts = {one.attrib["LayoutId"]: one for one in root.findall("e:Layouts/e:Layout", space)}
    found = []
    for one in root.findall("e:SubstrateMaps/e:SubstrateMap", space):
        bin_map = one.find("e:Overlay/e:BinCodeMap", space)
        rows = [row.text for row in bin_map.findall("e:BinCode", space)]  # type: ignore[union-attr]
        bins = np.array([[int(row[i : i + 2], 16) for i in range(0, len(row), 2)] for row in rows])  # type: ignore[index, arg-type]
        top, dies = one.attrib["LayoutSpecifier"].split("/")
        assert layouts[top].find("e:ChildLayouts/e:ChildLayout", space).attrib["LayoutId"] == dies  # type: ignore[union-attr]
        size = layouts[dies].find("e:Dimension", space).attrib  # type: ignore[union-attr]
        assert bins.shape == (int(size["Y"]), int(size["X"]))
        place = one.find("e:Overlay/e:ReferenceDevices/e:ReferenceDevice/e:Coordinates", space).attrib  # type: ignore[union-attr]
        counts = {
            int(each.attrib["BinCode"], 16): int(each.attrib["BinCount"])
            for each in bin_map.findall("e:BinDefinitions/e:BinDefinition", space)  # type: ignore[union-attr]
        }
        found.append((dict(one.attrib), bins, (int(place["X"]), int(place["Y"])), counts))
    return found


@pytest.mark.parametrize("mark", ["DOWN", "LEFT", "UP", "RIGHT"])
def test_every_die_comes_back_with_its_bin_and_the_counts_fit(mark: str) -> None:
    wafer = made(mark)
    hit = set(map(tuple, wafer.defect_dies.tolist()))
    for ((attributes, bins, (column, row), counts),) in (
        read_g85(map_files.g85([wafer])),
        read_e142(map_files.e142([wafer])),
    ):
        for x, y in wafer.dies.tolist():
            assert bins[row - y, column + x] == (DEFECTIVE if (x, y) in hit else CLEAN)
        assert np.count_nonzero(bins != NO_DIE) == len(wafer.dies)
        assert counts == {CLEAN: len(wafer.dies) - len(hit), DEFECTIVE: len(hit)}
        assert (attributes["SubstrateId"], attributes["SubstrateType"]) == ("25", "Wafer")
        assert attributes["Orientation"] == {"DOWN": "0", "LEFT": "90", "UP": "180", "RIGHT": "270"}[mark]


def test_upper_row_comes_first() -> None:
    wafer = made()
    bins, (column, row) = die_bins(wafer)
    x, y = wafer.dies[wafer.dies[:, 1].argmax()].tolist()
    assert row - y == 0
    assert bins[0, column + x] != NO_DIE


def test_several_wafers_stand_in_one_file_each_with_its_own_dies() -> None:
    wafers = [made(name="1"), made(name="2", seed=2)]
    for maps in (read_g85(map_files.g85(wafers)), read_e142(map_files.e142(wafers))):
        assert [one[0]["SubstrateId"] for one in maps] == ["1", "2"]
        for wafer, (_, bins, _, _) in zip(wafers, maps, strict=True):
            assert np.array_equal(bins, die_bins(wafer).bins)


def test_names_with_markup_or_control_characters_stay_names() -> None:
    wafer = made(lot='<lot "7">&', name="a\x01b")
    ((attributes, _, _, _),) = read_g85(map_files.g85([wafer]))
    assert attributes["LotId"].startswith("<lot")
    assert attributes["SubstrateId"] == "a\N{REPLACEMENT CHARACTER}b"
    assert read_e142(map_files.e142([wafer]))
