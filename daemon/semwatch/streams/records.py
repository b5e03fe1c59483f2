"""What leaves for Redis: records of crops that no class explains, summaries of files, people's corrections.

A record's fields in the stream; a consumer on another machine needs nothing else:

    id         32 hex digits, made from site, tool, file hash and place: the same defect, the same id in the whole fab
    schema     b"1"; a new optional key in meta keeps the number, anything else raises it
    meta       JSON, the plain fields of ``Record``; ``schemas/unknown.schema.json`` describes it
    features   D little-endian float32
    soft_mask  t x t little-endian float32, row by row
    crop_png   S x S PNG, 8-bit gray

A result summary has ``id``, ``schema`` and ``meta`` alone, described by ``schemas/result_summary.schema.json``. So has
a correction (``schemas/correction.schema.json``), with ``crop_png``, ``soft_mask`` and ``features`` where whoever
corrects has them. Between review and Redis, the ledger's outbox keeps each as one ``pack``ed blob.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema

from semwatch.defects import Box, Defect, Domain, Neighbour, PageReview, Review

UNKNOWNS = "unknowns"
DOUBTFUL = "doubtful"
RESULTS = "results"
CORRECTIONS = "corrections"
NO_CLASSES = ("unknown", "non-decidable")
"""Verdicts: no label says these."""
NAMED = ("known", "novel")
"""Verdicts that a doubtful crop may have."""
SCHEMA = 1
SCHEMA_PATHS = {
    UNKNOWNS: Path(__file__).with_name("schemas") / "unknown.schema.json",
    DOUBTFUL: Path(__file__).with_name("schemas") / "doubtful.schema.json",
    RESULTS: Path(__file__).with_name("schemas") / "result_summary.schema.json",
    CORRECTIONS: Path(__file__).with_name("schemas") / "correction.schema.json",
}
"""The published JSON schema of ``meta``, by stream."""

Fields = dict[bytes, bytes]
"""One stream entry as it is on the wire."""
Message = tuple[str, str, bytes]
"""What the outbox keeps: stream (``UNKNOWNS`` or ``RESULTS``), id, packed fields."""

T = TypeVar("T")

_MAX_CROP_PX = 1024
"""Encoders so far ask for 224; a crop of 4096 in some bytes of PNG would be 17 MB in memory."""
_MAX_META_BYTES, _MAX_META_DEPTH = 1 << 16, 8
"""Ours is 1 to 3 kB, three deep."""
_MAX_FLOATS = 1 << 20
"""Of features or of a soft mask; ours are at most some ten thousand."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", re.ASCII)
_MAX_NUMBER = 2**31
"""No page, place, area or count is as large; 2**31 squared still fits what reads it."""

_OF_DETECTOR = ("field_features", "region_features")
"""Fields of an entry that are there only where the encoder asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One defect that needs a name, with all that learning needs of it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, use_attribute_docstrings=True)

    id: str
    created_utc: str
    """ISO 8601 with seconds and ``Z``: when the file was reviewed."""
    source: str
    """Name of the tool."""
    path: str
    """Relative to the drop folder; bytes that are no UTF-8 are written as ``\\xNN``."""
    sha256: str
    page: int
    defect_id: int
    box_xyxy: Box
    crop_xyxy: Box
    area_px: int
    area_nm2: float | None
    pixel_nm: float | None
    image_score: float
    """The page's raw score."""
    peak_score: float
    kind: Literal["unknown", "non-decidable", "known", "novel"]  # the last two of doubtful crops alone
    nearest: tuple[Neighbour, ...]
    recipe_name: str
    recipe_id: str
    model_versions: Mapping[str, int]
    features: SkipJsonSchema[NDArray[np.float32]]
    """(D,)."""
    soft_mask: SkipJsonSchema[NDArray[np.float32]]
    """(t, t) in [0, 1], aligned with the crop."""
    crop: SkipJsonSchema[NDArray[np.uint8]]
    """(S, S) gray."""
    field_short_px: Annotated[int, Field(ge=1)] | None = None
    """Short side of the field of view, for the size feature of a crop that is embedded again; None in old records."""
    model_hashes: Mapping[str, str] = field(default_factory=dict)
    """Content hash of each of ``model_versions``; empty in old records."""
    site: str = ""
    """Name of the site, unique in the fab; empty in old records."""
    domain: Domain = "not judged"
    """Whether the page looks like those of the processes whose normal images the detector knows."""
    field_features: SkipJsonSchema[NDArray[np.float32] | None] = None
    """(D,) what the encoder was told of the whole field; None where it did not ask, and in old records."""
    region_features: SkipJsonSchema[NDArray[np.float32] | None] = None
    """(C,) what it was told of the defect's places; as above."""
    label: Annotated[str, Field(max_length=64)] = ""
    """What a doubtful crop was called; of the others empty."""


Outcome = Literal["reviewed", "refused", "duplicate"]


@dataclass(frozen=True, slots=True)
class ResultSummary:
    """What became of one file, for systems that follow along; the whole result is on the tool's own disk."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(use_attribute_docstrings=True)

    id: str
    reviewed_utc: str
    source: str
    path: str
    sha256: str
    recipe_name: str
    recipe_id: str
    model_versions: Mapping[str, int]
    image_scores: tuple[float, ...]
    """Raw score of each page that holds an image."""
    n_defects: int
    n_by_kind: Mapping[str, int]
    """Defects by verdict kind."""
    n_by_label: Mapping[str, int]
    """Defects by label, of those that have one."""
    revision: Annotated[int, Field(ge=1)] = 1
    """Of the result: 1 as the line said it, one more each time that a later head judged again."""
    model_hashes: Mapping[str, str] = field(default_factory=dict)
    """Content hash of each of ``model_versions``; empty in old summaries."""
    site: str = ""
    """Name of the site, unique in the fab; empty in old summaries."""
    domains: tuple[Domain, ...] = ()
    """Of each page, see ``Record.domain``; empty in old summaries."""
    n_no_image: int = 0
    """Pages without an image: blank, or an info bar alone; no model was asked."""
    n_by_quality: Mapping[str, int] = field(default_factory=dict)
    """Pages by what is wrong with them; ``blank`` and ``info-bar`` are those without an image."""
    outcome: Outcome = "reviewed"
    """What became of the file. One that was refused, or has the content of another, has no result of its own: all
    counts are 0, but ``n_no_image`` is 1, so that nobody takes it for a clean one."""
    reason: str = ""
    """Why it was refused, or of which image it has the content; empty where it was reviewed."""


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What a person says of one defect: its class, that it is none, or that the line has missed it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, use_attribute_docstrings=True)

    id: str
    """See ``correction_id``."""
    corrected_utc: str
    """ISO 8601 with seconds and ``Z``: when the person said it; of two of one person the later holds."""
    by: Annotated[str, Field(min_length=1, max_length=256)]
    """Login name."""
    source: str
    """Name of the tool."""
    path: str
    """As in a record."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    page: Annotated[int, Field(ge=0)]
    box_xyxy: Box
    """Half-open, pixels of the page as read: the defect's own box, or where the missed defect lies."""
    label: Annotated[str, Field(min_length=1, max_length=64)]
    """Class that it is; ``defect-free``: it is no defect."""
    defect_id: Annotated[int, Field(ge=1)] | None = None
    """Of the defect in the result; None: the line has missed it."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much it counts beside a label that nobody doubts, which is 1."""
    site: str = ""
    """Name of the site, unique in the fab."""
    was: str = ""
    """What the line called it: a label or a kind of verdict; empty where it has missed it or nobody knows."""
    crop_xyxy: Box | None = None
    """Window of the crop, where one comes along."""
    area_px: Annotated[int, Field(ge=0)] = 0
    """Of the mask, where a crop comes along."""
    field_short_px: Annotated[int, Field(ge=1)] | None = None
    """Short side of the field of view, where a crop comes along."""
    model_versions: Mapping[str, int] = field(default_factory=dict)
    """Of the encoder that made the features."""
    model_hashes: Mapping[str, str] = field(default_factory=dict)
    """Content hash of the same."""
    features: SkipJsonSchema[NDArray[np.float32] | None] = None
    """(D,); None where no crop comes along."""
    soft_mask: SkipJsonSchema[NDArray[np.float32] | None] = None
    """(t, t) in [0, 1], aligned with the crop; as above."""
    crop: SkipJsonSchema[NDArray[np.uint8] | None] = None
    """(S, S) gray; as above."""
    field_features: SkipJsonSchema[NDArray[np.float32] | None] = None
    """(D,) what the encoder was told of the whole field, where a crop comes along and it asked."""
    region_features: SkipJsonSchema[NDArray[np.float32] | None] = None
    """(C,) what it was told of the defect's places; as above."""

    @property
    def unknown_id(self) -> str:
        """Id of the same defect in the stream of unknowns; of a missed defect, what it would be."""
        return unknown_id(self.site, self.source, self.sha256, self.page, self.box_xyxy, self.defect_id or 0)


def records(review: Review) -> list[Record]:
    """Make a record of every unknown and every non-decidable defect."""
    return [_record(review, p, d) for p in review.pages for d in p.defects if d.verdict.kind in NO_CLASSES]


def doubtful(review: Review, significance: float) -> list[Record]:
    """Make a record of every named defect whose p-value under its name is up to ``significance``: to learn from."""
    return [
        _record(review, page, defect)
        for page in review.pages
        for defect in page.defects
        if defect.verdict.kind in NAMED
        and any(n.label == defect.verdict.label and n.p_value <= significance for n in defect.verdict.nearest)
    ]


def _record(review: Review, page: PageReview, defect: Defect) -> Record:
    assert defect.verdict.kind != "defect-free"
    assert page.score_map is not None, "a page without an image has no defects"
    page_no = page.micrograph.page
    x0, y0, x1, y1 = page.micrograph.field_xyxy
    return Record(
        id=unknown_id(review.site, review.source, review.sha256, page_no, defect.box_xyxy, defect.defect_id),
        created_utc=review.reviewed_utc,
        source=review.source,
        path=_utf8(review.path),
        sha256=review.sha256,
        page=page_no,
        defect_id=defect.defect_id,
        box_xyxy=defect.box_xyxy,
        crop_xyxy=defect.crop_xyxy,
        area_px=defect.area_px,
        area_nm2=defect.area_nm2,
        pixel_nm=page.micrograph.pixel_nm,
        image_score=page.score_map.raw_score,
        peak_score=defect.peak_score,
        kind=defect.verdict.kind,
        nearest=defect.verdict.nearest,
        recipe_name=review.recipe_name,
        recipe_id=review.recipe_id,
        model_versions=dict(review.model_versions),
        features=defect.features,
        soft_mask=defect.soft_mask,
        crop=defect.crop,
        field_short_px=min(x1 - x0, y1 - y0),
        model_hashes=dict(review.model_hashes),
        site=review.site,
        domain=page.domain,
        field_features=defect.field_features,
        region_features=defect.region_features,
        label=(defect.verdict.label or "") if defect.verdict.kind in NAMED else "",
    )


def is_by(record: Record, model: str, version: int, content_hash: str) -> bool:
    """Whether a record was made with this very version of a model: by content hash, in old records by number."""
    noted = record.model_hashes.get(model)
    return noted == content_hash if noted else record.model_versions.get(model) == version


def encode(record: Record) -> Fields:
    """Write a record as stream fields."""
    _, png = cv2.imencode(".png", record.crop)
    own = {"id", "features", "soft_mask", "crop", *_OF_DETECTOR}
    meta = _record_type().dump_json(record, exclude=own if record.label else own | {"label"})
    of_detector = {name: getattr(record, name) for name in _OF_DETECTOR}
    return {
        b"id": record.id.encode(),
        b"schema": b"%d" % SCHEMA,
        b"meta": meta,
        b"features": record.features.astype("<f4").tobytes(),
        b"soft_mask": record.soft_mask.astype("<f4").tobytes(),
        b"crop_png": png.tobytes(),
        **{name.encode(): values.astype("<f4").tobytes() for name, values in of_detector.items() if values is not None},
    }


def decode(fields: Mapping[bytes, bytes]) -> Record:
    """Read a record of an unknown; nothing in it is trusted.

    Raises:
        ValueError: Not a record of this schema; the message says plainly why.
    """
    record = decode_either(fields)
    if record.kind not in NO_CLASSES or record.label:
        raise ValueError(f"kind is {record.kind} and label {record.label[:40]!r}: no unknown")
    return record


def decode_doubtful(fields: Mapping[bytes, bytes]) -> Record:
    """Read a record of a doubtful crop; nothing in it is trusted.

    Raises:
        ValueError: Not a record of this schema; the message says plainly why.
    """
    record = decode_either(fields)
    if record.kind not in NAMED or not record.label or not record.label.isprintable():
        raise ValueError(f"kind is {record.kind} and label {record.label[:40]!r}: no doubtful crop")
    return record


def decode_either(fields: Mapping[bytes, bytes]) -> Record:
    """Read a record of either stream, as learning keeps it; nothing in it is trusted.

    Raises:
        ValueError: Not a record of this schema; the message says plainly why.
    """
    arrays: dict[str, NDArray[Any]] = {
        "features": _floats(fields, b"features"),
        "soft_mask": _square(_floats(fields, b"soft_mask")),
        "crop": _crop(_field(fields, b"crop_png")),
    }
    arrays |= {name: _floats(fields, name.encode()) for name in _OF_DETECTOR if name.encode() in fields}
    record = _validated(_record_type(), fields, arrays)
    _check_boxes({"box_xyxy": record.box_xyxy, "crop_xyxy": record.crop_xyxy})
    if min(record.page, record.defect_id, record.area_px) < 0:
        raise ValueError("page, defect_id or area_px is negative")
    _check_utc("created_utc", record.created_utc)
    return record


def _check_boxes(boxes: Mapping[str, Box]) -> None:
    for name, (x0, y0, x1, y1) in boxes.items():
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"{name} is {(x0, y0, x1, y1)}: no box")


def _check_utc(name: str, utc: str) -> None:
    if not _UTC.fullmatch(utc):
        raise ValueError(f"{name} is {utc[:40]!r}: wanted 2026-01-31T12:00:00Z")


def encode_result(summary: ResultSummary) -> Fields:
    """Write a result summary as stream fields."""
    meta = _summary_type().dump_json(summary, exclude={"id"})
    return {b"id": summary.id.encode(), b"schema": b"%d" % SCHEMA, b"meta": meta}


def decode_result(fields: Mapping[bytes, bytes]) -> ResultSummary:
    """Read a result summary.

    Raises:
        ValueError: Not a summary of this schema; the message says plainly why.
    """
    return _validated(_summary_type(), fields, {})


def encode_correction(correction: Correction) -> Fields:
    """Write a correction as stream fields."""
    arrays = {name: getattr(correction, name) for name in ("features", "soft_mask", *_OF_DETECTOR)}
    meta = _correction_type().dump_json(correction, exclude={"id", "crop", *arrays})
    fields = {b"id": correction.id.encode(), b"schema": b"%d" % SCHEMA, b"meta": meta}
    fields |= {name.encode(): values.astype("<f4").tobytes() for name, values in arrays.items() if values is not None}
    if correction.crop is not None:
        fields[b"crop_png"] = cv2.imencode(".png", correction.crop)[1].tobytes()
    return fields


def decode_correction(fields: Mapping[bytes, bytes]) -> Correction:
    """Read a correction; nothing in it is trusted.

    Raises:
        ValueError: Not a correction of this schema; the message says plainly why.
    """
    arrays: dict[str, NDArray[Any]] = {}
    of_crop = [name for name in (b"features", b"soft_mask", b"crop_png") if name in fields]
    if of_crop:
        arrays = {
            "features": _floats(fields, b"features"),
            "soft_mask": _square(_floats(fields, b"soft_mask")),
            "crop": _crop(_field(fields, b"crop_png")),
        }
        arrays |= {name: _floats(fields, name.encode()) for name in _OF_DETECTOR if name.encode() in fields}
    found = _validated(_correction_type(), fields, arrays)
    if of_crop and (found.crop_xyxy is None or found.field_short_px is None):
        raise ValueError("a crop comes along without crop_xyxy or field_short_px: where it was cut is not known")
    _check_boxes({"box_xyxy": found.box_xyxy} | ({"crop_xyxy": found.crop_xyxy} if found.crop_xyxy else {}))
    _check_utc("corrected_utc", found.corrected_utc)
    if not found.label.isprintable() or found.label.strip() != found.label or found.label in NO_CLASSES:
        raise ValueError(f"label is {found.label[:40]!r}: wanted a class name, or defect-free where it is no defect")
    if found.id != correction_id(found):
        raise ValueError("id is not the one of this correction: make it with correction_id")
    return found


def correction_id(correction: Correction) -> str:
    """The id of a correction: who says the same of the same defect at the same time says one thing."""
    c = correction
    return _id("correction", c.unknown_id, c.defect_id is None, c.label, c.by, c.corrected_utc, c.weight)


def correction_message(correction: Correction) -> Message:
    """A correction under its id, ready for ``Publisher.publish`` or the ledger's outbox; its own ``id`` is not read."""
    id_ = correction_id(correction)
    return CORRECTIONS, id_, pack(encode_correction(replace(correction, id=id_)))


def correction_line(correction: Correction) -> str:
    """A correction as one line of a file of corrections: ``meta`` and ``id``, without its crop."""
    meta = json.loads(encode_correction(correction)[b"meta"])
    return json.dumps({"id": correction_id(correction), **meta}, ensure_ascii=False)


def parsed_line(line: str) -> Correction:
    """Read what ``correction_line`` wrote.

    Raises:
        ValueError: It is no correction; the message says plainly why.
    """
    meta = _meta(line.encode())
    id_ = str(meta.pop("id", ""))
    return decode_correction({b"id": id_.encode(), b"schema": b"%d" % SCHEMA, b"meta": json.dumps(meta).encode()})


def fault_of(stream: str, fields: Mapping[bytes, bytes]) -> str | None:
    """Why an entry is none of its stream by the format; None where it is sound, or the stream is not one of these."""
    readers: Mapping[str, Callable[[Mapping[bytes, bytes]], object]] = {
        UNKNOWNS: decode, DOUBTFUL: decode_doubtful, RESULTS: decode_result, CORRECTIONS: decode_correction,
    }  # fmt: skip
    reader = readers.get(stream)
    if reader is None:
        return None
    try:
        reader(fields)
    except ValueError as error:
        return str(error)
    return None


def unknown_id(site: str, source: str, sha256: str, page: int, box_xyxy: Box, defect_id: int) -> str:
    """The id of a defect: whichever recipe finds it at this place again, it is the same one."""
    return _id("unknown", site, source, sha256, page, box_xyxy, defect_id)


def result_id(
    site: str, source: str, sha256: str, path: str, recipe_id: str, model_versions: Mapping[str, int], revision: int
) -> str:
    """The id of a result, of a first review and of every revision alike."""
    versions = dict(sorted(model_versions.items()))
    if not site and revision > 1:  # of an older release, which announced its revisions under these ids
        return _id("revised", sha256, source, path, recipe_id, versions, revision)
    return _id("result", site, source, sha256, path, recipe_id, versions, revision)


def pack(fields: Mapping[bytes, bytes]) -> bytes:
    """Join stream fields into one blob: each name and each value behind its length, 4 bytes little-endian.

    >>> unpack(pack({b"id": b"7", b"meta": b""}))
    {b'id': b'7', b'meta': b''}
    """
    return b"".join(struct.pack("<I", len(part)) + part for item in fields.items() for part in item)


def unpack(blob: bytes) -> Fields:
    """Split what ``pack`` joined.

    Raises:
        ValueError: The blob is cut short.
    """
    parts = []
    at = 0
    while at < len(blob):
        end = at + 4 + int.from_bytes(blob[at : at + 4], "little")
        if end > len(blob) or at + 4 > len(blob):
            raise ValueError(f"packed message is cut short at byte {len(blob)}")
        parts.append(blob[at + 4 : end])
        at = end
    return dict(zip(parts[::2], parts[1::2], strict=True))


def json_schemas() -> dict[str, dict[str, Any]]:
    """Describe the ``meta`` JSON of each stream as JSON Schema, by stream name."""
    kinds: dict[str, TypeAdapter[Any]] = {
        UNKNOWNS: _record_type(),
        DOUBTFUL: _record_type(),
        RESULTS: _summary_type(),
        CORRECTIONS: _correction_type(),
    }
    schemas = {stream: kind.json_schema() for stream, kind in kinds.items()}
    for schema in schemas.values():
        del schema["properties"]["id"]  # a field of its own beside meta
        schema["required"].remove("id")
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    del schemas[UNKNOWNS]["properties"]["label"]
    for stream, kinds_of in ((UNKNOWNS, NO_CLASSES), (DOUBTFUL, NAMED)):
        schemas[stream]["properties"]["kind"]["enum"] = list(kinds_of)
    schemas[DOUBTFUL]["required"].append("label")
    return schemas


def schema_text(stream: str) -> str:
    """Return the published JSON schema of one stream's ``meta``.

    After a change of ``Record``, ``ResultSummary`` or ``Correction``:
    ``python -c 'from semwatch.streams import records as r; [p.write_text(r.schema_text(s)) for s, p in
    r.SCHEMA_PATHS.items()]'``.
    """
    return json.dumps(json_schemas()[stream], indent=2, ensure_ascii=False) + "\n"


@cache
def _record_type() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


@cache
def _summary_type() -> TypeAdapter[ResultSummary]:
    return TypeAdapter(ResultSummary)


@cache
def _correction_type() -> TypeAdapter[Correction]:
    return TypeAdapter(Correction)


def _validated(kind: TypeAdapter[T], fields: Mapping[bytes, bytes], arrays: Mapping[str, NDArray[Any]]) -> T:
    if (schema := _field(fields, b"schema")) != b"%d" % SCHEMA:
        raise ValueError(f"schema is {schema[:20]!r}, this reader knows {SCHEMA}: update semwatch here, then requeue")
    id_ = _field(fields, b"id").decode("ascii")
    if not re.fullmatch("[0-9a-f]{32}", id_):
        raise ValueError(f"id {id_[:40]!r} is not 32 hex digits")
    meta = _meta(_field(fields, b"meta"))
    try:
        found = kind.validate_python({**meta, "id": id_, **arrays})
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ValueError(f"meta does not fit: {'; '.join(wrong[:3])}") from None
    plain = kind.dump_python(found, exclude=set(arrays))
    _check_values(plain, _MAX_META_DEPTH)  # text such as "1e999" has become a number
    return found


def _meta(text: bytes) -> dict[str, Any]:
    """Parse ``meta``, no further than a record of ours goes: in size, depth and numbers."""
    if len(text) > _MAX_META_BYTES:
        raise ValueError(f"meta has {len(text)} bytes, over {_MAX_META_BYTES}")
    try:
        meta = json.loads(text, parse_constant=_not_a_number)
    except RecursionError:
        raise ValueError("meta is nested too deep") from None
    if not isinstance(meta, dict):
        raise ValueError("meta is not a JSON object")
    _check_values(meta, _MAX_META_DEPTH)
    return meta


def _not_a_number(text: str) -> float:
    raise ValueError(f"meta holds {text}, which is no number of JSON")


def _check_values(value: object, depth: int) -> None:
    if depth == 0:
        raise ValueError(f"meta is nested deeper than {_MAX_META_DEPTH}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("meta holds a number that is not finite")
    if isinstance(value, int) and abs(value) >= _MAX_NUMBER:
        raise ValueError(f"meta holds a number out of all bounds: {str(value)[:40]}")
    if isinstance(value, str) and _SURROGATE.search(value):
        raise ValueError("meta holds characters that are not Unicode")
    if isinstance(value, dict):
        for key, below in value.items():
            _check_values(key, depth)
            _check_values(below, depth - 1)
    elif isinstance(value, list | tuple):
        for below in value:
            _check_values(below, depth - 1)


def _field(fields: Mapping[bytes, bytes], name: bytes) -> bytes:
    if name not in fields:
        raise ValueError(f"field {name.decode()} is missing")
    return fields[name]


def _floats(fields: Mapping[bytes, bytes], name: bytes) -> NDArray[np.float32]:
    data = _field(fields, name)
    if len(data) > 4 * _MAX_FLOATS:
        raise ValueError(f"{name.decode()} has {len(data)} bytes, over {4 * _MAX_FLOATS}")
    if len(data) % 4:
        raise ValueError(f"{name.decode()} is cut short: {len(data)} bytes are no whole number of float32")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name.decode()} holds values that are not finite")
    return values


def _square(values: NDArray[np.float32]) -> NDArray[np.float32]:
    t = isqrt(values.size)
    if t * t != values.size:
        raise ValueError(f"soft_mask is not square: {values.size} values")
    return values.reshape(t, t)


def _crop(png: bytes) -> NDArray[np.uint8]:
    # The header is read first: a small PNG may ask for gigabytes.
    if len(png) < 26 or png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("crop_png is not a PNG")
    W, H, depth, colour = struct.unpack(">IIBB", png[16:26])
    if not (W == H and 1 <= W <= _MAX_CROP_PX and (depth, colour) == (8, 0)):
        raise ValueError(f"crop_png is {W} x {H}, {depth}-bit, colour type {colour}: wanted square 8-bit gray")
    crop = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if crop is None:
        raise ValueError("crop_png is damaged")
    return np.asarray(crop, np.uint8)


def _id(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _utf8(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
