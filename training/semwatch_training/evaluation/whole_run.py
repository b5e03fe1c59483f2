"""The whole training run in one call: weights, the repository that serves them, and reports of what they are worth.

    <out>/weights/      detector, encoder where it is trained, head; work that resumes in *.work beside them
    <out>/repository/   what the daemon serves
    <out>/reports/      detection, discovery, unknown rule and number of classes, on synthetic images of their own seeds
    <out>/ship.json     of each part that is whole: a hash of what it was made of, its seconds, its figures

A part is left alone while it is there and what it was made of is the same, and made again otherwise. So a stopped run
goes on where it was, and a head never outlives the encoder that it was fitted on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from semwatch.errors import ConfigError
from semwatch.models import model_repository
from semwatch.system import files
from semwatch_training.discovery import head_run
from semwatch_training.discovery.discovery_heads import HeadSettings
from semwatch_training.evaluation import evaluate_commands
from semwatch_training.evaluation.evaluation_data import SYNTHETIC
from semwatch_training.families import detector_run
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.branch.train_branch import BranchSchedule
from semwatch_training.families.branch_images import BranchImages
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicForm
from semwatch_training.families.smg_vit import encoder_run, self_supervision
from semwatch_training.families.smg_vit.encoder_run import CropSource
from semwatch_training.families.smg_vit.smg_vit import EncoderForm
from semwatch_training.publishing import build_repository
from semwatch_training.system.defaults import BRANCH_STEPS, BRANCH_WIDTH, HEAD_IMAGES, MIN_NORMALS
from semwatch_training.system.progress_bars import Bars


@dataclass(frozen=True, slots=True)
class Plan:
    """How large each part is; ``plan`` makes one."""

    form: IntrinsicForm
    images: BranchImages
    branch: BranchSchedule
    crops: CropSource
    encoder: self_supervision.Schedule | None
    """None: the encoder keeps its trunk's last layers."""
    head_images: int
    fields_per_type: int
    """Synthetic fields of each defect type to judge detection on."""
    crops_per_type: int
    """Synthetic crops of each defect type to judge discovery, unknown rule and k on."""
    problems: int
    """To judge the number of classes on."""
    seeds: int
    """Of the reports."""
    seed: int


class Part(NamedTuple):
    """One part of a run that is whole."""

    name: str
    seconds: float
    """Wall time of the call that finished it."""
    summary: str
    is_new: bool
    """False where it was whole before."""


def plan(scale: float, *, seed: int, self_supervise: bool) -> Plan:
    """Plan a run: 1 is what the shipped weights were made with, 0.01 tries every part out in minutes on a CPU.

    Where the methods have a least number, such as five crops of a class or a hundred normal images for a false alarm
    rate of 1 %, no scale goes below it.
    """

    def scaled(n: int, least: int) -> int:
        return max(least, round(n * scale))

    whole = BranchImages()
    return Plan(
        form=IntrinsicForm(branch=BranchForm(width=BRANCH_WIDTH)),
        images=replace(
            whole,
            n_normals=scaled(whole.n_normals, MIN_NORMALS),
            n_labelled=scaled(whole.n_labelled, 8),
            n_backgrounds=scaled(whole.n_backgrounds, 2),
            n_scenes=scaled(whole.n_scenes, 8),
            held_out=scaled(whole.held_out, 100),
        ),
        branch=BranchSchedule(steps=scaled(BRANCH_STEPS, 30), seed=seed),
        crops=CropSource(n_images=scaled(CropSource().n_images, 30)),
        encoder=self_supervision.Schedule(epochs=scaled(20, 2), batch=min(32, scaled(64, 8)), seed=seed)
        if self_supervise
        else None,
        head_images=scaled(HEAD_IMAGES, 180),
        fields_per_type=scaled(12, 2),
        crops_per_type=scaled(40, 18),
        problems=scaled(60, 4),
        seeds=min(3, scaled(3, 1)),
        seed=seed,
    )


def ship(out: Path, plan: Plan, *, cache: Path) -> Iterator[Part]:
    """Make every part that is not whole yet, in order, and yield each when it is.

    Raises:
        ConfigError: ``out`` holds work of another plan, or trained encoder layers that this plan does not make.
        PublishError: an exported model differs from its original.
    """
    weights, repository = out / "weights", out / "repository"
    detector, encoder, head = (weights / f"{name}.safetensors" for name in ("detector", "encoder", "head"))
    if plan.encoder is None and encoder.exists():
        raise ConfigError(f"{encoder} is there and would be served; remove it, or go on with --self-supervise")
    ledger = _Ledger(out / "ship.json")
    made_of: list[Any] = [plan.form, plan.images, plan.branch]
    yield ledger.part("detector", made_of, detector, partial(_detector, detector, plan, cache))
    yield _build(repository, weights, cache, with_head=False)
    if plan.encoder is not None:
        made_of = [plan.crops, plan.encoder, _sha256(detector)]
        train = partial(_encoder, encoder, plan.crops, plan.encoder, repository, cache)
        yield ledger.part("encoder", made_of, encoder, train)
        yield _build(repository, weights, cache, with_head=False)
    served = build_repository.served_form(repository)
    made_of = [plan.head_images, plan.seed, served, _sha256(detector)]
    yield ledger.part("head", made_of, head, partial(_head, head, plan, repository, served))
    yield _build(repository, weights, cache, with_head=True)
    yield from _reports(out / "reports", ledger, plan, weights, repository, cache)


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What is whole, on disk."""

    path: Path

    def part(self, name: str, made_of: list[Any], product: Path, make: Callable[[], str]) -> Part:
        """Make a part unless its product is there, made of the same; ``make`` gives its summary."""
        text = hashlib.sha256("\n".join(map(str, made_of)).encode()).hexdigest()
        known = self._read()
        if product.exists() and (row := known.get(name, {})).get("made_of") == text:
            return Part(name, row["seconds"], row["summary"], is_new=False)
        start = time.monotonic()
        summary = make()
        seconds = time.monotonic() - start
        known[name] = {"made_of": text, "seconds": round(seconds, 1), "summary": summary}
        files.write_whole(self.path, (json.dumps(known, indent=1) + "\n").encode())
        return Part(name, seconds, summary, is_new=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.path.exists():
            return {}
        try:
            return dict(json.loads(self.path.read_text()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.path} cannot be read ({error}); remove it to make every part again") from error


# ---- parts ----


def _detector(out: Path, plan: Plan, cache: Path) -> str:
    with Bars() as progress:
        scores = detector_run.train_default(out, plan.form, plan.images, plan.branch, cache=cache, progress=progress)
    return f"raw scores of {len(scores)} normal images {min(scores):.4f} to {max(scores):.4f}"


def _encoder(out: Path, crops: CropSource, schedule: self_supervision.Schedule, repository: Path, cache: Path) -> str:
    with Bars() as progress:
        last = encoder_run.train_encoder(
            out, EncoderForm(), crops, schedule, repository=repository, cache=cache, progress=progress
        )
    return f"loss {last['loss']:.3f}, spread of features {last['feature_std']:.3f}"


def _head(out: Path, plan: Plan, repository: Path, served: str) -> str:
    with Bars() as progress:
        fitted = head_run.fit_default(
            repository, out, encoder_form=served, n_images=plan.head_images, seed=plan.seed, progress=progress
        )
    report = fitted.report
    return f"{len(fitted.head.labels)} classes, accuracy {report['accuracy']} on {report['n_held_out']} held-out crops"


def _build(repository: Path, weights: Path, cache: Path, *, with_head: bool) -> Part:
    """Not in the ledger: building looks for itself what is published, and is quick where all is."""
    before = _versions(repository)
    start = time.monotonic()
    lines = list(build_repository.build(repository, weights=weights, cache=cache, with_head=with_head))
    return Part("build", time.monotonic() - start, ", ".join(lines), is_new=_versions(repository) != before)


def _versions(repository: Path) -> list[list[int]]:
    return [model_repository.versions(repository, model) for model in model_repository.MODELS]


def _reports(
    reports: Path, ledger: _Ledger, plan: Plan, weights: Path, repository: Path, cache: Path
) -> Iterator[Part]:
    """Each report is remade where the model that it judges, or what it is judged on, has changed."""
    encoder = model_repository.read_meta(repository, "encoder", model_repository.latest(repository, "encoder"))
    shared: dict[str, Any] = {"per_type": plan.crops_per_type, "repository": repository, "cache": cache}
    of_detector = [_sha256(weights / "detector.safetensors"), plan.fields_per_type, plan.seeds]
    of_encoder = [encoder.weights_sha256, plan.crops_per_type, plan.seeds]
    detection = partial(
        evaluate_commands.detection, weights=weights, seeds=plan.seeds, per_type=plan.fields_per_type, cache=cache
    )
    discovery = partial(evaluate_commands.discovery, seeds=plan.seeds, **shared)
    unknown = partial(evaluate_commands.unknown, seeds=plan.seeds, **shared)
    k = partial(evaluate_commands.k, problems=plan.problems, **shared)
    for name, made_of, judge, row, column in (
        ("detection", of_detector, detection, "shipped", "image AUROC"),
        ("discovery", of_encoder, discovery, HeadSettings().rule, "ARI"),
        ("unknown", of_encoder, unknown, "all", "AUROC unknown against known"),
        ("k", [*of_encoder, plan.problems], k, "consensus", "mean |k - k*|"),
    ):
        report = reports / name / "report.json"
        yield ledger.part(f"report {name}", made_of, report, partial(_judged, judge, report, row, column))


def _judged(judge: Callable[..., None], report: Path, row: str, column: str) -> str:
    judge(SYNTHETIC, out=report.parent)
    return f"{column} {headline(report, row, column)}"


def headline(report: Path, row: str, column: str) -> str:
    """The figures of one row and column, of every table of a report that has both; a mean for a spread."""
    figures = []
    for table in json.loads(report.read_text())["tables"]:
        for cells in table["rows"]:
            if cells[0] == row and column in table["columns"]:
                cell = cells[table["columns"].index(column)]
                value = cell["mean"] if isinstance(cell, dict) else cell
                figures.append("undefined" if value is None else f"{value:.3f}")
    return ", ".join(figures)


def _sha256(path: Path) -> str:
    return files.file_sha256(path)
