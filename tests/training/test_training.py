import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from progress import InterruptedByTest, RecordedProgress
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line.binarization import Region
from semwatch.line.pipeline import Candidate
from semwatch_training import __main__ as command_line
from semwatch_training.data import datasets
from semwatch_training.discovery import labelled_crops
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import Head
from semwatch_training.discovery.labelled_crops import Crops, hold_out_report, match, synthetic_images
from semwatch_training.families.branch import few_shot
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import NIDetector
from semwatch_training.families.ni.train_detector import Schedule, cache_features, rate_factor, raw_scores, train
from semwatch_training.synthetic import DEFECT_TYPES, STAGES, SyntheticMicrograph
from semwatch_training.trunks import backbone
from semwatch_training.trunks.vit import TrunkShape, VisionTransformer
from tiny_models import DETECTOR, detector_graph

SCHEDULE = Schedule(epochs=4, batch=4, warm_up_steps=3, features_per_image=16)
N_STEPS = 4 * (24 // 4)


# ---- the cache of features ----


def images(n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, 112, 112), dtype=np.uint8))


def cached(path: Path, n: int = 2, given: list[np.ndarray] | None = None) -> tuple[np.ndarray, int]:
    """Features, and how many images had to be run for them."""
    progress = RecordedProgress()
    features = cache_features(detector_graph(), images(n) if given is None else given, n, path, progress=progress)
    return features, len(progress.steps)


def test_cached_features_are_the_trunks_in_fp16(tmp_path) -> None:
    features, n_run = cached(tmp_path / "new" / "features.npy")
    with torch.no_grad():
        expected = detector_graph().features(torch.from_numpy(np.stack(images(2))))
    assert (features.shape, features.dtype, n_run) == ((2, 2, 64, 24), np.float16, 2)
    assert np.allclose(features, expected.numpy(), rtol=2e-3, atol=2e-3)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["features.npy"]


def test_cache_of_the_right_shape_is_reused(tmp_path) -> None:
    first, _ = cached(tmp_path / "features.npy")
    again, n_run = cached(tmp_path / "features.npy")
    assert n_run == 0
    assert np.array_equal(first, again)


@pytest.mark.parametrize("content", ["other shape", "other type", "cut off", "foreign", "empty"])
def test_cache_that_does_not_fit_is_rebuilt(tmp_path, content) -> None:
    path = tmp_path / "features.npy"
    if content == "other shape":
        cached(path, n=3)
    elif content == "other type":
        np.save(path, np.zeros((2, 2, 64, 24), np.float32))
    elif content == "cut off":
        cached(path)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(b"" if content == "empty" else b"no array in here")
    features, n_run = cached(path)
    assert (features.shape, n_run) == ((2, 2, 64, 24), 2)
    assert np.abs(features).max(axis=(1, 2, 3)).min() > 0


def test_interrupted_cache_is_never_taken_for_a_whole_one(tmp_path) -> None:
    path = tmp_path / "features.npy"
    with pytest.raises(InterruptedByTest):
        cache_features(detector_graph(), images(3), 3, path, progress=RecordedProgress(interrupt_at=2))
    assert not path.exists()
    features, n_run = cached(path, n=3)
    assert n_run == 3
    assert np.abs(features).max(axis=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("n_given", [1, 3])
def test_cache_of_more_or_fewer_images_than_said_is_not_kept(tmp_path, n_given) -> None:
    with pytest.raises(ValueError, match="zip"):
        cached(tmp_path / "features.npy", n=2, given=images(n_given))
    assert not (tmp_path / "features.npy").exists()


# ---- the loop ----


def toy_features() -> np.ndarray:
    """Every feature is one of four, and noise: there is something to learn."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(4, 24))
    return (kinds[rng.integers(0, 4, (24, 2, 64))] + 0.3 * rng.normal(size=(24, 2, 64, 24))).astype(np.float16)


def fresh(seed: int = 5) -> NIDetector:
    torch.manual_seed(seed)
    return NIDetector(DETECTOR)


def same_weights(a: NIDetector, b: NIDetector) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("pseudo_defects", [False, True])
def test_training_lowers_both_losses(tmp_path, pseudo_defects) -> None:
    schedule, progress = replace(SCHEDULE, pseudo_defects=pseudo_defects), RecordedProgress()
    curve = train(fresh(), toy_features(), schedule, tmp_path, progress=progress)
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4]
    assert curve[-1]["reconstruction_loss"] < 0.75 * curve[0]["reconstruction_loss"]
    assert curve[-1]["normal_loss"] < curve[0]["normal_loss"]
    assert progress.steps == [(step, N_STEPS) for step in range(1, N_STEPS + 1)]


@pytest.mark.parametrize("pseudo_defects", [False, True])
@pytest.mark.parametrize("interrupt_at", [3, 12, 15])  # in the first epoch, at the end of one, within one
def test_interrupted_training_ends_with_the_very_weights_of_an_uninterrupted_one(
    tmp_path, pseudo_defects, interrupt_at
) -> None:
    schedule, features = replace(SCHEDULE, pseudo_defects=pseudo_defects), toy_features()
    whole = fresh()
    curve = train(whole, features, schedule, tmp_path / "whole", progress=RecordedProgress())
    with pytest.raises(InterruptedByTest):
        train(fresh(), features, schedule, tmp_path / "cut", progress=RecordedProgress(interrupt_at))
    # Without a checkpoint the weights it starts from count; with one they do not.
    resumed, progress = fresh(5 if interrupt_at == 3 else 99), RecordedProgress()
    curve_resumed = train(resumed, features, schedule, tmp_path / "cut", progress=progress)
    assert progress.steps[0] == ({3: 1, 12: 7, 15: 13}[interrupt_at], N_STEPS)
    assert same_weights(whole, resumed)
    drop = {"seconds", "eta_seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in curve_resumed] == [
        {k: v for k, v in row.items() if k not in drop} for row in curve
    ]


def test_finished_training_is_not_done_again(tmp_path) -> None:
    whole, again, progress = fresh(), fresh(99), RecordedProgress()
    curve = train(whole, toy_features(), SCHEDULE, tmp_path, progress=RecordedProgress())
    assert train(again, toy_features(), SCHEDULE, tmp_path, progress=progress) == curve
    assert progress.steps == []
    assert same_weights(whole, again)


def test_another_seed_gives_other_weights(tmp_path) -> None:
    first, second = fresh(), fresh()
    train(first, toy_features(), SCHEDULE, tmp_path / "1", progress=RecordedProgress())
    train(second, toy_features(), replace(SCHEDULE, seed=2), tmp_path / "2", progress=RecordedProgress())
    assert not same_weights(first, second)


def test_checkpoint_of_other_settings_is_refused_and_left_alone(tmp_path) -> None:
    one_epoch, features = replace(SCHEDULE, epochs=1), toy_features()
    train(fresh(), features, one_epoch, tmp_path, progress=RecordedProgress())
    before = (tmp_path / "checkpoint.pt").read_bytes()
    other_form = NIDetector(replace(DETECTOR, attention="literal"))  # the same shapes, another network
    for detector, given, schedule in (
        (fresh(), features, SCHEDULE),
        (fresh(), features, replace(one_epoch, gamma=2.0)),
        (fresh(), features[:20], one_epoch),
        (other_form, features, one_epoch),
    ):
        with pytest.raises(ConfigError, match=r"other settings; remove it or give another --out"):
            train(detector, given, schedule, tmp_path, progress=RecordedProgress())
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_fewer_images_than_a_batch_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="3 training images are fewer than a batch of 4; lower --batch"):
        train(fresh(), toy_features()[:3], SCHEDULE, tmp_path, progress=RecordedProgress())


def test_rate_warms_up_linearly_falls_without_a_step_up_and_stays_at_its_floor() -> None:
    schedule = Schedule(warm_up_steps=10, learning_rate=1e-3, final_learning_rate=1e-4)
    factors = [rate_factor(step, 110, schedule) for step in range(120)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert factors[60] == pytest.approx((1 + 0.1) / 2)
    assert factors[110:] == pytest.approx([0.1] * 10)


def test_training_shorter_than_its_warm_up_has_a_rate() -> None:
    assert [rate_factor(step, 2, Schedule(warm_up_steps=40)) for step in range(2)] == [1 / 40, 2 / 40]


def test_training_leaves_its_curve_beside_the_checkpoint(tmp_path) -> None:
    curve = train(fresh(), toy_features(), replace(SCHEDULE, epochs=2), tmp_path, progress=RecordedProgress())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == curve
    assert curve[0]["eta_seconds"] == pytest.approx(curve[0]["seconds"])
    assert curve[1]["eta_seconds"] == 0


# ---- few shots ----


def test_no_shot_or_no_view_is_refused() -> None:
    shots = images(1)
    for given, views in (([], 22), (shots, 0)):
        with pytest.raises(ConfigError, match="needs an image and a view"):
            few_shot.few_shot_images(given, 1, views=views)


@pytest.mark.parametrize("k", [1, 4])
def test_each_shot_gives_itself_and_its_views(k) -> None:
    shots = images(k)
    made = few_shot.few_shot_images(shots, 1, views=5, size_px=112)
    assert [(view.shape, view.dtype) for view in made] == [((112, 112), np.uint8)] * (5 * k)
    assert all(np.array_equal(made[5 * i], shot) for i, shot in enumerate(shots))
    assert len({view.tobytes() for view in made}) == 5 * k
    again = few_shot.few_shot_images(shots, 1, views=5, size_px=112)
    other = few_shot.few_shot_images(shots, 2, views=5, size_px=112)
    assert np.array_equal(made, again)
    assert not np.array_equal(made, other)


def test_black_shot_stays_without_structure() -> None:
    made = few_shot.few_shot_images([np.zeros((80, 60), np.uint8)], 0, views=9, size_px=56)
    assert max(int(view.std()) for view in made) == 0


# ---- the weights file ----


def test_weights_come_back_in_half_precision_with_form_scores_and_provenance(tmp_path) -> None:
    detector, path = fresh(), tmp_path / "new" / "detector.safetensors"
    train_detector.save(detector, path, normal_scores=[0.1, 0.25], provenance={"seed": 5, "normals": "synthetic"})
    loaded, normal_scores, provenance = train_detector.load(path)
    assert (loaded.form, normal_scores, provenance) == (DETECTOR, [0.1, 0.25], {"seed": 5, "normals": "synthetic"})
    assert not loaded.training
    for name, value in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o044 or not Path(__file__).stat().st_mode & 0o044  # as readable as any file


def test_absent_or_foreign_weights_are_refused(tmp_path) -> None:
    path = tmp_path / "detector.safetensors"
    with pytest.raises(ConfigError, match=r"no detector weights at .*semwatch-train detector"):
        train_detector.load(path)
    for content in (b"", b"not safetensors at all"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="holds no detector"):
            train_detector.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match="holds no detector"):
        train_detector.load(path)


def test_weights_of_another_release_are_refused(tmp_path) -> None:
    path, state = tmp_path / "detector.safetensors", fresh().state_dict()
    form = {"trunk": "tiny", "width": 24, "heads": 2, "layers": [0, 1, 2, 3], "n_normal_tokens": 2, "input_px": 112}
    rest = {"normal_scores": "[]", "provenance": "{}"}
    save_file(state, path, metadata={"form": json.dumps(form), **rest})
    assert train_detector.load(path)[0].form == DETECTOR
    for wrong in (json.dumps({**form, "colour": "red"}), json.dumps({**form, "width": 48}), "{", "[]"):
        save_file(state, path, metadata={"form": wrong, **rest})
        with pytest.raises(ConfigError, match="holds no detector of this release"):
            train_detector.load(path)


def test_raw_scores_are_the_graphs_one_for_each_image() -> None:
    graph, progress = detector_graph(), RecordedProgress()
    scores = raw_scores(graph, images(3), 3, progress=progress)
    with torch.no_grad():
        expected = graph(torch.from_numpy(np.stack(images(3))))[1]
    assert scores == pytest.approx(expected.tolist(), rel=1e-4)
    assert progress.steps == [(1, 3), (2, 3), (3, 3)]


# ---- what to train on ----


def test_synthetic_normals_are_as_many_and_as_large_as_asked() -> None:
    assert list(datasets.synthetic_normals(0, first_seed=1, size_px=112)) == []
    found = list(datasets.synthetic_normals(3, first_seed=1, size_px=112))
    assert [(image.shape, image.dtype) for image in found] == [((112, 112), np.uint8)] * 3
    assert min(image.std() for image in found) > 1


def test_synthetic_normals_of_one_seed_are_the_same_and_of_another_are_not() -> None:
    first, again, other = (list(datasets.synthetic_normals(2, first_seed=seed, size_px=64)) for seed in (1, 1, 50))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_folder_without_images_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="is not a folder of images"):
        datasets.folder_images(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match=r"holds no image \(.tif, "):
        datasets.folder_images(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder of images"):
        datasets.folder_images(tmp_path / "notes.txt")


def write_images(folder: Path, n: int, size: int = 64) -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = list(np.random.default_rng(n).integers(0, 256, (n, size, size), dtype=np.uint8))
    for index, image in enumerate(pixels):
        assert cv2.imwrite(str(folder / f"{index:02d}.png"), image)
    return pixels


def test_folder_images_are_found_at_any_depth_in_order_and_read_as_they_are(tmp_path) -> None:
    inner, outer = write_images(tmp_path / "b", 2), write_images(tmp_path / "a" / "deep", 1)
    (tmp_path / "a" / "deep" / "00.png").rename(tmp_path / "a" / "deep" / "00.PNG")
    paths = datasets.folder_images(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in paths] == ["a/deep/00.PNG", "b/00.png", "b/01.png"]
    read = list(datasets.normal_images(paths, size_px=64))
    assert np.array_equal(read, [*outer, *inner])


# ---- labelled crops ----


def candidate(mask: np.ndarray) -> Candidate:
    region = Region((0, 0, 1, 1), 1, 0.5, mask)
    nothing = np.zeros((0, 0))
    return Candidate(region, (0, 0, 1, 1), nothing.astype(np.uint8), nothing.astype(np.float32), nothing)


def truth(*boxes: tuple[int, int, int, int], labels: tuple[str, ...], size_hw: tuple[int, int] = (64, 128)):
    """A micrograph whose defects fill boxes (x0, y0, x1, y1)."""
    masks = np.zeros((len(boxes), *size_hw), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return SyntheticMicrograph(np.zeros(size_hw, np.uint8), masks, labels, "BEOL", 0, 1.0, np.zeros(size_hw))


def grid(x0: int, y0: int, x1: int, y1: int, g: int = 16) -> np.ndarray:
    mask = np.zeros((g, g), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_no_candidate_has_no_label() -> None:
    assert match((), truth((0, 0, 8, 8), labels=("void",))) == []


def test_candidate_without_a_truth_under_it_is_defect_free() -> None:
    image = truth((0, 0, 32, 16), labels=("void",))  # grid cells are 8 x 4 pixels: 4 x 4 cells
    assert match((candidate(grid(4, 0, 8, 4)),), image) == [DEFECT_FREE]  # right beside it
    assert match((candidate(grid(0, 0, 4, 4)),), truth(labels=())) == [DEFECT_FREE]


def test_overlap_counts_as_a_share_of_the_smaller() -> None:
    image = truth((0, 0, 32, 16), labels=("void",))
    cases = {
        (0, 0, 4, 4): "void",  # the very same
        (1, 1, 2, 2): "void",  # a small part inside a large defect
        (0, 0, 16, 16): "void",  # a whole field around a small defect
        (3, 0, 7, 4): "void",  # a quarter in common: just enough
        (3, 1, 7, 5): DEFECT_FREE,  # 3 cells of 16
    }
    found = match(tuple(candidate(grid(*box)) for box in cases), image)
    assert found == list(cases.values())


def test_of_two_truths_the_one_that_overlaps_more_gives_the_name() -> None:
    image = truth((0, 0, 32, 16), (32, 0, 64, 16), labels=("void", "bridge"))
    assert match((candidate(grid(1, 0, 5, 4)), candidate(grid(3, 0, 7, 4))), image) == ["void", "bridge"]


def test_two_candidates_of_one_defect_both_bear_its_name() -> None:
    image = truth((0, 0, 64, 16), labels=("scratch",))
    assert match((candidate(grid(0, 0, 3, 3)), candidate(grid(5, 0, 8, 3))), image) == ["scratch", "scratch"]


def test_one_synthetic_image_in_eight_is_clean_and_the_types_take_turns(monkeypatch) -> None:
    drawn: list[tuple[str, tuple[str, ...], int]] = []

    def noted(stage: str, defects: tuple[str, ...], seeds: range, size_hw: tuple[int, int]):
        assert size_hw[0] == size_hw[1]
        assert size_hw[0] in labelled_crops.SIDES_PX
        drawn.append((stage, defects, seeds[0]))
        return truth(labels=())

    monkeypatch.setattr(labelled_crops, "first_with_room", noted)
    n_types = sum(len(types) for types in DEFECT_TYPES.values())
    assert len(list(synthetic_images(8 * n_types, first_seed=100))) == 8 * n_types
    counts = {label: sum(defects == (label,) for _, defects, _ in drawn) for s in STAGES for label in DEFECT_TYPES[s]}
    assert sum(not defects for _, defects, _ in drawn) == n_types
    assert set(counts.values()) == {7}  # clean ones are taken from all types alike
    assert all(defects == () or defects[0] in DEFECT_TYPES[stage] for stage, defects, _ in drawn)
    assert [seed for _, _, seed in drawn] == list(range(100, 100 + 8 * n_types))


def test_synthetic_images_of_one_seed_are_the_same() -> None:
    first, again = (next(iter(synthetic_images(1, first_seed=3))) for _ in range(2))
    assert np.array_equal(first.pixels, again.pixels)
    assert first.labels == again.labels == (DEFECT_TYPES[STAGES[0]][0],)


def test_collected_crops_keep_their_image_and_count_what_was_planted(tiny_repository) -> None:
    from semwatch.models.inference import Embedded
    from semwatch.settings.recipe import Recipe

    progress = RecordedProgress()
    with Embedded(tiny_repository, models=("detector", "encoder"), threads=1) as models:
        shut = Recipe.model_validate({"gate": {"threshold": 9.0}})  # collect opens it: the head must know false alarms
        crops = labelled_crops.collect(models, shut, n_images=8, first_seed=5, progress=progress)
    assert len(crops.features) == len(crops.labels) == len(crops.image_idx) >= 8
    assert crops.features.shape[1] == models_width(tiny_repository)
    assert sum(crops.n_planted.values()) == 7
    by_image = [{label for label, i in zip(crops.labels, crops.image_idx, strict=True) if i == n} for n in range(8)]
    assert all(labels - {DEFECT_FREE} for labels in by_image[:7])  # found, or cut out along its true mask
    assert len(crops.labels) - sum(crops.n_found.values()) == 7 - len(set(crops.n_found) - {DEFECT_FREE})
    assert set(crops.image_idx.tolist()) == set(range(8))
    assert {label for label, i in zip(crops.labels, crops.image_idx, strict=True) if i == 7} == {DEFECT_FREE}
    assert progress.steps[-1] == (8, 8)


def models_width(repository: Path) -> int:
    from semwatch.models import model_repository

    return model_repository.read_meta(repository, "encoder", 1).outputs["features"].shape[0]


def toy_crops(n_images: int = 60, per_image: int = 3) -> Crops:
    """Crops whose last feature says which image they came from; the first ones their class."""
    rng = np.random.default_rng(0)
    image_idx = np.repeat(np.arange(n_images), per_image)
    labels = tuple(("bridge", "particle")[i % 2] for i in range(n_images * per_image))
    features = rng.normal(size=(len(labels), 12)).astype(np.float32)
    features[:, 0] += np.where(np.array(labels) == "bridge", 6, -6)
    features[:, -1] = image_idx
    return Crops(features, labels, image_idx, np.ones(len(labels), int), {}, {})


def test_hold_out_keeps_the_crops_of_an_image_together(monkeypatch) -> None:
    fitted_on: list[np.ndarray] = []

    def noted(features: np.ndarray, labels: list[str], fit: HeadFit, **options: Any) -> Head:
        fitted_on.append(features[:, -1].astype(int))
        return fit_head(features, labels, fit, **options)

    monkeypatch.setattr(labelled_crops, "fit_head", noted)
    report = hold_out_report(toy_crops(), HeadFit(frozen_width=10, components=6))
    images_fitted, counts = np.unique(fitted_on[0], return_counts=True)
    assert len(images_fitted) == 45
    assert set(counts) == {3}  # none is torn apart
    assert report["n_held_out"] == 15 * 3


def test_hold_out_report_of_separable_classes_is_near_perfect_and_of_noise_is_not() -> None:
    crops, fit = toy_crops(), HeadFit(frozen_width=10, components=6)
    good = hold_out_report(crops, fit)
    assert good["accuracy"] > 0.97
    assert good["macro_f1"] > 0.97
    assert 0 <= good["unknown_share"] < 0.3
    assert good["decided_share"] > 0.7
    assert good["decided_accuracy"] > 0.97
    noise = np.random.default_rng(1).normal(size=crops.features.shape).astype(np.float32)
    assert hold_out_report(replace(crops, features=noise), fit)["accuracy"] < 0.75


# ---- the command ----


@pytest.fixture
def thin_backbone(monkeypatch) -> None:
    """The default trunk's layers at a fraction of its width."""

    def load(cache: Path) -> VisionTransformer:
        trunk = VisionTransformer(TrunkShape(width=24, depth=12, heads=2, patch=14, position_grid=8))
        return trunk.eval().requires_grad_(False)

    monkeypatch.setattr(backbone, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def command(*arguments: object) -> None:
    result = CliRunner().invoke(command_line.app, ["ni-detector", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_detector_command_trains_on_a_folder_and_keeps_a_quarter_for_the_gate(tmp_path, thin_backbone) -> None:
    write_images(tmp_path / "normals", 8)
    out = tmp_path / "detector.safetensors"
    command("--out", out, "--normals", tmp_path / "normals", "--epochs", 1, "--batch", 3)
    detector, normal_scores, provenance = train_detector.load(out)
    assert detector.form.width == 24
    assert len(normal_scores) == 2
    assert provenance["n_train"] == 6
    assert provenance["backbone"] == backbone.WHEEL_SHA256


def test_work_of_another_run_is_not_taken_for_this_one(tmp_path, thin_backbone) -> None:
    for name in ("first", "second"):
        write_images(tmp_path / name, 8)
    rest = ("--out", tmp_path / "detector.safetensors", "--epochs", 1, "--batch", 3)
    command("--normals", tmp_path / "first", *rest)
    command("--normals", tmp_path / "first", *rest)
    with pytest.raises(ConfigError, match=r"holds another run .*first.*remove it or give another --out"):
        command("--normals", tmp_path / "second", *rest)


def test_too_few_normal_images_are_refused(tmp_path, thin_backbone) -> None:
    write_images(tmp_path / "normals", 3)
    with pytest.raises(ConfigError, match="holds 3 images; a detector needs 8"):
        command("--out", tmp_path / "detector.safetensors", "--normals", tmp_path / "normals")
