"""Where a cycle begins: the head in service with its bank and golden set, and what people have decided since.

Names, merges and rejections change the labels of crops, so they are obeyed before anything is clustered. The crops of a
class that a person split lose their label and come back as groups of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from semwatch import clusters, head_bank, sightings
from semwatch.clusters import Clusters
from semwatch.errors import ConfigError
from semwatch.head_bank import Bank
from semwatch.inference import Embedded
from semwatch.model_repository import Meta
from semwatch.records import Record
from semwatch_training.learning import candidates
from semwatch_training.learning.candidates import Candidate, Candidates
from semwatch_training.learning.promotion import Answers


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
    """Records that make one class, or may: found by clustering, or a part of a class that a person split."""

    ids: tuple[str, ...]
    """Record ids, the most typical first."""
    crops: Bank
    """In the order of ``ids``; labels are empty."""
    candidate: Candidate
    by_person: bool = False
    """A person asked for it: cohesion and persistence are not asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What a cycle found, and what it will do about it."""

    fresh: Sequence[Record]
    """Records that were clustered."""
    clustered: Candidates
    groups: Sequence[Group]
    """Parts of split classes first, then what clustering found."""
    ids: Sequence[str]
    """The cluster that each group is."""
    decided: Clusters
    """The file, with these groups seen."""
    accepted: Mapping[int, str]
    """Label by number of the group: what is learned."""
    refusals: Mapping[int, Sequence[str]]
    """Why the other groups are not, by number."""

    def is_rejected(self, i: int) -> bool:
        """Whether a person said that this group is no class."""
        return clusters.label_of(self.decided, self.ids[i]) is None

    @property
    def learned(self) -> dict[str, int]:
        """Crops by label of what is learned."""
        n: dict[str, int] = {}
        for i, label in self.accepted.items():
            n[label] = n.get(label, 0) + len(self.groups[i].ids)
        return n


@dataclass(frozen=True, slots=True, eq=False)
class Obeyed:
    """Bank and golden set as people want them."""

    bank: Bank
    golden: Bank
    names: Mapping[str, str | None]
    """New label of each class of the head in service; None: a person rejected it."""
    parts: tuple[Group, ...]
    """Of classes that were split."""
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


def caught_up(c: Clusters, meta: Meta, version: int, utc: str) -> Clusters:
    """Note clusters that the head in service knows although the file does not say so: a cycle died in between."""
    known = [k.id for k in c.clusters if k.head_version is None and {k.id, k.label} & set(meta.labels)]
    return sightings.learned(c, known, version, utc) if known else c


def obey(base: Standing, c: Clusters, *, seed: int) -> Obeyed:
    """Apply what people decided to the crops that the head in service was fitted on."""
    names = renaming(base.meta.labels, c)
    pending = clusters.pending(c)
    to_split = {d.cluster: d.parts or 2 for d in pending if d.kind == "split"}
    bank, golden = (renamed(crops, names) for crops in (base.bank, base.golden))
    parts: list[Group] = []
    for id_, n in to_split.items():
        label = clusters.label_of(c, id_)
        if label is None or label not in bank.labels:  # not learned yet: clustering decides anew anyway
            continue
        of_class, bank, golden = _taken_out(bank, golden, label)
        parts += _parts(of_class, n, label, base.frozen_width, seed)
        names |= {old: None for old, new in names.items() if new == label}
    is_changed = bool(parts) or any(new != old for old, new in names.items())
    return Obeyed(bank, golden, names, tuple(parts), tuple(d.revision for d in pending), is_changed)


def renaming(labels: Sequence[str], c: Clusters) -> dict[str, str | None]:
    """What people call each of a head's classes now; None: they rejected it."""
    now = clusters.successors(c)
    return {label: now.get(label, label) for label in labels}


def renamed_answers(answers: Answers, names: Mapping[str, str | None]) -> Answers:
    """What a head would have said under the new names: classes that became one are one, rejected ones keep theirs."""
    new = [names.get(label) or label for label in answers.labels]
    labels = tuple(dict.fromkeys(new))
    columns = [np.flatnonzero([name == label for name in new]) for label in labels]
    logits = np.stack([logsumexp(answers.logits[:, of], axis=1) for of in columns], axis=1)
    p_values = np.stack([answers.p_values[:, of].max(axis=1) for of in columns], axis=1)
    return Answers(labels, logits.astype(np.float32), p_values.astype(np.float32))


def codes(base: Standing, obeyed: Obeyed, c: Clusters) -> dict[str, int]:
    """Fab codes by label: what the head in service had, and what people said since."""
    kept = {new: base.meta.codes[old] for old, new in obeyed.names.items() if new and old in base.meta.codes}
    return kept | {k.label: k.code for k in c.clusters if k.code is not None and k.state in clusters.LIVE}


def renamed(crops: Bank, names: Mapping[str, str | None]) -> Bank:
    """The same crops under new labels, without those whose class was rejected."""
    kept = head_bank.chosen(crops, np.array([names.get(label, label) is not None for label in crops.labels], np.bool_))
    return head_bank.renamed(kept, {old: new for old, new in names.items() if new is not None})


def _taken_out(bank: Bank, golden: Bank, label: str) -> tuple[Bank, Bank, Bank]:
    """The crops of one class, and bank and golden set without them."""
    learned, proof = (np.array([other == label for other in crops.labels], np.bool_) for crops in (bank, golden))
    of_class = head_bank.joined([head_bank.chosen(bank, learned), head_bank.chosen(golden, proof)])
    return of_class, head_bank.chosen(bank, ~learned), head_bank.chosen(golden, ~proof)


def _parts(of_class: Bank, n: int, label: str, frozen_width: int, seed: int) -> list[Group]:
    """Crops of one class as a person wants it: in n groups."""
    part_of = candidates.split(of_class.features[:, :frozen_width], n, seed=seed)
    groups = []
    for part in range(n):
        crops = unlabelled(head_bank.chosen(of_class, part_of == part))
        candidate = Candidate(np.arange(len(crops)), 0.0, label, 0.0)
        groups.append(Group(crops.ids, crops, candidate, by_person=True))
    return groups


def unlabelled(crops: Bank) -> Bank:
    """The same crops without labels."""
    return replace(crops, labels=("",) * len(crops))


def labelled(crops: Bank, label: str) -> Bank:
    """The same crops, all of one class."""
    return replace(crops, labels=(label,) * len(crops))


def held_out(crops: Bank, *, share: int, at_least: int) -> tuple[Bank, Bank]:
    """Part the crops of a new class: what is learned, and every ``share``-th for the golden set.

    Crops of one image stay together where that leaves ``at_least`` to learn from.
    """
    n_golden = max(0, min(len(crops) // share, len(crops) - at_least))
    images = list(dict.fromkeys(crops.images))[::-1]
    rows: list[int] = []
    for image in images:
        of_image = [row for row, other in enumerate(crops.images) if other == image]
        if len(rows) + len(of_image) <= n_golden:
            rows += of_image
    golden = np.zeros(len(crops), np.bool_)
    golden[rows] = True
    return head_bank.chosen(crops, ~golden), head_bank.chosen(crops, golden)


def capped(bank: Bank, per_class: int, seed: int) -> Bank:
    """A bank with at most so many crops of each class, chosen by chance."""
    rng = np.random.default_rng(seed)
    labels = np.array(bank.labels)
    rows = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in dict.fromkeys(bank.labels)]
    return head_bank.chosen(bank, np.sort(np.concatenate(rows))) if rows else bank


def images_as_numbers(images: Sequence[str]) -> list[int]:
    """A number for each image name, equal for equal names."""
    number = {image: i for i, image in enumerate(dict.fromkeys(images))}
    return [number[image] for image in images]
