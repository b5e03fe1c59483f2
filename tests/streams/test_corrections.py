"""The record of a correction: what is written is read, and what is none is refused in plain words."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import redis

from semwatch.streams import records
from semwatch.streams.records import (
    CORRECTIONS,
    Correction,
    correction_line,
    correction_message,
    decode_correction,
    fault_of,
    parsed_line,
    unpack,
)
from semwatch.streams.unknowns import Consumer, Publisher


def correction(**changes: Any) -> Correction:
    values: dict[str, Any] = {
        "id": "",
        "corrected_utc": "2026-01-03T00:00:00Z",
        "by": "ana",
        "source": "sem-1",
        "path": "lot/1.png",
        "sha256": "ab" * 32,
        "page": 0,
        "box_xyxy": (10, 10, 30, 30),
        "label": "pit",
    }
    return Correction(**{**values, **changes})


def fields_of(**changes: Any) -> dict[bytes, bytes]:
    return unpack(correction_message(correction(**changes))[2])


def with_crop() -> Correction:
    return correction(
        features=np.arange(3, dtype=np.float32),
        soft_mask=np.full((2, 2), 0.5, np.float32),
        crop=np.zeros((8, 8), np.uint8),
        crop_xyxy=(0, 0, 8, 8),
        field_short_px=200,
        field_features=np.arange(4, dtype=np.float32),
    )


def test_correction_is_read_as_it_was_written_with_its_crop_and_without() -> None:
    for one in (correction(defect_id=3, weight=0.5, was="void"), with_crop()):
        read = decode_correction(unpack(correction_message(one)[2]))
        assert repr(read) == repr(replace(one, id=read.id))
        assert (read.crop is None) == (one.crop is None)
        assert parsed_line(correction_line(one)).label == "pit"
    assert read.features is not None
    assert read.features.tolist() == [0, 1, 2]


def test_same_word_has_one_id_and_another_word_another() -> None:
    ids = [correction_message(correction(**changes))[1] for changes in ({}, {}, {"label": "void"}, {"by": "ben"})]
    assert len(set(ids)) == 3
    assert correction(defect_id=2).unknown_id == records.unknown_id("", "sem-1", "ab" * 32, 0, (10, 10, 30, 30), 2)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"label": "unknown"}, "wanted a class name"),
        ({"label": " pit"}, "wanted a class name"),
        ({"label": "a\nb"}, "wanted a class name"),
        ({"by": ""}, "by: String should have at least 1"),
        ({"weight": 0.0}, "weight: Input should be greater than 0"),
        ({"weight": 2.0}, "weight"),
        ({"box_xyxy": (10, 10, 10, 30)}, "box_xyxy is .* no box"),
        ({"corrected_utc": "yesterday"}, "wanted 2026-01-31T12:00:00Z"),
        ({"sha256": "x"}, "sha256"),
        ({"page": -1}, "page"),
        ({"defect_id": 0}, "defect_id"),
    ],
)
def test_what_is_no_correction_is_refused_in_plain_words(changes: dict[str, Any], why: str) -> None:
    fields = fields_of(**changes)
    with pytest.raises(ValueError, match=why):
        decode_correction(fields)
    assert fault_of(CORRECTIONS, fields) is not None


def test_forged_id_and_a_crop_from_nowhere_are_refused() -> None:
    with pytest.raises(ValueError, match="id is not the one of this correction"):
        decode_correction({**fields_of(), b"id": b"0" * 32})
    bare = replace(with_crop(), crop_xyxy=None)
    with pytest.raises(ValueError, match="where it was cut is not known"):
        decode_correction(unpack(correction_message(bare)[2]))
    with pytest.raises(ValueError, match="crop_png is missing"):
        decode_correction({k: v for k, v in unpack(correction_message(with_crop())[2]).items() if k != b"crop_png"})


def test_published_once_and_claimed_by_learning(client: redis.Redis) -> None:
    message = correction_message(correction())
    Publisher(client).publish([message, message])
    (claimed,) = Consumer(client, CORRECTIONS, decode_correction, name="cycle").claim(10, min_idle_s=60)
    assert (claimed.record.id, claimed.record.label) == (message[1], "pit")
    assert json.loads(records.schema_text(CORRECTIONS))["required"]
