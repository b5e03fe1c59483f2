"""Views of defect crops, with the frozen layers' work on them done once and kept on disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.system import files
from semwatch_training.data.augment import Augmentation, augment
from semwatch_training.families.smg_vit.smg_vit import SmgVit
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks.vit import IMAGENET_MEAN, IMAGENET_STD, normalise


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """What the frozen layers made of V views of each of n crops."""

    tokens: NDArray[np.float16]
    """(n, V, T, C) after the last frozen layer; mapped from disk."""
    soft_masks: NDArray[np.float32]
    """(n, V, t, t)."""
    fingerprint: str
    """Of the views and of the frozen layers."""
    frozen_fingerprint: str
    """Of the frozen layers alone."""


def cache_views(
    vit: SmgVit,
    crops: NDArray[np.uint8],
    soft_masks: NDArray[np.float32],
    folder: Path,
    *,
    n_views: int = 2,
    augmentation: Augmentation | None = None,
    side_px: int | None = None,
    seed: int = 1,
    batch: int = 8,
    progress: Progress,
) -> Views:
    """Make views of crops and run the frozen layers over each once; a whole cache of the same content is reused.

    Size on disk: n * V * T * C * 2 bytes, 0.2 MB per view of 224 px with the default trunk.

    Args:
        vit: whose frozen layers to run; on the device it is on.
        crops: (n, S, S) gray.
        soft_masks: (n, t, t) in [0, 1].
        folder: where the cache is kept.
        n_views: V.
        augmentation: how views differ from the crop; the default one.
        side_px: of a view, the encoder's input by default; smaller ones are DINO's local views.
        seed: of the augmentation; each crop has its own stream, so that adding crops leaves the others' views alone.
        batch: views at a time.
        progress: called after every batch.

    Raises:
        ConfigError: no crops, another number of masks than of crops, a side that the patches do not divide, or see
            ``augment``.
    """
    if len(crops) == 0 or len(crops) != len(soft_masks):
        raise ConfigError(
            f"{len(crops)} crops and {len(soft_masks)} soft masks: give at least one crop, a mask for each"
        )
    side_px = side_px or vit.form.input_px
    side, rest = divmod(side_px, vit.trunk.shape.patch)
    if rest or n_views < 1:
        raise ConfigError(
            f"{n_views} views of {side_px} px: give 1 or more, of a multiple of {vit.trunk.shape.patch} px"
        )
    made = [
        augment(crop, mask, augmentation or Augmentation(), rng, side_px=side_px, tokens=side)
        for index, (crop, mask) in enumerate(zip(crops, soft_masks, strict=True))
        for rng in [np.random.default_rng((seed, index))]
        for _ in range(n_views)
    ]
    pixels, masks = np.stack([view for view, _ in made]), np.stack([mask for _, mask in made])
    frozen = frozen_fingerprint(vit)
    fingerprint = hashlib.sha256(frozen.encode() + pixels.tobytes() + masks.tobytes()).hexdigest()
    shape = (len(made), side * side + vit.trunk.n_prefix, vit.trunk.shape.width)
    path = folder / f"views-{fingerprint[:16]}.npy"
    tokens = _mapped(path, shape)
    if tokens is None:
        tokens = _run_frozen(vit, pixels, path, shape, batch, progress)
    return Views(
        tokens.reshape(len(crops), n_views, *shape[1:]),
        masks.reshape(len(crops), n_views, side, side),
        fingerprint,
        frozen,
    )


def frozen_fingerprint(vit: SmgVit) -> str:
    """SHA-256 of the weights before the guided layers; equal for encoders whose frozen layers compute the same."""
    digest = hashlib.sha256(str(vit.n_frozen).encode())
    later = tuple(f"blocks.{index}." for index in range(vit.n_frozen, vit.trunk.shape.depth))
    for name, value in sorted(vit.trunk.state_dict().items()):
        if not name.startswith((*later, "norm.", "mask_token")):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _run_frozen(
    vit: SmgVit, pixels: NDArray[np.uint8], path: Path, shape: tuple[int, ...], batch: int, progress: Progress
) -> NDArray[np.float16]:
    files.make_folder(path.parent)
    partial = files.temporary(path)
    cache = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    device = vit.guided.scale.device
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for first in range(0, len(pixels), batch):
        images = normalise(torch.from_numpy(pixels[first : first + batch]).to(device), mean, std)
        with torch.no_grad():
            cache[first : first + batch] = vit.frozen(images)[0].half().cpu().numpy()
        progress("views", min(first + batch, len(pixels)), len(pixels))
    cache.flush()
    files.place(partial, path)
    found: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return found


def _mapped(path: Path, shape: tuple[int, ...]) -> NDArray[np.float16] | None:
    try:
        found: NDArray[np.float16] = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):  # absent, cut off
        return None
    return found if found.shape == shape and found.dtype == np.float16 else None
