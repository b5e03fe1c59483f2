"""A model repository of real formats and random weights: exported in seconds, answering in milliseconds."""

import hashlib
import inspect
import io
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import nn

from export_cache import once
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import Head
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicDetector, IntrinsicForm, IntrinsicGraph
from semwatch_training.families.ni import export as ni_export
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit
from semwatch_training.publishing import export
from semwatch_training.publishing.export import publish, publish_head
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import TrunkShape, VisionTransformer

SHAPE = TrunkShape(width=24, depth=4, heads=2, patch=14, position_grid=8)
DETECTOR = DetectorForm(trunk="tiny", width=24, heads=2, layers=(0, 1, 2, 3), n_normal_tokens=2, input_px=112)
INTRINSIC = IntrinsicForm(branch=BranchForm(input_px=64, projection=4, width=8, dilations=(1,)), keys=5)
ENCODER = EncoderForm(trunk="tiny", input_px=56, pooled_layers=(0, 1), guided_layers=2, second_trunk="", field=False)
LABELS = ("bridge", "defect-free", "particle")
TO_ONNX = export.to_onnx
"""Exports anew, where ``exporting_once`` would not."""


def trunk(seed: int = 0) -> VisionTransformer:
    """A trunk of random weights."""
    torch.manual_seed(seed)
    model = VisionTransformer(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def shallow() -> EfficientNet:
    """A convolutional trunk of torch's own random weights: of every stage the first two blocks."""
    torch.manual_seed(0)
    network = EfficientNet().eval().requires_grad_(False)
    network.stages = nn.ModuleList(cast(nn.Sequential, stage)[:2] for stage in network.stages)
    return network


def convolutional() -> EfficientNet:
    """A convolutional trunk of random weights that tell patches apart; torch's own make them all alike."""
    network = shallow()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return network


def detector_graph() -> DetectorGraph:
    """A detector of random weights."""
    return DetectorGraph(trunk(), NIDetector(DETECTOR)).eval()


def intrinsic_graph() -> IntrinsicGraph:
    """A detector of fields of any size, of random weights."""
    torch.manual_seed(0)
    return IntrinsicGraph(convolutional(), IntrinsicDetector(INTRINSIC)).eval()


def encoder_graph() -> EncoderGraph:
    """An encoder of random weights."""
    return EncoderGraph(SmgVit(trunk(), ENCODER)).eval()


def head(width: int, frozen_width: int, seed: int = 0) -> Head:
    """A head fitted on three blobs."""
    samples = blobs(width, seed)
    return fit_head(samples.features, samples.labels, HeadFit(frozen_width=frozen_width, components=8))


def blobs(width: int, seed: int = 0) -> Bank:
    """Thirty samples of each label around its own axis."""
    rng = np.random.default_rng(seed)
    labels = tuple(LABELS[i % 3] for i in range(90))
    features = rng.normal(size=(90, width)).astype(np.float32)
    for row, label in zip(features, labels, strict=True):
        row[LABELS.index(label)] += 6
    return Bank(features, labels, tuple(f"image {i}" for i in range(90)), ("",) * 90)


def publish_all(repository: Path) -> Path:
    """Publish version 1 of detector, encoder and head."""
    encoder = encoder_graph()
    width = encoder.frozen_width + SHAPE.width
    publish(ni_export.exported(detector_graph(), normal_scores=[i / 1000 for i in range(60)]), repository)
    version = publish(smg_vit_export.exported(encoder), repository)
    publish_head(
        head(width, encoder.frozen_width), repository, encoder_version=version, provenance={},
        bank=blobs(width), golden=blobs(width, seed=1),
    )  # fmt: skip
    return repository


class _ByValue(pickle.Pickler):
    """Pickles equal networks to equal bytes: a tensor is its numbers, not the address of its storage."""

    fast = True  # nor does it matter which of two equal strings are one object

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, torch.Tensor):
            return np.asarray, (value.detach().numpy(),)
        if isinstance(value, nn.Module):  # the order of a set is another in every process
            state = [(name, sorted(v) if isinstance(v, set) else v) for name, v in vars(value).items()]
            return tuple, ((type(value), _source(type(value)), state),)
        if isinstance(value, BaseModel):  # holds a set of the names that were given
            return str, (value.model_dump_json(),)
        return NotImplemented


@cache
def _source(kind: type) -> str:
    """Of a network that a test defines; the folder of the exports is named by those of the product."""
    return "" if kind.__module__.split(".")[0] in ("torch", "semwatch_training") else inspect.getsource(kind)


def _fingerprint(value: object) -> str:
    pickled = io.BytesIO()
    _ByValue(pickled).dump(value)
    return hashlib.sha256(pickled.getvalue()).hexdigest()


@contextmanager
def exporting_once(kept: Path) -> Iterator[None]:
    """Export each network once: an equal one under an equal signature gets a copy of the file kept of the first.

    Torch takes seconds to export a network however small it is, and the file depends on these two alone.
    """

    def exported(graph: nn.Module, meta: Meta, path: Path) -> None:
        file = kept / f"{_fingerprint((graph, meta.inputs, meta.outputs))}.onnx"
        shutil.copyfile(once(file, lambda partial: TO_ONNX(graph, meta, partial)), path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "to_onnx", exported)
        yield
