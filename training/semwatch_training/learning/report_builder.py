"""The content of a cycle's report, collected while the cycle runs; ``cycle_report`` writes it."""

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from semwatch.classes import clusters
from semwatch.classes.clusters import Clusters
from semwatch.errors import ServiceUnavailable
from semwatch.models.head_bank import Bank
from semwatch.settings.recipe import Recipe
from semwatch_training.learning import cycle_report
from semwatch_training.learning.archive import Archive
from semwatch_training.learning.base_head import BaseHead
from semwatch_training.learning.cycle_report import ClusterRecord, CycleReport, JudgementRecord, KRecord
from semwatch_training.learning.decisions import Group
from semwatch_training.learning.intake import SortedUnknowns
from semwatch_training.learning.new_classes import Findings
from semwatch_training.learning.promotion import Judgement


class ReportBuilder:
    """Collects the report of one cycle.

    Args:
        folder: of its report.
        utc: when it began.
    """

    def __init__(self, folder: Path, utc: str) -> None:
        self.folder, self.utc = folder, utc
        self._timings: dict[str, float] = {}
        self._judgements: tuple[JudgementRecord, ...] = ()
        self._mapped: Bank | None = None
        self._fields: dict[str, object] = {}
        self._crops: dict[str, NDArray[np.uint8]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of one step."""
        start = time.monotonic()
        yield
        self._timings[name] = self._timings.get(name, 0.0) + time.monotonic() - start

    def add_findings(
        self, base: BaseHead, n_claimed: int, found: SortedUnknowns, f: Findings, archive: Archive
    ) -> None:
        """Add what was claimed and found, and what is to be learned."""
        curves = f.clustered.k.curves
        self._fields = {
            "old_version": base.version,
            "n_claimed": n_claimed,
            "n_duplicates": found.n_duplicates,
            "n_learned": sum(len(f.groups[i].ids) for i in f.accepted),
            "n_bank": len(base.bank),
            "k": KRecord(
                k=f.clustered.k.k,
                interval=f.clustered.k.interval,
                n_known=len(set(base.bank.labels)),
                candidates=f.clustered.k.candidates,
                probability=tuple(float(p) for p in curves["probability"]) if "probability" in curves else (),
            ),
            "clusters": tuple(_cluster(f.groups[i], id_, f.decided, f.refusals.get(i)) for i, id_ in enumerate(f.ids)),
        }
        for group, id_ in zip(f.groups, f.ids, strict=True):
            shown = archive.read_many(group.ids[: cycle_report.MAX_EXAMPLES])
            if shown and len({record.crop.shape for record in shown}) == 1:
                self._crops[id_] = np.stack([record.crop for record in shown])

    def add_judgements(self, judgements: Sequence[tuple[Recipe, Judgement]], bank: Bank, frozen_width: int) -> None:
        """Add the judgements, and the crops that the head was fitted on: their frozen features go on the map."""
        self._judgements = tuple(cycle_report.judgement_record(recipe.name, judged) for recipe, judged in judgements)
        self._mapped = replace(bank, features=bank.features[:, :frozen_width])

    def add_corrections(self, n: int, conflicts: Sequence[str]) -> None:
        """Add how many unknowns became crops by correction, and where people contradict each other."""
        self._fields |= {"n_corrected": n, "conflicts": tuple(conflicts)}

    def write(
        self,
        outcome: Literal["published", "refused", "nothing-new"],
        version: int | None = None,
        *,
        reasons: Sequence[str] = (),
    ) -> Path:
        """Write the report; returns its folder.

        Raises:
            ServiceUnavailable: the disk refused.
        """
        fields = {
            **self._fields,
            "started_utc": self.utc,
            "outcome": outcome,
            "version": version,
            "reasons": tuple(reasons),
            "judgements": self._judgements,
            "timings_s": self._timings,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        try:
            cycle_report.write(self.folder, CycleReport.model_validate(fields), self._crops, mapped=self._mapped)
        except OSError as error:
            raise ServiceUnavailable(f"cannot write {self.folder}: {error.strerror}; free or mend the disk") from error
        return self.folder


def _cluster(group: Group, id_: str, decided: Clusters, why: Sequence[str] | None) -> ClusterRecord:
    cluster = clusters.find(decided, id_)
    rejected = clusters.label_of(decided, id_) is None
    return ClusterRecord(
        name=id_,
        size=group.candidate.size,
        cohesion=group.candidate.cohesion,
        nearest_known=group.candidate.nearest_known,
        nearest_distance=None if np.isnan(group.candidate.nearest_distance) else group.candidate.nearest_distance,
        cycles_seen=cluster.cycles,
        decision="rejected" if rejected else "learned" if why is None else "proposed",
        why=tuple(why or ()),
    )
