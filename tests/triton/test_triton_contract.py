"""Models under contracts of their own on a real Triton: the same answers as embedded, the same refusals."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

import toy_family
from semwatch.errors import ModelMismatch
from semwatch.line.pipeline import review
from semwatch.models import model_repository
from semwatch.models.inference import Embedded, Models
from semwatch.service.models_in_service import load_models
from semwatch.settings.recipe import Recipe
from semwatch.settings.site import Models as ModelSettings
from semwatch.triton.client import Triton
from semwatch.triton.config import may_share
from semwatch.triton.server import LocalTriton
from semwatch.triton.view import Settings, View, beside
from toy_family import real

OPEN = Recipe.model_validate({"gate": {"threshold": 0.0}})
FIRST = {"encoder": 1, "head": 1}
"""Other tests publish more."""


@pytest.fixture(scope="module")
def server(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalTriton, Path]]:
    """A server of a repository that holds the toy family alone."""
    folder = tmp_path_factory.mktemp("toys")
    repository = toy_family.publish_all(folder / "models")
    (folder / "triton").mkdir()
    (folder / "triton" / "venv").symlink_to(installed / "venv")
    server = LocalTriton(folder / "triton", repository, settings=Settings(threads=1))
    try:
        server.start()
        yield server, repository
    finally:
        server.stop(timeout_s=0.05)


def features_and_boxes(models: Models) -> list[tuple[bytes, object]]:
    pixels = np.random.default_rng(0).integers(60, 90, (300, 400), dtype=np.uint8)
    cv2.circle(pixels, (150, 120), 30, 220, cv2.FILLED)
    cv2.circle(pixels, (330, 200), 20, 10, cv2.FILLED)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    said = review(
        data, source="t", path="a.png", sha256=hashlib.sha256(data).hexdigest(), recipe=OPEN, models=models,
        reviewed_utc="2025-01-01T00:00:00Z",
    )  # fmt: skip
    page = said.pages[0]
    return [(page.score_map.values.tobytes(), page.score_map.raw_score)] + [
        (defect.features.tobytes(), (defect.box_xyxy, defect.verdict)) for defect in page.defects
    ]


def test_family_with_a_contract_of_its_own_judges_on_triton_as_it_does_embedded(server) -> None:
    started, repository = server
    with Embedded(repository, threads=1, pins=FIRST) as models:
        expected, hashes = features_and_boxes(models), models.hashes()
    with Triton(repository, url=started.url, timeout_s=10, pins=FIRST) as models:
        assert features_and_boxes(models) == expected
        assert models.hashes() == hashes
    assert len(expected) == 2


def test_contract_that_the_line_cannot_keep_is_refused_in_the_same_words(server) -> None:
    started, repository = server
    version = toy_family.publish_encoder(repository, phase_of_the_moon=real(1))
    for runtime in (
        lambda: Embedded(repository, pins={"encoder": version}),
        lambda: Triton(repository, url=started.url, timeout_s=10, pins={"encoder": version}),
    ):
        with pytest.raises(ModelMismatch, match="this encoder asks for `phase_of_the_moon`, which the line cannot"):
            runtime()


def test_recipes_that_pin_encoders_of_two_signatures_cannot_share_a_server(server) -> None:
    started, repository = server
    version = toy_family.publish_encoder(repository, size=real(2))
    other = {"encoder": version, "head": toy_family.publish_head(repository, version)}
    recipes = [Recipe.model_validate({"pins": pins}) for pins in (FIRST, other)]
    settings = {"repository": repository, "runtime": "triton", "triton": {"url": started.url}}
    with pytest.raises(ModelMismatch, match=r"pin encoder 1 and encoder \d, whose inputs differ: .* runtime: embedded"):
        load_models(ModelSettings.model_validate(settings, context={}), recipes)


# ---- one configuration for all versions of a model ----


def test_version_with_another_signature_takes_the_place_of_those_before_it(tmp_path) -> None:
    repository = toy_family.publish_all(tmp_path / "models")
    other = toy_family.publish_encoder(repository, size=real(2))
    again = toy_family.publish_encoder(repository, size=real(2))
    view = View(beside(repository), repository)
    view.prepare(Settings(threads=1))
    for version in (1, other, again):
        view.place("encoder", version)
    assert view.placed("encoder") == [other, again]
    assert not (view.folder / "encoder" / "1").exists()


def test_versions_share_a_configuration_where_only_sizes_of_outputs_differ(tmp_path) -> None:
    toy_family.publish_all(tmp_path)
    head, encoder = (model_repository.read_meta(tmp_path, model, 1) for model in ("head", "encoder"))
    more_classes = {name: real(5) for name in head.outputs}
    assert may_share(head, head.model_copy(update={"outputs": more_classes}))
    assert not may_share(head, head.model_copy(update={"outputs": {**head.outputs, "more": real(2)}}))
    assert not may_share(encoder, encoder.model_copy(update={"inputs": {**encoder.inputs, "size": real(2)}}))
    assert not may_share(head, head.model_copy(update={"inputs": {"features": real(9)}}))
