"""`semwatch triton`: a Triton server without a container, in the background of this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from semwatch.commands.options import EPILOG, REPOSITORY, JsonOption, RepositoryOption, in_words, out, printable, say
from semwatch.commands.options import table as new_table
from semwatch.triton import background as triton_background
from semwatch.triton import setup as triton_setup

app = typer.Typer(no_args_is_help=True, help="A Triton server without a container: install it, start it, end it.")

FOLDER = Path(".cache/triton")
FolderOption = Annotated[Path, typer.Option(help="Where the server is installed, with its log.")]


@app.command(epilog=EPILOG)
def setup(folder: FolderOption = FOLDER) -> None:
    """Install NVIDIA's server from its wheel into a Python environment of its own; done once."""
    made = triton_setup.set_up(folder)
    say(f": {triton_setup.SERVER} in {made.venv}", ("installed", "green"))


@app.command(epilog=EPILOG)
def up(
    folder: FolderOption = FOLDER,
    repository: RepositoryOption = REPOSITORY,
    grpc_port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")
    ] = triton_background.GRPC_PORT,
    http_port: Annotated[
        int, typer.Option(help="Port for health questions; 0 takes one.")
    ] = triton_background.HTTP_PORT,
    threads: Annotated[int | None, typer.Option(help="Processor threads of one network; all without it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Start the server in the background; one that dies is started again. Listens on 127.0.0.1 alone."""
    now = triton_background.up(folder, repository, grpc_port=grpc_port, http_port=http_port, threads=threads)
    _show(now, as_json)


@app.command(epilog=EPILOG)
def down(folder: FolderOption = FOLDER) -> None:
    """End the server in the background, after the answers under way."""
    did_run = triton_background.down(folder)
    say(f": Triton of {folder}", ("ended" if did_run else "does not run", "green" if did_run else ""))


@app.command(epilog=EPILOG)
def status(folder: FolderOption = FOLDER, as_json: JsonOption = False) -> None:
    """Say whether the server runs, where it listens and which versions it holds; exit code 1 where it is not ready."""
    now = triton_background.status(folder)
    _show(now, as_json)
    if not now["ready"]:
        raise typer.Exit(1)


def _show(now: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(now))
        return
    shown = new_table(show_header=False, box=None)
    for name, value in now.items():
        shown.add_row(name.replace("_", " "), printable(in_words(value)))
    out.print(shown)
