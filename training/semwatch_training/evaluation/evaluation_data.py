"""What evaluation and experiment commands share: labelled crops kept on disk, and the report."""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line import inputs
from semwatch.line.pipeline import gate_threshold
from semwatch.models import choice, model_repository
from semwatch.models.contract import FIELD_FEATURES, REGION_FEATURES
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data import data_folders, datasets
from semwatch_training.data.datasets import DataSet, Sample
from semwatch_training.discovery import labelled_crops
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.evaluation import report, searched_crops
from semwatch_training.evaluation.options import CACHE, REPOSITORY
from semwatch_training.evaluation.report import Provenance, Result
from semwatch_training.evaluation.searched_crops import SearchedCrops
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.system.progress_bars import Progress, console

SYNTHETIC = "synthetic"


@dataclass(frozen=True, slots=True)
class Source:
    """Where labelled crops come from."""

    data: str
    """A folder, or "synthetic"."""
    repository: Path = REPOSITORY
    """The models that search and encode."""
    per_type: int = 40
    """Synthetic images of each defect type."""
    cache: Path = CACHE


def read_folder(data: str, *, require_masks: bool) -> DataSet:
    """Read a data set on disk; with ``require_masks`` every defect of it has one.

    Raises:
        ConfigError: ``data`` is "synthetic", or what ``data_folders.read`` refuses.
    """
    if data == SYNTHETIC:
        raise ConfigError("this command reads images from a folder; make a synthetic one with `semwatch-train synth`")
    return data_folders.read(Path(data), require_masks=require_masks)


def crops_of(source: Source, *, progress: Progress) -> tuple[Crops, int, Recipe]:
    """Crops cut along true masks, the width of their frozen features, and the recipe they were cut by.

    Crops are encoded once per encoder and kept below the cache, for as long as the data set's files stay as they are.

    Raises:
        ConfigError: a defect without a mask, or none that a mask marks.
    """
    recipe, (name, samples) = Recipe(), _named_samples(source)
    with Embedded(source.repository, models=("detector", "encoder")) as models:
        width = frozen_width(models)
        # Crops are cut along true masks; the detector counts only where the encoder asks what it says of the field.
        asked = ("encoder", "detector") if inputs.listens(models.meta("encoder")) else ("encoder",)
        weights = "-".join(models.meta(model).weights_sha256[:12] for model in asked)
        kept = source.cache / "crops" / f"{name}-{weights}.npz"
        if kept.exists():
            return labelled_crops.load(kept), width, recipe
        if samples is None:
            crops = labelled_crops.of_synthetic(
                models, recipe, n_per_type=source.per_type, first_seed=datasets.SEED_EVALUATE, progress=progress
            )
        else:
            defects = datasets.distinct([sample for sample in samples if sample.label != DEFECT_FREE])
            crops = labelled_crops.of_samples(models, recipe, defects, progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    labelled_crops.save(crops, kept)
    return crops, width, recipe


def searched_of(
    source: Source, false_alarm_rate: float | None, *, progress: Progress
) -> tuple[SearchedCrops, float, int, Recipe]:
    """What the search finds, the gate's threshold, the width of frozen features, and the recipe.

    Searched once per detector and encoder and kept below the cache, whatever the gate.

    Raises:
        ConfigError: a defect without a mask, no image, or too few normal scores for the false alarm rate.
    """
    recipe = Recipe() if false_alarm_rate is None else with_rate(Recipe(), false_alarm_rate)
    name, samples = _named_samples(source)
    with Embedded(source.repository, models=("detector", "encoder")) as models:
        threshold, width = gate_threshold(recipe, models), frozen_width(models)
        weights = "-".join(models.meta(model).weights_sha256[:12] for model in ("detector", "encoder"))
        kept = source.cache / "crops" / f"searched-{name}-{weights}.npz"
        if kept.exists():
            return searched_crops.load(kept), threshold, width, recipe
        if samples is None:
            n = source.per_type * sum(len(types) + 1 for types in DEFECT_TYPES.values())
            fields = searched_crops.marked_synthetic(source.per_type, first_seed=datasets.SEED_EVALUATE)
        else:
            samples = datasets.distinct(samples)
            n, fields = len({sample.image for sample in samples}), searched_crops.marked_samples(samples)
        found = searched_crops.search_marked(models, recipe, fields, n, progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    searched_crops.save(found, kept)
    return found, threshold, width, recipe


def _named_samples(source: Source) -> tuple[str, tuple[Sample, ...] | None]:
    """A name that changes with the data, and the samples to judge by: all defects, and the normal images held back.

    Normal images to learn from are left out: a memory may have been fitted on them.
    """
    if source.data == SYNTHETIC:
        return f"{SYNTHETIC}-{source.per_type}", None
    data_set = read_folder(source.data, require_masks=True)
    samples = (*(sample for sample in data_set.train if sample.label != DEFECT_FREE), *data_set.test)
    return f"{data_set.name}-{fingerprint(samples)}", samples


def with_rate(recipe: Recipe, false_alarm_rate: float) -> Recipe:
    """The recipe with another false alarm rate of its gate."""
    return recipe.model_copy(
        update={"gate": recipe.gate.model_copy(update={"false_alarm_rate": false_alarm_rate, "threshold": None})}
    )


def by_stage(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group synthetic defect types by process stage, in the order of the stages; stages of none are left out.

    Raises:
        ConfigError: a label is of no stage.
    """
    present = set(labels)
    if strangers := sorted(present.difference(*DEFECT_TYPES.values())):
        raise ConfigError(
            f"{', '.join(strangers)} belong to no process stage of ours ({', '.join(STAGES)}); only synthetic defects "
            f"do: leave out one type at a time instead"
        )
    groups = {stage: tuple(name for name in DEFECT_TYPES[stage] if name in present) for stage in STAGES}
    return {stage: names for stage, names in groups.items() if names}


def fingerprint(samples: Iterable[Sample]) -> str:
    """Twelve digits that change with the samples' labels, and with the place, size or time of any of their files."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.label.encode())
        for place in (sample.image, sample.mask, *sample.other_masks):
            if isinstance(place, Path):
                found = place.stat()
                digest.update(f"{place.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
            else:
                digest.update(f"{place}\n".encode())
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


def width_of_field(repository: Path) -> int:
    """How many of the encoder's frozen features are what the detector says of field and places: the last ones."""
    meta = model_repository.read_meta(repository, "encoder", choice.choice(repository, "encoder"))
    asked = (meta.inputs.get(name) for name in (FIELD_FEATURES, REGION_FEATURES))
    return sum(tensor.shape[0] for tensor in asked if tensor is not None)


def finish(out: Path, title: str, result: Result, data: str, seeds: Sequence[int], *, as_json: bool) -> None:
    """Write the report, show its tables, and print them as JSON where asked."""
    tables, figures = result
    command = shlex.join(["semwatch-train", *sys.argv[1:]])
    report.write(out, title, tables, figures, Provenance(command, tuple(seeds), Path(data).name))
    for table in tables:
        report.show(table, console)
    console.print(f"report in {out}/report.md", highlight=False)
    if as_json:
        typer.echo(json.dumps([report.as_dict(table) for table in tables]))
