from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from progress import quiet
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.data.datasets import Sample
from semwatch_training.evaluation.binarization_rules import NAMES, count_error, mask_iou, mask_table
from semwatch_training.evaluation.evaluate_detection import Engine, Field, detection, judge, of_samples, synthetic
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.metrics.uncertainty import Rate, Spread
from semwatch_training.synthetic import DEFECT_TYPES

SIDE = 64


class Brightness(nn.Module):
    """Takes bright places for defects; of sign -1, dark ones. ``offset`` is added to the raw score."""

    def __init__(self, sign: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.sign, self.offset = sign, offset
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(tuple(image.shape))
        score = self.sign * functional.avg_pool2d(image[:, None].float() / 255, 4)[:, 0]
        return score, score.flatten(1).amax(dim=1) + self.offset


def field(label: str, *box: int, level: int = 220, marked: bool = True) -> Field:
    """A dark field with a bright box (x0, y0, x1, y1), if any, and its mask."""
    image = np.random.default_rng(len(box) + sum(box)).integers(10, 30, (SIDE, SIDE)).astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    if box:
        x0, y0, x1, y1 = box
        image[y0:y1, x0:x1] = level
        mask[y0:y1, x0:x1] = marked
    return Field(image, label, mask)


def fields() -> list[Field]:
    return [
        *(field(DEFECT_FREE) for _ in range(4)),
        field("spot", 8, 8, 24, 24),
        field("spot", 32, 16, 48, 32),
        field("line", 0, 40, 64, 48),
    ]


def judged(engines: dict[str, Engine], given: list[Field]) -> tuple[list[Table], dict[str, object]]:
    return detection(engines, given, len(given), false_alarm_rate=0.05, note="Boxes.", progress=quiet)


def engine(*graphs: nn.Module, thresholds: tuple[float, ...] = ()) -> Engine:
    return Engine(graphs or (Brightness(),), SIDE, "none", thresholds)


def row(table: Table, name: str) -> dict[str, Cell]:
    (cells,) = [cells for cells in table.rows if cells[0] == name]
    return dict(zip(table.columns, cells, strict=True))


# ---- judging ----


def test_no_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no image to judge"):
        judge({"bright": engine()}, [], 0, progress=quiet)
    with pytest.raises(ConfigError, match="there is no image to judge"):
        judged({"bright": engine()}, [])


def test_every_field_is_read_once_and_shown_to_every_graph_at_its_size() -> None:
    small, large = (Brightness(), Brightness()), Brightness()
    engines = {"small": Engine(small, 32, "none"), "large": Engine((large,), 128, "4")}
    n_read, told = 0, []

    def reading() -> Iterator[Field]:
        nonlocal n_read
        for given in fields():
            n_read += 1
            yield given

    kept, found = judge(engines, reading(), 7, progress=lambda _, done, total: told.append((done, total)))
    assert (n_read, len(kept), told) == (7, 7, [(done, 7) for done in range(1, 8)])
    assert [graph.seen for graph in small] == [[(1, 32, 32)] * 7] * 2
    assert large.seen == [(1, 128, 128)] * 7
    assert {name: len(runs) for name, runs in found.items()} == {"small": 2, "large": 1}
    assert [m.shape for m in found["large"][0].maps] == [(32, 32)] * 7
    assert found["small"][0].raw.shape == (7,)


def test_an_engine_that_is_right_has_ones_everywhere_and_its_opposite_none() -> None:
    found, figures = judged({"right": engine(), "wrong": engine(Brightness(-1.0))}, fields())
    table, by_class, rules = found
    right, wrong = row(table, "right"), row(table, "wrong")
    for name in ("image AUROC", "AP", "F1-max"):
        assert right[name].mean == 1.0
    assert right["pixel AUROC"].mean > 0.99
    assert right["AUPRO"].mean > 0.95
    assert wrong["pixel AUROC"].mean < 0.2
    ones = Spread.of([1.0])  # its deviation is NaN, which equals nothing from Python 3.13 on: compared as printed
    assert repr(row(by_class, "right")) == repr({"engine": "right", "line": ones, "spot": ones})
    assert right["false alarms"] is None  # no gate
    assert rules.title == "Masks from the maps of right"
    assert list(figures) == ["ROC by image, first seed", "Examples: right"]
    assert "7 fields, 4 normal; pixel figures at 256x256 over 7 of them; the gate is set for 5%" in table.note


def test_fields_of_one_kind_only_are_refused() -> None:
    normal, defective = fields()[:4], fields()[4:]
    with pytest.raises(ConfigError, match="all 4 samples are normal"):
        judged({"bright": engine()}, normal)
    with pytest.raises(ConfigError, match="all 3 samples are defective"):
        judged({"bright": engine()}, defective)
    with pytest.raises(ConfigError):
        judged({"bright": engine()}, [*normal, field("spot", 8, 8, 24, 24, marked=False)])


def test_a_defect_with_an_empty_mask_counts_by_image_and_not_by_pixel() -> None:
    hidden = field("spot", 4, 4, 60, 60, marked=False)  # most of it would count as bright normal pixels
    with_it, without = (judged({"bright": engine()}, [*fields(), *more])[0][0] for more in ([hidden], []))
    assert "8 fields, 4 normal; pixel figures at 256x256 over 7 of them" in with_it.note
    assert repr(row(with_it, "bright")["pixel AUROC"]) == repr(row(without, "bright")["pixel AUROC"])


def test_nan_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        judged({"broken": engine(Brightness(offset=float("nan")))}, fields())


def test_figures_spread_over_the_seeds_of_an_engine() -> None:
    table = judged({"both": engine(Brightness(), Brightness(-1.0))}, fields())[0][0]
    cell = row(table, "both")["pixel AUROC"]
    assert cell.n == 2
    assert cell.std > 0.3


# ---- false alarms ----


def test_false_alarms_are_counted_above_the_threshold_and_not_at_it() -> None:
    given = [field(DEFECT_FREE, 8, 8, 24, 24, level=level) for level in (51, 102, 153, 204)]  # raw 0.2, 0.4, 0.6, 0.8
    given.append(field("spot", 8, 8, 24, 24, level=255))
    at = judge({"e": engine()}, given, 5, progress=quiet)[1]["e"][0].raw[2]
    table = judged({"gated": engine(thresholds=(float(at),))}, given)[0][0]
    assert row(table, "gated")["false alarms"] == Rate.of(1, 4)


def test_false_alarms_of_several_seeds_are_their_mean_with_the_interval_of_one_run() -> None:
    given = fields()
    gated = engine(Brightness(), Brightness(), Brightness(), thresholds=(0.0, 0.5, 0.5))  # 4, 0 and 0 of 4
    alarms = row(judged({"gated": gated}, given)[0][0], "gated")["false alarms"]
    assert alarms.rate == pytest.approx(1 / 3)
    one = Rate.of(1, 4)
    assert (alarms.low, alarms.high, alarms.n) == (one.low, one.high, 4)
    assert alarms.low <= alarms.rate <= alarms.high


# ---- examples ----


def test_examples_show_the_middle_of_each_class_and_say_where_the_gate_is_shut() -> None:
    _, figures = judged({"bright": engine(thresholds=(0.5,))}, fields())
    captions = [axes.get_ylabel() for axes in figures["Examples: bright"].axes if axes.get_ylabel()]
    text = " ".join(captions)
    assert f"{DEFECT_FREE}\n" in text
    assert text.count("gate shut") == 1  # the normal field's
    assert sum("spot" in caption for caption in captions) == 1


def test_examples_are_eight_at_most() -> None:
    given = [field(DEFECT_FREE), *(field(f"kind {i}", 8, 8, 24, 24 + i) for i in range(10))]
    _, figures = judged({"bright": engine()}, given)
    captions = [axes.get_ylabel() for axes in figures["Examples: bright"].axes]
    assert sum("kind" in caption or DEFECT_FREE in caption for caption in captions) == 8


# ---- fields ----


def written(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


def masked(path: Path, *box: int, size_hw: tuple[int, int] = (SIDE, SIDE)) -> Path:
    mask = np.zeros(size_hw, np.uint8)
    if box:
        x0, y0, x1, y1 = box
        mask[y0:y1, x0:x1] = 255
    return written(path, mask)


def test_an_image_with_two_defects_is_one_field_with_both_masks(tmp_path) -> None:
    image = written(tmp_path / "a.png", fields()[4].image)
    one, two = masked(tmp_path / "1.png", 0, 0, 4, 4), masked(tmp_path / "2.png", 10, 10, 14, 14)
    normal = written(tmp_path / "n.png", fields()[0].image)
    found = list(
        of_samples(
            [Sample(image, "spot", one, (two,)), Sample(image, "spot", two, (one,)), Sample(normal, DEFECT_FREE)]
        )
    )
    assert [(f.label, int(f.mask.sum())) for f in found] == [("spot", 32), (DEFECT_FREE, 0)]
    assert np.array_equal(found[0].image, fields()[4].image)


def test_a_mask_of_another_size_and_a_missing_one_are_refused(tmp_path) -> None:
    assert list(of_samples([])) == []
    image = written(tmp_path / "a.png", fields()[4].image)
    with pytest.raises(ConfigError, match="the mask is 32 x 32 px"):
        list(of_samples([Sample(image, "spot", masked(tmp_path / "m.png", 0, 0, 4, 4, size_hw=(32, 32)))]))
    with pytest.raises(ConfigError, match="no mask shows its 'spot'"):
        list(of_samples([Sample(image, "spot")]))


def test_synthetic_fields_are_as_many_as_said_with_masks_where_there_is_a_defect() -> None:
    assert list(synthetic("DEP", n_normal=0, n_per_type=0, first_seed=1)) == []
    found = list(synthetic("DEP", n_normal=2, n_per_type=1, first_seed=1, side_px=256))
    assert [f.label for f in found] == [DEFECT_FREE, DEFECT_FREE, *DEFECT_TYPES["DEP"]]
    assert [bool(f.mask.any()) for f in found] == [False, False, True, True]
    assert {(f.image.shape, f.mask.shape, f.mask.dtype) for f in found} == {((256, 256), (256, 256), np.dtype(bool))}


# ---- masks ----


def grid(x0: int, y0: int, x1: int, y1: int, g: int = 8) -> np.ndarray:
    mask = np.zeros((g, g), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_iou_of_masks_by_hand() -> None:
    empty = np.zeros((8, 8), bool)
    assert mask_iou(empty, empty) == 1.0
    assert mask_iou(grid(0, 0, 2, 2), empty) == 0.0
    assert mask_iou(empty, grid(0, 0, 2, 2)) == 0.0
    assert mask_iou(grid(0, 0, 2, 2), grid(0, 0, 2, 2)) == 1.0
    assert mask_iou(grid(0, 0, 2, 2), grid(4, 4, 6, 6)) == 0.0
    assert mask_iou(grid(0, 0, 4, 2), grid(0, 0, 2, 2)) == 0.5  # 4 common of 8
    assert mask_iou(grid(0, 0, 3, 3), grid(1, 1, 4, 4)) == pytest.approx(4 / 14)


def test_iou_is_taken_at_the_grid_of_the_mask() -> None:
    fine = grid(0, 0, 16, 16, g=64)  # 2 x 2 of the 8 x 8 cells
    assert mask_iou(grid(0, 0, 2, 2), fine) == 1.0
    wide = np.zeros((32, 128), bool)
    wide[:8, :32] = True  # the same quarters of each side
    assert mask_iou(grid(0, 0, 2, 2), wide) == 1.0


def test_a_defect_thinner_than_half_a_cell_keeps_the_cells_it_covers_most() -> None:
    thin = grid(0, 3, 64, 5, g=64)  # 2 of the 8 rows of a cell
    assert mask_iou(grid(0, 0, 8, 1), thin) == 1.0


def test_masks_without_a_truth_cannot_be_judged() -> None:
    assert mask_table({}, title="x").rows == ()
    flat = np.zeros((8, 8), np.float32)
    for maps in ([], [flat]):
        with pytest.raises(ConfigError, match="no field of DEP has a true mask"):
            mask_table({"DEP": (maps, [np.zeros((8, 8), bool)] * len(maps))}, title="x")


def test_the_count_is_off_by_the_regions_too_many_or_too_few() -> None:
    none, one = np.zeros((8, 8), bool), grid(0, 0, 2, 2)
    two = one | grid(5, 5, 7, 7)
    fine = np.kron(two, np.ones((8, 8), bool))  # of another size
    assert [count_error(a, b) for a, b in ((none, none), (one, none), (none, two), (two, one), (two, fine))] == [
        0, 1, 2, 1, 0,
    ]  # fmt: skip
    assert count_error(grid(0, 0, 2, 2) | grid(2, 2, 4, 4), one) == 0  # they touch at a corner


def test_every_rule_is_judged_over_the_defective_fields_of_each_group() -> None:
    score, truth = np.zeros((16, 16), np.float32), grid(4, 4, 10, 10, g=16)
    score[truth] = 1.0
    half_right = [score, score, score], [truth, np.zeros_like(truth), ~truth]
    table = mask_table({"BEOL": half_right, "DEP": ([score], [truth])}, title="x", floor=0.5)
    assert [cells[:2] for cells in table.rows] == [
        (group, name) for group in ("BEOL", "DEP") for name in NAMES.values()
    ]
    for _, _, iou, share, errors in table.rows[: len(NAMES)]:
        assert iou.n == errors.n == 2
        assert share == 0.5  # right on the first field; the third's truth is all the rest
    for _, _, iou, share, errors in table.rows[len(NAMES) :]:
        assert (iou.n, share, errors.mean) == (1, 1.0, 0.0)
        assert iou.mean > 0.7
        assert np.isnan(iou.std)  # one field has no spread
    assert table.note.startswith("3 defective fields")


def test_graphs_are_not_trained_while_they_are_judged() -> None:
    class Learning(Brightness):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            assert not torch.is_grad_enabled()
            return super().forward(image)

    judge({"e": engine(Learning())}, fields()[:1], 1, progress=quiet)
