"""Where a cycle begins: the head in service with its bank and golden set, and what people have decided since.

Names, merges and rejections change the labels of crops, so they are obeyed before anything is clustered. The crops of a
class that a person split lose their label and come back as groups of their own. So do unknowns of a cluster that no
head knows yet, once a person has split it or made it part of a class that the head knows.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from semwatch.classes import clusters, sightings
from semwatch.classes.clusters import LIVE, Clusters, Decision
from semwatch.errors import ConfigError
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Meta
from semwatch_training.discovery.fit_head import MIN_PER_CLASS
from semwatch_training.learning import candidates
from semwatch_training.learning.candidates import Candidate
from semwatch_training.learning.promotion import Answers

log = logging.getLogger(__name__)

OBEYED = "obeyed"
"""Provenance of a head: revisions of the decisions that it obeys."""


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """The head in service, and all that travels with it."""

    version: int
    meta: Meta
    bank: Bank
    golden: Bank
    frozen_width: int
    """Leading features that p-values may read; the encoder says."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Records that make one class, or may: found by clustering, or told apart by a person."""

    crops: Bank
    """The most typical first; labels are empty."""
    candidate: Candidate
    by_person: bool = False
    """A person asked for it: the recipe's bars are not asked."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Record ids."""
        return self.crops.ids


@dataclass(frozen=True, slots=True, eq=False)
class Obeyed:
    """Bank and golden set as people want them."""

    bank: Bank
    golden: Bank
    names: Mapping[str, str | None]
    """New label of each class of the head in service; None: a person rejected or split it."""
    parts: tuple[Group, ...]
    """Of classes that were split."""
    rejected: Mapping[str, str]
    """Class by record id, of the crops that were left out."""
    revisions: tuple[int, ...]
    """Of the decisions that are obeyed by this."""
    is_changed: bool
    """Whether a head must be fitted anew for it."""


def standing(repository: Path, models: Embedded) -> Standing:
    """Read what belongs to the head in service.

    Raises:
        ModelMismatch: it brings no bank or no golden set, or a damaged one.
        ConfigError: the encoder does not say how wide its frozen features are.
    """
    version, meta = models.versions()["head"], models.meta("head")
    folder = repository / "head" / str(version)
    frozen_width = models.meta("encoder").provenance.get("frozen_width")
    if not isinstance(frozen_width, int):
        raise ConfigError("the encoder's meta.json names no frozen_width; build the model repository again")
    bank, golden = (head_bank.read(folder / name) for name in (head_bank.BANK, head_bank.GOLDEN))
    return Standing(version, meta, bank, golden, frozen_width)


# --- what people decided ---------------------------------------------------------------------------------------------


def caught_up(c: Clusters, meta: Meta, version: int, utc: str) -> Clusters:
    """Note which clusters the head in service knows and which decisions it obeys, where the file does not say so yet.

    A cycle that died after it had published its head has not said so; nor has anybody where there was nothing to do.
    """
    labels = set(meta.labels)
    known = [k.id for k in c.clusters if k.head_version is None and clusters.names_of(c, k) & labels]
    c = sightings.learned(c, known, version, utc) if known else c
    said = {int(part) for part in str(meta.provenance.get(OBEYED, "")).split(",") if part.strip().isdigit()}
    obeyed = [d.revision for d in clusters.pending(c) if d.revision in said or _is_obeyed(c, d, meta)]
    return sightings.applied(c, obeyed, utc) if obeyed else c


def _is_obeyed(c: Clusters, d: Decision, meta: Meta) -> bool:
    """Whether this head leaves nothing to do for a decision."""
    k = clusters.find(c, d.cluster)
    if d.kind == "name":
        return k.label in meta.labels and k.code in (None, meta.codes.get(k.label))
    if d.kind == "split" or clusters.names_of(c, k) & set(meta.labels):
        return False
    return d.kind == "reject" or k.head_version is not None or clusters.label_of(c, k.id) not in meta.labels


def obey(base: Standing, c: Clusters, *, seed: int) -> Obeyed:
    """Apply what people decided to the crops that the head in service was fitted on."""
    names = renaming(base.meta.labels, c)
    bank, golden = (renamed(crops, names) for crops in (base.bank, base.golden))
    rejected = {
        id_: label
        for crops in (base.bank, base.golden)
        for id_, label in zip(crops.ids, crops.labels, strict=True)
        if id_ and names.get(label, label) is None
    }
    parts: list[Group] = []
    waits: set[int] = set()
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
    is_changed = any(new != old for old, new in names.items())
    return Obeyed(bank, golden, names, tuple(parts), rejected, revisions, is_changed)


def spoken_of(c: Clusters, labels: Collection[str]) -> set[str]:
    """Ids of the unknowns that ``told`` makes groups of."""
    return {id_ for k in c.clusters if k.head_version is None for id_ in k.members if _is_told(c, k.id, labels)}


def told(
    c: Clusters, crops: Bank, labels: Collection[str], *, frozen_width: int, seed: int
) -> tuple[list[Group], NDArray[np.bool_], list[int]]:
    """Make groups of unknowns as people told: of clusters that no head knows yet, merged into a known class or split.

    Args:
        c: what people decided.
        crops: the unknowns (n).
        labels: classes that the head knows.
        frozen_width: leading features that a split reads.
        seed: of a split.

    Returns:
        Groups; (n,) True where a crop is left to clustering; revisions of the splits that are obeyed by the groups.
    """
    groups: list[Group] = []
    is_left, revisions = np.ones(len(crops), np.bool_), []
    splits = {d.cluster: d for d in clusters.pending(c) if d.kind == "split"}
    for k in c.clusters:
        members = set(k.members)
        mine = np.array([id_ in members for id_ in crops.ids], np.bool_) & is_left
        if k.head_version is not None or not mine.any() or not _is_told(c, k.id, labels):
            continue
        of_cluster, split = head_bank.chosen(crops, mine), splits.get(k.id)
        if split is None:
            label = clusters.label_of(c, k.id)
            found = [Group(of_cluster, Candidate(np.flatnonzero(mine), k.cohesion, label, 0.0), by_person=True)]
        else:
            found = _parts(of_cluster, head_bank.empty(crops.features.shape[1]), split, frozen_width, seed)
            revisions += [split.revision] if found else []
        if found:
            groups += found
            is_left &= ~mine
    return groups, is_left, revisions


def _is_told(c: Clusters, id_: str, labels: Collection[str]) -> bool:
    k = clusters.find(c, id_)
    to_split = any(d.cluster == id_ and d.kind == "split" for d in clusters.pending(c))
    return to_split or (k.state == "merged" and clusters.label_of(c, id_) in labels)


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
    """What people call each of a head's classes now; None: they rejected it."""
    now = clusters.successors(c)
    return {label: now.get(label, label) for label in labels}


def renamed_answers(answers: Answers, names: Mapping[str, str | None]) -> Answers:
    """What a head would have said under the new names: classes that became one are one, dropped ones keep theirs."""
    new = [names.get(label) or label for label in answers.labels]
    labels = tuple(dict.fromkeys(new))
    columns = [np.flatnonzero([name == label for name in new]) for label in labels]
    logits = np.stack([logsumexp(answers.logits[:, of], axis=1) for of in columns], axis=1)
    p_values = np.stack([answers.p_values[:, of].max(axis=1) for of in columns], axis=1)
    return Answers(labels, logits.astype(np.float32), p_values.astype(np.float32))


def codes(base: Standing, obeyed: Obeyed, c: Clusters) -> dict[str, int]:
    """Fab codes by label: what the head in service had, and what people said since."""
    kept = {new: base.meta.codes[old] for old, new in obeyed.names.items() if new and old in base.meta.codes}
    return kept | {k.label: k.code for k in c.clusters if k.code is not None and k.state in LIVE}


def renamed(crops: Bank, names: Mapping[str, str | None]) -> Bank:
    """The same crops under new labels, without those whose class was rejected."""
    kept = head_bank.chosen(crops, np.array([names.get(label, label) is not None for label in crops.labels], np.bool_))
    return head_bank.renamed(kept, {old: new for old, new in names.items() if new is not None})


def unlabelled(crops: Bank) -> Bank:
    """The same crops without labels."""
    return labelled(crops, "")


def labelled(crops: Bank, label: str) -> Bank:
    """The same crops, all of one class."""
    return replace(crops, labels=(label,) * len(crops))


def _of_class(crops: Bank, label: str | None) -> NDArray[np.bool_]:
    return np.array([other == label for other in crops.labels], np.bool_)


# --- what is learned, and what proves it -----------------------------------------------------------------------------


def held_out(crops: Bank, *, share: int, at_least: int, was_proof: Collection[str] = ()) -> tuple[Bank, Bank]:
    """Part the crops of a class: what is learned, and one of ``share`` for the golden set.

    Crops of one image stay together, typical and odd ones are drawn alike, and ``at_least`` are left to learn from.
    What was proof before (record ids) stays proof, and then no more is drawn.
    """
    golden = np.array([id_ in was_proof for id_ in crops.ids], np.bool_)
    rows_of: dict[str, list[int]] = {}
    for row, image in enumerate(crops.images):
        rows_of.setdefault(image, []).append(row)
    n_seen, draws = 0, not golden.any()
    for rows in rows_of.values() if draws else ():
        n_seen += len(rows)
        n_golden = int(golden.sum()) + len(rows)
        if n_golden <= min(n_seen // share, len(crops) - at_least):
            golden[rows] = True
    return head_bank.chosen(crops, ~golden), head_bank.chosen(crops, golden)


def capped(bank: Bank, per_class: int, seed: int) -> Bank:
    """A bank with at most so many crops of each class, chosen by chance: none is favoured, old or new."""
    rng = np.random.default_rng(seed)
    labels = np.array(bank.labels, np.str_)
    rows = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in dict.fromkeys(bank.labels)]
    return head_bank.chosen(bank, np.sort(np.concatenate(rows))) if rows else bank


def images_as_numbers(images: Sequence[str]) -> list[int]:
    """A number for each image name, equal for equal names."""
    number = {image: i for i, image in enumerate(dict.fromkeys(images))}
    return [number[image] for image in images]
