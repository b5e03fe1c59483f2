"""A published head under other class names: real ONNX, loaded by the real runtime."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from semwatch.errors import ModelMismatch, PublishError
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.inference import Embedded
from semwatch.models.relabel import relabel

UTC = "2026-01-01T00:00:00Z"


@pytest.fixture
def repository(tmp_path: Path, tiny_repository: Path) -> Path:
    return shutil.copytree(tiny_repository, tmp_path / "models")


def file(repository: Path, version: int, name: str) -> Path:
    return repository / "head" / str(version) / name


def test_nothing_is_published_where_nothing_changes(repository) -> None:
    for names, codes in (({}, {}), ({"novel-1": "void"}, {"void": 3}), ({"bridge": "bridge"}, {}), ({}, {"void": 3})):
        assert relabel(repository, names, codes, utc=UTC) is None
    assert model_repository.versions(repository, "head") == [1]


def test_new_version_has_the_same_weights_and_the_new_name_everywhere(repository) -> None:
    assert relabel(repository, {"bridge": "novel-1", "nobody": "x"}, {}, utc=UTC) == 2
    old, new = (model_repository.read_meta(repository, "head", version) for version in (1, 2))
    assert old.labels == ("bridge", "defect-free", "particle")
    assert new.labels == ("novel-1", "defect-free", "particle")
    assert (new.weights_sha256, new.encoder_sha256) == (old.weights_sha256, old.encoder_sha256)
    assert (new.created_utc, new.provenance["relabelled_from"]) == (UTC, 1)
    assert new.provenance["relabelled"] == "bridge -> novel-1"
    for name in (head_bank.BANK, head_bank.GOLDEN):
        before, after = (head_bank.read(file(repository, version, name)) for version in (1, 2))
        assert after.labels == tuple("novel-1" if label == "bridge" else label for label in before.labels)
        assert "novel-1" in after.labels
        assert np.array_equal(after.features, before.features)
        assert (after.images, after.ids) == (before.images, before.ids)
    for name in (model_repository.WEIGHTS, model_repository.PROBE):
        assert file(repository, 2, name).read_bytes() == file(repository, 1, name).read_bytes()
    assert sorted(p.name for p in (repository / "head" / "2").iterdir()) == sorted(
        p.name for p in (repository / "head" / "1").iterdir()
    )


def test_head_in_service_answers_under_the_new_name_without_a_restart(repository) -> None:
    features = head_bank.read(file(repository, 1, head_bank.GOLDEN)).features[:5]
    with Embedded(repository) as models:
        before = models.infer("head", {"features": features})
        relabel(repository, {"bridge": "short"}, {"short": 12}, utc=UTC)
        swap = models.refresh()
        assert swap is not None
        assert (swap.version, swap.refused) == (2, None)
        after = models.infer("head", {"features": features})
    assert (after.version, after.meta.labels[0], dict(after.meta.codes)) == (2, "short", {"short": 12})
    assert np.array_equal(after.outputs["logits"], before.outputs["logits"])


def test_codes_move_with_their_class(repository) -> None:
    assert relabel(repository, {}, {"bridge": 7, "nobody": 1}, utc=UTC) == 2
    assert relabel(repository, {"bridge": "short"}, {"particle": 9}, utc=UTC) == 3
    assert dict(model_repository.read_meta(repository, "head", 3).codes) == {"short": 7, "particle": 9}
    assert relabel(repository, {}, {"short": 8}, utc=UTC) == 4
    assert dict(model_repository.read_meta(repository, "head", 4).codes) == {"short": 8, "particle": 9}


def test_two_classes_under_one_name_are_refused(repository) -> None:
    with pytest.raises(PublishError, match="two classes 'particle'; merge them instead"):
        relabel(repository, {"bridge": "particle"}, {}, utc=UTC)
    assert model_repository.versions(repository, "head") == [1]


def test_version_that_serves_is_relabelled_and_not_the_withdrawn_one(repository) -> None:
    relabel(repository, {"bridge": "wrong"}, {}, utc=UTC)
    choice.roll_back(repository, "head", "a test")
    assert relabel(repository, {"bridge": "short"}, {}, utc=UTC) == 3
    assert choice.choice(repository, "head") == 3
    assert model_repository.read_meta(repository, "head", 3).provenance["relabelled_from"] == 1


def test_pinned_head_is_left_alone(repository) -> None:
    choice.pin(repository, "head", 1)
    with pytest.raises(PublishError, match="head 1 is pinned; release it: `semwatch models pin head --release`"):
        relabel(repository, {"bridge": "short"}, {}, utc=UTC)
    assert model_repository.versions(repository, "head") == [1]


def test_head_without_bank_and_probe_is_relabelled_without(repository) -> None:
    for name in (head_bank.BANK, head_bank.GOLDEN, model_repository.PROBE):
        file(repository, 1, name).unlink()
    assert relabel(repository, {"bridge": "short"}, {}, utc=UTC) == 2
    assert sorted(p.name for p in (repository / "head" / "2").iterdir()) == ["meta.json", "model.onnx"]


@pytest.mark.parametrize("name", [model_repository.WEIGHTS, head_bank.BANK, head_bank.GOLDEN])
def test_damaged_head_is_not_published_again(repository, name) -> None:
    file(repository, 1, name).write_bytes(b"torn")
    with pytest.raises(ModelMismatch, match=r"publish the (version|head) again"):
        relabel(repository, {"bridge": "short"}, {}, utc=UTC)
    assert model_repository.versions(repository, "head") == [1]
    assert not list((repository / "head").glob(".staging-*"))


def test_repository_without_a_head_is_told(tmp_path) -> None:
    with pytest.raises(ModelMismatch, match="no head in the model repository"):
        relabel(tmp_path, {"bridge": "short"}, {}, utc=UTC)


def test_relabelled_meta_is_plain_json(repository) -> None:
    relabel(repository, {"bridge": "Kurzschluß 短路"}, {}, utc=UTC)
    assert json.loads(file(repository, 2, "meta.json").read_text())["labels"][0] == "Kurzschluß 短路"
