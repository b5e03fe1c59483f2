import numpy as np
import pytest
import torch

from semwatch.errors import ConfigError
from semwatch_training.head import HeadFit, fit_head, load_head, save_head

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


def test_too_few_samples_or_classes_are_refused_by_name() -> None:
    features, labels = blobs(60, 0)
    with pytest.raises(ConfigError, match="two classes"):
        fit_head(features, ["void"] * 60, FIT)
    with pytest.raises(ConfigError, match="'rare': 1"):
        fit_head(features, [*labels[:-1], "rare"], FIT)


def test_separable_classes_are_named() -> None:
    head = fit_head(*blobs(300, 0), FIT)
    features, labels = blobs(300, 1)
    logits, p_values = judge(head, features)
    assert head.labels == CLASSES
    assert np.mean([CLASSES[k] == label for k, label in zip(logits.argmax(1), labels, strict=True)]) > 0.97
    assert p_values.min() > 0
    assert p_values.max() <= 1


def test_two_classes_give_two_logits() -> None:
    features, labels = blobs(300, 0)
    two = [i for i, label in enumerate(labels) if label != "void"]
    head = fit_head(features[two], [labels[i] for i in two], FIT)
    logits, _ = judge(head, features[two])
    assert logits.shape == (200, 2)
    assert np.mean(logits.argmax(1) == [head.labels.index(labels[i]) for i in two]) > 0.97


@pytest.mark.parametrize("significance", [0.05, 0.2])
def test_conformal_promise_holds_on_fresh_members(significance: float) -> None:
    """At most the stated share of true members does not fit its class; mean of 20 fits, 3 standard errors."""
    shares = []
    for seed in range(20):
        head = fit_head(*blobs(240, seed), FIT)
        features, labels = blobs(600, 1000 + seed)
        own = judge(head, features)[1][np.arange(600), [CLASSES.index(label) for label in labels]]
        shares.append(np.mean(own <= significance))
    assert np.mean(shares) <= significance + 3 * np.std(shares) / 20**0.5
    assert np.mean(shares) > significance / 3  # and it is not idle


def test_a_class_never_seen_fits_nothing() -> None:
    head = fit_head(*blobs(300, 0), FIT)
    stranger = np.random.default_rng(5).normal(size=(100, 24)).astype(np.float32)
    stranger[:, 10] += 8
    assert np.mean(judge(head, stranger)[1].max(axis=1) <= 0.05) > 0.95


def test_p_values_read_frozen_features_only() -> None:
    head = fit_head(*blobs(300, 0), FIT)
    features, _ = blobs(30, 1)
    moved = features.copy()
    moved[:, FIT.frozen_width :] += 100
    assert np.array_equal(judge(head, features)[1], judge(head, moved)[1])


def test_same_seed_same_head() -> None:
    first, second = (fit_head(*blobs(120, 0), FIT).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


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
