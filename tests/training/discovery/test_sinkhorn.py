import numpy as np
import pytest
import torch

from semwatch.errors import ConfigError
from semwatch_training.discovery.sinkhorn import transport, update_prior

UNIFORM = torch.full((4,), 0.25)
LONG_TAILED = torch.tensor([0.7, 0.2, 0.08, 0.02])


def random_scores(n: int, K: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def test_no_samples_give_no_labels() -> None:
    assert transport(torch.zeros(0, 4), UNIFORM).shape == (0, 4)


def test_one_sample_follows_the_prior_whatever_its_scores() -> None:
    plan = transport(torch.tensor([[3.0, 0.0, 0.0, 0.0]]), LONG_TAILED, epsilon=1.0)
    assert plan[0].tolist() == pytest.approx(LONG_TAILED.tolist(), abs=1e-3)


@pytest.mark.parametrize("prior", [UNIFORM, LONG_TAILED])
def test_rows_sum_to_one_and_column_means_meet_the_prior(prior: torch.Tensor) -> None:
    plan = transport(random_scores(500), prior, epsilon=0.5, max_iterations=200)
    assert plan.sum(dim=1).numpy() == pytest.approx(np.ones(500), abs=1e-5)
    assert plan.mean(dim=0).numpy() == pytest.approx(prior.numpy(), abs=1e-3)


def test_plan_agrees_with_plain_sinkhorn_in_double_precision() -> None:
    scores = random_scores(60).double()
    plan = transport(scores, LONG_TAILED.double(), epsilon=0.5, max_iterations=2000, tolerance=1e-12)
    kernel = np.exp(scores.numpy() / 0.5)
    for _ in range(2000):
        kernel *= LONG_TAILED.double().numpy() * 60 / kernel.sum(axis=0)
        kernel /= kernel.sum(axis=1, keepdims=True)
    assert plan.numpy() == pytest.approx(kernel, abs=1e-6)


def test_tiny_epsilon_stays_finite() -> None:
    plan = transport(100 * random_scores(50), UNIFORM, epsilon=1e-3)
    assert torch.isfinite(plan).all()


def test_strength_zero_is_the_softmax() -> None:
    scores = random_scores(50)
    assert torch.allclose(transport(scores, LONG_TAILED, epsilon=0.5, strength=0.0), (scores / 0.5).softmax(dim=1))


def test_strength_between_lies_between_the_scores_and_the_prior() -> None:
    scores = random_scores(500) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    shares = [float(transport(scores, UNIFORM, epsilon=1.0, strength=s).mean(dim=0)[0]) for s in (0.0, 0.5, 1.0)]
    assert shares[0] > shares[1] + 0.05
    assert shares[1] > shares[2] + 0.05
    assert shares[2] == pytest.approx(0.25, abs=1e-3)


def test_forbidden_class_gets_nothing_from_that_sample() -> None:
    scores = random_scores(100)
    scores[:30, 1] = -torch.inf
    plan = transport(scores, UNIFORM, epsilon=0.5, max_iterations=200)
    assert plan[:30, 1].eq(0).all()
    assert plan.mean(dim=0).numpy() == pytest.approx(UNIFORM.numpy(), abs=1e-3)


def test_class_forbidden_to_all_leaves_its_share_to_the_others() -> None:
    scores = random_scores(100)
    scores[:, 1] = -torch.inf
    plan = transport(scores, LONG_TAILED, epsilon=0.5, max_iterations=200)
    rest = LONG_TAILED.clone()
    rest[1] = 0
    assert plan.mean(dim=0).numpy() == pytest.approx((rest / rest.sum()).numpy(), abs=1e-3)


def test_prior_that_masks_cannot_meet_still_gives_finite_rows() -> None:
    """Half of the samples may only be class 3, whose prior says 2 %."""
    scores = random_scores(100)
    scores[:50, :3] = -torch.inf
    plan = transport(scores, LONG_TAILED)
    assert plan[:50, 3].tolist() == pytest.approx([1.0] * 50)
    assert plan.sum(dim=1).numpy() == pytest.approx(np.ones(100), abs=1e-5)


def test_stacked_problems_are_solved_each_by_itself() -> None:
    stack = torch.stack([random_scores(50, seed=1), random_scores(50, seed=2)])
    priors = torch.stack([UNIFORM, LONG_TAILED])
    together = transport(stack, priors, tolerance=0.0)
    apart = [transport(s, p, tolerance=0.0) for s, p in zip(stack, priors, strict=True)]
    assert torch.allclose(together, torch.stack(apart), atol=1e-5)


@pytest.mark.parametrize(
    ("scores", "prior", "epsilon", "message"),
    [
        (torch.tensor([[float("nan"), 0.0]]), [0.5, 0.5], 0.1, "NaN"),
        (torch.tensor([[float("inf"), 0.0]]), [0.5, 0.5], 0.1, "inf"),
        (torch.zeros(1, 2), [0.0, 0.0], 0.1, "vanish"),
        (torch.zeros(1, 2), [-0.5, 1.5], 0.1, "at least 0"),
        (torch.zeros(1, 2), [0.5, 0.5], 0.0, "epsilon"),
        (torch.full((1, 2), -torch.inf), [0.5, 0.5], 0.1, "every score is -inf"),
        (torch.tensor([[0.0, -torch.inf]]), [0.0, 1.0], 0.1, "prior of 0"),
    ],
)
def test_what_has_no_answer_is_refused(scores: torch.Tensor, prior: list[float], epsilon: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transport(scores, torch.tensor(prior), epsilon=epsilon)


def test_prior_moves_towards_the_counts() -> None:
    moved = update_prior(UNIFORM, torch.tensor([100.0, 0.0, 0.0, 0.0]), momentum=0.5, floor=0.0)
    assert moved.tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125])


def test_prior_keeps_its_floor_so_that_a_class_can_come_back() -> None:
    prior = UNIFORM
    for _ in range(200):
        prior = update_prior(prior, torch.tensor([10.0, 0.0, 0.0, 0.0]))
    assert float(prior.min()) == pytest.approx(0.025, rel=0.1)
    assert float(prior.sum()) == pytest.approx(1.0)


def test_prior_without_any_count_stays() -> None:
    assert update_prior(LONG_TAILED, torch.zeros(4), floor=0.0).tolist() == pytest.approx(LONG_TAILED.tolist())
