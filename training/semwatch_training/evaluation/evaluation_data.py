"""What evaluation and experiment commands share: their arguments, labelled crops kept on disk, and the report."""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray

from semwatch.config import Recipe
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.inference import Embedded
from semwatch_training.data import data_folders, datasets
from semwatch_training.data.datasets import DataSet, Sample
from semwatch_training.discovery import labelled_crops
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.evaluation import report
from semwatch_training.evaluation.report import Provenance, Table
from semwatch_training.progress_bars import Bars, console

SYNTHETIC = "synthetic"
REPOSITORY, CACHE = Path("model_repository"), Path(".cache")

DataArgument = Annotated[
    str,
    typer.Argument(
        help="Folder of labelled images (images, masks, labels.csv; a folder per class; Magnetic-Tile; "
        "SD-saliency-900; a synthetic lot), or 'synthetic'."
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder of the report: report.md, report.json, pictures.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")]
RepositoryOption = Annotated[Path, typer.Option(help="Model repository whose models are judged.")]
CacheOption = Annotated[Path, typer.Option(help="Where backbones, features and crops are kept.")]
RateOption = Annotated[float, typer.Option(min=0.0001, max=0.5, help="Stated false alarm rate of the gate.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Tables as JSON on standard output.")]
PerTypeOption = Annotated[int, typer.Option(min=2, help="Synthetic images of each defect type.")]


def read_folder(data: str, *, require_masks: bool) -> DataSet:
    """Read a data set on disk; with ``require_masks`` every defect of it has one.

    Raises:
        ConfigError: ``data`` is "synthetic", or what ``data_folders.read`` refuses.
    """
    if data == SYNTHETIC:
        raise ConfigError("this command reads images from a folder; make a synthetic one with `semwatch-train synth`")
    return data_folders.read(Path(data), require_masks=require_masks)


def crops_of(data: str, repository: Path, per_type: int, cache: Path) -> tuple[Crops, int, Recipe]:
    """Labelled crops of a data set, the width of their frozen features, and the recipe they were cut by.

    Crops are encoded once per encoder and kept below ``cache``, for as long as the data set's files stay as they are.
    """
    recipe = Recipe()
    with Embedded(repository, models=("encoder",)) as models, Bars() as progress:
        width = frozen_width(models)
        defects: tuple[Sample, ...] = ()
        if data == SYNTHETIC:
            name = f"{SYNTHETIC}-{per_type}"
        else:
            data_set = read_folder(data, require_masks=True)
            defects = tuple(s for s in (*data_set.train, *data_set.test) if s.label != DEFECT_FREE)
            name = f"{data_set.name}-{fingerprint(defects)}"
        kept = cache / "crops" / f"{name}-{models.meta('encoder').weights_sha256[:12]}.npz"
        if kept.exists():
            return labelled_crops.load(kept), width, recipe
        if data == SYNTHETIC:
            crops = labelled_crops.of_synthetic(
                models, recipe, n_per_type=per_type, first_seed=datasets.SEED_EVALUATE, progress=progress
            )
        else:
            crops = labelled_crops.of_samples(models, recipe, datasets.distinct(defects), progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    labelled_crops.save(crops, kept)
    return crops, width, recipe


def fingerprint(samples: Iterable[Sample]) -> str:
    """Twelve digits that change with the samples' labels, and with the place, size or time of any of their files."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.label.encode())
        for path in (sample.image, sample.mask, *sample.other_masks):
            if path is not None:
                found = path.stat()
                digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def defects_only(crops: Crops, width: int) -> tuple[NDArray[np.float32], list[str]]:
    """Frozen features (n, width) and labels of the crops that show a defect."""
    kept = np.array(crops.labels) != DEFECT_FREE
    return crops.features[kept, :width], np.array(crops.labels)[kept].tolist()


def frozen_width(models: Embedded) -> int:
    """How many leading features of the encoder come from frozen networks.

    Raises:
        ConfigError: its meta.json does not say.
    """
    width = models.meta("encoder").provenance.get("frozen_width")
    if not isinstance(width, int):
        raise ConfigError("the encoder's meta.json names no frozen_width; build the model repository again")
    return width


def finish(
    out: Path,
    title: str,
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    data: str,
    seeds: Sequence[int],
    as_json: bool,
) -> None:
    """Write the report, show its tables, and print them as JSON where asked."""
    command = shlex.join(["semwatch-train", *sys.argv[1:]])
    report.write(out, title, tables, figures, Provenance(command, tuple(seeds), Path(data).name))
    for table in tables:
        console.print(report.rich_table(table))
    console.print(f"report in {out}/report.md", highlight=False)
    if as_json:
        typer.echo(json.dumps([report.as_dict(table) for table in tables]))
