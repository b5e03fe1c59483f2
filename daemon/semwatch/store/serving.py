"""What the running daemon serves, in ``<state_dir>/serving.json``: for commands on the same machine, without Redis.

The daemon writes it at its start and at every swap. Learning never reads it, see ``semwatch.streams.handoff``.
"""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from semwatch.store.ledger import LEDGER
from semwatch.system.clock import utc_now
from semwatch.system.files import write_whole

ANNOUNCED = "serving.json"
POLL_S = 0.1


def announce(
    state_dir: Path,
    versions: Mapping[str, int],
    refused_heads: Mapping[int, str],
    *,
    refused_detectors: Mapping[int, str] = MappingProxyType({}),
    hashes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write down what serves, with its content hashes, and which heads and detectors were refused.

    Raises:
        OSError: the disk refused.
    """
    utc = utc_now()
    announcement = {
        "utc": utc,
        "versions": dict(versions),
        "refused_heads": dict(refused_heads),
        "refused_detectors": dict(refused_detectors),
        "hashes": dict(hashes),
    }
    write_whole(state_dir / ANNOUNCED, json.dumps(announcement).encode())


def announced(state_dir: Path, model: str = "head") -> tuple[dict[str, int], dict[int, str]]:
    """Versions that the daemon last said to serve, and those of a model that it refused; empty where it never ran."""
    try:
        announcement = json.loads((state_dir / ANNOUNCED).read_bytes())
        versions = {str(name): int(version) for name, version in announcement["versions"].items()}
        refused = announcement.get(f"refused_{model}s", {})  # a daemon of an older release says it of heads alone
        return versions, {int(version): str(why) for version, why in refused.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}


def daemon_runs(state_dir: Path) -> bool:
    """Whether a daemon holds the ledger of this folder."""
    try:
        fd = os.open(state_dir / f"{LEDGER}.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as side:  # root asks too: it neither follows a link nor waits for a pipe
            fcntl.flock(side, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def await_version(state_dir: Path, model: str, version: int, *, timeout_s: float) -> str | None:
    """Wait until the running daemon serves a head or detector; None when it does, else why it does not."""
    deadline = time.monotonic() + timeout_s
    while True:
        versions, refused = announced(state_dir, model)
        if versions.get(model) == version:
            return None
        if version in refused:
            return f"the daemon refused {model} {version}: {refused[version]}"
        if time.monotonic() >= deadline:
            return f"the daemon did not serve {model} {version} within {timeout_s:.0f} s; see its log"
        time.sleep(POLL_S)
