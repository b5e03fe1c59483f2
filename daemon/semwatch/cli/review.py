"""`semwatch review`: files judged once, by the same line as the daemon."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.text import Text

from semwatch.cli.given_files import image_files
from semwatch.cli.options import (
    REPOSITORY,
    JsonOption,
    RecipeOption,
    RepositoryOption,
    err,
    printable,
    show_table,
)
from semwatch.defects import Review
from semwatch.errors import ConfigError, ImageError
from semwatch.intake import decoding, pairing
from semwatch.intake.decoders import Decoders
from semwatch.intake.pairing import references_of
from semwatch.line import pipeline
from semwatch.line.class_codes import class_codes
from semwatch.models.inference import Embedded
from semwatch.service.references import read_reference
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.settings.site import IMAGE_SUFFIXES
from semwatch.store import lot_table, results
from semwatch.system.clock import utc_now


def review(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", exists=True)],
    recipe: RecipeOption = None,
    repository: RepositoryOption = REPOSITORY,
    results_dir: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path("semwatch-results"),
    reference: Annotated[
        Path | None,
        typer.Option(help="Picture of the same place on another die, for one image; else the recipe's.", exists=True),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Review files once, by the same line as the daemon. Needs neither Redis nor a site."""
    settings = load_recipe(recipe) if recipe else Recipe()
    if results_dir.exists() and not results_dir.is_dir():
        raise ConfigError(f"--out {results_dir} is no folder: name one, it is made where it is not there")
    files = image_files(paths)
    if reference is not None and len(files) > 1:
        raise ConfigError("--reference is of one image: name one, or give the recipe a reference.pattern for many")
    if reference is None:
        files = {name: file for name, file in files.items() if pairing.partner_of(name, settings.reference) is None}
    if not files:
        raise ConfigError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {', '.join(map(str, paths))}")
    with Decoders() as decoders, Embedded(repository, pins=settings.pins.model_dump()) as models:
        rows = [
            _review_file(file, name, settings, models, results_dir, reference, decoders.decode)
            for name, file in track(
                files.items(), "reviewing", console=err, transient=True, disable=not err.is_terminal
            )
        ]
    for lot in sorted({Path(row["result"]).parent for row in rows if "result" in row}):
        lot_table.write(lot)
    _show_reviews(rows, as_json)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _review_file(
    file: Path,
    name: str,
    recipe: Recipe,
    models: Embedded,
    results_dir: Path,
    reference: Path | None,
    decode: decoding.Decode,
) -> dict[str, Any]:
    try:
        data = decoding.read_file(file)
        beside = [file.with_name(Path(one).name) for one in references_of(name, recipe.reference, IMAGE_SUFFIXES)]
        found = pipeline.review(
            data,
            source="review",
            path=name,
            sha256=hashlib.sha256(data).hexdigest(),
            recipe=recipe,
            models=models,
            reviewed_utc=utc_now(),
            reference_file=read_reference([reference] if reference else beside),
            decode=decode,
        )
        written = results.write(found, results_dir=results_dir, **class_codes(recipe, models.meta("head").codes))
    except ImageError as error:
        return {"file": str(file), "error": str(error)}
    return _summary(found, file, written.json, written.overlays)


def _summary(found: Review, file: Path, result: Path, overlays: tuple[Path, ...]) -> dict[str, Any]:
    defects = [defect for page in found.pages for defect in page.defects]
    return {
        "file": str(file),
        "image_scores": [None if page.score_map is None else page.score_map.raw_score for page in found.pages],
        "domains": [page.domain for page in found.pages],
        "quality": [flag.name for page in found.pages for flag in page.quality.flags],
        "pages_without_image": sum(not page.quality.is_image for page in found.pages),
        "verdicts": [defect.verdict.label or defect.verdict.kind for defect in defects],
        "references": [None if page.reference is None else page.reference.reason for page in found.pages],
        "result": str(result),
        "overlays": [str(overlay) for overlay in overlays],
        "milliseconds": sum(found.timings_ms.values()),
    }


def _show_reviews(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    cells: list[tuple[str | Text, ...]] = []
    for row in rows:
        if "error" in row:
            cells.append((row["file"], "", printable(row["error"], "red"), ""))
        else:
            scores = " ".join("-" if score is None else f"{score:.3f}" for score in row["image_scores"])
            verdicts = ", ".join(row["verdicts"]) or ("no image" if row["pages_without_image"] else "defect-free")
            notes = [*row["quality"], *(["unknown process"] if "unknown process" in row["domains"] else [])]
            verdicts += f" ({', '.join(notes)})" if notes else ""
            cells.append((row["file"], scores, verdicts, row["result"]))
    show_table(("file", "score", "verdicts", "result"), cells)
