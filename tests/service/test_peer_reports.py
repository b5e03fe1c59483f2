"""What broke other programs, by their public bug reports, re-enacted on this daemon.

Reports whose situation another test plays already are not doubled here: the table in docs/faults.md names it.
"""

import csv
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from daemon import Site, make_site, png
from semwatch.errors import ConfigError
from semwatch.service import lot_tables
from semwatch.service.loop import Service
from semwatch.settings.site import load_site
from semwatch.store import pause, results
from semwatch.store.ledger import LEDGER, Ledger
from service_here import names, running, wait_for

ODD_NAMES = (
    b"a\nERROR semwatch.service: the disk is broken.png", b"b\x1b]0;owned\x07\x1b[2J.png", b"=cmd|' C calc'!A0.png",
    b"cr\rERROR fake.png", b"\xff\xfe.png", b"x" * 251 + b".png", b"%s%n%d{0}.png", b'"quote,comma.png',
    b"'; DROP TABLE work;--.png", b"$(touch x).png", b"[red]markup[bold].png", b"\xc3\xa9.png", b"e\xcc\x81.png",
    b"trail .png", rb"\xff\xfe.png", b"lot\n2/i.png", b"-rf/i.png",
)  # fmt: skip


def test_odd_names_stop_nothing_and_the_table_of_the_lot_can_be_read_back(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """the-paperless-project/paperless 341: a file with an odd name stopped the consumer, and all behind it waited.
    pandas 10018, cpython 22855: a carriage return in a cell, and the table cannot be read back.
    """
    monkeypatch.setattr(lot_tables, "INTERVAL_S", 0.1)
    site = make_site(tmp_path / "site", tiny_repository)
    for i, name in enumerate(ODD_NAMES):
        path = site.drop / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(i))
    top = sum(b"/" not in name for name in ODD_NAMES)
    with running(site):
        wait_for(lambda: len(site.reviews()) == len(ODD_NAMES))
        wait_for(lambda: len({row["sha256"] for row in _rows(site.results / "lot.csv")}) == top)
    assert site.reasons() == {}
    assert all(len(row["sha256"]) == 64 for row in _rows(site.results / "lot.csv"))


def _rows(table: Path) -> list[dict[str, str]]:
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_share_of_the_results_that_goes_stale_is_waited_for(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """romm 4249: the share's server is started anew, every access answers ESTALE, and the service ends for good."""
    site = make_site(tmp_path / "site", tiny_repository)
    is_stale, real = [True], {(os, "scandir"): os.scandir, (shutil, "disk_usage"): shutil.disk_usage}

    def stale(function: Any) -> Any:
        def called(path: Any = ".", *rest: Any) -> Any:
            if is_stale and str(path).startswith(str(site.results.parent)):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return function(path, *rest)

        return called

    site.put("a.png", png(1))
    with running(site):
        wait_for(lambda: names(site) == {"a.png"})
        for (owner, name), function in real.items():
            monkeypatch.setattr(owner, name, stale(function))
        site.put("b.png", png(2))
        wait_for(lambda: pause.stated(site.state))
        is_stale.clear()
        wait_for(lambda: names(site) == {"a.png", "b.png"})
    assert site.reasons() == {}


def test_copy_that_takes_its_size_and_time_first_is_reviewed_once_it_is_whole(
    tmp_path: Path, tiny_repository: Path
) -> None:
    """apache/camel 10131: a copy with its size taken beforehand and its time kept looks whole while it is half zeros;
    when it is whole, neither size nor time have changed.
    """
    site = make_site(tmp_path / "site", tiny_repository)
    whole = png(1).ljust(20_000, b"\0")
    half = len(png(1)) // 2
    copy = site.drop / "copy.png"
    copy.write_bytes(whole[:half] + bytes(len(whole) - half))
    os.utime(copy, (1.7e9, 1.7e9))
    with running(site):
        wait_for(site.reasons)  # of the torn half
        with copy.open("r+b") as file:
            file.write(whole)
        os.utime(copy, (1.7e9, 1.7e9))
        wait_for(lambda: names(site) == {"copy.png"})
    assert site.reasons() == {}
    [review] = site.reviews()
    assert json.loads(review.read_text())["sha256"] == hashlib.sha256(whole).hexdigest()


def test_ledger_that_is_deleted_while_it_is_open_costs_no_result_and_the_next_start_says_what_to_do(
    tmp_path: Path, tiny_repository: Path
) -> None:
    """better-sqlite3 1237: someone deletes the database under a running program, which writes on into nowhere."""
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("a.png", png(1))
    with running(site):
        wait_for(lambda: names(site) == {"a.png"})
        for file in site.state.glob(f"{LEDGER}*"):
            file.unlink()
        site.put("b.png", png(2))
        wait_for(lambda: names(site) == {"a.png", "b.png"})
    with pytest.raises(ConfigError, match="belongs to an earlier ledger; move it aside, keep it, and start again"):
        Service(load_site(site.file))
    assert all(results.read(path) for path in site.reviews())


def test_two_daemons_on_one_folder_leave_every_result_whole(tmp_path: Path, tiny_repository: Path) -> None:
    """paperless-ngx 7319: two consumers take the same file at the same moment, and both fail or both store it."""
    site = make_site(tmp_path / "site", tiny_repository)
    second = tmp_path / "second.yaml"
    settings = site.file.read_text().replace("state_dir: state", f"state_dir: {tmp_path / 'state2'}")
    for relative in ("drop", "recipe.yaml", "results"):
        settings = settings.replace(f": {relative}\n", f": {site.folder / relative}\n")
    second.write_text(settings)
    other = Site(tmp_path / "other")
    other.folder.mkdir()
    shutil.copyfile(second, other.file)
    with running(site), running(other):
        for i in range(8):
            site.put(f"lot/{i}.png", png(i))
        wait_for(
            lambda: len(names(site)) == 8 and all(_n_done(state) == 8 for state in (site.state, tmp_path / "state2"))
        )
    assert all(results.read(path).sha256 for path in site.reviews())
    assert list(site.results.rglob(".*.tmp")) == []
    assert site.reasons() == {}


def _n_done(state: Path) -> int:
    with Ledger(state / LEDGER, read_only=True) as ledger:
        return ledger.counts()["DONE"]


FEW_BYTES = bytes.fromhex(
    "ffd8ffdb004300" + "01" * 64 + "ffc2001108 0400 0400 03011100021100031100"
    "ffc4001400" + "01" + "00" * 16 + "ffc4001410" + "01" + "00" * 16 + "ffda000c03010002000300 00000000ffd9"
)
"""A progressive JPEG of 1024 x 1024 px in 151 bytes; the reported one says 8192 x 8192."""
MANY_SCANS = FEW_BYTES[:-2] + b"\xff\xda\0\x08\1\1\0\1\x3f\x10\0" * 12_000 + b"\xff\xd9"


def test_small_files_that_cost_a_lot_to_decode_hold_up_no_other(tmp_path: Path, tiny_repository: Path) -> None:
    """libjpeg-turbo 284, NVIDIA/DALI 5316: 130 kB of a progressive JPEG with thousands of scans decode for minutes.
    libjpeg-turbo 249: 151 bytes decode to a page of the largest size.
    """
    site = make_site(tmp_path / "site", tiny_repository)
    for name, data in {"scans1.jpg": MANY_SCANS, "scans2.jpg": MANY_SCANS + b"\0", "few.jpg": FEW_BYTES}.items():
        os.utime(site.put(name, data), (1e9, 1e9))
    site.put("good.png", png(1))
    with running(site):
        wait_for(lambda: names(site) >= {"good.png", "few.jpg"} and len(site.reasons()) == 2)
    assert all("scans, over" in reason for reason in site.reasons().values())
