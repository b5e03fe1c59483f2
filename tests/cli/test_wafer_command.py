"""`semwatch wafer`: what a person at the terminal sees and gets."""

from pathlib import Path

import pytest

from commands import Command
from daemon import Daemon, make_site
from klarf_lots import KLARF, RECIPE, image, klarf, name
from planted_wafers import klarf_of, planted_wafer


@pytest.fixture
def lot(tmp_path: Path) -> Path:
    folder = tmp_path / "A1234.7"
    folder.mkdir()
    for n in (1, 2):
        planted = planted_wafer(40 + n, n_random=80, n_repeaters=1, n_scratches=1)
        (folder / f"w{n}.001").write_text(klarf_of(planted, name=str(n)))
    (folder / "image.tif").write_bytes(b"II*\0")
    return folder


def test_table_names_repeaters_and_scratches_of_each_wafer(semwatch: Command, lot: Path) -> None:
    said = semwatch("wafer", lot)
    assert said.code == 0
    assert "lot A1234.7 wafer 1 step M2-CMP" in said.words
    assert "lot A1234.7 wafer 2 step M2-CMP" in said.words
    assert "R1 repeater" in said.words
    assert "S1 scratch" in said.words


def test_json_gives_members_by_their_id_and_pictures_and_maps_are_written(
    semwatch: Command, lot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "maps"
    g85, e142 = out / "lot.g85", out / "lot.xml"
    said = semwatch("wafer", lot, "--out", out, "--svg", "--png", "--stack", "--g85", g85, "--e142", e142, "--json")
    assert said.code == 0
    first = said.json["wafers"][0]
    planted = planted_wafer(41, n_random=80, n_repeaters=1, n_scratches=1)
    (rows,) = [rows for kind, rows in planted.truth if kind == "repeater"]
    assert sorted(rows + 1) in [sorted(one["defects"]) for one in first["repeaters"]]
    names = {path.name for path in out.iterdir()}
    assert {"w1.001.1.wafermap.svg", "w2.001.2.wafermap.png", "A1234_7.M2-CMP.diestack.svg"} <= names
    assert {"lot.g85", "lot.xml"} <= names
    assert set(said.json["written"]) == {str(path) for path in out.iterdir()}


def test_folder_without_klarf_and_a_file_that_is_none_are_refused(semwatch: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("FileVersion is a word here")
    said = semwatch("wafer", tmp_path / "notes.txt")
    assert said.code == 1
    assert "notes.txt: line 1" in said.words
    (tmp_path / "notes.txt").unlink()
    said = semwatch("wafer", tmp_path)
    assert said.code == 2
    assert "no wafer in" in said.words


def test_klarf_that_was_read_is_never_written_over(semwatch: Command, lot: Path) -> None:
    before = (lot / "w1.001").read_bytes()
    said = semwatch("wafer", lot / "w1.001", "--g85", lot / "w1.001")
    assert said.code == 2
    assert "name another file" in said.words
    assert (lot / "w1.001").read_bytes() == before


@pytest.mark.parametrize("option", [("--edge-exclusion", "150"), ("--tolerance", "9000")])
def test_settings_that_leave_no_wafer_or_no_die_are_refused(
    semwatch: Command, lot: Path, option: tuple[str, str]
) -> None:
    assert semwatch("wafer", lot, *option).code == 2


def test_wafer_without_a_finding_says_so(semwatch: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.001"
    path.write_text(klarf_of(planted_wafer(5, n_random=30, n_repeaters=0, n_scratches=0)))
    assert "nothing that random defects would not explain" in semwatch("wafer", path).words


def test_lot_of_a_site_is_shown_from_the_klarf_that_was_written_back(
    semwatch: Command, tmp_path: Path, tiny_repository: Path
) -> None:
    recipe = {**RECIPE, "klarf": {**KLARF, "target_column": "AUTOOFFSEMCLASS"}}
    site = make_site(tmp_path / "site", tiny_repository, recipe=recipe)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put(f"lot7/{name(1)}", image(1, side=64))
        site.put("lot7/lot7.001", klarf([1]))
        daemon.wait_for((site.results / "lot7/lot7.r1.001").exists)
        assert daemon.stop() == 0
    for lot in ("lot7", "lot 7"):  # by its folder, and by its LotID
        said = semwatch("wafer", lot, "--site", site.file, "--class-column", "AUTOOFFSEMCLASS", "--json")
        assert [one["file"] for one in said.json["wafers"]] == [str(site.results / "lot7/lot7.r1.001")]
    assert semwatch("wafer", "lot8", "--site", site.file).code == 2
    said = semwatch("wafer", "lot7")
    assert "a lot by its name needs --site" in said.words
