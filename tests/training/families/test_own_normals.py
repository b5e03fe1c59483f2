"""Statistics of a process's own normal images against plain numpy, and what few or contaminated ones may do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from semwatch.errors import ConfigError
from semwatch.models.model_repository import Meta, Tensor
from semwatch_training.adapt.own_detector import suspects
from semwatch_training.families.intrinsic import own_normals
from semwatch_training.families.intrinsic.own_normals import OwnNormals, Seen
from semwatch_training.publishing import export

CALIBRATION = np.array([[0.9, 0.5, -3.0], [0.6, 0.04, -0.4]])


def seen(n: int, *, channels: int = 4, seed: int = 0) -> list[Seen]:
    rng = np.random.default_rng(seed)
    return [
        Seen(k, rng.normal(size=(8, 8, channels)).astype(np.float16), rng.normal(-4, 1, (8, 8)).astype(np.float32))
        for k in range(n)
    ]


def fitted(n: int = 6) -> tuple[OwnNormals, list[Seen], np.ndarray]:
    images = seen(n)
    normals = OwnNormals(4, 1, 3, top_cells=3)
    return normals, images, own_normals.fit(images, CALIBRATION, into=normals)


def test_distance_is_that_to_the_nearest_normal_place_in_half_whitened_components() -> None:
    normals, images, _ = fitted()
    cells = np.concatenate([one.places.reshape(-1, 4) for one in images]).astype(np.float64)
    variances, directions = np.linalg.eigh(np.cov(cells.T, bias=True))
    projection = directions / (variances / variances.max()) ** (own_normals.WHITENING / 2)
    asked = np.random.default_rng(7).normal(size=(3, 4))
    expected = np.linalg.norm((asked[:, None] - cells) @ projection, axis=2).min(axis=1)
    places = torch.from_numpy(asked.astype(np.float32).T[None, :, None])
    assert len(cells) < own_normals.KEPT_PLACES, "all of them are kept"
    assert np.allclose(normals.distance(places)[0, 0].numpy(), expected, rtol=1e-3)
    assert normals.distance(places + 50).min() > 10 * expected.max()


def test_every_image_gives_as_many_places_however_large_it_is() -> None:
    small, large = (
        Seen(k, np.full((s, s, 4), k, np.float16), np.zeros((s, s), np.float32)) for k, s in ((0, 8), (1, 64))
    )
    normals = OwnNormals(4, 1, 3, top_cells=3)
    own_normals.fit([small, large, large._replace(image=2)], CALIBRATION, into=normals)
    first = normals.distance(torch.zeros(1, 4, 1, 1)).item()
    assert first == pytest.approx(0, abs=1e-3)
    origin = (torch.zeros(4) - normals.mean) @ normals.projection
    n_of_small = (torch.cdist(normals.kept, origin[None])[:, 0] < 1e-3).sum().item()
    assert n_of_small == pytest.approx(own_normals.KEPT_PLACES / 3, abs=1)


def test_normal_image_is_judged_by_the_others_alone() -> None:
    """An outlier among the normals is near the places that it gave itself, and those do not judge it."""
    images = seen(6)
    images[0] = images[0]._replace(places=images[0].places + np.float16(20))
    normals = OwnNormals(4, 1, 3, top_cells=3)
    logits = own_normals.fit(images, CALIBRATION, into=normals)
    assert normals.of_place[1, 0] > 0.3, "to its own places each would be at no distance"
    assert logits[0] > logits[1:].max() + 1


def test_view_is_judged_and_not_learnt_from() -> None:
    images = seen(4)
    view = images[0]._replace(kind="view", places=images[0].places + np.float16(30))
    alone, with_view = OwnNormals(4, 1, 3, top_cells=3), OwnNormals(4, 1, 3, top_cells=3)
    before = own_normals.fit(images, CALIBRATION, into=alone)
    after = own_normals.fit([*images, view], CALIBRATION, into=with_view)
    assert torch.equal(alone.mean, with_view.mean)
    assert torch.equal(alone.kept, with_view.kept)
    assert np.array_equal(before, after[:4])
    assert after[4] > before.max()


def test_distance_and_branch_count_alike_in_their_spreads() -> None:
    normals, images, _ = fitted()
    (_, spread), (mean, far_spread) = normals.of_place.tolist()
    places = torch.from_numpy(images[0].places.astype(np.float32)).permute(2, 0, 1)[None]
    branch = torch.from_numpy(images[0].branch)[None]
    logits, raw = normals(places, branch, torch.from_numpy(CALIBRATION.astype(np.float32)))
    both = branch + spread * (normals.distance(places) - mean) / far_spread
    assert torch.allclose(logits, 0.9 * both - 3.0)
    assert raw.shape == (1,)


def test_too_few_images_keep_no_places() -> None:
    with pytest.raises(ConfigError, match="2 normal images: to keep places of them takes 3"):
        own_normals.fit(seen(2), CALIBRATION, into=OwnNormals(4, 1, 3, top_cells=3))


@pytest.mark.parametrize("n", [1, 12])
def test_own_fields_are_known_and_strange_ones_fall_on_beyond_the_last(n: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6)).astype(np.float32)
    normals = OwnNormals(1, 40, 6, top_cells=3)
    own_normals.fit_fields(rows, np.arange(40) % n, into=normals)
    own, far, farther = (normals.domain_p(torch.from_numpy(rows[:1] + shift)).item() for shift in (0.1, 30.0, 1000.0))
    assert own > 0.3
    assert 0.01 > far > farther > 0, "40 rows alone could not go below 1 in 41"


def test_fields_that_are_all_alike_leave_p_values_finite() -> None:
    normals = OwnNormals(1, 5, 3, top_cells=3)
    own_normals.fit_fields(np.ones((5, 3), np.float32), np.arange(5), into=normals)
    found = normals.domain_p(torch.tensor([[1.0, 1, 1], [9.0, 9, 9]]))
    assert torch.isfinite(found).all()
    assert found[0] > found[1]


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_defects_among_the_normals_are_suspected_and_clean_ones_are_not(share: float) -> None:
    rng = np.random.default_rng(1)
    scores = np.logaddexp(0, rng.normal(0, 0.4, 60))
    assert suspects(scores) == []
    bad = np.arange(round(share * 60))
    scores[bad] = np.logaddexp(0, rng.normal(6, 1, len(bad)))
    assert suspects(scores) == bad.tolist()


def test_few_normals_suspect_nobody() -> None:
    assert suspects(np.array([0.1, 0.1, 0.1, 50.0])) == []


class Alone(nn.Module):
    """The statistics without the network around them."""

    def __init__(self, normals: OwnNormals) -> None:
        super().__init__()
        self.normals = normals
        self.register_buffer("calibration", torch.from_numpy(CALIBRATION.astype(np.float32)))

    def forward(
        self, places: torch.Tensor, branch: torch.Tensor, description: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return *self.normals(places, branch, self.calibration), self.normals.domain_p(description)


def test_export_answers_what_torch_computes(tmp_path: Path) -> None:
    normals, _, _ = fitted()
    rng = np.random.default_rng(0)
    described = OwnNormals(4, 7, 3, top_cells=3)
    own_normals.fit_fields(rng.normal(size=(7, 3)).astype(np.float32), np.arange(7), into=described)
    for name in ("mean", "projection", "kept", "of_place"):
        getattr(described, name).copy_(getattr(normals, name))
    graph = Alone(described).eval()
    inputs = {"places": (4, 8, 8), "branch": (8, 8), "description": (3,)}
    outputs = {"logits": (8, 8), "raw": (), "domain_p": ()}
    meta = Meta(
        model="detector",
        created_utc="2026-01-01T00:00:00Z",
        inputs={name: Tensor(dtype="float32", shape=shape) for name, shape in inputs.items()},
        outputs={name: Tensor(dtype="float32", shape=shape) for name, shape in outputs.items()},
    )
    export.to_onnx(graph, meta, tmp_path / "alone.onnx")
    batches = [export.random_inputs(meta, batch=batch, seed=batch) for batch in (1, 3)]
    assert export.parity(graph, meta, tmp_path / "alone.onnx", batches).worst < export.MAX_RELATIVE_DIFFERENCE
