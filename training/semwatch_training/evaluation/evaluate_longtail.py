"""Heads on long tails: every way to fit one, on the same tails, judged on the same crops that no tail holds.

A tail is cut from three quarters of the crops, near duplicates together; the other quarter is judged as it is. Classes
are ordered by how many crops there are of each, ties by chance, and thinned to the tail's shape. The third of the
classes with most crops to learn from are the many, the last third the few.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semwatch.errors import ConfigError
from semwatch.models.inference import Embedded
from semwatch_training.evaluation import longtail_data, real_splits
from semwatch_training.evaluation.evaluation_data import Source
from semwatch_training.evaluation.longtail_data import Joined
from semwatch_training.evaluation.longtail_methods import CLUSTERED, METHODS, Fitted, Tail
from semwatch_training.evaluation.report import Cell, Result, Table
from semwatch_training.families.recame.export import regions_of
from semwatch_training.families.recame.network import Regions
from semwatch_training.metrics.adc_metrics import purity_contribution_curve
from semwatch_training.metrics.uncertainty import Spread
from semwatch_training.system.progress_bars import Progress

FOLDS = 4
CARINTHIA = "Carinthia's shape"
CARINTHIA_COUNTS = (4008, 289, 227, 55, 8, 4)
"""Crops of its six classes; between them the shape is log-linear."""
TAILS: Mapping[str, float] = {"10:1": 10.0, "50:1": 50.0, "100:1": 100.0}
CONTRIBUTION = 0.9
N_LOOKS = 3
"""Looks of a planted class of few."""
MIN_CLASSES = 3 * (N_LOOKS + 1)
"""A third of them are few: the looks of one planted class, and one that hides in the largest."""
TIMED = 256


class Split(NamedTuple):
    """One tail and the crops that judge it."""

    tail: Tail
    judged: NDArray[np.intp]
    """Rows."""
    truth: NDArray[np.intp]


class Figures(NamedTuple):
    """Of one way to fit on one tail."""

    overall: float
    many: float
    medium: float
    few: float
    macro: float
    purity: float
    """Of the surest nine tenths."""
    milliseconds: float
    """Of a head for one crop, one thread, in batches of 256."""


def of_sources(
    sources: Sequence[Source], *, most: int, tails: Sequence[str] | None, seeds: Sequence[int], progress: Progress
) -> Result:
    """Join sets of labelled images and judge every way on every tail of them.

    Args:
        sources: of one repository, whose encoder may give regions.
        most: images of a class of a folder.
        tails: names; None: all.
        seeds: of splits, tails and fits.
        progress: called after every image and every way.

    Raises:
        ConfigError: see ``longtail_data.joined`` and ``longtail``.
    """
    crops = longtail_data.joined(sources, most=most, progress=progress)
    with Embedded(sources[0].repository, models=("detector", "encoder")) as models:
        regions = regions_of(models.meta("encoder").provenance)
    return longtail(crops, regions, tails=tails or (*TAILS, CARINTHIA), seeds=seeds, progress=progress)


def longtail(
    crops: Joined, regions: Regions, *, tails: Sequence[str], seeds: Sequence[int], progress: Progress
) -> Result:
    """Judge every way on every tail, and some on classes of planted clusters.

    Raises:
        ConfigError: fewer than twelve classes of four groups or more, or a tail that nobody knows.
    """
    crops = _usable(crops)
    if strangers := sorted(set(tails) - {*TAILS, CARINTHIA}):
        raise ConfigError(f"no tail is called {', '.join(strangers)}; choose from {', '.join((*TAILS, CARINTHIA))}")
    tables = [_table(crops, regions, name, seeds, progress) for name in tails]
    return [*tables, _clustered(crops, regions, seeds, progress)], {}


def _usable(crops: Joined) -> Joined:
    """Without classes that cannot be both learnt and judged."""
    names = np.unique(crops.labels)
    kept = [name for name in names if len(np.unique(crops.groups[crops.labels == name])) >= FOLDS]
    if len(kept) < MIN_CLASSES:
        raise ConfigError(f"long tails need {MIN_CLASSES} classes of {FOLDS} unlike images; these have {len(kept)}")
    rows = np.isin(crops.labels, kept)
    return Joined(crops.features[rows], crops.labels[rows], crops.groups[rows])


def shape(name: str, n_classes: int, most: int) -> NDArray[np.intp]:
    """Crops of each class of a tail, the largest first, at least one of each: (K,)."""
    rank = np.linspace(0, 1, n_classes)
    if name == CARINTHIA:
        counts = np.array(CARINTHIA_COUNTS) / CARINTHIA_COUNTS[0]
        share = np.exp(np.interp(rank, np.linspace(0, 1, len(counts)), np.log(counts)))
    else:
        share = TAILS[name] ** -rank
    return np.maximum(1, np.round(most * share)).astype(np.intp)


def split(crops: Joined, regions: Regions, name: str, seed: int) -> Split:
    """Cut a tail."""
    names, y = np.unique(crops.labels, return_inverse=True)
    fold = real_splits.folds_of(crops.labels.tolist(), crops.groups, n_folds=FOLDS, seed=seed)
    judged, rng = fold == 0, np.random.default_rng(seed)
    available = np.bincount(y[~judged], minlength=len(names))
    order = rng.permutation(len(names))
    order = order[np.argsort(-available[order], kind="stable")]
    wanted = shape(name, len(names), int(available.max()))
    rows = [rng.permutation(np.flatnonzero((y == k) & ~judged))[:n] for k, n in zip(order, wanted, strict=True)]
    learnt = np.concatenate(rows)
    tail = Tail(crops.features[learnt], y[learnt], len(names), regions, seed)
    return Split(tail, np.flatnonzero(judged), y[judged])


def figures(fitted: Fitted, one: Split, features: NDArray[np.float32]) -> Figures:
    """Judge one head."""
    given = torch.from_numpy(features[one.judged])
    with torch.no_grad():
        logits = fitted(given).double()
        milliseconds = _milliseconds(fitted, given)
    sure, named = (values.numpy() for values in logits.softmax(dim=1).max(dim=1))
    right = named == one.truth
    curve = purity_contribution_curve(right, sure)
    classes = np.unique(one.truth)
    recall = np.full(one.tail.n_classes, np.nan)
    recall[classes] = [right[one.truth == k].mean() for k in classes]
    by_size = np.array_split(np.argsort(-one.tail.counts.numpy(), kind="stable"), 3)
    many, medium, few = (float(np.nanmean(recall[part])) for part in by_size)
    purity = float(curve.purity[curve.contribution >= CONTRIBUTION][0])
    return Figures(float(right.mean()), many, medium, few, float(np.nanmean(recall)), purity, milliseconds)


def _milliseconds(fitted: Fitted, given: Tensor) -> float:
    batch = given[torch.arange(TIMED) % len(given)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = []
        for _ in range(50):  # the least of many: beside other work most are too long
            start = time.perf_counter()
            fitted(batch)
            taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1000 * min(taken) / TIMED


def _table(crops: Joined, regions: Regions, name: str, seeds: Sequence[int], progress: Progress) -> Table:
    splits = [split(crops, regions, name, seed) for seed in seeds]
    rows: list[tuple[Cell, ...]] = []
    for done, (method, fit) in enumerate(METHODS.items(), start=1):
        found = [figures(fit(one.tail), one, crops.features) for one in splits]
        rows.append((method, *(Spread.of(column) for column in zip(*found, strict=True))))
        progress(f"tail {name}", done, len(METHODS))
    counts = np.sort(splits[0].tail.counts.numpy().astype(int))[::-1]
    note = (
        f"{len(counts)} classes, {counts.sum()} crops to learn from in the first split, {counts[0]} of the largest "
        f"class and {counts[-1]} of the smallest ({np.count_nonzero(counts == 1)} classes have one), "
        f"{len(splits[0].judged)} to judge by; near duplicates together; seeds {list(seeds)}. Purity is that of the "
        f"surest {CONTRIBUTION:.0%}; milliseconds are of the head alone, for one crop: lower is better."
    )
    columns = ("head", "overall", "many", "medium", "few", "macro recall", "purity", "ms")
    return Table(f"Long tail, {name}", columns, tuple(rows), note)


# ---- clusters within classes ----


class Planted(NamedTuple):
    """A tail whose classes were merged, and which judged crops show the merged looks."""

    split: Split
    many_in_few: NDArray[np.bool_]
    """Judged crops of a class of few crops that has several looks."""
    few_in_many: NDArray[np.bool_]
    """Judged crops of a rare look within the largest class."""


def planted(one: Split) -> Planted:
    """Merge classes of a tail: three of the few into one, and one more of the few into the largest."""
    order = np.argsort(-one.tail.counts.numpy(), kind="stable")
    few = np.random.default_rng(one.tail.seed).permutation(order[-(len(order) // 3) :])
    looks, rare = few[:N_LOOKS], few[N_LOOKS]
    name_of = np.arange(one.tail.n_classes)
    name_of[looks], name_of[rare] = looks[0], order[0]
    kept, numbers = np.unique(name_of, return_inverse=True)
    tail = Tail(one.tail.features, numbers[one.tail.y], len(kept), one.tail.regions, one.tail.seed)
    merged = Split(tail, one.judged, numbers[one.truth])
    return Planted(merged, np.isin(one.truth, looks), one.truth == rare)


def _clustered(crops: Joined, regions: Regions, seeds: Sequence[int], progress: Progress) -> Table:
    made = [planted(split(crops, regions, "50:1", seed)) for seed in seeds]
    rows: list[tuple[Cell, ...]] = []
    for done, method in enumerate(CLUSTERED, start=1):
        found = [_of_planted(METHODS[method], one, crops.features) for one in made]
        rows.append((method, *(Spread.of(column) for column in zip(*found, strict=True))))
        progress("clusters within classes", done, len(CLUSTERED))
    note = (
        f"The tail 50:1, in which {N_LOOKS} classes of few crops are one class (many looks in few crops), and one more "
        f"is part of the largest (a few crops of another look in many); recall of the crops with these looks; seeds "
        f"{list(seeds)}."
    )
    columns = ("head", "overall", "macro recall", "many-in-few", "few-in-many")
    return Table("Clusters within classes", columns, tuple(rows), note)


def _of_planted(
    fit: Callable[[Tail], Fitted], one: Planted, features: NDArray[np.float32]
) -> tuple[float, float, float, float]:
    fitted = fit(one.split.tail)
    whole = figures(fitted, one.split, features)
    with torch.no_grad():
        named = fitted(torch.from_numpy(features[one.split.judged])).argmax(dim=1).numpy()
    right = named == one.split.truth
    return whole.overall, whole.macro, float(right[one.many_in_few].mean()), float(right[one.few_in_many].mean())
