"""What ledger and archive stand on: made once, recognised, brought up to date, told in our words."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.system.sqlite_file import Kind, SqliteFile

FIRST = Kind(
    noun="book",
    application_id=0x53454D58,
    schema=("CREATE TABLE lines (n INTEGER PRIMARY KEY)",),
    migrations={},
    made_by="the author makes it",
    remedy="write it again",
)
SECOND_STEP = {1: ("ALTER TABLE lines ADD COLUMN word TEXT",)}
THIRD = replace(FIRST, migrations={**SECOND_STEP, 2: ("UPDATE lines SET word = 'none'",)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shelf" / "book.sqlite"


@pytest.fixture
def file(path: Path) -> Iterator[SqliteFile]:
    with closing(SqliteFile(path, FIRST)) as file:
        yield file


def test_new_file_is_made_with_its_folder_and_is_empty(path: Path, file: SqliteFile) -> None:
    assert file.rows("SELECT * FROM lines") == []
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_every_transaction_is_flushed_before_it_returns(path: Path, file: SqliteFile) -> None:
    """In a WAL, NORMAL would leave the last transactions to a power cut."""
    full = [(2,)]
    assert file.rows("PRAGMA synchronous") == full
    with closing(SqliteFile(path, FIRST)) as opened_again:
        assert opened_again.rows("PRAGMA synchronous") == full


def test_transaction_is_all_or_nothing(file: SqliteFile) -> None:
    def fail_half_way() -> None:
        with file.transaction() as db:
            db.execute("INSERT INTO lines (n) VALUES (1)")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    with file.transaction() as db:
        db.execute("INSERT INTO lines (n) VALUES (2)")
    assert file.rows("SELECT n FROM lines WHERE n > ?", (0,)) == [(2,)]


def test_older_layout_goes_through_every_step_to_the_newest(path: Path, file: SqliteFile) -> None:
    with file.transaction() as db:
        db.execute("INSERT INTO lines (n) VALUES (7)")
    file.close()
    with closing(SqliteFile(path, THIRD)) as newest:
        assert newest.rows("SELECT n, word FROM lines") == [(7, "none")]
    with pytest.raises(ConfigError, match=r"book .*newer semwatch \(layout 3, this one knows 1\)"):
        SqliteFile(path, FIRST)


def test_older_layout_is_refused_to_whom_may_not_change_it_and_shown_to_a_reader(path: Path, file: SqliteFile) -> None:
    file.close()
    with pytest.raises(ConfigError, match="older semwatch; the author makes it"):
        SqliteFile(path, THIRD, migrates=False)
    with closing(SqliteFile(path, THIRD, read_only=True)) as reader:
        assert reader.rows("SELECT * FROM lines") == []


def test_file_that_is_absent_empty_or_of_another_kind_is_told_apart(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no book at .*; the author makes it"):
        SqliteFile(path, FIRST, read_only=True)
    assert not path.parent.exists()
    path.parent.mkdir()
    path.touch()
    with pytest.raises(ServiceUnavailable, match="still empty"):
        SqliteFile(path, FIRST, read_only=True)
    SqliteFile(path, FIRST).close()
    with pytest.raises(ConfigError, match="no ledger of semwatch"):
        SqliteFile(path, replace(FIRST, noun="ledger", application_id=1))
    path.write_bytes(b"no database, however long one looks at it" * 100)
    with pytest.raises(ConfigError, match=r"book .* is broken .*; write it again"):
        SqliteFile(path, FIRST)


def test_many_that_make_the_same_file_at_once_all_get_it(path: Path) -> None:
    def write(n: int) -> None:
        with closing(SqliteFile(path, THIRD)) as file, file.transaction() as db:
            db.execute("INSERT INTO lines (n) VALUES (?)", (n,))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(16)))
    with closing(SqliteFile(path, THIRD, read_only=True)) as file:
        assert file.rows("SELECT count(*) FROM lines") == [(16,)]


def test_closed_file_says_so_and_closes_again(file: SqliteFile) -> None:
    file.close()
    file.close()
    with pytest.raises(RuntimeError, match="the book is closed"):
        file.rows("SELECT 1")
