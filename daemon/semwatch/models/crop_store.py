"""The crops that heads were fitted on, kept so that another encoder can look at them again.

    <repository>/crops/<sha256>.npz   a shard: some crops of one size, named by its content, never changed

    pixels      (total,) uint8, the crops as PNG files one after the other: 8-bit gray squares, without loss
    ends        (n,) int64, where each ends
    soft_masks  (n, t, t) float16
    sizes       (n, 2) float32, see ``line.classification.size_feature``
    field_features, region_features  (n, D), (n, C) float16, what the detector said; only where the encoder asked

Without loss, because JPEG moves the features: of 952 crops of 224 x 224 PNG makes 29 kB each, JPEG at quality 95 18 kB
with p-values off by up to 0.06. Soft masks weigh next to nothing; a faint one would lose its digits in 8 bits.

A bank names shard and row of each of its crops (``head_bank``). The field that a crop was cut out of is not kept. A
shard that no bank of a kept head names is deleted by ``prune``, which runs when old heads are deleted.
"""

import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ModelMismatch, PublishError
from semwatch.models.model_repository import arrays_in
from semwatch.system import files

CROPS = "crops"
MIN_AGE_S = 3600.0
"""A younger shard is kept though no bank names it: its head may be on the way."""


OF_DETECTOR = ("field_features", "region_features")


class CropRef(NamedTuple):
    """Where a crop is kept."""

    shard: str
    """Its content hash."""
    row: int


@dataclass(frozen=True, slots=True, eq=False)
class KeptCrop:
    """A defect as an encoder may see it again."""

    crop: NDArray[np.uint8]
    """(S, S) gray."""
    soft_mask: NDArray[np.float32]
    """(t, t) in [0, 1]."""
    size: NDArray[np.float32]
    """(2,)."""
    field: NDArray[np.uint8] | None = None
    """Gone."""
    field_features: NDArray[np.float32] | None = None
    """(D,) what the detector said of the field; None where the encoder did not ask."""
    region_features: NDArray[np.float32] | None = None
    """(C,) what it said of the defect's places; as above."""


def write(repository: Path, crops: Sequence[KeptCrop]) -> list[CropRef]:
    """Keep crops, those of one size in one shard; return where each is kept. Writing them again changes nothing.

    Raises:
        PublishError: the disk refused.
    """
    by_size: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, crop in enumerate(crops):
        of_detector = (
            () if values is None else values.shape for values in (getattr(crop, name) for name in OF_DETECTOR)
        )
        by_size.setdefault((crop.crop.shape, crop.soft_mask.shape, *of_detector), []).append(i)
    found: dict[int, CropRef] = {}
    for rows in by_size.values():
        content = encode([crops[i] for i in rows])
        shard = place(repository, content)
        found |= {i: CropRef(shard, row) for row, i in enumerate(rows)}
    return [found[i] for i in range(len(crops))]


def place(repository: Path, content: bytes) -> str:
    """Put a shard into a repository; return its name.

    Raises:
        PublishError: the disk refused.
    """
    shard = hashlib.sha256(content).hexdigest()
    path = path_of(repository, shard)
    try:
        if path.exists():
            path.touch()  # young again: whoever prunes must not take it from under a head that is on the way
        else:
            files.make_folder(path.parent)
            files.write_whole(path, content)
    except OSError as error:
        raise PublishError(f"cannot keep crops in {path.parent}: {error}") from error
    return shard


def path_of(repository: Path, shard: str) -> Path:
    """The file of a shard."""
    return repository / CROPS / f"{shard}.npz"


def encode(crops: Sequence[KeptCrop]) -> bytes:
    """A shard of n >= 1 crops of one size, all with what the detector gives or none; the same, the same bytes."""
    more = {}
    for name in OF_DETECTOR:
        of_detector = [values for values in (getattr(crop, name) for crop in crops) if values is not None]
        if len(of_detector) not in (0, len(crops)):
            raise ValueError(f"{len(of_detector)} of {len(crops)} crops have {name}: keep them apart")
        if of_detector:
            more[name] = np.stack(of_detector).astype(np.float16)
    images = [cv2.imencode(".png", crop.crop)[1].ravel() for crop in crops]
    file = io.BytesIO()
    np.savez(
        file,
        pixels=np.concatenate(images),
        ends=np.cumsum([len(image) for image in images], dtype=np.int64),
        soft_masks=np.stack([crop.soft_mask for crop in crops]).astype(np.float16),
        sizes=np.stack([crop.size for crop in crops]).astype(np.float32),
        **more,  # type: ignore[arg-type]  # its stub takes a name for an option
    )
    return file.getvalue()


def decode(content: bytes) -> list[KeptCrop]:
    """All crops of a shard, see ``encode``.

    Raises:
        ModelMismatch: one is damaged.
    """
    arrays = arrays_in(content, "the shard")
    ends = arrays.get("ends")
    if ends is None or ends.ndim != 1:
        raise ModelMismatch("the shard does not say where its crops end")
    return [_row(arrays, row, "the shard") for row in range(len(ends))]


def read(repository: Path, refs: Iterable[CropRef]) -> dict[CropRef, KeptCrop]:
    """Read crops; each shard is read once.

    Raises:
        ModelMismatch: a shard is absent or damaged, or has no such row.
    """
    rows_of: dict[str, set[int]] = {}
    for ref in refs:
        rows_of.setdefault(ref.shard, set()).add(ref.row)
    found: dict[CropRef, KeptCrop] = {}
    for shard, rows in rows_of.items():
        path = path_of(repository, shard)
        arrays = arrays_in(_content(path, shard), path)
        found |= {CropRef(shard, row): _row(arrays, row, str(path)) for row in rows}
    return found


def named_by(bank: Path) -> set[str]:
    """The shards that the bank in a file names; none where there is no file.

    Raises:
        ModelMismatch: it is damaged, so nobody knows.
    """
    if not bank.exists():
        return set()
    try:
        content = io.BytesIO(bank.read_bytes())
        with np.load(content, allow_pickle=False) as file:  # features are not even unpacked
            return {str(shard) for shard in file["crop_shard"]} - {""} if "crop_shard" in file.files else set()
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ModelMismatch(f"{bank} cannot be used: {error}") from error


def copy(source: Path, target: Path, banks: Iterable[Path]) -> list[Path]:
    """Copy the shards that banks name into another repository, as far as they are here; return the files there.

    Raises:
        ModelMismatch: a bank or a shard is damaged.
        PublishError: the disk refused.
    """
    copied = []
    for shard in sorted(set[str]().union(*(named_by(bank) for bank in banks))):
        path = path_of(source, shard)
        if path.exists() and not path_of(target, shard).exists():
            place(target, _content(path, shard))
            copied.append(path_of(target, shard))
    return copied


def prune(repository: Path, banks: Iterable[Path], *, clock: Callable[[], float] = time.time) -> list[str]:
    """Delete shards that none of these banks names and that are older than ``MIN_AGE_S``; return their names.

    Where a bank cannot be read nothing is deleted: it may name any of them.

    Raises:
        PublishError: the disk refused.
    """
    try:
        named = set[str]().union(*(named_by(bank) for bank in banks))
    except ModelMismatch:
        return []
    gone = []
    for path in sorted((repository / CROPS).glob("*.npz")):
        try:
            if path.stem not in named and path.stat().st_mtime < clock() - MIN_AGE_S:
                path.unlink(missing_ok=True)
                gone.append(path.stem)
        except OSError as error:
            raise PublishError(f"cannot delete {path}: {error}") from error
    return gone


def _content(path: Path, shard: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelMismatch(f"crops are not there: {path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != shard:
        raise ModelMismatch(f"{path} is not what was kept there (sha256 differs); take it from a backup")
    return content


def _row(arrays: Mapping[str, NDArray[Any]], row: int, where: str) -> KeptCrop:
    try:
        ends = arrays["ends"]
        if not 0 <= row < len(ends):
            raise ModelMismatch(f"{where} has {len(ends)} crops, none of number {row}")
        first = int(ends[row - 1]) if row else 0
        crop = cv2.imdecode(arrays["pixels"][first : int(ends[row])], cv2.IMREAD_GRAYSCALE)
        if crop is None:
            raise ModelMismatch(f"crop {row} of {where} is damaged")
        mask = arrays["soft_masks"][row].astype(np.float32)
        of_detector = {name: arrays[name][row].astype(np.float32) for name in OF_DETECTOR if name in arrays}
        size = np.asarray(arrays["sizes"][row], np.float32)
    except (LookupError, TypeError, ValueError, OverflowError, cv2.error) as error:  # arrays of other shapes and types
        raise ModelMismatch(f"crop {row} of {where} is damaged: {type(error).__name__}: {error}"[:500]) from error
    return KeptCrop(np.asarray(crop, np.uint8), mask, size, None, **of_detector)
