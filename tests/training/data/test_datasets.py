import csv
import re
import shutil
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError, ImageError
from semwatch.intake import decoding
from semwatch_training.data import datasets
from semwatch_training.data.data_folders import read
from semwatch_training.data.datasets import (
    DataSet,
    Sample,
    checked,
    distinct,
    duplicates,
    leaks,
    load_gray,
    load_mask,
    refuse_leakage,
    synthetic_set,
)
from semwatch_training.data.public_sets import MTD_CLASSES, MTD_SPLIT, mtd_tiles, read_mtd, read_sd_saliency
from semwatch_training.synthetic import DEFECT_TYPES, write_lot
from semwatch_training.synthetic.info_bar import draw_info_bar
from semwatch_training.synthetic.shapes import NoRoom

HW = (72, 96)


def save(
    path: Path, seed: int | None = None, *, hw: tuple[int, int] = HW, box: tuple[int, int, int, int] | None = None
):
    """Save noise of a seed, or a mask that is 255 in a box (x0, y0, x1, y1)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(hw, np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, hw, np.uint8)
    if box is not None:
        pixels[box[1] : box[3], box[0] : box[2]] = 255
    assert cv2.imwrite(str(path), pixels)
    return path


def table(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text(text)
    return folder


def plain(folder: Path) -> Path:
    for seed, name in enumerate(("a.png", "b.png", "lot2/c.png")):
        save(folder / "images" / name, seed)
    save(folder / "masks" / "b.png", box=(10, 20, 30, 40))
    save(folder / "masks" / "lot2" / "c.png", box=(0, 0, 5, 5))
    return table(folder, "image,label,split\na.png,good,train\nb.png,bridge,train\nlot2/c.png,void,test\n")


# ---- the set ----


def test_empty_set_has_no_labels():
    empty = DataSet("none", (), ())
    assert (empty.known_labels, empty.counts) == ((), {})


def test_labels_only_in_the_test_part_are_not_known():
    samples = {label: Sample(Path(f"{label}.png"), label) for label in ("void", "bridge", "open", DEFECT_FREE)}
    train = samples["void"], samples["bridge"], samples[DEFECT_FREE]
    data_set = DataSet("d", train, (samples["open"], samples["void"], samples[DEFECT_FREE]))
    assert data_set.known_labels == ("bridge", "void")
    assert data_set.counts == {"bridge": (1, 0), DEFECT_FREE: (1, 1), "open": (0, 1), "void": (1, 1)}


def test_labels_outside_the_list_and_labels_without_a_sample_are_refused():
    data_set = DataSet("d", (), (Sample(Path("a"), "void"), Sample(Path("b"), DEFECT_FREE)))
    assert checked(data_set, labels=["void"]) is data_set
    assert checked(data_set, labels=["void", DEFECT_FREE]) is data_set
    with pytest.raises(ConfigError, match="unknown labels void; known are open"):
        checked(data_set, labels=["open"])
    with pytest.raises(ConfigError, match="no sample of open"):
        checked(data_set, labels=["open", "void"])


def test_defects_without_mask_are_counted_and_five_of_them_named():
    bare = tuple(Sample(Path(f"{i}.png"), "void") for i in range(7))
    assert checked(DataSet("d", (), bare)).test == bare
    with pytest.raises(ConfigError, match=r"7 defects have no mask \(0.png, 1.png, 2.png, 3.png, 4.png \.\.\.\)"):
        checked(DataSet("d", bare, ()), require_masks=True)
    with_mask = Sample(Path("a.png"), "void", Path("m.png"))
    assert checked(DataSet("d", (with_mask, Sample(Path("n.png"), DEFECT_FREE)), ()), require_masks=True)


# ---- pixels ----


def test_gray_is_the_field_as_the_daemon_reads_it(tmp_path):
    sample = Sample(save(tmp_path / "a.png", 1), "void")
    assert np.array_equal(load_gray(sample), cv2.imread(str(sample.image), cv2.IMREAD_GRAYSCALE))
    assert load_gray(sample).shape == HW


def test_broken_image_is_an_image_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"a\.png"):
        load_gray(Sample(tmp_path / "a.png", "void"))


def test_mask_of_a_normal_image_is_empty_whatever_lies_beside_it(tmp_path):
    assert not load_mask(Sample(tmp_path / "absent.png", DEFECT_FREE), HW).any()
    ignored = save(tmp_path / "m.png", box=(0, 0, 9, 9))
    mask = load_mask(Sample(tmp_path / "absent.png", DEFECT_FREE, ignored), HW)
    assert mask.shape == HW
    assert mask.dtype == np.bool_
    assert not mask.any()


def test_mask_of_a_defect_that_nobody_drew_is_not_taken_for_empty(tmp_path):
    with pytest.raises(ConfigError, match="no mask shows its 'void'"):
        load_mask(Sample(tmp_path / "a.png", "void"), HW)


def test_mask_is_true_above_127(tmp_path):
    levels = np.zeros(HW, np.uint8)
    levels[0, :4] = 127, 128, 255, 1
    assert cv2.imwrite(str(tmp_path / "m.png"), levels)
    mask = load_mask(Sample(tmp_path / "a.png", "void", tmp_path / "m.png"), HW)
    assert mask[0, :4].tolist() == [False, True, True, False]
    assert mask.sum() == 2


def test_empty_mask_of_a_defect_is_accepted(tmp_path):
    sample = Sample(save(tmp_path / "a.png", 1), "void", save(tmp_path / "m.png"))
    assert not load_mask(sample, HW).any()


def test_mask_of_zeros_and_ones_is_refused_rather_than_read_as_empty(tmp_path):
    assert cv2.imwrite(str(tmp_path / "m.png"), np.eye(*HW, dtype=np.uint8))
    with pytest.raises(ConfigError, match="only up to 1; save the mask with 0 and 255"):
        load_mask(Sample(tmp_path / "a.png", "void", tmp_path / "m.png"), HW)


def test_mask_of_another_size_is_refused_with_all_sizes(tmp_path):
    image, mask = save(tmp_path / "a.png", 1), save(tmp_path / "m.png", hw=(96, 72), box=(0, 0, 5, 5))
    with pytest.raises(
        ConfigError, match=r"m\.png: the mask is 72 x 96 px, its image a\.png has a field of 96 x 72 px"
    ):
        load_mask(Sample(image, "void", mask), HW)


def test_mask_is_refused_where_another_size_than_the_fields_is_asked_for(tmp_path):
    sample = Sample(save(tmp_path / "a.png", 1), "void", save(tmp_path / "m.png", box=(0, 0, 5, 5)))
    with pytest.raises(ConfigError, match="224 x 224 px were asked for"):
        load_mask(sample, (224, 224))


def page_with_bar(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    field = np.random.default_rng(3).integers(60, 200, (400, 512), np.uint8)
    bar = draw_info_bar(512, 2.0, "01/05/2026 08:00", "ETD", dark=True)
    assert cv2.imwrite(str(folder / "a.png"), np.vstack([field, bar]))
    assert cv2.imwrite(str(folder / "top.png"), np.vstack([bar[::-1], field]))
    return field, bar


def test_mask_drawn_on_the_page_is_cut_with_the_info_bar(tmp_path):
    field, bar = page_with_bar(tmp_path)
    save(tmp_path / "m.png", hw=(400 + len(bar), 512), box=(100, 390, 140, 400))
    sample = Sample(tmp_path / "a.png", "void", tmp_path / "m.png")
    gray = load_gray(sample)
    assert np.array_equal(gray, field)
    rows, columns = np.nonzero(load_mask(sample, (400, 512)))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (100, 390, 139, 399)


def test_mask_drawn_on_the_field_alone_stays_as_it_is(tmp_path):
    page_with_bar(tmp_path)
    save(tmp_path / "m.png", hw=(400, 512), box=(100, 390, 140, 400))
    rows, _ = np.nonzero(load_mask(Sample(tmp_path / "a.png", "void", tmp_path / "m.png"), (400, 512)))
    assert (rows.min(), rows.max()) == (390, 399)


def test_info_bar_on_top_does_not_shift_mask_against_image(tmp_path):
    page_with_bar(tmp_path)
    page = decoding.read(tmp_path / "top.png")[0]
    assert page.field_xyxy[1] > 0, "the bar on top must be found, or nothing is tested"
    above = page.field_xyxy[1]
    save(tmp_path / "m.png", hw=page.pixels.shape, box=(7, above + 5, 9, above + 8))
    mask = load_mask(Sample(tmp_path / "top.png", "void", tmp_path / "m.png"), page.field.shape)
    assert sorted(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True)) == [
        (y, x) for y in (5, 6, 7) for x in (7, 8)
    ]


def test_whole_image_adds_the_masks_of_the_images_other_defects(tmp_path):
    own, other = (save(tmp_path / f"{x}.png", box=(x, 0, x + 2, 2)) for x in (10, 50))
    sample = Sample(tmp_path / "a.png", "void", own, (other,))
    assert load_mask(sample, HW).sum() == 4
    whole = load_mask(sample, HW, whole_image=True)
    assert whole[:2, 10:12].all()
    assert whole[:2, 50:52].all()
    assert whole.sum() == 8


# ---- duplicates and leakage ----


def test_no_images_have_no_duplicates_and_no_leaks():
    assert duplicates([]) == ()
    assert distinct([]) == ()
    assert refuse_leakage([], []) == ()


def test_nothing_leaks_from_an_empty_training_part_and_nothing_is_decoded(tmp_path):
    assert leaks([], [Sample(tmp_path / "absent.png", "void")]) == ()


def same_pixels(folder: Path) -> list[Sample]:
    """Four files of the same pixels in an order, and one of others."""
    first = save(folder / "a.png", 1)
    pixels = cv2.imread(str(first), cv2.IMREAD_GRAYSCALE)
    shutil.copy(first, folder / "b.png")
    assert cv2.imwrite(str(folder / "c.bmp"), pixels)
    tifffile.imwrite(folder / "d.tif", pixels, compression="zlib")
    save(folder / "e.png", 2)
    return [Sample(path, "void") for path in sorted(folder.iterdir())]


def test_copies_and_recodings_are_duplicates_and_other_images_are_not(tmp_path):
    samples = same_pixels(tmp_path)
    assert [[path.name for path in group] for group in duplicates(samples)] == [["a.png", "b.png", "c.bmp", "d.tif"]]
    assert [sample.image.name for sample in distinct(samples)] == ["a.png", "e.png"]


def test_two_defects_of_one_image_file_are_no_duplicates(tmp_path):
    image = save(tmp_path / "a.png", 1)
    samples = [Sample(image, "void"), Sample(image, "bridge")]
    assert duplicates(samples) == ()
    assert distinct(samples) == tuple(samples)


def test_same_bytes_in_another_shape_are_no_duplicates(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, HW, np.uint8)
    for name, hw in (("a.png", HW), ("b.png", HW[::-1])):
        assert cv2.imwrite(str(tmp_path / name), pixels.reshape(hw))
    assert duplicates(Sample(path, "void") for path in tmp_path.iterdir()) == ()


def test_same_field_with_and_without_info_bar_leaks(tmp_path):
    field, _ = page_with_bar(tmp_path)
    assert cv2.imwrite(str(tmp_path / "bare.png"), field)
    train, test = Sample(tmp_path / "a.png", "void"), Sample(tmp_path / "bare.png", "void")
    assert leaks([train], [test]) == ((train.image, test.image),)


def test_leakage_is_refused_and_both_files_are_named(tmp_path):
    *same, other = same_pixels(tmp_path)
    assert refuse_leakage(same, [other]) == ()
    with pytest.raises(ConfigError, match=r"1 test images .*a\.png and .*c\.bmp\).* allow leakage"):
        refuse_leakage([same[0], other], [same[2]])


def test_leakage_names_five_pairs_and_counts_the_others(tmp_path):
    train = [Sample(save(tmp_path / f"{i}.png", i), "void") for i in range(7)]
    test = [Sample(Path(shutil.copy(s.image, tmp_path / f"copy{s.image.name}")), "void") for s in train]
    with pytest.raises(ConfigError, match=r"7 test images .*; and 2 more") as refused:
        refuse_leakage(train, test)
    assert len(re.findall(r"copy\d\.png", str(refused.value))) == 5


def test_the_same_file_on_both_sides_leaks(tmp_path):
    sample = Sample(save(tmp_path / "a.png", 1), "void")
    assert leaks([sample], [sample]) == ((sample.image, sample.image),)


def test_allowed_leakage_is_returned(tmp_path):
    first, copy, *_ = same_pixels(tmp_path)
    assert refuse_leakage([first], [copy], allow=True) == ((first.image, copy.image),)


# ---- plain ----


def test_plain_folder_has_labels_masks_and_split(tmp_path):
    data_set = read(plain(tmp_path / "steel"))
    images, masks = tmp_path / "steel" / "images", tmp_path / "steel" / "masks"
    assert data_set == DataSet(
        "steel",
        (Sample(images / "a.png", DEFECT_FREE), Sample(images / "b.png", "bridge", masks / "b.png")),
        (Sample(images / "lot2" / "c.png", "void", masks / "lot2" / "c.png"),),
    )
    assert load_mask(data_set.train[1], HW).sum() == 400


def test_plain_folder_without_split_is_all_test(tmp_path):
    save(tmp_path / "images" / "a.png", 1)
    data_set = read(table(tmp_path, "image,label\na.png,void\n"))
    assert (len(data_set.train), len(data_set.test)) == (0, 1)
    assert data_set.test[0].mask is None


def test_table_as_excel_saves_it_is_read(tmp_path):
    save(tmp_path / "images" / "a.png", 1)
    (tmp_path / "labels.csv").write_bytes("\ufeffimage,label\r\n a.png , void \r\n,\r\n\r\n".encode())
    assert [sample.label for sample in read(tmp_path).test] == ["void"]


def test_images_without_a_row_are_not_part_of_the_set(tmp_path):
    save(plain(tmp_path) / "images" / "more.png", 9)
    assert len(read(tmp_path).train) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line is ''; the nearest layout is a table of labels: it must be image,label or image,label,sp"),
        ("image,lot\na.png,void\n", "its first line is 'image,lot'; the nearest layout is a table of labels"),
        ("image,label,spilt\na.png,void,test\n", "its first line is 'image,label,spilt'; write split for 'spilt'"),
        ("image,x,y,label\na.png,1,2,void\n", "its first line is 'image,x,y,label'; the nearest layout is"),
        ("image,x,y,w,h,label\na.png,1,2,a,4,void\n", "line 2: the box '1,2,a,4' is not four numbers; write pixels"),
        ("image,x,y,w,h,label\na.png,1,2,0,4,void\n", "line 2: the box '1,2,0,4' is empty; write x,y,w,h in pixels"),
        ("image,x,y,w,h,label\na.png,1,2,inf,4,void\n", "line 2: the box '1,2,inf,4' is not four numbers"),
        ("image,label\na.png,void\na.png,open\n", "line 3: a.png is 'open', and 'void' in line 2; keep one row .* box"),
        ("image,label\n", "no rows"),
        ("image,label\na.png\n", "line 2: 'a.png'; write 2 values"),
        ("image,label\na.png,void,test\n", "line 2: 'a.png,void,test'; write 2 values"),
        ("image,label\na.png,\n", "line 2: 'a.png,'; write 2 values, no image or label empty"),
        ("image,label\n,void\n", "line 2"),
        ("image,label\na.png,void\n\nz.png,void\n", r"line 4: .*z\.png does not exist; add the image"),
        ("image,label\n../a.png,void\n", r"line 2: \.\./a\.png leads out of"),
        ("image,label\n/a.png,void\n", r"line 2: /a\.png leads out of"),
        ("image,label\n.,void\n", "line 2: .* does not exist"),
        ("image,label\na.png,void\na.png,void\n", r"line 3: a\.png again, after line 2; keep one row"),
        ("image,label\na.png,void\na.bmp,void\n", r"line 3: a\.bmp has the mask of a\.png, line 2; rename one"),
        ("image,label,split\na.png,void,dev\n", "line 2: split 'dev'; write train or test"),
        ("image,label,split\na.png,void,\n", "line 2: split ''; write train or test"),
        ('image,label\n"a.png,void\n', "cannot be read .*save it as CSV with commas"),
    ],
)
def test_bad_table_is_refused_with_line_and_remedy(tmp_path, text, message):
    save(tmp_path / "images" / "a.png", 1)
    save(tmp_path / "images" / "a.bmp", 2)
    save(tmp_path / "masks" / "a.png", box=(0, 0, 5, 5))
    with pytest.raises(ConfigError, match=message):
        read(table(tmp_path, text))


def test_table_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"image,label\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"labels\.csv: cannot be read .*in UTF-8"):
        read(tmp_path)


def test_plain_folder_holds_labels_and_masks_to_what_is_asked(tmp_path):
    plain(tmp_path)
    assert read(tmp_path, labels=["bridge", "void"], require_masks=True).known_labels == ("bridge",)
    with pytest.raises(ConfigError, match="unknown labels void"):
        read(tmp_path, labels=["bridge"])
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(ConfigError, match=r"1 defects have no mask \(.*b\.png\)"):
        read(tmp_path, require_masks=True)


def test_reading_refuses_leakage_unless_it_is_allowed(tmp_path):
    plain(tmp_path)
    shutil.copy(tmp_path / "images" / "a.png", tmp_path / "images" / "lot2" / "c.png")
    with pytest.raises(ConfigError, match="1 test images show the same pixels as training images"):
        read(tmp_path)
    assert len(read(tmp_path, allow_leakage=True).test) == 1


# ---- a lot of the generator ----


@pytest.fixture(scope="module")
def lot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lot")
    write_lot(folder, n=12, seed=5, stages=["BEOL"], size_hw=(256, 256), info_bar_share=0.5)
    return folder


def test_lot_gives_one_sample_per_defect_whose_mask_fills_its_box(lot):
    data_set = read(lot, require_masks=True)
    with (lot / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert data_set.train == ()
    assert [(s.image.name, s.label) for s in data_set.test] == [(row["file"], row["label"]) for row in rows]
    for sample, row in zip(data_set.test, rows, strict=True):
        gray = load_gray(sample)
        mask = load_mask(sample, gray.shape)
        assert gray.shape == (256, 256)
        if sample.label == DEFECT_FREE:
            assert not mask.any()
            continue
        ys, xs = np.nonzero(mask)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == [int(row[k]) for k in ("x0", "y0", "x1", "y1")]


def test_lot_with_info_bars_and_with_images_of_several_defects_was_tested(lot):
    test = read(lot).test
    assert {cv2.imread(str(s.image), cv2.IMREAD_UNCHANGED).shape[0] == 256 for s in test} == {True, False}
    several = [s for s in test if s.other_masks]
    assert several
    mask = load_mask(several[0], (256, 256), whole_image=True)
    assert mask.sum() > load_mask(several[0], (256, 256)).sum()


LOT_HEADER = "file,defect,label,stage,x0,y0,x1,y1\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "no rows"),
        ("a.png,1,void,BEOL,0,0,1,1\na.png,1,open,BEOL,0,0,1,1\n", "line 3: defect 1 of a.png is there twice"),
        ("a.png,0,void,BEOL,,,,\n", "line 2: defect '0' with label 'void'"),
        ("a.png,1,defect-free,BEOL,,,,\n", "line 2: defect '1' with label 'defect-free'"),
        ("a.png,x,void,BEOL,,,,\n", "line 2: defect 'x'"),
        ("a.png,0,defect-free,BEOL,,,,\na.png,1,void,BEOL,0,0,1,1\n", "line 3: .* has a single row with 0"),
        ("z.png,1,void,BEOL,0,0,1,1\n", r"line 2: .*z\.png does not exist"),
    ],
)
def test_bad_lot_is_refused_with_line_and_remedy(tmp_path, rows, message):
    save(tmp_path / "a.png", 1)
    with pytest.raises(ConfigError, match=message):
        read(table(tmp_path, LOT_HEADER + rows))


def test_lot_without_masks_is_refused_where_they_are_required(tmp_path):
    save(tmp_path / "a.png", 1)
    table(tmp_path, LOT_HEADER + "a.png,1,void,BEOL,0,0,1,1\n")
    assert read(tmp_path).test[0].mask is None
    with pytest.raises(ConfigError, match="1 defects have no mask"):
        read(tmp_path, require_masks=True)


# ---- folder per class ----


def test_class_folders_without_split_are_all_test(tmp_path):
    save(tmp_path / "good" / "a.png", 1)
    save(tmp_path / "void" / "b.png", 2)
    save(tmp_path / "ground_truth" / "void" / "b.png", box=(0, 0, 5, 5))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "void" / "notes.txt").write_text("no image")
    (tmp_path / "void" / ".b.png").write_bytes(b"half written")
    data_set = read(tmp_path, require_masks=True)
    assert data_set.train == ()
    assert data_set.test == (
        Sample(tmp_path / "good" / "a.png", DEFECT_FREE),
        Sample(tmp_path / "void" / "b.png", "void", tmp_path / "ground_truth" / "void" / "b.png"),
    )


def mvtec(folder: Path) -> Path:
    save(folder / "train" / "good" / "000.png", 1)
    save(folder / "test" / "good" / "000.png", 2)
    save(folder / "test" / "void" / "000.png", 3)
    save(folder / "ground_truth" / "void" / "000_mask.png", box=(0, 0, 5, 5))
    return folder


def test_mvtec_layout_has_its_split_and_masks(tmp_path):
    data_set = read(mvtec(tmp_path), labels=["void"], require_masks=True)
    assert data_set.counts == {DEFECT_FREE: (1, 1), "void": (0, 1)}
    assert load_mask(data_set.test[1], HW).sum() == 25


def test_test_part_alone_is_read(tmp_path):
    shutil.rmtree(mvtec(tmp_path) / "train")
    assert read(tmp_path).counts == {DEFECT_FREE: (0, 1), "void": (0, 1)}


def test_empty_class_is_refused(tmp_path):
    (mvtec(tmp_path) / "test" / "bridge").mkdir()
    with pytest.raises(ConfigError, match=r"bridge: an empty class \(\.tif.*add images or remove the folder"):
        read(tmp_path)


def test_training_part_without_classes_is_refused(tmp_path):
    shutil.rmtree(mvtec(tmp_path) / "train" / "good")
    with pytest.raises(ConfigError, match="train: no class folders"):
        read(tmp_path)


def test_class_beside_train_and_test_is_refused(tmp_path):
    save(mvtec(tmp_path) / "bridge" / "a.png", 9)
    with pytest.raises(ConfigError, match="bridge beside train or test"):
        read(tmp_path)


def test_missing_mask_is_refused_where_masks_are_required(tmp_path):
    (mvtec(tmp_path) / "ground_truth" / "void" / "000_mask.png").unlink()
    assert read(tmp_path).test[1].mask is None
    with pytest.raises(ConfigError, match="1 defects have no mask"):
        read(tmp_path, require_masks=True)


# ---- layouts told apart ----


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((), r"there is no image in it; the nearest layout is a folder per class: put images into .*<label>/"),
        (
            ("a.png", "b.png"),
            r"2 images and no labels; .* add labels\.csv with the first line image,label and a line",
        ),
        (("images/a.png",), r"1 images and no labels; the nearest layout is images with a table: add labels\.csv"),
        (
            ("a.png", "void/b.png"),
            r"1 images lie beside the folders void; the nearest layout is a folder per class",
        ),
        (
            ("a.png", "lots.csv"),
            r"the nearest layout is images with a table, and lots\.csv is none: let its",
        ),
        (("images/a.png", "masks/b.png"), r"no file of masks/ marks anything .* name masks as .*, masks/a\.png"),
        (("images/a.png", "labels/a.txt"), r"the nearest layout is YOLO's, .*; add classes\.txt with one name a line"),
    ],
)
def test_folder_of_no_layout_is_refused_with_the_nearest_and_what_would_mend_it(tmp_path, made, message):
    for seed, name in enumerate(made):
        if name.endswith(".png"):
            save(tmp_path / name, seed)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("0 .5 .5 .1 .1\n")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


def test_absent_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder of images"):
        read(tmp_path / "absent")


# ---- public sets, in small ----


def small_mtd(folder: Path) -> Path:
    for i, name in enumerate((*MTD_CLASSES, "Free", "Free")):
        save(folder / f"MT_{name}" / "Imgs" / f"exp1_num_{500 * i}.jpg", i)
        save(folder / f"MT_{name}" / "Imgs" / f"exp1_num_{500 * i}.png", box=(0, 0, 0 if name == "Free" else 5, 5))
    (folder / MTD_SPLIT).write_text("exp1_num_2500.jpg\n")
    return folder


def test_mtd_trains_on_the_listed_normal_images_and_tests_on_all_others(tmp_path):
    data_set = read(small_mtd(tmp_path))
    assert data_set.counts == {**dict.fromkeys(MTD_CLASSES, (0, 1)), DEFECT_FREE: (1, 1)}
    assert [sample.image.name for sample in data_set.train] == ["exp1_num_2500.jpg"]
    assert load_mask(data_set.test[1], HW).sum() == 25


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (MTD_SPLIT, r"mtd_train_filenames\.txt: cannot be read"),
        ("MT_Fray/Imgs/exp1_num_1500.jpg", r"MT_Fray/Imgs: an empty class \(\.jpg\)"),
        ("MT_Fray/Imgs/exp1_num_1500.png", r"1 defects have no mask \(.*num_1500\.jpg\)"),
        ("MT_Free/Imgs/exp1_num_2500.jpg", r"lists 1 images that MT_Free/Imgs does not hold \(exp1_num_2500\.jpg\)"),
    ],
)
def test_mtd_with_a_part_missing_is_refused(tmp_path, lost, message):
    (small_mtd(tmp_path) / lost).unlink()
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


def test_mtd_with_an_empty_split_or_one_that_lists_defects_is_refused(tmp_path):
    (small_mtd(tmp_path) / MTD_SPLIT).write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_mtd(tmp_path)
    (tmp_path / MTD_SPLIT).write_text("exp1_num_0.jpg\n")
    with pytest.raises(ConfigError, match="lists 1 images that MT_Free"):
        read_mtd(tmp_path)


def test_mtd_tiles_group_numbers_within_120():
    assert mtd_tiles([]).tolist() == []
    numbers = 400, 0, 120, 241, 900, 350
    samples = [Sample(Path(f"exp{i}_num_{number}.jpg"), DEFECT_FREE) for i, number in enumerate(numbers)]
    assert mtd_tiles(samples).tolist() == [1, 0, 0, 1, 2, 1]
    assert mtd_tiles(samples[:1]).tolist() == [0]
    with pytest.raises(ConfigError, match=r"a\.jpg: not named exp<e>_num_<number>"):
        mtd_tiles([*samples, Sample(Path("a.jpg"), DEFECT_FREE)])


def small_sd(folder: Path) -> Path:
    for i, name in enumerate(("In_1", "Pa_1", "Sc_1")):
        save(folder / "Source Images" / f"{name}.bmp", i)
        save(folder / "Ground truth" / f"{name}.png", box=(0, 0, 5, 5))
    return folder


@pytest.mark.parametrize("nested", ["", "SD-saliency-900"])
def test_sd_saliency_is_all_test_also_where_the_download_nests_it(tmp_path, nested):
    small_sd(tmp_path / nested)
    assert read(tmp_path).counts == {"inclusion": (0, 1), "patches": (0, 1), "scratches": (0, 1)}


def test_public_sets_are_held_to_the_labels_asked_for(tmp_path):
    assert len(read(small_mtd(tmp_path / "mtd"), labels=MTD_CLASSES).test) == 6
    for folder in (tmp_path / "mtd", small_sd(tmp_path / "sd")):
        with pytest.raises(ConfigError, match="unknown labels"):
            read(folder, labels=["Crack", "patches"])


def test_sd_saliency_with_a_part_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no 'Source Images' beside 'Ground truth'"):
        read_sd_saliency(tmp_path)
    save(small_sd(tmp_path) / "Source Images" / "Xy_1.bmp", 1)
    with pytest.raises(ConfigError, match=r"Xy_1\.bmp: its name begins with none of In, Pa, Sc"):
        read(tmp_path)
    (tmp_path / "Source Images" / "Xy_1.bmp").unlink()
    (tmp_path / "Ground truth" / "In_1.png").unlink()
    with pytest.raises(ConfigError, match="1 defects have no mask"):
        read(tmp_path)
    (tmp_path / "Source Images" / "In_1.bmp").unlink()
    with pytest.raises(ConfigError, match="no sample of inclusion"):
        read(tmp_path)


# ---- public sets, as published ----


def test_mtd_as_published_has_the_counts_of_its_protocol_and_no_leak(data):
    mtd = read(data / "MTD")
    assert mtd.counts == {
        "Blowhole": (0, 115),
        "Break": (0, 85),
        "Crack": (0, 57),
        "Fray": (0, 32),
        "Uneven": (0, 103),
        DEFECT_FREE: (761, 191),
    }


def test_mtd_masks_fit_their_images_and_four_are_empty(data):
    empty = []
    for sample in read_mtd(data / "MTD").test:
        if sample.label != DEFECT_FREE and not load_mask(sample, load_gray(sample).shape).any():
            empty.append(sample.label)
    assert empty == ["Uneven"] * 4


def test_mtd_split_parts_photographs_of_one_tile(data):
    mtd = read_mtd(data / "MTD")
    tiles = mtd_tiles(mtd.train + mtd.test)
    seen = np.isin(tiles[len(mtd.train) :], tiles[: len(mtd.train)])
    normal = np.array([sample.label == DEFECT_FREE for sample in mtd.test])
    assert (seen & normal).sum() >= 190
    assert (seen & ~normal).sum() < 0.25 * (~normal).sum()


def test_sd_saliency_as_published_has_900_masks_and_one_image_twice(data):
    steel = read(data / "SD-saliency-900")
    assert steel.counts == {"inclusion": (0, 300), "patches": (0, 300), "scratches": (0, 300)}
    assert [[path.stem for path in group] for group in duplicates(steel.test)] == [["Pa_101", "Pa_105"]]
    assert all(load_mask(sample, (200, 200)).any() for sample in steel.test)


# ---- synthetic sets ----


def test_synthetic_set_of_nothing_is_empty():
    assert list(synthetic_set("DEP", n_normal=0, n_per_type=0, first_seed=1, side_px=128)) == []


def test_synthetic_set_has_normal_images_then_every_type():
    shown = list(synthetic_set("DEP", n_normal=2, n_per_type=1, first_seed=7, side_px=128))
    assert [image.labels for image in shown] == [(), (), *((label,) for label in DEFECT_TYPES["DEP"])]
    assert {image.pixels.shape for image in shown} == {(128, 128)}
    assert all(image.masks.any() for image in shown[2:])
    assert len({image.seed for image in shown}) == len(shown)


def test_synthetic_set_is_the_same_for_a_seed_and_other_for_another():
    first, again, other = (
        [image.pixels.tobytes() for image in synthetic_set("DEP", n_normal=1, n_per_type=1, first_seed=s, side_px=128)]
        for s in (1, 1, 2)
    )
    assert first == again
    assert set(first).isdisjoint(other)


def test_larger_synthetic_set_begins_each_kind_with_the_smaller_ones_images():
    small = list(synthetic_set("DEP", n_normal=1, n_per_type=1, first_seed=1, side_px=128))
    large = list(synthetic_set("DEP", n_normal=2, n_per_type=2, first_seed=1, side_px=128))
    assert [image.seed for image in large[::2]] == [image.seed for image in small]
    for one, same in zip(small, large[::2], strict=True):
        assert np.array_equal(one.pixels, same.pixels)


def test_seed_without_room_is_passed_over(monkeypatch):
    drawn: list[int] = []

    def render(stage, *, seed, size_hw, defects):
        drawn.append(seed)
        if seed % 3:
            raise NoRoom("none")
        return seed

    monkeypatch.setattr(datasets, "render", render)
    shown = list(synthetic_set("DEP", n_normal=2, n_per_type=0, first_seed=1, side_px=128))
    assert (shown, drawn) == ([3, 6], [1, 2, 3, 4, 5, 6])


def test_type_that_never_finds_room_is_named(monkeypatch):
    def render(stage, *, seed, size_hw, defects):
        raise NoRoom("none")

    monkeypatch.setattr(datasets, "render", render)
    label = DEFECT_TYPES["DPR"][0]
    with pytest.raises(NoRoom, match=f"DPR fields of 64 px have no room for {label}; use a larger side_px"):
        list(synthetic_set("DPR", n_normal=0, n_per_type=1, first_seed=1, side_px=64))


def test_most_images_and_most_types_stay_within_the_seeds_of_a_set(monkeypatch):
    drawn: list[int] = []

    def render(stage, *, seed, size_hw, defects):
        drawn.append(seed)
        if len(drawn) % datasets.MAX_SEEDS:
            raise NoRoom("none")
        return defects

    monkeypatch.setattr(datasets, "render", render)
    most = datasets.SEEDS_PER_TYPE // datasets.MAX_SEEDS
    stage = max(DEFECT_TYPES, key=lambda name: len(DEFECT_TYPES[name]))
    shown = list(synthetic_set(stage, n_normal=most, n_per_type=most, first_seed=0, side_px=64))
    assert len(shown) == most * (1 + len(DEFECT_TYPES[stage]))
    assert len(set(drawn)) == len(drawn)
    assert max(drawn) < datasets.SEED_HELD_OUT - datasets.SEED_TRAIN


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage": "FEOL"}, "unknown process stage 'FEOL'; choose from BEOL, DEP, DPR"),
        ({"n_normal": -1}, r"n_normal -1 is outside \[0, 2500\]"),
        ({"n_per_type": 2501}, r"n_per_type 2501 is outside \[0, 2500\]"),
        ({"side_px": 63}, "side_px 63 is too small"),
    ],
)
def test_bad_synthetic_set_is_refused_before_the_first_image(wrong, message):
    asked = {"stage": "DEP", "n_normal": 1, "n_per_type": 1, "side_px": 128} | wrong
    with pytest.raises(ConfigError, match=message):
        synthetic_set(asked.pop("stage"), first_seed=1, **asked)


def test_synthetic_set_renders_no_more_than_is_taken():
    assert len(list(islice(synthetic_set("BEOL", n_normal=2500, n_per_type=2500, first_seed=1, side_px=64), 2))) == 2
