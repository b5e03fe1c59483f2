"""Fewer products, the same answers."""

import copy

import pytest
import torch

from gpu_run import measure
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.ni.folding import FoldedDecoderLayer, FoldedExtractor, folded
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, GuidedDecoderLayer, NIDetector
from semwatch_training.families.ni.ni_detector import NormalExtractor as Extractor
from tiny_models import DETECTOR, convolutional, detector_graph, trunk


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Every weight and bias far from what it starts at, fp64."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def off(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


def test_branch_alone_has_nothing_to_fold() -> None:
    form = DetectorForm(evidence="branch", branch=BranchForm(input_px=128, width=8), input_px=128)
    graph = DetectorGraph(None, NIDetector(form), convolutional())
    assert folded(graph) is graph


@pytest.mark.parametrize("attention", ["parent", "literal"])
@torch.no_grad()
def test_decoder_layer_is_exact(attention) -> None:
    layer = shaken(GuidedDecoderLayer(DetectorForm(width=24, heads=2, attention=attention)))
    x, tokens = torch.randn(3, 10, 24).double(), torch.randn(3, 6, 24).double()
    assert off(layer(x, tokens), FoldedDecoderLayer(layer)(x, tokens)) < 1e-12


@torch.no_grad()
def test_extractor_is_exact() -> None:
    extractor = shaken(Extractor(DetectorForm(width=24, heads=2)))
    fused = torch.randn(3, 10, 24).double()
    assert off(extractor(fused), FoldedExtractor(extractor)(fused)) < 1e-12


@torch.no_grad()
def test_detector_is_exact_and_its_original_is_not_touched() -> None:
    graph = detector_graph()
    before = copy.deepcopy(graph.state_dict())
    image = torch.randint(0, 256, (2, 112, 112), dtype=torch.uint8)
    for expected, found in zip(graph(image), folded(graph)(image), strict=True):
        assert off(expected, found) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in graph.state_dict().items())


def test_products_are_saved() -> None:
    graph = DetectorGraph(trunk(), NIDetector(DETECTOR)).eval()
    image = [torch.zeros(1, 112, 112, dtype=torch.uint8)]
    assert measure.gflop(folded(graph), image) < measure.gflop(graph, image)
