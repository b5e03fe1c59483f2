"""Operations on banks of crops: other labels, a part held out for the golden set, a limit per class, crops kept."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from semwatch.models import crop_store, head_bank
from semwatch.models.head_bank import Bank
from semwatch_training.learning.archive import Archive
from semwatch_training.learning.intake import view_of


def renamed(crops: Bank, names: Mapping[str, str | None]) -> Bank:
    """The same crops under new labels, without those whose class was rejected."""
    kept = head_bank.chosen(crops, np.array([names.get(label, label) is not None for label in crops.labels], np.bool_))
    return head_bank.renamed(kept, {old: new for old, new in names.items() if new is not None})


def unlabelled(crops: Bank) -> Bank:
    """The same crops without labels."""
    return labelled(crops, "")


def labelled(crops: Bank, label: str) -> Bank:
    """The same crops, all of one class."""
    return replace(crops, labels=(label,) * len(crops))


def held_out(crops: Bank, *, share: int, at_least: int, was_proof: Collection[str] = ()) -> tuple[Bank, Bank]:
    """Part the crops of a class: what is learned, and one of ``share`` for the golden set.

    Crops of one image stay together, typical and odd ones are drawn alike, and ``at_least`` are left to learn from.
    What was proof before (record ids) stays proof, and then no more is drawn.
    """
    golden = np.array([id_ in was_proof for id_ in crops.ids], np.bool_)
    rows_of: dict[str, list[int]] = {}
    for row, image in enumerate(crops.images):
        rows_of.setdefault(image, []).append(row)
    n_seen, draws = 0, not golden.any()
    for rows in rows_of.values() if draws else ():
        n_seen += len(rows)
        n_golden = int(golden.sum()) + len(rows)
        if n_golden <= min(n_seen // share, len(crops) - at_least):
            golden[rows] = True
    return head_bank.chosen(crops, ~golden), head_bank.chosen(crops, golden)


def capped(bank: Bank, per_class: int, seed: int) -> Bank:
    """A bank with at most so many crops of each class, chosen by chance: none is favoured, old or new."""
    rng = np.random.default_rng(seed)
    labels = np.array(bank.labels, np.str_)
    rows = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in dict.fromkeys(bank.labels)]
    return head_bank.chosen(bank, np.sort(np.concatenate(rows))) if rows else bank


def with_kept_crops(bank: Bank, archive: Archive, repository: Path) -> Bank:
    """The same bank, with the crops of its records in the repository's crop store, as far as the archive has them.

    Raises:
        PublishError: the disk refused.
    """
    wanted = [id_ for id_, ref in zip(bank.ids, bank.crops, strict=True) if id_ and ref is None]
    found = [record for record in archive.read_many(wanted) if record.field_short_px is not None]
    kept = [view_of(record) for record in found]
    places = dict(zip((record.id for record in found), crop_store.write(repository, kept), strict=True))
    refs = (ref or places.get(id_) for id_, ref in zip(bank.ids, bank.crops, strict=True))
    return replace(bank, crops=tuple(refs))


def images_as_numbers(images: Sequence[str]) -> list[int]:
    """A number for each image name, equal for equal names."""
    number = {image: i for i, image in enumerate(dict.fromkeys(images))}
    return [number[image] for image in images]
