"""What a user gives: normal and labelled images, read and checked before anything slow begins."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.intake import decoding, pairing
from semwatch.settings.recipe import Reference
from semwatch_training.data import data_folders, datasets
from semwatch_training.data.datasets import Sample
from semwatch_training.families.intrinsic.own_normals import FEWEST
from semwatch_training.system.progress_bars import Progress

MAY_DIFFER = 1.1
"""Ratio of two pixel sizes, or of two widths where no file tells its pixel size, that still count as one."""
FEWEST_IMAGES = 2
"""Labelled images of a class before a head can be fitted on it and judged."""
N_SURE = 19
"""Normal images that promise the default false alarm rate of 5 %."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """Images to adapt to."""

    normals: tuple[Path, ...]
    fields: tuple[NDArray[np.uint8], ...]
    """Fields of view of the normals."""
    labelled: tuple[Sample, ...]
    """Of classes with images enough, and defect-free ones."""
    notes: tuple[str, ...]
    """What a person should know of them, each a sentence with what to do."""


def read(normals: Path, labels: Path | None, reference: str | None, *, progress: Progress) -> Given:
    """Read and check.

    Args:
        normals: folder of defect-free images.
        labels: labelled images in any layout.
        reference: stem of reference images, as the recipe's ``reference.pattern``; they are of defect-free places, so
            those beside labelled images count among the normals.
        progress: called after every normal image.

    Raises:
        ConfigError: a layout, or labels that contradict each other, with what would mend it.
        ImageError: a file is not a whole image.
    """
    rule = Reference(pattern=reference) if reference else Reference()
    paths = data_folders.read_normals(normals)
    samples: tuple[Sample, ...] = ()
    if labels is not None:
        data_set = data_folders.read(labels, allow_leakage=True)
        samples = (*data_set.train, *data_set.test)
        references = [s.image for s in samples if pairing.partner_of(s.image.name, rule) is not None]
        samples = tuple(sample for sample in samples if sample.image not in references)
        paths = list(dict.fromkeys([*paths, *references]))
    _refuse_two_labels(samples)
    fields, pixel_nm = [], []
    for done, path in enumerate(paths, start=1):
        page = decoding.read(path)[0]
        fields.append(page.field)
        pixel_nm.append(page.pixel_nm)
        progress("reading normal images", done, len(paths))
    kept, few = _classes_with_enough(datasets.distinct(samples))
    notes = [*_on_number(len(paths)), *_on_scale(fields, pixel_nm), *few]
    return Given(tuple(paths), tuple(fields), kept, tuple(notes))


def _refuse_two_labels(samples: Sequence[Sample]) -> None:
    """One picture under two names that contradict each other: neither label can be believed."""
    label_of: dict[Path, set[str]] = {}
    for sample in samples:
        label_of.setdefault(sample.image, set()).add(sample.label)
    for group in datasets.duplicates(samples):
        names = {label for path in group for label in label_of[path]}
        if len(names) > 1:
            named = " and ".join(f"{path} ({', '.join(sorted(label_of[path]))})" for path in group[:2])
            raise ConfigError(f"{named} show the same pixels under two labels; keep the right one")


def _classes_with_enough(samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], list[str]]:
    images = {label: {s.image for s in samples if s.label == label} for label in {s.label for s in samples}}
    few = sorted(label for label, some in images.items() if label != DEFECT_FREE and len(some) < FEWEST_IMAGES)
    notes = [f"{label}: a single labelled image, left out; give {FEWEST_IMAGES} or more" for label in few]
    counts = Counter(label for label in images if label not in (*few, DEFECT_FREE))
    if len(counts) == 1:
        (only,) = counts
        notes.append(f"all labels say {only!r}: a head tells it from the classes that it knows, and from nothing else")
    return tuple(sample for sample in samples if sample.label not in few), notes


def _on_number(n: int) -> list[str]:
    if n >= N_SURE:
        return []
    least = f"{1 / (n + 1):.0%}"
    use = "" if n >= FEWEST else f", and no statistics of places can be made of fewer than {FEWEST}"
    return [
        f"{n} normal image{'s' if n > 1 else ''} cannot promise a false alarm rate under {least}{use}: the gate is set "
        f"by views of them, which resemble each other; give {N_SURE} or more for 5 %"
    ]


def _on_scale(fields: Sequence[NDArray[np.uint8]], pixel_nm: Sequence[float | None]) -> list[str]:
    known = [size for size in pixel_nm if size is not None]
    if len(known) == len(fields) and known and max(known) > MAY_DIFFER * min(known):
        sizes = ", ".join(f"{size:.3g}" for size in sorted({round(size, 6) for size in known})[:4])
        return [f"the normal images are of several magnifications ({sizes} nm a pixel): give some of each that is used"]
    widths = Counter(f"{field.shape[1]} x {field.shape[0]}" for field in fields)
    sides = [max(field.shape) for field in fields]
    if max(sides) > MAY_DIFFER * min(sides):
        named = ", ".join(f"{size} ({n})" for size, n in widths.most_common(4))
        return [f"the normal images are of several sizes, {named}: if these are magnifications, give some of each"]
    return []
