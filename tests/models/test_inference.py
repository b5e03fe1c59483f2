import shutil
import threading

import numpy as np
import pytest

from semwatch.errors import ModelMismatch
from semwatch.models import model_repository
from semwatch.models.inference import Embedded


@pytest.fixture
def models(tiny_repository):
    with Embedded(tiny_repository, threads=1) as models:
        yield models


def images(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).integers(0, 256, (n, 112, 112), dtype=np.uint8)}


def test_empty_repository_is_refused(tmp_path) -> None:
    with pytest.raises(ModelMismatch, match="no detector"):
        Embedded(tmp_path)


def test_answer_carries_its_version_and_labels(models) -> None:
    answer = models.infer("head", {"features": np.zeros((2, 74), np.float32)})
    assert answer.version == 1
    assert answer.meta.labels == ("bridge", "defect-free", "particle")
    assert answer.outputs["logits"].shape == (2, 3)
    assert models.versions() == {"detector": 1, "encoder": 1, "head": 1}


def test_a_batch_answers_like_its_items(models) -> None:
    batch = images(5)
    whole = models.infer("detector", batch).outputs
    for index in range(5):
        one = models.infer("detector", {"image": batch["image"][index : index + 1]}).outputs
        assert np.allclose(one["score_map"][0], whole["score_map"][index], atol=1e-4)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"picture": np.zeros((1, 112, 112), np.uint8)},
        {"image": np.zeros((1, 112, 100), np.uint8)},
        {"image": np.zeros((1, 112, 112), np.float32)},
    ],
)
def test_wrong_arrays_are_refused_in_words(models, inputs) -> None:
    with pytest.raises(ModelMismatch, match="the detector wants"):
        models.infer("detector", inputs)


def test_threads_get_their_own_answers(models) -> None:
    expected = [models.infer("detector", images(1, seed)).outputs["raw_score"][0] for seed in range(8)]
    found: dict[int, float] = {}

    def ask(seed: int) -> None:
        for _ in range(5):
            found[seed] = models.infer("detector", images(1, seed)).outputs["raw_score"][0]

    workers = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [found[seed] for seed in range(8)] == expected


def test_newest_version_serves_unless_pinned(tiny_repository, tmp_path) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    meta = model_repository.read_meta(repository, "detector", 1)
    model_repository.publish(repository, meta, repository / "detector/1/model.onnx")
    with Embedded(repository) as newest, Embedded(repository, pins={"detector": 1}) as pinned:
        assert newest.versions()["detector"] == 2
        assert pinned.versions()["detector"] == 1
    with pytest.raises(ModelMismatch, match="version 9 is not"):
        Embedded(repository, pins={"detector": 9})


def test_head_of_another_encoder_is_refused(tiny_repository, tmp_path) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    meta = model_repository.read_meta(repository, "head", 1).model_copy(update={"encoder_sha256": "0" * 64})
    model_repository.publish(repository, meta, repository / "head/1/model.onnx")
    with pytest.raises(ModelMismatch, match="another encoder"):
        Embedded(repository, pins={"head": 2})
    with Embedded(repository) as models:  # nobody insists on it: the one before goes on
        assert models.versions()["head"] == 1
        assert "another encoder" in models.refused()[2]


def test_signature_that_lies_about_the_graph_is_refused(tiny_repository, tmp_path) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    meta = model_repository.read_meta(repository, "detector", 1)
    lying = meta.model_copy(update={"outputs": {**meta.outputs, "certainty": meta.outputs["raw_score"]}})
    model_repository.publish(repository, lying, repository / "detector/1/model.onnx")
    with pytest.raises(ModelMismatch, match=r"meta\.json says otherwise"):
        Embedded(repository, pins={"detector": 2})
    with Embedded(repository) as models:  # nobody insists on it: the one before goes on
        assert models.versions()["detector"] == 1


def test_weights_that_are_no_network_are_refused(tiny_repository, tmp_path) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    (tmp_path / "noise").write_bytes(b"noise" * 100)
    model_repository.publish(repository, model_repository.read_meta(repository, "encoder", 1), tmp_path / "noise")
    with pytest.raises(ModelMismatch, match="does not load"):
        Embedded(repository, pins={"encoder": 2})
    with Embedded(repository) as models:
        assert models.versions()["encoder"] == 1
