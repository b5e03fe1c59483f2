"""An installation on a machine: what is there, what a version wants there, and the steps between the two.

    /var/lib/semwatch-install/installed.json   what was installed, each file with its sha256
    /var/lib/semwatch-install/backups/         see ``backups``

A file that a person has changed (its sha256 is not the one in ``installed.json``, or there is a link in its place) is
never written: what this version would put there goes beside it as ``FILE.new``. A file that a person has deleted comes
back with ``install``, which is how one mends an installation, and stays away with ``upgrade``. Each file appears by one
rename, and keeps the owner and mode that a person gave it.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from semwatch.deployment.installed_files import DOCS, REPOSITORY, SETTINGS
from semwatch.deployment.releases import Place
from semwatch.errors import ConfigError, ModelMismatch
from semwatch.models import choice, crop_store, head_bank, model_repository
from semwatch.models.model_repository import MODELS
from semwatch.system import files, rights

KEPT = Path("/var/lib/semwatch-install")
RECORD = KEPT / "installed.json"

Action = Literal["new", "unchanged", "replaced", "kept", "absent", "removed"]
"""``kept``: a person changed it, ours lies beside it as ``.new``. ``absent``: a person deleted it, it stays away."""


class Record(BaseModel):
    """``installed.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    version: str
    """The version that serves."""
    previous: str | None = None
    """The version that served before it."""
    prefix: Path
    tools: tuple[str, ...]
    """Names of the tools; ``""`` is the machine's only one."""
    files: Mapping[str, str]
    """Path to sha256, as it was installed."""


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one file."""

    path: Path
    """On the machine, without the root."""
    action: Action
    content: bytes | None = None
    """To be written to ``path``, or ``beside`` it; None where nothing is written."""
    sha256: str | None = None
    """What the record says of ``path`` afterwards; None: nothing."""
    beside: Path | None = None
    """Where ours lies, where a person's is kept."""


def read_record(at: Place) -> Record | None:
    """What was installed; None where nothing was.

    Raises:
        ConfigError: the record cannot be used.
    """
    path = at.on_disk(RECORD)
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{path} cannot be used ({error}); move it aside, install takes every file as edited"
        ) from None


def plan(at: Place, files: Mapping[Path, bytes], recorded: Mapping[str, str], *, puts_back: bool) -> list[Step]:
    """Compare the files that a version wants with those that are there, and with those that were installed.

    Args:
        at: where.
        files: wanted, by their path on the machine.
        recorded: path to sha256 of what was installed.
        puts_back: what a person deleted comes back.

    Returns:
        One step for each file wanted, then one for each file that is wanted no more.
    """
    steps = [_step(at, path, content, recorded.get(str(path)), puts_back=puts_back) for path, content in files.items()]
    beside = {step.beside for step in steps if step.beside}
    return steps + plan_removal(at, {Path(path) for path in recorded} - files.keys() - beside, recorded)


def plan_removal(at: Place, paths: "set[Path]", recorded: Mapping[str, str], *, edited_too: bool = False) -> list[Step]:
    """Steps that remove installed files; what a person changed is kept unless ``edited_too``."""
    steps = []
    for path in sorted(paths):
        found = _sha256(at.on_disk(path))
        is_ours = edited_too or found == recorded[str(path)]
        steps.append(Step(path, "absent" if found is None else "removed" if is_ours else "kept"))
    return steps


def apply(at: Place, steps: Sequence[Step], before: Record | None, after: Record) -> Record:
    """Take the steps and write the record of what was done, also of a part of it; ``after.files`` is filled in here.

    Raises:
        OSError: the disk refused.
    """
    files = dict(before.files) if before else {}
    try:
        for step in steps:
            _take(at, step, files)
        done = after.model_copy(update={"files": dict(sorted(files.items()))})
        _write_record(at, done)
    except BaseException:
        if before:
            _write_record(at, before.model_copy(update={"files": dict(sorted(files.items()))}))
        raise
    return done


def copy_models(at: Place, source: Path, *, dry_run: bool) -> list[str]:
    """Publish the versions of a built model repository that this machine has not; return them as ``model/version``.

    The crops that its heads were fitted on come along. What is there stays as it is. Root reads with the rights of the
    source's owner and writes with those of the repository's, whose the copy is then.

    Raises:
        ModelMismatch: no models in ``source``, or a version that is not whole.
        OSError: the disk refused.
    """
    repository = at.on_disk(REPOSITORY)
    with rights.of_owner(source):
        given = {model: model_repository.versions(source, model) for model in MODELS}
    if not all(given.values()):
        missing = ", ".join(model for model, found in given.items() if not found)
        raise ModelMismatch(f"{source} has no {missing}; give a built repository (`semwatch-train build`)")
    if not dry_run:
        files.make_folder(repository)
        _copy_crops(source, repository)  # first, so that no head lacks what it was fitted on
    copied = []
    for model, found in given.items():
        for version in sorted(set(found) - set(model_repository.versions(repository, model))):
            with rights.of_owner(source):
                meta = model_repository.read_meta(source, model, version)
                model_repository.weights_path(source, model, version, meta)
            copied.append(f"{model}/{version}")
            if not dry_run:
                _copy_version(source / model, repository / model, version)
    return copied


def _copy_crops(source: Path, repository: Path) -> None:
    """Copy the crops that the heads of ``source`` were fitted on; those that are there stay."""
    with rights.of_owner(source):
        shards = set[str]().union(*(crop_store.named_by(bank) for bank in head_bank.banks_of(source)))
    for shard in sorted(shards):
        path = crop_store.path_of(source, shard)
        if not path.exists():
            continue
        content = rights.read_no_link(path)
        if hashlib.sha256(content).hexdigest() != shard:
            raise ModelMismatch(f"{path} is not what was kept there (sha256 differs); take it from a backup")
        with rights.of_owner(repository):
            crop_store.place(repository, content)
            _like(crop_store.path_of(repository, shard).parent, repository)


def _copy_version(source: Path, folder: Path, version: int) -> None:
    """Copy one version: read with the rights of the source's owner, written with those of the repository's."""
    with rights.of_owner(source):
        found = _files_below(source / str(version))
        withdrawn = source / f"{version}{choice.WITHDRAWN}"
        reason = rights.read_no_link(withdrawn) if withdrawn.is_file() else None
    with rights.of_owner(folder):
        if not folder.exists():
            folder.mkdir()
            _like(folder, folder.parent)  # its set-gid bit too: Triton reads by group
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
        try:
            for name, content in found.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).write_bytes(content)
            for path in (staging, *staging.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            if reason is not None:  # first, so that it never serves
                files.write_whole(folder / withdrawn.name, reason)
            files.place_folder(staging, folder / str(version))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _files_below(folder: Path) -> dict[Path, bytes]:
    """The files of a folder by their path in it; a link is refused by the system."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    return {path.relative_to(folder): rights.read_no_link(path) for path in paths}


def _like(folder: Path, above: Path) -> None:
    folder.chmod(stat.S_IMODE(above.stat().st_mode))


def _step(at: Place, path: Path, content: bytes, recorded: str | None, *, puts_back: bool) -> Step:
    found, sha256 = _sha256(at.on_disk(path)), hashlib.sha256(content).hexdigest()
    if found is None:
        if recorded is not None and not puts_back:
            return Step(path, "absent", sha256=recorded)
        return Step(path, "new", content, sha256)
    if found == sha256:
        return Step(path, "unchanged", sha256=sha256)
    if found == recorded:
        return Step(path, "replaced", content, sha256)
    beside = path.with_name(f"{path.name}.new")
    return Step(path, "kept", None if _sha256(at.on_disk(beside)) == sha256 else content, recorded, beside)


def _take(at: Place, step: Step, files: dict[str, str]) -> None:
    path = at.on_disk(step.path)
    if step.action == "removed":
        path.unlink(missing_ok=True)
        files.pop(str(step.path), None)
        _remove_empty(at, step.path.parent)
        return
    if step.content is not None:
        target = step.beside or step.path
        _write(at.on_disk(target), step.content)
        files[str(target)] = hashlib.sha256(step.content).hexdigest()
    if step.sha256 is not None:
        files[str(step.path)] = step.sha256
    elif step.content is None:
        files.pop(str(step.path), None)  # wanted no more: a person's own now, or gone


def _write(path: Path, content: bytes) -> None:
    files.make_folder(path.parent)
    before = path.stat() if path.is_file() else None
    with files.writing(path, mode=0o600) as file:  # nobody sees it before it has its owner and its rights
        file.write(content)
        if before and os.geteuid() == 0:
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
        os.fchmod(file.fileno(), before.st_mode & 0o7777 if before else 0o644)


def _write_record(at: Place, record: Record) -> None:
    if read_record(at) != record:
        _write(at.on_disk(RECORD), record.model_dump_json(indent=1).encode() + b"\n")


def _sha256(path: Path) -> str | None:
    """Of a file; something that is no hash where there is a link or folder in its place, None for nothing."""
    if path.is_symlink() or path.is_dir():
        return "not a file"
    try:
        return files.file_sha256(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); run it with sudo") from error


def _remove_empty(at: Place, folder: Path) -> None:
    """Remove folders that are semwatch's alone, once nothing is in them."""
    while folder.is_relative_to(DOCS) or folder.is_relative_to(SETTINGS):
        with suppress(OSError):
            at.on_disk(folder).rmdir()
        folder = folder.parent
