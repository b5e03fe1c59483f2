"""`semwatch-train export`: published networks to ONNX of another precision, or to TensorRT plans for a fleet."""

import json
from pathlib import Path
from typing import Annotated

import typer

from semwatch.system import terminal
from semwatch.system.command_line import JsonOption
from semwatch_training.system.defaults import ENGINE_IMAGES
from semwatch_training.system.progress_bars import Bars, console


def export(
    out: Annotated[Path, typer.Option(help="Folder of all engines; what is up to date there is left alone.")],
    target: Annotated[
        str, typer.Option(help="onnx; tensorrt-rtx, for RTX GPUs that need not be here; tensorrt, for the GPU here.")
    ] = "tensorrt-rtx",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16, of the products. SM75 has fp16 only. int8 is refused.")
    ] = "fp16",
    compute_capability: Annotated[
        str,
        typer.Option(
            help="Of the fleet's GPUs: 75 is Turing (RTX 20, T4), 86 Ampere (RTX 30, A10), 89 Ada (RTX 40, L4), "
            "120 Blackwell (RTX 50). See it with `nvidia-smi --query-gpu=compute_cap --format=csv`."
        ),
    ] = "",
    repository: Annotated[Path, typer.Option(help="Model repository.")] = Path("model_repository"),
    model: Annotated[list[str] | None, typer.Option(help="Only this one; repeat. All three without it.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of your images to prove the conversion on; else synthetic ones.")
    ] = None,
    n_images: Annotated[int, typer.Option(min=1, help="How many of them; 50 where plans are run on a GPU.")] = (
        ENGINE_IMAGES
    ),
    as_json: JsonOption = False,
) -> None:
    """Compile the models that serve for your GPUs, on any machine; prove each conversion first.

    A plan belongs to one kind of GPU and one TensorRT release. Beside each lie the ONNX it was made from, TensorRT's
    build log and manifest.json: hashes, versions, GPU, precision, batch sizes, seconds, and how far the conversion is
    from fp32. A conversion that is too far is refused. TensorRT for RTX compiles no fp32 matrix products for SM75:
    a detector that judges fields by their own statistics has some, and is refused there.

    semwatch-train export --out engines --compute-capability 86,89,120
    """
    from semwatch.models.model_repository import MODELS
    from semwatch.triton import plans
    from semwatch_training.engines import build
    from semwatch_training.engines.tensorrt_compiler import parse_capabilities

    rows = []
    capabilities = parse_capabilities(compute_capability)
    with Bars() as progress:
        made = list(
            build.export(
                repository, out, target=target, precision=precision, capabilities=capabilities,
                models=model or MODELS, images=images, n_images=n_images, progress=progress,
            )
        )  # fmt: skip
    for manifest, is_new in made:
        worst = max(off for row in manifest.parity for off in row.relative.values())
        size = manifest.plan_bytes or (out / manifest.folder / plans.ONNX).stat().st_size
        cells = (
            f"{manifest.model} {manifest.version}",
            manifest.folder.name,
            manifest.engine_id,
            f"{manifest.seconds:.1f}" if is_new else "as it was",
            f"{size / 1e6:.1f}",
            f"{worst:.0e} of {manifest.tolerance:.0e}",
            manifest.gpu.split(":")[0],
        )
        rows.append(cells)
    if as_json:
        typer.echo(json.dumps([{**manifest.model_dump(mode="json"), "is_new": is_new} for manifest, is_new in made]))
        return
    columns = ("model", "engine", "id", "seconds", "MB", "off by", "on a GPU")
    terminal.print_table(console, columns, rows, title=f"engines in {out}", right=(3, 4))
    for note in sorted({manifest.gpu for manifest, _ in made if manifest.gpu.startswith("skipped")}):
        console.print(f"run on a GPU: {note}", highlight=False)
