"""One image's history from what is on disk: ledger, audit log, results, outbox, and the journal if readable."""

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.settings.site import Folder, Site
from semwatch.store import audit, results
from semwatch.store.audit import AUDIT
from semwatch.store.ledger import Ledger, OutboxItem, Work
from semwatch.store.review_record import ReasonRecord, ReviewRecord, printable
from semwatch.streams import records
from semwatch.system.clock import utc_of
from semwatch.system.files import Stamp, stamp_of

JOURNAL_TIMEOUT_S = 20.0
MAX_JOURNAL_LINES = 1000

Where = Literal["file", "ledger", "result", "audit", "journal"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to an image."""

    utc: str
    """ISO 8601, Z; empty where the time is not known."""
    where: Where
    text: str


@dataclass(frozen=True, slots=True)
class History:
    """What is known of one content of one source."""

    source: str
    sha256: str
    path: str
    """Where the content lay when it was taken for review last."""
    state: str
    attempts: int
    events: tuple[Event, ...]
    """In time order."""
    now: tuple[str, ...]
    """Current state, a sentence each."""
    not_asked: tuple[str, ...]
    """Sources that could not be read, and why."""


def collect(site: Site, ledger: Ledger, work: Work) -> History:
    """Collect the history of one piece of work."""
    not_asked: list[str] = []
    events = [*ledger_events(ledger, work), *result_events(site, work)]
    sources: dict[str, Callable[[], list[Event]]] = {
        "audit log": partial(audit_events, site.state_dir / AUDIT, ledger, work),
        "journal": partial(journal_events, work),
    }
    for name, read in sources.items():
        try:
            events += read()
        except ServiceUnavailable as error:
            not_asked.append(f"the {name} was not read: {error}")
    return History(
        work.source,
        work.sha256,
        work.path,
        work.state,
        work.attempts,
        tuple(sorted(events, key=lambda event: event.utc)),
        tuple(current_state(site, ledger, work)),
        tuple(not_asked),
    )


def ledger_events(ledger: Ledger, work: Work) -> Iterator[Event]:
    """What the ledger knows: the files of this content, when it was taken, and how that ended."""
    for seen in ledger.seen_as(work.source, work.sha256):
        name = printable(seen.path)
        yield Event(
            _utc(seen.stamp.mtime_ns / 1e9),
            "file",
            f"{name} was written, {max(seen.stamp.size, 0)} bytes (its own time)",
        )
        if seen.path != work.path:
            yield Event(seen.seen_utc, "ledger", f"{name} has the same content: a duplicate of {printable(work.path)}")
        elif seen.seen_utc != work.first_seen_utc:
            yield Event(seen.seen_utc, "ledger", f"{name} was taken once more")
    yield Event(work.first_seen_utc, "ledger", f"{printable(work.path)} was seen and taken for review")
    if work.state == "DONE":
        yield Event(work.finished_utc or "", "ledger", work.reason or "the review was finished")
    if work.state == "QUARANTINED":
        yield Event(work.finished_utc or "", "ledger", f"was put into quarantine: {work.reason}")


def result_events(site: Site, work: Work) -> Iterator[Event]:
    """The results of this content: every kept revision, and the reason of a quarantine."""
    try:
        target = results.review_path(site.results_dir, work.source, work.path)
    except ImageError:
        return
    stem = target.name.removesuffix(results.REVIEW)
    for place in (target, target.with_name(f"{stem}.{work.sha256[:8]}{results.REVIEW}")):
        for file in (*_revisions(place), place):
            record = _result(file)
            if record is not None and record.sha256 == work.sha256:
                yield Event(record.revised_utc or record.reviewed_utc, "result", f"{_in_words(record)}; {file}")
    reason = _reason(target.with_name(f"{stem}{results.REASON}"))
    if reason is not None and reason.sha256 == work.sha256:
        text = f"quarantine after {reason.attempts} attempts: {reason.reason} {reason.what_to_do}"
        yield Event(reason.quarantined_utc, "result", text)


def audit_events(log: Path, ledger: Ledger, work: Work) -> list[Event]:
    """The audit lines of this content, those that still wait in the ledger included.

    Raises:
        ServiceUnavailable: the log cannot be read.
    """
    waiting = [(json.loads(line) | {"seq": seq}) for seq, line in ledger.audit_after(0, MAX_JOURNAL_LINES)]
    found = {event["seq"]: event for event in (*waiting, *_audit_lines(log, work.sha256))}
    return [
        Event(event.get("utc") or work.finished_utc or "", "audit", _audit_in_words(event))
        for _, event in sorted(found.items())
        if (event.get("source"), event.get("sha256")) == (work.source, work.sha256)
    ]


def journal_events(work: Work) -> list[Event]:
    """The journal's entries on this content, and those on its file from before its content was known.

    Raises:
        ServiceUnavailable: journalctl is absent, fails or hangs, or shows this user no journal.
    """
    program = shutil.which("journalctl")
    if program is None:
        raise ServiceUnavailable("journalctl is not here")
    fields = [f"SHA256={work.sha256}", "+", f"SOURCE={work.source}", f"IMAGE={printable(work.path)}"]
    argv = [program, "--output=json", "--all", "--no-pager", "--quiet", f"--lines={MAX_JOURNAL_LINES}", *fields]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=JOURNAL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceUnavailable(f"journalctl gave no answer: {error}") from error
    if done.returncode != 0:
        message = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
        raise ServiceUnavailable(message or f"journalctl ended with {done.returncode}")
    entries = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    ours = [entry for entry in entries if entry.get("SHA256", work.sha256) == work.sha256]
    if not ours:
        raise ServiceUnavailable("it has no entry of it that this user may see (group systemd-journal sees all)")
    return [Event(_utc(int(e["__REALTIME_TIMESTAMP"]) / 1e6), "journal", _message(e)) for e in ours]


def current_state(site: Site, ledger: Ledger, work: Work) -> Iterator[str]:
    """Current state, a sentence each: the work, what waits for Redis, the file in the drop folder."""
    yield {
        "DONE": f"{work.reason or 'reviewed'}: nothing is left to do",
        "SEEN": f"waits for another try: {work.reason or 'no reason was kept'}",
        "CLAIMED": "is under review, or the daemon died on it and takes it up at its next start",
        "QUARANTINED": f"in quarantine; after mending the cause: semwatch quarantine requeue {work.sha256[:16]}",
    }[work.state]
    if work.attempts:
        yield f"{work.attempts} tries failed or ended the process; the limit is {site.limits.max_attempts}"
    if site.redis is not None:
        waiting = Counter(item.stream for item in ledger.unpublished_with(work.sha256.encode()) if _is_of(item, work))
        yield f"waits for Redis: {_counted(waiting)}" if waiting else "nothing of it waits for Redis"
    folder = next((folder for folder in site.folders if folder.source == work.source), None)
    if folder is None:
        yield f"no drop folder of the site has the source {work.source} any more"
        return
    for seen in ledger.seen_as(work.source, work.sha256):
        yield f"{printable(seen.path)} {_in_folder(folder, seen.path, seen.stamp)}"


def _in_folder(folder: Folder, path: str, reviewed: Stamp) -> str:
    try:
        status = (folder.path / path).lstat()
    except FileNotFoundError:
        return "is no longer in the drop folder"
    except OSError as error:
        return f"cannot be looked at in the drop folder: {error.strerror}"
    now = stamp_of(status)
    if all(was in (None, is_) for was, is_ in zip(reviewed, now, strict=True)):
        return "lies in the drop folder as it was reviewed"
    return "was written again since: what lies in the drop folder now is looked at as new"


def _revisions(target: Path) -> Iterator[Path]:
    revision = 1
    while (kept := results.revision_path(target, revision)).exists():
        yield kept
        revision += 1


def _result(file: Path) -> ReviewRecord | None:
    try:
        return results.read(file)
    except (ImageError, ServiceUnavailable):
        return None


def _reason(file: Path) -> ReasonRecord | None:
    try:
        return ReasonRecord.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _in_words(record: ReviewRecord) -> str:
    verdicts = [defect.verdict for page in record.pages for defect in page.defects]
    counts = Counter(v.kind if v.label in (None, v.kind) else f"{v.kind} {v.label}" for v in verdicts)
    models = ", ".join(f"{name} {version}" for name, version in record.model_versions.items())
    again = f"revision {record.revision}: " if record.revision > 1 else ""
    empty = "no image" if any(not page.quality.is_image for page in record.pages) else "no defect found"
    flags: Counter[str] = Counter(flag.name for page in record.pages for flag in page.quality.flags)
    quality = f" (quality: {_counted(flags)})" if flags else ""
    humans = [defect.human for page in record.pages for defect in page.defects if defect.human is not None]
    words = Counter(human.label or "not-a-defect" for human in humans)
    words.update(f"missed {one.label}" for page in record.pages for one in page.missed)
    people = f"; people say {_counted(words)}" if words else ""
    return f"{again}{_counted(counts) or empty}{quality}; recipe {record.recipe.name}, {models}{people}"


def _audit_lines(log: Path, sha256: str) -> Iterator[dict[str, Any]]:
    """Lines about a content; the chain is `semwatch audit verify`'s matter, not ours."""
    wanted = sha256.encode()
    try:
        for part in audit.parts(log):
            with part.open("rb") as file:
                for line in file:
                    if wanted in line and line.endswith(b"\n"):
                        yield json.loads(line)
    except FileNotFoundError:
        raise ServiceUnavailable(f"there is none at {log}") from None
    except (OSError, ValueError) as error:
        raise ServiceUnavailable(f"{log}: {error}") from error


def _audit_in_words(event: Mapping[str, Any]) -> str:
    line = f"line {event['seq']}: {event.get('event')}"
    match event.get("event"):
        case "reviewed":
            flags = f" (quality: {_counted(event['quality'])})" if event.get("quality") else ""
            line += f", {_counted(event.get('verdicts') or {}) or 'no defect found'}{flags}"
        case "revised":
            changes = [f"{c['from']} -> {c['to']}" for c in event.get("changes") or ()]
            line += f" by head {event.get('head')}: {', '.join(changes) or 'its earlier revision is gone'}"
        case "quarantined":
            line += f": {event.get('reason')}"
        case "corrected":
            changes = [f"{c['model'] or 'missed'} -> {c['to']}" for c in event.get("changes") or ()]
            line += f" by {event.get('by')}: {', '.join(changes)}"
        case "klarf":
            line += f" of lot {event.get('lot')}, {event.get('defects')} defects, {event.get('images')} images"
        case "lot":
            line += f" {event.get('lot')}, revision {event.get('revision')}: {event.get('why')}"
        case "requeued" | "reference":
            line += f" of {event['of']}" if "of" in event else f" by {event.get('by')}"
    return line


def _is_of(item: OutboxItem, work: Work) -> bool:
    try:
        return bool(json.loads(records.unpack(item.payload)[b"meta"])["source"] == work.source)
    except (ValueError, KeyError):
        return False


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))


def _message(entry: Mapping[str, Any]) -> str:
    message = entry.get("MESSAGE")
    text = bytes(message).decode("utf-8", "backslashreplace") if isinstance(message, list) else str(message)
    level = {"2": "crit: ", "3": "err: ", "4": "warning: "}.get(str(entry.get("PRIORITY")), "")
    return f"{level}{text}"


def _utc(seconds: float) -> str:
    return utc_of(datetime.fromtimestamp(seconds, UTC))
