import json

import pytest

from semwatch.errors import ModelMismatch, PublishError
from semwatch.models import model_repository
from semwatch.models.model_repository import Meta, Tensor


def meta(model: str = "head") -> Meta:
    return Meta(
        model=model,
        created_utc="2025-01-01T00:00:00Z",
        inputs={"features": Tensor(dtype="float32", shape=(4,))},
        outputs={"logits": Tensor(dtype="float32", shape=(2,)), "p_values": Tensor(dtype="float32", shape=(2,))},
        labels=("a", "b"),
    )


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"weights")
    return path


def test_empty_repository_has_no_versions_and_says_how_to_build(tmp_path) -> None:
    assert model_repository.versions(tmp_path / "absent", "head") == []
    with pytest.raises(ModelMismatch, match="semwatch-train build"):
        model_repository.latest(tmp_path, "head")


def test_versions_count_up_and_travel_with_their_meta(tmp_path, weights) -> None:
    assert [model_repository.publish(tmp_path, meta(), weights) for _ in range(11)] == list(range(1, 12))
    assert model_repository.latest(tmp_path, "head") == 11  # and not 9, as text would sort
    found = model_repository.read_meta(tmp_path, "head", 11)
    assert found.labels == ("a", "b")
    assert model_repository.weights_path(tmp_path, "head", 11, found).read_bytes() == b"weights"


def test_changed_weights_are_refused(tmp_path, weights) -> None:
    model_repository.publish(tmp_path, meta(), weights)
    (tmp_path / "head/1/model.onnx").write_bytes(b"w3ights")
    with pytest.raises(ModelMismatch, match="sha256"):
        model_repository.weights_path(tmp_path, "head", 1, model_repository.read_meta(tmp_path, "head", 1))


def test_absent_version_and_foreign_meta_are_refused(tmp_path, weights) -> None:
    with pytest.raises(ModelMismatch, match="not in the model repository"):
        model_repository.read_meta(tmp_path, "head", 3)
    model_repository.publish(tmp_path, meta(), weights)
    path = tmp_path / "head/1/meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "surprise": 1}))
    with pytest.raises(ModelMismatch, match="surprise"):
        model_repository.read_meta(tmp_path, "head", 1)


def test_failed_publication_leaves_nothing_and_the_old_version_stays(tmp_path, weights) -> None:
    model_repository.publish(tmp_path, meta(), weights)
    with pytest.raises(PublishError):
        model_repository.publish(tmp_path, meta(), tmp_path / "absent.onnx")
    assert model_repository.versions(tmp_path, "head") == [1]
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == ["1"]


def test_half_written_version_is_not_seen(tmp_path, weights) -> None:
    model_repository.publish(tmp_path, meta(), weights)
    (tmp_path / "head/2").mkdir()
    (tmp_path / "head/2/model.onnx").write_bytes(b"half")
    assert model_repository.versions(tmp_path, "head") == [1]
