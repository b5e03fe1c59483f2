"""Damaged and invented records: a record or a ``ValueError``, whatever the fields."""

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from damage import damaged
from factories import make_review, make_verdict, result_summary
from semwatch.streams.records import (
    RESULTS,
    UNKNOWNS,
    Fields,
    decode,
    decode_result,
    encode,
    fault_of,
    pack,
    records,
    unpack,
)

SEED = 161
REVIEW = make_review(1, verdicts=[make_verdict("unknown")])
SOUND = {UNKNOWNS: encode(records(REVIEW)[0]), RESULTS: result_summary(REVIEW)}
READERS = {UNKNOWNS: decode, RESULTS: decode_result}
ODD: tuple[Any, ...] = (
    None, True, -1, 2**31, 2**70, 1e308, float("inf"), float("nan"), "", "x" * 300, "\ud800", "\x00",
    [], {}, [[[]]], [1e400], {"a": {"b": {}}}, "1e999",
)  # fmt: skip


def spoiled(fields: Fields, dice: random.Random) -> Fields:
    """Damage the bytes of a field, or put an odd value for a key of ``meta``."""
    spoilt = dict(fields)
    if dice.random() < 0.5:
        name = dice.choice(sorted(spoilt))
        spoilt[name] = damaged(spoilt[name] or b"\0", dice, list(fields.values()))
    else:
        meta = json.loads(spoilt[b"meta"])
        meta[dice.choice(sorted(meta))] = dice.choice(ODD)
        spoilt[b"meta"] = json.dumps(meta).encode()
    if dice.random() < 0.1:
        del spoilt[dice.choice(sorted(spoilt))]
    return spoilt


def tries(n: int, seed: int) -> int:
    """Read n spoiled entries; return how many were sound."""
    dice, n_sound = random.Random(seed), 0
    for _ in range(n):
        stream = dice.choice([UNKNOWNS, RESULTS])
        fields = spoiled(SOUND[stream], dice)
        fault = fault_of(stream, fields)
        if fault is not None:
            assert fault
            continue
        n_sound += 1
        found: Any = READERS[stream](fields)
        json.dumps(json.loads(fields[b"meta"]), allow_nan=False).encode()
        if stream == UNKNOWNS:
            assert all(math.isfinite(x) for x in (found.image_score, found.peak_score))
            assert np.isfinite(found.features).all()
            assert found.crop.shape[0] == found.crop.shape[1] <= 1024
    return n_sound


def test_spoiled_records_are_read_or_refused_with_a_reason() -> None:
    assert 20 < tries(600, SEED) < 580


def test_damaged_blobs_of_the_outbox_are_read_or_refused() -> None:
    dice, blob = random.Random(SEED), pack(SOUND[RESULTS])
    for _ in range(300):
        try:
            unpack(damaged(blob, dice, [blob]))
        except ValueError:
            continue


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_many_spoiled_records_are_read_or_refused(seed: int) -> None:
    tries(20_000, SEED + 1 + seed)
