"""Crops to verdicts: features, logits, p-values, and the unknown rule.

The rule, in the order it is applied to one defect:

1. A class *fits* if the defect's conformal p-value under it, on frozen features, exceeds the recipe's significance.
   Over all known defects together about that share, at most, fits nothing; a single class may have more.
2. Nothing fits: *unknown*.
3. The head gives every class that fits less than ``1 - decide_confidence``: what looks right lies outside its own
   class's range, and what lies in range looks wrong. The two witnesses contradict each other: *unknown*.
4. The head's probability of its favourite, among the classes that fit, reaches ``decide_confidence``: that class;
   *novel* where it was found among unknowns and no person has named it yet.
5. Else *non-decidable*.

Source: conformal prediction (Vovk et al. 2005), one calibration for all classes. IC-DefectNCD leaves the
known/unknown decision to its discovery heads, which only a batch can use.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, NOVEL, Neighbour, Verdict, VerdictKind
from semwatch.line import inputs
from semwatch.line.inputs import View
from semwatch.models.inference import ModelId, Models


def classify(
    views: Sequence[View], models: Models, *, significance: float, decide_confidence: float
) -> tuple[NDArray[np.float32], list[Verdict], dict[str, ModelId]]:
    """Name the defects of one page.

    Args:
        views: of n defects; the encoder is given those parts of them that it asks for.
        models: where encoder and head answer.
        significance: a class whose p-value is not above it does not fit.
        decide_confidence: how sure the head must be where several classes fit.

    Returns:
        Features (n, D), one verdict each, and which encoder and head answered. n = 0 asks no model.

    Raises:
        ServiceUnavailable: the models are away.
    """
    if not views:
        return np.zeros((0, 0), np.float32), [], {}
    encoded = models.infer("encoder", inputs.for_encoder(models.meta("encoder"), views))
    features = encoded.outputs["features"]
    answer = models.infer("head", inputs.for_head(features))
    logits, p_values = answer.outputs["logits"], answer.outputs["p_values"]
    verdicts = [
        decide(row, p, answer.meta.labels, significance=significance, decide_confidence=decide_confidence)
        for row, p in zip(logits, p_values, strict=True)
    ]
    return features, verdicts, {"encoder": encoded.id, "head": answer.id}


def decide(
    logits: NDArray[np.float32],
    p_values: NDArray[np.float32],
    labels: Sequence[str],
    *,
    significance: float,
    decide_confidence: float,
) -> Verdict:
    """Apply the unknown rule to one defect.

    Confidence: the head's probability of the class, or of the best one where it is *non-decidable*; of *unknown*, one
    minus the largest p-value, or one minus that probability where the witnesses contradict each other.

    Args:
        logits: (K,).
        p_values: (K,) in (0, 1].
        labels: K class names.
        significance: see ``classify``.
        decide_confidence: see ``classify``.

    >>> two = (np.array([4, 0], np.float32), ["bridge", "void"])
    >>> rule = {"significance": 0.05, "decide_confidence": 0.8}
    >>> decide(two[0], np.array([0.6, 0.01], np.float32), two[1], **rule).label
    'bridge'
    >>> decide(two[0], np.array([0.01, 0.01], np.float32), two[1], **rule).kind
    'unknown'
    >>> decide(np.zeros(2, np.float32), np.array([0.6, 0.5], np.float32), two[1], **rule).kind
    'non-decidable'
    """
    probability = softmax(logits)
    fits = p_values > significance
    nearness = probability if fits.any() else p_values
    order = sorted(range(len(labels)), key=lambda k: (fits[k], nearness[k], probability[k]), reverse=True)
    nearest = tuple(Neighbour(labels[k], float(probability[k]), float(p_values[k])) for k in order[:2])
    best = order[0]
    if not fits.any():
        return Verdict("unknown", None, float(1 - p_values.max()), nearest)
    if probability[best] < 1 - decide_confidence:
        return Verdict("unknown", None, float(1 - probability[best]), nearest)
    if softmax(np.where(fits, logits, -np.inf))[best] < decide_confidence:
        return Verdict("non-decidable", None, float(probability[best]), nearest)
    return Verdict(kind_of(labels[best]), labels[best], float(probability[best]), nearest)


def kind_of(label: str) -> VerdictKind:
    """The verdict that a label stands for.

    >>> kind_of("bridge"), kind_of("novel-3"), kind_of("defect-free")
    ('known', 'novel', 'defect-free')
    """
    if label == DEFECT_FREE:
        return "defect-free"
    return "novel" if label.startswith(NOVEL) else "known"


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of one row of logits; -inf is probability 0."""
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: NDArray[np.float64] = shifted / shifted.sum()
    return probabilities


def size_feature(window_side_px: float, mask_area_px: float, field_hw: tuple[int, int]) -> NDArray[np.float32]:
    """What a crop hides: log2 of window side and root mask area, each over the field's short side. (2,) float32."""
    short = min(field_hw)
    return np.log2(np.maximum([window_side_px, mask_area_px**0.5], 1.0) / short).astype(np.float32)
