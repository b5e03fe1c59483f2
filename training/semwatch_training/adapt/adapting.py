"""Adapt the models of a site to a process, in one straight run.

    read and check -> normals -> detector with its gate -> search labelled images -> fit and judge heads -> report
                                                                             -> ask -> publish detector, then head

Everything is made and judged in a trial repository; the site's own is touched by two publications at the end, each by
one rename. The running daemon takes both over by itself.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line import pipeline
from semwatch.models import choice, crop_store, head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.adapt import adapt_report, given, own_detector, own_heads
from semwatch_training.adapt.adapt_report import Before
from semwatch_training.adapt.given import Given
from semwatch_training.adapt.own_detector import BaseDetector, OwnDetector
from semwatch_training.adapt.own_heads import Option, OwnCrops
from semwatch_training.data.datasets import Sample
from semwatch_training.evaluation import labelled_images
from semwatch_training.evaluation.evaluate_service import names_of
from semwatch_training.evaluation.labelled_images import Looked
from semwatch_training.learning import outcomes
from semwatch_training.learning.base_head import BaseHead, read_base_head
from semwatch_training.publishing import head_families
from semwatch_training.publishing.export import publish_head
from semwatch_training.system.progress_bars import Progress

MOST_FREE = 60
"""Normal images whose false regions teach a head what is nothing, and on which false calls are counted."""
GOLDEN_FROM, GOLDEN_SHARE = 40, 5
"""Labelled images of a class from which one in so many is set apart for later heads to be proven on."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for."""

    repository: Path
    recipes: tuple[Recipe, ...]
    """Of the site's folders; the first judges, the gate must keep what all of them promise."""
    normals: Path
    labels: Path | None = None
    reference: str | None = None
    tries_recame: bool = False
    """Whether heads of ReCAME-Net's family are judged too, where the head in service is of another."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    detector: int | None
    """Version that was published; None where nothing was."""
    head: int | None
    notes: tuple[str, ...]
    """Notes, warnings first."""


Ask = Callable[[], bool]
"""Whether to publish what the report shows."""


def adapt(
    request: Request,
    load: Callable[[int], BaseDetector],
    *,
    report: Path,
    ask: Ask,
    progress: Progress,
) -> Outcome:
    """Adapt detector, gate and head, judge them, and publish them if asked to.

    Args:
        request: images and site.
        load: the detector of a version in torch.
        report: folder of the report; written before ``ask`` is called.
        ask: a person's yes.
        progress: called with what is being done.

    Raises:
        ConfigError: what is wrong with the images, the labels or the recipes, and what would mend it.
        ImageError: a file is not a whole image.
        ModelMismatch: the models in service do not fit each other.
        PublishError: a model could not be exported, or the disk refused.
    """
    for recipe in request.recipes:
        if recipe.pins.detector is not None or recipe.pins.head is not None:
            raise ConfigError(
                f"recipe {recipe.name} pins detector or head, so nothing new could serve; take the pin out"
            )
    images = given.read(request.normals, request.labels, request.reference, progress=progress)
    version = choice.choice(request.repository, "detector")
    base = load(version)
    n_scores = own_detector.n_scores_for(request.recipes)
    made = own_detector.own_detector(base.graph, images.fields, n_scores=n_scores, seed=request.seed, progress=progress)
    with tempfile.TemporaryDirectory(prefix="semwatch-adapt-") as folder:
        trial = Path(folder)
        for model in ("encoder", "head"):
            own_detector.copy_version(request.repository, trial, model, choice.choice(request.repository, model))
        own_detector.publish_own(
            made, trial, request.recipes, base=base, based_on=version, n_normals=len(images.normals)
        )
        return _judged_and_published(request, images, made, trial, report=report, ask=ask, progress=progress)


def _judged_and_published(
    request: Request,
    images: Given,
    made: OwnDetector,
    trial: Path,
    *,
    report: Path,
    ask: Ask,
    progress: Progress,
) -> Outcome:
    recipe = request.recipes[0]
    samples = (*images.labelled, *_free_samples(images, made))
    before = _before(request.repository, recipe, samples, progress=progress)
    with Embedded(trial) as models:
        threshold = pipeline.threshold_of(recipe, models.meta("detector"))
        looked = labelled_images.look(models, recipe, samples, what="images, adapted detector", progress=progress)
        head, labels = labelled_images.head_of(models)
        base = read_base_head(trial, models)
        names = names_of([sample.label for sample in images.labelled], labels)
        same_head = labelled_images.renamed(labelled_images.judge(looked, head, labels, recipe, threshold), names)
        found, crops, why = _options(images, base, looked, names, recipe, threshold, models, request, progress)
    chosen = own_heads.best(found) if found else None
    notes = [
        *images.notes,
        *why,
        *adapt_report.warnings(images, made, request.recipes, threshold, before, same_head, chosen),
    ]
    adapt_report.write(
        report,
        images,
        made,
        looked,
        before,
        same_head,
        found,
        chosen,
        threshold=threshold,
        notes=notes,
        seed=request.seed,
    )
    if not ask():
        return Outcome(None, None, tuple(notes))
    detector = own_detector.copy_version(trial, request.repository, "detector", 1)
    published = None
    if chosen is not None and crops is not None:
        published = _publish_head(request, base, chosen, crops)
    return Outcome(detector, published, tuple(notes))


def _free_samples(images: Given, made: OwnDetector) -> list[Sample]:
    """Some of the normals, as defect-free images to judge and to learn from; those that look defective are none."""
    kept = [path for number, path in enumerate(images.normals) if number not in made.suspects]
    labelled = {sample.image for sample in images.labelled}
    rows = np.unique(np.linspace(0, len(kept) - 1, min(MOST_FREE, len(kept))).round().astype(int)).tolist()
    return [Sample(kept[row], DEFECT_FREE) for row in rows if kept[row] not in labelled]


def _before(repository: Path, recipe: Recipe, samples: Sequence[Sample], *, progress: Progress) -> Before:
    """What serves now makes of the same images."""
    with Embedded(repository) as models:
        threshold = pipeline.gate_threshold(recipe, models)
        looked = labelled_images.look(models, recipe, samples, what="images, detector in service", progress=progress)
        head, labels = labelled_images.head_of(models)
        names = names_of([sample.label for sample in samples], labels)
        judged = labelled_images.renamed(labelled_images.judge(looked, head, labels, recipe, threshold), names)
        n_known = sum(one.domain_p is None or one.domain_p > recipe.domain.significance for one in looked)
        return Before(tuple(judged), threshold, n_known, tuple(one.raw_score for one in looked))


def _options(
    images: Given,
    base: BaseHead,
    looked: Sequence[Looked],
    names: dict[str, str],
    recipe: Recipe,
    threshold: float,
    models: Embedded,
    request: Request,
    progress: Progress,
) -> tuple[list[Option], OwnCrops | None, list[str]]:
    """Ways to fit a head on the labels, and why there is none where there are labels."""
    if not any(sample.label != DEFECT_FREE for sample in images.labelled):
        return [], None, []
    crops = own_heads.own_crops(looked, names, models)
    families = [head_families.family_of(base.meta)]
    if request.tries_recame and head_families.RECAME not in families:
        families.append(head_families.RECAME)
    encoder = models.meta("encoder")
    classify = {family: head_families.classify(family, encoder, seed=request.seed) for family in families}
    try:
        found = own_heads.options(
            base, crops, looked, names, recipe, threshold, families=classify, seed=request.seed, progress=progress
        )
    except ConfigError as error:
        return [], None, [f"the head stays as it is: {error}"]
    return found, crops, []


def _publish_head(request: Request, base: BaseHead, chosen: Option, crops: OwnCrops) -> int:
    refs = crop_store.write(request.repository, crops.views)
    own = Bank(crops.bank.features, crops.bank.labels, crops.bank.images, crops.bank.ids, tuple(refs))
    kept, apart = _set_apart(own, request.seed)
    bank = head_bank.joined([chosen.base, kept])
    golden = own_heads.without_images(base.golden, own)
    golden = head_bank.joined([golden, apart]) if chosen.keeps_known else _golden_of_own(apart, kept)
    head = own_heads.fit(bank, base.frozen_width, seed=request.seed, classify=chosen.classify)
    provenance: dict[str, str | float | int] = {
        **outcomes.lineage(base.meta),
        "parent": choice.choice(request.repository, "head"),
        "own": ", ".join(sorted(set(crops.bank.labels))),
        "own_crops": len(kept),
        "fitted_on": chosen.name,
    }
    encoder = choice.choice(request.repository, "encoder")
    return publish_head(
        head, request.repository, encoder_version=encoder, provenance=provenance, codes=base.meta.codes, bank=bank,
        golden=golden,
    )  # fmt: skip


def _set_apart(own: Bank, seed: int) -> tuple[Bank, Bank]:
    """Own crops to fit on, and those of images that no head is ever fitted on: of classes with many images alone."""
    rng = np.random.default_rng(seed)
    images, labels = np.array(own.images), np.array(own.labels)
    apart: set[str] = set()
    for label in dict.fromkeys(own.labels):
        of_class = np.unique(images[labels == label])
        if len(of_class) >= GOLDEN_FROM:
            apart |= set(rng.permutation(of_class)[: len(of_class) // GOLDEN_SHARE].tolist())
    is_apart = np.isin(images, sorted(apart))
    return head_bank.chosen(own, ~is_apart), head_bank.chosen(own, is_apart)


def _golden_of_own(apart: Bank, kept: Bank) -> Bank:
    """What later heads are proven on where no shipped class stays: too few images to set apart, those learnt from."""
    return apart if len(apart) else kept


def remove_report(folder: Path) -> None:
    """Take an earlier report away, so that no picture of it stays beside the new one."""
    if (folder / "report.json").is_file():
        shutil.rmtree(folder)
