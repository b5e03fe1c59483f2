"""Unknowns for benchmarks of learning: features of real crops mixed into fresh ones, and the records made of them.

The bank and the golden set shipped with the head hold features of 1,921 crops, cut by the line out of rendered
images. A benchmark needs more, none a copy. ``fresh`` makes one of three real crops of a class: the class's mean
and covariance stay, and the shipped head treats the mixed ones as it does real ones that it has not seen: of its golden
set it calls 5 % unknown and 18 % non-decidable, of crops mixed from that set 4 % and 15 %. Pictures are noise of the
right size: no step of a cycle looks at them, but all steps carry them.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Verdict
from semwatch.line.classification import decide
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Answer
from semwatch.settings.recipe import UnknownRule
from semwatch.streams import records, unknowns
from semwatch.streams.records import Record
from semwatch.streams.unknowns import Publisher
from semwatch.system.clock import utc_now
from semwatch_training.system.defaults import SHIPPED

RULE = UnknownRule()
CROP_PX, TOKENS = 224, 16
N_MIXED = 3


def split_by_image(crops: Bank, shares: Sequence[float], rng: np.random.Generator) -> list[Bank]:
    """Part crops by their images, which stay whole; ``shares`` sum to 1."""
    images = sorted(set(crops.images))
    part_of_image = dict(zip(images, rng.choice(len(shares), len(images), p=shares), strict=True))
    part_of = np.array([part_of_image[image] for image in crops.images])
    return [head_bank.chosen(crops, part_of == part) for part in range(len(shares))]


def copied_models(repository: Path, folder: Path) -> Path:
    """A model repository of one's own, with the versions in service as version 1."""
    for model in model_repository.MODELS:
        version = choice.choice(repository, model)
        shutil.copytree(repository / model / str(version), folder / model / "1")
    return folder


def shipped() -> tuple[Bank, Bank]:
    """Bank and golden set of the shipped head; no image is in both."""
    bank, golden = (head_bank.read(SHIPPED / f"head.{name}") for name in (head_bank.BANK, head_bank.GOLDEN))
    return bank, replace(golden, images=tuple(f"golden {image}" for image in golden.images))


def features_of(bank: Bank, label: str) -> NDArray[np.float32]:
    """The crops of one class."""
    return bank.features[np.array([other == label for other in bank.labels])]


def fresh(crops: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A crop like those of one class (n, D), and none of them: their mean and three deviations from it.

    The shares of the three have squares that sum to 1, so that mean and covariance stay the class's own.
    """
    mean = crops.mean(axis=0)
    rows = rng.choice(len(crops), min(N_MIXED, len(crops)), replace=False)
    shares = np.sqrt(rng.dirichlet(np.ones(len(rows))))
    return np.asarray(mean + shares @ (crops[rows] - mean), np.float32)


def verdicts(answer: Answer) -> list[Verdict]:
    """The unknown rule of the default recipe, applied to what a head answered."""
    return [
        decide(logits, p, answer.meta.labels, RULE)
        for logits, p in zip(answer.outputs["logits"], answer.outputs["p_values"], strict=True)
    ]


def record(
    features: NDArray[np.float32], verdict: Verdict, name: str, *, head_version: int, rng: np.random.Generator
) -> Record:
    """What the daemon queues of a crop that it calls unknown or non-decidable; each is an image of its own."""
    assert verdict.kind in ("unknown", "non-decidable")
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return Record(
        id=sha256[:32],
        created_utc=utc_now(),
        source="sem-1",
        path=f"{name}.png",
        sha256=sha256,
        page=0,
        defect_id=1,
        box_xyxy=(100, 100, 160, 160),
        crop_xyxy=(70, 70, 190, 190),
        area_px=2500,
        area_nm2=None,
        pixel_nm=None,
        image_score=0.4,
        peak_score=0.5,
        kind=verdict.kind,
        nearest=verdict.nearest,
        recipe_name="test",
        recipe_id="0" * 16,
        model_versions={"detector": 1, "encoder": 1, "head": head_version},
        features=features,
        soft_mask=rng.random((TOKENS, TOKENS), dtype=np.float32),
        crop=rng.integers(0, 256, (CROP_PX, CROP_PX), dtype=np.uint8),
        field_short_px=768,
    )


def send(url: str, found: Sequence[Record]) -> None:
    """Queue records the way the daemon's outbox does."""
    client = unknowns.connect(url)
    try:
        messages = [(records.UNKNOWNS, one.id, records.pack(records.encode(one))) for one in found]
        Publisher(client).publish(messages)
    finally:
        client.close()
