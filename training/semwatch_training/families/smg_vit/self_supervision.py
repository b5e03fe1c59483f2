"""Stage B: teach the guided layers without labels, by self-distillation over views of defect crops.

A student must give two views of one crop the same answer as a teacher that is its own running average; centring and a
sharper teacher keep both from giving every crop the same answer. Only the soft-mask guided layers, their scales and the
final norm learn, so the frozen layers before them run once per view, ahead of training, and their tokens are kept on
disk. Pooled features do not move.

Source: DINO (Caron et al. 2021), which IC-DefectNCD section 3.4 names without giving a loss; its own parent has no
averaged teacher.
"""

import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semwatch.errors import ConfigError
from semwatch_training.families.smg_vit.crop_views import Views, frozen_fingerprint
from semwatch_training.families.smg_vit.distillation import Projection, collapse_indicators, distillation_loss
from semwatch_training.families.smg_vit.smg_vit import GuidedLayers, SmgVit
from semwatch_training.system import checkpoint, weights_file
from semwatch_training.system.progress_bars import Progress


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the guided layers are taught. DINO's values, with a smaller head and rate for few crops and few layers."""

    epochs: int = 20
    batch: int = 32
    """Crops; two views of each make a step."""
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warm_up_steps: int = 20
    weight_decay: float = 0.04
    clip: float = 1.0
    teacher_momentum: float = 0.99
    """Of the first step; rises to 1 along a cosine. DINO's 0.996 is for runs a hundred times as long."""
    centre_momentum: float = 0.9
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    final_teacher_temperature: float = 0.07
    """Reached after ``temperature_epochs``, linearly."""
    temperature_epochs: int = 5
    frozen_prototype_epochs: int = 1
    """The head's last layer keeps still that long: DINO's guard of the first steps."""
    hidden: int = 512
    bottleneck: int = 128
    prototypes: int = 512
    seed: int = 1


class Pupil(nn.Module):
    """What learns: the guided layers of an encoder, and a projection. The teacher is another one of these."""

    def __init__(self, guided: GuidedLayers, projection: Projection) -> None:
        super().__init__()
        self.guided, self.projection = guided, projection

    def forward(self, tokens: Tensor, soft_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (B, C), unit length, and cosines (B, K)."""
        class_tokens = self.guided(tokens, soft_mask)
        return class_tokens, self.projection(class_tokens)


@dataclass(slots=True)
class _Run:
    """All that a step changes."""

    pupil: Pupil
    teacher: Pupil
    centre: Tensor
    optimiser: torch.optim.Optimizer


def train(
    vit: SmgVit, views: Views, schedule: Schedule, folder: Path, *, local: Views | None = None, progress: Progress
) -> list[dict[str, float]]:
    """Teach the guided part of ``vit`` in place, from the checkpoint in ``folder`` if there is one.

    What ``vit`` holds at the end is the teacher, which DINO finds better than the student throughout. In ``folder``
    ``metrics.csv`` gets one row per epoch:

    - ``loss``: cross-entropy of student under teacher, mean over pairs of views.
    - ``teacher_entropy``: of one crop's answer, over log K. 1 is collapse to the uniform answer.
    - ``marginal_entropy``: of a batch's mean answer, over log K. 0 is collapse to one prototype.
    - ``feature_std``: of class tokens over a batch, times root C. 0 is collapse to a point; 1 is an even spread.

    Args:
        vit: its device decides where; bfloat16 on CUDA.
        views: two or more of each crop.
        schedule: how.
        folder: of checkpoint and curve.
        local: smaller views of the same crops, seen by the student only.
        progress: called after every step.

    Returns:
        The curve's rows.

    Raises:
        ConfigError: fewer crops than a batch, a single view, local views of other crops, views of another encoder, or
            a checkpoint of another run.
    """
    _refuse_misfits(vit, views, local, schedule)
    run = _start(vit, schedule)
    settings = {
        **asdict(schedule),
        "form": json.dumps(asdict(vit.form)),
        "views": [views.fingerprint, local.fingerprint if local else ""],
    }
    first_epoch, curve = _resume(folder / "checkpoint.pt", settings, run)
    n_steps = len(views.tokens) // schedule.batch
    for epoch in range(first_epoch, schedule.epochs):
        start, rows = time.monotonic(), []
        generator = torch.Generator().manual_seed(schedule.seed * 100_003 + epoch)
        order = torch.randperm(len(views.tokens), generator=generator)[: n_steps * schedule.batch]
        for index, members in enumerate(order.view(n_steps, schedule.batch)):
            seen = _batch(views, local, members, generator, run.centre.device)
            rows.append(_step(run, seen, schedule, epoch * n_steps + index, n_steps))
            done = f"epoch {epoch + 1}/{schedule.epochs}, loss {rows[-1]['loss']:.4f}"
            progress(done, epoch * n_steps + index + 1, schedule.epochs * n_steps)
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        seconds = time.monotonic() - start
        times = {"seconds": seconds, "eta_seconds": seconds * (schedule.epochs - epoch - 1)}
        curve.append({"epoch": epoch + 1, **means, **times})
        _checkpoint(folder / "checkpoint.pt", epoch + 1, curve, settings, run)
        checkpoint.write_curve(curve, folder / "metrics.csv")
    vit.guided.load_state_dict(run.teacher.guided.state_dict())
    vit.guided.requires_grad_(False)
    return curve


def save(vit: SmgVit, path: Path, *, provenance: dict[str, str | float | int]) -> None:
    """Write what stage B trained, as fp16 safetensors, with form and provenance in the header."""
    header = {"family": "smg_vit", "form": json.dumps(asdict(vit.form)), "frozen": frozen_fingerprint(vit)}
    header["provenance"] = json.dumps(provenance)
    weights_file.write(path, {name: value.half() for name, value in vit.guided.state_dict().items()}, header)


def load(path: Path, vit: SmgVit) -> dict[str, str | float | int]:
    """Put what ``save`` wrote into an encoder, in place; returns its provenance.

    Raises:
        ConfigError: the file is absent, holds no stage B, or one of an encoder of another form or trunk.
    """
    state, header = weights_file.read(path, what="encoder")
    try:
        form, provenance = json.loads(header["form"]), json.loads(header["provenance"])
        if form != json.loads(json.dumps(asdict(vit.form))):
            raise ValueError(f"it belongs to an encoder of another form, {form}")
        if header["frozen"] != frozen_fingerprint(vit):
            raise ValueError("it belongs to an encoder with other frozen layers")
        vit.guided.load_state_dict(state, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise weights_file.not_ours(path, "encoder", error) from error
    return dict(provenance)


def teacher_momentum(step: int, steps: int, schedule: Schedule) -> float:
    """The teacher's momentum: from its first value to 1 along a cosine."""
    return 1 - (1 - schedule.teacher_momentum) * 0.5 * (1 + math.cos(math.pi * step / steps))


def teacher_temperature(epoch: int, schedule: Schedule) -> float:
    """The teacher's temperature: linear over the first epochs, then constant."""
    share = min(epoch / schedule.temperature_epochs, 1.0) if schedule.temperature_epochs else 1.0
    return schedule.teacher_temperature + share * (schedule.final_teacher_temperature - schedule.teacher_temperature)


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """Linear warm-up, then cosine to the final rate."""
    if step < schedule.warm_up_steps:
        return schedule.learning_rate * (step + 1) / schedule.warm_up_steps
    done = (step - schedule.warm_up_steps) / max(1, steps - schedule.warm_up_steps)
    reach = schedule.learning_rate - schedule.final_learning_rate
    return schedule.final_learning_rate + reach * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def refuse_too_few(n_crops: int, schedule: Schedule) -> None:
    """Check that crops fill a batch, before their views are made.

    Raises:
        ConfigError: they do not.
    """
    if schedule.batch < 2 or n_crops < schedule.batch:
        raise ConfigError(
            f"{n_crops} crops do not fill a batch of {schedule.batch}; give more crops, or a batch of 2 to {n_crops}"
        )


def _refuse_misfits(vit: SmgVit, views: Views, local: Views | None, schedule: Schedule) -> None:
    n, n_views = views.tokens.shape[:2]
    refuse_too_few(n, schedule)
    if n_views < 2:
        raise ConfigError("self-supervision compares two views of a crop; cache two or more of each")
    if local is not None and len(local.tokens) != n:
        raise ConfigError(f"{len(local.tokens)} crops have local views and {n} have global ones; make both of the same")
    for seen in (views, local) if local else (views,):
        if seen.frozen_fingerprint != frozen_fingerprint(vit):
            raise ConfigError("the views were cached with other frozen layers than this encoder's; cache them again")


def _start(vit: SmgVit, schedule: Schedule) -> _Run:
    """A student around the encoder's own guided layers, and a teacher that is its copy."""
    device = vit.guided.scale.device
    with torch.random.fork_rng():
        torch.manual_seed(schedule.seed)
        projection = Projection(vit.trunk.shape.width, schedule.hidden, schedule.bottleneck, schedule.prototypes)
    pupil = Pupil(vit.guided, projection.to(device)).requires_grad_(True)
    teacher = copy.deepcopy(pupil).requires_grad_(False)
    matrices = [p for p in pupil.parameters() if p.ndim > 1 and p is not vit.guided.scale]
    vectors = [p for p in pupil.parameters() if p.ndim <= 1 or p is vit.guided.scale]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, schedule.learning_rate)
    return _Run(pupil, teacher, torch.zeros(schedule.prototypes, device=device), optimiser)


Seen = list[tuple[Tensor, Tensor]]
"""Tokens (B, T, C) and soft masks (B, t, t) of each view of a batch."""


def _batch(
    views: Views, local: Views | None, members: Tensor, generator: torch.Generator, device: torch.device
) -> tuple[Seen, Seen]:
    """Two views of each crop, drawn anew, and all of its local ones."""

    def of(source: Views, view: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = members.numpy(), view.numpy()
        tokens = torch.from_numpy(np.stack([source.tokens[r, c] for r, c in zip(rows, columns, strict=True)]))
        return tokens.to(device).float(), torch.from_numpy(source.soft_masks[rows, columns]).to(device)

    n_views = views.tokens.shape[1]
    drawn = torch.stack([torch.randperm(n_views, generator=generator)[:2] for _ in members])
    small = [of(local, torch.full_like(members, v)) for v in range(local.tokens.shape[1])] if local else []
    return [of(views, drawn[:, 0]), of(views, drawn[:, 1])], small


def _step(run: _Run, seen: tuple[Seen, Seen], schedule: Schedule, step: int, steps_per_epoch: int) -> dict[str, float]:
    both, small = seen
    epoch, steps = step // steps_per_epoch, schedule.epochs * steps_per_epoch
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(step, steps, schedule)
    device = run.centre.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        with torch.no_grad():
            answers = [run.teacher(*view)[1].float() for view in both]
        answered = [run.pupil(*view) for view in (*both, *small)]
    sharp = teacher_temperature(epoch, schedule)
    targets = [((answer - run.centre) / sharp).softmax(dim=-1) for answer in answers]
    loss = distillation_loss([cosines.float() for _, cosines in answered], targets, schedule.student_temperature)
    if not torch.isfinite(loss):
        raise ConfigError(f"the loss is {loss.item()} at step {step + 1}; lower the learning rate")
    run.optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if epoch < schedule.frozen_prototype_epochs:
        run.pupil.projection.prototypes.grad = None
    torch.nn.utils.clip_grad_norm_(run.pupil.parameters(), schedule.clip)
    run.optimiser.step()
    _follow(run, torch.cat(answers), schedule, teacher_momentum(step, steps, schedule))
    return {"loss": loss.item(), **collapse_indicators(targets[0], answered[0][0].detach())}


@torch.no_grad()
def _follow(run: _Run, answers: Tensor, schedule: Schedule, momentum: float) -> None:
    """Move the teacher towards the student, and the centre towards the teacher's mean answer."""
    for slow, fast in zip(run.teacher.parameters(), run.pupil.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)
    run.centre.lerp_(answers.mean(dim=0), 1 - schedule.centre_momentum)


def _checkpoint(path: Path, epoch: int, curve: list[dict[str, float]], settings: dict[str, Any], run: _Run) -> None:
    state = {
        "epoch": epoch,
        "curve": curve,
        "pupil": run.pupil.state_dict(),
        "teacher": run.teacher.state_dict(),
        "centre": run.centre,
        "optimiser": run.optimiser.state_dict(),
    }
    checkpoint.write(path, settings, state)


def _resume(path: Path, settings: dict[str, Any], run: _Run) -> tuple[int, list[dict[str, float]]]:
    if (state := checkpoint.read(path, settings)) is None:
        return 0, []
    run.pupil.load_state_dict(state["pupil"])
    run.teacher.load_state_dict(state["teacher"])
    run.centre.copy_(state["centre"])
    run.optimiser.load_state_dict(state["optimiser"])
    return int(state["epoch"]), list(state["curve"])
