"""The head in service fitted anew from its own bank: without some of its classes, or as another encoder sees its crops.

The crops of a bank are kept beside the heads (``semwatch.models.crop_store``), so what a head has learned is not lost
when the encoder is exchanged. Crops that nobody kept are left out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.line import inputs
from semwatch.line.scaling import resize
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.contract import OF_A_CROP
from semwatch.models.crop_store import KeptCrop
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.models.model_repository import Meta
from semwatch_training.discovery.fit_head import MIN_PER_CLASS, HeadFit, fit_head
from semwatch_training.learning import outcomes
from semwatch_training.learning.crops import images_as_numbers
from semwatch_training.learning.intake import EMBED_BATCH, LARGEST
from semwatch_training.publishing import head_families
from semwatch_training.publishing.export import publish_head


class Refit(NamedTuple):
    """What came of it."""

    version: int
    """Of the new head."""
    n_left_out: int
    """Crops of bank and golden set that nobody kept, of the classes that the new head knows."""


def refit(
    repository: Path,
    *,
    without: Sequence[str] = (),
    encoder: int | None = None,
    family: str | None = None,
    seed: int = 0,
) -> Refit:
    """Fit the head in service again from its bank and publish it.

    Args:
        repository: model repository.
        without: classes to leave out.
        encoder: version whose features the new head reads; None: the one that the head in service was fitted on.
        family: of the new head's logits; None: that of the head in service.
        seed: of the fit.

    Raises:
        ConfigError: no such family, a class that the head does not know, too little is left to fit a head on, or an
            encoder that needs more than a kept crop has.
        ModelMismatch: the head brings no bank or golden set, or there is no such encoder.
        PublishError: the repository cannot take it.
    """
    base = choice.choice(repository, "head")
    meta = model_repository.read_meta(repository, "head", base)
    if strangers := sorted(set(without) - set(meta.labels)):
        raise ConfigError(f"the head does not know {', '.join(strangers)}; it knows {', '.join(meta.labels)}")
    folder = repository / "head" / str(base)
    bank, golden = (_without(head_bank.read(folder / name), without) for name in (head_bank.BANK, head_bank.GOLDEN))
    version = _encoder_of(repository, meta) if encoder is None else encoder
    looks = model_repository.read_meta(repository, "encoder", version)
    width = _frozen_width(looks, version)
    classify = head_families.classify(family or head_families.family_of(meta), looks, seed=seed)
    n_before = len(bank) + len(golden)
    if encoder is not None:
        with Embedded(repository, pins={"encoder": encoder}, models=("encoder",)) as models:
            bank, golden = (encoded_again(crops, repository, models) for crops in (bank, golden))
        _refuse_lost_classes(bank, golden, [label for label in meta.labels if label not in without])
    head = fit_head(
        bank.features,
        bank.labels,
        HeadFit(frozen_width=width, seed=seed),
        images=images_as_numbers(bank.images),
        classify=classify,
    )
    made: dict[str, str | int] = {"parent": base, "without": ", ".join(without)}
    published = publish_head(
        head,
        repository,
        encoder_version=version,
        provenance={**outcomes.lineage(meta), **made},
        codes=meta.codes,
        bank=bank,
        golden=golden,
    )
    return Refit(published, n_before - len(bank) - len(golden))


def encoded_again(bank: Bank, repository: Path, models: Embedded) -> Bank:
    """The kept crops of a bank as the encoder of ``models`` sees them; where it takes another size, they are resized.

    Raises:
        ConfigError: it asks for what a kept crop does not have, or its features are too large for a bank.
        ModelMismatch: a shard is absent or damaged.
    """
    encoder = models.meta("encoder")
    if absent := sorted(encoder.inputs.keys() - set(OF_A_CROP)):
        version = models.versions()["encoder"]
        raise ConfigError(
            f"encoder {version} asks for {', '.join(absent)}, which no kept crop has: fit a head on crops of its own"
        )
    seen = (crop and _fitting(crop, encoder) for crop in head_bank.crops_of(bank, repository))
    # Crops of an encoder that did not ask for features of the field came without: nobody kept what this one asks for.
    found = [None if crop is None or inputs.absent(encoder, crop) else crop for crop in seen]
    rows = np.flatnonzero([crop is not None for crop in found])
    views = [crop for crop in found if crop is not None]
    features = np.zeros((len(views), *encoder.outputs["features"].shape), np.float32)
    for start in range(0, len(views), EMBED_BATCH):
        asked = inputs.for_encoder(encoder, views[start : start + EMBED_BATCH])
        features[start : start + EMBED_BATCH] = models.infer("encoder", asked).outputs["features"]
    if features.size and not float(np.abs(features).max()) <= LARGEST:
        raise ConfigError("this encoder gives features that are not finite, or too large for a bank")
    return replace(head_bank.chosen(bank, rows), features=features)


def _fitting(kept: KeptCrop, encoder: Meta) -> KeptCrop:
    crop, mask = inputs.crop_px(encoder), inputs.tokens(encoder)
    if (kept.crop.shape, kept.soft_mask.shape) == ((crop, crop), (mask, mask)):
        return kept
    return replace(
        kept,
        crop=resize(kept.crop, (crop, crop)),
        soft_mask=_resized_mask(kept.soft_mask, mask),
    )


def _resized_mask(mask: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    way = cv2.INTER_AREA if side < len(mask) else cv2.INTER_LINEAR
    return np.asarray(np.clip(cv2.resize(mask, (side, side), interpolation=way), 0, 1), np.float32)


def _encoder_of(repository: Path, head: Meta) -> int:
    """The version of the encoder that a head was fitted on."""
    for version in reversed(model_repository.versions(repository, "encoder")):
        if model_repository.read_meta(repository, "encoder", version).weights_sha256 == head.encoder_sha256:
            return version
    raise ConfigError(
        "the encoder that this head was fitted on is not in the repository; name another one with --encoder"
    )


def _frozen_width(encoder: Meta, version: int) -> int:
    width = encoder.provenance.get("frozen_width")
    if not isinstance(width, int):
        raise ConfigError(f"the meta.json of encoder {version} names no frozen_width; build the model repository again")
    return width


def _refuse_lost_classes(bank: Bank, golden: Bank, labels: Sequence[str]) -> None:
    counts = Counter(bank.labels)
    lost = [f"{label} ({counts[label]})" for label in labels if counts[label] < MIN_PER_CLASS]
    if lost:
        raise ConfigError(
            f"too few crops of {', '.join(lost)} are kept, {MIN_PER_CLASS} of a class are needed: what a head was "
            f"fitted on before crops were kept cannot be encoded again; leave these classes out with --without, or fit "
            f"a head with `semwatch-train head`"
        )
    if not len(golden):
        raise ConfigError("no crop of the golden set is kept: a head could not be proven; see `semwatch-train head`")


def _without(crops: Bank, labels: Sequence[str]) -> Bank:
    return head_bank.chosen(crops, np.array([label not in labels for label in crops.labels], np.bool_))
