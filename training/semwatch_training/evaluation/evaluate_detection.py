"""Protocol of detection: several engines over the same labelled fields, one table.

An engine is what the model repository serves: a network from uint8 gray (B, S, S) to a score map and a raw score. The
spread is over the seeds an engine was fitted with; an engine that has none stands alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from semwatch.defects import DEFECT_FREE, ScoreMap
from semwatch.errors import ConfigError
from semwatch.line import binarization
from semwatch.line.detection import own_scale
from semwatch.line.scaling import resize
from semwatch_training.data.datasets import Sample, load_gray, load_mask, synthetic_set
from semwatch_training.evaluation import plots
from semwatch_training.evaluation.binarization_rules import mask_table
from semwatch_training.evaluation.report import Cell, Result, Table
from semwatch_training.metrics import detection_metrics
from semwatch_training.metrics.uncertainty import Rate, Spread
from semwatch_training.system.progress_bars import Progress

MAX_EXAMPLES = 8


class Field(NamedTuple):
    """A field of view (H, W) uint8, its label, and where its defect lies (H, W)."""

    image: NDArray[np.uint8]
    label: str
    mask: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """One engine, fitted once or with several seeds."""

    graphs: tuple[nn.Module, ...]
    input_px: int | None
    """Side of the square that a field is resized to; None: fields are judged at their own scale, in tiles if large."""
    normals: str
    """What it was shown of the images judged: ``"none"`` is support-set-free, else how many normal ones."""
    thresholds: tuple[float, ...] = ()
    """Gate of each graph at the stated false alarm rate; none where nothing was calibrated."""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What one graph says of all fields."""

    raw: NDArray[np.float64]
    maps: list[NDArray[np.float32]]


def of_samples(samples: Sequence[Sample]) -> Iterator[Field]:
    """Read labelled images, one field per file; all of an image's defects are in its mask."""
    for sample in {sample.image: sample for sample in samples}.values():
        image = load_gray(sample)
        yield Field(image, sample.label, load_mask(sample, (image.shape[0], image.shape[1]), whole_image=True))


def synthetic(stage: str, *, n_normal: int, n_per_type: int, first_seed: int, side_px: int = 768) -> Iterator[Field]:
    """Render labelled fields of one process stage."""
    for made in synthetic_set(stage, n_normal=n_normal, n_per_type=n_per_type, first_seed=first_seed, side_px=side_px):
        yield Field(made.pixels, made.labels[0] if made.labels else DEFECT_FREE, np.asarray(made.masks.any(axis=0)))


def judge(
    engines: Mapping[str, Engine], fields: Iterable[Field], n: int, *, progress: Progress
) -> tuple[list[Field], dict[str, list[Judged]]]:
    """Run every engine over n fields, each read once.

    Returns:
        The fields, and by engine one ``Judged`` for each of its graphs.

    Raises:
        ConfigError: there is no field.
    """
    kept: list[Field] = []
    raw: dict[str, list[list[float]]] = {name: [[] for _ in engine.graphs] for name, engine in engines.items()}
    maps: dict[str, list[list[NDArray[np.float32]]]] = {
        name: [[] for _ in engine.graphs] for name, engine in engines.items()
    }
    for field in fields:
        kept.append(field)
        for name, engine in engines.items():
            for index, graph in enumerate(engine.graphs):
                found = look(graph, field.image, engine.input_px)
                raw[name][index].append(found.raw_score)
                maps[name][index].append(found.values)
        progress("fields", len(kept), n)
    if not kept:
        raise ConfigError("there is no image to judge")
    judged = {name: [Judged(np.array(r), m) for r, m in zip(raw[name], maps[name], strict=True)] for name in engines}
    return kept, judged


def look(graph: nn.Module, image: NDArray[np.uint8], input_px: int | None) -> ScoreMap:
    """What a network says of an image (H, W), resized to ``input_px`` a side or at its own scale."""

    def ask(tile: NDArray[np.uint8]) -> ScoreMap:
        with torch.no_grad():
            score_map, score, *_ = graph(torch.from_numpy(np.ascontiguousarray(tile)[None]))
        return ScoreMap(score_map[0].numpy(), float(score[0]))

    return own_scale(image, ask) if input_px is None else ask(resize(image, (input_px, input_px)))


def detection(
    engines: Mapping[str, Engine],
    fields: Iterable[Field],
    n: int,
    *,
    false_alarm_rate: float,
    note: str,
    progress: Progress,
) -> Result:
    """Judge engines on n labelled fields: by image, by pixel, by class, and what their gates do to normal fields.

    Defective fields with an empty mask count by image and are left out by pixel.

    Raises:
        ConfigError: no normal field, or none with a defect that its mask marks.
    """
    kept, judged = judge(engines, fields, n, progress=progress)
    labels = np.array([field.label for field in kept])
    defective = labels != DEFECT_FREE
    drawn = [i for i, field in enumerate(kept) if not defective[i] or field.mask.any()]
    masks = [kept[i].mask for i in drawn]
    rows: list[tuple[Cell, ...]] = []
    class_rows: list[tuple[Cell, ...]] = []
    classes = sorted(set(labels.tolist()) - {DEFECT_FREE})
    for name, runs in judged.items():
        by_image = [
            (
                detection_metrics.image_auroc(run.raw, defective),
                detection_metrics.average_precision(run.raw, defective),
                detection_metrics.f1_max(run.raw, defective).f1,
            )
            for run in runs
        ]
        by_pixel = [detection_metrics.pixel_metrics([run.maps[i] for i in drawn], masks) for run in runs]
        columns = [*zip(*by_image, strict=True), *zip(*((p.auroc, p.aupro) for p in by_pixel), strict=True)]
        alarms = _false_alarms(engines[name], runs, ~defective)
        rows.append((name, engines[name].normals, *(Spread.of(column) for column in columns), alarms))
        found = [detection_metrics.class_auroc(run.raw, labels, DEFECT_FREE) for run in runs]
        class_rows.append((name, *(Spread.of([f[c] for f in found]) for c in classes)))
    size = "x".join(map(str, detection_metrics.SIZE_HW))
    note = (
        f"{note} {len(kept)} fields, {int((~defective).sum())} normal; pixel figures at {size} over {len(drawn)} of "
        f"them; the gate is set for {false_alarm_rate:.0%} false alarms from held-out normal images: fewer is better."
    )
    header = ("engine", "normals shown", "image AUROC", "AP", "F1-max", "pixel AUROC", "AUPRO", "false alarms")
    tables = [
        Table("Detection", header, tuple(rows), note),
        Table("Detection by class, image AUROC", ("engine", *classes), tuple(class_rows)),
    ]
    best = next(iter(judged))
    figures = {
        "ROC by image, first seed": plots.roc({name: (runs[0].raw, defective) for name, runs in judged.items()}),
        f"Examples: {best}": _examples(kept, judged[best][0], engines[best]),
    }
    of_best = {best: (judged[best][0].maps, [field.mask for field in kept])}
    return [*tables, mask_table(of_best, title=f"Masks from the maps of {best}")], figures


def _false_alarms(engine: Engine, runs: Sequence[Judged], normal: NDArray[np.bool_]) -> Rate | None:
    """Mean over all seeds, or None where the engine has no gate."""
    if not engine.thresholds:
        return None
    hits = sum(int((run.raw[normal] > t).sum()) for run, t in zip(runs, engine.thresholds, strict=True))
    # Seeds judge the same images: their alarms are not independent, so the interval is that of one run.
    n = int(normal.sum())
    return replace(Rate.of(round(hits / len(runs)), n), rate=hits / (n * len(runs)))


def _examples(fields: Sequence[Field], judged: Judged, engine: Engine) -> Figure:
    """A few of every class, those in the middle of its scores: neither the best nor the worst."""
    labels = np.array([field.label for field in fields])
    classes = sorted(set(labels.tolist()))
    chosen: list[int] = []
    for name in classes:
        members = np.flatnonzero(labels == name)
        ordered = members[np.argsort(judged.raw[members])]
        chosen.append(int(ordered[len(ordered) // 2]))
    chosen = chosen[:MAX_EXAMPLES]
    gate = engine.thresholds[0] if engine.thresholds else float(np.median(judged.raw))
    sheet = []
    for index in chosen:
        field, score_map = fields[index], judged.maps[index]
        opened = judged.raw[index] > gate
        mask = binarization.binarize(score_map).mask if opened else np.zeros((2, 2), bool)
        caption = f"{field.label}\n{judged.raw[index]:.3g}{'' if opened else ', gate shut'}"
        sheet.append(plots.Example(caption, field.image, score_map, mask, field.mask))
    return plots.examples(sheet)
