"""`semwatch recipe`: check, show, calibrate and tune recipes."""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from semwatch.cli.given_files import image_files
from semwatch.cli.options import (
    EPILOG,
    REPOSITORY,
    JsonOption,
    RecipeOption,
    RepositoryOption,
    SiteOption,
    counted,
    err,
    in_share,
    in_words,
    printable,
    say,
    show_table,
)
from semwatch.errors import ConfigError
from semwatch.line.gate_calibration import Counted, Measured
from semwatch.models.inference import Embedded
from semwatch.operations import calibrate, labels, tune
from semwatch.operations.calibrate import Calibration, Scored
from semwatch.operations.tune import Tuning
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.settings.site import Site, load_site
from semwatch.system import files

app = typer.Typer(no_args_is_help=True, help="Check, show, calibrate and tune recipes.")


@app.command("check", epilog=EPILOG)
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe.")],
    repository: RepositoryOption = REPOSITORY,
    as_json: JsonOption = False,
) -> None:
    """Validate a recipe: every problem with its line and the nearest valid key, and labels that no model knows."""
    settings = load_recipe(recipe)
    known = labels.of_models(repository)
    if faults := labels.faults(settings, known):
        raise ConfigError(
            f"{recipe}, classes: {'; '.join(faults)}; `semwatch models labels` lists those that there are"
        )
    if as_json:
        typer.echo(json.dumps({"name": settings.name, "version": settings.version, "id": settings.id}))
        return
    compared = "" if known or not settings.classes else f"; no model in {repository} to compare its labels with"
    say(f" {settings.name} version {settings.version}, id {settings.id}{compared}", ("ok", "green"))


@app.command("show", epilog=EPILOG)
def show(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; the built-in defaults without it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a recipe with every default filled in and what each value means."""
    settings = load_recipe(recipe) if recipe else Recipe()
    if as_json:
        typer.echo(json.dumps({"id": settings.id, **settings.model_dump(mode="json")}))
        return
    rows = [(name, in_words(value), meaning) for name, value, meaning in _fields(settings)]
    show_table(("setting", "value", "meaning"), rows, title=f"recipe {settings.name}, id {settings.id}")


@app.command("calibrate", epilog=EPILOG)
def calibrate_command(
    normals: Annotated[Path, typer.Argument(help="Folder of defect-free images of your own process.", exists=True)],
    defects: Annotated[Path | None, typer.Option(help="Folder of images with a defect each.", exists=True)] = None,
    recipe: RecipeOption = None,
    repository: RepositoryOption = REPOSITORY,
    yes: Annotated[bool, typer.Option("--yes", help="Print the threshold though it misses more than now.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the gate's threshold on your own images, and print the line to put into the recipe.

    Defect-free images say what passes the gate; only images with known defects say what it would miss.
    """
    settings = load_recipe(recipe) if recipe else Recipe()
    with Embedded(repository, pins=settings.pins.model_dump()) as models:
        of_normals = _scores(normals, models)
        of_defects = None if defects is None else _scores(defects, models)
        found = calibrate.calibrate(of_normals, of_defects, settings, models, normals=normals, defects=defects)
    is_refused = found.is_worse and not yes
    if as_json:
        typer.echo(json.dumps(_as_json(found)))
    else:
        for line in _calibration_lines(found):
            say(f"# {line}".rstrip())
        if not is_refused:
            # a float32 in full: rounded down, it would let its own image pass
            say(f"gate:\n  threshold: {found.proposed.threshold:.9g}")
    if is_refused:
        err.print(printable(f"{found.comparison}; take a threshold of the table, or give --yes"), soft_wrap=True)
        raise typer.Exit(1)


@app.command("tune", epilog=EPILOG)
def tune_command(
    site: SiteOption,
    purity: Annotated[float, typer.Option(help="Share of the defects that get a name whose name is to be right.")],
    recipe: Annotated[Path | None, typer.Option(help="Of the site's recipes; needed where it has several.")] = None,
    lot: Annotated[str | None, typer.Option(help="From the corrections of one lot; of all without it.")] = None,
    golden: Annotated[
        bool, typer.Option("--golden", help="From the golden set of the head in service, in place of corrections.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write the proposal beside the recipe, as NAME.proposed.yaml.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Propose a threshold for each class, for a purity that you name; the recipe itself stays as it is.

    Below its threshold a defect is non-decidable: a person chooses between two classes. So purity costs contribution.
    Correct a fair sample first, and confirm what is right; `semwatch rereview` brings old results to today's head.
    """
    settings = load_site(site)
    path = _recipe_of(settings, recipe)
    rule = load_recipe(path).unknown
    calls, n_unknown = tune.golden_calls(settings, rule) if golden else tune.corrected_calls(settings, lot)
    found = tune.tune(calls, rule, purity, n_undecided=n_unknown)
    text = path.read_text("utf-8")
    made = tune.proposal(text, found.proposed) if found.proposed else text
    target = path.with_name(f"{path.stem}.proposed{path.suffix}")
    if write and found.proposed:
        if target.exists():
            raise ConfigError(f"{target} is there already: compare it, then move it aside")
        files.write_whole(target, made.encode())
    if as_json:
        written = str(target) if write and found.proposed else None
        typer.echo(json.dumps({**dataclasses.asdict(found), "proposed": found.proposed, "written": written}))
        return
    _show_tuning(found)
    if not found.proposed:
        say("nothing to propose: the thresholds stay as they are")
    elif write:
        say(f" {target}; look at it, then put it in the recipe's place", ("proposal:", "green"))
    else:
        names = str(path), str(target)
        for line in difflib.unified_diff(text.splitlines(), made.splitlines(), *names, lineterm="", n=2):
            say(line)
        say("--write puts it beside the recipe")


def _recipe_of(site: Site, recipe: Path | None) -> Path:
    """The one recipe that is meant.

    Raises:
        ConfigError: the site has several, or not this one.
    """
    paths = list(dict.fromkeys(folder.recipe for folder in site.folders))
    if recipe is None and len(paths) == 1:
        return paths[0]
    if recipe is None or recipe.absolute() not in paths:
        raise ConfigError(f"--recipe: name one of the site's recipes, {', '.join(map(str, paths))}")
    return recipe.absolute()


def _show_tuning(found: Tuning) -> None:
    rows = [
        (
            one.label,
            f"{one.now:.3g}",
            "" if one.threshold is None else f"{one.threshold:.4g}",
            in_share(one.purity_now),
            "" if one.threshold is None else in_share(one.purity),
            "" if one.threshold is None else f"{one.kept.value:.0%}",
        )
        for one in found.classes
    ]
    columns = ("class", "now", "proposed", "purity now", "purity then", "kept")
    show_table(columns, rows, title=f"{counted(found.n_calls, 'defect')} whose truth is known", right=(1, 2, 5))
    for one in found.classes:
        wrong = ", ".join(f"{label} {n}" for label, n in one.confused_with)
        say(f" {one.readiness}" + (f" (wrong: {wrong})" if wrong else ""), (f"{one.label}:", "bold"))
    say(f"purity: {in_share(found.purity_now)} now, {in_share(found.purity)} then")
    say(f"contribution: {in_share(found.contribution_now)} now, {in_share(found.contribution)} then")
    check = found.held_out
    if check.chosen is not None and check.held_out is not None:
        say(
            f"chosen on half of the images: purity {check.chosen:.1%} there, {check.held_out:.1%} on the other half "
            f"({check.low:.0%}-{check.high:.0%}); count on the second"
        )


def _scores(folder: Path, models: Embedded) -> list[Scored]:
    files = image_files([folder])
    shown = track(files.items(), f"scoring {folder}", console=err, transient=True, disable=not err.is_terminal)
    return [Scored(name, score) for name, file in shown for score in calibrate.raw_scores(file, models)]


def _calibration_lines(found: Calibration) -> Iterator[str]:
    n, proposed = found.proposed.false_alarms.n, found.proposed
    yield f"at most {found.false_alarm_rate:.3%} of normal images like these {n} pass"
    if found.false_alarm_rate > found.asked_rate:
        yield f"that is not the {found.asked_rate:.3%} of the recipe: so few normal images cannot promise less, give "
        yield f"{found.n_needed} for it; but few of your own process are better than none"
    left_out = found.left_out
    yield f"each normal image judged by the others: {left_out} pass (in brackets: where the share lies, at 90 %)"
    yield ""
    for name, one in (("now", found.present), ("proposed", proposed)):
        if one is not None:
            missed = "misses not known" if one.misses is None else f"misses {one.misses}"
            yield f"{name} {one.threshold:.4g}: false alarms {one.false_alarms}; {missed}"
    if found.present is None:
        yield "now: none, the detector's own normal images cannot promise the rate of the recipe"
    if proposed.misses is None:
        yield "what it would miss is not known: give images with defects, --defects FOLDER"
        return
    yield ""
    yield f"{found.comparison}"
    if found.worst_missed:
        worst = ", ".join(f"{one.name} {one.score:.4g}" for one in found.worst_missed)
        yield f"missed at the proposed threshold, lowest score first: {worst}"
    yield ""
    yield "rate asked   threshold   false alarms among the normals   misses"
    for row in found.alternatives:
        if row.measured is None:
            yield f"{row.false_alarm_rate:<10.3g}   needs {calibrate.n_needed(row.false_alarm_rate)} normal images"
        else:
            threshold, alarms, misses = row.measured.threshold, str(row.measured.false_alarms), row.measured.misses
            yield f"{row.false_alarm_rate:<10.3g}   {threshold:<9.4g}   {alarms:<30}   {misses or '?'}"


def _as_json(found: Calibration) -> dict[str, Any]:
    return {
        "threshold": found.proposed.threshold,
        "false_alarm_rate": found.false_alarm_rate,
        "n_normals": found.proposed.false_alarms.n,
        "asked_rate": found.asked_rate,
        "present": found.present and _measured_json(found.present),
        "proposed": _measured_json(found.proposed),
        "left_out": _counted_json(found.left_out),
        "is_worse": found.is_worse,
        "worst_missed": [{"name": one.name, "score": one.score} for one in found.worst_missed],
        "alternatives": [
            {"false_alarm_rate": row.false_alarm_rate, **(_measured_json(row.measured) if row.measured else {})}
            for row in found.alternatives
        ],
    }


def _measured_json(one: Measured) -> dict[str, Any]:
    return {
        "threshold": one.threshold,
        "false_alarms": _counted_json(one.false_alarms),
        "misses": one.misses and _counted_json(one.misses),
    }


def _counted_json(one: Counted) -> dict[str, Any]:
    return {"count": one.count, "n": one.n, "low": one.rate.low, "high": one.rate.high}


def _fields(settings: Any, prefix: str = "") -> Iterator[tuple[str, object, str]]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if hasattr(type(value), "model_fields"):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""
