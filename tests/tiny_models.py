"""A model repository of real formats and random weights: exported in seconds, answering in milliseconds."""

from pathlib import Path

import numpy as np
import torch

from semwatch_training.detection.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import Head
from semwatch_training.encoding.smg_vit import EncoderForm, EncoderGraph, SmgVit
from semwatch_training.export import publish_detector, publish_encoder, publish_head
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import TrunkShape, VisionTransformer

SHAPE = TrunkShape(width=24, depth=4, heads=2, patch=14, position_grid=8)
DETECTOR = DetectorForm(trunk="tiny", width=24, heads=2, layers=(0, 1, 2, 3), n_normal_tokens=2, input_px=112)
ENCODER = EncoderForm(trunk="tiny", input_px=56, pooled_layers=(0, 1), guided_layers=2, second_trunk="")
LABELS = ("bridge", "defect-free", "particle")


def trunk(seed: int = 0) -> VisionTransformer:
    """A trunk of random weights."""
    torch.manual_seed(seed)
    model = VisionTransformer(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def convolutional() -> EfficientNet:
    """A convolutional trunk of random weights."""
    torch.manual_seed(0)
    network = EfficientNet().eval().requires_grad_(False)
    for parameter in network.parameters():  # torch's own start makes all patches alike
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return network


def detector_graph() -> DetectorGraph:
    """A detector of random weights."""
    return DetectorGraph(trunk(), NIDetector(DETECTOR)).eval()


def encoder_graph() -> EncoderGraph:
    """An encoder of random weights."""
    return EncoderGraph(SmgVit(trunk(), ENCODER)).eval()


def head(width: int, frozen_width: int, seed: int = 0) -> Head:
    """A head fitted on three blobs."""
    rng = np.random.default_rng(seed)
    labels = [LABELS[i % 3] for i in range(90)]
    features = rng.normal(size=(90, width)).astype(np.float32)
    for row, label in zip(features, labels, strict=True):
        row[LABELS.index(label)] += 6
    return fit_head(features, labels, HeadFit(frozen_width=frozen_width, components=8))


def publish_all(repository: Path) -> Path:
    """Publish version 1 of detector, encoder and head."""
    encoder = encoder_graph()
    width = encoder.frozen_width + SHAPE.width
    publish_detector(detector_graph(), repository, normal_scores=[i / 1000 for i in range(60)], provenance={})
    version = publish_encoder(encoder, repository, provenance={})
    publish_head(head(width, encoder.frozen_width), repository, encoder_version=version, provenance={})
    return repository
