"""Crops for long tails: labelled images of several sets joined, and tails of a given shape cut from them.

Each class is called after its set. An image on disk gives one crop, of the region that the daemon's search finds on its
defect; a synthetic one is cut along its true mask. Groups of near duplicates stay together in every split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data import data_folders, datasets
from semwatch_training.discovery import labelled_crops
from semwatch_training.evaluation import evaluation_data, labelled_images, near_duplicates
from semwatch_training.evaluation.evaluation_data import SYNTHETIC, Source
from semwatch_training.system.progress_bars import Progress


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Encoded crops of one or several sets."""

    features: NDArray[np.float32]
    """(n, D)."""
    labels: NDArray[np.str_]
    """(n,) ``<set> <class>``."""
    groups: NDArray[np.intp]
    """(n,) near duplicates share one."""


def joined(
    sources: Sequence[Source], *, most: int, first_seed: int = datasets.SEED_EVALUATE, progress: Progress
) -> Joined:
    """Crops of all sources, encoded once for a detector and an encoder and kept below the cache.

    Args:
        sources: of one repository.
        most: images of a class of a folder; of more, so many are drawn.
        first_seed: of synthetic images.
        progress: called after every image.

    Raises:
        ConfigError: no source, a set named twice, or what reading and searching refuse.
    """
    if not sources or len({source.data for source in sources}) < len(sources):
        raise ConfigError("give one set of labelled images or several, each once")
    sets = [_kept(source, most, first_seed, progress) for source in sources]
    offsets = np.cumsum([0, *(one.groups.max() + 1 for one in sets)])
    return Joined(
        np.concatenate([one.features for one in sets]),
        np.concatenate([one.labels for one in sets]),
        np.concatenate([one.groups + offset for one, offset in zip(sets, offsets[:-1], strict=True)]),
    )


def _kept(source: Source, most: int, first_seed: int, progress: Progress) -> Joined:
    with Embedded(source.repository, models=("detector", "encoder")) as models:
        weights = "-".join(models.meta(model).weights_sha256[:12] for model in ("detector", "encoder"))
        if source.data == SYNTHETIC:
            name, samples = f"{SYNTHETIC}-{source.per_type}-{first_seed}", []
        else:
            data_set = data_folders.read(Path(source.data), require_masks=False)
            samples = _drawn(datasets.distinct([*data_set.train, *data_set.test]), most)
            name = f"{Path(source.data).name}-{evaluation_data.fingerprint(samples)}"
        kept = source.cache / "crops" / f"longtail-{name}-{weights}.npz"
        if kept.exists():
            with np.load(kept, allow_pickle=False) as file:
                return Joined(file["features"].astype(np.float32), file["labels"], file["groups"])
        if samples:
            made = _of_samples(models, samples, Path(source.data).name, progress)
        else:
            made = _of_synthetic(models, source.per_type, first_seed, progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez(kept, features=made.features.astype(np.float16), labels=made.labels, groups=made.groups)
    return made


def _drawn(samples: Sequence[datasets.Sample], most: int) -> list[datasets.Sample]:
    """At most so many of a class, by chance, in their order."""
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    labels = [sample.label for sample in samples]
    kept = {row for label in set(labels) for row in [row for row in order if labels[row] == label][:most]}
    return [sample for row, sample in enumerate(samples) if row in kept]


def _of_samples(models: Embedded, samples: Sequence[datasets.Sample], name: str, progress: Progress) -> Joined:
    looked = labelled_images.look(models, Recipe(), samples, what=name, progress=progress)
    seen = [one for one in looked if one.regions]
    if not seen:
        raise ConfigError(f"the search found nothing in any image of {name}; look at them, or give others")
    return Joined(
        np.stack([one.regions[0].features for one in seen]),
        np.array([f"{name} {one.sample.label}" for one in seen]),
        near_duplicates.groups([one.field for one in seen]),
    )


def _of_synthetic(models: Embedded, per_type: int, first_seed: int, progress: Progress) -> Joined:
    crops = labelled_crops.of_synthetic(models, Recipe(), n_per_type=per_type, first_seed=first_seed, progress=progress)
    labels = np.array([f"{SYNTHETIC} {label}" for label in crops.labels])
    return Joined(crops.features, labels, crops.image_idx)
