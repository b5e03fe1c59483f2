"""Log records as journald's own entries, with fields to search by; one JSON object a line for other collectors.

    MESSAGE, PRIORITY, SYSLOG_IDENTIFIER=semwatch, LOGGER, CODE_FILE, CODE_LINE, CODE_FUNC     of every entry
    EVENT       reviewed, revised, duplicate, quarantined, waits, not read again; drift; swapped, refused (a head)
    SOURCE      name of the drop folder (the tool)
    IMAGE       path in the drop folder
    LOT         folder of the image in the drop folder, as results are kept; absent for an image at its top
    SHA256      of the image's content
    RECIPE, RECIPE_ID
    VERDICTS    defects by verdict kind: ``known=2 unknown=1``; ``defect-free`` without any
    MODELS      version by model: ``detector=1 encoder=1 head=3``
    LOT_ID, STEP, WAFER, SLOT   of a reviewed image that a KLARF names, as the KLARF says them; WAFER and SLOT where it
                has one wafer alone

Which of the later ones an entry has is the caller's: see ``about``. Bytes of a file name that are not UTF-8 stand as
``\\xNN``, as in results.

Priorities: err (3) is for what a person must act on, warning (4) for what mends itself, info (6) for one line a file.

Source: systemd's "Native Journal Protocol", and systemd.exec(5) on ``JOURNAL_STREAM``.
"""

import array
import errno
import fcntl
import json
import logging
import os
import select
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePosixPath

from semwatch.system.text import escaped

SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "semwatch"
PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Least level and its syslog priority, severest first; 7 below."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_PLAIN = logging.Formatter()
"""Message, and below it the traceback where there is one."""


def about(
    event: str | None = None,
    source: str | None = None,
    image: str | None = None,
    sha256: str | None = None,
    *,
    recipe: str | None = None,
    recipe_id: str | None = None,
    verdicts: Mapping[str, int] | None = None,
    models: Mapping[str, int] | None = None,
) -> dict[str, dict[str, str]]:
    """What a logging call is about, for its ``extra=``: the fields above; None leaves one out.

    Args:
        verdicts: number of defects by verdict kind.
        models: version by model.
    """
    lot = str(PurePosixPath(image).parent) if image else "."
    fields = {
        "EVENT": event,
        "SOURCE": source,
        "IMAGE": image,
        "LOT": None if lot == "." else lot,
        "SHA256": sha256,
        "RECIPE": recipe,
        "RECIPE_ID": recipe_id,
        "VERDICTS": None if verdicts is None else _counted(verdicts) or "defect-free",
        "MODELS": None if models is None else _counted(models),
    }
    return {"journal": {name: value for name, value in fields.items() if value is not None}}


def is_stderr(environ: Mapping[str, str], fd: int = 2) -> bool:
    """Say whether standard error goes to the journal, which ``JOURNAL_STREAM`` alone does not: it is inherited."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def is_for_machines(logger: logging.Logger) -> bool:
    """Say whether a logger writes entries or JSON rather than text for people."""
    return any(isinstance(h, JournalHandler) or isinstance(h.formatter, JsonFormatter) for h in logger.handlers)


class JournalHandler(logging.Handler):
    """Hand records to journald, one datagram each; a record never waits.

    Where journald does not take more now, the record is dropped, and the next one that goes through is preceded by how
    many were. Where journald is away, records go to ``fallback``.

    Args:
        address: of journald's socket.
        fallback: None: standard error, each line behind its ``<priority>``.
    """

    def __init__(self, address: str = SOCKET, fallback: logging.Handler | None = None) -> None:
        super().__init__()
        self._address = address
        self._fallback = fallback or _prefixed_stderr()
        self._n_dropped = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            self._report_dropped()
            if not self._send(entry(fields_of(record))):
                self._n_dropped += 1
        except OSError:  # journald is away
            self._fall_back(record)
        except Exception:  # noqa: BLE001 - as in logging: a wrong logging call must not end what it tells of
            self.handleError(record)

    def close(self) -> None:
        """Close the socket; entries that were dropped are reported if there is room by now."""
        self.acquire()
        try:
            if self._socket.fileno() >= 0:
                with suppress(OSError):
                    self._report_dropped()
                self._socket.close()
        finally:
            self.release()
        super().close()

    def _report_dropped(self) -> None:
        if self._n_dropped:
            text = f"{self._n_dropped} log entries are lost: the journal did not take them"
            fields = {"MESSAGE": text, "PRIORITY": "4", "SYSLOG_IDENTIFIER": IDENTIFIER, "LOGGER": __name__}
            if self._send(entry(fields)):
                self._n_dropped = 0

    def _send(self, data: bytes) -> bool:
        """Send an entry; False where journald takes no more now. Raises: OSError when it is away."""
        try:
            try:
                self._socket.sendto(data, self._address)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                self._send_as_file(data)
        except BlockingIOError:
            return False
        return True

    def _send_as_file(self, data: bytes) -> None:
        """Send what no datagram holds as a sealed file in memory; journald reads no other kind."""
        fd = os.memfd_create("semwatch-journal", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._socket.sendmsg([], rights, 0, self._address)

    def _fall_back(self, record: logging.LogRecord) -> None:
        stream = getattr(self._fallback, "stream", None)
        if stream is sys.stderr and not _takes_more(2):
            self._n_dropped += 1
        else:
            self._fallback.handle(record)


class TextFormatter(logging.Formatter):
    """Text for people: control characters spelled out, and every further line set in, so that none can be forged."""

    def format(self, record: logging.LogRecord) -> str:
        """Say one record."""
        return escaped(super().format(record), keeps_lines=True).replace("\n", "\n    ")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, and the journal's fields in lower case."""

    def format(self, record: logging.LogRecord) -> str:
        """Say one record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {name.lower(): _utf8(value).decode() for name, value in fields_of(record).items()}
        numbers = {name: int(fields.pop(name)) for name in ("priority", "code_line")}
        return json.dumps({"time": time, "level": record.levelname, **fields, **numbers}, ensure_ascii=False)


class PrefixFormatter(TextFormatter):
    """Every line behind its ``<priority>``, which journald reads from a service's standard error."""

    def format(self, record: logging.LogRecord) -> str:
        """Say one record."""
        prefix = f"<{priority(record.levelno)}>"
        return "\n".join(f"{prefix}{line}" for line in super().format(record).split("\n"))


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """The fields of one entry."""
    extra: Mapping[str, str] = getattr(record, "journal", {})
    return {
        **extra,
        "MESSAGE": escaped(_PLAIN.format(record), keeps_lines=True),  # journalctl shows others as a blob
        "PRIORITY": str(priority(record.levelno)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
    }


def entry(fields: Mapping[str, str]) -> bytes:
    r"""Write fields as journald reads them; a value of several lines stands behind its length.

    >>> entry({"MESSAGE": "ready", "LOT": "a\nb"})
    b'MESSAGE=ready\nLOT\n\x03\x00\x00\x00\x00\x00\x00\x00a\nb\n'
    """
    return b"".join(_field(name.encode("ascii"), _utf8(value)) for name, value in fields.items())


def priority(level: int) -> int:
    """The syslog priority of a level of ``logging``."""
    return next((number for least, number in PRIORITIES if level >= least), 7)


def _field(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return b"%s\n%s%s\n" % (name, len(value).to_bytes(8, "little"), value)
    return b"%s=%s\n" % (name, value)


def _utf8(value: str) -> bytes:
    """Spell out bytes that are no UTF-8: journalctl hides a message that holds any."""
    try:
        raw = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return value.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace").encode()


def _counted(numbers: Mapping[str, int]) -> str:
    return " ".join(f"{name}={number}" for name, number in numbers.items())


def _prefixed_stderr() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(PrefixFormatter("%(levelname)s %(name)s: %(message)s"))
    return handler


def _takes_more(fd: int) -> bool:
    """Say whether a write would not wait; a file always takes more."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
