"""`semwatch recipe`: check, show and calibrate recipes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from semwatch.cli.given_files import image_files
from semwatch.cli.options import (
    EPILOG,
    REPOSITORY,
    JsonOption,
    RecipeOption,
    RepositoryOption,
    err,
    in_words,
    out,
    printable,
    say,
    table,
)
from semwatch.errors import ConfigError, ImageError
from semwatch.intake import decoding, quality
from semwatch.line import binarization, detection
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import QualityRule, Recipe, load_recipe

app = typer.Typer(no_args_is_help=True, help="Check, show and calibrate recipes.")


@app.command("check", epilog=EPILOG)
def check(recipe: Annotated[Path, typer.Argument(help="A recipe.")]) -> None:
    """Validate a recipe; every problem with its line and the nearest valid key."""
    settings = load_recipe(recipe)
    say(f" {settings.name} version {settings.version}, id {settings.id}", ("ok", "green"))


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
    shown = table("setting", "value", "meaning", title=f"recipe {settings.name}, id {settings.id}")
    for name, value, meaning in _fields(settings):
        shown.add_row(name, printable(in_words(value)), printable(meaning))
    out.print(shown)


@app.command("calibrate", epilog=EPILOG)
def calibrate(
    normals: Annotated[Path, typer.Argument(help="Folder of defect-free images of your own process.", exists=True)],
    recipe: RecipeOption = None,
    repository: RepositoryOption = REPOSITORY,
    as_json: JsonOption = False,
) -> None:
    """Measure the gate's threshold on your own defect-free images, and print the line to put into the recipe."""
    settings = load_recipe(recipe) if recipe else Recipe()
    files = image_files([normals]).values()
    scores: list[float] = []
    with Embedded(repository, pins=settings.pins.model_dump()) as models:
        for file in track(files, "scoring", console=err, transient=True, disable=not err.is_terminal):
            scores += _raw_scores(file, models)
    rate = settings.gate.false_alarm_rate
    threshold = binarization.conformal_threshold(np.array(scores), false_alarm_rate=rate)
    if not np.isfinite(threshold):
        # 1e-9 as in conformal_threshold: 1 / 0.05 - 1 is 19 images and not 20
        n_needed = math.ceil(1 / rate - 1 - 1e-9)
        raise ConfigError(
            f"{normals}: {len(scores)} normal images cannot promise a false alarm rate of {rate}; give at least "
            f"{n_needed}, or raise gate.false_alarm_rate in the recipe"
        )
    if as_json:
        typer.echo(json.dumps({"threshold": threshold, "false_alarm_rate": rate, "n_normals": len(scores)}))
        return
    say(f"# at most {rate:.3%} of normal images like these {len(scores)} pass")
    say(f"gate:\n  threshold: {threshold:.9g}")  # a float32 in full: rounded down, it would let its own image pass


def _raw_scores(file: Path, models: Embedded) -> list[float]:
    try:
        rule = QualityRule(no_image="quarantine")
        fields = (page.field for page in decoding.read(file) if quality.admit(page, rule))
        return [detection.detect(field, models)[0].raw_score for field in fields]
    except ImageError as error:
        raise ConfigError(f"{error}; or take it out of the defect-free images") from error


def _fields(settings: Any, prefix: str = "") -> Iterator[tuple[str, object, str]]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if hasattr(type(value), "model_fields"):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""
