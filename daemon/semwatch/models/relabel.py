"""The head in service under other class names: same weights, published as a new version. Needs no torch."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from semwatch.errors import PublishError
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.model_repository import Meta


def relabel(repository: Path, names: Mapping[str, str], codes: Mapping[str, int | None], *, utc: str) -> int | None:
    """Publish the head in service with classes renamed, its bank and golden set alike.

    Args:
        repository: model repository.
        names: new label by old; labels that the head does not know are left out.
        codes: fab code by new label; None takes it away.
        utc: now.

    Returns:
        The new version; None, and nothing is published, where the head has these names and codes already or does not
        know the classes.

    Raises:
        ModelMismatch: there is no head, or it is damaged.
        PublishError: the head is pinned, two classes would have one name, or the disk refused.
    """
    version = choice.choice(repository, "head")
    meta = model_repository.read_meta(repository, "head", version)
    fresh = _renamed(meta, names, codes)
    if (fresh.labels, fresh.codes) == (meta.labels, meta.codes):
        return None
    if choice.pin_of(repository, "head") is not None:
        # Published now, it would be the newest once the pin is released, though made from an older one.
        raise PublishError(f"head {version} is pinned; release it: `semwatch models pin head --release`")
    weights = model_repository.weights_path(repository, "head", version, meta)
    changed = {old: new for old, new in names.items() if old in meta.labels and old != new}
    added = {"relabelled_from": version, "relabelled": ", ".join(f"{old} -> {new}" for old, new in changed.items())}
    fresh = fresh.model_copy(update={"created_utc": utc, "provenance": {**meta.provenance, **added}})
    try:
        with tempfile.TemporaryDirectory() as folder:
            beside = _files_beside(weights.parent, Path(folder), names)
            return model_repository.publish(repository, fresh, weights, beside=beside)
    except OSError as error:
        raise PublishError(f"cannot prepare a head in {tempfile.gettempdir()}: {error}") from error


def _renamed(meta: Meta, names: Mapping[str, str], codes: Mapping[str, int | None]) -> Meta:
    labels = tuple(names.get(label, label) for label in meta.labels)
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise PublishError(f"the head would have two classes {twice[0]!r}; merge them instead")
    all_codes = {**{names.get(label, label): code for label, code in meta.codes.items()}, **codes}
    # Only what was renamed or is still a class: a code without a class would wait for a namesake.
    return meta.model_copy(
        update={
            "labels": labels,
            "codes": {label: code for label, code in all_codes.items() if label in labels and code is not None},
        }
    )


def _files_beside(version: Path, folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Probe, bank and golden set of the new version by name; what the old one lacks, the new one lacks."""
    made = {name: folder / name for name in (head_bank.BANK, head_bank.GOLDEN) if (version / name).exists()}
    for name, path in made.items():
        head_bank.write(head_bank.renamed(head_bank.read(version / name), names), path)
    probe = version / model_repository.PROBE
    return made | ({probe.name: probe} if probe.exists() else {})
