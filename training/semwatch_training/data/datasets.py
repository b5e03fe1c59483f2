"""Data sets to learn from and to judge on: labelled image files, their pixels and masks, and the synthetic stages.

Frame: image and mask are those of the field of view, the first page without its info bar, as the daemon reads it. A
mask may be drawn on the whole page or on the field alone; the first is cut as the image was, so neither shifts. A box
is always of the whole page, and stands for the mask that it fills.
``data_folders`` reads the layouts on disk.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, Box
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch.line.scaling import resize
from semwatch_training.synthetic import DEFECT_TYPES, STAGES, SyntheticMicrograph, render
from semwatch_training.synthetic.shapes import NoRoom

Place = Path | Box
"""Where a defect lies: the file of its mask, or its box (x0, y0, x1, y1) in pixels of the page, half-open."""

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")

# Seeds of the generator by use, far apart, so that no image serves two purposes.
SEED_TRAIN, SEED_HELD_OUT, SEED_HEAD = 1_000_000, 2_000_000, 3_000_000
SEED_GOLDEN, SEED_EVALUATE, SEED_ENCODER = 3_500_000, 4_000_000, 5_000_000
SEEDS_PER_TYPE = 50_000
"""Seeds that ``synthetic_set`` sets aside for its normal images, and for each type; far more than it draws."""
MASK_FOLDERS = ("ground_truth", "masks", "mask", "gt")
"""Folders of these names hold masks, wherever they lie."""
MAX_SEEDS = 20
"""Seeds tried for one image: small fields have no room for some defects."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image, or one labelled defect where an image shows several."""

    image: Path
    label: str
    """``DEFECT_FREE`` for a normal image."""
    mask: Place | None = None
    """Where the defect lies; None for normal images and where nobody drew it."""
    other_masks: tuple[Place, ...] = ()
    """Of the image's other defects, each of which is a sample of its own."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """Labelled images, those to learn from apart from those to judge on."""

    name: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @property
    def known_labels(self) -> tuple[str, ...]:
        """Defect classes with a sample to learn from, sorted."""
        return tuple(sorted({sample.label for sample in self.train} - {DEFECT_FREE}))

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Number of (train, test) samples by label, sorted, normal images among them."""
        train, test = ([sample.label for sample in part] for part in (self.train, self.test))
        return {label: (train.count(label), test.count(label)) for label in sorted({*train, *test})}


def checked(data_set: DataSet, *, labels: Collection[str] | None = None, require_masks: bool = False) -> DataSet:
    """Return a data set that has defects of just the classes ``labels``, where given, and masks where required.

    Raises:
        ConfigError: a label that is not among them, one of them without a sample, or a defect without a mask.
    """
    samples = (*data_set.train, *data_set.test)
    if labels is not None:
        found = {sample.label for sample in samples} - {DEFECT_FREE}
        wanted = set(labels) - {DEFECT_FREE}
        if unknown := sorted(found - wanted):
            raise ConfigError(
                f"{data_set.name}: unknown labels {', '.join(unknown)}; known are {', '.join(sorted(wanted))}"
            )
        if empty := sorted(wanted - found):
            raise ConfigError(f"{data_set.name}: no sample of {', '.join(empty)}; add some or take the label out")
    bare = [sample.image for sample in samples if sample.label != DEFECT_FREE and sample.mask is None]
    if require_masks and bare:
        named = ", ".join(str(path) for path in bare[:5])
        raise ConfigError(f"{data_set.name}: {len(bare)} defects have no mask ({named}{' ...' if bare[5:] else ''})")
    return data_set


# ---- pixels ----


def load_gray(sample: Sample) -> NDArray[np.uint8]:
    """Read a sample's field of view, (H, W) uint8: the first page without its info bar, as the daemon reads it.

    Raises:
        ImageError: the file is not a whole image.
        ServiceUnavailable: the disk or the share is away.
    """
    return decoding.read(sample.image)[0].field


def load_mask(sample: Sample, size_hw: tuple[int, int], *, whole_image: bool = False) -> NDArray[np.bool_]:
    """Read where a sample's defect lies, (H, W) bool, True where the mask is above 127; all False for normal images.

    ``size_hw`` is that of ``load_gray``. ``whole_image`` adds the image's other defects, as detection is judged. A
    mask without any defective pixel is accepted: MTD has four of them.

    Raises:
        ConfigError: a defect without a mask, a mask of another size than field and page, or one not of 0 and 255; a
            box that leaves the page.
        ImageError: the mask is not a whole image.
    """
    if sample.label == DEFECT_FREE:
        return np.zeros(size_hw, np.bool_)
    if sample.mask is None:
        raise ConfigError(f"{sample.image}: no mask shows its {sample.label!r}; draw one or leave out pixel metrics")
    places = (sample.mask, *sample.other_masks) if whole_image else (sample.mask,)
    masks: NDArray[np.bool_] = np.stack([_mask_of_field(place, sample.image, size_hw) for place in places])
    return np.asarray(masks.any(axis=0))


def _mask_of_field(place: Place, image: Path, field_hw: tuple[int, int]) -> NDArray[np.bool_]:
    return _drawn_mask(place, image, field_hw) if isinstance(place, Path) else _filled_box(place, image, field_hw)


def _filled_box(box_xyxy: Box, image: Path, field_hw: tuple[int, int]) -> NDArray[np.bool_]:
    page = decoding.read(image)[0]
    height, width = page.pixels.shape
    x0, y0, x1, y1 = box_xyxy
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ConfigError(
            f"{image}: the box from ({x0}, {y0}) to ({x1}, {y1}) is empty or leaves the page of {width} x {height} px; "
            f"give boxes in pixels of the whole image"
        )
    left, top, right, bottom = page.field_xyxy
    if (bottom - top, right - left) != field_hw:
        raise ConfigError(f"{image}: a box is asked for at another size than that of load_gray")
    mask = np.zeros((height, width), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask[top:bottom, left:right]


def _drawn_mask(path: Path, image: Path, field_hw: tuple[int, int]) -> NDArray[np.bool_]:
    mask = decoding.read(path, min_side_px=1)[0].pixels
    if 0 < mask.max() <= 127:
        raise ConfigError(f"{path}: gray levels only up to {mask.max()}; save the mask with 0 and 255")
    if mask.shape == field_hw:
        return mask > 127
    page = decoding.read(image)[0]
    x0, y0, x1, y1 = page.field_xyxy
    if mask.shape != page.pixels.shape or (y1 - y0, x1 - x0) != field_hw:
        raise ConfigError(
            f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} px, its image {image.name} has a field of "
            f"{x1 - x0} x {y1 - y0} px, and {field_hw[1]} x {field_hw[0]} px were asked for; draw the mask at the "
            f"image's size and load it at that of load_gray"
        )
    return mask[y0:y1, x0:x1] > 127


# ---- duplicates and leakage ----


def duplicates(samples: Iterable[Sample]) -> tuple[tuple[Path, ...], ...]:
    """Group the image files that show the same pixels, by content hash of the decoded field; lone files are left out.

    So a copy under another name is found, and one saved in another lossless format or with an info bar; a resized,
    turned or newly compressed one is not.

    Raises:
        ImageError: a file is not a whole image.
    """
    groups: dict[str, list[Path]] = {}
    for path in dict.fromkeys(sample.image for sample in samples):
        groups.setdefault(_content_hash(path), []).append(path)
    return tuple(tuple(paths) for paths in groups.values() if len(paths) > 1)


def distinct(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Leave out samples of an image file that repeats an earlier one's pixels."""
    repeated = {path for group in duplicates(samples) for path in group[1:]}
    return tuple(sample for sample in samples if sample.image not in repeated)


def leaks(train: Iterable[Sample], test: Iterable[Sample]) -> tuple[tuple[Path, Path], ...]:
    """Pair the image files of train and test that show the same pixels, as ``duplicates`` sees it."""
    learnt: dict[str, Path] = {}
    for path in dict.fromkeys(sample.image for sample in train):
        learnt.setdefault(_content_hash(path), path)
    judged = {path: _content_hash(path) for path in dict.fromkeys(sample.image for sample in test)} if learnt else {}
    return tuple((learnt[content], path) for path, content in judged.items() if content in learnt)


def refuse_leakage(
    train: Iterable[Sample], test: Iterable[Sample], *, allow: bool = False
) -> tuple[tuple[Path, Path], ...]:
    """Check that no image to judge on is one to learn from, and return the pairs that ``allow`` let pass.

    Raises:
        ConfigError: there are such pairs; up to five are named.
        ImageError: a file is not a whole image.
    """
    pairs = leaks(train, test)
    if pairs and not allow:
        named = "; ".join(f"{learnt} and {judged}" for learnt, judged in pairs[:5])
        more = f"; and {len(pairs) - 5} more" if len(pairs) > 5 else ""
        raise ConfigError(
            f"{len(pairs)} test images show the same pixels as training images ({named}{more}), so figures would be "
            f"too good; remove them from one side, or allow leakage and say so beside the figures"
        )
    return pairs


def _content_hash(path: Path) -> str:
    """Hash the decoded field with its size. Equal files decode equally, so a hash of the file would add nothing."""
    field = decoding.read(path)[0].field
    return hashlib.sha256(repr(field.shape).encode() + field.tobytes()).hexdigest()


# ---- synthetic images ----


def synthetic_normals(n: int, *, first_seed: int, size_px: int) -> Iterator[NDArray[np.uint8]]:
    """Yield n normal micrographs (size_px, size_px) uint8, the stages in turn.

    Rendered between 448 and 1024 px a side and resized, so that grain, blur and noise come at the spread of scales that
    resizing a tool's images gives.
    """
    rng = np.random.default_rng(first_seed)
    for index in range(n):
        side = int(rng.choice([448, 512, 768, 1024]))
        image = render(STAGES[index % len(STAGES)], seed=first_seed + index, size_hw=(side, side)).pixels
        yield resize(image, (size_px, size_px))


def synthetic_set(
    stage: str, *, n_normal: int, n_per_type: int, first_seed: int, side_px: int
) -> Iterator[SyntheticMicrograph]:
    """Yield a stage's normal images, then those of each of its types, one defect an image; (side_px, side_px) each.

    Normal images and every type count seeds from a start of their own: a larger set begins each with the smaller one's
    images, and sets of one stage share no seed if their first seeds lie ``SEEDS_PER_TYPE`` times one more than the
    number of types apart, as ``SEED_TRAIN``, ``SEED_HEAD`` and the others do.

    Raises:
        ConfigError: an unknown stage, a side under 64 px, a negative number, or more images than seeds are set aside.
        NoRoom: a ConfigError: fields of this side have no room for one of the types.
    """
    if stage not in STAGES:
        raise ConfigError(f"unknown process stage {stage!r}; choose from {', '.join(STAGES)}")
    if side_px < 64:
        raise ConfigError(f"side_px {side_px} is too small; use at least 64")
    most = SEEDS_PER_TYPE // MAX_SEEDS
    for name, n in (("n_normal", n_normal), ("n_per_type", n_per_type)):
        if not 0 <= n <= most:
            raise ConfigError(f"{name} {n} is outside [0, {most}]; make several sets with seeds far apart")
    return _synthetic_set(stage, n_normal, n_per_type, first_seed, (side_px, side_px))


def _synthetic_set(
    stage: str, n_normal: int, n_per_type: int, first_seed: int, size_hw: tuple[int, int]
) -> Iterator[SyntheticMicrograph]:
    kinds: list[tuple[tuple[str, ...], int]] = [((), n_normal), *(((t,), n_per_type) for t in DEFECT_TYPES[stage])]
    for kind_idx, (defects, n) in enumerate(kinds):
        seeds = count(first_seed + kind_idx * SEEDS_PER_TYPE)
        for _ in range(n):
            yield first_with_room(stage, defects, islice(seeds, MAX_SEEDS), size_hw)


def first_with_room(
    stage: str, defects: Sequence[str], seeds: Iterable[int], size_hw: tuple[int, int]
) -> SyntheticMicrograph:
    """Render the first of some seeds whose field has room for the defects.

    Raises:
        NoRoom: a ConfigError: none has.
    """
    for seed in seeds:
        try:
            return render(stage, seed=seed, size_hw=size_hw, defects=defects)
        except NoRoom:
            continue
    raise NoRoom(f"{stage} fields of {size_hw[1]} px have no room for {', '.join(defects)}; use a larger side_px")


# ---- plain folders of normal images ----


def folder_images(folder: Path) -> list[Path]:
    """Image files below a folder, sorted; those in ``MASK_FOLDERS`` below it are no images.

    Raises:
        ConfigError: the folder is absent or holds no image.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of images")
    below = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    found = sorted(path for path in below if not set(path.relative_to(folder).parts[:-1]) & set(MASK_FOLDERS))
    if not found:
        raise ConfigError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


def read_gray(path: Path) -> NDArray[np.uint8]:
    """The field of view (H, W) of an image file, its first page, as the daemon reads it."""
    return decoding.read(path)[0].field


def normal_images(paths: list[Path], *, size_px: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the fields of view of image files, first page each, as the daemon reads them: (size_px, size_px) uint8."""
    for path in paths:
        yield resize(decoding.read(path)[0].field, (size_px, size_px))
