"""The losses of ReCAME-Net against plain loops and known values."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from semwatch_training.families.recame import losses

COUNTS = torch.tensor([100.0, 10.0, 1.0, 30.0, 4.0])


def logits(n: int = 6, k: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def targets(n: int = 6, k: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(value) for value in row]
    return [value / sum(exps) for value in exps]


def test_balanced_softmax_is_a_softmax_in_which_each_class_weighs_by_its_count() -> None:
    z, y = logits(), targets()
    found = losses.balanced_softmax(z, y, COUNTS)
    for i in range(len(z)):
        weighed = [n * math.exp(value) for n, value in zip(COUNTS.tolist(), z[i].tolist(), strict=True)]
        assert found[i].item() == pytest.approx(-math.log(weighed[y[i]] / sum(weighed)))


def test_balanced_softmax_of_equal_classes_is_cross_entropy_and_a_class_of_nothing_is_never_named() -> None:
    z, y = logits(), targets()
    same = losses.balanced_softmax(z, y, torch.full((5,), 7.0))
    assert torch.allclose(same, functional.cross_entropy(z, y, reduction="none"))
    without = losses.balanced_softmax(z, torch.zeros(6, dtype=torch.long), torch.tensor([3.0, 3.0, 3.0, 3.0, 0.0]))
    assert torch.allclose(
        without, functional.cross_entropy(z[:, :4], torch.zeros(6, dtype=torch.long), reduction="none")
    )


def test_focal_is_cross_entropy_at_gamma_0_and_forgets_what_is_right() -> None:
    z, y = logits(), targets()
    ce = functional.cross_entropy(z, y, reduction="none")
    assert torch.allclose(losses.focal(z, y, gamma=0), ce)
    p = torch.tensor([softmax(row)[k] for row, k in zip(z.tolist(), y.tolist(), strict=True)], dtype=torch.float64)
    assert torch.allclose(losses.focal(z, y), (1 - p) ** 2 * -p.log())


def test_class_weights_make_every_class_count_alike() -> None:
    weights = losses.class_weights(COUNTS)
    assert torch.allclose(weights * COUNTS, torch.full((5,), COUNTS.sum().item() / 5))
    assert torch.isfinite(losses.class_weights(torch.tensor([4.0, 0.0]))).all()


@pytest.mark.parametrize(("k", "n"), [(2, 1), (3, 2), (5, 3), (31, 9), (100, 30)])
def test_three_tenths_of_the_categories_are_hard_and_three_at_least(k: int, n: int) -> None:
    assert losses.n_hard(k) == n


def test_hard_categories_are_the_target_and_the_highest_others() -> None:
    z, y = logits(), targets()
    marked = losses.hard_categories(z, y, 2)
    for i in range(len(z)):
        others = sorted((k for k in range(5) if k != y[i]), key=lambda k: -z[i, k].item())
        assert set(torch.nonzero(marked[i]).flatten().tolist()) == {int(y[i]), *others[:2]}
    assert losses.hard_categories(z, y, 0).sum() == len(z)


def test_categories_that_are_not_selected_do_not_compete() -> None:
    z, y = logits(), targets()
    hard = losses.hard_categories(z, y, 2)
    found = losses.hard_category_loss(z, y, hard)
    for i in range(len(z)):
        kept = torch.nonzero(hard[i]).flatten().tolist()
        share = math.exp(z[i, y[i]]) / sum(math.exp(z[i, k]) for k in kept)
        assert found[i].item() == pytest.approx(-math.log(share))


def test_literal_form_leaves_them_in_the_softmax_at_logit_0() -> None:
    z, y = logits(), targets()
    hard = losses.hard_categories(z, y, 2)
    found = losses.hard_category_loss(z, y, hard, "zero")
    for i in range(len(z)):
        row = [z[i, k].item() if hard[i, k] else 0.0 for k in range(5)]
        assert found[i].item() == pytest.approx(-math.log(softmax(row)[y[i]]))
    assert (found > losses.hard_category_loss(z, y, hard)).all()


def test_divergence_is_the_sum_of_p_log_p_over_q() -> None:
    a, b = logits(), logits(seed=7)
    for i, value in enumerate(losses.divergence(a, b).tolist()):
        p, q = softmax(b[i].tolist()), softmax(a[i].tolist())
        assert value == pytest.approx(sum(x * math.log(x / z) for x, z in zip(p, q, strict=True)))


def test_divergence_among_selected_categories_is_finite_in_value_and_gradient() -> None:
    a, b, y = logits().requires_grad_(), logits(seed=7), targets()
    hard = losses.hard_categories(b, y, 2)
    found = losses.divergence(losses.selected(a, hard), losses.selected(b, hard))
    i, kept = 0, torch.nonzero(hard[0]).flatten()
    p, q = softmax(b[i, kept].tolist()), softmax(a[i, kept].tolist())
    assert found[i].item() == pytest.approx(sum(x * math.log(x / z) for x, z in zip(p, q, strict=True)))
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert torch.isfinite(gradient).all()
    assert (gradient[~hard] == 0).all()


def test_experts_learn_from_every_other_but_no_gradient_enters_a_teacher() -> None:
    experts = [logits(seed=s).requires_grad_() for s in range(3)]
    found = losses.mutual_distillation(experts)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    assert torch.allclose(found, sum(losses.divergence(experts[i], experts[j]) for i, j in pairs) / 2)
    own = torch.autograd.grad(found.sum(), experts[0], retain_graph=True)[0]
    as_student = sum(losses.divergence(experts[0], experts[j].detach()) for j in (1, 2)).sum() / 2
    assert torch.allclose(own, torch.autograd.grad(as_student, experts[0])[0])


def test_parents_form_pulls_the_teacher_too() -> None:
    a, b = logits(seed=1).requires_grad_(), logits(seed=2).requires_grad_()
    detached = torch.autograd.grad(losses.mutual_distillation([a, b]).sum(), a)[0]
    both = torch.autograd.grad(losses.mutual_distillation([a, b], is_teacher_detached=False).sum(), a)[0]
    extra = torch.autograd.grad(losses.divergence(b.detach(), a).sum(), a)[0]
    assert torch.allclose(both, detached + extra)
    assert not torch.allclose(both, detached)


def test_a_single_expert_has_nobody_to_learn_from() -> None:
    assert losses.mutual_distillation([logits()]).tolist() == [0.0] * 6


def test_distillation_sends_no_gradient_to_the_teacher_and_vanishes_where_both_agree() -> None:
    student, teacher = logits(seed=1).requires_grad_(), logits(seed=2).requires_grad_()
    found = losses.distillation(student, teacher, temperature=3.0)
    assert torch.allclose(found, 9 * losses.divergence(student / 3, teacher / 3))
    assert torch.autograd.grad(found.sum(), teacher, allow_unused=True)[0] is None
    assert losses.distillation(student, student).abs().max() < 1e-12


def test_supervised_contrastive_is_the_mean_over_pairs_of_a_class() -> None:
    x, y = logits(7, 4), torch.tensor([0, 0, 0, 1, 1, 2, 3])
    unit = (x / x.norm(dim=1, keepdim=True)).tolist()
    per_sample = []
    for i in range(7):
        similar = [sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) / 0.1 for j in range(7)]
        everybody = sum(math.exp(similar[j]) for j in range(7) if j != i)
        mates = [j for j in range(7) if j != i and y[j] == y[i]]
        if mates:
            per_sample.append(-np.mean([math.log(math.exp(similar[j]) / everybody) for j in mates]))
    assert losses.supervised_contrastive(x, y).item() == pytest.approx(np.mean(per_sample))
    assert losses.supervised_contrastive(5 * x, y).item() == pytest.approx(np.mean(per_sample))


def test_supervised_contrastive_of_a_batch_without_a_pair_is_0_with_a_finite_gradient() -> None:
    x = logits(3, 4).requires_grad_()
    found = losses.supervised_contrastive(x, torch.tensor([0, 1, 2]))
    assert found.item() == 0
    assert torch.isfinite(torch.autograd.grad(found, x)[0]).all()


def test_raw_metric_losses_are_the_double_loops_of_the_code() -> None:
    x, y = 4 * logits(5, 3), torch.tensor([0, 0, 1, 1, 2])
    inter = intra = 0.0
    for i in range(5):
        for j in range(5):
            distance = math.dist(x[i].tolist(), x[j].tolist())
            intra += distance if y[i] == y[j] else 0
            inter += distance if y[i] == y[j] else max(0, 20 - distance)
    assert losses.raw_inter(x, y).item() == pytest.approx(inter / 25)
    assert losses.raw_intra(x, y).item() == pytest.approx(intra / 25)
    x.requires_grad_()
    assert torch.isfinite(torch.autograd.grad(losses.raw_inter(x, y), x)[0]).all()  # a crop is 0 from itself
