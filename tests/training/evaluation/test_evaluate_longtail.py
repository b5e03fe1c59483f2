"""Long tails: how they are cut, what is judged on them, and every way to fit a head."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch

from progress import quiet
from semwatch.errors import ConfigError
from semwatch_training.evaluation import evaluate_longtail, longtail_data, longtail_methods
from semwatch_training.evaluation.evaluate_longtail import CARINTHIA, figures, longtail, planted, shape, split
from semwatch_training.evaluation.evaluation_data import Source
from semwatch_training.evaluation.longtail_data import Joined
from semwatch_training.evaluation.longtail_methods import METHODS, Tail
from semwatch_training.evaluation.report import Table
from semwatch_training.families.recame.network import NO_REGIONS, Regions

REGIONS = Regions(3, 2)
PLAIN, K = 14, 12


def crops(n: int = 16) -> Joined:
    """Classes told apart by a plain feature each; neighbours in pairs are near duplicates."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(K), n)
    features = rng.normal(size=(len(y), PLAIN + REGIONS.width)).astype(np.float32)
    features[np.arange(len(y)), y] += 5
    return Joined(features, np.array([f"set {chr(97 + k)}" for k in y]), np.arange(len(y)) // 2)


def test_tails_fall_from_the_largest_class_to_their_imbalance_and_no_class_is_empty() -> None:
    assert shape("10:1", 3, 100).tolist() == [100, 32, 10]
    assert shape("100:1", 3, 20).tolist() == [20, 2, 1]
    assert shape(CARINTHIA, 6, 4008).tolist() == [4008, 289, 227, 55, 8, 4]


def test_judged_crops_are_no_near_duplicates_of_what_a_tail_holds() -> None:
    given = crops()
    one = split(given, REGIONS, "10:1", 0)
    assert (np.bincount(one.tail.y, minlength=K) >= 1).all()
    assert one.tail.counts.max() == 12
    judged = {tuple(row) for row in given.features[np.isin(given.groups, given.groups[one.judged])].tolist()}
    assert judged.isdisjoint(tuple(row) for row in one.tail.features.tolist())


def test_figures_of_hand_made_answers() -> None:
    """The largest third is right, the middle half right, the few are called the largest class."""
    tail = Tail(np.zeros((6, 2), np.float32), np.array([0, 0, 0, 1, 1, 2]), 3, NO_REGIONS, 0)
    truth = np.array([0, 0, 1, 1, 2, 2])
    named = torch.tensor([0, 0, 1, 0, 0, 0])
    sure = torch.tensor([9.0, 9, 8, 1, 1, 1])
    logits = torch.nn.functional.one_hot(named, 3) * sure[:, None]
    one = evaluate_longtail.Split(tail, np.arange(6), truth)
    found = figures(lambda given: logits[: len(given)], one, np.zeros((6, 2), np.float32))
    assert found[:5] == pytest.approx((0.5, 1.0, 0.5, 0.0, 0.5))
    assert found.purity == pytest.approx(0.5)  # equal confidences stay together: all six
    assert found.milliseconds > 0


def test_planted_classes_have_several_looks_in_few_crops_and_a_rare_look_in_many() -> None:
    one = split(crops(), REGIONS, "10:1", 0)
    made = planted(one)
    assert made.split.tail.n_classes == K - 3
    assert len(np.unique(one.truth[made.many_in_few])) == 3 == len(np.unique(made.split.truth[made.many_in_few])) + 2
    assert len(np.unique(one.truth[made.few_in_many])) == 1
    (largest,) = np.unique(made.split.truth[made.few_in_many])
    assert made.split.tail.counts[largest] == made.split.tail.counts.max()
    assert not (made.many_in_few & made.few_in_many).any()


@pytest.mark.slow
def test_every_way_fits_a_tail_and_beats_chance() -> None:
    given = crops()
    one = split(given, REGIONS, "10:1", 0)
    assert len({*METHODS}) == 22
    for name, fit in METHODS.items():
        found = figures(fit(one.tail), one, given.features)
        assert found.overall > 0.5, name


def test_tables_have_a_row_for_each_way(monkeypatch) -> None:
    some = MappingProxyType({name: METHODS[name] for name in (longtail_methods.LINEAR, "weighted cross entropy")})
    monkeypatch.setattr(evaluate_longtail, "METHODS", some)
    monkeypatch.setattr(evaluate_longtail, "CLUSTERED", tuple(some)[:1])
    tables, _ = longtail(crops(), REGIONS, tails=["10:1", CARINTHIA], seeds=(0, 1), progress=quiet)
    assert [table.title for table in tables] == [
        "Long tail, 10:1",
        f"Long tail, {CARINTHIA}",
        "Clusters within classes",
    ]
    assert all(isinstance(table, Table) for table in tables)
    assert [row[0] for row in tables[0].rows] == list(some)


def test_too_few_classes_unknown_tails_and_sets_given_twice_are_refused(tmp_path) -> None:
    given = crops()
    few = replace(given, groups=np.zeros_like(given.groups))
    with pytest.raises(ConfigError, match="12 classes of 4 unlike images; these have 0"):
        longtail(few, REGIONS, tails=["10:1"], seeds=(0,), progress=quiet)
    with pytest.raises(ConfigError, match=r"no tail is called 7:1; choose from 10:1, 50:1"):
        longtail(given, REGIONS, tails=["7:1"], seeds=(0,), progress=quiet)
    with pytest.raises(ConfigError, match="each once"):
        longtail_data.joined([Source("synthetic", tmp_path)] * 2, most=9, progress=quiet)
