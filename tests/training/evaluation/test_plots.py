from io import BytesIO

import cv2
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from semwatch.errors import ConfigError
from semwatch_training.evaluation.feature_map import MAX_POINTS, embed, feature_map
from semwatch_training.evaluation.plots import (
    NOT_DECIDED,
    Example,
    KCurve,
    confusion,
    examples,
    k_curves,
    purity_contribution,
    roc,
)
from semwatch_training.metrics.adc_metrics import PurityCurve

TRUTH = np.array([False, False, True, True])


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def pixels(figure: Figure) -> np.ndarray:
    """Draw, as the report does: anything matplotlib warns of fails here."""
    content = BytesIO()
    figure.savefig(content, format="png")
    return cv2.imdecode(np.frombuffer(content.getvalue(), np.uint8), cv2.IMREAD_COLOR)


def an_example(*, image_hw: tuple[int, int] = (40, 60), found: bool = True, score: float = 1.0) -> Example:
    mask, truth = np.zeros((16, 16), bool), np.zeros(image_hw, bool)
    mask[4:8, 4:8], truth[10:20, 15:30] = found, True
    score_map = np.zeros((8, 8), np.float32)
    score_map[2:4, 2:4] = score
    return Example("pit", np.full(image_hw, 90, np.uint8), score_map, mask, truth)


def test_nothing_to_draw_is_refused() -> None:
    for draw in (roc, k_curves, purity_contribution, examples):
        with pytest.raises(ConfigError, match="nothing to draw"):
            draw({})
    with pytest.raises(ConfigError, match="one label and one verdict"):
        confusion([], [])


def test_matplotlibs_settings_stay_as_they_were() -> None:
    before = dict(mpl.rcParams)
    pixels(roc({"a": (np.arange(4.0), TRUTH)}))
    assert dict(mpl.rcParams) == before


def test_roc_names_the_best_engine_first_with_its_auroc() -> None:
    figure = roc({"poor": (np.array([1.0, 3, 2, 4]), TRUTH), "good": (np.arange(4.0), TRUTH)})
    assert legend(figure) == ["1.000  good", "0.750  poor"]
    assert pixels(figure).std() > 1


def test_names_are_words_not_formulas() -> None:
    assert pixels(roc({r"$\frac{1}$": (np.arange(4.0), TRUTH)})).std() > 1


def test_roc_of_one_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs both kinds"):
        roc({"a": (np.arange(2.0), np.zeros(2, bool))})


def test_confusion_counts_and_keeps_the_undecided_apart() -> None:
    figure = confusion(["pit", "pit", "arc", "arc"], ["pit", None, "pit", "dust"])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["arc", "dust", "pit", NOT_DECIDED]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["arc (2)", "pit (2)"]
    cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    assert cells == {(0, 1): "1", (0, 2): "1", (1, 2): "1", (1, 3): "1"}
    assert pixels(figure).std() > 1


def test_confusion_of_decided_verdicts_has_no_column_for_undecided_ones() -> None:
    figure = confusion(["pit"], ["pit"])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["pit"]
    assert pixels(figure).std() > 1


def test_curves_of_k_name_choice_interval_and_truth() -> None:
    rules = {"consensus": KCurve([2, 3, 4], [0.1, 0.9, 0.2], 3), "flat": KCurve([2, 3, 4], [1, 1, 1], 2)}
    figure = k_curves(rules, interval=(3, 4), truth=3)
    assert legend(figure) == ["interval 3–4", "truth 3", "consensus: 3", "flat: 2"]
    assert pixels(figure).std() > 1
    assert legend(k_curves(rules)) == ["consensus: 3", "flat: 2"]


@pytest.mark.parametrize(
    "curve",
    [KCurve([], [], 2), KCurve([2, 3], [1.0], 2), KCurve([2, 3], [1, 2], 4), KCurve([2, 3], [np.nan, 1], 2)],
)
def test_a_curve_of_k_without_values_or_choice_is_refused_by_name(curve: KCurve) -> None:
    with pytest.raises(ConfigError, match="rule 'odd'"):
        k_curves({"odd": curve})


def test_a_criterion_that_is_undefined_for_some_k_leaves_a_gap() -> None:
    figure = k_curves({"silhouette": KCurve([1, 2, 3], [np.nan, 0.2, 0.4], 3)})
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [True, False, False]
    assert pixels(figure).std() > 1


def test_purity_curves_say_the_purity_with_all_kept() -> None:
    curve = PurityCurve(np.array([0.9, 0.5]), np.array([0.5, 1.0]), np.array([1.0, 0.75]))
    figure = purity_contribution({"pit": curve}, target=0.9)
    assert legend(figure) == ["target 90 %", "pit (75 %)"]
    assert figure.axes[0].get_ylim()[0] < 0.75
    assert pixels(figure).std() > 1


def test_a_perfect_class_has_an_axis_with_room() -> None:
    figure = purity_contribution({"pit": PurityCurve(np.ones(1), np.ones(1), np.ones(1))})
    assert figure.axes[0].get_ylim() == (0.95, 1.0)
    assert pixels(figure).std() > 1


def test_examples_have_four_pictures_a_row_and_outlines_where_there_are_masks() -> None:
    figure = examples([an_example(), an_example(image_hw=(60, 40), found=False)])
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", "score, 0 to 1", "found", "truth"]
    assert [bool(axes.collections) for axes in figure.axes] == [False, False, True, True, False, False, False, True]
    assert pixels(figure).std() > 1


def test_outlines_of_small_masks_lie_where_they_lie_in_the_image() -> None:
    (outline,) = examples([an_example(image_hw=(40, 60))]).axes[2].collections
    corners = outline.get_paths()[0].vertices
    # mask 4:8 of 16 in an image of 60 by 40; outlines run half a mask pixel around the corner, at most
    assert corners.min(0) == pytest.approx([4 * 60 / 16, 4 * 40 / 16], abs=0.1)
    assert corners.max(0) == pytest.approx([8 * 60 / 16, 8 * 40 / 16], abs=0.1)


def test_all_score_maps_of_a_sheet_share_one_scale() -> None:
    sheet = [an_example(score=1.0), an_example(score=0.01)]
    for given, expected in (((0.0, 2.0), (0.0, 2.0)), (None, (0.0, 1.0))):
        figure = examples(sheet, scale=given)
        assert [figure.axes[i].images[-1].get_clim() for i in (1, 5)] == [expected, expected]


@pytest.mark.parametrize("features", [np.zeros((0, 3)), np.zeros((1, 3)), np.zeros((3, 0)), np.zeros(3)])
def test_a_map_of_fewer_than_two_samples_is_refused(features: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="two samples"):
        embed(features, seed=0)


def test_nan_features_and_missing_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        embed(np.array([[1.0], [np.nan]]), seed=0)
    with pytest.raises(ConfigError, match="a label per feature"):
        feature_map(np.zeros((3, 2)), ["a"], seed=0)


@pytest.mark.parametrize("n", [2, 50, 80])
@pytest.mark.parametrize("width", [1, 5])
def test_map_is_finite_for_few_many_narrow_and_identical_samples(n: int, width: int) -> None:
    features = np.random.default_rng(0).normal(size=(n, width))
    assert embed(features, seed=0).shape == (n, 2)
    assert np.isfinite(embed(features, seed=0)).all()
    assert np.ptp(embed(np.full((n, width), 0.1), seed=0)) == 0


def test_map_keeps_clouds_together_and_follows_the_seed() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 10)) + np.repeat([0, 8], 60)[:, None]
    points = embed(features, seed=0)
    assert np.array_equal(points, embed(features, seed=0))
    assert not np.array_equal(points, embed(features, seed=1))
    middles = points[:60].mean(0), points[60:].mean(0)
    nearest = np.argmin([np.linalg.norm(points - middle, axis=1) for middle in middles], axis=0)
    assert np.array_equal(nearest, np.repeat([0, 1], 60))


def test_feature_map_names_classes_with_counts_and_marks_novel_ones() -> None:
    features = np.random.default_rng(0).normal(size=(30, 4))
    figure = feature_map(features, ["pit"] * 20 + ["arc"] * 10, seed=0, novel={"arc"})
    assert legend(figure) == ["arc, novel (10)", "pit (20)"]
    assert pixels(figure).std() > 1


def test_large_feature_maps_show_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semwatch_training.evaluation.feature_map.embed", lambda features, seed: features)
    figure = feature_map(
        np.random.default_rng(0).normal(size=(MAX_POINTS + 500, 2)), ["pit"] * (MAX_POINTS + 500), seed=0
    )
    assert legend(figure) == [f"pit ({MAX_POINTS})"]
