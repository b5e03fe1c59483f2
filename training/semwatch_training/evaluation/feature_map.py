"""The map of features: what lies near what, in the plane."""

from collections.abc import Collection, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from semwatch.errors import ConfigError
from semwatch_training.evaluation.plots import COLOURS, MARKERS, one_axes, styled

MAX_POINTS = 3000
"""t-SNE of more points than this takes minutes and shows a blot; a seeded sample is shown instead."""
MIN_TSNE = 50
MAX_LEGEND_ROWS = 20


def embed(features: NDArray[np.floating], *, seed: int) -> NDArray[np.float64]:
    """Lay features (N, D) out in the plane (N, 2): PCA, and over it t-SNE where N > 50.

    Raises:
        ConfigError: fewer than 2 samples, or a feature is not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise ConfigError(f"a map needs two samples of one feature at least, not {features.shape}")
    if not np.isfinite(features).all():
        raise ConfigError("some features are not finite")
    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2))  # identical samples are one point, not a cloud of rounding errors
    left, spread, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    components = left[:, :50] * spread[:50]
    if len(features) <= MIN_TSNE:
        return np.column_stack([components, np.zeros(len(features))])[:, :2]  # a single feature has no second component
    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, random_state=seed, init="random").fit_transform(components)
    return np.asarray(points, dtype=np.float64)


@styled
def feature_map(
    features: NDArray[np.floating], labels: Sequence[str], *, seed: int, novel: Collection[str] = ()
) -> Figure:
    """Draw features (N, D) in the plane (`embed`), coloured by class; distances between clouds mean little.

    Args:
        features: at most 3,000 are shown, a seeded sample.
        labels: class of each.
        seed: of the sample and the embedding.
        novel: classes to draw as rings, told so in the legend.

    Raises:
        ConfigError: as `embed`, or of unequal length.
    """
    if len(features) != len(labels):
        raise ConfigError(f"need a label per feature, not {len(labels)} for {len(features)}")
    shown = np.sort(np.random.default_rng(seed).permutation(len(labels))[:MAX_POINTS])
    points, names = embed(np.asarray(features)[shown], seed=seed), np.asarray(labels)[shown]
    figure, axes = one_axes(6.6, 4.8)
    for index, name in enumerate(np.unique(names)):
        mine, colour = names == name, COLOURS[index % len(COLOURS)]
        axes.scatter(
            points[mine, 0],
            points[mine, 1],
            s=26,
            linewidth=1 if name in novel else 0.4,
            marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            facecolor="none" if name in novel else colour,
            edgecolor=colour if name in novel else "white",
            alpha=0.85,
            label=f"{name}{', novel' if name in novel else ''} ({int(mine.sum())})",
        )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.margins(0.03)
    n_columns = 1 + len(axes.get_legend_handles_labels()[1]) // MAX_LEGEND_ROWS
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.2, ncols=n_columns)
    return figure
