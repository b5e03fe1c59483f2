"""The memory of normal patches: fitting, scoring, files, and the exported graph."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from semwatch.errors import ConfigError
from semwatch.line.scaling import resize
from semwatch.models.model_repository import Meta
from semwatch.models.model_repository import Tensor as TensorMeta
from semwatch_training.families.memory import fit_memory, memory_detector
from semwatch_training.families.memory.fit_memory import fit, principal_components
from semwatch_training.families.memory.memory_detector import (
    MemoryForm,
    MemoryGraph,
    SelfMatchingGraph,
    Trunks,
    load,
    nearest_distances,
    resampling,
    save,
    scored,
    self_distances,
)
from semwatch_training.publishing import export
from semwatch_training.publishing.export import parity, random_inputs
from semwatch_training.system import weights_file
from tiny_models import convolutional, trunk

FORM = MemoryForm(
    input_px=112, sizes_px=(56, 64), vit_layers=(0, 1), components=(24, 32), alike=0, patches=200, candidates=300
)
"""A coreset; the memory of whole images has its own tests."""


@pytest.fixture(scope="module")
def trunks() -> Trunks:
    return Trunks(trunk(), convolutional())


def textures(n: int, seed: int = 0) -> list[np.ndarray]:
    """Stripes of varying phase with noise, (120, 96)."""
    rng = np.random.default_rng(seed)
    x = np.arange(96)
    return [
        (120 + 50 * np.sin(x / 4 + rng.uniform(0, 6)) + rng.normal(0, 5, (120, 96))).clip(0, 255).astype(np.uint8)
        for _ in range(n)
    ]


def batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack([resize(image, (FORM.input_px, FORM.input_px)) for image in images]))


@pytest.fixture(scope="module")
def memory(trunks: Trunks) -> memory_detector.Memory:
    return fit(textures(20), trunks, FORM)


def test_no_image_is_refused(trunks: Trunks) -> None:
    with pytest.raises(ConfigError, match="at least one normal image"):
        fit([], trunks, FORM)


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 9), np.uint8), np.zeros((9, 9)), np.zeros((9, 9, 3), np.uint8)],
    ids=["empty", "float", "rgb"],
)
def test_an_image_of_another_type_is_refused_by_number(trunks: Trunks, image: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="image 1 is"):
        fit([textures(1)[0], image], trunks, FORM)


@pytest.mark.parametrize(("groups", "said"), [([1], "1 groups for 2 images"), ([3, 3], "all images are of one group")])
def test_groups_that_do_not_fit_are_refused(trunks: Trunks, groups: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fit(textures(2), trunks, FORM, groups=groups)


def test_features_that_are_not_finite_are_refused(trunks: Trunks) -> None:
    broken = trunk()
    broken.cls_token.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        fit(textures(2), Trunks(broken, trunks.efficientnet), FORM)


def test_a_defect_scores_above_normal_images_and_where_it_is(trunks: Trunks, memory: memory_detector.Memory) -> None:
    clean = textures(8, seed=50)
    marked = [image.copy() for image in clean]
    for image in marked:
        image[60:90, 24:48] = 250
    graph = MemoryGraph(trunks, memory).eval()
    (_, calm), (maps, raised) = graph(batch(clean)), graph(batch(marked))
    assert roc_auc_score([0] * 8 + [1] * 8, torch.cat((calm, raised)).numpy()) == 1.0
    peaks = maps.flatten(1).argmax(dim=1)
    rows, columns = peaks // FORM.side, peaks % FORM.side
    assert (abs(rows - 2.5) <= 1).all()
    assert (abs(columns - 1.5) <= 1).all()


def test_normal_scores_are_those_of_images_the_memory_has_not_seen(trunks: Trunks) -> None:
    images = textures(12)
    whole = fit(images, trunks, replace(FORM, patches=10**6))
    own = MemoryGraph(trunks, whole)(batch(images))[1]
    new = MemoryGraph(trunks, whole)(batch(textures(12, seed=90)))[1]
    scores = torch.tensor(whole.normal_scores)
    assert len(scores) == 12
    # With its own patches an image is at distance about nil; scored by other folds it looks like a new one.
    assert own.max() < scores.min()
    assert abs(scores.median() - new.median()) < 0.25 * (new.median() - own.median())


def test_images_of_one_group_do_not_vouch_for_each_other(trunks: Trunks) -> None:
    twins = [image for image in textures(6) for _ in range(2)]
    form = replace(FORM, patches=10**6)
    alone = fit(twins, trunks, form)
    grouped = fit(twins, trunks, form, groups=[index // 2 for index in range(12)])
    # Ungrouped, most twins fall into different folds and are found again.
    assert max(grouped.normal_scores) > 0
    assert alone.banks[0].centre < 0.7 * grouped.banks[0].centre


def test_folds_keep_owners_together_and_are_as_many_as_can_be() -> None:
    rng = np.random.default_rng(0)
    folds = fit_memory._folds(np.array([5, 5, 9, 9, 1, 1, 3, 3]), 3, rng)
    assert (folds[::2] == folds[1::2]).all()
    assert set(folds) == {0, 1, 2}
    assert set(fit_memory._folds(np.array([5, 9]), 4, rng)) == {0, 1}


def test_identical_images_give_a_defined_memory(trunks: Trunks) -> None:
    image = textures(1)[0]
    memory = fit([image] * 10, trunks, replace(FORM, patches=10**6))
    score_map, raw = MemoryGraph(trunks, memory)(batch([image, textures(1, seed=3)[0]]))
    assert score_map.isfinite().all()
    assert raw[1] > raw[0]


def test_blank_images_give_a_defined_memory(trunks: Trunks) -> None:
    memory = fit([np.zeros((64, 64), np.uint8)] * 10, trunks, FORM)
    score_map, _ = MemoryGraph(trunks, memory)(batch([np.zeros((64, 64), np.uint8), *textures(1)]))
    assert score_map.isfinite().all()


@pytest.mark.parametrize("n", [1, 4])
def test_a_few_images_are_remembered_from_all_sides(trunks: Trunks, n: int) -> None:
    memory = fit(textures(n), trunks, replace(FORM, patches=10**6))
    assert len(memory.banks[1].patches) == n * 8 * FORM.side**2
    assert memory.normal_scores == ()
    graph = MemoryGraph(trunks, memory)
    clean, turned = textures(1)[0], np.rot90(resize(textures(1)[0], (112, 112))).copy()
    marked = clean.copy()
    marked[60:90, 24:48] = 250
    raw = graph(batch([clean, turned, marked]))[1]
    assert raw[2] > raw[:2].max()


def test_every_image_gives_the_same_number_of_patches() -> None:
    rng = np.random.default_rng(0)
    images, patches = fit_memory._drawn(7, 5, 17, rng)
    assert sorted(np.bincount(images, minlength=7)) == [2, 2, 2, 2, 3, 3, 3]
    assert len(set(zip(images.tolist(), patches.tolist(), strict=True))) == 17
    assert len(fit_memory._drawn(7, 5, 99, rng)[0]) == 35


def test_a_coreset_keeps_what_is_rare_and_takes_nothing_twice() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(0, 0.1, (300, 8))).float()
    features[7], features[200] = 5.0, -5.0
    chosen = fit_memory.coreset(features, 5, rng).tolist()
    assert {7, 200} <= set(chosen)
    assert len(set(fit_memory.coreset(torch.ones(6, 8), 4, rng).tolist())) == 4
    assert fit_memory.coreset(features[:3], 9, rng).tolist() == [0, 1, 2]


def test_the_same_seed_remembers_the_same_and_another_does_not(trunks: Trunks) -> None:
    first, again, other = (fit(textures(10), trunks, FORM, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.banks[0].patches, again.banks[0].patches)
    assert first.normal_scores == again.normal_scores
    assert not torch.equal(first.banks[0].patches, other.banks[0].patches)


def test_progress_tells_every_image(trunks: Trunks) -> None:
    told: list[tuple[str, int, int]] = []
    fit(textures(9), trunks, FORM, progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "features"] == [("features", i, 9) for i in range(1, 10)]
    assert told[-1] == ("held-out distances", 9, 9)


def test_nearest_distances_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    queries, patches = rng.normal(size=(2, 9, 5)).astype(np.float32), rng.normal(size=(30, 5)).astype(np.float32)
    expected = NearestNeighbors(n_neighbors=1).fit(patches).kneighbors(queries.reshape(-1, 5))[0].reshape(2, 9)
    found = nearest_distances(torch.from_numpy(queries), torch.from_numpy(patches)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_principal_components_keep_distances_or_whiten_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 4) * torch.tensor([5.0, 2.0, 1.0, 0.5]) + 3
    mean, isometry = principal_components(x, 4)
    np.testing.assert_allclose(((x - mean) @ isometry).norm(dim=1), (x - mean).norm(dim=1), rtol=1e-4)
    _, whitener = principal_components(x, 2, whitening=1.0)
    np.testing.assert_allclose(np.cov((x - mean) @ whitener, rowvar=False, bias=True), np.eye(2), atol=1e-3)


def test_principal_components_of_one_feature_are_finite() -> None:
    assert principal_components(torch.ones(1, 4), 9, whitening=1.0)[1].isfinite().all()


def test_self_distances_find_the_odd_one_and_ask_no_neighbour() -> None:
    features = torch.zeros(1, 36, 3)
    features[..., 0] = 1
    features[0, 14:16] = torch.tensor([0.0, 1.0, 0.0])  # two alike side by side must not vouch for each other
    found = self_distances(features, nearest=3, apart=2)[0]
    assert found[14:16].tolist() == [1.0, 1.0]
    assert found.sum() == 2.0


def test_self_distances_of_a_tiny_grid_ask_those_there_are() -> None:
    assert self_distances(torch.nn.functional.normalize(torch.ones(1, 9, 2), dim=-1), nearest=50, apart=1).max() < 1e-6


def test_self_matching_scores_an_odd_spot_highest(trunks: Trunks) -> None:
    image = textures(1)[0]
    image[60:90, 24:48] = 250
    graph = SelfMatchingGraph(trunks, FORM, nearest=5)
    maps, raw = graph(batch([textures(1)[0], image]))
    assert maps.shape == (2, 4, 4)
    assert raw[1] > raw[0]


def test_image_score_is_the_mean_of_the_top_cells() -> None:
    maps = torch.arange(18.0).reshape(2, 3, 3)
    assert scored(maps, replace(FORM, smoothing=0, top_cells=2))[1].tolist() == [7.5, 16.5]
    assert scored(maps, replace(FORM, smoothing=0, top_cells=99))[1].tolist() == [4.0, 13.0]


def test_smoothing_spreads_a_peak_and_keeps_a_flat_map() -> None:
    maps = torch.ones(1, 9, 9)
    form = replace(FORM, smoothing=1.0)
    np.testing.assert_allclose(scored(maps, form)[0], maps, rtol=1e-5)
    maps[0, 4, 4] = 10
    assert 1 < scored(maps, form)[0][0, 4, 5] < scored(maps, form)[0].max() < 10


@pytest.mark.parametrize(("n_in", "n_out"), [(448, 224), (448, 256), (100, 7), (5, 5)])
def test_resampling_down_is_area_averaging(n_in: int, n_out: int) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (n_in, n_in)).astype(np.float32)
    matrix = resampling(n_in, n_out).numpy()
    expected = cv2.resize(image, (n_out, n_out), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=0.01)


def test_resampling_up_is_bilinear() -> None:
    image = np.random.default_rng(0).uniform(0, 255, (20, 20)).astype(np.float32)
    matrix = resampling(20, 33).numpy()
    expected = cv2.resize(image, (33, 33), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=0.01)


def test_a_saved_memory_scores_as_before(tmp_path: Path, trunks: Trunks, memory: memory_detector.Memory) -> None:
    save(tmp_path / "memory.safetensors", memory, provenance={"data": "stripes"})
    again = load(tmp_path / "memory.safetensors")
    assert again.form == memory.form
    assert again.normal_scores == pytest.approx(memory.normal_scores)
    expected, found = (MemoryGraph(trunks, m)(batch(textures(2, seed=7))) for m in (memory, again))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)


def test_files_of_no_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no memory weights"):
        load(tmp_path / "absent.safetensors")
    for header in ({}, {"form": "{"}, {"form": '{"colour": 3}'}, {"form": "{}"}):
        weights_file.write(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, header)
        with pytest.raises(ConfigError, match="holds no memory"):
            load(tmp_path / "other.safetensors")


def meta() -> Meta:
    return Meta(
        model="detector",
        created_utc="2026-01-01T00:00:00Z",
        inputs={"image": TensorMeta(dtype="uint8", shape=(112, 112))},
        outputs={
            "score_map": TensorMeta(dtype="float32", shape=(4, 4)),
            "raw_score": TensorMeta(dtype="float32", shape=()),
        },
    )


def test_the_exported_graph_computes_the_same_at_any_batch(
    tmp_path: Path, trunks: Trunks, memory: memory_detector.Memory
) -> None:
    graph = MemoryGraph(trunks, replace(memory, form=replace(FORM, smoothing=0.7, top_cells=3))).eval()
    export.to_onnx(graph, meta(), tmp_path / "model.onnx")
    assert (
        parity(graph, meta(), tmp_path / "model.onnx", [random_inputs(meta(), batch=n, seed=n) for n in (1, 3)]).worst
        < 1e-3
    )
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["score_map", "raw_score"]


def test_self_matching_exports_too(tmp_path: Path, trunks: Trunks) -> None:
    graph = SelfMatchingGraph(trunks, FORM, nearest=5).eval()
    export.to_onnx(graph, meta(), tmp_path / "model.onnx")
    assert parity(graph, meta(), tmp_path / "model.onnx", [random_inputs(meta(), batch=3, seed=1)]).worst < 1e-3
