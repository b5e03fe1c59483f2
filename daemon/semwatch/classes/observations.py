"""Found classes as a learning cycle observes them: observed, learned, applied. Pure functions; ids are given here.

None of them raises the revision: a cycle combines them, and ``clusters.change`` makes one revision of it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from semwatch.classes.clusters import Cluster, Clusters, State, find, number_of, pending, replaced, root_of
from semwatch.defects import NOVEL
from semwatch.errors import ConfigError

MIN_OVERLAP = 0.1
"""Jaccard index from which a cluster of this cycle is an earlier one."""
MAX_MISSED = 3
"""Cycles in a row without observation after which a proposed cluster is dropped."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One cluster of this cycle, before it has an identity."""

    members: tuple[str, ...]
    """Record ids."""
    size: int
    cohesion: float
    nearest_known: str
    nearest_distance: float
    examples: tuple[str, ...] = ()
    """Record ids of members to show."""
    looks: int = 1
    """Kinds of defect that it seems to hold."""


def matches(c: Clusters, found: Sequence[Observation]) -> tuple[str | None, ...]:
    """Id of the earlier cluster that each of this cycle's clusters is; None for a new one.

    The pair with the largest Jaccard index first, each cluster once. An index above one half has no rival, so this is
    the optimal assignment wherever clusters held together; where one fell apart, its name stays with the largest piece.
    The index counts records that are in clusters then and now alone: what was settled or came since does not count.
    """
    earlier = {k.id: set(k.members) for k in c.clusters if _may_return(c, k)}
    then = set[str]().union(*earlier.values())
    now = set[str]().union(*(f.members for f in found))
    pairs = []
    for i, f in enumerate(found):
        stayed = then.intersection(f.members)
        for id_, members in earlier.items():
            overlap = len(stayed & members) / max(1, len(stayed | (members & now)))
            if overlap >= MIN_OVERLAP:
                pairs.append((-overlap, number_of(id_), i, id_))
    chosen: dict[int, str] = {}
    for _, _, i, id_ in sorted(pairs):
        if i not in chosen and id_ not in chosen.values():
            chosen[i] = id_
    return tuple(chosen.get(i) for i in range(len(found)))


def _may_return(c: Clusters, k: Cluster) -> bool:
    """Its crops are among those that a cycle clusters: no head knows it, or it is to be split."""
    return k.head_version is None or any(d.cluster == k.id and d.kind == "split" for d in pending(c))


def observe(
    c: Clusters, found: Sequence[Observation], *, utc: str, matched: Sequence[str | None] | None = None
) -> Clusters:
    """Add this cycle's observations: each cluster gets its id.

    An earlier one keeps its id and is one cycle older; what matches nothing gets a new number. What a person merged
    comes back as the cluster it was merged into, what a person rejected stays rejected. A proposed cluster is dropped
    once it was not observed for ``MAX_MISSED`` cycles, unless a person decided anything about it or has to.

    Args:
        c: the found classes.
        found: this cycle's clusters.
        utc: when.
        matched: what ``matches`` said of them; None: it is asked.
    """
    observations: dict[str, list[Observation]] = {}
    new: list[Cluster] = []
    for f, id_ in zip(found, matches(c, found) if matched is None else matched, strict=True):
        if id_ is None:
            new.append(_proposed(f"{NOVEL}{c.next_number + len(new)}", f, utc))
            continue
        observations.setdefault(id_, []).append(f)
        root = root_of(c, find(c, id_))
        if isinstance(root, Cluster) and root.id != id_ and root.state == "proposed":
            observations.setdefault(root.id, []).append(f)
    ids_with_decisions = {name for d in c.decisions for name in (d.cluster, d.into)}
    now = [_observed_again(k, observations[k.id], utc) if k.id in observations else _missed(k) for k in c.clusters]
    stay = [k for k in now if k.state != "proposed" or k.on_hold or k.missed < MAX_MISSED or k.id in ids_with_decisions]
    return c.model_copy(update={"clusters": (*stay, *new), "next_number": c.next_number + len(new)})


def learned(c: Clusters, ids: Collection[str], head_version: int, utc: str) -> Clusters:
    """Mark clusters as learned by a head; names that waited for it are applied.

    One that a person rejected or merged meanwhile stays so, and the decision waits for the next cycle.

    Raises:
        ConfigError: there is no such cluster.
    """
    fresh = []
    for k in (find(c, id_) for id_ in ids):
        now: State = k.state if k.state != "proposed" else "learned" if k.label == k.id else "named"
        version = head_version if k.head_version is None else k.head_version
        fresh.append(k.model_copy(update={"state": now, "head_version": version, "on_hold": False}))
    waited = [d.revision for d in pending(c) if d.kind == "name" and d.cluster in ids]
    return applied(replaced(c, fresh), waited, utc)


def rolled_back(c: Clusters, ids: Collection[str], revisions: Collection[int]) -> Clusters:
    """Undo what heads did that were taken out of service: these clusters are known by no head, these decisions wait.

    A class that nobody has decided about since is put on hold: whoever rolled a head back did not want what it knew.

    Args:
        c: the found classes.
        ids: clusters that only those heads knew.
        revisions: of the decisions that were applied only there.
    """
    decisions = tuple(d.model_copy(update={"applied_utc": None}) if d.revision in revisions else d for d in c.decisions)
    c = c.model_copy(update={"decisions": decisions})
    decided = {name for d in pending(c) for name in (d.cluster, d.into)}
    fresh = []
    for k in (find(c, id_) for id_ in ids):
        state: State = "proposed" if k.state in ("learned", "named") else k.state
        on_hold = state == "proposed" and k.id not in decided
        fresh.append(k.model_copy(update={"state": state, "head_version": None, "on_hold": on_hold, "missed": 0}))
    return replaced(c, fresh)


def applied(c: Clusters, revisions: Collection[int], utc: str) -> Clusters:
    """Mark the decisions of these revisions as applied in a head.

    Raises:
        ConfigError: there is no such decision.
    """
    if missing := sorted(set(revisions) - {d.revision for d in c.decisions}):
        raise ConfigError(f"no decision has the revision {missing[0]}; read the clusters again")
    is_new = [d.revision in revisions and d.applied_utc is None for d in c.decisions]
    decisions = (
        d.model_copy(update={"applied_utc": utc}) if new else d for d, new in zip(c.decisions, is_new, strict=True)
    )
    return c.model_copy(update={"decisions": tuple(decisions)})


def _proposed(id_: str, f: Observation, utc: str) -> Cluster:
    return Cluster(
        id=id_,
        state="proposed",
        label=id_,
        size=f.size,
        cohesion=f.cohesion,
        nearest_known=f.nearest_known,
        nearest_distance=f.nearest_distance,
        first_seen_utc=utc,
        last_seen_utc=utc,
        cycles=1,
        members=f.members,
        examples=f.examples,
        looks=f.looks,
    )


def _observed_again(k: Cluster, observations: Sequence[Observation], utc: str) -> Cluster:
    """Several observations are pieces that a person merged: their cohesion is that of the average crop."""
    size = sum(f.size for f in observations)
    nearest = min(observations, key=lambda f: f.nearest_distance)
    return k.model_copy(
        update={
            "size": size,
            "cohesion": sum(f.size * f.cohesion for f in observations) / size,
            "nearest_known": nearest.nearest_known,
            "nearest_distance": nearest.nearest_distance,
            "last_seen_utc": utc,
            "cycles": k.cycles + 1,
            "missed": 0,
            "members": tuple(dict.fromkeys(id_ for f in observations for id_ in f.members)),
            "examples": tuple(id_ for f in observations for id_ in f.examples),
            "looks": max(f.looks for f in observations),
        }
    )


def _missed(k: Cluster) -> Cluster:
    return k.model_copy(update={"missed": k.missed + 1}) if k.state == "proposed" else k
