"""Every plausible layout of labelled images is read by the one reader."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.data.class_folders import UNNAMED
from semwatch_training.data.data_folders import read, read_normals
from semwatch_training.data.datasets import load_mask
from semwatch_training.data.labels import is_normal

HW = (64, 96)


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, HW, np.uint8))
    return path


def save_mask(path: Path, *, is_empty: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(HW, np.uint8)
    pixels[10:20, 30:50] = 0 if is_empty else 255
    assert cv2.imwrite(str(path), pixels)
    return path


def labels_of(folder: Path) -> dict[str, str]:
    return {sample.image.relative_to(folder).as_posix(): sample.label for sample in read(folder).test}


# ---- tables ----


@pytest.mark.parametrize(
    "text",
    [
        "image,label\na.png,void\nb.png,good\n",
        "a.png,void\nb.png,good\n",
        "filename;class\na.png;void\nb.png;OK\n",
        "Label\tFile\tlot\nvoid\ta.png\t7\nclean\tb.png\t7\n",
    ],
)
def test_flat_folder_with_a_table_is_read_whatever_parts_its_cells(tmp_path, text):
    for seed, name in enumerate(("a.png", "b.png")):
        save(tmp_path / name, seed)
    (tmp_path / "my labels.csv").write_text(text)
    assert labels_of(tmp_path) == {"a.png": "void", "b.png": DEFECT_FREE}


@pytest.mark.parametrize(
    "rows",
    [
        "image,x,y,w,h,label\na.png,30,10,20,10,void\na.png,0,0,4,4,open\nb.png,,,,,good\n",
        "a.png,30,10,20,10,void\na.png,0,0,4,4,open\nb.png,,,,,good\n",
        "image,label,xmin,ymin,xmax,ymax\na.png,void,30,10,50,20\na.png,open,0,0,4,4\nb.png,good,,,,\n",
    ],
)
def test_table_of_boxes_gives_a_defect_a_row(tmp_path, rows):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", 1)
    (tmp_path / "labels.csv").write_text(rows)
    void, opened, good = read(tmp_path, require_masks=True).test
    assert [(s.label, s.mask) for s in (void, opened)] == [("void", (30, 10, 50, 20)), ("open", (0, 0, 4, 4))]
    assert good.label == DEFECT_FREE
    mask = load_mask(void, HW)
    assert mask[10:20, 30:50].all()
    assert mask.sum() == 200
    assert load_mask(void, HW, whole_image=True).sum() == 216


def test_box_that_leaves_the_page_is_refused_when_its_mask_is_asked_for(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("image,x,y,w,h,label\na.png,90,10,20,10,void\n")
    with pytest.raises(ConfigError, match="leaves the page of 96 x 64 px"):
        load_mask(read(tmp_path).test[0], HW)


def test_table_can_be_named_itself(tmp_path):
    save(tmp_path / "a.png")
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text(f"image,label\na.png,{name[:3]}\n")
    assert [sample.label for sample in read(tmp_path / "two.csv").test] == ["two"]
    with pytest.raises(ConfigError, match=r"one\.csv, two\.csv could all be its labels"):
        read(tmp_path)


def test_image_that_is_defective_and_defect_free_is_refused(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("image,x,y,w,h,label\na.png,1,1,4,4,void\na.png,1,1,4,4,good\n")
    with pytest.raises(ConfigError, match=r"line 3: a\.png is 'defect-free', and 'void' in line 2"):
        read(tmp_path)


# ---- folders ----


def test_class_folders_without_masks_are_read_and_words_for_defect_free_are_one_class(tmp_path):
    for seed, name in enumerate(("void/a.png", "CLEAN_LAYER/b.png", "ok/c.png", "Defect Free/d.png")):
        save(tmp_path / name, seed)
    found = labels_of(tmp_path)
    assert found.pop("void/a.png") == "void"
    assert set(found.values()) == {DEFECT_FREE}
    assert not any(is_normal(name) for name in ("open", "freckle", "cleaning residue", ""))


@pytest.mark.parametrize(
    "mask", ["void/a_mask.png", "void/masks/a.png", "masks/void/a.png", "mask/a.png", "ground_truth/void/a_mask.png"]
)
def test_masks_are_found_beside_the_images_and_in_folders_of_their_own(tmp_path, mask):
    save(tmp_path / "void" / "a.png")
    save(tmp_path / "good" / "b.png", 1)
    drawn = save_mask(tmp_path / mask)
    samples = read(tmp_path, require_masks=True).test
    assert [(s.image.name, s.mask) for s in samples if s.label == "void"] == [("a.png", drawn)]
    assert len(samples) == 2


def test_png_of_two_levels_beside_a_photograph_is_its_mask_and_another_picture_is_none(tmp_path):
    save(tmp_path / "void" / "a.jpg")
    save_mask(tmp_path / "void" / "a.png")
    save(tmp_path / "void" / "b.jpg", 1)
    save(tmp_path / "void" / "b.png", 2)
    found = {sample.image.name: sample.mask for sample in read(tmp_path).test}
    assert set(found) == {"a.jpg", "b.jpg", "b.png"}
    assert found["a.jpg"] == tmp_path / "void" / "a.png"


def test_images_and_masks_alone_are_one_class_where_a_mask_marks_anything(tmp_path):
    for seed, name in enumerate("abc"):
        save(tmp_path / "images" / f"{name}.png", seed)
    save_mask(tmp_path / "masks" / "a.png")
    save_mask(tmp_path / "masks" / "b.png", is_empty=True)
    assert labels_of(tmp_path / ".") == {
        "images/a.png": UNNAMED,
        "images/b.png": DEFECT_FREE,
        "images/c.png": DEFECT_FREE,
    }


# ---- boxes of detectors ----


def coco(images: list[str], annotations: list[dict[str, object]]) -> str:
    return json.dumps(
        {
            "images": [{"id": k, "file_name": name} for k, name in enumerate(images)],
            "annotations": annotations,
            "categories": [{"id": 3, "name": "void"}],
        }
    )


@pytest.mark.parametrize("place", ["annotations/instances_test.json", "labels.json"])
def test_coco_file_is_read_and_an_image_without_a_box_is_defect_free(tmp_path, place):
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "images" / "b.png", 1)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(
        coco(["a.png", "b.png"], [{"image_id": 0, "category_id": 3, "bbox": [30, 10, 20, 10]}])
    )
    void, good = read(tmp_path, require_masks=True).test
    assert (void.label, void.mask, good.label) == ("void", (30, 10, 50, 20), DEFECT_FREE)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}, "not COCO's form"),
        ({"image_id": 0, "category_id": 3, "bbox": [0, 0, "NaN", 1]}, "is none; mend it"),
        ({"image_id": 0, "category_id": 3}, "each annotation needs image_id, category_id and bbox"),
    ],
)
def test_bad_coco_file_is_refused_with_what_it_needs(tmp_path, annotation, message):
    save(tmp_path / "a.png")
    (tmp_path / "labels.json").write_text(coco(["a.png"], [annotation]))
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "text"),
    [("data.yaml", "names: [open, void]"), ("data.yaml", "names: {1: void}"), ("classes.txt", "open\nvoid\n")],
)
def test_yolo_files_are_read_with_their_split(tmp_path, names, text):
    for seed, name in enumerate(("train/a.png", "val/b.png", "val/c.png")):
        save(tmp_path / "images" / name, seed)
    for name in ("train/a.txt", "val/b.txt"):
        (tmp_path / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "labels" / name).write_text("1 0.5 0.5 0.25 0.5\n")
    (tmp_path / names).write_text(text)
    found = read(tmp_path, require_masks=True)
    assert [(s.image.name, s.label, s.mask) for s in found.train] == [("a.png", "void", (36, 16, 60, 48))]
    assert [(s.image.name, s.label) for s in found.test] == [("b.png", "void"), ("c.png", DEFECT_FREE)]


def test_yolo_line_that_is_no_box_is_refused_with_its_number(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("void\n")
    (tmp_path / "a.txt").write_text("0 .5 .5 .1 .1\n7 .5 .5 .1 .1\n")
    with pytest.raises(
        ConfigError, match=r"a\.txt line 2: '7 \.5 \.5 \.1 \.1'; write a class number that has a name \(1"
    ):
        read(tmp_path)


# ---- normal images ----


def test_normal_images_are_all_of_a_plain_folder_without_its_masks(tmp_path):
    for seed, name in enumerate(("a.png", "lot2/b.png", "masks/a.png")):
        save(tmp_path / name, seed)
    assert [path.name for path in read_normals(tmp_path)] == ["a.png", "b.png"]


def test_normal_images_of_a_labelled_set_are_the_normal_ones(tmp_path):
    for seed, name in enumerate(("train/good/a.png", "test/good/b.png", "test/void/c.png")):
        save(tmp_path / name, seed)
    assert [path.name for path in read_normals(tmp_path)] == ["b.png", "a.png"]
    with pytest.raises(ConfigError, match="is not a folder of images"):
        read_normals(tmp_path / "absent")
