"""A rejection settles what lies in the rejected cluster's own range, and nothing that merely lies nearest to it."""

import numpy as np

from semwatch.models.head_bank import Bank
from semwatch_training.learning import outcomes
from semwatch_training.learning.candidates import is_inside

LABEL = f"{outcomes.REJECTED}novel-1"
WIDTH = 12


def blob(n: int, centre: float, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)
    rows[:, 0] += centre
    return rows


def bank(features: np.ndarray, label: str = LABEL) -> Bank:
    n = len(features)
    return Bank(features, (label,) * n, tuple(f"image {k}" for k in range(n)), ("",) * n)


def test_look_alikes_are_inside_and_another_kind_is_not() -> None:
    alike = [is_inside(blob(20, 0, 100 + seed), blob(14, 0, seed)).mean() for seed in range(30)]
    assert np.mean(alike) > 0.8
    assert not is_inside(blob(9, 60, 2), blob(14, 0, 0)).any()


def test_stray_member_widens_no_range() -> None:
    """One bridge among fourteen residues: their rejection took fifteen voids along."""
    members = [np.concatenate((blob(14, 0, seed), blob(1, 60, 50 + seed))) for seed in range(30)]
    assert np.mean([is_inside(blob(20, 0, 100 + seed), some).mean() for seed, some in enumerate(members)]) > 0.8
    assert not any(is_inside(blob(15, 25, 200 + seed), some).any() for seed, some in enumerate(members))


def test_nothing_is_inside_a_class_of_one_and_nothing_asks_for_nothing() -> None:
    assert not is_inside(blob(3, 0, 0), blob(1, 0, 0)).any()
    assert is_inside(blob(0, 0, 0), blob(5, 0, 0)).shape == (0,)


def test_unknowns_beyond_the_range_are_left_in_the_queue() -> None:
    """The nine scratches of the trial: clustering had nothing nearer than the rejected cluster for them."""
    features = np.concatenate((blob(14, 0, 1), blob(9, 60, 2), blob(2, 30, 3)))
    known = [LABEL] * 23 + ["bridge", None]
    found = outcomes.inside_rejected(known, features, bank(blob(14, 0, 0)), frozen_width=WIDTH)
    assert found[14:23] == (None,) * 9
    assert found[:14].count(LABEL) >= 11
    assert found[23:] == ("bridge", None)


def test_unknown_inside_the_range_that_lies_nearer_to_what_waits_is_not_taken_along() -> None:
    """One crop of another kind went with a rejection, though thirty of its kind waited."""
    strange = blob(30, 3, 4)
    features = np.concatenate((blob(14, 0, 1), strange))
    rejected = bank(blob(14, 0, 0))
    alone = outcomes.inside_rejected([LABEL] * 44, features, rejected, frozen_width=WIDTH)
    wrong = np.flatnonzero([one == LABEL for one in alone[14:]])
    assert len(wrong), "the two kinds overlap"
    known = [LABEL] * 14 + [LABEL if k == wrong[0] else None for k in range(30)]
    found = outcomes.inside_rejected(known, features, rejected, frozen_width=WIDTH)
    assert found[14 + wrong[0]] is None
    assert found[:14].count(LABEL) >= 8
