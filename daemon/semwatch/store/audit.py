"""Append-only, hash-chained log: any edit of what was written shows.

One JSON object a line, keys sorted, ``\\n`` after each:

    seq     number the ledger gave the event; strictly increasing
    ...     the event as handed over: event, utc, source, path, sha256, recipe, models, ...
    prev    hash of the line before, in this file or in the part before it; 64 zeros in the first
    hash    SHA-256 of ``prev``, a newline, and the canonical JSON of the line without ``hash``

The chain proves order and integrity of what is there. Lines missing at the end show only against a number or a hash
from elsewhere, such as the ledger's: see ``expected_last_seq``. Canonical JSON: keys sorted, no spaces, ASCII.

A log that has grown is set aside whole and goes on in a new file, with the chain unbroken:

    audit-000000123456.jsonl    a part that is full; its last line has seq 123456; may be moved away, oldest first
    audit.jsonl                 what is appended to
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.system import files

log = logging.getLogger(__name__)

AUDIT = "audit.jsonl"
"""Its name in the state folder."""

GENESIS = "0" * 64
_PART_DIGITS = 12
RESERVED = frozenset({"seq", "prev", "hash"})
MAX_LINE_BYTES = 1 << 24
MAX_BYTES = 100_000_000
"""A log of this size is set aside; about 200,000 images."""
MODE = 0o640
"""Rights of the log: its owner appends, its group may look."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What ``verify`` found."""

    first_seq: int
    """Above 1 where parts before are elsewhere; 0 where there is no line."""
    n_lines: int
    last_seq: int
    """0 where there is no line."""
    last_hash: str
    """What to note elsewhere: a log that no longer holds it has been cut or rewritten."""
    problems: tuple[str, ...]
    """Each names its line and what is wrong."""

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.problems


class AuditLog:
    """The open log; one process and one thread at a time, which the ledger's lock sees to.

    A last line that a crash left torn is cut off: the ledger still holds its event and hands it over again.

    It is opened to append, so a root who wants more than rights may add the file system's own: ``chattr +a``; then it
    is never set aside.

    Args:
        path: made, with mode 0640, where it is not there; wider rights are narrowed.
        max_bytes: it is set aside once it has this size, and goes on in a new file.

    Raises:
        ConfigError: the last whole line is not one of ours.
        ServiceUnavailable: the disk is full or broken.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path, self._max_bytes = path, max_bytes
        self._fd = -1
        try:
            self._open()
        except OSError as error:
            self.close()
            raise ServiceUnavailable(f"cannot open {path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._fd = files.open_to_append(self.path, mode=MODE)
        _narrow_rights(self._fd, self.path)
        self._end = _cut_torn_line(self._fd, self.path)
        self.last_seq, self._last_hash = _last_link(self._fd, self._end, self.path)
        if self._end == 0 and (before := parts(self.path)[:-1]):
            self.last_seq, self._last_hash = _last_link_of(before[-1])

    def append(self, entries: Sequence[tuple[int, Mapping[str, object]]]) -> None:
        """Append events and make them safe with one fsync; those with ``seq`` up to ``last_seq`` are skipped.

        Raises:
            ServiceUnavailable: the disk is full or broken; nothing of the batch counts as written.
            ValueError: ``seq`` does not increase, or an event uses a key of the chain.
        """
        lines, last_seq, last_hash = [], self.last_seq, self._last_hash
        for seq, event in _strictly_increasing(entries):
            if seq <= self.last_seq:
                continue
            line, last_hash = _link(seq, event, last_hash)
            lines.append(line)
            last_seq = seq
        if not lines:
            return
        if self._end >= self._max_bytes:
            self._set_aside()
        self._write(b"".join(lines))
        self.last_seq, self._last_hash = last_seq, last_hash

    def _write(self, data: bytes) -> None:
        try:
            self._end = files.append(self._fd, self._end, data)
        except OSError as error:
            raise ServiceUnavailable(f"cannot write {self.path}: {error.strerror}; free or mend the disk") from error

    def _set_aside(self) -> None:
        """Let what is full be a part, and go on in a new file; a crash between the two is mended at the next start."""
        try:
            files.rename(self.path, _part(self.path, self.last_seq))
        except OSError as error:  # chattr +a; a long log is better than none
            log.warning("%s cannot be set aside and grows on: %s", self.path, error.strerror)
            self._max_bytes *= 2
            return
        self.close()
        try:
            self._open()
        except OSError as error:
            raise ServiceUnavailable(f"cannot open {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parts(path: Path) -> list[Path]:
    """The files of a log in the order of their lines: parts set aside, then ``path`` itself."""
    digits = "[0-9]" * _PART_DIGITS
    return [*sorted(path.parent.glob(f"{path.stem}-{digits}{path.suffix}")), path]


def verify(path: Path, *, expected_last_seq: int | None = None, after: str = "") -> AuditReport:
    """Check every line of a log, and of its parts beside it, against its chain, reading only.

    Args:
        path: of the log; one that is not there has no lines.
        expected_last_seq: the last number that must be there, as the ledger knows it.
        after: hash of the last line of the parts that are kept elsewhere; none are.

    Raises:
        ServiceUnavailable: the disk cannot be read.
    """
    problems: list[str] = []
    seq, last_hash, n_lines, first_seq = 0, after or GENESIS, 0, 0
    try:
        for file, number, line in _lines(path):
            n_lines += 1
            if n_lines == 1 and after and (event := _parsed(line)):
                seq = event["seq"] - 1  # what comes before is told by its hash alone
            found, seq, last_hash = _check_line(line, seq, last_hash)
            first_seq = first_seq or seq
            where = f"line {number}" if file == path else f"{file.name}, line {number}"
            problems += [f"{where}: {problem}" for problem in found]
    except OSError as error:
        raise ServiceUnavailable(f"cannot read {path}: {error.strerror}") from error
    if expected_last_seq is not None and seq != expected_last_seq:
        what = "lines are missing at the end" if seq < expected_last_seq else "there is more than was handed over"
        problems.append(f"line {n_lines}: ends with seq {seq}, not {expected_last_seq}: {what}")
    return AuditReport(first_seq, n_lines, seq, last_hash, tuple(problems))


def _check_line(line: bytes, seq: int, last_hash: str) -> tuple[list[str], int, str]:
    """Check one line against its predecessor; go on from what it claims, so that one edit is one finding."""
    if not line.endswith(b"\n"):
        return ["is torn: the end of the line is missing"], seq, last_hash
    event = _parsed(line)
    if event is None:
        return ["is no line of an audit log"], seq, last_hash
    problems = []
    if event["prev"] != last_hash:
        problems.append("does not follow the line before it: lines were removed, inserted, reordered or edited")
    if event["seq"] <= seq:
        problems.append(f"seq {event['seq']} does not come after {seq}")
    elif event["seq"] != seq + 1:
        problems.append(f"seq {seq + 1} to {event['seq'] - 1} missing")
    rest = {key: value for key, value in event.items() if key != "hash"}
    if _hash(rest) != event["hash"] or _canonical(event) + b"\n" != line:
        problems.append("was edited: its hash does not fit it")
    return problems, event["seq"], event["hash"]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or type(event.get("seq")) is not int:
        return None
    return event if isinstance(event.get("prev"), str) and isinstance(event.get("hash"), str) else None


def _lines(path: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Lines of a log and of its parts, with file and number."""
    for file in parts(path):
        if file.exists():
            with file.open("rb") as opened:
                number = 0
                while line := opened.readline(MAX_LINE_BYTES):
                    number += 1
                    yield file, number, line


def _strictly_increasing(
    entries: Sequence[tuple[int, Mapping[str, object]]],
) -> Iterator[tuple[int, Mapping[str, object]]]:
    last = None
    for seq, event in entries:
        if last is not None and seq <= last:
            raise ValueError(f"seq {seq} after {last}: the ledger hands over in strictly increasing order")
        yield seq, event
        last = seq


def _link(seq: int, event: Mapping[str, object], prev: str) -> tuple[bytes, str]:
    if taken := RESERVED & event.keys():
        raise ValueError(f"an event may not use {', '.join(sorted(taken))}: they belong to the chain")
    linked = {**event, "seq": seq, "prev": prev}
    hash_ = _hash(linked)
    return _canonical({**linked, "hash": hash_}) + b"\n", hash_


def _hash(event: Mapping[str, object]) -> str:
    return hashlib.sha256(str(event["prev"]).encode() + b"\n" + _canonical(event)).hexdigest()


def _canonical(event: Mapping[str, object]) -> bytes:
    return json.dumps(event, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _narrow_rights(fd: int, path: Path) -> None:
    """Take away what others than owner and group, and a group that writes, may do."""
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if mode & ~MODE:
        log.warning("%s: its rights %o are wider than %o and are narrowed", path.name, mode, MODE)
        os.fchmod(fd, mode & MODE)


def _cut_torn_line(fd: int, path: Path) -> int:
    """Cut what follows the last newline; return the size."""
    end, cut = files.cut_torn_line(fd)
    if cut:
        log.warning("%s: a torn last line of %d bytes is cut; the ledger hands it over again", path, cut)
    return end


def _last_link(fd: int, end: int, path: Path) -> tuple[int, str]:
    if end == 0:
        return 0, GENESIS
    start = files.after_last_newline(fd, end - 1)
    event = _parsed(os.pread(fd, end - start, start))
    if event is None:
        raise ConfigError(f"{path}: the last line is no line of an audit log; move the file away and look into it")
    return event["seq"], event["hash"]


def _last_link_of(part: Path) -> tuple[int, str]:
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _last_link(fd, os.fstat(fd).st_size, part)
    finally:
        os.close(fd)


def _part(path: Path, last_seq: int) -> Path:
    return path.with_name(f"{path.stem}-{last_seq:0{_PART_DIGITS}d}{path.suffix}")
