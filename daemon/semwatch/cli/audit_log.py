"""`semwatch audit`: the hash-chained log of every review."""

import json
from pathlib import Path
from typing import Annotated

import typer

from semwatch.cli.options import EPILOG, JsonOption, say
from semwatch.errors import ConfigError
from semwatch.store import audit
from semwatch.store.audit import AUDIT
from semwatch.store.ledger import LEDGER, Ledger

app = typer.Typer(no_args_is_help=True, help="The hash-chained log of every review.")


@app.command("verify", epilog=EPILOG)
def verify(
    log: Annotated[Path, typer.Argument(help="The audit log, audit.jsonl in the site's state_dir.")],
    after: Annotated[
        str, typer.Option(help="Hash of the last line that is kept elsewhere, where old parts were moved away.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Check the chain of an audit log and of its parts beside it: any edit, gap, insertion or reordering shows."""
    if not log.is_file():
        raise ConfigError(f"no audit log at {log}; the daemon keeps {AUDIT} in the state_dir of its site")
    n_delivered = _n_delivered(log.with_name(LEDGER))  # asked first: the daemon may append meanwhile
    report = audit.verify(log, after=after)
    problems = list(report.problems)
    if report.last_seq < n_delivered:
        problems.append(f"ends with seq {report.last_seq}: the ledger beside it has handed over {n_delivered}")
    if as_json:
        lines = {"n_lines": report.n_lines, "first_seq": report.first_seq, "last_hash": report.last_hash}
        typer.echo(json.dumps({"ok": not problems, **lines, "problems": problems}))
    elif not problems:
        say(f": {report.n_lines} lines; note elsewhere: {report.last_hash}", ("intact", "green"))
    else:
        for problem in problems:
            say(f": {problem}", ("broken", "red"))
    if problems:
        raise typer.Exit(1)


def _n_delivered(ledger: Path) -> int:
    """Number of the last line that the audit log must hold; 0 without a ledger to tell."""
    if not ledger.exists():
        return 0
    with Ledger(ledger, read_only=True) as opened:
        last_seq, waiting = opened.last_audit_seq(), opened.audit_after(0, limit=1)
    return waiting[0][0] - 1 if waiting else last_seq
