import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semwatch.errors import ConfigError
from semwatch.models import model_repository
from semwatch.models.model_repository import Meta, Tensor
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import class_scores, load_head, p_values, save_head
from semwatch_training.publishing import export

FIT = HeadFit(frozen_width=20, components=12)
CLASSES = ("bridge", "particle", "void")


def blobs(n: int, seed: int, shift: float = 5.0) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 24)).astype(np.float32)
    labels = [CLASSES[i % 3] for i in range(n)]
    for row, label in zip(features, labels, strict=True):
        row[CLASSES.index(label)] += shift
    return features, labels


def judge(head, features):
    with torch.no_grad():
        return tuple(x.numpy() for x in head(torch.from_numpy(features)))


def strangers(n: int, seed: int = 5) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(n, 24)).astype(np.float32)
    features[:, 10] += 8
    return features


def exact_p_values(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    return (1 + (calibration[None] >= scores[:, None]).sum(axis=1)) / (1 + len(calibration))


def test_empty_batch_gives_empty_answers() -> None:
    head = fit_head(*blobs(60, 0), FIT)
    logits, p = judge(head, np.zeros((0, 24), np.float32))
    assert logits.shape == p.shape == (0, 3)


def test_too_few_samples_or_classes_are_refused_by_name() -> None:
    features, labels = blobs(60, 0)
    with pytest.raises(ConfigError, match="two classes"):
        fit_head(features, ["void"] * 60, FIT)
    with pytest.raises(ConfigError, match="'rare': 4"):
        fit_head(features, [*labels[:-4], *["rare"] * 4], FIT)
    with pytest.raises(ConfigError, match="40 in all; got 39"):
        fit_head(features[:39], labels[:39], FIT)
    with pytest.raises(ConfigError, match="got 0 samples of 0 classes"):
        fit_head(np.zeros((0, 24), np.float32), [], FIT)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_and_counted(bad: float) -> None:
    features, labels = blobs(60, 0)
    features[[3, 7], 2] = bad
    with pytest.raises(ConfigError, match="2 of 60 rows"):
        fit_head(features, labels, FIT)


def test_rows_labels_and_images_of_different_number_are_refused() -> None:
    features, labels = blobs(60, 0)
    with pytest.raises(ConfigError, match="59 labels"):
        fit_head(features, labels[:-1], FIT)
    with pytest.raises(ConfigError, match="59 image numbers"):
        fit_head(features, labels, FIT, images=range(59))


def test_crops_of_a_single_image_are_refused() -> None:
    features, labels = blobs(60, 0)
    with pytest.raises(ConfigError, match="one image"):
        fit_head(features, labels, FIT, images=[7] * 60)


def test_one_image_with_most_crops_still_gives_finite_answers() -> None:
    features, labels = blobs(60, 0)
    head = fit_head(features, labels, FIT, images=[0] * 56 + [1, 2, 3, 4])
    assert all(np.isfinite(values).all() for values in judge(head, features))


def test_samples_that_are_all_the_same_give_finite_answers() -> None:
    features = np.ones((60, 24), np.float32)
    head = fit_head(features, [CLASSES[i % 2] for i in range(60)], FIT)
    for values in judge(head, np.vstack([features[:2], strangers(2)])):
        assert np.isfinite(values).all()
    _, p = judge(head, np.vstack([features[:1], strangers(1)]))
    assert p[0].max() == 1
    assert p[1].max() < 0.05


def test_more_neighbours_than_samples_of_a_class_uses_them_all() -> None:
    stored = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    scores = class_scores(torch.tensor([[0.0, 1.0]]), stored, ((0, 2), (2, 3)), neighbours=5)
    first = [np.sqrt((x**2 + 1) * 2) for x in (1, 2)]  # unit vectors at a right angle: squared distance 2
    assert torch.allclose(scores, torch.tensor([[np.mean(first), 0.0]], dtype=torch.float32), atol=1e-6)


def test_separable_classes_are_named() -> None:
    head = fit_head(*blobs(300, 0), FIT)
    features, labels = blobs(300, 1)
    logits, p = judge(head, features)
    truth = np.array([CLASSES.index(label) for label in labels])
    assert head.labels == CLASSES
    assert np.mean(logits.argmax(1) == truth) > 0.97
    assert np.mean(p.argmax(1) == truth) > 0.97
    assert p.min() > 0
    assert p.max() <= 1


def test_two_classes_give_two_logits() -> None:
    features, labels = blobs(300, 0)
    two = [i for i, label in enumerate(labels) if label != "void"]
    head = fit_head(features[two], [labels[i] for i in two], FIT)
    logits, _ = judge(head, features[two])
    assert logits.shape == (200, 2)
    assert np.mean(logits.argmax(1) == [head.labels.index(labels[i]) for i in two]) > 0.97


@pytest.mark.parametrize("significance", [0.05, 0.2])
def test_stated_share_of_fresh_known_defects_fits_nothing(significance: float) -> None:
    """From both sides; mean of 20 fits, 3 standard errors. Metrics of fewer samples make the rule a little shy."""
    shares = []
    for seed in range(20):
        head = fit_head(*blobs(240, seed), FIT)
        shares.append(np.mean(judge(head, blobs(600, 1000 + seed)[0])[1].max(axis=1) <= significance))
    error = 3 * np.std(shares) / 20**0.5
    assert np.mean(shares) <= significance + error
    assert np.mean(shares) >= 0.7 * significance - error


def test_crops_of_one_image_do_not_vouch_for_each_other() -> None:
    """Six near-copies an image: judged apart, each looks closer to known defects than the next image will be."""
    rng = np.random.default_rng(0)
    features, labels = blobs(60, 0)
    copies = np.repeat(features, 6, axis=0) + rng.normal(scale=0.01, size=(360, 24)).astype(np.float32)
    names, fresh = np.repeat(labels, 6).tolist(), blobs(300, 1)[0]
    apart = fit_head(copies, names, FIT)
    together = fit_head(copies, names, FIT, images=np.repeat(np.arange(60), 6).tolist())
    assert np.mean(judge(apart, fresh)[1].max(axis=1) <= 0.05) > 0.5
    assert np.mean(judge(together, fresh)[1].max(axis=1) <= 0.05) < 0.1


def test_a_class_never_seen_fits_nothing() -> None:
    head = fit_head(*blobs(300, 0), FIT)
    assert np.mean(judge(head, strangers(100))[1].max(axis=1) <= 0.05) > 0.95


def test_class_of_five_samples_gets_p_values_as_fine_as_the_others() -> None:
    features, labels = blobs(300, 0)
    few = [i for i, label in enumerate(labels) if label != "void"] + [i for i, x in enumerate(labels) if x == "void"][
        :5
    ]
    head = fit_head(features[few], [labels[i] for i in few], FIT)
    fresh, truth = blobs(300, 1)
    _, p = judge(head, fresh)
    is_void = np.array(truth) == "void"
    assert np.mean(p[is_void].argmax(axis=1) == 2) > 0.9
    assert judge(head, strangers(100))[1][:, 2].max() < 0.05  # 1 / (5 + 1) would fit everything


def test_p_value_of_hand_made_scores() -> None:
    p = p_values(torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(p, torch.tensor([1.0, 1.0, 0.75, 0.625, 0.5, 0.375]))


@given(
    st.lists(st.floats(0, 10, width=16), min_size=1, max_size=30),
    st.lists(st.floats(0, 20, width=16), min_size=1, max_size=30),
)
def test_p_values_are_never_below_the_exact_ones_and_less_than_a_step_above(cal: list[float], new: list[float]) -> None:
    calibration, scores = np.sort(np.array(cal, np.float32)), np.array(sorted(new), np.float32)
    p = p_values(torch.from_numpy(scores), torch.from_numpy(calibration)).numpy()
    exact = exact_p_values(scores, calibration)
    assert (p >= exact - 1e-6).all()
    assert (p <= exact + 1 / (1 + len(calibration)) + 1e-6).all()
    assert (np.diff(p) <= 1e-6).all()


def test_strangers_beyond_every_known_defect_keep_their_order() -> None:
    p = p_values(torch.tensor([4.0, 5.0, 50.0, 500.0]), torch.linspace(0, 3, 1000)).numpy()
    assert (np.diff(p) < 0).all()
    assert 1 / 1001 < p[-1] < p[0] < 2 / 1001


def test_p_values_read_frozen_features_only() -> None:
    head = fit_head(*blobs(300, 0), FIT)
    features, _ = blobs(30, 1)
    moved = features.copy()
    moved[:, FIT.frozen_width :] += 100
    assert np.array_equal(judge(head, features)[1], judge(head, moved)[1])


def test_head_carries_no_more_samples_than_allowed_and_thins_the_largest_class() -> None:
    features, labels = blobs(300, 0)
    labels = ["bridge" if label == "particle" else label for label in labels]
    head = fit_head(features, labels, HeadFit(frozen_width=20, components=12, max_stored=180))
    assert head.state_dict()["n_stored"].tolist() == [90, 90]
    assert len(head.state_dict()["calibration"]) == 300
    assert np.mean(judge(head, blobs(300, 1)[0])[1].max(axis=1) <= 0.2) < 0.3


def test_more_features_than_samples_are_whitened_all_the_same() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(60, 200)).astype(np.float32)
    wide[::2, :20] += 3
    head = fit_head(wide, ["bridge", "void"] * 30, HeadFit(frozen_width=200))
    p = judge(head, wide)[1]
    assert np.isfinite(p).all()
    assert np.mean(p.argmax(axis=1) == np.arange(60) % 2) == 1


def test_same_seed_same_head() -> None:
    first, second = (fit_head(*blobs(120, 0), FIT).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_exported_head_judges_any_batch_as_torch_does(tmp_path) -> None:
    head = fit_head(*blobs(120, 0), FIT)
    meta = Meta(
        model="head",
        created_utc="2026-01-01T00:00:00Z",
        inputs={"features": Tensor(dtype="float32", shape=(24,))},
        outputs={"logits": Tensor(dtype="float32", shape=(3,)), "p_values": Tensor(dtype="float32", shape=(3,))},
        labels=head.labels,
    )
    export.to_onnx(head.eval(), meta, tmp_path / model_repository.WEIGHTS)
    batches = [{"features": np.vstack([blobs(n, n)[0], strangers(n)])} for n in (1, 40)]
    assert export.parity(head, meta, tmp_path / model_repository.WEIGHTS, batches).worst < 1e-3


def test_saved_head_judges_alike_and_foreign_file_is_refused(tmp_path) -> None:
    head = fit_head(*blobs(300, 0), FIT)
    save_head(head, tmp_path / "head.safetensors", encoder_form="form", provenance={"seed": 0})
    loaded, form, provenance = load_head(tmp_path / "head.safetensors")
    assert (form, provenance, loaded.labels) == ("form", {"seed": 0}, head.labels)
    features, _ = blobs(60, 1)
    for before, after in zip(judge(head, features), judge(loaded, features), strict=True):
        assert np.abs(before - after).max() < 0.05  # weights travel as fp16
    with pytest.raises(ConfigError, match="no head weights at"):
        load_head(tmp_path / "absent")
    (tmp_path / "noise").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="holds no head of this release"):
        load_head(tmp_path / "noise")
