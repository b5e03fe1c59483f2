"""The found classes as daemon and learning share them: the newest state in Redis, and a file that remembers it.

Each side keeps a file of its own, ``clusters.json``, written after Redis has taken a state. Where Redis has lost its
data, or never had the state because an older release left only the file, the file is put there again.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from semwatch.classes import clusters
from semwatch.classes.clusters import FILE, Clusters
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.streams.handoff import Handoff

log = logging.getLogger(__name__)

WAIT_S = 30.0
"""Longest wait for another process that is changing the classes."""
HOLD_S = 60.0
"""After so long a change is taken for dead."""


class ClassRegister:
    """The found classes, and the changes to them.

    Args:
        handoff: where both sides meet; the caller's to close.
        folder: keeps this side's ``clusters.json``.
        owner: name of this process in the lock; the same name after a restart.
        older: folder of the file that both sides shared in an older release; read where ``folder`` has none.

    Every method raises ServiceUnavailable where Redis is away or another process is changing the classes for longer
    than ``WAIT_S``, ConfigError where the state or the file makes no sense.
    """

    def __init__(self, handoff: Handoff, folder: Path, *, owner: str, older: Path | None = None) -> None:
        self._handoff, self._folder, self._owner, self._older = handoff, folder, owner, older

    def read(self) -> Clusters:
        """The newest state; nothing found and nothing decided where there never was one."""
        remembered: Clusters | None
        found = self._handoff.classes()
        if found is None:
            state, remembered = Clusters(), self.remembered()
        else:
            state = clusters.parsed(found, "the state of the found classes in Redis")
            remembered = self._remembered_or_none()
        if remembered is not None and remembered.revision > state.revision:
            log.warning("Redis has revision %d of the found classes, %s has %d: it is put back",
                        state.revision, self._folder / FILE, remembered.revision)  # fmt: skip
            self._handoff.append_classes(remembered.revision, clusters.as_json(remembered), jumps=True)
            state = remembered
        if state != remembered or (state.revision and not (self._folder / FILE).exists()):
            self._remember(state)
        return state

    def _remembered_or_none(self) -> Clusters | None:
        """The state of the file; None where it is damaged, which Redis makes up for."""
        try:
            return self.remembered()
        except ConfigError as error:
            log.warning("written anew, since Redis has the state: %s", error)
            return None

    def remembered(self) -> Clusters:
        """The state that this side's file has, without asking Redis."""
        if self._older is not None and not (self._folder / FILE).exists():
            return clusters.read(self._older)
        return clusters.read(self._folder)

    @contextmanager
    def locked(self, hold_s: float = HOLD_S) -> Iterator[None]:
        """Keep everyone else from changing the classes, for ``hold_s`` at most."""
        with self._handoff.locked(self._owner, wait_s=WAIT_S, hold_s=hold_s):
            yield

    def write(self, state: Clusters) -> None:
        """Make a state the newest one; call it inside ``locked``.

        Raises:
            ConfigError: the state makes no sense.
            ServiceUnavailable: its revision is not the next one: somebody else changed the classes.
        """
        if not self._handoff.append_classes(state.revision, clusters.as_json(state)):
            raise ServiceUnavailable(
                f"somebody else has changed the found classes before revision {state.revision}; try again"
            )
        self._remember(state)

    def change(self, step: Callable[[Clusters], Clusters]) -> Clusters:
        """Read, change and write as one; ``step`` may combine several functions. Returns what was written."""
        with self.locked():
            before = self.read()
            after = step(before).model_copy(update={"revision": before.revision + 1})
            self.write(after)
        return after

    def _remember(self, state: Clusters) -> None:
        """Write this side's file. Redis has the state already, so a disk that refuses is a warning."""
        try:
            clusters.write(self._folder, state)
        except ServiceUnavailable as error:
            log.warning("the found classes are not remembered: %s", error)
