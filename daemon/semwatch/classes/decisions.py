"""People's decisions about a found class: name, merge, split, reject, remove crops; and the way back from each.

Pure functions; each makes a revision.

``name`` is a cluster's id or the name it has; ``classes`` are the labels that the head in service knows; ``by`` is the
login name of the person who decides, ``utc`` when. What makes no sense is refused with what to do instead.
"""

import shlex
from collections.abc import Collection, Mapping
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError

from semwatch.classes.clusters import (
    LIVE,
    Cluster,
    Clusters,
    Decision,
    DecisionKind,
    State,
    find,
    in_force,
    labels_in_use,
    names_of,
    nearest,
    pending,
    replaced,
)
from semwatch.defects import DEFECT_FREE, NOVEL
from semwatch.errors import ConfigError
from semwatch.settings.fields import Label

MIN_LEFT = 5
"""Crops that a class needs: with fewer no head is fitted."""


def named(
    c: Clusters, name: str, label: str, code: int | None = None, *, classes: Collection[str], by: str, utc: str
) -> Clusters:
    """Give a cluster its name and, optionally, the fab's code; without one, the code it has stays.

    Raises:
        ConfigError: the label is unfit or taken, or the cluster is no more.
    """
    k = _live(c, name)
    _check_label(c, k, label, classes)
    state: State = "proposed" if k.state == "proposed" else "named"
    fresh = k.model_copy(update={"label": label, "code": k.code if code is None else code, "state": state})
    return _decided(c, fresh, "name", by, utc, label=label, code=code)


def merged(c: Clusters, name: str, into: str, *, classes: Collection[str], by: str, utc: str) -> Clusters:
    """Make a cluster part of another cluster (its id or name) or of a known class (its label).

    Raises:
        ConfigError: there is no such target, or the merge only makes sense the other way round.
    """
    k = _live(c, name)
    target = _target(c, into, classes)
    if isinstance(target, Cluster):
        _check_direction(k, target)
        c = replaced(c, [target.model_copy(update={"on_hold": False})])
    into = target.id if isinstance(target, Cluster) else target
    gone = k.model_copy(update={"state": "merged", "merged_into": into})
    held = (target.id,) if isinstance(target, Cluster) and target.on_hold else ()
    return _decided(c, gone, "merge", by, utc, into=into, held=held)


def split(c: Clusters, name: str, parts: int, *, by: str, utc: str) -> Clusters:
    """Ask the next cycle to make several clusters of one.

    Raises:
        ConfigError: fewer than two parts, more parts than crops, or it waits to be split already.
    """
    k = _live(c, name)
    if not 2 <= parts <= k.size:
        raise ConfigError(f"{k.id} cannot be split into {parts} parts: give 2 to {k.size}, it has {k.size} crops")
    if any(d.cluster == k.id and d.kind == "split" for d in pending(c)):
        raise ConfigError(f"{k.id} is to be split already; run `semwatch-train retrain` first, then look again")
    return _decided(c, k, "split", by, utc, parts=parts)


def rejected(c: Clusters, name: str, *, by: str, utc: str) -> Clusters:
    """Reject a cluster as no class: its crops are not proposed again, and the next head does not know it.

    Raises:
        ConfigError: there is no such cluster, or it is no more.
    """
    k = _live(c, name)
    return _decided(c, k.model_copy(update={"state": "rejected"}), "reject", by, utc)


def removed(c: Clusters, name: str, crops: Collection[str], *, by: str, utc: str) -> Clusters:
    """Take crops out of a cluster: they wait for a class again, and never become crops of this one.

    Args:
        c: the found classes.
        name: of the cluster.
        crops: record ids, whole or their beginnings, or numbers from 1 on: places among the cluster's examples.
        by: login name.
        utc: when.

    Raises:
        ConfigError: no crop or not one of the cluster's, or too few would be left for a class.
    """
    k = _live(c, name)
    gone = tuple(dict.fromkeys(_crop_of(k, crop) for crop in crops))
    if not gone:
        raise ConfigError(f"name the crops to take out of {k.id}: `semwatch clusters show {k.id}` lists them")
    left = tuple(id_ for id_ in k.members if id_ not in gone)
    size = k.size - len(gone)
    if size < MIN_LEFT:
        raise ConfigError(
            f"{k.id} would be left with {max(size, 0)} crops, and a class needs {MIN_LEFT}: reject it whole, "
            f"`semwatch clusters reject {k.id}`, or take out fewer"
        )
    examples = tuple(id_ for id_ in k.examples if id_ not in gone)
    fresh = k.model_copy(update={"members": left, "examples": examples, "size": size})
    return _decided(c, fresh, "remove", by, utc, crops=gone)


def undone(c: Clusters, name: str | None, *, classes: Collection[str], by: str, utc: str) -> Clusters:
    """Take back the last decision about a cluster, or the last of all: one step; again, the one before.

    A name goes back to the one before, or to the id. What was merged or rejected is a cluster of its own again; crops
    that a head has learned or left out meanwhile wait in the queue with the next cycle. A split goes back only while
    it waits.

    Raises:
        ConfigError: there is nothing to take back, or a later step depends on it.
    """
    wanted = None if name is None else find(c, name).id
    taken = in_force(c, wanted)
    if not taken:
        raise ConfigError("nobody has decided anything" + (f" about {wanted}" if wanted else "") + ": nothing to undo")
    d = taken[-1]
    k = find(c, d.cluster)
    if later := [e for e in in_force(c) if e.revision > d.revision and _depends(e, d)]:
        e = later[-1]
        raise ConfigError(
            f"{e.cluster} was {_PAST[e.kind]} since (revision {e.revision}), and that hangs on this {d.kind}: "
            f"`semwatch clusters undo {e.cluster}` first"
        )
    if d.kind == "split" and d.applied_utc is not None:
        raise ConfigError(f"the parts of {k.id} are classes already; merge those that belong together")
    fresh = _as_before(c, d, k, classes)
    after = replaced(c, fresh)
    held = [other for id_ in d.held if _may_be_held(other := find(after, id_), taken=in_force(c, id_), d=d)]
    after = replaced(after, [other.model_copy(update={"on_hold": True}) for other in held])
    is_served = d.kind == "name" and find(after, k.id).state != "proposed"
    waits = is_served or (d.kind in ("merge", "reject") and d.applied_utc is not None)
    undo = Decision(
        revision=c.revision + 1, utc=utc, by=by, kind="undo", cluster=k.id, undoes=d.revision,
        applied_utc=None if waits else utc,
    )  # fmt: skip
    return after.model_copy(update={"revision": undo.revision, "decisions": (*c.decisions, undo)})


_PAST: Mapping[DecisionKind, str] = MappingProxyType(
    {"name": "named", "merge": "merged", "split": "split", "reject": "rejected", "remove": "rid of crops"}
)


def _depends(e: Decision, d: Decision) -> bool:
    """Whether a later decision has taken along what an earlier one made."""
    return d.kind == "merge" and e.cluster == d.into and e.kind in ("merge", "split", "reject")


def _as_before(c: Clusters, d: Decision, k: Cluster, classes: Collection[str]) -> list[Cluster]:
    """The clusters that a decision changed, as they are without it."""
    if d.kind == "name":
        earlier = [e for e in in_force(c, k.id) if e.kind == "name" and e.revision < d.revision]
        code = next((e.code for e in reversed(earlier) if e.code is not None), None)
        label = earlier[-1].label if earlier and earlier[-1].label else k.id
        return [_alive(c, k.model_copy(update={"label": label, "code": code}), classes)]
    if d.kind == "remove" and d.applied_utc is None:
        back = tuple(id_ for id_ in d.crops or () if id_ not in k.members)
        return [k.model_copy(update={"members": (*k.members, *back), "size": k.size + len(back)})]
    if d.kind not in ("merge", "reject"):
        return []
    fresh = [_alive(c, k.model_copy(update={"merged_into": None}), classes)]
    target = next((other for other in c.clusters if other.id == d.into), None)
    if target is not None and (left := tuple(id_ for id_ in target.members if id_ not in k.members)):
        examples = tuple(id_ for id_ in target.examples if id_ not in k.members)
        size = max(target.size - (len(target.members) - len(left)), 1)
        fresh.append(target.model_copy(update={"members": left, "examples": examples, "size": size}))
    return fresh


def _alive(c: Clusters, k: Cluster, classes: Collection[str]) -> Cluster:
    """A cluster in the state that the head in service gives it: it knows it by one of its names, or nobody does.

    Raises:
        ConfigError: another class has its name meanwhile.
    """
    others = {used.casefold(): id_ for used, id_ in labels_in_use(c) if id_ != k.id}
    if k.label.casefold() in others:
        other = others[k.label.casefold()]
        raise ConfigError(f"{k.id} was called {k.label!r}, which is {other} now: give that one another name first")
    proposed = k.model_copy(update={"state": "proposed", "head_version": None, "missed": 0})
    if k.head_version is None or not names_of(replaced(c, [proposed]), proposed) & set(classes):
        return proposed
    state: State = "learned" if k.label == k.id else "named"
    return k.model_copy(update={"state": state})


def _may_be_held(k: Cluster, *, taken: Collection[Decision], d: Decision) -> bool:
    return k.state == "proposed" and not any(e.revision > d.revision for e in taken)


def _crop_of(k: Cluster, crop: str) -> str:
    """The record that a person means."""
    if crop.isdigit() and 1 <= int(crop) <= len(k.examples):
        return k.examples[int(crop) - 1]
    found = [id_ for id_ in dict.fromkeys((*k.members, *k.examples)) if id_.startswith(crop)] if crop else []
    if len(found) != 1:
        what = "is no crop" if not found else f"begins {len(found)} crops"
        raise ConfigError(
            f"{crop!r} {what} of {k.id}: give a number from 1 to {len(k.examples)} of its examples, or the id of a "
            f"record; `semwatch clusters show {k.id}` lists them"
        )
    return found[0]


def _decided(
    c: Clusters,
    fresh: Cluster,
    kind: DecisionKind,
    by: str,
    utc: str,
    *,
    label: str | None = None,
    code: int | None = None,
    into: str | None = None,
    parts: int | None = None,
    crops: tuple[str, ...] | None = None,
    held: tuple[str, ...] = (),
) -> Clusters:
    decision = Decision(
        revision=c.revision + 1, utc=utc, by=by, kind=kind, cluster=fresh.id,
        label=label, code=code, into=into, parts=parts, crops=crops,
        held=(*((fresh.id,) if fresh.on_hold else ()), *held), was=find(c, fresh.id).state,
    )  # fmt: skip
    decisions = (*c.decisions, decision)
    return replaced(c, [fresh.model_copy(update={"on_hold": False})]).model_copy(
        update={"revision": decision.revision, "decisions": decisions}
    )


def _live(c: Clusters, name: str) -> Cluster:
    k = find(c, name)
    if k.state == "rejected":
        raise ConfigError(
            f"{k.id} was rejected; {nearest('', [other.id for other in c.clusters if other.state in LIVE])}"
        )
    if k.state == "merged":
        raise ConfigError(f"{k.id} was merged into {k.merged_into}; decide about that one")
    return k


def _check_label(c: Clusters, k: Cluster, label: str, classes: Collection[str]) -> None:
    try:
        TypeAdapter(Label).validate_python(label)
    except ValidationError as error:
        raise ConfigError(f"the label {label!r} {error.errors()[0]['msg']}") from error
    if label.startswith(NOVEL):
        raise ConfigError(f"the label {label!r} begins like the machine's own; choose a word of the fab")
    own = names_of(c, k)
    taken = {known.casefold(): known for known in (*classes, DEFECT_FREE) if known not in own}
    taken |= {used.casefold(): id_ for used, id_ in labels_in_use(c) if id_ != k.id}
    if label.casefold() in taken:
        raise ConfigError(
            f"there is a class {label!r} already; if they are the same, merge them: "
            f"`semwatch clusters merge {k.id} {shlex.quote(taken[label.casefold()])}`"
        )


def _target(c: Clusters, into: str, classes: Collection[str]) -> Cluster | str:
    own = {k.id for k in c.clusters} | set(dict(labels_in_use(c)))
    if into in own:
        return _live(c, into)
    known = [label for label in (*classes, DEFECT_FREE) if not label.startswith(NOVEL)]
    if into not in known:
        live = [k.id for k in c.clusters if k.state in LIVE]
        raise ConfigError(f"no cluster or class {into!r} to merge into; {nearest(into, [*live, *known])}")
    return into


def _check_direction(k: Cluster, target: Cluster) -> None:
    if target.id == k.id:
        raise ConfigError(f"{k.id} cannot be merged into itself; name another cluster or a known class")
    other_way = f"merge them the other way round: `semwatch clusters merge {target.id} {k.id}`"
    if target.state == "proposed" and k.state != "proposed":
        raise ConfigError(f"{k.id} is learned and {target.id} is not; {other_way}")
    if target.label == target.id and k.label != k.id and k.state != "proposed":
        raise ConfigError(f"{k.id} has the name {k.label!r} and {target.id} has none; {other_way}")
