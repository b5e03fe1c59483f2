"""The index of the results says what the results say, whatever became of either."""

import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from factories import make_review, make_verdict
from semwatch.errors import ConfigError
from semwatch.store import corrections, result_index, results
from semwatch.store.corrections import Correction
from semwatch.store.result_index import ResultIndex, open_index, rebuild

LOT = "tool-a/lot"
UNKNOWN = make_verdict("unknown")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


def write(folder: Path, name: str, n: int = 1, **more: object) -> Path:
    review = make_review(n, path=f"lot/{name}", seed=len(name), **more)  # type: ignore[arg-type]
    return results.write(replace(review, sha256=name.encode().hex().ljust(64, "0")[-64:]), results_dir=folder).json


def refuse(folder: Path, name: str) -> Path:
    written, _ = results.write_reason(
        results_dir=folder,
        source="tool-a",
        path=f"lot/{name}",
        sha256="f" * 64,
        reason="no image",
        attempts=1,
        size=3,
        quarantined_utc="2025-03-01T08:00:00Z",
    )
    return written


def outcomes(index: ResultIndex) -> dict[str, str]:
    return {file.path: file.outcome for file in index.files(LOT)}


def everything(index: ResultIndex) -> object:
    """What it says, without numbers of its own."""
    defects = [replace(one, id=0) for one in index.defects(limit=1000)]
    return index.counts(), index.files(LOT), sorted(defects, key=lambda d: (d.path, d.defect_id)), index.missed()


def test_folder_without_results_is_an_empty_index(folder: Path, tmp_path: Path) -> None:
    with open_index(tmp_path / "index.sqlite") as index:
        assert list(rebuild(index, folder)) == []
        assert index.counts() == {"lots": 0, "images": 0, "defects": 0}
        assert (index.files(LOT), index.defects(), index.judged()) == ([], [], [])


def test_lot_is_refreshed_by_what_has_changed_alone(folder: Path, tmp_path: Path) -> None:
    write(folder, "a.tif", 2)
    write(folder, "b.tif", 0)
    refuse(folder, "c.tif")
    (folder / LOT / "notes.txt").write_text("foreign")
    (folder / LOT / "d.tif.review.json").write_text('{"half": ')
    with open_index(tmp_path / "index.sqlite") as index:
        assert index.refresh(folder, LOT) == 4
        assert index.refresh(folder, LOT) == 0
        assert outcomes(index) == {
            "lot/a.tif": "reviewed",
            "lot/b.tif": "reviewed",
            "lot/c.tif": "refused",
            "d.tif": "broken",
        }
        (folder / LOT / "b.tif.review.json").unlink()
        write(folder, "c.tif", 3)  # after it was mended
        assert index.refresh(folder, LOT) == 3  # the reason is gone
        assert outcomes(index) == {"lot/a.tif": "reviewed", "lot/c.tif": "reviewed", "d.tif": "broken"}
        assert index.counts() == {"lots": 1, "images": 3, "defects": 5}


def test_kept_revisions_and_other_content_are_not_counted(folder: Path, tmp_path: Path) -> None:
    path = write(folder, "a.tif", 2)
    later = replace(make_review(2, path="lot/a.tif", seed=5), recipe_id="0" * 16, sha256=results.read(path).sha256)
    results.write(later, results_dir=folder)
    results.write(replace(later, sha256="e" * 64), results_dir=folder)
    with open_index(tmp_path / "index.sqlite") as index:
        index.refresh(folder, LOT)
        assert index.counts() == {"lots": 1, "images": 1, "defects": 2}
        assert index.refresh(folder, LOT) == 0


def test_listing_goes_on_after_its_page_and_filters(folder: Path, tmp_path: Path) -> None:
    for i in range(5):
        write(folder, f"{i}.tif", 3, verdicts=[make_verdict("known", "void"), UNKNOWN, make_verdict("known", "pit")])
    with open_index(tmp_path / "index.sqlite") as index:
        index.refresh(folder, LOT)
        seen, after = [], 0
        while page := index.defects(lot=LOT, label="void", after=after, limit=2):
            seen += [one.path for one in page]
            after = page[-1].id
        assert seen == [f"lot/{i}.tif" for i in range(5)]
        assert len(index.defects(kind="unknown")) == 5
        assert {one.kind for one in index.defects(max_confidence=0.5)} == {"unknown"}
        assert index.defects(lot="tool-a/other") == []
        assert index.defect_counts(LOT) == [("known", "pit", 5), ("known", "void", 5), ("unknown", None, 5)]


def test_people_are_beside_the_model(folder: Path, tmp_path: Path) -> None:
    path = write(folder, "a.tif", 3)
    said = [Correction(0, "void", 1), Correction(0, None, 2), Correction(0, "pit", box_xyxy=(1, 2, 9, 9))]
    results.change(path, lambda record: corrections.corrected(record, said, by="ada", utc="2025-03-02T08:00:00Z"))
    with open_index(tmp_path / "index.sqlite") as index:
        index.refresh(folder, LOT)
        judged = index.defects(is_judged=True)
        assert [(one.defect_id, one.human_label, one.human_by) for one in judged] == [
            (1, "void", "ada"),
            (2, None, "ada"),
        ]
        assert [one.defect_id for one in index.defects(is_judged=False)] == [3]
        assert {(row[2], row[3]) for row in index.judged([LOT])} == {("void", 1), (None, 1)}
        assert index.judged([]) == []
        assert index.missed() == {"pit": 1}


def test_lost_index_is_rebuilt_the_same(folder: Path, tmp_path: Path) -> None:
    for i in range(4):
        write(folder, f"{i}.tif", i)
    refuse(folder, "x.tif")
    path = tmp_path / "index.sqlite"
    with open_index(path) as index:
        list(rebuild(index, folder))
        before = everything(index)
    path.unlink()
    with open_index(path) as index:
        assert list(rebuild(index, folder)) == [("tool-a", 0), (LOT, 5)]
        assert everything(index) == before


@pytest.mark.parametrize("damage", ["torn", "no database", "other layout"])
def test_broken_index_is_made_anew(folder: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index.sqlite"
    write(folder, "a.tif")
    with open_index(path) as index:
        list(rebuild(index, folder))
    data = bytearray(path.read_bytes())
    match damage:
        case "torn":
            data = data[:100] + bytes(len(data) - 100)
        case "no database":
            data = bytearray(b"nothing of the kind")
        case "other layout":
            data[60:64] = (99).to_bytes(4, "big")
    path.write_bytes(data)
    with open_index(path) as index:
        assert list(rebuild(index, folder))[-1] == (LOT, 1)


def test_database_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(path)) as foreign:
        foreign.execute("CREATE TABLE t (a)")
    with pytest.raises(ConfigError, match="no index of the results"):
        open_index(path)


def test_kill_while_it_is_built_is_caught_up(folder: Path, tmp_path: Path) -> None:
    for i in range(12):
        write(folder, f"{i}.tif", 2)
    path = tmp_path / "index.sqlite"
    program = f"""
        import os, signal
        from pathlib import Path
        from semwatch.store import index_rows, result_index
        result_index.BATCH = 2
        real, n = index_rows.add, 0
        def add(*args):
            global n
            n += 1
            real(*args)
            if n == 7:  # in the middle of a transaction
                os.kill(os.getpid(), signal.SIGKILL)
        index_rows.add = add
        list(result_index.rebuild(result_index.open_index(Path({str(path)!r})), Path({str(folder)!r})))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with open_index(path) as index:
        assert index.counts()["images"] == 6  # whole batches
        assert dict(rebuild(index, folder)) == {"tool-a": 0, LOT: 6}
        after = everything(index)
    with open_index(tmp_path / "fresh.sqlite") as fresh:
        list(rebuild(fresh, folder))
        assert everything(fresh) == after


def test_lots_that_are_gone_are_forgotten(folder: Path, tmp_path: Path) -> None:
    write(folder, "a.tif", 2)
    with open_index(tmp_path / "index.sqlite") as index:
        list(rebuild(index, folder))
        (folder / "tool-a").rename(tmp_path / "archive")
        assert list(result_index.all_lots(folder)) == []
        list(rebuild(index, folder))
        assert (index.lots(), index.counts()["defects"]) == ([], 0)
