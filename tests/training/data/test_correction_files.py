"""A file of corrections is a set of labelled boxes; what is none is refused with its line."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.streams.records import Correction, correction_line
from semwatch_training.data import data_folders


def image(folder: Path, name: str) -> str:
    """Write an image; its content's hash."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(name)).integers(0, 255, (64, 64), np.uint8)
    cv2.imwrite(str(path), noise)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def line(path: str, sha256: str, label: str, x: int = 10, *, by: str = "ana", day: int = 3) -> str:
    return correction_line(
        Correction(
            "", f"2026-01-0{day}T00:00:00Z", by, "sem-1", path, sha256, 0, (x, 10, x + 20, 30), label, defect_id=1
        )
    )


def read(folder: Path, *lines: str) -> dict[tuple[str, str], int]:
    (folder / "said.jsonl").write_text("\n".join(lines) + "\n")
    found = data_folders.read(folder / "said.jsonl").test
    return {(s.image.name, s.label): len(s.other_masks) for s in found}


def test_boxes_defect_free_and_the_later_word(tmp_path: Path) -> None:
    a, b = image(tmp_path, "lot/a.png"), image(tmp_path, "images/bb.png")
    found = read(
        tmp_path,
        line("lot/a.png", a, "void"),
        line("lot/a.png", a, "pit", day=4),
        line("lot/a.png", a, "scratch", 40),
        line("lot/a.png", a, DEFECT_FREE, 30),
        line("lot/bb.png", b, "good"),
        "",
    )
    assert found == {("a.png", "pit"): 1, ("a.png", "scratch"): 1, ("bb.png", DEFECT_FREE): 0}


def test_what_is_no_correction_is_refused_with_its_line(tmp_path: Path) -> None:
    a = image(tmp_path, "a.png")
    good = line("a.png", a, "pit")
    for lines, why in (
        ([good, "{}"], "line 2: no correction"),
        ([good, good.replace('"pit"', '"void"')], "line 2: no correction .*id is not the one"),
        ([good, line("a.png", a, "void", by="ben")], "ben says 'void', and ana says 'pit' .* in line 1; agree"),
        ([line("b.png", a, "pit")], "does not exist"),
        ([line("../a.png", a, "pit")], "leads out of"),
        ([line("a.png", "ab" * 32, "pit")], "is not the image that was corrected"),
        ([], "no corrections"),
    ):
        with pytest.raises(ConfigError, match=why):
            read(tmp_path, *lines)
