"""`semwatch-train retrain` and `refit`: heads that learn on the job."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import markup

from semwatch.errors import ConfigError
from semwatch.settings.fields import EXAMPLES
from semwatch.system.command_line import JsonOption
from semwatch.system.text import escaped
from semwatch_training.system.defaults import HeadFamily
from semwatch_training.system.progress_bars import Bars, console

MARKS = {"learned": "green", "refused": "red"}
REFUSED = 10
"""Exit code of a cycle that did its work and whose candidate does not serve; 1 is an error, as everywhere."""


def in_markup(text: str) -> str:
    """Text of others within markup: names of classes may hold anything."""
    return markup.escape(escaped(text, keeps_lines=True))


def retrain(
    site: Annotated[
        Path,
        typer.Option(envvar="SEMWATCH_SITE", help=f"Site settings; a commented example is {EXAMPLES / 'site.yaml'}."),
    ],
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Learn once from the unknowns that wait in Redis: find new classes, fit a head, prove it, swap it in.

    Made for a timer: with too few unknowns, with nothing new or beside another cycle it reports that and exits with 0.
    A candidate that is refused on the golden set does not serve; it is kept with its report, and the exit code is 10.
    """
    from threadpoolctl import threadpool_limits

    from semwatch.settings.site import load_site
    from semwatch_training.learning.retrain import run_cycle

    settings = load_site(site)
    # Two threads gain nothing here, and beside the line that works on they cost four times the time.
    with Bars() as progress, threadpool_limits(limits=1):
        outcome = run_cycle(settings, seed=seed, progress=progress)
    if as_json:
        values = {
            "status": outcome.status,
            "said": outcome.sentence,
            "head_version": outcome.head_version,
            "report": str(outcome.report) if outcome.report else None,
        }
        typer.echo(json.dumps(values))
    else:
        mark = MARKS.get(outcome.status, "yellow")
        console.print(f"[{mark}]{outcome.status}[/]: {in_markup(outcome.sentence)}", soft_wrap=True, highlight=False)
        if outcome.report is not None:
            console.print(f"report in {outcome.report / 'report.md'}", soft_wrap=True, highlight=False)
    if outcome.status == "refused":
        raise typer.Exit(REFUSED)


def refit(
    without: Annotated[list[str] | None, typer.Option(help="A class to leave out; repeat.")] = None,
    encoder: Annotated[
        int | None, typer.Option(min=1, help="Version of another encoder, which looks at the kept crops again.")
    ] = None,
    family: Annotated[
        HeadFamily | None, typer.Option(help="Family of the new head's logits; without it that of the head in service.")
    ] = None,
    repository: Annotated[Path, typer.Option(help="Model repository.")] = Path("model_repository"),
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit the head in service anew from its own bank and publish it: without some classes, otherwise, for another
    encoder."""
    from semwatch_training.learning import refit as refitting

    if not without and encoder is None and family is None:
        raise ConfigError(
            "give a class to leave out, --without, or the version of another encoder, --encoder, or a --family of heads"
        )
    made = refitting.refit(repository, without=without or (), encoder=encoder, family=family, seed=seed)
    outcome = [f"knows nothing of {', '.join(without)}"] if without else []
    if family is not None:
        outcome.append(f"is of the family {family}")
    if encoder is not None:
        outcome.append(f"reads encoder {encoder}; both serve from the daemon's next start")
    if made.n_left_out:
        outcome.append(f"{made.n_left_out} crops that nobody kept are left out")
    if as_json:
        typer.echo(json.dumps({"head_version": made.version, "without": without or [], "left_out": made.n_left_out}))
        return
    console.print(f"head {made.version} {'; '.join(outcome)}", highlight=False)
