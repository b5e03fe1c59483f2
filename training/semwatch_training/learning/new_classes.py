"""Groups of unknowns on their way to classes: their identities over the cycles, which are learned, and their crops."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from semwatch.classes import clusters, sightings
from semwatch.classes.archive import Archive
from semwatch.classes.clusters import Cluster, Clusters
from semwatch.classes.sightings import Found
from semwatch.defects import NOVEL
from semwatch.errors import ServiceUnavailable
from semwatch.models import head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch.settings.recipe import Recipe
from semwatch.streams.records import Record
from semwatch_training.discovery.fit_head import MIN_PER_CLASS
from semwatch_training.learning import promotion, standing
from semwatch_training.learning.candidates import Candidates
from semwatch_training.learning.standing import Group, Obeyed

GOLDEN_SHARE = 5
"""Every fifth crop of a new class goes to the golden set."""
MAX_PER_CLASS = 500
"""Crops of one class in a bank; a head stores fewer."""
N_EXAMPLES = 12


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What a cycle found, and what it will do about it."""

    clustered: Candidates
    records: Sequence[Record]
    """Those that were clustered."""
    groups: Sequence[Group]
    """What people told apart first, then what clustering found."""
    ids: Sequence[str]
    """The cluster that each group is."""
    decided: Clusters
    """The file, with these groups seen."""
    accepted: Mapping[int, str]
    """Label by number of the group: what is learned."""
    refusals: Mapping[int, Sequence[str]]
    """Why the other groups are not, by number."""
    revisions: Sequence[int] = ()
    """Of the decisions to split that the groups obey."""

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


def identify(folder: Path, groups: Sequence[Group], utc: str) -> tuple[Clusters, list[str]]:
    """Give the groups their identities, those of earlier cycles where they are the same; write them down."""
    ids: list[str] = []
    seen = [
        Found(
            members=group.ids,
            size=len(group.ids),
            cohesion=group.candidate.cohesion,
            nearest_known=group.candidate.nearest_known or "",
            nearest_distance=max(0.0, float(np.nan_to_num(group.candidate.nearest_distance))),
            examples=group.ids[:N_EXAMPLES],
        )
        for group in groups
    ]

    def step(c: Clusters) -> Clusters:
        numbers = iter(range(c.next_number, c.next_number + len(seen)))
        ids[:] = [id_ or f"{NOVEL}{next(numbers)}" for id_ in sightings.matches(c, seen)]
        return sightings.seen(c, seen, utc=utc)

    return clusters.change(folder, step), ids


def choose(
    decided: Clusters, ids: Sequence[str], groups: Sequence[Group], known: Collection[str], recipes: Sequence[Recipe]
) -> tuple[dict[int, str], dict[int, Sequence[str]]]:
    """Tell the groups that are learned, and under which label, from those that are not, and why.

    What a person told apart, and what became part of a known class, meets no bars of the recipes. Groups that a person
    merged meet them together.
    """
    accepted: dict[int, str] = {}
    refusals: dict[int, Sequence[str]] = {}
    for i, (group, id_) in enumerate(zip(groups, ids, strict=True)):
        label = clusters.label_of(decided, id_)
        if label is None:
            refusals[i] = ["a person rejected it"]
        elif group.by_person or label in known:
            accepted[i] = label
        elif why := _too_little(decided, id_, recipes):
            refusals[i] = why
        else:
            accepted[i] = label
    return accepted, refusals


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


def grown(obeyed: Obeyed, f: Findings, seed: int, was_proof: Collection[str]) -> tuple[Bank, Bank]:
    """Bank and golden set with the new classes.

    Args:
        obeyed: what the classes are added to.
        f: what is learned.
        seed: of the choice where a class is too large.
        was_proof: record ids that no head was fitted on so far; none will be.
    """
    banks, golden = [obeyed.bank], [obeyed.golden]
    for i, label in f.accepted.items():
        crops = f.groups[i].crops
        learned, proof = standing.held_out(crops, share=GOLDEN_SHARE, at_least=MIN_PER_CLASS, was_proof=was_proof)
        banks.append(standing.labelled(learned, label))
        golden.append(standing.labelled(proof, label))
    return standing.capped(head_bank.joined(banks), MAX_PER_CLASS, seed), head_bank.joined(golden)


def write_examples(folder: Path, f: Findings, archive: Archive) -> None:
    """Write crops for people to look at.

    Raises:
        ServiceUnavailable: the disk refused.
    """
    for id_, group in zip(f.ids, f.groups, strict=True):
        place = folder / clusters.EXAMPLES / id_
        wanted = {Path(example).stem for example in clusters.find(f.decided, id_).examples}
        try:
            place.mkdir(parents=True, exist_ok=True)
            for record in archive.read_many([i for i in group.ids if i in wanted]):
                _, png = cv2.imencode(".png", record.crop)
                model_repository.write_whole(place / f"{record.id}.png", png.tobytes())
        except OSError as error:
            raise ServiceUnavailable(f"cannot write {place}: {error.strerror}; free or mend the disk") from error
