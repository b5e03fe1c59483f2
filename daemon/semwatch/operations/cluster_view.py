"""What a person looks at before deciding about a found class: crops with captions, hints, what a step will change."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from semwatch.classes import clusters
from semwatch.classes.clusters import LIVE, Cluster, Clusters, Decision
from semwatch.errors import ImageError, SemwatchError, ServiceUnavailable
from semwatch.operations.decide import Step, found_classes, handoff_of
from semwatch.settings.site import Site
from semwatch.store import results
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.result_index import INDEX, open_index
from semwatch.store.review_record import DefectRecord, ReviewRecord
from semwatch.system.clock import utc_now
from semwatch.system.login import login_name
from semwatch.system.text import counted

SHEETS = "clusters"
"""Folder of the pictures of found classes, in the state folder."""
SHEET_COLUMNS, TILE_PX = 4, 220
MIXED = 0.3
"""Share of the crops beyond the most frequent nearest class from which several are named."""


@dataclass(frozen=True, slots=True)
class Crop:
    """One crop of a cluster, and what its result says of it; blank where the result is not here."""

    number: int
    """Place among the examples, from 1 on; 0: no example."""
    id: str
    """Of the record."""
    image: str = ""
    """Source, path, page and defect, as people write them."""
    peak_score: float | None = None
    nearest: str | None = None
    """Nearest known class."""
    probability: float | None = None
    """Of the nearest class, by the head that judged it."""
    p_value: float | None = None
    """Of the nearest class: how usual a crop like this is in it."""
    human: str | None = None
    """A person's label; "not-a-defect" where it is none."""


@dataclass(frozen=True, slots=True)
class Shown:
    """All that helps to judge a cluster."""

    crops: tuple[Crop, ...]
    """Examples, the most typical first."""
    nearest: Mapping[str, int]
    """Members by their nearest class, most frequent first; of those whose result is here."""
    people: Mapping[str, int]
    """Members by the label that a person gave."""
    hints: tuple[str, ...]
    """What may be wrong with it."""
    sheet: Path | None
    """One picture of the examples; None where none are kept, or this user may not write it."""


def look(site: Site, k: Cluster) -> Shown:
    """Look at a cluster: its examples with captions, on one picture, and what its members are near to.

    Raises:
        ConfigError: the site has no Redis.
        ServiceUnavailable: Redis or the ledger is away.
    """
    with handoff_of(site) as handoff:
        pictures = handoff.examples(k.id)
    examples = [id_ for id_ in k.examples if id_ in pictures] or list(k.examples)
    found = _crops(site, [*examples, *(id_ for id_ in k.members if id_ not in set(examples))])
    crops = tuple(replace(found[id_], number=i) for i, id_ in enumerate(k.examples, 1) if id_ in found)
    members = [found[id_] for id_ in k.members if id_ in found]
    nearest = Counter(crop.nearest for crop in members if crop.nearest is not None)
    people = Counter(crop.human for crop in members if crop.human is not None)
    return Shown(
        crops=crops,
        nearest=dict(nearest.most_common()),
        people=dict(people.most_common()),
        hints=tuple(_hints(k, nearest, people)),
        sheet=_sheet(site, k, crops, pictures),
    )


def hints_of(k: Cluster) -> list[str]:
    """What a person should look at before a decision, from the cluster alone."""
    found = []
    if k.on_hold:
        found.append(
            "the head that knew it was rolled back: it is learned again once it is named, merged, split or has lost "
            "its wrong crops; or reject it"
        )
    if k.looks > 1 and k.state in LIVE:
        found.append(
            f"its crops look like {k.looks} kinds of defect: look before you name it; split it or remove crops"
        )
    return found


def _hints(k: Cluster, nearest: Counter[str], people: Counter[str]) -> list[str]:
    found = hints_of(k)
    if nearest and (rest := nearest.total() - nearest.most_common(1)[0][1]) >= MIXED * nearest.total():
        first, second = (f"{label} ({n})" for label, n in nearest.most_common(2))
        found.append(f"{rest} of {nearest.total()} crops are near to another class than the others: {first}, {second}")
    if len(people) > 1:
        given = ", ".join(f"{label} ({n})" for label, n in people.most_common())
        found.append(f"people gave its crops different labels: {given}")
    return found


def caption_of(crop: Crop) -> tuple[str, str]:
    """Two lines below a crop: its number and image, and score and nearest class."""
    image = crop.image.rpartition("/")[2] or crop.id[:12]
    if crop.human is not None:
        return f"{crop.number}  {image}", f"a person: {crop.human}"
    score = [] if crop.peak_score is None else [f"score {crop.peak_score:.2f}"]
    near = [] if crop.nearest is None else [f"near {crop.nearest} {crop.probability or 0:.2f}"]
    return f"{crop.number}  {image}", ", ".join(score + near) or "no result here"


def _sheet(site: Site, k: Cluster, crops: Sequence[Crop], pictures: Mapping[str, bytes]) -> Path | None:
    shown = [crop for crop in crops if crop.id in pictures]
    if not shown:
        return None
    sheet = site.state_dir / SHEETS / f"{k.id}.png"
    try:
        results.contact_sheet(
            [pictures[crop.id] for crop in shown],
            sheet,
            columns=SHEET_COLUMNS,
            tile_px=TILE_PX,
            captions=[caption_of(crop) for crop in shown],
        )
    except ServiceUnavailable:
        return None
    return sheet


def _crops(site: Site, ids: Sequence[str]) -> dict[str, Crop]:
    """What results say of records, by id; of those that the ledger does not know the id alone."""
    path = site.state_dir / LEDGER
    places: Mapping[str, tuple[str, str, int, int]] = {}
    if path.exists():
        with Ledger(path, read_only=True) as ledger:
            places = ledger.places_of(ids)
    found, read = {}, dict[Path, ReviewRecord | None]()
    for id_ in ids:
        if id_ not in places:
            found[id_] = Crop(0, id_)
            continue
        source, image, page, defect_id = places[id_]
        words = f"{source}/{image}" + (f" page {page}" if page else "") + (f" #{defect_id}" if defect_id > 1 else "")
        crop = Crop(0, id_, words)
        if (defect := _defect(site, source, image, page, defect_id, read)) is not None:
            crop = replace(crop, peak_score=defect.peak_score)
            if defect.human is not None:
                crop = replace(crop, human=defect.human.label or "not-a-defect")
            if defect.verdict.nearest:
                near = defect.verdict.nearest[0]
                crop = replace(crop, nearest=near.label, probability=near.probability, p_value=near.p_value)
        found[id_] = crop
    return found


def _defect(
    site: Site, source: str, image: str, page: int, defect_id: int, read: dict[Path, ReviewRecord | None]
) -> DefectRecord | None:
    try:
        path = results.review_path(site.results_dir, source, image, is_printable=True)
        if path not in read:
            read[path] = results.read(path) if path.exists() else None
    except (ImageError, SemwatchError):
        return None
    record = read[path]
    pages = () if record is None else record.pages
    return next((d for p in pages if p.page == page for d in p.defects if d.defect_id == defect_id), None)


# --- what a step will change -----------------------------------------------------------------------------------------


def preview(site: Site, step: Step) -> list[str]:
    """Say what a step will change, without taking it; see ``effect``.

    Raises:
        ConfigError, ServiceUnavailable: as the step itself.
    """
    before = found_classes(site)
    return effect(site, before, step(before, login_name(), utc_now()))


def effect(site: Site, before: Clusters, after: Clusters) -> list[str]:
    """Say what a decision will change, before it does: crops, classes, and results so far.

    Args:
        site: whose results are counted.
        before: the found classes.
        after: the same with the decision as the last one.
    """
    d = after.decisions[-1]
    k = clusters.find(before, d.cluster)
    what = next((e for e in after.decisions if e.revision == d.undoes), d)
    lines = [_sentence(before, after, d, what)]
    names = clusters.names_of(before, k)
    with open_index(site.state_dir / INDEX) as index:
        n = index.n_labelled(sorted(names))
    if n:
        lines.append(f"{counted(n, 'defect')} in the results so far {'is' if n == 1 else 'are'} called {k.label}")
    ledger = site.state_dir / LEDGER
    n_kept = 0
    if ledger.exists():
        with Ledger(ledger, read_only=True) as opened:
            n_kept = len(opened.places_of(k.members))
    if n_kept and d.kind != "split":
        lines.append(f"{n_kept} of its records will be judged again once a head changes")
    if (d.kind, k.looks > 1) == ("name", True):
        lines.append(f"note: its crops look like {k.looks} kinds of defect")
    return lines


def _sentence(before: Clusters, after: Clusters, d: Decision, what: Decision) -> str:
    k, now = clusters.find(before, d.cluster), clusters.find(after, d.cluster)
    crops = counted(k.size, "crop")
    if d.kind == "undo":
        state = f"{now.state}, called {now.label}" if now.label != now.id else now.state
        return f"the {what.kind} of {k.id} by {what.by} ({what.utc}) counts no more: {crops}, {state} again"
    if d.kind == "name":
        code = "" if d.code is None else f", code {d.code}"
        return f"{crops} of {k.id}: the class {k.label} is called {d.label}{code}"
    if d.kind == "merge":
        target = next((one for one in before.clusters if one.id == d.into), None)
        whole = "" if target is None else f" ({target.label}, {counted(target.size, 'crop')})"
        return f"{crops} of {k.id} become crops of {d.into}{whole}; the class {k.label} goes"
    if d.kind == "split":
        return f"{crops} of {k.id} become {d.parts} classes"
    if d.kind == "remove":
        return f"{k.id} loses {counted(len(d.crops or ()), 'crop')} and keeps {now.size}"
    goes = "no head has learned it" if k.head_version is None else f"the class {k.label} goes from the head"
    return f"{crops} of {k.id} are no class, and what looks like them is not proposed again; {goes}"
