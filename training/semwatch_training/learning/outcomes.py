"""The outcome of a cycle as it is recorded: provenance of its head, learned clusters, settled records.

The state of the clusters follows from the published head alone, its labels and its provenance. So a cycle
that died after it had published leaves nothing to guess: the next one writes what is missing, and nothing twice.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.classes import clusters
from semwatch.classes.clusters import Clusters
from semwatch.classes.register import ClassRegister
from semwatch.errors import ModelMismatch
from semwatch.models import choice, model_repository
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch.settings.recipe import Recipe
from semwatch.streams.records import NAMED
from semwatch_training.discovery.clustering import squared_distances
from semwatch_training.learning import candidates, decisions, promotion
from semwatch_training.learning.archive import Archive
from semwatch_training.learning.base_head import BaseHead
from semwatch_training.learning.decisions import DECISIONS, DecidedCrops
from semwatch_training.learning.intake import Settlement
from semwatch_training.learning.new_classes import Findings
from semwatch_training.learning.promotion import Judgement

AS_OF = ", head "
"""Between class and version in the note on a record that a head has learned."""
REJECTED = "rejected "
"""Begins the stand-in classes that keep rejected crops from being proposed again; no head knows them."""


def lineage(meta: Meta) -> dict[str, str | float | int]:
    """What a head inherits of its parent's provenance: what learning grew is not built over by `build`."""
    return {key: meta.provenance[key] for key in ("made_from",) if key in meta.provenance}


def provenance(
    base: BaseHead,
    utc: str,
    judgements: Sequence[tuple[Recipe, Judgement]],
    decided_crops: DecidedCrops,
    f: Findings,
    bank: Bank,
    golden: Bank,
) -> dict[str, str | float | int]:
    """How a head was made, and what ``record_promotion`` and the next cycle need to know of it."""
    best: dict[str, str | float | int] = {}
    for recipe, judged in judgements:
        best |= promotion.provenance_of(judged.best, recipe)
    return {
        **lineage(base.meta),
        "cycle": utc,
        "parent": base.version,
        "learned": ", ".join(f"{label} ({n} crops)" for label, n in f.learned.items()),
        DECISIONS: ", ".join(map(str, (*decided_crops.revisions, *f.revisions))),
        "bank": len(bank),
        "golden": len(golden),
        "golden_unknown_rate": round(max(judged.unknown_rate for _, judged in judgements), 4),
        **best,
    }


def record_promotion(register: ClassRegister, repository: Path, version: int, meta: Meta, utc: str) -> Clusters:
    """Mark the clusters that a head in service has learned, and the decisions that are applied in it.

    What only heads did that were taken out of service is undone first: the clusters are proposed again, and the
    decisions wait for the next head.

    Call it with the register locked. The head's audit line is the daemon's, which writes it from the same description.

    Returns:
        The found classes as they are then.

    Raises:
        ConfigError: they make no sense.
        ServiceUnavailable: Redis is away.
    """
    now = register.read()
    withdrawn = _withdrawn(repository)
    others = [
        m for v in model_repository.versions(repository, "head") if v not in withdrawn if (m := _meta(repository, v))
    ]
    after = decisions.undo_rolled_back(now, meta, withdrawn, others)
    after = decisions.mark_applied(after, meta, version, utc)
    if after == now:
        return now
    after = after.model_copy(update={"revision": now.revision + 1})
    register.write(after)
    return after


def lost(base: BaseHead, repository: Path, archive: Archive, decided: Clusters) -> list[str]:
    """Records that are settled and must wait again.

    They count as learned, and a rollback has taken out of service the head that learned them, or a person has taken
    them out of their class or taken back the merge that had brought them there. Or they were rejected, and a person has
    taken that back.
    """
    withdrawn = {str(version) for version in _withdrawn(repository)}
    removed_of: dict[str, set[str]] = {}
    for k in decided.clusters:
        own = clusters.names_of(decided, k) | {label for label in (clusters.label_of(decided, k.id),) if label}
        for id_ in clusters.removed_from(decided, k.id):
            removed_of.setdefault(id_, set()).update(own)
    for d, ids, labels in decisions.unmerged(decided):
        parts = clusters.part_of(decided, d.cluster)  # their notes may still say what they were before the merge
        own = labels.union(*({part.id, part.label, *clusters.names_of(decided, part)} for part in parts))
        for id_ in ids:
            removed_of.setdefault(id_, set()).update(own)
    again = _rejected_no_more(archive, decided)
    if not withdrawn and not removed_of:
        return again
    held = {*base.bank.ids, *base.golden.ids}
    found = []
    for id_, note in archive.notes_of("learned").items():
        label, _, version = note.rpartition(AS_OF)
        if id_ not in held and (version in withdrawn or label in removed_of.get(id_, ())):
            found.append(id_)
    return found + again


def _rejected_no_more(archive: Archive, decided: Clusters) -> list[str]:
    """Records that were rejected with a cluster, or because they look like its crops, and are not any more."""
    notes = set[str]()
    for _, k in clusters.taken_back(decided, "reject"):
        if clusters.label_of(decided, k.id) is not None:
            notes |= clusters.names_of(decided, k) | {part.id for part in clusters.part_of(decided, k.id)}
    if not notes:
        return []
    return [id_ for id_, note in archive.notes_of("rejected").items() if note in notes]


def _withdrawn(repository: Path) -> dict[int, Meta | None]:
    versions = model_repository.versions(repository, "head")
    gone = [version for version in versions if choice.why_withdrawn(repository, "head", version) is not None]
    return {version: _meta(repository, version) for version in gone}


def _meta(repository: Path, version: int) -> Meta | None:
    try:
        return model_repository.read_meta(repository, "head", version)
    except ModelMismatch:
        return None  # damaged: nobody can say what it did


def settlements(base: BaseHead, decided: Clusters) -> dict[str, Settlement]:
    """Settlements by record id: crops that the head in service was fitted or judged on, crops that people rejected."""
    known: dict[str, Settlement] = {
        id_: ("learned", f"{label}{AS_OF}{base.version}")
        for crops in (base.bank, base.golden)
        for id_, label in zip(crops.ids, crops.labels, strict=True)
        if id_
    }
    gone = [k for k in decided.clusters if clusters.label_of(decided, k.id) is None]
    return known | {id_: ("rejected", k.id) for k in gone for id_ in k.members}


def inside_rejected(
    known: Sequence[str | None], features: NDArray[np.float32], rejected: Bank, *, frozen_width: int
) -> tuple[str | None, ...]:
    """The known class of each unknown (m,); None where it is a rejected one in whose range the unknown does not lie.

    Clustering gives every unknown to something: a rejection must not take along what merely lies nearest to it, nor
    what lies nearer to an unknown that was not rejected.

    Args:
        known: what clustering said.
        features: (m, D) of the unknowns.
        rejected: crops of rejected clusters under their stand-in labels.
        frozen_width: leading features that are compared.
    """
    found = list(known)
    for label in set(rejected.labels):
        rows = [i for i, one in enumerate(known) if one == label]
        inside = _in_range(features[rows], rejected, label, frozen_width)
        others = features[[one != label for one in known]]
        inside &= _nearer(features[rows], rejected, label, others, frozen_width)
        for i, is_one in zip(rows, inside, strict=True):
            found[i] = label if is_one else None
    return tuple(found)


def _in_range(features: NDArray[np.float32], rejected: Bank, label: str, frozen_width: int) -> NDArray[np.bool_]:
    members = rejected.features[[one == label for one in rejected.labels]]
    return candidates.is_inside(features[:, :frozen_width], members[:, :frozen_width])


def _nearer(
    features: NDArray[np.float32], rejected: Bank, label: str, others: NDArray[np.float32], frozen_width: int
) -> NDArray[np.bool_]:
    """Which features (m, D) lie nearer to a rejected crop than to any of the others (n, D): (m,)."""
    if not len(features) or not len(others):
        return np.ones(len(features), np.bool_)
    members = rejected.features[[one == label for one in rejected.labels]]
    mine, own, strange = (rows[:, :frozen_width] for rows in (features, members, others))
    to_own, to_others = (squared_distances(mine, rows).min(axis=1) for rows in (own, strange))
    return np.asarray(to_own < to_others, np.bool_)


def settlements_by_clustering(f: Findings, rejected: Bank, *, frozen_width: int) -> dict[str, Settlement]:
    """Settlements of what clustering explains: records beside what people rejected, within its own range, and
    doubtful crops that it gives to a known class too.

    Args:
        f: what was found; ``inside_rejected`` was applied.
        rejected: crops of rejected clusters under their stand-in labels.
        frozen_width: leading features that are compared.
    """
    found: dict[str, Settlement] = {
        record.id: ("rejected", known.removeprefix(REJECTED))
        for record, known in zip(f.records, f.clustered.known, strict=True)
        if known is not None and known.startswith(REJECTED)
    }
    for record, known in zip(f.records, f.clustered.known, strict=True):
        if record.kind in NAMED and known is not None and not known.startswith(REJECTED):
            found[record.id] = "explained", f"{known}, named so by the line and by clustering"
    for i, group in enumerate(f.groups):
        if f.is_rejected(i):
            inside = _in_range(group.crops.features, rejected, REJECTED + f.ids[i], frozen_width)
            alike = [id_ for id_, is_one in zip(group.ids, inside, strict=True) if is_one]
            found |= dict.fromkeys(alike, ("rejected", f.ids[i]))
    return found


def settlements_by_head(f: Findings, decided_crops: DecidedCrops, version: int) -> dict[str, Settlement]:
    """Settlements by a new head; unknowns that no class came of are not among them, they stay in the queue."""
    found: dict[str, Settlement] = {id_: ("rejected", label) for id_, label in decided_crops.rejected.items()}
    found |= {id_: ("learned", f"{label}{AS_OF}{version}") for id_, label in decided_crops.corrected.items()}
    for record, known in zip(f.records, f.clustered.known, strict=True):
        if known is not None and not known.startswith(REJECTED) and record.kind == "non-decidable":
            found[record.id] = "explained", f"{known}{AS_OF}{version}"
    for i, label in f.accepted.items():
        found |= dict.fromkeys(f.groups[i].ids, ("learned", f"{label}{AS_OF}{version}"))
    return found
