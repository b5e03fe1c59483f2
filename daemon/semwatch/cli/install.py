"""`semwatch install`, `upgrade`, `uninstall`: the service on this machine."""

import grp
import json
import os
import platform
import pwd
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from semwatch.cli.options import JsonOption, printable, say, show_table
from semwatch.deployment import installation, installed_files, releases, systemctl, upgrade
from semwatch.deployment.installation import KEPT, RECORD, Action, Record, Step
from semwatch.deployment.installed_files import DATA, PREFIX, SETTINGS, STATE, TMPFILES, UNITS
from semwatch.deployment.releases import Place
from semwatch.errors import ConfigError, SemwatchError, ServiceUnavailable
from semwatch.streams import embedded_redis

PrefixOption = Annotated[Path, typer.Option(help="Folder of the versions; each is an environment of its own.")]
ToolOption = Annotated[str, typer.Option(help="Name of one tool among several; the machine's only one without it.")]
RootOption = Annotated[
    Path | None, typer.Option(help="Write into this folder, for an image, and leave systemd alone.", file_okay=False)
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show every file and what would happen; change nothing.")]

_LOOKS = {"new": "green", "replaced": "yellow", "kept": "magenta", "removed": "red"}
_IN_WORDS = {"kept": "kept, edited", "absent": "away, deleted by hand"}
_USERS = ("semwatch", "semwatch-redis", "semwatch-triton")
_GROUPS = ("semwatch-drop", "semwatch-models")


def install(
    prefix: PrefixOption = PREFIX,
    tool: ToolOption = "",
    models: Annotated[Path | None, typer.Option(help="A built model repository to copy.", exists=True)] = None,
    root: RootOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Install the service: users, folders, units, first settings. Again: mend it, or add a tool. Edited files stay."""
    at, record = _begin(prefix, root, dry_run)
    release = releases.own_release()
    if at.is_live:
        releases.check_own_environment(at, release.version)
    if record and record.version != release.version:
        raise ConfigError(
            f"semwatch {record.version} is installed, this is {release.version}; use `semwatch upgrade`, which keeps "
            f"the ledger safe"
        )
    tools = tuple(sorted({*(record.tools if record else ()), installed_files.checked_tool(tool)}))
    files = installed_files.wanted(release.package, prefix=prefix, tools=tools, host=platform.node())
    steps = installation.plan(at, files, record.files if record else {}, puts_back=True)
    steps.append(_link_step(at, release.version))
    if not dry_run:
        after = Record(version=release.version, prefix=prefix, tools=tools, files={})
        after = after.model_copy(update={"previous": record.previous if record else None})
        with _disk_errors_in_words():
            installation.apply(at, steps[:-1], record, after)
            releases.switch(at, release.version)
            if at.is_live:
                upgrade.prepare(at, tools)
    with _disk_errors_in_words():
        copied = installation.copy_models(at, models, dry_run=dry_run) if models else []
    enabled, notes = enable(at, tool, dry_run=dry_run) if at.is_live else ([], [])
    if copied and not at.is_live:
        models_there = at.on_disk(installed_files.REPOSITORY)
        notes.append(f"once the image has its users: chown -R semwatch:semwatch-models {models_there}")
    folder = installed_files.settings_folder(tool)
    unit = f"semwatch@{tool}.service" if tool else "semwatch.service"
    following = [
        f"sudoedit {folder}/site.yaml",
        f"sudo -u semwatch {prefix}/current/bin/semwatch doctor --site {folder}/site.yaml",
        f"sudo systemctl {'restart' if any(step.action == 'replaced' for step in steps) else 'start'} semwatch.target",
        f"systemctl status {unit}",
    ]
    done = {"version": release.version, "models": copied, "enabled": enabled, "notes": notes, "next": following}
    _show(steps, dry_run=dry_run, as_json=as_json, **done)


def upgrade_command(
    prefix: PrefixOption = PREFIX,
    root: RootOption = None,
    to: Annotated[str, typer.Option("--to", help="Let this version serve, of those in the prefix.")] = "",
    roll_back: Annotated[bool, typer.Option("--roll-back", help="Let the version serve that served before.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds until it must be ready, else all goes back.", min=1)] = (
        upgrade.READY_S
    ),
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let this version serve in place of the installed one: stop, back up, switch, start; not ready: all of it back."""
    at, record = _begin(prefix, root, dry_run)
    if record is None:
        raise ConfigError(f"no installation here ({RECORD}); use `semwatch install`")
    release = releases.own_release()
    if to or roll_back:
        release = releases.release_in_prefix(at, _earlier(record, to, roll_back))
    elif at.is_live:
        releases.check_own_environment(at, release.version)
    steps = upgrade.steps_to(at, record, release)
    steps.append(_link_step(at, release.version))
    if record.version == release.version and steps[-1].action == "unchanged":
        note = f"{record.version} is in place already; what does not run: sudo systemctl start semwatch.target"
        _show([], dry_run=dry_run, as_json=as_json, version=release.version, notes=[note])
        return
    if release == releases.own_release():
        upgrade.check_settings(at, record.tools, steps)
    done: dict[str, Any] = {"version": release.version, "before": record.version}
    if not dry_run:
        with _disk_errors_in_words():
            change = upgrade.change_version(at, record, release, ready_s=wait)
        done |= {"backup": str(change.backup), "put_back": list(map(str, change.put_back)), "ready": change.units}
        if not change.units:
            done["notes"] = ["nothing ran, so nothing was started: sudo systemctl start semwatch.target"]
        elif change.put_back:
            done["notes"] = ["what was reviewed since the ledger that was put back is reviewed again"]
    _show(steps, dry_run=dry_run, as_json=as_json, **done)


def uninstall(
    prefix: PrefixOption = PREFIX,
    tool: ToolOption = "",
    purge: Annotated[bool, typer.Option(help="Remove edited settings and units too; never data.")] = False,
    root: RootOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stop the service and remove what was installed; data, edited files and users stay. With a tool: it alone."""
    at, record = _begin(prefix, root, dry_run)
    if record is None:
        raise ConfigError(f"no installation here ({RECORD}): there is nothing to remove")
    if tool and tool not in record.tools:
        raise ConfigError(
            f"--tool {tool}: is not installed; there are {', '.join(filter(None, record.tools)) or 'none'}"
        )
    tools = tuple(name for name in record.tools if tool and name != tool)
    going = {Path(path) for path in record.files if not tools or _is_of(Path(path), tool)}
    steps = installation.plan_removal(at, going, record.files, edited_too=purge)
    if not tools:
        steps.append(Step(at.prefix / releases.CURRENT, "removed" if at.current.is_symlink() else "absent"))
    if not dry_run:
        with _disk_errors_in_words():
            remove(at, record, steps, tools=tools, tool=tool)
    stays = _stays(at) if not tools else []
    _show(steps, dry_run=dry_run, as_json=as_json, version=record.version, stays=stays)


def _begin(prefix: Path, root: Path | None, dry_run: bool) -> tuple[Place, Record | None]:
    os.umask(0o022)  # all may read units and documentation
    at = releases.place(prefix, root)
    if at.is_live and not dry_run and os.geteuid() != 0:
        raise ConfigError("needs root: run it with sudo, look first with --dry-run, or write elsewhere with --root")
    if at.is_live and not systemctl.BOOTED.is_dir():
        raise ConfigError(
            "systemd does not run this machine; run `semwatch run --site FILE` by what does, or use --root"
        )
    record = installation.read_record(at)
    if record and record.prefix != prefix:
        raise ConfigError(f"semwatch is installed with --prefix {record.prefix}: say so, or uninstall that first")
    return at, record


def _earlier(record: Record, to: str, roll_back: bool) -> str:
    if to and roll_back:
        raise ConfigError("--to and --roll-back: give one of them")
    if not to and record.previous is None:
        raise ConfigError(f"no version served before {record.version}; name one with --to")
    return to or str(record.previous)


def _link_step(at: Place, version: str) -> Step:
    now = releases.serving_version(at)
    action: Action = "new" if now is None else "unchanged" if now == version else "replaced"
    return Step(at.prefix / releases.CURRENT, action)


def enable(at: Place, tool: str, *, dry_run: bool) -> tuple[list[str], list[str]]:
    """Have the machine start the units of one tool; return them, and what this machine has not got.

    Raises:
        ConfigError, ServiceUnavailable: systemd's tools are not here, or failed.
    """
    name = f"@{tool}" if tool else ""
    daemon, *learning = (f"semwatch{kind}" for kind in _kinds(name))
    units, notes = ["semwatch.target", daemon], []
    if "active" in systemctl.states("redis-server.service").values():
        notes.append("the distribution's Redis runs here, so semwatch-redis.service was not enabled")
    else:
        try:
            embedded_redis.find_executable()
            units.append("semwatch-redis.service")
        except ConfigError as error:
            notes.append(f"semwatch-redis.service was not enabled: {error}")
    if find_spec("torch"):
        units += learning
    else:
        notes.append(
            f"learning is not in this environment; with semwatch[train] in it: systemctl enable --now "
            f"{' '.join(learning)}"
        )
    masked = [unit for unit in units if at.on_disk(UNITS / unit.replace(f"@{tool}.", "@.")).is_symlink()]
    notes += [f"{unit} is masked and stays so" for unit in masked]
    units = [unit for unit in units if unit not in masked]
    if not dry_run:
        systemctl.call("systemctl", "enable", *units)
    return units, notes


def remove(at: Place, record: Record, steps: Sequence[Step], *, tools: tuple[str, ...], tool: str) -> None:
    """Stop and disable the units of all, or while other ``tools`` stay of one, and take the steps.

    Raises:
        ConfigError, ServiceUnavailable: systemd's tools are not here, or failed.
        OSError: the disk refused.
    """
    if at.is_live:
        patterns = [f"semwatch@{tool}.*", f"semwatch-retrain@{tool}.*"] if tools else ["semwatch*"]
        running = [unit for pattern in patterns for unit in systemctl.states(pattern)]
        systemctl.stop(running)
        if units := _to_disable(at, record, (tool,) if tools else record.tools, shared_too=not tools):
            systemctl.call("systemctl", "disable", *units)
    files = [step for step in steps if step.path.name != releases.CURRENT]
    installation.apply(at, files, record, record.model_copy(update={"tools": tools}))
    if not tools:
        at.current.unlink(missing_ok=True)
        at.on_disk(RECORD).unlink(missing_ok=True)
        if not any(at.on_disk(KEPT).iterdir()):
            at.on_disk(KEPT).rmdir()
    if at.is_live:
        systemctl.call("systemctl", "reset-failed", "semwatch*", accept=None)  # there may be none
        systemctl.call("systemctl", "daemon-reload")


def _to_disable(at: Place, record: Record, tools: Sequence[str], *, shared_too: bool) -> list[str]:
    """Units that can be enabled, of those that are there; a link in a unit's place is a mask, and stays."""
    paths = [Path(path) for path in record.files if Path(path).parent == UNITS and not path.endswith(".new")]
    there = [path.name for path in paths if at.on_disk(path).is_file() and not at.on_disk(path).is_symlink()]
    instances = [(f"semwatch{kind}", tool) for tool in tools if tool for kind in _kinds(f"@{tool}")]
    named = [unit for unit, tool in instances if unit.replace(f"@{tool}.", "@.") in there]
    return [*(there if shared_too else ()), *named]


def _kinds(name: str) -> tuple[str, str, str]:
    """What follows ``semwatch`` in the units of one tool that can be enabled: the daemon, and what starts learning."""
    return f"{name}.service", f"-retrain{name}.timer", f"-retrain{name}.path"


def _is_of(path: Path, tool: str) -> bool:
    names = [f"semwatch-{tool}.conf", f"semwatch-{tool}.conf.new"]
    return path.is_relative_to(SETTINGS / tool) or (path.parent == TMPFILES and path.name in names)


def _stays(at: Place) -> list[str]:
    """What an uninstallation leaves, as the commands that remove it."""
    folders = [SETTINGS, KEPT, STATE, Path(f"{STATE}-redis"), Path(f"{STATE}-triton"), DATA]
    programs = [at.prefix / path.name for path in at.on_disk(at.prefix).glob("*") if (path / "pyvenv.cfg").is_file()]
    there = [path for path in [*folders, *sorted(programs)] if at.on_disk(path).exists()]
    own = sorted(at.on_disk(UNITS).glob("semwatch*.d"))  # a person's drop-ins
    removals = [f"rm -rf {shlex.quote(str(path))}" for path in [*map(at.on_disk, there), *own]]
    if at.is_live:
        users, groups = {user.pw_name for user in pwd.getpwall()}, {group.gr_name for group in grp.getgrall()}
        removals += [f"userdel {user}" for user in _USERS if user in users]
        removals += [f"groupdel {group}" for group in _GROUPS if group in groups]
    return removals


@contextmanager
def _disk_errors_in_words() -> Iterator[None]:
    """Turn an error of the disk into a ``ServiceUnavailable`` with what to do."""
    try:
        yield
    except SemwatchError:
        raise
    except OSError as error:
        raise ServiceUnavailable(
            f"{error.filename or 'the disk'}: {error.strerror}; mend it and run this again"
        ) from error


def _show(steps: Sequence[Step], *, dry_run: bool, as_json: bool, **done: Any) -> None:
    rows = [{"path": str(step.path), "action": step.action, "beside": str(step.beside or "")} for step in steps]
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **done, "files": rows}))
        return
    # the preview has every file; afterwards, what was done
    listed = [step for step in steps if dry_run or step.action != "unchanged"]
    rest = f"{len(steps) - len(listed)} more unchanged" if len(listed) < len(steps) else ""
    cells = [
        (
            printable(_IN_WORDS.get(step.action, step.action), _LOOKS.get(step.action, "")),
            f"{step.path}" + (f"; ours is {step.beside.name}" if step.beside else ""),
        )
        for step in listed
    ]
    show_table(("would be" if dry_run else "", "file"), cells, note=rest)
    for name in ("models", "enabled", "ready", "put_back"):
        if done.get(name):
            say(f" {', '.join(done[name])}", (f"{name.replace('_', ' ')}:", "green"))
    if "backup" in done:
        say(f" {done['backup']}", ("backup:", "green"))
    for note in done.get("notes", ()):
        say(f" {note}", ("note:", "yellow"))
    for title, lines in (("what stays, and how it goes:", done.get("stays")), ("next:", done.get("next"))):
        if lines:
            say("\n  ".join(["", *lines]), (title, "bold"))
