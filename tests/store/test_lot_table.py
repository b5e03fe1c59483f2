"""lot.csv: what it says, and that it says the same whether it grows or is written anew."""

import csv
import io
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from factories import make_review, make_verdict
from semwatch.defects import Quality, QualityFlag
from semwatch.errors import ServiceUnavailable
from semwatch.store import lot_table, results
from semwatch.store.lot_table import LOT, LOT_COLUMNS
from semwatch.store.review_record import ReviewRecord, VerdictRecord


def rows(lot_dir: Path) -> list[dict[str, str]]:
    with (lot_dir / LOT).open(newline="") as file:
        return list(csv.DictReader(file))


def put(folder: Path, name: str, n_defects: int = 1, **changes: object) -> ReviewRecord:
    """A result in the lot at ``folder / "tool-a/lot"``."""
    verdicts = [make_verdict("known", 'a "b", c\nd'), make_verdict("unknown")]
    review = replace(make_review(n_defects, path=f"lot/{name}", verdicts=verdicts), **changes)  # type: ignore[arg-type]
    return results.read(results.write(review, results_dir=folder).json)


@pytest.fixture
def lot(tmp_path: Path) -> Path:
    return tmp_path / "tool-a" / "lot"


# --- written anew ----------------------------------------------------------------------------------------------------


def test_empty_lot_is_a_header(tmp_path: Path) -> None:
    assert list(lot_table.iter_lot(tmp_path / "none")) == []
    assert lot_table.write(tmp_path) == []
    assert (tmp_path / LOT).read_text().splitlines() == [",".join(LOT_COLUMNS)]


def test_lot_has_a_row_for_each_defect_and_for_each_clean_image_in_order(tmp_path: Path, lot: Path) -> None:
    for name, n in (("c.tif", 0), ("a.tif", 2), ("b.tif", 1)):
        put(tmp_path, name, n)
    assert [path.name for path in lot_table.write(lot)] == [f"{name}.tif.review.json" for name in "abc"]
    said = [(row["path"], row["defect_id"], row["kind"], row["label"]) for row in rows(lot)]
    assert said == [
        ("lot/a.tif", "1", "known", 'a "b", c\\x0ad'),
        ("lot/a.tif", "2", "unknown", ""),
        ("lot/b.tif", "1", "known", 'a "b", c\\x0ad'),
        ("lot/c.tif", "", "", ""),
    ]
    assert [row["page_verdict"] for row in rows(lot)] == ["defects"] * 3 + ["defect-free"]


def test_row_says_whether_the_page_s_process_is_known(tmp_path: Path) -> None:
    said = []
    for domain in ("known process", "unknown process", "not judged"):
        for n in (0, 1):
            review = make_review(n, path=f"{domain}/{n}/a.tif", domain=domain)
            written = results.write(review, results_dir=tmp_path).json
            lot_table.write(written.parent)
            said += [(row["domain"], row["page_verdict"], bool(row["kind"])) for row in rows(written.parent)]
    assert said == [
        ("known process", "defect-free", False),
        ("known process", "defects", True),
        ("unknown process", "defect-free", False),
        ("unknown process", "defects", True),
        ("not judged", "defect-free", False),
        ("not judged", "defects", True),
    ]


def test_page_without_image_has_a_row_that_says_so(tmp_path: Path, lot: Path) -> None:
    blank = Quality((QualityFlag("blank", 0.0, 2.0),), is_image=False)
    soft = Quality((QualityFlag("defocus", 6.0, 4.0), QualityFlag("drift", 2.0, 1.0)))
    pages = make_review(0, n_pages=2).pages
    changed = (replace(pages[0], score_map=None, quality=blank), replace(pages[1], quality=soft))
    put(tmp_path, "a.tif", 0, pages=changed)
    lot_table.write(lot)
    said = [(row["page_verdict"], row["image_score"] == "", row["quality"]) for row in rows(lot)]
    assert said == [("no-image", True, "blank"), ("defect-free", False, "defocus drift")]


def test_every_page_has_rows_of_its_own(tmp_path: Path) -> None:
    paths = results.write(make_review(1, n_pages=3), results_dir=tmp_path)
    lot_table.write(paths.json.parent)
    assert [row["page"] for row in rows(paths.json.parent)] == ["0", "1", "2"]


def test_defect_row_holds_the_record_s_numbers(tmp_path: Path) -> None:
    paths = results.write(make_review(1), results_dir=tmp_path, class_codes={"particle": 7})
    lot_table.write(paths.json.parent)
    (row,) = rows(paths.json.parent)
    (defect,) = results.read(paths.json).pages[0].defects
    assert tuple(int(row[edge]) for edge in ("x0", "y0", "x1", "y1")) == defect.box_xyxy
    assert (int(row["area_px"]), float(row["peak_score"])) == (defect.area_px, defect.peak_score)
    assert (row["class_code"], row["nearest_1"], row["nearest_2"]) == ("7", "particle", "residue")
    assert row["models"] == "detector=1 encoder=1 head=3"


def test_lot_leaves_out_kept_and_broken_results(tmp_path: Path, lot: Path, caplog: pytest.LogCaptureFixture) -> None:
    for sha256 in ("a" * 64, "b" * 64):
        put(tmp_path, "a.tif", sha256=sha256)
    (lot / "x.tif.review.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert [record.sha256 for record in lot_table.iter_lot(lot)] == ["b" * 64]
    assert "x.tif.review.json" in caplog.text


def test_lot_shows_the_latest_revision_alone(tmp_path: Path, lot: Path) -> None:
    put(tmp_path, "a.tif", 2)
    put(tmp_path, "b.tif", 0)
    verdict = VerdictRecord(kind="novel", label="novel-1", confidence=0.9, nearest=(), class_code=None)
    results.revise(lot / "a.tif.review.json", {(0, 2): verdict}, head_version=4, utc="2025-03-01T09:00:00Z")
    lot_table.write(lot)
    assert [(row["path"], row["label"], row["revision"]) for row in rows(lot)][1:] == [
        ("lot/a.tif", "novel-1", "2"),
        ("lot/b.tif", "", "1"),
    ]
    assert list(rows(lot)[0])[-6:] == [*("revision", "quality", "reason", "human_label", "human_by", "human_utc")]


# --- appended --------------------------------------------------------------------------------------------------------


def test_table_that_grew_has_the_rows_of_one_written_anew(tmp_path: Path, lot: Path) -> None:
    put(tmp_path, "m.tif")
    lot_table.write(lot)
    added = [put(tmp_path, name, n) for name, n in (("c.tif", 0), ("a.tif", 2), ("b.tif", 1))]
    n_before = lot_table.size(lot)
    n_bytes = (lot_table.append(lot, added[:1]) or 0) + (lot_table.append(lot, added[1:]) or 0)
    assert lot_table.size(lot) == n_before + n_bytes
    grown = (lot / LOT).read_bytes()
    assert [row["path"] for row in rows(lot)] == [f"lot/{name}.tif" for name in "mcaab"]
    lot_table.write(lot)
    anew = (lot / LOT).read_bytes()
    assert grown != anew
    assert sorted(csv.reader(io.StringIO(grown.decode()))) == sorted(csv.reader(io.StringIO(anew.decode())))


def test_nothing_to_append_is_nothing(tmp_path: Path, lot: Path) -> None:
    put(tmp_path, "a.tif")
    lot_table.write(lot)
    before = (lot / LOT).read_bytes()
    assert lot_table.append(lot, []) == 0
    assert (lot / LOT).read_bytes() == before


@pytest.mark.parametrize("spoilt", ["none", "other columns", "cut short", "empty", "link", "folder"])
def test_table_that_cannot_be_continued_is_left_as_it_is(tmp_path: Path, lot: Path, spoilt: str) -> None:
    record = put(tmp_path, "a.tif")
    lot_table.write(lot)
    table, elsewhere = lot / LOT, tmp_path / "elsewhere.csv"
    content = table.read_bytes()
    if spoilt in ("none", "link", "folder"):
        table.unlink()
    if spoilt == "other columns":
        table.write_bytes(content.replace(b"image_score", b"score"))
    elif spoilt == "cut short":
        table.write_bytes(content[:-1])
    elif spoilt == "empty":
        table.write_bytes(b"")
    elif spoilt == "folder":
        table.mkdir()
    elif spoilt == "link":
        elsewhere.write_bytes(content)
        table.symlink_to(elsewhere)
    before = table.read_bytes() if table.is_file() else None
    assert lot_table.append(lot, [record]) is None
    assert (table.read_bytes() if table.is_file() else None) == before
    if spoilt != "folder":
        lot_table.write(lot)
        assert table.read_bytes() == content
        assert not table.is_symlink()


def test_table_without_a_folder_has_no_size(tmp_path: Path) -> None:
    assert lot_table.size(tmp_path / "none") == 0
    assert lot_table.append(tmp_path / "none", []) is None


def test_pipe_in_its_place_is_not_waited_for(tmp_path: Path, lot: Path) -> None:
    record = put(tmp_path, "a.tif")
    os.mkfifo(lot / LOT)
    assert lot_table.append(lot, [record]) is None


def test_disk_that_refuses_is_a_service_away(tmp_path: Path, lot: Path) -> None:
    put(tmp_path, "a.tif")
    (lot / f".{LOT}.tmp").mkdir()
    with pytest.raises(ServiceUnavailable, match="cannot write"):
        lot_table.write(lot)
