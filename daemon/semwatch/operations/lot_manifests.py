"""What the KLARFs of a lot expect, what has come of it, and what was written back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from semwatch.settings.site import Site
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.manifests import FileState, Manifest
from semwatch.system.text import utf8 as printable


@dataclass(frozen=True, slots=True)
class Expected:
    """One KLARF of a lot."""

    klarf: str
    """Path, relative to the drop folder."""
    lot_id: str | None
    step_id: str | None
    wafers: tuple[str, ...]
    """Their ids as the file has them, each with its slot."""
    defects: int
    images: int
    """Files that it names to be judged."""
    arrived: int
    reviewed: int
    refused: int
    waiting: int
    missing: tuple[str, ...]
    """Files that have not come."""
    late: tuple[str, ...]
    """Files that came after the deadline."""
    taken_utc: str
    due_utc: str
    done_utc: str | None
    """When every defect had a verdict or a reason; None: not yet."""
    verdicts: int | None
    """Defects with one, as the newest revision says; None where there is none."""
    revisions: tuple[str, ...]
    """What each says of itself: number, time, why."""
    written: tuple[str, ...]
    """Files of the newest revision."""
    is_delivered: bool
    """They lie in their place."""


def of_lot(site: Site, base: str) -> list[Expected]:
    """The KLARFs that were taken in a lot's folder, or below it, by path."""
    source, _, below = base.partition("/")
    path = site.state_dir / LEDGER
    if not path.exists():
        return []
    with Ledger(path, read_only=True) as ledger:
        if not ledger.manifests.is_there:
            return []
        return [
            _expected(ledger, manifest)
            for manifest in ledger.manifests.all_of(source)
            if not below or printable(manifest.path).startswith(f"{below}/")
        ]


def folders_of_lot_id(site: Site, lot_id: str) -> set[str]:
    """Source and folder of the KLARFs of a lot by the name that they give it."""
    path = site.state_dir / LEDGER
    if not path.exists():
        return set()
    with Ledger(path, read_only=True) as ledger:
        if not ledger.manifests.is_there:
            return set()
        return {
            f"{folder.source}/{printable(manifest.path).rpartition('/')[0]}".rstrip("/")
            for folder in site.folders
            for manifest in ledger.manifests.all_of(folder.source)
            if manifest.about.get("lot_id") == lot_id
        }


def surplus(site: Site, base: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Which of a lot's images no KLARF names; none where the lot has no KLARF.

    Args:
        site: where the lot is.
        base: its source and folder.
        paths: of its images.
    """
    source = base.partition("/")[0]
    with Ledger(site.state_dir / LEDGER, read_only=True) as ledger:
        known = ledger.manifests
        return tuple(path for path in paths if not (known.naming(source, path) or known.of(source, path)))


def _expected(ledger: Ledger, manifest: Manifest) -> Expected:
    states = [one for one in ledger.manifests.files(manifest) if one.file.pages]
    revisions = ledger.manifests.revisions(manifest.id)
    newest = revisions[-1] if revisions else None
    arrived = [one for one in states if one.path is not None]
    return Expected(
        klarf=printable(manifest.path),
        lot_id=manifest.about.get("lot_id"),
        step_id=manifest.about.get("step_id"),
        wafers=tuple(_wafers(manifest)),
        defects=manifest.n_defects,
        images=len(states),
        arrived=len(arrived),
        reviewed=_count(arrived, "DONE"),
        refused=_count(arrived, "QUARANTINED"),
        waiting=_count(arrived, "SEEN") + _count(arrived, "CLAIMED"),
        missing=tuple(sorted(one.file.name for one in states if one.path is None)),
        late=tuple(sorted(one.file.name for one in states if (one.first_seen_utc or "") >= manifest.due_utc)),
        taken_utc=manifest.taken_utc,
        due_utc=manifest.due_utc,
        done_utc=manifest.done_utc,
        verdicts=manifest.counts.get("verdicts"),
        revisions=tuple(f"{one.revision}, {one.utc}: {one.why}" for one in revisions),
        written=() if newest is None else tuple(one.place for one in newest.files),
        is_delivered=newest is not None and newest.delivered_utc is not None,
    )


def _wafers(manifest: Manifest) -> Iterator[str]:
    for wafer in manifest.about.get("wafers", ()):
        slot = "" if wafer["slot"] is None else f" (slot {wafer['slot']})"
        yield f"{wafer['id'] or 'without an id'}{slot}"


def _count(states: Iterable[FileState], state: str) -> int:
    return sum(one.state == state for one in states)
