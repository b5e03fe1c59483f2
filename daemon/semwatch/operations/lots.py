"""A lot at a glance: what arrived, what became of it, and whether all of it is done.

A lot is a folder of images below a drop folder; one with sub-folders, such as wafers, is shown as a whole.
"""

import difflib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

from semwatch.errors import ConfigError
from semwatch.intake import folder_rules
from semwatch.operations import lot_manifests
from semwatch.operations.lot_manifests import Expected
from semwatch.settings.site import Site
from semwatch.store import result_index
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.result_index import INDEX, IndexedFile, ResultIndex, open_index

N_WORST = 5


@dataclass(frozen=True, slots=True)
class Lot:
    """What is known of one lot."""

    lot: str
    """Source and folder."""
    expected: int | None
    """Images that should come; None where nobody said."""
    arrived: int
    """Images in the drop folder or with a result, references left out."""
    reviewed: int
    refused: int
    duplicate: int
    broken: int
    """Results that cannot be read."""
    waiting: int
    """Images in the drop folder that are neither reviewed nor refused yet."""
    complete: bool
    """All that is expected has arrived, and all that has arrived is reviewed or a duplicate; where KLARFs were taken,
    they are done too."""
    first_utc: str | None
    last_utc: str | None
    pages: dict[str, int]
    """By verdict."""
    verdicts: tuple[tuple[str, str | None, int], ...]
    """Kind and label of the model, and how many defects, most frequent first."""
    judged: int
    """Defects that people have given a verdict on."""
    corrected: int
    """Of these, those that the person called otherwise than the model."""
    missed: int
    """Defects that people say were missed."""
    recipes: dict[str, int]
    """Images by the id of the recipe that judged them."""
    mean_ms: float | None
    """Of a review."""
    worst: tuple[IndexedFile, ...]
    """Images with most defects, and among these with the highest score."""
    klarfs: tuple[Expected, ...]
    """What its KLARFs expect and what was written back; none where none was taken."""
    surplus: tuple[str, ...]
    """Images that no KLARF names, where one was taken."""
    aside: tuple[IndexedFile, ...]
    """Images without a result of their own: refused with the reason, duplicates with their original, broken results."""


def show(site: Site, name: str, *, expected: int | None = None) -> Lot:
    """Look at a lot.

    Args:
        site: where it is.
        name: ``lot7``, or ``source/lot7`` where several sources have one, or the LotID of its KLARF.
        expected: how many images should come.

    Raises:
        ConfigError: there is no such lot, or several; the message names what there is.
        ServiceUnavailable: a disk is away.
    """
    with open_index(site.state_dir / INDEX) as index:
        base = find(site, index, name)
        lots = refreshed(site, index, base)
        count, judged = Counter(index.outcomes(*lots)), index.judged(lots)
        waiting = _waiting(site, base)
        first_utc, last_utc, mean_ms = index.times(*lots)
        arrived = count.total() + waiting
        is_done = arrived > 0 and not waiting and not count["refused"] and not count["broken"]
        klarfs = lot_manifests.of_lot(site, base)
        is_done = is_done and all(one.done_utc and not one.missing for one in klarfs)
        return Lot(
            lot=base,
            expected=expected,
            arrived=arrived,
            reviewed=count["reviewed"],
            refused=count["refused"],
            duplicate=count["duplicate"],
            broken=count["broken"],
            waiting=waiting,
            complete=is_done and (expected is None or arrived >= expected),
            first_utc=first_utc,
            last_utc=last_utc,
            pages=index.page_verdicts(*lots),
            verdicts=tuple(index.defect_counts(*lots)),
            judged=sum(n for *_, n in judged),
            corrected=sum(n for kind, label, human, n in judged if human != _named(kind, label)),
            missed=sum(index.missed(lots).values()),
            recipes=index.recipes(*lots),
            mean_ms=mean_ms,
            klarfs=tuple(klarfs),
            surplus=lot_manifests.surplus(site, base, [file.path for file in index.files(*lots)]) if klarfs else (),
            worst=tuple(index.worst(*lots, limit=N_WORST)),
            aside=tuple(index.aside(*lots)),
        )


def find(site: Site, index: ResultIndex, name: str) -> str:
    """Source and folder of the lot that a person means.

    Raises:
        ConfigError: there is no such lot, or several.
    """
    wanted = name.strip("/")
    known = {*index.lots(), *_drop_folders(site, wanted)}
    bases = _bases(known, wanted)
    if not bases:  # nothing has taken it into the index yet
        known |= set(result_index.all_lots(site.results_dir))
        bases = _bases(known, wanted)
    if wanted in bases:
        return wanted
    bases = bases or lot_manifests.folders_of_lot_id(site, name)
    if len(bases) == 1:
        return bases.pop()
    if bases:
        raise ConfigError(f"several lots are called {name!r}: {', '.join(sorted(bases))}; give the source too")
    lots = sorted({lot.partition("/")[2] or lot for lot in known})
    near = difflib.get_close_matches(wanted, lots, n=3, cutoff=0.5) or lots[-3:]
    raise ConfigError(
        f"there is no lot {name!r}" + (f"; there are, among others, {', '.join(near)}" if near else " yet")
    )


def refreshed(site: Site, index: ResultIndex, base: str) -> list[str]:
    """Bring a lot and the folders below it up to date in the index; return them."""
    below = [f"{base}/{lot}" for lot in result_index.all_lots(site.results_dir / base)]
    lots = [base, *below]
    for lot in lots:
        index.refresh(site.results_dir, lot)
    return lots


def _bases(lots: set[str], wanted: str) -> set[str]:
    """The parts of lots' folders that end in the wanted one."""
    bases = set()
    for lot in lots:
        before, found, _ = f"/{lot}/".partition(f"/{wanted}/")
        if found:
            bases.add(f"{before}/{wanted}".strip("/"))
    return bases


def _drop_folders(site: Site, wanted: str) -> list[str]:
    """Where a folder of that name lies in the drop folders, for lots that have no result yet."""
    of_source = [(folder, wanted.removeprefix(f"{folder.source}/")) for folder in site.folders]
    return [f"{folder.source}/{path}" for folder, path in of_source if path and (folder.path / path).is_dir()]


def _waiting(site: Site, base: str) -> int:
    source, _, under = base.partition("/")
    waiting = 0
    with ExitStack() as held:
        path = site.state_dir / LEDGER
        ledger = held.enter_context(Ledger(path, read_only=True)) if path.exists() else None
        for folder in (folder for folder in site.folders if folder.source == source):
            watched = folder_rules.Folder(**folder.model_dump(exclude={"recipe"}))
            try:
                files = [(path, watched.stamp(status)) for path, status in folder_rules.walk(watched, under)]
            except OSError:
                continue
            waiting += len(files) - (len(ledger.settled(source, files)) if ledger else 0)
    return waiting


def _named(kind: str, label: str | None) -> str | None:
    return None if kind == "defect-free" else label
