import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from progress import quiet
from semwatch.errors import ConfigError
from semwatch_training.data.augment import NOTHING
from semwatch_training.families.smg_vit import self_supervision as ss
from semwatch_training.families.smg_vit.crop_views import Views, cache_views, frozen_fingerprint
from semwatch_training.families.smg_vit.distillation import collapse_indicators, distillation_loss
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, SmgVit
from tiny_models import ENCODER, trunk

SCHEDULE = ss.Schedule(
    epochs=2, batch=4, warm_up_steps=1, temperature_epochs=1, hidden=16, bottleneck=8, prototypes=12, learning_rate=1e-3
)


def crops(n: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 56, 56), dtype=np.uint8), rng.random((n, 4, 4), dtype=np.float32)


def encoder(seed: int = 0) -> SmgVit:
    return SmgVit(trunk(seed), ENCODER)


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> Views:
    return cache_views(encoder(), *crops(), tmp_path_factory.mktemp("views"), n_views=2, progress=quiet)


def guided_state(vit: SmgVit) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in vit.guided.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- views


def test_no_crops_make_no_views(tmp_path) -> None:
    empty = np.zeros((0, 56, 56), np.uint8), np.zeros((0, 4, 4), np.float32)
    with pytest.raises(ConfigError, match="at least one crop"):
        cache_views(encoder(), *empty, tmp_path, progress=quiet)


def test_each_crop_needs_its_mask(tmp_path) -> None:
    pixels, masks = crops()
    with pytest.raises(ConfigError, match="a mask for each"):
        cache_views(encoder(), pixels, masks[:3], tmp_path, progress=quiet)


def test_views_must_divide_into_patches(tmp_path) -> None:
    with pytest.raises(ConfigError, match="multiple of 14"):
        cache_views(encoder(), *crops(), tmp_path, side_px=50, progress=quiet)


def test_masks_of_nan_are_refused(tmp_path) -> None:
    pixels, masks = crops()
    masks[2, 1, 1] = np.nan
    with pytest.raises(ConfigError, match="without NaN"):
        cache_views(encoder(), pixels, masks, tmp_path, progress=quiet)


def test_cached_tokens_give_the_class_token_of_the_whole_network(tmp_path) -> None:
    vit, (pixels, masks) = encoder(), crops(3)
    plain = cache_views(vit, pixels, masks, tmp_path, n_views=1, augmentation=NOTHING, progress=quiet)
    images = (torch.from_numpy(pixels).float() / 255).unsqueeze(1).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    _, whole = vit((images - mean) / std, torch.from_numpy(masks))
    tokens, seen = (torch.from_numpy(np.array(array[:, 0])) for array in (plain.tokens, plain.soft_masks))
    resumed = vit.guided(tokens.float(), seen)
    assert torch.allclose(resumed, whole, atol=5e-3)  # fp16 between


def test_views_of_one_crop_differ_and_masks_go_with_them(views) -> None:
    assert views.tokens.shape == (10, 2, 17, 24)
    assert views.soft_masks.shape == (10, 2, 4, 4)
    assert not np.array_equal(views.tokens[:, 0], views.tokens[:, 1])
    assert not np.array_equal(views.soft_masks[:, 0], views.soft_masks[:, 1])


def test_cache_is_reused_for_the_same_content_and_not_for_another(tmp_path) -> None:
    told: list[int] = []
    cache = {"n_views": 1, "progress": lambda *done: told.append(done[1])}
    pixels, masks = crops(4)
    first = cache_views(encoder(), pixels, masks, tmp_path, **cache)
    n = len(told)
    again = cache_views(encoder(), pixels, masks, tmp_path, **cache)
    assert len(told) == n
    assert np.array_equal(first.tokens, again.tokens)
    cache_views(encoder(), pixels, masks, tmp_path, seed=2, **cache)
    assert len(told) > n
    n = len(told)
    cache_views(encoder(seed=3), pixels, masks, tmp_path, **cache)
    assert len(told) > n


def test_cache_cut_off_is_made_anew(tmp_path) -> None:
    first = cache_views(encoder(), *crops(4), tmp_path, n_views=1, progress=quiet)
    tokens = np.array(first.tokens)
    (path,) = tmp_path.glob("views-*.npy")
    del first
    path.write_bytes(path.read_bytes()[:200])
    again = cache_views(encoder(), *crops(4), tmp_path, n_views=1, progress=quiet)
    assert np.array_equal(again.tokens, tokens)


def test_views_of_a_crop_do_not_depend_on_the_others(tmp_path) -> None:
    pixels, masks = crops(4)
    some = cache_views(encoder(), pixels[:2], masks[:2], tmp_path, progress=quiet)
    every = cache_views(encoder(), pixels, masks, tmp_path, progress=quiet)
    assert np.array_equal(some.soft_masks, every.soft_masks[:2])


# ---------------------------------------------------------------- training


def test_training_moves_the_guided_layers_and_nothing_else(views, tmp_path) -> None:
    vit = encoder()
    guided, frozen = guided_state(vit), {k: v.clone() for k, v in vit.trunk.state_dict().items()}
    curve = ss.train(vit, views, SCHEDULE, tmp_path, progress=quiet)
    assert len(curve) == 2
    assert not torch.equal(guided["scale"], vit.guided.scale)
    assert not torch.equal(guided["blocks.1.mlp.fc1.weight"], vit.guided.blocks[1].mlp.fc1.weight)
    assert same(frozen, vit.trunk.state_dict())


def test_student_comes_to_answer_as_a_teacher_that_keeps_still(views, tmp_path) -> None:
    still = replace(SCHEDULE, epochs=12, teacher_momentum=1.0, centre_momentum=1.0, final_teacher_temperature=0.04)
    vit, before = encoder(), guided_state(encoder())
    curve = ss.train(vit, views, still, tmp_path, progress=quiet)
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert same(before, vit.guided.state_dict())  # what is kept is the teacher


def test_training_finds_kinds_that_it_is_not_told(tmp_path) -> None:
    """Six kinds under noise of crop, view and token: the nearest crop is of the same kind more often than before."""
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(6), 8)
    tokens = 2 * rng.normal(size=(6, 24))[kinds][:, None, None] + rng.normal(size=(48, 2, 17, 24))
    tokens += 1.5 * rng.normal(size=(48, 2, 1, 24))
    masks, vit = rng.random((48, 2, 4, 4), dtype=np.float32), encoder()
    toy = Views(tokens.astype(np.float16), masks, "toy", frozen_fingerprint(vit))

    def share_of_same_kind() -> float:
        with torch.no_grad():
            first, second = (vit.guided(torch.from_numpy(toy.tokens[:, v]).float(), torch.from_numpy(masks[:, v]))
                             for v in (0, 1))  # fmt: skip
        similarity = (first @ second.T).fill_diagonal_(-2)
        return float((kinds[similarity.argmax(dim=1).numpy()] == kinds).mean())

    before = share_of_same_kind()
    longer = replace(SCHEDULE, epochs=60, batch=16, learning_rate=3e-3, teacher_momentum=0.95, prototypes=24)
    last = ss.train(vit, toy, replace(longer, hidden=32, bottleneck=16), tmp_path, progress=quiet)[-1]
    assert share_of_same_kind() > before + 0.08
    assert last["loss"] < 0.7 * math.log(24)
    assert last["marginal_entropy"] > 0.5  # not all crops got one answer
    assert last["teacher_entropy"] < 0.6  # nor every answer


def test_resumed_training_ends_with_the_very_same_weights(views, tmp_path) -> None:
    whole = encoder()
    straight = ss.train(whole, views, replace(SCHEDULE, epochs=3), tmp_path / "a", progress=quiet)

    class Stop(Exception):
        """Power failure."""

    def pull_the_plug(what: str, done: int, total: int) -> None:
        if done == 4:  # within the second epoch of two steps
            raise Stop

    with pytest.raises(Stop):
        ss.train(encoder(), views, replace(SCHEDULE, epochs=3), tmp_path / "b", progress=pull_the_plug)
    resumed = encoder()
    curve = ss.train(resumed, views, replace(SCHEDULE, epochs=3), tmp_path / "b", progress=quiet)
    assert same(guided_state(whole), guided_state(resumed))
    assert [row["loss"] for row in curve] == [row["loss"] for row in straight]


def test_finished_run_gives_the_same_again_without_training(views, tmp_path) -> None:
    first, again, told = encoder(), encoder(), []
    ss.train(first, views, SCHEDULE, tmp_path, progress=quiet)
    ss.train(again, views, SCHEDULE, tmp_path, progress=lambda *done: told.append(done))
    assert not told
    assert same(guided_state(first), guided_state(again))


def test_seed_decides_the_run(views, tmp_path) -> None:
    runs = []
    for index, seed in enumerate((1, 1, 2)):
        vit = encoder()
        torch.manual_seed(index)  # what others drew before does not matter
        ss.train(vit, views, replace(SCHEDULE, epochs=1, seed=seed), tmp_path / str(index), progress=quiet)
        runs.append(guided_state(vit))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_training_leaves_the_callers_random_numbers_alone(views, tmp_path) -> None:
    vit = encoder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ss.train(vit, views, replace(SCHEDULE, epochs=1), tmp_path, progress=quiet)
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint_of_another_run_is_refused(views, tmp_path) -> None:
    ss.train(encoder(), views, replace(SCHEDULE, epochs=1), tmp_path, progress=quiet)
    with pytest.raises(ConfigError, match="other settings"):
        ss.train(encoder(), views, replace(SCHEDULE, epochs=1, seed=2), tmp_path, progress=quiet)


def test_checkpoint_that_is_none_is_refused_in_plain_words(views, tmp_path) -> None:
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ConfigError, match=r"checkpoint.pt is no checkpoint that can be read; remove it"):
            ss.train(encoder(), views, SCHEDULE, tmp_path, progress=quiet)


def test_fewer_crops_than_a_batch_are_refused(views, tmp_path) -> None:
    with pytest.raises(ConfigError, match="do not fill a batch of 11"):
        ss.train(encoder(), views, replace(SCHEDULE, batch=11), tmp_path, progress=quiet)
    with pytest.raises(ConfigError, match="do not fill a batch of 1;"):
        ss.train(encoder(), views, replace(SCHEDULE, batch=1), tmp_path, progress=quiet)


def test_one_view_is_too_few(views, tmp_path) -> None:
    single = replace(views, tokens=views.tokens[:, :1], soft_masks=views.soft_masks[:, :1])
    with pytest.raises(ConfigError, match="two views"):
        ss.train(encoder(), single, SCHEDULE, tmp_path, progress=quiet)


def test_views_of_another_trunk_are_refused(views, tmp_path) -> None:
    with pytest.raises(ConfigError, match="cache them again"):
        ss.train(encoder(seed=7), views, SCHEDULE, tmp_path, progress=quiet)


def test_trained_guided_layers_do_not_outdate_the_views(views, tmp_path) -> None:
    vit = encoder()
    ss.train(vit, views, replace(SCHEDULE, epochs=1), tmp_path / "first", progress=quiet)
    assert ss.train(vit, views, replace(SCHEDULE, epochs=1), tmp_path / "second", progress=quiet)


def test_local_views_are_seen_by_the_student(views, tmp_path) -> None:
    local = cache_views(encoder(), *crops(), tmp_path, n_views=1, side_px=28, progress=quiet)
    assert local.tokens.shape == (10, 1, 5, 24)
    with_local, without = encoder(), encoder()
    once = replace(SCHEDULE, epochs=1)
    ss.train(with_local, views, once, tmp_path / "a", local=local, progress=quiet)
    ss.train(without, views, once, tmp_path / "b", progress=quiet)
    assert not same(guided_state(with_local), guided_state(without))
    fewer = replace(local, tokens=local.tokens[:5], soft_masks=local.soft_masks[:5])
    with pytest.raises(ConfigError, match="5 crops have local views and 10"):
        ss.train(encoder(), views, once, tmp_path / "c", local=fewer, progress=quiet)


def test_tokens_of_nan_stop_the_run(views, tmp_path) -> None:
    broken = np.array(views.tokens)
    broken[3, :, 0] = np.nan
    with pytest.raises(ConfigError, match="loss is nan"):
        ss.train(encoder(), replace(views, tokens=broken), replace(SCHEDULE, epochs=4), tmp_path, progress=quiet)


def test_curve_is_written_beside_the_checkpoint(views, tmp_path) -> None:
    curve = ss.train(encoder(), views, SCHEDULE, tmp_path, progress=quiet)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in curve]
    healthy = {"teacher_entropy", "marginal_entropy", "feature_std"}
    assert set(rows[0]) == {"epoch", "loss", *healthy, "seconds", "eta_seconds"}
    assert curve[0]["eta_seconds"] == pytest.approx(curve[0]["seconds"])
    assert curve[1]["eta_seconds"] == 0


def test_progress_counts_every_step(views, tmp_path) -> None:
    told: list[tuple[int, int]] = []
    ss.train(encoder(), views, SCHEDULE, tmp_path, progress=lambda what, done, total: told.append((done, total)))
    assert told == [(step, 4) for step in range(1, 5)]


def test_identical_crops_do_not_break_training(tmp_path) -> None:
    pixels, masks = (np.repeat(array[:1], 8, axis=0) for array in crops())
    alike = cache_views(encoder(), pixels, masks, tmp_path, augmentation=NOTHING, progress=quiet)
    curve = ss.train(encoder(), alike, SCHEDULE, tmp_path / "run", progress=quiet)
    assert curve[0]["feature_std"] == pytest.approx(0, abs=1e-4)  # and the curve says that nothing tells them apart
    assert all(math.isfinite(value) for row in curve for value in row.values())


# ---------------------------------------------------------------- parts


def test_loss_is_the_entropy_where_student_and_teacher_agree() -> None:
    cosines = torch.randn(5, 7)
    p = (cosines / 0.1).softmax(dim=-1)
    entropy = -(p * p.log()).sum(dim=-1).mean()
    assert torch.allclose(distillation_loss([cosines, cosines], [p, p], 0.1), entropy, atol=1e-5)


def test_loss_never_compares_a_view_with_itself() -> None:
    first, second = torch.randn(5, 7), torch.randn(5, 7)
    p, q = first.softmax(dim=-1), second.softmax(dim=-1)
    crossed = [-(q * first.log_softmax(-1)).sum(-1).mean(), -(p * second.log_softmax(-1)).sum(-1).mean()]
    assert torch.allclose(distillation_loss([first, second], [p, q], 1.0), sum(crossed) / 2)
    third = torch.randn(5, 7)
    crossed += [-(target * third.log_softmax(-1)).sum(-1).mean() for target in (p, q)]
    assert torch.allclose(distillation_loss([first, second, third], [p, q], 1.0), sum(crossed) / 4)


def test_indicators_tell_both_collapses_from_a_healthy_teacher() -> None:
    healthy, tokens = torch.eye(6), torch.nn.functional.normalize(torch.randn(6, 24), dim=-1)
    fine = collapse_indicators(healthy, tokens)
    assert fine["teacher_entropy"] == pytest.approx(0)
    assert fine["marginal_entropy"] == pytest.approx(1)
    assert fine["feature_std"] > 0.5
    uniform = collapse_indicators(torch.full((6, 6), 1 / 6), tokens[:1].expand(6, -1))
    assert uniform["teacher_entropy"] == pytest.approx(1)
    assert uniform["feature_std"] == pytest.approx(0, abs=1e-6)
    one_answer = collapse_indicators(torch.eye(6)[:1].expand(6, -1), tokens)
    assert one_answer["marginal_entropy"] == pytest.approx(0)


def test_teacher_momentum_rises_to_one() -> None:
    schedule = replace(SCHEDULE, teacher_momentum=0.9)
    values = [ss.teacher_momentum(step, 10, schedule) for step in range(11)]
    assert values[0] == pytest.approx(0.9)
    assert values[-1] == pytest.approx(1)
    assert values == sorted(values)


def test_teacher_temperature_is_linear_then_constant() -> None:
    schedule = replace(SCHEDULE, teacher_temperature=0.04, final_teacher_temperature=0.08, temperature_epochs=4)
    values = [ss.teacher_temperature(epoch, schedule) for epoch in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08])
    assert ss.teacher_temperature(0, replace(schedule, temperature_epochs=0)) == pytest.approx(0.08)


def test_learning_rate_warms_up_and_falls() -> None:
    schedule = replace(SCHEDULE, learning_rate=1.0, final_learning_rate=0.1, warm_up_steps=2)
    values = [ss.learning_rate(step, 10, schedule) for step in range(11)]
    assert values[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert values[-1] == pytest.approx(0.1)
    assert values[2:] == sorted(values[2:], reverse=True)


# ---------------------------------------------------------------- files


def test_saved_stage_b_comes_back_in_half_precision(views, tmp_path) -> None:
    vit = encoder()
    ss.train(vit, views, SCHEDULE, tmp_path, progress=quiet)
    ss.save(vit, tmp_path / "b.safetensors", provenance={"seed": 1})
    loaded = encoder()
    assert ss.load(tmp_path / "b.safetensors", loaded) == {"seed": 1}
    for name, value in vit.guided.state_dict().items():
        assert torch.equal(loaded.guided.state_dict()[name], value.half().float())
    assert (tmp_path / "b.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in vit.guided.parameters()) + 4096


def test_stage_b_of_another_form_is_refused(tmp_path) -> None:
    ss.save(encoder(), tmp_path / "b.safetensors", provenance={})
    other = EncoderForm(trunk="tiny", input_px=56, pooled_layers=(0,), guided_layers=3, second_trunk="")
    with pytest.raises(ConfigError, match="another form"):
        ss.load(tmp_path / "b.safetensors", SmgVit(trunk(), other))


def test_stage_b_of_another_trunk_is_refused(tmp_path) -> None:
    ss.save(encoder(), tmp_path / "b.safetensors", provenance={})
    with pytest.raises(ConfigError, match="other frozen layers"):
        ss.load(tmp_path / "b.safetensors", encoder(seed=7))


def test_absent_and_foreign_files_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no encoder weights at"):
        ss.load(tmp_path / "absent.safetensors", encoder())
    Path(tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ConfigError, match="holds no encoder"):
        ss.load(tmp_path / "text.safetensors", encoder())
