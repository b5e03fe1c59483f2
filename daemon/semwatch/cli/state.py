"""`semwatch status` and `doctor`: how a site stands, and what to mend."""

import json
from collections.abc import Sequence

import typer

from semwatch.cli.options import JsonOption, SiteOption, in_words, say, show_facts
from semwatch.operations import doctor
from semwatch.operations.doctor import Check
from semwatch.settings.site import load_site


def status(site: SiteOption, as_json: JsonOption = False) -> None:
    """Say how a site stands: waiting files, rate, queue depths, model versions, disk left."""
    state = doctor.status(load_site(site))
    if as_json:
        typer.echo(json.dumps(state))
        return
    show_facts({key.replace("_", " "): in_words(value) for key, value in state.items()})


def doctor_command(site: SiteOption, as_json: JsonOption = False) -> None:
    """Check folders, rights, Redis, models and versions, and say what to fix. Run it as the daemon's user."""
    checks = doctor.examine(load_site(site))
    if as_json:
        rows = (
            {"check": c.name, "ok": c.ok, "detail": c.detail, "remedy": c.remedy, "advice": c.advice} for c in checks
        )
        typer.echo(json.dumps(list(rows)))
    else:
        show_checks(checks)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def show_checks(checks: Sequence[Check]) -> None:
    """Print what was looked at, each with what to do about it."""
    for check in checks:
        mark = ("FIX", "red") if not check.ok else ("!! ", "yellow") if check.advice else ("ok ", "green")
        say(f" {check.name}: {check.detail}", mark)
        if more := check.advice if check.ok else check.remedy:
            say(f"    {more}")
