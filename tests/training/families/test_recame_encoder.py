"""The encoder that keeps regions: its features, then averages and maxima of the crop's quarters."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch_training.families.memory.memory_detector import Trunks
from semwatch_training.families.recame import export as recame_export
from semwatch_training.families.recame.network import Regions
from semwatch_training.families.recame.regional_encoder import RegionalEncoder
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit.smg_vit import EncoderGraph, SmgVit
from semwatch_training.publishing.export import publish
from semwatch_training.trunks.vit import normalise
from tiny_models import ENCODER, SHAPE, convolutional, encoder_graph, trunk

CONVOLUTIONAL = replace(ENCODER, input_px=112, second_trunk="efficientnet_lite2")


def inputs(n: int, side: int = 56) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    tokens = side // SHAPE.patch
    return torch.randint(0, 256, (n, side, side), dtype=torch.uint8), torch.rand(n, tokens, tokens), torch.rand(n, 2)


def with_second_trunk() -> EncoderGraph:
    return EncoderGraph(SmgVit(trunk(), CONVOLUTIONAL), convolutional()).eval()


def test_regions_are_those_of_the_second_trunks_map_of_the_crop_as_it_lies() -> None:
    graph, given = with_second_trunk(), inputs(3, 112)
    regional = RegionalEncoder(graph)
    with torch.no_grad():
        features, plain = regional(*given), graph(*given)
        (last,) = Trunks(trunk(), convolutional()).efficientnet(given[0], (5,))
    assert regional.regions == Regions(120, 2)
    assert torch.allclose(features[:, : graph.width], plain, atol=1e-5)
    averages, maxima = features[:, graph.width :].reshape(3, 2, 120, 2, 2).unbind(1)
    half = last.shape[-1] // 2
    assert torch.allclose(averages[:, :, 0, 1], last[:, :, : last.shape[-1] - half, half:].mean(dim=(2, 3)), atol=1e-4)
    assert torch.allclose(maxima.amax(dim=(2, 3)), last.amax(dim=(2, 3)), atol=1e-4)


def test_without_a_second_trunk_regions_are_of_the_last_pooled_layer() -> None:
    regional, given = RegionalEncoder(encoder_graph()), inputs(2)
    with torch.no_grad():
        _, patches = encoder_graph().vit.frozen(_normalised(given[0]))
        features = regional(*given)
    assert regional.regions == Regions(SHAPE.width, 2)
    grid = patches[-1].transpose(1, 2).reshape(2, SHAPE.width, 4, 4)
    averages = features[:, -regional.regions.width :].reshape(2, 2, SHAPE.width, 2, 2)[:, 0]
    assert torch.allclose(averages[:, :, 1, 0], grid[:, :, 2:, :2].mean(dim=(2, 3)), atol=1e-4)


def _normalised(crop: torch.Tensor) -> torch.Tensor:
    graph = encoder_graph()
    return normalise(crop, graph.mean, graph.std)


@pytest.mark.parametrize("make", [encoder_graph, with_second_trunk])
def test_published_it_answers_what_torch_computes_at_any_batch(tmp_path, make) -> None:
    exported = recame_export.with_regions(smg_vit_export.exported(make()))
    version = publish(exported, tmp_path)
    meta = model_repository.read_meta(tmp_path, "encoder", version)
    made = meta.provenance
    assert made["family"] == recame_export.FAMILY
    assert recame_export.regions_of(made) == exported.graph.regions
    assert made["frozen_width"] == exported.graph.encoder.frozen_width
    side = meta.inputs["crop"].shape[0]
    with Embedded(tmp_path, models=("encoder",), threads=1) as models:
        for n in (1, 5):
            given = inputs(n, side)
            answer = models.infer("encoder", dict(zip(meta.inputs, (x.numpy() for x in given), strict=True)))
            with torch.no_grad():
                expected = exported.graph(*given).numpy()
            assert np.abs(answer.outputs["features"] - expected).max() < 1e-3 * np.abs(expected).max()


def test_form_is_not_that_of_the_encoder_without_regions() -> None:
    """A head of one is never taken for a head of the other."""
    plain = smg_vit_export.form_of({})
    assert recame_export.form_of({}) != plain
    assert recame_export.form_of({}).startswith(plain)


def test_an_encoder_of_another_family_gives_no_regions() -> None:
    assert recame_export.regions_of({"family": "smg_vit"}).channels == 0
