"""How far verdicts can be trusted, from what people said of them: purity, accuracy and escapes per class.

Only defects that a person has judged count. So that the figures are those of all defects, judge a sample drawn without
looking at the verdicts, and confirm what is right as well; who corrects nothing but errors measures errors alone.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from semwatch.defects import DEFECT_FREE
from semwatch.line.gate_calibration import binomial
from semwatch.store.result_index import ResultIndex

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Share:
    """``count`` of ``n``, with the exact interval (Clopper and Pearson 1934) of 95 %."""

    count: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float | None:
        """None where n is 0."""
        return self.count / self.n if self.n else None


@dataclass(frozen=True, slots=True)
class ClassQuality:
    """What people's verdicts say of one class."""

    label: str
    purity: Share
    """Of the judged defects that the model called so, those that are."""
    accuracy: Share
    """Of the judged defects that are of the class, those that the model called so; escapes count as not."""
    escapes: Share
    """Of the defects of the class, those that were not found, or dismissed as defect-free."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What people's verdicts say of the line."""

    n_judged: int
    n_missed: int
    false_alarms: Share
    """Of the judged defects that were reported, those that are none."""
    escapes: Share
    """Of all defects, those that were not found, or dismissed."""
    classes: tuple[ClassQuality, ...]
    """By name."""


def measure(index: ResultIndex, lots: Sequence[str] | None = None) -> Quality:
    """Measure from the index; ``lots`` None: all."""
    return quality(index.judged(lots), index.missed(lots))


def quality(judged: Sequence[tuple[str, str | None, str | None, int]], missed: dict[str, int]) -> Quality:
    """Measure from counts.

    Args:
        judged: kind and label of the model, the person's label (None: no defect), how many.
        missed: by label, what people say was not found.
    """
    called: Counter[str] = Counter()  # by the model's name
    true: Counter[str] = Counter(missed)  # by the person's name
    right: Counter[str] = Counter()
    escaped: Counter[str] = Counter(missed)
    n_reported = n_false = 0
    for kind, label, human, n in judged:
        is_dismissed = kind == DEFECT_FREE
        if not is_dismissed:
            n_reported += n
            n_false += n if human is None else 0
            if label is not None:
                called[label] += n
        if human is not None:
            true[human] += n
            right[human] += n if human == label and not is_dismissed else 0
            escaped[human] += n if is_dismissed else 0
    return Quality(
        n_judged=sum(n for *_, n in judged),
        n_missed=sum(missed.values()),
        false_alarms=share(n_false, n_reported),
        escapes=share(escaped.total(), true.total()),
        classes=tuple(
            ClassQuality(
                label,
                share(right[label], called[label]),
                share(right[label], true[label]),
                share(escaped[label], true[label]),
            )
            for label in sorted(called.keys() | true.keys())
        ),
    )


def share(count: int, n: int) -> Share:
    """``count`` of ``n`` with its interval; all is possible where n is 0."""
    rate = binomial(count, n, level=LEVEL)
    return Share(count, n, rate.low, rate.high)
