"""A head of ReCAME-Net's family is published, served, exchanged, rolled back and fitted again like any other."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from progress import quiet
from semwatch.errors import ConfigError
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.head_bank import Bank
from semwatch.models.inference import Embedded
from semwatch.triton import plans
from semwatch_training.discovery import head as heads
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import Head, save_head
from semwatch_training.engines import build as engines
from semwatch_training.engines import parity
from semwatch_training.families.ni import export as ni_export
from semwatch_training.families.recame import export as recame_export
from semwatch_training.families.recame.classifier import Recame, Student
from semwatch_training.families.recame.fit_recame import Schedule
from semwatch_training.families.recame.network import RecameForm, Regions
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.learning.refit import refit
from semwatch_training.publishing import head_families
from semwatch_training.publishing.export import publish, publish_head, random_inputs
from tiny_models import LABELS, blobs, detector_graph, encoder_graph
from tiny_models import head as linear_head

REGIONS = Regions(24, 2)
FROZEN, PLAIN = encoder_graph().frozen_width, encoder_graph().width
WIDTH = PLAIN + REGIONS.width
FIT = HeadFit(frozen_width=FROZEN, components=8)
RECAME = Recame(REGIONS, RecameForm(experts=2, width=16), Schedule(epochs=40, batch=16))
RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is absent: pip install tensorrt-rtx-cu13"
)


def recame_head(bank: Bank | None = None) -> Head:
    samples = bank or blobs(WIDTH)
    return fit_head(samples.features, samples.labels, FIT, classify=RECAME)


def answers(head: Head, features: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [x.numpy() for x in head.eval()(torch.from_numpy(features))]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with regions; head 1 is linear, head 2 of ReCAME-Net."""
    repository = tmp_path_factory.mktemp("recame") / "models"
    exported = recame_export.with_regions(smg_vit_export.exported(encoder_graph()))
    encoder = publish(exported, repository)
    publish(ni_export.exported(detector_graph(), normal_scores=[0.1]), repository)
    for head in (linear_head(WIDTH, FROZEN), recame_head()):
        publish_head(
            head, repository, encoder_version=encoder, provenance={}, bank=blobs(WIDTH), golden=blobs(WIDTH, seed=1)
        )
    return repository


@pytest.fixture
def repository(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "models")


def test_logits_are_the_students_and_p_values_those_of_every_head() -> None:
    head, plain, fresh = recame_head(), linear_head(WIDTH, FROZEN), blobs(WIDTH, seed=1)
    logits, p = answers(head, fresh.features)
    assert isinstance(head.classifier, Student)
    assert len(head.classifier.network.experts) == 1
    assert np.mean([head.labels[k] == label for k, label in zip(logits.argmax(1), fresh.labels, strict=True)]) > 0.6
    assert np.array_equal(p, answers(plain, fresh.features)[1])
    assert (head.family, plain.family, head.width) == ("recame", "linear", WIDTH)
    assert answers(head, fresh.features[:0])[0].shape == (0, 3)


def test_weights_file_brings_the_head_back(tmp_path) -> None:
    head, features = recame_head(), blobs(WIDTH, seed=1).features
    save_head(head, tmp_path / "head.safetensors", encoder_form="form", provenance={"seed": 3})
    again, form, provenance = head_families.load_head(tmp_path / "head.safetensors")
    assert (form, provenance, again.labels, again.family) == ("form", {"seed": 3}, head.labels, "recame")
    for ours, theirs in zip(answers(again, features), answers(head, features), strict=True):
        assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()  # fp16 on disk
    with pytest.raises(ConfigError, match="its family is recame"):
        heads.load_head(tmp_path / "head.safetensors")


def test_weights_file_that_was_tampered_with_is_refused(tmp_path) -> None:
    head = recame_head()
    assert head.classifier is not None
    described = head.classifier.described()
    head.classifier.described = lambda: described.replace(f'"width": {WIDTH}', '"width": 7')  # type: ignore[method-assign]
    save_head(head, tmp_path / "head.safetensors", encoder_form="form", provenance={})
    with pytest.raises(ConfigError, match="7 features cannot hold"):
        head_families.load_head(tmp_path / "head.safetensors")


def test_embedded_runtime_answers_what_torch_computes_at_any_batch(published) -> None:
    head = recame_head()
    with Embedded(published, models=("encoder", "head"), threads=1) as models:
        assert models.versions()["head"] == 2
        for n in (1, 7, 90):
            features = blobs(WIDTH, seed=2).features[:n]
            answer = models.infer("head", {"features": features}).outputs
            for name, expected in zip(("logits", "p_values"), answers(head, features), strict=True):
                assert np.abs(answer[name] - expected).max() < 1e-3 * np.abs(expected).max()


def test_family_is_said_by_the_version_and_the_probe_guards_it(repository) -> None:
    metas = [model_repository.read_meta(repository, "head", version) for version in (1, 2)]
    assert [head_families.family_of(meta) for meta in metas] == ["linear", "recame"]
    path = repository / "head" / "2" / model_repository.PROBE
    arrays = dict(np.load(path))
    np.savez(path, **{key: value + 1 if "logits" in key else value for key, value in arrays.items()})
    with Embedded(repository, models=("encoder", "head"), threads=1) as models:
        assert models.versions()["head"] == 1


def test_running_models_take_it_over_and_a_rollback_brings_the_linear_one_back(repository) -> None:
    shutil.move(repository / "head" / "2", repository.parent / "later")
    with Embedded(repository, models=("encoder", "head"), threads=1) as models:
        features = blobs(WIDTH, seed=2).features[:3]
        before = models.infer("head", {"features": features})
        shutil.move(repository.parent / "later", repository / "head" / "2")
        swap = models.refresh()
        assert swap is not None
        after = models.infer("head", {"features": features})
        assert (before.version, after.version) == (1, 2)
        choice.withdraw(repository, "head", 2, "it was worse")
        models.refresh()
        back = models.infer("head", {"features": features})
    assert back.version == 1
    assert np.array_equal(back.outputs["logits"], before.outputs["logits"])
    assert not np.allclose(after.outputs["logits"], before.outputs["logits"])
    assert np.allclose(after.outputs["p_values"], before.outputs["p_values"], atol=1e-4)


@pytest.mark.slow
def test_refit_keeps_the_family_unless_another_is_asked_for(repository) -> None:
    kept = refit(repository).version
    linear = refit(repository, family="linear").version
    recame = refit(repository, family="recame", without=["bridge"]).version
    metas = [model_repository.read_meta(repository, "head", version) for version in (kept, linear, recame)]
    assert [head_families.family_of(meta) for meta in metas] == ["recame", "linear", "recame"]
    assert metas[2].labels == ("defect-free", "particle")
    with pytest.raises(ConfigError, match="no family of heads 'forest'; choose from linear, recame"):
        refit(repository, family="forest")


def test_regions_are_read_off_the_encoder(repository) -> None:
    encoder = model_repository.read_meta(repository, "encoder", 1)
    found = head_families.classify("recame", encoder, seed=4)
    assert isinstance(found, Recame)
    assert (found.regions, found.schedule.seed) == (REGIONS, 4)
    assert head_families.classify("linear", encoder, seed=0) is None


def test_encoder_without_regions_gives_a_head_without_attention(tiny_repository) -> None:
    encoder = model_repository.read_meta(tiny_repository, "encoder", 1)
    found = head_families.classify("recame", encoder, seed=0)
    assert isinstance(found, Recame)
    samples = blobs(PLAIN)
    short = replace(found, schedule=replace(found.schedule, epochs=2))
    head = fit_head(samples.features, samples.labels, FIT, classify=short)
    assert head.width == PLAIN
    assert not any("attention" in name for name in head.state_dict())


def test_features_of_another_width_are_refused_in_words() -> None:
    samples = blobs(30)
    with pytest.raises(ConfigError, match="30 features cannot hold 2 x 2 regions of 24 channels"):
        fit_head(samples.features, samples.labels, FIT, classify=RECAME)


def test_class_of_one_sample_and_one_class_alone_are_refused_by_name() -> None:
    samples = blobs(WIDTH)
    lone = ("pit", *samples.labels[1:])
    with pytest.raises(ConfigError, match=r"too few of \{'pit': 1\}"):
        fit_head(samples.features, lone, FIT, classify=RECAME)
    with pytest.raises(ConfigError, match="two classes or more"):
        fit_head(samples.features, ("bridge",) * 90, FIT, classify=RECAME)


def test_labels_are_those_of_the_bank(published) -> None:
    assert model_repository.read_meta(published, "head", 2).labels == LABELS
    assert set(head_bank.read(published / "head" / "2" / head_bank.BANK).labels) == set(LABELS)


@pytest.mark.parametrize("model", ["encoder", "head"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_it_converts_for_engines_and_stays_close(published, model, precision) -> None:
    version = {"encoder": 1, "head": 2}[model]
    meta = model_repository.read_meta(published, model, version)
    source = onnx.load(published / model / str(version) / "model.onnx")
    converted, judged = engines.convert(source, precision)
    assert converted.graph.output
    found = parity.judge(source, judged, {"noise": [random_inputs(meta, batch=5, seed=0)]})
    engines.check_parity(model, precision, found)


@RTX
@pytest.mark.slow
def test_plans_of_encoder_and_head_are_compiled_without_a_gpu(published, tmp_path) -> None:
    models = ("encoder", "head")
    made = list(
        engines.export(published, tmp_path, target="tensorrt-rtx", capabilities=(89,), models=models, progress=quiet)
    )
    assert [one.manifest.model for one in made] == list(models)
    assert all((tmp_path / one.manifest.folder / plans.PLAN).stat().st_size > 1000 for one in made)
