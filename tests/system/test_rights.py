"""What root does in another account's folder. These tests need root: they play the account that lays the trap."""

import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from semwatch.deployment import backups
from semwatch.deployment.backups import Kept
from semwatch.deployment.installation import copy_models
from semwatch.deployment.installed_files import REPOSITORY, STATE
from semwatch.deployment.releases import Place
from semwatch.errors import ConfigError
from semwatch.store import serving
from semwatch.system import rights
from semwatch.triton.setup import set_up

THEM = 54321

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="plays root and another account")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A machine's root that other accounts may look into."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o711)
    root = tmp_path / "root"
    root.mkdir()
    return Place(root=root, is_live=False)


def theirs(folder: Path) -> Path:
    folder.mkdir(parents=True)
    os.chown(folder, THEM, THEM)
    return folder


def victim(tmp_path: Path) -> Path:
    path = tmp_path / "root-only"
    path.write_text("root:secret\n")
    path.chmod(0o600)
    return path


def is_untouched(path: Path) -> bool:
    return (path.read_text(), path.stat().st_uid, path.stat().st_mode & 0o7777) == ("root:secret\n", 0, 0o600)


@needs_root
def test_the_first_owner_who_is_not_root_counts(place: Place) -> None:
    folder = theirs(place.root / "a")
    (folder / "b").mkdir()  # root's, but theirs to swap
    assert rights.owner_on_the_way(folder / "b" / "c") == (THEM, THEM)
    assert rights.owner_on_the_way(place.root / "nothing" / "here") == (0, 0)
    (place.root / "link").symlink_to("a/b")
    (place.root / "up").symlink_to(f"{place.root}/nothing/../a")
    assert rights.owner_on_the_way(place.root / "link" / "c") == (THEM, THEM)
    assert rights.owner_on_the_way(place.root / "up") == (0, 0)  # there is no way through what is not there
    (place.root / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="symbolic links"):
        rights.owner_on_the_way(place.root / "circle")


@needs_root
def test_root_has_its_rights_back_after_an_error(place: Place) -> None:
    folder = theirs(place.root / "a")
    before = os.geteuid(), os.getegid(), os.getgroups()
    with pytest.raises(PermissionError), rights.of_owner(folder):
        (place.root / "not theirs").touch()
    assert (os.geteuid(), os.getegid(), os.getgroups()) == before


@needs_root
@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal"])
def test_backup_and_put_back_follow_no_link_beside_a_ledger(place: Place, tmp_path: Path, end: str) -> None:
    secret, state = victim(tmp_path), theirs(place.on_disk(STATE))
    ledger = state / "ledger.sqlite"
    with rights.of_owner(state), sqlite3.connect(ledger) as db:
        db.execute("PRAGMA journal_mode = wal")
        db.execute("CREATE TABLE audit (seq INTEGER PRIMARY KEY AUTOINCREMENT, line TEXT)")
        db.execute("INSERT INTO audit (line) VALUES ('one')")
    db.close()
    kept = Kept((ledger,), ())
    backup = backups.take(place, kept, "1-2")
    copy = backup / ledger.relative_to(place.root)
    assert (copy.stat().st_uid, sqlite3.connect(copy).execute("SELECT line FROM audit").fetchall()) == (0, [("one",)])
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm", f"ledger.sqlite{end}"):
        (state / name).unlink(missing_ok=True)
    (state / f"ledger.sqlite{end}").symlink_to(secret)
    for act in (lambda: backups.take(place, kept, "2-3"), lambda: backups.put_back(place, backup, [ledger])):
        with suppress(OSError, sqlite3.Error):
            act()
        assert is_untouched(secret)
    for path in place.on_disk(backups.BACKUPS).rglob("*"):
        assert path.is_dir() or b"root:secret" not in path.read_bytes()


@needs_root
def test_what_is_put_back_through_a_dangling_link_makes_no_file_of_root(place: Place, tmp_path: Path) -> None:
    state = theirs(place.on_disk(STATE))
    ledger = state / "ledger.sqlite"
    with rights.of_owner(state), sqlite3.connect(ledger) as db:
        db.execute("CREATE TABLE audit (seq INTEGER PRIMARY KEY AUTOINCREMENT, line TEXT)")
    db.close()
    backup = backups.take(place, Kept((ledger,), ()), "1-2")
    ledger.unlink()
    ledger.symlink_to(tmp_path / "made-by-root")
    with pytest.raises((OSError, sqlite3.Error)):
        backups.put_back(place, backup, [ledger])
    assert not (tmp_path / "made-by-root").exists()
    ledger.unlink()
    backups.put_back(place, backup, [ledger])
    assert ledger.stat().st_uid == THEM


@needs_root
def test_a_link_among_the_files_of_a_backup_is_left_out(place: Place, tmp_path: Path) -> None:
    secret, state = victim(tmp_path), theirs(place.on_disk(STATE))
    (state / "clusters.json").symlink_to(secret)
    assert state / "clusters.json" not in backups.kept_files(place, [""]).files
    with pytest.raises(OSError, match="clusters"):
        backups.take(place, Kept((), (state / "clusters.json",)), "1-2")
    assert list(place.on_disk(backups.BACKUPS).iterdir()) == []


@needs_root
def test_a_pipe_in_the_place_of_the_lock_does_not_hold_root(place: Place) -> None:
    state = theirs(place.on_disk(STATE))
    os.mkfifo(state / "ledger.sqlite.lock")
    assert serving.daemon_runs(state) in (True, False)


@needs_root
def test_models_are_copied_past_links_that_the_owner_of_the_repository_lays(
    place: Place, tmp_path: Path, tiny_repository: Path
) -> None:
    """The owner swaps each staging folder for one with a link to a file of root; root gave that file away before."""
    secret, repository = victim(tmp_path), theirs(place.on_disk(REPOSITORY))
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            for staging in repository.glob("*/.staging-*"):
                try:
                    staging.rename(staging.with_name(".away"))
                    staging.mkdir()
                    (staging / "zz").symlink_to(secret)
                    (staging / "meta.json").symlink_to(secret)
                except OSError:
                    pass

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        copy_models(place, tiny_repository, dry_run=False)
    except (OSError, ValueError):
        pass
    finally:
        is_over.set()
        thread.join()
    assert is_untouched(secret)


@needs_root
def test_copied_models_are_their_folders_owners_and_a_link_in_the_source_is_refused(
    place: Place, tmp_path: Path, tiny_repository: Path
) -> None:
    secret, repository = victim(tmp_path), theirs(place.on_disk(REPOSITORY))
    repository.chmod(0o2750)
    copied = copy_models(place, tiny_repository, dry_run=False)
    assert copied
    for path in repository.rglob("*"):
        assert (path.stat().st_uid, path.stat().st_gid) == (THEM, THEM), path
        assert path.stat().st_mode & 0o7777 in (0o644, 0o755, 0o2755, 0o2750), path
    source = tmp_path / "source"
    for path in tiny_repository.rglob("*"):
        target = source / path.relative_to(tiny_repository)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    version = next((source / "detector").glob("[0-9]*"))
    version.rename(version.with_name("7"))
    (version.with_name("7") / "more").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        copy_models(place, source, dry_run=False)
    assert not (repository / "detector" / "7").exists()


@needs_root
def test_root_sets_triton_up_in_no_folder_that_another_may_change(place: Place) -> None:
    """Root ran the interpreter that the folder's owner had put there."""
    folder = theirs(place.root / "triton")
    with pytest.raises(ConfigError, match="not root's alone"):
        set_up(folder)
    with pytest.raises(ConfigError, match="not root's alone"):
        set_up(folder / "deeper")
    shared = place.root / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="not root's alone"):
        set_up(shared / "triton")
    assert list(folder.iterdir()) == []
    assert rights.is_roots_alone(place.root / "mine")
