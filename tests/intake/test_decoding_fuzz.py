"""Damaged image files: pages or an ``ImageError``, whatever the bytes, and the next file is decoded as ever."""

import pytest

import fuzzing

SEED = 160


def test_damaged_files_give_pages_or_a_reason() -> None:
    tried = fuzzing.images(300, SEED)
    assert 30 < tried.n_read < 270  # some damage is in what nobody reads; most is seen
    assert tried.n_ended == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_many_damaged_files_give_pages_or_a_reason(seed: int) -> None:
    fuzzing.images(10_000, SEED + 1 + seed)
