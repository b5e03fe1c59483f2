"""What a head was fitted on, or is judged by: labelled features in one npz file that lies in the head's version folder.

    <repository>/head/<version>/bank.npz     what it was fitted on; the next cycle begins with it
    <repository>/head/<version>/golden.npz   what it was proven on; no head is ever fitted on these

Features are kept in half precision: they decide nothing at their last digits, and a head of 5,000 crops weighs 14 MB.
Where a crop itself is kept (``crop_store``), ``crop_shard`` and ``crop_row`` name its place, so that another encoder
can look at it again; they are "" and -1 for a crop that nobody kept, and absent in banks of older releases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ModelMismatch
from semwatch.models import crop_store, model_repository
from semwatch.models.crop_store import CropRef, KeptCrop
from semwatch.models.model_repository import Arrays
from semwatch.system import files

BANK, GOLDEN = "bank.npz", "golden.npz"


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Labelled crops as the encoder saw them."""

    features: NDArray[np.float32]
    """(n, D)."""
    labels: tuple[str, ...]
    """n class names."""
    images: tuple[str, ...]
    """n names; crops of one image share one, so that a split keeps them together."""
    ids: tuple[str, ...]
    """n record ids, "" for crops that never were records: what has been learned is not learned twice."""
    crops: tuple[CropRef | None, ...] = ()
    """n places of the crops themselves, None where they are not kept; () stands for n times None."""

    def __len__(self) -> int:
        return len(self.labels)

    def __post_init__(self) -> None:
        n = len(self.labels)
        if not self.crops:
            object.__setattr__(self, "crops", (None,) * n)
        columns = (self.images, self.ids, self.crops)
        if self.features.ndim != 2 or {n} != {len(self.features), *map(len, columns)}:
            raise ValueError(
                f"{n} labels need as many features, images, ids and places of crops; got {self.features.shape}, "
                f"{', '.join(str(len(column)) for column in columns)}"
            )


def banks_of(repository: Path) -> list[Path]:
    """Where the banks and golden sets of all heads of a repository are, or would be."""
    heads = [repository / "head" / str(version) for version in model_repository.versions(repository, "head")]
    return [head / name for head in heads for name in (BANK, GOLDEN)]


def empty(width: int) -> Bank:
    """A bank without a crop, of ``width`` features."""
    return Bank(np.zeros((0, width), np.float32), (), (), ())


def chosen(bank: Bank, rows: "NDArray[np.bool_] | NDArray[np.intp]") -> Bank:
    """The crops of some rows."""
    rows = np.arange(len(bank))[rows]
    return Bank(
        bank.features[rows],
        tuple(bank.labels[i] for i in rows),
        tuple(bank.images[i] for i in rows),
        tuple(bank.ids[i] for i in rows),
        tuple(bank.crops[i] for i in rows),
    )


def joined(banks: Sequence[Bank]) -> Bank:
    """The crops of several banks, in order."""
    return Bank(
        np.concatenate([bank.features for bank in banks]),
        tuple(label for bank in banks for label in bank.labels),
        tuple(image for bank in banks for image in bank.images),
        tuple(id_ for bank in banks for id_ in bank.ids),
        tuple(ref for bank in banks for ref in bank.crops),
    )


def renamed(bank: Bank, names: Mapping[str, str]) -> Bank:
    """The same crops under other class names; labels that are not among ``names`` stay."""
    return replace(bank, labels=tuple(names.get(label, label) for label in bank.labels))


def crops_of(bank: Bank, repository: Path) -> list[KeptCrop | None]:
    """The crops of a bank, None where they are not kept.

    Raises:
        ModelMismatch: a shard is absent or damaged.
    """
    found = crop_store.read(repository, {ref for ref in bank.crops if ref is not None})
    return [None if ref is None else found[ref] for ref in bank.crops]


def write(bank: Bank, path: Path) -> None:
    """Write a bank, whole; the folder must be there."""
    with files.writing(path) as file:
        np.savez(
            file,
            features=bank.features.astype(np.float16),
            labels=np.array(bank.labels, np.str_),
            images=np.array(bank.images, np.str_),
            ids=np.array(bank.ids, np.str_),
            crop_shard=np.array(["" if ref is None else ref.shard for ref in bank.crops], np.str_),
            crop_row=np.array([-1 if ref is None else ref.row for ref in bank.crops], np.int64),
        )


def read(path: Path) -> Bank:
    """Read what ``write`` wrote.

    Raises:
        ModelMismatch: the file is absent, damaged or no bank.
    """
    if not path.exists():
        raise ModelMismatch(
            f"{path} is not there, so this head cannot be trained further; fit one with `semwatch-train head`"
        )
    arrays = model_repository.read_arrays(path)
    try:
        labels, images, ids = (tuple(str(value) for value in arrays[name]) for name in ("labels", "images", "ids"))
        bank = Bank(arrays["features"].astype(np.float32), labels, images, ids, _refs(arrays))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelMismatch(f"{path} cannot be used ({error}); publish the head again") from error
    if not np.isfinite(bank.features).all():
        raise ModelMismatch(f"{path} holds features that are not finite; publish the head again")
    return bank


def _refs(arrays: Arrays) -> tuple[CropRef | None, ...]:
    if "crop_shard" not in arrays:
        return ()
    pairs = zip(arrays["crop_shard"], arrays["crop_row"], strict=True)
    return tuple(CropRef(str(shard), int(row)) if shard else None for shard, row in pairs)
