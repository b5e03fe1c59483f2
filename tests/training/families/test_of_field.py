"""What a detector says of a whole field, and an encoder that listens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from semwatch.errors import ModelMismatch
from semwatch.line import inputs
from semwatch.line.detection import detect
from semwatch.models import model_repository
from semwatch.models.contract import FIELD_FEATURES, REGION_FEATURES
from semwatch.models.inference import Embedded
from semwatch_training.families.ni import export as ni_export
from semwatch_training.families.of_field import with_field_features
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit, spread
from semwatch_training.publishing.export import publish
from semwatch_training.trunks.efficientnet import (
    FIELD_STAGES,
    FIELD_WIDTH,
    PATCH_WIDTH,
    STAGES,
    field_descriptor,
    patch_descriptor,
)
from tiny_models import DETECTOR, ENCODER, convolutional, detector_graph, trunk

LISTENING = replace(ENCODER, field=True)


def maps(*sides: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, STAGES[stage - 1].channels, side, side + 1, generator=generator)
        for stage, side in zip(FIELD_STAGES, sides, strict=True)
    ]


# ---- the descriptor ----


def test_descriptor_holds_statistics_of_every_channel_each_of_unit_length() -> None:
    given = maps(8, 4, 2)
    said = field_descriptor(given)
    assert said.shape == (2, FIELD_WIDTH)
    at = 0
    for one in given:
        places = one.flatten(2)
        for part in (places.mean(dim=2), places.std(dim=2, correction=0), places.amax(dim=2)):
            expected = part / part.norm(dim=1, keepdim=True)
            torch.testing.assert_close(said[:, at : at + part.shape[1]], expected, rtol=1e-4, atol=1e-5)
            at += part.shape[1]


def test_descriptor_does_not_know_where_things_lie() -> None:
    given = maps(8, 4, 2)
    turned = [torch.rot90(one, 1, (2, 3)).roll(1, dims=2) for one in given]
    torch.testing.assert_close(field_descriptor(turned), field_descriptor(given), rtol=1e-4, atol=1e-5)


def test_blank_field_has_finite_features() -> None:
    blank = [torch.zeros_like(one) for one in maps(8, 4, 2)]
    assert torch.equal(field_descriptor(blank), torch.zeros(2, FIELD_WIDTH))


def test_each_place_is_described_by_its_own_channels() -> None:
    given = maps(8, 4, 2)
    said = patch_descriptor(given)
    assert said.shape == (2, PATCH_WIDTH, 2, 3)
    torch.testing.assert_close(said[1, :, 0, 2], torch.nn.functional.layer_norm(given[-1][1, :, 0, 2], (PATCH_WIDTH,)))


# ---- who says it, and who listens ----


def publish_pair(repository: Path, form: EncoderForm = LISTENING) -> None:
    detector = ni_export.exported(detector_graph(), normal_scores=[0.5])
    publish(with_field_features(detector, convolutional()), repository)
    publish(smg_vit_export.exported(EncoderGraph(SmgVit(trunk(), form)).eval()), repository)


def test_exported_pair_says_and_hears_what_torch_computes(tmp_path) -> None:
    publish_pair(tmp_path)
    field = np.random.default_rng(0).integers(0, 256, (DETECTOR.input_px, DETECTOR.input_px), dtype=np.uint8)
    with torch.no_grad():
        maps = convolutional()(torch.from_numpy(field)[None], FIELD_STAGES)
    with Embedded(tmp_path, threads=1, models=("detector", "encoder")) as models:
        said, _ = detect(field, models)
        assert said.field_features is not None
        assert said.patch_features is not None
        np.testing.assert_allclose(said.field_features, field_descriptor(maps)[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(said.patch_features, patch_descriptor(maps)[0].numpy(), atol=1e-3)
        px, tokens = inputs.crop_px(models.meta("encoder")), inputs.tokens(models.meta("encoder"))
        of_region = said.patch_features.mean(axis=(1, 2))
        asked = {
            "crop": np.zeros((1, px, px), np.uint8),
            "soft_mask": np.ones((1, tokens, tokens), np.float32),
            "size": np.float32([[-3, -4]]),
            FIELD_FEATURES: said.field_features[None],
            REGION_FEATURES: of_region[None],
        }
        features = models.infer("encoder", asked).outputs["features"][0]
        width = int(models.meta("encoder").provenance["frozen_width"])
    told = features[width - FIELD_WIDTH - PATCH_WIDTH : width]
    np.testing.assert_allclose(told[:FIELD_WIDTH], said.field_features, atol=1e-6)
    np.testing.assert_allclose(told[FIELD_WIDTH:], of_region / np.linalg.norm(of_region), atol=1e-5)
    assert features.shape == (width + 24,)


def test_detector_that_says_nothing_of_the_field_is_refused_beside_an_encoder_that_asks(tmp_path) -> None:
    publish(ni_export.exported(detector_graph(), normal_scores=[0.5]), tmp_path)
    publish(smg_vit_export.exported(EncoderGraph(SmgVit(trunk(), LISTENING)).eval()), tmp_path)
    with pytest.raises(ModelMismatch, match="this detector gives no `field_features`"):
        Embedded(tmp_path, threads=1, models=("detector", "encoder"))


def test_field_is_frozen_and_comes_before_the_class_token() -> None:
    heard, deaf = (EncoderGraph(SmgVit(trunk(), form)).eval() for form in (LISTENING, ENCODER))
    crop, mask, size = torch.zeros(1, 56, 56, dtype=torch.uint8), torch.rand(1, 4, 4), torch.zeros(1, 2)
    said, of_region = torch.randn(1, FIELD_WIDTH), torch.randn(1, PATCH_WIDTH)
    features, without = heard(crop, mask, size, said, of_region), deaf(crop, mask, size)
    assert heard.frozen_width == deaf.frozen_width + FIELD_WIDTH + PATCH_WIDTH
    assert torch.equal(features[:, deaf.frozen_width : deaf.frozen_width + FIELD_WIDTH], said)
    assert torch.equal(features[:, : deaf.frozen_width], without[:, : deaf.frozen_width])
    assert torch.equal(features[:, heard.frozen_width :], without[:, deaf.frozen_width :])


# ---- lighter and richer forms ----


def test_encoder_without_guided_layers_has_no_class_token_and_runs_no_layer_for_it(tmp_path) -> None:
    form = replace(ENCODER, pooled_layers=(1,), guided_layers=0)
    graph = EncoderGraph(SmgVit(trunk(), form)).eval()
    assert (graph.width, graph.vit.n_frozen, len(graph.vit.guided.blocks)) == (graph.frozen_width, 2, 0)
    with_token = EncoderGraph(SmgVit(trunk(), replace(form, guided_layers=2))).eval()
    crop, mask, size = torch.zeros(1, 56, 56, dtype=torch.uint8), torch.rand(1, 4, 4), torch.zeros(1, 2)
    assert torch.equal(graph(crop, mask, size), with_token(crop, mask, size)[:, : graph.frozen_width])
    publish(smg_vit_export.exported(graph), tmp_path)
    assert model_repository.read_meta(tmp_path, "encoder", 1).outputs["features"].shape == (24 + 2,)


def test_spread_says_how_much_tokens_differ_whatever_the_mask() -> None:
    tokens = torch.randn(1, 16, 24)
    normed = torch.nn.functional.layer_norm(tokens, (24,))
    expected = torch.nn.functional.normalize(normed.std(dim=1, correction=0), dim=-1)
    torch.testing.assert_close(spread(tokens), expected)
    assert torch.equal(spread(tokens[:, :1].expand(-1, 16, -1)), torch.zeros(1, 24))
    graph = EncoderGraph(SmgVit(trunk(), replace(ENCODER, spread=True))).eval()
    crop, size = torch.randint(0, 256, (1, 56, 56), dtype=torch.uint8), torch.zeros(1, 2)
    one, other = (graph(crop, torch.rand(1, 4, 4), size)[:, 48:96] for _ in range(2))
    assert torch.equal(one, other)
    assert graph.frozen_width == 2 * 48 + 2
