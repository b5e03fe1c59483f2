from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import tiny_models
from progress import quiet
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data.datasets import Sample
from semwatch_training.evaluation import crop_experiments, detection_experiments, evaluate_detection
from semwatch_training.evaluation.binarization_rules import NAMES
from semwatch_training.evaluation.crop_experiments import MASKINGS, binarization, k_per_stage, mask_and_crop
from semwatch_training.evaluation.detection_experiments import cross_process, k_shot, normal_tokens
from semwatch_training.evaluation.evaluate_detection import Engine, Field
from semwatch_training.evaluation.report import Table
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.branch.train_branch import BranchSchedule
from semwatch_training.families.memory.memory_detector import MemoryForm, Trunks
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.families.ni.train_detector import Schedule
from semwatch_training.synthetic import STAGES
from semwatch_training.trunks.efficientnet import EfficientNet
from tiny_models import DETECTOR, trunk

FORM = MemoryForm(input_px=112, sizes_px=(56, 64), vit_layers=(0, 1), components=(24, 32), patches=200, candidates=300)


@pytest.fixture(scope="module")
def convolutional() -> EfficientNet:
    return tiny_models.convolutional()


def stripes(seed: int, side: int = 112) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wave = 120 + 50 * np.sin(np.arange(side) / 4 + rng.uniform(0, 6))
    return (wave + rng.normal(0, 5, (side, side))).clip(0, 255).astype(np.uint8)


def fields(n: int = 3) -> list[Field]:
    """Normal stripes, and stripes with a white box."""
    found = []
    for seed in range(n):
        marked, mask = stripes(100 + seed), np.zeros((112, 112), bool)
        mask[48:80, 32:64] = True
        marked[mask] = 250
        found += [Field(stripes(50 + seed), DEFECT_FREE, np.zeros_like(mask)), Field(marked, "box", mask)]
    return found


# ---- few-shot ----


class Bright(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score = torch.nn.functional.avg_pool2d(image[:, None].float(), 16)[:, 0]
        return score, score.flatten(1).amax(dim=1)


def shot(convolutional: EfficientNet, normals: list[np.ndarray], n_fields: int = 3, **options: object) -> Table:
    free = {"bright": Engine((Bright(),), 112, "none")}
    groups = {"lot": (normals, fields(n_fields))}
    return k_shot(
        Trunks(trunk(), convolutional), groups, support_set_free=free, form=FORM, progress=quiet, **options
    )  # fmt: skip


@pytest.mark.parametrize("shots", [[], [0], [1, 5]])
def test_shots_of_nothing_and_of_more_than_there_are_normals_are_refused(convolutional, shots) -> None:
    with pytest.raises(ConfigError, match="need 1 to 4 normal images"):
        shot(convolutional, [stripes(i) for i in range(4)], shots=shots, seeds=(0,))


def test_a_few_normal_images_are_enough_to_tell_a_white_box_and_stand_beside_none(convolutional) -> None:
    table = shot(convolutional, [stripes(i) for i in range(3)], shots=[2, 1], seeds=(0, 1))
    assert [cells[:4] for cells in table.rows] == [
        ("lot", 0, "bright", ""),
        ("lot", 1, "memory", "8 turns"), ("lot", 1, "memory", "22 views"),
        *(("lot", 2, "memory", views) for views in ("as they are", "8 turns", "22 views")),
    ]  # fmt: skip
    assert [cells[4].n for cells in table.rows] == [1, *[2] * 5]
    for cells in table.rows[1:]:
        assert cells[4].mean > 0.75  # the trunks are random
        assert cells[5].mean > 0.75
    assert table.note.startswith("6 fields judged; k of 3 normal images")


def test_the_seed_draws_the_shots_and_views_of_one_image_share_an_owner(convolutional, monkeypatch) -> None:
    drawn: list[tuple[int, list[int], object]] = []
    normals = [np.full((112, 112), level, np.uint8) for level in range(10)]
    real = detection_experiments.fit

    def noted(images: list[np.ndarray], trunks: Trunks, form: MemoryForm, **options: object) -> object:
        drawn.append((form.few_shot, [int(image[0, 0]) for image in images], options.get("groups")))
        return real([stripes(1)], trunks, replace(form, few_shot=1))

    monkeypatch.setattr(detection_experiments, "fit", noted)
    views_of = detection_experiments.few_shot_images
    monkeypatch.setattr(
        detection_experiments, "few_shot_images", lambda images, seed, **options: views_of(images, seed, views=3)
    )
    shot(convolutional, normals, n_fields=1, shots=[1, 4], seeds=(0, 1))
    of_one, of_four = drawn[:4], drawn[4:]
    assert [(few, len(shown), owners) for few, shown, owners in of_one] == [(8, 1, None)] * 2 + [(0, 3, None)] * 2
    assert [(few, len(shown)) for few, shown, _ in of_four] == [(0, 4)] * 2 + [(8, 4)] * 2 + [(0, 12)] * 2
    assert of_four[0][1] != of_four[1][1]  # another seed
    assert of_four[0][1] == of_four[2][1]  # however they are shown
    assert of_four[0][1][:1] == of_one[0][1]  # more shots are those of fewer and others
    assert of_four[4][2] == np.repeat(range(4), 3).tolist()


# ---- normal tokens ----


def test_each_number_of_tokens_is_judged_by_both_kinds_of_evidence_and_features_are_cached_once(tmp_path) -> None:
    built: list[DetectorForm] = []
    told: list[str] = []

    def graph_of(form: DetectorForm) -> DetectorGraph:
        tiny = replace(DETECTOR, n_normal_tokens=form.n_normal_tokens)
        built.append(tiny)
        return DetectorGraph(trunk(), NIDetector(tiny))

    table = normal_tokens(
        graph_of,
        [stripes(i) for i in range(6)],
        fields(2),
        tmp_path,
        tokens=(1, 3),
        schedule=Schedule(epochs=1, batch=3, features_per_image=16),
        seeds=(0, 1),
        progress=lambda what, *_: told.append(what),
    )
    assert [form.n_normal_tokens for form in built] == [1, 1, 3, 3]
    assert [cells[0] for cells in table.rows] == [1, 3]
    assert len(table.columns) == 5
    for cells in table.rows:
        assert all(0 <= cell.mean <= 1 and cell.n == 2 for cell in cells[1:])
        assert cells[1:3] != cells[3:5]  # rebuilding and matching are two things
    assert told.count("features") == 6
    assert {path.name for path in tmp_path.iterdir()} == {
        "features.npy", *(f"tokens-{m}-{seed}" for m in (1, 3) for seed in (0, 1))
    }  # fmt: skip


def test_fewer_normals_than_a_batch_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="2 training images are fewer than a batch of 8"):
        normal_tokens(
            lambda form: DetectorGraph(trunk(), NIDetector(replace(DETECTOR, n_normal_tokens=form.n_normal_tokens))),
            [stripes(i) for i in range(2)],
            fields(1),
            tmp_path,
            tokens=(1,),
            schedule=Schedule(epochs=1),
            seeds=(0,),
            progress=quiet,
        )


# ---- binarisation ----


def test_rules_are_compared_on_the_repository_s_maps_of_defective_fields(tiny_repository) -> None:
    told: list[tuple[int, int]] = []
    with Embedded(tiny_repository, models=("detector",), threads=1) as models:
        with pytest.raises(ConfigError, match="no field of DEP has a true mask"):
            binarization(models, {"DEP": fields(2)[::2]}, 2, progress=quiet)
        table = binarization(
            models, {"DEP": fields(2), "DPR": iter(fields(1))}, 6, progress=lambda _, *n: told.append(n)
        )
    n = len(NAMES)
    assert [cells[0] for cells in table.rows] == ["DEP"] * n + ["DPR"] * n
    assert [cells[2].n for cells in table.rows] == [2] * n + [1] * n
    assert all(0 <= cells[2].mean <= 1 and cells[4].mean >= 0 for cells in table.rows)
    assert told == [(done, 6) for done in range(1, 7)]


# ---- mask and crop ----


def sample(folder: Path, index: int, label: str, *, marked: bool = True) -> Sample:
    """Stripes with a square or a bar of its own gray."""
    image, mask = stripes(index, side=96), np.zeros((96, 96), np.uint8)
    mask[20:44, 20 : (44 if label == "square" else 90)] = 255
    image[mask > 0] = 240 if label == "square" else 10
    paths = folder / f"{index}.png", folder / f"{index}_mask.png"
    assert cv2.imwrite(str(paths[0]), image)
    assert cv2.imwrite(str(paths[1]), mask if marked else np.zeros_like(mask))
    return Sample(paths[0], label, paths[1])


def test_without_a_marked_defect_there_is_nothing_to_cluster(tmp_path, tiny_repository) -> None:
    normal = Sample(sample(tmp_path, 0, "square").image, DEFECT_FREE)
    with Embedded(tiny_repository, models=("encoder",), threads=1) as models:
        for samples in ([], [normal], [sample(tmp_path, 1, "square", marked=False)]):
            with pytest.raises(ConfigError, match="there is no defect to cluster"):
                mask_and_crop(samples, models, Recipe(), frozen_width=8, seeds=(0,), progress=quiet)


def test_the_encoder_is_shown_the_image_then_the_crop_then_the_mask(tmp_path, tiny_repository, monkeypatch) -> None:
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    real = crop_experiments.encode

    def noted(candidate, models):
        shown.append((candidate.crop, candidate.soft_mask))
        return real(candidate, models)

    monkeypatch.setattr(crop_experiments, "encode", noted)
    samples = [sample(tmp_path, i, ("square", "bar")[i % 2]) for i in range(6)]
    with Embedded(tiny_repository, models=("encoder",), threads=1) as models:
        width = int(models.meta("encoder").provenance["frozen_width"])
        table = mask_and_crop(samples, models, Recipe(), frozen_width=width, seeds=(0, 1), progress=quiet)
    assert [cells[0] for cells in table.rows] == list(MASKINGS)
    assert all(cell.n == 2 and -0.5 <= cell.mean <= 1 for cells in table.rows for cell in cells[1:])
    assert table.note.startswith("6 defects of 2 classes")
    (whole, no_mask), (crop, blank), (again, binary), (_, soft) = shown[:4]
    assert whole.shape == crop.shape
    assert not np.array_equal(whole, crop)
    assert np.array_equal(crop, again)
    assert not no_mask.any()
    assert not blank.any()
    assert set(np.unique(binary).tolist()) <= {0.0, 1.0}
    assert soft.max() > 0
    assert np.array_equal(binary, soft >= 0.5)


# ---- number of classes per stage ----


def per_stage(each: int = 20, names: str = "abcde") -> tuple[np.ndarray, list[str], list[str]]:
    rng = np.random.default_rng(0)
    labels = [name for name in names for _ in range(each)]
    features = rng.normal(size=(len(labels), 8)) + 25 * np.eye(8)[["abcde".index(name) for name in labels]]
    return features.astype(np.float32), labels, ["one" if name in "abc" else "two" for name in labels]


def test_classes_of_one_stage_only_are_refused() -> None:
    for names in ("", "abc"):
        features, labels, stages = per_stage(names=names)
        with pytest.raises(ConfigError, match="one stage is novel and the others are known"):
            k_per_stage(features, labels, stages, seeds=(0,), rules=("silhouette",))


def test_k_counts_labelled_and_novel_classes_of_every_stage() -> None:
    table = k_per_stage(*per_stage(), seeds=(0, 1), rules=("consensus", "silhouette"))
    assert table.columns == ("novel stage", "labelled", "true k", "consensus", "silhouette")
    assert [cells[:3] for cells in table.rows] == [("one", 2, 5), ("two", 3, 5)]
    for cells in table.rows:
        assert [(cell.mean, cell.n) for cell in cells[3:]] == [(5.0, 2)] * 2


def test_the_novel_stage_is_never_labelled_and_each_known_class_is(monkeypatch) -> None:
    """With two samples of a class a coin for each would leave a class without a label, and a gap in the numbers."""
    features, labels, stages = per_stage(each=2)
    given: list[np.ndarray] = []
    real = crop_experiments.clustering.checked

    def noted(values: np.ndarray, marks: np.ndarray) -> object:
        given.append(marks)
        return real(values, marks)

    monkeypatch.setattr(crop_experiments.clustering, "checked", noted)
    k_per_stage(features, labels, stages, seeds=range(3), rules=("silhouette",))
    of_stage = np.array(stages)
    for index, marks in enumerate(given):
        novel = "one" if index < 3 else "two"
        assert (marks[of_stage == novel] == -1).all()
        known = marks[of_stage != novel]
        assert sorted(known[known >= 0].tolist()) == list(range(2 if novel == "one" else 3))


def test_nan_features_are_refused() -> None:
    features, labels, stages = per_stage(each=4)
    features[0] = np.nan
    with pytest.raises(ConfigError, match="NaN"):
        k_per_stage(features, labels, stages, seeds=(0,), rules=("silhouette",))


# ---- cross-process ----


def test_each_stage_asked_for_is_learnt_twice_and_judged_on_all_three(tmp_path, convolutional, monkeypatch) -> None:
    monkeypatch.setattr(
        detection_experiments, "BranchForm", lambda: BranchForm(input_px=64, projection=4, width=4, dilations=(1,))
    )
    monkeypatch.setattr(detection_experiments, "DetectorForm", lambda **form: DetectorForm(**form, input_px=64))
    drawn: list[tuple[str, ...]] = []
    learnt: list[int] = []
    real_train = detection_experiments.train_branch
    real_views, real_fields = detection_experiments.synthetic_views, evaluate_detection.synthetic

    def noted(*numbers: int, stages: tuple[str, ...], **options: int):
        drawn.append((*stages, *numbers, options["first_seed"]))
        return real_views(*numbers, stages=stages, **options)

    def counted(branch, samples, *rest, **options):
        assert len(samples.evidence) == len(samples.cover)
        learnt.append(len(samples.cover))
        return real_train(branch, samples, *rest, **options)

    monkeypatch.setattr(detection_experiments, "synthetic_views", noted)
    monkeypatch.setattr(detection_experiments, "train_branch", counted)
    monkeypatch.setattr(
        detection_experiments, "synthetic", lambda stage, **options: real_fields(stage, **options, side_px=384)
    )
    monkeypatch.setattr("semwatch_training.families.branch.branch_views.SIDES_PX", (384, 384, 384, 384))
    table = cross_process(
        convolutional,
        tmp_path,
        n_normal=2,
        n_labelled=2,
        n_backgrounds=1,
        schedule=BranchSchedule(steps=2, batch=4),
        seeds=(0, 1),
        n_test_normal=1,
        n_test_per_type=1,
        stages=("DPR", "DEP"),
        progress=quiet,
    )
    assert drawn == [
        (stage, 2, 1, 2, 1_000_000 + 10_000_000 * seed) for stage in ("DPR", "DEP") for seed in (0, 1)
    ]  # fmt: skip
    assert learnt == [6, 6, 8, 8] * 2  # planted alone, then with the labelled ones
    assert [cells[:3] for cells in table.rows] == [
        (stage, told, other if other != stage else f"{other} (seen)")
        for stage in ("DPR", "DEP") for told in ("normals", "labelled") for other in STAGES
    ]  # fmt: skip
    assert all(cell.n == 2 and 0 <= cell.mean <= 1 for cells in table.rows for cell in cells[3:])
