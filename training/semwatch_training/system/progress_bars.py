"""Progress on the console: one bar for each thing that is being done."""

from collections.abc import Callable

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

console = Console(stderr=True)


class Bars:
    """Progress bars, one per thing that is being done; each shows a count and the time left."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = rich.progress.Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=None, visible=False)
        self._kind = ""

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def pause(self) -> None:
        """Let go of the terminal for a question; the next progress takes it again."""
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done."""
        self._progress.start()
        kind = what.split(" ", maxsplit=1)[0]
        if kind != self._kind:
            self._kind, self._task = kind, self._progress.add_task(what, total=total)
        self._progress.update(self._task, description=what, completed=done, total=total)
