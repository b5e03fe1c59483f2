"""Maps of dies for other programs: SEMI G85 (XML) and SEMI E142.1.

A die is clean (bin 1), defective (bin 2: at least one defect), or not inspected (bin 255: no die). Rows go from the top
of the wafer as its file sees it, columns from the left; `Orientation` is where the notch is, degrees clockwise from the
bottom. Both standards are sold; this follows what public files and readers of them show.
"""

from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np
from numpy.typing import NDArray

from semwatch.wafer.wafer_map import WaferMap

CLEAN, DEFECTIVE, NO_DIE = 1, 2, 255
_BINS = ((CLEAN, "Pass", "no defect"), (DEFECTIVE, "Fail", "with defects"))
E142_NAMESPACE = "urn:semi-org:xsd.E142-1.V1005.SubstrateMap"
G85_NAMESPACE, G85_REVISION = "http://www.semi.org", "SEMI G85 0703"


class DieBins(NamedTuple):
    """Bins of all dies.

    Attributes:
        bins: (R, C) uint8; row 0 is the top one.
        zero: column and row of die (0, 0), counted from the upper left; it may lie outside.
    """

    bins: NDArray[np.uint8]
    zero: tuple[int, int]

    def count(self, bin_code: int) -> int:
        """Dies of a bin."""
        return int(np.count_nonzero(self.bins == bin_code))


def die_bins(found: WaferMap) -> DieBins:
    """Which dies have a defect."""
    if not len(found.dies):
        return DieBins(np.full((1, 1), NO_DIE, np.uint8), (0, 0))
    low, high = found.dies.min(0), found.dies.max(0)
    n_columns, n_rows = (high - low + 1).tolist()
    bins = np.full((n_rows, n_columns), NO_DIE, np.uint8)
    for dies, bin_code in ((found.dies, CLEAN), (found.defect_dies, DEFECTIVE)):
        bins[high[1] - dies[:, 1], dies[:, 0] - low[0]] = bin_code
    return DieBins(bins, (int(-low[0]), int(high[1])))


def g85(maps: list[WaferMap]) -> bytes:
    """The wafers as SEMI G85: a `Map` each."""
    root = Element("Maps")
    for one in maps:
        found = die_bins(one)
        top = {"xmlns": G85_NAMESPACE, "SubstrateType": "Wafer", "FormatRevision": G85_REVISION}
        wafer = SubElement(root, "Map", {**top, "SubstrateId": _xml(one.wafer)})
        device = SubElement(
            wafer,
            "Device",
            {
                "ProductId": _xml(one.device),
                "LotId": _xml(one.lot),
                "Orientation": str(one.degrees),
                "WaferSize": f"{one.diameter_um / 1000:g}",
                "DeviceSizeX": f"{one.pitch_um[0]:.10g}",
                "DeviceSizeY": f"{one.pitch_um[1]:.10g}",
                "Rows": str(found.bins.shape[0]),
                "Columns": str(found.bins.shape[1]),
                "OriginLocation": "2",  # upper left
                "BinType": "Decimal",
                "NullBin": str(NO_DIE),
                "MapType": "Array",
                "SupplierName": "semwatch",
            },
        )
        x, y = map(str, found.zero)
        SubElement(device, "ReferenceDevice", {"ReferenceDeviceX": x, "ReferenceDeviceY": y})
        for code, quality, text in _BINS:
            counted = {"BinQuality": quality, "BinDescription": text, "BinCount": str(found.count(code))}
            SubElement(device, "Bin", {"BinCode": f"{code:03d}", **counted})
        data = SubElement(device, "Data", {"MapName": "defects", "MapVersion": "1"})
        for row in found.bins.tolist():
            SubElement(data, "Row").text = " ".join(f"{code:03d}" for code in row)
    return _bytes(root)


def e142(maps: list[WaferMap]) -> bytes:
    """The wafers as SEMI E142.1: a layout, a substrate and a substrate map each."""
    root = Element("MapData", {"xmlns": E142_NAMESPACE})
    layouts, substrates, substrate_maps = (
        SubElement(root, name) for name in ("Layouts", "Substrates", "SubstrateMaps")
    )
    for n, one in enumerate(maps, 1):
        found = die_bins(one)
        layout = "" if len(maps) == 1 else str(n)
        _e142_layouts(layouts, one, found, layout)
        wafer = {"SubstrateType": "Wafer", "SubstrateId": _xml(one.wafer)}
        SubElement(SubElement(substrates, "Substrate", wafer), "LotId").text = _xml(one.lot)
        substrate_map = SubElement(
            substrate_maps,
            "SubstrateMap",
            {
                **wafer,
                "LayoutSpecifier": f"WaferLayout{layout}/DieLayout{layout}",
                "SubstrateSide": "TopSide",
                "Orientation": str(one.degrees),
                "OriginLocation": "UpperLeft",
                "AxisDirection": "DownRight",
            },
        )
        overlay = SubElement(substrate_map, "Overlay", {"MapName": "BinCodeMap", "MapVersion": "1"})
        reference = SubElement(SubElement(overlay, "ReferenceDevices"), "ReferenceDevice", {"Name": "OriginDevice"})
        x, y = map(str, found.zero)
        SubElement(reference, "Coordinates", {"X": x, "Y": y})
        bin_map = SubElement(
            overlay, "BinCodeMap", {"BinType": "HexaDecimal", "NullBin": f"{NO_DIE:02X}", "MapType": "2DArray"}
        )
        definitions = SubElement(bin_map, "BinDefinitions")
        for code, quality, text in _BINS:
            counted = {"BinCount": str(found.count(code)), "BinQuality": quality, "BinDescription": text}
            SubElement(definitions, "BinDefinition", {"BinCode": f"{code:02X}", **counted})
        for row in found.bins.tolist():
            SubElement(bin_map, "BinCode").text = "".join(f"{code:02X}" for code in row)
    return _bytes(root)


def _e142_layouts(layouts: Element, one: WaferMap, found: DieBins, number: str) -> None:
    size = dict.fromkeys("XY", f"{one.diameter_um / 1000:g}")
    wafer = SubElement(
        layouts, "Layout", {"LayoutId": f"WaferLayout{number}", "DefaultUnits": "mm", "TopLevel": "true"}
    )
    SubElement(wafer, "Dimension", {"X": "1", "Y": "1"})
    SubElement(wafer, "DeviceSize", size)
    SubElement(SubElement(wafer, "ChildLayouts"), "ChildLayout", {"LayoutId": f"DieLayout{number}"})
    dies = SubElement(layouts, "Layout", {"LayoutId": f"DieLayout{number}", "DefaultUnits": "mm"})
    n_rows, n_columns = found.bins.shape
    SubElement(dies, "Dimension", {"X": str(n_columns), "Y": str(n_rows)})
    pitch = {axis: f"{length / 1000:.10g}" for axis, length in zip("XY", one.pitch_um.tolist(), strict=True)}
    SubElement(dies, "DeviceSize", pitch)
    SubElement(dies, "StepSize", pitch)


def _xml(text: str | None) -> str:
    """Text without what XML forbids, which ElementTree would write all the same."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text or "")


def _bytes(root: Element) -> bytes:
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"
