"""The nouns of the line: micrograph, score map, defect, verdict, review. All frozen, all plain data.

Frames: *micrograph frame* = pixels of the page as read, origin top left. *Field frame* = the part of the page inside
``Micrograph.field_xyxy`` (the page without its info bars). Boxes are integer, half-open ``(x0, y0, x1, y1)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
"""Half-open pixel box ``(x0, y0, x1, y1)``."""

VerdictKind = Literal["known", "novel", "unknown", "non-decidable", "defect-free"]
"""``novel``: of a class that was found among unknowns and that no person has named yet."""

Domain = Literal["known process", "unknown process", "not judged"]
"""Whether a field looks like those of the processes whose normal images the detector knows; ``not judged``: this
detector cannot say."""
GateSource = Literal["recipe", "detector", "stream", "reference"]
"""Where the gate's threshold came from: the recipe's own, the detector's normals, the stream's own scores, or the
recipe's limit of the difference from a reference."""

DEFECT_FREE = "defect-free"
"""Label of the class that every head carries beside its defect classes."""

QualityName = Literal["blank", "info-bar", "saturated", "faint", "defocus", "streaks", "drift"]
"""What can be wrong with a page, see ``intake.quality``. Of the first two there is no image at all."""

NO_IMAGE: Final = "no-image"
"""Verdict on a page that holds no image: no model was asked."""

NOVEL = "novel-"
"""How labels of found, not yet named classes begin: novel-1, novel-2, ..."""


@dataclass(frozen=True, slots=True, eq=False)
class Micrograph:
    """One page of an image file, as the detector wants it."""

    pixels: NDArray[np.uint8]
    """(H, W) gray, C-contiguous."""
    field_xyxy: Box
    """The field of view: the page without vendor info bars."""
    page: int
    """0-based page in its file."""
    pixel_nm: float | None
    """Edge of one pixel in nanometres, where the vendor's tags say it."""
    vendor: str | None
    """Whose tags were found: ``"FEI"``, ``"Zeiss"``; None where there are none."""

    @property
    def field(self) -> NDArray[np.uint8]:
        """The field of view, a view of shape (y1 - y0, x1 - x0) on ``pixels``."""
        x0, y0, x1, y1 = self.field_xyxy
        return self.pixels[y0:y1, x0:x1]


@dataclass(frozen=True, slots=True)
class QualityFlag:
    """One thing that is wrong with a page, with the figure that says so."""

    name: QualityName
    measure: float
    """In the flag's own unit, see ``intake.quality``."""
    limit: float
    """The recipe's limit that ``measure`` lies beyond."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What was seen of a page before any model looked at it."""

    flags: tuple[QualityFlag, ...] = ()
    is_image: bool = True
    """False: the page is blank or nothing but an info bar, and says nothing about the wafer."""

    @property
    def in_words(self) -> str:
        """What is wrong, in a line: ``defocus 4.2 (limit 3)``; empty where nothing is."""
        return ", ".join(f"{flag.name} {flag.measure:.3g} (limit {flag.limit:g})" for flag in self.flags)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreMap:
    """The detector's answer for one field."""

    values: NDArray[np.float32]
    """(h, w) at the detector's own grid, higher is more defective; covers the whole field. What the numbers mean is the
    detector's own matter; the gate compares them with those of normal images."""
    raw_score: float
    """Image score before any per-image normalisation; comparable between images."""
    domain_p: float | None = None
    """Conformal p-value in (0, 1] of the field among the normal fields of the processes that the detector knows; None:
    this detector cannot say."""
    field_features: NDArray[np.float32] | None = None
    """(D,) what the detector says of the whole field, for an encoder that asks; None where it says nothing of it."""
    patch_features: NDArray[np.float32] | None = None
    """(C, h, w) what it says of each place, at a grid of its own; as above."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What became of the reference of one page."""

    name: str
    """File name of the reference, or ``"page 1"`` of the same file."""
    reason: str
    """Why the page was judged without it, in plain words; empty where it was used."""
    shift_px: tuple[float, float] | None = None
    """A point (x, y) in the middle of the field lies in the reference's field at (x + dx, y + dy)."""
    correlation: float | None = None
    """Of the gradients of both after alignment, range [-1, 1]."""
    aligned: NDArray[np.uint8] | None = None
    """(H, W) the reference as the field sees it, with the field's gain and offset; None where it was not used."""
    overlap: NDArray[np.bool_] | None = None
    """(H, W) True where the field has a counterpart; the rest was not judged."""

    @property
    def used(self) -> bool:
        """The page was judged by its difference from the reference."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One class as seen from a defect."""

    label: str
    probability: float
    """The head's softmax probability, range [0, 1]."""
    p_value: float
    """Conformal p-value on frozen features, range (0, 1]: how ordinary this defect would be as a member."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the line says of one defect."""

    kind: VerdictKind
    label: str | None
    """Class name for ``known``, ``novel`` (novel-1, ...) and ``defect-free``; None otherwise."""
    confidence: float
    """Range [0, 1]: how much speaks for what the verdict claims, see ``classification.decide``."""
    nearest: tuple[Neighbour, ...]
    """The two nearest classes, nearest first (one where the head knows only one); by what, see
    ``classification.decide``."""


@dataclass(frozen=True, slots=True, eq=False)
class Defect:
    """One defect of one page."""

    defect_id: int
    """1-based within its page."""
    box_xyxy: Box
    """Micrograph frame."""
    area_px: int
    area_nm2: float | None
    peak_score: float
    """Largest score-map value inside the defect."""
    crop_xyxy: Box
    """Square window of the crop, micrograph frame; may reach outside the field, where the image is reflected."""
    crop: NDArray[np.uint8]
    """(S, S) gray, the window resized for the encoder."""
    soft_mask: NDArray[np.float32]
    """(t, t) in [0, 1] at the encoder's token grid, aligned with the crop."""
    features: NDArray[np.float32]
    """(D,) what the encoder says of crop and soft mask."""
    verdict: Verdict
    field_features: NDArray[np.float32] | None = None
    """What the encoder was told of the whole field, see ``ScoreMap``; None where it did not ask."""
    region_features: NDArray[np.float32] | None = None
    """(C,) what it was told of the defect's places: their ``ScoreMap.patch_features``, averaged; as above."""


@dataclass(frozen=True, slots=True, eq=False)
class PageReview:
    """Everything said of one page."""

    micrograph: Micrograph
    score_map: ScoreMap | None
    """None where the page holds no image."""
    gate_threshold: float
    """The page is searched for defects only if ``score_map.raw_score`` lies above it."""
    mask: NDArray[np.bool_]
    """(g, q) defect mask over the field at the working grid; all False where the gate stayed shut."""
    defects: tuple[Defect, ...]
    domain: Domain = "not judged"
    """What ``score_map.domain_p`` says by the recipe's significance."""
    quality: Quality = Quality()
    gate_source: GateSource = "detector"
    """Where ``gate_threshold`` came from."""
    reference: Reference | None = None
    """None where the recipe names no reference. Where it was used, score map and gate are of the difference."""


@dataclass(frozen=True, slots=True, eq=False)
class Review:
    """Everything said of one image file."""

    source: str
    """Name of the drop folder (the tool) the file came from."""
    path: str
    """POSIX path relative to the drop folder."""
    sha256: str
    """Of the file's content, hexadecimal."""
    reviewed_utc: str
    """ISO 8601 with seconds and ``Z``."""
    recipe_name: str
    recipe_id: str
    """Content hash of the recipe."""
    model_versions: Mapping[str, int]
    """Version that answered, by model: detector, encoder, head. Models that were not asked are absent."""
    pages: tuple[PageReview, ...]
    timings_ms: Mapping[str, float]
    """Milliseconds by stage, in the order of the line."""
    model_hashes: Mapping[str, str] = field(default_factory=dict)
    """Content hash of the version that answered, by model: the same model has the same on every machine."""
    site: str = ""
    """Name of the site, unique in the fab; empty where no site reviewed."""

    @property
    def n_defects(self) -> int:
        """Number of defects over all pages."""
        return sum(len(page.defects) for page in self.pages)
