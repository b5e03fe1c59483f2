from dataclasses import replace

import pytest
import torch

from semwatch.errors import ConfigError
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector, group
from semwatch_training.families.ni.ni_losses import (
    distances,
    matching_distances,
    normal_information_loss,
    plant_pseudo_defects,
    reconstruction_loss,
)
from tiny_models import DETECTOR, detector_graph


def test_score_map_and_raw_score_have_the_token_grid_and_finite_values_on_a_black_image() -> None:
    score, raw = detector_graph()(torch.zeros(2, 112, 112, dtype=torch.uint8))
    assert score.shape == (2, 8, 8)
    assert raw.shape == (2,)
    assert torch.isfinite(score).all()
    assert score.min() >= -1e-5
    assert score.max() <= 2


def test_raw_score_is_the_mean_of_the_top_tokens() -> None:
    score, raw = detector_graph()(torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8))
    assert torch.allclose(raw, score.flatten(1).max(dim=1).values)  # 0.2 % of 64 tokens is one token


def test_a_subset_of_features_is_rebuilt_as_within_the_whole() -> None:
    torch.manual_seed(0)
    detector = NIDetector(DETECTOR).eval()
    targets = torch.randn(2, 2, 64, 24)
    tokens, rebuilt = detector(targets)
    subset = torch.tensor([5, 60, 7])
    assert torch.allclose(detector.rebuild(targets[:, :, subset], tokens), rebuilt[:, :, subset], atol=1e-6)


def test_nothing_of_a_feature_reaches_the_output_but_through_its_attention() -> None:
    """No residual around the attention: with the value path cut, two different inputs are rebuilt alike."""
    torch.manual_seed(0)
    detector = NIDetector(DETECTOR).eval()
    for layer in detector.decoder:
        torch.nn.init.zeros_(layer.to_v.weight)
    tokens = torch.randn(1, 2, 24)
    first, second = (detector.rebuild(torch.randn(1, 2, 9, 24), tokens) for _ in range(2))
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("attention", ["parent", "literal"])
@pytest.mark.parametrize("fusion", ["mean", "sum"])
@pytest.mark.parametrize(("targets", "groups"), [("grouped", 2), ("layerwise", 4)])
def test_the_papers_literal_variants_run_and_learn(attention, fusion, targets, groups) -> None:
    torch.manual_seed(0)
    form = DetectorForm(
        width=24, heads=2, layers=(0, 1, 2, 3), n_normal_tokens=2,
        attention=attention, fusion=fusion, targets=targets,
    )  # fmt: skip
    detector = NIDetector(form)
    features = group([torch.randn(4, 16, 24) for _ in range(4)], form)
    assert features.shape == (4, groups, 16, 24)
    tokens, rebuilt = detector(features)
    assert rebuilt.shape == features.shape
    (reconstruction_loss(features, rebuilt) + normal_information_loss(features, tokens)).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_the_two_attentions_differ() -> None:
    torch.manual_seed(0)
    parent = NIDetector(DETECTOR)
    literal = NIDetector(replace(DETECTOR, attention="literal"))
    literal.load_state_dict(parent.state_dict())
    features = torch.randn(1, 2, 64, 24)
    assert not torch.allclose(parent(features)[1], literal(features)[1])


def test_group_means_average_to_the_mean_over_layers() -> None:
    layers = [torch.randn(2, 5, 24) for _ in range(4)]
    assert torch.allclose(group(layers, DETECTOR).mean(dim=1), torch.stack(layers).mean(dim=0), atol=1e-6)


def test_mining_changes_the_gradient_and_not_the_value() -> None:
    torch.manual_seed(0)
    targets, rebuilt = torch.randn(2, 2, 16, 24), torch.randn(2, 2, 16, 24, requires_grad=True)
    plain = reconstruction_loss(targets, rebuilt, gamma=0.0)
    mined = reconstruction_loss(targets, rebuilt, gamma=3.0)
    assert torch.allclose(plain, mined, atol=1e-6)
    gradients = [torch.autograd.grad(loss, rebuilt)[0] for loss in (plain, mined)]
    d = distances(targets, rebuilt.detach())
    weight = (d / d.mean(dim=(0, 2), keepdim=True)).pow(3).unsqueeze(-1)
    assert torch.allclose(gradients[0] * weight, gradients[1], atol=1e-6)


def test_perfect_reconstruction_costs_nothing_and_has_finite_gradient() -> None:
    targets = torch.randn(1, 2, 16, 24)
    rebuilt = targets.clone().requires_grad_()
    loss = reconstruction_loss(targets, rebuilt)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(rebuilt.grad).all()


def test_normal_loss_counts_distances_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    targets = torch.tensor([[[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]]]])
    d = matching_distances(targets, tokens)
    assert torch.allclose(d, torch.tensor([[0.0, 0.0, 1.0, 1 - 0.5**0.5]]), atol=1e-5)
    mask = torch.tensor([[False, False, True, True]])
    # The pseudo-defect at distance 1 lies beyond the margin and costs nothing; the other costs what it lacks of 0.5.
    loss = normal_information_loss(targets, tokens, mask, margin=0.5).item()
    assert loss == pytest.approx((0.5 - 0.2929) / 2, abs=1e-4)


def test_planted_pseudo_defects_come_from_other_images_and_are_where_the_mask_says() -> None:
    targets = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 36, 4).clone()
    corrupted, mask = plant_pseudo_defects(targets, (6, 6), generator=torch.Generator().manual_seed(0))
    assert mask.any(dim=1).all()
    assert not mask.all(dim=1).any()
    changed = (corrupted != targets).any(dim=-1).any(dim=1)
    assert torch.equal(changed, mask)


@pytest.mark.parametrize("decoder_layers", [2, 4])
def test_fewer_decoder_layers_rebuild_every_group(decoder_layers) -> None:
    torch.manual_seed(0)
    form = replace(DETECTOR, decoder_layers=decoder_layers)
    detector = NIDetector(form)
    assert len(detector.decoder) == decoder_layers
    targets = torch.randn(2, 2, 9, 24)
    tokens, rebuilt = detector(targets)
    assert rebuilt.shape == targets.shape
    x, outputs = detector.bottleneck(targets.mean(dim=1)), []
    for layer in detector.decoder:
        x = layer(x, tokens)
        outputs.append(x)
    half = decoder_layers // 2
    assert torch.allclose(rebuilt[:, 0], torch.stack(outputs[half:]).mean(dim=0), atol=1e-6)  # deep answers for shallow
    assert torch.allclose(rebuilt[:, 1], torch.stack(outputs[:half]).mean(dim=0), atol=1e-6)


def test_decoder_layers_that_do_not_divide_among_the_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 decoder layers do not divide among 2 groups"):
        NIDetector(replace(DETECTOR, decoder_layers=3))


def test_matching_as_evidence_is_the_distance_to_the_nearest_normal_token() -> None:
    by_residual = detector_graph()
    detector = NIDetector(replace(DETECTOR, evidence="matching")).eval()
    detector.load_state_dict(by_residual.detector.state_dict())
    graph = DetectorGraph(by_residual.trunk, detector).eval()
    images = torch.randint(0, 256, (2, 112, 112), dtype=torch.uint8)
    targets = graph.features(images)
    expected = matching_distances(targets, detector.normal_tokens(targets)).reshape(2, 8, 8)
    assert torch.allclose(graph(images)[0], expected, atol=1e-6)
    assert not torch.allclose(by_residual(images)[0], expected)
