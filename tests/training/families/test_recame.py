"""ReCAME-Net: regional attention, experts, the fit, the student."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from semwatch.errors import ConfigError
from semwatch_training.families.recame import fit_recame
from semwatch_training.families.recame.fit_recame import Schedule, distil, fit
from semwatch_training.families.recame.network import (
    NO_REGIONS,
    CosineHead,
    Expert,
    RecameForm,
    RecameNet,
    RegionalAttention,
    Regions,
    region_pool,
    turned,
)

REGIONS = Regions(4, 2)
FORM = RecameForm(experts=2, width=16, reduction=2)
SHORT = Schedule(epochs=60, batch=16)
PLAIN = 10


def maps(height: int = 6, width: int = 6, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, height, width, generator=torch.Generator().manual_seed(0))


def attention(side: int = 2) -> RegionalAttention:
    torch.manual_seed(1)
    return RegionalAttention(4, side, 2)


def crops(counts: tuple[int, ...] = (60, 20, 6), seed: int = 0, shift: float = 4) -> tuple[np.ndarray, np.ndarray]:
    """Classes told apart by a plain feature each, and by which channel of their regions is bright, anywhere."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    features = rng.normal(size=(len(y), PLAIN + REGIONS.width)).astype(np.float32)
    features[np.arange(len(y)), y] += shift
    grid = features[:, PLAIN:].reshape(len(y), 2, 4, 4)
    grid[np.arange(len(y)), :, y, rng.integers(0, 4, len(y))] += shift
    return features, y


# ---- attention ----


@pytest.mark.parametrize("side", [1, 2, 3])
def test_attention_weights_each_region_by_its_own_average_and_maximum(side: int) -> None:
    gate, x = attention(side), maps()
    found = gate(x)
    step = 6 // side
    for i in range(side):
        for j in range(side):
            rows, columns = slice(i * step, (i + 1) * step), slice(j * step, (j + 1) * step)
            region = x[:, :, rows, columns]
            answers = gate.perceptron(region.mean(dim=(2, 3))) + gate.perceptron(region.amax(dim=(2, 3)))
            expected = region * torch.sigmoid(answers)[:, :, None, None]
            assert torch.allclose(found[:, :, rows, columns], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 5), (2, 9), (3, 3)])
def test_attention_takes_maps_of_any_size(size: tuple[int, int]) -> None:
    found = attention()(maps(*size))
    assert found.shape == (3, 4, *size)
    assert (found.abs() < maps(*size).abs()).all()


def test_pooled_regions_are_all_that_the_average_of_a_gated_map_reads() -> None:
    """Why averages and maxima of regions are kept and maps are not."""
    gate, x = attention(), maps()
    average, maximum = region_pool(x, 2)
    assert torch.allclose((average * gate.gate(average, maximum)).mean(dim=(2, 3)), gate(x).mean(dim=(2, 3)), atol=1e-6)


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (2, 9), (16, 16)])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_regions_are_those_of_adaptive_pooling(size: tuple[int, int], side: int) -> None:
    x = maps(*size)
    average, maximum = region_pool(x, side)
    assert torch.allclose(average, functional.adaptive_avg_pool2d(x, side), atol=1e-6)
    assert torch.equal(maximum, functional.adaptive_max_pool2d(x, side))


def test_cosine_head_does_not_see_lengths() -> None:
    head = CosineHead(6, 3, 16.0)
    x = torch.randn(4, 6)
    assert torch.allclose(head(x), head(100 * x), atol=1e-4)
    row, weight = x[0].detach().numpy(), head.weight[1].detach().numpy()
    cosine = row @ weight / np.linalg.norm(row) / np.linalg.norm(weight)
    assert head(x)[0, 1].item() == pytest.approx(16 * cosine, abs=1e-4)


# ---- network ----


def test_expert_reads_of_a_map_what_the_attention_leaves_of_it() -> None:
    torch.manual_seed(2)
    expert, x, plain = Expert(PLAIN, REGIONS, 3, FORM), maps(), torch.randn(3, PLAIN)
    assert expert.attention is not None
    gated = expert.attention(x).mean(dim=(2, 3))
    expected = functional.relu(expert.embed(torch.cat((plain, gated), dim=1)))
    assert torch.allclose(expert.embedding(plain, *region_pool(x, 2)), expected, atol=1e-6)
    without = Expert(PLAIN, REGIONS, 3, replace(FORM, attention=False))
    expected = functional.relu(without.embed(torch.cat((plain, x.mean(dim=(2, 3))), dim=1)))
    assert torch.allclose(without.embedding(plain, *region_pool(x, 2)), expected, atol=1e-6)


def test_experts_answer_is_the_mean_of_their_logits() -> None:
    network = RecameNet(PLAIN + REGIONS.width, REGIONS, 3, FORM)
    features = torch.from_numpy(crops()[0])
    parts = network.parts(features)
    assert torch.allclose(network(features), (network.each()[0](*parts) + network.each()[1](*parts)) / 2)
    assert network(features[:0]).shape == (0, 3)
    assert RecameNet(PLAIN, NO_REGIONS, 3, FORM)(features[:0, :PLAIN]).shape == (0, 3)


def test_features_that_cannot_hold_the_regions_are_refused() -> None:
    with pytest.raises(ConfigError, match="31 features cannot hold 2 x 2 regions of 4 channels"):
        RecameNet(31, REGIONS, 3, FORM)


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize("is_flipped", [False, True])
def test_turned_regions_are_the_regions_of_a_turned_map(turn: int, is_flipped: bool) -> None:
    def encoded(x: torch.Tensor) -> torch.Tensor:
        plain = torch.arange(PLAIN).expand(len(x), -1)
        return torch.cat((plain, *(part.flatten(1) for part in region_pool(x, 2))), dim=1)

    as_turned = torch.rot90(maps(), turn, (2, 3))
    as_turned = as_turned.flip(3) if is_flipped else as_turned
    assert torch.allclose(turned(encoded(maps()), REGIONS, turn, is_flipped=is_flipped), encoded(as_turned), atol=1e-6)


# ---- fit ----


@pytest.mark.parametrize("regions", [REGIONS, NO_REGIONS])
@pytest.mark.parametrize("metric", ["none", "contrastive", "raw"])
def test_long_tail_is_learnt(regions: Regions, metric) -> None:
    features, y = crops()
    width = features.shape[1] if regions.width else PLAIN
    fresh, truth = crops((30, 30, 30), seed=1)
    network = fit(features[:, :width], y, 3, regions=regions, form=FORM, schedule=replace(SHORT, metric=metric))
    recall = [(network(torch.from_numpy(fresh[:, :width])).argmax(1).numpy()[truth == k] == k).mean() for k in range(3)]
    assert min(recall) > 0.6, recall


def test_balanced_softmax_gives_the_rare_class_more_than_cross_entropy_does() -> None:
    features, y = crops((150, 20, 4), shift=2.5)
    fresh, truth = crops((40, 40, 40), seed=1, shift=2.5)

    def rare(**changes) -> float:
        network = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, **changes))
        return float((network(torch.from_numpy(fresh)).argmax(1).numpy()[truth == 2] == 2).mean())

    assert rare() > rare(objective="cross entropy", hard_share=0.0) + 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "weighted"},
        {"objective": "focal"},
        {"not_selected": "zero"},
        {"is_teacher_detached": False},
        {"hard_share": 0.0, "mutual": 0.0, "metric": "none", "turns": False},
    ],
)
def test_every_option_fits_to_finite_answers(changes) -> None:
    features, y = crops()
    network = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, epochs=2, **changes))
    assert torch.isfinite(network(torch.from_numpy(features))).all()


def test_student_is_one_expert_that_answers_as_its_teachers_do() -> None:
    features, y = crops()
    teacher = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=SHORT)
    student = distil(teacher, features, y, schedule=SHORT)
    assert len(student.experts) == 1
    fresh = torch.from_numpy(crops((30, 30, 30), seed=1)[0])
    assert (student(fresh).argmax(1) == teacher(fresh).argmax(1)).float().mean() > 0.9
    assert not any(p.requires_grad for p in student.parameters())


def test_same_seed_same_network_whatever_torch_is_set_to_and_its_own_draws_are_left_alone() -> None:
    features, y = crops()
    torch.manual_seed(5)
    first = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, epochs=2))
    drawn = torch.rand(3)
    torch.manual_seed(6)
    with torch.no_grad():
        again = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, epochs=2))
    other = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, epochs=2, seed=1))
    key = "experts.0.embed.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_a_crop_of_no_weight_teaches_nothing() -> None:
    features, y = crops()
    wrong = np.vstack((features, features[y == 0])), np.concatenate((y, np.full(60, 2)))
    weights = np.concatenate((np.ones(len(y)), np.full(60, 1e-9)))
    network = fit(*wrong, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, objective="cross entropy",
                  metric="none"), weights=weights)  # fmt: skip
    assert (network(torch.from_numpy(features[y == 0])).argmax(1) == 0).float().mean() > 0.9


def test_class_of_one_crop_and_class_of_none_are_fitted() -> None:
    features, y = crops((30, 20, 1))
    network = fit(features, y, 4, regions=REGIONS, form=FORM, schedule=SHORT)
    answers = network(torch.from_numpy(features))
    assert torch.isfinite(answers).all()
    assert answers[-1].argmax() == 2


def test_crops_of_one_class_are_refused() -> None:
    features, _ = crops()
    with pytest.raises(ConfigError, match="86 crops of 1 class"):
        fit(features, np.zeros(86, np.intp), 3, regions=REGIONS)


def test_features_that_do_not_fit_are_refused() -> None:
    features, y = crops()
    teacher = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, epochs=1))
    with pytest.raises(ConfigError, match=r"33 features.*42"):
        distil(teacher, features[:, :33], y)
    with pytest.raises(ConfigError, match="do not fit 85 labels"):
        fit(features, y[:-1], 3)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        fit(features, y, 2)
    features[3, 1] = np.nan
    with pytest.raises(ConfigError, match="1 of 86 rows"):
        fit(features, y, 3)


def test_channels_of_regions_keep_their_zero() -> None:
    features, y = crops()
    network = fit(features, y, 3, regions=REGIONS, form=FORM, schedule=replace(SHORT, epochs=1))
    assert (network.mean[PLAIN:] == 0).all()
    spread = network.deviation[PLAIN:].reshape(2, 4, 4)
    assert torch.equal(spread, spread[..., :1].expand(-1, -1, 4))
    assert fit_recame.SMALLEST_DEVIATION > 0
    assert functional.relu(network.deviation).min() > 0
