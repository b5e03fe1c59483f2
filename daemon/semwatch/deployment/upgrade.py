"""Another version serves: stop, back up, switch, start, wait; where it does not become ready, all of it back.

Files go on landing in the drop folders meanwhile, and are reviewed by whichever version serves in the end. A ledger is
put back only when the version that left it cannot go on with the one that is there: when the new one never became
ready, or when an earlier version is to serve and the layout has changed since. What was reviewed in between is then
reviewed again, under the same names and ids.
"""

import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from semwatch.deployment import backups, installation, releases, systemctl
from semwatch.deployment.backups import Kept
from semwatch.deployment.installation import Record, Step
from semwatch.deployment.installed_files import SYSUSERS, TMPFILES, UNITS, settings_folder, wanted
from semwatch.deployment.releases import Place, Release
from semwatch.errors import ConfigError, SemwatchError, ServiceUnavailable
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import load_site
from semwatch.store import serving

READY_S = 180.0


@dataclass(frozen=True, slots=True)
class Change:
    """A version that serves in another's place."""

    before: str
    after: str
    steps: tuple[Step, ...]
    backup: Path
    put_back: tuple[Path, ...]
    """Databases that came from an earlier backup."""
    units: tuple[str, ...]
    """Started again, and active."""


def steps_to(at: Place, record: Record, release: Release) -> list[Step]:
    """What a version would change among the installed files.

    Raises:
        ConfigError: its package is not whole.
    """
    files = wanted(release.package, prefix=at.prefix, tools=record.tools)
    return installation.plan(at, files, record.files, puts_back=False)


def change_version(at: Place, record: Record, release: Release, *, ready_s: float = READY_S) -> Change:
    """Let another version serve, or leave the one that serves as it was.

    Raises:
        ConfigError: it cannot even begin: settings, disk space or the package; nothing was touched.
        ServiceUnavailable: it began and went back; the message says why, and what serves now.
    """
    steps = steps_to(at, record, release)
    kept = backups.kept_files(at, record.tools)
    backups.check_space(at, kept)
    units = _to_start(systemctl.states()) if at.is_live else ()
    backup = None
    try:
        _stop(at, units)
        _refuse_a_stray_daemon(kept)
        backup = backups.take(at, kept, f"{record.version}-{release.version}")
        put_back = backups.put_back_older(at, kept, release.version)
        _serve(at, record, release, steps)
        _start(at, units, ready_s)
    except BaseException as error:
        now = _go_back(at, record, kept, backup, units, ready_s)
        if isinstance(error, SemwatchError | OSError | sqlite3.Error):
            raise ServiceUnavailable(f"semwatch {release.version} does not serve: {error}\n{now}") from error
        raise
    return Change(record.version, release.version, tuple(steps), backup, tuple(put_back), tuple(units))


def check_settings(at: Place, tools: Sequence[str], steps: Sequence[Step]) -> None:
    """See that this version takes the settings that stay: before the one that serves is stopped.

    Raises:
        ConfigError: it does not.
    """
    ours = {at.on_disk(step.path) for step in steps if step.action == "replaced"}
    for tool in tools:
        path = at.on_disk(settings_folder(tool) / "site.yaml")
        if path not in ours:
            recipes = {backups.reached(at, folder.recipe) for folder in load_site(path).folders}
            for recipe in sorted(recipes - ours):
                load_recipe(recipe)


def _serve(at: Place, record: Record, release: Release, steps: Sequence[Step]) -> Record:
    previous = record.previous if release.version == record.version else record.version
    after = record.model_copy(update={"version": release.version, "previous": previous})
    gone = [step.path.name for step in steps if step.action == "removed" and step.path.parent == UNITS]
    if gone and at.is_live:
        systemctl.call("systemctl", "disable", "--now", *gone, timeout_s=systemctl.STOP_S)
    done = installation.apply(at, steps, record, after)
    releases.switch(at, release.version)
    if at.is_live:
        prepare(at, record.tools)
    return done


def prepare(at: Place, tools: Sequence[str]) -> None:
    """Have systemd make users and folders, and read the units again.

    Raises:
        ConfigError, ServiceUnavailable: as ``systemctl.call``.
    """
    names = ["semwatch.conf", *(f"semwatch-{tool}.conf" for tool in tools if tool)]
    folders = [str(path) for name in names if (path := at.on_disk(TMPFILES / name)).is_file()]
    if (users := at.on_disk(SYSUSERS / "semwatch.conf")).is_file():
        systemctl.call("systemd-sysusers", str(users))
    if folders:
        systemctl.call("systemd-tmpfiles", "--create", *folders)
    systemctl.call("systemctl", "daemon-reload")


def _go_back(at: Place, record: Record, kept: Kept, backup: Path | None, units: Sequence[str], ready_s: float) -> str:
    """Undo a change wherever it stopped; return what serves now, in words."""
    notes = []
    try:
        _stop(at, units)
        if backup:
            backups.put_back(at, backup, kept.databases)
            notes.append(f"ledger and unknowns are as they were (from {backup})")
        now = installation.read_record(at)
        if now and (now != record or releases.serving_version(at) != record.version):
            old = releases.release_in_prefix(at, record.version)
            steps = steps_to(at, now, old)
            installation.apply(at, steps, now, now.model_copy(update=record.model_dump(exclude={"files"})))
            releases.switch(at, record.version)
            if at.is_live:
                prepare(at, record.tools)
        _start(at, units, ready_s)
        return "; ".join([f"semwatch {record.version} serves again", *notes])
    except (SemwatchError, OSError, sqlite3.Error) as error:
        notes.append(f"NOTHING SERVES: going back to {record.version} failed too: {error}")
        return "; ".join(notes)


def _stop(at: Place, units: Sequence[str]) -> None:
    if at.is_live:
        learning = [unit for unit in systemctl.states("semwatch-retrain*") if unit not in units]
        systemctl.stop([*units, *learning])


def _start(at: Place, units: Sequence[str], ready_s: float) -> None:
    if at.is_live:
        systemctl.start(units, within_s=ready_s)


def _to_start(states: Mapping[str, str]) -> tuple[str, ...]:
    """What ran. A daemon that had failed too, for it may be what the change is to mend; a cycle of learning not."""
    return tuple(
        unit
        for unit, state in states.items()
        if not re.fullmatch(r"semwatch-retrain.*\.service", unit)
        and (state != "failed" or re.fullmatch(r"semwatch(@.+)?\.service", unit))
    )


def _refuse_a_stray_daemon(kept: Kept) -> None:
    for path in kept.databases:
        if path.name == backups.LEDGER and serving.daemon_runs(path.parent):
            raise ConfigError(f"a daemon that systemd did not start holds {path}; stop it")
