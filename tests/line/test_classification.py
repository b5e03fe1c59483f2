from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, Domain, Verdict, VerdictKind
from semwatch.line.classification import classify, decide, domain_of, size_feature, softmax
from semwatch.models.crop_store import KeptCrop
from semwatch.models.inference import Embedded, ModelId
from semwatch.settings.recipe import UnknownRule

LABELS = ("bridge", "defect-free", "void")
RULE = UnknownRule()


def judge(logits, p_values, domain="not judged", **changes) -> Verdict:
    rule = UnknownRule(
        **{"dismiss_probability": 0.9, "foreign_confidence": 0.95, "foreign_significance": 0.2, **changes}
    )
    return decide(np.float32(logits), np.float32(p_values), LABELS, rule, domain=domain)


def test_no_defect_asks_no_model(tiny_repository) -> None:
    with Embedded(tiny_repository) as models:
        models.infer = None  # type: ignore[assignment]
        features, verdicts, answered = classify([], models, RULE)
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


# ---- a dismissal is earned ----


@pytest.mark.parametrize(
    ("logits", "p_values", "kind"),
    [
        ([0, 5, 0], [0.01, 0.5, 0.01], "defect-free"),
        ([1.5, 1.1, 0], [0.01, 0.5, 0.01], "unknown"),  # the head sees a bridge; only defect-free fits
        ([0, 2.5, 0], [0.01, 0.5, 0.01], "unknown"),  # first choice, at .86
        ([0, 5, 0], [0.5, 0.04, 0.01], "unknown"),  # the crop lies outside the normals
        ([2.4, 5, 0], [0.01, 0.9, 0.01], "defect-free"),  # .92
        ([2.8, 5, 0], [0.01, 0.9, 0.01], "unknown"),  # .895 among all
    ],
)
def test_the_head_dismisses_only_what_it_is_sure_of_among_all_classes(logits, p_values, kind) -> None:
    assert judge(logits, p_values).kind == kind


def test_a_lower_minimum_still_wants_the_first_choice() -> None:
    assert judge([0, 0.2, 0], [0.01, 0.5, 0.01], dismiss_probability=0.3).kind == "defect-free"
    assert judge([0.2, 0, 0], [0.01, 0.5, 0.01], dismiss_probability=0.3).kind == "unknown"


def test_a_defect_may_be_named_at_a_probability_that_dismisses_nothing() -> None:
    assert judge([2.5, 0, 0], [0.5, 0.01, 0.01]).kind == "known"


# ---- the page's process ----


def test_a_field_is_of_a_known_process_where_its_p_value_is_above_the_significance() -> None:
    said = [domain_of(p, significance=0.01) for p in (None, 1.0, 0.011, 0.01, 1e-9, float("nan"))]
    assert said == ["not judged", "known process", "known process", *["unknown process"] * 3]


def test_nothing_is_dismissed_on_a_page_of_an_unknown_process() -> None:
    sure = [0, 30, 0], [0.01, 0.99, 0.01]
    assert [judge(*sure, domain).kind for domain in ("not judged", "known process", "unknown process")] == [
        "defect-free", "defect-free", "unknown",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("logits", "p_values", "known", "foreign"),
    [
        ([9, 0, 0], [0.5, 0.01, 0.01], "known", "known"),
        ([9, 0, 0], [0.2, 0.01, 0.01], "known", "unknown"),  # the p-value is not above the larger significance
        ([3, 0, 0], [0.5, 0.01, 0.01], "known", "unknown"),  # .91
        ([9, 8, 0], [0.5, 0.01, 0.01], "known", "unknown"),  # sure among those that fit, not among all
        ([1, 1, 0], [0.5, 0.5, 0.01], "non-decidable", "unknown"),
    ],
)
def test_a_name_on_a_page_of_an_unknown_process_needs_a_stronger_proof(logits, p_values, known, foreign) -> None:
    assert judge(logits, p_values, "known process").kind == known
    assert judge(logits, p_values, "unknown process").kind == foreign


def test_the_stronger_proof_is_never_the_weaker_one() -> None:
    lax = {"foreign_confidence": 0.01, "foreign_significance": 1e-6}
    assert judge([0.5, 0, 0], [0.5, 0.5, 0.01], "unknown process", **lax).kind == "unknown"
    assert judge([5, 0, 0], [0.04, 0.01, 0.01], "unknown process", **lax).kind == "unknown"


# ---- confidence and nearest ----


def drawn(n: int, seed: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], list[str], UnknownRule]]:
    """Answers of heads of one to five classes, and rules."""
    rng = np.random.default_rng(seed)
    names = ["bridge", "novel-1", "void", "open", DEFECT_FREE]
    for _ in range(n):
        k = int(rng.integers(1, 6))
        logits = rng.choice([0.5, 2, 8]) * rng.standard_normal(k)
        p_values = rng.random(k) ** rng.choice([0.3, 1, 4]) * 0.999 + 0.001
        rule = UnknownRule(
            significance=float(rng.choice([0.01, 0.05, 0.3])),
            decide_confidence=float(rng.choice([0, 0.5, 0.8, rng.random(), 1])),
            dismiss_probability=float(rng.choice([0.01, 0.9, 1 - rng.random()])),
            foreign_confidence=float(1 - rng.random()),
            foreign_significance=float(rng.choice([0.01, 0.2, 0.5])),
        )
        yield logits.astype(np.float32), p_values.astype(np.float32), rng.permutation(names)[:k].tolist(), rule


@pytest.mark.parametrize("domain", ["not judged", "known process", "unknown process"])
def test_confidence_never_contradicts_the_recipe(domain: Domain) -> None:
    kinds = {_confidence_is_consistent(*case, domain) for case in drawn(3000, seed=0)}
    said = {"known", "novel", "unknown"}
    assert kinds == (said if domain == "unknown process" else said | {"non-decidable", "defect-free"})


def _confidence_is_consistent(logits, p_values, labels, rule: UnknownRule, domain: Domain) -> VerdictKind:
    verdict = decide(logits, p_values, labels, rule, domain=domain)
    probability = softmax(logits)
    support = np.minimum(probability, p_values)
    assert 0 <= verdict.confidence <= 1
    match verdict.kind:
        case "known" | "novel" | "defect-free":
            assert verdict.confidence >= rule.decide_confidence
            assert verdict.confidence >= verdict.nearest[0].probability - 1e-12
            assert verdict.nearest[0].label == verdict.label
            assert verdict.nearest[0].p_value > rule.significance
        case "non-decidable":
            assert verdict.label is None
            assert verdict.confidence < rule.decide_confidence
            assert verdict.nearest[0].p_value > rule.significance
        case "unknown":
            first = verdict.nearest[0]
            assert verdict.label is None
            assert verdict.confidence == pytest.approx(1 - min(first.probability, first.p_value))
            assert min(first.probability, first.p_value) == pytest.approx(support.max())
    if verdict.kind == "defect-free":
        assert verdict.confidence >= rule.dismiss_probability - 1e-12
        assert domain != "unknown process"
    if verdict.label and domain == "unknown process":
        assert verdict.confidence >= rule.foreign_confidence - 1e-12
    return verdict.kind


def test_an_unknown_that_lacked_no_stronger_proof_is_confident() -> None:
    n_unknown = 0
    for logits, p_values, labels, rule in drawn(3000, seed=1):
        verdict = decide(logits, p_values, labels, rule)
        if verdict.kind == "unknown" and DEFECT_FREE not in labels:
            n_unknown += 1
            assert verdict.confidence >= min(rule.decide_confidence, 1 - rule.significance) - 1e-6
    assert n_unknown > 100


def test_what_the_head_doubts_among_all_classes_is_sure_among_those_that_fit() -> None:
    verdict = judge([1.0, 0.9, 1.1], [0.5, 0.01, 0.01])  # .33 of all
    assert (verdict.kind, verdict.confidence) == ("known", 1.0)
    assert verdict.nearest[0].probability == pytest.approx(0.33, abs=0.01)


def test_the_nearest_of_an_unknown_is_what_both_witnesses_think_possible() -> None:
    verdict = judge([9, 0, 0], [0.04, 0.03, 0.6])  # void fits and has no probability; bridge looks right, and far off
    assert verdict.kind == "unknown"
    assert verdict.nearest[0].label == "bridge"
    assert verdict.confidence == pytest.approx(0.96)


def test_nearest_classes_put_those_that_fit_first() -> None:
    assert [n.label for n in judge([7, 0, 6], [0.01, 0.01, 0.5]).nearest] == ["void", "bridge"]
    assert [n.label for n in judge([2, 1, 1.5], [0.01, 0.5, 0.5]).nearest] == ["void", "defect-free"]


def test_a_head_of_one_class_has_one_neighbour() -> None:
    assert len(decide(np.float32([0]), np.float32([0.5]), ["bridge"], RULE).nearest) == 1


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
        features, verdicts, answered = classify(views, models, RULE)
        served = models.versions(), models.hashes()
    assert features.shape == (3, 74)
    assert len(verdicts) == 3
    assert answered == {model: ModelId(served[0][model], served[1][model]) for model in ("encoder", "head")}
