"""Which version of a model serves, and how people change that.

    <repository>/<model>/pinned               a version number: that one serves, whatever comes
    <repository>/<model>/<version>.withdrawn  why this version may not serve; it stays readable

Without a pin the newest version that is not withdrawn serves. Versions are never renumbered, so a rollback withdraws
what it leaves behind, and the next publication serves by itself. Both files appear by one rename.
"""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from semwatch.errors import ModelMismatch, PublishError, ServiceUnavailable
from semwatch.models import crop_store, head_bank, model_repository
from semwatch.models.model_repository import Meta
from semwatch.system import files

PINNED, WITHDRAWN = "pinned", ".withdrawn"


def choice(repository: Path, model: str) -> int:
    """The version that serves.

    Raises:
        ModelMismatch: there is none, or the pinned one is absent.
    """
    pinned = pin_of(repository, model)
    if pinned is not None:
        if pinned not in model_repository.versions(repository, model):
            raise ModelMismatch(
                f"{model} {pinned} is pinned but not in {repository}; `semwatch models pin {model} --release` lets the "
                f"newest serve"
            )
        return pinned
    fit = [v for v in model_repository.versions(repository, model) if why_withdrawn(repository, model, v) is None]
    return fit[-1] if fit else model_repository.latest(repository, model)


def to_try(repository: Path, model: str, pin: int | None = None) -> list[int]:
    """Versions that may serve at a start, the wanted one first: one that nobody pinned has those before it as deputies.

    Args:
        pin: of a recipe; None: it has none.

    Raises:
        ModelMismatch: there is none, or the pinned one is absent.
    """
    if pin is not None:
        return [pin]
    wanted = choice(repository, model)
    if pin_of(repository, model) is not None:
        return [wanted]
    earlier = [version for version in model_repository.versions(repository, model) if version < wanted]
    return [wanted, *(v for v in reversed(earlier) if why_withdrawn(repository, model, v) is None)]


def pin_of(repository: Path, model: str) -> int | None:
    """The pinned version, None without a pin.

    Raises:
        ModelMismatch: the pin file holds no version number.
        ServiceUnavailable: it cannot be read now.
    """
    path = repository / model / PINNED
    try:
        with path.open("rb") as file:
            text = file.read(64).decode("ascii", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise ModelMismatch(f"{path} must hold a version number alone; delete it, or pin again") from error
    except OSError as error:
        raise ServiceUnavailable(f"{path} cannot be read now: {error.strerror}") from error
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ModelMismatch(f"{path} must hold a version number alone; delete it, or pin again")
    return int(text)


def pin(repository: Path, model: str, version: int | None) -> None:
    """Let one version serve, or with None the newest again.

    Raises:
        ModelMismatch: there is no such version.
        PublishError: the disk refused.
    """
    path = repository / model / PINNED
    if version is not None:
        model_repository.read_meta(repository, model, version)
    try:
        if version is None:
            path.unlink(missing_ok=True)
        else:
            files.write_whole(path, f"{version}\n".encode())
    except OSError as error:
        raise PublishError(f"cannot write {path}: {error}") from error


def why_withdrawn(repository: Path, model: str, version: int) -> str | None:
    """Why a version may not serve; None where it may.

    Raises:
        ServiceUnavailable: that cannot be read now.
    """
    path = repository / model / f"{version}{WITHDRAWN}"
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        return f"{path} lies there, which is no file"
    except OSError as error:
        raise ServiceUnavailable(f"{path} cannot be read now: {error.strerror}") from error


def withdraw(repository: Path, model: str, version: int, reason: str) -> None:
    """Take a version out of service for good.

    Raises:
        ModelMismatch: there is no such version.
        PublishError: it is pinned, is the last one that may serve, or the disk refused.
    """
    found = model_repository.versions(repository, model)
    if version not in found:  # one whose meta.json is damaged can be withdrawn too
        raise ModelMismatch(f"{model} version {version} is not in the model repository {repository}")
    if pin_of(repository, model) == version:
        raise PublishError(f"{model} {version} is pinned; release the pin first")
    others = [v for v in found if v != version]
    if all(why_withdrawn(repository, model, other) is not None for other in others):
        raise PublishError(f"{model} {version} is the last version that may serve; publish another first")
    try:
        files.write_whole(repository / model / f"{version}{WITHDRAWN}", f"{reason}\n".encode())
    except OSError as error:
        raise PublishError(f"cannot withdraw {model} {version}: {error}") from error


def way_back(repository: Path, model: str, *, refused: Collection[int] = ()) -> tuple[int, int]:
    """The version that serves, and the one that a rollback would let serve: the newest before it that can.

    Raises:
        ModelMismatch: nothing serves.
        PublishError: there is no earlier version.
    """
    leaving = choice(repository, model)
    earlier = _before(repository, model, leaving, refused)
    if earlier is None:
        raise PublishError(f"{model} {leaving} is the earliest version that may serve: there is nothing to go back to")
    return leaving, earlier


def roll_back(
    repository: Path, model: str, reason: str, *, refused: Mapping[int, str] = MappingProxyType({})
) -> tuple[int, int]:
    """Withdraw the version that serves; return it and the one that serves now. A pin is moved instead.

    Args:
        repository: model repository.
        model: which of its models.
        reason: why, for people.
        refused: versions that a daemon could not use, and why; those that lie between are withdrawn too.

    Raises:
        ModelMismatch: nothing serves.
        PublishError: there is no earlier version, or the disk refused.
    """
    leaving, earlier = way_back(repository, model, refused=refused)
    if pin_of(repository, model) is not None:
        pin(repository, model, earlier)
        return leaving, earlier
    between = [v for v in model_repository.versions(repository, model) if earlier < v < leaving]
    for version in between:
        if why_withdrawn(repository, model, version) is None:
            withdraw(repository, model, version, refused[version])
    withdraw(repository, model, leaving, reason)  # last, so that none of them is ever chosen
    return leaving, choice(repository, model)


def prune(repository: Path, model: str, *, keep: int) -> list[int]:
    """Delete old versions, but for the ``keep`` newest, the one that serves and the newest before that; return them.

    With heads go the kept crops that none of the remaining ones was fitted on or proven on.

    Raises:
        PublishError: the disk refused.
    """
    found = model_repository.versions(repository, model)
    serving = choice(repository, model)
    needed = {serving, _before(repository, model, serving)}
    gone = [v for v in found[: -keep or None] if v not in needed]
    for version in gone:
        folder = repository / model / str(version)
        doomed = folder.with_name(f".gone-{version}")
        try:
            files.rename(folder, doomed)  # by one rename out of sight: a half-deleted version is never seen
            shutil.rmtree(doomed)
            (repository / model / f"{version}{WITHDRAWN}").unlink(missing_ok=True)
        except OSError as error:
            raise PublishError(f"cannot delete {folder}: {error}") from error
    if model == "head":
        crop_store.prune(repository, head_bank.banks_of(repository))
    return gone


def _before(repository: Path, model: str, version: int, refused: Collection[int] = ()) -> int | None:
    """The newest version before this one that may serve and was not refused."""
    earlier = (v for v in reversed(model_repository.versions(repository, model)) if v < version and v not in refused)
    return next((v for v in earlier if why_withdrawn(repository, model, v) is None), None)


def difference(old: Meta, new: Meta) -> dict[str, Any]:
    """What one version has that the other has not: classes, codes, encoder, and every provenance value that differs."""
    before, after = dict(old.provenance), dict(new.provenance)
    return {
        "classes_added": sorted(set(new.labels) - set(old.labels)),
        "classes_removed": sorted(set(old.labels) - set(new.labels)),
        "codes": _changes(old.codes, new.codes),
        "same_encoder": old.encoder_sha256 == new.encoder_sha256,
        "same_weights": old.weights_sha256 == new.weights_sha256,
        "provenance": _changes(before, after),
    }


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, list[object]]:
    keys = sorted(before.keys() | after.keys())
    return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}
