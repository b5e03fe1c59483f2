"""The head in service on a user's labelled images: what becomes of each, and the figures that are made of it."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from progress import quiet
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.models.crop_store import KeptCrop
from semwatch.settings.recipe import Recipe
from semwatch_training.data.datasets import Sample
from semwatch_training.discovery.head import save_head
from semwatch_training.evaluation import evaluate_service, labelled_images
from semwatch_training.evaluation.evaluate_service import KINDS, names_of, purity_at, refuse_synthetic
from semwatch_training.evaluation.labelled_images import Judgement, Looked, Region
from semwatch_training.system import defaults
from tiny_models import SHAPE, encoder_graph, head

LABELS = ("bridge", DEFECT_FREE, "void")
NO_CROP = KeptCrop(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.float32), np.zeros(2, np.float32))


def sure(features: np.ndarray) -> labelled_images.Answers:
    """A head that reads the class from the first feature."""
    k = features[:, 0].astype(int)
    return 20 * np.eye(3, dtype=np.float32)[k], np.eye(3, dtype=np.float32)[k] * 0.9 + 0.01


def unsure(features: np.ndarray) -> labelled_images.Answers:
    return np.zeros((len(features), 3), np.float32), np.full((len(features), 3), 0.01, np.float32)


def looked(
    truth: str, *says: int, raw: float = 2.0, is_drawn: bool = False, shown: bool = True, domain: float = 0.5
) -> Looked:
    regions = tuple(Region(np.array([k], np.float32), NO_CROP, is_truth=(n == 0 and shown)) for n, k in enumerate(says))
    return Looked(Sample(Path("a.png"), truth), np.zeros((4, 4), np.uint8), raw, domain, regions, is_drawn)


@pytest.mark.parametrize(
    ("one", "kind", "label"),
    [
        (looked("void", 2), "known", "void"),
        (looked("void", 0), "known", "bridge"),
        (looked("void", 1), "defect-free", DEFECT_FREE),
        (looked("void", 2, raw=0.5), "gate shut", DEFECT_FREE),
        (looked("void"), "not found", DEFECT_FREE),
        (looked("void", 2, is_drawn=True, shown=False), "not found", DEFECT_FREE),
        (looked(DEFECT_FREE), "nothing found", DEFECT_FREE),
        (looked(DEFECT_FREE, 1, 1), "defect-free", DEFECT_FREE),
        (looked(DEFECT_FREE, 1, 2), "known", "void"),
        (looked("void", 1, domain=0.001), "unknown", None),
    ],
)
def test_an_image_is_judged_as_the_line_would(one, kind, label) -> None:
    (found,) = labelled_images.judge([one], sure, LABELS, Recipe(), 1.0)
    assert (found.kind, found.label, found.truth) == (kind, label, one.sample.label)


def test_what_no_class_explains_is_unknown() -> None:
    (found,) = labelled_images.judge([looked("void", 2)], unsure, LABELS, Recipe(), 1.0)
    assert (found.kind, found.label) == ("unknown", None)


def test_labels_that_differ_by_case_blanks_or_dashes_are_one_class() -> None:
    assert names_of(["Missing Via", "bridge", "fin_break"], ["missing-via", "bridge"]) == {"Missing Via": "missing-via"}


def test_purity_is_of_the_surest_verdicts_and_undefined_where_too_few_are_decided() -> None:
    judged = [
        Judgement("void", "known", "void", 0.9),
        Judgement("void", "known", "open", 0.5),
        Judgement("void", "known", "void", 0.8),
        Judgement("void", "unknown", None, 0.9),
    ]
    assert purity_at(judged, 0.5) == 1.0
    assert purity_at(judged, 0.75) == pytest.approx(2 / 3)
    assert purity_at(judged, 1.0) is None
    assert purity_at([], 0.6) is None


def test_tables_count_every_image_once_and_every_escape() -> None:
    judged = {
        "in service": [
            Judgement("void", "known", "void", 0.9),
            Judgement("void", "gate shut", DEFECT_FREE, 1.0),
            Judgement(DEFECT_FREE, "known", "void", 0.9),
            Judgement(DEFECT_FREE, "defect-free", DEFECT_FREE, 0.9),
        ]
    }
    heads, kinds, classes = evaluate_service.tables(judged, LABELS, "")
    row = dict(zip(heads.columns, heads.rows[0], strict=True))
    assert (row["accuracy of all"].rate, row["escapes"].rate, row["false calls"].rate) == (0.5, 0.5, 0.5)
    assert [sum(row[2:]) for row in kinds.rows] == [2, 2]
    assert kinds.columns[2:] == KINDS
    void = next(row for row in classes.rows if row[1] == "void")
    assert void[-1] == "defect-free 1"


def test_head_in_service_is_judged_beside_the_shipped_one_without_masks(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, label in enumerate(("BRIDGE", "BRIDGE", "lint", "good")):
        path = tmp_path / "data" / label / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 96), np.uint8)
        assert cv2.imwrite(str(path), cv2.GaussianBlur(pixels, (0, 0), 3))
    encoder = encoder_graph()
    width = encoder.frozen_width + SHAPE.width
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    other = head(width, encoder.frozen_width, seed=1)
    other.labels = ("bridge", DEFECT_FREE, "pit")
    save_head(other, shipped / "head.safetensors", encoder_form="", provenance={})
    monkeypatch.setattr(defaults, "SHIPPED", shipped)
    recipe = Recipe.model_validate({"name": "open", "gate": {"threshold": 0.0}})
    tables, figures = evaluate_service.service(
        tmp_path / "data", repository=tiny_repository, recipe=recipe, progress=quiet
    )
    heads = tables[0]
    assert [row[0] for row in heads.rows] == ["in service, version 1", "as shipped"]
    assert "does not know lint" in heads.note
    assert {row[1] for row in tables[2].rows} >= {"bridge", "lint", DEFECT_FREE}
    assert "Verdicts against truth, as shipped" in figures


def test_synthetic_images_are_not_for_the_head_in_service() -> None:
    with pytest.raises(ConfigError, match="labelled images of yours"):
        refuse_synthetic("synthetic")
    assert refuse_synthetic("data") == Path("data")
