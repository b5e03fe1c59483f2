"""Heads judged on a user's own labelled images as they would serve: the one in service, the shipped one, a new one.

The tables are made of ``labelled_images.Judgement``, whoever the head was.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line.pipeline import gate_threshold
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data import data_folders
from semwatch_training.data.datasets import distinct
from semwatch_training.discovery.head import Head
from semwatch_training.evaluation import labelled_images, plots
from semwatch_training.evaluation.labelled_images import Judgement, Looked
from semwatch_training.evaluation.report import Cell, Result, Table
from semwatch_training.metrics.adc_metrics import adc_metrics, purity_contribution_curves
from semwatch_training.metrics.uncertainty import Rate
from semwatch_training.publishing.head_families import load_head
from semwatch_training.system import defaults
from semwatch_training.system.progress_bars import Progress

KINDS = ("known", "novel", "unknown", "non-decidable", "defect-free", "gate shut", "not found", "nothing found")
IN_SERVICE, SHIPPED = "in service", "as shipped"
CONTRIBUTION = 0.6
"""Share of the images at which purity is stated, the surest verdicts first."""


def service(data: Path, *, repository: Path, recipe: Recipe, progress: Progress) -> Result:
    """Judge the head in service, and the shipped one beside it, on labelled images.

    Args:
        data: labelled images in any layout, with or without masks.
        repository: whose models are in service.
        recipe: gate, unknown rule and domain.
        progress: called after every image.

    Raises:
        ConfigError: what ``data_folders.read`` refuses, or a gate without a threshold.
        ModelMismatch: a model is absent.
    """
    data_set = data_folders.read(data, allow_leakage=True)
    samples = distinct([*data_set.train, *data_set.test])
    with Embedded(repository) as models:
        threshold = gate_threshold(recipe, models)
        looked = labelled_images.look(models, recipe, samples, progress=progress)
        head, labels = labelled_images.head_of(models)
        judged = {
            f"{IN_SERVICE}, version {models.versions()['head']}": _judged(looked, head, labels, recipe, threshold)
        }
        if shipped := _shipped(models):
            judged[SHIPPED] = _judged(looked, as_function(shipped), shipped.labels, recipe, threshold)
    note = (
        f"{data_set.name}: {len(samples)} labelled images and defects, searched and gated as the line does at "
        f"{threshold:.4g}; a head that learnt from these images is judged too well."
    )
    return tables(judged, labels, note), pictures(judged)


def _judged(
    looked: Sequence[Looked], head: labelled_images.Head, labels: Sequence[str], recipe: Recipe, threshold: float
) -> list[Judgement]:
    names = names_of([one.sample.label for one in looked], labels)
    return labelled_images.renamed(labelled_images.judge(looked, head, labels, recipe, threshold), names)


def _shipped(models: Embedded) -> Head | None:
    """The shipped head, where it reads the features of the encoder in service and is not itself what serves."""
    path = defaults.SHIPPED / "head.safetensors"
    serving = models.meta("head")
    if not path.is_file():
        return None
    head, _, _ = load_head(path)
    width = serving.inputs["features"].shape[0]
    is_same = set(serving.labels) == set(head.labels) and "parent" not in serving.provenance
    return None if is_same or head.width != width else head


def as_function(head: Head) -> labelled_images.Head:
    """A fitted head as the judgement asks it."""

    def ask(features: NDArray[np.float32]) -> labelled_images.Answers:
        with torch.no_grad():
            logits, p_values = head(torch.from_numpy(features))
        return logits.numpy(), p_values.numpy()

    return ask


def names_of(labels: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """How a head that knows classes calls a user's labels: the same but for case, blanks and dashes.

    >>> names_of(["BRIDGE", "Missing Via", "void"], ["bridge", "missing-via"])
    {'BRIDGE': 'bridge', 'Missing Via': 'missing-via'}
    """
    plain = {_plain(label): label for label in known}
    found = {label: plain[_plain(label)] for label in dict.fromkeys(labels) if _plain(label) in plain}
    return {label: name for label, name in found.items() if label != name}


def _plain(label: str) -> str:
    return label.lower().replace("_", "-").replace(" ", "-")


# ---- tables ----


def tables(judged: Mapping[str, Sequence[Judgement]], labels: Sequence[str], note: str) -> list[Table]:
    """What became of the images, figures of each head, and figures of each class."""
    return [_figures(judged, labels, note), _kinds(judged), _classes(judged)]


def _figures(judged: Mapping[str, Sequence[Judgement]], labels: Sequence[str], note: str) -> Table:
    columns = (
        "head",
        "accuracy of all",
        "purity",
        "contribution",
        f"purity at {CONTRIBUTION:g}",
        "escapes",
        "false calls",
    )
    rows: list[tuple[Cell, ...]] = []
    for name, some in judged.items():
        adc = adc_metrics([one.truth for one in some], [one.label for one in some], nuisance={DEFECT_FREE})
        defects = [one for one in some if one.truth != DEFECT_FREE]
        free = [one for one in some if one.truth == DEFECT_FREE]
        rows.append(
            (
                name,
                Rate.of(sum(one.label == one.truth for one in some), len(some)),
                adc.total.purity,
                adc.total.contribution,
                purity_at(some, CONTRIBUTION),
                Rate.of(sum(one.label == DEFECT_FREE for one in defects), len(defects)) if defects else None,
                Rate.of(sum(one.label != DEFECT_FREE for one in free), len(free)) if free else None,
            )
        )
    strangers = sorted({one.truth for some in judged.values() for one in some} - {*labels, DEFECT_FREE})
    unknown = f" The head in service does not know {', '.join(strangers)}." if strangers else ""
    more = (
        "Not decided counts as wrong in accuracy; escapes are defects that pass as defect-free, by gate, search or "
        "head; false calls are defect-free images that are called anything else."
    )
    return Table("Heads", columns, tuple(rows), f"{note} {more}{unknown}")


def _kinds(judged: Mapping[str, Sequence[Judgement]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, some in judged.items():
        for what, is_free in (("defects", False), ("defect-free images", True)):
            counts = Counter(one.kind for one in some if (one.truth == DEFECT_FREE) is is_free)
            if counts:
                rows.append((name, what, *(counts.get(kind, 0) for kind in KINDS)))
    note = "Defect-free: dismissed by the head. Gate shut, not found: nothing was asked of a head."
    return Table("Verdicts", ("head", "of", *KINDS), tuple(rows), note)


def _classes(judged: Mapping[str, Sequence[Judgement]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, some in judged.items():
        adc = adc_metrics([one.truth for one in some], [one.label for one in some], nuisance={DEFECT_FREE})
        for label, one in adc.by_class.items():
            called = Counter(j.label or "not decided" for j in some if j.truth == label and j.label != label)
            mostly = ", ".join(f"{what} {n}" for what, n in called.most_common(2))
            rows.append((name, label, one.n_true, one.accuracy, one.purity, one.contribution, one.escape_rate, mostly))
    columns = ("head", "class", "images", "accuracy", "purity", "contribution", "escapes", "else mostly called")
    return Table("Classes", columns, tuple(rows))


def purity_at(judged: Sequence[Judgement], contribution: float) -> float | None:
    """Share of right verdicts among the surest that make up ``contribution`` of all; None where fewer are decided."""
    decided = sorted((one for one in judged if one.label is not None), key=lambda one: -one.confidence)
    n = round(contribution * len(judged))
    if not n or len(decided) < n:
        return None
    return sum(one.label == one.truth for one in decided[:n]) / n


def pictures(judged: Mapping[str, Sequence[Judgement]]) -> dict[str, Figure]:
    """Confusion matrix and purity against contribution of each head."""
    found = {}
    for name, some in judged.items():
        truth, verdicts = [one.truth for one in some], [one.label for one in some]
        found[f"Verdicts against truth, {name}"] = plots.confusion(truth, verdicts)
        decided = [one for one in some if one.label is not None]
        if decided:
            curves = purity_contribution_curves(
                [one.truth for one in decided],
                [str(one.label) for one in decided],
                np.array([one.confidence for one in decided]),
            )
            found[f"Purity against contribution, {name}"] = plots.purity_contribution(curves)
    return found


def refuse_synthetic(data: str) -> Path:
    """The folder of labelled images.

    Raises:
        ConfigError: it is the word "synthetic".
    """
    if data == "synthetic":
        raise ConfigError("the head in service is judged on labelled images of yours; name their folder or table")
    return Path(data)
