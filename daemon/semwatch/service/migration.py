"""What an older release left where the daemon no longer looks, taken over at the next start."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from semwatch.errors import ServiceUnavailable
from semwatch.service import rereview
from semwatch.settings.site import Site
from semwatch.store.ledger import Ledger, OutboxItem
from semwatch.streams import records
from semwatch.streams.handoff import MAX_SENTENCE, Wish, wish_message
from semwatch.streams.records import Record
from semwatch.system.clock import utc_of

log = logging.getLogger(__name__)

ARCHIVE = "unknowns.sqlite"
"""Learning's archive of records: up to ledger layout 2 the daemon read features there."""
TAKEN_OVER = "unknowns of an older release"
WANTED = "retrain.wanted"
"""In the learning folder: a line for each wish to learn early."""


def take_over_unknowns(site: Site, ledger: Ledger) -> None:
    """Put the features of the last ``reread_days`` from learning's archive into the ledger, once.

    Raises:
        ServiceUnavailable: the disk under the ledger refused, or learning is just writing; the next start tries again.
    """
    archive = site.learning_dir / ARCHIVE
    if site.learning.reread_days <= 0 or not archive.is_file() or ledger.was_noted(TAKEN_OVER):
        return
    since = utc_of(datetime.now(UTC) - timedelta(days=site.learning.reread_days))
    found = rereview.features_of(_records(archive, since))
    if ledger.add_unknowns(found, once=TAKEN_OVER) and found:
        log.info("%d unknowns of an older release can be judged again by later heads", len(found))


def take_over_wishes(site: Site, ledger: Ledger) -> None:
    """Hand the wishes of an older release's file to learning, each once, and delete the file.

    Raises:
        ServiceUnavailable: the disk under the ledger refused; the next start tries again.
    """
    path = site.learning_dir / WANTED
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is left where it is: %s", path, error.strerror)
        return
    for line in filter(None, map(str.strip, lines)):
        utc, _, sentence = line.partition(" ")
        wish = Wish(site=site.name, source="", utc=utc, sentence=sentence[:MAX_SENTENCE])
        ledger.note(audit=None, outbox=[OutboxItem(*wish_message(wish))], once=f"wish of an older release: {line}")
    with suppress(OSError):
        path.unlink()


def _records(archive: Path, since_utc: str) -> Iterator[Record]:
    """Records of an archive that can be read; damaged ones are left out."""
    try:
        with closing(sqlite3.connect(f"{archive.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as db:
            rows = db.execute("SELECT id, record FROM unknowns WHERE created_utc >= ?", (since_utc,)).fetchall()
    except sqlite3.OperationalError as error:
        raise ServiceUnavailable(f"{archive} cannot be read now: {error}") from error
    except sqlite3.DatabaseError as error:
        log.warning("%s is not taken over: %s", archive, error)
        return
    for id_, blob in rows:
        try:
            yield records.decode(records.unpack(blob))
        except ValueError as error:
            log.warning("record %s of %s is left out: %s", id_, archive, error)
