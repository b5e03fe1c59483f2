"""Drift watch: does a tool still deliver what it delivered when its recipe began?

Three things are watched for each source and recipe, against a reference window:

    unknown rate   share of unknown defects    Bernoulli CUSUM, up and down, see ``cusum_steps``
    score          raw image score of a page   PSI over the deciles of the reference window, see ``psi``
    class mix      labels of the defects       PSI over the classes that are common in the reference window

Two more have limits of their own and need no reference, because a good tool delivers next to none of either:

    no image       share of the last ``PAGES`` pages that hold no image
    bad quality    share of them that do, but with a flag: out of focus, saturated, ...

A page counts once in each, however many defects it has: its defects share one vote, because defects of one page are
alike, and to count them singly would promise more evidence than there is. The reference window is the first
``REFERENCE`` pages (for unknown rate and class mix: pages with defects) after a recipe began. Another detector starts
all of it anew; another encoder or head starts unknown rate and class mix anew, which it is expected to change.

False alarms: each of the three runs at least ``RUN`` pages between them on average while nothing changes and pages are
independent of each other. Pages of one wafer are not quite, so PSI below ``LARGE_PSI`` never alarms.
"""

import json
import logging
import math
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from semwatch.defects import PageReview, Quality, Review
from semwatch.system.files import rename, write_whole

log = logging.getLogger(__name__)

What = Literal["unknown rate", "score", "class mix", "no image", "bad quality"]
WATCHED: tuple[What, ...] = get_args(What)

OF_TOOL: tuple[What, ...] = ("no image", "bad quality")
"""What is the tool's own matter: learning can do nothing about it."""
PAGES = 100
"""Pages of the window in which bad ones are counted."""
MAX_NO_IMAGE, MAX_BAD_QUALITY = 0.05, 0.2
"""Shares of that window that alarm: five pages without an image, wherever they are in it."""

REFERENCE = 500
"""Pages of the reference window: a rate of 10 % is known to 1.3 points, a decile holds 50 pages."""
NOW = 200
"""Pages of the current window: 20 in each decile, so that the chi-square law of the PSI holds."""
FEWEST = 50
"""Pages in the current window before a PSI is judged; the threshold is higher for fewer than ``NOW``."""
RUN = 10_000
"""Least mean number of pages from one false alarm to the next, of one watched thing."""
N_BINS = 10
LARGE_PSI = 0.25
"""Where the rule of thumb calls a change large (Siddiqi 2006); close to the threshold for full windows."""
COMMON = 5 / NOW
"""Rarer classes of the reference window are taken together: a bin needs 5 expected votes for the chi-square law."""
REST = ""
"""The rare and the new classes together; no class has this name."""
MARGIN = 0.1
"""Least change of the unknown rate that the CUSUM is built to find: ten standard errors of a reference rate of 5 %,
four of one of 50 %, so that an error of the estimate seldom passes for a change."""
HEIGHT = math.log(2 * RUN)
"""Alarm limit of the CUSUM, in nats. Up and down together then alarm at most every exp(HEIGHT) / 2 = ``RUN`` pages."""
SAVE_EVERY_S = 60.0
"""How often the state is to be saved: what a crash forgets is a minute of a window of hours."""
MAX_WATCHES = 256
"""Sources and recipes that are remembered; beyond, the one seen longest ago is forgotten."""
STATE, DAMAGED = "drift.json", ".damaged"

_LEVEL_Z = NormalDist().inv_cdf(1 - 1 / (2 * RUN))


@dataclass(frozen=True, slots=True)
class Alarm:
    """One excursion of one watched thing."""

    source: str
    recipe_name: str
    recipe_id: str
    what: What
    value: float
    """CUSUM in nats, or PSI."""
    threshold: float
    n: int
    """Pages in the current window."""
    sentence: str
    """For people: what changed, where, from what to what."""


# --- the statistics ------------------------------------------------------------------------------------------------


def risen(p0: float) -> float:
    """The rate that a rise from ``p0`` is tested against: doubled, or the rest halved, but ``MARGIN`` at least.

    >>> [round(risen(p), 3) for p in (0.02, 0.2, 0.5, 0.8)]
    [0.12, 0.4, 0.75, 0.9]
    """
    return max(p0 + MARGIN, min(2 * p0, (1 + p0) / 2))


def cusum_steps(p0: float, p1: float) -> tuple[float, float]:
    """Log likelihood ratios of rate ``p1`` to ``p0`` for an unknown and for any other defect, in nats.

    A CUSUM of them alarms at height h no more often than once in exp(h) steps on average while the rate is ``p0``. This
    holds too where a step is the mean over the defects of one page, however alike they are: exp is convex, so the
    expected likelihood ratio of a page is 1 at most. Pages must be independent.

    Pages with one defect until the alarm, simulated with ``HEIGHT`` and an estimated ``p0``, half and 19 of 20 of all
    runs: from 20 to 40 % 100 and 220, from 10 to 20 % 220 and 700, from 5 to 15 % 150 and 350, from 5 to 10 % 500 and
    3,500, from 30 to 15 % 160 and 350.

    Source: Page 1954; bound: Lorden 1971, theorem 2; Bernoulli form: Reynolds and Stoumbos 1999.

    >>> [round(step, 2) for step in cusum_steps(0.1, 0.2)]
    [0.69, -0.12]
    """
    return math.log(p1 / p0), math.log((1 - p1) / (1 - p0))


def psi(reference: Sequence[float], now: Sequence[float]) -> float:
    """Population stability index of two histograms, sum of (q - p) ln(q / p); 0 if alike.

    Args:
        reference: (B,) counts.
        now: (B,) counts; half a count is added to every bin of both, so that an empty one stays finite.

    >>> psi([50, 50], [20, 20]), round(psi([50, 50], [30, 10]), 2)
    (0.0, 0.26)
    """
    all_p, all_q = sum(reference) + 0.5 * len(reference), sum(now) + 0.5 * len(now)
    total = 0.0
    for n_p, n_q in zip(reference, now, strict=True):
        p, q = (n_p + 0.5) / all_p, (n_q + 0.5) / all_q
        total += (q - p) * math.log(q / p)
    return total


def psi_threshold(n_reference: int, n_now: int, n_bins: int) -> float:
    """PSI from which a change is believed, for windows of so many pages.

    Without a change, PSI is about (1 / n_reference + 1 / n_now) chi2 of n_bins - 1 degrees of freedom. The quantile is
    taken at 1 / (2 RUN): then at most t / (2 RUN) of all runs have a false alarm within t pages, however much the looks
    overlap, and the mean run is ``RUN`` pages at least.

    Source: Yurdakul and Naranjo 2020, Statistical properties of the population stability index, Journal of Risk Model
    Validation 14(4); the quantile by Wilson and Hilferty 1931, here up to 9 % high for two bins, 3 % for six.

    >>> round(psi_threshold(500, 200, 10), 3), round(psi_threshold(500, 50, 10), 3)
    (0.252, 0.791)
    """
    degrees = n_bins - 1
    spread = 2 / (9 * degrees)
    quantile = degrees * (1 - spread + _LEVEL_Z * math.sqrt(spread)) ** 3
    return max(LARGE_PSI, (1 / n_reference + 1 / n_now) * quantile)


def decile_edges(scores: Sequence[float]) -> list[float]:
    """Rising inner edges of bins that hold a tenth of the scores each; a value that fills several bins gets its own.

    >>> decile_edges(range(20))
    [2, 4, 6, 8, 10, 12, 14, 16, 18]
    >>> len(decile_edges([0.5] * 20))
    2
    """
    ranked = sorted(scores)
    edges = [ranked[i * len(ranked) // N_BINS] for i in range(1, N_BINS)]
    tied = {low for low, high in pairwise(edges) if low == high}
    return sorted({*edges, *(math.nextafter(value, math.inf) for value in tied)})


# --- what is remembered, as it stands in the file ------------------------------------------------------------------

Reading = tuple[What, float, float]
"""What, value, threshold."""
Count = Annotated[int, Field(ge=0)]
Votes = Annotated[float, Field(ge=0)]
T = TypeVar("T")
Derived = Annotated[T, Field(exclude=True)]
"""Not in the file: counted from the rest of it. A plain field, because pydantic's private ones are slow to read."""


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Scores(_State):
    """Raw image scores of pages."""

    first: Annotated[list[float], Field(max_length=REFERENCE)] = []
    """While the reference window fills."""
    edges: Annotated[list[float], Field(max_length=2 * N_BINS)] = []
    """Of the bins, once it is full."""
    reference: list[Count] = []
    now: Annotated[list[Count], Field(max_length=NOW)] = []
    """Bins of the last pages, oldest first."""
    counts: Derived[list[int]] = []
    """Of ``now``, by bin."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        n_bins = len(self.edges) + 1 if self.edges else 0
        if len(self.reference) != n_bins or any(at >= n_bins for at in self.now) or sorted(self.edges) != self.edges:
            raise ValueError("bins and edges do not belong together")
        if self.edges and not any(self.reference):
            raise ValueError("the reference window is empty")
        self.counts = [self.now.count(at) for at in range(n_bins)]
        return self

    def add(self, score: float) -> None:
        """Take one page into the window that is due."""
        if not self.edges:
            self.first.append(score)
            if len(self.first) >= REFERENCE:
                self._close_reference()
            return
        at = bisect_right(self.edges, score)
        self.now.append(at)
        self.counts[at] += 1
        if len(self.now) > NOW:
            self.counts[self.now.pop(0)] -= 1

    def _close_reference(self) -> None:
        self.edges = decile_edges(self.first)
        filled = [bisect_right(self.edges, score) for score in self.first]
        self.reference = [filled.count(at) for at in range(len(self.edges) + 1)]
        self.counts = [0] * len(self.reference)
        self.first = []

    def readings(self) -> Iterator[Reading]:
        """The PSI, once it can be judged."""
        n = len(self.now)
        if n >= FEWEST:
            yield (
                "score",
                psi(self.reference, self.counts),
                psi_threshold(sum(self.reference), n, len(self.reference)),
            )

    def sentence(self) -> str:
        """Say where the scores went."""
        then = sum(at * n for at, n in enumerate(self.reference)) / sum(self.reference)
        moved = sum(self.now) / len(self.now) - then
        how = "spread differently" if abs(moved) < 1 else "higher" if moved > 0 else "lower"
        return f"image scores are {how} than in the reference window; look at focus, contrast and the detector"


class _Classes(_State):
    """Labels of the defects of pages that have any."""

    reference: dict[str, Votes] = {}
    """Votes by label."""
    n_reference: Annotated[int, Field(ge=0, le=REFERENCE)] = 0
    now: Annotated[list[Annotated[list[str], Field(min_length=1)]], Field(max_length=NOW)] = []
    """Labels of the last pages, oldest first."""
    rise: Annotated[float, Field(ge=0, le=HEIGHT)] = 0.0
    """CUSUM against a higher unknown rate, held at ``HEIGHT`` so that it comes back from there."""
    fall: Annotated[float, Field(ge=0, le=HEIGHT)] = 0.0
    bins: Derived[dict[str, float]] = {}
    """Reference votes of the common classes and ``REST``."""
    votes: Derived[dict[str, float]] = {}
    """Votes of the current window in the same bins."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not math.isclose(sum(self.reference.values()), self.n_reference, abs_tol=1e-6):
            raise ValueError("the votes are not as many as the pages")
        if self.now and not self._is_ready:
            raise ValueError("there is a current window before the reference window is full")
        self._make_bins()
        for labels in self.now:
            self._vote(labels, 1)
        return self

    @property
    def _is_ready(self) -> bool:
        return self.n_reference >= REFERENCE

    @property
    def rate(self) -> float:
        """Unknown rate of the reference window; half an unknown is added, none is no proof that there are none."""
        return (self.reference.get("unknown", 0.0) + 0.5) / (self.n_reference + 1)

    def add(self, labels: list[str]) -> None:
        """Take one page into the window that is due."""
        if not self._is_ready:
            for label in labels:
                self.reference[label] = self.reference.get(label, 0.0) + 1 / len(labels)
            self.n_reference += 1
            self._make_bins()
            return
        self.now.append(labels)
        self._vote(labels, 1)
        if len(self.now) > NOW:
            self._vote(self.now.pop(0), -1)
        share = labels.count("unknown") / len(labels)
        self.rise = _stepped(self.rise, share, self.rate, risen(self.rate))
        self.fall = _stepped(self.fall, share, self.rate, 1 - risen(1 - self.rate))

    def _make_bins(self) -> None:
        if self._is_ready:
            common = {label: votes for label, votes in self.reference.items() if votes >= COMMON * self.n_reference}
            self.bins = common | {REST: max(0.0, self.n_reference - sum(common.values()))}
            self.votes = dict.fromkeys(self.bins, 0.0)

    def _vote(self, labels: list[str], sign: int) -> None:
        for label in labels:
            self.votes[label if label in self.bins else REST] += sign / len(labels)

    def readings(self) -> Iterator[Reading]:
        """CUSUM and PSI, once they can be judged."""
        n = len(self.now)
        if n:
            yield "unknown rate", max(self.rise, self.fall), HEIGHT
        if n >= FEWEST:
            votes = [max(0.0, votes) for votes in self.votes.values()]  # sums of thirds leave a -1e-16 behind
            yield "class mix", psi(list(self.bins.values()), votes), psi_threshold(REFERENCE, n, len(self.bins))

    def rate_sentence(self) -> str:
        """Say how the unknown rate changed."""
        n = len(self.now)
        now = sum(labels.count("unknown") / len(labels) for labels in self.now) / n
        way = "rose" if self.rise >= self.fall else "fell"
        then = f"{self.rate:.0%} in the reference window"
        return f"unknown rate {way}: {then}, {now:.0%} in the last {n} pages with defects"

    def mix_sentence(self) -> str:
        """Say how the class mix changed, by the class that changed most."""
        then = {label: votes / self.n_reference for label, votes in self.bins.items()}
        now = {label: votes / len(self.now) for label, votes in self.votes.items()}
        most = max(then, key=lambda label: abs(now[label] - then[label]))
        name = most or "rare and new classes"
        return f"class mix changed, most of all {name}: {then[most]:.0%} in the reference window, {now[most]:.0%} now"


def _stepped(level: float, share: float, p0: float, p1: float) -> float:
    if not 0.01 <= p1 <= 0.99:  # there is no room for such a change
        return 0.0
    unknown, other = cusum_steps(p0, p1)
    return min(HEIGHT, max(0.0, level + share * unknown + (1 - share) * other))


class _Pages(_State):
    """Quality of the last pages."""

    now: Annotated[list[Annotated[int, Field(ge=0, le=2)]], Field(max_length=PAGES)] = []
    """0: a good image, 1: a bad one, 2: none; oldest first."""

    def add(self, quality: Quality) -> None:
        """Take one page into the window."""
        self.now.append(2 if not quality.is_image else 1 if quality.flags else 0)
        if len(self.now) > PAGES:
            self.now.pop(0)

    def readings(self) -> Iterator[Reading]:
        """Shares of the whole window, so that a few pages do not alarm at the beginning."""
        yield "no image", self.now.count(2) / PAGES, MAX_NO_IMAGE
        yield "bad quality", self.now.count(1) / PAGES, MAX_BAD_QUALITY

    def no_image_sentence(self) -> str:
        """Say how many pages hold no image."""
        return f"{self.now.count(2)} of the last {len(self.now)} pages hold no image; look at the beam and the tool"

    def bad_sentence(self) -> str:
        """Say how many pages are bad images."""
        return f"{self.now.count(1)} of the last {len(self.now)} pages are bad images; see `quality` in their results"


class _Watch(_State):
    """One source under one recipe."""

    source: str
    recipe_id: str
    recipe_name: str
    models: dict[str, int] = {}
    """Version by model that answered last."""
    scores: _Scores = Field(default_factory=_Scores)
    classes: _Classes = Field(default_factory=_Classes)
    pages: _Pages = Field(default_factory=_Pages)
    alarmed: set[What] = set()
    """What has alarmed and not come back yet."""

    def follow(self, review: Review) -> None:
        """Start anew what another model makes incomparable."""
        for model, version in review.model_versions.items():
            if self.models.get(model, version) != version:
                self.restart_classes()
                if model == "detector":
                    self.scores = _Scores()
                    self.alarmed.discard("score")
            self.models[model] = version

    def restart_classes(self) -> None:
        self.classes = _Classes()
        self.alarmed -= {"unknown rate", "class mix"}

    def add(self, page: PageReview) -> Iterator[Alarm]:
        """Take one page; yield what alarms by it."""
        self.pages.add(page.quality)
        is_difference = page.reference is not None and page.reference.used  # another scale than the detector's
        if page.score_map is not None and math.isfinite(page.score_map.raw_score) and not is_difference:
            self.scores.add(float(page.score_map.raw_score))
        if page.defects:
            self.classes.add([defect.verdict.label or defect.verdict.kind for defect in page.defects])
        for what, value, threshold in self.readings():
            if value >= threshold and what not in self.alarmed:
                self.alarmed.add(what)
                yield self._alarm(what, value, threshold)
            elif value < threshold / 2:
                self.alarmed.discard(what)

    def readings(self) -> Iterator[Reading]:
        yield from self.scores.readings()
        yield from self.classes.readings()
        yield from self.pages.readings()

    def sentence(self, what: What) -> str:
        """Say what left the usual, where, from what to what."""
        sentence_of = {
            "no image": self.pages.no_image_sentence,
            "bad quality": self.pages.bad_sentence,
            "unknown rate": self.classes.rate_sentence,
            "score": self.scores.sentence,
            "class mix": self.classes.mix_sentence,
        }
        return f"{self.source}, recipe {self.recipe_name}: {sentence_of[what]()}"

    def _alarm(self, what: What, value: float, threshold: float) -> Alarm:
        n = len(self.scores.now if what == "score" else self.pages.now if what in OF_TOOL else self.classes.now)
        return Alarm(self.source, self.recipe_name, self.recipe_id, what, value, threshold, n, self.sentence(what))


class _Watches(_State):
    """The state file."""

    schema_version: Literal[1] = 1
    watches: Annotated[list[_Watch], Field(max_length=MAX_WATCHES)] = []
    """The one seen last stands last."""


# --- what the daemon holds -----------------------------------------------------------------------------------------


class DriftWatch:
    """Reference and current windows of every source and recipe; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[tuple[str, str], _Watch] = {}

    def observe(self, review: Review) -> list[Alarm]:
        """Take one finished review; return what alarms by it, once per excursion.

        What has alarmed is armed again once its value has fallen below half the threshold.
        """
        key = review.source, review.recipe_id
        with self._lock:
            watch = self._watches.pop(key, None) or _Watch(
                source=review.source, recipe_id=review.recipe_id, recipe_name=review.recipe_name
            )
            self._watches[key] = watch  # last
            if len(self._watches) > MAX_WATCHES:
                del self._watches[next(iter(self._watches))]
            watch.follow(review)
            return [alarm for page in review.pages for alarm in watch.add(page)]

    def values(self) -> dict[tuple[str, What], float]:
        """Value over threshold by source and what, of the recipe seen last; 0 until it can be judged."""
        with self._lock:
            values: dict[tuple[str, What], float] = {}
            for (source, _), watch in self._watches.items():
                values |= {(source, what): 0.0 for what in WATCHED}
                values |= {(source, what): value / threshold for what, value, threshold in watch.readings()}
            return values

    def state(self) -> dict[str, Any]:
        """All that is remembered, as JSON takes it."""
        with self._lock:
            return _Watches.model_construct(watches=list(self._watches.values())).model_dump(mode="json")

    @classmethod
    def from_state(cls, state: object) -> Self:
        """Go on where ``state`` was taken.

        Raises:
            ValidationError: it is not what ``state`` returns.
        """
        drift = cls()
        for watch in _Watches.model_validate(state).watches:
            drift._watches[watch.source, watch.recipe_id] = watch
        return drift

    def save(self, path: Path) -> None:
        """Write the state whole. A disk that refuses is a warning: the windows fill again, the line does not stop."""
        try:
            write_whole(path, json.dumps(self.state()).encode())
        except OSError as error:
            log.warning("the drift watch cannot save %s (%s): after a restart it begins anew", path, error.strerror)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Go on where ``save`` ended; without a usable file begin anew, and set a damaged one aside."""
        try:
            return cls.from_state(json.loads(path.read_bytes()))
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("the drift watch begins anew: %s cannot be read (%s)", path, error.strerror)
        except (ValidationError, ValueError, RecursionError) as error:
            why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
            aside = path.with_name(path.name + DAMAGED)
            log.warning("the drift watch begins anew: %s is damaged (%s), kept as %s", path, why, aside.name)
            _set_aside(path, aside)
        return cls()


def alarmed(path: Path) -> dict[str, list[str]]:
    """By source, what stands beyond its limit under the recipe seen last, a sentence each, as last saved.

    Reads only; empty where there is no usable file.
    """
    try:
        watches = _Watches.model_validate_json(path.read_bytes()).watches
    except (OSError, ValueError, RecursionError):
        return {}
    last = {watch.source: watch for watch in watches}
    return {source: [watch.sentence(what) for what in sorted(watch.alarmed)] for source, watch in last.items()}


def _set_aside(path: Path, aside: Path) -> None:
    try:
        rename(path, aside)
    except OSError as error:
        log.warning("%s stays where it is: %s", path, error.strerror)
