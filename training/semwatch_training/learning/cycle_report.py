"""The report of one learning cycle: what was claimed, what was found, how the gate judged, and how long it took.

    <folder>/report.json     ``CycleReport``, schema 1; written last: where it stands, all stand
    <folder>/report.md       the same in plain words
    <folder>/<cluster>.png   up to 12 crops of each cluster, as the encoder saw them
    <folder>/features.png    the bank and the clusters in two dimensions, where they were given

Numbers are never rounded in JSON.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semwatch.errors import ConfigError
from semwatch.models.head_bank import Bank
from semwatch.system.faults import first_fault
from semwatch.system.files import write_whole
from semwatch_training.evaluation.feature_map import feature_map
from semwatch_training.evaluation.plots import styled
from semwatch_training.evaluation.report import Cell, Table, markdown
from semwatch_training.learning.promotion import ClassChange, Judgement

SCHEMA_VERSION: Final = 1
JSON, WORDS, MAP = "report.json", "report.md", "features.png"
MAX_EXAMPLES, ROW = 12, 6
"""Crops on a cluster's sheet, and in one row of it."""
MAX_POINTS = 600
"""Of the map: t-SNE of 600 crops takes about 2 s on a slow core."""
DPI = 100

Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
"""Becomes a file name."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KRecord(_Record):
    """How many classes there are, known ones included."""

    k: int
    interval: tuple[int, int]
    n_known: int
    candidates: tuple[int, ...]
    probability: tuple[Share, ...] = Field(description="Of each candidate; empty where there was nothing to estimate.")


class ClusterRecord(_Record):
    """One class that was found."""

    name: Name
    size: int
    cohesion: float
    nearest_known: str | None
    nearest_distance: float | None
    cycles_seen: int
    decision: Literal["learned", "proposed", "rejected"] = Field(
        description="proposed: not learned in this cycle; rejected: a person said so."
    )
    why: tuple[str, ...] = Field(description="Why it was not learned; empty where it was.")


class GoldenRecord(_Record):
    """One class of the golden set under the head in service and under the candidate; shares, null where undefined."""

    label: str
    n: int
    old_accuracy: Share | None
    accuracy: Share
    old_purity: Share | None
    purity: Share | None
    old_unknown_share: Share | None
    unknown_share: Share


class JudgementRecord(_Record):
    """Judgement on the golden set under one recipe."""

    recipe: str
    n_golden: int
    old_unknown_rate: Share | None
    unknown_rate: Share
    classes: tuple[GoldenRecord, ...]
    unproven: tuple[str, ...] = Field(description="Known classes of which there is no golden crop.")
    reasons: tuple[str, ...] = Field(description="Why the candidate is refused; empty where it is not.")


class CycleReport(_Record):
    """The report of one cycle."""

    schema_version: Literal[1] = SCHEMA_VERSION
    started_utc: str
    outcome: Literal["published", "refused", "nothing-new"]
    old_version: int | None = Field(description="Of the head in service before.")
    version: int | None = Field(description="Of the head that was published, else null.")
    n_claimed: Annotated[int, Field(ge=0)]
    n_duplicates: Annotated[int, Field(ge=0)]
    n_learned: Annotated[int, Field(ge=0, description="Unknowns that became training crops.")]
    n_corrected: Annotated[int, Field(ge=0, description="Unknowns that a person's correction made crops.")] = 0
    conflicts: tuple[str, ...] = Field(default=(), description="Defects that people contradict each other about.")
    n_bank: Annotated[int, Field(ge=0)]
    k: KRecord
    clusters: tuple[ClusterRecord, ...]
    judgements: tuple[JudgementRecord, ...]
    reasons: tuple[str, ...] = Field(default=(), description="Why the candidate does not serve; empty where it does.")
    timings_s: dict[str, float] = Field(description="Seconds by step, in the order of the cycle.")
    peak_memory_mb: float


def write(
    folder: Path,
    report: CycleReport,
    examples: Mapping[str, NDArray[np.uint8]],
    *,
    mapped: Bank | None = None,
    seed: int = 0,
) -> None:
    """Write pictures, words and last the JSON, each whole.

    Args:
        folder: made if absent; a report there is replaced.
        report: the content.
        examples: crops (n, S, S) by name of the cluster, the most typical first; 12 at most are shown, and none is
            drawn of a cluster without crops.
        mapped: crops to draw in two dimensions, clusters under their names; None: no map.
        seed: of the map.

    Raises:
        ConfigError: crops of a cluster that the report does not name, or crops of another shape.
        OSError: the disk refused.
    """
    names = [cluster.name for cluster in report.clusters]
    if strangers := sorted(set(examples) - set(names)):
        raise ConfigError(f"there are examples of {', '.join(strangers)}, which the report does not name")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).unlink(missing_ok=True)
    sheets = [name for name in names if len(examples.get(name, ()))]
    for cluster in report.clusters:
        if cluster.name in sheets:
            write_whole(folder / f"{cluster.name}.png", _png(_sheet(cluster, examples[cluster.name])))
    if mapped is not None and len(mapped) > 1:
        write_whole(folder / MAP, _png(_map(mapped, names, seed)))
        sheets.append(Path(MAP).stem)
    write_whole(folder / WORDS, _words(report, sheets).encode())
    write_whole(folder / JSON, (report.model_dump_json(indent=1) + "\n").encode())


def read(folder: Path) -> CycleReport:
    """Read what ``write`` wrote.

    Raises:
        ConfigError: there is no report, or it is damaged or of another release.
    """
    path = folder / JSON
    try:
        return CycleReport.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there: this cycle has not written its report") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is no cycle report of this release: {first_fault(error)}") from error


def judgement_record(recipe: str, judgement: Judgement) -> JudgementRecord:
    """Convert a judgement into a record of the report."""
    return JudgementRecord(
        recipe=recipe,
        n_golden=judgement.n_golden,
        old_unknown_rate=judgement.old_unknown_rate,
        unknown_rate=judgement.unknown_rate,
        classes=tuple(_golden_record(change) for change in judgement.classes),
        unproven=judgement.unproven,
        reasons=judgement.reasons,
    )


def _golden_record(change: ClassChange) -> GoldenRecord:
    old, new = change.old, change.new
    return GoldenRecord(
        label=change.label,
        n=new.n,
        old_accuracy=None if old is None else old.accuracy,
        accuracy=new.accuracy,
        old_purity=None if old is None else old.purity,
        purity=new.purity,
        old_unknown_share=None if old is None else old.unknown_share,
        unknown_share=new.unknown_share,
    )


def _words(report: CycleReport, pictures: Sequence[str]) -> str:
    parts = [
        f"# Learning cycle of {report.started_utc}\n",
        _outcome(report),
        "".join(f"- {line}\n" for line in _counts(report)),
        markdown(_cluster_table(report)) if report.clusters else "## Clusters\n\nNo new class was found.\n",
        *(_judgement(judgement) for judgement in report.judgements),
        markdown(_timing_table(report)),
        *(f"![{name}]({name}.png)\n" for name in pictures),
    ]
    return "\n".join(parts)


def _outcome(report: CycleReport) -> str:
    now = "no head serves yet" if report.old_version is None else f"head {report.old_version} goes on serving"
    if report.outcome == "published":
        after = "the first" if report.old_version is None else f"after head {report.old_version}"
        return f"**Published head {report.version}**, {after}.\n"
    if report.outcome == "nothing-new":
        return f"**Nothing new**: {now}.\n"
    reasons = [f"- {reason}\n" for reason in report.reasons]
    return f"**Refused**: {now}.\n\n" + "".join(reasons)


def _counts(report: CycleReport) -> list[str]:
    k, (low, high) = report.k, report.k.interval
    edge = ""
    if len(k.candidates) > 1 and high == k.candidates[-1]:
        edge = f"; {high} is the most that was looked for, so that there may be more"
    return [
        f"{report.n_claimed} unknowns were claimed, {report.n_duplicates} of them duplicates that were left out",
        f"{k.k} classes were estimated, between {low} and {high} with 90 % probability; {k.n_known} are known{edge}",
        f"{report.n_learned} unknowns became training crops beside {report.n_bank} of the bank",
        f"{report.n_corrected} more by people's corrections",
        *(f"people contradict each other: {conflict}" for conflict in report.conflicts),
        f"{report.peak_memory_mb:.0f} MB of memory at most",
    ]


def _cluster_table(report: CycleReport) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (c.name, c.size, c.cohesion, c.nearest_known, c.nearest_distance, c.cycles_seen, c.decision, "; ".join(c.why))
        for c in report.clusters
    ]
    columns = ("cluster", "crops", "cohesion", "nearest known", "distance", "cycles", "decision", "why")
    note = (
        "Cohesion is the mean silhouette among all classes, from -1 to 1. Distance is between mean directions, 0 to 2. "
        "Cycles in which the cluster has been seen."
    )
    return Table("Clusters", columns, tuple(rows), note)


def _judgement(judgement: JudgementRecord) -> str:
    rows: list[tuple[Cell, ...]] = [
        (
            *(c.label, c.n, c.old_accuracy, c.accuracy, c.old_purity, c.purity),
            *(c.old_unknown_share, c.unknown_share),
        )
        for c in judgement.classes
    ]
    columns = ("class", "crops", "accuracy old", "new", "purity old", "new", "unknown old", "new")
    rate = f"{100 * judgement.unknown_rate:.1f} %"
    if judgement.old_unknown_rate is not None:
        rate = f"{100 * judgement.old_unknown_rate:.1f} % -> {rate}"
    note = [
        f"Unknown of the defects among {judgement.n_golden} golden crops: {rate}. One crop is never a reason by itself."
    ]
    if judgement.unproven:
        note.append(f"Without a golden crop, so that nothing is proven of them: {', '.join(judgement.unproven)}.")
    note.append("Verdict: " + ("promoted." if not judgement.reasons else "refused. " + "; ".join(judgement.reasons)))
    return markdown(Table(f"Golden set, recipe {judgement.recipe}", columns, tuple(rows), "\n\n".join(note)))


def _timing_table(report: CycleReport) -> Table:
    rows: list[tuple[Cell, ...]] = [(step, float(seconds)) for step, seconds in report.timings_s.items()]
    rows.append(("in all", float(sum(report.timings_s.values()))))
    return Table("Seconds by step", ("step", "seconds"), tuple(rows))


@styled
def _sheet(cluster: ClusterRecord, crops: NDArray[np.uint8]) -> Figure:
    """Tile up to ``MAX_EXAMPLES`` crops under a line that says what they are."""
    if crops.ndim != 3 or crops.dtype != np.uint8:
        raise ConfigError(f"examples of {cluster.name} must be (n, S, S) uint8, not {crops.shape} {crops.dtype}")
    tiled = _tiled(crops[:MAX_EXAMPLES])
    height, width = tiled.shape
    inches = 8.4 * width / (ROW * (crops.shape[2] + 4) + 4)  # a crop is as large on a sheet of one as on one of twelve
    figure = Figure(figsize=(max(inches, 4.2), inches * height / width + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(tiled, cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    nearest = f", nearest {cluster.nearest_known}" if cluster.nearest_known else ""
    axes.set_title(
        f"{cluster.name} ({cluster.decision}): {min(len(crops), MAX_EXAMPLES)} of {cluster.size} crops, "
        f"cohesion {cluster.cohesion:.2f}{nearest}",
        loc="left",
    )
    return figure


def _tiled(crops: NDArray[np.uint8], gap: int = 4) -> NDArray[np.uint8]:
    """Crops (n, h, w) in rows of ``ROW`` on white."""
    n, h, w = crops.shape
    columns, rows = min(n, ROW), -(-n // ROW)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap), 255, np.uint8)
    for i, crop in enumerate(crops):
        y, x = gap + i // ROW * (h + gap), gap + i % ROW * (w + gap)
        sheet[y : y + h, x : x + w] = crop
    return sheet


def _map(mapped: Bank, clusters: Sequence[str], seed: int) -> Figure:
    shown = np.sort(np.random.default_rng(seed).permutation(len(mapped))[:MAX_POINTS])
    labels = [mapped.labels[i] for i in shown]
    return feature_map(mapped.features[shown], labels, seed=seed, novel=set(clusters))


def _png(figure: Figure) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()
