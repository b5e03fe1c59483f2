"""Every command and where it stands. A command's module is loaded when it is asked for, so that each starts quickly."""

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import typer
from typer.core import TyperGroup

from semwatch.system.command_line import EPILOG, HELP_NAMES, VersionOption

PLACES: Mapping[str, str] = {
    "init": "init:init",
    "run": "daemon:run",
    "review": "review:review",
    "demo": "demo:demo",
    "logs": "logs:logs",
    "lot": "lots:lot",
    "correct": "people:correct",
    "quality": "people:quality_command",
    "rereview": "rereview:rereview",
    "reindex": "lots:reindex",
    "adapt": "adapt:adapt",
    "redis": "redis_server:redis_server",
    "install": "install:install",
    "upgrade": "install:upgrade_command",
    "uninstall": "install:uninstall",
    "status": "state:status",
    "doctor": "state:doctor_command",
    "recipe": "recipe:app",
    "audit": "audit_log:app",
    "quarantine": "quarantine:app",
    "clusters": "clusters:app",
    "models": "models:app",
    "queue": "queue:app",
    "klarf": "klarf:app",
    "wafer": "wafer:wafer",
    "triton": "triton:app",
}
"""Commands, and groups of them, in the order of the help: the module of this room, and the name in it."""


class _Commands(MutableMapping[str, Any]):
    """Commands by name, each made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, _, attribute = PLACES[name].partition(":")
            found = getattr(importlib.import_module(f"semwatch.cli.{module}"), attribute)
            if isinstance(found, typer.Typer):
                self._made[name] = typer.main.get_group(found)
            else:
                alone = typer.Typer(add_completion=False)
                alone.command(name, epilog=EPILOG)(found)
                self._made[name] = typer.main.get_command(alone)
            self._made[name].name = name
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in PLACES

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]


class Program(TyperGroup):
    """The group of all commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()

    def list_commands(self, ctx: object) -> list[str]:
        """Names alone, which loads no command."""
        del ctx
        return list(PLACES)


app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    context_settings=HELP_NAMES,
)


@app.callback()
def main_options(_: VersionOption = False) -> None:
    """SEM defect review: finds the defects of each image that lands in a folder, and names those it knows."""
