"""`semwatch rereview`: a lot judged once more."""

import dataclasses
import json
from typing import Annotated

import typer

from semwatch.cli.options import JsonOption, SiteOption, counted, say
from semwatch.errors import ConfigError
from semwatch.operations import requeue
from semwatch.settings.site import load_site
from semwatch.store.ledger import LEDGER, Ledger

LotArgument = Annotated[str, typer.Argument(metavar="LOT", help="Its folder, behind its source where several fit.")]


def rereview(site: SiteOption, name: LotArgument, as_json: JsonOption = False) -> None:
    """Have a lot judged again under today's recipe and models; the results so far stay as earlier revisions.

    The daemon does it, from the files that still lie in the drop folder. People's verdicts are carried over.
    """
    settings = load_site(site)
    path = settings.state_dir / LEDGER
    if not path.exists():
        raise ConfigError(f"no ledger at {path}: the daemon has not run yet")
    with Ledger(path, exclusive=False) as ledger:
        found = requeue.review_again(settings, ledger, name)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        say(f" {counted(found.queued, 'image')} of {found.lot} to be judged again", ("ok", "green"))
        if found.gone:
            say(f"not in the drop folder any more, so they keep their results: {len(found.gone)}, {_some(found.gone)}")
    if found.gone or not found.queued:
        raise typer.Exit(1)


def _some(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:3]) + (" and others" if len(paths) > 3 else "")
