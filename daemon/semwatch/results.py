"""One result: write whole, read back. The models below are the format; ``schemas/`` holds its JSON schema.

A result lives beside the others of its lot, in ``results_dir/<source>/<folder of the image>/``:

    <image>.overlay.png, page p > 0: <image>.p<p>.overlay.png    written first
    <image>.review.json                                          written last: where it is, the result is whole
    <image>.reason.json                                          instead of these, for an image in quarantine
    <image>.<first 8 of its sha256>.*                            kept results of other content under the same name
    lot.csv                                                      derived from the folder's review.json files

``<image>`` is the file's whole name, extension included. One writer per image, one for a lot.csv, at a time.
"""

import csv
import errno
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from semwatch import overlay
from semwatch.defects import Box, Defect, PageReview, Review, Verdict, VerdictKind
from semwatch.errors import ImageError, ServiceUnavailable

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
SCHEMA_PATH = Path(__file__).with_name("schemas") / "review.schema.json"
REVIEW, OVERLAY, REASON, LOT = ".review.json", ".overlay.png", ".reason.json", "lot.csv"
_OVERLAY_SUFFIX = re.compile(r"(\.p\d+)?\.overlay\.png")
MAX_NAME_BYTES = 200
"""Longer names are shortened, so that the longest suffix still fits into a file system's 255 bytes."""
MAX_PATH_BYTES = 3800


def _six_digits(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


Number = Annotated[float, BeforeValidator(_six_digits)]
Share = Annotated[Number, Field(ge=0, le=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RecipeRecord(_Record):
    """The recipe that judged."""

    name: str
    id: str = Field(description="Content hash of the recipe.")


class NeighbourRecord(_Record):
    """One class as seen from a defect."""

    label: str
    probability: Share
    p_value: Share = Field(description="Conformal p-value: how ordinary this defect would be as a member of the class.")


class VerdictRecord(_Record):
    """What was said of one defect."""

    kind: VerdictKind
    label: str | None = Field(description="Class name of a known or defect-free verdict, else null.")
    confidence: Share
    class_code: int | None = Field(description="The fab's code, where the recipe has one.")
    nearest: tuple[NeighbourRecord, ...] = Field(description="The nearest classes, nearest first.")


class DefectRecord(_Record):
    """One defect."""

    defect_id: Annotated[int, Field(ge=1, description="1-based within its page.")]
    box_xyxy: Box = Field(description="Half-open, in pixels of the page as read.")
    area_px: Annotated[int, Field(ge=0)]
    area_nm2: Number | None
    peak_score: Number
    crop_xyxy: Box = Field(description="Window shown to the encoder; may reach outside the page.")
    verdict: VerdictRecord


class PageRecord(_Record):
    """One page of the image file."""

    page: Annotated[int, Field(ge=0, description="0-based in its file.")]
    width_px: int
    height_px: int
    field_xyxy: Box = Field(description="The page without info bars.")
    pixel_nm: Number | None
    vendor: str | None
    image_score: Number
    gate_threshold: Number = Field(description="The page is searched for defects only if its score lies above this.")
    verdict: Literal["defect-free", "defects"] = Field(
        description="defect-free: the gate stayed shut, or nothing was found, or the head called all of it defect-free."
    )
    defects: tuple[DefectRecord, ...]


class ReviewRecord(_Record):
    """Everything said of one image file."""

    schema_version: Literal[1] = SCHEMA_VERSION
    source: str
    path: str = Field(description="POSIX, relative to the drop folder; bytes that are not UTF-8 stand as \\xNN.")
    sha256: Sha256
    reviewed_utc: str
    recipe: RecipeRecord
    model_versions: dict[str, int] = Field(description="By model; models that were not asked are absent.")
    pages: tuple[PageRecord, ...]
    timings_ms: dict[str, Number] = Field(description="Milliseconds by stage, in the order of the line.")


class ReasonRecord(_Record):
    """Why an image is in quarantine."""

    schema_version: Literal[1] = SCHEMA_VERSION
    source: str
    path: str
    sha256: str
    size: int = Field(description="Bytes.")
    quarantined_utc: str
    attempts: int
    reason: str
    what_to_do: str


@dataclass(frozen=True, slots=True)
class ReviewPaths:
    """Where a result was written."""

    json: Path
    overlays: tuple[Path, ...]
    """In the order of the pages."""


# --- the record ----------------------------------------------------------------------------------------------------


def to_record(
    review: Review,
    class_codes: Mapping[str, int] | None = None,
    unknown_code: int | None = None,
    non_decidable_code: int | None = None,
) -> ReviewRecord:
    """Say a review in the words of the JSON; floats are rounded to 6 significant digits.

    Args:
        review: what to say.
        class_codes: the fab's codes by label; labels that are not here have no code.
        unknown_code: code of an unknown defect.
        non_decidable_code: code of a non-decidable defect.

    Raises:
        ImageError: a value is not finite or out of its range; the message names it.
    """
    codes = {"unknown": unknown_code, "non-decidable": non_decidable_code}
    try:
        return ReviewRecord(
            source=_text(review.source),
            path=_text(review.path),
            sha256=review.sha256,
            reviewed_utc=review.reviewed_utc,
            recipe=RecipeRecord(name=review.recipe_name, id=review.recipe_id),
            model_versions=dict(review.model_versions),
            pages=tuple(_page_record(page, class_codes or {}, codes) for page in review.pages),
            timings_ms={stage: float(ms) for stage, ms in review.timings_ms.items()},
        )
    except ValidationError as error:
        raise ImageError(f"{_text(review.path)}: the review makes no sense: {_first_fault(error)}") from error


def _page_record(page: PageReview, class_codes: Mapping[str, int], codes: Mapping[str, int | None]) -> PageRecord:
    micrograph = page.micrograph
    height_px, width_px = micrograph.pixels.shape
    is_clean = all(defect.verdict.kind == "defect-free" for defect in page.defects)
    return PageRecord(
        page=micrograph.page,
        width_px=width_px,
        height_px=height_px,
        field_xyxy=_box(micrograph.field_xyxy),
        pixel_nm=None if micrograph.pixel_nm is None else float(micrograph.pixel_nm),
        vendor=micrograph.vendor,
        image_score=float(page.score_map.raw_score),
        gate_threshold=float(page.gate_threshold),
        verdict="defect-free" if is_clean else "defects",
        defects=tuple(_defect_record(defect, class_codes, codes) for defect in page.defects),
    )


def _defect_record(defect: Defect, class_codes: Mapping[str, int], codes: Mapping[str, int | None]) -> DefectRecord:
    verdict: Verdict = defect.verdict
    code = codes[verdict.kind] if verdict.kind in codes else class_codes.get(verdict.label or "")
    nearest = tuple(
        NeighbourRecord(label=near.label, probability=float(near.probability), p_value=float(near.p_value))
        for near in verdict.nearest
    )
    return DefectRecord(
        defect_id=defect.defect_id,
        box_xyxy=_box(defect.box_xyxy),
        area_px=int(defect.area_px),
        area_nm2=None if defect.area_nm2 is None else float(defect.area_nm2),
        peak_score=float(defect.peak_score),
        crop_xyxy=_box(defect.crop_xyxy),
        verdict=VerdictRecord(
            kind=verdict.kind,
            label=verdict.label,
            confidence=float(verdict.confidence),
            class_code=code,
            nearest=nearest,
        ),
    )


def _box(box_xyxy: Box) -> Box:
    x0, y0, x1, y1 = (int(edge) for edge in box_xyxy)
    return x0, y0, x1, y1


def schema_text() -> str:
    """Return the published JSON schema, made from the models.

    After a change of the models:
    ``python -c 'from semwatch import results as r; r.SCHEMA_PATH.write_text(r.schema_text())'``.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | ReviewRecord.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


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

    A result of other content under the same name is kept, with the first 8 digits of its sha256 in its names.

    Raises:
        ImageError: the path leads out of ``results_dir``, its name fits no file system, or a value is not finite.
        ServiceUnavailable: the disk is full or broken.
    """
    record = to_record(review, class_codes, unknown_code, non_decidable_code)
    stem = _stem(results_dir, review.source, review.path)
    target = _named(stem, REVIEW)
    with _disk(target):
        _make_folder(stem.parent)
        if target.exists():
            _keep_other(stem, record.sha256)
        overlays = []
        for page in review.pages:
            picture = overlay.draw(page, caption=_caption(review))
            overlays.append(_named(stem, _overlay_suffix(page.micrograph.page)))
            _write_whole(overlays[-1], overlay.encode_png(picture))
        _sync_folder(stem.parent)
        _write_whole(target, record.model_dump_json(indent=2).encode() + b"\n")
        _sync_folder(stem.parent)
    return ReviewPaths(target, tuple(overlays))


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
            f"{path} is not a whole result of schema version {SCHEMA_VERSION}: {_first_fault(error)}; "
            "review the image again, or read it with the semwatch that wrote it"
        ) from error


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
) -> Path:
    """Write beside the results why an image is in quarantine and what to do about it.

    Raises:
        ImageError: the path leads out of ``results_dir``.
        ServiceUnavailable: the disk is full or broken.
    """
    record = ReasonRecord(
        source=_text(source),
        path=_text(path),
        sha256=sha256,
        size=size,
        quarantined_utc=quarantined_utc,
        attempts=attempts,
        reason=_text(reason),
        what_to_do="Mend the cause, then drop the image again under a new name or requeue it; the original is kept.",
    )
    stem = _stem(results_dir, source, path)
    target = _named(stem, REASON)
    with _disk(target):
        _make_folder(stem.parent)
        _write_whole(target, record.model_dump_json(indent=2).encode() + b"\n")
        _sync_folder(stem.parent)
    return target


def _keep_other(stem: Path, sha256: str) -> None:
    """Rename a result of other content: overlays first, so that after a crash the JSON still says whose they are."""
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
        if suffix != old.name and _OVERLAY_SUFFIX.fullmatch(suffix):
            old.replace(_named(kept, suffix))
    _sync_folder(stem.parent)
    target.replace(_named(kept, REVIEW))
    _sync_folder(stem.parent)


def _caption(review: Review) -> str:
    models = "  ".join(f"{model} {version}" for model, version in review.model_versions.items())
    return f"{review.recipe_name} {review.recipe_id}   {models}"


# --- a lot ---------------------------------------------------------------------------------------------------------

LOT_COLUMNS = (
    "source", "path", "page", "sha256", "reviewed_utc", "recipe", "recipe_id", "models", "image_score",
    "gate_threshold", "page_verdict", "defect_id", "kind", "label", "class_code", "confidence", "nearest_1",
    "nearest_2", "x0", "y0", "x1", "y1", "area_px", "area_nm2", "peak_score",
)  # fmt: skip


def iter_lot(lot_dir: Path) -> Iterator[ReviewRecord]:
    """Read the current results of one folder one by one, by name: a lot of thousands is never in memory as a whole.

    Broken files are logged and left out, kept ones are not given.

    Raises:
        ServiceUnavailable: the disk cannot be read.
    """
    with _disk(lot_dir):
        paths = [path for path in lot_dir.iterdir() if path.name.endswith(REVIEW)] if lot_dir.is_dir() else []
    for path in sorted(paths, key=lambda path: path.name.removesuffix(REVIEW)):
        try:
            record = read(path)
        except ImageError as error:
            log.warning("left out of the lot: %s", error)
            continue
        if path.name == _shortened(PurePosixPath(record.path).name) + REVIEW:
            yield record


def write_lot_csv(lot_dir: Path) -> Path:
    """Derive ``lot.csv`` from the folder's results: a row for each defect, and one for each page without any.

    Raises:
        ServiceUnavailable: the disk is full or broken.
    """
    target = lot_dir / LOT
    with _disk(target):
        _write_stream(target, _lot_lines(lot_dir))
        _sync_folder(lot_dir)
    return target


def _lot_lines(lot_dir: Path) -> Iterator[bytes]:
    yield _csv_line(LOT_COLUMNS)
    for record in iter_lot(lot_dir):
        for page in record.pages:
            for defect in page.defects or [None]:
                yield _csv_line(_lot_row(record, page, defect))


def _csv_line(cells: Sequence[object]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _lot_row(record: ReviewRecord, page: PageRecord, defect: DefectRecord | None) -> list[object]:
    models = " ".join(f"{model}={version}" for model, version in record.model_versions.items())
    head: list[object] = [
        record.source, record.path, page.page, record.sha256, record.reviewed_utc, record.recipe.name,
        record.recipe.id, models, page.image_score, page.gate_threshold, page.verdict,
    ]  # fmt: skip
    if defect is None:
        return head + [None] * (len(LOT_COLUMNS) - len(head))
    verdict = defect.verdict
    nearest = ([near.label for near in verdict.nearest] + [None, None])[:2]
    return [
        *head, defect.defect_id, verdict.kind, verdict.label, verdict.class_code, verdict.confidence, *nearest,
        *defect.box_xyxy, defect.area_px, defect.area_nm2, defect.peak_score,
    ]  # fmt: skip


def contact_sheet(overlays: Sequence[Path], out: Path, columns: int = 6, tile_px: int = 320) -> None:
    """Write one PNG of many overlays, row by row; an overlay that cannot be read is a dark tile.

    Raises:
        ServiceUnavailable: the disk is full or broken.
    """
    with _disk(out):
        sheet = overlay.tile((_read_picture(path) for path in overlays), columns=columns, tile_px=tile_px)
        _write_whole(out, overlay.encode_png(sheet))
        _sync_folder(out.parent)


def _read_picture(path: Path) -> NDArray[np.uint8] | None:
    data = path.read_bytes() if path.is_file() else b""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if picture is None:
        log.warning("no overlay at %s", path)
    return None if picture is None else np.asarray(picture, np.uint8)


# --- names and the disk --------------------------------------------------------------------------------------------


def _stem(results_dir: Path, source: str, path: str) -> Path:
    """Where the result lies, short of its suffix.

    Raises:
        ImageError: it would lie outside ``results_dir``.
    """
    parts = PurePosixPath(path).parts
    bad = not parts or path.startswith("/") or ".." in parts or "\0" in path
    if bad or source in ("", ".", "..") or "/" in source or "\0" in source:
        raise ImageError(f"{_text(source)!r} / {_text(path)!r} is no relative path inside a drop folder")
    *folders, name = (_shortened(_text(part)) for part in parts)
    root = results_dir / _text(source)
    folder = root.joinpath(*folders)
    if len(os.fsencode(folder)) > MAX_PATH_BYTES:
        folder = root / _shortened("/".join(folders).replace("/", "~"))
    if not folder.resolve().is_relative_to(results_dir.resolve()):
        raise ImageError(f"{folder} is a link that leads out of {results_dir}; remove the link")
    return folder / name


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


def _text(name: str) -> str:
    """Spell out bytes that are no UTF-8, which neither JSON nor every file system takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _make_folder(folder: Path) -> None:
    """Make the folder and those above it, so that they outlive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _write_whole(target: Path, *parts: bytes) -> None:
    _write_stream(target, parts)


def _write_stream(target: Path, parts: Iterable[bytes]) -> None:
    """One writer per target: the temporary name is always the same, so that a replay clears what a crash left."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ImageError(f"{path}: this file system takes no name of that length; give a shorter one") from error
        raise ServiceUnavailable(f"cannot write {path}: {error.strerror or error}; free or mend the disk") from error


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else fault["msg"]
