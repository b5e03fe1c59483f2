"""The command line: argv -> a command -> exit code. An expected error is one plain message and its exit code."""

import json
import logging
import sys

import typer
from rich.text import Text

from semwatch.cli.app import app
from semwatch.cli.options import err
from semwatch.errors import EXIT_CODES, SemwatchError
from semwatch.system import journal
from semwatch.system.text import escaped

log = logging.getLogger("semwatch")


def main() -> None:
    """Run a command."""
    try:
        app(prog_name="semwatch")
    except SemwatchError as error:
        if journal.is_for_machines(logging.getLogger()):
            log.error("%s: %s", type(error).__name__, error)
        else:
            err.print(
                Text.assemble((type(error).__name__, "red"), f": {escaped(str(error), keeps_lines=True)}"),
                soft_wrap=True,
            )
        code = EXIT_CODES.get(type(error), 1)
        if "--json" in sys.argv:  # who reads the answer by machine finds the error there too
            typer.echo(json.dumps({"error": type(error).__name__, "message": escaped(str(error)), "exit_code": code}))
        raise SystemExit(code) from error


if __name__ == "__main__":
    main()
