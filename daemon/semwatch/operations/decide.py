"""What a person decides about a found class: a name, a merge, a split, a rejection, crops to take out.

Each decision is on record before it counts: first the audit line, then the shared state of the found classes, then,
where a name can be served at once, the head.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from semwatch.classes import clusters, decisions, observations
from semwatch.classes.clusters import Clusters, Decision, names_of, pending
from semwatch.classes.register import ClassRegister
from semwatch.errors import ConfigError, PublishError
from semwatch.models import choice, model_repository
from semwatch.models.relabel import relabel
from semwatch.service.delivery import connect_handoff
from semwatch.service.learning_side import register_of
from semwatch.settings.recipe import load_recipe
from semwatch.settings.site import Site
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.streams.handoff import Handoff
from semwatch.system.clock import utc_now
from semwatch.system.login import login_name

Step = Callable[[Clusters, str, str], Clusters]
"""A decision: from the state, the login name and the time to the next state."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided, and what follows from it."""

    decision: Decision
    then: str
    """A sentence for people."""
    head_version: int | None = None
    """The head that serves a name already."""
    undone: Decision | None = None
    """What was taken back."""


def name(site: Site, cluster: str, label: str, code: int | None = None) -> Decided:
    """Give a cluster its name and the fab's code; the head in service takes it over at once if it knows the class.

    Raises:
        ConfigError: the label is unfit or taken, the cluster is no more, or the site has no Redis.
        PublishError: the name is kept, but the head could not be published under it.
        ServiceUnavailable: Redis or the disk is away.
    """
    step = naming(site, cluster, label, code)
    with _register(site) as register, register.locked():  # held until the head is out: no cycle publishes old names
        after = _decide(site, register, step)
        version, then = _serve_name(site, register, after)
    k = clusters.find(after, after.decisions[-1].cluster)
    if k.looks > 1:
        then += (
            f"; but its crops look like {k.looks} kinds of defect: see `semwatch clusters show {k.id}`, then split it "
            f"(`semwatch clusters split {k.id}`) or take crops out (`semwatch clusters remove {k.id} CROP`)"
        )
    return Decided(after.decisions[-1], then, version)


def merge(site: Site, cluster: str, into: str) -> Decided:
    """Make a cluster part of another one or of a known class, in the next cycle.

    Raises:
        ConfigError, ServiceUnavailable: as ``name``.
    """
    return _for_next_cycle(site, merging(site, cluster, into), "the next cycle learns the crops of both as one class")


def split(site: Site, cluster: str, parts: int) -> Decided:
    """Make several clusters of one, in the next cycle; the largest part keeps the id.

    Raises:
        ConfigError, ServiceUnavailable: as ``name``.
    """
    return _for_next_cycle(site, splitting(cluster, parts), "the next cycle makes the parts; the largest keeps the id")


def reject(site: Site, cluster: str) -> Decided:
    """Say that a cluster is no class; a head that knows it forgets it in the next cycle.

    Raises:
        ConfigError, ServiceUnavailable: as ``name``.
    """
    return _for_next_cycle(site, rejecting(cluster), "the next cycle leaves its crops out, and no later head knows it")


def remove(site: Site, cluster: str, crops: Sequence[str]) -> Decided:
    """Take crops out of a cluster: in the next cycle they wait for a class again.

    Raises:
        ConfigError, ServiceUnavailable: as ``name``.
    """
    return _for_next_cycle(
        site, removing(cluster, crops), "the next cycle leaves them out, and they wait for another class"
    )


def undo(site: Site, cluster: str | None = None) -> Decided:
    """Take back the last decision about a cluster, or the last of all; a name goes from the head in service at once.

    Raises:
        ConfigError, ServiceUnavailable: as ``name``; there is nothing to undo, or a later step depends on it.
        PublishError: the head could not be published; the step is on record all the same.
    """
    step = undoing(site, cluster)
    with _register(site) as register, register.locked():
        after = _decide(site, register, step)
        taken = after.decisions[-1]
        undone = next(d for d in after.decisions if d.revision == taken.undoes)
        if undone.kind == "name":
            version, then = _serve_name(site, register, after)
            return Decided(taken, then, version, undone)
    then = "it had no effect yet, and has none"
    if taken.applied_utc is None:
        then = "the next cycle lets its crops wait for a class again"
    return Decided(taken, then, None, undone)


# --- steps -----------------------------------------------------------------------------------------------------------


def naming(site: Site, cluster: str, label: str, code: int | None = None) -> Step:
    """The step of ``name``."""
    known = labels_in_service(site)
    return lambda c, by, utc: decisions.named(c, cluster, label, code, classes=known, by=by, utc=utc)


def merging(site: Site, cluster: str, into: str) -> Step:
    """The step of ``merge``."""
    known = labels_in_service(site)
    return lambda c, by, utc: decisions.merged(c, cluster, into, classes=known, by=by, utc=utc)


def splitting(cluster: str, parts: int) -> Step:
    """The step of ``split``."""
    return lambda c, by, utc: decisions.split(c, cluster, parts, by=by, utc=utc)


def rejecting(cluster: str) -> Step:
    """The step of ``reject``."""
    return lambda c, by, utc: decisions.rejected(c, cluster, by=by, utc=utc)


def removing(cluster: str, crops: Sequence[str]) -> Step:
    """The step of ``remove``."""
    return lambda c, by, utc: decisions.removed(c, cluster, crops, by=by, utc=utc)


def undoing(site: Site, cluster: str | None) -> Step:
    """The step of ``undo``."""
    known = labels_in_service(site)
    return lambda c, by, utc: decisions.undone(c, cluster, classes=known, by=by, utc=utc)


# --- questions -------------------------------------------------------------------------------------------------------


def found_classes(site: Site) -> Clusters:
    """The found classes, and what people decided about them.

    Raises:
        ConfigError: the site has no Redis, or the state makes no sense.
        ServiceUnavailable: Redis is away.
    """
    with _register(site) as register:
        return register.read()


def conflicts(site: Site) -> tuple[str, ...]:
    """Defects whose corrections contradict each other, as the newest cycle found them.

    Raises:
        ConfigError, ServiceUnavailable: as ``found_classes``.
    """
    with handoff_of(site) as handoff:
        last = handoff.last_cycle()
    return () if last is None else last.conflicts


def handoff_of(site: Site) -> Handoff:
    """Where the site meets learning.

    Raises:
        ConfigError: the site has no Redis.
    """
    handoff = connect_handoff(site)
    if handoff is None:
        raise ConfigError("the site has no redis section: found classes are shared there; add one to learn")
    return handoff


@contextmanager
def _register(site: Site) -> Iterator[ClassRegister]:
    with handoff_of(site) as handoff:
        yield register_of(site, handoff, f"decide-{socket.gethostname()}-{os.getpid()}")


def _for_next_cycle(site: Site, step: Step, then: str) -> Decided:
    with _register(site) as register, register.locked():
        return Decided(_decide(site, register, step).decisions[-1], then)


def _decide(site: Site, register: ClassRegister, step: Step) -> Clusters:
    """Write the audit line, then the state; a refused decision leaves neither."""
    after = step(register.read(), login_name(), utc_now())
    stated = after.decisions[-1].model_dump(exclude={"applied_utc"}, exclude_none=True)
    with Ledger(site.state_dir / LEDGER, exclusive=False) as ledger:
        ledger.note(audit={"event": "cluster", **stated})
    register.write(after)
    return after


def _serve_name(site: Site, register: ClassRegister, after: Clusters) -> tuple[int | None, str]:
    """Publish the head in service under the new name, if it knows the class; its version, and what happens next."""
    decision = after.decisions[-1]
    k = clusters.find(after, decision.cluster)
    if k.state == "proposed":
        then = "it gets this name in the cycle that learns it" if decision.kind == "name" else "nothing else is changed"
        return None, f"no head knows it yet: {then}"
    repository = site.models.repository
    pinned = choice.pin_of(repository, "head")
    if pinned is not None:
        return None, (
            f"head {pinned} is pinned and goes on as it is; the next head has the name, or release the pin "
            f"(`semwatch models pin head --release`) and give the name again"
        )
    try:
        names = dict.fromkeys(names_of(after, k), k.label)
        codes = {} if k.code is None and decision.kind == "name" else {k.label: k.code}
        version = relabel(repository, names, codes, utc=decision.utc)
    except PublishError as error:
        raise PublishError(f"{error}; the name is kept: mend this and give it again, or wait for a cycle") from error
    serves = version or choice.choice(repository, "head")
    if k.label not in model_repository.read_meta(repository, "head", serves).labels:
        return None, f"head {serves} does not know this class; the next head that does has the name"
    # Earlier names too: one that met a full disk or a pin is settled by this one.
    settled = [d.revision for d in pending(after) if d.kind == "name" and d.cluster == k.id]
    settled += [decision.revision] if decision.kind == "undo" else []
    done = observations.applied(after, settled, decision.utc)
    register.write(done.model_copy(update={"revision": after.revision + 1}))
    return serves, f"takes effect now: head {serves} serves the name{_but_pins(site, serves)}"


def _but_pins(site: Site, version: int) -> str:
    pins = {folder.recipe.name: load_recipe(folder.recipe).pins.head for folder in site.folders}
    return "".join(
        f"; but {recipe} pins head {pin}: change pins.head there"
        for recipe, pin in pins.items()
        if pin not in (None, version)
    )


def labels_in_service(site: Site) -> tuple[str, ...]:
    """Classes of the head that is chosen to serve.

    Raises:
        ModelMismatch: there is none.
    """
    repository = site.models.repository
    return model_repository.read_meta(repository, "head", choice.choice(repository, "head")).labels
