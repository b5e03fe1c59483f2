"""`semwatch quarantine`: files that could not be reviewed, and another try."""

import dataclasses
import json
from typing import Annotated

import typer

from semwatch.cli.options import EPILOG, JsonOption, SiteOption, out, printable, say, table
from semwatch.errors import ConfigError
from semwatch.operations.decide import login_name
from semwatch.settings.site import Site, load_site
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.system.clock import utc_now

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
    shown = table("source", "path", "reason", "sha256")
    for work in found:
        shown.add_row(*map(printable, (work.source, work.path, work.reason or "", work.sha256[:SHOWN_DIGITS])))
    out.print(shown)


@app.command("requeue", epilog=EPILOG)
def requeue(
    site: SiteOption,
    sha256: Annotated[
        list[str], typer.Argument(help="Of the files, as `list` shows them; the first digits are enough.")
    ],
) -> None:
    """Give files another try; safe beside a running daemon, which finds them at its next scan."""
    settings = load_site(site)
    drops = {folder.source: folder.path for folder in settings.folders}
    with _ledger(settings, exclusive=False) as ledger:
        found = ledger.listing("QUARANTINED", limit=MAX_LISTED)
        for digits in sha256:
            if not digits or not any(work.sha256.startswith(digits.lower()) for work in found):
                raise ConfigError(
                    f"nothing in quarantine begins with {digits!r}; `semwatch quarantine list` shows what is"
                )
        for work in found:
            if not work.sha256.startswith(tuple(map(str.lower, sha256))):
                continue
            origin = {"event": "requeued", "utc": utc_now(), "by": login_name()}
            audit = {**origin, "source": work.source, "path": work.path, "sha256": work.sha256}
            if ledger.requeue(work.source, work.sha256, audit=audit):
                is_there = work.source in drops and (drops[work.source] / work.path).exists()
                what_to_do = "" if is_there else " (is not in the drop folder now: drop it again)"
                say(f": {work.source}/{work.path}{what_to_do}", ("queued again", "green"))


def _ledger(settings: Site, *, read_only: bool = False, exclusive: bool = True) -> Ledger:
    path = settings.state_dir / LEDGER
    if not path.exists():
        raise ConfigError(f"no ledger at {path}: the daemon has not run yet")
    return Ledger(path, read_only=read_only, exclusive=exclusive)
