import csv
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from paths import DATA
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch_training.synthetic import (
    DEFECT_TYPES,
    STAGES,
    LotManifest,
    SyntheticMicrograph,
    lot_images,
    render,
    write_image,
    write_lot,
)
from semwatch_training.synthetic.rendering import VISIBLE
from semwatch_training.synthetic.shapes import NoRoom, across
from semwatch_training.synthetic.specimen import Specimen

LAYOUT = DATA / "EMSEC-IC-layout-SVG" / "dataset" / "labels" / "label0000.svg"
SIZE = (192, 256)
EVERY_TYPE = [(stage, label) for stage in STAGES for label in DEFECT_TYPES[stage]]

SMALL_LAYOUT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 800">
{tracks}
<circle cx="400" cy="410" r="8" fill="red"/>
</svg>"""
TRACKS = "\n".join(f'<path d="M0,{y} L800,{y} L800,{y + 20} L0,{y + 20} Z"/>' for y in range(0, 800, 40))


def _layout(folder: Path, tracks: str = TRACKS) -> Path:
    path = folder / "layout.svg"
    path.write_text(SMALL_LAYOUT.format(tracks=tracks))
    return path


# ---- one micrograph ----


@pytest.mark.parametrize("stage", STAGES)
def test_field_without_defects_has_no_masks(stage: str) -> None:
    shown = render(stage, seed=0, size_hw=SIZE)
    assert shown.pixels.shape == SIZE
    assert shown.pixels.dtype == np.uint8
    assert shown.masks.shape == (0, *SIZE)
    assert shown.masks.dtype == np.bool_
    assert (shown.labels, shown.stage, shown.seed) == ((), stage, 0)
    assert 0.05 < shown.pixel_nm < 50


def test_there_are_fifteen_types_and_none_belongs_to_two_stages() -> None:
    labels = list(itertools.chain.from_iterable(DEFECT_TYPES.values()))
    assert [len(DEFECT_TYPES[stage]) for stage in ("BEOL", "DEP", "DPR")] == [6, 2, 7]
    assert len(set(labels)) == 15
    assert DEFECT_FREE not in labels


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_gives_same_bytes(stage: str) -> None:
    defects = DEFECT_TYPES[stage][:2]
    one, two = (render(stage, seed=3, size_hw=SIZE, defects=defects) for _ in range(2))
    assert one.pixels.tobytes() == two.pixels.tobytes()
    assert one.masks.tobytes() == two.masks.tobytes()


@pytest.mark.parametrize("stage", STAGES)
def test_different_seeds_and_stages_differ(stage: str) -> None:
    field = render(stage, seed=1, size_hw=SIZE).pixels
    assert not np.array_equal(field, render(stage, seed=2, size_hw=SIZE).pixels)
    assert all(not np.array_equal(field, render(s, seed=1, size_hw=SIZE).pixels) for s in STAGES if s != stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size_hw", [(64, 64), (64, 300), (257, 129)])
def test_any_size_from_64_px_is_rendered(stage: str, size_hw: tuple[int, int]) -> None:
    assert render(stage, seed=5, size_hw=size_hw).pixels.shape == size_hw


@pytest.mark.parametrize("stage", STAGES)
def test_gray_levels_are_those_of_a_well_set_microscope(stage: str) -> None:
    for seed in range(8):
        pixels = render(stage, seed=seed, size_hw=SIZE).pixels
        assert 60 < pixels.mean() < 190
        assert pixels.std() > 5
        assert np.mean((pixels == 0) | (pixels == 255)) < 0.1


# ---- defects ----


@pytest.mark.parametrize(("stage", "label"), EVERY_TYPE)
@pytest.mark.parametrize("size_hw", [SIZE, (384, 384)])
def test_mask_holds_what_differs_from_the_clean_twin_and_nothing_else_does(
    stage: str, label: str, size_hw: tuple[int, int]
) -> None:
    for seed in (10, 11):
        clean = render(stage, seed=seed, size_hw=size_hw)
        struck = render(stage, seed=seed, size_hw=size_hw, defects=(label,))
        difference = np.abs(struck.ideal - clean.ideal)
        mask = struck.masks[0]
        assert mask.sum() >= 6
        assert mask.mean() < 0.25
        assert difference[mask].min() > 0.8 * VISIBLE  # brightness over the field may scale it a little
        around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        assert np.mean(difference[~around] > 1.3 * VISIBLE) < 1e-3
        assert np.array_equal(struck.pixels[difference == 0], clean.pixels[difference == 0])
        assert np.mean(difference == 0) > 0.25
        seen = np.abs(struck.pixels.astype(int) - clean.pixels)[mask]
        assert seen.mean() > 4


def test_several_defects_have_their_own_masks_in_order() -> None:
    labels = ("particle", "open", "bridge")
    shown = render("BEOL", seed=4, size_hw=(384, 384), defects=labels)
    assert shown.labels == labels
    assert shown.masks.shape[0] == 3
    assert shown.masks.sum(axis=0).max() == 1, "they do not overlap"


def test_first_defect_stays_where_it_is_when_others_join() -> None:
    one = render("DPR", seed=4, size_hw=(384, 384), defects=("pit",))
    two = render("DPR", seed=4, size_hw=(384, 384), defects=("pit", "residue"))
    assert np.array_equal(one.masks[0], two.masks[0])


def test_bridge_joins_two_lines_and_open_makes_two_of_one() -> None:
    """Seen in the ideal image of bright polished lines: the number of bright pieces falls or rises."""

    def n_lines(shown: SyntheticMicrograph) -> int:
        smooth = cv2.GaussianBlur(shown.ideal, (0, 0), 1.5)
        threshold = (np.percentile(smooth, 5) + np.percentile(smooth, 95)) / 2
        _, _, stats, _ = cv2.connectedComponentsWithStats((smooth > threshold).astype(np.uint8))
        return int(np.sum(stats[1:, cv2.CC_STAT_AREA] > 60))

    clean, bridged, opened = (
        render("BEOL", seed=1, size_hw=(384, 384), defects=d) for d in ((), ("bridge",), ("open",))
    )
    assert n_lines(bridged) < n_lines(clean) < n_lines(opened)


def test_particle_is_brighter_and_pinhole_darker_than_what_was_there() -> None:
    for stage, label, sign in (("BEOL", "particle", 1), ("DEP", "pinhole", -1)):
        clean = render(stage, seed=6, size_hw=(384, 384))
        struck = render(stage, seed=6, size_hw=(384, 384), defects=(label,))
        core = cv2.erode(struck.masks[0].astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        extreme = (struck.ideal - clean.ideal)[core] * sign
        assert extreme.max() > 0.1


@pytest.mark.parametrize("width_px", [12, 30, 58])
def test_chord_goes_straight_across_a_line_of_any_width(width_px: int) -> None:
    zeros = np.zeros((256, 256), np.float32)
    lines = zeros.copy()
    for x in range(0, 256, 64):
        lines[:, x : x + width_px] = 1
    specimen = Specimen({}, zeros, zeros, pitch=64.0)
    for seed in range(20):
        chord = across(specimen, lines, np.random.default_rng(seed))
        assert chord.length_px == pytest.approx(width_px, abs=3)
        assert (chord.middle[0] - width_px / 2) % 64 == pytest.approx(0, abs=2) or (
            chord.middle[0] - width_px / 2
        ) % 64 == pytest.approx(64, abs=2)


def test_no_room_for_a_defect_is_said_so() -> None:
    zeros = np.zeros((64, 64), np.float32)
    with pytest.raises(NoRoom, match="another seed"):
        across(Specimen({}, zeros, zeros, pitch=16.0), zeros, np.random.default_rng(0))


# ---- refusals ----


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"stage": "FEOL"}, "unknown process stage 'FEOL'"),
        ({"stage": "DEP", "defects": ("bridge",)}, "choose from bubble, pinhole"),
        ({"stage": "DEP", "size_hw": (63, 200)}, "at least 64"),
        ({"stage": "DPR", "layout_svg": Path("x.svg")}, "BEOL"),
        ({"stage": "BEOL", "layout_svg": Path("absent.svg")}, "cannot read the layout"),
    ],
)
def test_wrong_request_is_refused_with_what_to_choose(kwargs: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        render(**{"seed": 0, "size_hw": SIZE} | kwargs)  # type: ignore[arg-type]


# ---- layouts ----


def test_own_layout_is_drawn(tmp_path: Path) -> None:
    path = _layout(tmp_path)
    shown = render("BEOL", seed=2, size_hw=SIZE, layout_svg=path)
    columns = shown.ideal.mean(axis=0)[20:-20].std()
    rows = shown.ideal.mean(axis=1)[20:-20].std()
    assert rows > 4 * columns, "its tracks run along x"


def test_layout_with_relative_and_horizontal_commands_is_the_same_layout(tmp_path: Path) -> None:
    absolute = render("BEOL", seed=2, size_hw=SIZE, layout_svg=_layout(tmp_path)).pixels
    tracks = "\n".join(f'<path d="m0 {y}h800v20H0z"/>' for y in range(0, 800, 40))
    relative = render("BEOL", seed=2, size_hw=SIZE, layout_svg=_layout(tmp_path, tracks)).pixels
    assert np.array_equal(absolute, relative)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a layout in SVG"),
        ("<svg><path d='M0,0", "not a layout in SVG"),
        ("<svg></svg>", "at least one <path>"),
        ("<svg><path d='M0,0 L9,0 L9,9 Z'/></svg>", "at least one <path>"),
        ("<svg><path/><circle cx='1' cy='1' r='1'/></svg>", "not a layout in SVG"),
        ("<svg><path d='M0,0 C1,1 2,2 3,3'/><circle cx='1' cy='1' r='1'/></svg>", "straight line"),
        ("<svg><path d='0,0 L1,1'/><circle cx='1' cy='1' r='1'/></svg>", "starts with a number"),
        ("<svg><path d='M0,0 L9,0 L9'/><circle cx='1' cy='1' r='1'/></svg>", "not a layout in SVG"),
        ("<svg><path d='M0,0 L9,0 L9,1e999 Z'/><circle cx='1' cy='1' r='1'/></svg>", "finite"),
        ("<svg><path d='M0,0 L9,0 L9,9 Z'/><circle cx='one' cy='1' r='1'/></svg>", "not a layout in SVG"),
        ("<svg><path d='M0,0 L9,0 L9,9 Z'/><circle cx='1' cy='1' r='-1'/></svg>", "radii over 0"),
        ("<svg><path d='M0,0 L9,0 L9,9 Z'/><circle cx='nan' cy='1' r='1'/></svg>", "finite"),
        ("<!DOCTYPE svg [<!ENTITY a 'b'>]><svg>&a;</svg>", "entities"),
    ],
)
def test_malformed_layout_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "broken.svg"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        render("BEOL", seed=0, size_hw=SIZE, layout_svg=path)
    assert "broken.svg" in str(refused.value)


@pytest.mark.skipif(not LAYOUT.is_file(), reason="no layout data")
@pytest.mark.parametrize("label", DEFECT_TYPES["BEOL"])
def test_every_metal_defect_finds_its_place_in_a_real_layout(label: str) -> None:
    shown = render("BEOL", seed=7, size_hw=(256, 256), defects=(label,), layout_svg=LAYOUT)
    assert shown.masks[0].any()


# ---- lots ----


@pytest.fixture(scope="module")
def lot(tmp_path_factory: pytest.TempPathFactory) -> LotManifest:
    return write_lot(tmp_path_factory.mktemp("lot"), n=14, seed=8, size_hw=SIZE)


def _rows(manifest: LotManifest) -> list[dict[str, str]]:
    with manifest.labels_csv.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_empty_lot_is_whole(tmp_path: Path) -> None:
    manifest = write_lot(tmp_path / "new", n=0, seed=0)
    assert (manifest.images, manifest.n_defects) == ((), 0)
    assert manifest.klarf.read_text().rstrip().endswith("EndOfFile;")
    assert _rows(manifest) == []


def test_field_and_pixel_size_of_every_image_are_found_again(lot: LotManifest) -> None:
    heights = set()
    for path, image in zip(lot.images, lot_images(n=14, seed=8, size_hw=SIZE), strict=True):
        (page,) = decoding.read(path)
        assert page.field_xyxy == (0, 0, SIZE[1], SIZE[0])
        assert np.array_equal(page.field, image.micrograph.pixels)
        assert page.pixels.shape == image.page_hw
        if path.suffix == ".tif":
            assert page.vendor == "FEI"
            assert page.pixel_nm == pytest.approx(image.micrograph.pixel_nm)
        heights.add(page.pixels.shape[0])
    assert len(heights) == 2, "some have an info bar, some have not"


def test_labels_masks_and_images_agree(lot: LotManifest) -> None:
    rows = _rows(lot)
    assert {row["file"] for row in rows} == {path.name for path in lot.images}
    found = [row for row in rows if row["defect"] != "0"]
    assert len(found) == lot.n_defects == len(list((lot.folder / "masks").iterdir()))
    for row in found:
        assert row["label"] in DEFECT_TYPES[row["stage"]]
        mask = cv2.imread(str(lot.folder / "masks" / f"{Path(row['file']).stem}_{row['defect']}.png"), 0)
        assert mask is not None
        x, y, width, height = cv2.boundingRect(mask)
        assert [x, y, x + width, y + height] == [int(row[key]) for key in ("x0", "y0", "x1", "y1")]
        assert mask.shape == decoding.read(lot.folder / row["file"])[0].pixels.shape
    clean = [row for row in rows if row["defect"] == "0"]
    assert clean
    assert all((row["label"], row["x0"]) == (DEFECT_FREE, "") for row in clean)


def test_klarf_has_one_record_per_label_with_as_many_columns_as_it_says(lot: LotManifest) -> None:
    lines = lot.klarf.read_text().splitlines()
    assert lines[0] == "FileVersion 1 2;"
    assert lines[-1] == "EndOfFile;"
    spec = next(line for line in lines if line.startswith("DefectRecordSpec")).removesuffix(" ;").split()
    columns = spec[2:]
    assert int(spec[1]) == len(columns)
    names = [line.split()[1].rstrip(";") for line in lines if line.startswith("TiffFileName")]
    assert names == [path.name for path in lot.images]
    first, last = lines.index(f"TiffFileName {names[0]};"), next(i for i, x in enumerate(lines) if "SummarySpec" in x)
    records = [line.rstrip(";").split() for line in lines[first:last] if line.startswith(" ")]
    assert len(records) == len(_rows(lot))
    classes = _klarf_classes(lines)
    for i, (record, row) in enumerate(zip(records, _rows(lot), strict=True), start=1):
        assert record[0] == str(i)
        assert len(record) == len(columns) + 2, "the image list has three fields: count, number, flag"
        assert classes[record[columns.index("MANSEMCLASS")]] == row["label"]


def _klarf_classes(lines: list[str]) -> dict[str, str]:
    start = next(i for i, line in enumerate(lines) if line.startswith("ClassLookup"))
    count = int(lines[start].split()[1])
    pairs = [line.strip().rstrip(";").split(" ", 1) for line in lines[start + 1 : start + 1 + count]]
    return {number: label.strip('"') for number, label in pairs}


def test_same_seed_writes_the_same_lot(lot: LotManifest, tmp_path: Path) -> None:
    again = write_lot(tmp_path, n=14, seed=8, size_hw=SIZE)
    for name in ["LOT.klarf", "labels.csv", *(path.name for path in lot.images)]:
        assert (lot.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_lot_is_dropped_image_by_image(tmp_path: Path) -> None:
    seen: list[tuple[int, list[str]]] = []

    def on_image(index: int, path: Path) -> None:
        assert path.is_file()
        seen.append((index, sorted(p.name for p in tmp_path.iterdir() if p.is_file())))

    write_lot(tmp_path, n=3, seed=1, size_hw=(64, 64), on_image=on_image)
    assert [len(files) for _, files in seen] == [1, 2, 3]
    assert [index for index, _ in seen] == [0, 1, 2]


def test_single_image_is_written_whole_under_its_name(tmp_path: Path) -> None:
    image = next(lot_images(n=1, seed=1, size_hw=(64, 64)))
    path = write_image(tmp_path, image)
    assert [p.name for p in tmp_path.iterdir()] == [image.name]
    assert path.read_bytes() == image.content


def test_lot_holds_only_the_types_asked_for() -> None:
    images = list(
        lot_images(n=8, seed=2, stages=["DEP"], defect_types=["pinhole"], defect_free_share=0, size_hw=(64, 64))
    )
    assert {label for image in images for label in image.micrograph.labels} == {"pinhole"}
    assert all(image.boxes_xyxy for image in images)
    assert all(not image.boxes_xyxy for image in lot_images(n=3, seed=2, defect_free_share=1, size_hw=(64, 64)))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"stages": ["FEOL"]}, "FEOL"),
        ({"stages": []}, "unknown stage"),
        ({"defect_types": ["dent"]}, "dent"),
        ({"defect_types": ["bridge"]}, "none of the defect types belongs to DEP, DPR"),
        ({"defect_free_share": 1.5}, "outside"),
    ],
)
def test_wrong_lot_is_refused_before_anything_is_written(tmp_path: Path, kwargs: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        write_lot(tmp_path / "lot", n=2, seed=0, size_hw=(64, 64), **kwargs)  # type: ignore[arg-type]
    assert not (tmp_path / "lot").exists()
