"""Pictures of an evaluation, each a matplotlib `Figure` of its own: nothing global is touched, nothing is shown.

One quiet style; colours are Okabe and Ito's, told apart by colour-blind eyes too, and never carry a meaning alone:
lines differ in stroke as well, classes in marker.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from semwatch.errors import ConfigError
from semwatch_training.metrics.adc_metrics import PurityCurve
from semwatch_training.metrics.detection_metrics import image_auroc

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
STROKES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#333333", "#DDDDDD"
STYLE: Any = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "lines.linewidth": 1.8,
    "legend.frameon": False, "figure.facecolor": "white", "image.interpolation": "nearest",
    "text.parse_math": False,
}  # fmt: skip

NOT_DECIDED = "not decided"

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class KCurve:
    """One rule's criterion over the candidates of k, and the k it chose."""

    k: Sequence[int]
    criterion: Sequence[float]
    chosen: int


@dataclass(frozen=True, slots=True)
class Example:
    """One image of the examples sheet; score map and masks may be of any size, they are drawn over the whole image."""

    caption: str
    image: NDArray[np.uint8]
    score_map: NDArray[np.floating]
    mask: NDArray[np.bool_]
    truth: NDArray[np.bool_]


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in this file's style and leave matplotlib's settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def roc(engines: Mapping[str, tuple[NDArray[np.floating], NDArray[np.bool_]]]) -> Figure:
    """Draw the ROC curves of several engines, best first in the legend.

    Args:
        engines: by name, scores (n,) and whether each is defective.

    Raises:
        ConfigError: there is no engine, or as `image_auroc`.
    """
    _need(engines, "engine")
    auroc = {name: image_auroc(*samples) for name, samples in engines.items()}
    figure, axes = one_axes(4.8, 4.8)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for index, name in enumerate(sorted(auroc, key=auroc.__getitem__, reverse=True)):
        scores, defective = engines[name]
        false_alarms, found, _ = roc_curve(defective, scores)
        axes.plot(false_alarms, found, label=f"{auroc[name]:.3f}  {name}", **_line(index), clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="normal images called defective", ylabel="defects found")
    _percent(axes, "xy")
    axes.legend(loc="lower right", title="AUROC", alignment="left", frameon=True, edgecolor="none")
    return figure


@styled
def confusion(truth: Sequence[str], verdicts: Sequence[str | None]) -> Figure:
    """Draw a confusion matrix: counts in the cells, shade by share of the true class (row).

    Args:
        truth: true label of each sample.
        verdicts: what each was called; None gets a column of its own, "not decided".

    Raises:
        ConfigError: empty, or of unequal length.
    """
    if len(truth) != len(verdicts) or not truth:
        raise ConfigError(f"need one label and one verdict per sample, not {len(truth)} and {len(verdicts)}")
    rows = sorted(set(truth))
    columns = sorted({v for v in verdicts if v is not None} | set(rows)) + [NOT_DECIDED] * (None in verdicts)
    counts = np.zeros((len(rows), len(columns)), np.int64)
    for label, verdict in zip(truth, verdicts, strict=True):
        counts[rows.index(label), -1 if verdict is None else columns.index(verdict)] += 1
    shares = counts / counts.sum(1, keepdims=True)
    figure, axes = one_axes(2.2 + 0.55 * len(columns), 1.8 + 0.5 * len(rows))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [f"{name} ({n})" for name, n in zip(rows, counts.sum(1), strict=True)])
    axes.set(xlabel="called", ylabel="true class (samples)")
    axes.grid(visible=False)
    for edge in range(1, max(counts.shape)):  # white gaps between the cells
        axes.axhline(edge - 0.5, color="white", linewidth=1)
        axes.axvline(edge - 0.5, color="white", linewidth=1)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


@styled
def k_curves(
    rules: Mapping[str, KCurve], *, interval: tuple[int, int] | None = None, truth: int | None = None
) -> Figure:
    """Draw each rule's criterion over k, scaled to its own range, with a dot at the k it chose.

    Args:
        rules: by name.
        interval: of the default rule, inclusive: a band.
        truth: the true k, where known: a vertical line.

    Raises:
        ConfigError: there is no rule, or its curve is of unequal length or has no finite value at its chosen k.
    """
    _need(rules, "rule")
    figure, axes = one_axes(6.6, 3.8)
    if interval is not None:
        axes.axvspan(
            interval[0] - 0.5, interval[1] + 0.5, color="#F0F0F0", label=f"interval {interval[0]}–{interval[1]}"
        )
    if truth is not None:
        axes.axvline(truth, color=INK, linewidth=1, linestyle=(0, (2, 2)), label=f"truth {truth}")
    for index, (name, curve) in enumerate(rules.items()):
        ks, values = np.asarray(curve.k), np.array(curve.criterion, dtype=np.float64)
        if ks.shape != values.shape or not np.isfinite(values[ks == curve.chosen]).any():
            raise ConfigError(f"rule {name!r}: need a criterion for each k, a finite one for the chosen {curve.chosen}")
        values[~np.isfinite(values)] = np.nan  # a gap in the line
        low, high = np.nanmin(values), np.nanmax(values)
        scaled = (values - low) / (high - low) if high > low else values * 0 + 0.5
        axes.plot(ks, scaled, label=f"{name}: {curve.chosen}", **_line(index))
        axes.plot(curve.chosen, scaled[ks == curve.chosen][0], "o", color=_line(index)["color"], markersize=7, zorder=3)
    axes.set(xlabel="number of classes k", ylabel="criterion, scaled to its range", ylim=(-0.06, 1.06), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled
def purity_contribution(curves: Mapping[str, PurityCurve], *, target: float | None = None) -> Figure:
    """Draw purity over contribution for each class, under a line at the target purity.

    Raises:
        ConfigError: there is no curve.
    """
    _need(curves, "curve")
    figure, axes = one_axes(6.6, 4.2)
    if target is not None:
        axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (2, 2)), label=f"target {100 * target:g} %")
    for index, (name, curve) in enumerate(curves.items()):
        steps = np.append(0, curve.contribution), np.append(curve.purity[0], curve.purity)
        axes.plot(*steps, label=f"{name} ({100 * curve.purity[-1]:.0f} %)", **_line(index), clip_on=False)
    lowest = min(*(curve.purity.min() for curve in curves.values()), 1.0 if target is None else target)
    axes.set(xlim=(0, 1), ylim=(max(0.0, math.floor(lowest * 20 - 1) / 20), 1.0))
    axes.set(xlabel="contribution: calls kept, the surest first", ylabel="purity: kept calls that are right")
    _percent(axes, "xy")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="called (all kept)", alignment="left")
    return figure


@styled
def examples(sheet: Sequence[Example], *, scale: tuple[float, float] | None = None) -> Figure:
    """Draw a sheet of examples: image, score map, found contour and true contour, a row each.

    Args:
        sheet: at most a dozen read well.
        scale: score drawn black and score drawn brightest, the same for all rows (the gate threshold is a good middle);
            None: the 1 % and 99.9 % quantiles of all maps. A scale per image would make every clean map look defective.

    Raises:
        ConfigError: there is no example.
    """
    _need(sheet, "example")
    scores = np.concatenate([example.score_map.ravel() for example in sheet])
    low, high = scale or (float(np.quantile(scores, 0.01)), float(np.quantile(scores, 0.999)))
    figure = Figure(figsize=(8.4, 0.35 + 2.1 * len(sheet)), layout="constrained")
    grid = figure.subplots(len(sheet), 4, squeeze=False)
    for row, example in zip(grid, sheet, strict=True):
        height, width = example.image.shape[:2]
        extent = (0, width, height, 0)
        for axes in row:
            axes.imshow(example.image, cmap="gray", vmin=0, vmax=255, extent=extent)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.grid(visible=False)
        row[1].imshow(example.score_map, cmap="inferno", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
        _contour(row[2], example.mask, extent, COLOURS[4])
        _contour(row[3], example.truth, extent, COLOURS[5])
        row[0].set_ylabel(example.caption)
    for axes, title in zip(grid[0], ("image", f"score, {low:.3g} to {high:.3g}", "found", "truth"), strict=True):
        axes.set_title(title)
    return figure


def one_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure of a size in inches with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _line(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STROKES[index % len(STROKES)]}


def _percent(axes: Axes, which: str) -> None:
    for name in which:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _contour(axes: Axes, mask: NDArray[np.bool_], extent: tuple[int, int, int, int], colour: str) -> None:
    """Outline a mask; a border of false closes contours at the image's edge, and an empty one draws nothing."""
    if not mask.any():
        return
    height, width = mask.shape
    xs = (np.arange(-1, width + 1) + 0.5) * extent[1] / width
    ys = (np.arange(-1, height + 1) + 0.5) * extent[2] / height
    axes.contour(xs, ys, np.pad(mask, 1).astype(np.float32), [0.5], colors=[colour], linewidths=1.6)


def _need(things: Mapping[str, object] | Sequence[object], what: str) -> None:
    if not things:
        raise ConfigError(f"nothing to draw: give one {what} at least")
