"""The life of an installation: from a fresh Debian to a verdict, to the next version, back, and away."""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

import building
import installed
from daemon import png
from installed import (
    PREFIX,
    RECIPE,
    SITE,
    STATE,
    Layer,
    Load,
    books,
    drop,
    put_later_version,
    put_version,
    ready,
    results,
    semwatch,
)
from machine import Machine
from scenario_table import Note
from semwatch.store.ledger_layout import KIND

NEXT, BROKEN = "99.1.0", "99.2.0"
MIGRATION = f"""        {KIND.layout}: ("ALTER TABLE work ADD COLUMN upgraded TEXT",),
    }},
    made_by="the daemon"""


@pytest.fixture(scope="module")
def next_wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of the working tree as two later versions: one with another ledger, one that cannot start."""
    out = tmp_path_factory.mktemp("next")
    tree = building.copy_of_tree(out / "tree", NEXT)
    _edit(tree / "daemon/semwatch/store/ledger_layout.py", r'    \},\n    made_by="the daemon', MIGRATION)
    building.wheel_of(tree, out)
    tree = building.copy_of_tree(out / "tree", BROKEN)
    _edit(tree / "daemon/semwatch/store/ledger_layout.py", r'    \},\n    made_by="the daemon', MIGRATION)
    _edit(
        tree / "daemon/semwatch/service/loop.py",
        r"        self\._notifier\.ready\(\)\n",
        '        raise OSError("broken")\n',
    )
    building.wheel_of(tree, out)
    return out


def test_0_from_a_fresh_debian_to_the_first_verdict(
    debian: Path, wheels: dict[str, Path], version: str, repository: Path, note: Note
) -> None:
    with Machine(building.MACHINES / "fresh", [debian], binds={**wheels, "/models": repository}) as machine:
        machine.boot()
        start = time.monotonic()
        put_version(machine, version)
        pip_s = time.monotonic() - start
        semwatch(machine, "install", "--models", "/models", version=version)
        machine.run("systemctl", "start", "semwatch.target")
        ready(machine)
        ready_s = time.monotonic() - start
        drop(machine, "first.png", png(1, side=512))
        installed.wait_results(machine, 1)
        first_s = time.monotonic() - start
        again = json.loads(semwatch(machine, "install", "--models", "/models", "--json", version=version))
        assert {row["action"] for row in again["files"]} == {"unchanged"}
        note.books(books(machine, ["first.png"]))
        note.measured(f"{first_s:.0f} s: pip {pip_s:.0f} s, ready after {ready_s:.0f} s; shipped models, offline")


@pytest.mark.timeout(900)
def test_i_upgrade_with_a_ledger_migration_while_files_arrive(layer: Layer, next_wheels: Path, note: Note) -> None:
    with _machine(layer, next_wheels) as machine:
        site, recipe = (machine.path(file).read_bytes() for file in (SITE, RECIPE))
        put_later_version(machine, NEXT, beside=layer.version)
        assert _layout(machine) == 2
        with Load(machine, 300, per_s=20) as load:
            installed.wait_results(machine, 20)
            start = time.monotonic()
            said = semwatch(machine, "upgrade", version=NEXT, timeout_s=200)
            upgrade_s = time.monotonic() - start
            n_left = load.n - len(results(machine))
        assert n_left > 0, "it was upgraded after the work, not under it"
        assert _current(machine) == NEXT, said
        assert _layout(machine) == 3
        assert [machine.path(file).read_bytes() for file in (SITE, RECIPE)] == [site, recipe]
        note.books(books(machine, load.names))
        note.measured(f"upgraded in {upgrade_s:.1f} s, ledger layout 2 to 3, settings untouched")


@pytest.mark.timeout(900)
def test_i_upgrade_that_cannot_start_rolls_back(layer: Layer, version: str, next_wheels: Path, note: Note) -> None:
    with _machine(layer, next_wheels) as machine:
        put_later_version(machine, BROKEN, beside=layer.version)
        with Load(machine, 300, per_s=20) as load:
            installed.wait_results(machine, 20)
            start = time.monotonic()
            done = machine.run(f"{PREFIX}/{BROKEN}/bin/semwatch", "upgrade", "--wait=30", check=False, timeout_s=200)
            upgrade_s = time.monotonic() - start
        assert done.returncode != 0
        assert _current(machine) == version, done.stdout + done.stderr
        ready(machine)
        assert _layout(machine) == 2, "the backup of the ledger is back"
        note.books(books(machine, load.names))
        note.measured(f"rolled back in {upgrade_s:.1f} s; exit {done.returncode}")


def test_j_uninstall_leaves_nothing_but_data(layer: Layer, note: Note) -> None:
    with layer.machine("uninstall") as machine:
        machine.boot()
        ready(machine)
        with Load(machine, 20) as load:
            pass
        done = books(machine, load.names)
        users = machine.run("cat", "/etc/passwd").stdout.count("\nsemwatch")
        stays = json.loads(semwatch(machine, "uninstall", "--json", timeout_s=200))["stays"]
        left = _files_of_ours(machine)
        # The environment was made by hand, and the settings were edited: neither is the installation's to delete.
        kept = ("/srv/semwatch/", f"{STATE}/", "/var/lib/semwatch-redis/", f"{PREFIX}/{layer.version}/", SITE, RECIPE)
        assert [path for path in left if not path.startswith(kept)] == []
        assert len(results(machine)) == len(load.names)
        assert (machine.path(STATE) / "ledger.sqlite").exists()
        assert "semwatch" not in machine.run("systemctl", "list-unit-files", "--no-legend").stdout
        assert "semwatch" not in machine.run("ps", "-e", "-o", "args", check=False).stdout
        n_data = sum(not path.startswith(PREFIX) for path in left)
        for line in stays:
            machine.run("sh", "-c", line)
        assert _files_of_ours(machine) == []
        assert users == 3
        assert "semwatch" not in machine.run("cat", "/etc/passwd").stdout
        note.books(done)
        note.measured(f"left: {n_data} files of data and edited settings; the commands it names remove them too")


def test_m_a_second_tool_beside_the_first(machine: Machine, version: str, note: Note) -> None:
    semwatch(machine, "install", "--tool", "sem-2", "--models", "/models", version=version)
    machine.run("systemctl", "start", "semwatch@sem-2.service")
    drop(machine, "first.png", png(1))
    drop(machine, "second.png", png(1), folder="/srv/semwatch/sem-2/drop")
    done = books(machine, ["first.png"])
    of_second = "/srv/semwatch/sem-2/results/sem-2"
    machine.wait_for(lambda: results(machine, of_second), installed.WORK_S, "the second tool's result")
    assert results(machine, of_second) == {"second.png"}
    assert results(machine) == {"first.png"}
    note.books(done)
    note.measured("each has its own files, ledger and queue")


def _machine(layer: Layer, next_wheels: Path) -> Machine:
    """A booted machine with the later versions' wheels beside the wheelhouse."""
    binds = {**layer.binds, "/product": next_wheels}
    machine = Machine(building.MACHINES / "upgrade", layer.below, binds=binds).boot()
    ready(machine)
    return machine


def _edit(file: Path, pattern: str, by: str) -> None:
    file.write_text(building.replaced(file.read_text(), pattern, by))


def _current(machine: Machine) -> str:
    return machine.path(f"{PREFIX}/current").readlink().name


def _layout(machine: Machine) -> int:
    with closing(sqlite3.connect(f"file:{machine.path(STATE)}/ledger.sqlite?mode=ro", uri=True, timeout=10)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def _files_of_ours(machine: Machine) -> list[str]:
    """Every file and link below the places that an installation writes to which bears our name."""
    places = ("/etc", "/opt", "/usr/lib", "/usr/local", "/srv", "/var")
    return sorted(machine.run("find", *places, "-path", "*semwatch*", "-not", "-type", "d").stdout.splitlines())
