"""Builders for tests of the found classes."""

import hashlib

from semwatch.classes.clusters import Clusters
from semwatch.classes.observations import Observation, learned, observe

T0, T1, T2 = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"
CLASSES = ("bridge", "particle", "defect-free")
SIGNED = {"by": "ana", "utc": T1}


def ids(*numbers: int) -> tuple[str, ...]:
    """Record ids."""
    return tuple(hashlib.sha256(b"%d" % n).hexdigest()[:32] for n in numbers)


def found(*numbers: int, cohesion: float = 0.5, nearest: str = "bridge", distance: float = 2.0) -> Observation:
    """One cluster of a cycle, of these records."""
    return Observation(ids(*numbers), len(numbers), cohesion, nearest, distance, examples=ids(*numbers[:2]))


def three() -> Clusters:
    """novel-1 is learned by head 2, novel-2 and novel-3 are proposed."""
    first = observe(Clusters(), [found(*range(10)), found(*range(10, 16)), found(*range(16, 20))], utc=T0)
    return learned(first, ["novel-1"], 2, T0)
