"""The memory of whole images: which are asked, which are kept, whose scores are honest, and the exported graph."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from semwatch.errors import ConfigError
from semwatch.line.scaling import resize
from semwatch.models.model_repository import Meta
from semwatch.models.model_repository import Tensor as TensorMeta
from semwatch_training.families.memory import fit_memory
from semwatch_training.families.memory.fit_memory import Patches, fit, remember
from semwatch_training.families.memory.memory_detector import (
    CORESET,
    Memory,
    MemoryForm,
    MemoryGraph,
    Trunks,
    load,
    most_alike,
    nearest_distances,
    save,
    signatures,
)
from semwatch_training.publishing import export
from semwatch_training.publishing.export import parity, random_inputs
from semwatch_training.system import weights_file
from tiny_models import convolutional, trunk

FORM = MemoryForm(
    input_px=112, sizes_px=(56, 64), vit_layers=(0, 1), components=(24, 32), alike=4, candidates=300, smoothing=0
)


@pytest.fixture(scope="module")
def trunks() -> Trunks:
    return Trunks(trunk(), convolutional())


def stripes(n: int, seed: int = 0, *, period: float = 4.0) -> list[np.ndarray]:
    """Stripes of varying phase with noise, (120, 96)."""
    rng = np.random.default_rng(seed)
    x = np.arange(96)
    return [
        (120 + 50 * np.sin(x / period + rng.uniform(0, 6)) + rng.normal(0, 5, (120, 96))).clip(0, 255).astype(np.uint8)
        for _ in range(n)
    ]


def batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack([resize(image, (FORM.input_px, FORM.input_px)) for image in images]))


@pytest.fixture(scope="module")
def memory(trunks: Trunks) -> Memory:
    return fit(stripes(20), trunks, FORM)


def features(owners: list[int], *, seed: int = 0) -> Patches:
    """Random patches, one view a row; the views of one owner are nearly the same."""
    rng = np.random.default_rng(seed)
    base = {owner: rng.normal(size=(16, 12)) for owner in dict.fromkeys(owners)}
    views = np.stack([base[owner] + rng.normal(0, 0.01, (16, 12)) for owner in owners]).astype(np.float16)
    return Patches(views, views[..., :8].copy(), np.array(owners, np.int64), are_images=True)


def test_no_image_is_refused(trunks: Trunks) -> None:
    with pytest.raises(ConfigError, match="at least one normal image"):
        fit([], trunks, FORM)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_fewer_images_than_are_asked_still_judge(trunks: Trunks, n: int) -> None:
    graph = MemoryGraph(trunks, fit(stripes(n), trunks, replace(FORM, alike=50)))
    marked = stripes(1)[0]
    marked[60:90, 24:48] = 250
    maps, raw = graph(batch([stripes(1)[0], marked]))
    assert maps.isfinite().all()
    assert raw[1] > raw[0]


@pytest.mark.parametrize("image", [np.zeros((64, 64), np.uint8), stripes(1)[0]], ids=["black", "stripes"])
def test_identical_images_give_a_defined_memory(trunks: Trunks, image: np.ndarray) -> None:
    memory = fit([image] * 10, trunks, FORM)
    maps, raw = MemoryGraph(trunks, memory)(batch([image, stripes(1, seed=3)[0]]))
    assert maps.isfinite().all()
    assert raw[1] > raw[0]


def test_a_defect_scores_above_normal_images_and_where_it_is(trunks: Trunks, memory: Memory) -> None:
    clean = stripes(8, seed=50)
    marked = [image.copy() for image in clean]
    for image in marked:
        image[60:90, 24:48] = 250
    graph = MemoryGraph(trunks, memory).eval()
    (_, calm), (maps, raised) = graph(batch(clean)), graph(batch(marked))
    assert roc_auc_score([0] * 8 + [1] * 8, torch.cat((calm, raised)).numpy()) == 1.0
    peaks = maps.flatten(1).argmax(dim=1)
    assert (abs(peaks // FORM.side - 2.5) <= 1).all()
    assert (abs(peaks % FORM.side - 1.5) <= 1).all()


def test_a_patch_that_is_normal_elsewhere_is_no_excuse(trunks: Trunks) -> None:
    fine, coarse = stripes(15, period=2.0), stripes(15, period=8.0)
    mixed = [image.copy() for image in stripes(4, seed=9, period=2.0)]
    for image in mixed:
        image[30:90, 24:72] = stripes(1, seed=10, period=8.0)[0][30:90, 24:72]
    graphs = {k: MemoryGraph(trunks, fit([*fine, *coarse], trunks, replace(FORM, alike=k))) for k in (4, 30)}
    clean = batch(stripes(4, seed=11, period=2.0))
    lift = {k: (graph(batch(mixed))[1].mean() - graph(clean)[1].mean()).item() for k, graph in graphs.items()}
    assert lift[4] > lift[30] > 0


def test_asking_every_image_is_the_nearest_patch_of_all(trunks: Trunks, memory: Memory) -> None:
    every = replace(memory, form=replace(FORM, alike=10**6))
    images = batch(stripes(2, seed=5))
    graph = MemoryGraph(trunks, every).eval()
    maps = []
    for bank, found in zip(every.banks, graph.features(images), strict=True):
        query = ((found - bank.mean) @ bank.projection).flatten(0, 1).numpy()
        bank_of_all = bank.patches.float().flatten(0, 1).numpy()
        distance = NearestNeighbors(n_neighbors=1).fit(bank_of_all).kneighbors(query)[0].reshape(2, 4, 4)
        maps.append((distance - bank.centre) / bank.spread)
    np.testing.assert_allclose(graph(images)[0], (maps[0] + maps[1]) / 2, rtol=1e-3, atol=1e-3)


def test_the_most_alike_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    queries, remembered = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(30, 7)).astype(np.float32)
    expected = NearestNeighbors(n_neighbors=6).fit(remembered).kneighbors(queries)[1]
    assert most_alike(torch.from_numpy(queries), torch.from_numpy(remembered), 6).tolist() == expected.tolist()
    assert most_alike(torch.from_numpy(queries), torch.from_numpy(remembered[:2]), 6).shape == (5, 2)


def test_each_image_may_have_patches_of_its_own() -> None:
    queries = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]])
    patches = torch.tensor([[[3.0, 4.0], [9.0, 9.0]], [[0.0, 1.0], [9.0, 9.0]]])
    assert nearest_distances(queries, patches).tolist() == [[5.0], [1.0]]


def test_signatures_are_means_over_a_coarse_grid() -> None:
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.normal(size=(2, 64, 3)).astype(np.float32))
    expected = patches.reshape(2, 4, 2, 4, 2, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2).flatten(1)
    np.testing.assert_allclose(signatures([patches]), expected, atol=1e-6)
    assert signatures([patches, patches[..., :1]]).shape == (2, 16 * 4)


def test_every_owner_is_kept_before_one_is_kept_twice() -> None:
    owners = np.array([7] * 10 + [3, 5, 5])
    order = fit_memory._in_turn(owners, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(13))
    assert set(owners[order[:3]]) == {3, 5, 7}
    assert set(owners[order[3:5]]) == {5, 7}


def test_no_more_images_are_kept_than_asked_for() -> None:
    memory = remember(features(list(range(9))), replace(FORM, images=5))
    assert [bank.patches.shape[:2] for bank in memory.banks] == [(5, 16), (5, 16)]
    assert len(memory.normal_scores) == 5


def test_images_of_one_owner_do_not_vouch_for_each_other() -> None:
    owners = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    together = features(owners)
    alone = Patches(together.vit, together.efficientnet, np.arange(9), are_images=True)
    assert remember(alone, FORM).banks[0].centre < 0.2 * remember(together, FORM).banks[0].centre


def test_only_so_many_images_are_held_out() -> None:
    assert len(remember(features(list(range(9))), replace(FORM, calibration_images=3)).normal_scores) == 3


def test_normal_scores_are_those_of_images_the_memory_has_not_seen(trunks: Trunks) -> None:
    images = stripes(12)
    memory = fit(images, trunks, FORM)
    own, new = (MemoryGraph(trunks, memory)(batch(x))[1] for x in (images, stripes(12, seed=90)))
    scores = torch.tensor(memory.normal_scores)
    assert len(scores) == 12
    assert own.max() < scores.min()  # its own patches are at distance about nil
    assert abs(scores.median() - new.median()) < 0.25 * (new.median() - own.median())


def test_the_same_seed_remembers_the_same() -> None:
    patches = features(list(range(12)))
    first, again, other = (remember(patches, replace(FORM, images=6), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.banks[0].patches, again.banks[0].patches)
    assert first.normal_scores == again.normal_scores
    assert not torch.equal(first.banks[0].patches, other.banks[0].patches)


def test_a_saved_memory_scores_as_before(tmp_path: Path, trunks: Trunks, memory: Memory) -> None:
    save(tmp_path / "memory.safetensors", memory)
    again = load(tmp_path / "memory.safetensors")
    assert again.form == FORM
    expected, found = (MemoryGraph(trunks, m)(batch(stripes(2, seed=7)))[0] for m in (memory, again))
    assert torch.equal(expected, found)


def test_patches_of_another_form_are_refused(tmp_path: Path, memory: Memory) -> None:
    save(tmp_path / "memory.safetensors", replace(memory, form=replace(FORM, alike=0)))
    with pytest.raises(ConfigError, match="holds no memory"):
        load(tmp_path / "memory.safetensors")
    weights_file.write(tmp_path / "memory.safetensors", {"x": torch.zeros(2)}, {"form": "{}"})
    with pytest.raises(ConfigError, match="holds no memory"):
        load(tmp_path / "memory.safetensors")


def test_the_published_baseline_is_a_coreset_of_whole_features(trunks: Trunks) -> None:
    small = replace(CORESET, input_px=112, sizes_px=(56, 64), vit_layers=(0, 1), patches=50, candidates=60)
    memory = fit(stripes(10), trunks, small)
    assert [bank.patches.shape[0] for bank in memory.banks] == [50, 50]
    assert memory.banks[1].patches.shape[1] == 168


class Blocks(nn.Module):
    """In place of the trunks, whose export other tests cover: an image's 16 blocks of 28 pixels a side, as patches."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = image.float().reshape(-1, 4, 28, 4, 28).transpose(2, 3).reshape(-1, 16, 28 * 28) / 255
        return blocks[..., ::66], blocks[..., ::99]


def test_the_exported_graph_computes_the_same_at_any_batch(tmp_path: Path, trunks: Trunks) -> None:
    meta = Meta(
        model="detector",
        created_utc="2026-01-01T00:00:00Z",
        inputs={"image": TensorMeta(dtype="uint8", shape=(112, 112))},
        outputs={
            "score_map": TensorMeta(dtype="float32", shape=(4, 4)),
            "raw_score": TensorMeta(dtype="float32", shape=()),
        },
    )
    graph = MemoryGraph(trunks, remember(features(list(range(9))), FORM)).eval()
    graph.features = Blocks()
    export.to_onnx(graph, meta, tmp_path / "model.onnx")
    batches = [random_inputs(meta, batch=n, seed=n) for n in (1, 3)]
    assert parity(graph, meta, tmp_path / "model.onnx", batches).worst < 1e-3
