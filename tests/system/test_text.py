"""Names that anybody may give, at each place where they are shown."""

import csv
import io
import json
import logging
import unicodedata

import pytest
from rich.console import Console

from semwatch.cli.options import printable
from semwatch.store import lot_table
from semwatch.system import journal
from semwatch.system.text import escaped, for_spreadsheet

NAMES = [
    "a\nERROR semwatch.service: the disk is broken.png",
    "b\x1b]0;owned\x07\x1b[2J\x1b[31m.png",
    "cr\rERROR fake.png",
    "rtl\u202egnp.png",
    "c1\x9b31m.png",
    "line\u2028paragraph\u2029.png",
    "bytes\udcff\udc9b.png",
    "nul-free\x7f\x08\x0b\x0c.png",
]
FORMULAS = ["=cmd|' C calc'!A0.png", "+1+1.png", "@SUM(1).png", "-2+3.png", "\t=1.png", "\r=1.png"]
FINE = ["Größe/µ-7 (2).tif", "lot7/ä b.png", "😀.png", "日本/é.png", "a=b+c.png"]


def is_plain(text: str) -> bool:
    return all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c != "\u202e" for c in text)


def record(name: str) -> logging.LogRecord:
    return logging.LogRecord("semwatch", logging.INFO, "f", 1, "%s reviewed", (name,), None)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_moves_a_cursor_or_forges_a_line_in_a_log(name: str) -> None:
    for formatter in (
        journal.TextFormatter("%(levelname)s %(name)s: %(message)s"),
        journal.PrefixFormatter("%(levelname)s %(name)s: %(message)s"),
    ):
        first, *more = formatter.format(record(name)).split("\n")
        assert "INFO semwatch: " in first
        assert is_plain("".join([first, *more]))
        assert all(line.removeprefix("<6>").startswith("    ") for line in more)
    assert is_plain(journal.fields_of(record(name))["MESSAGE"].replace("\n", ""))
    (line,) = journal.JsonFormatter().format(record(name)).split("\n")
    assert is_plain(line)
    assert json.loads(line)["message"].endswith("reviewed")


@pytest.mark.parametrize("name", NAMES)
def test_no_name_moves_a_cursor_on_a_terminal(name: str) -> None:
    shown = io.StringIO()
    Console(file=shown, width=300).print(printable(name), soft_wrap=True)
    assert is_plain(shown.getvalue().replace("\n", ""))


@pytest.mark.parametrize("name", [*NAMES, *FORMULAS])
def test_no_cell_of_a_lot_is_a_formula_or_ends_its_line(name: str) -> None:
    line = lot_table._csv_line([name, -1.5, None, name])
    ((first, number, empty, last),) = csv.reader(io.StringIO(line.decode(), newline=""))
    assert (number, empty, first) == ("-1.5", "", last)
    assert is_plain(first)
    assert first[0] not in "=+-@\t\r"


@pytest.mark.parametrize("name", FINE)
def test_plain_names_of_any_script_stay_as_they_are(name: str) -> None:
    assert escaped(name) == for_spreadsheet(name) == name
