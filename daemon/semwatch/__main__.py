"""The command line: argv -> settings -> parts -> loop -> exit code. No reviewing here."""

import dataclasses
import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track
from rich.table import Table

from semwatch import audit, binarization, detection, doctor, incoming, micrograph, pipeline, results
from semwatch.config import EXAMPLES, Recipe, load_recipe, load_site
from semwatch.defects import Review
from semwatch.demo import run_demo
from semwatch.errors import ConfigError, ImageError, ModelMismatch, SemwatchError, ServiceUnavailable
from semwatch.inference import Embedded
from semwatch.ledger import Ledger
from semwatch.service import LEDGER, Service, codes, utc_now

EPILOG = (
    "Exit codes: 0 all well; 1 done, but some files could not be reviewed or some checks failed; 2 settings, recipe or "
    "arguments are wrong; 3 the models do not fit; 4 a service that is needed is away."
)
EXIT_CODES: dict[type[SemwatchError], int] = {ConfigError: 2, ModelMismatch: 3, ServiceUnavailable: 4}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SEM defect review: finds the defects of each image that lands in a folder, and names those it knows.",
    epilog=EPILOG,
)
recipe_app = typer.Typer(no_args_is_help=True, help="Check, show and calibrate recipes.")
audit_app = typer.Typer(no_args_is_help=True, help="The hash-chained log of every review.")
app.add_typer(recipe_app, name="recipe")
app.add_typer(audit_app, name="audit")
quarantine_app = typer.Typer(no_args_is_help=True, help="Files that could not be reviewed.")
app.add_typer(quarantine_app, name="quarantine")

out = Console()
err = Console(stderr=True)

SiteOption = Annotated[Path, typer.Option(help=f"Site settings; a commented example is {EXAMPLES / 'site.yaml'}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON for machines instead of a table.")]
RecipeOption = Annotated[Path | None, typer.Option(help="Recipe; the built-in defaults without it.")]
RepositoryOption = Annotated[Path, typer.Option(help="Model repository.")]
REPOSITORY = Path("model_repository")


@app.command()
def run(
    site: SiteOption,
    verbose: Annotated[bool, typer.Option(help="One line for every file.")] = False,
) -> None:
    """Watch the drop folders and review what lands there, until SIGTERM or Ctrl-C; a second signal leaves at once."""
    _log_to_stderr(logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING)
    service = Service(load_site(site), environ=os.environ)

    def on_signal(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + number))
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + number))
        service.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    service.run()


@app.command()
def review(
    paths: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", exists=True)],
    recipe: RecipeOption = None,
    repository: RepositoryOption = REPOSITORY,
    results_dir: Annotated[Path, typer.Option("--out", help="Where results go.")] = Path("semwatch-results"),
    as_json: JsonOption = False,
) -> None:
    """Review files once, by the same line as the daemon. Needs neither Redis nor a site."""
    settings = load_recipe(recipe) if recipe else Recipe()
    files = list(_image_files(paths))
    if not files:
        raise ConfigError(f"no images ({', '.join(incoming.IMAGE_SUFFIXES)}) in {', '.join(map(str, paths))}")
    rows, n_failed = [], 0
    with Embedded(repository, pins=settings.pins.model_dump()) as models:
        for file, name in track(files, "reviewing", console=err, transient=True, disable=as_json):
            try:
                data = micrograph.read_file(file)
                found = pipeline.review(
                    data,
                    source="review",
                    path=name,
                    sha256=hashlib.sha256(data).hexdigest(),
                    recipe=settings,
                    models=models,
                    reviewed_utc=utc_now(),
                )
            except ImageError as error:
                n_failed += 1
                rows.append({"file": str(file), "error": str(error)})
                continue
            written = results.write(found, results_dir=results_dir, **codes(settings))
            rows.append(_summary(found, file, written.json, written.overlays))
    for lot in sorted({Path(row["result"]).parent for row in rows if "result" in row}):
        results.write_lot_csv(lot)
    _show_reviews(rows, as_json)
    if n_failed:
        raise typer.Exit(1)


@app.command()
def demo(
    lot: Annotated[Path | None, typer.Option(help="Folder of images to drop; a synthetic lot without it.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the demo lives; emptied first.")] = Path("demo"),
    repository: RepositoryOption = REPOSITORY,
    n: Annotated[int, typer.Option(min=1, help="Images of the synthetic lot.")] = 24,
    seed: int = 7,
) -> None:
    """Run the whole line on embedded defaults: own Redis, own daemon, a lot dropped image by image."""
    run_demo(lot=lot, folder=folder, repository=repository, n=n, seed=seed, console=out)


@app.command()
def status(site: SiteOption, as_json: JsonOption = False) -> None:
    """Say how a site stands: waiting files, rate, queue depths, model versions, disk left."""
    state = doctor.status(load_site(site))
    if as_json:
        typer.echo(json.dumps(state))
        return
    table = Table(show_header=False, box=None)
    for key, value in state.items():
        table.add_row(key.replace("_", " "), "-" if value is None else str(value))
    out.print(table)


@app.command("doctor")
def doctor_command(site: SiteOption, as_json: JsonOption = False) -> None:
    """Check folders, rights, Redis, models and versions, and say what to fix."""
    checks = doctor.examine(load_site(site))
    if as_json:
        typer.echo(json.dumps([{"check": c.name, "ok": c.ok, "detail": c.detail, "remedy": c.remedy} for c in checks]))
    else:
        for check in checks:
            mark = "[green]ok  [/]" if check.ok else "[red]FIX [/]"
            out.print(f"{mark} {check.name}: {check.detail}", highlight=False)
            if not check.ok:
                out.print(f"     [bold]{check.remedy}[/]", highlight=False)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@recipe_app.command("check")
def recipe_check(recipe: Annotated[Path, typer.Argument(help="A recipe.")]) -> None:
    """Validate a recipe; every problem with its line and the nearest valid key."""
    settings = load_recipe(recipe)
    out.print(f"[green]ok[/] {settings.name} version {settings.version}, id {settings.id}", highlight=False)


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; the built-in defaults without it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a recipe with every default filled in and what each value means."""
    settings = load_recipe(recipe) if recipe else Recipe()
    if as_json:
        typer.echo(json.dumps({"id": settings.id, **settings.model_dump(mode="json")}))
        return
    table = Table("setting", "value", "meaning", title=f"recipe {settings.name}, id {settings.id}")
    for name, value, meaning in _fields(settings):
        table.add_row(name, str(value), meaning)
    out.print(table)


@recipe_app.command("calibrate")
def recipe_calibrate(
    normals: Annotated[Path, typer.Argument(help="Folder of defect-free images of your own process.", exists=True)],
    recipe: RecipeOption = None,
    repository: RepositoryOption = REPOSITORY,
    as_json: JsonOption = False,
) -> None:
    """Measure the gate's threshold on your own defect-free images, and print the line to put into the recipe."""
    settings = load_recipe(recipe) if recipe else Recipe()
    scores = []
    with Embedded(repository, pins=settings.pins.model_dump()) as models:
        for file, _ in track(list(_image_files([normals])), "scoring", console=err, transient=True, disable=as_json):
            scores += [detection.detect(page, models)[0].raw_score for page in micrograph.read(file)]
    rate = settings.gate.false_alarm_rate
    threshold = binarization.conformal_threshold(np.array(scores), false_alarm_rate=rate)
    if not np.isfinite(threshold):
        raise ConfigError(
            f"{len(scores)} normal images cannot promise a false alarm rate of {rate}; give at least {1 / rate - 1:.0f}"
        )
    if as_json:
        typer.echo(json.dumps({"threshold": threshold, "false_alarm_rate": rate, "n_normals": len(scores)}))
        return
    out.print(f"# at most {rate:.1%} of normal images like these {len(scores)} pass", highlight=False)
    out.print(f"gate:\n  threshold: {threshold:.6g}", highlight=False)


@audit_app.command("verify")
def audit_verify(
    log: Annotated[Path, typer.Argument(help="The audit log, audit.jsonl in the site's state_dir.")],
    as_json: JsonOption = False,
) -> None:
    """Check the chain of an audit log: any edit, gap, insertion or reordering shows."""
    report = audit.verify(log)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "ok": report.ok,
                    "n_lines": report.n_lines,
                    "last_hash": report.last_hash,
                    "problems": list(report.problems),
                }
            )
        )
    elif report.ok:
        out.print(f"[green]intact[/]: {report.n_lines} lines; note elsewhere: {report.last_hash}", highlight=False)
    else:
        for problem in report.problems:
            out.print(f"[red]broken[/]: {problem}", highlight=False)
    if not report.ok:
        raise typer.Exit(1)


@quarantine_app.command("list")
def quarantine_list(site: SiteOption, as_json: JsonOption = False) -> None:
    """List the files that could not be reviewed, with the reason of each."""
    with _ledger(site, read_only=True) as ledger:
        found = ledger.listing("QUARANTINED", limit=1000)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(work) for work in found]))
        return
    table = Table("source", "path", "reason", "sha256")
    for work in found:
        table.add_row(work.source, work.path, work.reason, work.sha256[:16])
    out.print(table)


@quarantine_app.command("requeue")
def quarantine_requeue(
    site: SiteOption,
    sha256: Annotated[
        list[str], typer.Argument(help="Of the files, as `list` shows them; the first digits are enough.")
    ],
) -> None:
    """Give files another try; safe beside a running daemon, which finds them at its next scan."""
    with _ledger(site, exclusive=False) as ledger:
        for work in ledger.listing("QUARANTINED", limit=1000):
            if work.sha256.startswith(tuple(sha256)) and ledger.requeue(work.source, work.sha256):
                out.print(f"queued again: {work.source}/{work.path}", highlight=False)


def _ledger(site: Path, *, read_only: bool = False, exclusive: bool = True) -> Ledger:
    path = load_site(site).state_dir / LEDGER
    if not path.exists():
        raise ConfigError(f"no ledger at {path}: the daemon has not run yet")
    return Ledger(path, read_only=read_only, exclusive=exclusive)


def _image_files(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Files to review, with the name each result gets."""
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.suffix.lower() in incoming.IMAGE_SUFFIXES and not incoming.is_temporary(file.name):
                    yield file, file.relative_to(path).as_posix()
        else:
            yield path, path.name


def _summary(found: Review, file: Path, result: Path, overlays: tuple[Path, ...]) -> dict[str, Any]:
    defects = [defect for page in found.pages for defect in page.defects]
    return {
        "file": str(file),
        "image_scores": [page.score_map.raw_score for page in found.pages],
        "verdicts": [defect.verdict.label or defect.verdict.kind for defect in defects],
        "result": str(result),
        "overlays": [str(overlay) for overlay in overlays],
        "milliseconds": sum(found.timings_ms.values()),
    }


def _show_reviews(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("file", "image score", "verdicts", "result")
    for row in rows:
        if "error" in row:
            table.add_row(row["file"], "", f"[red]{row['error']}[/]", "")
        else:
            scores = " ".join(f"{score:.3f}" for score in row["image_scores"])
            table.add_row(row["file"], scores, ", ".join(row["verdicts"]) or "defect-free", row["result"])
    out.print(table)


def _fields(settings: Any, prefix: str = "") -> Iterator[tuple[str, object, str]]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if hasattr(type(value), "model_fields"):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description or ""


def _log_to_stderr(level: int) -> None:
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=err, show_path=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def main() -> None:
    """Run a command; an expected error is one plain message and its exit code."""
    try:
        app()
    except SemwatchError as error:
        err.print(f"[red]{type(error).__name__}[/]: ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(EXIT_CODES.get(type(error), 1)) from error


if __name__ == "__main__":
    main()
