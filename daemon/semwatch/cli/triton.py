"""`semwatch triton`: a Triton server without a container, in the background of this machine."""

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from semwatch.cli.options import EPILOG, REPOSITORY, JsonOption, RepositoryOption, in_words, say, show_facts
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.system.notify import Notifier, watchdog_interval_s
from semwatch.triton import background as triton_background
from semwatch.triton import setup as triton_setup
from semwatch.triton import view as triton_view
from semwatch.triton.config import Target
from semwatch.triton.plans import Precision
from semwatch.triton.server import START_TIMEOUT_S, LocalTriton, ask
from semwatch.triton.view import Settings, View

app = typer.Typer(no_args_is_help=True, help="A Triton server without a container: install it, start it, end it.")

FOLDER = Path(".cache/triton")
FolderOption = Annotated[Path, typer.Option(help="Where the server is installed, with its log.")]
GrpcPortOption = Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")]
HttpPortOption = Annotated[int, typer.Option(help="Port for health questions; 0 takes one.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Processor threads of one network; all without it.")]
TargetOption = Annotated[Target, typer.Option(help="What runs detector and encoder.")]
EnginesOption = Annotated[
    Path | None, typer.Option(help="Folder of plans that `semwatch-train export` wrote, for the TensorRT targets.")
]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the plans that are taken.")]
SecretOption = Annotated[
    Path | None,
    typer.Option(
        "--control-secret-file",
        help="File with the secret of those who may load models; without it a new one at each start, in the view.",
    ),
]

LOOK_S = 1.0
"""Seconds between two looks at a server in the foreground."""
LOOK_AT_LOADS_S = 5.0
"""Seconds between two looks at what it loads."""


@app.command(epilog=EPILOG)
def setup(folder: FolderOption = FOLDER, target: TargetOption = "onnx-python", as_json: JsonOption = False) -> None:
    """Install NVIDIA's server from its wheel into a Python environment of its own; done once."""
    made = triton_setup.set_up(folder, target)
    if as_json:
        typer.echo(json.dumps({"server": triton_setup.SERVER, "venv": str(made.venv)}))
        return
    say(f": {triton_setup.SERVER} in {made.venv}", ("installed", "green"))


@app.command(epilog=EPILOG)
def up(
    folder: FolderOption = FOLDER,
    repository: RepositoryOption = REPOSITORY,
    grpc_port: GrpcPortOption = triton_background.GRPC_PORT,
    http_port: HttpPortOption = triton_background.HTTP_PORT,
    threads: ThreadsOption = None,
    target: TargetOption = "onnx-python",
    engines: EnginesOption = None,
    precision: PrecisionOption = "fp16",
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start the server in the background; one that dies is started again. Listens on 127.0.0.1 alone."""
    settings = _settings(threads, target, engines, precision)
    now = triton_background.up(
        folder,
        repository,
        grpc_port=grpc_port,
        http_port=http_port,
        settings=settings,
        control_secret_file=secret_file,
    )
    _show(now, as_json)


@app.command(epilog=EPILOG)
def down(folder: FolderOption = FOLDER, as_json: JsonOption = False) -> None:
    """End the server in the background, after the answers under way."""
    did_run = triton_background.down(folder)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "did_run": did_run}))
        return
    say(f": Triton of {folder}", ("ended" if did_run else "does not run", "green" if did_run else ""))


@app.command(epilog=EPILOG)
def status(folder: FolderOption = FOLDER, as_json: JsonOption = False) -> None:
    """Say whether the server runs, where it listens and which versions it holds; exit code 1 where it is not ready."""
    now = triton_background.status(folder)
    _show(now, as_json)
    if not now["ready"]:
        raise typer.Exit(1)


@app.command(epilog=EPILOG)
def serve(
    folder: FolderOption = FOLDER,
    repository: RepositoryOption = REPOSITORY,
    grpc_port: GrpcPortOption = triton_background.GRPC_PORT,
    http_port: HttpPortOption = triton_background.HTTP_PORT,
    threads: ThreadsOption = None,
    target: TargetOption = "onnx-python",
    engines: EnginesOption = None,
    precision: PrecisionOption = "fp16",
    secret_file: SecretOption = None,
    view: Annotated[
        Path | None, typer.Option(help="Folder that the server reads; without it the one beside the repository.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of log and lock; without it the server's own.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="Longest wait for the start, in seconds.")] = START_TIMEOUT_S,
) -> None:
    """Run the server in the foreground until SIGTERM, for systemd: it is told when it answers and while it does.

    A server that dies ends this command with exit code 4, and whoever supervises it starts it again.
    """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    stop = threading.Event()
    server = LocalTriton(
        folder,
        repository,
        grpc_port=grpc_port,
        http_port=http_port,
        settings=_settings(threads, target, engines, precision),
        view=view,
        control_secret_file=secret_file,
        state=state,
        timeout_s=timeout_s,
    )
    notifier = Notifier(os.environ)
    with server:  # until it answers a signal simply ends us, and the server with us
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        notifier.ready()
        _watch(server, notifier, stop)
        notifier.stopping()


@app.command("view", epilog=EPILOG)
def make_view(
    repository: RepositoryOption = REPOSITORY,
    view: Annotated[Path | None, typer.Option(help="Folder to make; without it the one beside the repository.")] = None,
    threads: ThreadsOption = None,
    target: TargetOption = "onnx-python",
    engines: EnginesOption = None,
    precision: PrecisionOption = "fp16",
    as_json: JsonOption = False,
) -> None:
    """Make the folder that a server reads, with its config.pbtxt files: for NVIDIA's container, or to look at."""
    folder = (view or triton_view.beside(repository)).absolute()
    refused = View(folder, repository.absolute()).fill(_settings(threads, target, engines, precision))
    if as_json:
        typer.echo(json.dumps({"view": str(folder), "left_out": refused}))
    else:
        for model, why in refused.items():
            say(f": {model} is left out: {why}", ("FIX", "red"))
        say(f": {folder}", ("made", "green"))
    if refused:
        raise typer.Exit(1)


def _settings(threads: int | None, target: Target, engines: Path | None, precision: Precision) -> Settings:
    if target != "onnx-python" and engines is None:
        raise ConfigError(f"the target {target} needs plans: name the folder of `semwatch-train export` with --engines")
    found = engines.absolute() if engines else None
    return Settings(threads=threads, target=target, engines=found, precision=precision)


def _watch(server: LocalTriton, notifier: Notifier, stop: threading.Event) -> None:
    """Look at the server until ``stop``; systemd hears of it only while it answers.

    Raises:
        ServiceUnavailable: the server died, or can never load a model again.
    """
    pause_s = min(LOOK_S, watchdog_interval_s(os.environ) or LOOK_S)
    next_look = 0.0
    while not stop.is_set():
        if server.pid is None:
            raise ServiceUnavailable(f"Triton died; its log is {server.log}")
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + LOOK_AT_LOADS_S
            if model := server.stuck_model():
                raise ServiceUnavailable(
                    f"Triton can load {model} no more: it must start anew; its log is {server.log}"
                )
        if ask(server.http_port, "/v2/health/live") is not None:
            notifier.watchdog()
            notifier.status(f"answers at {server.url}")
        else:
            notifier.status(f"does not answer at {server.url}")
        stop.wait(pause_s)


def _show(now: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(now))
        return
    show_facts({name.replace("_", " "): in_words(value) for name, value in now.items()})
