"""The command line: argv -> a command -> exit code. An expected error is one plain message and its exit code."""

import logging

from rich.text import Text

from semwatch.cli.app import app
from semwatch.errors import SemwatchError
from semwatch.system import command_line, journal
from semwatch.system.text import escaped

log = logging.getLogger("semwatch")


def main() -> None:
    """Run a command."""
    command_line.run(app, "semwatch", _show)


def _show(error: SemwatchError) -> None:
    if journal.is_for_machines(logging.getLogger()):
        log.error("%s: %s", type(error).__name__, error)
        return
    from semwatch.cli.options import err  # noqa: PLC0415 - the terminal's looks, for whom an error is shown

    words = f": {escaped(str(error), keeps_lines=True)}"
    err.print(Text.assemble((type(error).__name__, "red"), words), soft_wrap=True)


if __name__ == "__main__":
    main()
