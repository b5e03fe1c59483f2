"""Every durable file goes to disk in the one order that a power cut cannot undo.

That is: write, fsync of the file, rename, fsync of its folder.

``system.files`` is the one module that asks the operating system for these, so its ``os`` is watched: what a module
writes past it is not seen, and so counts as missing.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from factories import make_review
from semwatch.classes import clusters
from semwatch.deployment import installation
from semwatch.deployment.releases import Place
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch.service import drift, rereview
from semwatch.service.drift import DriftWatch
from semwatch.settings.recipe import Pins, Recipe
from semwatch.store import lot_table, results, serving
from semwatch.store.audit import AuditLog
from semwatch.store.ledger import Ledger
from semwatch.store.review_record import VerdictRecord
from semwatch.system import files
from semwatch_training.system import checkpoint, weights_file

UTC = "2026-01-01T00:00:00Z"
BANK = Bank(np.zeros((2, 3), np.float32), ("a", "b"), ("one", "two"), ("", ""))


@dataclass(frozen=True)
class Event:
    """What was asked of the operating system, in order."""

    what: str
    path: Path
    other: Path | None = None
    """The new name."""
    content: str = ""
    """Of a file when it was flushed, as a hash: what was written after that is not on disk."""


class WatchedOs:
    """``os``, but for a list of what is flushed and renamed."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        os.fsync(fd)
        self.events.append(Event("fsync", path, content=_hash(path)))

    def replace(self, old: Path, new: Path) -> None:
        old.replace(new)
        self.events.append(Event("rename", old, new))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> WatchedOs:
    watched = WatchedOs()
    monkeypatch.setattr(files, "os", watched)
    return watched


def _hash(path: Path) -> str:
    return "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def faults(events: Sequence[Event], path: Path) -> list[str]:
    """What is missing or out of order for a file that was written whole, or for a folder that was."""
    at = max((i for i, event in enumerate(events) if event.other == path), default=None)
    if at is None:
        return [f"{path} did not get its name by a rename"]
    before, after = events[:at], events[at + 1 :]
    earlier_names = [events[at].path]
    for event in reversed(before):
        if event.other == earlier_names[-1]:
            earlier_names.append(event.path)
    found = []
    for below in (path, *path.rglob("*")):
        written = [name / below.relative_to(path) for name in earlier_names]
        if not any(e.what == "fsync" and e.path in written and e.content == _hash(below) for e in before):
            found.append(f"{below} was not flushed with what it holds before the rename")
    if not any((e.what, e.path) == ("fsync", path.parent) for e in after):
        found.append(f"the folder of {path} was not flushed after the rename")
    return found


def faults_of_grown(events: Sequence[Event], path: Path) -> list[str]:
    """The same for a file that is appended to."""
    found = []
    if not any((e.what, e.path, e.content) == ("fsync", path, _hash(path)) for e in events):
        found.append(f"{path} was not flushed with what it holds")
    if not any((e.what, e.path) == ("fsync", path.parent) for e in events):
        found.append(f"the folder of {path} was not flushed once it was there")
    return found


def faults_of_new_folders(events: Sequence[Event], path: Path, top: Path) -> list[str]:
    """Folders between ``top`` and a file whose names a power cut could take."""
    folders = [folder for folder in path.parents if folder != top and folder.is_relative_to(top)]
    return [f"{f} was made and its folder not flushed" for f in folders if Event("fsync", f.parent) not in events]


# --- every durable file ----------------------------------------------------------------------------------------------


def _result(folder: Path) -> list[Path]:
    review = make_review(2, n_pages=2, path="lot/wafer/a.tif")
    paths = results.write(review, results_dir=folder)
    return [paths.json, *paths.overlays]


def _reason(folder: Path) -> list[Path]:
    said = {"source": "tool", "path": "lot/a.tif", "sha256": "a" * 64, "reason": "cut", "quarantined_utc": UTC}
    return [results.write_reason(results_dir=folder, attempts=1, size=3, **said)[0]]


def _kept_revision(folder: Path) -> list[Path]:
    path = results.write(make_review(1), results_dir=folder).json
    verdict = VerdictRecord(kind="known", label="bridge", confidence=0.9, nearest=(), class_code=None)
    defect_id = results.read(path).pages[0].defects[0].defect_id
    assert results.revise(path, {(0, defect_id): verdict}, head_version=9, utc=UTC)
    return [results.revision_path(path, 1), path]


def _kept_other_content(folder: Path) -> list[Path]:
    for sha256 in ("a" * 64, "b" * 64):
        path = results.write(replace(make_review(1), sha256=sha256), results_dir=folder).json
    return [path, *(kept for kept in path.parent.iterdir() if ".aaaaaaaa." in kept.name)]


def _lot_table(folder: Path) -> list[Path]:
    path = results.write(make_review(2), results_dir=folder).json
    lot_table.write(path.parent)
    return [path.parent / lot_table.LOT]


def _publish(folder: Path) -> Path:
    for version in (1, 2):
        (folder / "weights").write_bytes(b"network %d" % version)
        head_bank.write(BANK, folder / "bank.npz")
        meta = Meta(model="head", created_utc=UTC, inputs={}, outputs={}, labels=("a", "b"))
        made = model_repository.publish(folder, meta, folder / "weights", beside={head_bank.BANK: folder / "bank.npz"})
        assert made == version
    return folder / "head" / "2"


def _pin(folder: Path) -> list[Path]:
    _publish(folder)
    choice.pin(folder, "head", 1)
    return [folder / "head" / choice.PINNED]


def _withdrawn(folder: Path) -> list[Path]:
    _publish(folder)
    choice.withdraw(folder, "head", 2, "worse")
    return [folder / "head" / f"2{choice.WITHDRAWN}"]


def _serving(folder: Path) -> list[Path]:
    serving.announce(folder, {"head": 2}, {})
    return [folder / serving.ANNOUNCED]


def _reread(folder: Path) -> list[Path]:
    models: Any = {Pins(): SimpleNamespace(versions=lambda: {"head": 2})}
    with Ledger(folder / "ledger.sqlite") as ledger:
        rereview.Rereview(
            models, {"tool": Recipe()}, ledger, results_dir=folder, state_dir=folder,
            days=1, publishes=False, is_busy=lambda *_: False, on_revised=lambda *_: None,
        ).step()  # fmt: skip
    return [folder / rereview.MARKER]


def _clusters(folder: Path) -> list[Path]:
    clusters.write(folder, clusters.Clusters())
    return [folder / clusters.FILE]


def _drift_state(folder: Path) -> list[Path]:
    DriftWatch().save(folder / drift.STATE)
    return [folder / drift.STATE]


def _head_bank(folder: Path) -> list[Path]:
    head_bank.write(BANK, folder / "head.bank.npz")
    return [folder / "head.bank.npz"]


def _checkpoint(folder: Path) -> list[Path]:
    checkpoint.write(folder / "run" / "checkpoint.pt", {}, {"weight": torch.arange(3)})
    checkpoint.write_curve([{"loss": 0.5}], folder / "run" / "metrics.csv")
    return [folder / "run" / "checkpoint.pt", folder / "run" / "metrics.csv"]


def _weights(folder: Path) -> list[Path]:
    weights_file.write(folder / "made" / "head.safetensors", {"weight": torch.arange(3)}, {})
    return [folder / "made" / "head.safetensors"]


def _array_on_disk(folder: Path) -> list[Path]:
    """As features of a training run are written, which are larger than memory."""
    path = folder / "features.npy"
    np.lib.format.open_memmap(files.temporary(path), mode="w+", dtype=np.float16, shape=(3, 4)).flush()
    files.place(files.temporary(path), path)
    return [path]


def _installed(folder: Path) -> list[Path]:
    at = Place(root=folder, is_live=False)
    path = Path("/etc/semwatch/site.yaml")
    steps = installation.plan(at, {path: b"folders: []"}, {}, puts_back=True)
    installation.apply(at, steps, None, installation.Record(version="1", prefix=at.prefix, tools=("",), files={}))
    return [at.on_disk(path), at.on_disk(installation.RECORD)]


WRITTEN: dict[str, Callable[[Path], list[Path]]] = {
    "result and overlays": _result,
    "reason": _reason,
    "kept revision": _kept_revision,
    "result of other content": _kept_other_content,
    "lot table": _lot_table,
    "model version": lambda folder: [_publish(folder)],
    "pin": _pin,
    "withdrawn": _withdrawn,
    "serving.json": _serving,
    "reread.json": _reread,
    "clusters.json": _clusters,
    "drift state": _drift_state,
    "head bank": _head_bank,
    "checkpoint and curve": _checkpoint,
    "weights": _weights,
    "array on disk": _array_on_disk,
    "installed files": _installed,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_flushed_renamed_and_the_folder_flushed(name: str, watched: WatchedOs, tmp_path: Path) -> None:
    paths = WRITTEN[name](tmp_path)
    assert paths
    for path in paths:
        assert path.exists()
        assert faults(watched.events, path) == []


@pytest.mark.parametrize(
    "name", ["result and overlays", "reason", "checkpoint and curve", "weights", "installed files"]
)
def test_folders_on_the_way_are_flushed_into_theirs(name: str, watched: WatchedOs, tmp_path: Path) -> None:
    for path in WRITTEN[name](tmp_path):
        assert faults_of_new_folders(watched.events, path, tmp_path) == []


def test_audit_line_is_flushed_before_it_counts_and_a_full_log_is_set_aside(watched: WatchedOs, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, max_bytes=1) as audit:
        for seq in (1, 2):
            audit.append([(seq, {"event": "reviewed"})])
            assert faults_of_grown(watched.events, path) == []
    part = tmp_path / "audit-000000000001.jsonl"
    assert faults(watched.events, part) == []
    assert len(path.read_bytes().splitlines()) == len(part.read_bytes().splitlines()) == 1


def test_row_of_a_lot_table_is_flushed(watched: WatchedOs, tmp_path: Path) -> None:
    [table] = _lot_table(tmp_path)
    path = results.write(make_review(1, path="lot7/wafer01/b.tif"), results_dir=tmp_path).json
    assert path.parent == table.parent
    assert lot_table.append(table.parent, [results.read(path)])
    assert Event("fsync", table, content=_hash(table)) in watched.events


def test_torn_audit_line_is_cut_on_disk_before_the_log_goes_on(watched: WatchedOs, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit:
        audit.append([(1, {"event": "reviewed"})])
    whole = path.read_bytes()
    path.write_bytes(whole + b"torn")
    watched.events.clear()
    AuditLog(path).close()
    assert path.read_bytes() == whole
    assert Event("fsync", path, content=_hash(path)) in watched.events


def test_name_that_moves_to_another_folder_is_flushed_in_both(watched: WatchedOs, tmp_path: Path) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    (tmp_path / "from" / "a").touch()
    files.rename(tmp_path / "from" / "a", tmp_path / "to" / "b")
    assert [event.what for event in watched.events] == ["rename", "fsync", "fsync"]
    assert {event.path for event in watched.events[1:]} == {tmp_path / "from", tmp_path / "to"}


def test_result_is_named_after_its_overlays(watched: WatchedOs, tmp_path: Path) -> None:
    json, *overlays = _result(tmp_path)
    named = [event.other for event in watched.events if event.what == "rename"]
    assert named == [*overlays, json]


# --- what is out of order is found -----------------------------------------------------------------------------------


def test_missing_and_misplaced_steps_are_found(tmp_path: Path) -> None:
    path, partial = tmp_path / "a", tmp_path / ".a.tmp"
    path.write_bytes(b"whole")
    flushed = Event("fsync", partial, content=_hash(path))
    renamed, folder = Event("rename", partial, path), Event("fsync", tmp_path)
    assert faults([flushed, renamed, folder], path) == []
    assert len(faults([], path)) == 1
    assert len(faults([renamed, folder], path)) == 1
    assert len(faults([renamed, flushed, folder], path)) == 1
    assert len(faults([flushed, renamed], path)) == 1
    assert len(faults([flushed, folder, renamed], path)) == 1
    assert len(faults([replace(flushed, content="of a part"), renamed, folder], path)) == 1
