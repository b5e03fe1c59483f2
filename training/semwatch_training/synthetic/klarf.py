"""The inspection file of a synthetic lot: KLARF 1.2 as an inspection tool hands it to review.

CLASSNUMBER is 0 throughout, for the inspection did not classify; MANSEMCLASS, the class an engineer gave by hand,
holds the truth. A defect-free image is a false alarm of the inspection: one record without extent, class 99.
"""

from collections.abc import Sequence
from datetime import datetime

import numpy as np

from semwatch.defects import DEFECT_FREE, Box
from semwatch_training.synthetic.defects import DEFECT_TYPES
from semwatch_training.synthetic.rendering import SyntheticMicrograph

UNCLASSIFIED, NUISANCE = 0, 99
CLASS_NUMBERS = {label: i for i, label in enumerate((t for types in DEFECT_TYPES.values() for t in types), start=1)}
DIE_PITCH_UM = (10000.0, 10000.0)
COLUMNS = (
    "DEFECTID XREL YREL XINDEX YINDEX XSIZE YSIZE DEFECTAREA DSIZE CLASSNUMBER TEST CLUSTERNUMBER ROUGHBINNUMBER "
    "FINEBINNUMBER REVIEWSAMPLE MANSEMCLASS IMAGECOUNT IMAGELIST"
)


def klarf_text(
    lot: str, sites: Sequence[tuple[str, SyntheticMicrograph, tuple[Box, ...]]], recorded: datetime, *, seed: int
) -> str:
    """Compose the file: header, one defect list per image, summary; ``sites`` are (file name, field, boxes)."""
    rng = np.random.default_rng([seed, 1])
    lines, next_id = _header(lot, recorded), 1
    for name, shown, boxes in sites:
        records = _records(shown, boxes, rng, next_id)
        next_id += len(records)
        lines += [f"TiffFileName {name};", "DefectList", *records[:-1], records[-1] + ";"]
    n_defects = next_id - 1
    lines += ["SummarySpec 5 TESTNO NDEFECT DEFDENSITY NDIE NDEFDIE ;", "SummaryList"]
    lines += [f" 1 {n_defects} {n_defects / 706.858:.6e} 45 {min(n_defects, 45)};", "EndOfFile;"]
    return "\n".join(lines) + "\n"


def _header(lot: str, recorded: datetime) -> list[str]:
    stamp = recorded.strftime("%m-%d-%Y %H:%M:%S")
    classes = [(UNCLASSIFIED, "unclassified"), *((i, c) for c, i in CLASS_NUMBERS.items()), (NUISANCE, DEFECT_FREE)]
    lookup = [f' {number} "{label}"' for number, label in classes]
    return [
        "FileVersion 1 2;",
        f"FileTimestamp {stamp};",
        'InspectionStationID "semwatch" "synthetic" "1";',
        "SampleType WAFER;",
        f"ResultTimestamp {stamp};",
        f'LotID "{lot}";',
        "SampleSize 1 300;",
        'DeviceID "SYNTHETIC";',
        f'SetupID "SYNTHETIC" {stamp};',
        'StepID "REVIEW";',
        "SampleOrientationMarkType NOTCH;",
        "OrientationMarkLocation DOWN;",
        f"DiePitch {DIE_PITCH_UM[0]:.10e} {DIE_PITCH_UM[1]:.10e};",
        "DieOrigin 0.0000000000e+00 0.0000000000e+00;",
        'WaferID "01";',
        "Slot 1;",
        "SampleCenterLocation 5.0000000000e+03 5.0000000000e+03;",
        f"ClassLookup {len(classes)}",
        *lookup[:-1],
        lookup[-1] + ";",
        "InspectionTest 1;",
        "SampleTestPlan 1",
        " 0 0;",
        "AreaPerTest 7.0685800000e+10;",
        f"DefectRecordSpec {len(COLUMNS.split())} {COLUMNS} ;",
    ]


def _records(shown: SyntheticMicrograph, boxes: tuple[Box, ...], rng: np.random.Generator, first_id: int) -> list[str]:
    """Compose the records of one image: its field lies anywhere on a die; y points up on the wafer."""
    um = shown.pixel_nm / 1000
    field_h, field_w = shown.pixels.shape
    die_x, die_y = (int(v) for v in rng.integers(-7, 8, 2))
    at_x, at_y = rng.uniform(0.05, 0.95, 2) * DIE_PITCH_UM
    middle = (field_w // 2, field_h // 2, field_w // 2, field_h // 2)
    found = list(zip(shown.labels, boxes, strict=True)) or [(DEFECT_FREE, middle)]
    records = []
    for i, (label, (x0, y0, x1, y1)) in enumerate(found):
        x, y = at_x + ((x0 + x1) - field_w) / 2 * um, at_y - ((y0 + y1) - field_h) / 2 * um
        wide, tall = (x1 - x0) * um, (y1 - y0) * um
        area = float(shown.masks[i].sum()) * um**2 if boxes else 0.0
        truth = CLASS_NUMBERS.get(label, NUISANCE)
        records.append(
            f" {first_id + i} {x:.4f} {y:.4f} {die_x} {die_y} {wide:.4f} {tall:.4f} {area:.6f} {max(wide, tall):.4f} "
            f"{UNCLASSIFIED} 1 0 0 0 1 {truth} 1 1 1 0"
        )
    return records
