"""Tell systemd how the daemon is: ready, still at work, stopping.

The protocol is one datagram of ``KEY=value`` lines to the socket that ``NOTIFY_SOCKET`` names. Without systemd nothing
is sent, and a socket that vanishes never stops a review.

Source: sd_notify(3) and sd_watchdog_enabled(3).
"""

import logging
import os
import socket
from collections.abc import Mapping

SEND_TIMEOUT_S = 1.0

logger = logging.getLogger(__name__)


class Notifier:
    """The way to systemd, as the environment names it.

    Args:
        environ: ``NOTIFY_SOCKET`` is a path or, from ``@`` on, an abstract address; absent, nothing is sent.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def ready(self) -> None:
        """Say that the start is over: ledger open, models loaded, folders watched."""
        self._send("READY=1", wait_s=SEND_TIMEOUT_S)

    def status(self, text: str) -> None:
        """Show one line in ``systemctl status``; line breaks become spaces."""
        self._send("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> None:
        """Say that the loop is alive. Call it from the loop that does the work, never from a timer of its own."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the stop has begun."""
        self._send("STOPPING=1", wait_s=SEND_TIMEOUT_S)

    def _send(self, message: str, *, wait_s: float = 0.0) -> None:
        # Beats and status lines never wait for a reader that is slow: the next one says the same.
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as way:
                way.settimeout(wait_s)
                way.connect(self._address)
                way.send(message.encode("utf-8", "replace"))
        except OSError as error:
            logger.debug("systemd was not told %s: %s", message, error)


def watchdog_interval_s(environ: Mapping[str, str], *, pid: int | None = None) -> float | None:
    """Half of the time after which systemd restarts a silent daemon, in seconds; None where it does not watch.

    Args:
        environ: ``WATCHDOG_USEC`` is the whole time; ``WATCHDOG_PID``, where set, must be ``pid`` (None: this process).
    """
    usec, watched = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID")
    if not (usec.isascii() and usec.isdigit() and int(usec) > 0):
        return None
    if watched is not None and watched != str(pid or os.getpid()):
        return None
    return int(usec) / 2e6
