"""What adapting shows before it asks: warnings, tables before and after, confusion matrices, worst images."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.line.gate_calibration import Counted, reachable_rate
from semwatch.settings.recipe import Recipe
from semwatch_training.adapt.given import Given
from semwatch_training.adapt.own_detector import OwnDetector
from semwatch_training.adapt.own_heads import Option
from semwatch_training.evaluation import evaluate_service, plots, report
from semwatch_training.evaluation.labelled_images import Judgement, Looked
from semwatch_training.evaluation.report import Cell, Provenance, Table

NOW, ADAPTED_GATE = "in service now", "adapted detector, head as now"
N_PICTURES = 12
HALF = 0.5
"""Share of a class's images called one other class at which its label contradicts what the head knows."""


@dataclass(frozen=True, slots=True)
class Before:
    """What serves now makes of the images."""

    judged: tuple[Judgement, ...]
    threshold: float
    n_known: int
    """Images that count as of a known process."""
    raw_scores: tuple[float, ...]


def warnings(
    images: Given,
    made: OwnDetector,
    recipes: Sequence[Recipe],
    threshold: float,
    before: Before,
    same_head: Sequence[Judgement],
    chosen: Option | None,
) -> list[str]:
    """What a person should know before saying yes, each a sentence with what to do."""
    found = []
    if made.suspects:
        worst = ", ".join(images.normals[number].name for number in made.suspects[:5])
        found.append(
            f"{len(made.suspects)} of {len(images.normals)} normal images look defective and were left out ({worst}); "
            f"see the report: take them out of the folder, or give more like them if they are normal"
        )
    for recipe in recipes:
        if recipe.gate.threshold is not None:
            found.append(
                f"recipe {recipe.name} sets gate.threshold, which goes before the adapted gate ({threshold:.4g}); take "
                f"that line out of the recipe"
            )
    now, then = _found(before.judged), _found(same_head)
    if now is not None and then is not None and then.count < now.count:
        found.append(
            f"the adapted gate finds less: {then} labelled defects, now {now}; give more, and typical, normals"
        )
    found += _contradictions(before.judged)
    if chosen is not None and chosen.n_right < sum(one.label == one.truth for one in before.judged):
        found.append(
            "the new head calls fewer images what they are than the one in service; say no, or give more labels"
        )
    return found


def _found(judged: Sequence[Judgement]) -> Counted | None:
    """Defects that reach a head."""
    defects = [one for one in judged if one.truth != DEFECT_FREE]
    n = sum(one.kind not in ("gate shut", "not found") for one in defects)
    return Counted(n, len(defects)) if defects else None


def _contradictions(judged: Sequence[Judgement]) -> list[str]:
    """Labels that the head in service knows, and gives to other images."""
    called = {one.label for one in judged if one.label is not None}
    found = []
    for label in sorted({one.truth for one in judged} - {DEFECT_FREE}):
        mine = [one.label for one in judged if one.truth == label]
        for other in sorted(called - {label, DEFECT_FREE}):
            if mine.count(other) > HALF * len(mine):
                found.append(
                    f"{mine.count(other)} of {len(mine)} images labelled {label!r} look like {other!r} to the head in "
                    f"service; look at them: if both names mean one thing, use one"
                )
    return found


def write(
    folder: Path,
    images: Given,
    made: OwnDetector,
    looked: Sequence[Looked],
    before: Before,
    same_head: Sequence[Judgement],
    options: Sequence[Option],
    chosen: Option | None,
    *,
    threshold: float,
    notes: Sequence[str],
    seed: int,
) -> None:
    """Write the report."""
    judged: dict[str, Sequence[Judgement]] = {NOW: before.judged, ADAPTED_GATE: same_head}
    judged |= {option.name: option.judged for option in options}
    note = (
        f"{len(looked)} images and labelled defects, the normals among them. Heads on own classes are judged by images "
        f"that they did not see, near duplicates apart; the detector saw these normals."
    )
    tables = [_gate_table(images, made, before, looked, threshold), _notes_table(notes)]
    figures: dict[str, Figure] = {}
    if any(one.truth != DEFECT_FREE for one in same_head):
        labels = sorted({one.truth for one in same_head})
        tables += evaluate_service.tables(judged, labels, note)
        shown = {NOW: before.judged, **({chosen.name: chosen.judged} if chosen else {ADAPTED_GATE: same_head})}
        figures |= evaluate_service.pictures(shown)
        if wrong := _wrong(looked, chosen.judged if chosen else same_head):
            figures["Worst images, label and verdict"] = sheet(wrong)
    if made.suspects:
        fields = [(images.fields[k], images.normals[k].name) for k in made.suspects[:N_PICTURES]]
        figures["Normal images that look defective"] = sheet(fields)
    command = shlex.join(["semwatch-train", *sys.argv[1:]])
    report.write(folder, "Adapted models", tables, figures, Provenance(command, (seed,), images.normals[0].parent.name))


def _gate_table(images: Given, made: OwnDetector, before: Before, looked: Sequence[Looked], threshold: float) -> Table:
    scores = made.adapted.scores
    defects = [k for k, one in enumerate(looked) if one.sample.label != DEFECT_FREE]
    raw = np.array([one.raw_score for one in looked])
    now = np.array(before.raw_scores)
    n_known = sum(one.domain_p is None or one.domain_p > 0.01 for one in looked)

    def opened(values: NDArray[np.float64], at: float) -> Cell:
        return str(Counted(int((values[defects] > at).sum()), len(defects))) if defects else None

    rows: tuple[tuple[Cell, ...], ...] = (
        ("gate", before.threshold, threshold),
        ("opens on labelled defects", opened(now, before.threshold), opened(raw, threshold)),
        (
            "opens on normal images, each judged by the others",
            None,
            str(Counted(int((scores > threshold).sum()), len(scores))),
        ),
        ("images of a known process", f"{before.n_known} of {len(looked)}", f"{n_known} of {len(looked)}"),
        ("planted defects against normals, image AUROC", *made.adapted.auroc),
    )
    rate = reachable_rate(len(scores), 0.01)
    statistics = (
        "count"
        if made.adapted.graph.normals and made.adapted.graph.normals.has_places
        else "do not help, so do not count"
    )
    note = (
        f"{len(images.normals)} normal images, {len(made.suspects)} left out as suspects; these can promise a false "
        f"alarm rate of {rate:.1%} and no less. Statistics of their places {statistics}."
    )
    return Table("Detector and gate", ("", "now", "adapted"), rows, note)


def _notes_table(notes: Sequence[str]) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple((k, note) for k, note in enumerate(notes, start=1))
    return Table("To know", ("", "what"), rows or ((0, "nothing"),))


def _wrong(looked: Sequence[Looked], judged: Sequence[Judgement]) -> list[tuple[NDArray[np.uint8], str]]:
    """Images that are called what they are not: escapes first, then wrong names by confidence."""
    wrong = [
        (one, verdict)
        for one, verdict in zip(looked, judged, strict=True)
        if verdict.label not in (None, verdict.truth)
    ]
    wrong.sort(key=lambda pair: (pair[1].label != DEFECT_FREE, -pair[1].confidence))
    return [
        (one.field, f"{one.sample.image.name}\n{verdict.truth}, called {verdict.label}")
        for one, verdict in wrong[:N_PICTURES]
    ]


@plots.styled
def sheet(pictures: Sequence[tuple[NDArray[np.uint8], str]]) -> Figure:
    """Pictures (H, W) with a caption each, four a row."""
    n_rows = -(-len(pictures) // 4)
    figure = Figure(figsize=(9, 2.5 * n_rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(n_rows, 4)).ravel()
    for one in axes:
        one.axis("off")
    for one, (pixels, caption) in zip(axes, pictures, strict=False):
        one.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        one.set_title(caption, fontsize=6)
    return figure
