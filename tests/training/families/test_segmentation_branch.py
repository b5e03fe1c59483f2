import csv
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from progress import InterruptedByTest, RecordedProgress
from semwatch.errors import ConfigError
from semwatch.models.model_repository import Meta, Tensor
from semwatch.system import clock
from semwatch_training.data import backgrounds, datasets, pattern_defects
from semwatch_training.families.branch.branch_views import synthetic_views, vary, views
from semwatch_training.families.branch.segmentation_branch import (
    BranchForm,
    Evidence,
    SegmentationBranch,
    branch_loss,
    image_score,
    near_pairs,
    self_matching,
    standardise,
)
from semwatch_training.families.branch.train_branch import (
    BranchSchedule,
    Samples,
    cache_samples,
    rate,
    train_branch,
    unpacked,
)
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import DetectorForm, NIDetector
from semwatch_training.publishing import export
from semwatch_training.synthetic import render
from semwatch_training.synthetic.shapes import NoRoom
from semwatch_training.trunks.efficientnet import EfficientNet
from tiny_models import DETECTOR, shallow, trunk

FORM = BranchForm(input_px=64, projection=8, width=8, dilations=(1, 2))
SCHEDULE = BranchSchedule(steps=60, batch=4, warm_up_steps=5, learning_rate=5e-3)


@pytest.fixture(scope="module")
def convolutional() -> EfficientNet:
    return shallow()


# ---- what the branch reads ----


def test_constant_channel_is_standardised_to_zero() -> None:
    assert torch.equal(standardise(torch.full((1, 2, 4, 4), 7.0)), torch.zeros(1, 2, 4, 4))


def test_standardised_channels_do_not_know_brightness_or_contrast() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(standardise(5 * x + 3), standardise(x), atol=1e-3)


def test_near_pairs_are_those_within_reach_along_both_axes() -> None:
    near = near_pairs(4, 1)
    assert near.shape == (16, 16)
    assert near[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert torch.equal(near, near.T)
    assert near_pairs(3, 0).equal(torch.eye(9, dtype=torch.bool))


def test_nearest_like_is_that_of_a_plain_loop() -> None:
    x, near = torch.randn(2, 5, 4, 4), near_pairs(4, 1)
    cells = x.flatten(2).transpose(1, 2)
    d = (cells[:, :, None] - cells[:, None, :]).square().mean(dim=-1)
    expected = torch.stack([torch.stack([d[b, i][~near[i]].min() for i in range(16)]) for b in range(2)])
    found = self_matching(x, near)
    assert torch.allclose(found.flatten(1), expected, atol=1e-5)
    both = self_matching(x, near, temperature=0.05)
    assert torch.equal(both[:, :1], found)
    assert (both[:, 1] >= both[:, 0] - 1e-5).all()  # a soft minimum of a mean lies above the minimum


def test_a_cell_unlike_all_others_stands_out_in_a_pattern_that_repeats() -> None:
    x = torch.randn(1, 6, 2, 2).repeat(1, 1, 6, 6)
    x[0, :, 5, 7] += 3
    distance = self_matching(x, near_pairs(12, 2))[0, 0]
    assert distance[5, 7] > 3
    assert torch.cat((distance[:5].flatten(), distance[6:].flatten())).max() < 1e-4


# ---- the branch ----


def test_logits_have_the_grid_and_are_finite_on_black_and_white(convolutional) -> None:
    evidence, branch = Evidence(convolutional, FORM), SegmentationBranch(FORM).eval()
    images = torch.stack((torch.zeros(64, 64), torch.full((64, 64), 255))).to(torch.uint8)
    parts = evidence(images)
    assert [tuple(part.shape[1:]) for part in parts] == list(FORM.shapes)
    logits = branch(*parts)
    assert logits.shape == (2, 8, 8)
    assert torch.isfinite(logits).all()
    assert image_score(logits, 3).shape == (2,)


def test_image_score_is_that_of_the_defect_and_not_of_its_place() -> None:
    logits = torch.full((3, 8, 8), -4.0)
    logits[1, 2:5, 2:5] = 3.0
    logits[2, 4:7, 1:4] = 3.0
    scores = image_score(logits, 3)
    assert scores.tolist() == pytest.approx([-4.0, 3.0, 3.0])


def test_loss_is_small_where_the_branch_is_right_and_large_where_it_is_wrong() -> None:
    cover = torch.zeros(2, 8, 8)
    cover[0, 2:4, 2:4] = 1
    right = torch.where(cover > 0, 9.0, -9.0)
    assert branch_loss(right, cover).item() < 0.05
    assert branch_loss(-right, cover).item() > 1
    zero = torch.zeros(2, 8, 8, requires_grad=True)
    branch_loss(zero, torch.zeros(2, 8, 8)).backward()  # a batch without a defect
    assert torch.isfinite(zero.grad).all()


# ---- what it is trained on ----


def pattern(seed: int, size: int = 64) -> np.ndarray:
    return next(backgrounds.backgrounds(1, seed=seed, size_px=size))


@pytest.mark.parametrize("kind", sorted(set(backgrounds.KINDS)))
def test_backgrounds_have_contrast_and_come_back_by_their_seed(kind) -> None:
    first, again, other = (backgrounds.background(kind, np.random.default_rng(seed), 96) for seed in (1, 1, 2))
    assert (first.shape, first.dtype) == ((96, 96), np.uint8)
    assert first.std() > 5
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_background_is_drawn_unasked() -> None:
    assert list(backgrounds.backgrounds(0, seed=1, size_px=64)) == []


@pytest.mark.parametrize("kind", pattern_defects.KINDS)
def test_distortion_changes_what_its_mask_covers_and_little_else(kind) -> None:
    image, seen = pattern(3, 128), 0
    for seed in range(12):
        planted = pattern_defects.distort(image, np.random.default_rng(seed), kind=kind)
        again = pattern_defects.distort(image, np.random.default_rng(seed), kind=kind)
        assert np.array_equal(planted.pixels, again.pixels)
        difference = np.abs(planted.pixels.astype(int) - image)
        assert planted.mask.shape == image.shape
        if planted.mask.any():
            seen += 1
            assert difference[planted.mask].mean() > 4 * difference[~planted.mask].mean()
    assert seen >= 6


def test_planted_defect_is_visible_and_not_most_of_the_image() -> None:
    for seed in range(20):
        planted = pattern_defects.plant(pattern(seed, 96), np.random.default_rng(seed))
        assert planted.mask.sum() >= pattern_defects.AREA_PX or planted.kind == "texture"
        assert not np.array_equal(planted.pixels, pattern(seed, 96))


def test_black_image_still_gets_a_defect() -> None:
    planted = pattern_defects.plant(np.zeros((64, 64), np.uint8), np.random.default_rng(0))
    assert planted.mask.any()
    assert planted.pixels[planted.mask].max() > 0


def test_unfit_input_to_a_distortion_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="no pattern defect is called 'dent'; choose one of swell"):
        pattern_defects.distort(pattern(0), rng, kind="dent")
    for unfit in (pattern(0).astype(np.float32), np.zeros((4, 64), np.uint8), np.zeros((64, 64, 3), np.uint8)):
        with pytest.raises(ConfigError, match="uint8 gray image of at least 16 px"):
            pattern_defects.distort(unfit, rng, kind="warp")


def test_views_are_each_normal_twice_then_the_labelled_ones() -> None:
    assert list(views([], [], seed=0)) == []
    mask = np.zeros((64, 64), bool)
    mask[10:20, 30:50] = True
    found = list(views([pattern(0), pattern(1)], [(pattern(2), mask)], seed=0))
    assert [m.any() for _, m in found] == [False, True, False, True, True]
    assert found[-1][1].sum() == mask.sum()
    again = list(views([pattern(0), pattern(1)], [(pattern(2), mask)], seed=0))
    assert all(
        np.array_equal(a, b) for one, two in zip(found, again, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_synthetic_views_are_as_many_as_said_and_of_the_stages_asked_for(monkeypatch) -> None:
    drawn: list[tuple[str, int, tuple[str, ...]]] = []

    def noted(stage: str, *, seed: int, size_hw: tuple[int, int], defects: tuple[str, ...]):
        drawn.append((stage, seed, defects))
        if len(drawn) == 1:
            raise NoRoom
        return render(stage, seed=seed, size_hw=(64, 64), defects=defects)

    monkeypatch.setattr(datasets, "render", noted)
    found = list(synthetic_views(2, 1, 3, seed=0, size_px=48, first_seed=100, stages=("DEP",)))
    assert [mask.any() for _, mask in found] == [False, True] * 3 + [True] * 3
    assert all(image.shape == mask.shape == (48, 48) for image, mask in found)
    assert {stage for stage, _, _ in drawn} == {"DEP"}
    assert [seed for _, seed, _ in drawn] == [100, 102, 101, 500_100, 500_101, 500_102]  # 102: there was no room in 100
    assert [labels for _, _, labels in drawn[3:]] == [("bubble",), ("pinhole",), ("bubble",)]


def test_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="give one of the same size"):
        list(views([], [(pattern(0), np.zeros((32, 32), bool))], seed=0))


def test_a_mask_turns_with_its_image() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[4:20, 40:60] = 200
    for seed in range(20):
        turned, mask = vary(image, image > 0, np.random.default_rng(seed))
        inside, outside = turned[mask].mean(), turned[~mask].mean()
        assert abs(inside - outside) > 60


# ---- the cache and the loop ----


def pairs(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    mask = np.zeros((64, 64), bool)
    mask[8:24, 8:20] = True
    return [(pattern(i), mask if i % 2 else np.zeros((64, 64), bool)) for i in range(n)]


def test_cached_evidence_is_what_the_trunk_gives_and_is_reused(tmp_path, convolutional) -> None:
    evidence, progress = Evidence(convolutional, FORM), RecordedProgress()
    samples = cache_samples(evidence, pairs(2), 2, tmp_path / "new", progress=progress)
    with torch.no_grad():
        expected = evidence(torch.from_numpy(np.stack([image for image, _ in pairs(2)])))
    for part, other in zip(unpacked(np.asarray(samples.evidence), FORM), expected, strict=True):
        assert torch.allclose(part, other, rtol=2e-3, atol=2e-2)
    assert samples.cover[0].max() == 0
    assert samples.cover[1, 1].tolist() == [0, 255, 128, 0, 0, 0, 0, 0]
    again = cache_samples(evidence, pairs(2), 2, tmp_path / "new", progress=progress)
    assert progress.steps == [(1, 2), (2, 2)]
    assert np.array_equal(again.evidence, samples.evidence)
    assert np.array_equal(again.cover, samples.cover)


@pytest.mark.parametrize("content", ["shorter", "cut off", "foreign", "cover gone"])
def test_cache_that_does_not_fit_is_rebuilt(tmp_path, convolutional, content) -> None:
    evidence = Evidence(convolutional, FORM)
    cache_samples(evidence, pairs(1 if content == "shorter" else 2), 1 if content == "shorter" else 2, tmp_path,
                  progress=RecordedProgress())  # fmt: skip
    path = tmp_path / "evidence.npy"
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:-10])
    elif content == "foreign":
        path.write_bytes(b"no array")
    elif content == "cover gone":
        (tmp_path / "cover.npy").unlink()
    progress = RecordedProgress()
    samples = cache_samples(evidence, pairs(2), 2, tmp_path, progress=progress)
    assert (len(samples.evidence), len(progress.steps)) == (2, 2)


def toy_samples(n: int = 16) -> Samples:
    """Evidence in which a defect is a patch of ones."""
    rng = np.random.default_rng(0)
    cover = np.zeros((n, 8, 8), np.uint8)
    rows = []
    for i in range(n):
        parts = [rng.normal(size=shape) for shape in FORM.shapes]
        parts[3] = np.abs(parts[3])
        if i % 2:
            y, x = rng.integers(0, 6, 2)
            cover[i, y : y + 2, x : x + 2] = 255
            parts[1][:, y : y + 2, x : x + 2] += 4
        rows.append(np.concatenate([part.ravel() for part in parts]))
    return Samples(np.stack(rows).astype(np.float16), cover)


def fresh(seed: int = 5) -> SegmentationBranch:
    torch.manual_seed(seed)
    return SegmentationBranch(FORM)


def same(a: SegmentationBranch, b: SegmentationBranch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_finds_the_planted_patches_and_writes_its_curve(tmp_path) -> None:
    samples, branch, progress = toy_samples(), fresh(), RecordedProgress()
    curve = train_branch(branch, samples, SCHEDULE, tmp_path, progress=progress)
    assert [row["step"] for row in curve] == [50, 60]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[0]["eta_seconds"] > curve[-1]["eta_seconds"] == 0
    assert progress.steps == [(step, 60) for step in range(1, 61)]
    with (tmp_path / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in curve]
    with torch.no_grad():
        scores = image_score(branch(*unpacked(samples.evidence, FORM)), 3)
    assert scores[1::2].min() > scores[::2].max()


def test_interrupted_training_ends_with_the_very_weights_of_an_uninterrupted_one(tmp_path) -> None:
    samples, whole = toy_samples(), fresh()
    train_branch(whole, samples, SCHEDULE, tmp_path / "whole", progress=RecordedProgress())
    with pytest.raises(InterruptedByTest):
        train_branch(fresh(), samples, SCHEDULE, tmp_path / "cut", progress=RecordedProgress(interrupt_at=55))
    resumed, progress = fresh(99), RecordedProgress()
    train_branch(resumed, samples, SCHEDULE, tmp_path / "cut", progress=progress)
    assert progress.steps[0] == (51, 60)
    assert same(whole, resumed)
    again = fresh(7)
    train_branch(again, samples, SCHEDULE, tmp_path / "cut", progress=RecordedProgress())  # finished: nothing to do
    assert same(whole, again)


def test_checkpoint_of_other_settings_is_refused(tmp_path) -> None:
    short = replace(SCHEDULE, steps=1)
    train_branch(fresh(), toy_samples(), short, tmp_path, progress=RecordedProgress())
    for samples, schedule in ((toy_samples(), SCHEDULE), (toy_samples(14), short)):
        with pytest.raises(ConfigError, match="other settings; remove it or give another --out"):
            train_branch(fresh(), samples, schedule, tmp_path, progress=RecordedProgress())


@pytest.mark.parametrize(("cover", "kind"), [(0, "normal"), (255, "defective")])
def test_images_of_one_kind_only_are_refused(tmp_path, cover, kind) -> None:
    samples = toy_samples()
    only = Samples(samples.evidence, np.full_like(samples.cover, cover))
    with pytest.raises(ConfigError, match=f"all 16 training images are {kind}"):
        train_branch(fresh(), only, SCHEDULE, tmp_path, progress=RecordedProgress())


def test_evidence_that_is_not_finite_is_refused(tmp_path) -> None:
    samples = toy_samples()
    samples.evidence[:] = np.nan
    with pytest.raises(ConfigError, match="not finite; the cached evidence is damaged"):
        train_branch(fresh(), samples, SCHEDULE, tmp_path, progress=RecordedProgress())


def test_rate_warms_up_and_falls() -> None:
    rates = [rate(step, BranchSchedule(steps=100, warm_up_steps=10)) for step in range(100)]
    assert rates[0] < rates[5] < rates[9]
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[-1] < 0.05 * max(rates)


# ---- in the detector ----


def detector_with_branch(evidence: str, **changes: object) -> NIDetector:
    torch.manual_seed(0)
    return NIDetector(replace(DETECTOR, evidence=evidence, branch=replace(FORM, input_px=112), **changes))


def gray_images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 112, 112), dtype=torch.uint8)


@pytest.mark.parametrize("evidence", ["branch", "both"])
def test_detector_with_a_branch_comes_back_from_its_file(tmp_path, convolutional, evidence) -> None:
    detector, path = detector_with_branch(evidence), tmp_path / "detector.safetensors"
    train_detector.save(detector, path, normal_scores=[0.1], provenance={})
    loaded, _, _ = train_detector.load(path)
    assert loaded.form == detector.form
    assert any(name.startswith("extractor") for name in loaded.state_dict()) == (evidence == "both")
    graph = train_detector.with_trunk(trunk(), loaded, convolutional)
    with torch.no_grad():
        score, raw = graph(gray_images(3))
    assert score.shape == (3, graph.side, graph.side) == (3, 14, 14)
    assert 0 <= score.min() < score.max() <= 1
    assert 0 <= raw.min() < raw.max() <= 1


def test_residual_counts_in_both_and_not_at_weight_zero(convolutional) -> None:
    images, scores = gray_images(2), {}
    for weight in (0.0, 0.5):
        detector = detector_with_branch("both")
        detector.form = replace(detector.form, residual_weight=weight)
        scores[weight] = train_detector.with_trunk(trunk(), detector, convolutional)(images)[0]
    alone = detector_with_branch("branch")
    alone.branch.load_state_dict(detector.branch.state_dict())
    assert torch.equal(train_detector.with_trunk(trunk(), alone, convolutional)(images)[0], scores[0.0])
    assert not torch.allclose(scores[0.0], scores[0.5])


def test_graph_with_both_kinds_of_evidence_exports_with_a_dynamic_batch(tmp_path, convolutional) -> None:
    detector = detector_with_branch("both", layers=(0, 1))  # every layer takes torch a second more
    graph = train_detector.with_trunk(trunk(), detector, convolutional)
    outputs = {
        "score_map": Tensor(dtype="float32", shape=(graph.side, graph.side)),
        "raw_score": Tensor(dtype="float32", shape=()),
    }
    meta = Meta(
        model="detector",
        created_utc=clock.utc_now(),
        inputs={"image": Tensor(dtype="uint8", shape=(112, 112))},
        outputs=outputs,
        normal_scores=(0.1,),
        provenance={},
    )
    export.to_onnx(graph, meta, tmp_path / "detector.onnx")
    batches = [export.random_inputs(meta, batch=batch, seed=batch) for batch in (1, 3)]
    assert export.parity(graph, meta, tmp_path / "detector.onnx", batches).worst < export.MAX_RELATIVE_DIFFERENCE


def test_form_and_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="'branch' needs a branch"):
        DetectorForm(evidence="branch")
    with pytest.raises(ConfigError, match="'residual' has no branch"):
        DetectorForm(branch=FORM)
    detector = NIDetector(replace(DETECTOR, evidence="branch", branch=replace(FORM, input_px=112)))
    with pytest.raises(ConfigError, match="hand in its trunk, efficientnet_lite2"):
        train_detector.with_trunk(trunk(), detector)
    with pytest.raises(ConfigError, match="'residual' looks at tiny; hand it in"):
        train_detector.with_trunk(None, NIDetector(DETECTOR))


def test_branch_alone_needs_no_vit(convolutional) -> None:
    detector, images = detector_with_branch("branch"), gray_images(1)
    without, beside = (train_detector.with_trunk(vit, detector, convolutional)(images)[0] for vit in (None, trunk()))
    assert torch.equal(without, beside)
