import numpy as np
import pytest
import torch

from semwatch_training.evaluation import training_free
from semwatch_training.evaluation.training_free import ENGINES, bank_of, features, nearest_patch
from semwatch_training.trunks.efficientnet import EfficientNet


@pytest.fixture(scope="module")
def trunk() -> EfficientNet:
    torch.manual_seed(0)
    network = EfficientNet().eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return network


@pytest.mark.parametrize("size", [(128, 160), (100, 131), (64, 64)])
def test_features_cover_the_field_at_its_own_scale(trunk, size) -> None:
    found = features(trunk, np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
    assert found.shape == (-(-size[0] // 8), -(-size[1] // 8), 24 + 48 + 120)
    assert np.allclose(np.linalg.norm(found[..., :24], axis=-1), 1, atol=1e-4)


def motifs(*, spot: bool) -> np.ndarray:
    """Features (30, 40, 24) of columns of four motifs in turn, and perhaps a spot of 3 x 3 that is like none."""
    rng = np.random.default_rng(0)
    of_column = rng.normal(size=(4, 24))[np.arange(40) % 4]
    found = of_column[None] + rng.normal(0, 0.1, (30, 40, 24))
    if spot:
        found[15:18, 20:23] = rng.normal(size=(3, 3, 24))
    return found.astype(np.float32)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_engine_finds_the_place_that_is_like_no_other(engine) -> None:
    found = ENGINES[engine](motifs(spot=True))
    assert found.shape == (30, 40)
    assert found.dtype == np.float32
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert 14 <= y <= 18
    assert 19 <= x <= 23


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("size", [(64, 64), (64, 200)])
def test_a_blank_image_gives_a_finite_map(trunk, engine, size) -> None:
    found = ENGINES[engine](features(trunk, np.zeros(size, np.uint8)))
    assert np.isfinite(found).all()


def test_nearest_patch_is_nothing_where_the_bank_holds_the_image_itself() -> None:
    clean = motifs(spot=False)
    bank = bank_of([clean])
    assert nearest_patch(clean, bank).max() < 1e-2
    found = nearest_patch(motifs(spot=True), bank)
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert 15 <= y <= 17
    assert 20 <= x <= 22


def test_a_bank_keeps_no_more_than_its_most(monkeypatch) -> None:
    monkeypatch.setattr(training_free, "MAX_BANK", 10)
    clean = motifs(spot=False)
    assert bank_of([clean, clean]).shape == (10, 24)
    assert np.array_equal(bank_of([clean]), bank_of([clean]))
