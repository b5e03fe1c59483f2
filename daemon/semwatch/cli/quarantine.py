"""`semwatch quarantine`: files that could not be reviewed, and another try."""

import dataclasses
import json
from typing import Annotated

import typer

from semwatch.cli.options import EPILOG, JsonOption, SiteOption, say, show_table
from semwatch.errors import ConfigError
from semwatch.operations import requeue
from semwatch.settings.site import Site, load_site
from semwatch.store.ledger import LEDGER, Ledger

app = typer.Typer(no_args_is_help=True, help="Files that could not be reviewed.")

MAX_LISTED = 100_000
"""Files in quarantine that one command looks at."""
SHOWN_DIGITS = 16


@app.command("list", epilog=EPILOG)
def list_files(site: SiteOption, as_json: JsonOption = False) -> None:
    """List the files that could not be reviewed, with the reason of each."""
    with _ledger(load_site(site), read_only=True) as ledger:
        found = ledger.listing("QUARANTINED", limit=MAX_LISTED)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(work) for work in found]))
        return
    cells = [(w.finished_utc or "", f"{w.source}/{w.path}", w.reason or "", w.sha256[:SHOWN_DIGITS]) for w in found]
    show_table(("since", "file", "reason", "sha256"), cells)


@app.command("requeue", epilog=EPILOG)
def requeue_files(
    site: SiteOption,
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Names, paths, lots, patterns ('lot7/*.tif'), or first digits of the sha256."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All files in quarantine.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give files another try; safe beside a running daemon, which finds them at its next scan."""
    settings = load_site(site)
    if everything == bool(files):
        raise ConfigError("name files, lots or patterns to give another try, or --all")
    drops = {folder.source: folder.path for folder in settings.folders}
    with _ledger(settings, exclusive=False) as ledger:
        found = ledger.listing("QUARANTINED", limit=MAX_LISTED)
        queued = list(requeue.requeue(ledger, found if everything else requeue.chosen(found, files or [])))
    there = {work: work.source in drops and (drops[work.source] / work.path).exists() for work in queued}
    if as_json:
        rows = [{"source": w.source, "path": w.path, "sha256": w.sha256, "is_there": is_} for w, is_ in there.items()]
        typer.echo(json.dumps(rows))
        return
    for work, is_there in there.items():
        what_to_do = "" if is_there else " (is not in the drop folder now: drop it again)"
        say(f": {work.source}/{work.path}{what_to_do}", ("queued again", "green"))
    if not queued:
        say("nothing is in quarantine")


def _ledger(settings: Site, *, read_only: bool = False, exclusive: bool = True) -> Ledger:
    path = settings.state_dir / LEDGER
    if not path.exists():
        raise ConfigError(f"no ledger at {path}: the daemon has not run yet")
    return Ledger(path, read_only=read_only, exclusive=exclusive)
