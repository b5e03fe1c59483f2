"""Thresholds for a purity that a person names: chosen per class on verdicts whose truth is known, and only proposed.

A class is named from its own threshold on (``UnknownRule.class_confidence``); below, its defects are *non-decidable*
and go to a person. So purity is bought with contribution, the share of defects that the machine decides alone. The
truth is people's corrections, or the golden set of the head in service.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import yaml

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.models import choice
from semwatch.operations import golden, lots
from semwatch.operations.quality import LEVEL, Share, share
from semwatch.settings.recipe import UnknownRule
from semwatch.settings.site import Site
from semwatch.store.result_index import INDEX, open_index

FEWEST = 5
"""Calls that a class must keep at its threshold: fewer prove nothing."""
NO_DEFECT = "no defect"
HALVES, SEED = 20, 0
"""Random halvings of the images, for the held-out check."""


@dataclass(frozen=True, slots=True)
class Call:
    """One defect whose truth is known, and what the head made of it."""

    image: str
    """Defects of one image stay in one half."""
    label: str
    """Class that the head favours."""
    confidence: float
    """Its probability among the classes that fit."""
    truth: str | None
    """None: no defect."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """One class: its threshold, and what it costs."""

    label: str
    n: int
    """Defects that the head favours the class of and would name today."""
    now: float
    """Threshold in use."""
    threshold: float | None
    """Proposed; None: it stays as it is."""
    purity_now: Share
    purity: Share
    """At the proposed threshold, on the same defects that it was chosen on."""
    kept: Share
    """Of those that are named today, those that are named at the proposed threshold."""
    confused_with: tuple[tuple[str, int], ...]
    """What the wrong ones are in truth, most frequent first."""
    readiness: str
    """A sentence: ready, or why not."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The same choice judged on images that had no part in it."""

    chosen: float | None
    """Purity on the half that thresholds were chosen on, mean over all halvings."""
    held_out: float | None
    """Purity on the other half."""
    low: float
    high: float
    """Between which nine of ten halvings lie, of ``held_out``."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Thresholds for a purity."""

    target: float
    n_calls: int
    classes: tuple[Tuned, ...]
    """By name."""
    purity_now: Share
    purity: Share
    contribution_now: Share
    """Named, of all defects with known truth that were not dismissed."""
    contribution: Share
    held_out: HeldOut

    @property
    def proposed(self) -> dict[str, float]:
        """New thresholds by class."""
        return {one.label: one.threshold for one in self.classes if one.threshold is not None}


def tune(calls: Sequence[Call], rule: UnknownRule, target: float, *, n_undecided: int = 0) -> Tuning:
    """Choose a threshold for each class.

    Args:
        calls: what the head favoured of defects whose truth is known.
        rule: in use; no threshold goes below its ``decide_confidence``.
        target: purity to reach, above 0 and below 1.
        n_undecided: defects whose truth is known and that the head called unknown.

    Raises:
        ConfigError: the target is none, or no truth is known.
    """
    if not 0 < target < 1:
        raise ConfigError(f"--purity {target:g}: give a share between 0 and 1, such as 0.9")
    calls = [call for call in calls if call.label != DEFECT_FREE]
    if not calls:
        raise ConfigError(
            "nobody has judged a defect that the head gave a class: `semwatch correct` takes verdicts; or use --golden"
        )
    labels = sorted({call.label for call in calls})
    classes = tuple(_tuned(label, [c for c in calls if c.label == label], rule, target) for label in labels)
    now = {label: rule.needed(label) for label in labels}
    then = now | {one.label: one.threshold for one in classes if one.threshold is not None}
    n = len(calls) + n_undecided
    return Tuning(
        target=target,
        n_calls=len(calls),
        classes=classes,
        purity_now=_purity(calls, now),
        purity=_purity(calls, then),
        contribution_now=share(_purity(calls, now).n, n),
        contribution=share(_purity(calls, then).n, n),
        held_out=held_out(calls, rule, target),
    )


def corrected_calls(site: Site, lot: str | None) -> tuple[list[Call], int]:
    """What the head favoured of defects that people have judged, and how many of these it called unknown.

    Raises:
        ConfigError: there is no such lot.
        ServiceUnavailable: a disk is away.
    """
    with open_index(site.state_dir / INDEX) as index:
        chosen = None if lot is None else lots.refreshed(site, index, lots.find(site, index, lot))
        calls = [Call(str(image), label, sure, truth) for image, label, sure, truth in index.calls(chosen) if label]
        n_unknown = sum(n for kind, _, _, n in index.judged(chosen) if kind == "unknown")
    return calls, n_unknown


def golden_calls(site: Site, rule: UnknownRule) -> tuple[list[Call], int]:
    """The same of the golden set of the head in service.

    Raises:
        ModelMismatch: there is no head, or no golden set.
    """
    repository = site.models.repository
    version = choice.choice(repository, "head")
    crops = golden.golden_set(repository, version)
    given = golden.verdicts(repository, version, crops, rule)
    calls, n_unknown = [], 0
    for image, truth, verdict in zip(crops.images, crops.labels, given, strict=True):
        n_unknown += verdict.kind == "unknown"
        label = verdict.nearest[0].label if verdict.kind == "non-decidable" else verdict.label
        if label not in (None, DEFECT_FREE):
            calls.append(Call(image, str(label), verdict.confidence, None if truth == DEFECT_FREE else truth))
    return calls, n_unknown


# --- the proposal ----------------------------------------------------------------------------------------------------


def proposal(text: str, thresholds: Mapping[str, float]) -> str:
    """The text of a recipe with these thresholds, its comments and all else as they are.

    Args:
        text: of the recipe.
        thresholds: by class; those that it has for other classes stay.
    """
    before = yaml.safe_load(text) or {}
    section = before.get("unknown") or {}
    merged = {**(section.get("class_confidence") or {}), **thresholds}
    after = {**before, "unknown": {**section, "class_confidence": merged}}
    lines = [
        "  class_confidence:",
        *(f"    {line}" for line in yaml.safe_dump(merged, allow_unicode=True).splitlines()),
    ]
    made = _with_lines(text, lines)
    if yaml.safe_load(made) != after:  # written on one line, or in another style of YAML
        made = yaml.safe_dump(after, allow_unicode=True, sort_keys=False)
    return made


def _with_lines(text: str, block: Sequence[str]) -> str:
    """A recipe's text with the block of ``class_confidence`` in its section ``unknown``; its old block goes."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(r"unknown:\s*(#.*)?$", line)), None)
    if start is None:
        return "\n".join([*lines, "unknown:", *block, ""])
    kept, skips = [], False
    for i, line in enumerate(lines):
        if i > start and re.match(r"  class_confidence:", line):
            skips = True
            continue
        skips = skips and bool(re.match(r"    |\s*$", line))
        if not skips:
            kept.append(line)
    return "\n".join([*kept[: start + 1], *block, *kept[start + 1 :], ""])


def n_needed(target: float) -> int:
    """Right calls without a wrong one from which a purity is proven at the level of the intervals.

    >>> n_needed(0.9), n_needed(0.99)
    (36, 368)
    """
    return math.ceil(math.log((1 - LEVEL) / 2) / math.log(target))


def threshold_for(calls: Sequence[Call], floor: float, target: float) -> float | None:
    """The lowest threshold from ``floor`` on at which the calls of one class are as pure as asked; None: none is.

    Thresholds lie at confidences that occur, and at least ``FEWEST`` calls stay.
    """
    found, right = None, 0
    ordered = sorted((call for call in calls if call.confidence >= floor), key=lambda call: -call.confidence)
    for n, call in enumerate(ordered, 1):
        right += call.truth == call.label
        is_last_of_its_kind = n == len(ordered) or ordered[n].confidence < call.confidence
        if is_last_of_its_kind and n >= FEWEST and right >= target * n:
            found = call.confidence
    if found is None:
        return None
    return floor if found == ordered[-1].confidence else found


def held_out(calls: Sequence[Call], rule: UnknownRule, target: float) -> HeldOut:
    """Choose thresholds on one half of the images and judge them on the other, over many random halvings.

    A threshold that is chosen to look pure looks purer than it is: the difference of both says by how much.
    """
    images = sorted({call.image for call in calls})
    labels = sorted({call.label for call in calls})
    rng = np.random.default_rng(SEED)
    chosen: list[float] = []
    judged: list[float] = []
    for _ in range(HALVES if len(images) > 1 else 0):
        half = set(rng.permutation(images)[: len(images) // 2].tolist())
        ours, others = ([c for c in calls if (c.image in half) == is_ours] for is_ours in (True, False))
        thresholds = {label: rule.needed(label) for label in labels}
        for label in labels:
            found = threshold_for([c for c in ours if c.label == label], rule.decide_confidence, target)
            thresholds[label] = thresholds[label] if found is None else found
        for figures, part in ((chosen, ours), (judged, others)):
            if (value := _purity(part, thresholds).value) is not None:
                figures.append(value)
    low, high = np.quantile(judged, [0.05, 0.95]).tolist() if judged else (0.0, 1.0)
    return HeldOut(_mean(chosen), _mean(judged), low, high)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _tuned(label: str, calls: Sequence[Call], rule: UnknownRule, target: float) -> Tuned:
    now = rule.needed(label)
    named = [call for call in calls if call.confidence >= now]
    wrong = Counter(call.truth or NO_DEFECT for call in named if call.truth != label)
    found = threshold_for(calls, rule.decide_confidence, target)
    threshold = None if found is None or len(named) < FEWEST else math.floor(found * 1e4) / 1e4
    if threshold == now:
        threshold = None
    after = [call for call in calls if call.confidence >= (now if threshold is None else threshold)]
    purity = _purity(after, {label: 0.0})
    return Tuned(
        label=label,
        n=len(named),
        now=now,
        threshold=threshold,
        purity_now=_purity(named, {label: 0.0}),
        purity=purity,
        kept=share(min(len(after), len(named)), len(named)),
        confused_with=tuple(wrong.most_common(3)),
        readiness=_readiness(len(named), found, purity, wrong, target),
    )


def _readiness(n: int, found: float | None, purity: Share, wrong: Counter[str], target: float) -> str:
    if n < FEWEST:
        return f"too few: {n} of its calls are judged, {n_needed(target)} or more prove a purity of {target:.0%}"
    if found is None:
        other, k = wrong.most_common(1)[0]
        why = "false regions look like it" if other == NO_DEFECT else "the two overlap"
        return f"cannot be that pure: {k} of {wrong.total()} wrong ones are {other}; {why}"
    if purity.low < target:
        return f"likely, not proven: {purity.n} calls can promise {purity.low:.0%}; judge more of them"
    return "ready"


def _purity(calls: Sequence[Call], thresholds: Mapping[str, float]) -> Share:
    named = [call for call in calls if call.confidence >= thresholds[call.label]]
    return share(sum(call.truth == call.label for call in named), len(named))
