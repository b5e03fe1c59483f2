"""Groups of unknowns on their way to classes: their identities over the cycles, which are learned, and their crops."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.classes import clusters, observations
from semwatch.classes.clusters import Cluster, Clusters
from semwatch.classes.observations import Observation
from semwatch.classes.register import ClassRegister
from semwatch.defects import NOVEL
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.settings.recipe import Recipe
from semwatch.streams.handoff import Handoff
from semwatch.streams.records import Record
from semwatch_training.discovery.fit_head import MIN_PER_CLASS
from semwatch_training.learning import promotion
from semwatch_training.learning.archive import Archive
from semwatch_training.learning.candidates import Candidates
from semwatch_training.learning.crops import capped, held_out, labelled
from semwatch_training.learning.decisions import DecidedCrops, Group

GOLDEN_SHARE = 5
"""Every fifth crop of a new class goes to the golden set."""
MAX_PER_CLASS = 500
"""Crops of one class in a bank; a head stores fewer."""
N_EXAMPLES = 12
EXAMPLE_PX = 160
"""Edge of an example crop: as large as pictures of a class show it."""


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What a cycle found, and what it will do about it."""

    clustered: Candidates
    records: Sequence[Record]
    """Those that were clustered."""
    groups: Sequence[Group]
    """Groups by people's decisions first, then those that clustering found."""
    ids: Sequence[str]
    """The cluster that each group is."""
    decided: Clusters
    """The file of clusters, with these groups as observations."""
    accepted: Mapping[int, str]
    """Label by number of the group: what is learned."""
    refusals: Mapping[int, Sequence[str]]
    """Why the other groups are not, by number."""
    revisions: Sequence[int] = ()
    """Of the decisions to split that the groups fulfil."""

    def is_rejected(self, i: int) -> bool:
        """Whether a person said that this group is no class."""
        return clusters.label_of(self.decided, self.ids[i]) is None

    @property
    def learned(self) -> dict[str, int]:
        """Crops by label of what is learned."""
        n: dict[str, int] = {}
        for i, label in self.accepted.items():
            n[label] = n.get(label, 0) + len(self.groups[i].crops)
        return n


def clustered_groups(clustered: Candidates, crops: Bank) -> list[Group]:
    """The classes that clustering found, with their crops."""
    return [Group(head_bank.chosen(crops, candidate.members), candidate) for candidate in clustered.classes]


def identify(register: ClassRegister, groups: Sequence[Group], utc: str) -> tuple[Clusters, list[Group], list[str]]:
    """Give the groups their identities, those of earlier cycles where they are the same; write them down.

    Returns:
        The found classes; the groups without crops that people took out of these classes; their identities.
    """
    kept: list[Group] = []
    ids: list[str] = []

    def step(c: Clusters) -> Clusters:
        matched = observations.matches(c, [_observation(group) for group in groups])
        pairs = [(_without_removed(c, group, id_), id_) for group, id_ in zip(groups, matched, strict=True)]
        pairs = [(group, id_) for group, id_ in pairs if len(group.crops)]
        numbers = iter(range(c.next_number, c.next_number + len(pairs)))
        kept[:] = [group for group, _ in pairs]
        ids[:] = [id_ or f"{NOVEL}{next(numbers)}" for _, id_ in pairs]
        return observations.observe(c, [_observation(g) for g in kept], utc=utc, matched=[id_ for _, id_ in pairs])

    return register.change(step), kept, ids


def _observation(group: Group) -> Observation:
    return Observation(
        members=group.ids,
        size=len(group.ids),
        cohesion=group.candidate.cohesion,
        nearest_known=group.candidate.nearest_known or "",
        nearest_distance=max(0.0, float(np.nan_to_num(group.candidate.nearest_distance))),
        examples=group.ids[:N_EXAMPLES],
        looks=group.candidate.looks,
    )


def _without_removed(c: Clusters, group: Group, id_: str | None) -> Group:
    """The group without crops that a person took out of the cluster that it is, or was merged into."""
    if id_ is None:
        return group
    root = clusters.root_of(c, clusters.find(c, id_))
    gone = clusters.removed_from(c, id_) | (clusters.removed_from(c, root.id) if isinstance(root, Cluster) else set())
    stays = np.array([one not in gone for one in group.ids], np.bool_)
    if stays.all():
        return group
    candidate = replace(group.candidate, members=group.candidate.members[stays])
    return replace(group, crops=head_bank.chosen(group.crops, stays), candidate=candidate)


def choose(
    decided: Clusters, ids: Sequence[str], groups: Sequence[Group], known: Collection[str], recipes: Sequence[Recipe]
) -> tuple[dict[int, str], dict[int, Sequence[str]]]:
    """Choose the groups that are learned, with their labels, and give the reasons why the others are not.

    No threshold of a recipe applies to a group that a person separated, nor to one that became part of a known class.
    Groups that a person merged are compared with the thresholds together.
    """
    accepted: dict[int, str] = {}
    refusals: dict[int, Sequence[str]] = {}
    for i, (group, id_) in enumerate(zip(groups, ids, strict=True)):
        label = clusters.label_of(decided, id_)
        if label is None:
            refusals[i] = ["a person rejected it"]
        elif held := _on_hold(decided, id_, group):
            refusals[i] = [
                f"{held}: the head that knew it was rolled back, and nobody has decided about it since; name, merge, "
                f"split or reject it: `semwatch clusters show {held}`"
            ]
        elif group.by_person or label in known:
            accepted[i] = label
        elif why := _too_little(decided, id_, recipes):
            refusals[i] = why
        else:
            accepted[i] = label
    return accepted, refusals


def _on_hold(decided: Clusters, id_: str, group: Group) -> str | None:
    """The cluster on hold that a group is, or shares most of the crops of either with; None where there is none."""
    for k in (k for k in decided.clusters if k.on_hold):
        if k.id == id_ or 2 * len(set(k.members) & set(group.ids)) > min(len(k.members), len(group.ids)):
            return k.id
    return None


def _too_little(decided: Clusters, id_: str, recipes: Sequence[Recipe]) -> list[str]:
    """Why a cluster is not learned yet; empty where it may be."""
    k = clusters.find(decided, id_)
    root = clusters.root_of(decided, k)
    k = root if isinstance(root, Cluster) else k
    return [
        f"recipe {recipe.name}: {reason}"
        for recipe in recipes
        for reason in promotion.cluster_refusals(k.size, k.cohesion, k.cycles, recipe.promotion)
    ]


def grown(decided_crops: DecidedCrops, f: Findings, seed: int, was_proof: Collection[str]) -> tuple[Bank, Bank]:
    """Bank and golden set with the new classes.

    Args:
        decided_crops: what the classes are added to.
        f: what is learned.
        seed: of the choice where a class is too large.
        was_proof: record ids that no head was fitted on so far; none will be.
    """
    banks, golden = [decided_crops.bank], [decided_crops.golden]
    for i, label in f.accepted.items():
        crops = f.groups[i].crops
        learned, proof = held_out(crops, share=GOLDEN_SHARE, at_least=MIN_PER_CLASS, was_proof=was_proof)
        banks.append(labelled(learned, label))
        golden.append(labelled(proof, label))
    return capped(head_bank.joined(banks), MAX_PER_CLASS, seed), head_bank.joined(golden)


def show_examples(handoff: Handoff, before: Clusters, f: Findings, archive: Archive) -> None:
    """Put crops where people can look at them, scaled to ``EXAMPLE_PX``; those of clusters that are gone leave.

    Raises:
        ServiceUnavailable: Redis is away.
    """
    for id_, group in zip(f.ids, f.groups, strict=True):
        wanted = set(clusters.find(f.decided, id_).examples)
        shown = archive.read_many([i for i in group.ids if i in wanted])
        handoff.put_examples(id_, {record.id: _picture(record.crop) for record in shown})
    for gone in {k.id for k in before.clusters} - {k.id for k in f.decided.clusters}:
        handoff.put_examples(gone, {})


def _picture(crop: NDArray[np.uint8]) -> bytes:
    side = min(EXAMPLE_PX, crop.shape[0])
    _, png = cv2.imencode(".png", cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA))
    return png.tobytes()
