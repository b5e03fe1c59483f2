"""`semwatch run`: the daemon, until a signal stops it."""

import logging
import os
import signal
import sys
import threading
from typing import Annotated, Literal

import typer
from rich.logging import RichHandler

from semwatch.cli.options import SiteOption, err
from semwatch.service.loop import Service
from semwatch.settings.site import load_site
from semwatch.system import journal

log = logging.getLogger("semwatch")

LogFormat = Literal["auto", "text", "json"]


def run(
    site: SiteOption,
    verbose: Annotated[bool, typer.Option(help="One line for every file.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="auto: the journal's own fields where stderr is the journal, else text.")
    ] = "auto",
) -> None:
    """Watch the drop folders and review what lands there, until SIGTERM or Ctrl-C; a second signal leaves at once."""
    _log_to_stderr(logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING, log_format)
    stop = threading.Event()

    def on_signal(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + number))
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + number))
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if not Service(load_site(site), stop=stop, environ=os.environ).run():
        logging.shutdown()
        os._exit(0)  # the interpreter would wait for the hung review's thread for ever


def _log_to_stderr(level: int, form: LogFormat) -> None:
    if form == "auto" and journal.is_stderr(os.environ):
        handler: logging.Handler = journal.JournalHandler()
    elif sys.stderr.isatty() and form == "auto":
        handler = RichHandler(console=err, show_path=False)
    else:
        handler = logging.StreamHandler()
        text = journal.TextFormatter("%(levelname)s %(name)s: %(message)s")
        handler.setFormatter(journal.JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if journal.is_for_machines(logging.getLogger()):  # a traceback is one entry, not a line for each of its lines
        sys.excepthook = lambda *error: log.critical("a bug ends the daemon", exc_info=error)
