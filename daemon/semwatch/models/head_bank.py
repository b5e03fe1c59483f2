"""What a head was fitted on, or is judged by: labelled features in one npz file that lies in the head's version folder.

    <repository>/head/<version>/bank.npz     what it was fitted on; the next cycle begins with it
    <repository>/head/<version>/golden.npz   what it was proven on; no head is ever fitted on these

Features are kept in half precision: they decide nothing at their last digits, and a head of 5,000 crops weighs 14 MB.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ModelMismatch
from semwatch.models import model_repository
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

    def __len__(self) -> int:
        return len(self.labels)

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.features.ndim != 2 or not len(self.features) == n == len(self.images) == len(self.ids):
            raise ValueError(
                f"{n} labels need as many features, images and ids; got {self.features.shape}, {len(self.images)}, "
                f"{len(self.ids)}"
            )


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
    )


def joined(banks: Sequence[Bank]) -> Bank:
    """The crops of several banks, in order."""
    return Bank(
        np.concatenate([bank.features for bank in banks]),
        tuple(label for bank in banks for label in bank.labels),
        tuple(image for bank in banks for image in bank.images),
        tuple(id_ for bank in banks for id_ in bank.ids),
    )


def renamed(bank: Bank, names: Mapping[str, str]) -> Bank:
    """The same crops under other class names; labels that are not among ``names`` stay."""
    return replace(bank, labels=tuple(names.get(label, label) for label in bank.labels))


def write(bank: Bank, path: Path) -> None:
    """Write a bank, whole; the folder must be there."""
    with files.writing(path) as file:
        np.savez(
            file,
            features=bank.features.astype(np.float16),
            labels=np.array(bank.labels, np.str_),
            images=np.array(bank.images, np.str_),
            ids=np.array(bank.ids, np.str_),
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
        lists = [tuple(str(value) for value in arrays[name]) for name in ("labels", "images", "ids")]
        bank = Bank(arrays["features"].astype(np.float32), *lists)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelMismatch(f"{path} cannot be used ({error}); publish the head again") from error
    if not np.isfinite(bank.features).all():
        raise ModelMismatch(f"{path} holds features that are not finite; publish the head again")
    return bank
