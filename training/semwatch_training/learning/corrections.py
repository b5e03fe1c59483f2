"""People's corrections as labels: who said what of a defect last, where people agree, and the crops that follow.

A correction names a defect; its crop is the record of the same id, in the queue, in the archive, or in the bank. The
later word of one person replaces the earlier. Where people contradict each other, nothing is learned from it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from semwatch.classes import clusters
from semwatch.classes.clusters import Clusters
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.streams.records import Correction, Record
from semwatch_training.discovery.fit_head import MIN_PER_CLASS
from semwatch_training.learning.crops import held_out, labelled
from semwatch_training.learning.decisions import DecidedCrops

GOLDEN_SHARE = 5
"""Every fifth corrected crop of a class goes to the golden set."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What people say of defects, by the id of the defect's record."""

    corrections: Mapping[str, Correction]
    """The newest of those that hold, with the largest weight that anybody gave it."""
    conflicts: tuple[str, ...]
    """Defects that people contradict each other about, a sentence each."""

    def weights_of(self, bank: Bank) -> NDArray[np.float64]:
        """Weight of each crop of a bank, (n,): 1 where nobody corrected it."""
        found = (self.corrections.get(id_) for id_ in bank.ids)
        return np.array([1.0 if one is None else one.weight for one in found])


def agreed(found: Sequence[Correction]) -> Agreed:
    """What holds of all that people said."""
    of_defect: dict[str, dict[str, Correction]] = {}
    for one in sorted(found, key=lambda one: (one.corrected_utc, one.id)):
        of_defect.setdefault(one.unknown_id, {})[one.by] = one
    holds, conflicts = {}, []
    for id_, by_person in of_defect.items():
        words = list(by_person.values())
        if len({one.label for one in words}) > 1:
            people = ", ".join(f"{one.label!r} by {one.by} ({one.corrected_utc})" for one in words)
            place = f"{words[0].path} page {words[0].page} box {','.join(map(str, words[0].box_xyxy))}"
            conflicts.append(f"{place}: {people}; agree, and let one of you correct it again")
            continue
        newest = max(words, key=lambda one: one.corrected_utc)
        holds[id_] = replace(newest, weight=max(one.weight for one in words))
    return Agreed(holds, tuple(conflicts))


def as_record(correction: Correction) -> Record | None:
    """The crop that comes along with a correction, as a record that waits for a class; None where there is none."""
    if correction.crop is None or correction.features is None or correction.soft_mask is None:
        return None
    assert correction.crop_xyxy is not None, "the format holds it beside a crop"
    return Record(
        id=correction.unknown_id,
        created_utc=correction.corrected_utc,
        source=correction.source,
        path=correction.path,
        sha256=correction.sha256,
        page=correction.page,
        defect_id=correction.defect_id or 0,
        box_xyxy=correction.box_xyxy,
        crop_xyxy=correction.crop_xyxy,
        area_px=correction.area_px,
        area_nm2=None,
        pixel_nm=None,
        image_score=0.0,
        peak_score=0.0,
        kind="unknown",
        nearest=(),
        recipe_name="",
        recipe_id="",
        model_versions=dict(correction.model_versions),
        features=correction.features,
        soft_mask=correction.soft_mask,
        crop=correction.crop,
        field_short_px=correction.field_short_px,
        model_hashes=dict(correction.model_hashes),
        site=correction.site,
        field_features=correction.field_features,
        region_features=correction.region_features,
    )


def apply(decided_crops: DecidedCrops, c: Clusters, labels: Agreed, fresh: Bank) -> DecidedCrops:
    """Give crops of bank and golden set the labels that people corrected them to, and add corrected unknowns.

    A class that would be left with, or would begin with, fewer crops than a head is fitted on waits for more.

    Args:
        decided_crops: bank and golden set, after people's decisions about clusters.
        c: the found classes: a correction may name a class by an earlier name.
        labels: what holds.
        fresh: unknowns that wait, with their features.
    """
    now = clusters.successors(c)
    wanted = {id_: label for id_, one in labels.corrections.items() if (label := now.get(one.label, one.label))}
    bank, golden = _relabelled(decided_crops.bank, decided_crops.golden, wanted)
    is_changed = (bank.labels, golden.labels) != (decided_crops.bank.labels, decided_crops.golden.labels)
    banks, goldens, corrected = [bank], [golden], dict[str, str]()
    for label in sorted({wanted[id_] for id_ in fresh.ids if id_ in wanted}):
        crops = head_bank.chosen(fresh, np.array([wanted.get(id_) == label for id_ in fresh.ids], np.bool_))
        n_needed = max(0, MIN_PER_CLASS - bank.labels.count(label))
        if len(crops) < n_needed:
            continue
        learned, proof = held_out(crops, share=GOLDEN_SHARE, at_least=n_needed)
        banks.append(labelled(learned, label))
        goldens.append(labelled(proof, label))
        corrected |= dict.fromkeys(crops.ids, label)
    return replace(
        decided_crops,
        bank=head_bank.joined(banks),
        golden=head_bank.joined(goldens),
        corrected=corrected,
        is_changed=decided_crops.is_changed or is_changed or bool(corrected),
    )


def _relabelled(bank: Bank, golden: Bank, wanted: Mapping[str, str]) -> tuple[Bank, Bank]:
    """Both with the wanted labels; crops of a class stay where too few would be left, or too few would begin one."""
    moves = [(old, wanted[id_]) for id_, old in zip(bank.ids, bank.labels, strict=True) if wanted.get(id_, old) != old]
    before = Counter(bank.labels)
    after = before - Counter(old for old, _ in moves) + Counter(new for _, new in moves)
    few = {label for move in moves for label in move if after[label] < MIN_PER_CLASS}

    def moved(crops: Bank) -> Bank:
        labels = tuple(
            new if (new := wanted.get(id_, old)) and not {old, new} & few else old
            for id_, old in zip(crops.ids, crops.labels, strict=True)
        )
        return replace(crops, labels=labels)

    return moved(bank), moved(golden)
