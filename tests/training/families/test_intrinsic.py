"""The image's own statistics against plain numpy, and the detector that is made of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from semwatch.errors import ConfigError
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.intrinsic import own_statistics, train_intrinsic
from semwatch_training.families.intrinsic.export import exported
from semwatch_training.families.intrinsic.intrinsic_detector import (
    IntrinsicDetector,
    IntrinsicForm,
    IntrinsicGraph,
    OwnEvidence,
)
from semwatch_training.publishing.export import parity, random_inputs, to_onnx
from semwatch_training.trunks.efficientnet import FIELD_WIDTH, PATCH_WIDTH
from tiny_models import convolutional

FORM = IntrinsicForm(branch=BranchForm(input_px=64, projection=4, width=8, dilations=(1,)), keys=5)


def graph(seed: int = 0) -> IntrinsicGraph:
    torch.manual_seed(seed)
    return IntrinsicGraph(convolutional(), IntrinsicDetector(FORM)).eval()


def cells(seed: int = 0, size_hw: tuple[int, int] = (12, 20), channels: int = 6) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(size_hw[0] * size_hw[1], channels)) @ rng.normal(size=(channels, channels))
    return torch.from_numpy(mixed.T.reshape(1, channels, *size_hw).astype(np.float32))


def test_inverse_is_the_inverse() -> None:
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    matrix = rotation @ np.diag(np.geomspace(1e-3, 1.0, 40)) @ rotation.T
    found = own_statistics.inverse(torch.from_numpy(matrix[None].astype(np.float32)), torch.full((1, 1, 1), 1e-3))
    assert np.abs(found[0].numpy() @ matrix - np.eye(40)).max() < 1e-2


@pytest.mark.parametrize("step", [1, 2, 3])
def test_distance_is_that_of_the_trimmed_gaussian_of_every_so_many_places(step: int) -> None:
    side = step * own_statistics.FITTED
    x = cells(size_hw=(side, side))
    places = x[0].flatten(1).T.double().numpy()
    rows = x[0, :, ::step, ::step].flatten(1).T.double().numpy()
    kept = np.ones(len(rows), bool)
    for turn in range(own_statistics.REFITS + 1):
        mean = rows[kept].mean(axis=0)
        covariance = np.cov(rows[kept].T, bias=True)
        scale = np.trace(covariance) / len(covariance)
        shrunk = (1 - own_statistics.SHRINKAGE) * covariance + own_statistics.SHRINKAGE * scale * np.eye(
            len(covariance)
        )
        squared = np.einsum("ni,ij,nj->n", rows - mean, np.linalg.inv(shrunk), rows - mean)
        if turn < own_statistics.REFITS:
            kept = squared <= np.sort(squared)[int(np.ceil(own_statistics.TYPICAL * len(rows))) - 1]
    away = places - mean
    distance = np.sqrt(np.einsum("ni,ij,nj->n", away, np.linalg.inv(shrunk), away))
    expected = distance / distance.mean()
    assert np.allclose(own_statistics.mahalanobis(x)[0, 0].flatten().numpy(), expected, rtol=0.02)


def test_strange_place_is_farthest() -> None:
    x = cells(size_hw=(16, 16))
    x[0, :, 5, 9] += 30
    assert own_statistics.mahalanobis(x)[0, 0].argmax() == 5 * 16 + 9


@pytest.mark.parametrize("level", [0, 128, 255])
def test_constant_image_has_a_finite_even_map(level: int) -> None:
    values, raw, *_ = graph()(torch.full((1, 96, 128), level, dtype=torch.uint8))
    assert torch.isfinite(values).all()
    assert torch.isfinite(raw).all()


def test_gaussian_is_refitted_on_the_typical_share_of_places_and_on_all_where_all_are_alike() -> None:
    n = own_statistics.FITTED**2
    squared = torch.rand(3, n, 1) * torch.tensor([1.0, 50.0, 1e-3])[:, None, None]
    kept = own_statistics.typical(squared)
    assert kept.sum(dim=(1, 2)).tolist() == [n - round(0.2 * n)] * 3
    assert all(values[k == 1].max() < values[k == 0].min() for values, k in zip(squared, kept, strict=True))
    assert own_statistics.typical(torch.ones(1, n, 1)).all()


def test_like_places_are_sought_outside_the_neighbourhood() -> None:
    x = torch.zeros(1, 3, 20, 20)
    x[0, 0, 10, 10] = 4.0
    found = own_statistics.like_places(x, keys=20, reach=3)[0, 0]
    assert found[10, 10] == pytest.approx(16 / 3)
    assert found[0, 0] == 0
    x[0, 0, 11, 10] = 4.0  # a neighbour is no proof
    assert own_statistics.like_places(x, keys=20, reach=3)[0, 0, 10, 10] == pytest.approx(16 / 3)
    x[0, 0, 2, 2] = 4.0  # a like elsewhere is
    assert own_statistics.like_places(x, keys=20, reach=3)[0, 0, 10, 10] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 256), (160, 96)])
def test_map_has_a_cell_for_eight_pixels(size_hw: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (2, *size_hw), dtype=torch.uint8)
    values, raw, domain_p, of_field, patches = graph()(image)
    assert values.shape == (2, size_hw[0] // 8, size_hw[1] // 8)
    assert raw.shape == domain_p.shape == (2,)
    assert of_field.shape == (2, FIELD_WIDTH)
    assert patches.shape == (2, PATCH_WIDTH, size_hw[0] // 16, size_hw[1] // 16)
    alone, *_ = graph()(image[1:])
    assert torch.allclose(values[1:], alone, atol=1e-4), "an image is judged by itself"


@pytest.mark.slow
def test_export_takes_any_size(tmp_path: Path) -> None:
    made = exported(graph(), normal_scores=[0.1])
    to_onnx(made.graph, made.meta, tmp_path / "model.onnx")
    sizes = [random_inputs(made.meta, batch=n, seed=n, open_px=side) for n, side in ((1, 64), (2, 272))]
    assert parity(made.graph, made.meta, tmp_path / "model.onnx", sizes).worst < 1e-3


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    detector = IntrinsicDetector(FORM)
    values = [[0.5, 0.25, -1.0], [2.0, 0.0, 1.5]]
    detector.calibration.copy_(torch.tensor(values))
    train_intrinsic.save(detector, path, normal_scores=[0.1, 0.2], provenance={"seed": 1})
    loaded, scores, provenance = train_intrinsic.load(path)
    assert loaded.form == FORM
    assert loaded.calibration.tolist() == values
    assert (scores, provenance) == ([0.1, 0.2], {"seed": 1})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError):
        train_intrinsic.load(path)


def test_calibration_takes_what_tells_defects_from_normal_places() -> None:
    """An untrained branch says nothing; a bright spot on noise is unusual in its image."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        image = rng.integers(90, 110, (320, 320), dtype=np.uint8)
        mask = np.zeros((320, 320), bool)
        y, x = 8 * rng.integers(4, 34, 2)
        mask[y : y + 16, x : x + 16] = True
        image[mask] = 250
        pairs.append((image, mask))
        pairs.append((rng.integers(90, 110, (320, 320), dtype=np.uint8), np.zeros((320, 320), bool)))
    detector = IntrinsicDetector(replace(FORM)).eval()
    evidence = OwnEvidence(convolutional(), FORM).eval()
    train_intrinsic.calibrate(detector, evidence, pairs, len(pairs), seed=0, progress=lambda *_: None)
    (_, own_weight, offset), _ = detector.calibration.tolist()
    assert own_weight > 0.2
    assert offset < 0
    nothing = [(image, np.zeros_like(mask)) for image, mask in pairs]
    with pytest.raises(ConfigError, match="none of one kind"):
        train_intrinsic.calibrate(detector, evidence, nothing, len(pairs), seed=0, progress=lambda *_: None)


def test_process_is_known_by_its_normal_fields() -> None:
    rng = np.random.default_rng(0)

    def stripes(period: int) -> np.ndarray:
        level = 100 + 60 * (np.arange(128) // period % 2)[None] + rng.normal(0, 8, (128, 128))
        return np.clip(level, 0, 255).astype(np.uint8)

    judge = IntrinsicGraph(convolutional(), IntrinsicDetector(replace(FORM, domain_fields=40))).eval()
    image = torch.from_numpy(stripes(8)[None])
    assert judge(image)[2].item() == 1, "without normal fields every process counts as known"
    train_intrinsic.learn_domain(judge, [stripes(8) for _ in range(40)], progress=lambda *_: None)
    same = [train_intrinsic.own_scale(judge)(stripes(8)).domain_p for _ in range(20)]
    other = [train_intrinsic.own_scale(judge)(stripes(13)).domain_p for _ in range(5)]
    assert np.mean(same) > 0.25
    assert other == [pytest.approx(1 / 41)] * 5


def test_logistic_weights_are_never_negative() -> None:
    rng = np.random.default_rng(0)
    cells, truth = rng.normal(size=(500, 2)), rng.random(500) < 0.3
    cells[truth, 0] += 2
    cells[truth, 1] -= 2
    weight, other, _ = train_intrinsic.logistic(cells, truth.astype(float))
    assert weight > 1
    assert 0 <= other < 0.01
