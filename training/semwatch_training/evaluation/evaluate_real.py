"""Protocol of real SEM: one run over all folders of ``real_data``, the served models through the daemon's own line.

    images -> line -> detection, gates, pixels, escapes, verdicts, references, labels, discovery, times
                 -> baselines on the same fields

Nothing of it may be tuned on: thresholds come from the recipe, the models from the repository.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.settings.recipe import Recipe
from semwatch_training.evaluation import (
    evaluation_data,
    plots,
    real_baselines,
    real_data,
    real_labels,
    real_line,
    real_parts,
    real_splits,
    real_tables,
    training_free,
)
from semwatch_training.evaluation.real_baselines import KeptMaps, Scored, Scores
from semwatch_training.evaluation.real_data import RealImage, RealSet
from semwatch_training.evaluation.real_line import KeptAnswers, Seen
from semwatch_training.evaluation.report import Cell, Result, Table
from semwatch_training.system.progress_bars import Progress

SHOWN_EACH, SHOWN = 2, 8
"""Examples of a folder's class, and of a sheet."""
BEFORE = "before"


def real(
    top: Path,
    *,
    repository: Path,
    seeds: Sequence[int],
    before: Path | None = None,
    parts: Path | None = None,
    held: Path | None = None,
    baselines: bool = True,
    threads: int | None = None,
    cache: Path,
    progress: Progress,
) -> Result:
    """Judge a repository's models on real SEM, beside detectors that nobody trained.

    Args:
        top: folder of the data set.
        repository: the models.
        seeds: of folds, draws and clusters.
        before: detector of another time, see ``real_baselines.before_scores``.
        parts: weights whose parts stand beside the whole, see ``real_parts``.
        held: another folder of the same layout, on which labels learnt on ``top`` are judged.
        baselines: whether the training-free detectors run.
        threads: processor threads of one network; None for all the machine has.
        cache: where answers, maps and trunks are kept.
        progress: called after every image.

    Raises:
        ConfigError: no image, or what the models refuse.
    """
    recipe, data = Recipe(), real_data.read(top)
    with KeptAnswers(repository, cache / "real", threads=threads) as models:
        looked = real_line.look(data.images, recipe, models, encode=_is_labelled, progress=progress)
        constant = real_line.look(
            real_line.constant_images(), recipe, models, encode=lambda _: False, progress=progress
        )
        held_seen = _held(held, recipe, models, progress)
        seen = [one for one in looked if one.page is not None]
        if not seen:
            raise ConfigError(f"the line refused every image of {top}, the first with: {looked[0].refused}")
        times = real_line.times_ms(seen, models)
        width = evaluation_data.frozen_width(models)
    processes = real_tables.processes(seen)
    groups = {(p.folder, p.clean): real_tables.groups_of(real_tables.of_process(seen, p)) for p in processes}
    engines = {real_tables.SERVED: _served(seen)} | _others(
        seen, groups, before=before, parts=parts, baselines=baselines, cache=cache, progress=progress
    )
    rate = recipe.gate.false_alarm_rate
    tables = [
        _absent_table(data, looked),
        real_tables.detection_table(seen, engines, groups),
        real_tables.pairs_table(seen, engines),
        real_tables.pixel_table(seen, engines),
        real_tables.gate_table(seen, groups, false_alarm_rate=rate, seeds=seeds),
        real_tables.escape_table(seen),
        real_tables.clean_table(seen),
        real_tables.verdict_table(seen),
        _constant_table(constant),
        real_tables.reference_table(seen),
        *_label_tables(seen, held_seen, width, evaluation_data.width_of_field(repository), seeds, progress),
        real_tables.time_table(times),
    ]
    return [table for table in tables if table is not None and table.rows], _figures(seen, engines)


def _held(held: Path | None, recipe: Recipe, models: KeptAnswers, progress: Progress) -> list[Seen]:
    if held is None:
        return []
    images = [image for image in real_data.read(held).images if _is_labelled(image)]
    if not images:
        raise ConfigError(f"{held} holds no {real_data.LINE_SPACE} with labels to judge; name a folder of that layout")
    return [
        one
        for one in real_line.look(images, recipe, models, encode=_is_labelled, progress=progress)
        if one.page is not None
    ]


def _is_labelled(image: RealImage) -> bool:
    return image.folder == real_data.LINE_SPACE and image.label in real_labels.EIGHT


def _served(seen: Sequence[Seen]) -> Scores:
    return {one.image.name: Scored(one.raw_score, one.score_map) for one in seen}


def _others(
    seen: Sequence[Seen],
    groups: Mapping[tuple[str, str], NDArray[np.intp]],
    *,
    before: Path | None,
    parts: Path | None,
    baselines: bool,
    cache: Path,
    progress: Progress,
) -> dict[str, Scores]:
    """Scores of the other detectors: that of another time, parts of one, and the training-free ones."""
    found: dict[str, Scores] = {}
    compared = [one for one in seen if one.image.folder in {process.folder for process in real_tables.processes(seen)}]
    if before is not None:
        found[BEFORE] = real_baselines.before_scores(before, compared, cache, progress=progress)
    if parts is not None:
        found |= real_parts.part_scores(parts, compared, cache, progress=progress)
    if baselines:
        kept = KeptMaps(cache / "real" / "maps.npz")
        found |= real_baselines.training_free_scores(compared, cache, kept, progress=progress)
        nearest: Scores = {}
        for process in real_tables.processes(seen):
            some, of_group = real_tables.of_process(seen, process), groups[process.folder, process.clean]
            folds = real_splits.folds_of(
                ["clean" if one.image.label == process.clean else "defective" for one in some],
                of_group,
                n_folds=real_baselines.FOLDS,
                seed=0,
            )
            nearest |= real_baselines.nearest_patch_scores(some, folds, cache, kept, progress=progress)
        found[training_free.NEAREST] = nearest
    return found


def _absent_table(data: RealSet, looked: Sequence[Seen]) -> Table | None:
    """What of the layout is not there, and what the line refused: nothing of it is in the figures."""
    rows = [(name, "absent") for name in data.absent]
    rows += [(one.image.name, f"refused: {one.refused}") for one in looked if one.page is None]
    return Table("Left out", ("what", "why"), tuple(rows)) if rows else None


def _constant_table(constant: Sequence[Seen]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in constant:
        if one.page is None:
            rows.append((one.image.label, None, None, None, f"refused: {one.refused}"))
        else:
            raw, n = one.raw_score, len(one.page.defects)
            rows.append((one.image.label, raw, "open" if one.is_opened else "shut", n, ""))
    note = (
        "A blank image is no image of a wafer: a line that refuses it says so; one that finds defects in it does not."
    )
    return Table("Constant images, made here", ("image", "raw score", "gate", "regions", "said"), tuple(rows), note)


def _label_tables(
    seen: Sequence[Seen], held: Sequence[Seen], width: int, of_field: int, seeds: Sequence[int], progress: Progress
) -> list[Table]:
    tables: list[Table] = []
    eight = real_labels.labelled(seen, real_labels.EIGHT)
    if eight is not None:
        tables.append(real_labels.label_table(eight, seeds=seeds, progress=progress))
        if held and (judged := real_labels.labelled(held, sorted(set(eight.labels.tolist())))) is not None:
            tables.append(real_labels.held_table(eight, judged, seeds=seeds, progress=progress))
        tables += real_labels.stranger_tables(eight, width, width - of_field, seeds=seeds)
    five = real_labels.labelled(seen, real_labels.FIVE)
    if five is not None:
        tables.append(real_labels.cluster_table(five, seeds=seeds))
        tables.append(real_labels.discovery_table(five, width, seeds=seeds, progress=progress))
    return tables


# ---- pictures ----


def _figures(seen: Sequence[Seen], engines: Mapping[str, Scores]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    by_folder: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}
    by_engine: dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]] = {}
    for process in real_tables.processes(seen):
        pooled = [label for labels in process.defects.values() for label in labels]
        if real_tables.FOUR in process.defects:
            pooled = list(process.defects[real_tables.FOUR])
        some = [one for one in real_tables.of_process(seen, process) if one.image.label in (process.clean, *pooled)]
        defective = np.array([one.image.label != process.clean for one in some])
        name = f"{process.folder} {process.clean}" if process.folder == real_data.LINE_SPACE else process.folder
        by_folder[name] = np.array([one.raw_score for one in some], np.float64), defective
        if real_tables.FOUR in process.defects:
            for engine, scores in engines.items():
                if all(one.image.name in scores for one in some):
                    by_engine[engine] = np.array([scores[one.image.name].raw for one in some]), defective
    if by_folder:
        figures["ROC of the served detector by folder"] = plots.roc(by_folder)
    if by_engine:
        figures["ROC of all engines, clean layer against four defects"] = plots.roc(by_engine)
    escapes = [one for one in seen if one.image.defective and real_line.passed_by(one) is not None]
    if escapes:
        escapes.sort(key=lambda one: -one.raw_score)
        figures["Escapes: defective images passed as defect-free"] = _sheet(escapes)
    alarms = [one for one in seen if one.image.defective is False and one.has_defect_verdict]
    if alarms:
        alarms.sort(key=lambda one: -one.raw_score)
        figures["False alarms: clean images with a defect verdict"] = _sheet(alarms)
    return figures


def _sheet(ordered: Sequence[Seen]) -> Figure:
    """The first of each folder's classes, the worst first."""
    chosen: list[Seen] = []
    counts: dict[tuple[str, str], int] = {}
    for one in ordered:
        key = one.image.folder, one.image.label
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= SHOWN_EACH and len(chosen) < SHOWN:
            chosen.append(one)
    sheet = []
    for one in chosen:
        page, truth = one.reviewed, one.truth
        verdict, label = real_line.page_verdict(page.defects)
        passer = real_line.passed_by(one) if one.image.defective else None
        words = f"let pass by the {passer}" if passer else label or verdict
        caption = f"{one.image.folder[:20]}\n{one.image.label}\n{one.raw_score:.3g}\n{words}"
        empty = np.zeros((2, 2), np.bool_)
        sheet.append(plots.Example(caption, one.field, one.score_map, page.mask, empty if truth is None else truth))
    return plots.examples(sheet)
