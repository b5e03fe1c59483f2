"""Arguments that evaluation and experiment commands share; nothing here loads torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

REPOSITORY, CACHE = Path("model_repository"), Path(".cache")

Unknown = Literal["type", "stage"]
"""What is unknown in turn: one defect type, or a whole process stage."""

DataArgument = Annotated[
    str,
    typer.Argument(
        help="Labelled images (a folder per class, a table of labels or boxes, masks, COCO, YOLO, public sets; see "
        "docs/training.md), or 'synthetic'."
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder of the report: report.md, report.json, pictures.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")]
RepositoryOption = Annotated[Path, typer.Option(help="Model repository whose models are judged.")]
CacheOption = Annotated[Path, typer.Option(help="Where backbones, features and crops are kept.")]
RateOption = Annotated[float, typer.Option(min=0.0001, max=0.999, help="Stated false alarm rate of the gate.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Tables as JSON on standard output.")]
PerTypeOption = Annotated[int, typer.Option(min=2, help="Synthetic images of each defect type.")]
WeightsOption = Annotated[Path, typer.Option(help="Folder with detector.safetensors.")]
