"""`semwatch adapt`: the learning package adapts the models of a site; the running daemon takes them over.

The learning package runs in a process of its own, so that the daemon's package needs no torch.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from semwatch.cli.options import JsonOption, SiteOption, err, printable, say
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.settings.site import Site, load_site
from semwatch.store import serving

LEARNING, ITS_EXTRA = "semwatch_training", "torch"
SWAP_TIMEOUT_S = 60.0
"""A detector takes over when nothing is in review, so a large image may hold it up."""


def adapt(
    site: SiteOption,
    normals: Annotated[Path, typer.Option(help="Folder of defect-free images of your process.", exists=True)],
    labels: Annotated[
        Path | None,
        typer.Option(help="Labelled images: a folder per class, a table (image,label), masks, boxes.", exists=True),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Stem of reference images, with one *: those count as normal images.")
    ] = None,
    report: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report-adapt"),
    yes: Annotated[bool, typer.Option("--yes", help="Publish without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Adapt detector, gate and head to your own images: read, check, judge before and after, ask, publish.

    Needs the learning package beside this one. The running daemon answers with the new models at once.
    """
    settings = load_site(site)
    options = {"--site": site, "--normals": normals, "--labels": labels, "--reference": reference, "--report": report}
    given = [text for option, value in options.items() if value is not None for text in (option, str(value))]
    outcome = _run_learning(["adapt", *given, *(["--yes"] if yes else [])], as_json=as_json)
    published = {model: outcome[model] for model in ("detector", "head") if outcome.get(model)}
    waits = not published or not serving.daemon_runs(settings.state_dir)
    why_not = None if waits else _await(settings, published)
    if as_json:
        typer.echo(json.dumps({**outcome, "serves": bool(published) and not waits and why_not is None}))
    elif published:
        versions = " and ".join(f"{model} {version}" for model, version in published.items())
        if waits:
            say(f": {versions}, once the daemon runs", ("serves", "green"))
        elif why_not is None:
            say(f": {versions}", ("serves", "green"))
    if why_not is not None:
        raise ServiceUnavailable(why_not)


def _run_learning(arguments: list[str], *, as_json: bool) -> dict[str, Any]:
    """Run `semwatch-train` on this terminal; what it says on standard output is its JSON.

    Raises:
        ConfigError: the learning package is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in (LEARNING, ITS_EXTRA)):
        raise ConfigError(
            "adapting needs the learning package, which is not installed here: pip install 'semwatch[train]', or run "
            "`semwatch adapt` where it is"
        )
    command = [sys.executable, "-m", LEARNING, *arguments, "--json", "--ask"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # a person may take her time
    if done.returncode:  # it has said why
        if as_json:
            typer.echo(done.stdout.rstrip("\n"))
        raise typer.Exit(done.returncode)
    try:
        outcome = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        err.print(printable(done.stdout), soft_wrap=True)
        raise ServiceUnavailable("the learning package said nothing of what it published; see its report") from None
    return dict(outcome)


def _await(settings: Site, published: dict[str, int]) -> str | None:
    """Why the daemon does not serve what was published; None where it does."""
    reasons = (
        serving.await_version(settings.state_dir, model, version, timeout_s=SWAP_TIMEOUT_S)
        for model, version in published.items()
    )
    return next((why for why in reasons if why is not None), None)
