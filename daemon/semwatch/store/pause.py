"""Why the line pauses, in ``<state_dir>/paused.json``: for commands on the same machine.

{"utc": since when, "reason": one of ``REASONS``, "sentence": what is wrong}, or null fields while files are taken
"""

import json
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from semwatch.system.clock import utc_now
from semwatch.system.files import write_whole

PAUSED = "paused.json"

Reason = Literal["results away", "disk full", "service away", "Redis away", "review hangs"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Pause(NamedTuple):
    """Why no file is taken."""

    reason: Reason
    sentence: str
    """With figures, for people."""


def state(state_dir: Path, pause: Pause | None) -> None:
    """Write down why the line pauses; None: it does not.

    Raises:
        OSError: the disk refused.
    """
    utc, reason, sentence = (utc_now(), *pause) if pause else (None, None, None)
    stated = json.dumps({"utc": utc, "reason": reason, "sentence": sentence})
    write_whole(state_dir / PAUSED, stated.encode())


def stated(state_dir: Path) -> tuple[Pause, str] | None:
    """Why the line last said to pause, and since when; None where it did not, or never ran."""
    try:
        found = json.loads((state_dir / PAUSED).read_bytes())
        reason, sentence, utc = found["reason"], str(found["sentence"]), str(found["utc"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (Pause(reason, sentence), utc) if reason in REASONS else None
