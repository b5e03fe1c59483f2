from dataclasses import replace
from typing import Literal

import pytest
import torch

from semwatch.models import model_repository
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit, pool, pool_difference
from semwatch_training.publishing.export import parity, publish, random_inputs
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import VisionTransformer
from tiny_models import ENCODER, SHAPE, encoder_graph, trunk

SECOND: Literal["efficientnet_lite2"] = "efficientnet_lite2"


def test_all_zero_mask_weighs_every_token_alike() -> None:
    tokens = torch.randn(1, 16, 24)
    assert torch.allclose(pool(tokens, torch.zeros(1, 4, 4)), pool(tokens, torch.ones(1, 4, 4)), atol=1e-5)


def test_pooling_reads_the_masked_token_alone() -> None:
    tokens = torch.randn(1, 16, 24)
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 2] = 1
    alone = torch.nn.functional.normalize(torch.nn.functional.layer_norm(tokens[:, 6], (24,)), dim=-1)
    assert torch.allclose(pool(tokens, mask), alone, atol=1e-3)


def test_features_are_finite_and_of_the_stated_width() -> None:
    graph = encoder_graph()
    crops = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8)
    features = graph(crops, torch.rand(3, 4, 4), torch.tensor([[-3.0, -4.0]] * 3))
    assert features.shape == (3, graph.frozen_width + 24)
    assert torch.isfinite(features).all()
    assert torch.allclose(features[:, 48:50], torch.tensor([-3.0, -4.0]) / 16)


def test_guidance_moves_the_class_token_and_not_the_frozen_features() -> None:
    graph = encoder_graph()
    crop, size = torch.randint(0, 256, (1, 56, 56), dtype=torch.uint8), torch.zeros(1, 2)
    mask = torch.rand(1, 4, 4)
    before = graph(crop, mask, size)
    with torch.no_grad():
        graph.vit.guided.scale += 5
    after = graph(crop, mask, size)
    frozen = slice(0, graph.frozen_width)
    assert torch.equal(before[:, frozen], after[:, frozen])
    assert not torch.allclose(before[:, graph.frozen_width :], after[:, graph.frozen_width :])


@pytest.mark.parametrize("family", ["learned positions", "rotary positions and registers"])
def test_zero_mask_leaves_the_trunk_as_it_is(family) -> None:
    """m = 0 adds nothing, so the guided class token is the plain one."""
    model = trunk()
    if family != "learned positions":
        model = VisionTransformer(replace(SHAPE, position_grid=0, n_registers=2)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, 56, 56)
    _, class_token = SmgVit(model, ENCODER)(images, torch.zeros(2, 4, 4))
    x, rope = model.embed(images), model.rope((4, 4))
    for block in model.blocks:
        x = block(x, rope)
    assert torch.allclose(class_token, torch.nn.functional.normalize(model.norm(x[:, 0]), dim=-1), atol=1e-5)


def test_registers_carry_no_guidance() -> None:
    model = VisionTransformer(replace(SHAPE, n_registers=2)).eval()
    bias = SmgVit(model, ENCODER).guided._bias(torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]))
    assert torch.allclose(bias[0, 0, 0], torch.tensor([0.4, 0, 0, 0.1, 0.2, 0.3, 0.4]))


def test_attention_grows_by_exp_of_the_bias() -> None:
    """With keys all alike, a token of bias m gets exp(m) times the attention of one without (section 1.8)."""
    model = trunk()
    attention = model.blocks[0].attn
    with torch.no_grad():
        attention.qkv.weight[:48] = 0
        attention.qkv.bias[:48] = 0
        attention.qkv.weight[48:] = torch.eye(24)
        attention.qkv.bias[48:] = 0
        attention.proj.weight.copy_(torch.eye(24))
        attention.proj.bias.zero_()
    x = torch.zeros(1, 2, 24)
    x[0, 0, 0], x[0, 1, 1] = 1, 1
    bias = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2).expand(-1, 2, -1, -1)
    out = attention(x, None, bias, None)
    # channels 0 and 1 lie in the first head, where values are the tokens themselves
    assert torch.allclose(out[0, 0, 1] / out[0, 0, 0], torch.tensor(2.0).exp(), atol=1e-4)


def test_pooling_a_guided_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen features"):
        SmgVit(trunk(), EncoderForm(pooled_layers=(1, 2), guided_layers=2))


def test_literal_form_differs_from_the_scaled_one() -> None:
    model, images, mask = trunk(), torch.randn(1, 3, 56, 56), torch.rand(1, 4, 4)
    literal = replace(ENCODER, attention="literal")
    assert not torch.allclose(SmgVit(model, ENCODER)(images, mask)[1], SmgVit(model, literal)(images, mask)[1])


def second_form(**changes: object) -> EncoderForm:
    tiny = replace(ENCODER, input_px=112)
    return replace(tiny, second_trunk=SECOND, **{"second_turns": 1, "second_surroundings": False, **changes})


def second_trunk() -> EfficientNet:
    torch.manual_seed(0)
    return EfficientNet().eval().requires_grad_(False)


def inputs(n: int = 2, side: int = 112) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    crops = torch.randint(0, 256, (n, side, side), dtype=torch.uint8, generator=generator)
    return crops, torch.rand(n, side // 14, side // 14, generator=generator), torch.full((n, 2), -3.0)


def test_second_trunk_comes_after_the_first_and_before_size() -> None:
    form = second_form(second_stages=(3, 5))
    with_second = EncoderGraph(SmgVit(trunk(), form), second_trunk())
    plain = EncoderGraph(SmgVit(trunk(), replace(form, second_trunk="")))
    features, expected = with_second(*inputs()), plain(*inputs())
    assert with_second.frozen_width == 2 * 24 + 48 + 120 + 2
    assert features.shape == (2, with_second.width)
    assert torch.equal(features[:, :48], expected[:, :48])
    assert torch.equal(features[:, 48 + 168 :], expected[:, 48:])
    for part in (features[:, 48:96], features[:, 96:216]):
        assert torch.allclose(part.norm(dim=1), torch.ones(2), atol=1e-5)


def test_second_trunk_is_pooled_under_the_mask() -> None:
    graph = EncoderGraph(SmgVit(trunk(), second_form()), second_trunk())
    crop, mask, size = inputs(1)
    mask[:] = 0
    mask[0, :4] = 1
    below = crop.clone()
    below[:, 100:] = 255 - below[:, 100:]  # far below the mask; a convolution sees only so far
    above = crop.clone()
    above[:, :20] = 255 - above[:, :20]
    part = slice(48, 48 + 120)
    moved = [(graph(changed, mask, size) - graph(crop, mask, size))[:, part].norm() for changed in (below, above)]
    assert moved[0] < 0.2 * moved[1]


def test_surroundings_double_the_second_part() -> None:
    graph = EncoderGraph(SmgVit(trunk(), second_form(second_surroundings=True)), second_trunk())
    plain = EncoderGraph(SmgVit(trunk(), second_form()), second_trunk())
    assert graph.frozen_width == 2 * 24 + 2 * 120 + 2
    features, expected = graph(*inputs()), plain(*inputs())
    assert features.shape == (2, graph.width)
    assert torch.equal(features[:, : 48 + 120], expected[:, : 48 + 120])
    assert torch.equal(features[:, 48 + 240 :], expected[:, 48 + 120 :])


def test_difference_from_the_surroundings_ignores_what_both_share() -> None:
    tokens, mask = torch.randn(1, 64, 24), torch.zeros(1, 8, 8)
    mask[0, 3:5, 3:5] = 0.4
    flat = mask.flatten(1)[..., None] > 0
    defect, layout = torch.randn(24), torch.randn(24)
    on_plain = pool_difference(torch.where(flat, defect, layout), mask)
    assert torch.allclose(on_plain, expected_difference(defect, layout), atol=1e-3)
    assert pool_difference(tokens, mask).norm() == pytest.approx(1, abs=1e-4)


def expected_difference(defect: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    inside, outside = (torch.nn.functional.layer_norm(x, (24,)) for x in (defect, layout))
    return torch.nn.functional.normalize(inside - outside, dim=-1)


def test_ring_about_the_mask_counts_neither_as_defect_nor_as_surroundings() -> None:
    tokens, mask = torch.randn(1, 64, 24), torch.zeros(1, 8, 8)
    mask[0, 4, 4] = 1
    changed = tokens.clone()
    changed[0, 3 * 8 + 3] *= -1  # diagonal neighbour of the mask
    assert torch.allclose(pool_difference(changed, mask), pool_difference(tokens, mask), atol=1e-4)
    changed[0, 2 * 8 + 3] *= -1
    assert not torch.allclose(pool_difference(changed, mask), pool_difference(tokens, mask), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_nothing_to_compare_gives_nearly_zero_and_not_noise_of_unit_length(value) -> None:
    assert pool_difference(torch.randn(3, 64, 24), torch.full((3, 8, 8), value)).norm(dim=1).max() < 1e-3


def test_faint_mask_pools_like_a_strong_one() -> None:
    tokens, mask = torch.randn(1, 64, 24), torch.zeros(1, 8, 8)
    mask[0, 2:4, 5] = torch.tensor([1.0, 0.5])
    for pooling in (pool, pool_difference):
        assert torch.allclose(pooling(tokens, mask), pooling(tokens, 0.1 * mask), atol=1e-3)


def test_form_and_second_trunk_must_agree() -> None:
    with pytest.raises(ValueError, match="efficientnet_lite2; give just that one"):
        EncoderGraph(SmgVit(trunk(), second_form()))
    with pytest.raises(ValueError, match="no second trunk; give just that one"):
        EncoderGraph(SmgVit(trunk(), ENCODER), second_trunk())


def test_input_that_the_second_trunk_cannot_halve_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        EncoderForm(input_px=56, second_trunk=SECOND)


def test_stage_that_the_second_trunk_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 to 5"):
        EncoderForm(second_stages=(5, 6))


def test_guided_layers_are_copies() -> None:
    model = trunk()
    vit = SmgVit(model, ENCODER)
    with torch.no_grad():
        for parameter in vit.guided.parameters():
            parameter.add_(1)
    for name, parameter in trunk().named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


def test_four_turns_make_the_second_part_blind_to_how_the_defect_lies() -> None:
    crop, mask, size = inputs(3)
    part = slice(48, 48 + 120)
    for turns, is_blind in ((1, False), (4, True)):
        graph = EncoderGraph(SmgVit(trunk(), second_form(second_turns=turns)), second_trunk())
        upright = graph(crop, mask, size)[:, part]
        lying = graph(torch.rot90(crop, 1, (1, 2)), torch.rot90(mask, 1, (1, 2)), size)[:, part]
        assert torch.allclose(upright, lying, atol=1e-5) == is_blind


def test_each_crop_of_a_batch_is_turned_by_itself() -> None:
    graph = EncoderGraph(SmgVit(trunk(), second_form(second_turns=4, second_surroundings=True)), second_trunk())
    crop, mask, size = inputs(3)
    alone = torch.cat([graph(crop[i : i + 1], mask[i : i + 1], size[i : i + 1]) for i in range(3)])
    assert torch.allclose(graph(crop, mask, size), alone, atol=1e-4)


def test_two_trunks_export_with_any_batch(tmp_path) -> None:
    form = second_form(second_surroundings=True, second_turns=4)
    graph = EncoderGraph(SmgVit(trunk(), form), second_trunk()).eval()
    version = publish(smg_vit_export.exported(graph), tmp_path)  # refuses itself where ONNX differs from torch
    meta = model_repository.read_meta(tmp_path, "encoder", version)
    assert meta.outputs["features"].shape == (graph.width,)
    path = tmp_path / "encoder" / str(version) / model_repository.WEIGHTS
    assert parity(graph, meta, path, [random_inputs(meta, batch=5, seed=2)]).worst < 1e-3
