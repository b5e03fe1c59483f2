"""`semwatch models`: which versions there are, which one serves, and how to change that."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from semwatch.cli.options import EPILOG, JsonOption, SiteOption, printable, say, show_table
from semwatch.errors import ConfigError, ModelMismatch, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.operations import golden
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import Site, load_site
from semwatch.store import serving
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.system.clock import utc_now
from semwatch.system.login import login_name

app = typer.Typer(no_args_is_help=True, help="Versions of detector, encoder and head: which serve, and which shall.")

ModelArgument = Annotated[str, typer.Argument(help="detector, encoder or head.")]
ROLLBACK_TIMEOUT_S = 10.0
LONGEST = 40
"""Characters of one word in a cell."""


@app.command("list", epilog=EPILOG)
def list_versions(site: SiteOption, as_json: JsonOption = False) -> None:
    """List every version: which the daemon serves, which is chosen for its next chance, and why others are not."""
    settings = load_site(site)
    rows = [row for model in model_repository.MODELS for row in _rows(settings, model)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    shown = []
    for row in rows:
        style = "green" if row["serves"] else "red" if row["withdrawn"] or row["refused"] else ""
        cells = (row["version"], row["state"], row["created_utc"], len(row["labels"]) or "")
        shown.append([row["model"], *(printable(str(cell), style) for cell in cells)])
    show_table(("model", "version", "state", "made", "classes"), shown, right=(1, 4))
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
    shown = [
        (
            row["label"],
            ", ".join(map(str, row["heads"])) or "none knows it",
            "" if row["code"] is None else str(row["code"]),
        )
        for row in rows
    ]
    show_table(("label", "heads", "code"), shown, right=(2,))


@app.command(epilog=EPILOG)
def pin(
    site: SiteOption,
    model: ModelArgument,
    version: Annotated[int | None, typer.Argument(help="Version to stay with.", min=1)] = None,
    release: Annotated[bool, typer.Option(help="Let the newest version serve again.")] = False,
    as_json: JsonOption = False,
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
    _show_outcome(settings, model, as_json, pinned=version)


@app.command(epilog=EPILOG)
def rollback(
    site: SiteOption,
    model: Annotated[str, typer.Argument(help="head, encoder or detector.")] = "head",
    reason: Annotated[str, typer.Option(help="Why; stands in the audit log and beside the version.")] = "rolled back",
    as_json: JsonOption = False,
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
    if as_json:
        pass
    elif is_pinned:
        say(f": to {model} {to}; {leaving} is not withdrawn", ("pin moved", "yellow"))
    else:
        say(f": {model} {leaving}: {reason}", ("withdrawn", "yellow"))
    _show_outcome(settings, model, as_json, **{"pinned": to} if is_pinned else {"withdrawn": leaving})


@app.command(epilog=EPILOG)
def diff(site: SiteOption, model: ModelArgument, old: int, new: int, as_json: JsonOption = False) -> None:
    """Say what one version has that another has not: classes, codes, what it was made of; of heads, how they judge.

    Accuracy and purity of a head are those on the golden set of the newer version, by the recipe of the first folder.
    """
    _check_model(model)
    settings = load_site(site)
    repository = settings.models.repository
    changes = choice.difference(*(model_repository.read_meta(repository, model, version) for version in (old, new)))
    figures, why_not = _figures(settings, old, new) if model == "head" else ([], None)
    if as_json:
        typer.echo(json.dumps({**changes, "golden": figures, "not_judged": why_not}))
        return
    rows = [("classes only here", *(", ".join(changes[key]) for key in ("classes_removed", "classes_added")))]
    for name in ("codes", "provenance"):
        rows += [(f"{name}: {key}", *(_short(value) for value in pair)) for key, pair in changes[name].items()]
    show_table(("", f"{model} {old}", f"{model} {new}"), rows)
    if figures:
        say("")
        columns = ("class", "crops", f"accuracy {old}", str(new), f"purity {old}", str(new))
        cells = [
            (row["label"], str(row["crops"]), *map(_percent, (*row["accuracy"], *row["purity"]))) for row in figures
        ]
        show_table(columns, cells, title=f"on the golden set of head {new}", right=(1, 2, 3, 4, 5))
    if why_not:
        say(f" {why_not}", ("accuracy and purity are not known:", "yellow"))
    if not changes["same_encoder"] and model == "head":
        say("the two read features of different encoders" + (", each is judged on its own golden set" * bool(figures)))


def _figures(settings: Site, old: int, new: int) -> tuple[list[dict[str, Any]], str | None]:
    """Accuracy and purity of two heads by class, null where there is no crop to judge by; or why they are not known."""
    rule = load_recipe(settings.folders[0].recipe).unknown
    try:
        before, after = golden.compare(settings.models.repository, old, new, rule)
    except ModelMismatch as error:
        return [], str(error)
    rows = []
    for label in sorted(before.keys() | after.keys()):
        pair = [found.get(label) for found in (before, after)]
        rows.append(
            {
                "label": label,
                "crops": max(one.accuracy.n for one in pair if one),
                "accuracy": [one and one.accuracy.value for one in pair],
                "purity": [one and one.purity.value for one in pair],
            }
        )
    return rows, None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(value: object) -> str:
    """A value for a cell; what no person reads, such as which of 1,200 crops, in its first digits."""
    text = "-" if value is None else str(value)
    return text if len(text) <= LONGEST or " " in text else f"{text[:12]}... ({len(text)} characters)"


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


def _show_outcome(settings: Site, model: str, as_json: bool, **done: int | None) -> None:
    version = choice.choice(settings.models.repository, model)
    runs = serving.daemon_runs(settings.state_dir)
    serves = runs and model != "encoder"
    if serves:
        why_not = serving.await_version(settings.state_dir, model, version, timeout_s=ROLLBACK_TIMEOUT_S)
        if why_not is not None:
            raise ServiceUnavailable(why_not)
    if as_json:
        typer.echo(json.dumps({"model": model, "version": version, "serves": serves, **done}))
        return
    later = " at the daemon's next start; encoders do not change while it runs" if runs else ", once the daemon runs"
    say(f": {model} {version}{'' if serves else later}", ("serves", "green"))
