"""``semwatch clusters``: see what the machine found, and say what it is."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from semwatch.classes import clusters
from semwatch.classes.clusters import LIVE, Cluster, Clusters, Decision, pending
from semwatch.cli.options import EPILOG, JsonOption, SiteOption, counted, out, say, show_facts, show_table
from semwatch.operations import cluster_view, decide
from semwatch.operations.cluster_view import Crop
from semwatch.operations.decide import Decided, Step
from semwatch.settings.site import Site, load_site

app = typer.Typer(
    no_args_is_help=True, help="Classes found among unknowns: see, name, merge, split, reject, remove crops, undo."
)

YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
ClusterArgument = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it: novel-3, or the name it has.")]


@app.command("list", epilog=EPILOG)
def list_clusters(
    site: SiteOption,
    every: Annotated[bool, typer.Option("--all", help="Rejected and merged ones too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the clusters, and the decisions that wait for the next cycle."""
    found = decide.found_classes(load_site(site))
    shown = [k for k in found.clusters if every or k.state in LIVE]
    if as_json:
        waiting = [d.model_dump() for d in pending(found)]
        conflicts = decide.conflicts(load_site(site))
        typer.echo(
            json.dumps({"clusters": [k.model_dump() for k in shown], "pending": waiting, "conflicts": conflicts})
        )
        return
    if not shown:
        say("no clusters yet: a learning cycle finds them, `semwatch-train retrain --site SITE`")
    else:
        rows = []
        for k in shown:
            name = f"into {k.merged_into}" if k.merged_into else "" if k.label == k.id else k.label
            rows.append((k.id, k.state, name, _text(k.code), str(k.size), f"{k.cohesion:.2f}", k.nearest_known,
                         str(k.cycles), _looks(k)))  # fmt: skip
        columns = ("id", "state", "name", "code", "size", "cohesion", "nearest class", "cycles", "looks")
        show_table(columns, rows, right=(3, 4, 5, 7, 8))
    for k in shown:
        if hint := _hint(k):
            say(f" {hint}", (f"{k.id}:", "yellow"))
    for conflict in decide.conflicts(load_site(site)):
        say(f" {conflict}", ("corrections contradict each other:", "yellow"))
    for i, d in enumerate(pending(found)):
        say(f"  {_in_words(d)}", ("" if i else "waits for the next cycle:\n", "yellow"))


@app.command(epilog=EPILOG)
def show(site: SiteOption, cluster: ClusterArgument, as_json: JsonOption = False) -> None:
    """Show all that is known of one cluster: its example crops with captions, on one picture too, and hints."""
    settings = load_site(site)
    found = decide.found_classes(settings)
    k = clusters.find(found, cluster)
    taken = [d for d in found.decisions if k.id in (d.cluster, d.into)]
    shown = cluster_view.look(settings, k)
    if as_json:
        extra = {"decisions": [d.model_dump() for d in taken], **dataclasses.asdict(shown)}
        extra["sheet"] = None if shown.sheet is None else str(shown.sheet)
        typer.echo(json.dumps({**k.model_dump(), **extra}))
        return
    facts = {**_facts(k, found), "picture": str(shown.sheet or "none kept")}
    if shown.nearest:
        facts["crops are near to"] = ", ".join(f"{label} {n}" for label, n in shown.nearest.items())
    if shown.people:
        facts["people say"] = ", ".join(f"{label} {n}" for label, n in shown.people.items())
    if shown.hints:
        facts["look"] = "\n".join(shown.hints)
    if taken:
        facts["decisions"] = "\n".join(_in_words(d) for d in taken)
    show_facts(facts)
    if shown.crops:
        say("")
        rows = [(str(c.number), c.image or c.id, _score(c.peak_score), _near(c), c.human or "") for c in shown.crops]
        show_table(("crop", "image", "score", "nearest class", "a person says"), rows, right=(0, 2))


@app.command(epilog=EPILOG)
def name(
    site: SiteOption,
    cluster: ClusterArgument,
    label: Annotated[str, typer.Argument(help="What people call this defect.")],
    code: Annotated[
        int | None, typer.Option(help="Class number in the fab's table; else it keeps what it has.")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give a cluster its name, and the fab's code; the head in service takes it over at once if it knows the class."""
    settings = load_site(site)
    _ask(settings, decide.naming(settings, cluster, label, code), yes, as_json)
    decided = decide.name(settings, cluster, label, code)
    _answer(decided, site, as_json, head_version=decided.head_version)


@app.command(epilog=EPILOG)
def merge(
    site: SiteOption,
    cluster: ClusterArgument,
    into: Annotated[str, typer.Argument(help="Another cluster, or the label of a known class.")],
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a cluster part of another one or of a known class, in the next cycle."""
    settings = load_site(site)
    _ask(settings, decide.merging(settings, cluster, into), yes, as_json)
    _answer(decide.merge(settings, cluster, into), site, as_json)


@app.command(epilog=EPILOG)
def split(
    site: SiteOption,
    cluster: ClusterArgument,
    parts: Annotated[int, typer.Option(help="How many to make of it.")] = 2,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make several clusters of one, in the next cycle; the largest part keeps the id."""
    settings = load_site(site)
    _ask(settings, decide.splitting(cluster, parts), yes, as_json)
    _answer(decide.split(settings, cluster, parts), site, as_json)


@app.command(epilog=EPILOG)
def reject(site: SiteOption, cluster: ClusterArgument, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Say that a cluster is no class; a head that knows it forgets it in the next cycle."""
    settings = load_site(site)
    _ask(settings, decide.rejecting(cluster), yes, as_json)
    _answer(decide.reject(settings, cluster), site, as_json)


@app.command(epilog=EPILOG)
def remove(
    site: SiteOption,
    cluster: ClusterArgument,
    crops: Annotated[
        list[str], typer.Argument(metavar="CROP...", help="Numbers of crops as `show` lists them, or record ids.")
    ],
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take single crops out of a cluster, in the next cycle; they wait for another class."""
    settings = load_site(site)
    _ask(settings, decide.removing(cluster, crops), yes, as_json)
    _answer(decide.remove(settings, cluster, crops), site, as_json)


@app.command(epilog=EPILOG)
def undo(
    site: SiteOption,
    cluster: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Its last decision; without it the last of all.")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take the last decision back, one step; again, the one before. Refused where a later step depends on it."""
    settings = load_site(site)
    _ask(settings, decide.undoing(settings, cluster), yes, as_json)
    decided = decide.undo(settings, cluster)
    _answer(decided, site, as_json, head_version=decided.head_version)


# --- saying --------------------------------------------------------------------------------------------------------


def _ask(settings: Site, step: Step, yes: bool, as_json: bool) -> None:
    """Show what a step will change, and let the person at a terminal agree."""
    if as_json:
        return
    for line in cluster_view.preview(settings, step):
        say(line)
    if not yes and sys.stdin.isatty() and out.is_terminal:
        typer.confirm("Do it?", default=True, abort=True)


def _answer(decided: Decided, site: Path, as_json: bool, **more: object) -> None:
    decision = decided.decision
    if as_json:
        typer.echo(json.dumps({**decision.model_dump(exclude={"applied_utc"}), "then": decided.then, **more}))
        return
    say(f" {_in_words(decision, decided.undone)}", ("on record:", "green"))
    say(decided.then)
    if decision.applied_utc is None and "name" not in (decision.kind, decided.undone and decided.undone.kind):
        say(f"run `semwatch-train retrain --site {site}`, or wait for its timer")


def _in_words(d: Decision, undone: Decision | None = None) -> str:
    what = {
        "undo": f"the {undone.kind} of {d.cluster} is taken back"
        if undone
        else f"revision {d.undoes}, about {d.cluster}, is taken back",
        "name": f"{d.cluster} is {d.label}" + ("" if d.code is None else f", code {d.code}"),
        "merge": f"{d.cluster} is merged into {d.into}",
        "split": f"{d.cluster} is split into {d.parts}",
        "reject": f"{d.cluster} is rejected",
        "remove": f"{counted(len(d.crops or ()), 'crop')} taken out of {d.cluster}",
    }[d.kind]
    return f"{what} ({d.by}, {d.utc})"


def _facts(k: Cluster, found: Clusters) -> Mapping[str, str]:
    return {
        "id": k.id,
        "state": k.state + (f" into {k.merged_into}" if k.merged_into else ""),
        "name": "none yet" if k.label == k.id else k.label,
        "code": _text(k.code),
        "size": f"{counted(k.size, 'crop')}, {counted(len(k.members), 'record')}",
        "cohesion": f"{k.cohesion:.3f} (mean silhouette, -1 to 1)",
        "nearest class": f"{k.nearest_known}, at distance {k.nearest_distance:.3g}",
        "first seen": k.first_seen_utc,
        "last seen": k.last_seen_utc,
        "seen in": counted(k.cycles, "cycle") + (f", missed in the last {k.missed}" if k.missed else ""),
        "known since": "-" if k.head_version is None else f"head {k.head_version}",
        "waits": ", ".join(d.kind for d in pending(found) if d.cluster == k.id) or "-",
    }


def _looks(k: Cluster) -> str:
    return f"{k.looks}?" if k.looks > 1 else str(k.looks)


def _hint(k: Cluster) -> str:
    """What a person should look at before a decision; nothing where nothing is odd."""
    return "; ".join(cluster_view.hints_of(k))


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _near(crop: Crop) -> str:
    return "" if crop.nearest is None else f"{crop.nearest} {crop.probability:.2f}, p {crop.p_value:.2f}"


def _text(value: int | None) -> str:
    return "-" if value is None else str(value)
