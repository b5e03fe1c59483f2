import cv2
import numpy as np
import pytest

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch_training.evaluation import real_data
from semwatch_training.evaluation.real_data import FOLDERS, REFERENCE, positions_of, read


def write(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def noise(side: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def test_a_folder_without_any_image_is_refused(tmp_path) -> None:
    (tmp_path / "nanofibres" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"none of bare-wafer-52px, .* holds an image"):
        read(tmp_path)


def test_what_is_absent_is_named_and_the_rest_is_read(tmp_path) -> None:
    write(tmp_path / "line-space-and-more" / "OPEN" / "a.png", noise())
    write(tmp_path / "nanofibres" / "test" / "anomalous" / "b.png", noise())
    found = read(tmp_path)
    assert [image.name for image in found.images] == [
        "line-space-and-more/OPEN/a.png",
        "nanofibres/test/anomalous/b.png",
    ]
    assert {"bare-wafer-52px", "vendor-files", "clean-defect-pairs", REFERENCE} <= set(found.absent)
    assert {"line-space-and-more/BRIDGE", "line-space-and-more/CLEAN_LAYER", "nanofibres/train/good"} <= set(
        found.absent
    )
    assert "mask of nanofibres/test/anomalous/b.png" in found.absent
    assert "line-space-and-more/OPEN" not in found.absent


def test_every_folder_says_what_is_clean_and_what_is_defective(tmp_path) -> None:
    write(tmp_path / "bare-wafer-52px" / "pit" / "a.png", noise(52))
    write(tmp_path / "bare-wafer-52px" / DEFECT_FREE / "a.png", noise(52))
    for name in ("CLEAN_VIA", "LER", "OTHERS"):
        write(tmp_path / "line-space-and-more" / name / "a.png", noise())
    write(tmp_path / "clean-defect-pairs" / "clean" / "a.png", noise())
    write(tmp_path / "clean-defect-pairs" / "defect" / "a.png", noise())
    write(tmp_path / "clean-defect-pairs" / "mask" / "a.png", np.eye(96, dtype=np.uint8))
    write(tmp_path / "normal-patterned-silicon" / "a.png", noise())
    write(tmp_path / "vendor-files" / "tool" / "a.png", noise())
    write(tmp_path / "wafer-review-480px" / "01_line_collapse.png", noise())
    found = {(image.folder, image.label): image for image in read(tmp_path).images}
    assert {key: image.defective for key, image in found.items()} == {
        ("bare-wafer-52px", "pit"): True,
        ("bare-wafer-52px", DEFECT_FREE): False,
        ("line-space-and-more", "CLEAN_VIA"): False,
        ("line-space-and-more", "LER"): True,
        ("line-space-and-more", "OTHERS"): None,
        ("clean-defect-pairs", "clean"): False,
        ("clean-defect-pairs", "defect"): True,
        ("normal-patterned-silicon", DEFECT_FREE): False,
        ("vendor-files", "tool"): None,
        ("wafer-review-480px", "line_collapse"): True,
    }
    mask = found["clean-defect-pairs", "defect"].mask
    assert mask is not None
    assert mask.sum() == 96  # a mask of 0 and 1


def test_small_images_are_enlarged_four_times_before_they_are_judged(tmp_path) -> None:
    write(tmp_path / "bare-wafer-52px" / "pit" / "a.png", noise(52))
    (image,) = read(tmp_path).images
    assert decoding.decode(image.content, name="a")[0].pixels.shape == (208, 208)


def test_positions_and_reference_go_with_the_inspected_image_of_their_case(tmp_path) -> None:
    for case in (1, 3):
        write(tmp_path / REFERENCE / f"case{case}_inspected_image.png", noise(seed=case))
        write(tmp_path / REFERENCE / f"case{case}_reference_image.png", noise(seed=10 + case))
    (tmp_path / REFERENCE / "defect_locations.txt").write_text("case 1, x y:\n5 6\n7, 8\n")
    found = read(tmp_path)
    first, third = (image for image in found.images if image.label.startswith("inspected"))
    assert first.positions_xy == ((5, 6), (7, 8))
    assert first.defective is True
    assert first.reference == (tmp_path / REFERENCE / "case1_reference_image.png").read_bytes()
    assert third.defective is None
    assert "positions of inspected-and-reference/case3" in found.absent
    assert [image.defective for image in found.images if image.label == "reference"] == [False, False]


@pytest.mark.parametrize(("text", "expected"), [("", {}), ("nothing here", {}), ("1 2", {"": ((1, 2),)})])
def test_positions_of_text_without_cases(text, expected) -> None:
    assert positions_of(text) == expected


def test_the_real_set_is_read_whole(data) -> None:
    top = data / "REAL-SEM"
    if not top.is_dir():
        pytest.skip(f"no {top}")
    found = read(top)
    assert {image.folder for image in found.images} <= set(FOLDERS)
    assert len({image.name for image in found.images}) == len(found.images)
    assert all(image.mask is not None for image in found.images if image.label in ("anomalous", "defect"))
    assert real_data.LINE_SPACE in {image.folder for image in found.images}
