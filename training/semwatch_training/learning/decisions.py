"""People's decisions about clusters, applied to the crops of the head in service and to waiting unknowns.

Names, merges and rejections change the labels of crops, so they are applied before clustering. The crops of a class
that a person split lose their label and come back as groups of their own. So do unknowns of a cluster that no
head knows yet, once a person has split it or made it part of a class that the head knows.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from semwatch.classes import clusters, observations
from semwatch.classes.clusters import LIVE, Cluster, Clusters, Decision
from semwatch.errors import ConfigError
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch_training.discovery.fit_head import MIN_PER_CLASS
from semwatch_training.learning import candidates
from semwatch_training.learning.base_head import BaseHead
from semwatch_training.learning.candidates import Candidate
from semwatch_training.learning.crops import renamed, unlabelled
from semwatch_training.learning.promotion import Answers

log = logging.getLogger(__name__)

DECISIONS, FORMER_DECISIONS = "decisions", "obeyed"
"""Provenance key of a head: revisions of the decisions that are applied in it. Earlier releases wrote the second."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Records that make one class, or may: found by clustering, or separated by a person."""

    crops: Bank
    """The most typical first; labels are empty."""
    candidate: Candidate
    by_person: bool = False
    """A person asked for it: the recipe's thresholds do not apply."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Record ids."""
        return self.crops.ids


@dataclass(frozen=True, slots=True, eq=False)
class DecidedCrops:
    """Bank and golden set with the decisions applied."""

    bank: Bank
    golden: Bank
    names: Mapping[str, str | None]
    """New label of each class of the head in service; None: a person rejected or split it."""
    parts: tuple[Group, ...]
    """Of classes that were split."""
    rejected: Mapping[str, str]
    """Class by record id, of the crops that were left out."""
    removed: tuple[str, ...]
    """Records that a person took out of their classes; they wait for a class again."""
    revisions: tuple[int, ...]
    """Of the decisions that are applied here."""
    is_changed: bool
    """Whether a head must be fitted anew for it."""
    corrected: Mapping[str, str] = field(default_factory=dict)
    """Label by record id, of unknowns that became crops by a person's correction."""


# --- what people decided ---------------------------------------------------------------------------------------------


def undo_rolled_back(c: Clusters, meta: Meta, withdrawn: Mapping[int, Meta | None], others: Sequence[Meta]) -> Clusters:
    """Undo what only heads did that were taken out of service, see ``observations.rolled_back``.

    A split that was rolled back is not made again: the class that it was made of is there again.

    Args:
        c: the found classes.
        meta: of the head in service.
        withdrawn: heads that were taken out of service, by version; None where their description cannot be read.
        others: descriptions of the heads that were not.
    """
    labels = set(meta.labels)
    ids = [k.id for k in c.clusters if k.head_version in withdrawn and not clusters.names_of(c, k) & labels]
    stay = {revision for other in others for revision in recorded_decisions(other)}
    gone = {revision for other in withdrawn.values() if other is not None for revision in recorded_decisions(other)}
    undone = [d for d in c.decisions if d.kind != "split" and d.applied_utc and d.revision in gone - stay]
    c = observations.rolled_back(c, ids, ()) if ids else c
    # An applied merge has let go of its cluster's name, which a head before it may still know.
    waiting = observations.rolled_back(c, (), [d.revision for d in undone]) if undone else c
    again = [d.revision for d in undone if not _is_applied(waiting, d, meta)]
    return observations.rolled_back(c, ids, again) if again else c


def mark_applied(c: Clusters, meta: Meta, version: int, utc: str) -> Clusters:
    """Mark the clusters that the head in service knows as learned, and the decisions it fulfils as applied.

    A cycle that died after it had published its head has not marked them, nor has one that had nothing to do.
    """
    labels = set(meta.labels)
    known = [k.id for k in c.clusters if k.head_version is None and clusters.names_of(c, k) & labels]
    c = observations.learned(c, known, version, utc) if known else c
    recorded = set(recorded_decisions(meta))
    applied = [d.revision for d in clusters.pending(c) if d.revision in recorded or _is_applied(c, d, meta)]
    return observations.applied(c, applied, utc) if applied else c


def recorded_decisions(meta: Meta) -> list[int]:
    """Revisions of the decisions that a head's provenance records as applied."""
    text = str(meta.provenance.get(DECISIONS, meta.provenance.get(FORMER_DECISIONS, "")))
    return [int(part) for part in text.split(",") if part.strip().isdigit()]


def _is_applied(c: Clusters, d: Decision, meta: Meta) -> bool:
    """Whether this head leaves nothing to do for a decision."""
    k = clusters.find(c, d.cluster)
    undone = None if d.undoes is None else next(e for e in c.decisions if e.revision == d.undoes)
    if d.kind == "name" or (undone is not None and undone.kind == "name"):
        return k.label in meta.labels and k.code in (None, meta.codes.get(k.label))
    if undone is not None:
        if undone.kind != "merge":
            return True  # the cycle that reads this puts back what was rejected
        return bool(clusters.names_of(c, k) & set(meta.labels)) or not _labels_of_target(c, undone) & set(meta.labels)
    if d.kind == "split" or clusters.names_of(c, k) & set(meta.labels):
        return False
    return d.kind in ("reject", "remove") or k.head_version is not None or clusters.label_of(c, k.id) not in meta.labels


def apply_decisions(base: BaseHead, c: Clusters, *, seed: int) -> DecidedCrops:
    """Apply what people decided to the crops that the head in service was fitted on."""
    names = renaming(base.meta.labels, c)
    removed, waits = _removed(base, c)
    kept, kept_golden = (_without(crops, removed) for crops in (base.bank, base.golden))
    bank, golden = (renamed(crops, names) for crops in (kept, kept_golden))
    rejected = {
        id_: label
        for crops in (kept, kept_golden)
        for id_, label in zip(crops.ids, crops.labels, strict=True)
        if id_ and names.get(label, label) is None
    }
    parts: list[Group] = []
    for d in (d for d in clusters.pending(c) if d.kind == "split"):
        label = clusters.label_of(c, d.cluster)
        learned, proof = _of_class(bank, label), _of_class(golden, label)
        found = _parts(head_bank.chosen(bank, learned), head_bank.chosen(golden, proof), d, base.frozen_width, seed)
        if not found:
            waits.add(d.revision)
            continue
        parts += found
        bank, golden = head_bank.chosen(bank, ~learned), head_bank.chosen(golden, ~proof)
        names |= {old: None for old, new in names.items() if new == label}
    revisions = tuple(d.revision for d in clusters.pending(c) if d.revision not in waits)
    is_changed = bool(removed) or any(new != old for old, new in names.items())
    return DecidedCrops(bank, golden, names, tuple(parts), rejected, tuple(sorted(removed)), revisions, is_changed)


def _removed(base: BaseHead, c: Clusters) -> tuple[set[str], set[int]]:
    """Records to take out of bank and golden set, and the decisions that wait: too few crops would be left."""
    label_of = {id_: label for crops in (base.bank, base.golden)
                for id_, label in zip(crops.ids, crops.labels, strict=True) if id_}  # fmt: skip
    n_left, removed, waits = Counter(base.bank.labels), set[str](), set[int]()
    learned = set(base.bank.ids)
    for d, crops, own in _leaving(c):
        gone = {id_ for id_ in crops if label_of.get(id_) in own} - removed
        n_gone = Counter(label_of[id_] for id_ in gone & learned)
        if any(n_left[label] - n < MIN_PER_CLASS for label, n in n_gone.items()):
            log.warning("%d crops stay in %s for now: fewer than %d would be left; reject it or wait for more crops",
                        len(gone), d.cluster, MIN_PER_CLASS)  # fmt: skip
            waits.add(d.revision)
            continue
        n_left -= n_gone
        removed |= gone
    return removed, waits


def _leaving(c: Clusters) -> Iterator[tuple[Decision, set[str], set[str]]]:
    """Decisions that take crops out of a class, with the crops' records and the labels of that class.

    A person took them out, or took back the merge that had brought them there.
    """
    for d in (d for d in clusters.in_force(c) if d.kind == "remove"):
        label = clusters.label_of(c, d.cluster)
        yield d, set(d.crops or ()), clusters.names_of(c, clusters.find(c, d.cluster)) | _given(label)
    undo_of = {d.undoes: d for d in c.decisions if d.kind == "undo"}
    for merge, ids, labels in unmerged(c):
        yield undo_of[merge.revision], ids, labels


def unmerged(c: Clusters) -> Iterator[tuple[Decision, set[str], set[str]]]:
    """Merges that were taken back, with the records of the cluster, and the labels of the class that they are not of.

    Not those that are part of that class all the same, because a person merged them again.
    """
    for d, k in clusters.taken_back(c, "merge"):
        labels = _labels_of_target(c, d) - clusters.names_of(c, k) - _given(clusters.label_of(c, k.id))
        if k.state in LIVE and labels:
            yield d, {id_ for part in clusters.part_of(c, k.id) for id_ in part.members}, labels


def _labels_of_target(c: Clusters, merge: Decision) -> set[str]:
    """Labels under which a head may know what a cluster was merged into."""
    into = str(merge.into)
    target = next((k for k in c.clusters if k.id == into), None)
    return {into} if target is None else clusters.names_of(c, target) | _given(clusters.label_of(c, target.id))


def _given(label: str | None) -> set[str]:
    return set() if label is None else {label}


def _without(crops: Bank, ids: Collection[str]) -> Bank:
    return head_bank.chosen(crops, np.array([id_ not in ids for id_ in crops.ids], np.bool_)) if ids else crops


def ids_grouped_by_person(c: Clusters, labels: Collection[str | None]) -> set[str]:
    """Ids of the unknowns that ``groups_by_person`` makes groups of."""
    return {
        id_ for k in c.clusters if k.head_version is None for id_ in k.members if _is_grouped_by_person(c, k.id, labels)
    }


def ids_that_wait(c: Clusters, labels: Collection[str | None]) -> set[str]:
    """Ids of unknowns that wait however long: people have decided about them, or have to after a rollback."""
    held = {id_ for k in c.clusters if k.on_hold for id_ in k.members}
    back = {
        id_
        for kind in ("merge", "reject")
        for _, k in clusters.taken_back(c, kind)
        if k.state == "proposed"
        for id_ in k.members
    }
    return ids_grouped_by_person(c, labels) | held | back


def groups_by_person(
    c: Clusters, crops: Bank, labels: Collection[str], *, frozen_width: int, seed: int
) -> tuple[list[Group], NDArray[np.bool_], list[int]]:
    """Group unknowns as people decided: clusters that no head knows yet, merged into a known class, split, or brought
    back by a step that was undone.

    Args:
        c: what people decided.
        crops: the unknowns (n).
        labels: classes that the head knows.
        frozen_width: leading features that a split reads.
        seed: of a split.

    Returns:
        Groups; (n,) True where a crop is left to clustering; revisions of the splits that the groups fulfil.
    """
    groups: list[Group] = []
    is_left, revisions = np.ones(len(crops), np.bool_), []
    splits = {d.cluster: d for d in clusters.pending(c) if d.kind == "split"}
    for k in c.clusters:
        members = set(k.members)
        mine = np.array([id_ in members for id_ in crops.ids], np.bool_) & is_left
        if k.head_version is not None or not mine.any() or not _is_grouped_by_person(c, k.id, labels):
            continue
        of_cluster, split = head_bank.chosen(crops, mine), splits.get(k.id)
        if split is None and k.state == "proposed":
            of_before = Candidate(np.flatnonzero(mine), k.cohesion, k.nearest_known, k.nearest_distance, k.looks)
            enough = len(of_cluster) > MIN_PER_CLASS
            found = [Group(of_cluster, of_before, by_person=True)] if enough else []
        elif split is None:
            label = clusters.label_of(c, k.id)
            found = [Group(of_cluster, Candidate(np.flatnonzero(mine), k.cohesion, label, 0.0), by_person=True)]
        else:
            found = _parts(of_cluster, head_bank.empty(crops.features.shape[1]), split, frozen_width, seed)
            revisions += [split.revision] if found else []
        if found:
            groups += found
            is_left &= ~mine
    return groups, is_left, revisions


def _is_grouped_by_person(c: Clusters, id_: str, labels: Collection[str | None]) -> bool:
    k = clusters.find(c, id_)
    to_split = any(d.cluster == id_ and d.kind == "split" for d in clusters.pending(c))
    return to_split or (k.state == "merged" and clusters.label_of(c, id_) in labels) or _comes_back(c, k)


def _comes_back(c: Clusters, k: Cluster) -> bool:
    """Whether a cluster was a class until a person took it out, and was taken back."""
    if k.state != "proposed" or k.on_hold:
        return False
    undone = (d for kind in ("merge", "reject") for d, of in clusters.taken_back(c, kind) if of.id == k.id)
    return any(d.was in ("learned", "named") for d in undone)


def _parts(learned: Bank, proof: Bank, d: Decision, frozen_width: int, seed: int) -> list[Group]:
    """Crops of one cluster in as many groups as a person wants; none, and why is logged, where they are too few.

    A crop that was proof stays proof, so every part needs enough of the others.
    """
    if not len(learned):
        return []
    crops, n = unlabelled(head_bank.joined([learned, proof])), d.parts or 2
    try:
        part_of = candidates.split(crops.features[:, :frozen_width], n, seed=seed)
        smallest = int(np.bincount(part_of[: len(learned)], minlength=n).min())
        if smallest < MIN_PER_CLASS:
            raise ConfigError(f"one part would have {smallest} crops, and a class needs {MIN_PER_CLASS}")
    except ConfigError as error:
        log.warning("%s stays whole for now, though it is to be split: %s", d.cluster, error)
        return []
    parts = [head_bank.chosen(crops, part_of == part) for part in range(n)]
    return [Group(part, Candidate(np.arange(len(part)), 0.0, d.cluster, 0.0), by_person=True) for part in parts]


# --- labels ----------------------------------------------------------------------------------------------------------


def renaming(labels: Sequence[str], c: Clusters) -> dict[str, str | None]:
    """Current label of each of a head's classes; None where people rejected it."""
    now = clusters.successors(c)
    return {label: now.get(label, label) for label in labels}


def renamed_answers(answers: Answers, names: Mapping[str, str | None]) -> Answers:
    """Answers of a head under the new names: classes that became one are one, dropped ones keep theirs."""
    new = [names.get(label) or label for label in answers.labels]
    labels = tuple(dict.fromkeys(new))
    columns = [np.flatnonzero([name == label for name in new]) for label in labels]
    logits = np.stack([logsumexp(answers.logits[:, of], axis=1) for of in columns], axis=1)
    p_values = np.stack([answers.p_values[:, of].max(axis=1) for of in columns], axis=1)
    return Answers(labels, logits.astype(np.float32), p_values.astype(np.float32))


def codes(base: BaseHead, decided_crops: DecidedCrops, c: Clusters) -> dict[str, int]:
    """Fab codes by label: those of the head in service, and those that people gave since."""
    kept = {new: base.meta.codes[old] for old, new in decided_crops.names.items() if new and old in base.meta.codes}
    return kept | {k.label: k.code for k in c.clusters if k.code is not None and k.state in LIVE}


def _of_class(crops: Bank, label: str | None) -> NDArray[np.bool_]:
    return np.array([other == label for other in crops.labels], np.bool_)
