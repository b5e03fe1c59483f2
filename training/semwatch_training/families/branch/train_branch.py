"""Train the segmentation branch: on normals with pseudo-defects planted in them, and on labelled defects if there are.

What the branch reads of an image is frozen, so it is computed once and cached: 1.1 MB an image. Resumable like the
detector's own training: the cache is reused where it fits, and a checkpoint is written every few steps.
"""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semwatch.errors import ConfigError
from semwatch.system import files
from semwatch_training.families.branch.branch_views import Image, Mask
from semwatch_training.families.branch.segmentation_branch import BranchForm, SegmentationBranch, branch_loss
from semwatch_training.system import checkpoint
from semwatch_training.system.precision import half_precision
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks.efficientnet import EfficientNet

CHECKPOINT_STEPS = 50


class Reads(Protocol):
    """What a branch reads of an image, in two parts: a frozen trunk's maps, and channels made of these."""

    @property
    def form(self) -> BranchForm:
        """Of the branch."""

    @property
    def trunk(self) -> EfficientNet:
        """The frozen trunk."""

    def matching(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Channels (B, 3, h, w) of three stages' maps."""


@dataclass(frozen=True, slots=True)
class BranchSchedule:
    """How a branch is trained."""

    steps: int = 1200
    batch: int = 8
    defective_share: float = 0.625
    """Of a batch; what is planted or labelled against what is normal."""
    learning_rate: float = 1.5e-3
    final_share: float = 0.02
    """Of the learning rate, where the cosine ends."""
    warm_up_steps: int = 20
    weight_decay: float = 1e-2
    clip: float = 1.0
    average: float = 0.99
    """Of the weights over the steps, exponential; the averaged ones are what training leaves."""
    seed: int = 1


class Samples(NamedTuple):
    """Cached evidence of n images and the share of each cell that is defective."""

    evidence: NDArray[np.float16]
    """(n, D), see ``unpacked``."""
    cover: NDArray[np.uint8]
    """(n, side, side), 255 for a cell that is wholly defective."""


def cache_samples(
    evidence: Reads, pairs: Iterable[tuple[Image, Mask]], n: int, folder: Path, *, progress: Progress
) -> Samples:
    """Write the evidence of n images and their masks to ``folder`` and map them.

    Args:
        evidence: trunk and form.
        pairs: images (S, S) uint8 at the branch's input size and masks (S, S) bool.
        n: how many there are, exactly.
        folder: reused if what it holds is whole and has the right shape.
        progress: called after every image.
    """
    form = evidence.form
    shape = (n, sum(math.prod(part) for part in form.shapes))
    evidence_path, cover_path = folder / "evidence.npy", folder / "cover.npy"
    if (found := _mapped(evidence_path, cover_path, shape)) is not None:
        return found
    files.make_folder(folder)
    partial = files.temporary(evidence_path)
    cache = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    cover = np.zeros((n, form.side, form.side), np.uint8)
    for index, (image, mask) in zip(range(n), _one_ahead(pairs), strict=True):
        cache[index] = _row(evidence, image)
        cover[index] = np.rint(cover_of(mask, (form.side, form.side)) * 255)
        progress("evidence", index + 1, n)
    cache.flush()
    with files.writing(cover_path) as file:
        np.save(file, cover)
    files.place(partial, evidence_path)  # last: it says that both are whole
    return Samples(np.load(evidence_path, mmap_mode="r"), cover)


def _one_ahead(items: Iterable[tuple[Image, Mask]]) -> Iterator[tuple[Image, Mask]]:
    """Draw each item in a thread while the one before it is used: rendering keeps one core busy, the trunk several."""
    left = iter(items)
    with ThreadPoolExecutor(max_workers=1) as pool:
        drawn = pool.submit(next, left, None)
        while (item := drawn.result()) is not None:
            drawn = pool.submit(next, left, None)
            yield item


def cover_of(mask: Mask, grid: tuple[int, ...]) -> NDArray[np.float32]:
    """Share of each cell of a grid (h, w) that a mask (H, W) covers."""
    share = cv2.resize(mask.astype(np.float32), (grid[1], grid[0]), interpolation=cv2.INTER_AREA)
    return np.asarray(share, np.float32)


def _row(evidence: Reads, image: Image) -> NDArray[np.float16]:
    device = next(evidence.trunk.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(image)[None]).to(device)
    # bf16 costs the trunk nothing measurable; matching takes small differences and stays in fp32.
    with torch.no_grad(), half_precision(device):
        maps = evidence.trunk(pixels, evidence.form.stages)
    with torch.no_grad():
        fine, middle, coarse = (found.float() for found in maps)
        parts = (fine, middle, coarse, evidence.matching(fine, middle, coarse))
    row: NDArray[np.float16] = torch.cat([part.flatten() for part in parts]).half().cpu().numpy()
    return row


def unpacked(rows: NDArray[np.float16], form: BranchForm) -> list[Tensor]:
    """Turn cached rows (B, D) back into what ``Evidence`` gave."""
    flat = torch.from_numpy(rows.astype(np.float32))
    parts = torch.split(flat, [math.prod(shape) for shape in form.shapes], dim=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, form.shapes, strict=True)]


def train_branch(
    branch: SegmentationBranch, samples: Samples, schedule: BranchSchedule, folder: Path, *, progress: Progress
) -> list[dict[str, float]]:
    """Train in place, from the last checkpoint in ``folder`` if there is one; returns one row per checkpoint.

    The rows also go to ``metrics.csv`` beside the checkpoint.

    Raises:
        ConfigError: the samples are all normal or all defective, hold values that are not finite, or the checkpoint
            belongs to another schedule, form or number of samples.
    """
    defective: NDArray[np.bool_] = np.asarray(samples.cover.any(axis=(1, 2)))
    if defective.all() or not defective.any():
        kind = "defective" if defective.all() else "normal"
        raise ConfigError(f"all {len(defective)} training images are {kind}; a segmentation branch needs both kinds")
    settings = {**asdict(schedule), "form": asdict(branch.form), "n_images": len(defective)}
    optimiser = torch.optim.AdamW(branch.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay)
    branch.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # half again as fast on a processor
    averaged = copy.deepcopy(branch)
    first, curve = _resume(folder / "checkpoint.pt", settings, branch, averaged, optimiser)
    sides = np.flatnonzero(defective), np.flatnonzero(~defective)
    losses, start = [], time.monotonic()
    branch.train()
    for step in range(first, schedule.steps):
        losses.append(_step(branch, samples, _picked(sides, schedule, step), schedule, optimiser, step))
        _average(averaged, branch, min(schedule.average, (step + 1) / (step + 10)))
        progress(f"branch, loss {losses[-1]:.3f}", step + 1, schedule.steps)
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == schedule.steps:
            seconds = time.monotonic() - start
            curve.append({"step": step + 1, "loss": float(np.mean(losses)), "seconds": seconds,
                          "eta_seconds": seconds / len(losses) * (schedule.steps - step - 1)})  # fmt: skip
            _checkpoint(folder, step + 1, curve, settings, branch, averaged, optimiser)
            losses, start = [], time.monotonic()
    branch.load_state_dict(averaged.state_dict())
    branch.eval()
    return curve


def _average(averaged: SegmentationBranch, branch: SegmentationBranch, keep: float) -> None:
    with torch.no_grad():
        for mean, value in zip(averaged.parameters(), branch.parameters(), strict=True):
            mean.lerp_(value, 1 - keep)


def rate(step: int, schedule: BranchSchedule) -> float:
    """Learning rate of a step: linear warm-up into a cosine."""
    warm = min(1.0, (step + 1) / schedule.warm_up_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
    return schedule.learning_rate * warm * (schedule.final_share + (1 - schedule.final_share) * cosine)


def _picked(sides: Sequence[NDArray[np.intp]], schedule: BranchSchedule, step: int) -> NDArray[np.intp]:
    """Draw a batch; by the step's own seed, so that a resumed run draws what an uninterrupted one does."""
    rng = np.random.default_rng([schedule.seed, step])
    n_defective = round(schedule.batch * schedule.defective_share)
    drawn = [rng.choice(side, n) for side, n in zip(sides, (n_defective, schedule.batch - n_defective), strict=True)]
    return np.sort(np.concatenate(drawn))


def _step(
    branch: SegmentationBranch,
    samples: Samples,
    picked: NDArray[np.intp],
    schedule: BranchSchedule,
    optimiser: torch.optim.Optimizer,
    step: int,
) -> float:
    for group in optimiser.param_groups:
        group["lr"] = rate(step, schedule)
    torch.manual_seed(schedule.seed * 1_000_003 + step)  # of the dropout
    device = next(branch.parameters()).device
    rows = unpacked(samples.evidence[picked], branch.form)
    parts = [part.to(device, memory_format=torch.channels_last) for part in rows]
    cover = torch.from_numpy(samples.cover[picked].astype(np.float32) / 255).to(device)
    with half_precision(device):
        logits = branch(*parts)
    loss = branch_loss(logits.float(), cover, top_cells=branch.form.top_cells)
    if not torch.isfinite(loss):
        raise ConfigError(f"the loss of step {step + 1} is not finite; the cached evidence is damaged, remove it")
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(branch.parameters(), schedule.clip)
    optimiser.step()
    return loss.item()


def _mapped(evidence_path: Path, cover_path: Path, shape: tuple[int, int]) -> Samples | None:
    try:
        found, cover = np.load(evidence_path, mmap_mode="r"), np.load(cover_path)
    except (FileNotFoundError, ValueError, EOFError):  # absent, foreign, cut off
        return None
    fits = found.shape == shape and found.dtype == np.float16 and len(cover) == shape[0]
    return Samples(found, cover) if fits else None


def _checkpoint(
    folder: Path,
    step: int,
    curve: list[dict[str, float]],
    settings: dict[str, Any],
    branch: SegmentationBranch,
    averaged: SegmentationBranch,
    optimiser: torch.optim.Optimizer,
) -> None:
    state = {"step": step, "curve": curve, "optimiser": optimiser.state_dict()}
    state |= {"branch": branch.state_dict(), "averaged": averaged.state_dict()}
    checkpoint.write(folder / "checkpoint.pt", settings, state)
    checkpoint.write_curve(curve, folder / "metrics.csv")


def _resume(
    path: Path,
    settings: dict[str, Any],
    branch: SegmentationBranch,
    averaged: SegmentationBranch,
    optimiser: torch.optim.Optimizer,
) -> tuple[int, list[dict[str, float]]]:
    if (state := checkpoint.read(path, settings)) is None:
        return 0, []
    branch.load_state_dict(state["branch"])
    averaged.load_state_dict(state["averaged"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"]), list(state["curve"])
