"""Every command, and the ones that need no group of their own: run, review, demo, status, doctor."""

import hashlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.logging import RichHandler
from rich.progress import track

from semwatch.cli import adapt, audit_log, lots, models, people, quarantine, queue
from semwatch.cli import clusters as cluster_commands
from semwatch.cli import install as install_commands
from semwatch.cli import klarf as klarf_commands
from semwatch.cli import recipe as recipe_commands
from semwatch.cli import triton as triton_commands
from semwatch.cli.given_files import image_files
from semwatch.cli.logs import logs
from semwatch.cli.options import (
    EPILOG,
    REPOSITORY,
    JsonOption,
    RecipeOption,
    RepositoryOption,
    SiteOption,
    err,
    in_words,
    out,
    printable,
    say,
    table,
)
from semwatch.cli.redis_server import redis_server
from semwatch.defects import Review
from semwatch.demo.learning import run_learning_demo
from semwatch.demo.one_lot import run_demo
from semwatch.errors import ConfigError, ImageError
from semwatch.intake import decoding, pairing
from semwatch.intake.decoders import Decoders
from semwatch.intake.pairing import references_of
from semwatch.line import pipeline
from semwatch.line.class_codes import class_codes
from semwatch.models.inference import Embedded
from semwatch.operations import doctor
from semwatch.service.loop import Service
from semwatch.service.references import read_reference
from semwatch.settings.recipe import Recipe, load_recipe
from semwatch.settings.site import IMAGE_SUFFIXES, load_site
from semwatch.store import lot_table, results
from semwatch.system import journal
from semwatch.system.clock import utc_now

log = logging.getLogger("semwatch")

LogFormat = Literal["auto", "text", "json"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"semwatch {importlib.metadata.version('semwatch')}")
        raise typer.Exit


@app.callback()
def main_options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """SEM defect review: finds the defects of each image that lands in a folder, and names those it knows."""


app.add_typer(recipe_commands.app, name="recipe")
app.add_typer(audit_log.app, name="audit")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(cluster_commands.app, name="clusters")
app.add_typer(models.app, name="models")
app.add_typer(queue.app, name="queue")
app.add_typer(klarf_commands.app, name="klarf")
app.add_typer(triton_commands.app, name="triton")


@app.command(epilog=EPILOG)
def run(
    site: SiteOption,
    verbose: Annotated[bool, typer.Option(help="One line for every file.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="auto: the journal's own fields where stderr is the journal, else text.")
    ] = "auto",
) -> None:
    """Watch the drop folders and review what lands there, until SIGTERM or Ctrl-C; a second signal leaves at once."""
    _log_to_stderr(logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING, log_format)
    stop = threading.Event()

    def on_signal(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + number))
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + number))
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if not Service(load_site(site), stop=stop, environ=os.environ).run():
        logging.shutdown()
        os._exit(0)  # the interpreter would wait for the hung review's thread for ever


@app.command(epilog=EPILOG)
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


@app.command(epilog=EPILOG)
def demo(
    lot: Annotated[Path | None, typer.Option(help="Folder of images to drop; a synthetic lot without it.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the demo lives; emptied first.")] = Path("demo"),
    repository: RepositoryOption = REPOSITORY,
    n: Annotated[int, typer.Option(min=1, help="Images of the synthetic lot.")] = 24,
    seed: int = 7,
    engine: Annotated[Literal["embedded", "triton"], typer.Option(help="What runs the models.")] = "embedded",
    learn: Annotated[bool, typer.Option(help="Show how two unseen types become classes.")] = False,
) -> None:
    """Run the whole line on embedded defaults: own Redis, own daemon, a lot dropped image by image."""
    if learn:
        run_learning_demo(folder=folder, repository=repository, n=max(n, 90), seed=seed, console=out)
        return
    triton = triton_commands.FOLDER if engine == "triton" else None
    run_demo(lot=lot, folder=folder, repository=repository, n=n, seed=seed, console=out, triton=triton)


app.command("logs", epilog=EPILOG)(logs)
app.command("lot", epilog=EPILOG)(lots.lot)
app.command("correct", epilog=EPILOG)(people.correct)
app.command("quality", epilog=EPILOG)(people.quality_command)
app.command("rereview", epilog=EPILOG)(lots.rereview)
app.command("reindex", epilog=EPILOG)(lots.reindex)
app.command("adapt", epilog=EPILOG)(adapt.adapt)
app.command("redis", epilog=EPILOG)(redis_server)
app.command("install", epilog=EPILOG)(install_commands.install)
app.command("upgrade", epilog=EPILOG)(install_commands.upgrade_command)
app.command("uninstall", epilog=EPILOG)(install_commands.uninstall)


@app.command(epilog=EPILOG)
def status(site: SiteOption, as_json: JsonOption = False) -> None:
    """Say how a site stands: waiting files, rate, queue depths, model versions, disk left."""
    state = doctor.status(load_site(site))
    if as_json:
        typer.echo(json.dumps(state))
        return
    shown = table("", "", show_header=False, box=None)
    for key, value in state.items():
        shown.add_row(key.replace("_", " "), printable(in_words(value)))
    out.print(shown)


@app.command("doctor", epilog=EPILOG)
def doctor_command(site: SiteOption, as_json: JsonOption = False) -> None:
    """Check folders, rights, Redis, models and versions, and say what to fix. Run it as the daemon's user."""
    checks = doctor.examine(load_site(site))
    if as_json:
        rows = (
            {"check": c.name, "ok": c.ok, "detail": c.detail, "remedy": c.remedy, "advice": c.advice} for c in checks
        )
        typer.echo(json.dumps(list(rows)))
    else:
        for check in checks:
            mark = ("FIX", "red") if not check.ok else ("!! ", "yellow") if check.advice else ("ok ", "green")
            say(f" {check.name}: {check.detail}", mark)
            if more := check.advice if check.ok else check.remedy:
                say(f"    {more}")
    if not all(check.ok for check in checks):
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
    shown = table("file", "image score", "verdicts", "result")
    for row in rows:
        if "error" in row:
            shown.add_row(printable(row["file"]), "", printable(row["error"], "red"), "")
        else:
            scores = " ".join("-" if score is None else f"{score:.3f}" for score in row["image_scores"])
            verdicts = ", ".join(row["verdicts"]) or ("no image" if row["pages_without_image"] else "defect-free")
            notes = [*row["quality"], *(["unknown process"] if "unknown process" in row["domains"] else [])]
            verdicts += f" ({', '.join(notes)})" if notes else ""
            shown.add_row(*map(printable, (row["file"], scores, verdicts, row["result"])))
    out.print(shown)


def _log_to_stderr(level: int, form: LogFormat) -> None:
    if form == "auto" and journal.is_stderr(os.environ):
        handler: logging.Handler = journal.JournalHandler()
    elif sys.stderr.isatty() and form == "auto":
        handler = RichHandler(console=err, show_path=False)
    else:
        handler = logging.StreamHandler()
        text = journal.TextFormatter("%(levelname)s %(name)s: %(message)s")
        handler.setFormatter(journal.JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if journal.is_for_machines(logging.getLogger()):  # a traceback is one entry, not a line for each of its lines
        sys.excepthook = lambda *error: log.critical("a bug ends the daemon", exc_info=error)
