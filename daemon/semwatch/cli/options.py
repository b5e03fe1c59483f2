"""What every command shares: options, the exit codes in words, and how text reaches the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from semwatch.settings.fields import EXAMPLES
from semwatch.system.text import escaped

EPILOG = (
    "Exit codes: 0 all well; 1 done, but some files could not be reviewed or some checks failed; 2 settings, recipe or "
    "arguments are wrong; 3 the models do not fit; 4 a service that is needed is away."
)

SiteOption = Annotated[Path, typer.Option(help=f"Site settings; a commented example is {EXAMPLES / 'site.yaml'}.")]
RecipeOption = Annotated[Path | None, typer.Option(help="Recipe; the built-in defaults without it.")]
RepositoryOption = Annotated[Path, typer.Option(help="Model repository.")]
REPOSITORY = Path("model_repository")
JsonOption = Annotated[bool, typer.Option("--json", help="JSON for machines instead of a table.")]

out = Console()
err = Console(stderr=True)


def table(*columns: str, **looks: Any) -> Table:
    """A table that cuts nothing off: half a path or hash is of no use."""
    made = Table(**looks)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def printable(text: str, style: str = "") -> Text:
    """Text as it stands: brackets are no markup, and what would move the cursor or is no UTF-8 stands as \\xNN."""
    return Text(escaped(text, keeps_lines=True), style)


def say(text: str, mark: tuple[str, str] = ("", "")) -> None:
    """Print a line that is never wrapped, after a coloured mark."""
    out.print(Text.assemble(mark, printable(text)), soft_wrap=True)


def in_words(value: object) -> str:
    """A value as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(item)}" for key, item in value.items()) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "; ".join(map(in_words, value)) or "-"
    return "-" if value is None else str(value)
