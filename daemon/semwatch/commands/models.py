"""`semwatch models`: which versions there are, which one serves, and how to change that."""

import json
from typing import Annotated

import typer

from semwatch import model_repository, serving
from semwatch.commands.options import EPILOG, JsonOption, SiteOption, out, printable, say, table
from semwatch.config import Site, load_site
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.ledger import Ledger
from semwatch.service import LEDGER

app = typer.Typer(no_args_is_help=True, help="Versions of detector, encoder and head: which serve, and which shall.")

ModelArgument = Annotated[str, typer.Argument(help="detector, encoder or head.")]
ROLLBACK_TIMEOUT_S = 10.0


@app.command("list", epilog=EPILOG)
def list_versions(site: SiteOption, as_json: JsonOption = False) -> None:
    """List every version, which one serves, and why others may not."""
    settings = load_site(site)
    rows = [row for model in model_repository.MODELS for row in _rows(settings, model)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    shown = table("model", "version", "state", "made", "classes")
    for row in rows:
        state = str(row["state"])
        style = "green" if state.startswith("serves") else "red" if state.startswith("withdrawn") else ""
        cells = (str(row[key]) for key in ("version", "state", "created_utc", "n_classes"))
        shown.add_row(str(row["model"]), *(printable(cell, style) for cell in cells))
    out.print(shown)


@app.command(epilog=EPILOG)
def pin(
    site: SiteOption,
    model: ModelArgument,
    version: Annotated[int | None, typer.Argument(help="Version to stay with.", min=1)] = None,
    release: Annotated[bool, typer.Option(help="Let the newest version serve again.")] = False,
) -> None:
    """Let one version serve whatever is published, until it is released. A recipe's own pin goes before it."""
    _check_model(model)
    if (version is None) != release:
        raise ConfigError("give either a version to stay with, or --release")
    settings = load_site(site)
    if version is not None:
        model_repository.read_meta(settings.models.repository, model, version)
    _note(settings, {"event": "model pinned" if version else "model released", "model": model, "version": version})
    serving.pin(settings.models.repository, model, version)
    _say_outcome(settings, model)


@app.command(epilog=EPILOG)
def rollback(
    site: SiteOption,
    model: Annotated[str, typer.Argument(help="head, encoder or detector.")] = "head",
    reason: Annotated[str, typer.Option(help="Why; stands in the audit log and beside the version.")] = "rolled back",
) -> None:
    """Withdraw the version that serves; the one before it serves at once, and the next publication by itself."""
    _check_model(model)
    settings = load_site(site)
    _note(settings, {"event": "model rolled back", "model": model, "reason": reason})
    left, _ = serving.roll_back(settings.models.repository, model, reason)
    say(f": {model} {left}: {reason}", ("withdrawn", "yellow"))
    _say_outcome(settings, model)


@app.command(epilog=EPILOG)
def diff(site: SiteOption, model: ModelArgument, old: int, new: int, as_json: JsonOption = False) -> None:
    """Say what one version has that another has not: classes, codes, what it was made of, how it was judged."""
    _check_model(model)
    repository = load_site(site).models.repository
    told = serving.difference(*(model_repository.read_meta(repository, model, version) for version in (old, new)))
    if as_json:
        typer.echo(json.dumps(told))
        return
    shown = table("", f"{model} {old}", f"{model} {new}")
    shown.add_row(
        "classes only here", *(printable(", ".join(told[key])) for key in ("classes_removed", "classes_added"))
    )
    for name in ("codes", "provenance"):
        for key, pair in told[name].items():
            shown.add_row(
                printable(f"{name}: {key}"), *(printable("-" if value is None else str(value)) for value in pair)
            )
    out.print(shown)
    if not told["same_encoder"] and model == "head":
        say("the two read features of different encoders")


def _rows(settings: Site, model: str) -> list[dict[str, object]]:
    repository = settings.models.repository
    found = model_repository.versions(repository, model)
    if not found:
        return []
    chosen, pinned = serving.choice(repository, model), serving.pin_of(repository, model)
    announced, refused = serving.announced(settings.state_dir)
    rows: list[dict[str, object]] = []
    for version in found:
        meta = model_repository.read_meta(repository, model, version)
        why = serving.why_withdrawn(repository, model, version)
        state = "" if why is None else f"withdrawn: {why}"
        if version == chosen:
            state = "serves" + (" (pinned)" if pinned == version else "")
            if serving.daemon_runs(settings.state_dir) and announced.get(model) != version:
                at_start = "refused: " + refused[version] if version in refused else "comes at the daemon's next start"
                state = f"chosen, not yet in service: {at_start}"
        rows.append(
            {
                "model": model,
                "version": version,
                "state": state,
                "created_utc": meta.created_utc,
                "n_classes": len(meta.labels) or "",
                "labels": list(meta.labels),
            }
        )
    return rows


def _check_model(model: str) -> None:
    if model not in model_repository.MODELS:
        raise ConfigError(f"there is no model {model!r}; choose one of {', '.join(model_repository.MODELS)}")


def _note(settings: Site, audit: dict[str, object]) -> None:
    """Write the audit line before the change: there may be a line without a change, never the reverse."""
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    with Ledger(settings.state_dir / LEDGER, exclusive=False) as ledger:
        ledger.note(audit=audit)


def _say_outcome(settings: Site, model: str) -> None:
    version = serving.choice(settings.models.repository, model)
    if not serving.daemon_runs(settings.state_dir):
        say(f": {model} {version}, once the daemon runs", ("serves", "green"))
        return
    if model != "head":
        say(f": {model} {version} at the daemon's next start; only heads change while it runs", ("serves", "green"))
        return
    why_not = serving.await_head(settings.state_dir, version, timeout_s=ROLLBACK_TIMEOUT_S)
    if why_not is not None:
        raise ServiceUnavailable(why_not)
    say(f": head {version}", ("serves", "green"))
