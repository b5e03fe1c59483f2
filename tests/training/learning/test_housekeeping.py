"""What learning deletes after its time, and what it never does."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster_files import T0, ids, three
from factories import make_record
from semwatch.classes.clusters import Clusters
from semwatch.settings.site import Learning
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.housekeeping import REPORTS, tidy

LONG_AFTER = "2027-06-01T00:00:00Z"


def test_folder_of_a_first_cycle_is_left_as_it_is(tmp_path: Path) -> None:
    with Archive(tmp_path / ARCHIVE) as archive:
        assert tidy(tmp_path, archive, Clusters(), Learning(), now_utc=LONG_AFTER) == 0
    assert {path.name for path in tmp_path.iterdir()} <= {ARCHIVE, f"{ARCHIVE}-wal", f"{ARCHIVE}-shm"}


def test_settled_unknowns_leave_but_not_what_waits_nor_what_stands_for_a_cluster_without_class(tmp_path: Path) -> None:
    found = three()  # records 0 to 9 are a class of head 2, 10 to 19 are proposed
    with Archive(tmp_path / ARCHIVE) as archive:
        names = ids(*range(22))
        archive.add([make_record(i, id=name) for i, name in enumerate(names)], now_utc=T0)
        archive.settle(names[:10], "learned", "", now_utc=T0)
        archive.settle(names[10:21], "duplicate", "", now_utc=T0)
        assert tidy(tmp_path, archive, found, Learning(), now_utc="2026-12-31T00:00:00Z") == 0  # not a year yet
        assert tidy(tmp_path, archive, found, Learning(), now_utc=LONG_AFTER) == 11
        assert set(archive.state_of(names)) == {*names[10:20], names[21]}


def test_the_newest_reports_are_kept(tmp_path: Path) -> None:
    for day in range(1, 6):
        (tmp_path / REPORTS / f"2026-01-0{day}T023000Z").mkdir(parents=True)
        (tmp_path / REPORTS / f"2026-01-0{day}T023000Z" / "report.json").write_text("{}")
    with Archive(tmp_path / ARCHIVE) as archive:
        tidy(tmp_path, archive, three(), Learning(keep_reports=2), now_utc=LONG_AFTER)
    assert sorted(path.name[:10] for path in (tmp_path / REPORTS).iterdir()) == ["2026-01-04", "2026-01-05"]


def test_what_shall_be_judged_again_must_be_kept() -> None:
    with pytest.raises(ValidationError, match="keep_days is smaller than reread_days"):
        Learning(keep_days=7)
