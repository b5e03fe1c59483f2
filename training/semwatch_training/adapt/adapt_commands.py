"""`semwatch-train adapt`: arguments -> ``adapting.adapt`` -> what was published."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from semwatch.settings.fields import EXAMPLES
from semwatch_training.system.defaults import SHIPPED_DETECTOR
from semwatch_training.system.progress_bars import Bars, console


def adapt(
    site: Annotated[Path, typer.Option(help=f"Site settings; a commented example is {EXAMPLES / 'site.yaml'}.")],
    normals: Annotated[Path, typer.Option(help="Folder of defect-free images of your process.", exists=True)],
    labels: Annotated[
        Path | None, typer.Option(help="Labelled images: a folder in any layout, or a table of labels.", exists=True)
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Stem of reference images, with one *: those count as normal images.")
    ] = None,
    report: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report-adapt"),
    yes: Annotated[bool, typer.Option("--yes", help="Publish without asking.")] = False,
    recame: Annotated[
        bool, typer.Option("--recame", help="Judge heads of ReCAME-Net's family too; the best head is taken.")
    ] = False,
    seed: int = 0,
    weights: Annotated[
        Path, typer.Option(help="The detector's weights that the repository was built from.")
    ] = SHIPPED_DETECTOR,
    cache: Annotated[Path, typer.Option(help="Where the converted backbones are kept.")] = Path(".cache"),
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output; asks nothing.")] = False,
    asks: Annotated[bool, typer.Option("--ask", help="Ask on standard error, with --json too.")] = False,
) -> None:
    """Adapt detector, gate and head to your normal and labelled images, show before and after, ask, and publish.

    The running daemon takes both over by itself.
    """
    from semwatch.settings.recipe import load_recipe
    from semwatch.settings.site import load_site
    from semwatch_training.adapt import adapting, own_detector
    from semwatch_training.adapt.adapting import Request

    settings = load_site(site)
    by_id = {recipe.id: recipe for recipe in (load_recipe(folder.recipe) for folder in settings.folders)}
    recipes = tuple(by_id.values())
    request = Request(settings.models.repository, recipes, normals, labels, reference, recame, seed)
    adapting.remove_report(report)
    with Bars() as progress:

        def ask() -> bool:
            progress.pause()
            console.print(f"report in {report}/report.md", highlight=False, soft_wrap=True)
            if yes or (as_json and not asks) or not sys.stdin.isatty():
                return yes
            return typer.confirm("Publish these models, so that the daemon uses them?", err=True)

        outcome = adapting.adapt(
            request,
            lambda version: own_detector.base_detector(request.repository, version, weights, cache),
            report=report,
            ask=ask,
            progress=progress,
        )
    for note in outcome.notes:
        console.print(f"[yellow]to know[/]: {note}", highlight=False, soft_wrap=True)
    if outcome.detector is None:
        console.print("nothing was published; give --yes to publish", highlight=False)
    else:
        head = f" and head {outcome.head}" if outcome.head else ""
        console.print(f"[green]published[/]: detector {outcome.detector}{head}", highlight=False)
    if as_json:
        published = {"detector": outcome.detector, "head": outcome.head}
        values = {**published, "report": str(report), "notes": list(outcome.notes)}
        typer.echo(json.dumps(values))
