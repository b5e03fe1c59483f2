import numpy as np
import pytest
import torch

from semwatch_training.evaluation import training_free
from semwatch_training.evaluation.training_free import AXES, ENGINES, bank_of, features, nearest_patch
from semwatch_training.trunks.efficientnet import EfficientNet


@pytest.fixture(scope="module")
def trunk() -> EfficientNet:
    torch.manual_seed(0)
    network = EfficientNet().eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return network


def stripes(height: int, width: int, *, spot: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    wave = 120 + 60 * np.sin(np.arange(width) / 4)
    image = (wave + rng.normal(0, 4, (height, width))).clip(0, 255).astype(np.uint8)
    if spot:
        image[64:88, 96:120] = rng.integers(0, 256, (24, 24))
    return image


@pytest.mark.parametrize("size", [(128, 160), (100, 131), (64, 64)])
def test_features_cover_the_field_at_its_own_scale(trunk, size) -> None:
    found = features(trunk, stripes(*size, spot=False))
    assert found.shape == (-(-size[0] // 8), -(-size[1] // 8), 24 + 48 + 120)
    assert np.allclose(np.linalg.norm(found[..., :24], axis=-1), 1, atol=1e-4)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_every_engine_finds_a_spot_among_stripes(trunk, engine) -> None:
    found = ENGINES[engine](features(trunk, stripes(160, 200, spot=True)))
    assert found.shape == (20, 25)
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert 7 <= y <= 11
    assert 11 <= x <= 15


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("size", [(64, 64), (64, 200)])
def test_a_blank_image_gives_a_finite_map(trunk, engine, size) -> None:
    found = ENGINES[engine](features(trunk, np.zeros(size, np.uint8)))
    assert np.isfinite(found).all()


def test_nearest_patch_is_nothing_where_the_bank_holds_the_image_itself(trunk) -> None:
    clean = features(trunk, stripes(128, 160, spot=False))
    bank = bank_of([clean])
    assert nearest_patch(clean, bank).max() < 1e-2
    found = nearest_patch(features(trunk, stripes(128, 160, spot=True)), bank)
    y, x = np.unravel_index(found.argmax(), found.shape)
    assert 7 <= y <= 11
    assert 11 <= x <= 15


def test_a_bank_keeps_no_more_than_its_most(trunk, monkeypatch) -> None:
    monkeypatch.setattr(training_free, "MAX_BANK", 10)
    clean = features(trunk, stripes(128, 160, spot=False))
    assert bank_of([clean, clean]).shape == (10, 192)
    assert np.array_equal(bank_of([clean]), bank_of([clean]))
    assert AXES < 192
