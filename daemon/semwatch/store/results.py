"""One result: write whole, read back; ``review_record`` is its format.

A result lives beside the others of its lot, in ``results_dir/<source>/<folder of the image>/``:

    <image>.overlay.png, page p > 0: <image>.p<p>.overlay.png    written first
    <image>.model.overlay.png                                    the same without people's verdicts, once there are some
    <image>.review.json                                          written last: where it is, the result is whole
    <image>.r<r>.review.json                                     kept revision r, when a later head has judged again
    <image>.reason.json                                          instead of these, for an image in quarantine
    <image>.duplicate.json                                       instead, for one with the content of another image
    <image>.<first 8 of its sha256>.*                            kept results of other content under the same name
    lot.csv                                                      see ``lot_table``

``<image>`` is the file's whole name, extension included. One writer per image at a time.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from semwatch.defects import Review
from semwatch.errors import ImageError, ServiceUnavailable
from semwatch.store import corrections, overlay, people_overlay, result_names
from semwatch.store.review_record import (
    SCHEMA_VERSION,
    DuplicateRecord,
    PageRecord,
    ReasonRecord,
    ReviewRecord,
    VerdictRecord,
    page_verdict,
    printable,
    to_record,
)
from semwatch.system import files
from semwatch.system.faults import first_fault

log = logging.getLogger(__name__)

REVIEW, OVERLAY = result_names.REVIEW, result_names.OVERLAY
REASON, DUPLICATE = result_names.REASON, result_names.DUPLICATE
IN_TABLES = result_names.IN_TABLES
AnyRecord = ReviewRecord | ReasonRecord | DuplicateRecord
_BESIDE_SUFFIX = re.compile(r"(\.p\d+)?(\.model)?\.overlay\.png|\.r\d+\.review\.json")
"""What goes with a review.json."""
_LIKE_A_BYTE = re.compile(r"\\(?=x(?:[89a-f][0-9a-f]|5c))")
"""The backslash of text that looks like a byte spelled out."""
MAX_NAME_BYTES = 200
"""Longer names are shortened, so that the longest suffix still fits into a file system's 255 bytes."""
MAX_PATH_BYTES = 3800
LOCK_S = 10.0
"""How long to wait for another writer of a lot."""
_ASIDE: Mapping[str, type[ReasonRecord] | type[DuplicateRecord]] = MappingProxyType(
    {REASON: ReasonRecord, DUPLICATE: DuplicateRecord}
)
"""What may stand instead of a result."""


@dataclass(frozen=True, slots=True)
class ReviewPaths:
    """Where a result was written."""

    json: Path
    overlays: tuple[Path, ...]
    """In the order of the pages."""
    record: ReviewRecord
    """What ``json`` holds."""
    is_new: bool
    """False where there was a result, a reason or a duplicate's note under this name before."""


# --- write and read ------------------------------------------------------------------------------------------------


def write(
    review: Review,
    *,
    results_dir: Path,
    class_codes: Mapping[str, int] | None = None,
    unknown_code: int | None = None,
    non_decidable_code: int | None = None,
) -> ReviewPaths:
    """Write overlays and JSON, each whole; to repeat it after a crash gives the same files.

    A result of other content under the same name is kept, with the first 8 digits of its sha256 in its names. One of
    the same content is replaced where the same recipe and models judged it, else it is kept as a revision. What people
    said of it is carried over; kept revisions stay, and the count goes on.

    Raises:
        ImageError: the path leads out of ``results_dir``, its name fits no file system, or a value is not finite.
        ServiceUnavailable: the disk is full or broken.
    """
    record = to_record(review, class_codes, unknown_code, non_decidable_code)
    overlays, is_new = write_overlays(review, results_dir=results_dir)
    target, record = write_record(record, results_dir=results_dir, source=review.source, path=review.path)
    return ReviewPaths(target, overlays, record, is_new)


def write_overlays(review: Review, *, results_dir: Path) -> tuple[tuple[Path, ...], bool]:
    """Write the pictures of a review, in the order of its pages; ``write_record`` must follow.

    Returns:
        Where they are, and whether nothing lay under this name before.

    Raises:
        ImageError, ServiceUnavailable: as ``write``.
    """
    stem = _stem(results_dir, review.source, review.path)
    target = _named(stem, REVIEW)
    with disk(target):
        files.make_folder(stem.parent)
        overlays: list[Path] = []
        with alone(target.parent):
            is_new = _make_room(stem, review.sha256)
        for page in review.pages:
            picture = overlay.draw(page, caption=_caption(review))
            overlays.append(_named(stem, _overlay_suffix(page.micrograph.page)))
            files.write_whole(overlays[-1], overlay.encode_png(picture))
            people_overlay.of_models(overlays[-1]).unlink(missing_ok=True)
    return tuple(overlays), is_new


def write_record(record: ReviewRecord, *, results_dir: Path, source: str, path: str) -> tuple[Path, ReviewRecord]:
    """Write the JSON of a review as it follows the one before, see ``write``; return where, and what it holds.

    Raises:
        ImageError, ServiceUnavailable: as ``write``.
    """
    stem = _stem(results_dir, source, path)
    target = _named(stem, REVIEW)
    with disk(target):
        with alone(target.parent):
            record = _after(target, record)
            _write_record(target, record)
            _remove(stem, REASON, DUPLICATE)
        if any(page.missed or any(defect.human for defect in page.defects) for page in record.pages):
            show_people(target)
    return target, record


def read(path: Path) -> ReviewRecord:
    """Read a review.json.

    Raises:
        ImageError: there is none, or it is broken, or not ours, or of another schema version.
        ServiceUnavailable: the disk cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"there is no result at {path}") from error
    except OSError as error:
        raise ServiceUnavailable(f"cannot read {path}: {error.strerror}") from error
    try:
        return ReviewRecord.model_validate_json(data)
    except ValidationError as error:
        raise ImageError(
            f"{path} is not a whole result of schema version {SCHEMA_VERSION}: {first_fault(error)}; "
            "review the image again, or read it with the semwatch that wrote it"
        ) from error


def change(path: Path, edit: Callable[[ReviewRecord], ReviewRecord]) -> ReviewRecord:
    """Change a result in its place, alone: of two who do so at once, the second sees what the first has written.

    Args:
        path: of the review.json.
        edit: gives the new content; called once, with no other writer at the lot.

    Raises:
        ImageError: there is no whole result.
        ServiceUnavailable: the disk is full or broken, or another writer does not end.
    """
    with disk(path), alone(path.parent):
        changed = edit(read(path))
        _write_record(path, changed)
    return changed


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other writers, of this process and of others, away from the JSON files of a lot for a moment.

    A file system that has no locks for folders is used without.

    Raises:
        ServiceUnavailable: another writer does not end.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(fd, folder)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ServiceUnavailable(f"{folder} is being written by another process for long; try again") from None
        except OSError as error:
            log.debug("%s: no lock: %s", folder, error)
            return None
        time.sleep(0.005)


def is_current(path: Path, record: ReviewRecord) -> bool:
    """Say whether a review.json is its image's result, not one that is kept of other content or an earlier revision."""
    return path.name == _shortened(PurePosixPath(record.path).name) + REVIEW


def read_any(path: Path) -> AnyRecord:
    """Read a review.json, reason.json or duplicate.json; its name says which it is.

    Raises:
        ImageError: there is none, or it is broken, or not ours.
        ServiceUnavailable: the disk cannot be read.
    """
    kind = next((kind for suffix, kind in _ASIDE.items() if path.name.endswith(suffix)), None)
    if kind is None:
        return read(path)
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ImageError(f"there is nothing at {path}") from error
    except OSError as error:
        raise ServiceUnavailable(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise ImageError(f"{path} is not whole: {first_fault(error)}") from error


def write_reason(
    *,
    results_dir: Path,
    source: str,
    path: str,
    sha256: str,
    reason: str,
    attempts: int,
    size: int,
    quarantined_utc: str,
) -> tuple[Path, bool]:
    """Write beside the results why an image is in quarantine and what to do about it.

    A result of other content under the same name is kept, as ``write`` keeps it.

    Returns:
        Where, and whether nothing lay under this name before.

    Raises:
        ImageError: the path leads out of ``results_dir``.
        ServiceUnavailable: the disk is full or broken.
    """
    record = ReasonRecord(
        source=printable(source),
        path=printable(path),
        sha256=sha256,
        size=size,
        quarantined_utc=quarantined_utc,
        attempts=attempts,
        reason=printable(reason),
        what_to_do="Mend the cause, then drop the image again under a new name or requeue it; the original is kept.",
    )
    return _write_aside(_stem(results_dir, source, path), REASON, record)


def write_duplicate(
    *, results_dir: Path, source: str, path: str, sha256: str, original: str, is_refused: bool, noted_utc: str
) -> tuple[Path, bool]:
    """Write beside the results whose content an image has; as ``write_reason``.

    Raises:
        ImageError: the path leads out of ``results_dir``.
        ServiceUnavailable: the disk is full or broken.
    """
    other = review_path(results_dir, source, original)
    record = DuplicateRecord(
        source=printable(source),
        path=printable(path),
        sha256=sha256,
        noted_utc=noted_utc,
        original=printable(original),
        result=None if is_refused else other.relative_to(results_dir).as_posix(),
    )
    return _write_aside(_stem(results_dir, source, path), DUPLICATE, record)


def remove_aside(results_dir: Path, source: str, path: str) -> Path | None:
    """Remove a reason or a duplicate's note of a file that is in order now; return the folder where one lay.

    Raises:
        ImageError: the path leads out of ``results_dir``.
        ServiceUnavailable: the disk is broken.
    """
    stem = _stem(results_dir, source, path)
    there = [place for suffix in _ASIDE if (place := _named(stem, suffix)).exists()]
    with disk(stem):
        for place in there:
            place.unlink(missing_ok=True)
    return stem.parent if there else None


def _write_aside(stem: Path, suffix: str, record: ReasonRecord | DuplicateRecord) -> tuple[Path, bool]:
    """Write what stands instead of a result: of one image there is one of the three."""
    target = _named(stem, suffix)
    with disk(target):
        files.make_folder(stem.parent)
        is_new = _make_room(stem, record.sha256)
        _write_record(target, record)
        _remove(stem, *(other for other in _ASIDE if other != suffix))
    return target, is_new


def _make_room(stem: Path, sha256: str) -> bool:
    """Keep a result of other content under another name; return whether nothing lies under this one."""
    has_result = _named(stem, REVIEW).exists()
    if has_result:
        _keep_other(stem, sha256)
    return not has_result and not any(_named(stem, suffix).exists() for suffix in _ASIDE)


def _remove(stem: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        _named(stem, suffix).unlink(missing_ok=True)


def _keep_other(stem: Path, sha256: str) -> None:
    """Rename a result of other content: its JSON last, so that after a crash it still says whose the others are."""
    target = _named(stem, REVIEW)
    try:
        other = read(target).sha256
    except ImageError:
        other = hashlib.sha256(target.read_bytes()).hexdigest()
        log.warning("%s is broken or not ours; it is kept under another name", target)
    if other == sha256:
        return
    kept = _named(stem, f".{other[:8]}")
    for old in list(stem.parent.iterdir()):
        suffix = old.name.removeprefix(stem.name)
        if suffix != old.name and _BESIDE_SUFFIX.fullmatch(suffix):
            files.rename(old, _named(kept, suffix))
    files.rename(target, _named(kept, REVIEW))


def _caption(review: Review) -> str:
    models = "  ".join(f"{model} {version}" for model, version in review.model_versions.items())
    return f"{review.recipe_name} {review.recipe_id}   {models}"


# --- a later head judges again -------------------------------------------------------------------------------------


def review_path(results_dir: Path, source: str, path: str, *, is_printable: bool = False) -> Path:
    """Where ``write`` puts the review.json of an image, whether it is there or not.

    Args:
        results_dir: the site's.
        source: of the image.
        path: of the image.
        is_printable: the path is as records have it, with bytes that are no UTF-8 spelled out.

    Raises:
        ImageError: the path leads out of ``results_dir``.
    """
    return _named(_stem(results_dir, source, path, is_printable=is_printable), REVIEW)


def revision_path(path: Path, revision: int) -> Path:
    """Where a revision of a review.json is kept once there is a later one."""
    return path.with_name(f"{path.name.removesuffix(REVIEW)}.r{revision}{REVIEW}")


def revise(
    path: Path, verdicts: Mapping[tuple[int, int], VerdictRecord], *, head_version: int, utc: str, head_hash: str = ""
) -> ReviewRecord | None:
    """Put other verdicts into a result as its next revision and keep the one before; to repeat it does nothing.

    Args:
        path: of the review.json.
        verdicts: by page and ``defect_id``; defects that are not here keep theirs.
        head_version: who judged.
        utc: when.
        head_hash: content hash of the head, "" where nobody knows it.

    Returns:
        The new revision; None where no kind or label changes, or where this head or a later one has judged already.

    Raises:
        ImageError: there is no whole result, it has no such defect, or another file lies where it should be kept.
        ServiceUnavailable: the disk is full or broken.
    """
    with disk(path), alone(path.parent) if path.parent.is_dir() else nullcontext():
        return _revise(path, verdicts, head_version, utc, head_hash)


def _revise(
    path: Path, verdicts: Mapping[tuple[int, int], VerdictRecord], head_version: int, utc: str, head_hash: str
) -> ReviewRecord | None:
    record = read(path)
    missing = verdicts.keys() - {(page.page, defect.defect_id) for page in record.pages for defect in page.defects}
    if missing:
        raise ImageError(f"{path} has no defect {min(missing)[1]} on page {min(missing)[0]}; review the image again")
    pages = tuple(_revised_page(page, verdicts) for page in record.pages)
    if pages == record.pages or record.model_versions.get("head", 0) >= head_version:
        return None
    changes = {
        "revision": record.revision + 1,
        "revised_utc": utc,
        "model_versions": record.model_versions | {"head": head_version},
        "model_hashes": record.model_hashes | {"head": head_hash},
        "pages": pages,
    }
    revised = record.model_copy(update=changes)
    _keep_revision(path, record)
    _write_record(path, revised)
    return revised


def _revised_page(page: PageRecord, verdicts: Mapping[tuple[int, int], VerdictRecord]) -> PageRecord:
    defects = []
    for defect in page.defects:
        verdict = verdicts.get((page.page, defect.defect_id), defect.verdict)
        is_same = (verdict.kind, verdict.label) == (defect.verdict.kind, defect.verdict.label)
        defects.append(defect if is_same else defect.model_copy(update={"verdict": verdict}))
    of_page = page_verdict([defect.verdict.kind for defect in defects], is_image=page.quality.is_image)
    return page.model_copy(update={"defects": tuple(defects), "verdict": of_page})


def _keep_revision(path: Path, record: ReviewRecord) -> None:
    """Copy, not rename: the result is in its place at every moment.

    After a crash the copy may be there already, and a person may have given a verdict since.
    """
    kept, data = revision_path(path, record.revision), path.read_bytes()
    if kept.exists() and kept.read_bytes() != data and not _is_same_but_for_people(kept, record):
        raise ImageError(f"{kept} is not revision {record.revision} of {path.name}; move it aside")
    files.write_whole(kept, data)


def _is_same_but_for_people(kept: Path, record: ReviewRecord) -> bool:
    try:
        return corrections.without_people(read(kept)) == corrections.without_people(record)
    except ImageError:
        return False


def _after(target: Path, record: ReviewRecord) -> ReviewRecord:
    """A new review as it follows the one of the same content that stands, if there is one."""
    try:
        before = read(target) if target.exists() else None
    except ImageError:
        before = None
    if before is None or before.sha256 != record.sha256:
        return record.model_copy(update={"revision": _next_revision(target)})
    is_by_others = _judges(before) != _judges(record)
    if is_by_others:
        _keep_revision(target, before)
    revision = before.revision + is_by_others
    return corrections.carried(before, record.model_copy(update={"revision": revision}))


def _judges(record: ReviewRecord) -> tuple[str, dict[str, int], dict[str, str]]:
    """Which recipe and models a result is by."""
    return record.recipe.id, record.model_versions, record.model_hashes


def _next_revision(path: Path) -> int:
    """A review of content whose earlier revisions are kept counts on, so that none is ever overwritten."""
    revision = 1
    while revision_path(path, revision).exists():
        revision += 1
    return revision


# --- pictures --------------------------------------------------------------------------------------------------------


def show_people(path: Path) -> None:
    """Draw what people said of a result on its overlays, beside the model's verdicts.

    Raises:
        ImageError: there is no whole result.
        ServiceUnavailable: the disk is full or broken.
    """
    stem = path.with_name(path.name.removesuffix(REVIEW))
    with disk(path), alone(path.parent):
        for page in read(path).pages:
            people_overlay.update(_named(stem, _overlay_suffix(page.page)), page)


def contact_sheet(
    pictures: Iterable[Path | bytes],
    out: Path,
    columns: int = 6,
    tile_px: int = 320,
    *,
    captions: Sequence[Sequence[str]] = (),
) -> None:
    """Write one PNG of many pictures, files or their content, row by row; one that cannot be read is a dark tile.

    ``captions`` are lines below each picture.

    Raises:
        ServiceUnavailable: the disk is full or broken.
    """
    with disk(out):
        read = (_read_picture(picture) for picture in pictures)
        sheet = overlay.tile(read, columns=columns, tile_px=tile_px, captions=captions)
        files.make_folder(out.parent)
        files.write_whole(out, overlay.encode_png(sheet))


def _read_picture(given: Path | bytes) -> NDArray[np.uint8] | None:
    data = given if isinstance(given, bytes) else given.read_bytes() if given.is_file() else b""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if picture is None:
        log.warning("no picture: %s", given if isinstance(given, Path) else f"{len(given)} bytes that are none")
    return None if picture is None else np.asarray(picture, np.uint8)


# --- names and the disk --------------------------------------------------------------------------------------------


def _stem(results_dir: Path, source: str, path: str, *, is_printable: bool = False) -> Path:
    """Where the result lies, short of its suffix.

    Raises:
        ImageError: it would lie outside ``results_dir``.
    """
    parts = PurePosixPath(path).parts
    bad = not parts or path.startswith("/") or ".." in parts or "\0" in path
    if bad or source in ("", ".", "..") or "/" in source or "\0" in source:
        raise ImageError(f"{printable(source)!r} / {printable(path)!r} is no relative path inside a drop folder")
    *folders, name = (_shortened(part if is_printable else _file_name(part)) for part in parts)
    root = results_dir / printable(source)
    folder = root.joinpath(*folders)
    if len(os.fsencode(folder)) > MAX_PATH_BYTES:
        folder = root / _shortened("/".join(folders).replace("/", "~"))
    if not folder.resolve().is_relative_to(results_dir.resolve()):
        raise ImageError(f"{folder} is a link that leads out of {results_dir}; remove the link")
    return folder / name


def _file_name(part: str) -> str:
    r"""A part of an image's path as a name that no other has: a byte that is no UTF-8 spelled out, such as ``\xff``.

    A name whose own text looks like that has its backslash spelled out as well.
    """
    return printable(_LIKE_A_BYTE.sub(r"\\x5c", part))


def _named(stem: Path, suffix: str) -> Path:
    return stem.parent / f"{stem.name}{suffix}"


def _overlay_suffix(page: int) -> str:
    return f".p{page}{OVERLAY}" if page else OVERLAY


def _shortened(name: str) -> str:
    data = name.encode()
    if len(data) <= MAX_NAME_BYTES:
        return name
    kept = data[: MAX_NAME_BYTES - 13].decode(errors="ignore")
    return f"{kept}~{hashlib.sha256(data).hexdigest()[:12]}"


def _write_record(target: Path, record: AnyRecord) -> None:
    files.write_whole(target, record.model_dump_json(indent=2).encode() + b"\n")


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Say of ``path`` what its disk refused, in our words.

    Raises:
        ImageError: its name is too long for the file system.
        ServiceUnavailable: the disk is full or broken.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ImageError(f"{path}: this file system takes no name of that length; give a shorter one") from error
        raise ServiceUnavailable(f"cannot write {path}: {error.strerror or error}; free or mend the disk") from error
