"""Damaged image files: pages or an ``ImageError``, whatever the bytes, and the next file is decoded as ever."""

import random

import numpy as np
import pytest

from damage import damaged
from image_files import GRAY, VALID
from semwatch.errors import ImageError
from semwatch.intake.decoders import Decoders

SEED = 160
MAX_PX = 1 << 20


def tries(n: int, seed: int) -> tuple[int, int]:
    """Decode n damaged files; return how many gave pages, and how many ended a decoder."""
    dice, files = random.Random(seed), sorted(VALID.values())
    n_read = n_ended = 0
    with Decoders(1, cpu_s=10, max_pixels=MAX_PX) as decoders:
        for _ in range(n):
            data = damaged(dice.choice(files), dice, files)
            try:
                pages = decoders.decode(data, name="x", max_pixels=MAX_PX)
            except ImageError as error:
                n_ended += "the decoder" in str(error)
                continue
            n_read += 1
            for page in pages:
                x0, y0, x1, y1 = page.field_xyxy
                H, W = page.pixels.shape
                assert page.pixels.dtype == np.uint8
                assert 0 <= x0 < x1 <= W
                assert 0 <= y0 < y1 <= H
                assert H * W <= MAX_PX
                assert page.pixel_nm is None or page.pixel_nm > 0
        assert np.array_equal(decoders.decode(VALID["png"], name="x")[0].pixels, GRAY)
    return n_read, n_ended


def test_damaged_files_give_pages_or_a_reason() -> None:
    n_read, n_ended = tries(300, SEED)
    assert 30 < n_read < 270  # some damage is in what nobody reads; most is seen
    assert n_ended == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_many_damaged_files_give_pages_or_a_reason(seed: int) -> None:
    tries(10_000, SEED + 1 + seed)
