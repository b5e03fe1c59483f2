"""``semwatch clusters``: see what the machine found, and say what it is.

Each decision is on record before it counts: first the audit line, then the file, then, where a name can be served at
once, the head.
"""

import json
import os
import pwd
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from semwatch.classes import clusters, decisions, sightings
from semwatch.classes.clusters import LIVE, Cluster, Clusters, Decision, names_of, pending
from semwatch.cli.options import EPILOG, JsonOption, SiteOption, out, printable, say, table
from semwatch.errors import PublishError, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.models.relabel import relabel
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import Site, load_site
from semwatch.store import results
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.system.clock import utc_now

app = typer.Typer(no_args_is_help=True, help="Classes found among unknowns: see, name, merge, split, reject.")

ClusterArgument = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it: novel-3, or the name it has.")]
SHEET = "sheet.png"
SHEET_COLUMNS, TILE_PX = 6, 160


@app.command("list", epilog=EPILOG)
def list_clusters(
    site: SiteOption,
    every: Annotated[bool, typer.Option("--all", help="Rejected and merged ones too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the clusters, and the decisions that wait for the next cycle."""
    found = clusters.read(load_site(site).learning_dir)
    shown = [k for k in found.clusters if every or k.state in LIVE]
    if as_json:
        waiting = [d.model_dump() for d in pending(found)]
        typer.echo(json.dumps({"clusters": [k.model_dump() for k in shown], "pending": waiting}))
        return
    if not shown:
        say("no clusters yet: a learning cycle finds them, `semwatch-train retrain --site SITE`")
    else:
        rows = table("id", "state", "name", "code", "size", "cohesion", "nearest class", "cycles", padding=(0, 0))
        for k in shown:
            name = f"into {k.merged_into}" if k.merged_into else "" if k.label == k.id else k.label
            rows.add_row(*map(printable, (k.id, k.state, name, _text(k.code), str(k.size), f"{k.cohesion:.2f}",
                                          k.nearest_known, str(k.cycles))))  # fmt: skip
        out.print(rows)
    for i, d in enumerate(pending(found)):
        say(f"  {_in_words(d)}", ("" if i else "waits for the next cycle:\n", "yellow"))


@app.command(epilog=EPILOG)
def show(site: SiteOption, cluster: ClusterArgument, as_json: JsonOption = False) -> None:
    """Show all that is known of one cluster, with its example crops on one picture."""
    folder = load_site(site).learning_dir
    found = clusters.read(folder)
    k = clusters.find(found, cluster)
    said = [d for d in found.decisions if k.id in (d.cluster, d.into)]
    sheet = _contact_sheet(folder, k)
    if as_json:
        extra = {"sheet": sheet, "decisions": [d.model_dump() for d in said]}
        typer.echo(json.dumps({**k.model_dump(), **extra}))
        return
    rows = table("", "", show_header=False, box=None)
    for key, value in _facts(k, found).items():
        rows.add_row(key, printable(value))
    rows.add_row("examples", printable(sheet or "none kept"))
    for d in said:
        rows.add_row("decision", printable(_in_words(d)))
    out.print(rows)


@app.command(epilog=EPILOG)
def name(
    site: SiteOption,
    cluster: ClusterArgument,
    label: Annotated[str, typer.Argument(help="What people call this defect.")],
    code: Annotated[
        int | None, typer.Option(help="Class number in the fab's table; else it keeps what it has.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Give a cluster its name, and the fab's code; the head in service takes it over at once if it knows the class."""
    settings = load_site(site)
    known = _labels_in_service(settings)

    def decide(c: Clusters, by: str, utc: str) -> Clusters:
        return decisions.named(c, cluster, label, code, classes=known, by=by, utc=utc)

    with clusters.locked(settings.learning_dir):  # held until the head is out: no cycle publishes old names between
        after = _decided(settings, decide)
        version, then = _serve_name(settings, after)
    _answer(after.decisions[-1], then, site, as_json, head_version=version)


@app.command(epilog=EPILOG)
def merge(
    site: SiteOption,
    cluster: ClusterArgument,
    into: Annotated[str, typer.Argument(help="Another cluster, or the label of a known class.")],
    as_json: JsonOption = False,
) -> None:
    """Make a cluster part of another one or of a known class, in the next cycle."""
    settings = load_site(site)
    known = _labels_in_service(settings)
    _decide_and_answer(
        settings, site, lambda c, by, utc: decisions.merged(c, cluster, into, classes=known, by=by, utc=utc), as_json
    )


@app.command(epilog=EPILOG)
def split(
    site: SiteOption,
    cluster: ClusterArgument,
    parts: Annotated[int, typer.Option(help="How many to make of it.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Make several clusters of one, in the next cycle; the largest part keeps the id."""
    settings = load_site(site)
    _decide_and_answer(settings, site, lambda c, by, utc: decisions.split(c, cluster, parts, by=by, utc=utc), as_json)


@app.command(epilog=EPILOG)
def reject(site: SiteOption, cluster: ClusterArgument, as_json: JsonOption = False) -> None:
    """Say that a cluster is no class; a head that knows it forgets it in the next cycle."""
    settings = load_site(site)
    _decide_and_answer(settings, site, lambda c, by, utc: decisions.rejected(c, cluster, by=by, utc=utc), as_json)


# --- deciding ------------------------------------------------------------------------------------------------------

Decide = Callable[[Clusters, str, str], Clusters]
"""Of the file, the login name and now."""


def _decide_and_answer(settings: Site, site: Path, decide: Decide, as_json: bool) -> None:
    with clusters.locked(settings.learning_dir):
        after = _decided(settings, decide)
    decision = after.decisions[-1]
    then = {
        "merge": "the next cycle learns the crops of both as one class",
        "split": "the next cycle makes the parts; the largest keeps the id",
        "reject": "the next cycle leaves its crops out, and no later head knows it",
    }[decision.kind]
    _answer(decision, then, site, as_json)


def _decided(settings: Site, decide: Decide) -> Clusters:
    """Write the audit line, then the file; a refused decision leaves neither."""
    after = decide(clusters.read(settings.learning_dir), login_name(), utc_now())
    said = after.decisions[-1].model_dump(exclude={"applied_utc"}, exclude_none=True)
    with Ledger(settings.state_dir / LEDGER, exclusive=False) as ledger:
        ledger.note(audit={"event": "cluster", **said})
    clusters.write(settings.learning_dir, after)
    return after


def _serve_name(settings: Site, after: Clusters) -> tuple[int | None, str]:
    """Publish the head in service under the new name, if it knows the class; its version, and what happens next."""
    decision = after.decisions[-1]
    k = clusters.find(after, decision.cluster)
    if k.state == "proposed":
        return None, "no head knows it yet: it gets this name in the cycle that learns it"
    repository = settings.models.repository
    pinned = choice.pin_of(repository, "head")
    if pinned is not None:
        return None, (
            f"head {pinned} is pinned and goes on as it is; the next head has the name, or release the pin "
            f"(`semwatch models pin head --release`) and give the name again"
        )
    try:
        names = dict.fromkeys(names_of(after, k), k.label)
        codes = {} if k.code is None else {k.label: k.code}
        version = relabel(repository, names, codes, utc=decision.utc)
    except PublishError as error:
        raise PublishError(f"{error}; the name is kept: mend this and give it again, or wait for a cycle") from error
    serves = version or choice.choice(repository, "head")
    if k.label not in model_repository.read_meta(repository, "head", serves).labels:
        return None, f"head {serves} does not know this class; the next head that does has the name"
    # Earlier names too: one that met a full disk or a pin is settled by this one.
    settled = [d.revision for d in pending(after) if d.kind == "name" and d.cluster == k.id]
    done = sightings.applied(after, settled, decision.utc)
    clusters.write(settings.learning_dir, done.model_copy(update={"revision": after.revision + 1}))
    return serves, f"takes effect now: head {serves} serves the name{_but_pins(settings, serves)}"


def _but_pins(settings: Site, version: int) -> str:
    pins = {folder.recipe.name: load_recipe(folder.recipe).pins.head for folder in settings.folders}
    return "".join(
        f"; but {recipe} pins head {pin}: change pins.head there"
        for recipe, pin in pins.items()
        if pin not in (None, version)
    )


def _labels_in_service(settings: Site) -> tuple[str, ...]:
    repository = settings.models.repository
    return model_repository.read_meta(repository, "head", choice.choice(repository, "head")).labels


def login_name() -> str:
    """Who is at the terminal, also behind sudo; without a login session, whose process this is."""
    try:
        return os.getlogin()
    except OSError:
        pass
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


# --- saying --------------------------------------------------------------------------------------------------------


def _answer(decision: Decision, then: str, site: Path, as_json: bool, **more: object) -> None:
    if as_json:
        typer.echo(json.dumps({**decision.model_dump(exclude={"applied_utc"}), "then": then, **more}))
        return
    say(f" {_in_words(decision)}", ("on record:", "green"))
    say(then)
    if decision.kind != "name":
        say(f"run `semwatch-train retrain --site {site}`, or wait for its timer")


def _in_words(d: Decision) -> str:
    what = {
        "name": f"{d.cluster} is {d.label}" + ("" if d.code is None else f", code {d.code}"),
        "merge": f"{d.cluster} is merged into {d.into}",
        "split": f"{d.cluster} is split into {d.parts}",
        "reject": f"{d.cluster} is rejected",
    }[d.kind]
    return f"{what} ({d.by}, {d.utc})"


def _facts(k: Cluster, found: Clusters) -> Mapping[str, str]:
    return {
        "id": k.id,
        "state": k.state + (f" into {k.merged_into}" if k.merged_into else ""),
        "name": "none yet" if k.label == k.id else k.label,
        "code": _text(k.code),
        "size": f"{k.size} crops, {len(k.members)} records",
        "cohesion": f"{k.cohesion:.3f} (mean silhouette, -1 to 1)",
        "nearest class": f"{k.nearest_known}, at distance {k.nearest_distance:.3g}",
        "first seen": k.first_seen_utc,
        "last seen": k.last_seen_utc,
        "seen in": f"{k.cycles} cycle{'s' if k.cycles > 1 else ''}"
        + (f", missed in the last {k.missed}" if k.missed else ""),
        "known since": "-" if k.head_version is None else f"head {k.head_version}",
        "waits": ", ".join(d.kind for d in pending(found) if d.cluster == k.id) or "-",
    }


def _contact_sheet(folder: Path, k: Cluster) -> str | None:
    """Path of a picture of the examples; None where there are none, or this user may not write beside them."""
    examples = [folder / example for example in k.examples if (folder / example).is_file()]
    if not examples:
        return None
    sheet = examples[0].with_name(SHEET)
    try:
        results.contact_sheet(examples, sheet, columns=SHEET_COLUMNS, tile_px=TILE_PX)
    except ServiceUnavailable:
        return str(sheet.parent)
    return str(sheet)


def _text(value: int | None) -> str:
    return "-" if value is None else str(value)
