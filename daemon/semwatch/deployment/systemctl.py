"""What installing asks of systemd: users, folders, units; each call has a timeout and its error is put into words."""

import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from semwatch.errors import ConfigError, ServiceUnavailable

BOOTED = Path("/run/systemd/system")
"""There where systemd runs the machine, as sd_booted(3) has it."""
CALL_S = 60.0
STOP_S = 240.0
"""Longer than TimeoutStopSec of any unit, and two of them one after the other."""
POLL_S = 0.2
_KINDS = (".service", ".timer", ".path", ".target", ".socket")


def call(*command: str, timeout_s: float = CALL_S, accept: Collection[int] | None = (0,)) -> str:
    """Run one of systemd's tools and return what it printed; ``accept`` None takes every exit status.

    Raises:
        ConfigError: the tool is not here.
        ServiceUnavailable: it failed, or took longer than ``timeout_s``; with its own words.
    """
    words = " ".join(command)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not on this machine; semwatch runs as a service under systemd") from None
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise ServiceUnavailable(f"`{words}` did not end within {timeout_s:g} s") from None
    if accept is not None and done.returncode not in accept:
        message = (done.stderr or done.stdout).strip() or "it gave no message"
        raise ServiceUnavailable(f"`{words}` failed ({done.returncode}): {message}")
    return done.stdout


def states(pattern: str = "semwatch*") -> dict[str, str]:
    """The loaded units of that name that run, start, stop or have failed, each with its state.

    Raises:
        ConfigError, ServiceUnavailable: as ``call``.
    """
    wanted = "--state=active,activating,reloading,deactivating,failed"
    listed = call("systemctl", "list-units", "--plain", "--no-legend", "--full", "--no-pager", wanted, pattern)
    rows = [line.split() for line in listed.splitlines()]
    return {row[0]: row[2] for row in rows if len(row) > 2 and row[0].endswith(_KINDS)}


def stop(units: Sequence[str]) -> None:
    """Stop units and wait until they have ended.

    Raises:
        ConfigError, ServiceUnavailable: as ``call``.
    """
    if units:
        call("systemctl", "stop", *units, timeout_s=STOP_S)


def start(units: Sequence[str], *, within_s: float) -> None:
    """Start units and wait until all are active, which for ``Type=notify`` is ready.

    Raises:
        ConfigError: as ``call``.
        ServiceUnavailable: one of them failed, or was not active in time.
    """
    if not units:
        return
    call("systemctl", "reset-failed", "semwatch*", accept=None)  # an earlier failure is not this start's
    call("systemctl", "start", "--no-block", *units)
    deadline = time.monotonic() + within_s
    while True:
        words = call("systemctl", "is-active", *units, accept=None).split()
        waiting = {unit: word for unit, word in zip(units, words, strict=False) if word != "active"}
        if len(words) == len(units) and not waiting:
            return
        states = ", ".join(f"{unit} is {word}" for unit, word in waiting.items()) or "systemctl does not answer"
        if "failed" in waiting.values():
            raise ServiceUnavailable(f"{states}; `journalctl -u {next(iter(waiting))} -n 50` says why")
        if time.monotonic() >= deadline:
            raise ServiceUnavailable(f"not ready within {within_s:g} s: {states}; see `journalctl -u 'semwatch*'`")
        time.sleep(POLL_S)
