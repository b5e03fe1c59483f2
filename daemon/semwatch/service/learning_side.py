"""The daemon's end of what it exchanges with learning: what it serves, wishes for an early cycle, published heads.

Everything goes through Redis (``streams.handoff``) or the model repository. A site without Redis has no learning.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from semwatch.classes.register import ClassRegister
from semwatch.errors import ConfigError, ModelMismatch, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.service.drift import Alarm
from semwatch.settings.site import Site
from semwatch.store.ledger import Ledger, OutboxItem
from semwatch.streams.handoff import SERVING_TTL_S, Handoff, Serving, Wish, wish_message
from semwatch.system import files
from semwatch.system.clock import utc_now

log = logging.getLogger(__name__)

RENEW_S = SERVING_TTL_S / 3
EARLY_CYCLE = "early-cycle"
"""File in the state folder that is written anew with each wish: systemd starts a cycle when it changes."""


class Presence:
    """Says in Redis what this daemon serves, at every change and every ``RENEW_S``.

    Args:
        handoff: where learning looks.
        site: name of the site.
    """

    def __init__(self, handoff: Handoff, site: str) -> None:
        self._handoff, self._site = handoff, site
        self._stated: Serving | None = None
        self._next = 0.0

    def renew(self, versions: Mapping[str, int], refused: Mapping[int, str], hashes: Mapping[str, str]) -> None:
        """Say it, where it has changed or is about to run out.

        Raises:
            ServiceUnavailable: Redis is away; call it again.
        """
        now = Serving(
            site=self._site, utc="", versions=dict(versions), refused_heads=dict(refused), hashes=dict(hashes)
        )
        if now == self._stated and time.monotonic() < self._next:
            return
        self._handoff.announce(now.model_copy(update={"utc": utc_now()}))
        self._stated, self._next = now, time.monotonic() + RENEW_S

    def end(self) -> None:
        """Say that the daemon stops; where Redis is away, it runs out by itself."""
        try:
            self._handoff.end_service(self._site)
        except (ServiceUnavailable, ConfigError) as error:
            log.info("not taken back from Redis: %s", error)


def register_of(site: Site, handoff: Handoff, owner: str) -> ClassRegister:
    """The found classes as the daemon's side of a site keeps them; an older site's file is taken over."""
    return ClassRegister(handoff, site.state_dir, owner=owner, older=site.learning_dir)


def wish_for_cycle(site: Site, ledger: Ledger, alarm: Alarm, utc: str) -> None:
    """Ask learning for a cycle before its time; a disk that refuses is a warning, the alarm stands all the same.

    The record waits in the ledger's outbox; the file is for systemd on this machine, which learning does not read.
    """
    if site.redis is None:
        return
    wish = Wish(site=site.name, source=alarm.source, utc=utc, sentence=alarm.sentence)
    try:
        ledger.note(audit=None, outbox=[OutboxItem(*wish_message(wish))])
        trigger(site.state_dir, utc)
    except (OSError, ServiceUnavailable) as error:
        log.warning("the wish to learn early is lost: %s", error)


def trigger(state_dir: Path, utc: str) -> None:
    """Write the file that systemd watches.

    Raises:
        OSError: the disk refused.
    """
    files.write_whole(state_dir / EARLY_CYCLE, f"{utc}\n".encode())


def note_published_heads(ledger: Ledger, repository: Path, serving: int) -> None:
    """Write the audit line of every head that a cycle has published up to the one in service, each once.

    The line follows from the head's own description, so it does not matter which side was away when it was published.

    Raises:
        ServiceUnavailable: the disk under the ledger refused.
    """
    for version in model_repository.versions(repository, "head"):
        if version > serving or choice.why_withdrawn(repository, "head", version) is not None:
            continue
        try:
            made = model_repository.read_meta(repository, "head", version).provenance
        except ModelMismatch:
            continue  # damaged: it serves nobody
        if "cycle" not in made:
            continue
        entry = {
            "event": "head published",
            "utc": made["cycle"],
            "version": version,
            "learned": made.get("learned", ""),
            "decisions": decisions_of(made),
        }
        # Not by its version: the same head under a new name is no second one.
        ledger.note(audit=entry, once=f"head published {made['cycle']} {made.get('parent')}")


def decisions_of(provenance: Mapping[str, object]) -> list[int]:
    """Revisions of the decisions that a head applies; older heads call them obeyed."""
    stated = str(provenance.get("decisions", provenance.get("obeyed", "")))
    return [int(part) for part in stated.split(",") if part.strip().isdigit()]
