import pytest
import torch

from semwatch_training.smg_vit import EncoderForm, SmgVit, pool
from tiny_models import ENCODER, encoder_graph, trunk


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
        graph.vit.scale += 5
    after = graph(crop, mask, size)
    frozen = slice(0, graph.frozen_width)
    assert torch.equal(before[:, frozen], after[:, frozen])
    assert not torch.allclose(before[:, graph.frozen_width :], after[:, graph.frozen_width :])


def test_zero_mask_leaves_the_trunk_as_it_is() -> None:
    """m = 0 adds nothing, so the guided class token is the plain one."""
    model = trunk()
    images = torch.randn(2, 3, 56, 56)
    _, class_token = SmgVit(model, ENCODER)(images, torch.zeros(2, 4, 4))
    x = model.embed(images)
    for block in model.blocks:
        x = block(x, None)
    assert torch.allclose(class_token, torch.nn.functional.normalize(model.norm(x[:, 0]), dim=-1), atol=1e-5)


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
    literal = EncoderForm(trunk="tiny", input_px=56, pooled_layers=(0, 1), guided_layers=2, attention="literal")
    assert not torch.allclose(SmgVit(model, ENCODER)(images, mask)[1], SmgVit(model, literal)(images, mask)[1])
