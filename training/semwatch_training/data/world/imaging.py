"""The microscope: from heights and tones to gray levels without noise, then noise and what files do to a picture.

Everything random is drawn once into ``Optics``, so that a specimen and its defective twin are imaged alike.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.data.pseudo_defects import Image, Plane, Rng, log_uniform, noise
from semwatch_training.data.world.defects import Specimen

EIGHT_BIT = (0.0, 255.0)


@dataclass(frozen=True, slots=True)
class Optics:
    """One setting of one microscope, and the noise of one picture.

    Attributes:
        blur_xy: of the beam, px; unequal with astigmatism.
        material: weight of the tones.
        edges: weight of bright edges.
        bloom: weight of the wide glow around them.
        side: weight and direction (x, y) of shading by a detector at one side.
        shadow: how much darker a place is whose surroundings are higher.
        depth_px: of that shadow.
        levels: gray at the median, and from the first to the last percentile.
        gamma: of the display.
        negative: whether it is inverted.
        shading: (H, W) added, gray levels.
        charging: weight of streaks along the scan behind bright edges.
        noise_levels: standard deviation at mid-gray.
        gain: range [0, 1], how far the noise grows with the signal.
        noise: (H, W), unit variance.
    """

    blur_xy: tuple[float, float]
    material: float
    edges: float
    bloom: float
    side: tuple[float, float]
    shadow: float
    depth_px: float
    levels: tuple[float, float]
    gamma: float
    negative: bool
    shading: Plane
    charging: float
    noise_levels: float
    gain: float
    noise: Plane


def optics(rng: Rng, size_hw: tuple[int, int], *, width_px: float, flat: bool) -> Optics:
    """Draw a microscope for a field.

    Args:
        rng: its state says which.
        size_hw: of the field, px.
        width_px: of its features; the beam is narrower than these.
        flat: whether there is little to see: then contrast is not stretched.
    """
    H, W = size_hw
    blur = min(log_uniform(rng, 0.35, 3.0), max(0.4, 0.3 * width_px))
    stretch = rng.uniform(0.6, 1.6) if rng.random() < 0.25 else 1.0
    look = rng.random()  # flat material contrast, edges alone, or both
    material, edges = (1.0, rng.uniform(0, 0.25)) if look < 0.3 else (rng.uniform(0.1, 0.8), rng.uniform(0.4, 1.6))
    if look > 0.85:
        material = rng.uniform(0, 0.15)
    angle, side = rng.uniform(0, 2 * np.pi), rng.choice((0.0, 1.0), p=(0.6, 0.4)) * rng.uniform(0.2, 1.2)
    span = rng.uniform(30, 220) if not flat else rng.uniform(15, 90)
    shading = rng.uniform(0, 10) * _plain(noise(rng, size_hw, max(H, W) * rng.uniform(0.3, 1.2)))
    if rng.random() < 0.15:
        shading = shading + np.float32(rng.uniform(0, 7)) * noise(rng, (H, 2), rng.uniform(1, 20))[:, :1]
    if rng.random() < 0.25:  # one way across the field, or toward its rim
        y, x = np.linspace(-1, 1, H, dtype=np.float32)[:, None], np.linspace(-1, 1, W, dtype=np.float32)[None]
        shading = shading + rng.uniform(-20, 20) * (rng.uniform(-1, 1) * x + rng.uniform(-1, 1) * y)
        shading = shading - rng.uniform(0, 20) * (x * x + y * y)
    grain = rng.standard_normal(size_hw, dtype=np.float32)
    if rng.random() < 0.35:
        smooth = cv2.GaussianBlur(grain, (0, 0), rng.uniform(0.4, 0.9))
        grain = np.asarray(smooth / (smooth.std() + 1e-6), np.float32)
    if rng.random() < 0.08:  # traces of retouching: noise smoothed away in a patch, which is no defect
        y0, x0 = int(rng.integers(0, H)), int(rng.integers(0, W))
        patch = (slice(y0, y0 + H // int(rng.integers(4, 20))), slice(x0, x0 + W // int(rng.integers(4, 20))))
        grain[patch] *= np.float32(rng.uniform(0.3, 0.8))
    return Optics(
        blur_xy=(blur * stretch, blur / stretch),
        material=material,
        edges=edges,
        bloom=float(rng.choice((0.0, 1.0)) * rng.uniform(0.1, 0.6)),
        side=(side * float(np.cos(angle)), side * float(np.sin(angle))),
        shadow=float(rng.choice((0.0, 1.0)) * rng.uniform(0.1, 0.6)),
        depth_px=float(np.clip(width_px * rng.uniform(0.5, 2), 1, 14)),
        levels=(rng.uniform(60, 175), span),
        gamma=float(np.exp(rng.normal(0, 0.2))),
        negative=bool(rng.random() < 0.07),
        shading=np.asarray(shading, np.float32),
        charging=float(rng.random() < 0.12) * rng.uniform(0.2, 1.0),
        noise_levels=min(log_uniform(rng, 0.6, 30), 0.5 * span),
        gain=rng.uniform(0, 1),
        noise=np.asarray(grain, np.float32),
    )


def _plain(field: Plane) -> Plane:
    return np.asarray(field - field.mean(), np.float32)


def signal(specimen: Specimen, beam: Optics) -> Plane:
    """What the detector collects from a specimen (H, W), of no unit, without noise."""
    sigma_x, sigma_y = beam.blur_xy
    tone = cv2.GaussianBlur(specimen.tone, (0, 0), sigma_x, sigmaY=sigma_y)
    height = cv2.GaussianBlur(specimen.height, (0, 0), sigma_x, sigmaY=sigma_y)
    reach = float(np.float32(0.4 + 1.2 * (sigma_x + sigma_y) / 2))  # an edge of one step is then about one high
    dx = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=reach / 8)
    dy = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=reach / 8)
    rim = cv2.magnitude(dx, dy)
    found = beam.material * tone + beam.edges * rim
    if beam.side != (0.0, 0.0):
        found += beam.side[0] * dx + beam.side[1] * dy
    if beam.bloom:
        found += (beam.bloom * beam.edges) * cv2.blur(cv2.blur(rim, (7, 7)), (7, 7))
    if beam.shadow:
        side = 2 * round(beam.depth_px) + 1
        found += beam.shadow * np.minimum(height - cv2.blur(cv2.blur(height, (side, side)), (side, side)), 0)
    if beam.charging:
        found -= beam.charging * cv2.blur(rim, (61, 1), anchor=(60, 0))
    if specimen.blurred is not None:
        found += specimen.blurred * (cv2.GaussianBlur(found, (0, 0), 3 + 2 * sigma_x) - found)
    return np.asarray(found, np.float32)


def exposure(found: Plane, beam: Optics, *, flat: bool) -> tuple[float, float]:
    """Offset and gain that bring a signal (H, W) to the microscope's gray levels; take those of the normal twin."""
    sample = found[::3, ::3]
    low, middle, high = np.percentile(sample, (1, 50, 99))
    return float(middle), beam.levels[1] / max(float(high - low), 0.5 if flat else 0.15)


def levels(found: Plane, beam: Optics, exposed: tuple[float, float]) -> Plane:
    """Gray levels (H, W) float32 without noise, clipped to eight bits."""
    gray = np.clip(beam.levels[0] + exposed[1] * (found - exposed[0]) + beam.shading, *EIGHT_BIT)
    gray = np.asarray(255 * (gray / 255) ** np.float32(beam.gamma), np.float32)
    return 255 - gray if beam.negative else gray


def deviation(gray: Plane, beam: Optics) -> Plane:
    """Standard deviation of the noise (H, W) at gray levels (H, W): from the same everywhere to that of counting."""
    share = gray / 128 if not beam.negative else (255 - gray) / 128
    return np.asarray(beam.noise_levels * np.sqrt(1 - beam.gain + beam.gain * (0.05 + share)), np.float32)


def exposed_image(gray: Plane, beam: Optics) -> Image:
    """Add the noise of the picture to gray levels (H, W): (H, W) uint8."""
    return np.clip(np.rint(gray + deviation(gray, beam) * beam.noise), *EIGHT_BIT).astype(np.uint8)


# ---- what files do to a picture ----


@dataclass(frozen=True, slots=True)
class Filing:
    """How a picture was kept: its frame, what was written on it, quantisation, JPEG.

    Attributes:
        frame: (H, W) bool: no picture there.
        frame_levels: (H, W) uint8: what is there instead.
        step: gray levels between two that occur.
        quality: of JPEG; 0 for none.
    """

    frame: NDArray[np.bool_]
    frame_levels: Image
    step: int
    quality: int


def filing(rng: Rng, size_hw: tuple[int, int]) -> Filing:
    """Draw how a picture of (H, W) was kept; most have no frame."""
    H, W = size_hw
    frame, written = np.zeros(size_hw, np.uint8), np.zeros(size_hw, np.uint8)
    way = rng.random()
    level = int(rng.choice((0, 0, 255, 255, int(rng.integers(0, 256)))))
    if way < 0.14:  # a rim at one side or more
        written[:] = level
        depths = np.where(rng.random(4) < 0.5, rng.uniform(0, 0.05, 4) * min(H, W) + 1, 0).astype(int)
        frame[:] = 1
        frame[depths[0] : H - depths[1], depths[2] : W - depths[3]] = 0
        if rng.random() < 0.3:  # soft
            written = np.asarray(cv2.GaussianBlur(written, (0, 0), 2), np.uint8)
    elif way < 0.17:  # turned within a frame
        written[:] = level
        frame[:] = 1
        box = ((W / 2, H / 2), (W * rng.uniform(0.85, 1.0), H * rng.uniform(0.85, 1.0)), float(rng.uniform(-8, 8)))
        cv2.fillConvexPoly(frame, np.rint(cv2.boxPoints(box)).astype(np.int32), 0)
    elif way < 0.24:  # something written on it, or a box that covers what was
        height, width = round(H * rng.uniform(0.05, 0.12)), round(W * rng.uniform(0.12, 0.35))
        y, x = (int(rng.choice((2, n - m - 2))) for n, m in ((H, height), (W, width)))
        boxed = rng.random() < 0.7
        if boxed:
            frame[y : y + height, x : x + width] = 1
            written[y : y + height, x : x + width] = level
        if rng.random() < 0.6:
            text = str(rng.choice(("200nm", "1 um", "2um", "(a)", "x50k", "500 nm")))
            at, size = (x + 2, y + round(0.8 * height)), height / 32
            ink = np.zeros(size_hw, np.uint8)
            cv2.putText(ink, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, 1, max(1, round(size)))
            frame |= ink
            written[ink > 0] = 255 - level if boxed else 255
    return Filing(
        frame.astype(bool),
        np.asarray(written, np.uint8),
        int(rng.choice((1, 4, 8), p=(0.9, 0.06, 0.04))),
        int(rng.integers(25, 95)) if rng.random() < 0.35 else 0,
    )


def filed(image: Image, kept: Filing) -> Image:
    """Frame, quantise and compress a picture (H, W) uint8."""
    result = np.where(kept.frame, kept.frame_levels, image)
    if kept.step > 1:
        result = (result // kept.step * kept.step).astype(np.uint8)
    if kept.quality:
        _, packed = cv2.imencode(".jpg", result, (cv2.IMWRITE_JPEG_QUALITY, kept.quality))
        result = np.asarray(cv2.imdecode(packed, cv2.IMREAD_GRAYSCALE), np.uint8)
    return result
