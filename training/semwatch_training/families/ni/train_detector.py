"""Train a detector on normal images: cache frozen features once, then fit extractor, bottleneck and decoder on them.

Everything is resumable: the cache is reused where it fits, and a checkpoint is written after every epoch.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semwatch.errors import ConfigError
from semwatch.system import files
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.families.ni.ni_losses import normal_information_loss, plant_pseudo_defects, reconstruction_loss
from semwatch_training.system import checkpoint, weights_file
from semwatch_training.system.precision import half_precision
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import VisionTransformer


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a detector is trained. Parent's recipe where it gives one (AdamW 1e-3 to 1e-4 cosine, clip 0.1)."""

    epochs: int = 16
    batch: int = 8
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warm_up_steps: int = 40
    weight_decay: float = 1e-4
    clip: float = 0.1
    gamma: float = 3.0
    normal_weight: float = 0.2
    """lambda; the paper prints 20, its parent uses 0.2 for the same term."""
    features_per_image: int = 256
    """Features rebuilt of each image and step. Each is rebuilt by itself, so a random subset gives the same expected
    gradient at a quarter of the cost; the normal tokens are gathered from all of them."""
    pseudo_defects: bool = False
    """The paper's pseudo-defects on features; the parent has none."""
    seed: int = 1


def cache_features(
    graph: DetectorGraph, images: Iterable[NDArray[np.uint8]], n: int, path: Path, *, progress: Progress
) -> NDArray[np.float16]:
    """Write grouped trunk features of n images to ``path`` and map them: (n, G, N, C) fp16.

    Args:
        graph: trunk and form.
        images: (S, S) uint8, already at the detector's input size.
        n: how many there are, exactly.
        path: ``.npy``; reused if it is whole and has the right shape.
        progress: called after every image.
    """
    form = graph.detector.form
    shape = (n, len(form.groups), (form.input_px // graph.trunk.shape.patch) ** 2, form.width)
    if (found := _mapped(path, shape)) is not None:
        return found
    files.make_folder(path.parent)
    partial = files.temporary(path)
    cache = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    device = next(graph.parameters()).device
    for index, image in zip(range(n), images, strict=True):
        with torch.no_grad():
            cache[index] = graph.features(torch.from_numpy(image[None]).to(device))[0].half().cpu().numpy()
        progress("features", index + 1, n)
    cache.flush()
    files.place(partial, path)
    features: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return features


def train(
    detector: NIDetector, features: NDArray[np.float16], schedule: Schedule, folder: Path, *, progress: Progress
) -> list[dict[str, float]]:
    """Train in place, from the last checkpoint in ``folder`` if there is one; returns one row of losses per epoch.

    The rows also go to ``metrics.csv`` beside the checkpoint. A detector of the branch alone has nothing to train here.

    Raises:
        ConfigError: the checkpoint belongs to another schedule, form or number of images, or there is no full batch.
    """
    if len(features) < schedule.batch:
        raise ConfigError(f"{len(features)} training images are fewer than a batch of {schedule.batch}; lower --batch")
    device = next(detector.parameters()).device
    settings = {**asdict(schedule), "form": asdict(detector.form), "n_images": len(features)}
    steps = schedule.epochs * (len(features) // schedule.batch)
    optimiser = torch.optim.AdamW(
        detector.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay, amsgrad=True
    )
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, steps, schedule))
    first_epoch, curve = _resume(folder / "checkpoint.pt", settings, detector, optimiser, warm)
    side = math.isqrt(features.shape[2])
    for epoch in range(first_epoch, schedule.epochs):
        detector.train()
        generator = torch.Generator().manual_seed(schedule.seed * 1000 + epoch)
        losses, start = [], time.monotonic()
        for step, clean in enumerate(_batches(features, schedule.batch, generator)):
            losses.append(_step(detector, clean.to(device), schedule, optimiser, (side, side), generator))
            warm.step()
            progress(f"epoch {epoch + 1}/{schedule.epochs}, loss {losses[-1][0]:.4f}",
                     epoch * (len(features) // schedule.batch) + step + 1, steps)  # fmt: skip
        reconstruction, normal = np.mean(losses, axis=0)
        curve.append(
            {
                "epoch": epoch + 1,
                "reconstruction_loss": float(reconstruction),
                "normal_loss": float(normal),
                "seconds": (seconds := time.monotonic() - start),
                "eta_seconds": seconds * (schedule.epochs - epoch - 1),
            }
        )
        _checkpoint(folder / "checkpoint.pt", epoch + 1, curve, settings, detector, optimiser, warm)
        checkpoint.write_curve(curve, folder / "metrics.csv")
    return curve


def rate_factor(step: int, steps: int, schedule: Schedule) -> float:
    """Learning-rate factor: linear warm-up, then cosine to the final rate."""
    if step < schedule.warm_up_steps:
        return (step + 1) / schedule.warm_up_steps
    done = (step - schedule.warm_up_steps) / max(1, steps - schedule.warm_up_steps)
    floor = schedule.final_learning_rate / schedule.learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def raw_scores(graph: DetectorGraph, images: Iterable[NDArray[np.uint8]], n: int, *, progress: Progress) -> list[float]:
    """Raw image scores of images (S, S) uint8, one at a time."""
    device = next(graph.parameters()).device
    scores = []
    for index, image in enumerate(images):
        with torch.no_grad():
            scores.append(float(graph(torch.from_numpy(image[None]).to(device))[1][0]))
        progress("held-out normal scores", index + 1, n)
    return scores


def save(
    detector: NIDetector, path: Path, *, normal_scores: list[float], provenance: dict[str, str | float | int]
) -> None:
    """Write weights as fp16 safetensors with form, held-out scores and provenance in the header."""
    header = {
        "family": "ni",
        "form": json.dumps(asdict(detector.form)),
        "normal_scores": json.dumps(normal_scores),
        "provenance": json.dumps(provenance),
    }
    weights_file.write(path, {name: value.half() for name, value in detector.state_dict().items()}, header)


def load(path: Path) -> tuple[NIDetector, list[float], dict[str, str | float | int]]:
    """Read what ``save`` wrote: detector in fp32, held-out scores, provenance.

    Raises:
        ConfigError: the file is absent, not a detector, or one of another release.
    """
    state, header = weights_file.read(path, what="detector")
    try:
        values = json.loads(header["form"])
        detector = NIDetector(form_of(values))
        detector.load_state_dict(state, strict=True)
        return detector.eval(), json.loads(header["normal_scores"]), json.loads(header["provenance"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise weights_file.not_ours(path, "detector", error) from error


def form_of(values: Mapping[str, Any]) -> DetectorForm:
    """Build a form from what JSON makes of one.

    Raises:
        TypeError: it is no form.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"a form is a mapping, not {values!r}")
    branch = values.get("branch")
    if branch is not None:
        tuples = {key: tuple(value) for key, value in branch.items() if isinstance(value, list)}
        branch = BranchForm(**{**branch, **tuples})
    return DetectorForm(**{**values, "layers": tuple(values["layers"]), "branch": branch})


def with_trunk(
    trunk: VisionTransformer | None, detector: NIDetector, convolutional: EfficientNet | None = None
) -> DetectorGraph:
    """The exported graph in evaluation mode; see ``DetectorGraph`` for which trunks are needed."""
    return DetectorGraph(trunk, detector, convolutional).eval()


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.float16] | None:
    try:
        found: NDArray[np.float16] = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):  # absent, foreign, cut off
        return None
    return found if found.shape == shape and found.dtype == np.float16 else None


def _batches(features: NDArray[np.float16], batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(len(features), generator=generator).numpy()
    for start in range(0, len(order) - batch + 1, batch):
        yield torch.from_numpy(features[np.sort(order[start : start + batch])]).float()


def _step(
    detector: NIDetector,
    clean: Tensor,
    schedule: Schedule,
    optimiser: torch.optim.Optimizer,
    grid_hw: tuple[int, int],
    generator: torch.Generator,
) -> tuple[float, float]:
    seen, mask = clean, None
    if schedule.pseudo_defects:
        seen, mask = plant_pseudo_defects(clean, grid_hw, generator=generator)
    subset = torch.randperm(clean.shape[2], generator=generator)[: schedule.features_per_image].to(clean.device)
    with half_precision(clean.device):
        tokens = detector.normal_tokens(seen)
        rebuilt = detector.rebuild(seen[:, :, subset], tokens)
    # Losses in fp32: the cosine's small differences are what bf16 loses. The target stays clean (denoising).
    reconstruction = reconstruction_loss(clean[:, :, subset], rebuilt.float(), gamma=schedule.gamma)
    normal = normal_information_loss(seen, tokens.float(), mask)
    optimiser.zero_grad()
    (reconstruction + schedule.normal_weight * normal).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(detector.parameters(), schedule.clip)
    optimiser.step()
    return reconstruction.item(), normal.item()


def _checkpoint(
    path: Path,
    epoch: int,
    curve: list[dict[str, float]],
    settings: dict[str, Any],
    detector: NIDetector,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    state = {
        "epoch": epoch,
        "curve": curve,
        "detector": detector.state_dict(),
        "optimiser": optimiser.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    checkpoint.write(path, settings, state)


def _resume(
    path: Path,
    settings: dict[str, Any],
    detector: NIDetector,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[int, list[dict[str, float]]]:
    if (state := checkpoint.read(path, settings)) is None:
        return 0, []
    detector.load_state_dict(state["detector"])
    optimiser.load_state_dict(state["optimiser"])
    scheduler.load_state_dict(state["scheduler"])
    return int(state["epoch"]), list(state["curve"])
