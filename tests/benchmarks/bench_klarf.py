"""KLARF: 100,000 and 1,000,000 defects parsed, edited and written; and the same files read by other libraries.

The other libraries are installed apart, they are no dependency of ours:

    python -m venv peers && peers/bin/pip install klarf-reader==0.4.3 klarfio==0.9.1 klarfrs==0.2.1
    SEMWATCH_KLARF_PEERS=peers/bin/python pytest tests/benchmarks/bench_klarf.py -s
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from paths import DATA, ROOT
from semwatch import klarf

PEERS = os.environ.get("SEMWATCH_KLARF_PEERS", "")
N = int(os.environ.get("SEMWATCH_DEFECTS", "1000000"))
WALL_S, MEMORY_MB = 3.0, 300.0
"""For 100,000 defects: parse, edit, write."""


# --- size ------------------------------------------------------------------------------------------------------------

_EDIT = """
import json, resource, sys, time
from semwatch import klarf

def now(): return time.perf_counter(), time.process_time()
begin = now()
document = klarf.read(sys.argv[1])
parsed = now()
wafer = document.wafers[0]
ids = wafer.defects.column("DEFECTID")
edited = klarf.set_column(document, wafer, "FINEBINNUMBER", {one: one % 1000 for one in ids})
edit = now()
with open(sys.argv[1] + ".new", "wb") as file:
    file.write(bytes(edited))
written = now()
steps = [begin, parsed, edit, written]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"wall": [b[0] - a[0] for a, b in zip(steps, steps[1:])],
                  "cpu": [b[1] - a[1] for a, b in zip(steps, steps[1:])], "peak_mb": peak, "n": len(ids)}))
"""
_FLOOR = """
import sys, time
begin = time.process_time()
data = open(sys.argv[1], "rb").read()
rows = [line.split() for line in data.split(b"\\n")]
open(sys.argv[1] + ".new", "wb").write(b"\\n".join(b" ".join(row) for row in rows))
print(time.process_time() - begin)
"""


def write_large(path: Path, n: int) -> None:
    rng = random.Random(1)
    columns = "DEFECTID XREL YREL XINDEX YINDEX XSIZE YSIZE DEFECTAREA DSIZE CLASSNUMBER TEST CLUSTERNUMBER"
    columns += " ROUGHBINNUMBER FINEBINNUMBER REVIEWSAMPLE IMAGECOUNT IMAGELIST"
    with path.open("w") as file:
        file.write('FileVersion 1 2;\nLotID "a";\nDiePitch 1e4 1e4;\nSampleCenterLocation 0 0;\nWaferID "w";\n')
        file.write(f"TiffFileName a.tif;\nDefectRecordSpec 17 {columns} ;\nDefectList")
        for i in range(1, n + 1):
            x, y, ix, iy = rng.random() * 1e4, rng.random() * 1e4, rng.randrange(-9, 9), rng.randrange(-9, 9)
            file.write(
                f"\n {i} {x:.3f} {y:.3f} {ix} {iy} 1.111 1.444 25.123 5.000 0 1 0 0 0 0 2 2 {2 * i - 1} 0 {2 * i} 1"
            )
        file.write(";\nEndOfFile;\n")


def run(code: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "daemon")},
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    return done.stdout


@pytest.mark.timeout(1800)
def test_time_and_memory_grow_with_the_number_of_defects(tmp_path: Path) -> None:
    print()
    found = {}
    for n in (N // 10, N):
        path = tmp_path / f"{n}.klarf"
        write_large(path, n)
        one = found[n] = json.loads(run(_EDIT, path))
        floor = float(run(_FLOOR, path))
        assert one["n"] == n
        names = ("parse", "edit every row and read it again", "write")
        steps = ", ".join(f"{name} {cpu:.2f}" for name, cpu in zip(names, one["cpu"], strict=True))
        print(
            f"{n} defects, {path.stat().st_size / 1e6:.0f} MB: {steps} s of one core, {sum(one['wall']):.2f} s in all;"
        )
        print(f"  {one['peak_mb']:.0f} MB; {sum(one['cpu']) / floor:.1f} times that of splitting and joining words")
    ratio = sum(found[N]["cpu"]) / sum(found[N // 10]["cpu"])
    print(f"ten times the defects take {ratio:.1f} times the time; aims: {WALL_S:g} s and {MEMORY_MB:g} MB for 100000")
    assert ratio < 15
    if N == 1_000_000:
        assert found[100_000]["peak_mb"] < MEMORY_MB


# --- other libraries -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What is in a file, as a person reads it: (DEFECTID, XREL, CLASSNUMBER) of the first and the last defect."""

    n: int
    first: tuple[int, float, int]
    last: tuple[int, float, int]


REFUSED = Truth(-1, (0, 0, 0), (0, 0, 0))
"""Of a malformed file: right is to refuse it."""
PUBLIC = {
    "CPS3TwithoutReview.001": Truth(16, (1, 552.64, 0), (16, 1753.12, 0)),
    "generated/LOT001_WAFER01_GATE.klarf": Truth(5, (1, 2394.3987109, 4), (5, 3984.1429163, 0)),
    "generated/LOT002_WAFER03_VIA1.klarf": Truth(20, (1, 915.97283141, 2), (20, 104.31473975, 3)),
    "generated/LOT005_WAFER01_STI.klarf": Truth(3, (1, 1214.7038228, 4), (3, 2477.2906679, 0)),
    "klarf12DefectListExample.klarf": Truth(13, (1, 4958.616, 0), (13, 4539.866, 0)),
    "klarf12Example.klarf": Truth(2, (1, 5500, 0), (2, 8100, 0)),
    "simple12.klarf": Truth(1, (1, 3500.123, 10), (1, 3500.123, 10)),
    "simple18.klarf": Truth(4, (2, 1254960, 91), (2, 1155701, 1)),
    "wierdKlarfWithNAs.klarf": Truth(4, (2, 1254960, 91), (2, 1155701, 1)),
    "klarfWithImagelist.klarf": Truth(6, (2, 7243340, 0), (16, 2810580, 0)),
    "bad12.klarf": REFUSED,
    "bad12DefectList.klarf": REFUSED,
}
_PLAIN = """\
FileVersion 1 2;
FileTimestamp 07-07-2024 00:01:59;
InspectionStationID "aVendor" "A" "B";
SampleType WAFER;
ResultTimestamp 07-07-2024 21:59:59;
LotID "aLot";
SampleSize 1 300;
DeviceID "aDevice";
SetupID "aSetup" 05-07-2024 01:01:01;
StepID "aStep";
SampleOrientationMarkType NOTCH;
OrientationMarkLocation DOWN;
DiePitch 1.123400E4 2.234500E3;
DieOrigin 0.000000E0 0.000000E0;
WaferID "aWafer";
Slot 15;
SampleCenterLocation 5.76540000E3 2.777700E3;
ClassLookup 1
 0 "unclassified";
InspectionTest 1;
SampleTestPlan 2
  -1 -1
  1 1;
AreaPerTest 5.5000000000E10;
DefectRecordSpec 17 DEFECTID XREL YREL XINDEX YINDEX XSIZE YSIZE DEFECTAREA DSIZE CLASSNUMBER TEST CLUSTERNUMBER \
ROUGHBINNUMBER FINEBINNUMBER REVIEWSAMPLE IMAGECOUNT IMAGELIST ;
DefectList
 1 5500.5 4400.5 -1 -1 1.1 1.2 1.3 1.4 0 1 0 0 0 0 0 0
 2 8100.5 4100.5 1 1 1.1 1.2 1.3 1.4 3 1 0 0 0 0 0 0;
SummarySpec 5 TESTNO NDEFECT DEFDENSITY NDIE NDEFDIE ;
SummaryList
 1 2 0 2 2;
EndOfFile;
"""
"""A file that klarf-reader and klarfio both read rightly, so that each row below shows one quirk alone."""
_TWO = Truth(2, (1, 5500.5, 0), (2, 8100.5, 3))
_THREE = Truth(3, (1, 5500.5, 0), (3, 1, 0))
_MORE = "\nTiffFileName b.jpg;\nDefectList\n 3 1 1 0 0 1 1 1 1 0 1 0 0 0 0 0 0;"
QUIRKS = {
    "none": (_PLAIN.encode(), _TWO),
    "version 1.1": (_PLAIN.replace("FileVersion 1 2", "FileVersion 1 1").encode(), _TWO),
    "mark of byte order": (b"\xef\xbb\xbf" + _PLAIN.encode(), _TWO),
    "CRLF": (_PLAIN.replace("\n", "\r\n").encode(), _TWO),
    "latin-1": (_PLAIN.replace("unclassified", "Größe").encode("latin-1"), _TWO),
    "a row wrapped": (_PLAIN.replace("1.4 0 1 0", "1.4 0\n 1 0").encode(), _TWO),
    "rows without a leading space": (
        _PLAIN.replace("\n 1 5500", "\n1 5500").replace("\n 2 81", "\n2 81").encode(),
        _TWO,
    ),
    "semicolon on a line of its own": (_PLAIN.replace("0 0 0;\nSumm", "0 0 0\n;\nSumm").encode(), _TWO),
    "id without quotes": (_PLAIN.replace('"aWafer"', "aWafer").encode(), _TWO),
    "images of a multi-page TIFF": (
        _PLAIN.replace("1.4 0 1 0 0 0 0 0 0", "1.4 0 1 0 0 0 0 2 2 1 0 2 0")
        .replace("Defect", "TiffFileName a.tif;\nDefect", 1)
        .encode(),
        _TWO,
    ),
    "two lists, a JPG each": (_PLAIN.replace("0 0 0;\nSumm", "0 0 0;" + _MORE + "\nSumm").encode(), _THREE),
    "an empty list before": (_PLAIN.replace("DefectList\n", "DefectList;\nDefectList\n").encode(), _TWO),
    "an unknown statement": (_PLAIN.replace("Slot 15;", 'Slot 15;\nVendorThing "a; b" 1;').encode(), _TWO),
}

_PEER = """
import json, sys
library, path, target = sys.argv[1:]

def tables(node):
    if isinstance(node, dict):
        if "Columns" in node and "Data" in node:
            yield [one["Column"] for one in node["Columns"]], node["Data"]
        for value in node.values():
            yield from tables(value)

written = False
if library == "klarf-reader":
    from pathlib import Path
    from klarf_reader.klarf import Klarf
    wafers = Klarf.load_from_file(Path(path)).wafers
    rows = [[d.id, d.x_rel, d.class_number] for wafer in wafers for d in wafer.defects]
elif library == "klarfrs":
    import klarfrs
    rows = [[d.defect_id, d.xrel, d.class_number] for d in klarfrs.parse_defects(path)]
else:
    import klarfio
    found = klarfio.klarf(path)
    rows = []
    for columns, data in tables(found.data):
        if "DEFECTID" in columns:
            at = [columns.index(name) for name in ("DEFECTID", "XREL", "CLASSNUMBER")]
            rows += [[float(str(row[i])) for i in at] for row in data]
    found.export_klarf(target)
    written = open(path, "rb").read() == open(target, "rb").read()
print(json.dumps({"rows": rows, "written": written}))
"""


def read_ours(path: Path) -> dict[str, object]:
    document = klarf.read(path)
    rows = [[d.id, d.number("XREL"), d.class_number] for wafer in document.wafers for d in wafer.defects]
    return {"rows": rows, "written": bytes(document) == path.read_bytes()}


def read_peer(library: str, path: Path, target: Path) -> dict[str, object] | None:
    done = subprocess.run(
        [PEERS, "-c", _PEER, library, str(path), str(target)], capture_output=True, text=True, timeout=120, check=False
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def verdict(found: dict[str, object] | None, truth: Truth) -> str:
    if found is None:
        return "right: refused" if truth is REFUSED else "not read"
    rows = found["rows"]
    assert isinstance(rows, list)
    if truth is REFUSED:
        return f"wrong: {len(rows)} defects of a malformed file"
    if len(rows) != truth.n:
        return f"wrong: {len(rows)} of {truth.n} defects"
    if not all(row == pytest.approx(meant) for row, meant in ((rows[0], truth.first), (rows[-1], truth.last))):
        return "wrong: other values"
    return "right" + (", written back byte for byte" if found["written"] else "")


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not PEERS, reason="needs a Python with klarf-reader, klarfio and klarfrs in SEMWATCH_KLARF_PEERS")
def test_same_files_read_by_others(tmp_path: Path) -> None:
    cases = {name: (DATA / "KLARF" / name, truth) for name, truth in PUBLIC.items()}
    for name, (data, truth) in QUIRKS.items():
        path = tmp_path / f"{name.replace(' ', '-')}.klarf"
        path.write_bytes(data)
        cases[name] = path, truth
    libraries = ("klarf-reader", "klarfio", "klarfrs")
    print(f"\n| file | semwatch.klarf | {' | '.join(libraries)} |\n|---|---|---|---|---|")
    for name, (path, truth) in cases.items():
        try:
            ours = verdict(read_ours(path), truth)
        except klarf.KlarfError:
            ours = verdict(None, truth)
        theirs = [verdict(read_peer(library, path, tmp_path / "out"), truth) for library in libraries]
        print(f"| {name} | {' | '.join([ours, *theirs])} |")
        assert ours.startswith("right")
