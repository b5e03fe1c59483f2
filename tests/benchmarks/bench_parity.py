"""ONNX Runtime against PyTorch on 50 real images: maps, raw scores, features, logits, p-values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table

from semwatch.intake import decoding
from semwatch.line.pipeline import search
from semwatch.line.scaling import resize
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data.datasets import folder_images
from semwatch_training.discovery.head import load_head
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicGraph
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit
from semwatch_training.system.defaults import SHIPPED
from semwatch_training.trunks import backbone

N = 50


@pytest.mark.timeout(1800)
def test_onnx_against_torch_on_real_images(repository: Path, data: Path) -> None:
    trunk = backbone.load(repository.parent / ".cache")
    second = backbone.load_efficientnet(repository.parent / ".cache")
    detector = IntrinsicGraph(second, train_intrinsic.load(SHIPPED / "detector.safetensors")[0]).eval()
    encoder = EncoderGraph(SmgVit(trunk, EncoderForm()), second).eval()
    head = load_head(SHIPPED / "head.safetensors")[0]
    recipe = Recipe()
    recipe = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    paths = [p for p in folder_images(data / "MTD") if p.suffix == ".jpg"]
    paths = folder_images(data / "SEM-TIFF-metadata") + paths[:: len(paths) // (N - 9)]
    worst: dict[str, float] = {}
    with Embedded(repository) as models, torch.no_grad():
        for path in paths[:N]:
            page = decoding.read(path)[0]
            image = resize(page.field, (448, 448))[None]
            note(worst, models, "detector", {"image": image}, detector)
            candidates = search(page, recipe, models).candidates[:2]
            if candidates:
                inputs = {
                    "crop": np.stack([c.crop for c in candidates]),
                    "soft_mask": np.stack([c.soft_mask for c in candidates]),
                    "size": np.stack([c.size for c in candidates]),
                }
                features = note(worst, models, "encoder", inputs, encoder)
                note(worst, models, "head", {"features": features}, head)
    table = Table("output", "largest relative difference", "bound", title=f"ONNX against PyTorch, {N} real images")
    for name, value in worst.items():
        table.add_row(name, f"{value:.1e}", "1e-3")
    Console().print(table)
    assert max(worst.values()) < 1e-3


def note(worst, models, model, inputs, graph) -> np.ndarray:  # type: ignore[no-untyped-def]
    answer = models.infer(model, inputs).outputs
    expected = graph(*(torch.from_numpy(inputs[name]) for name in models.meta(model).inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for (name, found), reference in zip(answer.items(), expected, strict=True):
        difference = float(np.abs(found - reference.numpy()).max() / np.abs(reference.numpy()).max())
        worst[f"{model} {name}"] = max(worst.get(f"{model} {name}", 0.0), difference)
    return next(iter(answer.values()))
