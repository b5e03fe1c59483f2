"""``PYTHONPATH=tests/benchmarks python -m gpu_run --out run``: the whole GPU run in one call."""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from gpu_run import networks
from gpu_run import run as whole_run
from gpu_run.run import BATCHES, Order
from semwatch.errors import ConfigError, SemwatchError
from semwatch_training.system.progress_bars import console


def gpu(
    out: Annotated[Path, typer.Option(help="Folder of report.json and report.txt.")],
    size: Annotated[
        list[str] | None, typer.Option(help="shipped, vit-s or vit-b; repeat. All three without it.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at once; repeat. 1, 4 and 16 without it.")] = (
        None
    ),
    device: Annotated[str, typer.Option(help="cuda; cpu tries the same code out, slowly and in fp32.")] = "cuda",
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each network that are timed.")] = 50,
    images: Annotated[int, typer.Option(min=1, help="Synthetic images to compare precisions on.")] = 8,
    compiled: Annotated[bool, typer.Option(help="Try torch.compile on vit-b too; minutes.")] = True,
    cache: Annotated[Path, typer.Option(help="Backbones; without them what ships is timed with random weights.")] = (
        Path(".cache")
    ),
) -> None:
    """Time the networks against the arithmetic floor of this card, and compare bf16 and fp16 with fp32.

    ViT-S and ViT-B are the paper's method with random weights: of the right size, good for time alone.
    """
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"no device {device!r}; there are cuda and cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here; --device cpu tries the same code out on the processor")
    pairs = [partial(networks.make, each, cache) for each in size or networks.SIZES]
    order = Order(tuple(batch or BATCHES), repeats, images, ("vit-b",) if compiled else ())
    report = whole_run.run(out, pairs, device, order)
    console.print(whole_run.table(report), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(gpu)
    except SemwatchError as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from error
