import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from semwatch.errors import ConfigError
from semwatch.models.head_bank import Bank
from semwatch_training.learning import cycle_report
from semwatch_training.learning.cycle_report import (
    ClusterRecord,
    CycleReport,
    KRecord,
    judgement_record,
    read,
    write,
)
from semwatch_training.learning.promotion import ClassChange, Figures, Judgement

REFUSAL = "bridge would lose 8.0 points of accuracy (0.92 -> 0.84: 23 of 25 right before, 21 now); allowed are 5.0"


def cluster(name: str = "novel-1", **changed: Any) -> ClusterRecord:
    values = {
        **{"name": name, "size": 40, "cohesion": 0.31, "nearest_known": "bridge", "nearest_distance": 0.9},
        **{"cycles_seen": 1, "decision": "learned", "why": ()},
    }
    return ClusterRecord(**{**values, **changed})


def judgement(*reasons: str) -> Judgement:
    bridge = ClassChange("bridge", Figures(25, 23, 24, 1), Figures(25, 21, 21, 2))
    novel = ClassChange("novel-1", None, Figures(5, 0, 0, 1))
    return Judgement((bridge, novel), ("void",), 30, 0.1, 0.1, reasons)


def report_of(**changed: Any) -> CycleReport:
    values = {
        **{"started_utc": "2025-03-01T12:00:00Z", "outcome": "published", "old_version": 3, "version": 4},
        **{"n_claimed": 210, "n_duplicates": 12, "n_learned": 40, "n_bank": 718},
        "k": KRecord(
            k=17, interval=(16, 18), n_known=16, candidates=(16, 17, 18, 19), probability=(0.2, 0.6, 0.15, 0.05)
        ),
        "clusters": (cluster(), cluster("novel-2", size=7, decision="proposed", why=("has 7 crops; asked are 12",))),
        "judgements": (judgement_record("metal-2", judgement()),),
        **{"timings_s": {"claim": 0.2, "cluster": 4.5, "fit": 2.0}, "peak_memory_mb": 812.4},
    }
    return CycleReport(**{**values, **changed})


def nothing_new() -> CycleReport:
    k = KRecord(k=16, interval=(16, 16), n_known=16, candidates=(16,), probability=())
    return report_of(
        **{"outcome": "nothing-new", "version": None, "n_claimed": 0, "n_duplicates": 0, "n_learned": 0, "k": k},
        **{"clusters": (), "judgements": (), "timings_s": {}, "peak_memory_mb": 0.0},
    )


def crops(n: int, side: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 120, (n, side, side)).astype(np.uint8)


def words_of(folder: Path, report: CycleReport) -> str:
    write(folder, report, {})
    return (folder / "report.md").read_text()


def test_cycle_with_nothing_new_has_a_whole_report(tmp_path: Path) -> None:
    write(tmp_path / "new", nothing_new(), {})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]
    words = (tmp_path / "new" / "report.md").read_text()
    assert "**Nothing new**: head 3 goes on serving." in words
    assert "No new class was found." in words
    assert read(tmp_path / "new") == nothing_new()


def test_what_is_written_is_read_back_and_says_its_schema(tmp_path: Path) -> None:
    write(tmp_path, report_of(), {"novel-1": crops(3)})
    assert read(tmp_path) == report_of()
    assert json.loads((tmp_path / "report.json").read_bytes())["schema_version"] == 1


def test_words_of_a_published_cycle_tell_all_numbers(tmp_path: Path) -> None:
    words = words_of(tmp_path, report_of())
    for text in (
        "**Published head 4**, after head 3.",
        "210 unknowns were claimed, 12 of them duplicates",
        "17 classes were estimated, between 16 and 18 with 90 % probability; 16 are known",
        "40 unknowns became training crops beside 718 of the bank",
        "812 MB",
        "Verdict: promoted.",
        "Unknown of the defects among 30 golden crops: 10.0 % -> 10.0 %.",
        "nothing is proven of them: void.",
    ):
        assert text in words
    rows = {line.split("|")[1].strip(): line.split("|") for line in words.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in rows["novel-2"][2:9]] == [
        *("7", "0.310", "bridge", "0.900", "1", "proposed", "has 7 crops; asked are 12")
    ]
    assert [cell.strip() for cell in rows["bridge"][2:9]] == [
        "25",
        "0.920",
        "0.840",
        "0.958",
        "1.000",
        "0.040",
        "0.080",
    ]
    assert [cell.strip() for cell in rows["in all"][2:3]] == ["6.700"]
    assert "edge" not in words
    assert "the most that was looked for" not in words


def test_class_that_is_new_shows_dashes_where_there_are_no_old_figures(tmp_path: Path) -> None:
    golden = [line for line in words_of(tmp_path, report_of()).splitlines() if line.startswith("| novel-1 ")][1]
    assert [cell.strip() for cell in golden.split("|")[2:9]] == ["5", "–", "0.000", "–", "–", "–", "0.200"]


def test_refused_cycle_gives_its_reasons_first(tmp_path: Path) -> None:
    judged = judgement_record("metal-2", judgement(REFUSAL))
    refused = report_of(outcome="refused", version=None, judgements=(judged,), reasons=(f"metal-2: {REFUSAL}",))
    words = words_of(tmp_path, refused)
    assert f"**Refused**: head 3 goes on serving.\n\n- metal-2: {REFUSAL}" in words
    assert f"Verdict: refused. {REFUSAL}" in words
    assert read(tmp_path).judgements[0].reasons == (REFUSAL,)


def test_first_head_is_called_the_first(tmp_path: Path) -> None:
    assert "**Published head 1**, the first." in words_of(tmp_path, report_of(old_version=None, version=1))


def test_estimate_at_the_end_of_what_was_looked_for_says_that_there_may_be_more(tmp_path: Path) -> None:
    k = KRecord(k=18, interval=(17, 19), n_known=16, candidates=(16, 17, 18, 19), probability=(0.1, 0.2, 0.4, 0.3))
    assert "19 is the most that was looked for, so that there may be more" in words_of(tmp_path, report_of(k=k))


# ---- pictures ----


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (6, 1), (7, 2), (12, 2), (40, 2)])
def test_sheet_shows_twelve_crops_at_most_in_rows_of_six(tmp_path: Path, n: int, rows: int) -> None:
    write(tmp_path, report_of(), {"novel-1": crops(n)})
    sheet = cv2.imread(str(tmp_path / "novel-1.png"), cv2.IMREAD_GRAYSCALE)
    assert sheet is not None
    # The crops are dark, page and gaps white: runs of dark lines, taller than the letters of the title, are rows.
    dark = np.concatenate(([0], (sheet < 130).mean(axis=1) > 0.1, [0])).astype(int)
    heights = np.flatnonzero(np.diff(dark) < 0) - np.flatnonzero(np.diff(dark) > 0)
    assert (heights > 50).sum() == rows
    assert "![novel-1](novel-1.png)" in (tmp_path / "report.md").read_text()


def test_tiles_keep_their_order_and_their_pixels() -> None:
    some = crops(8)
    tiled = cycle_report._tiled(some)
    assert tiled.shape == (2 * 36 + 4, 6 * 36 + 4)
    assert np.array_equal(tiled[4:36, 4:36], some[0])
    assert np.array_equal(tiled[40:72, 40:72], some[7])
    assert (tiled[40:72, 76:] == 255).all()


def test_cluster_without_crops_has_no_sheet(tmp_path: Path) -> None:
    write(tmp_path, report_of(), {"novel-1": crops(0)})
    assert not list(tmp_path.glob("*.png"))
    assert "![" not in (tmp_path / "report.md").read_text()


def test_examples_of_a_cluster_that_the_report_does_not_name_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="examples of novel-9"):
        write(tmp_path / "new", report_of(), {"novel-9": crops(2)})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [np.zeros((2, 8), np.uint8), np.zeros((2, 8, 8), np.float32)])
def test_crops_of_another_kind_are_refused(tmp_path: Path, wrong: NDArray[Any]) -> None:
    with pytest.raises(ConfigError, match="examples of novel-1 must be"):
        write(tmp_path, report_of(), {"novel-1": wrong})


def test_map_is_drawn_where_crops_are_given_and_not_of_a_single_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bank = Bank(rng.normal(size=(40, 8)).astype(np.float32), ("bridge", "novel-1") * 20, ("",) * 40, ("",) * 40)
    write(tmp_path / "map", report_of(), {}, mapped=bank)
    assert cv2.imread(str(tmp_path / "map" / "features.png")) is not None
    assert "![features](features.png)" in (tmp_path / "map" / "report.md").read_text()
    single = Bank(bank.features[:1], ("bridge",), ("",), ("",))
    write(tmp_path / "none", report_of(), {}, mapped=single)
    assert not (tmp_path / "none" / "features.png").exists()


# ---- the format ----


def test_report_that_cannot_be_finished_leaves_no_json_of_an_older_one(tmp_path: Path) -> None:
    write(tmp_path, report_of(), {})
    with pytest.raises(ConfigError):
        write(tmp_path, report_of(), {"novel-1": np.zeros((2, 8), np.uint8)})
    with pytest.raises(ConfigError, match="has not written its report"):
        read(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"schema_version": 2}', b"\xff"])
def test_damaged_report_is_named_with_its_fault(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "report.json").write_bytes(damage)
    with pytest.raises(ConfigError, match=r"report\.json is no cycle report"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["", "../escape", "a/b", ".hidden", "a b"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        cluster(name)


def test_judgement_is_said_in_the_words_of_the_json() -> None:
    record = judgement_record("metal-2", judgement(REFUSAL))
    bridge, novel = record.classes
    assert (bridge.old_accuracy, bridge.accuracy, bridge.old_purity, bridge.purity) == (0.92, 0.84, 23 / 24, 1)
    assert (novel.old_accuracy, novel.purity, novel.unknown_share) == (None, None, 0.2)
    assert (record.unproven, record.reasons) == (("void",), (REFUSAL,))
