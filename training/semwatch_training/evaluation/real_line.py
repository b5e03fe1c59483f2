"""Real images through the daemon's own line: what it says of each, and what its encoder makes of it.

Answers of the networks are kept on disk by the content of model and input, so that a second run, or one with another
gate, head or binarization, asks only what is new.
"""

import hashlib
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Defect, PageReview, VerdictKind
from semwatch.errors import ImageError
from semwatch.line import detection, inputs, pipeline
from semwatch.line.marked import given
from semwatch.line.pipeline import Candidate
from semwatch.models.inference import Answer, Embedded, ModelId
from semwatch.models.model_repository import Arrays
from semwatch.settings.recipe import Recipe
from semwatch.system import files
from semwatch_training.discovery import labelled_crops
from semwatch_training.evaluation.real_data import RealImage
from semwatch_training.system.progress_bars import Progress

OPEN_GATE = -1e30
"""Below every raw score, and still a number that a recipe's identity can hold."""
TIMED = 3
"""Answers that a time is the median of."""

SAVED_EVERY = 50
"""Images after which new answers are written, so that a run that is stopped goes on where it was."""

Passer = Literal["gate", "mask", "head"]


class KeptAnswers(Embedded):
    """The models in this process, which ask a network only what it has not answered before.

    Args:
        repository: folder with detector, encoder and head.
        kept: folder of answers, a file for each content of detector and encoder; None keeps them in memory alone.
        threads: processor threads of one network; None for all the machine has.
    """

    def __init__(self, repository: Path, kept: Path | None, *, threads: int | None = None) -> None:
        super().__init__(repository, threads=threads)
        self._answers: dict[str, dict[str, dict[str, NDArray[np.float32]]]] = {}
        self._paths = {}
        for model in ("detector", "encoder"):
            path = None if kept is None else kept / f"{model}-{self.hashes()[model][:16]}.npz"
            self._paths[model], self._answers[model] = path, _read(path)
        self._new: set[str] = set()

    def infer(self, model: str, inputs: Arrays, *, backlog: bool = False) -> Answer:
        """Ask a model about a batch; see ``Embedded.infer``."""
        if model not in self._answers:
            return super().infer(model, inputs, backlog=backlog)
        digest = hashlib.sha256()
        for name in sorted(inputs):
            digest.update(f"{name} {inputs[name].dtype} {inputs[name].shape} ".encode())
            digest.update(np.ascontiguousarray(inputs[name]).tobytes())
        key, known = digest.hexdigest()[:32], self._answers[model]
        if key not in known:
            known[key] = dict(super().infer(model, inputs, backlog=backlog).outputs)
            self._new.add(model)
        return Answer(known[key], ModelId(self.versions()[model], self.hashes()[model]), self.meta(model))

    def save(self) -> None:
        """Write what is new."""
        for model in self._new:
            if (path := self._paths[model]) is not None:
                _write(path, self._answers[model])
        self._new = set()

    def timed_ms(self, model: str, inputs: Arrays) -> float:
        """Median milliseconds of an answer that is not a kept one, after one to warm up."""
        super().infer(model, inputs)
        times = []
        for _ in range(TIMED):
            start = time.perf_counter()
            super().infer(model, inputs)
            times.append((time.perf_counter() - start) * 1000)
        return statistics.median(times)


def _read(path: Path | None) -> dict[str, dict[str, NDArray[np.float32]]]:
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    if path is None or not path.exists():
        return found
    with np.load(path, allow_pickle=False) as file:
        for entry in file.files:
            key, _, name = entry.partition("/")
            found.setdefault(key, {})[name] = file[entry]
    return found


def _write(path: Path, answers: dict[str, dict[str, NDArray[np.float32]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {f"{key}/{name}": values for key, outputs in answers.items() for name, values in outputs.items()}
    files.write_whole(path, _npz(entries))


def _npz(entries: dict[str, NDArray[np.float32]]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **entries)  # type: ignore[arg-type]  # names of arrays, not options
    return content.getvalue()


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One image, and what the line said of its first page."""

    image: RealImage
    page: PageReview | None
    """None: the line refused the image."""
    refused: str = ""
    """Why."""
    region_features: NDArray[np.float32] | None = None
    """(D,) of the crop of the best region, searched with an open gate."""
    field_features: NDArray[np.float32] | None = None
    """(D,) of the whole field as crop."""
    reference_page: PageReview | None = None
    """What the line said with the reference image at hand; None where there is none, or the line takes none."""

    @property
    def field(self) -> NDArray[np.uint8]:
        """(H, W) gray of a page that was not refused."""
        return self.reviewed.micrograph.field

    @property
    def reviewed(self) -> PageReview:
        """The page of an image that was not refused.

        Raises:
            ValueError: it was refused.
        """
        if self.page is None:
            raise ValueError(f"{self.image.name} was refused: {self.refused}")
        return self.page

    @property
    def truth(self) -> NDArray[np.bool_] | None:
        """(H, W) True on the defect, in the frame of the field; None where nobody drew it."""
        mask, page = self.image.mask, self.reviewed.micrograph
        if mask is None or mask.shape == page.field.shape:
            return mask
        x0, y0, x1, y1 = page.field_xyxy
        return mask[y0:y1, x0:x1] if mask.shape == page.pixels.shape else None

    @property
    def is_opened(self) -> bool:
        """Whether the gate let the page through."""
        return self.raw_score > self.reviewed.gate_threshold

    @property
    def raw_score(self) -> float:
        """Of the page; 0 where it holds no image and no detector was asked."""
        score_map = self.reviewed.score_map
        return 0.0 if score_map is None else score_map.raw_score

    @property
    def score_map(self) -> NDArray[np.float32]:
        """(h, w) of the page; one cell of 0 where it holds no image."""
        score_map = self.reviewed.score_map
        return np.zeros((1, 1), np.float32) if score_map is None else score_map.values

    @property
    def kinds(self) -> tuple[VerdictKind, ...]:
        """Of its regions."""
        return tuple(defect.verdict.kind for defect in self.reviewed.defects)

    @property
    def has_defect_verdict(self) -> bool:
        """Whether a region was called anything but defect-free."""
        return any(kind != "defect-free" for kind in self.kinds)


def look(
    images: Sequence[RealImage],
    recipe: Recipe,
    models: KeptAnswers,
    *,
    encode: Callable[[RealImage], bool],
    progress: Progress,
) -> list[Seen]:
    """Review every image as the daemon would; where ``encode`` says so, encode its best region and its whole field."""
    found = []
    for done, image in enumerate(images, start=1):
        found.append(_look(image, recipe, models, encode=encode(image)))
        if done % SAVED_EVERY == 0:
            models.save()
        progress("line", done, len(images))
    models.save()
    return found


def _look(image: RealImage, recipe: Recipe, models: KeptAnswers, *, encode: bool) -> Seen:
    try:
        page = _review(image, recipe, models)
        with_reference = _review_with_reference(image, recipe, models)
        if not encode:
            return Seen(image, page, reference_page=with_reference)
        region = _best_region(page, recipe, models)
        field = labelled_crops.encode(_whole_field(page, recipe, models), models)
        return Seen(image, page, "", region, field, with_reference)
    except ImageError as error:
        return Seen(image, None, str(error))


def _review(image: RealImage, recipe: Recipe, models: KeptAnswers, **more: Any) -> PageReview:
    return pipeline.review(
        image.content, source="real", path=image.name, sha256="", recipe=recipe, models=models, reviewed_utc="", **more
    ).pages[0]


def _review_with_reference(image: RealImage, recipe: Recipe, models: KeptAnswers) -> PageReview | None:
    """Review an image with its reference image at hand: the one place where the reference is handed over.

    None where there is no reference, or where this version's line takes none.
    """
    made_of = getattr(pipeline, "ReferenceFile", None)
    if image.reference is None or made_of is None:
        return None
    return _review(image, recipe, models, reference_file=made_of(f"{image.name} reference", image.reference))


def _best_region(page: PageReview, recipe: Recipe, models: KeptAnswers) -> NDArray[np.float32]:
    """Features (D,) of the region with the highest score, behind an opened gate; of the field where there is none."""
    if page.defects:
        return max(page.defects, key=lambda defect: defect.peak_score).features
    candidates = pipeline.search(page.micrograph, opened(recipe), models).candidates
    if not candidates:
        return labelled_crops.encode(_whole_field(page, recipe, models), models)
    return labelled_crops.encode(max(candidates, key=lambda candidate: candidate.region.peak_score), models)


def opened(recipe: Recipe) -> Recipe:
    """The recipe with a gate that every page passes."""
    return recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": OPEN_GATE})})


def times_ms(seen: Sequence[Seen], models: KeptAnswers) -> tuple[list[tuple[tuple[int, int], float]], float]:
    """Milliseconds of the detector by size of the field (H, W), smallest first, and of the encoder for one crop."""
    by_size: dict[tuple[int, int], Seen] = {}
    for one in seen:
        height, width = one.field.shape
        by_size.setdefault((height, width), one)
    rows = []
    for size, one in sorted(by_size.items(), key=lambda item: item[0][0] * item[0][1]):
        given = detection.asked(models.meta("detector"), one.field)
        rows.append((size, sum(models.timed_ms("detector", tile) for tile in given)))
    crop = _whole_field(seen[0].reviewed, Recipe(), models)
    return rows, models.timed_ms("encoder", inputs.for_encoder(models.meta("encoder"), [crop]))


def _whole_field(page: PageReview, recipe: Recipe, models: KeptAnswers) -> Candidate:
    """The whole field as crop, every place of it weighing alike."""
    everywhere = np.ones(page.micrograph.field.shape, np.bool_)
    return given(everywhere, page.micrograph, recipe, models)


def constant_images() -> list[RealImage]:
    """A black and a gray image, made here: there is nothing in them to review."""
    made = []
    for name, gray in (("black", 0), ("gray", 128)):
        content = _png(np.full((480, 480), gray, np.uint8))
        made.append(RealImage("constant (made here)", name, f"constant/{name}", content, defective=False))
    return made


def _png(pixels: NDArray[np.uint8]) -> bytes:
    return bytes(cv2.imencode(".png", pixels)[1])


# ---- what a verdict means for a page ----


def cause_of_escape(
    *, is_opened: bool, is_mask_empty: bool, kinds: Sequence[VerdictKind], at_defect: Sequence[bool] | None = None
) -> Passer | None:
    """Who let a page pass as defect-free: its gate, its mask or its head; None where a region is called a defect.

    The mask where it was empty, so that the head was shown the whole field, or where no region lies on the defect,
    which is only known of images whose defect somebody drew; else the head.

    Args:
        is_opened: of the gate.
        is_mask_empty: whether the mask marks nothing.
        kinds: verdicts of the regions.
        at_defect: whether each region touches the true defect; None where nobody drew it.
    """
    if not is_opened:
        return "gate"
    if any(kind != "defect-free" for kind in kinds):
        return None
    if is_mask_empty or not kinds or (at_defect is not None and not any(at_defect)):
        return "mask"
    return "head"


def passed_by(seen: Seen) -> Passer | None:
    """``cause_of_escape`` of a page that the line reviewed."""
    return cause_of_escape(
        is_opened=seen.is_opened,
        is_mask_empty=not seen.reviewed.mask.any(),
        kinds=seen.kinds,
        at_defect=at_defect(seen),
    )


def at_defect(seen: Seen) -> list[bool] | None:
    """Whether the box of each region holds a pixel of the true defect; None where nobody drew it."""
    truth, page = seen.truth, seen.reviewed
    if truth is None:
        return None
    left, top = page.micrograph.field_xyxy[:2]
    boxes = ((x0 - left, y0 - top, x1 - left, y1 - top) for x0, y0, x1, y1 in (d.box_xyxy for d in page.defects))
    return [bool(truth[max(y0, 0) : y1, max(x0, 0) : x1].any()) for x0, y0, x1, y1 in boxes]


def page_verdict(defects: Sequence[Defect]) -> tuple[VerdictKind, str | None]:
    """The one verdict of a page: that of its highest-scored region that is not called defect-free, else defect-free."""
    named = [defect for defect in defects if defect.verdict.kind != "defect-free"]
    if not named:
        return "defect-free", None
    best = max(named, key=lambda defect: defect.peak_score).verdict
    return best.kind, best.label
