"""`semwatch lot` and `reindex`: a lot at a glance, and the index that answers."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from semwatch.cli.options import JsonOption, SiteOption, counted, say, show_table
from semwatch.errors import ConfigError
from semwatch.operations import lots
from semwatch.operations.lot_manifests import Expected
from semwatch.operations.lots import Lot
from semwatch.settings.site import load_site
from semwatch.store import result_index
from semwatch.store.result_index import INDEX, IndexedFile, open_index

MAX_ASIDE = 10
"""Images without a result that are shown; --json has all."""


def lot(
    site: SiteOption,
    name: Annotated[
        str | None, typer.Argument(metavar="[LOT]", help="Its folder; behind its source where several fit.")
    ] = None,
    expect: Annotated[int | None, typer.Option(min=0, help="How many images should come.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a lot at a glance, or list the lots; ends with 1 where the lot is not complete.

    Complete: all that was expected has arrived, and every image is reviewed or has the content of another. Where a
    KLARF was taken it says what is expected, and the lot is done once every defect has a verdict or a reason.
    """
    settings = load_site(site)
    if name is None:
        with open_index(settings.state_dir / INDEX) as index:
            _list(index.overview(), as_json)
        return
    found = lots.show(settings, name, expected=expect)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        for sentence in _sentences(found):
            say(sentence)
    if not found.complete:
        raise typer.Exit(1)


def reindex(site: SiteOption, as_json: JsonOption = False) -> None:
    """Bring the index of the results up to date with the results folder; safe beside a running daemon.

    The index is a cache that `lot` and `quality` read. Where its file is lost or broken, this makes it anew.
    """
    settings = load_site(site)
    if not settings.results_dir.is_dir():
        raise ConfigError(f"there is no results folder at {settings.results_dir}")
    with open_index(settings.state_dir / INDEX) as index:
        changed = sum(n for _, n in result_index.rebuild(index, settings.results_dir))
        counts = index.counts()
    if as_json:
        typer.echo(json.dumps({**counts, "changed": changed}))
        return
    found = ", ".join(counted(counts[f"{what}s"], what) for what in ("lot", "image", "defect"))
    say(f" {found}; read: {counted(changed, 'file')}", ("ok", "green"))


def _list(rows: list[tuple[str, int, int, int, str]], as_json: bool) -> None:
    names = ("lot", "images", "refused", "duplicate", "last_utc")
    if as_json:
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
        return
    cells = [[str(cell) for cell in row] for row in sorted(rows, key=lambda row: row[-1])]
    show_table(("lot", "images", "refused", "duplicates", "last"), cells, right=(1, 2, 3))


def _sentences(found: Lot) -> Iterator[str]:
    yield f"{found.lot}: {'complete' if found.complete else 'not complete'}"
    counts = {
        "reviewed": found.reviewed,
        "refused": found.refused,
        "duplicate": found.duplicate,
        "broken": found.broken,
        "waiting": found.waiting,
    }
    of = "" if found.expected is None else f" of {found.expected} expected"
    yield f"  images    {found.arrived}{of}: " + (", ".join(f"{n} {what}" for what, n in counts.items() if n) or "none")
    if found.first_utc:
        each = "" if found.mean_ms is None else f", {found.mean_ms:.0f} ms an image"
        yield f"  time      {found.first_utc} to {found.last_utc}{each}"
    if len(found.recipes) > 1:
        by = ", ".join(f"{n} by {recipe}" for recipe, n in found.recipes.items())
        yield f"  recipes   {by}: `semwatch rereview` judges all by today's"
    if found.pages:
        yield f"  pages     {', '.join(f'{n} {verdict}' for verdict, n in found.pages.items())}"
    if found.verdicts:
        yield "  defects   " + ", ".join(f"{n} {_verdict(kind, label)}" for kind, label, n in found.verdicts)
    if found.judged or found.missed:
        yield f"  people    {found.judged} judged, {found.corrected} of them corrected; {found.missed} missed"
    worst = [file for file in found.worst if file.n_defects]
    if worst:
        yield "worst:"
        for file in worst:
            score = "" if file.image_score is None else f", score {file.image_score:.3f}"
            yield f"  {file.path}: {counted(file.n_defects, 'defect')}{score}"
    for klarf in found.klarfs:
        yield from _expected(klarf)
    if found.surplus:
        yield f"that no KLARF names: {_named(found.surplus)}"
    if found.aside:
        yield "without a result of their own:"
        for file in found.aside[:MAX_ASIDE]:
            yield f"  {file.path}: {_why(file)}"
        if len(found.aside) > MAX_ASIDE:
            yield f"  and {len(found.aside) - MAX_ASIDE} more (--json has all)"


def _expected(klarf: Expected) -> Iterator[str]:
    step = "" if klarf.step_id is None else f", step {klarf.step_id}"
    wafers = f"{'wafer' if len(klarf.wafers) == 1 else 'wafers'} {_named(klarf.wafers)}"
    yield f"KLARF {klarf.klarf}: lot {klarf.lot_id}{step}, {wafers}, {klarf.defects} defects"
    came = {"reviewed": klarf.reviewed, "refused": klarf.refused, "waiting": klarf.waiting, "late": len(klarf.late)}
    what = ", ".join(f"{n} {word}" for word, n in came.items() if n) or "none"
    yield f"  images    {klarf.arrived} of {klarf.images}: {what}"
    if klarf.missing:
        yield f"  missing   {len(klarf.missing)}: {_named(klarf.missing)}"
    if klarf.late:
        yield f"  late      {_named(klarf.late)}"
    if klarf.done_utc is None:
        yield f"  not done  images that have not come by {klarf.due_utc} are given up"
        return
    yield f"  done      {klarf.done_utc}, {klarf.verdicts} of {klarf.defects} defects with a verdict"
    for revision in klarf.revisions:
        yield f"  revision  {revision}"
    for place in klarf.written:
        yield f"  {'written ' if klarf.is_delivered else 'on its way'}  {place}"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_ASIDE]) + (f" and {len(names) - MAX_ASIDE} more" if len(names) > MAX_ASIDE else "")


def _verdict(kind: str, label: str | None) -> str:
    return kind if label in (None, kind) else f"{label}" if kind == "known" else f"{label} ({kind})"


def _why(file: IndexedFile) -> str:
    if file.outcome == "duplicate":
        return f"the content of {file.original}, whose result counts; `semwatch rereview` judges that one again"
    return f"refused {file.utc}: {file.reason}" if file.outcome == "refused" else "its result cannot be read"
