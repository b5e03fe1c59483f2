"""Classes that the machine found, and what people decided about them: one state, shared as ``register`` says.

    revision       one more with each change; a decision's own revision is its name
    next_number    of the next cluster; the n of novel-<n> is never given twice
    clusters       see ``Cluster``; its example crops are in Redis, see ``streams.handoff``
    decisions      of people, oldest first; never deleted

A name counts at once. What a merge, a split or a rejection means for the classes, the next cycle learns and then marks
as applied. A decision that is taken back stays, beside the one that undoes it, and counts no more. ``decisions`` holds
the steps of people, ``observations`` those of a cycle.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from semwatch.defects import NOVEL
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.settings.fields import Label
from semwatch.system.files import write_whole

FILE = "clusters.json"

State = Literal["proposed", "learned", "named", "rejected", "merged"]
DecisionKind = Literal["name", "merge", "split", "reject", "remove", "undo"]
_GIVEN: Mapping[DecisionKind, frozenset[str]] = MappingProxyType(
    {
        "name": frozenset({"label"}),
        "merge": frozenset({"into"}),
        "split": frozenset({"parts"}),
        "reject": frozenset(),
        "remove": frozenset({"crops"}),
        "undo": frozenset({"undoes"}),
    }
)
"""What a decision of each kind says beside its cluster."""
LIVE: tuple[State, ...] = ("proposed", "learned", "named")
Id = Annotated[str, Field(pattern=f"^{NOVEL}[1-9][0-9]*$")]
RecordId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Example = Annotated[RecordId, BeforeValidator(lambda value: Path(value).stem if isinstance(value, str) else value)]
"""Older states have the path of a picture, whose name is the record's."""
Utc = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Count = Annotated[int, Field(ge=1)]
OrZero = Annotated[int, Field(ge=0)]


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Cluster(_Kept):
    """One class that was found among unknowns."""

    id: Id
    state: State
    """proposed: no head knows it yet. learned, named: a head does, without or with a person's name. rejected: no class.
    merged: part of another class."""
    label: Label
    """The id until a person names it; a name given to a proposed cluster waits here."""
    code: int | None = None
    size: Count
    """Crops."""
    cohesion: Annotated[float, Field(ge=-1, le=1)]
    """Mean silhouette."""
    nearest_known: str
    nearest_distance: Annotated[float, Field(ge=0)]
    first_seen_utc: Utc
    last_seen_utc: Utc
    cycles: Count
    """In which it was observed."""
    missed: OrZero = 0
    """Cycles in a row, up to now, in which it was not observed."""
    head_version: Count | None = None
    """First head that knows it."""
    members: tuple[RecordId, ...]
    """Of its last observation."""
    examples: tuple[Example, ...] = ()
    """Records whose crops are shown, the most typical first."""
    merged_into: str | None = None
    """Another cluster's id, or the label of a known class."""
    looks: Count = 1
    """How many kinds of defect its crops look like; from 2 on it may want to be split before it is named."""
    on_hold: bool = False
    """Of a proposed cluster: the head that knew it was rolled back, so it is learned again only once a person has
    decided about it."""


class Decision(_Kept):
    """One person's decision about one cluster."""

    revision: Count
    """Of the file, with which it came."""
    utc: Utc
    by: Annotated[str, Field(min_length=1)]
    """Login name."""
    kind: DecisionKind
    cluster: Id
    label: Label | None = None
    code: int | None = None
    into: str | None = None
    parts: Annotated[int, Field(ge=2)] | None = None
    crops: tuple[RecordId, ...] | None = None
    """Records that are no crops of the cluster."""
    undoes: Count | None = None
    """Revision of the decision that counts no more."""
    held: tuple[Id, ...] = ()
    """Clusters that it took from hold."""
    was: State | None = None
    """State of the cluster before it; None in decisions of older releases."""
    applied_utc: Utc | None = None
    """When a head came to service in which it is applied; None: it waits for the next cycle."""


class Clusters(_Kept):
    """The whole file."""

    schema_version: Literal[1] = 1
    revision: OrZero = 0
    next_number: Count = 1
    clusters: tuple[Cluster, ...] = ()
    decisions: tuple[Decision, ...] = ()

    @model_validator(mode="after")
    def _makes_sense(self) -> "Clusters":
        for fault in (*_faulty_ids(self), *map(_fault_of, self.clusters), *_faulty_log(self), *_faulty_merges(self)):
            if fault:
                raise PydanticCustomError("nonsense", "{fault}", {"fault": fault})
        return self


# --- what the file may hold ----------------------------------------------------------------------------------------


def _faulty_ids(c: Clusters) -> Iterator[str]:
    ids = [k.id for k in c.clusters]
    yield from (f"{id_} stands there twice" for id_ in ids if ids.count(id_) > 1)
    holders: dict[str, str] = {}
    for label, id_ in labels_in_use(c):
        if holders.setdefault(label.casefold(), id_) != id_:
            yield f"the label {label!r} is used by {holders[label.casefold()]} and by {id_}"
    newest = max((number_of(id_) for id_ in (*ids, *(d.cluster for d in c.decisions))), default=0)
    if c.next_number <= newest:
        yield f"next_number {c.next_number} is too small: {NOVEL}{newest} was given already"


def _fault_of(k: Cluster) -> str | None:
    has_name = k.label != k.id
    if has_name and k.label.startswith(NOVEL):
        return f"{k.id} has the label {k.label!r}, which is another cluster's id"
    if k.state in ("learned", "named") and has_name != (k.state == "named"):
        return f"{k.id} is {k.state} and has the label {k.label!r}: learned means without a name, named with one"
    if k.state in LIVE and (k.head_version is None) != (k.state == "proposed"):
        return f"{k.id} is {k.state} with head_version {k.head_version}: only a proposed cluster has none"
    if k.on_hold and k.state != "proposed":
        return f"{k.id} is {k.state} and on hold: only a proposed cluster can be"
    if (k.merged_into is not None) != (k.state == "merged"):
        return f"{k.id} is {k.state} with merged_into {k.merged_into!r}"
    return None


def _faulty_merges(c: Clusters) -> Iterator[str]:
    into = {k.id: k.merged_into for k in c.clusters}
    decided = {(d.cluster, d.into) for d in c.decisions if d.kind == "merge"}
    for id_, target in into.items():
        if target is None:
            continue
        if target.startswith(NOVEL) and target not in into:
            yield f"{id_} is merged into {target}, which does not exist"
        if (id_, target) not in decided:
            yield f"{id_} is merged into {target!r}, which nobody decided"
        passed, at = {id_}, into.get(id_)
        while at is not None and at not in passed:
            passed.add(at)
            at = into.get(at)
        if at is not None:
            yield f"{id_} is merged into itself, by way of others"


def _faulty_log(c: Clusters) -> Iterator[str]:
    if any(b <= a for a, b in pairwise((*(d.revision for d in c.decisions), c.revision + 1))):
        yield f"the decisions' revisions do not rise up to the file's own, {c.revision}"
    for d in c.decisions:
        given = {name for name in ("label", "into", "parts", "crops", "undoes") if getattr(d, name) is not None}
        if given != _GIVEN[d.kind]:
            yield f"decision {d.revision} is a {d.kind} with {', '.join(sorted(given)) or 'nothing'}"
    by_revision = {d.revision: d for d in c.decisions}
    for d in (d for d in c.decisions if d.undoes is not None):
        of = by_revision.get(d.undoes or 0)
        if of is None or of.kind == "undo" or (of.cluster, of.revision >= d.revision) != (d.cluster, False):
            yield f"decision {d.revision} undoes {d.undoes}, which is no earlier decision about {d.cluster}"
    undone_twice = [d.undoes for d in c.decisions if d.undoes is not None]
    yield from (f"decision {one} is undone twice" for one in undone_twice if undone_twice.count(one) > 1)


# --- the file, and the state on the wire ---------------------------------------------------------------------------


def read(folder: Path) -> Clusters:
    """Read the file of a folder; nothing found and nothing decided where there is none.

    Raises:
        ConfigError: it cannot be read, or an edit by hand made nonsense of it.
    """
    path = folder / FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Clusters()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check its owner and mode") from error
    return parsed(content, str(path))


def write(folder: Path, state: Clusters) -> None:
    """Write the file whole; makes the folder.

    Raises:
        ServiceUnavailable: the disk refused.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, as_json(state))
    except OSError as error:
        raise ServiceUnavailable(f"cannot write {path}: {error.strerror}; free or mend the disk") from error


def parsed(content: bytes, name: str) -> Clusters:
    """Read what ``as_json`` wrote; ``name`` stands for it in the message.

    Raises:
        ConfigError: it is damaged or makes no sense.
    """
    try:
        return Clusters.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
        raise ConfigError(
            f"{name}: {where.lstrip('.') or 'the file'}: {fault['msg']}; undo the edit: `semwatch clusters` changes "
            f"it so that it stays whole"
        ) from error


def as_json(state: Clusters) -> bytes:
    """A state as file and Redis have it.

    Raises:
        ConfigError: it makes no sense.
    """
    try:
        return f"{Clusters.model_validate(state.model_dump()).model_dump_json(indent=1)}\n".encode()
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(f"the found classes are left as they are: {fault}") from error


# --- questions -----------------------------------------------------------------------------------------------------


def find(c: Clusters, name: str) -> Cluster:
    """The cluster of an id, or of a name that a person gave.

    Raises:
        ConfigError: there is none; with the nearest that there are.
    """
    for k in c.clusters:
        if k.id == name:
            return k
    labels = dict(labels_in_use(c))
    if name in labels:
        return find(c, labels[name])
    raise ConfigError(f"no cluster {name!r}; {nearest(name, [*(k.id for k in c.clusters), *labels])}")


def pending(c: Clusters) -> tuple[Decision, ...]:
    """Decisions that are applied in no head yet, oldest first; of clusters that are gone, merges and rejections."""
    live, undone = {k.id for k in c.clusters if k.state in LIVE}, undone_revisions(c)
    return tuple(
        d
        for d in c.decisions
        if d.applied_utc is None and d.revision not in undone and (d.kind in ("merge", "reject") or d.cluster in live)
    )


def undone_revisions(c: Clusters) -> set[int]:
    """Revisions of decisions that a person took back."""
    return {d.undoes for d in c.decisions if d.undoes is not None}


def in_force(c: Clusters, id_: str | None = None) -> tuple[Decision, ...]:
    """Decisions that were not taken back, of one cluster or of all, oldest first."""
    undone = undone_revisions(c)
    return tuple(
        d for d in c.decisions if d.kind != "undo" and d.revision not in undone and (id_ is None or d.cluster == id_)
    )


def taken_back(c: Clusters, kind: DecisionKind) -> Iterator[tuple[Decision, Cluster]]:
    """Decisions of one kind that were taken back, with their clusters as they are now; of clusters that are there."""
    by_id, undone = {k.id: k for k in c.clusters}, undone_revisions(c)
    return (
        (d, by_id[d.cluster]) for d in c.decisions if d.kind == kind and d.revision in undone and d.cluster in by_id
    )


def part_of(c: Clusters, id_: str) -> list[Cluster]:
    """A cluster and all that was merged into it."""
    return [k for k in c.clusters if isinstance(root := root_of(c, k), Cluster) and root.id == id_]


def label_of(c: Clusters, id_: str) -> str | None:
    """Label under which a cluster's crops are learned, along all merges; None for those of a rejected one.

    Raises:
        ConfigError: there is no such cluster.
    """
    k = root_of(c, find(c, id_))
    if isinstance(k, str):
        return k
    return None if k.state == "rejected" else k.label


def removed_from(c: Clusters, id_: str) -> set[str]:
    """Records that a person took out of a cluster: none of them becomes its crop again."""
    return {crop for d in in_force(c, id_) if d.kind == "remove" for crop in d.crops or ()}


def labels_in_use(c: Clusters) -> Iterator[tuple[str, str]]:
    """Names and their clusters' ids. A rejected or merged cluster keeps its name until a cycle has taken it out."""
    leaving = {d.cluster for d in pending(c)}
    return ((k.label, k.id) for k in c.clusters if k.label != k.id and _may_be_known(k, leaving))


def _may_be_known(k: Cluster, leaving: Collection[str]) -> bool:
    """Whether a head may still know it: it is a class, or no cycle has taken it out yet."""
    return k.state in LIVE or (k.head_version is not None and k.id in leaving)


def names_of(c: Clusters, k: Cluster) -> set[str]:
    """Labels under which a head may know a cluster: its id, its name, earlier names that no other cluster has now."""
    in_use = dict(labels_in_use(c))
    if not _may_be_known(k, {d.cluster for d in pending(c)}):
        return {k.id}
    given = {d.label for d in c.decisions if d.cluster == k.id and d.label is not None}
    return {k.id, k.label} | {label for label in given if in_use.get(label, k.id) == k.id}


def successors(c: Clusters) -> dict[str, str | None]:
    """For every label that an earlier head may know a cluster by, the label it has now; None: it is a class no more."""
    return {name: label_of(c, k.id) for k in c.clusters for name in names_of(c, k)}


def root_of(c: Clusters, k: Cluster) -> Cluster | str:
    """What a cluster is after all merges: a cluster, or the label of a known class."""
    while k.merged_into is not None:
        if not k.merged_into.startswith(NOVEL):
            return k.merged_into
        k = find(c, k.merged_into)
    return k


def replaced(c: Clusters, fresh: Iterable[Cluster]) -> Clusters:
    """The same with some clusters in place of those of their ids."""
    by_id = {k.id: k for k in fresh}
    return c.model_copy(update={"clusters": tuple(by_id.get(k.id, k) for k in c.clusters)})


def nearest(name: str, there_are: Iterable[str]) -> str:
    """Sentence with the names that are nearest to a wrong one."""
    there_are = list(dict.fromkeys(there_are))
    shown = difflib.get_close_matches(name, there_are, n=5) or there_are[:5]
    return f"nearest: {', '.join(shown)}" if shown else "there are none yet: the next cycle may find some"


def number_of(id_: str) -> int:
    """The n of novel-<n>."""
    return int(id_.removeprefix(NOVEL))
