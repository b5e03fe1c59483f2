import json
import math
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from semwatch.errors import ConfigError
from semwatch_training.evaluation import report
from semwatch_training.evaluation.report import Provenance, Table, as_dict, markdown, show, write
from semwatch_training.metrics.uncertainty import Rate, Spread

TABLE = Table(
    "Detection",
    ("engine", "AUROC", "false alarms"),
    (("nearest | patch", Spread.of([0.9, 0.92]), Rate.of(2, 191)), ("random", 0.5, None)),
    note="Published split.",
    command="semwatch-train evaluate",
)
FROM = Provenance("semwatch-train evaluate --seeds 1 2", (1, 2), "MTD, published split")


def a_figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return figure


def test_table_without_rows_is_a_head() -> None:
    assert markdown(Table("Empty", ("a", "b"), ())) == "## Empty\n\n| a   | b   |\n| --- | --- |\n"
    assert as_dict(Table("Empty", ("a",), ()))["rows"] == []


def test_rows_of_another_length_than_the_columns_are_refused() -> None:
    with pytest.raises(ConfigError, match="'Odd': a row of 1 cells for 2 columns"):
        Table("Odd", ("a", "b"), (("x",),))


def test_markdown_is_aligned_and_escapes_bars() -> None:
    assert markdown(TABLE).splitlines() == [
        "## Detection",
        "",
        "| engine           |             AUROC |           false alarms |",
        "| ---------------- | ----------------: | ---------------------: |",
        "| nearest \\| patch | 0.910 ± 0.014 (2) | 1.0 % [0.1, 3.7] (191) |",
        "| random           |             0.500 |                      – |",
        "",
        "Published split.",
        "",
        "`semwatch-train evaluate`",
    ]


def test_json_keeps_numbers_unrounded_and_undefined_ones_null() -> None:
    rows = as_dict(TABLE)["rows"]
    assert rows[0][1] == {"mean": pytest.approx(0.91), "std": pytest.approx(0.01 * math.sqrt(2)), "n": 2}
    assert rows[0][2]["n"] == 191
    assert rows[1] == ["random", 0.5, None]
    table = Table("t", ("a", "b", "c", "d"), ((math.nan, np.float32(0.25), np.int64(3), Spread.of([0.5])),))
    assert as_dict(table)["rows"] == [[None, 0.25, 3, {"mean": 0.5, "std": None, "n": 1}]]
    assert "| 0.250 |" in markdown(table)
    json.dumps(as_dict(table), allow_nan=False)


def test_console_shows_brackets_as_words_not_as_markup() -> None:
    console = Console(width=100, file=StringIO())
    show(Table("t [bold]", ("[red]",), (("[blue]x",),), note="[i]note"), console)
    text = console.file.getvalue()
    assert all(words in text for words in ("t [bold]", "[red]", "[blue]x", "[i]note"))


def test_report_carries_provenance_tables_and_pictures(tmp_path: Path) -> None:
    write(tmp_path / "out", "Evaluation", [TABLE], {"ROC curve, by image": a_figure()}, FROM)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {k: content[k] for k in ("schema", "title", "command", "seeds", "dataset", "version")} == {
        "schema": 1,
        "title": "Evaluation",
        "command": FROM.command,
        "seeds": [1, 2],
        "dataset": FROM.dataset,
        "version": version("semwatch"),
    }
    assert content["tables"] == [as_dict(TABLE)]
    assert content["figures"] == [{"caption": "ROC curve, by image", "file": "roc-curve-by-image.png"}]
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Evaluation\n")
    assert markdown(TABLE) in text
    assert "![ROC curve, by image](roc-curve-by-image.png)" in text
    assert all(words in text for words in (FROM.command, "1, 2", FROM.dataset, version("semwatch")))
    assert cv2.imread(str(tmp_path / "out" / "roc-curve-by-image.png")).shape == (150, 300, 3)


def test_report_of_nothing_is_still_a_report(tmp_path: Path) -> None:
    write(tmp_path, "Nothing", [], {}, Provenance("c", (), "none"))
    assert "- Seeds: none" in (tmp_path / "report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_captions_that_make_the_same_or_no_file_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must differ"):
        write(tmp_path, "t", [], {"ROC curve": a_figure(), "roc, curve": a_figure()}, FROM)
    with pytest.raises(ConfigError, match="gives no file name"):
        write(tmp_path, "t", [], {"../": a_figure()}, FROM)
    assert not list(tmp_path.iterdir())


def test_a_report_cut_short_leaves_no_json_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "first", [], {}, FROM)

    def full(target: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, "second", [], {"ROC": a_figure()}, FROM)
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


def test_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, "t", [TABLE], {"ROC": a_figure()}, FROM)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
