"""The encoder's training run: crops, training, resumption, the file, and what the repository serves of it."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from progress import quiet
from semwatch.errors import ConfigError, ModelMismatch
from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch.system.files import file_sha256
from semwatch_training import __main__ as command_line
from semwatch_training.discovery.head import save_head
from semwatch_training.families.exported import Exported
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import NIDetector
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit import self_supervision, unlabelled_crops
from semwatch_training.families.smg_vit.encoder_run import CropSource, train_encoder
from semwatch_training.families.smg_vit.export import form_text
from semwatch_training.families.smg_vit.self_supervision import Schedule
from semwatch_training.families.smg_vit.smg_vit import EncoderGraph, SmgVit
from semwatch_training.families.smg_vit.unlabelled_crops import Crops
from semwatch_training.publishing import build_repository
from semwatch_training.publishing.build_repository import build, served_form
from semwatch_training.trunks import backbone
from tiny_models import DETECTOR, ENCODER, SHAPE, head, trunk

SCHEDULE = Schedule(
    epochs=3,
    batch=4,
    learning_rate=1e-2,
    warm_up_steps=1,
    teacher_momentum=0.8,
    hidden=16,
    bottleneck=8,
    prototypes=12,
)
FROZEN = len(ENCODER.pooled_layers) * SHAPE.width + 2


@pytest.fixture(scope="module", autouse=True)
def tiny_backbone() -> Iterator[None]:
    """A tiny trunk in the place of the one that is fetched, and an encoder that fits it; no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "load", lambda cache: trunk())
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(build_repository, "_publish_detector", lambda *_, **__: 1)  # not what is tested, and slow
        patch.setattr(smg_vit_export, "EncoderForm", lambda: ENCODER)
        yield


def some_crops(n: int = 8) -> Crops:
    rng = np.random.default_rng(0)
    return Crops(rng.integers(0, 256, (n, 56, 56), dtype=np.uint8), rng.random((n, 4, 4), dtype=np.float32))


@pytest.fixture
def kept(tmp_path) -> Path:
    unlabelled_crops.save(some_crops(), tmp_path / "crops.npz")
    return tmp_path / "crops.npz"


def run(out: Path, source: CropSource, schedule: Schedule = SCHEDULE, progress=quiet, repository=Path("absent")):
    return train_encoder(out, ENCODER, source, schedule, repository=repository, cache=out.parent, progress=progress)


def write_images(folder: Path, n: int) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(np.random.default_rng(n).integers(0, 256, (n, 96, 96), dtype=np.uint8)):
        assert cv2.imwrite(str(folder / f"{index}.png"), image)
    return folder


# ---- crops ----


def test_crops_come_back_as_they_were_kept(kept) -> None:
    back = unlabelled_crops.load(kept, side_px=56, tokens=4)
    assert all(np.array_equal(a, b) for a, b in zip(back, some_crops(), strict=True))
    assert [path.name for path in kept.parent.iterdir()] == ["crops.npz"]


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 cut off", "array", "other keys"])
def test_file_without_crops_is_refused(tmp_path, content) -> None:
    path = tmp_path / "crops.npz"
    if content == "array":
        path = tmp_path / "crops.npy"
        np.save(path, np.zeros(3))
    elif content == "other keys":
        np.savez(path, features=np.zeros(3))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds no crops .*give what `semwatch-train encoder` kept"):
        unlabelled_crops.load(path, side_px=56, tokens=4)


def test_crops_of_another_size_are_refused(kept) -> None:
    for wanted in ({"side_px": 224, "tokens": 4}, {"side_px": 56, "tokens": 16}):
        with pytest.raises(ConfigError, match="this encoder wants"):
            unlabelled_crops.load(kept, **wanted)


def test_crops_are_what_the_detector_finds_in_synthetic_images_of_all_types(tiny_repository, monkeypatch) -> None:
    asked: list[tuple[str, int]] = []
    real = unlabelled_crops.datasets.synthetic_set

    def noted(stage: str, **numbers: int):
        asked.append((stage, numbers["first_seed"]))
        return real(stage, **numbers)

    monkeypatch.setattr(unlabelled_crops.datasets, "synthetic_set", noted)
    told: list[tuple[int, int]] = []
    with Embedded(tiny_repository, models=("detector", "encoder"), threads=1) as models:
        crops = unlabelled_crops.of_synthetic(models, 1, progress=lambda _, *done: told.append(done))
    assert told[-1] == (unlabelled_crops.N_TYPES, unlabelled_crops.N_TYPES)
    assert asked == [(stage, 5_000_000) for stage in unlabelled_crops.STAGES]
    assert len(crops.pixels) == len(crops.soft_masks) >= unlabelled_crops.N_TYPES  # the gate is open
    assert (crops.pixels.shape[1:], crops.soft_masks.shape[1:]) == ((56, 56), (4, 4))
    assert crops.soft_masks.min() >= 0
    assert 0 < crops.soft_masks.max() <= 1


def test_folder_where_the_gate_stays_shut_is_refused(tiny_repository, tmp_path, monkeypatch) -> None:
    shut = unlabelled_crops.Recipe.model_validate({"gate": {"threshold": 1e9}})
    monkeypatch.setattr(unlabelled_crops, "Recipe", lambda: shut)
    paths = unlabelled_crops.drawn(write_images(tmp_path / "archive", 2), 5, seed=0)
    with (
        Embedded(tiny_repository, models=("detector", "encoder"), threads=1) as models,
        pytest.raises(ConfigError, match="opened on none of 2 images"),
    ):
        unlabelled_crops.of_files(models, paths, progress=quiet)


def test_images_are_drawn_by_seed_and_all_where_there_are_few(tmp_path) -> None:
    folder = write_images(tmp_path / "archive", 9)
    assert [path.name for path in unlabelled_crops.drawn(folder, 20, seed=0)] == [f"{i}.png" for i in range(9)]
    first, again, other = (unlabelled_crops.drawn(folder, 4, seed=seed) for seed in (0, 0, 1))
    assert len(first) == 4
    assert first == again != other


def test_no_image_is_no_run(tiny_repository, tmp_path) -> None:
    (tmp_path / "archive").mkdir()
    with pytest.raises(ConfigError, match="holds no image"):
        run(tmp_path / "e.safetensors", CropSource(images=tmp_path / "archive"), repository=tiny_repository)


# ---- the run ----


def state(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def test_what_is_written_is_the_trained_layers_in_half_precision_with_their_origin(kept, tmp_path) -> None:
    out = tmp_path / "encoder.safetensors"
    last = run(out, CropSource(crops=kept))
    tensors = state(out)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert set(tensors) == set(SmgVit(trunk(), ENCODER).guided.state_dict())
    loaded = SmgVit(trunk(), ENCODER)
    provenance = self_supervision.load(out, loaded)
    assert (provenance["n_crops"], provenance["seed"], provenance["device"]) == (8, 1, "cpu")
    assert provenance["backbone"] == backbone.WHEEL_SHA256
    assert provenance["final_loss"] == last["loss"]
    moved = loaded.guided.blocks[0].mlp.fc1.weight - trunk().blocks[2].mlp.fc1.weight
    assert moved.abs().max() > 1e-3


def test_run_cut_off_ends_with_the_very_file_of_an_uninterrupted_one(kept, tmp_path) -> None:
    class Stop(Exception):
        """Power failure."""

    def pull_the_plug(what: str, done: int, total: int) -> None:
        if what.startswith("epoch 2"):
            raise Stop

    run(tmp_path / "a.safetensors", CropSource(crops=kept))
    with pytest.raises(Stop):
        run(tmp_path / "b.safetensors", CropSource(crops=kept), progress=pull_the_plug)
    assert not (tmp_path / "b.safetensors").exists()
    run(tmp_path / "b.safetensors", CropSource(crops=kept))
    whole, resumed = state(tmp_path / "a.safetensors"), state(tmp_path / "b.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_work_of_other_settings_is_refused(kept, tmp_path) -> None:
    out = tmp_path / "encoder.safetensors"
    run(out, CropSource(crops=kept), replace(SCHEDULE, epochs=1))
    with pytest.raises(ConfigError, match="other settings; remove it or give another --out"):
        run(out, CropSource(crops=kept), replace(SCHEDULE, epochs=1, seed=2))


def test_fewer_crops_than_a_batch_are_refused_before_any_view_is_made(kept, tmp_path) -> None:
    told: list[str] = []
    with pytest.raises(ConfigError, match="8 crops do not fill a batch of 9; give more crops, or a batch of 2 to 8"):
        run(
            tmp_path / "e.safetensors", CropSource(crops=kept), replace(SCHEDULE, batch=9), lambda *d: told.append(d[0])
        )
    assert not told


def test_crops_from_two_places_are_refused(kept, tmp_path) -> None:
    with pytest.raises(ConfigError, match="give --crops or --images, not both"):
        run(tmp_path / "e.safetensors", CropSource(crops=kept, images=tmp_path))


def test_images_of_a_folder_are_searched_once(tiny_repository, tmp_path, monkeypatch) -> None:
    open_gate = unlabelled_crops.Recipe.model_validate({"gate": {"threshold": 0.0}})
    monkeypatch.setattr(unlabelled_crops, "Recipe", lambda: open_gate)
    source = CropSource(images=write_images(tmp_path / "archive", 5))
    told: list[str] = []
    for epochs in (1, 1):
        schedule = replace(SCHEDULE, epochs=epochs)
        run(tmp_path / "e.safetensors", source, schedule, lambda *d: told.append(d[0]), tiny_repository)
    assert told.count("search") == 5
    cv2.imwrite(str(tmp_path / "archive" / "new.png"), np.zeros((96, 96), np.uint8))
    with pytest.raises(ConfigError, match="other settings"):  # other crops are another run
        run(tmp_path / "e.safetensors", source, replace(SCHEDULE, epochs=1), repository=tiny_repository)


def test_repository_without_a_detector_is_refused(tmp_path) -> None:
    with pytest.raises(ModelMismatch, match="no detector in the model repository"):
        run(tmp_path / "e.safetensors", CropSource(), repository=tmp_path / "absent")


def test_bf16_gives_finite_features_close_to_those_in_full_precision(kept) -> None:
    """What training does on CUDA, done on the CPU: types must fit there too."""
    vit = SmgVit(trunk(), ENCODER)
    tokens, masks = torch.randn(3, 17, SHAPE.width), torch.rand(3, 4, 4)
    with torch.no_grad():
        plain = vit.guided(tokens, masks)
        with torch.autocast("cpu", torch.bfloat16):
            half = vit.guided(tokens, masks)
    assert (plain * half.float()).sum(dim=1).min() > 0.98


# ---- what the repository serves ----


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A repository without a head, and its weights with a trained encoder; tests work on copies."""
    folder = tmp_path_factory.mktemp("built")
    weights = folder / "weights"
    weights.mkdir()
    torch.manual_seed(0)
    detector = NIDetector(replace(DETECTOR, trunk=backbone.TRUNK_NAME, layers=(0, 1)))
    train_detector.save(detector, weights / "detector.safetensors", normal_scores=[0.1, 0.2], provenance={})
    unlabelled_crops.save(some_crops(), folder / "crops.npz")
    run(weights / "encoder.safetensors", CropSource(crops=folder / "crops.npz"))
    assert publish(folder / "repository", weights) == ["detector 1", "encoder 1"]
    return folder / "repository", weights


@pytest.fixture
def copied(built, tmp_path) -> tuple[Path, Path]:
    return shutil.copytree(built[0], tmp_path / "repository"), shutil.copytree(built[1], tmp_path / "weights")


def publish(repository: Path, weights: Path, *, with_head: bool = False) -> list[str]:
    return list(build(repository, weights=weights, cache=weights / "cache", with_head=with_head))


def write_head(weights: Path, encoder_form: str) -> None:
    save_head(
        head(FROZEN + SHAPE.width, FROZEN), weights / "head.safetensors", encoder_form=encoder_form, provenance={}
    )


def test_trained_encoder_answers_what_torch_computes_and_names_its_file(built) -> None:
    repository, weights = built
    vit = SmgVit(trunk(), ENCODER)
    self_supervision.load(weights / "encoder.safetensors", vit)
    pixels, masks = some_crops(3)
    inputs = {"crop": pixels, "soft_mask": masks, "size": np.full((3, 2), -2.0, np.float32)}
    with torch.no_grad():
        expected, untrained = (
            EncoderGraph(network).eval()(*map(torch.from_numpy, inputs.values())).numpy()
            for network in (vit, SmgVit(trunk(), ENCODER))
        )
    with Embedded(repository, models=("encoder",), threads=1) as models:
        found = models.infer("encoder", inputs).outputs["features"]
        provenance = models.meta("encoder").provenance
    assert np.allclose(found, expected, atol=1e-4)
    assert np.allclose(found[:, :FROZEN], untrained[:, :FROZEN], atol=1e-5)
    assert np.abs(found[:, FROZEN:] - untrained[:, FROZEN:]).max() > 1e-3
    assert provenance["trained_layers"] == file_sha256(weights / "encoder.safetensors")
    assert provenance["frozen_width"] == FROZEN
    assert provenance["n_crops"] == 8


def test_second_build_publishes_nothing_and_one_without_the_file_the_trunks_own_layers(copied, monkeypatch) -> None:
    repository, weights = copied
    published: list[tuple[Exported, dict[str, object]]] = []

    def noted(exported: Exported, repository: Path, *, provenance: dict[str, object]) -> int:
        published.append((exported, provenance))
        return 2

    monkeypatch.setattr(build_repository, "publish", noted)
    assert publish(repository, weights) == ["detector 1", "encoder 1"]
    assert not published
    (weights / "encoder.safetensors").unlink()
    assert publish(repository, weights) == ["detector 1", "encoder 2"]
    ((exported, provenance),) = published
    assert set(provenance) == {"made_from"}
    assert "trained_layers" not in exported.meta.provenance
    graph = exported.graph
    assert isinstance(graph, EncoderGraph)
    own = SmgVit(trunk(), ENCODER).guided.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in graph.vit.guided.state_dict().items())


def test_encoder_file_of_another_trunk_or_form_is_refused(copied, monkeypatch) -> None:
    repository, weights = copied
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "load", lambda cache: trunk(seed=5))
        with pytest.raises(ConfigError, match=r"encoder.safetensors holds no encoder .*other frozen layers"):
            publish(repository, weights)
    with monkeypatch.context() as patch:
        patch.setattr(smg_vit_export, "EncoderForm", lambda: replace(ENCODER, initial_scale=2.0))
        with pytest.raises(ConfigError, match="of another form"):
            publish(repository, weights)
    (weights / "encoder.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match=r"give what `semwatch-train encoder` wrote"):
        publish(repository, weights)
    assert model_repository.versions(repository, "encoder") == [1]


def test_head_goes_with_the_encoder_that_it_was_fitted_on_and_with_no_other(copied, monkeypatch) -> None:
    repository, weights = copied
    write_head(weights, form_text(ENCODER))  # fitted before the encoder was trained
    with pytest.raises(ConfigError, match="fitted on another encoder"):
        publish(repository, weights, with_head=True)
    write_head(weights, served_form(repository))
    with monkeypatch.context() as patch:
        patch.setattr(build_repository, "publish_head", lambda *_, **__: 1)
        assert publish(repository, weights, with_head=True) == ["detector 1", "encoder 1", "head 1"]
    (weights / "encoder.safetensors").unlink()
    monkeypatch.setattr(build_repository, "publish", lambda *_, **__: 2)
    with pytest.raises(ConfigError, match="fitted on another encoder"):
        publish(repository, weights, with_head=True)


def test_encoder_of_another_release_gives_no_form_to_fit_a_head_on(copied, monkeypatch) -> None:
    repository, _ = copied
    monkeypatch.setattr(backbone, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="built by another release; build the repository again"):
        served_form(repository)
    with pytest.raises(ModelMismatch, match="no encoder"):
        served_form(repository / "absent")


# ---- the command ----


def test_command_trains_on_kept_crops_and_says_what_it_wrote(kept, tmp_path) -> None:
    out = tmp_path / "encoder.safetensors"
    options = ["--out", out, "--crops", kept, "--epochs", 1, "--batch", 4, "--cache", tmp_path]
    result = CliRunner().invoke(command_line.app, ["encoder", *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "encoder written to" in " ".join(result.output.split())
    assert self_supervision.load(out, SmgVit(trunk(), ENCODER))["crops"] == "a file"
    assert (tmp_path / "encoder.work" / "metrics.csv").is_file()
