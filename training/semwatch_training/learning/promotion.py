"""The promotion gate: may a newly trained head serve, and may a found class be learned.

Both heads answer on the same golden crops, and the unknown rule of the recipe turns their answers into verdicts, as the
line does. A candidate is refused for a loss on a class that the old head knew, or for an unknown rate outside its band.
That rate is of the golden defects: a *defect-free* crop that is called unknown is a dismissal that the head has not
earned, and counts as accuracy that this class loses.

One crop proves nothing: of n golden crops each is worth 1 / n, so that a class of ten loses ten points by one of them.
A loss is a reason only if it exceeds what the recipe allows *and* stems from two crops or more: of accuracy, two that
were right before; of purity, two strangers more (fewer right ones are the accuracy's matter). The same holds for the
unknown rate. Nor is a loss a reason that chance makes too: of heads fitted again on nine tenths of the same crops, half
and more lose 10 points of some class of 20 to 40 golden crops. A paired sign test decides (the recipe's
``loss_significance``; at 1 every loss counts). The lineage limits what many small losses add up to.
"""

import math
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, Verdict
from semwatch.errors import ConfigError
from semwatch.line.classification import decide
from semwatch.models.head_bank import Bank
from semwatch.settings.recipe import Promotion, Recipe, UnknownRule
from semwatch_training.metrics.adc_metrics import AdcFigures, adc_metrics

PROOF = 2
"""Fewest golden crops that a reason may rest on."""
STANDARD_ERRORS, CHANCE = 2, 0.05
"""Whether a loss against the best ancestor is chance, a paired sign test decides at this level, or, where the golden
set has changed since, so many standard errors."""
LOOK = (
    "look at the new classes (`semwatch clusters list`), merge, split or reject those that look like a known one, or "
    "take the wrong crops out of them"
)
"""What a person can do about a refused head."""
BEST = "best_golden_"
"""Begins the provenance keys of ``Mark``."""
ROUNDING = 1e-9
"""0.92 - 0.87 is a little more than 0.05 in floating point; it is not in a recipe."""


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Answers of a head on the n golden crops."""

    labels: tuple[str, ...]
    """K class names."""
    logits: NDArray[np.float32]
    """(n, K)."""
    p_values: NDArray[np.float32]
    """(n, K) in (0, 1]."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Crops that wait in the queue and that clustering gave to known classes: no head is fitted on them."""

    labels: tuple[str, ...]
    """Of each, the known class that clustering gave it to."""
    old: Answers
    new: Answers


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one head on one class of the golden set."""

    n: int
    """Golden crops of the class."""
    n_right: int
    n_called: int
    """Golden crops that were decided as the class, whatever they are."""
    n_unknown: int
    """Of ``n``."""

    @property
    def accuracy(self) -> float:
        """Decided right, of all of the class."""
        return self.n_right / self.n

    @property
    def purity(self) -> float | None:
        """Right, of those decided as the class; None where none was."""
        return self.n_right / self.n_called if self.n_called else None

    @property
    def unknown_share(self) -> float:
        """Called unknown, of all of the class."""
        return self.n_unknown / self.n


@dataclass(frozen=True, slots=True)
class ClassChange:
    """One class of the golden set under both heads."""

    label: str
    old: Figures | None
    """None where the old head did not know the class, or there was none."""
    new: Figures


@dataclass(frozen=True, slots=True)
class Mark:
    """Accuracy of a head on the golden crops of its lineage's first head: those that never were records."""

    accuracy: float
    """Decided right, mean over their classes."""
    n_right: int
    crops: str = field(default="", compare=False)
    """Which of them, one bit each, hexadecimal; "" where it is not known."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Judgement of a candidate head on the golden set, under one recipe."""

    classes: tuple[ClassChange, ...]
    """Every class of the golden set, sorted by name."""
    unproven: tuple[str, ...]
    """Classes that the old head knew and of which there is no golden crop."""
    n_golden: int
    old_unknown_rate: float | None
    """Of the golden crops that show a defect, as the next."""
    unknown_rate: float
    reasons: tuple[str, ...]
    """Why the candidate is refused, in plain words; empty where it is promoted."""
    best: Mark | None = None
    """The best of the lineage, the candidate included; None where no golden crop is the first head's."""

    @property
    def promoted(self) -> bool:
        """True where there is no reason against the candidate."""
        return not self.reasons


def judge(
    old: Answers | None,
    new: Answers,
    golden: Bank,
    promotion: Promotion,
    *,
    rule: UnknownRule,
    best: Mark | None = None,
    held: Held | None = None,
) -> Judgement:
    """Judge a candidate head against the head in service.

    Classes that are new to the candidate count as strangers in both heads' purity, and have no old figures. Labels are
    compared as they are: after a renaming or a merge, give the old head's labels and the golden set's their new names.

    Args:
        old: answers of the head in service; None for a first head, of which only the unknown rate is judged.
        new: answers of the candidate.
        golden: the crops of both answers, in the same order.
        promotion: what the recipe asks for.
        rule: the recipe's unknown rule. Golden crops count as of a known process.
        best: of the ancestors of the head in service.
        held: crops that wait; None: there are none.

    Raises:
        ConfigError: no golden crop, or answers that do not fit them, hold NaN or hold p-values outside 0 to 1.
    """
    if not len(golden):
        raise ConfigError("the golden set is empty: nothing can be proven of a head; keep some crops of each class")
    now = _verdicts(new, golden, rule, "the candidate head")
    before = None if old is None else _verdicts(old, golden, rule, "the head in service")
    figures, known = _figures(golden.labels, now), set(old.labels if old else ())
    earlier = {} if before is None else _figures(golden.labels, before)
    classes = tuple(
        ClassChange(label, earlier[label] if label in known else None, figures[label]) for label in sorted(figures)
    )
    pairs = _pairs(golden.labels, before or now, now)
    reasons = [reason for change in classes for reason in _losses(change, pairs[change.label], promotion)]
    if old is not None:
        reasons += _emptied(golden.labels, before or (), now, old.labels, new.labels, promotion, "golden")
    if old is not None and held is not None and len(held.labels):
        was, becomes = _decided(held.old, rule), _decided(held.new, rule)
        reasons += _emptied(held.labels, was, becomes, old.labels, new.labels, promotion, "waiting")
    reasons += _outside_band(golden, now, before, promotion)
    mark = _mark(golden, now)
    ancestors = [m for m in (best, None if before is None else _mark(golden, before)) if m is not None]
    reasons += _eroded(mark, ancestors, golden.ids.count(""), promotion)
    return Judgement(
        classes=classes,
        unproven=tuple(sorted(known - set(golden.labels))),
        n_golden=len(golden),
        old_unknown_rate=None if before is None else _unknown_rate(golden, before),
        unknown_rate=_unknown_rate(golden, now),
        reasons=tuple(reasons),
        best=max([mark, *ancestors], key=_accuracy) if mark is not None else None,
    )


def best_of(provenance: Mapping[str, str | float | int], recipe: Recipe) -> Mark | None:
    """The best mark of a lineage under a recipe, from the provenance of its last head; None where it has none."""
    accuracy, n_right, crops = (provenance.get(key) for key in _keys(recipe))
    if not (_is_number(accuracy) and _is_number(n_right)):
        return None
    return Mark(float(accuracy), int(n_right), crops if isinstance(crops, str) else "")


def provenance_of(best: Mark | None, recipe: Recipe) -> dict[str, str | float | int]:
    """What ``best_of`` reads."""
    return {} if best is None else dict(zip(_keys(recipe), (best.accuracy, best.n_right, best.crops), strict=True))


def cluster_refusals(size: int, cohesion: float, cycles_seen: int, promotion: Promotion) -> list[str]:
    """Reasons why a found class is not learned yet, in plain words; empty where it may be.

    Args:
        size: crops.
        cohesion: see ``Candidate``.
        cycles_seen: cycles in which it has been seen, this one included.
        promotion: what the recipe asks for.
    """
    refusals = []
    if size < promotion.min_cluster_size:
        refusals.append(
            f"has {size} crops; the recipe asks for {promotion.min_cluster_size}: wait for more, merge it, or lower "
            f"promotion.min_cluster_size"
        )
    # Written so that a cohesion that is not a number is refused.
    if not cohesion >= promotion.min_cohesion:
        refusals.append(
            f"has a cohesion of {cohesion:.3f}; the recipe asks for {promotion.min_cohesion:g}: split it, take the "
            f"wrong crops out, wait for more, or lower promotion.min_cohesion"
        )
    if cycles_seen < promotion.min_cycles:
        refusals.append(
            f"was seen in {_counted(cycles_seen, 'cycle')}; the recipe asks for {promotion.min_cycles}: wait for the "
            f"next one, or lower promotion.min_cycles"
        )
    return refusals


def _verdicts(answers: Answers, golden: Bank, rule: UnknownRule, source: str) -> list[Verdict]:
    expected = (len(golden), len(answers.labels))
    if not answers.logits.shape == answers.p_values.shape == expected:
        raise ConfigError(
            f"{source} answered with logits {answers.logits.shape} and p-values {answers.p_values.shape}; "
            f"{len(golden)} golden crops and {len(answers.labels)} labels need {expected}"
        )
    p = answers.p_values
    if not (np.isfinite(answers.logits).all() and ((p >= 0) & (p <= 1)).all()):
        raise ConfigError(f"{source} answered with logits that are not finite or p-values outside 0 to 1; fit it again")
    return _decided(answers, rule)


def _decided(answers: Answers, rule: UnknownRule) -> list[Verdict]:
    rows = zip(answers.logits, answers.p_values, strict=True)
    return [decide(row, p, answers.labels, rule) for row, p in rows]


def _figures(truth: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, Figures]:
    """Figures of every class of the golden set."""
    adc = adc_metrics(truth, [verdict.label for verdict in verdicts])
    unknown = [label for label, verdict in zip(truth, verdicts, strict=True) if verdict.kind == "unknown"]

    def of(label: str, counts: AdcFigures) -> Figures:
        return Figures(counts.n_true, counts.n_right, counts.n_called, unknown.count(label))

    return {label: of(label, counts) for label, counts in adc.by_class.items() if counts.n_true}


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Golden crops that the two heads judge differently, as one class has it."""

    lost: int = 0
    """Of the class: right before, not now."""
    gained: int = 0
    strangers: int = 0
    """Not of the class: called so now, not before."""
    rid: int = 0


def _pairs(truth: Sequence[str], before: Sequence[Verdict], now: Sequence[Verdict]) -> dict[str, _Pairs]:
    found = {}
    for label in set(truth):
        was = np.array([verdict.label == label for verdict in before])
        is_ = np.array([verdict.label == label for verdict in now])
        mine = np.array([true == label for true in truth])
        counts = (mine & was & ~is_, mine & ~was & is_, ~mine & ~was & is_, ~mine & was & ~is_)
        found[label] = _Pairs(*(int(rows.sum()) for rows in counts))
    return found


def _is_chance(worse: int, better: int, promotion: Promotion) -> bool:
    """Whether chance alone makes so many worse with more than the recipe's probability: the paired sign test."""
    return _chance_of(worse, better) > promotion.loss_significance


def _chance_of(worse: int, better: int) -> float:
    """Probability that of so many changes at least so many are for the worse, if each were a coin's throw."""
    n = worse + better
    return sum(math.comb(n, k) for k in range(worse, n + 1)) / float(2**n)


def _losses(change: ClassChange, pairs: _Pairs, promotion: Promotion) -> list[str]:
    """Reasons that one class gives; none where only the new head knows it."""
    old, new, reasons = change.old, change.new, []
    if old is None:
        return []
    is_proven = old.n_right - new.n_right >= PROOF and not _is_chance(pairs.lost, pairs.gained, promotion)
    if is_proven and old.accuracy - new.accuracy > promotion.max_accuracy_loss + ROUNDING:
        counts = f"{old.n_right} of {old.n} golden crops decided right before, {new.n_right} now"
        reasons.append(
            _reason(change.label, "accuracy", old.accuracy, new.accuracy, promotion.max_accuracy_loss, counts)
        )
    if old.purity is None or new.purity is None:
        return reasons
    n_strangers = (new.n_called - new.n_right) - (old.n_called - old.n_right)
    is_proven = n_strangers >= PROOF and not _is_chance(pairs.strangers, pairs.rid, promotion)
    if is_proven and old.purity - new.purity > promotion.max_purity_loss + ROUNDING:
        counts = (
            f"{old.n_right} of {old.n_called} crops called so were right before, {new.n_right} of {new.n_called} now"
        )
        reasons.append(_reason(change.label, "purity", old.purity, new.purity, promotion.max_purity_loss, counts))
    return reasons


def _reason(label: str, what: str, old: float, new: float, allowed: float, counts: str) -> str:
    return (
        f"{label} would lose {100 * (old - new):.1f} points of {what} ({old:.2f} -> {new:.2f}: {counts}); "
        f"the recipe allows {100 * allowed:.1f}: {LOOK}, or raise promotion.max_{what}_loss"
    )


def _emptied(
    truth: Sequence[str],
    before: Sequence[Verdict],
    now: Sequence[Verdict],
    old_labels: Collection[str],
    new_labels: Collection[str],
    promotion: Promotion,
    which: str,
) -> list[str]:
    """Reasons why a new class would take too much of a known one, by the crops that the head in service gives it.

    Chance is no excuse here: a known class of few crops would be emptied before a test of significance noticed.

    Args:
        truth: class of each crop.
        before: verdicts of the head in service.
        now: verdicts of the candidate.
        old_labels: classes of the head in service.
        new_labels: classes of the candidate.
        promotion: what the recipe asks for.
        which: crops these are, for people.
    """
    fresh, reasons = set(new_labels) - set(old_labels), []
    for label in sorted(set(truth) & set(old_labels)):
        had = [k for k, true in enumerate(truth) if true == label and _given_to(before[k]) == label]
        takers = Counter(taker for k in had if (taker := _given_to(now[k])) in fresh)
        if takers.total() >= PROOF and takers.total() / len(had) > promotion.max_class_loss + ROUNDING:
            taker, n = takers.most_common(1)[0]
            reasons.append(
                f"{label} would lose {takers.total()} of its {len(had)} {which} crops to new classes, {n} to {taker}; "
                f"the recipe allows {100 * promotion.max_class_loss:.0f} %: merge it (`semwatch clusters merge {taker} "
                f"{shlex.quote(label)}`), take the wrong crops out of it, split or reject it, or raise "
                f"promotion.max_class_loss"
            )
    return reasons


def _given_to(verdict: Verdict) -> str | None:
    """The class that a verdict names or, where it is not sure, leans to; None where it is unknown."""
    return verdict.nearest[0].label if verdict.kind == "non-decidable" else verdict.label


def _outside_band(
    golden: Bank, now: Sequence[Verdict], before: Sequence[Verdict] | None, promotion: Promotion
) -> list[str]:
    n_unknown, n = _n_unknown(golden, now)
    if n_unknown < PROOF or n_unknown / n <= promotion.max_unknown_rate + ROUNDING:
        return []
    earlier = "" if before is None else f", the head in service {_n_unknown(golden, before)[0]}"
    return [
        f"{n_unknown} of {n} golden defects would be called unknown ({100 * n_unknown / n:.1f} %{earlier}); "
        f"the recipe allows {100 * promotion.max_unknown_rate:.1f} %: {LOOK}, or raise promotion.max_unknown_rate"
    ]


def _mark(golden: Bank, verdicts: Sequence[Verdict]) -> Mark | None:
    """None where every golden crop came with a class that was learned."""
    rows = [row for row, id_ in enumerate(golden.ids) if not id_]
    if not rows:
        return None
    figures = _figures([golden.labels[row] for row in rows], [verdicts[row] for row in rows])
    accuracy = sum(of.accuracy for of in figures.values()) / len(figures)
    right = np.array([verdicts[row].label == golden.labels[row] for row in rows], np.bool_)
    return Mark(accuracy, int(right.sum()), np.packbits(right).tobytes().hex())


def _eroded(mark: Mark | None, ancestors: Sequence[Mark], n: int, promotion: Promotion) -> list[str]:
    """The reason that n golden crops of the first head give, if they do."""
    best = max(ancestors, key=_accuracy, default=None)
    if mark is None or best is None or best.accuracy - mark.accuracy <= promotion.max_lineage_loss + ROUNDING:
        return []
    if (paired := _discordant(best, mark)) is not None:
        if _chance_of(*paired) > CHANCE:
            return []
    elif not _is_beyond_errors(best, mark, n):
        return []
    return [
        f"of the classes that the first head knew, {100 * mark.accuracy:.1f} % of the golden crops would be decided "
        f"right ({mark.n_right} of {n}, mean over classes), {100 * best.accuracy:.1f} % ({best.n_right}) by the best "
        f"head before it; the recipe allows {100 * promotion.max_lineage_loss:.1f} points over all cycles together: "
        f"{LOOK}, or raise promotion.max_lineage_loss"
    ]


def _discordant(best: Mark, mark: Mark) -> tuple[int, int] | None:
    """Crops that only the best decides right, and only the candidate; None where they were not the same crops."""
    try:
        before, now = (np.unpackbits(np.frombuffer(bytes.fromhex(m.crops), np.uint8)) for m in (best, mark))
    except ValueError:
        return None
    if len(before) != len(now) or not len(now):
        return None
    return int((before > now).sum()), int((now > before).sum())


def _is_beyond_errors(best: Mark, mark: Mark, n: int) -> bool:
    variance = sum(m.n_right * (n - m.n_right) / n for m in (mark, best))  # of the number of right ones: binomial
    return best.n_right - mark.n_right > STANDARD_ERRORS * math.sqrt(max(0.0, variance))


def _accuracy(mark: Mark) -> float:
    return mark.accuracy


def _keys(recipe: Recipe) -> tuple[str, str, str]:
    """A recipe of other content has another rule, and marks of its own."""
    return f"{BEST}accuracy {recipe.id}", f"{BEST}right {recipe.id}", f"{BEST}crops {recipe.id}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _n_unknown(golden: Bank, verdicts: Sequence[Verdict]) -> tuple[int, int]:
    """Golden crops with a defect that are called unknown, and how many there are."""
    kinds = [verdict.kind for label, verdict in zip(golden.labels, verdicts, strict=True) if label != DEFECT_FREE]
    return kinds.count("unknown"), len(kinds)


def _unknown_rate(golden: Bank, verdicts: Sequence[Verdict]) -> float:
    n_unknown, n = _n_unknown(golden, verdicts)
    return n_unknown / max(1, n)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
