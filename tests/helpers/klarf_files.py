"""KLARF files by a seed, with every quirk of real ones, and what is in them: made here, not by the library."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

FLAT = """FileVersion 1 1;
LotID "lot 7";
StepID "M1";
SetupID "recipe" 01-02-24 10:00:00;
SampleSize 1 300;
SampleOrientationMarkType NOTCH;
OrientationMarkLocation LEFT;
DiePitch 1.0e+004 2.0E4;
DieOrigin 0 0;
SampleCenterLocation 5000 -500;
ClassLookup 2
 0 "Unclassified"
 39 "SEM_ANALYSIS";
WaferID "w1";
Slot 3;
InspectionTest 2;
SampleTestPlan 2
 0 0
 -2 1;
AreaPerTest 2.5e10;
DefectRecordSpec 10 DEFECTID XREL YREL XINDEX YINDEX XSIZE DEFECTAREA DSIZE CLASSNUMBER FINEBINNUMBER;
DefectList
 7 100.5 200 -2 1 1.5 2.25 1.25 39 NA;
SummarySpec 2 TESTNO NDEFECT;
SummaryList
 2 1;
DieOrigin 1 2;
WaferID "w2";
Slot 4;
DefectList
 7 0 0 0 0 1 1 1 0 1;
EndOfFile;
"""
"""Two wafers."""
NESTED = """Record FileRecord "1.8" {
 Record LotRecord "lot 7" {
  Field DiePitch 2 {10000000, 20000000}
  Field OrientationMarkLocation 1 {90}
  Field SampleOrientationMarkType 1 {"NOTCH"}
  Field SampleSize 2 {300000000, 0}
  Field StepID 1 {"M1"}
  Field RecipeID 3 {"recipe", "01-02-24", "10:00:00"}
  Record WaferRecord "w1" {
   Field SampleCenterLocation 2 {5000000, -500000}
   Field SlotNumber 1 {3}
   Field ImageFileName 2 {"LOT_1.I01", "TIF"}
   List DefectList {
    Columns 9 { int32 DEFECTID, int32 XREL, int32 YREL, int32 XINDEX, int32 YINDEX, float DEFECTAREA,
     int32 DSIZE, int32 CLASSNUMBER, ImageList Images }
    Data 2 {
     7 100500 200000 -2 1 2250000 1250 39 Images 2 {1 "30",2 "31"};
     8 100500 200000 -2 1 NA 1250 39 Image 1 { "deep\\a.jpg" "JPG" 1 "Patch" };
    }
   }
   Record TestRecord "2" {
    Field AreaPerTest 1 {2.5e16}
    List SampleTestPlanList { Columns 2 { int32 XINDEX, int32 YINDEX } Data 2 { 0 0; -2 1; } }
   }
  }
  List ClassLookupList {
   Columns 3 { int32 CLASSNUMBER, string CLASSNAME, string CLASSCODE }
   Data 2 { 0 "Unclassified" ""; 39 "SEM_ANALYSIS" "S"; }
  }
 }
}
EndOfFile;
"""
"""One of the same wafers, with images."""


@dataclass(frozen=True)
class MadeDefect:
    """A defect as it was meant, lengths in um; images as (file, number, kind)."""

    id: int
    class_number: int
    x_um: float
    y_um: float
    index: tuple[int, int]
    images: tuple[tuple[str | None, int, str], ...]


@dataclass
class Made:
    """A file and what is in it: defects by (lot, wafer)."""

    data: bytes
    version: str
    encoding: str
    is_complete: bool
    classes: dict[int, str] = field(default_factory=dict)
    wafers: dict[tuple[str, str], list[MadeDefect]] = field(default_factory=dict)
    slots: dict[tuple[str, str], int] = field(default_factory=dict)
    degrees: int = 0


NAMES = ("lot-7", "LOT 12", "a;b", "Größe", "x", "{1}", "C:\\lots\\", "a,b")
FILES = ("lot.tif", "A_1.jpg", "LOT_1.I01", "deep\\b.tiff", "c d.png")
UNKNOWN_COLUMNS = ("SIBC", "MAN_SEM", "DCE", "ADRHIGHSCORE", "OTYPE", "GRADE", "AUTOOFFSEMCLASS")


def make(seed: int) -> Made:
    """A well-formed file of any version."""
    rng = random.Random(seed)
    return _Flat(rng).make() if rng.random() < 0.5 else _Nested(rng).make()


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.newline = rng.choice(("\n", "\r\n"))
        self.encoding = rng.choice(("ascii", "utf-8", "latin-1"))
        self.bom = self.encoding != "latin-1" and rng.random() < 0.2
        self.ends = rng.random() < 0.8
        self.classes = {n: self.name() for n in rng.sample((-1, 0, 1, 2, 39, 43, 999), rng.randrange(1, 5))}
        self.degrees = rng.choice((0, 90, 180, 270))
        self.has_latin = False

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def name(self) -> str:
        name = self.rng.choice([one for one in NAMES if self.encoding != "ascii" or one.isascii()])
        return name + str(self.rng.randrange(100))

    def gap(self) -> str:
        return self.rng.choice((" ", " ", " ", "  ", "\t", " \t "))

    def space(self) -> str:
        """Between statements."""
        return self.rng.choice(("", "", " ", self.newline, f" {self.newline}\t"))

    def wrapped(self, cells: Sequence[str], p: float = 0.05) -> str:
        """Cells of a row, which may go on in the next line."""
        parts = [cells[0]]
        for cell in cells[1:]:
            parts += [self.newline + self.gap() if self.chance(p) else self.gap(), cell]
        return "".join(parts)

    def finish(self, text: str, **what: object) -> Made:
        tail = "EndOfFile" + self.rng.choice(("", " ", self.newline)) + ";" if self.ends else ""
        tail += self.rng.choice(
            ("", self.newline, f"{self.newline} {self.newline}", *(("\x1a", "\0\0") if self.ends else ()))
        )
        encoding = "utf-8" if self.encoding == "ascii" else self.encoding
        data = (b"\xef\xbb\xbf" if self.bom else b"") + (text + tail).encode(encoding)
        return Made(data, encoding=encoding, is_complete=self.ends, classes=self.classes, degrees=self.degrees, **what)

    def ids(self) -> list[int]:
        return self.rng.sample(range(1, 10_000), self.rng.choice((0, 0, 1, 2, 3, 8, 30)))


# --- 1.1 and 1.2 -----------------------------------------------------------------------------------------------------


class _Flat(_Maker):
    def make(self) -> Made:
        rng = self.rng
        minor = rng.choice((1, 2))
        lot = self.name()
        n_wafers = rng.choice((1, 1, 1, 2, 3))
        direction = {0: "DOWN", 90: "LEFT", 180: "UP", 270: "RIGHT"}[self.degrees]
        lines = [
            self.statement("FileVersion", "1", str(minor)),
            self.statement("FileTimestamp", "07-07-77", "0:17:07"),
            self.statement("LotID", f'"{lot}"'),
            self.statement("SampleSize", "1", "300"),
            self.statement("SetupID", '""', "07-07-75", "07:07:07"),
            self.statement(rng.choice(("OrientationMarkLocation", "ORIENTATIONMARKLOCATION")), direction),
            self.statement("DiePitch", *self.numbers(1.5e4, 2e4)),
            self.statement("TiffSpec", "6.0", "G", "R"),
            self.statement("VendorThing", '"odd; text"', "1.5e+005"),
        ]
        rows = [f'{n}{self.gap()}"{name}"' for n, name in self.classes.items()]
        lines.append(f"ClassLookup {len(rows)}{self.newline} {(self.newline + ' ').join(rows)}{self.space()};")
        self.columns = ["XREL", "YREL", "XINDEX", "YINDEX", "CLASSNUMBER", *rng.sample(UNKNOWN_COLUMNS, 3)]
        rng.shuffle(self.columns)
        self.columns.insert(0 if self.chance(0.8) else rng.randrange(9), "DEFECTID")
        self.images = rng.choice(("none", "count", "list", "counted", "uncounted"))
        self.columns += {"none": [], "count": ["IMAGECOUNT"], "list": ["IMAGELIST"]}.get(
            self.images, ["IMAGECOUNT", "IMAGELIST"]
        )
        if self.images in ("list", "counted") and self.chance(0.2):
            self.columns.append("AFTER")
        spec = self.statement("DefectRecordSpec", str(len(self.columns)), *self.columns)
        lines.append(spec)
        found: dict[tuple[str, str], list[MadeDefect]] = {}
        slots: dict[tuple[str, str], int] = {}
        for i in range(n_wafers):
            wafer = f"{self.name()}-{i}"
            geometry = self.statement("SampleCenterLocation", *self.numbers(100.5, -20))
            is_before = self.chance(0.5)
            lines += [geometry] if is_before else []
            lines.append(self.statement("WaferID", f'"{wafer}"'))
            lines += [] if is_before else [geometry]
            slots[lot, wafer] = i + 1
            lines += [self.statement("Slot", str(i + 1)), self.statement("InspectionTest", "1")]
            lines.append(f"SampleTestPlan 2{self.newline} 0 0{self.newline} -1 1;")
            found[lot, wafer] = self.defects(lines)
            lines.append("SummarySpec 2 TESTNO NDEFECT ;")
            lines.append(f"SummaryList{self.newline} 1 {len(found[lot, wafer])};")
        text = "".join(line + self.space() + self.newline for line in lines)
        return self.finish(text, version=f"1.{minor}", wafers=found, slots=slots)

    def statement(self, keyword: str, *words: str) -> str:
        return keyword + self.gap() + self.gap().join(words) + self.space() + ";"

    def numbers(self, *values: float) -> list[str]:
        forms = ("{:.3f}", "{:.10e}", "{:.6E}", "{:g}")
        return [self.rng.choice(forms).format(value).replace("e+0", "e+00") for value in values]

    def defects(self, lines: list[str]) -> list[MadeDefect]:
        ids = self.ids()
        found: list[MadeDefect] = []
        file: str | None = None
        while True:
            if self.chance(0.5) or file is None:
                file = self.rng.choice([one for one in FILES if " " not in one])
                lines.append(self.statement(self.rng.choice(("TiffFileName", "TiffFilename")), file))
            n = len(ids) if self.chance(0.6) else min(len(ids), 2)
            block, ids = ids[:n], ids[n:]
            made = [self.defect(one, file) for one in block]
            found += [defect for defect, _ in made]
            rows = [self.rng.choice(("", " ", "  ")) + row for _, row in made]
            body = "".join(self.newline + row + self.rng.choice(("", " ")) for row in rows)
            lines.append("DefectList" + body + self.rng.choice(("", " ", self.newline)) + ";")
            if not ids:
                return found

    def defect(self, defect_id: int, file: str) -> tuple[MadeDefect, str]:
        rng = self.rng
        has_images = self.images in ("list", "counted", "uncounted")
        n_images = rng.choice((0, 1, 2, 7)) if has_images else 0
        images = [(rng.randrange(1, 500), rng.randrange(3)) for _ in range(n_images)]
        x, y = rng.randrange(10**7) / 1000, rng.randrange(10**7) / 1000
        index = rng.randrange(-40, 40), rng.randrange(-40, 40)
        class_number = rng.choice(list(self.classes))
        cells: dict[str, list[str]] = {
            "DEFECTID": [str(defect_id)],
            "XREL": [rng.choice(("{:.3f}", "{:.10e}", "{:.9E}")).format(x)],
            "YREL": [f"{y:.3f}"],
            "XINDEX": [str(index[0])],
            "YINDEX": [str(index[1])],
            "CLASSNUMBER": [str(class_number)],
            "IMAGECOUNT": [str(n_images)],
            "IMAGELIST": [
                *([str(n_images)] * (self.images != "uncounted")),
                *(str(n) for pair in images for n in pair),
            ],
            "AFTER": ["7"],
        }
        words = []
        for column in self.columns:
            words += cells.get(column) or ([] if column == "IMAGELIST" else [self.unknown()])
        made = tuple((file, number, str(kind)) for number, kind in images)
        return MadeDefect(defect_id, class_number, x, y, index, made), self.wrapped(words, 0.05 * self.chance(0.3))

    def unknown(self) -> str:
        return self.rng.choice(("0", "-1", "1.5E3", "NA", '"a b"', "word", '""', "0.0000"))


# --- 1.8 -------------------------------------------------------------------------------------------------------------


class _Nested(_Maker):
    def make(self) -> Made:
        rng = self.rng
        found: dict[tuple[str, str], list[MadeDefect]] = {}
        slots: dict[tuple[str, str], int] = {}
        lots = []
        for i in range(rng.choice((1, 1, 2))):
            lot = f"{self.name()}.{i}"
            parts = [
                self.field("DiePitch", "15000000", "20000000"),
                self.field("OrientationMarkLocation", str(self.degrees)),
                self.field("RecipeID", '"r; {x}"', '"12-09-1971"', '"02:08:00"'),
                self.lookup(),
                self.unknown_record(),
            ]
            for j in range(rng.choice((0, 1, 1, 2))):
                wafer = f"{self.name()}.{j}"
                slots[lot, wafer] = j + 1
                found[lot, wafer], text = self.wafer(wafer, j + 1)
                parts.append(text)
            rng.shuffle(parts)
            lots.append(self.record("LotRecord", lot, parts))
        parts = [*lots, self.field("FileTimestamp", '"12-12-1972"', '"16:27:59"')]
        version = '"1.8"'
        body = self.braces(parts)
        text = f"Record FileRecord{self.gap()}{version}{self.space()}{body}{self.newline}"
        return self.finish(text, version="1.8", wafers=found, slots=slots)

    def braces(self, parts: Sequence[str]) -> str:
        inner = "".join(self.rng.choice(("", "  ", "\t")) + part + self.space() + self.newline for part in parts)
        return "{" + self.space() + self.newline + inner + "}"

    def record(self, name: str, identity: str | None, parts: Sequence[str]) -> str:
        head = f"Record {name}" + ("" if identity is None else f'{self.gap()}"{identity}"')
        return head + self.space() + self.braces(parts)

    def field(self, name: str, *values: str) -> str:
        comma = self.rng.choice((", ", ",", f",{self.newline}  "))
        return f"Field {name} {len(values)} {{{comma.join(values)}}}"

    def rows(self, name: str, columns: Sequence[str], rows: Sequence[str]) -> str:
        declared = self.rng.choice((", ", ",  ", f",{self.newline} ")).join(columns)
        body = "".join(
            self.rng.choice(("", "   ")) + row + self.rng.choice((";", " ;", f"{self.newline};")) + self.newline
            for row in rows
        )
        return (
            f"List {name}{self.space()}{{{self.space()}Columns {len(columns)} {{ {declared} }}{self.newline}"
            f"Data {len(rows)}{self.space()}{{{self.newline}{body}}}{self.space()}}}"
        )

    def lookup(self) -> str:
        columns = ["int32 CLASSNUMBER", "string CLASSNAME", "string CLASSCODE"]
        return self.rows("ClassLookupList", columns, [f'{n} "{name}" ""' for n, name in self.classes.items()])

    def unknown_record(self) -> str:
        inner = self.rows("OddList", ["string A", "int64 B"], ['"x; }" 7', '"" NA'])
        return self.record("VendorRecord", None, [self.field("Empty"), self.record("Inner", "1", [inner])])

    def wafer(self, wafer: str, slot: int) -> tuple[list[MadeDefect], str]:
        rng = self.rng
        form = rng.choice(("none", "named", "numbered", "pairs", "counted"))
        columns = [
            "int32 XREL",
            "int32 YREL",
            "int32 XINDEX",
            "int32 YINDEX",
            "int32 CLASSNUMBER",
            "float PHI",
            "string S",
        ]
        rng.shuffle(columns)
        columns.insert(0, "int32 DEFECTID")
        if form != "none":
            columns += ["int32 IMAGECOUNT", f"ImageList {rng.choice(('IMAGEINFO', 'Images', 'IMAGELIST'))}"]
        file = rng.choice(FILES)
        made = [self.defect(one, [column.split()[1] for column in columns], form, file) for one in self.ids()]
        test = self.rows("SampleTestPlanList", ["int32 XINDEX", "int32 YINDEX"], ["0 0", "-1 1"])
        parts = [
            self.field("SlotNumber", str(slot)),
            self.field("SampleCenterLocation", "100500", "-20000"),
            self.field("ImageFileName", f'"{file}"', '"TIF"'),
            self.rows("DefectList", columns, [row for _, row in made]),
            self.record("TestRecord", "1", [self.field("AreaPerTest", "2.00e+015"), test]),
        ]
        rng.shuffle(parts)
        return [defect for defect, _ in made], self.record("WaferRecord", wafer, parts)

    def defect(self, defect_id: int, columns: Sequence[str], form: str, file: str) -> tuple[MadeDefect, str]:
        rng = self.rng
        n = 0 if form == "none" else rng.choice((0, 1, 2, 3))
        images: list[tuple[str | None, int, str]] = [
            (rng.choice(FILES) if form == "named" else file, rng.randrange(1, 500), str(rng.randrange(3)))
            for _ in range(n)
        ]
        x, y = rng.randrange(10**7), rng.randrange(10**7)
        index = rng.randrange(-40, 40), rng.randrange(-40, 40)
        class_number = rng.choice(list(self.classes))
        cells = {
            "DEFECTID": str(defect_id),
            "XREL": str(x),
            "YREL": str(y),
            "XINDEX": str(index[0]),
            "YINDEX": str(index[1]),
            "CLASSNUMBER": str(class_number),
            "PHI": rng.choice(("0.0", "NA", "1e-039", "-1.5E3")),
            "S": rng.choice(('""', '"a; }"', "word")),
            "IMAGECOUNT": str(n),
        }
        words = [cells.get(column, "") for column in columns]
        if form != "none":
            words[-1] = self.image_cell(form, images)
        row = self.wrapped([word for word in words if word])
        return MadeDefect(defect_id, class_number, x / 1000, y / 1000, index, tuple(images)), row

    def image_cell(self, form: str, images: Sequence[tuple[str | None, int, str]]) -> str:
        if form in ("pairs", "counted"):
            pairs = [str(word) for _, number, kind in images for word in (number, kind)]
            return " ".join([str(len(images)), *pairs] if form == "counted" else pairs)
        if not images:
            return self.rng.choice(("N", ""))
        if form == "named":
            entries = [f'"{file}" "TIF" {number} "{kind}"' for file, number, kind in images]
        else:
            entries = [f'{number} "{kind}"' for _, number, kind in images]
        word = "Images" if len(images) > 1 else self.rng.choice(("Image", "Images"))
        return f"{word} {len(images)} {{ {', '.join(entries)} }}"


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(data: bytes, rng: random.Random) -> bytes:
    """A file with one to four faults: bytes changed, lost, doubled or moved, words swapped, the end cut off."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _damage_once(data, rng)
    return data


def _damage_once(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"FileVersion"
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    near = min(a + rng.randrange(1, 60), len(data))
    mark = rng.choice((b'"', b";", b"{", b"}", b",", b"\n", b" ", b"\0", b"\xff", b"NA", b"-", b"N"))
    number = rng.choice((b"99999999999999999999", b"-1", b"1e999", b"0", b"9" * 5000, b"1e-400", b"NaN", b"1.5"))
    words = data.split(b" ")
    i, j = rng.randrange(len(words)), rng.randrange(len(words))
    words[i], words[j] = words[j], words[i]
    faults = (
        data[:a] + bytes([rng.randrange(256)]) + data[a + 1 :],
        data[:a] + data[near:],
        data[:a] + data[a:near] + data[a:],
        data[:a],
        data[:a] + mark + data[a:],
        data[:a] + b" " + number + b" " + data[near:],
        data[:a] + data[b : b + 40] + data[a:b] + data[b + 40 :],
        b" ".join(words),
    )
    return rng.choice(faults)
