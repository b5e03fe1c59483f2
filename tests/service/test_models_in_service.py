"""The models that a daemon holds: what it says of them, and how it goes on where that cannot be written."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from semwatch.errors import ModelMismatch
from semwatch.models import model_repository
from semwatch.models.choice import PINNED
from semwatch.service.metrics import Metrics
from semwatch.service.models_in_service import ModelsInService
from semwatch.settings.recipe import Pins, Recipe
from semwatch.settings.site import Models
from semwatch.store import serving


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_repository, tmp_path / "models")


def publish(repository: Path, *, model: str = "head", **changes: object) -> int:
    meta = model_repository.read_meta(repository, model, 1).model_copy(update=changes)
    return model_repository.publish(repository, meta, repository / model / "1" / "model.onnx")


def hold(repository: Path, *recipes: Recipe, state_dir: Path, metrics: Metrics | None = None) -> ModelsInService:
    settings = Models(repository=repository, threads=1)
    return ModelsInService(settings, recipes, state_dir=state_dir, metrics=metrics or Metrics())


def test_repository_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="semwatch-train build"):
        hold(tmp_path / "nothing", Recipe(), state_dir=tmp_path)
    assert serving.announced(tmp_path) == ({}, {})


def test_recipes_of_equal_pins_share_their_networks(repository: Path, tmp_path: Path) -> None:
    publish(repository)
    free, other, pinned = Recipe(), Recipe(name="other"), Recipe(pins=Pins(head=1))
    models = hold(repository, free, other, pinned, state_dir=tmp_path)
    assert models.of(free) is models.of(other)
    assert [models.of(recipe).versions()["head"] for recipe in (free, pinned)] == [2, 1]
    assert models.versions()["head"] == 2  # announced is the one without a pin
    assert serving.announced(tmp_path)[0] == {"detector": 1, "encoder": 1, "head": 2}
    assert json.loads((tmp_path / serving.ANNOUNCED).read_bytes())["hashes"] == models.of(free).hashes()
    publish(repository)
    models.refresh()
    assert [models.of(recipe).versions()["head"] for recipe in (free, pinned)] == [3, 1]


def test_pin_that_says_nothing_leaves_what_serves_and_is_logged_once(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = hold(repository, Recipe(), state_dir=tmp_path)
    (repository / "head" / PINNED).write_text("two")
    models.refresh()
    models.refresh()
    assert models.versions()["head"] == 1
    (said,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("the head goes on as it is, for which one should serve is not known: ")
    assert said.endswith("must hold a version number alone; delete it, or pin again")


def test_head_that_was_refused_at_the_start_is_logged_counted_and_announced(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    publish(repository, encoder_sha256="0" * 64)
    models = hold(repository, Recipe(), state_dir=tmp_path, metrics=metrics)
    assert "head 2 is refused, the one before it goes on" in caplog.text
    assert metrics.registry.get_sample_value("semwatch_swap_refused_total", {"model": "head"}) == 1
    models.refresh()
    assert metrics.registry.get_sample_value("semwatch_swap_refused_total", {"model": "head"}) == 1
    versions, refused = serving.announced(tmp_path)
    assert (versions["head"], set(refused)) == (1, {2})


def test_announcement_that_the_disk_refused_is_warned_of_once_and_made_up_for(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = hold(repository, Recipe(), state_dir=tmp_path)
    (tmp_path / serving.ANNOUNCED).unlink()
    (tmp_path / serving.ANNOUNCED).mkdir()
    publish(repository)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            models.refresh()
    assert caplog.text.count("cannot say what serves") == 1
    assert models.versions()["head"] == 2
    (tmp_path / serving.ANNOUNCED).rmdir()
    models.refresh()
    assert serving.announced(tmp_path)[0]["head"] == 2


def test_codes_are_those_of_the_version_that_answered(repository: Path, tmp_path: Path) -> None:
    models = hold(repository, Recipe(), state_dir=tmp_path)
    publish(repository, codes={"bridge": 7})
    assert models.refresh()
    assert models.codes_of_head(None) == {}
    assert [dict(models.codes_of_head(version)) for version in (1, 2)] == [{}, {"bridge": 7}]


def test_detector_changes_when_it_is_asked_to_and_not_with_the_heads(repository: Path, tmp_path: Path) -> None:
    free, pinned = Recipe(), Recipe(pins=Pins(detector=1))
    models = hold(repository, free, pinned, state_dir=tmp_path)
    assert not models.has_new_detector()
    publish(repository, model="detector", normal_scores=tuple(k / 100 for k in range(60)))
    assert not models.refresh()
    assert models.has_new_detector()
    assert models.versions()["detector"] == 1
    assert models.refresh_detector()
    assert not models.has_new_detector()
    assert [models.of(recipe).versions()["detector"] for recipe in (free, pinned)] == [2, 1]
    assert serving.announced(tmp_path)[0]["detector"] == 2
    assert serving.await_version(tmp_path, "detector", 2, timeout_s=1) is None


def test_detector_that_cannot_promise_what_a_recipe_asks_is_refused_once(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = hold(repository, Recipe(), state_dir=tmp_path)
    publish(repository, model="detector", normal_scores=(0.1, 0.2))
    assert not models.refresh_detector()
    assert not models.has_new_detector()
    assert not models.refresh_detector()
    assert caplog.text.count("detector 2 is refused, the one before it goes on: recipe default: 2 normal images") == 1
    assert models.versions()["detector"] == 1
    assert set(serving.announced(tmp_path, "detector")[1]) == {2}
    why = serving.await_version(tmp_path, "detector", 2, timeout_s=1)
    assert why is not None
    assert "the daemon refused detector 2" in why


def test_detector_that_does_not_load_leaves_the_one_before_it_at_a_start_too(repository: Path, tmp_path: Path) -> None:
    models = hold(repository, Recipe(), state_dir=tmp_path)
    publish(repository, model="detector", normal_scores=tuple(k / 100 for k in range(60)))
    (repository / "detector" / "2" / "model.onnx").write_bytes(b"no network")
    assert not models.refresh_detector()
    assert models.versions()["detector"] == 1
    again = hold(repository, Recipe(), state_dir=tmp_path)
    assert again.versions()["detector"] == 1
    assert set(again.refused("detector")) == {2}
