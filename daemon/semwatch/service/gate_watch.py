"""Self-calibration of the gate: what the image scores of each recipe's own stream propose as threshold.

The last ``MOST`` raw image scores of every recipe are kept, all its tools together. Every ``UPDATE_EVERY`` pages
``gate_calibration.propose`` looks at them. A proposal is taken over only where it moves the one before out of its own
interval, so that a threshold does not wander with chance; one that was taken over stays while later looks find none.

Another recipe id has a stream of its own, and another detector starts a stream anew: neither's scores can be compared.
"""

import json
import logging
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semwatch.defects import Review
from semwatch.line.gate_calibration import FEWEST, MOST, Expected, NoProposal, Proposal, propose
from semwatch.settings.recipe import Recipe
from semwatch.system.files import rename, write_whole

log = logging.getLogger(__name__)

UPDATE_EVERY = 100
"""Pages from one look at the scores to the next; a look takes about a tenth of a second."""
MAX_STREAMS = 64
"""Recipes that are remembered; beyond, the one seen longest ago is forgotten."""
STATE, DAMAGED = "gates.json", ".damaged"


@dataclass(frozen=True, slots=True)
class Change:
    """A threshold that was taken over."""

    recipe_id: str
    threshold: float
    before: float | None
    """What it takes the place of, None where there was none."""
    is_used: bool
    """Whether the gate opens by it from now on."""
    sentence: str
    """For people."""


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Stream(_State):
    """The scores of one recipe, as they stand in the file."""

    recipe_id: str
    recipe_name: str
    detector: str
    """Content hash of the detector that gave the scores."""
    scores: Annotated[list[float], Field(max_length=MOST)] = []
    """Oldest first."""
    since: Annotated[int, Field(ge=0)] = 0
    """Pages since the last look."""
    proposal: Proposal | None = None
    """The one that was taken over last."""
    reason: str = ""
    """Why the last look gave none; empty where it gave one."""

    def add(self, scores: list[float]) -> bool:
        """Take the scores of one file; say whether it is time to look."""
        self.scores = (self.scores + scores)[-MOST:]
        self.since += len(scores)
        return len(self.scores) >= FEWEST and self.since >= UPDATE_EVERY

    def look(self, recipe: Recipe, present: float) -> Change | None:
        """Look at the scores; return a change where a proposal is taken over."""
        self.since = 0
        found = propose(
            np.array(self.scores),
            false_alarm_rate=recipe.gate.false_alarm_rate,
            miss_cost=recipe.gate.miss_cost,
            present=present,
        )
        if isinstance(found, NoProposal):
            self.reason = found.reason
            return None
        self.reason = ""
        before = self.proposal
        if before is not None and found.low <= before.threshold <= found.high:
            return None
        self.proposal = found
        is_used = recipe.gate.self_calibration == "use" and recipe.gate.threshold is None
        old = None if before is None else before.threshold
        return Change(self.recipe_id, found.threshold, old, is_used, self.sentence(is_used=is_used))

    def sentence(self, *, is_used: bool) -> str:
        """What the stream says of the threshold."""
        found = self.proposal
        if found is None:
            why = self.reason or f"{len(self.scores)} images so far, a proposal needs {FEWEST}"
            return f"the stream proposes no threshold: {why}"
        verb = "the gate opens above" if is_used else "the stream proposes the threshold"
        made = f"{verb} {found.threshold:.4g} ({found.low:.4g} to {found.high:.4g}), from {found.n} image scores"
        words = f"{made}: {_in_words(found.expected)} expected"
        if found.present is not None and not is_used:
            words += f"; now {found.present.threshold:.4g}: {_in_words(found.present)}"
            is_higher = found.threshold > found.present.threshold
            words += "; it opens on fewer images than now, and misses more" * is_higher
        return words + (f"; the last look gave none: {self.reason}" if self.reason else "")


def _in_words(expected: Expected) -> str:
    return f"{expected.false_alarms} false alarms, {expected.misses} of the visible defects missed"


class _Streams(_State):
    """The state file."""

    schema_version: Literal[1] = 1
    streams: Annotated[list[_Stream], Field(max_length=MAX_STREAMS)] = []
    """The one seen last stands last."""


class GateWatch:
    """The scores and the proposal of every recipe's stream; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}

    def observe(self, review: Review, recipe: Recipe) -> Change | None:
        """Take one finished review; return a change where its scores made one."""
        if recipe.gate.self_calibration == "off" or not review.pages:
            return None
        finite = [
            float(page.score_map.raw_score)
            for page in review.pages
            if page.score_map is not None
            and page.gate_source != "reference"
            and math.isfinite(page.score_map.raw_score)
        ]
        detector = _detector_of(review)
        with self._lock:
            stream = self._streams.pop(recipe.id, None)
            if stream is None or stream.detector != detector:
                stream = _Stream(recipe_id=recipe.id, recipe_name=recipe.name, detector=detector)
            self._streams[recipe.id] = stream  # last
            if len(self._streams) > MAX_STREAMS:
                del self._streams[next(iter(self._streams))]
            is_due = stream.add(finite)
            return stream.look(recipe, float(review.pages[-1].gate_threshold)) if is_due else None

    def threshold(self, recipe: Recipe, detector: str) -> float | None:
        """What the gate is to open by; None where it is the recipe's own or the detector's.

        Args:
            recipe: which judges.
            detector: content hash of the detector in service.
        """
        stream = self._streams.get(recipe.id)
        if recipe.gate.self_calibration != "use" or stream is None or stream.detector != detector:
            return None
        return None if stream.proposal is None else stream.proposal.threshold

    def proposal(self, recipe: Recipe, detector: str) -> Proposal | None:
        """What was taken over last for a recipe, with this detector."""
        stream = self._streams.get(recipe.id)
        if recipe.gate.self_calibration == "off" or stream is None or stream.detector != detector:
            return None
        return stream.proposal

    def sentence(self, recipe: Recipe, detector: str | None = None) -> str:
        """What is known of a recipe's gate from its own stream, for people; of any detector where none is named."""
        if recipe.gate.self_calibration == "off":
            return "self-calibration is off"
        stream = self._streams.get(recipe.id)
        if stream is None or detector not in (None, stream.detector):
            stream = _Stream(recipe_id=recipe.id, recipe_name=recipe.name, detector="")
        is_used = recipe.gate.self_calibration == "use" and recipe.gate.threshold is None
        return stream.sentence(is_used=is_used)

    def state(self) -> dict[str, Any]:
        """All that is remembered, as JSON takes it."""
        with self._lock:
            return _Streams.model_construct(streams=list(self._streams.values())).model_dump(mode="json")

    @classmethod
    def from_state(cls, state: object) -> Self:
        """Go on where ``state`` was taken.

        Raises:
            ValidationError: it is not what ``state`` returns.
        """
        gates = cls()
        gates._streams = {stream.recipe_id: stream for stream in _Streams.model_validate(state).streams}
        return gates

    def save(self, path: Path) -> None:
        """Write the state whole. A disk that refuses is a warning: scores come again, the line does not stop."""
        try:
            write_whole(path, json.dumps(self.state()).encode())
        except OSError as error:
            log.warning("the self-calibration cannot save %s (%s): a restart forgets it", path, error.strerror)

    @classmethod
    def load(cls, path: Path, *, is_owner: bool = True) -> Self:
        """Go on where ``save`` ended; without a usable file begin anew.

        Args:
            path: of the file.
            is_owner: set a damaged file aside and log it; whoever only looks leaves it.
        """
        try:
            return cls.from_state(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
        except ValidationError as error:
            why = f"is damaged ({error.errors(include_url=False)[0]['msg']})"
        except (ValueError, RecursionError) as error:
            why = f"is damaged ({error})"
        if is_owner:
            log.warning("the self-calibration begins anew: %s %s", path, why)
            if "damaged" in why:
                _set_aside(path)
        return cls()


def _detector_of(review: Review) -> str:
    return review.model_hashes.get("detector") or str(review.model_versions.get("detector", ""))


def _set_aside(path: Path) -> None:
    try:
        rename(path, path.with_name(path.name + DAMAGED))
    except OSError as error:
        log.warning("%s stays where it is: %s", path, error.strerror)
