"""The default head in one call: search synthetic images, label what is found, encode, fit, calibrate, write."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from semwatch.errors import ConfigError
from semwatch.models import crop_store, head_bank
from semwatch.models.crop_store import CropRef, KeptCrop
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Meta
from semwatch.settings.recipe import Recipe
from semwatch.system import files
from semwatch_training.data import datasets
from semwatch_training.discovery import labelled_crops
from semwatch_training.discovery.fit_head import FitClassifier, HeadFit, fit_head
from semwatch_training.discovery.head import Head, save_head
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.system.progress_bars import Progress

CROPS_SUFFIX = ".crops.npz"
"""Of the shard beside a head's weights: crops of the bank, then of the golden set; see ``models.crop_store``."""
"""Synthetic images to search for labelled crops."""


class FittedHead(NamedTuple):
    """A head, what it was fitted on, and what a head on three quarters of that makes of the rest."""

    head: Head
    crops: Crops
    report: dict[str, float | int]


def fit_default(
    repository: Path,
    out: Path,
    *,
    encoder_form: str,
    n_images: int,
    seed: int,
    classify_of: Callable[[Meta], FitClassifier | None] = lambda _: None,
    progress: Progress,
) -> FittedHead:
    """Fit a head on what the repository's detector finds in synthetic images, and write it.

    Beside ``out`` go what it was fitted on, a golden set of as many other images, that no head is ever fitted on, and
    the crops of both. Crops are cut and encoded once for a detector and an encoder, and kept there too.

    Args:
        repository: with detector and encoder.
        out: the weights file.
        encoder_form: what the head is tied to, see ``build_repository.served_form``.
        n_images: to search.
        seed: of hold-out and fit.
        classify_of: what fits the logits on the features of this encoder, see ``fit_head``.
        progress: called after every image.

    Raises:
        ConfigError: the encoder does not say how wide its frozen features are, or what ``fit_head`` refuses.
        ModelMismatch: the repository lacks detector or encoder.
    """
    with Embedded(repository, models=("detector", "encoder")) as models:
        classify = classify_of(models.meta("encoder"))
        frozen_width = models.meta("encoder").provenance.get("frozen_width")
        if not isinstance(frozen_width, int):
            raise ConfigError("the encoder's meta.json names no frozen_width; build the model repository again")
        crops = _crops(models, out, n_images, datasets.SEED_HEAD, progress)
        golden = _crops(models, out, n_images, datasets.SEED_GOLDEN, progress)
    fit = HeadFit(frozen_width=frozen_width, seed=seed)
    report = labelled_crops.hold_out_report(crops, fit, classify=classify)
    fitted = fit_head(crops.features, crops.labels, fit, images=crops.image_idx.tolist(), classify=classify)
    refs = _write_shard((*crops.views, *golden.views), out.with_suffix(CROPS_SUFFIX))
    n = len(crops.views)
    head_bank.write(as_bank(crops, refs[:n]), out.with_suffix(f".{head_bank.BANK}"))
    head_bank.write(as_bank(golden, refs[n:]), out.with_suffix(f".{head_bank.GOLDEN}"))
    provenance: dict[str, str | float | int] = {"crops": "synthetic", "n_images": n_images, "seed": seed, **report}
    save_head(fitted, out, encoder_form=encoder_form, provenance=provenance)
    return FittedHead(fitted, crops, report)


def as_bank(crops: Crops, refs: tuple[CropRef, ...] = ()) -> Bank:
    """Crops as they travel with a head; ``refs`` says where they are kept."""
    images = tuple(f"image {index}" for index in crops.image_idx.tolist())
    return Bank(crops.features, crops.labels, images, ("",) * len(crops.labels), refs)


def _write_shard(views: Sequence[KeptCrop], path: Path) -> tuple[CropRef, ...]:
    """Keep crops beside a head's weights, for ``build`` to put into the repository; no crops, no file."""
    if not views:
        return ()
    content = crop_store.encode(views)
    files.write_whole(path, content)
    shard = hashlib.sha256(content).hexdigest()
    return tuple(CropRef(shard, row) for row in range(len(views)))


def _crops(models: Embedded, out: Path, n_images: int, first_seed: int, progress: Progress) -> Crops:
    hashes = (models.meta(model).weights_sha256 for model in ("detector", "encoder"))
    made_by = f"{' '.join(hashes)} {n_images} from {first_seed}"
    kept = out.with_suffix(f".crops-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}.npz")
    if kept.exists():
        return labelled_crops.load(kept)
    crops = labelled_crops.collect(models, Recipe(), n_images=n_images, first_seed=first_seed, progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    labelled_crops.save(crops, kept)
    return crops
