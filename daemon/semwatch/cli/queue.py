"""``semwatch queue``: look into the two Redis streams, give dead letters another try, clear what nobody will read."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from semwatch.cli.options import EPILOG, JsonOption, SiteOption, counted, say, show_table
from semwatch.errors import ConfigError
from semwatch.settings.site import load_site
from semwatch.streams import queues, records, unknowns
from semwatch.streams.queues import Entry
from semwatch.streams.records import RESULTS, UNKNOWNS, Fields, Record, ResultSummary
from semwatch.streams.unknowns import Client, Consumer, DeadLetter

MAX_SHOWN = 1000
POLL_S = 0.5


class Stream(StrEnum):
    """The streams by their names."""

    unknowns = UNKNOWNS
    results = RESULTS


app = typer.Typer(no_args_is_help=True, help="The two Redis streams: look, retry, clear. Looking never claims.")

OneStream = Annotated[Stream, typer.Option("--stream", help="Which stream.")]
AnyStream = Annotated[Stream | None, typer.Option("--stream", help="Which stream; both without it.")]
Shown = Annotated[int, typer.Option("-n", min=1, max=MAX_SHOWN, help="Most entries of a stream to show.")]


@app.command(epilog=EPILOG)
def stats(site: SiteOption, as_json: JsonOption = False) -> None:
    """Say what waits in each stream, who holds it, how old the oldest is and what memory it takes."""
    with _server(site) as (client, prefix):
        found = {stream: queues.stats(client, stream, prefix=prefix) for stream in (UNKNOWNS, RESULTS)}
    if as_json:
        typer.echo(json.dumps({stream: dataclasses.asdict(stat) for stream, stat in found.items()}))
        return
    figures, readers = [], []
    for stream, stat in found.items():
        oldest = "-" if stat.oldest_age_s is None else _in_words(stat.oldest_age_s)
        memory = "-" if stat.memory_bytes is None else f"{stat.memory_bytes / 1e6:.1f} MB"
        figures.append((stream, str(stat.length), str(stat.pending), str(stat.dead), oldest, memory))
        for reader in stat.readers:
            readers.append((stream, reader.group, reader.name, str(reader.n_pending), _in_words(reader.idle_s)))
    show_table(("stream", "length", "pending", "dead", "oldest", "memory"), figures, right=(1, 2, 3))
    if readers:
        say("")
        show_table(("stream", "group", "consumer", "pending", "idle"), readers, right=(3,))


@app.command(epilog=EPILOG)
def tail(
    site: SiteOption,
    stream: OneStream = Stream.unknowns,
    n: Shown = 10,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes.")] = False,
    for_s: Annotated[float, typer.Option(min=0, help="With --follow: seconds after which to end.")] = 3600.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show the newest entries of a stream, a line each, and claim none of them."""
    deadline = time.monotonic() + for_s
    with _server(site) as (client, prefix):
        entries = queues.newest(client, stream, n, prefix=prefix)
        last = entries[-1].entry_id if entries else "0-0"
        _show(entries, stream, as_json)
        while follow and time.monotonic() < deadline:
            if entries := queues.after(client, stream, last, prefix=prefix):
                last = entries[-1].entry_id
                _show(entries, stream, as_json)
            else:
                time.sleep(min(POLL_S, max(deadline - time.monotonic(), 0)))


@app.command(epilog=EPILOG)
def failed(site: SiteOption, stream: AnyStream = None, n: Shown = 100, as_json: JsonOption = False) -> None:
    """List dead letters, oldest first: what could not be read, or was handed out again and again."""
    with _server(site) as (client, prefix):
        now_s = queues.now_s(client)
        letters = [(name, one) for name in _chosen(stream) for one in _operator(client, name, prefix).dead(n)]
        n_dead = sum(queues.stats(client, name, prefix=prefix).dead for name in _chosen(stream))
    if as_json:
        typer.echo(json.dumps([_letter(name, one, now_s) for name, one in letters]))
        return
    for name, one in letters:
        age = _in_words(queues.age_s(one.entry_id, now_s))
        handed = counted(one.n_deliveries, "delivery", "deliveries")
        say(f"{name}  {_id(one) or '(no id)'}  {handed}  dead for {age}  {one.error}")
    if not n_dead:
        say("no dead letters")
    if n_dead > len(letters):
        say(f"{n_dead - len(letters)} more; -n shows up to {MAX_SHOWN} of a stream")


@app.command(epilog=EPILOG)
def requeue(site: SiteOption, stream: AnyStream = None, as_json: JsonOption = False) -> None:
    """Put dead letters back into their stream, as new entries at its end."""
    with _server(site) as (client, prefix):
        n_back = {name: _operator(client, name, prefix).requeue_dead() for name in _chosen(stream)}
    if as_json:
        typer.echo(json.dumps(n_back))
        return
    for name, n in n_back.items():
        say(f": {n} of {name}", ("queued again", "green"))


@app.command(epilog=EPILOG)
def purge(
    site: SiteOption,
    of_dead: Annotated[bool, typer.Option("--dead", help="Dead letters of both streams.")] = False,
    of_results: Annotated[bool, typer.Option("--results", help="Result summaries; needs --older-than-days.")] = False,
    of_unknowns: Annotated[bool, typer.Option("--unknowns", help="Unknowns that nobody has acknowledged.")] = False,
    older_than_days: Annotated[
        float | None, typer.Option(min=0, help="Only what was added longer ago; 0 and without it: all.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete entries for good, and say how many. Unknowns that wait to be learned go only where --unknowns is given."""
    if of_results and older_than_days is None:
        raise ConfigError("--results needs --older-than-days: readers may be about to read the newest")
    chosen = [f"{UNKNOWNS}:dead", f"{RESULTS}:dead"] * of_dead + [RESULTS] * of_results + [UNKNOWNS] * of_unknowns
    if not chosen:
        raise ConfigError("nothing to purge was named: --dead, --results --older-than-days N, or --unknowns")
    with _server(site) as (client, prefix):
        ends = {name: queues.last_older_than(client, name, older_than_days or 0, prefix=prefix) for name in chosen}
        there = {name: queues.count(client, name, end, prefix=prefix) for name, end in ends.items() if end}
        if there and not yes:
            _ask(there)
        gone = {name: queues.purge(client, name, end, prefix=prefix) if end else 0 for name, end in ends.items()}
    if as_json:
        typer.echo(json.dumps(gone))
        return
    for name, n in gone.items():
        say(f": {n} of {name}", ("deleted", "yellow"))


def _ask(there: dict[str, int]) -> None:
    """Let a person agree; who cannot be asked has to say so beforehand."""
    what = ", ".join(f"{n} of {name}" for name, n in there.items())
    if not sys.stdin.isatty():
        raise ConfigError(f"this would delete {what} for good: add --yes if that is meant")
    typer.confirm(f"Delete {what} for good?", abort=True, err=True)


@contextmanager
def _server(site: Path) -> Iterator[tuple[Client, str]]:
    """The site's server and the first part of its keys."""
    settings = load_site(site).redis
    if settings is None:
        raise ConfigError(f"{site} names no Redis server, so there are no queues: add redis.url to have them")
    how = settings.model_dump(include={"username", "password_file", "ca_file", "timeout_s"})
    with unknowns.connect(settings.url, **how) as client:
        yield client, settings.prefix


def _chosen(stream: Stream | None) -> list[str]:
    return [UNKNOWNS, RESULTS] if stream is None else [stream.value]


def _operator(client: Client, stream: str, prefix: str) -> Consumer[Fields]:
    """Make the end of a stream that knows dead letters; it claims nothing."""
    return Consumer(client, stream, dict, name="operator", prefix=prefix)


def _letter(stream: str, letter: DeadLetter, now_s: float) -> dict[str, object]:
    return {
        "stream": stream,
        "entry": letter.entry_id,
        "id": _id(letter),
        "deliveries": letter.n_deliveries,
        "age_s": queues.age_s(letter.entry_id, now_s),
        "error": letter.error,
    }


def _id(letter: DeadLetter) -> str:
    return letter.fields.get(b"id", b"").decode("ascii", "backslashreplace")


def _show(entries: Sequence[Entry], stream: Stream, as_json: bool) -> None:
    for entry in entries:
        decoded = _decoded(entry.fields, stream)
        if as_json:
            meta = (
                {"error": decoded}
                if isinstance(decoded, str)
                else json.loads(entry.fields[b"meta"]) | {"id": decoded.id}
            )
            typer.echo(json.dumps({"entry": entry.entry_id, **meta}))
        elif isinstance(decoded, str):
            say(f"{entry.entry_id} cannot be read: {decoded}")
        else:
            say(_unknown_line(decoded) if isinstance(decoded, Record) else _result_line(decoded))


def _decoded(fields: Fields, stream: Stream) -> Record | ResultSummary | str:
    """The entry as a consumer would read it, or why it would not."""
    try:
        return records.decode(fields) if stream is Stream.unknowns else records.decode_result(fields)
    except ValueError as error:
        return str(error)


def _unknown_line(record: Record) -> str:
    nearest = ", ".join(f"{near.label} {near.probability:.2f} (p {near.p_value:.3f})" for near in record.nearest)
    place = f"{record.source}/{record.path} page {record.page} defect {record.defect_id}"
    return f"{record.created_utc}  {record.kind}  {place}  peak {record.peak_score:.3f}  nearest {nearest or '-'}"


def _result_line(summary: ResultSummary) -> str:
    scores = " ".join(f"{score:.3f}" for score in summary.image_scores)
    named = ("known", "novel")  # those stand there by their labels
    found = {**{kind: n for kind, n in summary.n_by_kind.items() if kind not in named}, **summary.n_by_label}
    counts = ", ".join(f"{n} {name}" for name, n in found.items()) or "no defects"
    if summary.n_by_quality:
        counts += "; quality: " + ", ".join(f"{n} {name}" for name, n in summary.n_by_quality.items())
    if summary.outcome != "reviewed":
        counts = f"{summary.outcome}: {summary.reason}"
    return f"{summary.reviewed_utc}  {summary.source}/{summary.path}  score {scores}  {counts}"


def _in_words(seconds: float) -> str:
    """Say a time to two units.

    >>> _in_words(59.9), _in_words(3700), _in_words(90_000)
    ('59 s', '1 h 1 min', '1 d 1 h')
    """
    s = int(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min" if s < 86400 else f"{s // 86400} d {s % 86400 // 3600} h"
