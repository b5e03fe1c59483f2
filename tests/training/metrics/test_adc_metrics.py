import math

import numpy as np
import pytest
from sklearn import metrics

from semwatch.errors import ConfigError
from semwatch_training.metrics.adc_metrics import (
    adc_metrics,
    minority_accuracy,
    purity_contribution_curve,
    purity_contribution_curves,
)

TRUTH = ["pit"] * 4 + ["arc"] * 3 + ["dust"] * 3
VERDICTS = ["pit", "pit", "arc", None, "arc", "dust", None, "dust", "dust", "pit"]


@pytest.mark.parametrize(("truth", "verdicts"), [([], []), (["pit"], []), (["pit"], ["pit", "arc"])])
def test_nothing_and_uneven_lengths_are_refused(truth: list[str], verdicts: list[str]) -> None:
    with pytest.raises(ConfigError, match="one label and one verdict"):
        adc_metrics(truth, verdicts)


def test_figures_by_hand() -> None:
    adc = adc_metrics(TRUTH, VERDICTS, nuisance={"dust"})
    pit, arc, dust = adc.by_class["pit"], adc.by_class["arc"], adc.by_class["dust"]
    assert (pit.accuracy, pit.purity, pit.contribution, pit.escape_rate) == (2 / 4, 2 / 3, 3 / 4, 0)
    assert (arc.accuracy, arc.purity, arc.contribution, arc.escape_rate) == (1 / 3, 1 / 2, 2 / 3, 1 / 3)
    assert (dust.accuracy, dust.purity, dust.contribution) == (2 / 3, 2 / 3, 1)
    assert math.isnan(dust.escape_rate)
    assert (adc.total.accuracy, adc.total.purity, adc.total.contribution) == (5 / 10, 5 / 8, 8 / 10)
    assert adc.escape_rate == 1 / 7
    assert adc.nuisance_rate == 1 / 5


def test_without_a_nuisance_class_nothing_can_escape() -> None:
    adc = adc_metrics(TRUTH, VERDICTS)
    assert math.isnan(adc.escape_rate)
    assert math.isnan(adc.nuisance_rate)
    assert all(math.isnan(figures.escape_rate) for figures in adc.by_class.values())


def test_where_nothing_is_decided_purity_is_undefined_and_contribution_none() -> None:
    adc = adc_metrics(["pit", "arc"], [None, None], nuisance={"dust"})
    assert (adc.total.accuracy, adc.total.contribution, adc.escape_rate) == (0, 0, 0)
    assert math.isnan(adc.total.purity)
    assert math.isnan(adc.nuisance_rate)
    assert math.isnan(adc.by_class["pit"].purity)


def test_all_defect_free_has_no_escapes_to_share() -> None:
    adc = adc_metrics(["free", "free"], ["free", "pit"], nuisance={"free"})
    assert math.isnan(adc.escape_rate)
    assert adc.nuisance_rate == 1
    assert list(adc.by_class) == ["free", "pit"]
    assert math.isnan(adc.by_class["pit"].accuracy)
    assert adc.by_class["pit"].purity == 0


def test_accuracy_is_recall_and_purity_precision_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    names = np.array(["a", "b", "c", "d"])
    truth, called = names[rng.integers(4, size=300)].tolist(), names[rng.integers(4, size=300)].tolist()
    precision, recall, _, _ = metrics.precision_recall_fscore_support(truth, called, labels=names)
    adc = adc_metrics(truth, called)
    assert [adc.by_class[n].purity for n in names] == pytest.approx(precision.tolist())
    assert [adc.by_class[n].accuracy for n in names] == pytest.approx(recall.tolist())
    assert adc.total.accuracy == adc.total.purity == pytest.approx(metrics.accuracy_score(truth, called))


def test_minority_accuracy_is_over_rare_classes_only() -> None:
    truth = ["a"] * 96 + ["b"] * 4
    adc = adc_metrics(truth, ["a"] * 97 + ["b"] * 3)
    assert minority_accuracy(adc) == 3 / 4
    assert math.isnan(minority_accuracy(adc, share=0.04))


def test_curve_by_hand_keeps_tied_calls_together() -> None:
    curve = purity_contribution_curve(np.array([True, False, True, True]), np.array([0.5, 0.9, 0.9, 0.2]))
    assert curve.thresholds.tolist() == [0.9, 0.5, 0.2]
    assert curve.contribution.tolist() == [0.5, 0.75, 1.0]
    assert curve.purity.tolist() == [1 / 2, 2 / 3, 3 / 4]


def test_curve_refuses_nothing_uneven_lengths_and_nan() -> None:
    with pytest.raises(ConfigError, match="one bool and one confidence"):
        purity_contribution_curve(np.zeros(0, bool), np.zeros(0))
    with pytest.raises(ConfigError, match="one bool and one confidence"):
        purity_contribution_curve(np.ones(2, bool), np.ones(3))
    with pytest.raises(ConfigError, match="one bool and one confidence"):
        purity_contribution_curve(np.ones(2), np.ones(2))
    with pytest.raises(ConfigError, match="1 of 2 confidences are not finite"):
        purity_contribution_curve(np.ones(2, bool), np.array([1, np.nan]))
    with pytest.raises(ConfigError, match="label, call and confidence"):
        purity_contribution_curves([], [], np.zeros(0))
    with pytest.raises(ConfigError, match="label, call and confidence"):
        purity_contribution_curves(["a"], ["a", "b"], np.zeros(2))


def test_each_called_class_has_a_curve_that_ends_at_its_purity() -> None:
    rng = np.random.default_rng(1)
    truth, called = (np.array(["a", "b", "c"])[rng.integers(3, size=200)].tolist() for _ in range(2))
    curves = purity_contribution_curves(truth, called, rng.random(200))
    adc = adc_metrics(truth, called)
    assert list(curves) == ["a", "b", "c"]
    for name, curve in curves.items():
        assert curve.purity[-1] == adc.by_class[name].purity
        assert curve.contribution[-1] == 1
        assert (np.diff(curve.thresholds) < 0).all()
