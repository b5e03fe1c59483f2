import numpy as np
import pytest

from semwatch.line.classification import classify, decide, size_feature
from semwatch.models.crop_store import KeptCrop
from semwatch.models.inference import Embedded, ModelId

LABELS = ("bridge", "defect-free", "void")
RULE = {"significance": 0.05, "decide_confidence": 0.8}


def judge(logits, p_values, **changes):
    return decide(np.float32(logits), np.float32(p_values), LABELS, **{**RULE, **changes})


def test_no_defect_asks_no_model(tiny_repository) -> None:
    with Embedded(tiny_repository) as models:
        models.infer = None  # type: ignore[assignment]
        features, verdicts, answered = classify([], models, **RULE)
    assert (features.shape, verdicts, answered) == ((0, 0), [], {})


@pytest.mark.parametrize(
    ("logits", "p_values", "kind", "label"),
    [
        ([5, 0, 0], [0.5, 0.01, 0.01], "known", "bridge"),
        ([0, 5, 0], [0.01, 0.5, 0.01], "defect-free", "defect-free"),
        ([5, 0, 0], [0.01, 0.01, 0.01], "unknown", None),
        ([9, 0, 0], [0.05, 0.05, 0.05], "unknown", None),  # at the significance is not above it
        ([5, 0, 0], [0.5, 0.5, 0.01], "known", "bridge"),  # both fit, the head is sure
        ([1, 1, 0], [0.5, 0.5, 0.01], "non-decidable", None),
        ([2, 1, 1], [0.01, 0.5, 0.5], "non-decidable", None),  # the head's favourite does not fit and has no say
        ([7, 0, 6], [0.01, 0.01, 0.5], "known", "void"),  # the favourite does not fit, the second does and may be right
        ([9, 0, 1], [0.01, 0.01, 0.5], "unknown", None),  # the favourite does not fit, and what fits looks wrong
    ],
)
def test_the_rule(logits, p_values, kind, label) -> None:
    verdict = judge(logits, p_values)
    assert (verdict.kind, verdict.label) == (kind, label)
    assert 0 <= verdict.confidence <= 1


def test_nearest_classes_put_those_that_fit_first() -> None:
    assert [n.label for n in judge([9, 0, 6], [0.01, 0.01, 0.5]).nearest] == ["void", "bridge"]
    assert [n.label for n in judge([0, 1, 9], [0.04, 0.03, 0.01]).nearest] == ["bridge", "defect-free"]


def test_stricter_significance_makes_more_unknown() -> None:
    assert judge([5, 0, 0], [0.08, 0.01, 0.01]).kind == "known"
    assert judge([5, 0, 0], [0.08, 0.01, 0.01], significance=0.1).kind == "unknown"


def test_huge_logits_do_not_overflow() -> None:
    assert judge([1e30, -1e30, 0], [0.5, 0.5, 0.5]).label == "bridge"


def test_size_feature_is_relative_to_the_field_and_finite_for_nothing() -> None:
    assert size_feature(128, 64**2, (1024, 2048)).tolist() == [-3, -4]
    assert np.isfinite(size_feature(0, 0, (64, 64))).all()


def test_classify_gives_one_verdict_for_each_crop(tiny_repository) -> None:
    rng = np.random.default_rng(0)
    with Embedded(tiny_repository) as models:
        crops, masks = rng.integers(0, 256, (3, 56, 56), dtype=np.uint8), rng.random((3, 4, 4), dtype=np.float32)
        views = [KeptCrop(crop, mask, np.zeros(2, np.float32)) for crop, mask in zip(crops, masks, strict=True)]
        features, verdicts, answered = classify(views, models, **RULE)
        served = models.versions(), models.hashes()
    assert features.shape == (3, 74)
    assert len(verdicts) == 3
    assert answered == {model: ModelId(served[0][model], served[1][model]) for model in ("encoder", "head")}
