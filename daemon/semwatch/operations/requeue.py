"""Another try for files in quarantine, and another review for a whole lot; the daemon takes both up by itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from semwatch.errors import ConfigError
from semwatch.operations import lots
from semwatch.settings.site import Site
from semwatch.store.ledger import Ledger, Work
from semwatch.store.result_index import INDEX, open_index
from semwatch.store.review_record import printable
from semwatch.system.clock import utc_now
from semwatch.system.login import login_name


@dataclass(frozen=True, slots=True)
class Again:
    """What waits for another review."""

    lot: str
    queued: int
    gone: tuple[str, ...]
    """Paths of images whose file is not in the drop folder any more: their results stay as they are."""


def chosen(found: Sequence[Work], wanted: Sequence[str]) -> list[Work]:
    """Pick files in quarantine by what people call them, each once.

    Args:
        found: what is in quarantine.
        wanted: a path, behind its source or not; a file name; a lot (folder); a pattern such as ``lot7/*.tif``; or the
            first digits of a sha256.

    Raises:
        ConfigError: nothing in quarantine fits one of them.
    """
    picked: dict[tuple[str, str], Work] = {}
    for name in wanted:
        fitting = [work for work in found if name and _fits(work, name)]
        if not fitting and name:
            fitting = [work for work in found if work.sha256.startswith(name.lower())]
        if not fitting:
            raise ConfigError(
                f"nothing in quarantine fits {name!r}, neither a name, a lot, a pattern nor the digits of a sha256; "
                "`semwatch quarantine list` shows what is there"
            )
        picked |= {(work.source, work.sha256): work for work in fitting}
    return list(picked.values())


def requeue(ledger: Ledger, works: Sequence[Work]) -> Iterator[Work]:
    """Give files another try; those that are given it, one after the other."""
    for work in works:
        origin = {"event": "requeued", "utc": utc_now(), "by": login_name()}
        audit = {**origin, "source": work.source, "path": work.path, "sha256": work.sha256}
        if ledger.requeue(work.source, work.sha256, audit=audit):
            yield work


def review_again(site: Site, ledger: Ledger, name: str) -> Again:
    """Have a lot judged again under today's recipe and models, as new revisions of its results.

    Raises:
        ConfigError: there is no such lot.
    """
    with open_index(site.state_dir / INDEX) as index:
        lot = lots.find(site, index, name)
    source, _, below = lot.partition("/")
    drops = {folder.source: folder.path for folder in site.folders}
    if source not in drops:
        raise ConfigError(f"no drop folder of the site has the source {source} any more: {lot} cannot be judged again")
    found = ledger.done_below(source, below)
    there = [work for work in found if (drops[source] / work.path).is_file()]
    audit = {"event": "rereview", "utc": utc_now(), "by": login_name(), "lot": lot, "images": len(there)}
    queued = ledger.review_again(there, audit=audit) if there else 0
    kept = {work.sha256 for work in there}
    return Again(lot, queued, tuple(printable(work.path) for work in found if work.sha256 not in kept))


def _fits(work: Work, name: str) -> bool:
    path, whole = work.path, f"{work.source}/{work.path}"
    folder = name.rstrip("/")
    return (
        name in (path, whole)
        or f"/{whole}".endswith(f"/{name}")
        or f"/{folder}/" in f"/{whole}"
        or any(fnmatchcase(text, name) for text in (path, whole, path.rpartition("/")[2]))
    )
