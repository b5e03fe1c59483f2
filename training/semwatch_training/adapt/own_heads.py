"""Heads for a user's own classes: on what the head in service knows as well, or on the own images alone.

Each is judged by cross-validation over groups of near duplicates: an image is named by a head that saw neither it nor
its like.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch.line import inputs
from semwatch.models import head_bank
from semwatch.models.crop_store import KeptCrop
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.discovery.fit_head import MIN_PER_CLASS, FitClassifier, HeadFit, fit_head
from semwatch_training.discovery.head import Head
from semwatch_training.evaluation import labelled_images, near_duplicates, real_splits
from semwatch_training.evaluation.evaluate_service import as_function
from semwatch_training.evaluation.labelled_images import Judgement, Looked, Region
from semwatch_training.learning.base_head import BaseHead
from semwatch_training.learning.crops import images_as_numbers
from semwatch_training.system.progress_bars import Progress

OWN = "own "
"""Begins the names of a user's images in a bank; the rest is of the file's content."""
BOTH, ALONE = "known and own classes", "own classes alone"
OF_FAMILY: Mapping[str, str] = MappingProxyType({"linear": "", "recame": ", ReCAME-Net"})
"""Ends the name of an option whose logits are of this family."""
FOLDS = 4
TURNED_UP_TO = 400
"""Crops of own images; while there are no more, each is learnt four ways round."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnCrops:
    """What own images teach: crops with the labels that they show."""

    bank: Bank
    looked_idx: NDArray[np.intp]
    """(n,) which looked-at image each is of."""
    views: tuple[KeptCrop, ...]
    """n crops themselves."""


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way to fit a head, and how it was judged."""

    name: str
    base: Bank
    """What it is fitted on beside the own crops."""
    judged: tuple[Judgement, ...]
    """One for each looked-at image."""
    classify: FitClassifier | None = None
    """What fits its logits, see ``fit_head``."""
    keeps_known: bool = True
    """Whether it is fitted on what the head in service knows as well."""

    @property
    def n_right(self) -> int:
        """Images that were called what they are."""
        return sum(one.label == one.truth for one in self.judged)


def own_crops(looked: Sequence[Looked], names: Mapping[str, str], models: Embedded) -> OwnCrops:
    """Crops of looked-at images, four ways round where they are few.

    Args:
        looked: images after the search.
        names: what the head in service calls a label, where it is another word for one of its classes.
        models: whose encoder sees turned crops.
    """
    taught = [(k, region, label) for k, one in enumerate(looked) for region, label in _taught(one)]
    turns = 4 if len(taught) <= TURNED_UP_TO else 1
    views = [_turned(region.view, turn) for _, region, _ in taught for turn in range(turns)]
    features = np.zeros((len(views), *models.meta("encoder").outputs["features"].shape), np.float32)
    for row, view in enumerate(views):
        if row % turns == 0:
            features[row] = taught[row // turns][1].features
        else:
            asked = inputs.for_encoder(models.meta("encoder"), [view])
            features[row] = models.infer("encoder", asked).outputs["features"][0]
    labels = tuple(names.get(label, label) for _, _, label in taught for _ in range(turns))
    idx = np.repeat([k for k, _, _ in taught], turns).astype(np.intp)
    images = tuple(_image_name(looked[k]) for k in idx.tolist())
    return OwnCrops(Bank(features, labels, images, ("",) * len(labels)), idx, tuple(views))


def _taught(one: Looked) -> list[tuple[Region, str]]:
    """Regions whose label is known: of an image without a mask, the one that is judged and no other."""
    if one.sample.label == DEFECT_FREE:
        return [(region, DEFECT_FREE) for region in one.regions]
    return [
        (region, one.sample.label if region.is_truth else DEFECT_FREE)
        for region in one.regions
        if region.is_truth or one.is_drawn
    ]


def _turned(view: KeptCrop, turn: int) -> KeptCrop:
    down, across = -1 if turn & 1 else 1, -1 if turn & 2 else 1
    crop = np.ascontiguousarray(view.crop[::down, ::across])
    return replace(view, crop=crop, soft_mask=np.ascontiguousarray(view.soft_mask[::down, ::across]))


def _image_name(one: Looked) -> str:
    return OWN + hashlib.sha256(decoding.read_file(one.sample.image)).hexdigest()[:16]


def options(
    base: BaseHead,
    own: OwnCrops,
    looked: Sequence[Looked],
    names: Mapping[str, str],
    recipe: Recipe,
    threshold: float,
    *,
    families: Mapping[str, FitClassifier | None],
    seed: int,
    progress: Progress,
) -> list[Option]:
    """Both ways to fit a head of each family, judged; one that has too little to be fitted on is left out.

    Raises:
        ConfigError: neither can be fitted, and why.
    """
    groups = near_duplicates.groups([one.field for one in looked])
    truth = [names.get(one.sample.label, one.sample.label) for one in looked]
    folds = real_splits.folds_of(truth, groups, n_folds=min(FOLDS, len(set(groups.tolist()))), seed=seed)
    known = without_images(base.bank, own.bank)
    found, why = [], ""
    alone = head_bank.empty(known.features.shape[1])
    ways = [(family, name, bank) for family in families for name, bank in ((BOTH, known), (ALONE, alone))]
    for number, (family, name, bank) in enumerate(ways):
        classify = families[family]
        judged: dict[int, Judgement] = {}
        try:
            for step, fold in enumerate(np.unique(folds)):
                held_out = np.flatnonzero(folds == fold)
                rows = head_bank.chosen(own.bank, ~np.isin(own.looked_idx, held_out))
                head = fit(_enough(head_bank.joined([bank, rows])), base.frozen_width, seed=seed, classify=classify)
                some = [looked[k] for k in held_out.tolist()]
                verdicts = labelled_images.judge(some, as_function(head), head.labels, recipe, threshold)
                judged |= dict(zip(held_out.tolist(), labelled_images.renamed(verdicts, dict(names)), strict=True))
                progress("heads judged", number * len(np.unique(folds)) + step + 1, len(ways) * len(np.unique(folds)))
        except ConfigError as error:
            why = why or str(error)
            continue
        of_all = tuple(judged[k] for k in range(len(looked)))
        found.append(Option(name + OF_FAMILY[family], bank, of_all, classify, name == BOTH))
    if not found:
        raise ConfigError(f"no head can be fitted on these labels: {why}")
    return found


def best(found: Sequence[Option]) -> Option:
    """The option that calls most images what they are; of equal ones the first."""
    return max(found, key=lambda option: option.n_right)


def fit(bank: Bank, frozen_width: int, *, seed: int, classify: FitClassifier | None = None) -> Head:
    """Fit a head on a bank; ``classify``: see ``fit_head``.

    Raises:
        ConfigError: see ``fit_head``.
    """
    settings = HeadFit(frozen_width=frozen_width, seed=seed)
    return fit_head(bank.features, bank.labels, settings, images=images_as_numbers(bank.images), classify=classify)


def _enough(bank: Bank) -> Bank:
    """The bank without classes that a fold has left too few crops of."""
    labels = np.array(bank.labels)
    few = [label for label in set(bank.labels) if (labels == label).sum() < MIN_PER_CLASS]
    return head_bank.chosen(bank, ~np.isin(labels, few))


def without_images(bank: Bank, own: Bank) -> Bank:
    """A bank without the crops of images that are given again."""
    again = set(own.images)
    return head_bank.chosen(bank, np.array([image not in again for image in bank.images], np.bool_))
