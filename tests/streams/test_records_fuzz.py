"""Damaged and invented records: a record or a ``ValueError``, whatever the fields."""

import random

import pytest

import fuzzing
from damage import damaged
from semwatch.streams.records import RESULTS, pack, unpack

SEED = 161


def test_spoiled_records_are_read_or_refused_with_a_reason() -> None:
    assert 20 < fuzzing.entries(600, SEED).n_read < 580


def test_damaged_blobs_of_the_outbox_are_read_or_refused() -> None:
    dice, blob = random.Random(SEED), pack(fuzzing.SOUND[RESULTS])
    for _ in range(300):
        try:
            unpack(damaged(blob, dice, [blob]))
        except ValueError:
            continue


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_many_spoiled_records_are_read_or_refused(seed: int) -> None:
    fuzzing.entries(20_000, SEED + 1 + seed)
