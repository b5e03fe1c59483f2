"""A command of the user's, run without a shell: bounded in time and output, in a process group of its own."""

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from semwatch.system.child_server import dying_with_us

MAX_OUTPUT = 4096
"""Last bytes of what it says that are kept."""
_POLL_S = 0.1
_GRACE_S = 1.0
"""Between SIGTERM and SIGKILL, and for output that is on its way when it has ended."""
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")


class Ended(NamedTuple):
    """How a command ended."""

    ok: bool
    why: str
    """For people: ``exit code 0``, or what went wrong."""
    output: str
    """The end of what it said, both outputs together."""


def run(
    argv: Sequence[str], variables: Mapping[str, str], *, timeout_s: float, stop: threading.Event, cwd: str = "/"
) -> Ended:
    """Run a command to its end, or end it.

    It gets PATH, HOME and the locale of this process, ``variables``, no input and no other open file. What it leaves
    running is ended with it: its whole process group.

    Args:
        argv: absolute path of the program, and its arguments as they are.
        timeout_s: after which it is ended.
        stop: set from outside to end it at once.
    """
    if not os.access(argv[0], os.X_OK):
        return Ended(False, f"{argv[0]} is no program that this user may run", "")
    environ = {name: os.environ[name] for name in _KEPT if name in os.environ} | dict(variables)
    try:
        process = subprocess.Popen(
            dying_with_us(*argv),
            env=environ,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return Ended(False, f"cannot be started: {error}", "")
    try:
        output, is_over = _listen(process, time.monotonic() + timeout_s, stop)
    finally:
        _end(process)
    text = output.decode("utf-8", "replace").strip()
    if not is_over:
        return Ended(False, "ended by a stop" if stop.is_set() else f"ended after {timeout_s:g} s", text)
    code = process.returncode
    return Ended(code == 0, f"exit code {code}" if code >= 0 else f"signal {-code}", text)


def _listen(process: subprocess.Popen[bytes], deadline: float, stop: threading.Event) -> tuple[bytes, bool]:
    """Take what it says until it has ended; False where time or a stop came first."""
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        is_open = True
        while True:
            has_ended = process.poll() is not None
            if has_ended:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if has_ended and not is_open:
                return output, True
            if time.monotonic() >= deadline or (stop.is_set() and not has_ended):
                return output, has_ended
            if not is_open:
                stop.wait(_POLL_S)
            elif ready.select(_POLL_S):
                chunk = os.read(process.stdout.fileno(), 65536)
                output = (output + chunk)[-MAX_OUTPUT:]
                if not chunk:
                    ready.unregister(process.stdout)
                    is_open = False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End its process group, kindly first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
            if number == signal.SIGTERM and not _has_group(process.pid):
                break
    if process.stdout is not None:
        process.stdout.close()


def _has_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
