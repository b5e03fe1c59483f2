"""The whole run in one call: every part once, none twice, and made again where what it was made of has changed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from semwatch.errors import ConfigError
from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch.system.files import file_sha256
from semwatch_training import __main__ as command_line
from semwatch_training.discovery import labelled_crops
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.evaluation import evaluate_commands
from semwatch_training.evaluation import whole_run as ship
from semwatch_training.families.branch.segmentation_branch import BranchForm
from semwatch_training.families.branch.train_branch import BranchSchedule
from semwatch_training.families.branch_images import BranchImages
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicForm
from semwatch_training.families.smg_vit import encoder_run, self_supervision, unlabelled_crops
from semwatch_training.families.smg_vit import export as smg_vit_export
from semwatch_training.families.smg_vit.encoder_run import CropSource
from semwatch_training.publishing import build_repository
from semwatch_training.trunks import backbone
from tiny_models import ENCODER, LABELS, SHAPE, convolutional, trunk

BRANCH = BranchForm(input_px=64, projection=4, width=8, dilations=(1,))
PLAN = ship.Plan(
    form=IntrinsicForm(branch=BRANCH, keys=5, domain_fields=12),
    images=BranchImages(n_normals=2, n_labelled=1, n_backgrounds=1, n_scenes=2, held_out=20),
    branch=BranchSchedule(steps=3),
    crops=CropSource(n_images=1),
    encoder=self_supervision.Schedule(epochs=1, batch=4, hidden=16, bottleneck=8, prototypes=12, learning_rate=1e-2),
    head_images=60,
    fields_per_type=2,
    crops_per_type=2,
    problems=2,
    seeds=1,
    seed=1,
)
PARTS = ["detector", "build", "encoder", "build", "head", "build"]
REPORTS = ["report detection", "report discovery", "report unknown", "report k"]
FIGURES = {
    "detection": ("shipped", "image AUROC"),
    "discovery": ("unified", "ARI"),
    "unknown": ("all", "AUROC unknown against known"),
    "k": ("consensus", "mean |k - k*|"),
}


def labelled(models: Embedded, *_: object, **__: object) -> Crops:
    """Labelled crops as wide as the encoder says, in the place of those that would be rendered and searched."""
    width = models.meta("encoder").outputs["features"].shape[0]
    labels = tuple(LABELS[i % 3] for i in range(90))
    features = np.random.default_rng(0).normal(size=(90, width)).astype(np.float32)
    for row, label in zip(features, labels, strict=True):
        row[LABELS.index(label)] += 6
    return Crops(features, labels, np.arange(90), np.full(90, 9), {}, {})


def judge(name: str, asked: list[str]):
    """A report of one figure, in the place of the protocol: those have tests of their own."""

    def write(data: str, *, out: Path, **options: object) -> None:
        assert data == "synthetic"
        assert options["per_type"] == 2
        asked.append(name)
        row, column = FIGURES[name]
        out.mkdir(parents=True, exist_ok=True)
        table = {"title": name, "columns": ["", column], "rows": [[row, {"mean": 0.5, "std": 0.1, "n": 2}]]}
        (out / "report.json").write_text(json.dumps({"tables": [table]}))

    return write


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[list[str]]:
    """Tiny trunks, crops that are at hand, and reports of one figure; yields the names of the reports asked for."""
    asked: list[str] = []
    rng = np.random.default_rng(0)
    found = unlabelled_crops.Crops(
        rng.integers(0, 256, (8, 56, 56), dtype=np.uint8), rng.random((8, 4, 4), dtype=np.float32)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "load", lambda cache: trunk())
        patch.setattr(backbone, "load_efficientnet", lambda cache: convolutional())
        patch.setattr(torch.cuda, "is_available", lambda: False)
        for module in (smg_vit_export, ship):
            patch.setattr(module, "EncoderForm", lambda: ENCODER)
        patch.setattr(labelled_crops, "collect", labelled)
        patch.setattr(unlabelled_crops, "of_synthetic", lambda *_, **__: found)
        for name in FIGURES:
            patch.setattr(evaluate_commands, name, judge(name, asked))
        yield asked


def run(out: Path, plan: ship.Plan = PLAN) -> list[ship.Part]:
    return list(ship.ship(out, plan, cache=out / "cache"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> tuple[Path, list[ship.Part]]:
    out = tmp_path_factory.mktemp("ship")
    return out, run(out)


def test_whole_run_makes_weights_a_repository_that_serves_and_four_reports(shipped) -> None:
    out, parts = shipped
    assert [part.name for part in parts] == PARTS + REPORTS
    assert all(part.is_new and part.seconds > 0 for part in parts if not part.name.startswith("report"))
    assert {path.name for path in (out / "weights").glob("*.safetensors")} == {
        f"{name}.safetensors" for name in ("detector", "encoder", "head")
    }
    assert [part.summary for part in parts if part.name == "build"] == [
        "detector 1, encoder 1",
        "detector 1, encoder 2",
        "detector 1, encoder 2, head 1",
    ]
    assert {part.name: part.summary for part in parts}["report unknown"] == "AUROC unknown against known 0.500"
    with Embedded(out / "repository", threads=1) as models:
        assert models.meta("head").labels == LABELS
        crop = {"crop": np.zeros((1, 56, 56), np.uint8), "soft_mask": np.ones((1, 4, 4), np.float32)}
        encoded = models.infer("encoder", {**crop, "size": np.zeros((1, 2), np.float32)}).outputs["features"]
        assert models.infer("head", {"features": encoded}).outputs["p_values"].shape == (1, 3)
    assert encoded.shape == (1, 2 * SHAPE.width + 2 + SHAPE.width)


def test_second_run_does_nothing_and_says_what_was_there(shipped, tiny) -> None:
    out, parts = shipped
    weights = {path: path.stat().st_mtime_ns for path in (out / "weights").iterdir()}
    asked = len(tiny)
    again = run(out)
    assert not any(part.is_new for part in again)
    assert {part.name: part.summary for part in again} == {part.name: part.summary for part in parts}
    assert {path: path.stat().st_mtime_ns for path in (out / "weights").iterdir()} == weights
    assert len(tiny) == asked


def test_run_that_was_stopped_goes_on_where_it_was(shipped, tmp_path, monkeypatch, tiny) -> None:
    """Stopped while the encoder learns; the rest is faked, since the first test has done it for real."""
    made: list[str] = []

    class Stop(Exception):
        """Power failure."""

    def stopped(*_: object, **__: object) -> dict[str, float]:
        raise Stop

    def build(repository: Path, **_: object) -> Iterator[str]:
        yield "detector 1"

    def detect(out: Path, *_: object, **__: object) -> list[float]:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"detector")
        made.append("detector")
        return [0.1]

    monkeypatch.setattr(ship.detector_run, "train_default", detect)
    monkeypatch.setattr(build_repository, "build", build)
    monkeypatch.setattr(encoder_run, "train_encoder", stopped)
    for _ in range(2):
        with pytest.raises(Stop):
            run(tmp_path)
    assert made == ["detector"]
    assert list(json.loads((tmp_path / "ship.json").read_text())) == ["detector"]


def test_report_is_made_again_where_it_is_gone_or_judges_other_images(shipped, tiny) -> None:
    out, _ = shipped
    (out / "reports" / "k" / "report.json").unlink()
    tiny.clear()
    assert [part.name for part in run(out) if part.is_new] == ["report k"]
    assert [part.name for part in run(out, replace(PLAN, problems=3)) if part.is_new] == ["report k"]
    assert tiny == ["k", "k"]
    assert [part.name for part in run(out) if part.is_new] == ["report k"]


def test_other_detector_settings_are_refused_where_work_of_a_run_lies(shipped) -> None:
    out, _ = shipped
    with pytest.raises(ConfigError, match=r"detector.work holds another run"):
        run(out, replace(PLAN, branch=BranchSchedule(steps=4)))


def test_trained_encoder_is_not_served_unasked(shipped) -> None:
    out, _ = shipped
    with pytest.raises(ConfigError, match=r"encoder.safetensors is there .*remove it, or go on with --self-supervise"):
        run(out, replace(PLAN, encoder=None))


def test_damaged_ledger_is_refused(tmp_path) -> None:
    (tmp_path / "ship.json").write_text("{")
    with pytest.raises(ConfigError, match=r"ship.json cannot be read .*; remove it to make every part again"):
        run(tmp_path)


def test_headline_takes_every_table_that_has_row_and_column(tmp_path) -> None:
    tables = [
        {"columns": ["engine", "AUROC"], "rows": [["shipped", {"mean": 0.9, "std": 0.0, "n": 1}], ["other", 0.1]]},
        {"columns": ["engine", "IoU"], "rows": [["shipped", 0.3]]},
        {"columns": ["engine", "AUROC"], "rows": [["shipped", 0.75]]},
        {"columns": ["engine", "AUROC"], "rows": [["shipped", None]]},
    ]
    (tmp_path / "report.json").write_text(json.dumps({"tables": tables}))
    assert ship.headline(tmp_path / "report.json", "shipped", "AUROC") == "0.900, 0.750, undefined"
    assert ship.headline(tmp_path / "report.json", "absent", "AUROC") == ""


def test_plan_grows_with_its_scale_and_never_falls_below_what_methods_need() -> None:
    small, whole, large = (ship.plan(scale, seed=3, self_supervise=True) for scale in (0.001, 1, 2))
    assert whole.images == BranchImages()
    assert (whole.branch.steps, whole.branch.seed) == (3000, 3)
    assert (small.images.held_out, small.head_images, small.crops_per_type) == (100, 180, 18)
    assert (large.images.n_labelled, large.head_images, large.seeds) == (2 * BranchImages().n_labelled, 1440, 3)
    assert small.encoder is not None
    assert small.encoder.batch <= small.crops.n_images
    assert ship.plan(1, seed=3, self_supervise=False).encoder is None


def test_command_prints_a_line_for_each_part(monkeypatch, tmp_path) -> None:
    def parts(out: Path, plan: ship.Plan, *, cache: Path) -> Iterator[ship.Part]:
        assert plan == ship.plan(0.5, seed=4, self_supervise=True)
        yield ship.Part("detector", 12.34, "fine", is_new=True)
        yield ship.Part("build", 0.5, "detector 1", is_new=False)

    monkeypatch.setattr(ship, "ship", parts)
    options = ["--out", str(tmp_path), "--scale", "0.5", "--self-supervise", "--seed", "4"]
    result = CliRunner().invoke(command_line.app, ["ship", *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert "detector             12.3 s  fine\n" in result.output
    assert "build                 0.5 s  detector 1, as it was\n" in result.output


def test_served_head_names_the_encoder_that_was_trained(shipped) -> None:
    out, _ = shipped
    encoder, head = (model_repository.read_meta(out / "repository", *which) for which in (("encoder", 2), ("head", 1)))
    assert head.encoder_sha256 == encoder.weights_sha256
    assert encoder.provenance["trained_layers"] == file_sha256(out / "weights/encoder.safetensors")
