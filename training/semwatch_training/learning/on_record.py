"""What a cycle leaves in writing: the provenance of its head, the audit line, learned clusters, the fate of records.

The audit line and the file of clusters follow from the published head alone, its labels and its provenance. So a cycle
that died after it had published leaves nothing to guess: the next one writes what is missing, and nothing twice.
"""

from collections.abc import Sequence

from semwatch.classes import clusters
from semwatch.classes.clusters import Clusters
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch.settings.recipe import Recipe
from semwatch.settings.site import Site
from semwatch.store.ledger import Ledger
from semwatch_training.learning import promotion, standing
from semwatch_training.learning.intake import Fate
from semwatch_training.learning.new_classes import Findings
from semwatch_training.learning.promotion import Judgement
from semwatch_training.learning.standing import OBEYED, Obeyed, Standing

LEDGER = "ledger.sqlite"
REJECTED = "rejected "
"""Begins the stand-in classes that keep rejected crops from being proposed again; no head knows them."""


def lineage(meta: Meta) -> dict[str, str | float | int]:
    """What a head inherits of its parent's provenance: what learning grew is not built over by `build`."""
    return {key: meta.provenance[key] for key in ("made_from",) if key in meta.provenance}


def provenance(
    base: Standing,
    utc: str,
    judgements: Sequence[tuple[Recipe, Judgement]],
    obeyed: Obeyed,
    f: Findings,
    bank: Bank,
    golden: Bank,
) -> dict[str, str | float | int]:
    """How a head was made, and all that ``put`` and the next cycle need to know of it."""
    best: dict[str, str | float | int] = {}
    for recipe, judged in judgements:
        best |= promotion.provenance_of(judged.best, recipe)
    return {
        **lineage(base.meta),
        "cycle": utc,
        "parent": base.version,
        "learned": ", ".join(f"{label} ({n} crops)" for label, n in f.learned.items()),
        OBEYED: ", ".join(map(str, (*obeyed.revisions, *f.revisions))),
        "bank": len(bank),
        "golden": len(golden),
        "golden_unknown_rate": round(max(judged.unknown_rate for _, judged in judgements), 4),
        **best,
    }


def put(site: Site, version: int, meta: Meta, utc: str) -> Clusters:
    """Write the audit line of a head in service, once, then what it knows and obeys into the file; returns the file.

    Call it with the file of clusters locked: there must be no change without its line.

    Raises:
        ConfigError: the file of clusters or the ledger cannot be read.
        ServiceUnavailable: the disk refused.
    """
    made = meta.provenance
    if "cycle" in made:
        obeyed = [int(part) for part in str(made.get(OBEYED, "")).split(",") if part.strip().isdigit()]
        entry = {
            "event": "head published",
            "utc": made["cycle"],
            "version": version,
            "learned": made.get("learned", ""),
            "obeyed": obeyed,
        }
        site.state_dir.mkdir(parents=True, exist_ok=True)
        with Ledger(site.state_dir / LEDGER, exclusive=False) as ledger:
            # Not by its version: the same head under a new name is no second one.
            ledger.note(audit=entry, once=f"head published {made['cycle']} {made.get('parent')}")
    now = clusters.read(site.learning_dir)
    after = standing.caught_up(now, meta, version, utc)
    if after == now:
        return now
    after = after.model_copy(update={"revision": now.revision + 1})
    clusters.write(site.learning_dir, after)
    return after


def fates(base: Standing, decided: Clusters) -> dict[str, Fate]:
    """By record id: what the head in service was fitted on or proven on, and what people rejected."""
    known: dict[str, Fate] = {
        id_: ("learned", f"{label}, head {base.version}")
        for crops in (base.bank, base.golden)
        for id_, label in zip(crops.ids, crops.labels, strict=True)
        if id_
    }
    gone = [k for k in decided.clusters if clusters.label_of(decided, k.id) is None]
    return known | {id_: ("rejected", k.id) for k in gone for id_ in k.members}


def by_clustering(f: Findings) -> dict[str, Fate]:
    """Fates of the records that turned out to look like what people rejected."""
    found: dict[str, Fate] = {
        record.id: ("rejected", known.removeprefix(REJECTED))
        for record, known in zip(f.records, f.clustered.known, strict=True)
        if known is not None and known.startswith(REJECTED)
    }
    for i, group in enumerate(f.groups):
        if f.is_rejected(i):
            found |= dict.fromkeys(group.ids, ("rejected", f.ids[i]))
    return found


def by_head(f: Findings, obeyed: Obeyed, version: int) -> dict[str, Fate]:
    """Fates that a new head brings about; unknowns that no class came of are not among them, they stay in the queue."""
    found: dict[str, Fate] = {id_: ("rejected", label) for id_, label in obeyed.rejected.items()}
    for record, known in zip(f.records, f.clustered.known, strict=True):
        if known is not None and not known.startswith(REJECTED) and record.kind == "non-decidable":
            found[record.id] = "explained", f"{known}, head {version}"
    for i, label in f.accepted.items():
        found |= dict.fromkeys(f.groups[i].ids, ("learned", f"{label}, head {version}"))
    return found
