import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from progress import quiet
from semwatch.defects import DEFECT_FREE, Defect, Verdict
from semwatch.errors import ConfigError, ImageError
from semwatch.line import pipeline
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training import __main__ as command_line
from semwatch_training.evaluation import (
    evaluate_real,
    real_baselines,
    real_data,
    real_labels,
    real_line,
    real_parts,
    real_splits,
    real_tables,
)
from semwatch_training.evaluation.real_labels import Labelled
from semwatch_training.evaluation.real_line import KeptAnswers, cause_of_escape, page_verdict
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicDetector, IntrinsicForm
from semwatch_training.trunks import backbone
from semwatch_training.trunks.efficientnet import EfficientNet

SIDE = 96
EACH = 5


@pytest.fixture(scope="module", autouse=True)
def random_trunk():
    """A random trunk in the place of the one that is fetched."""
    torch.manual_seed(0)
    network = EfficientNet().eval().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "load_efficientnet", lambda cache: network)
        yield


def lines(seed: int, side: int = SIDE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wave = 120 + 60 * np.sin(np.arange(side) / rng.uniform(2, 6) + rng.uniform(0, 6))
    blobs = cv2.resize(rng.normal(0, 40, (6, 6)), (side, side))
    return (wave + blobs + rng.normal(0, 6, (side, side))).clip(0, 255).astype(np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    """A few made-up images of every folder."""
    folder = tmp_path_factory.mktemp("real") / "REAL-SEM"
    square = np.zeros((SIDE, SIDE), np.uint8)
    square[40:60, 40:60] = 255
    seed = 0
    for name in ("defect-free", "pit"):
        for i in range(EACH):
            write(folder / "bare-wafer-52px" / name / f"{i}.png", lines(seed := seed + 1, 52))
    for name in ("CLEAN_LAYER", "BRIDGE", "CMP", "LER", "OTHERS"):
        for i in range(EACH):
            write(folder / "line-space-and-more" / name / f"{i}.png", lines(seed := seed + 1))
    for i in range(2):
        clean = lines(seed := seed + 1)
        write(folder / "clean-defect-pairs" / "clean" / f"{i}.png", clean)
        write(folder / "clean-defect-pairs" / "defect" / f"{i}.png", np.maximum(clean, square))
        write(folder / "clean-defect-pairs" / "mask" / f"{i}.png", square)
        write(folder / "nanofibres" / "train" / "good" / f"{i}.png", lines(seed := seed + 1, 128)[:80])
        write(folder / "nanofibres" / "test" / "anomalous" / f"{i}.png", np.maximum(lines(seed := seed + 1), square))
        write(folder / "nanofibres" / "ground_truth" / "anomalous" / f"{i}.png", square)
        write(folder / "normal-patterned-silicon" / f"{i}.png", lines(seed := seed + 1))
        write(folder / "vendor-files" / "tool" / f"{i}.png", lines(seed := seed + 1))
        write(folder / "wafer-review-480px" / f"0{i}_bridge.png", lines(seed := seed + 1))
    for role in ("inspected", "reference"):
        write(folder / "inspected-and-reference" / f"case2_{role}_image.png", lines(seed := seed + 1))
    (folder / "inspected-and-reference" / "defect_locations.txt").write_text("case 2, x y:\n10 20\n50 60\n")
    return folder


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Path:
    """Other images of the classes of patterns."""
    folder = tmp_path_factory.mktemp("held")
    for index, name in enumerate(("CLEAN_LAYER", "BRIDGE", "CMP", "LER", "OPEN")):
        for i in range(2):
            write(folder / "line-space-and-more" / name / f"{i}.png", lines(1000 + 10 * index + i))
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(command_line.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def tables(folder: Path) -> dict[str, dict]:
    found = json.loads((folder / "report.json").read_text())
    assert (folder / "report.md").is_file()
    assert all((folder / figure["file"]).is_file() for figure in found["figures"])
    return {table["title"]: table for table in found["tables"]}


# ---- the command ----


def test_one_command_judges_every_folder(top, held, tiny_repository, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(real_labels, "DRAWS", 2)
    monkeypatch.setattr(real_splits, "N_RESAMPLED", 10)
    printed = run(
        "evaluate", "real", top, "--out", tmp_path / "out", "--repository", tiny_repository, "--cache", tmp_path,
        "--seeds", 1, "--held", held, "--before", tiny_repository, "--threads", 1, "--json",
    )  # fmt: skip
    found = tables(tmp_path / "out")
    assert [table["title"] for table in json.loads(printed)] == list(found)
    detection = found["Detection, image AUROC"]
    assert detection["columns"][4:] == [
        "served", "±", "before", "own Gaussian", "FCA-like", "GRNR-like", "nearest patch",
    ]  # fmt: skip
    assert [row[:2] for row in detection["rows"]] == [
        ["bare-wafer-52px", "pit / defect-free"],
        ["bare-wafer-52px", "all / defect-free"],
        ["line-space-and-more", "BRIDGE / CLEAN_LAYER"],
        ["line-space-and-more", "CMP / CLEAN_LAYER"],
        ["line-space-and-more", "all four / CLEAN_LAYER"],
        ["line-space-and-more", "LER / CLEAN_LAYER"],
        ["clean-defect-pairs", "defect / clean"],
        ["nanofibres", "anomalous / good"],
    ]
    served, before = (detection["columns"].index(name) for name in ("served", "before"))
    assert [row[served] for row in detection["rows"]] == pytest.approx([row[before] for row in detection["rows"]])
    assert detection["rows"][0][-1] is not None  # five clean wafers make a bank for each other
    assert detection["rows"][-1][-1] is None  # two fibres do not
    assert {row[0] for row in found["Gate"]["rows"]} == set(real_data.FOLDERS)
    assert all(row[4] is None for row in found["Gate"]["rows"])  # five clean images promise no rate of 5 %
    assert {row[0] for row in found["Where the defect lies, pixel AUROC"]["rows"]} == {
        "clean-defect-pairs",
        "nanofibres",
    }
    for row in found["Escapes"]["rows"]:
        assert sum(row[3:6]) == round(row[2]["rate"] * row[2]["n"])
    assert found["Inspected images"]["rows"][0][2]["n"] == 2
    assert sum(row[2] for row in found["Verdicts"]["rows"]) == 10 + 25 + 2 * 7 + 2
    assert [row[0] for row in found["Constant images, made here"]["rows"]] == ["black", "gray"]
    assert "Labels, 4 classes" in found
    learnt = found["Labels, learnt here and judged on --held"]
    assert [row[1]["n"] for row in learnt["rows"]] == [8, 8, 8]  # OPEN is not to be learnt here
    assert "Discovery, k-means of 3 classes" in found
    assert "Discovery, one class unknown in turn" in found
    assert found["Milliseconds"]["rows"][-1][0] == "encoder, one crop"
    assert {"line-space-and-more/OPEN", "bare-wafer-52px/scratch"} <= {row[0] for row in found["Left out"]["rows"]}


def test_every_held_out_image_that_is_also_learnt_from_is_refused(top, tiny_repository, tmp_path) -> None:
    (tmp_path / "held").symlink_to(top)
    with pytest.raises(ConfigError, match="near duplicate"):
        evaluate_real.real(
            top, repository=tiny_repository, seeds=(0,), held=tmp_path / "held", baselines=False, cache=tmp_path,
            progress=quiet,
        )  # fmt: skip


def test_a_folder_that_is_absent_is_skipped_and_named(top, tiny_repository, tmp_path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "normal-patterned-silicon").symlink_to(top / "normal-patterned-silicon")
    found, figures = evaluate_real.real(
        tmp_path / "half", repository=tiny_repository, seeds=(0,), cache=tmp_path, progress=quiet
    )
    by_title = {table.title: table for table in found}
    left_out = {row[0] for row in by_title["Left out"].rows}
    assert left_out == set(real_data.FOLDERS) - {"normal-patterned-silicon"}
    assert [row[0] for row in by_title["Gate"].rows] == ["normal-patterned-silicon"]
    assert by_title.keys().isdisjoint({"Detection, image AUROC", "Escapes", "Labels, 8 classes", "Inspected images"})
    assert all("ROC" not in caption for caption in figures)


def test_an_image_that_the_line_refuses_is_named_and_does_not_stop_the_rest(
    top, tiny_repository, tmp_path, monkeypatch
) -> None:
    whole = pipeline.review

    def refuses(content: bytes, *, path: str, **more: object) -> object:
        if path.endswith("silicon/0.png") or path == "constant/black":
            raise ImageError(f"{path}: blank")
        return whole(content, path=path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "review", refuses)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "normal-patterned-silicon").symlink_to(top / "normal-patterned-silicon")
    found, _ = evaluate_real.real(
        tmp_path / "half", repository=tiny_repository, seeds=(0,), cache=tmp_path, progress=quiet
    )
    by_title = {table.title: table for table in found}
    assert ("normal-patterned-silicon/0.png", "refused: normal-patterned-silicon/0.png: blank") in by_title[
        "Left out"
    ].rows
    assert by_title["Gate"].rows[0][3].n == 1
    assert by_title["Constant images, made here"].rows[0][-1] == "refused: constant/black: blank"


def test_a_second_run_asks_no_network_about_what_it_has_answered(top, tiny_repository, tmp_path, monkeypatch) -> None:
    images = real_data.read(top).images[:4]
    recipe = Recipe()
    with KeptAnswers(tiny_repository, tmp_path) as models:
        first = real_line.look(images, recipe, models, encode=lambda _: True, progress=quiet)
    asked = []
    original = Embedded.infer

    def counted(self: Embedded, model: str, *rest: object, **more: object) -> object:
        asked.append(model)
        return original(self, model, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Embedded, "infer", counted)
    with KeptAnswers(tiny_repository, tmp_path) as models:
        second = real_line.look(images, recipe, models, encode=lambda _: True, progress=quiet)
    assert set(asked) <= {"head"}
    for one, two in zip(first, second, strict=True):
        assert one.reviewed.score_map.raw_score == two.reviewed.score_map.raw_score
        assert one.region_features is not None
        assert np.array_equal(one.region_features, two.region_features)


# ---- who let it pass ----


@pytest.mark.parametrize(
    ("opened", "empty", "kinds", "at_defect", "expected"),
    [
        (False, True, (), None, "gate"),
        (False, True, (), [], "gate"),
        (True, True, (), None, "mask"),
        (True, True, ("defect-free",), None, "mask"),  # the whole field was shown in the place of a region
        (True, False, ("defect-free",), None, "head"),
        (True, False, ("defect-free", "defect-free"), [False, True], "head"),
        (True, False, ("defect-free", "defect-free"), [False, False], "mask"),
        (True, False, ("defect-free", "unknown"), None, None),
        (True, False, ("non-decidable",), [False], None),
        (True, True, ("unknown",), None, None),
        (True, False, ("known", "defect-free"), [True, True], None),
        (True, False, ("novel",), None, None),
    ],
)
def test_an_escape_is_laid_to_gate_mask_or_head(opened, empty, kinds, at_defect, expected) -> None:
    passer = cause_of_escape(is_opened=opened, is_mask_empty=empty, kinds=kinds, at_defect=at_defect)
    assert passer == expected


def defect(peak: float, kind: str, label: str | None = None) -> Defect:
    nothing = np.zeros((1, 1), np.float32)
    verdict = Verdict(kind, label, 1.0, ())  # type: ignore[arg-type]
    return Defect(1, (0, 0, 1, 1), 1, None, peak, (0, 0, 1, 1), nothing.astype(np.uint8), nothing, nothing[0], verdict)


def test_the_verdict_of_a_page_is_that_of_its_highest_region_that_is_called_a_defect() -> None:
    assert page_verdict([]) == ("defect-free", None)
    assert page_verdict([defect(9, "defect-free", DEFECT_FREE)]) == ("defect-free", None)
    some = [defect(9, "defect-free", DEFECT_FREE), defect(1, "unknown"), defect(2, "known", "bridge")]
    assert page_verdict(some) == ("known", "bridge")


# ---- labels ----


def test_labels_that_features_tell_apart_are_told_apart_and_no_duplicate_helps() -> None:
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"] * 20)
    apart = (rng.normal(size=(60, 12)) + 8 * np.eye(12)[[ord(name) - 97 for name in labels]]).astype(np.float32)
    alone = rng.normal(size=(60, 12)).astype(np.float32)
    copied = np.repeat(alone[:12], 5, axis=0)  # of one group each, and of one label
    of_copies = np.repeat(labels[:12], 5)
    fields = [np.zeros((8, 8), np.uint8)] * 60
    told = real_labels.label_table(
        Labelled({"features": apart}, labels, np.arange(60), fields), seeds=(0, 1), progress=quiet
    )
    untold = real_labels.label_table(
        Labelled({"features": copied}, of_copies, np.repeat(np.arange(12), 5), fields), seeds=(0, 1), progress=quiet
    )
    assert told.rows[0][2].mean > 0.95
    assert told.rows[0][3].mean > 0.9
    assert untold.rows[0][2].mean < 0.7


def test_real_strangers_far_away_are_recognised_and_few_images_judge_none() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["BRIDGE", "CMP", "LER", "CLEAN_LAYER"], 50)
    features = rng.normal(size=(200, 12)).astype(np.float32)
    for k, name in enumerate(("BRIDGE", "CMP", "LER", "CLEAN_LAYER")):
        features[labels == name, k] += 12
    of = Labelled({real_labels.REGION: features}, labels, np.arange(200), [])
    rule, scores = real_labels.stranger_tables(of, 12, 12, seeds=(0,))
    assert [row[0] for row in rule.rows] == ["BRIDGE", "CMP", "LER", "all"], "clean layers are never the strangers"
    assert all(row[1].mean > 0.9 for row in scores.rows if row[0] == "p-value (ours)")
    few = Labelled({real_labels.REGION: features[::5]}, labels[::5], np.arange(40), [])
    assert real_labels.stranger_tables(few, 12, 12, seeds=(0,)) == []


def test_the_span_of_the_samples_gives_the_answers_of_all_their_features() -> None:
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"] * 10)
    features = rng.normal(size=(20, 300)).astype(np.float32)
    assert (real_labels.predicted(features, labels, features) == labels).all()


# ---- the detector of another time ----


def test_a_folder_without_a_detector_of_another_time_is_refused_with_words(tmp_path) -> None:
    with pytest.raises(ConfigError, match="git show"):
        real_baselines.before_scores(tmp_path, [], tmp_path, progress=quiet)


@pytest.fixture
def weights(tmp_path) -> Path:
    """Random weights of the default family, that count branch and statistics alike."""
    torch.manual_seed(0)
    detector = IntrinsicDetector(IntrinsicForm(branch=BranchForm(input_px=64, projection=4, width=8, dilations=(1,))))
    detector.calibration.copy_(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
    train_intrinsic.save(detector, tmp_path / "detector.safetensors", normal_scores=[0.0], provenance={})
    return tmp_path / "detector.safetensors"


def test_parts_of_a_detector_sum_to_what_it_says_as_one_of_another_time(
    top, tiny_repository, weights, tmp_path
) -> None:
    images = [image for image in real_data.read(top).images if image.folder == real_data.SILICON][:2]
    with KeptAnswers(tiny_repository, tmp_path) as models:
        seen = real_line.look(images, Recipe(), models, encode=lambda _: False, progress=quiet)
    parts = real_parts.part_scores(weights, seen, tmp_path, progress=quiet)
    whole = real_baselines.before_scores(weights, seen, tmp_path, progress=quiet)
    for one in seen:
        branch, gaussian, like = (parts[name][one.image.name] for name in real_parts.PARTS)
        logits = [np.log(np.expm1(part.score_map)) for part in (branch, gaussian)]
        assert np.allclose(np.log1p(np.exp(sum(logits))), whole[one.image.name].score_map, atol=1e-3)
        assert not np.allclose(like.score_map, gaussian.score_map, atol=0.1)
        assert whole[one.image.name].raw == pytest.approx(np.log1p(np.exp(branch.raw + gaussian.raw)), rel=1e-3)


def test_point_defects_are_held_by_a_box_up_to_the_slack() -> None:
    assert real_tables._holds((10, 10, 20, 20), (24, 6))
    assert not real_tables._holds((10, 10, 20, 20), (25, 10))


# ---- the real images ----


@pytest.mark.slow
def test_real_sem_is_judged_by_the_built_models(data, repository, tmp_path) -> None:
    top = data / "REAL-SEM"
    if not (top / "normal-patterned-silicon").is_dir():
        pytest.skip(f"no {top}")
    (tmp_path / "some").mkdir()
    for name in ("normal-patterned-silicon", "inspected-and-reference"):
        if (top / name).is_dir():
            (tmp_path / "some" / name).symlink_to(top / name)
    found, _ = evaluate_real.real(
        tmp_path / "some", repository=repository, seeds=(0,), baselines=False, cache=tmp_path, progress=quiet
    )
    assert "Gate" in {table.title for table in found}
