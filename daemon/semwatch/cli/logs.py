"""`semwatch logs`: one image's history in time order, or why it has none yet."""

import dataclasses
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from semwatch.cli.options import JsonOption, SiteOption, printable, say
from semwatch.errors import ConfigError, SemwatchError
from semwatch.intake import folder_rules
from semwatch.operations import doctor
from semwatch.operations.history import Event, History, collect
from semwatch.settings.site import Folder, Site, load_site
from semwatch.store.ledger import LEDGER, Ledger, Work
from semwatch.system.clock import utc_of

MIN_DIGITS = 6
MAX_SHOWN = 20
_NO_FIT = 3
_SPANS = {"m": "minutes", "h": "hours", "d": "days"}

Place = tuple[str | None, str]
"""Source, None for any, and a path in its drop folder."""


def logs(
    image: Annotated[str, typer.Argument(help="Path, file name, part of a path, or 6 or more digits of the sha256.")],
    site: SiteOption,
    as_json: JsonOption = False,
    since: Annotated[str | None, typer.Option(help="Only from then on: 30m, 2h, 7d, or a UTC date or time.")] = None,
) -> None:
    """Show one image's history: seen, reviewed, judged again, in quarantine, duplicate of which; where results are."""
    settings, since_utc = load_site(site), _since(since)
    with ExitStack() as held:
        path = settings.state_dir / LEDGER
        ledger = held.enter_context(Ledger(path, read_only=True)) if path.exists() else None
        places = named_places(settings, image)
        found = find(ledger, image, places) if ledger else []
        if not any(_fit(places, work.source, path) == 0 for path, work in found) and _names_a_file(settings, places):
            found = [item for item in found if _is_digits(image)]  # the very file waits; others only sound like it
        if len(found) == 1 and ledger:
            history = collect(settings, ledger, found[0][1])
            events = tuple(event for event in history.events if event.utc >= since_utc)
            _show(dataclasses.replace(history, events=events), as_json)
            return
        waiting = [] if found else list(unseen(settings, places))
    _show_others(settings, image, found, waiting, as_json)
    raise typer.Exit(1)


# --- which image is meant ------------------------------------------------------------------------------------------


def named_places(site: Site, text: str) -> list[Place]:
    """What a text may name: a path as it stands, behind its source, or of a file below a drop folder."""
    places: list[Place] = [(None, text)]
    whole = os.path.abspath(text)  # noqa: PTH100 - Path.absolute keeps "..", and links are not to be followed
    for folder in site.folders:
        if text.startswith(f"{folder.source}/"):
            places.append((folder.source, text.removeprefix(f"{folder.source}/")))
        if whole.startswith(f"{folder.path}/"):
            places.append((folder.source, whole.removeprefix(f"{folder.path}/")))
    return places


def find(ledger: Ledger, text: str, places: list[Place]) -> list[tuple[str, Work]]:
    """Find work by digits or by path; where a path or a name fits as a whole, parts of others do not count."""
    found = ledger.find(digits=text.lower()) if _is_digits(text) else []
    by_path = [(_fit(places, w.source, path), path, w) for _, part in places for path, w in ledger.find(part=part)]
    best = min((rank for rank, _, _ in by_path), default=_NO_FIT)
    found += [(path, work) for rank, path, work in by_path if rank == best < _NO_FIT]
    return list({(work.source, work.sha256): (path, work) for path, work in reversed(found)}.values())[::-1]


def _fit(places: list[Place], source: str, path: str) -> int:
    """How well a file fits: 0, the very path; 1, the end of it, as a file name is; 2, a part of it; or not at all."""
    return min(_rank(place, source, path) for place in places)


def _rank(place: Place, source: str, path: str) -> int:
    wanted_source, part = place
    if path == part and wanted_source in (None, source):
        return 0
    if wanted_source is not None or part not in path:
        return _NO_FIT
    return 1 if path.endswith(f"/{part}") else 2


def _is_digits(text: str) -> bool:
    return re.fullmatch(rf"[0-9a-fA-F]{{{MIN_DIGITS},64}}", text) is not None


def _names_a_file(site: Site, places: list[Place]) -> bool:
    """Whether the very path is a file in a drop folder."""
    return any(
        source in (None, folder.source) and _exists(folder.path / part) and not (folder.path / part).is_dir()
        for folder in site.folders
        for source, part in places
    )


# --- what lies in a drop folder and is not in the ledger -----------------------------------------------------------


def unseen(site: Site, places: list[Place]) -> Iterator[str]:
    """A sentence for each file that fits: its place, why it is not reviewed yet; the best fits, no more than shown."""
    found = [
        (rank, folder, path)
        for folder in site.folders
        for path in _all_files(folder.path)
        if (rank := _fit(places, folder.source, path)) < _NO_FIT
    ]
    best = min((rank for rank, _, _ in found), default=_NO_FIT)
    is_whole = []
    for _, folder, path in [item for item in found if item[0] == best][:MAX_SHOWN]:
        why = why_not_taken(folder, path)
        is_whole.append(why is None)
        yield f"{folder.path / path} is not in the ledger: {why or 'it is complete and waits for its turn'}"
    if any(is_whole):
        yield from _why_the_line_waits(site)


def why_not_taken(folder: Folder, path: str) -> str | None:
    """Why the rules of a drop folder keep a file from being taken; None where they do not."""
    try:
        status = (folder.path / path).lstat()
    except OSError as error:
        return f"it cannot be looked at ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "it is no plain file, and links are not followed"
    if any(folder_rules.is_temporary(part) for part in path.split("/")):
        return "its name is a temporary one; it is taken once the tool renames it"
    if not path.lower().endswith(folder.suffixes):
        return f"it is no image by its name: {', '.join(folder.suffixes)} are (folders.suffixes)"
    if "/" in path and not folder.recursive:
        return "it lies in a sub-folder, and folders.recursive is off"
    return _why_not_complete(folder, path, status)


def _why_not_complete(folder: Folder, path: str, status: os.stat_result) -> str | None:
    age_s = time.time() - status.st_mtime
    is_steady_needed = folder.completeness == "steady"
    if folder.completeness == "marker":
        stem = path.rpartition(".")[0]
        names = [f"{base}{suffix}" for base in (path, stem) for suffix in folder.marker_suffixes]
        ages_s = [time.time() - (folder.path / name).lstat().st_mtime for name in names if _exists(folder.path / name)]
        if not ages_s:
            return f"it waits for its marker, one of {', '.join(names)} (completeness: marker)"
        is_steady_needed = min(ages_s) > age_s
    if is_steady_needed and age_s < folder.steady_s:
        return f"it was written {age_s:.1f} s ago and must be steady for {folder.steady_s:g} s"
    return None


def _why_the_line_waits(site: Site) -> Iterator[str]:
    """What keeps complete files waiting, as far as it can be seen from outside."""
    try:
        state = doctor.status(site)
    except SemwatchError as error:
        yield f"the state of the line cannot be read: {error}"
        return
    if state["daemon_running"] is False:
        yield "no daemon runs on this site: start it (semwatch run, or systemctl start semwatch)"
        return
    yield f"{state['waiting_files']} files wait, the oldest since {state['oldest_waiting_s']} s"
    if state["paused"]:
        yield f"the line pauses: {state['paused']}"


def _all_files(folder: Path) -> Iterator[str]:
    pending = [""]
    while pending:  # not os.walk, which takes a tree of a thousand levels by recursion
        below = pending.pop()
        try:
            with os.scandir(folder / below) as listing:
                entries = list(listing)
        except OSError:
            continue
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if _is_folder(entry):
                pending.append(path)
            else:
                yield path


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _exists(file: Path) -> bool:
    try:
        file.lstat()
    except OSError:
        return False
    return True


# --- shown ---------------------------------------------------------------------------------------------------------


def _show(history: History, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_spelled(dataclasses.asdict(history))))
        return
    say(f"{history.source}/{history.path}")
    say(f"sha256 {history.sha256}")
    for event in history.events:
        say(f"  {_line(event)}")
    say("now:")
    for sentence in (*history.now, *history.not_asked):
        say(f"  {sentence}")


def _line(event: Event) -> str:
    return f"{event.utc or '-':20}  {event.where:7}  {' | '.join(event.text.splitlines())}"


def _show_others(site: Site, text: str, found: list[tuple[str, Work]], waiting: list[str], as_json: bool) -> None:
    looked_in = [
        f"{site.state_dir / LEDGER}" + ("" if (site.state_dir / LEDGER).exists() else " (not there yet)"),
        *(f"{folder.path}" + ("" if folder.path.is_dir() else " (not there)") for folder in site.folders),
    ]
    if as_json:
        matches = [{**dataclasses.asdict(work), "found_as": path} for path, work in found]
        typer.echo(json.dumps(_spelled({"matches": matches, "waiting": waiting, "looked_in": looked_in})))
        return
    if found:
        say(f"{len(found)} images fit {text!r}; give a whole path, or the digits in front:")
        for path, work in found[:MAX_SHOWN]:
            say(f"  {work.sha256[:16]}  {work.source}/{path}  {work.state}")
        if len(found) > MAX_SHOWN:
            say(f"  and {len(found) - MAX_SHOWN} more")
        return
    if not waiting:
        say(f"nothing fits {text!r}; looked in {', '.join(looked_in)}")
        if re.fullmatch(rf"[0-9a-fA-F]{{1,{MIN_DIGITS - 1}}}", text):
            say(f"of a sha256, give {MIN_DIGITS} digits or more")
    for sentence in waiting:
        say(sentence)


def _spelled(value: object) -> object:
    """A value for JSON: bytes of a file name that are not UTF-8 stand as \\xNN."""
    if isinstance(value, str):
        return printable(value).plain
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    return [_spelled(item) for item in value] if isinstance(value, list | tuple) else value


def _since(text: str | None) -> str:
    """The moment that ``--since`` names, as events have it; empty for all."""
    if text is None:
        return ""
    if span := re.fullmatch(r"(\d{1,6})([mhd])", text):
        moment = datetime.now(UTC) - timedelta(**{_SPANS[span[2]]: int(span[1])})
    else:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(
                f"--since {text!r} is no time: write 30m, 2h, 7d, 2026-03-01 or 2026-03-01T08:00"
            ) from None
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return utc_of(moment)
