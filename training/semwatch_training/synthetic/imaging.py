"""What the microscope makes of a specimen: secondary-electron signal, scan, charging, noise, gray levels."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.synthetic.specimen import Image, Rng, Specimen, Window, blur, compose, smooth_noise

FULL = (slice(None), slice(None))
_SCAN_REACH_PX = 24
"""Beam tails, drift and jitter together stay within this."""


@dataclass(frozen=True, slots=True)
class Optics:
    """One microscope setting; lengths in pixels."""

    bloom_px: float
    edge_gain: float
    """Strength of edge brightening, relative to the yield of a flat face."""
    bloom_gain: float
    shadow_gain: float
    detector_rad: float
    """Direction the detector looks from."""
    spot_px: tuple[float, float]
    """Gaussian beam width along x and y."""
    jitter_px: float
    drift_px: float
    hum_px: float
    charging: float
    gradient: tuple[float, float]
    low: float
    high: float
    """Gray levels of the dark and the bright end of the field, range [0, 1]."""
    dose: float
    """Electrons detected per pixel at full white."""
    read_noise: float


def draw_optics(rng: Rng, size_hw: tuple[int, int]) -> Optics:
    """Draw a microscope setting of the ordinary spread."""
    unit = min(max(min(size_hw) / 512, 0.35), 2.0)
    focus = abs(rng.normal(0.0, 0.5)) + 0.55
    astigmatism = rng.normal(0.0, 0.12)
    mid, span = rng.uniform(0.4, 0.52), rng.uniform(0.45, 0.7)
    return Optics(
        bloom_px=unit * rng.uniform(2.0, 4.5),
        edge_gain=rng.uniform(0.3, 0.65),
        bloom_gain=rng.uniform(0.04, 0.11) / unit,
        shadow_gain=rng.uniform(0.03, 0.12),
        detector_rad=rng.uniform(0, 2 * math.pi),
        spot_px=(unit * focus * (1 + astigmatism), unit * focus * (1 - astigmatism)),
        jitter_px=abs(rng.normal(0.0, 0.2)),
        drift_px=float(np.clip(rng.normal(0.0, 1.5), -3, 3)) * unit,
        hum_px=max(rng.normal(-0.1, 0.3), 0.0),
        charging=max(rng.normal(0.2, 0.5), 0.0),
        gradient=(rng.normal(0.0, 0.025), rng.normal(0.0, 0.025)),
        low=max(mid - span / 2, 0.05),
        high=min(mid + span / 2, 0.92),
        dose=math.exp(rng.uniform(math.log(40), math.log(500))),
        read_noise=rng.uniform(0.005, 0.02),
    )


def reach_px(optics: Optics) -> int:
    """How far a change of the specimen can be seen in the signal."""
    return math.ceil(9 * optics.bloom_px) + 4


def secondary_electrons(specimen: Specimen, optics: Optics, window: Window = FULL) -> Image:
    """Compute the signal before the scan: yield of material and tilt, bloom of edges, shadow of trenches.

    Source: Reimer, Scanning Electron Microscopy, ch. 4 (yield ~ 1 / cos of the tilt); the diffusion of electrons out
    of edges is approximated by the height above its own blurred neighbourhood.
    """
    height, gray = compose(specimen, window)
    dx = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    dy = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=0.125)
    tilt = np.sqrt(1 + dx * dx + dy * dy) - 1
    tilt /= 1 + np.float32(0.9) * tilt
    near = height - blur(height, optics.bloom_px)
    below = np.maximum(blur(height, 3 * optics.bloom_px) - height, 0)
    signal = gray * np.exp(np.float32(-0.9 * optics.bloom_gain) * below)
    signal *= np.clip(1 + np.float32(2 * optics.bloom_gain) * near, 0.35, 2.2)
    signal += np.float32(optics.edge_gain) * tilt
    shade = math.cos(optics.detector_rad) * dx + math.sin(optics.detector_rad) * dy
    signal += np.float32(optics.shadow_gain) * shade / (1 + np.abs(shade))
    return np.asarray(signal, np.float32)


def scan_maps(rng: Rng, size_hw: tuple[int, int], optics: Optics) -> tuple[Image, Image]:
    """Draw where each pixel was really taken: (H, W) x and y, with line jitter, mains hum and drift."""
    rows = np.arange(size_hw[0], dtype=np.float32)
    progress = rows / size_hw[0]
    jitter = rng.standard_normal(size_hw[0]).astype(np.float32) * np.float32(optics.jitter_px)
    hum = np.float32(optics.hum_px) * np.sin(rows * np.float32(rng.uniform(0.3, 2.5)) + np.float32(rng.uniform(0, 6)))
    drift = np.float32(optics.drift_px) * (progress - 0.5) * (1 + progress)
    shift_x = (jitter + hum + drift)[:, None]
    shift_y = (np.float32(rng.normal(0, 0.8)) * (progress - 0.5) ** 2)[:, None]
    map_x = np.arange(size_hw[1], dtype=np.float32)[None, :] + shift_x
    map_y = np.broadcast_to(rows[:, None] + shift_y, size_hw)
    return np.ascontiguousarray(map_x, np.float32), np.ascontiguousarray(map_y, np.float32)


def scan(signal: Image, maps: tuple[Image, Image], optics: Optics, window: Window = FULL) -> Image:
    """Sweep the beam over the signal: finite spot, then the distortion of the scan. Only a window of it, if asked."""
    rows, columns = grow(window, _SCAN_REACH_PX, signal.shape)
    sharp = cv2.GaussianBlur(signal[rows, columns], (0, 0), sigmaX=optics.spot_px[0], sigmaY=optics.spot_px[1])
    map_x, map_y = maps[0][window] - np.float32(columns.start), maps[1][window] - np.float32(rows.start)
    return np.asarray(cv2.remap(sharp, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.float32)


def grow(window: Window, by_px: int, size_hw: tuple[int, ...]) -> Window:
    """Widen a window on all sides, cut to the field."""
    parts = [part.indices(side)[:2] for part, side in zip(window, size_hw, strict=True)]
    rows, columns = (slice(max(a - by_px, 0), min(b + by_px, n)) for (a, b), n in zip(parts, size_hw, strict=True))
    return rows, columns


def illumination(rng: Rng, scanned: Image, optics: Optics) -> tuple[Image, Image]:
    """Draw gain and offset of the field, both (H, W): charging, gradient, and unsteady rows.

    Charging follows the clean field: insulating stretches behind bright features read dark along the fast axis.
    """
    height, width = scanned.shape
    gain = 1 + np.float32(optics.gradient[0]) * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    gain = gain + np.float32(optics.gradient[1]) * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    gain = gain + np.float32(0.006) * rng.standard_normal((height, 1), dtype=np.float32)
    clouds = smooth_noise(rng, (height, width), 0.4 * min(height, width))
    gain = gain + np.float32(0.012 * min(optics.charging, 1.0)) * clouds
    tail = np.exp(-np.arange(64, dtype=np.float32) / 16)
    kernel = np.concatenate([tail[::-1], np.zeros(63, np.float32)])[None, :] / tail.sum()
    small = cv2.resize(scanned, (max(width // 4, 1), height), interpolation=cv2.INTER_AREA)
    streaks = cv2.filter2D(small - small.mean(), cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT)
    streaks = cv2.resize(streaks, (width, height), interpolation=cv2.INTER_LINEAR)
    bands = smooth_noise(rng, (height, 1), 3.0)
    offset = np.float32(-0.25 * optics.charging) * streaks + np.float32(0.012 * optics.charging) * bands
    return np.asarray(gain, np.float32), np.asarray(offset, np.float32)


def gray_scale(scanned: Image, optics: Optics) -> tuple[float, float]:
    """Choose the contrast and brightness an operator would, as scale and offset from signal to [0, 1]."""
    dark, bright = np.percentile(scanned[::3, ::3], [2.0, 97.0])
    scale = (optics.high - optics.low) / max(float(bright - dark), 0.16)
    return scale, (optics.low + optics.high) / 2 - scale * float(dark + bright) / 2


def expose(scanned: Image, scale: float, offset: float) -> Image:
    """Map signal to [0, 1] the way a detector does: straight in the middle, bending before black and white."""
    level = scanned * np.float32(scale) + np.float32(offset)
    knee = level > np.float32(0.8)
    level[knee] = np.float32(0.8) + np.float32(0.2) * np.tanh(5 * (level[knee] - np.float32(0.8)))
    toe = level < np.float32(0.1)
    level[toe] = np.float32(0.1) - np.float32(0.08) * np.tanh(12 * (np.float32(0.1) - level[toe]))
    return np.asarray(level, np.float32)


def noise_variance(level: float, optics: Optics) -> float:
    """Return the variance that ``detect`` gives to a level in [0, 1]."""
    return level / optics.dose + optics.read_noise**2


def detect(ideal: Image, rng: Rng, optics: Optics) -> NDArray[np.uint8]:
    """Count electrons: shot noise, read noise, 8 bits.

    The Anscombe form turns one field of normals into nearly Poisson counts, so that a clean field and its defective
    twin share their noise pixel by pixel.
    """
    normal = rng.standard_normal(ideal.shape, dtype=np.float32)
    root = np.sqrt(np.maximum(ideal, 0) * np.float32(optics.dose)) + np.float32(0.5) * normal
    counted = root * root * np.float32(1 / optics.dose)
    counted += np.float32(optics.read_noise) * np.roll(normal, 17, axis=1)
    return np.asarray(np.clip(counted * 255 + 0.5, 0, 255), np.uint8)
