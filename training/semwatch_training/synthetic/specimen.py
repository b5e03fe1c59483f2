"""The thing under the beam: a stack of layers, each with a coverage, a height and a material gray.

A pattern is *drawn* as hard polygons and then *printed* the way lithography does it: blurred (aerial image), perturbed
(line-edge roughness) and thresholded (resist). Rounded corners, correlated edges and pull-back come out by themselves.
Heights are in pixels, so that a slope of 1 is 45 degrees; grays are secondary-electron yields in [0, 1].
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
"""(H, W) float32."""

Rng = np.random.Generator

Window = tuple[slice, slice]
"""Rows and columns of a part of the image."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One material, lying over everything listed before it."""

    coverage: Image
    """(H, W) in [0, 1]."""
    height: float
    gray: float
    negative: bool = False
    """True where the material fills what the coverage leaves free (walls around drawn trenches)."""


@dataclass(frozen=True, slots=True, eq=False)
class Specimen:
    """A stack of named layers, bottom first, with relief and stain on top of it."""

    layers: dict[str, Layer]
    relief: Image
    """(H, W) px, added to the height of the stack: texture, particles, pits."""
    stain: Image
    """(H, W), added to the gray of the stack."""
    pitch: float
    """Period of the pattern in pixels; the grain size of a blanket film."""
    floor: float = 0.0
    """Height of what lies under all layers."""
    floor_gray: float = 0.35

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.relief.shape
        return height, width

    def editable(self) -> "Specimen":
        """Copy every array, so that a defect may write into them."""
        layers = {name: replace(layer, coverage=layer.coverage.copy()) for name, layer in self.layers.items()}
        return replace(self, layers=layers, relief=self.relief.copy(), stain=self.stain.copy())


def compose(specimen: Specimen, window: Window) -> tuple[Image, Image]:
    """Flatten the stack inside a window to its height (px) and its gray."""
    height = np.full_like(specimen.relief[window], specimen.floor)
    gray = np.full_like(height, specimen.floor_gray)
    for layer in specimen.layers.values():
        coverage = layer.coverage[window]
        if layer.negative:
            coverage = 1.0 - coverage
        height += coverage * (layer.height - height)
        gray += coverage * (layer.gray - gray)
    return height + specimen.relief[window], gray + specimen.stain[window]


def smooth_noise(rng: Rng, size_hw: tuple[int, int], correlation_px: float) -> Image:
    """Draw Gaussian noise of unit variance whose neighbours agree over about ``correlation_px``."""
    step = max(correlation_px, 1.0)
    coarse = rng.standard_normal([math.ceil(side / step) + 2 for side in size_hw], dtype=np.float32)
    size_wh = round(coarse.shape[1] * step), round(coarse.shape[0] * step)
    fine = cv2.resize(coarse, size_wh, interpolation=cv2.INTER_CUBIC)
    y0, x0 = (int(v) for v in rng.random(2) * step)
    part = fine[y0 : y0 + size_hw[0], x0 : x0 + size_hw[1]]
    return np.asarray(
        part * np.float32(1.25), dtype=np.float32
    )  # interpolation between draws costs a fifth of the spread


def blur(image: Image, sigma_px: float) -> Image:
    """Smooth with a Gaussian; wide ones run on a reduced copy, which looks the same and costs a tenth."""
    if sigma_px < 0.3:
        return image
    shrink = int(sigma_px / 2)
    if shrink < 2 or min(image.shape) < 8 * shrink:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma_px), dtype=np.float32)
    size_wh = (image.shape[1], image.shape[0])
    small = cv2.resize(image, (size_wh[0] // shrink, size_wh[1] // shrink), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma_px / shrink)
    return np.asarray(cv2.resize(small, size_wh, interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def print_pattern(drawn: NDArray[np.uint8], roughness: Image, *, corner_px: float, edge_px: float) -> Image:
    """Print a drawn pattern: round its corners, roughen its edges, give its walls a width.

    ``drawn`` is (H, W) of 0 or 255; ``roughness`` the edge displacement in pixels. Returns coverage in [0, 1].
    """
    aerial = blur(drawn.astype(np.float32), corner_px) * np.float32(1 / 255)
    slope = 1.0 / (corner_px * np.sqrt(2 * np.pi))
    aerial += np.clip(roughness * np.float32(slope), -0.3, 0.3) - np.float32(0.5)
    aerial *= np.float32(1.0 / (slope * edge_px))
    aerial += np.float32(0.5)
    return np.asarray(np.clip(aerial, 0.0, 1.0, out=aerial), dtype=np.float32)
