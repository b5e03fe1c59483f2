"""Changes of version on real files and real ledgers; systemd is a script here, the real one has tests of its own."""

import json
import os
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import semwatch
from semwatch.cli import install as commands
from semwatch.deployment import backups, installation, releases, systemctl, upgrade
from semwatch.deployment.installation import Record
from semwatch.deployment.installed_files import UNITS, systemd_folder, wanted
from semwatch.deployment.releases import Place
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.settings.fields import EXAMPLES
from semwatch.store.ledger import Ledger, OutboxItem
from semwatch.store.ledger_layout import KIND
from semwatch.system.files import Stamp

OLD, NEW = "0.1.0", "0.2.0"
UTC = "2026-01-01T00:00:00Z"
STATE, SITE = Path("/var/lib/semwatch"), Path("/etc/semwatch/site.yaml")
DAEMON, REDIS, TIMER = "semwatch.service", "semwatch-redis.service", "semwatch-retrain.timer"

# Units are files that hold their state; `start-<version served>` holds what a start makes of it.
SYSTEMCTL = """#!/bin/sh
cd "$FAKE" || exit 1
echo "$(basename "$0") $*" >> calls
verb=$1; shift
case "$verb" in
list-units)
    for last; do :; done
    cd units; for unit in $last; do [ -e "$unit" ] || continue
        state=$(cat "$unit"); [ "$state" = inactive ] || echo "$unit loaded $state running A unit"; done;;
stop) for unit; do echo inactive > "units/$unit"; done;;
start)
    shift; version=$(readlink "$CURRENT")
    [ -x "on-start-$version" ] && "./on-start-$version"
    for unit; do [ -e "start-$version" ] && cat "start-$version" > "units/$unit" || echo active > "units/$unit"; done;;
is-active) for unit; do cat "units/$unit"; done;;
esac
exit 0
"""


@dataclass(frozen=True)
class Machine:
    """A machine on which 0.1.0 serves and 0.2.0 lies in the prefix."""

    at: Place
    fake: Path

    def path(self, path: Path) -> Path:
        return self.at.on_disk(path)

    @property
    def ledger(self) -> Path:
        return self.path(STATE / "ledger.sqlite")

    @property
    def record(self) -> Record:
        record = installation.read_record(self.at)
        assert record is not None
        return record

    @property
    def units(self) -> dict[str, str]:
        return {unit.name: unit.read_text().strip() for unit in (self.fake / "units").iterdir()}

    def calls(self) -> list[str]:
        return (self.fake / "calls").read_text().splitlines()

    def change(self, version: str = NEW, ready_s: float = 5) -> upgrade.Change:
        release = releases.release_in_prefix(self.at, version)
        return upgrade.change_version(self.at, self.record, release, ready_s=ready_s)

    def on_start(self, version: str, python: str) -> None:
        """What a version does to the state folder when it starts."""
        script = self.fake / f"on-start-{version}"
        script.write_text(f"#!{sys.executable}\nimport sqlite3\nfolder = {str(self.path(STATE))!r}\n{python}\n")
        script.chmod(0o755)


NEXT_LAYOUT = KIND.layout + 1
MIGRATES = f"""
db = sqlite3.connect(folder + "/ledger.sqlite")
db.execute("ALTER TABLE work ADD COLUMN wafer TEXT")
db.execute("INSERT INTO audit (line) VALUES ('{{}}')")
db.execute("PRAGMA user_version = {NEXT_LAYOUT}")
db.commit()
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    at = Place(root=tmp_path / "root")
    fake = tmp_path / "fake"
    (fake / "units").mkdir(parents=True)
    for unit in ("semwatch.target", DAEMON, REDIS, TIMER):
        (fake / "units" / unit).write_text("active\n")
    for tool in ("systemctl", "systemd-sysusers", "systemd-tmpfiles"):
        (fake / tool).write_text(SYSTEMCTL)
        (fake / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("CURRENT", str(at.current))
    for version in (OLD, NEW):
        put_version(at, version)
    first = releases.release_in_prefix(at, OLD)
    record = Record(version=OLD, prefix=at.prefix, tools=("",), files={})
    files = wanted(first.package, prefix=at.prefix, tools=("",))
    installation.apply(at, installation.plan(at, files, {}, puts_back=True), None, record)
    releases.switch(at, OLD)
    made = Machine(at, fake)
    made.ledger.parent.mkdir(parents=True)
    review(made.ledger, 3)
    return made


def put_version(at: Place, version: str) -> None:
    """A version in the prefix, as pip lays it out, with units that name it."""
    home = at.on_disk(at.prefix / version)
    package = home / "lib" / "python3.11" / "site-packages" / "semwatch"
    source = Path(semwatch.__file__).parent
    shutil.copytree(systemd_folder(source), package / "systemd")
    # A release before the rooms had its examples at the top.
    shutil.copytree(EXAMPLES, package / "examples" if version == OLD else package / "settings" / "examples")
    with (package / "systemd" / DAEMON).open("a") as unit:
        unit.write(f"# of {version}\n")
    (home / "bin").mkdir()
    for file in (package / "__init__.py", home / "bin" / "semwatch"):
        file.touch(0o755)


def review(path: Path, n: int) -> None:
    """Bring ``n`` more pieces of work to DONE."""
    with Ledger(path) as ledger:
        done = ledger.counts()["DONE"]
        for i in range(done, done + n):
            claim = ledger.claim("t", f"{i}.tif", sha256=f"{i:064d}", stamp=Stamp(1, 1), now_utc=UTC)
            items = [OutboxItem("s", str(i), b"record")]
            ledger.finish(claim, outbox=items, audit={"event": "reviewed"}, now_utc=UTC)


def n_done(path: Path) -> int:
    with Ledger(path, read_only=True) as ledger:
        return ledger.counts()["DONE"]


def semwatch_cli(machine: Machine, name: str, *options: object) -> dict:  # type: ignore[type-arg]
    app = typer.Typer()
    app.command("upgrade")(commands.upgrade_command)
    app.command("uninstall")(commands.uninstall)
    words = [name, "--root", str(machine.at.root), "--json", *map(str, options)]
    ended = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.output)  # type: ignore[no-any-return]


# --- the new version serves -------------------------------------------------------------------------------------------


def test_an_upgrade_stops_then_switches_then_starts_what_ran(machine: Machine) -> None:
    change = machine.change()
    assert set(change.units) == {"semwatch.target", DAEMON, REDIS, TIMER}
    assert machine.units == dict.fromkeys(change.units, "active")
    assert (machine.record.version, machine.record.previous) == (NEW, OLD)
    assert releases.serving_version(machine.at) == NEW
    assert f"# of {NEW}" in machine.path(UNITS / DAEMON).read_text()
    words = [call.split()[:2] for call in machine.calls()]
    order = [["systemctl", "stop"], ["systemd-sysusers", f"{machine.path(Path('/etc/sysusers.d/semwatch.conf'))}"]]
    order += [["systemd-tmpfiles", "--create"], ["systemctl", "daemon-reload"], ["systemctl", "start"]]
    assert [call for call in words if call in order] == order
    assert n_done(machine.ledger) == 3


def test_what_did_not_run_is_not_started(machine: Machine) -> None:
    (machine.fake / "units" / TIMER).write_text("inactive\n")
    (machine.fake / "units" / REDIS).write_text("failed\n")
    assert set(machine.change().units) == {"semwatch.target", DAEMON}
    assert machine.units[TIMER] == "inactive"


def test_a_daemon_that_had_failed_is_started_for_it_may_be_mended(machine: Machine) -> None:
    (machine.fake / "units" / DAEMON).write_text("failed\n")
    assert DAEMON in machine.change().units


def test_a_cycle_of_learning_is_stopped_and_left_to_its_timer(machine: Machine) -> None:
    (machine.fake / "units" / "semwatch-retrain.service").write_text("activating\n")
    assert "semwatch-retrain.service" not in machine.change().units
    assert machine.units["semwatch-retrain.service"] == "inactive"


def test_edited_files_stay_and_deleted_ones_stay_away(machine: Machine) -> None:
    machine.path(UNITS / DAEMON).write_text("mine")
    machine.path(UNITS / TIMER).unlink()
    steps = {step.path.name: step.action for step in machine.change().steps}
    assert (steps[DAEMON], steps[TIMER]) == ("kept", "absent")
    assert machine.path(UNITS / DAEMON).read_text() == "mine"
    assert f"# of {NEW}" in machine.path(UNITS / f"{DAEMON}.new").read_text()
    assert not machine.path(UNITS / TIMER).exists()


def test_a_unit_that_the_new_version_has_not_is_disabled_and_removed(machine: Machine) -> None:
    (releases.release_in_prefix(machine.at, NEW).package / "systemd" / "semwatch-retrain.path").unlink()
    machine.change()
    assert "systemctl disable --now semwatch-retrain.path" in machine.calls()
    assert not machine.path(UNITS / "semwatch-retrain.path").exists()


# --- backups ----------------------------------------------------------------------------------------------------------


def test_a_backup_holds_ledger_unknowns_settings_and_pins_under_their_own_paths(machine: Machine) -> None:
    learning, head = machine.path(STATE / "learning"), machine.path(Path("/srv/semwatch/model_repository/head"))
    for folder in (learning, head):
        folder.mkdir(parents=True)
    with closing(sqlite3.connect(learning / "unknowns.sqlite")) as db:
        db.execute("CREATE TABLE crops (id)")
    (learning / "clusters.json").write_text("{}")
    (head / "pinned").write_text("3\n")
    backup = machine.change().backup
    assert backup.name.endswith(f"Z-{OLD}-{NEW}")
    assert backup.parent.stat().st_mode & 0o077 == 0
    held = {str(path.relative_to(backup)) for path in backup.rglob("*") if path.is_file()}
    state = "var/lib/semwatch"
    assert held == {
        *(f"{state}/{name}" for name in ("ledger.sqlite", "learning/unknowns.sqlite", "learning/clusters.json")),
        *("etc/semwatch/site.yaml", "etc/semwatch/recipe.yaml", "srv/semwatch/model_repository/head/pinned"),
    }
    assert n_done(backup / "var/lib/semwatch/ledger.sqlite") == 3


def test_what_only_the_wal_holds_is_backed_up_too(machine: Machine) -> None:
    with closing(sqlite3.connect(machine.ledger)) as beside:  # an open reader keeps the WAL from being folded in
        beside.execute("SELECT count(*) FROM work").fetchone()
        review(machine.ledger, 2)
        assert machine.ledger.with_name("ledger.sqlite-wal").stat().st_size > 0
        backup = machine.change().backup
    assert n_done(backup / "var/lib/semwatch/ledger.sqlite") == 5


def test_the_five_newest_backups_are_kept(machine: Machine) -> None:
    made = [backups.take(machine.at, backups.kept_files(machine.at, ("",)), f"{i}-x").name for i in range(7)]
    assert [path.name for path in backups.listed(machine.at)] == made[2:]


def test_a_machine_that_never_ran_has_nothing_to_back_up(machine: Machine) -> None:
    shutil.rmtree(machine.ledger.parent)
    assert not (machine.change().backup / "var").exists()


# --- the new version is not ready -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "words"), [("failed", "is failed"), ("activating", "not ready within 1 s")])
def test_a_version_that_is_not_ready_goes_and_the_old_one_serves_with_its_ledger(
    machine: Machine, state: str, words: str
) -> None:
    before = installation.read_record(machine.at)
    files = {path: path.read_bytes() for path in machine.path(Path("/etc")).rglob("*") if path.is_file()}
    (machine.fake / f"start-{NEW}").write_text(f"{state}\n")
    machine.on_start(NEW, MIGRATES)
    with pytest.raises(ServiceUnavailable, match=rf"(?s)0\.2\.0 does not serve.*{words}.*0\.1\.0 serves again"):
        machine.change(ready_s=1)
    assert set(machine.units.values()) == {"active"}
    assert releases.serving_version(machine.at) == OLD
    assert installation.read_record(machine.at) == before
    assert files == {path: path.read_bytes() for path in machine.path(Path("/etc")).rglob("*") if path.is_file()}
    assert n_done(machine.ledger) == 3


def test_a_ledger_that_is_put_back_counts_its_audit_lines_on(machine: Machine) -> None:
    (machine.fake / f"start-{NEW}").write_text("failed\n")
    machine.on_start(NEW, MIGRATES)
    with pytest.raises(ServiceUnavailable):
        machine.change()
    with Ledger(machine.ledger) as ledger:  # the log may hold line 4 already, and no number is used twice
        assert ledger.last_audit_seq() == 4
        assert [seq for seq, _ in ledger.audit_after(0, 10)] == [1, 2, 3, 4]
        ledger.forget_audit(4)
    review(machine.ledger, 1)
    with Ledger(machine.ledger) as ledger:
        assert [seq for seq, _ in ledger.audit_after(0, 10)] == [5]


def test_a_disk_that_takes_no_backup_leaves_the_old_version_serving(machine: Machine) -> None:
    machine.path(backups.BACKUPS).parent.mkdir(parents=True, exist_ok=True)
    machine.path(backups.BACKUPS).write_text("in the way")
    with pytest.raises(ServiceUnavailable, match=r"0\.1\.0 serves again"):
        machine.change()
    assert set(machine.units.values()) == {"active"}
    assert releases.serving_version(machine.at) == OLD


def test_a_stop_from_the_keyboard_goes_back_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = systemctl.start, []

    def interrupted_once(units: list[str], *, within_s: float) -> None:
        calls.append(units)
        if len(calls) == 1:
            raise KeyboardInterrupt
        start(units, within_s=within_s)

    monkeypatch.setattr(systemctl, "start", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        machine.change()
    assert releases.serving_version(machine.at) == OLD
    assert set(machine.units.values()) == {"active"}


def test_where_there_is_no_way_back_that_is_said_loudly(machine: Machine) -> None:
    (machine.fake / f"start-{NEW}").write_text("failed\n")
    shutil.rmtree(machine.path(machine.at.prefix / OLD))
    with pytest.raises(ServiceUnavailable, match=r"NOTHING SERVES.*0\.1\.0 is not in /opt/semwatch; there: 0\.2\.0"):
        machine.change()


def test_a_daemon_that_systemd_did_not_start_is_not_upgraded_under(machine: Machine) -> None:
    with Ledger(machine.ledger), pytest.raises(ServiceUnavailable, match="a daemon that systemd did not start holds"):
        machine.change()
    assert releases.serving_version(machine.at) == OLD


def test_without_room_for_the_backup_nothing_is_stopped(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "_MARGIN_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="make room first"):
        machine.change()
    assert not (machine.fake / "calls").exists()


# --- an earlier version serves again ----------------------------------------------------------------------------------


def test_rolling_back_keeps_the_ledger_where_both_read_it(machine: Machine) -> None:
    machine.change()
    review(machine.ledger, 2)
    change = machine.change(OLD)
    assert change.put_back == ()
    assert n_done(machine.ledger) == 5
    assert (machine.record.version, machine.record.previous) == (OLD, NEW)
    assert f"# of {OLD}" in machine.path(UNITS / DAEMON).read_text()


def test_rolling_back_over_a_new_layout_puts_the_old_ledger_back(machine: Machine) -> None:
    machine.on_start(NEW, MIGRATES)
    machine.change()
    with pytest.raises(ConfigError, match=f"layout {NEXT_LAYOUT}, this one knows {NEXT_LAYOUT - 1}"):
        n_done(machine.ledger)
    change = machine.change(OLD)
    assert change.put_back == (machine.ledger,)
    assert n_done(machine.ledger) == 3
    with closing(sqlite3.connect(change.backup / "var/lib/semwatch/ledger.sqlite")) as db:  # nothing is thrown away
        assert db.execute("PRAGMA user_version").fetchone() == (NEXT_LAYOUT,)


# --- the command ------------------------------------------------------------------------------------------------------


def test_upgrade_dry_run_shows_the_files_and_changes_nothing(machine: Machine) -> None:
    before = {path: path.read_bytes() for path in machine.at.root.rglob("*") if path.is_file()}
    told = semwatch_cli(machine, "upgrade", "--to", NEW, "--dry-run")
    actions = {row["path"]: row["action"] for row in told["files"]}
    assert {path for path, action in actions.items() if action != "unchanged"} == {
        str(UNITS / DAEMON),
        "/opt/semwatch/current",
    }
    assert before == {path: path.read_bytes() for path in machine.at.root.rglob("*") if path.is_file()}


def test_upgrade_to_and_roll_back_by_command(machine: Machine) -> None:
    with pytest.raises(ConfigError, match="no version served before"):
        semwatch_cli(machine, "upgrade", "--roll-back")
    assert semwatch_cli(machine, "upgrade", "--to", NEW)["before"] == OLD
    assert semwatch_cli(machine, "upgrade", "--to", NEW)["files"] == []  # serves already
    assert semwatch_cli(machine, "upgrade", "--roll-back")["version"] == OLD
    assert not (machine.fake / "calls").exists()  # with --root, systemd is not asked
    with pytest.raises(ConfigError, match=r"9\.9 is not in /opt/semwatch; there: 0\.1\.0, 0\.2\.0"):
        semwatch_cli(machine, "upgrade", "--to", "9.9")
    with pytest.raises(ConfigError, match="give one of them"):
        semwatch_cli(machine, "upgrade", "--to", NEW, "--roll-back")


def test_settings_that_the_new_version_does_not_take_stop_nothing(machine: Machine) -> None:
    machine.path(SITE).write_text("folders: 3\n")
    steps = upgrade.steps_to(machine.at, machine.record, releases.release_in_prefix(machine.at, NEW))
    with pytest.raises(ConfigError, match=r"site\.yaml"):
        upgrade.check_settings(machine.at, ("",), steps)


def test_uninstall_stops_and_disables_the_units(machine: Machine) -> None:
    record = machine.record.model_copy(update={"tools": ("", "a")})
    going = installation.plan_removal(machine.at, {Path(path) for path in record.files}, record.files)
    commands.remove(machine.at, record, going, tools=(), tool="")
    assert set(machine.units.values()) == {"inactive"}
    disabled = next(call for call in machine.calls() if call.startswith("systemctl disable"))
    assert {"semwatch.target", DAEMON, TIMER, "semwatch@.service", "semwatch@a.service"} < set(disabled.split())
    assert machine.calls()[-1] == "systemctl daemon-reload"
    assert list(machine.path(UNITS).iterdir()) == []


def test_what_a_person_masked_is_not_enabled(machine: Machine) -> None:
    machine.path(UNITS / REDIS).unlink()
    machine.path(UNITS / REDIS).symlink_to("/dev/null")
    enabled, notes = commands.enable(machine.at, "a", dry_run=False)
    assert {"semwatch.target", "semwatch@a.service"} <= set(enabled)
    assert f"{REDIS} is masked and stays so" in notes
    assert f"systemctl enable {' '.join(enabled)}" in machine.calls()


def test_uninstalling_one_tool_stops_and_disables_its_units_alone(machine: Machine) -> None:
    for unit in ("semwatch@a.service", "semwatch@b.service", "semwatch-retrain@a.timer"):
        (machine.fake / "units" / unit).write_text("active\n")
    record = machine.record.model_copy(update={"tools": ("a", "b")})
    commands.remove(machine.at, record, [], tools=("b",), tool="a")
    stopped = {unit for unit, state in machine.units.items() if state == "inactive"}
    assert stopped == {"semwatch@a.service", "semwatch-retrain@a.timer"}
    disabled = next(call for call in machine.calls() if call.startswith("systemctl disable"))
    assert disabled.split()[2:] == ["semwatch@a.service", "semwatch-retrain@a.timer", "semwatch-retrain@a.path"]
    assert machine.record.tools == ("b",)
