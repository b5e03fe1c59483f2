import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from progress import quiet
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training import __main__ as command_line
from semwatch_training.data.datasets import Sample
from semwatch_training.discovery import labelled_crops
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.evaluation import (
    detection_experiments,
    detectors,
    evaluate,
    evaluate_detection,
    evaluate_discovery,
    evaluation_data,
    experiment_commands,
    searched_crops,
)
from semwatch_training.evaluation.binarization_rules import NAMES
from semwatch_training.evaluation.evaluation_data import Source, by_stage, crops_of, defects_only, fingerprint
from semwatch_training.evaluation.report import Table
from semwatch_training.families.branch import segmentation_branch
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.intrinsic import intrinsic_detector, train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicForm
from semwatch_training.families.memory import fit_memory, memory_detector
from semwatch_training.families.memory.memory_detector import MemoryForm, SelfMatchingGraph, Trunks
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import NIDetector
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.trunks import backbone
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import TrunkShape, VisionTransformer
from tiny_models import DETECTOR, trunk

SIDE = 96
FORM = MemoryForm(input_px=112, sizes_px=(56, 64), vit_layers=(0, 1), components=(24, 32), patches=100, candidates=200)
BRANCH = BranchForm(input_px=64, projection=4, width=8, dilations=(1,))


@pytest.fixture(scope="module", autouse=True)
def tiny_backbones() -> Iterator[None]:
    """Random trunks in the place of those that are fetched, and forms that fit them."""
    torch.manual_seed(0)
    convolutional = EfficientNet().eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "load", lambda cache: trunk())
        patch.setattr(backbone, "load_efficientnet", lambda cache: convolutional)
        for module in (detectors, fit_memory, detection_experiments):
            patch.setattr(module, "MemoryForm", lambda: FORM)
        patch.setattr(detectors, "CORESET", replace(FORM, alike=0))
        yield


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(command_line.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def report(folder: Path) -> dict[str, dict[str, object]]:
    """Tables of a report by title."""
    found = json.loads((folder / "report.json").read_text())
    assert (folder / "report.md").is_file()
    assert all((folder / figure["file"]).is_file() for figure in found["figures"])
    return {table["title"]: table for table in found["tables"]}


def draw(path: Path, seed: int, box: tuple[int, int, int, int] | None = None) -> None:
    """Stripes, and perhaps a white box; its mask lies beside."""
    rng = np.random.default_rng(seed)
    wave = 120 + 50 * np.sin(np.arange(SIDE) / 4 + rng.uniform(0, 6))
    image = (wave + rng.normal(0, 5, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if box is not None:
        x0, y0, x1, y1 = box
        image[y0:y1, x0:x1] = 250
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[y0:y1, x0:x1] = 255
        truth = path.parents[2] / "ground_truth" / path.parent.name
        truth.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(truth / f"{path.stem}_mask.png"), mask)
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten normal images to learn from, four to judge, and three of each of two classes, as MVTec AD lays them out."""
    top = tmp_path_factory.mktemp("data") / "stripes"
    for i in range(10):
        draw(top / "train" / "good" / f"{i}.png", i)
    for i in range(4):
        draw(top / "test" / "good" / f"{i}.png", 20 + i)
    for i in range(3):
        draw(top / "test" / "square" / f"{i}.png", 30 + i, (20, 20, 44, 44))
        draw(top / "test" / "bar" / f"{i}.png", 40 + i, (10, 60, 90, 70))
    return top


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    train_detector.save(NIDetector(DETECTOR), path / "detector.safetensors",
                        normal_scores=[i / 1000 for i in range(60)], provenance={})  # fmt: skip
    return path


def blobs(each: int, names: list[str], width: int) -> Crops:
    rng = np.random.default_rng(0)
    labels = [name for name in names for _ in range(each)]
    features = rng.normal(size=(len(labels), width)) + 25 * np.eye(width)[[names.index(name) for name in labels]]
    counts = dict.fromkeys(names, each)
    n = len(labels)
    return Crops(features.astype(np.float32), tuple(labels), np.arange(n), np.full(n, 100), counts, {})


@pytest.fixture
def crops(monkeypatch) -> Crops:
    """Crops of all synthetic types, far apart, in the place of those that would be rendered and encoded."""
    made = blobs(20, [name for stage in STAGES for name in DEFECT_TYPES[stage]], 40)
    monkeypatch.setattr(labelled_crops, "of_synthetic", lambda *_, **__: made)
    return made


# ---- evaluate detection ----


def test_detection_judges_the_memory_beside_the_engines_that_see_no_normal_image(folder, weights, tmp_path) -> None:
    result = run(
        "evaluate", "detection", folder, "--out", tmp_path, "--weights", weights, "--seeds", 2,
        "--false-alarm-rate", 0.2, "--json",
    )  # fmt: skip
    tables = report(tmp_path)
    assert [row[:2] for row in tables["Detection"]["rows"]] == [
        ["shipped", "none"], ["self-matching", "none"], ["memory", "10"],
        ["nearest patch", "10"],
    ]  # fmt: skip
    shipped, alone, memory, nearest = tables["Detection"]["rows"]
    assert memory[2]["n"] == nearest[2]["n"] == 2
    assert memory[2]["mean"] > 0.9
    assert nearest[2]["mean"] > 0.9
    assert (shipped[-1]["n"], alone[-1], memory[-1]["n"]) == (4, None, 4)
    assert "10 fields, 4 normal" in tables["Detection"]["note"]
    assert tables["Detection by class, image AUROC"]["columns"] == ["engine", "bar", "square"]
    assert [table["title"] for table in json.loads(result.stdout)] == list(tables)


def test_a_data_set_without_normals_to_learn_from_gives_no_memory_engine(folder, weights, tmp_path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for part in ("test", "ground_truth"):
        (alone / part).symlink_to(folder / part)
    run("evaluate", "detection", alone, "--out", tmp_path / "out", "--weights", weights, "--seeds", 1)
    assert [row[0] for row in report(tmp_path / "out")["Detection"]["rows"]] == ["shipped", "self-matching"]


def test_synthetic_detection_has_tables_and_pictures_of_every_stage(weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate_detection, "synthetic", lambda stage, **_: [normal(), normal(), *one_square(stage)])
    monkeypatch.setattr(evaluate, "STAGES", ("DEP", "BEOL"))
    run("evaluate", "detection", "synthetic", "--out", tmp_path, "--weights", weights, "--per-type", 2)
    tables = report(tmp_path)
    assert [title for title in tables if title.startswith("Detection, ")] == ["Detection, DEP", "Detection, BEOL"]
    assert "Synthetic DEP, seeds from" in tables["Detection, DEP"]["note"]
    assert "3 fields, 2 normal" in tables["Detection, BEOL"]["note"]


def normal() -> evaluate_detection.Field:
    return evaluate_detection.Field(np.full((SIDE, SIDE), 90, np.uint8), DEFECT_FREE, np.zeros((SIDE, SIDE), bool))


def one_square(stage: str, **_: object) -> list[evaluate_detection.Field]:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[20:40, 20:40] = True
    return [evaluate_detection.Field(np.where(mask, 250, 90).astype(np.uint8), stage, mask)]


def test_detection_without_masks_for_the_test_part_is_refused_before_anything_is_fitted(tmp_path, weights) -> None:
    draw(tmp_path / "d" / "train" / "good" / "0.png", 0)
    draw(tmp_path / "d" / "test" / "good" / "0.png", 1)
    draw(tmp_path / "d" / "test" / "spot" / "0.png", 2)
    with pytest.raises(ConfigError, match="1 defects have no mask"):
        run("evaluate", "detection", tmp_path / "d", "--out", tmp_path / "out", "--weights", weights)


# ---- evaluate, on crops ----


def test_classification_on_true_masks_and_the_unknown_rule_report_every_class(
    tiny_repository, tmp_path, monkeypatch
) -> None:
    made = blobs(40, ["a", "b", "c", "d"], 30)
    monkeypatch.setattr(labelled_crops, "of_synthetic", lambda *_, **__: made)
    rest = ("--repository", tiny_repository, "--cache", tmp_path / "cache", "--seeds", 1)
    run("evaluate", "classification", "synthetic", "--true-masks", "--out", tmp_path / "c", *rest)
    tables = report(tmp_path / "c")
    assert [row[:3] for row in tables["ADC by class"]["rows"]] == [[name, 40, 0] for name in "abcd"]
    assert "as if every defect were found" in tables["Classification"]["note"]
    run("evaluate", "unknown", "synthetic", "--out", tmp_path / "u", *rest)
    rows = report(tmp_path / "u")["Unknown rule"]["rows"]
    assert [row[0] for row in rows] == ["a", "b", "c", "d", "all"]
    assert rows[-1][2]["mean"] > 0.99


def test_classification_searches_once_and_judges_behind_the_gate_that_is_asked_for(
    folder, tiny_repository, tmp_path, monkeypatch
) -> None:
    """The tiny detector's normal scores are i / 1000: at 0.05 the gate is at 0.057, at 0.5 lower."""
    judged: list[tuple[Crops, searched_crops.Outcome]] = []
    n_searched = 0
    real = searched_crops.search

    def noted(*given: object) -> object:
        nonlocal n_searched
        n_searched += 1
        return real(*given)

    def told(crops: Crops, *_: object, outcome: searched_crops.Outcome, **__: object) -> object:
        judged.append((crops, outcome))
        return [], {}

    monkeypatch.setattr(searched_crops, "search", noted)
    monkeypatch.setattr("semwatch_training.evaluation.evaluate_heads.classification", told)
    for rate in (0.05, 0.5):
        run(
            "evaluate", "classification", folder, "--out", tmp_path / "out", "--repository", tiny_repository,
            "--cache", tmp_path / "cache", "--false-alarm-rate", rate,
        )  # fmt: skip
    assert n_searched == 10  # four normal and six defective; none of those to learn normal looks from
    for crops, outcome in judged:
        assert sum(np.array(crops.labels)[outcome.judged] != DEFECT_FREE) + len(outcome.missed) == 6
        assert outcome.normals_opened.n == 4


def test_k_and_discovery_of_crops(tiny_repository, tmp_path, monkeypatch) -> None:
    made = blobs(20, [DEFECT_FREE, "a", "b", "c"], 30)
    monkeypatch.setattr(labelled_crops, "of_synthetic", lambda *_, **__: made)
    monkeypatch.setattr(evaluate, "get_args", lambda _: ("consensus", "silhouette"))
    rest = ("--repository", tiny_repository, "--cache", tmp_path / "cache")
    run("evaluate", "k", "synthetic", "--out", tmp_path / "k", *rest, "--problems", 2)
    table = report(tmp_path / "k")["Number of classes"]
    assert [row[0] for row in table["rows"]] == ["consensus", "silhouette"]
    assert "drawn from 3 classes" in table["note"]  # defect-free is none of them
    run("evaluate", "discovery", "synthetic", "--out", tmp_path / "d", *rest, "--seeds", 1)
    table = report(tmp_path / "d")["Discovery, one class unknown in turn"]
    assert "60 samples, 3 classes" in table["note"]
    assert {row[0] for row in table["rows"]} >= {"k-means", "GCD", "SimGCD", "gated"}
    with pytest.raises(ConfigError, match="a, b, c belong to no process stage of ours"):
        run("evaluate", "discovery", "synthetic", "--unknown", "stage", "--out", tmp_path / "s", *rest)


def test_a_whole_stage_can_be_unknown(tiny_repository, tmp_path, monkeypatch) -> None:
    names = ["bubble", "pinhole", "bridge"]
    made = blobs(10, names, 30)
    monkeypatch.setattr(labelled_crops, "of_synthetic", lambda *_, **__: made)
    given: dict[str, object] = {}

    def noted(features: np.ndarray, labels: list[str], **options: object) -> object:
        given.update(options, labels=labels)
        return [], {}

    monkeypatch.setattr(evaluate_discovery, "discovery_in_turn", noted)
    rest = ("--repository", tiny_repository, "--cache", tmp_path / "cache", "--out", tmp_path / "out")
    run("evaluate", "discovery", "synthetic", "--unknown", "stage", *rest)
    assert given["groups"] == by_stage(names)
    assert given["of"] == "stage"
    assert sorted(name for group in given["groups"].values() for name in group) == sorted(names)
    with pytest.raises(ConfigError, match="with --base all classes of the images are unknown"):
        run("evaluate", "discovery", "synthetic", "--unknown", "stage", "--base", "synthetic", *rest)


def test_types_are_grouped_by_their_stage() -> None:
    assert by_stage([]) == {}
    assert by_stage(name for names in DEFECT_TYPES.values() for name in names) == dict(DEFECT_TYPES)
    only = DEFECT_TYPES["DPR"][0]
    assert by_stage([only, only]) == {"DPR": (only,)}
    with pytest.raises(ConfigError, match="leave out one type at a time"):
        by_stage([only, "scratched"])


def test_discovery_with_a_base_names_the_images_of_a_folder(
    tiny_repository, crops, folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(evaluate_discovery, "discovery_of_images", discovered := Discovered())
    run(
        "evaluate", "discovery", folder, "--base", "synthetic", "--out", tmp_path / "out", "--repository",
        tiny_repository, "--cache", tmp_path, "--seeds", 1, "--false-alarm-rate", 0.1,
    )  # fmt: skip
    assert discovered.base.labels == crops.labels
    assert sorted(set(discovered.found.labels)) == ["bar", DEFECT_FREE, "square"]
    assert len(discovered.found.labels) == 10  # the test part alone
    # The seventh largest of the 60 normal scores of the tiny detector: ceil(61 * 0.9) = 55.
    assert discovered.found.gate_threshold == pytest.approx(0.054)


class Discovered:
    """Stand in for the protocol: keeps what it was given."""

    def __call__(
        self, base: Crops, found: labelled_crops.Searched, **_: object
    ) -> tuple[list[object], dict[str, object]]:
        self.base, self.found = base, found
        return [], {}


def test_a_synthetic_stream_cannot_be_searched_from_disk(tiny_repository, tmp_path) -> None:
    for command in (
        ("evaluate", "discovery", "synthetic", "--base", "synthetic", "--cache", tmp_path, "--out", tmp_path / "out"),
        ("experiment", "mask-and-crop", "synthetic", "--out", tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match="make a synthetic one with `semwatch-train synth`"):
            run(*command, "--repository", tiny_repository)


@pytest.mark.parametrize("command", ["classification", "unknown", "discovery", "k"])
def test_an_absent_folder_is_refused(tiny_repository, tmp_path, command) -> None:
    with pytest.raises(ConfigError, match="is not a folder of images"):
        run("evaluate", command, tmp_path / "absent", "--repository", tiny_repository, "--out", tmp_path / "out")


def test_an_expected_error_is_one_line_and_its_exit_code(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["semwatch-train", "experiment", "mask-and-crop", "synthetic"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("ConfigError: this command reads images from a folder")


# ---- crops kept on disk ----


def test_crops_are_encoded_once_and_again_where_a_file_changed(folder, tiny_repository, tmp_path, monkeypatch) -> None:
    n_encoded = 0
    real = labelled_crops.encode

    def noted(*given):
        nonlocal n_encoded
        n_encoded += 1
        return real(*given)

    monkeypatch.setattr(labelled_crops, "encode", noted)
    first, width, _ = crops_of(Source(str(folder), tiny_repository, 2, tmp_path), progress=quiet)
    assert n_encoded == 6
    assert sorted(set(first.labels)) == ["bar", "square"]
    again, _, _ = crops_of(Source(str(folder), tiny_repository, 2, tmp_path), progress=quiet)
    assert n_encoded == 6
    assert np.array_equal(first.features, again.features)
    assert 0 < width < first.features.shape[1]
    os.utime(folder / "test" / "bar" / "0.png", ns=(1, 1))
    crops_of(Source(str(folder), tiny_repository, 2, tmp_path), progress=quiet)
    assert n_encoded == 12


def test_two_folders_of_one_name_do_not_share_their_crops(tiny_repository, tmp_path) -> None:
    for seed, place in enumerate("ab"):
        draw(tmp_path / place / "lot" / "test" / "spot" / "0.png", seed, (10, 10, 30, 30))
    one, two = (
        crops_of(Source(str(tmp_path / place / "lot"), tiny_repository, 2, tmp_path / "cache"), progress=quiet)[0]
        for place in "ab"
    )
    assert not np.array_equal(one.features, two.features)


def test_fingerprints_tell_labels_and_masks_apart(tmp_path) -> None:
    draw(tmp_path / "d" / "test" / "spot" / "0.png", 0, (10, 10, 30, 30))
    image = tmp_path / "d" / "test" / "spot" / "0.png"
    mask = tmp_path / "d" / "ground_truth" / "spot" / "0_mask.png"
    samples = [
        Sample(image, "spot"),
        Sample(image, "line"),
        Sample(image, "spot", mask),
        Sample(image, "spot", mask, (mask,)),
    ]
    assert len({fingerprint([sample]) for sample in samples}) == 4
    assert fingerprint(samples) == fingerprint(samples)


def test_defects_only_leaves_out_defect_free_crops_and_trained_features() -> None:
    crops = blobs(2, ["a", DEFECT_FREE], 6)
    features, labels = defects_only(crops, 4)
    assert labels == ["a", "a"]
    assert np.array_equal(features, crops.features[:2, :4])


def test_an_encoder_that_does_not_say_its_frozen_width_is_refused() -> None:
    class Silent:
        def meta(self, model: str):
            return type("Meta", (), {"provenance": {}})

    with pytest.raises(ConfigError, match="names no frozen_width; build the model repository again"):
        evaluation_data.frozen_width(Silent())


# ---- experiment ----


def test_k_shot_on_a_folder(folder, weights, tmp_path) -> None:
    run("experiment", "k-shot", folder, "--out", tmp_path, "--weights", weights, "--shots", 2, "--seeds", 1)
    assert [row[:4] for row in report(tmp_path)["Few-shot detection"]["rows"]] == [
        ["stripes", 0, "shipped", ""], ["stripes", 0, "self-matching", ""],
        *(["stripes", 2, "memory", views] for views in ("as they are", "8 turns", "22 views")),
    ]  # fmt: skip


def test_on_synthetic_fields_each_stage_is_shown_its_own_normals(weights, tmp_path, monkeypatch) -> None:
    given: dict[str, object] = {}

    def drawn(stage: str, *, n_normal: int, n_per_type: int, **_: object) -> list[evaluate_detection.Field]:
        return [normal()] * n_normal + one_square(stage) * n_per_type

    def noted(trunks: Trunks, groups: dict[str, object], **_: object) -> Table:
        given.update(groups)
        return Table("Few-shot detection", ("on",), ())

    monkeypatch.setattr(evaluate_detection, "synthetic", drawn)
    monkeypatch.setattr(detection_experiments, "k_shot", noted)
    run("experiment", "k-shot", "synthetic", "--out", tmp_path, "--weights", weights, "--per-type", 2)
    assert list(given) == list(STAGES)
    assert [len(normals) for normals, _ in given.values()] == [40] * 3
    assert [{f.label for f in fields} for _, fields in given.values()] == [{DEFECT_FREE, stage} for stage in STAGES]


def test_binarization_on_a_folder_and_on_every_stage(folder, tiny_repository, tmp_path, monkeypatch) -> None:
    run("experiment", "binarization", folder, "--out", tmp_path / "f", "--repository", tiny_repository)
    table = report(tmp_path / "f")["Binarisation of score maps"]
    assert [row[:2] for row in table["rows"]] == [
        ["stripes", rule] for rule in NAMES.values()
    ]  # fmt: skip
    assert all(row[2]["n"] == row[4]["n"] == 6 for row in table["rows"])
    monkeypatch.setattr(evaluate_detection, "synthetic", one_square)
    run("experiment", "binarization", "synthetic", "--out", tmp_path / "s", "--repository", tiny_repository)
    rows = report(tmp_path / "s")["Binarisation of score maps"]["rows"]
    assert [row[0] for row in rows] == [stage for stage in STAGES for _ in range(len(NAMES))]


def test_masks_of_a_folder_without_defects_cannot_be_compared(folder, tiny_repository, tmp_path) -> None:
    (tmp_path / "d" / "test").mkdir(parents=True)
    (tmp_path / "d" / "test" / "good").symlink_to(folder / "test" / "good")
    with pytest.raises(ConfigError, match="no field of d has a true mask"):
        run("experiment", "binarization", tmp_path / "d", "--out", tmp_path / "o", "--repository", tiny_repository)


def test_help_names_the_experiment_of_direct_matching() -> None:
    listed = run("experiment", "--help").output
    assert "Direct matching against reconstruction" in listed
    assert "binarization" in listed


def test_learning_from_a_folder_without_normals_to_learn_from_is_refused(folder, weights, tmp_path) -> None:
    (tmp_path / "d").mkdir()
    for part in ("test", "ground_truth"):
        (tmp_path / "d" / part).symlink_to(folder / part)
    for command in ("k-shot", "tokens"):
        shown = ("--weights", weights) if command == "k-shot" else ()
        with pytest.raises(ConfigError, match="d has no normal image to learn from; put some in train"):
            run("experiment", command, tmp_path / "d", "--out", tmp_path / "out", *shown)


def test_tokens_fit_the_trunk_and_another_data_set_has_its_own_features(folder, tmp_path, monkeypatch) -> None:
    shape = TrunkShape(width=24, depth=12, heads=2, patch=4, position_grid=8)
    monkeypatch.setattr(backbone, "load", lambda cache: VisionTransformer(shape).eval().requires_grad_(False))
    for data in (folder, copied(folder, tmp_path / "other")):
        run("experiment", "tokens", data, "--out", tmp_path / "out", "--m", 2, "--n", 8, "--epochs", 1)
        (table,) = report(tmp_path / "out").values()
        assert [row[0] for row in table["rows"]] == [2]
        assert "8 normal fields" in table["note"]
    assert len(list((tmp_path / "out" / "work").iterdir())) == 2


def copied(folder: Path, top: Path) -> Path:
    """The same test part, other normal images to learn from."""
    for i in range(10):
        draw(top / "train" / "good" / f"{i}.png", 60 + i)
    for part in ("test", "ground_truth"):
        (top / part).symlink_to(folder / part)
    return top


def test_mask_and_crop_on_a_folder(folder, tiny_repository, tmp_path) -> None:
    run("experiment", "mask-and-crop", folder, "--out", tmp_path, "--repository", tiny_repository, "--seeds", 1)
    table = report(tmp_path)["Mask and crop"]
    assert len(table["rows"]) == 4
    assert table["note"].startswith("6 defects of 2 classes")


def test_k_of_the_stages(tiny_repository, crops, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(experiment_commands, "get_args", lambda _: ("silhouette",))
    run("experiment", "k", "--out", tmp_path, "--repository", tiny_repository, "--cache", tmp_path, "--seeds", 1)
    rows = report(tmp_path)["Number of classes by stage"]["rows"]
    assert [row[:3] for row in rows] == [
        [stage, 15 - len(DEFECT_TYPES[stage]), 15] for stage in sorted(STAGES)
    ]  # fmt: skip


def test_cross_process_keeps_runs_of_other_sizes_apart(tmp_path, monkeypatch) -> None:
    places: list[Path] = []

    def noted(convolutional: EfficientNet, work: Path, **options: object) -> Table:
        places.append(work)
        return Table("Cross-process detection", ("trained on",), (("DEP",),))

    monkeypatch.setattr(detection_experiments, "cross_process", noted)
    for n_normal, n_backgrounds in ((10, 20), (20, 10)):  # as many images in all
        run("experiment", "cross-process", "--out", tmp_path, "--n-normal", n_normal, "--n-backgrounds", n_backgrounds)
    assert len(set(places)) == 2


# ---- learning: detector and memory ----


@pytest.fixture
def small_branch(monkeypatch) -> None:
    monkeypatch.setattr(segmentation_branch, "BranchForm", lambda width: BRANCH)
    monkeypatch.setattr(
        intrinsic_detector, "IntrinsicForm", lambda **form: IntrinsicForm(**form, keys=5, domain_fields=12)
    )


def test_detector_learns_from_a_folder_and_keeps_a_quarter_for_the_gate(folder, tmp_path, small_branch) -> None:
    out = tmp_path / "detector.safetensors"
    rest = ("--normals", folder / "train", "--n-backgrounds", 2, "--steps", 3)
    run("detector", "--out", out, *rest)
    detector, scores, provenance = train_intrinsic.load(out)
    assert detector.form.branch == BRANCH
    assert len(scores) == 2
    assert (provenance["n_normals"], provenance["n_labelled"], provenance["n_backgrounds"]) == (8, 0, 2)
    assert provenance["branch_trunk"] == backbone.EFFICIENTNET_WHEEL_SHA256
    with pytest.raises(ConfigError, match="holds another run"):
        run("detector", "--out", out, *rest, "--seed", 2)


def test_detector_of_an_unknown_stage_is_refused(tmp_path, small_branch) -> None:
    with pytest.raises(ConfigError, match="MOL"):
        run("detector", "--out", tmp_path / "d.safetensors", "--stage", "MOL", "--n-normals", 8, "--n-labelled", 0)


def test_too_few_normals_for_a_detector_are_refused(folder, tmp_path, small_branch) -> None:
    with pytest.raises(ConfigError, match="holds 3 images; a detector needs 8"):
        run("detector", "--out", tmp_path / "d.safetensors", "--normals", folder / "test" / "bar")


def test_memory_remembers_the_images_of_a_folder(folder, tmp_path) -> None:
    run("memory", "--out", tmp_path / "memory.safetensors", "--normals", folder / "train")
    made = memory_detector.load(tmp_path / "memory.safetensors")
    assert made.form == FORM
    assert len(made.normal_scores) == 10
    with pytest.raises(ConfigError, match="is not a folder of images"):
        run("memory", "--out", tmp_path / "memory.safetensors", "--normals", tmp_path / "absent")


def test_looking_once_serves_memories_of_several_seeds(folder) -> None:
    trunks = Trunks(backbone.load(Path()), backbone.load_efficientnet(Path()))
    images = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in sorted((folder / "train" / "good").iterdir())]
    patches = fit_memory.look(images, trunks, FORM)
    assert (len(patches.vit), len(patches.efficientnet), patches.are_images) == (10, 10, True)
    one, again, two = (fit_memory.remember(patches, FORM, seed=seed) for seed in (1, 1, 2))
    whole = fit_memory.fit(images, trunks, FORM, seed=1)
    for a, b in zip(one.banks, again.banks, strict=True):
        assert torch.equal(a.patches, b.patches)
    for a, b in zip(one.banks, whole.banks, strict=True):
        assert torch.equal(a.patches, b.patches)
    assert one.normal_scores == whole.normal_scores
    assert not torch.equal(one.banks[0].patches, two.banks[0].patches)
    few = fit_memory.look(images[:2], trunks, FORM)
    assert (len(few.vit), few.are_images, sorted(set(few.owners.tolist()))) == (16, False, [0, 1])
    assert fit_memory.remember(few, FORM).normal_scores == ()  # turned views are no images to come
    score_map, raw = SelfMatchingGraph(trunks, FORM)(torch.from_numpy(np.zeros((1, 112, 112), np.uint8)))
    assert score_map.shape == (1, FORM.side, FORM.side)
    assert torch.isfinite(raw).all()
