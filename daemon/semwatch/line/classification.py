"""Crops to verdicts: features, logits, p-values, and the unknown rule.

The rule, in the order it is applied to one defect:

1. A class *fits* if the defect's conformal p-value under it, on frozen features, exceeds the recipe's significance.
   Over all known defects together about that share, at most, fits nothing; a single class may have more.
2. Nothing fits: *unknown*.
3. The head gives every class that fits less than ``1 - decide_confidence``: what looks right lies outside its own
   class's range, and what lies in range looks wrong. The two witnesses contradict each other: *unknown*.
4. The favourite is the class to which the head gives most probability among those that fit. That probability is below
   ``decide_confidence``, or below what ``class_confidence`` asks for this class: *non-decidable*.
5. The favourite is *defect-free*: the head may dismiss what the detector found only where it is its first choice among
   **all** classes, with ``dismiss_probability`` at least; else *unknown*.
6. Else the favourite; *novel* where it was found among unknowns and no person has named it yet.

On a page of an unknown process 4 and 5 give way to a stronger proof, because p-values promise something only within the
process that they were calibrated on. Nothing is dismissed there. A name stands where the head gives it
``foreign_confidence`` among all classes and its p-value exceeds ``foreign_significance``. All else is *unknown*.

Source: conformal prediction (Vovk et al. 2005), one calibration for all classes. IC-DefectNCD leaves the
known/unknown decision to its discovery heads, which only a batch can use.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, NOVEL, Domain, Neighbour, Verdict, VerdictKind
from semwatch.line import inputs
from semwatch.line.inputs import View
from semwatch.models.inference import ModelId, Models
from semwatch.settings.recipe import UnknownRule


def classify(
    views: Sequence[View], models: Models, rule: UnknownRule, *, domain: Domain = "not judged"
) -> tuple[NDArray[np.float32], list[Verdict], dict[str, ModelId]]:
    """Name the defects of one page.

    Args:
        views: of n defects; the encoder is given those parts of them that it asks for.
        models: where encoder and head answer.
        rule: of the recipe.
        domain: of the page.

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
        decide(row, p, answer.meta.labels, rule, domain=domain) for row, p in zip(logits, p_values, strict=True)
    ]
    return features, verdicts, {"encoder": encoded.id, "head": answer.id}


def domain_of(domain_p: float | None, *, significance: float) -> Domain:
    """What a field's p-value among the normal fields of the known processes says; see ``defects.ScoreMap``.

    A p-value that is no number proves nothing, and is of an unknown process.

    >>> [domain_of(p, significance=0.01) for p in (None, 0.5, 0.01)]
    ['not judged', 'known process', 'unknown process']
    """
    if domain_p is None:
        return "not judged"
    return "known process" if domain_p > significance else "unknown process"


def decide(
    logits: NDArray[np.float32],
    p_values: NDArray[np.float32],
    labels: Sequence[str],
    rule: UnknownRule,
    *,
    domain: Domain = "not judged",
) -> Verdict:
    """Apply the unknown rule to one defect.

    Confidence is how much speaks for what the verdict claims. For a verdict with a label it is the head's probability
    of that label among the classes that fit, thus never below what the recipe asks for it (``UnknownRule.needed``). For
    *non-decidable* it is the same of the favourite, thus always below. For *unknown*, which claims that no class can be
    believed, it is one minus what speaks for the nearest class, where both witnesses must speak: the smaller of its
    probability and its p-value. So it is no less than the smaller of ``decide_confidence`` and ``1 - significance``,
    but where only the stronger proof of step 5 or of an unknown process was missing.

    Nearest are the classes that fit, by probability, then the others; where the verdict is *unknown*, all of them by
    the smaller of probability and p-value.

    Args:
        logits: (K,).
        p_values: (K,) in (0, 1].
        labels: K class names.
        rule: of the recipe.
        domain: of the page that shows the defect; ``not judged`` counts as a known process.

    >>> rule, two = UnknownRule(), ["bridge", "defect-free"]
    >>> bridge = np.array([4, 0], np.float32)
    >>> decide(bridge, np.array([0.6, 0.01], np.float32), two, rule).label
    'bridge'
    >>> decide(bridge, np.array([0.01, 0.01], np.float32), two, rule).kind
    'unknown'
    >>> decide(np.zeros(2, np.float32), np.array([0.6, 0.5], np.float32), two, rule).kind
    'non-decidable'
    >>> [decide(-bridge / by, np.array([0.01, 0.6], np.float32), two, rule).kind for by in (1, 2)]
    ['defect-free', 'unknown']
    """
    probability = softmax(logits)
    fits = p_values > rule.significance
    support = np.minimum(probability, p_values)
    nearness: NDArray[np.float64] = support
    kind: VerdictKind = "unknown"
    if fits.any():
        share = softmax(np.where(fits, logits, -np.inf))
        best = int(share.argmax())
        kind = _kind_of_favourite(best, share[best], probability, p_values[best], labels[best], rule, domain)
        nearness = support if kind == "unknown" else np.where(fits, 1 + share, support)
    order = sorted(range(len(labels)), key=lambda k: (nearness[k], probability[k]), reverse=True)
    nearest = tuple(Neighbour(labels[k], float(probability[k]), float(p_values[k])) for k in order[:2])
    if kind == "unknown":
        return Verdict(kind, None, float(1 - support.max()), nearest)
    return Verdict(kind, None if kind == "non-decidable" else labels[best], float(share[best]), nearest)


def _kind_of_favourite(
    best: int,
    share: float,
    probability: NDArray[np.float64],
    p_value: float,
    label: str,
    rule: UnknownRule,
    domain: Domain,
) -> VerdictKind:
    """Steps 3 to 6 of the rule.

    Args:
        best: the favourite, in (K,).
        share: its probability among the classes that fit.
        probability: (K,) among all classes.
        p_value: of the favourite.
        label: the same.
        rule: of the recipe.
        domain: of the page.
    """
    if probability[best] < 1 - rule.decide_confidence:
        return "unknown"
    is_sure, is_dismissal = share >= rule.needed(label), label == DEFECT_FREE
    if domain == "unknown process":
        is_strong = probability[best] >= rule.foreign_confidence and p_value > rule.foreign_significance
        return kind_of(label) if is_sure and is_strong and not is_dismissal else "unknown"
    if not is_sure:
        return "non-decidable"
    is_first = probability[best] == probability.max()
    if is_dismissal and not (is_first and probability[best] >= rule.dismiss_probability):
        return "unknown"
    return kind_of(label)


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
