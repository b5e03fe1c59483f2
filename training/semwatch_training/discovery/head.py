"""Heads over cached features: logits, and the p-values of the unknown rule; ``fit_head`` makes them.

A head gives two answers per class: a logit (trained) and a p-value (measured). The p-value compares how far a defect
lies from the class, on frozen features only, with how far known defects lie from *their* nearest class, each judged by
a metric that never saw its image. So the largest p-value of a row is a conformal p-value of "this is a known kind":
it falls to alpha or below for a share of alpha of known defects, over all classes together (marginal, not class by
class: a class of many looks has more than its part of them), as long as samples and stream come from the same process.

All classes share one calibration, so a class of five samples has p-values as fine as one of five hundred. Between two
calibration scores the p-value is interpolated upwards, and past the last one it goes on falling without reaching
1 / (n + 1): the promise holds, and strangers keep their order.

Source: cross-conformal prediction (Vovk 2015); within-class whitening and unit length, Mahalanobis++
(arXiv 2505.18032); nearest neighbours for classes of many looks (Sun et al. 2022).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.system import weights_file

EXACT = ("calibration", "feature_mean", "feature_std", "frozen_mean", "projection", "centre", "n_stored")
"""Kept in fp32 on disk: whitening multiplies small differences."""


class Head(nn.Module):
    """K classes over D features: ``forward(features) -> (logits, p_values)``."""

    def __init__(self, state: "dict[str, Tensor]", labels: Sequence[str], frozen_width: int, neighbours: int) -> None:
        super().__init__()
        self.labels, self.frozen_width, self.neighbours = tuple(labels), frozen_width, neighbours
        for name, value in state.items():
            self.register_buffer(name, value)
        self.ranges = ranges_of(state["n_stored"])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Judge features (B, D).

        Returns:
            Logits (B, K) and p-values (B, K) in (0, 1].
        """
        buffer = dict(self.named_buffers())
        standard = (features - buffer["feature_mean"]) / buffer["feature_std"]
        logits = standard @ buffer["weight"].T + buffer["bias"]
        scores = class_scores(
            project(features[:, : self.frozen_width], buffer), buffer["stored"], self.ranges, self.neighbours
        )
        return logits, p_values(scores, buffer["calibration"])


def project(frozen: Tensor, buffer: "dict[str, Tensor]") -> Tensor:
    """Project leading features (B, F) into the metric's space (B, d)."""
    return (frozen - buffer["frozen_mean"]) @ buffer["projection"] - buffer["centre"]


def ranges_of(n_stored: Tensor) -> tuple[tuple[int, int], ...]:
    """First and past-the-last stored row of each class, from how many each has (K,)."""
    ends = n_stored.long().cumsum(0).tolist()
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def class_scores(projected: Tensor, stored: Tensor, ranges: Sequence[tuple[int, int]], neighbours: int) -> Tensor:
    """Mean dissimilarity of rows (B, d) to the nearest stored samples (n, d) of each class: (B, K), 0 or more.

    The dissimilarity is the geometric mean of squared distance and squared distance between unit vectors: the length of
    a whitened row tells a far stranger, its direction one that mixes the looks of several classes.

    Args:
        projected: rows to judge.
        stored: samples, class by class.
        ranges: first and past-the-last stored row of each class.
        neighbours: how many of a class to average, or all where it has fewer.
    """
    far = _squared_distance(projected, stored)
    turned = _squared_distance(functional.normalize(projected, dim=-1), functional.normalize(stored, dim=-1))
    dissimilarity = (far * turned).sqrt()
    nearest = [
        dissimilarity[:, start:stop].topk(min(neighbours, stop - start), dim=-1, largest=False).values.mean(dim=-1)
        for start, stop in ranges
    ]
    return torch.stack(nearest, dim=-1)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(dim=-1, keepdim=True) + b.square().sum(dim=-1) - 2 * a @ b.T
    return squares.clamp_min(0)


def p_values(scores: Tensor, calibration: Tensor) -> Tensor:
    """Share of calibration scores (n,), ascending, at least as large as each score: in (0, 1], strictly decreasing.

    Never below the exact ``(1 + #{calibration >= score}) / (n + 1)``, and above it by less than ``1 / (n + 1)``.

    >>> [round(p, 3) for p in p_values(torch.tensor([0.0, 2, 2.5, 9]), torch.tensor([1.0, 2, 3])).tolist()]
    [1.0, 0.75, 0.625, 0.286]
    """
    n = len(calibration)
    below = (calibration < scores[..., None]).sum(dim=-1)
    low, high = calibration[(below - 1).clamp_min(0)], calibration[below.clamp_max(n - 1)]
    between = (high - scores) / (high - low).clamp_min(1e-12)
    spread = (calibration[-1] - calibration[n // 2]).clamp_min(1e-6)
    beyond = spread / (spread + (scores - calibration[-1]).clamp_min(0))
    rank = 1 + n - below + torch.where(below < n, between, beyond)
    return torch.where(below > 0, rank, 1.0 + n) / (n + 1)


def save_head(head: Head, path: Path, *, encoder_form: str, provenance: dict[str, str | float | int]) -> None:
    """Write a head as safetensors (fp16, what needs it in fp32) with labels, encoder form, provenance."""
    state = {name: value if name in EXACT else value.half() for name, value in head.state_dict().items()}
    header = {
        "labels": json.dumps(head.labels),
        "frozen_width": str(head.frozen_width),
        "neighbours": str(head.neighbours),
        "encoder_form": encoder_form,
        "provenance": json.dumps(provenance),
    }
    weights_file.write(path, state, header)


def load_head(path: Path) -> tuple[Head, str, dict[str, str | float | int]]:
    """Read what ``save_head`` wrote: the head in fp32, the form of the encoder it belongs to, its provenance.

    Raises:
        ConfigError: the file is absent or holds no head.
    """
    state, header = weights_file.read(path, what="head")
    try:
        head = Head(state, json.loads(header["labels"]), int(header["frozen_width"]), int(header["neighbours"]))
        return head.eval(), header["encoder_form"], json.loads(header["provenance"])
    except (KeyError, ValueError) as error:
        raise weights_file.not_ours(path, "head", error) from error
