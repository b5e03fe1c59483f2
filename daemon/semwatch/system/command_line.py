"""What both programs do with a command line: argv -> a command -> exit code, errors in words or as JSON."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from semwatch.errors import SemwatchError, exit_code
from semwatch.system.text import escaped

EPILOG = (
    "Exit codes: 0 all well; 1 done, but some files could not be reviewed or some checks failed; 2 settings, recipe or "
    "arguments are wrong; 3 the models do not fit; 4 a service that is needed is away."
)
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
USAGE = 2
"""Exit code where the arguments are wrong."""
_UsageError: Any = typer.BadParameter.__bases__[0]


JsonOption = Annotated[bool, typer.Option("--json", help="JSON for machines instead of words for people.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        import importlib.metadata  # noqa: PLC0415 - it takes longer than many a command

        typer.echo(f"semwatch {importlib.metadata.version('semwatch')}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]


def run(app: typer.Typer, name: str, show: Callable[[SemwatchError], None]) -> None:
    """Run the command of ``sys.argv`` and end the process with its exit code.

    With ``--json`` an error stands on standard output too, where the answer would be.

    Args:
        app: the program.
        name: of the program.
        show: tells a person of an expected error.
    """
    is_json = "--json" in sys.argv
    try:
        code = app(prog_name=name, standalone_mode=not is_json)
        raise SystemExit(code if isinstance(code, int) else 0)
    except SemwatchError as error:
        show(error)
        if is_json:
            _answer(type(error).__name__, str(error), exit_code(error))
        raise SystemExit(exit_code(error)) from error
    except _UsageError as error:  # only with --json: else typer has shown it already
        words = error.format_message()
        sys.stderr.write(f"{name}: {escaped(words)}\n")
        _answer("UsageError", words, USAGE)
        raise SystemExit(USAGE) from error
    except typer.Abort as error:
        sys.stderr.write("Aborted.\n")
        _answer("Aborted", "the question was not answered with yes", 1)
        raise SystemExit(1) from error


def _answer(kind: str, message: str, code: int) -> None:
    typer.echo(json.dumps({"error": kind, "message": escaped(message), "exit_code": code}))
