"""The exit codes that the page of operations promises are those of the code, for both programs."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from paths import ROOT
from semwatch import errors
from semwatch.cli.app import app as semwatch_app
from semwatch_training.__main__ import app as training_app

PROGRAMS = {"semwatch": semwatch_app, "semwatch-train": training_app}


def table() -> list[tuple[str, str, str]]:
    section = (ROOT / "docs/operations.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if "|" in line]
    return [(code, means, where) for code, means, where in rows[2:]]


def commands() -> Iterator[tuple[str, Any]]:
    pending = [(name, typer.main.get_command(app)) for name, app in PROGRAMS.items()]
    while pending:
        name, command = pending.pop()
        below = getattr(command, "commands", None)
        if below is None:
            yield name, command
        else:
            pending += [(f"{name} {word}", below[word]) for word in below]


def exits_with(code: str) -> set[str]:
    """Commands whose own code ends with this."""
    return {
        name
        for name, command in commands()
        if re.search(rf"typer\.Exit\({code}\)", inspect.getsource(inspect.unwrap(command.callback)))
    }


def test_every_error_of_ours_has_its_row() -> None:
    named = {name: int(code) for code, means, _ in table() for name in re.findall(r"`(\w+)`", means)}
    assert named.pop("UsageError") == 2
    assert named == {kind.__name__: code for kind, code in errors.EXIT_CODES.items()}


def test_commands_that_end_with_1_though_they_are_done_are_all_listed() -> None:
    (row,) = (where for code, means, where in table() if code == "1" and means.startswith("done"))
    words = re.findall(r"`(?:semwatch )?([a-z ]+)`", row)
    assert {f"semwatch {word}" for word in words} == exits_with("1")


def test_a_refused_head_has_a_code_of_its_own() -> None:
    (where,) = (where for code, _, where in table() if code == "10")
    assert exits_with("REFUSED") == {where.strip("`")}


def test_no_other_code_is_promised() -> None:
    assert {code for code, _, _ in table()} == {"0", "1", "2", "3", "4", "10", "130, 143"}


@pytest.mark.parametrize("name", sorted(dict(commands())))
def test_every_command_that_answers_has_json(name: str) -> None:
    works_until_told = {"semwatch run", "semwatch demo", "semwatch redis", "semwatch triton serve"}
    options = {word for option in dict(commands())[name].params for word in getattr(option, "opts", ())}
    assert ("--json" in options) == (name not in works_until_told)
