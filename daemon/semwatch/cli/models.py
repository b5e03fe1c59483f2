"""`semwatch models`: which versions there are, which one serves, and how to change that."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from semwatch.cli.options import EPILOG, JsonOption, SiteOption, out, printable, say, table
from semwatch.errors import ConfigError, ModelMismatch, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.operations.decide import login_name
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import Site, load_site
from semwatch.store import serving
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.system.clock import utc_now

app = typer.Typer(no_args_is_help=True, help="Versions of detector, encoder and head: which serve, and which shall.")

ModelArgument = Annotated[str, typer.Argument(help="detector, encoder or head.")]
ROLLBACK_TIMEOUT_S = 10.0


@app.command("list", epilog=EPILOG)
def list_versions(site: SiteOption, as_json: JsonOption = False) -> None:
    """List every version: which the daemon serves, which is chosen for its next chance, and why others are not."""
    settings = load_site(site)
    rows = [row for model in model_repository.MODELS for row in _rows(settings, model)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    shown = table("model", "version", "state", "made", "classes")
    for row in rows:
        style = "green" if row["serves"] else "red" if row["withdrawn"] or row["refused"] else ""
        cells = (row["version"], row["state"], row["created_utc"], len(row["labels"]) or "")
        shown.add_row(row["model"], *(printable(str(cell), style) for cell in cells))
    out.print(shown)
    for row in rows:
        for what in ("withdrawn", "refused"):
            if row[what] is not None:
                say(f": {row['model']} {row['version']}: {row[what]}", (what, "red"))


@app.command("labels", epilog=EPILOG)
def list_labels(site: SiteOption, as_json: JsonOption = False) -> None:
    """List the class names that models know, each with the versions of the head that do, and the site's codes."""
    settings = load_site(site)
    repository = settings.models.repository
    known: dict[str, list[int]] = {}
    for version in model_repository.versions(repository, "head"):
        for label in _made(repository, "head", version)["labels"]:
            known.setdefault(label, []).append(version)
    codes = {
        label: known_class.code
        for f in settings.folders
        for label, known_class in load_recipe(f.recipe).classes.items()
    }
    labels = sorted({*known, *codes})
    rows: list[dict[str, Any]] = [
        {"label": label, "heads": known.get(label, []), "code": codes.get(label)} for label in labels
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    shown = table("label", "heads", "code")
    for row in rows:
        heads = ", ".join(map(str, row["heads"])) or "none knows it"
        shown.add_row(*map(printable, (row["label"], heads, "" if row["code"] is None else str(row["code"]))))
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
    _note(settings, "model released" if release else "model pinned", {"model": model, "version": version})
    choice.pin(settings.models.repository, model, version)
    _show_outcome(settings, model)


@app.command(epilog=EPILOG)
def rollback(
    site: SiteOption,
    model: Annotated[str, typer.Argument(help="head, encoder or detector.")] = "head",
    reason: Annotated[str, typer.Option(help="Why; stands in the audit log and beside the version.")] = "rolled back",
) -> None:
    """Withdraw the version that serves; the one before it serves at once, and the next publication by itself.

    Where a version is pinned, the pin is moved to the one before it, and nothing is withdrawn.
    """
    _check_model(model)
    settings = load_site(site)
    repository = settings.models.repository
    refused = serving.announced(settings.state_dir, model)[1]
    leaving, to = choice.way_back(repository, model, refused=refused)
    is_pinned = choice.pin_of(repository, model) is not None
    _note(settings, "model rolled back", {"model": model, "from": leaving, "to": to, "reason": reason})
    choice.roll_back(repository, model, reason, refused=refused)
    if is_pinned:
        say(f": to {model} {to}; {leaving} is not withdrawn", ("pin moved", "yellow"))
    else:
        say(f": {model} {leaving}: {reason}", ("withdrawn", "yellow"))
    _show_outcome(settings, model)


@app.command(epilog=EPILOG)
def diff(site: SiteOption, model: ModelArgument, old: int, new: int, as_json: JsonOption = False) -> None:
    """Say what one version has that another has not: classes, codes, what it was made of, how it was judged."""
    _check_model(model)
    repository = load_site(site).models.repository
    changes = choice.difference(*(model_repository.read_meta(repository, model, version) for version in (old, new)))
    if as_json:
        typer.echo(json.dumps(changes))
        return
    shown = table("", f"{model} {old}", f"{model} {new}")
    shown.add_row(
        "classes only here", *(printable(", ".join(changes[key])) for key in ("classes_removed", "classes_added"))
    )
    for name in ("codes", "provenance"):
        for key, pair in changes[name].items():
            shown.add_row(
                printable(f"{name}: {key}"), *(printable("-" if value is None else str(value)) for value in pair)
            )
    out.print(shown)
    if not changes["same_encoder"] and model == "head":
        say("the two read features of different encoders")


def _rows(settings: Site, model: str) -> list[dict[str, Any]]:
    repository, runs = settings.models.repository, serving.daemon_runs(settings.state_dir)
    announced, refused = serving.announced(settings.state_dir, model)
    found = model_repository.versions(repository, model)
    chosen, pinned = (choice.choice(repository, model), choice.pin_of(repository, model)) if found else (0, None)
    rows = []
    for version in found:
        row = {
            "model": model,
            "version": version,
            "serves": runs and announced.get(model) == version,
            "chosen": version == chosen,
            "pinned": version == pinned,
            "withdrawn": choice.why_withdrawn(repository, model, version),
            "refused": refused.get(version),
            **_made(repository, model, version),
        }
        rows.append({**row, "state": _state(row, runs)})
    return rows


def _made(repository: Path, model: str, version: int) -> dict[str, Any]:
    """When a version was made, its classes and content hash; blank where its description is damaged."""
    try:
        meta = model_repository.read_meta(repository, model, version)
    except ModelMismatch:
        return {"created_utc": "", "labels": [], "content_hash": ""}
    return {"created_utc": meta.created_utc, "labels": list(meta.labels), "content_hash": meta.content_hash}


def _state(row: Mapping[str, Any], runs: bool) -> str:
    comes = "comes at the daemon's next start" if row["model"] == "encoder" else "not in service yet"
    notes = {
        "serves": row["serves"],
        "chosen": row["chosen"] and not row["serves"],
        comes: runs and row["chosen"] and not row["serves"] and not row["refused"],
        "pinned": row["pinned"],
        "withdrawn": row["withdrawn"] is not None,
        "refused": row["refused"] is not None,
    }
    return ", ".join(words for words, holds in notes.items() if holds)


def _check_model(model: str) -> None:
    if model not in model_repository.MODELS:
        raise ConfigError(f"there is no model {model!r}; choose one of {', '.join(model_repository.MODELS)}")


def _note(settings: Site, event: str, about: Mapping[str, object]) -> None:
    """Write the audit line before the change: there may be a line without a change, never the reverse."""
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    with Ledger(settings.state_dir / LEDGER, exclusive=False) as ledger:
        ledger.note(audit={"event": event, "utc": utc_now(), "by": login_name(), **about})


def _show_outcome(settings: Site, model: str) -> None:
    version = choice.choice(settings.models.repository, model)
    if not serving.daemon_runs(settings.state_dir):
        say(f": {model} {version}, once the daemon runs", ("serves", "green"))
        return
    if model == "encoder":
        say(
            f": {model} {version} at the daemon's next start; encoders do not change while it runs", ("serves", "green")
        )
        return
    why_not = serving.await_version(settings.state_dir, model, version, timeout_s=ROLLBACK_TIMEOUT_S)
    if why_not is not None:
        raise ServiceUnavailable(why_not)
    say(f": {model} {version}", ("serves", "green"))
