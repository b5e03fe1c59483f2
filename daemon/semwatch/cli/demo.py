"""`semwatch demo`: the whole line on embedded defaults."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from semwatch.cli.options import REPOSITORY, RepositoryOption, out
from semwatch.cli.triton import FOLDER
from semwatch.demo.learning import run_learning_demo
from semwatch.demo.one_lot import run_demo


def demo(
    lot: Annotated[Path | None, typer.Option(help="Folder of images to drop; a synthetic lot without it.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the demo lives; emptied first.")] = Path("demo"),
    repository: RepositoryOption = REPOSITORY,
    n: Annotated[int, typer.Option(min=1, help="Images of the synthetic lot.")] = 24,
    seed: int = 7,
    engine: Annotated[Literal["embedded", "triton"], typer.Option(help="What runs the models.")] = "embedded",
    learn: Annotated[bool, typer.Option(help="Show how two unseen types become classes.")] = False,
) -> None:
    """Run the whole line on embedded defaults: own Redis, own daemon, a lot dropped image by image."""
    if learn:
        run_learning_demo(folder=folder, repository=repository, n=max(n, 90), seed=seed, console=out)
        return
    triton = FOLDER if engine == "triton" else None
    run_demo(lot=lot, folder=folder, repository=repository, n=n, seed=seed, console=out, triton=triton)
