"""What every command shares: options, the exit codes in words, and how text reaches the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from semwatch.settings.fields import EXAMPLES
from semwatch.system import command_line, terminal, text

if TYPE_CHECKING:
    from semwatch.operations.quality import Share

EPILOG = command_line.EPILOG
JsonOption = command_line.JsonOption
SiteOption = Annotated[
    Path,
    typer.Option(envvar="SEMWATCH_SITE", help=f"Site settings; a commented example is {EXAMPLES / 'site.yaml'}."),
]
RecipeOption = Annotated[Path | None, typer.Option(help="Recipe; the built-in defaults without it.")]
RepositoryOption = Annotated[Path, typer.Option(help="Model repository.")]
REPOSITORY = Path("model_repository")

out = Console()
err = Console(stderr=True)
printable = terminal.printable
counted = text.counted


def say(line: str, mark: tuple[str, str] = ("", "")) -> None:
    """Print a line after a coloured mark; a terminal has it wrapped between words, a file has it whole."""
    terminal.print_line(out, line, mark)


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    title: str = "",
    note: str = "",
    right: Sequence[int] = (),
) -> None:
    """Print a table that fits the terminal and breaks no word, see ``terminal.print_table``."""
    terminal.print_table(out, columns, rows, title=title, note=note, right=right)


def show_facts(facts: Mapping[str, str | Text]) -> None:
    """Print names and values, one below the other."""
    terminal.print_facts(out, facts)


def in_share(share: "Share") -> str:
    """A share with its count and interval."""
    if share.value is None:
        return "-"
    return f"{share.value:.0%} {share.count}/{share.n} ({share.low:.0%}-{share.high:.0%})"


def in_words(value: object) -> str:
    """A value as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(item)}" for key, item in value.items()) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "; ".join(map(in_words, value)) or "-"
    return "-" if value is None else str(value)
