"""`semwatch init`: a first site by questions or by flags."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from semwatch.cli.options import JsonOption, say
from semwatch.cli.state import show_checks
from semwatch.operations import doctor, first_site
from semwatch.operations.first_site import RECIPE, SITE

QUESTIONS = {
    "name": "Name of this site, unique in the fab",
    "drop": "Folder that the tool drops its images into",
    "source": "Name of the tool",
    "models": "Folder of the models (the model repository)",
    "results": "Folder of the results",
    "state": "Folder of the ledger, on a local disk",
    "recipe": "Name of the recipe, such as layer and step",
    "redis": "Address of Redis, redis://host:port/db; nothing: none",
}
PATHS = ("drop", "models", "results", "state")
"""Relative ones start at the folder of the site, but for what lies in the working folder alone."""


def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the settings; it is made.", file_okay=False)] = Path(),
    name: Annotated[str | None, typer.Option(help=QUESTIONS["name"] + ".")] = None,
    drop: Annotated[str | None, typer.Option(help=QUESTIONS["drop"] + ".")] = None,
    source: Annotated[str | None, typer.Option(help=QUESTIONS["source"] + ".")] = None,
    models: Annotated[str | None, typer.Option(help=QUESTIONS["models"] + ".")] = None,
    results: Annotated[str | None, typer.Option(help=QUESTIONS["results"] + ".")] = None,
    state: Annotated[str | None, typer.Option(help=QUESTIONS["state"] + ".")] = None,
    recipe: Annotated[str | None, typer.Option(help=QUESTIONS["recipe"] + ".")] = None,
    redis: Annotated[str | None, typer.Option(help=QUESTIONS["redis"] + ".")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is proposed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a site and a recipe, and check them as `doctor` does; nothing that is there is overwritten.

    What no option says is asked at a terminal, and elsewhere taken as proposed.
    """
    first_site.refuse_what_is_there(folder)
    answers = dataclasses.asdict(first_site.proposed(folder))
    given = {"name": name, "drop": drop, "source": source, "models": models, "results": results, "state": state,
             "recipe": recipe, "redis": redis}  # fmt: skip
    asks = sys.stdin.isatty() and not yes and not as_json
    for key, value in given.items():
        if value is not None:
            is_below_here = key in PATHS and Path(value).exists() and not (folder / value).exists()
            answers[key] = str(Path(value).absolute()) if is_below_here else value
        elif asks:
            answers[key] = typer.prompt(QUESTIONS[key], default=answers[key], show_default=bool(answers[key]))
    site = first_site.make(folder, first_site.Answers(**answers))
    checks = doctor.examine(site)
    is_clean = all(check.ok for check in checks)
    path = folder / SITE
    if as_json:
        rows = [dataclasses.asdict(check) for check in checks]
        typer.echo(json.dumps({"site": str(path), "recipe": str(folder / RECIPE), "ok": is_clean, "checks": rows}))
    else:
        say(f" {path} and {folder / RECIPE}", ("wrote", "green"))
        show_checks(checks)
        if is_clean:
            say(f"next: `semwatch run --site {path}`, and copy an image into {site.folders[0].path}")
            say(f"then: `semwatch status --site {path}`")
        else:
            say(f"mend what stands behind FIX, then: `semwatch doctor --site {path}`")
    if not is_clean:
        raise typer.Exit(1)
