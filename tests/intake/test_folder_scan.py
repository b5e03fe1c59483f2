"""Scans look at what may be new, find all of it, and cost little where nothing is."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from semwatch.intake.folder_rules import is_temporary
from semwatch.intake.folder_scan import SETTLES_S, FolderScan, Found


class Looks:
    """A scan, what it handed over, and a ledger that has finished what it was told."""

    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 100.0
        self.settled: set[str] = set()
        self.found: list[str] = []
        self.scan = FolderScan(
            root,
            is_image=lambda name: name.endswith(".tif"),
            is_temporary=is_temporary,
            recursive=True,
            take=self._take,
            clock=lambda: self.now,
        )

    def _take(self, found: Found) -> set[str]:
        self.found += [path for path, _ in found]
        return {path for path, _ in found if path in self.settled}

    def __call__(self, wait_s: float = SETTLES_S + 1) -> list[str]:
        """Scan once more, later; return what was handed over."""
        self.now += wait_s
        self.found = []
        self.last = self.scan.run()
        return sorted(self.found)


@pytest.fixture
def looks(tmp_path: Path) -> Looks:
    return Looks(tmp_path)


def make(file: Path, content: str = "image") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def test_empty_folder_and_folder_that_is_not_there(looks: Looks, tmp_path: Path) -> None:
    assert looks() == []
    with pytest.raises(FileNotFoundError):
        Looks(tmp_path / "none")()


def test_settled_files_are_handed_over_once_and_others_as_long_as_their_folder_changes(looks: Looks) -> None:
    for name in ("done.tif", "open.tif", "note.txt", ".hidden.tif", "lot/below.tif"):
        make(looks.root / name)
    looks.settled = {"done.tif", "lot/below.tif"}
    assert looks() == ["done.tif", "lot/below.tif", "open.tif"]
    assert looks() == ["open.tif"]  # once more, for the folder had only just changed
    assert looks() == []
    assert looks.last.n_looked_at == 0


def test_new_renamed_and_replaced_files_and_folders_are_found(looks: Looks) -> None:
    for i in range(3):
        make(looks.root / f"lot{i}" / "a.tif")
    looks.settled = {f"lot{i}/a.tif" for i in range(3)}
    assert len(looks()) == 3
    assert looks() == looks() == []
    make(looks.root / "lot0" / "b.tif")
    (looks.root / "lot1" / "a.tif").rename(looks.root / "lot1" / "c.tif")
    make(looks.root / "lot2" / ".new").rename(looks.root / "lot2" / "a.tif")  # another inode under the old name
    make(looks.root / "lot3" / "deep" / "d.tif")
    assert looks() == ["lot0/b.tif", "lot1/c.tif", "lot2/a.tif", "lot3/deep/d.tif"]


def test_file_that_comes_while_the_folder_still_shows_the_same_time_is_found(looks: Looks) -> None:
    make(looks.root / "a.tif")
    looks.settled = {"a.tif"}
    assert looks() == ["a.tif"]
    before = looks.root.stat()
    make(looks.root / "b.tif")
    os.utime(looks.root, ns=(before.st_atime_ns, before.st_mtime_ns))
    looks.scan._seen[""].state = (*looks.scan._seen[""].state[:3], looks.root.stat().st_ctime_ns)
    assert looks() == ["b.tif"]


def test_what_a_listing_does_not_show_is_said(looks: Looks) -> None:
    make(looks.root / "lot" / "a.tif")
    make(looks.root / "b.tif")
    looks()
    assert looks.last.listed == {"": {"b.tif"}, "lot": {"lot/a.tif"}}
    shutil.rmtree(looks.root / "lot")
    looks()
    assert looks.last.listed == {"": {"b.tif"}, "lot": None}


def test_folder_that_becomes_a_link_is_not_followed(looks: Looks, tmp_path: Path) -> None:
    make(looks.root / "lot" / "a.tif")
    assert looks() == ["lot/a.tif"]
    elsewhere = make(tmp_path.parent / f"{tmp_path.name}-secret" / "s.tif").parent
    shutil.rmtree(looks.root / "lot")
    (looks.root / "lot").symlink_to(elsewhere)
    assert looks() == []


def test_nothing_is_known_after_forgetting(looks: Looks) -> None:
    make(looks.root / "a.tif")
    looks.settled = {"a.tif"}
    looks()
    looks()
    looks.scan.forget()
    assert looks() == ["a.tif"]


def test_ledger_that_cannot_be_asked_leaves_a_folder_as_never_listed(looks: Looks) -> None:
    make(looks.root / "a.tif")
    looks.scan._take = _raise
    with pytest.raises(RuntimeError):
        looks()
    looks.scan._take = looks._take
    assert looks() == ["a.tif"]


def _raise(_: Found) -> set[str]:
    raise RuntimeError("away")


def test_scan_of_twenty_thousand_settled_files_looks_at_none_but_the_new_one(looks: Looks) -> None:
    n = 20_000
    for i in range(n):
        os.close(os.open(looks.root / f"{i}.tif", os.O_CREAT | os.O_WRONLY))
    looks.settled = {f"{i}.tif" for i in range(n)}
    looks()
    make(looks.root / "new.tif")
    assert looks() == ["new.tif"]
    assert looks.last.n_looked_at == 1
    make(looks.root / "newer.tif")
    took_s = seconds(looks)
    assert took_s / n < 20e-6
    looks()
    assert seconds(looks) < 0.1


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
