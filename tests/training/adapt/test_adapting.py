"""From normal and labelled images to models that serve, with tiny networks: one whole run, and what it refuses."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line import detection
from semwatch.models import head_bank, model_repository
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Pins, Recipe
from semwatch_training.adapt import adapting, own_heads
from semwatch_training.adapt.adapting import Outcome, Request
from semwatch_training.adapt.own_detector import BaseDetector, base_detector
from semwatch_training.adapt.own_heads import OWN, Option
from semwatch_training.families.intrinsic import adapt_intrinsic, export, own_statistics
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicGraph
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.publishing.export import publish, publish_head
from semwatch_training.publishing.head_families import family_of
from semwatch_training.system.defaults import SHIPPED_DETECTOR
from semwatch_training.trunks import backbone
from tiny_models import SHAPE, blobs, encoder_graph, exporting_once, head, intrinsic_graph

RECIPE = Recipe.model_validate({"name": "test", "gate": {"false_alarm_rate": 0.2}})
N_NORMALS = 5


def texture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    lines = 120 + 40 * np.sin(np.arange(112) / 3)[None] * np.ones((96, 1))
    return np.clip(lines + rng.normal(0, 6, (96, 112)), 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


def make_images(top: Path) -> None:
    """Normals, and labelled images of two classes: bright blobs and dark bars."""
    for seed in range(N_NORMALS):
        save(top / "normals" / f"{seed}.png", texture(seed))
    for seed in range(4):
        bright, dark = texture(100 + seed), texture(200 + seed)
        cv2.circle(bright, (40 + 8 * seed, 50), 9, 255, -1)
        cv2.rectangle(dark, (30, 20 + 9 * seed), (80, 26 + 9 * seed), 0, -1)
        save(top / "labels" / "BRIDGE" / f"{seed}.png", bright)
        save(top / "labels" / "bar" / f"{seed}.png", dark)


def detector() -> IntrinsicGraph:
    """A detector of random weights to which every process is a strange one."""
    graph = intrinsic_graph()
    graph.detector.domain_distances.zero_()
    return graph


def make_repository(folder: Path) -> Path:
    encoder = encoder_graph()
    width = encoder.frozen_width + SHAPE.width
    publish(export.exported(detector(), normal_scores=[i / 1000 for i in range(60)]), folder)
    version = publish(smg_vit_export.exported(encoder), folder)
    publish_head(
        head(width, encoder.frozen_width), folder, encoder_version=version, provenance={"made_from": "shipped"},
        bank=blobs(width), golden=blobs(width, seed=1),
    )  # fmt: skip
    return folder


def run(
    top: Path, *, yes: bool, labels: Path | None = None, recipe: Recipe = RECIPE, tries_recame: bool = False
) -> Outcome:
    trunk = top / "trunk"
    trunk.write_bytes(b"a trunk")
    load = lambda _: BaseDetector(detector(), "tiny", {export.TRUNK: trunk})  # noqa: E731
    request = Request(top / "models", (recipe,), top / "normals", labels, tries_recame=tries_recame)
    return adapting.adapt(request, load, report=top / "report", ask=lambda: yes, progress=lambda *_: None)


@pytest.fixture(scope="module")
def cheap(exports: Path) -> Iterator[None]:
    """Statistics of fewer steps, which export in half the time, and few cuts of a field."""
    with pytest.MonkeyPatch.context() as patch, exporting_once(exports):
        patch.setattr(adapt_intrinsic, "MOST_CUTS", 2)
        patch.setattr(own_statistics, "REFITS", 1)
        patch.setattr(own_statistics, "INVERSE_STEPS", 4)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cheap: None) -> tuple[Path, Outcome]:
    top = tmp_path_factory.mktemp("adapt")
    make_images(top)
    make_repository(top / "models")
    return top, run(top, yes=True, labels=top / "labels")


@pytest.mark.slow
def test_detector_and_head_are_published_and_load_beside_the_encoder(made) -> None:
    top, outcome = made
    assert (outcome.detector, outcome.head) == (2, 2)
    with Embedded(top / "models") as models:
        assert models.versions() == {"detector": 2, "encoder": 1, "head": 2}


@pytest.mark.slow
def test_process_is_known_afterwards_and_another_is_not(made) -> None:
    top, _ = made
    with Embedded(top / "models") as models:
        own, _ = detection.detect(texture(999), models)
        strange, _ = detection.detect(np.random.default_rng(0).integers(0, 256, (96, 112), np.uint8), models)
    assert own.domain_p is not None
    assert own.domain_p > 0.01
    assert strange.domain_p is not None
    assert strange.domain_p < own.domain_p


@pytest.mark.slow
def test_head_knows_own_classes_under_the_names_that_it_has_for_them(made) -> None:
    top, _ = made
    meta = model_repository.read_meta(top / "models", "head", 2)
    assert "bar" in meta.labels
    assert "BRIDGE" not in meta.labels, "the head in service calls it bridge"
    assert "bridge" in meta.labels
    bank = head_bank.read(top / "models" / "head" / "2" / head_bank.BANK)
    own = [label for label, image in zip(bank.labels, bank.images, strict=True) if image.startswith(OWN)]
    assert {"bar", "bridge", DEFECT_FREE} >= set(own) >= {"bar", "bridge"}
    assert all(ref is not None for ref, image in zip(bank.crops, bank.images, strict=True) if image.startswith(OWN))
    assert meta.provenance["made_from"] == "shipped", "`build` must not publish over it"
    detector = model_repository.read_meta(top / "models", "detector", 2)
    assert detector.provenance["made_from"] == "tiny"
    assert len(detector.normal_scores) >= N_NORMALS
    assert (top / "models" / "detector" / "2" / export.TRUNK).read_bytes() == b"a trunk"


def test_detector_that_serves_brings_its_trunk_along(repository, tmp_path) -> None:
    base = base_detector(repository, 1, SHIPPED_DETECTOR, tmp_path / "no such cache")
    assert base.files[export.TRUNK].parent == repository / "detector" / "1"
    (tmp_path / "damaged").write_bytes(base.files[export.TRUNK].read_bytes()[:1000])
    with pytest.raises(ConfigError, match="no checkpoint of the convolutional trunk"):
        backbone.read_efficientnet(tmp_path / "damaged")


@pytest.mark.slow
def test_report_shows_before_and_after_with_pictures(made) -> None:
    top, _ = made
    report = json.loads((top / "report" / "report.json").read_text())
    tables = {table["title"]: table for table in report["tables"]}
    assert {"Detector and gate", "Heads", "Verdicts", "Classes", "To know"} <= set(tables)
    assert [row[0] for row in tables["Heads"]["rows"]][:2] == ["in service now", "adapted detector, head as now"]
    assert any("Verdicts against truth" in figure["caption"] for figure in report["figures"])


@pytest.mark.slow
def test_few_normals_are_warned_of_with_what_they_can_promise(made) -> None:
    assert any("5 normal images cannot promise a false alarm rate under 17%" in note for note in made[1].notes)


@pytest.mark.slow
def test_given_again_the_same_images_take_the_place_of_the_earlier_ones(made) -> None:
    top, _ = made
    again = run(top, yes=True, labels=top / "labels")
    assert (again.detector, again.head) == (3, 3)
    banks = [head_bank.read(top / "models" / "head" / str(k) / head_bank.BANK) for k in (2, 3)]
    n_own = [sum(image.startswith(OWN) for image in bank.images) for bank in banks]
    assert n_own[0] == n_own[1]


@pytest.mark.slow
def test_nothing_is_published_without_a_yes_and_one_normal_is_taken(tmp_path, cheap) -> None:
    make_repository(tmp_path / "models")
    save(tmp_path / "normals" / "a.png", texture(1))
    outcome = run(tmp_path, yes=False)
    assert (outcome.detector, outcome.head) == (None, None)
    assert model_repository.versions(tmp_path / "models", "detector") == [1]
    assert any("1 normal image cannot promise" in note and "fewer than 3" in note for note in outcome.notes)
    assert (tmp_path / "report" / "report.md").is_file()


@pytest.mark.slow
def test_heads_of_another_family_are_judged_beside_the_others_where_asked_for(tmp_path, cheap, monkeypatch) -> None:
    make_images(tmp_path)
    repository = make_repository(tmp_path / "models")
    shown: list[str] = []

    def last(found: Sequence[Option]) -> Option:
        shown.extend(option.name for option in found)
        return next(option for option in found if option.name == "known and own classes, ReCAME-Net")

    monkeypatch.setattr(own_heads, "best", last)
    outcome = run(tmp_path, yes=True, labels=tmp_path / "labels", tries_recame=True)
    assert outcome.head == 2
    assert "known and own classes" in shown
    meta = model_repository.read_meta(repository, "head", 2)
    assert family_of(meta) == "recame"
    assert "bar" in meta.labels
    with Embedded(repository) as models:
        assert models.versions()["head"] == 2


def test_recipe_that_pins_a_detector_is_refused_before_anything_slow(tmp_path) -> None:
    with pytest.raises(ConfigError, match="pins detector or head"):
        run(tmp_path, yes=True, recipe=Recipe(pins=Pins(detector=1)))
