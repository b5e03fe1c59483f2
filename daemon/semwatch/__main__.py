"""The command line: argv -> settings -> parts -> loop -> exit code. No reviewing here."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track
from rich.table import Table
from rich.text import Text

from semwatch import audit, binarization, detection, doctor, incoming, micrograph, pipeline, results
from semwatch.commands import clusters as cluster_commands
from semwatch.commands import models, queue
from semwatch.config import EXAMPLES, Recipe, Site, load_recipe, load_site
from semwatch.defects import Review
from semwatch.demo import run_demo
from semwatch.errors import ConfigError, ImageError, ModelMismatch, SemwatchError, ServiceUnavailable
from semwatch.inference import Embedded
from semwatch.learning_demo import run_learning_demo
from semwatch.ledger import Ledger
from semwatch.service import AUDIT, LEDGER, Service, codes, utc_now

EPILOG = (
    "Exit codes: 0 all well; 1 done, but some files could not be reviewed or some checks failed; 2 settings, recipe or "
    "arguments are wrong; 3 the models do not fit; 4 a service that is needed is away."
)
EXIT_CODES: dict[type[SemwatchError], int] = {ConfigError: 2, ModelMismatch: 3, ServiceUnavailable: 4}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
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
app.add_typer(cluster_commands.app, name="clusters")
app.add_typer(models.app, name="models")
app.add_typer(queue.app, name="queue")

out = Console()
err = Console(stderr=True)

SiteOption = Annotated[Path, typer.Option(help=f"Site settings; a commented example is {EXAMPLES / 'site.yaml'}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON for machines instead of a table.")]
RecipeOption = Annotated[Path | None, typer.Option(help="Recipe; the built-in defaults without it.")]
RepositoryOption = Annotated[Path, typer.Option(help="Model repository.")]
REPOSITORY = Path("model_repository")
MAX_LISTED = 100_000
"""Files in quarantine that one command looks at."""
SHOWN_DIGITS = 16


@app.command(epilog=EPILOG)
def run(
    site: SiteOption,
    verbose: Annotated[bool, typer.Option(help="One line for every file.")] = False,
) -> None:
    """Watch the drop folders and review what lands there, until SIGTERM or Ctrl-C; a second signal leaves at once."""
    _log_to_stderr(logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING)
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
    as_json: JsonOption = False,
) -> None:
    """Review files once, by the same line as the daemon. Needs neither Redis nor a site."""
    settings = load_recipe(recipe) if recipe else Recipe()
    files = _image_files(paths)
    if not files:
        raise ConfigError(f"no images ({', '.join(incoming.IMAGE_SUFFIXES)}) in {', '.join(map(str, paths))}")
    with Embedded(repository, pins=settings.pins.model_dump()) as models:
        rows = [
            _review_file(file, name, settings, models, results_dir)
            for name, file in track(
                files.items(), "reviewing", console=err, transient=True, disable=not err.is_terminal
            )
        ]
    for lot in sorted({Path(row["result"]).parent for row in rows if "result" in row}):
        results.write_lot_csv(lot)
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
    learn: Annotated[bool, typer.Option(help="Show how two unseen types become classes.")] = False,
) -> None:
    """Run the whole line on embedded defaults: own Redis, own daemon, a lot dropped image by image."""
    if learn:
        run_learning_demo(folder=folder, repository=repository, n=max(n, 90), seed=seed, console=out)
        return
    run_demo(lot=lot, folder=folder, repository=repository, n=n, seed=seed, console=out)


@app.command(epilog=EPILOG)
def status(site: SiteOption, as_json: JsonOption = False) -> None:
    """Say how a site stands: waiting files, rate, queue depths, model versions, disk left."""
    state = doctor.status(load_site(site))
    if as_json:
        typer.echo(json.dumps(state))
        return
    table = _table("", "", show_header=False, box=None)
    for key, value in state.items():
        table.add_row(key.replace("_", " "), _printable(_in_words(value)))
    out.print(table)


@app.command("doctor", epilog=EPILOG)
def doctor_command(site: SiteOption, as_json: JsonOption = False) -> None:
    """Check folders, rights, Redis, models and versions, and say what to fix. Run it as the daemon's user."""
    checks = doctor.examine(load_site(site))
    if as_json:
        typer.echo(json.dumps([{"check": c.name, "ok": c.ok, "detail": c.detail, "remedy": c.remedy} for c in checks]))
    else:
        for check in checks:
            _say(f" {check.name}: {check.detail}", ("ok ", "green") if check.ok else ("FIX", "red"))
            if not check.ok:
                _say(f"    {check.remedy}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@recipe_app.command("check", epilog=EPILOG)
def recipe_check(recipe: Annotated[Path, typer.Argument(help="A recipe.")]) -> None:
    """Validate a recipe; every problem with its line and the nearest valid key."""
    settings = load_recipe(recipe)
    _say(f" {settings.name} version {settings.version}, id {settings.id}", ("ok", "green"))


@recipe_app.command("show", epilog=EPILOG)
def recipe_show(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; the built-in defaults without it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a recipe with every default filled in and what each value means."""
    settings = load_recipe(recipe) if recipe else Recipe()
    if as_json:
        typer.echo(json.dumps({"id": settings.id, **settings.model_dump(mode="json")}))
        return
    table = _table("setting", "value", "meaning", title=f"recipe {settings.name}, id {settings.id}")
    for name, value, meaning in _fields(settings):
        table.add_row(name, _printable(_in_words(value)), _printable(meaning))
    out.print(table)


@recipe_app.command("calibrate", epilog=EPILOG)
def recipe_calibrate(
    normals: Annotated[Path, typer.Argument(help="Folder of defect-free images of your own process.", exists=True)],
    recipe: RecipeOption = None,
    repository: RepositoryOption = REPOSITORY,
    as_json: JsonOption = False,
) -> None:
    """Measure the gate's threshold on your own defect-free images, and print the line to put into the recipe."""
    settings = load_recipe(recipe) if recipe else Recipe()
    files = _image_files([normals]).values()
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
    _say(f"# at most {rate:.3%} of normal images like these {len(scores)} pass")
    _say(f"gate:\n  threshold: {threshold:.9g}")  # a float32 in full: rounded down, it would let its own image pass


@audit_app.command("verify", epilog=EPILOG)
def audit_verify(
    log: Annotated[Path, typer.Argument(help="The audit log, audit.jsonl in the site's state_dir.")],
    as_json: JsonOption = False,
) -> None:
    """Check the chain of an audit log: any edit, gap, insertion or reordering shows."""
    if not log.is_file():
        raise ConfigError(f"no audit log at {log}; the daemon keeps {AUDIT} in the state_dir of its site")
    n_delivered = _n_delivered(log.with_name(LEDGER))  # asked first: the daemon may append meanwhile
    report = audit.verify(log)
    problems = list(report.problems)
    if report.last_seq < n_delivered:
        problems.append(f"ends with seq {report.last_seq}: the ledger beside it has handed over {n_delivered}")
    if as_json:
        said = {"ok": not problems, "n_lines": report.n_lines, "last_hash": report.last_hash, "problems": problems}
        typer.echo(json.dumps(said))
    elif not problems:
        _say(f": {report.n_lines} lines; note elsewhere: {report.last_hash}", ("intact", "green"))
    else:
        for problem in problems:
            _say(f": {problem}", ("broken", "red"))
    if problems:
        raise typer.Exit(1)


@quarantine_app.command("list", epilog=EPILOG)
def quarantine_list(site: SiteOption, as_json: JsonOption = False) -> None:
    """List the files that could not be reviewed, with the reason of each."""
    with _ledger(load_site(site), read_only=True) as ledger:
        found = ledger.listing("QUARANTINED", limit=MAX_LISTED)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(work) for work in found]))
        return
    table = _table("source", "path", "reason", "sha256")
    for work in found:
        table.add_row(*map(_printable, (work.source, work.path, work.reason or "", work.sha256[:SHOWN_DIGITS])))
    out.print(table)


@quarantine_app.command("requeue", epilog=EPILOG)
def quarantine_requeue(
    site: SiteOption,
    sha256: Annotated[
        list[str], typer.Argument(help="Of the files, as `list` shows them; the first digits are enough.")
    ],
) -> None:
    """Give files another try; safe beside a running daemon, which finds them at its next scan."""
    settings = load_site(site)
    drops = {folder.source: folder.path for folder in settings.folders}
    with _ledger(settings, exclusive=False) as ledger:
        found = ledger.listing("QUARANTINED", limit=MAX_LISTED)
        for digits in sha256:
            if not digits or not any(work.sha256.startswith(digits.lower()) for work in found):
                raise ConfigError(
                    f"nothing in quarantine begins with {digits!r}; `semwatch quarantine list` shows what is"
                )
        for work in found:
            if work.sha256.startswith(tuple(map(str.lower, sha256))) and ledger.requeue(work.source, work.sha256):
                is_there = work.source in drops and (drops[work.source] / work.path).exists()
                what_to_do = "" if is_there else " (is not in the drop folder now: drop it again)"
                _say(f": {work.source}/{work.path}{what_to_do}", ("queued again", "green"))


def _ledger(settings: Site, *, read_only: bool = False, exclusive: bool = True) -> Ledger:
    path = settings.state_dir / LEDGER
    if not path.exists():
        raise ConfigError(f"no ledger at {path}: the daemon has not run yet")
    return Ledger(path, read_only=read_only, exclusive=exclusive)


def _n_delivered(ledger: Path) -> int:
    """Number of the last line that the audit log must hold; 0 without a ledger to tell."""
    if not ledger.exists():
        return 0
    with Ledger(ledger, read_only=True) as opened:
        last_seq, waiting = opened.last_audit_seq(), opened.audit_after(0, limit=1)
    return waiting[0][0] - 1 if waiting else last_seq


def _image_files(paths: list[Path]) -> dict[str, Path]:
    """Files to review, each once, by the name that its result gets: relative to the folder that holds them all."""
    tops = [path if path.is_dir() else path.parent for path in paths]
    above = os.path.commonpath([os.path.normpath(top.absolute()) for top in tops])
    found = (file for path in paths for file in (sorted(_inside(path)) if path.is_dir() else [path]))
    return {Path(os.path.relpath(file, above)).as_posix(): file for file in found}


def _inside(folder: Path) -> Iterator[Path]:
    """Image files below a folder; what writers have not finished and overlays of earlier reviews are none."""
    for file in folder.rglob("*"):
        if file.suffix.lower() not in incoming.IMAGE_SUFFIXES or file.name.endswith(results.OVERLAY):
            continue
        if file.is_file() and not any(map(incoming.is_temporary, file.relative_to(folder).parts)):
            yield file


def _review_file(file: Path, name: str, recipe: Recipe, models: Embedded, results_dir: Path) -> dict[str, Any]:
    try:
        data = micrograph.read_file(file)
        found = pipeline.review(
            data,
            source="review",
            path=name,
            sha256=hashlib.sha256(data).hexdigest(),
            recipe=recipe,
            models=models,
            reviewed_utc=utc_now(),
        )
        written = results.write(found, results_dir=results_dir, **codes(recipe, models.meta("head").codes))
    except ImageError as error:
        return {"file": str(file), "error": str(error)}
    return _summary(found, file, written.json, written.overlays)


def _raw_scores(file: Path, models: Embedded) -> list[float]:
    try:
        return [detection.detect(page, models)[0].raw_score for page in micrograph.read(file)]
    except ImageError as error:
        raise ConfigError(f"{error}; or take it out of the defect-free images") from error


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
    table = _table("file", "image score", "verdicts", "result")
    for row in rows:
        if "error" in row:
            table.add_row(_printable(row["file"]), "", _printable(row["error"], "red"), "")
        else:
            scores = " ".join(f"{score:.3f}" for score in row["image_scores"])
            verdicts = ", ".join(row["verdicts"]) or "defect-free"
            table.add_row(*map(_printable, (row["file"], scores, verdicts, row["result"])))
    out.print(table)


def _table(*columns: str, **looks: Any) -> Table:
    """A table that cuts nothing off: half a path or hash is of no use."""
    table = Table(**looks)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _printable(text: str, style: str = "") -> Text:
    """Text as it stands: brackets are no markup, and bytes of a file name that are not UTF-8 stand as \\xNN."""
    return Text(os.fsencode(text).decode("utf-8", "backslashreplace"), style)


def _say(text: str, mark: tuple[str, str] = ("", "")) -> None:
    """Print a line that is never wrapped, after a coloured mark."""
    out.print(Text.assemble(mark, _printable(text)), soft_wrap=True)


def _in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items()) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == [] else str(value)


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
        app(prog_name="semwatch")
    except SemwatchError as error:
        err.print(Text.assemble((type(error).__name__, "red"), f": {error}"), soft_wrap=True)
        raise SystemExit(EXIT_CODES.get(type(error), 1)) from error


if __name__ == "__main__":
    main()
