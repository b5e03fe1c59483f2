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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.system import weights_file

ReadClassifier = Callable[[str, Mapping[str, Tensor]], "Classifier"]
"""A family's classifier of what it said of itself, and of its tensors."""

EXACT = ("calibration", "feature_mean", "feature_std", "frozen_mean", "projection", "centre", "n_stored")
"""Kept in fp32 on disk: whitening multiplies small differences."""


LINEAR = "linear"
"""Family of a head whose logits are a logistic regression's."""
_CLASSIFIER = "classifier."
"""Begins the names of another family's tensors."""


class Classifier(Protocol):
    """Another family's logits: a module of (B, D) features to (B, K)."""

    family: str

    @property
    def width(self) -> int:
        """D."""

    def __call__(self, features: Tensor) -> Tensor:
        """Logits."""

    def described(self) -> str:
        """What makes it again, its tensors aside."""


class Head(nn.Module):
    """K classes over D features: ``forward(features) -> (logits, p_values)``.

    Logits are linear, or those of a classifier of another family; p-values are the same for all.
    """

    def __init__(
        self,
        state: "dict[str, Tensor]",
        labels: Sequence[str],
        frozen_width: int,
        neighbours: int,
        classifier: Classifier | None = None,
    ) -> None:
        super().__init__()
        self.labels, self.frozen_width, self.neighbours = tuple(labels), frozen_width, neighbours
        self.classifier = classifier
        for name, value in state.items():
            self.register_buffer(name, value)
        self.ranges = ranges_of(state["n_stored"])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Judge features (B, D).

        Returns:
            Logits (B, K) and p-values (B, K) in (0, 1].
        """
        buffer = dict(self.named_buffers())
        if self.classifier is None:
            standard = (features - buffer["feature_mean"]) / buffer["feature_std"]
            logits = standard @ buffer["weight"].T + buffer["bias"]
        else:
            logits = self.classifier(features)
        scores = class_scores(
            project(features[:, : self.frozen_width], buffer), buffer["stored"], self.ranges, self.neighbours
        )
        return logits, p_values(scores, buffer["calibration"])

    @property
    def width(self) -> int:
        """Of the features that its logits read."""
        return len(self.get_buffer("feature_mean")) if self.classifier is None else self.classifier.width

    @property
    def family(self) -> str:
        """Of its logits."""
        return LINEAR if self.classifier is None else self.classifier.family


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
    state = {name: value if _is_exact(name, value) else value.half() for name, value in head.state_dict().items()}
    header = {
        "labels": json.dumps(head.labels),
        "frozen_width": str(head.frozen_width),
        "neighbours": str(head.neighbours),
        "encoder_form": encoder_form,
        "provenance": json.dumps(provenance),
    }
    if head.classifier is not None:
        header |= {"family": head.family, "classifier": head.classifier.described()}
    weights_file.write(path, state, header)


def _is_exact(name: str, value: Tensor) -> bool:
    return name in EXACT or (name.startswith(_CLASSIFIER) and value.ndim == 1)


def load_head(
    path: Path, classifiers: Mapping[str, ReadClassifier] = MappingProxyType({})
) -> tuple[Head, str, dict[str, str | float | int]]:
    """Read what ``save_head`` wrote: the head in fp32, the form of the encoder it belongs to, its provenance.

    Args:
        path: of the weights.
        classifiers: how the logits of other families are read.

    Raises:
        ConfigError: the file is absent, holds no head, or one of a family that is not among these.
    """
    state, header = weights_file.read(path, what="head")
    try:
        classifier = None
        if (family := header.get("family", LINEAR)) != LINEAR:
            if family not in classifiers:
                raise ValueError(f"its family is {family}")
            own = {key.removeprefix(_CLASSIFIER): state.pop(key) for key in [*state] if key.startswith(_CLASSIFIER)}
            classifier = classifiers[family](header["classifier"], own)
        sizes = int(header["frozen_width"]), int(header["neighbours"])
        head = Head(state, json.loads(header["labels"]), *sizes, classifier)
        return head.eval(), header["encoder_form"], json.loads(header["provenance"])
    except (KeyError, ValueError) as error:
        raise weights_file.not_ours(path, "head", error) from error
