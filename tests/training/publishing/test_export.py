import numpy as np
import pytest
import torch

from semwatch.errors import PublishError
from semwatch.intake import decoding
from semwatch.line.scaling import resize
from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch_training.data.datasets import folder_images
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicGraph
from semwatch_training.families.memory import export as memory_export
from semwatch_training.families.memory import fit_memory
from semwatch_training.families.memory.memory_detector import MemoryForm, MemoryGraph, Trunks
from semwatch_training.families.ni import export as ni_export
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.publishing import export
from semwatch_training.system.defaults import SHIPPED
from semwatch_training.trunks import backbone
from tiny_models import TO_ONNX, convolutional, detector_graph, trunk

MEMORY = MemoryForm(input_px=112, sizes_px=(56, 64), vit_layers=(0, 1), components=(24, 32), patches=50, candidates=90)


def branch_graph() -> DetectorGraph:
    torch.manual_seed(0)
    branch = BranchForm(input_px=64, projection=4, width=8, dilations=(1,))
    return DetectorGraph(None, NIDetector(DetectorForm(evidence="branch", branch=branch, input_px=64)), convolutional())


def memory_graph() -> MemoryGraph:
    trunks = Trunks(trunk(), convolutional())
    images = list(np.random.default_rng(0).integers(0, 256, (9, 112, 112), dtype=np.uint8))
    return MemoryGraph(trunks, fit_memory.fit(images, trunks, MEMORY))


@pytest.mark.parametrize(("make", "size", "side"), [(branch_graph, 64, 8), (memory_graph, 112, 4)])
def test_other_detectors_are_served_under_the_same_signature(tmp_path, make, size, side) -> None:
    graph = make().eval()
    family = memory_export if isinstance(graph, MemoryGraph) else ni_export
    said = {"seed": 7}
    version = export.publish(family.exported(graph, normal_scores=[0.3, 0.1]), tmp_path, provenance=said)
    meta = model_repository.read_meta(tmp_path, "detector", version)
    assert meta.inputs["image"].shape == (size, size)
    assert meta.outputs["score_map"].shape == (side, side)
    assert meta.normal_scores == (0.1, 0.3)
    assert (meta.provenance["family"], meta.provenance["seed"]) == (family.FAMILY, 7)
    assert meta.provenance["input_px"] == size
    images = np.random.default_rng(1).integers(0, 256, (5, size, size), dtype=np.uint8)
    with torch.no_grad():
        score, raw = graph(torch.from_numpy(images))
    with Embedded(tmp_path, models=("detector",), threads=1) as models:
        answer = models.infer("detector", {"image": images}).outputs
    assert np.abs(answer["score_map"] - score.numpy()).max() < 1e-3 * score.abs().max()
    assert np.abs(answer["raw_score"] - raw.numpy()).max() < 1e-3 * raw.abs().max()


def test_published_detector_serves_what_torch_computes_at_any_batch(tiny_repository) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 112, 112), dtype=np.uint8)
    with torch.no_grad():
        score, raw = detector_graph()(torch.from_numpy(images))
    with Embedded(tiny_repository) as models:
        answer = models.infer("detector", {"image": images}).outputs
    assert np.abs(answer["score_map"] - score.numpy()).max() < 1e-3 * score.abs().max()
    assert np.abs(answer["raw_score"] - raw.numpy()).max() < 1e-3 * raw.abs().max()


def test_export_that_differs_is_not_published(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "parity", lambda *_: export.Parity({"score_map": 0.5}))
    with pytest.raises(PublishError, match="differs from its torch original"):
        export.publish(ni_export.exported(detector_graph(), normal_scores=[0.1]), tmp_path)
    assert model_repository.versions(tmp_path, "detector") == []


def test_exported_file_is_the_same_wherever_it_is_made(tmp_path) -> None:
    """One is of this very moment, the other as it was kept when it was first made."""
    exported = ni_export.exported(detector_graph(), normal_scores=[0.1])
    assert export.to_onnx is not TO_ONNX
    for to_onnx, name in ((TO_ONNX, "a.onnx"), (export.to_onnx, "b.onnx")):
        to_onnx(exported.graph, exported.meta, tmp_path / name)
    content = (tmp_path / "a.onnx").read_bytes()
    assert content == (tmp_path / "b.onnx").read_bytes()
    assert b"ni_detector.py" not in content


def test_parity_notices_other_weights(tiny_repository) -> None:
    meta = model_repository.read_meta(tiny_repository, "detector", 1)
    path = tiny_repository / "detector/1/model.onnx"
    batches = [export.random_inputs(meta, batch=2, seed=0)]
    graph = detector_graph()
    assert export.parity(graph, meta, path, batches).worst < 1e-3
    with torch.no_grad():
        torch.nn.init.normal_(graph.detector.decoder[-1].mlp.fc2.weight)
    assert export.parity(graph, meta, path, batches).worst > 1e-3


def test_shipped_detector_agrees_with_torch_on_real_images(repository, data) -> None:
    """Six here; ``make bench`` takes fifty."""
    detector, _, _ = train_intrinsic.load(SHIPPED / "detector.safetensors")
    graph = IntrinsicGraph(backbone.load_efficientnet(repository.parent / ".cache"), detector).eval()
    paths = folder_images(data / "SEM-TIFF-metadata")[:3] + folder_images(data / "MTD")[::500][:3]
    with Embedded(repository) as models:
        for path in paths:
            image = resize(decoding.read(path)[0].field, (448, 448))[None]
            with torch.no_grad():
                score, raw = (x.numpy() for x in graph(torch.from_numpy(image))[:2])
            answer = models.infer("detector", {"image": image}).outputs
            assert np.abs(answer["score_map"] - score).max() < 1e-3 * np.abs(score).max()
            assert np.abs(answer["raw_score"] - raw).max() < 1e-3 * np.abs(raw).max()
